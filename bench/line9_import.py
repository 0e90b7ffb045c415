"""Line 9: what `import sagaloom` brings along. An author of sagas waits for no web server, database or pydantic."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Final

from bench.harness import ROOT, Bench, Finding

__all__ = ["run"]

_HEAVY: Final = frozenset(
    [
        "aio_pika",
        "anyio",
        "apsw",
        "asyncpg",
        "fastapi",
        "h11",
        "httpcore2",
        "httpx",
        "httpx2",
        "mcp",
        "nats",
        "psycopg",
        "pydantic",
        "pydantic_core",
        "pydantic_settings",
        "redis",
        "sqlalchemy",
        "sqlite3",
        "starlette",
        "uvicorn",
    ]
)
_PROGRAM: Final = """
import sys, time
began = time.perf_counter()
import sagaloom
seconds = time.perf_counter() - began
import json
print(json.dumps({"seconds": seconds, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""
_AIM_MS = 100.0


def run(bench: Bench) -> None:
    seconds: list[float] = []
    heavy: set[str] = set()
    for _ in range(bench.pick(9, 5)):
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=60, text=True
        )
        said = json.loads(done.stdout)
        seconds.append(said["seconds"])
        heavy |= _HEAVY & set(said["modules"])
    bench.found(
        Finding(
            line="9",
            what="import sagaloom: web, database and pydantic modules that it loads",
            ours=", ".join(sorted(heavy)) or "none",
            baseline="none",
            value=len(heavy),
            unit="",
            must=0.0,
            aim=0.0,
            at_least=False,
        )
    )
    best = min(seconds) * 1000
    bench.found(
        Finding(
            line="9",
            what="import sagaloom: time, best of all",
            ours=f"{best:.0f} ms",
            baseline=f"at worst {max(seconds) * 1000:.0f} ms",
            value=best,
            unit=" ms",
            aim=_AIM_MS,
            at_least=False,
            note="under the aim" if best < _AIM_MS else f"aim: under {_AIM_MS:.0f} ms",
        )
    )
