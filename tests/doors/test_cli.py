"""The command line, as real processes: what they print, how they fail, how they end."""

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

import httpx2
import pytest

from tests.patience import PATIENCE_SECONDS
from tests.servers.server import free_port

ROOT = Path(__file__).resolve().parents[2]
STARTS_WITHIN_SECONDS = 60
ENDS_WITHIN_SECONDS = 30
"""It promises 3, on a machine that has time for it; here it is how long we wait for one that hangs."""
ANSWERS_WITHIN_SECONDS = 30

MODULE = """
import time
from pathlib import Path
from sagaloom import SagasError, define_saga, saga_complete, send
from sagaloom.targets import callable_target

def taken(saga, event, context):
    if event.payload.get("poison"):
        raise SagasError("this one cannot be handled", retryable=False)
    if event.payload.get("target"):
        return [send(event.payload["target"], {"n": 1})]
    return [saga_complete(event.payload)]

def refuse(request):
    if not Path("mended").exists():
        raise SagasError("the mailbox is gone", retryable=False)

def hang(request):
    Path("hanging").touch()
    time.sleep(600)

saga = define_saga("jobs").state({"status": "new"}).on("Taken", taken).build()
targets = [callable_target("mail", refuse), callable_target("hang", hang)]
"""


class Server:
    """A `sagaloom` process that serves, and its first line: where."""

    def __init__(self, args: list[str], cwd: Path, env: dict[str, str]) -> None:
        self.cwd = cwd
        self.process = subprocess.Popen(
            args, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self.errors: list[str] = []
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        # Read all the time: a full pipe would stop the server.
        self._readers = [
            threading.Thread(target=self._read_lines, args=[self.process.stdout]),
            threading.Thread(target=self.errors.extend, args=[self.process.stderr]),
        ]
        for reader in self._readers:
            reader.daemon = True
            reader.start()
        try:
            line = self._lines.get(timeout=STARTS_WITHIN_SECONDS)
        except queue.Empty:
            self.kill()
            raise AssertionError(f"the server said nothing; on stderr: {''.join(self.errors)}") from None
        self.first_line = line
        self.said: dict[str, str] = json.loads(line) if line.startswith("{") else {}

    @property
    def url(self) -> str:
        return self.said["url"]

    def _read_lines(self, out: IO[str]) -> None:
        for line in out:
            self._lines.put(line)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self, within: float = ENDS_WITHIN_SECONDS) -> int:
        return self.process.wait(within)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for reader in self._readers:
            reader.join(5)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


StartServer = Callable[..., Server]


def environment(**changes: str) -> dict[str, str]:
    read = (
        "NETSCRIPT_",
        "SAGA",
        "PORT",
        "PAYMENTS_PORT",
        "JOBS_",
        "WORKERS_",
        "FAIL_FIRST",
        "ASPNETCORE_",
        "DOTNET_",
        "services__",
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith(read)}
    return {**plain, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "PAYMENTS_PORT": "0", **changes}


def sagaloom(*args: str, cwd: Path, stdin: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sagaloom", *args],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        input=stdin,
        timeout=60,
        check=False,
    )


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failing command says."""
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    [line] = result.stderr.strip().splitlines()
    return line


def get(url: str) -> Any:
    return httpx2.get(url, timeout=ANSWERS_WITHIN_SECONDS).json()


def publish(url: str, message: dict[str, Any]) -> None:
    httpx2.post(f"{url}/api/v1/sagas/publish", json=message, timeout=ANSWERS_WITHIN_SECONDS).raise_for_status()


def until(condition: Callable[[], Any], what: str) -> Any:
    """What `condition` says once it is true, for what happens in another process and cannot be awaited."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"never happened: {what}")


@pytest.fixture
def start() -> Generator[StartServer]:
    yield from _starting()


@pytest.fixture(scope="module")
def start_once() -> Generator[StartServer]:
    yield from _starting()


def _starting() -> Generator[StartServer]:
    servers: list[Server] = []

    def begin(*args: str, cwd: Path, **env: str) -> Server:
        servers.append(Server([sys.executable, "-m", *args], cwd, environment(**env)))
        return servers[-1]

    yield begin
    for server in servers:
        server.kill()


