"""The process that is killed: a runtime on a store, with a door for messages.

`python -m tests.crash.worker STORE RECEIVER_PORT [SABOTAGE]` is the nursery that forks it. `SAGALOOM_FAULT=step:nth`
makes it kill itself at that step, and so does `POST /arm` later on. Ready, it says on which port it listens and by what
name it holds partitions. Without a store it ends with status 75, and is given another try. It stops in order on
SIGTERM, and at once when the nursery is gone. On SIGUSR1 it stops itself (SIGSTOP) the next time that it has decided
and is about to commit.

What it tells the driver, as notes:

    joined EPOCH HOLDER   it has entered among those who write
    stopping              it stops itself now
    refused write|look    its lease is over, as it was told when it wanted to write, or when it looked
    wrote                 what it had decided before it was stopped was written
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Collection, Sequence
from typing import Any, Final

import msgspec

from sagaloom.definitions import RetryPolicy
from sagaloom.errors import BackendUnavailable, Fenced
from sagaloom.ids import PARTITIONS
from sagaloom.messages import SagaMessage
from sagaloom.ports.store import CommitResult, Holding, Lease, SagaStore, UnitOfWork
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.receipts import PublishRejected
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.targets.service import ServiceTarget
from sagaloom.testing.faults import Faults
from tests.crash.nursery import serve_births
from tests.crash.places import LEASE_SECONDS, open_store
from tests.crash.sabotage import Saboteur
from tests.crash.story import definitions
from tests.crash.wire import HOST, Request, serve

__all__ = ["NO_STORE", "SERVICES", "Standing", "Waiting", "effect_retry", "what_waits"]

NO_STORE: Final = 75
"""The status of a worker that found no store when it started."""
_log = logging.getLogger("crash.worker")
SERVICES: Final = ("payments", "mail", "carrier")


class Waiting(msgspec.Struct):
    """Whether anything is left to do in a store, now or later."""

    inbox: bool
    outbox: bool
    timers: bool

    def __bool__(self) -> bool:
        return self.inbox or self.outbox or self.timers


class Standing(msgspec.Struct):
    """What a worker believes to hold, and how many messages it has applied."""

    parts: list[int]
    applied: int


class _Published(msgspec.Struct):
    type: str
    id: str
    payload: msgspec.Raw


def effect_retry() -> RetryPolicy:
    """Patient and quick: a receiver that refuses at first must cost neither the effect nor the test's time."""
    return RetryPolicy(maximum_attempts=100, initial_interval_ms=20, maximum_interval_ms=100)


async def what_waits(store: SagaStore) -> Waiting:
    """Looks into the store, not into anybody's memory."""
    return Waiting(
        inbox=bool(await store.inbox_page(after=None, limit=1)),
        outbox=bool(await store.outbox_page(after=None, limit=1)),
        timers=bool(await store.timers(limit=1)),
    )


class _Told:
    """Writes notes for the driver."""

    def __init__(self, tag: str) -> None:
        self._tag = tag

    def __call__(self, *words: object) -> None:
        os.write(1, f"note {self._tag} {' '.join(map(str, words))}\n".encode())


class _Steps:
    """The hook of the walk: the planned fault, and the stop between decision and commit."""

    def __init__(self, faults: Faults, tell: _Told) -> None:
        self._faults = faults
        self._tell = tell
        self._stops = False
        self.was_stopped = False
        """Whether what is about to be written was decided before a stop."""

    def stop_when_decided(self) -> None:
        self._stops = True

    def __call__(self, step: str) -> None:
        self._faults(step)
        if self._stops and step == "decided":
            self._stops, self.was_stopped = False, True
            self._tell("stopping")
            os.kill(os.getpid(), signal.SIGSTOP)


