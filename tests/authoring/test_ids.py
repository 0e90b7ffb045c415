"""Names of sagas, keys and instances."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagaloom import DefinitionError, MessageRejected
from sagaloom.ids import InstanceRef, check_key, check_saga_id, instance_id, parse_instance_id

SAGA_IDS = st.text("abc.-_9é", min_size=1)
KEYS = st.text(st.characters(exclude_categories=["Cs"], min_codepoint=0x20), min_size=1, max_size=200)


@given(SAGA_IDS, KEYS, st.integers(1, 10**9 - 1))
def test_an_instance_id_splits_back_into_its_parts(saga_id: str, key: str, run: int) -> None:
    assert InstanceRef(saga_id, key, run) == parse_instance_id(instance_id(saga_id, key, run))


@given(st.text())
def test_any_text_is_the_instance_id_of_its_parts_or_refused(text: str) -> None:
    try:
        parts = parse_instance_id(text)
    except MessageRejected:
        return
    assert text == instance_id(*parts)


@pytest.mark.parametrize("text", ["", "order", "order:", ":key", "order~1:key", "order~0:key", "order~:key", "a~b:c"])
def test_what_is_no_instance_id_is_refused(text: str) -> None:
    with pytest.raises(MessageRejected, match="is no instance id"):
        parse_instance_id(text)


def test_a_saga_id_is_trimmed() -> None:
    assert check_saga_id("  order ") == "order"


@pytest.mark.parametrize("saga_id", ["", "  ", None, 3])
def test_a_saga_needs_an_id(saga_id: str) -> None:
    with pytest.raises(DefinitionError, match=r"Saga ID is required\."):
        check_saga_id(saga_id)


@pytest.mark.parametrize("saga_id", ["a:b", "a~b", "a/b", "a\nb", "a\ud800"])
def test_a_saga_id_holds_no_separators(saga_id: str) -> None:
    with pytest.raises(DefinitionError, match="separate the parts"):
        check_saga_id(saga_id)


@pytest.mark.parametrize("key", ["o-1", "a/b:c~d", "é" * 512, "\x7f", " "])
def test_a_key_may_hold_almost_anything(key: str) -> None:
    assert check_key(key) == key


@pytest.mark.parametrize("key", ["", "a\0", "a\n", "\x1f", "\ud800", "x" * 1025, "é" * 513, 3])
def test_a_key_holds_no_controls_and_has_a_limit(key: str) -> None:
    with pytest.raises(MessageRejected, match="correlation key"):
        check_key(key)
