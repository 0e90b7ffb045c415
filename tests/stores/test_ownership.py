"""The lock of a store file: one live process, and none that is dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sagaloom.errors import BackendUnavailable, ConfigurationError
from sagaloom.kv.ownership import OwnerLock, StoreInUse

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")

HOLD = """
import sys
from sagaloom.kv.ownership import OwnerLock
lock = OwnerLock(sys.argv[1])
lock.take("worker-1")
print("taken", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "saga.db"


@pytest.fixture
def other(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_has_the_store_and_what_to_do(path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(StoreInUse) as caught:
        OwnerLock(path).take("worker-2")

    assert f"process {other.pid} (worker-1)" in caught.value.message
    assert f"kill {other.pid}" in caught.value.message
    assert caught.value.data == {"path": str(path), "pid": other.pid, "holder": "worker-1"}
    assert isinstance(caught.value, BackendUnavailable)
    assert caught.value.retryable
    assert caught.value.code == "STORE_IN_USE"


def test_a_killed_process_lets_go_at_once(path: Path, other: subprocess.Popen[str]) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()

    lock = OwnerLock(path)
    lock.take("worker-2")

    assert lock.is_taken
    lock.free()


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(path: Path) -> None:
    code = HOLD.replace(
        'print("taken", flush=True)',
        "import os\nif os.fork() == 0:\n    print(os.getpid(), flush=True)\n    sys.stdin.read()\n    os._exit(0)",
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        parent.wait()
        os.kill(child, 0)  # The child lives on.

        lock = OwnerLock(path)
        lock.take("worker-2")

        assert lock.is_taken
        lock.free()
        assert parent.stdin is not None
        parent.stdin.close()


def test_two_locks_of_one_process_exclude_each_other(path: Path) -> None:
    first, second = OwnerLock(path), OwnerLock(path)
    first.take("worker-1")

    with pytest.raises(StoreInUse, match="this very process"):
        second.take("worker-2")

    first.free()
    second.take("worker-2")
    second.free()


def test_taking_and_freeing_twice_is_no_error(path: Path) -> None:
    lock = OwnerLock(path)

    lock.take("worker-1")
    lock.take("worker-1")
    lock.free()
    lock.free()

    assert not lock.is_taken


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nowhere"):
        OwnerLock(tmp_path / "nowhere" / "saga.db").take("worker-1")


def test_the_lock_file_stays_when_the_lock_is_free(path: Path) -> None:
    lock = OwnerLock(path)
    lock.take("worker-1")
    lock.free()

    assert Path(f"{path}.owner").read_text() == ""
