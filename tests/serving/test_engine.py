"""The engine: whatever is answered together, everyone gets the answer they would get alone."""

import json
import threading
from dataclasses import replace

import PIL.Image
import pytest
import torch

from viscpm_hf import VisCPMChat
from viscpm_hf.modeling.beam_search_cpm_bee import ReferenceDecodingConfig
from viscpm_hf.serving.engine import ChatEngine, _Share
from viscpm_hf.serving.sampling import SamplingSettings
from viscpm_hf.serving.tickets import EngineBusyError, EngineClosedError, EngineLimits, Failed, Finished, TextPiece


QUESTIONS = ("图片里有什么？", "what is this?", "Describe 🙂 the picture, please.", "龘是什么颜色的？", "a<b>?")


@pytest.fixture
def engine(chat):
    engine = ChatEngine(chat)
    yield engine
    engine.close(drain=False)


def pictures(golden):
    return [PIL.Image.open(golden.image(index)) for index in (0, 1)] + [None]


def turns(golden):
    images = pictures(golden)
    return [(images[index % len(images)], question) for index, question in enumerate(QUESTIONS)]


class Recorder:
    """Gathers a request's events."""

    def __init__(self):
        self.text, self.events, self.over = "", [], threading.Event()

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, TextPiece):
            self.text += event.text
        else:
            self.over.set()


def long_answer(engine, prompt, num_tokens=12):
    """Settings under which the model, random as it is, has something to say, and the answer."""
    for seed in range(100):
        settings = SamplingSettings(max_new_tokens=40, temperature=3.0, seed=seed)
        answer = engine.answer(prompt, settings, timeout=60)[0]
        if answer.num_tokens >= num_tokens and len(answer.text) >= num_tokens:
            return settings, answer
    raise AssertionError("no seed gives a long answer")


def check_answers(engine, golden, expected):
    """All turns together, with 12 tokens each."""
    recorders = [Recorder() for _ in expected]
    for (image, text), recorder in zip(turns(golden), recorders, strict=True):
        engine.submit(engine.prepare.turn(image, text), SamplingSettings(max_new_tokens=12), recorder)
    for recorder, text in zip(recorders, expected, strict=True):
        assert recorder.over.wait(60)
        assert isinstance(recorder.events[-1], Finished)
        assert recorder.text == text


def test_answers_together_are_those_of_each_alone(golden, chat, engine):
    expected = [
        chat.ask(image, question, mode="generate", max_new_tokens=8 + 3 * index)
        for index, (image, question) in enumerate(turns(golden))
    ]
    recorders = [Recorder() for _ in expected]
    for index, ((image, question), recorder) in enumerate(zip(turns(golden), recorders, strict=True)):
        prompt = engine.prepare.turn(image, question)
        engine.submit(prompt, SamplingSettings(max_new_tokens=8 + 3 * index), recorder)
    for recorder, turn in zip(recorders, expected, strict=True):
        assert recorder.over.wait(60)
        assert recorder.text == turn.answer
        assert recorder.events[-1].num_tokens == turn.num_tokens


def test_a_request_that_comes_later_joins_those_that_run(golden, engine):
    image, question = turns(golden)[0]
    prompt = engine.prepare.turn(image, question)
    settings, alone = long_answer(engine, prompt)
    first, second = Recorder(), Recorder()

    def listen(event):
        if not first.events:  # from within the engine's thread: the other can only join what is running
            engine.submit(prompt, settings, second)
        first(event)

    before = (engine.statistics.steps, engine.statistics.rows_in_steps)
    engine.submit(prompt, settings, listen)
    assert second.over.wait(60)
    assert first.over.wait(60)
    assert first.text == second.text == alone.text
    steps, rows = engine.statistics.steps - before[0], engine.statistics.rows_in_steps - before[1]
    assert rows > steps  # some steps had both


