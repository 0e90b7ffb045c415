"""`sagaloom doctor`: looks at everything a server needs, and says which command repairs what it finds.

It reads and changes nothing. A store is opened only when it is there already, beside a running server or without one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Literal, cast
from urllib.parse import urlsplit

from sagaloom.cli.client import ApiClient, CommandFailed
from sagaloom.cli.looking import CannotLook, opened_to_look
from sagaloom.cli.store_checks import Finding, look_into
from sagaloom.errors import ConfigurationError, SagasError
from sagaloom.settings import DEFAULT_KV_PATH, DoorSettings, StorePlace

__all__ = ["Finding", "examine"]


def examine(modules: Sequence[str], settings: DoorSettings, *, url: str) -> list[Finding]:
    """Everything there is to say, in the order in which a server would trip over it."""
    server, is_running = _server(url, settings)
    backend, is_sql = _backend()
    return [
        _sqlite(),
        _definitions(modules),
        backend,
        *asyncio.run(_store(settings, is_sql=is_sql, is_running=is_running)),
        server,
    ]


def _sqlite() -> Finding:
    import apsw

    from sagaloom.kv.sqlite_driver import require_sound_sqlite

    version = apsw.sqlite_lib_version()
    try:
        require_sound_sqlite(version)
    except ConfigurationError as error:
        return Finding(
            check="sqlite", status="broken", detail=error.message, repair="python -m pip install --upgrade apsw"
        )
    return Finding(check="sqlite", status="ok", detail=f"SQLite {version}, through apsw {apsw.apsw_version()}")


def _definitions(modules: Sequence[str]) -> Finding:
    from sagaloom.registry import load_modules, named_modules

    try:
        named = named_modules(modules)
    except ConfigurationError as error:
        return Finding(
            check="definitions",
            status="note",
            detail=error.message,
            repair="name your modules: sagaloom doctor MODULE; 'sagaloom dev' serves the demo sagas",
        )
    try:
        loaded = load_modules(named)
    except SagasError as error:
        return Finding(
            check="definitions", status="broken", detail=error.message, repair="correct the module, and run this again"
        )
    names = ", ".join(definition.id for definition in loaded.definitions)
    return Finding(check="definitions", status="ok", detail=f"{names} from {', '.join(loaded.modules)}")


def _backend() -> tuple[Finding, bool]:
    """Which store is chosen, and whether that is one in a database."""
    from sagaloom.discovery import load_appsettings, resolve_saga_store_backend

    try:
        backend = resolve_saga_store_backend(os.environ, load_appsettings())
    except ConfigurationError as error:
        is_missing = error.message.startswith("Saga store backend is required")
        finding = Finding(
            check="backend",
            status="note" if is_missing else "broken",
            detail=f"{error.message} Only 'sagaloom dev' starts without." if is_missing else error.message,
            repair="export NETSCRIPT_SAGA_STORE=kv",
        )
        return finding, False
    return Finding(check="backend", status="ok", detail=backend), backend == "sql"


async def _store(settings: DoorSettings, *, is_sql: bool, is_running: bool) -> list[Finding]:
    if is_sql and settings.database_url is None:
        return [
            Finding(
                check="store",
                status="broken",
                detail="the sql saga store has no address",
                repair="export DATABASE_URL=postgresql://user:password@host:5432/database",
            )
        ]
    url = settings.database_url.get_secret_value() if is_sql and settings.database_url is not None else None
    place = StorePlace(kv_path=settings.kv_path or DEFAULT_KV_PATH, url=url)
    try:
        async with opened_to_look(place) as store:
            said = "opens" if url is None else "answers"
            return [
                Finding(check="store", status="ok", detail=f"{place} {said}, store id {store.store_id}"),
                *await look_into(store, is_running=is_running),
            ]
    except CannotLook as error:
        status: Literal["note", "broken"] = "note" if error.is_absent else "broken"
        return [Finding(check="store", status=status, detail=error.message, repair=error.repair)]


def _server(url: str, settings: DoorSettings) -> tuple[Finding, bool]:
    """What listens at `url`, and whether that is a saga service."""
    token = settings.token.get_secret_value() if settings.token is not None else None
    try:
        with ApiClient(url, token, timeout_seconds=5.0) as api:
            status, answer = api.answers("//health/ready")
    except CommandFailed as error:
        if "no server answers" in error.message:
            return Finding(
                check="server", status="note", detail=f"{url} is free: none runs", repair="sagaloom dev"
            ), False
        port = urlsplit(url).port or 80
        return (
            Finding(
                check="server",
                status="broken",
                detail=f"{error.message}",
                repair=f"see who has the port: ss -ltnp 'sport = :{port}'; or serve on another: --port {port + 1}",
            ),
            False,
        )
    if status == 401:
        return (
            Finding(
                check="server",
                status="broken",
                detail=f"{url} wants a token, and not this one" if token else f"{url} wants a token",
                repair="export SAGALOOM_TOKEN=..., the one it was started with",
            ),
            True,
        )
    checks = cast("dict[str, object]", answer).get("checks") if isinstance(answer, dict) else None
    if not isinstance(checks, dict):
        port = urlsplit(url).port or 80
        return (
            Finding(
                check="server",
                status="broken",
                detail=f"{url} answers {status}, and is no saga service",
                repair=f"see who has the port: ss -ltnp 'sport = :{port}'; or serve on another: --port {port + 1}",
            ),
            False,
        )
    if status == 200:
        return Finding(check="server", status="ok", detail=f"{url} answers, and is ready"), True
    wrong = ", ".join(f"{name}: {found}" for name, found in cast("dict[str, object]", checks).items() if found != "ok")
    return (
        Finding(
            check="server",
            status="broken",
            detail=f"{url} answers, and is not ready: {wrong}",
            repair="its log says why; a restart loses nothing",
        ),
        True,
    )
