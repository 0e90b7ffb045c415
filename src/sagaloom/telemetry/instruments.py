"""The metrics of sagas: some are recorded as things happen, the others are read off a runtime when somebody collects.

A meter makes each instrument once, and what it observes cannot be taken back; a process may start and stop many
runtimes. So the instruments belong to the meter provider, and observe whichever runtimes are there: counts of runtimes
that have stopped go on counting, levels end with them.

Whoever collects does so from a thread of its own, and the runtime goes on meanwhile, without waiting for it: what is
counted is copied in one step of the interpreter, and a level that changes under the eyes of the one who looks is left
out once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final, Protocol, TypeAlias

from opentelemetry.metrics import CallbackOptions, MeterProvider, NoOpMeterProvider, Observation

from sagaloom.telemetry import names

__all__ = ["CountsView", "HealthView", "Instruments", "Observed", "instruments_of"]

DURATION_BUCKETS_MS: Final = (0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000)

_Labels: TypeAlias = tuple[tuple[str, str], ...]
_Read: TypeAlias = Callable[["CountsView"], Counter[_Labels]]
_Level: TypeAlias = Callable[["HealthView"], float]
_Observer: TypeAlias = Callable[[CallbackOptions], Iterable[Observation]]


class CountsView(Protocol):
    """What a runtime counts anyway, as numbers that only grow."""

    @property
    def decided(self) -> Mapping[tuple[str, Any], int]: ...
    @property
    def effects(self) -> Mapping[tuple[str, Any], int]: ...
    @property
    def throttled(self) -> Mapping[str, int]: ...


class HealthView(Protocol):
    """How a runtime is right now."""

    @property
    def backlog(self) -> int: ...
    @property
    def outbox(self) -> int: ...
    @property
    def stalled_lanes(self) -> int: ...
    @property
    def oldest_waiting_seconds(self) -> float: ...


@dataclass(frozen=True, eq=False, slots=True)
class Observed:
    """A running runtime, as its metrics see it."""

    counts: CountsView
    health: Callable[[], HealthView]
    partitions: Callable[[], int]


class Instruments:
    """The instruments of one meter provider."""

    def __init__(self, provider: MeterProvider) -> None:
        meter = provider.get_meter(names.SCOPE)
        self._lock = Lock()  # Between those who begin or end, which is rare, and those who collect.
        self._running: set[Observed] = set()
        self._ended: dict[str, Counter[_Labels]] = {}
        self.handle_duration = meter.create_histogram(
            names.HANDLE_DURATION,
            unit=names.UNITS[names.HANDLE_DURATION],
            description="From the beginning of a decision to the end of its commit.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS_MS,
        )
        self.job_duration = meter.create_histogram(
            names.JOB_DURATION,
            unit=names.UNITS[names.JOB_DURATION],
            description="One attempt of a job run.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS_MS,
        )
        self.queue_duration = meter.create_histogram(
            names.QUEUE_DURATION,
            unit=names.UNITS[names.QUEUE_DURATION],
            description="One attempt at a message of a queue.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS_MS,
        )
        self.queue_dead_letters = meter.create_counter(
            names.QUEUE_DEAD_LETTERS,
            unit=names.UNITS[names.QUEUE_DEAD_LETTERS],
            description="Messages of queues that were given up.",
        )
        self.instances_active = meter.create_up_down_counter(
            names.INSTANCES_ACTIVE,
            unit=names.UNITS[names.INSTANCES_ACTIVE],
            description="Runs that this process has opened, less those that it has ended.",
        )
        self.compensations = meter.create_counter(
            names.COMPENSATIONS,
            unit=names.UNITS[names.COMPENSATIONS],
            description="Compensations that have run.",
        )
        self.dead_letters = meter.create_counter(
            names.DEAD_LETTERS,
            unit=names.UNITS[names.DEAD_LETTERS],
            description="Messages and effects that were given up.",
        )
        for name, (read, what) in _COUNTS.items():
            observe = self._counts(name, read)
            meter.create_observable_counter(name, [observe], unit=names.UNITS[name], description=what)
        for name, (level, together, what) in _LEVELS.items():
            observe = self._levels(level, together)
            meter.create_observable_gauge(name, [observe], unit=names.UNITS[name], description=what)
        meter.create_observable_gauge(
            names.PARTITIONS,
            [self._partitions],
            unit=names.UNITS[names.PARTITIONS],
            description="Partitions of the store that this process holds: a step is a takeover.",
        )

    def begin(self, observed: Observed) -> None:
        """Observes a runtime from now on."""
        with self._lock:
            self._running.add(observed)

    def end(self, observed: Observed) -> None:
        """Observes it no more, and keeps what it has counted. Ending twice is no error."""
        with self._lock:
            if observed in self._running:
                self._running.discard(observed)
                for name, (read, _) in _COUNTS.items():
                    self._ended.setdefault(name, Counter()).update(read(observed.counts))

    def _counts(self, name: str, read: _Read) -> _Observer:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            with self._lock:
                total = Counter(self._ended.get(name, {}))
                for observed in self._running:
                    total.update(read(observed.counts))
            return [Observation(count, dict(labels)) for labels, count in total.items()]

        return observe

    def _levels(self, level: _Level, together: Callable[[Iterable[float]], float]) -> _Observer:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            try:
                found = [level(observed.health()) for observed in list(self._running)]
            except RuntimeError:
                return []  # Something was added while it was walked over. The next collection finds it at rest.
            return [Observation(together(found))] if found else []

        return observe

    def _partitions(self, _: CallbackOptions) -> Iterable[Observation]:
        running = list(self._running)
        return [Observation(sum(observed.partitions() for observed in running))] if running else []


def instruments_of(provider: MeterProvider | None) -> Instruments:
    """The instruments of this provider, made when they are first asked for; without one, such that do nothing."""
    if provider is None:
        provider = _SILENT
    made = _made.get(provider)
    if made is None:
        made = _made[provider] = Instruments(provider)
    return made


_SILENT: Final = NoOpMeterProvider()

# A process has one provider, and keeps it.
_made: Final[dict[MeterProvider, Instruments]] = {}


def _hits(counts: CountsView) -> Counter[_Labels]:
    found: Counter[_Labels] = Counter()
    for (saga_id, disposition), count in list(counts.decided.items()):
        if disposition == "duplicate":
            found[((names.SAGA_ID, saga_id),)] = count
    return found


def _throttled(counts: CountsView) -> Counter[_Labels]:
    found: Counter[_Labels] = Counter()
    for saga_id, count in list(counts.throttled.items()):
        found[((names.SAGA_ID, saga_id),)] = count
    return found


def _messages(counts: CountsView) -> Counter[_Labels]:
    found: Counter[_Labels] = Counter()
    for (saga_id, disposition), count in list(counts.decided.items()):
        found[(names.SAGA_ID, saga_id), (names.DISPOSITION, disposition)] = count
    return found


def _effects(counts: CountsView) -> Counter[_Labels]:
    found: Counter[_Labels] = Counter()
    for (kind, end), count in list(counts.effects.items()):
        found[(names.TARGET_KIND, kind), (names.DISPOSITION, end)] = count
    return found


_COUNTS: Final[Mapping[str, tuple[_Read, str]]] = {
    names.IDEMPOTENCY_HITS: (_hits, "Messages that were seen before."),
    names.CONCURRENCY_THROTTLED: (_throttled, "Messages that found no free slot of their concurrency key."),
    names.MESSAGES: (_messages, "Decisions about messages, by what they came to."),
    names.EFFECTS: (_effects, "Attempts to deliver an effect, by what they came to."),
}
_LEVELS: Final[Mapping[str, tuple[_Level, Callable[[Iterable[float]], float], str]]] = {
    names.BACKLOG: (lambda health: health.backlog, sum, "Messages waiting to be applied."),
    names.OLDEST_WAITING: (lambda health: health.oldest_waiting_seconds, max, "How long the next one has waited."),
    names.OUTBOX: (lambda health: health.outbox, sum, "Effects waiting to leave."),
    names.STALLED_LANES: (lambda health: health.stalled_lanes, sum, "Lanes that stand still behind a dead letter."),
}
