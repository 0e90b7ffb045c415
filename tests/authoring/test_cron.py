"""What a cron expression in a zone means, and what is none."""

from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile

import hypothesis.strategies as st
import pytest
from hypothesis import given

from sagaloom.cron import parse_cron
from sagaloom.errors import DefinitionError


def utc(text: str) -> datetime:
    return datetime.fromisoformat(f"{text}+00:00")


def after(expression: str, zone: str, moment: str, count: int) -> list[str]:
    found = islice(parse_cron(expression, zone).after(utc(moment)), count)
    return [tick.strftime("%d %H:%M") for tick in found]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("*/15 * * * *", "2026-01-01 00:15"),
        ("30 8 * * 1-5", "2026-01-01 08:30"),
        ("0 0 1 * *", "2026-02-01 00:00"),
        ("0 0 L * *", "2026-01-31 00:00"),
        ("0 0 * * SUN", "2026-01-04 00:00"),
        ("0 0 29 2 *", "2028-02-29 00:00"),
        ("0 0 13 * 5", "2026-01-02 00:00"),
    ],
)
def test_the_next_moment_is_the_first_that_fits(expression: str, expected: str) -> None:
    assert parse_cron(expression).next_after(utc("2026-01-01 00:00")) == utc(expected)


def test_the_moment_itself_does_not_count_and_a_fraction_of_a_second_before_it_does() -> None:
    cron = parse_cron("0 * * * *")
    moment = utc("2026-01-01 03:00")

    assert cron.next_after(moment) == moment + timedelta(hours=1)
    assert cron.next_after(moment - timedelta(microseconds=1)) == moment
    assert cron.latest(moment) == moment
    assert cron.latest(moment - timedelta(microseconds=1)) == moment - timedelta(hours=1)


# Europe/Berlin: on 29 March 2026 the hour from 2:00 to 3:00 does not exist (1:00 UTC), on 25 October it comes twice
# (0:00 to 2:00 UTC).


def test_a_local_time_that_does_not_exist_fires_once_at_the_end_of_the_gap() -> None:
    assert after("30 2 * * *", "Europe/Berlin", "2026-03-28 12:00", 3) == ["29 01:00", "30 00:30", "31 00:30"]


def test_a_local_time_that_comes_twice_fires_once_at_the_first() -> None:
    assert after("30 2 * * *", "Europe/Berlin", "2026-10-24 12:00", 3) == ["25 00:30", "26 01:30", "27 01:30"]


@pytest.mark.parametrize("moment", ["2026-10-25 00:30", "2026-10-25 00:45", "2026-10-25 01:10", "2026-10-25 01:30"])
def test_looking_again_in_the_second_of_two_equal_hours_does_not_find_the_first_one(moment: str) -> None:
    assert after("30 2 * * *", "Europe/Berlin", moment, 1) == ["26 01:30"]


@pytest.mark.parametrize("moment", ["2026-03-29 01:00", "2026-03-29 01:00:30", "2026-03-29 01:20"])
def test_looking_again_behind_a_gap_does_not_find_it_again(moment: str) -> None:
    assert after("30 2 * * *", "Europe/Berlin", moment, 1) == ["30 00:30"]


def test_two_local_times_in_a_gap_are_one_moment() -> None:
    assert after("0,30 2 * * *", "Europe/Berlin", "2026-03-28 12:00", 2) == ["29 01:00", "30 00:00"]
    assert after("0 2,3 * * *", "Europe/Berlin", "2026-03-28 12:00", 2) == ["29 01:00", "30 00:00"]


def test_an_expression_with_a_star_follows_the_time_that_passes() -> None:
    assert after("30 * * * *", "Europe/Berlin", "2026-03-29 00:00", 3) == ["29 00:30", "29 01:30", "29 02:30"]
    assert after("30 * * * *", "Europe/Berlin", "2026-10-25 00:00", 3) == ["25 00:30", "25 01:30", "25 02:30"]
    assert after("*/30 2 * * *", "Europe/Berlin", "2026-10-24 12:00", 4) == [
        "25 00:00",
        "25 00:30",
        "25 01:00",
        "25 01:30",
    ]
    assert after("*/30 2 * * *", "Europe/Berlin", "2026-03-28 12:00", 1) == ["30 00:00"]


