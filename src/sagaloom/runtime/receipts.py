"""What the runtime answers. `publish` gives a receipt or a refusal: both are values, neither is raised. Signals,
updates and queries raise what stands against them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import Disposition
from sagaloom.ports.publisher import Outcome, Refusal

__all__ = ["Outcome", "PublishReceipt", "PublishRejected", "QueryResult", "SignalReceipt", "UpdateReceipt"]


class PublishReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """The message is durable: it survives kill -9 and power loss from here on. `duplicate`: it was before.
    `outcomes` has one entry for each saga that takes it."""

    message_id: str
    message_type: str
    correlation_key: str | None
    outcomes: tuple[Outcome, ...]
    duplicate: bool = False
    published: Literal[True] = True

    def raise_for_rejected(self) -> PublishReceipt:
        return self


@dataclass(slots=True, kw_only=True)
class PublishRejected(Refusal):
    """The message was refused and changed nothing. `error` has its code, message and data. A refusal that nobody
    looks at is logged as a warning."""


class SignalReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """The signal is durable. `pending`: it waits for its turn; `duplicate`: it came before, under the same id."""

    signal: str
    message_id: str
    instance_id: str
    saga_id: str
    correlation_key: str
    run: int
    disposition: Disposition
    status: SagaInstanceStatus | None = None
    revision: int | None = None
    reason: str | None = None


class UpdateReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """What came of an update. `answer` is what its handler answered, as plain JSON values. `pending`: the wait is over
    and there is no answer yet; the same update under the same id, which is `message_id`, gets it later. `duplicate`:
    it was sent before, and this is what was answered then."""

    update: str
    message_id: str
    instance_id: str
    saga_id: str
    correlation_key: str
    run: int
    disposition: Disposition
    status: SagaInstanceStatus | None = None
    revision: int | None = None
    duplicate: bool = False
    answer: Any = None
    reason: str | None = None


class QueryResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a query answered, as JSON, and of what run at what revision."""

    query: str
    instance_id: str
    saga_id: str
    correlation_key: str
    run: int
    status: SagaInstanceStatus
    revision: int
    answer: msgspec.Raw
