"""Archives that stand in for the real ones, and readers of what becomes of them."""

import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path


def tar_gz(members: dict[str, str]) -> bytes:
    """A .tgz of regular files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def zip_file(members: dict[str, str]) -> bytes:
    """A .zip of regular files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            archive.writestr(name, text.encode())
    return buffer.getvalue()


def archive_entry(file: str, content: bytes, urls: list[str] | None = None) -> dict:
    """A catalogue entry that fits `content`."""
    digest = hashlib.sha256(content).hexdigest()
    return {"file": file, "size": len(content), "hash": f"sha256:{digest}", "verified": True,
            "urls": urls or []}  # fmt: skip


def text_lines(path: Path) -> list[str]:
    """Lines of a corpus file; only a line feed ends one."""
    return path.read_bytes().decode().split("\n")[:-1]


def local_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder for `data.local`."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# "d" of test is not in train.
PTB_TEXT = {
    "ptb.train.txt": " a b <unk> \n b b N c \n" * 20,
    "ptb.valid.txt": " a b c \n",
    "ptb.test.txt": " c <unk> \n b d \n",
}

PTB_ARCHIVES = {name: text.encode() for name, text in PTB_TEXT.items()}


def ptb_catalogue_archives(urls: dict[str, list[str]] | None = None) -> dict[str, list[dict]]:
    """The `archives` of a catalogue entry that fits PTB_ARCHIVES."""
    return {
        name: [archive_entry(name, content, (urls or {}).get(name, []))]
        for name, content in PTB_ARCHIVES.items()
    }


def gzipped(content: bytes) -> bytes:
    """`content` as gzip, without a time in its header."""
    return gzip.compress(content, mtime=0)


IWSLT14_SETS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")


def iwslt14_members(pairs: list[tuple[str, str]]) -> dict[str, str]:
    """The files of de-en.tgz, with the given lines of train.tags and two segments per test set."""
    members = {
        "de-en/README": "not read\n",
        "de-en/train.tags.de-en.de": "".join(f"{german}\n" for german, _ in pairs),
        "de-en/train.tags.de-en.en": "".join(f"{english}\n" for _, english in pairs),
        "de-en/train.en": "not read\n",
    }
    for name in IWSLT14_SETS:
        for language in ("de", "en"):
            segments = f'<seg id="1"> {name} It\u2019s A </seg>\n<p>\n<seg id="2">B</seg>\n'
            members[f"de-en/IWSLT14.{name}.de-en.{language}.xml"] = f"<doc>\n{segments}</doc>\n"
    return members


def served(mirror, file: str, content: bytes) -> list[str]:
    """Mirrors of a file: a dead one, then one that has moved it."""
    mirror.files[f"/new/{file}"] = content
    mirror.moved[f"/old/{file}"] = f"{mirror.url}/new/{file}"
    return [f"{mirror.url}/dead/{file}", f"{mirror.url}/old/{file}"]
