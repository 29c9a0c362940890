"""A hub of our own on 127.0.0.1, which speaks enough of the upload protocol to be pushed to.

It stores what it is sent, git blobs and large files alike, counts commits, and can be set to
answer a step with an error or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STEPS = {
    "create": r"POST /api/repos/create",
    "info": r"GET /api/models/[^/]+/[^/]+(/revision/main)?",
    "validate": r"POST /api/validate-yaml",
    "preupload": r"POST /api/models/[^/]+/[^/]+/preupload/main",
    "batch": r"POST /[^/]+/[^/]+\.git/info/lfs/objects/batch",
    "put": r"PUT /large/[0-9a-f]+",
    "commit": r"POST /api/models/[^/]+/[^/]+/commit/main",
}
HANG = -1
TOKEN = "hf_of-the-stub"


@dataclass
class StubHub:
    """What the hub knows and has seen.

    Attributes:
        files: path in the repository -> content, after the commits.
        large: ending of the files that go to the large file storage.
        answers: step -> status to answer with instead (HANG: none at all).
    """

    endpoint: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)  # name -> private
    files: dict[str, bytes] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    steps: list[str] = field(default_factory=list)
    large: str = ".safetensors"
    answers: dict[str, int] = field(default_factory=dict)
    released: threading.Event = field(default_factory=threading.Event)

    def answer(self, step: str, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and JSON of one request."""
        if step == "create":
            return self._create(json.loads(body))
        if step == "info":
            name = path.removeprefix("/api/models/").removesuffix("/revision/main")
            if name not in self.repositories:
                return 404, {"error": "Repository not found"}
            return 200, {"id": name, "private": self.repositories[name], "sha": "0", "siblings": []}
        if step == "validate":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {"errors": [], "warnings": []}
        if step == "preupload":
            return 200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]}
        if step == "batch":
            return 200, {"objects": [self._action(entry) for entry in json.loads(body)["objects"]]}
        if step == "put":
            self.storage[path.rsplit("/", 1)[-1]] = body
            return 200, {}
        if step == "commit":
            return self._commit(path, body)
        return 404, {"error": f"the stub does not know {step}"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.endpoint}/{name}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": url}
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.repositories[name] = bool(private)
        return 200, {"url": url}

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(self.large) else "regular"
        found: dict[str, Any] = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in self.files:
            content = self.files[path]
            blob = b"blob %d\0" % len(content) + content
            found["oid"] = (
                hashlib.sha256(content).hexdigest()
                if mode == "lfs"
                else hashlib.sha1(blob, usedforsecurity=False).hexdigest()
            )
        return found

    def _action(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["oid"] not in self.storage:
            upload = {"href": f"{self.endpoint}/large/{entry['oid']}"}
            return entry | {"actions": {"upload": upload}}
        return entry

    def _commit(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.commits.append(value["summary"])
            elif entry["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert entry["key"] == "lfsFile"
                self.files[value["path"]] = self.storage[value["oid"]]
        name = path.removeprefix("/api/models/").rsplit("/commit/", 1)[0]
        address = f"{self.endpoint}/{name}/commit/{len(self.commits):040x}"
        return 200, {
            "commitUrl": address,
            "commitOid": f"{len(self.commits):040x}",
            "success": True,
        }


@contextmanager
def stub_hub() -> Iterator[StubHub]:
    """A running hub; its address is `endpoint`."""
    hub = StubHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?")[0]
            request = f"{self.command} {path}"
            step = next((n for n, p in STEPS.items() if re.fullmatch(p, request)), request)
            hub.steps.append(step)
            status = hub.answers.get(step)
            if status == HANG:
                hub.released.wait(30)
                self.close_connection = True
                return
            given = self.headers.get("Authorization")
            if status is None and step != "put" and given != f"Bearer {TOKEN}":
                status = 401
            answer: dict[str, Any] = {"error": "as set"}
            if status is None:
                status, answer = hub.answer(step, path, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _handle

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
