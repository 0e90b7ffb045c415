"""One shop in four frameworks: a message goes in, its state and its events come out, and a restart loses nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.doors.http_door import serve
from tests.doors.sse import subscribed

FRAMEWORKS = ("fastapi", "starlette", "litestar", "django")
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture(params=FRAMEWORKS)
def create_app(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    make = importlib.import_module(f"examples.web.with_{request.param}").create_app
    return lambda: make(str(tmp_path / "shop.db"))


async def test_what_an_application_publishes_is_there_after_a_restart(create_app: Callable[[], Any]) -> None:
    async with serve(create_app()) as port, httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        placed = await client.post("/orders/o-1?cents=1250", headers={"traceparent": TRACE})
        missing = await client.get("/orders/o-2")
    async with serve(create_app()) as port, httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        before = await client.get("/orders/o-1")
        await client.post("/orders/o-1/paid")
        after = await client.get("/orders/o-1")

    assert (placed.status_code, missing.status_code) == (202, 404)
    assert placed.json()["messageId"]
    assert (before.json(), after.json()) == (
        {"status": "placed", "cents": 1250},
        {"status": "paid", "cents": 1250},
    )


async def test_what_happens_is_streamed_at_a_path_of_the_application(create_app: Callable[[], Any]) -> None:
    async with serve(create_app()) as port, httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        async with subscribed(port, path="/events", sagaName="orders", type="saga:started,saga:completed") as stream:
            await client.post("/orders/o-1?cents=1", headers={"traceparent": TRACE})
            await client.post("/orders/o-1/paid")
            told = await stream.take(2)
        again = await client.get("/events?sagaName=orders&wrong=1")
        posted = await client.post("/events")

    assert [each.event for each in told] == ["saga:started", "saga:completed"]
    assert (stream.status, stream.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    assert (again.status_code, again.json()["code"]) == (422, "VALIDATION_ERROR")
    assert (posted.status_code, posted.headers["allow"]) == (405, "GET")
