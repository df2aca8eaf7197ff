"""The engine: whatever is answered together, everyone gets the answer they would get alone."""

import base64
import importlib.util
import json
import threading
from dataclasses import replace
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from starlette.testclient import TestClient
from test_image_processing_minicpmv import picture

from viscpm_hf import VisCPMChat
from viscpm_hf.serving.app import create_app
from viscpm_hf.serving.engine import ChatEngine, _Share
from viscpm_hf.serving.preparing import PromptPreparer
from viscpm_hf.serving.sampling import SamplingSettings
from viscpm_hf.serving.tickets import EngineBusyError, EngineClosedError, EngineLimits, Failed, Finished, TextPiece


IMAGE, TALL = picture(90, 60), picture(40, 130, 1)
TURNS = [
    (IMAGE, "图片里有什么？"),
    (TALL, "what is this?"),
    (None, "Describe 🙂 the picture, please."),
    (IMAGE, "龘是什么颜色的？"),
    (TALL, "a<b </s> c?"),
]
# Where the original draws, what is to be compared doesn't.
SURE = {"do_sample": False, "num_beams": 2, "repetition_penalty": 1.2}
# Where it isn't the family that matters.
of_two_families = pytest.mark.parametrize("family", ["chat_a", "minicpmv-2.0"], indirect=True)


@pytest.fixture
def chat(family):
    return family.chat


@pytest.fixture
def engine(chat):
    engine = ChatEngine(chat)
    yield engine
    engine.close(drain=False)


def originals(family, **options):
    """Arguments of the original's decoding."""
    return options if family.is_viscpm else {**SURE, **options}


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


def expected_answers(chat):
    return [chat.ask(image, question, mode="generate", max_new_tokens=12).answer for image, question in TURNS]


def check_answers(engine, expected):
    """All turns together, with 12 tokens each."""
    recorders = [Recorder() for _ in expected]
    for (image, text), recorder in zip(TURNS, recorders, strict=True):
        engine.submit(engine.prepare.turn(image, text), SamplingSettings(max_new_tokens=12), recorder)
    for recorder, text in zip(recorders, expected, strict=True):
        assert recorder.over.wait(60)
        assert isinstance(recorder.events[-1], Finished)
        assert recorder.text == text


def test_answers_together_are_those_of_each_alone(chat):
    engine = ChatEngine(chat, EngineLimits(max_rows=3))  # some leave and others join
    turns = [*TURNS, *TURNS[:3]]
    recorders = [Recorder() for _ in turns]
    for length, ((image, question), recorder) in enumerate(zip(turns, recorders, strict=True), start=6):
        settings = SamplingSettings(max_new_tokens=length)
        engine.submit(engine.prepare.turn(image, question), settings, recorder)
    for length, ((image, question), recorder) in enumerate(zip(turns, recorders, strict=True), start=6):
        assert recorder.over.wait(60)
        expected = chat.ask(image, question, mode="generate", max_new_tokens=length)
        assert (recorder.text, recorder.events[-1].num_tokens) == (expected.answer, expected.num_tokens)
        assert all(event.text for event in recorder.events[:-1])
    assert engine.image_cache.hits >= 1 and not engine.num_running
    engine.close()


@of_two_families
def test_a_request_that_comes_later_joins_those_that_run(engine):
    prompt = engine.prepare.turn(*TURNS[0])
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


def test_reference_answers_are_the_originals_and_others_go_on_meanwhile(family, chat, engine):
    options = originals(family, max_new_tokens=16)
    decoding = engine.reference(**options)
    expected = [chat.ask(image, question, **options).answer for image, question in TURNS]
    greedy = chat.ask(None, "what is this?", mode="generate", max_new_tokens=12).answer
    recorders = [Recorder() for _ in expected]
    for (image, question), recorder in zip(TURNS, recorders, strict=True):
        engine.submit(engine.prepare.turn(image, question), decoding, recorder)
    answer = engine.answer(engine.prepare.turn(None, "what is this?"), SamplingSettings(max_new_tokens=12), timeout=60)
    assert answer[0].text == greedy
    for recorder, text in zip(recorders, expected, strict=True):
        assert recorder.over.wait(60)
        assert recorder.text == text
    with pytest.raises(ValueError, match="max_new_tokens|beam_size"):
        engine.answer(engine.prepare.turn(None, "hm?"), engine.reference(max_new_tokens=0), timeout=60)


