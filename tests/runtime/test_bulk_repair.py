"""Many dead letters at once: chosen by id or by filter, repaired oldest first, each for itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sagaloom import SagasError, define_saga, send
from sagaloom.errors import BackendUnavailable, MessageRejected
from tests.runtime.conftest import Bench, Life

pytestmark = pytest.mark.anyio


class Handler:
    """Gives up whatever comes, until it is mended."""

    is_mended = False

    def __call__(self, saga: Any, event: Any, context: Any) -> list[Any]:
        if not self.is_mended:
            raise SagasError("broken", retryable=False)
        saga.state = {"seen": [*saga.state["seen"], event.payload["n"]]}
        return []


def _sagas(handler: Handler) -> list[Any]:
    return [
        define_saga("one").state({"seen": []}).on("One", handler).build(),
        define_saga("two").state({"seen": []}).on("Two", handler).build(),
    ]


async def _given_up(life: Life, bench: Bench) -> None:
    """Nine dead letters: one:a 0, one:b 1, two:a 2, one:a 3, ..."""
    for n in range(9):
        message_type, key = [("One", "a"), ("One", "b"), ("Two", "a")][n % 3]
        await life.publish(message_type, {"n": n}, key=key, id=f"m-{n}")
        bench.clock.advance("1s")


async def _seen(life: Life, saga_id: str, key: str) -> list[int]:
    seen: list[int] = json.loads((await life.instance(saga_id, key)).state)["seen"]
    return seen


async def test_redriven_together_messages_of_one_instance_keep_their_order(bench: Bench) -> None:
    handler = Handler()
    life = await bench.live(*_sagas(handler))
    await _given_up(life, bench)
    handler.is_mended = True

    result = await life.runtime.redrive_many()
    await life.runtime.settled()

    assert (len(result.done), result.troubles, result.has_more) == (9, (), False)
    assert [await _seen(life, *where) for where in (("one", "a"), ("one", "b"), ("two", "a"))] == [
        [0, 3, 6],
        [1, 4, 7],
        [2, 5, 8],
    ]
    assert await life.runtime.dead_letters() == []


@pytest.mark.parametrize(
    ("filter", "left"),
    [
        ({"saga_id": "one"}, ["m-8", "m-5", "m-2"]),
        ({"saga_id": "one", "key": "a"}, ["m-8", "m-7", "m-5", "m-4", "m-2", "m-1"]),
        ({"key": "a"}, ["m-7", "m-4", "m-1"]),
        ({"saga_id": "none"}, [f"m-{n}" for n in range(8, -1, -1)]),
        ({}, []),
    ],
)
async def test_a_filter_says_which_are_discarded(bench: Bench, filter: dict[str, str], left: list[str]) -> None:
    life = await bench.live(*_sagas(Handler()))
    await _given_up(life, bench)

    result = await life.runtime.discard_many(saga_id=filter.get("saga_id"), key=filter.get("key"))

    assert len(result.done) == 9 - len(left)
    letters = await life.runtime.dead_letters()
    assert [letter.envelope.id for letter in letters if letter.envelope is not None] == left
    again = await life.publish("One", {"n": 0}, key="a", id="m-0")
    assert again.disposition == ("duplicate" if "m-0" in left else "dead_lettered")


async def test_a_limit_takes_the_oldest_and_says_that_there_are_more(bench: Bench) -> None:
    life = await bench.live(*_sagas(Handler()))
    await _given_up(life, bench)

    results = [await life.runtime.discard_many(limit=4) for _ in range(3)]

    assert [(len(result.done), result.has_more) for result in results] == [(4, True), (4, True), (1, False)]
    assert list(results[0].done) == sorted(results[0].done)
    assert max(results[0].done) < min(results[1].done)


async def test_what_is_not_there_is_trouble_and_keeps_no_other(bench: Bench) -> None:
    life = await bench.live(*_sagas(Handler()))
    await _given_up(life, bench)
    letter, *_ = await life.runtime.dead_letters()

    result = await life.runtime.discard_many(ids=["dl-none", letter.id, letter.id])

    assert result.done == (letter.id,)
    assert [(trouble.id, trouble.error.code) for trouble in result.troubles] == [("dl-none", "DEAD_LETTER_NOT_FOUND")]
    assert len(await life.runtime.dead_letters()) == 8


async def test_effects_and_messages_are_redriven_together(bench: Bench) -> None:
    handler = Handler()
    mail = (
        define_saga("mail").state({}).on("Mail", lambda saga, event, context: [send("service:mail", {"n": 1})]).build()
    )
    bench.receiver.answer = lambda effect: SagasError("no mailbox", retryable=False)
    life = await bench.live(*_sagas(handler), mail)
    await life.publish("Mail", key="k")
    await life.publish("One", {"n": 1}, key="a")
    await life.runtime.settled()
    handler.is_mended = True
    bench.receiver.answer = lambda effect: ()

    result = await life.runtime.redrive_many()
    await life.runtime.settled()

    assert len(result.done) == 2
    assert (await _seen(life, "one", "a"), len(bench.receiver.got)) == ([1], 2)


@pytest.mark.parametrize("limit", [0, 1_001])
async def test_a_limit_out_of_bounds_is_refused(bench: Bench, limit: int) -> None:
    life = await bench.live(*_sagas(Handler()))

    with pytest.raises(MessageRejected, match=f"limit {limit}"):
        await life.runtime.redrive_many(limit=limit)


async def test_ids_with_a_filter_or_too_many_ids_are_refused(bench: Bench) -> None:
    life = await bench.live(*_sagas(Handler()))
    await _given_up(life, bench)
    (letter, *_) = await life.runtime.dead_letters()

    with pytest.raises(MessageRejected, match="ambiguous"):
        await life.runtime.discard_many(ids=[letter.id], saga_id="one")
    with pytest.raises(MessageRejected, match="1001 dead letters"):
        await life.runtime.discard_many(ids=[letter.id] * 1_001)

    assert len(await life.runtime.dead_letters()) == 9


async def test_a_runtime_that_is_not_running_repairs_nothing(bench: Bench) -> None:
    life = await bench.live(*_sagas(Handler()))
    await _given_up(life, bench)
    await life.runtime.stop()

    with pytest.raises(BackendUnavailable):
        await life.runtime.discard_many()
