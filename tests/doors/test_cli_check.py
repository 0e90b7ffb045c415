"""`sagaloom check` and `sagaloom diagram` on modules of a project."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sagaloom.cli.app import app
from sagaloom.errors import SagasError

pytestmark = pytest.mark.usefixtures("project")

SOUND = """
from sagaloom import define_saga, saga_complete

def done(saga, event, context):
    return [saga_complete()]

sagas = [define_saga("sound").state({}).on("Done", done).build()]
"""
BROKEN = """
from sagaloom import define_saga, send

def lost(saga, event, context):
    saga.state = {"status": "waiting"}
    return [send("Nobody", {})]

sagas = [define_saga("broken").state({}).on("Begin", lost).build()]
"""
UNBUILT = """
from sagaloom import define_saga

saga = define_saga("unbuilt").state({}).on("A", lambda saga, event, context: []).schedule("0 * * * *").build()
"""
WARNED = SOUND.replace("return [saga_complete()]", 'saga.state = {"status": "stuck"}\n    return []')


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """The current directory, with these modules, which the interpreter forgets again afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    for name, code in {"sound": SOUND, "broken": BROKEN, "unbuilt": UNBUILT, "warned": WARNED}.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def run(*args: str) -> tuple[int, str, str]:
    """The exit status, and what was printed, or why it failed."""
    result = CliRunner().invoke(app, list(args))
    if isinstance(result.exception, SagasError):
        return 1, result.stdout, result.exception.message
    return result.exit_code, result.stdout, result.stderr


def test_sound_sagas_pass() -> None:
    assert run("check", "sound") == (0, "", "1 sagas: 0 errors, 0 warnings, 0 notes\n")


def test_a_finding_is_shown_with_its_place_and_remedy_and_fails() -> None:
    status, out, _ = run("check", "broken.py")

    assert status == 1
    assert "broken.py:6: error unhandled-send" in out
    assert "remedy: add .on('Nobody', handler)" in out


def test_findings_are_there_for_programs() -> None:
    status, out, _ = run("check", "broken", "sound", "--json")

    answer: dict[str, Any] = json.loads(out)
    assert (status, answer["sagas"], answer["errors"]) == (1, ["broken", "sound"], 1)
    (finding,) = [one for one in answer["findings"] if one["code"] == "unhandled-send"]
    assert (finding["saga"], Path(finding["file"]).name, finding["line"]) == ("broken", "broken.py", 6)


def test_a_saga_that_does_not_build_is_a_finding_and_the_others_are_checked_all_the_same() -> None:
    status, out, _ = run("check", "unbuilt", "broken")

    assert status == 1
    assert "unbuilt.py:4: error does-not-build" in out
    assert "which no handler takes: add .on('unbuilt:tick', handler)" in out
    assert "error unhandled-send" in out


def test_warnings_fail_when_they_shall() -> None:
    assert run("check", "warned", "--quiet")[0] == 0
    assert run("check", "warned", "--strict")[0] == 1


def test_a_module_that_is_not_there_is_an_error_of_the_command() -> None:
    status, out, error = run("check", "nowhere")

    assert (status, out) == (1, "")
    assert "nowhere was not found" in error


def test_a_saga_is_drawn_or_given_as_a_graph() -> None:
    drawn = run("diagram", "sound")
    graph = json.loads(run("diagram", "sound", "broken", "--saga", "broken", "--json")[1])

    assert drawn[1].startswith("flowchart LR\n")
    assert "-->|ends|" in drawn[1]
    assert [edge["to"] for edge in graph["broken"]["edges"] if edge["kind"] == "sends"] == ["target saga:Nobody"]
    assert run("diagram", "sound", "--saga", "other")[0] == 1
