"""`sagaloom dev` starts its server again when the code changes, and only then."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sagaloom.cli.reloading import changed_files, files_to_watch, snapshot

SAGA = """
from sagaloom import define_saga

saga = define_saga("shop").state({{}}).on("{}", lambda saga, event, context: []).build()
"""


# --- What is watched -------------------------------------------------------------------------------------------------


def test_code_and_settings_are_watched_and_what_is_installed_or_hidden_is_not(tmp_path: Path) -> None:
    watched = ("shop.py", "pyproject.toml", "appsettings.Development.json", "shop/orders.py")
    others = ("data.json", "notes.txt", ".hidden/a.py", "__pycache__/a.py", "env/lib/a.py", "env/pyvenv.cfg")
    for name in (*watched, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    assert {str(file.relative_to(tmp_path)) for file in files_to_watch(tmp_path)} == set(watched)


def test_a_file_has_changed_when_it_was_written_made_or_removed(tmp_path: Path) -> None:
    for name in ("written.py", "removed.py", "same.py"):
        (tmp_path / name).write_text("1")
    before = snapshot(tmp_path)
    (tmp_path / "written.py").write_text("22")
    (tmp_path / "removed.py").unlink()
    (tmp_path / "made.py").write_text("")

    changed = changed_files(before, snapshot(tmp_path))

    assert [file.name for file in changed] == ["made.py", "removed.py", "written.py"]


# --- A process -------------------------------------------------------------------------------------------------------

Begin = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def begin(tmp_path: Path) -> Generator[Begin]:
    (tmp_path / "shop.py").write_text(SAGA.format("OrderPlaced"))
    begun: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NETSCRIPT_")}
        process = subprocess.Popen(
            [sys.executable, "-m", "sagaloom", "dev", *arguments, "--port", "0", "--json"],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def address(process: subprocess.Popen[str]) -> str:
    """Where the server is that the process has just started."""
    assert process.stdout is not None
    return str(json.loads(process.stdout.readline())["url"])


def types(url: str) -> list[str]:
    (saga,) = httpx2.get(f"{url}/api/v1/sagas/sagas", timeout=30).json()["sagas"]
    return [one["type"] for one in saga["handledMessageTypes"]]


@pytest.mark.skipif(sys.platform == "win32", reason="signals end it there")
def test_the_server_is_started_again_with_what_has_changed(begin: Begin, tmp_path: Path) -> None:
    process = begin("shop.py")
    first = types(address(process))

    (tmp_path / "shop.py").write_text(SAGA.format("OrderTakenBack"))
    second = types(address(process))
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)

    assert (first, second, process.returncode) == (["OrderPlaced"], ["OrderTakenBack"], 0)
    assert "dev: shop.py changed: starting again" in said


@pytest.mark.skipif(sys.platform == "win32", reason="signals end it there")
def test_a_mistake_that_was_just_typed_is_waited_out(begin: Begin, tmp_path: Path) -> None:
    process = begin("shop.py")
    address(process)
    (tmp_path / "shop.py").write_text("this is no Python")
    assert process.stderr is not None
    said: list[Any] = []
    while not any("it is started again after the next change" in line for line in said):
        said.append(process.stderr.readline())

    (tmp_path / "shop.py").write_text(SAGA.format("OrderRepaired"))
    repaired = types(address(process))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)

    assert repaired == ["OrderRepaired"]
    assert any("cannot be loaded: SyntaxError" in line for line in said)


def test_a_server_that_never_started_ends_the_command(begin: Begin) -> None:
    process = begin("nowhere")
    _, said = process.communicate(timeout=30)

    assert process.returncode == 1
    assert "nowhere was not found" in said
