"""One dataclass, three ways to fill it: Python, the command line, a YAML file. Its fields are the options."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar


Config = TypeVar("Config")

BAD_ROWS = ("skip", "fail")
PRECISIONS = ("bf16", "fp16", "fp32")


def option(default: Any = dataclasses.MISSING, help: str = "", **metadata) -> Any:
    """A field with its help, "english / 中文", and what argparse may be told (`choices`, `metavar`)."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass(kw_only=True)
class HubOptions:
    """Where a model of the Hub comes from, as fields of a dataclass."""

    revision: str | None = option(None, "branch, tag or commit of MODEL's Hub repository / Hub 版本")
    token: str | None = option(None, "of the Hub; others see it here, but not in HF_TOKEN / Hub 令牌")
    cache_dir: str | None = option(None, "for what the Hub sends / Hub 缓存目录", metavar="FOLDER")

    @property
    def hub(self) -> dict[str, str]:
        """Those that are given.

        Raises:
            ValueError: if there are some, and the model is here.
        """
        from ..checkpoints.location import hub_arguments_for

        return hub_arguments_for(self.model, revision=self.revision, token=self.token, cache_dir=self.cache_dir)

    def recorded(self) -> dict[str, Any]:
        """All options but the secret one."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "token"}


@dataclasses.dataclass(kw_only=True)
class TrainingOptions(HubOptions):
    """The options that the training of both models has."""

    adapter_learning_rate: typing.ClassVar[float]

    images: str | None = option(None, "where the data's pictures lie (beside the data) / 图片文件夹", metavar="DIR")
    lora_rank: int = option(16, "rank of the adapter (16) / LoRA 秩")
    epochs: float = option(5.0, "passes over the data (5) / 训练轮数")
    max_steps: int | None = option(None, "stop after so many steps instead / 最大步数")
    eval_batch_size: int | None = option(None, "(as batch-size) / 验证批大小")
    accumulation: int = option(1, "steps whose gradients are summed (1) / 梯度累积")
    warmup: float = option(0.03, "steps, or below 1 their share (0.03) / 预热步数或比例")
    scheduler: str = option("cosine", "of the learning rate, transformers' names (cosine) / 学习率调度")
    weight_decay: float = option(0.01, "(0.01) / 权重衰减")
    max_grad_norm: float = option(1.0, "clips gradients; 0 does not (1) / 梯度裁剪")
    precision: str | None = option(
        None, "of the computation (bf16 on a GPU, else fp32) / 计算精度", choices=PRECISIONS
    )
    gradient_checkpointing: bool = option(False, "saves memory, costs a third more time / 梯度检查点")
    bad_rows: str = option("skip", "rows that can't be used: report and skip, or fail / 坏数据处理", choices=BAD_ROWS)
    save_steps: int | None = option(None, "between checkpoints (an epoch) / 保存间隔")
    eval_steps: int | None = option(None, "between evaluations (as save-steps) / 验证间隔")
    log_steps: int = option(10, "between reports of the loss (10) / 日志间隔")
    save_total_limit: int = option(2, "checkpoints kept, the best one included (2) / 保留检查点数")
    keep_best: bool = option(True, "with eval-data: the best checkpoint is the result / 保留最佳检查点")
    resume: bool = option(False, "go on from OUT's last checkpoint, if there is one / 断点续训")
    tensorboard: bool = option(True, "write OUT/checkpoints/runs / TensorBoard 日志")

    def _check(self) -> None:
        """Brings every field to its type; see [`check_types`]."""
        if self.output is None:
            raise ValueError("Say where the result goes: output (--output OUT).")
        check_types(self)
        self._check_at_least("epochs", 1e-9)
        for name in (
            "lora_rank", "lora_alpha", "max_steps", "batch_size", "eval_batch_size", "accumulation", "image_size",
            "save_steps", "eval_steps", "log_steps", "save_total_limit",
        ):  # fmt: skip
            self._check_at_least(name, 1)
        for name in ("learning_rate", "warmup", "weight_decay", "max_grad_norm", "workers", "seed"):
            self._check_at_least(name, 0)
        if self.save_steps and self.eval_steps and self.eval_data and self.save_steps % self.eval_steps:
            raise ValueError(
                f"save_steps {self.save_steps} must be a multiple of eval_steps {self.eval_steps}: a checkpoint is "
                "kept by what it was evaluated at."
            )

    def _check_at_least(self, name: str, least: float) -> None:
        value = getattr(self, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} must be at least {least:g}, got {value:g}.")

    def _check_shares(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}.")

    @property
    def peak_learning_rate(self) -> float:
        """As the reference's for all weights; an adapter starts from nothing and takes larger steps."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-5 if self.mode == "full" else self.adapter_learning_rate


def _value_type(annotation: Any) -> tuple[type, bool]:
    """The type of one value, and whether there may be several."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def add_config_options(parser: argparse._ActionsContainer, config_class: type) -> None:
    """Adds an option for every field, those of the class itself first; only given ones end up among the arguments
    (see [`config_from_arguments`])."""
    hints, own = typing.get_type_hints(config_class), config_class.__annotations__
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name not in own):
        kind, is_list = _value_type(hints[field.name])
        settings: dict[str, Any] = {"default": argparse.SUPPRESS}
        settings |= {name: value for name, value in field.metadata.items() if name != "help"}
        settings["help"] = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = kind
            if "choices" not in settings:
                settings.setdefault("metavar", kind.__name__.upper())
            if is_list:
                settings["action"] = "append"
        parser.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, **settings)


def config_from_arguments(config_class: type[Config], arguments: argparse.Namespace) -> Config:
    """The options given, over those of the YAML file `arguments.config`, over the defaults."""
    names = {field.name for field in dataclasses.fields(config_class)}
    values = read_yaml(arguments.config, config_class) if arguments.config is not None else {}
    values |= {name: value for name, value in vars(arguments).items() if name in names}
    return config_class(**values)


def read_yaml(path: str | os.PathLike, config_class: type) -> dict[str, Any]:
    """The fields that a YAML file sets.

    Raises:
        ValueError: if the file is no mapping of option names to values of their types.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} should hold `option: value` lines, but is a {type(content).__name__}.")
    hints = typing.get_type_hints(config_class)
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            nearest = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" Options are: {', '.join(sorted(hints))}."
            raise ValueError(f"{path} has the unknown option {str(key)!r}.{hint}")
        values[name] = checked_value(name, value, hints[name], f"{path}: ")
    return values


def checked_value(name: str, value: Any, annotation: Any, where: str = "") -> Any:
    """`value` if it is of the field's type; a number in words (YAML reads `1e-5` as a string) becomes one."""
    kind, is_list = _value_type(annotation)
    is_optional = type(None) in typing.get_args(annotation)
    if value is None and is_optional:
        return None
    if is_list:
        values = value if isinstance(value, (list, tuple)) else [value]
        return [checked_value(name, entry, kind, where) for entry in values]
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}{name} must be of type {kind.__name__}, got {value!r}.")
    return value


def check_types(config: Any) -> None:
    """Brings every field to its type; a `__post_init__` of such a dataclass calls it first.

    Raises:
        ValueError: for a value of another type, or one that is not among the choices.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = checked_value(field.name, getattr(config, field.name), hints[field.name])
        choices = field.metadata.get("choices")
        if choices is not None and value is not None and value not in choices:
            raise ValueError(f"{field.name} is one of {', '.join(map(str, choices))}, got {value!r}.")
        setattr(config, field.name, value)
