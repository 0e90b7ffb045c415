"""The fluent way to write a saga, in three frozen stages that each offer only what is legal.

    define_saga(id) -> SagaDraft            settings, .state
                       SagaWithState[S]     settings, handlers
                       SagaWithHandlers[S]  settings, handlers, .build

Every call returns a new stage and leaves the old one as it was, so that a common beginning can be shared. A rule that
is broken is broken at the call that breaks it, with a `DefinitionError` that names the value, the saga and the way out;
a type checker sees the same rules, because the methods that would be illegal are not there.

`notes` is what a stage has been told and passes on. `settings` has the methods of every stage, `stages` those that make
one differ from the next. What they check is in `rules` for a single value, in `bindings` for a message type and its
handler, and in `whole` for what only `.build()` can see.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from sagaloom.builder.notes import Notes
from sagaloom.builder.stages import SagaDraft, SagaWithHandlers, SagaWithState
from sagaloom.errors import DefinitionError
from sagaloom.ids import check_saga_id
from sagaloom.messages import RESERVED_PREFIX

__all__ = ["SagaBuilder", "SagaDraft", "SagaWithHandlers", "SagaWithState", "define_saga"]

SagaBuilder: TypeAlias = SagaDraft | SagaWithState[Any] | SagaWithHandlers[Any]
"""Any stage of a saga that is being written."""


def define_saga(id: str) -> SagaDraft:
    """Begins a saga. Its id names it in the store and in every instance id, so it stays the same for life.

    >>> from sagaloom import define_saga, saga_complete
    >>> def placed(saga, event, context):
    ...     saga.state = {**saga.state, "status": "done"}
    ...     return [saga_complete({"orderId": event.payload["orderId"]})]
    >>> order = define_saga("order").state({"status": "new"}).on("OrderPlaced", placed).build()
    >>> order.id, order.durability
    ('order', 't1')
    """
    checked = check_saga_id(id)
    if f"{checked}:" == RESERVED_PREFIX:
        # Its end would reach a parent as `saga:completed`, which no saga may handle.
        raise DefinitionError(f"saga id {checked!r} is reserved for the engine's own messages: use another name")
    return SagaDraft(Notes(id=checked))
