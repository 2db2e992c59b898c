"""The three doubts about a lift: what is planted is found, nothing is found where nothing is, and intervals cover."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from scipy.special import expit

from attribution.bucket_comparison import Exposures
from attribution.contrasts import mantel_haenszel
from attribution.effectiveness import Design, Direction, Effectiveness, Judgement, Measured, effectiveness
from attribution.lift_trends import nth
from attribution.variant_lifts import chosen_rows
from kaleidoscope.experiment import ArmSums, Cohort, lift
from kaleidoscope.log import Log, densify
from kaleidoscope.simulation import Exposures as Memory
from kaleidoscope.simulation import People, Population, example_variants, read_population
from tests.attribution.logs import TAGS, log_of

DAY_S = 86_400.0
START_S = 1_767_571_200.0  # a Monday
BUCKETS = ("control", "model", "random")
SHARES = {"control": 0.3, "model": 0.4, "random": 0.3}
DEMO = Path(__file__).parents[2] / "examples" / "demo_scene"
Floats = NDArray[np.float64]


def drawn(
    seed: int = 0,
    *,
    units: int = 4_000,
    visits: float = 5.0,
    tiring: float = 0.0,
    novelty: float = 0.0,
    main: tuple[float, ...] = (0.0,) * 6,
    taste: float = 0.0,
    shown: int = 4,
    imbalance: float = 0.0,
    products: float = 0.0,
    lost: float = 0.0,
    days: float = 14.0,
) -> Log:
    """A log of three buckets of units that differ and come back: control always shows variant `shown`, random any of
    the six, and the model what a unit likes best, with a tenth at random.

    `tiring`: of control, per exposure in the logit; `novelty`: of the others, at first; `taste`: women like variants 0
    and 1 by as much as men like 2 and 3; `imbalance`: more women in the model's bucket; `products`: more of product A
    there, which is clicked more; `lost`: share of the model's units that were lost.
    """
    rng = np.random.default_rng(seed)
    bucket_of = rng.choice(3, units, p=list(SHARES.values()))
    kept = (rng.random(units) >= lost) | (bucket_of != 1)
    unit = np.repeat(np.arange(units), rng.poisson(rng.gamma(1.5, visits / 1.5, units)) * kept)
    time = START_S + rng.random(len(unit)) * days * DAY_S
    order = np.lexsort((time, unit))
    unit, time, n = unit[order], time[order], len(unit)
    nth = np.arange(n) - np.searchsorted(unit, np.arange(units))[unit]
    woman = rng.random(units) < 0.5 + imbalance * (bucket_of == 1)
    likes = np.where(woman, 1, -1)[:, None] * np.array([1, 1, -1, -1, 0, 0]) * taste + np.array(main)
    bucket, best = bucket_of[unit], likes.argmax(axis=1)[unit]
    at_random = (bucket == 2) | ((bucket == 1) & (rng.random(n) < 0.1))
    variant = np.where(at_random, rng.integers(0, 6, n), np.where(bucket == 0, shown, best))
    propensity = np.select([bucket == 0, bucket == 2], [1.0, 1 / 6], np.where(variant == best, 0.9, 0.0) + 0.1 / 6)
    product = rng.random(n) < 0.5 + products * (bucket == 1)
    logit = -2 + likes[unit, variant] + rng.normal(0, 0.5, units)[unit] + 0.3 * product
    logit += 0.1 * np.sin(time / DAY_S * 2 * np.pi) - tiring * np.minimum(nth, 8) * (bucket == 0)
    logit += novelty * (bucket != 0) * np.exp(-(time - START_S) / DAY_S / 3)
    user = {"gender": np.where(woman, "f", "m")[unit].tolist(), "age": np.round(rng.normal(40, 10, units))[unit]}
    log = log_of(
        user, TAGS, variant, rng.random(n) < expit(logit), unit=densify(unit), propensity=propensity,
        bucket=np.array(BUCKETS)[bucket], product=np.where(product, "A", "B").tolist(),
        context={"place": np.array(list("abc"))[rng.integers(0, 3, n)].tolist()},
    )  # fmt: skip
    return replace(log, time=time)


def parts_in_truth(main: tuple[float, ...], taste: float, shown: int) -> tuple[float, float, float]:
    """The model's lift over control in the world above, what the best single variant brings of it, and the rest."""
    rng = np.random.default_rng(0)
    inner = -2 + rng.normal(0, 0.5, 50_000) + 0.3 * (rng.random(50_000) < 0.5)
    likes = np.array([1, 1, -1, -1, 0, 0]) * taste
    rate = np.array([[expit(inner + x).mean() for x in sign * likes + np.array(main)] for sign in (1, -1)])  # (2, 6)
    model = np.mean([0.9 * r.max() + 0.1 * r.mean() for r in rate])
    control, single = rate[:, shown].mean(), rate.mean(axis=0).max()
    return model / control - 1, single / control - 1, (model - single) / control


