"""`POST /v1/images/generations`."""

from __future__ import annotations

import asyncio
import base64
import random
from collections import OrderedDict
from collections.abc import Sequence

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

from ..paint.paint import PRESETS
from ..paint.painting import PaintRequest, check_paint_request
from ..paint.record import png_bytes
from .bodies import body_of, documented
from .errors import ModelNotFoundError
from .paint_engine import Drawing, DrawingSettings, PaintEngine
from .schemas import DrawnImage, ImagesAnswer, ImagesRequest, new_id
from .settings import ServerSettings
from .waiting import Places, unless_gone


STEPS_OF_QUALITY = {None: 50, "auto": 50, "low": 10, "medium": 25, "standard": 25, "high": 50, "hd": 50}
# Pictures asked for as addresses; the oldest goes first.
MAX_KEPT_IMAGES = 64


def paint_router(engine: PaintEngine, names: Sequence[str], settings: ServerSettings, bodies: Places) -> APIRouter:
    """
    Args:
        names: what the model may be called in requests.
        bodies: where large bodies are read.
    """
    router = APIRouter(tags=["paint"])
    places = Places(4, "files")
    read_body = body_of(ImagesRequest, settings, bodies)
    kept: OrderedDict[str, bytes] = OrderedDict()

    @router.post(
        "/generations",
        response_model=ImagesAnswer,
        response_model_exclude_none=True,
        openapi_extra=documented(ImagesRequest),
    )
    async def images_generations(request: Request, body: ImagesRequest = read_body):
        """Images for a prompt in Chinese or English."""
        if body.model not in (None, *names):
            raise ModelNotFoundError(body.model, names)
        paint = PaintRequest(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            seed=random.getrandbits(31) if body.seed is None else body.seed,
        )
        await places.run(check_paint_request, engine.painter, paint)
        drawing = engine.submit(Drawing(paint, drawing_settings(body, settings), is_repeatable=body.seed is not None))
        try:
            result = await unless_gone(request, asyncio.wrap_future(drawing.result), settings.timeout)
        finally:
            drawing.cancel()
        data = []
        for index in range(body.n or 1):
            image = await places.run(png_bytes, result, index, names[0])
            if body.response_format == "url":
                name = new_id("img")
                kept[name] = image
                while len(kept) > MAX_KEPT_IMAGES:
                    kept.popitem(last=False)
                place = {"url": str(request.url_for("image_file", name=name))}
            else:
                place = {"b64_json": base64.b64encode(image).decode()}
            data.append(DrawnImage(seed=result.seeds[index], flagged=result.flags[index], **place))
        return ImagesAnswer(data=data)

    @router.get("/files/{name}", response_class=Response)
    async def image_file(name: str):
        """A picture that was asked for as `url`; the newest ones are kept."""
        image = kept.get(name)
        if image is None:
            raise HTTPException(404, "There is no such picture, or it isn't kept any more.")
        return Response(image, media_type="image/png")

    return router


def drawing_settings(body: ImagesRequest, settings: ServerSettings) -> DrawingSettings:
    """Size and steps, checked.

    Raises:
        ValueError: for more of either than is allowed, or a size that isn't a multiple of 8.
    """
    width = height = None
    if body.size not in (None, "auto"):
        width, height = map(int, body.size.split("x"))
        if width % 8 or height % 8:
            raise ValueError(f"size is a multiple of 8 both ways, got {body.size}.")
        if width * height > settings.max_paint_pixels:
            raise ValueError(
                f"size {body.size} has {width * height:,} pixels, more than the {settings.max_paint_pixels:,} allowed."
            )
    preset = {} if body.preset is None else PRESETS[body.preset]
    if preset and body.quality not in (None, "auto"):
        raise ValueError(f"Give either quality ({body.quality}) or preset ({body.preset}): both say how many steps.")
    steps = body.steps or preset.get("num_inference_steps") or STEPS_OF_QUALITY[body.quality]
    if steps > settings.max_paint_steps:
        raise ValueError(f"steps is {steps}, more than the {settings.max_paint_steps} allowed.")
    guidance = body.guidance_scale if body.guidance_scale is not None else preset.get("guidance_scale", 7.5)
    return DrawingSettings(body.n or 1, height, width, steps, guidance, preset.get("scheduler"))
