"""The OpenAPI document without a server: that of an application over an empty runtime, which is never started."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2

from sagaloom.kv import MemoryKeyValue
from sagaloom.runtime import SagaRuntime
from sagaloom.service import create_app
from sagaloom.stores import KvSagaStore

__all__ = ["api_document"]


def api_document(*, needs_token: bool) -> Any:
    """The document that a server with or without a token gives out at `/api/openapi.json`."""
    return asyncio.run(_ask(token="any" if needs_token else None))


async def _ask(token: str | None) -> Any:
    app = create_app(SagaRuntime(KvSagaStore(MemoryKeyValue())), token=token)
    transport = httpx2.ASGITransport(app)
    headers = {"authorization": f"Bearer {token}"} if token is not None else {}
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        return (await client.get("/api/openapi.json")).json()
