"""Accept and apply by hand, a commit each: what a message costs that is put into the inbox first and applied then.

The same tables and rows as the bare loop, with the inbox row in between: one commit writes the mark and the inbox row
(and, for a new key, its head and a `pending` row of the index), the next one applies the message and takes both away.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.bare import rows
from bench.bare.loop import (
    DELETE_INBOX,
    DELETE_INDEX,
    DELETE_OUTBOX,
    INSERT_CORRELATION,
    INSERT_DEDUPE,
    INSERT_FEED,
    INSERT_INBOX,
    INSERT_INDEX,
    INSERT_OUTBOX,
    INSERT_STATE,
    INSERT_TRANSITION,
    UPDATE_STATE,
    Batch,
    Connection,
    Row,
    commit,
)

__all__ = ["prepared", "run"]

_UPDATE_CORRELATION = "UPDATE t_correlation SET v = ?, s = ? WHERE k = ? AND s = ?"


def prepared(orders: int) -> list[tuple[Batch, Batch]]:
    """For each message its two commits, in order."""
    parts = rows.partitions(orders)
    pairs: list[tuple[Batch, Batch]] = []
    settled: list[Row] = []
    number = events = 0
    stamp = 1
    for pk in range(1, orders + 1):
        part = parts[pk - 1]
        stamp_of_state = 0
        for step in range(3):
            stamp += 1
            inbox_key = rows.outbox_key(part, number)
            accept: list[tuple[str, list[Row]]] = []
            if step == 0:
                head = bytes(rows.HEAD_BYTES)
                accept.append((INSERT_CORRELATION, [(rows.correlation_key(pk), head, stamp)]))
                accept.append((INSERT_INDEX, [(rows.index_key(pk, b"pending"), head, stamp)]))
            accept.append((INSERT_DEDUPE, [(rows.dedupe_key(pk, step + 1), bytes(rows.DEDUPE_BYTES), stamp)]))
            accept.append((INSERT_INBOX, [(inbox_key, bytes(rows.INBOX_BYTES[step]), stamp)]))
            stamp += 1
            apply: list[tuple[str, list[Row]]] = [(DELETE_INBOX, [(inbox_key,)])]
            if settled:
                apply.append((DELETE_OUTBOX, settled))
            value = bytes(rows.STATE_BYTES[step])
            if step == 0:
                head_row = (bytes(rows.HEAD_BYTES), stamp, rows.correlation_key(pk), stamp - 1)
                apply.append((_UPDATE_CORRELATION, [head_row]))
                apply.append((DELETE_INDEX, [(rows.index_key(pk, b"pending"),)]))
                apply.append((INSERT_INDEX, [(rows.index_key(pk, b"running"), b"", stamp)]))
                apply.append((INSERT_STATE, [(rows.state_key(pk), value, stamp)]))
            else:
                apply.append((UPDATE_STATE, [(value, stamp, rows.state_key(pk), stamp_of_state)]))
            if step == 2:
                apply.append((DELETE_INDEX, [(rows.index_key(pk, b"running"),)]))
                apply.append((INSERT_INDEX, [(rows.index_key(pk, b"completed"), b"", stamp)]))
            stamp_of_state = stamp
            outbox_key = rows.outbox_key(part, number)
            entry = bytes(rows.TRANSITION_BYTES[step])
            apply.append((INSERT_TRANSITION, [(rows.transition_key(pk, step + 1), entry, stamp)]))
            apply.append((INSERT_OUTBOX, [(outbox_key, bytes(rows.EFFECT_BYTES[step]), stamp)]))
            apply.append((INSERT_FEED, [(rows.feed_key(events), bytes(rows.FEED_BYTES[step]), stamp)]))
            settled = [(outbox_key,)]
            pairs.append(
                (
                    Batch.of(((1, "c:inbox"),), accept),
                    Batch.of(((1, "c:outbox"), (rows.EVENTS[step], "c:feed")), apply),
                )
            )
            number += 1
            events += rows.EVENTS[step]
    return pairs


def run(connection: Connection, pairs: Sequence[tuple[Batch, Batch]]) -> list[float]:
    """Commits all pairs; the seconds that each pair took."""
    cursor = connection.cursor()
    seconds: list[float] = []
    for accept, apply in pairs:
        began = time.perf_counter()
        commit(connection, cursor, accept)
        commit(connection, cursor, apply)
        seconds.append(time.perf_counter() - began)
    return seconds
