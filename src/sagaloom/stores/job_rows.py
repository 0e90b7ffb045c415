"""The rows of the key-value store of job runs: their keys, and how their values are read and written.

The first part of a key names its table; times are microseconds since 1970:

    job_run      run id                                      JobRun
    job_ready    job id, 100 - priority, due, run id         empty: runs that are due, in the order of their claim
    job_later    due, run id                                 job id and priority of a run that is not due yet
    job_claim    run id                                      (holder, epoch, expires, whether it was asked to end)
    job_dedupe   job id, hash of the idempotency key         (run id, digest of the payload)
    job_index    job id, status, run id                      empty; moved when a run's status changes
    job_seen     job id                                      empty: which jobs have runs
    job_reply    due, run id                                 empty: runs whose end a saga has not heard of
    job_event    number                                      JobEvent: what happened, to whichever run
    job_schedule job id                                      ScheduleCursor
    job_meta     "schema", "pulse"
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

import msgspec

from sagaloom.engine.records import ScheduleCursor
from sagaloom.ports.jobs import PRIORITY_MAX, JobEvent, JobRun
from sagaloom.ports.keyvalue import Entry, Key, Slot
from sagaloom.stores.rows import encode, micros

EVENT_COUNTER: Final = "job_event"
PULSE_KEY: Final[Key] = ("job_meta", "pulse")
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class ClaimRow(NamedTuple):
    holder: str
    epoch: int
    expires: int
    is_cancelled: bool = False
    """The run was asked to end."""


class LaterRow(NamedTuple):
    job_id: str
    priority: int


class DedupeRow(NamedTuple):
    run_id: str
    digest: bytes


decode_run = msgspec.msgpack.Decoder(JobRun).decode
decode_claim = msgspec.msgpack.Decoder(ClaimRow).decode
decode_later = msgspec.msgpack.Decoder(LaterRow).decode
decode_event = msgspec.msgpack.Decoder(JobEvent).decode
decode_cursor = msgspec.msgpack.Decoder(ScheduleCursor).decode
decode_dedupe = msgspec.msgpack.Decoder(DedupeRow).decode


def canonical(payload: bytes) -> bytes:
    """The same bytes for the same JSON value, however its keys are ordered and its text is laid out."""
    return msgspec.json.encode(msgspec.json.decode(payload), order="deterministic")


def run_key(run_id: str) -> Key:
    return "job_run", run_id


def index_key(run: JobRun) -> Key:
    return "job_index", run.job_id, run.status, run.run_id


def ready_key(job_id: str, priority: int, due: int, run_id: str) -> Key:
    return "job_ready", job_id, PRIORITY_MAX - priority, due, run_id


def ready_row(run: JobRun) -> tuple[Key, bytes]:
    return ready_key(run.job_id, run.priority, micros(run.due_at), run.run_id), b""


def later_row(run: JobRun) -> tuple[Key, bytes]:
    return ("job_later", micros(run.due_at), run.run_id), encode(LaterRow(run.job_id, run.priority))


def reply_row(run: JobRun) -> tuple[Key, bytes]:
    """The row of a reply that is due."""
    assert run.reply is not None
    return ("job_reply", micros(run.reply.due_at), run.run_id), b""


def event_rows(events: Sequence[JobEvent]) -> list[tuple[Key, bytes]]:
    """Inserts for events, whose numbers the commit gives."""
    return [(("job_event", Slot(EVENT_COUNTER, offset)), encode(event)) for offset, event in enumerate(events)]


def dedupe_key(job_id: str, idempotency_key: str) -> Key:
    return "job_dedupe", job_id, hashlib.blake2b(idempotency_key.encode(), digest_size=16).digest()


def moment_of(since_1970: int | None) -> datetime | None:
    return None if since_1970 is None else _EPOCH + timedelta(microseconds=since_1970)


def number_at(row: Entry, position: int) -> int:
    part = row.key[position]
    assert isinstance(part, int)
    return part


def text_at(row: Entry, position: int) -> str:
    part = row.key[position]
    assert isinstance(part, str)
    return part
