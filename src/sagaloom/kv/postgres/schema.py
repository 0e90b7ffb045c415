"""Bringing a schema up to the present version, one numbered step after the other.

Each step is a file `migrations/NNNN_name.sql` and runs in one transaction together with the row that notes it, so one
that is interrupted has not happened. Of several who upgrade at once one does it, and the others wait for it: an
advisory lock of the transaction, which also works behind a pooler.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import cache
from importlib.resources import files
from typing import Final, NamedTuple

from sagaloom.errors import ConfigurationError, StoreCorrupt
from sagaloom.kv.postgres.connection import PostgresDatabase, quoted
from sagaloom.kv.postgres.driver import Connection

__all__ = ["Applied", "Step", "applied", "steps", "store_id_of", "take", "upgrade"]

_UPGRADE_SECONDS: Final = 600.0


class Step(NamedTuple):
    """One step up."""

    version: int
    name: str
    sql: str


class Applied(NamedTuple):
    """A step that was taken."""

    version: int
    name: str
    at: datetime


@cache
def steps() -> tuple[Step, ...]:
    """All steps, in their order."""
    found: list[Step] = []
    for file in files("sagaloom.kv.postgres.migrations").iterdir():
        number, _, rest = file.name.partition("_")
        if file.name.endswith(".sql") and number.isdigit():
            found.append(Step(int(number), rest.removesuffix(".sql"), file.read_text(encoding="utf-8")))
    return tuple(sorted(found))


async def applied(database: PostgresDatabase) -> list[Applied]:
    """The steps that `database` has taken; none in an empty one."""
    table = f"{quoted(database.schema)}.saga_runtime_schema"
    exists = await database.fetch("SELECT to_regclass($1) IS NOT NULL AS is_there", table)
    if not exists[0]["is_there"]:
        return []
    rows = await database.fetch(f"SELECT version, name, applied_at FROM {table} ORDER BY version")
    return [Applied(row["version"], row["name"], row["applied_at"]) for row in rows]


async def upgrade(database: PostgresDatabase, *, to: int | None = None) -> list[Step]:
    """Takes the steps that are missing, up to version `to`, and returns them."""
    newest = steps()[-1].version if to is None else to
    done = [each.version for each in await applied(database)]
    refuse_newer(database, done)
    missing = [step for step in steps() if step.version not in done and step.version <= newest]
    return [step for step in missing if await take(database, step)]


async def take(database: PostgresDatabase, step: Step) -> bool:
    """Takes one step, unless somebody else has taken it meanwhile."""
    return await database.run(_taking(database, step))


def refuse_newer(database: PostgresDatabase, done: list[int]) -> None:
    known = steps()[-1].version
    if done and done[-1] > known:
        raise ConfigurationError(
            f"{database.name} has schema version {done[-1]}, this version of sagaloom knows {known}: upgrade sagaloom, "
            "or choose another schema"
        )


async def store_id_of(database: PostgresDatabase) -> str:
    """The id of the store in `database`, whose schema must be at the present version."""
    meta = f"{quoted(database.schema)}.saga_runtime_meta"
    rows = await database.fetch(
        f"SELECT value, current_setting('transaction_isolation') AS isolation FROM {meta} WHERE name = 'store_id'"
    )
    if not rows:
        raise StoreCorrupt(f"{database.name}: {meta} has no store_id")
    if rows[0]["isolation"] != "read committed":
        # A commit reads behind its locks what others have written while it waited for them.
        raise ConfigurationError(
            f"{database.where} begins its transactions as {rows[0]['isolation']!r}: "
            "ALTER ROLE ... SET default_transaction_isolation = 'read committed' for the user that sagas connect as"
        )
    return str(rows[0]["value"])


def _taking(database: PostgresDatabase, step: Step) -> Callable[[Connection], Awaitable[bool]]:
    schema = quoted(database.schema)
    lock = int.from_bytes(hashlib.blake2b(f"sagaloom {database.schema}".encode(), digest_size=7).digest(), "big")

    async def taken(connection: Connection) -> bool:
        async with connection.transaction():
            await connection.execute(f"SELECT pg_advisory_xact_lock({lock})", timeout=_UPGRADE_SECONDS)
            if not await connection.fetchval("SELECT to_regnamespace($1) IS NOT NULL", schema):
                await connection.execute(f"CREATE SCHEMA {schema}")
            await connection.execute(
                f"CREATE TABLE IF NOT EXISTS {schema}.saga_runtime_schema ("
                " version int PRIMARY KEY, name text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
            )
            is_taken = await connection.fetchval(
                f"SELECT EXISTS (SELECT FROM {schema}.saga_runtime_schema WHERE version = $1)",
                step.version,
            )
            if is_taken:
                return False
            await connection.execute(database.sql(step.sql), timeout=_UPGRADE_SECONDS)
            if step.version == 1:
                await connection.execute(
                    f"INSERT INTO {schema}.saga_runtime_meta VALUES ('store_id', $1)",
                    uuid.uuid4().hex,
                )
            await connection.execute(
                f"INSERT INTO {schema}.saga_runtime_schema (version, name) VALUES ($1, $2)",
                step.version,
                step.name,
            )
        return True

    return taken
