"""What the documentation says of the code is what the code says: pages that are written from it, and lists of names."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from sagaloom.engine.lifecycle import STATUS_TABLE
from tests.docs.pages import DOCS, ROOT
from tests.examples.stories import STORIES

REFERENCE: Final = DOCS / "reference"

MODULES: Final = {
    "sagaloom": ("sagaloom.md", "errors.md"),
    "sagaloom.config": ("config.md",),
    "sagaloom.integration.publisher": ("publisher.md",),
    "sagaloom.integration.workers": ("workers.md",),
    "sagaloom.middleware": ("middleware.md",),
    "sagaloom.presets": ("presets.md",),
    "sagaloom.publisher": ("publisher.md", "runtime.md"),
    "sagaloom.queue": ("queue.md",),
    "sagaloom.runtime": ("runtime.md",),
    "sagaloom.targets": ("targets.md",),
    "sagaloom.testing": ("testing.md",),
    "sagaloom.workers": ("workers.md",),
}
"""The public modules, and the pages that must name all of what they export."""

NOT_FOR_USERS: Final = {"SAGALOOM_SUPERVISED"}
"""Variables by which our own processes talk to each other."""


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sagaloom_docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_that_are_written_from_the_code_are_current(generator: ModuleType) -> None:
    stale = [
        str(path.relative_to(ROOT))
        for path, content in generator.generated().items()
        if path.read_text(encoding="utf-8") != content
    ]

    assert stale == [], "run: make docs"


def test_the_picture_of_an_instances_life_has_every_status_and_every_step_of_the_table(generator: ModuleType) -> None:
    picture = generator.life_svg()
    edges = {(before, after) for (before, _), after in STATUS_TABLE.items()}

    assert all(f">{status}<" in picture for edge in edges for status in edge)
    assert picture.count('marker-end="url(#tip)"') == len(edges)
    assert all(re.search(rf">[^<]*\b{happening}\b[^<]*<", picture) for _, happening in STATUS_TABLE)


@pytest.mark.parametrize("module", MODULES)
def test_the_reference_names_everything_that_a_public_module_exports(module: str) -> None:
    text = "\n".join((REFERENCE / page).read_text() for page in MODULES[module])
    is_whole = re.search(rf"automodule:: {re.escape(module)}\n(?!   :no-members:)", text) is not None

    missing = [
        name
        for name in importlib.import_module(module).__all__
        if not is_whole and not re.search(rf"(?:::|`)[ \w.]*\b{name}\b", text) and name != "__version__"
    ]

    assert missing == []


def test_every_environment_variable_that_the_code_reads_is_documented() -> None:
    read = _variables_in_the_code()

    assert sorted(read - _documented_variables() - NOT_FOR_USERS) == []


def test_no_environment_variable_is_documented_that_the_code_does_not_know() -> None:
    assert sorted(_documented_variables() - _variables_in_the_code()) == []


def _variables_in_the_code() -> set[str]:
    prefixes = "NETSCRIPT|SAGALOOM|SAGAS|JOBS|WORKERS|OTEL_PYTHON|ASPNETCORE|DOTNET"
    urls = "DATABASE|RABBITMQ|AMQP|REDIS|POSTGRES|DENO_KV"
    named = re.compile(rf'"((?:{prefixes})_[A-Z_]+|(?:{urls})_URL|PORT|PAYMENTS_PORT|FAIL_FIRST)"')
    return {name for path in (ROOT / "src").rglob("*.py") for name in named.findall(path.read_text())}


def _documented_variables() -> set[str]:
    rows = re.findall(r"^\| (`[^|]+) \|", (REFERENCE / "environment.md").read_text(), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([A-Z][A-Z_]+)`", row)}


def test_the_guard_for_stale_pages_sees_a_change(generator: ModuleType, tmp_path: Path) -> None:
    page = "before\n<!-- begin: x -->\nold\n<!-- end: x -->\nafter\n"

    assert generator.with_region(page, "x", "new\n") == "before\n<!-- begin: x -->\nnew\n<!-- end: x -->\nafter\n"
    with pytest.raises(ValueError, match="begin: y"):
        generator.with_region(page, "y", "new\n")


def test_every_method_of_the_builder_and_every_effect_that_is_there_is_proven_by_a_story(generator: ModuleType) -> None:
    used = set().union(*(generator.words_used(ROOT / "examples" / f"{name}.py") for name in STORIES))

    assert sorted({*generator.builder_methods(), *generator.effect_helpers()} - used) == []
