"""What an event loop complains about, because nobody else has heard of it."""

import asyncio
import contextlib
import gc
from collections.abc import Iterator

__all__ = ["complaints"]


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """A list that fills up to the end of the block, where what was forgotten is collected."""
    heard: list[str] = []
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    loop.set_exception_handler(lambda _, context: heard.append(f"{context['message']}: {context.get('exception')!r}"))
    try:
        yield heard
        gc.collect()
    finally:
        loop.set_exception_handler(before)