def test_reference_answers_are_the_originals_and_others_go_on_meanwhile(golden, chat, engine):
    decoding = ReferenceDecodingConfig(max_new_tokens=24)
    expected = [chat.chat(image, question, max_new_tokens=24)[0] for image, question in turns(golden)]
    sampled = chat.ask(None, QUESTIONS[1], mode="generate", max_new_tokens=12).answer
    recorders = [Recorder() for _ in expected]
    for (image, question), recorder in zip(turns(golden), recorders, strict=True):
        engine.submit(engine.prepare.turn(image, question), decoding, recorder)
    answer = engine.answer(engine.prepare.turn(None, QUESTIONS[1]), SamplingSettings(max_new_tokens=12), timeout=60)
    assert answer[0].text == sampled
    for recorder, text in zip(recorders, expected, strict=True):
        assert recorder.over.wait(60)
        assert recorder.text == text


def test_a_seed_repeats_an_answer_whatever_is_beside_it(golden, engine):
    image, question = turns(golden)[0]
    prompt = engine.prepare.turn(image, question)
    settings = SamplingSettings(max_new_tokens=16, temperature=1.3, top_p=0.95, seed=7)
    alone = engine.answer(prompt, settings, timeout=60)[0].text
    others = [Recorder() for _ in range(4)]
    for recorder, (other_image, other) in zip(others, turns(golden)[1:], strict=True):
        other_prompt = engine.prepare.turn(other_image, other)
        engine.submit(other_prompt, SamplingSettings(max_new_tokens=16, temperature=1.0, seed=1), recorder)
    assert engine.answer(prompt, settings, timeout=60)[0].text == alone
    several = engine.answer(prompt, settings, num_choices=3, timeout=60)
    assert several[0].text == alone
    assert len({answer.text for answer in several}) == 3


def test_a_stop_string_ends_the_answer_and_is_not_in_it(golden, engine):
    prompt = engine.prepare.turn(*turns(golden)[0])
    settings, whole = long_answer(engine, prompt)
    stop = whole.text[6:9]
    cut = engine.answer(prompt, replace(settings, stop=(stop, "never there")), timeout=60)[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.reason == "stop"
    short = engine.answer(prompt, replace(settings, max_new_tokens=3), timeout=60)[0]
    assert (short.reason, short.num_tokens) == ("length", 3)
    assert whole.text.startswith(short.text)


def test_scores_are_the_models_own(golden, chat, engine):
    """Log-probabilities of each token, as `generate` has them, whatever is answered beside it."""
    messages = [{"role": "user", "content": "what is this?"}]
    inputs = chat.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    output = chat.model.generate(
        **inputs, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    expected = [torch.log_softmax(logits[0].float(), -1).topk(3) for logits in output.logits]
    ids = output.sequences[0, -len(expected) :].tolist()
    beside = Recorder()
    engine.submit(engine.prepare.turn(*turns(golden)[0]), SamplingSettings(max_new_tokens=20), beside)
    settings = SamplingSettings(max_new_tokens=8, top_logprobs=3, repetition_penalty=1.0)
    (answer,) = engine.answer(engine.prepare.messages(messages), settings, timeout=60)
    eos = chat.processor.tokenizer.eos_token_id
    assert len(answer.scores) == answer.num_tokens == sum(token != eos for token in ids)
    for score, best, token in zip(answer.scores, expected, ids, strict=False):
        assert score.token.decode() == chat.processor.tokenizer.decode([token])
        assert score.logprob == pytest.approx(best.values[0].item(), abs=1e-4)
        assert [logprob for _, logprob in score.best] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert "".join(score.token.decode() for score in answer.scores) == answer.text
    assert beside.over.wait(60)


def test_scores_come_with_their_text(golden, engine):
    prompt = engine.prepare.turn(*turns(golden)[0])
    settings, answer = long_answer(engine, prompt)
    recorder = Recorder()
    stop = answer.text[len(answer.text) // 2 :][:3]
    engine.submit(prompt, replace(settings, top_logprobs=0, stop=(stop, answer.text[-3:] + "never")), recorder)
    assert recorder.over.wait(60)
    told = ""
    for event in recorder.events[:-1]:
        told += b"".join(score.token for score in event.scores).decode()
        assert recorder.text.startswith(told) or told.startswith(recorder.text)
    assert told.startswith(recorder.text) and len(told) < len(recorder.text) + len(stop) + 10
    assert all(score.logprob <= 0 and not score.best for event in recorder.events[:-1] for score in event.scores)


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def test_answers_have_the_form_that_is_asked_for(golden):
    pytest.importorskip("llguidance")
    chat = VisCPMChat("viscpm-tiny", device="cpu")
    engine = ChatEngine(chat)
    constraint = engine.constraints.of_schema(SCHEMA)
    expected = chat.ask(None, "What is a circle?", mode="generate", max_new_tokens=12).answer
    recorders = [Recorder() for _ in range(6)]
    for seed, recorder in enumerate(recorders):  # beside each other, and beside an answer that is free
        form = constraint if seed else None
        temperature = 1.5 if seed else 0.0
        settings = SamplingSettings(
            max_new_tokens=60 if seed else 12, temperature=temperature, seed=seed, constraint=form
        )
        engine.submit(engine.prepare.turn(None, "What is a circle?"), settings, recorder)
    for recorder in recorders:
        assert recorder.over.wait(60)
        assert isinstance(recorder.events[-1], Finished), recorder.events[-1]
    assert recorders[0].text == expected
    for recorder in recorders[1:]:
        answer = json.loads(recorder.text)
        assert answer.keys() == {"colour", "count"} and answer["colour"] in ("red", "blue")
        assert 0 <= answer["count"] <= 99 and recorder.events[-1].reason == "stop"
    engine.close(drain=False)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "foo"}, "Invalid type"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "("}, "can't be used"),
        ({"enum": ["x" * 40_000]}, "more than the 32,768"),
    ],
)
def test_schemas_that_cannot_be_kept_are_refused(engine, schema, message):
    pytest.importorskip("llguidance")
    with pytest.raises(ValueError, match=message):
        engine.constraints.of_schema(schema)


