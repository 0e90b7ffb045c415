"""Who may come in: a bearer token, or, without one, nobody that a foreign web page sent.

With a token every route but `/health/live` asks for it. Without one the service trusts whoever reaches it, which is
meant for loopback. There a browser is the hole: any web page can make it send requests to 127.0.0.1, and by DNS
rebinding even under the page's own host name. Two checks close it, at no cost to other programs:

- a connection that came in on a loopback address must name a loopback `Host` (or one of `allowed_hosts`);
- a request that changes something and carries an `Origin` must come from the very host it is sent to.

CORS is off: no answer carries an `Access-Control-Allow-Origin`.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from functools import lru_cache
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

from starlette.types import Scope

from sagaloom.errors import ConfigurationError, MessageRejected
from sagaloom.web.limits import RateLimit

__all__ = ["Gate"]

_SAFE_METHODS: Final = frozenset(("GET", "HEAD", "OPTIONS"))


class Gate:
    """Lets a request pass, or says why not. A `rate_limit` is asked first: it also slows down who guesses tokens."""

    def __init__(
        self,
        token: str | None,
        *,
        allowed_hosts: Iterable[str] = (),
        open_paths: Iterable[str] = (),
        rate_limit: RateLimit | None = None,
    ) -> None:
        if token is not None and not token.strip():
            raise ConfigurationError("the API token is empty: give at least one character, or None for no token")
        self._token = token.encode() if token is not None else None
        self._allowed_hosts = frozenset(host.lower() for host in allowed_hosts)
        self._open_paths = frozenset(open_paths)
        self._rate_limit = rate_limit

    def refusal(self, scope: Scope, path: str) -> MessageRejected | None:
        """Why this request may not pass, or None."""
        if self._rate_limit is not None and (refused := self._rate_limit.refusal(scope, path)) is not None:
            return refused
        if self._token is not None:
            return None if path in self._open_paths else self._check_token(scope, self._token)
        host = origin = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
        server = scope.get("server")
        if server is not None and _is_loopback(server[0]) and not self._is_local(host):
            return MessageRejected(
                f"host {host.decode('latin-1')!r:.80} is not a name of this machine: a service without a token answers "
                "on loopback under localhost, 127.0.0.1 or [::1] only; set a token, or add the host to allowed_hosts",
                code="FORBIDDEN",
            )
        if origin and scope["method"] not in _SAFE_METHODS and not _is_same_origin(origin, host):
            return MessageRejected(
                f"origin {origin.decode('latin-1')!r:.80} may not change anything here: a web page of another site "
                "sent this request; call the API from a program, or set a token",
                code="FORBIDDEN",
            )
        return None

    def _check_token(self, scope: Scope, token: bytes) -> MessageRejected | None:
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                given = value
        scheme, _, offered = given.partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(offered.strip(), token):
            return None
        found = "the token is not the one this service was started with" if given else "the header is missing"
        return MessageRejected(f"send 'Authorization: Bearer <token>': {found}", code="UNAUTHORIZED")

    def _is_local(self, host: bytes) -> bool:
        # A program that speaks HTTP/1.0 may send no Host at all; a browser always does.
        return not host or _names_loopback(host) or _without_port(host) in self._allowed_hosts


def _without_port(host: bytes) -> str:
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0]


@lru_cache(maxsize=256)
def _names_loopback(host: bytes) -> bool:
    name = _without_port(host)
    return name == "localhost" or name.endswith(".localhost") or _is_loopback(name)


@lru_cache(maxsize=256)
def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False  # A host name, or the path of a unix socket.


def _is_same_origin(origin: bytes, host: bytes) -> bool:
    try:
        return urlsplit(origin.decode("latin-1")).netloc.lower() == host.decode("latin-1").lower()
    except ValueError:
        return False
