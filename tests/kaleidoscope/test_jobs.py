"""Background jobs: what becomes of them, who may do what, the schedule, and workers that are stopped or die.

The jobs here are small shell scripts; that the platform's own commands are run the same way is tested once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import select

from kaleidoscope import cli
from kaleidoscope.access import Caller
from kaleidoscope.database import Database, Session
from kaleidoscope.errors import ConflictError, ForbiddenError, InputError, NotFoundError, UnavailableError
from kaleidoscope.jobs import (
    JOB_KINDS,
    JobKind,
    JobState,
    JobView,
    Target,
    Timing,
    Worker,
    cancel,
    due,
    enqueue,
    get_job,
    list_jobs,
    live_targets,
    prune,
    retry,
)
from kaleidoscope.release import ReleasePlan, Shares, draft_release, rollback, start
from kaleidoscope.review import make_variants, move_variants
from kaleidoscope.tables import AuditEntry, Job, Scene, now
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.stock import stocked

ROOT = Path(__file__).parents[2]
ANN = person("ann")
PATIENCE_S = 60.0
QUICK = Timing(tick_s=0.02, poll_s=0.02, beat_s=0.05, lease_s=10, schedule_s=0.05, grace_s=0.3, finish_s=0.2)


def script(text: str, **more: Any) -> JobKind:
    """A kind of job that is this shell script; $scene is what it is about."""
    return JobKind(lambda _, given: ["env", f"scene={given.get('scene', '')}", "sh", "-c", text], **more)


KINDS = {
    "count": script("""echo '{"rows": 3}'"""),
    "scene": script("""echo "{\\"scene\\": \\"$scene\\"}" """, needs=("scene",), every=timedelta(hours=1)),
    "fail": script("echo 'first line' >&2; echo 'the disk is full' >&2; exit 1", delay=timedelta(0)),
    "later": script("exit 1", attempts=4, delay=timedelta(seconds=100)),
    "nonsense": script("""echo '{"error": {"code": "bad_log", "message": "log.csv has no column y"}}'; exit 2"""),
    "killed": script("kill -9 $$", attempts=1),
    "silent": script("echo done"),
    "nan": script("""echo '{"auc": NaN}'"""),
    "person": script("""echo '{"erased": 4}'""", needs=("unit",), roles=(Role.ADMIN,), private=True),
    "whose": script("""echo "{\\"user\\": \\"$KALEIDOSCOPE_USER\\"}" """),
}


def queue(database: Database, kind: str, kinds: dict[str, JobKind] = KINDS, **arguments: str) -> int:
    with database.transaction(ANN) as session:
        return enqueue(session, kind, arguments, kinds=kinds).id


def job(database: Database, number: int) -> Job:
    with database.transaction(ANN, write=False) as session:
        return get_job(session, number)


def nothing(_: Session) -> list[Target]:
    return []


def work_once(database: Database, kinds: dict[str, JobKind] = KINDS, **more: Any) -> Counter[str]:
    return Worker(database, kinds=kinds, **{"targets": nothing, "timing": QUICK, **more}).run(once=True)


@contextmanager
def working(database: Database, kinds: dict[str, JobKind] = KINDS, **more: Any) -> Iterator[Worker]:
    """A worker in a thread; stopped at the end."""
    worker = Worker(database, kinds=kinds, **{"targets": nothing, "timing": QUICK, **more})
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def wait_for(happened: Callable[[], object]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.02)


def state_of(pid: int) -> str | None:
    """The letter of the process's state, None where there is no such process.

    Its file in ``/proc`` may be gone before it is opened, or between the opening and the reading.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None


def alive(pid: int) -> bool:
    """Whether the process runs; one that is dead and not yet waited for does not."""
    return state_of(pid) not in {None, "Z", "X"}


