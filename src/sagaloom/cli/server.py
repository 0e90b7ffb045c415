"""One process that serves: the store, the runtime and the HTTP API, from start to a clean end; or one of the two.

    bind the port ──▶ open the store ──▶ start the runtime ──▶ serve ──signal──▶ stop accepting ──▶ drain ──▶ exit 0
         │ taken: said at once, the store untouched                │ signal again, or 2.8 s: exit at once

Rules: whatever happens after the first signal, the process is gone within 3 seconds. That loses nothing: what was
acknowledged is in the store, and an effect that was under way leaves again under the same key.

What we dislike about it: a function of the host that runs in a thread cannot be interrupted, hence the hard exit.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sagaloom.cli.supervisor import on_supervisors_end
from sagaloom.definitions import SagaDefinition
from sagaloom.errors import ConfigurationError
from sagaloom.ports.targets import EffectTarget
from sagaloom.process import calm_gc
from sagaloom.process import run as run_process
from sagaloom.settings import DoorSettings, StorePlace

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = ["PORT_HINT", "Companion", "Plan", "address_of", "announcer", "listen", "run", "serving", "stop_signals"]

PORT_HINT: Final = "is a server running already? 'sagaloom doctor' looks; --port or PORT chooses another"

_log = logging.getLogger("sagaloom.serve")
_EXIT_SECONDS_MAX: Final = 2.8
_DRAIN_SECONDS: Final = 1.2
_REQUESTS_SECONDS: Final = 1


@dataclass(frozen=True, kw_only=True)
class Companion:
    """A further app of this process, on a socket of its own: the payments service of the demo."""

    app: ASGIApp
    listener: socket.socket


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a serving process needs to know. Without a `listener` there is no API; with `works=False` sagas
    run in other processes on the same store. `announce` is called once it is ready, with the address of the API."""

    settings: DoorSettings
    listener: socket.socket | None
    definitions: Sequence[SagaDefinition[Any]]
    place: StorePlace
    announce: Callable[[str], None]
    targets: Sequence[EffectTarget] = ()
    services: Mapping[str, str] = field(default_factory=dict[str, str])
    companions: Sequence[Companion] = ()
    works: bool = True


def listen(host: str, port: int, *, hint: str) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `ConfigurationError`, ending in `hint`, when it cannot."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # `localhost` is both ::1 and 127.0.0.1, and most clients try the latter.
        family, kind, protocol, _, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    except OSError as error:
        raise ConfigurationError(f"host {host!r} cannot be resolved: {error.strerror or error}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror or error}; {hint}") from error
    listener.setblocking(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL under which `listener` is reached from this machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announcer(text: str, *, as_json: bool, **facts: str) -> Callable[[str], None]:
    """Says on stdout that the process is ready: `text` with its {url}, or a line of JSON, with `facts`."""

    def announce(url: str) -> None:
        event = {"event": "listening", "url": url, **facts} if url else {"event": "working", **facts}
        line = json.dumps(event) if as_json else text.replace("{url}", url)
        print(line, flush=True)

    return announce


def run(plan: Plan) -> None:
    """Serves until SIGTERM or SIGINT. Raises what kept it from starting, or ended it."""
    run_process(_serve(plan))


async def _serve(plan: Plan) -> None:
    from sagaloom.composition import create_durable_saga_runtime
    from sagaloom.runtime import RuntimeOptions
    from sagaloom.service import create_app
    from sagaloom.targets import JobTarget, ServiceTarget

    async with contextlib.AsyncExitStack() as stack:
        stopping = stack.enter_context(stop_signals())
        companions = [
            await stack.enter_async_context(serving(companion.app, companion.listener)) for companion in plan.companions
        ]
        targets, services = list(plan.targets), plan.services or None
        if not any(target.kind == "service" for target in targets):
            # Opened now: the first effect would do it otherwise, and every request would wait for it.
            over_http = ServiceTarget(services)
            over_http.open()
            targets.append(over_http)
            services = None
        if not any(target.kind == "job" for target in targets):
            jobs = JobTarget(token=plan.settings.bearer)
            jobs.open()
            targets.append(jobs)
        for target in targets:
            stack.push_async_callback(target.close)
        durable = await stack.enter_async_context(
            create_durable_saga_runtime(
                "kv" if plan.place.url is None else "sql",
                path=None if plan.place.url is not None else plan.place.kv_path,
                url=plan.place.url,
                definitions=plan.definitions,
                targets=targets,
                services=services,
                options=RuntimeOptions(drain_seconds=_DRAIN_SECONDS, works=plan.works),
            )
        )
        servers = companions
        if plan.listener is not None:
            app = create_app(
                durable.runtime,
                token=plan.settings.bearer,
                requests_per_second=plan.settings.requests_per_second,
            )
            servers = [await stack.enter_async_context(serving(app, plan.listener)), *companions]
        # Those who watch would stay for ever, and the servers wait for them.
        stack.callback(durable.runtime.end_watches)
        calm_gc()
        if not stopping.is_set():
            plan.announce(address_of(plan.listener) if plan.listener is not None else "")
        signalled = asyncio.create_task(stopping.wait())
        await asyncio.wait([signalled, *servers], return_when=asyncio.FIRST_COMPLETED)
        if not signalled.done():
            signalled.cancel()
            raise RuntimeError("the HTTP server ended by itself")


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, listener: socket.socket) -> AsyncGenerator[asyncio.Task[None]]:
    """Serves `app` while inside; on the way out takes no more connections and lets open requests finish."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None]:
            # Signals are ours: uvicorn would end the process by the signal, and there are several servers here.
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            answering.set()

    answering = asyncio.Event()
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=_REQUESTS_SECONDS,
    )
    server = Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    waiting = asyncio.create_task(answering.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            raise RuntimeError("the HTTP server did not start")
        yield task
    finally:
        waiting.cancel()
        server.should_exit = True
        await task


@contextlib.contextmanager
def stop_signals() -> Generator[asyncio.Event]:
    """An event that the first SIGTERM or SIGINT sets, or the end of our supervisor; the second ends the process."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def on_signal(number: int) -> None:
        if stopping.is_set():
            _leave(128 + number, "a second signal: leaving at once; what was under way goes on at the next start")
        stopping.set()
        _log.info("stopping: no more messages are taken, what is under way is finished")
        watchdog = threading.Timer(
            _EXIT_SECONDS_MAX,
            _leave,
            (0, "not everything was finished in time; the rest goes on at the next start, nothing is lost"),
        )
        watchdog.daemon = True
        watchdog.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    on_supervisors_end(lambda: loop.call_soon_threadsafe(on_signal, signal.SIGTERM))
    try:
        yield stopping
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _leave(status: int, why: str) -> None:
    _log.warning(why)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)
