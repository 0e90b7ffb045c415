"""What goes over the wire: the JSON shapes of the HTTP API, and how records become them.

Names are camelCase, times ISO 8601 in UTC with milliseconds, what is not known is left out. State, results and payloads
are passed through as the JSON they are stored as, byte for byte, and nothing is ever written into them.

`sagaName` is the saga's id. `correlationId` and `correlationKey` are two spellings of one key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from sagaloom.definitions import SagaDefinition, SagaDurabilityTier, SagaInstanceStatus
from sagaloom.describe import describe
from sagaloom.engine.controls import REASON_LENGTH_MAX
from sagaloom.engine.records import (
    AppliedStep,
    Child,
    ChildStatus,
    DeadLetter,
    Disposition,
    EffectSummary,
    HistoryEntry,
    Instance,
    OnParentCancel,
    Origin,
    StepRecord,
    Undoing,
)
from sagaloom.ids import instance_id
from sagaloom.runtime.bulk import BulkResult, Trouble
from sagaloom.runtime.evolution import MigrationPage
from sagaloom.runtime.receipts import Outcome, PublishReceipt, QueryResult, SignalReceipt, UpdateReceipt
from sagaloom.runtime.scheduler import ScheduleStatus
from sagaloom.runtime.timers import WaitingTimer
from sagaloom.web.problems import Problem
from sagaloom.web.routes import wire_time

__all__ = [
    "BatchItem",
    "BulkAnswer",
    "BulkBody",
    "CompensationView",
    "ConcurrencyView",
    "ControlBody",
    "DeadLetterList",
    "DeadLetterView",
    "Description",
    "EffectView",
    "GraphEdge",
    "GraphNode",
    "HandledTypeView",
    "HealthView",
    "HistoryEntryView",
    "HistoryList",
    "InstanceList",
    "InstanceView",
    "MoveTimerBody",
    "OutcomeView",
    "ParentView",
    "PublishAnswer",
    "PublishBatchAnswer",
    "PublishBatchBody",
    "PublishBody",
    "QueryAnswer",
    "QueryView",
    "RetryView",
    "SagaGraph",
    "SagaList",
    "SagaView",
    "ScheduleList",
    "ScheduleStatusView",
    "ScheduleView",
    "SignalAnswer",
    "SignalBody",
    "SignalView",
    "StepView",
    "StoreView",
    "TakenBy",
    "TimeoutView",
    "TimerChange",
    "TimerList",
    "TimerView",
    "TroubleView",
    "UpdateAnswer",
    "bulk_answer",
    "dead_letter_view",
    "history_entry_view",
    "instance_view",
    "payload_of",
    "publish_answer",
    "query_answer",
    "saga_view",
    "schedule_view",
    "signal_answer",
    "timer_change",
    "timer_view",
    "update_answer",
]

Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]
T = TypeVar("T")


def _wire_time_if(moment: datetime | None) -> str | UnsetType:
    return UNSET if moment is None else wire_time(moment)


def _if_known(value: T | None) -> T | UnsetType:
    return UNSET if value is None else value


def _json(data: bytes | None) -> Raw:
    return Raw(data or b"null")


def _json_if(data: bytes | None) -> Raw | UnsetType:
    return Raw(data) if data else UNSET


class _Shape(Struct, frozen=True, kw_only=True, rename="camel"):
    pass


# --- Publishing ------------------------------------------------------------------------------------------------------


class PublishBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A message. Unknown fields are refused: a misspelt `idempotencyKey` would otherwise make every retry a new
    message."""

    type: Annotated[str, Meta(min_length=1, description="The message type; a loaded saga must handle it.")]
    payload: Annotated[
        Raw | UnsetType, Meta(description="The business data: an object, unless the saga declares otherwise.")
    ] = UNSET
    correlation_id: Annotated[
        str | None, Meta(description="Names the instance, 1 to 1024 bytes, unless the saga has a rule of its own.")
    ] = None
    correlation_key: Annotated[
        str | None, Meta(description="Another spelling of correlationId; both together must agree.")
    ] = None
    idempotency_key: Annotated[
        str | None, Meta(description="Makes a repeat a duplicate; the Idempotency-Key header says the same.")
    ] = None
    concurrency_key: str | None = None
    message_id: Annotated[str | None, Meta(description="The message's own id; made up when left out.")] = None
    occurred_at: Annotated[
        Annotated[datetime, Meta(tz=True)] | None,
        Meta(description="When it happened, with a zone. Never used for ordering."),
    ] = None
    topic: Annotated[str | None, Meta(description="Taken for compatibility; messages are routed by type.")] = None
    traceparent: Annotated[str | None, Meta(description="W3C trace context; the traceparent header says the same.")] = (
        None
    )
    tracestate: str | None = None


