"""Configuration of CPM-Bee, the language model of VisCPM."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_limits import check_layers
from .token_ids_cpm_bee import image_token_id, num_extension_slots, padded_vocab_size


# Keys of the original configuration files without a counterpart here.
ORIGINAL_KEYS_WITHOUT_MEANING = ("half", "distance_scale", "dropout_p", "scale", "half_precision")


@strict
class CpmBeeConfig(PreTrainedConfig):
    r"""
    Configuration of a [`CpmBeeModel`]. The defaults are CPM-Bee-10B's. The original files' names (`dim_model`,
    `num_heads`, `num_layers`, `dim_ff`, `dim_head`, `eps`, `init_std`) are understood too.

    Args:
        vocab_size (`int`): all token ids (see `token_ids_cpm_bee`). Without `num_words`, as in an original file, it
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
        mask_modules (`list[list[bool]]`, *optional*):
            what pruning removed, `[attention, feed-forward]` for every layer: a block whose entry is true isn't there,
            with its norm, and hidden states pass by unchanged. None: every block is there.
    """

    model_type = "viscpm_cpm_bee"
    base_config_key = "text_config"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # before and since transformers 5.24
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
    mask_modules: list | tuple | None = None
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
        check_layers({"num_hidden_layers": self.num_hidden_layers})
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
        self.mask_modules = self._check_mask_modules()

    def _check_mask_modules(self) -> list[list[bool]] | None:
        """`mask_modules` as pairs of booleans; None where nothing is missing."""
        if self.mask_modules is None:
            return None
        pairs = [list(pair) if isinstance(pair, (list, tuple)) else [pair] for pair in self.mask_modules]
        for layer, pair in enumerate(pairs):
            if len(pair) != 2 or not all(value in (0, 1) for value in pair):
                raise ValueError(
                    f"mask_modules has a pair of booleans (attention, feed-forward) for every layer, but "
                    f"{self.mask_modules[layer]!r} for layer {layer}."
                )
        if len(pairs) != self.num_hidden_layers:
            raise ValueError(
                f"mask_modules has entries for {len(pairs)} layers, but num_hidden_layers is {self.num_hidden_layers}."
            )
        if all(attention for attention, _ in pairs):
            raise ValueError(f"mask_modules leaves none of {len(pairs)} layers its attention: at least one needs it.")
        return [[bool(value) for value in pair] for pair in pairs] if any(map(any, pairs)) else None

    def has_attention(self, layer: int) -> bool:
        """Whether the layer has an attention block."""
        return self.mask_modules is None or not self.mask_modules[layer][0]

    def has_mlp(self, layer: int) -> bool:
        """Whether the layer has a feed-forward block."""
        return self.mask_modules is None or not self.mask_modules[layer][1]

    @property
    def num_attention_layers(self) -> int:
        """Layers with an attention block, which are the entries of a cache."""
        return sum(map(self.has_attention, range(self.num_hidden_layers)))

    @property
    def num_extension_slots(self) -> int:
        """Different extension tokens that one row can have; their ids follow those of the words."""
        return num_extension_slots(self.num_words)

    @property
    def placeholder_token_id(self) -> int:
        """The id of an image placeholder, after the slots."""
        return image_token_id(self.num_words)


__all__ = ["CpmBeeConfig"]
