"""Names and shapes of every tensor of the released checkpoints, as their tables give them."""

from __future__ import annotations


Shapes = dict[str, tuple[int, ...]]


def _both(shapes: Shapes, name: str, *shape: int) -> None:
    shapes[f"{name}.weight"] = shape
    shapes[f"{name}.bias"] = shape[:1]


def _language_model(prefix: str, vocab: int, width: int, inner: int, layers: int, kv_width: int) -> Shapes:
    shapes: Shapes = {f"{prefix}model.embed_tokens.weight": (vocab, width)}
    for layer in range(layers):
        name = f"{prefix}model.layers.{layer}."
        for part, out in (("q", width), ("k", kv_width), ("v", kv_width), ("o", width)):
            shapes[f"{name}self_attn.{part}_proj.weight"] = (out, width)
        shapes[f"{name}mlp.gate_proj.weight"] = shapes[f"{name}mlp.up_proj.weight"] = (inner, width)
        shapes[f"{name}mlp.down_proj.weight"] = (width, inner)
        shapes[f"{name}input_layernorm.weight"] = shapes[f"{name}post_attention_layernorm.weight"] = (width,)
    shapes[f"{prefix}model.norm.weight"] = (width,)
    shapes[f"{prefix}lm_head.weight"] = (vocab, width)
    return shapes


def _perceiver(prefix: str, queries: int, width: int, vision_width: int) -> Shapes:
    shapes: Shapes = {
        f"{prefix}query": (queries, width),
        f"{prefix}pos_embed": (queries, width),
        f"{prefix}proj": (width, width),
        f"{prefix}kv_proj.weight": (width, vision_width),
        f"{prefix}attn.in_proj_weight": (3 * width, width),
        f"{prefix}attn.in_proj_bias": (3 * width,),
    }
    _both(shapes, f"{prefix}attn.out_proj", width, width)
    for name in ("ln_q", "ln_kv", "ln_post"):
        _both(shapes, f"{prefix}{name}", width)
    return shapes


def _blocks(shapes: Shapes, prefix: str, width: int, inner: int, layers: int) -> None:
    for layer in range(layers):
        name = f"{prefix}blocks.{layer}."
        _both(shapes, f"{name}norm1", width)
        _both(shapes, f"{name}norm2", width)
        _both(shapes, f"{name}attn.proj", width, width)
        _both(shapes, f"{name}mlp.fc1", inner, width)
        _both(shapes, f"{name}mlp.fc2", width, inner)
    _both(shapes, f"{prefix}norm", width)


def minicpmv() -> Shapes:
    """MiniCPM-V 1.0 and 2.0: 694 tensors."""
    shapes = _language_model("llm.", 122753, 2304, 5760, 40, 2304)
    shapes["vpm.pos_embed"] = (1, 729, 1152)
    _both(shapes, "vpm.patch_embed.proj", 1152, 3, 14, 14)
    for layer in range(26):
        _both(shapes, f"vpm.blocks.{layer}.attn.qkv", 3456, 1152)
    _blocks(shapes, "vpm.", 1152, 4304, 26)
    return shapes | _perceiver("resampler.", 64, 2304, 1152)


def omnilmm() -> Shapes:
    shapes = _language_model("", 32009, 4096, 14336, 32, 1024)
    prefix = "model.vision_tower."
    shapes |= {f"{prefix}cls_token": (1, 1, 1792), f"{prefix}pos_embed": (1, 257, 1792)}
    _both(shapes, f"{prefix}patch_embed.proj", 1792, 3, 14, 14)
    for layer in range(63):
        shapes[f"{prefix}blocks.{layer}.attn.qkv.weight"] = (5376, 1792)
        shapes[f"{prefix}blocks.{layer}.attn.q_bias"] = shapes[f"{prefix}blocks.{layer}.attn.v_bias"] = (1792,)
    _blocks(shapes, prefix, 1792, 15360, 63)
    return shapes | _perceiver("model.resampler.", 64, 4096, 1792)


def visualcla() -> Shapes:
    """By the names of the whole model."""
    shapes = _language_model("text_model.", 49958, 4096, 11008, 32, 4096)
    for layer in range(32):
        shapes[f"text_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = (64,)
    prefix = "vision_model.vision_model."
    shapes |= {
        f"{prefix}embeddings.class_embedding": (1024,),
        f"{prefix}embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{prefix}embeddings.position_embedding.weight": (257, 1024),
        f"{prefix}embeddings.position_ids": (1, 257),
    }
    _both(shapes, f"{prefix}pre_layrnorm", 1024)
    _both(shapes, f"{prefix}post_layernorm", 1024)
    for layer in range(24):
        name = f"{prefix}encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            _both(shapes, f"{name}self_attn.{part}", 1024, 1024)
        _both(shapes, f"{name}mlp.fc1", 4096, 1024)
        _both(shapes, f"{name}mlp.fc2", 1024, 4096)
        _both(shapes, f"{name}layer_norm1", 1024)
        _both(shapes, f"{name}layer_norm2", 1024)
    shapes["visual_resampler.query_embeddding"] = (1, 64, 1024)
    for layer in range(6):
        name = f"visual_resampler.encoder.layer.{layer}."
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            _both(shapes, f"{name}crossattention.{part}", 1024, 1024)
        _both(shapes, f"{name}crossattention.output.LayerNorm", 1024)
        _both(shapes, f"{name}intermediate.dense", 4096, 1024)
        _both(shapes, f"{name}output.dense", 1024, 4096)
        _both(shapes, f"{name}output.LayerNorm", 1024)
    _both(shapes, "visual_resampler.pooler.dense", 1024, 1024)
    _both(shapes, "image_projection_layer", 4096, 1024)
    return shapes


FULL_SIZE = {"minicpmv": minicpmv, "omnilmm": omnilmm, "visualcla": visualcla}