def pid_in(path: Path) -> int:
    wait_for(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def wind_back(database: Database, column: str, by: timedelta, number: int = 1) -> None:
    """As if the moment in the column had been earlier."""
    with database.transaction(ANN) as session:
        row = get_job(session, number)
        setattr(row, column, getattr(row, column) - by)


# ── what becomes of a job ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_that_succeeds_keeps_what_it_printed(database: Database) -> None:
    number = queue(database, "count")
    assert job(database, number).state == JobState.QUEUED
    assert work_once(database) == {"succeeded": 1}
    row = job(database, number)
    assert (row.state, row.result, row.exit_code, row.error) == (JobState.SUCCEEDED, {"rows": 3}, 0, None)
    assert (row.attempts, row.author, row.worker, row.pid) == (1, "ann", None, None)
    assert row.started_at is not None and row.finished_at is not None
    assert row.created_at <= row.started_at <= row.finished_at


def test_a_command_of_the_platform_is_run_in_this_environment(
    sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALEIDOSCOPE_DATABASE_URL", str(sqlite.url))
    command = [sys.executable, "-m", "kaleidoscope", "database", "status", "--json"]
    kinds = {"status": JobKind(lambda *_: command)}
    number = queue(sqlite, "status", kinds)
    work_once(sqlite, kinds)
    result = job(sqlite, number).result
    assert result is not None and result["up_to_date"] is True


def test_a_job_acts_in_the_name_of_who_asked_for_it(sqlite: Database) -> None:
    number = queue(sqlite, "whose")
    work_once(sqlite)
    assert job(sqlite, number).result == {"user": f"ann (job {number})"}


def test_a_job_that_fails_is_tried_again_and_keeps_the_end_of_what_it_said(sqlite: Database) -> None:
    number = queue(sqlite, "fail")
    assert work_once(sqlite) == {"retried": 2, "failed": 1}
    row = job(sqlite, number)
    assert (row.state, row.attempts, row.exit_code, row.result) == (JobState.FAILED, 3, 1, None)
    assert row.error == "first line\nthe disk is full"


def test_each_attempt_waits_longer_than_the_one_before(sqlite: Database) -> None:
    number = queue(sqlite, "later")
    for delay in (timedelta(seconds=seconds) for seconds in (100, 400, 1600)):
        before = now()
        assert work_once(sqlite) == {"retried": 1}
        after = now()
        assert work_once(sqlite) == {}
        row = job(sqlite, number)
        assert row.state == JobState.QUEUED
        assert before + delay <= row.due_at <= after + delay
        wind_back(sqlite, "due_at", timedelta(hours=1))
    assert work_once(sqlite) == {"failed": 1}


def test_what_was_given_wrongly_is_not_tried_again(sqlite: Database) -> None:
    number = queue(sqlite, "nonsense")
    assert work_once(sqlite) == {"failed": 1}
    row = job(sqlite, number)
    assert (row.attempts, row.exit_code, row.error) == (1, 2, "log.csv has no column y")


@pytest.mark.parametrize(
    ("kind", "said"),
    [("killed", "killed by signal 9"), ("silent", "printed no JSON object"), ("nan", "printed no JSON object")],
)
def test_what_ends_without_an_answer_has_failed(sqlite: Database, kind: str, said: str) -> None:
    number = queue(sqlite, kind)
    assert work_once(sqlite) == {"failed": 1}
    assert said in str(job(sqlite, number).error)


def test_endless_complaints_are_cut_to_their_end(sqlite: Database) -> None:
    text = "i=0; while [ $i -lt 3000 ]; do echo \"line $i\"; i=$((i+1)); done >&2; printf '\\0last\\377' >&2; exit 1"
    kinds = {"loud": script(text, attempts=1)}
    number = queue(sqlite, "loud", kinds)
    work_once(sqlite, kinds)
    error = job(sqlite, number).error
    assert error is not None
    assert len(error) <= 4000 and "line 2999" in error and error.endswith("last\ufffd")


def test_a_job_that_takes_too_long_is_stopped(
    sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"slow": script(f"echo 'at 10 %' >&2; echo $$ > {tmp_path}/pid; sleep 600", timeout_s=4000, attempts=1)}
    number, ahead = queue(sqlite, "slow", kinds), [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], sleep=time.sleep)
    monkeypatch.setattr("kaleidoscope.jobs.time", clock)
    with working(sqlite, kinds) as worker:
        pid = pid_in(tmp_path / "pid")
        wait_for(lambda: job(sqlite, number).pid is not None)
        ahead[0] = 4000 - PATIENCE_S  # not yet
        beat = job(sqlite, number).heartbeat_at
        wait_for(lambda: job(sqlite, number).heartbeat_at != beat)
        assert job(sqlite, number).state == JobState.RUNNING
        ahead[0] = 4000
        wait_for(lambda: job(sqlite, number).state == JobState.FAILED)
    assert worker.tally == {"failed": 1}
    assert job(sqlite, number).error == "It took longer than 4000 s and was stopped.\nat 10 %"
    wait_for(lambda: not alive(pid))


def test_nothing_that_a_job_leaves_behind_goes_on(sqlite: Database, tmp_path: Path) -> None:
    kinds = {"daemon": script(f"sleep 600 & echo $! > {tmp_path}/pid; echo '{{}}'")}
    queue(sqlite, "daemon", kinds)
    assert work_once(sqlite, kinds) == {"succeeded": 1}
    wait_for(lambda: not alive(pid_in(tmp_path / "pid")))


# ── asking, cancelling, trying again ────────────────────────────────────────────────────────────────────────────────


def test_two_of_a_kind_about_the_same_are_never_active(database: Database) -> None:
    with database.transaction(ANN) as session:
        for name in ("home", "shop"):
            session.add(Scene(business_id="acme", id=name, name=name, spec={}, author="ann"))
    first = queue(database, "scene", scene="home")
    with pytest.raises(ConflictError, match=f"Job {first} does this already, it is queued.*job cancel {first}"):
        queue(database, "scene", scene="home")
    queue(database, "scene", scene="shop")
    with database.transaction(person("eve", business="rival")) as session:
        enqueue(session, "count", kinds=KINDS)
    queue(database, "count")
    work_once(database)
    assert queue(database, "scene", scene="home") == 4


def test_the_database_itself_refuses_a_second_active_job(database: Database) -> None:
    def another(state: str) -> None:
        with database.transaction(ANN) as session:
            highest = session.scalar(select(sa.func.max(Job.id))) or 0
            session.add(
                Job(
                    business_id="acme",
                    id=highest + 1,
                    kind="count",
                    arguments={},
                    state=state,
                    author="x",
                    max_attempts=1,
                )
            )

    another("failed")
    another("succeeded")
    another("running")
    another("cancelled")
    for state in ("queued", "running"):
        with pytest.raises(ConflictError):
            another(state)


def test_of_many_who_ask_at_once_one_is_heard(database: Database) -> None:
    heard: list[int] = []
    refused: list[str] = []
    ready = threading.Barrier(6)

    def ask() -> None:
        ready.wait()
        try:
            heard.append(queue(database, "count"))
        except ConflictError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(heard), len(refused)) == (1, 5)
    assert all("does this already" in said for said in refused)


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("bake", {}, "no kind of job 'bake'. Give one of retrain, attribute"),
        ("retrain", {}, "takes scene; given: nothing"),
        ("compact", {"scene": "home"}, "takes nothing; given: scene"),
        ("erase", {"unit": "a\0b"}, "unit: give 1 to 500"),
        ("erase", {"unit": ""}, "unit: give 1 to 500"),
    ],
)
def test_nonsense_is_not_queued(sqlite: Database, kind: str, arguments: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said), sqlite.transaction(ANN) as session:
        enqueue(session, kind, arguments)


