"""The demo page's handlers, called as gradio calls them; the page itself is in `test_demo_browser.py`."""

import asyncio
import json
import runpy
import socket
import string
import sys
from pathlib import Path

import gradio as gr
import PIL.Image
import pytest
from gradio.route_utils import Request
from paint_support import components, prompt_checker, ranker, safety_checker
from support import Golden

from viscpm_hf import VisCPMPaint, VisCPMPaintPipeline
from viscpm_hf.cli import main
from viscpm_hf.paint import read_record
from viscpm_hf.serving.demo import browser_language, create_demo, start
from viscpm_hf.serving.demo_chat import ChatPage, show_settings
from viscpm_hf.serving.demo_labels import ERROR_TEXTS, Labels, report, said, status
from viscpm_hf.serving.demo_paint import PaintPage, painting_status, shown
from viscpm_hf.serving.demo_texts import LANGUAGES, TEXTS, preferred_language, say
from viscpm_hf.serving.demo_visit import Visit
from viscpm_hf.serving.engine import ChatEngine
from viscpm_hf.serving.paint_engine import PaintEngine
from viscpm_hf.serving.tickets import EngineBusyError


GOLDEN = Golden("chat_a")
PICTURE = str(GOLDEN.image(0))


@pytest.fixture(scope="module")
def chat():
    return GOLDEN.load_chat()


@pytest.fixture(scope="module")
def engine(chat):
    engine = ChatEngine(chat)
    yield engine
    engine.close(drain=False)


def built(page, labels=None):
    with gr.Blocks(analytics_enabled=False):
        language = gr.Radio(choices=["zh", "en"])
        page.build(labels or Labels("en"), *([language] if isinstance(page, PaintPage) else []))
    return page


@pytest.fixture(scope="module")
def page(engine):
    return built(ChatPage(engine, "viscpm-tiny"))


def arguments(
    page, turns=(), picture=PICTURE, question="what is this?", mode="sampling", tokens=12, temperature=0.0,
    again=False, sample=None,
):  # fmt: skip
    event = gr.EventData(page.retry if again else None, None)
    if sample is not None:
        event = gr.EventData(gr.Chatbot(), {"value": {"text": sample}})
    return list(turns), picture, question, mode, tokens, temperature, 1.0, event


async def updates(page, *args, **kwargs):
    return [update async for update in page.answer(*arguments(page, *args, **kwargs))]


def ask(page, *args, **kwargs):
    return asyncio.run(updates(page, *args, **kwargs))


def painter(folder, **parts):
    VisCPMPaintPipeline(**components(), **parts).save_pretrained(folder)
    has = {"image_safety_checker": "safety_checker", "prompt_safety_checker": "prompt_checker", "add_ranker": "ranker"}
    return VisCPMPaint(folder, **{name: part in parts for name, part in has.items()}, device="cpu", candidates=1)


@pytest.fixture
def easel(tmp_path):
    """Makes a page of a painter with the given parts."""
    engines = []

    def make(**parts):
        engines.append(PaintEngine(painter(tmp_path / str(len(engines)), **parts)))
        return built(PaintPage(engines[-1], "some-model"))

    yield make
    for engine in engines:
        engine.close(drain=False)


def paint(
    page,
    prompt="一只猫",
    negative="",
    steps=2,
    size=16,
    number=1,
    is_random=False,
    seed=3,
    language="en",
    preset="preset_reference",
):
    async def updates():
        drawing = page.paint(prompt, negative, steps, 5.0, size, number, is_random, seed, language, preset)
        return [update async for update in drawing]

    *before, (painted, gallery, downloads, told, stop) = asyncio.run(updates())
    if downloads == gr.skip():
        return None, None, told
    assert before[0][4]["interactive"] and not stop["interactive"]
    assert gallery == shown(painted, language)
    assert gallery["visible"] == downloads["visible"] == bool(painted)
    return gallery["value"], downloads["value"], told


# ---------------------------------------------------------------------------------------------------------------- chat


