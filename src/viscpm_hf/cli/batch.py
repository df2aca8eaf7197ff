"""`viscpm-hf batch`: answers, or images, for every row of a file."""

from __future__ import annotations

import argparse
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat import GENERATION_OPTIONS, generation_options
from .eval_running import (
    add_chat_options,
    add_paint_options,
    add_process_options,
    chat_mode,
    check_place,
    paint_options,
    paint_rows,
)
from .model_options import add_model_options, hub_options, load_chat
from .words import count as count_of


if TYPE_CHECKING:
    from ..batch.launching import Share
    from ..batch.results import Results
    from ..batch.runner import RowProcessor

# Of one kind of model alone; None, or False, unless given.
CHAT_OPTIONS = ("mode", *GENERATION_OPTIONS, "images", "quantize_vision", "quantize_embedding", "vision_config")
PAINT_OPTIONS = ("images_out", "steps", "guidance", "size", "scheduler", "candidates", "quantize_unet", "vae")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "batch",
        examples=(
            "viscpm-hf batch viscpm-tiny questions.jsonl answers.jsonl",
            "viscpm-hf batch openbmb/VisCPM-Paint prompts.jsonl images.jsonl --images-out images",
        ),
        rare="--seed --max-new-tokens --overwrite --num-beams --temperature --top-p --guidance --size "
        "--scheduler --candidates --dtype --rank --check-prompt --check-image",
        help="answer or draw every row of a file / 批量推理",
        description='Answers questions ({"id", "image", "question"}), or draws prompts ({"id", "prompt"}), one JSON '
        "object a line. Run again, it goes on where it ended. / "
        "逐行处理 JSONL 文件：回答问题或生成图片；中断后重新运行即可继续。",
    )
    parser.add_argument("model", metavar="MODEL", help="Chat or Paint: folder, Hub id, or original file / 模型")
    parser.add_argument("input", metavar="INPUT", help="JSONL of rows, each with an id / 输入文件")
    parser.add_argument("output", metavar="OUTPUT", help="JSONL of results, in the same order / 输出文件")
    add_process_options(parser)
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: --num-processes workers on a Ray cluster, or on a local one / 执行引擎",
    )
    parser.add_argument("--retry-errors", action="store_true", help="do failed rows again / 重试出错的行")
    parser.add_argument(
        "--seed", type=int, help="of the first row, the others' follow; or a row's own / 首行的随机种子，其余依次加一"
    )
    chat, paint = add_chat_options(parser), add_paint_options(parser)
    chat.add_argument("--images", metavar="DIR", help="where the rows' pictures are (beside INPUT) / 图片目录")
    paint.add_argument("--images-out", metavar="DIR", help="where to write the images / 图片输出目录")
    add_model_options(parser, paint=True)
    parser.add_argument(
        "--quantize-vision", action="store_true", help="Chat: the vision tower too / 同时量化视觉编码器"
    )
    parser.add_argument(
        "--quantize-embedding", action="store_true", help="Chat: embedding and head too / 同时量化词嵌入与输出层"
    )
    parser.add_argument("--vision-config", metavar="JSON", help="Chat, original file: sizes / 视觉编码器配置")
    parser.set_defaults(run=run, check_image=None)  # as the model's class has it: on with Paint, off with Chat


def run(arguments: argparse.Namespace) -> int:
    from ..batch.launching import Share, launch
    from ..batch.results import Results
    from ..batch.rows import check_rows, read_rows

    count = check_rows(arguments.input)
    check_places(arguments)
    kind, commit = model_kind(arguments)
    if arguments.check_image is None:
        arguments.check_image = kind == "paint"
    check_options(arguments, kind)
    results = Results(arguments.output)
    share = Share.of_this_process()
    if share.is_first:
        if arguments.overwrite:
            results.discard()
        results.check_settings(settings_of(arguments, kind))
    arguments.revision = commit or arguments.revision  # what was looked at is what is loaded
    share.wait_for_others()
    begin = time.perf_counter()
    try:
        if arguments.engine == "local" and share.processes == 1 and arguments.num_processes > 1:
            Share(0, arguments.num_processes).device(arguments.device)
            launch(arguments.argv, arguments.num_processes)
            return 0
        process_rows(arguments, kind, results, share)
        share.wait_for_others()
    except KeyboardInterrupt:
        if share.processes == 1:
            done = len(results.finished())
            print(f"\n{done} of {count} rows are finished; the same command goes on with the rest.", file=sys.stderr)
        raise
    if share.is_first:
        joined = results.join(read_rows(arguments.input))
        seconds = time.perf_counter() - begin
        print(
            f"{arguments.output}: {count_of(joined.rows, 'row')}, {count_of(joined.errors, 'error')} ({seconds:.1f} s)"
        )
        if joined.errors:
            print(f"viscpm-hf: {count_of(joined.errors, 'row')} failed; --retry-errors tries again.", file=sys.stderr)
    return 0


