"""Every system is a row: its classes, its key maps, and the names that its original repositories go by.

A new system is one more row here, a key map, and its files in `modeling/` (CONTRIBUTING.md). Nothing else asks which
system a checkpoint is of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
    TokenizersBackend,
)

from ..modeling.configuration_beit3 import Beit3Config
from ..modeling.configuration_cpm_bee import CpmBeeConfig
from ..modeling.configuration_viscpm_chat import VisCPMChatConfig
from ..modeling.configuration_viscpm_paint import VisCPMPaintTextEncoderConfig
from ..modeling.configuration_vision_resampler import MiniCPMVConfig, OmniLMMConfig, VisualCLAConfig
from ..modeling.image_processing_minicpmv import MiniCPMVImageProcessor
from ..modeling.image_processing_viscpm import VisCPMImageProcessor
from ..modeling.modeling_beit3 import Beit3Model
from ..modeling.modeling_cpm_bee import CpmBeeForCausalLM, CpmBeeModel
from ..modeling.modeling_viscpm_chat import VisCPMChatForConditionalGeneration, VisCPMChatModel
from ..modeling.modeling_viscpm_paint import VisCPMPaintTextEncoder
from ..modeling.modeling_vision_resampler import (
    MiniCPMVForConditionalGeneration,
    OmniLMMForConditionalGeneration,
    VisualCLAForConditionalGeneration,
)
from ..modeling.processing_minicpmv import MiniCPMVProcessor
from ..modeling.processing_omnilmm import OmniLMMProcessor
from ..modeling.processing_viscpm_chat import VisCPMChatProcessor
from ..modeling.processing_visualcla import VisualCLAProcessor
from ..modeling.tokenization_cpm_bee import CpmBeeTokenizer
from ..modeling.tokenization_legacy_sentencepiece import LegacySentencePieceTokenizer
from . import key_maps
from .key_maps import KeyMap


# How an original is read (`checkpoints.readers`).
CPM_BEE_FORM, COMPOSITE_FORM = "cpm_bee", "composite"
CHAT, CPM_BEE, PAINT, BEIT3 = "chat", "cpm_bee", "paint", "beit3"
LANGUAGE_MODEL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """A system."""

    kind: str
    title: str
    """Its name, for people."""
    config_class: type[PreTrainedConfig]
    models: Mapping[type, type[PreTrainedModel]]
    """Auto class -> model class, of our own folders."""
    key_maps: tuple[KeyMap, ...] = ()
    """What loads original files; the first one is also the way back."""
    processor_class: type | None = None
    tokenizer_class: type | None = None
    image_processor_class: type | None = None
    original_types: tuple[str, ...] = ()
    """`model_type` in an original `config.json`, where it isn't ours."""
    tokenizer_names: tuple[str, ...] = ()
    """Names of our tokenizer's class in original repositories."""
    image_processor_name: str | None = None
    """Likewise of the image processor's."""
    releases: Mapping[str, str | None] = field(default_factory=dict)
    """Alternatives within the original repository by their released names: the `variant` that means each."""
    form: str = CPM_BEE_FORM
    """How originals are read: a key of `checkpoints.readers.READERS`."""
    parts: tuple[tuple[str, str], ...] = ()
    """Beginnings of an original's names, and the part of the model that they are of; all others are the language
    model's."""
    placeholder: tuple[str, int] | None = None
    """The image's token, and how far it is from the vocabulary's end if no file of the tokenizer tells."""
    language_model: str = "language_model.model"
    """Where the language model without its head is within the model."""
    half: str = "bfloat16"
    """The half precision that the weights were released in."""
    streams_layers: bool = False
    """Whether the language model's layers can be streamed to a GPU (`loading.layer_streaming`)."""
    image_weights: str = r"vision_tower\."
    """Of an image alone, as a regular expression: what fine-tuning that leaves the vision as it is doesn't train."""
    idle_weights: str = "$^"
    """What never gets a gradient, likewise; `{last}` is the tower's last layer."""
    lora_targets: tuple[str, ...] = (rf"language_model\..*\.({'|'.join(LANGUAGE_MODEL_LINEAR)})",)
    """Every linear layer of the language model: names, or one regular expression."""
    vocabulary_class: type | None = None
    """A tokenizer that is made of a `vocab.txt` alone; None if its files are several."""
    has_images_in_turns: bool = False
    """Whether its users asked about several images in one conversation, each with a question of its own."""

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """What an original repository's own `AutoModel` gives: the model that answers, not the one without a head."""
        return self.models.get(AutoModelForImageTextToText) or self.models.get(AutoModelForCausalLM, self.base_class)

    @property
    def base_class(self) -> type[PreTrainedModel]:
        return self.models[AutoModel]

    @property
    def shares_model_type(self) -> bool:
        """Whether our model type is the originals' too."""
        return bool(self.key_maps) and not self.original_types

    def part_of(self, name: str) -> str:
        """The part of the model that an original tensor is of."""
        return next((part for prefix, part in self.parts if name.startswith(prefix)), "language model")


