"""A tiny VisCPM-Paint out of the golden data's sizes and vocabulary, with fresh random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import PreTrainedModel

from viscpm_hf import CpmBeeTokenizer, VisCPMPaintTextEncoder
from viscpm_hf.checkpoints.original import text_encoder_config
from viscpm_hf.pipelines.pipeline_viscpm_paint import REFERENCE_SCHEDULER_CONFIG


PAINT = Path(__file__).parent / "golden" / "paint_a"
CASES: list[dict[str, Any]] = json.loads((PAINT / "expected.json").read_text("utf-8"))
CONFIGS: dict[str, dict[str, Any]] = json.loads((PAINT / "diffusion.json").read_text("utf-8"))


def add_adapter(model: PreTrainedModel, config: LoraConfig, name: str) -> None:
    """Adds an adapter to a model of transformers, or skips the test where that asks for a newer peft."""
    try:
        model.add_adapter(config, name)
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))


def expected() -> dict[str, torch.Tensor]:
    return load_file(PAINT / "expected.safetensors")


def drawn(painter: Any, case: int) -> list[Any]:
    """What a painter makes of a recorded case: its images."""
    arguments = CASES[case]
    return painter.generate_all(
        arguments["prompt"],
        arguments["negative_prompt"],
        generator=torch.Generator().manual_seed(arguments["generator_seed"]),
        latents=expected()[f"{case}.latents"],
        **arguments["kwargs"],
    ).images


def components(seed: int = 0, **llm_sizes: int) -> dict[str, Any]:
    """All required components, as a pipeline takes them; `llm_sizes` are CPM-Bee's in place of the golden data's."""
    torch.manual_seed(seed)
    llm = json.loads((PAINT / "cpm-bee.json").read_text("utf-8"))
    config = text_encoder_config(
        {**llm, **llm_sizes, "unet_cross_attention_dim": CONFIGS["unet"]["cross_attention_dim"]}
    )
    config.initializer_range = 0.2  # or all prompts look much the same
    return {
        "vae": AutoencoderKL(**CONFIGS["vae"]).eval(),
        "text_encoder": VisCPMPaintTextEncoder(config).eval(),
        "tokenizer": CpmBeeTokenizer(str(PAINT / "vocab.txt")),
        "unet": UNet2DConditionModel(**CONFIGS["unet"]).eval(),
        "scheduler": DDPMScheduler(**REFERENCE_SCHEDULER_CONFIG),
    }


# ------------------------------------------------------------------------------------------------------ optional parts


def safety_checker(is_strict: bool) -> dict[str, Any]:
    """A random safety checker that flags everything or nothing, and its image processor."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    config = CLIPConfig(
        vision_config={
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 8,
        },
        text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=8,
    )  # fmt: skip
    checker = StableDiffusionSafetyChecker(config).eval()
    # A cosine is above -2 always and above 2 never.
    threshold = -2.0 if is_strict else 2.0
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)
    side = {"height": 16, "width": 16}
    return {
        "safety_checker": checker,
        "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side),
    }


def prompt_checker(folder: Path, unsafe_score: float) -> dict[str, Any]:
    """A classifier that finds every prompt unsafe with that score, and its tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=32, num_labels=2,
        )
    ).eval()  # fmt: skip
    model.classifier.weight.data.zero_()
    odds = torch.tensor(unsafe_score / (1 - unsafe_score))
    model.classifier.bias.data = torch.stack([torch.zeros(()), odds.log()])
    return {"prompt_checker": model, "prompt_checker_tokenizer": BertTokenizerFast(bert_vocab(folder))}


def ranker(folder: Path) -> dict[str, Any]:
    """A random Chinese-CLIP and its processor."""
    from transformers import (
        BertTokenizerFast,
        ChineseCLIPConfig,
        ChineseCLIPImageProcessor,
        ChineseCLIPModel,
        ChineseCLIPProcessor,
    )

    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ChineseCLIPConfig(
        text_config={**small, "vocab_size": 40, "max_position_embeddings": 32},
        vision_config={**small, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    side = {"height": 16, "width": 16}
    processor = ChineseCLIPProcessor(
        ChineseCLIPImageProcessor(size=side, crop_size=side), BertTokenizerFast(bert_vocab(folder))
    )
    return {"ranker": ChineseCLIPModel(config).eval(), "ranker_processor": processor}


def bert_vocab(folder: Path) -> str:
    path = folder / "bert-vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"蓝色人闲桂花落红猫abcde"]), "utf-8")
    return str(path)
