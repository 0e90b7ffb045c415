"""One publish, as a conversation without I/O: which request to make next, and what an answer means.

The clients, asynchronous and not, only carry: they make the request that `Conversation.request` names and hand what
came of it to `hear`, which gives the result or how long to wait before asking again.

The rules:

1. All attempts send the same bytes, under one message id and one idempotency key, so asking again is always safe. An
   answer is believed only when it is one: status 2xx, and a JSON object with `published: true` and this message's type.
2. What may be different next time is asked again: no answer, a retryable status, and a 2xx whose body is no JSON (a
   proxy's page, half an answer). The last is never taken for success.
3. What will be the same next time ends the publish: other statuses, redirects, `published: false`, a JSON body that is
   no publish answer or for another message, an answer beyond all bounds.
4. Waits grow by the policy, or are what `Retry-After` says if that is longer. A wait that would not end before the
   deadline is not begun.
5. Once an attempt has ended without a clear answer, the refusal says `may_have_arrived`, whatever later attempts hear.

    request ──► answer ──► accepted                       SagaPublisherReceipt
       ▲           ├─────► will be the same next time     SagaPublisherRejected
       └── wait ◄──┴─────► may be different next time     SagaPublisherRejected, when attempts or time are used up

What we dislike about it: a service that is older than idempotency keys applies a message twice when its answer gets
lost, and nothing here can tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from typing import Any, Final, cast

import msgspec

from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.records import Disposition
from sagaloom.engine.retrying import backoff
from sagaloom.errors import (
    BackendUnavailable,
    ConfigurationError,
    IdempotencyKeyReused,
    MessageRejected,
    SagaNotFound,
    SagasError,
)
from sagaloom.outbound import retry_after_seconds, without_credentials
from sagaloom.ports.publisher import Outcome, SagaPublisherReceipt, SagaPublisherRejected, SagaPublisherResult
from sagaloom.publisher.drafts import Draft
from sagaloom.publisher.options import FetchRequest, FetchResponse, HttpSagaPublisherOptions

__all__ = ["Conversation", "Silence", "Wait"]

_log = logging.getLogger("sagaloom.publisher")
_CLASS_OF_CODE: Final[Mapping[str, type[SagasError]]] = {
    "SAGA_NOT_FOUND": SagaNotFound,
    "IDEMPOTENCY_KEY_REUSED": IdempotencyKeyReused,
}


@dataclass(frozen=True, slots=True)
class Silence:
    """No answer came. `may_have_arrived`: the request may have been taken in none the less."""

    reason: str
    retryable: bool = True
    may_have_arrived: bool = True
    cause: Exception | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Time to let pass before the next attempt."""

    seconds: float


@dataclass(frozen=True, slots=True)
class _Refused:
    error: SagasError
    may_have_arrived: bool = False
    retry_after_seconds: float = 0.0


