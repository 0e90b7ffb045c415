"""The receiver: takes messages in the order of their acceptance, decides them, and commits what they ask for.

Theory of operation
-------------------
One task turns in a loop. Each turn takes everything that is waiting (up to `batch_max`), loads the instances that are
not hot, decides every message in order, commits all decisions at once, and only then tells anybody. While a commit is
under way new messages gather, so batches grow with the load by themselves: that is where throughput comes from. They
stay small enough for a store to take them in time: a turn ends when what it decided is some megabytes, and after one
that failed the next takes half as much.

1. A message that comes through a door is accepted and applied in one commit; its publisher hears after that commit.
2. Per (saga, key) the order of the backlog is the order of acceptance (I9). One exception: a message whose attempt
   failed steps aside until it is due, and younger ones go on.
3. Except a starter that fails: its key is *held*, for nothing can be applied before the instance exists. Messages
   behind it are accepted into the inbox and wait. So do messages to a paused run, behind it, until an operator's
   control ends the pause; what comes after that control in its own batch waits behind them.
4. A message that stepped aside is offered again after every transition of its instance. An offer that fails costs no
   attempt and writes nothing.
5. A message that its saga *defers* (it is bound to another business status, or waits for its instance to appear) has
   its row, and stands aside like one whose attempt failed. After every transition of its instance it comes before
   everything younger: what of that instance is left of the batch is put back until it had its turn. So the outcome is
   the same however messages fall into batches, processes and lives.
6. A unit that conflicts drops what is remembered of its instance, and its message goes back in front, in order.
7. Messages to a partition that another process holds are only accepted: their holder finds them. While somebody else
   writes to the store, what they bring is read between turns (`sagaloom.runtime.share`), and it goes before everything
   that is not accepted yet. A message from a door that turns out to be *behind* something that was not read yet is
   accepted first: so it has its place in the order, and never has to yield twice. A timer yields once, for only its row
   can be cancelled.
8. When the store does not answer, the outcome of a commit is unknown: everything remembered is dropped, publishers
   are told to try again under the same id, rows are decided again, and nothing is accepted until a probe succeeds.

What we dislike about it: one commit is under way at a time, so a store with a slow round trip is not kept busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, ClassVar, Final, Protocol, cast

import msgspec

from sagaloom.clock import Clock
from sagaloom.engine.concurrency import key_of
from sagaloom.engine.controls import ends_pause
from sagaloom.engine.correlation import DefinitionSet, dead_letter_id, route
from sagaloom.engine.decide import DecideContext, decide, steer
from sagaloom.engine.families import CANCEL_CHILDREN, child_spawned
from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.records import (
    Child,
    DeadLetter,
    Decision,
    Envelope,
    FeedKind,
    FeedMoment,
    FeedRecord,
    Head,
    Instance,
    Mark,
    OutboxEffect,
    Timer,
)
from sagaloom.engine.retrying import traceback_text
from sagaloom.errors import BackendUnavailable, Fenced, IdempotencyKeyReused, SagasError, StoreCorrupt
from sagaloom.ids import content_digest, key_hash, partition_of
from sagaloom.ports.store import CommitResult, Conflict, InboxRow, Loaded, RowRef, SagaStore, UnitOfWork
from sagaloom.runtime.alarm import Alarm
from sagaloom.runtime.backlog import Backlog
from sagaloom.runtime.cache import Hot, HotInstances
from sagaloom.runtime.counters import Counters
from sagaloom.runtime.deliveries import (
    Delivery,
    InstanceKey,
    answer,
    refuse,
    unit_of_accept,
    unit_of_decision,
    unit_of_loss,
)
from sagaloom.runtime.options import RuntimeOptions, no_step
from sagaloom.runtime.outcomes import outcome_of, outcome_of_duplicate
from sagaloom.runtime.share import Share
from sagaloom.runtime.slots import LOOK_AGAIN, Slots, limited

if TYPE_CHECKING:
    from sagaloom.telemetry.sagas import SagaTelemetry

__all__ = ["DISCARD", "REDRIVE", "Receiver", "Work"]

REDRIVE: Final = "saga:redrive"
DISCARD: Final = "saga:discard"
_CARRIED_OUT: Final = frozenset((REDRIVE, DISCARD, CANCEL_CHILDREN))
"""What operators ask of the process that holds a partition, without a decision."""

_log = logging.getLogger("sagaloom.receiver")
_PKS_AT_ONCE = 1_000
_BATCH_BYTES = 8 << 20
"""When payloads, states and effects of a turn are more than this, the rest of its messages waits for the next."""
_MARKS_REMEMBERED = 50_000
_PAUSE_SECONDS_MAX = 1.0
_MOMENT_SECONDS = 0.0005
_UNKNOWN_AGAIN = timedelta(seconds=2)
_UNKNOWN_PATIENCE = timedelta(hours=1)
_STARTS_MAX = 10
_UNSEEN = Hot(None, None)

# What a named tuple's own constructor does, without its Python frame.
_row_ref: Final = cast("Callable[[tuple[int, int]], RowRef]", partial(tuple.__new__, RowRef))  # pyright: ignore[reportUnknownMemberType]


class Work(Protocol):
    """A unit that needs no decision: settled effects, an operator's request. `is_patient`: it waits for a store that
    does not answer, instead of failing."""

    is_patient: ClassVar[bool]

    @property
    def unit(self) -> UnitOfWork: ...

    def done(self, trouble: SagasError | Conflict | None) -> None:
        """Is called once, after the commit, with what stood against it."""
        ...

    def apart(self) -> Sequence[Work]:
        """What it is made of, when that is several things which may be committed without each other."""
        ...


class _Planned(msgspec.Struct, gc=False):
    """The unit of one delivery and what follows from it, once it is committed: `hot` is what to remember of the key.
    `decision` is None when the message was only accepted. `waits`: its message is in the inbox now, decided or not.
    `awaits_slot`: it was accepted, and waits for a slot. `is_deferred`: it stands aside from then on. `holds`: its key
    waits for it. `is_next`: it was accepted to get its place, and has its turn as soon as it comes. `successor` is the
    same message as it is found in the inbox from then on, when it waits there for the first time."""

    delivery: Delivery
    unit: UnitOfWork
    decision: Decision | None
    hot: Hot | None
    waits: bool = True
    holds: bool = False
    is_next: bool = False
    is_deferred: bool = False
    awaits_slot: bool = False
    successor: Delivery | None = None


class Receiver:
    """Decides and commits: the only task that writes instances."""

    def __init__(
        self,
        store: SagaStore,
        clock: Clock,
        options: RuntimeOptions,
        *,
        counters: Counters,
        holder: str,
        definitions: Callable[[], DefinitionSet],
        on_holding: Callable[[frozenset[int], frozenset[int]], Awaitable[None]],
        is_quiet: Callable[[Collection[int]], bool],
        on_repair: Callable[[Delivery], None],
        on_effects: Callable[[Sequence[tuple[RowRef, OutboxEffect]]], None],
        on_timers: Callable[[Sequence[Timer]], None],
        on_commit: Callable[[int], None],
    ) -> None:
        self._store = store
        self._clock = clock
        self._options = options
        self._counters = counters
        self._definitions = definitions
        self._on_repair = on_repair
        self._on_effects = on_effects
        self._on_timers = on_timers
        self._on_commit = on_commit
        self._backlog = Backlog()
        self._work: deque[Work] = deque()
        self._alarm = Alarm(clock, self._bring_back)
        self._hot = HotInstances(options.cache_bytes_max)
        self._marks: dict[tuple[int, str], Mark] = {}
        self._pks: list[int] = []
        self.share = Share(
            store,
            holder=holder,
            works=options.works,
            queue=self._add_rows,
            drop=self._drop,
            on_holding=on_holding,
            is_quiet=is_quiet,
        )
        self._slots = Slots()
        self._postponed: list[Delivery] = []
        """What was taken for this turn and is left for the next, in order."""
        self._wake: asyncio.Future[None] | None = None
        self._is_turning = False
        self.turning = asyncio.Lock()
        """Is held during a turn. Whoever else holds it may change what is stored under our lease, and then has us
        `forget` it."""
        self._failures = 0
        self._batch_max = options.batch_max
        """Less than the option after a turn has failed, for it may have been too much at once."""
        self.problem: SagasError | None = None
        """Why nothing can be committed right now."""
        self.telemetry: SagaTelemetry | None = None
        """Who is told of decisions and commits, if anybody listens."""

    # ---------------------------------------------------------------- what others ask

    def offer(self, delivery: Delivery) -> None:
        """Queues a delivery behind everything that was offered before."""
        self._backlog.add(delivery)
        self._rouse()

    def let_go_on(self, saga_ids: Collection[str]) -> None:
        """Gives what has waited for these sagas its turn: they were paused, or disabled, and are no more."""
        self._backlog.put_back(self._backlog.release(self._backlog.keys_behind(saga_ids)))
        self._rouse()

    def submit(self, work: Work) -> None:
        """Queues a unit for the next commit."""
        self._work.append(work)
        self._rouse()

    def forget(self, keys: Iterable[InstanceKey]) -> None:
        """What is stored of these keys has changed, while `turning` was held."""
        for key in keys:
            self._hot.drop(key)

    def forget_marks(self, before: datetime) -> None:
        """The store has forgotten the marks of messages that were accepted before `before`."""
        self._marks = {where: mark for where, mark in self._marks.items() if mark.at >= before}

    def hot(self, key: InstanceKey) -> Hot | None:
        return self._hot.get(key)

    @property
    def waiting(self) -> int:
        return self._backlog.waiting

    @property
    def is_idle(self) -> bool:
        """Whether nothing is waiting that could be done now (messages between two attempts are not)."""
        return not (self._backlog or self._work or self._is_turning or self.share.needs_attention)

    def oldest_waiting(self) -> datetime | None:
        """When the message whose turn is next was accepted."""
        oldest = self._backlog.oldest()
        return None if oldest is None else oldest.envelope.accepted_at

    # ---------------------------------------------------------------- the role's life

    async def start(self) -> None:
        """Enters among those who write to the store, and takes and loads its share of it."""
        for _ in range(_STARTS_MAX):
            try:
                return await self.share.look_after()
            except Fenced as error:
                # On a busy machine the others may have thought us dead before we had even begun.
                if not self._store.is_shareable:
                    raise
                await self._start_over([], [], error)
        raise BackendUnavailable(
            f"others took us for dead {_STARTS_MAX} times while we started: is the machine asleep?"
        )

    def attend(self, *, standing: bool) -> None:
        """Has the next turn read what others have brought, and with `standing` also see who holds what."""
        self.share.attend(standing=standing)
        self._rouse()

    async def run(self) -> None:
        """Turns until cancelled, or until another process has taken the store over."""
        loop = asyncio.get_running_loop()
        while True:
            # While the store is in trouble nothing new is let in, so nobody but us would ever try it again.
            if not (self._backlog or self._work or self.share.needs_attention or self.problem is not None):
                self._wake = loop.create_future()
                await self._wake
                self._wake = None
            self._is_turning = True
            try:
                async with self.turning:
                    await self._turn()
            finally:
                self._is_turning = False
            # Publishers that were just answered get to offer their next message before the next batch is taken. And of
            # two processes that commit in a loop one starves, unless each gives the other a moment.
            await asyncio.sleep(_MOMENT_SECONDS if self.share.is_shared else 0)

    def close(self, error: SagasError) -> None:
        """Answers everybody who still waits. What has a row stays in the store; what has none was never accepted."""
        self._alarm.clear()
        for delivery in self._backlog.clear():
            refuse(delivery, error)
        for work in self._work:
            work.done(error)
        self._work.clear()
        self.share.close(error)
        self._hot.clear()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _bring_back(self) -> None:
        next_due = self._backlog.bring_back(self._clock.now())
        if next_due is not None:
            self._alarm.set(next_due)
        self._rouse()

    # ---------------------------------------------------------------- one turn

    async def _turn(self) -> None:
        batch: list[Delivery] = []
        works: list[Work] = []
        try:
            if self.share.needs_attention:
                await self.share.look_after()
            batch = self._backlog.take(self._batch_max)
            works = self._take_works()
            self._options.on_step("claimed")
            if self.problem is not None:
                await self._store.probe()
                self.problem, self._failures = None, 0
            planned = await self._plan(batch) if batch else []
            units = [each.unit for each in planned]
            units.extend([work.unit for work in works])
            if not units:
                self._postpone()
                return
            self._options.on_step("decided")
            assert self.share.lease is not None
            result = await self._store.commit(units, lease=self.share.lease)
        except SagasError as error:
            await self._cannot_commit(batch, works, error)
            return
        except Exception as error:  # noqa: BLE001 - see the next line
            # A bug of ours or of the store's. It must not end the loop, for then nobody would hear of anything again.
            _log.exception("a turn has failed")
            await self._cannot_commit(batch, works, BackendUnavailable(f"a turn has failed: {error!r}"))
            return
        if self._batch_max < self._options.batch_max:
            self._batch_max = min(2 * self._batch_max, self._options.batch_max)
        if self.telemetry is not None:
            self.telemetry.committed(planned, works, result.conflicts)
        self._on_commit(result.feed_base)
        self._postpone()
        await self._follow_up(planned, works, result)

    def _postpone(self) -> None:
        """Puts back what has to wait for something older that had no turn yet."""
        postponed, self._postponed = self._postponed, []
        if postponed:
            self._backlog.put_back(postponed)

    def _take_works(self) -> list[Work]:
        works = self._work
        if len(works) <= self._batch_max:
            taken = list(works)
            works.clear()
            return taken
        return [works.popleft() for _ in range(self._batch_max)]

    async def _plan(self, batch: list[Delivery]) -> list[_Planned]:
        """Decides each delivery on top of what those before it in this batch decided."""
        newest, corrupt = await self._load(batch)
        now = self._clock.now()
        definitions = self._definitions()
        seen: dict[tuple[int, str], Mark] = {}
        holding: set[InstanceKey] = set()  # The keys whose next messages of this batch have to wait.
        placing: set[InstanceKey] = set()  # The keys whose next messages have to get a place first, as one before did.
        parts, holds_some = self.share.parts, self._backlog.holds_some
        defers_some = self._backlog.defers_some
        limited_ids = definitions.limited
        deferring: set[InstanceKey] = set()  # The keys of which a message of this batch was deferred.
        stopped: set[InstanceKey] = set()  # The keys that have moved since: what was deferred comes first now.
        self._postponed = []
        planned: list[_Planned] = []
        size = 0
        for delivery in batch:
            key, envelope = delivery.key, delivery.envelope
            if size > _BATCH_BYTES or (stopped and key in stopped and not delivery.passes):
                self._postponed.append(delivery)
                continue
            known = newest[key]
            head = known.head or self._new_head(key, now)
            if delivery.enters:
                where = (head.pk, envelope.dedupe_key or envelope.id)
                mark = seen.get(where) or self._marks.get(where)
                if mark is not None:
                    self._answer_duplicate(delivery, mark, known.instance, is_in_batch=where in seen)
                    continue
            if head.part not in parts:
                if not delivery.enters:
                    continue  # Its holder has it. To bring it once more would be to apply it twice.
                unit = unit_of_accept(delivery, head, known.head)
                newest[key] = Hot(head, known.instance)
                step = _Planned(delivery, unit, None, None)
            elif envelope.origin == "operator" and envelope.type in _CARRIED_OUT:
                self._on_repair(delivery)
                continue
            elif (holds_some and self._backlog.is_held(delivery)) or (key in holding and not delivery.passes):
                if not delivery.enters:
                    self._backlog.wait_behind(delivery)
                    continue
                unit = unit_of_accept(delivery, head, known.head)
                step = _Planned(delivery, unit, None, Hot(head, known.instance))
            elif (delivery.yielded or placing) and (
                delivery.yielded > (delivery.timer is not None) or (delivery.enters and key in placing)
            ):
                placing.add(key)
                unit = unit_of_accept(delivery, head, known.head)
                step = _Planned(delivery, unit, None, Hot(head, known.instance), is_next=True)
            elif limited_ids and delivery.awaits_slot and delivery.enters:
                unit = unit_of_accept(delivery, head, known.head)
                step = _Planned(delivery, unit, None, Hot(head, known.instance), holds=True, awaits_slot=True)
            else:
                addressed = known.instance
                if envelope.run is not None and envelope.run != head.run:
                    # Rare: a reply, timer or child of a run that is not the newest. Such runs are read each time.
                    addressed = await self._store.load_run(envelope.saga_id, envelope.key, envelope.run)
                if self.telemetry is None:
                    decision = self._decide(delivery, addressed, head, definitions, now, corrupt.get(key), envelope)
                else:
                    definition = definitions.get(envelope.saga_id)
                    tier = None if definition is None else definition.durability
                    run = partial(self._decide, delivery, addressed, head, definitions, now, corrupt.get(key))
                    decision = self.telemetry.decide(delivery, addressed, tier, run)
                if delivery.is_offer and decision.disposition in ("pending", "deferred") and not _is_held(decision):
                    self._put_aside(delivery)
                    continue
                if decision.stands_aside:
                    deferring.add(key)
                    if not delivery.enters:
                        self._defer(delivery, decision.retry_at)
                        continue
                if decision.disposition == "deferred" and not delivery.enters:
                    self._backlog.wait_behind(delivery)  # A timer keeps its row, so that it can still be cancelled.
                    continue
                if decision.disposition == "deferred":
                    if decision.stands_aside and known.head is None:
                        head = msgspec.structs.replace(head, awaits_start=False)  # It does not start what it waits for.
                    unit = unit_of_accept(delivery, head, known.head)
                    is_deferred = decision.stands_aside
                    shown = decision if is_deferred else None
                    step = _Planned(delivery, unit, shown, Hot(head, known.instance), is_deferred=is_deferred)
                elif key in corrupt:
                    step = _Planned(delivery, unit_of_loss(delivery, decision), decision, None, waits=False)
                else:
                    step = self._plan_decision(delivery, decision, known, head, addressed, definitions, now)
                if (
                    (defers_some or deferring)
                    and decision.disposition == "applied"
                    and (key in deferring or self._backlog.has_deferred(key))
                ):
                    stopped.add(key)
            if envelope.slot is not None or (limited_ids and key[0] in limited_ids):
                step.unit = self._slots.claim(definitions.get(key[0]), delivery, step.unit, step.decision, now)
            if step.holds or (envelope.origin != "door" and ends_pause(envelope)):
                holding.add(key)
            if step.unit.mark is not None:
                seen[head.pk, step.unit.mark.dedupe_key] = step.unit.mark
            if step.hot is not None:
                newest[key] = step.hot
            planned.append(step)
            size += len(envelope.payload)
            if step.unit.instance is not None:
                size += len(step.unit.instance.state)
            for effect in step.unit.outbox_add:
                size += len(effect.payload)
        return planned

    def _decide(
        self,
        delivery: Delivery,
        addressed: Instance | None,
        head: Head,
        definitions: DefinitionSet,
        now: datetime,
        corrupt: StoreCorrupt | None,
        envelope: Envelope,
    ) -> Decision:
        """The decision about `envelope`, which is that of the delivery, or the same in the trace of its decision."""
        definition = definitions.get(envelope.saga_id)
        if definition is None and corrupt is None and envelope.origin in ("operator", "parent"):
            return steer(addressed, envelope, DecideContext(now, head, self._options.limits))
        if definition is None and corrupt is None and self._may_be_known_elsewhere(envelope, now):
            missing = _vanished(envelope.saga_id).message
            return Decision("pending", missing, retry_at=now + _UNKNOWN_AGAIN, error=missing, spends_attempt=False)
        if definition is None or corrupt is not None or delivery.refusal is not None:
            return _give_up(envelope, now, corrupt or delivery.refusal or _vanished(envelope.saga_id))
        about = definition.about
        if (about.paused or not about.enabled) and envelope.origin not in ("operator", "parent"):
            # Nothing is written for those that wait, however long that is.
            what = "paused" if about.enabled else "disabled"
            return Decision("deferred", f"saga {envelope.saga_id!r} is {what}")
        typed, delivery.typed = delivery.typed, None
        if typed is not None and envelope is not delivery.envelope:
            typed = msgspec.structs.replace(typed, traceparent=envelope.traceparent, tracestate=envelope.tracestate)
        return decide(definition, addressed, envelope, DecideContext(now, head, self._options.limits, typed))

    def _may_be_known_elsewhere(self, envelope: Envelope, now: datetime) -> bool:
        """Whether another process may have the definition that is missing here, as in the middle of a release: then the
        message waits for a holder that knows it, for a while."""
        return self.share.is_shared and now - envelope.accepted_at < _UNKNOWN_PATIENCE

    def _plan_decision(
        self,
        delivery: Delivery,
        decision: Decision,
        known: Hot,
        head: Head,
        addressed: Instance | None,
        definitions: DefinitionSet,
        now: datetime,
    ) -> _Planned:
        """The unit that `decision` about run `addressed` becomes, and what is known of the key after it."""
        instance, before, head_before = decision.instance, addressed, known.head
        waits = decision.disposition == "pending"
        if instance is not None and instance.run > head.run:
            before = None
            head = msgspec.structs.replace(
                head, run=instance.run, awaits_start=False, tombstone_until=None, ended_as=None
            )
        elif head.run == 0 and head.awaits_start != waits:
            head = msgspec.structs.replace(head, awaits_start=waits)
        cascaded: list[Envelope] = list(decision.follow_ups)
        dead_letters: list[DeadLetter] = []
        children: list[Child] = []
        for outgoing in decision.outgoing:
            routed = route(definitions, outgoing, now=now)
            if outgoing.kind == "spawn":
                child_key = routed.envelopes[0].key if routed.envelopes else ""
                children.append(child_spawned(outgoing, child_key, now))
            cascaded.extend(routed.envelopes)
            dead_letters.extend(routed.dead_letters)
        unit = unit_of_decision(
            delivery,
            decision,
            head=head,
            head_before=head_before,
            before=before,
            cascaded=cascaded,
            dead_letters=dead_letters,
        )
        if children or decision.child_end is not None:
            unit = msgspec.structs.replace(unit, children_add=tuple(children), child_done=decision.child_end)
        newest, hot = known.instance, None
        if head_before is not None or unit.head is not None:
            hot = Hot(head, instance if instance is not None and instance.run == head.run else newest)
        holds = False
        if waits:
            envelope = delivery.envelope
            would_start = newest is None or is_terminal(newest.status)
            holds = would_start and not envelope.opens_run and envelope.run is None
        return _Planned(delivery, unit, decision, hot, waits, holds)

    def _answer_duplicate(
        self, delivery: Delivery, mark: Mark, instance: Instance | None, *, is_in_batch: bool
    ) -> None:
        """Answers a message that was seen before. Most are found here; the rest the commit itself finds."""
        envelope = delivery.envelope
        if mark.digest != content_digest(envelope.type, envelope.payload):
            refuse(
                delivery,
                IdempotencyKeyReused(
                    f"idempotency key {mark.dedupe_key!r:.80} of saga {envelope.saga_id!r} was used before for message "
                    f"{mark.message_id} with other content: give every message a key of its own",
                    data={"messageId": mark.message_id, "sagaId": envelope.saga_id},
                ),
            )
        elif is_in_batch:
            # The first one is in this very batch: its commit has to come before anybody hears of it.
            self._backlog.add(delivery)
        else:
            self._counters.decided[envelope.saga_id, "duplicate"] += 1
            answer(delivery, outcome_of_duplicate(envelope, mark, instance))

    # ---------------------------------------------------------------- after the commit

    async def _follow_up(self, planned: list[_Planned], works: list[Work], result: CommitResult) -> None:
        parts, marks = self.share.parts, self._marks
        rows = _NewRows(result, self._backlog, parts)
        conflicts = result.conflicts
        accepted: list[_Planned] = []
        decided: list[_Planned] = []
        for number, each in enumerate(planned):
            if number in conflicts:
                continue
            unit = each.unit
            if unit.inbox_add or unit.outbox_add:
                each.successor = rows.take(unit, first_waits=each.waits)
            if unit.timers_add:
                self._on_timers(unit.timers_add)
            if each.hot is not None:
                self._hot.put(each.delivery.key, each.hot)
            if unit.mark is not None and unit.part in parts:
                # Marks of partitions that others hold may be taken back without our hearing of it.
                marks[unit.mark_pk, unit.mark.dedupe_key] = unit.mark
            (decided if each.decision is not None else accepted).append(each)
        self._bound_marks()
        self._counters.committed([*accepted, *decided], conflicts=len(conflicts))
        for number, work in enumerate(works, len(planned)):
            if number not in conflicts and (work.unit.inbox_add or work.unit.outbox_add):
                rows.take(work.unit)
        if self._options.on_step is not no_step:
            self._report_steps(planned, works)
        # Those that were only accepted come first: a starter of this very batch may let go of what is lined up behind
        # it, and whoever lined up after that would wait for nobody.
        for each in accepted:
            self._wait_on(each)
        for each in decided:
            if each.waits:
                self._wait_on(each)
            else:
                self._go_on(each)
        for number, work in enumerate(works, len(planned)):
            if number not in conflicts:
                work.done(None)
        if conflicts:
            await self._resolve(planned, works, conflicts)
        for later in rows.later:
            self._put_aside(later)
        if self._slots.some_wait:
            self._pass_slots_on([each.unit for each in (*accepted, *decided)])
        if rows.effects:
            self._on_effects(rows.effects)

    def _go_on(self, each: _Planned) -> None:
        """Answers the publisher of a message that is done with, and gives those who waited for it their turn."""
        delivery, decision = each.delivery, each.decision
        assert decision is not None
        if delivery.answered is not None or delivery.settled is not None:
            answer(delivery, outcome_of(delivery, decision, each.unit, detailed=delivery.settled is not None))
        if delivery.envelope.origin != "door" and ends_pause(delivery.envelope):
            self._backlog.put_back(self._backlog.release([delivery.key]))
        if decision.disposition == "applied":
            self._backlog.moved(delivery.key, delivery)
        else:
            self._backlog.gave_up(delivery.key, delivery)

    def _wait_on(self, each: _Planned) -> None:
        """Tells the publisher that its message is safe, and gives the message its place among those that wait."""
        delivery, successor = each.delivery, each.successor
        if successor is None:
            assert each.unit.inbox_update is not None
            delivery.envelope = each.unit.inbox_update.envelope
            successor = delivery
        else:
            successor.settled = delivery.settled
        if delivery.answered is not None and not delivery.answered.done():
            delivery.answered.set_result(outcome_of(delivery, each.decision, each.unit, detailed=False))
        if successor.row is not None and successor.row.part not in self.share.parts:
            self.share.wait_abroad(successor)
        elif each.is_next:
            self._backlog.add_in_order([successor])
        elif each.awaits_slot:
            definition = self._definitions().get(delivery.key[0])
            assert definition is not None
            self._await_slot(successor, key_of(definition, successor.envelope))
        elif each.decision is None:
            self._backlog.wait_behind(successor)
        elif each.is_deferred:
            self._defer(successor, each.decision.retry_at)
        elif each.holds:
            self._backlog.hold(successor)
            self._set_alarm(successor)
        else:
            self._put_aside(successor)
            self._backlog.gave_up(delivery.key, delivery)

    async def _resolve(self, planned: list[_Planned], works: list[Work], conflicts: Mapping[int, Conflict]) -> None:
        """Puts the messages of refused units back in front, to be decided on what the store really has."""
        again: list[Delivery] = []
        if any(conflict.kind == "mark" for conflict in conflicts.values()):
            await self._learn_marks([planned[number].unit for number in conflicts if number < len(planned)])
        for number, conflict in sorted(conflicts.items()):
            if number >= len(planned):
                work = works[number - len(planned)]
                if alone := work.apart():
                    self._work.extend(alone)  # What stands against one of them is no matter of the others.
                else:
                    work.done(conflict)
                continue
            delivery = planned[number].delivery
            self._hot.drop(delivery.key)
            if conflict.kind in ("behind", "moved"):
                self.attend(standing=conflict.kind == "moved")
                if delivery.enters or conflict.kind == "behind":
                    delivery.yielded += conflict.kind == "behind" and delivery.row is None
                    again.append(delivery)
                else:
                    self.share.wait_abroad(delivery)
                continue
            if conflict.kind == "limit":
                if self._lacks_slot(delivery):
                    again.append(delivery)
                continue
            if conflict.kind == "gone":
                # Somebody else consumed its row: whatever it asked for has been done there.
                refuse(delivery, BackendUnavailable(f"message {delivery.envelope.id} was taken over elsewhere"))
                continue
            if conflict.kind == "refused":
                delivery.refusal = SagasError(
                    f"the store cannot write what {delivery.envelope.type!r} asked for: {conflict.what}",
                    code="SAGA_NOT_STORABLE",
                )
            again.append(delivery)
        # Some may have lined up behind one that was not written after all.
        keys = [each.delivery.key for number, each in enumerate(planned) if number in conflicts]
        self._backlog.put_back(again + self._backlog.release(keys))

    def _lacks_slot(self, delivery: Delivery) -> bool:
        """What is to be done about a message that found no free slot; whether it is decided again right away."""
        definition = self._definitions().get(delivery.key[0])
        if definition is None or definition.concurrency is None:
            return True
        if not delivery.awaits_slot:
            self._counters.throttled[definition.id] += 1
        key = key_of(definition, delivery.envelope)
        if delivery.enters:
            if delivery.envelope.origin == "door" and definition.concurrency.on_limit == "reject":
                refuse(delivery, limited(definition, delivery, key))
                return False
            delivery.awaits_slot = True
            return True
        if any(each.envelope.slot == key for each in self._backlog.behind(delivery.key)):
            delivery.goes_without = True
            return True
        self._await_slot(delivery, key)
        return False

    def _await_slot(self, delivery: Delivery, key: str) -> None:
        """Holds the instance of a message until there is a slot for it."""
        self._slots.wait(delivery, key)
        until = self._clock.now() + LOOK_AGAIN
        if delivery.envelope.opens_run:
            self._defer(delivery, until)  # Nothing is behind it: its run has yet to be opened.
            return
        delivery.is_deferred, delivery.until = True, until
        self._backlog.hold(delivery)
        self._set_alarm(delivery)

    def _pass_slots_on(self, units: Sequence[UnitOfWork]) -> None:
        """Gives those who wait for slots that were given back their turn."""
        now = self._clock.now()
        for unit in units:
            first = self._slots.next_for(unit)
            if first is not None:
                self._backlog.hasten(first, now)
                self._alarm.set(now)

    async def _learn_marks(self, units: Sequence[UnitOfWork]) -> None:
        """Reads the marks that stand against refused units. Those decided on top of one that was seen before are
        refused for that alone, and may have been seen as well: a batch that comes again is found out as a whole."""
        wanted = [(unit.mark_pk, unit.mark.dedupe_key) for unit in units if unit.mark is not None]
        # If the store does not answer now, the next commit finds the marks again.
        with contextlib.suppress(SagasError):
            for (pk, _), mark in zip(wanted, await self._store.marks(wanted), strict=True):
                if mark is not None:
                    self._marks[pk, mark.dedupe_key] = mark
        self._bound_marks()

    async def _cannot_commit(self, batch: list[Delivery], works: list[Work], error: SagasError) -> None:
        self._counters.commits_failed += 1
        self._postponed = []  # They are part of the batch.
        if self.telemetry is not None:
            self.telemetry.not_committed(error)
        self._hot.clear()
        self._marks.clear()
        if isinstance(error, Fenced) and self._store.is_shareable:
            await self._start_over(batch, works, error)
            return
        rows = [each for each in batch if not (each.enters or each.is_aside or each.is_lined_up)]
        for delivery in batch:
            if delivery.enters:
                refuse(delivery, error)
        self._backlog.put_back(rows + self._backlog.release(delivery.key for delivery in batch))
        for work in works:
            if not work.is_patient:
                work.done(error)
        self._work.extendleft(reversed([work for work in works if work.is_patient]))
        if isinstance(error, Fenced):
            self.problem = error
            raise error
        if self.problem is None:
            _log.warning("the store %s does not take commits: %s", self._store.id, error.message)
        self.problem = error
        self._failures += 1
        if len(batch) + len(works) > 1:
            self._batch_max = max(1, min(self._batch_max, max(len(batch), len(works))) // 2)
        await asyncio.sleep(min(0.02 * 2**self._failures, _PAUSE_SECONDS_MAX))

    async def _start_over(self, batch: list[Delivery], works: list[Work], error: Fenced) -> None:
        """Another process took us for dead and has our partitions. Nothing of this turn was written: what is in the
        store is theirs now, what came through a door is still to be accepted."""
        _log.warning("%s", error.message)
        self._backlog.put_back(batch)
        # What the dispatcher has asked for since is of lanes that are not ours any more, and may come back to us in
        # another state.
        works += [work for work in self._work if work.is_patient]
        self._work = deque(work for work in self._work if not work.is_patient)
        for work in works:
            work.done(Conflict("moved", error.message) if work.is_patient else error)
        await self.share.lose_everything()

    def _drop(self, parts: frozenset[int]) -> list[Delivery]:
        """Forgets what is remembered, and what waits in `parts`; returns the latter."""
        # Of a partition that comes back, what was remembered when it went may not be true any more.
        self._hot.clear()
        self._marks.clear()
        return self._backlog.drop(parts)

    # ---------------------------------------------------------------- small things

    async def _load(self, batch: list[Delivery]) -> tuple[dict[InstanceKey, Hot], dict[InstanceKey, StoreCorrupt]]:
        """What is known of every key of the batch. One that cannot be read does not keep the others from their turn."""
        newest: dict[InstanceKey, Hot] = {}
        missing: list[InstanceKey] = []
        for delivery in batch:
            key = delivery.key
            if key not in newest:
                hot = self._hot.get(key)
                newest[key] = hot or _UNSEEN
                if hot is None:
                    missing.append(key)
        if not missing:
            return newest, {}
        found, corrupt = await self._read(missing)
        for key, loaded in found.items():
            if loaded.head is not None:
                newest[key] = hot = Hot(loaded.head, loaded.instance)
                if loaded.head.part in self.share.parts:
                    self._hot.put(key, hot)
        # Whatever is unseen gets a new head below, and none of the batch gets two.
        if len(self._pks) < len(batch):
            count = max(_PKS_AT_ONCE, len(batch))
            first = await self._store.reserve_pks(count)
            self._pks[:0] = range(first + count - 1, first - 1, -1)
        return newest, corrupt

    async def _read(self, keys: list[InstanceKey]) -> tuple[dict[InstanceKey, Loaded], dict[InstanceKey, StoreCorrupt]]:
        """What the store knows of `keys`, and why some of them cannot be read."""
        if not keys:
            return {}, {}
        try:
            return dict(zip(keys, await self._store.load(keys), strict=True)), {}
        except StoreCorrupt:
            found: dict[InstanceKey, Loaded] = {}
            corrupt: dict[InstanceKey, StoreCorrupt] = {}
            for key in keys:
                try:
                    (found[key],) = await self._store.load([key])
                except StoreCorrupt as error:
                    corrupt[key] = error
            return found, corrupt

    def _new_head(self, key: InstanceKey, now: datetime) -> Head:
        return Head(
            saga_id=key[0],
            key=key[1],
            pk=self._pks.pop(),
            part=partition_of(key_hash(*key)),
            run=0,
            created_at=now,
            awaits_start=True,
        )

    async def _add_rows(self, page: list[InboxRow]) -> None:
        """Queues rows that were found in the store. Those between two attempts go where they were before."""
        between = [row.envelope for row in page if row.envelope.due_at is not None]
        known, corrupt = await self._read(list({(each.saga_id, each.key): None for each in between}))
        fresh: list[Delivery] = []
        for row in page:
            envelope = row.envelope
            delivery = Delivery(envelope, (envelope.saga_id, envelope.key), row.ref)
            delivery.settled = self.share.come_home(row.ref)
            if envelope.due_at is None:
                fresh.append(delivery)
                continue
            instance = known[delivery.key].instance if delivery.key in known else None
            starts = delivery.key not in corrupt and (instance is None or is_terminal(instance.status))
            if starts and not envelope.opens_run and envelope.run is None and not self._backlog.is_held(delivery):
                self._backlog.hold(delivery)
                self._set_alarm(delivery)
            else:
                self._put_aside(delivery)
        self._backlog.add_in_order(fresh)

    def _put_aside(self, delivery: Delivery) -> None:
        self._backlog.put_aside(delivery)
        self._set_alarm(delivery)

    def _defer(self, delivery: Delivery, until: datetime | None) -> None:
        """Lets a message stand aside until its instance has moved."""
        delivery.is_deferred, delivery.until = True, until
        self._put_aside(delivery)

    def _set_alarm(self, delivery: Delivery) -> None:
        wakes_at = delivery.wakes_at
        if wakes_at is not None:
            self._alarm.set(wakes_at)

    def _bound_marks(self) -> None:
        if len(self._marks) > _MARKS_REMEMBERED:
            # Many at once, for the reason given in `HotInstances`.
            for where in list(islice(self._marks, _MARKS_REMEMBERED // 8)):
                del self._marks[where]

    def forget_mark(self, pk: int, dedupe_key: str) -> None:
        """A discarded dead letter frees its idempotency key."""
        self._marks.pop((pk, dedupe_key), None)

    def _report_steps(self, planned: list[_Planned], works: list[Work]) -> None:
        step = self._options.on_step
        step("committed")
        for each in planned:
            if each.unit.mark is not None and each.waits:
                step("accepted")
            entry = each.unit.entry
            if entry is not None and any(moment.phase == "compensate" for moment in entry.steps):
                step("compensated")
        for work in works:
            for _ in work.unit.outbox_done:
                step("settled")


def _is_held(decision: Decision) -> bool:
    """Whether the message has to wait behind its run, which is paused."""
    return decision.disposition == "deferred" and not decision.stands_aside


class _NewRows:
    """Numbers the rows that a commit has added, unit by unit: messages go to the backlog, unless another process holds
    their partition; `effects` are gathered, and messages that are due `later`."""

    __slots__ = ("_backlog", "_inbox_seq", "_outbox_seq", "_parts", "effects", "later")

    def __init__(self, result: CommitResult, backlog: Backlog, parts: frozenset[int]) -> None:
        self._backlog = backlog
        self._parts = parts
        self._inbox_seq = result.inbox_base
        self._outbox_seq = result.outbox_base
        self.effects: list[tuple[RowRef, OutboxEffect]] = []
        self.later: list[Delivery] = []

    def take(self, unit: UnitOfWork, *, first_waits: bool = False) -> Delivery | None:
        """Takes the rows of a written unit. `first_waits`: its first message has had its turn already, and does not
        get one now; it is returned."""
        waiting: Delivery | None = None
        for envelope in unit.inbox_add:
            key = (envelope.saga_id, envelope.key)
            part = partition_of(key_hash(*key))
            arrival = Delivery(envelope, key, RowRef(part, self._inbox_seq))
            self._inbox_seq += 1
            if first_waits:
                waiting, first_waits = arrival, False
            elif part in self._parts:
                if envelope.due_at is None:
                    self._backlog.add(arrival)
                else:
                    self.later.append(arrival)
        for effect in unit.outbox_add:
            self.effects.append((_row_ref((unit.part, self._outbox_seq)), effect))
            self._outbox_seq += 1
        return waiting


def _vanished(saga_id: str) -> SagasError:
    return SagasError(
        f"no loaded definition has the id {saga_id!r}: load its module again and redrive this message",
        code="SAGA_NOT_FOUND",
    )


def _give_up(envelope: Envelope, now: datetime, error: SagasError) -> Decision:
    """The decision about a message that no definition can be asked about."""
    return Decision(
        disposition="dead_lettered",
        reason=error.message,
        dead_letter=DeadLetter(
            id=dead_letter_id(now, envelope.saga_id, envelope.key, envelope.id, envelope.attempt),
            at=now,
            saga_id=envelope.saga_id,
            key=envelope.key,
            type=envelope.type,
            code=error.code,
            reason=error.message,
            attempts=envelope.attempt + 1,
            traceback=traceback_text(error),
            envelope=envelope,
        ),
        feed=FeedRecord(
            now,
            envelope.saga_id,
            envelope.key,
            envelope.run or 0,
            0,
            envelope.type,
            envelope.id,
            (FeedMoment(FeedKind.DEAD_LETTERED, None, error.message),),
        ),
    )
