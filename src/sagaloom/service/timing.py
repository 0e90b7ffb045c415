"""The routes about time: the timers of runs, what is scheduled, and a tick by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

from fastapi import Path, Query, Request, Response
from pydantic import Field

from sagaloom.errors import MessageRejected
from sagaloom.runtime.receipts import PublishRejected
from sagaloom.service import shapes
from sagaloom.service.addressing import API_PREFIX, one_of_two
from sagaloom.web.bodies import BodyReader, JsonBody, body_of, in_utc, invalid
from sagaloom.web.routes import Limit, RouteTable, Text, WebQuery, json_response

if TYPE_CHECKING:
    from sagaloom.runtime import SagaRuntime

__all__ = ["add_timing"]


_move_body = JsonBody(shapes.MoveTimerBody, example='send a JSON object such as {"dueAt": "2026-01-31T12:00:00Z"}')
_CHANGE_ERRORS: Final = (404, 409, 422, 429, 503)
_TimerId = Annotated[str, Path(alias="id", max_length=200)]


class TimersQuery(WebQuery):
    limit: Limit = 50
    cursor: Annotated[Text, Field(description="The `cursor` of the page before.")] = None
    saga_name: Text = None
    saga_id: Annotated[Text, Field(description="Another spelling of `sagaName`.")] = None
    correlation_id: Text = None
    correlation_key: Annotated[Text, Field(description="Another spelling of `correlationId`.")] = None


def add_timing(table: RouteTable, runtime: SagaRuntime, reader: BodyReader) -> None:
    """The routes about time."""
    _add_timers(table, runtime, reader)
    _add_schedules(table, runtime)


def _add_timers(table: RouteTable, runtime: SagaRuntime, reader: BodyReader) -> None:
    @table.add("GET", f"{API_PREFIX}/timers", answer=shapes.TimerList, tag="time", errors=(422, 503))
    async def _list_timers(query: Annotated[TimersQuery, Query()]) -> Response:
        """The timers that wait, the next one first."""
        saga_id = one_of_two("sagaName", query.saga_name, "sagaId", query.saga_id)
        key = one_of_two("correlationId", query.correlation_id, "correlationKey", query.correlation_key)
        try:
            found = await runtime.timers(saga_id, key, after=query.cursor, limit=query.limit)
        except MessageRejected as refused:  # Its cursor is all that a listing may refuse.
            raise invalid(refused.message, "cursor") from None
        return json_response(
            shapes.TimerList(
                timers=[shapes.timer_view(one) for one in found],
                limit=query.limit,
                cursor=found[-1].cursor if len(found) == query.limit else None,
            )
        )

    @table.add("DELETE", f"{API_PREFIX}/timers/{{id}}", answer=shapes.TimerChange, tag="time", errors=_CHANGE_ERRORS)
    async def _cancel_timer(timer_id: _TimerId) -> Response:
        """Takes a timer back, as its saga would; it stands in the history of the run."""
        return json_response(shapes.timer_change(timer_id, await runtime.cancel_timer(timer_id)))

    @table.add(
        "PATCH",
        f"{API_PREFIX}/timers/{{id}}",
        answer=shapes.TimerChange,
        tag="time",
        errors=(408, 413, 415, *_CHANGE_ERRORS),
        body=shapes.MoveTimerBody,
        requires_body=True,
    )
    async def _move_timer(timer_id: _TimerId, request: Request) -> Response:
        """Has a timer fire at another moment; at once when that is in the past. It keeps its id and its message."""
        due_at = in_utc((await body_of(request, reader, _move_body)).due_at, "dueAt")
        return json_response(shapes.timer_change(timer_id, await runtime.move_timer(timer_id, due_at)))


def _add_schedules(table: RouteTable, runtime: SagaRuntime) -> None:
    @table.add("GET", f"{API_PREFIX}/schedules", answer=shapes.ScheduleList, tag="time", errors=(503,))
    async def _list_schedules() -> Response:
        """The schedules of the loaded sagas, by saga id, and how far they have come."""
        found = await runtime.schedules()
        return json_response(shapes.ScheduleList(schedules=[shapes.schedule_view(one) for one in found]))

    @table.add(
        "POST",
        f"{API_PREFIX}/schedules/{{id}}/trigger",
        answer=shapes.PublishAnswer,
        tag="time",
        errors=(404, 409, 422, 429, 503),
        status=202,
    )
    async def _trigger_schedule(
        saga_id: Annotated[str, Path(alias="id", description="The id of the saga that is scheduled.")],
    ) -> Response:
        """Gives a scheduled saga a tick of its own, now; its schedule goes on as it would have."""
        receipt = await runtime.trigger_schedule(saga_id)
        if isinstance(receipt, PublishRejected):
            receipt.raise_for_rejected()
        return json_response(shapes.publish_answer(receipt, with_outcomes=False), 202)
