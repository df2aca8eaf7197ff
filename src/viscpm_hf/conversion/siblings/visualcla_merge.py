"""VisualCLA's merging, see `viscpm_hf.conversion.visualcla_merge`."""

from ..visualcla_merge import *  # noqa: F403
