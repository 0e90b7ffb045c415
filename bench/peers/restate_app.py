"""The workflow of line 5 in Restate, in both of its forms; served by the Python of an environment of its own (`make
bench` makes it), and knows nothing but Restate."""

from __future__ import annotations

import importlib
from typing import Any

restate: Any = importlib.import_module("restate")

_STEPS = 3

_plain = restate.Service("Plain")
_order = restate.Workflow("Order")


def _step(number: int) -> int:
    return number


async def _steps(context: Any, order_id: str) -> str:
    for number in range(_STEPS):
        await context.run_typed(f"step-{number}", _step, number=number)
    return order_id


async def _run(context: Any, order_id: str) -> str:
    return await _steps(context, order_id)


async def _run_order(context: Any, order_id: str) -> str:
    return await _steps(context, order_id)


_plain.handler("run")(_run)
_order.main("run")(_run_order)
app = restate.app([_plain, _order])
