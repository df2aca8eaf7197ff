"""Imports without other libraries' warnings about themselves, and without a search for garbage in what they make."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Lets these loggers report errors only, as long as it lasts."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Lets Python's garbage collector wait, as long as it lasts.

    Importing torch and transformers makes 400,000 objects that stay; looking through them again and again takes a
    sixth of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
