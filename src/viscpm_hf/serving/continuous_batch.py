"""Rows of different requests, decoded together: they join and leave between any two steps.

A row's prompt is read when it joins (CPM-Bee's prompt attends in both directions, so in one piece), together with the
others that join at that moment. All rows then share one cache that is padded on the left; the structure of each row's
document, its extension table and its answer's segment are kept beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.nn.functional import pad
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..modeling.beam_search_cpm_bee import RowVocabulary
from ..modeling.cache_cpm_bee import CpmBeeCache
from ..modeling.document_cpm_bee import EncodedDocument
from .sampling import Sampler, choose_tokens


@dataclass(eq=False)
class Row:
    """One answer in the making."""

    prompt: EncodedDocument
    """The document with its answer's `<s>` as the last token."""
    sampler: Sampler
    image: torch.Tensor | None = None
    """Encoded images of the document, `(images, queries, hidden)`."""
    answer: list[tuple[int, int]] = field(default_factory=list)
    """Tokens so far, `(base id, number)`."""
    strings: dict[int, str] = field(default_factory=dict)
    """What the ids that are no tokens of the vocabulary stand for, while the row is in a batch."""

    @property
    def length(self) -> int:
        """Places it takes in the cache now."""
        return len(self.prompt) + len(self.answer)

    @property
    def max_length(self) -> int:
        """Places it may come to take."""
        return len(self.prompt) + self.sampler.settings.max_new_tokens

    def as_prompt(self) -> EncodedDocument:
        """Prompt and answer so far, to be read in one piece."""
        count = len(self.answer)
        return replace(
            self.prompt,
            input_ids=[*self.prompt.input_ids, *(base for base, _ in self.answer)],
            sub_ids=[*self.prompt.sub_ids, *(number for _, number in self.answer)],
            token_type_ids=[*self.prompt.token_type_ids, *[1] * count],
            segment_ids=[*self.prompt.segment_ids, *self.prompt.segment_ids[-1:] * count],
        )


@dataclass
class _State:
    """What the rows' next step needs; every tensor has the rows first."""

    cache: CpmBeeCache
    tokens: torch.Tensor
    """`(rows, 1)`, chosen but not yet read."""
    visible: torch.Tensor
    """`(rows, places)`: False for padding."""
    segments: torch.Tensor
    """`(rows, places)`"""
    segment_relations: torch.Tensor
    extension_table: torch.Tensor

    def select(self, rows: list[int]) -> _State:
        """These rows, without the places on the left that all of them leave empty."""
        index = torch.tensor(rows, device=self.visible.device)
        visible = self.visible[index]
        begin = int(visible.any(0).int().argmax())
        return _State(
            cache=_map_cache(self.cache, lambda states: states[index.to(states.device), :, begin:]),
            tokens=self.tokens[index],
            visible=visible[:, begin:],
            segments=self.segments[index, begin:],
            segment_relations=self.segment_relations[index],
            extension_table=self.extension_table[index],
        )

    def joined_by(self, other: _State) -> _State:
        """The rows of both."""
        places = max(self.visible.shape[1], other.visible.shape[1])
        segments = max(self.segment_relations.shape[1], other.segment_relations.shape[1])
        shapes = (self.extension_table.shape[1:], other.extension_table.shape[1:])
        entries, width = (max(sizes) for sizes in zip(*shapes, strict=True))

        def at_left(state: _State, name: str) -> torch.Tensor:
            tensor = getattr(state, name)
            return pad(tensor, (places - tensor.shape[1], 0))

        def relations(state: _State) -> torch.Tensor:
            missing = segments - state.segment_relations.shape[1]
            return pad(state.segment_relations, (0, missing, 0, missing))

        def table(state: _State) -> torch.Tensor:
            _, own_entries, own_width = state.extension_table.shape
            return pad(state.extension_table, (0, width - own_width, 0, entries - own_entries))

        cache = CpmBeeCache()
        for index, (mine, theirs) in enumerate(zip(self.cache.layers, other.cache.layers, strict=True)):
            keys, values = (
                torch.cat([pad(states, (0, 0, places - states.shape[-2], 0)) for states in pair])
                for pair in ((mine.keys, theirs.keys), (mine.values, theirs.values))
            )
            cache.update(keys, values, index)
        return _State(
            cache=cache,
            tokens=torch.cat([self.tokens, other.tokens]),
            visible=torch.cat([at_left(self, "visible"), at_left(other, "visible")]),
            segments=torch.cat([at_left(self, "segments"), at_left(other, "segments")]),
            segment_relations=torch.cat([relations(self), relations(other)]),
            extension_table=torch.cat([table(self), table(other)]),
        )


