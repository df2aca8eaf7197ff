"""A judge that speaks OpenAI's chat completions on 127.0.0.1, and fails on the way as real ones do."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What comes back for a request: a review in the protocol's form, unless `body` is given."""

    review: Any = "8 9\nFine."
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    usage: Any = field(default_factory=lambda: {"prompt_tokens": 100, "completion_tokens": 10})
    seconds: float = 0.0
    drip: float | None = None
    """Seconds between single bytes, which come until the client has had enough."""


def failure(status: int, message: str = "no", **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "type": "server_error", "code": None}}).encode()
    return Reply(status=status, headers={name.replace("_", "-"): value for name, value in headers.items()}, body=body)


@dataclass
class Request:
    """What a client sent, and when."""

    path: str
    headers: dict[str, str]
    """By their names in lower case."""
    body: dict[str, Any]
    time: float

    @property
    def prompt(self) -> str:
        return self.body["messages"][-1]["content"]


class JudgeServer:
    """Answers with `reply(request, number)`, `number` counting the requests from 0."""

    def __init__(self, reply: Callable[[Request, int], Reply] = lambda request, number: Reply()):
        self.reply = reply
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.ends: queue.Queue[OSError] = queue.Queue()
        """What told of clients that had enough of single bytes."""
        self._at_once = 0
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                with contextlib.suppress(ConnectionResetError):  # by a client that has had enough
                    super().handle()

            def do_POST(self) -> None:
                judge._answer(self)

            def log_message(self, *arguments) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        request = Request(
            handler.path, {name.lower(): value for name, value in handler.headers.items()}, body, time.monotonic()
        )
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        reply = self.reply(request, number)
        time.sleep(reply.seconds)
        with self._lock:
            self._at_once -= 1
        if reply.drip is not None:
            self._drip(handler, reply.drip)
            return
        content = reply.body if reply.body is not None else json.dumps(completion(request, reply)).encode()
        handler.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def _drip(self, handler: BaseHTTPRequestHandler, seconds: float) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.close_connection = True
        try:
            for _ in range(1000):
                handler.wfile.write(b" ")
                time.sleep(seconds)
        except OSError as error:
            self.ends.put(error)

    def __enter__(self) -> JudgeServer:
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def completion(request: Request, reply: Reply) -> dict[str, Any]:
    message = {"role": "assistant", "content": reply.review}
    usage = reply.usage
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1700000000,
        "model": request.body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        **({} if usage is None else {"usage": usage}),
    }
