"""One run being changed by one message: the steps taken so far, and the state after them.

A step runs one handler (the forward one, or a compensation) on a state read from bytes for it alone, and encodes what
it left behind. So a step sees what the step before it committed itself to, never an object somebody still holds,
and what cannot be stored is found at the step that made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple, NoReturn

from sagaloom.definitions import Invariant, Saga, SagaContext, SagaDefinition, SagaInstanceStatus
from sagaloom.effects import (
    Answer,
    CancelScheduled,
    CascadedMessage,
    Compensate,
    Complete,
    Fail,
    Scheduled,
    Send,
    Spawn,
)
from sagaloom.engine.ledger import HANDLER_RESULT, LIMIT_EXCEEDED, Ledger, Refused
from sagaloom.engine.lifecycle import is_terminal, next_status
from sagaloom.engine.read_ahead import keep_read, read_state
from sagaloom.engine.records import (
    AppliedStep,
    DecideContext,
    EffectSummary,
    Envelope,
    GatheredMessage,
    Instance,
    PendingTimer,
    StepRecord,
    Undoing,
)
from sagaloom.engine.retrying import USER_ERRORS, describe, has_to_be_awaited
from sagaloom.errors import SagasError
from sagaloom.ids import instance_id
from sagaloom.messages import SagaMessage

__all__ = [
    "ASKED_NOTHING",
    "INVARIANT_BROKEN",
    "STATE_UNREADABLE",
    "Asked",
    "HandlerRaised",
    "Transition",
    "without_fired",
]

INVARIANT_BROKEN: Final = "SAGA_INVARIANT_BROKEN"
STATE_UNREADABLE: Final = "SAGA_STATE_UNREADABLE"

_Step = tuple[Literal["handle", "compensate", "skip"], str, tuple[EffectSummary, ...]]
_Savepoint = tuple[Any, ...]


class HandlerRaised(Exception):
    """User code raised `error`: the policy says what comes of it. `compensating` is the type of the message whose
    compensation it was, if it was one."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error
        self.compensating: str | None = None


class Asked(NamedTuple):
    """What a handler's list asks of the instance itself: how it ends, and what to compensate."""

    ending: Complete | Fail | Compensate | None
    """A `Compensate` here is one of `ALL_STEPS`."""
    compensations: tuple[Compensate, ...] = ()


ASKED_NOTHING: Final = Asked(None)


def without_fired(timers: tuple[PendingTimer, ...], message: Envelope) -> tuple[PendingTimer, ...]:
    """The timers without the one that brought this message; the runtime consumes its row."""
    if not timers or message.origin != "timer":
        return timers
    return tuple(timer for timer in timers if timer.id != message.id)


