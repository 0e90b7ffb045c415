"""The demo: an order saga with a compensation, a settings saga, and the payments service the first one talks to."""

from __future__ import annotations

from typing import Any

from sagaloom.definitions import SagaDefinition
from sagaloom.demo.order_saga import order_saga
from sagaloom.demo.user_settings_saga import user_settings_saga

__all__ = ["order_saga", "sagas", "user_settings_saga"]

sagas: list[SagaDefinition[Any]] = [order_saga, user_settings_saga]
