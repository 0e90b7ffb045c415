"""For the tests of sagas, and of what is built on them.

    ManualClock      a clock that stands still until a test moves it
    scenario         given, when, then on one definition: no runtime, no I/O
    MemoryStore      a store in memory, so plain that it can be the model others are compared with
    RecordingStore   a store that remembers what was written through it
    faults           named faults at every step of the walk: an error, or a kill -9
    contracts        the test suites that every store has to pass
    check_invariants what must hold of a store, whatever happened to it

Importing this package loads neither pytest nor a database driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sagaloom.testing.clock import ManualClock
from sagaloom.testing.invariants import check_invariants
from sagaloom.testing.scenario import Scenario, scenario

if TYPE_CHECKING:
    from sagaloom.testing import contracts, faults
    from sagaloom.testing.memory_store import MemoryStore
    from sagaloom.testing.recording import RecordingStore

__all__ = [
    "ManualClock",
    "MemoryStore",
    "RecordingStore",
    "Scenario",
    "check_invariants",
    "contracts",
    "faults",
    "scenario",
]

_LATER = {"MemoryStore": "memory_store", "RecordingStore": "recording", "contracts": "contracts", "faults": "faults"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_LATER[name]}")
    return module if name == _LATER[name] else getattr(module, name)
