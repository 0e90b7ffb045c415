"""What a handler has in its hands: what it is to do, and how it speaks to whoever runs it.

    async def import_orders(ctx: JobContext[Import]) -> JobResult[int]:
        for number, page in enumerate(pages := await shop.pages(ctx.payload.since)):
            ctx.raise_if_cancelled()
            await save(page)
            ctx.progress(number / len(pages), f"page {number}")
        ctx.log.info("%d pages", len(pages))
        return create_success_result(len(pages))

All of it may be called from any thread. What is said is written down a moment later, and in any case with the result.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Generic, Protocol, TypeVar

from sagaloom.clock import Clock
from sagaloom.engine.retrying import storable
from sagaloom.errors import DefinitionError, JobCancelled
from sagaloom.ports.jobs import LOG_LINES_KEPT, JobLogLine, JobNote, JobProgress

__all__ = ["JobContext", "JobLog", "Reports", "Speaker"]

P_co = TypeVar("P_co", covariant=True)

_TEXT_MAX: Final = 500


class Speaker(Protocol):
    """Where what a handler says goes."""

    @property
    def is_cancelled(self) -> bool: ...

    def progress(self, fraction: float | None, message: str | None) -> None: ...

    def log(self, level: str, text: str) -> None: ...

    def beat(self) -> None: ...


class _Nobody:
    """Nobody listens: a handler that is called by a test."""

    is_cancelled = False

    def progress(self, fraction: float | None, message: str | None) -> None:
        return None

    def log(self, level: str, text: str) -> None:
        return None

    def beat(self) -> None:
        return None


_NOBODY: Final = _Nobody()


class JobLog:
    """Writes lines that are kept with the run (the newest 100 of them), and handed to the logger
    `sagaloom.job.<job id>` as well. Arguments are formatted in as by `logging`."""

    def __init__(self, job_id: str, speaker: Speaker) -> None:
        self._logger = logging.getLogger(f"sagaloom.job.{job_id}")
        self._speaker = speaker

    def debug(self, text: str, *args: object) -> None:
        self._write(logging.DEBUG, text, args)

    def info(self, text: str, *args: object) -> None:
        self._write(logging.INFO, text, args)

    def warning(self, text: str, *args: object) -> None:
        self._write(logging.WARNING, text, args)

    def error(self, text: str, *args: object) -> None:
        self._write(logging.ERROR, text, args)

    def _write(self, level: int, text: str, args: tuple[object, ...]) -> None:
        try:
            line = text % args if args else text
        except (TypeError, ValueError):
            line = f"{text} {args!r}"  # a slip in a log line must not fail the job
        self._logger.log(level, "%s", line)
        self._speaker.log(logging.getLevelName(level).lower(), storable(line)[:_TEXT_MAX])


@dataclass(frozen=True, slots=True, kw_only=True)
class JobContext(Generic[P_co]):
    """What a handler knows of its run. `attempt` counts from 1; `now` is when this attempt began, and `deadline_at`
    when it will be given up. `scheduled_for` is the tick of the job's schedule that this run is, if it is one.

    `idempotency_key` is the same in every attempt of the run, and in no other run: what the handler does elsewhere
    under it is done once. `traceparent` is never empty: a run that was triggered without one has one of its own.
    """

    job_id: str
    run_id: str
    attempt: int
    payload: P_co
    now: datetime
    deadline_at: datetime
    idempotency_key: str
    traceparent: str
    tracestate: str | None = None
    correlation_id: str | None = None
    scheduled_for: datetime | None = None
    speaker: Speaker = field(default=_NOBODY, repr=False, compare=False)
    """Where what the handler says goes; by default nowhere, for tests of a handler."""

    def progress(self, fraction: float | None = None, message: str | None = None) -> None:
        """Says how far the work is: a part of 1, words, or both. It counts as a heartbeat."""
        part: Any = fraction
        if part is not None and (
            isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 <= part <= 1 or math.isnan(part)
        ):
            raise DefinitionError(f"job {self.job_id!r}: progress is a part of 1, from 0 to 1, got {fraction!r:.80}")
        if part is None and message is None:
            raise DefinitionError(f"job {self.job_id!r}: progress needs a part of 1, or words, or both")
        self.speaker.progress(
            None if part is None else float(part), None if message is None else storable(str(message))[:_TEXT_MAX]
        )

    def heartbeat(self) -> None:
        """Says that the work goes on: for a job with a `heartbeat_timeout`, at least that often."""
        self.speaker.beat()

    @property
    def log(self) -> JobLog:
        """Writes lines that are kept with the run."""
        return JobLog(self.job_id, self.speaker)

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody has asked the run to end. An async handler is cancelled besides."""
        return self.speaker.is_cancelled

    def raise_if_cancelled(self) -> None:
        """Ends the handler with `JobCancelled` when somebody has asked the run to end."""
        if self.speaker.is_cancelled:
            raise JobCancelled(f"run {self.run_id} of job {self.job_id!r} was asked to end")


class Reports:
    """What the handler of one attempt has said and nobody has written down yet. `on_news` is called, on whichever
    thread, when there is something to write down."""

    def __init__(self, clock: Clock, *, on_news: Callable[[], None]) -> None:
        self._clock = clock
        self._on_news = on_news
        self._lock = threading.Lock()
        self._progress: JobProgress | None = None
        self._lines: deque[JobLogLine] = deque(maxlen=LOG_LINES_KEPT)
        self.is_cancelled = False
        self.on_cancel: Callable[[], None] | None = None
        """How the handler hears of a cancellation, if not by asking."""
        self.last_beat = time.monotonic()

    def progress(self, fraction: float | None, message: str | None) -> None:
        self.beat()
        with self._lock:
            self._progress = JobProgress(self._clock.now(), fraction, message)
        self._on_news()

    def log(self, level: str, text: str) -> None:
        with self._lock:
            self._lines.append(JobLogLine(self._clock.now(), level, text))
        self._on_news()

    def beat(self) -> None:
        self.last_beat = time.monotonic()

    def cancel(self) -> None:
        """The run was asked to end."""
        if self.is_cancelled:
            return
        self.is_cancelled = True
        if self.on_cancel is not None:
            self.on_cancel()

    def take(self) -> JobNote | None:
        """What was said since the last time, if anything."""
        with self._lock:
            if self._progress is None and not self._lines:
                return None
            note = JobNote(self._progress, tuple(self._lines))
            self._progress = None
            self._lines.clear()
            return note

    def put_back(self, note: JobNote) -> None:
        """What was taken could not be written down."""
        with self._lock:
            self._progress = self._progress or note.progress
            self._lines.extendleft(reversed(note.log[: LOG_LINES_KEPT - len(self._lines)]))
