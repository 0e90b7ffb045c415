"""One timer for all handlers: each has its own time all the same."""

from __future__ import annotations

import asyncio

import pytest

from sagaloom.queues.handling import Deadlines

pytestmark = pytest.mark.anyio


async def _worked(deadlines: Deadlines, work: asyncio.Event) -> tuple[bool, bool]:
    """Whether it was cancelled, and whether its time was up."""
    task = asyncio.current_task()
    assert task is not None
    is_cancelled = False
    deadlines.begin(task)
    try:
        await work.wait()
    except asyncio.CancelledError:
        is_cancelled = True
    return is_cancelled, deadlines.end(task)


async def test_whoever_comes_after_the_timer_was_set_is_cut_off_too() -> None:
    done, never = asyncio.Event(), asyncio.Event()
    done.set()
    deadlines = Deadlines(0.05)

    outcomes = [await _worked(deadlines, done)]
    outcomes += await asyncio.gather(*(_worked(deadlines, work) for work in (never, done, never)))
    outcomes += [await _worked(deadlines, never)]

    assert outcomes == [(False, False), (True, True), (False, False), (True, True), (True, True)]


async def test_a_cancellation_by_somebody_else_is_none_of_a_deadline() -> None:
    deadlines = Deadlines(60)
    task = asyncio.create_task(_worked(deadlines, asyncio.Event()))
    await asyncio.sleep(0)

    task.cancel()

    assert await task == (True, False)
    deadlines.close()


async def test_without_a_time_nobody_is_cut_off() -> None:
    work = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, work.set)

    assert await _worked(Deadlines(None), work) == (False, False)
