"""The commands. Each is a thin layer: read the options, ask the server or the library, print.

What is heavy (the runtime, the web server, the HTTP client, tables) is imported inside the command that needs it, so
that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sagaloom.cli.checking import add_check_commands
from sagaloom.cli.client import DEFAULT_URL, ApiClient, CommandFailed, instance_path
from sagaloom.cli.database import db_app
from sagaloom.cli.evolving import add_saga_commands
from sagaloom.cli.jobs import jobs_app
from sagaloom.cli.operating import add_dead_letter_commands, add_instance_commands
from sagaloom.cli.options import AsJson, Host, Insecure, Key, Limit, Modules, Run, Saga, Token, Topic, Url
from sagaloom.cli.payloads import json_of
from sagaloom.cli.talking import add_talking_commands
from sagaloom.cli.timing import add_schedule_commands, add_timer_commands

if TYPE_CHECKING:
    from sagaloom.cli.store_checks import Finding
    from sagaloom.settings import DoorSettings, StorePlace

__all__ = ["app"]

app = typer.Typer(
    name="sagaloom",
    help="Durable sagas: run them, look into them, repair them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
sagas_app = typer.Typer(help="The sagas a server has loaded.", no_args_is_help=True)
instances_app = typer.Typer(help="Running and finished instances.", no_args_is_help=True)
dead_letters_app = typer.Typer(help="Messages and effects that were given up.", no_args_is_help=True)
timers_app = typer.Typer(help="Messages that instances get later.", no_args_is_help=True)
schedules_app = typer.Typer(help="Sagas that tick by the clock.", no_args_is_help=True)
app.add_typer(sagas_app, name="sagas")
app.add_typer(instances_app, name="instances")
app.add_typer(dead_letters_app, name="dead-letters")
app.add_typer(timers_app, name="timers")
app.add_typer(schedules_app, name="schedules")
app.add_typer(jobs_app, name="jobs")
app.add_typer(db_app, name="db")

Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="The port; by default PORT, else 8092.")]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        print(version_of("sagaloom"))
        raise typer.Exit


@app.command()
def new(
    name: Annotated[
        str, typer.Argument(help="Small letters, digits and hyphens, such as my-shop.", show_default=False)
    ],
    into: Annotated[
        Path | None, typer.Option("--into", help="The folder to write into; by default one of that name, here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a project with a saga, a job, their tests and a Makefile."""
    from sagaloom.cli.creating import create_project

    folder = into if into is not None else Path(name)
    files = create_project(name, folder)
    if as_json:
        from sagaloom.cli.output import print_json

        print_json({"name": name, "folder": str(folder), "files": [str(file) for file in files]})
    else:
        print(f"{name} is in {folder}, with a saga, a job and their tests. Go on with:")
        print(f"\n  cd {folder}\n  make test\n  make serve")


# --- Serving ---------------------------------------------------------------------------------------------------------


@app.command()
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


@app.command()
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


@app.command()
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


# --- Messages --------------------------------------------------------------------------------------------------------


