"""The process that is killed: a runtime on an embedded store, with a door for messages.

Run as `python -m tests.crash.worker STORE RECEIVER_PORT`; `SAGALOOM_FAULT=step:nth` makes it kill itself at that step.
Its first line is `ready PORT EPOCH`. It stops in order on SIGTERM, and at once when its standard input ends: then the
driver is gone. A store that another process has makes it exit with status 3.
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
from sagaloom.errors import BackendUnavailable
from sagaloom.kv.ownership import OwnerLock
from sagaloom.kv.sqlite import SqliteKeyValue
from sagaloom.messages import SagaMessage
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.receipts import PublishRejected
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.stores.kv import KvSagaStore
from sagaloom.targets.service import ServiceTarget
from sagaloom.testing.faults import Faults
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


async def _main(path: str, receiver_port: int) -> int:
    faults = Faults.from_env()
    kv = await SqliteKeyValue.open(path, on_step=faults)
    store = KvSagaStore(kv, owner=OwnerLock(path))
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
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    try:
        await runtime.start()
    except BackendUnavailable as error:
        print(error.message, file=sys.stderr)
        return EXIT_STORE_IN_USE
    server, port = await serve(handle)
    lease = runtime._lease
    print(f"ready {port} {lease.epoch if lease is not None else 0}", flush=True)
    _end_with(loop, sys.stdin.fileno())
    await stopping.wait()
    server.close()
    await runtime.stop()
    await target.close()
    await store.close()
    return 0


def _end_with(loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
    """Ends this process when the driver's end of the pipe is closed, however that came about."""

    def readable() -> None:
        if not os.read(descriptor, 1):
            os._exit(1)

    loop.add_reader(descriptor, readable)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    sys.exit(asyncio.run(_main(sys.argv[1], int(sys.argv[2]))))
