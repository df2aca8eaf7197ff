"""What it takes to draw an image again, in its PNG file: written by command, API and page alike, and read back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo


if TYPE_CHECKING:
    from ..pipelines.pipeline_viscpm_paint import VisCPMPaintPipeline

# Arguments of a call that are numbers and names, so that they can be written down.
RECORDED = ("eta", "guidance_rescale", "timesteps", "sigmas", "use_guidance", "cross_attention_kwargs")
# Those that can't, and without which the image is another one.
TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")
MAX_STEPS = 1000


class RecordError(ValueError):
    """A file that an image can't be drawn again from."""


def call_settings(
    pipeline: VisCPMPaintPipeline, steps: int, guidance_scale: float, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a call of the pipeline, as JSON takes them; prompts, seed and size are apart."""
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    settings = {
        "steps": int(steps),
        "scheduler": type(pipeline.scheduler).__name__,
        "guidance": float(guidance_scale),
        "options": {name: options[name] for name in RECORDED if options.get(name) is not None},
        "not_recorded": [name for name in TENSORS if options.get(name) is not None],
        "lora": sorted(pipeline.get_active_adapters()) if getattr(pipeline.unet, "peft_config", None) else [],
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "scheduler_config": scheduler,
    }
    return json.loads(json.dumps(settings, default=str))


def png_info(result: Any, index: int, model: str) -> PngInfo:
    """The texts of an image's PNG file."""
    score, seed = result.scores[index], result.seeds[index]
    information = PngInfo()
    for name, value in (
        ("Software", "viscpm-hf"),
        ("prompt", result.prompt),
        ("negative_prompt", result.negative_prompt or ""),
        ("seed", None if seed is None else str(seed)),
        ("model", model),
        ("settings", json.dumps({**result.settings, "size": list(result.images[index].size)})),
        ("score", None if score is None else f"{score:.4f}"),
    ):
        if value is not None:
            information.add_itxt(name, value)
    return information


def png_bytes(result: Any, index: int, model: str) -> bytes:
    """The PNG file of an image, its settings within."""
    file = BytesIO()
    result.images[index].save(file, "PNG", pnginfo=png_info(result, index, model))
    return file.getvalue()


def save_whole(image: PIL.Image.Image, path: str | os.PathLike, **options: Any) -> None:
    """Writes an image file, of the format that its name says: when it is complete it is there, before it is not.

    Raises:
        ValueError: if the name is of no format.
    """
    path = Path(path)
    file_format = PIL.Image.registered_extensions().get(path.suffix.lower())
    if file_format is None:
        raise ValueError(f"{path} is no name of an image file: {path.suffix or 'no ending'} instead of .png, .jpg ...")
    partial = path.with_name(path.name + ".tmp")
    try:
        image.save(partial, file_format, **options)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Record:
    """How an image was drawn."""

    model: str
    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    """Pixels."""
    steps: int
    guidance_scale: float
    scheduler: str
    """Name of a class of diffusers."""
    scheduler_config: dict[str, Any]
    dtype: str
    """Of the UNet."""
    lora: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the pipeline."""


def read_record(path: str | os.PathLike) -> Record:
    """How the image of a PNG file was drawn. Only what stands in the file's head is read.

    Raises:
        RecordError: if it doesn't say, or not all; the message says what is missing.
        OSError: if the file can't be read.
    """
    path = Path(path)
    try:
        with PIL.Image.open(path) as image:
            texts = dict(getattr(image, "text", {}))
    except (PIL.UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise RecordError(f"{path} is no image file.") from error

    def fail(what: str) -> RecordError:
        return RecordError(
            f"{path} can't be drawn again: {what}. PNG files of viscpm-hf's command, API and page say how; other "
            "formats and copies by other programs mostly don't."
        )

    missing = [name for name in ("prompt", "model", "settings") if name not in texts]
    if missing:
        raise fail(f"it doesn't say its {', '.join(missing)}")
    if "seed" not in texts:
        raise fail("it has no seed, because a torch.Generator was given")
    try:
        settings = json.loads(texts["settings"])
        width, height = settings["size"]
        record = Record(
            model=texts["model"],
            prompt=texts["prompt"],
            negative_prompt=texts.get("negative_prompt", ""),
            seed=int(texts["seed"]),
            width=int(width),
            height=int(height),
            steps=int(settings["steps"]),
            guidance_scale=float(settings["guidance"]),
            scheduler=str(settings["scheduler"]),
            scheduler_config=dict(settings["scheduler_config"]),
            dtype=str(settings["dtype"]),
            lora=[str(name) for name in settings["lora"]],
            options={name: value for name, value in settings["options"].items() if name in RECORDED},
        )
        unrecorded = list(settings["not_recorded"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise fail(f"its settings aren't whole ({type(error).__name__}: {error})") from error
    if unrecorded:
        raise fail(f"{', '.join(map(str, unrecorded))} were given as tensors")
    if not 1 <= record.steps <= MAX_STEPS or not math.isfinite(record.guidance_scale):
        raise fail(f"{record.steps} steps with guidance {record.guidance_scale} make no sense")
    return record
