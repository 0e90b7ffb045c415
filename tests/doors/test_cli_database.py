"""`sagaloom db`, and a saga service on PostgreSQL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from tests.schemas import Schema


def sagaloom(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sagaloom", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_an_upgrade_makes_the_tables_and_the_status_tells_their_version(schema: Schema) -> None:
    address = f"{schema.server_url}?schema={schema.name}_cli"

    before = sagaloom("db", "status", DATABASE_URL=address)
    upgraded = sagaloom("db", "upgrade", "--json", DATABASE_URL=address)
    again = sagaloom("db", "upgrade", "--json", DATABASE_URL=address)
    after = sagaloom("db", "status", "--json", DATABASE_URL=address)
    connection = await schema.connect()
    await connection.execute(f"DROP SCHEMA {schema.name}_cli CASCADE")
    await connection.close()

    assert before.returncode == 1
    assert "run sagaloom db upgrade" in before.stderr
    taken: dict[str, Any] = json.loads(upgraded.stdout)
    assert taken["taken"] == [*range(1, taken["version"] + 1)]
    assert json.loads(again.stdout)["taken"] == []
    assert after.returncode == 0
    assert all(step["appliedAt"] for step in json.loads(after.stdout))


def test_without_an_address_one_is_asked_for() -> None:
    told = sagaloom("db", "status", DATABASE_URL="")
    served = sagaloom("serve", "sagaloom.demo", NETSCRIPT_SAGA_STORE="sql", DATABASE_URL="")

    assert "set DATABASE_URL=postgresql://" in told.stderr
    assert "set DATABASE_URL=postgresql://" in served.stderr
    assert (told.returncode, served.returncode) == (1, 1)
