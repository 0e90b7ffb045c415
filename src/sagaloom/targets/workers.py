"""Jobs as a target: `send("job:create-user-settings", {...})` triggers a run through the workers API.

Rules:

1. The address is looked up for every effect: `base_url`, else `services__workers-api__https__0`, then the same with
   `http`, `WORKERS_API_URL`, `NETSCRIPT_WORKERS_URL`; and when `SAGALOOM_DEV=1` says that this is a developer's
   machine, `http://127.0.0.1:8091`.
2. The effect's own idempotency key, else its effect key, is that of the trigger: however often the effect is sent, one
   run comes of it. The correlation key and the trace of the saga go along.
3. 2xx means that the run is durable. Its end comes back to the very run of the saga that has sent the effect, as a
   message `<job id>:completed`, `<job id>:failed` or `<job id>:cancelled`, if the saga has a handler for it; the
   workers bring it, also when both sides have died in between.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote

import msgspec

from sagaloom.clock import Clock
from sagaloom.engine.records import OutboxEffect
from sagaloom.errors import ConfigurationError, DeliveryFailed
from sagaloom.messages import SagaMessage
from sagaloom.outbound import checked_base_url, discovered_base_url
from sagaloom.targets.posting import Poster

if TYPE_CHECKING:
    import httpx2

__all__ = ["JobTarget", "WorkersApi"]

_SERVICE_NAME: Final = "workers-api"
_DEV_URL: Final = "http://127.0.0.1:8091"
_URL_VARIABLES: Final = ("WORKERS_API_URL", "NETSCRIPT_WORKERS_URL")
_WHAT: Final = "the workers API"
_PREFIX: Final = "/api/v1/workers"


class WorkersApi:
    """The workers API, as a client: finds it, and triggers. `token` is the bearer token that it asks for."""

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        read_env: Callable[[str], str | None] = os.environ.get,
        timeout_seconds: float = 20.0,
        clock: Clock | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        if base_url is not None:
            base_url = checked_base_url(base_url, "base_url", what=_WHAT, example=_DEV_URL)
        if token is not None and not (token.strip() and token.isascii() and token.isprintable()):
            raise ConfigurationError("the token of the workers API is empty, or holds what no header can carry")
        self._base_url = base_url
        self._token = token
        self._read_env = read_env
        self._poster = Poster(timeout_seconds=timeout_seconds, clock=clock, transport=transport)

    async def trigger(self, kind: Literal["jobs", "tasks"], target_id: str, body: Mapping[str, object]) -> bytes:
        """Triggers a job or task, and returns the answer. Raises `DeliveryFailed`."""
        try:
            address = self._address()
        except ConfigurationError as error:
            raise DeliveryFailed(error.message) from error
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        return await self._poster.post(
            f"{address.rstrip('/')}{_PREFIX}/{kind}/{quote(target_id, safe='')}/trigger",
            msgspec.json.encode(body),
            headers,
            receiver=_WHAT,
            variable=_URL_VARIABLES[0],
        )

    def open(self) -> None:
        """Loads the HTTP client now. Otherwise the first trigger does, and everybody waits for it meanwhile."""
        self._poster.open()

    async def close(self) -> None:
        """Closes the connections. A later trigger opens new ones."""
        await self._poster.close()

    def _address(self) -> str:
        if self._base_url is not None:
            return self._base_url
        return discovered_base_url(
            _SERVICE_NAME, what=_WHAT, variables=_URL_VARIABLES, dev_url=_DEV_URL, read_env=self._read_env
        )


class JobTarget:
    """Delivers effects of kind `job`: each triggers one run. The options are those of `WorkersApi`."""

    kind = "job"

    def __init__(
        self,
        base_url: str | None = None,
        *,
        token: str | None = None,
        read_env: Callable[[str], str | None] = os.environ.get,
        timeout_seconds: float = 20.0,
        clock: Clock | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._api = WorkersApi(
            base_url,
            token=token,
            read_env=read_env,
            timeout_seconds=timeout_seconds,
            clock=clock,
            transport=transport,
        )

    async def deliver(self, effect: OutboxEffect) -> Sequence[SagaMessage[Any]]:
        body: dict[str, object] = {
            "payload": msgspec.Raw(effect.payload),
            "idempotencyKey": effect.idempotency_key or effect.effect_key,
            "correlationId": effect.key,
            "replyTo": {
                "sagaId": effect.saga_id,
                "correlationKey": effect.key,
                "run": effect.run,
                "effectKey": effect.effect_key,
                "hops": effect.hops,
            },
        }
        if effect.traceparent is not None:
            body["traceparent"] = effect.traceparent
            if effect.tracestate is not None:
                body["tracestate"] = effect.tracestate
        await self._api.trigger("jobs", effect.target_id, body)
        return ()

    def open(self) -> None:
        """Loads the HTTP client now. Otherwise the first effect does, and everybody waits for it meanwhile."""
        self._api.open()

    async def close(self) -> None:
        await self._api.close()
