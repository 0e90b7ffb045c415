"""What is wrong with sagas that are well formed: messages that nobody takes, handlers that nothing reaches, statuses
that nothing leaves.

A definition that builds keeps every rule of the builder. What handlers *do* the builder cannot know; `foresight` reads
it off their source, and this draws conclusions. Each finding has a place, and says what to do about it:

    error      it will fail when it runs: a dead letter, or an error that names the saga
    warning    it will most likely not do what was meant
    note       worth knowing, also what could not be read; nothing is concluded from what was not seen

Where a handler has a blind spot, conclusions that it could refute are left out, and the blind spot is a note.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import msgspec

from sagaloom.definitions import HandlerBinding, SagaDefinition, SagaHandler
from sagaloom.foresight import OWN_MESSAGE, ForeseenEffect, Foresight, Place, foresee

__all__ = ["LEVELS", "Finding", "Level", "check_sagas", "source_of"]

Level = Literal["error", "warning", "note"]
LEVELS: Final[tuple[Level, ...]] = ("error", "warning", "note")
_ENDS: Final = ("completed", "failed", "cancelled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that was found. `code` is for programs, and stays as it is."""

    level: Level
    code: str
    saga: str
    place: Place
    message: str
    remedy: str


class _Handler(NamedTuple):
    """A function of a saga, and what it is called by."""

    what: str
    message_type: str | None
    """None for what several types lead to."""
    seen: Foresight
    is_step: bool
    is_undo: bool = False
    during: str | None = None
    """The only status in which it is called; None: in all."""


def check_sagas(
    definitions: Iterable[SagaDefinition[Any]], *, target_kinds: Iterable[str] = ("service", "job", "queue")
) -> tuple[Finding, ...]:
    """Everything that is found in `definitions`, which are taken to be all that run on their store. `target_kinds` are
    the kinds of target that effects can leave to.

    >>> from sagaloom import define_saga
    >>> saga = define_saga("order").state({}).on("Paid", lambda saga, event, context: [], starts=False).build()
    >>> [finding.code for finding in check_sagas([saga]) if finding.level == "error"]
    ['nothing-starts']
    """
    every = list(definitions)
    checks = _Checks(every, frozenset(target_kinds))
    found = [finding for definition in every for finding in checks.of(definition)]
    return tuple(sorted(dict.fromkeys(found), key=lambda one: (one.saga, LEVELS.index(one.level), one.place, one.code)))


class _Checks:
    def __init__(self, definitions: Sequence[SagaDefinition[Any]], target_kinds: frozenset[str]) -> None:
        self._ids = {each.id for each in definitions}
        self._types = {name for each in definitions for name in each.handlers}
        self._starting = {each.id: each.starting_types for each in definitions}
        self._kinds = target_kinds | {"saga"}

    def of(self, definition: SagaDefinition[Any]) -> Iterator[Finding]:
        one = _OneSaga(definition)
        yield from self._what_it_sends(one)
        yield from _how_it_starts(one)
        yield from _how_it_undoes(one)
        yield from _how_it_goes_on(one)
        yield from _what_was_not_seen(one)

    def _what_it_sends(self, saga: _OneSaga) -> Iterator[Finding]:
        spawned: dict[str, Place] = {}
        for handler in saga.handlers:
            for effect in handler.seen.effects:
                if effect.kind == "send" and effect.target is not None:
                    yield from self._of_send(saga, handler, effect.target, effect.place)
                elif effect.kind == "scheduled" and effect.message is not None:
                    yield from _of_scheduled(saga, handler, effect, effect.message)
                elif effect.kind == "spawn" and effect.child is not None:
                    spawned.setdefault(effect.child, effect.place)
        for child, place in spawned.items():
            yield from self._of_spawn(saga, child, place)

    def _of_send(
        self, saga: _OneSaga, handler: _Handler, target: tuple[str, str | None], place: Place
    ) -> Iterator[Finding]:
        kind, name = target
        if kind not in self._kinds:
            known = ", ".join(sorted(self._kinds))
            yield saga.finding(
                "error",
                "unknown-target",
                place,
                f"{handler.what} sends to {kind}:{name or '...'}, and no target is of kind {kind!r}: there are {known}",
                f"add a target: targets = [callable_target({kind!r}, function)] in the module, or name another kind",
            )
        elif kind == "saga" and name is not None and name not in self._ids and name not in self._types:
            yield saga.finding(
                "error",
                "unhandled-send",
                place,
                f"{handler.what} sends {name!r}, which no saga that is loaded here handles: it would be a dead letter",
                f"add .on({name!r}, handler) to the saga that should get it, load its module too, or send to a service",
            )

    def _of_spawn(self, saga: _OneSaga, child: str, place: Place) -> Iterator[Finding]:
        if child not in self._ids:
            yield saga.finding(
                "error",
                "unknown-child",
                place,
                f"it spawns the saga {child!r}, which is not loaded here",
                "load its module too, or spawn one of " + (", ".join(sorted(self._ids)) or "none"),
            )
        elif not self._starting[child]:
            yield saga.finding(
                "error",
                "unknown-child",
                place,
                f"it spawns the saga {child!r}, which no message starts",
                f"give {child!r} a handler with starts=True",
            )
        elif not any(f"{child}:{end}" in saga.definition.handlers for end in _ENDS):
            yield saga.finding(
                "note",
                "unheard-child",
                place,
                f"it spawns {child!r} and handles none of its ends",
                f"add .on('{child}:completed', handler, starts=False) if it matters how the child ends",
            )


