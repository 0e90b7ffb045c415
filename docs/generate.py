"""Writes the pages that are read off the code: `python docs/generate.py`, which `make docs` runs first.

    concepts/life.svg            the status table of the engine, as a picture
    concepts/sagas.md            the same as a table, between two marks in a page that people wrote
    howto/limits.md              the tables of limits and options, between such marks
    reference/errors.md          the table of the errors, between such marks
    reference/command-line.md    from the commands themselves
    reference/http-api.md        from the OpenAPI document that a server answers with
    reference/jobs-api.md        likewise, for jobs
    reference/proofs.md          from the builder, the effects and the examples

They are kept in the repository, so that they can be read where nothing is built; a test compares them with the code.
"""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.sax.saxutils import escape

import msgspec

from sagaloom import errors
from sagaloom.definitions import SAGA_INSTANCE_STATUSES
from sagaloom.engine.lifecycle import HAPPENINGS, STATUS_TABLE, is_terminal
from sagaloom.engine.limits import Limits
from sagaloom.runtime.options import RuntimeOptions

DOCS: Final = Path(__file__).parent
_NOTE: Final = "<!-- Written by docs/generate.py: run `make docs` after a change of the code. -->\n"


def generated() -> dict[Path, str]:
    """Every generated file with its content."""
    sagas, mistakes = DOCS / "concepts" / "sagas.md", DOCS / "reference" / "errors.md"
    bounds = DOCS / "howto" / "limits.md"
    return {
        DOCS / "concepts" / "life.svg": life_svg(),
        sagas: with_region(sagas.read_text(encoding="utf-8"), "status table", status_table()),
        mistakes: with_region(mistakes.read_text(encoding="utf-8"), "errors", error_table()),
        bounds: with_region(
            with_region(bounds.read_text(encoding="utf-8"), "limits", limits_table()), "options", options_table()
        ),
        DOCS / "reference" / "command-line.md": command_line(),
        DOCS / "reference" / "http-api.md": http_api(),
        DOCS / "reference" / "jobs-api.md": jobs_api(),
        DOCS / "reference" / "proofs.md": proofs(),
    }


def with_region(page: str, name: str, content: str) -> str:
    """`page` with `content` between the marks `<!-- begin: name -->` and `<!-- end: name -->`."""
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"a page has no {begin} with an {end} behind it")
    return f"{before}{begin}\n{content}{end}{after}"


# --- The life of an instance -----------------------------------------------------------------------------------------


def status_table() -> str:
    """One row a status, one column a happening, from the engine's own table."""
    rows = [
        [
            f"`{status}`",
            *(f"`{STATUS_TABLE[status, each]}`" if (status, each) in STATUS_TABLE else "" for each in HAPPENINGS),
        ]
        for status in SAGA_INSTANCE_STATUSES
    ]
    return _table(["", *HAPPENINGS], rows)


_BOX: Final = (128, 40)
_COLUMNS: Final = (84, 340, 640)


