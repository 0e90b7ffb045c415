"""The builder's rules, each enforced at the call that breaks it."""

import functools
from dataclasses import FrozenInstanceError, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, TypedDict

import msgspec
import pytest

from sagaloom import (
    DefinitionError,
    QueryDefinition,
    RetryPolicy,
    SagaDefinition,
    SagaMessage,
    SagaWithState,
    SignalDefinition,
    define_query,
    define_saga,
    define_signal,
    saga_complete,
)
from sagaloom.definitions import SchedulePolicy, TimeoutPolicy


@dataclass
class Order:
    status: str = "new"
    lines: list[str] = field(default_factory=list)


class OrderDict(TypedDict):
    status: str


@dataclass(frozen=True)
class OrderPlaced:
    order_id: str


class Renamed(msgspec.Struct):
    __message_type__: ClassVar[str] = "order.placed"


class BadlyNamed(msgspec.Struct):
    __message_type__: ClassVar[str] = " "


class NotAMessage:
    pass


def handler(saga: Any, event: Any, context: Any) -> list[Any]:
    return []


def rule(message: SagaMessage[Any]) -> str | None:
    return message.correlation_key


DRAFT: Any = define_saga("order")
READY: Any = define_saga("order").state({"status": "new"})


# --- the order of the calls ---


@pytest.mark.parametrize(
    "method", ["on", "compensate", "during", "when_all", "on_signal", "on_query", "on_update", "invariant", "build"]
)
def test_a_handler_before_the_state_is_refused(method: str) -> None:
    with pytest.raises(DefinitionError, match=rf"saga 'order': \.{method}\(\.\.\.\) comes too early: call \.state"):
        getattr(DRAFT, method)("OrderPlaced", handler)


def test_build_without_a_handler_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"saga 'order': \.build\(\) comes too early: .* call \.on"):
        READY.build()


def test_build_with_compensations_alone_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"call \.on"):
        READY.compensate("OrderPlaced", handler).build()


@pytest.mark.parametrize("stage", [READY, READY.on("OrderPlaced", handler)])
def test_a_second_state_is_refused(stage: Any) -> None:
    with pytest.raises(DefinitionError, match="saga 'order' already has a state"):
        stage.state({})


@pytest.mark.parametrize("stage", [DRAFT, READY, READY.on("OrderPlaced", handler)])
def test_a_name_that_no_stage_has_is_an_attribute_error(stage: Any) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'onn'"):
        _ = stage.onn


def test_every_call_leaves_the_earlier_stage_as_it_was() -> None:
    ready = define_saga("order").state({})
    one = ready.on("A", handler)
    two = ready.on("B", handler)

    assert (one.build().handled_message_types, two.build().handled_message_types) == (("A",), ("B",))