class _OneSaga:
    """A definition with what was seen of its handlers."""

    def __init__(self, definition: SagaDefinition[Any]) -> None:
        self.definition = definition
        self.place = source_of(definition)
        see = functools.partial(foresee, status_field=definition.status_field)
        steps = [one for binding in definition.handlers.values() for one in _handlers_of(binding, see)]
        steps += [
            _Handler(f"the handler of all of {join.name}", None, see(join.handler), is_step=False)
            for join in definition.joins
        ]
        said: Mapping[str, Mapping[str, HandlerBinding]] = {"signal": definition.signals, "update": definition.updates}
        steps += [
            _Handler(f"the handler of {kind} {name!r}", name, see(one.handler), is_step=False)
            for kind, bindings in said.items()
            for name, one in bindings.items()
        ]
        undos = [
            _Handler(f"the compensation of {one.type!r}", one.type, see(one.handler), is_step=False, is_undo=True)
            for one in definition.compensations.values()
        ]
        self.steps = tuple(steps)
        self.handlers = (*steps, *undos)
        self.sees_effects = all(one.seen.sees_effects for one in self.handlers)
        self.sees_statuses = all(one.seen.sees_statuses for one in self.handlers)

    def finding(self, level: Level, code: str, place: Place, message: str, remedy: str) -> Finding:
        return Finding(level=level, code=code, saga=self.definition.id, place=place, message=message, remedy=remedy)

    def compensates(self) -> Iterator[tuple[_Handler, ForeseenEffect]]:
        for handler in self.handlers:
            for effect in handler.seen.effects:
                if effect.kind == "compensate":
                    yield handler, effect


def _handlers_of(binding: HandlerBinding, see: Callable[[SagaHandler[Any, Any]], Foresight]) -> Iterator[_Handler]:
    if binding.is_gathered_only:
        return
    if binding.during is None:
        yield _Handler(f"the handler of {binding.type!r}", binding.type, see(binding.handler), is_step=True)
        return
    for status, handler in binding.during.items():
        what = f"the handler of {binding.type!r} during {status!r}"
        yield _Handler(what, binding.type, see(handler), is_step=True, during=status)


# --- Sends -----------------------------------------------------------------------------------------------------------


def _of_scheduled(saga: _OneSaga, handler: _Handler, effect: ForeseenEffect, message: str) -> Iterator[Finding]:
    name = handler.message_type if message == OWN_MESSAGE else message
    if name is not None and name not in saga.definition.handlers:
        yield saga.finding(
            "error",
            "unhandled-schedule",
            effect.place,
            f"{handler.what} schedules {name!r}, which this saga does not handle: a timer comes back to its own run",
            f"add .on({name!r}, handler, starts=False), or send(...) it to the saga that handles it",
        )


