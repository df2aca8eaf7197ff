"""VisualCLA's own interface, see `viscpm_hf.chat.visualcla`."""

from ..chat.visualcla import *  # noqa: F403