SERVE_JOBS = ("sagaloom", "serve", "jobs_module.py", "--port", "0", "--json")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, start_once: StartServer) -> Server:
    """A server with the saga of `MODULE`, for those who leave it as it was."""
    cwd = tmp_path_factory.mktemp("jobs")
    (cwd / "jobs_module.py").write_text(MODULE)
    return start_once(*SERVE_JOBS, cwd=cwd, NETSCRIPT_SAGA_STORE="kv")


@pytest.fixture
def own_jobs(tmp_path: Path, start: StartServer) -> Server:
    """The same, for those who end it."""
    (tmp_path / "jobs_module.py").write_text(MODULE)
    return start(*SERVE_JOBS, cwd=tmp_path, NETSCRIPT_SAGA_STORE="kv")


# --- Serving ---------------------------------------------------------------------------------------------------------


def test_the_order_story_runs_from_the_command_line(tmp_path: Path, start: StartServer) -> None:
    server = start("sagaloom", "dev", "--port", "0", "--json", cwd=tmp_path, FAIL_FIRST="1")

    def cli(*args: str) -> Any:
        result = sagaloom(*args, "--json", cwd=tmp_path, SAGALOOM_URL=server.url)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def tell(kind: str, **payload: str) -> Any:
        return cli("publish", kind, "--payload", json.dumps(payload), "--wait", "10s")["outcomes"][0]

    placed = tell("OrderPlaced", orderId="o/1")
    captured = tell("PaymentCaptured", orderId="o/1", paymentId="pay-o/1")
    failed = tell("FulfillmentFailed", orderId="o/1", reason="out of stock")

    def settled() -> list[dict[str, Any]] | None:
        entries: list[dict[str, Any]] = get(f"{server.said['payments']}/ledger")["entries"]
        return entries if sum(bool(entry["applied"]) for entry in entries) > 1 else None

    ledger = until(settled, "the refund reaches the payments service")

    assert (placed["status"], placed["state"]["status"]) == ("running", "awaiting-payment")
    assert (captured["status"], captured["state"]["status"]) == ("running", "awaiting-fulfillment")
    assert (failed["status"], failed["state"]["status"]) == ("failed", "refunded")
    assert failed["reason"] == "order o/1 unfulfilled: out of stock"
    assert [(entry["kind"], entry["attempts"], entry["applied"]) for entry in ledger] == [
        ("charge", 2, 1),
        ("refund", 1, 1),
    ]
    instance = cli("instances", "show", "order-saga", "o/1")
    assert instance["state"] == {"status": "refunded", "orderId": "o/1", "paymentId": "pay-o/1"}
    history = cli("instances", "history", "order-saga", "o/1")["history"]
    assert [entry["messageType"] for entry in history] == ["OrderPlaced", "PaymentCaptured", "FulfillmentFailed"]
    assert [one["id"] for one in cli("sagas", "list")["sagas"]] == ["order-saga", "user-settings-saga"]
    assert cli("sagas", "show", "order-saga")["id"] == "order-saga"
    assert cli("instances", "list", "--status", "completed")["total"] == 0
    assert cli("dead-letters", "list")["deadLetters"] == []

    shown = sagaloom("instances", "list", "--saga", "order-saga", cwd=tmp_path, SAGALOOM_URL=server.url)
    assert "order-saga:o/1" in shown.stdout


def test_dev_says_first_where_it_keeps_its_sagas(tmp_path: Path, start: StartServer) -> None:
    server = start("sagaloom", "dev", "--port", "0", "--json", cwd=tmp_path)

    said = until(lambda: list(server.errors), "somebody has read what it says")
    assert said[0] == "dev: saga store kv in .sagaloom/sagas.db\n"
    assert (tmp_path / ".sagaloom" / "sagas.db").exists()


def test_a_server_told_to_stop_ends_cleanly_and_keeps_everything(tmp_path: Path, start: StartServer) -> None:
    arguments = ("sagaloom", "dev", "--port", "0", "--json")
    message = {"type": "UserSettingsCreated", "payload": {"userId": "u"}, "correlationId": "u"}

    first = start(*arguments, cwd=tmp_path)
    with httpx2.Client(base_url=first.url, timeout=ANSWERS_WITHIN_SECONDS) as client:  # its connection stays open
        assert client.post("/api/v1/sagas/publish", json=message).status_code == 202
        first.signal(signal.SIGTERM)
        assert first.ended() == 0

    second = start(*arguments, cwd=tmp_path)
    found = get(f"{second.url}/api/v1/sagas/instances/user-settings-saga/u")
    second.signal(signal.SIGINT)

    assert found["status"] == "completed"
    assert second.ended() == 0


