"""Scatter and gather: three insurers are asked for a quote at once, and when all have answered, in whatever order, the
cheapest one gets the contract.

`python -m examples.quotes` tells of two requests. The first is answered by all, and asked again when it is over; for
the second one insurer stays silent, and a timeout takes what is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from examples.telling import Act, Ending, Story, Teller, tell_as_script
from sagaloom import (
    CascadedMessage,
    Gathered,
    Saga,
    SagaContext,
    SagaMessage,
    define_saga,
    saga_complete,
    saga_fail,
    send,
)
from sagaloom.targets import EffectRequest

Effects = Sequence[CascadedMessage]
INSURERS = ("acme", "best", "cosy")


@dataclass(frozen=True)
class Request:
    status: str = "new"
    quotes: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True)
class QuotesAsked:
    request: str


@dataclass(frozen=True)
class AcmeQuoted:
    request: str
    cents: int


@dataclass(frozen=True)
class BestQuoted:
    request: str
    cents: int


@dataclass(frozen=True)
class CosyQuoted:
    request: str
    cents: int


@dataclass(frozen=True)
class TimeIsUp:
    pass


Quoted = AcmeQuoted | BestQuoted | CosyQuoted
Context = SagaContext[Request]


def asked(saga: Saga[Request], event: SagaMessage[QuotesAsked], context: Context) -> Effects:
    saga.state = Request("waiting")
    return [send(f"service:{insurer}", {"quote for": event.payload.request}) for insurer in INSURERS]


def quoted(saga: Saga[Request], event: SagaMessage[Quoted], context: Context) -> Effects:
    """Each answer is noted when it comes, so that a timeout has something to choose from."""
    insurer = event.type.removesuffix("Quoted").lower()
    saga.state = replace(saga.state, quotes=tuple(sorted((*saga.state.quotes, (event.payload.cents, insurer)))))
    return []


def all_quoted(saga: Saga[Request], event: SagaMessage[Gathered], context: Context) -> Effects:
    """Called once, behind the handler of the last one. `event.payload[AcmeQuoted]` would be what acme said."""
    return contract(saga)


def time_is_up(saga: Saga[Request], event: SagaMessage[TimeIsUp], context: Context) -> Effects:
    if not saga.state.quotes:
        return [saga_fail("nobody has answered")]
    return contract(saga)


def contract(saga: Saga[Request]) -> Effects:
    cents, insurer = min(saga.state.quotes)
    saga.state = replace(saga.state, status="contracted")
    return [send("service:contracts", {"with": insurer, "cents": cents}), saga_complete({"insurer": insurer})]


def request_of(message: SagaMessage[QuotesAsked | AcmeQuoted | BestQuoted | CosyQuoted]) -> str:
    return message.payload.request


quotes = (
    define_saga("quotes")
    .reuse("new_run")  # whoever asks again gets another run
    .state(Request())
    .correlate(request_of)
    .on(QuotesAsked, asked)
    .on(AcmeQuoted, quoted, starts=False)
    .on(BestQuoted, quoted, starts=False)
    .on(CosyQuoted, quoted, starts=False)
    .when_all([AcmeQuoted, BestQuoted, CosyQuoted], all_quoted)
    .on(TimeIsUp, time_is_up, starts=False)
    .timeout("2d", message=TimeIsUp())
    .build()
)


# --- The story -------------------------------------------------------------------------------------------------------


def answer(request: EffectRequest) -> object:
    """Cosy is the cheapest, and has no answer for q-2."""
    match request.target_id, request.payload:
        case "acme", {"quote for": name}:
            return AcmeQuoted(name, 900)
        case "best", {"quote for": name}:
            return BestQuoted(name, 800)
        case "cosy", {"quote for": "q-1"}:
            return CosyQuoted("q-1", 700)
        case _:
            return None


async def ask_twice(teller: Teller) -> None:
    await teller.publish(QuotesAsked("q-1"))
    await teller.publish(QuotesAsked("q-2"))


async def ask_again(teller: Teller) -> None:
    await teller.publish(QuotesAsked("q-1"))


async def time_passes(teller: Teller) -> None:
    await teller.let_pass("3d")


def holds(ending: Ending) -> bool:
    results = [ending.instances[f"quotes:{name}"]["result"] for name in ("q-1", "q-1 run 2", "q-2")]
    contracts = sum("with" in each for each in ending.outside)
    return results == [{"insurer": "cosy"}, {"insurer": "cosy"}, {"insurer": "best"}] and contracts == 3


story = Story(
    name="quotes", acts=[Act(sagas=[quotes], steps=[ask_twice, ask_again, time_passes])], answer=answer, holds=holds
)

if __name__ == "__main__":
    tell_as_script(story)
