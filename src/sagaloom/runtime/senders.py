"""What senders may hand to a running runtime: messages, replies, signals and updates, and the ticks of schedules.

A message is addressed to each saga that handles its type and queued for the receiver, or it is refused and nothing was
queued. Its sender hears of it when it is durable, and no sooner.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, overload

import msgspec

from sagaloom.definitions import SagaDefinition, SignalDefinition
from sagaloom.engine.correlation import address
from sagaloom.engine.schedules import tick_message
from sagaloom.errors import BackendUnavailable, MessageRejected, SagaNotFound, SagasError, ScheduleNotFound
from sagaloom.ids import check_key, new_message_id, new_traceparent
from sagaloom.messages import RESERVED_PREFIX, SagaMessage, as_message
from sagaloom.ports.store import JoinsTransactions
from sagaloom.runtime.deliveries import Delivery
from sagaloom.runtime.outcomes import outcome_of_left
from sagaloom.runtime.part import Part
from sagaloom.runtime.payloads import payload_json, payload_json_and_read
from sagaloom.runtime.receipts import Outcome, PublishReceipt, PublishRejected, SignalReceipt, UpdateReceipt
from sagaloom.runtime.replies import reply_envelope, reply_unwanted
from sagaloom.runtime.weighing import Scales
from sagaloom.telemetry import carried_trace

if TYPE_CHECKING:
    from sagaloom.telemetry.sagas import Publishing

__all__ = ["Senders"]

_P = TypeVar("_P")


class Senders(Part):
    """The part of `SagaRuntime` that senders use."""

    _loop: asyncio.AbstractEventLoop | None
    _registry_types: frozenset[str]
    _scales: Scales

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
            deliveries = self._addressed(received)
            for delivery in deliveries:
                if wait is not None:
                    delivery.settled = asyncio.get_running_loop().create_future()
                self._receiver.offer(delivery)
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
            payload_json(received.payload, "message", received.type, self.options.limits.payload_bytes_max),
            run=run,
            now=self.clock.now(),
            causation_id=causation_id,
            hops=hops,
        )
        answered: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._receiver.offer(Delivery(envelope, (saga_id, key), enters=True, answered=answered))
        return await answered

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
        (delivery,) = self._addressed(tick, definition)
        self._receiver.offer(delivery)
        assert delivery.answered is not None
        return await delivery.answered

    async def _leave(self, message: SagaMessage[Any], connection: object, *, waits: bool) -> PublishReceipt:
        """Leaves a message in somebody's own transaction."""
        if not isinstance(self.store, JoinsTransactions):
            raise MessageRejected(
                f"the store {self.store.id} has no transactions to join: publish without within=, or use the sql store"
            )
        if waits:
            raise MessageRejected("within= and wait= contradict each other: nothing happens before your commit")
        envelopes = [delivery.envelope for delivery in self._addressed(message)]
        await self.store.leave(connection, envelopes)
        return _receipt(message.type, [outcome_of_left(envelope) for envelope in envelopes])

    def _addressed(self, message: SagaMessage[Any], only: SagaDefinition[Any] | None = None) -> list[Delivery]:
        """The message for every saga that handles its type, or for `only` one; raises why it cannot be taken in."""
        if self._state != "running":
            raise BackendUnavailable(
                f"the runtime is {self._state}: publish between start() and stop()", code="SAGA_NOT_STARTED"
            )
        if self._receiver.problem is not None:
            raise self._receiver.problem
        waiting = self._receiver.waiting()
        if waiting >= self.options.backlog_max:
            raise BackendUnavailable(f"{waiting} messages are waiting already: try again later", code="SAGA_OVERLOADED")
        receivers = (only,) if only is not None else self.definitions.handling(message.type)
        if not receivers:
            raise self._unknown(message.type)
        payload, read = payload_json_and_read(
            message.payload, "message", message.type, self.options.limits.payload_bytes_max
        )
        if waiting > self._scales.few and not self._scales.have_room(waiting, len(payload) * len(receivers)):
            raise BackendUnavailable(
                f"{waiting} messages of {self._scales.bytes} bytes are waiting already, and {len(payload)} more do not "
                f"fit into backlog_bytes_max={self.options.backlog_bytes_max}: try again later",
                code="SAGA_OVERLOADED",
            )
        now = self.clock.now()
        if message.idempotency_key is not None:
            check_key(message.idempotency_key, what="idempotency key")
        message_id = check_key(message.id, what="message id") if message.id is not None else new_message_id(now)
        loop = self._loop
        assert loop is not None
        deliveries: list[Delivery] = []
        for definition in receivers:
            envelope, typed = address(definition, message, payload, now, message_id, read)
            read = msgspec.UNSET  # It is the first one's alone: a handler may change what it gets.
            deliveries.append(
                Delivery(
                    envelope,
                    (envelope.saga_id, envelope.key),
                    enters=True,
                    typed=typed,
                    answered=loop.create_future(),
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

    async def _unknown_saga(self, saga_id: str) -> SagasError:
        if any(each.saga_id == saga_id for each in await self.store.definitions()):
            return BackendUnavailable(
                f"saga {saga_id!r:.80} is known to this store, but not loaded here: load its module, or try again "
                "where it is loaded",
                code="SAGA_NOT_LOADED",
            )
        return SagaNotFound(f"there is no saga {saga_id!r:.80} here, and the store has never seen one")

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
