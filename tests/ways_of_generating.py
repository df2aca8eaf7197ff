"""Small random models of every family, and the ways of decoding that must not change what a model answers.

Run as a program it answers with saved folders where viscpm_hf can't be imported, as on a machine without it.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


LENGTH = 12
TEXT = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2,
}  # fmt: skip
CPM_BEE = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 8, "position_bias_num_buckets": 16, "position_bias_num_segment_buckets": 32,
    "position_bias_max_distance": 40, "initializer_range": 0.4,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
PERCEIVER = {"num_query_tokens": 4, "hidden_size": 32, "num_attention_heads": 2}
# Seeds of weights whose answers have many different tokens, and no special ones.
SEEDS = {"cpm-bee": 2, "viscpm-chat": 0, "omnilmm": 1, "minicpmv": 2, "visualcla": 0}
NAMES = tuple(SEEDS)


def make_model(name: str) -> torch.nn.Module:
    import viscpm_hf
    from viscpm_hf.modeling import modeling_vision_resampler as siblings

    torch.manual_seed(SEEDS[name])
    if name == "cpm-bee":
        return viscpm_hf.CpmBeeForCausalLM(viscpm_hf.CpmBeeConfig(**CPM_BEE)).eval()
    if name == "viscpm-chat":
        vision = {**VISION, "num_query_tokens": 4}
        config = viscpm_hf.VisCPMChatConfig(text_config=CPM_BEE, vision_config=vision)
        return viscpm_hf.VisCPMChatForConditionalGeneration(config).eval()
    model_class, text, vision, resampler = {
        "omnilmm": (
            siblings.OmniLMMForConditionalGeneration, "mistral", {"model_type": "vit"},
            {**PERCEIVER, "key_positions": "interpolated"},
        ),
        "minicpmv": (
            siblings.MiniCPMVForConditionalGeneration, "granite",
            {"model_type": "siglip_vision_model", "vision_use_head": False},
            {**PERCEIVER, "key_positions": "computed"},
        ),
        "visualcla": (
            siblings.VisualCLAForConditionalGeneration, "llama", {"model_type": "clip_vision_model"},
            {**PERCEIVER, "resampler_type": "concatenating", "num_hidden_layers": 2, "intermediate_size": 37},
        ),
    }[name]  # fmt: skip
    config = model_class.config_class(
        text_config={**TEXT, "model_type": text},
        vision_config={**VISION, **vision},
        resampler_config=resampler,
        image_token_id=4,
    )
    return model_class(config).eval()


def make_inputs(name: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """One prompt that repeats itself, so that prompt lookup finds something, with an image if the model takes one."""
    phrase = [11, 12, 13, 14, 15]
    segments = [[6, *phrase, 21], [6, *phrase, 22], [6, *phrase[:3]]]  # 6 is CPM-Bee's <s>
    inputs = {}
    if name != "cpm-bee":
        segments[0][1:1] = [model.config.image_token_id] * 4
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28)
    ids = [token for segment in segments for token in segment]
    inputs |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    if name in ("cpm-bee", "viscpm-chat"):
        own = [index for index, segment in enumerate(segments) for _ in segment]
        inputs["segment_ids"] = torch.tensor([own])
        inputs["token_type_ids"] = (inputs["segment_ids"] == 2).long()
        inputs["segment_relations"] = torch.tensor([[[0, 5, 7], [9, 0, 3], [4, 6, 0]]])
    return inputs


def drafting(model: torch.nn.Module) -> torch.nn.Module:
    """A model that is right often, but not always."""
    draft = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.05 * parameter.std() * torch.randn_like(parameter)) if parameter.numel() > 1 else None
    return draft


def answers(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """What the model answers in every way, `LENGTH` ids each."""
    torch.manual_seed(0)
    ways = {
        "cached": {},
        "uncached": {"use_cache": False},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assisted": {"assistant_model": drafting(model)},
    }
    length = inputs["input_ids"].shape[1]
    return {
        way: model.generate(**inputs, **options, max_new_tokens=LENGTH, eos_token_id=None, do_sample=False)[
            0, length:
        ].tolist()
        for way, options in ways.items()
    }


def write(name: str, folder: Path) -> Path:
    """Model and prompt, as a user saves them."""
    model = make_model(name)
    model.save_pretrained(folder)
    save_file(make_inputs(name, model), folder / "inputs.safetensors")
    return folder


class _NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "viscpm_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    sys.meta_path.insert(0, _NotInstalled())
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    found = {}
    for folder in map(Path, sys.argv[1:]):
        auto = AutoModelForCausalLM if folder.name == "cpm-bee" else AutoModelForImageTextToText
        model = auto.from_pretrained(folder, trust_remote_code=True).eval()
        assert type(model).__module__.startswith("transformers_modules")
        found[folder.name] = answers(model, load_file(folder / "inputs.safetensors"))
    print(json.dumps(found))
