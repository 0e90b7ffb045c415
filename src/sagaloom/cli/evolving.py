"""The commands for sagas as a whole: pause, disable, migrate, and replay a history against new code."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final
from urllib.parse import quote

import msgspec
import typer

from sagaloom.cli.client import DEFAULT_URL, ApiClient, CommandFailed, instance_path
from sagaloom.cli.options import AsJson, Key, Run, Saga, Token, Url

if TYPE_CHECKING:
    from sagaloom.engine.records import HistoryEntry, Instance, StepRecord
    from sagaloom.engine.replaying import Replayed

__all__ = ["add_saga_commands"]

_PAGE: Final = 200
Reason = Annotated[str | None, typer.Option("--reason", help="Why: for the log, and for whoever is refused.")]


def add_saga_commands(app: typer.Typer, sagas_app: typer.Typer) -> None:
    """`sagas pause|resume|disable|enable`, `migrate` and `replay`."""

    @sagas_app.command("pause")
    def sagas_pause(
        saga: Saga, reason: Reason = None, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False
    ) -> None:
        """Have all instances of a saga wait, those that have not begun too; messages are accepted."""
        _stand("pause", saga, reason, url=url, token=token, as_json=as_json)

    @sagas_app.command("resume")
    def sagas_resume(
        saga: Saga, reason: Reason = None, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False
    ) -> None:
        """Let a paused saga go on with what has waited."""
        _stand("resume", saga, reason, url=url, token=token, as_json=as_json)

    @sagas_app.command("disable")
    def sagas_disable(
        saga: Saga, reason: Reason = None, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False
    ) -> None:
        """Have all instances of a saga wait, and refuse new messages for it."""
        _stand("disable", saga, reason, url=url, token=token, as_json=as_json)

    @sagas_app.command("enable")
    def sagas_enable(
        saga: Saga, reason: Reason = None, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False
    ) -> None:
        """Take new messages for a saga again, and go on with what has waited."""
        _stand("enable", saga, reason, url=url, token=token, as_json=as_json)

    @app.command("migrate")
    def migrate(
        saga: Annotated[str | None, typer.Argument(help="The saga; all of them without.", show_default=False)] = None,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Bring live instances of older versions up to date now, instead of when their next message comes."""
        _migrate(saga, url=url, token=token, as_json=as_json)

    @app.command("replay")
    def replay(
        module: Annotated[str, typer.Argument(help="The new code: a saga module, or a file.")],
        saga: Saga,
        key: Key,
        run: Run = None,
        url: Url = DEFAULT_URL,
        token: Token = None,
        as_json: AsJson = False,
    ) -> None:
        """Decide the history of an instance once more, with the code of MODULE, and show what would be different.

        The history comes from the server, and has to be of tier t2 or above. Nothing is changed. Ends with exit code 1
        when something differs."""
        _replay(module, saga, key, run=run, url=url, token=token, as_json=as_json)


def _stand(verb: str, saga: str, reason: str | None, *, url: str, token: str | None, as_json: bool) -> None:
    from sagaloom.cli.output import print_json

    with ApiClient(url, token) as api:
        answer = api.post(f"/sagas/{quote(saga, safe='')}/{verb}", {"reason": reason} if reason else None)
    if as_json:
        print_json(answer)
        return
    status = "enabled" if answer["enabled"] else "disabled"
    why = answer["control"].get("reason")
    print(f"{saga} is {status}{', paused' if answer['paused'] else ''}" + (f": {why}" if why else ""))


def _migrate(saga: str | None, *, url: str, token: str | None, as_json: bool) -> None:
    from sagaloom.cli.output import print_json, print_table

    report: dict[str, dict[str, Any]] = {}
    with ApiClient(url, token) as api:
        names = [saga] if saga is not None else [one["id"] for one in api.get("/sagas", limit=1000)["sagas"]]
        for name in names:
            total: dict[str, Any] = {"migrated": 0, "left": 0, "troubles": []}
            cursor: str | None = None
            while True:
                body = {"limit": _PAGE, "cursor": cursor}
                page = api.post(f"/sagas/{quote(name, safe='')}/migrate", body)
                total["migrated"] += page["migrated"]
                total["troubles"] += page["troubles"]
                total["left"], cursor = page["left"], page["cursor"]
                print(f"{name}: {total['migrated']} migrated, {total['left']} left", file=sys.stderr, flush=True)
                if cursor is None:
                    break
            report[name] = total
    if as_json:
        print_json(report)
    else:
        print_table(
            ("saga", "migrated", "left"),
            [(name, total["migrated"], total["left"]) for name, total in report.items()],
            empty="no sagas are loaded",
        )
        for total in report.values():
            for trouble in total["troubles"]:
                print(f"{trouble['id']}: {trouble['message']}")
    failed = sum(len(total["troubles"]) for total in report.values())
    if failed:
        raise CommandFailed(f"{failed} {'instance was' if failed == 1 else 'instances were'} not migrated")


