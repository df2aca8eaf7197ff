"""Text to image with VisCPM-Paint: CPM-Bee as the text encoder of a Stable Diffusion 2.1 UNet (arXiv:2308.12038)."""

import inspect
import math
import numbers
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.models import AutoencoderKL, UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging, replace_example_docstring, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import randn_tensor
from transformers import (
    BatchEncoding,
    BertForSequenceClassification,
    BertTokenizerFast,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPImageProcessor,
)

from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from ..modeling.tokenization_cpm_bee import CpmBeeTokenizer
from .lora_files import (
    adapters_of,
    check_savable,
    fitting_lora,
    is_empty,
    remove_adapters,
    scale_by_alphas,
    unreadable,
)
from .opening import open_pipeline
from .pipeline_output import VisCPMPaintPipelineOutput
from .prompt_safety import UNSAFE_SCORE, UnsafePromptError, check_prompts
from .ranking import has_chinese, score_images
from .safety import UnsafeImageError
from .saving_viscpm_paint import save_code


logger = logging.get_logger(__name__)

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import torch
        >>> from viscpm_hf import VisCPMPaintPipeline

        >>> pipe = VisCPMPaintPipeline.from_pretrained("path/to/paint", dtype=torch.float16).to("cuda")
        >>> image = pipe("人闲桂花落，月静春山空", generator=torch.Generator().manual_seed(0)).images[0]
        ```
"""

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
POLICIES = ("black", "flag", "raise")

# Sizes of images in pixels. The UNet was trained at 512; far beyond that there is only memory to run out of.
SIZE_MULTIPLE = 8
MAX_SIZE = 4096

# What the original samples with. The scheduler_config.json of Stable Diffusion 2.1 has steps_offset 1, which the
# original's diffusers did not use.
REFERENCE_SCHEDULER_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "variance_type": "fixed_small",
    "clip_sample": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
}


@dataclass
class Start:
    """Where denoising begins."""

    timesteps: torch.Tensor
    num_inference_steps: int
    latents: torch.Tensor
    after_step: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    """`after_step(i, latents)` may change the latents of every step."""


class VisCPMPaintPipeline(DiffusionPipeline, StableDiffusionMixin, StableDiffusionLoraLoaderMixin):
    r"""
    Pipeline for text-to-image generation with VisCPM-Paint.

    This model inherits from [`DiffusionPipeline`]; see there for the generic methods (downloading, saving, running on
    a particular device, etc.). It also inherits
    [`~loaders.StableDiffusionLoraLoaderMixin.load_lora_weights`] and
    [`~loaders.StableDiffusionLoraLoaderMixin.save_lora_weights`].

    Rows of `prompt_embeds` that are all zero are no tokens: the UNet does not see them. So embeddings of different
    lengths are joined into one batch by padding them with zeros, and an image does not depend on the other prompts of
    its batch.

    Args:
        vae ([`AutoencoderKL`]): the autoencoder of Stable Diffusion 2.1.
        text_encoder ([`VisCPMPaintTextEncoder`]): CPM-Bee and a projection.
        tokenizer ([`CpmBeeTokenizer`]): its tokenizer.
        unet ([`UNet2DConditionModel`]): denoises the latents.
        scheduler ([`SchedulerMixin`]): any Karras scheduler. The original's is [`DDPMScheduler`].
        safety_checker ([`StableDiffusionSafetyChecker`], *optional*), feature_extractor ([`CLIPImageProcessor`],
            *optional*): check the images.
        prompt_checker ([`BertForSequenceClassification`], *optional*), prompt_checker_tokenizer
            ([`BertTokenizerFast`], *optional*): check the prompts.
        ranker ([`ChineseCLIPModel`], *optional*), ranker_processor ([`ChineseCLIPProcessor`], *optional*): score how
            well images fit a prompt, see [`~VisCPMPaintPipeline.rank_images`].
        mask_padding (`bool`, *optional*, defaults to `False`): hides padding from the UNet. In the original the UNet
            sees the rows by which the shorter one of prompt and negative prompt is padded.
        prompt_check_threshold (`float`, *optional*, defaults to 0.75): score above which a prompt is refused.
    """

    model_cpu_offload_seq = "prompt_checker->text_encoder->unet->vae->safety_checker->ranker"
    _optional_components = [
        "safety_checker",
        "feature_extractor",
        "prompt_checker",
        "prompt_checker_tokenizer",
        "ranker",
        "ranker_processor",
    ]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: VisCPMPaintTextEncoder,
        tokenizer: CpmBeeTokenizer,
        unet: UNet2DConditionModel,
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
        super().__init__()
        for model, processor in (
            ("safety_checker", "feature_extractor"),
            ("prompt_checker", "prompt_checker_tokenizer"),
            ("ranker", "ranker_processor"),
        ):
            if locals()[model] is not None and locals()[processor] is None:
                raise ValueError(f"`{model}` needs a `{processor}`.")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            prompt_checker=prompt_checker,
            prompt_checker_tokenizer=prompt_checker_tokenizer,
            ranker=ranker,
            ranker_processor=ranker_processor,
        )
        self.register_to_config(mask_padding=mask_padding, prompt_check_threshold=prompt_check_threshold)
        vae = getattr(self, "vae", None)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self._empty_prompt = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "VisCPMPaintPipeline":
        """As [`DiffusionPipeline.from_pretrained`]; also takes a folder or Hub id in the original's layout.

        Raises:
            OriginalCheckpointError: if the original files can't be used; the message says why.
        """
        return open_pipeline(super().from_pretrained, cls, pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As [`DiffusionPipeline.save_pretrained`], and the code that loads the folder without this package.

        Raises:
            ValueError: if a model has a LoRA in it, which would be lost.
        """
        check_savable(self.components)
        super().save_pretrained(save_directory, *args, **kwargs)
        save_code(save_directory, type(self).__module__.rpartition(".")[2], type(self).__name__)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ) -> None:
        """As [`StableDiffusionLoraLoaderMixin.load_lora_weights`], all or nothing.

        Files for Stable Diffusion 2.1 often have a half for its text encoder, CLIP: it is skipped, with a warning.

        Raises:
            ValueError: if the file is made for another model. Nothing is loaded then.
        """
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        source = pretrained_model_name_or_path_or_dict
        source = dict(source) if isinstance(source, dict) else source
        try:
            found, alphas, metadata = self.lora_state_dict(source, **{**kwargs, "return_lora_metadata": True})
        except (ValueError, KeyError) as error:
            raise unreadable(error) from error
        if is_empty(found):
            logger.warning("The LoRA's %d tensors are of no layer: nothing was loaded.", len(found))
            return
        state_dict, num_clip = fitting_lora(found, self.unet, self.text_encoder)
        scale_by_alphas(state_dict, alphas)
        if num_clip:
            logger.warning(
                "%d of the LoRA's %d tensors are for CLIP, which VisCPM-Paint doesn't have: they are skipped, and the "
                "LoRA acts on the UNet alone.",
                num_clip,
                len(found),
            )
        models = [model for model in (self.unet, self.text_encoder) if model is not None]
        before = [adapters_of(model) for model in models]
        options = {
            "network_alphas": None,
            "adapter_name": adapter_name,
            "metadata": metadata,
            "_pipeline": self,
            "low_cpu_mem_usage": low_cpu_mem_usage,
            "hotswap": hotswap,
        }
        try:
            if any(key.startswith("unet.") for key in state_dict):
                self.load_lora_into_unet(state_dict, unet=self.unet, **options)
            if any(key.startswith("text_encoder.") for key in state_dict):
                self.load_lora_into_text_encoder(
                    state_dict, text_encoder=self.text_encoder, lora_scale=self.lora_scale, **options
                )
        except Exception:
            for model, known in zip(models, before, strict=True):
                remove_adapters(model, adapters_of(model) - known)
            raise

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> "VisCPMPaintPipeline":
        """As [`DiffusionPipeline.from_pipe`]; what a freed text encoder left of the empty prompt comes along."""
        if kwargs.get("adapter") is not None:
            raise NotImplementedError(
                "T2I-Adapters aren't supported: there is none for Stable Diffusion 2.1's UNet. ControlNets for it "
                "are, with VisCPMPaintControlNetPipeline."
            )
        new = super().from_pipe(pipeline, **kwargs)
        if new.text_encoder is None:
            new._empty_prompt = getattr(pipeline, "_empty_prompt", None)
        return new

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "text_encoder" and value is not None:
            self._empty_prompt = None  # that of another encoder

    # -------------------------------------------------------------------------------------------------------- prompts

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        r"""
        Encodes prompts and negative prompts together, every text once.

        Args:
            prompt (`str` or `list[str]`, *optional*): prompts to be encoded.
            device (`torch.device`, *optional*): device of the result.
            num_images_per_prompt (`int`): how often each prompt's embeddings are repeated.
            do_classifier_free_guidance (`bool`): whether the negative prompts are needed.
            negative_prompt (`str` or `list[str]`, *optional*): what not to draw; `""` if None.
            prompt_embeds (`torch.Tensor`, *optional*): embeddings in place of `prompt`.
            negative_prompt_embeds (`torch.Tensor`, *optional*): embeddings in place of `negative_prompt`.
            lora_scale (`float`, *optional*): strength of the LoRAs of the text encoder, if there are any.

        Returns:
            `prompt_embeds` and `negative_prompt_embeds`, both `(batch * num_images_per_prompt, sequence, width)`; the
            latter None without guidance. The shorter one of each pair is padded as in the original, and all pairs of
            the batch are padded to one length with zeros.
        """
        device = device or self._execution_device
        prompts = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompts) if prompts is not None else prompt_embeds.shape[0]
        if negative_prompt is None or isinstance(negative_prompt, str):
            negative_prompts = [negative_prompt or ""] * batch_size
        else:
            negative_prompts = negative_prompt
        needs_negative = do_classifier_free_guidance and negative_prompt_embeds is None

        if prompt_embeds is None or needs_negative:
            texts = [] if prompt_embeds is not None else list(prompts)
            texts += negative_prompts if needs_negative else []
            if lora_scale is not None and self.text_encoder is not None:
                scale_lora_layers(self.text_encoder, lora_scale)
            encoded, padding = self._encode_texts(texts)
            if lora_scale is not None and self.text_encoder is not None:
                unscale_lora_layers(self.text_encoder, lora_scale)
            pairs = [
                (
                    encoded[prompts[row]] if prompt_embeds is None else _without_zeros(prompt_embeds[row]),
                    encoded[negative_prompts[row]]
                    if needs_negative
                    else (_without_zeros(negative_prompt_embeds[row]) if do_classifier_free_guidance else None),
                )
                for row in range(batch_size)
            ]
            prompt_embeds, negative_prompt_embeds = self._pad_pairs(pairs, padding)

        dtype = self.unet.dtype if self.unet is not None else prompt_embeds.dtype
        prompt_embeds = prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, dim=0)
        if do_classifier_free_guidance:
            negative_prompt_embeds = negative_prompt_embeds.to(device, dtype)
            negative_prompt_embeds = negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        else:
            negative_prompt_embeds = None
        return prompt_embeds, negative_prompt_embeds

    @torch.no_grad()
    def _encode_texts(self, texts: Sequence[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Embeddings `(length, width)` of every different text, in one forward pass, and of padding `(width,)`."""
        missing = list(dict.fromkeys(texts))
        if self.text_encoder is None and self._empty_prompt is not None:
            if missing == [""]:
                return {"": self._empty_prompt[0]}, self._empty_prompt[1]
            missing = [text for text in missing if text]
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError(
                "The pipeline has no text encoder (any more), so it can't encode "
                f"{missing[0][:40]!r}: pass `prompt_embeds` and, for guidance, `negative_prompt_embeds`."
            )
        lengths, inputs = self.tokenize_prompts(missing)
        embeds = self.text_encoder(**inputs.to(self._text_encoder_device())).prompt_embeds
        if not torch.isfinite(embeds).all():
            self.maybe_free_model_hooks()
            raise ValueError(
                f"The text encoder's output is not finite in {embeds.dtype}: its numbers overflow. Load it with "
                'dtype={"text_encoder": torch.bfloat16, ...} or float32.'
            )
        return {text: row[:length] for text, length, row in zip(missing, lengths, embeds, strict=True)}, embeds[0, -1]

    def tokenize_prompts(self, texts: Sequence[str]) -> tuple[list[int], BatchEncoding]:
        """Lengths of the prompts in tokens, and what the text encoder takes, padded one place beyond the longest.

        Raises:
            ValueError: if one has more tokens than the text encoder takes.
        """
        documents = [
            self.tokenizer.encode_document({"caption": self.tokenizer.escape(text), "objects": ""}) for text in texts
        ]
        longest = max(map(len, documents))
        limit = self.tokenizer.model_max_length
        if longest > limit:
            raise ValueError(
                f"The longest prompt has {longest:,} tokens, but the text encoder takes {limit:,} at most."
            )
        # One place more than needed: its row is that of all padding.
        inputs = self.tokenizer.collate(documents, padding_side="right", min_length=longest + 1, return_tensors="pt")
        return list(map(len, documents)), inputs

    def _text_encoder_device(self) -> torch.device:
        """Where the text encoder wants its input; with offloading its weights are elsewhere between calls."""
        device_map = getattr(self, "hf_device_map", None)
        if device_map is not None and "text_encoder" in device_map:
            return torch.device(device_map["text_encoder"])
        return self._execution_device

    def _pad_pairs(
        self, pairs: list[tuple[torch.Tensor, torch.Tensor | None]], padding: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pads the shorter one of every pair as the original does, then everything to one length with zeros."""
        if self.config.mask_padding:
            padding = torch.zeros_like(padding)
        columns: tuple[list, list] = ([], [])
        for pair in pairs:
            pair = [row.to(padding) for row in pair if row is not None]
            length = max(map(len, pair))
            for column, row in zip(columns, pair, strict=False):
                column.append(torch.cat([row, padding.expand(length - len(row), -1)]))
        prompt, negative = (
            torch.nn.utils.rnn.pad_sequence(column, batch_first=True) if column else None for column in columns
        )
        return prompt, negative

    def load_ip_adapter(self, *args, **kwargs):
        raise NotImplementedError(
            "IP-Adapters aren't supported: they are made for the UNets of Stable Diffusion 1 and XL, and states of "
            "CLIP. An image may be the start (VisCPMPaintImg2ImgPipeline) or the outline "
            "(VisCPMPaintControlNetPipeline)."
        )

    def load_textual_inversion(self, *args, **kwargs):
        raise NotImplementedError(
            "Textual inversions are words of CLIP, which VisCPM-Paint doesn't have: its text encoder is CPM-Bee. A "
            "LoRA for the UNet can be loaded (load_lora_weights)."
        )

    def free_text_encoder(self) -> None:
        """Drops the text encoder, nine tenths of the weights. Embeddings of the empty prompt are kept.

        From then on prompts come as `prompt_embeds`; the empty negative prompt still works. While there is a text
        encoder nothing is kept: weights change in ways that leave no trace (adapters, averages, `.data`), and together
        with a prompt the empty one costs next to nothing.
        """
        if self.text_encoder is None:
            return
        encoded, padding = self._encode_texts([""])
        self._empty_prompt = (encoded[""].clone(), padding.clone())
        self.text_encoder = None
        self.maybe_free_model_hooks()  # those of model offloading hold on to the text encoder
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --------------------------------------------------------------------------------------------- checks and ranking

    def check_prompt(self, prompt: Sequence[str] | None, policy: str) -> list[str | None] | None:
        """Why the prompts are refused, one entry a prompt; None if there is no prompt checker or no text.

        Raises:
            UnsafePromptError: if any is refused and the policy is `"raise"`.
        """
        if self.prompt_checker is None:
            return None
        if prompt is None:
            logger.warning_once("Prompts given as embeddings can't be checked by the prompt checker.")
            return None
        if self.tokenizer is not None:
            self.tokenize_prompts(prompt)  # refuses what is too long to be drawn, before it is looked at
        reasons = check_prompts(
            self.prompt_checker, self.prompt_checker_tokenizer, prompt, self.config.prompt_check_threshold
        )
        refused = [(index, reason) for index, reason in enumerate(reasons) if reason is not None]
        if refused and policy == "raise":
            raise UnsafePromptError(
                "; ".join(
                    f"Prompt {index} ({prompt[index][:40]!r}) was refused: {reason}" for index, reason in refused
                )
                + ". Another wording may pass; prompt_policy='flag' draws it all the same and says so."
            )
        return reasons

    def run_safety_checker(self, image: torch.Tensor, device: torch.device) -> list[str | None] | None:
        """Why images `(batch, 3, height, width)` in -1..1 are flagged, one entry an image; None without a checker."""
        if self.safety_checker is None:
            return None
        pictures = self.image_processor.postprocess(image, output_type="pil")
        inputs = self.feature_extractor(pictures, return_tensors="pt")
        # The checker blacks out what it is given, and has one policy; it gets nothing of ours.
        blank = torch.zeros(len(pictures), 1)
        dtype = self.safety_checker.dtype
        _, flags = self.safety_checker(images=blank, clip_input=inputs["pixel_values"].to(device, dtype))
        return ["the safety checker flagged the image" if flag else None for flag in flags]

    def rank_images(
        self, prompt: str, images: Sequence[PIL.Image.Image]
    ) -> tuple[list[PIL.Image.Image], list[float], list[int]]:
        """Sorts images by how well the ranker finds that they fit the prompt.

        Returns:
            The images, best first; their scores; and their places in `images`.
        """
        if self.ranker is None:
            raise ValueError("The pipeline has no ranker: load it with `ranker` and `ranker_processor`.")
        if not has_chinese(prompt):
            logger.warning_once("The ranker is Chinese-CLIP: for a prompt without Chinese its scores say little.")
        scores = score_images(self.ranker, self.ranker_processor, prompt, images)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        return [images[index] for index in order], [scores[index] for index in order], order

    # ------------------------------------------------------------------------------------------------- steps of a call

    def prepare_extra_step_kwargs(self, generator, eta: float) -> dict[str, Any]:
        """What not all schedulers take: eta (η in the DDIM paper, ignored by the others) and the generator."""
        parameters = inspect.signature(self.scheduler.step).parameters
        extra_step_kwargs = {"eta": eta, "generator": generator}
        return {name: value for name, value in extra_step_kwargs.items() if name in parameters}

    def check_inputs(
        self,
        prompt,
        height,
        width,
        negative_prompt=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        callback_on_step_end_tensor_inputs=None,
        latents=None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        prompt_policy: str = "raise",
        image_policy: str = "black",
        guidance_scale: float = 7.5,
    ) -> None:
        if not isinstance(guidance_scale, numbers.Real) or not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` has to be a finite number but is {guidance_scale!r}.")
        for name, size in (("height", height), ("width", width)):
            if not is_whole(size) or size <= 0 or size % SIZE_MULTIPLE:
                raise ValueError(f"`{name}` has to be a positive multiple of {SIZE_MULTIPLE} but is {size!r}.")
            if size > MAX_SIZE:
                raise ValueError(f"`{name}` is {size:,}, more than the {MAX_SIZE:,} pixels that make sense here.")
        for name, value in (
            ("num_images_per_prompt", num_images_per_prompt),
            ("num_inference_steps", num_inference_steps),
        ):
            if not is_whole(value) or value < 1:
                raise ValueError(f"`{name}` has to be a whole number of at least 1 but is {value!r}.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` has to be one of {', '.join(OUTPUT_TYPES)} but is {output_type!r}.")
        for name, policy in (("prompt_policy", prompt_policy), ("image_policy", image_policy)):
            if policy not in POLICIES:
                raise ValueError(f"`{name}` has to be one of {', '.join(POLICIES)} but is {policy!r}.")
        unknown = set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has to be in {self._callback_tensor_inputs}, but found "
                f"{sorted(unknown)}"
            )
        if output_type != "latent" and self.vae is None:
            raise ValueError(
                "The pipeline has no VAE. VisCPM-Paint's is that of Stable Diffusion 2.1: it lies in `vae/` of "
                "openbmb/VisCPM-Paint. Load it with AutoencoderKL.from_pretrained and pass it as `vae`, or ask for "
                'output_type="latent".'
            )

        if prompt is not None and prompt_embeds is not None:
            raise ValueError("Cannot forward both `prompt` and `prompt_embeds`. Please make sure to only forward one.")
        if prompt is None and prompt_embeds is None:
            raise ValueError("Provide either `prompt` or `prompt_embeds`. Cannot leave both undefined.")
        if negative_prompt is not None and negative_prompt_embeds is not None:
            raise ValueError(
                "Cannot forward both `negative_prompt` and `negative_prompt_embeds`. Please make sure to only forward "
                "one."
            )
        for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            is_list = isinstance(text, list) and all(isinstance(entry, str) for entry in text) and text
            if text is not None and not isinstance(text, str) and not is_list:
                raise ValueError(f"`{name}` has to be a `str` or a `list` of `str` but is {text!r:.80}.")
        if prompt is not None:
            batch_size = 1 if isinstance(prompt, str) else len(prompt)
        else:
            batch_size = prompt_embeds.shape[0]
        if isinstance(negative_prompt, list) and len(negative_prompt) != batch_size:
            raise ValueError(
                f"`negative_prompt` has batch size {len(negative_prompt)}, but `prompt` has batch size {batch_size}."
            )

        width_of_embeds = self.unet.config.cross_attention_dim
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_prompt_embeds", negative_prompt_embeds)):
            if embeds is None:
                continue
            if embeds.ndim != 3 or embeds.shape[0] != batch_size or embeds.shape[2] != width_of_embeds:
                raise ValueError(
                    f"`{name}` has shape {tuple(embeds.shape)} but should have "
                    f"({batch_size}, sequence, {width_of_embeds})."
                )
            if not torch.isfinite(embeds).all():
                raise ValueError(f"`{name}` is not finite.")
        if prompt_embeds is not None and negative_prompt_embeds is not None:
            if prompt_embeds.shape != negative_prompt_embeds.shape:
                raise ValueError(
                    "`prompt_embeds` and `negative_prompt_embeds` must have the same shape, but are "
                    f"{tuple(prompt_embeds.shape)} and {tuple(negative_prompt_embeds.shape)}: encode both in one call "
                    "of `encode_prompt`, or pad the shorter one with zeros, which the UNet doesn't see."
                )
        if latents is not None:
            self.check_latents(latents, (batch_size * num_images_per_prompt, *self._latent_size(height, width)))

    def check_latents(self, latents: torch.Tensor, expected: tuple[int, ...]) -> None:
        if tuple(latents.shape) != expected:
            raise ValueError(
                f"`latents` has shape {tuple(latents.shape)}, but this number of images of this size needs {expected}."
            )
        if not torch.isfinite(latents).all():
            raise ValueError("`latents` is not finite.")

    def _latent_size(self, height: int, width: int) -> tuple[int, int, int]:
        return self.unet.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def default_size(self) -> tuple[int, int]:
        """Height and width that the UNet was made for, in pixels."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def prepare_latents(self, batch_size, height, width, dtype, device, generator, latents=None) -> torch.Tensor:
        """Initial noise, scaled as the scheduler wants it."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(
                f"You have passed a list of generators of length {len(generator)}, but requested an effective batch"
                f" size of {batch_size}. Make sure the batch size matches the length of the generators."
            )
        if latents is None:
            shape = (batch_size, *self._latent_size(height, width))
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype) * self.scheduler.init_noise_sigma

    def check_source(self, num_prompts: int, num_images: int, height: int, width: int) -> None:
        """Checks what a pipeline starts from besides noise; there is nothing here."""

    def prepare_start(
        self, timesteps, num_inference_steps, num_prompts, num_images, height, width, dtype, device, generator, latents
    ) -> Start:
        """Where denoising begins: here with noise, at the first of the timesteps."""
        latents = self.prepare_latents(num_images, height, width, dtype, device, generator, latents)
        return Start(timesteps, num_inference_steps, latents)

    def unet_residuals(
        self,
        i: int,
        t: torch.Tensor,
        sample: torch.Tensor,
        prompt_embeds: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None,
        is_guided: bool,
    ) -> dict[str, Any]:
        """What the UNet takes besides, step by step, such as a ControlNet's residuals; nothing here."""
        return {}

    def denoise(
        self,
        start: Start,
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
        extra_step_kwargs: dict[str, Any],
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> torch.Tensor:
        """The denoising loop."""
        latents, timesteps = start.latents, start.timesteps
        if self.do_classifier_free_guidance:
            prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        encoder_attention_mask = token_mask(prompt_embeds)

        num_warmup_steps = len(timesteps) - start.num_inference_steps * self.scheduler.order
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=start.num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue

                # expand the latents if we are doing classifier free guidance
                is_guided = self.do_classifier_free_guidance and len(prompt_embeds) == 2 * len(latents)
                latent_model_input = torch.cat([latents] * 2) if is_guided else latents
                latent_model_input = self.scheduler.scale_model_input(latent_model_input, t)

                # predict the noise residual
                noise_pred = self.unet(
                    latent_model_input,
                    t,
                    encoder_hidden_states=prompt_embeds,
                    encoder_attention_mask=encoder_attention_mask,
                    cross_attention_kwargs=self.cross_attention_kwargs,
                    return_dict=False,
                    **self.unet_residuals(i, t, latent_model_input, prompt_embeds, encoder_attention_mask, is_guided),
                )[0]

                # perform guidance
                if is_guided:
                    noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
                    noise_pred = noise_pred_uncond + self.guidance_scale * (noise_pred_text - noise_pred_uncond)
                    if self.guidance_rescale > 0.0:
                        noise_pred = rescale_noise_cfg(noise_pred, noise_pred_text, self.guidance_rescale)

                # compute the previous noisy sample x_t -> x_t-1
                latents_dtype = latents.dtype
                latents = self.scheduler.step(noise_pred, t, latents, **extra_step_kwargs, return_dict=False)[0]
                latents = latents.to(latents_dtype)  # some schedulers work in fp32
                if start.after_step is not None:
                    latents = start.after_step(i, latents)

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    callback_kwargs = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    callback_outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = callback_outputs.pop("latents", latents)
                    negative_prompt_embeds = callback_outputs.pop("negative_prompt_embeds", negative_prompt_embeds)
                    new_embeds = callback_outputs.pop("prompt_embeds", prompt_embeds)
                    if new_embeds is not prompt_embeds:
                        prompt_embeds = _rows_for(new_embeds, prompt_embeds, len(latents))
                        encoder_attention_mask = token_mask(prompt_embeds)

                if i == len(timesteps) - 1 or ((i + 1) > num_warmup_steps and (i + 1) % self.scheduler.order == 0):
                    progress_bar.update()

        if not torch.isfinite(latents).all():
            self.maybe_free_model_hooks()
            raise ValueError(
                f"The latents are not finite after denoising in {latents.dtype}: numbers overflowed in the UNet, or "
                "the scheduler can't take these steps. Load the UNet in bfloat16 or float32 (dtype=...), or take "
                "another scheduler or more steps."
            )
        return latents

    def decode_latents(self, latents: torch.Tensor, generator=None) -> torch.Tensor:
        """Latents -> images `(batch, 3, height, width)` in -1..1."""
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        image = self.vae.decode(latents, return_dict=False, generator=generator)[0]
        if not torch.isfinite(image).all():
            self.maybe_free_model_hooks()
            raise ValueError(
                f"The VAE's output is not finite in {image.dtype}: its numbers overflow. Load it in bfloat16 or "
                'float32: dtype={"vae": torch.float32, ...}.'
            )
        return image

    def finish(
        self,
        latents: torch.Tensor,
        output_type: str,
        generator,
        prompt_reasons: list[str | None] | None,
        prompt_policy: str,
        image_policy: str,
        return_dict: bool,
    ) -> VisCPMPaintPipelineOutput | tuple:
        """Latents -> images, checked, and what was found (`prompt_reasons` has one entry an image)."""
        image, reasons = latents, prompt_reasons
        if output_type != "latent":
            image = self.decode_latents(latents, generator)
            image_reasons = self.run_safety_checker(image, image.device)
            flagged = [f"image {index}: {reason}" for index, reason in enumerate(image_reasons or ()) if reason]
            if flagged and image_policy == "raise":
                self.maybe_free_model_hooks()
                raise UnsafeImageError("; ".join(flagged) + ".")
            for policy, found in ((prompt_policy, prompt_reasons), (image_policy, image_reasons)):
                if policy == "black" and found is not None and any(found):
                    is_flagged = torch.tensor([reason is not None for reason in found], device=image.device)
                    image = image.masked_fill(is_flagged[:, None, None, None], -1.0)
            if image_reasons is not None and prompt_reasons is not None:
                both = zip(prompt_reasons, image_reasons, strict=True)
                reasons = ["; ".join(filter(None, pair)) or None for pair in both]
            elif image_reasons is not None:
                reasons = image_reasons
            image = self.image_processor.postprocess(image, output_type=output_type)

        # Offload all models
        self.maybe_free_model_hooks()

        flags = None if reasons is None else [reason is not None for reason in reasons]
        if not return_dict:
            return (image, flags)
        return VisCPMPaintPipelineOutput(images=image, nsfw_content_detected=flags, flag_reasons=reasons)

    # ----------------------------------------------------------------------------------------- properties of the call

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        return self._guidance_rescale

    # here `guidance_scale` is defined analog to the guidance weight `w` of equation (2)
    # of the Imagen paper: https://huggingface.co/papers/2205.11487 . `guidance_scale = 1`
    # corresponds to doing no classifier free guidance.
    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1 if self._use_guidance is None else self._use_guidance

    @property
    def cross_attention_kwargs(self) -> dict[str, Any] | None:
        return self._cross_attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    # ----------------------------------------------------------------------------------------------------------- call

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        prompt: str | list[str] | None = None,
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
        The call function to the pipeline for generation.

        Args:
            prompt (`str` or `list[str]`, *optional*):
                The prompt or prompts to guide image generation, in Chinese or English. If not defined, you need to
                pass `prompt_embeds`.
            height (`int`, *optional*, defaults to `self.default_size()[0]`):
                The height in pixels of the generated image, a multiple of 8.
            width (`int`, *optional*, defaults to `self.default_size()[1]`):
                The width in pixels of the generated image, a multiple of 8.
            num_inference_steps (`int`, *optional*, defaults to 50):
                The number of denoising steps.
            timesteps (`list[int]`, *optional*):
                Custom timesteps for schedulers that support them.
            sigmas (`list[float]`, *optional*):
                Custom sigmas for schedulers that support them.
            guidance_scale (`float`, *optional*, defaults to 7.5):
                Weight of the prompt against the negative prompt; at 1 or below the negative prompt is not used, and
                the UNet runs once a step instead of for two.
            negative_prompt (`str` or `list[str]`, *optional*):
                What not to draw. The empty prompt if not defined.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                The number of images to generate per prompt.
            eta (`float`, *optional*, defaults to 0.0):
                η of the DDIM paper; ignored by other schedulers.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Makes generation deterministic. With one generator per image, an image is the same alone and in a
                batch.
            latents (`torch.Tensor`, *optional*):
                Initial noise `(images, channels, height / 8, width / 8)` in place of a random draw.
            prompt_embeds (`torch.Tensor`, *optional*):
                Embeddings `(prompts, sequence, width)` as [`~VisCPMPaintPipeline.encode_prompt`] returns them, in
                place of `prompt`. All-zero rows are hidden from the UNet.
            negative_prompt_embeds (`torch.Tensor`, *optional*):
                Likewise in place of `negative_prompt`, of the same shape.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether or not to return a [`VisCPMPaintPipelineOutput`] instead of a plain tuple.
            cross_attention_kwargs (`dict`, *optional*):
                Passed along to the attention processors, e.g. `{"scale": 0.7}` for the strength of LoRAs.
            guidance_rescale (`float`, *optional*, defaults to 0.0):
                Factor φ of [Common Diffusion Noise Schedules and Sample Steps are
                Flawed](https://huggingface.co/papers/2305.08891).
            callback_on_step_end (`Callable`, `PipelineCallback`, `MultiPipelineCallbacks`, *optional*):
                Called at the end of each step: `callback_on_step_end(self, step, timestep, callback_kwargs)`.
            callback_on_step_end_tensor_inputs (`list`, *optional*):
                The tensors of `callback_kwargs`, out of `self._callback_tensor_inputs`.
            prompt_policy (`str`, *optional*, defaults to `"raise"`):
                What becomes of prompts that the prompt checker refuses: `"raise"` an [`UnsafePromptError`], return
                `"black"` images, or just `"flag"` them.
            image_policy (`str`, *optional*, defaults to `"black"`):
                Likewise for images that the safety checker flags ([`UnsafeImageError`]).
            use_guidance (`bool`, *optional*):
                Whether the negative prompt counts. If not defined, if `guidance_scale` is above 1, as everywhere in
                diffusers. True is the original's arithmetic at every scale: 0 draws the negative prompt.

        Examples:

        Returns:
            [`VisCPMPaintPipelineOutput`] or `tuple`:
                If `return_dict` is `True`, [`VisCPMPaintPipelineOutput`] is returned, otherwise a `tuple` of the
                images and a list of `bool`s that says which images were flagged (None if nothing was checked).
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs

        # 0. Default height and width to those of the latents, or to what the unet was made for
        if latents is not None and latents.ndim == 4:
            default_height, default_width = (size * self.vae_scale_factor for size in latents.shape[2:])
        else:
            default_height, default_width = self.default_size()
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
            guidance_scale,
        )
        height, width, num_inference_steps = int(height), int(width), int(num_inference_steps)
        num_images_per_prompt = int(num_images_per_prompt)
        self._guidance_scale = guidance_scale
        self._use_guidance = use_guidance
        self._guidance_rescale = guidance_rescale
        self._cross_attention_kwargs = cross_attention_kwargs
        self._interrupt = False

        # 2. Define call parameters
        prompt = [prompt] if isinstance(prompt, str) else prompt
        batch_size = len(prompt) if prompt is not None else prompt_embeds.shape[0]
        num_images = batch_size * num_images_per_prompt
        device = self._execution_device
        self.check_source(batch_size, num_images, height, width)

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
        if use_guidance and guidance_scale == 1:
            # Nothing of the negative prompt is left but the padding to its length: one pass will do.
            self._use_guidance, negative_prompt_embeds = False, None

        # 4. Prepare timesteps
        timesteps, num_inference_steps = retrieve_timesteps(
            self.scheduler, num_inference_steps, device, timesteps, sigmas
        )

        # 5. Prepare latent variables
        start = self.prepare_start(
            timesteps,
            num_inference_steps,
            batch_size,
            num_images,
            height,
            width,
            prompt_embeds.dtype,
            device,
            generator,
            latents,
        )

        # 6. Denoising loop
        latents = self.denoise(
            start,
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


def _rows_for(embeds: torch.Tensor, before: torch.Tensor, num_images: int) -> torch.Tensor:
    """Embeddings out of a callback, one row an image or two; diffusers' cut-off of guidance leaves a single one."""
    if len(embeds) in (num_images, 2 * num_images):
        return embeds
    if len(embeds) == 1 and (before[-num_images:] == embeds).all():
        return embeds.expand(num_images, -1, -1)
    raise ValueError(
        f"After the callback there are prompt_embeds for {len(embeds)} rows, but {num_images} images are drawn (and "
        f"{num_images} times without the prompt, with guidance)."
    )


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, numpy's included."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _without_zeros(embeds: torch.Tensor) -> torch.Tensor:
    """`(sequence, width)` without the zero rows at its end, by which it was padded for another batch."""
    is_token = (embeds != 0).any(-1)
    return embeds[: int(is_token.nonzero().max()) + 1] if is_token.any() else embeds[:0]


def token_mask(embeds: torch.Tensor) -> torch.Tensor | None:
    """Which rows of `(batch, sequence, width)` are tokens, for the UNet; None if all are."""
    is_token = (embeds != 0).any(-1)
    return None if is_token.all() else is_token


def _repeat(values: list | None, times: int) -> list | None:
    return None if values is None else [value for value in values for _ in range(times)]


__all__ = ["REFERENCE_SCHEDULER_CONFIG", "VisCPMPaintPipeline"]
