"""Image to image with VisCPM-Paint: text to image that starts from a noised image."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils import replace_example_docstring

from .image_inputs import check_share, read_images, share_out, size_of, to_pixels
from .pipeline_output import VisCPMPaintPipelineOutput
from .pipeline_viscpm_paint import SIZE_MULTIPLE, Start, VisCPMPaintPipeline


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from diffusers.utils import load_image
        >>> from viscpm_hf import VisCPMPaintImg2ImgPipeline

        >>> pipe = VisCPMPaintImg2ImgPipeline.from_pretrained("path/to/paint", dtype=torch.float16).to("cuda")
        >>> image = pipe("水墨画", load_image("sketch.png"), strength=0.7).images[0]
        ```
"""


class VisCPMPaintImg2ImgPipeline(VisCPMPaintPipeline):
    r"""
    Pipeline for text-guided image-to-image generation with VisCPM-Paint; components and encoding are those of
    [`VisCPMPaintPipeline`].
    """

    def get_timesteps(self, num_inference_steps: int, strength: float) -> tuple[torch.Tensor, int]:
        """The timesteps from where an image that is noised by `strength` stands."""
        init_timestep = min(int(num_inference_steps * strength), num_inference_steps)
        if init_timestep < 1:
            raise ValueError(
                f"With strength {strength} none of {num_inference_steps} steps is left: raise either of them."
            )
        t_start = num_inference_steps - init_timestep
        timesteps = self.scheduler.timesteps[t_start * self.scheduler.order :]
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(t_start * self.scheduler.order)
        return timesteps, init_timestep

    def read_source(self, image: PipelineImageInput | None, strength: float) -> None:
        """Checks and keeps what this call starts from."""
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` has to be above 0 and at most 1 but is {strength}.")
        if image is None:
            raise ValueError("`image` input cannot be undefined.")
        self._image = read_images(image, self.unet.config.out_channels)
        self._strength = strength
        if self.vae is None and not isinstance(self._image, torch.Tensor):
            raise ValueError("The pipeline has no VAE, which has to encode the image.")

    def image_size(self) -> tuple[int, int]:
        """Height and width of this call's image, rounded down to what the UNet takes."""
        image = self._image
        if isinstance(image, torch.Tensor):
            height, width = (size * self.vae_scale_factor for size in image.shape[2:])
            return height, width
        height, width = size_of(image[0])
        if min(height, width) < SIZE_MULTIPLE:
            raise ValueError(
                f"`image` is {width} x {height} pixels, but {SIZE_MULTIPLE} x {SIZE_MULTIPLE} is the least: enlarge "
                "it, or give height and width."
            )
        return height - height % SIZE_MULTIPLE, width - width % SIZE_MULTIPLE

    def check_source(self, num_prompts: int, num_images: int, height: int, width: int) -> None:
        check_share(len(self._image), num_prompts, num_images, "image")
        if isinstance(self._image, torch.Tensor):
            size = tuple(self._image.shape[2:])
            if size != self._latent_size(height, width)[1:]:
                raise ValueError(
                    f"`image` are latents of {size[0]} x {size[1]}, which is {size[0] * self.vae_scale_factor} x "
                    f"{size[1] * self.vae_scale_factor} pixels, but {height} x {width} (height x width) are asked "
                    "for: latents aren't resized, torch.nn.functional.interpolate can do that."
                )

    def encode_image(self, image: torch.Tensor, num_images: int, dtype, device, generator) -> torch.Tensor:
        """Pixels `(batch, 3, height, width)` in -1..1 -> scaled latents `(num_images, ...)`."""
        image = image.repeat_interleave(num_images // len(image), dim=0).to(device, self.vae.dtype)
        if isinstance(generator, list):
            latents = torch.cat(
                [
                    retrieve_latents(self.vae.encode(image[index : index + 1]), generator=generator[index])
                    for index in range(num_images)
                ]
            )
        else:
            latents = retrieve_latents(self.vae.encode(image), generator=generator)
        return (latents * self.vae.config.scaling_factor).to(dtype)

    def image_latents(self, num_prompts, num_images, height, width, dtype, device, generator) -> torch.Tensor:
        """Scaled latents `(num_images, ...)` of this call's images."""
        if isinstance(self._image, torch.Tensor):
            return share_out(self._image, num_prompts, num_images, "image").to(device, dtype)
        pixels = to_pixels(self._image, height, width) * 2 - 1
        return self.encode_image(pixels, num_images, dtype, device, generator)

    def prepare_start(
        self, timesteps, num_inference_steps, num_prompts, num_images, height, width, dtype, device, generator, latents
    ) -> Start:
        """At the step that the image, noised by the strength, stands for; noise alone at strength 1."""
        timesteps, num_inference_steps = self.get_timesteps(num_inference_steps, self._strength)
        noise = self.prepare_latents(num_images, height, width, dtype, device, generator, latents)
        if self._strength == 1:  # nothing of the image is left
            return Start(timesteps, num_inference_steps, noise)
        image = self.image_latents(num_prompts, num_images, height, width, dtype, device, generator)
        noise = noise / self.scheduler.init_noise_sigma
        latents = self.scheduler.add_noise(image, noise, timesteps[:1].repeat(num_images))
        return Start(timesteps, num_inference_steps, latents)

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        strength: float = 0.8,
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
        The call function to the pipeline for generation. Arguments as of [`VisCPMPaintPipeline`], and

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                The image or images to start from: one for all, one a prompt, or one a result. PIL images of every
                mode (transparency on white); arrays and tensors `(H, W)`, `(H, W, C)`, `(C, H, W)` or batches of
                them, bytes (uint8) or floats in 0..1 (or -1..1); or latents `(4, h, w)`, `(N, 4, h, w)` as
                `output_type="latent"` returns them.
            strength (`float`, *optional*, defaults to 0.8):
                How much is changed, above 0 to 1: the share of the steps that is run. At 1 nothing of the image is
                left, and the result is that of [`VisCPMPaintPipeline`].
            height (`int`, *optional*), width (`int`, *optional*):
                The image's own size unless given, rounded down to a multiple of 8.
            latents (`torch.Tensor`, *optional*):
                Noise in place of a random draw.

        Examples:

        Returns:
            [`VisCPMPaintPipelineOutput`] or `tuple`, as [`VisCPMPaintPipeline`].
        """
        try:
            self.read_source(image, strength)
            return super().__call__(
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
            self._image = None


__all__ = ["VisCPMPaintImg2ImgPipeline"]
