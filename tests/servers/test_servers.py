"""Servers of a test's own come up, go down when they are told to, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.patience import PATIENCE_SECONDS
from tests.servers import finding
from tests.servers.finding import find, own
from tests.servers.others import MariaDB, Nats, RabbitMQ, Redis, amqp_takes, mariadb_greets, nats_answers, redis_answers
from tests.servers.postgres import PgBouncer, Postgres
from tests.servers.server import Missing, Server, binary

_WHERE_POSTGRES = ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin")

QUICK = [
    pytest.param(kind, marks=pytest.mark.server(kind.name), id=kind.name) for kind in (Postgres, MariaDB, Redis, Nats)
]


@pytest.mark.parametrize("kind", QUICK)
def test_a_killed_server_comes_back_where_it_was_and_leaves_nothing_behind(kind: Callable[[], Server]) -> None:
    with own(kind) as server:
        url = server.url

        server.kill()
        left = _processes_in(server.directory)
        server.start()

        assert left == []
        assert server.url == url
        assert server.is_running
        assert _processes_in(server.directory) != []
    assert _processes_in(server.directory) == []
    assert not server.directory.exists()


@pytest.mark.server("rabbitmq")
def test_rabbitmq_is_a_node_of_its_own_and_takes_its_name_daemon_along() -> None:
    with own(RabbitMQ) as broker:
        assert amqp_takes(broker.port)
        assert len(_processes_in(broker.directory)) > 1
    assert _processes_in(broker.directory) == []


@pytest.mark.server("postgres")
def test_what_was_committed_is_there_after_a_kill_and_after_a_restart() -> None:
    with own(Postgres) as database:
        database.sql("CREATE TABLE kept (number int)")
        database.sql("INSERT INTO kept VALUES (1)")

        database.kill()
        database.start()
        database.sql("INSERT INTO kept VALUES (2)")
        database.restart()

        assert database.sql("SELECT number FROM kept ORDER BY number") == "1\n2"


@pytest.mark.server("postgres")
def test_a_synchronous_standby_has_what_the_destroyed_primary_had_committed() -> None:
    with own(Postgres) as primary:
        standby = primary.add_standby()
        try:
            primary.sql("CREATE TABLE kept (number int)")
            primary.sql("INSERT INTO kept VALUES (1)")

            primary.kill()
            standby.promote()
            standby.sql("INSERT INTO kept VALUES (2)")

            assert standby.sql("SELECT number FROM kept ORDER BY number") == "1\n2"
        finally:
            standby.close()


@pytest.mark.server("postgres")
@pytest.mark.server("pgbouncer")
def test_the_pooler_finds_its_database_again_after_a_restart() -> None:
    with own(Postgres) as database, own(lambda: PgBouncer(database)) as pooler:
        before = _asks(pooler.url)

        database.restart()

        assert before == "1"
        assert _asks_until_it_answers(pooler.url) == "1"


@pytest.mark.server("redis")
def test_a_frozen_server_says_nothing_and_goes_on_when_it_is_thawed() -> None:
    with own(Redis) as server:
        server.freeze()
        frozen = redis_answers(server.port)
        server.thaw()

        assert not frozen
        assert redis_answers(server.port)


@pytest.mark.server("postgres")
def test_a_server_goes_with_the_process_that_started_it() -> None:
    _skip_without("initdb", of="PostgreSQL", among=_WHERE_POSTGRES)
    code = "import time\nfrom tests.servers.postgres import Postgres\np = Postgres().start()\n"
    code += "print(p.directory, flush=True)\ntime.sleep(60)\n"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    directory = Path(process.stdout.readline().strip())

    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    deadline = time.monotonic() + PATIENCE_SECONDS
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _processes_in(directory) == []
    assert not directory.exists()


def test_a_server_that_is_named_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGALOOM_TEST_REDIS_URL", "redis://elsewhere:1/0")

    assert find("redis") == "redis://elsewhere:1/0"


@pytest.mark.server("redis")
def test_without_one_on_the_standard_port_one_of_our_own_is_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _skip_without("redis-server", "valkey-server", of="Redis or Valkey")
    monkeypatch.delenv("SAGALOOM_TEST_REDIS_URL", raising=False)
    monkeypatch.setitem(finding._STANDARD, "redis", lambda: None)
    monkeypatch.setattr(finding, "_ours", {})

    url = find("redis")

    assert url == find("redis")
    assert finding._ours["redis"].is_running
    finding._ours["redis"].close()


def test_what_is_not_installed_says_so_in_one_line() -> None:
    with pytest.raises(Missing, match=r"^Nothing is not installed: no program named no-such-server was found$"):
        binary("no-such-server", of="Nothing")


@pytest.mark.parametrize("answers", [amqp_takes, mariadb_greets, nats_answers, redis_answers])
def test_a_port_where_nobody_listens_is_no_server(answers: Callable[[int], bool]) -> None:
    assert not answers(1)


def _skip_without(*names: str, of: str, among: Sequence[str] = ()) -> None:
    """The end of the test where no server of its own could be started."""
    if sys.platform != "linux":
        pytest.skip(f"a server of our own needs Linux, this is {sys.platform}")
    try:
        binary(*names, of=of, among=among)
    except Missing as missing:
        pytest.skip(str(missing))


def _processes_in(directory: Path) -> list[int]:
    """The servers' processes that work in `directory`, or were started for it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes().split(b"\0")
                if b"HOME=" + os.fsencode(directory) in environment or (entry / "cwd").readlink().is_relative_to(
                    directory
                ):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def _asks(url: str) -> str:
    asked = [binary("psql", of="PostgreSQL", among=_WHERE_POSTGRES), "-XAtqw", "-c", "SELECT 1", url]
    return subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False).stdout.strip()


def _asks_until_it_answers(url: str) -> str:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (answer := _asks(url)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return answer
