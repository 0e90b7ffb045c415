"""The judgement at the end: what was promised, what is in the store, what arrived outside.

lost        a message that was acknowledged, and is neither applied, ignored, pending nor dead-lettered; or an
            effect that was committed, and has neither arrived nor waits nor was given up
duplicated  two different effect keys for one (order, step) at the receiver, or a message applied twice
stuck       something waits though all is settled, or an order is not where it has to end
out_of_order  a message that was acknowledged before another one was offered, and stands behind it in the history
repeats     one effect key that was taken more than once: allowed, and counted

How an order has to end, and what has to be charged, the oracle says from the order of acceptance that the store has
recorded; that this order is true, the ledger of those who published says.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from sagaloom.engine.records import HistoryEntry
from sagaloom.errors import Fenced
from sagaloom.ports.store import Lease, SagaStore, UnitOfWork
from sagaloom.testing.invariants import (
    check_invariants,
    every_dead_letter,
    every_entry,
    every_inbox_row,
    every_instance,
)
from tests.crash.ledger import Ledger
from tests.crash.oracle import Account, balance, fold
from tests.crash.receiver import Arrival
from tests.crash.story import Order
from tests.crash.worker import what_waits

__all__ = ["CHECKED", "Verdict", "find_forgotten", "judge", "refuses_a_stale_lease"]

CHECKED = ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10")
_SHOWN_MAX = 12


@dataclass
class Verdict:
    """What was found. The run passes when nothing was lost, duplicated, stuck, out of order or breached, and the
    money that arrived is the oracle's."""

    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    stuck: list[str] = field(default_factory=list)
    out_of_order: list[str] = field(default_factory=list)
    breaches: list[str] = field(default_factory=list)
    repeats: int = 0
    net: int = 0
    """Charges minus refunds, as they arrived."""
    net_expected: int = 0

    @property
    def is_clean(self) -> bool:
        is_found = self.lost or self.duplicated or self.stuck or self.out_of_order or self.breaches
        return not is_found and self.net == self.net_expected

    def counts(self) -> str:
        """The numbers that have to be nothing."""
        return (
            f"lost={len(self.lost)} duplicated={len(self.duplicated)} stuck={len(self.stuck)} "
            f"out_of_order={len(self.out_of_order)}"
        )

    def lines(self) -> list[str]:
        """What is wrong, a few of each kind, and the line about the invariants."""
        told: list[str] = []
        for name in ("lost", "duplicated", "stuck", "out_of_order", "breaches"):
            found: list[str] = getattr(self, name)
            told += [f"  {name}: {what}" for what in found[:_SHOWN_MAX]]
            if len(found) > _SHOWN_MAX:
                told.append(f"  {name}: ... and {len(found) - _SHOWN_MAX} more")
        told.append(f"charges - refunds = {self.net}, the oracle says {self.net_expected}")
        broken = sorted({breach.split(" ", 1)[0] for breach in self.breaches}, key=lambda name: int(name[1:]))
        holding = " ".join(name for name in CHECKED if name not in broken)
        told.append(f"invariants {holding}: ok" + (f"; BROKEN: {' '.join(broken)}" if broken else ""))
        return told


@dataclass
class _Found:
    """What the store has of each message, and which effects it committed."""

    dispositions: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    committed_effects: dict[str, str] = field(default_factory=dict)
    settled_elsewhere: set[str] = field(default_factory=set)
    dead_letters: Counter[tuple[str, str]] = field(default_factory=Counter)
    accepted: dict[str, list[HistoryEntry]] = field(default_factory=dict)
    """Of each order: what came through the door, in the order in which the store says that it came."""
    statuses: dict[str, tuple[str, dict[str, object]]] = field(default_factory=dict)
    ledger_orders: list[str] = field(default_factory=list)


async def judge(store: SagaStore, *, orders: Sequence[Order], ledger: Ledger, arrivals: Iterable[Arrival]) -> Verdict:
    """Compares the settled store with what was promised to publishers and with what arrived at the receiver."""
    verdict = Verdict(breaches=[*await check_invariants(store), *ledger.oddities])
    found = await _read(store)
    by_key = {arrival.key: arrival for arrival in arrivals}
    accounts = {order.id: fold(order, [entry.type for entry in found.accepted.get(order.id, ())]) for order in orders}
    _judge_messages(verdict, ledger, found)
    _judge_acceptance(verdict, ledger, found)
    _judge_effects(verdict, orders, accounts, found, by_key)
    _judge_orders(verdict, orders, accounts, found)
    waiting = await what_waits(store)
    if waiting:
        verdict.stuck.append(f"the store still has work: {waiting}")
    return verdict


async def find_forgotten(store: SagaStore, ledger: Ledger) -> list[str]:
    """The acknowledged messages that the store knows nothing of."""
    found = await _read(store)
    return [message for message in ledger.acknowledged if not found.dispositions.get(message)]


async def refuses_a_stale_lease(store: SagaStore, current: Lease) -> list[str]:
    """Tries to write as the holder before the current one; the store itself must refuse (I7)."""
    for stale in (Lease(current.holder, current.epoch - 1), Lease("somebody else", current.epoch)):
        try:
            await store.commit([UnitOfWork(part=0)], lease=stale)
        except Fenced:
            continue
        return [f"I7 the store took a commit of {stale}, though {current} holds the lease"]
    return []


