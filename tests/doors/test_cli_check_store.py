"""`sagaloom check` before a release: what lives in a store of either kind, and could not go on under the new code."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sagaloom import SagaDefinition, SagaMessage, define_saga, saga_complete
from sagaloom.cli.app import app
from sagaloom.errors import SagasError
from sagaloom.runtime import create_durable_saga_runtime
from tests.schemas import Schema

ORDERS = """
from dataclasses import dataclass

from sagaloom import define_saga, saga_complete


@dataclass(frozen=True)
class Order:
    cents: int
    {field}


def done(saga, event, context):
    return [saga_complete()]


def to_cents(state):
    return {{"cents": state["amount"] * 100}}


orders = (
    define_saga("orders").version({version}, migrate={migrate})
    .state(Order(0, "EUR")).correlate(lambda message: message.payload["id"])
    .on("Placed", done).on("Done", done, starts=False).build()
)
"""


@pytest.fixture(autouse=True)
def _forgotten() -> Generator[None]:
    """The interpreter forgets the module again."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture(params=["kv", pytest.param("sql", marks=pytest.mark.server("postgres"))])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the store is, as `--store` takes it: a file, or an address."""
    monkeypatch.chdir(tmp_path)
    if request.param == "kv":
        return str(tmp_path / "sagas.db")
    schema: Schema = request.getfixturevalue("schema")
    return schema.url


def an_order(version: int, initial: Mapping[str, Any]) -> SagaDefinition[Any]:
    """The saga in a version that is deployed."""
    migrations = {old: lambda state: state for old in range(1, version)}
    return (
        define_saga("orders")
        .version(version, migrate=migrations)
        .state(dict(initial))
        .correlate(lambda message: message.payload["id"])
        .on("Placed", lambda saga, event, context: [])
        .on("Done", lambda saga, event, context: [saga_complete()], starts=False)
        .build()
    )


async def lived(place: str, saga: SagaDefinition[Any], *ids: str, done: tuple[str, ...] = ()) -> None:
    """A process with this code has taken messages in."""
    where: dict[str, Any] = {"url": place} if "://" in place else {"path": place}
    async with create_durable_saga_runtime(definitions=[saga], **where) as durable:
        for name in ids:
            await durable.runtime.publish(SagaMessage("Placed", {"id": name}), wait=5)
        for name in done:
            await durable.runtime.publish(SagaMessage("Done", {"id": name}), wait=5)


def new_code(version: int, migrate: str, *, field: str = "currency: str = 'EUR'") -> str:
    """A module with the code that is to be deployed."""
    Path("shop.py").write_text(ORDERS.format(version=version, migrate=migrate, field=field))
    return "shop.py"


async def checked(*args: str) -> tuple[int, str, str]:
    """The exit status, and what was printed, or why it failed."""
    result = await asyncio.to_thread(CliRunner().invoke, app, ["check", *args])
    if isinstance(result.exception, SagasError):
        return 1, result.stdout, result.exception.message
    return result.exit_code, result.stdout, result.stderr


def digest(file: str) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def names_in(folder: Path) -> list[str]:
    return [each.name for each in folder.iterdir()]


async def found(*args: str) -> list[dict[str, Any]]:
    _, out, _ = await checked(*args, "--json")
    answer: list[dict[str, Any]] = json.loads(out)["findings"]
    return answer


async def test_live_instances_of_a_version_that_no_migration_leads_from_are_an_error(place: str) -> None:
    await lived(place, an_order(1, {"amount": 1}), "o-1", "o-2", "o-3", done=("o-3",))
    module = new_code(3, "{2: to_cents}")

    status, out, said = await checked(module, "--store", place)

    assert status == 1
    assert "shop.py:24: error missing-migration" in out
    assert "orders: 2 live instances (such as 'orders:o-" in out
    assert "of version 1; this code, of version 3, reads states from version 2 on" in out
    assert "remedy: add .version(3, migrate={1: ...}), or let them end" in out
    assert said.endswith(": live instances: 2\n")


async def test_each_version_is_named_with_its_number(place: str) -> None:
    await lived(place, an_order(1, {"amount": 1}), "o-1", "o-2")
    await lived(place, an_order(2, {"amount": 1}), "o-3")

    missing = await found(new_code(4, "{3: to_cents}"), "--store", place)

    assert [one["code"] for one in missing] == ["missing-migration"] * 2
    first, second = missing
    assert first["message"].startswith("2 live instances")
    assert "of version 1;" in first["message"]
    assert "migrate={1: ..., 2: ...}" in first["remedy"]
    assert second["message"].startswith("1 live instance ")
    assert "of version 2;" in second["message"]
    assert "migrate={2: ...}" in second["remedy"]


