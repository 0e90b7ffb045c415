"""How the command line prints: tables and fields for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "print_fields", "print_json", "print_next_page", "print_one", "print_table"]

_WIDTH_WITHOUT_TERMINAL = 250


def console() -> Console:
    """Where people read. Without a terminal lines are wide, so that a pipe gets whole ids."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else _WIDTH_WITHOUT_TERMINAL)


def print_json(value: object) -> None:
    """`value` as indented JSON; one document, nothing around it."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """A table without lines, or `empty` when it has no rows."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*("" if cell is None else escape(_one_line(cell)) for cell in row))
    console().print(table if table.row_count else f"[dim]{escape(empty)}[/dim]")


def print_fields(fields: Mapping[str, object]) -> None:
    """Names and values, one a line; what is None is left out."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in fields.items():
        if value is not None:
            table.add_row(name, escape(value if isinstance(value, str) else _one_line(value)))
    console().print(table)


def print_one(answer: Mapping[str, Any], *, as_json: bool) -> None:
    """What a server says of one thing: as JSON, or as fields."""
    if as_json:
        print_json(answer)
    else:
        print_fields(answer)


def print_next_page(answer: Mapping[str, Any]) -> None:
    """How to get the page after this one, if there is one."""
    if answer.get("cursor"):
        print(f"more with --cursor {answer['cursor']}")


def _one_line(value: Any) -> str:
    if isinstance(value, str):
        return " ".join(value.splitlines())
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (Mapping, list, bool)) else str(value)
