"""The grammar of delays."""

import contextlib
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagaloom import DefinitionError
from sagaloom.durations import check_delay, parse_duration, resolve_delay

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)
TEN_YEARS = timedelta(days=3650)
UNITS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


@given(st.integers(0, 3650), st.sampled_from(list(UNITS)))
def test_a_number_with_a_unit_is_that_many_of_the_unit(count: int, unit: str) -> None:
    assert timedelta(milliseconds=count * UNITS[unit]) == parse_duration(f"{count}{unit}")


@given(st.floats(0, 1e11))
def test_a_bare_number_is_milliseconds(milliseconds: float) -> None:
    assert timedelta(milliseconds=milliseconds) == parse_duration(milliseconds)


@given(st.text())
def test_any_text_is_a_delay_or_a_definition_error(text: str) -> None:
    with contextlib.suppress(DefinitionError):
        assert timedelta(0) <= parse_duration(text) <= TEN_YEARS


@given(st.integers() | st.floats() | st.timedeltas() | st.integers().map(lambda power: 10 ** (abs(power) % 5000)))
def test_any_number_is_a_delay_or_a_definition_error(delay: float | timedelta) -> None:
    with contextlib.suppress(DefinitionError):
        assert timedelta(0) <= parse_duration(delay) <= TEN_YEARS


@pytest.mark.parametrize("delay", ["", "5", "5 m", "1h30m", "-5m", "5M", "1.5h", "\u0665m", "5m\n", "9" * 16 + "d"])
def test_other_text_is_refused_with_an_example(delay: str) -> None:
    with pytest.raises(DefinitionError, match=r"must use an ms, s, m, h, or d suffix\..*write for example '5m'"):
        parse_duration(delay)


@pytest.mark.parametrize(
    "delay", [-1, True, float("nan"), float("inf"), timedelta(-1), None, pytest.param(-(10**5000), id="huge")]
)
def test_a_negative_or_infinite_delay_is_refused(delay: float) -> None:
    with pytest.raises(DefinitionError, match="must be a non-negative finite number"):
        parse_duration(delay)


@pytest.mark.parametrize("delay", ["3651d", timedelta(days=3651), pytest.param(10**5000, id="huge")])
def test_more_than_ten_years_is_refused(delay: float) -> None:
    with pytest.raises(DefinitionError, match="longer than ten years"):
        parse_duration(delay)


def test_a_moment_without_a_zone_is_refused() -> None:
    with pytest.raises(DefinitionError, match="has no time zone"):
        check_delay(NOW.replace(tzinfo=None))


def test_a_delay_counts_from_now() -> None:
    assert NOW + timedelta(minutes=5) == resolve_delay("5m", NOW)


def test_a_moment_is_itself_in_utc() -> None:
    moment = datetime(2026, 2, 1, 12, tzinfo=timezone(timedelta(hours=2)))

    resolved = resolve_delay(moment, NOW)

    assert (datetime(2026, 2, 1, 10, tzinfo=UTC), UTC) == (resolved, resolved.tzinfo)


def test_a_moment_in_the_past_is_now() -> None:
    assert resolve_delay(NOW - timedelta(days=1), NOW) == NOW
