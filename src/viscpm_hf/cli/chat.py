"""`viscpm-hf chat`: questions about an image, in one conversation."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import describe
from .model_options import add_model_options, load_chat
from .parsing import IntermixedParser
from .words import count


if TYPE_CHECKING:
    from ..chat.chat import ChatTurn, VisCPMChat


HELP = """\
/image PATH   another picture, and a new conversation / 换一张图片，重新开始对话
/clear        forget the conversation / 清除对话历史
/help         this list / 显示本帮助
/quit         end / 退出
"""

COMMANDS = ("/image", "/clear", "/help", "/quit", "/exit", "/q")
# Of one word; what has another slash is a path, and a question may begin with one.
COMMAND = re.compile(r"/[A-Za-z]+")

# The reference decoding has no sampling; these ask for `generate`.
GENERATE_ONLY = ("top_p",)
GENERATION_OPTIONS = ("num_beams", "max_new_tokens", "temperature", "repetition_penalty", "length_penalty", "top_p")


def positive(kind: type) -> Any:
    def parse(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be greater than 0, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def add_decoding_options(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The options that [`generation_options`] reads, `--mode` and `--seed` aside."""
    parser.add_argument("--num-beams", type=positive(int), help="beams (reference: 3, generate: 1) / 束宽")
    parser.add_argument(
        "--max-new-tokens",
        type=positive(int),
        help="tokens of an answer (512), reference: up to two more / 回答的最大长度，reference 模式最多再多两个",
    )
    parser.add_argument("--temperature", type=positive(float), help="reference: 0.7; generate: samples / 温度")
    parser.add_argument("--top-p", type=positive(float), help="nucleus sampling, generate only / 核采样")
    parser.add_argument("--repetition-penalty", type=positive(float), help="reference: 1.1 / 重复惩罚")
    parser.add_argument("--length-penalty", type=float, help="of beam search, reference: 3 / 长度惩罚")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "chat",
        examples=(
            'viscpm-hf chat viscpm-tiny picture.png "What is in the picture?"',
            "viscpm-hf chat openbmb/VisCPM-Chat picture.jpg --quantization 4bit",
        ),
        help="ask questions about an image / 就一张图片提问",
        description="Ask questions about an image, in one conversation. Without a question: an interactive prompt. / "
        "就一张图片在同一段对话中提问；不给问题则进入交互模式。",
    )
    parser.__class__ = IntermixedParser
    parser.add_argument("model", metavar="MODEL", help="folder, Hub id, or original .pt/.bin file / 模型")
    parser.add_argument(
        "image",
        metavar="IMAGE",
        nargs="?",
        help='picture to ask about; none, or "", for questions without a picture / 图片，可省略',
    )
    parser.add_argument("questions", metavar="QUESTION", nargs="*", default=[], help="questions, asked in turn / 问题")
    parser.add_argument(
        "--mode",
        choices=("reference", "generate"),
        help="reference: the original's beam search (default for given questions); generate: transformers' own, which "
        "streams (default for the interactive prompt) / 解码方式",
    )
    add_decoding_options(parser)
    parser.add_argument("--seed", type=int, help="makes sampling repeatable / 随机种子")
    parser.add_argument("--json", action="store_true", help="one JSON object a turn / 每轮输出一个 JSON 对象")
    add_model_options(parser)
    parser.set_defaults(run=run)


def is_question(text: str) -> bool:
    """Whether the first argument after the model, the image's place, is a question instead: a text that no file, URL
    or base64 would be, so that a mistyped path stays one."""
    from PIL.Image import registered_extensions

    if not text or os.path.exists(text):
        return False
    looks_like_path = any(sign in text for sign in "/\\") or Path(text).suffix.lower() in registered_extensions()
    has_words = not text.isascii() or len(text.split()) > 1
    return has_words and not looks_like_path


def generation_options(arguments: argparse.Namespace, mode: str) -> dict[str, Any]:
    """The decoding options that were given, as `VisCPMChat.ask` takes them."""
    options = {name: getattr(arguments, name) for name in GENERATION_OPTIONS if getattr(arguments, name) is not None}
    if mode == "reference":
        wrong = [f"--{name.replace('_', '-')}" for name in GENERATE_ONLY if name in options]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)} needs sampling, which the reference decoding has none of: add --mode generate."
            )
    elif "temperature" in options or "top_p" in options:
        options["do_sample"] = True
    return options


