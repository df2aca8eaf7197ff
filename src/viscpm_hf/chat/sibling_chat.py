"""The siblings behind the interface of [`VisCPMChat`], so that every command that chats works with them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..checkpoints.adapters import AdapterFolder
from ..checkpoints.errors import OriginalCheckpointError
from ..checkpoints.location import find_repository_file, hub_arguments, json_object, repository_of
from ..families.family import FAMILIES, SIBLINGS
from ..loading.from_pretrained import own_config
from ..loading.options import LoadOptions
from ..modeling.chat_processing import AnswerText, EncodedImage
from ..modeling.decoding_presets import default_preset
from ..modeling.processing_vision_resampler import VisionResamplerProcessor
from ..pipelines.safety import UnsafeImageError
from ..tiny.embedded import EMBEDDED_NAME, check_model_name
from .chat import (
    MODES,
    REFUSAL,
    ChatTurn,
    check_generation,
    check_safety_policy,
    open_picture,
    open_safety_checker,
    sampling,
)


if TYPE_CHECKING:
    from .answering import ChatRequest


@dataclass
class _Row:
    """A request on its way."""

    request: ChatRequest
    seed: int | None
    ids: list[int] | None = None
    image: EncodedImage | None = None
    answer: list[int] | None = None
    failure: Exception | None = None
    is_refused: bool = False

    @property
    def is_open(self) -> bool:
        return self.failure is None and not self.is_refused


class SiblingChat:
    """Answers questions about images with OmniLMM-12B, MiniCPM-V 1.0 or 2.0, or VisualCLA.

    Args:
        model_path: a folder or Hub id, in the original's or our layout, or the folder of an adapter on one of them.
        image_safety_checker, image_safety_policy, device, dtype, quantization, quantize_vision,
            quantize_embedding, device_map, max_memory, offload_folder, revision, token, cache_dir: see [`VisCPMChat`].

    ```python
    >>> from viscpm_hf.chat.sibling_chat import SiblingChat

    >>> chat = SiblingChat("openbmb/MiniCPM-V-2")
    >>> answer, context, image = chat.chat("figures/vision.png", "这张图片里有什么？")
    >>> answer, context, image = chat.chat(None, "它是什么颜色的？", context, image)
    ```
    """

    def __init__(
        self,
        model_path: str | os.PathLike,
        image_safety_checker: bool | str | os.PathLike | Callable[[PIL.Image.Image], bool] = False,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        image_safety_policy: str = "raise",
        quantization: str | None = None,
        quantize_vision: bool = False,
        quantize_embedding: bool = False,
        device_map: str | Mapping[str, Any] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        offload_folder: str | os.PathLike | None = None,
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
        )
        self.device = self.options.device
        self.image_safety_policy = image_safety_policy
        self.image_safety_checker = open_safety_checker(image_safety_checker, self.device)

        adapter = AdapterFolder.find(model_path)
        if adapter is not None:
            model_path = adapter.require_base()
        hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir)
        config = own_config(model_path, *SIBLINGS, **hub)
        stored = config.dtype
        chosen = self.options.choose_dtype(stored) if stored is not None else self.options.dtype or "auto"
        arguments = self.options.from_pretrained_arguments(chosen, getattr(config, "quantization_config", None))
        family = FAMILIES[config.model_type]
        self.processor: VisionResamplerProcessor = family.processor_class.from_pretrained(model_path, **hub)
        model = family.model_class.from_pretrained(model_path, dtype=chosen, **hub, **arguments)
        if adapter is not None:
            model.load_adapter(os.fspath(adapter.path))
        self.model = self.options.place(model).eval()
        if device_map is not None:
            self.device = self.model.device

    # ------------------------------------------------------------------------------------------------------ answering

    def chat(
        self,
        image: str | os.PathLike | PIL.Image.Image | None,
        question: str,
        context: str = "",
        vision_hidden_states: EncodedImage | None = None,
        **generation,
    ) -> tuple[str, str, EncodedImage | None]:
        """Answers one question; see [`ask`]. Returns the answer, and what the next turn takes: the context and the
        encoded image."""
        turn = self.ask(image, question, context, vision_hidden_states, **generation)
        return turn.answer, turn.context, turn.vision_hidden_states

    def ask(
        self,
        image: str | os.PathLike | bytes | PIL.Image.Image | None,
        question: str,
        context: str = "",
        vision_hidden_states: EncodedImage | None = None,
        *,
        mode: str = "reference",
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
        **generation,
    ) -> ChatTurn:
        """Answers one question.

        Args:
            image: the conversation's picture; None to go on with `vision_hidden_states`, or without a picture.
            question: any text.
            context: what the turn before returned, the conversation so far as JSON.
            vision_hidden_states: likewise; the image isn't encoded again.
            mode: `"reference"` decodes by the original's preset (`decoding_presets`), with `generation` in place of
                its values; `"generate"` by `generation` alone.
            seed: makes sampling repeatable.
            on_text: called with every new piece of the answer (one beam only).
            generation: arguments of transformers' `generate`.

        Raises:
            UnsafeImageError: if the safety checker flags the image and the policy is `"raise"`.
            ValueError: for an image that can't be used, a prompt that is too long, or a parameter outside its range.
        """
        from .answering import ChatRequest

        request = ChatRequest(image, question, context, vision_hidden_states)
        (turn,) = self._answer([request], mode, seed, False, generation, on_text)
        return turn

    def ask_batch(
        self,
        requests: Sequence[ChatRequest],
        *,
        mode: str = "reference",
        seed: int | Sequence[int | None] | None = None,
        return_exceptions: bool = False,
        **generation,
    ) -> list[ChatTurn]:
        """Answers several questions at once, each as [`ask`] would alone; see `VisCPMChat.ask_batch`."""
        return self._answer(requests, mode, seed, return_exceptions, generation, None)

    def prompt_length(self, request: ChatRequest) -> int:
        """Tokens of the request's prompt as far as they are known before its picture is opened.

        Raises:
            ValueError: for values of the wrong type, or a prompt that is too long.
        """
        image = request.vision_hidden_states
        has_picture = request.image is not None or image is not None
        grids = [image.grid if image is not None else (0, 0)] if has_picture else []
        return len(self.processor.encode_chat(self.conversation(request), grids))

    def context_of(self, turns: Iterable[tuple[str, str]]) -> str:
        """The context of questions and their answers."""
        context = ""
        for question, answer in turns:
            context = self.continue_context(context, question, answer)
        return context

    def continue_context(self, context: str, question: str, answer: str) -> str:
        """The context with one more turn."""
        messages = json.loads(context) if context else []
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return json.dumps(messages, ensure_ascii=False)

    def conversation(self, request: ChatRequest) -> list[dict[str, Any]]:
        """The request as messages; its picture belongs to the first of them.

        Raises:
            ValueError: for values of the wrong type, or a context that is none.
        """
        for name in ("question", "context"):
            value = getattr(request, name)
            if not isinstance(value, str):
                raise ValueError(f"A {name} is a str, got {type(value).__name__}.")
        try:
            messages = json.loads(request.context) if request.context else []
        except json.JSONDecodeError as error:
            raise ValueError(f"The context is not what an earlier turn returned: {error}.") from error
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message
            for message in messages
        ):
            raise ValueError("The context is not what an earlier turn returned: a JSON list of messages.")
        messages = [*messages, {"role": "user", "content": request.question}]
        if request.image is not None or request.vision_hidden_states is not None:
            text = {"type": "text", "text": messages[0]["content"]}
            messages[0] = {**messages[0], "content": [{"type": "image"}, text]}
        return messages

    @torch.no_grad()
    def encode_image(self, image: PIL.Image.Image) -> EncodedImage:
        return encode_images(self.model, self.processor, [image])[0]

    # ------------------------------------------------------------------------------------------------------- the work

    @torch.no_grad()
    def _answer(
        self,
        requests: Sequence[ChatRequest],
        mode: str,
        seed: int | Sequence[int | None] | None,
        return_exceptions: bool,
        generation: Mapping[str, Any],
        on_text: Callable[[str], None] | None,
    ) -> list[ChatTurn]:
        begin = time.perf_counter()
        decoding = self._decoding(mode, generation, on_text)
        seeds = [seed] * len(requests) if seed is None or isinstance(seed, int) else list(seed)
        if len(seeds) != len(requests):
            raise ValueError(f"Give one seed, or one for each request: got {len(seeds)} for {len(requests)} requests.")
        rows = [_Row(request, own) for request, own in zip(requests, seeds, strict=True)]
        pictures: dict[Any, EncodedImage | None] = {}
        for row in rows:
            try:
                self._prepare(row, pictures)
            except (ValueError, OSError) as error:
                if not return_exceptions:
                    raise
                row.failure = error
        answered = [row for row in rows if row.is_open]
        if answered:
            self._generate(answered, decoding, on_text)
        seconds = time.perf_counter() - begin
        return [row.failure or self._turn(row, seconds) for row in rows]

    def _decoding(self, mode: str, generation: Mapping[str, Any], on_text: Any) -> dict[str, Any]:
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, got {mode!r}.")
        generation = {name: value for name, value in generation.items() if name != "fast"}
        check_generation(generation)
        decoding = {**default_preset(self.model.config), **generation} if mode == "reference" else dict(generation)
        decoding.setdefault("max_new_tokens", default_preset(self.model.config)["max_new_tokens"])
        if on_text is not None and decoding.get("num_beams", 1) != 1:
            raise ValueError("Beam search knows its answer only at the end: on_text needs num_beams=1.")
        return decoding

    def _prepare(self, row: _Row, pictures: dict[Any, EncodedImage | None]) -> None:
        """Encodes a row's picture, unless that is known already, and its prompt."""
        request = row.request
        conversation = self.conversation(request)
        row.image = request.vision_hidden_states
        if row.image is not None and not isinstance(row.image, EncodedImage):
            found = type(row.image).__name__
            raise ValueError(f"vision_hidden_states is an EncodedImage, as an earlier turn returned it, got {found}.")
        image = request.image
        if image is not None and row.image is None:
            self.prompt_length(request)  # what is wrong with the text is known before the picture is encoded
            key = image if isinstance(image, (str, bytes)) else str(image) if isinstance(image, Path) else id(image)
            if key not in pictures:
                picture = open_picture(image, self.processor.image_processor)
                is_flagged = self.image_safety_checker is not None and self.image_safety_checker(picture)
                pictures[key] = None if is_flagged else self.encode_image(picture)
            row.image = pictures[key]
            if row.image is None:
                if self.image_safety_policy == "raise":
                    raise UnsafeImageError(
                        "The safety checker flagged the image, so the question about it isn't answered."
                    )
                row.is_refused = True
                return
        grids = [] if row.image is None else [row.image.grid]
        row.ids = self.processor.encode_chat(conversation, grids)

    def _generate(self, rows: list[_Row], decoding: Mapping[str, Any], on_text: Callable[[str], None] | None) -> None:
        features = [None if row.image is None else row.image.features for row in rows]
        inputs = model_inputs(self.model, self.processor, [row.ids for row in rows], features)
        options = dict(decoding)
        if options.get("stop_strings") is not None:
            options["tokenizer"] = self.processor.tokenizer
        if on_text is not None:
            options["streamer"] = AnswerStreamer(self.processor, on_text)
        with sampling([row.seed for row in rows], options, self.model.generation_config, self.device) as drawing:
            sequences = self.generate(inputs, **{**options, **drawing})
        end = self.processor.tokenizer.eos_token_id
        for row, ids in zip(rows, sequences, strict=True):
            row.answer = ids[: ids.index(end)] if end in ids else ids

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, Any], **options) -> list[list[int]]:
        """The new tokens of every row, padding at their end included."""
        tokenizer = self.processor.tokenizer
        # Original folders may have no generation_config.json that says so.
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        sequences = self.model.generate(**inputs, **{**ends, **options})
        return sequences[:, inputs["input_ids"].shape[1] :].tolist()

    def _turn(self, row: _Row, seconds: float) -> ChatTurn:
        request = row.request
        if row.is_refused:
            return ChatTurn(request.question, REFUSAL, request.context, None, 0, seconds)
        answer = self.processor.answer_text(row.answer)
        return ChatTurn(
            question=request.question,
            answer=answer,
            context=self.continue_context(request.context, request.question, answer),
            vision_hidden_states=row.image,
            num_tokens=len(row.answer),
            seconds=seconds,
        )


