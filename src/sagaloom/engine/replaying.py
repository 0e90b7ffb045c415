"""Replaying the history of a run against another definition: which of its messages would be decided differently.

Each message that was applied is decided once more, on the state that history says it found, at the time at which it was
decided. What comes out is compared with what history says came out. Each entry starts from what is recorded, never from
what the one before it came to here, so one difference does not drag others behind it.

Only tiers from t2 on keep the states. What history does not keep is not compared: the payloads of effects (their kinds,
targets and keys are), and whether a correlation rule would still give the same key. Messages that were ignored or given
up are passed over.

What we dislike about it: timers and applied steps are folded from what is decided here, since no entry has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec

from sagaloom.definitions import SagaDefinition
from sagaloom.engine.decide import DecideContext, decide
from sagaloom.engine.limits import Limits
from sagaloom.engine.records import Decision, Envelope, Head, HistoryEntry, Instance
from sagaloom.errors import SagasError
from sagaloom.ids import key_hash, partition_of

__all__ = ["Difference", "ReplayRefused", "Replayed", "replay"]

_NO_STATES: Final = "SAGA_HISTORY_WITHOUT_STATES"


class ReplayRefused(SagasError):
    """A history that cannot be replayed."""

    default_code = "SAGA_REPLAY_REFUSED"
    default_retryable = False


class Difference(NamedTuple):
    """One thing about an entry that would be different: `recorded` then, `decided` now."""

    what: str
    recorded: Any
    decided: Any


class Replayed(NamedTuple):
    """What became of one entry, with the state it found (None for the first message of a run). No `differences`: the
    same as then."""

    entry: HistoryEntry
    before: Any
    differences: tuple[Difference, ...] = ()


def replay(definition: SagaDefinition[Any], instance: Instance, entries: Iterable[HistoryEntry]) -> Iterator[Replayed]:
    """Each applied entry of the history of `instance`, oldest first, decided by `definition`. Raises `ReplayRefused`
    for a history without states."""
    head = Head(
        instance.saga_id,
        instance.key,
        instance.pk,
        partition_of(key_hash(instance.saga_id, instance.key)),
        instance.run - 1,
        instance.created_at,
    )
    known: Instance | None = None
    for entry in entries:
        if entry.disposition != "applied":
            continue
        if entry.after is None:
            raise ReplayRefused(
                f"entry {entry.entry_no} of {instance.saga_id}:{instance.key} has no states: history keeps them from "
                '.durability("t2") on',
                code=_NO_STATES,
            )
        before = None if entry.status_before == "pending" else _as_recorded(instance, known, entry)
        here = msgspec.structs.replace(head, run=instance.run if before is not None else instance.run - 1)
        decision = decide(definition, before, _envelope_of(instance, entry), DecideContext(entry.at, here, Limits()))
        yield Replayed(entry, _decoded(before.state if before is not None else None), _compared(entry, decision))
        known = _as_left(instance, entry, decision)


def _as_recorded(instance: Instance, known: Instance | None, entry: HistoryEntry) -> Instance:
    """The run as `entry` found it."""
    return msgspec.structs.replace(
        known if known is not None else instance,
        status=entry.status_before,
        revision=entry.revision - 1,
        state=entry.before if entry.before is not None else b"null",
        def_version=entry.def_version if known is None else known.def_version,
        entries=entry.entry_no - 1,
        result=None,
        ended_at=None,
        completed_at=None,
    )


def _as_left(instance: Instance, entry: HistoryEntry, decision: Decision) -> Instance:
    """The run as `entry` left it, with the timers and steps that it has here."""
    decided = decision.instance
    return msgspec.structs.replace(
        decided if decided is not None else instance,
        status=entry.status_after,
        revision=entry.revision,
        state=entry.after if entry.after is not None else b"null",
        def_version=entry.def_version,
        entries=entry.entry_no,
    )


def _envelope_of(instance: Instance, entry: HistoryEntry) -> Envelope:
    return Envelope(
        instance.saga_id,
        instance.key,
        entry.type,
        entry.message_id,
        entry.payload,
        entry.at,
        entry.origin,
        opens_run=entry.status_before == "pending",
        dedupe_key=entry.message_id,
        correlation_key=instance.key,
        traceparent=entry.traceparent,
        tracestate=entry.tracestate,
        causation_id=entry.causation_id,
        parent=instance.parent if entry.status_before == "pending" else None,
        attempt=entry.attempt - 1,
    )


def _compared(entry: HistoryEntry, decision: Decision) -> tuple[Difference, ...]:
    if decision.disposition != "applied" or decision.instance is None or decision.entry is None:
        why = decision.error or decision.reason
        return (Difference("disposition", "applied", f"{decision.disposition}: {why}"),)
    found: list[Difference] = []
    if decision.instance.status != entry.status_after:
        found.append(Difference("status", entry.status_after, decision.instance.status))
    recorded, decided = _decoded(entry.after), _decoded(decision.instance.state)
    if recorded != decided:
        found.append(Difference("state", recorded, decided))
    then = [_told(step.phase, step.type, effect) for step in entry.steps for effect in step.effects]
    now = [_told(step.phase, step.type, effect) for step in decision.entry.steps for effect in step.effects]
    if then != now:
        found.append(Difference("effects", then, now))
    if decision.reason != entry.reason:
        found.append(Difference("reason", entry.reason, decision.reason))
    return tuple(found)


def _told(phase: str, message_type: str, effect: Any) -> str:
    where = "" if phase == "handle" else f" ({phase} {message_type})"
    detail = f": {effect.detail}" if effect.detail else ""
    return f"{effect.kind} {effect.target or ''}".rstrip() + detail + where


def _decoded(state: bytes | None) -> Any:
    return None if state is None else msgspec.json.decode(state)
