"""Background jobs: what may be run, who asked for it, and the worker that runs it.

A job is a row and a command of ours, started as a process group of its own; nothing heavy runs in the worker. The rows
are the queue, too: whatever happens to a worker, what is to be done is in one place. docs/jobs.md is for operators.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import IO, Any

from sqlalchemy import and_, func, or_, select

from kaleidoscope.access import operator
from kaleidoscope.businesses import get_business
from kaleidoscope.database import PAGE, Database, Page, Session, find, paginate
from kaleidoscope.errors import ConflictError, InputError, KaleidoscopeError, UnavailableError
from kaleidoscope.release import live_at
from kaleidoscope.settings import PREFIX
from kaleidoscope.tables import Business, Job, Scene, now
from kaleidoscope.views import View
from kaleidoscope.vocabulary import Role

MAX_RESULT = 1 << 20  # bytes of the JSON object that a job prints
MAX_ERROR = 4000  # characters of what it says when it fails
MAX_ARGUMENT = 500  # characters
MAX_DELAY = timedelta(hours=1)  # between two attempts
BAD_INPUT = 2  # exit code of a command that was given nonsense: trying again will not help
BATCH = 500  # rows looked at in one go

SCHEDULER = "schedule"  # the author of what nobody asked for

Target = tuple[str, str | None]  # a kind of job, and the scene it is about; None: the business


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ACTIVE = (JobState.QUEUED, JobState.RUNNING)


# ── what may be run ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class JobKind:
    """A kind of job: the command it is, and how often, how long and by whom it may be run."""

    command: Callable[[str, Mapping[str, str]], Sequence[str]]  # of a business and arguments; prints one JSON object
    needs: tuple[str, ...] = ()  # the names of its arguments; of two jobs with the same ones only one is active
    timeout_s: float = 3600
    attempts: int = 3
    delay: timedelta = timedelta(seconds=30)  # before the second attempt; four times as long before each later one
    every: timedelta | None = None  # how often the schedule runs it
    heavy: bool = False  # a worker runs one of these at a time, beside lighter ones
    roles: tuple[Role, ...] = (Role.EDITOR, Role.PUBLISHER)  # who may ask for it, beside admins
    keep: timedelta = timedelta(days=30)  # how long its rows stay
    private: bool = False  # its arguments are about a person, and forgotten once it is done


def _ours(*words: str) -> list[str]:
    return [sys.executable, "-m", "kaleidoscope", *words, "--json"]


JOB_KINDS: Mapping[str, JobKind] = {
    "retrain": JobKind(
        lambda business, given: _ours("train", given["scene"], "--business", business),
        needs=("scene",),
        timeout_s=4 * 3600,
        attempts=2,
        delay=timedelta(minutes=5),
        every=timedelta(days=1),
        heavy=True,
    ),
    "attribute": JobKind(
        lambda business, given: _ours("attribute", given["scene"], "--business", business),
        needs=("scene",),
        timeout_s=3600,
        attempts=2,
        delay=timedelta(minutes=5),
        every=timedelta(days=7),
        heavy=True,
    ),
    "compact": JobKind(
        lambda business, _: _ours("events", "compact", "--business", business), every=timedelta(hours=1)
    ),
    "materialise": JobKind(
        lambda business, _: _ours("features", "materialise", "--business", business),
        timeout_s=1800,
        every=timedelta(minutes=5),
        keep=timedelta(days=2),
    ),
    "guard": JobKind(
        lambda business, given: _ours("release", "guard", given["scene"], "--business", business),
        needs=("scene",),
        timeout_s=300,
        attempts=1,  # the next one comes in a minute
        every=timedelta(minutes=1),
        keep=timedelta(days=2),
    ),
    "erase": JobKind(
        lambda business, given: _ours("events", "erase", f"--unit={given['unit']}", "--business", business),
        needs=("unit",),
        attempts=5,
        roles=(Role.ADMIN,),
        private=True,
    ),
}


def live_targets(session: Session) -> list[Target]:
    """What the schedule runs in the session's business: everything periodic, for the scenes that show a release."""
    live = ((scene, live_at(session, scene)) for scene in session.scalars(select(Scene.id).order_by(Scene.id)))
    scenes = [scene for scene, at in live if at is not None and (at.stable, at.candidate) != (None, None)]
    targets: list[Target] = []
    for name, kind in JOB_KINDS.items():
        if kind.every is not None:
            targets += [(name, scene) for scene in scenes] if kind.needs else [(name, None)]
    return targets if scenes else []


