"""How the pipelines' `from_pretrained` reads: as diffusers does, or as viscpm_hf, where it is imported, does.

A saved pipeline's own code has this file, and no more of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


# Reads the original's files too: `opener(stock, pipeline_class, name_or_path, **kwargs)`.
opener: Callable[..., Any] | None = None


def open_pipeline(stock: Callable[..., Any], pipeline_class: type, name_or_path: Any, **kwargs: Any) -> Any:
    """A pipeline of a folder or Hub id; `stock` is diffusers' own `from_pretrained` of the class."""
    if opener is None:
        return stock(name_or_path, **kwargs)
    return opener(stock, pipeline_class, name_or_path, **kwargs)
