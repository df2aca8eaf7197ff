"""`viscpm-hf paint`: images for prompts."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .chat import positive
from .model_options import add_model_options, load_paint


if TYPE_CHECKING:
    from ..paint.paint import EncodedPrompt, PaintResult, VisCPMPaint


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CANDIDATES = 4
PRESET_NAMES = ("fast", "quality", "reference")  # of PRESETS, which a parser needn't import
# What a PNG file says itself.
OF_THE_RECORD = (
    "prompt", "prompts_file", "negative", "preset", "steps", "scheduler", "guidance", "size", "seed", "candidates",
    "contact_sheet", "save_all",
)  # fmt: skip


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "paint",
        rare="--guidance --scheduler",
        examples=(
            'viscpm-hf paint viscpm-tiny "a red circle on the left" -o circle.png',
            'viscpm-hf paint openbmb/VisCPM-Paint "人闲桂花落，夜静春山空" -o night.png --preset fast',
        ),
        help="draw images for prompts / 根据文字生成图片",
        description="Draw images for prompts. By default as the original: four candidates of 50 steps, checked, and "
        "the one that Chinese-CLIP likes best. / "
        "根据文字生成图片；默认与原版一致：生成四张候选图，检查并排序后返回最佳的一张。",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="folder, Hub id, or original file; with --from only if it lies elsewhere now / 模型",
    )
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to draw / 提示词")
    parser.add_argument("-o", "--output", metavar="PNG", required=True, help="image to write / 输出图片")
    parser.add_argument(
        "--prompts-file", metavar="TXT", help="a prompt a line, - for stdin; writes PNG-1, PNG-2 ... / 提示词文件"
    )
    parser.add_argument(
        "--from",
        dest="again",
        metavar="PNG",
        help="draw a PNG of viscpm-hf again, with its own settings / 按图中记录重画",
    )
    parser.add_argument(
        "--preset",
        choices=tuple(PRESET_NAMES),
        metavar="NAME",
        help="fast, quality: 12, 25 steps of DPM++ 2M Karras; reference: the original's 50 / 预设",
    )
    parser.add_argument("--negative", metavar="TEXT", help="what not to draw / 反向提示词")
    parser.add_argument("--steps", type=positive(int), help="denoising steps (50) / 采样步数")
    parser.add_argument(
        "--scheduler", metavar="NAME", help="ddpm (the original's), dpm++, euler, ddim, unipc, ... or a class / 采样器"
    )
    parser.add_argument("--guidance", type=float, help="weight of the prompt (7.5) / 引导系数")
    parser.add_argument("--size", type=positive(int), help="height and width in pixels (512) / 图片边长")
    parser.add_argument("--seed", type=int, help="of the first candidate; the others follow / 随机种子")
    parser.add_argument(
        "--candidates",
        type=positive(int),
        help=f"images drawn per prompt ({CANDIDATES} with ranking, else 1) / 候选数",
    )
    parser.add_argument("--contact-sheet", metavar="PNG", help="all candidates with their scores / 候选图总览")
    parser.add_argument("--save-all", action="store_true", help="write every candidate too / 保存所有候选图")
    parser.add_argument("--json", action="store_true", help="one JSON object a prompt / 每个提示词输出一个 JSON 对象")
    add_model_options(parser, paint=True)
    parser.set_defaults(run=run)


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    if (arguments.prompt is None) == (arguments.prompts_file is None):
        raise ValueError("Give either a prompt or --prompts-file.")
    if arguments.prompt is not None:
        if not arguments.prompt.strip():
            raise ValueError("The prompt is empty: say what to draw.")
        return [arguments.prompt]
    if arguments.prompts_file == "-":
        lines = sys.stdin.read().splitlines()
    else:
        lines = Path(arguments.prompts_file).read_text("utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{arguments.prompts_file} holds no prompt.")
    return prompts


def check_output(path: str) -> Path:
    """The path, if an image can be written there.

    Raises:
        ValueError: for a name that isn't one of an image.
        OSError: for a place that can't be written to.
    """
    output = Path(path)
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: the name of the output ends in {', '.join(SUFFIXES)}.")
    if output.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not an image to write.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.parent} to write {output.name} to.")
    if not os.access(output if output.exists() else output.parent, os.W_OK):
        raise PermissionError(f"{path} can't be written: no permission.")
    return output


def numbered(output: Path, number: int, count: int) -> Path:
    return output if count == 1 else output.with_name(f"{output.stem}-{number:0{len(str(count))}d}{output.suffix}")


def run(arguments: argparse.Namespace) -> int:
    if arguments.again is not None:
        return draw_again(arguments)
    if arguments.model is None:
        raise ValueError("Give a MODEL, and a prompt or --prompts-file.")
    prompts = read_prompts(arguments)
    output = check_output(arguments.output)
    sheet = check_output(arguments.contact_sheet) if arguments.contact_sheet else None
    painter = load_paint(arguments, scheduler=arguments.scheduler, candidates=arguments.candidates or CANDIDATES)
    refused = 0
    encoded = dict.fromkeys(prompts)
    if arguments.prompts_file is not None:
        refused, encoded = encode_all(painter, prompts, arguments.negative)
    for number, prompt in enumerate(prompts, start=1):
        if prompt not in encoded:
            continue
        try:
            paint(
                painter,
                arguments,
                encoded[prompt] or prompt,
                numbered(output, number, len(prompts)),
                sheet and numbered(sheet, number, len(prompts)),
            )
        except ValueError as error:
            if len(prompts) == 1:
                raise
            # The others of the file may well be fine.
            refused += 1
            complain(prompt, error)
    return 1 if refused else 0


def complain(prompt: str, error: Exception) -> None:
    print(f"viscpm-hf: error: {prompt[:40]}: {error}", file=sys.stderr)


def encode_all(painter: VisCPMPaint, prompts: list[str], negative: str | None) -> tuple[int, dict[str, EncodedPrompt]]:
    """All prompts in one pass, after which the text encoder goes; and how many of them can't be drawn."""
    from ..paint.painting import PaintRequest, check_paint_request

    fine, refused = [], 0
    for prompt in prompts:
        try:
            check_paint_request(painter, PaintRequest(prompt, negative))
            fine.append(prompt)
        except ValueError as error:
            if len(prompts) == 1:
                raise
            refused += 1
            complain(prompt, error)
    fine = list(dict.fromkeys(fine))
    encoded = dict(zip(fine, painter.encode(fine, negative), strict=True)) if fine else {}
    painter.free_text_encoder()
    return refused, encoded


