"""Image to image with VisCPM-Paint: text to image that starts from a noised image."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.utils import replace_example_docstring

from .pipeline_output import VisCPMPaintPipelineOutput
from .pipeline_viscpm_paint import VisCPMPaintPipeline, _repeat


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

    def check_image_inputs(self, image, strength: float) -> None:
        if not 0 < strength <= 1:
            raise ValueError(f"`strength` has to be above 0 and at most 1 but is {strength}.")
        if image is None:
            raise ValueError("`image` input cannot be undefined.")
        if self.vae is None:
            raise ValueError("The pipeline has no VAE, which has to encode the image.")

    def default_size_of(self, image: PipelineImageInput) -> tuple[int, int]:
        """Height and width of an image, rounded down to what the UNet takes."""
        height, width = self.image_processor.get_default_height_width(image[0] if isinstance(image, list) else image)
        return height - height % 8, width - width % 8

    def encode_image(self, image: torch.Tensor, num_images: int, dtype, device, generator) -> torch.Tensor:
        """Pixels `(batch, 3, height, width)` in -1..1 -> scaled latents `(num_images, ...)`."""
        if num_images % len(image):
            raise ValueError(f"{len(image)} images can't be shared out to {num_images} results.")
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

    def prepare_image_latents(
        self, image, timestep, num_images, height, width, dtype, device, generator, latents=None, is_noise_only=False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Initial latents, the noise in them, and the image's own latents."""
        noise = self.prepare_latents(num_images, height, width, dtype, device, generator, latents)
        noise_only, noise = noise, noise / self.scheduler.init_noise_sigma
        image_latents = self.encode_image(image, num_images, dtype, device, generator)
        if is_noise_only:
            return noise_only, noise, image_latents
        return self.scheduler.add_noise(image_latents, noise, timestep.repeat(num_images)), noise, image_latents

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
    ) -> VisCPMPaintPipelineOutput | tuple:
        r"""
        The call function to the pipeline for generation. Arguments as of [`VisCPMPaintPipeline`], and

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them):
                The image or images to start from: one for all, or one per prompt.
            strength (`float`, *optional*, defaults to 0.8):
                How much is changed, above 0 to 1: the share of the steps that is run. At 1 nothing of the image is
                left, and the result is that of [`VisCPMPaintPipeline`].
            height (`int`, *optional*), width (`int`, *optional*):
                The image's own size unless given.
            latents (`torch.Tensor`, *optional*):
                Noise in place of a random draw.

        Examples:

        Returns:
            [`VisCPMPaintPipelineOutput`] or `tuple`, as [`VisCPMPaintPipeline`].
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 0. Check the image; its size is the default
        self.check_image_inputs(image, strength)
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

        # 5. Prepare latent variables
        dtype = prompt_embeds.dtype
        if strength == 1:  # nothing of the image is left
            latents = self.prepare_latents(num_images, height, width, dtype, device, generator, latents)
        else:
            pixels = self.image_processor.preprocess(image, height=height, width=width)
            latents, _, _ = self.prepare_image_latents(
                pixels, timesteps[:1], num_images, height, width, dtype, device, generator, latents
            )

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


__all__ = ["VisCPMPaintImg2ImgPipeline"]
