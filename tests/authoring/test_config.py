"""Configuration entries: what they hold, and what they refuse."""

from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import Any

import pytest

from sagaloom import DefinitionError, RetryPolicy, define_saga
from sagaloom.config import (
    SagaConfigEntry,
    SagaConfigRetention,
    SagaConfigRetry,
    SagaConfigTimeout,
    configured,
    define_saga_config,
    define_saga_group,
)
from sagaloom.definitions import RetentionPolicy

DRAFT: Any = define_saga_config(" order-saga ", " ./sagas/order.py ")
A_SAGA = define_saga("order-saga").state({}).on("OrderPlaced", lambda saga, event, context: []).build()


def test_an_entry_needs_no_more_than_an_id_and_an_entrypoint() -> None:
    expected = SagaConfigEntry(id="order-saga", entrypoint="./sagas/order.py", name="order-saga")

    assert expected == DRAFT.build()


def test_an_entry_holds_what_was_said() -> None:
    entry = (
        DRAFT.name(" Order saga ")
        .description("Reserve, charge, fulfill.")
        .topic("orders")
        .tags("orders", " checkout ", "")
        .timeout("5m")
        .retry(3, jitter=False)
        .metadata({"owner": "shop", "tier": 1})
        .metadata({"tier": 2})
        .disabled()
        .build()
    )

    expected = SagaConfigEntry(
        id="order-saga",
        entrypoint="./sagas/order.py",
        name="Order saga",
        description="Reserve, charge, fulfill.",
        topic="orders",
        enabled=False,
        tags=("orders", "checkout"),
        metadata={"owner": "shop", "tier": 2},
        timeout=SagaConfigTimeout(completion_timeout=300_000, min_timeout=1_000, max_timeout=604_800_000),
        retry=SagaConfigRetry(
            max_attempts=3, initial_delay=1_000, max_delay=60_000, backoff_multiplier=2, jitter=False
        ),
    )
    assert expected == entry


@pytest.mark.parametrize("tags", [("a", "b"), (["a", "b"],), (["a"], "b", ("a",))])
def test_tags_come_as_arguments_or_as_a_list(tags: Any) -> None:
    assert DRAFT.tags(*tags).build().tags == ("a", "b")


@pytest.mark.parametrize("timeout", [90_000, 90_000.0, "90s", timedelta(seconds=90)])
def test_a_timeout_is_a_length(timeout: Any) -> None:
    assert DRAFT.timeout(timeout).build().timeout.completion_timeout == 90_000


def test_every_call_leaves_the_earlier_entry_as_it_was() -> None:
    DRAFT.tags("a").name("other")

    assert (DRAFT.build().tags, DRAFT.build().name) == ((), "order-saga")


