"""A process that runs workflows of three steps with Restate, for line 5.

    python -m bench.peers.restate_steps PLACE

It has a Restate server of its own, with its files in the directory PLACE, and the process that works for it
(`restate_app.py`), and is itself the client that calls them over HTTP. It answers each line it is sent with one of
JSON: `run FORM IN_FLIGHT COUNT` runs COUNT workflows, IN_FLIGHT of them side by side, and says how many seconds that
took. FORM is `Service` or `Workflow`: Restate has both. Without the server or the SDK its first line is
`{"missing": "..."}`, else `{"version": "..."}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.servers.server import free_port

_HERE = Path(__file__).parent
_MACHINE = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
_PACKAGE = f"restate-server-{sys.platform}-{_MACHINE}"
_SERVER = Path(sys.prefix) / "restate" / "node_modules" / "@restatedev" / _PACKAGE / "bin" / "restate-server"
_PYTHON = Path(sys.prefix) / "restate-sdk" / "bin" / "python"
_START_SECONDS_MAX = 60.0

_CONFIG = """
base-dir = "{place}/data"
cluster-name = "bench"
node-name = "one"
listen-mode = "tcp"
bind-address = "127.0.0.1:{node}"
advertised-address = "http://127.0.0.1:{node}/"
disable-telemetry = true
log-filter = "warn"
[admin]
bind-address = "127.0.0.1:{admin}"
[ingress]
bind-address = "127.0.0.1:{ingress}"
"""


class _Connection:
    """One keep-alive connection with one request under way."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: bytes) -> bytes:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        writer.write(f"{head}\r\n\r\n".encode() + body)
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        sizes = [int(header.partition(b":")[2]) for header in headers if header.startswith(b"content-length:")]
        answer = await reader.readexactly(sizes[0]) if sizes else b""
        if not status.startswith((b"http/1.1 200", b"http/1.1 201")):
            raise RuntimeError(f"Restate answered {path} with {status.decode()}: {answer[:300]!r}")
        return answer

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


@asynccontextmanager
async def _serving(place: Path) -> AsyncGenerator[int]:
    """The port of a server that has our workflows registered."""
    node, admin, ingress, endpoint = (free_port() for _ in range(4))
    config = place / "restate.toml"
    config.write_text(_CONFIG.format(place=place, node=node, admin=admin, ingress=ingress))
    app = [str(_PYTHON), "-m", "hypercorn", "--bind", f"127.0.0.1:{endpoint}", "restate_app:app"]
    commands = ([str(_SERVER), "--no-logo", "--config-file", str(config)], app)
    with (place / "restate.log").open("wb") as log:
        processes = [subprocess.Popen(each, cwd=_HERE, stdout=log, stderr=log) for each in commands]  # noqa: ASYNC220
        try:
            await _registered(admin, endpoint)
            yield ingress
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


async def _registered(admin: int, endpoint: int) -> None:
    deadline = time.monotonic() + _START_SECONDS_MAX
    body = json.dumps({"uri": f"http://127.0.0.1:{endpoint}"}).encode()
    while True:
        connection = _Connection(admin)
        try:
            await connection.post("/deployments", body)
        except (OSError, EOFError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)
        else:
            return
        finally:
            connection.close()


async def _run(port: int, form: str, in_flight: int, count: int, name: str) -> None:
    left = iter(range(count))

    async def worker() -> None:
        connection = _Connection(port)
        with contextlib.closing(connection):
            for number in left:
                order_id = f"o-{name}-{number}"
                path = "/Plain/run" if form == "Service" else f"/Order/{order_id}/run"
                await connection.post(path, json.dumps(order_id).encode())

    await asyncio.gather(*(worker() for _ in range(in_flight)))


async def _main(place: Path) -> None:
    for needed, what in ((_SERVER, "the server of Restate"), (_PYTHON, "its SDK")):
        if not os.access(needed, os.X_OK):
            print(json.dumps({"missing": f"{what} is not at {needed}: make bench installs it where there is npm"}))
            return
    asked = [str(_SERVER), "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()  # noqa: ASYNC221
    async with _serving(place) as port:
        print(json.dumps({"version": version}), flush=True)
        loop = asyncio.get_running_loop()
        for name in itertools.count():
            line = await loop.run_in_executor(None, sys.stdin.readline)
            if not line:
                return
            _, form, in_flight, count = line.split()
            began = time.perf_counter()
            await _run(port, form, int(in_flight), int(count), str(name))
            print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
