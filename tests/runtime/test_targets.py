"""Targets, against a real HTTP server on loopback."""

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncGenerator, Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import unquote

import msgspec
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from sagaloom import DeliveryFailed, SagaMessage, SagasError
from sagaloom.engine.records import OutboxEffect
from sagaloom.errors import DefinitionError
from sagaloom.ports.targets import EffectTarget
from sagaloom.targets import CallableTarget, EffectRequest, ServiceTarget, callable_target
from sagaloom.testing.clock import ManualClock
from tests.patience import PATIENCE_SECONDS
from tests.servers.server import free_port

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def an_effect(payload: object = None, **changes: Any) -> OutboxEffect:
    effect = OutboxEffect(
        effect_key="e" * 40,
        lane="order-saga:o-1/1/service:payments",
        target_kind="service",
        target_id="payments",
        payload=msgspec.json.encode({"orderId": "o-1"} if payload is None else payload),
        saga_id="order-saga",
        key="o-1",
        run=1,
        revision=1,
        position=0,
        message_id="m-1",
        created_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    return msgspec.structs.replace(effect, **changes)


class Payments:
    """A service that answers what the test says and remembers what it was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.clients: set[Any] = set()
        self.answer: Callable[[], Response] = lambda: Response(status_code=204)
        self.url = ""

    async def take(self, request: Request) -> Response:
        self.requests.append((dict(request.headers), await request.body()))
        self.clients.add(request.client)
        return self.answer()

    def answers(self, status: int, body: object = None, **headers: str) -> None:
        content = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.answer = lambda: Response(content, status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    def streams(self, chunk: bytes, times: int) -> None:
        async def chunks() -> AsyncGenerator[bytes]:
            for _ in range(times):
                yield chunk

        self.answer = lambda: StreamingResponse(chunks())


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.answering = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.answering.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


@pytest.fixture(scope="module")
async def service() -> AsyncGenerator[Payments]:
    """One server for all tests here: starting and stopping one takes longer than most of them."""
    service = Payments()
    app = Starlette(routes=[Route("/{rest:path}", service.take, methods=["POST", "GET"])])
    listener = socket.create_server(("127.0.0.1", 0))
    service.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = _Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await server.answering.wait()
    yield service
    server.should_exit = True
    await serving


@pytest.fixture
async def payments(service: Payments) -> Payments:
    service.requests.clear()
    service.clients.clear()
    service.answers(204)
    return service


@contextlib.asynccontextmanager
async def target_for(payments: Payments, **options: Any) -> AsyncGenerator[ServiceTarget]:
    target = ServiceTarget({"payments": payments.url}, read_env=lambda _: None, **options)
    try:
        yield target
    finally:
        await target.close()


# --- What a service gets ---------------------------------------------------------------------------------------------


async def test_a_service_gets_the_payload_under_the_effects_key(payments: Payments) -> None:
    async with target_for(payments) as target:
        answers = await target.deliver(an_effect(traceparent=TRACEPARENT, tracestate="vendor=1", attempt=2))

    assert isinstance(target, EffectTarget)
    assert answers == []
    [(headers, body)] = payments.requests
    assert json.loads(body) == {"orderId": "o-1"}
    assert headers["effect-key"] == headers["idempotency-key"] == "e" * 40
    assert (headers["saga-id"], headers["saga-run"], headers["correlation-key"]) == ("order-saga", "1", "o-1")
    assert headers["effect-attempt"] == "3"
    assert (headers["traceparent"], headers["tracestate"]) == (TRACEPARENT, "vendor=1")


@pytest.mark.parametrize("key", ["plain key/1?a=b", "50%", "Grüße", "注文", " padded ", 'say "hi"'])
async def test_any_correlation_key_comes_back_when_its_header_is_decoded(payments: Payments, key: str) -> None:
    async with target_for(payments) as target:
        await target.deliver(an_effect(key=key))

    assert unquote(payments.requests[0][0]["correlation-key"]) == key


async def test_deliveries_share_connections(payments: Payments) -> None:
    async with target_for(payments) as target:
        for _ in range(5):
            await target.deliver(an_effect())

    assert len(payments.clients) == 1


async def test_headers_of_the_host_go_to_the_service_they_are_for(payments: Payments) -> None:
    async with target_for(payments, headers=lambda name: {"Authorization": f"Bearer for-{name}"}) as target:
        await target.deliver(an_effect())

    assert payments.requests[0][0]["authorization"] == "Bearer for-payments"


# --- What a service answers ------------------------------------------------------------------------------------------


async def test_messages_in_the_answer_come_back(payments: Payments) -> None:
    payments.answers(
        200,
        {
            "messages": [
                {"type": "PaymentCaptured", "payload": {"paymentId": "p-1"}, "messageId": "m-7", "extra": 1},
                {"type": "Noted", "occurredAt": "2026-01-01T00:00:00Z", "correlationId": "o-9"},
            ]
        },
    )

    async with target_for(payments) as target:
        answers = await target.deliver(an_effect())

    assert answers == [
        SagaMessage("PaymentCaptured", {"paymentId": "p-1"}, id="m-7"),
        SagaMessage("Noted", {}, correlation_key="o-9", occurred_at=datetime(2026, 1, 1, tzinfo=UTC)),
    ]


@pytest.mark.parametrize("body", [None, b"OK", b"\xff\xfe", {"status": "charged"}, [1], {"messages": ["charged"]}])
async def test_a_body_that_holds_no_messages_is_just_a_confirmation(payments: Payments, body: object) -> None:
    payments.answers(201, body)

    async with target_for(payments) as target:
        assert await target.deliver(an_effect()) == []


@pytest.mark.parametrize("messages", [[{"payload": {}}], [{"type": 7}], [{"type": "A"}, "B"]])
async def test_messages_that_cannot_be_read_are_a_dead_letter(payments: Payments, messages: object) -> None:
    payments.answers(200, {"messages": messages})

    async with target_for(payments) as target:
        with pytest.raises(DeliveryFailed, match="cannot be read") as caught:
            await target.deliver(an_effect())

    assert not caught.value.retryable


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 507, 599])
async def test_a_passing_refusal_is_tried_again(payments: Payments, status: int) -> None:
    payments.answers(status, b"not now")

    async with target_for(payments) as target:
        with pytest.raises(DeliveryFailed, match=f"{status}: not now") as caught:
            await target.deliver(an_effect())

    assert caught.value.retryable
    assert caught.value.data == {"status": status}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 422, 501, 505])
async def test_a_final_refusal_is_a_dead_letter(payments: Payments, status: int) -> None:
    payments.answers(status, b"never", Retry_After="1")

    async with target_for(payments) as target:
        with pytest.raises(DeliveryFailed, match=f"{status}: never") as caught:
            await target.deliver(an_effect())

    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("7", 7.0), ("Thu, 01 Jan 2026 00:01:00 GMT", 60.0), ("Wed, 31 Dec 2025 00:00:00 GMT", 0.0), ("soon", None)],
)
async def test_retry_after_is_passed_on(payments: Payments, value: str, seconds: float | None) -> None:
    payments.answers(503, Retry_After=value)

    async with target_for(payments, clock=ManualClock(datetime(2026, 1, 1, tzinfo=UTC))) as target:
        with pytest.raises(DeliveryFailed) as caught:
            await target.deliver(an_effect())

    assert caught.value.data.get("retryAfterSeconds") == seconds


@pytest.mark.parametrize("status", [301, 302, 307, 308])
async def test_a_redirect_is_not_followed(payments: Payments, status: int) -> None:
    payments.answers(status, Location=f"{payments.url}/elsewhere")

    async with target_for(payments) as target:
        with pytest.raises(DeliveryFailed, match="redirects are not followed") as caught:
            await target.deliver(an_effect())

    assert not caught.value.retryable
    assert len(payments.requests) == 1


async def test_an_answer_beyond_its_bound_is_not_read_to_its_end(payments: Payments) -> None:
    payments.streams(b"x" * 65536, times=1000)

    async with target_for(payments, response_bytes_max=100_000) as target:
        with pytest.raises(DeliveryFailed, match="more than 100000 bytes") as caught:
            await target.deliver(an_effect())

    assert not caught.value.retryable


async def test_a_service_that_does_not_answer_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = ServiceTarget(
            {"payments": f"http://127.0.0.1:{silent.getsockname()[1]}"}, read_env=lambda _: None, timeout_seconds=0.2
        )

        with pytest.raises(DeliveryFailed, match="did not answer") as caught:
            await asyncio.wait_for(target.deliver(an_effect()), PATIENCE_SECONDS)

        await target.close()

    assert caught.value.retryable


async def test_a_service_that_is_not_there_is_tried_again() -> None:
    target = ServiceTarget({"payments": f"http://user:secret@127.0.0.1:{free_port()}"}, read_env=lambda _: None)

    with pytest.raises(DeliveryFailed, match="could not be reached") as caught:
        await target.deliver(an_effect())

    await target.close()
    assert caught.value.retryable
    assert "secret" not in caught.value.message


# --- Where a service is ----------------------------------------------------------------------------------------------


async def test_a_service_is_looked_up_for_every_effect_and_https_comes_before_http(payments: Payments) -> None:
    env = {"services__payments__http__0": "http://127.0.0.1:1", "services__payments__https__0": payments.url}
    target = ServiceTarget(read_env=env.get)

    await target.deliver(an_effect())
    del env["services__payments__https__0"]
    env["services__payments__http__0"] = f"{payments.url}/moved"
    await target.deliver(an_effect())

    await target.close()
    assert len(payments.requests) == 2


async def test_the_hosts_own_address_comes_before_the_environments(payments: Payments) -> None:
    target = ServiceTarget({"payments": payments.url}, read_env=lambda _: "http://127.0.0.1:1")

    await target.deliver(an_effect())

    await target.close()
    assert len(payments.requests) == 1


async def test_a_service_without_an_address_says_what_was_read_and_what_to_set() -> None:
    target = ServiceTarget(read_env=lambda _: None)

    with pytest.raises(DeliveryFailed) as caught:
        await target.deliver(an_effect())

    assert caught.value.retryable
    for expected in ("services__payments__https__0", "services__payments__http__0", "Set "):
        assert expected in caught.value.message


async def test_an_address_that_is_no_url_is_named() -> None:
    target = ServiceTarget({"payments": "payments:80"}, read_env=lambda _: None)

    with pytest.raises(DeliveryFailed, match="'payments:80'"):
        await target.deliver(an_effect())


# --- Functions -------------------------------------------------------------------------------------------------------


async def test_a_function_gets_the_effect_as_plain_values() -> None:
    seen: list[EffectRequest] = []

    async def send_mail(request: EffectRequest) -> None:
        seen.append(request)

    target = callable_target("email", send_mail)
    answers = await target.deliver(an_effect(target_kind="email", target_id="welcome", traceparent=TRACEPARENT))

    assert isinstance(target, EffectTarget)
    assert (target.kind, answers) == ("email", [])
    assert seen == [
        EffectRequest(
            kind="email",
            target_id="welcome",
            payload={"orderId": "o-1"},
            effect_key="e" * 40,
            saga_id="order-saga",
            correlation_key="o-1",
            run=1,
            attempt=1,
            traceparent=TRACEPARENT,
        )
    ]


async def test_a_blocking_function_does_not_run_on_the_loops_thread() -> None:
    threads: list[threading.Thread] = []

    await callable_target("email", lambda _: threads.append(threading.current_thread())).deliver(an_effect())

    assert threads != [threading.current_thread()]


@pytest.mark.parametrize(
    ("returned", "answers"),
    [
        (None, []),
        ({"type": "Sent"}, [SagaMessage("Sent", {})]),
        ([SagaMessage("A", 1), {"type": "B", "payload": 2}], [SagaMessage("A", 1), SagaMessage("B", 2)]),
        ([], []),
    ],
)
async def test_what_a_function_returns_comes_back_as_messages(returned: object, answers: list[object]) -> None:
    class Callable:
        async def __call__(self, request: EffectRequest) -> object:
            return returned

    assert await callable_target("email", Callable()).deliver(an_effect()) == answers
    assert await callable_target("email", lambda _: returned).deliver(an_effect()) == answers


@pytest.mark.parametrize("returned", ["sent", 7, [None], {"payload": {}}])
async def test_a_function_that_returns_no_message_is_not_called_again(returned: object) -> None:
    with pytest.raises(DeliveryFailed, match="must return None, a message or a list of messages") as caught:
        await callable_target("email", lambda _: returned).deliver(an_effect())

    assert not caught.value.retryable


async def test_what_a_function_raises_is_raised_unchanged() -> None:
    refusal = SagasError("no such mailbox", retryable=False)

    async def send_mail(request: EffectRequest) -> None:
        raise refusal

    with pytest.raises(SagasError) as caught:
        await callable_target("email", send_mail).deliver(an_effect())

    assert caught.value is refusal


def test_a_target_needs_a_kind_and_a_function() -> None:
    with pytest.raises(DefinitionError, match="kind must not be empty"):
        CallableTarget(" ", lambda _: None)
    with pytest.raises(DefinitionError, match="expected a function"):
        CallableTarget("email", "send_mail")  # type: ignore[arg-type]
