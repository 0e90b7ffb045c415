"""`SagaRuntime`: registers definitions, takes messages in, and runs the roles that move them.

    publish ──► receiver ──(commit)──► dispatcher ──► targets
                   ▲                        │ replies
    timekeeper ────┴────────────────────────┘

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
from datetime import timedelta
from typing import Any, ClassVar, cast

import msgspec

from sagaloom.clock import Clock, SystemClock
from sagaloom.codec import encode_any
from sagaloom.definitions import SagaDefinition
from sagaloom.describe import describe
from sagaloom.engine.correlation import DefinitionSet, address
from sagaloom.engine.records import DeadLetter, Envelope, HistoryEntry, Instance, OutboxEffect, Timer
from sagaloom.errors import (
    BackendUnavailable,
    DeadLetterNotFound,
    DefinitionError,
    InstanceNotFound,
    MessageRejected,
    SagaNotFound,
    SagasError,
)
from sagaloom.ids import check_key, key_hash, new_message_id, partition_of
from sagaloom.messages import SagaMessage, as_message
from sagaloom.ports.store import (
    Conflict,
    InstanceFilter,
    OutboxRow,
    RegisteredDefinition,
    RowRef,
    SagaStore,
    UnitOfWork,
)
from sagaloom.ports.targets import EffectTarget
from sagaloom.runtime.deliveries import Delivery
from sagaloom.runtime.dispatcher import Dispatcher
from sagaloom.runtime.lifeline import Lifeline
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.receipts import Outcome, PublishReceipt, PublishRejected
from sagaloom.runtime.receiver import Receiver
from sagaloom.runtime.timekeeper import Timekeeper

__all__ = ["RuntimeHealth", "SagaRuntime"]

_log = logging.getLogger("sagaloom.runtime")
_OPERATOR_SECONDS = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeHealth:
    """Whether the runtime does its work, and what stands against it. `checks` has `ok` or a reason for each part."""

    ready: bool
    checks: Mapping[str, str]
    backlog: int = 0
    outbox: int = 0
    stalled_lanes: int = 0
    oldest_waiting_seconds: float = 0.0


class _Request(msgspec.Struct):
    """What an operator asks for. It fails rather than wait for a store that does not answer."""

    is_patient: ClassVar[bool] = False

    unit: UnitOfWork
    answer: asyncio.Future[SagasError | Conflict | None]

    def done(self, trouble: SagasError | Conflict | None) -> None:
        if not self.answer.done():
            self.answer.set_result(trouble)


class SagaRuntime:
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
    ) -> None:
        self.store = store
        self.clock: Clock = clock if clock is not None else SystemClock()
        self.options = options if options is not None else RuntimeOptions()
        self.definitions = DefinitionSet()
        self._registry_ids: frozenset[str] = frozenset()
        self._registry_types: frozenset[str] = frozenset()
        self._targets: dict[str, EffectTarget] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._state = "new"
        for definition in definitions:
            self.register(definition)
        for target in targets:
            self.add_target(target)
        self.holder = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        """By what name this runtime stands among those on its store."""
        self._receiver = Receiver(
            store,
            self.clock,
            self.options,
            holder=self.holder,
            on_holding=self._hold,
            is_quiet=self._is_quiet,
            definitions=lambda: self.definitions,
            on_effects=self._effects_committed,
            on_timers=self._timers_committed,
        )
        self._dispatcher = Dispatcher(
            store,
            self.clock,
            self.options,
            targets=self._targets,
            giving=lambda: self._receiver.giving,
            submit=self._receiver.submit,
        )
        self._timekeeper = Timekeeper(store, self.clock, self.options, holds=self.holds, offer=self._receiver.offer)
        self._lifeline = Lifeline(store, self._receiver)

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
        if definition.durability not in self.store.tiers:
            raise DefinitionError(
                f"saga {definition.id!r} asks for durability {definition.durability!r}, which the store "
                f"{self.store.id} cannot promise (it can {', '.join(sorted(self.store.tiers))}): lower the tier, or "
                "use a store that waits for a synchronous replica"
            )
        self.definitions = self.definitions.with_definition(definition)

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
        try:
            await self._write_registry()
            await self._receiver.start()
        except BaseException:
            await self._let_go("failed to start")
            raise
        # Kept, for `get_running_loop` asks the system for the process id each time: too much for every message.
        self._loop = asyncio.get_running_loop()
        self._state = "running"
        self._spawn("receiver", self._receiver.run())
        self._spawn("lifeline", self._lifeline.run())
        if not self.options.works:
            return
        self._spawn("timekeeper", self._timekeeper.run())
        self._spawn("dispatcher-watch", self._dispatcher.watch())
        for number in range(self.options.dispatch_concurrency):
            self._spawn(f"dispatcher-{number}", self._dispatcher.run())

    async def stop(self) -> None:
        """Refuses new messages, gives what is under way `drain_seconds` to end, and lets the store go. What does not
        end in time is in the store, and goes on at the next start. Stopping twice is no error."""
        if self._state == "running":
            self._state = "stopping"
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
        await self._wait_until(self._is_drained, timeout)

    def health(self) -> RuntimeHealth:
        """What works right now; looks only at memory, so that it can be asked often."""
        checks = {"store": self._store_check()}
        for role in ("receiver", "timekeeper", "dispatcher", "lifeline"):
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
        **overrides: Any,
    ) -> PublishReceipt | PublishRejected:
        """Takes a message in and answers once it is durable.

        `message` is a `SagaMessage`, a mapping with `type` and `payload`, or an instance of a message class; `options`
        or keywords override its `correlation_key`, `idempotency_key`, `concurrency_key`, `id`, `traceparent` and
        `tracestate`. With `wait` (seconds) the answer also waits, at most that long, until each saga is done with the
        message; its outcomes then show state, effects and result. A refusal is returned, never raised.
        """
        message_type: str | None = None
        try:
            received = as_message(message)
            message_type = received.type
            if options or overrides:
                received = _changed(received, {**(options or {}), **overrides})
            deliveries = self._address(received, waits=wait is not None)
            outcomes: list[Outcome] = []
            for delivery in deliveries:
                assert delivery.answered is not None
                outcomes.append(await delivery.answered)
            if wait is not None:
                await self._await_ends(deliveries, outcomes, wait)
            return _receipt(received.type, outcomes)
        except SagasError as error:
            return PublishRejected(message_type=message_type, error=error)

    async def publish_many(self, messages: Sequence[object]) -> list[PublishReceipt | PublishRejected]:
        """Takes many messages in together, in their order, and answers each alone."""
        limit = self.options.limits.batch_messages_max
        if len(messages) > limit:
            error = MessageRejected(f"{len(messages)} messages in one batch: at most {limit} are allowed, split it")
            return [PublishRejected(message_type=None, error=error) for _ in messages]
        # Gathered coroutines run in order up to their first wait, which is after the message was queued.
        return list(await asyncio.gather(*(self.publish(message) for message in messages)))

    def _address(self, message: SagaMessage[Any], *, waits: bool) -> list[Delivery]:
        """Queues the message for every saga that handles its type, or raises why not; nothing was queued then."""
        if self._state != "running":
            raise BackendUnavailable(
                f"the runtime is {self._state}: publish between start() and stop()", code="SAGA_NOT_STARTED"
            )
        if self._receiver.problem is not None:
            raise self._receiver.problem
        waiting = self._receiver.waiting
        if waiting >= self.options.backlog_max:
            raise BackendUnavailable(f"{waiting} messages are waiting already: try again later", code="SAGA_OVERLOADED")
        receivers = self.definitions.handling(message.type)
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
            envelope, typed = address(definition, message, payload_json=payload, accepted_at=now, message_id=message_id)
            deliveries.append(
                Delivery(
                    envelope,
                    (envelope.saga_id, envelope.key),
                    typed=typed,
                    answered=loop.create_future(),
                    settled=loop.create_future() if waits else None,
                )
            )
        for delivery in deliveries:
            self._receiver.offer(delivery)
        return deliveries

    async def _await_ends(self, deliveries: list[Delivery], outcomes: list[Outcome], wait: float | timedelta) -> None:
        """Puts how the messages ended in the place of how they were accepted, for those that end in time."""
        if not any(outcome.disposition == "pending" for outcome in outcomes):
            return
        seconds = wait.total_seconds() if isinstance(wait, timedelta) else wait
        waiting = [delivery.settled for delivery in deliveries if delivery.settled is not None]
        await asyncio.wait(waiting, timeout=min(max(seconds, 0.0), self.options.wait_seconds_max))
        for number, delivery in enumerate(deliveries):
            if delivery.settled is not None and delivery.settled.done() and not delivery.settled.exception():
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
            raise InstanceNotFound(f"Saga instance not found: {saga_id}:{key}" + (f" run {run}" if run else ""))
        if instance.run == 0:
            return []
        return await self.store.history(instance, after_entry=after_entry, limit=limit)

    async def dead_letters(
        self, *, saga_id: str | None = None, key: str | None = None, after: str | None = None, limit: int = 50
    ) -> list[DeadLetter]:
        """What was given up, newest first."""
        return await self.store.dead_letters(saga_id=saga_id, key=key, after=after, limit=limit)

    # ---------------------------------------------------------------- operators

    async def redrive(self, dead_letter_id: str) -> DeadLetter:
        """Tries a dead letter again, with a fresh count of attempts. A message goes to the end of its instance's
        queue; an effect goes on at the head of its lane."""
        letter = await self._find(dead_letter_id)
        part = partition_of(key_hash(letter.saga_id, letter.key))
        effect = letter.effect
        if effect is not None:
            again = msgspec.structs.replace(effect, attempt=0, due_at=None, dead_letter_id=None)
            if letter.outbox_part is None or letter.outbox_seq is None:
                await self._submit(UnitOfWork(part=part, dead_letter_done=letter.id, outbox_add=(again,)))
                return letter
            row = OutboxRow(RowRef(letter.outbox_part, letter.outbox_seq), again)
            await self._submit(UnitOfWork(part=part, dead_letter_done=letter.id, outbox_update=row))
            self._dispatcher.resume(effect.lane, again)
            return letter
        assert letter.envelope is not None
        envelope = self._readdressed(letter.envelope)
        await self._submit(UnitOfWork(part=part, dead_letter_done=letter.id, inbox_add=(envelope,)))
        return letter

    async def discard(self, dead_letter_id: str) -> DeadLetter:
        """Forgets a dead letter: a message's idempotency key is free again, an effect's lane goes on behind it."""
        letter = await self._find(dead_letter_id)
        part = partition_of(key_hash(letter.saga_id, letter.key))
        if letter.effect is not None:
            done = None
            if letter.outbox_part is not None and letter.outbox_seq is not None:
                done = RowRef(letter.outbox_part, letter.outbox_seq)
            await self._submit(UnitOfWork(part=part, dead_letter_done=letter.id, outbox_done=done))
            if done is not None:
                self._dispatcher.skip(letter.effect.lane)
            return letter
        assert letter.envelope is not None
        envelope = letter.envelope
        (loaded,) = await self.store.load([(envelope.saga_id, envelope.key)]) if envelope.key else (None,)
        unmark = None
        if loaded is not None and loaded.head is not None:
            unmark = (loaded.head.pk, envelope.dedupe_key or envelope.id)
        await self._submit(UnitOfWork(part=part, dead_letter_done=letter.id, unmark=unmark))
        if unmark is not None:
            self._receiver.forget_mark(*unmark)
        return letter

    def _readdressed(self, envelope: Envelope) -> Envelope:
        """The envelope of a redriven message. One that never found its instance is addressed again."""
        if not envelope.key:
            definition = self.definitions.get(envelope.saga_id)
            receivers = (definition,) if definition is not None else self.definitions.handling(envelope.type)
            if not receivers:
                raise self._unknown(envelope.type)
            message = SagaMessage(
                envelope.type,
                msgspec.Raw(envelope.payload),
                envelope.correlation_key,
                envelope.idempotency_key,
                envelope.concurrency_key,
                envelope.occurred_at,
                envelope.id,
                envelope.traceparent,
                envelope.tracestate,
            )
            envelope = address(
                receivers[0],
                message,
                payload_json=envelope.payload,
                accepted_at=self.clock.now(),
                message_id=envelope.id,
                causation_id=envelope.causation_id,
                hops=envelope.hops,
                parent=envelope.parent,
                key_if_none=envelope.id if envelope.origin == "spawn" else None,
            ).envelope
        return msgspec.structs.replace(envelope, origin="redrive", attempt=0, due_at=None, last_error=None)

    async def _find(self, dead_letter_id: str) -> DeadLetter:
        letter = await self.store.dead_letter(dead_letter_id)
        if letter is None:
            raise DeadLetterNotFound(
                f"no dead letter {dead_letter_id!r:.80}: it was redriven or discarded, or never was"
            )
        return letter

    async def _submit(self, unit: UnitOfWork) -> None:
        """Commits an operator's request in its turn; raises what stood against it."""
        if self._state != "running":
            raise BackendUnavailable(f"the runtime is {self._state}", code="SAGA_NOT_STARTED")
        answer: asyncio.Future[SagasError | Conflict | None] = asyncio.get_running_loop().create_future()
        self._receiver.submit(_Request(unit, answer))
        try:
            trouble = await asyncio.wait_for(answer, _OPERATOR_SECONDS)
        except TimeoutError:
            raise BackendUnavailable(f"the store did not take the request within {_OPERATOR_SECONDS:g} s") from None
        if isinstance(trouble, Conflict):
            raise DeadLetterNotFound(f"it was redriven or discarded a moment ago: {trouble.what}")
        if trouble is not None:
            raise trouble

    def holds(self, part: int) -> bool:
        """Whether partition `part` is ours to work on right now."""
        return part in self._receiver.parts

    # ---------------------------------------------------------------- inside

    def _is_quiet(self, parts: Collection[int]) -> bool:
        return self._dispatcher.is_quiet(parts)

    async def _hold(self, gained: frozenset[int], lost: frozenset[int]) -> None:
        if lost:
            self._dispatcher.drop(lost)
        if gained:
            await self._dispatcher.load(gained)
            self._timekeeper.gained(gained)

    def _effects_committed(self, rows: Sequence[tuple[RowRef, OutboxEffect]]) -> None:
        self._dispatcher.add(rows)

    def _timers_committed(self, timers: Sequence[Timer]) -> None:
        self._timekeeper.added(timers)

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
        return self._receiver.is_idle and self._dispatcher.is_idle and self._timekeeper.is_idle

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
        closing = BackendUnavailable(f"the runtime is {state}: publish again, under the same message id")
        self._timekeeper.close()
        self._dispatcher.close()
        self._receiver.close(closing)
        try:
            if says_goodbye:
                await self._receiver.leave()
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