def _replay(module: str, saga: str, key: str, *, run: int | None, url: str, token: str | None, as_json: bool) -> None:
    from sagaloom.cli.output import print_json
    from sagaloom.engine.replaying import replay
    from sagaloom.registry import load_definitions

    definition = next((one for one in load_definitions([module]).definitions if one.id == saga), None)
    if definition is None:
        raise CommandFailed(f"{module} has no saga {saga!r}")
    with ApiClient(url, token) as api:
        shown = api.get(instance_path(saga, key), run=run)
        instance = _instance_of(shown)
        replayed = list(replay(definition, instance, _entries(api, saga, key, shown["run"])))
    differing = [one for one in replayed if one.differences]
    if as_json:
        print_json({"replayed": len(replayed), "differing": [_told(one) for one in differing]})
    else:
        for one in differing:
            _print_difference(one)
        print(f"{len(replayed)} messages replayed, {len(differing)} decided differently")
    if differing:
        raise typer.Exit(1)


def _told(one: Replayed) -> dict[str, Any]:
    return {
        "entryNo": one.entry.entry_no,
        "messageType": one.entry.type,
        "stateBefore": one.before,
        "differences": [
            {"what": each.what, "recorded": each.recorded, "decided": each.decided} for each in one.differences
        ],
    }


def _print_difference(one: Replayed) -> None:
    def text(value: object) -> str:
        return value if isinstance(value, str) else msgspec.json.encode(value).decode()

    print(f"entry {one.entry.entry_no}, {one.entry.type} at {one.entry.at.isoformat()}")
    print(f"  state before: {text(one.before)}")
    for each in one.differences:
        print(f"  {each.what} then: {text(each.recorded)}")
        print(f"  {each.what} now:  {text(each.decided)}")


def _entries(api: ApiClient, saga: str, key: str, run: int) -> Iterator[HistoryEntry]:
    after: int | None = 0
    while after is not None:
        page = api.get(f"{instance_path(saga, key)}/history", run=run, limit=_PAGE, after=after)
        for one in page["history"]:
            yield _entry_of(one)
        after = page["cursor"]


def _instance_of(shown: Mapping[str, Any]) -> Instance:
    from sagaloom.engine.records import Instance, ParentLink

    parent = shown.get("parent")
    link = None
    if parent is not None:
        link = ParentLink(parent["sagaName"], parent["correlationKey"], parent["run"], "")
    return Instance(
        shown["sagaId"],
        shown["correlationKey"],
        0,
        shown["run"],
        shown["status"],
        shown["version"],
        b"null",
        1,
        shown["durabilityTier"],
        _moment(shown["createdAt"]),
        _moment(shown["updatedAt"]),
        parent=link,
    )


def _entry_of(shown: Mapping[str, Any]) -> HistoryEntry:
    from sagaloom.engine.records import HistoryEntry

    def state(name: str) -> bytes | None:
        value = shown.get(name)
        return None if value is None else msgspec.json.encode(value)

    return HistoryEntry(
        shown["entryNo"],
        shown["revision"],
        shown["disposition"],
        shown["messageType"],
        shown["messageId"],
        _moment(shown["transitionAt"]),
        shown["previousStatus"],
        shown["newStatus"],
        tuple(_step_of(step) for step in shown["steps"]),
        shown["attempt"],
        msgspec.json.encode(shown["payload"]),
        shown.get("reason"),
        shown["origin"],
        shown.get("causationId"),
        shown.get("traceparent"),
        shown.get("tracestate"),
        state("previousState"),
        state("newState"),
        shown["definitionVersion"],
    )


def _step_of(shown: Mapping[str, Any]) -> StepRecord:
    from sagaloom.engine.records import EffectSummary, StepRecord

    effects = tuple(
        EffectSummary(one["kind"], one.get("target"), one.get("effectKey"), one.get("detail"))
        for one in shown["effects"]
    )
    return StepRecord(shown["phase"], shown["type"], shown["status"], effects)


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
