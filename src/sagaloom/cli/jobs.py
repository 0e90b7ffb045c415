"""`sagaloom jobs`: serve background jobs, trigger them, and look at their runs."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Final
from urllib.parse import quote

import typer

from sagaloom.cli.client import ApiClient
from sagaloom.cli.options import AsJson, Host, Insecure, Limit, Token

__all__ = ["jobs_app"]

jobs_app = typer.Typer(help="Background jobs, on port 8091.", no_args_is_help=True)

_URL: Final = "http://127.0.0.1:8091"
_PREFIX: Final = "//api/v1/workers"

JobsUrl = Annotated[str, typer.Option("--url", envvar="SAGALOOM_JOBS_URL", help="Where the jobs server is.")]
Modules = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODULE]...",
        help="Job modules: dotted names, package.module:attribute, or files. "
        "By default JOBS_REGISTRY_MODULE, else \\[tool.sagaloom] jobs in pyproject.toml.",
        show_default=False,
    ),
]


class _JobsClient(ApiClient):
    """Calls the API of a running jobs server."""

    def _nobody_there(self) -> str:
        return (
            f"no jobs server answers at {self.url}: start one with 'sagaloom dev' or 'sagaloom jobs serve MODULE', "
            "or say where it is with --url or SAGALOOM_JOBS_URL"
        )


@jobs_app.command("serve")
def jobs_serve(
    modules: Modules = None,
    host: Host = None,
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="The port; by default PORT, else 8091.")
    ] = None,
    token: Token = None,
    insecure: Insecure = False,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="How many runs at once.")] = 16,
    processes: Annotated[
        int | None,
        typer.Option("--processes", min=1, help="How many of them in processes of the pool; by default one a CPU."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Do not start when a module cannot be loaded, instead of leaving it out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Serve the HTTP API of jobs and run the jobs of the given modules.

    Several processes may do so on one store: each run is worked on by one of them, and when one dies the others go on.
    A module that cannot be loaded is left out, and said so here, by the list of jobs and by health.
    """
    from sagaloom.cli.jobs_server import JobsPlan, run
    from sagaloom.cli.logs import configure_logs
    from sagaloom.cli.server import announcer, listen
    from sagaloom.settings import DEFAULT_JOBS_PORT, load_settings, refuse_open_door
    from sagaloom.workers.registry import load_what_is_sound

    settings = load_settings(host=host, port=port, token=token or None)
    place = settings.place
    refuse_open_door(settings, is_insecure=insecure)
    jobs, problems = load_what_is_sound(modules or [])
    if strict and problems:
        raise problems[0].error
    chosen = settings.port if "port" in settings.model_fields_set else DEFAULT_JOBS_PORT
    listener = listen(settings.host, chosen, hint="is a jobs server running already? --port or PORT chooses another")
    configure_logs(settings.log_level)
    for problem in problems:
        logging.getLogger("sagaloom.jobs").error("left out: %s", problem.error.message)
    names = ", ".join(job.id for job in jobs)
    run(
        JobsPlan(
            settings=settings,
            listener=listener,
            jobs=jobs,
            place=place,
            concurrency=concurrency,
            processes=processes,
            problems=problems,
            announce=announcer(f"serving {names} on {{url}}", as_json=as_json),
        )
    )


@jobs_app.command("list")
def jobs_list(url: JobsUrl = _URL, token: Token = None, as_json: AsJson = False) -> None:
    """List the loaded jobs."""
    from sagaloom.cli.output import print_json, print_table

    with _JobsClient(url, token) as api:
        answer = api.get(f"{_PREFIX}/jobs")
    if as_json:
        print_json(answer)
        return
    print_table(
        ("job", "payload", "attempts", "timeout", "runs in", "schedule", "next"),
        [
            (
                one["id"],
                one["payloadType"],
                one["retry"]["maxAttempts"],
                f"{one['timeoutSeconds']:g} s",
                one["runIn"],
                one.get("schedule", {}).get("cron"),
                one.get("schedule", {}).get("nextTickAt"),
            )
            for one in answer["jobs"]
        ],
        empty="no jobs are loaded",
    )
    for problem in answer["problems"]:
        print(f"left out: {problem['problem']}")


