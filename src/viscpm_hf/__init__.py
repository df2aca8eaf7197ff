"""VisCPM in today's Hugging Face stack. Importing it registers every model with transformers' Auto classes."""

from typing import TYPE_CHECKING

from .auto import register
from .version import __version__


register()

# Public names and where they live; loaded when first used.
_EXPORTS = {
    "Beit3Config": "modeling.configuration_beit3",
    "Beit3Model": "modeling.modeling_beit3",
    "CpmBeeConfig": "modeling.configuration_cpm_bee",
    "CpmBeeForCausalLM": "modeling.modeling_cpm_bee",
    "CpmBeeModel": "modeling.modeling_cpm_bee",
    "CpmBeeTokenizer": "modeling.tokenization_cpm_bee",
    "ImageSafetyChecker": "pipelines.safety",
    "OriginalCheckpointError": "conversion.original",
    "ReferenceDecodingConfig": "modeling.beam_search_cpm_bee",
    "UnsafeImageError": "pipelines.safety",
    "VisCPMChat": "chat",
    "VisCPMChatConfig": "modeling.configuration_viscpm_chat",
    "VisCPMChatForConditionalGeneration": "modeling.modeling_viscpm_chat",
    "VisCPMChatModel": "modeling.modeling_viscpm_chat",
    "VisCPMChatProcessor": "modeling.processing_viscpm_chat",
    "VisCPMImageProcessor": "modeling.image_processing_viscpm",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .chat import VisCPMChat
    from .conversion.original import OriginalCheckpointError
    from .modeling.beam_search_cpm_bee import ReferenceDecodingConfig
    from .modeling.configuration_beit3 import Beit3Config
    from .modeling.configuration_cpm_bee import CpmBeeConfig
    from .modeling.configuration_viscpm_chat import VisCPMChatConfig
    from .modeling.image_processing_viscpm import VisCPMImageProcessor
    from .modeling.modeling_beit3 import Beit3Model
    from .modeling.modeling_cpm_bee import CpmBeeForCausalLM, CpmBeeModel
    from .modeling.modeling_viscpm_chat import VisCPMChatForConditionalGeneration, VisCPMChatModel
    from .modeling.processing_viscpm_chat import VisCPMChatProcessor
    from .modeling.tokenization_cpm_bee import CpmBeeTokenizer
    from .pipelines.safety import ImageSafetyChecker, UnsafeImageError


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
