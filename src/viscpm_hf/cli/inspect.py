"""`viscpm-hf inspect`: what a checkpoint is."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from ..quiet import uncollected
from ..tiny.embedded import EMBEDDED_NAME, KINDS, tiny
from .model_options import add_hub_options, hub_options


if TYPE_CHECKING:
    from ..conversion.inspect import Inspection


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "inspect",
        examples=("viscpm-hf inspect viscpm-tiny", "viscpm-hf inspect pytorch_model.bin --json"),
        help="say what a checkpoint is / 查看检查点",
        description="Say what a checkpoint is, from names and shapes; no weight is read. / "
        "根据名称与形状说明检查点的内容，不读取权重。",
    )
    parser.add_argument("path", metavar="PATH", help="file, folder, Hub id, adapter, viscpm-tiny / 文件、文件夹或名称")
    parser.add_argument("--llm-config", metavar="JSON", help="the language model's configuration / 语言模型配置")
    parser.add_argument("--vision-config", metavar="JSON", help="the vision tower's sizes / 视觉编码器配置")
    add_hub_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a model / 输出 JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from ..conversion.inspect import inspect
    from ..conversion.inspection import as_dict

    paths = [tiny(kind) for kind in KINDS] if arguments.path == EMBEDDED_NAME else [arguments.path]
    options = {"llm_config": arguments.llm_config, "vision_config": arguments.vision_config}
    with uncollected():  # of Paint's UNet diffusers imports as much again
        found = [inspect(path, **options, **hub_options(arguments, arguments.path)) for path in paths]
    for inspection in found:
        print(json.dumps(as_dict(inspection), ensure_ascii=False) if arguments.json else describe(inspection))
    return 0 if all(inspection.is_complete for inspection in found) else 1


def describe(inspection: Inspection) -> str:
    """For people."""
    from ..conversion.inspect import KINDS
    from ..plain_text import size_text

    system = inspection.system or KINDS.get(inspection.kind, "unknown")
    lines = [f"{inspection.source}: {system}, {inspection.layout}"]

    def row(title: str, text: str) -> None:
        if text:
            lines.append(f"  {title:<12}{text}")

    row("files", _many([f"{name} ({size_text(size)})" for name, size in inspection.files.items()]))
    if inspection.num_parameters:
        parts = ", ".join(f"{part} {_billions(count)}" for part, count in inspection.parameters.items())
        row("parameters", f"{_billions(inspection.num_parameters)} ({parts})")
        row("dtype", " + ".join(inspection.dtypes))
        row("sharded", "yes" if inspection.is_sharded else "no")
    row("quantised", inspection.quantization or "")
    row("sizes", ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in inspection.sizes.items()))
    row("memory", ", ".join(f"{name} {size_text(size)}" for name, size in inspection.memory_bytes.items()))
    row("licence", inspection.licence)
    row("missing", _many(inspection.missing))
    row("surplus", _many(inspection.surplus))
    row("problems", "; ".join(inspection.problems))
    if inspection.alternatives:
        row("choose one", "these files are alternatives, not shards")
    row("next", inspection.next_command)
    return "\n".join(lines)


def _many(names: list[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _billions(count: int) -> str:
    if count < 10_000:
        return f"{count:,}"
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"
