"""`sagaloom instances watch`: what it prints, and that it comes back and misses nothing."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Generator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sagaloom.cli.client import ApiClient, CommandFailed
from sagaloom.cli.watching import StreamedEvent, events_of, follow, line_of
from sagaloom.errors import BackendUnavailable
from tests.doors.test_http_subscribe import Served, serving
from tests.patience import PATIENCE_SECONDS
from tests.servers.server import free_port

ROOT = Path(__file__).resolve().parents[2]
WITHIN_SECONDS = PATIENCE_SECONDS


# --- Reading and writing ---------------------------------------------------------------------------------------------


def test_events_are_read_as_the_standard_says() -> None:
    lines = [
        ": hello",
        "retry: 10",
        "event: a",
        "id: 1",
        'data: {"n":',
        "data:1}",
        "",
        "",
        "id: 2",
        'data: {"n":2}',
        "",
    ]

    assert list(events_of(lines)) == [StreamedEvent("1", "a", {"n": 1}), StreamedEvent("2", "message", {"n": 2})]


def test_an_event_that_was_cut_off_is_none() -> None:
    assert list(events_of(["event: a", "id: 1", 'data: {"n":1}'])) == []


@pytest.mark.parametrize(
    ("told", "line"),
    [
        (
            StreamedEvent(
                "7",
                "saga:failed",
                {
                    "timestamp": "T",
                    "instanceId": "order:o-1",
                    "status": "failed",
                    "messageType": "OrderRefused",
                    "data": {"detail": "no\nstock"},
                },
            ),
            "T  failed            order:o-1  failed  OrderRefused  no stock",
        ),
        (
            StreamedEvent(
                "8",
                "saga:effect_dispatched",
                {
                    "timestamp": "T",
                    "instanceId": "order:o-1",
                    "data": {"target": "service:payments", "effectKey": "e"},
                },
            ),
            "T  effect_dispatched  order:o-1  service:payments",
        ),
        (
            StreamedEvent("9", "reset", {"timestamp": "T", "data": {"oldestId": "10", "reason": "expired"}}),
            "T  the feed goes on at 10, the oldest that is kept: expired",
        ),
    ],
)
def test_an_event_is_one_line(told: StreamedEvent, line: str) -> None:
    assert line_of(told) == line


# --- Following -------------------------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends a test that follows."""


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving(heartbeat_seconds=0.05) as made:
        yield made


class Follower:
    """Follows the feed in a thread, until it was shown `count` events."""

    def __init__(self, port: int, count: int, *, token: str | None = None, **wanted: str | None) -> None:
        self.shown: list[StreamedEvent] = []
        self.said: list[str] = []
        self.pauses: list[float] = []
        self._url = f"http://127.0.0.1:{port}"
        self._count = count
        self._token = token
        self._wanted = {"saga": None, "key": None, "after": "0", **wanted}
        self._loop = asyncio.get_running_loop()
        self.news: asyncio.Queue[StreamedEvent] = asyncio.Queue()
        self.cut = asyncio.Event()
        self._gate = threading.Event()

    def _show(self, told: StreamedEvent) -> None:
        self.shown.append(told)
        self._loop.call_soon_threadsafe(self.news.put_nowait, told)
        if len(self.shown) == self._count:
            raise Enough

    def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self._loop.call_soon_threadsafe(self.cut.set)
        assert self._gate.wait(WITHIN_SECONDS)

    def go_on(self) -> None:
        self._gate.set()

    def _run(self) -> None:
        with ApiClient(self._url, self._token) as api:
            follow(api, **self._wanted, show=self._show, say=self.said.append, pause=self._pause)

    async def run(self) -> list[int]:
        """The numbers of what was shown."""
        async with asyncio.timeout(WITHIN_SECONDS):
            with pytest.raises(Enough):
                await asyncio.to_thread(self._run)
        return [int(told.id) % 10_000_000_000 for told in self.shown]

    async def fail(self) -> str:
        """Why it did not work."""
        with pytest.raises(CommandFailed) as failed:
            await asyncio.to_thread(self._run)
        return failed.value.message


