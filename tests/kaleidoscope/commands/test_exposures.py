"""A scene's exposures as they are read: who was seen in which release and bucket; and designed shares of a log."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import sqlalchemy as sa

from attribution.effectiveness import Ratio, effectiveness
from kaleidoscope.access import operator
from kaleidoscope.buckets import assign_many, gbhash_many
from kaleidoscope.commands.exposures import Exposures, designed_shares, read_exposures_of
from kaleidoscope.database import Database
from kaleidoscope.decision_record import DecisionRecord, Reason
from kaleidoscope.errors import InputError
from kaleidoscope.events import compact, record_decisions, shown_in
from kaleidoscope.experiment import srm
from kaleidoscope.log import Log
from kaleidoscope.release import ReleaseContent, SceneSnapshot, Shares, canonical
from kaleidoscope.settings import Settings
from kaleidoscope.tables import Event, Release, Scene
from kaleidoscope.vocabulary import Bucket
from tests.attribution.logs import TAGS, log_of
from tests.kaleidoscope.commands.acme import NOW, START, content_of, platform, variant_of

OLD, NEW = Shares(control=0.2, random=0.8), Shares(control=0.15, random=0.1, model=0.75)
STAGES = ((0, 0.0), (3, 0.2), (6, 1.0))  # from which day on how much of the traffic the second release has
PINNED = 0.4  # of the exposures in bucket model, which are therefore no use for learning


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Settings:
    return platform(tmp_path_factory.mktemp("acme"), sqlite_template)


def contents(scene: str) -> dict[int, ReleaseContent]:
    base = content_of("home")
    of = SceneSnapshot(id=scene, name=scene, product={"name": "card"}, slots=())
    two = base.model_copy(update={"scene": of, "shares": NEW, "model_version": "m1"})
    return {1: base.model_copy(update={"scene": of, "shares": OLD}), 2: two}


def furnish(settings: Settings, scene: str, *, units: int = 3_000, lost: Callable[[int, Bucket], float]) -> None:
    """A scene that two releases showed for nine days to units that come twice on average, as a server assigns them; of
    a release and bucket a share of the units is never heard of."""
    of = contents(scene)
    with Database(settings.database_url) as database, database.transaction(operator("ann", "acme")) as session:
        session.add(Scene(business_id="acme", id=scene, name=scene, spec={}, author="ann"))
        session.flush()
        for number, content in of.items():
            document = content.model_dump(mode="json")
            digest = hashlib.sha256(canonical(document)).hexdigest()
            session.add(
                Release(
                    business_id="acme", scene_id=scene, number=number, content=document, content_hash=digest,
                    author="ann",
                )
            )  # fmt: skip
    rng = np.random.default_rng(len(scene))
    names = [f"{scene}-user-{i}" for i in range(units)]
    bucket = {
        number: assign_many({b: getattr(c.shares, b) for b in Bucket}, f"acme/{scene}/bucket", names)
        for number, c in of.items()
    }
    canary = gbhash_many(f"acme/{scene}/canary", names)
    gone = {n: np.array([rng.random() < lost(n, b) for b in bucket[n]]) for n in of}
    records, rows = [], []
    for n, (unit, day) in enumerate(
        zip(rng.integers(0, units, 2 * units), np.sort(rng.random(2 * units) * 9), strict=True)
    ):
        share = next(share for begun, share in reversed(STAGES) if day >= begun)
        number = 2 if canary[unit] < share else 1  # every unit, in the end
        where = bucket[number][unit]
        if gone[number][unit]:
            continue
        learn = where == Bucket.RANDOM or (where == Bucket.MODEL and rng.random() > PINNED)
        reason = {Bucket.CONTROL: Reason.CONTROL, Bucket.RANDOM: Reason.EXPLORED, Bucket.MODEL: Reason.RANKED}[where]
        record = DecisionRecord(
            id=hashlib.blake2b(f"{scene}/{n}".encode(), digest_size=16).hexdigest(), business="acme", scene=scene,
            unit=names[unit], at=START + timedelta(days=float(day)), bucket=where,
            variant=variant_of("home", int(rng.integers(0, 12)) if where != Bucket.CONTROL else 0).id,
            propensity=1 / 12, learn=learn, reason=reason if learn or where == Bucket.CONTROL else Reason.PINNED,
            release=number, release_hash="r" * 64, model_version=None, candidates=12, features={"city": "Ulm"},
            key="k1",
        )  # fmt: skip
        records.append(record)
        kinds = ("exposure", "click") if rng.random() < 0.2 else ("exposure",)
        us = int(record.at.timestamp() * 1e6)
        rows += [
            {
                "business_id": "acme", "event_id": f"{record.id}-{kind}", "decision_id": record.id, "kind": kind,
                "at_us": us, "received_us": us, "value": None,
            }
            for kind in kinds
        ]  # fmt: skip
    with Database(settings.log_url) as database:
        record_decisions(database, records)
        with database.bulk() as connection:
            connection.execute(sa.insert(Event.__table__), rows)  # type: ignore[arg-type]


def read(settings: Settings, scene: str, folder: Path, since: datetime | None = None) -> Exposures:
    folder.mkdir(exist_ok=True)
    return read_exposures_of(settings, "acme", scene, folder, control=True, since=since)


def ratio_of(found: Exposures) -> Ratio:
    ratio = effectiveness(found.log, shares=found.cohorts).other_causes.sample_ratio
    assert ratio is not None
    return ratio


@pytest.mark.parametrize("seed", range(4))
def test_two_releases_with_a_canary_and_exposures_left_out_fall_as_designed(
    settings: Settings, tmp_path: Path, seed: int
) -> None:
    scene = "right" + "x" * seed
    furnish(settings, scene, lost=lambda release, bucket: 0.0)
    found = read(settings, scene, tmp_path)
    assert found.releases == (1, 2) and found.left_out["not_learn"] > 500
    assert [cohort.name for cohort in found.cohorts] == ["release 1", "release 2"]
    assert [dict(cohort.shares) for cohort in found.cohorts] == [
        {"control": 0.2, "random": 0.8}, {"control": 0.15, "random": 0.1, "model": 0.75},
    ]  # fmt: skip
    ratio = ratio_of(found)
    assert not ratio.flagged and ratio.p_value > 0.001
    # By the log alone, from which what was pinned is missing, or by the newest design, it would be a mismatch.
    whole = srm(ratio.units, {b: getattr(NEW, b) for b in Bucket}, sequential=False)
    assert whole is not None and whole.flagged
    alone = effectiveness(found.log, shares={"control": 0.15, "random": 0.1, "model": 0.75}).other_causes.sample_ratio
    assert alone is not None and alone.flagged


@pytest.mark.parametrize("seed", range(4))
def test_units_that_one_bucket_of_one_release_loses_are_found(settings: Settings, tmp_path: Path, seed: int) -> None:
    scene = "wrong" + "x" * seed
    furnish(settings, scene, lost=lambda release, bucket: 0.25 * (release == 2 and bucket == Bucket.MODEL))
    ratio = ratio_of(read(settings, scene, tmp_path))
    assert ratio.flagged and ratio.units["model"] < ratio.expected["model"]


def test_who_was_seen_before_the_period_is_not_new_in_it_and_compacted_days_count(
    settings: Settings, tmp_path: Path
) -> None:
    furnish(settings, "late", lost=lambda release, bucket: 0.0)
    all_of_it = read(settings, "late", tmp_path / "whole")
    since = START + timedelta(days=7)
    late = read(settings, "late", tmp_path / "late", since=since)
    (cohort,) = late.cohorts
    assert late.releases == (2,) and cohort.new is not None
    assert sum(cohort.units.values()) > 1.5 * sum(cohort.new.values()) > 0
    assert not ratio_of(late).flagged
    with Database(settings.log_url) as database:
        done = compact(
            database, settings.log_dir, business="acme", now=NOW, describe=lambda _, n: shown_in(contents("late")[n])
        )
    assert done.days
    again = read(settings, "late", tmp_path / "again")
    assert again.cohorts == all_of_it.cohorts and again.releases == (1, 2) and again.taxonomy == 1


# ── a log's ──


def log_with(buckets: list[str]) -> Log:
    return log_of({}, TAGS, np.zeros(len(buckets), np.int64), np.zeros(len(buckets)), bucket=np.array(buckets))


def test_shares_are_read_and_thirds_are_near_enough() -> None:
    log = log_with(["control", "model", "model", "random"])
    assert designed_shares("control=.1, random=.2,model=0.7", log) == {"control": 0.1, "random": 0.2, "model": 0.7}
    assert designed_shares("control=.333,random=.333,model=.333", log)["model"] == 0.333


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("control=.1,random=.2,model=.6", "they sum to 0.9, not to 1"),
        ("control=10,random=20,model=70", "they sum to 100"),
        ("control=.1,random=.2,modle=.7", "the log has no bucket 'modle'. It has control, model, random."),
        ("control=.3,random=.7", "model of the log has none"),
        ("control=0,random=.3,model=.7", "control=0 is none"),
        ("control=.1,control=.1,random=.1,model=.7", "'control' is there twice"),
        ("control", "'control' is no share. Write them like control=.1"),
        ("control=x,random=.2,model=.7", "'control=x' is no share"),
        ("control=nan,random=.2,model=.7", "'control=nan' is no share"),
        ("", "'' is no share"),
    ],
)  # fmt: skip
def test_shares_that_cannot_be_are_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match="--shares: ") as error:
        designed_shares(text, log_with(["control", "model", "random"]))
    assert says in str(error.value)


def test_shares_of_a_log_without_buckets_are_refused() -> None:
    log = log_with(["random", "control"])
    for without in (None, pa.array([None, None], pa.string())):
        with pytest.raises(InputError, match="Name the column in `bucket`"):
            designed_shares("random=1", replace_buckets(log, without))


def replace_buckets(log: Log, names: pa.Array | None) -> Log:
    from dataclasses import replace

    return replace(log, buckets=names) if names is not None else replace(log, bucket=None, buckets=None)
