"""Finding modules by name and importing them, whatever they hold: sagas, jobs.

Modules are named by the first of these that is given: the command line; a variable, with commas between them; a list
in pyproject.toml. A module is a dotted name, `package.module:attribute`, or the path of a file.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from sagaloom.errors import ConfigurationError

__all__ = ["ModuleKind", "attribute_of", "import_named", "module_at", "modules_named", "names_in_project"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleKind:
    """What modules are expected to hold (a `noun`, in the singular), and where they are named: an environment
    `variable`, a `section` under `[tool.sagaloom]`, and on the command line as in `example`."""

    noun: str
    variable: str
    section: str
    example: str

    @property
    def label(self) -> str:
        """What errors call such a module."""
        return f"{self.noun.capitalize()} registry module"


def modules_named(
    kind: ModuleKind,
    modules: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> tuple[str, ...]:
    """The modules to load: `modules`, else those that the environment names, else those in pyproject.toml. Raises
    `ConfigurationError` when there are none."""
    if modules:
        return tuple(modules)
    from_environment = (os.environ if env is None else env).get(kind.variable, "")
    if names := tuple(name for part in from_environment.split(",") if (name := part.strip())):
        return names
    project = (directory if directory is not None else Path.cwd()) / "pyproject.toml"
    if names := names_in_project(project, kind.section):
        return names
    raise ConfigurationError(
        f"no {kind.noun} modules named: give them on the command line ({kind.example}), or set "
        f"{kind.variable}, or write [tool.sagaloom] {kind.section} = [...] in {project}"
    )


def import_named(kind: ModuleKind, name: str, *, directory: Path | None = None) -> tuple[ModuleType, str | None]:
    """The module that `name` names, and the attribute in it, if it names one. Dotted names are looked up in `directory`
    (by default the current one) too, as `python -m` does. Raises `ConfigurationError` for what cannot be imported."""
    folder = (directory if directory is not None else Path.cwd()).resolve()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    module_name, attribute = _split(name)
    return _import(kind.label, module_name, folder), attribute


def module_at(name: str, file: str | None) -> ModuleType:
    """The module that another process has told us of: by its name, or from the file that it was loaded from. Raises
    `ConfigurationError`."""
    return _import("module", file or name, Path.cwd())


def attribute_of(kind: ModuleKind, module: ModuleType, attribute: str, *, name: str) -> object:
    """What `attribute`, which may have dots, is in `module`. `name` is what the user wrote."""
    value: object = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise ConfigurationError(f"{kind.label} {name}: {module.__name__} has no {attribute!r}")
        value = getattr(value, part)
    return value


def names_in_project(project: Path, name: str) -> tuple[str, ...]:
    """The modules that a pyproject.toml names in `[tool.sagaloom]` under `name`, if it does. Raises
    `ConfigurationError` for one that cannot be read."""
    try:
        document = tomllib.loads(project.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{project} cannot be read: {error}") from error
    section: object = document.get("tool", {}).get("sagaloom", {}).get(name, [])
    names: object = [section] if isinstance(section, str) else section
    if not isinstance(names, list) or not all(isinstance(one, str) and one.strip() for one in cast("Any", names)):
        raise ConfigurationError(
            f"{project}: [tool.sagaloom] {name} must be a list of module names, got {section!r:.80}"
        )
    return tuple(one.strip() for one in cast("list[str]", names))


def _split(name: str) -> tuple[str, str | None]:
    """A drive letter's colon is no separator: an attribute is an identifier, with dots, at the end."""
    match = re.fullmatch(r"(.{2,}):([A-Za-z_][\w.]*)", name, re.DOTALL)
    return (match[1], match[2]) if match else (name, None)


def _import(label: str, name: str, folder: Path) -> ModuleType:
    try:
        if name.endswith(".py") or "/" in name or os.sep in name:
            return _import_file(label, folder / name)
        return importlib.import_module(name)
    except ConfigurationError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigurationError(
                f"{label} {name} was not found: looked in {folder} and in the installed packages"
            ) from error
        raise ConfigurationError(f"{label} {name} needs a module that is missing: {error}") from error
    except (Exception, SystemExit) as error:  # a script may end itself; that shall not end us without a word
        raise ConfigurationError(f"{label} {name} cannot be loaded: {type(error).__name__}: {error}") from error


def _import_file(label: str, path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ConfigurationError(f"{label} {path} was not found: there is no such file")
    # Two files of one name in different folders are two modules.
    module_name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}".replace("-", "_")
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{label} {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Before running it: dataclasses and pickled names look their module up by name.
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
