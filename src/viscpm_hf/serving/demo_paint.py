"""The demo's easel."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from ..paint.paint import PRESETS, PaintResult
from ..paint.painting import PaintRequest, check_paint_request
from ..paint.record import png_bytes
from ..tiny.embedded import EMBEDDED_NAME
from .demo_labels import EXPECTED_ERRORS, Labels, report, said, status, stop_button
from .demo_texts import say
from .demo_visit import Visit
from .paint_engine import Drawing, DrawingSettings, PaintEngine
from .waiting import Places


PRESET_KEYS = ("preset_reference", "preset_quality", "preset_fast")
MAX_STEPS = 200
DEFAULT_STEPS = 50
DEFAULT_GUIDANCE = 7.5
MAX_CANDIDATES = 8
MAX_SEED = 2**31 - 1
SIZE_STEP = 8

IDEAS = ("idea_cat", "idea_river", "idea_train")
TINY_IDEAS = ("idea_circle", "idea_star", "idea_square")

SECONDS_BETWEEN_UPDATES = 0.2


@dataclass(frozen=True)
class Painted:
    """A picture of the gallery."""

    file: str
    seed: int
    score: float | None


class PaintPage:
    """One page for all visitors.

    Args:
        engine: draws. Its painter has `candidates=1`: here it is the visitor who says how many.
        model_name: written into the pictures' files.
    """

    def __init__(self, engine: PaintEngine, model_name: str):
        self.engine = engine
        self.model_name = model_name
        self.places = Places(4, "images")

    def build(self, labels: Labels, language: gr.Radio) -> None:
        """Lays out the page and ties its events."""
        side = max(self.engine.painter.pipeline.default_size())
        candidates = 4 if self.engine.painter.pipeline.ranker is not None else 1
        visit, painted = gr.State(Visit()), gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                prompt = labels.make(
                    gr.Textbox,
                    {"label": "prompt", "placeholder": "prompt_hint"},
                    lines=1,
                    max_lines=4,
                    elem_id="prompt",
                )
                labels.make(gr.Markdown, {"value": "ideas"}, elem_classes="small")
                with gr.Row(elem_id="ideas"):
                    ideas = [
                        labels.make(gr.Button, {"value": key}, size="sm", min_width=100)
                        for key in (TINY_IDEAS if self.model_name == EMBEDDED_NAME else IDEAS)
                    ]
                negative = labels.make(gr.Textbox, {"label": "negative"}, lines=1, max_lines=4, elem_id="negative")
                with gr.Row(elem_classes="buttons"):
                    draw = labels.make(gr.Button, {"value": "draw"}, variant="primary", min_width=70, elem_id="draw")
                    stop = labels.make(gr.Button, {"value": "stop"}, interactive=False, min_width=70, elem_id="halt")
                with labels.make(gr.Accordion, {"label": "settings"}, open=False, elem_id="paint-settings"):
                    preset = labels.make(
                        gr.Radio,
                        {"label": "preset", "choices": PRESET_KEYS},
                        value=PRESET_KEYS[0],
                        elem_id="preset",
                    )
                    steps = labels.make(
                        gr.Slider, {"label": "steps"}, minimum=1, maximum=MAX_STEPS, step=1, value=DEFAULT_STEPS
                    )
                    guidance = labels.make(
                        gr.Slider, {"label": "guidance"}, minimum=1, maximum=20, step=0.5, value=DEFAULT_GUIDANCE
                    )
                    size = labels.make(
                        gr.Slider, {"label": "size"}, minimum=side // 2, maximum=side * 2, step=SIZE_STEP, value=side
                    )
                    number = labels.make(
                        gr.Slider,
                        {"label": "candidates"},
                        minimum=1,
                        maximum=MAX_CANDIDATES,
                        step=1,
                        value=candidates,
                    )
                    is_random = labels.make(gr.Checkbox, {"label": "random_seed"}, value=True, elem_id="random-seed")
                    seed = labels.make(
                        gr.Number,
                        {"label": "seed"},
                        value=0,
                        precision=0,
                        minimum=0,
                        maximum=MAX_SEED,
                        visible=False,
                        elem_id="seed",
                    )
            with gr.Column(scale=3, min_width=300):
                state = gr.HTML(status(said("gallery_hint")), elem_id="paint-status")
                self.gallery = labels.make(
                    gr.Gallery,
                    {"label": "gallery"},
                    height="auto",
                    object_fit="contain",
                    interactive=False,
                    visible=False,
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
                downloads = labels.make(
                    gr.File,
                    {"label": "downloads"},
                    file_count="multiple",
                    interactive=False,
                    visible=False,
                    elem_id="downloads",
                )

        work = {
            "fn": self.paint_until_stopped,
            "inputs": [visit, prompt, negative, steps, guidance, size, number, is_random, seed, language, preset],
            "outputs": [painted, self.gallery, downloads, state, stop],
            "concurrency_limit": None,
            "show_progress": "hidden",
        }
        gr.on([prompt.submit, negative.submit, draw.click], **work)
        for idea in ideas:
            idea.click(str, idea, prompt, show_progress="hidden").then(**work)
        preset.input(
            lambda key: [preset_of(key)[name] for name in ("num_inference_steps", "guidance_scale")],
            preset,
            [steps, guidance],
            show_progress="hidden",
        )
        is_random.change(lambda is_on: gr.update(visible=not is_on), is_random, seed, show_progress="hidden")
        stop.click(Visit.stop, visit, None, queue=False, show_progress="hidden")
        language.change(shown, [painted, language], self.gallery, show_progress="hidden", queue=False)

    async def paint_until_stopped(self, visit: Visit, *given: Any) -> AsyncIterator[tuple[Any, Any, Any, str, Any]]:
        """[`paint`], until a click on Stop."""
        async with aclosing(visit.until_stopped(self.paint(*given))) as updates:
            async for update in updates:
                yield update
        if visit.is_stopped:
            yield gr.skip(), gr.skip(), gr.skip(), status(said("stopped")), stop_button(False)

    async def paint(
        self,
        prompt: str,
        negative: str,
        steps: int,
        guidance: float,
        size: int,
        candidates: int,
        is_random: bool,
        seed: int | None,
        language: str,
        preset: str = PRESET_KEYS[0],
    ) -> AsyncIterator[tuple[Any, Any, Any, str, Any]]:
        """Draws.

        Yields:
            The pictures, the same for the eye, their files, the status, and what becomes of Stop.
        """
        if not prompt.strip():
            yield gr.skip(), gr.skip(), gr.skip(), status(said("empty_prompt")), gr.skip()
            return
        seed = random.randint(0, MAX_SEED) if is_random or seed is None else int(seed)
        request = PaintRequest(prompt, negative or None, seed)
        scheduler = preset_of(preset)["scheduler"]
        settings = DrawingSettings(int(candidates), int(size), int(size), int(steps), guidance, scheduler)
        progress = (0, int(steps))

        def on_step(done: int, total: int) -> None:
            nonlocal progress
            progress = (done, total)

        begin = time.perf_counter()
        yield gr.skip(), gr.skip(), gr.skip(), status(said("starting")), stop_button(True)
        try:
            await self.places.run(check_paint_request, self.engine.painter, request)
            drawing = self.engine.submit(Drawing(request, settings, on_step=on_step))
            future, told = asyncio.wrap_future(drawing.result), progress
            try:
                while not (await asyncio.wait([future], timeout=SECONDS_BETWEEN_UPDATES))[0]:
                    if progress != told:
                        told = progress
                        yield gr.skip(), gr.skip(), gr.skip(), painting_status(*told), gr.skip()
                result = future.result()
            finally:
                drawing.cancel()
                future.cancel()
        except EXPECTED_ERRORS as error:
            yield [], shown([], language), gr.update(value=None, visible=False), report(error), stop_button(False)
            return
        seconds = time.perf_counter() - begin
        allowed = [index for index, is_flagged in enumerate(result.flags) if not is_flagged]
        withheld = [
            said("withheld", seed=result.seeds[index], reason=result.reasons[index])
            for index, is_flagged in enumerate(result.flags)
            if is_flagged
        ]
        files = await self.places.run(self._write, result, allowed)
        painted = [
            Painted(file, result.seeds[index], result.scores[index])
            for file, index in zip(files, allowed, strict=True)
        ]
        done = said("painted", images=len(painted), seconds=seconds)
        yield (
            painted,
            shown(painted, language),
            gr.update(value=files, visible=bool(files)),
            status(done, *withheld, is_error=not painted),
            stop_button(False),
        )

    def _write(self, result: PaintResult, indices: list[int]) -> list[str]:
        """Files of the pictures, where gradio serves them from and clears them away after a while."""
        return [
            save_bytes_to_cache(
                png_bytes(result, index, self.model_name),
                f"viscpm-{result.seeds[index]}.png",
                self.gallery.GRADIO_CACHE,
            )
            for index in indices
        ]


def shown(painted: list[Painted], language: str) -> dict[str, Any]:
    """The gallery of pictures with captions."""
    return gr.update(value=[(one.file, caption(one, language)) for one in painted], visible=bool(painted))


def caption(painted: Painted, language: str) -> str:
    parts = [say(language, "candidate_seed", seed=painted.seed)]
    if painted.score is not None:
        parts.append(say(language, "candidate_score", score=painted.score))
    return ", ".join(parts)


def painting_status(done: int, total: int) -> str:
    """How far a picture is, in words and as a bar; of the bar alone screen readers say every step when asked."""
    text = said("painting", done=done, total=total)
    return (
        f'<div class="status"><div aria-hidden="true">{text}</div>'
        f'<progress value="{done}" max="{total}" aria-label="{done} / {total}"></progress></div>'
    )


def preset_of(key: str) -> dict[str, Any]:
    return PRESETS[key.removeprefix("preset_")]
