"""Two definitions have one fingerprint exactly when they say the same."""

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from sagaloom import RetryPolicy, define_saga, saga_complete, saga_fail

MODULE = """
from sagaloom import define_saga, saga_complete

TYPES = {"a", "b", "c"}

def placed(saga, event, context):
    if event.payload["kind"] in {"x", "y", "z", "w"}:
        return []
    return [saga_complete([lambda: 1.5, b"x", ..., (1, None)])]

saga = (
    define_saga("order")
    .state({"status": "new"})
    .correlate(lambda message: message.payload["id"])
    .on("OrderPlaced", placed)
    .build()
)
"""


@dataclass
class Payload:
    id: str


def handler(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_complete()]


def other(saga: Any, event: Any, context: Any) -> list[Any]:
    return [saga_fail("no")]


def made(value: object) -> Callable[[Any, Any, Any], list[Any]]:
    def closure(saga: Any, event: Any, context: Any) -> list[Any]:
        return [saga_complete(value)]

    return closure


def defaulted(value: object) -> Callable[..., list[Any]]:
    def with_default(saga: Any, event: Any, context: Any, result: object = value) -> list[Any]:
        return [saga_complete(result)]

    return with_default


class Callable3:
    def __call__(self, saga: Any, event: Any, context: Any) -> list[Any]:
        return []


READY: Any = define_saga("order").state({"status": "new"})


def of(stage: Any) -> str:
    fingerprint: str = stage.build().fingerprint
    return fingerprint


VARIANTS: dict[str, Callable[[], Any]] = {
    "plain": lambda: READY.on("A", handler),
    "id": lambda: define_saga("other").state({"status": "new"}).on("A", handler),
    "initial state": lambda: define_saga("order").state({"status": "old"}).on("A", handler),
    "state type": lambda: define_saga("order").state(Payload("new")).on("A", handler),
    "type": lambda: READY.on("B", handler),
    "payload": lambda: READY.on("A", handler, payload=Payload),
    "starts": lambda: READY.on("A", handler, starts=False),
    "on_missing": lambda: READY.on("A", handler, on_missing="discard"),
    "handler": lambda: READY.on("A", other),
    "closure 1": lambda: READY.on("A", made(1)),
    "closure 2": lambda: READY.on("A", made(2)),
    "closure 1.0": lambda: READY.on("A", made(1.0)),
    "closure function": lambda: READY.on("A", made(handler)),
    "default 1": lambda: READY.on("A", defaulted(1)),
    "default 2": lambda: READY.on("A", defaulted(2)),
    "partial 1": lambda: READY.on("A", functools.partial(defaulted(1), result=1)),
    "partial 2": lambda: READY.on("A", functools.partial(defaulted(1), result=2)),
    "callable": lambda: READY.on("A", Callable3()),
    "two handlers": lambda: READY.on("A", handler).on("B", handler),
    "two handlers, other order": lambda: READY.on("B", handler).on("A", handler),
    "compensation": lambda: READY.on("A", handler).compensate("A", handler),
    "rule": lambda: READY.on("A", handler).correlate(lambda message: "a"),
    "other rule": lambda: READY.on("A", handler).correlate(lambda message: "b"),
    "rule of a type": lambda: READY.on("A", handler).correlate("A", lambda message: "a"),
    "retry": lambda: READY.on("A", handler).retry(RetryPolicy(maximum_attempts=1)),
    "reuse": lambda: READY.on("A", handler).reuse("new_run"),
    "singleton": lambda: READY.on("A", handler).singleton(),
    "tier": lambda: READY.on("A", handler).durability("t2"),
    "version": lambda: READY.on("A", handler).version(2),
    "migration": lambda: READY.on("A", handler).version(2, migrate={1: lambda state: state}),
    "other migration": lambda: READY.on("A", handler).version(2, migrate={1: lambda state: {**state}}),
    "invariant": lambda: READY.on("A", handler).invariant("i", lambda state: True),
    "schedule": lambda: READY.on("A", handler).schedule("0 3 * * *", message="A"),
    "schedule at another time": lambda: READY.on("A", handler).schedule("0 4 * * *", message="A"),
    "schedule in another zone": lambda: READY.on("A", handler).schedule(
        "0 3 * * *", message="A", timezone="Asia/Tokyo"
    ),
    "schedule with another policy": lambda: READY.on("A", handler).schedule("0 3 * * *", message="A", catch_up="all"),
    "scheduled payload": lambda: READY.on("A", handler).schedule("0 3 * * *", message={"type": "A", "payload": 1}),
    "timeout": lambda: READY.on("A", handler).timeout("5m", message="A"),
    "longer timeout": lambda: READY.on("A", handler).timeout("6m", message="A"),
    "timeout of another name": lambda: READY.on("A", handler).timeout("5m", message="A", name="late"),
    "other invariant": lambda: READY.on("A", handler).invariant("j", lambda state: True),
}


def test_any_difference_makes_another_fingerprint() -> None:
    fingerprints = {name: of(build()) for name, build in VARIANTS.items()}

    assert len(VARIANTS) == len(set(fingerprints.values()))


@pytest.mark.parametrize("name", VARIANTS)
def test_building_the_same_again_gives_the_same_fingerprint(name: str) -> None:
    assert of(VARIANTS[name]()) == of(VARIANTS[name]())


def test_running_a_handler_does_not_change_the_fingerprint() -> None:
    before = of(READY.on("A", handler))

    for _ in range(1_000):  # enough for the interpreter to specialise its bytecode
        handler(None, None, None)

    assert before == of(READY.on("A", handler))


def test_a_function_that_closes_over_itself_has_a_fingerprint() -> None:
    def recursive(saga: Any, event: Any, context: Any) -> list[Any]:
        return recursive(saga, event, context)

    assert len(of(READY.on("A", recursive))) == 64


def test_another_process_another_place_and_other_hash_seeds_give_the_same_fingerprint(tmp_path: Any) -> None:
    fingerprints = set()
    for seed in ("1", "2"):
        folder = tmp_path / f"place{seed}"
        folder.mkdir()
        (folder / "sagas.py").write_text("\n" * int(seed) + MODULE)
        fingerprints.add(
            subprocess.run(
                [sys.executable, "-c", "import sagas; print(sagas.saga.fingerprint)"],
                cwd=folder,
                env={"PYTHONHASHSEED": seed},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )

    assert len(fingerprints) == 1
