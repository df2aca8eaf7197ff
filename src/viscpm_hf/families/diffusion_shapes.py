"""Names and shapes of the weights of Paint's UNet and VAE by diffusers' configurations, without diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..modeling.configuration_limits import check_layers
from .model_shapes import Shapes


# Options of which nothing in the shapes follows, and those of which nothing does as long as they have these values.
FREE = (
    "sample_size", "center_input_sample", "flip_sin_to_cos", "freq_shift", "downsample_padding",
    "mid_block_scale_factor", "norm_eps", "upcast_attention", "resnet_out_scale_factor",
    "addition_embed_type_num_heads", "scaling_factor", "shift_factor", "force_upcast",
)  # fmt: skip
PLAIN = {
    "act_fn": "silu", "mid_block_type": "UNetMidBlock2DCrossAttn", "attention_type": "default",
    "resnet_time_scale_shift": "default", "time_embedding_type": "positional", "only_cross_attention": False,
    "dual_cross_attention": False, "class_embeddings_concat": False, "resnet_skip_time_act": False,
    "transformer_layers_per_block": 1, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "dropout": 0.0,
}  # fmt: skip
EMPTY = (
    "addition_embed_type", "addition_time_embed_dim", "class_embed_type", "cross_attention_norm", "encoder_hid_dim",
    "encoder_hid_dim_type", "mid_block_only_cross_attention", "num_attention_heads", "num_class_embeds",
    "projection_class_embeddings_input_dim", "reverse_transformer_layers_per_block", "time_cond_proj_dim",
    "time_embedding_act_fn", "time_embedding_dim", "timestep_post_act", "latents_mean", "latents_std",
)  # fmt: skip
UNET_SIZES = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "cross_attention_dim", "attention_head_dim", "use_linear_projection", "norm_num_groups",
)  # fmt: skip
VAE_SIZES = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "latent_channels", "norm_num_groups", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention",
)  # fmt: skip


# Stable Diffusion 2.1-base, as in the released checkpoints.
UNET_CONFIG = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}


class _Shapes(Shapes):
    """Shapes of modules that are added by name."""

    def convolution(self, name: str, columns: int, rows: int, side: int = 3) -> None:
        self[f"{name}.weight"], self[f"{name}.bias"] = (rows, columns, side, side), (rows,)

    def linear(self, name: str, columns: int, rows: int, has_bias: bool = True) -> None:
        self[f"{name}.weight"] = (rows, columns)
        if has_bias:
            self[f"{name}.bias"] = (rows,)

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = self[f"{name}.bias"] = (width,)

    def resnet(self, name: str, columns: int, rows: int, time: int | None = None) -> None:
        self.norm(f"{name}.norm1", columns)
        self.convolution(f"{name}.conv1", columns, rows)
        if time is not None:
            self.linear(f"{name}.time_emb_proj", time, rows)
        self.norm(f"{name}.norm2", rows)
        self.convolution(f"{name}.conv2", rows, rows)
        if columns != rows:
            self.convolution(f"{name}.conv_shortcut", columns, rows, 1)

    def transformer(self, name: str, width: int, prompt: int, is_linear: bool) -> None:
        self.norm(f"{name}.norm", width)
        block = f"{name}.transformer_blocks.0"
        for number, keys in ((1, width), (2, prompt)):
            self.norm(f"{block}.norm{number}", width)
            for part, columns in (("to_q", width), ("to_k", keys), ("to_v", keys)):
                self.linear(f"{block}.attn{number}.{part}", columns, width, has_bias=False)
            self.linear(f"{block}.attn{number}.to_out.0", width, width)
        self.norm(f"{block}.norm3", width)
        self.linear(f"{block}.ff.net.0.proj", width, 8 * width)
        self.linear(f"{block}.ff.net.2", 4 * width, width)
        for end in ("proj_in", "proj_out"):
            if is_linear:
                self.linear(f"{name}.{end}", width, width)
            else:
                self.convolution(f"{name}.{end}", width, width, 1)


def _known(config: Mapping[str, Any], class_name: str, sizes: Sequence[str], blocks: Sequence[str]) -> dict | None:
    """The sizes that a configuration gives; None if it says what only diffusers knows the meaning of."""
    if config.get("_class_name", class_name) != class_name:
        return None
    for name, value in config.items():
        is_known = (
            (name in FREE and (value is None or type(value) in (bool, int, float)))
            or (name in PLAIN and value == PLAIN[name] and type(value) is type(PLAIN[name]))
            or (name in EMPTY and value is None)
            or (name.startswith("_") and type(value) is str)
            or name in sizes
        )
        if not is_known:
            return None
    found = {name: config[name] for name in sizes if name in config}
    widths = found.get("block_out_channels")
    is_whole = (
        isinstance(widths, (list, tuple))
        and len(widths) > 0
        and all(_counts(width) for width in widths)
        and all(
            isinstance(types := found.get(f"{way}_block_types"), (list, tuple))
            and len(types) == len(widths)
            and all(kind in blocks for kind in types)
            for way in ("down", "up")
        )
        and all(_counts(found.get(name)) for name in ("in_channels", "out_channels", "layers_per_block"))
    )
    if not is_whole:
        return None
    groups = found.setdefault("norm_num_groups", 32)
    if not _counts(groups) or any(width % groups for width in widths):
        return None
    try:
        check_layers(config)
    except ValueError:
        return None
    return found


def _counts(value: Any) -> bool:
    return type(value) is int and value > 0


def unet_shapes(config: Mapping[str, Any]) -> Shapes | None:
    """Names and shapes of a `UNet2DConditionModel`; None if only diffusers can tell."""
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    sizes = _known(config, "UNet2DConditionModel", UNET_SIZES, blocks)
    if sizes is None:
        return None
    widths, layers = sizes["block_out_channels"], sizes["layers_per_block"]
    prompt, heads, is_linear = (
        sizes.get(name) for name in ("cross_attention_dim", "attention_head_dim", "use_linear_projection")
    )
    heads = [heads] * len(widths) if _counts(heads) else heads
    if not (_counts(prompt) and type(is_linear) is bool and isinstance(heads, (list, tuple))):
        return None
    if len(heads) != len(widths) or not all(
        _counts(number) and width % number == 0 for number, width in zip(heads, widths, strict=True)
    ):
        return None
    time, shapes = 4 * widths[0], _Shapes()
    shapes.convolution("conv_in", sizes["in_channels"], widths[0])
    shapes.linear("time_embedding.linear_1", widths[0], time)
    shapes.linear("time_embedding.linear_2", time, time)
    skips, before = [widths[0]], widths[0]
    for index, (kind, width) in enumerate(zip(sizes["down_block_types"], widths, strict=True)):
        if "Down" not in kind:
            return None
        name = f"down_blocks.{index}"
        for layer in range(layers):
            shapes.resnet(f"{name}.resnets.{layer}", width if layer else before, width, time)
            if kind.startswith("CrossAttn"):
                shapes.transformer(f"{name}.attentions.{layer}", width, prompt, is_linear)
            skips.append(width)
        if index < len(widths) - 1:
            shapes.convolution(f"{name}.downsamplers.0.conv", width, width)
            skips.append(width)
        before = width
    shapes.resnet("mid_block.resnets.0", before, before, time)
    shapes.transformer("mid_block.attentions.0", before, prompt, is_linear)
    shapes.resnet("mid_block.resnets.1", before, before, time)
    for index, (kind, width) in enumerate(zip(sizes["up_block_types"], reversed(widths), strict=True)):
        if "Up" not in kind:
            return None
        name = f"up_blocks.{index}"
        for layer in range(layers + 1):
            shapes.resnet(f"{name}.resnets.{layer}", (width if layer else before) + skips.pop(), width, time)
            if kind.startswith("CrossAttn"):
                shapes.transformer(f"{name}.attentions.{layer}", width, prompt, is_linear)
        if index < len(widths) - 1:
            shapes.convolution(f"{name}.upsamplers.0.conv", width, width)
        before = width
    shapes.norm("conv_norm_out", widths[0])
    shapes.convolution("conv_out", widths[0], sizes["out_channels"])
    return shapes


def vae_shapes(config: Mapping[str, Any]) -> Shapes | None:
    """Names and shapes of an `AutoencoderKL`; None if only diffusers can tell."""
    sizes = _known(config, "AutoencoderKL", VAE_SIZES, ("DownEncoderBlock2D", "UpDecoderBlock2D"))
    if sizes is None or not _counts(latent := sizes.get("latent_channels")):
        return None
    has = {
        name: sizes.get(name, True) for name in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
    }
    if set(map(type, has.values())) != {bool}:
        return None
    widths, layers, shapes = sizes["block_out_channels"], sizes["layers_per_block"], _Shapes()

    def middle(name: str, width: int) -> None:
        for number in range(2):
            shapes.resnet(f"{name}.resnets.{number}", width, width)
        if has["mid_block_add_attention"]:
            shapes.norm(f"{name}.attentions.0.group_norm", width)
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes.linear(f"{name}.attentions.0.{part}", width, width)

    for coder, way, order, num_layers, ends in (
        ("encoder", "down", widths, layers, (sizes["in_channels"], 2 * latent)),
        ("decoder", "up", widths[::-1], layers + 1, (latent, sizes["out_channels"])),
    ):
        if any(way not in kind.lower() for kind in sizes[f"{way}_block_types"]):
            return None
        before = order[0]
        shapes.convolution(f"{coder}.conv_in", ends[0], before)
        middle(f"{coder}.mid_block", widths[-1])
        for index, width in enumerate(order):
            name = f"{coder}.{way}_blocks.{index}"
            for layer in range(num_layers):
                shapes.resnet(f"{name}.resnets.{layer}", width if layer else before, width)
            if index < len(order) - 1:
                shapes.convolution(f"{name}.{way}samplers.0.conv", width, width)
            before = width
        shapes.norm(f"{coder}.conv_norm_out", before)
        shapes.convolution(f"{coder}.conv_out", before, ends[1])
    if has["use_quant_conv"]:
        shapes.convolution("quant_conv", 2 * latent, 2 * latent, 1)
    if has["use_post_quant_conv"]:
        shapes.convolution("post_quant_conv", latent, latent, 1)
    return shapes
