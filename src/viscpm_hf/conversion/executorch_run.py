"""Exported programs on this machine, by ExecuTorch's Python runtime: what an app does, in Python."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..checkpoints.errors import ConversionError
from ..checkpoints.location import json_object
from ..modeling.processing_minicpmv import MiniCPMVProcessor


DESCRIPTION_NAME = "export.json"
PARTS = ("vision", "token_embedding", "language_model")


def view_method(height: int, width: int) -> str:
    """The name, in `vision.pte`, of the method for views of this size."""
    return f"view_{height}x{width}"


class ExportedModel:
    """The programs of a folder that `viscpm-hf export` wrote.

    Raises:
        ConversionError: if it isn't one.
        ImportError: without executorch.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = folder = Path(folder)
        description = json_object(folder / DESCRIPTION_NAME)
        if description.get("format") != "executorch":
            raise ConversionError(f"{folder} has no {DESCRIPTION_NAME} of viscpm-hf export --format executorch.")
        from executorch.runtime import Runtime

        self.views = [tuple(view) for view in description["views"]]
        self.context, self.chunk = description["context"], description["chunk"]
        self.eos_token_id, self.image_token_id = description["eos_token_id"], description["image_token_id"]
        self.processor = MiniCPMVProcessor.from_pretrained(folder)
        # The programs are held as well: a method doesn't keep its own alive.
        self._programs = {part: Runtime.get().load_program(folder / f"{part}.pte") for part in PARTS}
        self._methods: dict[tuple[str, str], Any] = {}

    def _run(self, part: str, *arguments: torch.Tensor, method: str = "forward") -> torch.Tensor:
        if (part, method) not in self._methods:
            self._methods[part, method] = self._programs[part].load_method(method)
        return self._methods[part, method].execute([argument.contiguous() for argument in arguments])[0].clone()

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(1, 3, height, width)` -> `(1, queries, text hidden)`.

        Raises:
            ValueError: for a size that wasn't exported.
        """
        size = tuple(pixel_values.shape[-2:])
        if size not in self.views:
            known = ", ".join(f"{height}x{width}" for height, width in self.views)
            raise ValueError(f"Views of {size[0]}x{size[1]} pixels weren't exported, only of {known}: add --view.")
        return self._run("vision", pixel_values, method=view_method(*size))

    def embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(1, tokens)` -> `(1, tokens, text hidden)`."""
        return torch.cat([self._run("token_embedding", ids) for ids in input_ids.split(self.chunk, dim=1)], dim=1)

    def logits(self, inputs_embeds: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Of the last token, `(vocabulary,)`; `start` is the first one's place in the context.

        Raises:
            ValueError: if the context is too short.
        """
        end = start + inputs_embeds.shape[1]
        if end > self.context:
            raise ValueError(f"The context was exported for {self.context} tokens, and {end} are needed: --context.")
        for piece in inputs_embeds.split(self.chunk, dim=1):
            logits = self._run("language_model", piece, torch.arange(start, start + piece.shape[1]))
            start += piece.shape[1]
        return logits[0, -1]

    def inputs(self, image: PIL.Image.Image | None, question: str) -> dict[str, torch.Tensor]:
        """`input_ids (1, tokens)`, and of a picture `pixel_values`: one view, of the exported size whose shape is
        nearest the picture's."""
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        options: dict[str, Any] = {}
        if image is not None:
            content.insert(0, {"type": "image", "image": image})
            shape = image.height / image.width
            height, width = min(self.views, key=lambda view: abs(math.log(view[0] / view[1] / shape)))
            options = {"slice_mode": "square", "size": {"height": height, "width": width}}
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        return {name: inputs[name] for name in ("input_ids", "pixel_values") if name in inputs}

    def generate(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None, max_new_tokens: int = 64
    ) -> list[int]:
        """The most likely tokens one after the other, until the end of the answer or the context's."""
        embeds = self.embeddings(input_ids)
        if pixel_values is not None:
            mask = (input_ids == self.image_token_id)[..., None]
            embeds = embeds.masked_scatter(mask, self.image_features(pixel_values))
        answer: list[int] = []
        start = 0
        while True:
            token = int(self.logits(embeds, start).argmax())
            start += embeds.shape[1]
            answer.append(token)
            if token == self.eos_token_id or len(answer) == max_new_tokens or start == self.context:
                return answer
            embeds = self.embeddings(torch.tensor([[token]]))

    def chat(self, image: PIL.Image.Image | None, question: str, max_new_tokens: int = 64) -> str:
        """The answer to one question."""
        return self.processor.answer_text(self.generate(**self.inputs(image, question), max_new_tokens=max_new_tokens))
