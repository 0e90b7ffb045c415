"""Speaking to one instance: signals, updates and queries.

Signals and updates go through the receiver like every message. What is peculiar is how their caller is answered:

- A key that was never seen is refused at once, and nothing is written. Every other one gets the message, also when its
  run is over: only there a repeat is told from a new one. What the run then ignores is refused here, by type.
- A signal is answered as soon as it is durable, an update when its handler has spoken, or the wait is over.
- A repeat of an update is answered by what the history says of the first one. While that still waits for its turn, the
  feed says when there is news, whichever process has applied it.

A query asks nobody: it reads what the store has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import msgspec

from sagaloom.clock import Clock
from sagaloom.definitions import QueryDefinition, SagaDefinition, SignalDefinition
from sagaloom.engine.correlation import DefinitionSet
from sagaloom.engine.lifecycle import is_terminal
from sagaloom.engine.queries import answer_query
from sagaloom.engine.records import DeadLetter, HistoryEntry, Instance
from sagaloom.engine.signals import SignalKind, refused_with, said_to
from sagaloom.errors import (
    BackendUnavailable,
    InstanceEnded,
    InstanceNotFound,
    MessageRejected,
    SagaNotFound,
    UpdateFailed,
    UpdateRefused,
)
from sagaloom.ids import check_key, instance_id, new_message_id
from sagaloom.ports.store import Loaded, SagaStore
from sagaloom.runtime.deliveries import Delivery
from sagaloom.runtime.feed import FeedWatch
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.payloads import payload_json
from sagaloom.runtime.receipts import Outcome, QueryResult, SignalReceipt, UpdateReceipt
from sagaloom.runtime.receiver import Receiver
from sagaloom.runtime.repairs import in_time
from sagaloom.runtime.retention import removed_instance
from sagaloom.telemetry import current_trace

__all__ = ["Signals"]

_HISTORY_PAGE: Final = 500
_LETTERS_SEARCHED: Final = 100
_LOOK_AGAIN_SECONDS: Final = 1.0


class Signals:
    """Says things to instances, and asks them."""

    def __init__(
        self,
        store: SagaStore,
        clock: Clock,
        options: RuntimeOptions,
        receiver: Receiver,
        *,
        definitions: Callable[[], DefinitionSet],
        watch: Callable[[str, str], FeedWatch],
    ) -> None:
        self._store = store
        self._clock = clock
        self._options = options
        self._receiver = receiver
        self._definitions = definitions
        self._watch = watch

    async def signal(
        self,
        saga_id: str,
        key: str,
        signal: SignalDefinition[Any] | str,
        payload: object,
        *,
        id: str | None,
        run: int | None,
    ) -> SignalReceipt:
        delivery, loaded = await self._say("signal", saga_id, key, signal, payload, id=id, run=run)
        assert delivery.answered is not None
        assert delivery.settled is not None
        outcome = await delivery.answered
        if outcome.disposition == "pending" and _is_over(loaded.instance, run):
            # Another process holds the run, and will say the same as we can see: that it takes nothing more.
            outcome = await self._settled(delivery, self._options.wait_seconds_max) or outcome
        else:
            delivery.settled.cancel()
        _refuse_if_not_taken("signal", delivery, outcome)
        reason = outcome.reason
        if outcome.disposition == "pending" and reason is None and _is_paused(loaded.instance, run):
            reason = f"{outcome.instance_id} is paused: it is applied when the run is resumed"
        return SignalReceipt(
            signal=_name(signal),
            message_id=outcome.message_id,
            instance_id=outcome.instance_id,
            saga_id=saga_id,
            correlation_key=key,
            run=outcome.run or (loaded.instance.run if loaded.instance is not None else 0),
            disposition=outcome.disposition,
            status=outcome.status,
            revision=outcome.revision,
            reason=reason,
        )

    async def update(
        self,
        saga_id: str,
        key: str,
        update: SignalDefinition[Any] | str,
        payload: object,
        *,
        id: str | None,
        run: int | None,
        wait: float | timedelta | None,
    ) -> UpdateReceipt:
        seconds = self._options.wait_seconds_max
        if wait is not None:
            asked = wait.total_seconds() if isinstance(wait, timedelta) else wait
            seconds = min(max(asked, 0.0), seconds)
        delivery, loaded = await self._say("update", saga_id, key, update, payload, id=id, run=run)
        until = asyncio.get_running_loop().time() + seconds
        outcome = await self._settled(delivery, seconds)
        if outcome is not None and outcome.disposition == "duplicate":
            outcome = await self._first(outcome, until)
            is_repeat = True
        else:
            is_repeat = False
        if outcome is None:
            reason = "it was accepted, and waits for its turn"
            if _is_paused(loaded.instance, run):
                reason = "it was accepted, and the run is paused: it is applied when the run is resumed"
            return UpdateReceipt(
                update=_name(update),
                message_id=delivery.envelope.id,
                instance_id=instance_id(saga_id, key, max(1, loaded.instance.run if loaded.instance else 1)),
                saga_id=saga_id,
                correlation_key=key,
                run=loaded.instance.run if loaded.instance is not None else 0,
                disposition="pending",
                duplicate=is_repeat,
                reason=reason,
            )
        _refuse_if_not_taken("update", delivery, outcome)
        answer = outcome.answer
        return UpdateReceipt(
            update=_name(update),
            message_id=outcome.message_id,
            instance_id=outcome.instance_id,
            saga_id=saga_id,
            correlation_key=key,
            run=outcome.run,
            disposition=outcome.disposition,
            status=outcome.status,
            revision=outcome.revision,
            duplicate=is_repeat,
            answer=None if answer is None else msgspec.json.decode(answer.content),
        )

    async def query(
        self, saga_id: str, key: str, query: QueryDefinition[Any] | str, *, run: int | None
    ) -> tuple[Any, QueryResult]:
        definition = self._definition(saga_id)
        loaded = await self._load(saga_id, key)
        instance = loaded.instance
        if run is not None and (instance is None or instance.run != run):
            instance = await self._store.load_run(saga_id, key, run)
        if instance is None:
            if run is None and loaded.head is not None and loaded.head.awaits_start:
                raise MessageRejected(
                    f"{saga_id}:{key} has not begun: its first message waits for its turn, so there is no state to "
                    "read yet; try again",
                    code="SAGA_INSTANCE_PENDING",
                    retryable=True,
                )
            raise removed_instance(loaded.head, run) or _no_instance(saga_id, key, run)
        name = _name(query)
        value, encoded = answer_query(definition, instance, name)
        result = QueryResult(
            query=name,
            instance_id=instance_id(saga_id, key, instance.run),
            saga_id=saga_id,
            correlation_key=key,
            run=instance.run,
            status=instance.status,
            revision=instance.revision,
            answer=msgspec.Raw(encoded),
        )
        return value, result

    # ---------------------------------------------------------------- inside

    async def _say(
        self,
        kind: SignalKind,
        saga_id: str,
        key: str,
        signal: SignalDefinition[Any] | str,
        payload: object,
        *,
        id: str | None,
        run: int | None,
    ) -> tuple[Delivery, Loaded]:
        """Hands a signal or an update to the receiver, or raises why not; nothing was written then. Also returns what
        was known of its instance before."""
        if self._receiver.problem is not None:
            raise self._receiver.problem
        definition = self._definition(saga_id)
        if not definition.about.enabled:
            raise BackendUnavailable(
                f"saga {saga_id!r} is disabled: try again when it is enabled, by an operator or in its configuration",
                code="SAGA_DISABLED",
            )
        now = self._clock.now()
        envelope = said_to(
            definition,
            kind,
            _name(signal),
            key=check_key(key),
            payload_json=payload_json(payload, kind, _name(signal), self._options.limits.payload_bytes_max),
            message_id=new_message_id(now) if id is None else check_key(id, what=f"{kind} id"),
            accepted_at=now,
            run=run,
        )
        if (trace := current_trace()) is not None:
            envelope = msgspec.structs.replace(envelope, traceparent=trace.traceparent, tracestate=trace.tracestate)
        loaded = await self._load(saga_id, key)
        if loaded.head is None or (run is not None and run > loaded.head.run):
            raise removed_instance(loaded.head, run) or _no_instance(saga_id, key, run)
        if loaded.instance is None and not loaded.head.awaits_start:
            raise removed_instance(loaded.head, run) or _no_instance(saga_id, key, run)
        loop = asyncio.get_running_loop()
        answered, settled = loop.create_future(), loop.create_future()
        delivery = Delivery(envelope, (saga_id, key), enters=True, answered=answered, settled=settled)
        self._receiver.offer(delivery)
        return delivery, loaded

    def _definition(self, saga_id: str) -> SagaDefinition[Any]:
        definitions = self._definitions()
        definition = definitions.get(saga_id)
        if definition is None:
            known = ", ".join(sorted(definitions.by_id)[:20])
            raise SagaNotFound(f"no saga {saga_id!r:.80} is loaded here: loaded are {known or 'none'}")
        return definition

    async def _load(self, saga_id: str, key: str) -> Loaded:
        (loaded,) = await self._store.load([(saga_id, key)])
        return loaded

    async def _settled(self, delivery: Delivery, seconds: float) -> Outcome | None:
        """What became of a delivery, or None when that takes longer."""
        assert delivery.answered is not None
        assert delivery.settled is not None
        await asyncio.wait([delivery.settled], timeout=seconds)
        if not delivery.settled.done():
            await in_time(delivery.answered)  # However short the wait: what is said to be accepted has to be durable.
        if delivery.settled.done():
            return delivery.settled.result()
        delivery.settled.cancel()  # Nobody waits for it any more, so nobody need look for it.
        return None

    async def _first(self, duplicate: Outcome, until: float) -> Outcome | None:
        """What became of the update that this one repeats; None when it still waits at `until`."""
        loop = asyncio.get_running_loop()
        async with self._watch(duplicate.saga_id, duplicate.correlation_key) as news:
            while True:
                found = await self._found(duplicate)
                left = until - loop.time()
                if found is not None or left <= 0:
                    return found
                try:
                    # Not only when there is news: of what is ignored past the limit of rows the feed says nothing.
                    await asyncio.wait_for(anext(news), min(left, _LOOK_AGAIN_SECONDS))
                except TimeoutError:
                    continue
                except StopAsyncIteration:
                    raise BackendUnavailable("the runtime stops: try again, under the same id") from None

    async def _found(self, duplicate: Outcome) -> Outcome | None:
        saga_id, key = duplicate.saga_id, duplicate.correlation_key
        loaded = await self._load(saga_id, key)
        instance = loaded.instance
        while instance is not None:
            entry = await self._entry(instance, duplicate.message_id)
            if entry is not None:
                return Outcome(
                    message_id=duplicate.message_id,
                    instance_id=instance_id(saga_id, key, instance.run),
                    saga_id=saga_id,
                    correlation_key=key,
                    run=instance.run,
                    disposition=entry.disposition,
                    status=entry.status_after,
                    revision=entry.revision,
                    reason=entry.reason,
                    answer=entry.answer,
                )
            instance = await self._store.load_run(saga_id, key, instance.run - 1) if instance.run > 1 else None
        letter = await self._letter(saga_id, key, duplicate.message_id)
        if letter is not None:
            return msgspec.structs.replace(duplicate, disposition="dead_lettered", reason=letter.reason)
        if loaded.instance is not None and is_terminal(loaded.instance.status):
            return msgspec.structs.replace(
                duplicate, disposition="ignored", status=loaded.instance.status, reason="the run is over"
            )
        return None

    async def _entry(self, instance: Instance, message_id: str) -> HistoryEntry | None:
        """The history row of a message, from the end on: who asks again does so soon."""
        before = instance.entries
        while before > 0:
            after = max(0, before - _HISTORY_PAGE)
            rows = await self._store.history(instance, after_entry=after, limit=_HISTORY_PAGE)
            for entry in reversed(rows):
                if entry.message_id == message_id:
                    return entry
            before = after
        return None

    async def _letter(self, saga_id: str, key: str, message_id: str) -> DeadLetter | None:
        letters = await self._store.dead_letters(saga_id=saga_id, key=key, limit=_LETTERS_SEARCHED)
        return next((one for one in letters if one.envelope is not None and one.envelope.id == message_id), None)


def _name(said: SignalDefinition[Any] | QueryDefinition[Any] | str) -> str:
    return said if isinstance(said, str) else said.name


def _is_over(instance: Instance | None, run: int | None) -> bool:
    return instance is not None and (is_terminal(instance.status) or (run is not None and run != instance.run))


def _is_paused(instance: Instance | None, run: int | None) -> bool:
    return instance is not None and instance.is_paused and run in (None, instance.run)


def _refuse_if_not_taken(kind: SignalKind, delivery: Delivery, outcome: Outcome) -> None:
    """Raises what stood against a signal or an update that was not applied."""
    where = f"{kind} {outcome.message_id} to {outcome.instance_id}"
    data = {"messageId": outcome.message_id, "instanceId": outcome.instance_id}
    if outcome.answer is not None and outcome.answer.is_refused:
        raise refused_with(outcome.answer)
    if outcome.disposition == "dead_lettered" and kind == "update":
        raise UpdateFailed(f"{where} was given up: {outcome.reason}", data=data)
    if outcome.disposition == "ignored":
        if outcome.status is not None and not is_terminal(outcome.status):
            raise UpdateRefused(f"{where} was refused: {outcome.reason}", data=data)
        raise InstanceEnded(f"{where} came too late: {outcome.reason}", data=data)


def _no_instance(saga_id: str, key: str, run: int | None) -> InstanceNotFound:
    which = "" if run is None else f" run {run} of"
    return InstanceNotFound(f"there is no{which} instance {key!r:.80} of saga {saga_id!r:.80}")