def test_a_form_without_words_fails_its_own_request(golden, chat, engine):
    pytest.importorskip("llguidance")
    constraint = engine.constraints.of_schema({"const": "\U0001fae8"})
    prompt = engine.prepare.turn(None, "what is this?")
    beside = Recorder()
    engine.submit(prompt, SamplingSettings(max_new_tokens=12), beside)
    with pytest.raises(ValueError, match="can't go on in the form"):
        engine.answer(prompt, SamplingSettings(constraint=constraint), timeout=60)
    assert beside.over.wait(60)
    assert beside.text == chat.ask(None, "what is this?", mode="generate", max_new_tokens=12).answer


def test_a_conversation_of_messages_is_the_same_as_turns(golden, chat, engine):
    image = pictures(golden)[0]
    first, context, encoded = chat.chat(image, "什么颜色？", mode="generate", max_new_tokens=6)
    second = chat.ask(None, "a < b?", context, encoded, mode="generate", max_new_tokens=6).answer
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "什么颜色？"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "a < b?"},
    ]
    prompt = engine.prepare.messages(messages, [image])
    assert engine.answer(prompt, SamplingSettings(max_new_tokens=6), timeout=60)[0].text == second


def test_a_picture_is_encoded_once(golden, engine):
    prompt = engine.prepare.turn(pictures(golden)[0], "one?")
    engine.answer(prompt, SamplingSettings(max_new_tokens=2), timeout=60)
    engine.answer(prompt, ReferenceDecodingConfig(max_new_tokens=2), timeout=60)
    assert (engine.image_cache.hits, engine.image_cache.misses) == (1, 1)


