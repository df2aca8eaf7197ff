"""What is trained when Paint is: the UNet, whole or by an adapter, and the projection of the prompts before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import nn

from ..pipelines.pipeline_viscpm_paint import token_mask
from .paint_encoding import PromptProjection


class PaintTrainingModel(nn.Module):
    """UNet and, if it is trained, projection; returns the loss of a batch.

    A prompt that is dropped becomes what inference uses for guidance: the empty prompt, padded to the length of the
    prompt it is paired with by rows of padding, which the UNet does see (unless the pipeline hides them).

    Args:
        unet: whole, or with an adapter.
        projection: None if `prompt_states` are the UNet's input already.
        scheduler: of the noise.
        empty_prompt: states `(length, width)` of the empty prompt.
        padding: state `(width,)` of padding.
        mask_padding: whether the pipeline hides padding from the UNet.
        snr_gamma: of the [min-SNR weighting](https://huggingface.co/papers/2303.09556); 0 weights all steps alike.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        projection: PromptProjection | None,
        scheduler: DDPMScheduler,
        empty_prompt: torch.Tensor,
        padding: torch.Tensor,
        *,
        mask_padding: bool = False,
        snr_gamma: float = 0.0,
    ):
        super().__init__()
        self.unet, self.projection, self.scheduler = unet, projection, scheduler
        self.mask_padding, self.snr_gamma = mask_padding, snr_gamma
        self.register_buffer("empty_prompt", empty_prompt.float(), persistent=False)
        self.register_buffer("padding", padding.float(), persistent=False)

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """For the trainer, whose options are for transformers' models: diffusers' choose the way themselves."""
        self.unet.enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.23

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def forward(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_states: torch.Tensor,
        prompt_mask: torch.Tensor,
        is_dropped: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            latents, noise: `(batch, channels, height, width)`.
            timesteps: `(batch,)`.
            prompt_states: `(batch, sequence, width)`, zeros behind each prompt's end.
            prompt_mask: bool `(batch, sequence)`, the prompts' own places.
            is_dropped: bool `(batch,)`, whose prompt the empty one replaces.
        """
        embeds = self.prompt_embeds(prompt_states, prompt_mask, is_dropped)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        prediction = self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=embeds,
            encoder_attention_mask=token_mask(embeds),
            return_dict=False,
        )[0]
        losses = F.mse_loss(prediction.float(), self.target(latents, noise, timesteps).float(), reduction="none")
        losses = losses.flatten(1).mean(1)
        if self.snr_gamma:
            losses = losses * self.weights(timesteps)
        return {"loss": losses.mean()}

    def prompt_embeds(self, states: torch.Tensor, mask: torch.Tensor, is_dropped: torch.Tensor) -> torch.Tensor:
        """What the UNet attends to, with the dropped prompts replaced; it doesn't see zeros, as in the pipeline."""
        length = states.shape[1]
        empty = torch.cat([self.empty_prompt, self.padding.expand(max(0, length - len(self.empty_prompt)), -1)])
        row = is_dropped[:, None]
        states = torch.where((row & mask)[..., None], empty[:length], states)
        if self.mask_padding:
            is_padding = torch.arange(length, device=mask.device) >= len(self.empty_prompt)
            mask = mask & ~(row & is_padding)
        embeds = states if self.projection is None else self.projection(states)
        return embeds * mask[..., None]

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        return latents if kind == "sample" else self.scheduler.get_velocity(latents, noise, timesteps)

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Min-SNR weights `(batch,)` in the terms of what is predicted."""
        snr = compute_snr(self.scheduler, timesteps)
        clipped = snr.clamp(max=self.snr_gamma)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return clipped / snr
        return clipped if kind == "sample" else clipped / (snr + 1)
