"""Faults with a name and a number: the third commit raises, the first dispatch kills the process.

The walk of a message has steps, and a process can be cut at each of them. The runtime and the embedded store report
each step to a hook; `Faults` is such a hook:

    faults = Faults()
    faults.raise_at("committed", 1)
    kv = await SqliteKeyValue.open("orders.db", on_step=faults)
    runtime = SagaRuntime(KvSagaStore(kv), options=RuntimeOptions(on_step=faults))

`raise_at` stops the code that reached the step, inside this process: fast, and enough to leave a commit half done or
an effect sent and not settled. `kill_at` ends the whole process as `kill -9` does: nothing is flushed, nobody is told.
A worker that runs as a process of its own takes its fault from the environment (`Faults.from_env`).

What we dislike about it: a process in which a step has raised goes on with its other tasks, as a dead one would not.
Tests that mean a dead process abandon the runtime then, and look at the store with a new one.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final, NoReturn

from sagaloom.errors import ConfigurationError

__all__ = ["ENV_FAULT", "KV_STEPS", "STEPS", "SWEEP_STEPS", "WALK_STEPS", "Cut", "Faults"]

ENV_FAULT: Final = "SAGALOOM_FAULT"
WALK_STEPS: Final = (
    "accepted", "claimed", "decided", "committed", "compensated", "dispatched", "settled", "timer_due",
)  # fmt: skip
"""What `RuntimeOptions.on_step` reports of messages."""
SWEEP_STEPS: Final = ("pruned",)
"""What it reports beside them, hours apart: that some of what has been kept long enough was removed."""
KV_STEPS: Final = ("kv:checked", "kv:half_written", "kv:written", "kv:committed")
"""What `SqliteKeyValue.open(..., on_step=)` reports, inside each commit."""
STEPS: Final = (*WALK_STEPS, *KV_STEPS)
"""Every step at which the walk of a message can be cut."""


class Cut(BaseException):
    """What `raise_at` raises unless it is given something else. No `except Exception` keeps it from going up, as none
    would keep a process from dying."""


class Faults:
    """A hook for steps: counts them, and does at some of them what it was told.

    >>> faults = Faults()
    >>> faults.raise_at("committed", 2, RuntimeError("cut here"))
    >>> faults("committed")
    >>> faults("committed")
    Traceback (most recent call last):
    ...
    RuntimeError: cut here
    >>> faults.seen["committed"], faults.struck
    (2, ['committed:2'])
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        """How often each step was reached."""
        self.struck: list[str] = []
        """The faults that happened, as `step:nth`."""
        self._planned: dict[tuple[str, int], Callable[[], None]] = {}
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def raise_at(self, step: str, nth: int = 1, error: BaseException | None = None) -> None:
        """Raises `error` (a `Cut` without one) when `step` is reached for the `nth` time from the beginning."""

        def strike() -> NoReturn:
            raise error if error is not None else Cut(f"{step}:{nth}")

        self._plan(step, nth, strike)

    def kill_at(self, step: str, nth: int = 1) -> None:
        """Kills this very process with SIGKILL when `step` is reached for the `nth` time."""
        self._plan(step, nth, lambda: os.kill(os.getpid(), signal.SIGKILL))

    def disarm(self) -> None:
        """Forgets what was planned; goes on counting."""
        self._planned.clear()

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Faults:
        """The fault that `SAGALOOM_FAULT="step:nth"` asks for, as a kill; none when it is not set. Raises
        `ConfigurationError` for anything else."""
        faults = cls()
        asked = (os.environ if env is None else env).get(ENV_FAULT, "")
        if asked:
            # From the right: the steps of the store have a colon in their names.
            step, _, nth = asked.rpartition(":")
            if not nth.isascii() or not nth.isdigit():
                raise ConfigurationError(f"{ENV_FAULT}={asked!r} is no step and number: write for example committed:3")
            faults.kill_at(step, int(nth))
        return faults

    async def wait_until_struck(self, timeout: float = 30.0) -> None:
        """Returns once any fault has happened; raises `TimeoutError` when none does in time."""
        if self.struck:
            return
        struck = asyncio.Event()
        self._waiters.append((asyncio.get_running_loop(), struck))
        async with asyncio.timeout(timeout):
            await struck.wait()

    def __call__(self, step: str) -> None:
        """Counts the step, and strikes if that was planned."""
        self.seen[step] += 1
        nth = self.seen[step]
        strike = self._planned.pop((step, nth), None)
        if strike is None:
            return
        self.struck.append(f"{step}:{nth}")
        for loop, struck in self._waiters:
            loop.call_soon_threadsafe(struck.set)
        strike()

    def _plan(self, step: str, nth: int, strike: Callable[[], None]) -> None:
        known = (*STEPS, *SWEEP_STEPS)
        if step not in known:
            raise ConfigurationError(f"{step!r} is no step that a process can be cut at; these are: {', '.join(known)}")
        if nth < 1:
            raise ConfigurationError(f"fault at {step!r}: steps are counted from 1, got {nth}")
        self._planned[step, nth] = strike
