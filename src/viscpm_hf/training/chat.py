"""Fine-tuning VisCPM-Chat, or one of its siblings, with transformers' `Trainer`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..batch.results import replace_text
from ..checkpoints.adapters import ADAPTER_CONFIG
from ..evaluation.report import known_by
from ..modeling.compatibility import CHECKPOINTING
from ..modeling.modeling_viscpm_chat import VisCPMChatForConditionalGeneration
from ..modeling.modeling_vision_resampler import VisionResamplerForConditionalGeneration
from ..modeling.processing_viscpm_chat import VisCPMChatProcessor
from ..modeling.processing_vision_resampler import VisionResamplerProcessor
from ..version import OLDEST, require
from .adapters import add_adapter, record_base, select_weights
from .chat_config import REFERENCE_MIN_IMAGE_SIDE, ChatTrainingConfig
from .chat_dataset import ChatDataset, Draws, MixtureSampler, SampleLimits, SkippedRows
from .collator import ChatCollator
from .data_files import DataPart
from .muon import MUON, MUON_TORCH, muon_factory
from .options import TrainingOptions
from .output import CHECKPOINTS, MARKS, PARTIAL, last_checkpoint, written_whole


logger = logging.get_logger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SUMMARY = "training.json"

# What a resumed run must have in common with the one that it goes on with: all that the weights, the order, or which
# checkpoint is the best depend on. How long it lasts may change.
IDENTITY = (
    "mode", "data", "eval_data", "images", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "freeze_vision",
    "freeze_llm", "train_patches", "learning_rate", "batch_size", "accumulation", "warmup", "scheduler", "optimizer",
    "weight_decay", "adam_beta2", "max_grad_norm", "precision", "weights", "seed", "max_length", "group_by_length",
    "image_size", "min_image_side", "augment", "revision",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What came of a run, of either model."""

    output: Path
    steps: int
    train_loss: float | None
    """Mean over the steps of this call; None if it made none."""
    eval_loss: float | None
    """Of the model that was kept; None without evaluation data."""
    best_step: int | None
    seconds: float
    log: list[dict[str, Any]]
    """Losses, learning rates and evaluations by step, from the beginning of the run."""
    is_interrupted: bool = False
    """Stopped by a signal after writing a checkpoint: go on with `resume`. There is no result in `output` yet."""


@dataclass(frozen=True, kw_only=True)
class ChatTrainingResult(TrainingResult):
    skipped: SkippedRows
    is_main_process: bool = True
    """Of several processes that trained together, one reports."""


