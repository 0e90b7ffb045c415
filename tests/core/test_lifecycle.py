"""The status table, walked."""

from itertools import product
from typing import Any, get_args

import pytest

from sagaloom import SAGA_INSTANCE_STATUSES
from sagaloom.definitions import SagaInstanceStatus
from sagaloom.engine.lifecycle import (
    HAPPENINGS,
    STATUS_TABLE,
    StatusRefused,
    is_terminal,
    next_status,
    status_diagram,
)


def test_completed_failed_and_cancelled_are_terminal_and_the_others_live() -> None:
    terminal = {status for status in SAGA_INSTANCE_STATUSES if is_terminal(status)}

    assert terminal == {"completed", "failed", "cancelled"}


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_nothing_leads_out_of_a_terminal_status(status: Any) -> None:
    for happening in HAPPENINGS:
        with pytest.raises(StatusRefused, match=status):
            next_status(status, happening)


def test_every_pair_either_has_a_status_or_is_refused() -> None:
    for status, happening in product(get_args(SagaInstanceStatus), HAPPENINGS):
        if (status, happening) in STATUS_TABLE:
            assert next_status(status, happening) in SAGA_INSTANCE_STATUSES
        else:
            with pytest.raises(StatusRefused):
                next_status(status, happening)


def test_what_was_undone_never_runs_again() -> None:
    after = {next_status("compensating", happening) for happening in HAPPENINGS if happening != "start"}

    assert "running" not in after


def test_every_status_can_be_reached_from_pending() -> None:
    reached: set[str] = {"pending"}
    for _ in SAGA_INSTANCE_STATUSES:
        reached |= {after for (before, _), after in STATUS_TABLE.items() if before in reached}

    assert reached == set(SAGA_INSTANCE_STATUSES)


def test_the_diagram_shows_every_row_of_the_table_and_nothing_else() -> None:
    lines = [line.strip() for line in status_diagram().splitlines()]

    arrows = {f"{before} --> {after}: {happening}" for (before, happening), after in STATUS_TABLE.items()}
    ends = {"[*] --> pending", "completed --> [*]", "failed --> [*]", "cancelled --> [*]"}
    assert lines[0] == "stateDiagram-v2"
    assert set(lines[1:]) == arrows | ends
