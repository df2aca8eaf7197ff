"""`viscpm-hf serve`: an HTTP API."""

from __future__ import annotations

import argparse
from pathlib import Path

from .chat import positive
from .model_options import add_model_options, load_chat


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "serve",
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
    group.add_argument("--name", help="the model's name in the API (the path's last part) / 接口中的模型名")
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
    group.add_argument("--max-image-pixels", type=positive(int), default=50_000_000, help="of a picture / 像素上限")
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
        from ..serving.server import serve
    except ModuleNotFoundError as error:
        raise ImportError(
            f'Serving needs {error.name}, which is not installed: pip install "viscpm-hf[serve]".'
        ) from error
    from ..serving.paint_engine import PaintEngine
    from ..serving.settings import ServerSettings, read_api_key
    from ..serving.sibling_engine import open_engine
    from ..serving.tickets import EngineLimits

    settings = ServerSettings(
        api_key=read_api_key(arguments.api_key_file) if arguments.api_key_file else arguments.api_key,
        timeout=arguments.timeout,
        client_timeout=arguments.client_timeout,
        max_body_bytes=arguments.max_body_bytes,
        max_image_pixels=arguments.max_image_pixels,
        max_open_requests=arguments.max_waiting + arguments.max_concurrency + 64,
        remote_image_hosts=tuple(arguments.allow_remote_images),
        log_content=arguments.log_content,
    )
    limits = EngineLimits(
        max_rows=arguments.max_concurrency, max_waiting=arguments.max_waiting, max_places=arguments.max_cache_tokens
    )
    painter = load_painter(arguments) if arguments.paint else None
    chat = open_engine(load_chat(arguments), limits)
    app = create_app(
        chat,
        None if painter is None else PaintEngine(painter),
        chat_name=arguments.name or model_name(arguments.model),
        paint_name=model_name(arguments.paint or "", suffix="-paint" if arguments.paint == arguments.model else ""),
        settings=settings,
    )
    serve(app, arguments.host, arguments.port, settings.client_timeout)
    return 0


def load_painter(arguments: argparse.Namespace):
    from ..paint.paint import VisCPMPaint

    return VisCPMPaint(
        arguments.paint,
        image_safety_checker=arguments.paint_checks,
        prompt_safety_checker=arguments.paint_checks,
        add_ranker=arguments.paint_checks,
        device=arguments.device,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
    )


def model_name(path: str, suffix: str = "") -> str:
    return (Path(path).name or path) + suffix
