"""VisCPM-Chat behind the original's own interface."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from transformers import BatchFeature, TextStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from ..checkpoints.adapters import AdapterFolder
from ..checkpoints.errors import OriginalCheckpointError
from ..checkpoints.location import Original, chosen_file, find_original, hub_arguments, original_of
from ..families.family import CHAT
from ..loading.from_pretrained import own_config
from ..loading.options import LoadOptions, find_original_file
from ..modeling.beam_search_cpm_bee import ReferenceDecodingConfig
from ..modeling.fast_decoding_cpm_bee import check_fast_decoding
from ..modeling.fused_projections_cpm_bee import fusing_problem
from ..modeling.generation_cpm_bee import answer_generation, reference_decoding
from ..modeling.modeling_viscpm_chat import VisCPMChatForConditionalGeneration
from ..modeling.processing_viscpm_chat import ChatPrompt, VisCPMChatProcessor
from ..modeling.tokenization_cpm_bee import CpmBeeTokenizer
from ..pipelines.safety import DEFAULT_SAFETY_CHECKER, ImageSafetyChecker, UnsafeImageError
from ..tiny.embedded import resolve_model
from .turns import MODES, REFUSAL, ChatTurn, check_generation, open_picture, sampling


if TYPE_CHECKING:
    from .answering import ChatRequest

logger = logging.get_logger(__name__)

SAFETY_POLICIES = ("raise", "refuse")


class VisCPMChat:
    """Answers questions about images, as the original class of this name.

    Args:
        model_path: an original `.pt`/`.bin` file, a folder or Hub id in the original's or our layout, one of a Hub
            repository's alternatives (`openbmb/VisCPM-Chat:v1.1`), or the folder of an adapter that fine-tuning left
            (`training`).
        config_path: the original's JSON of the language model (`dim_model` and so on). If None, one beside the file is
            used, and what it lacks follows from the tensors or is as in the 10B model.
        image_safety_checker: True for the original's (`CompVis/stable-diffusion-safety-checker`), a folder or Hub id
            of one, a function `image -> flagged`, or False.
        vision_config_path: JSON of the vision tower's sizes, for checkpoints of other sizes than the released ones.
        vocab_path: `vocab.txt`; if None, the one beside the model.
        device: CUDA, then MPS, then the CPU unless given.
        dtype: the checkpoint's own, unless the device is better off with another: on a CPU fp16 becomes bf16, or fp32
            where the CPU has no bf16. "auto" is the checkpoint's own in any case. A torch dtype or any name of one
            (`"float16"`, `"fp16"`, `"torch.float16"`).
        image_safety_policy: what happens to flagged images: `"raise"` an [`UnsafeImageError`], or `"refuse"` with a
            fixed sentence as the answer. Either way nothing is said about the image.
        quantization: `"4bit"`, `"8bit"` (on a CPU packed for its kernels), `"nf4"`, `"fp4"`, `"int8"`, `"int8wo"` or
            `"int4wo"`: precision of the language model's layers. If None, as the checkpoint was saved.
        quantize_vision: also quantise the vision tower, which otherwise stays in `dtype`.
        quantize_embedding: also embedding and head, to 8 bits; with `"4bit"` and `"8bit"` on a CPU.
        device_map: `"auto"`, `"balanced"` or `{module: device}`, as of `from_pretrained`.
        max_memory: `{device: "8GB"}`: the most that `device_map` may put there.
        offload_folder: for weights that `device_map` leaves on the disk.
        fast: decode with a static cache and compiled graphs (`docs/speed.md`): the first answer takes long, all others
            are fast. Projections of the same input are fused where the weights are plain.
        revision, token, cache_dir: of the Hub.

    Raises:
        OriginalCheckpointError: if the checkpoint can't be used; the message says why.
        OSError: if a file can't be found or read.

    ```python
    >>> from viscpm_hf import VisCPMChat

    >>> chat = VisCPMChat("pytorch_model.bin")
    >>> answer, context, vision_hidden_states = chat.chat("figures/vision.png", "这张图片里有什么？")
    >>> answer, context, _ = chat.chat(None, "它是什么颜色的？", context, vision_hidden_states)
    ```
    """

    def __init__(
        self,
        model_path: str | os.PathLike,
        config_path: str | os.PathLike | None = None,
        image_safety_checker: bool | str | os.PathLike | Callable[[PIL.Image.Image], bool] = False,
        *,
        vision_config_path: str | os.PathLike | None = None,
        vocab_path: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        image_safety_policy: str = "raise",
        quantization: str | None = None,
        quantize_vision: bool = False,
        quantize_embedding: bool = False,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike | None = None,
        fast: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
    ):
        check_safety_policy(image_safety_policy)
        self.options = LoadOptions.checked(
            device=device,
            dtype=dtype,
            quantization=quantization,
            quantize_all=quantize_vision,
            quantize_embedding=quantize_embedding,
            device_map=device_map,
            max_memory=max_memory,
            offload_folder=offload_folder,
            fast=fast,
        )
        self.device = self.options.device
        self.image_safety_policy = image_safety_policy
        self.image_safety_checker = open_safety_checker(image_safety_checker, self.device)

        adapter = AdapterFolder.find(model_path)
        if adapter is not None:
            model_path = adapter.require_base()
        hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir)
        model_path = resolve_model(chosen_file(model_path, **hub), "chat")
        original_file = find_original_file(model_path)
        if original_file is not None:
            source: Any = original_of(original_file, config_path, vision_config_path, vocab_path)
        else:
            if config_path is not None or vision_config_path is not None:
                raise ValueError(
                    "config_path and vision_config_path belong to an original file; "
                    f"{model_path} is a folder or Hub id and has its own config.json."
                )
            source = find_original(model_path, **hub) or model_path
        model, self.processor = self._load(source, vocab_path, hub)
        tokens, rows = self.processor.tokenizer.num_words, model.config.text_config.num_words
        if tokens != rows:
            raise OriginalCheckpointError(
                f"The vocabulary has {tokens:,} tokens, but the model {rows:,}: they are not of the same checkpoint."
            )
        if adapter is not None:
            self.processor = adapter.apply(model, self.processor)
        self.model: VisCPMChatForConditionalGeneration = self.options.place(model).eval()
        if fast:
            check_fast_decoding(self.model)
            if fusing_problem(self.model) is None:
                self.model.fuse_projections()
            self.model.fast_decoder.enabled = True
        if device_map is not None:
            self.device = self.model.device

    # ------------------------------------------------------------------------------------------------------- loading

    def _load(
        self, source: Original | str | os.PathLike, vocab_path: str | os.PathLike | None, hub: Mapping[str, Any]
    ) -> tuple[VisCPMChatForConditionalGeneration, VisCPMChatProcessor]:
        if isinstance(source, Original):
            if source.family.is_sibling or (source.kind != CHAT and source.shapes is None):
                raise OriginalCheckpointError(
                    f"{source.name} is a {source.kind} checkpoint, but VisCPMChat needs one of VisCPM-Chat."
                )
            floating = (tensor.dtype for tensor in source.tensors.values() if tensor.is_floating_point())
            stored, quantization = next(floating, None), None
        else:
            config = own_config(source, CHAT, **hub)
            stored, quantization = config.dtype, getattr(config, "quantization_config", None)
        dtype = self.options.choose_dtype(stored) if stored is not None else self.options.dtype or "auto"
        arguments = self.options.from_pretrained_arguments(dtype, quantization)
        model = VisCPMChatForConditionalGeneration.from_pretrained(source, dtype=dtype, **hub, **arguments)
        processor = VisCPMChatProcessor.from_pretrained(source, **hub)
        if vocab_path is not None:
            processor.tokenizer = CpmBeeTokenizer(os.fspath(vocab_path))
        return model, processor

    # ------------------------------------------------------------------------------------------------------ answering

    def chat(
        self,
        image: str | os.PathLike | PIL.Image.Image | None,
        question: str,
        context: str = "",
        vision_hidden_states: torch.Tensor | None = None,
        **generation,
    ) -> tuple[str, str, torch.Tensor | None]:
        """Answers one question, with the original's results.

        Args:
            image: path or picture; None to go on with `vision_hidden_states`, or without a picture.
            question: any text.
            context: what the turn before returned, to go on with that conversation.
            vision_hidden_states: likewise; the image isn't encoded again.
            generation: see [`ask`].

        Returns:
            The answer, the context for the next turn in document syntax, and the encoded image
            `(images, queries, hidden)`.
        """
        turn = self.ask(image, question, context, vision_hidden_states, **generation)
        return turn.answer, turn.context, turn.vision_hidden_states

    def ask(
        self,
        image: str | os.PathLike | PIL.Image.Image | None,
        question: str,
        context: str = "",
        vision_hidden_states: torch.Tensor | None = None,
        *,
        mode: str = "reference",
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
        fast: bool | None = None,
        **generation,
    ) -> ChatTurn:
        """As [`chat`], with everything there is to know of the turn.

        Args:
            mode: `"reference"` decodes as the original did, with the parameters of [`ReferenceDecodingConfig`];
                `"generate"` with everything that transformers' `generate` offers.
            seed: makes sampling repeatable.
            on_text: called with every new piece of the answer (`"generate"` with one beam only).
            fast: decode with compiled graphs; if None, as the model was loaded.
            generation: `num_beams`, `max_new_tokens`, `temperature`, `repetition_penalty`, `length_penalty`, ...

        Raises:
            UnsafeImageError: if the safety checker flags the image and the policy is `"raise"`.
            ValueError: for an image that can't be used, a prompt longer than `processor.tokenizer.model_max_length`
                or a parameter outside its range.
        """
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, got {mode!r}.")
        if not isinstance(question, str):
            raise ValueError(f"A question is a str, got {type(question).__name__}.")
        if mode == "reference":
            if on_text is not None:
                raise ValueError('Beam search knows its answer only at the end: on_text needs mode="generate".')
            decoding = reference_decoding(generation)
        else:
            check_generation(generation)
        begin = time.perf_counter()
        escaped = self.processor.tokenizer.escape(question)
        if image is not None and vision_hidden_states is None:
            picture = open_picture(image, self.processor.image_processor)
            if self.image_safety_checker is not None and self.image_safety_checker(picture):
                return self._refuse(question, context, begin)
            vision_hidden_states = self.encode_image(picture)
        document = {"context": context, "question": escaped, "<ans>": ""}
        if mode == "reference":
            ids, strings = self._reference(document, vision_hidden_states, decoding, fast)
        else:
            with sampling([seed], generation, self.model.generation_config, self.device) as options:
                options = {**generation, **options, "fast": fast}
                ids, strings = self._generate(document, vision_hidden_states, options, on_text)
        answer = self.processor.tokenizer.decode(ids, extension_table=strings)
        return ChatTurn(
            question=question,
            answer=self.processor.tokenizer.unescape(answer),
            context=f"{context}User: {escaped}\nAI: {answer}\n",
            vision_hidden_states=vision_hidden_states,
            num_tokens=len(ids),
            seconds=time.perf_counter() - begin,
        )

    def ask_batch(
        self,
        requests: Sequence[ChatRequest],
        *,
        mode: str = "reference",
        seed: int | Sequence[int | None] | None = None,
        return_exceptions: bool = False,
        **generation,
    ) -> list[ChatTurn]:
        """Answers several questions at once, each as [`ask`] would alone; see [`answer_batch`]."""
        from .answering import answer_batch

        return answer_batch(
            self, requests, mode=mode, seed=seed, return_exceptions=return_exceptions, generation=generation
        )

    def prompt_length(self, request: ChatRequest) -> int:
        """Tokens of the request's prompt; no picture is opened. Raises as [`encode_request`]."""
        from .answering import encode_request

        return len(encode_request(self, request))

    def context_of(self, turns: Iterable[tuple[str, str]]) -> str:
        """The context of questions and their answers, as [`ask`] would have handed it on."""
        return "".join(self.continue_context("", question, answer) for question, answer in turns)

    def continue_context(self, context: str, question: str, answer: str) -> str:
        """The context with one more turn."""
        escape = self.processor.tokenizer.escape
        return f"{context}User: {escape(question)}\nAI: {escape(answer)}\n"

    @torch.no_grad()
    def encode_image(self, image: PIL.Image.Image) -> torch.Tensor:
        """The image as the language model sees it, `(1, queries, hidden)`."""
        pixel_values = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        return self.model.get_image_features(pixel_values.to(self.device)).pooler_output

    def fill(self, documents: Sequence[Mapping[str, Any]], **generation) -> list[dict[str, Any]]:
        """Fills the answers of text documents with the language model; see `CpmBeeForCausalLM.fill`."""
        return self.model.fill(documents, self.processor.tokenizer, **generation)

    def _refuse(self, question: str, context: str, begin: float) -> ChatTurn:
        if self.image_safety_policy == "raise":
            raise UnsafeImageError("The safety checker flagged the image, so the question about it isn't answered.")
        return ChatTurn(question, REFUSAL, context, None, 0, time.perf_counter() - begin)

    def _inputs(
        self, document: Mapping[str, str], vision_hidden_states: torch.Tensor | None, *, with_answer_start: bool
    ) -> tuple[BatchFeature, int]:
        """Model inputs of one turn, and the segment of its answer."""
        num_images = 0
        if vision_hidden_states is not None:
            num_images = self._check_vision_hidden_states(vision_hidden_states)
        encoded = self.processor.encode_prompt(ChatPrompt(dict(document), num_images))
        self.processor.check_length(encoded)
        slot = encoded.answer_slots[0]
        prompt = encoded.prompt(open_slot=0 if with_answer_start else None)
        inputs = self.processor.tokenizer.collate([prompt], return_tensors="pt").to(self.device)
        if vision_hidden_states is not None:
            encoded_image = vision_hidden_states.to(self.device, self.model.dtype)
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=encoded_image)}
        return inputs, slot.segment_id

    def _check_vision_hidden_states(self, vision_hidden_states: torch.Tensor) -> int:
        if not isinstance(vision_hidden_states, torch.Tensor):
            raise ValueError(f"vision_hidden_states is a tensor, got {type(vision_hidden_states).__name__}.")
        config = self.model.config
        expected = (config.num_query_tokens, config.text_config.hidden_size)
        if vision_hidden_states.ndim != 3 or tuple(vision_hidden_states.shape[1:]) != expected:
            raise ValueError(
                f"vision_hidden_states has shape {tuple(vision_hidden_states.shape)}, but this model's are "
                f"(images, {expected[0]}, {expected[1]}): hand on what an earlier turn of the same model returned."
            )
        return vision_hidden_states.shape[0]

    def _reference(
        self,
        document: Mapping[str, str],
        vision_hidden_states: torch.Tensor | None,
        decoding: ReferenceDecodingConfig,
        fast: bool | None,
    ) -> tuple[list[int], dict[int, str]]:
        inputs, segment = self._inputs(document, vision_hidden_states, with_answer_start=False)
        (result,) = self.model.reference_search(inputs, [[segment]], decoding, fast=fast)
        return result.token_ids[0], inputs.extension_strings[0]

    def _generate(
        self,
        document: Mapping[str, str],
        vision_hidden_states: torch.Tensor | None,
        generation: Mapping[str, Any],
        on_text: Callable[[str], None] | None,
    ) -> tuple[list[int], dict[int, str]]:
        inputs, _ = self._inputs(document, vision_hidden_states, with_answer_start=True)
        strings = inputs.extension_strings[0]
        tokenizer = self.processor.tokenizer
        streamer = CallbackStreamer(tokenizer, on_text, strings) if on_text is not None else None
        (ids,) = self._generate_rows(inputs, generation, streamer=streamer)
        return ids, strings

    def _generate_rows(self, inputs: BatchFeature, generation: Mapping[str, Any], **options) -> list[list[int]]:
        """The new tokens of every row of a batch, without what ends them."""
        if generation.get("stop_strings") is not None:
            options["tokenizer"] = self.processor.tokenizer
        generation = answer_generation(self.model.generation_config, generation)
        sequences = self.model.generate(**inputs, **generation, **options)[:, inputs["input_ids"].shape[1] :]
        end = self.processor.tokenizer.eos_token_id
        return [ids[: ids.index(end)] if end in ids else ids for ids in sequences.tolist()]


