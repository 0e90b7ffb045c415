"""What operators do over HTTP: cancel, pause, resume, repair many dead letters, look at the numbers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import pytest

from sagaloom.service.metrics import metrics_text
from sagaloom.testing import check_invariants
from tests.doors.http_door import PREFIX, Door, Switch, open_door, order_saga


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    async with open_door() as opened:
        yield opened


async def placed(door: Door, key: str = "o-1") -> None:
    await door.publish(correlationId=key, wait="5s")


# --- Cancel, pause, resume -------------------------------------------------------------------------------------------


async def test_a_cancelled_instance_is_shown_as_it_is_then(door: Door) -> None:
    await placed(door)

    response = await door.post("/instances/order/o-1/cancel", {"reason": "ordered twice"})

    assert response.status_code == 200
    found = response.json()
    assert (found["status"], found["reason"], found["version"]) == ("cancelled", "ordered twice", 2)
    assert (found["endedAt"], "completedAt" in found) == ("2026-01-01T00:00:00.000Z", False)
    assert found.pop("control") == {"disposition": "applied"}
    assert found == (await door.get("/instances/order/o-1")).json()


async def test_the_history_shows_who_cancelled_and_why(door: Door) -> None:
    await placed(door)
    await door.post("/instances/order/o-1/cancel", {"reason": "ordered twice"})

    _, entry = (await door.get("/instances/order/o-1/history")).json()["history"]

    shown = [entry[name] for name in ("messageType", "origin", "newStatus", "reason", "outcome")]
    assert shown == ["saga:cancel", "operator", "cancelled", "ordered twice", "success"]
    assert entry["payload"] == {"reason": "ordered twice"}


@pytest.mark.parametrize("content", [b"", b"{}", b" ", b'{"reason": null}'])
async def test_a_reason_may_be_left_out(door: Door, content: bytes) -> None:
    await placed(door)

    response = await door.client.post(f"{PREFIX}/instances/order/o-1/cancel", content=content)

    assert (response.status_code, response.json()["status"]) == (200, "cancelled")


async def test_cancelling_what_is_over_changes_nothing(door: Door) -> None:
    await placed(door)
    await door.publish("OrderPaid", {}, correlationId="o-1", wait="5s")

    response = await door.post("/instances/order/o-1/cancel")

    assert (response.status_code, response.json()["status"], response.json()["version"]) == (200, "completed", 2)


async def test_messages_to_a_paused_instance_wait_for_its_resume(door: Door) -> None:
    await placed(door)

    paused = await door.post("/instances/order/o-1/pause", {"reason": "bank is down"})
    published = await door.publish("OrderPaid", {}, correlationId="o-1", wait="10ms")
    waiting = (await door.client.get("/health")).json()["backlog"]
    resumed = await door.post("/instances/order/o-1/resume")
    await door.runtime.settled()

    assert (paused.json()["isPaused"], resumed.json()["isPaused"]) == (True, False)
    assert published.json()["outcomes"][0]["disposition"] == "pending"
    assert waiting == 1
    assert (await door.get("/instances/order/o-1")).json()["status"] == "completed"
    assert await check_invariants(door.store) == []


@pytest.mark.parametrize("key", ["a/b", "a/cancel", "cancel", "/", "history", "?run=2", "😀/ü"])
async def test_any_key_is_cancelled_under_its_percent_encoded_path(door: Door, key: str) -> None:
    await door.publish("Noted", {}, correlationId=key, wait="5s")
    await door.publish("Noted", {}, correlationId="a", wait="5s")

    response = await door.post(f"/instances/note/{quote(key, safe='')}/cancel")

    assert (response.status_code, response.json()["correlationId"]) == (200, key)
    assert (await door.get("/instances/note/a")).json()["status"] == "running"


async def test_one_run_of_many_is_cancelled_by_its_number(door: Door) -> None:
    for _ in range(2):
        await door.publish("Noted", {}, wait="5s")
    path = "/instances/note/note:Noted"

    response = await door.post(path + "/cancel", run=1)

    assert (response.json()["run"], response.json()["status"]) == (1, "cancelled")
    assert (await door.get(path)).json()["status"] == "running"


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
async def test_what_cannot_be_controlled_is_refused(door: Door, verb: str) -> None:
    await placed(door)

    def fail(*_: object) -> list[Any]:
        raise RuntimeError

    async def status_of(path: str, body: object = None, **params: Any) -> tuple[int, str]:
        response = await door.post(f"{path}/{verb}", body, **params)
        return response.status_code, response.json()["code"]

    assert await status_of("/instances/order/o-9") == (404, "SAGA_INSTANCE_NOT_FOUND")
    assert await status_of("/instances/none/o-1") == (404, "SAGA_INSTANCE_NOT_FOUND")
    assert await status_of("/instances/order/o-1", run=2) == (404, "SAGA_INSTANCE_NOT_FOUND")
    assert await status_of("/instances/order/o-1", run=0) == (422, "VALIDATION_ERROR")
    assert await status_of("/instances/order/o-1", {"raeson": "x"}) == (422, "VALIDATION_ERROR")
    assert await status_of("/instances/order/o-1", {"reason": "x" * 2_001}) == (422, "VALIDATION_ERROR")
    assert await status_of("/instances/order/o-1", ["reason"]) == (422, "VALIDATION_ERROR")
    assert await status_of("/instances/order/%00") == (422, "VALIDATION_ERROR")
    assert (await door.get("/instances/order/o-1")).json()["version"] == 1


async def test_a_key_whose_first_message_waits_is_a_conflict_for_now() -> None:
    from sagaloom import define_saga

    def fail(saga: Any, event: Any, context: Any) -> list[Any]:
        raise RuntimeError

    async with open_door(define_saga("s").state({}).on("Begin", fail).build()) as door:
        await door.publish("Begin", {}, correlationId="k", wait="10ms")

        response = await door.post("/instances/s/k/cancel")

    assert (response.status_code, response.json()["code"]) == (409, "SAGA_INSTANCE_PENDING")
    assert response.json()["retryable"]


async def test_the_engine_s_own_message_types_are_not_published(door: Door) -> None:
    await placed(door)

    response = await door.publish("saga:cancel", {}, correlationId="o-1")

    assert (response.status_code, response.json()["code"]) == (422, "MESSAGE_TYPE_RESERVED")
    assert (await door.get("/instances/order/o-1")).json()["status"] == "running"


async def test_a_store_that_takes_nothing_is_said_to_be_down(door: Door) -> None:
    await placed(door)
    door.store.is_down = True

    response = await door.post("/instances/order/o-1/cancel")

    assert (response.status_code, response.json()["code"]) == (503, "BACKEND_UNAVAILABLE")
    assert response.headers["retry-after"] == "1"


async def test_a_web_page_of_another_site_cannot_cancel(door: Door) -> None:
    await placed(door)

    response = await door.client.post(
        f"{PREFIX}/instances/order/o-1/cancel", headers={"origin": "https://evil.example"}
    )

    assert response.status_code == 403
    assert (await door.get("/instances/order/o-1")).json()["status"] == "running"


# --- Many dead letters -----------------------------------------------------------------------------------------------


@pytest.fixture
async def broken() -> AsyncIterator[Door]:
    """Orders o-1 and o-2, each with two messages that were given up."""
    switch = Switch()
    async with open_door(order_saga(switch)) as opened:
        for key in ("o-1", "o-2"):
            await placed(opened, key)
            for number in range(2):
                opened.clock.advance("1s")
                message_id = f"{key}-{number}"
                await opened.publish("OrderShipped", {}, correlationId=key, messageId=message_id, wait="5s")
        switch.is_broken = False
        yield opened


async def left(door: Door) -> list[str]:
    return [one["messageId"] for one in (await door.get("/dead-letters")).json()["deadLetters"]]


async def test_all_dead_letters_are_redriven_when_all_are_asked_for(broken: Door) -> None:
    response = await broken.post("/dead-letters/redrive", {"all": True})
    await broken.runtime.settled()

    answer = response.json()
    assert (response.status_code, len(answer.pop("ids"))) == (200, 4)
    assert answer == {"done": 4, "failed": 0, "hasMore": False, "troubles": []}
    assert await left(broken) == []
    assert (await broken.get("/instances/order/o-1")).json()["state"]["isShipped"]


@pytest.mark.parametrize(
    ("body", "remaining"),
    [
        ({"correlationId": "o-1"}, ["o-2-1", "o-2-0"]),
        ({"correlationKey": "o-1", "sagaId": "order"}, ["o-2-1", "o-2-0"]),
        ({"sagaName": "order", "limit": 3}, ["o-2-1"]),
        ({"sagaName": "other"}, ["o-2-1", "o-2-0", "o-1-1", "o-1-0"]),
        ({"ids": []}, ["o-2-1", "o-2-0", "o-1-1", "o-1-0"]),
    ],
)
async def test_a_filter_says_which_dead_letters_are_discarded(
    broken: Door, body: dict[str, Any], remaining: list[str]
) -> None:
    response = await broken.post("/dead-letters/discard", body)

    assert response.json()["done"] == 4 - len(remaining)
    assert await left(broken) == remaining


async def test_ids_that_are_not_there_are_troubles_beside_those_that_are(broken: Door) -> None:
    (first, *_) = (await broken.get("/dead-letters")).json()["deadLetters"]

    answer = (await broken.post("/dead-letters/discard", {"ids": [first["id"], "dl-none"]})).json()

    assert (answer["done"], answer["failed"], answer["ids"]) == (1, 1, [first["id"]])
    (trouble,) = answer["troubles"]
    assert (trouble["id"], trouble["code"], trouble["retryable"]) == ("dl-none", "DEAD_LETTER_NOT_FOUND", False)


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"limit": 10},
        {"ids": ["dl-1"], "all": True},
        {"ids": ["dl-1"], "sagaName": "order"},
        {"all": True, "sagaName": "order"},
        {"sagaName": "order", "sagaId": "other"},
        {"sagaName": "order", "limit": 0},
        {"sagaName": "order", "limit": 1_001},
        {"sagaName": "order", "dryRun": True},
        {"ids": "dl-1"},
        [],
    ],
)
async def test_an_unclear_request_discards_nothing(broken: Door, body: Any) -> None:
    response = await broken.post("/dead-letters/discard", body)

    assert (response.status_code, response.json()["code"]) == (422, "VALIDATION_ERROR")
    assert len(await left(broken)) == 4


# --- Numbers ---------------------------------------------------------------------------------------------------------


def samples(text: str) -> dict[str, float]:
    """The samples of a text in the format of Prometheus; raises for a line that is none."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("# "):
            name, _, value = line.rpartition(" ")
            assert name not in found, line
            found[name] = float(value)
    return found


