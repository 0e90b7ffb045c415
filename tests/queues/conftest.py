"""One table of what the contract found of each broker, at the end of a run that tried more than one."""

from collections import Counter, defaultdict

import pytest

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
