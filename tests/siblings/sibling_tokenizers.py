"""Small tokenizers in the siblings' original file formats, made here: nothing of the released vocabularies."""

from __future__ import annotations

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as proto
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors


# Words that become pieces, and every character of them; all else falls back to bytes.
WORDS = (
    "用户",
    "AI",
    "What",
    "is",
    "the",
    "image",
    "图片",
    "里有",
    "什么",
    "Instruction",
    "Response",
    "question",
    "User",
)
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>|/_:.,?!#'，。？！"

# Ids of MiniCPM's special pieces; 109 to 112 are reserved in the vocabulary file and renamed by 2.0's configuration.
MINICPM_SPECIAL = {
    5: "\n",
    101: "<image>",
    102: "</image>",
    103: "<ref>",
    104: "</ref>",
    105: "<box>",
    106: "</box>",
    107: "<quad>",
    108: "</quad>",
    **{109 + index: f"<reserved_{20 + index}>" for index in range(5)},
}
MINICPM_RENAMED = {109: "<point>", 110: "</point>", 111: "<slice>", 112: "</slice>"}
MINICPM_VOCAB_SIZE = 512

VISUALCLA_TOKENS = ("<img>", "</img>", "<pad>", "<img_token>")
VISUALCLA_BASE_SIZE = 448
VISUALCLA_VOCAB_SIZE = VISUALCLA_BASE_SIZE + len(VISUALCLA_TOKENS)

OMNILMM_TOKENS = (
    "<im_patch>", "<im_start>", "<im_end>", "<box>", "</box>", "<ref>", "</ref>", "<quad>", "</quad>"
)  # fmt: skip
OMNILMM_BASE_SIZE = 448
OMNILMM_VOCAB_SIZE = OMNILMM_BASE_SIZE + len(OMNILMM_TOKENS)


def _pieces() -> list[str]:
    """Characters, then the beginnings of words in the order in which BPE joins them."""
    characters = dict.fromkeys(["▁", *CHARACTERS, *"".join(WORDS)])
    joined = dict.fromkeys(word[:length] for word in WORDS for length in range(2, len(word) + 1))
    return [*characters, *joined, "▁the", "▁is"]


def _model(pieces: list[tuple[str, int]], *, dummy_prefix: bool) -> bytes:
    """A SentencePiece BPE file of `(piece, type)`."""
    model = proto.ModelProto()
    for rank, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(rank), type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(pieces)
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def _vocabulary(size: int, special: dict[int, str]) -> list[tuple[str, int]]:
    kinds = proto.ModelProto.SentencePiece
    head = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    bytes_ = [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    rest = iter([*bytes_, *((piece, kinds.NORMAL) for piece in _pieces())])
    pieces = []
    for index in range(size):
        if index in special:
            pieces.append((special[index], kinds.USER_DEFINED))
        else:
            pieces.append(head[index] if index < 3 else next(rest, (f"<unused_{index}>", kinds.NORMAL)))
    assert next(rest, None) is None, "the vocabulary is too small for its pieces"
    return pieces


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, ensure_ascii=False, indent=1), "utf-8")


def write_minicpm_tokenizer(folder: Path, version: str = "2.0") -> None:
    """As in `openbmb/MiniCPM-V` (`version` 1.0) or `openbmb/MiniCPM-V-2` (2.0): 512 pieces."""
    model = _model(_vocabulary(MINICPM_VOCAB_SIZE, MINICPM_SPECIAL), dummy_prefix=False)
    (folder / "tokenizer.model").write_bytes(model)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {0: "<unk>", 1: "<s>", 2: "</s>", **{index: MINICPM_SPECIAL[index] for index in range(101, 109)}}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True, "add_eos_token": False}
    if version == "2.0":
        added |= MINICPM_RENAMED
        config |= {"pad_token": "<unk>", "padding_side": "right"}
    config["additional_special_tokens"] = [added[index] for index in added if index > 100]
    config["added_tokens_decoder"] = {str(index): {"content": token, **flags} for index, token in added.items()}
    write_json(
        folder / "tokenizer_config.json", {**config, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    )


def write_visualcla_tokenizer(folder: Path, *, plain: bool = False) -> None:
    """As in `ziqingyang/visualcla-7b-v0.1`: 448 pieces and four added tokens.

    Args:
        plain: the map of special tokens has strings, next to which transformers 4 stripped white space.
    """
    model = _model(_vocabulary(VISUALCLA_BASE_SIZE, {}), dummy_prefix=True)
    (folder / "tokenizer.model").write_bytes(model)
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}

    def entry(token: str):
        return token if plain else {"content": token, **flags}

    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(
        folder / "special_tokens_map.json",
        {
            **{name: {"content": token, **flags} for name, token in special.items()},
            "pad_token": entry("<pad>"),
            "additional_special_tokens": [entry(token) for token in ("<img>", "</img>", "<img_token>")],
        },
    )
    write_json(
        folder / "added_tokens.json",
        {token: VISUALCLA_BASE_SIZE + index for index, token in enumerate(VISUALCLA_TOKENS)},
    )
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, "add_bos_token": True, "add_eos_token": False},
    )


def write_omnilmm_tokenizer(folder: Path) -> None:
    """As in `openbmb/OmniLMM-12B`: a `tokenizer.json` of 448 pieces and nine added tokens."""
    pieces = [piece for piece, _ in _vocabulary(OMNILMM_BASE_SIZE, {})]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:-1], piece[-1])
        for piece in pieces
        if len(piece) > 1 and not piece.startswith("<") and piece[:-1] in vocabulary and piece[-1] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = [
        AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>", *OMNILMM_TOKENS)
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "</s>",
            "model_max_length": 2048,
            "padding_side": "right",
        },
    )