def _map_cache(cache: CpmBeeCache, change) -> CpmBeeCache:
    changed = CpmBeeCache()
    for index, layer in enumerate(cache.layers):
        changed.update(change(layer.keys), change(layer.values), index)
    return changed


class ContinuousBatch:
    """Decodes rows together, one token of each in a step.

    Args:
        model: a [`VisCPMChatForConditionalGeneration`].
        tokenizer: its tokenizer.
    """

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.language_model = model.language_model()
        self.rows: list[Row] = []
        self._state: _State | None = None
        self._vocabulary: RowVocabulary | None = None

    @torch.no_grad()
    def join(self, rows: Sequence[Row]) -> list[int]:
        """Reads the prompts of new rows (with what they have of an answer) and adds them; returns their next tokens.

        If this raises, the batch is as it was.
        """
        documents = [row.as_prompt() for row in rows]
        inputs = self.tokenizer.collate(documents, padding_side="left", return_tensors="pt")
        strings = inputs.extension_strings
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        images = [row.image for row in rows if row.image is not None]
        if images:
            encoded = torch.cat([image.to(self.model.device, self.model.dtype) for image in images])
            inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=encoded)}
        cache = CpmBeeCache()
        outputs = self.model.model(**inputs, cache=cache, use_cache=True)
        vocabulary = RowVocabulary(self.model, inputs["extension_table"])
        logits = vocabulary.forbid(vocabulary.logits(outputs.last_hidden_state[:, -1:]))[:, 0]
        tokens = choose_tokens(logits, [row.sampler for row in rows])
        joining = _State(
            cache=cache,
            tokens=tokens[:, None].to(self.model.device),
            visible=inputs["attention_mask"].bool(),
            segments=inputs["segment_ids"],
            segment_relations=inputs["segment_relations"],
            extension_table=inputs["extension_table"],
        )
        state = joining if self._state is None else self._state.joined_by(joining)
        for row, own in zip(rows, strings, strict=True):
            row.strings = own
        self._take(state, [*self.rows, *rows])
        return self._record(rows, tokens)

    @torch.no_grad()
    def step(self) -> list[int]:
        """The next token of every row. If this raises, [`clear`] the batch and let the rows join again."""
        state, vocabulary = self._state, self._vocabulary
        ones = state.visible.new_ones(len(self.rows), 1)
        state.visible = torch.cat([state.visible, ones], dim=1)
        state.segments = torch.cat([state.segments, state.segments[:, -1:]], dim=1)
        places = torch.arange(state.segments.shape[1], device=state.segments.device)
        bias = self.language_model.position_bias(
            places[None, -1:], places[None], state.segments[:, -1:], state.segments, state.segment_relations
        )
        embeddings = vocabulary.embed(state.tokens)
        bias = self.language_model.merge_bias(bias, state.visible[:, None].to(bias.device), embeddings.dtype)
        outputs = self.language_model(inputs_embeds=embeddings, position_bias=bias, cache=state.cache, use_cache=True)
        logits = vocabulary.forbid(vocabulary.logits(outputs.last_hidden_state))[:, 0]
        tokens = choose_tokens(logits, [row.sampler for row in self.rows])
        state.tokens = tokens[:, None].to(state.tokens.device)
        return self._record(self.rows, tokens)

    def keep(self, rows: Sequence[Row]) -> None:
        """Lets all other rows leave."""
        wanted = set(rows)
        index = [place for place, row in enumerate(self.rows) if row in wanted]
        if len(index) == len(self.rows):
            return
        if not index:
            self.clear()
            return
        self._take(self._state.select(index), [self.rows[place] for place in index])

    def clear(self) -> None:
        self.rows, self._state, self._vocabulary = [], None, None

    def _take(self, state: _State, rows: list[Row]) -> None:
        vocabulary = RowVocabulary(self.model, state.extension_table)
        self._state, self.rows, self._vocabulary = state, rows, vocabulary

    def _record(self, rows: Sequence[Row], tokens: torch.Tensor) -> list[int]:
        """Notes the chosen tokens in their rows."""
        chosen = tokens.tolist()
        for row, token in zip(rows, chosen, strict=True):
            row.answer.append(row.prompt.pair(token, self.tokenizer.num_words))
            row.sampler.seen.append(row.answer[-1][0])
        return chosen
