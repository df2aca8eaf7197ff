"""Ranking candidates by how well Chinese-CLIP finds that they fit their prompt."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
import torch
from transformers import ChineseCLIPModel, ChineseCLIPProcessor


DEFAULT_RANKER = "OFA-Sys/chinese-clip-vit-base-patch16"


def has_chinese(text: str) -> bool:
    """Whether any character is a Chinese one."""
    return any("\u4e00" <= character <= "\u9fff" or "\u3400" <= character <= "\u4dbf" for character in text)


@torch.no_grad()
def score_images(
    ranker: ChineseCLIPModel, processor: ChineseCLIPProcessor, prompt: str, images: Sequence[PIL.Image.Image]
) -> list[float]:
    """How well each image fits the prompt (the model's similarity logit), all in one batch."""
    config = ranker.config.text_config
    inputs = processor(
        text=[prompt],
        images=list(images),
        padding=True,
        truncation=True,
        max_length=config.max_position_embeddings,
        return_tensors="pt",
    ).to(ranker.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(ranker.dtype)
    return ranker(**inputs).logits_per_image[:, 0].float().tolist()


__all__ = ["DEFAULT_RANKER", "has_chinese", "score_images"]
