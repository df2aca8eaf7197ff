"""`generate` for models that see images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from .answering import AnsweringMixin
from .compatibility import CACHE
from .continuous_rows import ContinuousRowsMixin


class ImageGenerationMixin(AnsweringMixin, ContinuousRowsMixin, GenerationMixin):
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict[str, Any]:
        """As in transformers, but with the images in an assistant's first pass too.

        An assistant's passes are all taken for later ones there, which go without images, as if its cache had them.
        """
        if not is_first_iteration and kwargs.get(CACHE) is not None:
            length = kwargs[CACHE].get_seq_length()
            is_first_iteration = isinstance(length, int) and length == 0  # static caches' are on the device
        return super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )


def with_drawing_last(
    processors: Sequence[LogitsProcessor], generation_config: GenerationConfig
) -> LogitsProcessorList:
    """The processors with one that draws tokens itself (`RowSampling`) behind all others: the library puts
    temperature and its like behind those that are given. What it leaves is taken and not drawn, so that torch's
    generators for the whole process stay as they are."""
    ordered = LogitsProcessorList(sorted(processors, key=lambda processor: getattr(processor, "comes_last", False)))
    if ordered and getattr(ordered[-1], "comes_last", False):
        generation_config.do_sample = False
    return ordered