def test_a_scene_that_is_not_there_is_not_trained(sqlite: Database) -> None:
    with pytest.raises(NotFoundError, match="no scene 'nowhere'"), sqlite.transaction(ANN) as session:
        enqueue(session, "retrain", {"scene": "nowhere"})


@pytest.mark.parametrize("role", Role)
def test_viewers_and_reviewers_read_and_others_ask(sqlite: Database, role: Role) -> None:
    caller, number = person("vic", role), queue(sqlite, "count")
    may = role in (Role.EDITOR, Role.PUBLISHER, Role.ADMIN)
    with sqlite.transaction(caller) as session:
        assert get_job(session, number).id == number
        with contextlib.nullcontext() if may else pytest.raises(ForbiddenError):
            cancel(session, number, kinds=KINDS)
    with sqlite.transaction(ANN) as session:
        get_job(session, number).state = JobState.FAILED
    with sqlite.transaction(caller) as session:
        with contextlib.nullcontext() if may else pytest.raises(ForbiddenError):
            retry(session, number, kinds=KINDS)
        with contextlib.nullcontext() if may else pytest.raises(ForbiddenError):
            enqueue(session, "fail", kinds=KINDS)
        with contextlib.nullcontext() if role == Role.ADMIN else pytest.raises(ForbiddenError):
            enqueue(session, "person", {"unit": "u1"}, kinds=KINDS)


def test_jobs_of_another_business_are_not_there(database: Database) -> None:
    number = queue(database, "count")
    with database.transaction(person("eve", business="rival")) as session:
        assert list_jobs(session).items == []
        for touch in (get_job, cancel, retry):
            with pytest.raises(NotFoundError):
                touch(session, number)


def test_jobs_are_listed_newest_first_and_by_state_and_kind(sqlite: Database) -> None:
    for kind in ("count", "nonsense", "later"):
        queue(sqlite, kind)
    work_once(sqlite)
    with sqlite.transaction(ANN, write=False) as session:
        page = list_jobs(session, limit=2)
        assert [row.id for row in page.items] == [3, 2]
        assert [row.id for row in list_jobs(session, cursor=page.next_cursor).items] == [1]
        assert [row.kind for row in list_jobs(session, state=JobState.FAILED).items] == ["nonsense"]
        assert [row.kind for row in list_jobs(session, kind="count").items] == ["count"]


