"""What a handler is bound to: a message type, the codec of its payload, and what is said of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, get_args

from sagaloom.builder.notes import Notes
from sagaloom.builder.rules import checked_length, one_of
from sagaloom.codec import Codec, codec_for, is_declared_class
from sagaloom.definitions import ANY_TYPE, HandlerBinding, JoinBinding, OnMissing
from sagaloom.errors import DefinitionError, SagasError
from sagaloom.messages import RESERVED_PREFIX, message_type_of


def wire_type(notes: Notes, message: object, what: str) -> str:
    """The wire type that a message class or a string stands for."""
    if isinstance(message, type):
        if not is_declared_class(message):
            raise DefinitionError(
                f"{notes.where}: {message.__qualname__} is no message class: use a dataclass, TypedDict, "
                "msgspec.Struct, attrs class or pydantic model, or give the wire type as a string"
            )
        try:
            message = message_type_of(message)
        except SagasError as error:
            raise DefinitionError(f"{notes.where}: {error.message}") from error
    if not isinstance(message, str) or not message.strip():
        raise DefinitionError(
            f"Saga {what} type must not be empty. {notes.where}: give the message class or its wire type, such as "
            f"'OrderPlaced'; got {message!r:.80}."
        )
    if message != message.strip() or not message.isprintable():
        raise DefinitionError(
            f"{notes.where}: {what} type {message!r:.80} has blanks around it or unprintable characters in it, so no "
            "message would match: remove them"
        )
    if message == ANY_TYPE and what != "correlation":
        raise DefinitionError(f"{notes.where}: {what} type '*' is reserved: register a handler for each type")
    if message.startswith(RESERVED_PREFIX):
        raise DefinitionError(
            f"{notes.where}: {what} type {message!r:.80} is reserved: types that begin with {RESERVED_PREFIX!r} belong "
            "to the engine; use another name"
        )
    return message


def payload_codec(notes: Notes, name: str, message: object, payload: object) -> Codec[Any]:
    if isinstance(message, type):
        if payload is not None:
            raise DefinitionError(
                f"{notes.where}: {message.__qualname__} is itself the payload of {name!r}: leave out payload=, or give "
                "the wire type as a string"
            )
        payload = message
    elif isinstance(payload, (str, bytes, int, float)):
        raise DefinitionError(f"{notes.where}: payload of {name!r} must be a type, got {payload!r:.80}")
    try:
        return codec_for(payload)
    except DefinitionError as error:
        raise DefinitionError(f"{notes.where}: payload of {name!r}: {error.message}", data=error.data) from error


def checked_missing(notes: Notes, name: str, starts: object, on_missing: object, patience: Any) -> timedelta:
    """The patience of a type, once all that is said about its missing instance was found to be in order."""
    if not isinstance(starts, bool):
        raise DefinitionError(f"{notes.where}: starts of {name!r} must be True or False, got {starts!r:.80}")
    one_of(on_missing, get_args(OnMissing), f"{notes.where}: on_missing of {name!r}")
    return checked_length(f"{notes.where}: patience of {name!r}", patience)


def check_codecs(notes: Notes, name: str, codec: Codec[Any], joins: Sequence[JoinBinding]) -> None:
    for join in joins:
        if join.codecs[name].name != codec.name:
            raise DefinitionError(
                f"{notes.where}: {name!r} is {codec.name} for its handler and {join.codecs[name].name} for the "
                f".when_all of {join.name}: give both the same class, or both the wire type"
            )


def with_status(notes: Notes, known: HandlerBinding, said: HandlerBinding, status: str) -> HandlerBinding:
    """`known`, which has handlers during other statuses, with one for `status` too."""
    if known.during is None:
        raise DefinitionError(
            f"{notes.where} already has a handler for {said.type!r} in every status: use .on(...) or .during(...) for "
            "a type, not both"
        )
    if status in known.during:
        raise DefinitionError(
            f"{notes.where} already has a handler for {said.type!r} during {status!r}: put both into one"
        )
    for what in ("on_unexpected", "starts", "on_missing", "patience"):
        if getattr(known, what) != getattr(said, what):
            raise DefinitionError(
                f"{notes.where}: {what} of {said.type!r} is {getattr(said, what)!r} during {status!r} and "
                f"{getattr(known, what)!r} before: say the same for every status"
            )
    if known.codec.name != said.codec.name:
        raise DefinitionError(
            f"{notes.where}: {said.type!r} is {said.codec.name} during {status!r} and {known.codec.name} before: "
            "say the same for every status"
        )
    return dataclasses.replace(known, during={**known.during, status: said.handler})


def said_codec(notes: Notes, what: str, declared: object) -> Codec[Any]:
    try:
        return codec_for(declared)
    except DefinitionError as error:
        raise DefinitionError(f"{notes.where}: {what}: {error.message}", data=error.data) from error