# ── asking for it ───────────────────────────────────────────────────────────────────────────────────────────────────


def enqueue(
    session: Session,
    kind: str,
    arguments: Mapping[str, str] | None = None,
    *,
    kinds: Mapping[str, JobKind] = JOB_KINDS,
) -> Job:
    """Queue a job of this kind in the session's business.

    Raises InputError for an unknown kind or wrong arguments, NotFoundError for an unknown scene, and ConflictError
    where a job of this kind about the same thing is queued or running.
    """
    if kind not in kinds:
        raise InputError(f"There is no kind of job {kind!r}. Give one of {', '.join(kinds)}.")
    wanted, given = kinds[kind], dict(arguments or {})
    session.caller.require(*wanted.roles)
    get_business(session, lock=True)  # within a business jobs are queued one after the other
    _check_arguments(session, kind, wanted, given)
    subject = _subject(wanted, given)
    active = session.scalar(select(Job).where(Job.kind == kind, Job.subject == subject, Job.state.in_(ACTIVE)).limit(1))
    if active is not None:
        raise ConflictError(
            f"Job {active.id} does this already, it is {active.state}. Wait for it, or cancel it:"
            f" `kaleidoscope job cancel {active.id}`."
        )
    job = Job(
        business_id=session.business,
        id=(session.scalar(select(func.max(Job.id))) or 0) + 1,
        kind=kind,
        subject=subject,
        arguments=given,
        state=JobState.QUEUED,
        author=session.caller.user,
        attempts=0,
        max_attempts=wanted.attempts,
    )
    session.add(job)
    session.flush()
    return job


def _check_arguments(session: Session, name: str, kind: JobKind, given: Mapping[str, str]) -> None:
    if set(given) != set(kind.needs):
        needs = ", ".join(kind.needs) or "nothing"
        raise InputError(f"A job {name} takes {needs}; given: {', '.join(given) or 'nothing'}.")
    for key, value in given.items():
        if not 0 < len(value) <= MAX_ARGUMENT or any(ord(c) < 32 for c in value):
            raise InputError(f"{key}: give 1 to {MAX_ARGUMENT} characters on one line.")
    if "scene" in given:
        find(session, Scene, given["scene"])


def _subject(kind: JobKind, given: Mapping[str, str]) -> str:
    text = "/".join(given[name] for name in kind.needs)
    return hashlib.sha256(text.encode()).hexdigest() if kind.private or len(text) > 64 else text


def cancel(session: Session, job_id: int, *, kinds: Mapping[str, JobKind] = JOB_KINDS) -> Job:
    """Cancel a job: at once where it is queued; where it is running, its worker stops it within seconds.

    Raises ConflictError where it is finished.
    """
    job = find(session, Job, job_id, lock=True)
    kind = kinds.get(job.kind)
    session.caller.require(*(JobKind.roles if kind is None else kind.roles))
    if job.state not in ACTIVE:
        raise ConflictError(f"Job {job.id} is finished: it {_ended(job)}. There is nothing to cancel.")
    job.cancelled_by = job.cancelled_by or session.caller.user
    if job.state == JobState.QUEUED:
        _close(job, kind, JobState.CANCELLED)
    session.flush()
    return job


