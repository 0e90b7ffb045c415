"""The entry of a saga in a project's configuration: where it lives and what people call it.

It is separate from the definition that `define_saga(...).build()` makes: tools read entries without importing the
sagas they point to.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final

from sagaloom.durations import parse_duration
from sagaloom.errors import DefinitionError

__all__ = ["SagaConfigBuilder", "SagaConfigEntry", "SagaConfigRetry", "SagaConfigTimeout", "define_saga_config"]

_WEEK_MS: Final = 7 * 24 * 3_600_000


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
