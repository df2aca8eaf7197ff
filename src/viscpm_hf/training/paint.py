"""Fine-tuning VisCPM-Paint with transformers' `Trainer` and diffusers' training tools.

Before training, prompts and pictures go through the text encoder and the VAE once, into a cache on the disk (see
`paint_encoding`); during it, only the UNet and the projection are in memory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from ..checkpoints.location import chosen_file
from ..loading.paint import find_folder, is_original_folder
from ..pipelines.pipeline_viscpm_paint import VisCPMPaintPipeline
from ..tiny.embedded import resolve_model
from ..version import OLDEST, require
from .chat import (
    DTYPES,
    EpochSetter,
    Stopper,
    TrainingResult,
    begin_run,
    check_libraries,
    check_output,
    default_precision,
    images_folder,
    run_facts,
    train,
    training_arguments,
    write_summary,
)
from .chat_dataset import MixtureSampler
from .output import written_whole
from .paint_cache import TensorCache, text_key
from .paint_config import LORA_TARGETS, PaintTrainingConfig
from .paint_data import CaptionDataset, open_part
from .paint_encoding import (
    PADDING,
    PromptProjection,
    Share,
    encode_pictures,
    encode_prompts,
    picture_cache,
    prompt_cache,
    text_pipeline,
)
from .paint_model import PaintTrainingModel
from .paint_output import save_adapter, save_pipeline
from .paint_trainer import DRAWINGS, DrawingCallback, PaintBatchShape, PaintDraws, PaintTrainer, collate


logger = logging.get_logger(__name__)

CACHE = "cache"

# What a resumed run must have in common with the one that it goes on with: all that the weights, the order, or which
# checkpoint is the best depend on. How long it lasts may change.
IDENTITY = (
    "mode", "data", "eval_data", "images", "freeze_unet", "train_projection", "lora_rank", "lora_alpha",
    "lora_targets", "image_size", "prompt_dropout", "snr_gamma", "noise_offset", "ema_decay", "learning_rate",
    "batch_size", "accumulation", "warmup", "scheduler", "optimizer", "weight_decay", "adam_beta2", "max_grad_norm",
    "precision", "seed", "revision",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PaintTrainingResult(TrainingResult):
    num_skipped: int
    """Rows that could not be used."""
    num_encoded_prompts: int
    num_encoded_images: int
    """What was not in the cache yet."""


@dataclass
class EncodedData:
    """A dataset as training sees it: captions, and where their pictures are in the cache."""

    captions: list[str]
    picture_keys: list[str]
    sizes: list[int]
    """Rows of every part."""
    weights: list[float]
    """How often each part is seen in an epoch."""
    num_skipped: int
    num_encoded: int


def train_paint(config: PaintTrainingConfig, *, callbacks: Sequence[TrainerCallback] = ()) -> PaintTrainingResult:
    """Fine-tunes Paint and writes a pipeline's folder, or an adapter for `load_lora_weights`, to `config.output`.

    Args:
        callbacks: transformers' `TrainerCallback`s.

    Raises:
        ValueError: for data or options that can't be used, or an output folder that isn't empty (unless
            `config.resume`).
        OSError: for missing files.
        ImportError: if a library of the extra `train` is missing.

    ```python
    >>> from viscpm_hf.training import PaintTrainingConfig, train_paint

    >>> config = PaintTrainingConfig(model="paint-folder", data=["captions.jsonl"], mode="lora", output="my-lora")
    >>> result = train_paint(config)
    ```
    """
    begin = time.perf_counter()
    output = Path(config.output).expanduser()
    check_libraries(config)
    arguments = training_arguments(config, output, has_eval=bool(config.eval_data))
    if arguments.process_index == 0:
        check_output(config, output)
    model = model_folder(config)
    images = images_folder(config)

    tokenizing = text_pipeline(model)
    datasets = {
        name: CaptionDataset(
            [open_part(text) for text in names],
            images,
            config.bad_rows,
            check_caption=lambda caption: tokenizing.tokenize_prompts([caption]),
        )
        for name, names in (("train", config.data), ("eval", config.eval_data))
        if names
    }
    size = config.image_size or default_size(model)
    facts = run_facts(config.model, "paint", output, len(datasets["train"]), arguments.world_size)
    checkpoint = begin_run(config, facts, arguments, output, IDENTITY)

    cache_folder = Path(config.cache).expanduser() if config.cache else output / CACHE
    prompts = prompt_cache(cache_folder, model, is_projected=not config.train_projection)
    pictures = picture_cache(cache_folder, model, size)
    share = Share(arguments.process_index, arguments.world_size)
    texts = [caption for dataset in datasets.values() for caption in dataset.captions]
    num_prompts = encode_prompts(
        [*texts, *config.validation_prompts],
        prompts,
        model,
        arguments.device,
        is_projected=not config.train_projection,
        batch_size=config.encode_batch_size,
        share=share,
    )
    data = {
        name: encode_dataset(config, dataset, pictures, model, size, arguments, share)
        for name, dataset in datasets.items()
    }
    for cache in (prompts, pictures):
        cache.reload()

    set_seed(config.seed)
    trained = make_model(config, model, prompts)
    stopper = Stopper()
    trainer = make_trainer(config, arguments, trained, model, data, prompts, pictures, callbacks, stopper)
    if config.validation_prompts:
        trainer.add_callback(
            DrawingCallback(
                trainer,
                config.validation_prompts,
                prompts,
                AutoencoderKL.from_pretrained(model / "vae").eval(),
                trained.scheduler,
                output / DRAWINGS,
                every=config.validation_steps or config.save_steps,
                size=size,
                num_inference_steps=config.inference_steps,
                guidance_scale=config.guidance,
                seed=config.seed,
            )
        )
    result = PaintTrainingResult(
        **train(trainer, stopper, checkpoint, output),
        num_skipped=sum(part.num_skipped for part in data.values()),
        num_encoded_prompts=num_prompts,
        num_encoded_images=sum(part.num_encoded for part in data.values()),
        seconds=time.perf_counter() - begin,
    )
    if arguments.should_save and not stopper.is_asked:
        save_result(trainer, config, model, output)
        write_summary(config, result)
    trainer.accelerator.wait_for_everyone()
    return result


def model_folder(config: PaintTrainingConfig) -> Path:
    """The folder of the pipeline to fine-tune.

    Raises:
        ValueError: for an original checkpoint, or a folder that holds no pipeline of ours.
    """
    if config.model is None:
        raise ValueError("Say which model to fine-tune: model (--model MODEL).")
    folder = Path(find_folder(resolve_model(chosen_file(config.model, **config.hub), "paint"), config.hub))
    if is_original_folder(folder):
        raise ValueError(
            f"{config.model} is a checkpoint in the original's format. Training reads and writes folders in "
            "diffusers' format: convert it first (viscpm-hf convert)."
        )
    missing = [name for name in ("text_encoder", "tokenizer", "unet", "vae") if not (folder / name).is_dir()]
    if missing:
        raise ValueError(f"{config.model} is no whole VisCPM-Paint pipeline: it has no {', '.join(missing)}.")
    return folder


def default_size(model: Path) -> int:
    """Side of the pictures that a pipeline draws, in pixels."""
    unet, vae = UNet2DConditionModel.load_config(model / "unet"), AutoencoderKL.load_config(model / "vae")
    return unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)


def encode_dataset(
    config: PaintTrainingConfig,
    dataset: CaptionDataset,
    pictures: TensorCache,
    model: Path,
    size: int,
    arguments: TrainingArguments,
    share: Share,
) -> EncodedData:
    """Caches a dataset's pictures and leaves out the rows of those that can't be read; all processes take part."""
    keys, num_encoded = encode_pictures(
        dataset,
        pictures,
        model,
        size,
        arguments.device,
        batch_size=config.encode_batch_size,
        share=share,
    )
    everyones = gather_object([keys]) if share.count > 1 else [keys]
    keys = [next(filter(None, row), None) for row in zip(*everyones, strict=True)]
    kept = [index for index, key in enumerate(keys) if key is not None]
    part_of_row = [part for part, size in enumerate(dataset.sizes) for _ in range(size)]
    sizes = [sum(part_of_row[index] == part for index in kept) for part in range(len(dataset.parts))]
    for part, part_size in zip(dataset.parts, sizes, strict=True):
        if not part_size:
            raise ValueError(f"{part.name}: none of its pictures can be read. {dataset.skipped.reports[0]}")
    return EncodedData(
        captions=[dataset.captions[index] for index in kept],
        picture_keys=[keys[index] for index in kept],
        sizes=sizes,
        weights=[part.weight for part in dataset.parts],
        num_skipped=dataset.skipped.total,
        num_encoded=num_encoded,
    )


def make_model(config: PaintTrainingConfig, model: Path, prompts: TensorCache) -> PaintTrainingModel:
    """UNet and projection, trained in fp32; what is frozen is in the precision of the computation."""
    precision = DTYPES[config.precision or default_precision()]
    is_whole = config.mode == "full" and not config.freeze_unet
    unet = UNet2DConditionModel.from_pretrained(model / "unet", dtype=torch.float32 if is_whole else precision)
    unet.requires_grad_(is_whole)
    if config.mode == "lora":
        add_adapter(unet, config)
    projection = None
    if config.train_projection:
        projection = PromptProjection.from_text_encoder(model / "text_encoder")
    index = VisCPMPaintPipeline.load_config(model)
    return PaintTrainingModel(
        unet,
        projection,
        DDPMScheduler.from_pretrained(model / "scheduler"),
        prompts[text_key("")],
        prompts[PADDING],
        mask_padding=index.get("mask_padding", False),
        snr_gamma=config.snr_gamma,
    )


def add_adapter(unet: UNet2DConditionModel, config: PaintTrainingConfig) -> None:
    """A LoRA on the UNet, in fp32.

    Raises:
        ValueError: if no layer has the names that are asked for.
    """
    require(peft=OLDEST["peft"])
    from peft import LoraConfig

    unet.add_adapter(
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(config.lora_targets or LORA_TARGETS),
        )
    )
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def make_trainer(
    config: PaintTrainingConfig,
    arguments: TrainingArguments,
    trained: PaintTrainingModel,
    model: Path,
    data: dict[str, EncodedData],
    prompts: TensorCache,
    pictures: TensorCache,
    callbacks: Sequence[TrainerCallback],
    stopper: Stopper,
) -> PaintTrainer:
    shape = PaintBatchShape(
        seed=str(config.seed),
        num_timesteps=trained.scheduler.config.num_train_timesteps,
        scaling_factor=AutoencoderKL.load_config(model / "vae")["scaling_factor"],
        prompt_dropout=config.prompt_dropout,
        noise_offset=config.noise_offset,
    )
    held_out = dataclasses.replace(shape, seed=f"{config.seed}/eval", prompt_dropout=0.0, noise_offset=0.0)

    def draws(name: str, draw_shape: PaintBatchShape) -> PaintDraws | None:
        part = data.get(name)
        return part and PaintDraws(part.captions, part.picture_keys, prompts, pictures, draw_shape)

    sampler = MixtureSampler(data["train"].sizes, data["train"].weights, config.seed)
    trainer = PaintTrainer(
        trained,
        arguments,
        data_collator=collate,
        train_dataset=draws("train", shape),
        eval_dataset=draws("eval", held_out),
        callbacks=[EpochSetter(sampler), stopper, *callbacks],
    )
    trainer.sampler = sampler
    trainer.remove_callback(PrinterCallback)
    if config.ema_decay:
        trainer.start_average(config.ema_decay)
    return trainer


def save_result(trainer: PaintTrainer, config: PaintTrainingConfig, model: Path, output: Path) -> None:
    """Writes the trained pipeline or adapter, of averaged weights if there are any."""
    trained: PaintTrainingModel = trainer.accelerator.unwrap_model(trainer.model)
    with trainer.averaged_weights(), written_whole(output) as folder:
        if config.mode == "lora":
            save_adapter(folder, trained.unet, trained.projection)
        else:
            save_pipeline(folder, model, None if config.freeze_unet else trained.unet, trained.projection)