def test_golden_answers_of_the_original(golden):
    """The conversations of the reference implementation, turn by turn."""
    chat = golden.load_chat()
    engine = ChatEngine(chat)
    for case in golden.expected["answers"]:
        given = case["generate"]
        decoding = engine.reference(
            max_new_tokens=given["max_length"],
            num_beams=given["beam_size"],
            **{name: given[name] for name in ("temperature", "repetition_penalty", "length_penalty")},
        )
        for turn in case["turns"]:
            image = PIL.Image.open(golden.image(case["image"]))
            prompt = engine.prepare.turn(image, turn["question"], turn["context"])
            (answer,) = engine.answer(prompt, decoding, timeout=60)
            assert answer.text == chat.processor.tokenizer.unescape(turn["answer"])
    engine.close()


def test_a_seed_repeats_an_answer_whatever_is_beside_it(engine):
    prompt = engine.prepare.turn(*TURNS[0])
    settings = SamplingSettings(max_new_tokens=16, temperature=1.3, top_p=0.95, seed=7)
    alone = engine.answer(prompt, settings, timeout=60)[0].text
    others = [Recorder() for _ in range(4)]
    for recorder, turn in zip(others, TURNS[1:], strict=True):
        engine.submit(
            engine.prepare.turn(*turn), SamplingSettings(max_new_tokens=16, temperature=1.0, seed=1), recorder
        )
    assert engine.answer(prompt, settings, timeout=60)[0].text == alone
    several = engine.answer(prompt, settings, num_choices=3, timeout=60)
    assert several[0].text == alone
    assert len({answer.text for answer in several}) == 3


def test_a_stop_string_ends_the_answer_and_is_not_in_it(engine):
    prompt = engine.prepare.turn(*TURNS[0])
    settings, whole = long_answer(engine, prompt)
    stop = whole.text[6:9]
    cut = engine.answer(prompt, replace(settings, stop=(stop, "never there")), timeout=60)[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.reason == "stop"
    short = engine.answer(prompt, replace(settings, max_new_tokens=3), timeout=60)[0]
    assert (short.reason, short.num_tokens) == ("length", 3)
    assert whole.text.startswith(short.text)


@pytest.mark.parametrize("family", ["omnilmm", "visualcla"], indirect=True)
def test_a_penalty_is_over_the_answer_alone(chat, engine):
    expected = chat.ask(IMAGE, "What?", mode="generate", max_new_tokens=10, repetition_penalty=1.3).answer
    settings = SamplingSettings(max_new_tokens=10, repetition_penalty=1.3)
    assert engine.answer(engine.prepare.turn(IMAGE, "What?"), settings, timeout=60)[0].text == expected


def test_scores_are_the_models_own(chat, engine):
    """Log-probabilities of each token, as `generate` has them, whatever is answered beside it."""
    processor = chat.processor
    prompt = engine.prepare.messages([{"role": "user", "content": "what is this?"}])
    output = chat.model.generate(
        **processor.pad_prompts([prompt.prompt], [None], chat.model),
        max_new_tokens=8,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=processor.tokenizer.eos_token_id,
    )
    expected = [torch.log_softmax(logits[0].float(), -1).topk(3) for logits in output.logits]
    ids = output.sequences[0, -len(expected) :].tolist()
    beside = Recorder()
    engine.submit(engine.prepare.turn(*TURNS[0]), SamplingSettings(max_new_tokens=20), beside)
    (answer,) = engine.answer(prompt, SamplingSettings(max_new_tokens=8, top_logprobs=3), timeout=60)
    assert len(answer.scores) == answer.num_tokens == sum(token != processor.tokenizer.eos_token_id for token in ids)
    for score, best, token in zip(answer.scores, expected, ids, strict=False):
        assert score.token == score.best[0][0] == processor.token_bytes(token, prompt.prompt)
        assert score.logprob == pytest.approx(best.values[0].item(), abs=1e-4)
        assert [logprob for _, logprob in score.best] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert beside.over.wait(60)


@pytest.mark.parametrize("family", ["chat_a"], indirect=True)
def test_scores_come_with_their_text(engine):
    prompt = engine.prepare.turn(*TURNS[0])
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


def test_a_form_is_kept_beside_answers_that_are_free(chat, engine):
    free = chat.ask(None, "What?", mode="generate", max_new_tokens=12).answer
    if importlib.util.find_spec("llguidance") is None:
        with pytest.raises(ValueError, match="needs llguidance, which is not installed"):
            engine.constraints.of_schema({})
        return
    words = [word.decode() for word in chat.processor.vocabulary_bytes() if word.isalpha() and word.isascii()][:2]
    form = engine.constraints.of_schema({"enum": [f"{word} {word}" for word in words]})
    recorders = [Recorder() for _ in range(5)]
    for seed, recorder in enumerate(recorders):
        kept = {"temperature": 2.0, "seed": seed, "constraint": form} if seed else {}
        engine.submit(engine.prepare.turn(None, "What?"), SamplingSettings(max_new_tokens=12, **kept), recorder)
    for recorder in recorders:
        assert recorder.over.wait(60)
    assert recorders[0].text == free
    for recorder in recorders[1:]:
        assert json.loads(recorder.text) in [f"{word} {word}" for word in words]
        assert recorder.events[-1].reason == "stop"


SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "blue"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}


