"""Small checkpoints in the siblings' original layouts, tokenizers and all."""

from __future__ import annotations

from pathlib import Path

from reference import System, minicpmv, omnilmm, visualcla, write_json
from sibling_tokenizers import (
    MINICPM_VOCAB_SIZE,
    OMNILMM_VOCAB_SIZE,
    VISUALCLA_VOCAB_SIZE,
    write_minicpm_tokenizer,
    write_omnilmm_tokenizer,
    write_visualcla_tokenizer,
)


NAMES = ("omnilmm", "minicpmv-1.0", "minicpmv-2.0", "visualcla")


def make_system(name: str) -> System:
    """The system with as many tokens as its small tokenizer has."""
    if name == "omnilmm":
        return omnilmm(OMNILMM_VOCAB_SIZE)
    if name == "visualcla":
        return visualcla(VISUALCLA_VOCAB_SIZE)
    return minicpmv(name.partition("-")[2], MINICPM_VOCAB_SIZE)


def write_tokenizer(name: str, folder: Path) -> None:
    """The tokenizer's files, and VisualCLA's image processor's."""
    if name == "omnilmm":
        write_omnilmm_tokenizer(folder)
    elif name == "visualcla":
        write_visualcla_tokenizer(folder)
        size = make_system(name).config["vision_config"]["image_size"]
        write_json(
            folder / "preprocessor_config.json",
            {
                "crop_size": {"height": size, "width": size},
                "do_center_crop": True,
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_processor_type": "CLIPImageProcessor",
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "rescale_factor": 0.00392156862745098,
                "size": {"shortest_edge": size},
            },
        )
    else:
        write_minicpm_tokenizer(folder, name.partition("-")[2])


def write_folder(name: str, folder: Path) -> Path:
    """The whole original folder."""
    make_system(name).write(folder)
    write_tokenizer(name, folder)
    return folder
