"""VisualCLA's own interface, see `viscpm_hf.chat.visualcla`."""

from ..chat.visualcla import *  # noqa: F403
from ..chat.visualcla import _inputs  # noqa: F401  (by which recorded conversations are compared)
