"""The report and the guard, on exposures that go through the log: what it counts, what it says, and what it does."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import generate_latest
from scipy.stats import chisquare
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from kaleidoscope import cli
from kaleidoscope.buckets import assign_many, gbhash_many
from kaleidoscope.database import Database, Session, open_database
from kaleidoscope.decision_record import DecisionRecord, Keyring, Reason
from kaleidoscope.errors import InputError, NotFoundError
from kaleidoscope.events import Rules, compact, ingest, open_exposures, record_decisions
from kaleidoscope.experiment import ArmSums, Traffic
from kaleidoscope.guard import (
    Canary,
    Counted,
    Evidence,
    ExperimentReport,
    GuardAction,
    Outcomes,
    Step,
    arm_sums,
    canary_of,
    compare,
    guard,
    health,
    measured,
    next_step,
    scrape,
    stage_traffic,
    traffic_in,
)
from kaleidoscope.release import (
    Guardrail,
    Health,
    ReleaseContent,
    ReleasePlan,
    Shares,
    draft_release,
    ledger,
    live_at,
    pause,
    resume,
    rollback,
    start,
)
from kaleidoscope.review import VariantFilter, make_variants, move_materials, move_variants
from kaleidoscope.serving.decider import Metrics
from kaleidoscope.vocabulary import Bucket
from tests.kaleidoscope.conftest import add_businesses
from tests.kaleidoscope.people import person
from tests.kaleidoscope.stock import stocked

SCENE = "welcome"
RING = Keyring({"k1": b"0123456789abcdef"})
T0 = datetime(2030, 1, 10, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
SHARES = Shares(control=0.25, random=0.25, model=0.5)
RAILS = (Guardrail(metric="ctr_drop", max=0.02), Guardrail(metric="srm_p", min=0.001))
WINDOW_S = 60


def plan(*rails: Guardrail, stages: tuple[float, ...] = (0.3, 0.6, 1.0), shares: Shares = SHARES) -> ReleasePlan:
    return ReleasePlan(shares=shares, model_version="m1", guardrails=rails, stages=stages)


# ── a world ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Clock:
    at: datetime = T0

    def __call__(self) -> datetime:
        return self.at


@dataclass
class World:
    """A business whose scene shows release 1 to everybody, and has another in canary."""

    database: Database
    folder: Path
    clock: Clock
    business: str = "acme"
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def do(self, work: Callable[[Session], Any], user: str = "pat") -> Any:
        with self.database.transaction(person(user, business=self.business)) as session:
            return work(session)

    def canary(self, *rails: Guardrail, **changes: Any) -> int:
        number: int = self.do(lambda s: draft_release(s, SCENE, plan(*rails, **changes))).number
        self.do(lambda s: start(s, SCENE, number))
        return number

    def visit(
        self,
        users: range,
        ctr: Callable[[int, Bucket], float],
        *,
        after: timedelta = 5 * MINUTE,
        lost: Callable[[int, Bucket], float] = lambda release, bucket: 0.0,
        cvr: float = 0.0,
        seed: int = 0,
        **more: Any,
    ) -> None:
        """These users come once, some time after now; then it is a quarter of an hour later than that.

        They are assigned as a server does, click as often as `ctr` says, and with chance `lost` nobody hears of them.
        """
        live = self.do(lambda s: live_at(s, SCENE))
        units = [f"user {i}" for i in users]
        buckets = assign_many({b: getattr(SHARES, b) for b in Bucket}, f"{self.business}/{SCENE}/bucket", units)
        new = gbhash_many(f"{self.business}/{SCENE}/canary", units) < live.share
        rng = np.random.default_rng(seed)
        at = self.clock.at + after
        records, items = [], []
        for unit, bucket, candidate, luck in zip(
            units, buckets, new, rng.random((len(units), 3)).tolist(), strict=True
        ):
            release = live.candidate if candidate else live.stable
            if release is None:
                continue
            record = self.record(unit, at, bucket, release, **more)
            records.append(record)
            if luck[0] < lost(release, bucket):
                continue
            token = RING.sign(record)
            kinds = ["exposure"] + ["click"] * (luck[1] < ctr(release, bucket)) + ["conversion"] * (luck[2] < cvr)
            items += [self.item(record, kind, token) for kind in kinds]
        record_decisions(self.database, records)
        self.clock.at = at + 15 * MINUTE
        self.send(items)

    def record(self, unit: str, at: datetime, bucket: Bucket, release: int, **more: Any) -> DecisionRecord:
        given = {
            "id": f"{next(self.numbers):032x}", "business": self.business, "scene": SCENE, "unit": unit, "at": at,
            "bucket": bucket, "variant": "v1", "propensity": 0.25, "learn": True, "reason": Reason.EXPLORED,
            "release": release, "release_hash": "r" * 64, "model_version": None, "candidates": 4,
        }  # fmt: skip
        return DecisionRecord(**{**given, **more})

    def item(self, record: DecisionRecord, kind: str, token: str | None = None) -> dict[str, Any]:
        at = (record.at + timedelta(seconds=1)).isoformat()
        return {
            "event_id": f"{record.id}-{kind}", "type": kind, "at": at, "token": token or RING.sign(record)
        }  # fmt: skip

    def see(self, record: DecisionRecord, *kinds: str) -> None:
        """One decision that was recorded and seen, and what else became of it."""
        record_decisions(self.database, [record])
        self.send([self.item(record, kind) for kind in ("exposure", *kinds)])

    def send(self, items: list[Any]) -> None:
        rules = Rules(max_items=len(items) + 1)
        results = ingest(self.database, self.business, items, RING, now=self.clock.at, rules=rules)
        assert {result.status for result in results} <= {"accepted"}

    def guard(self, **more: Any) -> GuardAction:
        return guard(
            self.database, self.database, self.folder, business=self.business, scene=SCENE,
            **{"at": self.clock.at, "window_s": WINDOW_S, **more},
        )  # fmt: skip

    def watched(self) -> Canary:
        found = self.do(lambda s: canary_of(s, SCENE))
        assert isinstance(found, Canary)
        return found

    def compare(self, release: int = 1, shares: Shares = SHARES, **more: Any) -> ExperimentReport:
        return compare(
            self.database, self.folder, business=self.business, scene=SCENE, release=release, shares=shares, **more
        )

    @property
    def standing(self) -> tuple[int | None, int | None, float]:
        live = self.do(lambda s: live_at(s, SCENE))
        return live.stable, live.candidate, live.share


@pytest.fixture(scope="module")
def template(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scene `welcome` of acme, its variants approved, nothing live."""
    path = tmp_path_factory.mktemp("guard") / "kaleidoscope.db"
    shutil.copy(sqlite_template, path)
    with open_database(f"sqlite:///{path}") as database:
        add_businesses(database)
        stocked(database, approved=True)
        with database.transaction(person("ann")) as session:
            make_variants(session, SCENE)
            move_variants(session, SCENE, "submit", VariantFilter())
        with database.transaction(person("rex")) as session:
            move_variants(session, SCENE, "approve", VariantFilter())
        database.backup(path.with_name("copy.db"))
    return path.with_name("copy.db")