# --- Starting --------------------------------------------------------------------------------------------------------


def _how_it_starts(saga: _OneSaga) -> Iterator[Finding]:
    definition = saga.definition
    starting = definition.starting_types
    has_rule = bool(definition.correlations) or definition.is_singleton
    if not starting:
        yield saga.finding(
            "error",
            "nothing-starts",
            saga.place,
            "every handler has starts=False, so no instance ever begins and none of them is reached",
            "let the message that begins it start one: leave starts=False out there",
        )
    elif len(starting) > 1 and not has_rule:
        yield saga.finding(
            "warning",
            "starters-without-key",
            saga.place,
            f"{_listed(starting)} all start an instance, and nothing says which messages belong together: without a "
            "key each opens one of its own",
            "add .correlate(lambda message: ...), or .singleton(), and starts=False to those that only continue",
        )
    elif len(definition.handlers) > 1 and not has_rule:
        yield saga.finding(
            "warning",
            "no-correlation",
            saga.place,
            "it handles several types and has no rule: a message without a correlation_key of its own is refused, or "
            "opens an instance that no other message finds",
            "add .correlate(lambda message: ...), which reads the key off the payload",
        )
    elif len(starting) > 1 and len(starting) == len(definition.handlers) and not definition.is_singleton:
        yield saga.finding(
            "note",
            "several-starters",
            saga.place,
            f"{_listed(starting)} all start an instance: whichever comes first, also a late one",
            "add starts=False to those that only continue, if they may not begin one",
        )


# --- Compensations ---------------------------------------------------------------------------------------------------


def _how_it_undoes(saga: _OneSaga) -> Iterator[Finding]:
    definition = saga.definition
    asked: set[str] = set()
    unwinds = False
    for handler, effect in saga.compensates():
        unwinds |= effect.is_all_steps
        if effect.message is None:
            continue
        name = handler.message_type if effect.message == OWN_MESSAGE else effect.message
        if name is None:
            continue  # One of several types, and which is known when it runs.
        asked.add(name)
        if name not in definition.compensations:
            yield saga.finding(
                "error",
                "missing-compensation",
                effect.place,
                f"{handler.what} compensates {name!r}, which has no compensation",
                f"add .compensate({name!r}, handler)",
            )
    for undo in (one for one in saga.handlers if one.is_undo):
        if undo.message_type not in definition.handlers and undo.message_type not in asked and saga.sees_effects:
            yield saga.finding(
                "warning",
                "unreachable-compensation",
                undo.seen.place,
                f"nothing asks for {undo.what}: no handler takes the type, so it is no step, and none names it",
                f"name a type that is handled, or return saga_compensate(...) with a {undo.message_type!r}",
            )
    if not (definition.compensations or unwinds):
        return
    undos = {one.message_type: one for one in saga.handlers if one.is_undo}
    for step in (one for one in saga.steps if one.is_step):
        leaves = [one for one in step.seen.effects if one.kind == "send" and (one.target or ("", ""))[0] != "saga"]
        if unwinds and step.message_type in undos:
            yield from _what_an_undo_leaves(saga, step, undos[step.message_type], leaves)
        if not leaves or step.message_type in definition.compensations or step.seen.may("fail", "compensate"):
            continue
        if step.message_type in definition.pivots or step.seen.may("complete"):
            continue
        yield saga.finding(
            "warning" if unwinds else "note",
            "step-without-compensation",
            leaves[0].place,
            f"{step.what} asks somebody outside for something, and has no compensation: "
            + ("unwinding leaves it as it is" if unwinds else "nothing takes it back by itself"),
            f"add .compensate({step.message_type!r}, handler), also where a later step has one, for its answer may "
            "come too late; or pivot=True where nothing has to be undone",
        )


