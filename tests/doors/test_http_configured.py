"""What a saga's configuration says, as the API and the command line show it and filter by it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from typer.testing import CliRunner

from sagaloom import define_saga
from sagaloom.cli.app import app
from sagaloom.config import configured, define_saga_config, define_saga_group
from sagaloom.service import create_app
from tests.doors.http_door import Door, open_door, order_saga, serve
from tests.doors.sse import subscribed
from tests.patience import PATIENCE_SECONDS


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """Orders in a group with a topic, notes without any configuration, and a saga that is disabled."""
    note = define_saga("note").state({}).on("NoteTaken", lambda saga, event, context: []).build()
    old = define_saga("old").state({}).on("OldThing", lambda saga, event, context: []).build()
    entry = define_saga_config("order", "shop/orders.py").name("Order saga").description("Charge, then ship.")
    group = define_saga_group("orders", entry.tags("shop", "eu").metadata({"owner": "shop"}).build(), completed_days=7)
    resting = define_saga_config("old", "shop/old.py").tags("shop").disabled().build()
    async with open_door(configured(order_saga(), group.sagas[0]), note, configured(old, resting)) as opened:
        await opened.publish(correlationId="o-1", wait="5s")
        await opened.publish("NoteTaken", {}, correlationId="n-1", wait="5s")
        yield opened


async def test_a_saga_is_shown_with_what_its_configuration_says(door: Door) -> None:
    shown = (await door.get("/sagas/order")).json()

    assert {name: shown[name] for name in ("name", "description", "topic", "tags", "enabled", "entrypoint")} == {
        "name": "Order saga",
        "description": "Charge, then ship.",
        "topic": "orders",
        "tags": ["shop", "eu"],
        "enabled": True,
        "entrypoint": "shop/orders.py",
    }
    assert (shown["metadata"], shown["retention"]) == ({"owner": "shop"}, {"completedDays": 7, "activeDays": None})


async def test_an_instance_that_was_removed_is_said_to_have_been_there(door: Door) -> None:
    await door.publish("OrderPaid", {}, correlationId="o-1", wait="5s")
    door.clock.advance("8d")
    async with asyncio.timeout(PATIENCE_SECONDS):
        while (answer := await door.get("/instances/order/o-1")).status_code == 200:  # noqa: ASYNC110
            await asyncio.sleep(0.001)

    assert (answer.status_code, answer.json()["code"]) == (404, "SAGA_INSTANCE_NOT_FOUND")
    assert answer.json()["message"] == (
        "run 1 of order:o-1 has ended (completed), and was removed when its saga's retention was over"
    )
    assert (await door.get("/instances/order/o-1/history")).status_code == 404


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("?topic=orders", ["order"]),
        ("?topic=default", ["note", "old"]),
        ("?enabled=false", ["old"]),
        ("?tags=shop", ["old", "order"]),
        ("?tags=shop&tags=eu", ["order"]),
    ],
)
async def test_sagas_are_filtered_by_their_configuration(door: Door, query: str, ids: list[str]) -> None:
    assert [one["id"] for one in (await door.get(f"/sagas{query}")).json()["sagas"]] == ids


async def test_instances_are_filtered_by_the_topic_of_their_saga(door: Door) -> None:
    found = {
        topic: [one["correlationId"] for one in (await door.get(f"/instances?topic={topic}")).json()["instances"]]
        for topic in ("orders", "default")
    }

    assert found == {"orders": ["o-1"], "default": ["n-1"]}


async def test_a_stream_is_filtered_by_topic(door: Door) -> None:
    await door.publish("NoteTaken", {}, correlationId="n-2", wait="5s")
    await door.publish(correlationId="o-2", wait="5s")

    async with (
        serve(create_app(door.runtime)) as port,
        subscribed(port, after=0, topic="orders", type="saga:started") as stream,
    ):
        told = await stream.take(2)

    assert [each.data["instanceId"] for each in told] == ["order:o-1", "order:o-2"]


async def test_publishing_to_a_disabled_saga_is_unavailable(door: Door) -> None:
    answer = await door.publish("OldThing", {}, correlationId="x")

    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (503, "SAGA_DISABLED", True)


async def test_the_command_line_shows_and_filters_by_the_configuration(door: Door) -> None:
    async with serve(create_app(door.runtime)) as port:

        async def ids(*args: str) -> Any:
            url = {"SAGALOOM_URL": f"http://127.0.0.1:{port}"}
            result = await asyncio.to_thread(CliRunner().invoke, app, [*args, "--json"], env=url)
            answer = json.loads(result.stdout)
            return [one["id"] for one in answer["sagas"]] if "sagas" in answer else answer["instances"]

        assert await ids("sagas", "list", "--topic", "orders") == ["order"]
        assert await ids("sagas", "list", "--tag", "shop", "--tag", "eu") == ["order"]
        assert await ids("sagas", "list", "--disabled") == ["old"]
        assert [one["correlationId"] for one in await ids("instances", "list", "--topic", "orders")] == ["o-1"]