class _ToldStore:
    """Passes everything on to `inner`, tells what becomes of its lease, and counts what it applies."""

    def __init__(self, inner: SagaStore, *, tell: _Told, steps: _Steps) -> None:
        self._inner = inner
        self._tell = tell
        self._steps = steps
        self.applied = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def join(self, holder: str, *, works: bool = True) -> Lease:
        lease = await self._inner.join(holder, works=works)
        self._tell("joined", lease.epoch, holder)
        return lease

    async def tend(self, lease: Lease, *, give_up: Collection[int] = ()) -> Holding:
        try:
            return await self._inner.tend(lease, give_up=give_up)
        except Fenced:
            self._tell("refused", "look")
            raise

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        was_stopped, self._steps.was_stopped = self._steps.was_stopped, False
        try:
            result = await self._inner.commit(units, lease=lease)
        except Fenced:
            self._tell("refused", "write")
            raise
        if was_stopped:
            self._tell("wrote")
        self.applied += sum(
            unit.entry is not None and unit.entry.disposition == "applied" and number not in result.conflicts
            for number, unit in enumerate(units)
        )
        return result


async def _main(address: str, receiver_port: int, sabotage: str, tag: str, life: int) -> int:
    try:
        return await _work(address, receiver_port, sabotage, tag, life)
    except BackendUnavailable as error:
        _log.warning("worker %s found no store: %s", tag, error.message)
        return NO_STORE


async def _work(address: str, receiver_port: int, sabotage: str, tag: str, life: int) -> int:
    tell = _Told(tag)
    faults = Faults.from_env()
    steps = _Steps(faults, tell)
    # Every other one is silent, so that messages are decided while older ones lie unread beside them (I9).
    inner = await open_store(address, is_silent=bool(int(tag) % 2), on_step=faults)
    saboteur = Saboteur(sabotage)
    store = _ToldStore(saboteur.store(inner), tell=tell, steps=steps)
    services = {name: f"http://{HOST}:{receiver_port}/{name}" for name in SERVICES}
    target = ServiceTarget(services, timeout_seconds=5.0)
    options = RuntimeOptions(on_step=steps, effect_retry=effect_retry(), lease_seconds=LEASE_SECONDS)
    runtime = SagaRuntime(store, definitions=definitions(), targets=[saboteur.target(target)], options=options)
    decode = msgspec.json.Decoder(_Published).decode

    async def handle(request: Request) -> tuple[int, bytes]:
        match request.path:
            case "/waiting":
                return 200, msgspec.json.encode(await what_waits(store))
            case "/standing":
                parts = [part for part in range(PARTITIONS) if runtime.holds(part)]
                return 200, msgspec.json.encode(Standing(parts, store.applied))
            case "/arm":
                step, _, nth = request.body.decode().rpartition(":")
                faults.kill_at(step, faults.seen[step] + int(nth))
                return 200, b"{}"
        published = decode(request.body)
        message = SagaMessage(published.type, published.payload, id=published.id)
        if saboteur.takes_over(lambda: runtime.publish(message)):
            return 202, msgspec.json.encode({"duplicate": True, "dispositions": ["pending"]})
        answer = await runtime.publish(message)
        if isinstance(answer, PublishRejected):
            status = 503 if answer.retryable else 422
            return status, msgspec.json.encode({"code": answer.code, "message": answer.reason})
        dispositions = [outcome.disposition for outcome in answer.outcomes]
        return 202, msgspec.json.encode({"duplicate": answer.duplicate, "dispositions": dispositions})

    loop = asyncio.get_running_loop()
    # Nobody writes into this pipe: it becomes readable when it ends, and then the nursery and the driver are gone.
    loop.add_reader(life, lambda: os._exit(1))
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_signal_handler(signal.SIGUSR1, steps.stop_when_decided)
    # The door is built first: after start() the loop has a backlog to work off, and nobody would hear of the door.
    server, port = await serve(handle)
    await runtime.start()
    os.write(1, f"ready {tag} {port} {runtime.holder}\n".encode())
    await stopping.wait()
    server.close()
    await runtime.stop()
    await target.close()
    await store.close()
    return 0


def main(address: str, receiver_port: int, sabotage: str) -> None:
    """The nursery of these workers."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    import httpx2

    httpx2.AsyncClient()  # What the target imports late, and with its first client, is there before the first fork.
    serve_births(lambda tag, life: asyncio.run(_main(address, receiver_port, sabotage, tag, life)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *(sys.argv[3:] or [""]))