class TakenBy(_Shape, frozen=True, kw_only=True):
    """A run that takes the message."""

    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int


class OutcomeView(_Shape, frozen=True, kw_only=True):
    """What the message did to one run. `pending`: safe, but not applied when the wait ended."""

    instance_id: str
    saga_id: str
    correlation_id: str
    correlation_key: str
    run: int
    disposition: Disposition
    effects: Sequence[str]
    status: SagaInstanceStatus | UnsetType = UNSET
    revision: int | UnsetType = UNSET
    state: Any = UNSET
    result: Any = UNSET
    reason: str | UnsetType = UNSET


class PublishAnswer(_Shape, frozen=True, kw_only=True):
    """The message is durable. `duplicate`: it was before, and nothing changed. `outcomes` comes with `?wait=`."""

    published: bool
    message_type: str
    message_id: str
    duplicate: bool
    instances: Sequence[TakenBy]
    correlation_id: str | UnsetType = UNSET
    correlation_key: str | UnsetType = UNSET
    outcomes: Sequence[OutcomeView] | UnsetType = UNSET


def publish_answer(receipt: PublishReceipt, *, with_outcomes: bool) -> PublishAnswer:
    """What a publisher gets for its receipt."""
    key = _if_known(receipt.correlation_key)
    return PublishAnswer(
        published=True,
        message_type=receipt.message_type,
        message_id=receipt.message_id,
        duplicate=receipt.duplicate,
        instances=[
            TakenBy(
                saga_name=one.saga_id,
                instance_id=one.instance_id,
                correlation_id=one.correlation_key,
                correlation_key=one.correlation_key,
                run=one.run,
            )
            for one in receipt.outcomes
        ],
        correlation_id=key,
        correlation_key=key,
        outcomes=[_outcome_view(one) for one in receipt.outcomes] if with_outcomes else UNSET,
    )


def _outcome_view(outcome: Outcome) -> OutcomeView:
    is_known = outcome.status is not None
    return OutcomeView(
        instance_id=outcome.instance_id,
        saga_id=outcome.saga_id,
        correlation_id=outcome.correlation_key,
        correlation_key=outcome.correlation_key,
        run=outcome.run,
        disposition=outcome.disposition,
        effects=outcome.effects,
        status=_if_known(outcome.status),
        revision=_if_known(outcome.revision),
        state=outcome.state if is_known else UNSET,
        result=_if_known(outcome.result),
        reason=_if_known(outcome.reason),
    )


class PublishBatchBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Many messages, which are taken in together and in this order."""

    messages: Annotated[Sequence[PublishBody], Meta(description="At most 1000.", max_length=1000)]


class BatchItem(_Shape, frozen=True, kw_only=True):
    """What became of one message: a receipt with status 202, or an error with the status that it would have had
    alone."""

    status: int
    receipt: PublishAnswer | UnsetType = UNSET
    error: Problem | UnsetType = UNSET


class PublishBatchAnswer(_Shape, frozen=True, kw_only=True):
    """What became of each message, in the order in which they were sent. Those that were accepted are durable,
    whatever happened to the others."""

    accepted: int
    refused: int
    results: Sequence[BatchItem]


# --- Speaking to one instance ----------------------------------------------------------------------------------------


class SignalBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is said to an instance."""

    payload: Annotated[Raw | UnsetType, Meta(description="What the signal takes; null when left out.")] = UNSET
    id: Annotated[
        str | None, Meta(description="Makes a repeat a duplicate; the Idempotency-Key header says the same.")
    ] = None


