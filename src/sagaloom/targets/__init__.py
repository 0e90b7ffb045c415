"""Targets: how effects leave, one kind each.

`CallableTarget` hands an effect to a Python function of the host; `ServiceTarget` posts it to an HTTP service.
"""

from __future__ import annotations

from sagaloom.targets.callables import CallableTarget, EffectRequest, EffectResult, callable_target
from sagaloom.targets.service import ServiceTarget, discover_service

__all__ = [
    "CallableTarget",
    "EffectRequest",
    "EffectResult",
    "ServiceTarget",
    "callable_target",
    "discover_service",
]
