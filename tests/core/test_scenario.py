import doctest
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import import_module

import pytest

import sagaloom.testing
from sagaloom import (
    CascadedMessage,
    SagaContext,
    SagaMessage,
    define_saga,
    saga_compensate,
    saga_complete,
    saga_fail,
    schedule,
    send,
)
from sagaloom.definitions import RetryPolicy, Saga, SagaDefinition
from sagaloom.testing import scenario
from sagaloom.testing.faults import Cut, Faults


@dataclass
class OrderPlaced:
    order_id: str


@dataclass
class PaymentCaptured:
    order_id: str
    payment_id: str


@dataclass
class FulfillmentFailed:
    order_id: str
    reason: str


@dataclass
class PaymentOverdue:
    order_id: str


@dataclass
class OrderState:
    status: str = "new"
    payment_id: str | None = None
    notes: list[str] = field(default_factory=list)


def _placed(
    saga: Saga[OrderState], event: SagaMessage[OrderPlaced], context: SagaContext[OrderState]
) -> list[CascadedMessage]:
    saga.state.status = "awaiting-payment"
    if event.payload.order_id.startswith("flaky") and context.attempt < 3:
        raise ConnectionError(f"attempt {context.attempt}")
    return [
        send("service:payments", {"charge": event.payload.order_id}),
        schedule(PaymentOverdue(event.payload.order_id), "1h", name="overdue"),
    ]


def _paid(
    saga: Saga[OrderState], event: SagaMessage[PaymentCaptured], context: SagaContext[OrderState]
) -> list[CascadedMessage]:
    saga.state.status = "paid"
    saga.state.payment_id = event.payload.payment_id
    return []


def _failed(
    saga: Saga[OrderState], event: SagaMessage[FulfillmentFailed], context: SagaContext[OrderState]
) -> list[CascadedMessage]:
    return [saga_compensate(event, event.payload.reason)]


def _refund(
    saga: Saga[OrderState], event: SagaMessage[FulfillmentFailed], context: SagaContext[OrderState]
) -> list[CascadedMessage]:
    saga.state.status = "refunded"
    return [send("service:payments", {"refund": saga.state.payment_id}), saga_fail(event.payload.reason)]


def _overdue(
    saga: Saga[OrderState], event: SagaMessage[PaymentOverdue], context: SagaContext[OrderState]
) -> list[CascadedMessage]:
    if saga.state.status == "awaiting-payment":
        return [saga_fail("never paid")]
    return [saga_complete({"at": context.now.isoformat()})]


@pytest.fixture
def orders() -> SagaDefinition[OrderState]:
    return (
        define_saga("orders")
        .state(OrderState())
        .on(OrderPlaced, _placed)
        .on(PaymentCaptured, _paid, starts=False)
        .on(FulfillmentFailed, _failed, starts=False)
        .on(PaymentOverdue, _overdue, starts=False)
        .compensate(FulfillmentFailed, _refund)
        .correlate(OrderPlaced, lambda message: message.payload.order_id)
        .correlate(PaymentCaptured, lambda message: message.payload.order_id)
        .correlate(FulfillmentFailed, lambda message: message.payload.order_id)
        .retry(RetryPolicy(maximum_attempts=3, initial_interval_ms=1_000, jitter=0.0))
        .build()
    )


def test_a_story_with_a_compensation_reads_as_three_sentences(orders: SagaDefinition[OrderState]) -> None:
    (
        scenario(orders)
        .given(OrderPlaced("o-1"), PaymentCaptured("o-1", "p-1"))
        .when(FulfillmentFailed("o-1", "no stock"))
        .then(
            status="failed",
            reason="no stock",
            state=OrderState(status="refunded", payment_id="p-1"),
            effects=[
                saga_compensate(FulfillmentFailed("o-1", "no stock"), "no stock"),
                send("service:payments", {"refund": "p-1"}),
                saga_fail("no stock"),
            ],
            disposition="applied",
            revision=3,
        )
    )


def test_state_and_result_compare_as_json_too(orders: SagaDefinition[OrderState]) -> None:
    story = scenario(orders).given(OrderPlaced("o-1"))

    story.when(PaymentCaptured("o-1", "p-1")).then(
        state={"status": "paid", "payment_id": "p-1", "notes": []}, result=None, reason=None
    )


def test_a_missing_effect_is_one_line_of_the_difference(orders: SagaDefinition[OrderState]) -> None:
    story = scenario(orders).when(OrderPlaced("o-1"))

    with pytest.raises(AssertionError) as failure:
        story.then(effects=[send("service:payments", {"charge": "o-1"})])

    assert str(failure.value).splitlines()[1:] == [
        "  effects: (- expected, + got)",
        "      send(target='service:payments', payload={'charge': 'o-1'})",
        "    + scheduled(message={'type': 'PaymentOverdue', 'payload': {'order_id': 'o-1'}}, delay='1h',"
        " name='overdue')",
    ]


def test_effects_are_those_of_the_last_message_alone(orders: SagaDefinition[OrderState]) -> None:
    scenario(orders).given(OrderPlaced("o-1")).when(PaymentCaptured("o-1", "p-1")).then(effects=[])


