"""Who writes to a store in PostgreSQL right now: a row for each, believed until a moment of the database's clock.

- One statement every third of a lease renews our row, and asks who else is there and whether anybody has brought
  messages. Whoever cannot renew in time stops by itself before the others may begin to think that it is dead.
- Beside it, on one host, a locked file for each process (`sagaloom.kv.presence`): a killed one loses its lock at
  once, and is seen to be dead without waiting for its lease. Only what was seen there alive, or was found abandoned,
  counts as dead by its file: processes in other containers have other directories.
- Who brings messages to others wakes them: by a pipe on this host, by NOTIFY elsewhere. Both are only nudges. What is
  lost, and what a proxy that pools transactions does not pass on, is found when the lease is renewed.

None of this keeps data safe. The check of the member row in every commit does, whatever is believed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from sagaloom.errors import ConfigurationError, SagasError
from sagaloom.kv.postgres.connection import PostgresDatabase, channel_of
from sagaloom.kv.postgres.driver import InterfaceError, InternalClientError, PostgresError, Row
from sagaloom.kv.presence import FilePresence

__all__ = ["PostgresPresence"]

_log = logging.getLogger("sagaloom.presence")
_TROUBLE_SECONDS: Final = 0.5
_RELISTEN_SECONDS: Final = 5.0
_GOODBYE_SECONDS: Final = 1.0
_REST_SECONDS: Final = 0.005
"""How long after a nudge the next one is not listened for."""

_LOOK: Final = """
    WITH ours AS (
        INSERT INTO @schema@.saga_runtime_worker (holder, host, expires_at)
        SELECT $1, $2, clock_timestamp() + make_interval(secs => $3) WHERE $1 <> ''
        ON CONFLICT (holder) DO UPDATE SET expires_at = excluded.expires_at, host = excluded.host
    ), forgotten AS (
        DELETE FROM @schema@.saga_runtime_worker
        WHERE holder <> $1 AND expires_at < clock_timestamp() - interval '1 hour' AND expires_at > '-infinity'
    )
    SELECT holder, host, NULL AS news
    FROM @schema@.saga_runtime_worker WHERE holder <> $1 AND expires_at > clock_timestamp()
    UNION ALL SELECT NULL, NULL, (SELECT max(s) FROM @schema@.saga_runtime_arrivals)
        + coalesce((SELECT max(id) FROM @schema@.saga_runtime_left), 0)
