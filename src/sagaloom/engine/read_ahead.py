"""States that are read already, for the step that takes them up.

Whoever encodes a state has read it back, to see that nothing is lost, and what was read is what the next step of the
run would decode. So it is kept here, beside the bytes that it was read from, until a step on these very bytes takes it.
A step may change what it gets: what was taken is gone from here, and whoever comes second decodes the bytes anew. A
decision is the same either way; only its cost is not.

Few are kept, and no large ones: a run that is busy takes its state soon, and of the others nobody misses it.
"""

from __future__ import annotations

from typing import Any, Final

from sagaloom.codec import Codec

__all__ = ["keep_read", "read_state"]

_STATES_MAX: Final = 500
_BYTES_MAX: Final = 8 << 10

_read: dict[int, tuple[bytes, Codec[Any], Any]] = {}
"""By the identity of the bytes, which are kept beside the state: no other bytes can have it meanwhile."""


def keep_read(codec: Codec[Any], data: bytes, state: Any) -> None:
    """Keeps `state`, which `codec` has read from `data` and nobody else has, for the step that takes it up."""
    if len(data) > _BYTES_MAX:
        return
    if len(_read) >= _STATES_MAX:
        _read.clear()
    _read[id(data)] = (data, codec, state)


def read_state(codec: Codec[Any], data: bytes) -> Any:
    """The state of these bytes, shared with nobody. Raises `DecodeError`."""
    kept = _read.pop(id(data), None)
    return kept[2] if kept is not None and kept[1] is codec else codec.decode(data)
