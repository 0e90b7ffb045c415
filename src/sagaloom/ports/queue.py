"""What a message broker does for a queue: it keeps messages until each of them has been worked on, or given up.

A queue is a name at a *broker*. Those who send put messages into it; those who consume take them out one by one, work
on each, and settle it. The life of a message:

               ┌────────── Retried (later) ◀──────────┐
               ▼                                      │
    send ──▶ waiting ──take──▶ leased (attempt 1, 2 …)┼── Acked ──▶ gone
               ▲                    │                 └── Buried ──▶ dead letter ──redrive──▶ waiting
               └── Released, lease over ──────────────┘

The rules, which `sagaloom.testing.contracts.queue` checks of every broker:

1. What `send` has returned is kept, as safely as the broker keeps anything (`QueueCapabilities.durability`).
2. A message has one id for life: every repeat, retry and dead letter carries it.
3. A message that was taken is nobody else's while its lease lasts: until it is settled, or `renew` comes too late, or
   (`leases="connection"`) the connection of its consumer ends. Then it is handed out again. A consumer that dies costs
   time, never a message.
4. `attempt` counts the times a message was handed out, deaths of consumers included: one that kills its consumer every
   time is worn out in the end. A released one got its attempt back.
5. A settlement is believed only under the newest lease of its message. A late one changes nothing and is named in
   `Exchange.stale`.
6. Settling is one step: a message that is retried or buried is in its new place before it has left the old one.
7. Waiting messages come in the order of their priority, then of their arrival. Delayed and retried ones arrive when
   they are due.
8. Messages with a `key` are handed out one at a time for each key, in the order in which they were sent: one that is
   retried holds back those behind it.
9. What a broker cannot do is in its capabilities, and asking for it is an error. Nothing is ignored silently.

The consumer speaks to the broker in one sentence, `exchange`: this is what became of what you gave me, give me more.
Acknowledgements thus travel together, many to a round trip, and new messages come back on the same way.

What we dislike about it: nobody can tell a consumer that is slow from one that is dead, so two of them can work on one
message at the same time. The second one's settlement counts; what both do outside must be harmless to repeat. That is
why a message keeps its id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import datetime
from typing import Final, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import msgspec

__all__ = [
    "PRIORITY_DEFAULT",
    "PRIORITY_MAX",
    "Acked",
    "Buried",
    "DeadLetterReason",
    "DeadLetterStorePort",
    "Delivery",
    "Exchange",
    "QueueBroker",
    "QueueCapabilities",
    "QueueDeadLetter",
    "QueueDepth",
    "QueueMessage",
    "Released",
    "Retried",
    "Settlement",
    "Token",
    "is_reserved_header",
]

PRIORITY_MAX: Final = 100
PRIORITY_DEFAULT: Final = 50

Token: TypeAlias = Hashable
"""One lease of one message. Only the broker that made it can read it."""

_RESERVED: Final = re.compile(
    r"sagaloom-.*|cc|bcc|x-(?:death|delivery-count|acquired-count|(?:first|last)-death-.*|opt-.*)", re.IGNORECASE
)


def is_reserved_header(name: str) -> bool:
    """Whether a broker, or we at one, write or read a header of this name. Messages do not carry it.

    >>> is_reserved_header("sagaloom-attempts"), is_reserved_header("x-channel")
    (True, False)
    """
    return _RESERVED.fullmatch(name) is not None


DeadLetterReason = Literal["max_attempts_exceeded", "rejected", "validation_failed"]
"""Why a message was given up: its attempts are spent, its handler said so, or it cannot be read."""


class QueueMessage(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A message as it is kept: `body` is the payload as JSON, `enqueued_at` the sender's time.

    `deduplication_id`: within the broker's window a second message with it is not stored.
    """

    id: str
    body: bytes
    enqueued_at: datetime
    headers: Mapping[str, str] = {}
    priority: int = PRIORITY_DEFAULT
    key: str | None = None
    deduplication_id: str | None = None


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """A message that was handed out: for the `attempt`th time (from 1), under the lease `token`."""

    message: QueueMessage
    attempt: int
    token: Token


class QueueDeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that was given up, after `attempt` attempts."""

    message: QueueMessage
    queue: str
    attempt: int
    reason: DeadLetterReason
    failed_at: datetime
    error_code: str | None = None
    error_message: str | None = None
    traceback: str | None = None

    @property
    def id(self) -> str:
        """The id of the message."""
        return self.message.id


class Acked(NamedTuple):
    """The work is done: the message goes."""

    token: Token


class Retried(NamedTuple):
    """The attempt failed: the message is handed out again when `delay_ms` have passed."""

    token: Token
    delay_ms: int


class Released(NamedTuple):
    """The consumer ends before the work does: the message may be handed out at once; this attempt does not count."""

    token: Token


class Buried(NamedTuple):
    """The message is given up: it becomes `letter`."""

    token: Token
    letter: QueueDeadLetter


Settlement: TypeAlias = Acked | Retried | Released | Buried


class Exchange(NamedTuple):
    """What came of an exchange. `stale`: settlements that came too late. `next_in_seconds`: when there may be more
    without anybody sending, as far as is known."""

    deliveries: Sequence[Delivery] = ()
    stale: Sequence[Token] = ()
    next_in_seconds: float | None = None


class QueueDepth(NamedTuple):
    """How many messages there are. `waiting` includes `delayed` where the broker does not tell them apart."""

    waiting: int
    delayed: int
    leased: int
    dead: int

    @property
    def live(self) -> int:
        """Those that are still to be worked on."""
        return self.waiting + self.delayed + self.leased


class QueueCapabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What a broker can do, and how. What is False is refused when it is asked for."""

    durability: str
    """What a message that was sent survives, in words."""
    delay: str
    """How exactly delays are kept, in words."""
    leases: Literal["renewed", "connection"]
    """What a lease hangs on: on being renewed in time, or on the connection of the consumer."""
    priority: bool
    deduplication: bool
    order_by_key: bool
    atomic_batches: bool
    """Whether `enqueue_many` is stored as a whole or not at all."""
    exact_releases: bool = True
    """Whether a released message keeps its place. Otherwise it goes to the end."""
    exact_depth: bool = True
    """Whether `depth` counts what other clients work on or have delayed."""


@runtime_checkable
class QueueBroker(Protocol):
    """One queue at a broker. Every method raises `BackendUnavailable` when the broker does not answer in time, and
    `ConfigurationError` when it will never answer as things are set up (a wrong password, say)."""

    @property
    def name(self) -> str:
        """What errors call this queue, for example `redis queue 'mails'`."""
        ...

    @property
    def queue(self) -> str:
        """The name of the queue."""
        ...

    @property
    def capabilities(self) -> QueueCapabilities: ...

    async def send(self, messages: Sequence[tuple[QueueMessage, int]]) -> Sequence[bool]:
        """Stores messages, each due after so many milliseconds; False for one that was a duplicate. When it raises,
        none is stored, or (after a cut connection, and without `atomic_batches`) nobody knows which.

        Raises `QueueFull` when they would not fit."""
        ...

    async def begin(self, on_arrival: Callable[[], None], *, prefetch: int, lease_seconds: float) -> None:
        """Makes this object a consumer that never holds more than `prefetch` messages. From now on the broker calls
        `on_arrival`, on the running loop, when there may be something to take; it may do so for nothing, and miss one
        now and then."""
        ...

    async def exchange(self, settlements: Sequence[Settlement], *, limit: int) -> Exchange:
        """Settles, and takes at most `limit` messages, without waiting for any. May be repeated when its outcome is not
        known: a settlement that was made is stale the second time."""
        ...

    async def renew(self, tokens: Sequence[Token]) -> Sequence[Token]:
        """Prolongs leases by the whole of `lease_seconds`; returns those that are over."""
        ...

    async def end(self) -> None:
        """Consumes no more. What is still leased is handed out again, at the latest when its lease is over."""
        ...

    async def depth(self) -> QueueDepth: ...

    async def dead_letters(self, *, limit: int, after: str | None = None) -> Sequence[QueueDeadLetter]:
        """Dead letters, the oldest first, from behind the one with the id `after`."""
        ...

    async def redrive(self, ids: Sequence[str]) -> int:
        """Makes dead letters waiting messages again, with attempts from 1; returns how many there were."""
        ...

    async def discard(self, ids: Sequence[str]) -> int:
        """Removes dead letters for good; returns how many there were."""
        ...

    async def close(self) -> None:
        """Lets go of connections and files. Closing twice is no error."""
        ...


@runtime_checkable
class DeadLetterStorePort(Protocol):
    """A home for dead letters of your own, in place of the broker's. A message is acknowledged after `append` has
    returned, so a crash between the two appends it again: under the same id, which must be harmless."""

    async def append(self, letter: QueueDeadLetter) -> None:
        """Keeps `letter`. A second one with its id and queue takes its place."""
        ...

    async def list(self, queue: str, *, limit: int, after: str | None = None) -> Sequence[QueueDeadLetter]:
        """Letters of `queue`, the oldest first, from behind the one with the id `after`."""
        ...

    async def get(self, queue: str, ids: Sequence[str]) -> Sequence[QueueDeadLetter]:
        """Those of these letters that are there."""
        ...

    async def remove(self, queue: str, ids: Sequence[str]) -> int:
        """Removes letters; returns how many there were."""
        ...

    async def depth(self, queue: str) -> int: ...