class SignalAnswer(_Shape, frozen=True, kw_only=True):
    """The signal is durable. `pending`: it waits for its turn; `duplicate`: it was sent before."""

    signal: str
    message_id: str
    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    disposition: Disposition
    status: SagaInstanceStatus | UnsetType = UNSET
    revision: int | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class UpdateAnswer(_Shape, frozen=True, kw_only=True):
    """What an update's handler answered. `pending`: not yet; `duplicate`: it was sent before, and this was answered
    then."""

    update: str
    message_id: str
    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    disposition: Disposition
    duplicate: bool
    answer: Any
    status: SagaInstanceStatus | UnsetType = UNSET
    revision: int | UnsetType = UNSET
    reason: str | UnsetType = UNSET


class QueryAnswer(_Shape, frozen=True, kw_only=True):
    """What a query says, and of what run at what revision (`version`)."""

    query: str
    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    status: SagaInstanceStatus
    version: int
    answer: Raw


def payload_of(body: SignalBody) -> Raw:
    return Raw(b"null") if isinstance(body.payload, UnsetType) else body.payload


def signal_answer(receipt: SignalReceipt) -> SignalAnswer:
    """What the sender of a signal gets."""
    return SignalAnswer(
        signal=receipt.signal,
        message_id=receipt.message_id,
        saga_name=receipt.saga_id,
        instance_id=receipt.instance_id,
        correlation_id=receipt.correlation_key,
        correlation_key=receipt.correlation_key,
        run=receipt.run,
        disposition=receipt.disposition,
        status=_if_known(receipt.status),
        revision=_if_known(receipt.revision),
        reason=_if_known(receipt.reason),
    )


def update_answer(receipt: UpdateReceipt) -> UpdateAnswer:
    """What the sender of an update gets."""
    return UpdateAnswer(
        update=receipt.update,
        message_id=receipt.message_id,
        saga_name=receipt.saga_id,
        instance_id=receipt.instance_id,
        correlation_id=receipt.correlation_key,
        correlation_key=receipt.correlation_key,
        run=receipt.run,
        disposition=receipt.disposition,
        duplicate=receipt.duplicate,
        answer=receipt.answer,
        status=_if_known(receipt.status),
        revision=_if_known(receipt.revision),
        reason=_if_known(receipt.reason),
    )


def query_answer(result: QueryResult) -> QueryAnswer:
    """What whoever asks gets."""
    return QueryAnswer(
        query=result.query,
        saga_name=result.saga_id,
        instance_id=result.instance_id,
        correlation_id=result.correlation_key,
        correlation_key=result.correlation_key,
        run=result.run,
        status=result.status,
        version=result.revision,
        answer=result.answer,
    )


# --- Instances and their history -------------------------------------------------------------------------------------


class ParentView(_Shape, frozen=True, kw_only=True):
    """The run that spawned this one."""

    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int


class UndoingView(_Shape, frozen=True, kw_only=True):
    """What is left to undo of a run one of whose compensations has failed. While there is no `deadLetterId` it is being
    tried again by itself."""

    next_step: Annotated[str | None, Meta(description="The message type whose compensation comes next.")]
    steps_left: int
    ends_as: Annotated[SagaInstanceStatus | None, Meta(description="How the run ends then; null: it goes on.")]
    error: str | None
    dead_letter_id: str | None


class ControlView(_Shape, frozen=True, kw_only=True):
    """What became of a command: `applied`, or `ignored` for the reason that is given."""

    disposition: Disposition
    reason: str | UnsetType = UNSET


class ChildCounts(_Shape, frozen=True, kw_only=True):
    """How many children of each status a run has spawned."""

    live: int
    completed: int
    failed: int
    cancelled: int


class InstanceView(_Shape, frozen=True, kw_only=True):
    """One run of a saga. `version` is its revision. `completedAt` is there when it completed, `endedAt` when it ended
    in whatever way. `pending` with run 0: its first message is accepted and not applied yet."""

    saga_name: str
    saga_id: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    status: SagaInstanceStatus
    state: Annotated[Raw, Meta(description="The business state, exactly as the saga keeps it.")]
    version: int
    message_count: int
    durability_tier: SagaDurabilityTier
    is_paused: bool
    created_at: Time
    updated_at: Time
    completed_at: Time | UnsetType = UNSET
    ended_at: Time | UnsetType = UNSET
    result: Annotated[Raw | UnsetType, Meta(description="What the saga completed with.")] = UNSET
    reason: str | UnsetType = UNSET
    last_message_type: str | UnsetType = UNSET
    traceparent: Annotated[
        str | UnsetType, Meta(description="W3C trace context of the message that started the run.")
    ] = UNSET
    parent: ParentView | UnsetType = UNSET
    pivot: Annotated[
        str | UnsetType, Meta(description="The message type of its last point of no return, if it has passed one.")
    ] = UNSET
    undoing: UndoingView | UnsetType = UNSET
    children: Annotated[
        ChildCounts | UnsetType, Meta(description="There for a single run that has ever spawned any.")
    ] = UNSET
    control: Annotated[ControlView | UnsetType, Meta(description="There in answers to commands.")] = UNSET


