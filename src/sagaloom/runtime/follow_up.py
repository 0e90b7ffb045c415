"""What follows a commit: whoever waited for a message hears of it, whatever waited for its end gets its turn, what was
written for others reaches their roles, and what the store has refused is put back, to be decided anew.

A unit that conflicts drops what is remembered of its instance, and its message goes back in front, in order:

| conflict | the message |
|---|---|
| revision, mark | is decided again on what the store really has |
| behind | has its turn after what it did not know of |
| moved | is accepted for the new holder; one that has its row, or whose effect has, is left to it |
| limit | is turned away or waits for a slot |
| gone | was consumed elsewhere: nothing is left to do |
| refused | is decided again, knowing that the store cannot write what it asks for |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from sagaloom.engine.controls import ends_pause
from sagaloom.engine.records import OutboxEffect, Timer
from sagaloom.errors import BackendUnavailable, SagasError
from sagaloom.ids import key_hash, partition_of
from sagaloom.ports.store import CommitResult, Conflict, RowRef, UnitOfWork
from sagaloom.runtime.backlog import Backlog
from sagaloom.runtime.cache import Hot
from sagaloom.runtime.counters import Counters
from sagaloom.runtime.deliveries import Delivery, HandedOver, Planned, Work, answer, refuse
from sagaloom.runtime.memory import Memory
from sagaloom.runtime.options import RuntimeOptions, no_step
from sagaloom.runtime.outcomes import outcome_of, with_details
from sagaloom.runtime.share import Share
from sagaloom.runtime.slots import Slots

__all__ = ["FollowUp"]


# What the constructor of a named tuple calls, without its Python frame.
_new_tuple: Final = tuple.__new__  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


class FollowUp:
    """Does what follows the commits of one receiver."""

    def __init__(
        self,
        options: RuntimeOptions,
        *,
        counters: Counters,
        backlog: Backlog,
        memory: Memory,
        slots: Slots,
        share: Share,
        submit: Callable[[Sequence[Work]], None],
        on_effects: Callable[[Sequence[tuple[RowRef, OutboxEffect]]], None],
        on_timers: Callable[[Sequence[Timer]], None],
    ) -> None:
        self._options = options
        self._counters = counters
        self._backlog = backlog
        self._memory = memory
        self._slots = slots
        self._share = share
        self._submit = submit
        self._on_effects = on_effects
        self._on_timers = on_timers

    async def follow_up(self, planned: list[Planned], works: list[Work], result: CommitResult) -> None:
        parts, marks, remember = self._share.parts, self._memory.marks, self._memory.hot.put
        rows = _NewRows(result, self._backlog, parts)
        conflicts = result.conflicts
        accepted: list[Planned] = []
        decided: list[Planned] = []
        settled: list[HandedOver] = []
        for number, each in enumerate(planned):
            if number in conflicts:
                continue
            unit = each.unit
            if unit.inbox_add:
                each.successor = rows.take_messages(unit, first_waits=each.waits)
            if unit.outbox_add:
                rows.take_effects(unit)
            if unit.timers_add:
                self._on_timers(unit.timers_add)
            if each.hot is not None:
                remember(each.delivery.key, each.hot)
            elif unit.head is not None:
                remember(each.delivery.key, Hot(unit.head, None))  # It is another's.
            if unit.mark is not None and unit.part in parts:
                # Marks of partitions that others hold may be taken back without our hearing of it.
                marks[unit.mark_pk, unit.mark.dedupe_key] = unit.mark
            (decided if each.decision is not None else accepted).append(each)
            if each.delivery.effect is not None:
                settled.append(each.delivery.effect)
        self._memory.bound_marks()
        self._counters.committed([*accepted, *decided], conflicts=len(conflicts))
        for number, work in enumerate(works, len(planned)):
            if number not in conflicts:
                rows.take_messages(work.unit)
                rows.take_effects(work.unit)
        if self._options.on_step is not no_step:
            self._report_steps(planned, works)
        # Those that were only accepted come first: a starter of this very batch may let go of what is lined up behind
        # it, and whoever lined up after that would wait for nobody.
        for each in accepted:
            self._wait_on(each)
        for each in decided:
            if each.waits:
                self._wait_on(each)
            else:
                self._go_on(each)
        for effect in settled:
            effect.done(None)
        for number, work in enumerate(works, len(planned)):
            if number not in conflicts:
                work.done(None)
        if conflicts:
            await self._resolve(planned, works, conflicts)
        for later in rows.later:
            self._backlog.put_aside(later)
        if self._slots.some_wait:
            self._slots.pass_on([each.unit for each in (*accepted, *decided)])
        if rows.effects:
            self._on_effects(rows.effects)

    def _go_on(self, each: Planned) -> None:
        """Answers the publisher of a message that is done with, and gives those who waited for it their turn."""
        delivery, decision = each.delivery, each.decision
        assert decision is not None
        if delivery.settled is not None:
            answer(delivery, with_details(outcome_of(delivery, decision, each.unit), decision, each.unit))
        elif delivery.answered is not None and not delivery.answered.done():
            delivery.answered.set_result(outcome_of(delivery, decision, each.unit))
        if delivery.envelope.origin != "door" and ends_pause(delivery.envelope):
            self._backlog.put_back(self._backlog.release([delivery.key]))
        if decision.disposition == "applied":
            self._backlog.moved(delivery.key, delivery)
        else:
            self._backlog.gave_up(delivery.key, delivery)

    def _wait_on(self, each: Planned) -> None:
        """Tells the publisher that its message is safe, and gives the message its place among those that wait."""
        delivery, successor = each.delivery, each.successor
        if successor is None:
            assert each.unit.inbox_update is not None
            delivery.envelope = each.unit.inbox_update.envelope
            successor = delivery
        else:
            successor.settled = delivery.settled
        if delivery.answered is not None and not delivery.answered.done():
            delivery.answered.set_result(outcome_of(delivery, each.decision, each.unit))
        if successor.row is not None and successor.row.part not in self._share.parts:
            self._share.wait_abroad(successor)
        elif each.is_next:
            self._backlog.add_in_order([successor])
        elif each.awaits_slot:
            self._slots.wait(successor)
        elif each.decision is None:
            self._backlog.wait_behind(successor)
        elif each.is_deferred:
            self._backlog.defer(successor, each.decision.retry_at)
        elif each.holds:
            self._backlog.hold(successor)
        else:
            self._backlog.put_aside(successor)
            self._backlog.gave_up(delivery.key, delivery)

    async def _resolve(self, planned: list[Planned], works: list[Work], conflicts: Mapping[int, Conflict]) -> None:
        """Puts the messages of refused units back in front, to be decided on what the store really has."""
        again: list[Delivery] = []
        if any(conflict.kind == "mark" for conflict in conflicts.values()):
            await self._memory.learn_marks([planned[number].unit for number in conflicts if number < len(planned)])
        for number, conflict in sorted(conflicts.items()):
            if number >= len(planned):
                work = works[number - len(planned)]
                if alone := work.apart():
                    self._submit(alone)  # What stands against one of them is no matter of the others.
                else:
                    work.done(conflict)
                continue
            delivery = planned[number].delivery
            self._memory.hot.drop(delivery.key)
            if conflict.kind in ("behind", "moved"):
                self._share.attend(standing=conflict.kind == "moved")
                if delivery.enters or conflict.kind == "behind":
                    delivery.yielded += conflict.kind == "behind" and delivery.row is None
                    again.append(delivery)
                elif delivery.effect is not None:
                    delivery.effect.done(conflict)
                else:
                    self._share.wait_abroad(delivery)
                continue
            if conflict.kind == "limit":
                if self._slots.lacks(delivery):
                    again.append(delivery)
                continue
            if conflict.kind == "gone":
                # Somebody else consumed its row: whatever it asked for has been done there.
                if delivery.effect is not None:
                    delivery.effect.done(conflict)
                refuse(delivery, BackendUnavailable(f"message {delivery.envelope.id} was taken over elsewhere"))
                continue
            if conflict.kind == "refused":
                if delivery.effect is not None and delivery.refusal is not None:
                    delivery.effect.done(conflict)  # It is the answer itself that the store cannot write.
                    continue
                delivery.refusal = SagasError(
                    f"the store cannot write what {delivery.envelope.type!r} asked for: {conflict.what}",
                    code="SAGA_NOT_STORABLE",
                )
            again.append(delivery)
        # Some may have lined up behind one that was not written after all.
        keys = [each.delivery.key for number, each in enumerate(planned) if number in conflicts]
        self._backlog.put_back(again + self._backlog.release(keys))

    def _report_steps(self, planned: list[Planned], works: list[Work]) -> None:
        step = self._options.on_step
        step("committed")
        for each in planned:
            if each.unit.mark is not None and each.waits:
                step("accepted")
            if each.unit.outbox_done:
                step("settled")
            entry = each.unit.entry
            if entry is not None and any(moment.phase == "compensate" for moment in entry.steps):
                step("compensated")
        for work in works:
            for _ in work.unit.outbox_done:
                step("settled")


class _NewRows:
    """Numbers the rows that a commit has added, unit by unit: messages go to the backlog, unless another process holds
    their partition; `effects` are gathered, and messages that are due `later`."""

    __slots__ = ("_backlog", "_inbox_seq", "_outbox_seq", "_parts", "effects", "later")

    def __init__(self, result: CommitResult, backlog: Backlog, parts: frozenset[int]) -> None:
        self._backlog = backlog
        self._parts = parts
        self._inbox_seq = result.inbox_base
        self._outbox_seq = result.outbox_base
        self.effects: list[tuple[RowRef, OutboxEffect]] = []
        self.later: list[Delivery] = []

    def take_messages(self, unit: UnitOfWork, *, first_waits: bool = False) -> Delivery | None:
        """Takes the messages of a written unit. `first_waits`: the first one has had its turn already, and does not
        get one now; it is returned."""
        waiting: Delivery | None = None
        for envelope in unit.inbox_add:
            key = (envelope.saga_id, envelope.key)
            part = partition_of(key_hash(*key))
            arrival = Delivery(envelope, key, RowRef(part, self._inbox_seq))
            self._inbox_seq += 1
            if first_waits:
                waiting, first_waits = arrival, False
            elif part in self._parts:
                if envelope.due_at is None:
                    self._backlog.add(arrival)
                else:
                    self.later.append(arrival)
        return waiting

    def take_effects(self, unit: UnitOfWork) -> None:
        """Takes the effects of a written unit."""
        for effect in unit.outbox_add:
            self.effects.append((_new_tuple(RowRef, (unit.part, self._outbox_seq)), effect))
            self._outbox_seq += 1
