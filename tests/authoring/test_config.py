"""Configuration entries: what they hold, and what they refuse."""

from dataclasses import FrozenInstanceError
from datetime import timedelta
from typing import Any

import pytest

from sagaloom import DefinitionError
from sagaloom.config import SagaConfigEntry, SagaConfigRetry, SagaConfigTimeout, define_saga_config

DRAFT: Any = define_saga_config(" order-saga ", " ./sagas/order.py ")


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
    ],
)
def test_what_makes_no_sense_is_refused_with_the_value(call: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        call()
