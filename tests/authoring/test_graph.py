"""A saga as a graph, and its drawing."""

from __future__ import annotations

from typing import Any

from examples.orders import orders
from examples.subscriptions import billing, subscriptions
from sagaloom import define_saga, saga_complete
from sagaloom.graph import graph_of, mermaid


def test_the_graph_has_what_starts_a_saga_what_messages_lead_to_and_how_it_ends() -> None:
    edges = {(edge.source, edge.kind, edge.target) for edge in graph_of(orders).edges}

    assert edges >= {
        ("start", "starts", "OrderPlaced"),
        ("instance", "continues", "PaymentCaptured"),
        ("OrderPlaced", "sets", "status awaiting payment"),
        ("OrderPlaced", "sends", "target service:payments"),
        ("Shipped", "ends", "end completed"),
        ("FulfillmentFailed", "compensates", "compensate FulfillmentFailed"),
        ("compensate FulfillmentFailed", "ends", "end failed"),
    }


def test_time_is_in_the_graph() -> None:
    assert ("schedule", "FirstOfTheMonth", "ticks") in graph_of(billing).edges
    assert {("timeout timeout", "NotConfirmed", "times out"), ("Declined", "GraceOver", "schedules")} <= set(
        graph_of(subscriptions).edges
    )


def test_every_edge_leads_from_node_to_node_and_every_node_is_there_once() -> None:
    for saga in (orders, billing, subscriptions):
        graph = graph_of(saga)
        names = [node.id for node in graph.nodes]

        assert len(set(names)) == len(names)
        assert {end for edge in graph.edges for end in (edge.source, edge.target)} <= set(names)


def test_the_drawing_is_a_flowchart_with_every_node_and_edge() -> None:
    graph, lines = graph_of(orders), mermaid(orders).split("\n")

    assert lines[0] == "flowchart LR"
    assert len(lines) == 1 + len(graph.nodes) + len(graph.edges)
    assert '    n0(("start"))' in lines
    assert any("-.->|compensates|" in line for line in lines)


def test_statuses_and_gatherings_are_in_the_graph() -> None:
    def done(saga: Any, event: Any, context: Any) -> list[Any]:
        return [saga_complete()]

    saga = (
        define_saga("s")
        .state({"status": "new"})
        .during("new", "A", done, starts=True)
        .when_all(["B", "C"], done, starts=False)
        .build()
    )

    edges = set(graph_of(saga).edges)

    assert {
        ("status new", "A", "awaits"),
        ("B", "all B, C", "gathers"),
        ("C", "all B, C", "gathers"),
        ("all B, C", "end completed", "ends"),
    } <= edges
