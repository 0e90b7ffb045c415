"""What a job runtime and the processes of its pool say to each other: frames of msgpack over a socket of two ends.

    runtime ──Hello────────▶ process        once, and answered by an empty Said
            ──Task─────────▶                one at a time
            ──Stop─────────▶                the run was asked to end
            ◀──Said─────────                as often as the handler speaks
            ◀──Done─────────                how the run is to be settled

The end of the socket ends both: a process whose runtime was killed must not go on with a run that another takes over.
"""

from __future__ import annotations

import struct
from datetime import datetime
from typing import Final, TypeAlias

import msgspec

from sagaloom.ports.jobs import Cancelled, Failed, JobRun, Released, Retried, Settlement, Succeeded

__all__ = ["HEAD", "Done", "FromProcess", "Hello", "Said", "Stop", "Task", "ToProcess", "pack", "read_from", "read_to"]

HEAD: Final = struct.Struct("!I")


class Hello(msgspec.Struct, tag=True):
    """Where the modules of jobs are found."""

    path: list[str]


class Task(msgspec.Struct, tag=True, kw_only=True):
    """One attempt: the job `run.job_id` of a module, or of a file where the module has no name of its own."""

    module: str
    file: str | None
    run: JobRun
    now: datetime
    result_bytes_max: int


class Stop(msgspec.Struct, tag=True):
    """The run was asked to end."""


class Said(msgspec.Struct, tag=True, omit_defaults=True):
    """What the handler says: progress, a line of its log, or just that it lives."""

    fraction: float | None = None
    message: str | None = None
    level: str | None = None
    is_progress: bool = False


class Done(msgspec.Struct, tag=True):
    """The attempt is over: a `Settlement`, which is one of these."""

    succeeded: Succeeded | None = None
    failed: Failed | None = None
    retried: Retried | None = None
    cancelled: Cancelled | None = None

    @classmethod
    def of(cls, settlement: Settlement) -> Done:
        match settlement:
            case Succeeded():
                return cls(succeeded=settlement)
            case Failed():
                return cls(failed=settlement)
            case Retried():
                return cls(retried=settlement)
            case Cancelled():
                return cls(cancelled=settlement)
            case Released():
                raise ValueError("a process of the pool gives no run back")

    @property
    def settlement(self) -> Settlement:
        found = self.succeeded or self.failed or self.retried or self.cancelled
        assert found is not None
        return found


ToProcess: TypeAlias = Hello | Task | Stop
FromProcess: TypeAlias = Said | Done

_encode = msgspec.msgpack.Encoder().encode
_to_process: msgspec.msgpack.Decoder[ToProcess] = msgspec.msgpack.Decoder(ToProcess)
_from_process: msgspec.msgpack.Decoder[FromProcess] = msgspec.msgpack.Decoder(FromProcess)


def pack(frame: ToProcess | FromProcess) -> bytes:
    """A frame with its length before it."""
    content = _encode(frame)
    return HEAD.pack(len(content)) + content


def read_to(content: bytes) -> ToProcess:
    """What a runtime says."""
    return _to_process.decode(content)


def read_from(content: bytes) -> FromProcess:
    """What a process of the pool says."""
    return _from_process.decode(content)
