"""The HTTP API, on port 8092 by default: `create_app(runtime)` is an ASGI application for any server.

runtime = SagaRuntime(store, definitions=[order_saga])
async with runtime:
    await uvicorn.Server(uvicorn.Config(create_app(runtime), port=8092)).serve()
"""

from sagaloom.service.app import create_app

__all__ = ["create_app"]
