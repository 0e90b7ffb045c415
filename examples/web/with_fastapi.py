"""Sagas in a FastAPI application: `uvicorn --factory examples.web.with_fastapi:create_app`."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request

from examples.web.shop import OrderPaid, OrderPlaced, orders
from sagaloom.middleware import RequestSagas, create_saga_middleware, create_sse_events_middleware, sagas_of
from sagaloom.presets import start_sagas


def sagas(request: Request) -> RequestSagas:
    return sagas_of(request)


Sagas = Annotated[RequestSagas, Depends(sagas)]


def create_app(path: str = "shop.db") -> FastAPI:
    app = FastAPI()
    # The last one that is added is the outermost: the events are those of the sagas around them.
    app.add_middleware(create_sse_events_middleware(path="/events"))
    app.add_middleware(create_saga_middleware(start_sagas([orders], path=path)))

    @app.post("/orders/{order_id}", status_code=202)
    async def place(order_id: str, cents: int, sagas: Sagas) -> dict[str, str | None]:
        receipt = (await sagas.publish(OrderPlaced(order_id, cents))).raise_for_rejected()
        return {"messageId": receipt.message_id}

    @app.post("/orders/{order_id}/paid", status_code=202)
    async def pay(order_id: str, sagas: Sagas) -> dict[str, str | None]:
        receipt = (await sagas.publish(OrderPaid(order_id), wait=5)).raise_for_rejected()
        return {"messageId": receipt.message_id}

    @app.get("/orders/{order_id}")
    async def show(order_id: str, sagas: Sagas) -> dict[str, str | int]:
        order = await sagas.get_saga_state("orders", order_id)
        if order is None:
            raise HTTPException(404, f"there is no order {order_id}")
        return {"status": order.status, "cents": order.cents}

    return app
