"""Whether anybody listens.

OpenTelemetry's interface always answers: while no SDK is set it hands out tracers and meters that do nothing, slowly.
So the question is asked once, when a runtime starts, and where the answer is no nothing of it is ever called.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

__all__ = ["TelemetryProviders", "find_providers"]

_VARIABLES: Final = ("OTEL_PYTHON_TRACER_PROVIDER", "OTEL_PYTHON_METER_PROVIDER")
_OWN_MODULES: Final = ("opentelemetry.trace", "opentelemetry.metrics")


@dataclass(frozen=True, slots=True)
class TelemetryProviders:
    """Where spans and metrics go. Without a tracer provider no spans are made, without a meter provider no metrics."""

    tracer_provider: TracerProvider | None = None
    meter_provider: MeterProvider | None = None


def find_providers() -> TelemetryProviders | None:
    """The providers that this process has set, or None when it has set none."""
    # Whoever has set one has loaded OpenTelemetry for it, or asks for one by its variables.
    if "opentelemetry" not in sys.modules and not any(name in os.environ for name in _VARIABLES):
        return None
    from opentelemetry.metrics import get_meter_provider
    from opentelemetry.trace import get_tracer_provider

    tracer_provider, meter_provider = get_tracer_provider(), get_meter_provider()
    found = TelemetryProviders(
        tracer_provider if _is_real(tracer_provider) else None,
        meter_provider if _is_real(meter_provider) else None,
    )
    return None if found == TelemetryProviders() else found


def _is_real(provider: object) -> bool:
    # Those of the interface itself, proxies and no-ops, are the only ones that live in its own modules.
    return not type(provider).__module__.startswith(_OWN_MODULES)