def is_sibling(model_path: str | os.PathLike, **hub: Any) -> bool:
    """Whether a folder or Hub id is one of the siblings', or an adapter on one of them.

    Args:
        hub: `revision`, `token`, `cache_dir` of the Hub.

    Raises:
        FileNotFoundError: for what isn't here and is no name of a repository either.
        OriginalCheckpointError: for one of several files, or releases, of a sibling: they have one set of weights.
    """
    adapter = AdapterFolder.find(model_path)
    if adapter is not None:
        return adapter.base is not None and is_sibling(adapter.base, **hub)
    if model_path == EMBEDDED_NAME or os.path.isfile(model_path):
        return False
    check_model_name(model_path)
    repository = repository_of(model_path)
    file = find_repository_file(repository, "config.json", **hub)
    found = file is not None and json_object(Path(file)).get("model_type") in SIBLINGS
    if found and repository != model_path:
        raise OriginalCheckpointError(f"{repository} has one set of weights: leave out what follows in {model_path}.")
    return found


class AnswerStreamer(BaseStreamer):
    """Hands every new piece of the answer to a function; together they are the answer."""

    def __init__(self, processor: VisionResamplerProcessor, on_text: Callable[[str], None]):
        self.on_text = on_text
        self._text = AnswerText(processor)
        self._ids: list[int] = []
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._has_prompt:
            self._ids += value.flatten().tolist()
            self._tell(self._text.new_text(self._ids))
        self._has_prompt = True

    def end(self) -> None:
        self._tell(self._text.new_text(self._ids, is_last=True))

    def _tell(self, piece: str) -> None:
        if piece:
            self.on_text(piece)


