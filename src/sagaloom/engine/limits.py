"""What may not grow without end, and how far it may."""

from __future__ import annotations

import msgspec

__all__ = ["Limits"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one runtime. Exceeding one is a clear error that changes nothing."""

    payload_bytes_max: int = 1 << 20
    state_bytes_max: int = 4 << 20
    effects_max: int = 10_000
    effects_bytes_max: int = 4 << 20
    compensation_depth_max: int = 32
    hops_max: int = 100
    batch_messages_max: int = 1_000
    timers_per_instance_max: int = 1_000
    bystander_rows_max: int = 100
