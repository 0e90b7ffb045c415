"""When a failed attempt is made again."""

from datetime import timedelta

import pytest

from sagaloom import RetryPolicy, SagasError
from sagaloom.engine.retrying import backoff, describe, is_retryable

_STEADY = RetryPolicy(jitter=0.0)


@pytest.mark.parametrize(("attempt", "seconds"), [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (5_000, 60)])
def test_each_wait_is_twice_the_one_before_up_to_the_cap(attempt: int, seconds: int) -> None:
    assert backoff(_STEADY, attempt=attempt, message_id="m") == timedelta(seconds=seconds)


def test_jitter_takes_up_to_its_fraction_off_and_depends_on_message_and_attempt_alone() -> None:
    policy = RetryPolicy(jitter=0.5, backoff_coefficient=1.0)
    waits = {
        (n, attempt): backoff(policy, attempt=attempt, message_id=f"m{n}") for n in range(50) for attempt in (1, 2)
    }

    assert all(timedelta(seconds=0.5) <= wait <= timedelta(seconds=1) for wait in waits.values())
    assert len(set(waits.values())) > 60
    assert backoff(policy, attempt=1, message_id="m7") == waits[7, 1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError(), True),
        (SagasError("no"), False),
        (SagasError("later", retryable=True), True),
        (KeyError("listed through its base"), False),
        (ZeroDivisionError(), False),
    ],
)
def test_what_says_it_is_not_retryable_and_what_is_listed_is_not_retried(error: Exception, expected: bool) -> None:
    policy = RetryPolicy(non_retryable_error_types=("LookupError", "ZeroDivisionError"))

    assert is_retryable(error, policy) is expected


def test_an_error_that_cannot_show_itself_is_described_all_the_same() -> None:
    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe(Broken()) == "Broken: (its text cannot be shown: RuntimeError)"
    assert describe(ValueError()) == "ValueError"
