"""A stand-in for W&B's server, on this machine: as much of it as W&B's client needs to upload.

It keeps what the client sends, as W&B does: the lines of a run's history lie at the offsets that
the client gives, so lines sent twice show.
"""

import gzip
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "a" * 40
_ENTITY = {"id": "entity", "name": "tester"}


@dataclass
class UploadedRun:
    """A run as the server has it."""

    about: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by offset
    summary: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None

    @property
    def steps(self) -> list[int]:
        return [self.history[offset]["_step"] for offset in sorted(self.history)]


class Server(ThreadingHTTPServer):
    """`refuse(path, body)` gives the HTTP status of an error to answer with, or None."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, UploadedRun] = {}
        self.posts: list[tuple[str, Any]] = []
        self.refuse: Callable[[str, Any], int | None] = lambda path, body: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        name = variables.get("name")
        if operation == "Viewer":
            viewer = {"id": "user", "entity": "tester", "username": "tester", "email": ""}
            return {"viewer": viewer | {"flags": "{}", "teams": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            project = {"id": "project", "name": variables["project"], "entity": _ENTITY}
            return {"model": project | {"bucket": self._bucket_to_resume(name)}}
        if operation == "UpsertBucket":
            new = name not in self.runs
            run = self.runs.setdefault(name, UploadedRun())
            run.about |= {key: value for key, value in variables.items() if value is not None}
            project = {"id": "project", "name": variables["project"], "entity": _ENTITY}
            bucket = {"id": "id-" + name, "name": name, "displayName": name, "description": ""}
            bucket |= {"config": run.about.get("config"), "sweepName": None, "project": project}
            bucket |= {"historyLineCount": len(run.history)}
            return {"upsertBucket": {"bucket": bucket, "inserted": new}}
        if operation == "CreateRunFiles":
            files = [{"name": x, "uploadUrl": f"{self.url}/{x}"} for x in variables["files"]]
            return {"createRunFiles": {"runID": "id", "uploadHeaders": [], "files": files}}
        if operation == "CreateArtifact":  # as if its content were there already
            artifact = {"id": "artifact", "state": "COMMITTED"}
            sequence = {"latestArtifact": {"id": "artifact"}}
            return {"createArtifact": {"artifact": artifact | {"artifactSequence": sequence}}}
        if operation == "UpsertView2":
            return {"upsertView": {"view": {"id": "view", "name": "nw-1-v"}, "inserted": True}}
        return {}

    def _bucket_to_resume(self, name: str) -> dict[str, Any] | None:
        run = self.runs.get(name)
        if run is None:
            return None
        tail = [json.dumps(run.history[offset]) for offset in sorted(run.history)[-1:]]
        return {
            "id": "id-" + name,
            "name": name,
            "summaryMetrics": json.dumps(run.summary),
            "displayName": run.about.get("displayName"),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": 0,
            "historyTail": json.dumps(tail),
            "eventsTail": "[]",
            "config": run.about.get("config"),
            "tags": run.about.get("tags") or [],
            "notes": "",
            "wandbConfig": "{}",
        }

    def receive(self, run_id: str, stream: dict[str, Any]) -> None:
        """A part of a run's history, summary and end."""
        run = self.runs.setdefault(run_id, UploadedRun())
        files = stream.get("files", {})
        if "wandb-history.jsonl" in files:
            chunk = files["wandb-history.jsonl"]
            for place, line in enumerate(chunk["content"], start=chunk["offset"]):
                run.history[place] = json.loads(line)
        if "wandb-summary.json" in files:
            run.summary = json.loads(files["wandb-summary.json"]["content"][-1])
        if stream.get("complete"):
            run.exit_code = stream.get("exitcode")


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        content = json.loads(body) if self.path.endswith(("/graphql", "/file_stream")) else None
        status = self.server.refuse(self.path, content)
        if status is not None:
            return self._send({}, status)
        self.server.posts.append((self.path, content))
        if self.path.endswith("/graphql"):
            found = re.search(r"(?:query|mutation)\s+(\w+)", content["query"])
            data = self.server.answer(found[1] if found else "", content.get("variables") or {})
            return self._send({"data": data})
        if self.path.endswith("/file_stream"):
            self.server.receive(self.path.split("/")[-2], content)
        return self._send({})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self._send({})

    def do_GET(self) -> None:
        self._send({})

    def _send(self, content: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def running_server() -> Iterator[Server]:
    """A server on a free port, until the context is left."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
