"""Text to image with VisCPM-Paint, guided by ControlNets of Stable Diffusion 2.1 (arXiv:2302.05543)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.models import AutoencoderKL, ControlNetModel, MultiControlNetModel, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import replace_example_docstring
from transformers import (
    BertForSequenceClassification,
    BertTokenizerFast,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPImageProcessor,
)

from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from ..modeling.tokenization_cpm_bee import CpmBeeTokenizer
from .image_inputs import check_share, read_images, share_out, size_of, to_pixels
from .pipeline_output import VisCPMPaintPipelineOutput
from .pipeline_viscpm_paint import SIZE_MULTIPLE, VisCPMPaintPipeline
from .prompt_safety import UNSAFE_SCORE


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers import ControlNetModel
        >>> from diffusers.utils import load_image
        >>> from viscpm_hf import VisCPMPaintControlNetPipeline

        >>> controlnet = ControlNetModel.from_pretrained("path/to/controlnet-of-sd21", dtype=torch.float16)
        >>> pipe = VisCPMPaintControlNetPipeline.from_pretrained(
        ...     "path/to/paint", controlnet=controlnet, dtype=torch.float16
        ... ).to("cuda")
        >>> image = pipe("水墨画", load_image("edges.png")).images[0]
        ```
"""


class VisCPMPaintControlNetPipeline(VisCPMPaintPipeline):
    r"""
    Pipeline for text-to-image generation with VisCPM-Paint and ControlNets; other components and encoding are those of
    [`VisCPMPaintPipeline`].

    Args:
        controlnet ([`ControlNetModel`], [`MultiControlNetModel`] or a list): made for Stable Diffusion 2.1, whose UNet
            and width of text states (1024) VisCPM-Paint has.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: VisCPMPaintTextEncoder,
        tokenizer: CpmBeeTokenizer,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel | list[ControlNetModel] | tuple[ControlNetModel] | MultiControlNetModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        prompt_checker: BertForSequenceClassification | None = None,
        prompt_checker_tokenizer: BertTokenizerFast | None = None,
        ranker: ChineseCLIPModel | None = None,
        ranker_processor: ChineseCLIPProcessor | None = None,
        mask_padding: bool = False,
        prompt_check_threshold: float = UNSAFE_SCORE,
    ):
        super().__init__(
            vae,
            text_encoder,
            tokenizer,
            unet,
            scheduler,
            safety_checker,
            feature_extractor,
            prompt_checker,
            prompt_checker_tokenizer,
            ranker,
            ranker_processor,
            mask_padding,
            prompt_check_threshold,
        )
        if isinstance(controlnet, (list, tuple)):
            controlnet = MultiControlNetModel(controlnet)
        for net in _nets(controlnet) if unet is not None and controlnet is not None else ():
            for name in ("cross_attention_dim", "block_out_channels", "in_channels"):
                own, wanted = getattr(net.config, name), getattr(unet.config, name)
                if (list(own) if isinstance(own, (list, tuple)) else own) != (
                    list(wanted) if isinstance(wanted, (list, tuple)) else wanted
                ):
                    raise ValueError(
                        f"The ControlNet's {name} is {own}, but the UNet's {wanted}: ControlNets for Stable Diffusion "
                        "2.1 fit, those for other versions don't."
                    )
        self.register_modules(controlnet=controlnet)
        self._control = None

    def read_control(self, image: Any, scale: Any, start: Any, end: Any, guess_mode: bool) -> None:
        """Checks and keeps this call's control images and how they count."""
        nets = _nets(self.controlnet)
        is_multi = isinstance(self.controlnet, MultiControlNetModel)
        if image is None:
            raise ValueError("`image` input cannot be undefined: it is what the ControlNet goes by.")
        images = image if is_multi else [image]
        if not isinstance(images, (list, tuple)) or len(images) != len(nets):
            raise ValueError(
                f"`image` has to be a list of {len(nets)}, one for each ControlNet (each may be a list itself)."
            )
        columns = {}
        for name, value in (
            ("controlnet_conditioning_scale", scale),
            ("control_guidance_start", start),
            ("control_guidance_end", end),
        ):
            values = list(value) if isinstance(value, (list, tuple)) else [value] * len(nets)
            if len(values) != len(nets) or not all(
                isinstance(one, (int, float)) and math.isfinite(one) for one in values
            ):
                raise ValueError(f"`{name}` has to be a number, or {len(nets)} in a list, but is {value!r}.")
            columns[name] = values
        for begin, finish in zip(columns["control_guidance_start"], columns["control_guidance_end"], strict=True):
            if not 0 <= begin < finish <= 1:
                raise ValueError(
                    f"The ControlNet acts from {begin} to {finish} of the steps: 0 <= control_guidance_start < "
                    "control_guidance_end <= 1 is wanted."
                )
        self._control = {
            "images": [read_images(one) for one in images],
            "scales": columns["controlnet_conditioning_scale"],
            "spans": list(zip(columns["control_guidance_start"], columns["control_guidance_end"], strict=True)),
            "guess_mode": guess_mode or nets[0].config.global_pool_conditions,
        }

    def control_size(self) -> tuple[int, int]:
        """Height and width of the first control image, rounded down to what the UNet takes."""
        height, width = (size - size % SIZE_MULTIPLE for size in size_of(self._control["images"][0][0]))
        return height, width

    def check_source(self, num_prompts: int, num_images: int, height: int, width: int) -> None:
        for images in self._control["images"]:
            check_share(len(images), num_prompts, num_images, "image")
        self._control["pixels"] = [
            share_out(to_pixels(images, height, width), num_prompts, num_images, "image")
            for images in self._control["images"]
        ]

    def unet_residuals(
        self,
        i: int,
        t: torch.Tensor,
        sample: torch.Tensor,
        prompt_embeds: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        is_guided: bool,
    ) -> dict[str, Any]:
        """The ControlNets' residuals of one step."""
        control, num_steps = self._control, self._num_timesteps
        scales = [
            0.0 if i / num_steps < begin or (i + 1) / num_steps > finish else scale
            for scale, (begin, finish) in zip(control["scales"], control["spans"], strict=True)
        ]
        if not any(scales):
            return {}
        only_prompt = control["guess_mode"] and is_guided
        if only_prompt:  # what isn't prompted stays as it is
            sample, prompt_embeds = sample.chunk(2)[1], prompt_embeds.chunk(2)[1]
            encoder_attention_mask = None if encoder_attention_mask is None else encoder_attention_mask.chunk(2)[1]
        dtype = self.controlnet.dtype
        pixels = [image.to(sample.device, dtype) for image in control["pixels"]]
        pixels = [image.repeat(len(sample) // len(image), 1, 1, 1) for image in pixels]
        is_multi = isinstance(self.controlnet, MultiControlNetModel)

        def run(rows: torch.Tensor, states: torch.Tensor) -> list[torch.Tensor]:
            images = [image[rows] for image in pixels]
            down, middle = self.controlnet(
                sample[rows].to(dtype),
                t,
                encoder_hidden_states=states.to(dtype),
                controlnet_cond=images if is_multi else images[0],
                conditioning_scale=scales if is_multi else scales[0],
                guess_mode=control["guess_mode"],
                return_dict=False,
            )
            return [*down, middle]

        residuals = _by_length(run, prompt_embeds, encoder_attention_mask)
        residuals = [residual.to(sample.dtype) for residual in residuals]
        if only_prompt:
            residuals = [torch.cat([torch.zeros_like(residual), residual]) for residual in residuals]
        return {
            "down_block_additional_residuals": residuals[:-1],
            "mid_block_additional_residual": residuals[-1],
        }

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' own default)
        guidance_rescale: float = 0.0,
        prompt_policy: str = "raise",
        image_policy: str = "black",
        use_guidance: bool | None = None,
    ) -> VisCPMPaintPipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation. Arguments as of [`VisCPMPaintPipeline`], and

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                What the ControlNet goes by: edges, depths, poses ...; one for all, one a prompt, or one a result, of
                any kind but latents, see [`VisCPMPaintImg2ImgPipeline`]. A list of these, one a ControlNet, if there
                are several.
            height (`int`, *optional*), width (`int`, *optional*):
                The first image's own size unless given, rounded down to a multiple of 8.
            controlnet_conditioning_scale (`float` or `list[float]`, *optional*, defaults to 1.0):
                Weight of the ControlNets; one for all, or one each.
            guess_mode (`bool`, *optional*, defaults to `False`):
                Lets the ControlNet act on the prompted half alone; for drawing without a prompt.
            control_guidance_start, control_guidance_end (`float` or `list[float]`, *optional*):
                The share of the steps at which the ControlNets begin and end to act.

        Examples:

        Returns:
            [`VisCPMPaintPipelineOutput`] or `tuple`, as [`VisCPMPaintPipeline`].
        """
        try:
            self.read_control(
                image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end, guess_mode
            )
            return super().__call__(
                prompt,
                self.control_size()[0] if height is None else height,
                self.control_size()[1] if width is None else width,
                num_inference_steps,
                timesteps,
                sigmas,
                guidance_scale,
                negative_prompt,
                num_images_per_prompt,
                eta,
                generator,
                latents,
                prompt_embeds,
                negative_prompt_embeds,
                output_type,
                return_dict,
                cross_attention_kwargs,
                guidance_rescale,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                prompt_policy,
                image_policy,
                use_guidance,
            )
        finally:
            self._control = None


def _nets(controlnet: ControlNetModel | MultiControlNetModel) -> Sequence[ControlNetModel]:
    return controlnet.nets if isinstance(controlnet, MultiControlNetModel) else [controlnet]


def _by_length(
    run: Callable[[torch.Tensor, torch.Tensor], list[torch.Tensor]],
    prompt_embeds: torch.Tensor,
    is_token: torch.Tensor | None,
) -> list[torch.Tensor]:
    """`run(rows, embeddings)` of all rows; those of equally many tokens together, since a ControlNet takes no mask."""
    if is_token is None:
        return run(torch.arange(len(prompt_embeds), device=prompt_embeds.device), prompt_embeds)
    lengths = is_token.sum(-1).clamp(min=1)
    whole: list[torch.Tensor] = []
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        # Attention to the states knows no order, so only their number counts.
        order = is_token[rows].int().argsort(dim=-1, descending=True, stable=True)[:, :length]
        states = prompt_embeds[rows].gather(1, order[..., None].expand(-1, -1, prompt_embeds.shape[-1]))
        for index, residual in enumerate(run(rows, states)):
            if len(whole) <= index:
                whole.append(residual.new_empty(len(prompt_embeds), *residual.shape[1:]))
            whole[index][rows] = residual
    return whole


__all__ = ["VisCPMPaintControlNetPipeline"]
