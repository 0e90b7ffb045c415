"""Loading saga definitions by name: which modules, and what is picked up from them.

Modules are named by the first of these that is given:

    the command line          sagaloom serve shop.sagas shop/orders.py shop.registry:sagas
    SAGAS_REGISTRY_MODULE     one or more of the same, with commas between them
    pyproject.toml            [tool.sagaloom] sagas = ["shop.sagas"]

A module is a dotted name, `package.module:attribute`, or the path of a file. With an attribute, that is what is taken:
a definition, or a list, tuple, set or mapping of them. Without one, the first of `sagas`, `saga_registry`,
`sagaRegistry`, `registry`, `definitions`, `default`, `saga`, `definition` that exists is; else every definition that
is a global of the module. A module's `targets`, if it has that list, come along.

A module may hold entries of `sagaloom.config`, alone, in groups, or in lists, beside sagas or in place of them. Each
brings the saga of its entrypoint along, and that saga is run as the entry says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeGuard, cast

from sagaloom.config import SagaConfigBuilder, SagaConfigEntry, SagaConfigGroup, configured
from sagaloom.definitions import SagaDefinition
from sagaloom.errors import ConfigurationError
from sagaloom.modules import ModuleKind, attribute_of, import_named, modules_named
from sagaloom.ports.targets import EffectTarget

__all__ = ["LoadedModules", "load_definitions", "load_modules", "named_modules"]

_COLLECTIONS: Final = ("sagas", "saga_registry", "sagaRegistry", "registry", "definitions", "default")
_SINGLES: Final = ("saga", "definition")
_CONFIGURATION: Final = (SagaConfigEntry, SagaConfigGroup)
_SAGAS: Final = ModuleKind(
    noun="saga", variable="SAGAS_REGISTRY_MODULE", section="sagas", example="sagaloom serve shop.sagas"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModules:
    """What was found: the definitions in the order of their modules, each once, and the targets that came along."""

    definitions: tuple[SagaDefinition[Any], ...]
    targets: tuple[EffectTarget, ...]
    modules: tuple[str, ...]


def load_definitions(
    modules: Sequence[str] = (), *, env: Mapping[str, str] | None = None, directory: Path | None = None
) -> LoadedModules:
    """Loads what `named_modules` names. Raises `ConfigurationError` when nothing is named, a module cannot be loaded
    or holds no saga, and when two different sagas claim one id."""
    return load_modules(named_modules(modules, env=env, directory=directory), directory=directory)


def named_modules(
    modules: Sequence[str] = (), *, env: Mapping[str, str] | None = None, directory: Path | None = None
) -> tuple[str, ...]:
    """The modules to load: `modules`, else `SAGAS_REGISTRY_MODULE`, else `[tool.sagaloom] sagas` in pyproject.toml."""
    return modules_named(_SAGAS, modules, env=env, directory=directory)


def load_modules(names: Iterable[str], *, directory: Path | None = None) -> LoadedModules:
    """Imports each of `names` and takes what it exports. Dotted names are looked up in `directory` (by default the
    current one) too, as `python -m` does."""
    loading = _Loading(directory)
    for name in names:
        loading.load(name)
    return loading.loaded()


class _Loading:
    """What has been found so far."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._definitions: dict[str, tuple[SagaDefinition[Any], str]] = {}
        self._entries: dict[str, tuple[SagaConfigEntry, str]] = {}
        self._targets: dict[int, EffectTarget] = {}
        self._modules: list[str] = []

    def load(self, name: str) -> None:
        """Takes what the module `name` exports, and what the entries among it point to."""
        module, attribute = import_named(_SAGAS, name, directory=self._directory)
        entries = _entries_of(module, attribute, name)
        for definition in _definitions_of(module, attribute, name, are_needed=not entries):
            self._add(definition, name)
        for entry in entries:
            known, where = self._entries.setdefault(entry.id, (entry, name))
            if known != entry:
                raise ConfigurationError(
                    f"two configurations are for the saga {entry.id!r}: one in {where}, one in {name}; keep one"
                )
            if entry.id not in self._definitions:
                self._add(self._saga_of(entry, name), name)
        for target in _targets_of(module, name):
            self._targets.setdefault(id(target), target)
        self._modules.append(name)

    def loaded(self) -> LoadedModules:
        return LoadedModules(
            definitions=tuple(
                configured(definition, self._entries[saga_id][0]) if saga_id in self._entries else definition
                for saga_id, (definition, _) in self._definitions.items()
            ),
            targets=tuple(self._targets.values()),
            modules=tuple(self._modules),
        )

    def _add(self, definition: SagaDefinition[Any], name: str) -> None:
        known, where = self._definitions.setdefault(definition.id, (definition, name))
        if known is not definition and known.fingerprint != definition.fingerprint:
            raise ConfigurationError(
                f"two different sagas have the id {definition.id!r}: one in {where}, one in {name}; rename one"
            )

    def _saga_of(self, entry: SagaConfigEntry, name: str) -> SagaDefinition[Any]:
        module, attribute = import_named(_SAGAS, entry.entrypoint, directory=self._directory)
        for target in _targets_of(module, entry.entrypoint):
            self._targets.setdefault(id(target), target)
        found = _definitions_of(module, attribute, entry.entrypoint)
        for definition in found:
            if definition.id == entry.id:
                return definition
        raise ConfigurationError(
            f"Saga registry module {name} has a configuration for the saga {entry.id!r}, and its entrypoint "
            f"{entry.entrypoint} has no such saga: it has {', '.join(each.id for each in found)}"
        )


