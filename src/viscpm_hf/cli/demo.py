"""`viscpm-hf demo`: the embedded model at work, without a download, or another one.

This is the demonstration in a terminal: a picture is drawn and asked about in both languages, and another one is
painted; the pictures are written to files. The page in the browser is that of `demo_web`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..tiny.embedded import EMBEDDED_NAME
from .demo_web import add_web_options, has_web, load_demo_painter, run_web
from .model_options import load_chat


# One of the test pictures, which no training has seen.
PICTURE = ("test", 54)
PICTURE_SIZE = 224

QUESTIONS = (
    "What color is the star?",
    "它在哪里？",
    "Is there a blue circle?",
    "图中有几个图形？",
    "How many shapes are there?",
    "请用一句话描述这张图片。",
    "Describe the picture in one sentence.",
)
PROMPTS = ("a red circle on the left", "右边有一个蓝色的五角星")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        examples=("viscpm-hf demo", "viscpm-hf demo chat --model MODEL"),
        help=f"see {EMBEDDED_NAME} at work, no download / 演示内置的小模型，无需下载",
        description=f"Ask {EMBEDDED_NAME}, the model that comes with the package, about a picture in both languages, "
        "and let it paint. / 用内置的小模型以中英文就一张图片问答，并画图。",
    )
    add_web_options(parser)
    group = parser.add_argument_group("terminal / 终端")
    group.add_argument("--terminal", action="store_true", help="no page in the browser / 只用终端")
    group.add_argument("-o", "--output", metavar="DIR", default=".", help="folder of the pictures (here) / 图片文件夹")
    group.add_argument("--seed", type=int, default=0, help="of the painted pictures (0) / 随机种子")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.terminal and arguments.kind is not None:
        raise ValueError(f"{arguments.kind} names a page in the browser: drop it, or --terminal.")
    if not arguments.terminal and (arguments.kind is not None or has_web()):
        return run_web(arguments)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    answer_in_terminal(arguments, folder / "demo-picture.png")
    paint_to_files(arguments, folder)
    return 0


def answer_in_terminal(arguments: argparse.Namespace, file: Path) -> None:
    """Draws a picture into `file`, and prints a conversation about it."""
    from ..shapes import draw, make_scene

    chat = load_chat(arguments)
    draw(make_scene(*PICTURE), PICTURE_SIZE).save(file)
    print(f"{file}: a picture that {EMBEDDED_NAME} has not seen in training / 训练中未见过的图片")
    context, encoded = "", None
    for question in QUESTIONS:
        turn = chat.ask(file, question, context, encoded)
        context, encoded = turn.context, turn.vision_hidden_states
        print(f"Q: {question}\nA: {turn.answer}")


def paint_to_files(arguments: argparse.Namespace, folder: Path) -> None:
    """Paints a picture for each prompt."""
    painter = load_demo_painter(arguments)
    for number, prompt in enumerate(PROMPTS, start=1):
        file = folder / f"demo-painted-{number}.png"
        painter.generate(prompt, generator=arguments.seed).save(file)
        print(f"{prompt} -> {file}")
