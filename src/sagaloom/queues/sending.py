"""Messages on their way into a broker: whoever sends while a batch is under way is in the next one.

One batch is under way at a time, so as many messages share a round trip (and the broker's flush to disk) as are sent at
once, and nobody waits for a timer. A group (`enqueue_many`) is never torn apart over two batches.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias

from sagaloom.errors import BackendUnavailable, MessageRejected
from sagaloom.ports.queue import QueueMessage
from sagaloom.queues.patience import end

__all__ = ["Outgoing", "Sender"]

_BATCH_MESSAGES: Final = 1_000
_BATCH_BYTES: Final = 4 * 1024 * 1024

Outgoing: TypeAlias = tuple[QueueMessage, int]
"""A message, and after how many milliseconds it is due."""


class _Group(NamedTuple):
    messages: Sequence[Outgoing]
    size: int
    done: asyncio.Future[Sequence[bool]]


class Sender:
    """Sends groups of messages, in the order in which they come, by `send`."""

    def __init__(self, send: Callable[[Sequence[Outgoing]], Awaitable[Sequence[bool]]]) -> None:
        self._send = send
        self._waiting: deque[_Group] = deque()
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    async def send(self, messages: Sequence[Outgoing]) -> Sequence[bool]:
        """For each message whether it was stored; raises what kept all of them from it."""
        size = sum(len(message.body) for message, _ in messages)
        group = _Group(messages, size, asyncio.get_running_loop().create_future())
        self._waiting.append(group)
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="sagaloom-queue-sender")
        return await group.done

    async def drain(self, seconds: float) -> None:
        """Returns when nothing is under way; what is not sent after so many seconds is refused, and may be there all
        the same."""
        task = self._task
        if task is None:
            return
        await asyncio.wait([task], timeout=seconds)
        if not task.done():
            self._is_closed = True
            await end(task)

    async def _work(self) -> None:
        try:
            while self._waiting:
                await self._sent(self._next_batch())
        finally:
            self._task = None
            self._give_up(self._waiting)  # only when we were cancelled

    def _next_batch(self) -> list[_Group]:
        batch = [self._waiting.popleft()]
        count, size = len(batch[0].messages), batch[0].size
        while self._waiting:
            group = self._waiting[0]
            count, size = count + len(group.messages), size + group.size
            if count > _BATCH_MESSAGES or size > _BATCH_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _sent(self, batch: Sequence[_Group]) -> None:
        try:
            stored = await self._send([message for group in batch for message in group.messages])
        except MessageRejected as error:
            if len(batch) == 1:
                _fail(batch, error)
                return
            for group in batch:  # One of them may be what does not fit; nothing of them was sent.
                await self._sent([group])
        except Exception as error:  # noqa: BLE001 - it is theirs who wait
            _fail(batch, error)
        except BaseException:
            self._give_up(batch)
            raise
        else:
            first = 0
            for group in batch:
                if not group.done.done():
                    group.done.set_result(stored[first : first + len(group.messages)])
                first += len(group.messages)

    def _give_up(self, groups: Iterable[_Group]) -> None:
        """Lets go of whoever waits: the queue was closed, or the loop is about to end."""
        for group in groups:
            if not self._is_closed:
                group.done.cancel()
            elif not group.done.done():
                group.done.set_exception(
                    BackendUnavailable("the queue was closed while its broker did not answer: send the message again")
                )


def _fail(batch: Sequence[_Group], error: Exception) -> None:
    for group in batch:
        if not group.done.done():
            group.done.set_exception(error)
