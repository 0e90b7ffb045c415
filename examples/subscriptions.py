"""A subscription, which lives by the clock: it must be confirmed within a day, is charged each month, and has a week to
pay when a card is declined.

Two sagas: one for each subscription, and one for all of them, which ticks on the first of the month and knows whom to
charge. `python -m examples.subscriptions` tells the first months of three: one pays, one is never confirmed, one has a
bad card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from examples.telling import Act, Ending, Story, Teller, tell_as_script
from sagaloom import (
    CascadedMessage,
    Saga,
    SagaContext,
    SagaMessage,
    cancel_scheduled,
    define_saga,
    saga_complete,
    saga_fail,
    schedule,
    send,
)
from sagaloom.targets import EffectRequest

Effects = Sequence[CascadedMessage]


@dataclass(frozen=True)
class Subscribed:
    subscription: str


@dataclass(frozen=True)
class Confirmed:
    subscription: str


@dataclass(frozen=True)
class Charge:
    subscription: str
    month: str


@dataclass(frozen=True)
class Paid:
    subscription: str
    month: str


@dataclass(frozen=True)
class Declined:
    subscription: str
    month: str


@dataclass(frozen=True)
class GraceOver:
    subscription: str


@dataclass(frozen=True)
class Unsubscribed:
    subscription: str


@dataclass(frozen=True)
class NotConfirmed:
    pass


# --- One subscription ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subscription:
    status: str = "new"
    paid: tuple[str, ...] = ()


Context = SagaContext[Subscription]


def subscribed(saga: Saga[Subscription], event: SagaMessage[Subscribed], context: Context) -> Effects:
    saga.state = Subscription("unconfirmed")
    return [send("service:mail", {"please confirm": event.payload.subscription})]


def confirmed(saga: Saga[Subscription], event: SagaMessage[Confirmed], context: Context) -> Effects:
    saga.state = replace(saga.state, status="active")
    return [cancel_scheduled("timeout"), send("Joined", {"subscription": event.payload.subscription})]


def not_confirmed(saga: Saga[Subscription], event: SagaMessage[NotConfirmed], context: Context) -> Effects:
    saga.state = replace(saga.state, status="never confirmed")
    return [saga_fail("not confirmed within a day")]


def charge(saga: Saga[Subscription], event: SagaMessage[Charge], context: Context) -> Effects:
    return [send("service:payments", {"charge": event.payload.subscription, "month": event.payload.month})]


def paid(saga: Saga[Subscription], event: SagaMessage[Paid], context: Context) -> Effects:
    saga.state = replace(saga.state, status="active", paid=(*saga.state.paid, event.payload.month))
    return [cancel_scheduled("grace")]


def declined(saga: Saga[Subscription], event: SagaMessage[Declined], context: Context) -> Effects:
    saga.state = replace(saga.state, status="in arrears")
    # A second one under this name replaces the first: the week begins with the last bad month.
    return [
        schedule(GraceOver(event.payload.subscription), "7d", name="grace"),
        send("service:mail", {"please pay": event.payload.subscription, "month": event.payload.month}),
    ]


def grace_over(saga: Saga[Subscription], event: SagaMessage[GraceOver], context: Context) -> Effects:
    saga.state = replace(saga.state, status="ended unpaid")
    return [send("Left", {"subscription": event.payload.subscription}), saga_fail("not paid within a week")]


def unsubscribed(saga: Saga[Subscription], event: SagaMessage[Unsubscribed], context: Context) -> Effects:
    saga.state = replace(saga.state, status="ended")
    return [send("Left", {"subscription": event.payload.subscription}), saga_complete({"paid": saga.state.paid})]


def subscription_of(
    message: SagaMessage[Subscribed | Confirmed | Charge | Paid | Declined | GraceOver | Unsubscribed],
) -> str:
    return message.payload.subscription


subscriptions = (
    define_saga("subscriptions")
    .state(Subscription())
    .correlate(subscription_of)
    .on(Subscribed, subscribed)
    .on(Confirmed, confirmed, starts=False)
    .on(NotConfirmed, not_confirmed, starts=False)
    .during("active", Charge, charge, on_unexpected="ignore", on_missing="discard")
    .during("in arrears", Charge, charge, on_unexpected="ignore", on_missing="discard")
    .on(Paid, paid, starts=False)
    .on(Declined, declined, starts=False)
    .on(GraceOver, grace_over, starts=False)
    .on(Unsubscribed, unsubscribed, starts=False)
    .timeout("1d", message=NotConfirmed())  # it comes back to the run that it is of, so it needs no key
    .build()
)


# --- All of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Members:
    subscriptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Joined:
    subscription: str


@dataclass(frozen=True)
class Left:
    subscription: str


@dataclass(frozen=True)
class FirstOfTheMonth:
    scheduledFor: str  # noqa: N815 - a tick brings it under this name


def joined(saga: Saga[Members], event: SagaMessage[Joined], context: SagaContext[Members]) -> Effects:
    saga.state = Members((*saga.state.subscriptions, event.payload.subscription))
    return []


def left(saga: Saga[Members], event: SagaMessage[Left], context: SagaContext[Members]) -> Effects:
    saga.state = Members(tuple(one for one in saga.state.subscriptions if one != event.payload.subscription))
    return []


def bill(saga: Saga[Members], event: SagaMessage[FirstOfTheMonth], context: SagaContext[Members]) -> Effects:
    month = event.payload.scheduledFor[:7]
    return [send("Charge", {"subscription": one, "month": month}) for one in saga.state.subscriptions]


billing = (
    define_saga("billing")
    .state(Members())
    .singleton()
    .correlate(lambda message: "everybody")
    .on(Joined, joined)
    .on(Left, left)
    .on(FirstOfTheMonth, bill)
    .schedule("0 6 1 * *", message="FirstOfTheMonth", timezone="Europe/Berlin", catch_up="all")
    .build()
)


# --- The story -------------------------------------------------------------------------------------------------------


def answer(request: EffectRequest) -> object:
    """The card of s-3 is always declined."""
    match request.payload:
        case {"charge": "s-3", "month": month}:
            return Declined("s-3", month)
        case {"charge": subscription, "month": month}:
            return Paid(subscription, month)
        case _:
            return None


async def subscribe(teller: Teller) -> None:
    for subscription in ("s-1", "s-2", "s-3"):
        await teller.publish(Subscribed(subscription))
    await teller.publish(Confirmed("s-1"))
    await teller.publish(Confirmed("s-3"))


async def two_days_later(teller: Teller) -> None:
    await teller.let_pass("2d")


async def two_months_later(teller: Teller) -> None:
    for _ in range(8):
        await teller.let_pass("8d")


async def leave(teller: Teller) -> None:
    await teller.publish(Unsubscribed("s-1"))
    await teller.let_pass("40d")


def holds(ending: Ending) -> bool:
    states = {number: ending.instances[f"subscriptions:s-{number}"] for number in (1, 2, 3)}
    return (
        [states[number]["status"] for number in (1, 2, 3)] == ["completed", "failed", "failed"]
        and states[1]["state"]["paid"] == ["2026-01", "2026-02", "2026-03"]
        and states[2]["reason"] == "not confirmed within a day"
        and states[3]["reason"] == "not paid within a week"
        and ending.instances["billing:everybody"]["state"]["subscriptions"] == []
    )


story = Story(
    name="subscriptions",
    acts=[Act(sagas=[subscriptions, billing], steps=[subscribe, two_days_later, two_months_later, leave])],
    answer=answer,
    holds=holds,
)

if __name__ == "__main__":
    tell_as_script(story)