async def test_a_migration_that_works_for_what_lives_is_no_finding(place: str) -> None:
    await lived(place, an_order(1, {"amount": 1}), "o-1")

    assert await found(new_code(2, "{1: to_cents}"), "--store", place) == []


async def test_a_migration_that_fails_for_what_lives_is_an_error(place: str) -> None:
    await lived(place, an_order(1, {"price": 1}), "o-1")

    (failing,) = await found(new_code(2, "{1: to_cents}"), "--store", place)

    assert (failing["level"], failing["code"]) == ("error", "failing-migration")
    assert "this code cannot migrate 1 of the 1 live states that were looked at" in failing["message"]
    assert "the migration of 'orders:o-1' from version 1 to 2 raised KeyError: 'amount'" in failing["message"]


async def test_a_state_that_the_new_code_cannot_read_is_an_error(place: str) -> None:
    await lived(place, an_order(1, {"cents": 1}), "o-1")

    (unread,) = await found(new_code(1, "{}", field="currency: str"), "--store", place)

    assert (unread["level"], unread["code"]) == ("error", "unreadable-state")
    assert "currency" in unread["message"]
    assert "give a new field a default, or make it .version(2, migrate={1: ...})" in unread["remedy"]


async def test_instances_of_a_newer_version_and_of_a_saga_that_is_gone_are_warnings(place: str) -> None:
    gone = define_saga("refunds").state({}).on("Asked", lambda saga, event, context: []).build()
    await lived(place, an_order(2, {"cents": 1}), "o-1")
    where: dict[str, Any] = {"url": place} if "://" in place else {"path": place}
    async with create_durable_saga_runtime(definitions=[gone], **where) as durable:
        await durable.runtime.publish(SagaMessage("Asked", {}), wait=5)

    older, absent = await found(new_code(1, "{}"), "--store", place)

    assert (older["level"], older["code"], older["saga"]) == ("warning", "older-code", "orders")
    assert (absent["level"], absent["code"], absent["saga"]) == ("warning", "saga-not-loaded", "refunds")
    assert absent["message"].startswith("1 live instance of this saga")


async def test_a_saga_that_does_not_build_is_not_taken_to_be_gone(place: str) -> None:
    await lived(place, an_order(1, {"cents": 1}), "o-1")

    (only,) = await found(new_code(2, "{1: dict}"), "--store", place)

    assert only["code"] == "does-not-build"


async def test_nothing_is_written(place: str) -> None:
    await lived(place, an_order(1, {"amount": 1}), "o-1")
    module = new_code(3, "{2: to_cents}")
    if "://" in place:
        status, out, _ = await checked(module, "--store", f"{place}&default_transaction_read_only=on")
        assert (status, "missing-migration" in out) == (1, True)
        return
    before = digest(place)

    await checked(module, "--store", place)

    assert digest(place) == before


async def test_the_store_of_the_environment_is_looked_into_unless_told_otherwise(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lived(place, an_order(1, {"amount": 1}), "o-1")
    module = new_code(3, "{2: to_cents}")
    monkeypatch.setenv("NETSCRIPT_SAGA_STORE", "sql" if "://" in place else "kv")
    monkeypatch.setenv("DATABASE_URL" if "://" in place else "NETSCRIPT_SAGA_KV_PATH", place)

    by_environment, without = await checked(module), await checked(module, "--no-store")

    assert (by_environment[0], "missing-migration" in by_environment[1]) == (1, True)
    assert (without[0], "missing-migration" in without[1]) == (0, False)


async def test_a_store_that_is_not_there_is_a_remark_or_when_it_was_asked_for_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    module = new_code(1, "{}")
    monkeypatch.setenv("NETSCRIPT_SAGA_STORE", "kv")

    remarked, failed = await checked(module), await checked(module, "--store", "nowhere.db")

    assert (remarked[0], remarked[2].startswith("there is no store at .sagaloom/sagas.db yet")) == (0, True)
    assert (failed[0], failed[2].startswith("there is no store at nowhere.db yet")) == (1, True)
    assert names_in(tmp_path) == ["shop.py"]


async def test_a_database_that_does_not_answer_fails_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETSCRIPT_SAGA_STORE", "sql")
    monkeypatch.setenv("DATABASE_URL", "postgresql://postgres:secret@127.0.0.1:9/sagas")

    status, _, said = await checked(new_code(1, "{}"))

    assert status == 1
    assert "127.0.0.1:9/sagas" in said
    assert said.endswith("; or --no-store")
    assert "secret" not in said


async def test_a_store_and_none_contradict_each_other() -> None:
    assert "contradict each other" in (await checked("shop.py", "--store", "kv", "--no-store"))[2]
