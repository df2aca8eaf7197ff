"""Configuration of the BEiT-3 vision tower of VisCPM-Chat."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_limits import check_layers


# Both position tables keep their first two rows for padding, which a vision tower never sees: position i is row i + 2.
POSITION_OFFSET = 2


@strict
class Beit3Config(PreTrainedConfig):
    r"""
    Configuration of a [`Beit3Model`]. The defaults are the tower of the released VisCPM-Chat checkpoints: BEiT-3 large
    (arXiv:2208.10442) with the learned queries of Muffin and VisCPM (arXiv:2308.12038) in the place of the text.

    Args:
        hidden_size (`int`, defaults to 1024): width of the encoder.
        intermediate_size (`int`, defaults to 4096): inner width of the feed-forward experts.
        num_hidden_layers (`int`, defaults to 24): number of layers.
        num_attention_heads (`int`, defaults to 16): attention heads per layer.
        num_channels (`int`, defaults to 3): channels of the input image.
        image_size (`int`, defaults to 224): side of the square input image, in pixels.
        patch_size (`int`, defaults to 16): side of a square patch, in pixels.
        num_query_tokens (`int`, defaults to 64): learned queries, which is also the number of rows the model returns.
        max_query_positions (`int`, defaults to 1024):
            rows of the query position table. Its first two rows are unused, so that it has room for two fewer queries.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of every layer norm.
        hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward experts, computed in fp32.
        attention_dropout (`float`, defaults to 0.0): dropout of the attention probabilities while training.
        initializer_range (`float`, defaults to 0.02): standard deviation of newly initialised weights.

    Raises:
        ValueError: if `image_size` is no multiple of `patch_size`, `hidden_size` none of `num_attention_heads`, or the
            queries do not fit the query position table.
    """

    model_type = "viscpm_beit3"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    num_query_tokens: int = 64
    max_query_positions: int = 1024
    layer_norm_eps: float = 1e-5
    hidden_act: str = "gelu"
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name in ("num_attention_heads", "patch_size", "image_size", "num_hidden_layers", "num_query_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}.")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        if self.num_query_tokens + POSITION_OFFSET > self.max_query_positions:
            raise ValueError(
                f"num_query_tokens {self.num_query_tokens} do not fit max_query_positions {self.max_query_positions}: "
                f"the first {POSITION_OFFSET} rows of the table are unused."
            )
        check_layers({"num_hidden_layers": self.num_hidden_layers})
        super().__post_init__(**kwargs)


__all__ = ["Beit3Config"]
