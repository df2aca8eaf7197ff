"""The reference search against a slow one: the same rules in plain Python, the whole model run for every beam and
step, without cache, batch or mask of its own."""

from dataclasses import dataclass, replace

import pytest
import torch
from support import Golden

from viscpm_hf import CpmBeeConfig, CpmBeeForCausalLM, CpmBeeTokenizer, ReferenceDecodingConfig
from viscpm_hf.modeling.beam_search_cpm_bee import ReferenceBeamSearch


DOCUMENTS = (
    {"input": "红色的圆形 is", "<ans>": ""},
    {"input": "蓝 🙂 cat", "<ans>": {"a": "", "b": "", "c": ""}},
    {"document": "the ~ river ^", "question": {"x": "月", "y": "🙂"}, "<ans>": {"one": {"p": "", "q": ""}, "two": ""}},
    {"input": "今天🙂😀", "options": {"<option_0>": "红", "<option_1>": "蓝 square"}, "<ans>": {"a": "", "b": ""}},
)
DECODING = (
    ReferenceDecodingConfig(max_new_tokens=9),
    ReferenceDecodingConfig(num_beams=1, max_new_tokens=9),
    ReferenceDecodingConfig(
        num_beams=5, max_new_tokens=6, temperature=1.3, repetition_penalty=1.0, length_penalty=0.0
    ),
    ReferenceDecodingConfig(num_beams=2, max_new_tokens=7, repetition_penalty=1.7, length_penalty=-1.0),
)


SEEDS = (6, 4)  # the first one's answers use extension tokens, the second one's end early and fill several slots


def tiny_model(seed: int, vocab_size: int) -> CpmBeeForCausalLM:
    torch.manual_seed(seed)
    config = CpmBeeConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        head_dim=16, initializer_range=0.3,
    )  # fmt: skip
    model = CpmBeeForCausalLM(config).eval()
    # All embeddings lean one way, those of `</s>` and `<unk>` more than others, which makes them likely answers.
    with torch.no_grad():
        embeddings, lean = model.get_input_embeddings().weight, 0.3 * torch.randn(config.hidden_size)
        embeddings += lean
        embeddings[[config.eos_token_id, config.unk_token_id]] += 0.3 * lean
    return model


@pytest.fixture(scope="module")
def tokenizer() -> CpmBeeTokenizer:
    return CpmBeeTokenizer(str(Golden("chat_a").vocab))


@pytest.fixture(scope="module", params=SEEDS)
def tiny(request, tokenizer) -> CpmBeeForCausalLM:
    return tiny_model(request.param, tokenizer.num_words)


@dataclass(frozen=True)
class Beam:
    score: float
    fed: tuple[tuple[int, int], ...]
    """Every token that the model was given, with its slot."""
    tokens: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    slot: int = 0


def slow_logits(model, inputs, segments, beam) -> torch.Tensor:
    def extend(name, values):
        return torch.cat([inputs[name], torch.tensor([values], dtype=inputs[name].dtype)], dim=1)

    ones = [1] * len(beam.fed)
    outputs = model(
        input_ids=extend("input_ids", [token for token, _ in beam.fed]),
        attention_mask=extend("attention_mask", ones),
        token_type_ids=extend("token_type_ids", ones),
        segment_ids=extend("segment_ids", [segments[slot] for _, slot in beam.fed]),
        segment_relations=inputs["segment_relations"],
        extension_table=inputs["extension_table"],
        use_cache=False,
    )
    return outputs.logits[0, -1].float()


def slow_search(model, inputs, segments, decoding) -> tuple[list, float, int]:
    """Spec section 6, one row, one beam at a time."""
    config = model.config
    table, first = inputs["extension_table"][0].tolist(), config.num_words
    owns_unknown = any(entry[:2] == [config.unk_token_id, 0] for entry in table)
    slots = [entry[0] for entry in table if entry[1]]
    beams = [Beam(0.0, ((config.bos_token_id, 0),))]
    finished: list[tuple[float, Beam]] = []
    for step in range(decoding.last_step + 1):
        candidates = []
        for beam in beams:
            logits = slow_logits(model, inputs, segments, beam)
            if not owns_unknown:
                logits[config.unk_token_id] = -10_000
            logits = logits[: first + len(slots)]
            fed = {token for token, _ in beam.fed}
            for token in {slots[token - first] if token >= first else token for token in fed}:
                penalty = decoding.repetition_penalty
                logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
            logprobs = torch.log_softmax(logits / decoding.temperature, dim=-1).tolist()
            candidates += [(beam.score + logprob, beam, token) for token, logprob in enumerate(logprobs)]
        candidates.sort(key=lambda candidate: -candidate[0])
        candidates = candidates[: 2 * decoding.num_beams]
        if len(finished) == decoding.num_beams:
            if finished[-1][0] >= candidates[0][0] / step**decoding.length_penalty:
                break
        beams = []
        for score, beam, token in candidates:
            grown = replace(beam, score=score, tokens=(*beam.tokens, token), slots=(*beam.slots, beam.slot))
            ends = token == config.eos_token_id
            if step == decoding.last_step or (ends and beam.slot == len(segments) - 1):
                finished.append((score / len(grown.tokens) ** decoding.length_penalty, grown))
                finished = sorted(finished, key=lambda entry: -entry[0])[: decoding.num_beams]
            elif ends:
                fed = (*beam.fed, (config.bos_token_id, beam.slot + 1))
                beams.append(replace(grown, fed=fed, slot=beam.slot + 1))
            else:
                beams.append(replace(grown, fed=(*beam.fed, (token, beam.slot))))
            if len(beams) == decoding.num_beams:
                break
    score, best = finished[0]
    answers: list[list[int] | None] = [[] if slot <= best.slots[-1] else None for slot in range(len(segments))]
    for token, slot in zip(best.tokens, best.slots, strict=True):
        answers[slot].append(token)
    for answer in answers:
        if answer and answer[-1] == config.eos_token_id:
            answer.pop()
    return answers, score, len(best.tokens)