def test_answers_have_the_form_that_is_asked_for():
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


@pytest.mark.parametrize("family", ["chat_a"], indirect=True)
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


@pytest.mark.parametrize("family", ["chat_a"], indirect=True)
def test_a_form_without_words_fails_its_own_request(chat, engine):
    pytest.importorskip("llguidance")
    constraint = engine.constraints.of_schema({"const": "\U0001fae8"})
    prompt = engine.prepare.turn(None, "what is this?")
    beside = Recorder()
    engine.submit(prompt, SamplingSettings(max_new_tokens=12), beside)
    with pytest.raises(ValueError, match="can't go on in the form"):
        engine.answer(prompt, SamplingSettings(constraint=constraint), timeout=60)
    assert beside.over.wait(60)
    assert beside.text == chat.ask(None, "what is this?", mode="generate", max_new_tokens=12).answer


def test_a_conversation_of_messages_is_the_same_as_turns(chat, engine):
    first, context, encoded = chat.chat(IMAGE, "什么颜色？", mode="generate", max_new_tokens=6)
    second = chat.ask(None, "a < b?", context, encoded, mode="generate", max_new_tokens=6).answer
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "什么颜色？"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "a < b?"},
    ]
    prompt = engine.prepare.messages(messages, [IMAGE])
    assert engine.answer(prompt, SamplingSettings(max_new_tokens=6), timeout=60)[0].text == second


@of_two_families
def test_a_picture_is_encoded_once(family, engine):
    prompt = engine.prepare.turn(IMAGE, "one?")
    engine.answer(prompt, SamplingSettings(max_new_tokens=2), timeout=60)
    engine.answer(prompt, engine.reference(**originals(family, max_new_tokens=2)), timeout=60)
    assert (engine.image_cache.hits, engine.image_cache.misses) == (1, 1)


@of_two_families
def test_a_cancelled_request_says_nothing_more_and_harms_no_other(chat, engine):
    seen = threading.Event()
    gone = Recorder()

    def leave(event):
        gone(event)
        seen.set()

    prompt = engine.prepare.turn(*TURNS[0])
    settings, _ = long_answer(engine, prompt)
    ticket = engine.submit(prompt, replace(settings, max_new_tokens=512), leave)
    assert seen.wait(60)
    ticket.cancel()
    count = len(gone.events)
    other = engine.answer(engine.prepare.turn(None, "b?"), SamplingSettings(max_new_tokens=6), timeout=60)[0]
    assert other.text == chat.ask(None, "b?", mode="generate", max_new_tokens=6).answer
    assert len(gone.events) <= count + 1  # one may have been on its way
    assert engine.num_running == 0


