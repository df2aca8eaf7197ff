"""The HTTP API on Ray Serve: replicas, autoscaling, one GPU or a part of one each.

Chat and Paint are applications of their own, so that they scale apart; `examples/ray/serve.yaml` has both:

    serve run examples/ray/serve.yaml

Each replica batches its requests as `viscpm-hf serve` does.
"""

from __future__ import annotations

import logging
from typing import Any

from ray import serve
from ray.serve import Application

from .app import create_app
from .engine import ChatEngine
from .paint_engine import PaintEngine
from .settings import ServerSettings
from .tickets import EngineLimits


CHAT_ARGUMENTS = {"model", "name", "load", "limits", "settings"}
PAINT_ARGUMENTS = {"model", "name", "load", "settings"}


class _Replica:
    """What both have in common: an engine that has to be open, and is closed at the end."""

    engine: ChatEngine | PaintEngine

    def check_health(self) -> None:
        if not self.engine.is_open:
            raise RuntimeError("The engine has ended.")

    def __del__(self):
        if hasattr(self, "engine"):
            self.engine.close(drain=True, timeout=30)


@serve.deployment
@serve.ingress()
class ChatDeployment(_Replica):
    """VisCPM-Chat; see [`chat`]."""

    def __init__(
        self,
        model: str,
        name: str | None = None,
        load: dict[str, Any] | None = None,
        limits: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ):
        from ..chat import VisCPMChat

        configure_logging()
        self.name = name or model.rstrip("/").rpartition("/")[2]
        self.settings = ServerSettings(**settings or {})
        self.engine = ChatEngine(VisCPMChat(model, **load or {}), EngineLimits(**limits or {}))

    def __serve_build_asgi_app__(self):
        return create_app(self.engine, chat_name=self.name, settings=self.settings)


@serve.deployment
@serve.ingress()
class PaintDeployment(_Replica):
    """VisCPM-Paint; see [`paint`]."""

    def __init__(
        self,
        model: str,
        name: str | None = None,
        load: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ):
        from ..paint import VisCPMPaint

        configure_logging()
        self.name = name or model.rstrip("/").rpartition("/")[2]
        self.settings = ServerSettings(**settings or {})
        self.engine = PaintEngine(VisCPMPaint(model, **load or {}))

    def __serve_build_asgi_app__(self):
        return create_app(paint=self.engine, paint_name=self.name, settings=self.settings, images_prefix="")


def chat(arguments: dict[str, Any]) -> Application:
    """The Chat application.

    Args:
        arguments: `model`; optionally `name`, `load` (arguments of `VisCPMChat`), `limits` (of `EngineLimits`) and
            `settings` (of `ServerSettings`).

    Raises:
        ValueError: for other arguments, or without a model.
    """
    return ChatDeployment.bind(**checked(arguments, CHAT_ARGUMENTS))


def paint(arguments: dict[str, Any]) -> Application:
    """The Paint application, to be routed to `/v1/images`; arguments as of [`chat`], without limits.

    With several replicas, pictures can't be asked for as `url`: another replica may be asked for the file.
    """
    return PaintDeployment.bind(**checked(arguments, PAINT_ARGUMENTS))


def checked(arguments: dict[str, Any], known: set[str]) -> dict[str, Any]:
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ValueError(f"There is no argument {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
    if not arguments.get("model"):
        raise ValueError("The application needs args: {model: FOLDER}.")
    return arguments


def configure_logging() -> None:
    """Ray writes a line for each request; ours would say it again."""
    logging.getLogger("viscpm_hf.serving.access").setLevel(logging.WARNING)
