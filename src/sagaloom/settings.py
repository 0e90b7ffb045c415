"""What the doors read from the environment, checked once, at the start.

Nothing else in the package reads these variables; libraries are given values.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from sagaloom.errors import ConfigurationError

__all__ = [
    "DEFAULT_JOBS_PORT",
    "DEFAULT_KV_PATH",
    "DEFAULT_PORT",
    "DoorSettings",
    "StorePlace",
    "is_loopback",
    "load_settings",
    "refuse_open_door",
]

DEFAULT_PORT: Final = 8092
DEFAULT_JOBS_PORT: Final = 8091
DEFAULT_KV_PATH: Final = Path(".sagaloom") / "sagas.db"


@dataclass(frozen=True, kw_only=True)
class StorePlace:
    """Where a process keeps its sagas: in a file, or in the database at `url`."""

    kv_path: Path = DEFAULT_KV_PATH
    url: str | None = None

    def __str__(self) -> str:
        if self.url is None:
            return str(self.kv_path)
        parts = urlsplit(self.url)
        return f"{parts.hostname or 'localhost'}{parts.path}"  # without user and password


class DoorSettings(BaseSettings):
    """The settings of `serve` and `dev`. An empty variable counts as not set."""

    model_config = SettingsConfigDict(env_ignore_empty=True, extra="ignore", frozen=True, populate_by_name=True)

    store: str | None = Field(default=None, validation_alias="NETSCRIPT_SAGA_STORE")
    kv_path: Path | None = Field(default=None, validation_alias="NETSCRIPT_SAGA_KV_PATH")
    database_url: SecretStr | None = Field(default=None, validation_alias="DATABASE_URL")
    host: str = Field(default="127.0.0.1", validation_alias="SAGALOOM_HOST")
    port: int = Field(default=DEFAULT_PORT, ge=0, le=65535, validation_alias="PORT")
    token: SecretStr | None = Field(default=None, validation_alias="SAGALOOM_TOKEN")
    """The bearer token that every request needs; without one the door is open, on loopback only."""
    requests_per_second: float | None = Field(default=None, gt=0, validation_alias="SAGALOOM_RATE_LIMIT")
    """How many requests a second one address may send; without it there is no limit."""
    registry_module: str | None = Field(default=None, validation_alias="SAGAS_REGISTRY_MODULE")
    is_dev: bool = Field(default=False, validation_alias="SAGALOOM_DEV")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", validation_alias="SAGALOOM_LOG_LEVEL"
    )

    @property
    def place(self) -> StorePlace:
        """Where sagas and job runs are kept, by the chosen store. Raises `ConfigurationError` when none is chosen, or
        sql is and there is no address."""
        from sagaloom.discovery import load_appsettings, resolve_saga_store_backend

        environment = {**os.environ, **({"NETSCRIPT_SAGA_STORE": self.store} if self.store else {})}
        if resolve_saga_store_backend(environment, load_appsettings()) == "kv":
            return StorePlace(kv_path=self.kv_path or DEFAULT_KV_PATH)
        if self.database_url is None:
            raise ConfigurationError(
                "the sql saga store needs an address: set DATABASE_URL=postgresql://user:password@host:5432/database"
            )
        return StorePlace(url=self.database_url.get_secret_value())

    @property
    def bearer(self) -> str | None:
        """The token in the clear, for those who check it or send it."""
        return self.token.get_secret_value() if self.token is not None else None


def load_settings(env: Mapping[str, str] | None = None, **overrides: Any) -> DoorSettings:
    """The settings of this environment, with `overrides` (field names; None means not given) on top.

    Raises `ConfigurationError` naming each variable and what is wrong with it.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        if env is None:
            return DoorSettings(**given)
        aliases = {str(field.validation_alias): name for name, field in DoorSettings.model_fields.items()}
        read = {aliases[name]: value for name, value in env.items() if name in aliases and value}
        return DoorSettings.model_validate({**read, **given})
    except ValidationError as error:
        # The values stay out: one of them may be a token.
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise ConfigurationError(f"bad settings: {wrong}") from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def refuse_open_door(settings: DoorSettings, *, is_insecure: bool) -> None:
    """Raises `ConfigurationError` when others could reach the API and nothing would ask who they are."""
    if settings.token is None and not is_insecure and not is_loopback(settings.host):
        raise ConfigurationError(
            f"refusing to listen on {settings.host} without a token: anybody who reaches it could publish, cancel and "
            "discard. Set SAGALOOM_TOKEN, or listen on 127.0.0.1, or say --insecure if something in front of it asks "
            "who they are."
        )
