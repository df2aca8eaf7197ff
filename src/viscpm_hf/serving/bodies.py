"""JSON bodies: bounded before they are read, checked where that holds up nobody, and errors in the API's own terms."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from .settings import ServerSettings
from .waiting import Places


Model = TypeVar("Model", bound=BaseModel)

# Smaller ones are read at once: there is less in them to do than in changing to another thread.
MAX_BYTES_AT_ONCE = 16 * 1024
# Of strings; a text of the greatest length may be written in nothing but these.
MAX_ESCAPES = 2**20
MAX_NAME = 100
# Parts of an error's place that are no names of the API; see `schemas.py`.
TAG = "<"

_BRACKETS = re.compile(rb"[\[\]{}]")


class BodyError(ValueError):
    """The request's body can't be used; the message says why."""

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.status = status


def body_of(model: type[Model], settings: ServerSettings, places: Places) -> Any:
    """The dependency of a route: its body as a `model`. The route says so with [`documented`] too."""

    async def read(request: Request) -> Model:
        check_headers(request.headers.get("content-type"), request.headers.get("content-encoding"))
        data = b"".join([part async for part in request.stream()])  # not `body`, which keeps it
        if len(data) <= MAX_BYTES_AT_ONCE:
            return parse(model, data, settings)
        return await places.run(parse, model, data, settings)

    return Depends(read)


def documented(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes a body."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    return {"requestBody": {"required": True, "content": content}}


def check_headers(content_type: str | None, encoding: str | None) -> None:
    """A page of another origin can send other types without being asked whether it may, so there is but one.

    Raises:
        BodyError: for a body that isn't said to be JSON, or is compressed.
    """
    kind = (content_type or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        got = f"is {content_type[:MAX_NAME]!r}" if content_type else "is missing"
        raise BodyError(f"The header Content-Type {got}: send application/json.", status=415)
    if (encoding or "identity").strip().lower() != "identity":
        raise BodyError(
            f"The body is compressed (Content-Encoding: {encoding[:MAX_NAME]!r}), which this server doesn't read: "
            "send it as it is.",
            status=415,
        )


def parse(model: type[Model], data: bytes, settings: ServerSettings) -> Model:
    """Raises `BodyError`."""
    if not data.strip():
        raise BodyError("The body is empty: send a JSON object.")
    check_structure(data, settings.max_json_items, settings.max_json_depth)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise body_error(error) from None  # which holds the whole body


def check_structure(data: bytes, max_items: int, max_depth: int) -> None:
    """Counts what there is to look at, no further than it may go.

    Raises:
        BodyError: if that is too much, or too deep.
    """
    if data.count(b"\\") > MAX_ESCAPES:
        raise BodyError(f"The body has more than the {MAX_ESCAPES:,} escapes (\\) that are allowed.")
    place = count = depth = 0
    while place < len(data):
        quote = data.find(b'"', place)
        end = len(data) if quote < 0 else quote
        between = data[place:end]
        count += between.count(b",") + between.count(b":") + (quote >= 0)
        for bracket in _BRACKETS.finditer(between):
            count += 1
            depth += 1 if bracket[0] in b"[{" else -1
            if depth > max_depth:
                raise BodyError(f"The body has more than the {max_depth:,} brackets within brackets that are allowed.")
            if count > max_items:
                break
        if count > max_items:
            raise BodyError(f"The body has more than the {max_items:,} fields, values and brackets that are allowed.")
        place = len(data) if quote < 0 else _end_of_string(data, quote + 1)


def _end_of_string(data: bytes, place: int) -> int:
    while (quote := data.find(b'"', place)) >= 0:
        first = quote
        while data[first - 1] == 0x5C and first > place:
            first -= 1
        place = quote + 1
        if (quote - first) % 2 == 0:  # not escaped
            return place
    return len(data)


# ------------------------------------------------------------------------------------------------------------- errors


def body_error(error: ValidationError) -> BodyError:
    """The first thing that is wrong, as a sentence; how many more there are."""
    entries = error.errors(include_url=False, include_context=True, include_input=False)
    first, others = entries[0], len(entries) - 1
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(TAG))[:MAX_NAME]
    more = f" ({others:,} more errors)" if others > 1 else " (1 more error)" if others else ""
    text = _sentence(first)
    return BodyError(f"{place}: {text}{more}"[:500] if place else f"{text}{more}"[:500], param=place or None)


def _sentence(entry: dict[str, Any]) -> str:
    kind, context = entry["type"], entry.get("ctx", {})
    if kind == "json_invalid":
        return f"The body is no valid JSON: {context.get('error', 'it ends too soon')}."
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return "A JSON object is needed here." if entry["loc"] else "The body is no JSON object."
    if kind == "extra_forbidden":
        return "There is no such field in this API: leave it out."
    if kind == "missing":
        return "This field is missing."
    if kind == "value_error":
        return str(context["error"])
    return entry["msg"]
