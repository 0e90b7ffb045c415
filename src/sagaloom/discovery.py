"""Finding out where things are: the saga store that was chosen, and the services that effects go to.

Nothing here guesses. What is not set is an error that says what was read and what to set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, cast

import msgspec

from sagaloom.errors import ConfigurationError
from sagaloom.targets import discover_service

__all__ = [
    "SagaStoreBackend",
    "discover_service",
    "load_appsettings",
    "named_saga_store_backend",
    "resolve_saga_store_backend",
]

SagaStoreBackend = Literal["kv", "sql"]

_VARIABLE: Final = "NETSCRIPT_SAGA_STORE"
_SPELLINGS: Final = (
    ("sagas", "store", "backend"),
    ("Sagas", "Store", "Backend"),
    ("SagaStore", "Backend"),
    ("SagasStore", "Backend"),
)
_BACKENDS: Final[Mapping[str, SagaStoreBackend]] = {"kv": "kv", "sql": "sql", "prisma": "sql"}


def resolve_saga_store_backend(
    env: Mapping[str, str] | None = None, appsettings: Mapping[str, Any] | None = None
) -> SagaStoreBackend:
    """The chosen store backend: `NETSCRIPT_SAGA_STORE` in `env` (by default the environment of this process), else
    `sagas.store.backend` in `appsettings` (see `load_appsettings`). `prisma` means `sql`.

    Raises `ConfigurationError` when neither is set, or the value is no backend: where durable state lands is never
    guessed.

    >>> resolve_saga_store_backend({"NETSCRIPT_SAGA_STORE": "KV"})
    'kv'
    """
    backend = named_saga_store_backend(env, appsettings)
    if backend is None:
        raise ConfigurationError(
            "Saga store backend is required. Set NETSCRIPT_SAGA_STORE=kv|sql or appsettings sagas.store.backend."
        )
    return backend


def named_saga_store_backend(
    env: Mapping[str, str] | None = None, appsettings: Mapping[str, Any] | None = None
) -> SagaStoreBackend | None:
    """The same, for those who can do without: None when neither is set."""
    chosen = (os.environ if env is None else env).get(_VARIABLE, "").strip()
    if chosen:
        return _backend(chosen, source=_VARIABLE)
    for spelling in _SPELLINGS:
        value = _at(appsettings or {}, spelling)
        if value is not None and value != "":
            return _backend(value, source="sagas.store.backend")
    return None


def load_appsettings(directory: Path | None = None, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """`appsettings.json` in `directory` (by default the current one), overlaid with `appsettings.<Env>.json`, where
    `<Env>` is `ASPNETCORE_ENVIRONMENT`, else `DOTNET_ENVIRONMENT`. A file that is not there is empty; one that cannot
    be read is a `ConfigurationError`."""
    variables = os.environ if env is None else env
    folder = directory if directory is not None else Path.cwd()
    settings = _json_object(folder / "appsettings.json")
    stage = (variables.get("ASPNETCORE_ENVIRONMENT") or variables.get("DOTNET_ENVIRONMENT") or "").strip()
    if stage:
        if stage != Path(stage).name:
            raise ConfigurationError(f"the environment name {stage!r} is no part of a file name: use a plain word")
        settings = _overlaid(settings, _json_object(folder / f"appsettings.{stage}.json"))
    return settings


def _backend(value: object, *, source: str) -> SagaStoreBackend:
    backend = _BACKENDS.get(value.strip().lower()) if isinstance(value, str) else None
    if backend is None:
        raise ConfigurationError(f'Invalid saga store backend "{value}" from {source}; expected kv or sql.')
    return backend


def _at(settings: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    value: Any = settings
    for name in path:
        value = cast("Mapping[str, Any]", value).get(name) if isinstance(value, Mapping) else None
    return value


def _overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        if isinstance(value, dict) and isinstance(under, dict):
            merged[name] = _overlaid(cast("dict[str, Any]", under), cast("dict[str, Any]", value))
        else:
            merged[name] = value
    return merged


def _json_object(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_text(encoding="utf-8-sig"), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read as a JSON object: {error}") from error
