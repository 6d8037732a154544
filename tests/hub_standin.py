"""A stand-in for the model hub on this machine's loopback, to be reached through ``HF_ENDPOINT``.

It answers ``HEAD`` and ``GET /REPO/resolve/REVISION/FILE`` as the hub does, and can misbehave on demand (``mode``,
also settable from another process with ``POST /_mode/NAME``).
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGE = b"<!DOCTYPE html><html><body>Please log in to this network</body></html>"

MODES = {
    "ok": "the whole file",
    "breaks": "every second answer with a body stops half-way, as a lost connection does",
    "short": "the body stops early and the server calls that complete",
    "corrupt": "the right number of wrong bytes",
    "page": "a web page instead of the file, with the hub's headers",
    "portal": "a web page and none of the hub's headers",
    "401": "not known", "403": "not allowed", "404": "no such file", "500": "out of order", "429": "too often",
    "gated": "terms must be accepted first", "norepo": "no such repository",
}
_ERROR_CODES = {"404": (404, "EntryNotFound"), "gated": (403, "GatedRepo"), "norepo": (401, "RepoNotFound")}


class HubStandIn:
    """Serves ``files`` (``{"owner/name/file": bytes}``); with ``token`` only to those who bring it."""

    def __init__(self, files: Mapping[str, bytes], *, token: str | None = None):
        self.files, self.token, self.mode = dict(files), token, "ok"
        self.requests: list[tuple[str, str, str]] = []  # method, path, range
        self.bodies = 0
        stand_in = self

        class Handler(_Handler):
            hub = stand_in

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @classmethod
    @contextmanager
    def serving(cls, files: Mapping[str, bytes], *, token: str | None = None) -> Iterator[HubStandIn]:
        hub = cls(files, token=token)
        hub._thread.start()
        try:
            yield hub
        finally:
            hub._server.shutdown()
            hub._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        mode = self.path.rpartition("/")[2]
        self.hub.mode = mode
        self._answer(200 if mode in MODES else 400)

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        self._file(body=True)

    def _answer(self, status: int, headers: Mapping[str, str] | None = None, content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _file(self, body: bool) -> None:
        hub, wanted = self.hub, self.headers.get("Range", "")
        hub.requests.append((self.command, self.path, wanted))
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^?]+)(?:\?.*)?", self.path)
        if hub.mode == "portal":
            return self._answer(200, {"Content-Type": "text/html"}, PAGE)
        if hub.mode in _ERROR_CODES:
            status, code = _ERROR_CODES[hub.mode]
            return self._answer(status, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
        if hub.mode.isdigit():
            return self._answer(int(hub.mode))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if not match or f"{match[1]}/{match[3]}" not in hub.files:
            return self._answer(404, {"X-Error-Code": "EntryNotFound" if match else "RepoNotFound"})
        if match[2] not in ("main", COMMIT):
            return self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        content = hub.files[f"{match[1]}/{match[3]}"]
        digest = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
                   "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not body:
            return self._answer(200, {**headers, "Content-Length": str(len(content))})
        return self._body(content, wanted, headers)

    def _body(self, content: bytes, wanted: str, headers: dict[str, str]) -> None:
        mode, size = self.hub.mode, len(content)
        self.hub.bodies += 1
        if mode == "corrupt":
            content = content[:-64] + bytes(64)
        if mode == "page":
            return self._answer(200, headers, PAGE)
        start = int(m[1]) if (m := re.match(r"bytes=(\d+)-", wanted)) else 0
        part = content[start:]
        if start:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        self.send_response(206 if start else 200)
        if mode != "short":
            headers["Content-Length"] = str(len(part))
        for name, value in headers.items():
            self.send_header(name, value)
        if mode == "short" or (mode == "breaks" and self.hub.bodies % 2):
            part = part[: len(part) // 2]
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(part)
