"""VisCPM in today's Hugging Face stack.

Importing it registers every model with transformers' Auto classes and every pipeline with diffusers, as soon as these
libraries are used; itself it imports neither of them, nor torch.
"""

import threading
from importlib import import_module
from typing import TYPE_CHECKING

from .registration import register
from .tiny.embedded import tiny  # here, that the function goes before the package of its name
from .version import OLDEST, __version__, require


# Before anything that an older library would fail deep within.
require(**{name: OLDEST[name] for name in ("torch", "transformers", "diffusers")})
register()

# Public names and where they live; loaded when first used.
_EXPORTS = {
    "Beit3Config": "modeling.configuration_beit3",
    "Beit3Model": "modeling.modeling_beit3",
    "ChatRequest": "chat.answering",
    "ConversionError": "checkpoints.errors",
    "ConversionResult": "conversion.convert",
    "CpmBeeConfig": "modeling.configuration_cpm_bee",
    "CpmBeeForCausalLM": "modeling.modeling_cpm_bee",
    "CpmBeeModel": "modeling.modeling_cpm_bee",
    "CpmBeeTokenizer": "modeling.tokenization_cpm_bee",
    "ImageSafetyChecker": "pipelines.safety",
    "Inspection": "conversion.inspect",
    "LegacySentencePieceTokenizer": "modeling.tokenization_legacy_sentencepiece",
    "MiniCPMVChat": "chat.omnilmm",
    "MiniCPMVConfig": "modeling.configuration_vision_resampler",
    "MiniCPMVForConditionalGeneration": "modeling.modeling_vision_resampler",
    "MiniCPMVImageProcessor": "modeling.image_processing_minicpmv",
    "MiniCPMVProcessor": "modeling.processing_minicpmv",
    "OmniLMMChat": "chat.omnilmm",
    "OmniLMMConfig": "modeling.configuration_vision_resampler",
    "OmniLMMForConditionalGeneration": "modeling.modeling_vision_resampler",
    "OmniLMMProcessor": "modeling.processing_omnilmm",
    "OriginalCheckpointError": "checkpoints.errors",
    "PackedConfig": "modeling.packed_linear",
    "ReferenceDecodingConfig": "modeling.beam_search_cpm_bee",
    "SiblingChat": "chat.sibling_chat",
    "UnsafeImageError": "pipelines.safety",
    "UnsafePromptError": "pipelines.prompt_safety",
    "VisCPMChat": "chat.chat",
    "VisCPMChatConfig": "modeling.configuration_viscpm_chat",
    "VisCPMChatForConditionalGeneration": "modeling.modeling_viscpm_chat",
    "VisCPMChatModel": "modeling.modeling_viscpm_chat",
    "VisCPMChatProcessor": "modeling.processing_viscpm_chat",
    "VisCPMImageProcessor": "modeling.image_processing_viscpm",
    "VisCPMPaint": "paint.paint",
    "VisCPMPaintControlNetPipeline": "pipelines.pipeline_viscpm_paint_controlnet",
    "VisCPMPaintImg2ImgPipeline": "pipelines.pipeline_viscpm_paint_img2img",
    "VisCPMPaintInpaintPipeline": "pipelines.pipeline_viscpm_paint_inpaint",
    "VisCPMPaintPipeline": "pipelines.pipeline_viscpm_paint",
    "VisCPMPaintTextEncoder": "modeling.modeling_viscpm_paint",
    "VisCPMPaintTextEncoderConfig": "modeling.configuration_viscpm_paint",
    "VisualCLAConfig": "modeling.configuration_vision_resampler",
    "VisualCLAForConditionalGeneration": "modeling.modeling_vision_resampler",
    "VisualCLAProcessor": "modeling.processing_visualcla",
    "convert": "conversion.convert",
    "img2base64": "chat.omnilmm",
    "inspect": "conversion.inspect",
    "memory_plan": "memory.plan",
    "publish": "conversion.publish",
}

__all__ = ["__version__", "tiny", *_EXPORTS]

# One thread at a time: transformers and diffusers are half there for another that imports them meanwhile.
_LOADING = threading.RLock()

if TYPE_CHECKING:
    from .chat.answering import ChatRequest
    from .chat.chat import VisCPMChat
    from .chat.omnilmm import MiniCPMVChat, OmniLMMChat, img2base64
    from .chat.sibling_chat import SiblingChat
    from .checkpoints.errors import ConversionError, OriginalCheckpointError
    from .conversion.convert import ConversionResult, convert
    from .conversion.inspect import inspect
    from .conversion.inspection import Inspection
    from .conversion.publish import publish
    from .memory.plan import memory_plan
    from .modeling.beam_search_cpm_bee import ReferenceDecodingConfig
    from .modeling.configuration_beit3 import Beit3Config
    from .modeling.configuration_cpm_bee import CpmBeeConfig
    from .modeling.configuration_viscpm_chat import VisCPMChatConfig
    from .modeling.configuration_viscpm_paint import VisCPMPaintTextEncoderConfig
    from .modeling.configuration_vision_resampler import MiniCPMVConfig, OmniLMMConfig, VisualCLAConfig
    from .modeling.image_processing_minicpmv import MiniCPMVImageProcessor
    from .modeling.image_processing_viscpm import VisCPMImageProcessor
    from .modeling.modeling_beit3 import Beit3Model
    from .modeling.modeling_cpm_bee import CpmBeeForCausalLM, CpmBeeModel
    from .modeling.modeling_viscpm_chat import VisCPMChatForConditionalGeneration, VisCPMChatModel
    from .modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
    from .modeling.modeling_vision_resampler import (
        MiniCPMVForConditionalGeneration,
        OmniLMMForConditionalGeneration,
        VisualCLAForConditionalGeneration,
    )
    from .modeling.packed_linear import PackedConfig
    from .modeling.processing_minicpmv import MiniCPMVProcessor
    from .modeling.processing_omnilmm import OmniLMMProcessor
    from .modeling.processing_viscpm_chat import VisCPMChatProcessor
    from .modeling.processing_visualcla import VisualCLAProcessor
    from .modeling.tokenization_cpm_bee import CpmBeeTokenizer
    from .modeling.tokenization_legacy_sentencepiece import LegacySentencePieceTokenizer
    from .paint.paint import VisCPMPaint
    from .pipelines.pipeline_viscpm_paint import VisCPMPaintPipeline
    from .pipelines.pipeline_viscpm_paint_controlnet import VisCPMPaintControlNetPipeline
    from .pipelines.pipeline_viscpm_paint_img2img import VisCPMPaintImg2ImgPipeline
    from .pipelines.pipeline_viscpm_paint_inpaint import VisCPMPaintInpaintPipeline
    from .pipelines.prompt_safety import UnsafePromptError
    from .pipelines.safety import ImageSafetyChecker, UnsafeImageError


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _LOADING:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