def test_a_cancelled_request_says_nothing_more_and_harms_no_other(golden, chat, engine):
    image, question = turns(golden)[0]
    seen = threading.Event()
    gone = Recorder()

    def leave(event):
        gone(event)
        seen.set()

    ticket = engine.submit(engine.prepare.turn(image, question), SamplingSettings(max_new_tokens=512), leave)
    assert seen.wait(60)
    ticket.cancel()
    count = len(gone.events)
    other = engine.answer(engine.prepare.turn(None, "b?"), SamplingSettings(max_new_tokens=6), timeout=60)[0]
    assert other.text == chat.ask(None, "b?", mode="generate", max_new_tokens=6).answer
    assert len(gone.events) <= count + 1  # one may have been on its way
    assert engine.num_running == 0


def test_only_the_guilty_request_fails(golden, own_chat):
    """A model that fails on one token: whoever has it in their prompt or comes to write it fails, nobody else."""
    chat = own_chat
    image, question = turns(golden)[0]
    expected = [chat.ask(image, text, mode="generate", max_new_tokens=10).answer for text in ("a?", "c?")]
    embed = chat.model.get_input_embeddings()
    bad_prompt_ids = chat.processor.tokenizer.encode("什么")

    def fail_on_poison(module, arguments):
        ids = arguments[0]
        if any((ids == bad).any() for bad in bad_prompt_ids):
            raise RuntimeError("a cosmic ray")

    embed.register_forward_pre_hook(fail_on_poison)
    engine = ChatEngine(chat)
    try:
        recorders = [Recorder() for _ in range(3)]
        for text, recorder in zip(("a?", "什么?", "c?"), recorders, strict=True):
            engine.submit(engine.prepare.turn(image, text), SamplingSettings(max_new_tokens=10), recorder)
        for recorder in recorders:
            assert recorder.over.wait(60)
        assert isinstance(recorders[1].events[-1], Failed)
        assert "cosmic ray" in str(recorders[1].events[-1].error)
        assert [recorders[0].text, recorders[2].text] == expected
    finally:
        engine.close(drain=False)


def test_a_failed_step_is_made_again_by_each_row_alone(golden, own_chat):
    chat = own_chat
    expected = [chat.ask(image, text, mode="generate", max_new_tokens=12).answer for image, text in turns(golden)]
    engine = ChatEngine(chat)
    calls = []

    def fail_twice(module, arguments, kwargs):
        rows = kwargs["inputs_embeds"].shape[:2]
        if rows[1] == 1:  # a step, not a prompt
            calls.append(rows)
            if len(calls) in (3, 7):
                raise RuntimeError("out of luck")

    chat.model.language_model().register_forward_pre_hook(fail_twice, with_kwargs=True)
    try:
        check_answers(engine, golden, expected)
        assert len(calls) >= 7
    finally:
        engine.close(drain=False)


def test_a_full_queue_refuses_and_a_closed_engine_too(golden, chat):
    engine = ChatEngine(chat, EngineLimits(max_rows=1, max_waiting=2))
    prompt = engine.prepare.turn(None, "long?")
    settings, _ = long_answer(engine, prompt)
    recorders = [Recorder() for _ in range(8)]
    with pytest.raises(EngineBusyError, match="limit is 2") as caught:
        for recorder in recorders:
            engine.submit(prompt, settings, recorder)
    assert caught.value.retry_after >= 1
    engine.close(drain=False)
    ended = [recorder for recorder in recorders if recorder.over.is_set()]
    assert len(ended) >= 2
    assert isinstance(ended[-1].events[-1], Failed)
    with pytest.raises(EngineClosedError):
        engine.submit(prompt, settings, Recorder())


def test_what_nobody_waits_for_fills_no_queue(chat):
    engine = ChatEngine(chat, EngineLimits(max_rows=1, max_waiting=3))
    try:
        prompt = engine.prepare.turn(None, "long?")
        settings, _ = long_answer(engine, prompt)
        for _ in range(12):
            engine.submit(prompt, settings, Recorder()).cancel()
        last = Recorder()
        engine.submit(prompt, replace(settings, max_new_tokens=2), last)
        assert last.over.wait(60) and isinstance(last.events[-1], Finished)
    finally:
        engine.close(drain=False)


