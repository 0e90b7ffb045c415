"""The package as a whole: its names, its weight, and the examples in its documentation."""

import doctest
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sagaloom

MODULES = (
    *("sagaloom", "sagaloom.builder", "sagaloom.builder.settings", "sagaloom.builder.stages", "sagaloom.codec"),
    *("sagaloom.config", "sagaloom.definitions"),
    *("sagaloom.describe", "sagaloom.durations", "sagaloom.effects", "sagaloom.errors", "sagaloom.fingerprint"),
    *("sagaloom.ids", "sagaloom.messages"),
)
CONTRACT = """
    define_saga define_signal define_query
    saga_complete saga_fail saga_compensate send schedule spawn cancel_scheduled ALL_STEPS
    SagaBuilder SagaDefinition SagaState SagaMessage SagaContext SagaHandler SagaCorrelation SagaDurabilityTier
    CascadedMessage SignalDefinition QueryDefinition RetryPolicy SagasError
    SAGA_DURABILITY_TIERS CASCADED_MESSAGE_KINDS SAGA_INSTANCE_STATUSES
"""
HEAVY = (
    "asyncio attrs fastapi httpx2 opentelemetry pydantic redis sqlalchemy "
    "sqlite3 apsw starlette structlog uvicorn typer rich"
)


def test_every_promised_name_is_public() -> None:
    assert set(CONTRACT.split()) <= set(sagaloom.__all__)


def test_every_public_name_exists_once() -> None:
    assert len(sagaloom.__all__) == len(set(sagaloom.__all__))
    assert [name for name in sagaloom.__all__ if not hasattr(sagaloom, name)] == []


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    assert project["version"] == sagaloom.__version__


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, sagaloom, sagaloom.config; print([n for n in {HEAVY.split()!r} if n in sys.modules])"

    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout

    assert loaded.strip() == "[]"


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_documentation_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs={"define_saga": sagaloom.define_saga})

    assert failed == 0


def test_every_public_function_has_an_example() -> None:
    without = [
        name
        for name in sagaloom.__all__
        if name.islower() and not name.startswith("__") and ">>>" not in (getattr(sagaloom, name).__doc__ or "")
    ]

    assert without == []