def retry(session: Session, job_id: int, *, kinds: Mapping[str, JobKind] = JOB_KINDS) -> Job:
    """A new job that does again what one that failed or was cancelled should have done; raises ConflictError."""
    job = find(session, Job, job_id)
    if job.state not in (JobState.FAILED, JobState.CANCELLED):
        said = f"is {job.state}" if job.state in ACTIVE else _ended(job)
        raise ConflictError(f"Job {job.id} {said}. Only what failed or was cancelled can be tried again.")
    return enqueue(session, job.kind, job.arguments, kinds=kinds)


def get_job(session: Session, job_id: int) -> Job:
    """The job; raises NotFoundError."""
    return find(session, Job, job_id)


def list_jobs(
    session: Session,
    *,
    state: JobState | None = None,
    kind: str | None = None,
    cursor: str | None = None,
    limit: int = PAGE,
) -> Page[Job]:
    """The jobs of the business, newest first."""
    query = select(Job)
    query = query if state is None else query.where(Job.state == state)
    query = query if kind is None else query.where(Job.kind == kind)
    return paginate(session, query, Job.id, cursor=cursor, limit=limit, descending=True)


class JobView(View):
    """A job and where it stands. What it was given is not shown where it is about a person."""

    id: int
    kind: str
    arguments: dict[str, str]
    state: JobState
    author: str
    created_at: datetime
    due_at: datetime
    attempts: int
    max_attempts: int
    host: str | None
    pid: int | None
    started_at: datetime | None
    heartbeat_at: datetime | None
    finished_at: datetime | None
    cancelled_by: str | None
    exit_code: int | None
    result: dict[str, Any] | None
    error: str | None

    @classmethod
    def of(cls, row: Job) -> JobView:
        """The view of a row."""
        view = cls.model_validate(row)
        kind = JOB_KINDS.get(row.kind)
        return view.model_copy(update={"arguments": {}}) if kind is not None and kind.private else view


# ── the schedule ────────────────────────────────────────────────────────────────────────────────────────────────────


def due(session: Session, targets: Iterable[Target], *, kinds: Mapping[str, JobKind] = JOB_KINDS) -> list[Target]:
    """Those of the targets that are not active, and that nobody has asked for within the period of their kind."""
    found = []
    for name, scene in targets:
        kind = kinds[name]
        if kind.every is None:
            raise ValueError(f"jobs of kind {name} are not periodic")
        query = select(Job).where(Job.kind == name, Job.subject == _subject(kind, _given(scene)))
        last = session.scalar(query.order_by(Job.id.desc()).limit(1))
        if last is None or (last.state not in ACTIVE and last.created_at + kind.every <= now()):
            found.append((name, scene))
    return found


def _given(scene: str | None) -> dict[str, str]:
    return {} if scene is None else {"scene": scene}


def prune(session: Session, *, kinds: Mapping[str, JobKind] = JOB_KINDS) -> int:
    """Delete rows that are older than their kind is kept, some hundreds at a time; return how many."""
    newest = session.scalar(select(func.max(Job.id))) or 0  # stays, so that no number is given twice
    deleted = 0
    for name, kind in kinds.items():
        old = select(Job).where(Job.kind == name, Job.finished_at < now() - kind.keep, Job.id < newest).limit(BATCH)
        for job in session.scalars(old):
            session.delete(job)
            deleted += 1
    session.flush()
    return deleted


# ── from one state to the next ──────────────────────────────────────────────────────────────────────────────────────


def _close(job: Job, kind: JobKind | None, state: JobState) -> None:
    job.state, job.finished_at, job.worker, job.pid = state, now(), None, None
    if kind is not None and kind.private and state != JobState.FAILED:
        job.arguments, job.subject = {}, ""


def _again(job: Job, delay: timedelta = timedelta(0)) -> None:
    job.state, job.due_at, job.worker, job.pid = JobState.QUEUED, now() + delay, None, None


def _fail(job: Job, kind: JobKind | None, error: str, *, again: bool) -> None:
    """Queue another attempt where there is one left and it may help, else the job has failed."""
    job.error = error
    if job.cancelled_by is not None:
        _close(job, kind, JobState.CANCELLED)
    elif again and job.attempts < job.max_attempts:
        first = JobKind.delay if kind is None else kind.delay
        _again(job, min(first * 4 ** (job.attempts - 1), MAX_DELAY))
    else:
        _close(job, kind, JobState.FAILED)