def run(arguments: argparse.Namespace) -> int:
    image, questions = arguments.image, arguments.questions
    if image is not None and is_question(image):
        image, questions = None, [image, *questions]
    is_interactive = not questions
    mode = arguments.mode or ("generate" if is_interactive or arguments.top_p is not None else "reference")
    options = {"mode": mode, "seed": arguments.seed, **generation_options(arguments, mode)}
    from ..modeling.image_processing_viscpm import VisCPMImageProcessor

    if image:
        VisCPMImageProcessor()(image)  # a bad picture is known before minutes of loading
    chat = load_chat(arguments)
    conversation = Conversation(chat, image or None, options, as_json=arguments.json)
    if is_interactive:
        return conversation.interact()
    for question in questions:
        if not arguments.json:
            print(f"Q: {question}")
        conversation.ask(question)
    return 0


class Conversation:
    """A conversation about one picture, or none, in a terminal."""

    def __init__(self, chat: VisCPMChat, image: str | None, options: dict[str, Any], as_json: bool):
        self.chat = chat
        self.options = options
        self.as_json = as_json
        self.image = image
        self.change_image(image)

    def change_image(self, image: str | None) -> None:
        """Another picture and a new conversation; a picture that can't be used changes nothing."""
        if image is not None:
            self.chat.processor.image_processor(image)
        self.image = image
        self.encoded_image = None
        self.clear()

    def clear(self) -> None:
        self.context = ""

    def ask(self, question: str) -> ChatTurn:
        streams = self.options["mode"] == "generate" and not self.as_json and self.options.get("num_beams", 1) == 1
        if streams:
            print("A: ", end="", flush=True)
        turn = self.chat.ask(
            self.image if self.encoded_image is None else None,
            question,
            self.context,
            self.encoded_image,
            on_text=(lambda text: print(text, end="", flush=True)) if streams else None,
            **self.options,
        )
        self.context, self.encoded_image = turn.context, turn.vision_hidden_states
        if self.as_json:
            print(json.dumps(turn_as_dict(turn), ensure_ascii=False), flush=True)
        elif streams:
            print(f"\n   {timing(turn)}", flush=True)
        else:
            print(f"A: {turn.answer}\n   {timing(turn)}", flush=True)
        return turn

    def interact(self) -> int:
        """Reads questions and commands until the input ends; an error ends a turn, not the program."""
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            print(HELP, file=sys.stderr)
        while True:
            try:
                line = input("Q: " if is_terminal else "").strip()
            except EOFError:
                return 0
            if not line:
                continue
            try:
                if not self.command(line):
                    self.ask(line)
            except StopIteration:
                return 0
            except KeyboardInterrupt:
                print("\n   (stopped / 已停止)", file=sys.stderr)
            except (ValueError, OSError, RuntimeError) as error:  # out of GPU memory is the last
                print(f"viscpm-hf: error: {describe(error)}", file=sys.stderr)

    def command(self, line: str) -> bool:
        """Obeys a command; False for a question. Raises `StopIteration` to end."""
        name, _, argument = line.partition(" ")
        if name in COMMANDS[-3:]:
            raise StopIteration
        if name == "/clear":
            self.clear()
        elif name == "/image":
            if not argument.strip():
                raise ValueError("/image needs the path of a picture.")
            self.change_image(argument.strip())
        elif name == "/help":
            print(HELP, file=sys.stderr)
        elif COMMAND.fullmatch(name):
            close = difflib.get_close_matches(name, COMMANDS, 1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(
                f"There is no command {name}.{meant} /help lists them. / 没有这个命令，/help 列出全部命令。"
            )
        else:
            return False
        return True


def turn_as_dict(turn: ChatTurn) -> dict[str, Any]:
    return {
        "question": turn.question,
        "answer": turn.answer,
        "tokens": turn.num_tokens,
        "seconds": round(turn.seconds, 3),
        "tokens_per_second": round(turn.tokens_per_second, 2),
    }


def timing(turn: ChatTurn) -> str:
    return f"({count(turn.num_tokens, 'token')}, {turn.seconds:.1f} s, {turn.tokens_per_second:.1f} tokens/s)"
