"""How messages go in from elsewhere: the publisher's port, and what it answers.

A publisher hands messages to a saga service and answers each with a value: a receipt once the message is durable, a
refusal otherwise. It never raises for a message. What a refusal has in common with that of the runtime is `Refusal`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NoReturn, Protocol, TypedDict

import msgspec
from typing_extensions import TypeVar

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import Disposition, UpdateAnswer
from sagaloom.errors import SagasError
from sagaloom.messages import SagaMessage

__all__ = [
    "Outcome",
    "PublishOptions",
    "Refusal",
    "SagaPublisherPort",
    "SagaPublisherReceipt",
    "SagaPublisherRejected",
    "SagaPublisherResult",
    "SharedPublishOptions",
]

_log = logging.getLogger("sagaloom.publish")

M_contra = TypeVar("M_contra", contravariant=True, default=Any)


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a message did to one instance of one saga. `pending`: accepted and safe, but not applied yet; then there
    may be no status, state or revision. `message_id` of a duplicate is that of the first one. `state` and `result` are
    plain JSON values."""

    message_id: str
    instance_id: str
    saga_id: str
    correlation_key: str
    run: int
    disposition: Disposition
    status: SagaInstanceStatus | None = None
    revision: int | None = None
    state: Any = None
    effects: Sequence[str] = ()
    result: Any = None
    reason: str | None = None
    answer: UpdateAnswer | None = None
    """What the handler of an update had to say."""


@dataclass(slots=True, kw_only=True)
class Refusal:
    """A message that was refused. `error` has its code, message and data. A refusal that nobody looks at is logged as a
    warning."""

    message_type: str | None
    error: SagasError
    _seen: bool = field(default=False, init=False, repr=False, compare=False)

    @property
    def published(self) -> Literal[False]:
        self._seen = True
        return False

    @property
    def code(self) -> str:
        self._seen = True
        return self.error.code

    @property
    def reason(self) -> str:
        self._seen = True
        return self.error.message

    @property
    def retryable(self) -> bool:
        self._seen = True
        return self.error.retryable

    def raise_for_rejected(self) -> NoReturn:
        self._seen = True
        raise self.error

    def __str__(self) -> str:
        self._seen = True
        return repr(self)

    def __del__(self) -> None:
        if not getattr(self, "_seen", True):  # one that could not even be made has no such field
            _log.warning("a refused publish went unnoticed: %s: %s", self.message_type, self.error.message)


class SharedPublishOptions(TypedDict, total=False):
    """What may be said about many messages at once. It comes before what a message says itself."""

    correlation_key: str | None
    concurrency_key: str | None
    topic: str | None
    traceparent: str | None
    tracestate: str | None


class PublishOptions(SharedPublishOptions, total=False):
    """What may be said about one message."""

    idempotency_key: str | None
    id: str | None
    occurred_at: datetime | None


class SagaPublisherReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """The service says that the message is durable.

    `duplicate`: it was before this answer, which a service may leave unsaid; with `attempts` above 1 an earlier attempt
    of this very publish may have been the first. `instance_ids` are the runs that take it, and `outcomes` what it did
    to them, for those who waited; both are empty where the service tells nothing.
    """

    message_type: str
    message_id: str
    idempotency_key: str
    correlation_key: str | None
    accepted_at: datetime
    duplicate: bool = False
    attempts: int = 1
    instance_ids: tuple[str, ...] = ()
    outcomes: tuple[Outcome, ...] = ()
    published: Literal[True] = True

    @property
    def reason(self) -> None:
        """A receipt has none; for those who ask without looking at `published`."""
        return None

    @property
    def retryable(self) -> Literal[False]:
        return False

    def raise_for_rejected(self) -> SagaPublisherReceipt:
        return self


@dataclass(slots=True, kw_only=True)
class SagaPublisherRejected(Refusal):
    """The message was not accepted, or nobody can say.

    `may_have_arrived`: an attempt ended without a clear answer, so the service may have the message none the less. To
    try again without doing it twice, publish with the same `idempotency_key`.
    """

    message_id: str | None = None
    idempotency_key: str | None = None
    correlation_key: str | None = None
    attempts: int = 0
    may_have_arrived: bool = False


SagaPublisherResult = SagaPublisherReceipt | SagaPublisherRejected


class SagaPublisherPort(Protocol[M_contra]):
    """Publishes messages of the classes `M`; of any, when it is left out."""

    @property
    def id(self) -> str:
        """What logs and errors call this publisher."""
        ...

    async def publish(
        self, message: M_contra | SagaMessage[M_contra], options: PublishOptions | None = None, /
    ) -> SagaPublisherResult:
        """Hands one message over, and answers once it is durable or refused."""
        ...

    async def publish_many(
        self,
        messages: Iterable[M_contra | SagaMessage[M_contra]],
        options: SharedPublishOptions | None = None,
        /,
        *,
        mode: Literal["sequential", "parallel"] = "sequential",
    ) -> list[SagaPublisherResult]:
        """Hands messages over, one after the other or side by side, and answers each, in the order of `messages`."""
        ...
