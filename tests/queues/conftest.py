"""Servers that these tests may stop, and one table of what the contract found of each broker, at the end of a run that
tried more than one."""

from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

from tests.servers.finding import own
from tests.servers.others import RabbitMQ, Redis
from tests.servers.postgres import Postgres
from tests.servers.server import Server

_results: dict[str, Counter[str]] = defaultdict(Counter)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _, _, rest = report.nodeid.partition("test_queue_contract.py::Test")
    provider, is_contract, _ = rest.partition("Queue::")
    if not is_contract:
        return
    if report.when == "call" or report.outcome != "passed":
        _results[provider][report.outcome] += 1
    _results[provider]["milliseconds"] += round(report.duration * 1000)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if len(_results) < 2:
        return
    terminalreporter.write_sep("=", "the queue contract")
    terminalreporter.write_line(f"{'broker':<12}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>10}")
    for provider, found in _results.items():
        numbers = f"{found['passed']:>8}{found['failed']:>8}{found['skipped']:>9}{found['milliseconds'] / 1000:>10.1f}"
        terminalreporter.write_line(f"{provider:<12}{numbers}")


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