def test_what_does_not_end_in_time_is_left_and_goes_on_at_the_next_start(own_jobs: Server, start: StartServer) -> None:
    publish(own_jobs.url, {"type": "Taken", "payload": {"target": "hang:up"}, "correlationId": "h"})
    until((own_jobs.cwd / "hanging").exists, "the target is called")

    own_jobs.signal(signal.SIGTERM)
    assert own_jobs.ended() == 0

    (own_jobs.cwd / "hanging").unlink()
    start(*SERVE_JOBS, cwd=own_jobs.cwd, NETSCRIPT_SAGA_STORE="kv")
    until((own_jobs.cwd / "hanging").exists, "the effect leaves again")


def test_a_second_signal_ends_a_server_at_once(own_jobs: Server) -> None:
    publish(own_jobs.url, {"type": "Taken", "payload": {"target": "hang:up"}, "correlationId": "h"})
    until((own_jobs.cwd / "hanging").exists, "the target is called")

    own_jobs.signal(signal.SIGTERM)
    until(lambda: any("stopping" in line for line in own_jobs.errors), "the first signal is heard")
    own_jobs.signal(signal.SIGTERM)

    assert own_jobs.ended() == 128 + signal.SIGTERM


def test_the_example_serves_and_ends(tmp_path: Path, start: StartServer) -> None:
    server = start("examples.serve", cwd=tmp_path, NETSCRIPT_SAGA_STORE="kv", PORT="0")

    assert server.first_line.startswith("sagaloom serves the demo sagas on http://127.0.0.1:")
    server.signal(signal.SIGTERM)
    assert server.ended() == 0


