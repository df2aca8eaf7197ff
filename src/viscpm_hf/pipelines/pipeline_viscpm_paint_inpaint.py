"""Inpainting with VisCPM-Paint: what the mask leaves out is put back after every step."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.utils import replace_example_docstring

from .pipeline_output import VisCPMPaintPipelineOutput
from .pipeline_viscpm_paint import _repeat
from .pipeline_viscpm_paint_img2img import VisCPMPaintImg2ImgPipeline


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers.utils import load_image
        >>> from viscpm_hf import VisCPMPaintInpaintPipeline

        >>> pipe = VisCPMPaintInpaintPipeline.from_pretrained("path/to/paint", dtype=torch.float16).to("cuda")
        >>> image = pipe("一只猫", load_image("sofa.png"), load_image("mask.png")).images[0]
        ```
"""


class VisCPMPaintInpaintPipeline(VisCPMPaintImg2ImgPipeline):
    r"""
    Pipeline for text-guided inpainting with VisCPM-Paint's own, 4-channel UNet; components and encoding are those of
    [`VisCPMPaintPipeline`].
    """

    def prepare_mask(self, mask_image, num_images: int, height: int, width: int, dtype, device) -> torch.Tensor:
        """The mask at the size of the latents, `(num_images, 1, height, width)`, 1 where something new is drawn."""
        mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )
        mask = mask_processor.preprocess(mask_image, height=height, width=width)
        mask = torch.nn.functional.interpolate(mask, size=self._latent_size(height, width)[1:])
        if num_images % len(mask):
            raise ValueError(f"{len(mask)} masks can't be shared out to {num_images} results.")
        return mask.repeat_interleave(num_images // len(mask), dim=0).to(device, dtype)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float = 1.0,
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
        guidance_rescale: float = 0.0,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (diffusers' own default)
        prompt_policy: str = "raise",
        image_policy: str = "black",
    ) -> VisCPMPaintPipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation. Arguments as of [`VisCPMPaintImg2ImgPipeline`], and

        Args:
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                White where something new is drawn, black where the image stays.
            strength (`float`, *optional*, defaults to 1.0):
                How much of the masked part is changed, above 0 to 1. At 1 nothing of it is left.

        Examples:

        Returns:
            [`VisCPMPaintPipelineOutput`] or `tuple`, as [`VisCPMPaintPipeline`].
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 0. Check image and mask; the image's size is the default
        self.check_image_inputs(image, strength)
        if mask_image is None:
            raise ValueError("`mask_image` input cannot be undefined.")
        if self.unet.config.in_channels != self.vae.config.latent_channels:
            raise ValueError(
                f"This pipeline needs a UNet of {self.vae.config.latent_channels} input channels, not "
                f"{self.unet.config.in_channels}."
            )
        default_height, default_width = self.default_size_of(image)
        height = default_height if height is None else height
        width = default_width if width is None else width

        # 1. Check inputs. Raise error if not correct
        self.check_inputs(
            prompt,
            height,
            width,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            callback_on_step_end_tensor_inputs,
            latents,
            num_images_per_prompt,
            num_inference_steps,
            output_type,
            prompt_policy,
            image_policy,
        )
        self._guidance_scale = guidance_scale
        self._guidance_rescale = guidance_rescale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False

        # 2. Define call parameters
        prompt = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompt) if prompt is not None else prompt_embeds.shape[0]
        num_images = batch_size * num_images_per_prompt
        device = self._execution_device

        # 3. Check and encode input prompt
        prompt_reasons = self.check_prompt(prompt, prompt_policy)
        prompt_embeds, negative_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            self.do_classifier_free_guidance,
            negative_prompt,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            lora_scale=(cross_attention_kwargs or {}).get("scale"),
        )

        # 4. Prepare timesteps
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )
        timesteps, num_inference_steps = self.get_timesteps(num_inference_steps, strength)

        # 5. Prepare latent variables and the mask
        pixels = self.image_processor.preprocess(image, height=height, width=width)
        dtype = prompt_embeds.dtype
        latents, noise, image_latents = self.prepare_image_latents(
            pixels, timesteps[:1], num_images, height, width, dtype, device, generator, latents, strength == 1
        )
        mask = self.prepare_mask(mask_image, num_images, height, width, dtype, device)

        def keep_image(i: int, latents: torch.Tensor) -> torch.Tensor:
            """Puts the image back where it stays, as noisy as the next step expects it."""
            kept = image_latents
            if i < len(timesteps) - 1:
                kept = self.scheduler.add_noise(image_latents, noise, timesteps[i + 1 : i + 2].repeat(num_images))
            return (1 - mask) * kept + mask * latents

        # 6. Denoising loop
        latents = self.denoise(
            latents,
            timesteps,
            num_inference_steps,
            prompt_embeds,
            negative_prompt_embeds,
            self.prepare_extra_step_kwargs(generator, eta),
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            after_step=keep_image,
        )

        # 7. Decode and check images
        return self.finish(
            latents,
            output_type,
            generator,
            _repeat(prompt_reasons, num_images_per_prompt),
            prompt_policy,
            image_policy,
            return_dict,
        )


__all__ = ["VisCPMPaintInpaintPipeline"]
