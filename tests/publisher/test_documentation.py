"""The examples of docs/publishing.md run as they stand, against a service that the environment names."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path
from typing import Any

from sagaloom import define_saga
from sagaloom.service import create_app
from tests.doors.http_door import open_door, serve

DOCUMENT = Path(__file__).parents[2] / "docs" / "publishing.md"


async def test_the_python_of_the_page_on_publishing_runs(tmp_path: Path) -> None:
    def placed(saga: Any, event: Any, context: Any) -> list[Any]:
        saga.state = event.payload
        return []

    def by_order(message: Any) -> str:
        return str(message.payload["order_id"])

    orders = define_saga("orders").state({}).correlate(by_order).on("OrderPlaced", placed).build()
    script = tmp_path / "publishing.py"
    script.write_text("\n\n".join(re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)))

    async with open_door(orders) as door, serve(create_app(door.runtime)) as port:
        ran = await asyncio.create_subprocess_exec(
            *(sys.executable, "-W", "error", str(script)),
            cwd=tmp_path,
            env={**os.environ, "SAGAS_API_URL": f"http://127.0.0.1:{port}"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, errors = await asyncio.wait_for(ran.communicate(), 60)

    assert ran.returncode == 0, errors.decode()
    assert said.decode().startswith("durable: ")
    assert "applied: {'order_id': 'o-5'}" in said.decode()
