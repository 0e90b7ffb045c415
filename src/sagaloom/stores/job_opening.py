"""Opening the store of job runs, and being seen by those who share it.

The rows carry the number of their schema. Whoever finds none writes it; a newer one is refused, and an older one is
replaced by ours before anything else is written.

Death is known before a lease is over where there is a `Presence`: on one host, by locks that the kernel frees. All who
share a store then show themselves in the same way, for who is not seen is dead.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, Protocol

from sagaloom.errors import BackendUnavailable, ConfigurationError, StoreCorrupt
from sagaloom.ports.keyvalue import Check, Key, KeyValue
from sagaloom.stores.job_commits import JobCommits
from sagaloom.stores.job_rows import PULSE_KEY

__all__ = ["ROUNDS_MAX", "SCHEMA", "OpeningJobs", "Presence"]

SCHEMA: Final = 2
"""1 knew neither cancelled runs nor events."""

ROUNDS_MAX: Final = 32
"""How often somebody else may be faster before we give up."""

_SCHEMA_KEY: Final[Key] = ("job_meta", "schema")
_PROBE_KEY: Final[Key] = ("job_meta", "probe")


class Presence(Protocol):
    """Shows one holder to the others, and them to it; `sagaloom.kv.presence.FilePresence` is one."""

    def enter(self, holder: str) -> None: ...

    def renew(self) -> bool: ...

    def others(self) -> frozenset[str]:
        """The holders that are alive, but for ourselves."""
        ...

    def leave(self) -> None: ...


class OpeningJobs:
    """The part of a `KvJobRunStore` that is opened and closed, and shows itself to others."""

    def __init__(self, kv: KeyValue, *, presence: Presence | None = None) -> None:
        self._kv = kv
        self._commits = JobCommits(kv)
        self._presence = presence
        self._is_open = False

    @property
    def name(self) -> str:
        return self._kv.name

    @property
    def problem(self) -> str | None:
        problem: str | None = getattr(self._kv, "problem", None)
        return problem

    async def open(self) -> None:
        """Reads the marker of the rows, or writes it. Every other method does so by itself."""
        if self._is_open:
            return
        schema = await self._kv.get(_SCHEMA_KEY)
        if schema is None:
            await self._kv.commit(
                checks=[Check(_SCHEMA_KEY, None)], puts=[(_SCHEMA_KEY, str(SCHEMA).encode()), (PULSE_KEY, b"")]
            )
            # Conflicted means that somebody else was faster; either way there is one now.
            schema = await self._kv.get(_SCHEMA_KEY)
        if schema is None or not schema.value.isdigit():
            raise StoreCorrupt(f"{self.name}: row {_SCHEMA_KEY!r} is no marker of job runs")
        if int(schema.value) > SCHEMA:
            raise ConfigurationError(
                f"the job runs in {self.name} were written with schema {int(schema.value)}, this version reads up to "
                f"{SCHEMA}: upgrade sagaloom, or choose another store"
            )
        if int(schema.value) < SCHEMA:
            # The rows are the same, with less in them. Who reads only the older ones must not meet the newer.
            await self._kv.commit(puts=[(_SCHEMA_KEY, str(SCHEMA).encode())])
        self._is_open = True

    async def close(self) -> None:
        await self.leave()
        await self._kv.close()

    # -- being seen ---------------------------------------------------------------------------------------------------

    async def join(self, holder: str) -> None:
        await self.open()
        if self._presence is not None:
            self._presence.enter(holder)

    def stay(self) -> None:
        if self._presence is not None:
            self._presence.renew()

    async def leave(self) -> None:
        if self._presence is not None:
            self._presence.leave()

    async def probe(self) -> None:
        await self.open()
        await self._kv.commit(puts=[(_PROBE_KEY, b"")])

    def _gone(self, holders: Collection[str]) -> frozenset[str]:
        """Those of `holders` that certainly live no more."""
        if self._presence is None or not holders:
            return frozenset()
        return frozenset(holders) - self._presence.others()

    def _too_many_rounds(self, doing: str) -> BackendUnavailable:
        return BackendUnavailable(f"{self.name}: others were faster {ROUNDS_MAX} times while {doing} a job run")