class ChatTrainer(Trainer):
    """`Trainer` with draws in the order of a [`MixtureSampler`]; `base` names the model that an adapter belongs to."""

    def __init__(self, model, *args, sampler: MixtureSampler, base: str | None = None, **kwargs):
        before = "use_cache" in vars(model.config)
        super().__init__(model, *args, **kwargs)
        if not before:  # the trainer's word for training, which doesn't belong into the saved configuration
            del model.config.use_cache
        self.sampler, self.base = sampler, base

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> MixtureSampler:
        return self.sampler

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        count = super()._get_num_items_in_batch(batch_samples, device)
        # A step whose every sample proved bad teaches nothing; its loss is 0, not 0 / 0.
        return count.clamp(min=1) if isinstance(count, torch.Tensor) else count

    def _save_checkpoint(self, model, trial) -> None:
        # With FSDP nothing is written yet when all processes look whether the best checkpoint's folder is there; one
        # that sees it and one that doesn't would wait for each other in the end.
        os.makedirs(
            os.path.join(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"), exist_ok=True
        )
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:  # gathered from the shards, in which tied weights have become two
            tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or {}
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and (folder / ADAPTER_CONFIG).is_file():
            record_base(folder, self.base)


class EpochSetter(TrainerCallback):
    """Tells the sampler the epoch, also where wrappers around it on resuming hide it from the trainer."""

    def __init__(self, sampler: MixtureSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int(state.epoch + 1e-6))


class Stopper(TrainerCallback):
    """The first SIGINT or SIGTERM ends the run after the step, with a checkpoint; the second one at once."""

    def __init__(self):
        self.is_asked = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_asked:
            control.should_save = control.should_training_stop = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number, frame):
            self.is_asked = True
            logger.warning("stopping after this step, with a checkpoint; once more to stop at once")
            for number, handler in before.items():
                signal.signal(number, handler)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def train_chat(
    config: ChatTrainingConfig,
    *,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    model: VisCPMChatForConditionalGeneration | VisionResamplerForConditionalGeneration | None = None,
    processor: VisCPMChatProcessor | VisionResamplerProcessor | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> ChatTrainingResult:
    """Fine-tunes Chat and writes the model, or its adapter, with the processor to `config.output`.

    Args:
        train_dataset, eval_dataset: in the place of files (`config.data`, `config.eval_data`): datasets with a length,
            whose items are [`ChatRecord`]s or rows like those of the files, pictures in memory allowed. They are asked
            for item by item as training goes on; every answered turn of an item is trained.
        model, processor: in the place of `config.model`; the model is changed in place.
        callbacks: transformers' `TrainerCallback`s.

    Raises:
        ValueError: for data or options that can't be used, or an output folder that isn't empty (unless
            `config.resume`).
        OSError: for missing files.
        ImportError: if a library of the extra `train` is missing.

    ```python
    >>> from viscpm_hf.training import ChatTrainingConfig, train_chat

    >>> config = ChatTrainingConfig(model="openbmb/VisCPM-Chat", data=["train.json"], output="my-adapter")
    >>> result = train_chat(config)
    ```
    """
    begin = time.perf_counter()
    output = Path(config.output).expanduser()
    check_libraries(config)
    arguments = training_arguments(config, output, has_eval=bool(config.eval_data) or eval_dataset is not None)
    if arguments.process_index == 0:
        check_output(config, output)
    images = images_folder(config, needs_data=train_dataset is None)
    # Before minutes of loading the model.
    train_parts = [DataPart.open(text) for text in config.data] if train_dataset is None else []
    eval_parts = [DataPart.open(text) for text in config.eval_data] if eval_dataset is None else []

    set_seed(config.seed)
    model_name = config.model if model is None else None
    if model is None:
        model, processor = load_model(config, arguments)
    elif processor is None:
        raise ValueError("A model in memory comes with its processor.")
    if config.image_size is not None:
        if isinstance(model, VisionResamplerForConditionalGeneration):
            raise ValueError("image_size is for VisCPM-Chat alone: the siblings' processors know the sizes of views.")
        model.model.vision_tower.set_image_size(config.image_size)
        processor.image_processor.size = {"height": config.image_size, "width": config.image_size}
    min_side = config.min_image_side
    if min_side is None:
        min_side = min(REFERENCE_MIN_IMAGE_SIDE, model.config.vision_config.image_size)
    limits = SampleLimits(config.max_length, min_side, config.bad_rows)

    skipped = SkippedRows()
    if train_dataset is None:
        train_dataset = ChatDataset(train_parts, processor, limits, images)
        skipped = train_dataset.skipped
    if eval_parts:
        eval_dataset = ChatDataset(eval_parts, processor, limits, images)
    if not len(train_dataset):
        raise ValueError("The training dataset is empty.")

    if config.mode == "full":
        select_weights(
            model,
            freeze_vision=config.freeze_vision,
            freeze_llm=config.freeze_llm,
            train_patches=config.train_patches,
        )
    else:
        model = add_adapter(model, config)
    stopper = Stopper()
    trainer = make_trainer(
        config, arguments, model, processor, train_dataset, eval_dataset, limits, callbacks, stopper
    )

    facts = run_facts(model_name, "chat", output, len(train_dataset), arguments.world_size)
    checkpoint = begin_run(config, facts, arguments, output, IDENTITY)
    made = train(trainer, stopper, checkpoint, output)
    if not stopper.is_asked:
        save_result(trainer, output)
    result = ChatTrainingResult(
        **made,
        skipped=skipped,
        seconds=time.perf_counter() - begin,
        is_main_process=trainer.is_world_process_zero(),
    )
    if arguments.should_save and not stopper.is_asked:
        write_summary(config, result)
    return result


def images_folder(config: TrainingOptions, needs_data: bool = True) -> Path | None:
    """Where the data's pictures are, if that is said.

    Raises:
        FileNotFoundError: if it isn't there.
        ValueError: if files of data are needed, and there are none.
    """
    images = None if config.images is None else Path(config.images).expanduser()
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"There is no images folder {config.images}.")
    if needs_data and not config.data:
        raise ValueError("There is no training data: name at least one file (--data).")
    return images


