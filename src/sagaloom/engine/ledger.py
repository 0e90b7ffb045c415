"""What a decision asks for beside the new state: effects that leave, messages that stay, timers.

Every effect of a decision has a position, counted from 0 over all its steps in the order in which the handlers
returned them, and from it the effect key under which it leaves. Terminal effects and compensations count too: a
position is the place in what the author wrote, so adding a kind of effect to the engine later renumbers nothing.

A timer starts a new cascade when it waits (a saga may poll for years), so its message begins with no hops; one without
any delay counts as one, or a loop of them would spin for ever.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, NoReturn

from sagaloom.codec import encode_any
from sagaloom.definitions import SagaDefinition
from sagaloom.durations import resolve_delay
from sagaloom.effects import CancelScheduled, Scheduled, Send, Spawn
from sagaloom.engine.correlation import as_sent, has_default_key
from sagaloom.engine.families import end_told
from sagaloom.engine.records import (
    DecideContext,
    EffectSummary,
    Envelope,
    OutboxEffect,
    Outgoing,
    ParentLink,
    PendingTimer,
    Timer,
)
from sagaloom.engine.retrying import storable
from sagaloom.errors import HandlerError, SagasError
from sagaloom.ids import KEY_BYTES_MAX, check_key, effect_key, instance_id
from sagaloom.messages import SagaMessage

__all__ = [
    "HANDLER_RESULT",
    "LIMIT_EXCEEDED",
    "Ledger",
    "Refused",
]

_TEXT_FIELDS: Final = ("id", "correlation_key", "idempotency_key", "concurrency_key", "traceparent", "tracestate")
HANDLER_RESULT: Final = "SAGA_HANDLER_RESULT"
LIMIT_EXCEEDED: Final = "SAGA_LIMIT_EXCEEDED"


class Refused(HandlerError):
    """Why a decision cannot be taken, whoever tries: the message becomes a dead letter at once. `state_after` is the
    state that was refused, `traceback` that of the user code it came from, when there are any."""

    default_retryable = False
    state_after: bytes | None = None
    traceback: str | None = None


class Ledger:
    """Collects the effects of one decision, within the limits."""

    __slots__ = (
        "_bytes",
        "_position",
        "definition",
        "effects",
        "envelope",
        "limits",
        "now",
        "open_timers",
        "outgoing",
        "pk",
        "revision",
        "run",
        "spawned",
        "timers",
        "timers_ended",
    )

    def __init__(
        self,
        definition: SagaDefinition[Any],
        envelope: Envelope,
        context: DecideContext,
        run: int,
        revision: int,
        timers: tuple[PendingTimer, ...],
    ) -> None:
        self.definition = definition
        self.envelope = envelope
        self.now = context.now
        self.limits = context.limits
        self.pk = context.head.pk
        self.run = run
        self.revision = revision
        self._position = 0
        self._bytes = 0
        self.spawned = 0
        self.effects: list[OutboxEffect] = []
        self.outgoing: list[Outgoing] = []
        self.timers: tuple[Timer, ...] = ()
        self.timers_ended: tuple[PendingTimer, ...] = ()
        self.open_timers = timers
        """The timers of the run after this decision."""

    def send(self, effect: Send) -> EffectSummary:
        """Writes a command down: one that leaves goes to the outbox, one for a saga stays in the store."""
        target, envelope, run, revision = effect.target, self.envelope, self.run, self.revision
        kind, target_id, saga_id, key = target.kind, target.id, self.definition.id, envelope.key
        try:
            place = _place(kind, target_id)
        except SagasError as error:
            self.refuse(HANDLER_RESULT, error.message)
        if effect.idempotency_key or effect.concurrency_key or effect.queue:
            self._check_options(effect)
        position = self._next_position()
        name = effect_key(saga_id, key, run, revision, position)
        if kind == "saga":
            payload, encoded = self._encode_sent("send", effect.payload)
            self.outgoing.append(
                Outgoing(
                    "send",
                    target_id,
                    payload,
                    name,
                    (saga_id, key, run),
                    envelope.id,
                    envelope.hops + 1,
                    self._key_to_pass_on(),
                    effect.idempotency_key,
                    effect.concurrency_key,
                    traceparent=envelope.traceparent,
                    tracestate=envelope.tracestate,
                    encoded=encoded,
                )
            )
            return EffectSummary("send", place, name)
        self.effects.append(
            OutboxEffect(
                name,
                f"{saga_id}\0{key}\0{run}\0{place}",
                kind,
                target_id,
                self._encode("send", effect.payload),
                saga_id,
                key,
                run,
                revision,
                position,
                envelope.id,
                self.now,
                envelope.hops + 1,
                effect.idempotency_key,
                effect.concurrency_key,
                effect.queue,
                effect.retry,
                effect.on_dead_letter == "continue",
                envelope.traceparent,
                envelope.tracestate,
            )
        )
        return EffectSummary("send", place, name)

    def spawn(self, effect: Spawn) -> EffectSummary:
        """Writes down that a child starts, with the link by which its end finds its way back."""
        self._check_text("child", effect.child)
        self._check_options(effect)
        position = self._next_position()
        key = effect_key(self.definition.id, self.envelope.key, self.run, self.revision, position)
        payload, encoded = self._encode_sent("spawn", effect.input)
        self.spawned += 1
        sender = (self.definition.id, self.envelope.key, self.run)
        self.outgoing.append(
            Outgoing(
                "spawn",
                effect.child,
                payload,
                key,
                sender,
                self.envelope.id,
                self.envelope.hops + 1,
                None,
                effect.idempotency_key,
                effect.concurrency_key,
                parent=ParentLink(*sender, key, self.pk, self.revision, position),
                traceparent=self.envelope.traceparent,
                tracestate=self.envelope.tracestate,
                encoded=encoded,
                on_parent_cancel=effect.on_parent_cancel,
            )
        )
        return EffectSummary("spawn", effect.child, key)

    def schedule(self, effect: Scheduled) -> EffectSummary:
        """Writes a timer down; one of the same name ends."""
        key = self._next_key()
        name, message, now, envelope = effect.name, effect.message, self.now, self.envelope
        self._check_text("the name of a timer", name)
        self._check_message("schedule", message)
        try:
            due_at = resolve_delay(effect.delay, now)
        except OverflowError:
            self.refuse(HANDLER_RESULT, f"schedule: the delay {effect.delay!r} ends after the year 9999")
        if name is not None:
            self._end_timer(name)
        if len(self.open_timers) >= self.limits.timers_per_instance_max:
            self.refuse(
                LIMIT_EXCEEDED,
                f"schedule: the run has {len(self.open_timers)} timers already, and at most "
                f"{self.limits.timers_per_instance_max} may wait: cancel some, or give them names, which replace",
            )
        identifier = f"tm{key}"
        timer = Timer(
            identifier,
            due_at,
            Envelope(
                self.definition.id,
                envelope.key,
                message.type,
                identifier,
                self._encode("schedule", message.payload),
                due_at,
                "timer",
                self.run,
                False,
                message.idempotency_key or message.id or identifier,
                message.correlation_key or envelope.correlation_key,
                message.idempotency_key,
                message.concurrency_key,
                message.occurred_at,
                message.traceparent or envelope.traceparent,
                message.tracestate or envelope.tracestate,
                envelope.id,
                0 if due_at > now else envelope.hops + 1,
            ),
            name,
        )
        self.timers = (*self.timers, timer)
        self.open_timers = (*self.open_timers, PendingTimer(identifier, due_at, name))
        return EffectSummary("scheduled", message.type, key, name)

    def set_timeouts(self) -> tuple[EffectSummary, ...]:
        """Sets the timers that every run of the saga begins with."""
        envelope, run = self.envelope, self.run
        summaries: list[EffectSummary] = []
        for number, timeout in enumerate(self.definition.timeouts, 1):
            # Below zero: a saga that gets a timeout keeps the positions of everything else.
            key = effect_key(self.definition.id, envelope.key, run, self.revision, -number)
            identifier, due_at = f"tm{key}", self.now + timeout.delay
            message = Envelope(
                self.definition.id,
                envelope.key,
                timeout.message_type,
                identifier,
                timeout.payload,
                due_at,
                "timer",
                run,
                dedupe_key=identifier,
                correlation_key=envelope.correlation_key,
                traceparent=envelope.traceparent,
                tracestate=envelope.tracestate,
                causation_id=envelope.id,
            )
            self.timers = (*self.timers, Timer(identifier, due_at, message, timeout.name))
            self.open_timers = (*self.open_timers, PendingTimer(identifier, due_at, timeout.name))
            summaries.append(EffectSummary("scheduled", timeout.message_type, key, timeout.name))
        return tuple(summaries)

    def cancel_scheduled(self, effect: CancelScheduled) -> EffectSummary:
        """Ends the timer of this name, if there is one."""
        self._next_position()
        found = self._end_timer(effect.name)
        return EffectSummary("cancel_scheduled", effect.name, None, None if found else "none was waiting")

    def note(self, kind: str, *, target: str | None = None, detail: str | None = None) -> EffectSummary:
        """Takes a position for an effect that the engine carries out itself."""
        self._next_position()
        if detail is not None:
            detail = storable(detail)
            self.count_bytes(len(detail))
        return EffectSummary(kind, target, None, detail)

    def encode_result(self, value: Any) -> bytes | None:
        """The result of a completed run as JSON; None is no result."""
        return None if value is None else self._encode("saga_complete", value)

    def tell_parent(self, parent: ParentLink, message_type: str, payload: dict[str, object]) -> None:
        """Tells the parent's run that this one is over."""
        position = self._next_position()
        key = effect_key(self.definition.id, self.envelope.key, self.run, self.revision, position)
        sender = (self.definition.id, self.envelope.key, self.run)
        told = end_told(parent, message_type, payload, sender=sender, by=self.envelope, effect_key=key)
        self.count_bytes(len(told.encoded))
        self.outgoing.append(told)

    def end_all_timers(self) -> None:
        """A run that is over waits for nothing: timers of this decision are not written, earlier ones are removed."""
        if not self.open_timers:
            return
        written = {timer.id for timer in self.timers}
        self.timers_ended += tuple([timer for timer in self.open_timers if timer.id not in written])
        self.timers = ()
        self.open_timers = ()

    def refuse(self, code: str, what: str, *, state_after: bytes | None = None) -> NoReturn:
        error = Refused(f"saga {self.definition.id!r}, message {self.envelope.type!r}: {what}", code=code)
        error.state_after = state_after
        raise error

    def _next_position(self) -> int:
        position = self._position
        if position >= self.limits.effects_max:
            self.refuse(LIMIT_EXCEEDED, f"more than {self.limits.effects_max} effects in one decision")
        self._position = position + 1
        return position

    def _next_key(self) -> str:
        return effect_key(self.definition.id, self.envelope.key, self.run, self.revision, self._next_position())

    def _encode(self, what: str, value: Any) -> bytes:
        try:
            encoded = encode_any(value)
        except SagasError as error:
            self.refuse(HANDLER_RESULT, f"{what}: {error.message}")
        self._bytes = size = self._bytes + len(encoded)
        if size > self.limits.effects_bytes_max:
            self._refuse_bytes()
        return encoded

    def _encode_sent(self, what: str, payload: Any) -> tuple[Any, bytes]:
        """The payload of a message that stays in the store, as it is routed, and as JSON."""
        message = as_sent(payload)
        if message is None:
            return payload, self._encode(what, payload)
        self._check_message(what, message)
        return message, self._encode(what, message.payload)

    def _check_message(self, what: str, message: SagaMessage[Any]) -> None:
        self._check_text(f"{what}: message type", message.type)
        for field in _TEXT_FIELDS:
            self._check_text(f"{what}: {field} of {message.type!r}", getattr(message, field))

    def _check_options(self, effect: Send | Spawn) -> None:
        self._check_text("idempotency_key", effect.idempotency_key)
        self._check_text("concurrency_key", effect.concurrency_key)
        if isinstance(effect, Send):
            self._check_text("queue", effect.queue)

    def _check_text(self, what: str, value: str | None) -> None:
        # A text that UTF-8 cannot carry would come up as an error of the store, in the middle of everybody's commit.
        if value is not None and not (value.isascii() and value.isprintable() and 0 < len(value) <= KEY_BYTES_MAX):
            try:
                check_key(value, what=what)
            except SagasError as error:
                self.refuse(HANDLER_RESULT, error.message)

    def count_bytes(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self.limits.effects_bytes_max:
            self._refuse_bytes()

    def _refuse_bytes(self) -> NoReturn:
        self.refuse(
            LIMIT_EXCEEDED,
            f"the effects of one decision have more than {self.limits.effects_bytes_max} bytes: pass a reference "
            "to large data instead",
        )

    def _end_timer(self, name: str) -> bool:
        timer = next((timer for timer in self.open_timers if timer.name == name), None)
        if timer is None:
            return False
        self.open_timers = tuple(other for other in self.open_timers if other is not timer)
        written = tuple([other for other in self.timers if other.id != timer.id])
        if len(written) < len(self.timers):
            self.timers = written  # Asked for and taken back in one decision: it was never there.
        else:
            self.timers_ended += (timer,)
        return True

    def _key_to_pass_on(self) -> str:
        # Runs of the default key have nothing to do with each other; passed on, that key would merge their partners.
        if has_default_key(self.definition, self.envelope.key):
            return instance_id(self.definition.id, self.envelope.key, self.run)
        return self.envelope.key


# A saga sends to the same few targets for ever, and history may keep one text for all.
@lru_cache(maxsize=1024)
def _place(kind: str, identifier: str) -> str:
    return check_key(f"{kind}:{identifier}", what="target")
