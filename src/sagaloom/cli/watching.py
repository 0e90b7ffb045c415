"""`sagaloom instances watch`: the live feed in a terminal, or as a line of JSON for each event.

The server numbers its events and keeps them for a while. Whoever comes back with the last number he has seen misses
nothing: so the command comes back whenever the connection breaks, and only the first one has to work.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from sagaloom.cli.client import ApiClient, CommandFailed, CutOff

__all__ = ["StreamedEvent", "events_of", "follow", "line_of", "watch"]

_PAUSE_SECONDS: Final = 1.0
_PAUSE_SECONDS_MAX: Final = 10.0
_NAME_WIDTH: Final = len("message_received")


def watch(
    api: ApiClient, *, saga: str | None, key: str | None, topic: str | None, after: str | None, as_json: bool
) -> None:
    """Prints what happens until the process is interrupted. Raises what `follow` raises."""
    line = _json_line_of if as_json else line_of
    with contextlib.suppress(KeyboardInterrupt):
        follow(api, saga=saga, key=key, topic=topic, after=after, show=lambda told: _print_line(line(told)), say=_say)


class StreamedEvent(NamedTuple):
    """One server-sent event. `id` is "" where it came without one."""

    id: str
    event: str
    data: Mapping[str, Any]


def follow(
    api: ApiClient,
    *,
    saga: str | None,
    key: str | None,
    topic: str | None = None,
    after: str | None,
    show: Callable[[StreamedEvent], None],
    say: Callable[[str], None],
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Shows every event until the process is interrupted. Raises `CommandFailed` when the first connection does not
    work, or a later one is refused for good."""
    place, was_connected, failures = after, False, 0
    while True:
        wait_seconds: float | None = None
        try:
            with api.stream("/subscribe", after=place, sagaName=saga, correlationKey=key, topic=topic) as lines:
                for told in events_of(lines):
                    was_connected, failures = True, 0
                    if told.event != "heartbeat":
                        show(told)
                    place = told.id or place
        except CutOff as cut:
            if not was_connected:
                raise CommandFailed(str(cut)) from cut
            wait_seconds = cut.retry_after_seconds
        failures += 1
        if failures == 1:
            say("the connection was cut; trying to go on where it was")
        pause(wait_seconds or min(_PAUSE_SECONDS * 2 ** (failures - 1), _PAUSE_SECONDS_MAX))


def events_of(lines: Iterable[str]) -> Iterator[StreamedEvent]:
    """The events that `lines` spell. One that was cut off in the middle is none."""
    event, place, data = "message", "", ""
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield StreamedEvent(place, event, msgspec.json.decode(data))
            event, place, data = "message", "", ""
        elif field == "event":
            event = value
        elif field == "id":
            place = value
        elif field == "data":
            data += value


def line_of(told: StreamedEvent) -> str:
    """An event for people, in one line."""
    data = told.data
    about: Mapping[str, Any] = data.get("data") or {}
    if told.event == "reset":
        return (
            f"{data['timestamp']}  the feed goes on at {about['oldestId']}, the oldest that is kept: {about['reason']}"
        )
    parts = [
        data["timestamp"],
        f"{told.event.removeprefix('saga:'):{_NAME_WIDTH}}",
        data.get("instanceId", ""),
        data.get("status", ""),
        data.get("messageType") or about.get("target", ""),
        about.get("detail", ""),
    ]
    return "  ".join(" ".join(str(part).splitlines()) for part in parts if part)


def _json_line_of(told: StreamedEvent) -> str:
    return msgspec.json.encode({"id": told.id, **told.data}).decode()


def _print_line(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever read the other end of the pipe has gone. Python would try once more to write what is left, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
