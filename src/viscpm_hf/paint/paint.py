"""VisCPM-Paint behind the original's own interface."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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

from ..checkpoints.headers import check_weight_files
from ..checkpoints.location import chosen_file, hub_arguments
from ..checkpoints.original import load_state_dict, read_json
from ..loading.layer_streaming import BUDGET_VARIABLE
from ..loading.options import LoadOptions, stored_dtype
from ..loading.paint import (
    compile_unet,
    find_folder,
    find_original_file,
    is_original_folder,
    load_original,
    load_vae,
    quantized_unet,
    reference_scheduler,
)
from ..loading.quantization import check_unet_quantization, unet_quantization_config
from ..modeling.fast_decoding import compilation_problem
from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from ..pipelines.pipeline_viscpm_paint import VisCPMPaintPipeline, is_whole
from ..pipelines.prompt_safety import PROMPT_CHECKER_FOLDER, PROMPT_CHECKER_REPOSITORY, UnsafePromptError
from ..pipelines.ranking import DEFAULT_RANKER
from ..pipelines.safety import DEFAULT_SAFETY_CHECKER, load_whole
from ..tiny.embedded import FOLDER as EMBEDDED_FOLDER
from ..tiny.embedded import resolve_model
from .record import Record, call_settings, png_info, read_record, save_whole


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
# Ready-made arguments of `generate`, by name: `painter.generate(prompt, **PRESETS["fast"])`. Agreement and seconds are
# in docs/painting.md.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"scheduler": "dpm++-karras", "num_inference_steps": 12, "guidance_scale": 7.5},
    "quality": {"scheduler": "dpm++-karras", "num_inference_steps": 25, "guidance_scale": 7.5},
    "reference": {"scheduler": "reference", "num_inference_steps": 50, "guidance_scale": 7.5},
}
# Texts that are encoded in one pass at most.
ENCODED_TOGETHER = 64
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
    negative_prompt: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """How all were drawn, see [`call_settings`]."""

    def save(self, path: str | os.PathLike, index: int = 0, model: str = "") -> None:
        """Writes a candidate; a PNG file with all it takes to draw it again, `model` being where that came from."""
        options = {"pnginfo": png_info(self, index, model)} if str(path).lower().endswith(".png") else {}
        save_whole(self.images[index], path, **options)


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt that has been through the text encoder, in place of the prompt itself; see [`VisCPMPaint.encode`]."""

    prompt: str
    negative_prompt: str | None
    prompt_embeds: torch.Tensor
    negative_prompt_embeds: torch.Tensor
    reason: str | None = None
    """Why the prompt checker refuses it."""


