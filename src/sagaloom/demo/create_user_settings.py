"""The job that ends in a saga: it creates a user's settings, and publishes `UserSettingsCreated`.

    POST :8091 .../jobs/create-user-settings/trigger ──► a run ──► POST :8092 .../publish ──► user-settings-saga

The receipt is looked at, not hoped for. A publish that was refused for now fails the attempt, which is made again; one
that will never be accepted fails the run. Whatever is repeated, and whoever is killed in between, one instance
completes: every attempt publishes under the same idempotency key.
"""

from __future__ import annotations

import os
from typing import Annotated, TypedDict

import msgspec

from sagaloom import BackendUnavailable
from sagaloom.demo.user_settings_saga import UserSettingsCreated
from sagaloom.integration.publisher import SagaPublisherRejected
from sagaloom.runtime import create_saga_publisher
from sagaloom.workers import (
    JobContext,
    JobResult,
    create_failure_result,
    create_success_result,
    define_job_handler,
)

__all__ = ["CreateUserSettings", "SettingsCreated", "create_user_settings"]


class CreateUserSettings(TypedDict):
    userId: Annotated[str, msgspec.Meta(min_length=1)]


class SettingsCreated(TypedDict):
    """What a run returns."""

    userId: str
    settingsCreated: bool
    messageId: str
    duplicate: bool


_token = os.environ.get("SAGALOOM_TOKEN", "").strip()
publisher = create_saga_publisher[UserSettingsCreated](
    headers={"Authorization": f"Bearer {_token}"} if _token else {},
    # A run is tried again by itself, and each attempt is on the record: long waits belong there.
    retries=2,
    timeout=10,
)


@define_job_handler(id="create-user-settings", payload=CreateUserSettings)
async def create_user_settings(
    ctx: JobContext[CreateUserSettings],
) -> JobResult[SettingsCreated] | JobResult[dict[str, str]]:
    """Publishes what the saga reacts to, once for each run."""
    user_id = ctx.payload["userId"]
    receipt = await publisher.publish(
        UserSettingsCreated,
        UserSettingsCreated(userId=user_id),
        idempotency_key=ctx.idempotency_key,
        traceparent=ctx.traceparent,
        tracestate=ctx.tracestate,
    )
    if isinstance(receipt, SagaPublisherRejected):
        if receipt.retryable:
            raise BackendUnavailable(f"UserSettingsCreated was not published: {receipt.reason}")
        return create_failure_result(f"UserSettingsCreated was refused: {receipt.reason}", {"userId": user_id})
    return create_success_result(
        SettingsCreated(userId=user_id, settingsCreated=True, messageId=receipt.message_id, duplicate=receipt.duplicate)
    )
