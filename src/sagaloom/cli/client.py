"""The HTTP side of the command line: one small client, and errors that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from types import TracebackType
from typing import Any, Final, NoReturn, Self, cast
from urllib.parse import quote

import msgspec

from sagaloom.errors import SagasError

__all__ = ["DEFAULT_URL", "ApiClient", "CommandFailed", "CutOff", "instance_path"]

DEFAULT_URL: Final = "http://127.0.0.1:8092"
_PREFIX: Final = "/api/v1/sagas"
_ANSWER_BYTES_MAX: Final = 64 << 20


class CommandFailed(SagasError):
    """Why a command did not work, in one line for stderr. `exit_code` is never 0."""

    default_code = "COMMAND_FAILED"

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CutOff(Exception):
    """A stream did not begin, or broke off, for a reason that may pass."""

    def __init__(self, message: str, *, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ApiClient:
    """Calls the API of a running server. `path` is below `/api/v1/sagas`, unless it starts with `//`, which stands for
    the root."""

    def __init__(self, url: str, token: str | None, *, timeout_seconds: float = 40.0) -> None:
        import httpx2

        self.url = url.rstrip("/")
        if not self.url.startswith(("http://", "https://")):
            raise CommandFailed(f"--url {url!r} is no http(s) URL: write for example {DEFAULT_URL}", exit_code=2)
        headers = {"Accept": "application/json"}
        if token:
            if not (token.isascii() and token.isprintable()):
                raise CommandFailed("--token holds characters that no header can carry", exit_code=2)
            headers["Authorization"] = f"Bearer {token}"
        self._has_token = bool(token)
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(timeout_seconds, connect=5.0),
            follow_redirects=False,
            # A proxy of the environment is for the outside; it cannot know what our loopback is.
            mounts=dict.fromkeys(("all://127.0.0.1", "all://localhost", "all://[::1]")),
        )

    def get(self, path: str, **params: object) -> Any:
        """The decoded JSON answer; parameters that are None are left out."""
        return self._call("GET", path, params=params)

    def post(self, path: str, body: object = None, **params: object) -> Any:
        return self._call("POST", path, body=body, params=params)

    def patch(self, path: str, body: object) -> Any:
        return self._call("PATCH", path, body=body)

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path)

    def answers(self, path: str) -> tuple[int, Any]:
        """Status and body, whatever the status; for `doctor`."""
        status, _, body = self._send("GET", path)
        return status, body

    @contextlib.contextmanager
    def stream(self, path: str, **params: object) -> Generator[Iterator[str]]:
        """The lines of an answer that goes on for ever. Raises `CutOff` when that may work later, from here or from
        the lines, and `CommandFailed` when it is refused."""
        import httpx2

        given = {name: str(value) for name, value in params.items() if value is not None}
        try:
            with self._client.stream(
                "GET", self.url + _PREFIX + path, params=given or None, headers={"Accept": "text/event-stream"}
            ) as response:
                if response.status_code != 200:
                    self._refuse_stream(response.status_code, response.headers, response.read())
                yield response.iter_lines()
        except httpx2.ConnectError as error:
            raise CutOff(self._nobody_there()) from error
        except httpx2.HTTPError as error:
            raise CutOff(f"talking to {self.url} failed: {str(error) or type(error).__name__}") from error

    def _refuse_stream(self, status: int, headers: Mapping[str, str], body: bytes) -> NoReturn:
        try:
            answer = msgspec.json.decode(body or b"null")
        except msgspec.DecodeError:
            answer = None
        explained = self._explained(status, headers, answer)
        if status in (408, 425, 429) or status >= 500:
            after = headers.get("retry-after", "")
            raise CutOff(explained, retry_after_seconds=float(after) if after.isdigit() else None)
        raise CommandFailed(explained)

    def _nobody_there(self) -> str:
        return (
            f"no server answers at {self.url}: start one with 'sagaloom dev' or 'sagaloom serve MODULE', "
            "or say where it is with --url or SAGALOOM_URL"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def _call(self, method: str, path: str, *, body: object = None, params: Mapping[str, object] | None = None) -> Any:
        status, headers, answer = self._send(method, path, body=body, params=params)
        if 200 <= status < 300:
            return answer
        raise CommandFailed(self._explained(status, headers, answer))

    def _send(
        self, method: str, path: str, *, body: object = None, params: Mapping[str, object] | None = None
    ) -> tuple[int, Mapping[str, str], Any]:
        import httpx2

        address = self.url + (path[1:] if path.startswith("//") else _PREFIX + path)
        given = {name: _written(value) for name, value in (params or {}).items() if value is not None}
        content = None if body is None else msgspec.json.encode(body)
        try:
            response = self._client.request(
                method,
                address,
                params=given or None,
                content=content,
                headers={"Content-Type": "application/json"} if content is not None else None,
            )
        except httpx2.ConnectError as error:
            raise CommandFailed(self._nobody_there()) from error
        except httpx2.TimeoutException as error:
            raise CommandFailed(f"the server at {self.url} did not answer in time ({type(error).__name__})") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise CommandFailed(f"talking to {self.url} failed: {str(error) or type(error).__name__}") from error
        if len(response.content) > _ANSWER_BYTES_MAX:
            raise CommandFailed(f"the server at {self.url} answered with more than 64 MiB: use a smaller --limit")
        try:
            return response.status_code, response.headers, msgspec.json.decode(response.content or b"null")
        except msgspec.DecodeError as error:
            raise CommandFailed(
                f"{self.url} answered {response.status_code} with something that is no JSON: is it a saga service?"
            ) from error

    def _explained(self, status: int, headers: Mapping[str, str], answer: object) -> str:
        fields: Mapping[str, object] = cast("Mapping[str, object]", answer) if isinstance(answer, Mapping) else {}
        said = str(fields.get("message") or fields.get("detail") or "")
        code = f" ({fields['code']})" if fields.get("code") else ""
        if status == 401:
            advice = "the token is not one it accepts" if self._has_token else "give --token or set SAGALOOM_TOKEN"
            return f"the server at {self.url} wants a token: {advice}"
        if status == 404 and not said:
            return f"the server at {self.url} does not know this address: is it a saga service, and of this version?"
        if status in (429, 503) and headers.get("retry-after"):
            said = f"{said or 'not now'}; try again in {headers['retry-after']} s"
        return f"{said or f'the server at {self.url} answered {status}'}{code}"


def instance_path(saga: str, key: str) -> str:
    """The path of an instance; a key may hold anything, slashes included."""
    return f"/instances/{quote(saga, safe='')}/{quote(key, safe='')}"


def _written(value: object) -> str | list[str]:
    """A parameter as it is sent; a list repeats it."""
    return [str(each) for each in cast("list[object]", value)] if isinstance(value, list) else str(value)
