"""`SagaRuntime`: registers definitions, takes messages in, and runs the roles that move them.

    publish ──► receiver ──(commit)──► dispatcher ──► targets
                   ▲                        │ replies
    timekeeper ────┤────────────────────────┘
    scheduler  ────┘

Everything that changes an instance goes through the receiver, and everything the receiver does is one atomic commit of
the store. Several processes may run on one store: each holds some of its partitions, and the lifeline notices when
others come and go. The runtime owns its tasks and its lease while it runs; it never closes a store that it was given.
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
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import msgspec

from sagaloom.clock import Clock, SystemClock
from sagaloom.codec import encode_any
from sagaloom.definitions import QueryDefinition, SagaDefinition, SignalDefinition
from sagaloom.describe import describe
from sagaloom.engine.correlation import DefinitionSet, address
from sagaloom.engine.records import (
    Child,
    ChildStatus,
    DeadLetter,
    HistoryEntry,
    Instance,
    OutboxEffect,
    Timer,
)
from sagaloom.engine.schedules import tick_message
from sagaloom.engine.timer_controls import timer_control
from sagaloom.errors import (
    BackendUnavailable,
    DefinitionError,
    MessageRejected,
    SagaNotFound,
    SagasError,
    ScheduleNotFound,
    TimerNotFound,
)
from sagaloom.ids import check_key, key_hash, new_message_id, new_traceparent, partition_of
from sagaloom.messages import RESERVED_PREFIX, SagaMessage, as_message
from sagaloom.ports.store import (
    InstanceFilter,
    JoinsTransactions,
    RegisteredDefinition,
    RowRef,
    SagaStore,
    UnitOfWork,
)
from sagaloom.ports.targets import EffectTarget
from sagaloom.runtime.counters import Counters
from sagaloom.runtime.deliveries import Delivery
from sagaloom.runtime.dispatcher import Dispatcher
from sagaloom.runtime.evolution import oldest_readable, refuse_unreadable
from sagaloom.runtime.feed import FeedHub, FeedWatch
from sagaloom.runtime.foyer import Foyer
from sagaloom.runtime.lifeline import Lifeline
from sagaloom.runtime.operators import Operators, no_instance
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.outcomes import outcome_of_left
from sagaloom.runtime.pruner import Pruner
from sagaloom.runtime.receipts import (
    Outcome,
    PublishReceipt,
    PublishRejected,
    QueryResult,
    SignalReceipt,
    UpdateReceipt,
)
from sagaloom.runtime.receiver import Receiver
from sagaloom.runtime.repairs import Repairs
from sagaloom.runtime.replies import reply_envelope, reply_unwanted
from sagaloom.runtime.scheduler import Scheduler, ScheduleStatus
from sagaloom.runtime.signals import Signals
from sagaloom.runtime.standings import Standings
from sagaloom.runtime.timekeeper import Timekeeper
from sagaloom.runtime.timers import WaitingTimer, waiting_timers
from sagaloom.telemetry import TelemetryProviders, carried_trace, find_providers

if TYPE_CHECKING:
    from sagaloom.telemetry.sagas import Publishing, SagaTelemetry

__all__ = ["RuntimeHealth", "SagaRuntime"]

_log = logging.getLogger("sagaloom.runtime")
_T = TypeVar("_T")
_P = TypeVar("_P")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeHealth:
    """Whether the runtime does its work, and what stands against it. `checks` has `ok` or a reason for each part."""

    ready: bool
    checks: Mapping[str, str]
    backlog: int = 0
    outbox: int = 0
    stalled_lanes: int = 0
    oldest_waiting_seconds: float = 0.0


class SagaRuntime(Operators):
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
        self._registry_ids: frozenset[str] = frozenset()
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
        self._standings = Standings(store, self.clock, self._receiver, on_change=self._definitions_changed)
        self._dispatcher = Dispatcher(
            store,
            self.clock,
            self.options,
            counters=self.counters,
            targets=self._targets,
            share=self._receiver.share,
            submit=self._receiver.submit,
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

    async def settled(self, timeout: float = 10.0) -> None:
        """Returns when nothing is left that could be done now; raises `TimeoutError` after `timeout` seconds."""
        await self._wait_until(lambda: self._is_drained() and self._pruner.is_idle, timeout)

    def health(self) -> RuntimeHealth:
        """What works right now; looks only at memory, so that it can be asked often."""
        checks = {"store": self._store_check()}
        for role in ("receiver", "timekeeper", "scheduler", "dispatcher", "lifeline"):
            checks[role] = self._role_check(role)
        oldest = self._receiver.oldest_waiting()
        return RuntimeHealth(
            ready=all(found == "ok" for found in checks.values()),
            checks=checks,
            backlog=self._receiver.waiting,
            outbox=self._dispatcher.waiting,
            stalled_lanes=self._dispatcher.stalled_lanes,
            oldest_waiting_seconds=max(0.0, (self.clock.now() - oldest).total_seconds()) if oldest else 0.0,
        )

    # ---------------------------------------------------------------- messages

    async def publish(
        self,
        message: object,
        options: Mapping[str, Any] | None = None,
        *,
        wait: float | timedelta | None = None,
        within: object | None = None,
        **overrides: Any,
    ) -> PublishReceipt | PublishRejected:
        """Takes a message in and answers once it is durable.

        `message` is a `SagaMessage`, a mapping with `type` and `payload`, or an instance of a message class; `options`
        or keywords override its `correlation_key`, `idempotency_key`, `concurrency_key`, `id`, `traceparent` and
        `tracestate`. Without a `traceparent` it goes on in the trace that is going on. With `wait` (seconds) the answer
        also waits, at most that long, until each saga is done with the message; its outcomes then show state, effects
        and result. A refusal is returned, never raised.

        `within` is the asyncpg connection of a transaction of yours, on the database of the store: the message is part
        of it, and is taken in when it has committed. Its receipt says `pending`, and there is nothing to wait for yet.
        """
        message_type: str | None = None
        publishing: Publishing | None = None
        try:
            received = as_message(message)
            message_type = received.type
            if options or overrides:
                received = _changed(received, {**(options or {}), **overrides})
            if received.traceparent is None and (trace := carried_trace()) is not None:
                received = msgspec.structs.replace(received, traceparent=trace.traceparent, tracestate=trace.tracestate)
            if self.telemetry is not None:
                publishing = self.telemetry.publish(received)
                received = publishing.message
            if within is not None:
                return await self._leave(received, within, waits=wait is not None)
            deliveries = self._address(received, waits=wait is not None)
            outcomes: list[Outcome] = []
            for delivery in deliveries:
                assert delivery.answered is not None
                outcomes.append(await delivery.answered)
            if wait is not None:
                await self._await_ends(deliveries, outcomes, wait)
            receipt = _receipt(received.type, outcomes)
            if publishing is not None:
                publishing.took(receipt)
            return receipt
        except SagasError as error:
            if publishing is not None:
                publishing.failed(error)
            return PublishRejected(message_type=message_type, error=error)
        finally:
            if publishing is not None:
                publishing.end()

    async def publish_many(self, messages: Sequence[object]) -> list[PublishReceipt | PublishRejected]:
        """Takes many messages in together, in their order, and answers each alone."""
        limit = self.options.limits.batch_messages_max
        if len(messages) > limit:
            error = MessageRejected(f"{len(messages)} messages in one batch: at most {limit} are allowed, split it")
            return [PublishRejected(message_type=None, error=error) for _ in messages]
        # Gathered coroutines run in order up to their first wait, which is after the message was queued.
        return list(await asyncio.gather(*(self.publish(message) for message in messages)))

    async def reply(
        self, saga_id: str, key: str, message: object, *, run: int, causation_id: str | None = None, hops: int = 0
    ) -> Outcome:
        """Hands the very run that has asked for it an answer, such as the end of a job, and returns once it is durable.

        `message` is what `publish` takes, with an `id`: under that one it is applied once. `causation_id` is the key of
        the effect that is answered, and `hops` its place in a cascade. What the saga has no handler for changes
        nothing, and so does an answer to a run that is over: the outcome says `ignored`.

        Raises `SagaNotFound`, `MessageRejected`, and `BackendUnavailable`, also while no process here knows the saga.
        """
        self._refuse_if_not_running()
        if self._receiver.problem is not None:
            raise self._receiver.problem
        received = as_message(message)
        definition = self.definitions.get(saga_id)
        if definition is None:
            raise await self._unknown_saga(saga_id)
        if received.type not in definition.handlers:
            return reply_unwanted(saga_id, key, received, run=run)
        envelope = reply_envelope(
            saga_id,
            key,
            received,
            self._payload(received),
            run=run,
            now=self.clock.now(),
            causation_id=causation_id,
            hops=hops,
        )
        answered: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._receiver.offer(Delivery(envelope, (saga_id, key), answered=answered))
        return await answered

    async def _unknown_saga(self, saga_id: str) -> SagasError:
        if any(each.saga_id == saga_id for each in await self.store.definitions()):
            return BackendUnavailable(
                f"saga {saga_id!r:.80} is known to this store, but not loaded here: load its module, or try again "
                "where it is loaded",
                code="SAGA_NOT_LOADED",
            )
        return SagaNotFound(f"there is no saga {saga_id!r:.80} here, and the store has never seen one")

    async def _leave(self, message: SagaMessage[Any], connection: object, *, waits: bool) -> PublishReceipt:
        """Leaves a message in somebody's own transaction."""
        if not isinstance(self.store, JoinsTransactions):
            raise MessageRejected(
                f"the store {self.store.id} has no transactions to join: publish without within=, or use the sql store"
            )
        if waits:
            raise MessageRejected("within= and wait= contradict each other: nothing happens before your commit")
        envelopes = [delivery.envelope for delivery in self._addressed(message, waits=False, only=None)]
        await self.store.leave(connection, envelopes)
        return _receipt(message.type, [outcome_of_left(envelope) for envelope in envelopes])

    def _address(
        self, message: SagaMessage[Any], *, waits: bool, only: SagaDefinition[Any] | None = None
    ) -> list[Delivery]:
        """Queues the message for every saga that handles its type, or for `only` one, or raises why not; nothing was
        queued then."""
        deliveries = self._addressed(message, waits=waits, only=only)
        for delivery in deliveries:
            self._receiver.offer(delivery)
        return deliveries

    def _addressed(self, message: SagaMessage[Any], *, waits: bool, only: SagaDefinition[Any] | None) -> list[Delivery]:
        """The message for every saga that handles its type, or for `only` one."""
        if self._state != "running":
            raise BackendUnavailable(
                f"the runtime is {self._state}: publish between start() and stop()", code="SAGA_NOT_STARTED"
            )
        if self._receiver.problem is not None:
            raise self._receiver.problem
        waiting = self._receiver.waiting
        if waiting >= self.options.backlog_max:
            raise BackendUnavailable(f"{waiting} messages are waiting already: try again later", code="SAGA_OVERLOADED")
        receivers = (only,) if only is not None else self.definitions.handling(message.type)
        if not receivers:
            raise self._unknown(message.type)
        payload = self._payload(message)
        now = self.clock.now()
        if message.idempotency_key is not None:
            check_key(message.idempotency_key, what="idempotency key")
        message_id = check_key(message.id, what="message id") if message.id is not None else new_message_id(now)
        loop = self._loop
        assert loop is not None
        deliveries: list[Delivery] = []
        for definition in receivers:
            found = address(definition, message, payload_json=payload, accepted_at=now, message_id=message_id)
            envelope = found.envelope
            deliveries.append(
                Delivery(
                    envelope,
                    (envelope.saga_id, envelope.key),
                    typed=found.message,
                    answered=loop.create_future(),
                    settled=loop.create_future() if waits else None,
                )
            )
        return deliveries

    async def _await_ends(self, deliveries: list[Delivery], outcomes: list[Outcome], wait: float | timedelta) -> None:
        """Puts how the messages ended in the place of how they were accepted, for those that end in time."""
        if not any(outcome.disposition in ("pending", "deferred") for outcome in outcomes):
            return
        seconds = wait.total_seconds() if isinstance(wait, timedelta) else wait
        waiting = [delivery.settled for delivery in deliveries if delivery.settled is not None]
        await asyncio.wait(waiting, timeout=min(max(seconds, 0.0), self.options.wait_seconds_max))
        for number, delivery in enumerate(deliveries):
            if delivery.settled is None:
                continue
            if not delivery.settled.done():
                delivery.settled.cancel()  # Nobody waits for it any more, so nobody need look for it.
            elif not delivery.settled.exception():
                outcomes[number] = delivery.settled.result()

    def _payload(self, message: SagaMessage[Any]) -> bytes:
        payload = message.payload
        if isinstance(payload, msgspec.Raw):
            encoded = bytes(payload)
        else:
            try:
                encoded = encode_any(payload)
            except SagasError as error:
                raise MessageRejected(f"message {message.type!r}: its payload is not JSON: {error.message}") from error
        limit = self.options.limits.payload_bytes_max
        if len(encoded) > limit:
            raise MessageRejected(
                f"message {message.type!r}: its payload has {len(encoded)} bytes, at most {limit} are allowed; store "
                "large things elsewhere and send a reference",
                code="PAYLOAD_TOO_LARGE",
            )
        return encoded

    def _unknown(self, message_type: str) -> SagasError:
        if message_type.startswith(RESERVED_PREFIX):
            return MessageRejected(
                f"message type {message_type!r:.80} belongs to the engine: use cancel, pause or resume for what an "
                "operator does, and another name for a message of yours",
                code="MESSAGE_TYPE_RESERVED",
            )
        if disabled := self.definitions.disabled_for(message_type):
            names = ", ".join(repr(each.id) for each in disabled)
            said = next((f" ({each.about.said})" for each in disabled if each.about.said), "")
            return BackendUnavailable(
                f"message type {message_type!r:.80} is handled by {names} alone, which is disabled{said}: try again "
                "when it is enabled, by an operator or in its configuration",
                code="SAGA_DISABLED",
            )
        if message_type in self._registry_types:
            return BackendUnavailable(
                f"message type {message_type!r} is known to this store, but no definition that is loaded here handles "
                "it: load its module, or try again where it is loaded",
                code="SAGA_NOT_LOADED",
            )
        known = sorted({name for definition in self.definitions for name in definition.handlers})
        return SagaNotFound(
            f"no saga handles message type {message_type!r:.80}: known types are {', '.join(known[:20]) or 'none'}"
        )

    # ---------------------------------------------------------------- speaking to one instance

    @overload
    async def signal(
        self,
        saga_id: str,
        key: str,
        signal: SignalDefinition[_P],
        payload: _P,
        *,
        id: str | None = None,
        run: int | None = None,
    ) -> SignalReceipt: ...
    @overload
    async def signal(
        self,
        saga_id: str,
        key: str,
        signal: SignalDefinition[Any] | str,
        payload: object = None,
        *,
        id: str | None = None,
        run: int | None = None,
    ) -> SignalReceipt: ...
    async def signal(
        self,
        saga_id: str,
        key: str,
        signal: SignalDefinition[Any] | str,
        payload: object = None,
        *,
        id: str | None = None,
        run: int | None = None,
    ) -> SignalReceipt:
        """Says something to an instance, and answers once that is durable. It is applied in its turn, once however
        often it comes under one `id`; a paused run gets it when it is resumed.

        Without `run` it goes to the newest one. Raises `SagaNotFound`, `SignalNotFound`, `InstanceNotFound`,
        `InstanceEnded` when the run is over, `MessageRejected` for a payload that its handler cannot take,
        `IdempotencyKeyReused`, and `BackendUnavailable`.
        """
        self._refuse_if_not_running()
        return await self._signals.signal(saga_id, key, signal, payload, id=id, run=run)

    @overload
    async def update(
        self,
        saga_id: str,
        key: str,
        update: SignalDefinition[_P],
        payload: _P,
        *,
        id: str | None = None,
        run: int | None = None,
        wait: float | timedelta | None = None,
    ) -> UpdateReceipt: ...
    @overload
    async def update(
        self,
        saga_id: str,
        key: str,
        update: SignalDefinition[Any] | str,
        payload: object = None,
        *,
        id: str | None = None,
        run: int | None = None,
        wait: float | timedelta | None = None,
    ) -> UpdateReceipt: ...
    async def update(
        self,
        saga_id: str,
        key: str,
        update: SignalDefinition[Any] | str,
        payload: object = None,
        *,
        id: str | None = None,
        run: int | None = None,
        wait: float | timedelta | None = None,
    ) -> UpdateReceipt:
        """Says something to an instance, and answers with what its handler has to say, when that is committed.

        The answer is kept with the history: the same update under the same `id` gets the same one, from whatever
        process. A wait that ends before (`wait` seconds, at most and by default those of the options) is answered with
        `pending`, and the update goes on. Raises what `signal` raises, `UpdateRefused` when the handler says no, and
        `UpdateFailed` when it was given up.
        """
        self._refuse_if_not_running()
        return await self._signals.update(saga_id, key, update, payload, id=id, run=run, wait=wait)

    @overload
    async def query(self, saga_id: str, key: str, query: QueryDefinition[_P], *, run: int | None = None) -> _P: ...
    @overload
    async def query(self, saga_id: str, key: str, query: str, *, run: int | None = None) -> Any: ...
    async def query(self, saga_id: str, key: str, query: QueryDefinition[Any] | str, *, run: int | None = None) -> Any:
        """Asks an instance: what its query says of the newest committed state, of a run that is paused or over too.
        Any process may answer, started or not.

        Raises `SagaNotFound`, `QueryNotFound`, `InstanceNotFound`, `QueryFailed`, and `MessageRejected`
        (`SAGA_INSTANCE_PENDING`) when the first message of the key has not been applied yet.
        """
        value, _ = await self._signals.query(saga_id, key, query, run=run)
        return value

    async def query_result(self, saga_id: str, key: str, query: str, *, run: int | None = None) -> QueryResult:
        """What `query` says, as JSON, with the run and the revision that it says it of."""
        _, result = await self._signals.query(saga_id, key, query, run=run)
        return result

    # ---------------------------------------------------------------- looking

    async def get_instance(self, saga_id: str, key: str, *, run: int | None = None) -> Instance | None:
        """The newest run of a key, or run number `run`. Run 0 with status `pending` stands for a first message that
        is accepted and not applied yet."""
        if run is not None:
            return await self.store.load_run(saga_id, key, run)
        (loaded,) = await self.store.load([(saga_id, key)])
        head = loaded.head
        if loaded.instance is None and head is not None and head.awaits_start:
            definition = self.definitions.get(saga_id)
            return Instance(
                saga_id=saga_id,
                key=key,
                pk=head.pk,
                run=0,
                status="pending",
                revision=0,
                state=definition.state_codec.encode(definition.initial_state) if definition else b"{}",
                def_version=definition.version if definition else 1,
                tier=definition.durability if definition else "t1",
                created_at=head.created_at,
                updated_at=head.created_at,
            )
        return loaded.instance

    async def list_instances(
        self, wanted: InstanceFilter, *, limit: int = 50, offset: int = 0, cursor: str | None = None
    ) -> tuple[list[Instance], str | None]:
        """Runs, newest first, and the cursor of the next page."""
        return await self.store.instances(wanted, limit=limit, offset=offset, cursor=cursor)

    async def history(
        self, saga_id: str, key: str, *, run: int | None = None, after_entry: int = 0, limit: int = 50
    ) -> list[HistoryEntry]:
        """What happened to a run, oldest first; raises `InstanceNotFound`."""
        instance = await self.get_instance(saga_id, key, run=run)
        if instance is None:
            raise no_instance(saga_id, key, run)
        if instance.run == 0:
            return []
        return await self.store.history(instance, after_entry=after_entry, limit=limit)

    async def children(
        self,
        saga_id: str,
        key: str,
        *,
        run: int | None = None,
        status: ChildStatus = "live",
        after: tuple[int, int] | None = None,
        limit: int = 50,
    ) -> list[Child]:
        """The children that a run has spawned, of one status, in the order of their spawning; `after` is the revision
        and the position of the last one of the page before. Raises `InstanceNotFound`."""
        instance = await self.get_instance(saga_id, key, run=run)
        if instance is None:
            raise no_instance(saga_id, key, run)
        return await self.store.children(instance.pk, instance.run, status=status, after=after, limit=limit)

    async def count_children(self, saga_id: str, key: str, *, run: int | None = None) -> Mapping[ChildStatus, int]:
        """How many children of each status a run has. Raises `InstanceNotFound`."""
        instance = await self.get_instance(saga_id, key, run=run)
        if instance is None:
            raise no_instance(saga_id, key, run)
        return await self.store.count_children(instance.pk, instance.run)

    async def dead_letters(
        self, *, saga_id: str | None = None, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        """What was given up, newest first."""
        return await self.store.dead_letters(saga_id=saga_id, key=key, after=after, limit=limit)

    def watch(
        self,
        *,
        after: int | str | None = None,
        saga_id: str | Iterable[str] | None = None,
        key: str | None = None,
        types: Iterable[str] = (),
    ) -> FeedWatch:
        """What happens, as it happens: an iterator over (cursor, event) without a gap and without a repeat (I8).

            async with runtime.watch(saga_id="order", types=["saga:completed"]) as events:
                async for cursor, event in events:
                    ...

        It begins behind `after`, the cursor of an event or 0 for all that is kept; without it, now. A filter leaves
        events out, and `FeedWatch.cursor` passes over them. A cursor that this store cannot go on from is answered by
        one `FeedReset` (type `reset`), and then by everything that is kept. Works before `start` too; ends with `stop`.

        Raises `MessageRejected` for what is no cursor or no type of event.
        """
        return self._feed.watch(after=after, saga_ids=saga_id, key=key, types=types)

    def end_watches(self) -> None:
        """Ends every watch, and starts no other: for a server that is about to stop, and would wait for those who
        watch. `stop` does it too."""
        self._feed.close("stopping")

    # ---------------------------------------------------------------- time

    async def schedules(self) -> list[ScheduleStatus]:
        """The schedules of the registered sagas and how far they have come, by saga id."""
        return await self._scheduler.statuses()

    async def trigger_schedule(self, saga_id: str) -> PublishReceipt | PublishRejected:
        """Gives a scheduled saga a tick of its own, now: its payload says `{"scheduledFor": <now>, "manual": true}`.
        The schedule goes on as it would have. Answers like `publish`; raises `ScheduleNotFound`."""
        definition = self.definitions.get(saga_id)
        if definition is None or definition.schedule is None or not definition.about.enabled:
            scheduled = ", ".join(
                each.id for each in self.definitions if each.schedule is not None and each.about.enabled
            )
            what = "is not registered here"
            if definition is not None:
                what = "has no schedule" if definition.schedule is None else "is disabled"
            raise ScheduleNotFound(f"saga {saga_id!r:.80} {what}: scheduled sagas are {scheduled or 'none'}")
        now = self.clock.now()
        tick = tick_message(definition, now, by_hand=new_message_id(now))
        try:
            return _receipt(tick.type, [await self._accept_tick(definition, tick)])
        except SagasError as error:
            return PublishRejected(message_type=tick.type, error=error)

    async def timers(
        self, saga_id: str | None = None, key: str | None = None, *, after: str | None = None, limit: int = 50
    ) -> list[WaitingTimer]:
        """The timers that wait, by due time: of one saga, of one correlation key, or all. `after` is the `cursor` of
        the last one of the page before."""
        return await waiting_timers(self.store, saga_id=saga_id, key=key, after=after, limit=limit)

    async def cancel_timer(self, timer_id: str) -> Outcome:
        """Takes a timer back, as the run's own `cancel_scheduled` would; it stands in the run's history. Returns when
        that is committed; raises `TimerNotFound` for one that does not wait (any more)."""
        return await self._control_timer(timer_id, None)

    async def move_timer(self, timer_id: str, due_at: datetime) -> Outcome:
        """Has a timer fire at `due_at` instead; at once when that is in the past. It keeps its id and its message.
        Raises what `cancel_timer` raises, and `MessageRejected` for a moment without a time zone."""
        return await self._control_timer(timer_id, due_at)

    async def _control_timer(self, timer_id: str, due_at: datetime | None) -> Outcome:
        self._refuse_if_not_running()
        timer = await self.store.timer(timer_id)
        if timer is None:
            raise TimerNotFound(f"no timer {timer_id!r:.80} waits: it has fired, was taken back, or never was")
        now = self.clock.now()
        envelope = timer_control(timer, message_id=new_message_id(now), accepted_at=now, due_at=due_at)
        outcome = await self._steered(envelope)
        if outcome.disposition != "applied":
            raise TimerNotFound(f"timer {timer_id} has just fired, or was taken back: {outcome.reason}")
        return outcome

    async def _accept_tick(self, definition: SagaDefinition[Any], tick: SagaMessage[Any]) -> Outcome:
        """Takes a tick in, for the saga whose it is alone: another one that handles the type has its own. It begins a
        trace: time has none to go on with."""
        if self.telemetry is None or not self.telemetry.makes_spans:
            return await self._take_tick(definition, msgspec.structs.replace(tick, traceparent=new_traceparent()))
        publishing = self.telemetry.publish_tick(tick)
        try:
            outcome = await self._take_tick(definition, publishing.message)
            publishing.took(_receipt(tick.type, [outcome]))
            return outcome
        except SagasError as error:
            publishing.failed(error)
            raise
        finally:
            publishing.end()

    async def _take_tick(self, definition: SagaDefinition[Any], tick: SagaMessage[Any]) -> Outcome:
        (delivery,) = self._address(tick, waits=False, only=definition)
        assert delivery.answered is not None
        return await delivery.answered

    async def _give_up_tick(self, letter: DeadLetter) -> None:
        # The partition of the schedule, which is ours; the tick never found one of its own.
        part = partition_of(key_hash(letter.saga_id, letter.saga_id))
        await self._repairs.submit(UnitOfWork(part=part, dead_letters_add=(letter,)))

    def holds(self, part: int) -> bool:
        """Whether partition `part` is ours to work on right now."""
        return part in self._receiver.share.parts

    # ---------------------------------------------------------------- inside

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


def _receipt(message_type: str, outcomes: list[Outcome]) -> PublishReceipt:
    first = outcomes[0]
    return PublishReceipt(
        message_id=first.message_id,
        message_type=message_type,
        correlation_key=first.correlation_key,
        outcomes=tuple(outcomes),
        # The first one is asked before a generator is made: it is nearly always the only one, and no duplicate.
        duplicate=first.disposition == "duplicate" and all(each.disposition == "duplicate" for each in outcomes),
    )


def _changed(message: SagaMessage[Any], changes: Mapping[str, Any]) -> SagaMessage[Any]:
    fields = msgspec.structs.asdict(message)
    fields.update({name: value for name, value in changes.items() if value is not None})
    return as_message(fields)


def _types_of(document: Mapping[str, object]) -> list[str]:
    """The message types in a definition's description."""
    found: list[str] = []
    types = document.get("handledMessageTypes")
    for each in cast("Sequence[object]", types) if isinstance(types, (list, tuple)) else ():
        name = cast("Mapping[str, object]", each).get("type") if isinstance(each, Mapping) else each
        if isinstance(name, str):
            found.append(name)
    return found