def test_the_answer_grows_into_the_models_and_goes_on(page, chat):
    first = chat.ask(PICTURE, "图片里有什么？", mode="generate", max_new_tokens=12)
    seen = ask(page, question="图片里有什么？")
    turns, conversation, box, status, _ = seen[-1]
    assert turns == [("图片里有什么？", first.answer)]
    assert [message["role"] for message in conversation] == ["user", "assistant"]
    assert f"{first.num_tokens} tokens in" in status and "per second" in status
    assert seen[0][2] == ""  # the question's box is free for the next one at once
    texts = [update[0][-1][1] for update in seen]
    assert all(later.startswith(earlier) for earlier, later in zip(texts, texts[1:], strict=False))

    second = chat.ask(None, "还有呢？", first.context, first.vision_hidden_states, mode="generate", max_new_tokens=12)
    assert ask(page, turns, question="还有呢？")[-1][0] == [*turns, ("还有呢？", second.answer)]


def test_the_originals_decoding(page, chat):
    expected, _, _ = chat.chat(PICTURE, "what is this?", max_new_tokens=20)
    assert ask(page, mode="reference", tokens=20)[-1][0] == [("what is this?", expected)]


def test_retry_asks_the_last_question_again(page):
    turns = [("first?", "a"), ("second?", "b")]
    seen = ask(page, turns, question="half of the next quest", again=True)
    assert [question for question, _ in seen[-1][0]] == ["first?", "second?"]
    assert seen[-1][0] == ask(page, turns[:1], question="second?")[-1][0]
    assert all(update[2] == gr.skip() for update in seen)  # what is being typed stays
    assert "no question to answer again" in ask(page, again=True)[-1][3]


def test_without_a_picture_the_page_says_so_and_answers(page, chat):
    expected = chat.ask(None, "hello?", mode="generate", max_new_tokens=12).answer
    seen = ask(page, picture=None, question="hello?")
    assert seen[-1][0] == [("hello?", expected)]
    assert all(said("no_picture") in seen[index][3] for index in (0, -1))


def test_a_sample_question_is_asked_of_a_picture_and_else_waits_in_the_box(page):
    asked = ask(page, sample="what is this?", question="half of the next quest")
    assert asked[-1][0] == ask(page, question="what is this?")[-1][0]
    assert all(update[2] == gr.skip() for update in asked)
    ((turns, _, box, status, _),) = ask(page, sample="what is this?", picture=None, question="")
    assert (turns, box) == ([], "what is this?") and said("first_a_picture") in status


def test_stop_can_be_pressed_only_while_there_is_something_to_stop(page):
    assert [update[4].get("interactive") for update in ask(page)][:: len(ask(page)) - 1] == [True, False]
    assert not asyncio.run(page.begin("cleared", Visit(), []))[4]["interactive"]
    assert ask(page, question=" ")[-1][4] == gr.skip()
    Visit().stop()


