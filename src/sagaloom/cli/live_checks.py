"""What lives in a store and would not go on under these sagas: states that no migration leads from, or that cannot be
read, and instances of sagas that are gone. It is asked before a release, and reads only.

A runtime refuses to start for the first of these (`sagaloom.runtime.evolution`), and would meet the others one message
at a time, as dead letters.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from sagaloom.checks import LEVELS, Finding, Level, source_of
from sagaloom.engine.migrating import readable_state
from sagaloom.errors import SagasError
from sagaloom.foresight import Place
from sagaloom.ids import instance_id
from sagaloom.ports.store import InstanceFilter
from sagaloom.runtime.evolution import oldest_readable

if TYPE_CHECKING:
    from sagaloom.definitions import SagaDefinition, SagaInstanceStatus
    from sagaloom.engine.records import Instance
    from sagaloom.ports.store import SagaStore

__all__ = ["LiveReport", "check_live"]

STATES_TRIED_MAX: Final = 1_000
_PAGE: Final = 500
_COUNTED_MAX: Final = 1_000_000
_LIVE: Final[tuple[SagaInstanceStatus, ...]] = ("running", "compensating")


class LiveReport(NamedTuple):
    """What was found, and how many instances are live in the store."""

    findings: tuple[Finding, ...]
    live: int


class _Some(NamedTuple):
    """Live instances of one version that cannot go on: how many, one of them, and what is wrong with it."""

    number: int
    example: str
    trouble: str = ""


async def check_live(
    store: SagaStore, definitions: Iterable[SagaDefinition[Any]], *, where: str = "the store"
) -> LiveReport:
    """Compares what lives in `store` with `definitions`, which are taken to be all that will run on it. How many live
    instances have a version that no migration leads from is counted; whether states can be read and migrated is tried
    with the newest thousand of each saga, and of those that are older than it."""
    every = list(definitions)
    registered = {each.saga_id: each for each in await store.definitions()}
    found: list[Finding] = []
    for definition in every:
        known = registered.get(definition.id)
        found += await _of_saga(store, definition, newest=known.version if known is not None else 1)
    for saga_id in sorted(registered.keys() - {each.id for each in every}):
        if live := await _count(store, saga_id):
            found.append(_not_loaded(saga_id, live, where))
    found.sort(key=lambda one: (one.saga, LEVELS.index(one.level), one.code))
    return LiveReport(tuple(found), await _count(store))


async def _of_saga(store: SagaStore, definition: SagaDefinition[Any], *, newest: int) -> list[Finding]:
    found: list[Finding] = []
    readable = oldest_readable(definition)
    if readable > 1:
        versions = await _versions(_walk(store, definition.id, below=readable))
        found += [_missing(definition, version, one) for version, one in versions]
    if newest > definition.version:
        every = await _versions(_walk(store, definition.id))
        found += [_newer(definition, version, one) for version, one in every if version > definition.version]
    looked_at = {(each.key, each.run): each async for each in _walk(store, definition.id, limit=STATES_TRIED_MAX)}
    if definition.version > 1:
        older = _walk(store, definition.id, below=definition.version, limit=STATES_TRIED_MAX)
        looked_at |= {(each.key, each.run): each async for each in older}
    tried = [one for one in looked_at.values() if readable <= one.def_version <= definition.version]
    found += [_unreadable(definition, version, one, len(tried)) for version, one in _unread(definition, tried)]
    return found


def _unread(definition: SagaDefinition[Any], live: Sequence[Instance]) -> list[tuple[int, _Some]]:
    """The versions whose states cannot be read, with how many of them."""
    found: dict[int, _Some] = {}
    for instance in live:
        try:
            definition.state_codec.decode(readable_state(definition, instance))
        except SagasError as error:
            _add(found, instance, error.message)
    return sorted(found.items())


async def _versions(live: AsyncIterator[Instance]) -> list[tuple[int, _Some]]:
    """How many there are of each version."""
    found: dict[int, _Some] = {}
    async for instance in live:
        _add(found, instance)
    return sorted(found.items())


def _add(found: dict[int, _Some], instance: Instance, trouble: str = "") -> None:
    before = found.get(instance.def_version)
    if before is None:
        found[instance.def_version] = _Some(1, instance_id(instance.saga_id, instance.key, instance.run), trouble)
    else:
        found[instance.def_version] = before._replace(number=before.number + 1)


async def _walk(
    store: SagaStore, saga_id: str, *, below: int | None = None, limit: int | None = None
) -> AsyncIterator[Instance]:
    wanted = InstanceFilter(saga_ids=(saga_id,), statuses=_LIVE, version_below=below)
    cursor: str | None = None
    left = limit
    while left is None or left > 0:
        size = _PAGE if left is None else min(_PAGE, left)
        page, cursor = await store.instances(wanted, limit=size, cursor=cursor)
        for instance in page:
            yield instance
        if cursor is None:
            return
        left = None if left is None else left - len(page)


async def _count(store: SagaStore, saga_id: str | None = None) -> int:
    wanted = InstanceFilter(saga_ids=() if saga_id is None else (saga_id,), statuses=_LIVE)
    return await store.count_instances(wanted, limit=_COUNTED_MAX)


# --- Findings --------------------------------------------------------------------------------------------------------


def _missing(definition: SagaDefinition[Any], version: int, some: _Some) -> Finding:
    readable = oldest_readable(definition)
    steps = ", ".join(f"{old}: ..." for old in range(version, readable))
    return _finding(
        definition,
        "error",
        "missing-migration",
        f"{_live(some)} of version {version}; this code, of version {definition.version}, reads states from version "
        f"{readable} on: a process with it would not start",
        f"add .version({definition.version}, migrate={{{steps}}}), or let them end with the code that knows them, or "
        "terminate them",
    )


def _newer(definition: SagaDefinition[Any], version: int, some: _Some) -> Finding:
    return _finding(
        definition,
        "warning",
        "older-code",
        f"{_live(some)} of version {version}; this code is of version {definition.version}: they wait for a "
        "process that is newer",
        f"deploy code of version {version} or newer, or keep such a process beside this one",
    )


def _unreadable(definition: SagaDefinition[Any], version: int, some: _Some, tried: int) -> Finding:
    is_old = version < definition.version
    return _finding(
        definition,
        "error",
        "failing-migration" if is_old else "unreadable-state",
        f"this code cannot {'migrate' if is_old else 'read'} {some.number} of the {tried} live states that were looked "
        f"at, of version {version}: {some.trouble}",
        "correct the migration"
        if is_old
        else f"give a new field a default, or make it .version({version + 1}, migrate={{{version}: ...}})",
    )


def _not_loaded(saga_id: str, live: int, where: str) -> Finding:
    return Finding(
        level="warning",
        code="saga-not-loaded",
        saga=saga_id,
        place=Place(where, 0),
        message=f"{_number(live)} of this saga, which is not loaded here: their messages and timers would wait",
        remedy="name its module too; or let them end first, or cancel them, with the code that knows them",
    )


def _finding(definition: SagaDefinition[Any], level: Level, code: str, message: str, remedy: str) -> Finding:
    return Finding(
        level=level, code=code, saga=definition.id, place=source_of(definition), message=message, remedy=remedy
    )


def _live(some: _Some) -> str:
    return f"{_number(some.number)} (such as {some.example!r})"


def _number(count: int) -> str:
    return f"{count} live {'instance' if count == 1 else 'instances'}"
