"""Routes with parameters that FastAPI checks and answers that msgspec encodes, and the words their parameters share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
from fastapi import APIRouter, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

__all__ = [
    "Limit",
    "Route",
    "RouteTable",
    "Text",
    "Texts",
    "WebQuery",
    "drop_blank",
    "drop_blanks",
    "json_response",
    "wire_time",
]

F = TypeVar("F", bound=Callable[..., Any])


class Route(NamedTuple):
    """What the OpenAPI document says of a route beside its parameters."""

    method: str
    path: str
    answer: type
    errors: tuple[int, ...]
    status: int = 200
    refused_with_answer: int | None = None
    """A status of failure that comes with the shape of the answer, not with that of an error."""
    body: type | None = None
    """What may be sent; a body that is left out is an empty object, unless the route requires one."""
    requires_body: bool = False
    media_type: str = "application/json"
    """Of the answer. A `text/event-stream` has the answer's shape as the data of each event."""
    headers: tuple[tuple[str, str], ...] = ()
    """Names and descriptions of headers that are read."""


class RouteTable:
    """Adds routes to `router` and remembers what they answer."""

    def __init__(self, router: APIRouter) -> None:
        self._router = router
        self.routes: list[Route] = []

    def add(
        self,
        method: Literal["GET", "POST", "PATCH", "DELETE"],
        path: str,
        *,
        answer: type,
        tag: str,
        errors: tuple[int, ...] = (),
        refused_with_answer: int | None = None,
        body: type | None = None,
        requires_body: bool = False,
        is_documented: bool = True,
        route_class: type[APIRoute] = APIRoute,
        status: int = 200,
        headers: tuple[tuple[str, str], ...] = (),
        media_type: str = "application/json",
    ) -> Callable[[F], F]:
        """Serves `path` by the decorated coroutine, which reads the body itself when there is one."""

        def decorate(endpoint: F) -> F:
            name = endpoint.__name__.lstrip("_")
            self._router.add_api_route(
                path,
                endpoint,
                methods=[method],
                tags=[tag],
                response_class=Response,
                response_model=None,
                operation_id=to_camel(name),
                summary=name.replace("_", " ").capitalize(),
                include_in_schema=is_documented,
                route_class_override=route_class,
            )
            if is_documented:
                shown = path.replace(":path}", "}")
                route = Route(
                    method,
                    shown,
                    answer,
                    errors,
                    status,
                    refused_with_answer,
                    body=body,
                    requires_body=requires_body,
                    media_type=media_type,
                    headers=headers,
                )
                self.routes.append(route)
            return endpoint

        return decorate


def json_response(content: object, status: int = 200) -> Response:
    """`content` as JSON."""
    return Response(msgspec.json.encode(content), status, media_type="application/json")


def wire_time(moment: datetime) -> str:
    """`moment` as `2026-01-31T12:00:00.000Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# --- Parameters ------------------------------------------------------------------------------------------------------


def drop_blank(value: object) -> object:
    """An empty parameter, as forms send it, is one that was not given."""
    return None if value == "" else value


def drop_blanks(values: list[str]) -> list[str]:
    """`drop_blank`, for a parameter that may be repeated."""
    return [one for one in values if one]


Limit = Annotated[int, Field(ge=1, le=1000)]
Text = Annotated[str | None, BeforeValidator(drop_blank)]
Texts = Annotated[list[str], BeforeValidator(drop_blanks)]


class WebQuery(BaseModel):
    """The query parameters of a route, camelCase on the wire."""

    # A misspelt filter that is quietly ignored answers with everything, which looks like a result.
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=False)
