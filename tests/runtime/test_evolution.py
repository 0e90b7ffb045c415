"""Instances of an older version: refused at the start when nothing reads them, and migrated ahead of time."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sagaloom import SagaDefinition, define_saga
from sagaloom.errors import DefinitionError, MessageRejected, SagaNotFound
from tests.runtime.conftest import Bench, Life

pytestmark = pytest.mark.anyio


def _version(number: int, migrate: Any = None, *, tier: Any = "t1") -> SagaDefinition[Any]:
    def note(saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state = {**saga.state, "written by": number}
        return []

    stage = define_saga("s").durability(tier).state({"v": number}).on("Begin", note).on("Add", note, starts=False)
    return (stage if number == 1 else stage.version(number, migrate=migrate)).build()


def _up(state: Any) -> Any:
    return {**state, "v": state["v"] + 1}


async def _old(bench: Bench, *keys: str, **more: Any) -> None:
    life = await bench.live(_version(1, **more))
    for key in keys:
        await life.publish("Begin", key=key)
    await bench.end(life)


async def _state(life: Life, key: str) -> Any:
    return json.loads((await life.instance("s", key)).state)


# --- the start -------------------------------------------------------------------------------------------------------


async def test_a_version_that_cannot_read_what_lives_is_refused_at_the_start(bench: Bench) -> None:
    await _old(bench, "a", "b")

    with pytest.raises(DefinitionError) as refused:
        await bench.live(_version(3, {2: _up}))

    assert refused.value.code == "SAGA_MIGRATION_MISSING"
    assert refused.value.message == (
        "saga 's' is version 3 and reads states from version 2 on, but 2 live instances are older, such as 's:b' of "
        "version 1: add .version(3, migrate={1: ...}), or let them end with the code that knows them, or terminate them"
    )


async def test_a_refused_start_changes_nothing(bench: Bench) -> None:
    await _old(bench, "a")
    with pytest.raises(DefinitionError):
        await bench.live(_version(2))

    life = await bench.live(_version(1))
    outcome = await life.publish("Add", key="a")

    assert (outcome.disposition, outcome.revision) == ("applied", 2)
    assert [each.version for each in await life.runtime.store.definitions()] == [1]


async def test_old_instances_that_are_over_keep_nobody_from_starting(bench: Bench) -> None:
    life = await bench.live(_version(1))
    await life.publish("Begin", key="a")
    await life.runtime.terminate("s", "a")
    await bench.end(life)

    life = await bench.live(_version(2))

    assert (await life.publish("Begin", key="b")).disposition == "applied"


async def test_a_version_with_every_step_starts_and_migrates_with_the_next_message(bench: Bench) -> None:
    await _old(bench, "a")

    life = await bench.live(_version(3, {1: _up, 2: _up}))
    await life.publish("Add", key="a")

    assert await _state(life, "a") == {"v": 3, "written by": 3}


async def test_a_version_with_a_gap_is_not_registered_while_the_runtime_runs(bench: Bench) -> None:
    life = await bench.live(define_saga("other").state({}).on("Other", lambda *_: []).build())

    with pytest.raises(DefinitionError, match="register it before"):
        life.runtime.register(_version(3, {2: _up}))


# --- ahead of time ---------------------------------------------------------------------------------------------------


async def test_an_instance_is_migrated_ahead_of_its_next_message(bench: Bench) -> None:
    await _old(bench, "a", tier="t2")
    life = await bench.live(_version(2, {1: _up}, tier="t2"))

    outcome = await life.runtime.migrate("s", "a", reason="release 7")
    again = await life.runtime.migrate("s", "a")

    entry = (await life.history("s", "a"))[1]
    assert (outcome.disposition, outcome.revision) == ("applied", 2)
    assert (entry.type, entry.reason, entry.def_version) == ("saga:migrate", "release 7", 2)
    assert (json.loads(entry.before or b"")["v"], json.loads(entry.after or b"")["v"]) == (1, 2)
    assert (again.disposition, again.reason) == ("ignored", "run 1 has version 2 already")
    assert await _state(life, "a") == {"v": 2, "written by": 1}


async def _waits() -> Any:
    return {}


def _raises(state: Any) -> Any:
    raise KeyError("currency")


@pytest.mark.parametrize(
    ("migration", "why"),
    [
        (_raises, "the migration of 's:a' from version 1 to 2 raised KeyError: 'currency'"),
        (lambda state: [1], "returned what is no state of version 2"),
        (lambda state: None, "returned what is no state of version 2"),
        (lambda state: {"v": {1, object()}}, "cannot be written as JSON"),
        (lambda state: _waits(), "returned coroutine, which has to be awaited"),
    ],
    ids=["raises", "a list", "nothing", "no JSON", "a coroutine"],
)
async def test_a_migration_that_fails_says_why_and_changes_nothing(bench: Bench, migration: Any, why: str) -> None:
    await _old(bench, "a")
    life = await bench.live(_version(2, {1: migration}))

    outcome = await life.runtime.migrate("s", "a")
    message = await life.publish("Add", key="a")

    instance = await life.instance("s", "a")
    assert outcome.disposition == "ignored"
    assert why in (outcome.reason or "")
    assert message.disposition == "dead_lettered"
    assert (await life.runtime.dead_letters())[0].code == "SAGA_MIGRATION_FAILED"
    assert (instance.revision, instance.def_version, json.loads(instance.state)) == (1, 1, {"v": 1, "written by": 1})


async def test_all_instances_of_a_saga_are_migrated_page_by_page(bench: Bench) -> None:
    await _old(bench, *(f"k-{n}" for n in range(7)))

    def picky(state: Any) -> Any:
        return _up(state) if state.get("written by") else {}

    life = await bench.live(_version(2, {1: picky}))
    await life.publish("Begin", key="new")

    first = await life.runtime.migrate_saga("s", limit=4)
    second = await life.runtime.migrate_saga("s", limit=4, cursor=first.cursor)

    assert (first.migrated, first.left, first.troubles) == (4, 3, ())
    assert (second.migrated, second.left, second.cursor) == (3, 0, None)
    assert all([(await life.instance("s", f"k-{n}")).def_version == 2 for n in range(7)])


async def test_what_cannot_be_migrated_keeps_no_other_from_it(bench: Bench) -> None:
    await _old(bench, "a", "b")

    calls: list[Any] = []

    def second_fails(state: Any) -> Any:
        calls.append(state)
        if len(calls) == 1:
            raise ValueError("not this one")
        return _up(state)

    life = await bench.live(_version(2, {1: second_fails}))
    page = await life.runtime.migrate_saga("s")

    assert (page.migrated, page.left, len(page.troubles)) == (1, 1, 1)
    assert (page.troubles[0].error.code, "not this one" in page.troubles[0].error.message) == (
        "SAGA_MIGRATION_FAILED",
        True,
    )


async def test_a_migration_of_many_that_cannot_be_is_refused(bench: Bench) -> None:
    life = await bench.live(_version(1))

    with pytest.raises(SagaNotFound, match="only its definition can migrate"):
        await life.runtime.migrate_saga("nobody")
    with pytest.raises(MessageRejected, match="between 1 and 1000"):
        await life.runtime.migrate_saga("s", limit=0)
