"""Repairs: what an operator does about dead letters.

A dead letter is redriven or discarded in one commit, together with what that means for the rows around it: a message
enters the inbox again or frees its idempotency key, an effect goes on at the head of its lane or is taken out of it.

Rows of a partition belong to its holder. Putting a message into the inbox is everybody's right; everything else about
a partition that another process holds is asked of that process, by a message of origin `operator` in its inbox
(`saga:redrive`, `saga:discard`). It carries the repair out instead of deciding it, and consumes it in the same commit;
one that finds the letter gone is only consumed, so being carried out twice does no harm.

`saga:cancel_children` is carried out the same way: each commit brings the cancels for one page of children, and leaves
a message for the next page in its place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import ClassVar, Final, Literal, NamedTuple, TypeVar

import msgspec

from sagaloom.clock import Clock
from sagaloom.engine.controls import control
from sagaloom.engine.correlation import DefinitionSet, address, route
from sagaloom.engine.families import CANCEL_CHILDREN, child_named, next_page, refused_child, what_was_asked
from sagaloom.engine.records import Child, DeadLetter, Envelope, Origin, ParentLink
from sagaloom.errors import BackendUnavailable, DeadLetterNotFound, SagasError
from sagaloom.ids import derived_id, key_hash, new_message_id, partition_of
from sagaloom.messages import SagaMessage
from sagaloom.ports.store import Conflict, OutboxRow, RowRef, SagaStore, UnitOfWork
from sagaloom.runtime.deliveries import Delivery, Work
from sagaloom.runtime.dispatcher import Dispatcher
from sagaloom.runtime.planner import DISCARD, REDRIVE
from sagaloom.runtime.receipts import Outcome
from sagaloom.runtime.receiver import Receiver

__all__ = ["Repairs", "in_time"]

_log = logging.getLogger("sagaloom.repairs")
_OPERATOR_SECONDS: Final = 5.0
_AGAIN_SECONDS: Final = 0.5
_CHILDREN_AT_ONCE: Final = 1_000
_T = TypeVar("_T")
_Kind = Literal["saga:redrive", "saga:discard"]


class _Request(msgspec.Struct):
    """What an operator asks for. It fails rather than wait for a store that does not answer."""

    is_patient: ClassVar[bool] = False

    unit: UnitOfWork
    answer: asyncio.Future[SagasError | Conflict | None]

    def done(self, trouble: SagasError | Conflict | None) -> None:
        if not self.answer.done():
            self.answer.set_result(trouble)

    def apart(self) -> Sequence[Work]:
        return ()


class _Asked(msgspec.Struct):
    """The payload of a repair that is asked of another process."""

    id: str


class _Repair(NamedTuple):
    """The unit of a repair, and what to tell the roles once it is committed. `brings_only`: everybody may commit it."""

    unit: UnitOfWork
    then: Callable[[], None]
    brings_only: bool = False


class Repairs:
    """Redrives and discards dead letters."""

    def __init__(
        self,
        store: SagaStore,
        clock: Clock,
        receiver: Receiver,
        dispatcher: Dispatcher,
        *,
        definitions: Callable[[], DefinitionSet],
        unknown: Callable[[str], SagasError],
    ) -> None:
        self._store = store
        self._clock = clock
        self._receiver = receiver
        self._dispatcher = dispatcher
        self._definitions = definitions
        self._unknown = unknown
        self._carrying: set[asyncio.Task[None]] = set()

    async def find(self, dead_letter_id: str) -> DeadLetter:
        letter = await self._store.dead_letter(dead_letter_id)
        if letter is None:
            raise DeadLetterNotFound(
                f"no dead letter {dead_letter_id!r:.80}: it was redriven or discarded, or never was"
            )
        return letter

    async def redrive(self, letter: DeadLetter) -> DeadLetter:
        return await self._repair(REDRIVE, letter)

    async def discard(self, letter: DeadLetter) -> DeadLetter:
        return await self._repair(DISCARD, letter)

    async def submit(self, unit: UnitOfWork) -> None:
        """Commits an operator's request in its turn; raises what stood against it."""
        answer: asyncio.Future[SagasError | Conflict | None] = asyncio.get_running_loop().create_future()
        self._receiver.submit(_Request(unit, answer))
        trouble = await in_time(answer)
        if isinstance(trouble, Conflict) and trouble.kind == "moved":
            raise BackendUnavailable(f"{trouble.what}: try again, another process has just taken it over")
        if isinstance(trouble, Conflict):
            raise DeadLetterNotFound(f"it was redriven or discarded a moment ago: {trouble.what}")
        if trouble is not None:
            raise trouble

    @property
    def is_idle(self) -> bool:
        return not self._carrying

    def carry_out(self, delivery: Delivery) -> None:
        """Does what another process has asked for."""
        task = asyncio.create_task(self._carry_out(delivery), name="sagaloom-repair")
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    def close(self) -> None:
        """Lets go of what is being carried out; it is still in the inbox."""
        for task in self._carrying:
            task.cancel()

    async def _repair(self, kind: _Kind, letter: DeadLetter) -> DeadLetter:
        repair = await self._planned(kind, letter)
        if not repair.brings_only and repair.unit.part not in self._receiver.share.parts:
            await self._ask_holder(kind, letter)
            return letter
        await self.submit(repair.unit)
        repair.then()
        return letter

    async def _ask_holder(self, kind: _Kind, letter: DeadLetter) -> None:
        now = self._clock.now()
        message_id = new_message_id(now)
        payload = msgspec.json.encode(_Asked(letter.id))
        envelope = Envelope(
            letter.saga_id, letter.key, kind, message_id, payload, now, "operator", dedupe_key=message_id
        )
        settled: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._receiver.offer(Delivery(envelope, (letter.saga_id, letter.key), enters=True, settled=settled))
        await in_time(settled)
        if await self._store.dead_letter(letter.id) is not None:
            raise BackendUnavailable(
                f"the process that holds {letter.saga_id}:{letter.key} could not do it: look at its log, and try again"
            )

    async def _carry_out(self, delivery: Delivery) -> None:
        try:
            if delivery.envelope.type == CANCEL_CHILDREN:
                await self.submit(await self._cancelling_children(delivery))
            else:
                await self._repair_as_asked(delivery)
        except DeadLetterNotFound as error:
            _log.info("%s was not carried out: %s", delivery.envelope.type, error.message)
            await self.submit(UnitOfWork(part=delivery.part, inbox_done=delivery.row))
        except BackendUnavailable as error:
            # Its row is still there, or with another process by now, where this does no harm.
            _log.warning("%s has to wait: %s", delivery.envelope.type, error.message)
            await asyncio.sleep(_AGAIN_SECONDS)
            self._receiver.offer(delivery)

    async def _cancelling_children(self, delivery: Delivery) -> UnitOfWork:
        """One page of cancels, and the message for the next page."""
        envelope, now = delivery.envelope, self._clock.now()
        asked = what_was_asked(envelope)
        (loaded,) = await self._store.load([delivery.key])
        rows: list[Child] = []
        if loaded.head is not None:
            pk, run = loaded.head.pk, envelope.run or loaded.head.run
            rows = await self._store.children(pk, run, after=asked.after, limit=_CHILDREN_AT_ONCE)
        cancels: list[Envelope] = []
        for row in rows:
            if row.on_parent_cancel == "abandon" or not row.key:
                continue
            cancel = control(
                asked.kind,
                row.saga_id,
                row.key,
                message_id=derived_id("cp", row.effect_key),
                accepted_at=now,
                reason=asked.reason,
                compensate=asked.compensate,
                parent=ParentLink(
                    envelope.saga_id, envelope.key, row.parent_run, row.effect_key, row.pk, row.revision, row.position
                ),
            )
            cancels.append(
                msgspec.structs.replace(
                    cancel,
                    causation_id=envelope.id,
                    traceparent=envelope.traceparent,
                    tracestate=envelope.tracestate,
                )
            )
        if len(rows) == _CHILDREN_AT_ONCE:
            cancels.append(next_page(envelope, rows[-1]))
        return UnitOfWork(part=delivery.part, inbox_add=tuple(cancels), inbox_done=delivery.row)

    async def _repair_as_asked(self, delivery: Delivery) -> None:
        kind: _Kind = REDRIVE if delivery.envelope.type == REDRIVE else DISCARD
        letter = await self._store.dead_letter(msgspec.json.decode(delivery.envelope.payload, type=_Asked).id)
        repair = _Repair(UnitOfWork(part=delivery.part), _nothing)
        if letter is not None:
            repair = await self._planned(kind, letter)
        await self.submit(msgspec.structs.replace(repair.unit, inbox_done=delivery.row))
        repair.then()

    async def _planned(self, kind: _Kind, letter: DeadLetter) -> _Repair:
        return self._redriving(letter) if kind == REDRIVE else await self._discarding(letter)

    def _redriving(self, letter: DeadLetter) -> _Repair:
        part = partition_of(key_hash(letter.saga_id, letter.key))
        effect = letter.effect
        if effect is None:
            assert letter.envelope is not None
            envelope = self._readdressed(letter.envelope)
            unit = UnitOfWork(part=part, dead_letter_done=letter.id, inbox_add=(envelope,))
            if envelope.parent is not None and not letter.envelope.key:
                # Only now it is known under which key the child will be.
                child = child_named(envelope.parent, envelope, spawned_at=letter.at)
                unit = msgspec.structs.replace(unit, children_add=(child,))
            return _Repair(unit, _nothing, brings_only=True)
        again = msgspec.structs.replace(effect, attempt=0, due_at=None, dead_letter_id=None)
        if letter.outbox_part is None or letter.outbox_seq is None:
            return _Repair(UnitOfWork(part=part, dead_letter_done=letter.id, outbox_add=(again,)), _nothing)
        row = OutboxRow(RowRef(letter.outbox_part, letter.outbox_seq), again)
        unit = UnitOfWork(part=part, dead_letter_done=letter.id, outbox_update=row)
        return _Repair(unit, lambda: self._dispatcher.resume(effect.lane, again))

    async def _discarding(self, letter: DeadLetter) -> _Repair:
        part = partition_of(key_hash(letter.saga_id, letter.key))
        effect = letter.effect
        if effect is not None:
            if letter.outbox_part is None or letter.outbox_seq is None:
                return _Repair(UnitOfWork(part=part, dead_letter_done=letter.id), _nothing, brings_only=True)
            done = RowRef(letter.outbox_part, letter.outbox_seq)
            unit = UnitOfWork(part=part, dead_letter_done=letter.id, outbox_done=(done,))
            return _Repair(unit, lambda: self._dispatcher.skip(effect.lane))
        assert letter.envelope is not None
        envelope = letter.envelope
        if envelope.parent is not None and envelope.origin in ("spawn", "redrive"):
            return self._never_born(letter, envelope, envelope.parent)
        (loaded,) = await self._store.load([(envelope.saga_id, envelope.key)]) if envelope.key else (None,)
        if loaded is None or loaded.head is None:
            return _Repair(UnitOfWork(part=part, dead_letter_done=letter.id), _nothing, brings_only=True)
        unmark = (loaded.head.pk, envelope.dedupe_key or envelope.id)
        unit = UnitOfWork(part=part, dead_letter_done=letter.id, unmark=unmark)
        return _Repair(unit, lambda: self._receiver.forget_mark(*unmark))

    def _never_born(self, letter: DeadLetter, envelope: Envelope, parent: ParentLink) -> _Repair:
        """Discards the first message of a child: its parent hears that there will be none, and waits no longer."""
        reason = f"its first message was given up and discarded: {letter.reason}"[:2_000]
        ended, told = refused_child(parent, envelope, reason=reason, now=self._clock.now())
        routed = route(self._definitions(), told, now=self._clock.now())
        part = partition_of(key_hash(letter.saga_id, letter.key))
        unit = UnitOfWork(part=part, dead_letter_done=letter.id, inbox_add=routed.envelopes, child_done=ended)
        return _Repair(unit, _nothing, brings_only=True)

    def _readdressed(self, envelope: Envelope) -> Envelope:
        """The envelope of a redriven message. One that never found its instance is addressed again."""
        if not envelope.key:
            definitions = self._definitions()
            definition = definitions.get(envelope.saga_id)
            receivers = (definition,) if definition is not None else definitions.handling(envelope.type)
            if not receivers:
                raise self._unknown(envelope.type)
            message = SagaMessage(
                envelope.type,
                msgspec.Raw(envelope.payload),
                envelope.correlation_key,
                envelope.idempotency_key,
                envelope.concurrency_key,
                envelope.occurred_at,
                envelope.id,
                envelope.traceparent,
                envelope.tracestate,
            )
            envelope, _ = address(
                receivers[0],
                message,
                payload_json=envelope.payload,
                accepted_at=self._clock.now(),
                message_id=envelope.id,
                causation_id=envelope.causation_id,
                hops=envelope.hops,
                parent=envelope.parent,
                key_if_none=envelope.id if envelope.origin == "spawn" else None,
            )
        # What the engine sends itself is known by its origin.
        origin: Origin = "undo" if envelope.origin == "undo" else "redrive"
        return msgspec.structs.replace(envelope, origin=origin, attempt=0, due_at=None, last_error=None, slot=None)


async def in_time(answer: asyncio.Future[_T]) -> _T:
    """What comes of an operator's request; raises `BackendUnavailable` when nothing does in time."""
    try:
        return await asyncio.wait_for(answer, _OPERATOR_SECONDS)
    except TimeoutError:
        raise BackendUnavailable(
            f"the store did not take the request within {_OPERATOR_SECONDS:g} s: look whether it was done before you "
            "try again"
        ) from None


def _nothing() -> None:
    """What most repairs have to tell."""