class VisCPMPaint:
    """Draws images for prompts, as the original class of this name.

    Args:
        model_path: an original `.pt`/`.bin` file, a folder or Hub id in the original's or our layout, or one of a Hub
            repository's alternatives (`openbmb/VisCPM-Paint:balance`).
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
        quantization: `"4bit"`, `"8bit"` (on a CPU packed for its kernels), `"nf4"`, `"fp4"`, `"int8"`, `"int8wo"` or
            `"int4wo"`: precision of the text encoder's layers. If None, as the checkpoint was saved.
        quantize_unet: also quantise the UNet, which otherwise stays in `dtype`.
        device_map: `"auto"`, `"balanced"` or `{module: device}` for the text encoder.
        max_memory: `{device: "8GB"}`: the most that `device_map` may put there.
        offload_folder: for weights that `device_map` leaves on the disk.
        fast: compile the UNet, which takes minutes at the first step of each number and size of pictures.
        revision: of the model's Hub repository.
        token, cache_dir: of the Hub, for ranker and checkers too.

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
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
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
        if offload != "none" and fast:
            raise ValueError(f"fast compiles the UNet, which excludes offload={offload!r}: drop one.")
        if offload != "none" and self.device.type == "cpu":
            raise ValueError(f"offload={offload!r} needs a GPU: on a CPU there is nothing to offload from.")
        if offload != "none" and (device_map is not None or self.options.layer_budget is not None):
            raise ValueError(
                f"offload={offload!r} moves whole models, which excludes device_map and {BUDGET_VARIABLE}: drop one."
            )
        self.model_path = os.fspath(model_path)
        self.candidates = int(candidates)
        self.image_policy = image_policy
        self.prompt_policy = prompt_policy
        if isinstance(scheduler, str):
            scheduler_class(scheduler)  # a wrong name is known before minutes of loading

        hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir)
        path = Path(find_folder(resolve_model(chosen_file(model_path, **hub), "paint"), hub))
        for part in ("unet", "vae"):
            check_weight_files(path / part, "diffusion_pytorch_model")
        stored = stored_text_encoder_dtype(path)  # another model's checkpoint is known as such before parts are sought
        # Likewise for parts that can't be had.
        wanted = (image_safety_checker, prompt_safety_checker, add_ranker)
        if path.parent == EMBEDDED_FOLDER:
            wanted = tuple(source is not True and source for source in wanted)
        parts = {
            **_load_image_checker(path, wanted[0], hub),
            **_load_prompt_checker(path, wanted[1], hub),
            **_load_ranker(path, wanted[2], hub),
        }
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
            # Without a dtype diffusers loads its own models in fp32 and the text encoder as it was saved.
            own |= {} if dtype is None else {"dtype": dtype}
            pipeline = VisCPMPaintPipeline.from_pretrained(path, **own, **parts)
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
        if fast:
            problem = compilation_problem(pipeline.unet, self.device)
            if problem is None:
                compile_unet(pipeline.unet)
            else:
                logger.warning(f"The UNet stays uncompiled: {problem}.")

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
        *,
        scheduler: str | SchedulerMixin | None = None,
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
            scheduler: for this call, as in the constructor; `"reference"` is the original's DDPM. With steps and
                guidance in one: `**PRESETS["fast"]`.
            options: `height` and `width` in place of `image_size`, and further arguments of
                [`VisCPMPaintPipeline.__call__`].
        """
        result = self.generate_all(
            prompt,
            negative_prompt,
            num_images_per_prompt,
            guidance_scale,
            image_size,
            generator,
            num_inference_steps,
            scheduler=scheduler,
            **options,
        )
        images = result.images[:num_images_per_prompt]
        return images[0] if len(images) == 1 else image_grid(images)

    def generate_all(
        self,
        prompt: str | EncodedPrompt,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float = 7.5,
        image_size: int | None = None,
        generator: torch.Generator | int | None = None,
        num_inference_steps: int = 50,
        *,
        scheduler: str | SchedulerMixin | None = None,
        **options,
    ) -> PaintResult:
        """As [`generate`], with every candidate and what there is to know of it.

        Raises:
            UnsafePromptError: if the prompt is refused and the policy is `"raise"`.
            UnsafeImageError: if an image is flagged and the policy is `"raise"`.
            ValueError: for arguments outside their range.
        """
        if not isinstance(prompt, (str, EncodedPrompt)):
            raise ValueError(f"A prompt is a str, got {type(prompt).__name__}.")
        if options.get("output_type", "pil") != "pil":
            raise ValueError("VisCPMPaint returns PIL images; other outputs are those of its `pipeline`.")
        if not is_whole(num_images_per_prompt):
            raise ValueError(f"num_images_per_prompt is a whole number, got {num_images_per_prompt!r}.")
        if image_size is not None:
            if "height" in options or "width" in options:
                raise ValueError("Give either image_size or height and width.")
            options |= {"height": image_size, "width": image_size}
        options = {"use_guidance": True, **options}
        num_images = int(num_images_per_prompt) * (self.candidates if self.pipeline.ranker is not None else 1)
        generators, seeds = self._generators(generator, num_images)
        texts: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt}
        refused = None
        if isinstance(prompt, EncodedPrompt):
            texts, refused = self._texts_of(prompt, negative_prompt), prompt.reason
            prompt, negative_prompt = prompt.prompt, prompt.negative_prompt
        with self.scheduled(scheduler):
            output = self.pipeline(
                **texts,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                num_images_per_prompt=num_images,
                generator=generators,
                prompt_policy=self.prompt_policy,
                image_policy=self.image_policy,
                **options,
            )
            settings = call_settings(self.pipeline, num_inference_steps, guidance_scale, options)
        flags = output.nsfw_content_detected or [False] * num_images
        reasons = output.flag_reasons or [None] * num_images
        images = output.images
        if refused is not None:
            flags = [True] * num_images
            reasons = ["; ".join(filter(None, (refused, reason))) for reason in reasons]
            if self.prompt_policy == "black":
                images = [PIL.Image.new("RGB", image.size) for image in images]
        result = self.rank(prompt, images, seeds, flags, reasons)
        return replace(result, negative_prompt=negative_prompt, settings=settings)

    @contextmanager
    def scheduled(self, scheduler: str | SchedulerMixin | None) -> Iterator[None]:
        """Draws with another scheduler meanwhile; None leaves the pipeline's."""
        own = self.pipeline.scheduler
        if scheduler is not None:
            self.pipeline.scheduler = make_scheduler(scheduler, own)
        try:
            yield
        finally:
            self.pipeline.scheduler = own

    # --------------------------------------------------------------------------------------- encoded once, drawn later

    def encode(self, prompts: Sequence[str], negative_prompt: str | None = None) -> list[EncodedPrompt]:
        """Checks and encodes prompts, all in one pass (64 texts each), to be drawn one by one later.

        After it [`free_text_encoder`] gives back nine tenths of the memory.
        """
        reasons = self.pipeline.check_prompt(list(prompts), "flag") or [None] * len(prompts)
        encoded = []
        for begin in range(0, len(prompts), ENCODED_TOGETHER - 1):  # and the negative prompt
            texts = list(prompts[begin : begin + ENCODED_TOGETHER - 1])
            pair = self.pipeline.encode_prompt(texts, negative_prompt=negative_prompt)
            for row, text in enumerate(texts):
                embeds = torch.stack([side[row] for side in pair])
                # Without what the longest prompt of the batch has added to the others.
                length = int((embeds != 0).any(-1).any(0).nonzero().max()) + 1
                own, negative = embeds[:, None, :length].clone()
                encoded.append(EncodedPrompt(text, negative_prompt, own, negative, reasons[begin + row]))
        return encoded

    def free_text_encoder(self) -> None:
        """Drops text encoder and prompt checker: from then on only what [`encode`] has returned can be drawn."""
        self.pipeline.free_text_encoder()
        self.pipeline.prompt_checker = None

    def _texts_of(self, prompt: EncodedPrompt, negative_prompt: str | None) -> dict[str, torch.Tensor]:
        if negative_prompt is not None:
            raise ValueError("The negative prompt of an encoded prompt was encoded with it: give it to `encode`.")
        if prompt.reason is not None and self.prompt_policy == "raise":
            raise UnsafePromptError(f"The prompt {prompt.prompt[:40]!r} was refused: {prompt.reason}.")
        return {
            "prompt_embeds": prompt.prompt_embeds,
            "negative_prompt_embeds": prompt.negative_prompt_embeds,
        }

    # -------------------------------------------------------------------------------------------------- drawn again

    def draw_again(self, record: Record | str | os.PathLike) -> PaintResult:
        """Draws the image of a PNG file (of command, API or page) again, with this model.

        Raises:
            RecordError: if the file doesn't say how.
            ValueError: if it was drawn with LoRAs that aren't loaded, or others are.
        """
        record = record if isinstance(record, Record) else read_record(record)
        pipeline = self.pipeline
        active = sorted(pipeline.get_active_adapters()) if getattr(pipeline.unet, "peft_config", None) else []
        if active != record.lora:
            raise ValueError(
                f"The image was drawn with these LoRAs: {', '.join(record.lora) or 'none'}; loaded are: "
                f"{', '.join(active) or 'none'} (pipeline.load_lora_weights, adapter_name=...)."
            )
        scheduler = scheduler_class(record.scheduler)[0].from_config(record.scheduler_config)
        candidates, self.candidates = self.candidates, 1
        try:
            return self.generate_all(
                record.prompt,
                record.negative_prompt or None,
                guidance_scale=record.guidance_scale,
                generator=record.seed,
                num_inference_steps=record.steps,
                scheduler=scheduler,
                height=record.height,
                width=record.width,
                **record.options,
            )
        finally:
            self.candidates = candidates

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