def check_libraries(config: TrainingOptions) -> None:
    from importlib.util import find_spec

    needed = ["peft"] if config.mode != "full" else []
    needed += ["tensorboard"] if config.tensorboard else []
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ImportError(f'Training so needs {" and ".join(missing)}: pip install -c constraints.txt ".[train]".')
    if config.mode != "full":
        require(peft=OLDEST["peft"])
    if config.optimizer == MUON:
        require(torch=MUON_TORCH)


def check_output(config: TrainingOptions, output: Path) -> None:
    """Raises `ValueError` if the output can't be written, or holds something that isn't asked to be gone on with."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"The output {output} exists and is no folder.")
    if not output.is_dir() or not any(output.iterdir()):
        return
    has_run = last_checkpoint(output / CHECKPOINTS) is not None
    has_model = any((output / mark).exists() for mark in MARKS)
    if config.resume:
        if has_model and not has_run:
            raise ValueError(f"{output} holds a model, but no run to go on with; choose another output.")
        return
    if has_run and not has_model:
        raise ValueError(f"{output} holds an unfinished run: go on with it (--resume), or choose another output.")
    raise ValueError(f"{output} exists and isn't an empty folder; choose another output, or --resume its run.")


def run_facts(model: str | None, kind: str, output: Path, num_samples: int, num_processes: int) -> dict[str, Any]:
    """What a resumed run must have in common with the one that it goes on with, beside its options.

    Args:
        model: None for one given in memory.
        kind: `"chat"` or `"paint"`.
    """
    # By its contents, since it may be moved; unless the run writes into its folder and so changes them.
    if model is not None and not output.resolve().is_relative_to(Path(model).resolve()):
        model = known_by(model, kind)
    return {"model": model, "samples": num_samples, "processes": num_processes}


def begin_run(
    config: TrainingOptions,
    facts: dict[str, Any],
    arguments: TrainingArguments,
    output: Path,
    identity: Sequence[str],
) -> Path | None:
    """The checkpoint to go on from; a run that begins notes its options and `facts`.

    Raises:
        ValueError: as [`check_same_run`].
    """
    checkpoint = last_checkpoint(output / CHECKPOINTS) if config.resume else None
    if checkpoint is not None:
        check_same_run(config, facts, output, identity)
    elif arguments.should_save:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / CHECKPOINTS / SUMMARY, {"config": config.recorded(), "facts": facts})
    return checkpoint


def check_same_run(config: TrainingOptions, facts: dict[str, Any], output: Path, identity: Sequence[str]) -> None:
    """Raises `ValueError` if the run to resume had other options or facts that its weights or its order depend on."""
    try:
        known = json.loads((output / CHECKPOINTS / SUMMARY).read_text("utf-8"))
        before = {**known["config"], **known["facts"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{output} can't be resumed: the options of its run are missing ({error}).") from error
    now = {**config.recorded(), **facts}
    changed = [
        f"{name}: {before.get(name)} then, {now[name]} now"
        for name in (*identity, *facts)
        if before.get(name) != now[name]
    ]
    if changed:
        raise ValueError(f"{output} is another run ({'; '.join(changed)}), so it can't be resumed with these options.")


def training_arguments(config: TrainingOptions, output: Path, *, has_eval: bool) -> TrainingArguments:
    """`config` in the `Trainer`'s words."""
    precision = config.precision or default_precision()
    eval_steps = config.eval_steps or config.save_steps
    save_steps = config.save_steps or (eval_steps if has_eval else None)
    keeps_best = has_eval and config.keep_best
    strategy = {True: "steps", False: "epoch"}
    workers = config.workers if config.workers is not None else (2 if torch.cuda.is_available() else 0)
    return TrainingArguments(
        output_dir=os.fspath(output / CHECKPOINTS),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size or config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.peak_learning_rate,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup,
        optim="adamw_torch" if config.optimizer == MUON else config.optimizer,
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        bf16=precision == "bf16",
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused there
        fp16=precision == "fp16",
        **{
            CHECKPOINTING: config.gradient_checkpointing,
            f"{CHECKPOINTING}_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        },
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # a loss that broke is to be seen
        save_strategy=strategy[save_steps is not None],
        save_steps=save_steps or 500,
        save_total_limit=config.save_total_limit,
        eval_strategy=strategy[eval_steps is not None] if has_eval else "no",
        eval_steps=eval_steps,
        load_best_model_at_end=keeps_best,
        metric_for_best_model="loss" if keeps_best else None,
        greater_is_better=False if keeps_best else None,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=["tensorboard"] if config.tensorboard else [],
        disable_tqdm=not sys.stderr.isatty(),
        ddp_find_unused_parameters=False,
    )


def default_precision() -> str:
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def load_model(config: ChatTrainingConfig, arguments: TrainingArguments) -> tuple[Any, Any]:
    """The model in memory, on the CPU unless it is quantised; the trainer moves or shards it."""
    from ..chat.chat import VisCPMChat

    if config.model is None:
        raise ValueError("Say which model to fine-tune: model (--model MODEL).")
    precision = config.weights or ("fp32" if config.mode == "full" else config.precision or default_precision())
    is_quantized = config.mode == "qlora"
    chat = VisCPMChat(
        config.model,
        config.llm_config,
        vision_config_path=config.vision_config,
        vocab_path=config.vocab,
        device=arguments.device if is_quantized else "cpu",
        dtype=DTYPES[precision],
        quantization="nf4" if is_quantized else None,
        **config.hub,
    )
    return chat.model, chat.processor


def make_trainer(
    config: ChatTrainingConfig,
    arguments: TrainingArguments,
    model: torch.nn.Module,
    processor: Any,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    limits: SampleLimits,
    callbacks: Sequence[TrainerCallback],
    stopper: Stopper,
) -> ChatTrainer:
    is_measured = isinstance(train_dataset, ChatDataset)
    sampler = MixtureSampler(
        train_dataset.sizes if is_measured else [len(train_dataset)],
        [part.weight for part in train_dataset.parts] if is_measured else [1.0],
        config.seed,
        lengths=train_dataset.lengths if is_measured and config.group_by_length else None,
        group_size=config.batch_size * config.accumulation * arguments.world_size,
    )
    trainer = ChatTrainer(
        model,
        arguments,
        data_collator=ChatCollator(processor, limits, needs_image=arguments.world_size > 1),
        train_dataset=Draws(train_dataset, config.seed, bad_rows=config.bad_rows, do_augment=config.augment),
        eval_dataset=Draws(eval_dataset, config.seed, bad_rows=config.bad_rows) if eval_dataset is not None else None,
        processing_class=processor,
        callbacks=[EpochSetter(sampler), stopper, *callbacks],
        sampler=sampler,
        base=config.model,
        optimizer_cls_and_kwargs=muon_factory(arguments) if config.optimizer == MUON else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def save_result(trainer: ChatTrainer, output: Path) -> None:
    """Writes the trained model or adapter; all processes take part."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    with written_whole(output) if trainer.args.should_save else contextlib.nullcontext(output / PARTIAL) as folder:
        trainer.save_model(os.fspath(folder))
        if trainer.args.should_save:
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle, and of no use to anyone
    trainer.accelerator.wait_for_everyone()


def train(trainer: Trainer, stopper: Stopper, checkpoint: Path | None, output: Path) -> dict[str, Any]:
    """Trains, and says what came of it in the fields of a [`TrainingResult`]."""
    first_step = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    # Ranks that are told at different times would wait for each other forever.
    can_stop = trainer.args.world_size == 1 and threading.current_thread() is threading.main_thread()
    with stopper.listening() if can_stop else contextlib.nullcontext():
        outcome = trainer.train(resume_from_checkpoint=os.fspath(checkpoint) if checkpoint is not None else None)
    return {
        "output": output,
        "steps": trainer.state.global_step,
        "train_loss": outcome.training_loss if outcome.global_step > first_step else None,
        "eval_loss": kept_eval_loss(trainer),
        "best_step": trainer.state.best_global_step,
        "log": list(trainer.state.log_history),
        "is_interrupted": stopper.is_asked,
    }


def kept_eval_loss(trainer: ChatTrainer) -> float | None:
    if trainer.args.load_best_model_at_end and trainer.state.best_metric is not None:
        return trainer.state.best_metric
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return losses[-1] if losses else None


def write_summary(config: TrainingOptions, result: TrainingResult) -> None:
    outcome = dataclasses.asdict(result) | {"output": os.fspath(result.output)}
    write_json(result.output / SUMMARY, {"config": config.recorded(), "result": outcome})


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