def test_a_bad_picture_is_told_of_when_it_comes(page, tmp_path):
    (tmp_path / "not.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="can't be read as JPEG"):
        told = asyncio.run(page.look(str(tmp_path / "not.png"), "as it was"))
    assert "can't be read as JPEG" in told and "status-error" in told and "这张图片无法使用" in told
    assert [asyncio.run(page.look(picture, "as it was")) for picture in (PICTURE, None)] == ["as it was"] * 2


def test_settings_without_effect_are_not_shown():
    shown = {(mode, heat): show_settings(mode, heat) for mode in ("sampling", "reference") for heat in (0, 0.7)}
    assert {key: [update["visible"] for update in updates] for key, updates in shown.items()} == {
        ("sampling", 0): [True, False], ("sampling", 0.7): [True, True],
        ("reference", 0): [False, False], ("reference", 0.7): [False, False],
    }  # fmt: skip


def test_visitors_are_answered_together_and_each_their_own(page, engine):
    questions = ["what is this?", "图片里有什么？", "why?"]
    alone = [ask(page, question=question, tokens=40)[-1][0] for question in questions]
    steps, rows = engine.statistics.steps, engine.statistics.rows_in_steps

    async def together():
        return await asyncio.gather(*(updates(page, question=question, tokens=40) for question in questions * 6))

    assert [seen[-1][0] for seen in asyncio.run(together())] == alone * 6
    assert engine.statistics.rows_in_steps - rows > engine.statistics.steps - steps


def test_stop_ends_the_engines_work_keeps_what_was_said_and_has_the_last_word(page, engine):
    visit = Visit()

    async def stop_early():
        seen = []
        async for update in page.answer_until_stopped(visit, 0, *arguments(page, tokens=1000)):
            seen.append(update)
            if update[0][-1][1]:
                visit.stop()
        return seen

    *_, before, (turns, conversation, box, told, stop) = asyncio.run(stop_early())
    assert turns == before[0] and turns[-1][1] and conversation == before[1] and box == gr.skip()
    assert said("stopped") in told and not stop["interactive"]
    before = engine.statistics.answer_tokens
    ask(page, tokens=12)  # whoever comes next is alone
    assert engine.statistics.answer_tokens - before <= 13


def test_another_picture_begins_anew_and_only_then_is_it_said(page):
    visit = Visit()
    number, turns, conversation, told, _ = asyncio.run(page.begin("new_conversation", visit, [("a?", "b")]))
    assert number == visit.conversation == 1
    assert turns == conversation == [] and said("new_conversation") in told
    assert asyncio.run(page.begin("new_conversation", visit, []))[3] == status("")
    assert page.choose(gr.SelectData(None, {"index": 2, "value": None})) is page.samples[2]


def test_what_is_cleared_stays_so_whatever_was_being_answered(page):
    visit, given = Visit(), arguments(page, [("first?", "a")], tokens=1000, again=True)
    told = []

    async def answer():
        async for update in page.answer_until_stopped(visit, 0, *given):
            told.append(update)

    async def clear_while_answering():
        answering = asyncio.ensure_future(answer())
        while len(told) < 2:
            await asyncio.sleep(0)
        await page.begin("cleared", visit, told[-1][0])
        told.append("cleared")
        await answering

    async def of_conversation(number):
        return [update async for update in page.answer_until_stopped(visit, number, *arguments(page))]

    asyncio.run(clear_while_answering())
    assert told.index("cleared") == len(told) - 1
    assert asyncio.run(of_conversation(0)) == []  # clicked before, begun after
    assert asyncio.run(of_conversation(1))[-1][0] == ask(page)[-1][0]


def test_who_begins_another_work_ends_those_before():
    visit, seen = Visit(), []

    async def work(name):
        while True:
            yield name
            await asyncio.sleep(0)

    async def read(name):
        async for update in visit.until_stopped(work(name)):
            seen.append(update)
            if update == "c":
                visit.stop()

    async def all_at_once():
        await asyncio.wait_for(asyncio.gather(*(read(name) for name in "abc")), 60)

    asyncio.run(all_at_once())
    assert visit.is_stopped and seen == sorted(seen) and seen.count("c") == 1


def test_stop_is_for_a_work_that_waits_for_another_to_end():
    visit, seen, begun = Visit(), [], asyncio.Event()

    async def work(name, closing):
        try:
            while True:
                yield name
                await asyncio.sleep(0)
        finally:
            closing.set()
            for _ in range(20):
                await asyncio.sleep(0)

    async def read(name, closing):
        async for update in visit.until_stopped(work(name, closing)):
            seen.append(update)
            begun.set()

    async def stop_between():
        closing = asyncio.Event()
        first = asyncio.create_task(read("first", closing))
        await begun.wait()
        second = asyncio.create_task(read("second", asyncio.Event()))
        await closing.wait()
        visit.stop()
        await asyncio.wait_for(asyncio.gather(first, second), 60)

    asyncio.run(stop_between())
    assert visit.is_stopped and set(seen) == {"first"}


def test_errors_of_a_work_come_to_its_reader():
    async def work():
        yield 1
        raise ValueError("why")

    async def read():
        return [update async for update in Visit().until_stopped(work())]

    with pytest.raises(ValueError, match="why"):
        asyncio.run(read())


def test_a_work_that_fails_at_its_end_keeps_nobody_waiting():
    async def work(fails):
        try:
            yield 1
        finally:
            if fails:
                raise ValueError("why")

    async def two_works():
        visit = Visit()
        first = visit.until_stopped(work(True))
        await anext(first)
        with pytest.raises(ValueError, match="why"):
            await first.aclose()
        return [update async for update in visit.until_stopped(work(False))]

    assert asyncio.run(asyncio.wait_for(two_works(), 60)) == [1]


@pytest.mark.parametrize(("kind", "key"), ERROR_TEXTS)
def test_errors_are_told_in_both_languages(kind, key):
    error = kind("why", 1.0) if kind is EngineBusyError else kind("why")
    with pytest.warns(UserWarning):
        told = report(error)
    assert all(f'lang="{language}">{say(language, key, detail="why")}<' in told for language in LANGUAGES)
    assert any("\u4e00" <= letter <= "\u9fff" for letter in say("zh", key, detail=""))


def test_text_is_shown_letter_by_letter(page):
    (message, _) = ask(page, question="<img src=x onerror=alert(1)> & **so**")[-1][1]
    assert message["content"]["text"] == "&lt;img src=x onerror=alert(1)&gt; &amp; **so**"


def test_bad_input_is_one_sentence_and_changes_nothing(page, tmp_path):
    (tmp_path / "not.png").write_bytes(b"no picture")
    turns = [("a?", "b")]
    for wrong, message in (
        ({"picture": str(tmp_path / "not.png")}, "can't be read as JPEG"),
        ({"question": "图片" * 100_000}, "tokens"),
        ({"tokens": 0}, "max_new_tokens must be at least 1"),
        ({"tokens": 10**6}, "room for"),
    ):
        with pytest.warns(UserWarning, match=message):
            seen = ask(page, turns, **wrong)
        assert seen[-1][0] == turns and len(seen[-1][1]) == 2
        assert seen[-1][2] == wrong.get("question", "what is this?")  # back in its box
        assert 'class="status status-error"' in seen[-1][3]
        assert message in seen[-1][3]
    assert ask(page, turns, question="  ")[-1][:2] == ask(page, turns, question="")[-1][:2]
    assert "type a question" in ask(page, question=" ")[-1][3]


def test_a_closed_engine_is_told_of(chat):
    engine = ChatEngine(chat)
    engine.close()
    page = built(ChatPage(engine, "viscpm-tiny"))
    with pytest.warns(UserWarning, match="shutting down"):
        assert ask(page)[-1][0] == []


# --------------------------------------------------------------------------------------------------------------- paint


def test_the_pictures_are_the_painters_with_their_settings_inside(easel):
    page = easel()
    expected = page.engine.painter.generate_all(
        "一只猫", "dog", num_images_per_prompt=2, guidance_scale=5.0, generator=3, num_inference_steps=2
    )
    pictures, files, status = paint(page, negative="dog", number=2)
    assert [caption for _, caption in pictures] == ["seed 3", "seed 4"]
    assert [path for path, _ in pictures] == files and "Pictures: 2" in status
    for index, file in enumerate(files):
        with PIL.Image.open(file) as image:
            assert image.tobytes() == expected.images[index].tobytes()
            assert image.text | {"settings": ""} == {
                "Software": "viscpm-hf", "prompt": "一只猫", "negative_prompt": "dog", "seed": str(3 + index),
                "model": "some-model", "settings": "",
            }  # fmt: skip
            settings = json.loads(image.text["settings"])
        assert (settings["steps"], settings["guidance"], settings["size"]) == (2, 5.0, [16, 16])
        again = page.engine.painter.draw_again(file)
        assert again.images[0].tobytes() == expected.images[index].tobytes()
    assert paint(page, is_random=True)[1] != paint(page, is_random=True)[1]


def test_presets_are_schedulers(easel):
    page = easel()
    _, files, _ = paint(page, preset="preset_fast")
    record = read_record(files[0])
    assert (record.scheduler, record.steps) == ("DPMSolverMultistepScheduler", 2)
    assert record.scheduler_config["use_karras_sigmas"]


def test_candidates_come_with_scores_the_best_first(easel, tmp_path):
    pictures, files, _ = paint(easel(**ranker(tmp_path)), number=3, language="zh")
    scores = [float(caption.rpartition("得分 ")[2]) for _, caption in pictures]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)
    with PIL.Image.open(files[0]) as image:
        assert float(image.text["score"]) == pytest.approx(scores[0], abs=0.01)