async def test_what_happened_is_shown_and_heartbeats_are_not(served: Served) -> None:
    await served.place("o-1")
    await served.place("n-1", "Noted")

    assert await Follower(served.port, 7).run() == [1, 2, 3, 4, 5, 6, 7]
    assert await Follower(served.port, 3, saga="note").run() == [5, 6, 7]
    assert await Follower(served.port, 4, key="o-1").run() == [1, 2, 3, 4]
    assert await Follower(served.port, 2, after=str(served.cursor(5))).run() == [6, 7]


async def test_a_cut_connection_is_mended_and_nothing_is_shown_twice_or_lost(served: Served) -> None:
    follower = Follower(served.port, 8)
    await served.place("o-1")
    running = asyncio.ensure_future(follower.run())
    for _ in range(4):
        await asyncio.wait_for(follower.news.get(), WITHIN_SECONDS)
    served.store.feed_error = BackendUnavailable("the disk is gone")
    served.runtime._feed.committed()
    await asyncio.wait_for(follower.cut.wait(), WITHIN_SECONDS)
    served.store.feed_error = None
    await served.place("o-2")
    follower.go_on()

    assert await running == [1, 2, 3, 4, 5, 6, 7, 8]
    assert follower.said == ["the connection was cut; trying to go on where it was"]


async def test_a_first_connection_that_does_not_work_says_why(served: Served) -> None:
    await served.runtime.stop()

    assert "the runtime is stopped" in await Follower(served.port, 1).fail()
    assert "no server answers at http://127.0.0.1:1" in await Follower(1, 1).fail()


async def test_what_is_refused_for_good_says_why(served: Served) -> None:
    assert "'yesterday' is no cursor of the feed" in await Follower(served.port, 1, after="yesterday").fail()
    async with serving(token="secret") as closed:
        assert "wants a token" in await Follower(closed.port, 1).fail()


# --- As a process ----------------------------------------------------------------------------------------------------


class Process:
    """A `sagaloom` process, and the lines that it prints."""

    def __init__(self, *args: str, cwd: Path) -> None:
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("SAGA", "NETSCRIPT_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sagaloom", *args],
            cwd=cwd,
            env={**plain, "PYTHONPATH": str(ROOT), "PAYMENTS_PORT": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def line(self) -> Any:
        """The next line, which is JSON."""
        return json.loads(self._lines.get(timeout=WITHIN_SECONDS))

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(WITHIN_SECONDS)
        self._reader.join(WITHIN_SECONDS)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def processes() -> Generator[list[Process]]:
    made: list[Process] = []
    yield made
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.end()


def test_a_watch_outlives_its_server_and_ends_when_interrupted(tmp_path: Path, processes: list[Process]) -> None:
    def begin(*args: str) -> Process:
        processes.append(Process(*args, "--json", cwd=tmp_path))
        return processes[-1]

    def publish(user: str) -> None:
        message = {"type": "UserSettingsCreated", "payload": {"userId": user}, "correlationId": user}
        httpx2.post(f"{url}/api/v1/sagas/publish", json=message, timeout=WITHIN_SECONDS).raise_for_status()

    port = str(free_port())  # which nobody gets by chance while the server is away
    server = begin("dev", "--port", port)
    url = server.line()["url"]
    watch = begin("instances", "watch", "--url", url, "--after", "0")
    publish("a")
    told = [watch.line() for _ in range(4)]
    assert server.end() == 0  # Though somebody watches.
    server = begin("dev", "--port", port)
    server.line()
    publish("b")
    told += [watch.line() for _ in range(4)]

    assert watch.end(signal.SIGINT) == 0
    assert server.end() == 0
    ids = [int(one["id"]) for one in told]
    assert ids == list(range(ids[0], ids[0] + 8))
    assert [one["correlationKey"] for one in told] == ["a"] * 4 + ["b"] * 4
    assert [one["type"] for one in told[4:]] == [
        "saga:message_received",
        "saga:started",
        "saga:state_changed",
        "saga:completed",
    ]
