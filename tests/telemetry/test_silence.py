"""Where nobody listens nothing is recorded, nothing is loaded for it, and next to nothing is paid."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NoOpTracerProvider, ProxyTracerProvider

from sagaloom import define_saga, send
from sagaloom.runtime import SagaRuntime
from sagaloom.telemetry import TelemetryProviders, find_providers
from sagaloom.testing import ManualClock, MemoryStore
from sagaloom.workers import JobContext, JobResult, create_success_result, define_job_handler
from tests.runtime.conftest import Bench
from tests.workers.jobs_room import open_room

pytestmark = pytest.mark.anyio

_SAGAS_WITHOUT_A_DOOR = """
import asyncio, sys
from sagaloom import define_saga, send
from sagaloom.presets import start_sagas
from sagaloom.targets import callable_target

saga = define_saga("s").state({}).on("Do", lambda saga, event, context: [send("email:x", {})]).build()

async def main():
    targets = [callable_target("email", lambda request: None)]
    async with start_sagas([saga], path=sys.argv[1], targets=targets) as sagas:
        (await sagas.bus.publish({"type": "Do", "payload": {}}, wait=5)).raise_for_rejected()
        await sagas.runtime.settled()
        return sagas.runtime.telemetry

telemetry = asyncio.run(main())
print(telemetry, sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""

_A_GLOBAL_PROVIDER = """
import asyncio
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sagaloom import define_saga
from sagaloom.kv import MemoryKeyValue
from sagaloom.presets import start_sagas

exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))
saga = define_saga("s").state({}).on("Do", lambda saga, event, context: []).build()

async def main():
    async with start_sagas([saga], kv=MemoryKeyValue()) as sagas:
        (await sagas.bus.publish({"type": "Do", "payload": {}}, wait=5)).raise_for_rejected()
        scopes = reader.get_metrics_data().resource_metrics[0].scope_metrics
        print([span.name for span in exporter.get_finished_spans()], [scope.scope.name for scope in scopes])

asyncio.run(main())
"""


def run(code: str, *arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def test_sagas_run_without_opentelemetry_being_loaded(tmp_path: Any) -> None:
    assert run(_SAGAS_WITHOUT_A_DOOR, str(tmp_path / "sagas.db")) == "None []"


def test_the_providers_of_the_process_are_found_when_a_runtime_starts() -> None:
    assert run(_A_GLOBAL_PROVIDER) == "['saga.handle', 'saga.publish'] ['netscript.sagas']"


@pytest.mark.parametrize("module", ["sagaloom", "sagaloom.telemetry", "sagaloom.publisher", "sagaloom.workers"])
def test_importing_what_users_import_does_not_load_opentelemetry(module: str) -> None:
    assert run(f"import sys, {module}; print('opentelemetry' in sys.modules)") == "False"


def test_a_provider_that_is_asked_for_by_the_environment_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "from sagaloom.telemetry import find_providers\n"
        "found = find_providers()\n"
        "print(type(found.tracer_provider).__module__, found.meter_provider)"
    )
    monkeypatch.setenv("OTEL_PYTHON_TRACER_PROVIDER", "sdk_tracer_provider")

    assert run(code) == "opentelemetry.sdk.trace None"


def test_proxies_and_no_ops_are_nobody() -> None:
    # This process has loaded OpenTelemetry, and set nothing.
    assert find_providers() is None


@pytest.mark.parametrize("provider", [NoOpTracerProvider(), ProxyTracerProvider(), NoOpMeterProvider()])
def test_what_the_interface_brings_along_is_no_provider(monkeypatch: pytest.MonkeyPatch, provider: Any) -> None:
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)
    monkeypatch.setattr("opentelemetry.metrics.get_meter_provider", lambda: provider)

    assert find_providers() is None


def test_one_of_the_two_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr("opentelemetry.trace.get_tracer_provider", lambda: provider)

    assert find_providers() == TelemetryProviders(provider, None)


async def test_without_a_provider_nobody_is_told_anything(bench: Bench) -> None:
    saga = define_saga("s").state({}).on("Do", lambda saga, event, context: [send("service:p", {})]).build()
    life = await bench.live(saga)

    await life.publish("Do", key="k")
    await life.runtime.settled()

    roles: tuple[Any, ...] = (life.runtime, life.runtime._receiver, life.runtime._dispatcher)
    assert [role.telemetry for role in roles] == [None, None, None]
    assert [effect.traceparent for effect in bench.receiver.got] == [None]


async def test_without_a_provider_jobs_tell_nobody_anything() -> None:
    @define_job_handler
    async def greet(ctx: JobContext[dict[str, Any]]) -> JobResult[None]:
        return create_success_result(None)

    async with open_room(greet) as room:
        await room.run("greet")

        assert room.runtime._attempts.telemetry is None


async def test_a_runtime_that_does_not_start_listens_to_nothing() -> None:
    runtime = SagaRuntime(MemoryStore(), clock=ManualClock(), telemetry=TelemetryProviders())

    assert runtime.telemetry is None
