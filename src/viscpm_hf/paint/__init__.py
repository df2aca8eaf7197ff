"""VisCPM-Paint behind the original's own interface: one picture or many."""

from .paint import PRESETS, EncodedPrompt, PaintResult, VisCPMPaint, image_grid
from .record import Record, RecordError, read_record


__all__ = [
    "PRESETS",
    "EncodedPrompt",
    "PaintResult",
    "Record",
    "RecordError",
    "VisCPMPaint",
    "image_grid",
    "read_record",
]
