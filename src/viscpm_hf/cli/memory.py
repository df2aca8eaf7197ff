"""`viscpm-hf memory`: what a model needs, and the command that suits this machine."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from .chat import positive
from .model_options import add_hub_options, hub_options
from .words import rate


if TYPE_CHECKING:
    from ..memory import MemoryPlan, MemoryRow

# A bare number below this is one of gigabytes.
MOST_GIGABYTES = 1000
# Options of the work.
CHAT_WORK = ("length", "prompt_length", "beams")
PAINT_WORK = ("size", "steps", "candidates")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "memory",
        examples=(
            "viscpm-hf memory openbmb/VisCPM-Chat --gpu 8GB",
            "viscpm-hf memory openbmb/VisCPM-Paint --gpu 4090 --candidates 4",
        ),
        help="say what memory a model needs / 估算显存与内存",
        description="Says what a model needs in every precision and place, how fast it can be there, and the command "
        "that suits this machine; no weight is read. / "
        "根据形状估算各精度与放置方式所需的显存和内存，并给出适合本机的命令。",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="file, folder, cached Hub id, viscpm-tiny; of openbmb/VisCPM-Chat and other released ids the sizes are "
        "known / 模型",
    )
    parser.add_argument(
        "--gpu", metavar="SIZE", type=gigabytes, help="8GB, a GPU's name (4090), or none; else as found / 显存"
    )
    parser.add_argument("--ram", metavar="SIZE", type=gigabytes, help="16GB; else what is free now / 内存")
    parser.add_argument("--batch", type=positive(int), help="questions, or prompts, at once (1) / 批大小")
    parser.add_argument("--length", type=positive(int), help="Chat, CPM-Bee: tokens of an answer (512) / 回答长度")
    parser.add_argument(
        "--prompt-length", type=positive(int), help="Chat: of the prompt, image included (164) / 提示长度"
    )
    parser.add_argument("--beams", type=positive(int), help="Chat: 1 for greedy or sampling (3) / 束宽")
    parser.add_argument("--size", type=positive(int), help="Paint: height and width in pixels (512) / 图片边长")
    parser.add_argument("--steps", type=positive(int), help="Paint: denoising steps (50) / 采样步数")
    parser.add_argument("--candidates", type=positive(int), help="Paint: images drawn per prompt (4) / 候选数")
    parser.add_argument("--kind", choices=("chat", "paint"), help="of viscpm-tiny, which is both / 模型种类")
    parser.add_argument("--json", action="store_true", help="one JSON object, in bytes / 输出 JSON")
    add_hub_options(parser, asks=False)
    parser.set_defaults(run=run)


def gigabytes(text: str) -> str:
    """`8` is `8GB`: no GPU is called so, and none has 8 bytes."""
    is_small = text.replace(".", "", 1).isdecimal() and 0 < float(text) < MOST_GIGABYTES
    return f"{text}GB" if is_small else text


def run(arguments: argparse.Namespace) -> int:
    from ..memory import Machine, memory_plan
    from ..plain_text import size_text

    given = {name: getattr(arguments, name) for name in (*CHAT_WORK, *PAINT_WORK, "batch")}
    work = {name: value for name, value in given.items() if value is not None}
    machine = Machine.detect(arguments.gpu, arguments.ram)
    plan = memory_plan(arguments.model, machine=machine, work=work, kind=arguments.kind, **hub_options(arguments))
    other = CHAT_WORK if plan.kind == "paint" else PAINT_WORK
    wrong = [f"--{option.replace('_', '-')}" for option in other if getattr(arguments, option) is not None]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} means nothing to {plan.model}, which is {plan.title}.")
    if arguments.json:
        print(json.dumps(as_dict(plan), ensure_ascii=False))
        return 0
    parameters = ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in plan.parameters.items())
    print(f"{plan.model}: {plan.title}, {parameters}")
    print(f"{describe_work(plan)}\n{machine.describe()}\n")
    print(table(plan))
    print("\nSizes in powers of ten. Speeds are estimates: " + "; ".join(machine.notes) + ".")
    if plan.kind == "paint":
        print("Without the checkers and the ranker, which take 0.2 to 0.5 GB each in half precision.")
    if plan.best is None:
        raise ValueError(plan.advice)
    best = plan.best
    room = size_text(best.peak_gpu) + " on the GPU" if best.peak_gpu else size_text(best.peak_ram) + " of RAM"
    print(f"\nBest here / 推荐 ({best.precision}, {best.placement}, {room}):\n  {plan.advice}")
    return 0


def describe_work(plan: MemoryPlan) -> str:
    work = plan.work
    if plan.kind != "paint":
        how = "greedy or sampling" if work.beams == 1 else f"{work.beams} beams"
        return f"{work.prompt_length} tokens of prompt, {work.length} of answer, {how}, batch {work.batch}"
    size = f"{work.size} pixels" if work.size else "images of the model's size"
    return f"{size}, {work.steps} steps, {work.candidates} candidates, batch {work.batch}"


def table(plan: MemoryPlan) -> str:
    """For people, with aligned columns."""
    speed = "s/image" if plan.kind == "paint" else "tokens/s"
    rows = [["precision", "place", "weights", "KV cache", "working", "GPU peak", "RAM peak", speed, "fits"]]
    rows += [[*cells(row), "yes" if row.fits else row.problem] for row in plan.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        parts = [
            text.ljust(width) if column in (0, 1, 8) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def cells(row: MemoryRow) -> list[str]:
    from ..plain_text import size_text

    sizes = (row.weights, row.kv_cache, row.activations, row.peak_gpu, row.peak_ram)
    if row.seconds_per_image is not None:
        speed = rate(row.seconds_per_image)
    else:
        fast = f" ({rate(row.tokens_per_second_fast)} --fast)" if row.tokens_per_second_fast is not None else ""
        speed = f"{rate(row.tokens_per_second)}{fast}"
    return [row.precision, row.placement, *(size_text(size) if size else "-" for size in sizes), speed]


def as_dict(plan: MemoryPlan) -> dict:
    from dataclasses import asdict

    return {**asdict(plan), "advice": plan.advice}
