"""`viscpm-hf merge`: changes to base models, and the bases, as one model."""

from __future__ import annotations

import argparse
import sys

from ..names import full_dtype_name
from .convert import add_writing_options, describe
from .model_options import HUB_OPTIONS, add_hub_options


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "merge",
        examples=(
            "viscpm-hf merge visualcla --text-model alpaca --vision-model clip --lora-model lora OUT",
            "viscpm-hf merge visualcla --lora-model lora OUT --to text-generation-webui",
        ),
        help="merge VisualCLA's adapter with its bases / 合并 VisualCLA 的 LoRA 与基座模型",
        description="Merge a released adapter with the models that it changes. / 把发布的 LoRA 与其基座模型合并。",
    )
    systems = parser.add_subparsers(dest="system", metavar="SYSTEM", required=True)
    visualcla = systems.add_parser(
        "visualcla",
        examples=(
            "viscpm-hf merge visualcla --text-model alpaca --vision-model clip --lora-model lora OUT",
            "viscpm-hf merge visualcla --lora-model lora OUT --to text-generation-webui",
        ),
        help="VisualCLA-7B",
        description="Merge VisualCLA's adapter with Chinese-Alpaca-Plus-7B and CLIP-L/14, matrix by matrix in little "
        "memory; or split it for text-generation-webui. / 逐矩阵合并 VisualCLA 的 LoRA、Chinese-Alpaca-Plus-7B 与 "
        "CLIP-L/14，占用内存很小；或拆分为 text-generation-webui 所需的格式。",
    )
    visualcla.add_argument("output", metavar="OUT", help="new folder; complete or not there at all / 输出文件夹")
    visualcla.add_argument("--text-model", metavar="DIR", help="Chinese-Alpaca-Plus-7B, folder or Hub id / 语言模型")
    visualcla.add_argument("--vision-model", metavar="DIR", help="CLIP-L/14, folder or Hub id / 视觉编码器")
    visualcla.add_argument(
        "--lora-model",
        metavar="DIR[,DIR]",
        required=True,
        help="the released adapter; several one after the other / LoRA，多个以逗号分隔，依次合并",
    )
    visualcla.add_argument(
        "--to",
        choices=("huggingface", "text-generation-webui"),
        default="huggingface",
        help="one model, or the adapter in two halves (no bases needed) / 目标格式",
    )
    visualcla.add_argument(
        "--dtype",
        type=full_dtype_name,
        choices=("float16", "bfloat16", "float32"),
        default="float16",
        help="of OUT (float16) / 精度",
    )
    add_writing_options(visualcla)
    add_hub_options(visualcla, "the adapter")
    visualcla.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if arguments.to == "text-generation-webui":
        return _split(arguments)
    from ..conversion.visualcla_merge import merge_visualcla

    options = ("dtype", "max_shard_size", "dry_run", "resume", "verify", "overwrite")
    result = merge_visualcla(
        arguments.text_model,
        arguments.vision_model,
        arguments.lora_model,
        arguments.output,
        **{name: getattr(arguments, name) for name in (*options, *HUB_OPTIONS)},
        show_progress=sys.stderr.isatty(),
    )
    print(describe(result))
    return 0


# What the split for text-generation-webui doesn't have.
NOT_SPLIT = ("text_model", "vision_model", "dry_run", "resume", "verify", "overwrite")


def _split(arguments: argparse.Namespace) -> int:
    wrong = [f"--{name.replace('_', '-')}" for name in NOT_SPLIT if getattr(arguments, name)]
    if wrong:
        raise ValueError(f"The split for text-generation-webui takes the adapter alone: leave out {', '.join(wrong)}.")
    from ..conversion.visualcla_split import split_visualcla

    hub = {name: getattr(arguments, name) for name in HUB_OPTIONS}
    for folder in split_visualcla(arguments.lora_model, arguments.output, **hub):
        print(f"wrote {folder}")
    return 0
