"""The data of the engine: what is stored, what is decided.

Everything here is a frozen `msgspec.Struct`. Those marked *stored* are encoded as arrays, so their fields have an
order for life: new ones are added at the end, with a default; none is renamed in meaning, moved or removed.

None of those can be part of a reference cycle, so the garbage collector need not look at them (`gc=False`).

    Envelope       one message addressed to one instance of one saga; what an inbox row holds          stored
    Head           one correlation key of one saga: where its runs live, and which is the newest        stored
    Instance       one run: its state, status and revision                                             stored
    Undoing        what is left to undo of a run, and how it ends then                                 stored
    Child          one run that another one has spawned, as its parent's side knows it                 stored
    SagaStanding   what operators have said about a saga as a whole                                    stored
    HistoryEntry   what one message did to one run                                                     stored
    OutboxEffect   a committed effect that has to leave                                                stored
    Timer          a message that will enter later                                                     stored
    ScheduleCursor how far the ticks of one saga have been handled                                     stored
    DeadLetter     a message or effect that was given up, and why                                      stored
    Mark           that a message was seen                                                             stored
    FeedRecord     what one message shows to those who watch                                           stored
    FeedEvent      one thing that happened, as they see it
    DecideContext  what a decision may know of the world
    Decision       everything that one message asks for, as a value
"""

from __future__ import annotations

from datetime import datetime
from enum import IntEnum
from typing import Any, Literal

import msgspec

from sagaloom.definitions import RetryPolicy, SagaDurabilityTier, SagaInstanceStatus
from sagaloom.engine.limits import Limits
from sagaloom.messages import SagaMessage

__all__ = [
    "AppliedStep",
    "Child",
    "ChildStatus",
    "DeadLetter",
    "DecideContext",
    "Decision",
    "Disposition",
    "EffectSummary",
    "Envelope",
    "FeedEvent",
    "FeedKind",
    "FeedMoment",
    "FeedRecord",
    "GatheredMessage",
    "Head",
    "HeldSlot",
    "HistoryEntry",
    "Instance",
    "Mark",
    "OnParentCancel",
    "Origin",
    "OutboxEffect",
    "Outgoing",
    "ParentLink",
    "PendingTimer",
    "SagaStanding",
    "ScheduleCursor",
    "StepRecord",
    "Timer",
    "Undoing",
    "UpdateAnswer",
]

Disposition = Literal["applied", "duplicate", "ignored", "deferred", "dead_lettered", "pending"]
ChildStatus = Literal["live", "completed", "failed", "cancelled"]
OnParentCancel = Literal["cancel", "abandon"]
Origin = Literal["door", "saga", "reply", "timer", "spawn", "child", "redrive", "operator", "undo", "parent"]


