"""Queues over message brokers: what all of them share (`queue`, `sending`, `listening`), and a module for each broker.

Importing this package loads no broker's driver. `sagaloom.queue` puts the two together.
"""

from __future__ import annotations

from sagaloom.queues.handling import QueueContext, QueueHandler
from sagaloom.queues.queue import Queue, QueueReceipt, QueueSettings

__all__ = ["Queue", "QueueContext", "QueueHandler", "QueueReceipt", "QueueSettings"]