def test_flagged_pictures_are_words_not_black_boxes(easel):
    pictures, files, status = paint(easel(**safety_checker(is_strict=True)), number=2)
    assert not pictures and not files
    assert status.count("did not pass the safety check") == 2 and "seed 3" in status and "status-error" in status


def test_stop_ends_a_drawing_and_has_the_last_word(easel):
    page, visit = easel(), Visit()

    async def stop_early():
        seen = []
        drawing = page.paint_until_stopped(visit, "一只猫", "", 200, 5.0, 16, 8, False, 3, "en")
        async for update in drawing:
            seen.append(update)
            if "<progress" in update[3]:
                visit.stop()
        return seen

    begun, *progress, (*pictures, told, stop) = asyncio.run(stop_early())
    assert said("starting") in begun[3] and len(progress) == 1
    assert pictures == [gr.skip()] * 3 and said("stopped") in told and not stop["interactive"]
    assert page.engine.close() and page.engine.num_images == 0


def test_refused_and_impossible_prompts_are_told_of(easel, tmp_path):
    with pytest.warns(UserWarning, match="safety check"):
        pictures, files, status = paint(easel(**prompt_checker(tmp_path, 0.9)))
    assert not pictures and not files and "nothing was painted" in status
    page = easel()
    for wrong, message in (({"prompt": "图片" * 5000}, "tokens"), ({"size": 17}, "multiple of 8")):
        with pytest.warns(UserWarning, match=message):
            assert "status-error" in paint(page, **wrong)[2]
    assert "what to paint" in paint(page, prompt=" ")[2]


