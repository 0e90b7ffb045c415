"""Each example ends the same way wherever its process is stopped: at every commit in process, and by five real kills;
on a file, and on PostgreSQL.

`make test` stops each story at a few of its commits and kills the first two; `make examples` leaves none out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import pytest

from examples.telling import Ending, play
from sagaloom.testing.faults import Faults
from tests.docs.pages import ROOT
from tests.examples.actor import story_called
from tests.examples.stories import STORES, STORIES
from tests.schemas import Schema

IS_LONG: Final = os.environ.get("SAGALOOM_EXAMPLES") == "all"
_KILLS: Final = 5
_SECONDS_MAX: Final = 120


@dataclass(frozen=True)
class Shelf:
    """Where stores stand: a folder of each has its file, or all have one schema, emptied in between."""

    schema: Schema | None = None

    @property
    def url(self) -> str | None:
        return None if self.schema is None else self.schema.url

    async def clear(self) -> None:
        if self.schema is not None:
            await self.schema.empty()


def _cases(*names: str, on_postgres: Sequence[str]) -> list[Any]:
    """Each story on a file, and some on PostgreSQL; in the long form all of them on every store."""
    chosen = {"file": names, "postgres": on_postgres}
    marks = {"postgres": [pytest.mark.server("postgres")]}
    return [
        pytest.param((name, store), id=f"{name}-{store}", marks=marks.get(store, ()))
        for store in STORES
        for name in (STORIES if IS_LONG else chosen[store])
    ]


@pytest.fixture(params=_cases(*STORIES, on_postgres=["orders", "campaigns"]))
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    story: tuple[str, str] = request.param
    return story


@pytest.fixture
def name(case: tuple[str, str]) -> str:
    return case[0]


@pytest.fixture
def shelf(case: tuple[str, str], request: pytest.FixtureRequest) -> Shelf:
    return Shelf() if case[1] == "file" else Shelf(request.getfixturevalue("schema"))


async def stopped(name: str, folder: Path, faults: Faults, *, url: str | None = None) -> bool:
    """Tells a story until it is stopped by a fault; whether it was."""
    telling = asyncio.create_task(play(story_called(name), folder, url=url, faults=faults))
    striking = asyncio.create_task(faults.wait_until_struck(_SECONDS_MAX))
    await asyncio.wait([telling, striking], return_when=asyncio.FIRST_COMPLETED)
    for task in (telling, striking):
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError, RuntimeError):  # it was cut short, or has noticed
        await telling
    await asyncio.gather(striking, return_exceptions=True)
    return bool(faults.struck)


async def told(name: str, folder: Path, *, faults: Faults | None = None, url: str | None = None) -> Ending:
    """How a story ends when nobody stops it."""
    async with asyncio.timeout(_SECONDS_MAX):
        return await play(story_called(name), folder, url=url, faults=faults)


# --- As it should be -------------------------------------------------------------------------------------------------


async def test_a_story_ends_as_it_says(name: str, shelf: Shelf, tmp_path: Path) -> None:
    ending = await told(name, tmp_path, url=shelf.url)

    assert story_called(name).holds(ending), ending
    assert ending.breaches == []


@pytest.mark.parametrize("name", STORIES if IS_LONG else STORIES[:1])
def test_a_story_is_told_by_its_script(name: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"examples.{name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert ran.returncode == 0, ran.stderr
    assert ": completed {" in ran.stdout


def test_every_example_is_among_the_stories_and_in_the_readme() -> None:
    told_there = {file.stem for file in (ROOT / "examples").glob("*.py") if "story = Story(" in file.read_text()}
    readme = (ROOT / "examples" / "README.md").read_text()

    assert told_there == set(STORIES)
    assert [name for name in STORIES if f"[`{name}.py`]({name}.py)" not in readme] == []


# --- Stopped in process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["decided", "committed"])
async def test_a_story_that_is_stopped_at_a_commit_ends_the_same_way(
    name: str, step: str, shelf: Shelf, tmp_path: Path
) -> None:
    counted = Faults()
    expected = await told(name, tmp_path / "undisturbed", url=shelf.url, faults=counted)
    commits = counted.seen[step]
    stride = 1 if IS_LONG else max(1, commits // 2)

    for nth in range(1, commits + 1, stride):
        await shelf.clear()
        faults = Faults()
        faults.raise_at(step, nth)
        was_stopped = await stopped(name, tmp_path / str(nth), faults, url=shelf.url)
        ending = await told(name, tmp_path / str(nth), url=shelf.url)

        assert ending == expected, f"stopped at {step}:{nth}"
        assert was_stopped or nth > commits // 2, f"the story never comes to {step}:{nth} of {commits}"


# --- Killed ----------------------------------------------------------------------------------------------------------


class Actors:
    """The nursery of actors, as the driver has it."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self._folder = folder
        self._process = process
        self._born = 0

    def life(self, name: str, folder: Path, fault: str | None, *, url: str | None) -> int:
        """Has an actor go on with a story, and returns how it ended: 0, or less by a signal."""
        assignment = {"story": name, "folder": str(folder), "url": url}
        (self._folder / "assignment").write_text(json.dumps(assignment))
        self._born += 1
        self._say(f"birth {self._born} {fault or '-'}")
        while True:
            what, tag, *rest = self._hear().split()
            if what == "died" and tag == str(self._born):
                return int(rest[0])

    def _say(self, line: str) -> None:
        _pipe(self._process.stdin).write(f"{line}\n")
        _pipe(self._process.stdin).flush()

    def _hear(self) -> str:
        line = _pipe(self._process.stdout).readline()
        assert line, (self._folder / "log").read_text()
        return line


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@pytest.fixture(scope="module")
def actors(tmp_path_factory: pytest.TempPathFactory) -> Generator[Actors]:
    folder = tmp_path_factory.mktemp("actors")
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.examples.actor", str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        with process:
            yield Actors(folder, process)
            _pipe(process.stdin).close()


@pytest.mark.parametrize("case", _cases("orders", "transfers", on_postgres=["orders"]), indirect=True)
async def test_a_story_whose_process_is_killed_five_times_ends_the_same_way(
    name: str, shelf: Shelf, tmp_path: Path, actors: Actors
) -> None:
    counted = Faults()
    expected = await told(name, tmp_path / "undisturbed", url=shelf.url, faults=counted)
    await shelf.clear()
    apart = max(1, counted.seen["committed"] // _KILLS)
    killed = tmp_path / "killed"

    # Before a commit, then behind one, so that the first half of them leaves the story where it was.
    lives = [
        await asyncio.to_thread(actors.life, name, killed, fault, url=shelf.url)
        for fault in ("decided:1", f"committed:{apart}", "committed:1", f"decided:{apart}", "committed:1", None)
    ]
    ending = await told(name, killed, url=shelf.url)

    assert lives == [-9] * _KILLS + [0]
    assert ending == expected
