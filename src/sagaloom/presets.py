"""From definitions to a running system in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from sagaloom.clock import Clock
from sagaloom.composition import DurableSagaRuntime, Opening, create_durable_saga_runtime
from sagaloom.config import SagaConfigEntry, SagaConfigGroup, configured
from sagaloom.definitions import SagaDefinition
from sagaloom.errors import ConfigurationError
from sagaloom.ports.keyvalue import KeyValue
from sagaloom.ports.store import SagaStore
from sagaloom.ports.targets import EffectTarget
from sagaloom.runtime.options import RuntimeOptions
from sagaloom.runtime.runtime import SagaRuntime

__all__ = ["StartedSagas", "start_saga_handlers", "start_sagas"]


class StartedSagas:
    """A running system. `bus` is where messages go in: the runtime itself."""

    def __init__(self, durable: DurableSagaRuntime, *, saga_count: int) -> None:
        self.runtime: SagaRuntime = durable.runtime
        self.bus: SagaRuntime = durable.runtime
        self.store: SagaStore = durable.store
        self.saga_count = saga_count
        self._durable = durable

    async def shutdown(self) -> None:
        """Takes no more messages, finishes what is under way, and closes what was opened. Twice is no error."""
        await self._durable.dispose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()


def start_sagas(
    definitions: Iterable[SagaDefinition[Any]],
    *,
    config: Iterable[SagaConfigEntry | SagaConfigGroup] = (),
    auto_start: bool = True,
    backend: Literal["kv", "sql", "prisma"] | None = None,
    kv: KeyValue | None = None,
    path: str | os.PathLike[str] | None = None,
    engine: object | None = None,
    url: str | None = None,
    schema: str | None = None,
    store: SagaStore | None = None,
    targets: Iterable[EffectTarget] = (),
    services: Mapping[str, str] | None = None,
    clock: Clock | None = None,
    options: RuntimeOptions | None = None,
) -> Opening[StartedSagas]:
    """Runs `definitions`, as their entries in `config` say (`sagaloom.config`); the other options are those of
    `create_durable_saga_runtime`.

        async with start_sagas([order_saga]) as sagas:
            await sagas.bus.publish({"type": "OrderPlaced", "payload": {"orderId": "o-1"}})

    or `sagas = await start_sagas([order_saga])` and, in the end, `await sagas.shutdown()`.
    """
    chosen = _configured(definitions, config)

    async def opener() -> StartedSagas:
        durable = await create_durable_saga_runtime(
            backend,
            kv=kv,
            path=path,
            engine=engine,
            url=url,
            schema=schema,
            store=store,
            definitions=chosen,
            targets=targets,
            services=services,
            clock=clock,
            options=options,
        )
        if auto_start:
            try:
                await durable.start()
            except BaseException:
                await durable.dispose()
                raise
        return StartedSagas(durable, saga_count=len({definition.id for definition in chosen}))

    return Opening(opener)


def _configured(
    definitions: Iterable[SagaDefinition[Any]], config: Iterable[SagaConfigEntry | SagaConfigGroup]
) -> list[SagaDefinition[Any]]:
    entries = {
        entry.id: entry for part in config for entry in (part.sagas if isinstance(part, SagaConfigGroup) else (part,))
    }
    chosen = [configured(each, entries[each.id]) if each.id in entries else each for each in definitions]
    if unknown := sorted(entries.keys() - {each.id for each in chosen}):
        raise ConfigurationError(
            f"config= is about the sagas {', '.join(unknown)}, which are not among the definitions: hand them in, or "
            "leave their entries out"
        )
    return chosen


start_saga_handlers = start_sagas
"""The name for handlers that run apart from the API; the same thing."""
