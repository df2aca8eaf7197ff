"""The HTTP API on Ray Serve: replicas, autoscaling, one GPU or a part of one each.

Chat and Paint are applications of their own, so that they scale apart; `examples/ray/serve.yaml` has both:

    serve run examples/ray/serve.yaml

Each replica batches its requests as `viscpm-hf serve` does.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application

from .app import create_app
from .engine import ChatEngine
from .paint_engine import PaintEngine
from .settings import ServerSettings, read_api_key
from .tickets import EngineLimits


PAINT_ARGUMENTS = {"model", "name", "aliases", "load", "settings", "api_key_file"}
CHAT_ARGUMENTS = PAINT_ARGUMENTS | {"limits", "other_names"}


class _Replica:
    """What both have in common; on its end, the application closes the engine."""

    engine: ChatEngine | PaintEngine

    def configure(
        self,
        model: str,
        name: str | None,
        aliases: Sequence[str],
        settings: dict[str, Any] | None,
        api_key_file: str | None,
    ) -> None:
        # Ray writes a line for each request; ours would say it again.
        logging.getLogger("viscpm_hf.serving.access").setLevel(logging.WARNING)
        self.aliases = aliases
        self.name = name or model.rstrip("/").rpartition("/")[2]
        key = {} if api_key_file is None else {"api_key": read_api_key(api_key_file)}
        self.settings = ServerSettings(**{**(settings or {}), **key})

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if not self.engine.is_open:
            raise RuntimeError("The engine has ended.")


@serve.deployment
@serve.ingress()
class ChatDeployment(_Replica):
    """A model that chats; see [`chat`]."""

    def __init__(
        self,
        model: str,
        name: str | None = None,
        aliases: Sequence[str] = (),
        load: dict[str, Any] | None = None,
        limits: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        api_key_file: str | None = None,
        other_names: Sequence[str] = (),
    ):
        from ..chat.chat import VisCPMChat

        self.configure(model, name, aliases, settings, api_key_file)
        self.engine = ChatEngine(VisCPMChat(model, **load or {}), EngineLimits(**limits or {}))
        self.other_names = other_names

    def __serve_build_asgi_app__(self):
        return create_app(
            self.engine,
            chat_name=self.name,
            chat_aliases=self.aliases,
            settings=self.settings,
            other_names=self.other_names,
        )


@serve.deployment
@serve.ingress()
class PaintDeployment(_Replica):
    """VisCPM-Paint; see [`paint`]."""

    def __init__(
        self,
        model: str,
        name: str | None = None,
        aliases: Sequence[str] = (),
        load: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        api_key_file: str | None = None,
    ):
        from ..paint.paint import VisCPMPaint

        self.configure(model, name, aliases, settings, api_key_file)
        self.engine = PaintEngine(VisCPMPaint(model, **load or {}))

    def __serve_build_asgi_app__(self):
        return create_app(
            paint=self.engine,
            paint_name=self.name,
            paint_aliases=self.aliases,
            settings=self.settings,
            images_prefix="",
        )


def chat(arguments: dict[str, Any]) -> Application:
    """The Chat application.

    Args:
        arguments: `model`; optionally `name`, `aliases` (further names), `load` (arguments of
            `VisCPMChat`), `limits` (of `EngineLimits`), `settings` (of `ServerSettings`), `other_names` (models of
            other applications, for `/v1/models`) and `api_key_file`, on every machine that has a replica.

    Raises:
        ValueError: for other arguments, or without a model.
    """
    return ChatDeployment.bind(**checked(arguments, CHAT_ARGUMENTS))


def paint(arguments: dict[str, Any]) -> Application:
    """The Paint application, to be routed to `/v1/images`; arguments as of [`chat`] but `limits` and `other_names`.

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
