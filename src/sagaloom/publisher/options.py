"""How a publisher is set up, where it finds the service, and the seam through which its requests leave."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypedDict, cast

from sagaloom.definitions import RetryPolicy
from sagaloom.errors import ConfigurationError
from sagaloom.outbound import checked_base_url, discovered_base_url, is_retryable_status

__all__ = ["FetchRequest", "FetchResponse", "Fetcher", "HttpSagaPublisherKeywords", "HttpSagaPublisherOptions"]

_DEV_URL: Final = "http://127.0.0.1:8092"
_WHAT: Final = "the sagas API"
_URL_VARIABLES: Final = ("SAGAS_API_URL", "NETSCRIPT_SAGAS_URL")
_ATTEMPT_SECONDS: Final = 10.0
_SECONDS_MAX: Final = 86_400.0
_RETRIES_MAX: Final = 100
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADERS_OF_ONE_MESSAGE: Final = frozenset(
    ("content-length", "idempotency-key", "traceparent", "tracestate", "transfer-encoding")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    """A POST that a publisher wants to have made. `timeout_seconds` is all the time there is for it."""

    url: str
    headers: Mapping[str, str] = field(repr=False)  # one of them may be a token
    content: bytes
    timeout_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchResponse:
    """What came back. `is_whole` is False when the content was too much to be read to its end."""

    status: int
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    is_whole: bool = True


Fetcher = Callable[[FetchRequest], FetchResponse | Awaitable[FetchResponse]]
"""Makes a request and returns the answer, whatever its status; raises `OSError` or `TimeoutError` when none came. May
be a coroutine function, except for the synchronous publisher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSagaPublisherOptions:
    """How an HTTP publisher is set up.

    - `base_url`: where the service is. Otherwise the environment is read, at every publish: the variables
      `services__<service_name>__https__0`, `services__<service_name>__http__0`, `SAGAS_API_URL`, `NETSCRIPT_SAGAS_URL`;
      and when `SAGALOOM_DEV=1` says that this is a developer's machine, `http://127.0.0.1:8092`.
    - `publish_path`: the path below that address.
    - `headers`: further headers of every request, such as `Authorization`.
    - `retryable_status_codes`: the answers after which it tries again; by default 408, 409, 425, 429 and 5xx but 501
      and 505.
    - `id`: what logs call this publisher.
    - `fetcher`: makes the requests instead of the HTTP client that comes with the package.
    - `read_env`: reads an environment variable.
    - `timeout`: the seconds for one publish with all its retries; `attempt_timeout`: for one attempt, by default 10.
      What `publish(..., wait=...)` waits for is added to both.
    - `retries`: how many attempts follow the first one, at growing distances from 0.2 s on; or a `RetryPolicy`, whose
      `maximum_attempts` counts the first one too.
    """

    service_name: str = "sagas-api"
    base_url: str | None = field(default=None, repr=False)  # it may hold credentials, and so may headers
    publish_path: str = "/api/v1/sagas/publish"
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    retryable_status_codes: Collection[int] | None = None
    id: str = "http-saga-publisher"
    fetcher: Fetcher | None = None
    read_env: Callable[[str], str | None] = field(default=os.environ.get, repr=False)  # its repr is the environment
    timeout: float | timedelta = 30.0
    attempt_timeout: float | timedelta | None = None
    retries: int | RetryPolicy = 4

    def __post_init__(self) -> None:
        for name in ("service_name", "publish_path", "id"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip() or not text.isprintable():
                raise ConfigurationError(f"{name}={text!r:.80} of a saga publisher must be a word, not empty")
        if self.base_url is not None:
            checked_base_url(self.base_url, "base_url", what=_WHAT, example=_DEV_URL)
        if "://" in self.publish_path or "#" in self.publish_path or " " in self.publish_path:
            raise ConfigurationError(
                f"publish_path={self.publish_path!r:.200} is no path: write for example '/api/v1/sagas/publish', and "
                "the address of the service as base_url="
            )
        object.__setattr__(self, "headers", _checked_headers(self.headers))
        codes = self.retryable_status_codes
        if codes is not None:
            object.__setattr__(self, "retryable_status_codes", _checked_codes(codes))
        for name in ("fetcher", "read_env"):
            function = getattr(self, name)
            if not callable(function) and not (name == "fetcher" and function is None):
                raise ConfigurationError(f"{name}={function!r:.80} of a saga publisher must be a function")
        _seconds_of(self.timeout, "timeout")
        if self.attempt_timeout is not None:
            _seconds_of(self.attempt_timeout, "attempt_timeout")
        retries = self.retries
        attempts = retries.maximum_attempts - 1 if isinstance(retries, RetryPolicy) else retries
        if isinstance(attempts, bool) or not isinstance(attempts, int) or not 0 <= attempts <= _RETRIES_MAX:
            raise ConfigurationError(
                f"retries={retries!r:.200} of a saga publisher must be 0 to {_RETRIES_MAX}, or a RetryPolicy"
            )

    @property
    def timeout_seconds(self) -> float:
        return _seconds_of(self.timeout, "timeout")

    @property
    def attempt_seconds(self) -> float:
        if self.attempt_timeout is None:
            return min(_ATTEMPT_SECONDS, self.timeout_seconds)
        return _seconds_of(self.attempt_timeout, "attempt_timeout")

    @property
    def policy(self) -> RetryPolicy:
        if isinstance(self.retries, RetryPolicy):
            return self.retries
        # Half of each wait is jitter, so that publishers which lost one service together do not return together.
        return RetryPolicy(
            maximum_attempts=self.retries + 1, initial_interval_ms=200, maximum_interval_ms=10_000, jitter=0.5
        )

    def is_retryable(self, status: int) -> bool:
        codes = self.retryable_status_codes
        return is_retryable_status(status) if codes is None else status in codes

    def publish_url(self) -> str:
        """Where to publish, as of now. Raises `ConfigurationError` naming what was read."""
        path = self.publish_path if self.publish_path.startswith("/") else f"/{self.publish_path}"
        return self._base_url().rstrip("/") + path

    def _base_url(self) -> str:
        if self.base_url is not None:
            return self.base_url.strip()
        return discovered_base_url(
            self.service_name, what=_WHAT, variables=_URL_VARIABLES, dev_url=_DEV_URL, read_env=self.read_env
        )


class HttpSagaPublisherKeywords(TypedDict, total=False):
    """The fields of `HttpSagaPublisherOptions`, as keywords of `create_saga_publisher`."""

    service_name: str
    base_url: str | None
    publish_path: str
    headers: Mapping[str, str]
    retryable_status_codes: Collection[int] | None
    id: str
    fetcher: Fetcher | None
    read_env: Callable[[str], str | None]
    timeout: float | timedelta
    attempt_timeout: float | timedelta | None
    retries: int | RetryPolicy


def _checked_headers(headers: object) -> Mapping[str, str]:
    """The headers under lower-case names. Values are never shown: one of them may be a token."""
    if not isinstance(headers, Mapping):
        raise ConfigurationError(f"headers={type(headers).__name__} of a saga publisher must be a mapping")
    checked: dict[str, str] = {}
    for name, value in cast("Mapping[object, object]", headers).items():
        if not isinstance(name, str) or not _HEADER_NAME.fullmatch(name):
            raise ConfigurationError(f"header {name!r:.80} of a saga publisher is no name of a header")
        if name.lower() in _HEADERS_OF_ONE_MESSAGE:
            raise ConfigurationError(
                f"header {name!r} would be the same for all messages: say it in the options of one publish"
            )
        if not isinstance(value, str) or not value.isascii() or not value.replace("\t", " ").isprintable():
            raise ConfigurationError(f"header {name!r} of a saga publisher holds what no header can carry")
        checked[name.lower()] = value.strip()
    return checked


def _checked_codes(codes: Any) -> frozenset[int]:
    try:
        given: frozenset[Any] = frozenset(codes)
    except TypeError:
        given = frozenset((None,))
    if not all(isinstance(code, int) and 300 <= code <= 599 for code in given):
        raise ConfigurationError(
            f"retryable_status_codes={codes!r:.80} must be HTTP statuses from 300 to 599, such as [429, 503]"
        )
    return given


def _seconds_of(timeout: Any, name: str) -> float:
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool) and math.isfinite(seconds)
    if not is_number or not 0 < seconds <= _SECONDS_MAX:
        raise ConfigurationError(
            f"{name}={timeout!r:.80} of a saga publisher must be seconds or a timedelta, above 0 and up to a day"
        )
    return float(seconds)
