"""What `publish` answers: a receipt or a refusal. Both are values; neither is raised."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import msgspec

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import Disposition
from sagaloom.errors import SagasError

__all__ = ["Outcome", "PublishReceipt", "PublishRejected"]

_log = logging.getLogger("sagaloom.publish")


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
class PublishRejected:
    """The message was refused and changed nothing. `error` has its code, message and data. A refusal that nobody
    looks at is logged as a warning."""

    message_type: str | None
    error: SagasError
    published: Literal[False] = False
    _seen: bool = field(default=False, repr=False)

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

    def __del__(self) -> None:
        if not self._seen:
            _log.warning("a refused publish went unnoticed: %s: %s", self.message_type, self.error.message)
