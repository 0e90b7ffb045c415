"""The first minute of the README, as a newcomer types it; on PostgreSQL it gives the same answers."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.docs.pages import ROOT, blocks_of, commands_of, with_free_ports
from tests.docs.shell import Shell, free_ports
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
            # Only in this shell's session: somebody may have a demo of his own.
            typed = with_free_ports(command.typed, ports).replace("pkill -9 -f", "pkill -9 -s 0 -f")
            code, printed, _ = shell.run(typed, until=lambda _: True)
            assert code == 0, f"{command.typed}\n" + "\n".join(printed)
        order = _json_of(shell, ports, "8092/api/v1/sagas/instances/order-saga/o-1")
        history = _json_of(shell, ports, "8092/api/v1/sagas/instances/order-saga/o-1/history")
        settings = _json_of(shell, ports, "8092/api/v1/sagas/instances?sagaName=user-settings-saga")
        ledger = _json_of(shell, ports, "8093/ledger")
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


def _json_of(shell: Shell, ports: dict[str, str], address: str) -> Any:
    """What is answered there, a second from now: what was published has had its effects by then."""
    url = with_free_ports(f"http://127.0.0.1:{address}", ports)
    _, printed, _ = shell.run(f"sleep 1; curl -s '{url}'; echo", until=lambda _: True)
    return json.loads("".join(line for line in printed if line.startswith("{")))
