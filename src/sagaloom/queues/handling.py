"""One delivery and its handler: from the message to a settlement.

| the handler | the message |
|---|---|
| returns | is acknowledged |
| raises, or takes longer than `handler_timeout` | comes again after `retry_delay`; a dead letter in the end |
| raises `SagasError(retryable=False)` | is a dead letter |
| `await context.ack()` | is acknowledged now; what the handler does after that is its own affair |
| `await context.nack()` | comes again, as if it had raised |
| `await context.nack(requeue=False)` | is a dead letter |
| is never called, for the message cannot be read | is a dead letter |
| loses its lease | is somebody else's; the handler is cancelled |
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final, Generic, Protocol, TypeAlias, TypeVar, cast

from sagaloom.durations import parse_duration
from sagaloom.engine.retrying import describe, storable, traceback_text
from sagaloom.errors import DefinitionError, Fenced, SagasError
from sagaloom.ports.queue import Acked, Buried, DeadLetterReason, Delivery, QueueDeadLetter, Retried, Settlement

__all__ = [
    "Call",
    "Deadlines",
    "HandlerTimedOut",
    "Outcome",
    "QueueContext",
    "QueueHandler",
    "called",
    "died_too_often",
]

_log = logging.getLogger("sagaloom.queue")
_TEXT_MAX: Final = 2_000
T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class _HandlerWithContext(Protocol[T_contra]):
    def __call__(self, message: T_contra, context: QueueContext, /) -> Awaitable[object] | object: ...


QueueHandler: TypeAlias = Callable[[T], Awaitable[object] | object] | _HandlerWithContext[T]
"""`handler(message)` or `handler(message, context)`, async or plain; a plain one runs in a thread."""
Call: TypeAlias = Callable[[Any, "QueueContext"], Awaitable[None]]


class HandlerTimedOut(SagasError):
    """A handler that did not end before its deadline."""

    default_code = "HANDLER_TIMED_OUT"
    default_retryable = True


class Deadlines:
    """Cancels tasks that take longer than `seconds` (None: however long they take). All have the same time, so whoever
    began first is due first, and one timer is enough for all; `asyncio.timeout` takes one for each, which costs a sixth
    of the messages a second."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._due_at: dict[asyncio.Task[Any], float] = {}
        self._cancelled: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, task: asyncio.Task[Any]) -> None:
        if self.seconds is not None:
            loop = task.get_loop()
            self._due_at[task] = due_at = loop.time() + self.seconds
            if self._timer is None:
                self._timer = loop.call_at(due_at, self._look)

    def end(self, task: asyncio.Task[Any]) -> bool:
        """Whether its time was up: then it was cancelled, which is taken back."""
        self._due_at.pop(task, None)
        if task not in self._cancelled:
            return False
        self._cancelled.remove(task)
        task.uncancel()
        return True

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        for task, due_at in list(self._due_at.items()):
            loop = task.get_loop()
            if due_at > loop.time():
                self._timer = loop.call_at(due_at, self._look)
                return
            del self._due_at[task]
            self._cancelled.add(task)
            task.cancel()


class Outcome(Generic[T]):
    """Makes settlements for the deliveries of one queue. Each says what it says in a log line, too."""

    def __init__(self, queue: str, *, attempts_max: int, retry_delay_ms: int, now: Callable[[], datetime]) -> None:
        self._queue = queue
        self._attempts_max = attempts_max
        self._retry_delay_ms = retry_delay_ms
        self._now = now

    def is_worn_out(self, delivery: Delivery) -> bool:
        """Whether it was handed out too often: its consumers died of it."""
        return delivery.attempt > self._attempts_max

    def of_error(
        self, delivery: Delivery, error: BaseException, *, reason: DeadLetterReason = "rejected"
    ) -> Settlement:
        """The settlement after a handler has raised `error`."""
        if isinstance(error, SagasError):
            code, text, may_retry = error.code, error.message, error.retryable
        else:
            code, text, may_retry = "HANDLER_ERROR", describe(error), True
        # The newest frames are those of the handler; whoever reads a dead letter wants them.
        return self.failed(delivery, code, text, may_retry=may_retry, reason=reason, traceback=traceback_text(error))

    def failed(
        self,
        delivery: Delivery,
        code: str,
        text: str,
        *,
        may_retry: bool,
        reason: DeadLetterReason,
        traceback: str | None = None,
        delay_ms: int | None = None,
    ) -> Settlement:
        """Another attempt, or a dead letter."""
        wait_ms = self._retry_delay_ms if delay_ms is None else delay_ms
        if may_retry and delivery.attempt < self._attempts_max:
            _log.warning(
                "queue %s: attempt %d of message %s failed, the next one is in %d ms: %s",
                *(self._queue, delivery.attempt, delivery.message.id, wait_ms, text),
            )
            return Retried(delivery.token, wait_ms)
        reason = "max_attempts_exceeded" if may_retry else reason
        _log.error(
            "queue %s: message %s is a dead letter after attempt %d (%s): %s",
            *(self._queue, delivery.message.id, delivery.attempt, reason, text),
        )
        letter = QueueDeadLetter(
            message=delivery.message,
            queue=self._queue,
            attempt=delivery.attempt,
            reason=reason,
            failed_at=self._now(),
            error_code=code,
            error_message=storable(text)[:_TEXT_MAX],
            traceback=traceback,
        )
        return Buried(delivery.token, letter)


