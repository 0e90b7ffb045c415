"""What our HTTP clients agree on: what an address is, which answers are worth another try, and when.

Pure functions and values. The clients themselves live with those who call: targets, publisher.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Final
from urllib.parse import urlsplit

from sagaloom.errors import ConfigurationError

__all__ = [
    "LOOPBACK_PATTERNS",
    "checked_address",
    "checked_base_url",
    "discovered_base_url",
    "is_retryable_status",
    "retry_after_seconds",
    "service_variables",
    "without_credentials",
]

LOOPBACK_PATTERNS: Final = ("all://127.0.0.1", "all://localhost", "all://[::1]")
"""Addresses that no proxy of the environment is asked for: it is for the outside, and cannot know what our loopback
is."""

_DEV_VARIABLE: Final = "SAGALOOM_DEV"
_TRUE: Final = frozenset(("1", "true", "t", "yes", "y", "on"))
_RETRYABLE_4XX: Final = frozenset((408, 409, 425, 429))
_FINAL_5XX: Final = frozenset((501, 505))
_RETRY_AFTER_SECONDS_MAX: Final = 86_400.0


def is_retryable_status(status: int) -> bool:
    """Whether the very same request may succeed later: 408, 409, 425, 429, and 5xx but 501 and 505.

    >>> [status for status in (404, 409, 500, 501, 503, 505) if is_retryable_status(status)]
    [409, 500, 503]
    """
    return status in _RETRYABLE_4XX or (500 <= status < 600 and status not in _FINAL_5XX)


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """What a `Retry-After` header asks for, in seconds, at most a day; None when it is missing or says nothing.

    >>> retry_after_seconds("7", datetime.max)
    7.0
    """
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        seconds = float(value[:12])
    else:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        if moment.tzinfo is None:
            return None
        seconds = (moment - now).total_seconds()
    return min(max(seconds, 0.0), _RETRY_AFTER_SECONDS_MAX)


def service_variables(name: str) -> tuple[str, str]:
    """The environment variables that may hold the address of the service `name`, in the order in which they count.

    >>> service_variables("payments")
    ('services__payments__https__0', 'services__payments__http__0')
    """
    return f"services__{name}__https__0", f"services__{name}__http__0"


def checked_address(address: str, *, where: str, example: str) -> str:
    """Returns `address`; raises `ConfigurationError` when it is no http(s) URL. `where` says whose address it is."""
    try:
        parts = urlsplit(address)
        is_address = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
            and address.isprintable()
            and " " not in address
        )
    except ValueError:
        is_address = False
    if not is_address:
        raise ConfigurationError(
            f"{where} is no http(s) URL: {without_credentials(address)!r:.200}; write for example {example}"
        )
    return address


def without_credentials(address: str) -> str:
    """`address` as it may be shown.

    >>> without_credentials("http://me:secret@sagas:8092")
    'http://sagas:8092'
    """
    return re.sub(r"//[^/?#]*@", "//", address)


def checked_base_url(address: object, source: str, *, what: str, example: str) -> str:
    """`address` without blanks around it; raises `ConfigurationError` unless paths can be put behind it. `what` is
    whose address it is, and `source` where it was read."""
    where = f"the address of {what} in {source}"
    if not isinstance(address, str):
        raise ConfigurationError(f"{where} is no text: {address!r:.80}; write for example {example}")
    checked_address(address.strip(), where=where, example=example)
    if "?" in address or "#" in address:
        raise ConfigurationError(
            f"{where} has a query or a fragment, which no path could follow: write for example {example}"
        )
    return address.strip()


def discovered_base_url(
    service_name: str,
    *,
    what: str,
    variables: Sequence[str],
    dev_url: str,
    read_env: Callable[[str], str | None],
) -> str:
    """Where one of our own APIs is, as the environment says: `services__<service_name>__https__0`, the same with
    `http`, the further `variables`; and `dev_url` on a developer's machine (`SAGALOOM_DEV=1`). Raises
    `ConfigurationError` naming what was read."""
    known = (*service_variables(service_name), *variables)
    for variable in known:
        value = (read_env(variable) or "").strip()
        if value:
            return checked_base_url(value, variable, what=what, example=dev_url)
    if (read_env(_DEV_VARIABLE) or "").strip().lower() in _TRUE:
        return dev_url
    raise ConfigurationError(
        f"no address for {what}: neither base_url= nor {', '.join(known)} is set, and {_DEV_VARIABLE} is not 1. Set "
        f"{variables[0]}={dev_url.replace('127.0.0.1', 'HOST')}, or {_DEV_VARIABLE}=1 to use {dev_url}"
    )
