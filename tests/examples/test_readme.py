"""Every block of Python in the README runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def test_the_python_of_the_readme_runs_from_top_to_bottom(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n\n".join(_blocks("python")))

    ran = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )

    assert ran.returncode == 0, ran.stderr
    assert "failed {'status': 'refunded', 'payment_id': 'p-1'}" in ran.stdout
    assert ran.stdout.count("payments service:") == 2


def test_the_readme_names_the_two_commands_that_matter() -> None:
    console = "\n".join(_blocks("console"))

    assert "make serve" in console
    assert "make test" in console
