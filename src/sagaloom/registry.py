"""Loading saga definitions by name: which modules, and what is picked up from them.

Modules are named by the first of these that is given:

    the command line          sagaloom serve shop.sagas shop/orders.py shop.registry:sagas
    SAGAS_REGISTRY_MODULE     one or more of the same, with commas between them
    pyproject.toml            [tool.sagaloom] sagas = ["shop.sagas"]

A module is a dotted name, `package.module:attribute`, or the path of a file. With an attribute, that is what is taken:
a definition, or a list, tuple, set or mapping of them. Without one, the first of `sagas`, `saga_registry`,
`sagaRegistry`, `registry`, `definitions`, `default`, `saga`, `definition` that exists is; else every definition that
is a global of the module. A module's `targets`, if it has that list, come along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeGuard, cast

from sagaloom.definitions import SagaDefinition
from sagaloom.errors import ConfigurationError
from sagaloom.modules import ModuleKind, attribute_of, import_named, modules_named
from sagaloom.ports.targets import EffectTarget

__all__ = ["LoadedModules", "load_definitions", "load_modules", "named_modules"]

_COLLECTIONS: Final = ("sagas", "saga_registry", "sagaRegistry", "registry", "definitions", "default")
_SINGLES: Final = ("saga", "definition")
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
    definitions: dict[str, tuple[SagaDefinition[Any], str]] = {}
    targets: dict[int, EffectTarget] = {}
    loaded: list[str] = []
    for name in names:
        module, attribute = import_named(_SAGAS, name, directory=directory)
        for definition in _definitions_of(module, attribute, name):
            known, where = definitions.setdefault(definition.id, (definition, name))
            if known is not definition and known.fingerprint != definition.fingerprint:
                raise ConfigurationError(
                    f"two different sagas have the id {definition.id!r}: one in {where}, one in {name}; rename one"
                )
        for target in _targets_of(module, name):
            targets.setdefault(id(target), target)
        loaded.append(name)
    return LoadedModules(
        definitions=tuple(definition for definition, _ in definitions.values()),
        targets=tuple(targets.values()),
        modules=tuple(loaded),
    )


def _definitions_of(module: ModuleType, attribute: str | None, name: str) -> list[SagaDefinition[Any]]:
    if attribute is not None:
        return _checked(attribute_of(_SAGAS, module, attribute, name=name), name, attribute)
    exported = vars(module)
    for export in (*_COLLECTIONS, *_SINGLES):
        # `from . import registry` puts a module under that name; it is no export of definitions.
        if export in exported and not isinstance(exported[export], ModuleType):
            return _checked(exported[export], name, export)
    found = {id(value): value for value in exported.values() if _is_definition(value)}
    if not found:
        raise ConfigurationError(
            f"Saga registry module {name} must export sagas, saga_registry, registry, definitions, or default, "
            "or have saga definitions among its globals."
        )
    return list(found.values())


def _is_definition(value: object) -> TypeGuard[SagaDefinition[Any]]:
    return isinstance(value, SagaDefinition)


def _checked(value: object, name: str, export: str) -> list[SagaDefinition[Any]]:
    if _is_definition(value):
        return [value]
    if isinstance(value, Mapping):
        entries = list(cast("Mapping[Any, object]", value).values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        entries = list(cast("Iterable[object]", value))
    else:
        raise ConfigurationError(
            f"Saga registry module {name}: {export} must be a saga definition, or a list or mapping of them, "
            f"got {type(value).__name__}"
        )
    for entry in entries:
        if not _is_definition(entry):
            raise ConfigurationError(
                f"Saga registry module {name} contains a non-SagaDefinition entry in {export}: {entry!r:.80}; "
                "did you forget .build()?"
            )
    if not entries:
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
