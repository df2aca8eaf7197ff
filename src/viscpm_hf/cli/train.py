"""`viscpm-hf train`: fine-tuning Chat and Paint, and merging adapters."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..names import full_dtype_name
from ..training.chat_config import MODES, ChatTrainingConfig
from ..training.options import config_from_arguments
from . import train_paint
from .errors import EXIT_INTERRUPTED
from .model_options import add_hub_options, hub_options


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
        "--weights --group-by-length --min-image-side --augment --image-size --freeze-vision",
        help="fine-tune Chat / 微调 Chat",
        description="Fine-tune Chat on conversations about pictures. Several GPUs: accelerate launch -m viscpm_hf.cli "
        "train chat ... / 用图文对话微调 Chat；多卡训练用 accelerate launch 启动。",
    )
    train_paint.add_training_options(parser, ChatTrainingConfig, MODES)
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
    lines = [f"not trained: {result.skipped}"] if result.skipped.total else []
    return "\n".join([*lines, *train_paint.describe_run(result)])
