"""Entry point: `viscpm-hf COMMAND ...`."""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from ..quiet import uncollected
from ..version import __version__
from . import (
    batch,
    chat,
    completion,
    convert,
    demo,
    export,
    inspect,
    live,
    memory,
    merge,
    paint,
    publish,
    serve,
    train,
)
from . import eval as evaluate
from .errors import EXIT_INTERRUPTED, describe, is_full_disk
from .parsing import Parser, parsers


# Loggers that tell on import of kernels that can't be had, and of plans.
LOUD = ("bitsandbytes", "torchao", "diffusers", "torch.utils._pytree", "huggingface_hub.serialization._torch")

COMMANDS = (demo, chat, live, paint, batch, serve, inspect, memory, convert, merge, export, publish, train, evaluate)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="viscpm-hf",
        description="VisCPM in today's Hugging Face stack / 在今天的 Hugging Face 生态中使用 VisCPM",
        examples=("viscpm-hf demo", 'viscpm-hf chat viscpm-tiny picture.png "What is in the picture?"'),
    )
    parser.add_argument("--version", action="version", version=f"viscpm-hf {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is done / 显示日志")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    completion.add_parser(commands, parser)
    for _, child in parsers(parser):
        child.finish()
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; errors that the user can mend are one line on stderr and exit status 1."""
    arguments = build_parser().parse_args(argv)
    arguments.argv = list(sys.argv[1:] if argv is None else argv)  # for commands that start further processes
    # At its end Python looks for garbage once more, among all that the libraries made, which takes half a second.
    atexit.register(gc.freeze)
    with uncollected():
        _configure_logging(arguments.verbose)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("\nviscpm-hf: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output is gone; nothing more can be said to it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if arguments.verbose:
            raise
        print(f"viscpm-hf: error: {_explain(error)}", file=sys.stderr)
        return 1


def _explain(error: Exception) -> str:
    """One line for people."""
    import pickle

    from huggingface_hub.errors import StrictDataclassError

    from .network import not_reached

    if isinstance(error, OSError) and (wanted := not_reached()) is not None:
        return wanted
    if isinstance(error, pickle.UnpicklingError):
        # Torch's own words advise to load the file nevertheless.
        return "A file asks for more than tensors, or is damaged, and was not loaded: get it from its source again."
    # A configuration of the wrong types is the first of those that the user can mend, out of GPU memory the last.
    if is_full_disk(error) or isinstance(
        error, (StrictDataclassError, ValueError, OSError, ImportError, MemoryError, RuntimeError)
    ):
        return describe(error)
    return f"{type(error).__name__}: {describe(error)} (viscpm-hf -v COMMAND ... shows where)"


def _configure_logging(verbose: bool) -> None:
    if not verbose:
        # Of other libraries, about themselves: what they can't load here, what they will rename, what they will drop.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        for name in LOUD:
            logging.getLogger(name).setLevel(logging.ERROR)
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # read by these libraries when they are imported
        for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    from .network import do_not_wait_for_the_hub

    do_not_wait_for_the_hub()
    level = "info" if verbose else "error"
    if "transformers" not in sys.modules:
        os.environ["TRANSFORMERS_VERBOSITY"] = level  # likewise; not every command imports it
    else:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity(transformers_logging.log_levels[level])
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
