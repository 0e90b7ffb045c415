"""A Python function as a target."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, cast

import msgspec

from sagaloom.engine.records import OutboxEffect
from sagaloom.errors import DefinitionError, DeliveryFailed, MessageRejected
from sagaloom.messages import SagaMessage, as_message

__all__ = ["CallableTarget", "EffectRequest", "EffectResult", "callable_target"]

_decode = msgspec.json.Decoder().decode


class EffectRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A committed effect, as its receiver sees it.

    The same effect can come more than once, always under the same `effect_key`: remember the key, and a repeat is
    harmless. `attempt` counts from 1. `payload` is decoded JSON.
    """

    kind: str
    target_id: str
    payload: Any
    effect_key: str
    saga_id: str
    correlation_key: str
    run: int
    attempt: int
    queue: str | None = None
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


EffectResult: TypeAlias = object
"""None, a message, or a list of messages; see `sagaloom.messages.as_message` for what counts as one."""


class CallableTarget:
    """Delivers effects of one kind by calling a function; see `callable_target`."""

    def __init__(self, kind: str, fn: Callable[[EffectRequest], EffectResult | Awaitable[EffectResult]]) -> None:
        if not kind.strip():
            raise DefinitionError(
                "callable_target: the kind must not be empty; send(...) names it, as in 'email:welcome'"
            )
        if not callable(fn):
            raise DefinitionError(
                f"callable_target({kind!r}): expected a function, got {type(fn).__name__}: {fn!r:.80}"
            )
        self._kind = kind.strip()
        self._fn = fn
        called = fn if inspect.isroutine(fn) else type(fn).__call__
        self._is_async = inspect.iscoroutinefunction(called)
        self._call = cast("Callable[[EffectRequest], Awaitable[EffectResult]]", fn)

    @property
    def kind(self) -> str:
        return self._kind

    async def deliver(self, effect: OutboxEffect) -> Sequence[SagaMessage[Any]]:
        request = EffectRequest(
            kind=effect.target_kind,
            target_id=effect.target_id,
            payload=_decode(effect.payload),
            effect_key=effect.effect_key,
            saga_id=effect.saga_id,
            correlation_key=effect.key,
            run=effect.run,
            attempt=effect.attempt + 1,
            queue=effect.queue,
            idempotency_key=effect.idempotency_key,
            concurrency_key=effect.concurrency_key,
            traceparent=effect.traceparent,
            tracestate=effect.tracestate,
        )
        if self._is_async:
            answer = await self._call(request)
        else:
            # A blocking function on the event loop would hold up every other saga, so it gets a thread.
            answer = await asyncio.to_thread(self._fn, request)
            if inspect.isawaitable(answer):
                answer = await answer
        if answer is None:
            return []
        answers = cast("Sequence[object]", answer) if isinstance(answer, (list, tuple)) else [answer]
        try:
            return [as_message(one) for one in answers]
        except MessageRejected as error:
            # The function has done its work; calling it again would bring the same answer.
            raise DeliveryFailed(
                f"the function behind {effect.target_kind}:{effect.target_id} must return None, a message or a list of "
                f"messages: {error.message}",
                retryable=False,
            ) from error

    async def close(self) -> None:
        """Nothing to release."""


def callable_target(kind: str, fn: Callable[[EffectRequest], EffectResult | Awaitable[EffectResult]]) -> CallableTarget:
    """A target that calls `fn`, sync (in a thread) or async, with an `EffectRequest`, at least once for each effect.

    What `fn` returns (None, a message, a list of messages) goes back to the sender's run. When it raises, the effect
    is tried again by its retry policy; `SagasError(..., retryable=False)` makes it a dead letter at once.

        async def send_mail(request: EffectRequest) -> None:
            await mailer.send(request.payload, message_id=request.effect_key)

        start_sagas([welcome_saga], targets=[callable_target("email", send_mail)])
    """
    return CallableTarget(kind, fn)