@cache
def plain() -> Effectiveness:
    return effectiveness(drawn(1), shares=SHARES)


def covers(found: Measured, truth: float) -> bool:
    return found.ci_low <= truth <= found.ci_high


# ── fatigue and novelty ─────────────────────────────────────────────────────────────────────────────────────────────


def test_control_that_people_tire_of_makes_the_lift_grow() -> None:
    found = effectiveness(drawn(2, tiring=0.1)).fatigue
    assert found.verdict is Judgement.SIGN
    of_random = next(t for t in found.trends if (t.bucket, t.over) == ("random", "exposures"))
    assert of_random.direction is Direction.GROWS and of_random.change.ci_low > 0
    assert [s.label for s in of_random.slices] == ["1", "2", "3-4", "5-8", "9+"]
    first, last = of_random.slices[0].lift, of_random.slices[-1].lift
    assert first is not None and last is not None and last.ci_low > first.value
    assert "grows" in found.reason and any("per doubling of exposures" in s for s in found.sentences)


def test_novelty_that_wears_off_makes_the_lift_shrink() -> None:
    found = effectiveness(drawn(3, novelty=1.0)).fatigue
    over_time = [t for t in found.trends if t.over == "time"]
    assert found.verdict is Judgement.SIGN and {t.bucket for t in over_time} == {"model", "random"}
    assert all(t.direction is Direction.SHRINKS and t.step == "day" for t in over_time)


def test_without_a_trend_none_is_seen_and_what_may_have_been_missed_is_said() -> None:
    found = plain().fatigue
    assert found.verdict is Judgement.NO_SIGN and len(found.trends) == 4
    assert all(t.clear and t.change.ci_low < 0 < t.change.ci_high for t in found.trends)
    assert all("may have been missed" in s for s in found.sentences)


def test_a_log_in_which_a_lift_might_have_doubled_unnoticed_says_nothing() -> None:
    found = effectiveness(drawn(4, units=500, visits=2.0)).fatigue
    assert found.verdict is Judgement.CANNOT_SAY and found.trends and not any(t.clear for t in found.trends)


def test_nth_exposures_are_counted_over_all_buckets_since_both_were_shown() -> None:
    log = drawn(5, units=300)
    exposures = Exposures.of(log, "control")
    window = exposures.window("random", "control")
    assert window is not None and log.time is not None and log.unit is not None
    place = nth(exposures, window)
    for u in (3, 50, 200):
        rows = np.flatnonzero((exposures.unit == u) & (log.time >= window.start))
        assert place[rows[np.argsort(log.time[rows])]].tolist() == list(range(1, len(rows) + 1))


