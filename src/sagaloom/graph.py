"""A saga as a graph: what starts it, what its messages lead to, how it ends. `GET /sagas/{id}` answers with it, and
`sagaloom diagram` draws it.

Nodes and edges of the definition itself are certain. Those that `foresight` has read off the handlers (what they send,
which status they set, whether they end the run) are what may happen; what it could not read is not there.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from sagaloom.definitions import SagaDefinition, SagaHandler
from sagaloom.foresight import OWN_MESSAGE, ForeseenEffect, foresee

__all__ = ["Edge", "Graph", "Node", "graph_of", "mermaid"]


class Node(NamedTuple):
    """`kind` is `start`, `instance`, `message`, `all` (of several messages), `signal`, `update`, `compensation`,
    `schedule`, `timeout`, `status`, `target`, `child` or `end`."""

    id: str
    kind: str
    label: str


class Edge(NamedTuple):
    """`kind` is `starts`, `continues`, `awaits`, `gathers`, `compensates`, `ticks`, `times out`, `sets`, `sends`,
    `schedules`, `spawns` or `ends`."""

    source: str
    target: str
    kind: str


class Graph(NamedTuple):
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


@functools.lru_cache(maxsize=256)
def graph_of(definition: SagaDefinition[Any]) -> Graph:
    """The graph of a definition: each node and each edge once.

    >>> from sagaloom import define_saga
    >>> saga = define_saga("order").state({}).on("OrderPlaced", lambda saga, event, context: []).build()
    >>> [(edge.source, edge.target) for edge in graph_of(saga).edges]
    [('start', 'OrderPlaced')]
    """
    edges = list(dict.fromkeys(_edges(definition)))
    nodes = {node.id: node for node in _nodes(definition)}
    for edge in edges:
        for end in (edge.source, edge.target):
            if end not in nodes:
                kind, _, label = end.partition(" ")
                nodes[end] = Node(end, kind, label)
    return Graph(tuple(nodes.values()), tuple(edges))


def _nodes(definition: SagaDefinition[Any]) -> Iterator[Node]:
    continues = len(definition.starting_types) < len(definition.handlers)
    if definition.starting_types:
        yield Node("start", "start", "start")
    if continues or definition.signals or definition.updates:
        yield Node("instance", "instance", "live instance")
    for name in definition.handlers:
        yield Node(name, "message", name)
    for name in definition.compensations:
        yield Node(f"compensate {name}", "compensation", f"undo {name}")
    if definition.schedule is not None:
        yield Node("schedule", "schedule", definition.schedule.cron)
    for one in definition.timeouts:
        yield Node(f"timeout {one.name}", "timeout", f"{one.name} after {one.delay}")


def _edges(definition: SagaDefinition[Any]) -> Iterator[Edge]:
    for one in definition.handlers.values():
        yield Edge("start", one.type, "starts") if one.starts else Edge("instance", one.type, "continues")
        for status in one.during or ():
            yield Edge(f"status {status}", one.type, "awaits")
    for kind, bindings in (("signal", definition.signals), ("update", definition.updates)):
        for name in bindings:
            yield Edge("instance", f"{kind} {name}", "continues")
    for join in definition.joins:
        for name in join.codecs:
            yield Edge(name, f"all {join.name}", "gathers")
    for name in definition.compensations:
        if name in definition.handlers:
            yield Edge(name, f"compensate {name}", "compensates")
    if definition.schedule is not None:
        yield Edge("schedule", definition.schedule.message_type, "ticks")
    for timeout in definition.timeouts:
        yield Edge(f"timeout {timeout.name}", timeout.message_type, "times out")
    for node, message_type, handler in _handlers(definition):
        seen = foresee(handler, definition.status_field)
        yield from _foreseen(definition, node, message_type, seen.effects)
        yield from (Edge(node, f"status {one.status}", "sets") for one in seen.statuses)


def _handlers(definition: SagaDefinition[Any]) -> Iterator[tuple[str, str, SagaHandler[Any, Any]]]:
    """Each function of a saga, with its node and the type of the message that it is called with."""
    for one in definition.handlers.values():
        for handler in (one.handler,) if one.during is None else one.during.values():
            yield one.type, one.type, handler
    for join in definition.joins:
        yield f"all {join.name}", join.name, join.handler
    for kind, bindings in (("signal", definition.signals), ("update", definition.updates)):
        for name, said in bindings.items():
            yield f"{kind} {name}", name, said.handler
    for undo in definition.compensations.values():
        yield f"compensate {undo.type}", undo.type, undo.handler


def _foreseen(
    definition: SagaDefinition[Any], node: str, message_type: str, effects: Iterable[ForeseenEffect]
) -> Iterator[Edge]:
    for effect in effects:
        own = message_type if effect.message == OWN_MESSAGE else effect.message
        match effect.kind:
            case "send" if effect.target is not None:
                kind, name = effect.target
                target = name if kind == "saga" and name in definition.handlers else f"target {kind}:{name or '...'}"
                yield Edge(node, str(target), "sends")
            case "scheduled" if own in definition.handlers:
                yield Edge(node, str(own), "schedules")
            case "spawn" if effect.child is not None:
                yield Edge(node, f"child {effect.child}", "spawns")
            case "compensate":
                undone = definition.compensations if effect.is_all_steps else (own,)
                for name in undone:
                    if name in definition.compensations:
                        yield Edge(node, f"compensate {name}", "compensates")
            case "complete" | "fail":
                yield Edge(node, "end completed" if effect.kind == "complete" else "end failed", "ends")
            case _:
                pass


# --- Drawing ---------------------------------------------------------------------------------------------------------

_SHAPES: Final = {
    "start": ("((", "))"),
    "instance": ("([", "])"),
    "message": ("[", "]"),
    "all": ("[\\", "/]"),
    "signal": ("[/", "/]"),
    "update": ("[/", "/]"),
    "compensation": ("[[", "]]"),
    "schedule": ("{{", "}}"),
    "timeout": ("{{", "}}"),
    "status": ("(", ")"),
    "target": (">", "]"),
    "child": ("[(", ")]"),
    "end": ("(((", ")))"),
}


def mermaid(definition: SagaDefinition[Any]) -> str:
    """The graph of a definition as a Mermaid flowchart.

    >>> from sagaloom import define_saga
    >>> print(mermaid(define_saga("order").state({}).on("Placed", lambda saga, event, context: []).build()))
    flowchart LR
        n0(("start"))
        n1["Placed"]
        n0 -->|starts| n1
    """
    graph = graph_of(definition)
    names = {node.id: f"n{number}" for number, node in enumerate(graph.nodes)}
    lines = ["flowchart LR"]
    for node in graph.nodes:
        opened, closed = _SHAPES[node.kind]
        lines.append(f'    {names[node.id]}{opened}"{_quoted(node.label)}"{closed}')
    for edge in graph.edges:
        arrow = "-.->" if edge.kind == "compensates" else "-->"
        lines.append(f"    {names[edge.source]} {arrow}|{edge.kind}| {names[edge.target]}")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
