"""What a handler may return, and what the helpers refuse."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import sagaloom
from sagaloom import (
    ALL_STEPS,
    CASCADED_MESSAGE_KINDS,
    CascadedMessage,
    DefinitionError,
    RetryPolicy,
    SagaMessage,
    SagasError,
    answer,
    cancel_scheduled,
    define_saga,
    saga_compensate,
    saga_complete,
    saga_fail,
    schedule,
    send,
    spawn,
)
from sagaloom.effects import CancelScheduled, Compensate, Complete, Fail, Scheduled, Send, Spawn, Target

CHILD = define_saga("child").state({}).on("Start", lambda saga, event, context: []).build()


def test_every_kind_has_a_constructor() -> None:
    effects = [
        *(send("A", {}), schedule({"type": "A"}, 1), spawn("child", {}), saga_complete(), saga_fail("no")),
        *(saga_compensate(ALL_STEPS), cancel_scheduled("a"), answer(1)),
    ]

    assert list(CASCADED_MESSAGE_KINDS) == [effect.kind for effect in effects]
    assert all(isinstance(effect, CascadedMessage) for effect in effects)


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        (saga_complete(), Complete(None)),
        (saga_complete({"a": 1}), Complete({"a": 1})),
        (saga_fail("no"), Fail("no")),
        (saga_fail(ValueError("no")), Fail("no")),
        (saga_fail(ValueError()), Fail("ValueError")),
        (saga_compensate(ALL_STEPS, "why"), Compensate(None, "why")),
        (saga_compensate({"type": "A", "payload": 1}), Compensate(SagaMessage("A", 1))),
        (send("OrderPlaced", 1), Send(Target("saga", "OrderPlaced"), 1)),
        (send("service:payments", 1), Send(Target("service", "payments"), 1)),
        (send({"kind": "job", "id": "j"}, 1, {}), Send(Target("job", "j"), 1)),
        (send({"kind": "message", "id": "A"}, 1), Send(Target("saga", "A"), 1)),
        (send(Target("queue", "q"), 1, {"idempotencyKey": "k"}), Send(Target("queue", "q"), 1, "k")),
        (send("A", 1, {"onDeadLetter": "continue"}), Send(Target("saga", "A"), 1, on_dead_letter="continue")),
        (send("A", 1, idempotency_key="k", queue="q"), Send(Target("saga", "A"), 1, "k", queue="q")),
        (schedule({"type": "A"}, "5m", "t"), Scheduled(SagaMessage("A", {}), "5m", "t")),
        (schedule({"type": "A"}, timedelta(1)), Scheduled(SagaMessage("A", {}), timedelta(1))),
        (spawn(CHILD, {"a": 1}), Spawn("child", {"a": 1})),
        (spawn("child", 1, {"concurrencyKey": "c"}), Spawn("child", 1, None, "c")),
        (cancel_scheduled("t"), CancelScheduled("t")),
    ],
)
def test_a_helper_makes_the_effect_it_says(effect: CascadedMessage, expected: CascadedMessage) -> None:
    assert expected == effect


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: saga_fail(3), "takes a string or an exception"),
        (lambda: saga_compensate(saga_fail("no")), "got the effect 'fail'"),
        (lambda: saga_compensate("OrderPlaced"), "is no message"),
        (lambda: saga_compensate(ALL_STEPS, 3), "reason must be a string"),
        (lambda: send("", {}), "target must not be empty"),
        (lambda: send("service:", {}), "target must not be empty"),
        (lambda: send({"kind": "service"}, {}), "must be"),
        (lambda: send(3, {}), "must be"),
        (lambda: send("A", saga_complete()), "got the effect 'complete'"),
        (lambda: send("A", {}, {"priority": 1}), "unknown option 'priority'; it takes idempotency_key"),
        (lambda: send("A", {}, {"retry": 3}), "retry must be a RetryPolicy"),
        (lambda: send("A", {}, idempotency_key=3), "idempotency_key must be a string"),
        (lambda: send("A", {}, on_dead_letter="explode"), "'stall' or 'continue'"),
        (lambda: schedule(saga_complete(), "5m"), "got the effect 'complete'"),
        (lambda: schedule({"type": "A"}, "soon"), "suffix"),
        (lambda: schedule({"type": "A"}, -1), "non-negative"),
        (lambda: schedule({"type": "A"}, datetime(2026, 1, 31)), "no time zone"),  # noqa: DTZ001
        (lambda: schedule({"type": "A"}, 1, " "), "name must not be empty"),
        (lambda: schedule({"type": "A"}, 1, 3), "name must be a string"),
        (lambda: cancel_scheduled(""), "non-empty string"),
        (lambda: spawn("", {}), "definition or its id"),
        (lambda: spawn(3, {}), "definition or its id"),
        (lambda: spawn("child", saga_complete()), "got the effect 'complete'"),
        (lambda: spawn("child", {}, {"queue": "q"}), "unknown option 'queue'"),
    ],
)
def test_a_helper_refuses_what_it_could_not_mean(call: Any, reason: str) -> None:
    with pytest.raises(SagasError, match=reason):
        call()


def test_a_moment_and_a_retry_policy_are_kept() -> None:
    moment = datetime(2026, 1, 31, tzinfo=UTC)
    policy = RetryPolicy(maximum_attempts=1)

    assert Scheduled(SagaMessage("A", {}), moment) == schedule({"type": "A"}, moment)
    assert Send(Target("saga", "A"), 1, retry=policy) == send("A", 1, {"retry": policy})


def test_all_steps_shows_its_name() -> None:
    assert repr(sagaloom.ALL_STEPS) == "ALL_STEPS"


def test_a_definition_error_is_not_retryable() -> None:
    assert DefinitionError("x").retryable is False
