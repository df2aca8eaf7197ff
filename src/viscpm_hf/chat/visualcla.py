"""VisualCLA's own functions, as its users know them.

```python
>>> from viscpm_hf.siblings import visualcla

>>> model, tokenizer, image_processor = visualcla.get_model_and_tokenizer_and_processor("visualcla-merged")
>>> response, history = visualcla.chat(model, "figures/vision.png", "图片里有什么？")
>>> response, history = visualcla.chat(model, "figures/vision.png", "它是什么颜色的？", history)
```
"""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from transformers import GenerationConfig

from ..checkpoints.location import hub_arguments
from ..checkpoints.tensor_files import named_dtype
from ..checkpoints.visualcla_adapter import changed_matrices
from ..loading.from_pretrained import own_config
from ..loading.options import default_device, default_dtype, usable_device
from ..loading.quantization import quantization_config
from ..loading.unmerged_visualcla import UnmergedVisualCLA
from ..modeling.chat_processing import ImageViews
from ..modeling.configuration_vision_resampler import VisualCLAConfig
from ..modeling.decoding_presets import decoding_presets
from ..modeling.modeling_vision_resampler import VisualCLAForConditionalGeneration
from ..modeling.processing_visualcla import VisualCLAProcessor
from .answering import AnswerStreamer
from .turns import open_picture


History = list[dict[str, Any]]
Picture = str | os.PathLike | PIL.Image.Image | torch.Tensor


