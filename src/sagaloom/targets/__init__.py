"""Targets: how effects leave, one kind each.

`CallableTarget` hands an effect to a Python function of the host; `ServiceTarget` posts it to an HTTP service;
`JobTarget` triggers a background job; `QueueTarget` puts a message into a queue.
"""

from __future__ import annotations

from sagaloom.targets.callables import CallableTarget, EffectRequest, EffectResult, callable_target
from sagaloom.targets.queues import QueueTarget
from sagaloom.targets.service import ServiceTarget, discover_service
from sagaloom.targets.workers import JobTarget

__all__ = [
    "CallableTarget",
    "EffectRequest",
    "EffectResult",
    "JobTarget",
    "QueueTarget",
    "ServiceTarget",
    "callable_target",
    "discover_service",
]
