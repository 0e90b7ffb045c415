"""The roles that move runs: the claimer, which takes what is due, the lifeline, which holds what was taken, the scribe,
which writes down what handlers say, and the pruner, which forgets what is long over.

Both begin with `start`, take nothing new after `drain`, and are gone after `stop`. An error of the store ends neither:
it is shown by `problem`, and the next look may go better.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from abc import ABC, abstractmethod
from datetime import datetime, timedelta
from typing import Final

from sagaloom.clock import Clock
from sagaloom.errors import SagasError
from sagaloom.ports.jobs import JobRunStore
from sagaloom.workers.attempts import Attempts
from sagaloom.workers.handlers import JobSet
from sagaloom.workers.options import JobOptions

__all__ = ["Claimer", "Lifeline", "Pruner", "Role", "Scribe"]

_log = logging.getLogger("sagaloom.jobs")
_TURNS_A_LEASE: Final = 3
_PRUNES_APART: Final = timedelta(minutes=1)


class Role(ABC):
    """A loop with a beginning and an end."""

    name: str

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._is_draining = False
        self.problem: str | None = None
        """What went wrong at the last turn; None when it went well."""

    @property
    def is_running(self) -> bool:
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Begins. Starting twice is no error."""
        if self._task is None:
            self._task = asyncio.create_task(self._loop(), name=f"sagaloom-{self.name}")

    def drain(self) -> None:
        """Takes on nothing new, and goes on with what it has."""
        self._is_draining = True

    async def stop(self) -> None:
        """Ends. Stopping twice is no error."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _loop(self) -> None:
        while True:
            try:
                await self._turn()
            except SagasError as error:
                self._trouble(error.message)
            except Exception as error:  # noqa: BLE001 - logged, shown, and no reason to leave runs lying
                _log.exception("the %s of jobs met what it did not expect", self.name)
                self.problem = f"{type(error).__name__}: {error}"
            else:
                if self.problem is not None:
                    _log.info("the %s of jobs works again", self.name)
                self.problem = None
            await self._pause()

    def _trouble(self, text: str) -> None:
        if text != self.problem:
            _log.warning("the %s of jobs waits: %s", self.name, text)
        self.problem = text

    @abstractmethod
    async def _turn(self) -> None:
        """Does what there is to do now."""

    @abstractmethod
    async def _pause(self) -> None:
        """Returns when there may be something to do."""


class Claimer(Role):
    """Claims due runs while there are places for them, and has them worked on.

    It looks when `wake` is called, when something becomes due, and every `poll_seconds` for what others have enqueued.
    """

    name = "claimer"

    def __init__(
        self, store: JobRunStore, jobs: JobSet, attempts: Attempts, clock: Clock, options: JobOptions, *, holder: str
    ) -> None:
        super().__init__()
        self._store = store
        self._jobs = jobs
        self._attempts = attempts
        self._clock = clock
        self._options = options
        self._holder = holder
        self._woken = asyncio.Event()
        self._next_at: datetime | None = None

    def wake(self) -> None:
        """Looks as soon as possible."""
        self._woken.set()

    async def _turn(self) -> None:
        self._woken.clear()
        if self._store.problem is not None:
            await self._store.probe()  # nobody else would find out that it works again
        while not self._is_draining and (places := self._options.concurrency - self._attempts.places_taken) > 0:
            now = self._clock.now()
            until = now + timedelta(seconds=self._options.lease_seconds)
            claimed = await self._store.claim(self._holder, self._jobs.ids, now=now, until=until, limit=places)
            for run in claimed.runs:
                self._attempts.begin(run)
            self._next_at = claimed.next_at
            if not claimed.runs:
                return

    async def _pause(self) -> None:
        moment = self._clock.now() + timedelta(seconds=self._options.poll_seconds)
        if self._next_at is not None and self.problem is None:
            moment = min(moment, self._next_at)
        ringing = asyncio.ensure_future(self._clock.sleep_until(moment))
        waking = asyncio.ensure_future(self._woken.wait())
        try:
            await asyncio.wait([ringing, waking], return_when=asyncio.FIRST_COMPLETED)
        finally:
            ringing.cancel()
            waking.cancel()


class Lifeline(Role):
    """Shows that this process lives, and renews the leases of the runs that are under way."""

    name = "lifeline"

    def __init__(self, store: JobRunStore, attempts: Attempts, clock: Clock, options: JobOptions) -> None:
        super().__init__()
        self._store = store
        self._attempts = attempts
        self._clock = clock
        self._lease = timedelta(seconds=options.lease_seconds)

    async def _turn(self) -> None:
        self._store.stay()
        claims = self._attempts.claims
        if claims:
            renewed = await self._store.renew(claims, until=self._clock.now() + self._lease)
            for lost in renewed.lost:
                self._attempts.lose(lost)
            for cancelled in renewed.cancelled:
                self._attempts.cancel(cancelled)

    async def _pause(self) -> None:
        await self._clock.sleep_until(self._clock.now() + self._lease / _TURNS_A_LEASE)


class Scribe(Role):
    """Writes down what handlers say: at once, and then again after a while at the earliest."""

    name = "scribe"

    def __init__(self, attempts: Attempts, clock: Clock, options: JobOptions) -> None:
        super().__init__()
        self._attempts = attempts
        self._clock = clock
        self._wait = timedelta(seconds=options.note_seconds)
        self._loop_of: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()
        self._not_before = clock.now()

    async def start(self) -> None:
        self._loop_of = asyncio.get_running_loop()
        await super().start()

    def wake(self) -> None:
        """There is something to write down. May be called on any thread."""
        if self._loop_of is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: a thread that was left behind speaks
                self._loop_of.call_soon_threadsafe(self._news.set)

    async def _turn(self) -> None:
        self._news.clear()
        if await self._attempts.write_down():
            self._not_before = self._clock.now() + self._wait

    async def _pause(self) -> None:
        if self.problem is None:
            await self._news.wait()
        await self._clock.sleep_until(self._not_before if self.problem is None else self._clock.now() + self._wait)


class Pruner(Role):
    """Forgets runs that have been over for long, and what happened long ago, in small bites."""

    name = "pruner"

    def __init__(self, store: JobRunStore, clock: Clock, options: JobOptions) -> None:
        super().__init__()
        self._store = store
        self._clock = clock
        self._runs_kept = timedelta(days=options.runs_kept_days)
        self._events_kept = timedelta(hours=options.events_kept_hours)

    async def _turn(self) -> None:
        now, cursor, is_first = self._clock.now(), None, True
        while is_first or cursor is not None:
            _, cursor = await self._store.prune_runs(before=now - self._runs_kept, after=cursor)
            is_first = False
            await asyncio.sleep(0)
        has_more = True
        while has_more:
            has_more = bool(await self._store.prune_events(before=now - self._events_kept))
            await asyncio.sleep(0)

    async def _pause(self) -> None:
        await self._clock.sleep_until(self._clock.now() + _PRUNES_APART)
