"""Queries: reads of one instance that change nothing.

A query sees the state of the newest committed revision, decoded for it alone, and says something about it. It takes no
turn in the inbox, so it never waits for a message, and it works on a run that is paused or over. That it is pure is
checked: the state it was given is encoded again afterwards, and one that has changed is an error, like an answer that
is a coroutine, or no value of the declared type. Nothing that a query does to its copy is ever stored.
"""

from __future__ import annotations

from typing import Any

from sagaloom.definitions import QueryBinding, SagaDefinition
from sagaloom.engine.migrating import MadeByNewer, readable_state
from sagaloom.engine.records import Instance
from sagaloom.engine.retrying import USER_ERRORS, describe, has_to_be_awaited
from sagaloom.errors import BackendUnavailable, QueryFailed, QueryNotFound, SagasError
from sagaloom.ids import instance_id

__all__ = ["answer_query"]


def answer_query(definition: SagaDefinition[Any], instance: Instance, name: str) -> tuple[Any, bytes]:
    """What the query says about `instance`, as a value that is nobody else's and as JSON. Raises `QueryNotFound`,
    `QueryFailed`, and `BackendUnavailable` for a state that a newer version of the definition wrote."""
    query = definition.queries.get(name)
    if query is None:
        raise QueryNotFound(
            f"saga {definition.id!r} has no query {name!r:.80}: it has {', '.join(definition.queries) or 'none'}",
            data={"sagaId": definition.id, "query": name},
        )
    where = f"saga {definition.id!r}: query {name!r} of {instance_id(definition.id, instance.key, instance.run)!r}"
    state, before = _state(definition, instance, where)
    try:
        returned: object = query.handler(state)
    except USER_ERRORS as error:
        raise QueryFailed(f"{where} raised {describe(error)}") from error
    _refuse_awaitable(where, returned)
    try:
        after = definition.state_codec.encode(state)
    except SagasError as error:
        raise _mutated(where) from error
    if after != before:
        raise _mutated(where)
    return _read(query, where, returned)


def _state(definition: SagaDefinition[Any], instance: Instance, where: str) -> tuple[Any, bytes]:
    """The state, and what it is encoded as."""
    codec = definition.state_codec
    try:
        state = codec.decode(readable_state(definition, instance))
        # Not the stored bytes: those may have been written by an older version, with other defaults.
        return state, codec.encode(state)
    except MadeByNewer as newer:
        raise BackendUnavailable(f"{where}: {newer}", code="SAGA_NOT_LOADED") from newer
    except SagasError as error:
        raise QueryFailed(
            f"{where}: the stored state cannot be read: {error.message}", code="SAGA_STATE_UNREADABLE"
        ) from error


def _refuse_awaitable(where: str, returned: object) -> None:
    if has_to_be_awaited(returned):
        raise QueryFailed(
            f"{where} returned {type(returned).__name__}, which has to be awaited: a query reads what is there, and "
            "waits for nothing",
            code="SAGA_QUERY_ASYNC",
        )


def _mutated(where: str) -> QueryFailed:
    return QueryFailed(
        f"{where} has changed the state that it was given to read; nothing of that is kept: build what it answers from "
        "new values, and change the state in the handler of a message or signal",
        code="SAGA_QUERY_MUTATED",
    )


def _read(query: QueryBinding, where: str, returned: object) -> tuple[Any, bytes]:
    try:
        encoded = query.codec.encode(returned)
        return query.codec.decode(encoded), encoded
    except SagasError as error:
        raise QueryFailed(f"{where} gave no answer that can be sent: {error.message}") from error
