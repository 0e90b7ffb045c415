"""`SagaRuntime`: registers definitions, and runs the roles that move messages.

    publish ──► receiver ──(commit)──► dispatcher ──► targets
                   ▲                        │ replies
    timekeeper ────┤────────────────────────┘
    scheduler  ────┘

Everything that changes an instance goes through the receiver, and everything the receiver does is one atomic commit of
the store. Several processes may run on one store: each holds some of its partitions, and the lifeline notices when
others come and go. The runtime owns its tasks and its lease while it runs; it never closes a store that it was given.

What it does for others is in `senders.py`, `onlookers.py` and `operators.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from sagaloom.clock import Clock, SystemClock
from sagaloom.definitions import SagaDefinition
from sagaloom.describe import describe
from sagaloom.engine.correlation import DefinitionSet
from sagaloom.engine.records import DeadLetter, OutboxEffect, Timer
from sagaloom.errors import BackendUnavailable, DefinitionError, SagasError
from sagaloom.ids import key_hash, partition_of
from sagaloom.ports.store import RegisteredDefinition, RowRef, SagaStore, UnitOfWork
from sagaloom.ports.targets import EffectTarget
from sagaloom.runtime.counters import Counters
from sagaloom.runtime.deliveries import Delivery
from sagaloom.runtime.dispatcher import Dispatcher
from sagaloom.runtime.evolution import oldest_readable, refuse_unreadable
from sagaloom.runtime.feed import FeedHub
from sagaloom.runtime.foyer import Foyer
from sagaloom.runtime.lifeline import Lifeline
from sagaloom.runtime.operators import Operators
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.pruner import Pruner
from sagaloom.runtime.receiver import Receiver
from sagaloom.runtime.repairs import Repairs
from sagaloom.runtime.retention import Retention
from sagaloom.runtime.scheduler import Scheduler
from sagaloom.runtime.senders import Senders
from sagaloom.runtime.signals import Signals
from sagaloom.runtime.standings import Standings
from sagaloom.runtime.timekeeper import Timekeeper
from sagaloom.runtime.weighing import Scales
from sagaloom.telemetry import TelemetryProviders, find_providers

if TYPE_CHECKING:
    from sagaloom.telemetry.sagas import SagaTelemetry

__all__ = ["RuntimeHealth", "SagaRuntime"]

_log = logging.getLogger("sagaloom.runtime")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeHealth:
    """Whether the runtime does its work, and what stands against it. `checks` has `ok` or a reason for each part."""

    ready: bool
    checks: Mapping[str, str]
    backlog: int = 0
    outbox: int = 0
    stalled_lanes: int = 0
    oldest_waiting_seconds: float = 0.0


class SagaRuntime(Senders, Operators):
    """Runs sagas on one store.

    Start it with `async with runtime:` or `start()` and `stop()`. `publish` is safe from any task of the loop.
    """

    def __init__(
        self,
        store: SagaStore,
        *,
        definitions: Iterable[SagaDefinition[Any]] = (),
        targets: Iterable[EffectTarget] = (),
        clock: Clock | None = None,
        options: RuntimeOptions | None = None,
        telemetry: TelemetryProviders | None = None,
    ) -> None:
        """`telemetry` says where spans and metrics go; without it they go to the providers that the process has set
        before `start`, if it has."""
        self.store = store
        self.clock: Clock = clock if clock is not None else SystemClock()
        self.options = options if options is not None else RuntimeOptions()
        self.definitions = DefinitionSet()
        """The registered definitions, as their sagas stand: enabled or not, paused or not."""
        self._registry_types: frozenset[str] = frozenset()
        self.counters = Counters()
        self.telemetry: SagaTelemetry | None = None
        """Who is told of what happens, while the runtime runs and if anybody listens."""
        self._providers = telemetry
        self._targets: dict[str, EffectTarget] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._state = "new"
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        """By what name this runtime stands among those on its store."""
        self._receiver = Receiver(
            store,
            self.clock,
            self.options,
            counters=self.counters,
            holder=self.holder,
            on_holding=self._hold,
            is_quiet=self._is_quiet,
            on_repair=self._carry_out,
            definitions=lambda: self.definitions,
            on_effects=self._effects_committed,
            on_timers=self._timers_committed,
            on_commit=self._committed,
        )
        self._scales = Scales(
            self._receiver.weight,
            bytes_max=self.options.backlog_bytes_max,
            each_bytes_max=self.options.limits.payload_bytes_max,
        )
        self._standings = Standings(store, self.clock, self._receiver, on_change=self._definitions_changed)
        self._dispatcher = Dispatcher(
            store,
            self.clock,
            self.options,
            counters=self.counters,
            targets=self._targets,
            share=self._receiver.share,
            submit=self._receiver.submit,
            offer=self._receiver.offer,
        )
        self._timekeeper = Timekeeper(store, self.clock, self.options, holds=self.holds, offer=self._receiver.offer)
        self._scheduler = Scheduler(
            store,
            self.clock,
            definitions=lambda: self.definitions,
            accept=self._accept_tick,
            give_up=self._give_up_tick,
            owns=self.holds,
        )
        self._feed = FeedHub(store, self.clock)
        self._pruner = Pruner(store, self.clock, self.options)
        self._retention = Retention(
            store, self.clock, self.options, self._receiver, definitions=lambda: self.definitions
        )
        self._foyer = Foyer(store, parts=lambda: self._receiver.share.parts, offer=self._receiver.offer)
        self._lifeline = Lifeline(store, self._receiver, on_nudge=self._foyer.wake)
        self._repairs = Repairs(
            store,
            self.clock,
            self._receiver,
            self._dispatcher,
            definitions=lambda: self.definitions,
            unknown=self._unknown,
        )
        self._signals = Signals(
            store,
            self.clock,
            self.options,
            self._receiver,
            definitions=lambda: self.definitions,
            watch=lambda saga_id, key: self.watch(saga_id=saga_id, key=key),
        )

        for definition in definitions:
            self.register(definition)
        for target in targets:
            self.add_target(target)

    # ---------------------------------------------------------------- definitions and targets

    def register(self, definition: SagaDefinition[Any]) -> None:
        """Adds a definition. The same one twice is fine; another one under a known id is a `DefinitionError`, and so
        is a durability tier that the store cannot promise."""
        known = self.definitions.get(definition.id)
        if known is not None:
            if known.fingerprint != definition.fingerprint:
                raise DefinitionError(
                    f"saga {definition.id!r} is registered twice with different content ({known.source or 'here'} and "
                    f"{definition.source or 'there'}): give one of them another id"
                )
            return
        reason = self.store.why_not(definition.durability)
        if reason is not None:
            raise DefinitionError(
                f"saga {definition.id!r} asks for durability {definition.durability!r}, which the store "
                f"{self.store.id} cannot promise: {reason}"
            )
        if self._state == "running" and oldest_readable(definition) > 1:
            raise DefinitionError(
                f"saga {definition.id!r} has no migration from version 1, and whether live instances need one is asked "
                "of the store at start(): register it before"
            )
        self._standings.add(definition)

    def add_target(self, target: EffectTarget) -> None:
        """Makes effects of the target's kind deliverable. A kind has one target; `saga` is the runtime's own."""
        if target.kind == "saga" or target.kind in self._targets:
            raise DefinitionError(f"a target of kind {target.kind!r} is there already: give this one another kind")
        self._targets[target.kind] = target

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Writes the registry, takes a share of the store and loads what waits there, and starts the roles. What other
        live processes hold comes to us within a second or so, as soon as they have ended what is under way."""
        if self._state != "new":
            raise DefinitionError(f"a runtime starts once; this one is {self._state}: make another")
        self._state = "starting"
        self._listen()
        try:
            await self._standings.load()
            for definition in self.definitions:
                await refuse_unreadable(self.store, definition)
            await self._write_registry()
            await self._receiver.start()
            if self.options.works:
                await self._scheduler.load()
        except BaseException:
            await self._let_go("failed to start")
            raise
        # Kept, for `get_running_loop` asks the system for the process id each time: too much for every message.
        self._loop = asyncio.get_running_loop()
        self._state = "running"
        self._spawn("receiver", self._receiver.run())
        self._spawn("lifeline", self._lifeline.run())
        self._spawn("standings", self._standings.watch())
        if not self.options.works:
            return
        self._spawn("foyer", self._foyer.run())
        self._spawn("timekeeper", self._timekeeper.run())
        self._spawn("scheduler", self._scheduler.run())
        self._spawn("pruner", self._pruner.run())
        self._spawn("retention", self._retention.run())
        self._spawn("dispatcher-watch", self._dispatcher.watch())
        for number in range(self.options.dispatch_concurrency):
            self._spawn(f"dispatcher-{number}", self._dispatcher.run())

    async def stop(self) -> None:
        """Refuses new messages, gives what is under way `drain_seconds` to end, and lets the store go. What does not
        end in time is in the store, and goes on at the next start. Stopping twice is no error."""
        if self._state == "running":
            self._state = "stopping"
            self._receiver.share.is_leaving = True
            self._scheduler.close()
            with contextlib.suppress(TimeoutError):
                await self._wait_until(self._is_drained, self.options.drain_seconds)
        await self._let_go("stopped")

    async def abandon(self) -> None:
        """Ends at once, draining nothing, as if the process had been killed: for tests of recovery."""
        self._state = "stopping"
        await self._let_go("abandoned", says_goodbye=False)

    async def __aenter__(self) -> SagaRuntime:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def settled(self, timeout: float = 30.0) -> None:
        """Returns when nothing is left that could be done now; raises `TimeoutError` after `timeout` seconds."""
        prune = (self._pruner, self._retention)
        await self._wait_until(lambda: self._is_drained() and all(role.is_idle for role in prune), timeout)

    @property
    def overdue(self) -> Mapping[str, int]:
        """How many live runs of a saga are older than its `active_days`, as of the last hour; 10,000 are the most."""
        return self._retention.overdue

    def health(self) -> RuntimeHealth:
        """What works right now; looks only at memory, so that it can be asked often."""
        checks = {"store": self._store_check()}
        for role in ("receiver", "timekeeper", "scheduler", "dispatcher", "lifeline"):
            checks[role] = self._role_check(role)
        oldest = self._receiver.oldest_waiting()
        return RuntimeHealth(
            ready=all(found == "ok" for found in checks.values()),
            checks=checks,
            backlog=self._receiver.waiting(),
            outbox=self._dispatcher.waiting,
            stalled_lanes=self._dispatcher.stalled_lanes,
            oldest_waiting_seconds=max(0.0, (self.clock.now() - oldest).total_seconds()) if oldest else 0.0,
        )

    # ---------------------------------------------------------------- inside

    async def _give_up_tick(self, letter: DeadLetter) -> None:
        # The partition of the schedule, which is ours; the tick never found one of its own.
        part = partition_of(key_hash(letter.saga_id, letter.saga_id))
        await self._repairs.submit(UnitOfWork(part=part, dead_letters_add=(letter,)))

    def holds(self, part: int) -> bool:
        """Whether partition `part` is ours to work on right now."""
        return part in self._receiver.share.parts

    def _carry_out(self, delivery: Delivery) -> None:
        self._repairs.carry_out(delivery)

    def _is_quiet(self, parts: Collection[int]) -> bool:
        return self._dispatcher.is_quiet(parts)

    async def _hold(self, gained: frozenset[int], lost: frozenset[int]) -> None:
        if lost or gained:
            self._dispatcher.drop(lost | gained)  # a part of what is gained may have been read before, in vain
        if gained:
            await self._dispatcher.load(gained)
            self._timekeeper.gained(gained)
            self._foyer.wake()
            self._scheduler.wake()

    def _effects_committed(self, rows: Sequence[tuple[RowRef, OutboxEffect]]) -> None:
        self._dispatcher.add(rows)

    def _definitions_changed(self) -> None:
        self.definitions = self._standings.definitions
        if self._state == "running":
            self._scheduler.wake()

    def _committed(self, feed_base: int) -> None:
        self._feed.committed()
        self._pruner.committed(feed_base)

    def _timers_committed(self, timers: Sequence[Timer]) -> None:
        self._timekeeper.added(timers)

    def _listen(self) -> None:
        """Finds out whether anybody wants to hear what happens here."""
        providers = self._providers if self._providers is not None else find_providers()
        if providers is None:
            return
        from sagaloom.telemetry.sagas import SagaTelemetry  # and with it OpenTelemetry, which nobody else needs

        self.telemetry = SagaTelemetry(
            providers, counts=self.counters, health=self.health, partitions=lambda: len(self._receiver.share.parts)
        )
        self._receiver.telemetry = self._dispatcher.telemetry = self.telemetry

    async def _write_registry(self) -> None:
        now = self.clock.now()
        await self.store.put_definitions(
            [
                RegisteredDefinition(each.id, each.version, each.fingerprint, describe(each), now)
                for each in self.definitions
            ]
        )
        known = await self.store.definitions()
        self._registry_types = frozenset(
            name for each in known for name in _types_of(each.document) if not self.definitions.handling(name)
        )

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"sagaloom-{name}")
        task.add_done_callback(self._role_ended)
        self._tasks[name] = task

    def _role_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s has ended: %s", task.get_name(), error, exc_info=error)

    def _store_check(self) -> str:
        problem = self._receiver.problem
        return problem.message if problem is not None else self.store.problem or "ok"

    def _role_check(self, role: str) -> str:
        if self._state != "running":
            return self._state
        for name, task in self._tasks.items():
            if name.startswith(role) and task.done():
                return "ended" if task.cancelled() else f"ended: {task.exception()}"
        return "ok"

    def _is_drained(self) -> bool:
        if not self.options.works:
            return self._receiver.is_idle
        roles = (self._receiver, self._dispatcher, self._timekeeper, self._scheduler, self._repairs)
        return all(role.is_idle for role in roles)

    async def _wait_until(self, condition: Callable[[], bool], timeout: float) -> None:
        async with asyncio.timeout(timeout):
            while not condition():  # noqa: ASYNC110 - asked for rarely, and what is waited for has no event of its own
                await asyncio.sleep(0.001)

    async def _let_go(self, state: str, *, says_goodbye: bool = True) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.telemetry is not None:
            self.telemetry.close()
        closing = BackendUnavailable(f"the runtime is {state}: publish again, under the same message id")
        self._timekeeper.close()
        self._scheduler.close()
        self._pruner.close()
        self._retention.close()
        self._feed.close(state)
        self._repairs.close()
        self._dispatcher.close()
        self._receiver.close(closing)
        try:
            if says_goodbye:
                await self._receiver.share.leave()
        except SagasError as error:
            # The others find out, and take over; that we could not say goodbye is no matter.
            _log.warning("the lease could not be released: %s", error.message)
        self._state = state


def _types_of(document: Mapping[str, object]) -> list[str]:
    """The message types in a definition's description."""
    found: list[str] = []
    types = document.get("handledMessageTypes")
    for each in cast("Sequence[object]", types) if isinstance(types, (list, tuple)) else ():
        name = cast("Mapping[str, object]", each).get("type") if isinstance(each, Mapping) else each
        if isinstance(name, str):
            found.append(name)
    return found
