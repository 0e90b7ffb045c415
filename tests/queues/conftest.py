"""Servers that these tests may stop."""

from collections.abc import Iterator

import pytest

from tests.servers.finding import own
from tests.servers.others import RabbitMQ, Redis
from tests.servers.postgres import Postgres
from tests.servers.server import Server


@pytest.fixture(scope="package")
def own_redis() -> Iterator[Server]:
    with own(Redis) as server:
        yield server


@pytest.fixture(scope="package")
def own_postgres() -> Iterator[Server]:
    with own(Postgres) as server:
        yield server


@pytest.fixture(scope="package")
def own_rabbitmq() -> Iterator[Server]:
    with own(RabbitMQ) as server:
        yield server


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.server(name)) for name in ("redis", "postgres", "rabbitmq")]
)
def server(request: pytest.FixtureRequest) -> Server:
    """A server that the test may stop."""
    server: Server = request.getfixturevalue(f"own_{request.param}")
    if not server.is_running:
        server.start()
    return server
