"""What operators may do to a running runtime: end, hold, migrate and repair instances, and hold sagas as a whole.

Everything that changes an instance is a control in its inbox (`engine/controls.py`), answered after its commit. Repairs
of dead letters and what is said of a saga go their own ways (`repairs.py`, `standings.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import msgspec

from sagaloom.engine.controls import CANCEL, MIGRATE, PAUSE, RESUME, SKIP, TERMINATE, ControlType, control
from sagaloom.engine.records import DeadLetter, Envelope, Instance
from sagaloom.engine.timer_controls import timer_control
from sagaloom.errors import (
    BackendUnavailable,
    DeadLetterNotFound,
    MessageRejected,
    SagaNotFound,
    SagasError,
    TimerNotFound,
)
from sagaloom.ids import new_message_id
from sagaloom.messages import RESERVED_PREFIX
from sagaloom.runtime.bulk import BulkResult, letters_named, oldest_letters, repair_each
from sagaloom.runtime.deliveries import Delivery
from sagaloom.runtime.evolution import MigrationPage, migrate_page
from sagaloom.runtime.onlookers import Onlookers, no_instance
from sagaloom.runtime.receipts import Outcome
from sagaloom.runtime.repairs import Repairs, in_time
from sagaloom.runtime.standings import StandingChange, Standings, StandingVerb
from sagaloom.telemetry import current_trace

__all__ = ["Operators"]


class Operators(Onlookers):
    """The part of `SagaRuntime` that operators use."""

    _repairs: Repairs
    _standings: Standings

    async def cancel(
        self, saga_id: str, key: str, *, run: int | None = None, reason: str | None = None, compensate: bool = True
    ) -> Outcome:
        """Undoes the applied steps of a run, newest first, and ends it `cancelled`; without `compensate` it ends as it
        stands. Its timers end, its children are cancelled, its parent hears of it. Returns when that is committed.
        While a compensation fails the run is `compensating`: it is retried, and then a dead letter.

        A run that is over already, or is being unwound, is left as it is: the outcome says `ignored`, and why. Without
        `run` it is the newest one. Raises `InstanceNotFound`, `MessageRejected` (`SAGA_INSTANCE_PENDING`) when the
        first message of the key has not been applied yet, and `BackendUnavailable`.
        """
        return await self._control(CANCEL, saga_id, key, run=run, reason=reason, compensate=compensate)

    async def terminate(self, saga_id: str, key: str, *, run: int | None = None, reason: str | None = None) -> Outcome:
        """Ends a run as it stands, whatever it is doing: the last resort. No handler and no compensation runs, and an
        unwinding is given up; otherwise it is a `cancel`, and raises what that raises."""
        return await self._control(TERMINATE, saga_id, key, run=run, reason=reason)

    async def skip(
        self, saga_id: str, key: str, *, run: int | None = None, reason: str | None = None, step: str | None = None
    ) -> Outcome:
        """Leaves out the compensation that fails, for good, and goes on with the next one. With `step`, a message type,
        only if that one comes next. Its dead letter is discarded. A run that has no such compensation is left as it is:
        the outcome says `ignored`, and why. Raises what `cancel` raises."""
        before = await self.get_instance(saga_id, key, run=run)
        outcome = await self._control(SKIP, saga_id, key, run=run, reason=reason, step=step)
        letter_id = before.undoing.dead_letter_id if before is not None and before.undoing is not None else None
        if outcome.disposition == "applied" and letter_id is not None:
            # Redriven, it would find that nobody waits for it: so it does no harm when this is not reached.
            with contextlib.suppress(DeadLetterNotFound, BackendUnavailable):
                await self.discard(letter_id)
        return outcome

    async def pause(self, saga_id: str, key: str, *, run: int | None = None, reason: str | None = None) -> Outcome:
        """Keeps messages, replies and timers of a run waiting, in their order, until `resume`. Messages are accepted
        meanwhile, effects that were committed leave. Raises what `cancel` raises."""
        return await self._control(PAUSE, saga_id, key, run=run, reason=reason)

    async def resume(self, saga_id: str, key: str, *, run: int | None = None, reason: str | None = None) -> Outcome:
        """Lets a paused run go on with what has waited for it, before anything newer. One that is not paused is left as
        it is: the outcome says `ignored`, and why. Raises what `cancel` raises."""
        return await self._control(RESUME, saga_id, key, run=run, reason=reason)

    async def _control(
        self,
        kind: ControlType,
        saga_id: str,
        key: str,
        *,
        run: int | None,
        reason: str | None,
        compensate: bool = True,
        step: str | None = None,
    ) -> Outcome:
        self._refuse_if_not_running()
        now = self.clock.now()
        envelope = control(
            kind,
            saga_id,
            key,
            message_id=new_message_id(now),
            accepted_at=now,
            run=run,
            reason=reason,
            compensate=compensate,
            step=step,
        )
        instance = await self.get_instance(saga_id, key, run=run)
        if instance is None:
            raise await self.why_no_instance(saga_id, key, run)
        if instance.run == 0:
            raise MessageRejected(
                f"{saga_id}:{key} has not begun: its first message waits for its next attempt, so there is no run to "
                f"{kind.removeprefix(RESERVED_PREFIX)} yet; try again when it runs, or is a dead letter",
                code="SAGA_INSTANCE_PENDING",
                retryable=True,
            )
        outcome = await self._steered(envelope)
        if outcome.status is None:
            raise no_instance(saga_id, key, run)
        return outcome

    async def _steered(self, envelope: Envelope) -> Outcome:
        """What became of a control. It goes on in the trace of whoever asks for it."""
        if (trace := current_trace()) is not None:
            envelope = msgspec.structs.replace(envelope, traceparent=trace.traceparent, tracestate=trace.tracestate)
        settled: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        # Not when it is accepted: another process may hold the instance, and applies it a moment later.
        self._receiver.offer(Delivery(envelope, (envelope.saga_id, envelope.key), enters=True, settled=settled))
        outcome = await in_time(settled)
        if outcome.disposition == "dead_lettered":
            raise SagasError(outcome.reason or f"{envelope.type} was given up")
        return outcome

    async def migrate(self, saga_id: str, key: str, *, run: int | None = None, reason: str | None = None) -> Outcome:
        """Brings the state of a run up to the version of its definition now, as its next message would. One that has it
        already, or cannot be migrated, is left as it is: the outcome says `ignored`, and why. Raises what `cancel`
        raises."""
        return await self._control(MIGRATE, saga_id, key, run=run, reason=reason)

    async def migrate_saga(self, saga_id: str, *, limit: int = 100, cursor: str | None = None) -> MigrationPage:
        """Migrates up to `limit` (at most 1,000) live instances of a saga that have an older version, each for itself.
        Go on with the `cursor` of the answer until that is None. Raises `SagaNotFound` when it is not loaded here."""
        self._refuse_if_not_running()
        definition = self.definitions.get(saga_id)
        if definition is None:
            raise SagaNotFound(
                f"saga {saga_id!r:.80} is not loaded here: only its definition can migrate its instances"
            )

        def one(instance: Instance) -> Coroutine[Any, Any, Outcome]:
            return self.migrate(saga_id, instance.key, run=instance.run)

        return await migrate_page(self.store, definition, one, limit=limit, cursor=cursor)

    async def pause_saga(self, saga_id: str, *, reason: str | None = None) -> StandingChange:
        """Has all instances of a saga wait, those that have not begun too: messages are accepted and wait in their
        order, ticks are missed. It is kept in the store, for all processes; others heed it within seconds. A saga that
        is paused already is left as it is. Raises `SagaNotFound` and `BackendUnavailable`."""
        return await self._stand("pause", saga_id, reason)

    async def resume_saga(self, saga_id: str, *, reason: str | None = None) -> StandingChange:
        """Lets a paused saga go on with what has waited. One that is not paused is left as it is, and the answer says
        so. Raises what `pause_saga` raises."""
        return await self._stand("resume", saga_id, reason)

    async def disable_saga(self, saga_id: str, *, reason: str | None = None) -> StandingChange:
        """Pauses a saga, and refuses new messages for it as retryable (`SAGA_DISABLED`). Raises what `pause_saga`
        raises, and `MessageRejected` when its configuration has disabled it."""
        return await self._stand("disable", saga_id, reason)

    async def enable_saga(self, saga_id: str, *, reason: str | None = None) -> StandingChange:
        """Takes new messages again, and goes on with what has waited. Raises what `disable_saga` raises."""
        return await self._stand("enable", saga_id, reason)

    async def _stand(self, verb: StandingVerb, saga_id: str, reason: str | None) -> StandingChange:
        self._refuse_if_not_running()
        return await self._standings.change(verb, saga_id, reason)

    async def redrive(self, dead_letter_id: str) -> DeadLetter:
        """Tries a dead letter again, with a fresh count of attempts. A message goes to the end of its instance's
        queue; an effect goes on at the head of its lane."""
        self._refuse_if_not_running()
        return await self._repairs.redrive(await self._repairs.find(dead_letter_id))

    async def redrive_many(
        self,
        *,
        ids: Sequence[str] | None = None,
        saga_id: str | None = None,
        key: str | None = None,
        limit: int = 100,
    ) -> BulkResult:
        """Redrives the dead letters of these ids, or the oldest `limit` (at most 1,000) of a saga, of a key, or of all.
        Each for itself: what cannot be redriven is in `troubles`."""
        return await self._repair_many(self._repairs.redrive, ids=ids, saga_id=saga_id, key=key, limit=limit)

    async def discard_many(
        self,
        *,
        ids: Sequence[str] | None = None,
        saga_id: str | None = None,
        key: str | None = None,
        limit: int = 100,
    ) -> BulkResult:
        """Discards dead letters, chosen as `redrive_many` chooses them."""
        return await self._repair_many(self._repairs.discard, ids=ids, saga_id=saga_id, key=key, limit=limit)

    async def _repair_many(
        self,
        repair: Callable[[DeadLetter], Coroutine[Any, Any, DeadLetter]],
        *,
        ids: Sequence[str] | None,
        saga_id: str | None,
        key: str | None,
        limit: int,
    ) -> BulkResult:
        self._refuse_if_not_running()
        if ids is None:
            letters, has_more = await oldest_letters(self.store, saga_id=saga_id, key=key, limit=limit)
            return replace(await repair_each(letters, repair), has_more=has_more)
        if saga_id is not None or key is not None:
            raise MessageRejected("ids and a filter together are ambiguous: give the ids, or a saga or key")
        letters, missing = await letters_named(self.store, ids)
        result = await repair_each(letters, repair)
        return replace(result, troubles=(*missing, *result.troubles))

    async def discard(self, dead_letter_id: str) -> DeadLetter:
        """Forgets a dead letter: a message's idempotency key is free again, an effect's lane goes on behind it."""
        self._refuse_if_not_running()
        return await self._repairs.discard(await self._repairs.find(dead_letter_id))

    async def cancel_timer(self, timer_id: str) -> Outcome:
        """Takes a timer back, as the run's own `cancel_scheduled` would; it stands in the run's history. Returns when
        that is committed; raises `TimerNotFound` for one that does not wait (any more)."""
        return await self._control_timer(timer_id, None)

    async def move_timer(self, timer_id: str, due_at: datetime) -> Outcome:
        """Has a timer fire at `due_at` instead; at once when that is in the past. It keeps its id and its message.
        Raises what `cancel_timer` raises, and `MessageRejected` for a moment without a time zone."""
        return await self._control_timer(timer_id, due_at)

    async def _control_timer(self, timer_id: str, due_at: datetime | None) -> Outcome:
        self._refuse_if_not_running()
        timer = await self.store.timer(timer_id)
        if timer is None:
            raise TimerNotFound(f"no timer {timer_id!r:.80} waits: it has fired, was taken back, or never was")
        now = self.clock.now()
        envelope = timer_control(timer, message_id=new_message_id(now), accepted_at=now, due_at=due_at)
        outcome = await self._steered(envelope)
        if outcome.disposition != "applied":
            raise TimerNotFound(f"timer {timer_id} has just fired, or was taken back: {outcome.reason}")
        return outcome
