"""Configuration of CPM-Bee, the language model of VisCPM."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .token_space_cpm_bee import image_token_id, num_extension_slots, padded_vocab_size


# Keys of the original configuration files without a counterpart here.
ORIGINAL_KEYS_WITHOUT_MEANING = ("half", "mask_modules", "distance_scale", "dropout_p", "scale", "half_precision")


@strict
class CpmBeeConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CpmBeeModel`]. The defaults are CPM-Bee-10B's. The original files' names (`dim_model`,
    `num_heads`, `num_layers`, `dim_ff`, `dim_head`, `eps`, `init_std`) are understood too.

    Args:
        vocab_size (`int`): all token ids (see `token_space_cpm_bee`). Without `num_words`, as in an original file, it
            is the number of words, and is padded.
        num_words (`int`): tokens in `vocab.txt`; what follows is slots for extension tokens, the placeholder of
            images, and tokens that were added.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width of the gated feed-forward layers.
        num_hidden_layers (`int`): decoder layers.
        num_attention_heads (`int`): attention heads, each of `head_dim`.
        head_dim (`int`): width of a head; `num_attention_heads * head_dim` need not be `hidden_size`.
        hidden_act (`str`): activation of the feed-forward gate.
        rms_norm_eps (`float`): epsilon of the RMS norms.
        residual_divisor (`float`): every residual sum is divided by it.
        attention_dropout (`float`): dropout on attention weights in training.
        position_bias_num_buckets (`int`): buckets of distances within a segment.
        position_bias_num_segment_buckets (`int`): buckets of relations between segments.
        position_bias_max_distance (`int`): distances from here on share a bucket.
        initializer_range (`float`): standard deviation of fresh weights.
    """

    model_type = "viscpm_cpm_bee"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "dim_model": "hidden_size",
        "num_heads": "num_attention_heads",
        "num_layers": "num_hidden_layers",
        "dim_ff": "intermediate_size",
        "dim_head": "head_dim",
        "eps": "rms_norm_eps",
        "init_std": "initializer_range",
    }

    vocab_size: int = 86583
    num_words: int | None = None
    hidden_size: int = 4096
    intermediate_size: int = 10240
    num_hidden_layers: int = 48
    num_attention_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "gelu"
    rms_norm_eps: float | int = 1e-6
    residual_divisor: float | int = 1.05
    attention_dropout: float | int = 0.0
    position_bias_num_buckets: int = 256
    position_bias_num_segment_buckets: int = 256
    position_bias_max_distance: int = 2048
    initializer_range: float | int = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 0
    unk_token_id: int | None = 1
    bos_token_id: int | None = 6
    eos_token_id: int | list[int] | None = 7
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        for key in ORIGINAL_KEYS_WITHOUT_MEANING:
            kwargs.pop(key, None)
        # Unknown keys become attributes last, so the original's spelling must reach the fields from here.
        for original, name in self.attribute_map.items():
            if original in kwargs:
                setattr(self, name, kwargs.pop(original))
        super().__post_init__(**kwargs)
        if self.num_words is None:
            self.num_words, self.vocab_size = self.vocab_size, padded_vocab_size(self.vocab_size)
        elif self.vocab_size < padded_vocab_size(self.num_words):
            raise ValueError(
                f"vocab_size is {self.vocab_size:,}, but {self.num_words:,} words take at least "
                f"{padded_vocab_size(self.num_words):,} ids: with slots for extension tokens and the placeholder of "
                "images. Leave num_words out to have the number of words padded."
            )
        if self.position_bias_num_buckets % 4:
            raise ValueError(
                f"position_bias_num_buckets must be a multiple of 4 (two directions, exact and logarithmic halves), "
                f"got {self.position_bias_num_buckets}."
            )

    @property
    def num_extension_slots(self) -> int:
        """Different extension tokens that one row can have; their ids follow those of the words."""
        return num_extension_slots(self.num_words)

    @property
    def placeholder_token_id(self) -> int:
        """The id of an image placeholder, after the slots."""
        return image_token_id(self.num_words)


__all__ = ["CpmBeeConfig"]
