"""What stands behind the words among CPM-Bee's tokens (`token_ids_cpm_bee`): rows, logits, and whose they are."""

from __future__ import annotations

import copy
from typing import Any

import torch

from .token_ids_cpm_bee import num_extension_slots


# Logit of slots without a token in a row, and of the placeholder: of no weight in a softmax at any useful temperature,
# yet a number that losses, smoothed labels and differences of log-probabilities can be computed with.
MASKED_LOGIT = -1000.0

# First values of the rows of slots and placeholder, `(1 + row % 32, 1 + row // 32) / 64` before the width is folded
# in; all others are 0. The rows are never used as embeddings, but tell which token was looked up.
_MARK_BASE, _MARK_SCALE = 32, 1 / 64


def slot_rows(num_words: int, hidden_size: int) -> torch.Tensor:
    """Rows of the embedding for slots and placeholder in the original's scale, `(slots + 1, hidden)`."""
    index = torch.arange(num_extension_slots(num_words) + 1)
    rows = torch.zeros(len(index), hidden_size)
    rows[:, 0] = (1 + index % _MARK_BASE) * _MARK_SCALE
    rows[:, 1] = (1 + index // _MARK_BASE) * _MARK_SCALE
    return rows


def pad_token_rows(weight: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """An embedding of words alone `(num_words, hidden)` -> `(padded_vocab_size, hidden)`; `factor` is that by which
    the given one differs from the original's scale."""
    rows = slot_rows(*weight.shape) * factor
    return torch.cat([weight, rows.to(weight.device, weight.dtype)])


def write_slots(
    logits: torch.Tensor,
    hidden_states: torch.Tensor,
    config: Any,
    extensions: torch.Tensor | None,
    owned: torch.Tensor | None,
) -> torch.Tensor:
    """Writes the columns of slots and placeholder into logits `(batch, sequence, vocab_size)`, in place.

    Args:
        hidden_states: what the logits were made of, `(batch, sequence, hidden)`.
        extensions: embeddings of the rows' extension tokens `(batch or 1, E, hidden)`, if there are any.
        owned: `(batch or 1, E)`: whether a row has that token; number 0 of a base has the base's own column.
    """
    begin = config.num_words
    logits[..., begin : config.placeholder_token_id + 1] = MASKED_LOGIT
    if extensions is not None:
        extensions = extensions.to(hidden_states.device, hidden_states.dtype)
        columns = torch.matmul(hidden_states, extensions.transpose(1, 2)).to(logits.device, logits.dtype)
        owned = owned.to(logits.device)[:, None]
        logits[..., begin : begin + extensions.shape[1]] = torch.where(owned, columns, MASKED_LOGIT)
    return logits


class AllowedTokens:
    """What every row may generate: of the strings without a token those of its own prompt, and no placeholder.

    Args:
        config: of the language model.
        extension_table: `(rows, E, 3 + characters)`; None where nothing is known of the prompt, which then may have
            given any meaning to `<unk>`, but none to slots.
    """

    def __init__(self, config: Any, extension_table: torch.Tensor | None):
        self.unk_token_id = config.unk_token_id
        self.columns = slice(config.num_words, config.placeholder_token_id + 1)
        num_columns = config.placeholder_token_id + 1 - config.num_words
        self.forbids_unknown: torch.Tensor | None = None
        if extension_table is None:
            self.forbidden = torch.ones(1, num_columns, dtype=torch.bool)
            return
        owned = extension_table[..., 1] > 0
        self.forbidden = ~torch.nn.functional.pad(owned, (0, num_columns - owned.shape[1]))
        if self.unk_token_id is not None:
            is_unknown = extension_table[..., 0] == self.unk_token_id
            self.forbids_unknown = ~(is_unknown & (extension_table[..., 1] == 0)).any(-1)

    def repeated(self, num_rows: int) -> AllowedTokens:
        """The same for so many rows, each repeated as often; at most one is broadcast."""
        times = num_rows // self.forbidden.shape[0]
        if self.forbidden.shape[0] in (1, num_rows):
            return self
        result = copy.copy(self)
        result.forbidden = self.forbidden.repeat_interleave(times, dim=0)
        if self.forbids_unknown is not None:
            result.forbids_unknown = self.forbids_unknown.repeat_interleave(times, dim=0)
        return result

    def forbid(self, scores: torch.Tensor, value: float) -> torch.Tensor:
        """Scores `(rows, n, vocab_size)` with `value` for what is forbidden, in place."""
        if self.forbidden.device != scores.device:
            self.forbidden = self.forbidden.to(scores.device)
        scores[..., self.columns].masked_fill_(self.forbidden[:, None], value)
        if self.forbids_unknown is not None:
            forbids = self.forbids_unknown = self.forbids_unknown.to(scores.device)
            scores[..., self.unk_token_id].masked_fill_(forbids[:, None], value)
        return scores
