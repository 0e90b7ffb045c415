"""An approval: people speak to it by name. A signal reminds, a query asks how it stands, and an update is answered: by
what it did, or by why not.

`python -m examples.approvals` tells of one expense that two people have to approve.
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
    answer,
    define_query,
    define_saga,
    define_signal,
    saga_complete,
    send,
)
from sagaloom.errors import UpdateRefused

Effects = Sequence[CascadedMessage]
NEEDED = 2


@dataclass(frozen=True)
class Approval:
    status: str = "new"
    asks: str = ""
    cents: int = 0
    by: tuple[str, ...] = ()
    reminders: int = 0


@dataclass(frozen=True)
class ApprovalAsked:
    expense: str
    asks: str
    cents: int


@dataclass(frozen=True)
class Approver:
    name: str


remind = define_signal("remind")
approve = define_signal("approve", Approver)
missing = define_query("missing", int)
Context = SagaContext[Approval]


def asked(saga: Saga[Approval], event: SagaMessage[ApprovalAsked], context: Context) -> Effects:
    saga.state = Approval("waiting", event.payload.asks, event.payload.cents)
    return [send("service:mail", {"please approve": event.payload.expense})]


def reminded(saga: Saga[Approval], event: SagaMessage[object], context: Context) -> Effects:
    saga.state = replace(saga.state, reminders=saga.state.reminders + 1)
    return [send("service:mail", {"please do approve": context.correlation_key, "number": saga.state.reminders})]


def approved(saga: Saga[Approval], event: SagaMessage[Approver], context: Context) -> Effects:
    """Raising refuses: nothing is changed, and the caller hears why."""
    name = event.payload.name
    if name == saga.state.asks:
        raise UpdateRefused(f"{name} cannot approve what {name} asks for", code="OWN_EXPENSE")
    if name in saga.state.by:
        raise UpdateRefused(f"{name} has approved already", code="APPROVED_ALREADY")
    by = (*saga.state.by, name)
    if len(by) < NEEDED:
        saga.state = replace(saga.state, by=by)
        return [answer({"missing": NEEDED - len(by)})]
    saga.state = replace(saga.state, by=by, status="approved")
    return [
        answer({"missing": 0}),
        send("service:payments", {"pay": saga.state.cents, "to": saga.state.asks}),
        saga_complete({"approved by": by}),
    ]


def how_many_are_missing(state: Approval) -> int:
    return NEEDED - len(state.by)


def expense_of(message: SagaMessage[ApprovalAsked]) -> str:
    return message.payload.expense


approvals = (
    define_saga("approvals")
    .state(Approval())
    .correlate(expense_of)
    .on(ApprovalAsked, asked)
    .on_signal(remind, reminded)
    .on_update(approve, approved)
    .on_query(missing, how_many_are_missing)
    .build()
)


# --- The story -------------------------------------------------------------------------------------------------------


async def refused(teller: Teller, name: str) -> str:
    """Why an approval was refused."""
    try:
        await teller.update(approvals.id, "e-1", approve, Approver(name))
    except UpdateRefused as why:
        return why.code
    raise AssertionError(f"{name} has approved")


async def ask(teller: Teller) -> None:
    await teller.publish(ApprovalAsked("e-1", "ada", 12_900))
    assert await teller.runtime.query(approvals.id, "e-1", missing) == NEEDED


async def nobody_answers(teller: Teller) -> None:
    await teller.signal(approvals.id, "e-1", remind)
    await teller.signal(approvals.id, "e-1", remind)


async def the_wrong_ones_answer(teller: Teller) -> None:
    assert await refused(teller, "ada") == "OWN_EXPENSE"
    assert await teller.update(approvals.id, "e-1", approve, Approver("bob")) == {"missing": 1}
    assert await refused(teller, "bob") == "APPROVED_ALREADY"


async def the_last_one_answers(teller: Teller) -> None:
    assert await teller.update(approvals.id, "e-1", approve, Approver("cyd")) == {"missing": 0}
    assert await teller.runtime.query(approvals.id, "e-1", missing) == 0


def holds(ending: Ending) -> bool:
    one = ending.instances["approvals:e-1"]
    return (
        one["status"] == "completed"
        and one["result"] == {"approved by": ["bob", "cyd"]}
        and one["state"]["reminders"] == 2
        and sum("pay" in asked for asked in ending.outside) == 1
    )


story = Story(
    name="approvals",
    acts=[Act(sagas=[approvals], steps=[ask, nobody_answers, the_wrong_ones_answer, the_last_one_answers])],
    holds=holds,
)

if __name__ == "__main__":
    tell_as_script(story)
