"""`viscpm-hf demo chat|paint|both`: the demonstration as a page in the browser."""

from __future__ import annotations

import argparse
import signal
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..tiny.embedded import EMBEDDED_NAME
from .live import add_endpoint_option, open_eyes
from .model_options import add_model_options, load_chat
from .serve import load_painter, model_name, port


if TYPE_CHECKING:
    from ..paint.paint import VisCPMPaint

KINDS = ("chat", "paint", "live", "both")


def add_web_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        nargs="?",
        choices=KINDS,
        help="page to open, chat with live; both if the extra demo is installed / 网页演示的内容",
    )
    group = parser.add_argument_group("page / 网页")
    group.add_argument("--model", default=EMBEDDED_NAME, help=f"for chat ({EMBEDDED_NAME}) / 对话模型")
    group.add_argument(
        "--paint-model",
        dest="paint",
        metavar="PAINT_MODEL",
        default=EMBEDDED_NAME,
        help=f"for paint ({EMBEDDED_NAME}) / 绘画模型",
    )
    group.add_argument(
        "--paint-checks",
        action=argparse.BooleanOptionalAction,
        help=f"ranker and checkers of the paint model (on, but for {EMBEDDED_NAME}) / 绘画的排序与安全检查",
    )
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1) / 监听地址")
    group.add_argument("--port", type=port, default=7860, help="port (7860; 0: one that is free) / 端口")
    group.add_argument("--share", action="store_true", help="public address by gradio's service / 公开分享链接")
    add_endpoint_option(group)
    add_model_options(parser)


def has_web() -> bool:
    return find_spec("gradio") is not None


def load_demo_painter(arguments: argparse.Namespace, is_alone: bool = False) -> VisCPMPaint:
    """The paint model, one candidate a picture; `is_alone` as of [`load_painter`]."""
    if arguments.paint_checks is None:
        arguments.paint_checks = arguments.paint != EMBEDDED_NAME
    painter = load_painter(arguments, is_alone)
    painter.candidates = 1
    return painter


def run_web(arguments: argparse.Namespace) -> int:
    """Serves the page until SIGINT or SIGTERM."""
    kind = arguments.kind or "both"
    try:
        from ..serving.demo import create_demo, start
    except ModuleNotFoundError as error:
        raise ImportError(
            f'The page needs {error.name}, which is not installed: pip install -c constraints.txt ".[demo]"; '
            "`viscpm-hf demo --terminal` does without."
        ) from error
    from ..serving.engine import ChatEngine
    from ..serving.paint_engine import PaintEngine
    from ..serving.server import bind

    if arguments.endpoint and kind != "live":
        raise ValueError(
            f"--endpoint answers the live page alone: viscpm-hf demo live --endpoint {arguments.endpoint}"
        )
    bind(arguments.host, arguments.port).close()  # before minutes go into loading models
    painter = load_demo_painter(arguments, is_alone=kind == "paint") if kind in ("paint", "both") else None
    chat = ChatEngine(load_chat(arguments)) if kind != "paint" and not arguments.endpoint else None
    eyes = None if kind == "paint" else open_eyes(arguments, chat)
    paint = None if painter is None else PaintEngine(painter)
    names = model_name(arguments.model), model_name(arguments.paint)
    demo = create_demo(None if kind == "live" else chat, paint, *names, eyes=eyes)
    try:
        address = start(demo, arguments.host, arguments.port, arguments.share, eyes)
        over = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: over.set())
        print(f"{address}  (Ctrl-C ends / 按 Ctrl-C 结束)", flush=True)
        over.wait()
    finally:
        demo.close(verbose=False)
        for engine in filter(None, (chat, paint)):
            engine.close(drain=False)
    return 0
