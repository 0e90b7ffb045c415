"""HTTP services as a target: `send("service:payments", {...})` becomes one POST under the effect's key.

Rules:

1. The address is looked up for every effect, so that a service may move: the mapping given by the host first, else
   `services__<name>__https__0`, else `services__<name>__http__0`.
2. 2xx means that the service has taken the effect over. A JSON body `{"messages": [{"type", "payload", ...}]}` holds
   its answers, which go back to the sender's run; an empty body, or any other, holds none.
3. 408, 409, 425, 429, 5xx (but 501 and 505) and network errors are tried again, after `Retry-After` if it says so.
   409 is among them because a service that is still busy with the same idempotency key answers so.
   Every other status, redirects included, is a dead letter: the same request would be refused again.
4. The service can see a request twice (when its answer got lost), always under the same `Effect-Key`.

What we dislike about it: a service that answers 2xx before it has stored anything loses the effect, and nothing here
can tell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import msgspec

from sagaloom.clock import Clock
from sagaloom.engine.records import OutboxEffect
from sagaloom.errors import ConfigurationError, DeliveryFailed
from sagaloom.messages import SagaMessage
from sagaloom.outbound import checked_address, service_variables, without_credentials
from sagaloom.targets.posting import Poster

if TYPE_CHECKING:
    import httpx2

__all__ = ["ServiceTarget", "discover_service"]

_SAFE_KEY = re.compile(r"[!-$&-~](?:[ -$&-~]*[!-$&-~])?")


def discover_service(
    name: str, *, services: Mapping[str, str] | None = None, read_env: Callable[[str], str | None] = os.environ.get
) -> str | None:
    """The base address of the service `name`, or None: `services[name]`, else `services__<name>__https__0`, else
    `services__<name>__http__0`. Raises `ConfigurationError` for an address that is no http(s) URL."""
    sources = [
        ("services", (services or {}).get(name)),
        *((variable, read_env(variable)) for variable in service_variables(name)),
    ]
    for source, value in sources:
        if value is not None and value.strip():
            return _checked_address(value.strip(), name=name, source=source)
    return None


class ServiceTarget:
    """Delivers effects of kind `service` by HTTP POST, through one shared pool of connections.

    `services` maps service names to addresses. `headers` gives further headers by service name, such as its token.
    `timeout_seconds` bounds a whole call. An answer above `response_bytes_max` is a dead letter.
    """

    kind = "service"

    def __init__(
        self,
        services: Mapping[str, str] | None = None,
        *,
        read_env: Callable[[str], str | None] = os.environ.get,
        headers: Callable[[str], Mapping[str, str]] | None = None,
        timeout_seconds: float = 20.0,
        response_bytes_max: int = 1 << 20,
        connections_max: int = 100,
        clock: Clock | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._services = dict(services or {})
        self._read_env = read_env
        self._headers = headers
        self._poster = Poster(
            timeout_seconds=timeout_seconds,
            response_bytes_max=response_bytes_max,
            connections_max=connections_max,
            clock=clock,
            transport=transport,
        )

    async def deliver(self, effect: OutboxEffect) -> Sequence[SagaMessage[Any]]:
        name = effect.target_id
        address = self._address_of(name)
        receiver = f"service {name!r}"
        body = await self._poster.post(
            address,
            effect.payload,
            self._headers_of(effect),
            receiver=receiver,
            variable=service_variables(name)[1],
        )
        return _replies(body, f"{receiver} at {without_credentials(address)}")

    async def close(self) -> None:
        await self._poster.close()

    def open(self) -> None:
        """Loads the HTTP client now. Otherwise the first effect does, and everybody waits for it meanwhile."""
        self._poster.open()

    def _address_of(self, name: str) -> str:
        try:
            address = discover_service(name, services=self._services, read_env=self._read_env)
        except ConfigurationError as error:
            raise DeliveryFailed(error.message) from error
        if address is None:
            https, http = service_variables(name)
            raise DeliveryFailed(
                f"no address for service {name!r}: neither services={{{name!r}: ...}} nor {https} nor {http} is set. "
                f"Set {http}=http://HOST:PORT, or give the runtime services={{{name!r}: 'http://HOST:PORT'}}"
            )
        return address

    def _headers_of(self, effect: OutboxEffect) -> dict[str, str]:
        headers = dict(self._headers(effect.target_id)) if self._headers is not None else {}
        headers |= {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # a bound on the bytes is a bound on the answer
            "Effect-Key": effect.effect_key,
            "Idempotency-Key": effect.effect_key,
            "Saga-Id": effect.saga_id,
            "Saga-Run": str(effect.run),
            "Correlation-Key": _header_text(effect.key),
            "Effect-Attempt": str(effect.attempt + 1),
        }
        if effect.traceparent is not None:
            headers["traceparent"] = _header_text(effect.traceparent)
            if effect.tracestate is not None:
                headers["tracestate"] = _header_text(effect.tracestate, quoted=False)
        return headers


class _Reply(msgspec.Struct, rename="camel"):
    """A message as services write it. Fields we do not know are theirs."""

    type: str
    payload: Any = None
    correlation_key: str | None = None
    correlation_id: str | None = None
    idempotency_key: str | None = None
    concurrency_key: str | None = None
    occurred_at: datetime | None = None
    id: str | None = None
    message_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


def _replies(body: bytes, who: str) -> list[SagaMessage[Any]]:
    try:
        document: object = msgspec.json.decode(body) if body.strip() else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return []
    listed = cast("dict[str, object]", document).get("messages") if isinstance(document, dict) else None
    # {"messages": ["charged"]} is somebody else's vocabulary; objects in the list are meant for us.
    if not isinstance(listed, list) or not any(isinstance(item, dict) for item in cast("list[object]", listed)):
        return []
    try:
        replies = msgspec.convert(listed, list[_Reply])
    except msgspec.ValidationError as error:
        raise DeliveryFailed(
            f"{who} answered with messages that cannot be read: {error}; each needs a 'type' and may have a 'payload'",
            retryable=False,
        ) from error
    return [
        SagaMessage(
            reply.type,
            {} if reply.payload is None else reply.payload,
            correlation_key=reply.correlation_key or reply.correlation_id,
            idempotency_key=reply.idempotency_key,
            concurrency_key=reply.concurrency_key,
            occurred_at=reply.occurred_at,
            id=reply.id or reply.message_id,
            traceparent=reply.traceparent,
            tracestate=reply.tracestate,
        )
        for reply in replies
    ]


def _checked_address(address: str, *, name: str, source: str) -> str:
    return checked_address(
        address, where=f"the address of service {name!r} in {source}", example="http://127.0.0.1:8093"
    )


def _header_text(text: str, *, quoted: bool = True) -> str:
    """`text` as a header value: as it is when it is plain visible ASCII, else percent-encoded UTF-8. A percent sign is
    encoded too, so that decoding always gives `text` back."""
    if _SAFE_KEY.fullmatch(text) or (not quoted and text.isascii() and text.isprintable()):
        return text
    return quote(text, safe=" !#$&'()*+,/:;=?@[]~" if text == text.strip() else "")