@jobs_app.command("trigger")
def jobs_trigger(
    job: Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", show_default=False)],
    payload: Annotated[str, typer.Option("--payload", help="JSON; @FILE reads a file, - reads stdin.")] = "{}",
    priority: Annotated[
        int | None, typer.Option("--priority", min=0, max=100, help="Higher goes first; by default 50.")
    ] = None,
    delay: Annotated[str | None, typer.Option("--delay", help="How long the run waits, such as 5m.")] = None,
    correlation_id: Annotated[str | None, typer.Option("--correlation-id", help="Kept with the run.")] = None,
    idempotency_key: Annotated[str | None, typer.Option("--idempotency-key", help="Makes a repeat harmless.")] = None,
    url: JobsUrl = _URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Trigger a run of a job."""
    from sagaloom.cli.output import print_json
    from sagaloom.cli.payloads import json_of

    body: dict[str, object] = {"payload": json_of(payload)}
    optional = {
        "priority": priority,
        "delay": delay,
        "correlationId": correlation_id,
        "idempotencyKey": idempotency_key,
    }
    body |= {name: value for name, value in optional.items() if value is not None}
    with _JobsClient(url, token) as api:
        answer = api.post(f"{_PREFIX}/jobs/{quote(job, safe='')}/trigger", body)
    if as_json:
        print_json(answer)
    else:
        what = "a duplicate: nothing changed" if answer["duplicate"] else "triggered"
        print(f"{answer['jobId']} {answer['runId']}: {what}")


@jobs_app.command("runs")
def jobs_runs(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Show this one, with everything.", show_default=False)
    ] = None,
    job: Annotated[str | None, typer.Option("--job", help="Only of this job.")] = None,
    status: Annotated[
        str | None, typer.Option("--status", help="Only these: pending, running, succeeded, failed or cancelled.")
    ] = None,
    limit: Limit = 50,
    cursor: Annotated[str | None, typer.Option("--cursor", help="The next page, as the page before named it.")] = None,
    url: JobsUrl = _URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first; or show one."""
    from sagaloom.cli.output import print_fields, print_json, print_table

    with _JobsClient(url, token) as api:
        if run is not None:
            answer = api.get(f"{_PREFIX}/runs/{quote(run, safe='')}")
        else:
            answer = api.get(f"{_PREFIX}/runs", jobId=job, status=status, limit=limit, cursor=cursor)
    if as_json:
        print_json(answer)
    elif run is not None:
        print_fields(answer)
    else:
        print_table(
            ("run", "job", "status", "attempt", "created", "result"),
            [
                (one["runId"], one["jobId"], one["status"], one["attempt"], one["createdAt"], _outcome(one))
                for one in answer["runs"]
            ],
            empty="no runs",
        )
        if answer["cursor"]:
            print(f"more with --cursor {answer['cursor']}")


RunId = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.", show_default=False)]


@jobs_app.command("cancel")
def jobs_cancel(
    run: RunId,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; it is kept with the run.")] = None,
    url: JobsUrl = _URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """End a run: at once if it waits; if it is under way its handler is told, and given a moment."""
    with _JobsClient(url, token) as api:
        answer = api.post(f"{_PREFIX}/runs/{quote(run, safe='')}/cancel", {"reason": reason} if reason else {})
    _say_what_became(answer, as_json=as_json)


@jobs_app.command("redrive")
def jobs_redrive(run: RunId, url: JobsUrl = _URL, token: Token = None, as_json: AsJson = False) -> None:
    """Let a failed or cancelled run begin anew, with a fresh count of attempts."""
    with _JobsClient(url, token) as api:
        answer = api.post(f"{_PREFIX}/runs/{quote(run, safe='')}/redrive")
    _say_what_became(answer, as_json=as_json)


def _say_what_became(run: dict[str, Any], *, as_json: bool) -> None:
    from sagaloom.cli.output import print_json

    if as_json:
        print_json(run)
    elif run["status"] == "running" and "cancelledAt" in run:
        print(f"{run['jobId']} {run['runId']}: asked to end")
    else:
        print(f"{run['jobId']} {run['runId']}: {run['status']}")


def _outcome(run: dict[str, Any]) -> object:
    if run["status"] == "succeeded":
        return run.get("result")
    if run["status"] == "cancelled":
        return run.get("cancelReason")
    if "progress" in run and run["status"] == "running":
        progress = run["progress"]
        part = f"{progress['fraction']:.0%}" if "fraction" in progress else ""
        return f"{part} {progress.get('message', '')}".strip()
    return run["failure"]["message"] if "failure" in run else None
