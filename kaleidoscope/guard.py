"""What the log says of a release: the report that compares its buckets, and the guard that moves its canary.

The sums are taken from "exposures with outcomes" (events.py), the statistics are experiment.py's, and release.py moves
the ledger. docs/experiments.md explains both to operators.
"""

from __future__ import annotations

import contextlib
import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, TypeVar

import duckdb
from prometheus_client.parser import text_string_to_metric_families

from kaleidoscope.access import Caller
from kaleidoscope.database import MAX_PAGE, Database, Session
from kaleidoscope.decision_record import Reason
from kaleidoscope.errors import ConflictError, InputError
from kaleidoscope.events import open_exposures, read_anew
from kaleidoscope.experiment import (
    ALPHA,
    MIN_EVENTS,
    MIN_REQUESTS,
    MIN_UNITS,
    SRM_ALPHA,
    Arms,
    ArmSums,
    Lift,
    Ratio,
    Srm,
    Traffic,
    lift,
    measure,
    minimum_detectable_effect,
    ratio,
    required_units,
    srm,
)
from kaleidoscope.release import (
    Action,
    Guardrail,
    Health,
    HealthCheck,
    ReleaseContent,
    Shares,
    advance,
    get_release,
    ledger,
    live_at,
    pause,
    verify,
    withdrawn,
)
from kaleidoscope.scenes import get_scene
from kaleidoscope.tables import LedgerEntry, now
from kaleidoscope.vocabulary import Bucket, Role

USER = "guard"  # who the ledger says it was
MIN_STAGE = timedelta(hours=1)
MIN_STAGE_UNITS = 200  # that saw the candidate, before it gets more of the traffic
SETTLE = timedelta(minutes=1)  # until every server knows of a stage
WINDOW_S = 3600  # Settings.decision_window_s, and a guardrail's window, where nobody says otherwise
WANTED_LIFT = 0.1  # that the report plans for
SCRAPE_TIMEOUT_S = 5.0
MAX_SCRAPE = 8 << 20  # bytes

METRICS = ("ctr_drop", "cvr_drop", "srm_p", "error_rate", "fallback_rate", "p99_ms")
# The caller's own fault, or nothing that a release could change: no errors of a decision.
NOT_OURS = frozenset(
    {"bad_input", "not_found", "too_large", "too_complex", "too_many_requests", "unauthenticated", "forbidden"}
)

Key = TypeVar("Key")
Answer = TypeVar("Answer")


# ── sums from the log ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Outcomes:
    """An arm's clicks and conversions, both per exposure, by unit."""

    clicks: ArmSums = field(default_factory=ArmSums)
    conversions: ArmSums = field(default_factory=ArmSums)

    @property
    def units(self) -> int:
        """Distinct units."""
        return self.clicks.units

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(self.clicks + other.clicks, self.conversions + other.conversions)


@dataclass(frozen=True)
class Counted(Generic[Key]):
    """Sums by arm, and how many units were seen in more than one: each counts where it was first seen."""

    arms: Mapping[Key, Outcomes]
    mixed_units: int = 0

    def of(self, key: Key) -> Outcomes:
        """The arm's sums; of one that nobody was in, zeros."""
        return self.arms.get(key, Outcomes())

    @property
    def units(self) -> dict[Key, int]:
        """Distinct units by arm."""
        return {key: arm.units for key, arm in self.arms.items()}


# What a tester asked for was not drawn. Everything else stays where it was assigned, pinned or fallen back or not.
_COUNTED = f"reason IS DISTINCT FROM '{Reason.FORCED}' AND list_contains($releases, release) AND decided_at >= $since"
_SUMS = """
WITH by_unit AS (
    SELECT unit, arg_min({by}, (exposed_at, decision_id)) AS arm, min({by}) <> max({by}) AS mixed,
        CAST(count(*) AS DOUBLE) AS x, CAST(sum(click) AS DOUBLE) AS y, CAST(sum(conversion) AS DOUBLE) AS z
    FROM exposures WHERE {counted} GROUP BY unit
)
SELECT arm, count(*) FILTER (mixed), count(*), sum(x), sum(x * x),
    sum(y), sum(y * y), sum(x * y), sum(z), sum(z * z), sum(x * z)
FROM by_unit GROUP BY arm ORDER BY arm
"""
_BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