def _ended(job: Job) -> str:
    return "was cancelled" if job.state == JobState.CANCELLED else str(job.state)


class _Stop(StrEnum):
    """Why the worker ends a process."""

    CANCELLED = "cancelled"
    TIMEOUT = "took too long"
    HANDED_BACK = "the worker stops"
    LOST = "another worker has it"


def _conclude(job: Job, kind: JobKind, code: int, stop: _Stop | None, out: bytes, err: bytes) -> None:
    """Write down what became of an attempt."""
    printed = _object_in(out)
    job.exit_code = code
    if code == 0 and printed is not None:  # done is done, even where somebody was about to stop it
        job.result, job.error = printed, None
        _close(job, kind, JobState.SUCCEEDED)
    elif stop == _Stop.CANCELLED:
        _close(job, kind, JobState.CANCELLED)
    elif stop == _Stop.HANDED_BACK:
        job.attempts -= 1  # it is not the job's fault
        _fail(job, kind, "The worker was stopped; another one starts it anew.", again=True)
        job.due_at = now()
    elif stop == _Stop.TIMEOUT:
        _fail(job, kind, f"It took longer than {kind.timeout_s:g} s and was stopped.\n{_tail(err)}".strip(), again=True)
    elif code == 0:
        _fail(job, kind, f"It printed no JSON object of at most {MAX_RESULT:,} bytes. Report this.", again=False)
    else:
        _fail(job, kind, _complaint(code, printed, err), again=code != BAD_INPUT)


def _object_in(out: bytes) -> dict[str, Any] | None:
    """The one JSON object of a standard output; None where there is none."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(out, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _complaint(code: int, printed: Mapping[str, Any] | None, err: bytes) -> str:
    """What a failed command said, the reason first."""
    error = (printed or {}).get("error")
    reason = error.get("message") if isinstance(error, dict) else None
    ended = f"It was killed by signal {code - 128}." if code > 128 else f"It ended with exit code {code}."
    said = [str(reason)] if reason else [ended] if code > 128 or not err.strip() else []
    return "\n".join([*said, _tail(err)]).strip()[:MAX_ERROR].replace("\0", "")


def _tail(err: bytes) -> str:
    return err.decode("utf-8", "replace").replace("\0", "").strip()[-MAX_ERROR // 2 :]


# ── the worker ──────────────────────────────────────────────────────────────────────────────────────────────────────

# Leads the process group of a job, and ends all of it when the worker's end of the pipe closes or falls silent: a job
# never outlives its worker, and never runs on while another worker has taken it over.
WARDEN = """
import os, select, signal, subprocess, sys, threading

def watch(lease_s):
    while select.select([0], [], [], lease_s)[0] and os.read(0, 64):
        pass
    os.killpg(0, signal.SIGKILL)

signal.signal(signal.SIGTERM, lambda *_: None)  # the job ends first, and is waited for
job = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
threading.Thread(target=watch, args=[float(sys.argv[1])], daemon=True).start()
code = job.wait()
os._exit(code if code >= 0 else 128 - code)
"""


@dataclass(frozen=True)
class Timing:
    """The worker's clockwork, in seconds."""

    tick_s: float = 0.2  # between looks at running processes
    poll_s: float = 1.0  # between looks at the queue
    beat_s: float = 5.0  # between heartbeats, at which it learns of cancellation, too
    lease_s: float = 30.0  # without a heartbeat a job is ended; after twice as long it is another worker's
    schedule_s: float = 15.0
    prune_s: float = 3600.0
    grace_s: float = 5.0  # between SIGTERM and SIGKILL
    finish_s: float = 3.0  # that a worker which stops gives its jobs to finish