@of_two_families
def test_only_the_guilty_request_fails(own_family_chat):
    """A model that fails on one token: whoever has it in their prompt or comes to write it fails, nobody else."""
    chat = own_family_chat
    expected = [chat.ask(IMAGE, text, mode="generate", max_new_tokens=10).answer for text in ("a?", "c?")]
    engine = ChatEngine(chat)
    prompts = [engine.prepare.turn(IMAGE, text) for text in ("a?", "什么颜色 9876543?", "c?")]
    ids = [set(chat.processor.pad_prompts([prompt.prompt])["input_ids"].flatten().tolist()) for prompt in prompts]
    answers = chat.model.answers(
        chat.processor.pad_prompts(
            [prompts[0].prompt, prompts[2].prompt], engine._encode_images(prompts[::2]), chat.model
        ),
        chat.model.chat_decoding("generate", {"max_new_tokens": 10}),
        chat.processor.tokenizer,
    )
    poison = ids[1].difference(ids[0], ids[2], *(answer.ids for answer in answers))
    assert poison

    def fail_on_poison(module, arguments):
        if poison & set(arguments[0].flatten().tolist()):
            raise RuntimeError("a cosmic ray")

    chat.model.get_input_embeddings().register_forward_pre_hook(fail_on_poison)
    try:
        recorders = [Recorder() for _ in range(3)]
        for prompt, recorder in zip(prompts, recorders, strict=True):
            engine.submit(prompt, SamplingSettings(max_new_tokens=10), recorder)
        for recorder in recorders:
            assert recorder.over.wait(60)
        assert isinstance(recorders[1].events[-1], Failed)
        assert "cosmic ray" in str(recorders[1].events[-1].error)
        assert [recorders[0].text, recorders[2].text] == expected
    finally:
        engine.close(drain=False)


@of_two_families
def test_a_failed_step_is_made_again_by_each_row_alone(chat, monkeypatch):
    expected = expected_answers(chat)
    engine = ChatEngine(chat)
    step_rows, calls = chat.model.step_rows, []

    def fail_twice(state, tokens):
        calls.append(len(tokens))
        if len(calls) in (3, 7):
            raise RuntimeError("out of luck")
        return step_rows(state, tokens)

    monkeypatch.setattr(chat.model, "step_rows", fail_twice)
    try:
        check_answers(engine, expected)
        assert len(calls) >= 7
    finally:
        engine.close(drain=False)


@of_two_families
def test_a_full_queue_refuses_and_a_closed_engine_too(chat):
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


@of_two_families
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


@of_two_families
def test_both_kinds_of_decoding_share_the_limits(family, chat):
    limits = EngineLimits(max_rows=5, max_places=600)
    engine = ChatEngine(chat, limits)
    seen = []
    try:
        prompt = engine.prepare.turn(None, "hm?")
        settings = SamplingSettings(max_new_tokens=30, temperature=3.0)

        def watch(module, arguments):  # called from the engine's thread
            batch, search = _Share.of_rows(engine._batch.rows), engine._searching
            seen.append((batch.rows + search.rows, batch.places + search.places, batch.rows and search.rows))

        handle = chat.model.get_input_embeddings().register_forward_pre_hook(watch)
        recorders = [Recorder() for _ in range(18)]
        for index, recorder in enumerate(recorders):
            decoding = (
                replace(settings, seed=index)
                if index % 3
                else engine.reference(**originals(family, max_new_tokens=20))
            )
            engine.submit(prompt, decoding, recorder)
        assert all(recorder.over.wait(60) for recorder in recorders)
        assert all(isinstance(recorder.events[-1], Finished) for recorder in recorders)
        handle.remove()
        assert max(rows for rows, _, _ in seen) <= limits.max_rows
        assert max(places for _, places, _ in seen) <= limits.max_places
        assert any(both for _, _, both in seen)
    finally:
        engine.close(drain=False)


