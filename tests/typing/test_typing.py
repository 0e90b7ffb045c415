"""What type checkers make of a saga: both accept what is right, and refuse each misuse on its own line."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_MARK = "# expect: error"
_PRAGMAS = re.compile(r"  # type: ignore.*(?=  # expect: error$)", re.MULTILINE)

Lines = Mapping[str, frozenset[int]]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Lines]:
    """The lines that each checker refuses in each file. Both run once, side by side."""
    folder = tmp_path_factory.mktemp("typing")
    for name in ("accepts.py", "refuses.py"):
        (folder / name).write_text(_PRAGMAS.sub("", (_HERE / name).read_text()))
    (folder / "pyrightconfig.json").write_text(
        json.dumps({"include": ["."], "extraPaths": [str(_ROOT / "src")], "typeCheckingMode": "strict"})
    )
    config = ["--config-file", str(_ROOT / "pyproject.toml"), "--output", "json"]
    checkers = {
        "mypy": _started("mypy", *config, str(folder / "accepts.py"), str(folder / "refuses.py")),
        "pyright": _started("pyright", "--outputjson", "--pythonpath", sys.executable, "--project", str(folder)),
    }
    return {name: _lines(name, *checker.communicate(timeout=300)) for name, checker in checkers.items()}


def _started(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _lines(checker: str, output: str, errors: str) -> Lines:
    found: dict[str, set[int]] = {"accepts.py": set(), "refuses.py": set()}
    reports: list[dict[str, Any]]
    try:
        if checker == "mypy":
            reports = [json.loads(line) for line in output.splitlines()]
        else:
            answer = json.loads(output)
            assert answer["summary"]["filesAnalyzed"] == 2
            reports = answer["generalDiagnostics"]
    except ValueError:
        raise AssertionError(f"{checker} said: {output}\n{errors}") from None
    for report in reports:
        if report["severity"] == "error":
            line = report["line"] if checker == "mypy" else report["range"]["start"]["line"] + 1
            found[Path(report["file"]).name].add(line)
    return {name: frozenset(lines) for name, lines in found.items()}


def _marked(name: str) -> frozenset[int]:
    lines = (_HERE / name).read_text().splitlines()
    return frozenset(number for number, line in enumerate(lines, 1) if line.endswith(_MARK))


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_everything_right_is_accepted(refused: Mapping[str, Lines], checker: str) -> None:
    assert refused[checker]["accepts.py"] == frozenset()


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_each_misuse_is_refused_on_its_own_line_and_nothing_else_is(refused: Mapping[str, Lines], checker: str) -> None:
    assert _marked("refuses.py") == refused[checker]["refuses.py"]


def test_the_file_of_misuses_marks_them_all() -> None:
    statements = (_HERE / "refuses.py").read_text().partition("# A handler before the state.")[2].splitlines()

    unmarked = [line for line in statements[1:] if line and not line.startswith("#") and not line.endswith(_MARK)]

    assert unmarked == []
