"""The application: routes, errors, documentation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from ..images import ImageDecoder
from ..version import __version__
from .chat_routes import chat_router
from .documentation import add_documentation
from .engine import ChatEngine
from .errors import ModelNotFoundError, error_answer
from .guard import Guard, error_body
from .metrics import Metrics
from .paint_engine import PaintEngine
from .paint_routes import paint_router
from .schemas import ErrorAnswer, Health, ModelCard, ModelList, now
from .settings import ServerSettings
from .waiting import ClientGoneError, Places


ERRORS = {
    400: "Something in the request can't be used; the message says what.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The request took too long to arrive.",
    413: "The request is too large.",
    415: "The body is no plain JSON.",
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
    chat_aliases: Sequence[str] = (),
    paint_aliases: Sequence[str] = (),
) -> FastAPI:
    """The HTTP API of one or both engines; it closes them when it ends.

    Args:
        chat, paint: what answers.
        chat_name, paint_name: what they are called in requests.
        settings: limits and permissions.
        images_prefix: where Paint's routes begin; "" if the whole application is mounted there.
        other_names: models that other applications serve at the same address, for `/v1/models`.
        chat_aliases, paint_aliases: further names of the same models.

    Raises:
        ValueError: without an engine.
    """
    if chat is None and paint is None:
        raise ValueError("There is nothing to serve: give a chat engine, a paint engine, or both.")
    settings = settings or ServerSettings()
    metrics = Metrics(chat, paint)
    begin = now()
    decoder = ImageDecoder(settings.image_limits, settings.image_workers, num_slow=settings.image_workers)
    bodies = Places(2, "bodies")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        decoder.start()
        yield
        decoder.close()
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
    if settings.cors_origins:  # around the guard: a browser asks without a key whether it may
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "X-Request-Id"],
        )
    _add_error_handlers(app, settings)
    names = []
    if chat is not None:
        chat_names = tuple(dict.fromkeys([chat_name, *chat_aliases]))
        app.include_router(chat_router(chat, chat_names, settings, decoder, bodies))
        names += chat_names
    if paint is not None:
        paint_names = tuple(dict.fromkeys([paint_name, *paint_aliases]))
        app.include_router(paint_router(paint, paint_names, settings, bodies), prefix=images_prefix)
        names += paint_names
    names += other_names

    @app.get("/v1/models", response_model=ModelList, tags=["models"])
    async def models():
        """What is served."""
        return ModelList(data=[ModelCard(id=name, created=begin) for name in names])

    @app.get("/v1/models/{name:path}", response_model=ModelCard, tags=["models"])
    async def model(name: str):
        """One of them."""
        if name not in names:
            raise ModelNotFoundError(name, names)
        return ModelCard(id=name, created=begin)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=Health, tags=["operation"])
    async def health():
        """Whether the server answers."""
        is_open = all(engine is None or engine.is_open for engine in (chat, paint))
        return JSONResponse({"status": "ok" if is_open else "closing"}, 200 if is_open else 503)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def root(request: Request):
        return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")

    @app.get("/metrics", response_class=Response, tags=["operation"])
    async def prometheus():
        """Figures in Prometheus' text format."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_documentation(app)
    return app


def _add_error_handlers(app: FastAPI, settings: ServerSettings) -> None:
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