@pytest.mark.parametrize("stage", [DRAFT, READY])
def test_a_stage_is_frozen(stage: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        stage._notes = None


# --- the state ---


@pytest.mark.parametrize("initial", [Order, 3, None, [1], "new", NotAMessage()])
def test_what_is_no_state_is_refused(initial: Any) -> None:
    with pytest.raises(DefinitionError, match=r"Saga initial state is missing\. saga 'order': .* is no state"):
        define_saga("order").state(initial)


@pytest.mark.parametrize(
    ("initial", "declared", "path"),
    [
        ({"at": datetime(2026, 1, 31, tzinfo=UTC)}, None, "$.at"),
        (Order(status=3), None, "$.status"),  # type: ignore[arg-type]
        ({"status": 3}, OrderDict, "$.status"),
        ({}, OrderDict, "$"),
        (Order(), OrderDict, "$"),
    ],
)
def test_an_initial_state_that_cannot_be_stored_is_refused_at_the_call(initial: Any, declared: Any, path: str) -> None:
    with pytest.raises(DefinitionError, match="saga 'order': initial state: ") as caught:
        define_saga("order").state(initial, type=declared)

    assert path == caught.value.data["path"]


def test_every_instance_starts_with_a_state_of_its_own() -> None:
    initial = Order()
    saga = define_saga("order").state(initial).on("A", handler).build()

    initial.lines.append("changed after the call")
    saga.fresh_state().lines.append("changed by an instance")

    assert saga.fresh_state() == Order()


def test_a_typed_dict_is_checked_where_it_is_named() -> None:
    saga = define_saga("order").state({"status": "new"}, type=OrderDict).on("A", handler).build()

    assert (saga.state_codec.name, saga.fresh_state()) == ("OrderDict", {"status": "new"})


# --- handlers ---


def test_a_message_class_names_the_type_and_the_payload() -> None:
    saga = READY.on(OrderPlaced, handler).build()

    assert saga.handlers["OrderPlaced"].codec.decode(b'{"order_id":"o-1"}') == OrderPlaced("o-1")


def test_a_message_class_may_choose_its_type() -> None:
    assert READY.on(Renamed, handler).build().handled_message_types == ("order.placed",)


def test_a_wire_type_has_an_untyped_payload_unless_told() -> None:
    saga = READY.on("A", handler).on("B", handler, payload=OrderPlaced).compensate("A", handler, payload=Order).build()

    names = [saga.handlers["A"].codec.name, saga.handlers["B"].codec.name, saga.compensations["A"].codec.name]
    assert names == ["untyped JSON", "OrderPlaced", "Order"]


def test_a_handler_starts_an_instance_unless_told() -> None:
    saga = READY.on("A", handler).on("B", handler, starts=False, on_missing="discard").build()

    assert saga.starting_types == ("A",)
    assert [one.on_missing for one in saga.handlers.values()] == ["dead_letter", "discard"]


@pytest.mark.parametrize("method", ["on", "compensate"])
def test_a_second_handler_for_one_type_is_refused(method: str) -> None:
    once = getattr(READY, method)(OrderPlaced, handler)

    with pytest.raises(DefinitionError, match=r"saga 'order' already has a .* for 'OrderPlaced': put both into one"):
        getattr(once, method)("OrderPlaced", handler)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("", r"Saga event type must not be empty\. saga 'order': .*'OrderPlaced'; got ''"),
        ("  ", "must not be empty"),
        (None, "must not be empty"),
        (3, "must not be empty"),
        (" OrderPlaced", "has blanks around it"),
        ("Order\0", "unprintable"),
        ("*", "is reserved"),
        (NotAMessage, "NotAMessage is no message class"),
        (dict, "dict is no message class"),
        (BadlyNamed, "__message_type__ must be a non-empty string"),
    ],
)
def test_what_is_no_message_type_is_refused(message: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        READY.on(message, handler)


def test_an_empty_compensation_type_is_named_so() -> None:
    with pytest.raises(DefinitionError, match=r"Saga compensation event type must not be empty\."):
        READY.compensate("", handler)


async def coroutine_handler(saga: Any, event: Any, context: Any) -> list[Any]:
    return []


async def async_generator_handler(saga: Any, event: Any, context: Any) -> Any:
    yield saga_complete()


def generator_handler(saga: Any, event: Any, context: Any) -> Any:
    yield saga_complete()


class AsyncCallable:
    async def __call__(self, saga: Any, event: Any, context: Any) -> list[Any]:
        return []


class InheritsAsyncCallable(AsyncCallable):
    pass


class Callable:
    def __call__(self, saga: Any, event: Any, context: Any) -> list[Any]:
        return []

    def method(self, saga: Any, event: Any, context: Any) -> list[Any]:
        return []

    async def coroutine_method(self, saga: Any, event: Any, context: Any) -> list[Any]:
        return []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (coroutine_handler, "coroutine_handler, is async"),
        (async_generator_handler, "is async"),
        (AsyncCallable(), "is async"),
        (InheritsAsyncCallable(), "is async"),
        (Callable().coroutine_method, "is async"),
        (functools.partial(coroutine_handler), "is async"),
        (functools.partial(functools.partial(AsyncCallable())), "is async"),
        (generator_handler, "is a generator: return a list"),
        (lambda saga, event: [], r"has the signature \(saga, event\): a handler takes \(saga, event, context\)"),
        (lambda saga, event, context, more: [], "missing a required argument: 'more'"),
        (lambda saga, event, context, *, clock: [], "missing a required argument: 'clock'"),
        (Callable, "which is no function"),
        (None, "which is no function"),
        ([], "which is no function"),
    ],
)
@pytest.mark.parametrize("method", ["on", "compensate"])
def test_what_is_no_synchronous_handler_is_refused(method: str, bad: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=rf"saga 'order': the .* of 'OrderPlaced'.*{reason}"):
        getattr(READY, method)("OrderPlaced", bad)


