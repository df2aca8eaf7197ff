"""The structure of prompts whose tensors tools have joined, moved or dropped.

Libraries for training know of `input_ids`, `attention_mask`, `labels` and perhaps `token_type_ids`. They join a prompt
and its completion, move padding to the other side, or put virtual tokens in front, and leave `segment_ids` as they
were, or out. It can be told from the tokens again, since every segment is `<s> ... </s>`; what can't is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils import logging

from .document_cpm_bee import IGNORE_INDEX, relations_of_ancestors


logger = logging.get_logger(__name__)

# The specials come in one order in every vocabulary of CPM-Bee.
ROOT_TOKEN_ID, ANSWER_TOKEN_ID = 8, 9


@dataclass(frozen=True)
class Structure:
    """What `CpmBeeModel` is told of the documents."""

    token_type_ids: torch.Tensor | None
    segment_ids: torch.Tensor | None
    segment_relations: torch.Tensor | None

    def completed(
        self,
        language_model: Any,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        cache: Any,
    ) -> Structure:
        """The structure of this forward pass.

        Raises:
            ValueError: if it doesn't belong to the tokens, and they are no whole document.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            return self  # the model's own words for it
        num_queries = given.shape[1]
        if num_queries == 1 or given.device.type == "meta" or torch.compiler.is_compiling():
            return self
        num_places = None if self.segment_ids is None else self.segment_ids.shape[1]
        if attention_mask is not None and attention_mask.ndim != 2:
            return self
        config = language_model.config
        if input_ids is not None and num_places != num_queries:
            is_begun = cache is not None and int(cache.get_seq_length()) > 0
            if is_begun or (num_places is None and not is_document(input_ids, attention_mask, config)):
                return self
            if num_places is not None and num_places < num_queries:
                extended = self._with_open_answer(input_ids, attention_mask, config)
                if extended is not None:
                    return extended
            return self._read_off(input_ids, attention_mask, config)
        if num_places is None or num_places > num_queries:
            return self
        if input_ids is not None and not self._fits(input_ids, attention_mask, config):
            return self._read_off(input_ids, attention_mask, config)
        if self.token_type_ids is not None:
            return self
        if input_ids is not None:
            is_answer_key = input_ids == ANSWER_TOKEN_ID
        else:
            key = language_model.embed_tokens(torch.tensor(ANSWER_TOKEN_ID, device=inputs_embeds.device))
            is_answer_key = (inputs_embeds[:, num_queries - num_places :] == key).all(-1)
        kinds = answer_kinds(is_answer_key, self.segment_ids, self.segment_relations)
        # Virtual tokens in front are context.
        return replace(self, token_type_ids=torch.nn.functional.pad(kinds, (num_queries - num_places, 0)))

    def _with_open_answer(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: Any
    ) -> Structure | None:
        """For a prompt and more of the answer that it ends with; None for anything else."""
        count = self.segment_ids.shape[1]
        more = input_ids[:, count:]
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        is_open = input_ids[:, count - 1] != _end_token_id(config)
        kinds = self.token_type_ids
        is_said_to_be = kinds is not None and kinds.shape == input_ids.shape and bool((kinds[:, count:] == 1).all())
        if not is_said_to_be:  # as `generate` says it of whatever it generated
            is_open &= ~(more == config.bos_token_id).any(1)
        if mask is not None:
            is_open &= mask[:, count - 1].to(is_open.device).bool()
        if not is_open.all() or not self._fits(
            input_ids[:, :count], None if mask is None else mask[:, :count], config
        ):
            return None
        if kinds is None:
            kinds = answer_kinds(input_ids[:, :count] == ANSWER_TOKEN_ID, self.segment_ids, self.segment_relations)
        return replace(
            self,
            segment_ids=torch.cat([self.segment_ids, self.segment_ids[:, -1:].expand_as(more)], 1),
            token_type_ids=torch.cat([kinds[:, :count], torch.ones_like(more)], 1),
        )

    def _fits(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: Any) -> bool:
        """Whether segments begin where the tokens say so."""
        segments = self.segment_ids.to(input_ids.device)
        begins = segments[:, 1:] != segments[:, :-1]
        if attention_mask is not None:
            seen = attention_mask[:, -input_ids.shape[1] :].to(input_ids.device).bool()
            begins &= seen[:, 1:] & seen[:, :-1]
        return not bool((begins & (input_ids[:, 1:] != config.bos_token_id)).any())

    def _read_off(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: Any) -> Structure:
        """The structure as the tokens have it."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        segment_ids = torch.zeros_like(input_ids)
        counts = []
        for row, (ids, seen) in enumerate(zip(input_ids.tolist(), mask.tolist(), strict=True)):
            places = [place for place, is_seen in enumerate(seen) if is_seen]
            segments = segments_of([ids[place] for place in places], config)
            expected = None if self.segment_ids is None else int(self.segment_ids[row].max()) + 1
            is_in_order = expected is None or bool((self.segment_ids[row].diff() >= 0).all())
            if segments is None or not is_in_order or expected not in (None, segments[-1] + 1):
                self._refuse(row, input_ids, expected, segments)
            segment_ids[row, places] = torch.tensor(segments, device=input_ids.device)
            counts.append(segments[-1] + 1)
        relations = self.segment_relations
        if relations is None:
            if any(count % 2 == 0 for count in counts):
                row = next(row for row, count in enumerate(counts) if count % 2 == 0)
                self._refuse(row, input_ids, None, [counts[row] - 1])
            relations = torch.zeros(len(counts), max(counts), max(counts), dtype=torch.long, device=input_ids.device)
            for row, count in enumerate(counts):
                relations[row, :count, :count] = torch.tensor(flat_relations(count))
        kinds = answer_kinds((input_ids == ANSWER_TOKEN_ID) & mask.bool(), segment_ids, relations)
        return Structure(kinds * mask.to(kinds), segment_ids, relations)

    def _refuse(self, row: int, input_ids: torch.Tensor, expected: int | None, segments: Sequence[int] | None) -> None:
        places = "no" if self.segment_ids is None else f"{self.segment_ids.shape[1]:,}"
        found = "are not segments <s> ... </s>" if segments is None else f"have {segments[-1] + 1:,} segments"
        wanted = "" if expected is None else f" instead of {expected:,}"
        raise ValueError(
            f"There are {places} segment_ids for {input_ids.shape[1]:,} input_ids, and they can't be told from the "
            f"tokens: those of row {row} {found}{wanted}. Hand on segment_ids of the sequence's own length, and "
            "segment_relations, as the processor makes them."
        )


def is_document(input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: Any) -> bool:
    """Whether all rows begin as a document does."""
    if input_ids.shape[1] < 3:
        return False
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
    first = mask.int().argmax(1, keepdim=True).clamp(max=input_ids.shape[1] - 3).to(input_ids.device)
    begin = input_ids.gather(1, first + torch.arange(3, device=input_ids.device))
    wanted = torch.tensor([config.bos_token_id or 0, ROOT_TOKEN_ID, _end_token_id(config)], device=input_ids.device)
    return bool((begin == wanted).all())


def _end_token_id(config: Any) -> int:
    end = config.eos_token_id
    return end[0] if isinstance(end, list) else end or 0


def segments_of(ids: Sequence[int], config: Any) -> list[int] | None:
    """The segment of each token; None if the tokens aren't `<s> ... </s>` one after the other, the last one maybe
    still open."""
    begin, end = config.bos_token_id, _end_token_id(config)
    segments, number, is_open = [], -1, False
    for token in ids:
        if (token == begin) == is_open:
            return None
        if token == begin:
            number, is_open = number + 1, True
        segments.append(number)
        if token == end:
            is_open = False
    return segments or None


def flat_relations(count: int) -> list[list[int]]:
    """Of a root and keys with a value each, as conversations are."""
    ancestors: list[tuple[int, ...]] = [(0,)]
    for segment in range(1, count):
        ancestors.append((0, segment) if segment % 2 else (0, segment - 1, segment))
    return [list(row) for row in relations_of_ancestors(tuple(ancestors))]


def answer_kinds(
    is_answer_key: torch.Tensor, segment_ids: torch.Tensor, segment_relations: torch.Tensor
) -> torch.Tensor:
    """Token types `(batch, length)`: 1 in the values below a top-level `<ans>`, whose token is marked."""
    relations = segment_relations.to(segment_ids.device)
    is_below = (relations >= 2) & (relations <= 8)  # down from the first to the second
    keys = torch.zeros(relations.shape[:2], dtype=torch.bool, device=relations.device)
    keys.scatter_(1, torch.where(is_answer_key.to(keys.device), segment_ids, 0), True)
    keys &= relations[:, 0] == 2
    is_answer = (keys[:, :, None] & is_below).any(1) & ~is_below.any(2)
    return is_answer.long().gather(1, segment_ids)


def answers_alone(labels: torch.Tensor, structure: Structure, begin_id: int | None) -> torch.Tensor:
    """`labels` without those of prompts, which attend in both directions: every token there sees itself.

    Raises:
        ValueError: if nothing is left.
    """
    kinds = structure.token_type_ids
    if kinds is None or torch.compiler.is_compiling() or labels.device.type == "meta":
        return labels
    kinds = torch.nn.functional.pad(kinds, (labels.shape[1] - kinds.shape[1], 0)).to(labels.device)
    is_prompt = (labels != IGNORE_INDEX) & (
        (kinds == 0) | ((labels == begin_id) & (structure.segment_ids is not None))
    )
    num_prompt = int(is_prompt.sum())
    if not num_prompt:
        return labels
    labels = labels.masked_fill(is_prompt, IGNORE_INDEX)
    if (labels == IGNORE_INDEX).all():
        raise ValueError(
            f"All {num_prompt:,} labels are of the prompt, which attends in both directions, so nothing can be "
            "learned of them: label the answer's tokens (return_labels=True)."
        )
    logger.warning_once(
        f"{num_prompt:,} labels of the prompt are left out of the loss: a prompt attends in both directions, so each "
        "of its tokens sees itself. The answer's tokens are learned."
    )
    return labels
