"""What operators say about a saga as a whole: disabled, paused, and back again.

It is kept in the store, one row a saga, and laid over the definition that a process has loaded: the definition that the
roles see says by its `about` whether it is enabled and paused. So there is one place where each of them looks, whether
the configuration of the saga has said it or an operator.

    paused    messages are accepted and wait in their order, those that would start an instance too; ticks are missed
    disabled  the same, and the doors refuse new messages: 503 `SAGA_DISABLED`

What operators do to single instances goes on meanwhile, and effects that were committed leave. Other processes on the
store look every two seconds, as long as there are others.

What we dislike about it: for up to two seconds another process goes on with what it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec

from sagaloom.clock import Clock
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.controls import REASON_LENGTH_MAX
from sagaloom.engine.correlation import DefinitionSet
from sagaloom.engine.records import SagaStanding
from sagaloom.errors import MessageRejected, SagaNotFound, SagasError
from sagaloom.ports.store import SagaStore

if TYPE_CHECKING:
    from sagaloom.runtime.receiver import Receiver

__all__ = ["StandingChange", "StandingVerb", "Standings"]

_log = logging.getLogger("sagaloom.standings")
_LOOK_SECONDS: Final = 2.0

StandingVerb = Literal["enable", "disable", "pause", "resume"]


class StandingChange(NamedTuple):
    """What became of a command about a saga: `reason` says why it changed nothing."""

    standing: SagaStanding
    has_changed: bool
    reason: str | None = None


class Standings:
    """Keeps the definitions of a runtime as their sagas stand."""

    def __init__(self, store: SagaStore, clock: Clock, receiver: Receiver, *, on_change: Callable[[], None]) -> None:
        self._store = store
        self._clock = clock
        self._receiver = receiver
        self._on_change = on_change
        self._loaded: dict[str, SagaDefinition[Any]] = {}
        self._said: dict[str, SagaStanding] = {}
        self.definitions = DefinitionSet()
        """The loaded definitions, as their sagas stand."""

    def add(self, definition: SagaDefinition[Any]) -> None:
        self._loaded[definition.id] = definition
        self.definitions = self.definitions.with_definition(self._as_it_stands(definition))
        self._on_change()

    def standing(self, saga_id: str) -> SagaStanding:
        """What has been said about a saga, as far as this process knows."""
        return self._said.get(saga_id) or SagaStanding(saga_id)

    async def load(self) -> None:
        """Takes over what the store has."""
        said = {standing.saga_id: standing for standing in await self._store.standings()}
        if said != self._said:
            self._take(said)

    async def watch(self) -> None:
        """Looks what other processes have been told, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._receiver.share.is_shared:
                with contextlib.suppress(SagasError):  # the next look finds it
                    await self.load()

    async def change(self, verb: StandingVerb, saga_id: str, reason: str | None) -> StandingChange:
        """Does what an operator says. Raises `SagaNotFound` for a saga that is neither loaded nor known to the store,
        and `MessageRejected` for what its configuration decides."""
        if reason is not None and (not isinstance(reason, str) or len(reason) > REASON_LENGTH_MAX):
            raise MessageRejected(
                f"the reason to {verb} saga {saga_id!r:.80} must be a text of at most {REASON_LENGTH_MAX} characters",
                data={"field": "reason"},
            )
        await self.load()
        loaded = self._loaded.get(saga_id)
        if loaded is None and all(each.saga_id != saga_id for each in await self._store.definitions()):
            known = ", ".join(sorted(self._loaded)) or "none"
            raise SagaNotFound(f"no saga {saga_id!r:.80} is known to this store: loaded here are {known}")
        if loaded is not None and not loaded.about.enabled and verb in ("enable", "disable"):
            raise MessageRejected(
                f"saga {saga_id!r} is disabled by its configuration: enable it there, and start again",
                code="SAGA_DISABLED_BY_CONFIGURATION",
            )
        before = self.standing(saga_id)
        after = msgspec.structs.replace(before, reason=reason, changed_at=self._clock.now())
        if verb in ("enable", "disable"):
            after = msgspec.structs.replace(after, is_enabled=verb == "enable")
        else:
            after = msgspec.structs.replace(after, is_paused=verb == "pause")
        if (before.is_enabled, before.is_paused) == (after.is_enabled, after.is_paused):
            return StandingChange(before, has_changed=False, reason=_in_vain(verb, saga_id))
        await self._store.put_standing(after)
        _log.info("saga %s: %s%s", saga_id, verb, f" ({reason})" if reason else "")
        self._take({**self._said, saga_id: after})
        return StandingChange(after, has_changed=True)

    def _take(self, said: dict[str, SagaStanding]) -> None:
        stood_still = {each.id for each in self.definitions if each.about.stands_still}
        self._said = said
        self.definitions = DefinitionSet(self._as_it_stands(each) for each in self._loaded.values())
        go_on = stood_still - {each.id for each in self.definitions if each.about.stands_still}
        if go_on:
            self._receiver.let_go_on(go_on)
        self._on_change()

    def _as_it_stands(self, definition: SagaDefinition[Any]) -> SagaDefinition[Any]:
        said = self._said.get(definition.id)
        if said is None or (said.is_enabled and not said.is_paused):
            return definition
        about = replace(
            definition.about,
            enabled=definition.about.enabled and said.is_enabled,
            paused=said.is_paused,
            said=said.reason,
        )
        return replace(definition, about=about)


def _in_vain(verb: StandingVerb, saga_id: str) -> str:
    match verb:
        case "enable":
            return f"saga {saga_id!r} is not disabled"
        case "disable":
            return f"saga {saga_id!r} is disabled already"
        case "pause":
            return f"saga {saga_id!r} is paused already"
        case "resume":
            return f"saga {saga_id!r} is not paused"