class InstanceList(_Shape, frozen=True, kw_only=True):
    """A page of runs, newest first. `cursor` asks for the next page and is null on the last one."""

    instances: Sequence[InstanceView]
    total: Annotated[int, Meta(description="Exact up to 10000; there are at least so many when it is an estimate.")]
    total_is_estimate: bool
    limit: int
    offset: int
    cursor: str | None


def instance_view(
    instance: Instance,
    *,
    control: ControlView | UnsetType = UNSET,
    children: Mapping[ChildStatus, int] | None = None,
) -> InstanceView:
    """One run, as the wire shows it."""
    parent, undoing = instance.parent, instance.undoing
    return InstanceView(
        saga_name=instance.saga_id,
        saga_id=instance.saga_id,
        instance_id=instance_id(instance.saga_id, instance.key, instance.run),
        correlation_id=instance.key,
        correlation_key=instance.key,
        run=instance.run,
        status=instance.status,
        state=_json(instance.state),
        version=instance.revision,
        message_count=instance.message_count,
        durability_tier=instance.tier,
        is_paused=instance.is_paused,
        created_at=wire_time(instance.created_at),
        updated_at=wire_time(instance.updated_at),
        completed_at=_wire_time_if(instance.completed_at),
        ended_at=_wire_time_if(instance.ended_at),
        result=_json_if(instance.result),
        reason=_if_known(instance.reason),
        last_message_type=_if_known(instance.last_message_type),
        traceparent=_if_known(instance.traceparent),
        parent=UNSET
        if parent is None
        else ParentView(
            saga_name=parent.saga_id,
            instance_id=instance_id(parent.saga_id, parent.key, parent.run),
            correlation_id=parent.key,
            correlation_key=parent.key,
            run=parent.run,
        ),
        pivot=_if_known(instance.pivot),
        undoing=UNSET if undoing is None else _undoing_view(undoing, instance.steps),
        children=UNSET if children is None else child_counts(children),
        control=control,
    )


def child_counts(counts: Mapping[ChildStatus, int]) -> ChildCounts:
    return ChildCounts(
        live=counts["live"],
        completed=counts["completed"],
        failed=counts["failed"],
        cancelled=counts["cancelled"],
    )


class ChildView(_Shape, frozen=True, kw_only=True):
    """A run that another one has spawned. `status` is that of its instance, `pending` until its first message has been
    applied. It has no `instanceId` while that message is a dead letter that names none."""

    saga_name: str
    instance_id: str | UnsetType = UNSET
    correlation_id: str | UnsetType = UNSET
    correlation_key: str | UnsetType = UNSET
    run: int | UnsetType = UNSET
    status: SagaInstanceStatus
    on_parent_cancel: OnParentCancel
    effect_key: str
    spawned_at: Time
    ended_at: Time | UnsetType = UNSET


class ChildList(_Shape, frozen=True, kw_only=True):
    """A page of the children of one run, in the order of their spawning. `cursor` asks for the next page and is null on
    the last one."""

    children: Sequence[ChildView]
    counts: ChildCounts
    limit: int
    cursor: str | None


def child_view(child: Child, instance: Instance | None) -> ChildView:
    """One child, with what is known of its run if that is live."""
    live = instance if instance is not None and _is_of(child, instance) else None
    status: SagaInstanceStatus = child.status if child.status != "live" else "pending" if live is None else live.status
    run = child.run or (live.run if live is not None else 0)
    has_key = bool(child.key)
    return ChildView(
        saga_name=child.saga_id,
        instance_id=instance_id(child.saga_id, child.key, run) if has_key else UNSET,
        correlation_id=child.key if has_key else UNSET,
        correlation_key=child.key if has_key else UNSET,
        run=run or UNSET,
        status=status,
        on_parent_cancel=child.on_parent_cancel,
        effect_key=child.effect_key,
        spawned_at=wire_time(child.spawned_at),
        ended_at=_wire_time_if(child.ended_at),
    )