def test_a_timer_fires_when_the_time_comes(orders: SagaDefinition[OrderState]) -> None:
    story = scenario(orders, now=datetime(2030, 1, 1, tzinfo=UTC)).given(
        OrderPlaced("o-1"), PaymentCaptured("o-1", "p-1")
    )

    story.advance("59m").then(status="running", effects=[])
    story.advance("2m").then(
        status="completed",
        result={"at": "2030-01-01T01:00:00+00:00"},
        effects=[saga_complete({"at": "2030-01-01T01:00:00+00:00"})],
    )


def test_a_failed_attempt_is_made_again_when_the_time_comes(orders: SagaDefinition[OrderState]) -> None:
    story = scenario(orders).when(OrderPlaced("flaky-1"))

    story.then(disposition="pending", reason="ConnectionError: attempt 1", effects=[])
    story.advance("1s").then(disposition="pending", reason="ConnectionError: attempt 2")
    story.advance("2s").then(disposition="applied", status="running", revision=1)


def test_a_message_that_comes_twice_is_a_duplicate(orders: SagaDefinition[OrderState]) -> None:
    message = SagaMessage("OrderPlaced", {"order_id": "o-1"}, id="m-1")

    scenario(orders).given(message).when(message).then(disposition="duplicate", revision=1, effects=[])


def test_a_finished_run_ignores_what_comes_later(orders: SagaDefinition[OrderState]) -> None:
    story = scenario(orders).given(OrderPlaced("o-1"), FulfillmentFailed("o-1", "no stock"))

    story.when(PaymentCaptured("o-1", "p-1")).then(disposition="ignored", status="failed", revision=2, effects=[])


def test_instances_with_different_keys_do_not_meet(orders: SagaDefinition[OrderState]) -> None:
    story = scenario(orders).given(OrderPlaced("o-1"), OrderPlaced("o-2"))

    story.when(PaymentCaptured("o-1", "p-1")).then(state=OrderState("paid", "p-1"), revision=2)
    story.when(PaymentCaptured("o-2", "p-2")).then(state=OrderState("paid", "p-2"), revision=2)


def test_a_given_message_that_is_not_applied_stops_the_test(orders: SagaDefinition[OrderState]) -> None:
    with pytest.raises(AssertionError, match=r"was dead_lettered, not applied: .*no live instance"):
        scenario(orders).given(PaymentCaptured("o-1", "p-1"))


def test_a_failure_shows_every_difference_at_once(orders: SagaDefinition[OrderState]) -> None:
    story = scenario(orders).given(OrderPlaced("o-1")).when(PaymentCaptured("o-1", "p-1"))

    with pytest.raises(AssertionError) as failure:
        story.then(
            status="completed", state=OrderState("paid", "p-2"), effects=[saga_complete()], reason="why", revision=7
        )

    assert str(failure.value).splitlines() == [
        "orders:o-1: given OrderPlaced, when PaymentCaptured",
        "  status: expected 'completed', got 'running'",
        "  revision: expected 7, got 2",
        "  reason: expected 'why', got None",
        "  state: (- expected, + got)",
        "    - OrderState(status='paid', payment_id='p-2', notes=[])",
        "    + OrderState(status='paid', payment_id='p-1', notes=[])",
        "  effects: (- expected, + got)",
        "    - complete()",
        "    + (nothing)",
    ]


def test_asking_before_anything_happened_says_so(orders: SagaDefinition[OrderState]) -> None:
    with pytest.raises(AssertionError, match="nothing has happened yet"):
        scenario(orders).then(status="running")


def test_a_saga_that_schedules_itself_without_delay_does_not_hang_the_test() -> None:
    def again(saga: Saga[dict[str, int]], event: SagaMessage[object], context: object) -> list[CascadedMessage]:
        return [schedule(SagaMessage("Again", {}), 0)]

    loop = define_saga("loop").state({"n": 0}).on("Again", again).correlate(lambda message: "k").build()

    story = scenario(loop).given(SagaMessage("Again", {})).advance("1s")

    assert story.decision.disposition == "dead_lettered"


def test_the_testing_package_has_what_it_names_and_loads_neither_pytest_nor_a_driver() -> None:
    loaded = "import sys, sagaloom.testing; print(*({'pytest', 'apsw'} & sys.modules.keys()))"
    printed = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, timeout=30)

    assert printed.stdout.strip() == ""
    assert all(hasattr(sagaloom.testing, name) for name in sagaloom.testing.__all__)


@pytest.mark.parametrize("module", ["clock", "faults", "invariants", "scenario"])
def test_the_examples_in_the_docstrings_run(module: str) -> None:
    failed, attempted = doctest.testmod(import_module(f"sagaloom.testing.{module}"))

    assert failed == 0
    assert attempted > 0


def test_a_fault_strikes_at_its_step_and_number_once() -> None:
    faults = Faults()
    faults.raise_at("committed", 2)

    faults("committed")
    faults("decided")
    with pytest.raises(Cut, match="committed:2"):
        faults("committed")
    faults("committed")

    assert faults.struck == ["committed:2"]
    assert faults.seen["committed"] == 3
