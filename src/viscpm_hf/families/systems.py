"""What the siblings' checkpoints are, for people: names, sources, licences of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..modeling.decoding_presets import system_name
from .family import COMPOSITE_FORM, family_of


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..modeling.configuration_vision_resampler import VisionResamplerConfig


@dataclass(frozen=True)
class System:
    """A released system."""

    name: str
    base_model: str
    """Where its authors published it on the Hub."""
    licence: str
    licence_zh: str
    english: str
    chinese: str


_GENERAL = (
    "General Model License: free for research; commercial use after registering with the authors; name the source",
    "通用模型许可协议：研究免费；商用须向作者登记；须注明来源",
)
# By `system_name` of their configurations.
SYSTEMS = {
    "omnilmm": System(
        "OmniLMM-12B",
        "openbmb/OmniLMM-12B",
        *_GENERAL,
        "Answers questions about images, best in English: EVA-CLIP-E as the eye, Zephyr-7B as the language model.",
        "图像问答模型，英文最佳：EVA-CLIP-E 作为视觉编码器，Zephyr-7B 作为语言模型。",
    ),
    "minicpmv-1.0": System(
        "MiniCPM-V 1.0",
        "openbmb/MiniCPM-V",
        *_GENERAL,
        "Answers questions about images, in Chinese and English, also known as OmniLMM-3B: SigLIP as the eye, "
        "MiniCPM-2.4B as the language model.",
        "中英双语的图像问答模型，又名 OmniLMM-3B：SigLIP 作为视觉编码器，MiniCPM-2.4B 作为语言模型。",
    ),
    "minicpmv-2.0": System(
        "MiniCPM-V 2.0",
        "openbmb/MiniCPM-V-2",
        "MiniCPM Model License: free for research; free commercial use after filling in the authors' questionnaire",
        "MiniCPM 模型商用许可协议：研究免费；填写作者的问卷登记后可免费商用",
        "Answers questions about images of any shape, in Chinese and English: SigLIP as the eye, MiniCPM-2.4B as the "
        "language model.",
        "中英双语的图像问答模型，支持任意长宽比：SigLIP 作为视觉编码器，MiniCPM-2.4B 作为语言模型。",
    ),
    "visualcla": System(
        "VisualCLA-7B",
        "ziqingyang/visualcla-7b-v0.1",
        "research only, no commercial use, as LLaMA-1 and what is made of it",
        "仅限学术研究，不可商用（与 LLaMA-1 及其衍生权重相同）",
        "Answers questions about images, in Chinese: CLIP-L/14 as the eye, Chinese-Alpaca-Plus-7B as the language "
        "model.",
        "中文图像问答模型：CLIP-L/14 作为视觉编码器，Chinese-Alpaca-Plus-7B 作为语言模型。",
    ),
}


def system_of(config: VisionResamplerConfig) -> System:
    return SYSTEMS[system_name(config)]


def title_of(config: PreTrainedConfig) -> str:
    """A system's name, its release included where a family has several."""
    family = family_of(config)
    return system_of(config).name if family.form == COMPOSITE_FORM else family.title
