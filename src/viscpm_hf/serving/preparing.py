"""From conversations and images to what the engine takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import PIL.Image
import torch

from ..chat.chat import VisCPMChat
from ..modeling.chat_processing import Prompt
from ..pipelines.safety import UnsafeImageError
from .image_cache import ImageCache, image_key
from .tickets import PreparedImage, PreparedPrompt


# An image, or what opens it: of several large ones only one is in memory at a time then.
Picture = PIL.Image.Image | Callable[[], PIL.Image.Image]


class PromptPreparer:
    """Checks, tokenises and resizes; needs no model and may run in any thread."""

    def __init__(self, chat: VisCPMChat):
        self.chat = chat

    def messages(self, messages: Sequence[Mapping[str, Any]], images: Sequence[Picture] = ()) -> PreparedPrompt:
        """A conversation as the chat template takes it, its images in order: one after the other is opened.

        Raises:
            ValueError: for a conversation out of turn, an unusable image, or a prompt that is too long.
            UnsafeImageError: if the safety checker flags an image.
        """
        return self._prepared(lambda grids: self.chat.processor.encode_chat(messages, grids), images)

    def turn(self, image: PIL.Image.Image | None, question: str, context: str = "") -> PreparedPrompt:
        """A question as [`VisCPMChat.chat`] takes it; raises as [`messages`]."""
        images = [] if image is None else [image]
        return self._prepared(lambda grids: self.chat.processor.encode_turn(question, context, grids), images)

    def _prepared(
        self, encode: Callable[[list[tuple[int, int]]], Prompt], images: Sequence[Picture]
    ) -> PreparedPrompt:
        one_view = [(0, 0)] * len(images)
        prompt = encode(one_view)  # what is wrong with the text is known before any image is opened
        prepared = [self._image(image) for image in images]
        grids = [image.views.grid for image in prepared]
        return PreparedPrompt(prompt if grids == one_view else encode(grids), tuple(prepared))

    def _image(self, image: Picture) -> PreparedImage:
        processor, checker = self.chat.processor, self.chat.image_safety_checker
        # The checker sees what the model does.
        image = processor.image_processor.fetch_images(image() if callable(image) else image)
        if checker is not None and checker(image):
            raise UnsafeImageError("The safety checker flagged the image, so nothing is answered about it.")
        views = processor.views_of(image)
        sizes = None if views.image_sizes is None else views.image_sizes.tolist()  # black, or beside the image
        return PreparedImage(
            views, image_key((*views.pixel_values.shape, sizes), views.pixel_values.numpy().tobytes())
        )


class ImageEncoder:
    """The vision tower behind its cache, for the engine's thread."""

    def __init__(self, chat: VisCPMChat, cache: ImageCache):
        self.chat = chat
        self.cache = cache

    def __call__(self, prompts: Sequence[PreparedPrompt]) -> list[torch.Tensor | None]:
        """The encoded views of every prompt; images that aren't cached go through the tower together."""
        views = {image.key: image.views for prompt in prompts for image in prompt.images}
        known = {key: self.cache.get(key) for key in views}
        missing = [key for key, encoded in known.items() if encoded is None]
        if missing:
            encoded = self.chat.processor.encode_images(self.chat.model, [views[key] for key in missing])
            for key, own in zip(missing, encoded, strict=True):
                known[key] = own.features.clone()  # or one image of several would keep the others in memory
                self.cache.put(key, known[key])
        return [
            torch.cat([known[image.key] for image in prompt.images]) if prompt.images else None for prompt in prompts
        ]
