"""Serves the demo sagas, their payments service and the demo jobs: `NETSCRIPT_SAGA_STORE=kv python -m examples.serve`.

They are in `sagaloom.demo`, and run as two processes that are started again when they die. `sagaloom serve MODULE` and
`sagaloom jobs serve MODULE` serve yours. PORT, JOBS_PORT, NETSCRIPT_SAGA_KV_PATH, DATABASE_URL (of the sql store),
SAGALOOM_TOKEN, PAYMENTS_PORT and FAIL_FIRST are read from the environment.
"""

from __future__ import annotations

import sys

from sagaloom.cli.demo import serve_demo
from sagaloom.errors import SagasError
from sagaloom.settings import load_settings


def main() -> None:
    settings = load_settings()
    serve_demo(settings, place=settings.place)


if __name__ == "__main__":
    try:
        main()
    except SagasError as error:
        sys.exit(f"error: {error.message}")
