"""The driver: publishes, kills, restarts, and keeps the books.

    clients (64) ──HTTP──► worker (killed) ──effects──► receiver (remembers)
         │                    │
       ledger               store file

The kills are planned before anything starts: each named step at least once, the others at random steps and at random
moments. The orders are let out in portions, one before each kill, so that every kill hits a worker under load. A
worker that is to die at a step kills itself there (`SAGALOOM_FAULT`); one that does not get there in time is killed
from outside, and the step is planned again. Every process is ended by its process id, however the run ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.stores.kv import KvSagaStore
from sagaloom.testing.faults import STEPS
from tests.crash.ledger import Ledger
from tests.crash.nursery import Nursery, Worker
from tests.crash.receiver import Arrival
from tests.crash.story import Order
from tests.crash.verdict import Verdict, judge, refuses_a_stale_lease
from tests.crash.wire import Client
from tests.crash.worker import EXIT_STORE_IN_USE, Waiting

__all__ = ["RANDOM", "CrashRun", "Report", "plan_kills"]

RANDOM: Final = "at random"
_CLIENTS: Final = 64
_BOOT_SECONDS_MAX: Final = 20.0
_STEP_SECONDS_MAX: Final = 4.0
_PLANNED_AGAIN_MAX: Final = 3
_SETTLE_SECONDS_MAX: Final = 60.0
_ANSWER_SECONDS_MAX: Final = 10.0
_RESENT_AT_ONCE: Final = 0.05
_RESENT_LATER: Final = 0.05

# How often a step comes in one portion of orders: a fault further out would wait for a load that never comes.
_NTH_MAX: Final = {"accepted": 3, "compensated": 2, "timer_due": 2, "dispatched": 20, "settled": 20}
_NTH_MAX_OTHERS: Final = 25


def plan_kills(kills: int, rng: random.Random) -> list[tuple[str, int]]:
    """(step, nth) of each kill: every step once, at the first time or at a random one; at least three at random
    moments; the rest half and half. So it is never fewer than the steps and three."""
    steps = [*STEPS, *(rng.choice(STEPS) for _ in range(max(0, kills - len(STEPS) - 3) // 2))]
    plan = [(step, rng.randint(1, _NTH_MAX.get(step, _NTH_MAX_OTHERS))) for step in steps]
    plan += [(RANDOM, 0)] * max(3, kills - len(steps))
    rng.shuffle(plan)
    return plan


@dataclass
class Report:
    """What happened, for the table and the closing lines."""

    verdict: Verdict
    kills: Counter[str] = field(default_factory=Counter)
    messages: int = 0
    seconds: float = 0.0
    recovery_seconds: list[float] = field(default_factory=list)
    cut_answers: int = 0
    duplicates_sent: int = 0


class CrashRun:
    """One run on one store file in `directory`."""

    def __init__(
        self,
        directory: Path,
        *,
        orders: Sequence[Order],
        kills: Sequence[tuple[str, int]],
        rng: random.Random,
        tell: Callable[[str], None],
    ) -> None:
        self._directory = directory
        self._store_path = directory / "saga.db"
        self._orders = list(orders)
        self._kills = list(kills)
        self._rng = rng
        self._tell = tell
        self._ledger = Ledger()
        self._report = Report(Verdict())
        self._nursery: Nursery | None = None
        self._worker: Worker | None = None
        self._worker_port = 0
        self._receiver: asyncio.subprocess.Process | None = None
        self._receiver_port = 0
        self._epochs: list[int] = []
        self._next_order = 0
        self._let_out = 0
        self._orders_done = 0
        self._more = asyncio.Condition()
        self._up = asyncio.Event()
        self._finished_ids: list[tuple[Order, dict[str, Any]]] = []
        self._began = time.monotonic()

    async def run(self) -> Report:
        """Does everything; whatever happens, no process is left behind."""
        clients: list[asyncio.Task[None]] = []
        try:
            await self._start_receiver()
            await self._start_nursery()
            clients = [asyncio.create_task(self._client(number)) for number in range(_CLIENTS)]
            await self._kill_and_restart(clients)
            await self._let_everything_out(clients)
            await self._settle()
            second = await self._second_worker_is_refused()
            arrivals = await self._arrivals()
            await self._stop_worker()
            verdict = await self._judge(arrivals)
            verdict.breaches += second
        finally:
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            await self._end_every_process()
        self._report.verdict = verdict
        self._report.messages = sum(len(order.messages()) for order in self._orders)
        self._report.seconds = time.monotonic() - self._began
        self._report.cut_answers = self._ledger.cut_answers
        self._report.duplicates_sent = self._ledger.duplicates_sent
        return self._report

    # ------------------------------------------------------------------ killing

    async def _kill_and_restart(self, clients: Sequence[asyncio.Task[None]]) -> None:
        plan = list(self._kills)
        planned_again: Counter[str] = Counter()
        total = len(plan)
        portion = len(self._orders) / (total + 1)
        done = 0
        while done < len(plan):
            step, nth = plan[done]
            await self._let_out_orders(int(portion * (done + 1)))
            worker = await self._start_worker(None if step == RANDOM else f"{step}:{nth}")
            if step == RANDOM:
                await self._wait_for_a_random_moment(worker)
                await self._kill(worker)
                self._report.kills[RANDOM] += 1
            elif await self._dies_by_itself(worker):
                self._report.kills[step] += 1
            else:
                await self._kill(worker)
                self._report.kills[RANDOM] += 1
                if planned_again[step] < _PLANNED_AGAIN_MAX:
                    # The load was not enough for the nth time; the first time will come.
                    planned_again[step] += 1
                    plan.append((step, 1))
                elif not self._report.kills[step]:
                    self._ledger.odd(f"I10 step {step} was never reached, so nobody was killed there")
            done += 1
            if done % max(1, total // 10) == 0 or done == len(plan):
                self._tell(
                    f"  kill {done}/{len(plan)}, {len(self._ledger.acknowledged)} messages acknowledged, "
                    f"{time.monotonic() - self._began:.1f} s"
                )
            self._raise_what_clients_raised(clients)

    async def _wait_for_a_random_moment(self, worker: Worker) -> None:
        """Up to a random number of the acknowledgements of this portion, and a bit: mostly in the middle of the load,
        now and then while only effects and timers are under way, or while the worker still starts."""
        if self._rng.random() < 0.1:
            await asyncio.sleep(self._rng.uniform(0.0, 0.05))
            return
        await self._wait_until_ready(worker)
        open_messages = 3 * (self._let_out - self._orders_done)
        goal = len(self._ledger.acknowledged) + self._rng.randint(0, open_messages)
        deadline = time.monotonic() + 1.0
        while len(self._ledger.acknowledged) < goal and time.monotonic() < deadline:  # noqa: ASYNC110 - a deadline too
            await asyncio.sleep(0.001)
        await asyncio.sleep(self._rng.choice((0.0, self._rng.uniform(0.0, 0.01), self._rng.uniform(0.0, 0.3))))

    async def _dies_by_itself(self, worker: Worker) -> bool:
        """Whether the worker reaches its fault; more orders are let out when it has nothing left to do."""
        deadline = time.monotonic() + _STEP_SECONDS_MAX
        while time.monotonic() < deadline:
            await asyncio.wait([worker.died], timeout=0.3)
            if worker.died.done():
                if worker.died.result() != -signal.SIGKILL:
                    raise RuntimeError(f"a worker ended with {worker.died.result()}, not by a kill: see {self._log}")
                return True
            if self._orders_done == self._let_out:
                await self._let_out_orders(self._let_out + 8)
        return False

    async def _kill(self, worker: Worker) -> None:
        status = await worker.kill()
        if status != -signal.SIGKILL:
            raise RuntimeError(f"a worker ended by itself with {status}: see {self._log}")

    # ------------------------------------------------------------------ processes

    @property
    def _log(self) -> Path:
        return self._directory / "worker.log"

    async def _start_receiver(self) -> None:
        with self._log.open("ab") as log:
            self._receiver = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.crash.receiver", str(self._directory / "receiver.log"),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                start_new_session=True,  # Ctrl-C is for the driver, which then ends everybody in order.
            )  # fmt: skip
        assert self._receiver.stdout is not None
        async with asyncio.timeout(_BOOT_SECONDS_MAX):
            self._receiver_port = int(await self._receiver.stdout.readline())

    async def _start_nursery(self) -> None:
        self._nursery = Nursery("tests.crash.worker", str(self._store_path), str(self._receiver_port), log=self._log)
        await self._nursery.start()

    async def _start_worker(self, fault: str | None) -> Worker:
        """A new worker; the clients go to it as soon as it is ready, which it may never be."""
        assert self._nursery is not None
        worker = await self._nursery.birth(fault)
        born = time.monotonic()
        worker.ready.add_done_callback(lambda ready: self._is_up(worker, ready.result(), time.monotonic() - born))
        worker.died.add_done_callback(lambda _: self._is_down(worker))
        self._worker = worker
        return worker

    def _is_up(self, worker: Worker, said: list[str], seconds: float) -> None:
        if not said or worker is not self._worker or worker.died.done():
            return
        port, epoch = map(int, said)
        if self._epochs and epoch <= self._epochs[-1]:
            self._ledger.odd(f"I7 a worker got epoch {epoch} after one with {self._epochs[-1]}")
        self._epochs.append(epoch)
        self._report.recovery_seconds.append(seconds)
        self._worker_port = port
        self._up.set()

    def _is_down(self, worker: Worker) -> None:
        if worker is self._worker:
            self._up.clear()

    async def _wait_until_ready(self, worker: Worker) -> None:
        async with asyncio.timeout(_BOOT_SECONDS_MAX):
            said = await asyncio.shield(worker.ready)
        if not said:
            raise RuntimeError(f"a worker did not start (status {worker.died.result()}): see {self._log}")

    async def _second_worker_is_refused(self) -> list[str]:
        """A second process on the same file must be turned away while the first one lives (I7)."""
        assert self._nursery is not None
        second = await self._nursery.birth(None)
        await asyncio.wait([second.died], timeout=_BOOT_SECONDS_MAX)
        if not second.died.done():
            await second.kill()
            return ["I7 a second worker took a store that a living one has"]
        if second.died.result() != EXIT_STORE_IN_USE:
            return [f"I7 a second worker ended with {second.died.result()}, not with the refusal {EXIT_STORE_IN_USE}"]
        return []

    async def _stop_worker(self) -> None:
        worker = self._worker
        assert worker is not None
        await worker.signal(signal.SIGTERM)
        async with asyncio.timeout(_BOOT_SECONDS_MAX):
            status = await asyncio.shield(worker.died)
        if status:
            self._ledger.odd(f"I10 the worker ended with status {status} when asked to stop: see {self._log}")

    async def _end_every_process(self) -> None:
        if self._nursery is not None:
            await self._nursery.end()
        if self._receiver is not None and self._receiver.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._receiver.kill()
            await self._receiver.wait()

    # ------------------------------------------------------------------ publishing

    async def _let_out_orders(self, count: int) -> None:
        async with self._more:
            self._let_out = max(self._let_out, min(count, len(self._orders)))
            self._more.notify_all()

    async def _let_everything_out(self, clients: Sequence[asyncio.Task[None]]) -> None:
        await self._wait_until_ready(await self._start_worker(None))
        await self._let_out_orders(len(self._orders))
        async with asyncio.timeout(_SETTLE_SECONDS_MAX + len(self._orders) / 50):
            await asyncio.gather(*clients)

    def _raise_what_clients_raised(self, clients: Sequence[asyncio.Task[None]]) -> None:
        for client in clients:
            if client.done():
                client.result()

    async def _client(self, number: int) -> None:
        """Publishes orders, one after the other and each message after the one before it is acknowledged."""
        rng = random.Random(self._rng.random() + number)
        connection = Client()
        try:
            while (order := await self._take_order()) is not None:
                for message in order.messages():
                    await self._publish(connection, order, message)
                    if rng.random() < _RESENT_AT_ONCE:
                        await self._publish(connection, order, message, again=True)
                    if self._finished_ids and rng.random() < _RESENT_LATER:
                        await self._publish(connection, *rng.choice(self._finished_ids), again=True)
                    self._finished_ids.append((order, message))
                self._orders_done += 1
        finally:
            connection.close()

    async def _take_order(self) -> Order | None:
        async with self._more:
            await self._more.wait_for(lambda: self._next_order < self._let_out or self._next_order >= len(self._orders))
            if self._next_order >= len(self._orders):
                return None
            order = self._orders[self._next_order]
            self._next_order += 1
            return order

    async def _publish(self, connection: Client, order: Order, message: dict[str, Any], *, again: bool = False) -> None:
        """Sends one message, under the same id, until it is acknowledged."""
        self._ledger.duplicates_sent += again
        body = msgspec.json.encode(message)
        while True:
            await self._up.wait()
            try:
                async with asyncio.timeout(_ANSWER_SECONDS_MAX):
                    status, answer = await connection.request(self._worker_port, "POST", "/publish", body)
            except (OSError, EOFError, TimeoutError):
                self._ledger.cut_answers += 1
                await asyncio.sleep(0.005)
                continue
            said = msgspec.json.decode(answer)
            if status == 202:
                self._ledger.acknowledge(
                    message["id"], order.id, duplicate=said["duplicate"], disposition=said["dispositions"][0]
                )
                return
            if status != 503:
                raise RuntimeError(f"message {message['id']} was refused for good: {said}")
            self._ledger.refused_retryably[said["code"]] += 1
            await asyncio.sleep(0.01)

    # ------------------------------------------------------------------ the end

    async def _ask_worker(self, path: str) -> bytes:
        connection = Client()
        try:
            _, answer = await connection.request(self._worker_port, "GET", path)
        finally:
            connection.close()
        return answer

    async def _settle(self) -> None:
        """Waits until the store has no work left, or for as long as that may take at most."""
        deadline = time.monotonic() + _SETTLE_SECONDS_MAX
        while time.monotonic() < deadline:
            if not msgspec.json.decode(await self._ask_worker("/waiting"), type=Waiting):
                return
            await asyncio.sleep(0.05)

    async def _arrivals(self) -> list[Arrival]:
        connection = Client()
        try:
            _, answer = await connection.request(self._receiver_port, "GET", "/arrivals")
        finally:
            connection.close()
        return msgspec.json.decode(answer, type=list[Arrival])

    async def _judge(self, arrivals: list[Arrival]) -> Verdict:
        store = KvSagaStore(await SqliteKeyValue.open(self._store_path), presence=FilePresence(self._store_path))
        try:
            lease = await store.acquire("judge", now=datetime.now(UTC))
            verdict = await judge(store, orders=self._orders, ledger=self._ledger, arrivals=arrivals)
            verdict.breaches += await refuses_a_stale_lease(store, lease)
            await store.release(lease)
            return verdict
        finally:
            await store.close()
