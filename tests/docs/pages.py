"""Pages as tests: their fenced blocks, and what is done with each.

A block is what its language says, unless a comment stands directly before it, which readers do not see:

    ```python                     run, in one module a page, from top to bottom; functions called test_... are called
    ```pycon                      a doctest, in the same module
    ```console                    typed into one shell a page; what follows a command is what it prints
    <!-- file: shop.py -->        the next block is written to that file instead
    <!-- output -->               the next block is what the Python block before it printed
    <!-- not run: why -->         the next console block is shown only

In expected output `...` stands for anything, a line that is only `...` for any lines, and runs of blanks are one.
Ports in the pages are the ones that people would use; `with_free_ports` makes each of them a free one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
DOCS: Final = ROOT / "docs"
_FENCE: Final = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n\n?)?(?P<fence>```+)(?P<language>[\w{}-]*)[^\n]*\n(?P<content>.*?)^(?P=fence)$",
    re.DOTALL | re.MULTILINE,
)
_MARKS: Final = ("file: ", "output", "not run: ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block. `line` is that of its first line of content, from 1."""

    page: Path
    line: int
    language: str
    content: str
    mark: str | None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that this block is."""
        return self.mark.removeprefix("file: ") if self.mark is not None and self.mark.startswith("file: ") else None

    @property
    def is_shown_only(self) -> bool:
        return self.mark is not None and self.mark.startswith("not run: ")


@dataclass(frozen=True, slots=True)
class Command:
    """What is typed into a shell, and the lines that it prints."""

    line: int
    typed: str
    prints: tuple[str, ...]


def with_free_ports(text: str, ports: Mapping[str, str]) -> str:
    """`text` with each port that `ports` names replaced."""
    return re.sub(r"\b(" + "|".join(ports) + r")\b", lambda match: ports[match[0]], text) if ports else text


def pages() -> list[Path]:
    """The README and every page of the documentation."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of `page`, in order."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in _FENCE.finditer(text):
        mark = match["mark"]
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start("content")) + 1,
                language=match["language"],
                content=match["content"],
                mark=mark if mark is not None and mark.startswith(_MARKS) else None,
            )
        )
    return found


def commands_of(block: Block) -> list[Command]:
    """The commands of a console block: each begins with `$ `, and goes on behind a backslash at the end of a line."""
    commands: list[Command] = []
    typed: list[str] = []
    prints: list[str] = []
    at = block.line
    for number, line in enumerate([*block.content.splitlines(), "$ "], start=block.line):
        if line.startswith("$ "):
            if typed:
                commands.append(Command(at, "\n".join(typed), tuple(prints)))
            typed, prints, at = [line.removeprefix("$ ")], [], number
        elif typed and typed[-1].endswith("\\") and not prints:
            typed.append(line)
        else:
            prints.append(line)
    return commands


def is_printed(expected: Sequence[str], actual: Sequence[str]) -> bool:
    """Whether `actual` is what a page says. Blank lines do not count."""
    wanted = [_words(line) for line in expected if line.strip()]
    got = [_words(line) for line in actual if line.strip()]
    pattern = "".join(".*" if line == "..." else _pattern(line) + "\n" for line in wanted)
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in got), re.DOTALL) is not None


def _pattern(line: str) -> str:
    return "[^\n]*".join(re.escape(part) for part in line.split("..."))


def _words(line: str) -> str:
    return " ".join(line.split())
