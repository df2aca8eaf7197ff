"""Which tensor of the siblings' original files becomes which of ours. Data only; see `conversion.key_maps`.

Source: the files of openbmb/OmniLMM-12B, openbmb/MiniCPM-V, openbmb/MiniCPM-V-2 and ziqingyang/visualcla-7b-v0.1.
VisualCLA's names are those of the whole model; its parts' own files lack the first word (`siblings.original`).
"""

from __future__ import annotations

from .key_maps import THIRDS, TRANSPOSED, WITHOUT_BATCH, Dropped, Entry, KeyMap


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
