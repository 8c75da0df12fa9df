"""Mirrors on 127.0.0.1 and catalogues that point to stand-ins."""

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
    """An HTTP server; `files` maps a path to its content, `cut` ends the transfer early."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    """A mirror that, like some real ones, answers 403 to the default User-Agent of a library."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append(self.path)
            agent = self.headers.get("User-Agent", "")
            content = state.files.get(self.path)
            if agent.startswith("python-") or not agent:
                self.send_error(403)
            elif content is None:
                self.send_error(404)
            else:
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: state.cut.get(self.path)])

        def log_message(self, *arguments) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = Mirror(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def catalogue_with(tmp_path: Path) -> Callable[..., Path]:
    """Writes a catalogue with one entry of the real one, some of its keys replaced."""

    def write(name: str, **replaced) -> Path:
        entry = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))["corpora"][name]
        entry |= {"expected": {}, "disk_space": 0} | replaced
        path = tmp_path / "catalogue.yaml"
        path.write_text(yaml.safe_dump({"corpora": {name: entry}}), encoding="utf-8")
        return path

    return write
