"""The auditor has to find what it looks for: each breach is put into the store of a healthy story."""

from collections.abc import Callable
from datetime import timedelta

import msgspec
import pytest

from sagaloom import CascadedMessage, Saga, SagaContext, SagaMessage, define_saga, saga_complete, schedule, send
from sagaloom.engine.records import DeadLetter, Envelope, FeedEvent, HistoryEntry, Instance, OutboxEffect, Timer
from sagaloom.ports.store import InboxRow, OutboxRow, RowRef
from sagaloom.runtime.runtime import SagaRuntime
from sagaloom.targets.callables import EffectRequest, callable_target
from sagaloom.testing import ManualClock, MemoryStore, check_invariants
from sagaloom.testing.invariants import every_entry, every_instance, fold


def _placed(
    saga: Saga[dict[str, int]], event: SagaMessage[dict[str, int]], context: SagaContext[dict[str, int]]
) -> list[CascadedMessage]:
    saga.state["n"] = 1
    return [send("service:payments", {}), schedule(SagaMessage("Reminder", {}), "1h")]


def _nothing(
    saga: Saga[dict[str, int]], event: SagaMessage[dict[str, int]], context: SagaContext[dict[str, int]]
) -> list[CascadedMessage]:
    return []


def _done(
    saga: Saga[dict[str, int]], event: SagaMessage[dict[str, int]], context: SagaContext[dict[str, int]]
) -> list[CascadedMessage]:
    return [saga_complete()]


ORDER = (
    define_saga("order")
    .state({"n": 0})
    .on("Placed", _placed)
    .on("Paid", _nothing, starts=False)
    .on("Shipped", _done, starts=False)
    .on("Reminder", _nothing, starts=False)
    .build()
)


async def _refuse(request: EffectRequest) -> None:
    raise ConnectionError


class Tampered(MemoryStore):
    """A store that a story was told to, with one thing changed on the way out."""

    def __init__(self) -> None:
        super().__init__()
        self.change_instance: Callable[[Instance], Instance] = lambda instance: instance
        self.change_history: Callable[[list[HistoryEntry]], list[HistoryEntry]] = lambda entries: entries
        self.change_inbox: Callable[[list[InboxRow]], list[InboxRow]] = lambda rows: rows
        self.change_outbox: Callable[[list[OutboxRow]], list[OutboxRow]] = lambda rows: rows
        self.change_timers: Callable[[list[Timer]], list[Timer]] = lambda timers: timers
        self.change_feed: Callable[[list[tuple[int, FeedEvent]]], list[tuple[int, FeedEvent]]] = lambda events: events
        self.change_dead_letters: Callable[[list[DeadLetter]], list[DeadLetter]] = lambda letters: letters

    async def instances(self, *args, **options):  # type: ignore[no-untyped-def]
        page, cursor = await super().instances(*args, **options)
        return [self.change_instance(instance) for instance in page], cursor

    async def history(self, instance, *, after_entry=0, limit=50):  # type: ignore[no-untyped-def]
        entries = self.change_history(await super().history(instance, limit=1_000))
        return [entry for entry in entries if entry.entry_no > after_entry][:limit]

    async def inbox_page(self, *, after, limit):  # type: ignore[no-untyped-def]
        return self.change_inbox(await super().inbox_page(after=None, limit=limit)) if after is None else []

    async def outbox_page(self, *, after, limit, parts=None):  # type: ignore[no-untyped-def]
        return self.change_outbox(await super().outbox_page(after=None, limit=limit)) if after is None else []

    async def timers(self, *, due_by=None, after=None, limit=100):  # type: ignore[no-untyped-def]
        return self.change_timers(await super().timers(due_by=due_by, limit=limit)) if after is None else []

    async def feed(self, *, after, limit):  # type: ignore[no-untyped-def]
        events = self.change_feed(await super().feed(after=0, limit=1_000))
        return [event for event in events if event[0] > after][:limit]

    async def dead_letters(self, **options):  # type: ignore[no-untyped-def]
        if options.get("after") is not None:
            return []
        return self.change_dead_letters(await super().dead_letters(**options))


@pytest.fixture
async def store() -> Tampered:
    """Orders o-1 (running: two messages applied, an effect and a timer waiting) and o-2 (completed)."""
    store = Tampered()
    runtime = SagaRuntime(
        store, definitions=[ORDER], targets=[callable_target("service", _refuse)], clock=ManualClock()
    )
    async with runtime:
        for number, (message_type, key) in enumerate(
            [("Placed", "o-1"), ("Paid", "o-1"), ("Placed", "o-2"), ("Shipped", "o-2"), ("Paid", "o-2")], start=1
        ):
            message = SagaMessage(message_type, {"sequence": number}, correlation_key=key, id=f"m-{number}")
            (await runtime.publish(message)).raise_for_rejected()
        await runtime.settled()
    return store


async def test_a_healthy_store_has_no_breach(store: Tampered) -> None:
    assert await check_invariants(store) == []


async def test_folding_the_history_gives_status_and_revision(store: Tampered) -> None:
    async for instance in every_instance(store):
        entries = [entry async for entry in every_entry(store, instance)]

        assert fold(entries) == (instance.status, instance.revision)


def _with(entries: list[HistoryEntry], at: int, **changes: object) -> list[HistoryEntry]:
    changed = list(entries)
    if at < len(entries):
        changed[at] = msgspec.structs.replace(entries[at], **changes)
    return changed


