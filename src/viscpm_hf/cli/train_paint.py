"""`viscpm-hf train paint`: fine-tuning Paint."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..training.options import add_config_options, config_from_arguments
from ..training.paint_config import MODES, PaintTrainingConfig
from .errors import EXIT_INTERRUPTED
from .words import count


if TYPE_CHECKING:
    from ..training.chat import TrainingResult
    from ..training.paint import PaintTrainingResult


# Of both kinds of training, see `parsing.Parser`.
RARE_IN_TRAINING = (
    "--mode --max-steps --eval-batch-size --warmup --scheduler --optimizer --weight-decay --adam-beta2 "
    "--max-grad-norm --gradient-checkpointing --seed --bad-rows --workers --save-steps --eval-steps --log-steps "
    "--save-total-limit --keep-best --tensorboard"
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "paint",
        examples=(
            "viscpm-hf train paint --model viscpm-tiny --data captions.jsonl --output trained",
            "viscpm-hf train paint --model openbmb/VisCPM-Paint --data captions.jsonl --output trained --lora",
        ),
        rare=f"{RARE_IN_TRAINING} --cache --freeze-unet --lora-alpha --lora-targets --snr-gamma --noise-offset "
        "--ema-decay --encode-batch-size --validation-steps --inference-steps --guidance",
        help="fine-tune Paint / 微调 Paint",
        description="Fine-tune Paint on pictures with captions; the language model stays as it is. Several GPUs: "
        "accelerate launch -m viscpm_hf.cli train paint ... / "
        "用带文字说明的图片微调 Paint，语言模型保持不变；多卡训练用 accelerate launch 启动。",
    )
    add_training_options(parser, PaintTrainingConfig, MODES)
    parser.set_defaults(run=run)


def add_training_options(parser: argparse.ArgumentParser, config_class: type, modes: tuple[str, ...]) -> None:
    parser.add_argument("--config", metavar="YAML", help="these options in a file; given ones go first / 配置文件")
    mode = parser.add_mutually_exclusive_group()
    for name in modes:
        mode.add_argument(
            f"--{name}", dest="mode", action="store_const", const=name, default=argparse.SUPPRESS,
            help=f"--mode {name}",
        )  # fmt: skip
    add_config_options(parser, config_class)


def run(arguments: argparse.Namespace) -> int:
    config = config_from_arguments(PaintTrainingConfig, arguments)
    from ..training.paint import train_paint
    from ..training.reporting import Reporter

    result = train_paint(config, callbacks=[Reporter(lambda line: print(line, flush=True))])
    print(describe(result))
    return EXIT_INTERRUPTED if result.is_interrupted else 0


def describe(result: PaintTrainingResult) -> str:
    """For people."""
    lines = [f"{result.num_encoded_prompts} prompts and {result.num_encoded_images} pictures encoded anew"]
    if result.num_skipped:
        lines.append(f"not trained: {result.num_skipped} bad rows")
    return "\n".join([*lines, *describe_run(result)])


def describe_run(result: TrainingResult) -> list[str]:
    """What came of a run, whichever model it was of."""
    lines = []
    if result.is_interrupted:
        lines.append(f"stopped after step {result.steps}; the same command with --resume goes on from there")
        return lines
    if result.eval_loss is not None:
        best = f", best at step {result.best_step}" if result.best_step is not None else ""
        lines.append(f"loss on held-out data {result.eval_loss:.4f}{best}")
    return [*lines, f"wrote {result.output}: {count(result.steps, 'step')}, {result.seconds:.1f} s"]
