"""The original's beam search, token for token.

transformers' own beam search differs where it changes answers: the penalty is applied to log-probabilities instead of
logits, temperature is ignored, candidates that end a hypothesis must be among the first `num_beams`, and the search
stops by another test.

The prompt is read once per row, whatever the number of beams: the beams of a row are decoded as that many queries over
one shared cache, to which every step appends one place per beam. A mask says which places are a beam's own past, so no
beam's cache is ever copied when beams are re-ordered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import ClassVar

import torch

from .cache_cpm_bee import CpmBeeCache
from .fast_decoding_cpm_bee import FastDecoder
from .token_space_cpm_bee import AllowedTokens, write_slots


# The original's value for tokens that can't be chosen, and for beams that don't exist yet.
FORBIDDEN_LOGIT = -10_000.0
ABSENT_BEAM_SCORE = -1e9


@dataclass(frozen=True)
class ReferenceDecodingConfig:
    """Parameters of the reference decoding; the defaults are the original's.

    Raises:
        ValueError: for a parameter outside its range.
    """

    num_beams: int = 3
    max_new_tokens: int = 512
    """Decoding ends with step `max_new_tokens + 1`, counted from 0: the original counts neither the first token nor
    the end token, so an answer that is cut off has two tokens more."""
    temperature: float = 0.7
    repetition_penalty: float = 1.1
    length_penalty: float = 3.0
    min_new_tokens: int = 0
    """No answer ends before it has so many tokens, those of the slots before included."""
    can_stream: ClassVar[bool] = False
    """The best hypothesis is known at the end."""
    streaming_condition: ClassVar[str] = 'mode="generate"'

    def __post_init__(self):
        for name, least in (("num_beams", 1), ("max_new_tokens", 1), ("min_new_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens ({self.max_new_tokens})."
            )
        for name in ("temperature", "repetition_penalty", "length_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or value != value:
                raise ValueError(f"{name} must be a number, got {value!r}.")
        for name in ("temperature", "repetition_penalty"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)!r}.")

    @property
    def last_step(self) -> int:
        return self.max_new_tokens + 1


@dataclass
class SlotAnswers:
    """The best hypothesis of one row."""

    token_ids: list[list[int] | None]
    """Tokens of every slot without `<s>` and `</s>`; None for a slot that was not reached."""
    score: float
    num_tokens: int
    """All tokens decoded for it."""


@dataclass
class _Hypotheses:
    """The best finished hypotheses of one row."""

    size: int
    length_penalty: float
    entries: list[tuple[float, list[int], list[int]]] = field(default_factory=list)
    done: bool = False

    def add(self, tokens: list[int], slots: list[int], sum_logprobs: float) -> None:
        score = sum_logprobs / len(tokens) ** self.length_penalty
        if len(self.entries) < self.size or score > self.entries[-1][0]:
            self.entries.append((score, tokens, slots))
            self.entries.sort(key=lambda entry: -entry[0])
            del self.entries[self.size :]

    def is_finished(self, best_sum_logprobs: float, step: int) -> bool:
        if len(self.entries) < self.size:
            return False
        return self.entries[-1][0] >= best_sum_logprobs / step**self.length_penalty


@dataclass
class _Beam:
    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    """The slot of every token."""
    slot: int = 0


@dataclass
class _Candidates:
    """The best continuations of one row, best first."""

    scores: list[float]
    parents: list[int]
    tokens: list[int]


@dataclass
class _Continuation:
    """What one beam goes on with."""

    rank: int
    """Which candidate it is."""
    token: int
    """The next input: the candidate's token, or the `<s>` of the next slot."""
    starts_slot: bool
    beam: _Beam


