"""`sagaloom new`: the project that it makes, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from sagaloom.cli.creating import requirement
from tests.doors.test_cli import Server, environment, refusal, sagaloom, until

FILES = [
    ".gitignore",
    "Makefile",
    "README.md",
    "my_shop/__init__.py",
    "my_shop/jobs.py",
    "my_shop/sagas.py",
    "pyproject.toml",
    "tests/test_jobs.py",
    "tests/test_sagas.py",
]


def make(folder: Path, name: str = "my-shop") -> Path:
    made = sagaloom("new", name, "--json", cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder / str(json.loads(made.stdout)["folder"])


def test_a_project_is_made_whose_tests_pass(tmp_path: Path) -> None:
    folder = make(tmp_path)

    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        env=environment(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert files == FILES
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "5 passed" in ran.stdout
    assert not any("{{" in file.read_text() for file in folder.rglob("*") if file.suffix in (".py", ".toml", ".md"))


@pytest.mark.parametrize(
    "check",
    [
        ["ruff", "format", "--check", "."],
        ["ruff", "check", "."],
        ["mypy", "--strict", "."],
        ["pyright", "--pythonpath", sys.executable],
    ],
    ids=["format", "lint", "mypy", "pyright"],
)
def test_a_project_is_formatted_and_typed(tmp_path: Path, check: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", *check],
        cwd=make(tmp_path),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="it is started by its supervisor")
def test_a_project_is_served_on_both_ports_and_its_saga_hears_of_its_job(tmp_path: Path) -> None:
    server = Server([sys.executable, "-m", "sagaloom", "dev", "--port", "0", "--json"], make(tmp_path), environment())
    try:
        url = server.said["url"]
        for order, amount in (("o-1", 1200), ("o-2", 12_000)):
            body = {"type": "OrderPlaced", "payload": {"order_id": order, "amount": amount}}
            httpx2.post(f"{url}/api/v1/sagas/publish", json=body, timeout=30).raise_for_status()

        def look(order: str) -> Callable[[], Any]:
            def ended() -> Any:
                found = httpx2.get(f"{url}/api/v1/sagas/instances/orders/{order}", timeout=30).json()
                return found if "endedAt" in found else None

            return ended

        paid, declined = until(look("o-1"), "the order is paid"), until(look("o-2"), "the order is declined")
    finally:
        server.kill()

    assert (paid["status"], paid["state"]["status"]) == ("completed", "paid")
    assert (declined["status"], declined["state"]["status"]) == ("failed", "declined")
    assert "the card was declined" in declined["reason"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("My Shop", "is no name for a project"),
        ("shop-", "is no name for a project"),
        ("../shop", "is no name for a project"),
        ("json", "is taken"),
        ("class", "is taken"),
        ("sagaloom", "is taken"),
    ],
)
def test_a_name_that_cannot_be_is_refused(tmp_path: Path, name: str, text: str) -> None:
    assert text in refusal(sagaloom("new", name, cwd=tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "mine.txt").write_text("mine")

    assert "is there already, and not empty" in refusal(sagaloom("new", "shop", cwd=tmp_path))
    assert [file.name for file in (tmp_path / "shop").iterdir()] == ["mine.txt"]


def test_a_release_is_asked_for_by_its_version_and_a_checkout_by_its_address() -> None:
    assert requirement("").startswith("sagaloom>=0.")
    assert requirement('{"url": "file:///src/s", "dir_info": {}}') == "sagaloom @ file:///src/s"
    assert (
        requirement('{"url": "https://e.org/r", "subdirectory": "py", "vcs_info": {"vcs": "git", "commit_id": "4f"}}')
        == "sagaloom @ git+https://e.org/r@4f#subdirectory=py"
    )
