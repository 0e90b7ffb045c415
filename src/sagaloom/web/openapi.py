"""The OpenAPI 3.1 document of a door: parameters as FastAPI knows them, shapes as msgspec encodes them, and examples.

No route has a pydantic model of its body or its answer, so what these look like is written down here from the very
classes that encode them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from fastapi.openapi.utils import get_openapi
from starlette.routing import BaseRoute

from sagaloom.web.problems import STATUS_OF_CODE, Problem
from sagaloom.web.routes import Route

__all__ = ["ShapeBook", "header_parameter", "make_document"]

_JSON: Final = "application/json"
_SCHEMAS: Final = "#/components/schemas/"
_REASONS: Final[Mapping[int, str]] = {
    401: "The bearer token is missing or wrong.",
    403: "A browser may not send this, or the host name is not this machine's.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    409: "Not now, or not any more: `code` says why, `retryable` whether it can be tried again.",
    413: "The body or the payload is too large.",
    415: "The body is called something else than JSON.",
    422: "The request is not what it should be; `data` says where.",
    429: "Too many requests; `Retry-After` says when to come back.",
    500: "A mistake in your own code (`code` says where), or one that nobody expected: see the log, under `traceId`.",
    503: "The store or the runtime does not work right now; `Retry-After` says when to come back.",
}


class ShapeBook:
    """The schemas of all shapes of a document, and how its operations refer to them."""

    def __init__(self, shapes: Iterable[type], examples: Mapping[type, Any], *, needs_token: bool) -> None:
        self._examples = examples
        self._always = (401, 500) if needs_token else (403, 500)
        ordered = sorted({*shapes, Problem}, key=lambda shape: shape.__name__)
        references, schemas = msgspec.json.schema_components(ordered, ref_template=_SCHEMAS + "{name}")
        self._refs = dict(zip(ordered, references, strict=True))
        for schema in schemas.values():
            if "description" in schema:
                schema["description"] = " ".join(schema["description"].split())
        self.schemas: dict[str, Any] = dict(sorted(schemas.items()))

    def content(self, shape: type, media_type: str = _JSON) -> dict[str, Any]:
        """`shape` as the content of a body, with its example if it has one."""
        content: dict[str, Any] = {"schema": self._refs[shape]}
        if shape in self._examples:
            content["example"] = self._examples[shape]
        return {media_type: content}

    def response(self, description: str, shape: type, media_type: str = _JSON) -> dict[str, Any]:
        """One answer."""
        return {"description": description, "content": self.content(shape, media_type)}

    def errors(self, statuses: Sequence[int]) -> dict[str, Any]:
        """The answers of these statuses, and of those that every route may give."""
        return {str(status): self._error(status) for status in sorted((*statuses, *self._always))}

    def _error(self, status: int) -> dict[str, Any]:
        code = next(code for code, known in STATUS_OF_CODE.items() if known == status)
        example = {
            "code": code,
            "message": _REASONS[status],
            "retryable": status in (408, 409, 429, 503),
            "traceId": "4bf92f3577b34da6a3ce929d0e0e4736",
        }
        response: dict[str, Any] = {
            "description": _REASONS[status],
            "content": {_JSON: {"schema": self._refs[Problem], "example": example}},
        }
        if status in (429, 503):
            response["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
        return response


def make_document(
    routes: Sequence[BaseRoute],
    answers: Sequence[Route],
    book: ShapeBook,
    *,
    summary: str,
    tags: Sequence[str],
    needs_token: bool,
) -> dict[str, Any]:
    """The document for the FastAPI `routes`, which answer as `answers` says."""
    document = get_openapi(
        title="sagaloom",
        version=version("sagaloom"),
        openapi_version="3.1.0",
        summary=summary,
        description="Errors have one shape, `Problem`; its `code` is one of " + ", ".join(sorted(STATUS_OF_CODE)) + ".",
        routes=routes,
        tags=[{"name": name} for name in tags],
    )
    # Its own schemas for validation errors are shapes that no door answers with.
    document["components"] = {"schemas": book.schemas}
    for route in answers:
        operation = document["paths"][route.path][route.method.lower()]
        responses = {str(route.status): book.response("OK", route.answer, route.media_type)}
        if route.refused_with_answer is not None:
            responses[str(route.refused_with_answer)] = book.response("Not ready.", route.answer)
        operation["responses"] = {**responses, **book.errors(route.errors)}
        if route.headers:
            operation.setdefault("parameters", []).extend(header_parameter(*header) for header in route.headers)
        if route.body is not None:
            operation["requestBody"] = {"required": route.requires_body, "content": book.content(route.body)}
        for parameter in operation.get("parameters", ()):
            _drop_null(parameter["schema"])
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
        document["paths"]["/health/live"]["get"]["security"] = []
    return document


def _drop_null(schema: dict[str, Any]) -> None:
    """A parameter that is not given is left out; no text stands for null."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema.update(kinds[0])


def header_parameter(name: str, description: str) -> dict[str, Any]:
    """A header that an operation reads."""
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string"}}
