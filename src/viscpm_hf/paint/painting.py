"""Several prompts in one batch, each drawn as it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..pipelines.prompt_safety import UnsafePromptError
from ..pipelines.safety import UnsafeImageError
from .paint import PaintResult
from .record import call_settings


if TYPE_CHECKING:
    from .paint import VisCPMPaint


@dataclass(frozen=True)
class PaintRequest:
    """One prompt of a batch."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    """Of the first candidate; the others' follow. Any if None."""


def check_paint_request(painter: VisCPMPaint, request: PaintRequest) -> int:
    """The number of tokens of a prompt that can be drawn.

    Raises:
        ValueError: for one that can't.
    """
    if not request.prompt.strip():
        raise ValueError("The prompt is empty: say what to draw.")
    lengths, _ = painter.pipeline.tokenize_prompts([request.prompt, request.negative_prompt or ""])
    return max(lengths)


def paint_batch(
    painter: VisCPMPaint,
    requests: Sequence[PaintRequest],
    *,
    guidance_scale: float = 7.5,
    image_size: int | None = None,
    num_inference_steps: int = 50,
    num_images_per_prompt: int = 1,
    scheduler: str | None = None,
    **options,
) -> list[PaintResult | Exception]:
    """Draws several prompts in one batch, every image as `painter.generate_all` with the same seed draws it alone.

    Args:
        painter: the model, whose policies and number of candidates count.
        requests: the prompts.
        guidance_scale, image_size, num_inference_steps, num_images_per_prompt, scheduler: see
            [`VisCPMPaint.generate`].
        options: further arguments of [`VisCPMPaintPipeline.__call__`].

    Returns:
        The candidates of each prompt, in order; in place of them an `UnsafePromptError` or `UnsafeImageError` where
        the painter's policy is to raise it.
    """
    pipeline = painter.pipeline
    results: list[PaintResult | Exception | None] = [None] * len(requests)
    if painter.prompt_policy == "raise":
        reasons = pipeline.check_prompt([request.prompt for request in requests], "flag") or []
        for index, reason in enumerate(reasons):
            if reason is not None:
                results[index] = UnsafePromptError(f"The prompt was refused: {reason}.")
    accepted = [index for index, result in enumerate(results) if result is None]
    if not accepted:
        return results
    count = num_images_per_prompt * (painter.candidates if pipeline.ranker is not None else 1)
    drawn = [painter._generators(requests[index].seed, count) for index in accepted]
    if image_size is not None:
        options |= {"height": image_size, "width": image_size}
    options = {"use_guidance": True, **options}
    with painter.scheduled(scheduler):
        output = pipeline(
            [requests[index].prompt for index in accepted],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            negative_prompt=[requests[index].negative_prompt or "" for index in accepted],
            num_images_per_prompt=count,
            generator=[generator for generators, _ in drawn for generator in generators],
            prompt_policy=painter.prompt_policy,
            # One flagged image must not cost the others.
            image_policy="flag" if painter.image_policy == "raise" else painter.image_policy,
            **options,
        )
        settings = call_settings(pipeline, num_inference_steps, guidance_scale, options)
    reasons = output.flag_reasons or [None] * len(output.images)
    for place, (index, (_, seeds)) in enumerate(zip(accepted, drawn, strict=True)):
        own = slice(place * count, (place + 1) * count)
        flags = [reason is not None for reason in reasons[own]]
        if painter.image_policy == "raise" and any(flags):
            first = next(filter(None, reasons[own]))
            results[index] = UnsafeImageError(f"An image of the prompt is flagged: {first}.")
        else:
            result = painter.rank(requests[index].prompt, output.images[own], seeds, flags, reasons[own])
            results[index] = replace(result, negative_prompt=requests[index].negative_prompt, settings=settings)
    return results
