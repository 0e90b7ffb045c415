"""Kills consumers and restarts the broker under load, and counts what was lost: `make chaos QUEUE=redis`.

    QUEUE      kv, redis, rabbitmq or postgres; all but kv get a server of the run's own
    MESSAGES   how many (20000); 2 % of them can only fail, 10 % fail at first
    KILLS      how many consumers are killed with SIGKILL (12)
    CONSUMERS  how many consume at once (3)
    SEED       repeats a run's choices

The broker is killed (SIGKILL) after a third, and restarted in order after two thirds; where there is no broker, all
consumers are killed at once instead. What must hold in the end:

- `lost=0`: what was acknowledged was done, or is a dead letter;
- whatever was done twice was done so after the death of a consumer or of the broker, or was sent twice because no
  answer came and the broker cannot tell, and all of that under one id;
- dead letters are those that spent their attempts, and no others.

A RabbitMQ gets some seconds with its new queues before it is harmed: what one before 4.0 does otherwise is in
`sagaloom.queues.rabbitmq_sending`, and in a test.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sagaloom.errors import SagasError
from tests.queues.consumer import ATTEMPTS, DOOMED, FLAKY, GOOD, RETRY_MS, VISIBILITY_SECONDS, queue_at
from tests.servers.others import RabbitMQ, Redis
from tests.servers.postgres import Postgres
from tests.servers.server import Missing, Server

_SERVERS: Mapping[str, Callable[[], Server]] = {"redis": Redis, "rabbitmq": RabbitMQ, "postgres": Postgres}
_BATCH = 50
_SECONDS_MAX = 420.0
_WRITTEN_DOWN_SECONDS = 6.0
_ROOT = Path(__file__).parents[2]


@dataclass
class Witness:
    """What the consumers have said, read as it comes."""

    path: Path
    offset: int = 0
    rest: bytes = b""
    done: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    failed: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    begun: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def read(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        *lines, self.rest = (self.rest + new).split(b"\n")
        for line in lines:
            what, message_id, _, pid, moment = line.decode().split(" ")
            match what:
                case "+":
                    self.begun[message_id] += 1
                case "!":
                    self.failed[message_id].append((int(pid), float(moment)))
                case _:
                    self.done[message_id].append((int(pid), float(moment)))


class Chaos:
    """One run."""

    def __init__(self, provider: str, place: Path, *, messages: int, kills: int, consumers: int, seed: int) -> None:
        self.provider = provider
        self.place = place
        self.count = messages
        self.kills = kills
        self.size = consumers
        self.rng = random.Random(seed)
        self.namespace = f"chaos_{uuid.uuid4().hex[:8]}"
        self.server: Server | None = _SERVERS[provider]() if provider in _SERVERS else None
        self.address = str(place / "queues.db")
        self.witness = Witness(place / "witness.log")
        self.kinds: dict[str, str] = {}
        self.acknowledged: set[str] = set()
        self.retold = 0
        self.doubled: set[str] = set()
        """What was told again to a broker that keeps both."""
        self.processes: list[subprocess.Popen[bytes]] = []
        self.killed: dict[int, float] = {}
        self.outages: list[tuple[float, float]] = []

    async def run(self) -> bool:
        if self.server is not None:
            await asyncio.to_thread(self.server.start)
            self.address = self.server.url
        began = time.monotonic()
        try:
            self._make()
            queue = queue_at(self.provider, self.address, self.namespace)
            if self.provider == "rabbitmq":
                await self._have_it_written_down(queue)
            for _ in range(self.size):
                self._spawn()
            sending = asyncio.create_task(self._send(queue))
            await self._harass(sending)
            await sending
            await self._settled(queue, began)
            return await self._verdict(queue, time.monotonic() - began)
        finally:
            for process in self.processes:
                process.kill()
                process.wait()
            if self.server is not None:
                await asyncio.to_thread(self.server.close)

    def _make(self) -> None:
        for _ in range(self.count):
            chance = self.rng.random()
            kind = DOOMED if chance < 0.02 else FLAKY if chance < 0.12 else GOOD
            self.kinds[f"{self.rng.getrandbits(96):024x}"] = kind

    async def _have_it_written_down(self, queue: Any) -> None:
        """Makes the queues of the run, and waits. RabbitMQ before 4.0 forgets a queue, with all that is in it, when it
        is killed within three seconds of its making; we say so, cannot change it, and do not count it."""
        first = next(iter(self.kinds))
        await queue.enqueue({"kind": self.kinds[first]}, message_id=first, delay=RETRY_MS)
        self.acknowledged.add(first)
        await asyncio.sleep(_WRITTEN_DOWN_SECONDS)

    def _spawn(self) -> None:
        arguments = (self.provider, self.address, self.namespace, str(self.witness.path))
        with (self.place / "consumers.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.queues.consumer", *arguments], cwd=_ROOT, stdout=log, stderr=log
            )
        self.processes.append(process)

    async def _send(self, queue: Any) -> None:
        """Sends everything, each batch until it is acknowledged, under the same ids."""
        batches = iter(self._batches())
        # A broker that can drops the repeat of a batch whose first answer was lost.
        deduplicates = (await queue.open()).deduplication

        async def work() -> None:
            for batch in batches:
                while True:
                    try:
                        await queue.enqueue_many(
                            [{"kind": self.kinds[each]} for each in batch],
                            message_ids=batch,
                            deduplication_ids=batch if deduplicates else None,
                        )
                    except SagasError as error:
                        if not error.retryable:
                            raise
                        self.retold += 1
                        if not deduplicates:
                            self.doubled.update(batch)
                        await asyncio.sleep(0.2)
                    else:
                        self.acknowledged.update(batch)
                        break

        await asyncio.gather(*(work() for _ in range(4)))

    def _batches(self) -> Iterator[list[str]]:
        ids = [each for each in self.kinds if each not in self.acknowledged]
        for first in range(0, len(ids), _BATCH):
            yield ids[first : first + _BATCH]

    async def _harass(self, sending: asyncio.Task[None]) -> None:
        """Kills a consumer at each step of the way, and the broker at two of them."""
        marks = [(self.count * (n + 1) / (self.kills + 1), self._kill_one) for n in range(self.kills)]
        marks += [(self.count / 3, self._broker_dies), (self.count * 2 / 3, self._broker_restarts)]
        deadline = time.monotonic() + _SECONDS_MAX
        for mark, act in sorted(marks, key=lambda each: each[0]):
            while self._progress() < mark and time.monotonic() < deadline:
                if sending.done() and sending.exception() is not None:
                    return
                await asyncio.sleep(0.02)
            await act()

    def _progress(self) -> int:
        self.witness.read()
        return len(self.witness.done)

    async def _kill_one(self) -> None:
        self._kill(self.rng.choice(self.processes))
        self._spawn()

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGKILL)
        process.wait()
        self.killed[process.pid] = time.time()
        self.processes.remove(process)

    async def _broker_dies(self) -> None:
        await self._outage(None if self.server is None else self.server.kill)

    async def _broker_restarts(self) -> None:
        await self._outage(None if self.server is None else self.server.stop)

    async def _outage(self, down: Callable[[], None] | None) -> None:
        began = time.time()
        if down is None or self.server is None:
            for process in list(self.processes):
                self._kill(process)
            for _ in range(self.size):
                self._spawn()
        else:
            await asyncio.to_thread(down)
            await asyncio.sleep(0.3)
            await asyncio.to_thread(self.server.start)
        self.outages.append((began, time.time()))

    async def _settled(self, queue: Any, began: float) -> None:
        """Waits until every message was done or has failed as often as it may, and nothing is left."""
        quiet, before = 0, -1
        # One that died with its consumer has failed less often than it was tried, and a broker may not know what others
        # hold: where something seems to be open, silence for longer than a lease says that it is not.
        while quiet < (3 if not self._open_ids() else 20) and time.monotonic() - began < _SECONDS_MAX:
            await asyncio.sleep(0.3)
            self.witness.read()
            for process in list(self.processes):
                if process.poll() is not None:
                    raise SystemExit(f"a consumer ended by itself with {process.returncode}: see {self.place}")
            with contextlib.suppress(SagasError):
                depth = await queue.depth()
                is_over = depth.live == 0 and self.witness.offset == before
                quiet, before = (quiet + 1 if is_over else 0), self.witness.offset

    def _open_ids(self) -> set[str]:
        done, failed = self.witness.done, self.witness.failed
        return {each for each in self.acknowledged if each not in done and len(failed[each]) < ATTEMPTS}

    async def _verdict(self, queue: Any, seconds: float) -> bool:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            await self._ended(process)
        self.witness.read()
        letters = await _all_letters(queue)
        depth = await queue.depth()
        await self._remove(queue)
        dead = {letter.id: letter for letter in letters}
        done = self.witness.done
        lost = [each for each in self.acknowledged if each not in done and each not in dead]
        repeats = {each: times for each, times in done.items() if len(times) > 1}
        unexplained = [each for each in repeats if each not in self.doubled and not self._is_explained(each)]
        spared = [each for each, kind in self.kinds.items() if kind == DOOMED and each not in dead]
        untimely = [
            each
            for each, letter in dead.items()
            if letter.attempt < ATTEMPTS or (self.kinds.get(each) != DOOMED and letter.error_code != "CONSUMER_DIED")
        ]
        unknown = [each for each in (*dead, *done) if each not in self.kinds]
        doomed = sum(kind == DOOMED for kind in self.kinds.values())
        print(
            f"{self.provider}: {seconds:.1f} s, {len(self.killed)} consumers killed, {len(self.outages)} outages of "
            f"the broker, {self.retold} sends were told again\n"
            f"messages={len(self.acknowledged)} lost={len(lost)} repeats={len(repeats)} unexplained={len(unexplained)} "
            f"dead={len(dead)} doomed={doomed} spared={len(spared)} untimely={len(untimely)} left={depth.live} "
            f"unknown={len(unknown)}",
            flush=True,
        )
        bad = {"lost": lost, "unexplained": unexplained, "spared": spared, "untimely": untimely, "unknown": unknown}
        for what, found in bad.items():
            for each in found[:5]:
                letter = dead.get(each)
                said = f", dead after {letter.attempt}: {letter.error_code}" if letter is not None else ""
                print(f"  {what}: {each} {self.kinds.get(each)} done={done.get(each)}{said}")
        return not any(bad.values()) and depth.live == 0 and len(self.acknowledged) == self.count

    async def _ended(self, process: subprocess.Popen[bytes]) -> None:
        try:
            await asyncio.to_thread(process.wait, 40)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGUSR1)
            await asyncio.sleep(1)
            raise SystemExit(
                f"a consumer did not end; what it waits for is in {self.place / 'consumers.log'}"
            ) from None

    def _is_explained(self, message_id: str) -> bool:
        """Whether each time that it was done, but for the last, a death can have swallowed the acknowledgement, or one
        before has: a failed attempt is handed on first, and acknowledged then, so there are two of it in between."""
        done = sorted(self.witness.done[message_id], key=lambda each: each[1])[:-1]
        failed = self.witness.failed[message_id]
        return sum(map(self._is_swallowed, done)) + sum(map(self._is_swallowed, failed)) >= len(done)

    def _is_swallowed(self, attempt: tuple[int, float]) -> bool:
        """Whether its process, or the broker, died when it may have been about to be acknowledged."""
        pid, moment = attempt
        slack = VISIBILITY_SECONDS + 1
        killed_at = self.killed.get(pid)
        return (killed_at is not None and killed_at <= moment + slack) or any(
            down - slack <= moment <= up + slack for down, up in self.outages
        )

    async def _remove(self, queue: Any) -> None:
        await queue.close()


async def _all_letters(queue: Any) -> list[Any]:
    letters: list[Any] = []
    while page := await queue.dead_letters(limit=1_000, after=letters[-1].id if letters else None):
        letters += page
    return letters


def main() -> int:
    provider = os.environ.get("QUEUE", "kv")
    if provider not in ("kv", *_SERVERS):
        raise SystemExit(f"QUEUE={provider!r} is none of kv, {', '.join(_SERVERS)}")
    messages, kills, consumers = _number("MESSAGES", 20_000), _number("KILLS", 12), _number("CONSUMERS", 3)
    seed = _number("SEED", random.SystemRandom().randrange(1, 1_000_000))
    print(f"SEED={seed}; again: make chaos QUEUE={provider} MESSAGES={messages} KILLS={kills} SEED={seed}", flush=True)
    place = Path(tempfile.mkdtemp(prefix="sagaloom-queue-chaos-"))
    logging.basicConfig(filename=place / "driver.log", level=logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that consumers and servers end with us
    try:
        run = Chaos(provider, place, messages=messages, kills=kills, consumers=consumers, seed=seed)
        is_clean = asyncio.run(run.run())
    except Missing as missing:
        print(f"skipped: {missing}")
        return 1 if os.environ.get("SAGALOOM_REQUIRE_SERVERS", "0") not in ("", "0") else 0
    if is_clean:
        subprocess.run(["rm", "-rf", str(place)], check=True)
    else:
        print(f"what the consumers said is in {place}", file=sys.stderr)
    return 0 if is_clean else 1


def _number(name: str, default: int) -> int:
    given = os.environ.get(name, "").strip()
    if not given:
        return default
    if not given.isdigit() or int(given) < 1:
        raise SystemExit(f"{name}={given!r} is no number above 0")
    return int(given)


if __name__ == "__main__":
    sys.exit(main())