def _is_of(child: Child, instance: Instance) -> bool:
    return instance.parent is not None and instance.parent.effect_key == child.effect_key


def _undoing_view(undoing: Undoing, applied: Sequence[AppliedStep]) -> UndoingView:
    step = undoing.next_of(tuple(applied))
    return UndoingView(
        next_step=None if step is None else step.type,
        steps_left=len(undoing.asked) + (len(applied) if undoing.is_unwinding else 0),
        ends_as=undoing.ending,
        error=undoing.error,
        dead_letter_id=undoing.dead_letter_id,
    )


_Reason = Annotated[str, Meta(max_length=REASON_LENGTH_MAX)]


class ControlBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why an operator does it: for the history, and for whoever watches."""

    reason: _Reason | None = None


class CancelBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a run is cancelled, and whether its steps are undone first."""

    reason: _Reason | None = None
    compensate: bool = True


class SkipBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why a compensation is left out. With `step`, a message type, only if that one comes next."""

    reason: _Reason | None = None
    step: Annotated[str, Meta(max_length=1024)] | None = None


class EffectView(_Shape, frozen=True, kw_only=True, omit_defaults=True):
    """An effect: its kind, where it goes, and the key under which it leaves, if it does."""

    kind: str
    target: str | None = None
    effect_key: str | None = None
    detail: str | None = None


class StepView(_Shape, frozen=True, kw_only=True):
    """One moment of a decision: which handler ran, on what type, what it asked for, and the status after it."""

    phase: Literal["handle", "compensate", "skip"]
    type: str
    status: SagaInstanceStatus
    effects: Sequence[EffectView]


class HistoryEntryView(_Shape, frozen=True, kw_only=True):
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


class HistoryList(_Shape, frozen=True, kw_only=True):
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
        payload=_json(entry.payload),
        disposition=entry.disposition,
        outcome=outcome,
        previous_status=entry.status_before,
        new_status=entry.status_after,
        new_state=_json(entry.after),
        transition_at=_exact_time(entry.at),
        attempt=entry.attempt,
        origin=entry.origin,
        definition_version=entry.def_version,
        steps=[_step_view(step) for step in entry.steps],
        effects=[_effect_view(effect) for step in entry.steps for effect in step.effects],
        previous_state=_json_if(entry.before),
        answer=UNSET if said is None or said.is_refused else Raw(said.content),
        refusal=Raw(said.content) if said is not None and said.is_refused else UNSET,
        reason=_if_known(entry.reason),
        error=_if_known(entry.reason if outcome == "error" else None),
        causation_id=_if_known(entry.causation_id),
        traceparent=_if_known(entry.traceparent),
        tracestate=_if_known(entry.tracestate),
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


# --- Dead letters ----------------------------------------------------------------------------------------------------


class DeadLetterView(_Shape, frozen=True, kw_only=True):
    """A message or an effect that was given up. Payload, traceback and states come with a single one, not in lists."""

    id: str
    at: Time
    kind: Literal["message", "effect"]
    saga_name: str
    saga_id: str
    correlation_id: str
    correlation_key: str
    type: Annotated[str, Meta(description="The message type, or the target of the effect.")]
    message_id: str
    code: str
    reason: str
    attempts: int
    run: int | UnsetType = UNSET
    instance_id: str | UnsetType = UNSET
    target: Annotated[str | UnsetType, Meta(description="Of an effect: where it was to go, as kind:id.")] = UNSET
    effect_key: str | UnsetType = UNSET
    payload: Raw | UnsetType = UNSET
    traceback: str | UnsetType = UNSET
    state_before: Annotated[Raw | UnsetType, Meta(description="Of a broken invariant: the state as it was.")] = UNSET
    state_after: Annotated[Raw | UnsetType, Meta(description="Of a broken invariant: the state it refused.")] = UNSET


class BulkBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which dead letters: those of `ids`, or the oldest `limit` of a saga, of a key, or of `all`."""

    ids: Annotated[Sequence[str], Meta(max_length=1000)] | None = None
    saga_name: str | None = None
    saga_id: Annotated[str | None, Meta(description="Another spelling of `sagaName`.")] = None
    correlation_id: str | None = None
    correlation_key: Annotated[str | None, Meta(description="Another spelling of `correlationId`.")] = None
    all: Annotated[bool, Meta(description="Every one; has to be said, so that an empty body does nothing.")] = False
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class TroubleView(_Shape, frozen=True, kw_only=True):
    """A dead letter that was left as it is, and why."""

    id: str
    code: str
    message: str
    retryable: bool