def encode_images(
    model: Any, processor: VisionResamplerProcessor, images: Sequence[PIL.Image.Image]
) -> list[EncodedImage]:
    """Pictures through the tower, all views together."""
    inputs = processor.image_processor(list(images), return_tensors="pt")
    grids = [tuple(grid) for grid in inputs.pop("grids", torch.zeros(len(images), 2, dtype=torch.long)).tolist()]
    num_views = inputs.pop("num_views", torch.ones(len(images), dtype=torch.long)).tolist()
    features = model.get_image_features(**inputs.to(model.device)).pooler_output
    return [EncodedImage(own, grid) for own, grid in zip(features.split(num_views), grids, strict=True)]


def model_inputs(
    model: Any,
    processor: VisionResamplerProcessor,
    prompts: Sequence[Sequence[int]],
    features: Sequence[torch.Tensor | None],
) -> dict[str, Any]:
    """Prompts of token ids, padded on the left, and their encoded pictures `(views, queries, hidden)`, as `generate`
    takes them."""
    rows = [list(ids) for ids in prompts]
    inputs: dict[str, Any] = dict(
        processor.tokenizer.pad(
            {"input_ids": rows, "attention_mask": [[1] * len(ids) for ids in rows]},
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
    )
    own = [views.to(model.device, model.dtype) for views in features if views is not None]
    if own:
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=torch.cat(own))}
    return inputs


__all__ = [
    "AnswerStreamer",
    "AnswerText",
    "EncodedImage",
    "SiblingChat",
    "encode_images",
    "is_sibling",
    "model_inputs",
]
