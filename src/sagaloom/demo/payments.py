"""A small payments service, to have somebody for the order saga to talk to.

    POST /         {"orderId": ...} is a charge, {"refund": paymentId} a refund; `Effect-Key` names the request
    GET  /ledger   everything it saw: one entry an effect key, with the number of attempts

It shows what the receiver of an effect has to do: remember the effect key with the work, in one step, and answer a
repeat with what it answered before. Its ledger is a file of JSON lines, one an attempt, flushed before the answer.
`fail_first=n` answers the first n attempts of each charge with 503, to watch the retries.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

__all__ = ["Attempt", "Ledger", "create_payments_app"]


class Attempt(msgspec.Struct, frozen=True, rename="camel"):
    """One line of the ledger's file."""

    effect_key: str
    kind: Literal["charge", "refund"]
    outcome: Literal["applied", "repeated", "unavailable"]
    order_id: str | None
    payment_id: str | None
    saga_id: str | None
    correlation_key: str | None
    at: datetime


class LedgerEntry(msgspec.Struct, rename="camel"):
    """All attempts under one effect key."""

    effect_key: str
    kind: Literal["charge", "refund"]
    order_id: str | None
    payment_id: str | None
    saga_id: str | None
    correlation_key: str | None
    attempts: int = 0
    applied: int = 0
    """1 at most, however often the request came."""


class Ledger:
    """What was charged and refunded. With a path it survives a kill."""

    def __init__(self, path: Path | None = None) -> None:
        self.entries: dict[str, LedgerEntry] = {}
        self._path = path
        self._file: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._load(path)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def record(self, attempt: Attempt) -> None:
        """Takes `attempt` down, on stable storage when there is a file."""
        if self._file is not None:
            os.write(self._file, msgspec.json.encode(attempt) + b"\n")
            os.fsync(self._file)
        self._apply(attempt)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _apply(self, attempt: Attempt) -> None:
        entry = self.entries.get(attempt.effect_key)
        if entry is None:
            entry = self.entries[attempt.effect_key] = LedgerEntry(
                effect_key=attempt.effect_key,
                kind=attempt.kind,
                order_id=attempt.order_id,
                payment_id=attempt.payment_id,
                saga_id=attempt.saga_id,
                correlation_key=attempt.correlation_key,
            )
        entry.attempts += 1
        entry.applied += attempt.outcome == "applied"

    def _load(self, path: Path) -> None:
        content = path.read_bytes() if path.exists() else b""
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            # The last write was cut by a crash, so nobody has got an answer for it.
            os.truncate(path, len(content) - len(torn))
        for line in whole.splitlines():
            self._apply(msgspec.json.decode(line, type=Attempt))


def create_payments_app(ledger: Ledger | None = None, *, fail_first: int = 0) -> Starlette:
    """The service as an ASGI app."""
    book = ledger if ledger is not None else Ledger()

    async def pay(request: Request) -> Response:
        effect_key = request.headers.get("effect-key") or request.headers.get("idempotency-key")
        if not effect_key:
            return _json(400, {"error": "send an Effect-Key header: without it a repeat would be paid twice"})
        try:
            command = msgspec.json.decode(await request.body(), type=dict[str, Any])
        except msgspec.DecodeError as error:
            return _json(422, {"error": f"the body must be a JSON object: {error}"})
        order_id: str | None
        payment_id: str | None
        if "orderId" in command:
            kind: Literal["charge", "refund"] = "charge"
            order_id = _text(command["orderId"])
            payment_id = f"pay-{order_id}"
        elif "refund" in command:
            kind = "refund"
            order_id = None
            payment_id = _text(command["refund"])
        else:
            return _json(422, {"error": 'expected {"orderId": ...} for a charge or {"refund": paymentId}'})
        seen = book.entries.get(effect_key)
        is_repeat = seen is not None and seen.applied > 0
        must_fail = kind == "charge" and not is_repeat and (seen.attempts if seen else 0) < fail_first
        book.record(
            Attempt(
                effect_key=effect_key,
                kind=kind,
                outcome="repeated" if is_repeat else "unavailable" if must_fail else "applied",
                order_id=order_id,
                payment_id=payment_id,
                saga_id=request.headers.get("saga-id"),
                correlation_key=request.headers.get("correlation-key"),
                at=datetime.now(UTC),
            )
        )
        if must_fail:
            return _json(503, {"error": "the card network does not answer; try again"})
        return _json(200, {"paymentId": payment_id, "status": "charged" if kind == "charge" else "refunded"})

    async def list_ledger(request: Request) -> Response:
        return _json(200, {"entries": list(book.entries.values()), "total": len(book.entries)})

    async def live(request: Request) -> Response:
        return _json(200, {"status": "ok"})

    return Starlette(
        routes=[
            Route("/", pay, methods=["POST"]),
            Route("/ledger", list_ledger, methods=["GET"]),
            Route("/health/live", live, methods=["GET"]),
        ]
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _json(status: int, body: object) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, media_type="application/json")
