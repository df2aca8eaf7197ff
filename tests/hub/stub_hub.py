"""A Hub on loopback: the repositories of a folder, and a list of what was asked."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.requests.append(f"{self.command} {path}")
        self.server.tokens.setdefault(self.headers.get("Authorization"), []).append(path)
        parts = path.split("/")
        if parts[:2] == ["api", "models"]:
            self._answer_api(parts[2:])
        elif parts[2:3] == ["resolve"]:
            self._answer_file(self.server.root / "/".join(parts[:2]) / "/".join(parts[4:]))
        else:
            self._send(404, b"")

    do_HEAD = do_POST = do_GET

    def _answer_api(self, parts: list[str]) -> None:
        if self.command == "POST":
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
        repository = self.server.root / "/".join(parts[:2])
        if not repository.is_dir():
            self._send(404, b"", **{"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in repository.rglob("*") if path.is_file())
        names = [path.relative_to(repository).as_posix() for path in files]
        if "tree" in parts or "paths-info" in parts:
            folder = "/".join([*parts[4:], ""]) if "tree" in parts and parts[4:] else ""
            if not any(name.startswith(folder) for name in names):
                self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})
                return
            content = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in zip(names, files, strict=True)
                if name.startswith(folder)
            ]
        elif parts[2:3] == ["refs"]:
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": COMMIT}
            content = {"branches": [branch], "converts": [], "tags": []}
        else:
            name = "/".join(parts[:2])
            content = {"id": name, "modelId": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in names]}
        self._send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _answer_file(self, path: Path) -> None:
        if not path.is_file():
            self._send(404, b"", **{"X-Error-Code": "EntryNotFound"})
            return
        self._send(200, path.read_bytes(), ETag=f'"{_etag(path)}"')

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, **headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def stub_hub(root: Path, tokens: dict[str | None, list[str]] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serves `root/OWNER/NAME`; gives the address and the growing list of requests. `tokens` gets what was asked by
    what it bore."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root, server.requests, server.tokens = root, [], {} if tokens is None else tokens
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.requests
    finally:
        server.shutdown()
        server.server_close()
