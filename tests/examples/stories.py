"""The stories of `examples`, by the name of their module."""

from __future__ import annotations

from typing import Final

STORIES: Final = (*("orders", "transfers", "travel", "subscriptions", "approvals", "campaigns", "quotes", "upgrade"),)
