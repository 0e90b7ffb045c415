"""Serves the demo sagas, their payments service and the demo jobs: `NETSCRIPT_SAGA_STORE=kv python -m examples.serve`.

They are in `sagaloom.demo`, and run as two processes that are started again when they die. `sagaloom serve MODULE` and
`sagaloom jobs serve MODULE` serve yours. PORT, JOBS_PORT, NETSCRIPT_SAGA_KV_PATH, SAGALOOM_TOKEN, PAYMENTS_PORT and
FAIL_FIRST are read from the environment.
"""

from __future__ import annotations

import sys

from sagaloom.cli.demo import serve_demo
from sagaloom.discovery import load_appsettings, resolve_saga_store_backend
from sagaloom.errors import ConfigurationError, SagasError
from sagaloom.settings import DEFAULT_KV_PATH, load_settings


def main() -> None:
    settings = load_settings()
    if resolve_saga_store_backend(appsettings=load_appsettings()) != "kv":
        raise ConfigurationError("the demo keeps its sagas in a file: set NETSCRIPT_SAGA_STORE=kv")
    serve_demo(settings, kv_path=settings.kv_path or DEFAULT_KV_PATH)


if __name__ == "__main__":
    try:
        main()
    except SagasError as error:
        sys.exit(f"error: {error.message}")
