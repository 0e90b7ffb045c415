"""Jobs as real processes: what they print, how they share work, and what is left of it when they are killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import apsw
import httpx2
import pytest

from tests.doors.test_cli import Server, environment, refusal, sagaloom, until
from tests.schemas import Schema

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="these are signals of POSIX")

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACE = f"00-{TRACE_ID}-00f067aa0ba902b7-01"

MODULE = """
import os, time
from pathlib import Path
from typing import TypedDict
from sagaloom import RetryPolicy
from sagaloom.workers import create_success_result, define_job_handler

class Work(TypedDict):
    name: str

@define_job_handler(payload=Work)
def work(ctx):
    Path(f"begun-{ctx.attempt}").write_text(str(os.getpid()))
    while not Path("go").exists():
        time.sleep(0.01)
    return create_success_result({"attempt": ctx.attempt, "pid": os.getpid()})

@define_job_handler
def greet(ctx):
    return create_success_result(f"hello {ctx.payload.get('name')}")

@define_job_handler(retry=RetryPolicy(maximum_attempts=2, initial_interval_ms=0))
def die(ctx):
    os.kill(os.getpid(), 9)
"""

SERVE = ("sagaloom", "jobs", "serve", "work_module.py", "--port", "0", "--json")


@pytest.fixture
def start(tmp_path: Path) -> Generator[Callable[..., Server]]:
    servers: list[Server] = []
    (tmp_path / "work_module.py").write_text(MODULE)

    def begin(*args: str, **env: str) -> Server:
        command = [sys.executable, "-m", *(args or SERVE)]
        servers.append(Server(command, tmp_path, environment(**({"NETSCRIPT_SAGA_STORE": "kv"} | env))))
        return servers[-1]

    yield begin
    for server in servers:
        server.kill()


def trigger(url: str, job: str, payload: Any = None, **headers: str) -> str:
    """Triggers a run, and returns its id."""
    answer = httpx2.post(
        f"{url}/api/v1/workers/jobs/{job}/trigger", json={"payload": payload or {}}, headers=headers, timeout=30
    )
    assert answer.status_code == 202, answer.text
    run_id: str = answer.json()["runId"]
    return run_id


def run_of(url: str, run_id: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx2.get(f"{url}/api/v1/workers/runs/{run_id}", timeout=30).json()
    return found


def ended(url: str, run_id: str) -> dict[str, Any]:
    """The run, once it is over."""

    def look() -> dict[str, Any] | None:
        try:
            run = run_of(url, run_id)
        except httpx2.HTTPError:
            return None  # The server is being started again.
        return run if run.get("status") in ("succeeded", "failed") else None

    found: dict[str, Any] = until(look, f"run {run_id} is over")
    return found


def stop(pid: int, directory: Path) -> None:
    """Has a process of `directory` stand still, and not in the middle of a write to its file: it would keep all others
    from that as long as it stands."""
    file = directory / ".sagaloom" / "sagas.db"
    with contextlib.ExitStack() as stack:
        if file.exists():
            connection = apsw.Connection(str(file))
            stack.callback(connection.close, force=True)  # which rolls back; there is nothing to keep
            connection.set_busy_timeout(60_000)
            connection.execute("BEGIN IMMEDIATE")
        os.kill(pid, signal.SIGSTOP)
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] == "T", f"{pid} stands still")


# --- The command line ------------------------------------------------------------------------------------------------


def test_jobs_are_listed_triggered_and_looked_at_from_the_command_line(
    tmp_path: Path, start: Callable[..., Server]
) -> None:
    server = start()

    def cli(*args: str) -> Any:
        result = sagaloom("jobs", *args, "--json", cwd=tmp_path, SAGALOOM_JOBS_URL=server.url)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    listed = cli("list")
    triggered = cli("trigger", "greet", "--payload", '{"name": "me"}', "--priority", "70", "--idempotency-key", "k")
    again = cli("trigger", "greet", "--payload", '{"name": "me"}', "--idempotency-key", "k")
    run = ended(server.url, triggered["runId"])
    shown = cli("runs", triggered["runId"])
    found = cli("runs", "--job", "greet", "--status", "succeeded")
    later = cli("trigger", "greet", "--delay", "1h")
    cancelled = cli("cancel", later["runId"], "--reason", "not needed")
    redriven = cli("redrive", later["runId"])
    table = sagaloom("jobs", "runs", cwd=tmp_path, SAGALOOM_JOBS_URL=server.url).stdout

    assert [job["id"] for job in listed["jobs"]] == ["die", "greet", "work"]
    assert (again["runId"], again["duplicate"]) == (triggered["runId"], True)
    assert (run["result"], run["priority"]) == ("hello me", 70)
    assert (cancelled["status"], cancelled["cancelReason"], redriven["status"]) == (
        "cancelled",
        "not needed",
        "pending",
    )
    assert shown == run
    assert [one["runId"] for one in found["runs"]] == [run["runId"]]
    assert run["runId"] in table
    assert "hello me" in table
    server.signal(signal.SIGTERM)
    assert server.ended() == 0


def test_commands_say_in_one_line_why_they_failed(tmp_path: Path, start: Callable[..., Server]) -> None:
    server = start()

    unknown = refusal(sagaloom("jobs", "trigger", "print", cwd=tmp_path, SAGALOOM_JOBS_URL=server.url))
    nobody = refusal(sagaloom("jobs", "list", cwd=tmp_path, SAGALOOM_JOBS_URL="http://127.0.0.1:1"))

    assert "no job 'print' is loaded here; loaded are: die, greet, work" in unknown
    assert "no jobs server answers at http://127.0.0.1:1" in nobody


@pytest.mark.parametrize(
    ("args", "env", "text"),
    [
        ((), {"NETSCRIPT_SAGA_STORE": "kv"}, "no job modules named"),
        (("no.such.module",), {"NETSCRIPT_SAGA_STORE": "kv"}, "Job registry module no.such.module was not found"),
        (("sagaloom.demo:sagas",), {"NETSCRIPT_SAGA_STORE": "kv"}, "that is no job"),
        (("sagaloom.durations",), {"NETSCRIPT_SAGA_STORE": "kv"}, "must export jobs"),
        (("sagaloom.demo",), {}, "Saga store backend is required"),
        (("sagaloom.demo",), {"NETSCRIPT_SAGA_STORE": "sql"}, "set DATABASE_URL="),
        (
            ("work_module.py",),
            {"NETSCRIPT_SAGA_STORE": "sql", "DATABASE_URL": "postgresql://postgres@127.0.0.1:9/sagas"},
            "Connection refused (is it running, and reachable from here? who runs already goes on when it answers",
        ),
        (("work_module.py", "broken.py", "--strict"), {"NETSCRIPT_SAGA_STORE": "kv"}, "ZeroDivisionError"),
        (("sagaloom.demo", "--host", "0.0.0.0"), {"NETSCRIPT_SAGA_STORE": "kv"}, "without a token"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_way_out(
    tmp_path: Path, args: tuple[str, ...], env: dict[str, str], text: str
) -> None:
    (tmp_path / "work_module.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("1 / 0\n")

    assert text in refusal(sagaloom("jobs", "serve", *args, cwd=tmp_path, **env))


def test_a_module_that_does_not_import_is_left_out_and_the_others_are_served(
    tmp_path: Path, start: Callable[..., Server]
) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "script.py").write_text("raise SystemExit(3)\n")
    server = start("sagaloom", "jobs", "serve", "broken.py", "script.py", "work_module.py", "--port", "0", "--json")

    listed = httpx2.get(f"{server.url}/api/v1/workers/jobs", timeout=30).json()
    run = ended(server.url, trigger(server.url, "greet", {"name": "you"}))

    assert [one["module"] for one in listed["problems"]] == ["broken.py", "script.py"]
    assert "ZeroDivisionError: division by zero" in listed["problems"][0]["problem"]
    assert "SystemExit: 3" in listed["problems"][1]["problem"]
    assert any("left out: Job registry module broken.py" in line for line in server.errors)
    assert run["result"] == "hello you"


def test_modules_may_be_named_by_the_project(tmp_path: Path, start: Callable[..., Server]) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.sagaloom]\njobs = ["work_module:greet"]\n')
    server = start("sagaloom", "jobs", "serve", "--port", "0", "--json")

    jobs = httpx2.get(f"{server.url}/api/v1/workers/jobs", timeout=30).json()["jobs"]

    assert [job["id"] for job in jobs] == ["greet"]


# --- Several processes, and their end --------------------------------------------------------------------------------


def test_a_run_of_a_killed_process_is_taken_over_by_another_at_once(
    tmp_path: Path, start: Callable[..., Server]
) -> None:
    first, second = start(), start()
    run_id = trigger(first.url, "work", {"name": "x"})
    until((tmp_path / "begun-1").exists, "the job begins")
    owner = int((tmp_path / "begun-1").read_text())
    victim, heir = (first, second) if owner == first.process.pid else (second, first)

    victim.signal(signal.SIGKILL)
    killed_at = time.monotonic()
    until((tmp_path / "begun-2").exists, "another begins")
    seconds = time.monotonic() - killed_at
    (tmp_path / "go").touch()
    run = ended(heir.url, run_id)

    assert (run["status"], run["result"]) == ("succeeded", {"attempt": 2, "pid": heir.process.pid})
    assert seconds < 5  # The lease alone would have lasted longer.


def test_what_is_not_done_in_time_is_given_back_and_goes_on_at_the_next_start(
    tmp_path: Path, start: Callable[..., Server]
) -> None:
    server = start()
    run_id = trigger(server.url, "work", {"name": "x"})
    until((tmp_path / "begun-1").exists, "the job begins")

    server.signal(signal.SIGTERM)
    status = server.ended()
    (tmp_path / "begun-1").unlink()
    (tmp_path / "go").touch()
    second = start()
    run = ended(second.url, run_id)

    assert status == 0
    assert (run["status"], run["attempt"]) == ("succeeded", 1)


def test_a_job_that_kills_its_process_is_given_up(tmp_path: Path, start: Callable[..., Server]) -> None:
    server = start()
    run_id = trigger(server.url, "die")
    server.process.wait(30)
    # It takes the run up again as it starts, so it may end before it says anything.
    again = subprocess.run(
        [sys.executable, "-m", *SERVE],
        cwd=tmp_path,
        env=environment(NETSCRIPT_SAGA_STORE="kv"),
        capture_output=True,
        timeout=60,
        check=False,
    )
    last = start()

    run = ended(last.url, run_id)
    assert again.returncode == -signal.SIGKILL

    assert (run["status"], run["failure"]["code"]) == ("failed", "JOB_PROCESS_DIED")


# --- Both ports ------------------------------------------------------------------------------------------------------


class Demo:
    """Both ports under one supervisor, as `make serve` runs them."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.sagas: str = server.said["url"]
        self.jobs: str = server.said["jobs"]

    def pid(self, name: str, *, after: int = 0) -> int:
        """The process that serves `name` now, which is not `after`."""

        def look() -> int | None:
            found = re.findall(rf"{name} is process ([0-9]+)", "".join(self.server.errors))
            return int(found[-1]) if found and int(found[-1]) != after else None

        pid: int = until(look, f"{name} is started")
        return pid

    def instances(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx2.get(
            f"{self.sagas}/api/v1/sagas/instances", params={"sagaName": "user-settings-saga"}, timeout=30
        ).json()["instances"]
        return found


@pytest.fixture
def demo(start: Callable[..., Server]) -> Demo:
    return Demo(start("sagaloom", "dev", "--port", "0", "--json"))


def test_one_trigger_on_one_port_completes_a_saga_on_the_other(demo: Demo) -> None:
    run = ended(demo.jobs, trigger(demo.jobs, "create-user-settings", {"userId": "u-1"}, traceparent=TRACE))
    [instance] = demo.instances()

    assert (run["status"], run["attempt"]) == ("succeeded", 1)
    assert (run["result"]["userId"], run["result"]["settingsCreated"]) == ("u-1", True)
    assert (instance["status"], instance["result"]["userId"]) == ("completed", "u-1")
    assert run["traceparent"] == instance["traceparent"] == TRACE


def test_a_saga_that_sends_to_a_job_reaches_the_other_port(tmp_path: Path, start: Callable[..., Server]) -> None:
    (tmp_path / "signup.py").write_text(
        "from sagaloom import define_saga, send\n"
        "saga = define_saga('signup').state({}).on('SignedUp', lambda saga, event, context: "
        "[send({'kind': 'job', 'id': 'greet'}, event.payload)]).build()\n"
    )
    jobs = start()
    sagas = start("sagaloom", "serve", "signup.py", "--port", "0", "--json", WORKERS_API_URL=jobs.url)

    httpx2.post(
        f"{sagas.url}/api/v1/sagas/publish",
        json={"type": "SignedUp", "payload": {"name": "you"}, "correlationId": "s-1"},
        timeout=30,
    ).raise_for_status()
    run_id = until(
        lambda: [run["runId"] for run in httpx2.get(f"{jobs.url}/api/v1/workers/runs", timeout=30).json()["runs"]],
        "the effect becomes a run",
    )[0]

    run = ended(jobs.url, run_id)
    assert (run["result"], run["correlationId"]) == ("hello you", "s-1")


def test_the_end_of_a_job_reaches_its_saga_though_both_were_killed_before_it_was_told(
    tmp_path: Path, start: Callable[..., Server]
) -> None:
    kill_both_before_it_was_told(tmp_path, start)


async def test_the_end_of_a_job_reaches_its_saga_on_postgres_though_both_were_killed_before_it_was_told(
    tmp_path: Path, schema: Schema, start: Callable[..., Server]
) -> None:
    kill_both_before_it_was_told(tmp_path, start, NETSCRIPT_SAGA_STORE="sql", DATABASE_URL=schema.url)


def kill_both_before_it_was_told(tmp_path: Path, start: Callable[..., Server], **env: str) -> None:
    (tmp_path / "asking.py").write_text(
        "from sagaloom import define_saga, saga_complete, send\n"
        "saga = (define_saga('asking').state({})\n"
        "    .on('Asked', lambda saga, event, context: [send('job:work', event.payload)])\n"
        "    .on('work:completed', lambda saga, event, context: [saga_complete(event.payload['result'])],"
        " starts=False).build())\n"
    )
    serve_sagas = ("sagaloom", "serve", "asking.py", "--port", "0", "--json")
    jobs = start(**env)
    sagas = start(*serve_sagas, WORKERS_API_URL=jobs.url, **env)
    jobs.kill()
    jobs = start(*SERVE[:-3], "--port", jobs.url.rpartition(":")[2], "--json", SAGAS_API_URL=sagas.url, **env)
    httpx2.post(
        f"{sagas.url}/api/v1/sagas/publish",
        json={"type": "Asked", "payload": {"name": "x"}, "correlationId": "a/1"},
        timeout=30,
    ).raise_for_status()
    until((tmp_path / "begun-1").exists, "the job begins")
    stop(sagas.process.pid, tmp_path)  # it takes the reply in no more
    (tmp_path / "go").touch()
    runs = httpx2.get(f"{jobs.url}/api/v1/workers/runs", timeout=30).json()["runs"]
    [run_id] = [run["runId"] for run in runs]
    told = ended(jobs.url, run_id)["reply"]
    jobs.signal(signal.SIGKILL)
    sagas.signal(signal.SIGKILL)

    sagas = start(*serve_sagas, **env)
    jobs = start(SAGAS_API_URL=sagas.url, **env)
    instance = until(lambda: _completed(sagas.url), "the saga has heard of it")
    run = until(
        lambda: found if (found := run_of(jobs.url, run_id))["reply"]["state"] == "delivered" else None, "it is told"
    )

    assert (told["state"], told["correlationKey"]) == ("due", "a/1")
    assert (instance["result"]["attempt"], instance["messageCount"]) == (1, 2)
    assert (run["status"], run["attempt"]) == ("succeeded", 1)


def _completed(url: str) -> dict[str, Any] | None:
    found: dict[str, Any] = httpx2.get(f"{url}/api/v1/sagas/instances/asking/a%2F1", timeout=30).json()
    return found if found.get("status") == "completed" else None


def test_the_jobs_process_killed_in_the_middle_of_a_job_leaves_one_completed_instance(demo: Demo) -> None:
    sagas, jobs = demo.pid("sagas"), demo.pid("jobs")
    # A saga service that does not answer holds the job in its middle: it has sent the message, and waits.
    stop(sagas, demo.server.cwd)
    try:
        run_id = trigger(demo.jobs, "create-user-settings", {"userId": "u-1"}, traceparent=TRACE)
        until(lambda: run_of(demo.jobs, run_id)["status"] == "running", "the job is under way")
        os.kill(jobs, signal.SIGKILL)
        reborn = demo.pid("jobs", after=jobs)
    finally:
        os.kill(sagas, signal.SIGCONT)
    run = ended(demo.jobs, run_id)
    instances = demo.instances()

    assert (run["status"], run["traceparent"]) == ("succeeded", TRACE)
    assert run["attempt"] >= 2
    assert [(one["status"], one["run"], one["traceparent"]) for one in instances] == [("completed", 1, TRACE)]
    assert reborn != jobs
    assert any("jobs was ended by SIGKILL: starting it again" in line for line in demo.server.errors)


def test_the_whole_choreography_with_both_processes_killed_in_its_middle(demo: Demo) -> None:
    kill_both_in_the_middle(demo)


async def test_the_whole_choreography_on_postgres_with_both_processes_killed_in_its_middle(
    schema: Schema, start: Callable[..., Server]
) -> None:
    env = {"NETSCRIPT_SAGA_STORE": "sql", "DATABASE_URL": schema.url}
    kill_both_in_the_middle(Demo(start("sagaloom", "dev", "--port", "0", "--json", **env)))


def kill_both_in_the_middle(demo: Demo) -> None:
    """One trigger, and both ports killed before either knows what the other has done: one completed instance, one run,
    one trace."""
    sagas, jobs = demo.pid("sagas"), demo.pid("jobs")
    # The job is under way, and its message is on the wire: neither side knows what the other has done.
    stop(sagas, demo.server.cwd)
    run_id = trigger(demo.jobs, "create-user-settings", {"userId": "u-1"}, traceparent=TRACE)
    until(lambda: run_of(demo.jobs, run_id)["status"] == "running", "the job is under way")
    os.kill(jobs, signal.SIGKILL)
    os.kill(sagas, signal.SIGKILL)
    demo.pid("jobs", after=jobs)
    demo.pid("sagas", after=sagas)

    run = ended(demo.jobs, run_id)
    instances = until(demo.instances, "the saga is there")
    [instance] = instances
    path = f"{demo.sagas}/api/v1/sagas/instances/user-settings-saga/{instance['correlationKey']}/history"
    history = httpx2.get(path, timeout=30).json()["history"]

    assert (run["status"], run["result"]["userId"]) == ("succeeded", "u-1")
    assert run["attempt"] >= 2
    assert [one["outcome"] for one in run["history"]][-1] == "succeeded"
    assert (instance["status"], instance["run"], instance["result"]["userId"]) == ("completed", 1, "u-1")
    assert [entry["messageType"] for entry in history] == ["UserSettingsCreated"]
    assert run["traceparent"] == instance["traceparent"] == TRACE


def test_the_saga_process_killed_in_the_middle_of_a_publish_leaves_one_completed_instance(demo: Demo) -> None:
    sagas = demo.pid("sagas")
    stop(sagas, demo.server.cwd)
    run_id = trigger(demo.jobs, "create-user-settings", {"userId": "u-1"}, traceparent=TRACE)
    until(lambda: run_of(demo.jobs, run_id)["status"] == "running", "the job is under way")

    os.kill(sagas, signal.SIGKILL)
    demo.pid("sagas", after=sagas)
    run = ended(demo.jobs, run_id)
    instances = demo.instances()

    assert (run["status"], run["traceparent"]) == ("succeeded", TRACE)
    assert [(one["status"], one["run"], one["traceparent"]) for one in instances] == [("completed", 1, TRACE)]


def test_ctrl_c_ends_both_in_good_order(demo: Demo) -> None:
    pids = [demo.pid("sagas"), demo.pid("jobs")]

    demo.server.signal(signal.SIGINT)
    status = demo.server.ended()

    assert status == 0
    assert not any(map(is_alive, pids))
    assert sum("stopping" in line for line in demo.server.errors) == 2


def test_a_supervisor_that_is_killed_takes_its_children_along(demo: Demo) -> None:
    pids = [demo.pid("sagas"), demo.pid("jobs")]

    demo.server.signal(signal.SIGKILL)

    until(lambda: not any(map(is_alive, pids)), "both children end")


def test_a_child_that_cannot_start_ends_everything_and_says_why_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = subprocess.run(
            [sys.executable, "-m", "examples.serve"],
            cwd=tmp_path,
            env=environment(NETSCRIPT_SAGA_STORE="kv", PORT="0", JOBS_PORT=port, SAGALOOM_LOG_LEVEL="error"),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert f"cannot listen on 127.0.0.1:{port}" in refusal(result)
    assert result.returncode == 1


CHILD = """
import os, sys
from pathlib import Path
if not Path("tried").exists():
    Path("tried").touch()
    os.kill(os.getpid(), 9)
print('{"event": "listening", "pid": %d}' % os.getpid(), flush=True)
sys.stdin.read()
"""

KEEPER = f"""
import json, sys
from sagaloom.cli.supervisor import Child, supervise
child = Child(name="one", command=[sys.executable, "-c", {CHILD!r}], env={{}})
sys.exit(supervise([child], announce=lambda said: print(json.dumps(said["one"]), flush=True)))
"""


def test_a_child_that_is_killed_before_it_answered_is_started_again(
    tmp_path: Path, start: Callable[..., Server]
) -> None:
    (tmp_path / "keeper.py").write_text(KEEPER)
    keeper = start("keeper")
    pid = int(keeper.said["pid"])

    keeper.signal(signal.SIGTERM)

    assert (tmp_path / "tried").exists()
    assert keeper.ended() == 0
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A child of a dead parent may wait, dead, for somebody to ask after it.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
