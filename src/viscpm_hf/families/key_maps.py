"""Which tensor of the original files becomes which of ours. Data only.

An entry is `(original name, our name, operation)`; `{n}` stands for a layer number, `{name}` for any name. The first
entry that matches counts. Operations:

- `KEEP`: the same values.
- `FOLD_WIDTH`: divided by the square root of the last dimension. The original divides every product by it, here it is
  part of the weights (`modeling_cpm_bee`).
- `TOKEN_ROWS`: likewise, with rows for slots and placeholder behind those of the words (`token_space_cpm_bee`).
- `AS_MATRIX`: a 1×1 convolution's weight `(out, in, 1, 1)` as a matrix `(out, in)`; a matrix stays what it is.
- `FIRST_THIRD`, `SECOND_THIRD`, `LAST_THIRD`: of the rows. A name that is split has an entry for each of its parts.
- `WITHOUT_BATCH`: without a first dimension of 1.
- `TRANSPOSED`: a matrix the other way round.

Names are those within a part; `CHAT`, `CPM_BEE` and the `PAINT_` maps say where the parts lie in the files.
VisualCLA's names are those of the whole model; its parts' own files lack the first word (`checkpoints.location`).
Source: the checkpoints of openbmb/VisCPM-Chat, openbmb/VisCPM-Paint, openbmb/OmniLMM-12B, openbmb/MiniCPM-V and -V-2,
and ziqingyang/visualcla-7b-v0.1.
"""

from __future__ import annotations

from typing import NamedTuple


KEEP = "keep"
FOLD_WIDTH = "fold_width"
TOKEN_ROWS = "token_rows"
AS_MATRIX = "as_matrix"
FIRST_THIRD, SECOND_THIRD, LAST_THIRD = THIRDS = ("first_third", "second_third", "last_third")
WITHOUT_BATCH = "without_batch"
TRANSPOSED = "transposed"


class Entry(NamedTuple):
    source: str
    target: str
    operation: str = KEEP


class Dropped(NamedTuple):
    source: str
    """A name, or the beginning of names if it ends with a dot; `{n}` stands for a layer number."""
    reason: str


class KeyMap(NamedTuple):
    """All tensors of one kind of checkpoint."""

    entries: tuple[Entry, ...]
    dropped: tuple[Dropped, ...] = ()


def _within(entries: tuple[Entry, ...], source: str, target: str) -> tuple[Entry, ...]:
    return tuple(Entry(source + entry.source, target + entry.target, entry.operation) for entry in entries)


_LANGUAGE_MODEL = (
    Entry("input_embedding.weight",                                            "embed_tokens.weight",                            TOKEN_ROWS),
    Entry("position_bias.relative_attention_bias",                             "position_bias.relative_attention_bias.weight"),
    Entry("encoder.layers.{n}.self_att.layernorm_before_attention.weight",     "layers.{n}.input_layernorm.weight"),
    Entry("encoder.layers.{n}.self_att.self_attention.project_q.weight",       "layers.{n}.self_attn.q_proj.weight",             FOLD_WIDTH),
    Entry("encoder.layers.{n}.self_att.self_attention.project_k.weight",       "layers.{n}.self_attn.k_proj.weight",             FOLD_WIDTH),
    Entry("encoder.layers.{n}.self_att.self_attention.project_v.weight",       "layers.{n}.self_attn.v_proj.weight",             FOLD_WIDTH),
    Entry("encoder.layers.{n}.self_att.self_attention.attention_out.weight",   "layers.{n}.self_attn.o_proj.weight",             FOLD_WIDTH),
    Entry("encoder.layers.{n}.ffn.layernorm_before_ffn.weight",                "layers.{n}.post_attention_layernorm.weight"),
    Entry("encoder.layers.{n}.ffn.ffn.w_in.w_0.weight",                        "layers.{n}.mlp.gate_proj.weight",                FOLD_WIDTH),
    Entry("encoder.layers.{n}.ffn.ffn.w_in.w_1.weight",                        "layers.{n}.mlp.up_proj.weight",                  FOLD_WIDTH),
    Entry("encoder.layers.{n}.ffn.ffn.w_out.weight",                           "layers.{n}.mlp.down_proj.weight",                FOLD_WIDTH),
    Entry("encoder.output_layernorm.weight",                                   "norm.weight"),
)  # fmt: skip

# Both experts of every vision module: the original's A serves the image, B the queries.
_EXPERTS = (("A", "image"), ("B", "query"))

