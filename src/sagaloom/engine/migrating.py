"""The state of a run, in the version of the loaded definition.

A run carries the version of the definition that wrote its state. An older state is brought up version by version, each
by the migration that the saga has for it, when somebody needs it: the next message, a query, an operator's migrate.
What comes out must be a state of the wanted version. It is stored when something is applied, and else forgotten.

    written by the same version     taken as it is
    written by an older version     migrated; without a migration, or when one fails, refused until somebody mends it
    written by a newer version      `MadeByNewer`: nobody's fault, and a worker with that version can take it

A migration is a plain function of the old state as JSON, for the types that it was read into may be gone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import msgspec

from sagaloom.codec import encode_any
from sagaloom.definitions import SagaDefinition
from sagaloom.engine.ledger import Refused
from sagaloom.engine.records import Instance
from sagaloom.engine.retrying import USER_ERRORS, describe, has_to_be_awaited, traceback_text
from sagaloom.engine.transition import STATE_UNREADABLE
from sagaloom.errors import SagasError
from sagaloom.ids import instance_id

__all__ = ["MadeByNewer", "initial_state", "migrated", "readable_state"]

MIGRATION_FAILED: Final = "SAGA_MIGRATION_FAILED"


class MadeByNewer(Exception):
    """The stored state belongs to a newer version of the definition than this worker has."""


@lru_cache(maxsize=1024)
def initial_state(definition: SagaDefinition[Any]) -> bytes:
    try:
        return definition.state_codec.encode(definition.initial_state)
    except SagasError as error:
        raise Refused(
            f"saga {definition.id!r}: its initial state cannot be stored: {error.message}",
            code=error.code,
        ) from error


def readable_state(definition: SagaDefinition[Any], instance: Instance) -> bytes:
    """The state of a run, in the definition's version."""
    return instance.state if instance.def_version == definition.version else migrated(definition, instance)


def migrated(definition: SagaDefinition[Any], instance: Instance) -> bytes:
    """The stored state, brought up from its version to the definition's."""
    saga_id, stored, wanted = definition.id, instance.def_version, definition.version
    name = instance_id(saga_id, instance.key, instance.run)
    if stored > wanted:
        raise MadeByNewer(
            f"the state of {name!r} was written by version {stored} of saga {saga_id!r}, and this worker has version "
            f"{wanted}: a worker with version {stored} or newer must take it"
        )
    try:
        state: Any = msgspec.json.decode(instance.state)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused(
            f"saga {saga_id!r}: the stored state of {name!r} is no JSON: {error}", code=STATE_UNREADABLE
        ) from error
    for version in range(stored, wanted):
        migrate = definition.migrations.get(version)
        if migrate is None:
            raise Refused(
                f"saga {saga_id!r}: the state of {name!r} has version {stored}, and no migration leads from version "
                f"{version} to {version + 1}: add it to .version({wanted}, migrate={{{version}: ...}}), and redrive",
                code=MIGRATION_FAILED,
            )
        try:
            state = migrate(state)
        except USER_ERRORS as error:
            refused = Refused(
                f"saga {saga_id!r}: the migration of {name!r} from version {version} to {version + 1} raised "
                f"{describe(error)}",
                code=MIGRATION_FAILED,
            )
            refused.traceback = traceback_text(error)
            raise refused from error
        if has_to_be_awaited(state):
            raise Refused(
                f"saga {saga_id!r}: the migration of {name!r} from version {version} to {version + 1} returned "
                f"{type(state).__name__}, which has to be awaited: a migration is a plain function of the old state",
                code=MIGRATION_FAILED,
            )
    try:
        encoded = encode_any(state)
    except SagasError as error:
        raise Refused(
            f"saga {saga_id!r}: the state of {name!r}, migrated to version {wanted}, cannot be written as JSON: "
            f"{error.message}",
            code=MIGRATION_FAILED,
        ) from error
    try:
        read: object = definition.state_codec.decode(encoded)
        # A state without a declared type takes any JSON, and yet it is a dict.
        trouble = (
            f"got {type(read).__name__}" if isinstance(definition.initial_state, dict) != isinstance(read, dict) else ""
        )
    except SagasError as error:
        trouble = error.message
    if trouble:
        raise Refused(
            f"saga {saga_id!r}: the migration of {name!r} from version {stored} returned what is no state of version "
            f"{wanted}: {trouble}",
            code=MIGRATION_FAILED,
        )
    return encoded