class BulkAnswer(_Shape, frozen=True, kw_only=True):
    """What became of many dead letters: how many were redriven or discarded, which, and what stood against the others.
    `hasMore`: further ones match."""

    done: int
    failed: int
    has_more: bool
    ids: Sequence[str]
    troubles: Sequence[TroubleView]


def bulk_answer(result: BulkResult) -> BulkAnswer:
    """What an operator gets for many dead letters."""
    return BulkAnswer(
        done=len(result.done),
        failed=len(result.troubles),
        has_more=result.has_more,
        ids=result.done,
        troubles=[_trouble_view(one) for one in result.troubles],
    )


def _trouble_view(one: Trouble) -> TroubleView:
    return TroubleView(id=one.id, code=one.error.code, message=one.error.message, retryable=one.error.retryable)


class DeadLetterList(_Shape, frozen=True, kw_only=True):
    """A page of dead letters, newest first. `cursor` asks for the next page and is null on the last one."""

    dead_letters: Sequence[DeadLetterView]
    limit: int
    cursor: str | None


def dead_letter_view(letter: DeadLetter, *, with_content: bool) -> DeadLetterView:
    """One dead letter; `with_content` adds what may be long."""
    envelope, effect = letter.envelope, letter.effect
    run = effect.run if effect is not None else envelope.run if envelope is not None else None
    payload = effect.payload if effect is not None else envelope.payload if envelope is not None else None
    return DeadLetterView(
        id=letter.id,
        at=wire_time(letter.at),
        kind="message" if effect is None else "effect",
        saga_name=letter.saga_id,
        saga_id=letter.saga_id,
        correlation_id=letter.key,
        correlation_key=letter.key,
        type=letter.type,
        message_id=effect.message_id if effect is not None else envelope.id if envelope is not None else "",
        code=letter.code,
        reason=letter.reason,
        attempts=letter.attempts,
        run=_if_known(run),
        instance_id=UNSET if run is None else instance_id(letter.saga_id, letter.key, run),
        target=UNSET if effect is None else f"{effect.target_kind}:{effect.target_id}",
        effect_key=UNSET if effect is None else effect.effect_key,
        payload=_json_if(payload) if with_content else UNSET,
        traceback=_if_known(letter.traceback) if with_content else UNSET,
        state_before=_json_if(letter.state_before) if with_content else UNSET,
        state_after=_json_if(letter.state_after) if with_content else UNSET,
    )


# --- Time ------------------------------------------------------------------------------------------------------------


class TimerView(_Shape, frozen=True, kw_only=True):
    """A message that a run gets at `dueAt`. `name` is what its saga calls it, if anything."""

    id: str
    due_at: Time
    saga_name: str
    saga_id: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    message_type: str
    name: str | UnsetType = UNSET


class TimerList(_Shape, frozen=True, kw_only=True):
    """A page of timers, the next one first. `cursor` asks for the next page and is null on the last one."""

    timers: Sequence[TimerView]
    limit: int
    cursor: str | None


class MoveTimerBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When the timer is to fire."""

    due_at: Annotated[datetime, Meta(tz=True, description="A moment with a zone; at once when it is in the past.")]


class TimerChange(_Shape, frozen=True, kw_only=True):
    """A timer that was cancelled or moved, and the run whose it is; `version` is its revision now."""

    id: str
    saga_name: str
    instance_id: str
    correlation_id: str
    correlation_key: str
    run: int
    version: int
    reason: Annotated[str, Meta(description="What was done, as the history says it.")]


def timer_view(timer: WaitingTimer) -> TimerView:
    """One timer, as the wire shows it."""
    return TimerView(
        id=timer.id,
        due_at=wire_time(timer.due_at),
        saga_name=timer.saga_id,
        saga_id=timer.saga_id,
        instance_id=instance_id(timer.saga_id, timer.key, timer.run),
        correlation_id=timer.key,
        correlation_key=timer.key,
        run=timer.run,
        message_type=timer.message_type,
        name=_if_known(timer.name),
    )


def timer_change(timer_id: str, outcome: Outcome) -> TimerChange:
    """What an operator gets for a timer."""
    return TimerChange(
        id=timer_id,
        saga_name=outcome.saga_id,
        instance_id=outcome.instance_id,
        correlation_id=outcome.correlation_key,
        correlation_key=outcome.correlation_key,
        run=outcome.run,
        version=outcome.revision or 0,
        reason=outcome.reason or "",
    )


class ScheduleStatusView(_Shape, frozen=True, kw_only=True):
    """A saga's schedule, and how far it has come. `lastTickAt` is the moment for which the newest tick was
    scheduled."""

    saga_name: str
    saga_id: str
    cron: str
    timezone: str
    catch_up: str
    message_type: str
    last_tick_at: Time | UnsetType = UNSET
    next_tick_at: Time | UnsetType = UNSET


class ScheduleList(_Shape, frozen=True, kw_only=True):
    """The schedules of the loaded sagas, by saga id."""

    schedules: Sequence[ScheduleStatusView]


def schedule_view(status: ScheduleStatus) -> ScheduleStatusView:
    """One schedule, as the wire shows it."""
    return ScheduleStatusView(
        saga_name=status.saga_id,
        saga_id=status.saga_id,
        cron=status.cron,
        timezone=status.timezone,
        catch_up=status.catch_up,
        message_type=status.message_type,
        last_tick_at=_wire_time_if(status.last_tick_at),
        next_tick_at=_wire_time_if(status.next_tick_at),
    )


# --- Sagas -----------------------------------------------------------------------------------------------------------


class HandledTypeView(_Shape, frozen=True, kw_only=True):
    """A message type with a handler. `starts`: it may open an instance."""

    type: str
    starts: bool
    on_missing: str
    schema: Mapping[str, Any]
    during: Annotated[
        Sequence[str] | UnsetType, Meta(description="The business statuses it is handled in, when not in all.")
    ] = UNSET
    on_unexpected: Annotated[str | UnsetType, Meta(description="What becomes of it in any other status.")] = UNSET
    patience: Annotated[
        int | UnsetType, Meta(description="How long it waits for its instance, in milliseconds, with onMissing `wait`.")
    ] = UNSET


class CompensationView(_Shape, frozen=True, kw_only=True):
    """A message type with an undo handler."""

    type: str
    schema: Mapping[str, Any]


class SignalView(_Shape, frozen=True, kw_only=True):
    """A signal, or an update, and the schema of its payload."""

    name: str
    schema: Mapping[str, Any]


class QueryView(_Shape, frozen=True, kw_only=True):
    """A query, and the schema of its answer."""

    name: str
    schema: Mapping[str, Any]


class RetryView(_Shape, frozen=True, kw_only=True):
    """When a failed attempt is made again. Delays are milliseconds."""

    max_attempts: int
    initial_delay: int
    max_delay: int
    backoff_multiplier: float
    jitter: float
    non_retryable_error_types: Sequence[str]


class ConcurrencyView(_Shape, frozen=True, kw_only=True):
    """How many messages run at once, per key."""

    limit: int
    on_limit: str


class ScheduleView(_Shape, frozen=True, kw_only=True):
    """When a saga ticks, in which time zone, what becomes of ticks that were missed, and the type of a tick."""

    cron: str
    timezone: str
    catch_up: Literal["latest", "all", "none"]
    message_type: str


class TimeoutView(_Shape, frozen=True, kw_only=True):
    """A message that a run gets when it is still live `delay` milliseconds after it was opened."""

    name: str
    delay: int
    message_type: str


class GraphNode(_Shape, frozen=True, kw_only=True):
    """A node: `start`, `instance`, a message type, signal or update, a compensation, a schedule or a timeout; and what
    was read off the handlers: a status, a target, a child, an end."""

    id: str
    kind: str
    label: str


class GraphEdge(Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """An edge of the graph: which types start an instance, which continue one, which compensations undo them, which a
    schedule or a timeout sends; and what handlers may send, schedule, spawn, set or end."""

    from_: str
    to: str
    kind: str


class SagaGraph(_Shape, frozen=True, kw_only=True):
    """What can be known of a saga's course without running it."""

    nodes: Sequence[GraphNode]
    edges: Sequence[GraphEdge]


