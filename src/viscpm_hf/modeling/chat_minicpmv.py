"""`chat` of the MiniCPM-V models, as their users know it."""

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .decoding_presets import decoding_presets
from .processing_minicpmv import MiniCPMVProcessor


logger = logging.get_logger(__name__)


class MiniCPMVChatMixin:
    """Gives a model `chat`."""

    @torch.no_grad()
    def chat(
        self,
        image: Any,
        msgs: str | Sequence[Mapping[str, str]] | None = None,
        context: Any = None,
        tokenizer: Any = None,
        vision_hidden_states: torch.Tensor | Sequence[torch.Tensor] | None = None,
        max_new_tokens: int | None = None,
        sampling: bool | None = None,
        max_inp_length: int = 2048,
        processor: MiniCPMVProcessor | None = None,
        question: str | Sequence[Mapping[str, str]] | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[dict[str, str]], dict[str, Any]]:
        """Answers the last of a conversation's messages.

        Args:
            image: the conversation's picture (PIL image, path, ...), the same at every turn; None for text alone.
            msgs: `[{"role": "user" or "assistant", "content": text}]`, or JSON of it. It is left as it is.
            context: with `question` the messages so far, as an earlier turn returned them; with `msgs`, which has the
                whole conversation, not looked at, as ever.
            tokenizer: the tokenizer; the one of the model's folder if None.
            vision_hidden_states: `(views, queries, hidden)`, what `get_image_features` returned for this picture as
                `pooler_output`: it isn't encoded again, but still needed for the prompt.
            max_new_tokens: length of an answer; 2048 with 1.0 and 1024 with 2.0 unless given.
            sampling: whether to sample, or to search with 3 beams; 1.0 searches and 2.0 samples unless told.
            max_inp_length: the most tokens of a prompt. Longer ones are an error; the original cut off their end,
                which is the question.
            processor: the processor, if it isn't that of the model's folder.
            question: in place of `msgs`, as the first release had it: the question's text, or messages.
            kwargs: `temperature`, `top_p`, `num_beams` ...: other values for what the chosen decoding has. What it
                hasn't is ignored, as ever, but with a warning.

        Returns:
            The answer, a new list of the messages with it, and the decoding.

        Raises:
            ValueError: for a picture that can't be used, messages out of turn, both or none of `msgs` and `question`,
                or a prompt that is too long.
        """
        processor = self._chat_processor(tokenizer, processor)
        if (msgs is None) == (question is None):
            raise ValueError("chat takes a conversation as msgs, or one question as question: give one of them.")
        if isinstance(question, str):
            msgs = [*(read_messages(context) if context else ()), {"role": "user", "content": question}]
        messages = read_messages(question if msgs is None else msgs)
        generation = self._chat_decoding(sampling, max_new_tokens, kwargs)
        conversation = copy.deepcopy(messages)
        if image is not None:
            content = [{"type": "image", "image": image}, {"type": "text", "text": messages[0]["content"]}]
            conversation[0]["content"] = content
        elif vision_hidden_states is not None:
            raise ValueError("vision_hidden_states needs the image too: its size decides how the prompt looks.")
        inputs = processor.apply_chat_template(
            conversation,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            processor_kwargs={"max_length": max_inp_length},
        ).to(self.device)
        if vision_hidden_states is not None:
            states = vision_hidden_states
            states = states if isinstance(states, torch.Tensor) else torch.cat(list(states))
            for name in ("pixel_values", "image_sizes", "num_views"):
                del inputs[name]
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=states)}
        ids = self.generate(**inputs, **generation)[0, inputs["input_ids"].shape[1] :]
        answer = processor.answer_text(ids.tolist())
        return answer, [*messages, {"role": "assistant", "content": answer}], generation

    def _chat_decoding(
        self, sampling: bool | None, max_new_tokens: int | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        presets = decoding_presets(self.config)
        name = next(iter(presets)) if sampling is None else "sampling" if sampling else "beam"
        preset = presets[name]
        ignored = [key for key in given if key not in preset]
        if ignored:
            logger.warning("%s is no part of this decoding (%s) and ignored.", ", ".join(ignored), ", ".join(preset))
        changed = {key: value for key, value in given.items() if key in preset}
        if max_new_tokens is not None:
            changed["max_new_tokens"] = max_new_tokens
        return {**preset, **changed}

    def _chat_processor(self, tokenizer: Any, processor: MiniCPMVProcessor | None) -> MiniCPMVProcessor:
        if processor is None:
            processor = self.__dict__.get("_processor_of_chat")
        if processor is None:
            if not self.config.name_or_path:
                raise ValueError(
                    "The model comes from no folder, so chat needs its processor: chat(..., processor=...)."
                )
            processor = MiniCPMVProcessor.from_pretrained(self.config.name_or_path)
            self.__dict__["_processor_of_chat"] = processor
        if tokenizer is not None and tokenizer is not processor.tokenizer:
            processor = copy.copy(processor)
            processor.tokenizer = tokenizer
        return processor


def read_messages(msgs: str | Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Messages, or JSON of them -> a new list of them.

    Raises:
        ValueError: for anything but a non-empty list of `{"role": ..., "content": text}`.
    """
    if isinstance(msgs, str):
        try:
            msgs = json.loads(msgs)
        except json.JSONDecodeError as error:
            raise ValueError(f"The messages are no JSON: {error}.") from error
    if not isinstance(msgs, Sequence) or not msgs:
        raise ValueError('The messages are a non-empty list of {"role": "user" or "assistant", "content": text}.')
    for index, message in enumerate(msgs):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f'Message {index} is not {{"role": "user" or "assistant", "content": text}}.')
    return [{"role": message["role"], "content": message["content"]} for message in msgs]


__all__ = ["MiniCPMVChatMixin"]
