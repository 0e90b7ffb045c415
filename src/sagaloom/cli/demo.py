"""The demo, served: the order and settings sagas on the API's port, and a payments service on one of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from sagaloom.errors import ConfigurationError
from sagaloom.settings import DoorSettings, refuse_open_door

__all__ = ["serve_demo"]

_PAYMENTS_PORT: Final = 8093

_STORY: Final = """\
sagaloom serves the demo sagas on {url}, and their payments service on {payments}. Try:

  curl -X POST '{url}/api/v1/sagas/publish?wait=5s' -H 'content-type: application/json'{auth} \\
    -d '{{"type": "OrderPlaced", "payload": {{"orderId": "o-1"}}}}'

  curl -X POST '{url}/api/v1/sagas/publish?wait=5s' -H 'content-type: application/json'{auth} \\
    -d '{{"type": "PaymentCaptured", "payload": {{"orderId": "o-1", "paymentId": "pay-o-1"}}}}'
    (or, for the compensation: "FulfillmentFailed" with {{"orderId": "o-1", "reason": "out of stock"}})

  curl {url}/api/v1/sagas/instances/order-saga/o-1{auth}

What payments saw: curl {payments}/ledger      Stop with Ctrl-C; run it again, and everything is still there."""


def serve_demo(settings: DoorSettings, *, kv_path: Path, is_insecure: bool = False, as_json: bool = False) -> None:
    """Serves the demo until it is told to stop. The payments service is on `PAYMENTS_PORT` (8093), or on a free port
    when that one is taken; `FAIL_FIRST=n` makes it refuse the first n attempts of each charge."""
    from sagaloom.cli.logs import configure_logs
    from sagaloom.cli.server import PORT_HINT, Companion, Plan, address_of, announcer, listen, run
    from sagaloom.demo import sagas
    from sagaloom.demo.payments import Ledger, create_payments_app

    refuse_open_door(settings, is_insecure=is_insecure)
    fail_first = _number("FAIL_FIRST", 0)
    listener = listen(settings.host, settings.port, hint=PORT_HINT)
    try:
        payments = listen("127.0.0.1", _number("PAYMENTS_PORT", _PAYMENTS_PORT), hint="")
    except ConfigurationError:
        payments = listen("127.0.0.1", 0, hint="no port is free")
    configure_logs(settings.log_level)
    ledger = Ledger(kv_path.parent / "payments.jsonl")
    address = address_of(payments)
    auth = ' -H "authorization: Bearer $SAGALOOM_TOKEN"' if settings.token is not None else ""
    story = _STORY.format(url="{url}", payments=address, auth=auth)
    try:
        run(
            Plan(
                settings=settings,
                listener=listener,
                definitions=sagas,
                services={"payments": address},
                kv_path=kv_path,
                announce=announcer(story, as_json=as_json, payments=address),
                companions=[Companion(app=create_payments_app(ledger, fail_first=fail_first), listener=payments)],
            )
        )
    finally:
        ledger.close()


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        raise ConfigurationError(f"{variable} must be a small number, got {text!r:.40}")
    return int(text)
