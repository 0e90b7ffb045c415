"""The settings saga: one message, one outcome."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from sagaloom import CascadedMessage, SagaContext, SagaMessage, define_saga, saga_complete
from sagaloom.definitions import Saga

__all__ = ["UserSettingsCreated", "UserSettingsState", "user_settings_saga"]


class UserSettingsState(TypedDict):
    status: str
    processedAt: NotRequired[str]


class UserSettingsCreated(TypedDict):
    userId: str


def on_user_settings_created(
    saga: Saga[UserSettingsState],
    event: SagaMessage[UserSettingsCreated],
    context: SagaContext[UserSettingsState],
) -> Sequence[CascadedMessage]:
    """Advance the saga's own state, then end with a recorded outcome."""
    processed_at = context.now.isoformat()
    saga.state = saga.state | {"status": "completed", "processedAt": processed_at}
    return [saga_complete({"userId": event.payload["userId"], "processedAt": processed_at})]


initial_state: UserSettingsState = {"status": "pending"}

user_settings_saga = (
    define_saga("user-settings-saga")
    .durability("t1")
    .state(initial_state)
    .on("UserSettingsCreated", on_user_settings_created)
    .build()
)
