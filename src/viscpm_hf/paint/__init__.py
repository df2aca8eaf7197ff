"""VisCPM-Paint behind the original's own interface: one picture or many."""

from .paint import PaintResult, VisCPMPaint, image_grid


__all__ = ["PaintResult", "VisCPMPaint", "image_grid"]
