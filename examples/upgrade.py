"""A new version with live instances: orders that were begun when an amount was a number of euros end in a release where
it is a number of cents and a currency.

`python -m examples.upgrade` tells it in two acts. In the first the old release runs, with an order at each stage; then
it is gone, and the new one goes on with what it finds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from examples.telling import Act, Ending, Story, Teller, tell_as_script
from sagaloom import CascadedMessage, Saga, SagaContext, SagaMessage, define_saga, saga_complete, schedule, send

Effects = Sequence[CascadedMessage]


@dataclass(frozen=True)
class OrderPlaced:
    order_id: str
    euros: float


@dataclass(frozen=True)
class OrderPaid:
    order_id: str


@dataclass(frozen=True)
class Reminder:
    order_id: str


def order_id_of(message: SagaMessage[OrderPlaced | OrderPaid | Reminder]) -> str:
    return message.payload.order_id


# --- The old release -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OldOrder:
    status: str = "new"
    euros: float = 0.0


def placed_before(saga: Saga[OldOrder], event: SagaMessage[OrderPlaced], context: SagaContext[OldOrder]) -> Effects:
    saga.state = OldOrder("placed", event.payload.euros)
    return [schedule(Reminder(event.payload.order_id), "3d", name="reminder")]


def reminded_before(saga: Saga[OldOrder], event: SagaMessage[Reminder], context: SagaContext[OldOrder]) -> Effects:
    return [send("service:mail", {"please pay": saga.state.euros})]


def paid_before(saga: Saga[OldOrder], event: SagaMessage[OrderPaid], context: SagaContext[OldOrder]) -> Effects:
    saga.state = replace(saga.state, status="paid")
    return [saga_complete({"euros": saga.state.euros})]


version_1 = (
    define_saga("orders")
    .version(1)
    .state(OldOrder())
    .correlate(order_id_of)
    .on(OrderPlaced, placed_before)
    .on(Reminder, reminded_before, starts=False)
    .on(OrderPaid, paid_before, starts=False)
    .build()
)


# --- The new one -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Order:
    status: str = "new"
    cents: int = 0
    currency: str = "EUR"


def to_cents(state: Mapping[str, object]) -> dict[str, object]:
    """A migration gets the stored state as plain JSON, whatever its class was, and returns that of the next version."""
    return {"status": state["status"], "cents": round(float(str(state["euros"])) * 100), "currency": "EUR"}


def placed(saga: Saga[Order], event: SagaMessage[OrderPlaced], context: SagaContext[Order]) -> Effects:
    saga.state = Order("placed", round(event.payload.euros * 100))
    return [schedule(Reminder(event.payload.order_id), "3d", name="reminder")]


def reminded(saga: Saga[Order], event: SagaMessage[Reminder], context: SagaContext[Order]) -> Effects:
    return [send("service:mail", {"please pay": f"{saga.state.cents} {saga.state.currency} cents"})]


def paid(saga: Saga[Order], event: SagaMessage[OrderPaid], context: SagaContext[Order]) -> Effects:
    saga.state = replace(saga.state, status="paid")
    return [saga_complete({"cents": saga.state.cents, "currency": saga.state.currency})]


version_2 = (
    define_saga("orders")
    .version(2, migrate={1: to_cents})
    .state(Order())
    .correlate(order_id_of)
    .on(OrderPlaced, placed)
    .on(Reminder, reminded, starts=False)
    .on(OrderPaid, paid, starts=False)
    .build()
)


# --- The story -------------------------------------------------------------------------------------------------------


async def in_the_old_release(teller: Teller) -> None:
    await teller.publish(OrderPlaced("paid before", 12.5))
    await teller.publish(OrderPaid("paid before"))
    await teller.publish(OrderPlaced("paid after", 9.99))


async def a_day_later(teller: Teller) -> None:
    await teller.let_pass("1d")
    await teller.publish(OrderPlaced("still open", 20.0))


async def in_the_new_release(teller: Teller) -> None:
    await teller.publish(OrderPaid("paid after"))
    await teller.publish(OrderPlaced("placed after", 1.0))


async def time_passes(teller: Teller) -> None:
    await teller.let_pass("3d")


def holds(ending: Ending) -> bool:
    ends = {name.removeprefix("orders:"): one for name, one in ending.instances.items()}
    return (
        ends["paid before"]["result"] == {"euros": 12.5}
        and ends["paid after"]["result"] == {"cents": 999, "currency": "EUR"}
        and ending.outside
        == [
            'service:mail {"please pay": "100 EUR cents"}',
            'service:mail {"please pay": "2000 EUR cents"}',
        ]
    )


story = Story(
    name="upgrade",
    acts=[
        Act(sagas=[version_1], steps=[in_the_old_release, a_day_later]),
        Act(sagas=[version_2], steps=[in_the_new_release, time_passes]),
    ],
    holds=holds,
)

if __name__ == "__main__":
    tell_as_script(story)