"""
_LEAVE: Final = "DELETE FROM @schema@.saga_runtime_worker WHERE holder = $1"
_NOTIFY: Final = "SELECT pg_notify($1, '')"


class PostgresPresence:
    """The presence of one writer; a `Presence` of `sagaloom.stores.tenure`."""

    def __init__(
        self,
        database: PostgresDatabase,
        *,
        lease_seconds: float = 6.0,
        files: FilePresence | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._lease_seconds = lease_seconds
        self._files = files
        self._monotonic = monotonic
        self._host = socket.gethostname()
        self._holder = ""
        self._believed_until = 0.0
        self._living: dict[str, str] = {}
        """Who else lives, by the database's word, and on which host."""
        self._seen_here: set[str] = set()
        self._news: int | None = None
        self.may_have_left = True
        """Whether somebody may have left messages in a transaction of theirs, since this was last set to False. Those
        are told by NOTIFY only, which may be lost, and by the news."""
        self._on_nudge: Callable[[], None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._notifying: asyncio.Task[None] | None = None
        self._channel = channel_of(database.schema)

    @staticmethod
    def on_this_host(store_id: str, *, lease_seconds: float) -> FilePresence | None:
        """The files of a store's processes on this host; None where they cannot be written."""
        directory = Path(tempfile.gettempdir()) / f"sagaloom-{os.getuid() if hasattr(os, 'getuid') else 'workers'}"
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            _log.warning("%s cannot be made (%s): a killed worker is noticed when its lease is over", directory, error)
            return None
        return FilePresence(directory / store_id, lease_seconds=lease_seconds)

    # -- what the tenure asks -------------------------------------------------------------------------------------

    def enter(self, holder: str) -> None:
        self.leave()
        self._holder = holder
        if self._files is not None:
            try:
                self._files.enter(holder)
            except ConfigurationError as error:
                _log.warning("%s: a killed worker is noticed when its lease is over", error.message)
                self._files = None
        self._tasks = [asyncio.create_task(self._renew_for_ever(), name="sagaloom-presence")]

    async def look(self) -> None:
        """Renews our row, and reads who else is there."""
        sent_at = self._monotonic()
        rows = await self._database.write(
            self._database.sql(_LOOK), self._holder, self._host, float(self._lease_seconds)
        )
        if self._holder:
            # Well before the others stop believing, by a clock that began before theirs.
            self._believed_until = sent_at + self._lease_seconds * 5 / 6
        self._take(rows)

    async def goodbye(self) -> None:
        """Takes our row away, so that nobody waits for us."""
        holder = self._holder
        self.leave()
        if holder:
            # When it does not get there, the lease ends by itself.
            with contextlib.suppress(SagasError, TimeoutError):
                async with asyncio.timeout(_GOODBYE_SECONDS):
                    await self._database.write(self._database.sql(_LEAVE), holder)

    def renew(self) -> bool:
        is_seen = self._files is None or self._files.renew()
        return self._monotonic() < self._believed_until and is_seen

    def others(self) -> frozenset[str]:
        if self._files is None:
            return frozenset(self._living)
        here = self._files.others()
        self._seen_here |= here | self._files.buried
        dead = self._seen_here - here
        return frozenset((self._living.keys() | here) - dead)

    def nudge(self) -> None:
        if self._files is not None:
            self._files.nudge()
        if self._living.keys() - self._seen_here and (self._notifying is None or self._notifying.done()):
            self._notifying = asyncio.create_task(self._notify(), name="sagaloom-notify")

    def listen(self, on_nudge: Callable[[], None]) -> bool:
        self._on_nudge = on_nudge
        if self._files is not None:
            self._files.listen(on_nudge, rest_seconds=_REST_SECONDS)
        if not self._database.is_pooled and self._database.url is not None:
            self._tasks.append(asyncio.create_task(self._listen_for_ever(), name="sagaloom-listen"))
        return True

    def leave(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        self._holder = ""
        self._believed_until = 0.0
        self._on_nudge = None
        if self._files is not None:
            self._files.leave()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _take(self, rows: list[Row]) -> None:
        self._living = {row["holder"]: row["host"] for row in rows if row["holder"] is not None}
        news, before = rows[-1]["news"], self._news
        self._news = news
        if news != before:
            self.may_have_left = True
            if before is not None and self._on_nudge is not None:
                self._on_nudge()

    async def _renew_for_ever(self) -> None:
        pause = self._lease_seconds / 3
        while True:
            await asyncio.sleep(pause)
            try:
                await self.look()
                pause = self._lease_seconds / 3
            except SagasError as error:
                _log.debug("the lease cannot be renewed: %s", error.message)
                pause = min(_TROUBLE_SECONDS, self._lease_seconds / 6)

    async def _notify(self) -> None:
        with contextlib.suppress(SagasError):
            await self._database.write(_NOTIFY, self._channel)

    async def _listen_for_ever(self) -> None:
        """Keeps a connection that is told when somebody has brought something."""
        while True:
            try:
                connection = await self._database.connect()
            except SagasError as error:
                _log.debug("cannot listen: %s", error.message)
                await asyncio.sleep(_RELISTEN_SECONDS)
                continue
            ended = asyncio.Event()
            connection.add_termination_listener(_setting(ended))
            try:
                await connection.add_listener(self._channel, self._notified)
                await ended.wait()
            except (PostgresError, InterfaceError, InternalClientError, OSError) as error:
                _log.debug("cannot listen: %s", error)
                await asyncio.sleep(_RELISTEN_SECONDS)
            finally:
                connection.terminate()

    def _notified(self, *_: Any) -> None:
        self.may_have_left = True
        if self._on_nudge is not None:
            self._on_nudge()


def _setting(event: asyncio.Event) -> Callable[[Any], None]:
    return lambda _: event.set()
