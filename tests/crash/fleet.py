"""The workers of a run: where each of them listens, who is up, and who comes back after a kill.

A slot is the place of one worker; when it dies, the next one takes its place, as another process under another name.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from tests.crash.nursery import Nursery, Worker
from tests.crash.wire import Client
from tests.crash.worker import NO_STORE, Standing

__all__ = ["BOOT_SECONDS_MAX", "Fleet", "Slot"]

BOOT_SECONDS_MAX: Final = 40.0
_NO_STORE_SECONDS: Final = 0.2
"""After how long another worker looks for the store that one has not found."""
_STOP_SECONDS_MAX: Final = 5.0


class Slot:
    """The place of one worker."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.worker: Worker | None = None
        self.port = 0
        self.holder = ""
        """By what name its worker holds partitions; known as soon as that has joined."""
        self.is_up = False
        self.is_stopped = False
        self.coming: asyncio.Task[None] | None = None
        """Brings the next worker of this place after a while."""
        self.is_being_born = False

    @property
    def is_empty(self) -> bool:
        """Whether nobody lives here, nor is being born."""
        return not self.is_being_born and (self.worker is None or self.worker.died.done())


class Fleet:
    """Has `size` places for workers on the store at one address."""

    def __init__(
        self,
        address: str,
        receiver_port: int,
        *,
        size: int,
        log: Path,
        odd: Callable[[str], None],
        sabotage: str = "",
    ) -> None:
        self.slots = [Slot(number) for number in range(size)]
        self.ready_seconds: list[float] = []
        """How long each worker took from its birth until it was ready."""
        self.refused: Counter[str] = Counter()
        """What workers wanted to do when they were told that their lease is over."""
        self._nursery = Nursery("tests.crash.worker", address, str(receiver_port), sabotage, log=log)
        self._log = log
        self._odd = odd
        self._epochs: dict[int, str] = {}
        self._someone = asyncio.Event()
        self._may_exit = False
        self._trouble: list[str] = []

    async def start(self) -> None:
        await self._nursery.start()

    # ------------------------------------------------------------------ coming

    async def birth(self, slot: Slot, fault: str | None = None) -> Worker:
        """A new worker in `slot`; clients go to it as soon as it is ready, which it may never be."""
        assert slot.is_empty
        if slot.coming is not None:
            slot.coming.cancel()
            slot.coming = None
        return await self._birth(slot, fault)

    async def _birth(self, slot: Slot, fault: str | None) -> Worker:
        slot.is_stopped, slot.holder = False, ""
        slot.is_being_born = True
        try:
            worker = slot.worker = await self._nursery.birth(fault)
        finally:
            slot.is_being_born = False
        born = time.monotonic()
        worker.on_note = lambda note: self._noted(slot, worker, note)
        worker.ready.add_done_callback(lambda ready: self._is_up(slot, worker, ready.result(), born))
        worker.died.add_done_callback(lambda died: self._is_down(slot, worker, died.result()))
        for note in worker.notes:
            self._noted(slot, worker, note)
        return worker

    def birth_later(self, slot: Slot, seconds: float) -> None:
        """Has a new worker come after a while, unless somebody else gives `slot` one before."""

        async def come() -> None:
            await asyncio.sleep(seconds)
            await self._birth(slot, None)

        slot.coming = asyncio.create_task(come())

    async def all_ready(self) -> None:
        """Returns when every place has a worker that is ready."""
        for slot in self.slots:
            if slot.is_empty:
                await self.birth(slot)
            await self.ready(slot)

    async def ready(self, slot: Slot) -> None:
        async with asyncio.timeout(BOOT_SECONDS_MAX):
            while True:
                if slot.coming is not None and not slot.coming.done():
                    await asyncio.shield(slot.coming)
                worker = slot.worker
                assert worker is not None
                said = await asyncio.shield(worker.ready)
                if said or await worker.died != NO_STORE:
                    break
                await asyncio.sleep(0)  # `_is_down` is told by the same future, and may have its turn after us
        if not said:
            raise RuntimeError(f"a worker did not start (status {await worker.died}): see {self._log}")
        await asyncio.sleep(0)  # `_is_up` is told by the same future, and may have its turn after us

    def _is_up(self, slot: Slot, worker: Worker, said: list[str], born: float) -> None:
        if not said or slot.worker is not worker or worker.died.done():
            return
        slot.port, slot.holder = int(said[0]), said[1]
        slot.is_up = True
        self.ready_seconds.append(time.monotonic() - born)
        self._someone.set()

    def _is_down(self, slot: Slot, worker: Worker, status: int) -> None:
        if status == NO_STORE and slot.worker is worker:
            self.birth_later(slot, _NO_STORE_SECONDS)
        elif status != -signal.SIGKILL and not (self._may_exit and status == 0):
            self._trouble.append(f"a worker ended with {status}, not by a kill: see {self._log}")
        if slot.worker is worker:
            slot.is_up = slot.is_stopped = False
            self._look_for_someone()

    def _noted(self, slot: Slot, worker: Worker, note: list[str]) -> None:
        match note:
            case ["joined", epoch, holder]:
                if slot.worker is worker:
                    slot.holder = holder
                earlier = self._epochs.setdefault(int(epoch), worker.tag)
                if earlier != worker.tag or int(epoch) < max(
                    number for number, tag in self._epochs.items() if tag == worker.tag
                ):
                    self._odd(f"I7 worker {worker.tag} got epoch {epoch}, which was worker {earlier}'s")
            case ["refused", what]:
                self.refused[what] += 1

    # ------------------------------------------------------------------ asking

    async def someone(self, rng: random.Random, *, but: Slot | None = None) -> Slot:
        """One of those that are up; not `but`, if there is another one. Waits while there is none."""
        while True:
            await self._someone.wait()
            live = [slot for slot in self.slots if slot.is_up and not slot.is_stopped]
            if live:
                return rng.choice([slot for slot in live if slot is not but] or live)
            self._someone.clear()

    def others_are_up(self, but: Slot) -> bool:
        return any(slot.is_up and not slot.is_stopped for slot in self.slots if slot is not but)

    async def ask(self, slot: Slot, path: str, body: bytes = b"") -> bytes:
        connection = Client()
        try:
            _, answer = await connection.request(slot.port, "POST" if body else "GET", path, body)
        except (OSError, EOFError):
            self.raise_trouble()
            raise
        finally:
            connection.close()
        return answer

    async def standing(self, slot: Slot) -> Standing:
        return msgspec.json.decode(await self.ask(slot, "/standing"), type=Standing)

    def raise_trouble(self) -> None:
        """Raises when a worker has ended otherwise than by a kill."""
        if self._trouble:
            raise RuntimeError(self._trouble[0])

    def _look_for_someone(self) -> None:
        if not any(slot.is_up and not slot.is_stopped for slot in self.slots):
            self._someone.clear()

    # ------------------------------------------------------------------ going

    async def kill(self, *slots: Slot) -> None:
        """`kill -9` for all of them at once, and waits until they are gone."""
        workers = [slot.worker for slot in slots if slot.worker is not None]
        for worker in workers:
            await worker.signal(signal.SIGKILL)
        for worker in workers:
            await worker.died

    async def halt(self, slot: Slot) -> None:
        """SIGSTOP, and waits until it stands still."""
        assert slot.worker is not None
        stat = Path(f"/proc/{await slot.worker.born}/stat")
        await slot.worker.signal(signal.SIGSTOP)
        async with asyncio.timeout(_STOP_SECONDS_MAX):
            while _state(stat) != "T":  # noqa: ASYNC110 - the kernel sets no event
                await asyncio.sleep(0.0005)
        self.halted(slot)

    def halted(self, slot: Slot) -> None:
        """Has the clients leave it alone, as a balancer does with one that does not answer."""
        slot.is_stopped = True
        self._look_for_someone()

    async def wake(self, slot: Slot) -> None:
        assert slot.worker is not None
        slot.is_stopped = False
        self._someone.set()
        await slot.worker.signal(signal.SIGCONT)

    async def stop(self, slot: Slot) -> int:
        """Asks it to stop in order, and returns its status."""
        self._may_exit = True
        worker = slot.worker
        assert worker is not None
        await worker.signal(signal.SIGTERM)
        async with asyncio.timeout(BOOT_SECONDS_MAX):
            return await asyncio.shield(worker.died)

    async def end(self) -> None:
        """Ends every worker and the nursery, whatever state they are in."""
        coming = [slot.coming for slot in self.slots if slot.coming is not None]
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)
        await self._nursery.end()


def _state(stat: Path) -> str:
    """The state of a process as the kernel calls it: T is stopped."""
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(") ")[2][:1]
    return "T"  # It is dead: it stands still.
