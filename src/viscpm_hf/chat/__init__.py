"""One conversation or many: VisCPM-Chat, OmniLMM-12B, MiniCPM-V 1.0 and 2.0, and VisualCLA."""

from .chat import ChatTurn, VisCPMChat


__all__ = ["ChatTurn", "VisCPMChat"]
