"""Mirrors on 127.0.0.1 and catalogues that point to stand-ins."""

import contextlib
import http.server
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from normexp.corpora.catalogue import CATALOGUE


@dataclass
class Mirror:
    """An HTTP server.

    `files` maps a path to its content, `moved` to another path. `cut` ends each answer after so
    many bytes; `held` keeps the connection open then, until the test is over. Paths in `resumable`
    can be asked for from a byte on, as `Range` says. Those in `endless` send no length and no end,
    those in `dripping` a byte now and then.
    """

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    resumable: set[str] = field(default_factory=set)
    endless: set[str] = field(default_factory=set)
    dripping: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)  # of each request
    over: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    """A mirror that, like some real ones, answers 403 to the default User-Agent of a library."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            state.ranges.append(self.headers.get("Range"))
            agent = self.headers.get("User-Agent", "")
            content = state.files.get(self.path)
            if agent.startswith("python-") or not agent:
                self.send_error(403)
            elif self.path in state.moved:
                self.send_response(302)
                self.send_header("Location", state.moved[self.path])
                self.end_headers()
            elif content is None:
                self.send_error(404)
            else:
                self._send(content)

        def _send_on_and_on(self, content: bytes, pause: float) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                while not state.over.wait(pause):
                    self.wfile.write(content)

        def _send(self, content: bytes) -> None:
            if self.path in state.endless:
                return self._send_on_and_on(content, 0)
            if self.path in state.dripping:
                return self._send_on_and_on(content[:1], 0.01)
            start = 0
            if self.path in state.resumable and self.headers.get("Range"):
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206)
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            else:
                self.send_response(200)
            content = content[start:]
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: state.cut.get(self.path)])
            if self.path in state.held:
                self.wfile.flush()
                state.over.wait()

        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Mirror(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    state.over.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def catalogue_with(tmp_path: Path) -> Callable[..., Path]:
    """Writes a catalogue with one entry of the real one, some of its keys replaced."""

    def write(name: str, **replaced) -> Path:
        entry = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))["corpora"][name]
        entry |= {"expected": {}, "test_sets": {}, "disk_space": 0} | replaced
        path = tmp_path / "catalogue.yaml"
        path.write_text(yaml.safe_dump({"corpora": {name: entry}}), encoding="utf-8")
        return path

    return write