class ParentLink(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The run that spawned this one, and the effect key of the spawn. `pk`, `run`, `revision` and `position` find the
    `Child` row."""

    saga_id: str
    key: str
    run: int
    effect_key: str
    pk: int = 0
    revision: int = 0
    position: int = 0


class Child(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One run that another one has spawned. A row of its own, so that a parent of ten thousand does not grow; the
    spawning commit writes it as `live`, and the one that ends the child moves it. `key` is empty while the spawn is a
    dead letter that names no instance. `run` is known once it has ended."""

    pk: int
    parent_run: int
    revision: int
    position: int
    saga_id: str
    key: str
    effect_key: str
    spawned_at: datetime
    on_parent_cancel: OnParentCancel = "cancel"
    status: ChildStatus = "live"
    run: int = 0
    ended_at: datetime | None = None


class SagaStanding(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What operators have said about a saga as a whole, for all processes that run it."""

    saga_id: str
    is_enabled: bool = True
    is_paused: bool = False
    reason: str | None = None
    changed_at: datetime | None = None


class Envelope(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One message on its way to one instance of one saga. The key in it is final.

    `payload` is JSON. `dedupe_key` is the idempotency key, else the message id. `run` binds it to one run (replies,
    timers, ends of children): it is ignored when that run is over. `opens_run`: it came without any key and opens a
    run of its own. `attempt` counts the attempts already spent; `due_at` is when the next one may be made.
    """

    saga_id: str
    key: str
    type: str
    id: str
    payload: bytes
    accepted_at: datetime
    origin: Origin = "door"
    run: int | None = None
    opens_run: bool = False
    dedupe_key: str = ""
    correlation_key: str | None = None
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    occurred_at: datetime | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    causation_id: str | None = None
    hops: int = 0
    parent: ParentLink | None = None
    attempt: int = 0
    due_at: datetime | None = None
    last_error: str | None = None
    slot: str | None = None
    """The concurrency key under which it holds a slot."""


class HeldSlot(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One of the places that a saga has for messages under one concurrency key, and the message that holds it."""

    saga_id: str
    key: str
    number: int
    correlation_key: str
    message_id: str
    taken_at: datetime


class Head(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One correlation key of one saga. `run` is the newest run, 0 before the first one. `awaits_start`: a message
    that will open the first run has been accepted, and is not applied yet. A head whose newest run was removed is a
    tombstone: `ended_as` is how that run ended, and `tombstone_until` how long the key remembers it."""

    saga_id: str
    key: str
    pk: int
    part: int
    run: int
    created_at: datetime
    awaits_start: bool = False
    tombstone_until: datetime | None = None
    ended_as: SagaInstanceStatus | None = None


class AppliedStep(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An applied message whose type has a compensation: what `ALL_STEPS` would undo."""

    type: str
    id: str
    payload: bytes
    revision: int


class Undoing(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is left to undo of a run one of whose compensations has failed. `asked` were asked for by name, in this
    order; with `is_unwinding` the applied steps follow, newest first; then the run ends as `ending` says, or goes on
    `compensating` without one. The message with the id `token` carries it on. When that is a dead letter,
    `dead_letter_id` names it; `error` says why the last attempt failed."""

    token: str
    is_unwinding: bool
    ending: Literal["completed", "failed", "cancelled"] | None = None
    reason: str | None = None
    result: bytes | None = None
    asked: tuple[AppliedStep, ...] = ()
    error: str | None = None
    dead_letter_id: str | None = None

    def next_of(self, applied: tuple[AppliedStep, ...]) -> AppliedStep | None:
        """The step whose compensation comes next, of a run with these applied steps."""
        if self.asked:
            return self.asked[0]
        return applied[-1] if self.is_unwinding and applied else None


class PendingTimer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A timer of this run that has not fired. (`due_at`, `id`) finds its row."""

    id: str
    due_at: datetime
    name: str | None = None


class GatheredMessage(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message that a join of the run has taken, and waits for others with. An empty `type` says that the join has
    run."""

    join: str
    type: str
    id: str
    payload: bytes


class Instance(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One run of a saga. `state` and `result` are JSON. `entries` counts the history rows written so far,
    `bystanders` those of them that changed nothing (ignored or dead-lettered messages). `undoing` says what is left to
    undo while a compensation fails, `pivot` which message was the last point of no return, `children` how many were
    ever spawned."""

    saga_id: str
    key: str
    pk: int
    run: int
    status: SagaInstanceStatus
    revision: int
    state: bytes
    def_version: int
    tier: SagaDurabilityTier
    created_at: datetime
    updated_at: datetime
    entries: int = 0
    bystanders: int = 0
    message_count: int = 0
    last_message_type: str | None = None
    result: bytes | None = None
    reason: str | None = None
    completed_at: datetime | None = None
    ended_at: datetime | None = None
    is_paused: bool = False
    parent: ParentLink | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    steps: tuple[AppliedStep, ...] = ()
    timers: tuple[PendingTimer, ...] = ()
    codec: str = "json"
    undoing: Undoing | None = None
    pivot: str | None = None
    children: int = 0
    gathered: tuple[GatheredMessage, ...] = ()


class EffectSummary(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An effect as history shows it: its kind, where it goes, and the key under which it left (if it leaves)."""

    kind: str
    target: str | None = None
    effect_key: str | None = None
    detail: str | None = None


class StepRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One moment of a decision: which handler ran (`handle` or `compensate`), on what type, and the status after. With
    `skip` none ran: an operator has left that compensation out."""

    phase: Literal["handle", "compensate", "skip"]
    type: str
    status: SagaInstanceStatus
    effects: tuple[EffectSummary, ...] = ()


class UpdateAnswer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an update's caller gets to hear, as JSON: the answer, or with `is_refused` the code, the message and the
    data of the refusal."""

    content: bytes
    is_refused: bool = False


class HistoryEntry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one message did to one run. `before` and `after` are states as JSON, kept from tier t2 on."""

    entry_no: int
    revision: int
    disposition: Disposition
    type: str
    message_id: str
    at: datetime
    status_before: SagaInstanceStatus
    status_after: SagaInstanceStatus
    steps: tuple[StepRecord, ...] = ()
    attempt: int = 1
    payload: bytes = b"{}"
    reason: str | None = None
    origin: Origin = "door"
    causation_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    before: bytes | None = None
    after: bytes | None = None
    def_version: int = 1
    answer: UpdateAnswer | None = None


class OutboxEffect(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A committed effect that has to leave. Effects of one lane leave in order. `dead_letter_id`: it was given up and
    its lane stands still behind it."""

    effect_key: str
    lane: str
    target_kind: str
    target_id: str
    payload: bytes
    saga_id: str
    key: str
    run: int
    revision: int
    position: int
    message_id: str
    created_at: datetime
    hops: int = 0
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    queue: str | None = None
    retry: RetryPolicy | None = None
    continues_after_dead_letter: bool = False
    traceparent: str | None = None
    tracestate: str | None = None
    attempt: int = 0
    due_at: datetime | None = None
    last_error: str | None = None
    dead_letter_id: str | None = None


class Timer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message that enters at `due_at`. (`due_at`, `id`) is its identity."""

    id: str
    due_at: datetime
    envelope: Envelope
    name: str | None = None


class ScheduleCursor(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How far the ticks of one saga have been handled: all that were scheduled for `handled_until` or before, by this
    expression in this zone. `last_tick_at` is the newest of them that was fired."""

    saga_id: str
    cron: str
    timezone: str
    handled_until: datetime
    last_tick_at: datetime | None = None


class DeadLetter(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message or an effect that was given up. Ids sort by time. Exactly one of `envelope` and `effect` is set."""

    id: str
    at: datetime
    saga_id: str
    key: str
    type: str
    code: str
    reason: str
    attempts: int
    traceback: str | None = None
    envelope: Envelope | None = None
    effect: OutboxEffect | None = None
    outbox_part: int | None = None
    outbox_seq: int | None = None
    state_before: bytes | None = None
    state_after: bytes | None = None


class Mark(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """That a message was seen by this saga under this correlation key: under which id, and what it said."""

    dedupe_key: str
    message_id: str
    digest: bytes
    at: datetime
    run: int = 0


class FeedKind(IntEnum):
    """What can happen. The numbers are stored: none is ever given to something else."""

    MESSAGE_RECEIVED = 0
    STARTED = 1
    STATE_CHANGED = 2
    COMPENSATING = 3
    COMPLETED = 4
    FAILED = 5
    CANCELLED = 6
    DEAD_LETTERED = 7
    EFFECT_DISPATCHED = 8

    @property
    def wire_name(self) -> str:
        """What watchers call it, for example `saga:state_changed`."""
        return f"saga:{self.name.lower()}"


class FeedMoment(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One thing that happened in a `FeedRecord`, and the status after it, where it is known."""

    kind: FeedKind
    status: SagaInstanceStatus | None
    detail: str | None = None


class FeedRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """All that one message, or one effect, shows to those who watch: what its events have in common, once, and what
    sets them apart. Each moment is an event with a number of its own. With an `effect_key`, `message_type` is where the
    effect went."""

    at: datetime
    saga_id: str
    key: str
    run: int
    revision: int
    message_type: str
    message_id: str
    moments: tuple[FeedMoment, ...]
    effect_key: str | None = None

    def events(self) -> tuple[FeedEvent, ...]:
        return tuple(
            FeedEvent(
                type=moment.kind.wire_name,
                at=self.at,
                saga_id=self.saga_id,
                key=self.key,
                run=self.run,
                revision=self.revision,
                status=moment.status,
                message_type=self.message_type,
                message_id=self.message_id,
                detail=moment.detail,
                effect_key=self.effect_key,
            )
            for moment in self.moments
        )


class FeedEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One thing that happened. `type` is the wire name, for example `saga:state_changed`. With an `effect_key` it
    happened to that effect: `message_type` is its target then, and the status of its run is not known. (Stores of
    schema 1 have them as arrays.)"""

    type: str
    at: datetime
    saga_id: str
    key: str
    run: int
    revision: int
    status: SagaInstanceStatus | None
    message_type: str
    message_id: str
    detail: str | None = None
    effect_key: str | None = None


class Outgoing(msgspec.Struct, frozen=True, gc=False):
    """A message that stays in the store: a send to a saga, a spawn, or a child's end. The runtime routes it, which
    is pure but needs every loaded definition. `target` is a saga id or a message type."""

    kind: Literal["send", "spawn", "child_end"]
    target: str
    payload: Any
    effect_key: str
    sender: tuple[str, str, int]
    causation_id: str
    hops: int
    correlation_key: str | None = None
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    to_run: int | None = None
    parent: ParentLink | None = None
    traceparent: str | None = None
    tracestate: str | None = None
    encoded: bytes = b""
    """The JSON of the payload, or of the payload of the message that `payload` is."""
    on_parent_cancel: OnParentCancel = "cancel"


class DecideContext(msgspec.Struct, frozen=True):
    """What a decision may know of the world: the time, and the correlation head of its key. `instance` of `decide` is
    the newest run, or the run the envelope is bound to. `typed` is the message as `address` has read it, when the
    caller still has it and no handler has seen it yet."""

    now: datetime
    head: Head
    limits: Limits = Limits()
    typed: SagaMessage[Any] | None = None


class Decision(msgspec.Struct, frozen=True, gc=False):
    """Everything that one message asks for. `commit` writes all of it or nothing.

    `disposition` says which fields speak:

    - applied: `instance` (revision + 1), `entry`, and whatever the handler asked for; with a `dead_letter` it left a
      compensation undone that has used up its attempts;
    - ignored: `entry` and an `instance` that differs only in its counters; both None past the limit of rows;
    - pending: the attempt failed, `retry_at` and `error` say when and why; nothing else is set;
    - dead_lettered: `dead_letter`, and `entry` with `instance` when a run exists;
    - deferred: the message waits as it is, and nothing is set. It holds those behind it until its run, which is paused,
      goes on; or it `stands_aside` until its instance changes or appears, at most until `retry_at`;
    - duplicate: nothing is set.
    """

    disposition: Disposition
    reason: str | None = None
    instance: Instance | None = None
    opens_run: bool = False
    entry: HistoryEntry | None = None
    effects: tuple[OutboxEffect, ...] = ()
    outgoing: tuple[Outgoing, ...] = ()
    timers: tuple[Timer, ...] = ()
    timers_ended: tuple[PendingTimer, ...] = ()
    dead_letter: DeadLetter | None = None
    feed: FeedRecord | None = None
    retry_at: datetime | None = None
    error: str | None = None
    child_end: Child | None = None
    """How this run, or the one that was asked for, has ended as somebody's child."""
    follow_ups: tuple[Envelope, ...] = ()
    """Messages of the engine's own to this very run, by which it goes on later."""
    spends_attempt: bool = True
    """False when the attempt did not reach the handler, through no fault of the message: it is not to be counted."""
    stands_aside: bool = False

    @property
    def events(self) -> tuple[FeedEvent, ...]:
        """What watchers will see of it."""
        return () if self.feed is None else self.feed.events()
