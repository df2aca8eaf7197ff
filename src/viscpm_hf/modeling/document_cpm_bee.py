"""CPM-Bee documents and what the model needs to know of them.

Vocabulary of the CPM-Bee files (CPM-Bee and VisCPM, arXiv:2308.12038):

- A *document* is a nested mapping of strings, e.g. `{"input": "...", "<ans>": {"a": "", "b": ""}}`. It is flattened
  depth first into *segments*: the root (text `<root>`, depth 0), every key (at its depth) and every string value (one
  deeper than its key). Values below a top-level `<ans>` are *answers*, values below a top-level `image` hold image
  placeholders.
- *Document syntax* is the text form of tokens: `<name>` is a special token, `<<` stands for one literal `<`.
- A string without a token of its own (a run of characters that no token covers, or a special such as `<ans_1>`) is an
  *extension token*. The model sees it as a base token plus a number that rotates the base embedding: `<ans>` for
  `<ans_1>`, `<unk>` for unknown runs, numbered from 0 in order of first use within the document. Number 0 *is* the
  base token. The others are gathered in the *extension table* of a batch: row `e`, `(base id, number)`, is the token
  with id `vocab_size + e` in both the input and the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


ROOT_TEXT = "<root>"
ANSWER_KEY = "<ans>"
IMAGE_KEY = "image"

# Depth differences above this share one relation bucket.
MAX_DEPTH_DIFFERENCE = 7
MAX_DOCUMENT_DEPTH = 64

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Segment:
    """One node of a flattened document."""

    text: str
    depth: int
    path: tuple[str, ...]
    ancestors: tuple[int, ...]
    """Segment ids from the root down to this segment, itself included (`depth + 1` entries)."""
    is_answer: bool = False
    is_image: bool = False


@dataclass(frozen=True)
class AnswerSlot:
    """An answer of a document: where its value lies in the document and in the token sequence."""

    path: tuple[str, ...]
    segment_id: int
    begin: int
    """Index of the slot's `<s>`."""
    end: int
    """Index after the slot's last token."""


@dataclass
class EncodedDocument:
    """A document as token lists of length `sequence_length`; not yet padded, extension tokens not yet numbered."""

    input_ids: list[int]
    """Base token ids."""
    sub_ids: list[int]
    """Number of each extension token within its base, 0 for ordinary tokens."""
    token_type_ids: list[int]
    """0 = context (attends to all context, both ways), 1 = answer (causal)."""
    segment_ids: list[int]
    segment_relations: list[list[int]]
    """`(num_segments, num_segments)` relation buckets, 0 for a segment and itself."""
    image_bounds: list[tuple[int, int]]
    """`[begin, end)` of the placeholders of every image value."""
    answer_slots: list[AnswerSlot]
    extension_table: dict[int, str]
    """Tokenizer ids `vocab_size + k` of the strings without a token, in order of first use."""
    extension_strings: dict[tuple[int, int], str] = field(default_factory=dict)
    """`(base id, number) -> string` for the same strings."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def prompt(self, open_slot: int | None = None) -> EncodedDocument:
        """The document as a prompt: all context first, then what is answered already.

        Order doesn't matter to the model (relations between segments carry the structure), but generation appends to
        the end.

        Args:
            open_slot: index of the answer slot to generate next: the answers before it follow the context, then its
                `<s>`. None: context alone, as the reference decoding wants it.
        """
        places = [place for place, kind in enumerate(self.token_type_ids) if kind == 0]
        if open_slot is not None:
            for slot in self.answer_slots[:open_slot]:
                places += range(slot.begin, slot.end)
            places.append(self.answer_slots[open_slot].begin)
        moved = {place: index for index, place in enumerate(places)}
        return replace(
            self,
            input_ids=[self.input_ids[place] for place in places],
            sub_ids=[self.sub_ids[place] for place in places],
            token_type_ids=[self.token_type_ids[place] for place in places],
            segment_ids=[self.segment_ids[place] for place in places],
            image_bounds=[(moved[begin - 1] + 1, moved[end]) for begin, end in self.image_bounds],
            answer_slots=[],
        )


def flatten_document(document: Mapping[str, Any]) -> list[Segment]:
    """Flattens a document into its segments, depth first.

    Raises:
        ValueError: if the document is not a nested mapping of strings; the message names the path of the fault.
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"A CPM-Bee document is a dict of strings or dicts, got {type(document).__name__}.")
    if not document:
        raise ValueError("A CPM-Bee document needs at least one key, got an empty dict.")

    segments = [Segment(ROOT_TEXT, 0, (), (0,))]

    def visit(node: Any, path: tuple[str, ...], parent: Segment) -> None:
        depth = parent.depth + 1
        where = " > ".join(path) or "the top level"
        if depth > MAX_DOCUMENT_DEPTH:
            raise ValueError(f"The document is nested deeper than {MAX_DOCUMENT_DEPTH} levels at {where[:200]}.")
        is_answer = bool(path) and path[0] == ANSWER_KEY
        if isinstance(node, str):
            is_image = bool(path) and path[0] == IMAGE_KEY
            ancestors = (*parent.ancestors, len(segments))
            segments.append(Segment(node, depth, path, ancestors, is_answer=is_answer, is_image=is_image))
            return
        if not isinstance(node, Mapping):
            raise ValueError(f"Document values are strings or dicts, got {type(node).__name__} at {where[:200]}.")
        if not node and is_answer:
            raise ValueError(f'The document has no answer slot at {where[:200]}: use "" for an answer to fill.')
        for key, value in node.items():
            if not isinstance(key, str):
                raise ValueError(f"Document keys are strings, got {type(key).__name__} {key!r} at {where[:200]}.")
            segment = Segment(key, depth, (*path, key), (*parent.ancestors, len(segments)))
            segments.append(segment)
            visit(value, (*path, key), segment)

    visit(document, (), segments[0])
    return segments


