"""`kaleidoscope demo`: the whole loop on one machine, with simulated users in place of real ones.

    furnish → explore → compact → train → attribute → canary → compare → over HTTP → report

Only who clicks is simulated, and the clock: everything else is the platform, called as its commands and its server call
it. Simulated time ends when the demo was started, so that what the server does afterwards follows upon it.
docs/demo.md describes it to users.
"""

from __future__ import annotations

import json
import runpy
import shlex
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from kaleidoscope import guard, registry
from kaleidoscope.access import Caller, operator
from kaleidoscope.businesses import create_business
from kaleidoscope.commands.demo_insights import preferences_of
from kaleidoscope.commands.demo_report import ENVIRONMENT, TOKEN
from kaleidoscope.commands.demo_server import Client, running, variables
from kaleidoscope.commands.exposures import read_exposures_of
from kaleidoscope.commands.gate import Limits
from kaleidoscope.commands.output import Clock
from kaleidoscope.commands.train import run_train
from kaleidoscope.database import Database, open_database
from kaleidoscope.decide import Decision, Request, Served, decide, decide_many
from kaleidoscope.decision_record import Keyring, Reason
from kaleidoscope.errors import InputError, JobError
from kaleidoscope.events import Fate, Kind, Rules, Shown, compact, event_counts, ingest, record_decisions, shown_in
from kaleidoscope.guard import Step
from kaleidoscope.materials import import_materials
from kaleidoscope.progress import Progress
from kaleidoscope.release import (
    Guardrail,
    Health,
    PolicySpec,
    ReleasePlan,
    Shares,
    advance,
    draft_release,
    get_release,
    start,
    verify,
)
from kaleidoscope.review import make_variants, move_materials, move_variants
from kaleidoscope.scenes import AttributionSpec, apply_scene, read_scene
from kaleidoscope.serving.decider import load_keys
from kaleidoscope.serving.live import Live, models_in, windows_of
from kaleidoscope.settings import Settings
from kaleidoscope.simulation import Exposures, Outcomes, Population, PopulationSpec, Visits, read_population
from kaleidoscope.tokens import create_token
from kaleidoscope.vocabulary import Bucket, Role

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SCENE = Path(__file__).resolve().parents[2] / "examples" / "demo_scene"
BUSINESS = "demo"
MARKER = "SIMULATED.txt"
MARKED = (
    "Everything in this folder is simulated, by `kaleidoscope demo`. It is deleted when the demo runs here again.\n"
)
AUTHOR, REVIEWER, PUBLISHER = "ann", "rex", "pat"

EXPLORING = Shares(control=0.05, random=0.95)
COMPARING = Shares(control=0.15, random=0.1, model=0.75)
STAGES = (0.05, 0.2, 0.5)  # of the canary; those that too few users would see are left out
GUARDRAILS = (
    Guardrail(metric="ctr_drop", max=0.05),
    Guardrail(metric="srm_p", min=0.001),
    Guardrail(metric="fallback_rate", max=0.01, window_s=86_400),
)
BATCH = 5_000  # visits
EVENTS = 20_000  # in a batch, each of which is a transaction
HTTP_BATCH = 250
EVERYBODY = 50  # users: where all of them are served a release, it is no canary


@dataclass(frozen=True)
class Plan:
    """How much of what; days are simulated ones."""

    visits: int = 340_000  # before those over HTTP
    explore_days: float = 14.0
    stage_days: float = 0.75  # of each stage of the canary, so long as nothing has to be waited for
    compare_days: float = 5.0  # less what the canary waits, and more for a stage that is left out
    waits: int = 3  # times that a stage may be made longer by as much, before the canary is left as it is
    http_visits: int = 2_500
    timed: int = 2_000  # decisions, at most, for which a model ranks and that are taken alone, with a stopwatch
    epsilon: float = 0.02  # of what the model's bucket shows is drawn: the price of going on learning
    min_exposures: int = 1_000  # to train on
    min_stage_units: int = guard.MIN_STAGE_UNITS

    @property
    def days(self) -> float:
        """From the first visit to now."""
        return self.explore_days + self.stage_days * len(STAGES) + self.compare_days

    @property
    def stages(self) -> tuple[float, ...]:
        """The stages of the canary, up to all of the traffic."""
        seen = self.visits / self.days * self.stage_days
        return (*(share for share in STAGES if share * seen >= 1.5 * self.min_stage_units), 1.0)


