"""Who gets a message."""

from dataclasses import dataclass
from typing import Any

import pytest

from sagaloom import SagaMessage, define_saga
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.correlation import Correlated, DefinitionSet, address, correlate, has_default_key, route
from sagaloom.engine.records import Envelope, Outgoing, ParentLink
from sagaloom.errors import DefinitionError, MessageRejected, SagaNotFound
from tests.core.deciding import NOW, nothing


@dataclass
class Placed:
    order_id: str


def order(saga_id: str = "order", *, rule: Any = None, typed_rule: Any = None, singleton: bool = False) -> Any:
    stage: Any = define_saga(saga_id).state({}).on(Placed, nothing).on("Paid", nothing, starts=False)
    if rule is not None:
        stage = stage.correlate(rule)
    if typed_rule is not None:
        stage = stage.correlate(Placed, typed_rule)
    return (stage.singleton() if singleton else stage).build()


PLACED = SagaMessage("Placed", {"order_id": "o-1"}, correlation_key="own")


# --- correlate -------------------------------------------------------------------------------------------------------


def test_the_rule_for_the_type_goes_first_and_sees_a_typed_payload() -> None:
    definition = order(rule=lambda message: "general", typed_rule=lambda message: f"key-{message.payload.order_id}")

    assert correlate(definition, PLACED) == Correlated("key-o-1", opens_run=False)


def test_the_general_rule_comes_next() -> None:
    definition = order(rule=lambda message: "general")

    assert correlate(definition, PLACED) == Correlated("general")


def test_a_rule_that_returns_none_leaves_it_to_the_message() -> None:
    assert correlate(order(rule=lambda message: None), PLACED) == Correlated("own")


def test_the_message_s_own_key_comes_before_the_singleton_s() -> None:
    assert correlate(order(singleton=True), PLACED) == Correlated("own")


def test_messages_of_a_singleton_without_a_key_share_one_instance() -> None:
    definition = order(singleton=True)

    first = correlate(definition, SagaMessage("Placed", {"order_id": "o-1"}))
    second = correlate(definition, SagaMessage("Paid", {}))

    assert first == second == Correlated("singleton")


def test_a_starting_message_without_any_key_opens_a_run_of_the_default_key() -> None:
    definition = order()

    assert correlate(definition, SagaMessage("Placed", {"order_id": "o-1"})) == Correlated(
        "order:Placed", opens_run=True
    )
    assert has_default_key(definition, "order:Placed")
    assert not has_default_key(definition, "order:o-1")


def test_a_message_that_does_not_start_and_names_no_instance_is_refused() -> None:
    with pytest.raises(MessageRejected, match="'Paid' names no instance") as refused:
        correlate(order(), SagaMessage("Paid", {}, id="a message id is no key"))

    assert refused.value.code == "CORRELATION_REQUIRED"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda message: message.payload.nope, "raised AttributeError"),
        (lambda message: 42, "returned int 42: a key is a string"),
        (lambda message: "", "correlation key is empty"),
        (lambda message: "a\0b", "control character"),
        (lambda message: "x" * 1025, "has 1025 bytes"),
    ],
)
def test_a_rule_that_gives_no_key_is_a_refusal_that_names_saga_and_type(rule: Any, said: str) -> None:
    with pytest.raises(MessageRejected, match=said) as refused:
        correlate(order(rule=rule), PLACED)

    assert refused.value.code == "VALIDATION_ERROR"


def test_an_asynchronous_rule_is_refused_and_leaves_no_coroutine_behind() -> None:
    async def key() -> str:
        return "k"

    with pytest.raises(MessageRejected, match=r"'order'.*'Placed' returned coroutine"):
        correlate(order(rule=lambda message: key()), PLACED)


def test_a_type_that_the_saga_does_not_handle_is_not_found() -> None:
    with pytest.raises(SagaNotFound, match="'Shipped'"):
        correlate(order(), SagaMessage("Shipped", {}))


# --- address ---------------------------------------------------------------------------------------------------------


def test_an_envelope_carries_everything_the_message_says() -> None:
    message: SagaMessage[Any] = SagaMessage("Placed", {}, "k", "i", "c", NOW, "m1", "00-a", "v=1")

    envelope, typed = address(order(), message, b'{"order_id":"o-1"}', accepted_at=NOW, message_id="m1")

    assert typed == SagaMessage("Placed", Placed("o-1"), "k", "i", "c", NOW, "m1", "00-a", "v=1")
    assert envelope == Envelope(
        saga_id="order",
        key="k",
        type="Placed",
        id="m1",
        payload=b'{"order_id":"o-1"}',
        accepted_at=NOW,
        dedupe_key="i",
        correlation_key="k",
        idempotency_key="i",
        concurrency_key="c",
        occurred_at=NOW,
        traceparent="00-a",
        tracestate="v=1",
    )


