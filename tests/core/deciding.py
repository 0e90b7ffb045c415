"""Hands for the tests of the core: one message in, one Decision out, and no world around it."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from sagaloom import CascadedMessage, SagaContext, SagaMessage, define_saga
from sagaloom.definitions import Saga, SagaDefinition
from sagaloom.engine.decide import DecideContext, decide
from sagaloom.engine.limits import Limits
from sagaloom.engine.records import Decision, Envelope, Head, Instance, Outgoing

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)

Slot = Saga[Any]
Event = SagaMessage[Any]
Context = SagaContext[Any]
Effects = list[CascadedMessage]


def nothing(saga: Slot, event: Event, context: Context) -> Effects:
    return []


def returning(*effects: object) -> Any:
    """A handler that returns these effects, whatever comes."""
    return lambda saga, event, context: list(effects)


def raising(error: BaseException) -> Any:
    """A handler that raises this error, whatever comes."""

    def handler(saga: Slot, event: Event, context: Context) -> Effects:
        raise error

    return handler


def saga_with(handler: Any, *, compensation: Any = None, saga_id: str = "s") -> SagaDefinition[Any]:
    """A saga that starts on `Begin`, and does with `Go` what the handler says."""
    stage = define_saga(saga_id).state({}).on("Begin", nothing).on("Go", handler)
    if compensation is not None:
        stage = stage.compensate("Go", compensation)
    return stage.build()


def envelope(
    message_type: str, payload: object = None, *, saga_id: str = "s", key: str = "k", **fields: Any
) -> Envelope:
    """A message that was addressed already."""
    fields.setdefault("id", f"id-of-{message_type}")
    encoded = payload if isinstance(payload, bytes) else msgspec.json.encode({} if payload is None else payload)
    return Envelope(saga_id=saga_id, key=key, type=message_type, payload=encoded, accepted_at=NOW, **fields)


def head(saga_id: str = "s", key: str = "k", *, run: int = 0) -> Head:
    return Head(saga_id, key, pk=7, part=3, run=run, created_at=NOW)


def decided(
    definition: SagaDefinition[Any],
    message: Envelope,
    instance: Instance | None = None,
    *,
    now: datetime = NOW,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    run: int | None = None,
) -> Decision:
    """What `decide` says, for a key whose newest run is `instance`."""
    newest = run if run is not None else (instance.run if instance is not None else 0)
    context = DecideContext(now, head(message.saga_id, message.key, run=newest), limits)
    return decide(definition, instance, message, context)


def begun(definition: SagaDefinition[Any], payload: object = None, **fields: Any) -> Instance:
    """A live instance, started by `Begin`."""
    decision = decided(definition, envelope("Begin", payload, saga_id=definition.id, **fields))
    assert decision.instance is not None, decision
    return decision.instance


def gone(
    definition: SagaDefinition[Any],
    *,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    payload: object = None,
) -> Decision:
    """What `Go` does to an instance that was begun."""
    return decided(definition, envelope("Go", payload, saga_id=definition.id), begun(definition), limits=limits)


def state_of(decision: Decision) -> Any:
    assert decision.instance is not None, decision
    return msgspec.json.decode(decision.instance.state)


def refusal(decision: Decision) -> str:
    """Why the message is a dead letter."""
    assert decision.dead_letter is not None, decision
    return decision.dead_letter.reason


def sent(decision: Decision) -> Outgoing:
    (outgoing,) = decision.outgoing
    return outgoing


def kinds(decision: Decision) -> list[str]:
    return [event.type for event in decision.events]


@dataclass
class Story:
    """One key of one saga, taking one message after the other."""

    definition: SagaDefinition[Any]
    key: str = "k"
    instance: Instance | None = None
    decisions: list[Decision] = field(default_factory=list)

    def takes(self, message_type: str, payload: object = None, **fields: Any) -> Decision:
        fields.setdefault("id", f"m{len(self.decisions) + 1}")
        message = envelope(message_type, payload, saga_id=self.definition.id, key=self.key, **fields)
        decision = decided(self.definition, message, self.instance)
        self.decisions.append(decision)
        if decision.instance is not None:
            self.instance = decision.instance
        return decision
