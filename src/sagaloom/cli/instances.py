"""The commands by which one looks at sagas and instances: lists, one of them, what it did, and what happens now.

What changes them is in `sagaloom.cli.operating` and `sagaloom.cli.evolving`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from sagaloom.cli.client import DEFAULT_URL, ApiClient, instance_path
from sagaloom.cli.options import AsJson, Key, Limit, Run, Saga, Token, Topic, Url

__all__ = ["instances_app", "sagas_app"]

sagas_app = typer.Typer(help="The sagas a server has loaded.", no_args_is_help=True)
instances_app = typer.Typer(help="Running and finished instances.", no_args_is_help=True)


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

    from sagaloom.cli.output import print_one

    with ApiClient(url, token) as api:
        print_one(api.get(f"/sagas/{quote(saga, safe='')}"), as_json=as_json)


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
    from sagaloom.cli.output import print_json, print_next_page, print_table

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
    print_next_page(answer)


@instances_app.command("show")
def instances_show(
    saga: Saga, key: Key, run: Run = None, url: Url = DEFAULT_URL, token: Token = None, as_json: AsJson = False
) -> None:
    """Show one instance with its state."""
    from sagaloom.cli.output import print_one

    with ApiClient(url, token) as api:
        print_one(api.get(instance_path(saga, key), run=run), as_json=as_json)


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
    from sagaloom.cli.output import print_json, print_next_page, print_table

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
    print_next_page(answer)


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


def _effect_text(effect: Mapping[str, Any]) -> str:
    target = effect.get("target")
    return f"{effect['kind']} {target}" if target else str(effect["kind"])