async def test_metrics_count_what_happened(door: Door) -> None:
    await placed(door)
    await door.publish("OrderPaid", {}, correlationId="o-1", messageId="m-2", wait="5s")
    await door.publish("OrderPaid", {}, correlationId="o-1", messageId="m-2", wait="5s")
    await door.publish("OrderPaid", {}, correlationId="o-1", wait="5s")
    await door.publish("OrderPaid", {}, correlationId="o-9", wait="5s")
    await door.runtime.settled()

    response = await door.client.get("/metrics")

    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = samples(response.text)
    by_disposition = {
        name: found[f'sagaloom_messages_total{{saga="order",disposition="{name}"}}']
        for name in ("applied", "ignored", "duplicate", "dead_lettered")
    }
    assert by_disposition == {"applied": 2, "ignored": 1, "duplicate": 1, "dead_lettered": 1}
    assert found['sagaloom_messages_accepted_total{saga="order"}'] == 4
    assert found['sagaloom_messages_accepted_total{saga="note"}'] == 0
    assert found['sagaloom_effects_total{kind="service",outcome="dispatched"}'] == 1
    assert (found["sagaloom_ready"], found["sagaloom_store_problem"]) == (1, 0)
    assert (found["sagaloom_backlog"], found["sagaloom_outbox"], found["sagaloom_stalled_lanes"]) == (0, 0, 0)
    assert found["sagaloom_commits_total"] >= 4


