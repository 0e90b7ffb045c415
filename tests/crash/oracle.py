"""The oracle: how an order has to end, told from nothing but the messages it got, in the order of their acceptance.

It knows nothing of sagas, stores or processes. What the engine, any store and any number of deaths make of the same
messages must come out as this short fold says: which effects reach the outside, what was charged and refunded, and how
the order ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tests.crash.story import Order, tip_of

__all__ = ["Account", "balance", "fold"]

_SIGNS: Final[Mapping[str, int]] = {"charge": 1, "tip": 1, "refund": -1}


@dataclass
class Account:
    """What has to be true of an order in the end. `effects` are the amounts by step."""

    status: str = "not there"
    effects: dict[str, int] = field(default_factory=dict)


def fold(order: Order, accepted: Iterable[str]) -> Account:
    """Follows the message types that were accepted for `order`."""
    account = Account()
    for message_type in accepted:
        if account.status in ("completed", "failed"):
            continue  # What is over changes no more.
        match message_type, order.course.name:
            case "OrderPlaced", _:
                account.status = "running"
                account.effects["charge"] = order.amount
            case "PaymentCaptured", "raced":
                account.effects["tip"] = tip_of(order.amount)
            case "FulfillmentFailed", _:
                account.status = "failed"
                account.effects["refund"] = order.amount
            case "OrderShipped", name:
                account.status = "completed"
                account.effects |= {"timed": {"receipt": 0}, "parcel": {"label": 0}}.get(name, {})
    return account


def balance(amounts: Iterable[tuple[str, int]]) -> int:
    """Charges minus refunds, of (step, amount)."""
    return sum(_SIGNS.get(step, 0) * amount for step, amount in amounts)
