"""The SentencePiece tokenizer of MiniCPM-V and VisualCLA.

Both checkpoints come with a `tokenizer.model` and were trained with the tokenizer of their time ("legacy"): every
piece of text between special tokens is encoded by SentencePiece on its own, and special tokens that are in the
vocabulary file keep the ids they have there. The Rust backend does neither for these files.
"""

import os
from collections.abc import Sequence
from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils import is_sentencepiece_available


class LegacySentencePieceTokenizer(SentencePieceBackend):
    """
    SentencePiece as transformers 4 used it. With `add_special_tokens`, `<s>` goes before the text.

    MiniCPM-V's vocabulary has no dummy prefix, and `<image>` (101), `</image>` (102) and their like are pieces of it;
    in 2.0, `<slice>` (111) and `</slice>` (112) take the places of reserved ones. VisualCLA's is the Chinese LLaMA's,
    with `<img>`, `</img>`, `<pad>` and `<img_token>` added.

    Args:
        vocab_file: `tokenizer.model`.
        pad_token: padding.
    """

    def __init__(self, vocab_file: str | os.PathLike, pad_token: str = "<unk>", **kwargs: Any):
        if not is_sentencepiece_available():
            raise ImportError("This tokenizer needs sentencepiece, which is not installed: pip install sentencepiece.")
        vocab_file = os.fspath(vocab_file)
        if not os.path.isfile(vocab_file):
            raise ValueError(f"There is no SentencePiece vocabulary at {vocab_file}.")
        # What the released files say of these has other tokenizers in mind.
        for name in ("legacy", "special_tokens_pattern", "add_bos_token", "add_eos_token", "add_prefix_space"):
            kwargs.pop(name, None)
        defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "left"}
        try:
            super().__init__(
                vocab_file=vocab_file,
                pad_token=pad_token,
                legacy=True,
                special_tokens_pattern="bos",
                **{**defaults, **kwargs},
            )
        except RuntimeError as error:  # sentencepiece's own, of a file that is something else
            raise ValueError(f"{vocab_file} is no SentencePiece vocabulary: {error}") from error

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """As `sentencepiece` decodes, bytes included, each run between special tokens on its own. As in the
        transformers of the releases, a space goes before a text that a special token follows."""
        special = {*self._added_tokens_encoder, *self.all_special_tokens}
        texts, run = [], []
        for token in tokens:
            if token in special:
                texts += [" ", self.sp_model.decode_pieces(run), token] if run else [token]
                run = []
            else:
                run.append(token)
        return "".join([*texts, self.sp_model.decode_pieces(run)])

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.IdToPiece(index) if 0 <= index < self.vocab_size else str(self.unk_token)


__all__ = ["LegacySentencePieceTokenizer"]
