"""The options and arguments that many commands share."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["AsJson", "Host", "Insecure", "Key", "Limit", "Modules", "Run", "Saga", "Token", "Topic", "Url"]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url = Annotated[str, typer.Option("--url", envvar="SAGALOOM_URL", help="Where the server is.")]
Token = Annotated[
    str | None, typer.Option("--token", envvar="SAGALOOM_TOKEN", show_envvar=True, help="The server's bearer token.")
]
Limit = Annotated[int, typer.Option("--limit", min=1, max=1000, help="How many at most.")]
Run = Annotated[int | None, typer.Option("--run", min=1, help="Which run; by default the newest.")]
Saga = Annotated[str, typer.Argument(help="The saga's id.", show_default=False)]
Key = Annotated[str, typer.Argument(help="The correlation key.", show_default=False)]
Topic = Annotated[str | None, typer.Option("--topic", help="Only of sagas with this topic, as configured.")]
Host = Annotated[str | None, typer.Option("--host", help="The address to listen on; by default 127.0.0.1.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Listen beyond loopback without a token.")]
Modules = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODULE]...",
        help="Saga modules: dotted names, package.module:attribute, or files. "
        "By default SAGAS_REGISTRY_MODULE, else \\[tool.sagaloom] sagas in pyproject.toml.",
        show_default=False,
    ),
]
