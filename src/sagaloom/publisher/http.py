"""The publishers: `create_saga_publisher` for coroutines, `create_sync_saga_publisher` for everybody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Generic, Literal, NamedTuple, Self, Unpack, cast, overload

from typing_extensions import TypeVar

from sagaloom.clock import SystemClock
from sagaloom.errors import ConfigurationError, MessageRejected, SagasError
from sagaloom.messages import SagaMessage, as_message
from sagaloom.ports.publisher import (
    PublishOptions,
    SagaPublisherRejected,
    SagaPublisherResult,
    SharedPublishOptions,
)
from sagaloom.publisher.clients import AsyncCarrier, SyncCarrier
from sagaloom.publisher.conversation import Conversation, Wait
from sagaloom.publisher.drafts import Parts, draft_of, parts_of
from sagaloom.publisher.options import HttpSagaPublisherKeywords, HttpSagaPublisherOptions

__all__ = ["HttpSagaPublisher", "SyncHttpSagaPublisher", "create_saga_publisher", "create_sync_saga_publisher"]

Mode = Literal["sequential", "parallel"]

_CONCURRENCY: Final = 10
_CONCURRENCY_MAX: Final = 100
_KEYWORDS: Final = HttpSagaPublisherKeywords.__optional_keys__
_now = SystemClock().now

M_contra = TypeVar("M_contra", contravariant=True, default=Any)


class _Publisher:
    """What both publishers do before and around the requests."""

    def __init__(self, options: HttpSagaPublisherOptions | None, keywords: Mapping[str, Any]) -> None:
        self._options = _options_of(options, keywords)

    @property
    def id(self) -> str:
        """What logs and errors call this publisher."""
        return self._options.id

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def _begun(
        self, read: Callable[[], Parts], overrides: Mapping[str, Any], wait: object = None
    ) -> Conversation | SagaPublisherRejected:
        """The conversation about the message that `read` gives, or why there is none."""
        received: SagaMessage[Any] | None = None
        try:
            received, declared, options = read()
            draft = draft_of(received, options, overrides, declared=declared, wait=wait, now=_now())
            url = self._options.publish_url()
        except SagasError as error:
            return _rejected(error, received)
        return Conversation(draft, url=url, options=self._options, now=_now, monotonic=time.monotonic)

    def _begun_among(self, message: object, options: Mapping[str, Any]) -> Conversation | SagaPublisherRejected:
        """The same for one of many, which brings its type along: a bare string among them is a mistake."""
        return self._begun(lambda: Parts(as_message(message), None, None), options)


class HttpSagaPublisher(_Publisher, Generic[M_contra]):
    """Publishes messages to a saga service over HTTP, with retries under one idempotency key.

    `create_saga_publisher[OrderPlaced | PaymentCaptured]()` publishes these two classes and is refused by type checkers
    for any other; without brackets it publishes anything. The options are those of `HttpSagaPublisherOptions`, together
    or as keywords; a keyword comes before the same in `options`.

        publisher = create_saga_publisher[OrderPlaced](base_url="http://127.0.0.1:8092")
        receipt = await publisher.publish(OrderPlaced("o-1"))
        receipt.raise_for_rejected()

    It may live as long as the process and be shared by tasks. `close`, or `async with`, closes its connections; a later
    publish opens new ones.
    """

    def __init__(
        self, options: HttpSagaPublisherOptions | None = None, **keywords: Unpack[HttpSagaPublisherKeywords]
    ) -> None:
        super().__init__(options, keywords)
        self._carrier = AsyncCarrier(self._options.fetcher)

    @overload
    async def publish(
        self,
        message: M_contra | SagaMessage[M_contra],
        options: PublishOptions | None = None,
        *,
        wait: float | timedelta | None = None,
        **overrides: Unpack[PublishOptions],
    ) -> SagaPublisherResult: ...
    @overload
    async def publish(
        self,
        message: str,
        payload: M_contra,
        options: PublishOptions | None = None,
        *,
        wait: float | timedelta | None = None,
        **overrides: Unpack[PublishOptions],
    ) -> SagaPublisherResult: ...
    @overload
    async def publish(
        self,
        message: type[M_contra],
        payload: M_contra,
        options: PublishOptions | None = None,
        *,
        wait: float | timedelta | None = None,
        **overrides: Unpack[PublishOptions],
    ) -> SagaPublisherResult: ...
    async def publish(
        self, message: object, *rest: Any, wait: float | timedelta | None = None, **named: Any
    ) -> SagaPublisherResult:
        """Hands a message over and answers once it is durable or refused; a refusal is returned, never raised.

        `message` is an instance of a message class, a `SagaMessage`, or a mapping with `type` and `payload`; or a type
        or message class, followed by the payload. `options`, or the same as keywords, override what the message says:
        `correlation_key`, `idempotency_key`, `concurrency_key`, `topic`, `traceparent`, `tracestate`, `id`,
        `occurred_at`. With `wait` (seconds) the service answers after the message was applied, at most that much later;
        the receipt then has `outcomes`.

        Without an idempotency key or id of its own the message gets one for all attempts of this call. Two calls are
        two messages.
        """
        return await self._held(self._begun(lambda: parts_of(message, rest, named), named, wait))

    async def publish_many(
        self,
        messages: Iterable[M_contra | SagaMessage[M_contra]],
        options: SharedPublishOptions | None = None,
        *,
        mode: Mode = "sequential",
        concurrency: int = _CONCURRENCY,
        **overrides: Unpack[SharedPublishOptions],
    ) -> list[SagaPublisherResult]:
        """Publishes each message, and answers each, in the order of `messages`. A refused one does not stop the rest.

        `sequential` starts one when the one before was answered, so that the service accepts them in this order.
        `parallel` has up to `concurrency` under way at once, and no order. The options are for all of them.
        """
        many = _many_of(messages, options, overrides, mode, concurrency)
        if many.problem is not None:
            return many.refusals()
        results: dict[int, SagaPublisherResult] = {}
        waiting = iter(enumerate(many.messages))

        async def work() -> None:
            for number, message in waiting:
                results[number] = await self._held(self._begun_among(message, many.options))

        async with asyncio.TaskGroup() as workers:
            for _ in range(min(many.concurrency, len(many.messages))):
                workers.create_task(work())
        return [results[number] for number in range(len(many.messages))]

    async def _held(self, begun: Conversation | SagaPublisherRejected) -> SagaPublisherResult:
        if isinstance(begun, SagaPublisherRejected):
            return begun
        while True:
            verdict = begun.hear(await self._carrier.carry(begun.request()))
            if not isinstance(verdict, Wait):
                return verdict
            await asyncio.sleep(verdict.seconds)

    async def close(self) -> None:
        """Closes the connections of the running event loop. Twice is no error."""
        await self._carrier.close()

    async def __aenter__(self) -> Self:
        # Loading the client takes a moment, which the first publish need not spend.
        if self._options.fetcher is None:
            self._carrier.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class SyncHttpSagaPublisher(_Publisher, Generic[M_contra]):
    """`HttpSagaPublisher` for code without an event loop: the same options, forms and results, and it blocks.

        with create_sync_saga_publisher[OrderPlaced](base_url="http://127.0.0.1:8092") as publisher:
            publisher.publish(OrderPlaced("o-1")).raise_for_rejected()

    It may be shared by threads.
    """

    def __init__(
        self, options: HttpSagaPublisherOptions | None = None, **keywords: Unpack[HttpSagaPublisherKeywords]
    ) -> None:
        super().__init__(options, keywords)
        self._carrier = SyncCarrier(self._options.fetcher)

    @overload
    def publish(
        self,
        message: M_contra | SagaMessage[M_contra],
        options: PublishOptions | None = None,
        *,
        wait: float | timedelta | None = None,
        **overrides: Unpack[PublishOptions],
    ) -> SagaPublisherResult: ...
    @overload
    def publish(
        self,
        message: str,
        payload: M_contra,
        options: PublishOptions | None = None,
        *,
        wait: float | timedelta | None = None,
        **overrides: Unpack[PublishOptions],
    ) -> SagaPublisherResult: ...
    @overload
    def publish(
        self,
        message: type[M_contra],
        payload: M_contra,
        options: PublishOptions | None = None,
        *,
        wait: float | timedelta | None = None,
        **overrides: Unpack[PublishOptions],
    ) -> SagaPublisherResult: ...
    def publish(
        self, message: object, *rest: Any, wait: float | timedelta | None = None, **named: Any
    ) -> SagaPublisherResult:
        """Hands a message over and answers once it is durable or refused; see `HttpSagaPublisher.publish`."""
        return self._held(self._begun(lambda: parts_of(message, rest, named), named, wait))

    def publish_many(
        self,
        messages: Iterable[M_contra | SagaMessage[M_contra]],
        options: SharedPublishOptions | None = None,
        *,
        mode: Mode = "sequential",
        concurrency: int = _CONCURRENCY,
        **overrides: Unpack[SharedPublishOptions],
    ) -> list[SagaPublisherResult]:
        """Publishes each message, in `parallel` by threads; see `HttpSagaPublisher.publish_many`."""
        many = _many_of(messages, options, overrides, mode, concurrency)
        if many.problem is not None:
            return many.refusals()

        def work(message: object, context: Context | None = None) -> SagaPublisherResult:
            if context is not None:
                return context.run(work, message)
            return self._held(self._begun_among(message, many.options))

        if many.concurrency == 1:
            return [work(message) for message in many.messages]
        with ThreadPoolExecutor(many.concurrency, "saga-publisher") as threads:
            # In a copy of the caller's context each, or the current span would be lost on the way.
            contexts = [copy_context() for _ in many.messages]
            return list(threads.map(work, many.messages, contexts))

    def _held(self, begun: Conversation | SagaPublisherRejected) -> SagaPublisherResult:
        if isinstance(begun, SagaPublisherRejected):
            return begun
        while True:
            verdict = begun.hear(self._carrier.carry(begun.request()))
            if not isinstance(verdict, Wait):
                return verdict
            time.sleep(verdict.seconds)

    def close(self) -> None:
        """Closes the connections; a later publish opens new ones. Twice is no error."""
        self._carrier.close()

    def __enter__(self) -> Self:
        if self._options.fetcher is None:
            self._carrier.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Functions cannot be subscripted with the classes they publish; classes can.
create_saga_publisher = HttpSagaPublisher
create_sync_saga_publisher = SyncHttpSagaPublisher


class _Many(NamedTuple):
    """What `publish_many` was asked for. With a `problem` nothing of it is done."""

    messages: list[object]
    options: Mapping[str, Any]
    concurrency: int
    problem: SagasError | None

    def refusals(self) -> list[SagaPublisherResult]:
        return [_rejected(self.problem, None) for _ in self.messages] if self.problem is not None else []


def _many_of(messages: object, options: object, overrides: Mapping[str, Any], mode: object, concurrency: Any) -> _Many:
    problem: str | None = None
    listed: list[object] = [messages]
    shared: dict[str, Any] = dict(overrides)
    if isinstance(messages, (str, bytes, Mapping, SagaMessage)) or not isinstance(messages, Iterable):
        problem = f"publish_many takes a list of messages, got {messages!r:.80}"
    else:
        listed = list(cast("Iterable[object]", messages))
    if isinstance(options, Mapping):
        shared = {**cast("Mapping[str, Any]", options), **overrides}
    elif options is not None:
        problem = f"the options of publish_many must be a mapping, got {options!r:.80}"
    own = [name for name in ("id", "idempotency_key") if shared.get(name) is not None]
    if own:
        problem = (
            f"{own[0]} for {len(listed)} messages at once would make all but the first a duplicate: give each "
            "SagaMessage its own"
        )
    if mode not in ("sequential", "parallel"):
        problem = f"mode={mode!r:.80} is unknown: publish_many knows 'sequential' and 'parallel'"
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or not 1 <= concurrency <= _CONCURRENCY_MAX:
        problem = f"concurrency={concurrency!r:.80} must be 1 to {_CONCURRENCY_MAX}"
        concurrency = 1
    return _Many(
        listed, shared, 1 if mode == "sequential" else concurrency, MessageRejected(problem) if problem else None
    )


def _rejected(error: SagasError, received: SagaMessage[Any] | None) -> SagaPublisherRejected:
    if received is None:
        return SagaPublisherRejected(message_type=None, error=error)
    return SagaPublisherRejected(
        message_type=received.type,
        error=error,
        message_id=received.id,
        idempotency_key=received.idempotency_key,
        correlation_key=received.correlation_key,
    )


def _options_of(options: HttpSagaPublisherOptions | None, keywords: Mapping[str, Any]) -> HttpSagaPublisherOptions:
    for name in keywords:
        if name not in _KEYWORDS:
            raise ConfigurationError(
                f"unknown option {name!r:.80} of a saga publisher; known are {', '.join(sorted(_KEYWORDS))}"
            )
    if options is None:
        return HttpSagaPublisherOptions(**keywords)
    return replace(options, **keywords) if keywords else options
