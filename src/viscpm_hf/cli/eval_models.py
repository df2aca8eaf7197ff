"""`viscpm-hf eval fid` and `shapes`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat import positive
from .eval_running import (
    ModelRun,
    add_chat_options,
    add_paint_options,
    add_run_options,
    chat_settings,
    counts_of,
    generation_of,
    paint_rows,
    paint_settings,
)
from .model_options import add_model_options, load_chat


if TYPE_CHECKING:
    from ..batch.runner import RowProcessor


# ----------------------------------------------------------------------------------------------------------------- fid


def add_fid(evaluations: argparse._SubParsersAction) -> None:
    parser = evaluations.add_parser(
        "fid",
        help="paint captions; FID and CLIP score / 绘制描述并计算 FID 和 CLIP 分数",
        description='Paints captions (JSONL: "id", "caption"), in English or Chinese, and measures FID and CLIP score '
        "with networks of local folders. / 绘制中英文描述，并用本地模型计算 FID 和 CLIP 分数。",
    )
    parser.add_argument("model", metavar="MODEL", help="Paint: folder, Hub id, or original file / 模型")
    parser.add_argument("--captions", metavar="JSONL", required=True, help="what to paint / 描述文件")
    parser.add_argument("--images", metavar="DIR", required=True, help="where to write the images / 图片输出目录")
    parser.add_argument("--limit", type=positive(int), help="only the first so many captions / 只用前若干条")
    metrics = parser.add_argument_group("metrics / 指标")
    metrics.add_argument("--real", metavar="DIR", help="real pictures, for FID / 真实图片目录")
    network = metrics.add_mutually_exclusive_group()
    network.add_argument("--inception", metavar="PTH", help="torch-fidelity's weights file: the usual FID / 权重文件")
    network.add_argument("--features", metavar="FOLDER", help="or a vision model: CLIP, DINOv2 ... / 视觉模型")
    metrics.add_argument(
        "--clip", metavar="[LANGUAGE=]FOLDER", action="append", default=[], help="CLIP or Chinese-CLIP / CLIP 模型"
    )
    metrics.add_argument("--resamples", type=positive(int), default=20, help="for FID's interval (20) / 重采样次数")
    add_run_options(parser)
    add_paint_options(parser)
    add_model_options(parser, paint=True)
    # The model alone is measured, unless asked otherwise.
    parser.set_defaults(run=run_fid, rank=False, check_prompt=False, check_image=False)


def clip_folders(values: Sequence[str]) -> dict[str, str]:
    """`["en=A", "zh=B"]` or `["A"]` -> folder per language."""
    from ..evaluation.questions import LANGUAGES

    folders: dict[str, str] = {}
    for value in values:
        language, _, folder = value.rpartition("=")
        names = (language,) if language in LANGUAGES else LANGUAGES
        folder = folder if language in LANGUAGES else value
        twice = [name for name in names if name in folders]
        if twice:
            raise ValueError(f"--clip gives two models for {', '.join(twice)}: {folders[twice[0]]} and {folder}.")
        folders.update(dict.fromkeys(names, folder))
    return folders


def run_fid(arguments: argparse.Namespace) -> int:
    from ..batch.processing import PaintRows
    from ..batch.results import Results
    from ..evaluation.fid import IMAGE_FIELDS, RESULTS_NAME, list_images, measure, read_captions
    from ..evaluation.report import fingerprint

    rows = read_captions(arguments.captions, arguments.limit)
    has_network = arguments.inception is not None or arguments.features is not None
    if has_network != (arguments.real is not None):
        raise ValueError("FID takes --real and one of --inception and --features.")
    if not has_network and not arguments.clip:
        raise ValueError("There is nothing to measure: give --real with --inception or --features, or --clip.")
    check_networks(arguments)
    folder = Path(arguments.images)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **paint_settings(arguments),
        "captions": fingerprint(Path(arguments.captions)),
        "limit": arguments.limit,
        "seed": arguments.seed,
    }
    results = Results(folder / RESULTS_NAME, IMAGE_FIELDS)
    run = ModelRun(arguments, "fid", "paint", results, settings)

    if not run.run(rows, lambda: paint_rows(PaintRows, arguments, folder)):
        return 0
    lines = run.lines(rows)
    figures = measure(
        rows,
        lines,
        folder,
        real=arguments.real,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        resamples=arguments.resamples,
        **load_networks(arguments),
    )
    for group, found in figures.items():
        parts = [f"{group:<4} {found['images']:>6} images"]
        for name in ("fid", "clip_score"):
            if name in found:
                parts.append(f"{name} {found[name]['value']:.2f} ({found[name]['low']:.2f}–{found[name]['high']:.2f})")
        print("  ".join(parts))
    networks = {"inception": arguments.inception, "features": arguments.features, "clip": arguments.clip}
    counts = {**counts_of(lines), "flagged": sum(bool(line.get("flagged")) for line in lines.values())}
    measured: dict[str, Any] = {"networks": networks}
    if arguments.real is not None:
        counts["real"] = len(list_images(arguments.real))
        # No settings of the run: what is painted may be measured again with others.
        measured |= {"real": fingerprint(Path(arguments.real)), "resamples": arguments.resamples}
    return run.write_report(counts, {**measured, **figures}, bootstrap=arguments.seed)


def check_networks(arguments: argparse.Namespace) -> None:
    """Raises for what can't be measured with, before hours of painting; nothing is loaded."""
    from ..evaluation.fid import check_folder, check_inception, import_torchmetrics, list_images

    import_torchmetrics()
    if arguments.real is not None:
        list_images(arguments.real)
    if arguments.inception is not None:
        check_inception(arguments.inception)
    for folder in (arguments.features, *clip_folders(arguments.clip).values()):
        if folder is not None:
            check_folder(folder)


