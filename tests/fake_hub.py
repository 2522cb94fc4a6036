"""A Hugging Face hub on the loopback interface that misbehaves on request.

It serves dataset repositories from memory the way huggingface_hub 2.4 asks for them: revision ->
commit, folder listings in pages, files by HEAD and (ranged) GET; .bin, .model and .jsonl are large
files (LFS) behind a redirect to another host, with SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".bin", ".model", ".jsonl")
PAGE = 3  # listed entries a page
PIECE = 4096  # bytes sent at once


@dataclass(frozen=True)
class Fault:
    """What goes wrong in one answer."""

    status: int = 0  # an error instead of the content
    headers: dict[str, str] = field(default_factory=dict)
    drop: int | None = None  # the connection ends after so many bytes of the body ...
    reset: bool = False  # ... with a reset
    short: int | None = None  # the body ends after so many bytes, and Content-Length agrees
    flip: bool = False  # a wrong byte
    rate: float = 0.0  # bytes a second
    stall: float = 0.0  # seconds of silence after `drop` bytes, instead of the end
    gate: threading.Event | None = None  # the body comes when this is set
    whole: bool = False  # Range is ignored


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    return git_sha1(b"".join(path.encode() + content for path, content in sorted(files.items())))


class FakeHub:
    """A context manager: `with FakeHub({repo_id: {path: content}}) as hub` serves at hub.url.

    faults[path]: a list, whose first element spoils the next GET of the file; `revision` and `tree`
    are paths, too. requests: (method, what, Range header) of all that came; what is a repository's
    path, `revision` or `tree`. moments: when they came, by what, in seconds.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]]):
        self.repositories = repositories
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.requests: list[tuple[str, str, str | None]] = []
        self.moments: dict[str, list[float]] = defaultdict(list)
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.large_url = f"http://localhost:{self.server.server_port}"  # a host of its own

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.server.shutdown()
        self.server.server_close()

    def gets(self, path: str) -> list[str | None]:
        """The Range headers of all GETs of a file."""
        return [span for method, what, span in self.requests if (method, what) == ("GET", path)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms behind its headers
    hub: FakeHub

    def log_message(self, *message) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:  # the client was killed
            pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for pattern, serve in (
            (r"/api/datasets/([^/]+/[^/]+)/revision/(.+)", self.revision),
            (r"/api/datasets/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", self.tree),
            (r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/content/([^/]+/[^/]+)/()(.+)", self.content),
        ):
            if found := re.fullmatch(pattern, path):
                return self.known(serve, *found.groups())
        return self.send(404)

    def known(self, serve, repo: str, revision: str, *path: str) -> None:
        """Refuses what is not there; the hub says 401 for a repository that one may not see."""
        files = self.hub.repositories.get(repo)
        if files is None:
            return self.send(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("", "main", commit_of(files)):
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        return serve(repo, files, *path)

    def fault(self, what: str) -> Fault:
        """Books the request; the fault that was ordered for it."""
        self.hub.requests.append((self.command, what, self.headers.get("Range")))
        self.hub.moments[what].append(time.monotonic())
        queue = self.hub.faults[what] if self.command == "GET" else []
        return queue.pop(0) if queue else Fault()

    def send(
        self,
        status: int,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def revision(self, repo: str, files: dict[str, bytes]) -> None:
        fault = self.fault("revision")
        if fault.status:
            return self.send(fault.status, fault.headers)
        return self.send(200, body=json.dumps({"id": repo, "sha": commit_of(files)}).encode())

    def tree(self, repo: str, files: dict[str, bytes], folder: str) -> None:
        fault = self.fault("tree")
        if fault.status:
            return self.send(fault.status, fault.headers)
        prefix = f"{folder}/" if folder else ""
        inside = set()
        for path in files:
            if path.startswith(prefix):
                name, *_ = path.removeprefix(prefix).split("/")
                inside.add(prefix + name)
        if not inside:
            return self.send(404, {"X-Error-Code": "EntryNotFound"})
        address = urlsplit(self.path)
        (start,) = parse_qs(address.query).get("cursor", ["0"])
        end = int(start) + PAGE
        page = [self.listed(path, files.get(path)) for path in sorted(inside)[int(start) : end]]
        headers = {}
        if end < len(inside):
            headers["Link"] = f'<{self.hub.url}{address.path}?cursor={end}>; rel="next"'
        return self.send(200, headers, json.dumps(page).encode())

    def listed(self, path: str, content: bytes | None) -> dict:
        if content is None:
            return {"type": "directory", "path": path, "oid": git_sha1(path.encode())}
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        if path.endswith(LFS):
            entry["lfs"] = {
                "size": len(content),
                "oid": hashlib.sha256(content).hexdigest(),
                "pointerSize": 134,
            }
        return entry

    def resolve(self, repo: str, files: dict[str, bytes], path: str) -> None:
        """The file's address: large files are elsewhere."""
        if path not in files:
            return self.send(404, {"X-Error-Code": "EntryNotFound"})
        content = files[path]
        large = path.endswith(LFS)
        etag = hashlib.sha256(content).hexdigest() if large else git_sha1(content)
        headers = {
            "X-Repo-Commit": commit_of(files),
            "ETag": f'"{etag}"',
            "X-Linked-Etag": f'"{etag}"',
            "X-Linked-Size": str(len(content)),
        }
        if large:
            return self.send(
                302, {**headers, "Location": f"{self.hub.large_url}/content/{repo}/{path}"}
            )
        return self.content(repo, files, path, headers)

    def content(
        self, repo: str, files: dict[str, bytes], path: str, headers: dict[str, str] | None = None
    ) -> None:
        fault = self.fault(path)
        content = files[path]
        if fault.status:
            return self.send(fault.status, fault.headers)
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(span[1]) if span and not fault.whole else 0
        body = content[start:]
        if fault.flip:
            body = body[:-1] + bytes([body[-1] ^ 1])
        body = body[: fault.short]
        sent = dict(headers or {})
        if start:
            sent["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send(206 if start else 200, sent, length=len(body))
        if self.command == "GET":
            self.body(body, fault)

    def body(self, body: bytes, fault: Fault) -> None:
        if fault.gate:
            fault.gate.wait()
        body = body[: fault.drop]
        for at in range(0, len(body), PIECE):
            self.wfile.write(body[at : at + PIECE])
            if fault.rate:
                time.sleep(PIECE / fault.rate)
        if fault.drop is not None:
            time.sleep(fault.stall)
            self.close_connection = True
            if fault.reset:
                self.reset()

    def reset(self) -> None:
        """Ends the connection without a farewell."""
        at_once = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        os.close(self.connection.detach())
