"""How a publisher is set up: where it looks for the service, and which settings are refused at once."""

from __future__ import annotations

import doctest
import typing
from dataclasses import fields
from datetime import timedelta
from typing import Any

import pytest

from sagaloom import RetryPolicy, outbound
from sagaloom.errors import ConfigurationError
from sagaloom.publisher import HttpSagaPublisherOptions, create_saga_publisher
from sagaloom.publisher.options import HttpSagaPublisherKeywords

PATH = "/api/v1/sagas/publish"


def found(environment: dict[str, str], **options: Any) -> str:
    return HttpSagaPublisherOptions(read_env=environment.get, **options).publish_url()


def test_the_first_address_that_is_set_wins() -> None:
    environment = {
        "SAGALOOM_DEV": "1",
        "NETSCRIPT_SAGAS_URL": "http://netscript",
        "SAGAS_API_URL": "http://sagas",
        "services__sagas-api__http__0": "http://aspire",
        "services__sagas-api__https__0": "https://aspire",
    }

    assert found(environment, base_url="http://mine:1") == f"http://mine:1{PATH}"
    for variable, host in [
        ("services__sagas-api__https__0", "https://aspire"),
        ("services__sagas-api__http__0", "http://aspire"),
        ("SAGAS_API_URL", "http://sagas"),
        ("NETSCRIPT_SAGAS_URL", "http://netscript"),
        ("SAGALOOM_DEV", "http://127.0.0.1:8092"),
    ]:
        assert found(environment) == f"{host}{PATH}"
        del environment[variable]


def test_another_service_name_reads_other_variables() -> None:
    assert found({"services__orders__http__0": "http://orders"}, service_name="orders") == f"http://orders{PATH}"


def test_the_address_is_looked_up_every_time() -> None:
    environment: dict[str, str] = {"SAGAS_API_URL": "http://old"}
    options = HttpSagaPublisherOptions(read_env=environment.get)
    before = options.publish_url()

    environment["SAGAS_API_URL"] = "http://new"

    assert (before, options.publish_url()) == (f"http://old{PATH}", f"http://new{PATH}")


@pytest.mark.parametrize("value", ["", " ", "0", "false", "no"])
def test_a_machine_that_is_not_said_to_be_a_developers_has_no_last_resort(value: str) -> None:
    with pytest.raises(ConfigurationError, match="SAGALOOM_DEV is not 1"):
        found({"SAGALOOM_DEV": value, "SAGAS_API_URL": "  "})


@pytest.mark.parametrize("value", ["1", "true", "Yes", " on "])
def test_a_developers_machine_is_said_in_the_words_of_the_settings(value: str) -> None:
    assert found({"SAGALOOM_DEV": value}) == f"http://127.0.0.1:8092{PATH}"


@pytest.mark.parametrize(
    ("base_url", "path", "expected"),
    [
        ("http://sagas:8092/", "/publish", "http://sagas:8092/publish"),
        ("http://sagas:8092/behind/", "publish", "http://sagas:8092/behind/publish"),
        (" https://sagas ", "/a?b=c", "https://sagas/a?b=c"),
    ],
)
def test_address_and_path_are_joined_by_one_slash(base_url: str, path: str, expected: str) -> None:
    assert found({}, base_url=base_url, publish_path=path) == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"base_url": "sagas:8092"}, "base_url is no http"),
        ({"base_url": "ftp://sagas"}, "base_url is no http"),
        ({"base_url": "http://"}, "base_url is no http"),
        ({"base_url": "http://sa gas"}, "base_url is no http"),
        ({"base_url": "http://sagas:99999"}, "base_url is no http"),
        ({"base_url": "http://sagas:0"}, "base_url is no http"),
        ({"base_url": "http://[::1"}, "base_url is no http"),
        ({"base_url": "http://sagas?x=1"}, "a query or a fragment"),
        ({"base_url": 8092}, "is no text"),
        ({"base_url": ""}, "base_url is no http"),
        ({"publish_path": "http://sagas/publish"}, "is no path"),
        ({"publish_path": ""}, "must be a word"),
        ({"service_name": " "}, "must be a word"),
        ({"id": None}, "must be a word"),
        ({"headers": ["a"]}, "must be a mapping"),
        ({"headers": {"a b": "c"}}, "is no name of a header"),
        ({"headers": {"x": "a\r\nb"}}, "holds what no header can carry"),
        ({"headers": {"x": "ü"}}, "holds what no header can carry"),
        ({"headers": {"Idempotency-Key": "k"}}, "would be the same for all messages"),
        ({"retryable_status_codes": 503}, "must be HTTP statuses"),
        ({"retryable_status_codes": [200]}, "must be HTTP statuses"),
        ({"retryable_status_codes": ["503"]}, "must be HTTP statuses"),
        ({"fetcher": "fetch"}, "must be a function"),
        ({"read_env": None}, "must be a function"),
        ({"timeout": 0}, "timeout=0 of a saga publisher must be seconds"),
        ({"timeout": float("nan")}, "must be seconds"),
        ({"timeout": "5s"}, "must be seconds"),
        ({"attempt_timeout": True}, "must be seconds"),
        ({"retries": -1}, "must be 0 to 100"),
        ({"retries": 1.5}, "must be 0 to 100"),
        ({"retries": RetryPolicy(maximum_attempts=0)}, "must be 0 to 100"),
        ({"nonsense": 1}, "unknown option 'nonsense' of a saga publisher; known are attempt_timeout, base_url"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_at_once(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        create_saga_publisher(**options)

    assert reason in caught.value.message


def test_no_secret_shows_in_what_is_refused_or_printed() -> None:
    with pytest.raises(ConfigurationError) as caught:
        HttpSagaPublisherOptions(headers={"authorization": "Bearer s\u00e9cret"})

    assert "cret" not in caught.value.message
    options = HttpSagaPublisherOptions(base_url="http://me:secret@sagas", headers={"authorization": "Bearer secret"})
    assert "secret" not in repr(options)
    assert "environ" not in repr(options)


def test_options_are_given_together_or_as_keywords_and_keywords_come_first() -> None:
    together = HttpSagaPublisherOptions(base_url="http://sagas", id="mine")

    assert create_saga_publisher(together).id == "mine"
    assert create_saga_publisher(together, id="other").id == "other"
    assert create_saga_publisher().id == "http-saga-publisher"


def test_every_option_is_a_keyword_too() -> None:
    options = typing.get_type_hints(HttpSagaPublisherOptions)

    assert {one.name: options[one.name] for one in fields(HttpSagaPublisherOptions)} == typing.get_type_hints(
        HttpSagaPublisherKeywords
    )


def test_times_are_seconds_or_lengths_of_time() -> None:
    options = HttpSagaPublisherOptions(timeout=timedelta(minutes=1), attempt_timeout=2)

    assert (options.timeout_seconds, options.attempt_seconds) == (60.0, 2.0)
    assert HttpSagaPublisherOptions(timeout=3).attempt_seconds == 3.0
    assert HttpSagaPublisherOptions().attempt_seconds == 10.0


def test_the_examples_of_what_all_http_clients_share_run() -> None:
    failed, _ = doctest.testmod(outbound)

    assert failed == 0
