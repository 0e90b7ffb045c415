"""A route that is fast because nothing stands between the server and it: it reads the request and answers, whatever
happens behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from starlette.types import Receive, Scope, Send

from sagaloom.errors import SagasError
from sagaloom.web.problems import Answer, answer_error, answer_surprise

__all__ = ["RawRoute"]


class RawRoute(ABC):
    """One ASGI endpoint. `where` is what a surprise is logged under."""

    where: ClassVar[str]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await self._answer(scope, receive)
        except SagasError as error:
            answer = answer_error(error, scope["headers"])
        except Exception as error:  # noqa: BLE001  # a door answers whatever happens behind it
            answer = answer_surprise(error, scope["headers"], where=self.where)
        if answer is None:
            return
        status, headers, body = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    @abstractmethod
    async def _answer(self, scope: Scope, receive: Receive) -> Answer | None:
        """The answer, or None when the client is gone."""
