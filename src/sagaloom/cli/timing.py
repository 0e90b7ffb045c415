"""The commands about time: the timers of instances, what is scheduled, and a tick by hand."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import quote

import typer

from sagaloom.cli.client import DEFAULT_URL, ApiClient, CommandFailed
from sagaloom.cli.options import AsJson, Limit, Saga, Token, Url

__all__ = ["add_schedule_commands", "add_timer_commands"]

TimerId = Annotated[str, typer.Argument(metavar="ID", help="The timer's id.", show_default=False)]


def add_timer_commands(timers_app: typer.Typer) -> None:
    """`list`, `cancel` and `move`."""

    @timers_app.command("list")
    def timers_list(
        saga: Annotated[str | None, typer.Option("--saga", help="Only of this saga.")] = None,
        key: Annotated[str | None, typer.Option("--key", help="Only of this correlation key.")] = None,
        limit: Limit = 50,
        cursor: Annotated[
            str | None, typer.Option("--cursor", help="The next page, as the page before named it.")
        ] = None,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """List the timers that wait, the next one first."""
        from sagaloom.cli.output import print_json, print_table

        with ApiClient(url, token) as api:
            answer = api.get("/timers", sagaName=saga, correlationKey=key, limit=limit, cursor=cursor)
        if as_json:
            print_json(answer)
            return
        print_table(
            ("id", "due", "instance", "message type", "name"),
            [
                (one["id"], one["dueAt"], one["instanceId"], one["messageType"], one.get("name"))
                for one in answer["timers"]
            ],
            empty="no timer waits",
        )
        if answer["cursor"]:
            print(f"more with --cursor {answer['cursor']}")

    @timers_app.command("cancel")
    def timers_cancel(timer: TimerId, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
        """Take a timer back, as its saga would."""
        from sagaloom.cli.output import print_json

        with ApiClient(url, token) as api:
            answer = api.delete(_timer_path(timer))
        if as_json:
            print_json(answer)
        else:
            print(f"{answer['instanceId']}: {answer['reason']}")

    @timers_app.command("move")
    def timers_move(
        timer: TimerId,
        to: Annotated[
            str, typer.Argument(help="A moment such as 2026-01-31T12:00:00Z, or a delay from now such as 10m; 'now'.")
        ],
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Have a timer fire at another moment."""
        from sagaloom.cli.output import print_json

        due_at = _moment(to)
        with ApiClient(url, token) as api:
            answer = api.patch(_timer_path(timer), {"dueAt": due_at.isoformat()})
        if as_json:
            print_json(answer)
        else:
            print(f"{answer['instanceId']}: {answer['reason']}")


def _timer_path(timer: str) -> str:
    return f"/timers/{quote(timer, safe='')}"


def _moment(text: str) -> datetime:
    """The moment that an argument stands for."""
    from sagaloom.durations import resolve_delay
    from sagaloom.errors import DefinitionError

    now = datetime.now(UTC)
    if text == "now":
        return now
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            return resolve_delay(text, now)
        except DefinitionError:
            moment = None
    if moment is None or moment.utcoffset() is None:
        raise CommandFailed(
            f"{text!r:.80} is no moment with a time zone, such as 2026-01-31T12:00:00Z, and no delay, such as 10m",
            exit_code=2,
        )
    return moment


def add_schedule_commands(schedules_app: typer.Typer) -> None:
    """`list` and `trigger`."""

    @schedules_app.command("list")
    def schedules_list(url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
        """List the schedules of the loaded sagas, and when each comes next."""
        from sagaloom.cli.output import print_json, print_table

        with ApiClient(url, token) as api:
            answer = api.get("/schedules")
        if as_json:
            print_json(answer)
            return
        print_table(
            ("saga", "cron", "timezone", "message type", "last tick", "next tick"),
            [
                (
                    one["sagaName"],
                    one["cron"],
                    one["timezone"],
                    one["messageType"],
                    one.get("lastTickAt"),
                    one.get("nextTickAt"),
                )
                for one in answer["schedules"]
            ],
            empty="no saga is scheduled",
        )

    @schedules_app.command("trigger")
    def schedules_trigger(saga: Saga, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False) -> None:
        """Give a scheduled saga a tick of its own, now."""
        from sagaloom.cli.output import print_json

        with ApiClient(url, token) as api:
            answer = api.post(f"/schedules/{quote(saga, safe='')}/trigger")
        if as_json:
            print_json(answer)
        else:
            print(f"{answer['messageType']} {answer['messageId']} was given to {answer['instances'][0]['instanceId']}")
