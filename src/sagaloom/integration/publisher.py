"""The publisher's boundary: what code that publishes needs to know, whoever carries the message.

`create_saga_publisher` of `sagaloom.runtime` makes one that speaks HTTP; anything with the same two methods will do.
"""

from __future__ import annotations

from sagaloom.ports.publisher import (
    Outcome,
    PublishOptions,
    SagaPublisherPort,
    SagaPublisherReceipt,
    SagaPublisherRejected,
    SagaPublisherResult,
    SharedPublishOptions,
)

__all__ = [
    "Outcome",
    "PublishOptions",
    "SagaPublisherPort",
    "SagaPublisherReceipt",
    "SagaPublisherRejected",
    "SagaPublisherResult",
    "SharedPublishOptions",
]