def test_an_entry_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        DRAFT.build().name = "other"
    with pytest.raises(TypeError):
        DRAFT.metadata({"a": 1}).build().metadata["a"] = 2


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: define_saga_config(" ", "x"), r"Saga ID is required\."),
        (lambda: define_saga_config("x", ""), r"Saga entrypoint is required\."),
        (lambda: DRAFT.name(" "), r"Saga name must not be empty\. Saga 'order-saga': got ' '\."),
        (lambda: DRAFT.description(""), r"Saga description must not be empty\."),
        (lambda: DRAFT.topic(None), r"Saga topic must not be empty\."),
        (lambda: DRAFT.tags(3), r"Saga tags must be strings\."),
        (lambda: DRAFT.tags(["a", 3]), r"Saga tags must be strings\."),
        (lambda: DRAFT.timeout(0), r"Saga timeout must be a positive finite number\."),
        (lambda: DRAFT.timeout(float("nan")), r"Saga timeout must be a positive finite number\."),
        (lambda: DRAFT.timeout("soon"), r"Saga timeout must be a positive finite number\."),
        (lambda: DRAFT.retry(-1), r"Saga retry maxAttempts must be a non-negative integer\."),
        (lambda: DRAFT.retry(1.5), r"Saga retry maxAttempts must be a non-negative integer\."),
        (lambda: DRAFT.retry(True), r"Saga retry maxAttempts must be a non-negative integer\."),
        (lambda: DRAFT.retry(1, initial_delay=-1), "initialDelay must be a finite number from 0 on"),
        (lambda: DRAFT.retry(1, max_delay=1), "maxDelay must be a finite number from 1000 on"),
        (lambda: DRAFT.retry(1, backoff_multiplier=0), "backoffMultiplier must be a finite number from 1 on"),
        (lambda: DRAFT.retry(1, jitter=0.5), r"Saga retry jitter must be True or False\."),
        (lambda: DRAFT.enabled("no"), r"Saga enabled must be True or False\."),
        (lambda: DRAFT.metadata(["a"]), r"Saga metadata must be a mapping\."),
        (lambda: DRAFT.retention(completed_days=0), r"completed_days must be a number of days, more than 0, got 0\."),
        (lambda: DRAFT.retention(active_days="7"), r"active_days must be a number of days, more than 0, got '7'\."),
        (lambda: define_saga_group(" ", DRAFT.build()), r"Saga group topic must not be empty\."),
        (lambda: define_saga_group("orders"), r"Saga group 'orders' has no sagas"),
        (lambda: define_saga_group("orders", DRAFT), r"did you forget \.build\(\)\?"),
        (lambda: define_saga_group("orders", DRAFT.topic("other").build()), r"has the topic 'other' itself"),
        (lambda: define_saga_group("orders", DRAFT.build(), DRAFT.build()), r"two entries for saga 'order-saga'"),
        (lambda: configured(A_SAGA, define_saga_config("other", "x").build()), r"was given the definition of 'order"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_value(call: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        call()


def test_a_group_gives_its_topic_and_what_its_sagas_do_not_say_themselves() -> None:
    kept = SagaConfigRetention(completed_days=90)
    orders = define_saga_group(
        "orders",
        define_saga_config("a", "a.py").build(),
        define_saga_config("b", "b.py").topic("orders").retention(completed_days=90).disabled().build(),
        completed_days=7,
    )

    assert [(each.id, each.topic, each.enabled) for each in orders.sagas] == [
        ("a", "orders", True),
        ("b", "orders", False),
    ]
    assert [each.retention for each in orders.sagas] == [SagaConfigRetention(completed_days=7), kept]


def test_a_group_that_is_disabled_disables_its_sagas() -> None:
    (entry,) = define_saga_group("orders", DRAFT.build(), enabled=False).sagas

    assert not entry.enabled


def test_a_definition_is_run_as_its_entry_says() -> None:
    entry = DRAFT.topic("orders").tags("shop").retry(2, initial_delay=10, jitter=False).timeout("5m").disabled()

    saga = configured(A_SAGA, entry.retention(completed_days=7).build())

    assert (saga.about.topic, saga.about.tags, saga.about.enabled) == ("orders", ("shop",), False)
    assert saga.about.retention == RetentionPolicy(completed_days=7)
    assert saga.retry == RetryPolicy(maximum_attempts=3, initial_interval_ms=10, jitter=0.0)
    assert [(one.delay, one.message_type) for one in saga.timeouts] == [(timedelta(minutes=5), "saga:cancel")]
    assert saga.fingerprint != A_SAGA.fingerprint


def test_an_entry_that_says_nothing_of_how_a_saga_runs_leaves_its_fingerprint() -> None:
    saga = configured(A_SAGA, DRAFT.name("Order saga").topic("orders").disabled().build())

    assert saga.fingerprint == A_SAGA.fingerprint


def test_a_definition_may_be_configured_again() -> None:
    once = configured(A_SAGA, DRAFT.timeout("5m").build())

    assert configured(once, DRAFT.build()).timeouts == ()
