"""Every queue broker of the package, held to the contract that users get too, against the real thing."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sagaloom.ports.queue import QueueBroker
from sagaloom.queue.providers import BrokerOptions, QueueConnectionOptions, QueueProvider, opener_of
from sagaloom.testing.contracts.queue import OpenBroker, QueueContract


class TestKvQueue(QueueContract):
    @pytest.fixture
    def open_broker(self, tmp_path: Path) -> OpenBroker:
        connection = QueueConnectionOptions(kv=tmp_path / "queues.db")

        async def open_broker(queue: str, max_length: int | None = None) -> QueueBroker:
            return await opener_of(QueueProvider.KV, queue, connection, BrokerOptions(max_length=max_length))()

        return open_broker


class TestRedisQueue(QueueContract):
    @pytest.fixture
    async def namespace(self, redis_url: str) -> AsyncIterator[str]:
        """A prefix of the test's own, whose keys are removed in the end."""
        from redis.asyncio import Redis

        namespace = f"sagaloom-test-{uuid.uuid4().hex}"
        yield namespace
        async with Redis.from_url(redis_url) as client:
            if keys := [key async for key in client.scan_iter(match=f"{namespace}:*", count=1000)]:
                await client.delete(*keys)

    @pytest.fixture
    def open_broker(self, redis_url: str, namespace: str) -> OpenBroker:
        connection = QueueConnectionOptions(redis=redis_url, namespace=namespace)

        async def open_broker(queue: str, max_length: int | None = None) -> QueueBroker:
            return await opener_of(QueueProvider.REDIS, queue, connection, BrokerOptions(max_length=max_length))()

        return open_broker


class TestPostgresQueue(QueueContract):
    @pytest.fixture
    async def schema(self, postgres_url: str) -> AsyncIterator[str]:
        """A schema of the test's own, which is dropped in the end."""
        import asyncpg

        schema = f"queue_test_{uuid.uuid4().hex[:16]}"
        yield schema
        connection = await asyncpg.connect(postgres_url)
        await connection.execute(f'DROP SCHEMA IF EXISTS "{schema}" CASCADE')
        await connection.close()

    @pytest.fixture
    def open_broker(self, postgres_url: str, schema: str) -> OpenBroker:
        connection = QueueConnectionOptions(postgres=postgres_url, namespace=schema)

        async def open_broker(queue: str, max_length: int | None = None) -> QueueBroker:
            return await opener_of(QueueProvider.POSTGRES, queue, connection, BrokerOptions(max_length=max_length))()

        return open_broker


class TestRabbitMQQueue(QueueContract):
    @pytest.fixture
    async def open_broker(self, rabbitmq_url: str) -> AsyncIterator[OpenBroker]:
        from sagaloom.queues.rabbitmq import RabbitMQQueueBroker

        # Names of the test's own, which are deleted in the end.
        namespace = f"sagaloom-test-{uuid.uuid4().hex[:12]}"
        connection = QueueConnectionOptions(rabbitmq=rabbitmq_url, namespace=namespace)
        opened: list[QueueBroker] = []

        async def open_broker(queue: str, max_length: int | None = None) -> QueueBroker:
            opener = opener_of(QueueProvider.RABBITMQ, queue, connection, BrokerOptions(max_length=max_length))
            opened.append(await opener())
            return opened[-1]

        yield open_broker
        for broker in opened:
            assert isinstance(broker, RabbitMQQueueBroker)
            await broker.delete()
            await broker.close()
