"""VisualCLA's splitting, see `viscpm_hf.conversion.visualcla_split`."""

from ..visualcla_split import *  # noqa: F403