def test_both_kinds_of_decoding_share_the_limits(chat):
    limits = EngineLimits(max_rows=5, max_places=400)
    engine = ChatEngine(chat, limits)
    seen = []
    try:
        prompt = engine.prepare.turn(None, "hm?")
        settings = SamplingSettings(max_new_tokens=30, temperature=3.0)

        def watch(module, arguments, kwargs):  # called from the engine's thread
            batch, search = _Share.of_rows(engine._batch.rows), engine._searching
            seen.append((batch.rows + search.rows, batch.places + search.places, batch.rows and search.rows))

        handle = chat.model.language_model().register_forward_pre_hook(watch, with_kwargs=True)
        recorders = [Recorder() for _ in range(18)]
        for index, recorder in enumerate(recorders):
            decoding = replace(settings, seed=index) if index % 3 else ReferenceDecodingConfig(max_new_tokens=20)
            engine.submit(prompt, decoding, recorder)
        assert all(recorder.over.wait(60) for recorder in recorders)
        assert all(isinstance(recorder.events[-1], Finished) for recorder in recorders)
        handle.remove()
        assert max(rows for rows, _, _ in seen) <= limits.max_rows
        assert max(places for _, places, _ in seen) <= limits.max_places
        assert any(both for _, _, both in seen)
    finally:
        engine.close(drain=False)


def test_rows_that_can_not_be_kept_come_in_anew(golden, own_chat, monkeypatch):
    expected = [own_chat.ask(image, text, mode="generate", max_new_tokens=12).answer for image, text in turns(golden)]
    engine = ChatEngine(own_chat)
    keep, calls = engine._batch.keep, []

    def keep_sometimes(rows):
        calls.append(len(rows))
        if len(calls) in (2, 5):
            raise MemoryError
        keep(rows)

    monkeypatch.setattr(engine._batch, "keep", keep_sometimes)
    try:
        check_answers(engine, golden, expected)
        assert len(calls) >= 5
    finally:
        engine.close(drain=False)


def test_pictures_of_equal_numbers_in_different_palettes_are_different(engine):
    numbers = PIL.Image.new("P", (32, 32), 1)
    keys = set()
    for palette in ([0, 0, 0, 255, 0, 0], [0, 0, 0, 0, 0, 255]):
        picture = numbers.copy()
        picture.putpalette(palette)
        keys.add(engine.prepare.turn(picture, "what colour?").images[0].key)
    assert len(keys) == 2


def test_closing_answers_what_is_at_hand(golden, chat):
    engine = ChatEngine(chat)
    recorders = [Recorder() for _ in range(20)]
    for recorder in recorders:
        engine.submit(engine.prepare.turn(None, "hm?"), SamplingSettings(max_new_tokens=4), recorder)
    engine.submit(engine.prepare.turn(None, "hm?"), ReferenceDecodingConfig(max_new_tokens=4), recorders[0])
    assert engine.close(drain=True, timeout=60)
    assert all(isinstance(recorder.events[-1], Finished) for recorder in recorders)


def test_limits_and_settings_are_checked(golden, chat, engine):
    prompt = engine.prepare.turn(None, "hm?")
    with pytest.raises(ValueError, match="room for 16,384"):
        engine.submit(prompt, SamplingSettings(max_new_tokens=20_000), Recorder())
    with pytest.raises(ValueError, match="one answer"):
        engine.submit(prompt, ReferenceDecodingConfig(), Recorder(), num_choices=2)
    with pytest.raises(ValueError, match="tokens, more than the limit"):
        engine.prepare.turn(None, "图" * 4000)
    for wrong in (
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"repetition_penalty": 0},
        {"stop": ("",)},
        {"max_new_tokens": True},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SamplingSettings(**wrong)
    with pytest.raises(ValueError, match="max_rows"):
        EngineLimits(max_rows=0)
