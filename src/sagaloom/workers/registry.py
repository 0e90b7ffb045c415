"""Loading jobs by name: which modules, and what is picked up from them.

Modules are named by the first of these that is given:

    the command line          sagaloom jobs serve shop.jobs shop/mail.py shop.registry:jobs
    JOBS_REGISTRY_MODULE      one or more of the same, with commas between them
    pyproject.toml            [tool.sagaloom] jobs = ["shop.jobs"]

A module is a dotted name, `package.module:attribute`, or the path of a file. With an attribute, that is what is taken:
a job, or a list, tuple, set or mapping of them. Without one, the first of `jobs`, `job_registry`, `jobRegistry`,
`default`, `job`, `handler` that exists is; else every job that is a global of the module.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, NamedTuple, cast

from sagaloom.errors import ConfigurationError
from sagaloom.modules import ModuleKind, attribute_of, import_named, modules_named
from sagaloom.workers.handlers import JobDefinition, is_job

__all__ = ["ModuleTrouble", "load_jobs", "load_what_is_sound"]

_JOBS: Final = ModuleKind(
    noun="job", variable="JOBS_REGISTRY_MODULE", section="jobs", example="sagaloom jobs serve shop.jobs"
)
_EXPORTS: Final = ("jobs", "job_registry", "jobRegistry", "default", "job", "handler")


class ModuleTrouble(NamedTuple):
    """A module that was named, and why nothing of it is there."""

    module: str
    error: ConfigurationError


def load_jobs(
    modules: Sequence[str] = (), *, env: Mapping[str, str] | None = None, directory: Path | None = None
) -> list[JobDefinition[Any]]:
    """The jobs of the named modules, each once. Raises `ConfigurationError` when nothing is named, a module cannot be
    loaded or holds no job, and when two different jobs claim one id."""
    jobs, troubles = load_what_is_sound(modules, env=env, directory=directory)
    if troubles:
        raise troubles[0].error
    return jobs


def load_what_is_sound(
    modules: Sequence[str] = (), *, env: Mapping[str, str] | None = None, directory: Path | None = None
) -> tuple[list[JobDefinition[Any]], list[ModuleTrouble]]:
    """The jobs of those modules that can be loaded, and what is wrong with the others: one team's mistake need not stop
    the jobs of all. Runs of what is not loaded wait for a worker that has it.

    Raises `ConfigurationError` when nothing is named, when no module can be loaded, and when two different jobs claim
    one id: which of them to run would be a guess."""
    found: dict[str, tuple[JobDefinition[Any], str]] = {}
    troubles: list[ModuleTrouble] = []
    for name in modules_named(_JOBS, modules, env=env, directory=directory):
        try:
            module, attribute = import_named(_JOBS, name, directory=directory)
            jobs = _jobs_of(module, attribute, name)
        except ConfigurationError as error:
            troubles.append(ModuleTrouble(name, error))
            continue
        for job in jobs:
            known, where = found.setdefault(job.id, (job, name))
            if known is not job:
                raise ConfigurationError(
                    f"two different jobs have the id {job.id!r}: one in {where}, one in {name}; rename one"
                )
    if not found and troubles:
        raise troubles[0].error
    return [job for job, _ in found.values()], troubles


def _jobs_of(module: ModuleType, attribute: str | None, name: str) -> list[JobDefinition[Any]]:
    if attribute is not None:
        return _checked(attribute_of(_JOBS, module, attribute, name=name), name, attribute)
    exported = vars(module)
    for export in _EXPORTS:
        # `from . import jobs` puts a module under that name; it is no export of jobs.
        if export in exported and not isinstance(exported[export], ModuleType):
            return _checked(exported[export], name, export)
    found = {id(value): value for value in exported.values() if is_job(value)}
    if not found:
        raise ConfigurationError(
            f"{_JOBS.label} {name} must export {', '.join(_EXPORTS)}, or have jobs among its globals: make one with "
            "define_job_handler(function)"
        )
    return list(found.values())


def _checked(value: object, name: str, export: str) -> list[JobDefinition[Any]]:
    if is_job(value):
        return [value]
    if isinstance(value, Mapping):
        entries = list(cast("Mapping[Any, object]", value).values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        entries = list(cast("Iterable[object]", value))
    else:
        raise ConfigurationError(
            f"{_JOBS.label} {name}: {export} must be a job, or a list or mapping of them, got {type(value).__name__}; "
            "make one with define_job_handler(function)"
        )
    for entry in entries:
        if not is_job(entry):
            raise ConfigurationError(
                f"{_JOBS.label} {name} contains an entry in {export} that is no job: {entry!r:.80}; did you forget "
                "define_job_handler?"
            )
    if not entries:
        raise ConfigurationError(f"{_JOBS.label} {name}: {export} is empty")
    return cast("list[JobDefinition[Any]]", entries)