def _answering(model_class: type[PreTrainedModel], base_class: type[PreTrainedModel] | None = None) -> dict:
    autos = (AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM)
    return {AutoModel: base_class or model_class, **dict.fromkeys(autos, model_class)}


FAMILIES: dict[str, Family] = {
    family.kind: family
    for family in (
        Family(
            CHAT,
            "VisCPM-Chat",
            VisCPMChatConfig,
            _answering(VisCPMChatForConditionalGeneration, VisCPMChatModel),
            (key_maps.CHAT,),
            VisCPMChatProcessor,
            CpmBeeTokenizer,
            VisCPMImageProcessor,
            original_types=("viscpmchatbee",),
            tokenizer_names=("VisCpmChatBeeTokenizer",),
            image_processor_name="VisCpmChatBeeImageProcessor",
            releases={"balance": None, "v1.1": "v1", "zhplus": "zhplus"},
            parts=(("query", "vision tower"), ("vpm.", "vision tower"), ("mapping.", "projector")),
            image_weights=r"vision_tower\..*(\.image\.|cls_token|image_position_embedding)",
            # Of the last layer only the queries leave the tower.
            idle_weights=r"vision_tower\.(layer_norm\.image\.|layers\.{last}\.(?!self_attn_layer_norm|"
            r"self_attn\.[kv]_experts).*\.image\.)",
            lora_targets=LANGUAGE_MODEL_LINEAR,  # the tower's have other names
            language_model="model.language_model",
            half="float16",
            streams_layers=True,
            vocabulary_class=CpmBeeTokenizer,
        ),
        Family(
            CPM_BEE,
            "CPM-Bee",
            CpmBeeConfig,
            {AutoModel: CpmBeeModel, AutoModelForCausalLM: CpmBeeForCausalLM},
            (key_maps.CPM_BEE, key_maps.CPM_BEE_WITHIN, key_maps.CPM_BEE_SAVED),
            tokenizer_class=CpmBeeTokenizer,
            original_types=("cpmbee",),
            language_model="model",
            half="float16",
        ),
        Family(
            PAINT,
            "VisCPM-Paint",
            VisCPMPaintTextEncoderConfig,
            {AutoModel: VisCPMPaintTextEncoder},
            (key_maps.PAINT_TEXT_ENCODER,),
            tokenizer_class=CpmBeeTokenizer,
            original_types=("viscpmbee",),
            tokenizer_names=("VisCpmBeeTokenizer",),
            releases={"zhplus": None, "balance": "balance"},
            parts=(("trans_block.", "projection"), ("unet.", "UNet")),
            language_model="model",
            half="float16",
            streams_layers=True,
        ),
        Family(BEIT3, "BEiT-3", Beit3Config, {AutoModel: Beit3Model}),
        Family(
            OmniLMMConfig.model_type,
            "OmniLMM-12B",
            OmniLMMConfig,
            _answering(OmniLMMForConditionalGeneration),
            (key_maps.OMNILMM,),
            OmniLMMProcessor,
            TokenizersBackend,
            VisCPMImageProcessor,
            parts=(("model.vision_tower.", "vision tower"), ("model.resampler.", "resampler")),
            form=COMPOSITE_FORM,
            placeholder=("<im_patch>", 9),
        ),
        Family(
            MiniCPMVConfig.model_type,
            "MiniCPM-V",
            MiniCPMVConfig,
            _answering(MiniCPMVForConditionalGeneration),
            (key_maps.MINICPMV,),
            MiniCPMVProcessor,
            LegacySentencePieceTokenizer,
            MiniCPMVImageProcessor,
            parts=(("vpm.", "vision tower"), ("resampler.", "resampler")),
            form=COMPOSITE_FORM,
        ),
        Family(
            VisualCLAConfig.model_type,
            "VisualCLA-7B",
            VisualCLAConfig,
            _answering(VisualCLAForConditionalGeneration),
            (key_maps.VISUALCLA,),
            VisualCLAProcessor,
            LegacySentencePieceTokenizer,
            VisCPMImageProcessor,
            parts=(
                ("vision_model.", "vision tower"),
                ("visual_resampler.", "resampler"),
                ("image_projection_layer.", "resampler"),
            ),
            form=COMPOSITE_FORM,
            placeholder=("<img_token>", 1),
            has_images_in_turns=True,
        ),
    )
}
# What answers questions about images.
CHATS = tuple(kind for kind, family in FAMILIES.items() if family.processor_class is not None)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a configuration by our names."""
    return next(family for family in FAMILIES.values() if type(config) is family.config_class)
