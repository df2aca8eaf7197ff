"""`viscpm-hf completion`: a script that completes the commands and options in a shell."""

from __future__ import annotations

import argparse
from functools import partial

from .parsing import SCRIPTS


def add_parser(commands: argparse._SubParsersAction, program: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "completion",
        help="completion of commands in a shell / 命令行补全",
        description="Print a script that completes commands and options. / 输出命令补全脚本。",
        examples=('eval "$(viscpm-hf completion bash)"', "viscpm-hf completion fish | source"),
    )
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="bash, zsh or fish / 所用的 shell")
    parser.set_defaults(run=partial(run, program))


def run(program: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    print(SCRIPTS[arguments.shell](program), end="")
    return 0
