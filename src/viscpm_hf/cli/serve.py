"""`viscpm-hf serve`: an HTTP API."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..serving.settings import ServerSettings, read_api_key
from .chat import positive
from .model_options import add_model_options, hub_options, load_chat


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "serve",
        examples=(
            "viscpm-hf serve viscpm-tiny --paint viscpm-tiny --no-paint-checks",
            "viscpm-hf serve openbmb/VisCPM-Chat --port 8000 --api-key-file key.txt",
        ),
        help="serve an OpenAI-compatible HTTP API / 提供兼容 OpenAI 的 HTTP 接口",
        description="Serve VisCPM-Chat, and VisCPM-Paint if asked for, over HTTP. / 通过 HTTP 提供 VisCPM 服务。",
    )
    parser.add_argument("model", metavar="CHAT_MODEL", help="folder, Hub id, original file, viscpm-tiny / 对话模型")
    parser.add_argument("--paint", metavar="PAINT_MODEL", help="also draw, with this model / 绘画模型")
    parser.add_argument(
        "--paint-checks",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ranker, prompt and image checkers of the paint model / 绘画的排序与安全检查",
    )
    group = parser.add_argument_group("server / 服务")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1) / 监听地址")
    group.add_argument("--port", type=port, default=8000, help="port (8000) / 端口")
    for option, metavar, which, of in (
        (("--served-model-name", "--name"), "CHAT_MODEL", "the chat model", "对话模型"),
        (("--served-paint-name",), "PAINT_MODEL", "the paint model", "绘画模型"),
    ):
        group.add_argument(
            *option,
            metavar="NAME",
            nargs="+",
            action="extend",
            help=f"names of {which} in the API, of which it answers to each (the last part of {metavar}) / "
            f"接口中的{of}名，可有多个",
        )
    key = group.add_mutually_exclusive_group()
    key.add_argument("--api-key", help="asked of every request / 接口密钥")
    key.add_argument("--api-key-file", metavar="FILE", help="where the key stands, unseen by others / 密钥文件")
    group.add_argument("--max-concurrency", type=positive(int), default=16, help="answers at once (16) / 并发数")
    group.add_argument("--max-waiting", type=positive(int), default=256, help="answers that wait (256) / 等待队列长度")
    group.add_argument(
        "--max-cache-tokens",
        type=positive(int),
        default=16_384,
        help="places in the key/value cache (16384); 0.75 MiB each with 10B in fp16 / 缓存的 token 数",
    )
    limits = ServerSettings()
    for option, kind, default, text in (
        ("--max-image-pixels", int, limits.max_image_pixels, "of an image / 像素上限"),
        ("--max-image-seconds", float, limits.max_image_seconds, "to decode an image / 图片解码秒数上限"),
        ("--max-image-memory", int, limits.max_image_memory, "bytes to decode an image / 图片解码内存上限"),
        ("--image-workers", int, limits.image_workers, "processes that decode images / 图片解码进程数"),
    ):
        group.add_argument(option, type=positive(kind), default=default, help=text.replace(" /", f" ({default:,}) /"))
    group.add_argument("--max-body-bytes", type=positive(int), default=32 * 2**20, help="of a request / 请求上限")
    group.add_argument("--timeout", type=positive(float), default=300.0, help="seconds for an answer (300) / 超时秒数")
    group.add_argument(
        "--client-timeout", type=positive(float), default=30.0, help="seconds for a request to arrive (30) / 接收超时"
    )
    group.add_argument(
        "--allow-remote-images",
        metavar="HOST",
        action="append",
        default=[],
        help="host that pictures may be fetched from; may be repeated / 允许下载图片的主机",
    )
    group.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="origin whose pages may use the API in a browser, * for all; may be repeated / 允许的跨域来源",
    )
    group.add_argument("--log-content", action="store_true", help="log prompts and answers / 记录提示词与回答")
    add_model_options(parser)
    parser.set_defaults(run=run)


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 65_536:
        raise argparse.ArgumentTypeError(f"must be from 0 to 65535, got {text}")
    return value


def run(arguments: argparse.Namespace) -> int:
    try:
        from ..serving.app import create_app
        from ..serving.server import bind, serve
    except ModuleNotFoundError as error:
        raise ImportError(
            f'Serving needs {error.name}, which is not installed: pip install -c constraints.txt ".[serve]".'
        ) from error
    from ..serving.engine import ChatEngine
    from ..serving.paint_engine import PaintEngine
    from ..serving.tickets import EngineLimits

    settings = ServerSettings(
        api_key=read_api_key(arguments.api_key_file) if arguments.api_key_file else arguments.api_key,
        cors_origins=tuple(arguments.cors_origin),
        timeout=arguments.timeout,
        client_timeout=arguments.client_timeout,
        max_body_bytes=arguments.max_body_bytes,
        max_image_pixels=arguments.max_image_pixels,
        max_image_seconds=arguments.max_image_seconds,
        max_image_memory=arguments.max_image_memory,
        image_workers=arguments.image_workers,
        max_open_requests=arguments.max_waiting + arguments.max_concurrency + 64,
        remote_image_hosts=tuple(arguments.allow_remote_images),
        log_content=arguments.log_content,
    )
    limits = EngineLimits(
        max_rows=arguments.max_concurrency, max_waiting=arguments.max_waiting, max_places=arguments.max_cache_tokens
    )
    suffix = "-paint" if arguments.paint == arguments.model else ""
    chat_names = arguments.served_model_name or [model_name(arguments.model)]
    paint_names = arguments.served_paint_name or [model_name(arguments.paint or "", suffix)]
    with bind(arguments.host, arguments.port) as listener:  # before minutes go into loading a model
        painter = load_painter(arguments) if arguments.paint else None
        app = create_app(
            ChatEngine(load_chat(arguments), limits),
            None if painter is None else PaintEngine(painter),
            chat_name=chat_names[0],
            chat_aliases=chat_names[1:],
            paint_name=paint_names[0],
            paint_aliases=paint_names[1:],
            settings=settings,
        )
        serve(app, listener, settings.client_timeout)
    return 0


def load_painter(arguments: argparse.Namespace, is_alone: bool = False):
    """The paint model; beside a chat model, which a revision is of, with the token and the cache folder alone."""
    from ..checkpoints.location import is_of_the_hub
    from ..paint.paint import VisCPMPaint

    if is_alone:
        hub = hub_options(arguments, arguments.paint)
    elif is_of_the_hub(arguments.paint):
        hub = {"token": arguments.token, "cache_dir": arguments.cache_dir}
    else:
        hub = {}
    return VisCPMPaint(
        arguments.paint,
        image_safety_checker=arguments.paint_checks,
        prompt_safety_checker=arguments.paint_checks,
        add_ranker=arguments.paint_checks,
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        **hub,
    )


def model_name(path: str, suffix: str = "") -> str:
    return (Path(path).name or path) + suffix
