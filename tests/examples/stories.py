"""The stories of `examples`, by the name of their module, and the stores that they are told on."""

from __future__ import annotations

from typing import Final

STORIES: Final = (*("orders", "transfers", "travel", "subscriptions", "approvals", "campaigns", "quotes", "upgrade"),)
STORES: Final = {"file": "a file", "postgres": "PostgreSQL"}