@pytest.fixture
def young(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Nothing is live yet."""
    clock = Clock()
    monkeypatch.setattr("kaleidoscope.release.now", clock)
    shutil.copy(template, tmp_path / "kaleidoscope.db")
    with open_database(f"sqlite:///{tmp_path}/kaleidoscope.db") as database:
        yield World(database, tmp_path / "log", clock)


@pytest.fixture
def world(young: World) -> World:
    """Release 1 is fully live."""
    young.canary(stages=(1.0,))
    young.clock.at += HOUR
    return young


def same(release: int, bucket: Bucket) -> float:
    return 0.3


# ── the guard ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_worse_candidate_is_rolled_back_with_the_reason(world: World) -> None:
    world.canary(*RAILS)
    world.visit(range(2500), lambda release, bucket: 0.3 if release == 1 else 0.15)
    action = world.guard()
    assert (action.step, action.release) == (Step.ROLL_BACK, 2)
    assert "ctr_drop is 0." in action.reason and "has to be at most 0.02" in action.reason
    assert str(action).startswith("Rolled back release 2: ctr_drop")
    assert world.standing == (1, None, 0.0)
    entry = world.do(lambda s: ledger(s, SCENE)).items[0]
    assert (entry.seq, entry.actor) == (action.seq, "guard")
    assert {check["metric"] for check in entry.health["checks"]} == {"ctr_drop", "srm_p"}
    assert world.guard().step == Step.NOTHING
    json.dumps(action.as_dict(), allow_nan=False)


def test_an_equal_candidate_advances_to_all_traffic_one_stage_at_a_time(world: World) -> None:
    world.canary(*RAILS)
    for share in (0.6, 0.0):
        began = world.clock.at
        world.visit(range(2500), same, seed=round(10 * share))
        waits = world.guard()
        assert (waits.step, waits.reason) == (Step.WAIT, "its stage has run for 20 of 60 minutes")
        world.clock.at = began + HOUR
        assert world.guard().step == Step.ADVANCE
        assert world.standing[2] == share
        assert world.guard().step == (Step.WAIT if share else Step.NOTHING)
    assert world.standing == (2, None, 0.0)
    actors = [entry.actor for entry in world.do(lambda s: ledger(s, SCENE)).items]
    assert actors == ["guard", "guard", "pat", "pat"]


def test_too_little_data_is_waited_for_and_never_rolled_back(world: World) -> None:
    world.canary(*RAILS)
    world.visit(range(60), lambda release, bucket: 0.3 if release == 1 else 0.0)
    world.clock.at += DAY
    action = world.guard()
    assert (action.step, action.reason) == (Step.WAIT, "ctr_drop is not known yet")
    assert action.measured["ctr_drop"] is None
    assert world.standing == (1, 2, 0.3)


def test_few_units_are_waited_for_though_all_is_well(world: World) -> None:
    world.canary(Guardrail(metric="srm_p", min=0.001))
    world.visit(range(300), same)
    world.clock.at += DAY
    action = world.guard()
    assert action.step == Step.WAIT
    assert action.reason == f"{action.units} units have seen it in this stage, of 200"
    assert world.guard(min_units=10).step == Step.ADVANCE


def test_what_came_before_the_stage_does_not_count_in_it(world: World) -> None:
    world.canary(*RAILS)
    world.visit(range(2500), same)
    world.clock.at += HOUR
    assert world.guard().step == Step.ADVANCE
    world.visit(range(100), same, after=timedelta(seconds=30))  # when not every server knows of the stage
    world.clock.at += HOUR
    action = world.guard()
    assert (action.step, action.units) == (Step.WAIT, 0)


@pytest.mark.parametrize("gone", ["of a bucket", "of the canary"])
def test_a_wrong_sample_ratio_pauses_and_whoever_resumes_it_is_believed(world: World, gone: str) -> None:
    def lost(release: int, bucket: Bucket) -> float:
        return 0.9 * (bucket is Bucket.MODEL) if gone == "of a bucket" else 0.6 * (release == 2)

    world.canary(*RAILS, stages=(0.6, 1.0))
    world.visit(range(2500), same, lost=lost)
    action = world.guard()
    assert action.step == Step.PAUSE
    assert "shares" in action.reason
    assert action.measured["srm_p"] is not None and action.measured["srm_p"] < 0.001
    assert "paused" in str(world.do(lambda s: live_at(s, SCENE)))
    waits = world.guard()
    assert (waits.step, waits.seq) == (Step.WAIT, None)
    world.do(lambda s: resume(s, SCENE, reason="the page was repaired"))
    world.visit(range(2500), same, seed=1)
    world.clock.at += HOUR
    assert world.guard().step == Step.ADVANCE


def test_a_paused_candidate_that_breaks_a_guardrail_is_rolled_back(world: World) -> None:
    world.canary(*RAILS)
    world.do(lambda s: pause(s, SCENE, reason="wait for Monday"))
    world.visit(range(2500), lambda release, bucket: 0.3 if release == 1 else 0.1)
    assert world.guard().step == Step.ROLL_BACK


def test_somebody_who_moves_it_meanwhile_is_not_overruled(world: World) -> None:
    world.canary(*RAILS)
    world.visit(range(1500), lambda release, bucket: 0.3 if release == 1 else 0.1)

    def meanwhile(canary: Canary) -> None:
        if canary.candidate == 2:
            world.do(lambda s: rollback(s, SCENE, reason="by hand"))

    action = world.guard(traffic=meanwhile)
    assert action.step == Step.NOTHING and "moved it meanwhile" in action.reason and action.seq is None
    assert world.do(lambda s: ledger(s, SCENE)).items[0].reason == "by hand"


def test_two_guards_at_once_advance_once(world: World) -> None:
    world.canary(*RAILS)
    world.visit(range(1500), same)
    world.clock.at += HOUR
    inner: list[Step] = []
    action = world.guard(traffic=lambda canary: inner.append(world.guard().step))
    assert (inner, action.step) == ([Step.ADVANCE], Step.NOTHING)
    assert world.standing == (1, 2, 0.6)


def test_how_servers_answer_is_unknown_until_somebody_says(world: World) -> None:
    world.canary(Guardrail(metric="error_rate", max=0.01), Guardrail(metric="p99_ms", max=50))
    world.visit(range(800), same)
    world.clock.at += HOUR
    action = world.guard()
    assert action.step == Step.WAIT and "error_rate is not known yet" in action.reason and "/metrics" in action.reason
    well = Traffic(1000, 0, 0, {10.0: 1000})
    assert world.guard(traffic=lambda canary: well).step == Step.ADVANCE
    world.clock.at += MINUTE
    broken = world.guard(traffic=lambda canary: Traffic(1000, 20, 0, {10.0: 1000}))
    assert (broken.step, broken.reason) == (Step.ROLL_BACK, "error_rate is 0.02, has to be at most 0.01 over 3600 s")


def test_a_metric_that_nobody_can_measure_is_named(world: World) -> None:
    world.canary(Guardrail(metric="happiness", min=1))
    action = world.guard()
    assert action.step == Step.WAIT and action.reason.startswith("happiness is nothing that the guard can measure")


def test_a_candidate_that_shows_something_rejected_meanwhile_goes_no_further(world: World) -> None:
    world.canary(*RAILS)
    began = world.clock.at
    world.visit(range(2500), same)
    with world.database.transaction(person("rex")) as session:
        assert move_materials(session, "reject", ["c1"], reason="illegal claim").moved == 1
    world.clock.at = began + HOUR
    action = world.guard()
    assert (action.step, world.standing[1]) == (Step.WAIT, 2)
    assert "material c1" in action.reason and "roll it back" in action.reason


def test_without_guardrails_somebody_has_to_advance_it(world: World) -> None:
    world.canary()
    world.visit(range(800), same)
    world.clock.at += DAY
    assert world.guard().step == Step.WAIT
    assert "no guardrails" in world.guard().reason


def test_fallbacks_of_the_last_hours_break_their_guardrail(world: World) -> None:
    number = world.canary(Guardrail(metric="fallback_rate", max=0.05, window_s=3600))
    world.visit(range(600), same, reason=Reason.FALLBACK_BASELINE, learn=False)
    assert world.guard().measured["fallback_rate"] == 1.0
    assert world.standing == (1, None, 0.0)
    again = world.canary(Guardrail(metric="fallback_rate", max=0.05, window_s=3600))
    assert again == number + 1
    world.visit(range(600), same, reason=Reason.FALLBACK_BASELINE, learn=False)
    world.clock.at += 2 * HOUR
    world.visit(range(600), same)
    assert world.guard().measured["fallback_rate"] == 0.0


def test_a_first_release_is_measured_against_its_own_control(young: World) -> None:
    young.canary(*RAILS)
    young.visit(range(9000), lambda release, bucket: 0.1 if bucket is Bucket.MODEL else 0.3)
    action = young.guard()
    assert action.step == Step.ROLL_BACK
    assert young.standing == (None, None, 0.0)


def test_health_says_what_is_unknown(world: World) -> None:
    world.canary(*RAILS, Guardrail(metric="cvr_drop", max=0.1))
    world.visit(range(1000), same)
    found = health(world.database, world.folder, world.watched(), business="acme", at=world.clock.at, window_s=WINDOW_S)
    values = {check.metric: check.value for check in found.checks}
    assert values["ctr_drop"] == 0.0 and values["cvr_drop"] is None
    assert not found.ok and found.observed_at == world.clock.at


def test_the_guard_of_a_business_sees_its_own_scenes_and_events_alone(world: World) -> None:
    world.canary(*RAILS)
    world.visit(range(1500), same)
    before = world.compare(2)
    rival = World(world.database, world.folder, world.clock, business="rival")
    with pytest.raises(NotFoundError):
        rival.guard()
    theirs = [rival.record(f"user {i}", world.clock.at - MINUTE, Bucket.MODEL, 2) for i in range(800)]
    record_decisions(world.database, theirs)
    rival.send([rival.item(record, "exposure") for record in theirs])
    assert world.compare(2) == before
    assert rival.compare(2).units == 800
    action = world.guard()
    assert action.units == before.units and action.measured["ctr_drop"] == 0.0


# ── type-I error ────────────────────────────────────────────────────────────────────────────────────────────────────


def imagined(stable: int | None, stages: tuple[float, ...], stage: int) -> Canary:
    content = ReleaseContent.model_construct(shares=SHARES, guardrails=(Guardrail(metric="ctr_drop", max=0),),
                                             stages=stages)  # fmt: skip
    return Canary(SCENE, 1, 2, stable, stages[stage], stage, False, content, T0, T0)


def arm_of(clicks: Any, exposures: Any) -> Outcomes:
    return Outcomes(ArmSums.of(clicks, exposures), ArmSums())


def share_rolled_back(runs: int, drop: float, *, stable: int | None) -> float:
    """Of canaries watched 20 times, 5 times in each of 4 stages, by units that differ and come again."""
    rng = np.random.default_rng(7)
    stages, looks, units = (0.2, 0.3, 0.4, 0.5, 1.0), 5, 3000
    taken_back = 0
    for _ in range(runs):
        taste = rng.beta(2, 18, units)
        place = rng.random(units)
        is_control = rng.random(units) < 0.5
        totals = np.zeros((2, units))
        for stage, look in itertools.product(range(4), range(looks)):
            if look == 0 and stable is not None:
                totals[:] = 0
            inside = place < stages[stage]
            treated = inside if stable is not None else ~is_control
            came = rng.poisson(0.3, units)
            came[~inside] *= stable is not None
            totals += [rng.binomial(came, taste * (1 - drop * treated)), came]
            canary = imagined(stable, stages, stage)
            if stable is not None:
                arms = {2: arm_of(*totals[:, inside]), 1: arm_of(*totals[:, ~inside])}
                evidence = Evidence(stage=Counted(arms))
            else:
                buckets = {
                    Bucket.MODEL: arm_of(*totals[:, ~is_control]),
                    Bucket.CONTROL: arm_of(*totals[:, is_control]),
                }
                evidence = Evidence(buckets=Counted(buckets))
            found = measured(canary, evidence)
            report = Health.judge(canary.content.guardrails, found, T0)
            step, _ = next_step(canary, found | {"srm_p": None}, report, units=units, at=T0 + DAY)
            if step == Step.ROLL_BACK:
                taken_back += 1
                break
    return taken_back / runs


@pytest.mark.parametrize("stable", [1, None])
def test_twenty_looks_roll_back_no_more_equal_candidates_than_one_in_twenty(stable: int | None) -> None:
    runs = 150
    assert share_rolled_back(runs, 0.0, stable=stable) <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5
    assert share_rolled_back(20, 0.5, stable=stable) >= 0.9  # so that it is not merely blind


# ── sums ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def sums_in(world: World, by: str, key: Callable[[Any], Any], **more: Any) -> Counted[Any]:
    with open_exposures(
        world.database, world.folder, business="acme", scene=SCENE, describe=lambda *_: {}
    ) as exposures:
        return arm_sums(exposures, by, key, **more)


def test_sums_are_by_unit_in_the_bucket_of_its_first_exposure(world: World) -> None:
    at = world.clock.at

    def seen(unit: str, minute: int, bucket: Bucket, *kinds: str, release: int = 1, **more: Any) -> None:
        world.see(world.record(unit, at + minute * MINUTE, bucket, release, **more), *kinds)

    world.clock.at += DAY
    seen("b", 3, Bucket.MODEL, "click")
    seen("b", 1, Bucket.CONTROL, "conversion")
    seen("a", 2, Bucket.MODEL, "click", "conversion")
    seen("a", 4, Bucket.MODEL, "click", reason=Reason.PINNED, learn=False)
    seen("a", 5, Bucket.MODEL, reason=Reason.FALLBACK_BASELINE, learn=False)
    seen("a", 6, Bucket.MODEL, "click", reason=Reason.FORCED, learn=False)
    seen("c", 0, Bucket.RANDOM, "click", reason=Reason.FORCED, learn=False)
    seen("d", 7, Bucket.MODEL, release=9)
    found = sums_in(world, "bucket", Bucket, releases=[1])
    assert found == Counted(
        {
            Bucket.CONTROL: Outcomes(ArmSums.of([1], [2]), ArmSums.of([1], [2])),
            Bucket.MODEL: Outcomes(ArmSums.of([2], [3]), ArmSums.of([1], [3])),
        },
        mixed_units=1,
    )
    later = sums_in(world, "release", int, releases=[1, 9], since=at + 3 * MINUTE)
    assert later.units == {1: 2, 9: 1} and later.mixed_units == 0
    report = world.compare()
    assert (report.mixed_units, report.forced, report.units) == (1, 2, 2)
    with pytest.raises(ValueError, match="give bucket or release"):
        sums_in(world, "unit", str, releases=[1])


def test_sums_are_the_same_once_the_day_is_in_parquet(world: World) -> None:
    world.visit(range(300), same, cvr=0.1)
    before = world.compare()
    done = compact(world.database, world.folder, business="acme", now=world.clock.at + 30 * DAY, describe=lambda *_: {})
    assert done.exposures == 300
    assert world.compare() == before


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_report_has_the_numbers_of_statsmodels_and_scipy(world: World) -> None:
    world.visit(range(4000), lambda release, bucket: 0.3 if bucket is Bucket.MODEL else 0.2, cvr=0.1)
    report = world.compare()
    of = {result.bucket: result for result in report.buckets}
    assert list(of) == [Bucket.CONTROL, Bucket.RANDOM, Bucket.MODEL]
    assert sum(result.exposures for result in report.buckets) == report.units == 4000
    model, control = of[Bucket.MODEL], of[Bucket.CONTROL]
    found = {(c.treatment, c.control, c.outcome): c for c in report.comparisons}
    assert set(found) == {
        (a, b, outcome)
        for a, b in ((Bucket.MODEL, Bucket.CONTROL), (Bucket.RANDOM, Bucket.CONTROL), (Bucket.MODEL, Bucket.RANDOM))
        for outcome in ("ctr", "cvr")
    }
    for outcome, events in (("ctr", "clicks"), ("cvr", "conversions")):
        lift = found[Bucket.MODEL, Bucket.CONTROL, outcome].lift
        assert lift is not None
        counts = (getattr(model, events), model.exposures, getattr(control, events), control.exposures)
        low, high = confint_proportions_2indep(*counts, compare="ratio", method="log", correction=False)
        assert (1 + lift.fixed.low, 1 + lift.fixed.high) == pytest.approx((low, high), rel=2e-3)
        assert lift.always_valid.low < lift.fixed.low < lift.lift < lift.fixed.high < lift.always_valid.high
    assert model.ctr.rate == model.clicks / model.exposures
    normal = proportion_confint(model.clicks, model.exposures)
    assert (model.ctr.ci_low, model.ctr.ci_high) == pytest.approx(normal, rel=5e-3)
    expected = [4000 * share for share in (0.25, 0.25, 0.5)]
    assert report.srm is not None
    assert report.srm.p_value == pytest.approx(chisquare([of[b].units for b in of], expected).pvalue)
    text = "\n".join(report.lines())
    assert "model against control, CTR: better, +" in text
    assert "random against control, CTR: no difference is shown" in text and "may be true" in text
    assert "simulated" not in text


def test_the_report_plans_from_the_traffic_that_came(world: World) -> None:
    world.visit(range(1000), same)
    world.visit(range(1000, 2000), same, after=DAY - 15 * MINUTE)
    report = world.compare(wanted_lift=0.05)
    assert report.days == pytest.approx(1.0, abs=0.02)
    ctr = report.comparisons[0]
    assert ctr.detectable_lift is not None and ctr.days_needed is not None and report.days is not None
    # Half the effect takes four times the units.
    assert ctr.days_needed / report.days == pytest.approx((ctr.detectable_lift / 0.05) ** 2, rel=0.01)
    with pytest.raises(InputError, match="wanted lift"):
        world.compare(wanted_lift=0)


def test_the_report_says_that_nothing_is_known_yet(world: World) -> None:
    empty = world.compare()
    assert (empty.units, empty.srm, empty.since) == (0, None, None)
    assert empty.lines() == ["Nobody is known to have seen release 1 of scene 'welcome' yet."]
    world.visit(range(20), same)
    report = world.compare(simulated=True)
    assert all(comparison.lift is None for comparison in report.comparisons)
    assert "model against control, CTR: not known yet; it takes 30 units and 10 clicks in each." in report.lines()
    assert report.lines()[0] == "These numbers are simulated."
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["simulated"] is True and plain["comparisons"][0]["lift"] is None


def test_the_report_warns_of_a_wrong_sample_ratio(world: World) -> None:
    world.visit(range(2500), same, lost=lambda release, bucket: 0.4 * (bucket is Bucket.MODEL))
    report = world.compare()
    assert report.srm is not None and report.srm.flagged
    assert any(line.startswith("SAMPLE RATIO") for line in report.lines())


# ── how servers answer ──────────────────────────────────────────────────────────────────────────────────────────────


def served(n: int, *, errors: int = 0, fallbacks: int = 0) -> Metrics:
    metrics = Metrics()
    metrics.decisions.labels("model", "ranked").inc(n - fallbacks)
    metrics.decisions.labels("model", "fallback_baseline").inc(fallbacks)
    metrics.errors.labels("job_failed").inc(errors)
    metrics.errors.labels("not_found").inc(5000)
    for i in range(n):
        metrics.seconds.observe(0.0004 if i % 50 else 0.03)
    return metrics


def told(metrics: Metrics) -> Traffic:
    return traffic_in(generate_latest(metrics.registry).decode())


def test_a_servers_metrics_are_read() -> None:
    found = told(served(200, errors=4, fallbacks=10))
    assert (found.requests, found.errors, found.fallbacks) == (204, 4, 10)
    assert sum(found.latency_ms.values()) == 200
    assert found.latency_ms[0.5] == 196 and found.latency_ms[50.0] == 4
    p99 = found.latency_quantile_ms(0.99)
    assert p99 is not None and 20 < p99 <= 50


def test_servers_are_counted_from_when_the_stage_was_first_seen(tmp_path: Path) -> None:
    path, canary, urls = tmp_path / "acme" / "guard.json", imagined(1, (0.1, 0.5, 1.0), 0), ["http://a", "http://b"]
    counts = {"http://a": served(300, errors=30), "http://b": served(50)}

    def look(canary: Canary = canary) -> Traffic:
        found = stage_traffic(path, canary, urls, read=lambda url: told(counts[url]))
        assert found is not None
        return found

    assert look().requests == 0
    counts["http://a"] = served(500, errors=31)
    counts["http://b"] = served(60)
    found = look()
    assert (found.requests, found.errors, sum(found.latency_ms.values())) == (211, 1, 210)
    counts["http://b"] = served(20)  # it was started anew
    assert look().requests == 221
    counts["http://b"] = served(100)
    assert look().requests == 301
    assert look(imagined(1, (0.1, 0.5, 1.0), 1)).requests == 0
    assert stage_traffic(path, canary, []) is None


def test_an_address_that_is_no_servers_metrics_is_refused() -> None:
    with pytest.raises(InputError, match="http:// or https://"):
        scrape("file:///etc/hostname")
    with pytest.raises(InputError, match="cannot be read"):
        scrape("http://127.0.0.1:1/metrics")


# ── the command line ────────────────────────────────────────────────────────────────────────────────────────────────


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int | str | None, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    return (stop.value.code, *capsys.readouterr())


def test_the_commands_show_and_guard(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = str(world.database.url)
    for name, value in (("DATABASE_URL", url), ("LOG_URL", url), ("LOG_DIR", str(world.folder)), ("BUSINESS", "acme")):
        monkeypatch.setenv(f"KALEIDOSCOPE_{name}", value)
    monkeypatch.setenv("KALEIDOSCOPE_DECISION_WINDOW_S", "60")
    monkeypatch.setattr("kaleidoscope.guard.now", world.clock)
    world.canary(*RAILS)
    world.visit(range(1500), lambda release, bucket: 0.3 if release == 1 else 0.1)
    code, out, err = run(capsys, f"experiment show {SCENE} --simulated")
    assert (code, err) == (0, "")
    assert out.startswith("These numbers are simulated.") and "model / control" in out and "always valid" in out
    code, out, _ = run(capsys, f"experiment show {SCENE} --release 2 --json")
    shown = json.loads(out)
    assert code == 0 and shown["release"] == 2 and 0 < shown["units"] < 1500
    code, out, err = run(capsys, f"release guard {SCENE} --metrics-url http://127.0.0.1:1/metrics --json")
    acted = json.loads(out)
    assert (code, acted["step"], acted["seq"]) == (0, "roll_back", 3)
    assert "cannot be read" in err
    code, out, _ = run(capsys, f"release guard {SCENE}")
    assert (code, out) == (0, "Nothing to do: no release is in canary.\n")
    code, out, _ = run(capsys, "release guard nowhere --json")
    assert (code, json.loads(out)["error"]["code"]) == (2, "not_found")


def test_a_scene_that_shows_nothing_has_no_experiment(
    young: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("DATABASE_URL", "LOG_URL"):
        monkeypatch.setenv(f"KALEIDOSCOPE_{name}", str(young.database.url))
    code, out, _ = run(capsys, f"experiment show {SCENE} --business acme --json")
    error = json.loads(out)["error"]
    assert (code, error["code"]) == (2, "not_found") and "name an earlier release" in error["message"]
