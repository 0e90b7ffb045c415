"""Sagas in a Starlette application: `uvicorn --factory examples.web.with_starlette:create_app`."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.web.shop import OrderPaid, OrderPlaced, orders
from sagaloom.middleware import create_saga_middleware, create_sse_events_middleware, sagas_of
from sagaloom.presets import start_sagas


async def place(request: Request) -> JSONResponse:
    order = OrderPlaced(request.path_params["order_id"], int(request.query_params["cents"]))
    receipt = (await sagas_of(request).publish(order)).raise_for_rejected()
    return JSONResponse({"messageId": receipt.message_id}, 202)


async def pay(request: Request) -> JSONResponse:
    paid = OrderPaid(request.path_params["order_id"])
    receipt = (await sagas_of(request).publish(paid, wait=5)).raise_for_rejected()
    return JSONResponse({"messageId": receipt.message_id}, 202)


async def show(request: Request) -> JSONResponse:
    order = await request.state.sagas.get_saga_state("orders", request.path_params["order_id"])
    if order is None:
        return JSONResponse({"detail": "there is no such order"}, 404)
    return JSONResponse({"status": order.status, "cents": order.cents})


def create_app(path: str = "shop.db") -> Starlette:
    return Starlette(
        routes=[
            Route("/orders/{order_id}", place, methods=["POST"]),
            Route("/orders/{order_id}/paid", pay, methods=["POST"]),
            Route("/orders/{order_id}", show),
        ],
        middleware=[
            Middleware(create_saga_middleware(start_sagas([orders], path=path))),
            Middleware(create_sse_events_middleware(path="/events")),
        ],
    )
