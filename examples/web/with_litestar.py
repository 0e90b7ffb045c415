"""Sagas in a Litestar application: `uvicorn --factory examples.web.with_litestar:create_app`.

Litestar runs its middleware inside its routes, past the lifespan and only where there is a route. So both are put
around the application as a whole.
"""

from __future__ import annotations

from typing import Any

from litestar import Litestar, Request, get, post
from litestar.exceptions import NotFoundException
from litestar.params import FromPath, FromQuery
from starlette.types import ASGIApp

from examples.web.shop import OrderPaid, OrderPlaced, orders
from sagaloom.middleware import create_saga_middleware, create_sse_events_middleware, sagas_of
from sagaloom.presets import start_sagas


@post("/orders/{order_id:str}", status_code=202)
async def place(
    order_id: FromPath[str], cents: FromQuery[int], request: Request[Any, Any, Any]
) -> dict[str, str | None]:
    receipt = (await sagas_of(request).publish(OrderPlaced(order_id, cents))).raise_for_rejected()
    return {"messageId": receipt.message_id}


@post("/orders/{order_id:str}/paid", status_code=202)
async def pay(order_id: FromPath[str], request: Request[Any, Any, Any]) -> dict[str, str | None]:
    receipt = (await sagas_of(request).publish(OrderPaid(order_id), wait=5)).raise_for_rejected()
    return {"messageId": receipt.message_id}


@get("/orders/{order_id:str}")
async def show(order_id: FromPath[str], request: Request[Any, Any, Any]) -> dict[str, str | int]:
    order = await sagas_of(request).get_saga_state("orders", order_id)
    if order is None:
        raise NotFoundException(f"there is no order {order_id}")
    return {"status": order.status, "cents": order.cents}


def create_app(path: str = "shop.db") -> ASGIApp:
    app: Any = Litestar(route_handlers=[place, pay, show], openapi_config=None)
    return create_saga_middleware(start_sagas([orders], path=path))(create_sse_events_middleware(path="/events")(app))
