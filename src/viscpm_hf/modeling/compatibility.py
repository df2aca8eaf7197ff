"""The one place that knows how the releases of transformers differ.

transformers 5.24 renamed the key/value cache from `past_key_values` to `cache`: as an argument of `forward`,
`generate` and the functions that make masks, as what gradient checkpointing takes away from a layer, and as a field of
every output. What is ours is written with `cache`, takes both names and shows the installed release's.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import TransformersKwargs


try:
    from transformers.modeling_utils import slice_logits_to_keep  # since 5.21
except ImportError:

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        """The places of `(batch, sequence, hidden)` whose logits are wanted: the last so many (0: all), or those of
        indices `(places,)` or `(batch, places)`, or of a mask `(batch, sequence)`."""
        if isinstance(logits_to_keep, int):
            return hidden_states[:, slice(-logits_to_keep, None)]
        if logits_to_keep.ndim == 1:
            return hidden_states[:, logits_to_keep]
        if logits_to_keep.dtype == torch.bool:
            return hidden_states[logits_to_keep]
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


CACHE_NAMES = ("cache", "past_key_values")
# The installed release's name.
CACHE = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})

# What recomputing activations is called: as arguments of the `Trainer`, and before `_enable` as a model's method.
CHECKPOINTING = (
    "activation_checkpointing"  # since 5.23
    if hasattr(PreTrainedModel, "activation_checkpointing_enable")
    else "gradient_checkpointing"
)

# What transformers hands to any model besides `TransformersKwargs`: what to return, how to check it, for the loss, and
# what `generate` was given to find stop strings.
_OF_ANY_MODEL = {
    "use_cache",
    "return_dict",
    "debug_io",
    "debug_io_dir",
    "prune_layers",
    "shift_labels",
    "ignore_index",
    "tokenizer",
    "assistant_tokenizer",
}
# Of `TransformersKwargs`, what says who sees whom and where a token stands.
_OF_ATTENTION = {
    "position_ids",
    "is_causal",
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
}


def named_cache(kwargs: dict[str, Any], name: str = CACHE) -> dict[str, Any]:
    """Keyword arguments in which the cache, whatever it is called, is called `name`.

    Raises:
        TypeError: if they have it under both names.
    """
    given = [other for other in CACHE_NAMES if other in kwargs]
    if len(given) > 1:
        raise TypeError(f"The cache was given twice, as {' and as '.join(given)}: give one of them.")
    if not given or given[0] == name:
        return kwargs
    return {name if key == given[0] else key: value for key, value in kwargs.items()}


def cache_of(outputs: Any) -> Any:
    """The cache that a model's outputs hold."""
    return getattr(outputs, CACHE)


class WithImageOutputs:
    """For a model output with the field `image_outputs` (as transformers 5.24 has it): what `get_image_features`
    returned, None without images."""

    @property
    def image_hidden_states(self) -> torch.FloatTensor | None:
        """`(images, queries, hidden)`: the images as the language model sees them."""
        return None if self.image_outputs is None else self.image_outputs.pooler_output

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if name == "image_outputs" else value for name, value in self.items())


def takes_cache(method: Callable[..., Any]) -> Callable[..., Any]:
    """For a method that is written with `cache`: callers may call it so or `past_key_values`."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        if CACHE == "cache" and "past_key_values" in kwargs and not torch.compiler.is_compiling():
            warnings.warn("`past_key_values` is deprecated. Use `cache` instead.", FutureWarning, stacklevel=3)
        return method(self, *args, **named_cache(kwargs, "cache"))

    signature = inspect.signature(method)
    parameters = [
        parameter.replace(name=CACHE) if parameter.name == "cache" else parameter
        for parameter in signature.parameters.values()
    ]
    # transformers and others read here what a model takes.
    wrapper.__signature__ = signature.replace(parameters=parameters)
    return wrapper


def only_known_arguments(
    method: Callable[..., Any] | None = None, *, attention_arguments: bool = False
) -> Callable[..., Any]:
    """For a method with `**kwargs`: refuses what nothing would look at, instead of computing something else than was
    asked for. `TransformersKwargs` pass, and whatever is None.

    Args:
        attention_arguments: whether the method also serves those that say who sees whom and where a token stands.

    Raises:
        TypeError: the method, for any other argument.
    """
    if method is None:
        return functools.partial(only_known_arguments, attention_arguments=attention_arguments)
    own = [name for name in inspect.signature(method).parameters if name not in ("self", "kwargs")]
    known = {*own, *CACHE_NAMES} if CACHE in own else set(own)
    known |= _OF_ANY_MODEL | TransformersKwargs.__optional_keys__ - (set() if attention_arguments else _OF_ATTENTION)

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        for name, value in kwargs.items():
            if name not in known and value is not None:
                raise TypeError(
                    f"{type(self).__name__}.{method.__name__} got an unexpected argument {name!r}, which it would "
                    f"have ignored; it takes {', '.join(own)}."
                )
        return method(self, *args, **kwargs)

    return wrapper
