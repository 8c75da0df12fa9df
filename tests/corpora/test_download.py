"""Where a corpus's files come from, and what is said when they do not come."""

import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import requests
from support.stand_ins import archive_entry, gzipped

from normexp.corpora import download
from normexp.corpora.catalogue import Archive, Corpus, load_catalogue
from normexp.corpora.download import CHUNK, fetch
from normexp.errors import UserError

CONTENT = bytes(range(256)) * (16 * CHUNK // 256)
NOWHERE = "http://127.0.0.1:9"  # the port of the discard service: nobody listens


@pytest.fixture
def corpus() -> Corpus:
    """Only its name matters here."""
    return load_catalogue()["ptb"]


def archives(*entries: dict) -> list[Archive]:
    return [Archive.model_validate(entry) for entry in entries]


def entry(*urls: str) -> dict:
    return archive_entry("text.bin", CONTENT, list(urls))


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_download(corpus, mirror, tmp_path) -> None:
    mirror.files["/text.bin"] = CONTENT
    wanted = archives(entry(f"{mirror.url}/text.bin"))
    path = fetch(corpus, wanted, tmp_path, None, progress=False)
    assert path.read_bytes() == CONTENT
    assert files_in(tmp_path) == {"text.bin"}
    assert fetch(corpus, wanted, tmp_path, None, progress=False) == path
    assert mirror.requests == ["/text.bin"]  # the second time the file was there


def test_gzipped_file_stays_packed(corpus, mirror, tmp_path) -> None:
    packed = gzipped(CONTENT)
    mirror.files["/text.gz"] = packed
    wanted = archives(archive_entry("text.gz", packed, [f"{mirror.url}/text.gz"]))
    assert fetch(corpus, wanted, tmp_path, None, progress=False).read_bytes() == packed


def test_next_mirror_after_a_bad_one(corpus, mirror, tmp_path) -> None:
    mirror.files |= {"/cut": CONTENT, "/wrong": bytes(len(CONTENT)), "/good": CONTENT}
    mirror.cut["/cut"] = 3 * CHUNK
    mirror.resumable = {"/wrong"}
    urls = [
        f"{NOWHERE}/text",
        *(f"{mirror.url}/{name}" for name in ("cut", "gone", "wrong", "good")),
    ]
    path = fetch(corpus, archives(entry(*urls)), tmp_path, None, progress=False)
    assert path.read_bytes() == CONTENT
    # /cut is asked once more, since it had brought something. What it left does not go with what
    # /wrong sends, so that one is asked for the whole.
    assert mirror.requests == ["/cut", "/cut", "/gone", "/wrong", "/wrong", "/good"]


def test_interchangeable_file(corpus, mirror, tmp_path) -> None:
    mirror.files["/other.bin"] = b"the same in another container"
    other = archive_entry("other.bin", mirror.files["/other.bin"], [f"{mirror.url}/other.bin"])
    path = fetch(corpus, archives(entry(f"{mirror.url}/gone"), other), tmp_path, None, False)
    assert path == tmp_path / "other.bin"


def test_error_names_file_mirrors_and_remedy(corpus, mirror, tmp_path) -> None:
    mirror.files |= {"/cut": CONTENT, "/wrong": b"x" * len(CONTENT), "/short": b"short"}
    mirror.cut["/cut"] = 3 * CHUNK
    urls = [f"{NOWHERE}/text", *(f"{mirror.url}/{n}" for n in ("cut", "gone", "wrong", "short"))]
    with pytest.raises(UserError) as error:
        fetch(corpus, archives(entry(*urls)), tmp_path, None, progress=False)
    message = str(error.value)
    assert "could not get text.bin" in message
    reasons = ["no connection, or it broke off", "no connection, or it broke off", "HTTP 404",
               "sha256 ", f"5 bytes instead of {len(CONTENT)}"]  # fmt: skip
    for url, reason in zip(urls, reasons, strict=True):
        assert f"{url} ({reason}" in message
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert f"into {tmp_path}" in message and "data.local=FOLDER" in message
    assert "\n" not in message
    assert files_in(tmp_path) == set()  # nothing half-written that could be taken for the file


def test_damaged_file_from_before_is_fetched_again(corpus, mirror, tmp_path) -> None:
    (tmp_path / "text.bin").write_bytes(CONTENT[:100])
    mirror.files["/text.bin"] = CONTENT
    path = fetch(corpus, archives(entry(f"{mirror.url}/text.bin")), tmp_path, None, False)
    assert path.read_bytes() == CONTENT
    assert files_in(tmp_path) == {"text.bin"}


def test_mirror_that_refuses_libraries(corpus, mirror, tmp_path) -> None:
    mirror.files["/text.bin"] = CONTENT
    url = f"{mirror.url}/text.bin"
    assert requests.get(url, timeout=10).status_code == 403
    assert fetch(corpus, archives(entry(url)), tmp_path, None, False).read_bytes() == CONTENT


def test_redirect(corpus, mirror, tmp_path) -> None:
    mirror.files["/new"] = CONTENT
    mirror.resumable = {"/new"}
    mirror.cut["/new"] = 9 * CHUNK
    mirror.moved["/old"] = f"{mirror.url}/new"
    path = fetch(corpus, archives(entry(f"{mirror.url}/old")), tmp_path, None, False)
    assert path.read_bytes() == CONTENT
    assert mirror.requests == ["/old", "/new"] * 2


def test_a_redirection_to_an_impossible_host(corpus, mirror, tmp_path) -> None:
    mirror.moved["/old"] = "http://a..b/"
    assert "LocationParseError" in reason_of_failure(corpus, tmp_path, f"{mirror.url}/old")


def test_truncated_transfer_is_resumed(corpus, mirror, tmp_path) -> None:
    mirror.files["/text.bin"] = CONTENT
    mirror.resumable = {"/text.bin"}
    mirror.cut["/text.bin"] = first = 6 * CHUNK + 100
    path = fetch(corpus, archives(entry(f"{mirror.url}/text.bin")), tmp_path, None, False)
    assert path.read_bytes() == CONTENT
    assert mirror.ranges == [None, f"bytes={first}-", f"bytes={2 * first}-"]
    assert files_in(tmp_path) == {"text.bin"}


def test_next_mirror_goes_on_where_the_first_broke_off(corpus, mirror, tmp_path) -> None:
    mirror.files |= {"/first": CONTENT, "/second": CONTENT}
    mirror.cut["/first"] = 4 * CHUNK
    mirror.resumable = {"/second"}
    urls = [f"{mirror.url}/first", f"{mirror.url}/second"]
    path = fetch(corpus, archives(entry(*urls)), tmp_path, None, False)
    assert path.read_bytes() == CONTENT
    assert mirror.requests == ["/first", "/first", "/second"]
    assert mirror.ranges == [None, *[f"bytes={4 * CHUNK}-"] * 2]


@pytest.mark.parametrize(
    ("left", "resumable", "ranges"),
    [
        (CONTENT[:5000], True, ["bytes=5000-"]),
        (CONTENT[:5000], False, ["bytes=5000-"]),
        (b"x" * 5000, True, ["bytes=5000-", None]),
        (CONTENT, True, []),
        (b"x" * len(CONTENT), True, [None]),
        (CONTENT + b"x", True, [f"bytes={len(CONTENT) + 1}-", None]),
    ],
    ids=["half", "half, no ranges", "other file", "whole", "whole other file", "too long"],
)
def test_what_a_killed_download_left(corpus, mirror, tmp_path, left, resumable, ranges) -> None:
    (tmp_path / "text.bin.partial").write_bytes(left)
    mirror.files["/text.bin"] = CONTENT
    mirror.resumable = {"/text.bin"} if resumable else set()
    path = fetch(corpus, archives(entry(f"{mirror.url}/text.bin")), tmp_path, None, False)
    assert path.read_bytes() == CONTENT
    assert mirror.ranges == ranges
    assert files_in(tmp_path) == {"text.bin"}


def test_killed_in_the_middle_of_a_transfer(corpus, mirror, tmp_path) -> None:
    """SIGKILL while bytes arrive; the next process asks for the others only."""
    content = os.urandom(3 << 20)
    mirror.files["/large"] = content
    mirror.resumable = mirror.held = {"/large"}
    mirror.cut["/large"] = 5 << 19
    wanted = archives(archive_entry("large", content, [f"{mirror.url}/large"]))
    process = multiprocessing.get_context("fork").Process(
        target=fetch, args=(corpus, wanted, tmp_path, None, False)
    )
    process.start()
    partial = tmp_path / "large.partial"
    while not (partial.exists() and partial.stat().st_size):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    present = partial.stat().st_size
    mirror.cut.clear()
    mirror.held.clear()
    assert fetch(corpus, wanted, tmp_path, None, False).read_bytes() == content
    assert mirror.ranges == [None, f"bytes={present}-"] and 0 < present < len(content)


def reason_of_failure(corpus, tmp_path, url: str, **changes) -> str:
    wanted = archives(entry(url) | changes)
    with pytest.raises(UserError, match=r"could not get text\.bin; tried ") as error:
        fetch(corpus, wanted, tmp_path, None, False)
    return str(error.value).partition(url)[2]


def test_a_server_that_always_breaks_off_is_given_up(corpus, mirror, tmp_path) -> None:
    mirror.files["/text.bin"], mirror.resumable = CONTENT, {"/text.bin"}
    mirror.cut["/text.bin"] = 100
    reason = reason_of_failure(corpus, tmp_path, f"{mirror.url}/text.bin")
    assert reason.startswith(" (broke off 10 times in a row, 1000 bytes are kept)")
    assert len(mirror.requests) == 10
    mirror.cut.clear()
    path = fetch(corpus, archives(entry(f"{mirror.url}/text.bin")), tmp_path, None, False)
    assert path.read_bytes() == CONTENT and mirror.ranges[-1] == "bytes=1000-"


@pytest.mark.parametrize("changes", [{}, {"size": None}], ids=["size known", "size unknown"])
def test_a_server_that_never_ends_is_left(corpus, mirror, tmp_path, changes) -> None:
    mirror.files["/text.bin"], mirror.endless = CONTENT, {"/text.bin"}
    corpus = corpus.model_copy(update={"disk_space": 3 * len(CONTENT)})
    reason = reason_of_failure(corpus, tmp_path, f"{mirror.url}/text.bin", **changes)
    most = len(CONTENT) if changes == {} else 3 * len(CONTENT)
    assert reason.startswith(f" (more than the {most} bytes")
    assert files_in(tmp_path) == set()


def test_a_server_that_announces_too_much_is_not_read(corpus, mirror, tmp_path) -> None:
    mirror.files["/text.bin"] = CONTENT + b"x"
    reason = reason_of_failure(corpus, tmp_path, f"{mirror.url}/text.bin")
    assert reason.startswith(f" ({len(CONTENT) + 1} bytes instead of {len(CONTENT)})")


def test_a_server_that_drips_is_given_up(corpus, mirror, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(download, "SLOWEST", (10_000, 0.05))
    mirror.files["/text.bin"], mirror.dripping = CONTENT, {"/text.bin"}
    reason = reason_of_failure(corpus, tmp_path, f"{mirror.url}/text.bin")
    assert reason.startswith(" (less than 10000 bytes a second)")
    assert mirror.requests == ["/text.bin"]


def test_a_link_in_the_place_of_the_file_is_not_followed(corpus, mirror, tmp_path) -> None:
    other, local = tmp_path / "precious", tmp_path / "local"
    other.write_text("precious", encoding="utf-8")
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / "text.bin.partial").symlink_to(other)
    mirror.files["/text.bin"], mirror.resumable = CONTENT, {"/text.bin"}
    path = fetch(corpus, archives(entry(f"{mirror.url}/text.bin")), folder, None, False)
    assert path.read_bytes() == CONTENT and mirror.ranges == [None]
    path.unlink()
    (folder / "text.bin.partial").symlink_to(other)
    local.mkdir()
    (local / "text.bin.gz").write_bytes(gzipped(CONTENT))
    assert fetch(corpus, archives(entry()), folder, local, False).read_bytes() == CONTENT
    assert other.read_text(encoding="utf-8") == "precious"


def test_a_packed_file_that_is_far_larger_unpacked_is_not_unpacked(corpus, tmp_path) -> None:
    local, folder = tmp_path / "local", tmp_path / "archives"
    local.mkdir()
    (local / "text.bin.gz").write_bytes(gzipped(bytes(64 << 20)))
    with pytest.raises(UserError, match=rf"text\.bin\.gz is larger than {len(CONTENT)} bytes"):
        fetch(corpus, archives(entry()), folder, local, False)
    assert files_in(folder) == set()


@pytest.mark.parametrize("place", ["ptb/text.bin", "text.bin"])
def test_local_folder_comes_first(corpus, mirror, tmp_path, place: str) -> None:
    local = tmp_path / "local"
    (local / place).parent.mkdir(parents=True)
    (local / place).write_bytes(CONTENT)
    wanted = archives(entry(f"{mirror.url}/text.bin"))
    assert fetch(corpus, wanted, tmp_path / "archives", local, False) == local / place
    assert mirror.requests == []


@pytest.mark.parametrize("place", ["ptb/text.bin.gz", "text.bin.gz"])
def test_local_file_may_be_gzipped(corpus, tmp_path, place: str) -> None:
    local = tmp_path / "local"
    (local / place).parent.mkdir(parents=True)
    (local / place).write_bytes(gzipped(CONTENT))
    path = fetch(corpus, archives(entry()), tmp_path / "archives", local, False)
    assert path == tmp_path / "archives" / "text.bin"
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("text.bin", b"x" * len(CONTENT), "sha256 .* instead of"),
        ("text.bin", b"", "0 bytes instead of"),
        ("text.bin.gz", gzipped(b"something else"), "14 bytes instead of"),
        ("text.bin.gz", gzipped(CONTENT)[:-20], "damaged"),
    ],
)
def test_wrong_local_file_is_an_error(corpus, tmp_path, file, content, reason) -> None:
    local = tmp_path / "local"
    local.mkdir()
    (local / file).write_bytes(content)
    with pytest.raises(UserError, match=f"{file}.*{reason}"):
        fetch(corpus, archives(entry(f"{NOWHERE}/x")), tmp_path / "archives", local, False)
    assert files_in(tmp_path / "archives") == set()


@pytest.mark.parametrize(
    "digest",
    [
        # git hash-object, sha1sum and md5sum of the same file
        "git_blob:9daeafb9864cf43055ae93beb0afd6c7d144bfa4",
        "sha1:4e1243bd22c66e76c2ba9eddc1f91394e57f9f83",
        "md5:d8e8fca2dc0f896fd7cb4cb0031ba249",
    ],
)
def test_other_hashes(corpus, tmp_path, digest: str) -> None:
    (tmp_path / "text").write_bytes(b"test\n")
    wanted = archives({"file": "text", "hash": digest})
    assert fetch(corpus, wanted, tmp_path, None, False) == tmp_path / "text"
    (tmp_path / "text").write_bytes(b"tesT\n")
    with pytest.raises(UserError, match="could not get text"):
        fetch(corpus, wanted, tmp_path, None, False)


def test_published_hash_is_not_called_ours(corpus, tmp_path) -> None:
    wanted = archives(entry() | {"verified": False, "hash_source": "a paper"})
    with pytest.raises(UserError, match="not verified by us"):
        fetch(corpus, wanted, tmp_path, None, False)