def test_an_untyped_handler_takes_what_was_read_at_the_door() -> None:
    read = {"amount": 1}

    _, typed = address(order(), SagaMessage("Paid", {"amount": 1}, "k"), b'{"amount":1}', NOW, "m1", read)

    assert typed.payload is read


def test_a_null_that_was_read_at_the_door_is_a_payload() -> None:
    _, typed = address(order(), SagaMessage("Paid", None, "k"), b"null", NOW, "m1", None)

    assert typed.payload is None


def test_a_typed_handler_takes_what_its_own_codec_reads() -> None:
    _, typed = address(order(), PLACED, b'{"order_id":"o-1"}', NOW, "m1", {"order_id": "o-1"})

    assert typed.payload == Placed("o-1")


def test_without_an_idempotency_key_the_message_id_is_what_makes_a_repeat_a_duplicate() -> None:
    envelope, _ = address(order(), PLACED, b'{"order_id":"o-1"}', accepted_at=NOW, message_id="m1")

    assert envelope.dedupe_key == "m1"


def test_a_payload_of_the_wrong_type_is_refused_at_the_door_even_without_a_rule() -> None:
    with pytest.raises(MessageRejected, match=r"'order'.*'Placed'.*order_id") as refused:
        address(order(), PLACED, payload_json=b"{}", accepted_at=NOW, message_id="m1")

    assert refused.value.code == "VALIDATION_ERROR"


@pytest.mark.parametrize("field", ["idempotency_key", "concurrency_key", "traceparent", "tracestate"])
def test_a_text_that_no_store_could_hold_is_refused_at_the_door(field: str) -> None:
    texts: dict[str, Any] = {field: "\ud83d"}

    with pytest.raises(MessageRejected, match=field):
        address(
            order(),
            SagaMessage[Any]("Placed", {}, "k", **texts),
            payload_json=b'{"order_id":"o"}',
            accepted_at=NOW,
            message_id="m",
        )


# --- DefinitionSet ---------------------------------------------------------------------------------------------------


def test_a_definition_set_finds_sagas_by_id_and_by_type() -> None:
    first, second = order("first"), order("second")
    definitions = DefinitionSet([first, second])

    assert definitions.get("first") is first
    assert definitions.handling("Placed") == (first, second)
    assert definitions.handling("Shipped") == ()
    assert "second" in definitions
    assert list(definitions) == [first, second]


def test_two_definitions_of_one_id_are_refused_and_the_same_one_twice_is_not() -> None:
    first = order()

    assert len(DefinitionSet([first, first])) == 1
    with pytest.raises(DefinitionError, match="two sagas are called 'order'"):
        DefinitionSet([first, order()])


def test_with_definition_replaces_and_leaves_the_first_set_alone() -> None:
    old, new = order(), order()
    definitions = DefinitionSet([old])

    assert definitions.with_definition(new).handling("Placed") == (new,)
    assert definitions.get("order") is old


# --- route -----------------------------------------------------------------------------------------------------------

KEY = "e" * 40


def outgoing(kind: Any = "send", target: str = "order", payload: Any = None, **fields: Any) -> Outgoing:
    return Outgoing(kind, target, payload, KEY, ("sender", "s-1", 2), "m1", 5, **fields)


def routed(message: Outgoing, *definitions: SagaDefinition[Any]) -> list[Envelope]:
    result = route(DefinitionSet(definitions), message, now=NOW)
    assert result.dead_letters == ()
    return list(result.envelopes)


def undeliverable(message: Outgoing, *definitions: SagaDefinition[Any]) -> Any:
    result = route(DefinitionSet(definitions), message, now=NOW)
    assert result.envelopes == ()
    (dead_letter,) = result.dead_letters
    return dead_letter


@pytest.mark.parametrize(
    ("payload", "message_type"),
    [
        (SagaMessage("Paid", {"n": 1}), "Paid"),
        ({"type": "Paid", "payload": {"n": 1}}, "Paid"),
        (Placed("o-1"), "Placed"),
        ({"order_id": "o-1"}, "Placed"),
    ],
)
def test_a_send_to_a_saga_takes_a_message_or_the_payload_of_its_first_starting_type(
    payload: Any, message_type: str
) -> None:
    (found,) = routed(outgoing(payload=payload, correlation_key="s-1"), order())

    assert (found.saga_id, found.type, found.key, found.origin) == ("order", message_type, "s-1", "saga")
    assert (found.id, found.dedupe_key, found.causation_id, found.hops) == (KEY, KEY, "m1", 5)


