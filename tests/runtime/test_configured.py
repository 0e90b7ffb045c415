"""Sagas that are run as their configuration says: disabled ones wait, and a timeout ends a run that takes too long."""

from __future__ import annotations

from typing import Any

import pytest

from sagaloom import SagaMessage, define_saga, saga_complete, send
from sagaloom.config import configured, define_saga_config, define_saga_group
from sagaloom.errors import ConfigurationError, ScheduleNotFound
from sagaloom.presets import start_saga_handlers, start_sagas
from sagaloom.runtime.receipts import PublishRejected
from sagaloom.testing import MemoryStore, check_invariants
from tests.runtime.conftest import Bench

pytestmark = pytest.mark.anyio


def _begin(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state = {"status": "begun"}
    return [send("service:payments", {"charge": 1})]


def _end(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_complete()]


SAGA = define_saga("s").state({}).on("Begin", _begin).on("End", _end, starts=False).build()
TICKING = define_saga("ticking").state({}).on("ticking:tick", _end).schedule("0 * * * *").build()
ENTRY: Any = define_saga_config("s", "somewhere")


# -- disabled ---------------------------------------------------------------------------------------------------------


async def test_a_message_for_a_disabled_saga_alone_is_refused_as_retryable(bench: Bench) -> None:
    life = await bench.live(configured(SAGA, ENTRY.disabled().build()))

    refused = await life.runtime.publish(SagaMessage("Begin", {}, correlation_key="k"))

    assert isinstance(refused, PublishRejected)
    assert (refused.code, refused.retryable) == ("SAGA_DISABLED", True)
    assert "handled by 's' alone, which is disabled" in refused.reason
    assert await life.runtime.get_instance("s", "k") is None


async def test_another_saga_that_handles_the_type_gets_it_all_the_same(bench: Bench) -> None:
    other = define_saga("other").state({}).on("Begin", _begin).build()
    life = await bench.live(configured(SAGA, ENTRY.disabled().build()), other)

    outcome = await life.publish("Begin", key="k", wait=30)

    assert outcome.saga_id == "other"


async def test_what_was_accepted_waits_until_the_saga_is_enabled_again(bench: Bench) -> None:
    """A sender by id is the one door that a disabled saga has: what it accepts stays in the inbox."""
    sender = define_saga("sender").state({}).on("Go", lambda saga, event, context: [send("saga:s", {})]).build()
    first = await bench.live(sender, configured(SAGA, ENTRY.disabled().build()))
    await first.publish("Go", key="k", wait=30)
    await bench.advance("1d")
    waiting = await first.runtime.get_instance("s", "k")
    await bench.end(first)

    second = await bench.live(sender, SAGA)
    await bench.advance("10s")

    assert waiting is None or waiting.status == "pending"
    assert (await second.instance("s", "k")).status == "running"
    assert await second.runtime.dead_letters() == []
    assert await check_invariants(second.runtime.store) == []


async def test_the_schedule_of_a_disabled_saga_rests(bench: Bench) -> None:
    entry = define_saga_config("ticking", "somewhere").disabled().build()
    life = await bench.live(configured(TICKING, entry))

    await bench.advance("3h")

    assert (await life.runtime.store.count_instances(_everything(), limit=10)) == 0
    with pytest.raises(ScheduleNotFound, match="is disabled"):
        await life.runtime.trigger_schedule("ticking")


# -- timeout ----------------------------------------------------------------------------------------------------------


async def test_a_run_that_takes_longer_than_its_configuration_allows_is_cancelled(bench: Bench) -> None:
    life = await bench.live(configured(SAGA, ENTRY.timeout("30m").build()))
    await life.publish("Begin", key="slow", wait=30)
    await life.publish("Begin", key="quick", wait=30)
    await life.publish("End", key="quick", wait=30)

    await bench.advance("31m")

    slow, quick = await life.instance("s", "slow"), await life.instance("s", "quick")
    assert (slow.status, slow.timers) == ("cancelled", ())
    assert slow.reason == "not finished within 0:30:00, the timeout of its configuration"
    assert quick.status == "completed"
    assert await life.runtime.timers() == []
    assert await check_invariants(life.runtime.store) == []


async def test_a_timeout_outlives_the_process(bench: Bench) -> None:
    saga = configured(SAGA, ENTRY.timeout("30m").build())
    first = await bench.live(saga)
    await first.publish("Begin", key="k", wait=30)
    await bench.die(first)

    second = await bench.live(saga)
    await bench.advance("31m")

    assert (await second.instance("s", "k")).status == "cancelled"


# -- presets ----------------------------------------------------------------------------------------------------------


async def test_handlers_are_started_as_their_configuration_says() -> None:
    group = define_saga_group("orders", ENTRY.retry(0).build())

    async with start_saga_handlers([SAGA], config=[group], store=MemoryStore()) as sagas:
        saga = sagas.runtime.definitions.get("s")

    assert saga is not None
    assert (saga.about.topic, saga.retry.maximum_attempts) == ("orders", 1)


async def test_a_configuration_of_a_saga_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="config= is about the sagas other"):
        start_sagas([SAGA], config=[define_saga_config("other", "x").build()], store=MemoryStore())


def _everything() -> Any:
    from sagaloom.ports.store import InstanceFilter

    return InstanceFilter()
