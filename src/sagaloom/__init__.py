"""Durable sagas: long-running work that survives crashes, retries and redelivery.

This package is what an author of sagas needs, and imports nothing heavier. Running them is `sagaloom.runtime` and
`sagaloom.presets`.

>>> from dataclasses import dataclass, replace
>>> from sagaloom import Saga, SagaContext, SagaMessage, define_saga, saga_complete
>>> @dataclass(frozen=True)
... class Order:
...     status: str = "new"
>>> @dataclass(frozen=True)
... class OrderPlaced:
...     order_id: str
>>> def placed(saga: Saga[Order], event: SagaMessage[OrderPlaced], context: SagaContext[Order]):
...     saga.state = replace(saga.state, status="placed")
...     return [saga_complete({"orderId": event.payload.order_id})]
>>> order = define_saga("order").state(Order()).on(OrderPlaced, placed).build()
>>> order.handled_message_types
('OrderPlaced',)
"""

from __future__ import annotations

from sagaloom.builder import SagaBuilder, SagaDraft, SagaWithHandlers, SagaWithState, define_saga
from sagaloom.definitions import (
    SAGA_DURABILITY_TIERS,
    SAGA_INSTANCE_STATUSES,
    Gathered,
    QueryDefinition,
    RetryPolicy,
    Saga,
    SagaContext,
    SagaCorrelation,
    SagaDefinition,
    SagaDurabilityTier,
    SagaHandler,
    SagaInstanceStatus,
    SagaState,
    SignalDefinition,
    define_query,
    define_signal,
)
from sagaloom.effects import (
    ALL_STEPS,
    CASCADED_MESSAGE_KINDS,
    CascadedMessage,
    answer,
    cancel_scheduled,
    saga_compensate,
    saga_complete,
    saga_fail,
    schedule,
    send,
    spawn,
)
from sagaloom.errors import (
    BackendUnavailable,
    ConcurrencyConflict,
    ConcurrencyLimited,
    ConfigurationError,
    DecodeError,
    DefinitionError,
    DeliveryFailed,
    EncodeError,
    HandlerError,
    IdempotencyKeyReused,
    InstanceEnded,
    InstanceNotFound,
    MessageRejected,
    QueryFailed,
    QueryNotFound,
    SagaNotFound,
    SagasError,
    SignalNotFound,
    UpdateFailed,
    UpdateRefused,
)
from sagaloom.messages import SagaMessage

__version__ = "0.1.0"

__all__ = [
    "ALL_STEPS",
    "CASCADED_MESSAGE_KINDS",
    "SAGA_DURABILITY_TIERS",
    "SAGA_INSTANCE_STATUSES",
    "BackendUnavailable",
    "CascadedMessage",
    "ConcurrencyConflict",
    "ConcurrencyLimited",
    "ConfigurationError",
    "DecodeError",
    "DefinitionError",
    "DeliveryFailed",
    "EncodeError",
    "Gathered",
    "HandlerError",
    "IdempotencyKeyReused",
    "InstanceEnded",
    "InstanceNotFound",
    "MessageRejected",
    "QueryDefinition",
    "QueryFailed",
    "QueryNotFound",
    "RetryPolicy",
    "Saga",
    "SagaBuilder",
    "SagaContext",
    "SagaCorrelation",
    "SagaDefinition",
    "SagaDraft",
    "SagaDurabilityTier",
    "SagaHandler",
    "SagaInstanceStatus",
    "SagaMessage",
    "SagaNotFound",
    "SagaState",
    "SagaWithHandlers",
    "SagaWithState",
    "SagasError",
    "SignalDefinition",
    "SignalNotFound",
    "UpdateFailed",
    "UpdateRefused",
    "__version__",
    "answer",
    "cancel_scheduled",
    "define_query",
    "define_saga",
    "define_signal",
    "saga_compensate",
    "saga_complete",
    "saga_fail",
    "schedule",
    "send",
    "spawn",
]
