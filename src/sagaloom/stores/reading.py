"""Opening a key-value saga store, and what the runtime reads of it.

A store says in its first rows which schema it has and which store it is. Whoever opens an empty one writes them, unless
it only looks; one of a newer schema is refused, and one of an older schema is marked with ours before anything else is
written, for rows may follow that an older program cannot read.

What `load` and the pages of rows read is learned as well (`sagaloom.stores.beliefs`), unless a commit has ended in
between: what was read then may be older than what is believed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Sequence
from datetime import datetime
from typing import Final, TypeVar

from sagaloom.engine.records import (
    Envelope,
    HeldSlot,
    Instance,
    Mark,
    OutboxEffect,
    PendingTimer,
    ScheduleCursor,
    Timer,
)
from sagaloom.errors import ConfigurationError, SagasError, StoreCorrupt
from sagaloom.ports.keyvalue import Check, Committed, Conflicted, Entry, Key, KeyValue
from sagaloom.ports.store import InboxRow, Loaded, OutboxRow, RegisteredDefinition, RowRef
from sagaloom.stores.beliefs import Beliefs
from sagaloom.stores.rows import (
    all_below,
    decode_cursor,
    decode_definition,
    decode_effect,
    decode_envelope,
    decode_head,
    decode_instance,
    decode_mark,
    decode_slot,
    decode_timer,
    decoded,
    head_key,
    mark_key,
    micros,
    ref_of,
    timer_key,
)

__all__ = ["SCHEMA", "ReadingStore"]

SCHEMA: Final = 2
"""Since 2 a feed row has a record for each message; before, it had every event. Rows of both are read."""

_PAGE: Final = 256

_SCHEMA_KEY: Final[Key] = ("meta", "schema")
_STORE_ID_KEY: Final[Key] = ("meta", "store_id")

_R = TypeVar("_R")


class ReadingStore:
    """The part of a `KvSagaStore` that is opened, and read by the runtime."""

    def __init__(self, kv: KeyValue, *, reads_only: bool = False) -> None:
        self._kv = kv
        self._reads_only = reads_only
        """Whether we only look, and leave the marker of an empty store, or of an older schema, as it is."""
        self._store_id = ""
        self._problem: str | None = None
        self._beliefs = Beliefs(kv)

    @property
    def store_id(self) -> str:
        """Known after the first awaited call; `open()` is one that does nothing else."""
        if not self._store_id:
            raise ConfigurationError(
                f"{self._kv.name} has not been opened: await store.open() or store.acquire() first"
            )
        return self._store_id

    @property
    def problem(self) -> str | None:
        problem: str | None = self._problem or getattr(self._kv, "problem", None)
        return problem

    async def open(self) -> None:
        """Reads the store's marker, or writes it into an empty store. Every other method does so by itself."""
        if self._store_id:
            return
        schema, store_id = await self._kv.get_many([_SCHEMA_KEY, _STORE_ID_KEY])
        if schema is None and not self._reads_only:
            await self._commit_kv(
                checks=[Check(_SCHEMA_KEY, None)],
                puts=[(_SCHEMA_KEY, str(SCHEMA).encode()), (_STORE_ID_KEY, uuid.uuid4().hex.encode())],
            )
            # Conflicted means that somebody else was faster; either way there is one now.
            schema, store_id = await self._kv.get_many([_SCHEMA_KEY, _STORE_ID_KEY])
        if schema is None or store_id is None or not schema.value.isdigit():
            raise StoreCorrupt(f"{self._kv.name}: rows {_SCHEMA_KEY!r} and {_STORE_ID_KEY!r} are no store's marker")
        if int(schema.value) > SCHEMA:
            raise ConfigurationError(
                f"{self._kv.name} was written with schema {int(schema.value)}, this version reads up to {SCHEMA}: "
                "upgrade sagaloom, or choose another store"
            )
        if int(schema.value) < SCHEMA and not self._reads_only:
            # From here on rows may come that an older program cannot read. When somebody else was faster, it is done.
            await self._commit_kv(
                checks=[Check(_SCHEMA_KEY, schema.versionstamp)], puts=[(_SCHEMA_KEY, str(SCHEMA).encode())]
            )
        self._store_id = store_id.value.decode()

    # -- what the runtime reads ---------------------------------------------------------------------------------------

    async def load(self, keys: Sequence[tuple[str, str]], *, parts: Collection[int] | None = None) -> list[Loaded]:
        await self.open()
        generation = self._beliefs.generation
        head_rows = await self._kv.get_many([head_key(*key) for key in keys])
        heads = [None if row is None else decoded(self._kv, row, decode_head) for row in head_rows]
        wanted: list[Key] = [
            ("state", head.pk, head.run)
            for head in heads
            if head is not None and head.run and (parts is None or head.part in parts)
        ]
        rows = iter(await self._kv.get_many(wanted) if wanted else ())
        loaded: list[Loaded] = []
        believed = generation == self._beliefs.generation
        for head_row, head in zip(head_rows, heads, strict=True):
            instance: Instance | None = None
            if head is not None and head_row is not None:
                if believed:
                    self._beliefs.heads[head_row.key] = (head_row.versionstamp, head)
                if head.run and (parts is None or head.part in parts) and (row := next(rows)) is not None:
                    instance = decoded(self._kv, row, decode_instance)
                    if believed:
                        self._beliefs.learn_instance(instance)
            loaded.append(Loaded(head, instance))
        self._beliefs.bound()
        return loaded

    async def load_run(self, saga_id: str, key: str, run: int) -> Instance | None:
        await self.open()
        head = await self._read(head_key(saga_id, key), decode_head)
        return None if head is None else await self._read(("state", head.pk, run), decode_instance)

    async def slots(self, saga_id: str, *, key: str | None = None, limit: int = 1_000) -> list[HeldSlot]:
        await self.open()
        prefix: Key = ("slot", saga_id) if key is None else ("slot", saga_id, key)
        return [decoded(self._kv, row, decode_slot) for row in await self._kv.scan(prefix, limit=limit)]

    async def marks(self, wanted: Sequence[tuple[int, str]]) -> list[Mark | None]:
        await self.open()
        return await self._read_many([mark_key(*pair) for pair in wanted], decode_mark)

    async def inbox_page(self, *, after: RowRef | None, limit: int) -> list[InboxRow]:
        return [
            InboxRow(ref_of(row), decoded(self._kv, row, decode_envelope))
            for row in await self._waiting(("inbox",), after, limit)
        ]

    async def inbox_rows(self, refs: Sequence[RowRef]) -> list[Envelope | None]:
        await self.open()
        return await self._read_many([("inbox", *ref) for ref in refs], decode_envelope)

    async def outbox_page(
        self, *, after: RowRef | None, limit: int, parts: Collection[int] | None = None
    ) -> list[OutboxRow]:
        rows: list[Entry] = []
        if parts is None:
            rows = await self._waiting(("outbox",), after, limit)
        else:
            for part in sorted(parts):
                if len(rows) < limit and (after is None or part >= after.part):
                    rows += await self._waiting(("outbox", part), after, limit - len(rows))
        return [OutboxRow(ref_of(row), decoded(self._kv, row, decode_effect)) for row in rows]

    async def outbox_rows(self, refs: Sequence[RowRef]) -> list[OutboxEffect | None]:
        await self.open()
        return await self._read_many([("outbox", *ref) for ref in refs], decode_effect)

    async def timers(
        self, *, due_by: datetime | None = None, after: PendingTimer | None = None, limit: int = 100
    ) -> list[Timer]:
        await self.open()
        generation = self._beliefs.generation
        rows = await self._kv.scan(
            ("timer",),
            after=None if after is None else timer_key(after),
            before=None if due_by is None else ("timer", micros(due_by) + 1),
            limit=limit,
        )
        self._beliefs.learn_rows(rows, generation)
        return [decoded(self._kv, row, decode_timer) for row in rows]

    async def timer(self, timer_id: str) -> Timer | None:
        # An index would be a write more for each timer, for what operators seldom ask.
        await self.open()
        after: Key | None = None
        while rows := await self._kv.scan(("timer",), after=after, limit=_PAGE):
            for row in rows:
                if row.key[-1] == timer_id:
                    return decoded(self._kv, row, decode_timer)
            after = rows[-1].key
        return None

    async def schedule_cursors(self) -> list[ScheduleCursor]:
        await self.open()
        return [decoded(self._kv, row, decode_cursor) for row in await all_below(self._kv, ("schedule",))]

    async def definitions(self) -> list[RegisteredDefinition]:
        await self.open()
        return [decoded(self._kv, row, decode_definition) for row in await all_below(self._kv, ("definition",))]

    async def _waiting(self, prefix: Key, after: RowRef | None, limit: int) -> list[Entry]:
        await self.open()
        generation = self._beliefs.generation
        # A bound outside the prefix is no bound: a partition behind that of `after` is read from its beginning.
        is_elsewhere = after is None or prefix[1:2] not in ((), (after.part,))
        past: Key | None = None if after is None or is_elsewhere else (*prefix[:1], *after)
        rows = await self._kv.scan(prefix, after=past, limit=limit)
        self._beliefs.learn_rows(rows, generation)
        return rows

    # -- rows ---------------------------------------------------------------------------------------------------------

    async def _read(self, key: Key, decode: Callable[[bytes], _R]) -> _R | None:
        row = await self._kv.get(key)
        return None if row is None else decoded(self._kv, row, decode)

    async def _read_many(self, keys: Sequence[Key], decode: Callable[[bytes], _R]) -> list[_R | None]:
        rows = await self._kv.get_many(keys) if keys else []
        return [None if row is None else decoded(self._kv, row, decode) for row in rows]

    async def _commit_kv(
        self,
        *,
        checks: Sequence[Check] = (),
        inserts: Sequence[tuple[Key, bytes]] = (),
        puts: Sequence[tuple[Key, bytes]] = (),
        deletes: Sequence[Key] = (),
        reserve: dict[str, int] | None = None,
    ) -> Committed | Conflicted:
        try:
            done = await self._kv.commit(checks=checks, inserts=inserts, puts=puts, deletes=deletes, reserve=reserve)
        except SagasError as error:
            self._problem = error.message
            raise
        self._problem = None
        return done
