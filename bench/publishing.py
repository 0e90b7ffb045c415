"""A client process for line 4: many keep-alive connections, each with one request under way, and little else to do.

    python -m bench.publishing PORT CONNECTIONS

It answers each line it is sent with one of JSON. `prepare NAME N` makes the requests of N orders ready, whose ids begin
with NAME; `go` sends them, each connection order by order, and says when it began and ended.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator

from bench.workload import order_payloads

_ACCEPTED = b"HTTP/1.1 202 "


class _Connection:
    """One socket, and the requests that it has not sent yet."""

    __slots__ = ("received", "requests", "socket")

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.requests: Iterator[bytes] = iter(())
        self.received = b""

    def send_next(self) -> bool:
        """Sends the next request; False when there is none."""
        request = next(self.requests, None)
        if request is None:
            return False
        self.socket.sendall(request)
        return True

    def receive(self) -> bool:
        """Reads what is there; True when the answer is complete. Raises for any other answer than 202."""
        self.received += self.socket.recv(65536)
        head, ends, body = self.received.partition(b"\r\n\r\n")
        if not ends:
            if not self.received:
                raise RuntimeError("the server has closed a connection")
            return False
        if not head.startswith(_ACCEPTED):
            raise RuntimeError(f"unexpected answer: {self.received[:500]!r}")
        _, _, rest = head.lower().partition(b"content-length:")
        if len(body) < int(rest.split(b"\r", 1)[0]):
            return False
        self.received = b""
        return True


def _request(port: int, message_type: str, payload: object) -> bytes:
    body = json.dumps({"type": message_type, "payload": payload}).encode()
    head = (
        f"POST /api/v1/sagas/publish HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _prepare(connections: list[_Connection], port: int, name: str, orders: int) -> None:
    share = orders // len(connections)
    for number, connection in enumerate(connections):
        connection.requests = iter(
            [
                _request(port, message_type, payload)
                for each in range(share)
                for message_type, payload in order_payloads(f"{name}-{number:04d}-{each:05d}")
            ]
        )


def _go(connections: list[_Connection]) -> dict[str, float]:
    selector = selectors.DefaultSelector()
    for connection in connections:
        selector.register(connection.socket, selectors.EVENT_READ, connection)
    answers = 0
    cpu, began = time.process_time(), time.monotonic()
    busy = sum(connection.send_next() for connection in connections)
    while busy:
        for key, _ in selector.select():
            answered: _Connection = key.data
            if answered.receive():
                answers += 1
                if not answered.send_next():
                    busy -= 1
    ended = time.monotonic()
    selector.close()
    return {"began": began, "ended": ended, "answers": answers, "cpu": time.process_time() - cpu}


def _main(port: int, count: int) -> None:
    connections = [_Connection(port) for _ in range(count)]
    for line in sys.stdin:
        match line.split():
            case ["prepare", name, orders]:
                _prepare(connections, port, name, int(orders))
                print("{}", flush=True)
            case _:
                print(json.dumps(_go(connections)), flush=True)


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]))
