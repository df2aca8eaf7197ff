"""`/openapi.json`, and the page `/docs` that shows it."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from pydantic.json_schema import models_json_schema
from starlette.staticfiles import StaticFiles
from swagger_ui_bundle import swagger_ui_path

from .schemas import ChatCompletionRequest, ImagesRequest, ViscpmRequest


# Bodies are read by ourselves (`bodies.py`), so FastAPI doesn't know of them.
BODIES = (ChatCompletionRequest, ViscpmRequest, ImagesRequest)


def add_documentation(app: FastAPI) -> None:
    """`/docs`, with its scripts from here: the page asks no other host for anything."""
    app.mount("/docs/static", StaticFiles(directory=swagger_ui_path), name="docs-static")
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = make()
            _, bodies = models_json_schema(
                [(model, "validation") for model in BODIES], ref_template="#/components/schemas/{model}"
            )
            named = made.setdefault("components", {}).setdefault("schemas", {})
            for name, schema in bodies["$defs"].items():
                named.setdefault(name, schema)
            for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which nobody gets to see
                named.pop(name, None)
            for operations in made["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = as_openapi_3_0({**made, "openapi": "3.0.3"})
        return app.openapi_schema

    app.openapi = openapi

    @app.get("/docs", include_in_schema=False)
    async def docs():
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="viscpm-hf",
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
            swagger_favicon_url="/docs/static/favicon-32x32.png",
        )


def as_openapi_3_0(schema: Any) -> Any:
    """What pydantic writes for OpenAPI 3.1 in the terms of 3.0, which the packaged page and older clients read.

    Null is a property of a schema there, not a type; limits that are themselves not allowed are marked by a flag; a
    single value is an enumeration.
    """
    if isinstance(schema, list):
        return [as_openapi_3_0(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: as_openapi_3_0(entry) for name, entry in schema.items()}
    for name in ("anyOf", "oneOf"):
        branches = schema.get(name)
        if not isinstance(branches, list):
            continue
        others = [branch for branch in branches if branch != _NULL]
        if len(others) < len(branches):
            del schema[name]
            schema["nullable"] = True
            schema |= {name: others} if len(others) > 1 else {"allOf": others} if "$ref" in others[0] else others[0]
    if schema.get("type") == "null":
        del schema["type"]
        schema |= _NULL
    if "const" in schema:
        schema["enum"] = [schema.pop("const")]
    for name, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(schema.get(name), (int, float)) and not isinstance(schema[name], bool):
            schema[bound], schema[name] = schema[name], True
    return schema


_NULL = {"nullable": True, "enum": [None]}
