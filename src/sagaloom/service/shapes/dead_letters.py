"""Dead letters, and what becomes of many at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Raw, UnsetType

from sagaloom.engine.records import DeadLetter
from sagaloom.ids import instance_id
from sagaloom.runtime.bulk import BulkResult
from sagaloom.service.shapes.shape import Shape, Time, TroubleView, if_known, json_if, trouble_view
from sagaloom.web.routes import wire_time


class DeadLetterView(Shape, frozen=True, kw_only=True):
    """A message or an effect that was given up. Payload, traceback and states come with a single one, not in lists."""

    id: str
    at: Time
    kind: Literal["message", "effect"]
    saga_name: str
    saga_id: str
    correlation_id: str
    correlation_key: str
    type: Annotated[str, Meta(description="The message type, or the target of the effect.")]
    message_id: str
    code: str
    reason: str
    attempts: int
    run: int | UnsetType = UNSET
    instance_id: str | UnsetType = UNSET
    target: Annotated[str | UnsetType, Meta(description="Of an effect: where it was to go, as kind:id.")] = UNSET
    effect_key: str | UnsetType = UNSET
    payload: Raw | UnsetType = UNSET
    traceback: str | UnsetType = UNSET
    state_before: Annotated[Raw | UnsetType, Meta(description="Of a broken invariant: the state as it was.")] = UNSET
    state_after: Annotated[Raw | UnsetType, Meta(description="Of a broken invariant: the state it refused.")] = UNSET


class BulkBody(Shape, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which dead letters: those of `ids`, or the oldest `limit` of a saga, of a key, or of `all`."""

    ids: Annotated[Sequence[str], Meta(max_length=1000)] | None = None
    saga_name: str | None = None
    saga_id: Annotated[str | None, Meta(description="Another spelling of `sagaName`.")] = None
    correlation_id: str | None = None
    correlation_key: Annotated[str | None, Meta(description="Another spelling of `correlationId`.")] = None
    all: Annotated[bool, Meta(description="Every one; has to be said, so that an empty body does nothing.")] = False
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100


class BulkAnswer(Shape, frozen=True, kw_only=True):
    """What became of many dead letters: how many were redriven or discarded, which, and what stood against the others.
    `hasMore`: further ones match."""

    done: int
    failed: int
    has_more: bool
    ids: Sequence[str]
    troubles: Sequence[TroubleView]


def bulk_answer(result: BulkResult) -> BulkAnswer:
    """What an operator gets for many dead letters."""
    return BulkAnswer(
        done=len(result.done),
        failed=len(result.troubles),
        has_more=result.has_more,
        ids=result.done,
        troubles=[trouble_view(one) for one in result.troubles],
    )


class DeadLetterList(Shape, frozen=True, kw_only=True):
    """A page of dead letters, newest first. `cursor` asks for the next page and is null on the last one."""

    dead_letters: Sequence[DeadLetterView]
    limit: int
    cursor: str | None


def dead_letter_view(letter: DeadLetter, *, with_content: bool) -> DeadLetterView:
    """One dead letter; `with_content` adds what may be long."""
    envelope, effect = letter.envelope, letter.effect
    run = effect.run if effect is not None else envelope.run if envelope is not None else None
    payload = effect.payload if effect is not None else envelope.payload if envelope is not None else None
    return DeadLetterView(
        id=letter.id,
        at=wire_time(letter.at),
        kind="message" if effect is None else "effect",
        saga_name=letter.saga_id,
        saga_id=letter.saga_id,
        correlation_id=letter.key,
        correlation_key=letter.key,
        type=letter.type,
        message_id=effect.message_id if effect is not None else envelope.id if envelope is not None else "",
        code=letter.code,
        reason=letter.reason,
        attempts=letter.attempts,
        run=if_known(run),
        instance_id=UNSET if run is None else instance_id(letter.saga_id, letter.key, run),
        target=UNSET if effect is None else f"{effect.target_kind}:{effect.target_id}",
        effect_key=UNSET if effect is None else effect.effect_key,
        payload=json_if(payload) if with_content else UNSET,
        traceback=if_known(letter.traceback) if with_content else UNSET,
        state_before=json_if(letter.state_before) if with_content else UNSET,
        state_after=json_if(letter.state_after) if with_content else UNSET,
    )
