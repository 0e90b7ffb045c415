"""Docstrings as autodoc wants them. Ours are written to be read in the code: a word of code has one backtick, and an
indented block is code, or a drawing."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_WORD = re.compile(r"(?<![`:\w])`([^`]+)`(?![`_])")
_ITEM = re.compile(r"(?:[-*]|\d+\.) ")
_STATEMENT = re.compile(r"(?:async with|await|from|import|with) ")
_LOOKS_LIKE_PYTHON = re.compile(r"^(?:from|import|async|await|def|class|with|@|\w+ = |\w+\()", re.MULTILINE)

# What a user is handed and never makes: how it is made is ours. And one whose docstring tells each of its options, but
# whose signature tells the value of a default that is the whole environment.
_NOT_MADE_BY_HAND = frozenset(
    (
        "sagaloom.SagaContext",
        "sagaloom.SagaDefinition",
        "sagaloom.SagaDraft",
        "sagaloom.SagaWithHandlers",
        "sagaloom.SagaWithState",
        "sagaloom.ports.targets.EffectTarget",
        "sagaloom.presets.StartedSagas",
        "sagaloom.runtime.DurableSagaRuntime",
        "sagaloom.runtime.HttpSagaPublisherOptions",
        "sagaloom.runtime.SagaStorePort",
        "sagaloom.testing.Scenario",
    )
)


def as_restructured_text(lines: Iterable[str]) -> list[str]:
    """The lines of a docstring with double backticks, and with a directive before each block of code."""
    told: list[str] = []
    is_item = False
    for paragraph in _paragraphs(lines):
        first = paragraph[0]
        # What is indented below an item of a list belongs to it.
        is_item = bool(_ITEM.match(first)) or (is_item and first.startswith(" "))
        if (first.startswith("    ") and not is_item) or _is_statement(paragraph):
            told += _directive(paragraph)
        elif first.lstrip().startswith(">>>"):
            told += paragraph
        else:
            # Together: a word of code may be broken at the end of a line.
            told += _WORD.sub(r"``\1``", "\n".join(paragraph)).split("\n")
        told.append("")
    return told


def _paragraphs(lines: Iterable[str]) -> Iterator[list[str]]:
    """Runs of lines without a blank one; indented runs one after the other are one, with the blank lines in it."""
    paragraph: list[str] = []
    blanks = 0
    for line in lines:
        if not line.strip():
            blanks += 1
            continue
        is_indented = line.startswith("    ")
        if paragraph and blanks and not (is_indented and paragraph[0].startswith("    ")):
            yield paragraph
            paragraph, blanks = [], 0
        paragraph += [""] * (blanks if paragraph else 0)
        paragraph.append(line)
        blanks = 0
    if paragraph:
        yield paragraph


def _is_statement(paragraph: list[str]) -> bool:
    """Whether this is code that the formatter has moved to the margin, as it does where no prose follows."""
    if not _STATEMENT.match(paragraph[0]):
        return False
    try:
        compile("\n".join(paragraph), "docstring", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT | ast.PyCF_ONLY_AST)
    except SyntaxError:
        return False
    return True


def _directive(block: list[str]) -> list[str]:
    text = textwrap.dedent("\n".join(block))
    language = "python" if _LOOKS_LIKE_PYTHON.search(text) else "text"
    return [f".. code-block:: {language}", "", *textwrap.indent(text, "    ").split("\n"), ""]


def _convert(_: Sphinx, what: str, name: str, object_: object, options: object, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)


def _without_signature(
    _: Sphinx, what: str, name: str, object_: object, options: object, signature: str | None, answer: str | None
) -> tuple[str, None] | None:
    is_like_its_base = what == "exception" and name != "sagaloom.errors.SagasError"
    return ("", None) if is_like_its_base or name in _NOT_MADE_BY_HAND else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _convert)
    app.connect("autodoc-process-signature", _without_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