def test_a_send_to_a_bare_type_reaches_every_saga_that_handles_it() -> None:
    found = routed(outgoing(target="Placed", payload={"order_id": "o"}, correlation_key="s-1"), order("a"), order("b"))

    assert [(one.saga_id, one.key, one.id) for one in found] == [("a", "s-1", KEY), ("b", "s-1", KEY)]


def test_the_message_s_own_key_goes_before_the_sender_s_and_the_saga_s_rule_before_both() -> None:
    payload = SagaMessage("Placed", {"order_id": "o-1"}, correlation_key="own", id="given", idempotency_key="i")
    message = outgoing(payload=payload, correlation_key="s-1")

    (plain,) = routed(message, order())
    (ruled,) = routed(
        message, order(rule=lambda message: message.payload.order_id if message.type == "Placed" else None)
    )

    assert (plain.key, ruled.key) == ("own", "o-1")
    assert (plain.id, plain.dedupe_key) == ("given", "i")


def test_a_target_that_nobody_handles_is_a_dead_letter_of_the_sender() -> None:
    dead_letter = undeliverable(outgoing(target="Nowhere", payload={}, encoded=b"{}"), order())

    assert (dead_letter.saga_id, dead_letter.key, dead_letter.type) == ("sender", "s-1", "Nowhere")
    assert dead_letter.code == "SAGA_NOT_FOUND"
    assert "saga 'sender' sent 'Nowhere' to 'Nowhere'" in dead_letter.reason
    assert dead_letter.envelope.payload == b"{}"


def test_a_correlation_that_fails_is_a_dead_letter_and_does_not_keep_the_others_from_theirs() -> None:
    broken = order("broken", rule=lambda message: 42)

    result = route(
        DefinitionSet([broken, order()]),
        outgoing(target="Placed", payload={"order_id": "o"}, correlation_key="s-1"),
        now=NOW,
    )

    assert [one.saga_id for one in result.envelopes] == ["order"]
    assert [one.envelope.saga_id for one in result.dead_letters if one.envelope] == ["broken"]


def test_a_message_of_another_type_than_the_type_it_is_sent_to_is_a_dead_letter() -> None:
    dead_letter = undeliverable(outgoing(target="Placed", payload=SagaMessage("Paid", {})), order())

    assert "'Paid' to the message type 'Placed'" in dead_letter.reason


def test_a_bare_payload_for_a_saga_that_nothing_starts_is_a_dead_letter() -> None:
    never = define_saga("never").state({}).on("Paid", nothing, starts=False).build()

    assert "which no message starts" in undeliverable(outgoing(target="never", payload={}), never).reason


def test_a_spawned_child_without_a_key_gets_one_from_the_effect() -> None:
    link = ParentLink("sender", "s-1", 2, KEY)
    message = outgoing("spawn", payload={"order_id": "o"}, parent=link)

    (found,) = routed(message, order())

    assert (found.key, found.origin, found.parent, found.opens_run) == (KEY, "spawn", link, False)
    assert routed(message, order()) == [found]


def test_a_spawned_child_keeps_the_key_its_message_or_its_rule_gives() -> None:
    payload = SagaMessage("Placed", {"order_id": "o-1"}, correlation_key="own")

    (own,) = routed(outgoing("spawn", payload=payload), order())
    (ruled,) = routed(outgoing("spawn", payload=payload), order(rule=lambda message: message.payload.order_id))

    assert (own.key, ruled.key) == ("own", "o-1")


def test_a_child_that_nobody_loaded_is_a_dead_letter_even_when_a_type_has_its_name() -> None:
    dead_letter = undeliverable(outgoing("spawn", "Placed", {"order_id": "o"}), order())

    assert "no loaded definition is a child saga of that name" in dead_letter.reason


def test_the_end_of_a_child_goes_to_the_parent_s_run_and_asks_no_rule() -> None:
    parent: Any = (
        define_saga("parent")
        .state({})
        .on("child:completed", nothing, starts=False)
        .correlate(lambda message: "other")
        .build()
    )
    end = outgoing("child_end", "parent", SagaMessage("child:completed", {"run": 1}), correlation_key="p", to_run=3)

    (found,) = routed(end, parent)

    assert (found.saga_id, found.key, found.run, found.origin) == ("parent", "p", 3, "child")
    assert (found.type, found.payload, found.id, found.dedupe_key) == ("child:completed", b'{"run":1}', KEY, KEY)


def test_the_end_of_a_child_whose_parent_does_not_ask_is_dropped() -> None:
    end = outgoing("child_end", "order", SagaMessage("child:completed", {}), correlation_key="p", to_run=3)

    assert routed(end, order()) == []
