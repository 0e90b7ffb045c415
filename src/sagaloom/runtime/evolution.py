"""Instances that an older version of their saga has left behind: refused at the start if nothing can read them, and
brought up to date ahead of time.

A state is migrated when its next message comes; nothing has to be done for that. But a version that no migration leads
from is found out then, one dead letter after the other. So a runtime asks its store when it starts, and does not start
while live instances have such a version. It asks only for sagas whose migrations do not begin at version 1, and only
once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from sagaloom.definitions import SagaDefinition, SagaInstanceStatus
from sagaloom.engine.records import Instance
from sagaloom.errors import DefinitionError, MessageRejected, SagasError
from sagaloom.ids import instance_id
from sagaloom.ports.store import InstanceFilter, SagaStore
from sagaloom.runtime.bulk import Trouble
from sagaloom.runtime.receipts import Outcome

__all__ = ["MigrationPage", "migrate_page", "oldest_readable", "refuse_unreadable"]

MIGRATED_AT_ONCE_MAX: Final = 1_000
_AT_ONCE: Final = 64
_COUNTED_MAX: Final = 10_000
_LIVE: Final[tuple[SagaInstanceStatus, ...]] = ("running", "compensating")


class MigrationPage(NamedTuple):
    """What became of some instances of an older version: how many are up to date now, which are not and why, how many
    live ones are left that are older, and where to go on (None at the end)."""

    migrated: int
    troubles: tuple[Trouble, ...]
    left: int
    cursor: str | None


def oldest_readable(definition: SagaDefinition[Any]) -> int:
    """The oldest version whose states `definition` can read."""
    return min(definition.migrations, default=definition.version)


async def refuse_unreadable(store: SagaStore, definition: SagaDefinition[Any]) -> None:
    """Raises `DefinitionError` while live instances have a version that no migration of `definition` leads from."""
    readable = oldest_readable(definition)
    if readable == 1:
        return
    unreadable = InstanceFilter(saga_ids=(definition.id,), statuses=_LIVE, version_below=readable)
    found, _ = await store.instances(unreadable, limit=1)
    if not found:
        return
    count = await store.count_instances(unreadable, limit=_COUNTED_MAX)
    first = found[0]
    missing = ", ".join(f"{old}: ..." for old in range(first.def_version, readable))
    raise DefinitionError(
        f"saga {definition.id!r} is version {definition.version} and reads states from version {readable} on, but "
        f"{count if count < _COUNTED_MAX else f'more than {count}'} live instances are older, such as "
        f"{instance_id(first.saga_id, first.key, first.run)!r} of version {first.def_version}: add "
        f".version({definition.version}, migrate={{{missing}}}), or let them end with the code that knows them, or "
        "terminate them",
        code="SAGA_MIGRATION_MISSING",
        data={"sagaId": definition.id, "version": definition.version, "found": first.def_version, "live": count},
    )


async def migrate_page(
    store: SagaStore,
    definition: SagaDefinition[Any],
    migrate: Callable[[Instance], Awaitable[Outcome]],
    *,
    limit: int,
    cursor: str | None,
) -> MigrationPage:
    """Migrates up to `limit` live instances that are older than `definition`, newest first, each for itself."""
    if not 1 <= limit <= MIGRATED_AT_ONCE_MAX:
        raise MessageRejected(f"limit {limit} is none: between 1 and {MIGRATED_AT_ONCE_MAX} are migrated at once")
    older = InstanceFilter(saga_ids=(definition.id,), statuses=_LIVE, version_below=definition.version)
    page, cursor = await store.instances(older, limit=limit, cursor=cursor)

    async def one(instance: Instance) -> Trouble | None:
        name = instance_id(instance.saga_id, instance.key, instance.run)
        try:
            outcome = await migrate(instance)
        except SagasError as error:
            return Trouble(name, error)
        if outcome.disposition == "applied" or outcome.status in ("completed", "failed", "cancelled"):
            return None
        return Trouble(name, SagasError(outcome.reason or "it was not migrated", code="SAGA_MIGRATION_FAILED"))

    troubles: list[Trouble] = []
    for start in range(0, len(page), _AT_ONCE):
        found = await asyncio.gather(*map(one, page[start : start + _AT_ONCE]))
        troubles += [each for each in found if each is not None]
    left = await store.count_instances(older, limit=_COUNTED_MAX)
    return MigrationPage(len(page) - len(troubles), tuple(troubles), left, cursor)
