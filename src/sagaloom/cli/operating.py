"""The commands by which operators act: end, pause and resume instances, skip a compensation, repair dead letters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import quote

import typer

from sagaloom.cli.client import DEFAULT_URL, ApiClient, CommandFailed, instance_path
from sagaloom.cli.options import AsJson, Key, Limit, Run, Saga, Token, Url

__all__ = ["add_dead_letter_commands", "add_instance_commands", "told_undoing"]

Reason = Annotated[str | None, typer.Option("--reason", help="Why: for the history, and for whoever watches.")]
DeadLetterIds = Annotated[
    list[str] | None, typer.Argument(metavar="[ID]...", help="The ids of dead letters.", show_default=False)
]
OfSaga = Annotated[str | None, typer.Option("--saga", help="Those of this saga.")]
OfKey = Annotated[str | None, typer.Option("--key", help="Those of this correlation key.")]
All = Annotated[bool, typer.Option("--all", help="Every one.")]


def add_instance_commands(instances_app: typer.Typer) -> None:
    """`cancel`, `terminate`, `pause`, `resume` and `skip`."""

    @instances_app.command("cancel")
    def instances_cancel(
        saga: Saga,
        key: Key,
        run: Run = None,
        reason: Reason = None,
        no_compensate: Annotated[
            bool, typer.Option("--no-compensate", help="Undo nothing: end it as it stands.")
        ] = False,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Undo the steps of an instance, newest first, and end it: with its timers and its children."""
        more: dict[str, object] = {"compensate": False} if no_compensate else {}
        _control("cancel", saga, key, run=run, reason=reason, url=url, token=token, as_json=as_json, **more)

    @instances_app.command("terminate")
    def instances_terminate(
        saga: Saga,
        key: Key,
        run: Run = None,
        reason: Reason = None,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """End an instance as it stands, whatever it is doing, an unwinding included: the last resort."""
        _control("terminate", saga, key, run=run, reason=reason, url=url, token=token, as_json=as_json)

    @instances_app.command("pause")
    def instances_pause(
        saga: Saga,
        key: Key,
        run: Run = None,
        reason: Reason = None,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Keep messages and timers of an instance waiting until it is resumed."""
        _control("pause", saga, key, run=run, reason=reason, url=url, token=token, as_json=as_json)

    @instances_app.command("resume")
    def instances_resume(
        saga: Saga,
        key: Key,
        run: Run = None,
        reason: Reason = None,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Let a paused instance go on with what has waited for it."""
        _control("resume", saga, key, run=run, reason=reason, url=url, token=token, as_json=as_json)

    @instances_app.command("skip")
    def instances_skip(
        saga: Saga,
        key: Key,
        run: Run = None,
        reason: Reason = None,
        step: Annotated[
            str | None, typer.Option("--step", help="Only if the compensation of this message type comes next.")
        ] = None,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Leave out the compensation that fails, for good, and go on undoing behind it."""
        more: dict[str, object] = {"step": step} if step is not None else {}
        _control("skip", saga, key, run=run, reason=reason, url=url, token=token, as_json=as_json, **more)


def _control(
    verb: str,
    saga: str,
    key: str,
    *,
    run: int | None,
    reason: str | None,
    url: str,
    token: str | None,
    as_json: bool,
    **more: object,
) -> None:
    from sagaloom.cli.output import print_json

    body = more if reason is None else {"reason": reason, **more}
    with ApiClient(url, token) as api:
        answer = api.post(f"{instance_path(saga, key)}/{verb}", body or None, run=run)
    if as_json:
        print_json(answer)
        return
    status = f"{answer['status']}, paused" if answer["isPaused"] else answer["status"]
    why = answer["control"].get("reason")
    print(f"{answer['instanceId']} is {status} at revision {answer['version']}" + (f": {why}" if why else ""))
    if undoing := answer.get("undoing"):
        print(f"  {told_undoing(undoing)}")


def told_undoing(undoing: Mapping[str, Any]) -> str:
    """What is left to undo, in one line."""
    letter = undoing.get("deadLetterId")
    then = f"dead letter {letter}: redrive it, or skip the step" if letter else "tried again by itself"
    return f"undoing {undoing['nextStep']} fails ({undoing['error']}), {undoing['stepsLeft']} to undo; {then}"


def add_dead_letter_commands(dead_letters_app: typer.Typer) -> None:
    """`redrive` and `discard`, for one dead letter or many."""

    @dead_letters_app.command("redrive")
    def dead_letters_redrive(
        letters: DeadLetterIds = None,
        saga: OfSaga = None,
        key: OfKey = None,
        all: All = False,
        limit: Limit = 100,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Try again, oldest first: a message enters anew, an effect leaves and its lane goes on."""
        wanted = _Wanted(letters or [], saga=saga, key=key, is_all=all, limit=limit)
        _repair("redrive", "redriven", wanted, url=url, token=token, as_json=as_json)

    @dead_letters_app.command("discard")
    def dead_letters_discard(
        letters: DeadLetterIds = None,
        saga: OfSaga = None,
        key: OfKey = None,
        all: All = False,
        limit: Limit = 100,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Give up for good: an idempotency key is free again, a lane goes on without its effect."""
        wanted = _Wanted(letters or [], saga=saga, key=key, is_all=all, limit=limit)
        _repair("discard", "discarded", wanted, url=url, token=token, as_json=as_json)


class _Wanted:
    """Which dead letters a command is about; raises `CommandFailed` unless it says so in one way."""

    def __init__(self, ids: Sequence[str], *, saga: str | None, key: str | None, is_all: bool, limit: int) -> None:
        has_filter = saga is not None or key is not None
        if bool(ids) + has_filter + is_all != 1:
            raise CommandFailed(
                "say which dead letters, in one way: their ids, or --saga and --key, or --all", exit_code=2
            )
        self.only = ids[0] if len(ids) == 1 else None
        self.body: dict[str, object] = {"ids": list(ids)} if ids else {"limit": limit}
        if saga is not None:
            self.body["sagaName"] = saga
        if key is not None:
            self.body["correlationKey"] = key
        if is_all:
            self.body["all"] = True


def _repair(verb: str, done: str, wanted: _Wanted, *, url: str, token: str | None, as_json: bool) -> None:
    from sagaloom.cli.output import print_json

    with ApiClient(url, token) as api:
        if wanted.only is not None:
            answer = api.post(f"/dead-letters/{quote(wanted.only, safe='')}/{verb}")
        else:
            answer = api.post(f"/dead-letters/{verb}", wanted.body)
    if as_json:
        print_json(answer)
    elif wanted.only is not None:
        print(f"{done}: {answer['type']} of {answer['sagaName']}:{answer['correlationKey']}")
    else:
        _print_bulk(done, answer)
    if wanted.only is None and answer["failed"]:
        count = answer["failed"]
        raise CommandFailed(f"{count} {'was' if count == 1 else 'were'} not {done}; the rest was")


def _print_bulk(done: str, answer: Mapping[str, Any]) -> None:
    from sagaloom.cli.output import print_table

    print(f"{done}: {answer['done']}" + (", and more match: run it again" if answer["hasMore"] else ""))
    if answer["troubles"]:
        print_table(
            ("id", "code", "reason"), [(one["id"], one["code"], one["message"]) for one in answer["troubles"]], empty=""
        )
