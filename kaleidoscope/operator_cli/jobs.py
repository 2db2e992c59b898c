"""Background jobs, and the worker that runs them."""

from __future__ import annotations

import signal
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from kaleidoscope.errors import InputError
from kaleidoscope.operator_cli.frame import (
    MOST,
    Cursor,
    JsonOption,
    Limit,
    Output,
    Work,
    command,
    listing,
    more,
    none_of,
    require_database,
    short,
    when,
)
from kaleidoscope.terminal import fields, printable, table

if TYPE_CHECKING:
    from kaleidoscope.jobs import JobView
    from kaleidoscope.tables import Job

job_group = typer.Typer(
    name="job", help="Background jobs: training, compaction, features, guardrails.", no_args_is_help=True
)

JobId = Annotated[int, typer.Argument(metavar="ID", min=1, max=MOST, help="Number of the job.")]


def _state(view: JobView) -> str:
    if view.cancelled_by is not None and view.state == "running":
        return "being cancelled"
    if view.state == "queued" and view.attempts > 0:
        return f"waiting for attempt {view.attempts + 1} of {view.max_attempts}"
    return view.state


def _error(view: JobView) -> str:
    return short((view.error or "").partition("\n")[0])


@command(job_group, "list")
def job_list(
    work: Work,
    state: Annotated[
        str | None, typer.Option("--state", help="Only queued, running, succeeded, failed or cancelled ones.")
    ] = None,
    kind: Annotated[str | None, typer.Option("--kind", help="Only jobs of this kind, such as retrain.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Output:
    """List the jobs of the business, newest first."""
    from kaleidoscope.businesses import get_business
    from kaleidoscope.jobs import JobState, JobView, list_jobs
    from kaleidoscope.views import page_view

    if state is not None and state not in list(JobState):
        raise InputError(f"--state: {state!r} is none. Give {', '.join(JobState)}.")
    get_business(work.session)
    wanted = None if state is None else JobState(state)
    found = list_jobs(work.session, state=wanted, kind=kind, cursor=cursor, limit=limit)
    page = page_view(found, JobView.of)
    rows = [
        (v.id, v.kind, listing(v.arguments), _state(v), v.author, when(v.created_at), when(v.finished_at), _error(v))
        for v in page.items
    ]
    columns = ("id", "kind", "about", "state", "author", "queued", "finished", "error")
    shown = table(columns, rows, whole=("id", "kind", "queued", "finished"))
    return Output(page, shown, *none_of(rows, "jobs"), *more(page.next_cursor))


def _job_output(row: Job, *said: str) -> Output:
    from kaleidoscope.jobs import JobView

    return Output(JobView.of(row), *said)


@command(job_group, "show")
def job_show(work: Work, job: JobId) -> Output:
    """Show a job: where it stands, its result or what went wrong."""
    import json

    from kaleidoscope.jobs import JobView, get_job

    view = JobView.of(get_job(work.session, job))
    running = (
        None if view.pid is None else f"process {view.pid} on {view.host}, last heard of {when(view.heartbeat_at)}"
    )
    about = {
        "job": f"{view.id} {view.kind}",
        "about": listing(view.arguments),
        "state": _state(view),
        "author": f"{view.author}, {when(view.created_at)}",
        "due": when(view.due_at) if view.state == "queued" else None,
        "attempts": f"{view.attempts} of {view.max_attempts}",
        "started": when(view.started_at),
        "running as": running,
        "finished": when(view.finished_at),
        "cancelled by": view.cancelled_by,
        "exit code": view.exit_code,
        "error": view.error,
        "result": None if view.result is None else json.dumps(view.result, indent=2, ensure_ascii=False),
    }
    return Output(view, fields(about))


@command(job_group, "run", write=True)
def job_run(
    work: Work,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="retrain, compact, materialise, guard or erase.")],
    scene: Annotated[str | None, typer.Argument(metavar="[SCENE]", help="For kinds that are about a scene.")] = None,
    unit: Annotated[str | None, typer.Option("--unit", help="For erase: whose events and features.")] = None,
) -> Output:
    """Queue a job for a worker, unless one like it is queued or running."""
    from kaleidoscope.jobs import enqueue

    given = {"scene": scene, "unit": unit}
    row = enqueue(work.session, kind, {name: value for name, value in given.items() if value is not None})
    return _job_output(row, f"Queued job {row.id}. See how it does: `kaleidoscope job show {row.id}`")


@command(job_group, "cancel", write=True)
def job_cancel(work: Work, job: JobId) -> Output:
    """Cancel a job; one that is running is stopped by its worker within seconds."""
    from kaleidoscope.jobs import JobState, cancel

    row = cancel(work.session, job)
    if row.state == JobState.CANCELLED:
        return _job_output(row, f"Cancelled job {row.id}.")
    return _job_output(row, f"Job {row.id} is running; its worker stops it at its next heartbeat.")


@command(job_group, "retry", write=True)
def job_retry(work: Work, job: JobId) -> Output:
    """Queue again, as a new job, what failed or was cancelled."""
    from kaleidoscope.jobs import retry

    row = retry(work.session, job)
    return _job_output(row, f"Queued job {row.id}, which does again what job {job} should have done.")


def worker(
    once: Annotated[bool, typer.Option("--once", help="Run what is due, then end; for cron.")] = False,
    slots: Annotated[int, typer.Option("--slots", min=1, max=64, help="Jobs to run at a time.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Run background jobs of every business, and queue those whose time has come, until Ctrl-C or SIGTERM."""
    from kaleidoscope.database import open_database
    from kaleidoscope.jobs import Worker
    from kaleidoscope.settings import load_settings

    settings = load_settings()
    require_database(settings)

    def say(line: str) -> None:
        sys.stderr.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {printable(line)}\n")
        sys.stderr.flush()

    with open_database(settings.database_url) as database:
        runner = Worker(database, slots=slots, say=say)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: runner.stop())
        say(f"Worker {runner.name}: {slots} jobs at a time, {database.name}")
        tally = runner.run(once=once)
    said = {what.replace("_", " "): count for what, count in sorted(tally.items())}
    Output(dict(tally), f"Ended. {listing(said) or 'There was nothing to do'}.").print(as_json=as_json)