class _Places:
    """The places of the shared cache: what they hold, and which of them are a beam's own past.

    Args:
        attention_mask, segment_ids: the prompts', `(rows, prompt length)`.
        num_beams, num_steps: a step appends one place per beam, to be seen by that beam alone.
    """

    def __init__(self, attention_mask: torch.Tensor, segment_ids: torch.Tensor, num_beams: int, num_steps: int):
        num_rows, prompt_length = attention_mask.shape
        capacity, device = prompt_length + num_steps * num_beams, attention_mask.device
        self.end = prompt_length
        self.positions = torch.zeros(num_rows, capacity, dtype=torch.long, device=device)
        self.positions[:, :prompt_length] = torch.arange(prompt_length, device=device)
        self.segments = torch.zeros(num_rows, capacity, dtype=torch.long, device=device)
        self.segments[:, :prompt_length] = segment_ids
        self.visible = torch.zeros(num_rows, num_beams, capacity, dtype=torch.bool, device=device)
        self.visible[:, :, :prompt_length] = attention_mask.bool()[:, None]
        self._itself = torch.eye(num_beams, dtype=torch.bool, device=device)

    def append(self, positions: torch.Tensor, segments: torch.Tensor) -> None:
        """Takes the next places for a token `(rows, beams)` of every beam."""
        begin, self.end = self.end, self.end + positions.shape[1]
        self.positions[:, begin : self.end] = positions
        self.segments[:, begin : self.end] = segments
        self.visible[:, :, begin : self.end] = self._itself

    def reorder(self, parents: torch.Tensor) -> None:
        """Every beam takes over the past of its parent `(rows, beams)`."""
        self.visible = self.visible.gather(1, parents[..., None].expand_as(self.visible))