def _load_image_checker(model: Path, source: bool | str | os.PathLike, hub: Mapping[str, Any]) -> dict[str, Any]:
    def load(place: str, **kwargs) -> dict[str, Any]:
        # In folders of diffusers the two lie side by side.
        sibling = Path(place).parent / "feature_extractor"
        is_pair = Path(place).is_dir() and not (Path(place) / "preprocessor_config.json").is_file()
        return {
            "safety_checker": load_whole(StableDiffusionSafetyChecker, place, **kwargs),
            "feature_extractor": CLIPImageProcessor.from_pretrained(sibling if is_pair else place, **kwargs),
        }

    beside = (model if model.is_dir() else model.parent) / "safety_checker"
    return _load_part(
        "image safety checker", "image_safety_checker", "--no-check-image", source, load, hub, model, "safety_checker",
        "feature_extractor", beside, (DEFAULT_SAFETY_CHECKER, {}),
    )  # fmt: skip


def _load_prompt_checker(model: Path, source: bool | str | os.PathLike, hub: Mapping[str, Any]) -> dict[str, Any]:
    def load(place: str, **kwargs) -> dict[str, Any]:
        return {
            "prompt_checker": load_whole(BertForSequenceClassification, place, **kwargs),
            "prompt_checker_tokenizer": AutoTokenizer.from_pretrained(place, trust_remote_code=False, **kwargs),
        }

    folder = model if model.is_dir() else model.parent
    return _load_part(
        "prompt safety checker", "prompt_safety_checker", "--no-check-prompt", source, load, hub, model,
        "prompt_checker", "prompt_checker_tokenizer", folder / PROMPT_CHECKER_FOLDER,
        (PROMPT_CHECKER_REPOSITORY, {"subfolder": PROMPT_CHECKER_FOLDER}),
    )  # fmt: skip


