"""`sagaloom check` and `sagaloom diagram`: what can be said of sagas before they run. Neither opens a store."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from sagaloom.cli.client import CommandFailed
from sagaloom.cli.options import AsJson, Modules

if TYPE_CHECKING:
    from sagaloom.checks import Finding
    from sagaloom.registry import LoadedModules

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
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong with the sagas of the given modules: messages that nobody handles, handlers that nothing
    reaches, statuses that nothing leaves.

    They are taken to be all that run together. It reads the source of handlers, and says where it cannot. It exits with
    1 when it finds an error."""
    from sagaloom.checks import LEVELS

    found, ids = _findings(modules or [])
    shown = [one for one in found if not (quiet and one.level == "note")]
    counts: dict[str, int] = {level: sum(one.level == level for one in found) for level in LEVELS}
    if as_json:
        _print_json(shown, ids, counts)
    else:
        _print_findings(shown)
        print(f"{len(ids)} sagas: " + ", ".join(f"{counts[level]} {level}s" for level in LEVELS), file=sys.stderr)
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


def _findings(modules: Sequence[str]) -> tuple[list[Finding], list[str]]:
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
    return [*broken, *check_sagas(definitions, target_kinds=kinds)], [each.id for each in definitions]


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


def _print_json(found: Sequence[Finding], ids: Sequence[str], counts: dict[str, int]) -> None:
    from sagaloom.cli.output import print_json

    print_json(
        {
            "sagas": list(ids),
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
