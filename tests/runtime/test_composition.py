"""Putting a runtime together, and who closes what."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sagaloom.runtime
from sagaloom import SagaDefinition, define_saga, saga_complete, send
from sagaloom.demo import sagas
from sagaloom.errors import ConfigurationError
from sagaloom.kv import MemoryKeyValue
from sagaloom.presets import start_saga_handlers, start_sagas
from sagaloom.runtime import PublishReceipt, create_durable_saga_runtime, open_saga_runtime_kv
from sagaloom.stores import KvSagaStore
from sagaloom.targets import EffectRequest, callable_target

SETTINGS_CREATED = {"type": "UserSettingsCreated", "payload": {"userId": "u-1"}, "correlation_key": "u-1"}


class Watched(KvSagaStore):
    """A store that tells whether it was closed."""

    is_closed = False

    async def close(self) -> None:
        self.is_closed = True
        await super().close()


async def test_an_injected_store_wins_and_stays_open() -> None:
    store = Watched(MemoryKeyValue())

    durable = await create_durable_saga_runtime("sql", store=store, definitions=sagas)
    await durable.start()
    await durable.dispose()
    await durable.dispose()

    assert durable.store is store
    assert durable.runtime.store is store
    assert not store.is_closed


async def test_an_injected_kv_stays_open() -> None:
    kv = MemoryKeyValue()

    async with create_durable_saga_runtime("kv", kv=kv, definitions=sagas) as durable:
        await durable.runtime.publish(SETTINGS_CREATED, wait=30)

    async with create_durable_saga_runtime(kv=kv, definitions=sagas) as durable:
        assert await durable.runtime.get_instance("user-settings-saga", "u-1") is not None


async def test_without_a_choice_the_kv_store_is_opened_said_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NETSCRIPT_SAGA_KV_PATH", raising=False)

    with caplog.at_level(logging.INFO, logger="sagaloom"):
        async with create_durable_saga_runtime(definitions=sagas) as durable:
            receipt = await durable.runtime.publish(SETTINGS_CREATED, wait=30)

    assert isinstance(receipt, PublishReceipt)
    assert receipt.outcomes[0].status == "completed"
    assert "saga store: kv in .sagaloom/sagas.db" in caplog.messages
    async with create_durable_saga_runtime(path=tmp_path / ".sagaloom" / "sagas.db") as again:
        assert await again.runtime.get_instance("user-settings-saga", "u-1") is not None


async def test_the_environment_names_the_file_of_the_kv_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETSCRIPT_SAGA_KV_PATH", str(tmp_path / "deep" / "er" / "named.db"))

    kv = await open_saga_runtime_kv()
    await kv.close()

    assert (tmp_path / "deep" / "er" / "named.db").is_file()


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigurationError, match="NETSCRIPT_SAGA_KV_PATH"):
        await open_saga_runtime_kv(tmp_path / "file" / "sagas.db")


async def test_sql_without_a_database_is_refused() -> None:
    for backend in ("sql", "prisma"):
        with pytest.raises(ConfigurationError) as caught:
            await create_durable_saga_runtime(backend)
        assert caught.value.message == "Sql saga store backend requires an engine or a url."


@pytest.mark.parametrize(
    ("database", "reason"),
    [
        ({"url": "mysql://localhost/sagas"}, "'mysql' is no PostgreSQL address"),
        ({"url": "localhost"}, "is no PostgreSQL address"),
        ({"url": "postgresql://localhost:many/sagas"}, "has no valid port"),
        ({"url": "postgresql://localhost/sagas?schema=a b"}, "schema 'a b' is no plain name"),
        ({"engine": object()}, "engine= is object: give an asyncpg pool"),
        ({"url": "postgresql://localhost/sagas", "engine": object()}, "leave one of them out"),
    ],
)
async def test_what_is_no_database_of_ours_is_refused_and_said_why(database: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await create_durable_saga_runtime(**database)

    assert reason in caught.value.message


async def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigurationError, match='backend="kv" contradicts'):
        await create_durable_saga_runtime("kv", url="postgresql://localhost/sagas")
    with pytest.raises(ConfigurationError, match=r'Invalid saga store backend "redis"'):
        await create_durable_saga_runtime("redis")  # type: ignore[arg-type]


async def test_two_runtimes_on_one_file_share_its_work(tmp_path: Path) -> None:
    path = tmp_path / "sagas.db"
    async with (
        create_durable_saga_runtime(path=path, definitions=sagas) as first,
        create_durable_saga_runtime(path=path, definitions=sagas) as second,
    ):
        receipts = [
            await durable.runtime.publish(SETTINGS_CREATED, correlation_key=f"{name}-{n}", wait=30)
            for name, durable in (("first", first), ("second", second))
            for n in range(8)
        ]

        assert [receipt.outcomes[0].disposition for receipt in receipts if receipt.published] == ["applied"] * 16


async def test_what_was_opened_is_closed_when_composing_fails(tmp_path: Path) -> None:
    path = tmp_path / "sagas.db"
    twice = [callable_target("email", lambda _: None), callable_target("email", lambda _: None)]

    with pytest.raises(Exception, match="email"):
        await create_durable_saga_runtime(path=path, targets=twice)

    async with create_durable_saga_runtime(path=path):
        pass


async def test_targets_of_the_host_get_the_effects_and_stay_the_hosts() -> None:
    seen: list[EffectRequest] = []
    saga = welcome_saga()

    async with start_sagas([saga], kv=MemoryKeyValue(), targets=[callable_target("email", seen.append)]) as started:
        await started.bus.publish({"type": "SignedUp", "correlation_key": "u-1"}, wait=30)
        await started.runtime.settled()

    assert [(request.target_id, request.payload, request.attempt) for request in seen] == [
        ("welcome", {"to": "u-1"}, 1)
    ]


async def test_addresses_beside_a_service_target_of_the_host_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="hand the addresses to that target"):
        await create_durable_saga_runtime(
            kv=MemoryKeyValue(), targets=[callable_target("service", lambda _: None)], services={"a": "http://a"}
        )


async def test_start_sagas_gives_a_running_system() -> None:
    started = await start_sagas(sagas, kv=MemoryKeyValue())

    receipt = await started.bus.publish(SETTINGS_CREATED, wait=30)

    assert receipt.published
    assert started.saga_count == 2
    assert started.bus is started.runtime
    await started.shutdown()
    await started.shutdown()
    refused = await started.bus.publish(SETTINGS_CREATED)
    assert not refused.published
    assert refused.retryable


async def test_start_sagas_can_leave_the_start_to_the_caller() -> None:
    started = await start_saga_handlers(sagas, kv=MemoryKeyValue(), auto_start=False)

    assert not started.runtime.health().ready

    await started.runtime.start()
    assert started.runtime.health().ready
    await started.shutdown()


def test_every_name_of_the_runtime_package_is_there() -> None:
    for name in sagaloom.runtime.__all__:
        assert getattr(sagaloom.runtime, name) is not None

    with pytest.raises(AttributeError, match="no_such_name"):
        sagaloom.runtime.no_such_name  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_runtime_loads_no_adapter() -> None:
    code = (
        "import sys, sagaloom.runtime;"
        "print([name for name in sys.modules if name.split('.')[0] in ('apsw', 'httpx2', 'fastapi', 'pydantic')"
        " or name.startswith(('sagaloom.stores', 'sagaloom.kv', 'sagaloom.targets', 'sagaloom.composition'))])"
    )

    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)

    assert found.stdout.strip() == "[]"


def welcome_saga() -> SagaDefinition[Any]:
    def signed_up(saga: Any, event: Any, context: Any) -> Any:
        return [send("email:welcome", {"to": context.correlation_key}), saga_complete()]

    return define_saga("welcome").state({"status": "new"}).on("SignedUp", signed_up).build()
