"""Every system is a row: its classes, its key maps, and the names that its original repositories go by.

A new system is one more row here, a key map, and its files in `modeling/` (CONTRIBUTING.md). Nothing else asks which
system a checkpoint is of. A row names classes by their places, and they are imported when they are asked for: what a
checkpoint is can be told without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import key_maps
from .key_maps import KeyMap


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


# How an original is read (`checkpoints.readers`).
CPM_BEE_FORM, COMPOSITE_FORM = "cpm_bee", "composite"
CHAT, CPM_BEE, PAINT, BEIT3 = "chat", "cpm_bee", "paint", "beit3"
OMNILMM, MINICPMV, VISUALCLA = "omnilmm", "minicpmv", "visualcla"
LANGUAGE_MODEL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _class_at(place: str) -> type:
    """`"file.Class"` of `modeling`, or `"transformers.Class"`."""
    module, _, name = place.rpartition(".")
    home = module if module == "transformers" else f"{__package__.rpartition('.')[0]}.modeling.{module}"
    return getattr(import_module(home), name)


class _Classes:
    """A field of classes, one or a mapping of them: given by their places or as they are, read as they are."""

    def __init__(self, default: Any = None):
        self.default = default

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __set__(self, row: Any, value: Any):
        row.__dict__[self.name] = value

    def __get__(self, row: Any, owner: type | None = None):
        if row is None:
            return self.default
        value = row.__dict__[self.name]
        if isinstance(value, Mapping):
            value = {_resolved(auto): _resolved(model) for auto, model in value.items()}
        row.__dict__[self.name] = value = _resolved(value)
        return value


def _resolved(value: Any) -> Any:
    return _class_at(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Family:
    """A system."""

    kind: str
    title: str
    """Its name, for people."""
    config_class: type[PreTrainedConfig] = _Classes()
    models: Mapping[type, type[PreTrainedModel]] = _Classes()
    """Auto class -> model class, of our own folders."""
    key_maps: tuple[KeyMap, ...] = ()
    """What loads original files; the first one is also the way back."""
    processor_class: type | None = _Classes()
    tokenizer_class: type | None = _Classes()
    image_processor_class: type | None = _Classes()
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
    vocabulary_class: type | None = _Classes()
    """A tokenizer that is made of a `vocab.txt` alone; None if its files are several."""
    has_images_in_turns: bool = False
    """Whether its users asked about several images in one conversation, each with a question of its own."""
    model_type: str = ""
    """In the `config.json` of our own folders; `kind` if it is the same."""

    def __post_init__(self):
        object.__setattr__(self, "model_type", self.model_type or self.kind)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        """What an original repository's own `AutoModel` gives: the model that answers, not the one without a head."""
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        return self.models.get(AutoModelForImageTextToText) or self.models.get(AutoModelForCausalLM, self.base_class)

    @property
    def base_class(self) -> type[PreTrainedModel]:
        from transformers import AutoModel

        return self.models[AutoModel]

    @property
    def answers(self) -> bool:
        """Whether it answers questions about images."""
        return self.__dict__["processor_class"] is not None

    @property
    def shares_model_type(self) -> bool:
        """Whether our model type is the originals' too."""
        return bool(self.key_maps) and not self.original_types

    def part_of(self, name: str) -> str:
        """The part of the model that an original tensor is of."""
        return next((part for prefix, part in self.parts if name.startswith(prefix)), "language model")


def _answering(model_class: str | type, base_class: str | type | None = None) -> dict[str, str | type]:
    autos = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForCausalLM")
    return {
        "transformers.AutoModel": base_class or model_class,
        **{f"transformers.{auto}": model_class for auto in autos},
    }


