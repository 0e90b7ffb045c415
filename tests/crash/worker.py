"""The process that is killed: a runtime on an embedded store, with a door for messages.

`python -m tests.crash.worker STORE RECEIVER_PORT` is the nursery that forks it. `SAGALOOM_FAULT=step:nth` makes it kill
itself at that step. Ready, it says on which port and with which epoch. It stops in order on SIGTERM, and at once when
the nursery is gone. A store that another process has makes it exit with status 3.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import Final

import msgspec

from sagaloom.definitions import RetryPolicy
from sagaloom.kv.presence import FilePresence
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.messages import SagaMessage
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.receipts import PublishRejected
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.stores.kv import KvSagaStore
from sagaloom.targets.service import ServiceTarget
from sagaloom.testing.faults import Faults
from tests.crash.nursery import serve_births
from tests.crash.story import definitions
from tests.crash.wire import HOST, Request, serve

__all__ = ["EXIT_STORE_IN_USE", "SERVICES", "Waiting", "effect_retry", "what_waits"]

EXIT_STORE_IN_USE: Final = 3
SERVICES: Final = ("payments", "mail", "carrier")


class Waiting(msgspec.Struct):
    """Whether anything is left to do in a store, now or later."""

    inbox: bool
    outbox: bool
    timers: bool

    def __bool__(self) -> bool:
        return self.inbox or self.outbox or self.timers


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


async def _main(path: str, receiver_port: int, tag: str, life: int) -> int:
    faults = Faults.from_env()
    kv = await SqliteKeyValue.open(path, on_step=faults)
    store = KvSagaStore(kv, presence=FilePresence(path))
    services = {name: f"http://{HOST}:{receiver_port}/{name}" for name in SERVICES}
    target = ServiceTarget(services, timeout_seconds=5.0)
    options = RuntimeOptions(on_step=faults, effect_retry=effect_retry())
    runtime = SagaRuntime(store, definitions=definitions(), targets=[target], options=options)
    decode = msgspec.json.Decoder(_Published).decode

    async def handle(request: Request) -> tuple[int, bytes]:
        if request.path == "/waiting":
            return 200, msgspec.json.encode(await what_waits(store))
        published = decode(request.body)
        answer = await runtime.publish(SagaMessage(published.type, published.payload, id=published.id))
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
    # The door is built first: after start() the loop has a backlog to work off, and nobody would hear of the door.
    server, port = await serve(handle)
    try:
        await runtime.start()
    except StoreInUse as error:
        print(error.message, file=sys.stderr)
        return EXIT_STORE_IN_USE
    os.write(1, f"ready {tag} {port} {await _epoch(kv)}\n".encode())
    await stopping.wait()
    server.close()
    await runtime.stop()
    await target.close()
    await store.close()
    return 0


async def _epoch(kv: SqliteKeyValue) -> int:
    """The epoch of the lease, as the store has it."""
    row = await kv.get(("lease", 0))
    assert row is not None
    _, epoch = msgspec.msgpack.decode(row.value, type=tuple[str, int])
    return epoch


def main(path: str, receiver_port: int) -> None:
    """The nursery of these workers."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    import httpx2

    httpx2.AsyncClient()  # What the target imports late, and with its first client, is there before the first fork.
    serve_births(lambda tag, life: asyncio.run(_main(path, receiver_port, tag, life)))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
