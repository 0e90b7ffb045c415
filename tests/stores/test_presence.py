"""Who is alive on a store file: seen at once when killed, and in time when stopped."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sagaloom.errors import ConfigurationError
from sagaloom.kv.presence import FilePresence

if sys.platform != "win32":
    import fcntl

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no flock")

ENTER = """
import os, sys
from sagaloom.kv.presence import FilePresence
presence = FilePresence(sys.argv[1])
presence.enter("worker/1:a b")
if "fork" not in sys.argv or os.fork() == 0:
    print("entered", flush=True)
sys.stdin.read()
os._exit(0)
"""


class Hours:
    """A monotonic clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "saga.db"


@pytest.fixture
def other(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has entered."""
    yield from entered(path)


def entered(path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", ENTER, str(path), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "entered\n"
        yield process
        process.kill()


def test_one_process_sees_another_under_the_name_it_gave(path: Path, other: subprocess.Popen[str]) -> None:
    assert FilePresence(path).others() == {"worker/1:a b"}


def test_a_killed_process_is_seen_to_be_dead_at_once_and_leaves_nothing(
    path: Path, other: subprocess.Popen[str]
) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()

    assert FilePresence(path).others() == frozenset()
    assert list(path.parent.glob("saga.db.workers/*")) == []


def test_a_fork_does_not_keep_its_dead_parent_alive(path: Path) -> None:
    for parent in entered(path, "fork"):
        parent.send_signal(signal.SIGKILL)
        parent.wait()

        assert FilePresence(path).others() == frozenset()


def test_one_who_does_not_renew_is_believed_no_longer_than_its_lease(path: Path) -> None:
    clock = Hours()
    one = FilePresence(path, lease_seconds=6.0, monotonic=clock)
    two = FilePresence(path, lease_seconds=6.0, monotonic=clock)
    one.enter("one")

    clock.now += 5.9
    seen_in_time = two.others()
    clock.now += 0.2
    seen_late = two.others()
    renewed_in_time = one.renew()

    assert seen_in_time == {"one"}
    assert seen_late == frozenset()
    assert not renewed_in_time
    assert two.others() == {"one"}
    one.leave()


def test_one_who_renews_is_believed_for_good(path: Path) -> None:
    clock = Hours()
    one = FilePresence(path, lease_seconds=6.0, monotonic=clock)
    one.enter("one")

    renewals = []
    for _ in range(40):
        clock.now += 1.0
        renewals.append(one.renew())

    assert all(renewals)
    assert FilePresence(path, monotonic=clock).others() == {"one"}
    one.leave()


def test_nobody_is_its_own_other(path: Path) -> None:
    presence = FilePresence(path)
    presence.enter("one")

    assert presence.others() == frozenset()
    presence.leave()


def test_leaving_and_entering_again_is_no_error(path: Path) -> None:
    presence = FilePresence(path)
    presence.leave()
    presence.enter("one")
    presence.enter("two")

    assert FilePresence(path).others() == {"two"}
    presence.leave()
    presence.leave()
    assert FilePresence(path).others() == frozenset()


def test_one_who_enters_again_while_it_is_looked_at_stays_visible(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = FilePresence(path), FilePresence(path)
    one.enter("one")
    flock = fcntl.flock

    def flock_late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        one.enter("one")
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock_late)
    two.others()

    assert two.others() == {"one"}
    one.leave()


def test_one_who_cannot_look_takes_nobody_for_dead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = FilePresence(path), FilePresence(path)
    one.enter("one")
    two.enter("two")
    before = two.others()

    def fail(*_: object, **__: object) -> object:
        raise OSError(errno.EMFILE, "Too many open files")

    seen = []
    for name in ("open", "listdir"):
        with monkeypatch.context() as broken:
            broken.setattr(os, name, fail)
            broken.setattr(Path, "read_text", fail)
            seen.append(two.others())

    assert seen == [before, before] == [{"one"}, {"one"}]
    one.leave()
    two.leave()


def test_where_there_are_no_pipes_one_is_seen_and_cannot_be_nudged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "mkfifo", fail)
    one, two = FilePresence(path), FilePresence(path)
    one.enter("one")
    two.enter("two")
    one.nudge()

    assert two.others() == {"one"}
    assert not two.listen(lambda: None)
    one.leave()
    two.leave()


def test_a_directory_that_cannot_be_made_is_named(path: Path) -> None:
    Path(f"{path}.workers").write_text("in the way")

    with pytest.raises(ConfigurationError, match=r"saga\.db\.workers.*must be writable"):
        FilePresence(path).enter("one")
