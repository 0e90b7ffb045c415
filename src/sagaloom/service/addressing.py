"""How a path names an instance.

A correlation key may hold `/`, percent-encoded or not, so the routes of an instance are matched on the raw path:
`/instances/orders/a%2Fhistory` is the instance `a/history`, `/instances/orders/a/history` is the history of `a`.
"""

from __future__ import annotations

import re
from typing import Annotated, Final, NamedTuple
from urllib.parse import quote, unquote_to_bytes

from fastapi import Path
from fastapi.routing import APIRoute
from pydantic import Field
from starlette.routing import Match
from starlette.types import Scope

from sagaloom.errors import InstanceNotFound, MessageRejected
from sagaloom.ids import KEY_BYTES_MAX, check_key
from sagaloom.web.bodies import invalid, one_of_two
from sagaloom.web.routes import WebQuery

__all__ = [
    "API_PREFIX",
    "INSTANCE_PATH",
    "InstanceAddress",
    "InstanceQuery",
    "InstanceRoute",
    "RunNumber",
    "address_of_instance",
    "no_instance",
    "one_of_two",
]

API_PREFIX: Final = "/api/v1/sagas"
_COMMAND: Final = re.compile(r".+/(?:(?:signals|updates)/[^/]+|cancel|terminate|pause|resume|skip)")
"""What the rest of a path looks like that was meant as a command, and not as a key."""
INSTANCE_PATH: Final = f"{API_PREFIX}/instances/{{sagaName}}/{{correlationId:path}}"

RunNumber = Annotated[int | None, Field(ge=1, le=2**53, description="Which run; the newest one when left out.")]


class InstanceQuery(WebQuery):
    run: RunNumber = None


class InstanceAddress(NamedTuple):
    """A saga's id and a correlation key."""

    saga_id: str
    key: str


async def address_of_instance(
    saga_name: Annotated[str, Path(alias="sagaName")],
    correlation_id: Annotated[
        str,
        Path(
            alias="correlationId",
            description="The correlation key: 1 to 1024 bytes of UTF-8. It may hold `/`; one that ends in `/history`, "
            "or like another route of instances, is sent with `%2F`.",
            json_schema_extra={"pattern": "^[^\\u0000-\\u001f]+$", "maxLength": KEY_BYTES_MAX},
        ),
    ],
) -> InstanceAddress:
    """The instance that the percent-encoded path parameters name; raises `MessageRejected`."""
    try:
        saga_id, key = unquote_to_bytes(saga_name).decode(), unquote_to_bytes(correlation_id).decode()
    except UnicodeDecodeError:
        raise invalid(
            f"the path {saga_name!r:.80}/{correlation_id!r:.80} is not UTF-8 once decoded: percent-encode UTF-8 bytes",
            "correlationId",
        ) from None
    try:
        return InstanceAddress(saga_id, check_key(key))
    except MessageRejected as refused:
        raise invalid(refused.message, "correlationId") from None


class InstanceRoute(APIRoute):
    """Matches on the raw path, and leaves its parameters percent-encoded for `address_of_instance`."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http":
            return Match.NONE, {}
        raw_path: bytes | None = scope.get("raw_path")
        root_path: str = scope.get("root_path", "")
        whole = raw_path.decode("latin-1") if raw_path is not None else quote(scope["path"])
        path = whole.removeprefix(quote(root_path)) if root_path else whole
        match, child = super().matches({**scope, "path": path, "root_path": ""})
        if match is Match.PARTIAL and scope["method"] == "POST":
            # Commands to an instance are routes of their own; one that is not served is not found.
            return Match.NONE, {}
        return match, child


def no_instance(address: InstanceAddress, run: int | None) -> InstanceNotFound:
    """What a GET is told of an instance that is not there."""
    which = "" if run is None else f" run {run} of"
    hint = "; what is said to an instance is sent with POST" if _COMMAND.fullmatch(address.key) else ""
    return InstanceNotFound(
        f"there is no{which} instance {address.key!r:.80} of saga {address.saga_id!r:.80}: "
        f"GET {API_PREFIX}/instances?sagaName= lists those there are{hint}"
    )
