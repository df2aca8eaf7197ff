"""Errors of reading and converting checkpoints."""

from ..plain_text import MAX_MESSAGE_CHARACTERS, plain


class _CheckpointError(ValueError):
    """Its message may name what a file says, so it is made plain whoever shows it."""

    def __init__(self, message: object = ""):
        super().__init__(plain(message, MAX_MESSAGE_CHARACTERS))


class OriginalCheckpointError(_CheckpointError):
    """An original file that can't be used; the message says what is wrong with it and what to do."""


class ConversionError(_CheckpointError):
    """A conversion, or a converted folder, that can't be gone on with; the message says why and what to do."""