def prompts(tokenizer, documents):
    encoded = [tokenizer.encode_document(document) for document in documents]
    inputs = tokenizer.collate([document.prompt() for document in encoded], padding_side="left", return_tensors="pt")
    return dict(inputs), [[slot.segment_id for slot in document.answer_slots] for document in encoded]


@torch.no_grad()
@pytest.mark.parametrize("decoding", DECODING, ids=lambda decoding: f"{decoding.num_beams} beams")
@pytest.mark.parametrize("index", range(len(DOCUMENTS)))
def test_is_the_slow_search(tiny, tokenizer, index, decoding):
    inputs, segments = prompts(tokenizer, [DOCUMENTS[index]])
    answers, score, num_tokens = slow_search(tiny, inputs, segments[0], decoding)
    (result,) = tiny.reference_search(inputs, segments, decoding)
    assert result.token_ids == answers
    assert result.num_tokens == num_tokens
    assert result.score == pytest.approx(score, rel=1e-4)


def test_the_cases_are_worth_it(tokenizer):
    """Some answers reach a later slot, some use an extension token: otherwise the tests above say little."""
    slots, tokens = set(), set()
    for seed in SEEDS:
        model = tiny_model(seed, tokenizer.num_words)
        for document in DOCUMENTS:
            (result,) = model.reference_search(*prompts(tokenizer, [document]), DECODING[0])
            slots |= {slot for slot, ids in enumerate(result.token_ids) if ids}
            tokens |= {token for ids in result.token_ids for token in ids or ()}
    assert len(slots) > 1
    assert max(tokens) >= tokenizer.num_words


@pytest.mark.parametrize("decoding", DECODING, ids=lambda decoding: f"{decoding.num_beams} beams")
def test_rows_of_different_lengths_are_independent(tiny, tokenizer, decoding):
    together = tiny.reference_search(*prompts(tokenizer, DOCUMENTS), decoding)
    alone = [tiny.reference_search(*prompts(tokenizer, [document]), decoding)[0] for document in DOCUMENTS]
    for result, expected, document in zip(together, alone, DOCUMENTS, strict=True):
        assert result.token_ids == expected.token_ids, document
        assert result.score == pytest.approx(expected.score, rel=1e-4), document


def test_progress_counts_steps_and_the_model_reads_the_prompt_once(tiny, tokenizer):
    inputs, segments = prompts(tokenizer, DOCUMENTS[:2])
    shapes, steps = [], []
    hook = tiny.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs.get("inputs_embeds", kwargs.get("input_ids")).shape[:2]),
        with_kwargs=True,
    )
    try:
        tiny.reference_search(inputs, segments, ReferenceDecodingConfig(max_new_tokens=4), progress=steps.append)
    finally:
        hook.remove()
    assert steps == list(range(1, len(steps) + 1)) and 1 <= len(steps) <= 6
    assert shapes == [inputs["input_ids"].shape] + [(2, 3)] * len(steps)


def test_candidates_are_the_best_of_all_beams():
    """A search in every beam, then among their best, finds what one search over everything finds."""
    search = ReferenceBeamSearch.__new__(ReferenceBeamSearch)
    search.decoding = ReferenceDecodingConfig(num_beams=3, repetition_penalty=1.2)
    logits, scores = torch.randn(2, 3, 50), torch.randn(2, 3)
    history = torch.randint(50, (2, 3, 4))
    expected = logits.clone()
    for row in range(2):
        for beam in range(3):
            for token in set(history[row, beam].tolist()):
                expected[row, beam, token] *= 1.2 if expected[row, beam, token] < 0 else 1 / 1.2
    expected = ((expected / 0.7).log_softmax(-1) + scores[..., None]).flatten(1).topk(6)
    best_scores, parents, tokens = search._best_candidates(logits, scores, history)
    torch.testing.assert_close(best_scores, expected.values)
    assert torch.equal(parents * 50 + tokens, expected.indices)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 0), ("num_beams", 1.5), ("num_beams", True), ("max_new_tokens", 0), ("max_new_tokens", "9"),
        ("temperature", 0), ("temperature", -1.0), ("repetition_penalty", 0.0),
    ],
)  # fmt: skip
def test_bad_parameters(name, value):
    with pytest.raises(ValueError, match=name):
        ReferenceDecodingConfig(**{name: value})