@pytest.mark.parametrize(
    "good",
    [
        handler,
        lambda saga, event, context: [],
        lambda *whatever: [],
        lambda saga, event, context, more=1: [],
        Callable(),
        Callable().method,
        functools.partial(handler),
    ],
)
def test_anything_callable_with_three_arguments_is_a_handler(good: Any) -> None:
    assert READY.on("OrderPlaced", good).build().handlers["OrderPlaced"].handler is good


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"starts": 1}, "starts of 'A' must be True or False, got 1"),
        ({"on_missing": "drop"}, "on_missing of 'A' 'drop' is unknown: use 'dead_letter', 'discard' or 'wait'"),
        ({"payload": "Order"}, "payload of 'A' must be a type"),
        ({"payload": NotAMessage}, "payload of 'A': NotAMessage cannot be turned into JSON"),
    ],
)
def test_a_wrong_option_of_a_handler_is_refused(options: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        READY.on("A", handler, **options)


def test_a_message_class_takes_no_other_payload() -> None:
    with pytest.raises(DefinitionError, match="is itself the payload"):
        READY.on(OrderPlaced, handler, payload=Order)


# --- settings ---


@pytest.mark.parametrize("tier", ["t4", "", None, 1, ["t1"]])
def test_an_unknown_tier_is_refused(tier: Any) -> None:
    with pytest.raises(DefinitionError, match=r"saga 'order': durability tier .* is unknown: use 't1', 't2' or 't3'"):
        DRAFT.durability(tier)


def test_an_unknown_reuse_is_refused() -> None:
    with pytest.raises(DefinitionError, match="reuse 'always' is unknown: use 'reject' or 'new_run'"):
        DRAFT.reuse("always")


def test_settings_are_legal_in_every_stage() -> None:
    saga = (
        define_saga(" order ")
        .durability("t3")
        .state({})
        .reuse("new_run")
        .correlate(rule)
        .on("A", handler)
        .retry(RetryPolicy(maximum_attempts=1))
        .singleton()
        .correlate("A", rule)
        .version(2)
        .build()
    )

    assert (saga.id, saga.durability, saga.reuse, saga.version) == ("order", "t3", "new_run", 2)
    assert (saga.retry.maximum_attempts, saga.is_singleton, list(saga.correlations)) == (1, True, ["*", "A"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((None,), "the correlation rule is None, which is no function"),
        ((3,), "which is no function"),
        ((OrderPlaced,), "has no rule"),
        (("OrderPlaced",), "has no rule"),
        (("", rule), r"Saga correlation type must not be empty\."),
        ((lambda: "a",), r"a rule takes \(message\)"),
        ((coroutine_handler,), "is async"),
    ],
)
def test_what_is_no_correlation_rule_is_refused(arguments: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        DRAFT.correlate(*arguments)


def test_a_second_rule_for_one_type_is_refused() -> None:
    with pytest.raises(DefinitionError, match="already has a correlation rule for 'OrderPlaced'"):
        DRAFT.correlate(OrderPlaced, rule).correlate("OrderPlaced", rule)
    with pytest.raises(DefinitionError, match="already has a general correlation rule"):
        DRAFT.correlate(rule).correlate(rule)


def test_a_rule_for_a_type_that_nobody_handles_is_refused_at_build() -> None:
    with pytest.raises(DefinitionError, match="rule for 'OrderPlacd', which no handler takes: it handles 'A' and 'B'"):
        READY.correlate("OrderPlacd", rule).on("A", handler).on("B", handler).build()


def test_several_types_without_rule_or_key_are_legal() -> None:
    assert READY.on("A", handler).on("B", handler).build().correlations == {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"maximum_attempts": 0}, "maximum_attempts must be an integer from 1 on, got 0"),
        ({"maximum_attempts": True}, "maximum_attempts"),
        ({"maximum_attempts": 1.5}, "maximum_attempts"),
        ({"initial_interval_ms": -1}, "initial_interval_ms"),
        ({"maximum_interval_ms": 10}, r"from initial_interval_ms \(1000\) on, got 10"),
        ({"backoff_coefficient": 0.5}, "backoff_coefficient must be a finite number from 1 on"),
        ({"backoff_coefficient": float("inf")}, "backoff_coefficient"),
        ({"jitter": 2}, "jitter must be a fraction between 0 and 1"),
        ({"jitter": "much"}, "jitter"),
        ({"non_retryable_error_types": "ValueError"}, "must be a tuple of class names"),
    ],
)
def test_a_retry_policy_that_makes_no_sense_is_refused(change: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        DRAFT.retry(RetryPolicy(**change))


def test_a_retry_policy_is_a_retry_policy() -> None:
    with pytest.raises(DefinitionError, match=r"retry takes a RetryPolicy\(\.\.\.\), got 3"):
        DRAFT.retry(3)


def upgrade(state: Any) -> Any:
    return state


@pytest.mark.parametrize(
    ("number", "migrate", "reason"),
    [
        (0, {}, "version must be an integer from 1 on, got 0"),
        (-1, {}, "from 1 on"),
        (True, {}, "from 1 on"),
        ("2", {}, "from 1 on"),
        (3, {1: upgrade}, r"\.version\(3\) has migrations from 1, but none from 2"),
        (5, {1: upgrade, 3: upgrade}, "migrations from 1 and 3, but none from 2 and 4"),
        (2, {2: upgrade}, "has a step from version 2"),
        (2, {0: upgrade}, "has a step from version 0"),
        (2, {"1": upgrade}, "has a step from version '1'"),
        (2, {1: None}, "which is no function"),
        (2, {1: dict}, r"a migration takes \(state\)"),
    ],
)
def test_a_version_whose_steps_do_not_lead_up_to_it_is_refused(number: Any, migrate: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        DRAFT.version(number, migrate=migrate)


@pytest.mark.parametrize("oldest", [1, 2, 3])
def test_steps_may_begin_at_any_version_that_is_still_around(oldest: int) -> None:
    steps = dict.fromkeys(range(oldest, 4), upgrade)

    assert READY.version(4, migrate=steps).on("A", handler).build().migrations == steps


def test_an_invariant_has_a_name_of_its_own() -> None:
    once = READY.invariant("paid", lambda state: True)

    with pytest.raises(DefinitionError, match="already has an invariant 'paid'"):
        once.invariant("paid ", lambda state: True)
    with pytest.raises(DefinitionError, match="invariant name must not be empty"):
        once.invariant(" ", lambda state: True)
    with pytest.raises(DefinitionError, match=r"a predicate takes \(state\)"):
        once.invariant("other", lambda: True)


# --- schedules and timeouts ---


@dataclass
class Night:
    full: bool = False


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    full: bool = False


class StrictTick(msgspec.Struct, forbid_unknown_fields=True):
    scheduledFor: datetime  # noqa: N815 - as it is on the wire


def test_a_schedule_is_read_at_the_call_and_stands_in_the_definition() -> None:
    ready = DRAFT.schedule(" 0  3 * * * ", timezone=" Europe/Berlin ", catch_up="all").state({})

    saga = ready.on("order:tick", handler).build()

    assert saga.schedule == SchedulePolicy("0 3 * * *", "order:tick", "Europe/Berlin", "all")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Night", ("Night", b"{}", None)),
        (Night, ("Night", b"{}", None)),
        (Night(full=True), ("Night", b'{"full":true}', None)),
        ({"type": "Night", "payload": {"full": True}}, ("Night", b'{"full":true}', None)),
        (SagaMessage("Night", {}, correlation_key="k"), ("Night", b"{}", "k")),
    ],
)
def test_a_tick_may_be_another_message(message: object, expected: tuple[Any, ...]) -> None:
    saga = DRAFT.schedule("0 3 * * *", message=message).state({}).on(Night, handler).build()

    assert saga.schedule is not None
    assert expected == (saga.schedule.message_type, saga.schedule.payload, saga.schedule.correlation_key)


