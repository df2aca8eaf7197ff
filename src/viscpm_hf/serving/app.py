"""The application: routes, errors, documentation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from swagger_ui_bundle import swagger_ui_path

from ..version import __version__
from .chat_routes import chat_router
from .engine import ChatEngine
from .errors import error_answer
from .guard import Guard, error_body
from .metrics import Metrics
from .paint_engine import PaintEngine
from .paint_routes import paint_router
from .schemas import ErrorAnswer, Health, ModelCard, ModelList, now
from .settings import ServerSettings
from .waiting import ClientGoneError


ERRORS = {
    400: "Something in the request can't be used; the message says what.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The request took too long to arrive.",
    413: "The request is too large.",
    429: "Too much is waiting; `Retry-After` says when to try again.",
    500: "The server failed on this request.",
    503: "The server is shutting down.",
    504: "There was no answer in time.",
}


def create_app(
    chat: ChatEngine | None = None,
    paint: PaintEngine | None = None,
    *,
    chat_name: str = "VisCPM-Chat",
    paint_name: str = "VisCPM-Paint",
    settings: ServerSettings | None = None,
    images_prefix: str = "/v1/images",
    other_names: Sequence[str] = (),
) -> FastAPI:
    """The HTTP API of one or both engines; it closes them when it ends.

    Args:
        chat, paint: what answers.
        chat_name, paint_name: what they are called in requests.
        settings: limits and permissions.
        images_prefix: where Paint's routes begin; "" if the whole application is mounted there.
        other_names: models that other applications serve at the same address, for `/v1/models`.

    Raises:
        ValueError: without an engine.
    """
    if chat is None and paint is None:
        raise ValueError("There is nothing to serve: give a chat engine, a paint engine, or both.")
    settings = settings or ServerSettings()
    metrics = Metrics(chat, paint)
    begin = now()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        for engine in (chat, paint):
            if engine is not None:
                engine.close(drain=False)  # the server has waited for what it can

    app = FastAPI(
        title="viscpm-hf",
        version=__version__,
        description="VisCPM-Chat and VisCPM-Paint behind an OpenAI-compatible API.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses={status: {"model": ErrorAnswer, "description": text} for status, text in ERRORS.items()},
    )
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    _add_error_handlers(app, settings)
    names = []
    if chat is not None:
        app.include_router(chat_router(chat, chat_name, settings))
        names.append(chat_name)
    if paint is not None:
        app.include_router(paint_router(paint, paint_name, settings), prefix=images_prefix)
        names.append(paint_name)
    names += other_names

    @app.get("/v1/models", response_model=ModelList, tags=["models"])
    async def models():
        """What is served."""
        return ModelList(data=[ModelCard(id=name, created=begin) for name in names])

    @app.get("/health", response_model=Health, tags=["operation"])
    async def health():
        """Whether the server answers."""
        is_open = all(engine is None or engine.is_open for engine in (chat, paint))
        return JSONResponse({"status": "ok" if is_open else "closing"}, 200 if is_open else 503)

    @app.get("/metrics", response_class=Response, tags=["operation"])
    async def prometheus():
        """Figures in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    _add_documentation(app)
    return app


def _add_error_handlers(app: FastAPI, settings: ServerSettings) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError):
        # Of a value that may be one thing or another, the error that is furthest in is what was meant.
        cause = max(error.errors(), key=lambda entry: len(entry["loc"]))
        place = ".".join(str(part) for part in cause["loc"] if part != "body")[:200]
        message = f"{place}: {cause['msg']}" if place else str(cause["msg"])
        return JSONResponse(error_body(message[:500], "invalid_request_error", param=place or None), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException):
        body = error_body(str(error.detail), "invalid_request_error")
        return JSONResponse(body, error.status_code, headers=error.headers)

    async def other(request: Request, error: Exception):
        answer = error_answer(error, settings)
        return JSONResponse(answer.body, answer.status, headers=answer.headers)

    # By name, since what is handled as a mere Exception is raised again behind the answer.
    for kind in (ValueError, RuntimeError, OSError, MemoryError, LookupError, TypeError, ClientGoneError, Exception):
        app.add_exception_handler(kind, other)


def _add_documentation(app: FastAPI) -> None:
    """`/docs`, with its scripts from here: the page asks no other host for anything."""
    app.mount("/docs/static", StaticFiles(directory=swagger_ui_path), name="docs-static")

    @app.get("/docs", include_in_schema=False)
    async def docs():
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="viscpm-hf",
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
            swagger_favicon_url="/docs/static/favicon-32x32.png",
        )
