"""The driver: lets orders out, kills, stops and restarts workers, and keeps the books.

    clients (64) ──HTTP──► workers (killed) ──effects──► receiver (remembers)
         │                    │
       ledger                store ◄── witness

What happens to workers is planned before anything starts: each named step is a kill at least once, the others come at
random steps and at random moments. The orders are let out in portions, one before each kill, so that every kill hits
under load. A worker that is to die at a step kills itself there; one that does not get there in time is killed from
outside, and the step is planned again. Every process is ended by its process id, however the run ends.

With several workers one dies and the others go on; after a short while another comes in its place, so partitions change
hands all the time. Now and then all are killed at once. Some are stopped past their lease and woken: whatever they
still want to write must be refused. In the middle of the run nobody is harmed for a while, and each worker has to do
its share. What can happen to the place of the store itself (`places.py`) happens in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from sagaloom.ids import PARTITIONS, key_hash, partition_of
from tests.crash.clients import Clients
from tests.crash.fleet import BOOT_SECONDS_MAX, Fleet, Slot
from tests.crash.ledger import Ledger
from tests.crash.places import Place
from tests.crash.receiver import Arrival
from tests.crash.story import Order, orders
from tests.crash.verdict import Verdict, judge, refuses_a_stale_lease
from tests.crash.wire import Client
from tests.crash.witness import Witness
from tests.crash.worker import Waiting

__all__ = ["ALL_AT_ONCE", "RANDOM", "STOPPED_DECIDED", "STOPS", "CrashRun", "Report", "plan_kills", "plan_stops"]

RANDOM: Final = "at random"
ALL_AT_ONCE: Final = "all at once"
STOPPED: Final = "stopped, at random"
STOPPED_DECIDED: Final = "stopped, decided"
STOPS: Final = (STOPPED, STOPPED_DECIDED)

_STEP_SECONDS_MAX: Final = 4.0
_PLANNED_AGAIN_MAX: Final = 3
_SETTLE_SECONDS_MAX: Final = 60.0
_ORDERS_PER_SECOND_MIN: Final = 20
_SHARED_SECONDS_MAX: Final = 30.0
_TAKEOVER_SECONDS_MAX: Final = 10.0
_TAKEOVERS_MIN: Final = 5
"""Of fewer takeovers the median says what else the machine had to do."""
_LOOK_SECONDS: Final = 0.005
_REFUSED_SECONDS_MAX: Final = 30.0
_HOLDING_SECONDS_MAX: Final = 2.0
_ORDERS_MORE: Final = 8
_BACK_SECONDS_MAX: Final = 0.4
_WAITS_FOR_TAKEOVER: Final = 0.8
_SHARE_PHASE: Final = 0.25
"""How much of the orders is kept for the time in which nobody is harmed."""
_FAIR: Final = 0.6
"""Each worker must apply at least so much of its share, which is what falls into its partitions. They are shared out
evenly, and yet of 100 orders among four workers one has fewer than 15 in one run of fifty."""
_SHARED_MESSAGES_MIN: Final = 200
"""Of fewer messages a share may be anything: orders have more or less of them."""

# How often a step comes in one portion of orders: a fault further out would wait for a load that never comes.
_NTH_MAX: Final = {"accepted": 3, "compensated": 2, "timer_due": 2, "dispatched": 20, "settled": 20}
_NTH_MAX_OTHERS: Final = 25


def plan_kills(kills: int, rng: random.Random, *, steps: Sequence[str], processes: int = 1) -> list[tuple[str, int]]:
    """(step, nth) of each kill: each of `steps` once, at the first time or at a random one; at least three at random
    moments; the rest half and half. So it is never fewer than the steps and three. With several processes one in ten
    hits all of them at once."""
    planned = [*steps, *(rng.choice(steps) for _ in range(max(0, kills - len(steps) - 3) // 2))]
    plan = [(step, rng.randint(1, _NTH_MAX.get(step, _NTH_MAX_OTHERS))) for step in planned]
    at_random = [(RANDOM, 0)] * max(3, kills - len(planned))
    if processes > 1:
        at_once = max(1, (len(plan) + len(at_random)) // 10)
        at_random[:at_once] = [(ALL_AT_ONCE, 0)] * at_once
    plan += at_random
    rng.shuffle(plan)
    return plan


def plan_stops(stops: int) -> list[tuple[str, int]]:
    """(how, 0) of each stop: both kinds by turns."""
    return [(STOPS[number % 2], 0) for number in range(stops)]


@dataclass
class Report:
    """What happened, for the table and the closing lines."""

    verdict: Verdict
    kills: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    disasters: Counter[str] = field(default_factory=Counter)
    killed_processes: int = 0
    messages: int = 0
    seconds: float = 0.0
    ready_seconds: list[float] = field(default_factory=list)
    after_kill_seconds: list[float] = field(default_factory=list)
    """From each kill until others held all that the dead one had held."""
    after_stop_seconds: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    woken: int = 0
    shares: list[float] = field(default_factory=list)
    """What part of the messages each worker has applied."""
    fair_shares: list[float] = field(default_factory=list)
    """What part of the orders fell into its partitions."""
    shared_messages: int = 0
    cut_answers: int = 0
    duplicates_sent: int = 0
    refused_retryably: Counter[str] = field(default_factory=Counter)

    def too_slow(self, after_kill_seconds_max: float) -> list[str]:
        """What several workers did not do as they should: take over in time, and share the work."""
        found: list[str] = []
        for what, seconds, most in (
            ("kill -9", self.after_kill_seconds, after_kill_seconds_max),
            ("SIGSTOP", self.after_stop_seconds, _TAKEOVER_SECONDS_MAX),
        ):
            if len(seconds) >= _TAKEOVERS_MIN and median(seconds) > most:
                found.append(
                    f"takeover after {what} took {median(seconds):.2f} s (median), at most {most:g} s are allowed"
                )
        is_telling = self.shared_messages >= _SHARED_MESSAGES_MIN
        pairs = list(zip(self.shares, self.fair_shares, strict=True))
        if is_telling and any(share < _FAIR * fair for share, fair in pairs):
            shares = ", ".join(f"{share:.0%} where {fair:.0%} is fair" for share, fair in pairs)
            found.append(f"the work was not shared: {shares}, of {self.shared_messages} messages")
        return found


class CrashRun:
    """One run on the store at `place`; its logs go into `directory`."""

    def __init__(
        self,
        directory: Path,
        place: Place,
        *,
        orders: Sequence[Order],
        kills: Sequence[tuple[str, int]],
        stops: Sequence[tuple[str, int]] = (),
        disasters: Sequence[str] = (),
        processes: int = 1,
        rng: random.Random,
        tell: Callable[[str], None],
        sabotage: str = "",
        settle_seconds: float = _SETTLE_SECONDS_MAX,
    ) -> None:
        self._place = place
        self._log = directory / "worker.log"
        self._arrivals_log = directory / "receiver.log"
        self._orders = list(orders)
        self._harm = [*kills, *stops, *((disaster, 0) for disaster in disasters)]
        rng.shuffle(self._harm)
        self._size = processes
        self._rng = rng
        self._sabotage = sabotage
        self._settle_seconds = settle_seconds
        self._tell = tell
        self._ledger = Ledger()
        self._report = Report(Verdict())
        self._witness = Witness(place)
        self._receiver: asyncio.subprocess.Process | None = None
        self._receiver_port = 0
        self._watching: list[asyncio.Task[None]] = []
        self._began = time.monotonic()

    async def run(self) -> Report:
        """Does everything; whatever happens, no process is left behind."""
        try:
            await self._start_receiver()
            fleet = Fleet(
                self._place.address,
                self._receiver_port,
                size=self._size,
                log=self._log,
                odd=self._ledger.odd,
                sabotage=self._sabotage,
            )
            clients = Clients(self._orders, fleet=fleet, ledger=self._ledger, rng=self._rng)
            try:
                await self._do(fleet, clients)
            finally:
                await clients.end()
                await self._end_watching()
                await fleet.end()
            self._report.verdict = await self._judge(await self._arrivals())
        finally:
            await self._place.close()
            await self._end_receiver()
        self._report.messages = sum(len(order.messages()) for order in self._orders)
        self._report.seconds = time.monotonic() - self._began
        self._report.ready_seconds = fleet.ready_seconds
        self._report.refused = fleet.refused
        self._report.cut_answers = self._ledger.cut_answers
        self._report.duplicates_sent = self._ledger.duplicates_sent
        self._report.refused_retryably = self._ledger.refused_retryably
        return self._report

    async def _do(self, fleet: Fleet, clients: Clients) -> None:
        await fleet.start()
        clients.start()
        if self._is_shared:
            await fleet.all_ready()
            self._watch(self._witness.follow_feed(self._ledger.odd))
        await self._harm_them(fleet, clients)
        await fleet.all_ready()
        await clients.finish(_SETTLE_SECONDS_MAX + len(self._orders) / _ORDERS_PER_SECOND_MIN)
        await self._settle(fleet)
        await self._end_watching()
        if not self._is_shared:
            # The only one so far: a second one gets its share.
            fleet.slots.append(Slot(len(fleet.slots)))
            await fleet.all_ready()
        await self._wait_until_shared_out(fleet)
        while await self._witness.read_feed(self._ledger.odd):
            pass
        await self._stop_in_order(fleet)

    @property
    def _is_shared(self) -> bool:
        return self._size > 1

    # ------------------------------------------------------------------ harm

    async def _harm_them(self, fleet: Fleet, clients: Clients) -> None:
        plan = list(self._harm)
        planned_again: Counter[str] = Counter()
        total, middle = len(plan), len(plan) // 2
        kept = int(len(self._orders) * _SHARE_PHASE) if self._is_shared else 0
        portion = (len(self._orders) - kept) / (total + 1)
        done = let_out = 0
        while done < len(plan):
            how, nth = plan[done]
            if done == middle and kept:
                let_out += kept
                await self._share_the_work(fleet, clients, kept)
            await clients.let_out_up_to(let_out + int(portion * (done + 1)))
            if how in STOPS:
                await self._stop_and_wake(fleet, clients, how)
            elif how == ALL_AT_ONCE:
                await self._kill_all(fleet, clients)
            elif how in self._place.disasters:
                await self._strike(fleet, clients, how)
            elif await self._kill_one(fleet, clients, how, nth) or how == RANDOM:
                self._report.kills[how] += 1
            else:
                self._report.kills[RANDOM] += 1
                if planned_again[how] < _PLANNED_AGAIN_MAX:
                    # The load was not enough for the nth time; the first time will come.
                    planned_again[how] += 1
                    plan.append((how, 1))
                elif not self._report.kills[how]:
                    self._ledger.odd(f"I10 step {how} was never reached, so nobody was killed there")
            done += 1
            if done % max(1, total // 10) == 0 or done == len(plan):
                self._tell(
                    f"  kill {done}/{len(plan)}, {len(self._ledger.acknowledged)} messages acknowledged, "
                    f"{time.monotonic() - self._began:.1f} s"
                )
            clients.raise_trouble()
            fleet.raise_trouble()
            _raise_what(self._watching)

    async def _kill_one(self, fleet: Fleet, clients: Clients, how: str, nth: int) -> bool:
        """Kills one worker, and says whether it died where it was to. One that starts, dies there or later."""
        slot = self._rng.choice(fleet.slots)
        if slot.is_empty:
            worker = await fleet.birth(slot, None if how == RANDOM else f"{how}:{nth}")
        else:
            await fleet.ready(slot)
            assert slot.worker is not None
            worker = slot.worker
            if how != RANDOM:
                await self._wait_until_it_holds(slot)
                await fleet.ask(slot, "/arm", f"{how}:{nth}".encode())
        died_there = False
        if how == RANDOM:
            await self._wait_for_a_random_moment(fleet, clients, slot)
        else:
            died_there = await self._dies_by_itself(clients, worker.died)
        since = time.monotonic()
        await fleet.kill(slot)
        self._report.killed_processes += 1
        if self._is_shared:
            holder = slot.holder
            fleet.birth_later(slot, self._rng.uniform(0.0, _BACK_SECONDS_MAX))
            measuring = self._takes_over(fleet, slot, holder, since)
            if self._rng.random() < _WAITS_FOR_TAKEOVER:
                await measuring
            else:
                self._watch(measuring)
        return died_there

    async def _wait_until_it_holds(self, slot: Slot) -> None:
        """Returns when the worker of `slot` holds anything: before, it passes few steps."""
        deadline = time.monotonic() + _HOLDING_SECONDS_MAX
        while time.monotonic() < deadline:
            if await self._witness.parts_of(slot.holder):
                return
            await asyncio.sleep(_LOOK_SECONDS)

    async def _kill_all(self, fleet: Fleet, clients: Clients) -> None:
        """Kills everybody in one moment: nobody is left to take over until the next ones come."""
        await fleet.all_ready()
        await self._wait_for_a_random_moment(fleet, clients, self._rng.choice(fleet.slots))
        async with self._place.away():
            await fleet.kill(*fleet.slots)
        self._report.killed_processes += len(fleet.slots)
        self._report.kills[ALL_AT_ONCE] += 1
        for slot in fleet.slots:
            if slot.is_empty:
                fleet.birth_later(slot, self._rng.uniform(0.0, _BACK_SECONDS_MAX))

    async def _strike(self, fleet: Fleet, clients: Clients, disaster: str) -> None:
        """Has something happen to the place of the store in the middle of the load. Workers survive it."""
        await fleet.all_ready()
        await self._wait_for_a_random_moment(fleet, clients, self._rng.choice(fleet.slots))
        since = time.monotonic()
        await self._place.strike(disaster)
        self._report.disasters[disaster] += 1
        self._tell(f"  {disaster}, and back after {time.monotonic() - since:.1f} s")

    async def _wait_for_a_random_moment(self, fleet: Fleet, clients: Clients, slot: Slot) -> None:
        """Up to a random number of the acknowledgements of this portion, and a bit: mostly in the middle of the load,
        now and then while only effects and timers are under way, or while the worker still starts."""
        if self._rng.random() < 0.1:
            await asyncio.sleep(self._rng.uniform(0.0, 0.05))
            return
        await fleet.ready(slot)
        open_messages = 3 * (clients.let_out - clients.done)
        goal = len(self._ledger.acknowledged) + self._rng.randint(0, open_messages)
        deadline = time.monotonic() + 1.0
        while len(self._ledger.acknowledged) < goal and time.monotonic() < deadline:  # noqa: ASYNC110 - a deadline too
            await asyncio.sleep(0.001)
        await asyncio.sleep(self._rng.choice((0.0, self._rng.uniform(0.0, 0.01), self._rng.uniform(0.0, 0.3))))

    async def _dies_by_itself(self, clients: Clients, died: asyncio.Future[int]) -> bool:
        """Whether the worker reaches its fault; more orders are let out when there is nothing left to do."""
        deadline = time.monotonic() + _STEP_SECONDS_MAX
        while time.monotonic() < deadline:
            await asyncio.wait([died], timeout=0.1)
            if died.done():
                return True
            if clients.are_idle:
                await self._let_more_out(clients, _ORDERS_MORE)
        return False

    async def _let_more_out(self, clients: Clients, count: int) -> None:
        """Lets some orders out before their time, and new ones when there are not enough left."""
        if clients.let_out + count > len(self._orders):
            self._orders += orders(3 * count, self._rng, prefix=f"x{len(self._orders)}-")
        await clients.let_out_up_to(clients.let_out + count)

    async def _stop_and_wake(self, fleet: Fleet, clients: Clients, how: str) -> None:
        """Stops a worker outside of any write, has the others take over when its lease has run out, and wakes it."""
        await fleet.all_ready()
        await self._wait_until_shared_out(fleet)
        slot = self._rng.choice(fleet.slots)
        worker = slot.worker
        assert worker is not None
        if how == STOPPED_DECIDED:
            heard = len(worker.notes)
            await worker.signal(signal.SIGUSR1)
            async with asyncio.timeout(BOOT_SECONDS_MAX):
                stopping = asyncio.create_task(worker.hears("stopping", after=heard))
                while not stopping.done():
                    await asyncio.wait([stopping], timeout=0.1)
                    if clients.are_idle:
                        await self._let_more_out(clients, _ORDERS_MORE)
            fleet.halted(slot)
        else:
            async with self._place.nobody_writes():
                await fleet.halt(slot)
        self._report.stops[how] += 1
        holder, since = slot.holder, time.monotonic()
        seconds = await self._taken_over(fleet, slot, holder, await self._witness.parts_of(holder), since)
        if seconds is None:
            self._ledger.odd(
                f"I7 nobody has taken over from a stopped worker within {_TAKEOVER_SECONDS_MAX:g} s: "
                f"{len(await self._witness.parts_of(holder))} partitions are still its own"
            )
        else:
            self._report.after_stop_seconds.append(seconds)
        await asyncio.sleep(self._rng.uniform(0.0, 0.3))
        heard = len(worker.notes)
        await fleet.wake(slot)
        self._report.woken += 1
        try:
            async with asyncio.timeout(_REFUSED_SECONDS_MAX):
                note = await worker.hears("refused", "wrote", after=heard)
                if how == STOPPED_DECIDED and note != ["refused", "write"]:
                    self._ledger.odd(
                        "I7 a worker was stopped when it was about to commit, others took everything over, and then "
                        f"it told: {' '.join(note)}"
                    )
                await worker.hears("joined", after=heard)
        except TimeoutError:
            self._ledger.odd(
                "I7 a worker was stopped until others had taken everything over; woken, it was not refused, or did not "
                f"join again, within {_REFUSED_SECONDS_MAX:g} s: {worker.notes[heard:]}"
            )

    # ------------------------------------------------------------------ who holds what

    async def _takes_over(self, fleet: Fleet, slot: Slot, holder: str, since: float) -> None:
        """Measures how long it takes until others have what the worker of `slot` had, if others are alive meanwhile."""
        if not holder or not fleet.others_are_up(slot):
            return
        parts = await self._witness.parts_of(holder)
        seconds = await self._taken_over(fleet, slot, holder, parts, since)
        if seconds is not None and parts:
            self._report.after_kill_seconds.append(seconds)
        elif seconds is None and fleet.others_are_up(slot):
            self._ledger.odd(f"I7 nobody has taken over from a dead worker within {_TAKEOVER_SECONDS_MAX:g} s")

    async def _taken_over(
        self, fleet: Fleet, slot: Slot, holder: str, parts: Collection[int], since: float
    ) -> float | None:
        """The seconds from `since` until each of `parts` is held by somebody else than `holder`, who lived in `slot`.
        None: it took too long, or the others died."""
        while time.monotonic() < since + _TAKEOVER_SECONDS_MAX:
            holders = await self._witness.holders()
            if all(holders.get(part, holder) != holder for part in parts):
                return time.monotonic() - since
            if not fleet.others_are_up(slot) and slot.is_empty:
                return None
            await asyncio.sleep(_LOOK_SECONDS)
        return None

    async def _wait_until_shared_out(self, fleet: Fleet) -> None:
        """Returns when every worker believes to hold its fair share, each partition is believed by one, and the store
        says the same (I7)."""
        fewest = PARTITIONS // len(fleet.slots)
        deadline = time.monotonic() + _SHARED_SECONDS_MAX
        found = ""
        while time.monotonic() < deadline:
            holders = await self._witness.holders()
            believed = {slot.holder: (await fleet.standing(slot)).parts for slot in fleet.slots}
            shares = [len(parts) for parts in believed.values()]
            stored = {holder: [part for part in sorted(holders) if holders[part] == holder] for holder in believed}
            if believed == stored and sum(shares) == PARTITIONS and min(shares) >= fewest:
                return
            found = f"believed {shares}, stored {[len(parts) for parts in stored.values()]}"
            await asyncio.sleep(_LOOK_SECONDS * 4)
        self._ledger.odd(f"I7 after {_SHARED_SECONDS_MAX:g} s the partitions are not shared out: {found}")

    async def _share_the_work(self, fleet: Fleet, clients: Clients, count: int) -> None:
        """Counts what each worker applies while `count` orders are let out and nobody is harmed."""
        await fleet.all_ready()
        await self._wait_until_shared_out(fleet)
        standings = [await fleet.standing(slot) for slot in fleet.slots]
        first = clients.let_out
        await self._let_more_out(clients, count)
        fallen = [partition_of(key_hash("order", order.id)) for order in self._orders[first : clients.let_out]]
        self._report.fair_shares = [
            sum(part in standing.parts for part in fallen) / max(1, len(fallen)) for standing in standings
        ]
        async with asyncio.timeout(_SETTLE_SECONDS_MAX + count / _ORDERS_PER_SECOND_MIN):
            while not clients.are_idle:
                await asyncio.sleep(0.01)
                clients.raise_trouble()
        after = [(await fleet.standing(slot)).applied for slot in fleet.slots]
        applied = [later - earlier.applied for earlier, later in zip(standings, after, strict=True)]
        self._report.shared_messages = sum(applied)
        self._report.shares = [each / max(1, sum(applied)) for each in applied]

    # ------------------------------------------------------------------ the end

    async def _settle(self, fleet: Fleet) -> None:
        """Waits until the store has no work left, or for as long as that may take at most."""
        deadline = time.monotonic() + self._settle_seconds
        while time.monotonic() < deadline:
            if not msgspec.json.decode(await fleet.ask(fleet.slots[0], "/waiting"), type=Waiting):
                return
            await asyncio.sleep(0.05)

    async def _stop_in_order(self, fleet: Fleet) -> None:
        """Stops one after the other; whoever goes leaves nothing behind."""
        for slot in fleet.slots:
            status = await fleet.stop(slot)
            if status:
                self._ledger.odd(f"I10 a worker ended with status {status} when asked to stop: see {self._log}")
            if left := await self._witness.parts_of(slot.holder):
                self._ledger.odd(f"I7 a worker has stopped in order, and still holds {len(left)} partitions")
        if left_members := await self._witness.members():
            self._ledger.odd(f"I7 all workers have stopped in order, and still there are {left_members}")

    async def _judge(self, arrivals: list[Arrival]) -> Verdict:
        async with self._place.look() as (_, store):
            lease = await store.acquire("judge", now=datetime.now(UTC))
            verdict = await judge(store, orders=self._orders, ledger=self._ledger, arrivals=arrivals)
            verdict.breaches += await refuses_a_stale_lease(store, lease)
            _, newest = await store.feed_bounds()
            if self._witness.feed_seen != newest:
                verdict.breaches.append(
                    f"I8 a reader followed the feed up to event {self._witness.feed_seen}, and {newest} is the newest"
                )
            await store.release(lease)
        verdict.stuck += self._report.too_slow(self._place.after_kill_seconds_max)
        return verdict

    # ------------------------------------------------------------------ what runs beside

    def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        self._watching.append(asyncio.create_task(work))

    async def _end_watching(self) -> None:
        """Ends what runs for ever, and raises what any of it has raised."""
        watching, self._watching = self._watching, []
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        _raise_what(watching)

    async def _start_receiver(self) -> None:
        with self._log.open("ab") as log:
            self._receiver = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.crash.receiver", str(self._arrivals_log),
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log,
                start_new_session=True,  # Ctrl-C is for the driver, which then ends everybody in order.
            )  # fmt: skip
        assert self._receiver.stdout is not None
        async with asyncio.timeout(BOOT_SECONDS_MAX):
            self._receiver_port = int(await self._receiver.stdout.readline())

    async def _end_receiver(self) -> None:
        if self._receiver is not None and self._receiver.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._receiver.kill()
            await self._receiver.wait()

    async def _arrivals(self) -> list[Arrival]:
        connection = Client()
        try:
            _, answer = await connection.request(self._receiver_port, "GET", "/arrivals")
        finally:
            connection.close()
        return msgspec.json.decode(answer, type=list[Arrival])


def _raise_what(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled():
            task.result()
