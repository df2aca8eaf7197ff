"""Small random VisCPM-Chat and VisCPM-Paint checkpoints, wide enough for 4 bits, in the original's layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from paint_support import PAINT
from support import Golden

from viscpm_hf import VisCPMChatForConditionalGeneration, VisCPMPaintTextEncoder
from viscpm_hf.checkpoints.original import chat_config, text_encoder_config
from viscpm_hf.checkpoints.weight_transforms import KeyMatcher, revert_operation
from viscpm_hf.families import key_maps


SIZES = {"dim_model": 128, "dim_ff": 256, "num_layers": 2, "num_heads": 2, "dim_head": 64}


def original_tensors(model: torch.nn.Module, key_map: key_maps.KeyMap) -> dict[str, torch.Tensor]:
    """A model's weights in fp16, under the original's names."""
    num_words = model.config.get_text_config(decoder=True).num_words
    matcher, tied = KeyMatcher(key_map), set(getattr(model, "all_tied_weights_keys", ()))
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            original, entry = matcher.match_target(name)
            tensors[original] = revert_operation(entry.operation, tensor, num_words).half()
    return tensors


def write_chat(folder: Path) -> Path:
    """Writes `pytorch_model.bin` with what belongs beside it, and returns its path."""
    golden = Golden("chat_a")
    llm, vision = {**golden.llm_config, **SIZES}, golden.vision_config
    torch.manual_seed(0)
    model = VisCPMChatForConditionalGeneration(chat_config(llm, vision))
    return _write(folder, original_tensors(model, key_maps.CHAT), {**llm, **vision}, golden.vocab)


def write_paint(folder: Path) -> Path:
    """As [`write_chat`]; UNet and VAE are those of the golden data."""
    llm = {**json.loads((PAINT / "cpm-bee.json").read_text("utf-8")), **SIZES}
    golden = torch.load(PAINT / "pytorch_model.bin", weights_only=True)
    width = golden["trans_block.w_out_res.weight"].shape[0]
    torch.manual_seed(0)
    encoder = VisCPMPaintTextEncoder(text_encoder_config({**llm, "unet_cross_attention_dim": width}))
    tensors = original_tensors(encoder, key_maps.PAINT_TEXT_ENCODER)
    tensors |= {name: tensor for name, tensor in golden.items() if name.startswith("unet.")}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("diffusion.json", "vae.bin"):
        shutil.copy(PAINT / name, folder)
    return _write(folder, tensors, llm, PAINT / "vocab.txt")


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict, vocab: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model_type = "viscpmchatbee" if "vision_dim" in config else "cpmbee"
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, **config}), "utf-8")
    shutil.copy(vocab, folder / "vocab.txt")
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"