class CallbackStreamer(TextStreamer):
    """Hands every new piece of the answer to a function; together they are `ChatTurn.answer`."""

    def __init__(self, tokenizer: CpmBeeTokenizer, on_text: Callable[[str], None], strings: Mapping[int, str]):
        super().__init__(tokenizer, skip_prompt=True, extension_table=strings)
        self.on_text = on_text
        self._has_ended = False

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            ids = value.flatten().tolist()
            if self._has_ended:
                return
            if self.tokenizer.eos_token_id in ids:  # what ends the answer is no part of it
                self._has_ended = True
                ids = ids[: ids.index(self.tokenizer.eos_token_id)]
            value = torch.tensor(ids, dtype=torch.long)
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(self.tokenizer.unescape(text))  # pieces begin and end with whole tokens


# ------------------------------------------------------------------------------------------------------------ helpers


def check_safety_policy(policy: str) -> None:
    if policy not in SAFETY_POLICIES:
        raise ValueError(f"image_safety_policy is one of {', '.join(SAFETY_POLICIES)}, got {policy!r}.")


def open_safety_checker(
    source: bool | str | os.PathLike | Callable[[PIL.Image.Image], bool], device: torch.device
) -> Callable[[PIL.Image.Image], bool] | None:
    """`image -> flagged or not` of what the argument `image_safety_checker` takes; None for no check."""
    if source is True:
        source = DEFAULT_SAFETY_CHECKER
    if isinstance(source, (str, os.PathLike)):
        return ImageSafetyChecker.from_pretrained(source, device)
    return source or None