_VISION_TOWER = (
    Entry("query",                                                             "embeddings.query_tokens"),
    Entry("vpm.beit3.vision_embed.cls_token",                                  "embeddings.cls_token"),
    Entry("vpm.beit3.vision_embed.proj.weight",                                "embeddings.patch_embedding.weight"),
    Entry("vpm.beit3.vision_embed.proj.bias",                                  "embeddings.patch_embedding.bias"),
    *(
        entry
        for expert, name in _EXPERTS
        for entry in (
            Entry(f"vpm.beit3.encoder.embed_positions.{expert}.weight",        f"embeddings.{name}_position_embedding.weight"),
            *(
                Entry(f"vpm.beit3.encoder.{source}.{leaf}",                    f"{target}.{leaf}")
                for source, target in (
                    *(
                        (f"layers.{{n}}.self_attn.{role}_proj.{expert}",       f"layers.{{n}}.self_attn.{role}_experts.{name}")
                        for role in ("q", "k", "v", "out")
                    ),
                    (f"layers.{{n}}.self_attn.inner_attn_ln.{expert}",         f"layers.{{n}}.self_attn.inner_layer_norm.{name}"),
                    (f"layers.{{n}}.self_attn_layer_norm.{expert}",            f"layers.{{n}}.self_attn_layer_norm.{name}"),
                    (f"layers.{{n}}.final_layer_norm.{expert}",                f"layers.{{n}}.final_layer_norm.{name}"),
                    (f"layers.{{n}}.ffn.{expert}.fc1",                         f"layers.{{n}}.mlp.{name}.fc1"),
                    (f"layers.{{n}}.ffn.{expert}.fc2",                         f"layers.{{n}}.mlp.{name}.fc2"),
                    (f"layers.{{n}}.ffn.{expert}.ffn_layernorm",               f"layers.{{n}}.mlp.{name}.layer_norm"),
                    (f"layer_norm.{expert}",                                   f"layer_norm.{name}"),
                )
                for leaf in ("weight", "bias")
            ),
        )
    ),
)  # fmt: skip

_PROJECTOR = (
    Entry("mapping.0.weight",                                                  "linear_1.weight"),
    Entry("mapping.0.bias",                                                    "linear_1.bias"),
    Entry("mapping.2.weight",                                                  "linear_2.weight"),
    Entry("mapping.2.bias",                                                    "linear_2.bias"),
)  # fmt: skip

CHAT = KeyMap(
    entries=(
        *_within(_LANGUAGE_MODEL, "llm.", "model.language_model."),
        *_within(_VISION_TOWER, "", "model.vision_tower."),
        *_within(_PROJECTOR, "", "model.multi_modal_projector."),
    ),
    dropped=(
        Dropped("vpm.beit3.text_embed.weight", "text embedding of the vision tower, which never sees text"),
        Dropped("vpm.beit3.vision_embed.mask_token", "stands for masked patches, which only pre-training has"),
        Dropped("vpm.mim_head.weight", "head of the masked-image pre-training"),
        Dropped("vpm.mim_head.bias", "head of the masked-image pre-training"),
    ),
)

# CPM-Bee alone, bare or as the `llm.` part of a file.
CPM_BEE = KeyMap(_within(_LANGUAGE_MODEL, "", "model."))
CPM_BEE_WITHIN = KeyMap(
    _within(_LANGUAGE_MODEL, "llm.", "model."),
    dropped=tuple(
        Dropped(source, "part of VisCPM, not of its language model")
        for source in ("query", "vpm.", "mapping.", "unet.", "trans_block.")
    ),
)
# The Hub's own class saves it under a name of its own, and the embedding a second time as the head.
CPM_BEE_SAVED = KeyMap(
    _within(_LANGUAGE_MODEL, "cpmbee.", "model."),
    dropped=(Dropped("lm_head.weight", "the embedding once more, as the tied head"),),
)

# VisCPM-Paint's file holds its text encoder and its UNet, in diffusers' own names. The VAE is another file.
PAINT_TEXT_ENCODER = KeyMap(
    entries=(
        *_within(_LANGUAGE_MODEL, "llm.", "model."),
        Entry("trans_block.w_out_res.weight",                                  "projection.weight"),
        Entry("trans_block.layernorm.weight",                                  "layer_norm.weight"),
        Entry("trans_block.layernorm.bias",                                    "layer_norm.bias"),
    ),
    dropped=(Dropped("unet.", "part of VisCPM-Paint, not of its text encoder"),),
)  # fmt: skip

PAINT_UNET = KeyMap((Entry("unet.{name}", "{name}"),))

# Attention was made of 1×1 convolutions once, under other names.
VAE = KeyMap(
    entries=(
        *(
            Entry(f"{coder}.mid_block.attentions.{{n}}.{source}.{leaf}",       f"{coder}.mid_block.attentions.{{n}}.{target}.{leaf}", AS_MATRIX)
            for coder in ("encoder", "decoder")
            for source, target in (
                ("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"),
                ("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out.0"),
            )
            for leaf in ("weight", "bias")
        ),
        Entry("{name}",                                                        "{name}"),
    ),
)  # fmt: skip


# --------------------------------------------------- tower, resampler, stock language model

_PARTS = tuple(zip(THIRDS, "qkv", strict=True))
_LEAVES = ("weight", "bias")


def _leaves(source: str, target: str) -> tuple[Entry, ...]:
    return tuple(Entry(f"{source}.{leaf}", f"{target}.{leaf}") for leaf in _LEAVES)


