"""`sagaloom check` and `sagaloom diagram`: what can be said of sagas before they run."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from sagaloom.cli.client import CommandFailed
from sagaloom.cli.options import AsJson, Modules

if TYPE_CHECKING:
    from sagaloom.checks import Finding
    from sagaloom.definitions import SagaDefinition
    from sagaloom.registry import LoadedModules
    from sagaloom.settings import StorePlace

__all__ = ["add_check_commands"]

_OWN: Final = str(Path(__file__).parents[1])
_KINDS: Final = ("service", "job", "queue")


def add_check_commands(app: typer.Typer) -> None:
    app.command("check")(check)
    app.command("diagram")(diagram)


def check(
    modules: Modules = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail for warnings too, not for errors alone.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Leave notes out.")] = False,
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="STORE",
            help="Look into this store, too: a file, an address (postgresql://...), kv or sql. By default the one that "
            "NETSCRIPT_SAGA_STORE or appsettings.json names.",
            show_default=False,
        ),
    ] = None,
    no_store: Annotated[bool, typer.Option("--no-store", help="Look into no store.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong with the sagas of the given modules: messages that nobody handles, handlers that nothing
    reaches, statuses that nothing leaves; and, in a store, live instances that this code could not go on with.

    They are taken to be all that run together. It reads the source of handlers, and says where it cannot. Of a store it
    reads what lives there: versions that no migration leads from, states that cannot be read or migrated, sagas that
    are not loaded any more. Nothing is changed. It exits with 1 when it finds an error."""
    from sagaloom.checks import LEVELS

    if store is not None and no_store:
        raise CommandFailed("--store and --no-store contradict each other: leave one of them out", exit_code=2)
    place = None if no_store else _place(store)
    found, definitions = _findings(modules or [])
    ids = [each.id for each in definitions]
    looked: dict[str, Any] | None = None
    if place is not None:
        living, live = _living(place, definitions, is_asked_for=store is not None)
        # A saga that does not build is not gone: its module was named, and has an error of its own.
        is_whole = all(one.code != "does-not-build" for one in found)
        found += [one for one in living if is_whole or one.code != "saga-not-loaded"]
        looked = {"place": str(place), "live": live}
    shown = [one for one in found if not (quiet and one.level == "note")]
    counts: dict[str, int] = {level: sum(one.level == level for one in found) for level in LEVELS}
    if as_json:
        _print_json(shown, ids, counts, looked)
    else:
        _print_findings(shown)
        print(f"{len(ids)} sagas: " + ", ".join(f"{counts[level]} {level}s" for level in LEVELS), file=sys.stderr)
        if looked is not None and looked["live"] is not None:
            print(f"{looked['place']}: live instances: {looked['live']}", file=sys.stderr)
    if counts["error"] or (strict and counts["warning"]):
        raise typer.Exit(1)