@of_two_families
def test_rows_that_can_not_be_kept_come_in_anew(chat, monkeypatch):
    expected = expected_answers(chat)
    engine = ChatEngine(chat)
    keep, calls = engine._batch.keep, []

    def keep_sometimes(rows):
        calls.append(len(rows))
        if len(calls) in (2, 5):
            raise MemoryError
        keep(rows)

    monkeypatch.setattr(engine._batch, "keep", keep_sometimes)
    try:
        check_answers(engine, expected)
        assert len(calls) >= 5
    finally:
        engine.close(drain=False)


@of_two_families
def test_pictures_of_equal_numbers_in_different_palettes_are_different(engine):
    numbers = PIL.Image.new("P", (32, 32), 1)
    keys = set()
    for palette in ([0, 0, 0, 255, 0, 0], [0, 0, 0, 0, 0, 255]):
        picture = numbers.copy()
        picture.putpalette(palette)
        keys.add(engine.prepare.turn(picture, "what colour?").images[0].key)
    assert len(keys) == 2


@of_two_families
def test_closing_answers_what_is_at_hand(family, chat):
    engine = ChatEngine(chat)
    recorders = [Recorder() for _ in range(20)]
    for recorder in recorders:
        engine.submit(engine.prepare.turn(None, "hm?"), SamplingSettings(max_new_tokens=4), recorder)
    decoding = engine.reference(**originals(family, max_new_tokens=4))
    engine.submit(engine.prepare.turn(None, "hm?"), decoding, recorders[0])
    assert engine.close(drain=True, timeout=60)
    assert all(isinstance(recorder.events[-1], Finished) for recorder in recorders)


def test_bad_prompts_are_told_before_they_are_queued(engine):
    def unopened():
        raise AssertionError("opened in vain")

    with pytest.raises(ValueError, match="take turns|to answer"):
        engine.prepare.messages([{"role": "assistant", "content": "a"}])
    with pytest.raises(ValueError, match="have 0 images, but 1 were given"):
        engine.prepare.messages([{"role": "user", "content": "a"}], [unopened])
    with pytest.raises(ValueError, match="tokens, more than the limit"):
        engine.prepare.messages(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "图 " * 4000}]}], [unopened]
        )
    with pytest.raises(ValueError, match="at least 2 pixels"):
        engine.prepare.turn(picture(1, 40), "What?")


def test_the_http_interface(chat):
    file = BytesIO()
    IMAGE.save(file, "PNG")
    part = {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }
    content = [part, {"type": "text", "text": "What?"}]
    body = {"model": "any", "messages": [{"role": "user", "content": content}], "max_tokens": 10}
    turn = chat.ask(IMAGE, "What?", mode="generate", max_new_tokens=10)
    with TestClient(create_app(ChatEngine(chat), chat_name="any")) as client:
        found = client.post("/v1/chat/completions", json=body).json()
        assert found["choices"][0]["message"]["content"] == turn.answer
        assert found["usage"]["completion_tokens"] == turn.num_tokens
        streamed = client.post("/v1/chat/completions", json={**body, "stream": True}).text
        chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == turn.answer
        wrong = {**body, "messages": [{"role": "tool", "content": "a"}]}
        assert client.post("/v1/chat/completions", json=wrong).status_code == 400


def test_the_checker_sees_what_the_model_does(chat, monkeypatch):
    """A 16-bit picture is no white one for it."""
    seen = []
    monkeypatch.setattr(chat, "image_safety_checker", lambda image: seen.append(image.convert("L").getextrema()))
    wide = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32
    PromptPreparer(chat).turn(PIL.Image.fromarray(wide), "What is it?")
    assert seen == [(0, int(wide.max()) >> 8)]


@pytest.mark.parametrize("family", ["chat_a"], indirect=True)
def test_limits_and_settings_are_checked(family, engine):
    prompt = engine.prepare.turn(None, "hm?")
    with pytest.raises(ValueError, match="room for 16,384"):
        engine.submit(prompt, SamplingSettings(max_new_tokens=20_000), Recorder())
    with pytest.raises(ValueError, match="one answer"):
        engine.submit(prompt, engine.reference(), Recorder(), num_choices=2)
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