# ------------------------------------------------------------------------------------------------------------ the page


def test_everything_is_said_in_both_languages(engine, easel):
    for key, texts in TEXTS.items():
        fields = [{name for _, name, _, _ in string.Formatter().parse(text) if name} for text in texts]
        assert all(texts) and fields[0] in (fields[1], fields[1] - {"detail"}), key
    labels = Labels("en")
    built(ChatPage(engine, "viscpm-tiny"), labels)
    built(PaintPage(easel().engine, "some-model"), labels)
    for component, english, chinese in zip(labels.components, labels.updates("en"), labels.updates("zh"), strict=True):
        assert english.keys() == chinese.keys() and english != chinese, component
        for name, value in english.items():
            if isinstance(value, str) and name in ("label", "value"):
                assert getattr(component, name) == value
    assert "step 3 of 50" in painting_status(3, 50) and "第 3 步，共 50 步" in painting_status(3, 50)


@pytest.mark.parametrize(
    ("accepted", "language"), [("zh-CN,zh;q=0.9,en;q=0.8", "zh"), ("de,en;q=0.5,zh", "en"), ("fr", "en"), ("", "en")]
)
def test_the_browsers_language_is_the_first(accepted, language):
    assert preferred_language(accepted) == language
    assert browser_language(Request(headers={"accept-language": accepted})) == language


def test_a_demo_has_the_tabs_of_its_engines(engine, easel):
    tabs = {"chat": (engine, None), "paint": (None, easel().engine), "both": (engine, easel().engine)}
    for kind, engines in tabs.items():
        demo = create_demo(*engines)
        ids = {block.elem_id for block in demo.blocks.values()}
        assert ("question" in ids, "prompt" in ids) == (kind != "paint", kind != "chat")
        assert demo.analytics_enabled is False
    with pytest.raises(ValueError, match="for chat, for paint, or eyes"):
        create_demo()


def test_a_taken_port_and_contradictions_are_one_line(engine, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1: choose another"):
            start(create_demo(engine), port=port)
    assert main(["demo", "chat", "--terminal"]) == 1
    assert main(["demo", "chat", "--model", "/no/such/folder"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len([line for line in errors if line.startswith("viscpm-hf: error: ")]) == 2


@pytest.mark.parametrize(("name", "option"), [("demo_chat", "--model"), ("demo_paint", "--paint-model")])
def test_the_examples_hand_on_their_options(name, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, option, "/no/such/folder"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(__file__).parents[2] / "examples" / f"{name}.py"), run_name="__main__")
    assert end.value.code == 1
    assert "/no/such/folder" in capsys.readouterr().err


def test_in_the_terminal_too_a_model_can_be_named(tmp_path, capsys):
    assert main(["demo", "--terminal", "-o", str(tmp_path), "--model", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err
