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
    "--mode --max-steps --accumulation --eval-batch-size --warmup --scheduler --optimizer --weight-decay --adam-beta2 "
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
    """Adds every field of a configuration, a file of them, and its modes by their names."""
    parser.add_argument("--config", metavar="YAML", help="these options in a file; given ones go first / 配置文件")
    what = config_class.__dataclass_fields__["mode"].metadata["help"]
    parser.add_argument(*(f"--{name}" for name in modes), action=_Mode, nargs=0, dest="mode", help=what)
    add_config_options(parser, config_class)


class _Mode(argparse.Action):
    """`--full` for `--mode full`."""

    def __init__(self, option_strings, dest, **settings):
        super().__init__(option_strings, dest, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser, namespace, values, option_string=None):
        name = option_string.removeprefix("--")
        given = getattr(namespace, self.dest, name)
        if given != name:
            raise argparse.ArgumentError(self, f"there is one mode, {given} or {name}")
        setattr(namespace, self.dest, name)


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
