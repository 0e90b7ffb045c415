"""The outside world of the crash run: a service that remembers every effect it was ever sent.

It is not killed, so that somebody knows what really arrived. Its manners depend on the effect key alone, so that a run
can be repeated: some first attempts are refused with 503, some are taken and answered by nothing but a cut connection,
some answers come late. Run as `python -m tests.crash.receiver FILE`; the first line it prints is its port. It ends
when its standard input does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec

from tests.crash.wire import Request, serve

__all__ = ["Arrival", "Arrivals", "answers_to"]

_REFUSE, _CUT, _LATE = range(3)
_MANNERS: Final = 12


class Arrival(msgspec.Struct):
    """One effect key and what came under it: how often it was sent, and how often it was taken."""

    key: str
    order_id: str
    step: str
    amount: int = 0
    sent: int = 0
    taken: int = 0
    first_taken: int = 0
    """The place of its first taking among all takings, from 1."""


@dataclass
class Manners:
    """How the receiver treats one attempt."""

    status: int = 200
    cuts: bool = False
    delay_seconds: float = 0.0


class Arrivals:
    """Everything that came, by effect key."""

    def __init__(self, log: BinaryIO | None = None) -> None:
        self.by_key: dict[str, Arrival] = {}
        self._takings = 0
        self._log = log

    def note(self, key: str, payload: Mapping[str, Any], *, takes: bool) -> Arrival:
        """Writes one attempt down."""
        arrival = self.by_key.setdefault(
            key, Arrival(key, str(payload["orderId"]), str(payload["step"]), int(payload.get("amount", 0)))
        )
        arrival.sent += 1
        if takes:
            self._takings += 1
            arrival.taken += 1
            arrival.first_taken = arrival.first_taken or self._takings
        if self._log is not None:
            self._log.write(b"%s %d %b %b\n" % (key.encode(), takes, arrival.order_id.encode(), arrival.step.encode()))
            self._log.flush()
        return arrival

    def manners(self, key: str) -> Manners:
        """How the attempt that comes next under `key` is treated."""
        kind = int(key[:8], 16) % _MANNERS
        is_first = key not in self.by_key
        if kind == _REFUSE and is_first:
            return Manners(status=503)
        if kind == _CUT and is_first:
            return Manners(cuts=True)
        return Manners(delay_seconds=0.03 if kind == _LATE else 0.0)


def answers_to(payload: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages that the outside answers with."""
    match payload["step"]:
        case "charge":
            return [{"type": "ChargeConfirmed", "payload": {"orderId": payload["orderId"]}}]
        case "label":
            return [{"type": "LabelPrinted", "payload": {"orderId": payload["orderId"]}}]
        case _:
            return []


async def _main(log_file: Path) -> None:
    with log_file.open("ab") as log:
        arrivals = Arrivals(log)

        async def handle(request: Request) -> tuple[int, bytes] | None:
            if request.method == "GET":
                return 200, msgspec.json.encode(list(arrivals.by_key.values()))
            key = request.headers["effect-key"]
            payload = msgspec.json.decode(request.body)
            manners = arrivals.manners(key)
            arrivals.note(key, payload, takes=manners.status == 200)
            if manners.delay_seconds:
                await asyncio.sleep(manners.delay_seconds)
            if manners.cuts:
                return None
            return manners.status, msgspec.json.encode({"messages": answers_to(payload)})

        server, port = await serve(handle)
        print(port, flush=True)
        # The driver holds the other end: whatever ends it, ends this process.
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)
        server.close()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
