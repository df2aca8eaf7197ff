"""VisCPM-Paint behind the original's own interface."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import PIL.Image
import PIL.ImageDraw
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPImageProcessor,
)
from transformers.utils import logging

from ..checkpoints.original import load_state_dict, read_json
from ..loading.layer_streaming import BUDGET_VARIABLE
from ..loading.options import LoadOptions, stored_dtype
from ..loading.paint import (
    find_folder,
    find_original_file,
    is_original_folder,
    load_original,
    load_vae,
    quantized_unet,
)
from ..loading.quantization import check_unet_quantization, unet_quantization_config
from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from ..pipelines.pipeline_viscpm_paint import VisCPMPaintPipeline, is_whole
from ..pipelines.prompt_safety import PROMPT_CHECKER_FOLDER, PROMPT_CHECKER_REPOSITORY
from ..pipelines.ranking import DEFAULT_RANKER
from ..pipelines.safety import DEFAULT_SAFETY_CHECKER
from ..tiny.embedded import FOLDER as EMBEDDED_FOLDER
from ..tiny.embedded import resolve_model


logger = logging.get_logger(__name__)

# Short names of diffusers' schedulers, with what makes them what the name says.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
OFFLOADS = ("none", "model", "sequential")

# Of a grid of images, in pixels.
CAPTION_HEIGHT = 16


@dataclass(frozen=True)
class PaintResult:
    """All candidates of a prompt; with a ranker the best one first, flagged ones last."""

    prompt: str
    images: list[PIL.Image.Image]
    scores: list[float | None]
    """Of the ranker; None without one."""
    seeds: list[int | None]
    """A candidate's own seed: `generate(prompt, generator=seed)` without a ranker draws it again. None if the
    generator was given."""
    flags: list[bool]
    reasons: list[str | None]
    """Why an image is flagged."""


class VisCPMPaint:
    """Draws images for prompts, as the original class of this name.

    Args:
        model_path: an original `.pt`/`.bin` file, or a folder or Hub id in the original's or our layout.
        image_safety_checker: True for the original's (beside the model, or `CompVis/stable-diffusion-safety-checker`),
            a folder or Hub id of one, or False.
        prompt_safety_checker: True for the original's (`text-security-checker/` of its repository), a folder or Hub
            id of one, or False.
        add_ranker: True for the original's (`OFA-Sys/chinese-clip-vit-base-patch16`), a folder or Hub id of one, or
            False. With a ranker `candidates` images are drawn for every one that is wanted, and the best are returned.
            For the embedded `viscpm-tiny`, which draws shapes, True means no such part, here and above: nothing is
            downloaded.
        config_path: the original's JSON of the language model, if not beside the file.
        vocab_path: `vocab.txt`, if not beside the model.
        vae: the VAE, or a folder or file of one, if not beside the file.
        device: CUDA, then MPS, then the CPU unless given.
        dtype: of all models. If None, fp16 checkpoints run in fp16, UNet included, except on a CPU.
        diffusion_config_path: JSON with the configurations of UNet, VAE and scheduler, for checkpoints of other sizes
            than the released ones.
        scheduler: a name of `SCHEDULERS` or of a diffusers class, or a scheduler. The original's DDPM if None.
        candidates: how many images are drawn for each one that is wanted, if there is a ranker.
        image_policy: what happens to flagged images: `"black"`, `"flag"` or `"raise"`.
        prompt_policy: what happens to refused prompts, likewise.
        offload: `"model"` keeps only the model that works on the device, `"sequential"` only the layer.
        quantization: `"4bit"` (`"nf4"`), `"fp4"`, `"8bit"`, `"int8wo"`, `"int4wo"`: precision of the text encoder's
            layers. If None, as the checkpoint was saved.
        quantize_unet: also quantise the UNet, which otherwise stays in `dtype`.
        device_map: `"auto"`, `"balanced"` or `{module: device}` for the text encoder.
        max_memory: `{device: "8GB"}`: the most that `device_map` may put there.
        offload_folder: for weights that `device_map` leaves on the disk.
        fast: compile the UNet.

    Raises:
        OriginalCheckpointError: if the checkpoint can't be used; the message says why.
        OSError: if a file can't be found or read.

    ```python
    >>> from viscpm_hf import VisCPMPaint

    >>> painter = VisCPMPaint("pytorch_model.bin", vae="vae/")
    >>> image = painter.generate("人闲桂花落，月静春山空")
    ```
    """

    def __init__(
        self,
        model_path: str | os.PathLike,
        image_safety_checker: bool | str | os.PathLike = True,
        prompt_safety_checker: bool | str | os.PathLike = True,
        add_ranker: bool | str | os.PathLike = True,
        *,
        config_path: str | os.PathLike | None = None,
        vocab_path: str | os.PathLike | None = None,
        vae: AutoencoderKL | str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        diffusion_config_path: str | os.PathLike | None = None,
        scheduler: str | SchedulerMixin | None = None,
        candidates: int = 4,
        image_policy: str = "black",
        prompt_policy: str = "raise",
        offload: str = "none",
        quantization: str | None = None,
        quantize_unet: bool = False,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike | None = None,
        fast: bool = False,
    ):
        if not is_whole(candidates) or candidates < 1:
            raise ValueError(f"candidates must be a whole number of at least 1, got {candidates!r}.")
        if offload not in OFFLOADS:
            raise ValueError(f"offload is one of {', '.join(OFFLOADS)}, got {offload!r}.")
        self.options = LoadOptions.checked(
            device=device,
            dtype=dtype,
            quantization=quantization,
            quantize_all=quantize_unet,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            fast=fast,
        )
        self.device = self.options.device
        dtype = self.options.dtype
        if quantize_unet:
            check_unet_quantization(quantization, self.device)
        if offload != "none" and self.device.type == "cpu":
            raise ValueError(f"offload={offload!r} needs a GPU: on a CPU there is nothing to offload from.")
        if offload != "none" and (device_map is not None or self.options.layer_budget is not None):
            raise ValueError(
                f"offload={offload!r} moves whole models, which excludes device_map and {BUDGET_VARIABLE}: drop one."
            )
        self.candidates = candidates
        self.image_policy = image_policy
        self.prompt_policy = prompt_policy
        if isinstance(scheduler, str):
            scheduler_class(scheduler)  # a wrong name is known before minutes of loading

        path = Path(find_folder(resolve_model(model_path, "paint"), {}))
        # Likewise for parts that can't be had.
        wanted = (image_safety_checker, prompt_safety_checker, add_ranker)
        if path.parent == EMBEDDED_FOLDER:
            wanted = tuple(source is not True and source for source in wanted)
        parts = {
            **_load_image_checker(path, wanted[0]),
            **_load_prompt_checker(path, wanted[1]),
            **_load_ranker(path, wanted[2]),
        }
        stored = stored_text_encoder_dtype(path)
        text_encoder_dtype = self.options.choose_dtype(stored)
        if is_original_folder(path):
            pipeline = load_original(
                VisCPMPaintPipeline,
                path,
                config_path=config_path,
                vocab_path=vocab_path,
                diffusion_config_path=diffusion_config_path,
                vae=vae,
                dtype={"text_encoder": text_encoder_dtype, "default": dtype},
                text_encoder_options=self.options.from_pretrained_arguments(text_encoder_dtype),
                **parts,
            )
        else:
            if config_path is not None or diffusion_config_path is not None or vocab_path is not None:
                raise ValueError(
                    "config_path, vocab_path and diffusion_config_path belong to an original file; "
                    f"{model_path} is a converted folder and has its own."
                )
            own = {} if vae is None else {"vae": vae if isinstance(vae, AutoencoderKL) else load_vae(Path(vae))}
            folder = path / "text_encoder"
            quantized = read_json(folder / "config.json", "The configuration").get("quantization_config")
            own["text_encoder"] = VisCPMPaintTextEncoder.from_pretrained(
                folder,
                dtype=text_encoder_dtype,
                **self.options.from_pretrained_arguments(text_encoder_dtype, quantized),
            )
            pipeline = VisCPMPaintPipeline.from_pretrained(path, **_load_dtype(dtype), **own, **parts)
        self.pipeline: VisCPMPaintPipeline = pipeline
        if dtype is None and self.device.type != "cpu" and stored in (torch.float16, torch.bfloat16):
            # The released UNet is stored in fp32, but half precision is what it needs.
            pipeline.unet.to(text_encoder_dtype)
            pipeline.vae.to(text_encoder_dtype)
        if quantize_unet:
            config = unet_quantization_config(self.options.quantization, pipeline.unet.dtype)
            pipeline.unet = quantized_unet(pipeline.unet, config)
        if scheduler is not None:
            pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
        pipeline.set_progress_bar_config(disable=None)
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=self.device)
        elif offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=self.device)
        else:
            if device_map is not None:
                self.device = pipeline.text_encoder.device
            for component in pipeline.components.values():
                if isinstance(component, torch.nn.Module) and component is not pipeline.text_encoder:
                    component.to(self.device)
            self.options.place(pipeline.text_encoder)

    # ------------------------------------------------------------------------------------------------------ generating

    def generate(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 7.5,
        image_size: int | None = None,
        generator: torch.Generator | int | None = None,
        num_inference_steps: int = 50,
        **options,
    ) -> PIL.Image.Image:
        """Draws an image, or a grid of several; with a ranker the best ones of all candidates.

        Args:
            prompt: what to draw; the empty prompt draws anything.
            negative_prompt: what not to draw.
            num_images_per_prompt: how many images are wanted.
            guidance_scale: weight of the prompt against the negative prompt, by the original's formula at every
                scale: 1 is the prompt alone, 0 the negative prompt. (In diffusers' pipelines there is no negative
                prompt at 1 and below.)
            image_size: height and width in pixels; what the checkpoint was made for if None, which is 512.
            generator: the source of all noise, or a seed.
            num_inference_steps: how many steps; other schedulers than the original's DDPM need 20 or so.
            options: further arguments of [`VisCPMPaintPipeline.__call__`].
        """
        result = self.generate_all(
            prompt,
            negative_prompt,
            num_images_per_prompt,
            guidance_scale,
            image_size,
            generator,
            num_inference_steps,
            **options,
        )
        images = result.images[:num_images_per_prompt]
        return images[0] if len(images) == 1 else image_grid(images)

    def generate_all(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 7.5,
        image_size: int | None = None,
        generator: torch.Generator | int | None = None,
        num_inference_steps: int = 50,
        **options,
    ) -> PaintResult:
        """As [`generate`], with every candidate and what there is to know of it.

        Raises:
            UnsafePromptError: if the prompt is refused and the policy is `"raise"`.
            UnsafeImageError: if an image is flagged and the policy is `"raise"`.
            ValueError: for arguments outside their range.
        """
        if not isinstance(prompt, str):
            raise ValueError(f"A prompt is a str, got {type(prompt).__name__}.")
        if options.get("output_type", "pil") != "pil":
            raise ValueError("VisCPMPaint returns PIL images; other outputs are those of its `pipeline`.")
        has_ranker = self.pipeline.ranker is not None
        num_images = num_images_per_prompt * (self.candidates if has_ranker else 1)
        generators, seeds = self._generators(generator, num_images)
        output = self.pipeline(
            prompt,
            height=image_size,
            width=image_size,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images,
            generator=generators,
            prompt_policy=self.prompt_policy,
            image_policy=self.image_policy,
            **{"use_guidance": True, **options},
        )
        images = output.images
        flags = output.nsfw_content_detected or [False] * num_images
        reasons = output.flag_reasons or [None] * num_images
        return self.rank(prompt, images, seeds, flags, reasons)

    def rank(
        self,
        prompt: str,
        images: list[PIL.Image.Image],
        seeds: list[int | None],
        flags: list[bool],
        reasons: list[str | None],
    ) -> PaintResult:
        """All candidates of a prompt, ranked."""
        scores, order = [None] * len(images), list(range(len(images)))
        if self.pipeline.ranker is not None:
            _, ranked, places = self.pipeline.rank_images(prompt, images)
            scores = [ranked[places.index(index)] for index in range(len(images))]
            order = sorted(places, key=lambda index: flags[index])  # stable: among equals the best stays first
        return PaintResult(
            prompt=prompt,
            images=[images[index] for index in order],
            scores=[scores[index] for index in order],
            seeds=[seeds[index] for index in order],
            flags=[flags[index] for index in order],
            reasons=[reasons[index] for index in order],
        )

    def _generators(
        self, generator: torch.Generator | int | None, num_images: int
    ) -> tuple[torch.Generator | list[torch.Generator], list[int | None]]:
        """One generator an image with seeds in a row, so that each can be drawn again alone; a given one as it is."""
        if isinstance(generator, (torch.Generator, list)):
            return generator, [None] * num_images
        seed = int(torch.randint(2**31, (1,))) if generator is None else generator
        if not is_whole(seed):
            raise ValueError(f"generator is a torch.Generator or a seed, got {generator!r}.")
        seeds = [int(seed) + index for index in range(num_images)]
        return [torch.Generator().manual_seed(seed) for seed in seeds], seeds


# -------------------------------------------------------------------------------------------------------------- parts


def _load_image_checker(model: Path, source: bool | str | os.PathLike) -> dict[str, Any]:
    def load(place: str, **kwargs) -> dict[str, Any]:
        # In folders of diffusers the two lie side by side.
        sibling = Path(place).parent / "feature_extractor"
        is_pair = Path(place).is_dir() and not (Path(place) / "preprocessor_config.json").is_file()
        return {
            "safety_checker": StableDiffusionSafetyChecker.from_pretrained(place, **kwargs),
            "feature_extractor": CLIPImageProcessor.from_pretrained(sibling if is_pair else place, **kwargs),
        }

    beside = (model if model.is_dir() else model.parent) / "safety_checker"
    return _load_part(
        "image safety checker", "image_safety_checker", "--no-check-image", source, load, model, "safety_checker",
        "feature_extractor", beside, (DEFAULT_SAFETY_CHECKER, {}),
    )  # fmt: skip


def _load_prompt_checker(model: Path, source: bool | str | os.PathLike) -> dict[str, Any]:
    def load(place: str, **kwargs) -> dict[str, Any]:
        return {
            "prompt_checker": BertForSequenceClassification.from_pretrained(place, **kwargs),
            "prompt_checker_tokenizer": AutoTokenizer.from_pretrained(place, **kwargs),
        }

    folder = model if model.is_dir() else model.parent
    return _load_part(
        "prompt safety checker", "prompt_safety_checker", "--no-check-prompt", source, load, model, "prompt_checker",
        "prompt_checker_tokenizer", folder / PROMPT_CHECKER_FOLDER,
        (PROMPT_CHECKER_REPOSITORY, {"subfolder": PROMPT_CHECKER_FOLDER}),
    )  # fmt: skip


def _load_ranker(model: Path, source: bool | str | os.PathLike) -> dict[str, Any]:
    def load(place: str, **kwargs) -> dict[str, Any]:
        return {
            "ranker": ChineseCLIPModel.from_pretrained(place, **kwargs),
            "ranker_processor": ChineseCLIPProcessor.from_pretrained(place, **kwargs),
        }

    return _load_part(
        "ranker", "add_ranker", "--no-rank", source, load, model, "ranker", "ranker_processor", None,
        (DEFAULT_RANKER, {}),
    )  # fmt: skip


def _load_part(
    what: str,
    argument: str,
    flag: str,
    source: bool | str | os.PathLike,
    load: Callable[..., dict[str, Any]],
    model: Path,
    component: str,
    processor: str,
    beside: Path | None,
    default: tuple[str, dict[str, Any]],
) -> dict[str, Any]:
    """The two components of an optional part; nothing to pass on if the pipeline was saved with it.

    Raises:
        OSError: if it can't be had; the message says where it was looked for and how to do without.
    """
    if source is False or source is None:
        return {component: None, processor: None}
    if source is not True:
        place, kwargs = os.fspath(source), {}
        looked = place
    else:
        index = model / DiffusionPipeline.config_name
        if index.is_file() and (read_json(index, "The pipeline's index").get(component) or [None])[0] is not None:
            return {}
        place, kwargs = default
        looked = " / ".join([place, *kwargs.values()]) + " of the Hugging Face Hub"
        if beside is not None and beside.is_dir():
            place, kwargs, looked = os.fspath(beside), {}, os.fspath(beside)
        elif beside is not None:
            looked = f"{beside} and {looked}"
    try:
        return load(place, **kwargs)
    except (OSError, ValueError) as error:
        raise OSError(
            f"The {what} can't be loaded; it was looked for in {looked} "
            f"({str(error).splitlines()[0]}). Give a folder that holds it ({argument}=...), or switch it off "
            f"({argument}=False, {flag} on the command line)."
        ) from error


def stored_text_encoder_dtype(path: Path) -> torch.dtype:
    """What the text encoder of a file or folder is stored in; fp32 if it doesn't say."""
    folder = path / "text_encoder"
    if folder.is_dir():
        name = read_json(folder / "config.json", "The text encoder's configuration").get("dtype")
        return getattr(torch, name) if name else stored_dtype(folder) or torch.float32
    file = find_original_file(path) if path.is_dir() else path
    tensors = (tensor for name, tensor in load_state_dict(file).items() if name.startswith("llm."))
    return next((tensor.dtype for tensor in tensors), torch.float32)