def diagram(
    modules: Modules = None,
    saga: Annotated[
        str | None, typer.Option("--saga", help="Only this one; by default each after the other.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the sagas of the given modules as Mermaid flowcharts: what starts them, what messages lead to, how they end.

    With --json it prints the graph itself, as the API has it."""
    from sagaloom.cli.output import print_json
    from sagaloom.describe import describe
    from sagaloom.graph import mermaid
    from sagaloom.registry import load_definitions

    loaded = load_definitions(modules or [])
    chosen = [each for each in loaded.definitions if saga in (None, each.id)]
    if not chosen:
        names = ", ".join(each.id for each in loaded.definitions)
        raise CommandFailed(f"there is no saga {saga!r} in {', '.join(loaded.modules)}: there are {names}")
    if as_json:
        print_json({each.id: describe(each)["graph"] for each in chosen})
        return
    for each in chosen:
        if len(chosen) > 1:
            print(f"%% {each.id}")
        print(mermaid(each))


def _place(said: str | None) -> StorePlace | None:
    """Which store is meant: by the option, else by the environment, which need not name any."""
    from sagaloom.discovery import load_appsettings, named_saga_store_backend
    from sagaloom.settings import StorePlace, load_settings

    if said is None:
        return load_settings().place if named_saga_store_backend(os.environ, load_appsettings()) else None
    if said.lower() in ("kv", "sql", "prisma"):
        return load_settings(store=said).place
    return StorePlace(url=said) if "://" in said else StorePlace(kv_path=Path(said))


def _living(
    place: StorePlace, definitions: Sequence[SagaDefinition[Any]], *, is_asked_for: bool
) -> tuple[tuple[Finding, ...], int | None]:
    """What is found in a store, and how many instances are live; None when there is no store yet."""
    from sagaloom.cli.live_checks import LiveReport, check_live
    from sagaloom.cli.looking import CannotLook, opened_to_look

    async def look() -> LiveReport:
        async with opened_to_look(place) as store:
            return await check_live(store, definitions, where=str(place))

    try:
        return asyncio.run(look())
    except CannotLook as error:
        if error.is_absent and not is_asked_for:
            print(error.message, file=sys.stderr)
            return (), None
        raise CommandFailed(f"{error.message}: {error.repair}" + ("" if is_asked_for else "; or --no-store")) from error


def _findings(modules: Sequence[str]) -> tuple[list[Finding], Sequence[SagaDefinition[Any]]]:
    from sagaloom.checks import check_sagas
    from sagaloom.errors import ConfigurationError, DefinitionError
    from sagaloom.registry import load_definitions, load_modules, named_modules

    broken: list[Finding] = []
    sound: list[str] = []
    for name in named_modules(modules):
        try:
            load_modules([name])
        except ConfigurationError as error:
            if not isinstance(error.__cause__, DefinitionError):
                raise
            broken.append(_that_does_not_build(error.__cause__))
        else:
            sound.append(name)
    loaded: LoadedModules | None = load_definitions(sound) if sound else None
    definitions = loaded.definitions if loaded is not None else ()
    kinds = {*_KINDS, *(target.kind for target in (loaded.targets if loaded is not None else ()))}
    return [*broken, *check_sagas(definitions, target_kinds=kinds)], definitions


def _that_does_not_build(error: Exception) -> Finding:
    from sagaloom.checks import Finding
    from sagaloom.foresight import Place

    places = [
        Place(frame.filename, frame.lineno or 0)
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_OWN, "<"))
    ]
    said = str(error)
    what, _, remedy = said.rpartition(": ") if ": " in said else (said, "", "")
    return Finding(
        level="error",
        code="does-not-build",
        saga="",
        place=places[-1] if places else Place("<unknown>", 0),
        message=said,
        remedy=remedy or what,
    )


def _print_findings(found: Sequence[Finding]) -> None:
    from rich.markup import escape

    from sagaloom.cli.output import console

    out = console()
    colour = {"error": "red", "warning": "yellow", "note": "dim"}
    for one in found:
        about = f"{one.saga}: " if one.saga else ""
        out.print(f"{escape(str(one.place))}: [{colour[one.level]}]{one.level}[/] {one.code}", soft_wrap=True)
        out.print(f"    {escape(about + one.message)}", soft_wrap=True)
        if one.code != "does-not-build":
            out.print(f"    remedy: {escape(one.remedy)}", soft_wrap=True)


def _print_json(
    found: Sequence[Finding], ids: Sequence[str], counts: dict[str, int], looked: dict[str, Any] | None
) -> None:
    from sagaloom.cli.output import print_json

    print_json(
        {
            "sagas": list(ids),
            "store": looked,
            "findings": [
                {
                    "level": one.level,
                    "code": one.code,
                    "saga": one.saga or None,
                    "file": one.place.file,
                    "line": one.place.line,
                    "message": one.message,
                    "remedy": one.remedy,
                }
                for one in found
            ],
            **{f"{level}s": count for level, count in counts.items()},
        }
    )