def test_a_queued_job_is_cancelled_at_once(sqlite: Database) -> None:
    number = queue(sqlite, "count")
    with sqlite.transaction(person("eva", Role.EDITOR)) as session:
        cancel(session, number, kinds=KINDS)
    assert work_once(sqlite) == {}
    row = job(sqlite, number)
    assert (row.state, row.cancelled_by, row.attempts) == (JobState.CANCELLED, "eva", 0)
    with pytest.raises(ConflictError, match=r"was cancelled\. There is nothing"), sqlite.transaction(ANN) as session:
        cancel(session, number, kinds=KINDS)


def test_cancelling_ends_every_process_of_a_running_job(database: Database, tmp_path: Path) -> None:
    # Neither the script nor what it starts minds SIGTERM.
    stubborn = f"trap '' TERM; sleep 600 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/pid; wait; sleep 600"
    kinds = {"stubborn": script(stubborn)}
    number = queue(database, "stubborn", kinds)
    with working(database, kinds) as worker:
        child, pid = pid_in(tmp_path / "child"), pid_in(tmp_path / "pid")
        wait_for(lambda: job(database, number).pid is not None)
        assert os.getpgid(pid) == os.getpgid(child) == job(database, number).pid
        with database.transaction(ANN) as session:
            assert cancel(session, number, kinds=kinds).state == JobState.RUNNING
        wait_for(lambda: job(database, number).state != JobState.RUNNING)
    row = job(database, number)
    assert (row.state, row.cancelled_by, row.attempts) == (JobState.CANCELLED, "ann", 1)
    assert worker.tally == {"cancelled": 1}
    wait_for(lambda: not alive(pid) and not alive(child))


def test_what_failed_is_tried_again_as_a_new_job(sqlite: Database) -> None:
    number = queue(sqlite, "nonsense")
    work_once(sqlite)
    with sqlite.transaction(person("eva", Role.EDITOR)) as session:
        again = retry(session, number, kinds=KINDS)
    assert (again.id, again.kind, again.state, again.author) == (number + 1, "nonsense", JobState.QUEUED, "eva")
    assert job(sqlite, number).state == JobState.FAILED
    with pytest.raises(ConflictError, match=r"is queued\. Only what failed"), sqlite.transaction(ANN) as session:
        retry(session, again.id, kinds=KINDS)


def test_what_succeeded_is_not_tried_again(sqlite: Database) -> None:
    number = queue(sqlite, "count")
    work_once(sqlite)
    with pytest.raises(ConflictError, match=r"succeeded\. Only what failed"), sqlite.transaction(ANN) as session:
        retry(session, number, kinds=KINDS)


def test_whom_an_erasure_was_about_is_not_shown_and_then_forgotten(database: Database) -> None:
    with database.transaction(ANN) as session:
        assert JobView.of(enqueue(session, "erase", {"unit": "u-4711"})).arguments == {}
    number = queue(database, "person", unit="u-4711")
    assert "u-4711" not in job(database, number).subject
    with pytest.raises(ConflictError):
        queue(database, "person", unit="u-4711")
    queue(database, "person", unit="u-4712")
    assert work_once(database) == {"succeeded": 2}
    row = job(database, number)
    assert (row.arguments, row.subject, row.result) == ({}, "", {"erased": 4})
    with database.transaction(ANN, write=False) as session:
        assert list(session.scalars(select(AuditEntry).where(AuditEntry.entity == "jobs"))) == []