def _what_an_undo_leaves(
    saga: _OneSaga, step: _Handler, undo: _Handler, leaves: Sequence[ForeseenEffect]
) -> Iterator[Finding]:
    """Whom a step asks for something, while its compensation speaks to others only."""
    told = {one.target for one in undo.seen.effects if one.kind == "send"}
    if not undo.seen.sees_effects or not told or None in told:
        return
    for effect in leaves:
        if effect.target is not None and effect.target not in told:
            kind, name = effect.target
            yield saga.finding(
                "note",
                "undone-elsewhere",
                effect.place,
                f"{step.what} asks {kind}:{name or '...'} for something, and {undo.what} does not speak to it: when it "
                "runs before the answer has come, nothing takes that back",
                f"undo in .compensate({step.message_type!r}, handler) what this step asks for, and what another step "
                "asks for there",
            )


# --- Going on --------------------------------------------------------------------------------------------------------


def _how_it_goes_on(saga: _OneSaga) -> Iterator[Finding]:
    definition = saga.definition
    if not saga.sees_effects:
        return
    ends = [one for one in saga.handlers if one.seen.may("complete", "fail", "compensate")]
    lasts = definition.is_singleton or definition.schedule is not None
    if not ends and not lasts and definition.starting_types:
        yield saga.finding(
            "note",
            "never-ends",
            saga.place,
            "no handler completes or fails an instance: every one stays for ever, unless an operator cancels it",
            "return saga_complete(...) where its work is done",
        )
    if not saga.sees_statuses:
        return
    statuses = _statuses(saga)
    reached = {_initial_status(definition), *(one.status for each in saga.handlers for one in each.seen.statuses)}
    for handler in saga.steps:
        if handler.during is not None and handler.during not in reached:
            yield saga.finding(
                "warning",
                "unreachable-handler",
                handler.seen.place,
                f"{handler.what} is never called: no handler sets that status, and no instance begins with it",
                f"set the status {handler.during!r} somewhere, or name one that is set",
            )
    for status, place in statuses.items():
        leaving = [one for one in saga.steps if _may_leave(one, status)]
        if not leaving:
            yield saga.finding(
                "warning",
                "dead-end-status",
                place,
                f"no message leads out of the status {status!r}: no handler sets another one, and none ends the run",
                "handle the message that goes on from there, or return saga_complete(...) or saga_fail(...) with it",
            )


def _statuses(saga: _OneSaga) -> dict[str, Place]:
    """The statuses that a live run may stay in, and where each is set."""
    found: dict[str, Place] = {}
    initial = _initial_status(saga.definition)
    # It is where a run stays whose starter sets no status.
    if initial and any(not one.seen.statuses and not _ends(one) for one in saga.steps if one.is_step):
        found[initial] = saga.place
    for handler in saga.handlers:
        if not _ends(handler):
            for one in handler.seen.statuses:
                found.setdefault(one.status, one.place)
    return found


def _initial_status(definition: SagaDefinition[Any]) -> str | None:
    fields = msgspec.json.decode(definition.initial_json or b"{}", type=dict[str, Any])
    status = fields.get(definition.status_field)
    return status if isinstance(status, str) else None


def _ends(handler: _Handler) -> bool:
    return handler.seen.may("complete", "fail")


def _may_leave(handler: _Handler, status: str) -> bool:
    seen = handler.seen
    if handler.during not in (None, status):
        return False
    return seen.may("complete", "fail", "compensate") or any(one.status != status for one in seen.statuses)


# --- Not seen --------------------------------------------------------------------------------------------------------


def _what_was_not_seen(saga: _OneSaga) -> Iterator[Finding]:
    for handler in saga.handlers:
        for spot in handler.seen.blind_spots:
            kept = "what it may return" if spot.hides == "effects" else "which statuses there are"
            yield saga.finding(
                "note",
                "not-seen",
                spot.place,
                f"{handler.what}: {spot.why}, so {kept} is not known here",
                "write it as text or a name of the module, if you want it checked",
            )


def _listed(names: Sequence[str]) -> str:
    shown = [repr(one) for one in names]
    return " and ".join([", ".join(shown[:-1]), shown[-1]])


def source_of(definition: SagaDefinition[Any]) -> Place:
    """Where `definition` was built."""
    file, _, line = definition.source.rpartition(":")
    return Place(file, int(line)) if line.isdigit() else Place(definition.source or "<unknown>", 0)
