"""How long a test waits for what must come, before it calls it missing.

What comes as it should comes at once, so a large number costs nothing; a small one fails on a machine that has other
things to do.
"""

__all__ = ["PATIENCE_SECONDS"]

PATIENCE_SECONDS = 60.0
