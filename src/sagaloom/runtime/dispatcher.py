"""The dispatcher: hands committed effects to their targets, lane by lane.

A lane is one (instance run, target). Its effects leave in the order in which they were committed, and the next one
leaves only when the one before is settled in the store, so a refund never overtakes its charge, not even through a
crash. Lanes are independent; `dispatch_concurrency` of them are served at once.

    gone --add--> ready --take--> under way --settled--> ready | gone (when empty)
                                     |
                                     +--failed--> backing off --due--> ready
                                     +--given up--> stalled --redriven or discarded--> ready

Most effects are answered with one message or with none. The one is decided about by the commit that settles the effect;
those without are settled together; several answers are accepted by the settling commit, and decided about by the next.

An effect is delivered at least once, always under the same effect key: after a crash between delivery and settlement
it leaves again. Every failed attempt is counted in the store before the next one is made.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from sagaloom.clock import Clock
from sagaloom.codec import encode_any
from sagaloom.engine.correlation import dead_letter_id
from sagaloom.engine.records import DeadLetter, Envelope, FeedKind, FeedMoment, FeedRecord, OutboxEffect
from sagaloom.engine.retrying import backoff, describe, is_retryable, traceback_text
from sagaloom.errors import DeliveryFailed, SagasError
from sagaloom.ids import derived_id
from sagaloom.messages import SagaMessage, as_message
from sagaloom.ports.store import Conflict, OutboxRow, RowRef, SagaStore, UnitOfWork
from sagaloom.ports.targets import EffectTarget
from sagaloom.runtime.alarm import Alarm
from sagaloom.runtime.counters import Counters
from sagaloom.runtime.deliveries import Delivery, HandedOver, Work
from sagaloom.runtime.options import RuntimeOptions, no_step
from sagaloom.runtime.share import Share
from sagaloom.telemetry.trace_context import CARRIED, Trace

if TYPE_CHECKING:
    from sagaloom.telemetry.sagas import SagaTelemetry

__all__ = ["Dispatcher"]

_log = logging.getLogger("sagaloom.dispatcher")
_BODIES_RESIDENT_MAX = 20_000
_TURNS_BETWEEN_YIELDS = 64
_DISPATCHED = (FeedMoment(FeedKind.EFFECT_DISPATCHED, None),)
_GIVING_WAIT = timedelta(seconds=0.25)


class _Waiting(msgspec.Struct, gc=False):
    """A committed effect that stands behind another one of its lane."""

    ref: RowRef
    effect: OutboxEffect | None


class _Lane(msgspec.Struct):
    """A lane with at least one effect, whose row is `ref`. Most have only one, and never need a queue `behind` it. Only
    the first so many effects stay in memory, the others are read when their turn comes. `is_dropped`: its partition is
    held by another process now."""

    name: str
    ref: RowRef
    effect: OutboxEffect | None
    behind: deque[_Waiting] | None = None
    state: Literal["ready", "under_way", "backing_off", "stalled"] = "ready"
    is_dropped: bool = False


# No Struct: to set one of its fields costs ten times as much.
@dataclass(slots=True, eq=False)
class _Server:
    """One of those that serve the lanes: its task, and since when its delivery is under way."""

    task: asyncio.Task[None]
    began: float | None = None
    is_overdue: bool = False


class _Served(msgspec.Struct):
    """What serving an effect came to; `then` goes on with its lane when that is in the store."""

    is_patient: ClassVar[bool] = True

    unit: UnitOfWork
    lane: _Lane
    effect: OutboxEffect
    then: Callable[[_Lane, OutboxEffect, SagasError | Conflict | None], None]

    def done(self, trouble: SagasError | Conflict | None) -> None:
        self.then(self.lane, self.effect, trouble)

    def apart(self) -> Sequence[Work]:
        return ()


class _Delivered(msgspec.Struct):
    """Effects that were handed over and have brought no answer, each with the lane whose head it is: they are settled
    by one unit, and then each lane goes on. More can be added until it `is_closed`, which is soon: the next turn takes
    it. So all of them have the time `at` which the first was handed over."""

    is_patient: ClassVar[bool] = True

    then: Callable[[list[tuple[_Lane, OutboxEffect]], SagasError | Conflict | None], None]
    at: datetime
    served: list[tuple[_Lane, OutboxEffect]]
    feed: list[FeedRecord]
    is_closed: bool = False
    _unit: UnitOfWork | None = None

    @property
    def unit(self) -> UnitOfWork:
        self.is_closed = True
        if self._unit is None:
            refs = tuple([lane.ref for lane, _ in self.served])
            self._unit = UnitOfWork(part=refs[0].part, outbox_done=refs, feed=tuple(self.feed))
        return self._unit

    def done(self, trouble: SagasError | Conflict | None) -> None:
        self.is_closed = True
        self.then(self.served, trouble)

    def apart(self) -> Sequence[Work]:
        if len(self.served) == 1:
            return ()
        return [
            _Delivered(self.then, self.at, [served], [shown])
            for served, shown in zip(self.served, self.feed, strict=True)
        ]


class Dispatcher:
    """Serves the lanes."""

    def __init__(
        self,
        store: SagaStore,
        clock: Clock,
        options: RuntimeOptions,
        *,
        counters: Counters,
        targets: dict[str, EffectTarget],
        share: Share,
        submit: Callable[[Work], None],
        offer: Callable[[Delivery], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._options = options
        self._counters = counters
        self._targets = targets
        self._share = share
        self._submit = submit
        self._offer = offer
        self._lanes: dict[str, _Lane] = {}
        self._ready: deque[_Lane] = deque()
        self._idle: deque[asyncio.Future[None]] = deque()
        self._due: list[tuple[datetime, int, _Lane]] = []
        self._count = itertools.count()
        self._alarm = Alarm(clock, self._bring_back)
        self._servers: list[_Server] = []
        self._is_nudging = False
        self._resident = 0
        self._under_way = 0
        self._delivered: _Delivered | None = None
        """What was handed over last, for the next unit."""
        self.waiting = 0
        self.telemetry: SagaTelemetry | None = None
        """Who is told of deliveries, if anybody listens."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is waiting that could be done now (effects between two attempts are not)."""
        return not self._ready and not self._under_way

    @property
    def stalled_lanes(self) -> int:
        return sum(lane.state == "stalled" for lane in self._lanes.values())

    # ---------------------------------------------------------------- the role's life

    async def load(self, parts: Collection[int]) -> None:
        """Reads every unsettled effect of these partitions into its lane, in order."""
        after: RowRef | None = None
        while page := await self._store.outbox_page(after=after, limit=1_000, parts=parts):
            after = page[-1].ref
            self.add(page)
            await asyncio.sleep(0)

    def drop(self, parts: Collection[int]) -> None:
        """Forgets the lanes of partitions that others hold now. What is under way there ends, and is not settled."""
        for lane in [lane for lane in self._lanes.values() if lane.ref.part in parts]:
            del self._lanes[lane.name]
            waiting = [_Waiting(lane.ref, lane.effect), *(lane.behind or ())]
            lane.behind = None
            if lane.state == "under_way":
                waiting.pop(0)
            self.waiting -= len(waiting)
            self._resident -= sum(each.effect is not None for each in waiting)
            if lane.state == "ready":
                self._ready.remove(lane)
            lane.is_dropped = True

    def is_quiet(self, parts: Collection[int]) -> bool:
        """Whether no effect of these partitions is under way."""
        return not any(lane.state == "under_way" and lane.ref.part in parts for lane in self._lanes.values())

    def add(self, rows: Sequence[tuple[RowRef, OutboxEffect]]) -> None:
        """Lines committed effects up in their lanes."""
        lanes, room = self._lanes, _BODIES_RESIDENT_MAX - self._resident
        for ref, effect in rows:
            # One that waits for its next attempt is read again by then: many of those must not take the places of those
            # that leave now, which would each be a question to the store.
            leaves_now = effect.due_at is None and effect.dead_letter_id is None
            kept = effect if leaves_now and room > 0 else None
            if kept is not None:
                room -= 1
            lane = lanes.get(effect.lane)
            if lane is None:
                lanes[effect.lane] = lane = _Lane(effect.lane, ref, kept)
                if leaves_now:
                    self._ready.append(lane)  # as `_start` would, without asking the clock and nudging for each
                else:
                    self._start(lane, effect)
                continue
            if lane.behind is None:
                lane.behind = deque()
            lane.behind.append(_Waiting(ref, kept))
        self._resident = _BODIES_RESIDENT_MAX - room
        self.waiting += len(rows)
        if self._ready:
            self._nudge()

    async def run(self) -> None:
        """Serves ready lanes until cancelled. Several of these run side by side."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        server = _Server(task)
        self._servers.append(server)
        turns = 0
        while True:
            if not self._ready:
                nudge = loop.create_future()
                self._idle.append(nudge)
                await nudge
                self._is_nudging = False
                continue
            lane = self._ready.popleft()
            if self._ready and not self._is_nudging:
                # One of us wakes the next one, who only gets to run if this delivery has to wait for something.
                self._nudge()
            if lane.ref.part in self._share.giving:
                # Whoever gets this partition begins here; should nobody take it, we look again.
                self._back_off(lane, self._clock.now() + _GIVING_WAIT)
                continue
            lane.state = "under_way"
            self._under_way += 1
            try:
                await self._serve(server, lane)
            except BaseException:
                self._under_way -= 1
                raise
            turns += 1
            if turns % _TURNS_BETWEEN_YIELDS == 0:
                await asyncio.sleep(0)

    async def watch(self) -> None:
        """Cuts off deliveries that take too long, until cancelled."""
        allowed = self._options.dispatch_timeout_seconds
        while True:
            await asyncio.sleep(min(max(allowed / 4, 0.005), 1.0))
            now = time.monotonic()
            for server in self._servers:
                if server.began is not None and now - server.began > allowed and not server.is_overdue:
                    server.is_overdue = True
                    server.task.cancel()

    def close(self) -> None:
        """Forgets everything; the store has it."""
        self._alarm.clear()
        self._lanes.clear()
        self._ready.clear()
        self._due.clear()
        self._idle.clear()
        self._servers.clear()
        self._delivered = None
        self._resident = self._under_way = self.waiting = 0

    # ---------------------------------------------------------------- one effect

    async def _serve(self, server: _Server, lane: _Lane) -> None:
        ref, effect = lane.ref, lane.effect
        if effect is None:
            try:
                (effect,) = await self._store.outbox_rows([ref])
            except SagasError as error:
                _log.warning("effect %s cannot be read: %s", ref, error.message)
                self._under_way -= 1
                self._back_off(lane, self._clock.now() + timedelta(seconds=1))
                return
            if effect is None:
                self._under_way -= 1
                self._next(lane)
                return
        envelopes: tuple[Envelope, ...] = ()
        sent, sending, carried = effect, None, None
        if effect.traceparent is not None:
            carried = CARRIED.set(Trace(effect.traceparent, effect.tracestate))
        if self.telemetry is not None:
            sending = self.telemetry.send(effect)
            sent = sending.effect
        try:
            target = self._targets.get(effect.target_kind)
            if target is None:
                raise _no_target(effect)
            server.began = time.monotonic()
            try:
                replies = await target.deliver(sent)
            except asyncio.CancelledError:
                # `asyncio.timeout` says the same and costs more than handing the effect to a function of this process.
                if not server.is_overdue:
                    raise
                server.is_overdue = False
                server.task.uncancel()
                seconds = self._options.dispatch_timeout_seconds
                raise DeliveryFailed(f"no answer within {seconds:g} s") from None
            finally:
                server.began = None
            if replies:
                envelopes = self._addressed(sent, replies)
        except Exception as error:  # noqa: BLE001 - whatever a target raises is that attempt's failure, not ours
            if sending is not None:
                sending.failed(error)
            self._failed(lane, effect, error)
        else:
            if sending is not None:
                sending.succeeded()
            self._counters.effects[effect.target_kind, "dispatched"] += 1
            if self._options.on_step is not no_step:
                self._options.on_step("dispatched")
            if not envelopes:
                self._settle(lane, effect)
                return
            happened = _shown(_DISPATCHED, effect, self._clock.now())
            if len(envelopes) == 1:
                handed_over = HandedOver(ref, happened, partial(self._go_on, lane, effect))
                self._offer(Delivery(envelopes[0], (effect.saga_id, effect.key), effect=handed_over))
            else:
                unit = UnitOfWork(part=ref.part, outbox_done=(ref,), inbox_add=envelopes, feed=(happened,))
                self._submit(_Served(unit, lane, effect, self._go_on))
        finally:
            if sending is not None:
                sending.end()
            if carried is not None:
                CARRIED.reset(carried)

    def _addressed(self, effect: OutboxEffect, replies: Sequence[object]) -> tuple[Envelope, ...]:
        """The answers of the target, addressed to the run that sent the effect."""
        envelopes = tuple([self._reply(effect, number, reply) for number, reply in enumerate(replies)])
        _check_is_text(envelopes)
        return envelopes

    def _reply(self, effect: OutboxEffect, number: int, reply: object) -> Envelope:
        """An answer of the target, addressed to the run that sent the effect. Its id is the same after a redelivery."""
        message: SagaMessage[Any] = as_message(reply)
        payload = message.payload
        return Envelope(
            saga_id=effect.saga_id,
            key=effect.key,
            type=message.type,
            id=message.id or derived_id("r", effect.effect_key, number),
            payload=bytes(payload) if isinstance(payload, msgspec.Raw) else encode_any(payload),
            accepted_at=self._clock.now(),
            origin="reply",
            run=effect.run,
            correlation_key=effect.key,
            occurred_at=message.occurred_at,
            traceparent=message.traceparent or effect.traceparent,
            tracestate=message.tracestate or effect.tracestate,
            causation_id=effect.effect_key,
            hops=effect.hops,
        )

    def _settle(self, lane: _Lane, effect: OutboxEffect) -> None:
        """Settles an effect together with whatever else is handed over until the next commit."""
        gathered = self._delivered
        if gathered is None or gathered.is_closed or len(gathered.served) >= self._options.batch_max:
            self._delivered = gathered = _Delivered(self._go_on_together, self._clock.now(), [], [])
            self._submit(gathered)
        gathered.served.append((lane, effect))
        gathered.feed.append(_shown(_DISPATCHED, effect, gathered.at))

    def _go_on_together(self, served: list[tuple[_Lane, OutboxEffect]], trouble: SagasError | Conflict | None) -> None:
        if trouble is None:
            self._under_way -= len(served)
            for lane, _ in served:
                self._next(lane)
        else:
            for lane, effect in served:
                self._go_on(lane, effect, trouble)

    def _go_on(self, lane: _Lane, effect: OutboxEffect, trouble: SagasError | Conflict | None) -> None:
        if trouble is None:
            self._under_way -= 1
            self._next(lane)
        elif isinstance(trouble, Conflict) and trouble.kind == "refused":
            refused = DeliveryFailed(f"its answer cannot be stored: {trouble.what}", retryable=False)
            self._failed(lane, effect, refused)
        else:
            self._settled(lane, effect, trouble)

    def _settled(self, lane: _Lane, effect: OutboxEffect, trouble: SagasError | Conflict | None) -> None:
        self._under_way -= 1
        # When the runtime is closing, the row is still there. A conflict says that it is gone: an operator discarded
        # it meanwhile. Either way it is done with.
        if not isinstance(trouble, SagasError):
            self._next(lane)

    def _failed(self, lane: _Lane, effect: OutboxEffect, error: Exception) -> None:
        ref, now = lane.ref, self._clock.now()
        attempt = effect.attempt + 1
        policy = effect.retry or self._options.effect_retry
        text = error.message if isinstance(error, SagasError) else describe(error)
        if is_retryable(error, policy) and attempt < policy.maximum_attempts:
            wait = max(backoff(policy, attempt=attempt, message_id=effect.effect_key), _asked_for(error))
            due_at = now + wait
            self._counters.effects[effect.target_kind, "failed"] += 1
            again = msgspec.structs.replace(effect, attempt=attempt, due_at=due_at, last_error=text)
            unit = UnitOfWork(part=ref.part, outbox_update=OutboxRow(ref, again))
            _log.info("effect to %s:%s failed: %s", effect.target_kind, effect.target_id, text)
            self._submit(_Served(unit, lane, again, self._counted))
            return
        self._counters.effects[effect.target_kind, "dead_lettered"] += 1
        _log.warning("effect to %s:%s is given up: %s", effect.target_kind, effect.target_id, text)
        given_up = msgspec.structs.replace(effect, attempt=attempt, due_at=None, last_error=text)
        dead_letter = DeadLetter(
            id=dead_letter_id(now, effect.effect_key, attempt),
            at=now,
            saga_id=effect.saga_id,
            key=effect.key,
            type=f"{effect.target_kind}:{effect.target_id}",
            code=error.code if isinstance(error, SagasError) else "DELIVERY_FAILED",
            reason=text,
            attempts=attempt,
            traceback=traceback_text(error),
            effect=given_up,
            outbox_part=None if effect.continues_after_dead_letter else ref.part,
            outbox_seq=None if effect.continues_after_dead_letter else ref.seq,
        )
        happened = (_shown((FeedMoment(FeedKind.DEAD_LETTERED, None, text),), effect, now),)
        if effect.continues_after_dead_letter:
            unit = UnitOfWork(part=ref.part, outbox_done=(ref,), dead_letters_add=(dead_letter,), feed=happened)
            self._submit(_Served(unit, lane, given_up, self._settled))
        else:
            stopped = msgspec.structs.replace(given_up, dead_letter_id=dead_letter.id)
            row = OutboxRow(ref, stopped)
            unit = UnitOfWork(part=ref.part, outbox_update=row, dead_letters_add=(dead_letter,), feed=happened)
            self._submit(_Served(unit, lane, stopped, self._counted))

    def _counted(self, lane: _Lane, effect: OutboxEffect, trouble: SagasError | Conflict | None) -> None:
        """A failed attempt is in the store: wait for the next one, or stand still."""
        self._under_way -= 1
        if isinstance(trouble, SagasError):
            return
        if trouble is not None or lane.is_dropped:
            self._next(lane)
            return
        if lane.effect is not None:
            lane.effect = effect
        self._start(lane, effect)

    # ---------------------------------------------------------------- lanes

    def _start(self, lane: _Lane, effect: OutboxEffect) -> None:
        """Gives a lane the state that its head asks for."""
        if effect.dead_letter_id is not None:
            lane.state = "stalled"
        elif effect.due_at is not None and effect.due_at > self._clock.now():
            self._back_off(lane, effect.due_at)
        else:
            self._make_ready(lane)

    def _next(self, lane: _Lane) -> None:
        """The head of a lane is done with: the one behind it is the head, or the lane is gone."""
        self.waiting -= 1
        self._resident -= lane.effect is not None
        if not lane.behind:
            if not lane.is_dropped:
                self._lanes.pop(lane.name, None)
            return
        following = lane.behind.popleft()
        lane.ref, lane.effect = following.ref, following.effect
        effect = lane.effect
        if effect is None:
            self._make_ready(lane)
        else:
            self._start(lane, effect)

    def _make_ready(self, lane: _Lane) -> None:
        lane.state = "ready"
        self._ready.append(lane)
        self._nudge()

    def _nudge(self) -> None:
        """Wakes one idle server of lanes, unless one is waking up already."""
        while self._idle and not self._is_nudging:
            nudge = self._idle.popleft()
            if not nudge.done():
                nudge.set_result(None)
                self._is_nudging = True

    def _back_off(self, lane: _Lane, due_at: datetime) -> None:
        lane.state = "backing_off"
        heapq.heappush(self._due, (due_at, next(self._count), lane))
        self._alarm.set(due_at)

    def _bring_back(self) -> None:
        now = self._clock.now()
        while self._due and self._due[0][0] <= now:
            _, _, lane = heapq.heappop(self._due)
            if lane.state == "backing_off" and not lane.is_dropped:
                self._make_ready(lane)
        if self._due:
            self._alarm.set(self._due[0][0])

    # ---------------------------------------------------------------- operators

    def resume(self, lane_name: str, effect: OutboxEffect) -> None:
        """The head of a stalled lane was redriven: it goes on with a fresh count of attempts."""
        lane = self._lanes.get(lane_name)
        if lane is not None and lane.state == "stalled":
            if lane.effect is not None:
                lane.effect = effect
            self._make_ready(lane)

    def skip(self, lane_name: str) -> None:
        """The head of a stalled lane was discarded: the next effect goes."""
        lane = self._lanes.get(lane_name)
        if lane is not None and lane.state == "stalled":
            self._next(lane)


def _check_is_text(answers: Sequence[Envelope]) -> None:
    """Raises `DeliveryFailed` for what no store can write, and no decision can be made about: lone surrogates."""
    try:
        for answer in answers:
            msgspec.msgpack.encode((answer.type, answer.id, answer.traceparent, answer.tracestate))
    except UnicodeEncodeError as error:
        raise DeliveryFailed(f"its answer cannot be stored: {error}", retryable=False) from error


def _no_target(effect: OutboxEffect) -> DeliveryFailed:
    return DeliveryFailed(
        f"no target of kind {effect.target_kind!r} is registered for effect to "
        f"{effect.target_kind}:{effect.target_id}: add one with runtime.add_target(...) and redrive",
        retryable=False,
    )


def _shown(moments: tuple[FeedMoment, ...], effect: OutboxEffect, now: datetime) -> FeedRecord:
    """What the feed shows of an effect."""
    return FeedRecord(
        now,
        effect.saga_id,
        effect.key,
        effect.run,
        effect.revision,
        f"{effect.target_kind}:{effect.target_id}",
        effect.message_id,
        moments,
        effect.effect_key,
    )


def _asked_for(error: Exception) -> timedelta:
    """How long the target asked us to wait, up to an hour."""
    seconds = error.data.get("retryAfterSeconds") if isinstance(error, SagasError) else None
    return timedelta(seconds=min(float(seconds), 3600.0)) if isinstance(seconds, (int, float)) else timedelta(0)
