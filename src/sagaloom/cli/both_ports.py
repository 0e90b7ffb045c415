"""Sagas and jobs as two processes over one store, which know each other and are started again when they die."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sagaloom.cli.supervisor import Child, ChildFailed, Said, supervise
from sagaloom.errors import ConfigurationError
from sagaloom.modules import names_in_project
from sagaloom.settings import DEFAULT_JOBS_PORT, DoorSettings, StorePlace, refuse_open_door

__all__ = ["Addresses", "number_in", "project_here", "serve_both", "serve_project"]

_STORY: Final = """\
sagaloom serves {sagas_modules} on {sagas}
and {jobs_modules} on {jobs}; the APIs are described at /api/docs of both.
Stop with Ctrl-C; run it again, and everything is still there."""


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where both are."""

    sagas: str
    jobs: str


@dataclass(frozen=True, kw_only=True)
class Project:
    """What the pyproject.toml of this directory names under `[tool.sagaloom]`."""

    sagas: tuple[str, ...]
    jobs: tuple[str, ...]


def project_here() -> Project | None:
    """The project of the current directory; None where it is none, or names no sagas."""
    file = Path.cwd() / "pyproject.toml"
    sagas = names_in_project(file, "sagas")
    return Project(sagas=sagas, jobs=names_in_project(file, "jobs")) if sagas else None


def serve_project(
    project: Project, settings: DoorSettings, *, place: StorePlace, is_insecure: bool, as_json: bool
) -> None:
    """Serves the sagas and the jobs of a project until it is told to stop: on the port of `settings`, and on
    `JOBS_PORT` (8091)."""
    from sagaloom.cli.server import announcer

    def announce(addresses: Addresses, said: Said) -> None:
        story = _STORY.format(
            sagas_modules=", ".join(project.sagas),
            jobs_modules=", ".join(project.jobs),
            sagas="{url}",
            jobs=addresses.jobs,
        )
        announcer(story, as_json=as_json, jobs=addresses.jobs)(addresses.sagas)

    command = [sys.executable, "-m", "sagaloom"]
    serve_both(
        settings,
        place=place,
        sagas_command=[*command, "serve", *project.sagas, "--json"],
        jobs_command=[*command, "jobs", "serve", *project.jobs, "--json"],
        announce=announce,
        is_insecure=is_insecure,
    )


def serve_both(
    settings: DoorSettings,
    *,
    place: StorePlace,
    sagas_command: Sequence[str],
    jobs_command: Sequence[str],
    announce: Callable[[Addresses, Said], None],
    is_insecure: bool,
) -> None:
    """Runs both until it is told to stop; `announce` is called once both answer. Ends the process when they fail."""
    from sagaloom.cli.logs import configure_logs

    refuse_open_door(settings, is_insecure=is_insecure)
    # They have to know each other before either has a listener, and keep their places when they are started again.
    port = settings.port or _free_port(settings.host)
    jobs_port = number_in("JOBS_PORT", DEFAULT_JOBS_PORT if settings.port else 0) or _free_port(settings.host)
    addresses = Addresses(sagas=_url(settings.host, port), jobs=_url(settings.host, jobs_port))
    shared = {
        "NETSCRIPT_SAGA_STORE": "kv" if place.url is None else "sql",
        "NETSCRIPT_SAGA_KV_PATH": str(place.kv_path),
        "DATABASE_URL": place.url or "",
        "SAGALOOM_HOST": settings.host,
        "SAGALOOM_TOKEN": settings.bearer or "",
        "SAGAS_API_URL": addresses.sagas,
        "WORKERS_API_URL": addresses.jobs,
    }
    insecure = ["--insecure"] if is_insecure else []
    configure_logs(settings.log_level)
    try:
        status = supervise(
            [
                Child(name="sagas", command=[*sagas_command, *insecure], env={**shared, "PORT": str(port)}),
                Child(name="jobs", command=[*jobs_command, *insecure], env={**shared, "PORT": str(jobs_port)}),
            ],
            announce=lambda said: announce(addresses, said),
        )
    except ChildFailed as error:
        sys.exit(error.status if error.status > 0 else 1)  # it has said why
    if status:
        sys.exit(status)


def number_in(variable: str, default: int) -> int:
    """The small number in an environment variable; raises `ConfigurationError`."""
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 5):
        raise ConfigurationError(f"{variable} must be a small number, got {text!r:.40}")
    return int(text)


def _free_port(host: str) -> int:
    from sagaloom.cli.server import listen

    with listen(host, 0, hint="no port is free") as listener:
        port: int = listener.getsockname()[1]
        return port


def _url(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
