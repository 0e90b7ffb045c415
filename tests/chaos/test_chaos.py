"""`make chaos`, in a short form: four workers on PostgreSQL behind a pooler, some killed, one stopped past its lease,
the database restarted and killed."""

import random
from pathlib import Path

import pytest

from tests.crash.driver import RANDOM, STOPPED_DECIDED, CrashRun
from tests.crash.places import KILLED, RESTARTED, DatabasePlace
from tests.crash.story import orders
from tests.servers.finding import own
from tests.servers.postgres import PgBouncer, Postgres


@pytest.mark.server("postgres")
@pytest.mark.server("pgbouncer")
async def test_four_workers_lose_nothing_while_they_and_the_database_die(tmp_path: Path) -> None:
    rng = random.Random(11)
    with own(Postgres) as database, own(lambda: PgBouncer(database)) as pooler:
        run = CrashRun(
            tmp_path,
            DatabasePlace(database, pooler),
            orders=orders(210, rng),
            kills=[(RANDOM, 0)] * 3,
            stops=[(STOPPED_DECIDED, 0)],
            disasters=[RESTARTED, KILLED],
            processes=4,
            rng=rng,
            tell=lambda line: None,
        )

        report = await run.run()

    assert report.verdict.is_clean, report.verdict.lines()
    assert report.refused["write"] > 0
    assert report.disasters == {RESTARTED: 1, KILLED: 1}
