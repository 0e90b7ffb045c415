"""How much one client may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from sagaloom.errors import ConfigurationError, MessageRejected
from sagaloom.settings import load_settings
from sagaloom.web.limits import RateLimit, StreamLimit
from tests.doors.http_door import PREFIX, open_door


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def scope(client: str = "192.0.2.1") -> dict[str, Any]:
    return {"type": "http", "client": (client, 1234)}


def passes(limit: RateLimit, count: int, client: str = "192.0.2.1", path: str = "/x") -> int:
    """How many of `count` requests are let in."""
    return sum(limit.refusal(scope(client), path) is None for _ in range(count))


def test_a_burst_of_two_seconds_passes_and_then_so_many_a_second() -> None:
    clock = Clock()
    limit = RateLimit(5, now=clock)

    at_once = passes(limit, 20)
    clock.now += 1.0
    after_a_second = passes(limit, 20)
    clock.now += 60.0

    assert (at_once, after_a_second, passes(limit, 20)) == (10, 5, 10)


def test_a_refused_request_costs_nothing() -> None:
    clock = Clock()
    limit = RateLimit(1, now=clock)
    passes(limit, 100)

    clock.now += 1.0

    assert passes(limit, 1) == 1


def test_clients_do_not_share_a_bucket() -> None:
    limit = RateLimit(1, now=Clock())

    assert (passes(limit, 5, "192.0.2.1"), passes(limit, 5, "192.0.2.2")) == (2, 2)


def test_a_slow_rate_lets_one_in_and_says_when_to_come_back() -> None:
    clock = Clock()
    limit = RateLimit(0.1, now=clock)
    passes(limit, 1)

    refused = limit.refusal(scope(), "/x")
    clock.now += 10.0

    assert refused is not None
    assert (refused.code, refused.retryable, refused.data) == ("RATE_LIMITED", True, {"retryAfterSeconds": 10})
    assert passes(limit, 2) == 1


def test_what_is_remembered_of_clients_is_bounded() -> None:
    clock = Clock()
    limit = RateLimit(1, now=clock)
    for number in range(25_000):
        assert limit.refusal(scope(f"client-{number}"), "/x") is None

    assert len(limit._full_at) <= 10_000


@pytest.mark.parametrize("rate", [0, -1, float("inf"), float("nan")])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigurationError, match="rate limit"):
        RateLimit(rate)


def test_the_rate_is_a_setting_of_the_server() -> None:
    assert load_settings({}).requests_per_second is None
    assert load_settings({"SAGALOOM_RATE_LIMIT": "2.5"}).requests_per_second == 2.5
    with pytest.raises(ConfigurationError, match="requests_per_second"):
        load_settings({"SAGALOOM_RATE_LIMIT": "0"})


async def test_too_many_requests_are_429_and_say_when_to_come_back() -> None:
    async with open_door(requests_per_second=0.1) as door:
        let_in = await door.publish("Noted", {})
        refused = await door.publish("Noted", {})

        assert (let_in.status_code, refused.status_code) == (202, 429)
        assert (refused.json()["code"], refused.json()["retryable"]) == ("RATE_LIMITED", True)
        assert refused.headers["retry-after"] == str(refused.json()["data"]["retryAfterSeconds"])
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert len(door.store.instances_by_run) == 1


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/metrics", f"{PREFIX}/health"])
async def test_health_and_metrics_are_never_too_much(path: str) -> None:
    async with open_door(requests_per_second=0.1) as door:
        found = [(await door.client.get(path)).status_code for _ in range(5)]

    assert found == [200] * 5


async def test_wrong_tokens_are_slowed_down_too() -> None:
    async with open_door(token="t", requests_per_second=0.1) as door:
        found = [(await door.get("/sagas")).status_code for _ in range(3)]

    assert found == [401, 429, 429]


async def test_without_a_limit_nothing_is_too_much() -> None:
    async with open_door() as door:
        found = {(await door.get("/sagas")).status_code for _ in range(100)}

    assert found == {200}


def test_streams_are_counted_while_they_are_open() -> None:
    limit = StreamLimit(2, per_client_max=1)

    with limit.opened(scope("192.0.2.1")), limit.opened(scope("192.0.2.2")):
        assert limit.open == 2
        with pytest.raises(MessageRejected, match="2 streams are open"), limit.opened(scope("192.0.2.3")):
            pass

    assert limit.open == 0
    with limit.opened(scope("192.0.2.1")):
        with pytest.raises(MessageRejected, match=r"192\.0\.2\.1 has 1 streams") as refused:
            limit.opened(scope("192.0.2.1")).__enter__()
        assert refused.value.code == "RATE_LIMITED"
        assert limit.open == 1
