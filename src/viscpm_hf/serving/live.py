"""Live: what is seen now is answered, by a model of this process or behind an OpenAI-compatible endpoint.

A frame is asked about when the answer to the one before is there, so that nothing piles up: what lies between is
dropped by whoever takes the frames (the page's script, [`VideoFrames`]).
"""

from __future__ import annotations

import base64
import io
from typing import Protocol

import PIL.Image

from .engine import ChatEngine
from .sampling import SamplingSettings


MAX_NEW_TOKENS = 48
QUESTIONS = {"zh": "请用一句话描述这张图片。", "en": "Describe the picture in one sentence."}
"""What is asked if nobody asks anything."""


class Eyes(Protocol):
    """Says what it sees."""

    def look(self, frame: PIL.Image.Image, question: str) -> str: ...


class EngineEyes:
    """A model of this process: one engine for many viewers.

    Args:
        engine: answers.
        max_new_tokens: of an answer, which is to be spoken.
    """

    def __init__(self, engine: ChatEngine, max_new_tokens: int = MAX_NEW_TOKENS):
        self.engine, self.settings = engine, SamplingSettings(max_new_tokens=max_new_tokens, temperature=0)

    def look(self, frame: PIL.Image.Image, question: str) -> str:
        return self.engine.answer(self.engine.prepare.turn(frame, question), self.settings)[0].text


class EndpointEyes:
    """A model behind an OpenAI-compatible endpoint.

    Args:
        base_url: `https://HOST/v1`.
        model: its name there.
        api_key: goes there and nowhere else; None for local servers.
        timeout: seconds for an answer.

    Raises:
        ImportError: if the `openai` client isn't installed.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        timeout: float = 60.0,
    ):
        try:
            from ..evaluation.endpoint import Endpoint
        except ModuleNotFoundError as error:
            raise ImportError(
                f'An endpoint needs {error.name}, which is not installed: pip install -c constraints.txt ".[eval]".'
            ) from error
        self.endpoint = Endpoint(base_url, api_key, timeout)
        self.model, self.max_new_tokens = model, max_new_tokens

    def look(self, frame: PIL.Image.Image, question: str) -> str:
        """Raises `RuntimeError` if the endpoint sends something else than an answer, or none."""
        import openai

        file = io.BytesIO()
        frame.convert("RGB").save(file, "JPEG", quality=85)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        try:
            completion = self.endpoint.complete(
                self.endpoint.new_call(),
                max_retries=0,
                model=self.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=self.max_new_tokens,
                temperature=0,
            )
            answer = completion.choices[0].message.content
        except (openai.OpenAIError, TimeoutError, AttributeError, IndexError, TypeError) as error:
            raise RuntimeError(f"The endpoint gave no answer: {type(error).__name__}.") from error
        if not isinstance(answer, str):
            raise RuntimeError(f"The endpoint gave no text but {type(answer).__name__}.")
        return answer.strip()

    def close(self) -> None:
        self.endpoint.close()
