"""The entry of a saga in a project's configuration: where it lives, what people call it, and how it is run.

It is separate from the definition that `define_saga(...).build()` makes: tools read entries without importing the
sagas they point to. A module with entries is named like one with sagas (`sagaloom serve shop.config`), and each entry
brings the saga of its entrypoint along. What it says goes before what the definition says:

    name, description, topic, tags, metadata   shown and filtered by; a group gives its topic to all of its sagas
    enabled                                    a disabled saga takes nothing in; what was accepted for it waits
    retry                                      in place of the definition's policy
    timeout                                    a run that is still live after that long is cancelled
    retention                                  finished runs go after `completed_days`; live ones are only counted
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final, TypeVar

import msgspec

from sagaloom.definitions import RetentionPolicy, RetryPolicy, SagaAbout, SagaDefinition, TimeoutPolicy
from sagaloom.durations import parse_duration
from sagaloom.errors import DefinitionError
from sagaloom.fingerprint import fingerprint_of
from sagaloom.messages import RESERVED_PREFIX

__all__ = [
    "SagaConfigBuilder",
    "SagaConfigEntry",
    "SagaConfigGroup",
    "SagaConfigRetention",
    "SagaConfigRetry",
    "SagaConfigTimeout",
    "configured",
    "define_saga_config",
    "define_saga_group",
]

S = TypeVar("S")

_WEEK_MS: Final = 7 * 24 * 3_600_000
_DAYS_MAX: Final = 36_500
_COMPLETION: Final = f"{RESERVED_PREFIX}completion"
"""The name of the timer that bounds a run; no timer of a saga's own can be in its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaConfigTimeout:
    """How long a saga may take, in milliseconds."""

    completion_timeout: float
    min_timeout: float = 1_000
    max_timeout: float = _WEEK_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaConfigRetry:
    """How often a failed attempt is made again, and when; delays in milliseconds."""

    max_attempts: int
    initial_delay: float = 1_000
    max_delay: float = 60_000
    backoff_multiplier: float = 2
    jitter: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaConfigRetention:
    """How many days a finished run is kept, and how old a live one may get before somebody should look at it. Days may
    have a fraction; None keeps for ever, and never alerts."""

    completed_days: float | None = None
    active_days: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaConfigEntry:
    """What `build()` returns."""

    id: str
    entrypoint: str
    name: str
    description: str | None = None
    topic: str | None = None
    enabled: bool = True
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    timeout: SagaConfigTimeout | None = None
    retry: SagaConfigRetry | None = None
    retention: SagaConfigRetention | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SagaConfigGroup:
    """Sagas that are spoken of together: each has the topic of its group, and is disabled when the group is."""

    topic: str
    sagas: tuple[SagaConfigEntry, ...]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SagaConfigBuilder:
    """An entry that is being written. Immutable: every call returns a new one."""

    _entry: SagaConfigEntry

    def __repr__(self) -> str:
        return f"<SagaConfigBuilder {self._entry.id!r}>"

    def name(self, name: str) -> SagaConfigBuilder:
        """What people call the saga; its id without one."""
        return self._with(name=self._text("name", name))

    def description(self, description: str) -> SagaConfigBuilder:
        """What the saga does, in a sentence."""
        return self._with(description=self._text("description", description))

    def topic(self, topic: str) -> SagaConfigBuilder:
        """The group that the saga belongs to."""
        return self._with(topic=self._text("topic", topic))

    def tags(self, *tags: str | Iterable[str]) -> SagaConfigBuilder:
        """Adds tags, as arguments or as one list; blanks and repeats are dropped.

        >>> define_saga_config("order", "sagas/order.py").tags("shop").tags(["shop", "eu"]).build().tags
        ('shop', 'eu')
        """
        given: list[object] = []
        for tag in tags:
            given.extend([tag] if isinstance(tag, str) or not isinstance(tag, Iterable) else tag)
        added: list[str] = []
        for one in given:
            if not isinstance(one, str):
                raise self._refusal("Saga tags must be strings.", one)
            if one.strip():
                added.append(one.strip())
        return self._with(tags=tuple(dict.fromkeys((*self._entry.tags, *added))))

    def timeout(self, timeout: timedelta | float | str) -> SagaConfigBuilder:
        """How long the saga may take: milliseconds, a timedelta, or text such as `"30m"`."""
        try:
            milliseconds = parse_duration(timeout) / timedelta(milliseconds=1)
        except DefinitionError as error:
            raise self._refusal("Saga timeout must be a positive finite number.", timeout) from error
        if milliseconds <= 0:
            raise self._refusal("Saga timeout must be a positive finite number.", timeout)
        whole = int(milliseconds) if milliseconds.is_integer() else milliseconds
        return self._with(timeout=SagaConfigTimeout(completion_timeout=whole))

    def retry(
        self,
        max_attempts: int,
        *,
        initial_delay: float = 1_000,
        max_delay: float = 60_000,
        backoff_multiplier: float = 2,
        jitter: bool = True,
    ) -> SagaConfigBuilder:
        """How often a failed attempt is made again (0: never), and when; delays in milliseconds."""
        if isinstance(max_attempts, bool) or not isinstance(max_attempts, int) or max_attempts < 0:
            raise self._refusal("Saga retry maxAttempts must be a non-negative integer.", max_attempts)
        self._number("initialDelay", initial_delay, least=0)
        self._number("maxDelay", max_delay, least=initial_delay)
        self._number("backoffMultiplier", backoff_multiplier, least=1)
        if not isinstance(jitter, bool):
            raise self._refusal("Saga retry jitter must be True or False.", jitter)
        return self._with(
            retry=SagaConfigRetry(
                max_attempts=max_attempts,
                initial_delay=initial_delay,
                max_delay=max_delay,
                backoff_multiplier=backoff_multiplier,
                jitter=jitter,
            )
        )

    def retention(self, *, completed_days: float | None = None, active_days: float | None = None) -> SagaConfigBuilder:
        """How many days finished runs are kept, and after how many a live one is worth an alert: that one is counted,
        never removed."""
        return self._with(retention=_retention(completed_days, active_days, f"Saga {self._entry.id!r}"))

    def enabled(self, enabled: bool = True) -> SagaConfigBuilder:  # noqa: FBT001, FBT002  # reads as a sentence
        """Whether the saga is loaded; it is, unless told otherwise."""
        if not isinstance(enabled, bool):
            raise self._refusal("Saga enabled must be True or False.", enabled)
        return self._with(enabled=enabled)

    def disabled(self) -> SagaConfigBuilder:
        """The same as `.enabled(False)`."""
        return self._with(enabled=False)

    def metadata(self, metadata: Mapping[str, Any]) -> SagaConfigBuilder:
        """Adds facts of your own; a key given again replaces the older value."""
        if not isinstance(metadata, Mapping):
            raise self._refusal("Saga metadata must be a mapping.", metadata)
        return self._with(metadata=MappingProxyType({**self._entry.metadata, **metadata}))

    def build(self) -> SagaConfigEntry:
        """The finished, frozen entry."""
        return self._entry

    def _with(self, **changes: Any) -> SagaConfigBuilder:
        return SagaConfigBuilder(dataclasses.replace(self._entry, **changes))

    def _text(self, what: str, value: object) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self._refusal(f"Saga {what} must not be empty.", value)
        return value.strip()

    def _number(self, what: str, value: object, *, least: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
            raise self._refusal(f"Saga retry {what} must be a finite number from {least:g} on.", value)

    def _refusal(self, rule: str, value: object) -> DefinitionError:
        return DefinitionError(f"{rule} Saga {self._entry.id!r}: got {value!r:.80}.")


def define_saga_config(id: str, entrypoint: str) -> SagaConfigBuilder:
    """Begins the configuration entry of the saga `id`, which lives in the file or module `entrypoint`.

    >>> entry = define_saga_config("order-saga", "sagas/order_saga.py").name("Order saga").topic("orders").build()
    >>> entry.name, entry.topic, entry.enabled
    ('Order saga', 'orders', True)
    """
    if not isinstance(id, str) or not id.strip():
        raise DefinitionError(f"Saga ID is required. Got {id!r:.80}.")
    if not isinstance(entrypoint, str) or not entrypoint.strip():
        raise DefinitionError(f"Saga entrypoint is required. Saga {id.strip()!r}: got {entrypoint!r:.80}.")
    return SagaConfigBuilder(SagaConfigEntry(id=id.strip(), entrypoint=entrypoint.strip(), name=id.strip()))


def define_saga_group(
    topic: str,
    *sagas: SagaConfigEntry,
    enabled: bool = True,
    completed_days: float | None = None,
    active_days: float | None = None,
) -> SagaConfigGroup:
    """Puts entries under one topic. Retention, and `enabled=False`, hold for those that say nothing else themselves.

    >>> entry = define_saga_config("order-saga", "sagas/order.py").build()
    >>> define_saga_group("orders", entry, completed_days=7).sagas[0].topic
    'orders'
    """
    if not isinstance(topic, str) or not topic.strip():
        raise DefinitionError(f"Saga group topic must not be empty. Got {topic!r:.80}.")
    topic = topic.strip()
    where = f"Saga group {topic!r}"
    if not isinstance(enabled, bool):
        raise DefinitionError(f"{where}: enabled must be True or False, got {enabled!r:.80}.")
    shared = None
    if completed_days is not None or active_days is not None:
        shared = _retention(completed_days, active_days, where)
    members: dict[str, SagaConfigEntry] = {}
    for entry in sagas:
        if not isinstance(entry, SagaConfigEntry):
            raise DefinitionError(f"{where} holds entries, got {entry!r:.80}: did you forget .build()?")
        if entry.topic not in (None, topic):
            raise DefinitionError(f"{where}: saga {entry.id!r} has the topic {entry.topic!r} itself: leave one out.")
        if entry.id in members:
            raise DefinitionError(f"{where} has two entries for saga {entry.id!r}: keep one.")
        members[entry.id] = dataclasses.replace(
            entry, topic=topic, enabled=entry.enabled and enabled, retention=entry.retention or shared
        )
    if not members:
        raise DefinitionError(f"{where} has no sagas: name at least one entry.")
    return SagaConfigGroup(topic=topic, sagas=tuple(members.values()))


def configured(definition: SagaDefinition[S], entry: SagaConfigEntry) -> SagaDefinition[S]:
    """`definition` as `entry` wants it run. Raises `DefinitionError` when they are not of one saga.

    >>> from sagaloom import define_saga
    >>> saga = define_saga("order").state({}).on("OrderPlaced", lambda saga, event, context: []).build()
    >>> configured(saga, define_saga_config("order", "sagas/order.py").topic("orders").retry(2).build()).about.topic
    'orders'
    """
    if definition.id != entry.id:
        raise DefinitionError(
            f"the configuration of saga {entry.id!r} was given the definition of {definition.id!r}: let its entrypoint "
            f"{entry.entrypoint!r} name the right one"
        )
    retention = entry.retention or SagaConfigRetention()
    about = SagaAbout(
        name=entry.name,
        description=entry.description,
        topic=entry.topic or "default",
        enabled=entry.enabled,
        entrypoint=entry.entrypoint,
        tags=entry.tags,
        metadata=entry.metadata,
        retention=RetentionPolicy(completed_days=retention.completed_days, active_days=retention.active_days),
    )
    timeouts = tuple(one for one in definition.timeouts if one.name != _COMPLETION)
    if entry.timeout is not None:
        timeouts = (*timeouts, _bound(entry.timeout))
    changed = dataclasses.replace(
        definition, about=about, retry=_policy(definition.retry, entry.retry), timeouts=timeouts
    )
    return dataclasses.replace(changed, fingerprint=fingerprint_of(changed))


def _policy(own: RetryPolicy, retry: SagaConfigRetry | None) -> RetryPolicy:
    if retry is None:
        return own
    return RetryPolicy(
        maximum_attempts=retry.max_attempts + 1,  # The first attempt is no retry.
        initial_interval_ms=round(retry.initial_delay),
        maximum_interval_ms=round(retry.max_delay),
        backoff_coefficient=float(retry.backoff_multiplier),
        jitter=RetryPolicy().jitter if retry.jitter else 0.0,
        non_retryable_error_types=own.non_retryable_error_types,
    )


def _bound(timeout: SagaConfigTimeout) -> TimeoutPolicy:
    length = timedelta(milliseconds=timeout.completion_timeout)
    payload = msgspec.json.encode({"reason": f"not finished within {length}, the timeout of its configuration"})
    return TimeoutPolicy(length, f"{RESERVED_PREFIX}cancel", _COMPLETION, payload)


def _retention(completed_days: float | None, active_days: float | None, where: str) -> SagaConfigRetention:
    for name, days in (("completed_days", completed_days), ("active_days", active_days)):
        is_number = isinstance(days, (int, float)) and not isinstance(days, bool)
        if days is not None and not (is_number and 0 < days <= _DAYS_MAX):
            raise DefinitionError(f"{where}: {name} must be a number of days, more than 0, got {days!r:.80}.")
    return SagaConfigRetention(completed_days=completed_days, active_days=active_days)
