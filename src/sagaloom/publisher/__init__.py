"""The publisher: how other programs, jobs and services hand messages to a saga service, over HTTP.

`create_saga_publisher[M](...)` is asynchronous, `create_sync_saga_publisher[M](...)` blocks; both answer each message
with a receipt or a refusal, as values.
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
from sagaloom.publisher.http import (
    HttpSagaPublisher,
    SyncHttpSagaPublisher,
    create_saga_publisher,
    create_sync_saga_publisher,
)
from sagaloom.publisher.options import Fetcher, FetchRequest, FetchResponse, HttpSagaPublisherOptions

__all__ = [
    "FetchRequest",
    "FetchResponse",
    "Fetcher",
    "HttpSagaPublisher",
    "HttpSagaPublisherOptions",
    "Outcome",
    "PublishOptions",
    "SagaPublisherPort",
    "SagaPublisherReceipt",
    "SagaPublisherRejected",
    "SagaPublisherResult",
    "SharedPublishOptions",
    "SyncHttpSagaPublisher",
    "create_saga_publisher",
    "create_sync_saga_publisher",
]
