"""Insights against what is true: planted worlds, null worlds, intervals given the selection, real logs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import expit

from attribution.coding import code
from attribution.insights import (
    Attribution,
    Insight,
    attribute,
    benjamini_hochberg,
    conditional_interval,
    ends_of,
    without_noise,
)
from kaleidoscope.log import read_log
from kaleidoscope.log_schema import LogSchema
from kaleidoscope.simulation import Population, example_variants, read_population
from tests.attribution.logs import TAGS, liking, log_of

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "attribution.py"
DEMO = Path(__file__).parents[2] / "examples" / "demo_scene"


def pairs(result: Attribution) -> list[tuple[dict[str, str], dict[str, str]]]:
    return [(dict(i.segment), dict(i.tag)) for i in result.insights]


# ── intervals ──


@pytest.mark.parametrize("mean", [0.0, 1.5, 3.0, 4.5])
def test_intervals_hold_given_the_selection(mean: float) -> None:
    z = np.random.default_rng(1).normal(mean, 1, 60_000)
    for selected in (np.abs(z) >= 3, np.abs(z) < 3):
        some = z[selected][:1_000]
        if len(some) < 100:
            continue
        held = [low <= mean <= high for low, high in (conditional_interval(float(x), 3.0) for x in some)]
        assert np.mean(held) == pytest.approx(0.95, abs=4 * (0.95 * 0.05 / len(some)) ** 0.5)


def test_far_from_the_threshold_the_interval_is_the_usual_one() -> None:
    reach = stats.norm.isf(0.025)
    assert conditional_interval(12.0, 3.0) == pytest.approx((12 - reach, 12 + reach), abs=1e-6)
    assert conditional_interval(-1.0, np.inf) == pytest.approx((-1 - reach, -1 + reach))
    near = conditional_interval(3.6, 3.0)
    assert near[0] < 3.6 - reach and near[1] < 3.6 + reach
    assert conditional_interval(-3.6, 3.0) == pytest.approx((-near[1], -near[0]), abs=1e-4)


def test_benjamini_hochberg_is_that_of_scipy() -> None:
    p = np.random.default_rng(0).uniform(0, 0.2, 50)
    assert benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p))


# ── planted ──


def test_a_planted_preference_is_found_once_with_its_size() -> None:
    log, p = liking(30_000, 0, 0.8)
    result = attribute(log, dependent=False)
    assert pairs(result) == [({"gender": "f"}, {"tone": "loud"})]
    insight = result.insights[0]
    assert insight.effect == pytest.approx(np.expm1(0.8), abs=0.35)
    assert insight.ci_low < np.expm1(0.8) < insight.ci_high
    assert insight.preference is not None and insight.preference > 1.1
    assert insight.q_value < 1e-6
    assert insight.methods == ("statistics",)
    explained = [(dict(pair.segment), dict(pair.tag)) for pair in insight.explained_by]
    assert ({"gender": "m"}, {"tone": "loud"}) in explained  # its mirror is no second finding
    alone, joint = without_noise(code(log, dependent=False), p, result.diagnostics)
    assert joint == pytest.approx([0.8], abs=0.02)
    assert np.nanmax(np.abs(alone)) == pytest.approx(0.8, abs=0.05)


def test_the_group_that_likes_it_is_named_not_the_one_that_does_not() -> None:
    result = attribute(liking(30_000, 0, -0.8)[0], dependent=False)
    assert pairs(result) == [({"gender": "m"}, {"tone": "loud"})]
    assert result.insights[0].effect > 0


def test_a_correlated_field_is_explained_by_the_one_that_matters() -> None:
    rng = np.random.default_rng(5)
    log, _ = liking(40_000, 3, 0.9)
    gender = np.array(log.columns["gender"].to_pylist())
    shoes = np.where(rng.random(len(log)) < 0.85, gender, np.where(gender == "f", "m", "f"))
    more = {"gender": gender.tolist(), "shoes": shoes.tolist()}
    result = attribute(log_of(more, TAGS, log.variant, log.reward, unit=log.unit), dependent=False)
    assert {field for segment, _ in pairs(result) for field in segment} == {"gender"}
    assert any("shoes" in pair.segment for i in result.insights for pair in i.explained_by)


def test_tags_that_never_vary_apart_are_one_insight() -> None:
    log, _ = liking(30_000, 0, 0.8)
    variants = {**TAGS, "punctuation": [["!"] if t == ["loud"] else ["."] for t in TAGS["tone"]]}
    gender = {"gender": log.columns["gender"].to_pylist()}
    result = attribute(log_of(gender, variants, log.variant, log.reward, unit=log.unit), dependent=False)
    assert pairs(result) == [({"gender": "f"}, {"tone": "loud", "punctuation": "!"})]


def test_the_order_of_rows_does_not_matter() -> None:
    log, _ = liking(20_000, 1, 0.9)
    shuffled = log.take(np.random.default_rng(0).permutation(len(log)))
    a, b = attribute(log, dependent=False), attribute(shuffled, dependent=False)
    assert pairs(a) == pairs(b) != []
    assert a.insights[0].effect == pytest.approx(b.insights[0].effect, rel=1e-6)


def test_rows_of_a_unit_do_not_pass_for_evidence() -> None:
    """Every unit keeps one variant for eight exposures: fewer units than rows, and tastes that units share."""
    found = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        unit = np.repeat(np.arange(600), 8)
        variant = rng.integers(0, 6, 600)[unit]
        x = {f"x{i}": rng.choice(["a", "b"], 600)[unit].tolist() for i in range(3)}
        taste = rng.beta(0.4, 0.8, 600)[unit]
        log = log_of(x, TAGS, variant, rng.random(len(unit)) < taste, unit=unit)
        found += bool(attribute(log, dependent=False).insights)
    assert found <= 6  # 5 % of 40, + 3 standard errors


def test_a_log_that_looked_at_the_user_gives_the_same_signs_with_wider_intervals() -> None:
    rng = np.random.default_rng(9)
    log, _ = liking(60_000, 2, 0.9)
    woman = np.array(log.columns["gender"].to_pylist()) == "f"
    best, epsilon = np.where(woman, 2, 0), 0.4
    variant = np.where(rng.random(len(log)) < epsilon, rng.integers(0, 6, len(log)), best)
    propensity = epsilon / 6 + (1 - epsilon) * (variant == best)
    logit = -2 + 0.2 * np.isin(variant, (2, 3)) + 0.9 * woman * np.isin(variant, (2, 3))
    reward = rng.random(len(log)) < 1 / (1 + np.exp(-logit))
    user = {"gender": np.where(woman, "f", "m").tolist()}
    chosen = attribute(log_of(user, TAGS, variant, reward, propensity=propensity, unit=log.unit))
    uniform = attribute(log_of(user, TAGS, log.variant, log.reward, unit=log.unit), dependent=False)
    assert ({"gender": "f"}, {"tone": "loud"}) in pairs(chosen) and pairs(uniform) == [pairs(chosen)[0]]
    a, b = chosen.insights[0], uniform.insights[0]
    assert a.ci_low < np.expm1(0.9) < a.ci_high
    assert chosen.diagnostics.effective_share < 0.8
    assert chosen.diagnostics.se[0] > uniform.diagnostics.se[0]
    assert b.effect > 0 < a.effect


def test_null_worlds_are_mostly_left_alone() -> None:
    found = sum(bool(attribute(liking(3_000, 100 + s, 0.0, noise=2)[0], dependent=False).insights) for s in range(40))
    assert found <= 6  # 5 % of 40, + 3 standard errors


def test_too_little_is_not_looked_at_and_said_so() -> None:
    log, _ = liking(300, 0, 0.0)
    result = attribute(log, dependent=False)
    assert result.insights == []
    assert result.diagnostics.too_few > 0


def test_a_log_without_users_has_main_effects_only() -> None:
    rng = np.random.default_rng(0)
    variant = rng.integers(0, 6, 20_000)
    reward = rng.random(20_000) < np.where(np.isin(variant, (2, 3)), 0.3, 0.2)
    result = attribute(log_of({}, TAGS, variant, reward))
    assert result.insights == []
    loud = next(m for m in result.main_effects if m.tag == {"tone": "loud"})
    assert loud.ci_low < 0.5 < loud.ci_high


def test_results_are_json_of_the_contract() -> None:
    result = attribute(liking(30_000, 0, 0.8)[0], dependent=False)
    insight = json.loads(json.dumps(result.insights[0].to_json(), allow_nan=False))
    assert insight.keys() == {
        "segment", "tag", "effect", "preference", "ci_low", "ci_high", "q_value", "n", "methods", "explained_by",
    }  # fmt: skip
    assert all(set(pair) == {"segment", "tag"} for pair in insight["explained_by"])
    assert isinstance(insight["n"], int)
    main = json.loads(json.dumps(result.main_effects[0].to_json(), allow_nan=False))
    assert main.keys() == {"tag", "effect", "ci_low", "ci_high", "q_value", "n"}


def said(label: str, effect: float, low: float, high: float, q: float, **tag: str) -> str:
    tags = tag or {"button_colour": "red"}
    return Insight({"age": label}, tags, effect, None, ci_low=low, ci_high=high, q_value=q, n=900).sentence


def test_an_insight_is_a_sentence_that_is_no_stronger_than_its_interval() -> None:
    assert said("thirties", 0.344, 0.196, 0.4949, 0.0012) == (
        "Users with age=thirties: the odds of a click on button_colour=red are 34 % higher than these users and this"
        " tag would have by themselves (beside the other insights; 95 % interval 20 % to 49 %, q = 0.0012)."
    )
    lower = said("missing", -0.26, -0.4, -0.071, 1e-9)
    assert (
        "age=missing: " in lower and "are 26 % lower than" in lower and "; 95 % interval 7.1 % to 40 %, q < 0" in lower
    )
    open_ = said("[-inf, 33)", 0.2, -0.031, 0.5, 0.04)
    assert "95 % interval 3.1 % lower to 50 % higher, q = 0.04: how much is hardly known)" in open_
    assert "tone=loud and sign=! (never shown apart) are" in said("x", 1.5, 1, 2, 0.01, tone="loud", sign="!")


def test_segments_of_numbers_are_said_in_words() -> None:
    assert ends_of("[-inf, 33)") == (-np.inf, 33) and ends_of("[-2.5, 1e+06)") == (-2.5, 1e6)
    assert ends_of("missing") is ends_of("[a, b)") is None
    starts = [said(label, 0.2, 0.1, 0.3, 0.01).split(":")[0] for label in ("[-inf, 33)", "[33, 45.5)", "[1e+06, inf)")]
    assert starts == ["Users with age below 33", "Users with age from 33 to below 45.5", "Users with age from 1e+06"]


# ── many worlds ──


def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


def test_one_world_of_the_benchmark() -> None:
    found = benchmark()["measure"](0, 4, 60_000)
    assert found["false"] == 0
    assert found["recalled"] == found["strong"] > 0
    assert found["covered"] / found["coverable"] > 0.85  # cells of one world go together


@pytest.mark.slow
def test_twenty_worlds_and_a_hundred_null_worlds() -> None:
    measure = benchmark()["measure"]
    worlds = [measure(seed, 6, 200_000) for seed in range(20)]
    total = {key: sum(f[key] for f in worlds) for key in worlds[0]}
    assert total["recalled"] >= 0.9 * total["strong"] > 0
    assert np.mean([f["false"] / max(f["insights"], 1) for f in worlds]) <= 0.05
    assert 0.93 <= total["covered"] / total["coverable"] <= 0.97
    nulls = [measure(1_000 + seed, 0, 50_000)["insights"] > 0 for seed in range(100)]
    assert np.mean(nulls) <= 0.05 + 2 * (0.05 * 0.95 / 100) ** 0.5


@pytest.mark.slow
def test_the_six_published_findings_of_the_default_world_are_recovered() -> None:
    """Three exposures per user on average, at random, of the demo's scene."""
    rng, rows = np.random.default_rng(0), 200_000
    world, shown = Population(read_population(), 0), example_variants(DEMO)
    people = world.people(rows // 3)
    unit, variant = rng.integers(0, len(people), rows), rng.integers(0, len(shown), rows)
    seen = people.take(unit)
    p = expit(world.scene(shown).click_logit_of(seen, variant))
    user: dict[str, Any] = {}
    for feature in world.spec.features:
        values, known = seen.values[feature.name], seen.known[feature.name]
        choices = np.array(feature.choices or ("",), dtype=object)
        told = values if feature.quantiles is not None else choices[values.astype(int)]
        user[feature.name] = [v if k else None for v, k in zip(told.tolist(), known, strict=True)]
    dimensions = list(dict.fromkeys(d for v in shown for d in v.tags))
    variants = {d: [v.tags.get(d, ()) for v in shown] for d in dimensions}
    units = np.unique(unit, return_inverse=True)[1]
    result = attribute(log_of(user, variants, variant, rng.random(rows) < p, unit=units), dependent=False)
    truth = world.planted_pairs()
    assert all(any((f, d) in truth for f in i.segment for d in i.tag) for i in result.insights)
    likes = {
        (f, s, *tag) for i in result.insights if i.effect > 0 for f, s in i.segment.items() for tag in i.tag.items()
    }
    shuns = {
        (f, s, *tag) for i in result.insights if i.effect < 0 for f, s in i.segment.items() for tag in i.tag.items()
    }

    def numbers(found: set[tuple[str, str, str, str]], field: str, dimension: str, value: str) -> list[str]:
        return [s for f, s, d, v in found if (f, d, v) == (field, dimension, value)]

    assert any(s.startswith("[-inf") for s in numbers(likes, "income", "headline", "product_name"))
    assert any(s.startswith("[-inf") for s in numbers(likes, "age", "button_colour", "blue"))
    assert any(s.endswith("inf)") for s in numbers(shuns, "age", "button_colour", "blue"))
    assert {("occupation", "white_collar", "subject", "gold"), ("investor", "beginner", "subject", "gold")} <= likes
    assert ("credit_card", "none", "yield", "since_launch") in likes
    assert numbers(likes, "age", "urgency", "industry_trend")
    assert any(s.endswith("inf)") for s in numbers(likes, "age", "density", "dense"))


# ── real logs ──


def test_coupon_bar_visits_matter_for_the_bar_coupon(data_dir: Path) -> None:
    profile = (
        "gender", "age", "maritalStatus", "has_children", "education", "occupation", "income", "Bar", "CoffeeHouse",
        "CarryAway", "RestaurantLessThan20", "Restaurant20To50",
    )  # fmt: skip
    schema = LogSchema(
        label="Y", unit=(*profile, "car"), context=("destination", "time"), user=profile,
        variant=("coupon", "expiration"),
    )  # fmt: skip
    result = attribute(read_log(data_dir / "coupon" / "coupons_uci.csv", schema))
    found = {(i.segment.get("Bar"), i.tag.get("coupon")): i for i in result.insights}
    assert found["never", "Bar"].ci_high < -0.5
    assert (found["never", "Bar"].preference or 1) < 0.7


def test_hillstrom_past_buyers_of_womens_goods_alone_respond_to_the_womens_mail(data_dir: Path) -> None:
    user = ("recency", "history", "mens", "womens", "zip_code", "newbie", "channel")
    schema = LogSchema(label="visit", user=user, variant=("segment",), arms="uniform")
    result = attribute(read_log(data_dir / "hillstrom" / "hillstrom.csv", schema))
    found = {(*i.segment.items(), *i.tag.items()): i for i in result.insights}
    womens_only = found[("mens", "[-inf, 1)"), ("segment", "Womens E-Mail")]
    assert womens_only.ci_low > 0
    assert (womens_only.preference or 0) > 1.05


def test_upworthy_questions_cost_clicks_and_digits_bring_them(data_dir: Path, tmp_path: Path) -> None:
    tests = pd.read_parquet(data_dir / "upworthy" / "upworthy.parquet")
    tests = tests[~tests.bad_randomisation_window.astype(bool)]
    headline = tests.headline.fillna("")
    tests = tests.assign(
        question=np.where(headline.str.contains("?", regex=False), "yes", "no"),
        digits=np.where(headline.str.contains(r"\d"), "yes", "no"),
    )
    tests.to_parquet(tmp_path / "tests.parquet")
    schema = LogSchema(
        clicks="clicks", impressions="impressions", group="clickability_test_id", variant=("question", "digits")
    )
    result = attribute(read_log(tmp_path / "tests.parquet", schema))
    found = {tuple(m.tag.items()): m for m in result.main_effects}
    question, digits = found[(("question", "yes"),)], found[(("digits", "yes"),)]
    assert question.effect == pytest.approx(-0.100, abs=0.002)
    assert digits.effect == pytest.approx(0.063, abs=0.002)
    assert question.ci_high < 0 < digits.ci_low