def simulated(tires: float) -> Log:
    """Control and random, half of the users each, in the default world but for how much its users tire."""
    spec = read_population()
    fatigue = spec.fatigue.model_copy(update={"per_exposure": tires})
    world = Population(spec.model_copy(update={"base_ctr": 0.15, "fatigue": fatigue}), 0)
    scene, people = world.scene(example_variants(DEMO)), world.people(2_500)
    rng, memory = np.random.default_rng(1), Memory(scene, len(people))
    random_bucket = rng.random(len(people)) < 0.5
    middle = int(np.argsort(scene.variant_values(people.take(np.arange(500))))[len(scene.variants) // 2])
    found: list[tuple[Any, ...]] = []
    for visits in world.traffic(people, start=datetime(2026, 1, 5, tzinfo=UTC), days=14, batch=500, visits_per_day=1.0):
        variant = np.where(random_bucket[visits.unit], rng.integers(0, len(scene.variants), len(visits)), middle)
        recent = memory.seen(scene, visits.unit, visits.time_s)
        who: People = people.take(visits.unit)
        click = scene.respond(who, variant, rng, time_s=visits.time_s, recent=recent).click
        memory.add(scene, visits.unit, variant, visits.time_s)
        found.append((visits.unit, visits.time_s, variant, click))
    unit, time, variant, click = (np.concatenate(part) for part in zip(*found, strict=True))
    table = scene.tag_table()
    tags = {name: table[name].to_pylist() for name in table.column_names if name != "variant_id"}
    bucket = np.where(random_bucket, "random", "control")[unit]
    log = log_of({"age": people.values["age"][unit]}, tags, variant, click, unit=densify(unit), bucket=bucket)
    return replace(log, time=time)


@pytest.mark.parametrize(("tires", "says"), [(0.08, Judgement.SIGN), (0.0, Judgement.NO_SIGN)])
def test_users_of_the_default_world_who_tire_are_found_out(tires: float, says: Judgement) -> None:
    found = effectiveness(simulated(tires)).fatigue
    assert found.verdict is says
    assert all(t.direction is not Direction.SHRINKS for t in found.trends)


# ── something other than the UI ─────────────────────────────────────────────────────────────────────────────────────


def test_nothing_differs_where_only_chance_differs() -> None:
    found = plain().other_causes
    assert found.verdict is Judgement.NO_SIGN and found.sample_ratio is not None and not found.sample_ratio.flagged
    assert {b.feature for b in found.balance} == {"gender", "age", "place", "hour of the day (UTC)"}
    assert found.products is not None and found.products.held_fixed and not found.missing
    assert found.moved is not None and found.moved.units == 0 and found.moved.returned_share == 0
    assert {one.bucket: list(one.held_fixed) for one in found.lifts} == {
        "random": ["time", "time and product"],
        "model": ["time", "time and product"],
    }


def test_lost_units_are_a_sample_ratio_mismatch() -> None:
    found = effectiveness(drawn(6, lost=0.15), shares=SHARES).other_causes
    assert found.verdict is Judgement.SIGN and found.sample_ratio is not None and found.sample_ratio.flagged
    assert "as designed" in found.reason


def two_releases(seed: int, *, lost: float = 0.0) -> tuple[Cohort[str], ...]:
    """The first explores, the second compares; a share of the model's units is never seen."""
    rng, found = np.random.default_rng(seed), []
    for number, shares in (
        (1, {"control": 0.05, "random": 0.95}),
        (2, {"control": 0.15, "model": 0.75, "random": 0.1}),
    ):
        units = dict(zip(shares, rng.multinomial(20_000, list(shares.values())).tolist(), strict=True))
        if "model" in units:
            units["model"] -= int(rng.binomial(units["model"], lost))
        found.append(Cohort(f"release {number}", units, shares))
    return tuple(found)


def test_releases_of_different_shares_are_each_held_against_their_own() -> None:
    log, flagged, missed = drawn(1, units=500), 0, 0
    for seed in range(20):
        ratio = effectiveness(log, shares=two_releases(seed)).other_causes.sample_ratio
        assert ratio is not None and sum(ratio.units.values()) == 40_000
        assert ratio.expected == pytest.approx({"control": 4_000, "random": 21_000, "model": 15_000})
        flagged += ratio.flagged
        found = effectiveness(log, shares=two_releases(seed, lost=0.08)).other_causes
        missed += found.sample_ratio is None or not found.sample_ratio.flagged
    assert flagged <= 1 and missed <= 1
    assert "not fall into the buckets as designed, each of 2 releases by its own design: control " in found.sentences[0]
    assert found.sentences[1].startswith("Furthest from it is release 2: control ")
    text = json.loads(json.dumps(effectiveness(log, shares=two_releases(0)).to_json(), allow_nan=False))
    assert [one["name"] for one in text["other_causes"]["sample_ratio"]["cohorts"]] == ["release 1", "release 2"]


@pytest.mark.parametrize(
    ("shares", "says"),
    [
        (None, "`--shares control=.1,random=.2,model=.7`"),
        ((), "No release is known to have been seen by anybody"),
        ((Cohort("release 1", {}, SHARES),), "No release is known"),
        ((Cohort("release 1", {"random": 50}, {"random": 1.0}),), "one bucket was to get all units"),
    ],
)
def test_why_there_is_no_sample_ratio_is_said(shares: Design | None, says: str) -> None:
    found = effectiveness(drawn(1, units=500), shares=shares).other_causes
    assert found.sample_ratio is None and says in found.missing["sample_ratio"]
    assert found.missing["sample_ratio"] in found.sentences


def test_shares_of_a_log_without_units_are_not_asked_for_again() -> None:
    found = effectiveness(replace(drawn(1, units=500), unit=None), shares=SHARES).other_causes
    assert "Name the user's column in `unit`" in found.missing["sample_ratio"]


def test_an_imbalance_is_found_named_and_held_fixed() -> None:
    found = effectiveness(drawn(27, imbalance=0.1)).other_causes
    worst = found.balance[0]
    assert found.verdict is Judgement.SIGN and "gender" in found.reason
    assert (worst.feature, worst.bucket, worst.role) == ("gender", "model", "user")
    assert abs(worst.smd.value) > 0.1 and worst.p_adjusted is not None and worst.p_adjusted < 0.001
    assert all(b.p_adjusted is not None and b.p_adjusted > 0.05 for b in found.balance[1:])
    assert all("time, product and gender" in one.held_fixed for one in found.lifts)


def test_another_mix_of_products_is_found_and_the_lift_is_that_within_products() -> None:
    log = drawn(8, units=12_000, products=0.4)
    found = effectiveness(log).other_causes
    assert found.verdict is Judgement.SIGN and found.products is not None and not found.products.held_fixed
    assert found.products.shares["model"]["A"] == pytest.approx(0.9, abs=0.02)
    of_model = next(one for one in found.lifts if one.bucket == "model")
    assert of_model.crude.ci_low > 0 and covers(of_model.held_fixed["time and product"], 0.0)


def test_buckets_with_nothing_in_common_have_no_lift_within_products() -> None:
    log = drawn(9)
    assert log.bucket is not None
    found = effectiveness(replace(log, product=(log.bucket == 1).astype(np.int64), products=pa.array(["A", "B"])))
    assert found.other_causes.verdict is Judgement.SIGN
    assert any("model and control have nothing in common" in reason for reason in found.other_causes.missing.values())
    assert found.eye_catching.split is None and found.eye_catching.verdict is Judgement.CANNOT_SAY


def test_shares_that_change_leave_lifts_within_equal_times_and_hours_untested() -> None:
    log = drawn(10, units=8_000, novelty=0.0)
    assert log.time is not None and log.bucket is not None and log.unit is not None
    # Most of the model's users come only in the second half, when everybody clicks more.
    late = log.time > START_S + 7 * DAY_S
    more = np.random.default_rng(0).random(len(log)) < 0.1
    log = replace(log, reward=np.where(late & more, 1, log.reward).astype(np.float32))
    log = log.take((log.bucket != 1) | late | (log.unit % 5 == 0))
    found = effectiveness(log).other_causes
    assert found.split_p is not None and found.split_p < 0.001 and found.verdict is Judgement.NO_SIGN
    assert [b.p_adjusted for b in found.balance if b.role == "time"] == [None]
    of_model = next(one for one in found.lifts if one.bucket == "model")
    assert of_model.crude.ci_low > 0.1 and covers(of_model.held_fixed["time"], 0.0)


def test_units_that_go_to_and_fro_are_a_sign_and_units_that_move_once_are_not() -> None:
    log = drawn(11)
    assert log.bucket is not None and log.time is not None and log.unit is not None
    by_exposure = replace(log, bucket=np.random.default_rng(0).integers(0, 3, len(log)))
    found = effectiveness(by_exposure).other_causes
    assert found.verdict is Judgement.SIGN and "stay" in found.reason
    moving = (log.unit % 2 == 0) & (log.time > START_S + 7 * DAY_S) & (log.bucket == 2)
    once = effectiveness(replace(log, bucket=np.where(moving, 1, log.bucket))).other_causes
    assert once.moved is not None and once.moved.units > 100 and once.moved.returned_share == 0
    assert once.verdict is Judgement.NO_SIGN


# ── a few eye-catching variants ─────────────────────────────────────────────────────────────────────────────────────


def test_one_variant_that_everybody_likes_best_leaves_nothing_to_personalisation() -> None:
    main = (0.0, 0.0, 0.6, 0.0, 0.0, 0.0)
    found = effectiveness(drawn(12, main=main)).eye_catching
    assert found.verdict is Judgement.SIGN and found.split is not None
    lift_, single, rest = parts_in_truth(main, 0.0, 4)
    assert covers(found.split.lift, lift_) and covers(found.split.best_single, single)
    assert covers(found.split.personalisation, rest) and found.split.personalisation.ci_low < 0
    assert found.split.best_variant == "v2" and found.concentration is not None
    assert found.concentration.half_of_exposures == found.concentration.half_of_lift == 1


def test_opposite_tastes_leave_nothing_to_a_single_variant() -> None:
    found = effectiveness(drawn(13, taste=0.6)).eye_catching
    split, truth = found.split, parts_in_truth((0.0,) * 6, 0.6, 4)
    assert found.verdict is Judgement.NO_SIGN and split is not None and split.over == "control" and split.own_time
    assert all(
        covers(*pair) for pair in zip((split.lift, split.best_single, split.personalisation), truth, strict=True)
    )
    assert split.personalisation.ci_low > 0.1
    assert split.best_single.value + split.personalisation.value == pytest.approx(split.lift.value)
    assert found.targeting is not None and found.targeting.ci_low > 0.2
    often = [v for v in found.variants if v.share > 0.2]
    assert {v.variant_id for v in often} == {"v0", "v2"}
    assert all(v.lift is not None and v.lift.ci_low > 0 and v.q_value is not None and v.q_value < 0.05 for v in often)


def test_a_model_that_chooses_what_everybody_likes_does_not_click_better_where_it_chose() -> None:
    found = effectiveness(drawn(14, main=(0.0, 0.0, 0.6, 0.0, 0.0, 0.0))).eye_catching
    assert found.targeting is not None and covers(found.targeting, 0.0)


def test_without_a_sure_lift_nothing_is_explained() -> None:
    found = plain().eye_catching
    assert found.verdict is Judgement.CANNOT_SAY and "no sure lift" in found.reason and found.split is not None


def test_what_the_model_drew_at_random_does_not_count_as_chosen() -> None:
    log = drawn(15, taste=0.6)
    assert log.bucket is not None and log.propensity is not None
    exposures = Exposures.of(log, "control")
    chosen = chosen_rows(exposures)
    assert (log.bucket[chosen] == 1).all() and (log.propensity[chosen] > 0.5).all()
    assert len(chosen) == ((log.bucket == 1) & (log.propensity > 0.5)).sum()
    without = effectiveness(replace(log, propensity=None)).eye_catching
    assert "propensity" in without.missing and without.split is not None


def test_without_control_the_lift_over_random_is_split() -> None:
    log = drawn(13, taste=0.6)
    assert log.bucket is not None
    found = effectiveness(log.take(log.bucket != 0)).eye_catching
    assert found.split is not None and found.split.over == "random" and found.verdict is Judgement.NO_SIGN


def test_a_random_bucket_of_an_earlier_time_is_brought_to_the_models_time() -> None:
    log = drawn(16, units=12_000, taste=0.6)
    assert log.bucket is not None and log.time is not None
    # First random and control, then model and control; everybody clicks three times as much in the second half.
    late = log.time > START_S + 7 * DAY_S
    more = np.random.default_rng(0).random(len(log)) < 0.2
    log = replace(log, reward=np.where(late & more, 1, log.reward).astype(np.float32))
    log = log.take(np.where(log.bucket == 1, late, (log.bucket == 0) | ~late))
    split = effectiveness(log).eye_catching.split
    assert split is not None and not split.own_time and covers(split.best_single, parts_in_truth((0.0,) * 6, 0.6, 4)[1])


# ── what a log may lack ─────────────────────────────────────────────────────────────────────────────────────────────


def lacking(log: Log, what: str) -> Log:
    assert log.bucket is not None and log.time is not None
    return {
        "bucket": lambda: replace(log, bucket=None, buckets=None),
        "all but random": lambda: log.take(log.bucket == 2),
        "control": lambda: log.take(log.bucket != 0),
        "model": lambda: log.take(log.bucket != 1),
        "time": lambda: replace(log, time=None),
        "known times": lambda: replace(log, time=np.full(len(log), np.nan)),
        "unit": lambda: replace(log, unit=None),
        "products": lambda: replace(log, product=None, products=None),
        "clicks": lambda: replace(log, reward=np.zeros(len(log), np.float32)),
        "rows": lambda: log.take(np.arange(0)),
        "a name of some": lambda: replace(log, buckets=pa.array(["control", None, "random"])),
    }[what]()


@pytest.mark.parametrize(
    ("what", "verdicts"),
    [
        ("bucket", "???"), ("all but random", "???"), ("control", "?nn"), ("model", "nn?"), ("time", "?nn"),
        ("known times", "?nn"), ("unit", "nnn"), ("products", "nnn"), ("clicks", "?n?"),
        ("rows", "???"), ("a name of some", "nn?"),
    ],
)  # fmt: skip
def test_what_a_log_lacks_is_said_with_its_remedy(what: str, verdicts: str) -> None:
    found = effectiveness(lacking(drawn(13, taste=0.6), what))
    parts = (found.fatigue, found.other_causes, found.eye_catching)
    for part, expected in zip(parts, verdicts, strict=True):
        assert part.verdict is {"?": Judgement.CANNOT_SAY, "n": Judgement.NO_SIGN}[expected], part.reason
        assert part.reason.endswith(".") and all(reason.endswith(".") for reason in part.missing.values())
        if part.verdict is Judgement.CANNOT_SAY:
            assert part.missing and part.sentences
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["fatigue"]["verdict"] == found.fatigue.verdict.value


@pytest.mark.parametrize(
    ("column", "time", "says"),
    [
        (None, None, "The log has no times. Name the column of the time in `time`."),
        ("at", np.nan, "No time of column 'at' can be read as a moment. Write times like 2026-10-01T05:00:00Z"),
        ("at", 1.7e9, "All times of column 'at' are the same one."),
    ],
)
def test_why_there_are_no_times_is_said_once(column: str | None, time: float | None, says: str) -> None:
    log = drawn(13)
    schema = log.schema.model_copy(update={"time": column})
    times = None if time is None else np.full(len(log), time)
    found = effectiveness(replace(log, schema=schema, time=times))
    parts = (found.fatigue, found.other_causes, found.eye_catching)
    sentences = [sentence for part in parts for sentence in part.sentences]
    assert sum(says in sentence for sentence in sentences) == 1
    assert not any("at the same time." in sentence for sentence in found.eye_catching.sentences)
    assert sum("`time`" in sentence for sentence in sentences) == (column is None)
    without_control = effectiveness(replace(log, schema=schema, time=times), control="nobody")
    assert says in without_control.other_causes.missing["time"]  # where the first doubt has no word of it


def test_another_control_is_asked_for_where_buckets_have_names_of_their_own() -> None:
    log = drawn(13)
    own = replace(log, buckets=pa.array(["A", "model", "random"]))
    assert "name it: `--control NAME`" in effectiveness(own).fatigue.reason
    assert "--control" not in effectiveness(lacking(log, "control")).fatigue.reason
    assert effectiveness(own, control="A").fatigue.trends


def test_rows_of_several_exposures_have_no_nth_one() -> None:
    log = drawn(13)
    counted = replace(log, count=np.full(len(log), 2.0))
    found = effectiveness(counted).fatigue
    assert {t.over for t in found.trends} == {"time"} and "Log each exposure" in found.missing["random over exposures"]
    assert "unit" in effectiveness(replace(counted, unit=None)).fatigue.missing["random over exposures"]


def test_without_units_the_same_person_twice_is_not_taken_for_an_imbalance() -> None:
    found = effectiveness(replace(drawn(17, visits=20.0, units=1_000), unit=None)).other_causes
    assert found.balance and all(b.p_adjusted is None for b in found.balance) and found.verdict is Judgement.NO_SIGN
    assert "unit" in found.missing["units"]


def test_the_same_log_says_the_same_whatever_the_order_of_its_rows() -> None:
    log = drawn(18, units=1_500, taste=0.6)
    assert effectiveness(log).to_json() == effectiveness(log).to_json()
    shuffled = effectiveness(log.take(np.random.default_rng(0).permutation(len(log)))).eye_catching.split
    split = effectiveness(log).eye_catching.split
    assert split is not None and shuffled is not None
    assert shuffled.lift == split.lift


def test_the_ratio_in_one_stratum_is_the_lift_of_experiments() -> None:
    log = drawn(19)
    assert log.bucket is not None and log.unit is not None
    exposures = Exposures.of(log, "control")
    rows = exposures.rows("model", "control")
    arms, _ = exposures.arms(rows, np.zeros(len(rows), np.int64), "model")
    found = exposures.measured(mantel_haenszel(arms))
    sums = [
        ArmSums.of(np.bincount(log.unit[of], log.reward[of]), np.bincount(log.unit[of]))
        for of in (log.bucket == 1, log.bucket == 0)
    ]
    expected = lift(*sums)
    assert expected is not None and found is not None and found.value == pytest.approx(expected.lift)
    assert found.ci_high - found.ci_low == pytest.approx(expected.fixed.high - expected.fixed.low, rel=0.25)


# ── how often it is right ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_nothing_is_found_in_nearly_all_logs_in_which_nothing_is() -> None:
    found = [effectiveness(drawn(1_000 + seed, units=2_000), shares=SHARES) for seed in range(100)]
    signs = Counter(
        name
        for one in found
        for name in ("fatigue", "other_causes", "eye_catching")
        if getattr(one, name).verdict is Judgement.SIGN
    )
    assert max(signs.values(), default=0) / 100 <= 0.05 + 2 * (0.05 * 0.95 / 100) ** 0.5
    assert sum(signs.values()) > 0  # it can fire


@pytest.mark.slow
@pytest.mark.parametrize(
    ("main", "taste"),
    [
        ((0.0,) * 6, 0.0),
        ((0.0, 0.0, 0.5, 0.0, 0.0, 0.0), 0.0),
        ((0.0,) * 6, 0.5),
        ((0.0, 0.2, 0.3, 0.1, 0.25, 0.0), 0.3),
    ],
)
def test_the_intervals_of_the_split_cover(main: tuple[float, ...], taste: float) -> None:
    truth, hits, n = parts_in_truth(main, taste, 0), np.zeros(3), 60
    for seed in range(n):
        split = effectiveness(drawn(2_000 + seed, main=main, taste=taste, shown=0)).eye_catching.split
        assert split is not None
        parts = (split.lift, split.best_single, split.personalisation)
        hits += [covers(*pair) for pair in zip(parts, truth, strict=True)]
    assert (hits / n >= 0.95 - 3 * (0.05 * 0.95 / n) ** 0.5).all(), hits / n