class RetentionView(_Shape, frozen=True, kw_only=True):
    """For how many days finished runs are kept, and live ones are nothing to wonder about; null: without an end."""

    completed_days: float | None
    active_days: float | None


class SagaView(_Shape, frozen=True, kw_only=True):
    """A loaded saga definition, with what its configuration says of it."""

    id: str
    name: str
    description: str
    topic: str
    enabled: Annotated[bool, Meta(description="Neither its configuration nor an operator has disabled it.")]
    paused: Annotated[bool, Meta(description="An operator has all its instances wait.")]
    entrypoint: str
    tags: Sequence[str]
    metadata: Mapping[str, Any]
    retention: RetentionView
    version: int
    durability_tier: SagaDurabilityTier
    handled_message_types: Sequence[HandledTypeView]
    compensations: Sequence[CompensationView]
    pivots: Annotated[Sequence[str], Meta(description="Message types that are points of no return.")]
    correlations: Sequence[str]
    signals: Sequence[SignalView]
    updates: Sequence[SignalView]
    queries: Sequence[QueryView]
    joins: Annotated[Sequence[Sequence[str]], Meta(description="Message types that one handler waits for together.")]
    status_field: Annotated[str, Meta(description="The field of the state that holds the business status.")]
    retry: RetryView
    concurrency: ConcurrencyView | None
    schedule: ScheduleView | None
    timeouts: Sequence[TimeoutView]
    reuse: str
    singleton: bool
    invariants: Sequence[str]
    migrates_from: Sequence[int]
    state_schema: Mapping[str, Any]
    initial_state: Any
    fingerprint: str
    graph: SagaGraph
    control: Annotated[ControlView | UnsetType, Meta(description="There in answers to commands.")] = UNSET


class MigrateBody(_Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many instances to migrate in this request, and where to go on."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    cursor: str | None = None


class MigrationAnswer(_Shape, frozen=True, kw_only=True):
    """What became of some instances of an older version. `left` counts the live ones that are still older, exactly up
    to 10000. `cursor` is for the next request and null at the end."""

    migrated: int
    failed: int
    left: int
    cursor: str | None
    troubles: Sequence[TroubleView]


class SagaList(_Shape, frozen=True, kw_only=True):
    """A page of the loaded sagas, by id."""

    sagas: Sequence[SagaView]
    total: int
    limit: int
    offset: int


def saga_view(definition: SagaDefinition[Any]) -> dict[str, Any]:
    """A definition as a document of the shape `SagaView`. What a saga's configuration would say beside its definition
    (topic, tags and the like) has the value it has for a saga without one."""
    return describe(definition)


# --- The service itself ----------------------------------------------------------------------------------------------


def migration_answer(page: MigrationPage) -> MigrationAnswer:
    return MigrationAnswer(
        migrated=page.migrated,
        failed=len(page.troubles),
        left=page.left,
        cursor=page.cursor,
        troubles=[_trouble_view(one) for one in page.troubles],
    )


class StoreView(_Shape, frozen=True, kw_only=True):
    """The store behind this service, and the durability tiers it can promise."""

    id: str
    store_id: str
    tiers: Sequence[str]


class Description(_Shape, frozen=True, kw_only=True):
    """What this service is, and what it can do."""

    plugin_name: str
    version: str
    contract_versions: Sequence[str]
    route_groups: Sequence[str]
    capabilities: Sequence[str]
    store: StoreView
    sagas: Sequence[SagaView]


class HealthView(_Shape, frozen=True, kw_only=True):
    """How the service is. A check says `ok`, or what is wrong. `degraded`: ready, with a check that is not ok."""

    status: Literal["healthy", "degraded", "unhealthy"]
    timestamp: Time
    version: str
    checks: Mapping[str, str]
    backlog: Annotated[int, Meta(description="Messages waiting to be applied.")]
    outbox: Annotated[int, Meta(description="Effects waiting to leave.")]
    stalled_lanes: Annotated[int, Meta(description="Lanes that stand still behind a dead letter.")]
    oldest_waiting_seconds: float
