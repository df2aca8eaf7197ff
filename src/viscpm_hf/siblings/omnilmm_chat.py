"""OmniLMM's own interface, see `viscpm_hf.chat.omnilmm`."""

from ..chat.omnilmm import MiniCPMVChat, OmniLMMChat, img2base64


__all__ = ["MiniCPMVChat", "OmniLMMChat", "img2base64"]
