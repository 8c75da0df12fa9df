"""Hashes of files, including git's."""

import hashlib
from pathlib import Path
from typing import BinaryIO

ALGORITHMS = ("sha256", "sha1", "md5", "git_blob")
_BLOCK = 1 << 20


def stream_hash(stream: BinaryIO, algorithm: str, size: int) -> str:
    """Hexadecimal digest of a stream of `size` bytes.

    `git_blob` is what `git hash-object` prints: SHA-1 over ``blob <size>\\0`` and the bytes; no
    other hash of some corpora is published.
    """
    digest = hashlib.new("sha1" if algorithm == "git_blob" else algorithm)
    if algorithm == "git_blob":
        digest.update(b"blob %d\0" % size)
    while block := stream.read(_BLOCK):
        digest.update(block)
    return digest.hexdigest()


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as stream:
        return stream_hash(stream, algorithm, path.stat().st_size)
