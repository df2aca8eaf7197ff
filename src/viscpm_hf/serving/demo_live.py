"""The demo's live page: the browser takes frames, one after the other is answered, and the answer spoken.

Camera, video files, speech and hearing are the browser's own (`live.js`); what comes here is one JPEG at a time.
"""

from __future__ import annotations

import time
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from ..images import decode_image
from .demo_labels import EXPECTED_ERRORS, error_key, said
from .demo_texts import LANGUAGES, say
from .live import QUESTIONS, Eyes
from .waiting import Places


PATH = "/viscpm-hf/live"
MAX_FRAME_BYTES = 2 * 2**20
MAX_QUESTION_CHARACTERS = 2000
NUM_VIEWERS = 8
"""Frames that are looked at together; others wait."""


def live_page() -> None:
    """Lays out the page; its words are in both languages, of which one is shown."""
    gr.HTML(
        f"""<div id="live">
<div id="live-view"><video id="live-video" playsinline muted loop aria-hidden="true"></video></div>
<div id="live-side">
<label for="live-question">{said("live_question")}</label>
<div class="live-row"><textarea id="live-question" rows="2" maxlength="{MAX_QUESTION_CHARACTERS}"></textarea>
<button id="live-listen" type="button" class="live-button" hidden>{said("live_listen")}</button></div>
<div class="live-row">
<button id="live-camera" type="button" class="live-button live-primary">{said("live_camera")}</button>
<button id="live-file" type="button" class="live-button">{said("live_file")}</button>
<input id="live-input" type="file" accept="video/*" hidden>
<button id="live-stop" type="button" class="live-button" disabled>{said("live_stop")}</button></div>
<label class="live-check"><input id="live-speak" type="checkbox"> {said("live_speak")}</label>
<div id="live-answer" role="status"></div>
<div id="live-rate" class="small">{said("live_hint")}</div>
<div id="live-texts" hidden>{"".join(f'<span data-key="{key}">{said(key)}</span>' for key in SCRIPT_TEXTS)}</div>
</div></div>""",
        elem_id="live-page",
    )


# What the script says.
SCRIPT_TEXTS = ("live_rate", "live_denied", "live_no_video", "live_gone")


def add_live_route(app: FastAPI, eyes: Eyes) -> None:
    """Answers frames at `PATH`. They are `image/jpeg`, which no page of another origin may send unasked."""
    places = Places(NUM_VIEWERS, "live")

    def look(data: bytes, question: str) -> str:
        return eyes.look(decode_image(data), question)

    async def answer(request: Request) -> JSONResponse:
        if request.headers.get("content-type") != "image/jpeg":
            return _refusal(415, "bad_value", "A frame is image/jpeg.")
        language = request.query_params.get("language")
        question = request.query_params.get("question", "").strip()
        if language not in LANGUAGES or len(question) > MAX_QUESTION_CHARACTERS:
            return _refusal(400, "bad_value", f"A question has at most {MAX_QUESTION_CHARACTERS:,} characters.")
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_FRAME_BYTES:
                return _refusal(413, "bad_value", f"A frame has at most {MAX_FRAME_BYTES:,} bytes.")
        begin = time.perf_counter()
        try:
            text = await places.run(look, bytes(data), question or QUESTIONS[language])
        except EXPECTED_ERRORS as error:
            return _refusal(422, error_key(error), " ".join(str(error).split()))
        return JSONResponse({"answer": text, "seconds": round(time.perf_counter() - begin, 3)})

    app.add_api_route(PATH, answer, methods=["POST"], include_in_schema=False)


def _refusal(status: int, key: str, detail: str) -> JSONResponse:
    texts: dict[str, Any] = {language: say(language, key, detail=detail) for language in LANGUAGES}
    return JSONResponse({"error": texts}, status)
