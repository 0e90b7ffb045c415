"""Sagas that an operator pauses or disables: all their instances wait, those to come too; and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest

from sagaloom import SagaMessage, define_saga, schedule
from sagaloom.errors import BackendUnavailable, MessageRejected, SagaNotFound, ScheduleNotFound
from sagaloom.runtime.receipts import PublishRejected
from tests.runtime.conftest import Bench, Life

pytestmark = pytest.mark.anyio


def _note(saga: Any, event: Any, context: Any) -> list[Any]:
    saga.state["seen"] = [*saga.state.get("seen", []), event.type]
    return [schedule(SagaMessage("Late", {}), "1m")] if event.type == "Begin" else []


SAGA = (
    define_saga("s").state({}).on("Begin", _note).on("Add", _note, starts=False).on("Late", _note, starts=False).build()
)
OTHER = define_saga("other").state({}).on("Begin", _note).on("Other", _note).build()
TICKING = define_saga("ticking").state({}).on("ticking:tick", _note).schedule("* * * * *").build()


async def _seen(life: Life, key: str, saga_id: str = "s") -> Any:
    instance = await life.runtime.get_instance(saga_id, key)
    return None if instance is None or instance.run == 0 else instance.state


async def test_a_paused_saga_accepts_messages_and_applies_none_of_them(bench: Bench) -> None:
    life = await bench.live(SAGA)
    await life.publish("Begin", key="old")

    change = await life.runtime.pause_saga("s", reason="audit")
    late = await life.publish("Add", key="old")
    new = await life.publish("Begin", key="new")
    await bench.advance("1m")

    assert (change.has_changed, change.standing.is_paused, change.standing.reason) == (True, True, "audit")
    assert (late.disposition, new.disposition) == ("pending", "pending")
    assert await _seen(life, "old") == b'{"seen":["Begin"]}'
    assert await _seen(life, "new") is None


async def test_what_has_waited_for_a_paused_saga_comes_in_its_order_when_it_goes_on(bench: Bench) -> None:
    life = await bench.live(SAGA)
    await life.publish("Begin", key="old")
    await life.runtime.pause_saga("s")
    for message in ("Add", "Begin"):
        await life.publish(message, key="old")
    await life.publish("Begin", key="new")
    await life.publish("Add", key="new")
    await bench.advance("1m")

    await life.runtime.resume_saga("s")
    await life.runtime.settled()

    assert await _seen(life, "old") == b'{"seen":["Begin","Add","Begin","Late"]}'
    assert await _seen(life, "new") == b'{"seen":["Begin","Add"]}'


async def test_a_pause_outlives_the_process(bench: Bench) -> None:
    life = await bench.live(SAGA)
    await life.runtime.pause_saga("s")
    await life.publish("Begin", key="k")
    await bench.die(life)

    life = await bench.live(SAGA)
    await life.runtime.settled()
    before = await _seen(life, "k")
    await life.runtime.resume_saga("s")
    await life.runtime.settled()

    assert before is None
    assert await _seen(life, "k") == b'{"seen":["Begin"]}'


async def test_other_sagas_go_on_meanwhile(bench: Bench) -> None:
    life = await bench.live(SAGA, OTHER)
    await life.runtime.pause_saga("s")

    outcome = await life.publish("Other", key="k", wait=30)

    assert outcome.disposition == "applied"


async def test_instances_of_a_paused_saga_can_be_cancelled(bench: Bench) -> None:
    life = await bench.live(SAGA)
    await life.publish("Begin", key="k")
    await life.runtime.pause_saga("s")

    outcome = await life.runtime.cancel("s", "k")

    assert (outcome.disposition, outcome.status) == ("applied", "cancelled")


async def test_a_disabled_saga_refuses_new_messages_as_retryable(bench: Bench) -> None:
    life = await bench.live(SAGA)

    await life.runtime.disable_saga("s", reason="the bank asked us to")
    refused = await life.runtime.publish(SagaMessage("Begin", {}, correlation_key="k"))
    await life.runtime.enable_saga("s")
    accepted = await life.publish("Begin", key="k")

    assert isinstance(refused, PublishRejected)
    assert (refused.code, refused.retryable) == ("SAGA_DISABLED", True)
    assert "disabled (the bank asked us to)" in refused.reason
    assert accepted.disposition == "applied"


async def test_another_saga_gets_the_message_that_a_disabled_one_would_have_got(bench: Bench) -> None:
    life = await bench.live(SAGA, OTHER)
    await life.runtime.disable_saga("s")

    outcome = await life.publish("Begin", key="k")

    assert outcome.saga_id == "other"


async def test_a_paused_saga_misses_its_ticks_and_its_policy_says_which_come_later(bench: Bench) -> None:
    life = await bench.live(TICKING)
    await life.runtime.pause_saga("ticking")
    await bench.advance("10m")
    before = (await life.runtime.list_instances(_all()))[0]

    await life.runtime.resume_saga("ticking")
    await bench.advance("1s")

    assert before == []
    # The newest of those that were missed, and the one of this very minute.
    assert len((await life.runtime.list_instances(_all()))[0]) == 2
    await life.runtime.disable_saga("ticking")
    with pytest.raises(ScheduleNotFound, match="is disabled"):
        await life.runtime.trigger_schedule("ticking")


@pytest.mark.parametrize(
    ("verb", "reason"),
    [("resume", "is not paused"), ("enable", "is not disabled")],
)
async def test_a_command_that_changes_nothing_says_so(bench: Bench, verb: str, reason: str) -> None:
    life = await bench.live(SAGA)

    change = await getattr(life.runtime, f"{verb}_saga")("s")

    assert (change.has_changed, change.reason) == (False, f"saga 's' {reason}")


async def test_pausing_and_disabling_twice_changes_nothing_the_second_time(bench: Bench) -> None:
    life = await bench.live(SAGA)

    for command, reason in ((life.runtime.pause_saga, "paused"), (life.runtime.disable_saga, "disabled")):
        await command("s")
        again = await command("s")
        assert again.reason == f"saga 's' is {reason} already"


async def test_a_saga_that_nobody_knows_is_not_found(bench: Bench) -> None:
    life = await bench.live(SAGA)

    with pytest.raises(SagaNotFound, match=r"no saga 'nobody' is known to this store: loaded here are s"):
        await life.runtime.pause_saga("nobody")
    with pytest.raises(MessageRejected, match="must be a text"):
        await life.runtime.pause_saga("s", reason="x" * 3_000)


async def test_a_saga_is_paused_only_while_the_runtime_runs(bench: Bench) -> None:
    life = await bench.live(SAGA)
    await life.runtime.stop()

    with pytest.raises(BackendUnavailable):
        await life.runtime.pause_saga("s")


async def test_another_process_heeds_a_pause_within_seconds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sagaloom.runtime.standings._LOOK_SECONDS", 0.02)
    one, other = await bench.live(SAGA), await bench.live(SAGA)

    await one.runtime.disable_saga("s")
    await other.runtime._wait_until(lambda: other.runtime.definitions.get("s").about.stands_still, 5)
    refused = await other.runtime.publish(SagaMessage("Begin", {}, correlation_key="k"))

    assert isinstance(refused, PublishRejected)
    assert refused.code == "SAGA_DISABLED"


def _all() -> Any:
    from sagaloom.ports.store import InstanceFilter

    return InstanceFilter()
