"""What must hold of a saga as a whole, which only its `.build()` can see."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Any, cast

from sagaloom.builder.notes import Notes
from sagaloom.builder.rules import listed
from sagaloom.codec import Codec
from sagaloom.definitions import ANY_TYPE
from sagaloom.errors import DefinitionError, SagasError

_A_MOMENT = datetime(2000, 1, 1, tzinfo=UTC)


def check_what_it_sends(notes: Notes) -> None:
    """Raises unless the saga handles its own tick and timeouts, as they will come."""
    schedule = notes.schedule
    if schedule is not None:
        _check_taken(notes, f"schedule {schedule.cron!r}", schedule.message_type, schedule.payload_at(_A_MOMENT))
        has_key = (
            schedule.correlation_key is not None
            or notes.is_singleton
            or not notes.correlations.keys().isdisjoint((ANY_TYPE, schedule.message_type))
        )
        if not has_key and not notes.handlers[schedule.message_type].starts:
            raise DefinitionError(
                f"{notes.where}: its tick {schedule.message_type!r} starts no instance and names none: let it start "
                "one (starts=True), make the saga a .singleton(), or give the tick a correlation_key"
            )
    for timeout in notes.timeouts:
        _check_taken(notes, f"timeout {timeout.name!r}", timeout.message_type, timeout.payload)


def check_statuses(notes: Notes, codec: Codec[Any]) -> None:
    """Raises unless the state has the status that handlers are bound to, and one of its own to start with."""
    bound = [binding for binding in notes.handlers.values() if binding.during is not None]
    if not bound:
        return
    initial: object = codec.decode(notes.initial_json)
    if isinstance(initial, Mapping):
        status = cast("Mapping[str, object]", initial).get(notes.status_field)
    else:
        status = getattr(initial, notes.status_field, None)
    status = status.value if isinstance(status, Enum) else status
    if not isinstance(status, str):
        raise DefinitionError(
            f"{notes.where}: .during({next(iter(bound[0].during or ()))!r}, {bound[0].type!r}) goes by the state's "
            f"field {notes.status_field!r}, and the initial state has {status!r:.80} there: give it a string, or name "
            "another field with .state(initial, status_field=...)"
        )
    for binding in bound:
        during = list(binding.during or ())
        if binding.starts and status not in during:
            raise DefinitionError(
                f"{notes.where}: {binding.type!r} is to start an instance, whose {notes.status_field} is {status!r} "
                f"then, and has handlers during {listed(during)} only: add one for {status!r}"
            )


def _check_taken(notes: Notes, what: str, message_type: str, payload: bytes) -> None:
    binding = notes.handlers.get(message_type)
    if binding is None:
        raise DefinitionError(
            f"{notes.where}: {what} sends {message_type!r}, which no handler takes: add "
            f".on({message_type!r}, handler), or name another message (it handles {listed(list(notes.handlers))})"
        )
    try:
        binding.codec.decode(payload)
    except SagasError as error:
        raise DefinitionError(
            f"{notes.where}: {what} sends {message_type!r} with {payload.decode()!r:.200}, which its handler cannot "
            f"take: {error.message}"
        ) from error