def segment_relations(segments: Sequence[Segment]) -> list[list[int]]:
    """Relation bucket of every pair of segments: how far up to the common ancestor, and down again from it."""
    return [list(row) for row in _relations(tuple(segment.ancestors for segment in segments))]


@functools.lru_cache(maxsize=64)  # documents come in few shapes: all turns of all chats share two
def _relations(ancestors: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    limit = MAX_DEPTH_DIFFERENCE

    def relation(first: tuple[int, ...], second: tuple[int, ...]) -> int:
        common = 0
        for a, b in zip(first, second, strict=False):
            if a != b:
                break
            common += 1
        up = min(len(first) - common, limit)
        down = min(len(second) - common, limit)
        return up * (limit + 1) + down + 1 if up or down else 0

    return tuple(tuple(relation(a, b) for b in ancestors) for a in ancestors)


def batch_extension_table(documents: Sequence[EncodedDocument]) -> list[tuple[int, int]]:
    """The extension tokens of a batch, `(base id, number)`, in order of first use; number 0 needs no entry."""
    table: dict[tuple[int, int], None] = {}
    for document in documents:
        for base, sub in zip(document.input_ids, document.sub_ids, strict=True):
            if sub > 0:
                table.setdefault((base, sub))
    return list(table)


def collate_documents(
    documents: Sequence[EncodedDocument],
    *,
    vocab_size: int,
    pad_token_id: int,
    unk_token_id: int,
    padding_side: str = "left",
    pad_to_multiple_of: int | None = None,
    min_length: int = 0,
    with_labels: bool = False,
) -> dict[str, list]:
    """Pads encoded documents to one batch of model inputs.

    Returns lists, ready for a `BatchEncoding`: `input_ids`, `attention_mask`, `token_type_ids`, `segment_ids`
    `(batch, length)`; `segment_relations (batch, segments, segments)`; `extension_table (batch, E, 2)`, the same rows
    for the whole batch; `extension_mask (batch, 1 + E)`: whether the row itself holds the unknown string that `<unk>`
    stands for (column 0) and extension token `e` (column `1 + e`), so that generation offers it no other row's
    strings; and, if asked for, `labels (batch, length)`: answer tokens after their `<s>`, -100 elsewhere.
    """
    table = batch_extension_table(documents)
    column = {entry: index for index, entry in enumerate(table)}
    length = max(min_length, *(len(document) for document in documents))
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    num_segments = max(len(document.segment_relations) for document in documents)

    def pad(values: Sequence[int], value: int) -> list[int]:
        padding = [value] * (length - len(values))
        return padding + list(values) if padding_side == "left" else list(values) + padding

    batch: dict[str, list] = {
        name: []
        for name in (
            "input_ids",
            "attention_mask",
            "token_type_ids",
            "segment_ids",
            "segment_relations",
            "extension_table",
            "extension_mask",
        )
    }
    if with_labels:
        batch["labels"] = []
    for document in documents:
        tokens = [
            vocab_size + column[base, sub] if sub else base
            for base, sub in zip(document.input_ids, document.sub_ids, strict=True)
        ]
        batch["input_ids"].append(pad(tokens, pad_token_id))
        batch["attention_mask"].append(pad([1] * len(tokens), 0))
        batch["token_type_ids"].append(pad(document.token_type_ids, 0))
        batch["segment_ids"].append(pad(document.segment_ids, 0))
        missing = num_segments - len(document.segment_relations)
        batch["segment_relations"].append(
            [[*row, *[0] * missing] for row in document.segment_relations] + [[0] * num_segments] * missing
        )
        batch["extension_table"].append([list(entry) for entry in table])
        owned = document.extension_strings
        batch["extension_mask"].append([(unk_token_id, 0) in owned, *(entry in owned for entry in table)])
        if with_labels:
            labels = [IGNORE_INDEX] * len(tokens)
            for slot in document.answer_slots:
                labels[slot.begin + 1 : slot.end] = tokens[slot.begin + 1 : slot.end]
            batch["labels"].append(pad(labels, IGNORE_INDEX))
    return batch


def own_strings(documents: Sequence[EncodedDocument], *, vocab_size: int) -> list[dict[int, str]]:
    """For every row of the batch: what its token ids stand for that are no token of the vocabulary, `id -> string`."""
    table = batch_extension_table(documents)
    rows = []
    for document in documents:
        strings = document.extension_strings
        row = {vocab_size + index: strings[entry] for index, entry in enumerate(table) if entry in strings}
        row |= {base: string for (base, number), string in strings.items() if number == 0}
        rows.append(row)
    return rows


def fill_document(document: Mapping[str, Any], answers: Mapping[tuple[str, ...], str | None]) -> dict[str, Any]:
    """A copy of `document` with `answers`, by path, in place."""

    def copy(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, Mapping):
            return {key: copy(value, (*path, key)) for key, value in node.items()}
        return answers.get(path, node)

    return copy(document, ())
