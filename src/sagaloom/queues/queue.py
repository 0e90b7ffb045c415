"""The queue that users hold: payloads in, handlers out, whatever the broker is.

It opens its broker with the first use, and again with the next one when that did not work.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, Self, TypeVar

import msgspec

from sagaloom.clock import Clock, SystemClock
from sagaloom.codec import Codec, codec_for, encode_any
from sagaloom.durations import parse_duration
from sagaloom.engine.retrying import USER_ERRORS
from sagaloom.errors import (
    BackendUnavailable,
    ConfigurationError,
    DecodeError,
    DefinitionError,
    MessageRejected,
    SagasError,
)
from sagaloom.ids import check_key, new_message_id
from sagaloom.ports.queue import (
    PRIORITY_DEFAULT,
    PRIORITY_MAX,
    Acked,
    Buried,
    DeadLetterStorePort,
    Delivery,
    QueueBroker,
    QueueCapabilities,
    QueueDeadLetter,
    QueueDepth,
    QueueMessage,
    Settlement,
    is_reserved_header,
)
from sagaloom.queues.handling import (
    Deadlines,
    HandlerTimedOut,
    Outcome,
    QueueContext,
    QueueHandler,
    called,
    died_too_often,
)
from sagaloom.queues.listening import Listener
from sagaloom.queues.patience import end, within
from sagaloom.queues.sending import Outgoing, Sender
from sagaloom.telemetry.providers import TelemetryProviders, find_providers
from sagaloom.telemetry.trace_context import CARRIED, Trace, current_trace

if TYPE_CHECKING:
    from sagaloom.telemetry.queues import QueueTelemetry

__all__ = ["Queue", "QueueReceipt", "QueueSettings", "check_queue_name"]

T = TypeVar("T")
_log = logging.getLogger("sagaloom.queue")

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HEADERS_MAX: Final = 64
_HEADER_BYTES_MAX: Final = 16 * 1024
_HEADER_NAME_BYTES_MAX: Final = 128
_MANY_MAX: Final = 1_000
_CLOSE_SECONDS: Final = 5.0
_DEAD_LETTERS_PAGE: Final = 100
_TRACEPARENT: Final = "traceparent"
_TRACESTATE: Final = "tracestate"


class QueueReceipt(NamedTuple):
    """The message is in the queue. `duplicate`: one with its deduplication id was there before, and this one is not."""

    message_id: str
    duplicate: bool


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """How a queue behaves, whatever its broker."""

    concurrency: int = 1
    retry_attempts: int = 3
    """How often a message that failed is tried again: it has one attempt more than that."""
    retry_delay_ms: int = 1_000
    max_message_bytes: int = 1024 * 1024
    on_invalid: Literal["dead_letter", "discard"] = "dead_letter"
    """What becomes of a message that is no value of the declared type."""
    traced: bool = True
    """Whether messages carry the trace of their sender, and spans are made where somebody records them."""

    def __post_init__(self) -> None:
        _check_number("concurrency", self.concurrency, least=1)
        _check_number("retry_attempts", self.retry_attempts, least=0)
        _check_number("retry_delay", self.retry_delay_ms, least=0)
        _check_number("max_message_bytes", self.max_message_bytes, least=1)
        if self.on_invalid not in ("dead_letter", "discard"):
            raise ConfigurationError(f"on_invalid={self.on_invalid!r:.80} is neither 'dead_letter' nor 'discard'")


class Queue(Generic[T]):
    """A queue of messages whose payloads are a `T`. Made by `sagaloom.queue.create_queue` and its sisters.

    Anybody may enqueue, from any number of tasks and processes; one `listen` at a time works on messages in one object.
    `async with` closes it in the end.
    """

    def __init__(
        self,
        name: str,
        open_broker: Callable[[], Awaitable[QueueBroker]],
        *,
        payload_type: Any = None,
        settings: QueueSettings | None = None,
        dead_letter_store: DeadLetterStorePort | None = None,
        clock: Clock | None = None,
        telemetry: TelemetryProviders | None = None,
    ) -> None:
        self.name = check_queue_name(name)
        self.settings = settings if settings is not None else QueueSettings()
        self._open_broker = open_broker
        self._codec: Codec[Any] | None = None if payload_type is None else codec_for(payload_type)
        self._decode: Callable[[bytes], Any] = (self._codec or codec_for(Any)).decode
        self._dead_letter_store = dead_letter_store
        self._clock: Clock = clock if clock is not None else SystemClock()
        self._telemetry = telemetry
        self._reports: QueueTelemetry | None = None
        self._broker: QueueBroker | None = None
        self._opening: asyncio.Task[QueueBroker] | None = None
        self._sender: Sender | None = None
        self._listener: Listener | None = None
        self._ended: asyncio.Event | None = None
        self._reaching: asyncio.Task[QueueBroker] | None = None
        self._problem: str | None = None
        """What keeps a listener from its broker at the start."""
        self._is_stopping = False
        self._is_closed = False
        self._outcome: Outcome[T] = Outcome(
            name,
            attempts_max=self.settings.retry_attempts + 1,
            retry_delay_ms=self.settings.retry_delay_ms,
            now=self._clock.now,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r}>"

    # -- opening and closing --------------------------------------------------------------------------------------

    async def open(self) -> QueueCapabilities:
        """Connects to the broker, which every other method does by itself, and tells what it can do."""
        return (await self._opened()).capabilities

    async def close(self) -> None:
        """Stops listening, sends what is under way, and lets go of the broker, which has a few seconds for that.
        Closing twice is no error."""
        await self.stop()
        self._is_closed = True
        if self._opening is not None:
            await end(self._opening)
        if self._sender is not None:
            await self._sender.drain(_CLOSE_SECONDS)
        broker, self._broker = self._broker, None
        if broker is not None:
            try:
                await within(_CLOSE_SECONDS, broker.close())
            except (OSError, TimeoutError) as error:
                _log.warning("queue %s: %s did not let go of us in good order: %r", self.name, broker.name, error)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _opened(self) -> QueueBroker:
        if self._is_closed:
            raise ConfigurationError(f"queue {self.name!r} is closed: make a new one")
        if self._broker is None:
            if self._opening is None:
                self._opening = asyncio.create_task(self._open(), name=f"sagaloom-queue-open-{self.name}")
            opening = self._opening
            try:
                # Shielded: one caller who gives up must not take the others' connection with him.
                return await asyncio.shield(opening)
            except asyncio.CancelledError:
                if not opening.cancelled():
                    raise
                raise BackendUnavailable(f"queue {self.name!r} was closed before its broker had answered") from None
        return self._broker

    async def _open(self) -> QueueBroker:
        try:
            broker = await self._open_broker()
            providers = (self._telemetry or find_providers()) if self.settings.traced else None
            if providers is not None:
                from sagaloom.telemetry.queues import QueueTelemetry

                self._reports = QueueTelemetry(providers)
            self._sender = Sender(broker.send)
            self._broker = broker
            return broker
        finally:
            self._opening = None

    # -- enqueueing -----------------------------------------------------------------------------------------------

    async def enqueue(
        self,
        payload: T,
        *,
        delay: timedelta | float | str | None = None,
        priority: int | None = None,
        key: str | None = None,
        deduplication_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        message_id: str | None = None,
    ) -> QueueReceipt:
        """Puts a message into the queue; when this returns, the broker has it.

        `delay`: a timedelta, milliseconds, or text such as `"5s"`. `priority`: 0 to 100, higher ones first (50).
        `key`: messages with one key are worked on one at a time, in their order. `deduplication_id`: a second message
        with it is not stored. `message_id`: the message's id, for a sender that has a stable one.

        Raises `MessageRejected` for what this queue cannot take, `BackendUnavailable` when the broker does not answer.
        """
        receipts = await self.enqueue_many(
            [payload],
            delay=delay,
            priority=priority,
            key=key,
            deduplication_ids=None if deduplication_id is None else [deduplication_id],
            headers=headers,
            message_ids=None if message_id is None else [message_id],
        )
        return receipts[0]

    async def enqueue_many(
        self,
        payloads: Iterable[T],
        *,
        delay: timedelta | float | str | None = None,
        priority: int | None = None,
        key: str | None = None,
        deduplication_ids: Sequence[str] | None = None,
        headers: Mapping[str, str] | None = None,
        message_ids: Sequence[str] | None = None,
    ) -> list[QueueReceipt]:
        """Puts up to 1000 messages into the queue, in their order, and as a whole or not at all where the broker can
        (`atomic_batches`). Receipts come in the order of the payloads."""
        bodies = [self._encoded(payload, position) for position, payload in enumerate(payloads)]
        if len(bodies) > _MANY_MAX:
            raise MessageRejected(
                f"{len(bodies)} messages at once for queue {self.name!r}: at most {_MANY_MAX}, send them in parts"
            )
        ids = self._checked_ids("message_ids", message_ids, len(bodies))
        doubles = self._checked_ids("deduplication_ids", deduplication_ids, len(bodies))
        carried = self._checked_headers(headers)
        delay_ms = self._delay_ms(delay)
        rank = self._checked_priority(priority)
        if key is not None:
            check_key(key, what="the order key")
        if not bodies:
            return []
        broker = await self._opened()
        self._refuse_what_it_cannot(broker, priority=priority, key=key, deduplication_ids=deduplication_ids)
        now = self._clock.now()
        messages = [
            QueueMessage(
                id=ids[position] or new_message_id(now),
                body=body,
                enqueued_at=now,
                headers=carried,
                priority=rank,
                key=key,
                deduplication_id=doubles[position],
            )
            for position, body in enumerate(bodies)
        ]
        if self._reports is None:
            return await self._sent([(message, delay_ms) for message in messages])
        with self._reports.enqueue(self.name, messages) as enqueueing:
            receipts = await self._sent([(message, delay_ms) for message in enqueueing.messages])
            enqueueing.took(sum(receipt.duplicate for receipt in receipts))
            return receipts

    async def _sent(self, outgoing: Sequence[Outgoing]) -> list[QueueReceipt]:
        assert self._sender is not None
        stored = await self._sender.send(outgoing)
        return [
            QueueReceipt(message.id, duplicate=not is_new)
            for (message, _), is_new in zip(outgoing, stored, strict=True)
        ]

    def _encoded(self, payload: T, position: int) -> bytes:
        try:
            body = self._codec.encode(payload) if self._codec is not None else encode_any(payload)
        except SagasError as error:
            raise MessageRejected(
                f"message {position} for queue {self.name!r} cannot be sent: {error.message}", data=error.data
            ) from error
        if len(body) > self.settings.max_message_bytes:
            raise MessageRejected(
                f"message {position} for queue {self.name!r} has {len(body)} bytes of JSON, at most "
                f"{self.settings.max_message_bytes} are allowed: store it elsewhere, and send where",
                code="PAYLOAD_TOO_LARGE",
            )
        return body

    def _checked_ids(self, what: str, given: Sequence[str] | None, count: int) -> Sequence[str | None]:
        if given is None:
            return [None] * count
        if isinstance(given, str) or len(given) != count:
            raise MessageRejected(f"{what} for queue {self.name!r} must be {count} texts, one for each message")
        return [check_key(each, what=f"one of {what}") for each in given]

    def _checked_headers(self, headers: Mapping[str, str] | None) -> Mapping[str, str]:
        carried = dict(headers) if headers is not None else {}
        for name, value in carried.items():
            what = f"header {name!r:.80} of a message for queue {self.name!r}"
            if not isinstance(name, str) or not isinstance(value, str):
                raise MessageRejected(f"{what} is {value!r:.80}: no text")
            try:
                name_bytes, _ = len(name.encode()), value.encode()
            except UnicodeEncodeError:
                raise MessageRejected(f"{what} holds a lone surrogate: it is no valid text") from None
            if not 0 < name_bytes <= _HEADER_NAME_BYTES_MAX:
                raise MessageRejected(f"{what} has no name, or one of more than {_HEADER_NAME_BYTES_MAX} bytes")
            if is_reserved_header(name):
                raise MessageRejected(f"{what} has a name that brokers use themselves: give it another one")
        size = sum(len(name) + len(value) for name, value in carried.items())
        if len(carried) > _HEADERS_MAX or size > _HEADER_BYTES_MAX:
            raise MessageRejected(
                f"a message for queue {self.name!r} has {len(carried)} headers of {size} characters: at most "
                f"{_HEADERS_MAX} of {_HEADER_BYTES_MAX} in all"
            )
        if self.settings.traced and _TRACEPARENT not in carried and (trace := current_trace()) is not None:
            carried[_TRACEPARENT] = trace.traceparent
            if trace.tracestate is not None:
                carried[_TRACESTATE] = trace.tracestate
        return carried

    def _delay_ms(self, delay: timedelta | float | str | None) -> int:
        if delay is None:
            return 0
        try:
            return round(parse_duration(delay) / timedelta(milliseconds=1))
        except DefinitionError as error:
            raise MessageRejected(f"delay of a message for queue {self.name!r}: {error.message}") from error

    def _checked_priority(self, priority: int | None) -> int:
        if priority is None:
            return PRIORITY_DEFAULT
        if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= PRIORITY_MAX:
            raise MessageRejected(
                f"priority {priority!r:.80} of a message for queue {self.name!r} is no whole number from 0 to "
                f"{PRIORITY_MAX}"
            )
        return priority

    def _refuse_what_it_cannot(self, broker: QueueBroker, **asked: object) -> None:
        able = broker.capabilities
        can = {"priority": able.priority, "key": able.order_by_key, "deduplication_ids": able.deduplication}
        for what, value in asked.items():
            if value is not None and not can[what]:
                raise MessageRejected(
                    f"{broker.name} has no {what}: leave it out, or choose a provider that has (the capabilities of a "
                    "queue say so)",
                    code="NOT_SUPPORTED",
                )

    # -- listening ------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """How many messages are being worked on here."""
        return self._listener.in_flight if self._listener is not None else 0

    @property
    def problem(self) -> str | None:
        """What keeps the listener from its broker right now, for readiness; None when nothing does."""
        return self._listener.problem if self._listener is not None else self._problem

    async def listen(
        self,
        handler: QueueHandler[T],
        *,
        concurrency: int | None = None,
        visibility_timeout: float = 30.0,
        handler_timeout: float | None = 300.0,
        grace: float = 30.0,
    ) -> None:
        """Works on messages until `stop`, at most `concurrency` at once (the queue's own by default).

        `handler(message)` or `handler(message, context)` is async or plain; what it does to its message, see
        `sagaloom.queues.handling`. Times are seconds: a consumer that has died keeps its messages for
        `visibility_timeout`, which is renewed while handlers run; a handler has `handler_timeout`; `stop` waits for
        `grace`, and then cancels what still runs and gives it back.

        A broker that does not answer is waited for. Raises `ConfigurationError` when it refuses us.
        """
        if self._ended is not None:
            raise ConfigurationError(f"Queue {self.name!r} is already listening: one listener for each object")
        at_once = self.settings.concurrency if concurrency is None else concurrency
        _check_number("concurrency", at_once, least=1)
        for name, seconds in (("visibility_timeout", visibility_timeout), ("handler_timeout", handler_timeout)):
            if seconds is not None and not 0.1 <= seconds <= 86_400:
                raise ConfigurationError(f"{name}={seconds!r:.40} of queue {self.name!r} is not within 0.1 s and a day")
        call, deadlines = called(handler), Deadlines(handler_timeout)
        self._ended, self._is_stopping = asyncio.Event(), False
        try:
            self._reaching = asyncio.create_task(self._opened_patiently(), name=f"sagaloom-queue-reach-{self.name}")
            await asyncio.wait([self._reaching])
            if self._reaching.cancelled() or self._is_stopping:
                return
            broker = self._reaching.result()
            self._listener = Listener(
                broker,
                lambda delivery, settle: self._worked(call, delivery, settle, deadlines),
                concurrency=at_once,
                lease_seconds=visibility_timeout,
                grace_seconds=grace,
            )
            await self._listener.run()
        finally:
            deadlines.close()
            if self._reaching is not None:
                self._reaching.cancel()
            self._reaching = self._listener = None
            self._ended.set()
            self._ended = None

    async def stop(self) -> None:
        """Ends `listen`, once the messages in flight are done or given back. Without a listener it does nothing."""
        ended = self._ended
        if ended is None:
            return
        self._is_stopping = True
        if self._reaching is not None:
            self._reaching.cancel()
        if self._listener is not None:
            self._listener.stop()
        await ended.wait()

    async def _opened_patiently(self) -> QueueBroker:
        """The broker, however long it takes it to answer."""
        wait_seconds = 0.1
        try:
            while True:
                try:
                    return await self._opened()
                except SagasError as error:
                    if not error.retryable:
                        raise
                    if self._problem is None:
                        _log.warning("queue %s: the listener waits for its broker: %s", self.name, error.message)
                    self._problem = error.message
                    await asyncio.sleep(wait_seconds)
                    wait_seconds = min(wait_seconds * 2, 2.0)
        finally:
            self._problem = None

    async def _worked(
        self,
        call: Callable[[Any, QueueContext], Awaitable[None]],
        delivery: Delivery,
        settle: Callable[[Settlement], asyncio.Future[bool]],
        deadlines: Deadlines,
    ) -> Settlement | None:
        headers = delivery.message.headers
        if self.settings.traced and (traceparent := headers.get(_TRACEPARENT)) is not None:
            CARRIED.set(Trace(traceparent, headers.get(_TRACESTATE)))  # for as long as this task lives
        if self._reports is None:
            settlement = await self._settlement(call, delivery, settle, deadlines)
        else:
            with self._reports.dequeue(self.name, delivery) as dequeueing:
                settlement = await self._settlement(call, delivery, settle, deadlines)
                dequeueing.came_to(settlement)
        if isinstance(settlement, Buried) and self._dead_letter_store is not None:
            return await self._buried_elsewhere(settlement, self._dead_letter_store)
        return settlement

    async def _settlement(
        self,
        call: Callable[[Any, QueueContext], Awaitable[None]],
        delivery: Delivery,
        settle: Callable[[Settlement], asyncio.Future[bool]],
        deadlines: Deadlines,
    ) -> Settlement | None:
        outcome = self._outcome
        if outcome.is_worn_out(delivery):
            text = died_too_often(delivery, self.settings.retry_attempts + 1)
            return outcome.failed(delivery, "CONSUMER_DIED", text, may_retry=True, reason="max_attempts_exceeded")
        try:
            payload = self._decode(delivery.message.body)
        except DecodeError as error:
            if self.settings.on_invalid == "discard":
                _log.error("queue %s: message %s is discarded: %s", self.name, delivery.message.id, error.message)
                return Acked(delivery.token)
            return outcome.of_error(delivery, error, reason="validation_failed")

        async def say(settlement: Settlement) -> bool:
            if isinstance(settlement, Buried) and self._dead_letter_store is not None:
                settlement = await self._buried_elsewhere(settlement, self._dead_letter_store)
            return await settle(settlement)

        context = QueueContext(delivery, outcome, say, self.name)
        task, is_late = asyncio.current_task(), False
        assert task is not None
        try:
            try:
                deadlines.begin(task)
                try:
                    await call(payload, context)
                finally:
                    is_late = deadlines.end(task)
            except asyncio.CancelledError as error:
                if task.cancelling():
                    raise
                if is_late:
                    raise HandlerTimedOut(
                        f"the handler took longer than handler_timeout={deadlines.seconds:g} seconds"
                    ) from None
                # It is the handler's own: something that it awaited was cancelled by somebody else.
                raise RuntimeError("the handler was cancelled from within") from error
        except USER_ERRORS as error:
            if context.settlement is None:
                return outcome.of_error(delivery, error)
            _log.warning(
                "queue %s: the handler of message %s has settled it, and failed then: %r",
                *(self.name, delivery.message.id, error),
            )
        return None if context.settlement is not None else Acked(delivery.token)

    # -- dead letters ---------------------------------------------------------------------------------------------

    async def _buried_elsewhere(self, buried: Buried, store: DeadLetterStorePort) -> Settlement:
        """Keeps the letter in the user's own store, however long that takes, and then acknowledges the message."""
        wait_seconds = 0.1
        while True:
            try:
                await store.append(buried.letter)
            except USER_ERRORS as error:
                _log.warning(
                    "queue %s: the dead letter store does not take message %s yet: %r",
                    *(self.name, buried.letter.id, error),
                )
                await asyncio.sleep(wait_seconds)
                wait_seconds = min(wait_seconds * 2, 5.0)
            else:
                return Acked(buried.token)

    async def dead_letters(
        self, *, limit: int = _DEAD_LETTERS_PAGE, after: str | None = None
    ) -> Sequence[QueueDeadLetter]:
        """Messages that were given up, the oldest first, from behind the one with the id `after`."""
        _check_number("limit", limit, least=1)
        self._check_letters(() if after is None else (after,))
        if self._dead_letter_store is not None:
            return await self._dead_letter_store.list(self.name, limit=limit, after=after)
        return await (await self._opened()).dead_letters(limit=limit, after=after)

    async def redrive(self, *ids: str, limit: int = 1_000) -> int:
        """Puts these dead letters back into the queue, or without `ids` the oldest `limit` of them, with all of their
        attempts before them; returns how many there were."""
        chosen = await self._chosen(ids, limit)
        broker = await self._opened()
        if self._dead_letter_store is None:
            return await broker.redrive(chosen) if chosen else 0
        letters = await self._dead_letter_store.get(self.name, chosen)
        if letters:
            # Without its deduplication id, under which it was there before.
            again = [(msgspec.structs.replace(letter.message, deduplication_id=None), 0) for letter in letters]
            await broker.send(again)
            await self._dead_letter_store.remove(self.name, [letter.id for letter in letters])
        return len(letters)

    async def discard(self, *ids: str, limit: int = 1_000) -> int:
        """Removes these dead letters, or without `ids` the oldest `limit` of them, for good; returns how many there
        were."""
        chosen = await self._chosen(ids, limit)
        if not chosen:
            return 0
        if self._dead_letter_store is not None:
            return await self._dead_letter_store.remove(self.name, chosen)
        return await (await self._opened()).discard(chosen)

    async def _chosen(self, ids: Sequence[str], limit: int) -> Sequence[str]:
        self._check_letters(ids)
        return ids or [letter.id for letter in await self.dead_letters(limit=limit)]

    def _check_letters(self, ids: Sequence[str]) -> None:
        for each in ids:
            check_key(each, what=f"the id of a dead letter of queue {self.name!r}")

    async def depth(self) -> QueueDepth:
        """How many messages there are."""
        depth = await (await self._opened()).depth()
        if self._dead_letter_store is None:
            return depth
        return depth._replace(dead=await self._dead_letter_store.depth(self.name))


def check_queue_name(name: object) -> str:
    """Returns `name`; raises `ConfigurationError` when no broker would take it."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r:.120} is no name for a queue: 1 to 100 letters, digits, dots, hyphens and underscores, the "
            "first of them a letter or digit"
        )
    return name


def _check_number(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} must be a whole number of at least {least}, got {value!r:.80}")
