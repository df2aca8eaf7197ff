"""From conversations and pictures to what the engine takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import PIL.Image
import torch
from jinja2 import TemplateError

from ..chat.chat import VisCPMChat
from ..modeling.document_cpm_bee import ANSWER_KEY
from ..modeling.processing_viscpm_chat import ChatPrompt
from ..pipelines.safety import UnsafeImageError
from .image_cache import ImageCache, image_key
from .tickets import PreparedImage, PreparedPrompt


# A picture, or what opens it: of several large ones only one is in memory at a time then.
Picture = PIL.Image.Image | Callable[[], PIL.Image.Image]


def opened(picture: Picture) -> PIL.Image.Image:
    return picture() if callable(picture) else picture


class PromptPreparer:
    """Checks, tokenises and resizes; needs no model and may run in any thread."""

    def __init__(self, chat: VisCPMChat):
        self.chat = chat

    def messages(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Picture] = ()) -> PreparedPrompt:
        """A conversation as the chat template takes it, its pictures in order: one after the other is opened.

        Raises:
            ValueError: for a conversation without a question, an unusable picture, or a prompt that is too long.
            UnsafeImageError: if the safety checker flags a picture.
        """
        processor = self.chat.processor
        try:
            text = processor.apply_chat_template(list(messages), tokenize=False)
        except TemplateError as error:
            raise ValueError(str(error)) from error
        prompt = processor.parse_prompt(text)
        if prompt.num_images != len(images):
            raise ValueError(f"The messages have {prompt.num_images} pictures, but {len(images)} were given.")
        return self._prepare(prompt, images)

    def turn(self, image: PIL.Image.Image | None, question: str, context: str = "") -> PreparedPrompt:
        """A question as [`VisCPMChat.chat`] takes it; raises as [`messages`]."""
        document = {"context": context, "question": self.chat.processor.tokenizer.escape(question), ANSWER_KEY: ""}
        images = [] if image is None else [image]
        return self._prepare(ChatPrompt(document, len(images)), images)

    def _prepare(self, prompt: ChatPrompt, images: Sequence[Picture]) -> PreparedPrompt:
        processor, checker = self.chat.processor, self.chat.image_safety_checker
        document = processor.encode_prompt(prompt)
        processor.check_length(document)
        prepared = []
        for image in images:
            image = processor.image_processor.fetch_images(opened(image))  # the checker sees what the model does
            if checker is not None and checker(image):
                raise UnsafeImageError("The safety checker flagged the image, so nothing is answered about it.")
            pixel_values = processor.image_processor(image, return_tensors="pt")["pixel_values"]
            key = image_key(pixel_values.shape, pixel_values.numpy().tobytes())
            prepared.append(PreparedImage(pixel_values, key))
        return PreparedPrompt(document, tuple(prepared))


class ImageEncoder:
    """The vision tower behind its cache, for the engine's thread."""

    def __init__(self, model, cache: ImageCache):
        self.model = model
        self.cache = cache

    def __call__(self, prompts: Sequence[PreparedPrompt]) -> list[torch.Tensor | None]:
        """The encoded images of every prompt; pictures that aren't cached go through the tower together."""
        known: dict[str, torch.Tensor] = {}
        missing: dict[str, torch.Tensor] = {}
        for image in (image for prompt in prompts for image in prompt.images):
            if image.key in known or image.key in missing:
                continue
            encoded = self.cache.get(image.key)
            if encoded is None:
                missing[image.key] = image.pixel_values
            else:
                known[image.key] = encoded
        if missing:
            pixel_values = torch.cat(list(missing.values())).to(self.model.device)
            with torch.no_grad():
                encoded_images = self.model.get_image_features(pixel_values).pooler_output
            for key, encoded in zip(missing, encoded_images, strict=True):
                known[key] = encoded[None].clone()
                self.cache.put(key, known[key])
        return [
            torch.cat([known[image.key] for image in prompt.images]) if prompt.images else None for prompt in prompts
        ]
