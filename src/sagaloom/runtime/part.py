"""What the parts of `SagaRuntime` have in common, whoever they are for: senders, onlookers or operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sagaloom.clock import Clock
from sagaloom.engine.correlation import DefinitionSet
from sagaloom.errors import BackendUnavailable
from sagaloom.ports.store import SagaStore
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.receiver import Receiver
from sagaloom.runtime.signals import Signals

if TYPE_CHECKING:
    from sagaloom.telemetry.sagas import SagaTelemetry

__all__ = ["Part"]


class Part:
    """What `SagaRuntime` makes, and each of its parts works with."""

    store: SagaStore
    clock: Clock
    options: RuntimeOptions
    definitions: DefinitionSet
    telemetry: SagaTelemetry | None
    _receiver: Receiver
    _signals: Signals
    _state: str

    def _refuse_if_not_running(self) -> None:
        if self._state != "running":
            raise BackendUnavailable(f"the runtime is {self._state}", code="SAGA_NOT_STARTED")