def arm_sums(
    exposures: duckdb.DuckDBPyConnection,
    by: str,
    key: Callable[[Any], Key],
    *,
    releases: Collection[int],
    since: datetime = _BEGINNING,
) -> Counted[Key]:
    """Sums by `bucket` or by `release` of the exposures of these releases that were decided from `since` on.

    Of a connection that `open_exposures` yields. An exposure is a decision that was seen. A unit counts, with all that
    it did, in the arm in which it was first seen (intention to treat); what a tester forced does not count.
    """
    if by not in ("bucket", "release"):
        raise ValueError(f"by {by!r}: give bucket or release")
    query = _SUMS.format(by=by, counted=_COUNTED)
    arms, mixed = {}, 0
    for arm, more, units, x, xx, y, yy, xy, z, zz, xz in exposures.execute(
        query, {"releases": sorted(releases), "since": since}
    ).fetchall():
        arms[key(arm)] = Outcomes(ArmSums(units, y, yy, x, xx, xy), ArmSums(units, z, zz, x, xx, xz))
        mixed += more
    return Counted(arms, mixed)


def _read(
    log: Database,
    folder: Path,
    business: str,
    scene: str,
    work: Callable[[duckdb.DuckDBPyConnection], Answer],
    *,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Answer:
    """What `work` finds in the scene's exposures; anew where a file was replaced meanwhile. What they showed is not
    asked for."""

    def read() -> Answer:
        with open_exposures(
            log, folder, business=business, scene=scene, describe=lambda *_: {}, since=since, until=until
        ) as duck:
            return work(duck)

    return read_anew(read)


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class BucketResult:
    """What became of a bucket; both rates are per exposure."""

    bucket: Bucket
    share: float  # of the units, as designed
    units: int
    exposures: int
    clicks: int
    conversions: int
    ctr: Ratio
    cvr: Ratio


@dataclass(frozen=True)
class Comparison:
    """Two buckets on one outcome, and what it takes to tell them apart; what is not known is None."""

    treatment: Bucket
    control: Bucket
    outcome: str  # ctr, cvr
    lift: Lift | None
    detectable_lift: float | None  # the smallest that this many units show with 80 % power, at one look
    days_needed: float | None  # from the first exposure, at present traffic, for the wanted lift
    says: str


@dataclass(frozen=True)
class ExperimentReport:
    """The buckets of a release, compared."""

    scene: str
    release: int
    simulated: bool
    since: datetime | None  # of the first exposure counted; None: there is none
    until: datetime | None
    units: int
    mixed_units: int  # seen in more than one bucket
    forced: int  # exposures left out: a tester asked for the variant
    unrecorded: int  # exposures whose decision was lost, so that nobody knows whether a tester asked for them
    srm: Srm | None
    buckets: tuple[BucketResult, ...]
    comparisons: tuple[Comparison, ...]
    wanted_lift: float
    alpha: float

    @property
    def days(self) -> float | None:
        """From the first exposure to the last."""
        return None if self.since is None or self.until is None else (self.until - self.since) / timedelta(days=1)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, with moments in ISO 8601."""
        plain = asdict(self) | {"days": self.days}
        return plain | {name: m and m.isoformat() for name, m in (("since", self.since), ("until", self.until))}

    def lines(self) -> list[str]:
        """What it says, in sentences."""
        said = ["These numbers are simulated."] if self.simulated else []
        if self.since is None or self.until is None:
            return [*said, f"Nobody is known to have seen release {self.release} of scene {self.scene!r} yet."]
        said.append(
            f"Release {self.release} of scene {self.scene!r}: {self.units:,} units from {self.since:%Y-%m-%d %H:%M} to"
            f" {self.until:%Y-%m-%d %H:%M} UTC."
        )
        if self.srm is not None and self.srm.flagged:
            said.append(
                "SAMPLE RATIO: the units did not fall into the buckets as their shares say"
                f" ({_p(self.srm.always_valid_p)}). No comparison below can be trusted: find the cause first."
            )
        elif self.srm is not None:
            said.append(f"The units fell into the buckets as their shares say ({_p(self.srm.always_valid_p)}).")
        said += [comparison.says for comparison in self.comparisons]
        if self.mixed_units:
            said.append(f"{self.mixed_units:,} units were in more than one bucket; each counts in its first.")
        if self.forced:
            said.append(f"{self.forced:,} exposures that a tester asked for are left out.")
        if self.unrecorded:
            said.append(f"{self.unrecorded:,} exposures count though their decision was lost.")
        return said


PAIRS = (
    (Bucket.MODEL, Bucket.CONTROL),
    (Bucket.RANDOM, Bucket.CONTROL),
    (Bucket.CHALLENGER, Bucket.CONTROL),
    (Bucket.MODEL, Bucket.RANDOM),
)
OUTCOMES = {"ctr": "clicks", "cvr": "conversions"}


def compare(
    log: Database,
    folder: Path,
    *,
    business: str,
    scene: str,
    release: int,
    shares: Shares,
    since: datetime | None = None,
    until: datetime | None = None,
    simulated: bool = False,
    wanted_lift: float = WANTED_LIFT,
    alpha: float = ALPHA,
) -> ExperimentReport:
    """The buckets of a release compared, on exposures first seen from `since` on and before `until`.

    CVR is conversions per exposure. Lifts: model, random and challenger against control, and model against random.
    Raises InputError for a wanted lift that nobody could plan for.
    """
    if not 0 < wanted_lift < math.inf:
        raise InputError(f"wanted lift: {wanted_lift:g} is none to plan for. Give one above 0, such as 0.1 for 10 %.")

    def read(duck: duckdb.DuckDBPyConnection) -> tuple[Counted[Bucket], tuple[int | None, ...]]:
        facts = duck.execute(
            f"SELECT min(epoch_us(exposed_at)) FILTER ({_COUNTED}), max(epoch_us(exposed_at)) FILTER ({_COUNTED}),"
            f" count(*) FILTER (reason = '{Reason.FORCED}'), count(*) FILTER (NOT recorded)"
            " FROM exposures WHERE list_contains($releases, release)",
            {"releases": [release], "since": _BEGINNING},
        ).fetchone()
        assert facts is not None
        return arm_sums(duck, "bucket", Bucket, releases=[release]), facts

    counted, (first_us, last_us, forced, unrecorded) = _read(
        log, folder, business, scene, read, since=since, until=until
    )
    first, last = (None if us is None else _BEGINNING + timedelta(microseconds=us) for us in (first_us, last_us))
    days = None if first is None or last is None else (last - first) / timedelta(days=1)
    designed = {bucket: getattr(shares, bucket) for bucket in Bucket}
    there = [bucket for bucket in Bucket if designed[bucket] > 0 or bucket in counted.arms]
    return ExperimentReport(
        scene=scene,
        release=release,
        simulated=simulated,
        since=first,
        until=last,
        units=sum(counted.units.values()),
        mixed_units=counted.mixed_units,
        forced=forced or 0,
        unrecorded=unrecorded or 0,
        srm=srm(counted.units, designed),
        buckets=tuple(_bucket(bucket, designed[bucket], counted.of(bucket), alpha) for bucket in there),
        comparisons=tuple(
            _comparison(pair, outcome, counted, days, wanted_lift, alpha)
            for pair in PAIRS
            if set(pair) <= set(there)
            for outcome in OUTCOMES
        ),
        wanted_lift=wanted_lift,
        alpha=alpha,
    )


def _bucket(bucket: Bucket, share: float, seen: Outcomes, alpha: float) -> BucketResult:
    clicks, conversions = seen.clicks, seen.conversions
    return BucketResult(
        bucket, share, seen.units, int(clicks.x), int(clicks.y), int(conversions.y),
        ratio(clicks, alpha), ratio(conversions, alpha),
    )  # fmt: skip


def _comparison(
    pair: tuple[Bucket, Bucket],
    outcome: str,
    counted: Counted[Bucket],
    days: float | None,
    wanted_lift: float,
    alpha: float,
) -> Comparison:
    treatment, control = (getattr(counted.of(bucket), OUTCOMES[outcome]) for bucket in pair)
    found = lift(treatment, control, alpha=alpha)
    base = ratio(control, alpha)
    detectable = needed = None
    if base.rate and base.variance and treatment.units:
        detectable = minimum_detectable_effect(
            base.rate, base.variance, treatment_units=treatment.units, control_units=control.units, alpha=alpha
        )
        both = treatment.units + control.units
        if days:
            units = required_units(
                wanted_lift, base.rate, base.variance, treatment_share=treatment.units / both, alpha=alpha
            )
            needed = units / both * days
    says = f"{pair[0].value} against {pair[1].value}, {outcome.upper()}: {_verdict(found, OUTCOMES[outcome], alpha)}"
    return Comparison(*pair, outcome, found, detectable, needed, says)


def _verdict(found: Lift | None, events: str, alpha: float) -> str:
    if found is None:
        return f"not known yet; it takes {MIN_UNITS} units and {MIN_EVENTS} {events} in each."
    always = found.always_valid
    interval = (
        f"{_signed(found.lift)} (always-valid {100 * (1 - alpha):.4g} % interval {_span(always.low, always.high)})"
    )
    if always.low > 0:
        return f"better, {interval}."
    if always.high < 0:
        return f"worse, {interval}."
    once = ""
    if found.fixed.low > 0 or found.fixed.high < 0:
        once = " The fixed interval leaves 0 out, which counts if this is the one look that was planned."
    return f"no difference is shown, {interval}: whatever lies in it may be true.{once}"


def _signed(share: float) -> str:
    return f"{share:+.1%}".replace("%", " %").replace("-", "−")


def _span(low: float, high: float) -> str:
    return f"{_signed(low)} to {_signed(high)}"


def _p(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


# ── what is watched ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Canary:
    """A release in canary, and since when what is counted of it."""

    scene: str
    seq: int  # of the ledger's last entry
    candidate: int
    stable: int | None
    share: float
    stage: int
    paused: bool
    content: ReleaseContent
    began: datetime
    stage_began: datetime
    resumed: datetime | None = None  # the last time that somebody let it go on
    withdrawn: tuple[str, ...] = ()  # what of it was rejected or retired since it was drafted


def canary_of(session: Session, scene_id: str) -> Canary | None:
    """The scene's candidate; None where nothing is in canary. Raises NotFoundError, and JobError for a release that was
    changed."""
    get_scene(session, scene_id)
    live = live_at(session, scene_id)
    if live is None or live.candidate is None:
        return None
    moved = [entry for entry in _entries_since_start(session, scene_id) if entry.candidate == live.candidate]
    stages = [entry.at for entry in moved if entry.action in (Action.START, Action.ADVANCE)]
    resumes = [entry.at for entry in moved if entry.action == Action.RESUME]
    content = verify(get_release(session, scene_id, live.candidate))
    return Canary(
        scene=scene_id,
        seq=live.seq,
        candidate=live.candidate,
        stable=live.stable,
        share=live.share,
        stage=live.stage or 0,
        paused=live.paused,
        content=content,
        began=stages[-1],
        stage_began=stages[0],
        resumed=resumes[0] if resumes else None,
        withdrawn=tuple(withdrawn(session, live.candidate, content)),
    )


def _entries_since_start(session: Session, scene_id: str) -> Iterable[LedgerEntry]:
    """The ledger's entries, newest first, until the last start."""
    cursor = None
    while True:
        page = ledger(session, scene_id, cursor=cursor, limit=MAX_PAGE)
        for entry in page.items:
            yield entry
            if entry.action == Action.START:
                return
        cursor = page.next_cursor
        if cursor is None:
            return


@dataclass(frozen=True)
class Evidence:
    """What the log says of a canary."""

    stage: Counted[int] = field(default_factory=lambda: Counted({}))  # by release, since the stage began
    buckets: Counted[Bucket] = field(default_factory=lambda: Counted({}))  # of the candidate, since it began
    bucket_units: Mapping[Bucket, int] = field(default_factory=dict)  # as above, but not before it was last resumed
    release_units: Mapping[int, int] = field(default_factory=dict)
    recorded: int = 0  # answers of the candidate within the guardrail's window
    fallbacks: int = 0  # of those


def gather(log: Database, folder: Path, canary: Canary, *, business: str, at: datetime, window_s: int) -> Evidence:
    """What is counted of a canary at a moment; `window_s` is the window in which equal requests get one decision."""
    both = [number for number in (canary.candidate, canary.stable) if number is not None]
    since = _counted_from(canary.stage_began, window_s)
    rail = next((r for r in canary.content.guardrails if r.metric == "fallback_rate"), None)
    recent = at - timedelta(seconds=WINDOW_S if rail is None else rail.window_s)

    def read(duck: duckdb.DuckDBPyConnection) -> Evidence:
        buckets = arm_sums(duck, "bucket", Bucket, releases=[canary.candidate])
        stage = arm_sums(duck, "release", int, releases=both, since=since)
        units, split = buckets.units, stage.units
        if canary.resumed is not None:  # whoever resumed it knew of an alarm, and has found its cause
            units = arm_sums(duck, "bucket", Bucket, releases=[canary.candidate], since=canary.resumed).units
            split = arm_sums(duck, "release", int, releases=both, since=max(since, canary.resumed)).units
        answers = duck.execute(
            f"SELECT count(*), count(*) FILTER (starts_with(reason, 'fallback_')) FROM exposures"
            f" WHERE recorded AND {_COUNTED}",
            {"releases": [canary.candidate], "since": recent},
        ).fetchone()
        recorded, fallbacks = answers or (0, 0)
        return Evidence(stage, buckets, units, split, recorded, fallbacks)

    return _read(log, folder, business, canary.scene, read, since=canary.began, until=at)


def _counted_from(stage_began: datetime, window_s: int) -> datetime:
    """From when on both releases answer to the shares of the stage alone.

    A server hears of a stage a little later. And within a window, who stays with a release goes on with the decision
    of before, while who is moved gets a new one: only from the next window on are the two alike.
    """
    settled_us = (stage_began + SETTLE - _BEGINNING) // timedelta(microseconds=1)
    window_us = window_s * 1_000_000
    return _BEGINNING + timedelta(microseconds=-(-settled_us // window_us) * window_us)


def measured(
    canary: Canary, evidence: Evidence, traffic: Traffic | None = None, *, alpha: float = ALPHA
) -> dict[str, float | None]:
    """The metrics that guardrails may bound, as they stand; None: not known (yet).

    Drops are against the stable release within the stage, or, where there is none, of what learns (else bucket random)
    against bucket control of the candidate since it began. Over all looks and stages, a candidate as good as what it
    is compared with exceeds a drop of 0 with a chance of at most `alpha`, each drop for itself. `srm_p` is the
    always-valid p-value of the buckets' shares and, where a release is stable, of the canary's, with their number
    counted against it.
    """
    canaries = max(1, len(canary.content.stages) - 1)  # stages at which there is something to compare
    if canary.stable is not None:
        arms, level = (evidence.stage.of(canary.candidate), evidence.stage.of(canary.stable)), alpha / canaries
    else:
        arms, level = (_treated(canary.content.shares, evidence.buckets), evidence.buckets.of(Bucket.CONTROL)), alpha
    found = measure(
        clicks=Arms(arms[0].clicks, arms[1].clicks),
        conversions=Arms(arms[0].conversions, arms[1].conversions),
        traffic=traffic,
        alpha=level,
    )
    enough = evidence.recorded >= MIN_REQUESTS
    return found | {
        "srm_p": _ratio_p(canary, evidence, canaries),
        "fallback_rate": evidence.fallbacks / evidence.recorded if enough else None,
    }


def _ratio_p(canary: Canary, evidence: Evidence, canaries: int) -> float | None:
    buckets = srm(evidence.bucket_units, {bucket: getattr(canary.content.shares, bucket) for bucket in Bucket})
    if canary.stable is None:
        return None if buckets is None else buckets.always_valid_p
    split = srm(evidence.release_units, {canary.candidate: canary.share, canary.stable: 1 - canary.share})
    known = [2 * n * check.always_valid_p for n, check in ((1, buckets), (canaries, split)) if check is not None]
    return min(1.0, *known) if known else None


def _treated(shares: Shares, buckets: Counted[Bucket]) -> Outcomes:
    if shares.model > 0 or shares.challenger > 0:
        return buckets.of(Bucket.MODEL) + buckets.of(Bucket.CHALLENGER)
    return buckets.of(Bucket.RANDOM)


def health(
    log: Database,
    folder: Path,
    canary: Canary,
    *,
    business: str,
    at: datetime,
    window_s: int = WINDOW_S,
    traffic: Traffic | None = None,
) -> Health:
    """How the candidate does, by its guardrails; what nobody knows (yet) has the value None."""
    evidence = gather(log, folder, canary, business=business, at=at, window_s=window_s)
    return Health.judge(canary.content.guardrails, measured(canary, evidence, traffic), at)


# ── the guard ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Step(StrEnum):
    """What the guard does with a canary."""

    NOTHING = "nothing"  # there is none, or somebody else has just moved it
    WAIT = "wait"
    ADVANCE = "advance"
    PAUSE = "pause"
    ROLL_BACK = "roll_back"


@dataclass(frozen=True)
class GuardAction:
    """What the guard did, and what it saw."""

    scene: str
    step: Step
    reason: str
    at: datetime
    release: int | None = None  # the candidate
    seq: int | None = None  # of the ledger's entry that it wrote
    units: int | None = None  # that saw the candidate in this stage
    measured: Mapping[str, float | None] = field(default_factory=dict)
    health: Health | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)} | {"at": self.at.isoformat()}
        return plain | {"health": None if self.health is None else self.health.model_dump(mode="json")}

    def __str__(self) -> str:
        """In words."""
        did = {
            Step.NOTHING: "Nothing to do",
            Step.WAIT: f"Release {self.release} waits",
            Step.ADVANCE: f"Advanced release {self.release}",
            Step.PAUSE: f"Paused release {self.release}",
            Step.ROLL_BACK: f"Rolled back release {self.release}",
        }[self.step]
        return f"{did}: {self.reason}."


def next_step(
    canary: Canary,
    found: Mapping[str, float | None],
    health: Health,
    *,
    units: int,
    at: datetime,
    min_stage: timedelta = MIN_STAGE,
    min_units: int = MIN_STAGE_UNITS,
) -> tuple[Step, str]:
    """What is to be done with a canary, and why. Only what is known to be broken is taken back."""
    rails = {rail.metric: rail for rail in canary.content.guardrails}
    broken = [
        f"{check.metric} is {check.value:.4g}, has to be {rails[check.metric]}"
        for check in health.checks
        if check.value is not None and not check.ok and check.metric != "srm_p"
    ]
    if broken:
        return Step.ROLL_BACK, "; ".join(broken)
    if canary.paused:
        return Step.WAIT, "it is paused, and somebody has to resume it"
    ratio_p, bound = found["srm_p"], rails.get("srm_p", Guardrail(metric="srm_p", min=SRM_ALPHA))
    if ratio_p is not None and not bound.holds(ratio_p):
        return Step.PAUSE, (
            f"units do not fall into buckets, or into the canary, as their shares say (p = {ratio_p:.2g}), so that no"
            " comparison can be trusted; find the cause, then resume it"
        )
    if canary.withdrawn:
        more = f" and {len(canary.withdrawn) - 3:,} more" if len(canary.withdrawn) > 3 else ""
        return Step.WAIT, (
            f"it shows {', '.join(canary.withdrawn[:3])}{more}, rejected or retired since; roll it back, and draft"
            " a new release"
        )
    if not rails:
        return Step.WAIT, "it has no guardrails, so that somebody has to advance it"
    unknown = [_unknown(check) for check in health.checks if check.value is None]
    if unknown:
        return Step.WAIT, "; ".join(unknown)
    age = at - canary.stage_began
    if age < min_stage:
        return Step.WAIT, f"its stage has run for {_minutes(age)} of {_minutes(min_stage)} minutes"
    if units < min_units:
        return Step.WAIT, f"{units:,} units have seen it in this stage, of {min_units:,}"
    return Step.ADVANCE, f"every guardrail holds, and {units:,} units have seen it in this stage"


def _unknown(check: HealthCheck) -> str:
    if check.metric not in METRICS:
        return f"{check.metric} is nothing that the guard can measure ({', '.join(METRICS)} are)"
    if check.metric in ("error_rate", "p99_ms"):
        return f"{check.metric} is not known yet: it takes {MIN_REQUESTS} answers in this stage, by a server's /metrics"
    return f"{check.metric} is not known yet"


def _minutes(time: timedelta) -> str:
    return f"{math.floor(time / timedelta(minutes=1)):,}"


def guard(
    database: Database,
    log: Database,
    folder: Path,
    *,
    business: str,
    scene: str,
    at: datetime | None = None,
    window_s: int = WINDOW_S,
    min_stage: timedelta = MIN_STAGE,
    min_units: int = MIN_STAGE_UNITS,
    traffic: Callable[[Canary], Traffic | None] = lambda canary: None,
) -> GuardAction:
    """Look at the scene's canary once: wait, advance it one stage, pause it, or roll it back.

    Acts as user `guard`, who may publish in this business and nothing else. Of two guards at once one acts. `folder` is
    the log's; `traffic` says how servers answered since the stage began, where somebody knows.
    """
    caller = Caller(USER, business, frozenset({Role.PUBLISHER}))
    with database.transaction(caller, write=False) as session:
        canary = canary_of(session, scene)
    at = now() if at is None else at
    if canary is None:
        return GuardAction(scene, Step.NOTHING, "no release is in canary", at)
    evidence = gather(log, folder, canary, business=business, at=at, window_s=window_s)
    found = measured(canary, evidence, traffic(canary))
    report = Health.judge(canary.content.guardrails, found, at)
    units = evidence.stage.of(canary.candidate).units
    step, reason = next_step(canary, found, report, units=units, at=at, min_stage=min_stage, min_units=min_units)
    seq = None
    try:
        with database.transaction(caller) as session:
            seq = _take(session, canary, step, reason, report)
    except ConflictError:
        with database.transaction(caller, write=False) as session:
            live = live_at(session, scene)
        if live is not None and live.seq == canary.seq:
            raise
        step, reason = Step.NOTHING, f"somebody has moved it meanwhile; now {live}"
    return GuardAction(scene, step, reason, at, canary.candidate, seq, units, found, report)


def _take(session: Session, canary: Canary, step: Step, reason: str, report: Health) -> int | None:
    """Do it, unless the ledger has gone on; return the number of its entry."""
    scene, seq = canary.scene, canary.seq
    match step:
        case Step.ADVANCE:
            return advance(session, scene, health=report, expected_seq=seq).seq
        case Step.ROLL_BACK:  # this way the ledger keeps the report
            return advance(session, scene, health=report, expected_seq=seq, rollback_if_unhealthy=True).seq
        case Step.PAUSE:
            return pause(session, scene, reason=reason, expected_seq=seq).seq
        case _:
            return None


# ── how servers answer ──────────────────────────────────────────────────────────────────────────────────────────────


def traffic_in(text: str) -> Traffic:
    """How a server answered since it began, from what it shows at /metrics (serving/decider.py).

    What callers did wrong is no error, nor that nothing is live for a unit.
    """
    requests = errors = fallbacks = 0
    below: dict[float, int] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            n = int(sample.value)
            match sample.name:
                case "kaleidoscope_decisions_total":
                    requests += n
                    fallbacks += n if sample.labels.get("reason", "").startswith("fallback_") else 0
                case "kaleidoscope_decision_errors_total":
                    errors += n if sample.labels.get("code") not in NOT_OURS else 0
                case "kaleidoscope_decision_seconds_bucket":
                    bound = float(sample.labels["le"]) * 1000
                    below[bound] = below.get(bound, 0) + n
    bounds = sorted(below)
    apart = {bound: below[bound] - (below[bounds[i - 1]] if i else 0) for i, bound in enumerate(bounds)}
    return Traffic(requests + errors, errors, fallbacks, apart)


def scrape(url: str) -> Traffic:
    """`traffic_in` of what a server answers at a URL; raises InputError where it does not."""
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url}: give the http:// or https:// address of a server's /metrics.")
    try:
        with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_S) as answer:
            text = answer.read(MAX_SCRAPE).decode()
        return traffic_in(text)
    except (urllib.error.URLError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{url}: the server's metrics cannot be read: {error}. Is it its /metrics?") from None


def stage_traffic(
    path: Path, canary: Canary, urls: Sequence[str], *, read: Callable[[str], Traffic] = scrape
) -> Traffic | None:
    """How servers answered since the guard first saw this stage; None without servers.

    A server counts from its own beginning, so what it had counted by then is kept in the file at `path`. One that began
    anew since counts from its beginning. Raises InputError where a server does not answer.
    """
    if not urls:
        return None
    seen = {url: read(url) for url in urls}
    stage = {"candidate": canary.candidate, "stage": canary.stage}
    kept: dict[str, Traffic] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        raw = json.loads(path.read_text())
        if {name: raw[name] for name in stage} == stage:
            kept = {url: _counts(counts) for url, counts in raw["servers"].items()}
    before = {url: _before(kept.get(url), counts) for url, counts in seen.items()}
    plain = {url: asdict(counts) | {"latency_ms": list(counts.latency_ms.items())} for url, counts in before.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(stage | {"servers": plain}))
    unfinished.replace(path)
    first, *others = (_less(counts, before[url]) for url, counts in seen.items())
    return sum(others, start=first)


def _counts(raw: Mapping[str, Any]) -> Traffic:
    latency = {float(bound): int(n) for bound, n in raw["latency_ms"]}
    return Traffic(int(raw["requests"]), int(raw["errors"]), int(raw["fallbacks"]), latency)


def _before(kept: Traffic | None, seen: Traffic) -> Traffic:
    """What a server had counted when the stage was first seen: what it counts now, nothing if it began anew since."""
    if kept is None:
        return seen
    if min(_flat(_less(seen, kept))) < 0:
        return Traffic(0, 0, 0, {})
    return kept


def _less(seen: Traffic, before: Traffic) -> Traffic:
    latency = {bound: n - before.latency_ms.get(bound, 0) for bound, n in seen.latency_ms.items()}
    return Traffic(
        seen.requests - before.requests, seen.errors - before.errors, seen.fallbacks - before.fallbacks, latency
    )


def _flat(traffic: Traffic) -> list[int]:
    return [traffic.requests, traffic.errors, traffic.fallbacks, *traffic.latency_ms.values()]