def _load_dtype(dtype: torch.dtype | None) -> dict[str, Any]:
    # Without a dtype diffusers loads its own models in fp32 and the text encoder as it was saved.
    return {} if dtype is None else {"dtype": dtype}


# ---------------------------------------------------------------------------------------------------------- scheduler


def scheduler_class(name: str) -> tuple[type[SchedulerMixin], dict[str, Any]]:
    """A scheduler by its short name or by that of its class, and the options that make it so.

    Raises:
        ValueError: for a name that is neither.
    """
    class_name, options = SCHEDULERS.get(name.lower(), (name, {}))
    found = getattr(diffusers, class_name, None) if class_name.endswith("Scheduler") else None
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise ValueError(
            f"There is no scheduler {name!r}: it is one of {', '.join(SCHEDULERS)}, or a scheduler class of diffusers."
        )
    return found, options


def make_scheduler(scheduler: str | SchedulerMixin, current: SchedulerMixin) -> SchedulerMixin:
    """A scheduler by name, for the noise schedule of the current one."""
    if not isinstance(scheduler, str):
        return scheduler
    found, options = scheduler_class(scheduler)
    return found.from_config(current.config, **options)


# ------------------------------------------------------------------------------------------------------------- images


def image_grid(images: Sequence[PIL.Image.Image], captions: Sequence[str] | None = None) -> PIL.Image.Image:
    """Images in a nearly square grid, with a line of text below each if there are captions."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    cell_height = height + (CAPTION_HEIGHT if captions is not None else 0)
    grid = PIL.Image.new("RGB", (columns * width, rows * cell_height), "white")
    draw = PIL.ImageDraw.Draw(grid)
    for index, image in enumerate(images):
        corner = (index % columns * width, index // columns * cell_height)
        grid.paste(image, corner)
        if captions is not None:
            draw.text((corner[0] + 2, corner[1] + height + 2), captions[index], fill="black")
    return grid


__all__ = ["PaintResult", "VisCPMPaint", "image_grid", "make_scheduler"]
