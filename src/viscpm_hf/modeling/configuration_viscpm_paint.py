"""Configuration of VisCPM-Paint's text encoder."""

from huggingface_hub.dataclasses import strict

from .configuration_cpm_bee import CpmBeeConfig


@strict
class VisCPMPaintTextEncoderConfig(CpmBeeConfig):
    r"""
    Configuration of a [`VisCPMPaintTextEncoder`]: that of its CPM-Bee, and two values of the projection behind it.

    Args:
        projection_dim (`int`): width of the prompt embeddings, the UNet's `cross_attention_dim`.
        projection_layer_norm_eps (`float`): epsilon of the layer norm over the prompt embeddings.
    """

    model_type = "viscpm_paint_text_encoder"
    base_config_key = ""
    attribute_map = {**CpmBeeConfig.attribute_map, "unet_cross_attention_dim": "projection_dim"}

    projection_dim: int = 1024
    projection_layer_norm_eps: float | int = 1e-6


__all__ = ["VisCPMPaintTextEncoderConfig"]
