"""Sagas in a Django application, in one file: `uvicorn --factory examples.web.with_django:create_app`."""

# Django has no types of its own, and its settings are what a project keeps elsewhere.
# mypy: disable-error-code="import-untyped"
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false

from __future__ import annotations

from typing import Any

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path as route
from starlette.types import ASGIApp

from examples.web.shop import OrderPaid, OrderPlaced, orders
from sagaloom.middleware import create_saga_middleware, create_sse_events_middleware, sagas_of
from sagaloom.presets import start_sagas


async def order(request: HttpRequest, order_id: str) -> JsonResponse:
    sagas = sagas_of(request)
    if request.method == "POST":
        receipt = (await sagas.publish(OrderPlaced(order_id, int(str(request.GET["cents"]))))).raise_for_rejected()
        return JsonResponse({"messageId": receipt.message_id}, status=202)
    found = await sagas.get_saga_state("orders", order_id)
    if found is None:
        return JsonResponse({"detail": f"there is no order {order_id}"}, status=404)
    return JsonResponse({"status": found.status, "cents": found.cents})


async def pay(request: HttpRequest, order_id: str) -> JsonResponse:
    receipt = (await sagas_of(request).publish(OrderPaid(order_id), wait=5)).raise_for_rejected()
    return JsonResponse({"messageId": receipt.message_id}, status=202)


urlpatterns: list[Any] = [route("orders/<str:order_id>/paid", pay), route("orders/<str:order_id>", order)]


def create_app(path: str = "shop.db") -> ASGIApp:
    if not settings.configured:
        settings.configure(
            ALLOWED_HOSTS=["127.0.0.1", "localhost"], ROOT_URLCONF=__name__, SECRET_KEY="for this example alone"
        )
        django.setup()
    app: Any = get_asgi_application()
    return create_saga_middleware(start_sagas([orders], path=path))(create_sse_events_middleware(path="/events")(app))
