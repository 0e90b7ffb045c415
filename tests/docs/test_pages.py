"""The documentation is true: its Python runs, its commands print what it says, its links lead somewhere."""

from __future__ import annotations

import asyncio
import contextlib
import doctest
import inspect
import io
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest

from tests.docs.pages import ROOT, Block, Command, blocks_of, commands_of, is_printed, pages, with_free_ports
from tests.docs.shell import Shell, free_ports
from tests.patience import PATIENCE_SECONDS

TESTED_ELSEWHERE: Final = {
    "docs/publishing.md": "tests/publisher/test_documentation.py",
    "docs/howto/scale-out.md": "tests/docs/test_scale_out.py",
}
"""Pages whose blocks need more than a page can say."""

_LOOKS_LATER: Final = re.compile(r"sleep \d+; (cat|grep|sagaloom (jobs runs|(instances|timers) list)) ?[^;|&]*$")
_TAKES_TIME: Final = re.compile(r"^(sleep|timeout) (\d+)")


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _with(language: str) -> list[pytest.ParameterSet]:
    """The pages that have a block in this language which is run."""
    return [
        pytest.param(page, id=_name(page))
        for page in pages()
        if _name(page) not in TESTED_ELSEWHERE
        and any(block.language == language and not block.is_shown_only for block in blocks_of(page))
    ]


@pytest.mark.parametrize("page", _with("python"))
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # pages import the files that they have had written
    printed = ""

    with _module(f"page_{page.stem}".replace("-", "_")) as module:
        for block in blocks_of(page):
            if block.file is not None:
                Path(block.file).write_text(block.content)
            elif block.language == "python":
                printed = _run(block, module)
            elif block.language == "pycon":
                _run_doctest(block, module)
            elif block.mark == "output":
                said = f"{block.where}: the block before it printed:\n{printed}"
                assert is_printed(block.content.splitlines(), printed.splitlines()), said


@pytest.mark.parametrize("page", [each for each in _with("console") if each.id != "README.md"])
def test_the_commands_of_a_page_print_what_it_says(page: Path, tmp_path: Path) -> None:
    blocks = [block for block in blocks_of(page) if not block.is_shown_only]
    if any("curl " in block.content for block in blocks if block.language == "console") and not shutil.which("curl"):
        pytest.skip("this page uses curl")
    ports = free_ports()

    with Shell(tmp_path, _variables(ports)) as shell:
        for block in blocks:
            if block.file is not None:
                (tmp_path / block.file).write_text(with_free_ports(block.content, ports))
            elif block.language == "console":
                for command in commands_of(block):
                    _type(command, block, shell, ports)


@pytest.mark.parametrize("page", [pytest.param(page, id=_name(page)) for page in pages()])
def test_every_link_between_pages_leads_to_a_heading_that_is_there(page: Path) -> None:
    text = re.sub(r"^(```+).*?^\1$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    astray: list[str] = []

    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        linked = (page.parent / target).resolve() if target else page
        if not linked.exists() or (anchor and anchor not in _anchors(linked)):
            astray.append(f"{target}#{anchor}" if anchor else target)

    assert astray == []


def test_pages_that_are_tested_elsewhere_are_tested_there() -> None:
    for page, test in TESTED_ELSEWHERE.items():
        assert Path(page).name in (ROOT / test).read_text()


def test_no_python_is_shown_only() -> None:
    shown = [
        block.where
        for page in pages()
        for block in blocks_of(page)
        if block.language == "python" and block.is_shown_only
    ]

    assert shown == []


def test_no_page_promises_exactly_once() -> None:
    promising = [
        f"{_name(page)}: {line.strip()}"
        for page in pages()
        for line in page.read_text().splitlines()
        if re.search(r"exactly[- ]once", line, re.IGNORECASE) and not re.search(r"\bno\b|\bnot\b|never|nobody", line)
    ]

    assert promising == []


def test_what_a_page_prints_is_compared_line_by_line() -> None:
    assert is_printed(["one  two", "three ... five"], ["one two", "", "three four five"])
    assert is_printed(["first", "...", "last"], ["first", "a", "b", "last"])
    assert not is_printed(["one"], ["one", "two"])
    assert not is_printed(["a ... c"], ["a b", "c"])
    assert not is_printed(["one", "two"], ["one"])


def _run(block: Block, module: ModuleType) -> str:
    """Runs a block in `module`, and the tests that it defines; returns what it printed."""
    # Behind as many empty lines as stand before it, so that a traceback names the line of the page.
    code = compile("\n" * (block.line - 1) + block.content, str(block.page), "exec", dont_inherit=True)
    before = dict(vars(module))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, vars(module))
        for name, value in list(vars(module).items()):
            if name.startswith("test_") and before.get(name) is not value:
                result = value()
                if inspect.iscoroutine(result):
                    asyncio.run(result)
    return printed.getvalue()


def _run_doctest(block: Block, module: ModuleType) -> None:
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said = io.StringIO()
    runner.run(
        parser.get_doctest(block.content, vars(module), block.where, str(block.page), block.line - 1),
        out=said.write,
        clear_globs=False,
    )
    assert runner.failures == 0, said.getvalue()


@contextlib.contextmanager
def _module(name: str) -> Iterator[ModuleType]:
    """A module that dataclasses find by their `__module__`; with it go the files that a page has imported."""
    module = ModuleType(name)
    loaded = set(sys.modules)
    sys.modules[name] = module
    try:
        yield module
    finally:
        here = str(Path.cwd())
        for each in set(sys.modules) - loaded:
            if each == name or str(getattr(sys.modules[each], "__file__", "") or "").startswith(here):
                del sys.modules[each]


def _type(command: Command, block: Block, shell: Shell, ports: dict[str, str]) -> None:
    expected = [with_free_ports(line, ports) for line in command.prints]
    typed = with_free_ports(command.typed, ports)

    def came_true(lines: list[str]) -> bool:
        return is_printed(expected, lines)

    # Pages say what a quiet machine needs. On a busy one a reader looks again, or gives more time to what is done once.
    if _LOOKS_LATER.match(typed):
        deadline, came = time.monotonic() + PATIENCE_SECONDS, False
        code, printed = -1, list[str]()
        while not came and time.monotonic() < deadline:
            code, printed, _ = shell.run(typed, until=lambda _: True)
            came = came_true(printed)
    else:
        code, printed, came = shell.run(_TAKES_TIME.sub(_twice, typed), until=came_true)

    parts = {
        f"{block.page.relative_to(ROOT)}:{command.line}: $ {command.typed}": [f"exit code {code}"],
        "it printed": printed,
        "and not": expected,
        "what servers logged": shell.logged(),
    }
    assert came, "\n".join(line for title, lines in parts.items() for line in (f"-- {title}", *lines))


def _twice(match: re.Match[str]) -> str:
    return f"{match[1]} {2 * int(match[2])}"


def _variables(ports: Mapping[str, str]) -> dict[str, str]:
    """What moves servers, and those who ask them, from their usual ports to these."""
    return {
        "PORT": ports["8092"],
        "SAGALOOM_URL": f"http://127.0.0.1:{ports['8092']}",
        "SAGALOOM_JOBS_URL": f"http://127.0.0.1:{ports['8091']}",
    }


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
