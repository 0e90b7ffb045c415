"""The demo, served by two processes over one store: the sagas and their payments service, and the jobs.

`serve_demo` is the supervisor of both. The process with the sagas is this module, run by itself.
"""

from __future__ import annotations

import sys
from typing import Final

from sagaloom.cli.both_ports import Addresses, number_in, serve_both
from sagaloom.cli.supervisor import Said
from sagaloom.errors import ConfigurationError, SagasError
from sagaloom.settings import DoorSettings, StorePlace, load_settings, refuse_open_door

__all__ = ["serve_demo"]

_PAYMENTS_PORT: Final = 8093

_STORY: Final = """\
sagaloom serves the demo sagas on {url}, their payments service on {payments},
and the demo jobs on {jobs}. Try:

  curl -X POST '{url}/api/v1/sagas/publish?wait=5s' -H 'content-type: application/json'{auth} \\
    -d '{{"type": "OrderPlaced", "payload": {{"orderId": "o-1"}}}}'

  curl -X POST '{url}/api/v1/sagas/publish?wait=5s' -H 'content-type: application/json'{auth} \\
    -d '{{"type": "PaymentCaptured", "payload": {{"orderId": "o-1", "paymentId": "pay-o-1"}}}}'
    (or, for the compensation: "FulfillmentFailed" with {{"orderId": "o-1", "reason": "out of stock"}})

  curl {url}/api/v1/sagas/instances/order-saga/o-1{auth}

A job that publishes a message, and the saga that takes it up:

  curl -X POST {jobs}/api/v1/workers/jobs/create-user-settings/trigger{auth} \\
    -H 'content-type: application/json' -d '{{"payload": {{"userId": "u-1"}}}}'

  curl '{url}/api/v1/sagas/instances?sagaName=user-settings-saga'{auth}

What payments saw: curl {payments}/ledger      Stop with Ctrl-C; run it again, and everything is still there."""


def serve_demo(settings: DoorSettings, *, place: StorePlace, is_insecure: bool = False, as_json: bool = False) -> None:
    """Serves the demo until it is told to stop: sagas on the port of `settings`, jobs on `JOBS_PORT` (8091). The
    payments service is on `PAYMENTS_PORT` (8093), or on a free port when that one is taken; `FAIL_FIRST=n` makes it
    refuse the first n attempts of each charge."""
    from sagaloom.cli.server import announcer

    number_in("FAIL_FIRST", 0)
    number_in("PAYMENTS_PORT", _PAYMENTS_PORT)

    def announce(addresses: Addresses, said: Said) -> None:
        payments = str(said["sagas"]["payments"])
        auth = ' -H "authorization: Bearer $SAGALOOM_TOKEN"' if settings.token is not None else ""
        story = _STORY.format(url="{url}", payments=payments, jobs=addresses.jobs, auth=auth)
        announcer(story, as_json=as_json, payments=payments, jobs=addresses.jobs)(addresses.sagas)

    serve_both(
        settings,
        place=place,
        sagas_command=[sys.executable, "-m", "sagaloom.cli.demo"],
        jobs_command=[sys.executable, "-m", "sagaloom", "jobs", "serve", "sagaloom.demo", "--json"],
        announce=announce,
        is_insecure=is_insecure,
    )


def _serve_sagas(settings: DoorSettings, *, place: StorePlace, is_insecure: bool) -> None:
    """One of the two processes: the sagas, and the payments service beside them."""
    from sagaloom.cli.logs import configure_logs
    from sagaloom.cli.server import PORT_HINT, Companion, Plan, address_of, announcer, listen, run
    from sagaloom.demo import sagas
    from sagaloom.demo.payments import Ledger, create_payments_app

    refuse_open_door(settings, is_insecure=is_insecure)
    fail_first = number_in("FAIL_FIRST", 0)
    listener = listen(settings.host, settings.port, hint=PORT_HINT)
    try:
        payments = listen("127.0.0.1", number_in("PAYMENTS_PORT", _PAYMENTS_PORT), hint="")
    except ConfigurationError:
        payments = listen("127.0.0.1", 0, hint="no port is free")
    configure_logs(settings.log_level)
    place.kv_path.parent.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(place.kv_path.parent / "payments.jsonl")
    address = address_of(payments)
    try:
        run(
            Plan(
                settings=settings,
                listener=listener,
                definitions=sagas,
                services={"payments": address},
                place=place,
                announce=announcer("", as_json=True, payments=address),
                companions=[Companion(app=create_payments_app(ledger, fail_first=fail_first), listener=payments)],
            )
        )
    finally:
        ledger.close()


if __name__ == "__main__":
    try:
        chosen = load_settings()
        _serve_sagas(chosen, place=chosen.place, is_insecure="--insecure" in sys.argv[1:])
    except SagasError as error:
        sys.exit(f"error: {error.message}")