class Transition(Ledger):
    """A ledger that runs the steps whose effects it collects, and knows where they led: state, status, how the run
    ended, which applied steps are left."""

    __slots__ = (
        "_steps",
        "_timeouts",
        "applied",
        "gathered",
        "instance",
        "is_current_undone",
        "pivot",
        "reason",
        "result",
        "state",
        "state_before",
        "status",
        "status_before",
        "trouble",
        "undo_reason",
        "undoing",
    )

    def __init__(
        self,
        definition: SagaDefinition[Any],
        instance: Instance | None,
        envelope: Envelope,
        context: DecideContext,
        state: bytes,
    ) -> None:
        """`instance` is the run as it was, None for a new one. `state` fits the definition, which that of the instance
        may be too old for."""
        if instance is None:
            Ledger.__init__(self, definition, envelope, context, context.head.run + 1, 1, ())
            self.status_before: SagaInstanceStatus = "pending"
            self.status: SagaInstanceStatus = next_status("pending", "start")
            self.applied: tuple[AppliedStep, ...] = ()
            """The applied steps that are not undone, oldest first."""
            self.undoing: Undoing | None = None
            """What is left to undo, once a compensation has failed."""
            self.pivot: str | None = None
            self.gathered: tuple[GatheredMessage, ...] = ()
            """What joins of the run have taken, and wait with."""
        else:
            timers = without_fired(instance.timers, envelope) if instance.timers else ()
            Ledger.__init__(self, definition, envelope, context, instance.run, instance.revision + 1, timers)
            self.status_before = instance.status
            self.status = next_status(instance.status, "advance")
            self.applied = instance.steps
            self.undoing = instance.undoing
            self.pivot = instance.pivot
            self.gathered = instance.gathered
        self.instance = instance
        self.state_before = state
        self.state = state
        self.is_current_undone = False
        self.reason: str | None = None
        self.undo_reason: str | None = None
        """Why the first compensation of this decision was asked for."""
        self.trouble: HandlerRaised | Refused | None = None
        """Why a compensation was left undone."""
        self.result: bytes | None = None
        self._timeouts = self.set_timeouts() if instance is None and definition.timeouts else ()
        self._steps: list[_Step] = []

    def step(self, phase: Literal["handle", "compensate"], handler: Any, message: SagaMessage[Any]) -> Asked:
        """Runs one handler on the state as it is now. Raises `HandlerRaised`, or `Refused` for what it returned."""
        definition, envelope = self.definition, self.envelope
        codec = definition.state_codec
        try:
            saga = Saga(read_state(codec, self.state))
        except SagasError as error:
            name = instance_id(definition.id, envelope.key, self.run)
            self.refuse(
                STATE_UNREADABLE,
                f"the stored state of {name!r} cannot be read: {error.message}; if its shape has changed, "
                "declare it with .version(n, migrate={...})",
            )
        context: SagaContext[Any] = SagaContext(
            definition.id, envelope.key, self.run, message, envelope.attempt + 1, self.now, codec, self.state
        )
        try:
            returned: Any = handler(saga, message, context)
        except USER_ERRORS as error:
            raise HandlerRaised(error) from error
        if not issubclass(type(returned), (list, tuple)):
            self._refuse_returned(phase, message.type, returned)
        asked = self._write_down(phase, message.type, returned)
        self._keep(saga.state, message.type, is_last=asked is not ASKED_NOTHING)
        return asked

    def end(self, ending: Complete | Fail, *, by: str) -> None:
        """Ends the run. A second failure agrees with the first, whose reason stays; anything else contradicts it."""
        if self.is_over:
            if self.status == "failed" and isinstance(ending, Fail):
                return
            self.refuse(
                HANDLER_RESULT,
                f"two terminal effects in one decision: it was {self.status} already when {by} returned "
                f"saga_{ending.kind}",
            )
        if isinstance(ending, Fail):
            self.status = next_status(self.status, "fail")
            self.reason = ending.reason
        else:
            self.complete(ending)

    def complete(self, ending: Complete) -> None:
        """Ends a live run as completed."""
        self.status = next_status(self.status, "complete")
        self.reason = None
        self.result = self.encode_result(ending.result)

    @property
    def is_over(self) -> bool:
        return is_terminal(self.status)

    @property
    def has_steps(self) -> bool:
        return bool(self._steps)

    def note_skipped(self, message_type: str, reason: str | None) -> None:
        """Writes down that an operator has left a compensation out."""
        self._steps.append(("skip", message_type, (EffectSummary("skip", message_type, None, reason),)))

    def savepoint(self) -> _Savepoint:
        """All that a step changes, to `roll_back` to."""
        return (
            (self.state, self.status, self.reason, self.result, self.applied, self.is_current_undone, self.undoing),
            (self._position, self._bytes, self.spawned, self.timers, self.timers_ended, self.open_timers),
            (len(self._steps), len(self.effects), len(self.outgoing)),
        )

    def roll_back(self, to: _Savepoint) -> None:
        """Takes back whatever came after `savepoint`. Positions are given out anew: what had them was not written."""
        run, ledger, (steps, effects, outgoing) = to
        self.state, self.status, self.reason, self.result, self.applied, self.is_current_undone, self.undoing = run
        self._position, self._bytes, self.spawned, self.timers, self.timers_ended, self.open_timers = ledger
        del self._steps[steps:]
        del self.effects[effects:]
        del self.outgoing[outgoing:]

    def records(self) -> tuple[StepRecord, ...]:
        """The steps, each with the status after it: the last one led to where the run is now."""
        steps = self._steps
        if not steps:
            return ()
        if self._timeouts:
            opening: _Step = (*steps[0][:2], (*self._timeouts, *steps[0][2]))
            steps = [opening, *steps[1:]]
        phase, message_type, effects = steps[-1]
        last = StepRecord(phase, message_type, self.status, effects)
        if len(steps) == 1:
            return (last,)
        live: SagaInstanceStatus = "compensating" if self.status_before == "compensating" else "running"
        earlier = [
            StepRecord(phase, message_type, live if steps[number][0] == "handle" else "compensating", effects)
            for number, (phase, message_type, effects) in enumerate(steps[:-1], 1)
        ]
        return (*earlier, last)

    def take_answer(self, phase: Literal["handle", "compensate"], effect: Answer) -> EffectSummary:
        """Keeps what the caller of an update gets to hear; here nobody waits for it."""
        self.refuse(
            HANDLER_RESULT,
            f"its {_HANDLER[phase]} returned answer({_shown(effect.value)}), and nobody waits for an answer: only the "
            "handler of an update may return one",
        )

    def _write_down(
        self,
        phase: Literal["handle", "compensate"],
        message_type: str,
        returned: Sequence[object],
    ) -> Asked:
        if not returned:
            self._steps.append((phase, message_type, ()))
            return ASKED_NOTHING
        ending: Complete | Fail | Compensate | None = None
        compensations: tuple[Compensate, ...] = ()
        summaries: list[EffectSummary] = []
        for effect in returned:
            # The commonest come first: to find that an effect is of another kind costs more than to write it down.
            if isinstance(effect, Send):
                summaries.append(self.send(effect))
                continue
            if isinstance(effect, Complete):
                summaries.append(self.note("complete"))
            elif isinstance(effect, Scheduled):
                summaries.append(self.schedule(effect))
                continue
            elif isinstance(effect, CancelScheduled):
                summaries.append(self.cancel_scheduled(effect))
                continue
            elif isinstance(effect, Spawn):
                summaries.append(self.spawn(effect))
                continue
            elif isinstance(effect, Answer):
                summaries.append(self.take_answer(phase, effect))
                continue
            elif isinstance(effect, Fail):
                summaries.append(self.note("fail", detail=effect.reason))
            elif not isinstance(effect, Compensate):
                self._refuse_foreign(phase, message_type, effect)
            elif effect.message is not None:
                summaries.append(self.note("compensate", target=effect.message.type, detail=effect.reason))
                compensations = (*compensations, effect)
                continue
            else:
                summaries.append(self.note("compensate", target="ALL_STEPS", detail=effect.reason))
            if ending is not None:
                self.refuse(
                    HANDLER_RESULT,
                    f"its {_HANDLER[phase]} for {message_type!r} returned two terminal effects, {_name(ending)} and "
                    f"{_name(effect)}: a run ends once",
                )
            ending = effect
        self._steps.append((phase, message_type, tuple(summaries)))
        if ending is None and not compensations:
            return ASKED_NOTHING
        return Asked(ending, compensations)

    def _keep(self, state: Any, message_type: str, *, is_last: bool) -> None:
        """Encodes the new state, and checks what must hold of it."""
        definition = self.definition
        codec = definition.state_codec
        try:
            encoded, back = codec.encode_and_read(state)
        except SagasError as error:
            self.refuse(error.code, f"the state that its handler left behind cannot be stored: {error.message}")
        if len(encoded) > self.limits.state_bytes_max:
            self.refuse(
                LIMIT_EXCEEDED,
                f"the state has {len(encoded)} bytes, at most {self.limits.state_bytes_max} are allowed: keep large "
                "data elsewhere and a reference here",
            )
        # Encoded before the predicates see it: one that changes the state changes nothing.
        for invariant in definition.invariants:
            if broken := _broken(invariant, state):
                self.refuse(
                    INVARIANT_BROKEN,
                    f"invariant {invariant.name!r} {broken} after {message_type!r} was handled; nothing was changed",
                    state_after=encoded,
                )
        if not is_last:
            keep_read(codec, encoded, back)
        self.state = encoded

    def _refuse_returned(self, phase: Literal["handle", "compensate"], message_type: str, returned: object) -> NoReturn:
        if has_to_be_awaited(returned):
            advice = "a coroutine: handlers are synchronous; return effects instead of awaiting"
        elif returned is None:
            advice = "None: return a list of effects, [] for none"
        elif isinstance(returned, CascadedMessage):
            advice = f"a single effect ({returned.kind}): put it in a list"
        else:
            advice = f"{type(returned).__name__} {_shown(returned)}: return a list of effects, [] for none"
        self.refuse(HANDLER_RESULT, f"its {_HANDLER[phase]} for {message_type!r} returned {advice}")

    def _refuse_foreign(self, phase: Literal["handle", "compensate"], message_type: str, effect: object) -> NoReturn:
        self.refuse(
            HANDLER_RESULT,
            f"its {_HANDLER[phase]} for {message_type!r} returned a list with {type(effect).__name__} "
            f"{_shown(effect)} in it, which is no effect: use send, schedule, cancel_scheduled, spawn, saga_complete, "
            "saga_fail, saga_compensate or answer",
        )


_HANDLER: Final = {"handle": "handler", "compensate": "compensation"}


def _broken(invariant: Invariant, state: object) -> str:
    """What is wrong with the state, or with the invariant; "" when it holds."""
    try:
        told: object = invariant.predicate(state)
        if has_to_be_awaited(told):  # and would be true, whatever comes of it
            return f"could not be checked: it returned {type(told).__name__}, which has to be awaited"
        if told is None:
            return "could not be checked: it returned None, and neither True nor False"
        return "" if told else "does not hold"
    except USER_ERRORS as error:
        return f"could not be checked: it raised {describe(error)}"


def _name(effect: CascadedMessage) -> str:
    return "saga_compensate(ALL_STEPS)" if isinstance(effect, Compensate) else f"saga_{effect.kind}"


def _shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except USER_ERRORS:
        return "(which cannot be shown)"
