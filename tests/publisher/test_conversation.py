"""The conversation of one publish: when it asks again, how long it waits, when it gives up. No clock, no network."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from sagaloom import RetryPolicy, SagaMessage
from sagaloom.integration.publisher import SagaPublisherReceipt, SagaPublisherRejected
from sagaloom.publisher import FetchResponse, HttpSagaPublisherOptions
from sagaloom.publisher.conversation import Conversation, Silence, Wait
from sagaloom.publisher.drafts import draft_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
TAKEN = FetchResponse(status=200, content=b'{"published": true, "messageType": "A"}')
BUSY = FetchResponse(status=503)


class Time:
    """Seconds that pass when a test says so."""

    seconds = 1_000.0

    def __call__(self) -> float:
        return self.seconds


def a_conversation(time: Time | None = None, *, wait: float | None = None, **options: Any) -> Conversation:
    draft = draft_of(SagaMessage("A", {}, id="m-1"), None, {}, declared=None, wait=wait, now=NOW)
    return Conversation(
        draft,
        url="http://sagas/publish",
        options=HttpSagaPublisherOptions(**options),
        now=lambda: NOW,
        monotonic=time or Time(),
    )


def waits_of(conversation: Conversation, answer: FetchResponse | Silence) -> tuple[list[float], SagaPublisherRejected]:
    """The waits until it gives up, if all attempts hear `answer`, and what it says then."""
    waits: list[float] = []
    while True:
        conversation.request()
        verdict = conversation.hear(answer)
        if not isinstance(verdict, Wait):
            assert isinstance(verdict, SagaPublisherRejected)
            return waits, verdict
        waits.append(verdict.seconds)


def test_waits_grow_and_attempts_are_counted() -> None:
    policy = RetryPolicy(maximum_attempts=5, initial_interval_ms=100, maximum_interval_ms=500, jitter=0.0)

    waits, refused = waits_of(a_conversation(retries=policy), BUSY)

    assert waits == [0.1, 0.2, 0.4, 0.5]
    assert refused.attempts == 5
    assert refused.retryable


def test_the_waits_of_two_publishers_differ() -> None:
    waits, _ = waits_of(a_conversation(), BUSY)

    assert [0.1 <= waits[0] <= 0.2, 0.2 <= waits[1] <= 0.4, 0.4 <= waits[2] <= 0.8] == [True] * 3
    assert waits[0] != 0.2


def test_no_retries_is_one_attempt() -> None:
    waits, refused = waits_of(a_conversation(retries=0), BUSY)

    assert (waits, refused.attempts) == ([], 1)


@pytest.mark.parametrize("value", ["7", "Thu, 01 Jan 2026 00:00:07 GMT"])
def test_what_the_service_asks_for_is_waited(value: str) -> None:
    conversation = a_conversation()
    conversation.request()

    assert conversation.hear(FetchResponse(status=429, headers={"Retry-After": value})) == Wait(7.0)


def test_a_service_that_asks_for_less_than_the_policy_waits_gets_the_policy() -> None:
    conversation = a_conversation(retries=RetryPolicy(initial_interval_ms=2_000, jitter=0.0))
    conversation.request()

    assert conversation.hear(FetchResponse(status=503, headers={"retry-after": "1"})) == Wait(2.0)


def test_a_wait_that_would_outlast_the_deadline_is_not_begun() -> None:
    conversation = a_conversation(timeout=30)
    conversation.request()

    refused = conversation.hear(FetchResponse(status=429, headers={"retry-after": "30"}))

    assert isinstance(refused, SagaPublisherRejected)
    assert (refused.attempts, refused.retryable) == (1, True)
    assert refused.error.data["retryAfterSeconds"] == 30.0


def test_all_attempts_share_one_deadline() -> None:
    time = Time()
    conversation = a_conversation(time, timeout=10, attempt_timeout=4)
    seconds: list[float] = []

    for passed in (4.0, 4.0):
        seconds.append(conversation.request().timeout_seconds)
        time.seconds += passed
        assert isinstance(conversation.hear(Silence("nothing came")), Wait)
    seconds.append(conversation.request().timeout_seconds)
    time.seconds += 2.0

    assert seconds == [4.0, 4.0, 2.0]
    assert isinstance(conversation.hear(Silence("nothing came")), SagaPublisherRejected)


def test_an_attempt_that_waits_for_outcomes_gets_that_much_longer() -> None:
    request = a_conversation(attempt_timeout=4, wait=5.0).request()

    assert request.url == "http://sagas/publish?wait=5"
    assert request.timeout_seconds == 9.0


def test_every_attempt_sends_the_same() -> None:
    conversation = a_conversation()
    first = conversation.request()
    conversation.hear(BUSY)

    second = conversation.request()

    assert (first.content, first.headers, first.url) == (second.content, second.headers, second.url)


@pytest.mark.parametrize(
    ("answer", "may_have_arrived"),
    [
        (Silence("nothing came"), True),
        (Silence("refused", may_have_arrived=False), False),
        (FetchResponse(status=200, content=b"<html>"), True),
        (FetchResponse(status=408), True),
        (FetchResponse(status=429), False),
        (FetchResponse(status=500), True),
        (FetchResponse(status=503), True),
    ],
)
def test_a_refusal_says_whether_the_message_may_be_there_none_the_less(
    answer: FetchResponse | Silence, may_have_arrived: bool
) -> None:
    assert waits_of(a_conversation(), answer)[1].may_have_arrived == may_have_arrived


def test_what_one_attempt_left_open_no_later_one_closes() -> None:
    conversation = a_conversation()
    conversation.request()
    conversation.hear(Silence("nothing came"))
    conversation.request()

    refused = conversation.hear(FetchResponse(status=422))

    assert isinstance(refused, SagaPublisherRejected)
    assert (refused.may_have_arrived, refused.retryable, refused.attempts) == (True, False, 2)


def test_a_silence_that_will_be_the_same_next_time_ends_it() -> None:
    conversation = a_conversation()
    conversation.request()

    refused = conversation.hear(Silence("no such scheme", retryable=False, may_have_arrived=False))

    assert isinstance(refused, SagaPublisherRejected)
    assert (refused.code, refused.attempts, refused.may_have_arrived) == ("CONFIGURATION_ERROR", 1, False)


def test_an_answer_after_a_wait_is_a_receipt() -> None:
    conversation = a_conversation()
    conversation.request()
    conversation.hear(BUSY)
    conversation.request()

    receipt = conversation.hear(TAKEN)

    assert isinstance(receipt, SagaPublisherReceipt)
    assert (receipt.attempts, receipt.message_id, receipt.idempotency_key) == (2, "m-1", "m-1")
    assert receipt.accepted_at == NOW
