"""Sagas inside a web application of yours, whatever it is written with.

    create_saga_middleware(sagas)      every request finds its sagas, and whoever publishes goes on in its trace
    create_sse_events_middleware()     what happens to sagas as server-sent events, at a path of the application
    SagaHistoryWriter                  keeps those events for longer than the store's feed does

Each `create_...` returns what wraps an ASGI application, so that it fits all of them:

    app.add_middleware(create_saga_middleware(sagas))                      # FastAPI, Starlette
    app = create_saga_middleware(sagas)(Litestar(...))                     # Litestar
    application = create_saga_middleware(sagas)(get_asgi_application())    # Django
"""

from __future__ import annotations

from sagaloom.middleware.events import create_sse_events_middleware
from sagaloom.middleware.history import SagaHistoryWriter
from sagaloom.middleware.requests import RequestSagas, create_saga_middleware, sagas_of

__all__ = [
    "RequestSagas",
    "SagaHistoryWriter",
    "create_saga_middleware",
    "create_sse_events_middleware",
    "sagas_of",
]
