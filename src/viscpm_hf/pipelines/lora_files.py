"""LoRA files of others: what of them fits VisCPM-Paint, found out before anything is loaded."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import delete_adapter_layers, recurse_remove_peft_layers


UNET, TEXT_ENCODER = "unet.", "text_encoder."
# CLIP's layers, in files of kohya's trainer (converted) and of diffusers.
CLIP_KEY = re.compile(r"text_encoder\.(text_model\.)?encoder\.layers\.")
# `attn1.processor.to_q_lora.down.weight` and `attn1.to_q.lora_A.weight` are both of `attn1.to_q`.
LORA_SUFFIX = re.compile(
    r"(?P<old>_lora)?\.(?:lora(?:_linear_layer)?\.)?(?P<part>lora_A|lora_B|down|up|lora_magnitude_vector)(?:\.\w+)?$"
)
# Width of the text states that other UNets attend to.
MADE_FOR = {768: "Stable Diffusion 1", 2048: "Stable Diffusion XL"}
# Other factorisations, by a part of their keys.
OTHER_METHODS = {"hada_": "LoHa", "lokr_": "LoKr", "glora": "GLoRA", ".oft_": "OFT", "ia3": "IA3", ".diff": "full"}
ADVICE = (
    "fuse_lora() followed by unload_lora_weights() makes it part of the weights, save_lora_weights() saves it apart."
)


def fitting_lora(
    state_dict: Mapping[str, torch.Tensor], unet: torch.nn.Module, text_encoder: torch.nn.Module | None
) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors that are for this UNet and this text encoder, and the number of those for CLIP.

    Args:
        state_dict: tensors by name, as `lora_state_dict` returns them.
        unet: the pipeline's.
        text_encoder: the pipeline's; None if it has been freed.

    Raises:
        ValueError: if the file is made for another model; nothing of it should be loaded then.
    """
    clip = [key for key in state_dict if CLIP_KEY.match(key)]
    own = {key: tensor for key, tensor in state_dict.items() if not CLIP_KEY.match(key)}
    unknown = [key for key in own if not key.startswith((UNET, TEXT_ENCODER))]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the LoRA's {len(state_dict)} tensors are for neither the UNet nor the text encoder, "
            f"{unknown[0]} for one: it is made for another model. Nothing was loaded."
        )
    if not own:
        raise ValueError(
            f"The LoRA's {len(state_dict)} tensors are all for CLIP, which VisCPM-Paint doesn't have: nothing is left "
            "to load."
        )
    for prefix, model, what in ((UNET, unet, "UNet"), (TEXT_ENCODER, text_encoder, "text encoder")):
        half = {key.removeprefix(prefix): tensor for key, tensor in own.items() if key.startswith(prefix)}
        if half and model is None:
            raise ValueError(
                f"{len(half)} of the LoRA's {len(state_dict)} tensors are for the text encoder, which the pipeline "
                "doesn't have (any more): load the LoRA before free_text_encoder(). Nothing was loaded."
            )
        misfits = [problem for key, tensor in half.items() if (problem := _misfit(model, key, tensor)) is not None]
        if misfits:
            raise ValueError(
                f"{len(misfits)} of the LoRA's {len(half)} tensors for the {what} don't fit it, the first is "
                f"{misfits[0]}. Nothing was loaded."
            )
    return own, len(clip)


def scale_by_alphas(state_dict: dict[str, torch.Tensor], alphas: Mapping[str, float] | None) -> None:
    """Multiplies kohya's scales, alpha / rank of each layer, into the tensors, in place.

    diffusers reads one alpha of a file right, but not those of attention layers where they differ.
    """
    for name, alpha in (alphas or {}).items():
        stem = name.removesuffix(".alpha")
        down = stem if stem in state_dict else f"{stem}.lora.down.weight"
        if down not in state_dict:  # CLIP's
            continue
        up = down.replace(".down.", ".up.")
        state_dict[up] = (state_dict[up].float() * (alpha / len(state_dict[down]))).to(state_dict[up].dtype)


def is_empty(state_dict: Mapping[str, torch.Tensor]) -> bool:
    """Whether a file is named like a LoRA and yet holds no layer of one; diffusers warns then and goes on."""
    return all("lora" in key and LORA_SUFFIX.search(key) is None for key in state_dict)


def unreadable(error: Exception) -> ValueError:
    """What diffusers says of files that it can't convert, in one sentence."""
    text = str(error)
    for mark, method in OTHER_METHODS.items():
        if mark in text:
            return ValueError(f"The file is no LoRA but {method} ({mark.strip('._')} tensors), which isn't supported.")
    return ValueError(f"The LoRA file can't be read: {text if len(text) <= 200 else text[:200] + ' ...'}")


def adapters_of(model: torch.nn.Module | None) -> set[str]:
    """Names of the adapters in a model."""
    if model is None:
        return set()
    names = set(getattr(model, "peft_config", None) or ())
    return names.union(*(module.lora_A for module in model.modules() if hasattr(module, "lora_A")))


def remove_adapters(model: torch.nn.Module, names: set[str]) -> None:
    """Takes adapters out of a model again, and what carried them if none is left."""
    for name in names:
        delete_adapter_layers(model, name)
    if not adapters_of(model):
        recurse_remove_peft_layers(model)


def check_savable(components: Mapping[str, Any]) -> None:
    """Refuses to save what couldn't be loaded back.

    Raises:
        ValueError: for a model with a LoRA in it, unless it is the text encoder's and transformers can find the base.
    """
    for name, model in components.items():
        if not isinstance(model, torch.nn.Module) or not any(hasattr(part, "base_layer") for part in model.modules()):
            continue
        adapters = sorted(adapters_of(model))
        is_fused = any(getattr(module, "merged", False) is True for module in model.modules())
        if name == "text_encoder" and adapters and not is_fused:
            if all(model.peft_config[adapter].base_model_name_or_path for adapter in adapters):
                continue  # transformers saves the adapter and the place of the base model
        raise ValueError(
            f"The {name} has a LoRA {'fused into' if is_fused else 'loaded in'} it ({', '.join(adapters) or 'deleted'}"
            f"), which save_pretrained doesn't save: {ADVICE}"
        )


def _misfit(model: torch.nn.Module, key: str, tensor: torch.Tensor) -> str | None:
    """Why a tensor doesn't fit, None if it does."""
    match = LORA_SUFFIX.search(key)
    if match is None:
        return f"{key}, which is no tensor of a LoRA"
    name = key[: match.start()].replace(".processor", "")
    if match["old"] and name.endswith("to_out"):
        name += ".0"
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return f"for a layer {name}, which there is not"
    part = match["part"]
    sizes = (
        getattr(module, "in_features", getattr(module, "in_channels", None)),
        getattr(module, "out_features", getattr(module, "out_channels", None)),
    )
    if sizes[0] is None:
        return f"for {name}, which is no linear layer and no convolution"
    is_input = part in ("lora_A", "down")
    if tensor.ndim < 2:
        return None  # a bias, or DoRA's magnitudes
    found, wanted = (tensor.shape[1], sizes[0]) if is_input else (tensor.shape[0], sizes[1])
    if found == wanted:
        return None
    made_for = MADE_FOR.get(found)
    hint = f" (it is made for {made_for})" if is_input and made_for else ""
    return f"{key} with {found} {'inputs' if is_input else 'outputs'}, where the layer has {wanted}{hint}"


__all__ = [
    "adapters_of",
    "check_savable",
    "fitting_lora",
    "is_empty",
    "remove_adapters",
    "scale_by_alphas",
    "unreadable",
]