FAMILIES: dict[str, Family] = {
    family.kind: family
    for family in (
        Family(
            CHAT,
            "VisCPM-Chat",
            "configuration_viscpm_chat.VisCPMChatConfig",
            _answering(
                "modeling_viscpm_chat.VisCPMChatForConditionalGeneration", "modeling_viscpm_chat.VisCPMChatModel"
            ),
            (key_maps.CHAT,),
            "processing_viscpm_chat.VisCPMChatProcessor",
            "tokenization_cpm_bee.CpmBeeTokenizer",
            "image_processing_viscpm.VisCPMImageProcessor",
            model_type="viscpm_chat",
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
            vocabulary_class="tokenization_cpm_bee.CpmBeeTokenizer",
        ),
        Family(
            CPM_BEE,
            "CPM-Bee",
            "configuration_cpm_bee.CpmBeeConfig",
            {
                "transformers.AutoModel": "modeling_cpm_bee.CpmBeeModel",
                "transformers.AutoModelForCausalLM": "modeling_cpm_bee.CpmBeeForCausalLM",
            },
            (key_maps.CPM_BEE, key_maps.CPM_BEE_WITHIN, key_maps.CPM_BEE_SAVED),
            tokenizer_class="tokenization_cpm_bee.CpmBeeTokenizer",
            model_type="viscpm_cpm_bee",
            original_types=("cpmbee",),
            language_model="model",
            half="float16",
        ),
        Family(
            PAINT,
            "VisCPM-Paint",
            "configuration_viscpm_paint.VisCPMPaintTextEncoderConfig",
            {"transformers.AutoModel": "modeling_viscpm_paint.VisCPMPaintTextEncoder"},
            (key_maps.PAINT_TEXT_ENCODER,),
            tokenizer_class="tokenization_cpm_bee.CpmBeeTokenizer",
            model_type="viscpm_paint_text_encoder",
            original_types=("viscpmbee",),
            tokenizer_names=("VisCpmBeeTokenizer",),
            releases={"zhplus": None, "balance": "balance"},
            parts=(("trans_block.", "projection"), ("unet.", "UNet")),
            language_model="model",
            half="float16",
            streams_layers=True,
        ),
        Family(
            BEIT3,
            "BEiT-3",
            "configuration_beit3.Beit3Config",
            {"transformers.AutoModel": "modeling_beit3.Beit3Model"},
            model_type="viscpm_beit3",
        ),
        Family(
            OMNILMM,
            "OmniLMM-12B",
            "configuration_vision_resampler.OmniLMMConfig",
            _answering("modeling_vision_resampler.OmniLMMForConditionalGeneration"),
            (key_maps.OMNILMM,),
            "processing_omnilmm.OmniLMMProcessor",
            "transformers.TokenizersBackend",
            "image_processing_viscpm.VisCPMImageProcessor",
            parts=(("model.vision_tower.", "vision tower"), ("model.resampler.", "resampler")),
            form=COMPOSITE_FORM,
            placeholder=("<im_patch>", 9),
        ),
        Family(
            MINICPMV,
            "MiniCPM-V",
            "configuration_vision_resampler.MiniCPMVConfig",
            _answering("modeling_vision_resampler.MiniCPMVForConditionalGeneration"),
            (key_maps.MINICPMV,),
            "processing_minicpmv.MiniCPMVProcessor",
            "tokenization_legacy_sentencepiece.LegacySentencePieceTokenizer",
            "image_processing_minicpmv.MiniCPMVImageProcessor",
            parts=(("vpm.", "vision tower"), ("resampler.", "resampler")),
            form=COMPOSITE_FORM,
        ),
        Family(
            VISUALCLA,
            "VisualCLA-7B",
            "configuration_vision_resampler.VisualCLAConfig",
            _answering("modeling_vision_resampler.VisualCLAForConditionalGeneration"),
            (key_maps.VISUALCLA,),
            "processing_visualcla.VisualCLAProcessor",
            "tokenization_legacy_sentencepiece.LegacySentencePieceTokenizer",
            "image_processing_viscpm.VisCPMImageProcessor",
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
CHATS = tuple(kind for kind, family in FAMILIES.items() if family.answers)


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a configuration by our names."""
    return next(family for family in FAMILIES.values() if type(config) is family.config_class)
