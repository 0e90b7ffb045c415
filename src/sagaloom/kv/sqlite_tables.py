"""The tables of the embedded store: their statements, and the rows that one commit writes to each of them.

The first part of a key names the table, `t_<name>`. A table is one B-tree `WITHOUT ROWID` with the packed rest of the
key (`sagaloom.kv.packing`), the value, and the versionstamp. A commit writes table by table, and within a table in the
order in which it was asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, cast

from sagaloom.kv.packing import pack, table_of
from sagaloom.ports.keyvalue import Key

__all__ = ["CELLS_A_ROW", "ROWS_A_STATEMENT", "Batch", "Cells", "Table", "cells_by_table", "keys_of", "write_in_halves"]

# So many rows are inserted or deleted by one statement: that takes two thirds of a statement a row, with deletes four
# fifths, for which SQLite makes a tree of the keys first; and more rows gain nothing.
ROWS_A_STATEMENT: Final = 16

CELLS_A_ROW: Final = 3
Cells = list[bytes | int]
"""Rows one after the other: key, value, versionstamp, key, ... A list for each row would cost more than its cells."""


class Table:
    """The statements of one table, written once so that the statement cache always meets the same text."""

    __slots__ = (
        "count",
        "create",
        "delete",
        "delete_many",
        "get",
        "insert",
        "insert_many",
        "name",
        "put",
        "scan_down",
        "scan_up",
        "stamp",
    )

    def __init__(self, name: str) -> None:
        table = f"t_{name}"
        self.name = name
        self.create = (
            f"CREATE TABLE IF NOT EXISTS {table} (k BLOB PRIMARY KEY, v BLOB NOT NULL, s INTEGER NOT NULL)"
            " STRICT, WITHOUT ROWID"
        )
        self.get = f"SELECT v, s FROM {table} WHERE k = ?"
        self.stamp = f"SELECT s FROM {table} WHERE k = ?"
        # One row a statement: each may take the place of another, and then SQLite copies the pages that several touch.
        self.put = f"REPLACE INTO {table} VALUES (?, ?, ?)"
        # OR ROLLBACK, because the commit ends anyway when a row is taken: to be able to take back the statement alone,
        # SQLite would copy those pages too.
        self.insert = f"INSERT OR ROLLBACK INTO {table} VALUES (?, ?, ?)"
        self.insert_many = self.insert + ", (?, ?, ?)" * (ROWS_A_STATEMENT - 1)
        self.delete = f"DELETE FROM {table} WHERE k = ?"
        self.delete_many = f"DELETE FROM {table} WHERE k IN (?{', ?' * (ROWS_A_STATEMENT - 1)})"
        self.scan_up = f"SELECT k, v, s FROM {table} WHERE k > ? AND k < ? ORDER BY k LIMIT ?"
        self.scan_down = f"SELECT k, v, s FROM {table} WHERE k > ? AND k < ? ORDER BY k DESC LIMIT ?"
        self.count = f"SELECT count(*) FROM (SELECT 1 FROM {table} WHERE k > ? AND k < ? LIMIT ?)"


Batch = tuple[Callable[[Table, Cells], None], Table, Cells]


def cells_by_table(
    writes: Iterable[tuple[Key, bytes]], versionstamp: int, bases: Mapping[str, int]
) -> dict[str, Cells]:
    """The rows of `writes`, grouped so that each table gets one batch, in the order of `writes` within a table."""
    tables: dict[str, Cells] = {}
    for key, value in writes:
        try:
            cells = tables[key[0]]  # type: ignore[index]  # a miss is looked at next
        except LookupError:
            cells = tables.setdefault(table_of(key), [])
        cells += pack(key[1:], bases), value, versionstamp
    return tables


def keys_of(cells: Cells) -> list[bytes]:
    """The packed keys of the rows in `cells`."""
    return cast("list[bytes]", cells[::CELLS_A_ROW])


def write_in_halves(batches: Sequence[Batch], on_step: Callable[[str], None]) -> None:
    """Writes the rows of `batches` with a step after half of them, wherever in a table that is."""
    rows = sum(len(cells) for _, _, cells in batches) // CELLS_A_ROW
    left_of_first_half = (rows + 1) // 2 * CELLS_A_ROW
    reported = False
    for write, table, cells in batches:
        if not reported and len(cells) >= left_of_first_half:
            write(table, cells[:left_of_first_half])
            on_step("kv:half_written")
            reported = True
            write(table, cells[left_of_first_half:])
        else:
            write(table, cells)
            left_of_first_half -= len(cells)
    if not reported:
        on_step("kv:half_written")
