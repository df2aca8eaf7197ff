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

import torch

from .cache_cpm_bee import CpmBeeCache


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

    def __post_init__(self):
        for name in ("num_beams", "max_new_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")
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


class ReferenceBeamSearch:
    """One search over a batch of prompts; rows are independent of each other."""

    def __init__(self, model, decoding: ReferenceDecodingConfig):
        self.model = model
        self.language_model = model.language_model()
        self.decoding = decoding
        self.config = model.config.get_text_config(decoder=True)

    @torch.no_grad()
    def __call__(
        self,
        inputs: Mapping[str, torch.Tensor],
        answer_segments: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> list[SlotAnswers]:
        decoding, config = self.decoding, self.config
        inputs = dict(inputs)
        num_rows, num_beams, limit = len(answer_segments), decoding.num_beams, decoding.last_step
        extension_mask = inputs.pop("extension_mask", None)
        extension_table = inputs.get("extension_table")
        attention_mask = inputs["attention_mask"]
        prompt_length = attention_mask.shape[1]

        cache = CpmBeeCache()
        self.model.model(**inputs, past_key_values=cache, use_cache=True)

        device = attention_mask.device
        capacity = prompt_length + (limit + 1) * num_beams
        key_positions = torch.zeros(num_rows, capacity, dtype=torch.long, device=device)
        key_segments = torch.zeros(num_rows, capacity, dtype=torch.long, device=device)
        key_positions[:, :prompt_length] = torch.arange(prompt_length, device=device)
        key_segments[:, :prompt_length] = inputs["segment_ids"]
        # Own past of every beam: the prompt, then one place a step.
        visible = torch.zeros(num_rows, num_beams, capacity, dtype=torch.bool, device=device)
        visible[:, :, :prompt_length] = attention_mask.bool()[:, None]

        forbidden = self._forbidden_columns(extension_mask, extension_table)
        beams = [[_Beam() for _ in range(num_beams)] for _ in range(num_rows)]
        hypotheses = [_Hypotheses(num_beams, decoding.length_penalty) for _ in range(num_rows)]
        scores = torch.full((num_rows, num_beams), ABSENT_BEAM_SCORE, device=device)
        scores[:, 0] = 0.0
        tokens = torch.full((num_rows, num_beams), config.bos_token_id, device=device)
        segments = torch.tensor([[slots[0]] * num_beams for slots in answer_segments], device=device)
        positions = torch.zeros(num_rows, num_beams, dtype=torch.long, device=device)
        history = torch.empty(num_rows, num_beams, limit + 1, dtype=torch.long, device=device)

        for step in range(limit + 1):
            places = slice(prompt_length + step * num_beams, prompt_length + (step + 1) * num_beams)
            key_positions[:, places] = positions
            key_segments[:, places] = segments
            visible[:, :, places] = torch.eye(num_beams, dtype=torch.bool, device=device)
            history[:, :, step] = self._base_ids(tokens, extension_table)
            logits = self._logits(
                tokens,
                places,
                key_positions,
                key_segments,
                visible,
                inputs["segment_relations"],
                extension_table,
                cache,
            )
            values, indices = self._best_candidates(logits, scores, forbidden, history[:, :, : step + 1])
            num_columns = logits.shape[-1]
            candidate_values, candidate_indices = values.tolist(), indices.tolist()  # the step's one synchronisation

            parents, next_tokens, next_scores = [], [], []
            for row in range(num_rows):
                chosen = self._advance_row(
                    step, answer_segments[row], beams[row], hypotheses[row],
                    candidate_values[row], candidate_indices[row], num_columns,
                )  # fmt: skip
                beams[row] = [beam for _, _, _, beam in chosen]
                parents.append([parent for parent, _, _, _ in chosen])
                next_tokens.append([token for _, token, _, _ in chosen])
                next_scores.append([score for _, _, score, _ in chosen])
            if progress is not None:
                progress(step + 1)
            if all(row.done for row in hypotheses):
                break
            order = torch.tensor(parents, device=device)
            tokens = torch.tensor(next_tokens, device=device)
            scores = torch.tensor(next_scores, device=device)
            starts_slot = tokens == config.bos_token_id
            starts_slot &= torch.tensor([[beam.slots[-1:] != [beam.slot] for beam in row] for row in beams]).to(device)
            positions = torch.where(starts_slot, 0, positions.gather(1, order) + 1)
            segments = torch.tensor(
                [[slots[beam.slot] for beam in row] for slots, row in zip(answer_segments, beams, strict=True)],
                device=device,
            )
            visible = visible.gather(1, order[..., None].expand_as(visible))
            history = history.gather(1, order[..., None].expand_as(history))

        return [self._best(row, slots) for row, slots in zip(hypotheses, answer_segments, strict=True)]

    # ------------------------------------------------------------------------------------------------ model and scores

    def _logits(
        self, tokens, places, key_positions, key_segments, visible, segment_relations, extension_table, cache
    ) -> torch.Tensor:
        """Next-token logits `(rows, beams, columns)` in fp32; the beams are the queries of one sequence."""
        language_model = self.language_model
        embeddings = language_model.embed(tokens, extension_table)
        end = places.stop
        bias = language_model.position_bias(
            key_positions[:, places], key_positions[:, :end], key_segments[:, places], key_segments[:, :end],
            segment_relations,
        )  # fmt: skip
        bias = language_model.merge_bias(bias, visible[:, :, :end].to(bias.device), embeddings.dtype)
        outputs = language_model(inputs_embeds=embeddings, position_bias=bias, past_key_values=cache, use_cache=True)
        return self.model.project(outputs.last_hidden_state, extension_table).float().to(tokens.device)

    def _base_ids(self, tokens: torch.Tensor, extension_table: torch.Tensor | None) -> torch.Tensor:
        if extension_table is None or extension_table.shape[1] == 0:
            return tokens
        row = (tokens - self.config.vocab_size).clamp(min=0)
        return torch.where(tokens < self.config.vocab_size, tokens, extension_table[..., 0].gather(1, row))

    def _forbidden_columns(
        self, extension_mask: torch.Tensor | None, extension_table: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`(rows, 1 + E)`: plain `<unk>` and the extension tokens that are not of the row's own prompt."""
        return None if extension_mask is None else ~extension_mask.bool()

    def _best_candidates(
        self, logits: torch.Tensor, scores: torch.Tensor, forbidden: torch.Tensor | None, history: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The `2 * num_beams` best continuations of every row, best first, over `beams * columns`."""
        decoding, vocab_size = self.decoding, self.config.vocab_size
        if forbidden is not None:
            logits[..., self.config.unk_token_id].masked_fill_(forbidden[:, None, 0], FORBIDDEN_LOGIT)
            logits[..., vocab_size:].masked_fill_(forbidden[:, None, 1:], FORBIDDEN_LOGIT)
        if decoding.repetition_penalty != 1.0:
            seen = logits.gather(-1, history)
            penalty = decoding.repetition_penalty
            logits.scatter_(-1, history, torch.where(seen < 0, seen * penalty, seen / penalty))
        logprobs = torch.log_softmax(logits / decoding.temperature, dim=-1)
        return torch.topk((logprobs + scores[..., None]).flatten(1), 2 * decoding.num_beams, dim=-1)

    # ---------------------------------------------------------------------------------------------------- bookkeeping

    def _advance_row(
        self,
        step: int,
        slots: Sequence[int],
        beams: list[_Beam],
        hypotheses: _Hypotheses,
        values: list[float],
        indices: list[int],
        num_columns: int,
    ) -> list[tuple[int, int, float, _Beam]]:
        """The row's next beams as `(parent, token, score, beam)`; finished ones go to `hypotheses`."""
        num_beams, config = self.decoding.num_beams, self.config
        idle = [(0, config.pad_token_id, 0.0, _Beam(slot=0))] * num_beams
        hypotheses.done = hypotheses.done or hypotheses.is_finished(values[0], step)
        if hypotheses.done:
            return idle
        chosen: list[tuple[int, int, float, _Beam]] = []
        for value, index in zip(values, indices, strict=True):
            parent, token = divmod(index, num_columns)
            beam = beams[parent]
            new_tokens, new_slots = [*beam.tokens, token], [*beam.slots, beam.slot]
            ends_slot = token == config.eos_token_id
            if step == self.decoding.last_step or (ends_slot and beam.slot == len(slots) - 1):
                hypotheses.add(new_tokens, new_slots, value)
            elif ends_slot:
                next_beam = _Beam(new_tokens, new_slots, beam.slot + 1)
                chosen.append((parent, config.bos_token_id, value, next_beam))
            else:
                chosen.append((parent, token, value, _Beam(new_tokens, new_slots, beam.slot)))
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


__all__ = ["ReferenceBeamSearch", "ReferenceDecodingConfig", "SlotAnswers"]
