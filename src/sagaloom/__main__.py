"""`python -m sagaloom` is the command `sagaloom`."""

from __future__ import annotations

from sagaloom.cli import main

if __name__ == "__main__":
    main()