async def test_every_metric_says_what_it_is_once(door: Door) -> None:
    text = (await door.client.get("/metrics")).text

    names = {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert len(names) == text.count("# TYPE ") == text.count("# HELP ")
    assert {line.partition(" ")[0].partition("{")[0] for line in text.splitlines() if line[0] != "#"} <= names
    assert text.endswith("\n")


async def test_metrics_show_a_store_that_is_down(door: Door) -> None:
    door.store.is_down = True
    await door.publish()

    found = samples((await door.client.get("/metrics")).text)

    assert (found["sagaloom_ready"], found["sagaloom_store_problem"]) == (0, 1)
    assert found["sagaloom_commits_failed_total"] >= 1


async def test_a_label_is_escaped() -> None:
    from sagaloom import define_saga

    odd = define_saga('a "quoted\\" name').state({}).on("Odd", lambda saga, event, context: []).build()
    async with open_door(odd) as door:
        text = metrics_text(door.runtime)

    assert r'sagaloom_messages_accepted_total{saga="a \"quoted\\\" name"} 0' in text


async def test_metrics_are_behind_the_token() -> None:
    async with open_door(token="t") as door:
        refused = await door.client.get("/metrics")
        let_in = await door.client.get("/metrics", headers={"authorization": "Bearer t"})

    assert (refused.status_code, let_in.status_code) == (401, 200)