@app.command()
def publish(
    message_type: Annotated[str, typer.Argument(metavar="TYPE", help="The message type.", show_default=False)],
    payload: Annotated[str, typer.Option("--payload", help="A JSON object; @FILE reads one, - reads stdin.")] = "{}",
    correlation_key: Annotated[str | None, typer.Option("--correlation-key", help="Names the instance.")] = None,
    idempotency_key: Annotated[str | None, typer.Option("--idempotency-key", help="Makes a repeat harmless.")] = None,
    wait: Annotated[
        str | None, typer.Option("--wait", help="Wait this long (such as 5s) for what the message does.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Publish a message."""
    from sagaloom.cli.output import print_json

    body: dict[str, object] = {"type": message_type, "payload": json_of(payload)}
    if correlation_key is not None:
        body["correlationKey"] = correlation_key
    if idempotency_key is not None:
        body["idempotencyKey"] = idempotency_key
    with ApiClient(url, token) as api:
        answer = api.post("/publish", body, wait=wait)
    if as_json:
        print_json(answer)
    else:
        _print_receipt(answer)
    dead = [one for one in answer.get("outcomes") or () if one.get("disposition") == "dead_lettered"]
    if dead:
        raise CommandFailed(
            f"the message was accepted, but {dead[0]['instanceId']} gave it up: {dead[0].get('reason', 'no reason')}; "
            "see 'sagaloom dead-letters list'"
        )


def _print_receipt(answer: Mapping[str, Any]) -> None:
    from sagaloom.cli.output import print_table

    what = "a duplicate: nothing changed" if answer.get("duplicate") else "published"
    print(f"{answer['messageType']} {answer['messageId']}: {what}")
    outcomes = answer.get("outcomes")
    if outcomes is None:
        for one in answer.get("instances") or ():
            print(f"  for {one['instanceId']}")
        return
    print_table(
        ("instance", "disposition", "status", "revision", "state", "reason"),
        [
            (
                one.get("instanceId"),
                one.get("disposition"),
                one.get("status"),
                one.get("revision"),
                one.get("state"),
                one.get("reason"),
            )
            for one in outcomes
        ],
        empty="no saga took it",
    )


add_talking_commands(app)


# --- Looking ---------------------------------------------------------------------------------------------------------


@sagas_app.command("list")
def sagas_list(
    topic: Topic = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="Only those with this tag; may be repeated.")] = None,
    enabled: Annotated[
        bool | None, typer.Option("--enabled/--disabled", help="Only those that are, or are not.", show_default=False)
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List the loaded sagas."""
    from sagaloom.cli.output import print_json, print_table

    wanted = None if enabled is None else str(enabled).lower()
    with ApiClient(url, token) as api:
        answer = api.get("/sagas", limit=1000, topic=topic, tags=tag or None, enabled=wanted)
    if as_json:
        print_json(answer)
        return
    print_table(
        ("saga", "topic", "version", "tier", "enabled", "message types"),
        [
            (
                one["id"],
                one["topic"],
                one["version"],
                one["durabilityTier"],
                ("paused" if one["paused"] else "yes") if one["enabled"] else "no",
                ", ".join(handled["type"] for handled in one["handledMessageTypes"]),
            )
            for one in answer["sagas"]
        ],
        empty="no sagas are loaded",
    )


@sagas_app.command("show")
def sagas_show(saga: Saga, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
    """Show one saga: its types, schemas and policies."""
    from urllib.parse import quote

    with ApiClient(url, token) as api:
        _print_one(api.get(f"/sagas/{quote(saga, safe='')}"), as_json=as_json)


@instances_app.command("list")
def instances_list(
    saga: Annotated[str | None, typer.Option("--saga", help="Only of this saga.")] = None,
    status: Annotated[str | None, typer.Option("--status", help="Only with this status.")] = None,
    prefix: Annotated[str | None, typer.Option("--prefix", help="Only keys that begin so.")] = None,
    topic: Topic = None,
    limit: Limit = 50,
    cursor: Annotated[str | None, typer.Option("--cursor", help="The next page, as the page before named it.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List instances, newest first."""
    from sagaloom.cli.output import print_json, print_table

    with ApiClient(url, token) as api:
        answer = api.get("/instances", sagaName=saga, status=status, q=prefix, topic=topic, limit=limit, cursor=cursor)
    if as_json:
        print_json(answer)
        return
    print_table(
        ("instance", "status", "revision", "last message", "updated", "state"),
        [
            (
                one["instanceId"],
                one["status"],
                one["version"],
                one.get("lastMessageType"),
                one["updatedAt"],
                one["state"],
            )
            for one in answer["instances"]
        ],
        empty="no instances",
    )
    _print_next_page(answer)


@instances_app.command("show")
def instances_show(
    saga: Saga, key: Key, run: Run = None, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False
) -> None:
    """Show one instance with its state."""
    with ApiClient(url, token) as api:
        _print_one(api.get(instance_path(saga, key), run=run), as_json=as_json)


@instances_app.command("children")
def instances_children(
    saga: Saga,
    key: Key,
    run: Run = None,
    status: Annotated[
        str, typer.Option("--status", help="live, or how they ended: completed, failed, cancelled.")
    ] = "live",
    limit: Limit = 50,
    cursor: Annotated[str | None, typer.Option("--cursor", help="The next page, as the page before named it.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List what an instance has spawned, in that order, and count it."""
    from sagaloom.cli.output import print_json, print_table

    with ApiClient(url, token) as api:
        answer = api.get(f"{instance_path(saga, key)}/children", run=run, status=status, limit=limit, cursor=cursor)
    if as_json:
        print_json(answer)
        return
    print_table(
        ("instance", "status", "with its parent", "spawned", "ended"),
        [
            (
                one.get("instanceId", f"{one['sagaName']}: a dead letter"),
                one["status"],
                one["onParentCancel"],
                one["spawnedAt"],
                one.get("endedAt"),
            )
            for one in answer["children"]
        ],
        empty=f"no {status} children",
    )
    print(", ".join(f"{count} {name}" for name, count in answer["counts"].items()))
    _print_next_page(answer)


@instances_app.command("history")
def instances_history(
    saga: Saga,
    key: Key,
    run: Run = None,
    limit: Limit = 100,
    after: Annotated[int | None, typer.Option("--after", min=0, help="Continue behind this entry.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show what each message did to an instance, oldest first."""
    from sagaloom.cli.output import print_json, print_table

    with ApiClient(url, token) as api:
        answer = api.get(f"{instance_path(saga, key)}/history", run=run, limit=limit, after=after)
    if as_json:
        print_json(answer)
        return
    print_table(
        ("no", "revision", "at", "message", "disposition", "status", "effects", "reason"),
        [
            (
                one["entryNo"],
                one["revision"],
                one["transitionAt"],
                one["messageType"],
                one["disposition"],
                f"{one['previousStatus']} -> {one['newStatus']}",
                ", ".join(_effect_text(effect) for effect in one["effects"]),
                one.get("reason"),
            )
            for one in answer["history"]
        ],
        empty="nothing happened yet",
    )


@instances_app.command("watch")
def instances_watch(
    saga: Annotated[str | None, typer.Option("--saga", help="Only of this saga.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Only of this correlation key.")] = None,
    topic: Topic = None,
    after: Annotated[
        str | None,
        typer.Option("--after", help="Begin behind the event with this id; 0 is the oldest one kept. By default now."),
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each event.")] = False,
) -> None:
    """Show what happens to instances as it happens, until interrupted. Comes back by itself after a cut connection."""
    from sagaloom.cli.watching import watch

    with ApiClient(url, token) as api:
        watch(api, saga=saga, key=key, topic=topic, after=after, as_json=as_json)


add_instance_commands(instances_app)
add_saga_commands(app, sagas_app)
add_check_commands(app)


def _effect_text(effect: Mapping[str, Any]) -> str:
    target = effect.get("target")
    return f"{effect['kind']} {target}" if target else str(effect["kind"])


def _print_one(answer: Mapping[str, Any], *, as_json: bool) -> None:
    from sagaloom.cli.output import print_fields, print_json

    if as_json:
        print_json(answer)
    else:
        print_fields(answer)


def _print_next_page(answer: Mapping[str, Any]) -> None:
    if answer.get("cursor"):
        print(f"more with --cursor {answer['cursor']}")


# --- Dead letters -----------------------------------------------------------------------------------------------------


@dead_letters_app.command("list")
def dead_letters_list(
    saga: Annotated[str | None, typer.Option("--saga", help="Only of this saga.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Only of this correlation key.")] = None,
    limit: Limit = 50,
    cursor: Annotated[str | None, typer.Option("--cursor", help="The next page, as the page before named it.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List dead letters, newest first."""
    from sagaloom.cli.output import print_json, print_table

    with ApiClient(url, token) as api:
        answer = api.get("/dead-letters", sagaName=saga, correlationKey=key, limit=limit, cursor=cursor)
    if as_json:
        print_json(answer)
        return
    print_table(
        ("id", "kind", "type", "saga", "key", "attempts", "reason"),
        [
            (
                one["id"],
                one["kind"],
                one["type"],
                one["sagaName"],
                one["correlationKey"],
                one["attempts"],
                one["reason"],
            )
            for one in answer["deadLetters"]
        ],
        empty="no dead letters",
    )
    _print_next_page(answer)


DeadLetterId = Annotated[str, typer.Argument(metavar="ID", help="The dead letter's id.", show_default=False)]


@dead_letters_app.command("show")
def dead_letters_show(
    letter: DeadLetterId, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False
) -> None:
    """Show one dead letter with its payload and traceback."""
    with ApiClient(url, token) as api:
        _print_one(api.get(_letter_path(letter)), as_json=as_json)


add_dead_letter_commands(dead_letters_app)
add_timer_commands(timers_app)
add_schedule_commands(schedules_app)


def _letter_path(letter: str) -> str:
    from urllib.parse import quote

    return f"/dead-letters/{quote(letter, safe='')}"


@app.command()
def openapi(
    with_token: Annotated[
        bool, typer.Option("--with-token", help="As a server with a token describes itself.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="It is JSON anyway.")] = False,
) -> None:
    """Print the OpenAPI document of the HTTP API; asks no server."""
    from sagaloom.cli.document import api_document
    from sagaloom.cli.output import print_json

    print_json(api_document(needs_token=with_token))


@app.command()
def doctor(
    modules: Modules = None,
    url: Annotated[
        str | None, typer.Option("--url", envvar="SAGALOOM_URL", help="Where the server is or will be.")
    ] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong, and say which command repairs it."""
    from sagaloom.cli.doctor import examine
    from sagaloom.cli.output import print_json

    settings = _settings(host=None, port=None, token=token)
    findings = examine(modules or [], settings, url=url or f"http://127.0.0.1:{settings.port}")
    if as_json:
        print_json({"ok": not _count(findings, "broken"), "findings": findings})
    else:
        _print_findings(findings)
    if broken := _count(findings, "broken"):
        raise CommandFailed(f"doctor found {broken} {'problem' if broken == 1 else 'problems'}")


def _count(findings: Sequence[Finding], status: str) -> int:
    return sum(finding.status == status for finding in findings)


def _print_findings(findings: Sequence[Finding]) -> None:
    from rich.markup import escape

    from sagaloom.cli.output import console

    out = console()
    colour = {"ok": "green", "note": "yellow", "broken": "red"}
    for finding in findings:
        out.print(f"[{colour[finding.status]}]{finding.status:7}[/] {finding.check:12} {escape(finding.detail)}")
        if finding.repair is not None:
            out.print(f"{'':20} repair: {escape(finding.repair)}")
