"""The table of suites puts each test where it belongs."""

import pytest

from tests.suites import QueueTable, SuiteTable, place_of


@pytest.mark.parametrize(
    ("nodeid", "place"),
    [
        ("tests/stores/test_sagastore_contract.py::TestSqlSagaStoreOverPostgres::test_a", ("saga store contract", 2)),
        ("tests/stores/test_sagastore_contract.py::TestKvSagaStoreOverSqlite::test_a", ("saga store contract", 1)),
        ("tests/stores/test_sagastore_contract.py::TestMemoryStore::test_a", ("saga store contract", 0)),
        ("tests/stores/test_differential.py::test_over_sqlite_does_what_the_model_does[1]", ("differential", 1)),
        ("tests/runtime/test_sharing.py::test_a[postgres]", ("runtime", 2)),
        ("tests/runtime/test_sharing.py::test_a[sqlite]", ("runtime", 1)),
        ("tests/runtime/test_feed.py::test_a", ("runtime", 1)),
        ("tests/runtime/test_walk_faults.py::test_a", ("faults", 1)),
        ("tests/stores/test_postgres_standby.py::test_a", ("faults", 2)),
        ("tests/chaos/test_chaos.py::test_a", ("processes killed", 2)),
        ("tests/core/test_decide.py::test_a", None),
    ],
)
def test_a_test_is_of_one_suite_and_one_store(nodeid: str, place: tuple[str, int] | None) -> None:
    found = place_of(nodeid)

    assert found == (None if place is None else (place[0], ("model", "embedded", "PostgreSQL")[place[1]]))


def test_the_table_shows_what_failed_and_what_was_skipped() -> None:
    table = SuiteTable()
    for outcome in ("passed", "passed", "failed", "skipped"):
        table.note("tests/chaos/test_chaos.py::test_a", outcome)

    assert table.lines() == [
        "                  model  embedded  PostgreSQL",
        "processes killed  -      -         2 ok, 1 FAILED, 1 skipped",
    ]


def test_the_queue_contract_is_told_by_broker() -> None:
    table = QueueTable()
    for broker, outcome in (("Redis", "passed"), ("Redis", "failed"), ("Kv", "passed")):
        nodeid = f"tests/queues/test_queue_contract.py::Test{broker}Queue::test_a"
        table.note(nodeid, "passed", seconds=0.5, is_verdict=False)
        table.note(nodeid, outcome, seconds=0.25, is_verdict=True)

    assert table.lines() == [
        "broker        passed  failed  skipped   seconds",
        "Kv                 1       0        0       0.8",
        "Redis              1       1        0       1.5",
    ]


def test_one_broker_alone_is_no_table() -> None:
    table = QueueTable()
    table.note("tests/queues/test_queue_contract.py::TestKvQueue::test_a", "passed", seconds=1, is_verdict=True)

    assert table.lines() == []
