"""`viscpm-hf live`: what a camera or a video shows, answered as it comes."""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import TYPE_CHECKING

from .chat import positive
from .model_options import add_model_options, load_chat


if TYPE_CHECKING:
    from ..serving.engine import ChatEngine
    from ..serving.live import Eyes

KEY_VARIABLE = "OPENAI_API_KEY"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "live",
        examples=(
            "viscpm-hf live viscpm-tiny video.mp4",
            'viscpm-hf live MODEL /dev/video0 "Is the door open?" --endpoint http://127.0.0.1:8000/v1',
        ),
        help="keep answering about a camera or a video / 对着摄像头或视频实时问答",
        description="Keeps answering one question about a camera's or a video's frames, or tells what is seen; a line "
        "for every answer that differs from the one before. Frames that come too fast are dropped. In the browser: "
        "viscpm-hf demo live. / 就摄像头或视频的画面持续回答同一个问题，回答变化时输出一行；来不及看的画面会跳过。",
    )
    parser.add_argument("model", metavar="MODEL", help="of viscpm-hf chat, or its name at --endpoint / 模型")
    parser.add_argument("source", metavar="SOURCE", help="video file, or camera as /dev/video0 / 视频文件或摄像头")
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="none: what is seen / 问题，可省略")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="without QUESTION (en) / 描述的语言")
    parser.add_argument("--max-new-tokens", type=positive(int), default=48, help="of an answer (48) / 回答的最大长度")
    parser.add_argument("--seconds", type=positive(float), help="ends after so many (never) / 多少秒后结束")
    parser.add_argument("--json", action="store_true", help="one JSON object an answer / 每次回答输出一个 JSON 对象")
    add_endpoint_option(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)


def add_endpoint_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The option that [`open_eyes`] reads."""
    parser.add_argument(
        "--endpoint",
        metavar="URL",
        help=f"ask MODEL there, https://HOST/v1, with the key in {KEY_VARIABLE} / 兼容 OpenAI 的接口地址",
    )


def open_eyes(arguments: argparse.Namespace, engine: ChatEngine | None) -> Eyes:
    """Those of the engine, or of `--endpoint`."""
    from ..serving.live import MAX_NEW_TOKENS, EndpointEyes, EngineEyes

    length = getattr(arguments, "max_new_tokens", MAX_NEW_TOKENS)
    if not arguments.endpoint:
        return EngineEyes(engine, length)
    return EndpointEyes(arguments.endpoint, arguments.model, os.environ.get(KEY_VARIABLE), length)


def run(arguments: argparse.Namespace) -> int:
    try:
        from ..images.video import VideoFrames
        from ..serving.engine import ChatEngine
        from ..serving.live import QUESTIONS

        frames = VideoFrames(arguments.source)
    except ModuleNotFoundError as error:
        raise ImportError(
            f'This needs {error.name}, which is not installed: pip install -c constraints.txt ".[live]".'
        ) from error
    engine = None if arguments.endpoint else ChatEngine(load_chat(arguments))
    eyes = open_eyes(arguments, engine)
    question = arguments.question or QUESTIONS[arguments.language]
    count, last, begin = 0, None, time.perf_counter()
    try:
        with frames:
            for moment, frame in frames:
                answer = eyes.look(frame, question)
                count += 1
                if answer != last or arguments.json:
                    last = answer
                    entry = {"seconds": round(moment, 3), "answer": answer}
                    line = json.dumps(entry, ensure_ascii=False) if arguments.json else f"{moment:7.1f} s  {answer}"
                    print(line, flush=True)
                if arguments.seconds is not None and time.perf_counter() - begin >= arguments.seconds:
                    break
    finally:
        if engine is not None:
            engine.close(drain=False)
        else:
            eyes.close()
    if not arguments.json:
        rate = count / (time.perf_counter() - begin)
        print(f"answers: {count}, {rate:.1f} a second; frames dropped: {frames.num_dropped}")
    return 0