def draw_again(arguments: argparse.Namespace) -> int:
    """Draws the image of a PNG file again."""
    from ..paint.record import read_record
    from ..tiny.embedded import resolve_model

    given = [name for name in OF_THE_RECORD if getattr(arguments, name) not in (None, False)]
    if given:
        raise ValueError(
            "--from takes everything from the PNG file; beside it these can't be given: "
            + ", ".join(name.replace("_", "-") for name in given)
        )
    record = read_record(arguments.again)
    output = check_output(arguments.output)
    if arguments.model is None:
        # A name out of a file is not fetched from the network.
        if not os.path.exists(resolve_model(record.model, "paint")):
            raise ValueError(
                f"{arguments.again} was drawn by {record.model[:200]!r}, which isn't here: give the MODEL too."
            )
        arguments.model = record.model
    arguments.rank = False
    begin = time.perf_counter()
    painter = load_paint(arguments)
    result = painter.draw_again(record)
    if result.settings["dtype"] != record.dtype:
        print(
            f"viscpm-hf: drawn in {record.dtype} then, in {result.settings['dtype']} now: it may differ a little.",
            file=sys.stderr,
        )
    finish(result, arguments, output, None, time.perf_counter() - begin)
    return 0


def call_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Scheduler, steps and guidance: those of the preset, those given, or the original's."""
    from ..paint.paint import PRESETS

    preset = PRESETS[arguments.preset] if arguments.preset is not None else {}
    given = {
        "scheduler": arguments.scheduler,
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
    }
    return {**preset, **{name: value for name, value in given.items() if value is not None}}


def paint(
    painter: VisCPMPaint, arguments: argparse.Namespace, prompt: str | EncodedPrompt, output: Path, sheet: Path | None
) -> None:
    """Draws, writes and reports the images of one prompt."""
    begin = time.perf_counter()
    result = painter.generate_all(
        prompt,
        negative_prompt=arguments.negative if isinstance(prompt, str) else None,
        num_images_per_prompt=1 if arguments.rank else arguments.candidates or 1,
        image_size=arguments.size,
        generator=arguments.seed,
        **call_arguments(arguments),
    )
    finish(result, arguments, output, sheet, time.perf_counter() - begin)


def finish(
    result: PaintResult, arguments: argparse.Namespace, output: Path, sheet: Path | None, seconds: float
) -> None:
    """Writes and reports images."""
    from ..paint.paint import image_grid
    from ..paint.record import save_whole

    places = [output]
    if arguments.save_all:
        places += [output.with_name(f"{output.stem}.{index}{output.suffix}") for index in range(1, len(result.images))]
    for index, place in enumerate(places):
        result.save(place, index, arguments.model)
    if sheet is not None:
        captions = [caption(result, index) for index in range(len(result.images))]
        save_whole(image_grid(result.images, captions=captions), sheet)
    if arguments.json:
        print(json.dumps(as_dict(result, places, seconds), ensure_ascii=False), flush=True)
    else:
        print(f"{output}  ({caption(result, 0)}, {seconds:.1f} s)", flush=True)
    for index, reason in enumerate(result.reasons):
        if reason is not None:
            print(f"viscpm-hf: candidate {index} (seed {result.seeds[index]}) is flagged: {reason}", file=sys.stderr)


def caption(result: PaintResult, index: int) -> str:
    """What a candidate is: seed, score, and whether it is flagged."""
    parts = [f"seed {result.seeds[index]}"]
    if result.scores[index] is not None:
        parts.append(f"score {result.scores[index]:.2f}")
    if result.flags[index]:
        parts.append("flagged")
    return ", ".join(parts)


def as_dict(result: PaintResult, places: list[Path], seconds: float) -> dict[str, Any]:
    return {
        "prompt": result.prompt,
        "output": str(places[0]),
        **{name: result.settings[name] for name in ("steps", "scheduler", "guidance")},
        "size": list(result.images[0].size),
        "candidates": [
            {
                "seed": result.seeds[index],
                "score": result.scores[index],
                "flagged": result.flags[index],
                "reason": result.reasons[index],
                "output": str(places[index]) if index < len(places) else None,
            }
            for index in range(len(result.images))
        ],
        "seconds": round(seconds, 3),
    }