class RowVocabulary:
    """Tokens in and logits out, the extension tokens' embeddings computed once for all steps.

    Args:
        model: with `lm_head` and `language_model()`.
        extension_table: `(rows, E, 3 + characters)` or None.
    """

    def __init__(self, model, extension_table: torch.Tensor | None):
        self.lm_head = model.lm_head
        self.language_model = model.language_model()
        self.config = self.language_model.config
        self.allowed = AllowedTokens(self.config, extension_table)
        self.bases: torch.Tensor | None = None
        self.embeddings: torch.Tensor | None = None
        self.owned: torch.Tensor | None = None
        if extension_table is not None and extension_table.shape[1] > 0:
            self.bases, self.owned = extension_table[..., 0], extension_table[..., 1] > 0
            self.embeddings = self.language_model.embed_extensions(extension_table)

    def _slots(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which `(rows, n)` are extension tokens, and their entries of the table."""
        slot = tokens - self.config.num_words
        return (slot >= 0) & (slot < self.bases.shape[1]), slot.clamp(0, self.bases.shape[1] - 1)

    def base_ids(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(rows, n)` with extension tokens replaced by their base tokens."""
        if self.bases is None:
            return tokens
        is_slot, slot = self._slots(tokens)
        return torch.where(is_slot, self.bases.gather(1, slot), tokens)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(rows, n)` -> `(rows, n, hidden)`."""
        embeddings = self.language_model.embed_tokens(tokens)
        if self.bases is None:
            return embeddings
        is_slot, slot = (part.to(embeddings.device)[..., None] for part in self._slots(tokens))
        return torch.where(is_slot, self.embeddings.gather(1, slot.expand_as(embeddings)), embeddings)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(rows, n, hidden)` -> `(rows, n, vocab_size)` in fp32."""
        logits = self.lm_head(hidden_states).float()
        return write_slots(logits, hidden_states, self.config, self.embeddings, self.owned)

    def forbid(self, logits: torch.Tensor) -> torch.Tensor:
        """`(rows, n, vocab_size)` with forbidden tokens as the original has them, in place."""
        return self.allowed.forbid(logits, FORBIDDEN_LOGIT)


class _GrowingDecoding:
    """The steps of a search over a cache that grows; [`FastDecoding`] takes the same in fixed shapes.

    Args:
        cache: what the prompts left.
    """

    def __init__(
        self, model, vocabulary: RowVocabulary, places: _Places, segment_relations: torch.Tensor, cache: CpmBeeCache
    ):
        self.language_model = model.language_model()
        self.vocabulary = vocabulary
        self.places = places
        self.segment_relations = segment_relations
        self.cache = cache

    def step(
        self, tokens: torch.Tensor, parents: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor
    ) -> torch.Tensor:
        """Logits `(rows, beams, vocab_size)` of the newest places; the beams are the queries of one sequence."""
        places = self.places
        places.reorder(parents)
        places.append(positions, segments)
        embeddings = self.vocabulary.embed(tokens)
        bias = self.language_model.position_bias(
            positions,
            places.positions[:, : places.end],
            segments,
            places.segments[:, : places.end],
            self.segment_relations,
        )
        visible = places.visible[:, :, : places.end].to(bias.device)
        outputs = self.language_model(
            inputs_embeds=embeddings,
            position_bias=self.language_model.merge_bias(bias, visible, embeddings.dtype),
            cache=self.cache,
            use_cache=True,
        )
        return self.vocabulary.logits(outputs.last_hidden_state)


class ReferenceBeamSearch:
    """One search over a batch of prompts; rows are independent of each other."""

    def __init__(self, model, decoding: ReferenceDecodingConfig):
        self.model = model
        self.decoding = decoding
        self.config = model.config.get_text_config(decoder=True)

    @torch.no_grad()
    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        answer_segments: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
        decoder: FastDecoder | None = None,
    ) -> list[SlotAnswers]:
        """See `CpmBeeGenerationMixin.reference_search`; with a `decoder` its graphs take the steps."""
        decoding, config = self.decoding, self.config
        inputs = dict(inputs)
        num_rows, num_beams, num_steps = len(answer_segments), decoding.num_beams, decoding.last_step + 1
        vocabulary = RowVocabulary(self.model, inputs.get("extension_table"))
        attention_mask, device = inputs["attention_mask"], inputs["attention_mask"].device

        cache = CpmBeeCache()
        self.model.model(**inputs, cache=cache, use_cache=True)

        if decoder is not None:
            steps = decoder.begin(self.model, inputs, cache, num_beams)
        else:
            places = _Places(attention_mask, inputs["segment_ids"], num_beams, num_steps)
            steps = _GrowingDecoding(self.model, vocabulary, places, inputs["segment_relations"], cache)
        beams = [[_Beam() for _ in range(num_beams)] for _ in range(num_rows)]
        hypotheses = [_Hypotheses(num_beams, decoding.length_penalty) for _ in range(num_rows)]
        scores = torch.full((num_rows, num_beams), ABSENT_BEAM_SCORE, device=device)
        scores[:, 0] = 0.0
        tokens = torch.full((num_rows, num_beams), config.bos_token_id, device=device)
        segments = torch.tensor([[slots[0]] * num_beams for slots in answer_segments], device=device)
        positions = torch.zeros(num_rows, num_beams, dtype=torch.long, device=device)
        parents = torch.zeros(num_rows, num_beams, dtype=torch.long, device=device)
        history = torch.empty(num_rows, num_beams, num_steps, dtype=torch.long, device=device)

        for step in range(num_steps):
            history[:, :, step] = vocabulary.base_ids(tokens)
            logits = vocabulary.forbid(steps.step(tokens, parents, positions, segments).float()).to(device)
            if step < decoding.min_new_tokens:
                logits[..., config.eos_token_id] = FORBIDDEN_LOGIT
            best_scores, best_parents, best_tokens = self._best_candidates(logits, scores, history[:, :, : step + 1])

            continuations = [
                self._advance_row(step, answer_segments[row], beams[row], hypotheses[row], candidates)
                for row, candidates in enumerate(to_host(best_scores, best_parents, best_tokens))
            ]
            if progress is not None:
                progress(step + 1)
            if all(row.done for row in hypotheses):
                break
            beams = [[entry.beam for entry in row] for row in continuations]
            ranks, tokens, segments, starts_slot = torch.tensor(
                [
                    [[entry.rank, entry.token, slots[entry.beam.slot], entry.starts_slot] for entry in row]
                    for slots, row in zip(answer_segments, continuations, strict=True)
                ],
                device=device,
            ).unbind(-1)
            parents, scores = best_parents.gather(1, ranks), best_scores.gather(1, ranks)
            positions = (positions.gather(1, parents) + 1) * (1 - starts_slot)
            history = history.gather(1, parents[..., None].expand_as(history))

        return [self._best(row, slots) for row, slots in zip(hypotheses, answer_segments, strict=True)]

    # ------------------------------------------------------------------------------------------------ model and scores

    def _best_candidates(
        self, logits: torch.Tensor, scores: torch.Tensor, history: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores, parents and tokens of every row's `2 * num_beams` best continuations, best first."""
        decoding = self.decoding
        if decoding.repetition_penalty != 1.0:
            seen = logits.gather(-1, history)
            penalty = decoding.repetition_penalty
            logits.scatter_(-1, history, torch.where(seen < 0, seen * penalty, seen / penalty))
        logprobs = torch.log_softmax(logits.div_(decoding.temperature), dim=-1)
        # The best of a row are among the best of its beams. Several short searches take less time than a long one.
        num_best = 2 * decoding.num_beams
        beam_scores, beam_tokens = torch.topk(logprobs, min(num_best, logprobs.shape[-1]), dim=-1)
        best_scores, index = torch.topk((beam_scores + scores[..., None]).flatten(1), num_best, dim=-1)
        parents = index.div(beam_tokens.shape[-1], rounding_mode="floor")
        return best_scores, parents, beam_tokens.flatten(1).gather(1, index)

    # ---------------------------------------------------------------------------------------------------- bookkeeping

    def _advance_row(
        self,
        step: int,
        slots: Sequence[int],
        beams: list[_Beam],
        hypotheses: _Hypotheses,
        candidates: _Candidates,
    ) -> list[_Continuation]:
        """How the row's beams go on; finished ones go to `hypotheses`."""
        num_beams, config = self.decoding.num_beams, self.config
        idle = [_Continuation(0, config.pad_token_id, False, _Beam())] * num_beams
        hypotheses.done = hypotheses.done or hypotheses.is_finished(candidates.scores[0], step)
        if hypotheses.done:
            return idle
        chosen: list[_Continuation] = []
        ranked = zip(candidates.scores, candidates.parents, candidates.tokens, strict=True)
        for rank, (score, parent, token) in enumerate(ranked):
            beam = beams[parent]
            new_tokens, new_slots = [*beam.tokens, token], [*beam.slots, beam.slot]
            ends_slot = token == config.eos_token_id
            if step == self.decoding.last_step or (ends_slot and beam.slot == len(slots) - 1):
                hypotheses.add(new_tokens, new_slots, score)
            elif ends_slot:
                next_beam = _Beam(new_tokens, new_slots, beam.slot + 1)
                chosen.append(_Continuation(rank, config.bos_token_id, True, next_beam))
            else:
                chosen.append(_Continuation(rank, token, False, _Beam(new_tokens, new_slots, beam.slot)))
            if len(chosen) == num_beams:
                break
        if not chosen:  # the last step: every candidate became a hypothesis
            hypotheses.done = True
            return idle
        return chosen

    def _best(self, hypotheses: _Hypotheses, slots: Sequence[int]) -> SlotAnswers:
        score, tokens, token_slots = hypotheses.entries[0]
        reached = token_slots[-1]
        answers: list[list[int] | None] = [[] if slot <= reached else None for slot in range(len(slots))]
        for token, slot in zip(tokens, token_slots, strict=True):
            answers[slot].append(token)
        for answer in answers:
            if answer and answer[-1] == self.config.eos_token_id:
                answer.pop()
        return SlotAnswers(answers, score, len(tokens))


def to_host(scores: torch.Tensor, parents: torch.Tensor, tokens: torch.Tensor) -> list[_Candidates]:
    """Every row's candidates, in one transfer: the step's only synchronisation with the device."""
    packed = torch.stack([scores.view(torch.int32), parents.int(), tokens.int()]).cpu()
    rows = zip(packed[0].view(torch.float32).tolist(), packed[1].tolist(), packed[2].tolist(), strict=True)
    return [_Candidates(*row) for row in rows]


__all__ = ["ReferenceBeamSearch", "ReferenceDecodingConfig", "SlotAnswers"]
