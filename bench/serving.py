"""A server process that lines 4 and 8 put to work: the HTTP API as `sagaloom serve` has it, on a free port.

    python -m bench.serving durable|instant|echo FILE

`durable` is the real thing; `instant` is the same app, route and runtime over a store that returns at once; `echo` is
the same app and route over a runtime whose `publish` returns at once. It answers each line it is sent with one of JSON:
`start` begins to measure, `stop` waits until inbox and outbox are empty and says what was used since. The end of its
input ends it.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn

from bench.workload import Counted, CountingStore, account, open_runtime, order, receiver
from sagaloom.kv import MemoryKeyValue
from sagaloom.ports.store import CommitResult, Lease, Loaded, UnitOfWork
from sagaloom.process import calm_gc, run
from sagaloom.runtime import Outcome, PublishReceipt, PublishRejected, SagaRuntime
from sagaloom.service import create_app

_Parts = tuple[SagaRuntime, CountingStore | None, Counted | None]


class _InstantStore(CountingStore):
    """A store that has forgotten everything when it returns, which is at once. What a publisher needs to see of an
    order between its three messages, the runtime remembers."""

    _numbers = 1

    async def load(self, keys: Sequence[tuple[str, str]], *, parts: Collection[int] | None = None) -> list[Loaded]:
        return [Loaded(None, None)] * len(keys)

    async def commit(self, units: Sequence[UnitOfWork], *, lease: Lease) -> CommitResult:
        self.commits += 1
        self.commits_with_messages += any(unit.instance is not None for unit in units)
        first = self._numbers
        self._numbers += sum([len(unit.outbox_add) for unit in units])
        return CommitResult({}, first, first, 0)


class _EchoRuntime(SagaRuntime):
    """Knows what a publish is answered with, and does nothing for it."""

    _receipt = PublishReceipt(
        message_id="0123456789ab0123456789abcdef0123",
        message_type="OrderPlaced",
        correlation_key=None,
        outcomes=(
            Outcome(
                message_id="0123456789ab0123456789abcdef0123",
                instance_id="bench-order:o-00000000-00000",
                saga_id="bench-order",
                correlation_key="o-00000000-00000",
                run=1,
                disposition="applied",
                status="running",
                revision=1,
            ),
        ),
    )

    async def publish(
        self, message: object, options: Mapping[str, Any] | None = None, *, wait: Any = None, **overrides: Any
    ) -> PublishReceipt | PublishRejected:
        return self._receipt


@asynccontextmanager
async def _runtime_of(mode: str, path: Path) -> AsyncGenerator[_Parts]:
    if mode == "durable":
        async with open_runtime(path) as parts:
            yield parts
    else:
        store = _InstantStore(MemoryKeyValue())
        make = _EchoRuntime if mode == "echo" else SagaRuntime
        async with make(store, definitions=[order, account], targets=[receiver()]) as runtime:
            yield runtime, store, None


def _waited_for_cpu() -> float:
    """Seconds that this process could have run but had no processor, as far as the kernel says."""
    try:
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _used(parts: _Parts) -> dict[str, float]:
    _, store, kv = parts
    return {
        "cpu": time.process_time(),
        "waited": _waited_for_cpu(),
        "statements": kv.statements if kv is not None else 0,
        "commits": store.commits_with_messages if store is not None else 0,
    }


async def _obey(parts: _Parts) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    before: dict[str, float] = {}
    began = 0.0
    while line := await reader.readline():
        answer: dict[str, float]
        if line.strip() == b"start":
            calm_gc()
            before, began = _used(parts), time.monotonic()
            answer = {"at": began}
        else:
            await parts[0].settled(60)
            ended = time.monotonic()
            answer = {name: used - before[name] for name, used in _used(parts).items()}
            answer |= {"at": ended, "wall": ended - began}
        print(json.dumps(answer), flush=True)


async def _main(mode: str, path: Path) -> None:
    async with _runtime_of(mode, path) as parts:
        # With the protocol named, or asyncio does not set TCP_NODELAY and answers wait 40 ms for an acknowledgement.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        listener.listen(256)
        config = uvicorn.Config(create_app(parts[0]), access_log=False, log_config=None, server_header=False)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        # Connections that come before it is up wait in the listener's backlog.
        print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
        await _obey(parts)
        server.should_exit = True
        await serving


if __name__ == "__main__":
    run(_main(sys.argv[1], Path(sys.argv[2])))