def _perceiver(source: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{source}.query", "resampler.query"),
        Entry(f"{source}.pos_embed", "resampler.pos_embed"),
        Entry(f"{source}.kv_proj.weight", "resampler.kv_proj.weight"),
        *(
            Entry(f"{source}.attn.in_proj_{leaf}", f"resampler.attn.{part}_proj.{leaf}", third)
            for leaf in _LEAVES
            for third, part in _PARTS
        ),
        *_leaves(f"{source}.attn.out_proj", "resampler.attn.out_proj"),
        *(
            entry
            for name in ("ln_q", "ln_kv", "ln_post")
            for entry in _leaves(f"{source}.{name}", f"resampler.{name}")
        ),
        Entry(f"{source}.proj", "resampler.proj.weight", TRANSPOSED),
    )


# Old transformers stored what is computed from the configuration.
_ROTATIONS = "frequencies of the rotary positions, which are computed"

OMNILMM = KeyMap(
    entries=(
        Entry("model.vision_tower.cls_token", "vision_tower.embeddings.cls_token"),
        Entry("model.vision_tower.pos_embed", "vision_tower.embeddings.position_embeddings"),
        *_leaves("model.vision_tower.patch_embed.proj", "vision_tower.embeddings.patch_embeddings.projection"),
        *(
            Entry(
                "model.vision_tower.blocks.{n}.attn.qkv.weight",
                f"vision_tower.layers.{{n}}.attention.{part}_proj.weight",
                third,
            )
            for third, part in _PARTS
        ),
        *(
            Entry(
                f"model.vision_tower.blocks.{{n}}.attn.{part}_bias",
                f"vision_tower.layers.{{n}}.attention.{part}_proj.bias",
            )
            for part in "qv"
        ),
        *(
            entry
            for source, target in (
                ("attn.proj", "attention.o_proj"),
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            )
            for entry in _leaves(f"model.vision_tower.blocks.{{n}}.{source}", f"vision_tower.layers.{{n}}.{target}")
        ),
        *_leaves("model.vision_tower.norm", "vision_tower.layernorm"),
        *_perceiver("model.resampler"),
        Entry("lm_head.weight", "language_model.lm_head.weight"),
        Entry("model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        Entry("model.layers.{name}", "language_model.model.layers.{name}"),
        Entry("model.norm.weight", "language_model.model.norm.weight"),
    ),
    dropped=(Dropped("model.layers.{n}.self_attn.rotary_emb.inv_freq", _ROTATIONS),),
)

MINICPMV = KeyMap(
    entries=(
        Entry("vpm.pos_embed", "vision_tower.embeddings.position_embedding.weight", WITHOUT_BATCH),
        *_leaves("vpm.patch_embed.proj", "vision_tower.embeddings.patch_embedding"),
        *(
            Entry(
                f"vpm.blocks.{{n}}.attn.qkv.{leaf}",
                f"vision_tower.encoder.layers.{{n}}.self_attn.{part}_proj.{leaf}",
                third,
            )
            for leaf in _LEAVES
            for third, part in _PARTS
        ),
        *(
            entry
            for source, target in (
                ("attn.proj", "self_attn.out_proj"),
                ("norm1", "layer_norm1"),
                ("norm2", "layer_norm2"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
            )
            for entry in _leaves(f"vpm.blocks.{{n}}.{source}", f"vision_tower.encoder.layers.{{n}}.{target}")
        ),
        *_leaves("vpm.norm", "vision_tower.post_layernorm"),
        *_perceiver("resampler"),
        Entry("llm.{name}", "language_model.{name}"),
    ),
    dropped=(Dropped("llm.model.layers.{n}.self_attn.rotary_emb.inv_freq", _ROTATIONS),),
)

VISUALCLA = KeyMap(
    entries=(
        Entry("text_model.{name}", "language_model.{name}"),
        Entry("vision_model.vision_model.{name}", "vision_tower.{name}"),
        Entry("visual_resampler.query_embeddding", "resampler.query", WITHOUT_BATCH),
        *(
            entry
            for source, target in (
                ("crossattention.self.query", "attn.q_proj"),
                ("crossattention.self.key", "attn.k_proj"),
                ("crossattention.self.value", "attn.v_proj"),
                ("crossattention.output.dense", "attn.out_proj"),
                ("crossattention.output.LayerNorm", "attn_norm"),
                ("intermediate.dense", "fc1"),
                ("output.dense", "fc2"),
                ("output.LayerNorm", "mlp_norm"),
            )
            for entry in _leaves(f"visual_resampler.encoder.layer.{{n}}.{source}", f"resampler.layers.{{n}}.{target}")
        ),
        *_leaves("image_projection_layer", "resampler.projection"),
    ),
    dropped=(
        Dropped("visual_resampler.pooler.", "a pooled vector that nothing reads"),
        Dropped("vision_model.vision_model.embeddings.position_ids", "0, 1, 2, ..., which are computed"),
        Dropped("text_model.model.layers.{n}.self_attn.rotary_emb.inv_freq", _ROTATIONS),
    ),
)