def demo_settings(folder: Path, base: Settings) -> Settings:
    """The settings of a platform that has everything in a folder, and needs no service."""
    whole = folder.absolute()
    return base.model_copy(
        update={
            "database_url": f"sqlite:///{whole / 'kaleidoscope.db'}",
            "log_url": f"sqlite:///{whole / 'log.db'}",
            "files_dir": whole / "files",
            "log_dir": whole / "log",
            "models_dir": whole / "models",
            "reports_dir": whole / "reports",
            "feature_dir": whole / "features",
            "keys": None,
            "keys_file": whole / "keys",
            "mlflow_url": None,
            "business": BUSINESS,
            "user": PUBLISHER,
            "requests_per_s": 100_000.0,  # it is measured how many it can
        }
    )


def run_loop(
    out_dir: Path,
    *,
    settings: Settings,
    seed: int,
    progress: Progress,
    plan: Plan | None = None,
    world: PopulationSpec | None = None,
    now: datetime | None = None,
) -> dict[str, Any]:
    """Run the loop in `out_dir` and return its summary, which is also in `out_dir`/summary.json.

    A folder that an earlier demo made is emptied. Raises InputError for one that holds anything else. `now`: when
    simulated time ends.
    """
    begun, plan, now = time.perf_counter(), plan or Plan(), now or datetime.now(UTC)
    _empty(out_dir)
    settings = demo_settings(out_dir, settings)
    clock = Clock(progress)
    with ExitStack() as stack:
        with clock("furnish"):
            loop = stack.enter_context(_furnished(out_dir, settings, plan, seed, world or read_population(), now))
            server = stack.enter_context(running(settings, out_dir / "server.log"))
        with clock("explore"):
            loop.drive(plan.explore_days, clock)
            explored = loop.counts.copy()
            server.check()
        with clock("compact"):
            compacted = loop.compact()
        trained: dict[str, Any] = run_train(
            settings,
            business=BUSINESS,
            scene=loop.scene_id,
            seed=seed,
            min_exposures=plan.min_exposures,
            progress=progress,
            at=loop.now,
            limits=Limits(epsilon=plan.epsilon),
        )
        with clock("attribute"):
            preferences = loop.preferences()
        stages: list[dict[str, Any]] = []
        if trained["gate"]["verdict"] == registry.PASSED:
            with clock("canary"):
                loop.release_model(str(trained["version"]))
                stages = loop.canary(clock)
        with clock("compare"):
            compared_from = loop.now
            loop.watch = True
            loop.drive((now - loop.now) / timedelta(days=1), clock)
        with clock("over HTTP"), closing(Client(server, loop.token)) as client:
            over_http = loop.over_http(client, clock)
        with clock("report"):
            report = loop.report(compared_from)
            summary = _summary(loop, trained, stages, report, over_http, seed) | {
                "insights": preferences.pop("sentences"),
                "preferences": preferences,
                "exploring": {"visits": explored["visits"], "decisions": explored["decisions"]},
                "compacted": {"days": len(compacted.days), "exposures": compacted.exposures},
                "timings_s": clock.seconds | {"train": round(sum(trained["timings_s"].values()), 3)},
                "seconds": round(time.perf_counter() - begun, 1),
            }
            text = json.dumps(summary, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
            (out_dir / "summary.json").write_text(text, encoding="utf-8")
    return summary


# ── the folder, and what is in it ───────────────────────────────────────────────────────────────────────────────────


def _empty(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = list(folder.iterdir())
        if there and not (folder / MARKER).exists():
            raise InputError(f"{folder}: holds what no demo has made. Name another folder with --out.")
        for path in there:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        (folder / MARKER).write_text(MARKED)
    except OSError as error:
        raise JobError(f"{folder}: cannot be written to ({error}); name another folder with --out.") from error


def _person(user: str, role: Role) -> Caller:
    return Caller(user, BUSINESS, frozenset({role}))


def _furnish(database: Database, settings: Settings, folder: Path) -> tuple[str, str]:
    """Everything up to an approved set of variants, and a token for the page; returns the scene's id and the token."""
    pictures = folder / "pictures"
    runpy.run_path(str(SCENE / "make_images.py"))["draw_all"](pictures)
    scene_id, spec = read_scene(SCENE / "scene.yaml")
    # Simulated users convert at once, if at all: a day can be closed after a day.
    spec = spec.model_copy(update={"attribution": AttributionSpec(conversion_hours=24.0)})
    with database.transaction(operator(PUBLISHER, BUSINESS)) as session:
        create_business(session, "Demo (simulated)", two_person_publish=True)
        _, token = create_token(session, "the page", frozenset({Role.CLIENT}), days=30)
    author, reviewer = _person(AUTHOR, Role.EDITOR), _person(REVIEWER, Role.REVIEWER)
    with database.transaction(author) as session:
        imported = import_materials(session, SCENE / "materials.csv", pictures, settings.files_dir)
        if imported.failures:
            raise JobError(f"{SCENE / 'materials.csv'}: {imported.failures[0].message}")
        ids = [row.id for row in imported.rows if row.id is not None]
        move_materials(session, "submit", ids)
    with database.transaction(reviewer) as session:
        move_materials(session, "approve", ids)
    with database.transaction(author) as session:
        apply_scene(session, scene_id, spec)
        make_variants(session, scene_id)
        move_variants(session, scene_id, "submit")
    with database.transaction(reviewer) as session:
        move_variants(session, scene_id, "approve")
    (folder / TOKEN).touch(mode=0o600)
    (folder / TOKEN).write_text(token + "\n")
    lines = [f"{name}={shlex.quote(value)}\n" for name, value in variables(settings).items()]
    (folder / ENVIRONMENT).write_text("".join(lines))
    return scene_id, token


@contextmanager
def _furnished(
    folder: Path, settings: Settings, plan: Plan, seed: int, spec: PopulationSpec, now: datetime
) -> Iterator[_Loop]:
    with open_database(settings.database_url) as database, open_database(settings.log_url) as log:
        scene_id, token = _furnish(database, settings, folder)
        # A batch takes longer to rank than a request may.
        models = models_in(lambda business, version: registry.fetch(settings, business, version))
        live = Live(database, models, refresh_s=300.0, model_timeout_s=3600.0)
        loop = _Loop(database, log, live, settings, load_keys(settings), plan, scene_id, token, seed)
        loop.begin(spec, now - timedelta(days=plan.days))
        yield loop


# ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Truth:
    """Per visit of bucket model while the buckets are compared, how likely a click was for what was shown, and would
    have been for others at that moment (to those who saw what they had seen)."""

    parts: list[Mapping[str, NDArray[Any]]] = field(default_factory=list)

    def column(self, name: str) -> NDArray[Any]:
        """(n,) of all visits."""
        return np.concatenate([part[name] for part in self.parts]) if self.parts else np.zeros(0)


class _Loop:
    """A platform, its simulated users, and what time it is for both."""

    def __init__(
        self,
        database: Database,
        log: Database,
        live: Live,
        settings: Settings,
        keyring: Keyring,
        plan: Plan,
        scene_id: str,
        token: str,
        seed: int,
    ) -> None:
        self.database, self.log, self.live, self.settings, self.keyring = database, log, live, settings, keyring
        self.plan, self.scene_id, self.token, self.seed = plan, scene_id, token, seed
        self.counts: Counter[str] = Counter()
        self.latency_ms: list[float] = []
        self.truth, self.watch = _Truth(), False
        self.release = 0
        self.rng = np.random.default_rng([seed, 7])

    def begin(self, spec: PopulationSpec, at: datetime) -> None:
        """Start the release that explores, for users who were never here."""
        self.now = at
        self.start(ReleasePlan(shares=EXPLORING, stages=(1.0,)), "Explore")
        served = self.served()
        self.world = Population(spec, self.seed)
        self.people = self.world.people(max(50, round(self.plan.visits / self.plan.days / spec.traffic.visits_per_day)))
        self.features = self.people.features()
        self.scene = self.world.scene(served.content.variants, released=at)
        self.memory = Exposures(self.scene, len(self.people))
        self.baseline = self.scene.position[served.content.baseline]
        self.single = self.scene.best_single(self.people)

    def start(self, plan: ReleasePlan, note: str) -> None:
        """Draft a release as its author, and start it as another person."""
        with self.database.transaction(_person(AUTHOR, Role.EDITOR)) as session:
            plan = registry.with_versions(self.settings, session, self.scene_id, plan)
            self.release = draft_release(session, self.scene_id, plan, note).number
        with self.database.transaction(_person(PUBLISHER, Role.PUBLISHER)) as session:
            start(session, self.scene_id, self.release)
        self.live.refresh()

    def served(self) -> Served:
        """The stable release, or else the candidate."""
        found = self.live.scenes(BUSINESS)[self.scene_id]
        served = found.stable or found.candidate
        if served is None or self.live.problems:
            raise JobError(f"The release cannot be served: {'; '.join(self.live.problems)}")
        return served

    # ── traffic ──

    def drive(self, days: float, clock: Clock, done: tuple[float, float] = (0.0, 1.0)) -> None:
        """Let users come by for some days: decide, record, click, send events. `done`: of the progress, from and to."""
        begin, low, high = self.now, *done
        for visits in self.world.traffic(self.people, start=begin, days=days, batch=BATCH):
            self._batch(visits)
            clock.advance(low + (high - low) * (visits.time_s[-1] - begin.timestamp()) / (days * 86_400))
        self.now = begin + timedelta(days=days)

    def _batch(self, visits: Visits) -> None:
        times, units = visits.times(), visits.unit.tolist()
        requests = [
            Request(str(self.people.ids[unit]), at, self.features[unit]) for unit, at in zip(units, times, strict=True)
        ]
        decisions = self._decide(requests)
        self.counts["visits"] += len(visits)
        self.counts["decisions"] += record_decisions(self.log, [decision.record for decision in decisions])
        users, recent = self.people.take(visits.unit), self.memory.seen(self.scene, visits.unit, visits.time_s)
        shown = np.array([self.scene.position[decision.record.variant] for decision in decisions])
        if self.watch:
            self._look(decisions, visits, shown, recent)
        outcomes = self.scene.respond(users, shown, self.rng, time_s=visits.time_s, recent=recent)
        self.memory.add(self.scene, visits.unit, shown, visits.time_s)
        self._send(decisions, times, outcomes)

    def _decide(self, requests: Sequence[Request]) -> list[Decision]:
        """As a server does; a few of them one by one, with a stopwatch."""
        scene = self.live.scenes(BUSINESS)[self.scene_id]
        asked: dict[int, tuple[Served, list[int]]] = {}
        for n, request in enumerate(requests):
            served = scene.stable if scene.candidate is None else scene.serving(BUSINESS, request.unit)
            if served is None:
                raise JobError(f"Nothing is live in scene {self.scene_id!r}.")
            asked.setdefault(served.number, (served, []))[1].append(n)
        how: Any = {
            "keyring": self.keyring, "business": BUSINESS, "scene": self.scene_id,
            "window_s": self.settings.decision_window_s,
        }  # fmt: skip
        found: dict[int, Decision] = {}
        if self.watch:
            for served, rows in asked.values():
                for n in rows[: max(1, self.plan.timed // 8)]:
                    begun = time.perf_counter()
                    found[n] = decide(served, requests[n], **how)
                    _ = found[n].payload, found[n].token
                    if found[n].record.model_version is not None and len(self.latency_ms) < self.plan.timed:
                        self.latency_ms.append(1000 * (time.perf_counter() - begun))
        for served, rows in asked.values():
            rest = [n for n in rows if n not in found]
            found.update(zip(rest, decide_many(served, [requests[n] for n in rest], **how), strict=True))
        return [found[n] for n in range(len(requests))]

    def _look(self, decisions: Sequence[Decision], visits: Visits, shown: Ints, recent: Floats) -> None:
        rows = np.array([n for n, d in enumerate(decisions) if d.record.bucket == Bucket.MODEL], np.int64)
        if not len(rows):
            return
        users = self.people.take(visits.unit[rows])
        p = expit(self.scene.click_logit(users, visits.time_s[rows], recent[rows]))
        self.truth.parts.append(
            {
                "shown": p[np.arange(len(rows)), shown[rows]],
                "control": p[:, self.baseline],
                "best_single": p[:, self.single],
                "uniform": p.mean(axis=1),
                "oracle": p.max(axis=1),
                "ranked": np.array([decisions[n].record.reason == Reason.RANKED for n in rows]),
            }
        )

    def _send(self, decisions: Sequence[Decision], times: Sequence[datetime], outcomes: Outcomes) -> None:
        events = self._events([d.token for d in decisions], outcomes, times)
        rules = Rules(windows=windows_of(self.live.scenes(BUSINESS)), max_items=EVENTS)
        for i in range(0, len(events), EVENTS):
            part = events[i : i + EVENTS]
            now = max(event["at"] for event in part)
            for result in ingest(self.log, BUSINESS, part, self.keyring, now=now, rules=rules):
                if result.status != Fate.ACCEPTED:
                    raise JobError(f"An event of the demo was {result.status}: {result.message}. Report this.")
            self.counts["events"] += len(part)

    def _events(
        self, tokens: Sequence[str], outcomes: Outcomes, times: Sequence[datetime] | None
    ) -> list[dict[str, Any]]:
        """What the page sends: that it was seen, how long, and what was clicked; without `times` it happens now."""
        found: list[dict[str, Any]] = []
        clicks, converted, dwell = (a.tolist() for a in (outcomes.click, outcomes.converted, outcomes.dwell_s))
        for n, token in enumerate(tokens):
            self.counts["pages"] += 1
            name, at = f"{self.counts['pages']:07d}", {} if times is None else {"at": times[n]}
            found.append({"event_id": f"{name}-e", "type": Kind.EXPOSURE.value, "token": token, **at})
            found.append({"event_id": f"{name}-d", "type": Kind.DWELL.value, "token": token, "value": dwell[n], **at})
            if clicks[n]:
                found.append({"event_id": f"{name}-c", "type": Kind.CLICK.value, "token": token, **at})
            if converted[n]:
                found.append({"event_id": f"{name}-b", "type": Kind.CONVERSION.value, "token": token, **at})
        return found

    # ── what is done with it ──

    def compact(self) -> Any:
        """Bring the days that are closed to Parquet."""
        rules = Rules(windows=windows_of(self.live.scenes(BUSINESS)))
        return compact(
            self.log, self.settings.log_dir, business=BUSINESS, now=self.now, describe=self._describe, rules=rules
        )

    def _describe(self, scene: str, number: int) -> Mapping[str, Shown]:
        with self.database.transaction(_person(AUTHOR, Role.VIEWER), write=False) as session:
            return shown_in(verify(get_release(session, scene, number)))

    def preferences(self) -> dict[str, Any]:
        """Who prefers what, from the exposures that training has read."""
        with tempfile.TemporaryDirectory(prefix="kaleidoscope-demo-") as scratch:
            log = read_exposures_of(self.settings, BUSINESS, self.scene_id, Path(scratch)).log
        return preferences_of(log, self.scene)

    def release_model(self, version: str) -> None:
        """Promote the model that passed the gate, and start a release of it as a canary."""
        registry.promote(self.settings, _person(PUBLISHER, Role.PUBLISHER), version, at=self.now)
        policy = PolicySpec(epsilon=self.plan.epsilon)
        plan = ReleasePlan(
            shares=COMPARING, policy=policy, model_version=registry.Alias.CHAMPION.value, guardrails=GUARDRAILS,
            stages=self.plan.stages,
        )  # fmt: skip
        self.start(plan, "Personalise")

    def canary(self, clock: Clock) -> list[dict[str, Any]]:
        """Let the guard judge stage by stage; returns what it did.

        The ledger's clock is the real one. What the guard counts from is given in simulated time.
        """
        stages: list[dict[str, Any]] = []
        began = stage_began = self.now
        waits, most = 0, len(self.plan.stages) - 1
        publisher = _person(guard.USER, Role.PUBLISHER)
        while True:
            with self.database.transaction(publisher, write=False) as session:
                canary = guard.canary_of(session, self.scene_id)
            if canary is None:
                return stages
            self.drive(self.plan.stage_days, clock, (canary.stage / most, (canary.stage + 1) / most))
            seen = replace(canary, began=began, stage_began=stage_began)
            evidence = guard.gather(
                self.log, self.settings.log_dir, seen, business=BUSINESS, at=self.now,
                window_s=self.settings.decision_window_s,
            )  # fmt: skip
            found = guard.measured(seen, evidence)
            health = Health.judge(seen.content.guardrails, found, self.now)
            units = evidence.stage.of(seen.candidate).units
            step, reason = guard.next_step(
                seen, found, health, units=units, at=self.now, min_units=self.plan.min_stage_units
            )
            stages.append(
                {"share": canary.share, "units": units, "step": step.value, "reason": reason}
                | {check.metric: check.value for check in health.checks}
            )
            if step in (Step.ADVANCE, Step.ROLL_BACK):
                with self.database.transaction(publisher) as session:
                    measured_now = health.model_copy(update={"observed_at": datetime.now(UTC)})
                    advance(
                        session, self.scene_id, health=measured_now, expected_seq=canary.seq,
                        rollback_if_unhealthy=step == Step.ROLL_BACK,
                    )  # fmt: skip
                self.live.refresh()
                stage_began = self.now
            elif step == Step.WAIT and waits < self.plan.waits:
                waits += 1
            else:
                return stages

    def over_http(self, client: Client, clock: Clock) -> dict[str, Any]:
        """Let the server answer some visits, now; how long it took, and whether it decided as this process does."""
        took, alike, sent = [], 0, 0
        rate = self.people.visits_per_day / self.people.visits_per_day.sum()
        visitors = self.rng.choice(len(self.people), self.plan.http_visits, p=rate)
        client.wait_for_release(
            self.scene_id, self.served().number, [str(name) for name in self.people.ids[:EVERYBODY]]
        )
        for i in range(0, len(visitors), HTTP_BATCH):
            unit = visitors[i : i + HTTP_BATCH]
            answers, requests = [], []
            for n in unit.tolist():
                name = str(self.people.ids[n])
                requests.append(Request(name, datetime.now(UTC), self.features[n]))
                begun = time.perf_counter()
                answers.append(client.evaluate(self.scene_id, name, self.features[n]))
                took.append(1000 * (time.perf_counter() - begun))
            here = self._decide(requests)
            alike += sum(a["metadata"]["decisionId"] == d.record.id for a, d in zip(answers, here, strict=True))
            time_s = np.full(len(unit), time.time())
            shown = np.array([self.scene.position[answer["variant"]] for answer in answers])
            recent = self.memory.seen(self.scene, unit, time_s)
            outcomes = self.scene.respond(self.people.take(unit), shown, self.rng, time_s=time_s, recent=recent)
            self.memory.add(self.scene, unit, shown, time_s)
            sent += client.send(self._events([a["metadata"]["token"] for a in answers], outcomes, None))
            clock.advance((i + len(unit)) / len(visitors))
        self.counts["http_decisions"] += len(visitors)
        self.counts["events"] += sent
        p50, p99 = np.quantile(took, (0.5, 0.99)).tolist()
        return {
            "decisions": len(visitors), "events": sent, "same_as_in_process": alike,
            "p50_ms": round(p50, 2), "p99_ms": round(p99, 2),
        }  # fmt: skip

    def report(self, since: datetime) -> guard.ExperimentReport:
        """The buckets of the newest release compared, from a moment on."""
        with self.database.transaction(_person(AUTHOR, Role.VIEWER), write=False) as session:
            shares = verify(get_release(session, self.scene_id, self.release)).shares
        return guard.compare(
            self.log, self.settings.log_dir, business=BUSINESS, scene=self.scene_id, release=self.release,
            shares=shares, since=since, simulated=True,
        )  # fmt: skip


# ── what came of it ─────────────────────────────────────────────────────────────────────────────────────────────────


def _summary(
    loop: _Loop,
    trained: Mapping[str, Any],
    stages: Sequence[Mapping[str, Any]],
    report: guard.ExperimentReport,
    over_http: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    lifts = {c.treatment: c.lift for c in report.comparisons if c.outcome == "ctr" and c.control == Bucket.CONTROL}
    buckets = {}
    for bucket in report.buckets:
        found = lifts.get(bucket.bucket)
        row: dict[str, Any] = {"exposures": bucket.exposures, "units": bucket.units, "clicks": bucket.clicks}
        row |= {"ctr": bucket.ctr.rate, "lift": None, "ci_low": None, "ci_high": None, "p_value": None, "fixed": None}
        if found is not None:
            always, fixed = found.always_valid, found.fixed
            row |= {"lift": found.lift, "ci_low": always.low, "ci_high": always.high, "p_value": always.p_value}
            row["fixed"] = {"ci_low": fixed.low, "ci_high": fixed.high, "p_value": fixed.p_value}
        buckets[bucket.bucket.value] = row
    p50, p99 = np.quantile(loop.latency_ms, (0.5, 0.99)).round(3).tolist() if loop.latency_ms else (None, None)
    truth = _shares(loop.truth)
    gate = trained["gate"]
    return {
        "simulated": True,
        "world": loop.world.spec.name,
        "seed": seed,
        "scene": loop.scene_id,
        "variants": len(loop.scene.variants),
        "people": len(loop.people),
        "visits": loop.counts["visits"] + over_http["decisions"],
        "decisions": loop.counts["decisions"] + over_http["decisions"],
        "events": {what.value: n for what, n in event_counts(loop.log, BUSINESS).items()},
        "model": {
            "version": trained["version"],
            "folder": trained["folder"],
            "exposures": trained["log"]["exposures"],
            "metrics": trained["metrics"],
            "gate": {
                "verdict": gate["verdict"],
                "checks": list(gate["checks"]),
                "gains": gate["gains"],
            },
            "mlflow": trained["mlflow"],
        },
        "canary": list(stages),
        "release": loop.release,
        "buckets": buckets,
        "srm": None if report.srm is None else {"p_value": report.srm.always_valid_p, "flagged": report.srm.flagged},
        "experiment": report.as_dict(),
        "truth": truth,
        "share_of_oracle_lift": truth["ranked"]["share_of_oracle_lift"],
        "share_of_oracle_personalisation": truth["ranked"]["share_of_oracle_personalisation"],
        "decision_p50_ms": p50,
        "decision_p99_ms": p99,
        "decisions_timed": len(loop.latency_ms),
        "http": dict(over_http),
    }


def _shares(truth: _Truth) -> dict[str, Any]:
    """What the world knows of bucket model's visits: click rates, and which part of the oracle's lift was had."""
    ranked = truth.column("ranked").astype(bool)
    found = {}
    for name, rows in (("ranked", ranked), ("with_exploration", np.ones(len(ranked), bool))):
        if not rows.any():
            found[name] = dict.fromkeys(("share_of_oracle_lift", "share_of_oracle_personalisation"))
            continue
        mean = {
            c: float(truth.column(c)[rows].mean()) for c in ("shown", "control", "best_single", "uniform", "oracle")
        }
        found[name] = {"visits": int(rows.sum()), **mean} | {
            "share_of_oracle_lift": _part(mean["shown"], mean["control"], mean["oracle"]),
            "share_of_oracle_personalisation": _part(mean["shown"], mean["best_single"], mean["oracle"]),
        }
    return found


def _part(value: float, low: float, high: float) -> float | None:
    """Which part of the way from `low` to `high` a value is; None where there is hardly any way."""
    return (value - low) / (high - low) if high - low > 1e-4 else None
