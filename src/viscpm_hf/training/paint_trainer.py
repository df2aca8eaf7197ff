"""`Trainer` for Paint: draws of cached data, an average of the weights, drawings on the way."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL, SchedulerMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..pipelines.pipeline_viscpm_paint import VisCPMPaintPipeline
from .chat_dataset import MixtureSampler
from .paint_cache import TensorCache, text_key
from .paint_encoding import PADDING
from .paint_model import PaintTrainingModel


logger = logging.get_logger(__name__)

EMA_NAME = "ema.safetensors"
DRAWINGS = "drawings"


@dataclass(frozen=True)
class PaintBatchShape:
    """What the random part of an item depends on besides its draw number."""

    seed: str
    num_timesteps: int
    scaling_factor: float
    prompt_dropout: float = 0.0
    noise_offset: float = 0.0


class PaintDraws(Dataset):
    """Cached pictures and prompts behind draw numbers, see [`MixtureSampler`].

    All that is random about an item (latents, noise, timestep, dropped prompt) depends on nothing but its draw number:
    not on the process, the batch, or what came before. So a resumed run goes on as the uninterrupted one would.
    """

    def __init__(
        self,
        captions: Sequence[str],
        picture_keys: Sequence[str],
        prompts: TensorCache,
        pictures: TensorCache,
        shape: PaintBatchShape,
    ):
        self.captions, self.picture_keys = captions, picture_keys
        self.prompts, self.pictures, self.shape = prompts, pictures, shape

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        shape, index = self.shape, number % len(self)
        seed = random.Random(f"{shape.seed}/{number}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        moments = self.pictures[self.picture_keys[index]].float()
        latents = DiagonalGaussianDistribution(moments[None]).sample(generator)[0] * shape.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        offset = torch.randn(len(latents), 1, 1, generator=generator)
        return {
            "latents": latents,
            "noise": noise + shape.noise_offset * offset,
            "timesteps": torch.randint(shape.num_timesteps, (), generator=generator),
            "is_dropped": torch.rand((), generator=generator) < shape.prompt_dropout,
            "prompt_states": self.prompts[text_key(self.captions[index])].float(),
        }


def collate(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch; prompts are padded with zeros, and `prompt_mask` says where they are."""
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0] if name != "prompt_states"}
    states = [item["prompt_states"] for item in items]
    lengths = torch.tensor([len(row) for row in states])
    batch["prompt_states"] = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    batch["prompt_mask"] = torch.arange(int(lengths.max())) < lengths[:, None]
    return batch


class PaintTrainer(Trainer):
    """`Trainer` of a [`PaintTrainingModel`]: checkpoints hold what is trained, and the average of it if there is one.

    Evaluation and drawings use the average.
    """

    model: PaintTrainingModel
    sampler: MixtureSampler
    ema: EMAModel | None = None

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> MixtureSampler:
        return self.sampler

    def start_average(self, decay: float) -> None:
        self.ema = EMAModel(self._trained().values(), decay=decay)
        self.ema.to(self.args.device)
        self.add_callback(AverageCallback(self))

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return self.accelerator.unwrap_model(self.model).trained_parameters()

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model with the averaged weights, as long as the context lasts."""
        if self.ema is None:
            yield
            return
        self.ema.store(self._trained().values())
        self.ema.copy_to(self._trained().values())
        try:
            yield
        finally:
            self.ema.restore(self._trained().values())

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        with self.averaged_weights():
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = self._trained()
        state = {name: tensor for name, tensor in (state_dict or trained).items() if name in trained}
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, folder / SAFE_WEIGHTS_NAME)
        if self.ema is not None:
            average = dict(zip(trained, self.ema.shadow_params, strict=True))
            save_file(average, folder / EMA_NAME, {"optimization_step": str(self.ema.optimization_step)})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_average(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_average(self.state.best_model_checkpoint)

    def _load_average(self, checkpoint: str) -> None:
        if self.ema is None:
            return
        with safe_open(os.path.join(checkpoint, EMA_NAME), "pt") as file:
            self.ema.shadow_params = [file.get_tensor(name).to(self.args.device) for name in self._trained()]
            self.ema.optimization_step = int(file.metadata()["optimization_step"])

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        missing = set(load_result.missing_keys) & set(self._trained())
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"The checkpoint is of another training: it lacks {len(missing)} of the trained tensors and has "
                f"{len(load_result.unexpected_keys)} unknown ones."
            )


class AverageCallback(TrainerCallback):
    """Brings the averaged weights up to date after every step."""

    def __init__(self, trainer: PaintTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.ema.step(self.trainer._trained().values())


class DrawingCallback(TrainerCallback):
    """Draws the validation prompts every so many steps, into files and TensorBoard; same noise each time."""

    def __init__(
        self,
        trainer: PaintTrainer,
        prompts: Sequence[str],
        cache: TensorCache,
        vae: AutoencoderKL,
        scheduler: SchedulerMixin,
        folder: Path,
        *,
        every: int | None,
        size: int,
        num_inference_steps: int,
        guidance_scale: float,
        seed: int,
    ):
        self.trainer, self.prompts, self.cache, self.folder, self.every = trainer, list(prompts), cache, folder, every
        self.vae, self.scheduler, self.size = vae, scheduler, size
        self.options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self.seed = seed

    def on_step_end(self, args, state, control, **kwargs):
        if self.every is not None and state.global_step % self.every == 0:
            self.draw(state.global_step)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.every is None:
            self.draw(state.global_step)

    def draw(self, step: int) -> None:
        if not self.trainer.is_world_process_zero():
            return
        with self.trainer.averaged_weights():
            images = self.images()
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(images):
            image.save(self.folder / f"step-{step:06d}-{number}.png")
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                pixels = np.stack([np.asarray(image) for image in images])
                callback.tb_writer.add_images(DRAWINGS, pixels, step, dataformats="NHWC")

    @torch.no_grad()
    def images(self) -> list[PIL.Image.Image]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        device, was_training = self.trainer.args.device, model.training
        model.eval()
        pipeline = VisCPMPaintPipeline(
            self.vae, None, None, model.unet, self.scheduler, mask_padding=model.mask_padding
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.to(device)

        def embeds(key: str) -> torch.Tensor:
            states = self.cache[key].to(device, torch.float32)
            return states if model.projection is None else model.projection(states)

        images = []
        for number, prompt in enumerate(self.prompts):
            # As `encode_prompt` pairs them.
            pair = (embeds(text_key(prompt)), embeds(text_key("")))
            prompt_embeds, negative_prompt_embeds = pipeline._pad_pairs([pair], embeds(PADDING))
            images += pipeline(
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                height=self.size,
                width=self.size,
                generator=torch.Generator().manual_seed(self.seed + number),
                **self.options,
            ).images
        pipeline.vae.to("cpu")
        model.train(was_training)
        return images
