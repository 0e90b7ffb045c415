"""The roles that move runs: the claimer, which takes what is due, and the lifeline, which holds what was taken.

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

__all__ = ["Claimer", "Lifeline", "Role"]

_log = logging.getLogger("sagaloom.jobs")
_TURNS_A_LEASE: Final = 3


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

    async def _pause(self) -> None:
        await self._clock.sleep_until(self._clock.now() + self._lease / _TURNS_A_LEASE)
