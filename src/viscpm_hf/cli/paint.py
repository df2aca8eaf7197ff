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
    from PIL.PngImagePlugin import PngInfo

    from ..paint.paint import PaintResult


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CANDIDATES = 4


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "paint",
        help="draw images for prompts / 根据文字生成图片",
        description="Draw images for prompts. By default as the original: four candidates of 50 steps, checked, and "
        "the one that Chinese-CLIP likes best. / "
        "根据文字生成图片；默认与原版一致：生成四张候选图，检查并排序后返回最佳的一张。",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, Hub id, or original .pt/.bin file / 模型")
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="what to draw / 提示词")
    parser.add_argument("-o", "--output", metavar="PNG", required=True, help="image to write / 输出图片")
    parser.add_argument(
        "--prompts-file", metavar="TXT", help="a prompt a line, - for stdin; writes PNG-1, PNG-2 ... / 提示词文件"
    )
    parser.add_argument("--negative", metavar="TEXT", help="what not to draw / 反向提示词")
    parser.add_argument("--steps", type=positive(int), default=50, help="denoising steps (50) / 采样步数")
    parser.add_argument(
        "--scheduler", metavar="NAME", help="ddpm (the original's), dpm++, euler, ddim, unipc, ... or a class / 采样器"
    )
    parser.add_argument("--guidance", type=float, default=7.5, help="weight of the prompt (7.5) / 引导系数")
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
    prompts = read_prompts(arguments)
    output = check_output(arguments.output)
    sheet = check_output(arguments.contact_sheet) if arguments.contact_sheet else None
    painter = load_paint(arguments, scheduler=arguments.scheduler, candidates=arguments.candidates or CANDIDATES)
    refused = 0
    for number, prompt in enumerate(prompts, start=1):
        try:
            paint(
                painter,
                arguments,
                prompt,
                numbered(output, number, len(prompts)),
                sheet and numbered(sheet, number, len(prompts)),
            )
        except ValueError as error:
            if len(prompts) == 1:
                raise
            # The others of the file may well be fine.
            refused += 1
            print(f"viscpm-hf: error: {prompt[:40]}: {error}", file=sys.stderr)
    return 1 if refused else 0


def paint(painter, arguments: argparse.Namespace, prompt: str, output: Path, sheet: Path | None) -> None:
    """Draws, writes and reports the images of one prompt."""
    from ..paint.paint import image_grid

    begin = time.perf_counter()
    result = painter.generate_all(
        prompt,
        negative_prompt=arguments.negative,
        num_images_per_prompt=1 if arguments.rank else arguments.candidates or 1,
        guidance_scale=arguments.guidance,
        image_size=arguments.size,
        generator=arguments.seed,
        num_inference_steps=arguments.steps,
    )
    seconds = time.perf_counter() - begin
    settings = {
        "steps": arguments.steps,
        "scheduler": type(painter.pipeline.scheduler).__name__,
        "guidance": arguments.guidance,
        "size": list(result.images[0].size),
    }
    places = [output]
    if arguments.save_all:
        places += [output.with_name(f"{output.stem}.{index}{output.suffix}") for index in range(1, len(result.images))]
    for index, place in enumerate(places):
        save(result, index, place, arguments, settings)
    if sheet is not None:
        image_grid(result.images, captions=[caption(result, index) for index in range(len(result.images))]).save(sheet)
    if arguments.json:
        print(json.dumps(as_dict(result, places, settings, seconds), ensure_ascii=False), flush=True)
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


def save(result: PaintResult, index: int, path: Path, arguments: argparse.Namespace, settings: dict[str, Any]) -> None:
    options = {}
    if path.suffix.lower() == ".png":
        options["pnginfo"] = png_metadata(result, index, arguments, settings)
    result.images[index].save(path, **options)


def png_metadata(result: PaintResult, index: int, arguments: argparse.Namespace, settings: dict[str, Any]) -> PngInfo:
    """Everything that it takes to draw the image again."""
    from PIL.PngImagePlugin import PngInfo

    metadata = PngInfo()
    for name, value in (
        ("Software", "viscpm-hf"),
        ("prompt", result.prompt),
        ("negative_prompt", arguments.negative or ""),
        ("seed", str(result.seeds[index])),
        ("model", arguments.model),
        ("settings", json.dumps(settings)),
        ("score", None if result.scores[index] is None else f"{result.scores[index]:.4f}"),
    ):
        if value is not None:
            metadata.add_itxt(name, value)
    return metadata


def as_dict(result: PaintResult, places: list[Path], settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        "prompt": result.prompt,
        "output": str(places[0]),
        **settings,
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
