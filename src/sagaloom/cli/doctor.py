"""`sagaloom doctor`: looks at everything a server needs, and says which command repairs what it finds.

It reads and changes nothing. A store is opened only when it is there already, beside a running server or without one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, cast
from urllib.parse import urlsplit

import msgspec

from sagaloom.cli.client import ApiClient, CommandFailed
from sagaloom.errors import ConfigurationError, SagasError
from sagaloom.settings import DEFAULT_KV_PATH, DoorSettings

if TYPE_CHECKING:
    from sagaloom.engine.records import OutboxEffect
    from sagaloom.ports.store import RowRef
    from sagaloom.stores import KvSagaStore

__all__ = ["Finding", "examine"]

_SHOWN_MAX: Final = 5
_LOOKED_AT_MAX: Final = 10_000
_LATE: Final = timedelta(minutes=1)


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. `note` is worth knowing, `broken` makes the command fail."""

    check: str
    status: Literal["ok", "note", "broken"]
    detail: str
    repair: str | None = None


def examine(modules: Sequence[str], settings: DoorSettings, *, url: str) -> list[Finding]:
    """Everything there is to say, in the order in which a server would trip over it."""
    server, is_running = _server(url, settings)
    path = settings.kv_path or DEFAULT_KV_PATH
    return [
        _sqlite(),
        _definitions(modules),
        _backend(),
        *asyncio.run(_store(path, is_there=path.exists(), is_running=is_running)),
        server,
    ]


def _sqlite() -> Finding:
    import apsw

    from sagaloom.kv.sqlite import require_sound_sqlite

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


def _backend() -> Finding:
    from sagaloom.discovery import load_appsettings, resolve_saga_store_backend

    try:
        backend = resolve_saga_store_backend(os.environ, load_appsettings())
    except ConfigurationError as error:
        is_missing = error.message.startswith("Saga store backend is required")
        return Finding(
            check="backend",
            status="note" if is_missing else "broken",
            detail=f"{error.message} Only 'sagaloom dev' starts without." if is_missing else error.message,
            repair="export NETSCRIPT_SAGA_STORE=kv",
        )
    if backend == "sql":
        return Finding(
            check="backend",
            status="broken",
            detail="the sql saga store is not part of this version",
            repair="export NETSCRIPT_SAGA_STORE=kv",
        )
    return Finding(check="backend", status="ok", detail=backend)


async def _store(path: Path, *, is_there: bool, is_running: bool) -> list[Finding]:
    from sagaloom.kv import SqliteKeyValue
    from sagaloom.stores import KvSagaStore

    if not is_there:
        return [
            Finding(
                check="store",
                status="note",
                detail=f"there is no store at {path} yet; the first start makes it",
                repair="for a store elsewhere: export NETSCRIPT_SAGA_KV_PATH=/path/to/sagas.db",
            )
        ]
    try:
        store = KvSagaStore(await SqliteKeyValue.open(path))
    except SagasError as error:
        return [_unusable(path, error)]
    try:
        await store.open()
        return [
            Finding(check="store", status="ok", detail=f"{path} opens, store id {store.store_id}"),
            await _dead_letters(store),
            await _lanes(store),
            await _waiting(store, is_running=is_running),
            await _timers(store, is_running=is_running),
        ]
    except SagasError as error:
        return [_unusable(path, error)]
    finally:
        await store.close()


def _unusable(path: Path, error: SagasError) -> Finding:
    return Finding(
        check="store",
        status="broken",
        detail=error.message,
        repair=f"ls -l {path.parent} && df {path.parent}"
        if error.retryable
        else "restore the file from a backup, or choose another: export NETSCRIPT_SAGA_KV_PATH=/path/to/sagas.db",
    )


async def _dead_letters(store: KvSagaStore) -> Finding:
    letters = await store.dead_letters(limit=_SHOWN_MAX + 1)
    if not letters:
        return Finding(check="dead letters", status="ok", detail="none")
    newest = letters[0]
    count = str(len(letters)) if len(letters) <= _SHOWN_MAX else f"more than {_SHOWN_MAX}"
    return Finding(
        check="dead letters",
        status="broken",
        detail=f"{count}; the newest: {newest.type} of {newest.saga_id}:{newest.key}: {newest.reason}",
        repair=f"sagaloom dead-letters show {newest.id}, then redrive or discard it",
    )


async def _lanes(store: KvSagaStore) -> Finding:
    stalled: list[OutboxEffect] = []
    after: RowRef | None = None
    looked_at = 0
    while looked_at < _LOOKED_AT_MAX and (page := await store.outbox_page(after=after, limit=1_000)):
        stalled += [row.effect for row in page if row.effect.dead_letter_id is not None]
        after, looked_at = page[-1].ref, looked_at + len(page)
    if not stalled:
        return Finding(check="lanes", status="ok", detail=f"none stands still; {looked_at} effects wait to leave")
    first = stalled[0]
    return Finding(
        check="lanes",
        status="broken",
        detail=f"{len(stalled)} stand still behind a dead letter; first {first.saga_id}:{first.key} to "
        f"{first.target_kind}:{first.target_id}: {first.last_error}",
        repair=f"sagaloom dead-letters redrive {first.dead_letter_id}",
    )


async def _waiting(store: KvSagaStore, *, is_running: bool) -> Finding:
    late = datetime.now(UTC) - _LATE
    waiting = [
        row.envelope for row in await store.inbox_page(after=None, limit=1_000) if row.envelope.accepted_at < late
    ]
    if not waiting:
        return Finding(check="inbox", status="ok", detail="no message has waited for more than a minute")
    oldest = min(waiting, key=lambda envelope: envelope.accepted_at)
    said = f": {oldest.last_error}" if oldest.last_error else ""
    return Finding(
        check="inbox",
        status="note",
        detail=f"{len(waiting)} messages wait since {oldest.accepted_at.isoformat(timespec='seconds')} or later, "
        f"first {oldest.type} of {oldest.saga_id}:{oldest.key}, attempt {oldest.attempt}{said}",
        repair=f"sagaloom instances history {oldest.saga_id} {oldest.key}" if is_running else "sagaloom serve MODULE",
    )


async def _timers(store: KvSagaStore, *, is_running: bool) -> Finding:
    late = await store.timers(due_by=datetime.now(UTC) - _LATE, limit=100)
    if not late:
        return Finding(check="timers", status="ok", detail="none is late")
    first = late[0]
    return Finding(
        check="timers",
        status="broken" if is_running else "note",
        detail=f"{len(late)} are late, the first since {first.due_at.isoformat(timespec='seconds')} "
        f"({first.envelope.type} of {first.envelope.saga_id}:{first.envelope.key})",
        repair="restart the server: it fires what is late as it starts"
        if is_running
        else "sagaloom serve MODULE: it fires what is late as it starts",
    )


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
