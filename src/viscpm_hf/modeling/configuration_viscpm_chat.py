"""Configuration of VisCPM-Chat: a BEiT-3 vision tower, a projector and CPM-Bee."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_beit3 import Beit3Config
from .configuration_cpm_bee import CpmBeeConfig


@strict
class VisCPMChatConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VisCPMChatForConditionalGeneration`]; the defaults are VisCPM-Chat's.

    Args:
        text_config (`CpmBeeConfig | dict`): the language model.
        vision_config (`Beit3Config | dict`): the vision tower.
        image_token_id (`int`):
            id of an image placeholder, after the slots for extension tokens (see `token_ids_cpm_bee`); nothing that
            a user types can be mistaken for it.
        projector_hidden_act (`str`): activation of the projector.

    ```python
    >>> from viscpm_hf import VisCPMChatConfig, VisCPMChatForConditionalGeneration

    >>> config = VisCPMChatConfig(text_config={"num_hidden_layers": 2}, vision_config={"num_hidden_layers": 2})
    >>> model = VisCPMChatForConditionalGeneration(config)
    ```
    """

    model_type = "viscpm_chat"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]
    sub_configs_defaults = {"text_config": SubConfigSpec(CpmBeeConfig), "vision_config": SubConfigSpec(Beit3Config)}

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    image_token_id: int | None = None
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Version 0.1 had the placeholder beyond the vocabulary.
        if self.image_token_id is None or self.image_token_id >= self.text_config.vocab_size:
            self.image_token_id = self.text_config.placeholder_token_id

    @property
    def num_query_tokens(self) -> int:
        """Placeholders of one image."""
        return self.vision_config.num_query_tokens


__all__ = ["VisCPMChatConfig"]
