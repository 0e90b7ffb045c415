"""The demo: an order saga with a compensation and the payments service it talks to; a job that publishes a message, and
the settings saga that takes it up."""

from __future__ import annotations

from typing import Any

from sagaloom.definitions import SagaDefinition
from sagaloom.demo.create_user_settings import create_user_settings
from sagaloom.demo.order_saga import order_saga
from sagaloom.demo.user_settings_saga import user_settings_saga
from sagaloom.workers import JobDefinition

__all__ = ["create_user_settings", "jobs", "order_saga", "sagas", "user_settings_saga"]

sagas: list[SagaDefinition[Any]] = [order_saga, user_settings_saga]
jobs: list[JobDefinition[Any]] = [create_user_settings]