def test_a_tick_fits_a_message_class_that_names_its_moment() -> None:
    saga = DRAFT.schedule("0 3 * * *", message=StrictTick).state({}).on(StrictTick, handler).build()

    assert saga.schedule is not None
    assert saga.schedule.message_type == "StrictTick"


def test_a_timeout_is_named_and_stands_in_the_definition() -> None:
    ready = DRAFT.timeout("5m", message="Late").timeout(timedelta(days=2), message=Night(full=True), name="night")

    saga = ready.state({}).on("Late", handler).on(Night, handler).build()

    assert saga.timeouts == (
        TimeoutPolicy(timedelta(minutes=5), "Late"),
        TimeoutPolicy(timedelta(days=2), "Night", "night", b'{"full":true}'),
    )


HOURLY = DRAFT.schedule("0 * * * *")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: DRAFT.schedule(" "), r"Saga schedule must not be empty\. saga 'order'"),
        (lambda: DRAFT.schedule("@daily"), "saga 'order': schedule: '@daily' has 1 fields"),
        (lambda: DRAFT.schedule("60 * * * *"), "saga 'order': schedule: '60 .*' is no cron expression"),
        (lambda: DRAFT.schedule("0 0 31 2 *"), "saga 'order': schedule: '0 0 31 2 .*' never fires"),
        (lambda: DRAFT.schedule("* * * * *", timezone=""), "must be a zone name"),
        (lambda: DRAFT.schedule("* * * * *", timezone="Mars/Olympus"), "time zone 'Mars/Olympus' is unknown here"),
        (lambda: DRAFT.schedule("* * * * *", catch_up="some"), "schedule catch_up 'some' is unknown: use 'latest'"),
        (lambda: DRAFT.schedule("* * * * *", message=7), "schedule message: 7 is no message"),
        (lambda: DRAFT.schedule("* * * * *", message=int), "int is no message class"),
        (lambda: DRAFT.schedule("* * * * *", message=" "), "Saga schedule message type must not be empty"),
        (lambda: DRAFT.schedule("* * * * *", message="saga:cancel"), "is reserved"),
        (lambda: DRAFT.schedule("* * * * *", message=SagaMessage("A", {}, id="m")), "has id='m': leave it out"),
        (
            lambda: DRAFT.schedule("* * * * *", message=SagaMessage("A", {}, idempotency_key="i")),
            "has idempotency_key='i'",
        ),
        (
            lambda: DRAFT.schedule("* * * * *", message=SagaMessage("A", {}, correlation_key="")),
            "correlation_key is empty",
        ),
        (lambda: HOURLY.schedule("* * * * *"), "has the schedule '0 .*' already"),
        (lambda: DRAFT.timeout("soon", message="A"), "timeout: Schedule delay must use"),
        (lambda: DRAFT.timeout("-5m", message="A"), "timeout: Schedule delay must use"),
        (lambda: DRAFT.timeout(-1, message="A"), "timeout: Schedule delay must be a non-negative"),
        (lambda: DRAFT.timeout(0, message="A"), "timeout must be longer"),
        (lambda: DRAFT.timeout(datetime.now(UTC), message="A"), "timeout: Schedule delay must be"),
        (lambda: DRAFT.timeout("1d", message={"type": "A", "payload": {1}}), "timeout message: untyped JSON at"),
        (lambda: DRAFT.timeout("1d", message=None), "timeout message: None is no message"),
        (lambda: DRAFT.timeout("1d", message=SagaMessage("A", {}, correlation_key="k")), "has correlation_key='k'"),
        (lambda: DRAFT.timeout("1d", message="A", name=" "), "timeout name must be a non-empty string"),
        (lambda: DRAFT.timeout("1d", message="A", name="a\n"), "timeout name 'a.n' holds a control character"),
        (lambda: DRAFT.timeout("1d", message="A").timeout("2d", message="B"), "already has a timeout called 'timeout'"),
    ],
)
def test_a_schedule_or_timeout_that_cannot_be_is_refused_at_the_call(call: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        call()


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        (HOURLY.state({}).on("A", handler), "schedule '0 .*' sends 'order:tick', which no handler takes: add"),
        (DRAFT.timeout("1d", message="Late").state({}).on("A", handler), "timeout 'timeout' sends 'Late', which no"),
        (
            DRAFT.schedule("0 * * * *", message=Strict(full=True)).state({}).on(Strict, handler),
            "sends 'Strict' with '.*scheduledFor.*', which its handler cannot take",
        ),
        (
            DRAFT.timeout("1d", message="OrderPlaced").state({}).on(OrderPlaced, handler),
            "sends 'OrderPlaced' with '{}', which its handler cannot take",
        ),
        (
            HOURLY.state({}).on("order:tick", handler, starts=False),
            "its tick 'order:tick' starts no instance and names none",
        ),
    ],
)
def test_a_saga_that_cannot_take_its_own_message_does_not_build(stage: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        stage.build()


@pytest.mark.parametrize(
    "draft",
    [
        HOURLY.singleton(),
        HOURLY.correlate(lambda message: "k"),
        HOURLY.correlate("order:tick", lambda message: "k"),
        DRAFT.schedule("0 * * * *", message=SagaMessage("order:tick", {}, correlation_key="k")),
    ],
)
def test_a_tick_that_starts_nothing_needs_a_key(draft: Any) -> None:
    assert draft.state({}).on("order:tick", handler, starts=False).build().schedule is not None


# --- signals, statuses, joins, limits ---

SIGNAL = define_signal("approve", OrderPlaced)
QUERY = define_query("progress", int)


def test_concurrency_is_part_of_the_definition_and_the_last_word_counts() -> None:
    saga = DRAFT.concurrency(3).concurrency(2, lambda message: "a", on_limit="wait").state({}).on("A", handler).build()

    assert saga.concurrency is not None
    assert (saga.concurrency.limit, saga.concurrency.on_limit, saga.concurrency.key is None) == (2, "wait", False)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: DRAFT.concurrency(0), r"Saga concurrency limit must be a positive integer\."),
        (lambda: DRAFT.concurrency(True), r"Saga concurrency limit must be a positive integer\."),
        (lambda: DRAFT.concurrency(1, "key"), "the concurrency key"),
        (lambda: DRAFT.concurrency(1, on_limit="drop"), "concurrency on_limit 'drop'"),
        (lambda: READY.during("", "A", handler), r"status of \.during"),
        (lambda: READY.during("new", "", handler), "Saga event type must not be empty"),
        (lambda: READY.during("new", "A", handler, on_unexpected="x"), "on_unexpected of 'A' 'x'"),
        (lambda: READY.during("new", "A", coroutine_handler), "is async"),
        (lambda: READY.when_all("AB", handler), "takes a list of types"),
        (lambda: READY.when_all(["A"], handler), "two or more different types"),
        (lambda: READY.when_all(["A", "B", "A"], handler), "two or more different types"),
        (lambda: READY.when_all(["A", "B"], None), "the handler of 'A' and 'B' is None"),
        (lambda: READY.on_signal("approve", handler), "takes define_signal"),
        (lambda: READY.on_signal(SignalDefinition(" "), handler), r"Saga signal name must not be empty\."),
        (lambda: READY.on_update(SIGNAL, coroutine_handler), "is async"),
        (lambda: READY.on_query("progress", len), "takes define_query"),
        (lambda: READY.on_query(QueryDefinition(" "), len), r"Saga query name must not be empty\."),
        (lambda: READY.on_query(QUERY, coroutine_handler), "is async: it must be a plain function without I/O$"),
        (lambda: READY.on_query(QUERY, generator_handler), "is a generator: return what it says"),
    ],
)
def test_an_argument_that_makes_no_sense_is_refused(call: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        call()


def test_signals_updates_and_queries_are_part_of_the_definition() -> None:
    saga = (
        READY.on("A", handler)
        .on_signal(SIGNAL, handler)
        .on_update(SIGNAL, handler)
        .on_query(QUERY, lambda state: 1)
        .build()
    )

    assert ([*saga.signals], [*saga.updates], [*saga.queries]) == (["approve"], ["approve"], ["progress"])
    assert (saga.signals["approve"].starts, saga.updates["approve"].answers) == (False, True)
    assert saga.handled_message_types == ("A",)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: READY.on_signal(SIGNAL, handler).on_signal(SIGNAL, handler), "already has a handler for the signal"),
        (lambda: READY.on_update(SIGNAL, handler).on_update(SIGNAL, handler), "already has a handler for the update"),
        (lambda: READY.on_query(QUERY, len).on_query(QUERY, len), "already has a query 'progress'"),
        (lambda: READY.on_signal(define_signal("a\nb"), handler), "control character"),
    ],
)
def test_a_second_handler_of_one_name_is_refused(call: Any, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        call()


@pytest.mark.parametrize("define", [define_signal, define_query])
def test_signals_and_queries_have_names(define: Any) -> None:
    assert define(" approve ").name == "approve"
    for name in ("", " ", None):
        with pytest.raises(DefinitionError, match=r"(Signal|Query) name must not be empty\."):
            define(name)


# --- the definition ---


def test_a_definition_knows_where_it_was_built() -> None:
    saga = READY.on("A", handler).build()

    assert saga.source.partition("test_builder.py:")[2].isdecimal()


def test_a_definition_cannot_be_changed() -> None:
    saga = READY.on("A", handler).build()

    with pytest.raises(FrozenInstanceError):
        saga.version = 2
    with pytest.raises(TypeError):
        saga.handlers["B"] = saga.handlers["A"]


def test_the_order_saga_of_the_guide_builds() -> None:
    saga = (
        define_saga("order-saga")
        .durability("t1")
        .state({"status": "awaiting-payment"})
        .on("OrderPlaced", handler)
        .on("PaymentCaptured", handler)
        .on("FulfillmentFailed", handler)
        .compensate("FulfillmentFailed", handler)
        .build()
    )

    assert isinstance(saga, SagaDefinition)
    assert saga.handled_message_types == ("OrderPlaced", "PaymentCaptured", "FulfillmentFailed")
    assert list(saga.compensations) == ["FulfillmentFailed"]


def test_a_stage_shows_what_it_handles() -> None:
    assert isinstance(READY, SagaWithState)
    assert repr(READY.on("A", handler)) == "<SagaWithHandlers 'order', handles ['A']>"
