"""The commands that serve: `dev`, `serve` and `worker`.

`serve` and `worker` make a `Plan` of what was said, for `sagaloom.cli.server`: which sagas, in which store, with or
without the API and the runtime. `dev` chooses the store when nobody has. In a project it serves the jobs beside the
sagas, too (`sagaloom.cli.both_ports`); without a module or a project, the demo. When it shall start again after each
change, it runs the same command line as a process of its own (`sagaloom.cli.reloading`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sagaloom.cli.client import CommandFailed
from sagaloom.cli.options import AsJson, Host, Insecure, Modules, Token

if TYPE_CHECKING:
    from sagaloom.settings import DoorSettings, StorePlace

__all__ = ["add_serving_commands"]

Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="The port; by default PORT, else 8092.")]


def add_serving_commands(app: typer.Typer) -> None:
    """`dev`, `serve` and `worker`."""
    for command in (dev, serve, worker):
        app.command()(command)


def dev(
    context: typer.Context,
    module: Annotated[
        str | None,
        typer.Argument(
            help="A saga module. Without one the sagas and jobs that pyproject.toml names, or the demo.",
            show_default=False,
        ),
    ] = None,
    host: Host = None,
    port: Port = None,
    token: Token = None,
    insecure: Insecure = False,
    reload: Annotated[bool, typer.Option(help="Start again whenever a file of this directory changes.")] = True,
    as_json: AsJson = False,
) -> None:
    """Serve for development: chooses the store (kv, in .sagaloom/) and says so first.

    In the directory of a project it serves the sagas and jobs of that, on both ports, and starts again what dies."""
    os.environ["SAGALOOM_DEV"] = "1"
    from sagaloom.cli.both_ports import project_here, serve_project

    if reload and (module is not None or project_here() is not None):
        from sagaloom.cli.reloading import serve_reloading

        raise typer.Exit(serve_reloading(_said_again(context), folder=Path.cwd()))

    settings = _settings(host=host, port=port, token=token)
    place = _place_for_dev(settings)
    kind = "kv" if place.url is None else "sql"
    print(f"dev: saga store {kind} in {place}", file=sys.stderr, flush=True)
    project = project_here() if module is None else None
    if project is not None and project.jobs:
        serve_project(project, settings, place=place, is_insecure=insecure, as_json=as_json)
    elif project is not None:
        _serve(list(project.sagas), settings, place=place, is_insecure=insecure, as_json=as_json)
    elif module is None:
        from sagaloom.cli.demo import serve_demo

        serve_demo(settings, place=place, is_insecure=insecure, as_json=as_json)
    else:
        _serve([module], settings, place=place, is_insecure=insecure, as_json=as_json)


def serve(
    modules: Modules = None,
    host: Host = None,
    port: Port = None,
    token: Token = None,
    insecure: Insecure = False,
    no_worker: Annotated[
        bool, typer.Option("--no-worker", help="Only the API: other processes on the same store run the sagas.")
    ] = False,
    no_api: Annotated[bool, typer.Option("--no-api", help="Only run the sagas, like 'sagaloom worker'.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve the HTTP API and run the sagas of the given modules, in one process.

    Several processes may do so on one store: they share the work, and when one dies the others take over."""
    if no_worker and no_api:
        raise CommandFailed("--no-worker and --no-api together leave nothing to do: leave one of them out")
    settings = _settings(host=host, port=port, token=token)
    place = settings.place
    _serve(
        modules or [], settings, place=place, is_insecure=insecure, as_json=as_json, works=not no_worker, api=not no_api
    )


def worker(modules: Modules = None, as_json: AsJson = False) -> None:
    """Run the sagas of the given modules without an API, beside other processes on the same store."""
    settings = _settings(host=None, port=None, token=None)
    _serve(modules or [], settings, place=settings.place, is_insecure=False, as_json=as_json, api=False)


def _serve(
    modules: Sequence[str],
    settings: DoorSettings,
    *,
    place: StorePlace,
    is_insecure: bool,
    as_json: bool,
    works: bool = True,
    api: bool = True,
) -> None:
    from sagaloom.cli.logs import configure_logs
    from sagaloom.cli.server import PORT_HINT, Plan, announcer, listen, run
    from sagaloom.registry import load_definitions
    from sagaloom.settings import refuse_open_door

    if api:
        refuse_open_door(settings, is_insecure=is_insecure)
    loaded = load_definitions(modules)
    listener = listen(settings.host, settings.port, hint=PORT_HINT) if api else None
    configure_logs(settings.log_level)
    names = ", ".join(definition.id for definition in loaded.definitions)
    text = f"running {names} in {place}" if not api else f"serving {names} on {{url}}"
    run(
        Plan(
            settings=settings,
            listener=listener,
            definitions=loaded.definitions,
            targets=loaded.targets,
            place=place,
            announce=announcer(text, as_json=as_json),
            works=works,
        )
    )


def _settings(*, host: str | None, port: int | None, token: str | None) -> DoorSettings:
    from sagaloom.settings import load_settings

    return load_settings(host=host, port=port, token=token or None)


def _said_again(context: typer.Context) -> list[str]:
    """The arguments and options of this command line, for a process of their own."""
    said: list[str] = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name == "reload" or value is None or source is None or source.name != "COMMANDLINE":
            continue
        if parameter.param_type_name == "argument":
            said.append(str(value))
        elif value is True:
            said.append(parameter.opts[0])
        else:
            said += [parameter.opts[0], str(value)]
    return said


def _place_for_dev(settings: DoorSettings) -> StorePlace:
    """The store that was chosen for dev by its variable; else a file."""
    from sagaloom.settings import DEFAULT_KV_PATH, StorePlace

    return settings.place if settings.store is not None else StorePlace(kv_path=settings.kv_path or DEFAULT_KV_PATH)