def _load_ranker(model: Path, source: bool | str | os.PathLike, hub: Mapping[str, Any]) -> dict[str, Any]:
    def load(place: str, **kwargs) -> dict[str, Any]:
        return {
            "ranker": load_whole(ChineseCLIPModel, place, **kwargs),
            "ranker_processor": ChineseCLIPProcessor.from_pretrained(place, **kwargs),
        }

    return _load_part(
        "ranker", "add_ranker", "--no-rank", source, load, hub, model, "ranker", "ranker_processor", None,
        (DEFAULT_RANKER, {}),
    )  # fmt: skip


def _load_part(
    what: str,
    argument: str,
    flag: str,
    source: bool | str | os.PathLike,
    load: Callable[..., dict[str, Any]],
    hub: Mapping[str, Any],
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
        # A revision is one of the model's repository.
        return load(place, **kwargs, **{name: value for name, value in hub.items() if name != "revision"})
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


# ---------------------------------------------------------------------------------------------------------- scheduler


def scheduler_class(name: str) -> tuple[type[SchedulerMixin], dict[str, Any]]:
    """A scheduler by its short name or by that of its class, and the options that make it so.

    Raises:
        ValueError: for a name that is neither.
    """
    class_name, options = ("DDPMScheduler", {}) if name == "reference" else SCHEDULERS.get(name.lower(), (name, {}))
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
    if scheduler == "reference":
        return reference_scheduler(current.config)
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
