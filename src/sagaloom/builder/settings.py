"""What can be said of a saga at every stage: how it is kept, found, retried, bounded and timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, Self, TypeVar, get_args, overload

from sagaloom.builder.bindings import wire_type
from sagaloom.builder.notes import Notes
from sagaloom.builder.rules import (
    check_function,
    check_retry,
    checked_key,
    checked_length,
    is_int,
    listed,
    one_of,
    shown,
)
from sagaloom.codec import encode_any
from sagaloom.cron import parse_cron
from sagaloom.definitions import (
    ANY_TYPE,
    SAGA_DURABILITY_TIERS,
    CatchUp,
    ConcurrencyPolicy,
    RetryPolicy,
    Reuse,
    SagaCorrelation,
    SagaDurabilityTier,
    SchedulePolicy,
    TimeoutPolicy,
)
from sagaloom.errors import DefinitionError, SagasError
from sagaloom.messages import SagaMessage, as_message

P = TypeVar("P")

OnLimit = Literal["reject", "wait"]

_OF_A_TICK = ("correlation_key", "concurrency_key")


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Stage:
    """The settings that every stage offers."""

    _notes: Notes

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._notes.id!r}, handles {list(self._notes.handlers)}>"

    def _with(self, **changes: Any) -> Self:
        return type(self)(dataclasses.replace(self._notes, **changes))

    def durability(self, tier: SagaDurabilityTier) -> Self:
        """Sets what a store must promise for this saga's state: `"t1"` (the default), `"t2"` or `"t3"`.

        >>> define_saga("order").durability("t2")
        <SagaDraft 'order', handles []>
        """
        return self._with(durability=one_of(tier, SAGA_DURABILITY_TIERS, f"{self._notes.where}: durability tier"))

    @overload
    def correlate(self, rule: SagaCorrelation[Any], /) -> Self: ...
    @overload
    def correlate(self, message: type[P], rule: SagaCorrelation[P], /) -> Self: ...
    @overload
    def correlate(self, message: str, rule: SagaCorrelation[Any], /) -> Self: ...
    def correlate(self, message: Any, rule: Any = None, /) -> Self:
        """Says how to read the correlation key off a message, for all types or for one (its class or wire type). The
        rule of a type goes before the general one; a rule that returns None leaves it to the message's own key.

        >>> define_saga("order").correlate(lambda message: message.payload["orderId"])
        <SagaDraft 'order', handles []>
        """
        notes = self._notes
        if rule is None and (isinstance(message, (type, str))):
            raise DefinitionError(
                f"{notes.where}: .correlate({shown(message)}) has no rule: write .correlate({shown(message)}, rule), "
                "where rule takes the message and returns its key"
            )
        name, rule = (ANY_TYPE, message) if rule is None else (wire_type(notes, message, "correlation"), rule)
        check_function(rule, 1, f"{notes.where}: the correlation rule", "a rule takes (message) and returns its key")
        if name in notes.correlations:
            what = "a general correlation rule" if name == ANY_TYPE else f"a correlation rule for {name!r}"
            raise DefinitionError(f"{notes.where} already has {what}: put both into one rule")
        return self._with(correlations={**notes.correlations, name: rule})

    def retry(self, policy: RetryPolicy) -> Self:
        """Sets when a failed attempt is made again. The default is five attempts, 1 s apart, doubling, up to 60 s.

        >>> from sagaloom.definitions import RetryPolicy
        >>> define_saga("order").retry(RetryPolicy(maximum_attempts=3))
        <SagaDraft 'order', handles []>
        """
        check_retry(self._notes.where, policy)
        return self._with(retry=policy)

    def reuse(self, policy: Reuse) -> Self:
        """Says what a message does whose instance has ended: `"reject"` (the default) ignores it, on the record;
        `"new_run"` opens the next run.

        >>> define_saga("order").reuse("new_run")
        <SagaDraft 'order', handles []>
        """
        return self._with(reuse=one_of(policy, get_args(Reuse), f"{self._notes.where}: reuse"))

    def singleton(self) -> Self:
        """Lets all messages that carry no key share one instance.

        >>> define_saga("order").singleton()
        <SagaDraft 'order', handles []>
        """
        return self._with(is_singleton=True)

    def version(
        self, number: int, *, migrate: Mapping[int, Callable[[Mapping[str, Any]], object]] | None = None
    ) -> Self:
        """Sets the version of the stored state. `migrate` maps an old version to the function that makes its state, as
        plain JSON, one version newer; the steps must lead up to `number` without a gap.

        >>> define_saga("order").version(2, migrate={1: lambda state: {**state, "currency": "EUR"}})
        <SagaDraft 'order', handles []>
        """
        where = self._notes.where
        if not is_int(number) or number < 1:
            raise DefinitionError(f"{where}: version must be an integer from 1 on, got {number!r:.80}")
        steps = dict(migrate or {})
        for old, step in steps.items():
            if not is_int(old) or not 1 <= old < number:
                raise DefinitionError(
                    f"{where}: migrate has a step from version {old!r:.80}: with .version({number}) steps start at 1 "
                    f"to {number - 1}"
                )
            check_function(step, 1, f"{where}: the migration from version {old}", "a migration takes (state)")
        missing = [old for old in range(min(steps, default=number), number) if old not in steps]
        if missing:
            raise DefinitionError(
                f"{where}: .version({number}) has migrations from {listed(sorted(steps))}, but none from "
                f"{listed(missing)}: every version between the oldest one and {number} needs its step"
            )
        return self._with(version=number, migrations=steps)

    def concurrency(
        self,
        limit: int,
        key: Callable[[SagaMessage[Any]], str] | None = None,
        *,
        on_limit: OnLimit = "reject",
    ) -> Self:
        """Bounds how many messages of the saga are under way at once, over all processes: from their acceptance until
        they are settled, retries included.

        `key` is asked for the concurrency key of a message that has none of its own; each key has its own `limit`, and
        messages without any share one. `on_limit`: a publish that finds no place is refused, 409 and retryable
        (`"reject"`), or is accepted and waits (`"wait"`). Messages from sagas, targets and timers always wait.

        >>> define_saga("order").concurrency(3, lambda message: message.payload["customer"], on_limit="wait")
        <SagaDraft 'order', handles []>
        """
        where = self._notes.where
        if not is_int(limit) or limit < 1:
            raise DefinitionError(f"Saga concurrency limit must be a positive integer. {where}: got {limit!r:.80}.")
        if key is not None:
            check_function(key, 1, f"{where}: the concurrency key", "it takes (message) and returns a string")
        one_of(on_limit, get_args(OnLimit), f"{where}: concurrency on_limit")
        return self._with(concurrency=ConcurrencyPolicy(limit, key, on_limit))

    def schedule(
        self, cron: str, *, message: object = None, timezone: str = "UTC", catch_up: CatchUp = "latest"
    ) -> Self:
        """Ticks the saga by a five-field cron expression in a named zone: each tick is a message `<saga id>:tick` with
        the payload `{"scheduledFor": "2026-01-31T03:00:00Z"}`, delivered once over any number of processes.

        `message` names another type (its class or wire type), or is a message whose payload, when it is an object, gets
        `scheduledFor` beside its own fields. Only this saga gets it. `catch_up` says what becomes of ticks that were
        missed, which is more than a minute late: the newest one fires (`"latest"`), or `"all"`, or `"none"`.

        >>> define_saga("report").schedule("0 3 * * *", timezone="Europe/Berlin", catch_up="all")
        <SagaDraft 'report', handles []>
        """
        notes = self._notes
        where = notes.where
        if not isinstance(cron, str) or not cron.strip():
            raise DefinitionError(f"Saga schedule must not be empty. {where}: write for example '0 3 * * *'.")
        if not isinstance(timezone, str) or not timezone.strip():
            raise DefinitionError(f"{where}: schedule timezone {timezone!r:.80} must be a zone name, such as 'UTC'")
        if notes.schedule is not None:
            raise DefinitionError(
                f"{where} has the schedule {notes.schedule.cron!r} already: a saga has one, so put both into one "
                "expression, or let two sagas send to this one"
            )
        one_of(catch_up, get_args(CatchUp), f"{where}: schedule catch_up")
        try:
            read = parse_cron(cron, timezone.strip())
        except DefinitionError as error:
            raise DefinitionError(f"{where}: schedule: {error.message}") from error
        said = _said(notes, "schedule", f"{notes.id}:tick" if message is None else message, _OF_A_TICK)
        policy = SchedulePolicy(
            read.expression,
            said.type,
            read.timezone,
            catch_up,
            said.payload,
            said.correlation_key,
            said.concurrency_key,
        )
        return self._with(schedule=policy)

    def timeout(self, delay: timedelta | float | str, *, message: object, name: str = "timeout") -> Self:
        """Sends `message` (a type, or a message with a payload) to every run that is still live `delay` after it was
        opened. The timer is set in the commit that opens the run, under `name`, by which a handler takes it back:
        `cancel_scheduled("timeout")`. A second timeout needs a name of its own.

        >>> define_saga("order").timeout("30m", message="PaymentOverdue")
        <SagaDraft 'order', handles []>
        """
        notes = self._notes
        where = notes.where
        length = checked_length(f"{where}: timeout", delay)
        if not isinstance(name, str) or not name.strip():
            raise DefinitionError(f"{where}: timeout name must be a non-empty string, got {name!r:.80}")
        if any(one.name == name for one in notes.timeouts):
            raise DefinitionError(
                f"{where} already has a timeout called {name!r:.80}: give this one a name, as in "
                ".timeout(..., name='reminder')"
            )
        checked_key(where, "timeout name", name)
        said = _said(notes, "timeout", message, ())
        return self._with(timeouts=(*notes.timeouts, TimeoutPolicy(length, said.type, name, said.payload)))


def _said(notes: Notes, method: str, message: object, keeps: Sequence[str]) -> SagaMessage[bytes]:
    """The message that a saga sends to itself, its payload as JSON. It has its type, its payload and what it `keeps`:
    the rest differs from one time to the next."""
    where = f"{notes.where}: {method} message"
    if isinstance(message, (str, type)):
        message = {"type": wire_type(notes, message, f"{method} message")}
    try:
        said = as_message(message)
        payload = encode_any(said.payload)
    except SagasError as error:
        raise DefinitionError(f"{where}: {error.message}") from error
    for field in SagaMessage.__struct_fields__:
        value = getattr(said, field)
        if value is None or field in ("type", "payload"):
            continue
        if field not in keeps:
            raise DefinitionError(f"{where} has {field}={value!r:.80}: leave it out, every one gets its own")
        checked_key(where, field, value)
    return SagaMessage(
        wire_type(notes, said.type, f"{method} message"),
        payload,
        correlation_key=said.correlation_key,
        concurrency_key=said.concurrency_key,
    )
