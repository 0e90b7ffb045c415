"""A parent with a hundred children: a campaign that writes a letter to each of a hundred people, and is over when each
letter has found its end.

The children are spawned in the one commit that starts the campaign, and their ends come back to it, whatever they are.
`python -m examples.campaigns` tells of one campaign; every tenth address does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from examples.telling import Act, Ending, Story, Teller, tell_as_script
from sagaloom import CascadedMessage, Saga, SagaContext, SagaMessage, define_saga, saga_complete, saga_fail, send, spawn
from sagaloom.targets import EffectRequest

Effects = Sequence[CascadedMessage]
PEOPLE = 100


# --- A letter --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Letter:
    status: str = "new"


@dataclass(frozen=True)
class WriteTo:
    person: int


@dataclass(frozen=True)
class Delivered:
    person: int


@dataclass(frozen=True)
class Undeliverable:
    person: int


def write(saga: Saga[Letter], event: SagaMessage[WriteTo], context: SagaContext[Letter]) -> Effects:
    saga.state = Letter("written")
    return [send("service:post", {"letter to": event.payload.person})]


def delivered(saga: Saga[Letter], event: SagaMessage[Delivered], context: SagaContext[Letter]) -> Effects:
    saga.state = Letter("delivered")
    return [saga_complete()]


def undeliverable(saga: Saga[Letter], event: SagaMessage[Undeliverable], context: SagaContext[Letter]) -> Effects:
    saga.state = Letter("came back")
    return [saga_fail(f"there is no person {event.payload.person}")]


def person_of(message: SagaMessage[WriteTo | Delivered | Undeliverable]) -> str:
    return str(message.payload.person)


letters = (
    define_saga("letters")
    .concurrency(20, on_limit="wait")  # the post takes twenty at a time
    .state(Letter())
    .correlate(person_of)
    .concurrency(20, on_limit="wait")  # of those that have to be tried again, not more than so many at once
    .on(WriteTo, write)
    .on(Delivered, delivered, starts=False)
    .on(Undeliverable, undeliverable, starts=False)
    .build()
)


# --- The campaign ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Campaign:
    status: str = "new"
    arrived: int = 0
    came_back: int = 0


@dataclass(frozen=True)
class CampaignStarted:
    campaign: str


def started(saga: Saga[Campaign], event: SagaMessage[CampaignStarted], context: SagaContext[Campaign]) -> Effects:
    saga.state = Campaign("running")
    return [spawn(letters, WriteTo(person)) for person in range(PEOPLE)]


def one_arrived(saga: Saga[Campaign], event: SagaMessage[Any], context: SagaContext[Campaign]) -> Effects:
    saga.state = replace(saga.state, arrived=saga.state.arrived + 1)
    return over_if_all_are(saga)


def one_came_back(saga: Saga[Campaign], event: SagaMessage[Any], context: SagaContext[Campaign]) -> Effects:
    saga.state = replace(saga.state, came_back=saga.state.came_back + 1)
    return over_if_all_are(saga)


def over_if_all_are(saga: Saga[Campaign]) -> Effects:
    if saga.state.arrived + saga.state.came_back < PEOPLE:
        return []
    saga.state = replace(saga.state, status="over")
    return [saga_complete({"arrived": saga.state.arrived, "came back": saga.state.came_back})]


campaigns = (
    define_saga("campaigns")
    .state(Campaign())
    .correlate(CampaignStarted, lambda message: message.payload.campaign)
    .on(CampaignStarted, started)
    .on("letters:completed", one_arrived, starts=False)
    .on("letters:failed", one_came_back, starts=False)
    .build()
)


# --- The story -------------------------------------------------------------------------------------------------------


def answer(request: EffectRequest) -> object:
    person = request.payload["letter to"]
    return Undeliverable(person) if person % 10 == 0 else Delivered(person)


async def start(teller: Teller) -> None:
    await teller.publish(CampaignStarted("spring"))


def holds(ending: Ending) -> bool:
    spring = ending.instances["campaigns:spring"]
    return (
        len(ending.instances) == PEOPLE + 1
        and spring["status"] == "completed"
        and spring["result"] == {"arrived": 90, "came back": 10}
        and len(ending.outside) == PEOPLE
    )


story = Story(name="campaigns", acts=[Act(sagas=[campaigns, letters], steps=[start])], answer=answer, holds=holds)

if __name__ == "__main__":
    tell_as_script(story)
