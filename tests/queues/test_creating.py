"""Which provider a queue gets, and what is refused before anything connects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sagaloom.errors import ConfigurationError, DefinitionError
from sagaloom.queue import (
    Queue,
    QueueConnectionOptions,
    QueueProvider,
    create_parallel_queue,
    create_queue,
    create_typed_queue,
)
from sagaloom.queue.providers import address_of, choose_provider, provider_of

NOTHING = QueueConnectionOptions()


def test_rabbitmq_is_found_before_redis_and_redis_before_the_embedded_one() -> None:
    both = {"REDIS_URL": "redis://cache", "services__rabbitmq__amqp__0": "amqp://broker"}

    assert choose_provider(NOTHING, both) is QueueProvider.RABBITMQ
    assert choose_provider(NOTHING, {"REDIS_URL": "redis://cache"}) is QueueProvider.REDIS
    assert choose_provider(NOTHING, {"DATABASE_URL": "postgresql://db/x"}) is QueueProvider.KV


def test_what_the_caller_says_comes_before_the_environment() -> None:
    connection = QueueConnectionOptions(redis="redis://mine")

    assert address_of(QueueProvider.REDIS, connection, {"REDIS_URL": "redis://theirs"}) == "redis://mine"


@pytest.mark.parametrize(
    ("provider", "value", "url"),
    [
        ("redis", "cache:6379", "redis://cache:6379"),
        ("redis", "cache:6379,password=p@ss,ssl=true,defaultDatabase=2", "rediss://:p%40ss@cache:6379/2"),
        ("rabbitmq", "tcp://broker:5672", "amqp://broker:5672"),
        ("postgres", "Host=db;Port=5433;Username=u;Password=p;Database=shop", "postgresql://u:p@db:5433/shop"),
    ],
)
def test_connection_strings_of_dotnet_are_understood(provider: str, value: str, url: str) -> None:
    chosen = provider_of(provider)

    assert address_of(chosen, NOTHING, {f"ConnectionStrings__{provider}": value}) == url


@pytest.mark.parametrize(
    ("variables", "path"),
    [
        ({}, ".sagaloom/queues.db"),
        ({"ConnectionStrings__kv": "Data Source=/data/kv.db;Cache=Shared"}, "/data/kv.db"),
        ({"NETSCRIPT_QUEUE_KV_PATH": "q.db", "services__kv__sqlite__0": "other.db"}, "q.db"),
    ],
)
def test_the_embedded_file_is_found(variables: dict[str, str], path: str) -> None:
    assert address_of(QueueProvider.KV, NOTHING, variables) == path


def test_an_embedded_queue_over_http_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="DENO_KV_URL names 'http://kv:4512', and the embedded queue needs a"):
        address_of(QueueProvider.KV, NOTHING, {"DENO_KV_URL": "http://token@kv:4512"})


def test_a_broker_that_nobody_names_is_asked_for_by_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("ConnectionStrings__postgres", "POSTGRES_URL", "DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)

    with pytest.raises(ConfigurationError, match=r"postgres connection not found.*POSTGRES_URL, DATABASE_URL"):
        create_queue("mails", provider="postgres")


def test_an_address_of_something_else_is_refused_without_its_password() -> None:
    with pytest.raises(ConfigurationError, match="no address of redis: 'http://cache'") as refused:
        address_of(QueueProvider.REDIS, QueueConnectionOptions(redis="http://me:secret@cache"), {})

    assert "secret" not in str(refused.value)


def test_deno_kv_is_another_word_for_the_embedded_one() -> None:
    assert provider_of("deno-kv") is provider_of("KV") is QueueProvider.DENO_KV is QueueProvider.KV


@pytest.mark.parametrize("provider", ["kafka", 3, ""])
def test_an_unknown_provider_is_refused_with_those_that_there_are(provider: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"Unknown queue provider: .*; there are kv, redis, rabbitmq, postgres"
    ):
        create_queue("mails", provider=provider)


@pytest.mark.parametrize("name", ["", "a b", "../x", "é", "-x", "x" * 101, None])
def test_a_name_that_no_broker_would_take_is_refused(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="no name for a queue"):
        create_queue(name, provider="kv")


@pytest.mark.parametrize("concurrency", [0, -1, 1.5, True, None])
def test_a_concurrency_below_one_is_refused(concurrency: Any) -> None:
    with pytest.raises(ConfigurationError, match="concurrency must be a whole number of at least 1"):
        create_parallel_queue("mails", concurrency=concurrency, provider="kv")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"retry_attempts": -1}, "retry_attempts must be a whole number of at least 0, got -1"),
        ({"retry_delay": "soon"}, "retry_delay of queue 'mails'"),
        ({"max_length": 0}, "max_length=0 of queue 'mails'"),
        ({"deduplication_window": 0}, "deduplication_window=0 of queue 'mails'"),
        ({"max_message_bytes": 0}, "max_message_bytes must be"),
        ({"connection": "redis://x"}, "connection of queue 'mails'"),
        ({"retries": 3}, "queue 'mails' has no option 'retries'; there are auto_discover"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_name(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        create_queue("mails", provider="kv", **options)


def test_a_parallel_queue_of_one_is_the_plain_queue() -> None:
    plain, parallel = create_queue("a", provider="kv"), create_parallel_queue("a", provider="kv")

    assert type(plain) is type(parallel) is Queue
    assert plain.settings == parallel.settings


def test_a_type_that_is_no_json_is_refused_when_the_queue_is_made() -> None:
    with pytest.raises(DefinitionError, match="NotData cannot be turned into JSON and back"):
        create_typed_queue("mails", type("NotData", (), {"__init__": lambda self, x: None}), provider="kv")


def test_making_a_queue_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    create_queue("mails", provider="kv")

    assert list(tmp_path.iterdir()) == []
