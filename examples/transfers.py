"""A bank transfer whose sum never changes: accounts are sagas, and a transfer is a saga between them.

Money leaves one account before it reaches the other. Between the two it is in the state of the transfer; and when the
other account takes nothing, it goes back. `python -m examples.transfers` tells of four transfers: two arrive, one asks
for more than there is, and one finds a closed account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from examples.telling import Act, Ending, Story, Teller, tell_as_script
from sagaloom import CascadedMessage, Saga, SagaContext, SagaMessage, define_saga, saga_complete, saga_fail, send

Effects = Sequence[CascadedMessage]


# --- Accounts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Account:
    cents: int = 0
    is_closed: bool = False


@dataclass(frozen=True)
class AccountOpened:
    account: str
    cents: int


@dataclass(frozen=True)
class AccountClosed:
    account: str


@dataclass(frozen=True)
class Withdraw:
    account: str
    cents: int
    transfer: str


@dataclass(frozen=True)
class Deposit:
    account: str
    cents: int
    transfer: str


def opened(saga: Saga[Account], event: SagaMessage[AccountOpened], context: SagaContext[Account]) -> Effects:
    saga.state = Account(event.payload.cents)
    return []


def closed(saga: Saga[Account], event: SagaMessage[AccountClosed], context: SagaContext[Account]) -> Effects:
    saga.state = replace(saga.state, is_closed=True)
    return []


def withdraw(saga: Saga[Account], event: SagaMessage[Withdraw], context: SagaContext[Account]) -> Effects:
    asked = event.payload
    if saga.state.cents < asked.cents:
        return [send("Refused", {"transfer": asked.transfer, "why": f"{asked.account} has {saga.state.cents} cents"})]
    saga.state = replace(saga.state, cents=saga.state.cents - asked.cents)
    return [send("Withdrawn", {"transfer": asked.transfer})]


def deposit(saga: Saga[Account], event: SagaMessage[Deposit], context: SagaContext[Account]) -> Effects:
    given = event.payload
    # What goes back to where it came from is taken by a closed account, too.
    if saga.state.is_closed and not given.transfer.startswith("back:"):
        return [send("Returned", {"transfer": given.transfer, "why": f"{given.account} is closed"})]
    saga.state = replace(saga.state, cents=saga.state.cents + given.cents)
    return [send("Deposited", {"transfer": given.transfer.removeprefix("back:")})]


def account_of(message: SagaMessage[AccountOpened | AccountClosed | Withdraw | Deposit]) -> str:
    return message.payload.account


accounts = (
    define_saga("accounts")
    .state(Account())
    .correlate(account_of)
    .on(AccountOpened, opened)
    .on(AccountClosed, closed, starts=False)
    .on(Withdraw, withdraw, starts=False)
    .on(Deposit, deposit, starts=False)
    .invariant("no account is overdrawn", lambda account: account.cents >= 0)
    .build()
)


# --- Transfers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    status: str = "new"
    source: str = ""
    target: str = ""
    cents: int = 0
    why: str = ""


@dataclass(frozen=True)
class TransferOrdered:
    transfer: str
    source: str
    target: str
    cents: int


@dataclass(frozen=True)
class Withdrawn:
    transfer: str


@dataclass(frozen=True)
class Deposited:
    transfer: str


@dataclass(frozen=True)
class Refused:
    transfer: str
    why: str


@dataclass(frozen=True)
class Returned:
    transfer: str
    why: str


def ordered(saga: Saga[Transfer], event: SagaMessage[TransferOrdered], context: SagaContext[Transfer]) -> Effects:
    order = event.payload
    saga.state = Transfer("withdrawing", order.source, order.target, order.cents)
    return [send("Withdraw", {"account": order.source, "cents": order.cents, "transfer": order.transfer})]


def withdrawn(saga: Saga[Transfer], event: SagaMessage[Withdrawn], context: SagaContext[Transfer]) -> Effects:
    state = saga.state
    saga.state = replace(state, status="depositing")
    return [send("Deposit", {"account": state.target, "cents": state.cents, "transfer": event.payload.transfer})]


def refused(saga: Saga[Transfer], event: SagaMessage[Refused], context: SagaContext[Transfer]) -> Effects:
    saga.state = replace(saga.state, status="refused")
    return [saga_fail(event.payload.why)]


def returned(saga: Saga[Transfer], event: SagaMessage[Returned], context: SagaContext[Transfer]) -> Effects:
    state = saga.state
    saga.state = replace(state, status="going back", why=event.payload.why)
    back = {"account": state.source, "cents": state.cents, "transfer": f"back:{event.payload.transfer}"}
    return [send("Deposit", back)]


def deposited(saga: Saga[Transfer], event: SagaMessage[Deposited], context: SagaContext[Transfer]) -> Effects:
    if saga.state.status == "going back":
        saga.state = replace(saga.state, status="gone back")
        return [saga_fail(saga.state.why)]
    saga.state = replace(saga.state, status="arrived")
    return [saga_complete({"cents": saga.state.cents})]


def transfer_of(message: SagaMessage[TransferOrdered | Withdrawn | Deposited | Refused | Returned]) -> str:
    return message.payload.transfer


transfers = (
    define_saga("transfers")
    .state(Transfer())
    .correlate(transfer_of)
    .on(TransferOrdered, ordered)
    .on(Withdrawn, withdrawn, starts=False)
    .on(Deposited, deposited, starts=False)
    .on(Refused, refused, starts=False)
    .on(Returned, returned, starts=False)
    .build()
)


# --- The story -------------------------------------------------------------------------------------------------------


async def open_accounts(teller: Teller) -> None:
    await teller.publish(AccountOpened("ada", 10_000))
    await teller.publish(AccountOpened("bob", 5_000))
    await teller.publish(AccountOpened("cyd", 0))
    await teller.publish(AccountClosed("cyd"))


async def order_transfers(teller: Teller) -> None:
    await teller.publish(TransferOrdered("t-1", "ada", "bob", 2_500))
    await teller.publish(TransferOrdered("t-2", "bob", "ada", 7_500))
    await teller.publish(TransferOrdered("t-3", "bob", "ada", 1))
    await teller.publish(TransferOrdered("t-4", "ada", "cyd", 4_000))


def holds(ending: Ending) -> bool:
    money = sum(one["state"]["cents"] for name, one in ending.instances.items() if name.startswith("accounts:"))
    ends = [ending.instances[f"transfers:t-{number}"]["status"] for number in (1, 2, 3, 4)]
    return money == 15_000 and ends == ["completed", "completed", "failed", "failed"]


story = Story(
    name="transfers", acts=[Act(sagas=[accounts, transfers], steps=[open_accounts, order_transfers])], holds=holds
)

if __name__ == "__main__":
    tell_as_script(story)
