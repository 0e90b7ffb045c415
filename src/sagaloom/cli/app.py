"""The commands. Each is a thin layer: read the options, ask the server or the library, print.

What is heavy (the runtime, the web server, the HTTP client, tables) is imported inside the command that needs it, so
that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sagaloom.cli.checking import add_check_commands
from sagaloom.cli.client import DEFAULT_URL, ApiClient, CommandFailed
from sagaloom.cli.database import db_app
from sagaloom.cli.evolving import add_saga_commands
from sagaloom.cli.instances import instances_app, sagas_app
from sagaloom.cli.jobs import jobs_app
from sagaloom.cli.operating import add_dead_letter_commands, add_instance_commands
from sagaloom.cli.options import AsJson, Limit, Modules, Token, Url
from sagaloom.cli.payloads import json_of
from sagaloom.cli.serving import add_serving_commands
from sagaloom.cli.talking import add_talking_commands
from sagaloom.cli.timing import add_schedule_commands, add_timer_commands

if TYPE_CHECKING:
    from sagaloom.cli.store_checks import Finding

__all__ = ["app"]

app = typer.Typer(
    name="sagaloom",
    help="Durable sagas: run them, look into them, repair them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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


add_serving_commands(app)


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
add_instance_commands(instances_app)
add_saga_commands(app, sagas_app)
add_check_commands(app)


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
    from sagaloom.cli.output import print_json, print_next_page, print_table

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
    print_next_page(answer)


DeadLetterId = Annotated[str, typer.Argument(metavar="ID", help="The dead letter's id.", show_default=False)]


@dead_letters_app.command("show")
def dead_letters_show(
    letter: DeadLetterId, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False
) -> None:
    """Show one dead letter with its payload and traceback."""
    from sagaloom.cli.output import print_one

    with ApiClient(url, token) as api:
        print_one(api.get(_letter_path(letter)), as_json=as_json)


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
    from sagaloom.settings import load_settings

    settings = load_settings(host=None, port=None, token=token or None)
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