def _entries_of(module: ModuleType, attribute: str | None, name: str) -> list[SagaConfigEntry]:
    """The entries that a module holds, alone, in groups or in lists. One that stands in a group is what that has made
    of it, although it is a global of its own as well."""
    values = vars(module).values() if attribute is None else [attribute_of(_SAGAS, module, attribute, name=name)]
    alone: dict[str, SagaConfigEntry] = {}
    grouped: dict[str, SagaConfigEntry] = {}
    for value in values:
        for part in cast("Sequence[object]", value) if isinstance(value, (list, tuple)) else (value,):
            if isinstance(part, SagaConfigBuilder):
                raise ConfigurationError(f"Saga registry module {name} holds {part!r}: finish it with .build()")
            if isinstance(part, SagaConfigGroup):
                for entry in part.sagas:
                    _put(grouped, entry, name)
            elif isinstance(part, SagaConfigEntry):
                _put(alone, part, name)
    return list({**alone, **grouped}.values())


def _put(entries: dict[str, SagaConfigEntry], entry: SagaConfigEntry, name: str) -> None:
    if entries.setdefault(entry.id, entry) != entry:
        raise ConfigurationError(f"Saga registry module {name} has two configurations for saga {entry.id!r}: keep one")


def _definitions_of(
    module: ModuleType, attribute: str | None, name: str, *, are_needed: bool = True
) -> list[SagaDefinition[Any]]:
    if attribute is not None:
        value = attribute_of(_SAGAS, module, attribute, name=name)
        return _checked(value, name, attribute, are_needed=are_needed)
    exported = vars(module)
    for export in (*_COLLECTIONS, *_SINGLES):
        # `from . import registry` puts a module under that name; it is no export of definitions.
        if export in exported and not isinstance(exported[export], ModuleType):
            return _checked(exported[export], name, export, are_needed=are_needed)
    found = {id(value): value for value in exported.values() if _is_definition(value)}
    if not found and are_needed:
        raise ConfigurationError(
            f"Saga registry module {name} must export sagas, saga_registry, registry, definitions, or default, "
            "or have saga definitions among its globals."
        )
    return list(found.values())


def _is_definition(value: object) -> TypeGuard[SagaDefinition[Any]]:
    return isinstance(value, SagaDefinition)


def _checked(value: object, name: str, export: str, *, are_needed: bool) -> list[SagaDefinition[Any]]:
    if _is_definition(value):
        return [value]
    if isinstance(value, _CONFIGURATION):
        return []
    if isinstance(value, Mapping):
        entries = list(cast("Mapping[Any, object]", value).values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        entries = list(cast("Iterable[object]", value))
    else:
        raise ConfigurationError(
            f"Saga registry module {name}: {export} must be a saga definition, or a list or mapping of them, "
            f"got {type(value).__name__}"
        )
    entries = [entry for entry in entries if not isinstance(entry, _CONFIGURATION)]
    for entry in entries:
        if not _is_definition(entry):
            raise ConfigurationError(
                f"Saga registry module {name} contains a non-SagaDefinition entry in {export}: {entry!r:.80}; "
                "did you forget .build()?"
            )
    if not entries and are_needed:
        raise ConfigurationError(f"Saga registry module {name}: {export} is empty")
    return cast("list[SagaDefinition[Any]]", entries)


def _targets_of(module: ModuleType, name: str) -> list[EffectTarget]:
    value: object = vars(module).get("targets", ())
    if isinstance(value, ModuleType):
        return []
    if not isinstance(value, (list, tuple)):
        raise ConfigurationError(f"Saga registry module {name}: targets must be a list, got {type(value).__name__}")
    for target in cast("Sequence[object]", value):
        if not isinstance(target, EffectTarget):
            raise ConfigurationError(
                f"Saga registry module {name}: targets contains {target!r:.80}, which has no kind, deliver and close; "
                "write callable_target(kind, function)"
            )
    return list(cast("Sequence[EffectTarget]", value))
