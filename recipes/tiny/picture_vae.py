"""The VAE of `viscpm-tiny` Paint: 64 × 64 pixels to 4 × 8 × 8 latents, trained on the demo world's pictures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


CHANNELS = (8, 16, 32, 64)
CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * len(CHANNELS),
    "up_block_types": ["UpDecoderBlock2D"] * len(CHANNELS),
    "block_out_channels": list(CHANNELS),
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 64,
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
}
BATCH_SIZE, LEARNING_RATE, WARMUP = 8, 1e-3, 50
KL_WEIGHT = 1e-4


def make_vae() -> AutoencoderKL:
    """An untrained one, that begins as a chain of orthogonal maps: every residual branch adds nothing yet."""
    vae = AutoencoderKL(**CONFIG)
    for name, module in vae.named_modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
        if isinstance(module, nn.Conv2d) and ("resnets" not in name or "conv_shortcut" in name):
            nn.init.orthogonal_(module.weight)
    return vae


def train_vae(pictures: Sequence[PIL.Image.Image], steps: int, seed: int) -> tuple[AutoencoderKL, list[dict]]:
    """A trained VAE whose scaling factor gives latents of unit variance, and the losses on the way."""
    torch.manual_seed(seed)
    vae = make_vae()
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps))
    log, losses, begin = [], [], time.process_time()
    for step in range(1, steps + 1):
        batch = pixels[torch.randint(len(pixels), (BATCH_SIZE,))].float() / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        loss = (decoded.float() - batch).abs().mean()
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        (loss + KL_WEIGHT * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 250 == 0 or step == steps:
            log.append({"step": step, "loss": sum(losses) / len(losses), "seconds": time.process_time() - begin})
            print(f"VAE step {step}/{steps}  loss {log[-1]['loss']:.4f}  {log[-1]['seconds']:.0f} s", flush=True)
            losses = []
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(pixels[:512].float() / 127.5 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae, log


def learning_rate(step: int, steps: int) -> float:
    """Constant in the first half, then down to nothing along a cosine."""
    progress = max(0.0, 2 * step / steps - 1)
    return min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * progress)) + 0.01
