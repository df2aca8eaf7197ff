"""What Ray's proxy says of a request whose replica has died: that it may be sent again, in OpenAI's form.

Ray itself answers a bare 500, which clients don't repeat, and cuts streams off. The proxies load this file; it needs
nothing but Starlette, which Ray brings along. Start the cluster with both variables set, on every machine:

    export PYTHONPATH=$PWD/examples/ray RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=lost_replicas:middlewares
    serve run examples/ray/serve.yaml
"""

import json
from http import HTTPStatus

from starlette.middleware import Middleware


RETRY_SECONDS = 5
LOST = "The replica that worked on this request has ended: send the request again."


class LostReplicas:
    """ASGI middleware. Also gives Ray's own 503s, of full queues and missing replicas, a form that clients read."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head, is_over, is_rays = None, False, False

        async def send_on(message):
            nonlocal head, is_over, is_rays
            if message["type"] == "http.response.start":
                head = message
                is_rays = message["status"] == HTTPStatus.SERVICE_UNAVAILABLE and not _is(message, "application/json")
                if is_rays:
                    return
            elif message["type"] == "http.response.body":
                is_over = not message.get("more_body", False)
                if is_rays:
                    if is_over:
                        await _refuse(send, "All replicas are busy or starting: try again later.", "overloaded")
                    return
            await send(message)

        await self.app(scope, receive, send_on)
        if is_over:
            return
        if head is None:
            await _refuse(send, LOST, "replica_lost")
        elif _is(head, "text/event-stream"):  # the last event, as of any error on the way
            await send({"type": "http.response.body", "body": f"data: {_error(LOST, 'replica_lost')}\n\n".encode()})


def middlewares() -> list[Middleware]:
    """What `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names."""
    return [Middleware(LostReplicas)]


def _is(head: dict, kind: str) -> bool:
    headers = {name.lower(): value for name, value in head["headers"]}
    return headers.get(b"content-type", b"").startswith(kind.encode())


def _error(message: str, code: str) -> str:
    return json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": code}})


async def _refuse(send, message: str, code: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"retry-after", str(RETRY_SECONDS).encode())]
    await send({"type": "http.response.start", "status": HTTPStatus.SERVICE_UNAVAILABLE, "headers": headers})
    await send({"type": "http.response.body", "body": _error(message, code).encode()})