@dataclass(eq=False)
class _Run:
    """An attempt at a job, in a process."""

    business: str
    job: int
    attempt: int
    kind: JobKind
    label: str
    process: subprocess.Popen[bytes]
    out: IO[bytes]
    err: IO[bytes]
    deadline: float
    began: float = field(default_factory=time.monotonic)
    next_beat: float = 0.0
    stop: _Stop | None = None
    kill_at: float = 0.0
    over: bool = False

    def end(self, why: _Stop, grace_s: float) -> None:
        """Ask the process group to end, and say why."""
        if self.stop is None:
            self.stop, self.kill_at = why, time.monotonic() + grace_s
            self.signal(signal.SIGTERM)

    def signal(self, number: int) -> None:
        """To every process of the group."""
        if not self.over:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)

    def poll(self) -> int | None:
        """The exit code, as a shell gives it; None: it still runs. What it leaves behind is ended with it."""
        code = self.process.poll()
        if code is not None:
            self.signal(signal.SIGKILL)
            self.over = True  # from here on its number may be another group's
        return code if code is None or code >= 0 else 128 - code

    def said(self) -> tuple[bytes, bytes]:
        """Its standard output and the end of its standard error."""
        self.out.seek(0)
        out = self.out.read(MAX_RESULT + 1)
        self.err.seek(max(0, self.err.seek(0, os.SEEK_END) - 4 * MAX_ERROR))
        return out, self.err.read()

    def close(self) -> None:
        """Nothing of it is left afterwards."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.over = True
        if self.process.stdin is not None:
            with suppress(BrokenPipeError):
                self.process.stdin.close()
        self.out.close()
        self.err.close()


class Worker:
    """Runs the jobs of every business, a few at a time, until it is told to stop."""

    def __init__(
        self,
        database: Database,
        *,
        kinds: Mapping[str, JobKind] = JOB_KINDS,
        targets: Callable[[Session], Iterable[Target]] = live_targets,
        slots: int = 2,
        timing: Timing | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.tally: Counter[str] = Counter()  # what became of attempts
        self._database, self._kinds, self._targets, self._slots, self._say = database, kinds, targets, slots, say
        self._timing = timing or Timing()
        self._host = socket.gethostname()
        self.name = f"{self._host}:{os.getpid()}:{secrets.token_hex(4)}"
        self._runs: list[_Run] = []
        self._stops, self._stopped_at = 0, 0.0
        self._next_poll = self._next_schedule = self._next_prune = 0.0
        self._away = False

    def stop(self) -> None:
        """Take no more jobs; finish those that run, or hand them back. The second time: hand them back now.

        May be called by a signal handler.
        """
        self._stops += 1

    def run(self, *, once: bool = False) -> Counter[str]:
        """Run jobs until somebody stops it, or with `once` until nothing is due; return what became of them.

        Raises UnavailableError with `once`; otherwise it waits for a database that is away.
        """
        try:
            while True:
                found = self._round(once=once)
                if not self._runs and (self._stops or (once and not found)):
                    return self.tally
                time.sleep(self._timing.tick_s if self._runs else 0.0 if once else self._timing.poll_s)
        finally:
            for run in self._runs:
                run.close()

    def _round(self, *, once: bool) -> bool:
        """Look after what runs and start what is due; return whether there was anything to start."""
        for run in list(self._runs):
            self._tend(run)
        if self._stops:
            self._wind_down()
            return False
        moment, found = time.monotonic(), False
        try:
            if moment >= self._next_schedule:
                self._schedule(prune_too=moment >= self._next_prune)
                self._next_schedule = math.inf if once else moment + self._timing.schedule_s
            if once or moment >= self._next_poll:
                found = self._take()
                self._next_poll = moment + self._timing.poll_s
            self._database_is(None)
        except UnavailableError as error:
            if once:
                raise
            self._database_is(error)
            self._next_poll = moment + self._timing.poll_s
        return found

    def _wind_down(self) -> None:
        moment = time.monotonic()
        self._stopped_at = self._stopped_at or moment
        if self._stops > 1 or moment >= self._stopped_at + self._timing.finish_s:
            for run in self._runs:
                run.end(_Stop.HANDED_BACK, self._timing.grace_s)

    def _database_is(self, error: UnavailableError | None) -> None:
        """Say once that it went away, and once that it is back."""
        if (error is not None) != self._away:
            self._say("The database is back." if error is None else f"The database is away: {error}")
        self._away = error is not None

    def _in(self, business: str | None, *, write: bool = True) -> AbstractContextManager[Session]:
        return self._database.transaction(operator("worker", business), write=write)

    def _businesses(self) -> list[str]:
        with self._in(None, write=False) as session:
            return list(session.scalars(select(Business.id).order_by(Business.id)))

    # What is to be done.

    def _schedule(self, *, prune_too: bool) -> None:
        for business in self._businesses():
            try:
                with self._in(business, write=False) as session:
                    wanted = due(session, self._targets(session), kinds=self._kinds)
                if wanted:
                    with self._database.transaction(operator(SCHEDULER, business)) as session:
                        get_business(session, lock=True)  # another worker may be at it too
                        for name, scene in due(session, wanted, kinds=self._kinds):
                            job = enqueue(session, name, _given(scene), kinds=self._kinds)
                            self._say(f"{_label(job)}: queued, it is time")
                if prune_too:
                    with self._in(business) as session:
                        prune(session, kinds=self._kinds)
            except UnavailableError:
                raise
            except KaleidoscopeError as error:  # of one business, which must not keep the others waiting
                self._say(f"{business}: the schedule failed: {error}")
        if prune_too:
            self._next_prune = time.monotonic() + self._timing.prune_s

    def _take(self) -> bool:
        """Start what is due, the longest due first, and take over what dead workers left."""
        stale, waiting = self._open()
        for job in stale:
            self._take_over(job)
        started = False
        for job in sorted(waiting, key=lambda job: job.due_at):
            if len(self._runs) < self._slots and not (self._kinds[job.kind].heavy and self._has_heavy()):
                started |= self._start(job)
        return started or bool(stale)

    def _has_heavy(self) -> bool:
        return any(run.kind.heavy for run in self._runs)

    def _open(self) -> tuple[list[Job], list[Job]]:
        """The jobs that run and have been silent for too long, and those that are due and this worker has room for."""
        kinds = [name for name, kind in self._kinds.items() if not (kind.heavy and self._has_heavy())]
        if len(self._runs) >= self._slots:
            kinds = []
        stale: list[Job] = []
        waiting: list[Job] = []
        for business in self._businesses():
            query = select(Job).where(
                or_(
                    and_(Job.state == JobState.QUEUED, Job.due_at <= now(), Job.kind.in_(kinds)),
                    and_(Job.state == JobState.RUNNING, Job.heartbeat_at < self._takeover()),
                )
            )
            with self._in(business, write=False) as session:
                for job in session.scalars(query.order_by(Job.due_at, Job.id).limit(BATCH)):
                    (stale if job.state == JobState.RUNNING else waiting).append(job)
        return stale, waiting

    def _takeover(self) -> datetime:
        # Twice the lease: the one who had it has ended it by then, even if our clocks differ by as much as the lease.
        return now() - timedelta(seconds=2 * self._timing.lease_s)

    def _take_over(self, seen: Job) -> None:
        with self._in(seen.business_id) as session:
            job = _lock(session, seen.id)
            if job is None or job.state != JobState.RUNNING or not _before(job.heartbeat_at, self._takeover()):
                return
            said = f"Its worker on {job.host} has died or was cut off."
            _fail(job, self._kinds.get(job.kind), said, again=True)
            if job.state == JobState.QUEUED:
                job.due_at = now()
        self.tally["taken_over"] += 1
        self._say(f"{_label(job)}: {said} It is {job.state} now.")

    def _start(self, seen: Job) -> bool:
        """Take the job, unless somebody else has, and start its process."""
        with self._in(seen.business_id) as session:
            job = _lock(session, seen.id)
            if job is None or job.state != JobState.QUEUED or job.due_at > now():
                return False
            job.state, job.worker, job.host = JobState.RUNNING, self.name, self._host
            job.attempts += 1
            job.started_at = job.heartbeat_at = now()
            job.exit_code = job.finished_at = None
        kind = self._kinds[job.kind]
        out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        command = kind.command(job.business_id, job.arguments)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", WARDEN, str(self._timing.lease_s), *command],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            start_new_session=True,
            # What the job changes is the deed of whoever asked for it.
            env={**os.environ, f"{PREFIX}USER": f"{job.author[:150]} (job {job.id})"},
        )
        run = _Run(
            job.business_id,
            job.id,
            job.attempts,
            kind,
            _label(job),
            process,
            out,
            err,
            deadline=time.monotonic() + kind.timeout_s,
        )
        self._runs.append(run)
        self._say(f"{run.label}: started, attempt {job.attempts} of {job.max_attempts}, process {process.pid}")
        return True

    # What runs.

    def _tend(self, run: _Run) -> None:
        moment, code = time.monotonic(), run.poll()
        try:
            if moment >= run.next_beat or (code is not None and not self._away):
                run.next_beat = moment + self._timing.beat_s
                self._beat(run) if code is None else self._record(run, code)
                self._database_is(None)
        except UnavailableError as error:
            self._database_is(error)
            if code is not None and self._stops > 1:  # the next worker will find it
                self._drop(run, "its end could not be written down")
        if code is None and moment >= run.deadline:
            run.end(_Stop.TIMEOUT, self._timing.grace_s)
        if code is None and run.stop is not None and moment >= run.kill_at:
            run.signal(signal.SIGKILL)

    def _mine(self, session: Session, run: _Run) -> Job | None:
        job = session.get(Job, (run.business, run.job), with_for_update=True, populate_existing=True)
        mine = job is not None and (job.state, job.worker, job.attempts) == (JobState.RUNNING, self.name, run.attempt)
        return job if mine else None

    def _beat(self, run: _Run) -> None:
        with self._in(run.business) as session:
            job = self._mine(session, run)
            if job is not None:
                job.heartbeat_at, job.pid = now(), run.process.pid
        if job is None:
            run.end(_Stop.LOST, self._timing.grace_s)
        elif job.cancelled_by is not None:
            run.end(_Stop.CANCELLED, self._timing.grace_s)
        if job is not None and run.process.stdin is not None:
            with suppress(BrokenPipeError):
                run.process.stdin.write(b".")
                run.process.stdin.flush()

    def _record(self, run: _Run, code: int) -> None:
        with self._in(run.business) as session:
            job = self._mine(session, run)
            if job is not None:
                _conclude(job, run.kind, code, run.stop, *run.said())
        if job is None:
            self._drop(run, _Stop.LOST)
            return
        retried = "handed_back" if run.stop == _Stop.HANDED_BACK else "retried"
        self.tally[retried if job.state == JobState.QUEUED else job.state] += 1
        took = f"after {time.monotonic() - run.began:.1f} s"
        if job.state == JobState.QUEUED:
            became = f"back in the queue {took}, due {job.due_at:%H:%M:%S} UTC"
        else:
            became = f"{job.state} {took}"
        reason = (job.error or "").partition("\n")[0]
        self._drop(run, became + (f": {reason}" if reason and job.state != JobState.SUCCEEDED else ""))

    def _drop(self, run: _Run, said: str) -> None:
        self._runs.remove(run)
        run.close()
        self._next_poll = 0.0  # there is room now
        self._say(f"{run.label}: {said}")


def _lock(session: Session, job_id: int) -> Job | None:
    """The job, if nobody else is just changing it."""
    key = (session.business, job_id)
    return session.get(Job, key, with_for_update={"skip_locked": True}, populate_existing=True)


def _before(moment: datetime | None, other: datetime) -> bool:
    return moment is not None and moment < other


def _label(job: Job) -> str:
    about = job.arguments.get("scene")
    return f"{job.business_id} job {job.id} {job.kind}" + (f" {about}" if about else "")
