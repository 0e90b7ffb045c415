"""The commands about the database of the sql store: which version its tables have, and bringing them up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

import typer

from sagaloom.cli.options import AsJson

if TYPE_CHECKING:
    from sagaloom.kv.postgres import PostgresDatabase

__all__ = ["db_app"]

_R = TypeVar("_R")

db_app = typer.Typer(help="The tables of the sql store, at DATABASE_URL.", no_args_is_help=True)


@db_app.command("upgrade")
def db_upgrade(as_json: AsJson = False) -> None:
    """Bring the tables up to the version of this program. Every start does so too; this is for whoever may create
    tables when the servers may not."""
    from sagaloom.cli.output import print_json
    from sagaloom.kv.postgres.schema import steps, upgrade

    database = _database()
    taken = asyncio.run(_closing(database, upgrade(database)))
    newest = steps()[-1].version
    if as_json:
        print_json({"version": newest, "taken": [step.version for step in taken]})
        return
    for step in taken:
        print(f"{step.version:04} {step.name}: done")
    print(f"{database.name.removeprefix('kv:')} is at version {newest}")


@db_app.command("status")
def db_status(as_json: AsJson = False) -> None:
    """Say which version the tables have. Exits with 1 when they are not at the version of this program."""
    from sagaloom.cli.output import print_json, print_table
    from sagaloom.kv.postgres.schema import applied, steps

    database = _database()
    done = {each.version: each for each in asyncio.run(_closing(database, applied(database)))}
    known = {step.version: step.name for step in steps()}
    rows = [
        (version, known.get(version) or done[version].name, done[version].at.isoformat() if version in done else None)
        for version in sorted({*done, *known})
    ]
    if as_json:
        print_json([{"version": version, "name": name, "appliedAt": at} for version, name, at in rows])
    else:
        print_table(("version", "name", "applied"), [(n, name, at or "not yet") for n, name, at in rows], empty="")
    if set(done) != set(known):
        hint = "upgrade sagaloom" if set(done) - set(known) else "run sagaloom db upgrade"
        typer.echo(f"{database.name.removeprefix('kv:')} is not at version {max(known)}: {hint}", err=True)
        raise typer.Exit(1)


def _database() -> PostgresDatabase:
    from sagaloom.composition import sql_database
    from sagaloom.errors import ConfigurationError
    from sagaloom.settings import load_settings

    address = load_settings().database_url
    if address is None:
        raise ConfigurationError("no database: set DATABASE_URL=postgresql://user:password@host:5432/database")
    return sql_database(url=address.get_secret_value())


async def _closing(database: PostgresDatabase, work: Awaitable[_R]) -> _R:
    try:
        return await work
    finally:
        await database.close()
