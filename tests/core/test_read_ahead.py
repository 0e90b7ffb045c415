"""What a state was read back as is handed on: to one step on the same bytes, and to nobody else."""

from dataclasses import dataclass
from typing import Any

import msgspec

from sagaloom import define_saga
from sagaloom.codec import codec_for
from sagaloom.engine.read_ahead import keep_read, read_state
from tests.core.deciding import Context, Effects, Event, Slot, begun, decided, envelope, nothing, saga_with, state_of

PLAIN = codec_for(dict)


def _noting(saga: Slot, event: Event, context: Context) -> Effects:
    saga.state.setdefault("seen", []).append(len(saga.state["seen"]))
    if event.payload.get("raises"):
        raise ValueError("after the state was changed")
    return []


def test_encoding_hands_out_what_decoding_would() -> None:
    data, back = PLAIN.encode_and_read({"a": (1, 2)})

    assert back == PLAIN.decode(data) == {"a": [1, 2]}


def test_the_state_that_was_read_back_is_taken_once() -> None:
    data, back = PLAIN.encode_and_read({"n": 1})
    keep_read(PLAIN, data, back)

    first, second = read_state(PLAIN, data), read_state(PLAIN, data)

    assert first is back
    assert second is not back
    assert second == back


def test_other_bytes_and_other_codecs_take_nothing() -> None:
    class Counted(msgspec.Struct):
        n: int

    data, back = PLAIN.encode_and_read({"n": 1})
    keep_read(PLAIN, data, back)

    assert read_state(PLAIN, bytes(bytearray(data))) is not back
    assert read_state(codec_for(Counted), data) == Counted(1)


def test_large_states_are_not_kept_and_many_are_not_mixed_up() -> None:
    data, back = PLAIN.encode_and_read({"text": "x" * 10_000})
    keep_read(PLAIN, data, back)
    many = [PLAIN.encode_and_read({"n": n}) for n in range(2_000)]
    for each, state in many:
        keep_read(PLAIN, each, state)

    assert read_state(PLAIN, data) is not back
    assert [read_state(PLAIN, each)["n"] for each, _ in many] == list(range(2_000))
    assert sum(read_state(PLAIN, each) is state for each, state in many) == 0


def test_deciding_again_finds_the_state_as_it_was_stored() -> None:
    saga = saga_with(_noting)
    instance = decided(saga, envelope("Go"), begun(saga)).instance
    failed = decided(saga, envelope("Go", {"raises": True}, id="g2"), instance)

    again = [decided(saga, envelope("Go", id="g3"), instance) for _ in range(3)]

    assert failed.disposition == "pending"
    assert [state_of(each) for each in again] == [{"seen": [0, 1]}] * 3
    assert again[0] == again[1] == again[2]


def test_a_definition_with_another_type_of_state_gets_that_type() -> None:
    @dataclass
    class Seen:
        seen: list[int]

    found: list[Any] = []

    def looking(saga: Slot, event: Event, context: Context) -> Effects:
        found.append(saga.state)
        return []

    untyped = saga_with(_noting)
    instance = decided(untyped, envelope("Go"), begun(untyped)).instance
    typed = define_saga("s").state(Seen([])).on("Begin", nothing).on("Go", looking).build()

    decided(typed, envelope("Go", id="g2"), instance)

    assert found == [Seen([0])]
