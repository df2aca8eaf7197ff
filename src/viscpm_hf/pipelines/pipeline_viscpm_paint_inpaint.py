"""Inpainting with VisCPM-Paint: what the mask leaves out is put back after every step."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.utils import replace_example_docstring

from .image_inputs import check_share, read_masks, share_out, to_pixels
from .pipeline_output import VisCPMPaintPipelineOutput
from .pipeline_viscpm_paint import Start, VisCPMPaintPipeline
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

    def read_source(self, image, strength: float, mask_image: PipelineImageInput | None = None) -> None:
        if mask_image is None:
            raise ValueError("`mask_image` input cannot be undefined.")
        if self.unet.config.in_channels != self.unet.config.out_channels:
            raise ValueError(
                f"This pipeline needs a UNet of {self.unet.config.out_channels} input channels, not "
                f"{self.unet.config.in_channels}."
            )
        super().read_source(image, strength)
        self._mask = read_masks(mask_image)

    def check_source(self, num_prompts: int, num_images: int, height: int, width: int) -> None:
        super().check_source(num_prompts, num_images, height, width)
        check_share(len(self._mask), num_prompts, num_images, "mask")

    def prepare_mask(self, num_prompts, num_images, height, width, dtype, device) -> torch.Tensor:
        """The mask at the size of the latents, `(num_images, 1, height, width)`, 1 where something new is drawn."""
        mask = (to_pixels(self._mask, height, width) >= 0.5).float()
        mask = torch.nn.functional.interpolate(mask, size=self._latent_size(height, width)[1:])
        return share_out(mask, num_prompts, num_images, "mask").to(device, dtype)

    def prepare_start(
        self, timesteps, num_inference_steps, num_prompts, num_images, height, width, dtype, device, generator, latents
    ) -> Start:
        """As from an image; what the mask leaves out is put back after every step."""
        timesteps, num_inference_steps = self.get_timesteps(num_inference_steps, self._strength)
        first = self.prepare_latents(num_images, height, width, dtype, device, generator, latents)
        noise = first / self.scheduler.init_noise_sigma
        image = self.image_latents(num_prompts, num_images, height, width, dtype, device, generator)
        mask = self.prepare_mask(num_prompts, num_images, height, width, dtype, device)

        def keep_image(i: int, latents: torch.Tensor) -> torch.Tensor:
            """Puts the image back where it stays, as noisy as the next step expects it."""
            kept = image
            if i < len(timesteps) - 1:
                kept = self.scheduler.add_noise(image, noise, timesteps[i + 1 : i + 2].repeat(num_images))
            return (1 - mask) * kept + mask * latents

        if self._strength < 1:
            first = self.scheduler.add_noise(image, noise, timesteps[:1].repeat(num_images))
        return Start(timesteps, num_inference_steps, first, after_step=keep_image)

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
        use_guidance: bool | None = None,
    ) -> VisCPMPaintPipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation. Arguments as of [`VisCPMPaintImg2ImgPipeline`], and

        Args:
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                White (1, True) where something new is drawn, black where the image stays; the kinds of `image`, but
                latents: one for all, one a prompt, or one a result.
            strength (`float`, *optional*, defaults to 1.0):
                How much of the masked part is changed, above 0 to 1. At 1 nothing of it is left.

        Examples:

        Returns:
            [`VisCPMPaintPipelineOutput`] or `tuple`, as [`VisCPMPaintPipeline`].
        """
        try:
            self.read_source(image, strength, mask_image)
            return VisCPMPaintPipeline.__call__(
                self,
                prompt,
                self.image_size()[0] if height is None else height,
                self.image_size()[1] if width is None else width,
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
            self._image = self._mask = None


__all__ = ["VisCPMPaintInpaintPipeline"]
