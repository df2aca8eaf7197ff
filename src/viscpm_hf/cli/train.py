"""`viscpm-hf train`: fine-tuning Chat and Paint, and merging adapters."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..names import full_dtype_name
from ..training.chat_config import ChatTrainingConfig
from ..training.options import add_config_options, config_from_arguments
from . import train_paint
from .errors import EXIT_INTERRUPTED
from .model_options import add_hub_options, hub_options
from .words import count


if TYPE_CHECKING:
    from ..training.chat import ChatTrainingResult


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "train",
        examples=(
            "viscpm-hf train chat --model viscpm-tiny --data examples/train_data.jsonl --output adapter",
            "viscpm-hf train merge --model viscpm-tiny --adapter adapter OUT",
        ),
        help="fine-tune a model, merge an adapter / 微调模型、合并适配器",
        description="Fine-tune Chat or Paint on your own data, or merge an adapter into its model. / "
        "用自己的数据微调 Chat 或 Paint，或把适配器合并进模型。",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    _add_chat(kinds)
    train_paint.add_parser(kinds)
    _add_merge(kinds)


def _add_chat(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "chat",
        examples=(
            "viscpm-hf train chat --model viscpm-tiny --data examples/train_data.jsonl --output adapter",
            "viscpm-hf train chat --config examples/train.yaml --qlora",
        ),
        rare=f"{train_paint.RARE_IN_TRAINING} --lora-alpha --lora-dropout --lora-targets --freeze-llm --train-patches "
        "--weights --group-by-length --min-image-side --augment",
        help="fine-tune Chat / 微调 Chat",
        description="Fine-tune Chat on conversations about pictures. Several GPUs: accelerate launch -m viscpm_hf.cli "
        "train chat ... / 用图文对话微调 Chat；多卡训练用 accelerate launch 启动。",
    )
    parser.add_argument("--config", metavar="YAML", help="these options in a file; given ones go first / 配置文件")
    mode = parser.add_mutually_exclusive_group()
    for name in ("lora", "qlora", "full"):
        mode.add_argument(
            f"--{name}", dest="mode", action="store_const", const=name, default=argparse.SUPPRESS,
            help=f"--mode {name}",
        )  # fmt: skip
    add_config_options(parser, ChatTrainingConfig)
    parser.set_defaults(run=run_chat)


def _add_merge(kinds: argparse._SubParsersAction) -> None:
    parser = kinds.add_parser(
        "merge",
        examples=(
            "viscpm-hf train merge --model viscpm-tiny --adapter adapter OUT",
            "viscpm-hf train merge --model pytorch_model.bin --adapter adapter OUT --dtype bfloat16",
        ),
        help="merge an adapter into its model / 合并适配器",
        description="Write a Chat model with an adapter's changes in its weights. / 把适配器合并进 Chat 模型的权重。",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="that it was trained on / 基座模型")
    parser.add_argument("--adapter", required=True, metavar="DIR", help="what training left / 适配器文件夹")
    parser.add_argument("output", metavar="OUT", help="new folder; complete or not there at all / 输出文件夹")
    parser.add_argument(
        "--dtype", type=full_dtype_name, choices=("float32", "bfloat16", "float16"), help="of OUT (as stored) / 精度"
    )
    parser.add_argument("--llm-config", metavar="JSON", help="original file: language model / 语言模型配置")
    parser.add_argument("--vision-config", metavar="JSON", help="original file: vision tower / 视觉编码器配置")
    parser.add_argument("--vocab", metavar="TXT", help="vocab.txt, if not beside the model / 词表")
    add_hub_options(parser)
    parser.set_defaults(run=run_merge)


def run_chat(arguments: argparse.Namespace) -> int:
    config = config_from_arguments(ChatTrainingConfig, arguments)
    from ..training.chat import train_chat
    from ..training.reporting import Reporter

    result = train_chat(config, callbacks=[Reporter(lambda line: print(line, flush=True))])
    if result.is_main_process:
        print(describe(result))
    return EXIT_INTERRUPTED if result.is_interrupted else 0


def run_merge(arguments: argparse.Namespace) -> int:
    from ..training.adapters import merge_adapter

    options = {name: getattr(arguments, name) for name in ("dtype", "llm_config", "vision_config", "vocab")}
    options |= hub_options(arguments)
    print(f"wrote {merge_adapter(arguments.model, arguments.adapter, arguments.output, **options)}")
    return 0


def describe(result: ChatTrainingResult) -> str:
    """For people."""
    lines = []
    if result.skipped.total:
        lines.append(f"not trained: {result.skipped}")
    if result.is_interrupted:
        lines.append(f"stopped after step {result.steps}; the same command with --resume goes on from there")
        return "\n".join(lines)
    if result.eval_loss is not None:
        best = f", best at step {result.best_step}" if result.best_step is not None else ""
        lines.append(f"loss on held-out data {result.eval_loss:.4f}{best}")
    return "\n".join([*lines, f"wrote {result.output}: {count(result.steps, 'step')}, {result.seconds:.1f} s"])