def process_rows(arguments: argparse.Namespace, kind: str, results: Results, share: Share) -> None:
    """Runs the unfinished rows of this process."""
    from tqdm import tqdm

    from ..batch.ray_engine import run_with_ray
    from ..batch.rows import read_rows
    from ..batch.runner import BatchRunner

    redone = arguments.retry_errors
    finished = {key for key, place in results.finished().items() if not (place.is_error and redone)}

    def todo():
        for row in share.rows(read_rows(arguments.input), arguments.batch_size):
            if row.key not in finished:
                yield row

    count = sum(1 for _ in todo())
    if not count:
        return
    with (
        results.writer(share.process) as writer,
        tqdm(total=count, unit="row", disable=None if share.is_first else True) as progress,
    ):
        if arguments.engine == "ray":
            load = partial(load_processor, with_absolute_paths(arguments), kind)
            run_with_ray(todo(), load, arguments.batch_size, arguments.num_processes, writer.write, progress.update)
            return
        arguments.device = share.device(arguments.device)
        processor = load_processor(arguments, kind)
        BatchRunner(processor, arguments.batch_size, writer.write).run(todo(), progress.update)


def with_absolute_paths(arguments: argparse.Namespace) -> argparse.Namespace:
    """For processes that start elsewhere."""
    names = ("model", "input", "images", "config", "vision_config", "vocab", "vae", "diffusion_config")
    names += ("offload_folder", "cache_dir", "ranker", "prompt_checker", "image_checker")
    paths = {name: getattr(arguments, name) for name in names}
    found = {name: os.path.abspath(path) for name, path in paths.items() if path and os.path.exists(path)}
    if arguments.images_out:
        found["images_out"] = os.path.abspath(arguments.images_out)
    return argparse.Namespace(**{**vars(arguments), "run": None, **found})


def load_processor(arguments: argparse.Namespace, kind: str) -> RowProcessor:
    """The model, and what it makes of rows."""
    from ..batch.processing import ChatRows, PaintRows

    if kind == "chat":
        mode = chat_mode(arguments)
        return ChatRows(
            load_chat(arguments),
            Path(arguments.images) if arguments.images else Path(arguments.input).parent,
            mode,
            arguments.seed,
            generation_options(arguments, mode),
        )
    return paint_rows(PaintRows, arguments, Path(arguments.images_out))


# -------------------------------------------------------------------------------------------------------------- checks


def check_places(arguments: argparse.Namespace) -> None:
    """Raises `OSError` or `ValueError` for an output that can't be written, before minutes of loading."""
    output = Path(arguments.output)
    check_place(output)
    if output.exists() and output.samefile(arguments.input):
        raise ValueError(f"{output} is the input; results need a file of their own.")
    if arguments.images and not Path(arguments.images).is_dir():
        raise FileNotFoundError(f"There is no folder {arguments.images} of images.")
    if arguments.images_out and Path(arguments.images_out).is_file():
        raise NotADirectoryError(f"{arguments.images_out} is a file, not a folder for images.")


def model_kind(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """`"chat"` or `"paint"`: what the model is; of one that is both, or not yet here, what the rows ask for. Of a Hub
    repository also the commit that it is at."""
    from ..batch.rows import read_rows
    from ..checkpoints.adapters import AdapterFolder
    from ..checkpoints.location import commit_of, locate
    from ..conversion.inspect import inspect
    from ..families.family import CHATS
    from ..tiny.embedded import EMBEDDED_NAME

    kind, commit, hub = None, None, hub_options(arguments)
    if AdapterFolder.find(arguments.model) is not None:
        return "chat", None
    if arguments.model != EMBEDDED_NAME:
        configs = {"llm_config": arguments.config, "vision_config": arguments.vision_config}
        path = locate(arguments.model, with_weights=False, **hub).path
        commit = None if os.path.exists(arguments.model) else commit_of(path)
        kind = inspect(path, **configs).kind
        kind = "chat" if kind in CHATS else kind
    if kind is None:
        row = next((row for row in read_rows(arguments.input) if row.error is None), None)
        kind = "paint" if row is not None and "prompt" in row.values else "chat"
    if kind not in ("chat", "paint"):
        raise ValueError(f"{arguments.model} is neither VisCPM-Chat nor VisCPM-Paint, but {kind}.")
    return kind, commit


def check_options(arguments: argparse.Namespace, kind: str) -> None:
    """Raises `ValueError` for options of the other kind of model, or wrong ones of this kind."""
    other, name = (PAINT_OPTIONS, "Paint") if kind == "chat" else (CHAT_OPTIONS, "Chat")
    given = [f"--{option.replace('_', '-')}" for option in other if getattr(arguments, option) not in (None, False)]
    if given:
        raise ValueError(f"{', '.join(given)} is for VisCPM-{name}, which {arguments.model} is not.")
    if kind == "chat":
        generation_options(arguments, chat_mode(arguments))
    elif not arguments.images_out:
        raise ValueError("Give a folder for the images: --images-out DIR.")


def settings_of(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What makes results what they are."""
    settings = {
        "model": os.path.abspath(arguments.model) if os.path.exists(arguments.model) else arguments.model,
        "kind": kind,
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "seed": arguments.seed,
    }
    if arguments.revision is not None:
        settings["revision"] = arguments.revision
    if kind == "chat":
        mode = chat_mode(arguments)
        switches = ("check_image", "quantize_vision", "quantize_embedding")
        given = {name: True for name in switches if getattr(arguments, name)}
        return {**settings, "mode": mode, **given, **generation_options(arguments, mode)}
    return {
        **settings,
        "scheduler": arguments.scheduler,
        "candidates": arguments.candidates,
        **paint_options(arguments),
    }