class Conversation:
    """One publish of `draft` to `url`."""

    def __init__(
        self,
        draft: Draft,
        *,
        url: str,
        options: HttpSagaPublisherOptions,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        wait = draft.wait_seconds
        self._draft = draft
        self._url = url if wait is None else f"{url}{'&' if '?' in url else '?'}wait={wait:g}"
        self._shown = without_credentials(url)
        self._options = options
        self._policy = options.policy
        self._now = now
        self._monotonic = monotonic
        self._attempt_seconds = options.attempt_seconds + (wait or 0.0)
        self._deadline = monotonic() + options.timeout_seconds + (wait or 0.0)
        self._headers = {
            "accept": "application/json",
            "accept-encoding": "identity",  # a bound on the bytes is a bound on the answer
            "content-type": "application/json",
            **options.headers,
            **draft.headers,
        }
        self._attempts = 0
        self._may_have_arrived = False

    def request(self) -> FetchRequest:
        """The next attempt."""
        self._attempts += 1
        # Not 0: some clients take that for no limit at all.
        seconds = max(min(self._attempt_seconds, self._deadline - self._monotonic()), 0.001)
        return FetchRequest(url=self._url, headers=self._headers, content=self._draft.body, timeout_seconds=seconds)

    def hear(self, answer: FetchResponse | Silence) -> SagaPublisherResult | Wait:
        """What the answer to the last request makes of the publish: its result, or a wait before the next attempt."""
        verdict = self._unanswered(answer) if isinstance(answer, Silence) else self._verdict(answer)
        if isinstance(verdict, SagaPublisherReceipt):
            return verdict
        self._may_have_arrived = self._may_have_arrived or verdict.may_have_arrived
        error, draft = verdict.error, self._draft
        if error.retryable and self._attempts < self._policy.maximum_attempts:
            wait = backoff(self._policy, attempt=self._attempts, message_id=draft.message_id).total_seconds()
            wait = max(wait, verdict.retry_after_seconds)
            if self._monotonic() + wait < self._deadline:
                _log.info(
                    "%s: attempt %d to publish %s (%s) failed, the next one is in %.3g s: %s",
                    self._options.id,
                    self._attempts,
                    draft.message_type,
                    draft.message_id,
                    wait,
                    error.message,
                )
                return Wait(wait)
        return self._rejected(error)

    def _rejected(self, error: SagasError) -> SagaPublisherRejected:
        draft = self._draft
        return SagaPublisherRejected(
            message_type=draft.message_type,
            error=error,
            message_id=draft.message_id,
            idempotency_key=draft.idempotency_key,
            correlation_key=draft.correlation_key,
            attempts=self._attempts,
            may_have_arrived=self._may_have_arrived,
        )

    def _unanswered(self, silence: Silence) -> _Refused:
        kind = BackendUnavailable if silence.retryable else ConfigurationError
        error = kind(
            f"Saga publish got no answer from {self._shown}: {silence.reason}",
            retryable=silence.retryable,
            data=self._data(),
        )
        error.__cause__ = silence.cause
        return _Refused(error, silence.may_have_arrived)

    def _verdict(self, answer: FetchResponse) -> SagaPublisherReceipt | _Refused:
        status = answer.status
        if 200 <= status < 300:
            return self._taken(answer)
        headers = {name.lower(): value for name, value in answer.headers.items()}
        problem = _object_in(answer.content)
        code, said = problem.get("code"), problem.get("message")
        data = self._data(status)
        # A client error says that nothing was done; anything else may have happened half-way.
        is_clear = 300 <= status < 500 and status != 408
        text = f"Saga publish failed with {status} {_phrase(status)}".rstrip() + f" from {self._shown}"
        if isinstance(said, str) and said:
            text += f": {said:.1000}"
        elif 300 <= status < 400:
            location = headers.get("location", "?")
            text += f": redirects, here to {location!r:.200}, are not followed; give the final address as base_url="
        elif answer.content.strip():
            text += f": {answer.content[:200].decode('utf-8', 'replace').strip()}"
        if status in (401, 403):
            text += "; send a token: headers={'Authorization': 'Bearer ...'}"
        elif status == 404 and not isinstance(code, str):
            text += "; is it a saga service?"
        after = retry_after_seconds(headers.get("retry-after"), self._now())
        if after is not None:
            data["retryAfterSeconds"] = after
        if isinstance(problem.get("data"), Mapping):
            data = {**problem["data"], **data}
        name = code if isinstance(code, str) and code else _name(status)
        kind = _CLASS_OF_CODE.get(name, BackendUnavailable if status >= 500 else MessageRejected)
        error = kind(text, code=name, retryable=self._options.is_retryable(status), data=data)
        return _Refused(error, not is_clear, after or 0.0)

    def _taken(self, answer: FetchResponse) -> SagaPublisherReceipt | _Refused:
        """What a 2xx says; the message is taken in only if it says so itself."""
        data = self._data(answer.status)
        if not answer.is_whole:
            return _Refused(
                MessageRejected(
                    f"Saga publish response from {self._shown} is larger than any answer: is it a saga service?",
                    code="BAD_ANSWER",
                    data=data,
                ),
                may_have_arrived=True,
            )
        try:
            document: object = msgspec.json.decode(answer.content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            start = answer.content[:80].decode("utf-8", "replace").strip()
            return _Refused(
                BackendUnavailable(
                    f"Saga publish response from {self._shown} is no JSON: it begins with {start!r}; is it a saga "
                    "service?",
                    code="BAD_ANSWER",
                    data=data,
                ),
                may_have_arrived=True,
            )
        problem = self._doubt(document)
        if problem is not None:
            text, may_have_arrived = problem
            error = MessageRejected(f"{text} ({self._shown})", code="BAD_ANSWER", data=data)
            return _Refused(error, may_have_arrived)
        return self._receipt(cast("dict[str, Any]", document))

    def _doubt(self, document: object) -> tuple[str, bool] | None:
        """Why a decoded body does not say that the message is taken in, and whether it may be none the less."""
        if not isinstance(document, dict):
            return "Saga publish response must be a JSON object.", True
        answer = cast("dict[str, object]", document)
        if answer.get("published") is not True:
            reason = answer.get("reason") or answer.get("message")
            said = f" It says: {reason:.1000}" if isinstance(reason, str) else ""
            return f"Saga API rejected the publish request.{said}", answer.get("published") is not False
        answered_type = answer.get("messageType")
        if not isinstance(answered_type, str):
            return "Saga publish response must include messageType.", True
        if answered_type != self._draft.message_type:
            return f"Saga publish response is for {answered_type!r:.80}, not {self._draft.message_type!r:.80}.", True
        return None

    def _receipt(self, answer: Mapping[str, Any]) -> SagaPublisherReceipt:
        draft = self._draft
        message_id = _text(answer.get("messageId")) or draft.message_id
        key = _text(answer.get("correlationKey")) or _text(answer.get("correlationId"))
        return SagaPublisherReceipt(
            message_type=draft.message_type,
            message_id=message_id,
            idempotency_key=draft.idempotency_key,
            correlation_key=key or draft.correlation_key,
            accepted_at=self._now(),
            duplicate=answer.get("duplicate") is True,
            attempts=self._attempts,
            instance_ids=_instance_ids(answer.get("instances")),
            outcomes=_outcomes(answer.get("outcomes"), message_id),
        )

    def _data(self, status: int | None = None) -> dict[str, object]:
        data: dict[str, object] = {"attempts": self._attempts}
        if status is not None:
            data["status"] = status
        return data


class _InstanceAnswer(msgspec.Struct, rename="camel"):
    instance_id: str


class _OutcomeAnswer(msgspec.Struct, kw_only=True, rename="camel"):
    instance_id: str
    saga_id: str
    correlation_key: str
    run: int
    disposition: Disposition
    status: SagaInstanceStatus | None = None
    revision: int | None = None
    state: Any = None
    effects: list[str] = []
    result: Any = None
    reason: str | None = None


def _instance_ids(listed: object) -> tuple[str, ...]:
    try:
        return tuple(one.instance_id for one in msgspec.convert(listed, list[_InstanceAnswer]))
    except msgspec.ValidationError:
        return ()  # the message is taken in, whatever another version tells beside


def _outcomes(listed: object, message_id: str) -> tuple[Outcome, ...]:
    try:
        found = msgspec.convert(listed, list[_OutcomeAnswer])
    except msgspec.ValidationError:
        return ()
    return tuple(Outcome(message_id=message_id, **msgspec.structs.asdict(one)) for one in found)


def _object_in(content: bytes) -> dict[str, Any]:
    try:
        document: object = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return cast("dict[str, Any]", document) if isinstance(document, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return ""


def _name(status: int) -> str:
    try:
        return HTTPStatus(status).name
    except ValueError:
        return f"HTTP_{status}"
