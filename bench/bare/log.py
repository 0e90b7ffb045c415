"""The floor: records appended to a file, with one fdatasync after so many of them.

python -m bench.bare.log FILE [RECORD_BYTES]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from bench.bare.rows import BYTES_PER_MESSAGE

__all__ = ["append"]


def append(path: Path, *, record_bytes: int, records_per_sync: int, syncs: int) -> float:
    """Records a second. The file grows from nothing, as a log does, and each record is written when it comes."""
    record = bytes(record_bytes)
    datasync = getattr(os, "fdatasync", os.fsync)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    try:
        began = time.perf_counter()
        for _ in range(syncs):
            for _ in range(records_per_sync):
                os.write(descriptor, record)
            datasync(descriptor)
        seconds = time.perf_counter() - began
    finally:
        os.close(descriptor)
        path.unlink()
    return syncs * records_per_sync / seconds


def _main() -> None:
    path = Path(sys.argv[1])
    record_bytes = int(sys.argv[2]) if len(sys.argv) > 2 else BYTES_PER_MESSAGE
    for records_per_sync in (1, 10, 100, 1000):
        rate = append(path, record_bytes=record_bytes, records_per_sync=records_per_sync, syncs=200)
        print(f"{rate:.0f} records/s, {records_per_sync} a sync")


if __name__ == "__main__":
    _main()
