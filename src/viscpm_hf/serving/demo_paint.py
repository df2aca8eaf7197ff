"""The demo's easel."""

from __future__ import annotations

import asyncio
import contextvars
import random
import time
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache

from ..paint.paint import PRESETS, PaintResult
from ..paint.painting import PaintRequest, check_paint_request
from ..paint.record import png_bytes
from .demo_labels import EXPECTED_ERRORS, Labels, report, status
from .demo_texts import say
from .paint_engine import Drawing, DrawingSettings, PaintEngine
from .waiting import Places


PRESET_KEYS = ("preset_reference", "preset_quality", "preset_fast")
MAX_STEPS = 200
DEFAULT_STEPS = 50
DEFAULT_GUIDANCE = 7.5
MAX_CANDIDATES = 8
MAX_SEED = 2**31 - 1
SIZE_STEP = 8


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
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                prompt = labels.make(
                    gr.Textbox,
                    {"label": "prompt", "placeholder": "prompt_hint"},
                    lines=1,
                    max_lines=4,
                    elem_id="prompt",
                )
                negative = labels.make(gr.Textbox, {"label": "negative"}, lines=1, max_lines=4, elem_id="negative")
                with gr.Row(elem_classes="buttons"):
                    draw = labels.make(gr.Button, {"value": "draw"}, variant="primary", min_width=70, elem_id="draw")
                    stop = labels.make(gr.Button, {"value": "stop"}, variant="stop", min_width=70, elem_id="halt")
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
                        elem_id="seed",
                    )
            with gr.Column(scale=3, min_width=300):
                self.gallery = labels.make(
                    gr.Gallery,
                    {"label": "gallery"},
                    height=380,
                    object_fit="contain",
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                )
                state = gr.HTML(status(""), elem_id="paint-status")
                downloads = labels.make(
                    gr.File,
                    {"label": "downloads"},
                    file_count="multiple",
                    interactive=False,
                    visible=False,
                    elem_id="downloads",
                )

        painting = gr.on(
            [prompt.submit, negative.submit, draw.click],
            self.paint,
            [prompt, negative, steps, guidance, size, number, is_random, seed, language, preset],
            [self.gallery, downloads, state],
            concurrency_limit=None,
            show_progress_on=[self.gallery],
        )
        preset.input(
            lambda key: [preset_of(key)[name] for name in ("num_inference_steps", "guidance_scale")],
            preset,
            [steps, guidance],
            show_progress="hidden",
        )
        stop.click(
            lambda language: status(say(language, "stopped")),
            language,
            state,
            cancels=[painting],
            show_progress="hidden",
        )

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
        progress: gr.Progress = gr.Progress(),  # noqa: B008, gradio looks for it here
    ) -> tuple[Any, Any, str]:
        """Draws; the pictures with captions, their files, and the status."""
        if not prompt.strip():
            return gr.skip(), gr.skip(), status(say(language, "empty_prompt"))
        seed = random.randint(0, MAX_SEED) if is_random or seed is None else int(seed)
        request = PaintRequest(prompt, negative or None, seed)
        scheduler = preset_of(preset)["scheduler"]
        settings = DrawingSettings(int(candidates), int(size), int(size), int(steps), guidance, scheduler)
        visitor = contextvars.copy_context()  # by which gradio knows whose progress it is, in the engine's thread too

        def on_step(done: int, total: int) -> None:
            visitor.run(progress, (done, total), say(language, "denoising"))

        begin = time.perf_counter()
        try:
            await self.places.run(check_paint_request, self.engine.painter, request)
            drawing = self.engine.submit(Drawing(request, settings, on_step=on_step))
            try:
                result = await asyncio.wrap_future(drawing.result)
            finally:
                drawing.cancel()
        except EXPECTED_ERRORS as error:
            return [], gr.update(value=None, visible=False), report(error, language)
        seconds = time.perf_counter() - begin
        shown = [index for index, is_flagged in enumerate(result.flags) if not is_flagged]
        withheld = [
            say(language, "withheld", seed=result.seeds[index], reason=result.reasons[index])
            for index, is_flagged in enumerate(result.flags)
            if is_flagged
        ]
        files = await self.places.run(self._write, result, shown)
        pictures = [(file, caption(result, index, language)) for file, index in zip(files, shown, strict=True)]
        done = say(language, "painted", images=len(shown), seconds=seconds)
        return pictures, gr.update(value=files, visible=bool(files)), status(done, *withheld, is_error=not shown)

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


def caption(result: PaintResult, index: int, language: str) -> str:
    parts = [say(language, "candidate_seed", seed=result.seeds[index])]
    if result.scores[index] is not None:
        parts.append(say(language, "candidate_score", score=result.scores[index]))
    return ", ".join(parts)


def preset_of(key: str) -> dict[str, Any]:
    return PRESETS[key.removeprefix("preset_")]
