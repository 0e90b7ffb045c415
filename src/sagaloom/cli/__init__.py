"""The command line: `sagaloom --help` says what there is.

Every command prints what people read, or JSON with `--json`; says in one line on stderr why it did not work; and then
ends with a code that is not 0.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """The console script `sagaloom`."""
    from sagaloom.cli.app import app
    from sagaloom.cli.client import CommandFailed
    from sagaloom.errors import SagasError

    try:
        app()
    except SagasError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, CommandFailed) else 1)
