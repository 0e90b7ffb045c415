"""The site: it builds without a warning, loads nothing from elsewhere, and tells nothing of the machine that built it.

These need what `make docs` installs, and are skipped where it is not there.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.pages import DOCS, ROOT, pages

SECRET = "a-value-that-only-the-environment-has"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it."""
    place = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [
            *(sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"),
            *("-d", place / "doctrees", DOCS, place / "html"),
        ],
        cwd=ROOT,
        env={**os.environ, "SAGALOOM_DOCS_SECRET": SECRET},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return place / "html"


def test_every_page_of_the_documentation_is_in_the_site(site: Path) -> None:
    missing = [
        page.name
        for page in pages()
        if page.is_relative_to(DOCS) and not (site / page.relative_to(DOCS)).with_suffix(".html").exists()
    ]

    assert missing == []


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    loaded = [
        f"{page.relative_to(site)}: {found}"
        for page in site.rglob("*.html")
        for found in re.findall(
            r"<(?:script|link|img|iframe|source)\b[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*\"", page.read_text()
        )
    ]
    styled = [
        f"{sheet.relative_to(site)}: {found}"
        for sheet in site.rglob("*.css")
        for found in re.findall(r"@import[^;]*|url\([\"']?(?:https?:)?//[^)]*\)", sheet.read_text())
    ]

    assert loaded + styled == []


def test_the_site_tells_nothing_of_the_machine_it_was_built_on(site: Path) -> None:
    texts = {path: path.read_text() for path in _written(site)}

    telling = [str(path.relative_to(site)) for path, text in texts.items() if SECRET in text or str(ROOT) in text]

    assert telling == []


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sagaloom_docs_docstrings", DOCS / "_ext" / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_word_of_code_gets_the_backticks_that_sphinx_wants(docstrings: ModuleType) -> None:
    told = docstrings.as_restructured_text(["Takes `a` and `b(", "c)`, not ``d``."])

    assert told == ["Takes ``a`` and ``b(", "c)``, not ``d``.", ""]


def test_an_indented_block_is_code_and_a_drawing_is_not(docstrings: ModuleType) -> None:
    told = docstrings.as_restructured_text(["Like this:", "", "    await one()", "", "    two()", "", "    a ──► b"])

    assert told[:9] == [
        "Like this:",
        "",
        ".. code-block:: python",
        "",
        "    await one()",
        "",
        "    two()",
        "",
        "    a ──► b",
    ]


def test_what_is_indented_below_an_item_of_a_list_belongs_to_it(docstrings: ModuleType) -> None:
    lines = ["- one", "  `goes` on", "", "    and on"]

    assert docstrings.as_restructured_text(lines) == ["- one", "  ``goes`` on", "", "    and on", ""]


def test_code_that_the_formatter_has_moved_to_the_margin_is_code_again(docstrings: ModuleType) -> None:
    told = docstrings.as_restructured_text(["Runs.", "", "async with it() as one:", "    await one.two()"])

    assert told[2:] == [".. code-block:: python", "", "    async with it() as one:", "        await one.two()", "", ""]


def test_prose_that_begins_like_code_stays_prose(docstrings: ModuleType) -> None:
    prose = ["with a name it can be", "taken back"]

    assert docstrings.as_restructured_text(prose) == [*prose, ""]


def _written(site: Path) -> Iterator[Path]:
    for path in site.rglob("*"):
        if path.suffix in {".html", ".js", ".txt"} and "_static" not in path.parts:
            yield path
