"""The life of an instance, as a table.

The rules, in prose:

- An instance is `pending` while its first message is accepted and not applied. That message starts it.
- `running` and `compensating` are the live statuses: messages are applied in both, and leave the status as it is.
- A compensation makes it `compensating`, and nothing makes it `running` again: what was undone stays undone.
- `completed`, `failed` and `cancelled` are terminal: nothing leads out of them (I1). A pair that is not in the table
  is refused, so the terminal statuses need no rule of their own: they have no row.
- Completing out of `compensating` is allowed: an undo whose confirmations all came in may well be a success.

`STATUS_TABLE` is the single source. The engine asks it for every step it takes, `status_diagram` draws the picture in
the documentation from it, and the tests walk it.

What we dislike about it: `pending` is never stored by the engine, for an instance that is not applied has no row. The
stores show it for accepted first messages, so it is a status of the reading side that starts every life here.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal

from sagaloom.definitions import SAGA_INSTANCE_STATUSES, SagaInstanceStatus

__all__ = [
    "HAPPENINGS",
    "STATUS_TABLE",
    "TERMINAL",
    "Happening",
    "StatusRefused",
    "is_terminal",
    "next_status",
    "status_diagram",
]

Happening = Literal["start", "advance", "compensate", "complete", "fail", "cancel"]
HAPPENINGS: Final[tuple[Happening, ...]] = ("start", "advance", "compensate", "complete", "fail", "cancel")

_NEXT: Final[dict[tuple[SagaInstanceStatus, Happening], SagaInstanceStatus]] = {
    ("pending", "start"): "running",
    ("running", "advance"): "running",
    ("running", "compensate"): "compensating",
    ("running", "complete"): "completed",
    ("running", "fail"): "failed",
    ("running", "cancel"): "cancelled",
    ("compensating", "advance"): "compensating",
    ("compensating", "compensate"): "compensating",
    ("compensating", "complete"): "completed",
    ("compensating", "fail"): "failed",
    ("compensating", "cancel"): "cancelled",
}
STATUS_TABLE: Final[Mapping[tuple[SagaInstanceStatus, Happening], SagaInstanceStatus]] = MappingProxyType(_NEXT)

_AFTER: Final[dict[Happening, dict[SagaInstanceStatus, SagaInstanceStatus]]] = {
    happening: {before: after for (before, what), after in _NEXT.items() if what == happening}
    for happening in HAPPENINGS
}
TERMINAL: Final = frozenset(SAGA_INSTANCE_STATUSES) - {status for status, _ in STATUS_TABLE}
"""The statuses that nothing leads out of."""


class StatusRefused(Exception):
    """A happening that the table does not know in this status: the engine's own mistake, never a user's."""


def is_terminal(status: SagaInstanceStatus) -> bool:
    """Whether nothing leads out of `status`."""
    return status in TERMINAL


def next_status(status: SagaInstanceStatus, happening: Happening) -> SagaInstanceStatus:
    """The status after `happening`; raises `StatusRefused` when the table has no such pair."""
    try:
        return _AFTER[happening][status]
    except KeyError:
        raise StatusRefused(f"the status table knows no {happening!r} for an instance that is {status!r}") from None


def status_diagram() -> str:
    """The table as a Mermaid state diagram, in the table's order."""
    terminal = [status for status in SAGA_INSTANCE_STATUSES if is_terminal(status)]
    lines = ["stateDiagram-v2", "    [*] --> pending"]
    lines += [f"    {before} --> {after}: {happening}" for (before, happening), after in STATUS_TABLE.items()]
    lines += [f"    {status} --> [*]" for status in terminal]
    return "\n".join(lines) + "\n"