def get_model_and_tokenizer_and_processor(
    visualcla_model: str | os.PathLike | None = None,
    text_model: str | os.PathLike | None = None,
    vision_model: str | os.PathLike | None = None,
    lora_model: str | os.PathLike | None = None,
    torch_dtype: str | torch.dtype | None = None,
    default_device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    load_in_8bit: bool = False,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[Any, Any, Any]:
    """Loads the model, ready for [`chat`].

    Args:
        visualcla_model: a merged model, in the original's or our layout; it goes before the other three.
        text_model, vision_model, lora_model: the bases (Chinese-Alpaca-Plus-7B, CLIP-L/14) and the released adapter,
            which is applied here: the README's `resize_token_embeddings` then changes nothing, and
            `PeftModel.from_pretrained(model, lora_model)` takes it out of the weights and puts it on again.
        torch_dtype: fp16 unless given, or what the device has in its place.
        default_device: CUDA, then MPS, then the CPU unless given.
        device_map: as of `from_pretrained`, in place of a device.
        load_in_8bit: the language model in 8 bit; of a merged model only.
        revision: of the Hub's repository of the merged model, or of the adapter.
        token, cache_dir: of the Hub.

    Returns:
        The model, its tokenizer and its image processor, which the model also has as attributes.

    Raises:
        ValueError: if it isn't said what to load, or it can't be loaded so.
    """
    parts = {"text_model": text_model, "vision_model": vision_model, "lora_model": lora_model}
    missing = [name for name, value in parts.items() if value is None]
    if visualcla_model is None and missing:
        raise ValueError(f"Give visualcla_model, or all of {', '.join(parts)}: {', '.join(missing)} is missing.")
    if load_in_8bit and visualcla_model is None:
        raise ValueError("load_in_8bit takes a merged model: `viscpm-hf merge visualcla` makes one.")
    device = _device(default_device)
    dtype = default_dtype(device, torch.float16) if torch_dtype is None else named_dtype(torch_dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if load_in_8bit:
        options["quantization_config"] = quantization_config("8bit", dtype)
    if device_map is not None or load_in_8bit:
        options["device_map"] = device_map if device_map is not None else {"": device}
    path = visualcla_model
    if path is None:
        path = lora_model
        options |= {"text_model": text_model, "vision_model": vision_model}
    hub = hub_arguments(revision=revision, token=token, cache_dir=cache_dir)
    own_config(path, VisualCLAConfig.model_type, **hub)
    processor = VisualCLAProcessor.from_pretrained(path, **hub)
    # Not by an Auto class, which takes the adapter's repository for one of changes to a model that it names.
    model = VisualCLAForConditionalGeneration.from_pretrained(path, **options, **hub)
    if "device_map" not in options:
        model.to(device)
    model.eval()
    # Where the original put them.
    model.tokenizer, model.image_processor, model.processor = processor.tokenizer, processor.image_processor, processor
    model.num_patch, model.image_at_head = model.config.num_query_tokens, False
    if visualcla_model is None:
        model = UnmergedVisualCLA.of(
            model, functools.partial(changed_matrices, text_model, vision_model, lora_model, hub)
        )
    return model, processor.tokenizer, processor.image_processor


def _device(device: str | torch.device | None) -> torch.device:
    return default_device() if device is None else usable_device(device)


def chat(
    model: Any,
    image: Picture | Sequence[Picture | None] | None,
    text: str,
    history: History | None = None,
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
) -> tuple[str, History]:
    """Answers one question about the conversation's pictures.

    Args:
        model: what [`get_model_and_tokenizer_and_processor`] returned.
        image: the first question's picture: path, PIL image, or pixels as the image processor returns them; the same
            at every turn. None for text alone. A list has one for every question of the conversation, None for those
            without, as text-generation-webui's users gave them.
        text: the question.
        history: what an earlier turn returned; it is appended to in place, as ever. None begins a conversation: unlike
            the original, conversations that begin without one share nothing.
        generation_config: in place of VisualCLA's decoding.

    Returns:
        The answer and the history with it.

    Raises:
        ValueError: for a picture or a history that can't be used, or a prompt that is too long.
    """
    history = [] if history is None else history
    inputs = _inputs(model, image, text, history)
    ids = _generate(model, inputs, generation_config)
    response = model.processor.answer_text(ids)
    _append(history, text, response)
    return response, history


def chat_in_stream(
    model: Any,
    image: Picture | Sequence[Picture | None] | None,
    text: str,
    history: History | None = None,
    generation_config: GenerationConfig | Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, History]]:
    """As [`chat`], piece by piece.

    Yields:
        The answer so far, and a new history with it; the one that was given is left as it is.
    """
    history = [] if history is None else history
    inputs = _inputs(model, image, text, history)
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    is_wanted = threading.Event()
    is_wanted.set()

    def run() -> None:
        try:
            streamer = AnswerStreamer(model.processor, pieces.put)
            _generate(model, inputs, generation_config, streamer=streamer, stop=lambda: not is_wanted.is_set())
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    thread = threading.Thread(target=run, name="visualcla-chat", daemon=True)
    thread.start()
    response = ""
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            response += piece
            yield response, _append(list(history), text, response)
    finally:
        is_wanted.clear()  # nobody listens any more
        thread.join()


def _append(history: History, text: str, response: str) -> History:
    first = {} if history else {"first_instruction": True}
    history += [{"type": "instruction", "value": text, **first}, {"type": "response", "value": response}]
    return history


def _inputs(model: Any, image: Any, text: str, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    processor: VisualCLAProcessor = model.processor
    if not isinstance(text, str):
        raise ValueError(f"The text is a str, got {type(text).__name__}.")
    roles = {"instruction": "user", "response": "assistant"}
    for index, entry in enumerate(history):
        if not isinstance(entry, Mapping) or entry.get("type") not in roles or not isinstance(entry.get("value"), str):
            raise ValueError(
                f'Entry {index} of the history is not {{"type": "instruction" or "response", "value": text}}.'
            )
    conversation: list[dict[str, Any]] = [
        *({"role": roles[entry["type"]], "content": entry["value"]} for entry in history),
        {"role": "user", "content": text},
    ]
    questions = [message for message in conversation if message["role"] == "user"]
    is_list = isinstance(image, (list, tuple))
    images = list(image) if is_list else [image, *[None] * (len(questions) - 1)]
    if len(images) != len(questions):
        raise ValueError(
            f"The list has {len(images)} pictures, but the conversation {len(questions)} questions: give one for "
            "each, None for those without."
        )
    for question, own in zip(questions, images, strict=True):
        if own is not None:
            question["content"] = [{"type": "image"}, {"type": "text", "text": question["content"]}]
    given = [own for own in images if own is not None]
    prompt = processor.encode_chat(conversation, [(0, 0)] * len(given))  # before the pictures, which take longer
    encoded = processor.encode_images(model, [_views(model, own) for own in given]) if given else []
    features = torch.cat([own.features for own in encoded]) if encoded else None
    return processor.pad_prompts([prompt], [features], model)


def _views(model: Any, image: Any) -> ImageViews:
    if not isinstance(image, torch.Tensor):
        return model.processor.views_of(open_picture(image, model.image_processor))
    pixel_values = image if image.ndim == 4 else image[None]
    size = model.config.vision_config.image_size
    if tuple(pixel_values.shape) != (1, 3, size, size):
        raise ValueError(f"Pixels of one picture are (1, 3, {size}, {size}), got {tuple(image.shape)}.")
    return ImageViews(pixel_values)


@torch.no_grad()
def _generate(
    model: Any, inputs: Mapping[str, Any], generation_config: Any, stop: Any = None, **options: Any
) -> list[int]:
    tokenizer = model.processor.tokenizer
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if isinstance(generation_config, GenerationConfig):
        options["generation_config"] = generation_config
    else:
        options |= decoding_presets(model.config)["sampling"] if generation_config is None else generation_config
    if stop is not None:
        options["stopping_criteria"] = [lambda ids, scores: torch.full((len(ids),), stop(), device=ids.device)]
    sequences = model.generate(**inputs, **{**ends, **options})
    return sequences[0, inputs["input_ids"].shape[1] :].tolist()


__all__ = ["chat", "chat_in_stream", "get_model_and_tokenizer_and_processor"]
