"""The first minute of the README, as a newcomer types it; on PostgreSQL it gives the same answers."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT, blocks_of, commands_of, with_free_ports
from tests.docs.shell import Shell, free_ports
from tests.patience import PATIENCE_SECONDS
from tests.schemas import Schema


@pytest.fixture(params=["kv", pytest.param("sql", marks=pytest.mark.server("postgres"))])
def store(request: pytest.FixtureRequest) -> dict[str, str]:
    """Where the sagas are kept, as the environment says it."""
    if request.param == "kv":
        return {"NETSCRIPT_SAGA_STORE": "kv"}
    schema: Schema = request.getfixturevalue("schema")
    return {"NETSCRIPT_SAGA_STORE": "sql", "DATABASE_URL": schema.url}


@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("pkill")), reason="the README uses curl and pkill")
async def test_an_order_survives_a_kill_and_is_charged_and_refunded_once(store: dict[str, str], tmp_path: Path) -> None:
    await asyncio.to_thread(_type_all, store, tmp_path)


def _type_all(store: dict[str, str], tmp_path: Path) -> None:
    ports = free_ports()
    make_serve, first, job = [block for block in blocks_of(ROOT / "README.md") if block.language == "console"][:3]
    environment = {
        **store,
        "PORT": ports["8092"],
        "JOBS_PORT": ports["8091"],
        "PAYMENTS_PORT": ports["8093"],
        "PYTHONPATH": str(ROOT),
    }

    with Shell(tmp_path, environment) as shell:
        # What `make serve` runs, once everything is installed.
        code, _, came = shell.run("python -m examples.serve 2> serve.log & SERVER=$!", until=_says("Stop with Ctrl-C"))
        assert (code, came) == (0, True), (tmp_path / "serve.log").read_text()
        for command in (*commands_of(first), *commands_of(job)):
            # Only in this shell's session: somebody may have a demo of his own. And who has a slow machine looks twice.
            typed = with_free_ports(command.typed, ports).replace("pkill -9 -f", "pkill -9 -s 0 -f")
            typed = typed.replace("sleep 2", f"sleep 2 && {_is_up(ports)}")
            code, printed, _ = shell.run(typed, until=lambda _: True)
            assert code == 0, f"{command.typed}\n" + "\n".join(printed)
        ledger = _json_of(shell, ports, "8093/ledger", once=lambda found: len(_taken(found)) == 2)
        settings = _json_of(
            shell,
            ports,
            "8092/api/v1/sagas/instances?sagaName=user-settings-saga",
            once=lambda found: [each["status"] for each in found["instances"]] == ["completed"],
        )
        order = _json_of(shell, ports, "8092/api/v1/sagas/instances/order-saga/o-1")
        history = _json_of(shell, ports, "8092/api/v1/sagas/instances/order-saga/o-1/history")
        shell.run("kill $SERVER; wait $SERVER", until=lambda _: True)

    assert commands_of(make_serve)[0].typed == "make serve"
    assert (order["status"], order["state"]["status"]) == ("failed", "refunded")
    assert [(each["messageType"], each["disposition"], each["revision"]) for each in history["history"]] == [
        ("OrderPlaced", "applied", 1),
        ("PaymentCaptured", "applied", 2),
        ("FulfillmentFailed", "applied", 3),
    ]
    assert [entry["status"] for entry in settings["instances"]] == ["completed"]
    assert [(entry["kind"], entry["applied"]) for entry in ledger["entries"]] == [("charge", 1), ("refund", 1)]


def _says(text: str) -> Any:
    return lambda printed: any(text in line for line in printed)


def _taken(ledger: Any) -> list[Any]:
    return [entry for entry in ledger["entries"] if entry["applied"]]


def _is_up(ports: dict[str, str]) -> str:
    """A command that ends when the API answers."""
    return f"until curl -sf -o /dev/null http://127.0.0.1:{ports['8092']}/health/ready; do sleep 0.1; done"


def _json_of(shell: Shell, ports: dict[str, str], address: str, *, once: Callable[[Any], bool] = lambda _: True) -> Any:
    """What is answered there, once what was published has had its effects; else what it is in the end."""
    url = with_free_ports(f"http://127.0.0.1:{address}", ports)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        _, printed, _ = shell.run(f"curl -s '{url}'; echo", until=lambda _: True)
        found = json.loads("".join(line for line in printed if line.startswith("{")))
        if once(found) or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
