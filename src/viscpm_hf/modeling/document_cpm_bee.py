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
  base token. The others take the document's *slots* (`token_ids_cpm_bee`): the k-th of them has the id
  `num_words + k` in both the input and the logits of its own row.
- The *extension table* of a batch says what that is in every row: entry k, `(base id, number, id, text)`, is what the
  k-th slot holds; entries of number 0 come last. The text is code points, each plus one, filled up with zeros. So
  whoever has the inputs can embed and decode the row's tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .token_ids_cpm_bee import num_extension_slots


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
    """Tokenizer ids `num_words + k` of the strings without a token, in order of first use."""
    extension_strings: dict[tuple[int, int], str] = field(default_factory=dict)
    """`(base id, number) -> string` for the same strings, in the same order."""
    prompt_strings: dict[tuple[int, int], str] = field(default_factory=dict)
    """The same as they are numbered in a prompt, together with its empty answer slots."""
    prompt_numbers: dict[int, int] = field(default_factory=dict)
    """Place of each extension token -> its number in a prompt."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def pair(self, token: int, num_words: int) -> tuple[int, int]:
        """Base id and number of a token that was generated for the prompt."""
        slot, slots = token - num_words, [pair for pair in self.prompt_strings or self.extension_strings if pair[1]]
        return slots[slot] if 0 <= slot < len(slots) else (token, 0)

    @property
    def slots(self) -> list[tuple[int, int]]:
        """Base id and number of the extension tokens that have ids of their own."""
        return [pair for pair in self.extension_strings if pair[1]]

    def strings(self, num_words: int) -> dict[int, str]:
        """Of a prompt, what its ids stand for that are no tokens of the vocabulary: `id -> string`."""
        return own_strings(extension_table([self], [self.slots], num_words=num_words))[0]

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
            sub_ids=[self.prompt_numbers.get(place, self.sub_ids[place]) for place in places],
            extension_strings=self.prompt_strings or self.extension_strings,
            prompt_strings={},
            prompt_numbers={},
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
    return [list(row) for row in relations_of_ancestors(tuple(segment.ancestors for segment in segments))]


@functools.lru_cache(maxsize=64)  # documents come in few shapes: all turns of all chats share two
def relations_of_ancestors(ancestors: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """The same of each segment's ids from the root down to itself."""
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


# Entries of the extension table before the text: base id, number, id.
TABLE_HEAD = 3


def shared_slots(documents: Sequence[EncodedDocument]) -> list[tuple[int, int]]:
    """Base ids and numbers of the extension tokens of all documents, as the loss of a batch takes them."""
    return list(dict.fromkeys(pair for document in documents for pair in document.slots))


def extension_table(
    documents: Sequence[EncodedDocument], slots: Sequence[Sequence[tuple[int, int]]], *, num_words: int
) -> list[list[list[int]]]:
    """`(batch, E, 3 + characters)`: of every row its slots, then its extension tokens of number 0; shorter rows and
    texts end in zeros. The slots of another row's tokens have no text."""
    width = max((len(text) for document in documents for text in document.extension_strings.values()), default=0)
    table = []
    for document, pairs in zip(documents, slots, strict=True):
        strings = document.extension_strings
        entries = [(pair, num_words + slot) for slot, pair in enumerate(pairs)]
        entries += [(pair, pair[0]) for pair in strings if not pair[1]]
        rows = [
            [*pair, token, *(ord(character) + 1 for character in strings.get(pair, ""))] for pair, token in entries
        ]
        table.append([row + [0] * (TABLE_HEAD + width - len(row)) for row in rows])
    length = max(map(len, table))
    return [rows + [[0] * (TABLE_HEAD + width)] * (length - len(rows)) for rows in table]


def own_strings(table: Any) -> list[dict[int, str]]:
    """For every row of an extension table: what its ids stand for that are no token of the vocabulary,
    `id -> string`."""
    rows = table.tolist() if hasattr(table, "tolist") else table
    return [
        {
            entry[2]: "".join(chr(code - 1) for code in entry[TABLE_HEAD:] if code)
            for entry in row
            if any(entry[TABLE_HEAD:])
        }
        for row in rows
    ]


def collate_documents(
    documents: Sequence[EncodedDocument],
    *,
    num_words: int,
    pad_token_id: int,
    padding_side: str = "left",
    pad_to_multiple_of: int | None = None,
    min_length: int = 0,
    with_labels: bool = False,
) -> dict[str, list]:
    """Pads encoded documents to one batch of model inputs.

    Returns lists, ready for a `BatchEncoding`: `input_ids`, `attention_mask`, `token_type_ids`, `segment_ids`
    `(batch, length)`; `segment_relations (batch, segments, segments)`; `extension_table (batch, E, 3 + characters)`;
    and, if asked for, `labels (batch, length)`: answer tokens after their `<s>`, -100 elsewhere. With labels the rows
    share their slots, since the original's loss has a column for each extension token of the batch.
    """
    length = max(min_length, *(len(document) for document in documents))
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    num_segments = max(len(document.segment_relations) for document in documents)

    def pad(values: Sequence[int], value: int) -> list[int]:
        padding = [value] * (length - len(values))
        return padding + list(values) if padding_side == "left" else list(values) + padding

    names = ("input_ids", "attention_mask", "token_type_ids", "segment_ids", "segment_relations")
    batch: dict[str, list] = {name: [] for name in names}
    slots = [shared_slots(documents)] * len(documents) if with_labels else [document.slots for document in documents]
    if len(slots[0]) > num_extension_slots(num_words):
        raise ValueError(
            f"The batch has {len(slots[0]):,} different extension tokens, more than the "
            f"{num_extension_slots(num_words):,} slots there are. Make the batch smaller."
        )
    batch["extension_table"] = extension_table(documents, slots, num_words=num_words)
    if with_labels:
        batch["labels"] = []
    for document, pairs in zip(documents, slots, strict=True):
        ids = {pair: num_words + slot for slot, pair in enumerate(pairs)}
        tokens = [
            ids[base, sub] if sub else base for base, sub in zip(document.input_ids, document.sub_ids, strict=True)
        ]
        batch["input_ids"].append(pad(tokens, pad_token_id))
        batch["attention_mask"].append(pad([1] * len(tokens), 0))
        batch["token_type_ids"].append(pad(document.token_type_ids, 0))
        batch["segment_ids"].append(pad(document.segment_ids, 0))
        missing = num_segments - len(document.segment_relations)
        batch["segment_relations"].append(
            [[*row, *[0] * missing] for row in document.segment_relations] + [[0] * num_segments] * missing
        )
        if with_labels:
            labels = [IGNORE_INDEX] * len(tokens)
            for slot in document.answer_slots:
                labels[slot.begin + 1 : slot.end] = tokens[slot.begin + 1 : slot.end]
            batch["labels"].append(pad(labels, IGNORE_INDEX))
    return batch


def fill_document(document: Mapping[str, Any], answers: Mapping[tuple[str, ...], str | None]) -> dict[str, Any]:
    """A copy of `document` with `answers`, by path, in place."""

    def copy(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, Mapping):
            return {key: copy(value, (*path, key)) for key, value in node.items()}
        return answers.get(path, node)

    return copy(document, ())