def load_networks(arguments: argparse.Namespace) -> dict[str, Any]:
    """What [`measure`] measures with."""
    from ..evaluation.fid import ClipScorer, inception_features, vision_features
    from ..loading.options import default_device, usable_device

    device = usable_device(arguments.device) if arguments.device else default_device()
    features = None
    if arguments.inception is not None:
        features = inception_features(arguments.inception, device)
    elif arguments.features is not None:
        features = vision_features(arguments.features, device)
    folders = clip_folders(arguments.clip)
    scorers = {folder: ClipScorer(folder, device) for folder in dict.fromkeys(folders.values())}
    return {"features": features, "clip": {language: scorers[folder] for language, folder in folders.items()}}


# -------------------------------------------------------------------------------------------------------------- shapes


def add_shapes(evaluations: argparse._SubParsersAction) -> None:
    parser = evaluations.add_parser(
        "shapes",
        help="the demo world's test sets / 演示世界的测试集",
        description="Asks, or paints, the demo world's test sets and checks what comes. Nothing else is needed. / "
        "用演示世界的测试集检验模型，无需其他数据。",
    )
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for task, what, count in (("chat", "questions / 提问", 100), ("paint", "prompts / 绘画", 100)):
        own = tasks.add_parser(task, help=what, description=f"The demo world's {what}")
        own.add_argument("model", metavar="MODEL", help="folder, Hub id, or original file / 模型")
        own.add_argument("--output", metavar="JSONL", required=True, help="where to write the results / 结果文件")
        each = "type and language / 每类每语言题数" if task == "chat" else "language / 每语言提示词数"
        own.add_argument("--count", type=positive(int), default=count, help=f"of every {each} ({count})")
        add_run_options(own)
        if task == "chat":
            add_chat_options(own)
        else:
            own.add_argument("--images", metavar="DIR", required=True, help="where to write the images / 图片输出目录")
            add_paint_options(own)
        add_model_options(own, paint=task == "paint")
        own.set_defaults(run=run_shapes)
        if task == "paint":
            own.set_defaults(rank=False, check_prompt=False, check_image=False)


def run_shapes(arguments: argparse.Namespace) -> int:
    from ..batch.results import Results
    from ..evaluation import shapes

    is_chat = arguments.task == "chat"
    settings = {
        **(chat_settings(arguments) if is_chat else paint_settings(arguments)),
        "count": arguments.count,
        "seed": arguments.seed,
    }
    results = Results(arguments.output)
    run = ModelRun(arguments, f"shapes {arguments.task}", arguments.task, results, settings)
    rows = shapes.chat_rows(arguments.count) if is_chat else shapes.paint_rows(arguments.count)

    def load() -> RowProcessor:
        if is_chat:
            mode, generation = settings["mode"], generation_of(settings)
            return shapes.ShapesChatRows(load_chat(arguments), mode, arguments.seed, generation)
        return paint_rows(shapes.ShapesPaintRows, arguments, Path(arguments.images))

    if not run.run(rows, load):
        return 0
    lines = run.lines(rows)
    summary = shapes.summarize(rows, lines, shapes.CHAT_PARTS if is_chat else shapes.PAINT_PARTS)
    for language, by_name in summary.items():
        for name, parts in by_name.items():
            print(f"{language} {name:<12} {percent(parts['right'])} of {parts['right']['count']}")
    return run.write_report(counts_of(lines), summary)


def percent(share: dict[str, float]) -> str:
    return f"{100 * share['value']:.1f} % ({100 * share['low']:.1f}–{100 * share['high']:.1f})"
