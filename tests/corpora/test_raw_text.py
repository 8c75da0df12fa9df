"""Reading archives: the formats' rules, and archives that are damaged or hostile."""

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.stand_ins import tar_gz, zip_file

from normexp.corpora import raw_text
from normexp.corpora.raw_text import FORMATS, lines, member_hash, open_member
from normexp.errors import UserError

# One sentence a line: a lone CR and Unicode's separators are part of it.
TEXT = "eins\rzwei\n\u2028drei\u0085\n\nvier"
LINES = ["eins\rzwei", "\u2028drei\u0085", "", "vier"]


def read(path: Path, member: str) -> list[str]:
    with open_member(path, member) as text:
        return list(lines(text))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.tgz", tar_gz({"x/other": "no", "x/text": TEXT, "x/a-text": "no", "x/._text": "no"})),
        ("a.zip", zip_file({"x/other": "no", "x/text": TEXT, "x/a-text": "no"})),
        ("text.gz", gzip.compress(TEXT.encode())),
        ("text", TEXT.encode()),
    ],
    ids=["tgz", "zip", "gz", "plain"],
)
def test_every_container_gives_the_same_lines(tmp_path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    assert read(tmp_path / file, "text") == LINES


@pytest.mark.parametrize("name", ["/etc/text", "../../text", "x/../../../text"])
def test_nothing_is_written_where_an_archive_says(tmp_path, name: str) -> None:
    folder = tmp_path / "deep" / "archives"
    folder.mkdir(parents=True)
    for file, content in (("a.tgz", tar_gz({name: "a\n"})), ("a.zip", zip_file({name: "a\n"}))):
        (folder / file).write_bytes(content)
        read(folder / file, "text")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.tgz", "a.zip"]


def link_in_tar(kind: bytes, target: str, name: str = "text") -> bytes:
    return special_in_tar((kind, target, name))


def special_in_tar(*special: tuple[bytes, str, str], **regular: str) -> bytes:
    """A .tgz with members of (type, target, name), and then regular ones."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for kind, target, name in special:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        for name, text in regular.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def link_in_zip(target: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("text")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, target)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.tgz", link_in_tar(tarfile.SYMTYPE, "/etc/hostname")),
        ("a.tgz", link_in_tar(tarfile.LNKTYPE, "/etc/hostname")),
        ("a.tgz", link_in_tar(tarfile.DIRTYPE, "")),
        ("a.tgz", link_in_tar(tarfile.FIFOTYPE, "")),
        ("a.tgz", link_in_tar(tarfile.CHRTYPE, "")),
        ("a.tgz", link_in_tar(tarfile.BLKTYPE, "")),
        ("a.tgz", link_in_tar(tarfile.SYMTYPE, "../../../etc/hostname")),
        ("a.zip", link_in_zip("/etc/hostname")),
    ],
    ids=[
        "symlink",
        "hard link",
        "folder",
        "pipe",
        "character device",
        "block device",
        "relative symlink",
        "symlink in zip",
    ],
)
def test_only_regular_files_are_read(tmp_path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match="regular file"):
        read(tmp_path / file, "text")


def test_hostile_members_beside_the_wanted_one(tmp_path) -> None:
    """A link to a folder outside, and a file to be written through it."""
    folder, outside = tmp_path / "archives", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    content = special_in_tar(
        (tarfile.SYMTYPE, str(outside), "x"),
        (tarfile.LNKTYPE, "/etc/passwd", "passwd"),
        (tarfile.CHRTYPE, "", "null"),
        **{"x/evil": "e", "../outside/evil": "e", f"{outside}/evil": "e", "x/text": "a\n"},
    )
    (folder / "a.tgz").write_bytes(content)
    assert read(folder / "a.tgz", "text") == ["a"]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.tgz"]


@pytest.mark.parametrize("found", [{}, {"a/text": "1", "b/text": "2"}], ids=["none", "two"])
def test_a_member_must_be_one_file(tmp_path, found: dict[str, str]) -> None:
    (tmp_path / "a.tgz").write_bytes(tar_gz(found))
    with pytest.raises(UserError, match=f"{len(found)} files named text"):
        read(tmp_path / "a.tgz", "text")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.tgz", tar_gz({"text": "wort\n" * 9999})[:60]),
        ("a.tgz", b"<html>not found</html>"),
        ("a.zip", zip_file({"text": TEXT})[:40]),
        ("a.gz", gzip.compress(TEXT.encode())[:-9]),
        ("a.gz", gzip.compress(TEXT.encode())[:10] + bytes([255] * 20)),
        ("a.gz", b"no gzip"),
    ],
    ids=["tgz cut", "tgz is html", "zip cut", "gz cut", "gz garbled", "gz is text"],
)
def test_damaged_archives_are_named(tmp_path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file} is damaged"):
        read(tmp_path / file, "text")


@pytest.mark.parametrize(
    ("file", "pack"),
    [
        ("a.gz", lambda text: gzip.compress(text.encode())),
        ("a.tgz", lambda text: tar_gz({"a": text})),
        ("a.zip", lambda text: zip_file({"a": text})),
    ],
    ids=["gz", "tgz", "zip"],
)
def test_unpacked_size_is_bounded(tmp_path, monkeypatch, file: str, pack) -> None:
    monkeypatch.setattr(raw_text, "MAX_MEMBER_BYTES", 100_000)
    (tmp_path / file).write_bytes(pack("a" * 100_000))
    assert len(read(tmp_path / file, "a")[0]) == 100_000
    (tmp_path / file).write_bytes(pack("a" * 100_001))
    with pytest.raises(UserError, match="larger than 100000 bytes"):
        read(tmp_path / file, "a")


def test_hash_of_a_member(tmp_path) -> None:
    """As git hash-object, md5sum and sha256sum print for the line "test"."""
    (tmp_path / "a.tgz").write_bytes(tar_gz({"x/text": "test\n"}))
    (tmp_path / "text.gz").write_bytes(gzip.compress(b"test\n"))
    for file in ("a.tgz", "text.gz"):
        hashes = [
            member_hash(tmp_path / file, "text", name) for name in ("git_blob", "md5", "sha256")
        ]
        assert hashes == [
            "9daeafb9864cf43055ae93beb0afd6c7d144bfa4",
            "d8e8fca2dc0f896fd7cb4cb0031ba249",
            "f2ca1bb6c7e907d06dafe4687e579fce76b37e4e93b7605022da52e6ccc26fd2",
        ]


def test_text_that_is_not_utf8_is_named(tmp_path) -> None:
    (tmp_path / "text").write_bytes("Müller".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read(tmp_path / "text", "text")


@pytest.mark.parametrize(
    ("form", "line", "expected"),
    [
        ("ted_tags", "<url>http://a.b</url>", []),
        ("ted_tags", "x <talkid>3</talkid>", []),
        ("ted_tags", "<keywords>a, b</keywords>", []),
        ("ted_tags", "<title>A talk</title>", ["A talk"]),
        ("ted_tags", "<description>TED Talk: it </description>", ["TED Talk: it "]),
        ("ted_tags", "<i>it</i> stays \u2019", ["<i>it</i> stays \u2019"]),
        ("ted_tags", "", [""]),
        ("segments", '<seg id="12"> It\u2019s  so. </seg>', ["It\u2019s  so."]),
        ("segments", '  <seg id="1">a</seg>  ', ["  a"]),
        ("segments", "<doc docid='1'>", []),
        ("segments", "a line", []),
    ],
)
def test_formats(form: str, line: str, expected: list[str]) -> None:
    assert list(FORMATS[form](io.StringIO(line + "\n", newline="\n"))) == expected
