"""`OmniLMMChat`, the interface that OmniLMM-12B and MiniCPM-V came with."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from typing import Any

from ..modeling.chat_minicpmv import read_messages
from ..modeling.configuration_vision_resampler import MiniCPMVConfig
from ..modeling.decoding_presets import decoding_presets
from .sibling_chat import SiblingChat
from .turns import open_picture


IMAGE_ERROR = "Image decode error"
# As the original's wrapper called MiniCPM-V.
_MINICPMV_TEMPERATURE = 0.7
# What bytes that are no picture, or half of one, raise: in base64, in their header, in their pixels.
_IMAGE_ERRORS = (ValueError, OSError, SyntaxError, EOFError, LookupError, TypeError)


def img2base64(file_name: str | os.PathLike) -> bytes:
    """The file in base64, as [`OmniLMMChat.chat`] takes pictures."""
    with open(file_name, "rb") as file:
        return base64.b64encode(file.read())


class OmniLMMChat:
    """OmniLMM-12B or MiniCPM-V 1.0 or 2.0 behind the original class of this name; which of them, the folder says.

    Args:
        model_path: a folder or Hub id, in the original's or our layout.
        options: `device`, `dtype`, `quantization`, `device_map` ...: of [`SiblingChat`].

    ```python
    >>> import json
    >>> from viscpm_hf import OmniLMMChat, img2base64

    >>> model = OmniLMMChat("openbmb/OmniLMM-12B")
    >>> messages = [{"role": "user", "content": "What is interesting about this picture?"}]
    >>> answer = model.chat({"image": img2base64("figures/vision.png"), "question": json.dumps(messages)})
    >>> messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And on the left?"}]
    >>> answer = model.chat({"image": img2base64("figures/vision.png"), "question": json.dumps(messages)})
    ```
    """

    def __init__(self, model_path: str | os.PathLike, **options: Any):
        self.sibling = SiblingChat(model_path, **options)

    def chat(self, input: Mapping[str, Any]) -> str:
        """Answers the last of a conversation's messages. Nothing is kept: send the picture again with every turn.

        Args:
            input: `"image"`: the picture's file in base64, as str or bytes, or None for text alone; `"question"`: JSON
                of `[{"role": "user" or "assistant", "content": text}]`.

        Returns:
            The answer; for a picture that can't be read the words `Image decode error`, as ever.

        Raises:
            ValueError: for messages that are no JSON, out of turn, or too long.
        """
        if "question" not in input:
            raise ValueError('The input has no "question": JSON of a list of messages.')
        messages = read_messages(_with_usual_names(input["question"]))
        if messages[-1]["role"] != "user":
            raise ValueError(f"The last message is the one to answer, but it is the {messages[-1]['role']}'s.")
        image = None
        if input.get("image") is not None:
            try:
                image = open_picture(base64.b64decode(input["image"]), self.sibling.processor.image_processor)
                image.load()
            except _IMAGE_ERRORS:
                return IMAGE_ERROR
        config = self.sibling.model.config
        decoding = dict(decoding_presets(config)["sampling"])
        if isinstance(config, MiniCPMVConfig):
            decoding["temperature"] = _MINICPMV_TEMPERATURE
        turn = self.sibling.ask(image, messages[-1]["content"], json.dumps(messages[:-1]), mode="generate", **decoding)
        return turn.answer


def _with_usual_names(question: str) -> str:
    """LLaVA's names of a message's parts and of who speaks -> those of chat templates."""
    try:
        messages = json.loads(question)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"The question is no JSON: {error}.") from error
    if isinstance(messages, list):
        messages = [_with_usual_name(message) if isinstance(message, dict) else message for message in messages]
    return json.dumps(messages)


def _with_usual_name(message: dict[str, Any]) -> dict[str, Any]:
    own = {"role": message["from"], "content": message.get("value")} if "from" in message else message
    speaker = own.get("role")
    return {**own, "role": {"human": "user", "gpt": "assistant"}[speaker]} if speaker in ("human", "gpt") else own


# Its later name.
MiniCPMVChat = OmniLMMChat