@pytest.mark.parametrize(
    ("invariant", "change"),
    [
        ("I1", lambda entries: _with(entries, 2, disposition="applied", revision=3)),
        ("I1", lambda entries: _with(entries, 2, status_after="running")),
        ("I2", lambda entries: entries[:1]),
        ("I2", lambda entries: _with(entries, 1, revision=3)),
        ("I2", lambda entries: _with(entries, 1, entry_no=7)),
        ("I4", lambda entries: _with(entries, 1, message_id=entries[0].message_id)),
        ("I6", lambda entries: _with(entries, 1, status_before="compensating")),
        ("I6", lambda entries: _with(entries, 1, status_after="failed")),
        ("I9", lambda entries: _with(entries, 1, payload=b'{"sequence":0}')),
    ],
)
async def test_a_history_that_was_tampered_with_is_a_breach(
    invariant: str, change: Callable[[list[HistoryEntry]], list[HistoryEntry]], store: Tampered
) -> None:
    store.change_history = change

    assert invariant in _found(await check_invariants(store))


async def test_a_message_that_failed_once_may_come_after_younger_ones(store: Tampered) -> None:
    store.change_history = lambda entries: _with(entries, 1, payload=b'{"sequence":0}', attempt=2)

    assert "I9" not in _found(await check_invariants(store))


@pytest.mark.parametrize(
    ("invariant", "changes"),
    [("I6", {"status": "failed"}), ("I6", {"revision": 9}), ("I2", {"run": 2}), ("I2", {"entries": 9})],
)
async def test_an_instance_that_its_history_does_not_lead_to_is_a_breach(
    invariant: str, changes: dict[str, object], store: Tampered
) -> None:
    store.change_instance = lambda instance: msgspec.structs.replace(instance, **changes)

    assert invariant in _found(await check_invariants(store))


async def test_a_lost_timer_is_a_breach(store: Tampered) -> None:
    store.change_timers = lambda timers: []

    assert _found(await check_invariants(store)) == {"I3"}


async def test_a_timer_that_nobody_waits_for_is_a_breach(store: Tampered) -> None:
    store.change_timers = lambda timers: [
        *timers, *(msgspec.structs.replace(timer, id="tm-other") for timer in timers),
    ]  # fmt: skip

    assert _found(await check_invariants(store)) == {"I3"}


async def test_an_effect_that_waits_twice_is_a_breach(store: Tampered) -> None:
    store.change_outbox = lambda rows: rows + rows

    assert _found(await check_invariants(store)) == {"I3"}


async def test_an_effect_that_no_history_asked_for_is_a_breach(store: Tampered) -> None:
    store.change_outbox = lambda rows: [_changed(rows[0], effect_key="made-up"), *rows[1:]]

    assert _found(await check_invariants(store)) == {"I5"}


async def test_a_lane_out_of_order_is_a_breach(store: Tampered) -> None:
    store.change_outbox = lambda rows: [_changed(rows[0], revision=9), *rows[:1]]

    assert "I3" in _found(await check_invariants(store))


async def test_an_effect_that_was_given_up_without_a_dead_letter_is_a_breach(store: Tampered) -> None:
    store.change_outbox = lambda rows: [_changed(row, dead_letter_id="dl-1") for row in rows]

    assert _found(await check_invariants(store)) == {"I3"}


async def test_a_dead_letter_whose_lane_goes_on_is_a_breach(store: Tampered) -> None:
    (row, *_) = await store.outbox_page(after=None, limit=10)
    effect: OutboxEffect = row.effect
    letter = DeadLetter(
        "dl-1", effect.created_at, "order", effect.key, "service:payments", "X", "given up", 3,
        effect=effect, outbox_part=row.ref.part, outbox_seq=row.ref.seq,
    )  # fmt: skip
    store.change_dead_letters = lambda letters: [letter]

    assert _found(await check_invariants(store)) == {"I3"}


async def test_a_message_that_waits_and_was_applied_is_a_breach(store: Tampered) -> None:
    store.change_inbox = lambda rows: [_waiting("m-1", sequence=9)]

    assert _found(await check_invariants(store)) == {"I4"}


async def test_a_message_that_younger_ones_have_passed_is_a_breach(store: Tampered) -> None:
    store.change_inbox = lambda rows: [_waiting("m-0", sequence=0)]

    assert _found(await check_invariants(store)) == {"I9"}


async def test_a_gap_in_the_feed_is_a_breach(store: Tampered) -> None:
    store.change_feed = lambda events: events[:2] + events[3:]

    assert _found(await check_invariants(store)) == {"I8"}


@pytest.mark.parametrize(
    ("before", "after", "breaches"), [(1, 0, set()), (1, 1, {"I8"}), (0, -1, set()), (-1, 0, {"I8"})]
)
async def test_the_feed_may_grow_while_it_is_read_and_no_further_than_it_says(
    store: Tampered, monkeypatch: pytest.MonkeyPatch, before: int, after: int, breaches: set[str]
) -> None:
    oldest, newest = await store.feed_bounds()
    bounds = [(oldest, newest - before), (oldest, newest - after)]

    async def feed_bounds() -> tuple[int, int]:
        return bounds.pop(0)

    monkeypatch.setattr(store, "feed_bounds", feed_bounds)

    assert _found(await check_invariants(store)) == breaches


def _found(breaches: list[str]) -> set[str]:
    return {breach.split(" ", 1)[0] for breach in breaches}


def _changed(row: OutboxRow, **changes: object) -> OutboxRow:
    return OutboxRow(row.ref, msgspec.structs.replace(row.effect, **changes))


def _waiting(message_id: str, *, sequence: int) -> InboxRow:
    accepted_at = ManualClock().now() + timedelta(seconds=1)
    payload = msgspec.json.encode({"sequence": sequence})
    return InboxRow(RowRef(0, 1), Envelope("order", "o-1", "Paid", message_id, payload, accepted_at))
