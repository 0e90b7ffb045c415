"""What all shapes have in common, and the parts that several of them show."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, TypeVar

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from sagaloom.engine.controls import REASON_LENGTH_MAX
from sagaloom.engine.records import Disposition
from sagaloom.runtime.bulk import Trouble
from sagaloom.web.routes import wire_time

Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
T = TypeVar("T")
Reason = Annotated[str, Meta(max_length=REASON_LENGTH_MAX)]


class Shape(Struct, frozen=True, kw_only=True, rename="camel"):
    pass


def wire_time_if(moment: datetime | None) -> str | UnsetType:
    return UNSET if moment is None else wire_time(moment)


def if_known(value: T | None) -> T | UnsetType:
    return UNSET if value is None else value


def json_of(data: bytes | None) -> Raw:
    return Raw(data or b"null")


def json_if(data: bytes | None) -> Raw | UnsetType:
    return Raw(data) if data else UNSET


class ControlView(Shape, frozen=True, kw_only=True):
    """What became of a command: `applied`, or `ignored` for the reason that is given."""

    disposition: Disposition
    reason: str | UnsetType = UNSET


class ControlBody(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why an operator does it: for the history, and for whoever watches."""

    reason: Reason | None = None


class TroubleView(Shape, frozen=True, kw_only=True):
    """A dead letter that was left as it is, and why."""

    id: str
    code: str
    message: str
    retryable: bool


def trouble_view(one: Trouble) -> TroubleView:
    return TroubleView(id=one.id, code=one.error.code, message=one.error.message, retryable=one.error.retryable)
