"""The demo's conversation about a picture."""

from __future__ import annotations

import html
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image

from ..images import decode_image
from ..shapes import draw, make_scene
from ..tiny.embedded import EMBEDDED_NAME
from .demo_labels import EXPECTED_ERRORS, Labels, report, said, status, stop_button
from .demo_texts import say
from .demo_visit import Visit
from .engine import ChatEngine
from .sampling import SamplingSettings
from .tickets import Finished, TextPiece
from .waiting import EventStream, Places


Turns = list[tuple[str, str]]
"""Questions and answers; the last answer may still be growing."""

MODES = ("sampling", "reference")
MAX_NEW_TOKENS = 1024
DEFAULT_NEW_TOKENS = 256

NUM_SAMPLES = 6
SAMPLE_QUESTIONS = ("sample_what", "sample_describe", "sample_special")
TINY_QUESTIONS = ("sample_what", "sample_describe", "sample_count")
SAMPLE_SIZE = 224

# Every change redraws the conversation, which browsers needn't do for every token.
SECONDS_BETWEEN_UPDATES = 0.05


class ChatPage:
    """One page for all visitors: what belongs to a conversation is handed in and out of its methods.

    ```python
    >>> page = ChatPage(engine, "viscpm-tiny")
    >>> page.build(labels)  # within gr.Blocks
    ```
    """

    def __init__(self, engine: ChatEngine, model_name: str):
        self.engine = engine
        self.questions = TINY_QUESTIONS if model_name == EMBEDDED_NAME else SAMPLE_QUESTIONS
        self.images, self.texts = Places(4, "images"), Places(4, "texts")
        self.samples = [draw(make_scene("test", index), SAMPLE_SIZE) for index in range(NUM_SAMPLES)]

    def build(self, labels: Labels) -> None:
        """Lays out the page and ties its events."""
        visit, number, turns = gr.State(Visit()), gr.State(0), gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=300, elem_id="looking"):
                picture = labels.make(
                    gr.Image,
                    {"label": "picture", "placeholder": "picture_hint"},
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "webcam", "clipboard"],
                    buttons=["fullscreen"],
                    height=260,
                    elem_id="picture",
                )
                # The file as it came: `decode_image` says what is wrong with it, and in one sentence.
                picture.preprocess = lambda payload: None if payload is None else payload.path
                samples = labels.make(
                    gr.Gallery,
                    {"label": "samples"},
                    value=self.samples,
                    columns=NUM_SAMPLES,
                    rows=1,
                    height="auto",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    format="png",
                    elem_id="samples",
                )
            with gr.Column(scale=3, min_width=300):
                conversation = labels.make(
                    gr.Chatbot,
                    {"label": "conversation", "placeholder": "conversation_hint", "examples": self.sample_questions},
                    height=380,
                    render_markdown=False,
                    buttons=[],
                    layout="bubble",
                    elem_id="conversation",
                )
                state = gr.HTML(status(""), elem_id="chat-status")
                question = labels.make(
                    gr.Textbox,
                    {"label": "question", "placeholder": "question_hint"},
                    lines=1,
                    max_lines=6,
                    elem_id="question",
                )
                with gr.Row(elem_classes="buttons"):
                    send = labels.make(gr.Button, {"value": "send"}, variant="primary", min_width=70, elem_id="send")
                    stop = labels.make(gr.Button, {"value": "stop"}, interactive=False, min_width=70, elem_id="stop")
                    self.retry = labels.make(gr.Button, {"value": "retry"}, min_width=70, elem_id="retry")
                    clear = labels.make(gr.Button, {"value": "clear"}, min_width=70, elem_id="clear")
                with labels.make(gr.Accordion, {"label": "settings"}, open=False, elem_id="chat-settings"):
                    mode = labels.make(gr.Radio, {"label": "decoding", "choices": MODES}, value=MODES[0])
                    length = labels.make(
                        gr.Slider,
                        {"label": "max_tokens"},
                        minimum=1,
                        maximum=MAX_NEW_TOKENS,
                        step=1,
                        value=DEFAULT_NEW_TOKENS,
                    )
                    temperature = labels.make(
                        gr.Slider, {"label": "temperature"}, minimum=0, maximum=2, step=0.05, value=0
                    )
                    top_p = labels.make(
                        gr.Slider, {"label": "top_p"}, minimum=0.05, maximum=1, step=0.05, value=1, visible=False
                    )

        for setting in (mode, temperature):
            setting.change(show_settings, [mode, temperature], [temperature, top_p], show_progress="hidden")
        samples.select(self.choose, None, picture, show_progress="hidden")
        # One event, so that a visitor has one answer at a time.
        gr.on(
            [question.submit, send.click, self.retry.click, conversation.example_select],
            self.answer_until_stopped,
            [visit, number, turns, picture, question, mode, length, temperature, top_p],
            [turns, conversation, question, state, stop],
            concurrency_limit=None,
            show_progress="hidden",
        )
        stop.click(Visit.stop, visit, None, queue=False, show_progress="hidden")
        for event, key in (
            (clear.click, "cleared"),
            (conversation.clear, "cleared"),
            (picture.change, "new_conversation"),
        ):
            beginning = event(
                partial(self.begin, key),
                [visit, turns],
                [number, turns, conversation, state, stop],
                concurrency_limit=None,
                show_progress="hidden",
            )
            if key == "new_conversation":
                beginning.then(self.look, [picture, state], state, concurrency_limit=None, show_progress="hidden")

    # ---------------------------------------------------------------------------------------------------------- events

    async def answer_until_stopped(
        self,
        visit: Visit,
        number: int,
        turns: Turns,
        picture: str | None,
        question: str,
        mode: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        event: gr.EventData,
    ) -> AsyncIterator[tuple[Turns, list[dict[str, Any]], Any, str, Any]]:
        """[`answer`], until a click on Stop, after which what there is of the answer stays, or until another
        conversation begins than the one it was asked for, which has the given number."""
        if visit.conversation != number:
            return
        answer = self.answer(turns, picture, question, mode, max_new_tokens, temperature, top_p, event)
        async with aclosing(visit.until_stopped(answer)) as updates:
            async for update in updates:
                turns = update[0]
                yield update
        if visit.is_stopped:
            yield turns, messages(turns), gr.skip(), status(said("stopped")), stop_button(False)

    async def answer(
        self,
        turns: Turns,
        picture: str | None,
        question: str,
        mode: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        event: gr.EventData,
    ) -> AsyncIterator[tuple[Turns, list[dict[str, Any]], Any, str, Any]]:
        """Answers the question, the sample question that was clicked, or after a click on Retry the last one again.

        Yields:
            The conversation, the same for the eye, what becomes of the question's box, the status, and of Stop.
        """
        is_again, is_sample = event.target is self.retry, isinstance(event.target, gr.Chatbot)
        if is_sample:
            question = event.value["text"]
        refusal = ""
        if is_again and not turns:
            refusal = "nothing_to_retry"
        elif is_again:
            question, turns = turns[-1][0], turns[:-1]
        elif is_sample and picture is None:
            refusal = "first_a_picture"
        elif not question.strip():
            refusal = "no_question"
        if refusal:
            yield turns, messages(turns), question if is_sample else gr.skip(), status(said(refusal)), gr.skip()
            return
        box = gr.skip() if is_again or is_sample else ""
        hint = said("no_picture") if picture is None else ""
        now = [*turns, (question, "")]
        yield now, messages(now), box, status(hint, said("answering")), stop_button(True)
        begin, shown = time.perf_counter(), 0.0
        text = ""
        try:
            decoding = decoding_of(self.engine, mode, max_new_tokens, temperature, top_p)
            image = None if picture is None else await self.images.run(decode_image, Path(picture).read_bytes())
            prompt = await self.texts.run(self.engine.prepare.turn, image, question, self.context(turns))
            events = EventStream(1)
            ticket = self.engine.submit(prompt, decoding, events)
            try:
                async for piece in events:
                    if isinstance(piece, TextPiece):
                        text += piece.text
                        if time.perf_counter() - shown >= SECONDS_BETWEEN_UPDATES:
                            shown = time.perf_counter()
                            now = [*turns, (question, text)]
                            yield now, messages(now), gr.skip(), gr.skip(), gr.skip()
                    else:
                        end = piece
            finally:
                ticket.cancel()
        except EXPECTED_ERRORS as error:
            yield turns, messages(turns), question, report(error), stop_button(False)
            return
        now = [*turns, (question, text)]
        lines = (hint, "" if text else said("empty"), *summary(end, time.perf_counter() - begin))
        yield now, messages(now), gr.skip(), status(*lines), stop_button(False)

    async def begin(self, key: str, visit: Visit, turns: Turns) -> tuple[int, Turns, list, str, Any]:
        """A new conversation; `key` says why, if there was one before."""
        visit.conversation += 1
        await visit.end()
        return visit.conversation, [], [], status(said(key) if turns else ""), stop_button(False)

    async def look(self, picture: str | None, now: str) -> str:
        """The status `now`, or what is wrong with a picture that has just come."""
        if picture is not None:
            try:
                await self.images.run(decode_image, Path(picture).read_bytes())
            except EXPECTED_ERRORS as error:
                return report(error)
        return now

    def choose(self, event: gr.SelectData) -> PIL.Image.Image:
        return self.samples[event.index]

    def sample_questions(self, language: str) -> list[dict[str, str]]:
        """Of an empty conversation, to click on."""
        return [{"text": say(language, key)} for key in self.questions]

    def context(self, turns: Turns) -> str:
        """The conversation, as [`VisCPMChat.ask`] would have handed it on."""
        return self.engine.chat.context_of((question, text) for question, text in turns if text)


def messages(turns: Turns) -> list[dict[str, Any]]:
    """The conversation as the page shows it, letter by letter: the page would take `<s>` for its own."""
    return [
        {"role": role, "content": {"type": "text", "text": html.escape(text, quote=False)}}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
        if text
    ]


def decoding_of(engine: ChatEngine, mode: str, max_new_tokens: int, temperature: float, top_p: float) -> Any:
    """What [`ChatEngine.submit`] takes."""
    if mode == "reference":
        return engine.reference(max_new_tokens=int(max_new_tokens))
    return SamplingSettings(max_new_tokens=int(max_new_tokens), temperature=temperature, top_p=top_p)


def show_settings(mode: str, temperature: float) -> list[dict[str, Any]]:
    """Temperature is the sampling's, and top-p of a temperature: neither is shown where it changes nothing."""
    return [gr.update(visible=mode == "sampling"), gr.update(visible=mode == "sampling" and temperature > 0)]


def summary(end: Finished, seconds: float) -> tuple[str, ...]:
    """Length, time and speed of an answer, and whether it was cut, for [`status`]."""
    answered = said("answered", tokens=end.num_tokens, seconds=seconds, speed=end.num_tokens / seconds)
    return (answered, said("cut")) if end.reason == "length" else (answered,)
