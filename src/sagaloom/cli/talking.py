"""The commands by which one speaks to an instance: `signal`, `update`, `query`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer

from sagaloom.cli.client import DEFAULT_URL, ApiClient, CommandFailed, instance_path
from sagaloom.cli.options import AsJson, Key, Run, Saga, Token, Url
from sagaloom.cli.payloads import json_of

__all__ = ["add_talking_commands"]

Payload = Annotated[str, typer.Option("--payload", help="JSON; @FILE reads one, - reads stdin.")]
MessageId = Annotated[str | None, typer.Option("--id", help="Makes a repeat harmless.")]


def add_talking_commands(app: typer.Typer) -> None:
    """`signal`, `update` and `query`."""

    @app.command()
    def signal(
        saga: Saga,
        key: Key,
        name: Annotated[str, typer.Argument(metavar="SIGNAL", help="The signal's name.", show_default=False)],
        payload: Payload = "null",
        id: MessageId = None,
        run: Run = None,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Say something to an instance."""
        from sagaloom.cli.output import print_json

        answer = _say("signals", saga, key, name, payload, id=id, run=run, wait=None, url=url, token=token)
        if as_json:
            print_json(answer)
        else:
            print(f"{answer['signal']} {answer['messageId']} to {answer['instanceId']}: {_disposition(answer)}")
        if answer["disposition"] == "dead_lettered":
            raise CommandFailed(
                f"the signal was accepted, but {answer['instanceId']} gave it up; see 'sagaloom dead-letters list'"
            )

    @app.command()
    def update(
        saga: Saga,
        key: Key,
        name: Annotated[str, typer.Argument(metavar="UPDATE", help="The update's name.", show_default=False)],
        payload: Payload = "null",
        id: MessageId = None,
        run: Run = None,
        wait: Annotated[str | None, typer.Option("--wait", help="How long to wait for the answer, such as 5s.")] = None,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Say something to an instance, and print what its handler answers."""
        from sagaloom.cli.output import print_json

        answer = _say("updates", saga, key, name, payload, id=id, run=run, wait=wait, url=url, token=token)
        if as_json or answer["disposition"] == "applied":
            print_json(answer if as_json else answer["answer"])
        else:
            print(
                f"{answer['update']} {answer['messageId']} to {answer['instanceId']}: {_disposition(answer)}; "
                f"ask again with --id {answer['messageId']}"
            )

    @app.command()
    def query(
        saga: Saga,
        key: Key,
        name: Annotated[str, typer.Argument(metavar="QUERY", help="The query's name.", show_default=False)],
        run: Run = None,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Ask an instance, and print what it says of its newest state."""
        from sagaloom.cli.output import print_json

        with ApiClient(url, token) as api:
            answer = api.get(f"{instance_path(saga, key)}/queries/{quote(name, safe='')}", run=run)
        print_json(answer if as_json else answer["answer"])


def _say(
    what: str,
    saga: str,
    key: str,
    name: str,
    payload: str,
    *,
    id: str | None,
    run: int | None,
    wait: str | None,
    url: str,
    token: str | None,
) -> Mapping[str, Any]:
    body = {"payload": json_of(payload), **({} if id is None else {"id": id})}
    with ApiClient(url, token) as api:
        answer: Mapping[str, Any] = api.post(
            f"{instance_path(saga, key)}/{what}/{quote(name, safe='')}", body, run=run, wait=wait
        )
    return answer


def _disposition(answer: Mapping[str, Any]) -> str:
    reason = answer.get("reason")
    return f"{answer['disposition']} ({reason})" if reason else str(answer["disposition"])