# ── workers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_is_run_by_one_of_many_workers(database: Database, tmp_path: Path) -> None:
    names = [f"s{n}" for n in range(10)]
    with database.transaction(ANN) as session:
        session.add_all(Scene(business_id="acme", id=n, name=n, spec={}, author="ann") for n in names)
    kinds = {"mark": script(f"echo $scene >> {tmp_path}/marks; echo '{{}}'", needs=("scene",))}
    for name in names:
        queue(database, "mark", kinds, scene=name)
    workers = [Worker(database, kinds=kinds, targets=nothing, timing=QUICK) for _ in range(4)]
    threads = [threading.Thread(target=worker.run, kwargs={"once": True}) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((tmp_path / "marks").read_text().split()) == names
    assert sum((worker.tally for worker in workers), Counter()) == {"succeeded": 10}


def test_one_heavy_job_runs_at_a_time_and_light_ones_beside_it(sqlite: Database, tmp_path: Path) -> None:
    begun = "touch {0}/{1}.begun; while [ ! -e {0}/go ]; do sleep 0.02; done; echo '{{}}'"
    kinds = {
        "heavy": script(begun.format(tmp_path, "heavy"), heavy=True),
        "heavier": script(begun.format(tmp_path, "heavier"), heavy=True),
        "light": script(begun.format(tmp_path, "light")),
    }
    for kind in kinds:
        queue(sqlite, kind, kinds)
    with working(sqlite, kinds, slots=3) as worker:
        wait_for(lambda: (tmp_path / "heavy.begun").exists() and (tmp_path / "light.begun").exists())
        assert job(sqlite, 2).state == JobState.QUEUED
        (tmp_path / "go").touch()
        wait_for(lambda: worker.tally["succeeded"] == 3)


def test_a_worker_that_stops_finishes_what_is_soon_done(sqlite: Database, tmp_path: Path) -> None:
    kinds = {"short": script(f"touch {tmp_path}/begun; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; echo '{{}}'")}
    number = queue(sqlite, "short", kinds)
    with working(sqlite, kinds, timing=replace(QUICK, finish_s=60)) as worker:
        wait_for((tmp_path / "begun").exists)
        worker.stop()
        after = queue(sqlite, "count")
        (tmp_path / "go").touch()
        wait_for(lambda: job(sqlite, number).state == JobState.SUCCEEDED)
    assert job(sqlite, after).state == JobState.QUEUED


@pytest.mark.parametrize(("finish_s", "stops"), [(0.1, 1), (60, 2)])
def test_a_worker_that_stops_hands_back_what_takes_longer(
    database: Database, tmp_path: Path, finish_s: float, stops: int
) -> None:
    kinds = {"long": script(f"echo $$ > {tmp_path}/pid; sleep 600")}
    number = queue(database, "long", kinds)
    with working(database, kinds, timing=replace(QUICK, finish_s=finish_s)) as worker:
        pid = pid_in(tmp_path / "pid")
        for _ in range(stops - 1):
            worker.stop()
    assert worker.tally == {"handed_back": 1}
    wait_for(lambda: not alive(pid))
    row = job(database, number)
    assert (row.state, row.attempts, row.worker) == (JobState.QUEUED, 0, None)
    assert row.due_at <= now()


WORKSHOP = """
import sys
from kaleidoscope.database import Database
from kaleidoscope.jobs import JobKind, Timing, Worker

url, text, lease_s = sys.argv[1:]
quick = Timing(tick_s=0.02, poll_s=0.02, beat_s=0.1, lease_s=float(lease_s))
kinds = {"job": JobKind(lambda *_: ["sh", "-c", text])}
worker = Worker(Database(url), kinds=kinds, targets=lambda _: [], timing=quick)
print(worker.run(once=True), flush=True)
"""
SHORT_LEASE_S = 4.0  # as long as a busy machine may keep a worker from its heartbeat


@contextmanager
def workshop(database: Database, text: str, lease_s: float) -> Iterator[subprocess.Popen[str]]:
    """A worker in a process of its own."""
    url = database.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", WORKSHOP, url, text, str(lease_s)]
    with subprocess.Popen(command, text=True, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def freeze(process: subprocess.Popen[str], database: Database) -> None:
    """Stop it, and not in the middle of a transaction, which would keep all others waiting."""
    while True:
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: state_of(process.pid) == "T")
        with contextlib.closing(sqlite3.connect(str(database.url.database), timeout=0)) as probe:
            try:
                probe.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError:
                process.send_signal(signal.SIGCONT)
        time.sleep(0.01)


def test_the_job_of_a_killed_worker_dies_with_it_and_is_done_by_the_next(database: Database, tmp_path: Path) -> None:
    kinds = {"job": script('echo \'{"by": "the next"}\'')}
    number = queue(database, "job", kinds)
    with workshop(database, f"trap '' TERM; echo $$ > {tmp_path}/pid; sleep 600", lease_s=600) as worker:
        pid = pid_in(tmp_path / "pid")
        wait_for(lambda: job(database, number).pid is not None)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        wait_for(lambda: not alive(pid))  # at once, and not when its lease is over
    row = job(database, number)
    assert (row.state, row.attempts) == (JobState.RUNNING, 1)
    assert work_once(database, kinds, timing=replace(QUICK, lease_s=60)) == {}
    wind_back(database, "heartbeat_at", timedelta(seconds=2.5 * QUICK.lease_s), number)
    with working(database, kinds) as next_one:
        wait_for(lambda: job(database, number).state == JobState.SUCCEEDED)
    row = job(database, number)
    assert (row.attempts, row.result) == (2, {"by": "the next"})
    assert next_one.tally == {"taken_over": 1, "succeeded": 1}


def test_a_job_that_no_worker_survives_fails_in_the_end(sqlite: Database) -> None:
    number = queue(sqlite, "count")
    with sqlite.transaction(ANN) as session:
        row = get_job(session, number)
        row.state, row.attempts, row.host, row.heartbeat_at = JobState.RUNNING, row.max_attempts, "far", now()
    assert work_once(sqlite) == {}
    wind_back(sqlite, "heartbeat_at", timedelta(seconds=2.5 * QUICK.lease_s))
    assert work_once(sqlite) == {"taken_over": 1}
    row = job(sqlite, number)
    assert (row.state, row.error) == (JobState.FAILED, "Its worker on far has died or was cut off.")


def test_what_was_cancelled_is_not_taken_over(sqlite: Database) -> None:
    number = queue(sqlite, "count")
    with sqlite.transaction(ANN) as session:
        row = get_job(session, number)
        row.state, row.attempts, row.heartbeat_at = JobState.RUNNING, 1, now() - timedelta(hours=1)
    with sqlite.transaction(ANN) as session:
        cancel(session, number, kinds=KINDS)
    assert work_once(sqlite) == {"taken_over": 1}
    assert job(sqlite, number).state == JobState.CANCELLED


def test_a_worker_that_was_frozen_neither_keeps_its_job_nor_writes_over_the_next_ones(
    sqlite: Database, tmp_path: Path
) -> None:
    kinds = {"job": script('echo \'{"by": "the next"}\'')}
    number = queue(sqlite, "job", kinds)
    with workshop(sqlite, f"echo $$ > {tmp_path}/pid; sleep 600", SHORT_LEASE_S) as frozen:
        pid = pid_in(tmp_path / "pid")
        wait_for(lambda: job(sqlite, number).pid is not None)
        freeze(frozen, sqlite)
        wait_for(lambda: not alive(pid))  # its lease is over, though nobody ended it
        wind_back(sqlite, "heartbeat_at", timedelta(seconds=2.5 * QUICK.lease_s), number)
        with working(sqlite, kinds):
            wait_for(lambda: job(sqlite, number).state == JobState.SUCCEEDED)
        frozen.send_signal(signal.SIGCONT)
        assert frozen.communicate(timeout=PATIENCE_S)[0].strip() == "Counter()"
    assert job(sqlite, number).result == {"by": "the next"}


def test_a_job_outlives_the_lease_as_long_as_its_worker_is_heard_of(sqlite: Database) -> None:
    kinds = {"job": script(f"sleep {SHORT_LEASE_S + 1}; echo '{{}}'")}
    queue(sqlite, "job", kinds)
    assert work_once(sqlite, kinds, timing=replace(QUICK, lease_s=SHORT_LEASE_S)) == {"succeeded": 1}


def test_a_worker_that_has_lost_its_job_ends_it_and_writes_nothing(sqlite: Database, tmp_path: Path) -> None:
    kinds = {"job": script(f"echo $$ > {tmp_path}/pid; sleep 600")}
    number, said = queue(sqlite, "job", kinds), list[str]()
    with working(sqlite, kinds, say=said.append) as worker:
        pid = pid_in(tmp_path / "pid")
        with sqlite.transaction(ANN) as session:
            get_job(session, number).worker = "another"
        wait_for(lambda: any("another worker has it" in line for line in said))
    wait_for(lambda: not alive(pid))
    assert worker.tally == {}
    assert (job(sqlite, number).state, job(sqlite, number).worker) == (JobState.RUNNING, "another")


class Troubled(Database):
    """A database that does something else before a transaction of somebody."""

    def before(self, caller: Caller, write: bool) -> None:
        """Nothing, unless a test says otherwise."""

    @contextmanager
    def transaction(self, caller: Caller, *, write: bool = True) -> Iterator[Session]:
        self.before(caller, write)
        with super().transaction(caller, write=write) as session:
            yield session


def test_a_job_goes_on_while_the_database_is_away_and_its_end_is_not_lost(sqlite: Database, tmp_path: Path) -> None:
    kinds = {"job": script(f"touch {tmp_path}/begun; while [ ! -e {tmp_path}/go ]; do sleep 0.02; done; echo '{{}}'")}
    number = queue(sqlite, "job", kinds)
    said: list[str] = []
    away = threading.Event()

    class Flaky(Troubled):
        def before(self, caller: Caller, write: bool) -> None:
            if away.is_set():
                raise UnavailableError("it is away")

    with Flaky(str(sqlite.url)) as flaky, working(flaky, kinds, say=said.append):
        wait_for((tmp_path / "begun").exists)
        away.set()
        wait_for(lambda: "The database is away: it is away" in said)
        (tmp_path / "go").touch()
        time.sleep(0.2)
        assert job(sqlite, number).state == JobState.RUNNING
        away.clear()
        wait_for(lambda: job(sqlite, number).state == JobState.SUCCEEDED)
    assert said.count("The database is away: it is away") == said.count("The database is back.") == 1


# ── the schedule ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def scene(database: Database) -> Database:
    """With the scene home in acme."""
    with database.transaction(ANN) as session:
        session.add(Scene(business_id="acme", id="home", name="home", spec={}, author="ann"))
    return database


def home(session: Session) -> list[Target]:
    return [("scene", "home")] if session.business == "acme" else []


def is_due(database: Database) -> bool:
    with database.transaction(ANN, write=False) as session:
        return due(session, home(session), kinds=KINDS) == [("scene", "home")]


def test_what_is_periodic_is_due_once_a_period_and_never_while_it_is_active(scene: Database) -> None:
    assert is_due(scene)
    number = queue(scene, "scene", scene="home")
    assert not is_due(scene)
    wind_back(scene, "created_at", timedelta(minutes=61), number)
    assert not is_due(scene)
    assert work_once(scene) == {"succeeded": 1}
    assert is_due(scene)
    queue(scene, "scene", scene="home")
    assert work_once(scene) == {"succeeded": 1}
    assert not is_due(scene)


def test_workers_queue_and_run_what_is_due_and_only_once(scene: Database) -> None:
    workers = [Worker(scene, kinds=KINDS, targets=home, timing=QUICK) for _ in range(3)]
    threads = [threading.Thread(target=worker.run, kwargs={"once": True}) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with scene.transaction(ANN, write=False) as session:
        (row,) = list_jobs(session).items
    assert (row.author, row.result) == ("schedule", {"scene": "home"})


def test_a_worker_from_cron_ends_though_the_next_period_has_begun(scene: Database) -> None:
    kinds = {"scene": replace(KINDS["scene"], every=timedelta(0))}
    assert work_once(scene, kinds, targets=home, timing=replace(QUICK, schedule_s=0)) == {"succeeded": 1}


def test_what_another_worker_has_just_done_is_not_done_again(scene: Database) -> None:
    class Late(Troubled):
        def before(self, caller: Caller, write: bool) -> None:
            if caller.user == "schedule":
                work_once(scene, targets=home)

    with Late(scene.url.render_as_string(hide_password=False)) as late:
        assert work_once(late, targets=home) == {}
    with scene.transaction(ANN, write=False) as session:
        assert [row.state for row in list_jobs(session).items] == [JobState.SUCCEEDED]


def test_one_business_in_trouble_does_not_keep_others_waiting(scene: Database) -> None:
    def troubled(session: Session) -> list[Target]:
        return [("scene", "home")] if session.business == "acme" else [("scene", "gone")]

    said: list[str] = []
    assert work_once(scene, targets=troubled, say=said.append) == {"succeeded": 1}
    assert any(line.startswith("rival: the schedule failed: There is no scene 'gone'") for line in said)


def test_the_schedule_is_of_scenes_that_show_a_release(sqlite: Database) -> None:
    stocked(sqlite, approved=True)

    def targets() -> list[Target]:
        with sqlite.transaction(ANN, write=False) as session:
            return live_targets(session)

    with sqlite.transaction(ANN) as session:
        make_variants(session, "welcome")
        move_variants(session, "welcome", "submit")
    with sqlite.transaction(person("rex")) as session:
        move_variants(session, "welcome", "approve")
        draft_release(session, "welcome", ReleasePlan(shares=Shares(control=0.5, random=0.5)))
    assert targets() == []
    with sqlite.transaction(ANN) as session:
        start(session, "welcome", 1)
    assert targets() == [
        ("retrain", "welcome"),
        ("attribute", "welcome"),
        ("compact", None),
        ("materialise", None),
        ("guard", "welcome"),
    ]
    with sqlite.transaction(ANN) as session:
        rollback(session, "welcome", reason="test")
    assert targets() == []


def test_old_rows_are_deleted_and_no_number_is_given_twice(database: Database) -> None:
    for _ in range(3):
        queue(database, "count")
        work_once(database)
    for number in (1, 3):
        wind_back(database, "finished_at", timedelta(days=31), number)
    with database.transaction(ANN) as session:
        assert prune(session, kinds=KINDS) == 1
        assert [row.id for row in list_jobs(session).items] == [3, 2]
    assert queue(database, "count") == 4


# ── the platform's own kinds, the command line, the page ────────────────────────────────────────────────────────────


def test_every_kind_is_a_command_that_prints_json() -> None:
    given = {"scene": "home", "unit": "--all"}
    words = {name: list(kind.command("acme", given)) for name, kind in JOB_KINDS.items()}
    for command in words.values():
        assert command[:3] == [sys.executable, "-m", "kaleidoscope"]
        assert command[-3:] == ["--business", "acme", "--json"]
    assert {name: " ".join(command[3:-3]) for name, command in words.items()} == {
        "retrain": "train home",
        "attribute": "attribute home",
        "compact": "events compact",
        "materialise": "features materialise",
        "guard": "release guard home",
        "erase": "events erase --unit=--all",
    }


@pytest.fixture
def folder(sqlite: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    """The command line works on this database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALEIDOSCOPE_DATABASE_URL", str(sqlite.url))
    monkeypatch.setenv("KALEIDOSCOPE_BUSINESS", "acme")
    monkeypatch.setenv("KALEIDOSCOPE_USER", "ann")
    return sqlite


def run(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    out, err = capsys.readouterr()
    assert stop.value.code == code, err
    return out or err


@pytest.mark.usefixtures("folder")
def test_jobs_are_asked_for_seen_and_cancelled_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "job list").splitlines()[-1] == "No jobs."
    assert "Queued job 1." in run(capsys, "job run compact")
    assert "does this already" in run(capsys, "job run compact", 2)
    assert json.loads(run(capsys, "job run materialise --json"))["id"] == 2
    assert json.loads(run(capsys, "job run erase --unit u-1 --json"))["arguments"] == {}
    assert "Cancelled job 2." in run(capsys, "job cancel 2")
    assert "Queued job 4" in run(capsys, "job retry 2")
    said = run(capsys, "job list")
    assert [line.split()[:2] for line in said.splitlines()[-4:]] == [
        ["4", "materialise"], ["3", "erase"], ["2", "materialise"], ["1", "compact"],
    ]  # fmt: skip
    assert "u-1" not in said
    (only,) = json.loads(run(capsys, "job list --state cancelled --kind materialise --json"))["items"]
    assert (only["id"], only["cancelled_by"]) == (2, "ann")
    assert "cancelled by  ann" in run(capsys, "job show 2")
    assert "--state: 'done' is none" in run(capsys, "job list --state done", 2)
    assert "no job '9'" in run(capsys, "job show 9", 2)


def test_a_failure_is_shown_with_what_was_said(folder: Database, capsys: pytest.CaptureFixture[str]) -> None:
    queue(folder, "fail")
    work_once(folder)
    said = run(capsys, "job show 1")
    assert "first line" in said and "the disk is full" in said and "3 of 3" in said
    assert "first line" in run(capsys, "job list") and "disk" not in run(capsys, "job list")


@pytest.fixture
def signals() -> Iterator[None]:
    """What a signal does is afterwards as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_worker_from_cron_says_what_it_did(folder: Database, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "worker --once") == "Ended. There was nothing to do.\n"
    number = queue(folder, "compact", {"compact": KINDS["count"]})
    with folder.transaction(ANN) as session:
        row = get_job(session, number)
        row.state, row.attempts, row.heartbeat_at = JobState.RUNNING, 3, now() - timedelta(hours=1)
    assert run(capsys, "worker --once") == "Ended. taken over=1.\n"


@pytest.mark.usefixtures("folder")
def test_the_worker_command_ends_when_it_is_told_to() -> None:
    command = [sys.executable, "-m", "kaleidoscope", "worker", "--json"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as worker:
        assert worker.stderr is not None and worker.stdout is not None
        assert "2 jobs at a time" in worker.stderr.readline()
        worker.send_signal(signal.SIGTERM)
        assert (worker.wait(PATIENCE_S), worker.stdout.read()) == (0, "{}\n")


def test_the_page_names_every_kind_and_how_often_it_runs() -> None:
    page = (ROOT / "docs" / "jobs.md").read_text(encoding="utf-8")
    for name, kind in JOB_KINDS.items():
        words = " ".join(kind.command("BUSINESS", {"scene": "SCENE", "unit": "UNIT"})[3:-3])
        (row,) = (line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"`{words}`" in row
        period = {
            None: "on request",
            timedelta(days=7): "weekly",
            timedelta(days=1): "daily",
            timedelta(hours=1): "hourly",
        }
        period |= {timedelta(minutes=5): "every 5 minutes", timedelta(minutes=1): "every minute"}
        assert period[kind.every] in row
        hours = kind.timeout_s / 3600
        assert (f"| {hours:g} h |" if hours >= 1 else f"| {kind.timeout_s / 60:g} min |") in row
        assert f"| {kind.attempts} |" in row
