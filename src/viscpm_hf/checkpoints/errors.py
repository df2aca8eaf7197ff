"""Errors of reading and converting checkpoints."""


class OriginalCheckpointError(ValueError):
    """An original file that can't be used; the message says what is wrong with it and what to do."""


class ConversionError(ValueError):
    """A conversion, or a converted folder, that can't be gone on with; the message says why and what to do."""