def died_too_often(delivery: Delivery, attempts_max: int) -> str:
    """What the dead letter of a message says that has cost too many consumers their life."""
    return (
        f"handed out {delivery.attempt - 1} times, at most {attempts_max} are allowed, and no consumer came back from "
        "the last one: its handler ends or blocks its process"
    )


class QueueContext:
    """What a handler knows of its message beside the payload, and how it may settle it by itself."""

    def __init__(
        self, delivery: Delivery, outcome: Outcome[Any], settle: Callable[[Settlement], Awaitable[bool]], queue: str
    ) -> None:
        self._delivery = delivery
        self._outcome = outcome
        self._settle = settle
        self.queue = queue
        self.settlement: Settlement | None = None
        """What the handler has said itself, if it has."""

    @property
    def message_id(self) -> str:
        """The same in every attempt and in no other message: do under it what must not happen twice."""
        return self._delivery.message.id

    @property
    def attempt(self) -> int:
        """Which time this is, from 1."""
        return self._delivery.attempt

    @property
    def delivery_count(self) -> int:
        """The same as `attempt`."""
        return self._delivery.attempt

    @property
    def enqueued_at(self) -> datetime:
        return self._delivery.message.enqueued_at

    @property
    def headers(self) -> Mapping[str, str]:
        return self._delivery.message.headers

    @property
    def key(self) -> str | None:
        """The key by which messages are kept in order."""
        return self._delivery.message.key

    @property
    def priority(self) -> int:
        return self._delivery.message.priority

    async def ack(self) -> None:
        """The work is done: returns when the broker knows. Raises `Fenced` when somebody else has the message now."""
        await self._say(Acked(self._delivery.token))

    async def nack(
        self,
        *,
        requeue: bool = True,
        delay: timedelta | float | str | None = None,
        reason: str | None = None,
        error_code: str | None = None,
        error_message: str | None = None,
    ) -> None:
        """The work cannot be done: the message comes again after `delay` (else the queue's `retry_delay`) while it has
        attempts left; with `requeue=False`, and afterwards, it is a dead letter. Raises `Fenced` as `ack` does."""
        text = error_message or reason or "the handler said nack"
        delay_ms = None if delay is None else round(parse_duration(delay) / timedelta(milliseconds=1))
        await self._say(
            self._outcome.failed(
                self._delivery, error_code or "NACK", text, may_retry=requeue, reason="rejected", delay_ms=delay_ms
            )
        )

    async def _say(self, settlement: Settlement) -> None:
        if self.settlement is not None:
            raise DefinitionError(
                f"message {self.message_id} of queue {self.queue!r} is settled already: ack or nack it once"
            )
        self.settlement = settlement
        if not await self._settle(settlement):
            raise Fenced(
                f"message {self.message_id} of queue {self.queue!r} was handed to somebody else while this handler "
                "worked on it: raise visibility_timeout, or keep the event loop free",
                data={"queue": self.queue, "messageId": self.message_id},
            )


def called(handler: Callable[..., object]) -> Call:
    """`handler` as it is called here: with or without a context, on the loop or in a thread of its own."""
    takes_context = _takes_context(handler)
    if not _is_async(handler):
        return _InThreads(handler, takes_context=takes_context)

    async def with_context(message: Any, context: QueueContext) -> None:
        await cast("Awaitable[object]", handler(message, context))

    async def without_context(message: Any, _: QueueContext) -> None:
        await cast("Awaitable[object]", handler(message))

    return with_context if takes_context else without_context


class _InThreads:
    """Calls a plain handler in a thread of its own. A thread cannot be stopped: when its time is up the message goes on
    without it."""

    def __init__(self, handler: Callable[..., object], *, takes_context: bool) -> None:
        self._handler = handler
        self._takes_context = takes_context

    async def __call__(self, message: Any, context: QueueContext) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        arguments = (message, context) if self._takes_context else (message,)
        variables = contextvars.copy_context()

        def finish(error: BaseException | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def work() -> None:
            error: BaseException | None = None
            try:
                variables.run(self._handler, *arguments)
            except BaseException as raised:  # noqa: BLE001 - it is the outcome, whatever it is
                # A future refuses StopIteration, and a loop does not survive SystemExit in one.
                is_plain = isinstance(raised, Exception) and not isinstance(raised, StopIteration)
                error = raised if is_plain else RuntimeError(describe(raised))
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(finish, error)

        # A daemon: a handler that never returns must not keep the process from ending.
        threading.Thread(target=work, name=f"sagaloom-queue-{context.message_id}", daemon=True).start()
        await done


def _is_async(handler: object) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004


def _takes_context(handler: Callable[..., object]) -> bool:
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):
        return True
    for arguments, answer in (((None, None), True), ((None,), False)):
        with contextlib.suppress(TypeError):
            signature.bind(*arguments)
            return answer
    raise DefinitionError(
        f"a queue's handler takes (message) or (message, context); {handler!r:.120} takes {signature}"
    )