def life_svg() -> str:
    """The status table as a picture: how a life begins on the left, how it ends on the right."""
    reached = set(STATUS_TABLE.values())
    columns: list[list[str]] = [
        [status for status in SAGA_INSTANCE_STATUSES if status not in reached],
        [status for status in SAGA_INSTANCE_STATUSES if status in reached and not is_terminal(status)],
        [status for status in SAGA_INSTANCE_STATUSES if is_terminal(status)],
    ]
    places: dict[str, tuple[int, int]] = {}
    for x, statuses in zip(_COLUMNS, columns, strict=True):
        step = 260 // max(1, len(statuses) - 1) if len(statuses) > 1 else 0
        for row, status in enumerate(statuses):
            places[status] = (x, 90 + row * step)
    joined: dict[tuple[str, str], list[str]] = {}
    for (before, happening), after in STATUS_TABLE.items():
        joined.setdefault((before, after), []).append(happening)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 490" role="img" font-family="sans-serif" '
        'aria-labelledby="title"><title id="title">The statuses of an instance, and what leads from one to the '
        "other</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#4a5568"/></marker></defs>',
        '<rect width="740" height="490" rx="8" fill="#ffffff"/>',
    ]
    labels: list[str] = []
    for (before, after), happenings in joined.items():
        path, at = _edge(places[before], places[after])
        lines.append(f'<path d="{path}" fill="none" stroke="#4a5568" stroke-width="1.4" marker-end="url(#tip)"/>')
        labels += _label(", ".join(happenings), at)
    for status, (x, y) in places.items():
        fill = "#e2e8f0" if is_terminal(status) else "#d6eaf8"
        width, height = _BOX
        lines.append(
            f'<rect x="{x - width // 2}" y="{y - height // 2}" width="{width}" height="{height}" rx="20" '
            f'fill="{fill}" stroke="#4a5568" stroke-width="{2.5 if is_terminal(status) else 1}"/>'
        )
        lines.append(_text(status, (x, y + 5), size=15))
    return "\n".join([*lines, *labels, "</svg>"]) + "\n"