async def _read(store: SagaStore) -> _Found:
    found = _Found()
    async for instance in every_instance(store):
        if instance.saga_id == "order":
            found.statuses[instance.key] = (instance.status, msgspec.json.decode(instance.state))
            found.accepted[instance.key] = []
        elif instance.saga_id == "ledger":
            found.ledger_orders += msgspec.json.decode(instance.state)["orders"]
        async for entry in every_entry(store, instance):
            if instance.saga_id == "order":
                found.dispositions[entry.message_id].add(entry.disposition)
                if entry.origin == "door":
                    found.accepted[instance.key].append(entry)
            for step in entry.steps:
                for effect in step.effects:
                    if effect.effect_key is not None and (effect.target or "").startswith("service:"):
                        found.committed_effects[effect.effect_key] = f"{effect.target} of {instance.key}"
    async for row in every_inbox_row(store):
        found.dispositions[row.envelope.id].add("pending")
    async for letter in every_dead_letter(store):
        if letter.envelope is not None:
            found.dispositions[letter.envelope.id].add("dead_lettered")
            found.dead_letters[letter.key, letter.type] += 1
        elif letter.effect is not None:
            found.settled_elsewhere.add(letter.effect.effect_key)
            found.dead_letters[letter.key, letter.type] += 1
    after = None
    while page := await store.outbox_page(after=after, limit=500):
        found.settled_elsewhere.update(row.effect.effect_key for row in page)
        after = page[-1].ref
    return found


def _judge_messages(verdict: Verdict, ledger: Ledger, found: _Found) -> None:
    for message, order in ledger.acknowledged.items():
        if not found.dispositions.get(message):
            verdict.lost.append(f"message {message} of {order} was acknowledged, and the store knows nothing of it")


def _judge_acceptance(verdict: Verdict, ledger: Ledger, found: _Found) -> None:
    """Compares the order in each history with what the publishers know of it. Whoever fails at first steps aside."""
    for order_id, entries in found.accepted.items():
        known = [entry for entry in entries if entry.message_id in ledger.acknowledged_at]
        for place, entry in enumerate(known):
            for later in known[place + 1 :]:
                if later.attempt == 1 and ledger.is_older(later.message_id, entry.message_id):
                    verdict.out_of_order.append(
                        f"{later.message_id} of {order_id} was acknowledged before {entry.message_id} was offered, and "
                        "stands behind it"
                    )
        twice = [message for message, count in Counter(entry.message_id for entry in entries).items() if count > 1]
        verdict.duplicated += [f"message {message} stands in the history of {order_id} twice" for message in twice]


def _judge_effects(
    verdict: Verdict,
    orders: Sequence[Order],
    accounts: Mapping[str, Account],
    found: _Found,
    arrivals: dict[str, Arrival],
) -> None:
    keys: dict[tuple[str, str], list[Arrival]] = defaultdict(list)
    for arrival in arrivals.values():
        keys[arrival.order_id, arrival.step].append(arrival)
        if arrival.key not in found.committed_effects:
            verdict.breaches.append(
                f"I5 effect {arrival.key} ({arrival.order_id}, {arrival.step}) was dispatched, and no history has it"
            )
        verdict.repeats += max(0, arrival.taken - 1)
    for (order_id, step), under in keys.items():
        if len(under) > 1:
            verdict.duplicated.append(f"{step} of {order_id} came under {len(under)} keys: {[a.key for a in under]}")
    for key, what in found.committed_effects.items():
        came = key in arrivals and arrivals[key].taken > 0
        if not came and key not in found.settled_elsewhere:
            verdict.lost.append(f"effect {key} ({what}) was committed, and neither arrived nor waits")
    for order in orders:
        for step, amount in accounts[order.id].effects.items():
            taken = [arrival for arrival in keys.get((order.id, step), ()) if arrival.taken]
            if not taken:
                verdict.lost.append(f"the {step} of {order.id} ({order.course.name}) never arrived")
            elif taken[0].amount != amount:
                verdict.breaches.append(f"I2 the {step} of {order.id} came as {taken[0].amount}, not as {amount}")
        charge, refund = keys.get((order.id, "charge")), keys.get((order.id, "refund"))
        if charge and refund and refund[0].first_taken < charge[0].first_taken:
            verdict.breaches.append(f"I3 the refund of {order.id} overtook its charge")
    expected = {(order.id, step) for order in orders for step in accounts[order.id].effects}
    verdict.breaches += [f"I2 {step} of {order_id} was never asked for" for order_id, step in keys.keys() - expected]

    verdict.net = balance((arrival.step, arrival.amount) for arrival in arrivals.values() if arrival.taken)
    verdict.net_expected = balance(each for account in accounts.values() for each in account.effects.items())


def _judge_orders(verdict: Verdict, orders: Sequence[Order], accounts: Mapping[str, Account], found: _Found) -> None:
    expected_dead: Counter[tuple[str, str]] = Counter()
    for order in orders:
        status, state = found.statuses.get(order.id, ("not there", {}))
        expected = accounts[order.id].status
        if status != expected or expected not in ("completed", "failed"):
            verdict.stuck.append(f"{order.id} ({order.course.name}) is {status}, expected {expected}: {state}")
        for message_type in order.course.dead_letters:
            expected_dead[order.id, message_type] += 1
    for (key, message_type), count in (found.dead_letters - expected_dead).items():
        verdict.stuck.append(f"{count} dead letters nobody expected: {message_type} of {key}")
    for (key, message_type), count in (expected_dead - found.dead_letters).items():
        verdict.lost.append(f"{count} dead letters are missing: {message_type} of {key}")
    wanted = Counter(order.id for order in orders if order.course.name == "ledger")
    entered = Counter(found.ledger_orders)
    verdict.lost += [f"ledger entry of {order_id} is missing" for order_id in wanted - entered]
    verdict.breaches += [f"I4 ledger entry of {order_id} was applied twice" for order_id in entered - wanted]
