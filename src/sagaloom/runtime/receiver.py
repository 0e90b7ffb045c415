"""The receiver: takes messages in the order of their acceptance, decides them, and commits what they ask for.

Theory of operation
-------------------
One task turns in a loop. Each turn takes everything that is waiting (up to `batch_max`), loads the instances that are
not hot, decides every message in order, commits all decisions at once, and only then tells anybody. While a commit is
under way new messages gather, so batches grow with the load by themselves: that is where throughput comes from. They
stay small enough for a store to take them in time: a turn ends when what it decided is some megabytes, and after one
that failed the next takes half as much.

1. A message that comes through a door is accepted and applied in one commit; its publisher hears after that commit.
   So is the only answer to an effect, and the same commit settles the effect.
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

The turn is here, and what happens when it fails. What a turn decides is in `sagaloom.runtime.planner`, what follows its
commit in `sagaloom.runtime.follow_up`; between them they share what waits (`backlog`, `slots`), what is remembered
(`memory`) and what is ours (`share`).

A store that works elsewhere (`is_remote`) and is ours alone is kept busy: while a commit is under way there, the next
messages are decided, except those of keys that it is about. Half of what waits goes into each commit then. The second
is sent when the first is written, before its publishers hear of it; if the first fails, the second is dropped, and
decided again.

What we dislike about it: commits follow each other, so a store with a slow round trip is idle for that long.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Final

from sagaloom.clock import Clock
from sagaloom.engine.correlation import DefinitionSet
from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.records import OutboxEffect, Timer
from sagaloom.errors import BackendUnavailable, Fenced, SagasError
from sagaloom.ports.store import CommitResult, Conflict, InboxRow, RowRef, SagaStore, UnitOfWork
from sagaloom.runtime.alarm import Alarm
from sagaloom.runtime.backlog import Backlog
from sagaloom.runtime.cache import Hot
from sagaloom.runtime.counters import Counters
from sagaloom.runtime.deliveries import Delivery, InstanceKey, Planned, Work, refuse
from sagaloom.runtime.follow_up import FollowUp
from sagaloom.runtime.memory import Memory
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.planner import Planner
from sagaloom.runtime.share import Share
from sagaloom.runtime.slots import Slots

if TYPE_CHECKING:
    from sagaloom.telemetry.sagas import SagaTelemetry

__all__ = ["Receiver"]

_log = logging.getLogger("sagaloom.receiver")
_PAUSE_SECONDS_MAX: Final = 1.0
_MOMENT_SECONDS: Final = 0.0005
_STARTS_MAX: Final = 10
_HALF_MIN: Final = 32
"""Fewer messages are not worth two commits."""
_TURNS_IN_A_ROW: Final = 16
"""Then it is looked what others have brought, and whoever waits for `turning` gets it."""


class _Turn:
    """What is taken out of the backlog at once, and what becomes of it."""

    __slots__ = ("batch", "planned", "postponed", "result", "units", "works")

    def __init__(self) -> None:
        self.batch: list[Delivery] = []
        self.works: list[Work] = []
        self.planned: list[Planned] = []
        self.postponed: list[Delivery] = []
        """What is left for another turn, in order."""
        self.units: list[UnitOfWork] = []
        self.result: CommitResult | None = None

    def keys(self) -> set[InstanceKey]:
        """Whose next messages have to wait until this turn is written: those of its messages, and those it sends some
        to, for what it sends is accepted before anything younger."""
        keys = {delivery.key for delivery in self.batch}
        keys.update((envelope.saga_id, envelope.key) for unit in self.units for envelope in unit.inbox_add)
        return keys


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
        self._on_commit = on_commit
        self._alarm = Alarm(clock, self._bring_back)
        self._backlog = Backlog(self._alarm.set)
        self.waiting = self._backlog.waiting
        self.weight = self._backlog.weight
        self._work: deque[Work] = deque()
        self._memory = Memory(store, bytes_max=options.cache_bytes_max)
        self.share = Share(
            store,
            holder=holder,
            works=options.works,
            queue=self._add_rows,
            drop=self._drop,
            on_holding=on_holding,
            is_quiet=is_quiet,
        )
        slots = Slots(clock, self._backlog, counters, definitions)
        self._planner = Planner(
            store,
            clock,
            options,
            counters=counters,
            definitions=definitions,
            backlog=self._backlog,
            memory=self._memory,
            slots=slots,
            share=self.share,
            on_repair=on_repair,
        )
        self._follow_up = FollowUp(
            options,
            counters=counters,
            backlog=self._backlog,
            memory=self._memory,
            slots=slots,
            share=self.share,
            submit=self._work.extend,
            on_effects=on_effects,
            on_timers=on_timers,
        )
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
        if self._wake is not None:
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
            self._memory.hot.drop(key)

    def forget_marks(self, before: datetime) -> None:
        """The store has forgotten the marks of messages that were accepted before `before`."""
        self._memory.forget_marks(before)

    def forget_mark(self, pk: int, dedupe_key: str) -> None:
        """A discarded dead letter frees its idempotency key."""
        self._memory.marks.pop((pk, dedupe_key), None)

    def hot(self, key: InstanceKey) -> Hot | None:
        return self._memory.hot.get(key)

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
            if delivery.effect is not None:
                delivery.effect.done(error)
        for work in self._work:
            work.done(error)
        self._work.clear()
        self.share.close(error)
        self._memory.clear()

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
        turn = _Turn()
        try:
            if self.share.needs_attention:
                await self.share.look_after()
            self._take(turn)
            if self.problem is not None:
                await self._store.probe()
                self.problem, self._failures = None, 0
            await self._plan(turn)
        except Exception as error:  # noqa: BLE001 - see `_as_trouble`
            await self._cannot_commit([turn], _as_trouble(error))
            return
        await self._commit(turn)

    @property
    def _gets_ahead(self) -> bool:
        """Whether the next turn is decided while one is committed. Between processes that share a store the time is
        used anyway, and what half a commit saves there is less than what a second one costs."""
        return self._store.is_remote and not self.share.is_shared

    def _take(self, turn: _Turn, under_way: _Turn | None = None) -> None:
        """Takes what waits, except messages of keys that are under way: those are decided on top of how that ends."""
        limit = self._batch_max
        if self._gets_ahead:
            # One half is decided while the other is committed.
            busy = 0 if under_way is None else len(under_way.batch)
            limit = min(limit, max(_HALF_MIN, (len(self._backlog) + busy + 1) // 2))
        turn.batch = self._backlog.take(limit)
        if under_way is not None:
            keys = under_way.keys()
            self._backlog.put_back([each for each in turn.batch if each.key in keys])
            turn.batch = [each for each in turn.batch if each.key not in keys]
        turn.works = self._take_works()
        self._options.on_step("claimed")

    async def _plan(self, turn: _Turn) -> None:
        if turn.batch:
            turn.planned, turn.postponed = await self._planner.plan(turn.batch, self.telemetry)
        turn.units = [each.unit for each in turn.planned]
        turn.units.extend([work.unit for work in turn.works])

    async def _commit(self, turn: _Turn) -> None:
        """Commits a turn, and those that are decided meanwhile, each as soon as the one before is written."""
        before: _Turn | None = None
        trouble: SagasError | None = None
        for left in range(_TURNS_IN_A_ROW, 0, -1):
            if not turn.units:
                break
            ahead = _Turn()
            try:
                trouble = await self._commit_one(turn, before, ahead if left > 1 else None)
            except Exception as error:  # noqa: BLE001 - see `_as_trouble`
                await self._cannot_commit([turn, ahead], _as_trouble(error))
                return
            before, turn = turn, ahead
            if trouble is not None:
                break
        if before is not None:
            await self._tell(before)
        if trouble is not None:
            await self._cannot_commit([turn], trouble)
        else:
            self._postpone(turn)

    async def _commit_one(self, turn: _Turn, before: _Turn | None, ahead: _Turn | None) -> SagasError | None:
        """Commits a turn. While a remote store is at it, everybody hears of the turn `before`, and what they do then,
        and what else has come, is decided as the turn `ahead`; returns why that was not possible."""
        self._options.on_step("decided")
        assert self.share.lease is not None
        commit = self._store.commit(turn.units, lease=self.share.lease)
        trouble: SagasError | None = None
        if not self._gets_ahead:
            turn.result = await commit
        else:
            committing = asyncio.create_task(commit)
            try:
                try:
                    await asyncio.sleep(0)  # It is sent.
                finally:
                    if before is not None:
                        await self._tell(before)
                if ahead is not None:
                    trouble = await self._get_ahead(ahead, turn)
            except BaseException:
                committing.cancel()
                await asyncio.wait((committing,))
                raise
            turn.result = await committing
        if self._batch_max < self._options.batch_max:
            self._batch_max = min(2 * self._batch_max, self._options.batch_max)
        if self.telemetry is not None:
            self.telemetry.committed(turn.planned, turn.works, turn.result.conflicts)
        self._on_commit(turn.result.feed_base)
        return trouble

    async def _get_ahead(self, ahead: _Turn, under_way: _Turn) -> SagasError | None:
        try:
            await asyncio.sleep(0)  # Who was just answered offers the next message.
            self._take(ahead, under_way)
            await self._plan(ahead)
        except Exception as error:  # noqa: BLE001 - see `_as_trouble`
            return _as_trouble(error)
        return None

    async def _tell(self, turn: _Turn) -> None:
        """Has everybody hear what was written."""
        assert turn.result is not None
        self._postpone(turn)
        await self._follow_up.follow_up(turn.planned, turn.works, turn.result)

    def _postpone(self, turn: _Turn) -> None:
        """Puts back what has to wait for something older that had no turn yet."""
        if turn.postponed:
            self._backlog.put_back(turn.postponed)

    def _take_works(self) -> list[Work]:
        works = self._work
        if len(works) <= self._batch_max:
            taken = list(works)
            works.clear()
            return taken
        return [works.popleft() for _ in range(self._batch_max)]

    # ---------------------------------------------------------------- when nothing was committed

    async def _cannot_commit(self, turns: Sequence[_Turn], error: SagasError) -> None:
        """Puts back what was tried, first of all, and what was decided on top of it."""
        self._counters.commits_failed += 1
        batch = [delivery for turn in turns for delivery in turn.batch]
        works = [work for turn in turns for work in turn.works]
        if self.telemetry is not None:
            self.telemetry.not_committed(error)
        self._memory.clear()
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
        tried = turns[0]
        if len(tried.batch) + len(tried.works) > 1:
            self._batch_max = max(1, min(self._batch_max, max(len(tried.batch), len(tried.works))) // 2)
        await asyncio.sleep(min(0.02 * 2**self._failures, _PAUSE_SECONDS_MAX))

    async def _start_over(self, batch: list[Delivery], works: list[Work], error: Fenced) -> None:
        """Another process took us for dead and has our partitions. Nothing of this turn was written: what is in the
        store is theirs now, what came through a door is still to be accepted."""
        _log.warning("%s", error.message)
        self._backlog.put_back(batch)
        # What the dispatcher has asked for since is of lanes that are not ours any more, and may come back to us in
        # another state.
        works += [work for work in self._work if work.is_patient]
        others = [work for work in self._work if not work.is_patient]
        self._work.clear()
        self._work.extend(others)
        for work in works:
            work.done(Conflict("moved", error.message) if work.is_patient else error)
        await self.share.lose_everything()

    def _drop(self, parts: frozenset[int]) -> list[Delivery]:
        """Forgets what is remembered, and what waits in `parts`; returns the latter."""
        # Of a partition that comes back, what was remembered when it went may not be true any more.
        self._memory.clear()
        dropped = self._backlog.drop(parts)
        for delivery in dropped:
            if delivery.effect is not None:
                delivery.effect.done(Conflict("moved", f"partition {delivery.part} is held by another process"))
        return dropped

    async def _add_rows(self, page: list[InboxRow]) -> None:
        """Queues rows that were found in the store. Those between two attempts go where they were before."""
        between = [row.envelope for row in page if row.envelope.due_at is not None]
        known, corrupt = await self._memory.read(list({(each.saga_id, each.key): None for each in between}))
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
            else:
                self._backlog.put_aside(delivery)
        self._backlog.add_in_order(fresh)


def _as_trouble(error: Exception) -> SagasError:
    """What kept a turn from being committed. What is none of ours is a bug, of ours or of the store's: it must not end
    the loop, for then nobody would hear of anything again."""
    if isinstance(error, SagasError):
        return error
    _log.error("a turn has failed", exc_info=error)
    return BackendUnavailable(f"a turn has failed: {error!r}")