def _edge(source: tuple[int, int], target: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """The path from one box to the other, and where its label goes."""
    (x1, y1), (x2, y2) = source, target
    half_width, half_height = _BOX[0] // 2, _BOX[1] // 2
    if source == target:
        is_high = y1 < 200
        edge = y1 - half_height if is_high else y1 + half_height
        far = edge - 46 if is_high else edge + 46
        return f"M{x1 - 26} {edge}C{x1 - 40} {far} {x1 + 40} {far} {x1 + 26} {edge}", (x1, far + (2 if is_high else 0))
    if x1 == x2:
        return f"M{x1} {y1 + half_height}L{x2} {y2 - half_height}", (x1, (y1 + y2) // 2)
    if _COLUMNS.index(x2) - _COLUMNS.index(x1) > 1:
        return f"M{x1} {y1 + half_height}C{x1} 540 {x2 - 100} 540 {x2} {y2 + half_height}", (x1 + 33, 310)
    start, end = x1 + half_width, x2 - half_width
    part = 0.5 if y1 == y2 else 0.34
    y2 += (y1 > y2) * 9 - (y1 < y2) * 9  # so that the tips of two arrows do not hide each other
    return f"M{start} {y1}L{end} {y2}", (round(start + (end - start) * part), round(y1 + (y2 - y1) * part))


def _label(text: str, at: tuple[int, int]) -> list[str]:
    width = 8 + 7 * len(text)
    box = f'<rect x="{at[0] - width // 2}" y="{at[1] - 9}" width="{width}" height="18" fill="#ffffff"/>'
    return [box, _text(text, (at[0], at[1] + 4), size=13)]


def _text(text: str, at: tuple[int, int], *, size: int) -> str:
    return f'<text x="{at[0]}" y="{at[1]}" font-size="{size}" text-anchor="middle" fill="#1a202c">{escape(text)}</text>'


# --- Limits ----------------------------------------------------------------------------------------------------------

_LIMITS: Final = {
    "payload_bytes_max": "a message's payload, as JSON",
    "state_bytes_max": "a state, as JSON",
    "effects_max": "effects of one decision, compensations included",
    "effects_bytes_max": "the payloads of one decision's effects together",
    "compensation_depth_max": "compensations that ask for compensations",
    "hops_max": "messages that follow from one, from saga to saga: more is taken for a circle",
    "batch_messages_max": "messages in one batch",
    "timers_per_instance_max": "timers that wait for one run",
    "bystander_rows_max": "messages that changed nothing, in the history of one run; more are only counted",
}
_OPTIONS: Final = {
    "batch_max": "messages that are committed together",
    "dispatch_concurrency": "effects that are under way at once",
    "dispatch_timeout_seconds": "how long a target may take for one effect",
    "drain_seconds": "how long a stop waits for what is under way; the rest goes on at the next start",
    "backlog_max": "messages that wait in memory; further ones are refused as retryable (`SAGA_OVERLOADED`)",
    "backlog_bytes_max": "their payloads; more are refused in the same way",
    "cache_bytes_max": "hot instances that are kept in memory",
    "lease_seconds": "after how long others take over from a process that neither runs nor dies",
    "wait_seconds_max": "how long a `wait=` may last",
    "feed_retention_hours": "how long an event of the feed is kept",
    "idempotency_days": "for how long a message that comes again is a duplicate",
    "feed_retention_events": "events that the feed keeps",
}
_NO_NUMBERS: Final = {"effect_retry", "limits", "on_step", "works"}


def limits_table() -> str:
    """The limits of a runtime with their defaults. One that nobody has explained here is a KeyError."""
    rows = [
        [f"`{name}`", _amount(name, value), _LIMITS[name]] for name, value in msgspec.structs.asdict(Limits()).items()
    ]
    return _table(["limit", "default", "of what"], rows)


def options_table() -> str:
    """The bounds among the options of a runtime, likewise."""
    options = RuntimeOptions()
    names = [field.name for field in dataclasses.fields(options) if field.name not in _NO_NUMBERS]
    rows = [[f"`{name}`", _amount(name, getattr(options, name)), _OPTIONS[name]] for name in names]
    return _table(["option", "default", "what it bounds"], rows)


def _amount(name: str, value: float) -> str:
    return f"{int(value) >> 20} MiB" if "_bytes_" in name else f"{value:,.16g}"


# --- Errors ----------------------------------------------------------------------------------------------------------


def error_table() -> str:
    """One row an error: its code, whether the same call may succeed later, and what it means."""
    classes: list[type[errors.SagasError]] = [getattr(errors, name) for name in errors.__all__]
    rows = [
        [f"`{each.__name__}`", f"`{each.default_code}`", "yes" if each.default_retryable else "", _first_sentence(each)]
        for each in classes
        if each is not errors.SagasError
    ]
    return _table(["error", "code, unless it says another", "retry", "what it means"], rows)


def _first_sentence(documented: object) -> str:
    return _escaped((getattr(documented, "__doc__", None) or "").partition("\n\n")[0])


# --- The command line ------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every command with its arguments and options."""
    import typer.main

    from sagaloom.cli.app import app

    root: Any = typer.main.get_command(app)
    root_context = root.make_context("sagaloom", [], resilient_parsing=True)
    page = [
        "# Command line\n",
        _NOTE,
        f"{root.help}\n",
        "A command that asks a server finds it at `--url`. With `--json` it prints JSON and nothing else. What goes "
        "wrong is said in one line on stderr, and the exit code is then not 0. `sagaloom COMMAND --help` says what "
        "stands here.\n",
    ]
    commands = list(_commands(root, root_context))
    page.append(
        _table(
            ["command", "what it does"],
            [[f"[`{path}`](#{_slug(path)})", about(command)] for path, command, _ in commands],
        )
    )
    for path, command, context in commands:
        page.append(f"## `{path}`\n")
        page.append(f"{command.help}\n")
        pieces = [piece for each in command.params for piece in each.get_usage_pieces(context)]
        page.append(f"```text\n{' '.join([path, '[OPTIONS]', *pieces])}\n```\n")
        rows = [_parameter(each, context) for each in command.params if not each.hidden]
        page.append(_table(["argument or option", "value", "what it says"], rows))
    return "\n".join(page)


def about(command: Any) -> str:
    return str(command.help).partition("\n\n")[0].replace("\n", " ")


def _commands(group: Any, context: Any) -> Iterable[tuple[str, Any, Any]]:
    for name, command in group.commands.items():
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        if hasattr(command, "commands"):
            yield from _commands(command, inner)
        else:
            yield inner.command_path, command, inner


def _parameter(parameter: Any, context: Any) -> list[str]:
    (written, said) = parameter.get_help_record(context)
    name, _, kind = written.rpartition(" <")
    name = name or written
    value = "" if getattr(parameter, "is_flag", False) else kind.rstrip(">").removeprefix("list[").rstrip("]")
    return [f"`{name}`", value.replace("str", "text").replace("int range", "number"), _escaped(" ".join(said.split()))]


# --- Proofs ----------------------------------------------------------------------------------------------------------


def proofs() -> str:
    """Every method of the builder and every effect, with the stories that use it and the stores they are told on."""
    sys.path.insert(0, str(DOCS.parent))
    try:
        from tests.examples.stories import STORES, STORIES
    finally:
        sys.path.pop(0)
    used = {name: words_used(DOCS.parent / "examples" / f"{name}.py") for name in STORIES}
    page = [
        "# What is proven, and where\n",
        _NOTE,
        "Each story of `examples/` is told by `make examples` on every store named here: as it should be; stopped in "
        "process before and behind each of its commits; and with five real `kill -9`. Each time it ends as it does "
        "when nobody stops it, the services have been asked for each thing once, and the store breaks no invariant. "
        "The test is `tests/examples/test_stories.py`; in brackets is the name of the case.\n",
    ]
    for title, words in (("Methods of the builder", builder_methods()), ("Effects", effect_helpers())):
        rows = []
        for word, shown in words.items():
            stories = [name for name in STORIES if word in used[name]]
            cases = ", ".join(f"`[{name}]`" for name in stories)
            rows.append([f"`{shown}`", cases or "not there yet", ", ".join(STORES.values()) if stories else ""])
        page += [f"## {title}\n", _table(["what", "the stories that prove it", "on"], rows)]
    page.append(
        "## What makes no sense\n\n"
        "A query that meddles or awaits, a signal to nobody or too late, a command in vain, a cancel during an "
        "unwinding, an invariant or a migration that raises, a child that nobody knows: each is answered alike by the "
        "runtime, over HTTP and on the command line, on a file and on PostgreSQL, and changes nothing. The test is "
        "`tests/doors/test_bad_input.py`.\n"
    )
    return "\n".join(page)


def builder_methods() -> dict[str, str]:
    """The methods of the builder, with how they are shown."""
    from sagaloom import builder

    stages = (builder.SagaDraft, builder.SagaWithState, builder.SagaWithHandlers)
    names = [name for stage in stages for each in reversed(stage.__mro__) for name in vars(each) if name[0] != "_"]
    return {f".{name}": f".{name}(...)" for name in dict.fromkeys(names)}


def effect_helpers() -> dict[str, str]:
    """What makes effects, with how it is shown."""
    from sagaloom import effects

    names = [name for name in effects.__all__ if name[0].islower()]
    return {**{name: f"{name}(...)" for name in names}, "ALL_STEPS": "saga_compensate(ALL_STEPS)"}


def words_used(file: Path) -> set[str]:
    """The methods of the builder that a program calls on a saga it defines, as `.on`, and the functions it calls."""
    used: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(attr=name)) if _is_about_a_saga(node):
                used.add(f".{name}")
            case ast.Call(func=ast.Name(id=name)) | ast.Name(id="ALL_STEPS" as name):
                used.add(name)
            case _:
                pass
    return used


def _is_about_a_saga(node: ast.expr) -> bool:
    while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        node = node.func.value
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "define_saga"


# --- The HTTP API ----------------------------------------------------------------------------------------------------


def http_api() -> str:
    """Every route and every shape of the API of sagas, on port 8092."""
    from sagaloom.cli.document import api_document

    return _api_page(
        "HTTP API",
        "The API of `sagaloom serve` and `sagaloom dev`, on port 8092 unless you say otherwise. A running server "
        "shows the same at `/api/docs`, and as an OpenAPI document at `/api/openapi.json`; `sagaloom openapi` prints "
        "that without one.\n\n"
        "With a token every route but `/health/live` wants `Authorization: Bearer <token>`. Names are camelCase, times "
        "ISO 8601 in UTC, and what is not known is left out. `sagaName` is the saga's id; `correlationId` and "
        "`correlationKey` are two spellings of one key.",
        api_document(needs_token=True),
    )


def jobs_api() -> str:
    """Every route and every shape of the API of jobs, on port 8091."""
    return _api_page(
        "HTTP API of jobs",
        "The API of `sagaloom jobs serve`, on port 8091 unless you say otherwise. A running server shows the same at "
        "`/api/docs`, and as an OpenAPI document at `/api/openapi.json`. What is said of tokens, names and times on "
        "the page of the [API of sagas](http-api.md) holds here, too.",
        asyncio.run(_jobs_document()),
    )


async def _jobs_document() -> dict[str, Any]:
    """The document as a server with a token answers it."""
    import httpx2

    from sagaloom.kv import MemoryKeyValue
    from sagaloom.stores.kv_jobs import KvJobRunStore
    from sagaloom.workers import JobRuntime, create_jobs_app

    app = create_jobs_app(JobRuntime(KvJobRunStore(MemoryKeyValue()), jobs=[]), token="any")
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://localhost") as client:
        response = await client.get("/api/openapi.json", headers={"Authorization": "Bearer any"})
        return dict(response.raise_for_status().json())


def _api_page(title: str, introduction: str, document: Mapping[str, Any]) -> str:
    shapes: dict[str, Any] = document["components"]["schemas"]
    page = [f"# {title}\n", _NOTE, f"{introduction}\n", f"{document['info']['description']}\n"]
    operations = [
        (method.upper(), path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    for tag in document["tags"]:
        chosen = [each for each in operations if tag["name"] in each[2]["tags"]]
        page.append(f"## {tag['name'].capitalize()}\n")
        for method, path, operation in chosen:
            page += _operation(method, path, operation)
    page.append("## Shapes\n")
    page.append("A field with a dot (·) is always there, or must be given.\n")
    for name, schema in shapes.items():
        page.append(f"### {name}\n")
        if schema.get("description"):
            page.append(f"{schema['description']}\n")
        rows = [
            [
                f"`{field}`" + (" ·" if field in schema.get("required", ()) else ""),
                _type(of),
                _escaped(of.get("description", "")),
            ]
            for field, of in schema.get("properties", {}).items()
        ]
        if rows:
            page.append(_table(["field", "type", "what it says"], rows))
    return "\n".join(page)


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> list[str]:
    told = [f"### {method} {path}\n", f"{operation['description']}\n"]
    rows = [
        [f"`{one['name']}`", one["in"], _type(one.get("schema", {})), _escaped(one.get("description", ""))]
        for one in operation.get("parameters", ())
    ]
    if rows:
        told.append(_table(["parameter", "in", "type", "what it says"], rows))
    body = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if body is not None:
        told.append(f"Body: {_type(body['schema'])}\n")
        if "example" in body:
            told.append(f"```json\n{json.dumps(body['example'], indent=2)}\n```\n")
    answers: list[list[str]] = []
    for status, response in operation["responses"].items():
        (kind, content), *_ = (response.get("content") or {"": {}}).items()
        shape = _type(content.get("schema", {})) if kind == "application/json" else f"`{kind}`" if kind else ""
        answers.append([status, shape, _escaped(response["description"])])
    told.append(_table(["answer", "shape", "when"], answers))
    return told


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{_slug(name)})"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    for together in ("anyOf", "oneOf"):
        if together in schema:
            return " or ".join(dict.fromkeys(_type(each) for each in schema[together]))
    kind = schema.get("type", "any JSON")
    if isinstance(kind, list):
        return " or ".join(kind)
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("format", kind))


# --- Markdown --------------------------------------------------------------------------------------------------------


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [_row(columns), _row(["---"] * len(columns)), *(_row(row) for row in rows)]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """`text` in a cell: no bar, no tag, and brackets that are no link."""
    return re.sub(r"([|<\[\]*])", r"\\\1", " ".join(text.split()))


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def main() -> None:
    for path, content in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"written: {path.relative_to(DOCS.parent)}", file=sys.stderr)


if __name__ == "__main__":
    main()
