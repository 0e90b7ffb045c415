"""Many dead letters at once: which ones, in which order, and what became of each.

Each is redriven or discarded by itself, as if it alone had been named, so that one that cannot be keeps no other from
it; those that are asked for together share commits. They are taken oldest first: messages to one instance enter again
in the order in which they were given up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sagaloom.engine.records import DeadLetter
from sagaloom.errors import DeadLetterNotFound, MessageRejected, SagasError
from sagaloom.ports.store import SagaStore

__all__ = ["BULK_MAX", "BulkResult", "Trouble", "letters_named", "oldest_letters", "repair_each"]

BULK_MAX: Final = 1_000
_AT_ONCE: Final = 64
_PAGE: Final = 200
_LOOKED_AT_MAX: Final = 10_000


class Trouble(NamedTuple):
    """A dead letter that was left as it is, and why."""

    id: str
    error: SagasError


@dataclass(frozen=True, slots=True)
class BulkResult:
    """What became of many dead letters. `has_more`: further ones match, beyond the limit."""

    done: tuple[str, ...]
    troubles: tuple[Trouble, ...] = ()
    has_more: bool = False


async def letters_named(store: SagaStore, ids: Sequence[str]) -> tuple[list[DeadLetter], list[Trouble]]:
    """The dead letters of these ids, oldest first, and those that are not there. Raises `MessageRejected` for too
    many."""
    if len(ids) > BULK_MAX:
        raise MessageRejected(f"{len(ids)} dead letters at once: at most {BULK_MAX} are taken, name fewer")
    letters: list[DeadLetter] = []
    missing: list[Trouble] = []
    for identifier in sorted(set(ids)):
        letter = await store.dead_letter(identifier)
        if letter is not None:
            letters.append(letter)
            continue
        gone = DeadLetterNotFound(f"no dead letter {identifier!r:.80}: it was redriven or discarded, or never was")
        missing.append(Trouble(identifier, gone))
    return letters, missing


async def oldest_letters(
    store: SagaStore, *, saga_id: str | None, key: str | None, limit: int
) -> tuple[list[DeadLetter], bool]:
    """The oldest `limit` dead letters that match, and whether there are more. Of more than 10,000 that match only the
    newest 10,000 are looked at. Raises `MessageRejected` for a limit below 1 or above 1,000."""
    if not 1 <= limit <= BULK_MAX:
        raise MessageRejected(f"limit {limit} is none: between 1 and {BULK_MAX} dead letters are taken at once")
    oldest: deque[DeadLetter] = deque(maxlen=limit)
    after: str | None = None
    looked_at = 0
    # Stores list the newest first, since that is what people want to see.
    while looked_at < _LOOKED_AT_MAX:
        page = await store.dead_letters(saga_id=saga_id, key=key, after=after, limit=_PAGE)
        oldest.extend(page)
        looked_at += len(page)
        if len(page) < _PAGE:
            break
        after = page[-1].id
    return list(reversed(oldest)), looked_at > limit


async def repair_each(letters: Sequence[DeadLetter], repair: Callable[[DeadLetter], Awaitable[object]]) -> BulkResult:
    """Calls `repair` with each letter, in their order, some at once."""
    done: list[str] = []
    troubles: list[Trouble] = []

    async def one(letter: DeadLetter) -> Trouble | None:
        try:
            await repair(letter)
        except SagasError as error:
            return Trouble(letter.id, error)
        return None

    for start in range(0, len(letters), _AT_ONCE):
        part = letters[start : start + _AT_ONCE]
        # Gathered coroutines run in order up to their first wait, which is after what they ask for was queued.
        for letter, trouble in zip(part, await asyncio.gather(*map(one, part)), strict=True):
            if trouble is None:
                done.append(letter.id)
            else:
                troubles.append(trouble)
    return BulkResult(tuple(done), tuple(troubles))
