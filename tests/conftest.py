"""What every test group shares: the event loop, the order of the groups, the seconds each took, and the rule for
servers that are not there.

A group is a folder directly under `tests`. The groups run from the floor of the house upwards, so that the first
failure is the nearest to its cause.
"""

import os
import signal
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.schemas import schema, schema_of_the_session
from tests.servers.finding import KINDS, found_or_skipped
from tests.suites import QueueTable, SuiteTable

__all__ = ["schema", "schema_of_the_session"]

GROUPS = (
    *("core", "authoring", "servers", "stores", "queues", "runtime", "publisher", "doors", "workers"),
    *("middleware", "telemetry"),
    *("crash", "chaos", "typing", "examples"),
)

# How long an example takes says how busy the machine is, and nothing of what it is an example of. With
# --hypothesis-profile=ci the examples are the same each time, so that no change fails by the luck of another.
settings.register_profile("sagaloom", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sagaloom")

# A shell has what it runs in the background ignore Ctrl-C, and so would everything that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_HERE = Path(__file__).parent
_seconds: dict[str, float] = defaultdict(float)
_tests: dict[str, set[str]] = defaultdict(set)
_suites = SuiteTable()
_queues = QueueTable()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """The one event loop we support. Under `anyio_mode = "auto"` every coroutine test runs on it."""
    return "asyncio"


@pytest.fixture(scope="session")
def postgres_url() -> str:
    """A PostgreSQL server; like the others below it may be somebody's: keep to a schema of your own."""
    return found_or_skipped("postgres")


@pytest.fixture(scope="session")
def mariadb_url() -> str:
    return found_or_skipped("mariadb")


@pytest.fixture(scope="session")
def redis_url() -> str:
    return found_or_skipped("redis")


@pytest.fixture(scope="session")
def rabbitmq_url() -> str:
    return found_or_skipped("rabbitmq")


@pytest.fixture(scope="session")
def nats_url() -> str:
    return found_or_skipped("nats")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in KINDS:
            if f"{name}_url" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.server(name))

    def floor(item: pytest.Item) -> int:
        group = _group_of(item.path)
        return GROUPS.index(group) if group in GROUPS else len(GROUPS)

    items.sort(key=floor)  # stable: within a group the order stays


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With SAGALOOM_REQUIRE_SERVERS=1 no test may skip itself, be it a server or a program that it misses.

    A machine that starts the servers wants to know when one did not come up; everywhere else a skip is right.
    """
    report = yield
    required = os.environ.get("SAGALOOM_REQUIRE_SERVERS", "0") not in {"", "0"}
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"SAGALOOM_REQUIRE_SERVERS is set, and this is not run: {reason}"
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    group = _group_of(_HERE.parent / report.nodeid.partition("::")[0])
    _seconds[group] += report.duration
    _tests[group].add(report.nodeid)
    is_verdict = report.when == "call" or report.outcome != "passed"
    if is_verdict:
        _suites.note(report.nodeid, report.outcome)
    _queues.note(report.nodeid, report.outcome, seconds=report.duration, is_verdict=is_verdict)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _seconds:
        return
    terminalreporter.write_sep("=", "seconds per group")
    for group, seconds in _seconds.items():
        count = len(_tests[group])
        terminalreporter.write_line(f"{seconds:8.2f} s  {group}, {count} {'test' if count == 1 else 'tests'}")
    for title, table in (("the queue contract", _queues.lines()), ("suites by store", _suites.lines())):
        if table:
            terminalreporter.write_sep("=", title)
        for line in table:
            terminalreporter.write_line(line)


def _group_of(path: Path) -> str:
    """The folder under `tests` that holds `path`; `tests` itself for a file directly in it."""
    parts = path.relative_to(_HERE).parts if path.is_relative_to(_HERE) else ()
    return parts[0] if len(parts) > 1 else "tests"
