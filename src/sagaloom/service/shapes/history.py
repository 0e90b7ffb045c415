"""The history of a run."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Raw, UnsetType

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import Disposition, EffectSummary, HistoryEntry, Instance, Origin, StepRecord
from sagaloom.ids import instance_id
from sagaloom.service.shapes.shape import Shape, Time, if_known, json_if, json_of
from sagaloom.web.routes import wire_time


class EffectView(Shape, frozen=True, kw_only=True, omit_defaults=True):
    """An effect: its kind, where it goes, and the key under which it leaves, if it does."""

    kind: str
    target: str | None = None
    effect_key: str | None = None
    detail: str | None = None


class StepView(Shape, frozen=True, kw_only=True):
    """One moment of a decision: which handler ran, on what type, what it asked for, and the status after it."""

    phase: Literal["handle", "compensate", "skip"]
    type: str
    status: SagaInstanceStatus
    effects: Sequence[EffectView]


class HistoryEntryView(Shape, frozen=True, kw_only=True):
    """What one message did to one run. `previousState` and `newState` are kept by sagas of tier t2 and above; below
    that `newState` is null."""

    id: str
    saga_name: str
    saga_id: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    entry_no: int
    revision: int
    message_type: str
    message_id: str
    payload: Raw
    disposition: Disposition
    outcome: Annotated[
        Literal["success", "compensated", "skipped", "error"], Meta(description="The disposition in one word of four.")
    ]
    previous_status: SagaInstanceStatus
    new_status: SagaInstanceStatus
    new_state: Raw
    transition_at: Time
    attempt: int
    origin: Origin
    definition_version: int
    steps: Sequence[StepView]
    effects: Annotated[Sequence[EffectView], Meta(description="The effects of all steps, in order.")]
    previous_state: Raw | UnsetType = UNSET
    answer: Annotated[Raw | UnsetType, Meta(description="What the handler of an update answered.")] = UNSET
    refusal: Annotated[
        Raw | UnsetType, Meta(description="The code, message and data with which the handler refused an update.")
    ] = UNSET
    reason: str | UnsetType = UNSET
    error: Annotated[str | UnsetType, Meta(description="The reason again, when the outcome is an error.")] = UNSET
    causation_id: str | UnsetType = UNSET
    traceparent: str | UnsetType = UNSET
    tracestate: str | UnsetType = UNSET


class HistoryList(Shape, frozen=True, kw_only=True):
    """A page of a run's history, oldest first. `cursor` is the `after` of the next page, null on the last one."""

    history: Sequence[HistoryEntryView]
    total: int
    limit: int
    cursor: int | None


def history_entry_view(instance: Instance, entry: HistoryEntry) -> HistoryEntryView:
    """One entry of the history of `instance`."""
    run_id = instance_id(instance.saga_id, instance.key, instance.run)
    outcome, said = _outcome_of(entry), entry.answer
    return HistoryEntryView(
        id=f"{run_id}#{entry.entry_no}",
        saga_name=instance.saga_id,
        saga_id=instance.saga_id,
        instance_id=run_id,
        correlation_id=instance.key,
        correlation_key=instance.key,
        run=instance.run,
        entry_no=entry.entry_no,
        revision=entry.revision,
        message_type=entry.type,
        message_id=entry.message_id,
        payload=json_of(entry.payload),
        disposition=entry.disposition,
        outcome=outcome,
        previous_status=entry.status_before,
        new_status=entry.status_after,
        new_state=json_of(entry.after),
        transition_at=_exact_time(entry.at),
        attempt=entry.attempt,
        origin=entry.origin,
        definition_version=entry.def_version,
        steps=[_step_view(step) for step in entry.steps],
        effects=[_effect_view(effect) for step in entry.steps for effect in step.effects],
        previous_state=json_if(entry.before),
        answer=UNSET if said is None or said.is_refused else Raw(said.content),
        refusal=Raw(said.content) if said is not None and said.is_refused else UNSET,
        reason=if_known(entry.reason),
        error=if_known(entry.reason if outcome == "error" else None),
        causation_id=if_known(entry.causation_id),
        traceparent=if_known(entry.traceparent),
        tracestate=if_known(entry.tracestate),
    )


def _exact_time(moment: datetime) -> str:
    """To the microsecond where there are any: handlers saw it, and a replay shows it to them again."""
    if moment.microsecond % 1000 == 0:
        return wire_time(moment)
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _outcome_of(entry: HistoryEntry) -> Literal["success", "compensated", "skipped", "error"]:
    if entry.disposition == "dead_lettered":
        return "error"
    if entry.disposition != "applied":
        return "skipped"
    return "compensated" if any(step.phase == "compensate" for step in entry.steps) else "success"


def _step_view(step: StepRecord) -> StepView:
    return StepView(
        phase=step.phase,
        type=step.type,
        status=step.status,
        effects=[_effect_view(effect) for effect in step.effects],
    )


def _effect_view(effect: EffectSummary) -> EffectView:
    return EffectView(kind=effect.kind, target=effect.target, effect_key=effect.effect_key, detail=effect.detail)
