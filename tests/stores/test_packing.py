"""The order of packed keys is the order of the tuples."""

from enum import IntEnum, StrEnum

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sagaloom.kv.packing import INT_MAX, INT_MIN, PackedPart, pack, prefix_range, table_of, unpack
from sagaloom.ports.keyvalue import Slot

WIDTHS = sorted(
    {0, -1, INT_MIN, INT_MIN + 1, INT_MAX, INT_MAX - 1}
    | {sign * 2**bits + step for bits in (8, 16, 32, 48, 62) for step in (-1, 0, 1) for sign in (1, -1)}
)
ints = st.integers(INT_MIN, INT_MAX) | st.sampled_from(WIDTHS)
# Few distinct characters make common prefixes likely, and those are where orders break.
byte_strings = st.binary(max_size=12) | st.lists(st.sampled_from([0, 1, 97, 254, 255]), max_size=6).map(bytes)
texts = st.text(max_size=12) | st.text(alphabet="\0\x01ab\xff\ud800\uffff🙂", max_size=6)
parts = ints | byte_strings | texts
tuples = st.lists(parts, max_size=5).map(tuple)


def rank(part: PackedPart) -> tuple[int, PackedPart]:
    return (0 if isinstance(part, int) else 1 if isinstance(part, bytes) else 2, part)


def order(key: tuple[PackedPart, ...]) -> list[tuple[int, PackedPart]]:
    """What a tuple sorts by, said without packing."""
    return [rank(part) for part in key]


@given(tuples)
def test_a_tuple_comes_back_as_it_was_packed(key: tuple[PackedPart, ...]) -> None:
    unpacked = unpack(pack(key))

    assert unpacked == key
    assert [type(part) for part in unpacked] == [type(part) for part in key]


@given(tuples, tuples)
@example(("a", 1), ("a\0", 0))
@example((b"a",), (b"a\0",))
@example((b"a", b"\xff"), (b"a\0",))
@example((255,), (256,))
@example((), (INT_MIN,))
def test_packed_tuples_sort_as_the_tuples_do(one: tuple[PackedPart, ...], other: tuple[PackedPart, ...]) -> None:
    assert (pack(one) < pack(other)) == (order(one) < order(other))
    assert (pack(one) == pack(other)) == (one == other)


@given(tuples, st.lists(tuples, max_size=8), tuples)
def test_a_prefix_range_has_exactly_the_longer_tuples_that_begin_with_it(
    prefix: tuple[PackedPart, ...], others: list[tuple[PackedPart, ...]], rest: tuple[PackedPart, ...]
) -> None:
    low, high = prefix_range(prefix)

    for key in [*others, prefix, prefix + rest, *(prefix + other for other in others)]:
        is_below = len(key) > len(prefix) and order(key)[: len(prefix)] == order(prefix)
        assert (low < pack(key) < high) == is_below


@pytest.mark.parametrize("number", WIDTHS)
def test_an_int_at_the_edge_of_a_width_comes_back(number: int) -> None:
    assert unpack(pack((number,))) == (number,)


def test_ints_at_the_edges_of_widths_sort_by_value() -> None:
    assert sorted(WIDTHS, key=lambda number: pack((number,))) == WIDTHS


def test_small_ints_take_two_bytes_and_sequences_five() -> None:
    assert [len(pack((n,))) for n in (0, 255, 256, 65_536, 2**32 - 1, 2**32, -1)] == [2, 2, 3, 5, 5, 9, 9]


@given(st.binary(max_size=24))
def test_bytes_that_were_never_packed_are_refused_or_are_a_tuple(packed: bytes) -> None:
    try:
        key = unpack(packed)
    except ValueError:
        return
    assert unpack(pack(key)) == key


@pytest.mark.parametrize(
    "packed", [b"\x11", b"\x14abc", b"\x30abc", b"\x20a\0\xff", b"\x99", b"\x30\xff\0", b"\x14\x80" + bytes(7)]
)
def test_a_torn_key_is_refused(packed: bytes) -> None:
    with pytest.raises(ValueError, match="not a packed key"):
        unpack(packed)


@pytest.mark.parametrize("number", [INT_MIN - 1, INT_MAX + 1, 2**64, -(2**70)])
def test_an_int_beyond_64_bits_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        pack((number,))


@pytest.mark.parametrize("part", [True, False, None, 1.5, ("a",), ["a"]])
def test_a_part_of_another_type_is_refused(part: object) -> None:
    with pytest.raises(TypeError, match="part of a key"):
        pack((part,))  # type: ignore[arg-type]  # the point


def test_a_slot_becomes_its_reserved_number() -> None:
    assert pack(("a", Slot("feed", 2)), {"feed": 40}) == pack(("a", 42))


def test_a_slot_without_its_number_is_refused() -> None:
    with pytest.raises(ValueError, match="'feed'"):
        pack((Slot("feed", 0),))
    with pytest.raises(ValueError, match="'feed'"):
        pack((Slot("feed", 0),), {"inbox": 1})


def test_subclasses_pack_as_what_they_are() -> None:
    class Lane(IntEnum):
        FAST = 3

    class Kind(StrEnum):
        TIMER = "timer"

    assert pack((Lane.FAST, Kind.TIMER)) == pack((3, "timer"))


def test_a_text_met_many_times_packs_the_same() -> None:
    many = [f"order-{n}" for n in range(10_000)]

    first, second = [pack((text,)) for text in many], [pack((text,)) for text in many]

    assert first == second
    assert [unpack(packed) for packed in first] == [(text,) for text in many]


def test_a_table_name_has_letters_and_underscores_only() -> None:
    assert table_of(("saga_state", 1)) == "saga_state"
    for name in ("", "Saga", "t1", "a-b", "a b", "é", "a\n"):
        with pytest.raises(ValueError, match="names no table"):
            table_of((name, 1))
