"""The crash run can fail: whatever promise its workers break is found, and called what it is."""

import random
from pathlib import Path

from tests.crash.driver import RANDOM, STOPS, CrashRun
from tests.crash.places import FilePlace
from tests.crash.sabotage import (
    ACK_EARLY,
    DROP_COMMIT,
    IGNORE_FENCING,
    NEW_EFFECT_KEY,
    SWALLOW_EFFECT,
    SWAP_ORDER,
)
from tests.crash.story import orders
from tests.crash.verdict import Verdict


async def _verdict(directory: Path, sabotage: str, *, kills: int = 0, stops: int = 0) -> Verdict:
    rng = random.Random(7)
    # What a saboteur has swallowed is waited for in vain.
    patience = {"settle_seconds": 1.5} if sabotage else {}
    run = CrashRun(
        directory,
        FilePlace(directory / "saga.db"),
        orders=orders(150, rng),
        kills=[(RANDOM, 0)] * kills,
        stops=[(STOPS[1], 0)] * stops,
        processes=2,
        rng=rng,
        tell=lambda line: None,
        sabotage=sabotage,
        **patience,
    )
    return (await run.run()).verdict


async def test_without_sabotage_nothing_is_found(tmp_path: Path) -> None:
    verdict = await _verdict(tmp_path, "", kills=2, stops=1)

    assert verdict.is_clean, verdict.lines()


async def test_a_commit_that_was_not_written_is_found_as_lost(tmp_path: Path) -> None:
    verdict = await _verdict(tmp_path, DROP_COMMIT)

    assert verdict.lost


async def test_an_acknowledgement_before_the_commit_is_found_as_lost(tmp_path: Path) -> None:
    verdict = await _verdict(tmp_path, ACK_EARLY, kills=4)

    assert verdict.lost


async def test_a_write_under_a_lease_that_is_over_is_found(tmp_path: Path) -> None:
    verdict = await _verdict(tmp_path, IGNORE_FENCING, stops=2)

    assert any(breach.startswith("I7") for breach in verdict.breaches)


async def test_a_message_that_overtakes_an_older_one_is_found_as_out_of_order(tmp_path: Path) -> None:
    verdict = await _verdict(tmp_path, SWAP_ORDER)

    assert verdict.out_of_order


async def test_an_effect_that_leaves_under_two_keys_is_found_as_duplicated_and_as_wrong_money(tmp_path: Path) -> None:
    verdict = await _verdict(tmp_path, NEW_EFFECT_KEY)

    assert verdict.duplicated
    assert verdict.net != verdict.net_expected


async def test_an_effect_that_never_leaves_is_found_as_lost(tmp_path: Path) -> None:
    verdict = await _verdict(tmp_path, SWALLOW_EFFECT)

    assert any("neither arrived nor waits" in lost for lost in verdict.lost)