def test_the_example_refuses_to_guess_a_store(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "examples.serve"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert "Saga store backend is required." in refusal(result)


# --- Refusing to serve -----------------------------------------------------------------------------------------------


def test_serve_refuses_to_guess_a_store(tmp_path: Path) -> None:
    assert refusal(sagaloom("serve", "anything", cwd=tmp_path)) == (
        "error: Saga store backend is required. Set NETSCRIPT_SAGA_STORE=kv|sql or appsettings sagas.store.backend."
    )


def test_serve_takes_the_store_from_appsettings(tmp_path: Path) -> None:
    (tmp_path / "appsettings.json").write_text('{"sagas": {"store": {"backend": "kv"}}}')

    assert "no saga modules named" in refusal(sagaloom("serve", cwd=tmp_path))


def test_serve_names_a_module_that_is_not_there(tmp_path: Path) -> None:
    line = refusal(sagaloom("serve", "no.such.module", cwd=tmp_path, NETSCRIPT_SAGA_STORE="kv"))

    assert "no.such.module was not found" in line


def test_a_taken_port_is_said_before_the_store_is_touched(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = sagaloom(
            "serve", "sagaloom.demo", cwd=tmp_path, NETSCRIPT_SAGA_STORE="kv", PORT=str(taken.getsockname()[1])
        )

    line = refusal(result)
    assert "Address already in use" in line
    assert not (tmp_path / ".sagaloom").exists()


def test_an_api_without_a_worker_waits_for_one_and_the_next_one_takes_over(tmp_path: Path, start: StartServer) -> None:
    (tmp_path / "jobs_module.py").write_text(MODULE)
    door = start(*SERVE_JOBS, "--no-worker", cwd=tmp_path, NETSCRIPT_SAGA_STORE="kv")
    publish = ("publish", "Taken", "--payload", "{}", "--url", door.url, "--json", "--wait")

    def disposition(seconds: str, key: str) -> str:
        said = sagaloom(*publish, seconds, "--correlation-key", key, cwd=tmp_path)
        found: str = json.loads(said.stdout)["outcomes"][0]["disposition"]
        return found

    alone = disposition("200ms", "j-1")
    first = start("sagaloom", "worker", "jobs_module.py", "--json", cwd=tmp_path, NETSCRIPT_SAGA_STORE="kv")
    with_one = disposition("10s", "j-2")
    start("sagaloom", "serve", "jobs_module.py", "--no-api", "--json", cwd=tmp_path, NETSCRIPT_SAGA_STORE="kv")
    first.kill()
    taken_over = disposition("10s", "j-3")

    assert first.said == {"event": "working"}
    assert (alone, with_one, taken_over) == ("pending", "applied", "applied")


def test_serving_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobs_module.py").write_text(MODULE)

    line = refusal(
        sagaloom("serve", "jobs_module.py", "--no-worker", "--no-api", cwd=tmp_path, NETSCRIPT_SAGA_STORE="kv")
    )

    assert "nothing to do" in line


def test_an_open_door_to_the_outside_is_refused(tmp_path: Path) -> None:
    line = refusal(sagaloom("serve", "sagaloom.demo", "--host", "0.0.0.0", cwd=tmp_path, NETSCRIPT_SAGA_STORE="kv"))

    assert "without a token" in line
    assert "--insecure" in line


# --- Talking to a server ---------------------------------------------------------------------------------------------


def test_a_server_that_is_not_there_is_said_with_what_starts_one(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"

    line = refusal(sagaloom("instances", "list", "--url", url, cwd=tmp_path))

    assert line.startswith(f"error: no server answers at {url}: start one with 'sagaloom dev'")


def test_a_server_that_wants_a_token_gets_it(tmp_path: Path, start: StartServer) -> None:
    server = start("sagaloom", "dev", "--port", "0", "--json", cwd=tmp_path, SAGALOOM_TOKEN="s3cret")

    without = sagaloom("sagas", "list", "--url", server.url, cwd=tmp_path)
    wrong = sagaloom("sagas", "list", "--url", server.url, "--token", "guess", cwd=tmp_path)
    right = sagaloom("sagas", "list", "--url", server.url, cwd=tmp_path, SAGALOOM_TOKEN="s3cret")

    assert "wants a token: give --token or set SAGALOOM_TOKEN" in refusal(without)
    assert "wants a token: the token is not one it accepts" in refusal(wrong)
    assert right.returncode == 0
    assert not any("s3cret" in line for line in server.errors)


def test_what_the_server_refuses_is_said_in_one_line(jobs: Server) -> None:
    def refused(*args: str) -> str:
        return refusal(sagaloom(*args, "--url", jobs.url, cwd=jobs.cwd))

    assert "SAGA_INSTANCE_NOT_FOUND" in refused("instances", "show", "jobs", "nobody")
    assert "SAGA_NOT_FOUND" in refused("publish", "NobodyHandlesThis")
    assert "VALIDATION_ERROR" in refused("publish", "Taken", "--wait", "soon")
    assert "DEAD_LETTER_NOT_FOUND" in refused("dead-letters", "redrive", "none")
    assert "--payload is no JSON" in refused("publish", "Taken", "--payload", "{")
    assert "no http(s) URL" in refusal(sagaloom("sagas", "list", "--url", "localhost:8092", cwd=jobs.cwd))


def test_a_payload_comes_from_a_file_or_from_stdin(jobs: Server) -> None:
    (jobs.cwd / "payload.json").write_text('{"from": "file"}')

    for given, stdin, expected in [("@payload.json", None, "file"), ("-", '{"from": "stdin"}', "stdin")]:
        result = sagaloom(
            "publish",
            "Taken",
            "--payload",
            given,
            "--correlation-key",
            expected,
            "--wait",
            "10s",
            "--json",
            cwd=jobs.cwd,
            stdin=stdin,
            SAGALOOM_URL=jobs.url,
        )
        assert json.loads(result.stdout)["outcomes"][0]["result"] == {"from": expected}


def test_an_idempotency_key_makes_a_repeat_a_duplicate(jobs: Server) -> None:
    arguments = ("publish", "Taken", "--correlation-key", "k", "--idempotency-key", "once", "--json")

    first, second = (json.loads(sagaloom(*arguments, cwd=jobs.cwd, SAGALOOM_URL=jobs.url).stdout) for _ in range(2))

    assert (first["duplicate"], second["duplicate"]) == (False, True)
    assert first["messageId"] == second["messageId"]


def test_dead_letters_are_listed_shown_redriven_and_discarded(jobs: Server) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return sagaloom(*args, "--url", jobs.url, "--json", cwd=jobs.cwd)

    def letters() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = get(f"{jobs.url}/api/v1/sagas/dead-letters")["deadLetters"]
        return found

    poisoned = run("publish", "Taken", "--payload", '{"poison": true}', "--correlation-key", "p", "--wait", "10s")
    assert "gave it up: " in refusal(poisoned)
    assert json.loads(poisoned.stdout)["outcomes"][0]["disposition"] == "dead_lettered"
    [poison] = json.loads(run("dead-letters", "list").stdout)["deadLetters"]
    shown = json.loads(run("dead-letters", "show", poison["id"]).stdout)
    assert shown["payload"] == {"poison": True}
    assert "this one cannot be handled" in shown["reason"]
    assert json.loads(run("dead-letters", "discard", poison["id"]).stdout)["id"] == poison["id"]
    assert letters() == []

    run("publish", "Taken", "--payload", '{"target": "mail:box"}', "--correlation-key", "m")
    [stalled] = until(letters, "the effect is given up")
    assert (stalled["kind"], stalled["target"]) == ("effect", "mail:box")
    (jobs.cwd / "mended").touch()
    assert run("dead-letters", "redrive", stalled["id"]).returncode == 0
    until(lambda: get(f"{jobs.url}/health")["outbox"] == 0, "the effect leaves")
    assert letters() == []


# --- Doctor ----------------------------------------------------------------------------------------------------------


def examine(cwd: Path, *args: str, **env: str) -> tuple[int, dict[str, dict[str, Any]]]:
    result = sagaloom("doctor", *args, "--json", cwd=cwd, **env)
    return result.returncode, {finding["check"]: finding for finding in json.loads(result.stdout)["findings"]}


def test_doctor_finds_nothing_wrong_where_nothing_is_yet(tmp_path: Path) -> None:
    code, findings = examine(tmp_path, "sagaloom.demo", NETSCRIPT_SAGA_STORE="kv", PORT=str(free_port()))

    assert code == 0
    assert {name: finding["status"] for name, finding in findings.items()} == {
        "sqlite": "ok",
        "definitions": "ok",
        "backend": "ok",
        "store": "note",
        "server": "note",
    }
    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_a_server_that_is_ready(jobs: Server) -> None:
    code, findings = examine(jobs.cwd, "jobs_module.py", "--url", jobs.url, NETSCRIPT_SAGA_STORE="kv")

    assert code == 0
    assert {finding["status"] for finding in findings.values()} == {"ok"}


def test_doctor_finds_what_is_stuck_and_names_the_repair(own_jobs: Server) -> None:
    publish(own_jobs.url, {"type": "Taken", "payload": {"target": "mail:box"}, "correlationId": "m"})
    [letter] = until(lambda: get(f"{own_jobs.url}/api/v1/sagas/dead-letters")["deadLetters"], "the effect is given up")
    own_jobs.kill()

    code, findings = examine(own_jobs.cwd, "broken.module", "--url", own_jobs.url, NETSCRIPT_SAGA_STORE="redis")

    assert code == 1
    assert findings["lanes"]["status"] == "broken"
    assert findings["lanes"]["repair"] == f"sagaloom dead-letters redrive {letter['id']}"
    assert findings["dead letters"]["repair"].startswith(f"sagaloom dead-letters show {letter['id']}")
    assert findings["definitions"]["status"] == "broken"
    assert 'Invalid saga store backend "redis"' in findings["backend"]["detail"]
    assert findings["server"]["repair"] == "sagaloom dev"


def test_doctor_tells_a_foreign_server_and_a_foreign_file(tmp_path: Path, start: StartServer) -> None:
    server = start("sagaloom", "dev", "--port", "0", "--json", cwd=tmp_path)
    (tmp_path / "notes.db").write_text("these are my notes, and no store; " * 100)

    code, findings = examine(
        tmp_path,
        "--url",
        server.said["payments"],
        NETSCRIPT_SAGA_STORE="kv",
        NETSCRIPT_SAGA_KV_PATH=str(tmp_path / "notes.db"),
    )

    assert code == 1
    assert "is it a saga service?" in findings["server"]["detail"]
    assert findings["store"]["status"] == "broken"
    assert "NETSCRIPT_SAGA_KV_PATH" in findings["store"]["repair"]


# --- Being light -----------------------------------------------------------------------------------------------------


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, sagaloom.cli.app;"
        "print([name for name in ('apsw', 'fastapi', 'httpx2', 'pydantic', 'rich', 'structlog', 'uvicorn')"
        " if name in sys.modules])"
    )

    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    shown = sagaloom("--help", cwd=tmp_path)

    assert found.stdout.strip() == "[]"
    assert shown.returncode == 0
    for command in ("dev", "serve", "publish", "sagas", "instances", "dead-letters", "doctor"):
        assert command in shown.stdout