EXPRESSIONS = st.sampled_from(
    [
        "30 2 * * *",
        "0,30 2 * * *",
        "0 2,3 * * *",
        "*/30 2 * * *",
        "30 * * * *",
        "*/7 * * * *",
        "0 */5 * * *",
        "5 0 * * *",
    ]
)
ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "America/Santiago", "Asia/Kolkata"])
MOMENTS = st.one_of(
    st.datetimes(datetime(2026, 3, 28), datetime(2026, 3, 31)),  # noqa: DTZ001 - made aware below
    st.datetimes(datetime(2026, 10, 24), datetime(2026, 11, 3)),  # noqa: DTZ001
).map(lambda moment: moment.replace(tzinfo=UTC))


@given(EXPRESSIONS, ZONES, MOMENTS, st.timedeltas(timedelta(), timedelta(days=2)))
def test_moments_grow_and_do_not_depend_on_where_one_began_to_look(
    expression: str, zone: str, first: datetime, later: timedelta
) -> None:
    cron, second = parse_cron(expression, zone), first + later
    until = second + timedelta(days=2)

    found = list(takewhile(lambda tick: tick <= until, cron.after(first)))

    assert found == sorted(set(found))
    assert list(takewhile(lambda tick: tick <= until, cron.after(second))) == [tick for tick in found if tick > second]
    assert cron.latest(until) == found[-1]


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("", "has 0 fields"),
        ("* * * *", "has 4 fields"),
        ("0 * * * * *", "has 6 fields"),
        ("@daily", "has 1 fields"),
        ("60 * * * *", "no cron expression .Bad minute"),
        ("*/0 * * * *", "no cron expression .Bad minute"),
        ("0 0 32 * *", "no cron expression .Bad day-of-month"),
        ("0 0 * FOO *", "no cron expression .Bad month"),
        ("0 0 31 2 *", "'0 0 31 2 \\*' never fires"),
        ("0 0 31 4,6,9,11 *", "never fires"),
        ("0 0 * 4 6#6", "no cron expression"),
        (f"{','.join(['0'] * 200)} * * * *", "at most 255"),
    ],
)
def test_what_is_no_expression_or_never_fires_is_refused(expression: str, reason: str) -> None:
    with pytest.raises(DefinitionError, match=reason):
        parse_cron(expression)


@pytest.mark.parametrize("zone", ["", "Mars/Olympus", "Europe", "../etc/passwd", "/etc/passwd", "CET+1", "a\0b"])
def test_an_unknown_zone_is_refused(zone: str) -> None:
    with pytest.raises(DefinitionError, match=r"is unknown here.*tzdata"):
        parse_cron("0 3 * * *", zone)


def test_the_calendar_ends_without_an_error() -> None:
    cron = parse_cron("0 0 1 1 *", "Europe/Berlin")

    assert cron.next_after(utc("9999-06-01 00:00")) is None
    assert cron.latest(datetime.min.replace(tzinfo=UTC)) is None


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Australia/Lord_Howe", "America/New_York"])
@pytest.mark.parametrize("expression", ["30 2 * * *", "15 1 * * *", "*/20 * * * *", "45 1,2,3 * * *"])
def test_looking_back_and_looking_ahead_agree_around_both_changes_of_the_clock(expression: str, zone: str) -> None:
    cron = parse_cron(expression, zone)
    for begin in (datetime(2026, month, 1, tzinfo=UTC) for month in (3, 4, 10, 11)):
        ahead = cron.after(begin)
        tick = next(ahead)
        following = next(ahead)
        now = tick
        while now < begin + timedelta(days=31):
            while following <= now:
                tick, following = following, next(ahead)

            assert cron.latest(now) == tick

            now += timedelta(minutes=55)
