"""The command `viscpm-hf`."""

from .main import main


__all__ = ["main"]
