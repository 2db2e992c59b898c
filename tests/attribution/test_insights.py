"""Insights against what is true: planted worlds, null worlds, intervals given the selection, real logs."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from attribution.coding import Coded, code
from attribution.insights import (
    Attribution,
    Candidate,
    Insight,
    attribute,
    attribute_coded,
    confirm,
    halves,
    without_noise,
)
from attribution.preference import preferences
from kaleidoscope.simulation import Population, example_variants, read_population
from kaleidoscope.wording import ends_of
from tests.attribution.logs import TAGS, liking, log_of

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "attribution.py"
DEMO = Path(__file__).parents[2] / "examples" / "demo_scene"


def pairs(result: Attribution) -> list[tuple[dict[str, str], dict[str, str]]]:
    return [(dict(i.segment), dict(i.tag)) for i in result.insights]


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
        "importance", "crossed", "clicks", "ctr",
    }  # fmt: skip
    assert insight["ctr"] == pytest.approx(insight["clicks"] / insight["n"])
    assert all(set(pair) == {"segment", "tag"} for pair in insight["explained_by"])
    assert isinstance(insight["n"], int)
    main = json.loads(json.dumps(result.main_effects[0].to_json(), allow_nan=False))
    assert main.keys() == {"tag", "effect", "ci_low", "ci_high", "q_value", "n"}


def said(label: str, effect: float, low: float, high: float, q: float, **tag: str) -> str:
    tags = tag or {"button_colour": "red"}
    return Insight({"age": label}, tags, effect, None, ci_low=low, ci_high=high, q_value=q, n=900).sentence


def test_the_effect_is_what_a_tag_does_to_these_users_odds_over_what_it_does_to_other_users() -> None:
    log, _ = liking(60_000, 3, 0.8)
    (found,) = attribute(log).insights
    assert (dict(found.segment), dict(found.tag)) == ({"gender": "f"}, {"tone": "loud"})
    women = np.array(log.columns["gender"].to_pylist()) == "f"
    loud = np.array([v == ["loud"] for v in log.variants["tone"].to_pylist()])[log.variant]

    def odds(rows: Any) -> float:
        rate = float(log.reward[rows].mean())
        return rate / (1 - rate)

    without_it, with_others = odds(women & ~loud), odds(~women & loud) / odds(~women & ~loud)
    assert 1 + found.effect == pytest.approx(odds(women & loud) / (without_it * with_others), rel=0.05)


def test_an_insight_is_a_sentence_that_is_no_stronger_than_its_interval() -> None:
    assert said("thirties", 0.344, 0.196, 0.4949, 0.0012) == (
        "Users with age=thirties: the odds of a click on button_colour=red are 34 % higher than expected from"
        " their odds without it and what it does for other users (a difference from other users, not a lift; beside the"
        " other insights; 95 % interval 20 % to 49 %, q = 0.0012)."
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


def test_values_that_work_together_are_not_called_never_shown_apart() -> None:
    apart = Insight({"age": "x"}, {"tone": "loud", "sign": "!"}, 1.5, None, 1, 2, 0.01, 9)
    assert "never shown apart" in apart.sentence
    assert "never shown apart" not in replace(apart, crossed=True).sentence


# ── discovered elsewhere ──


def test_halves_part_the_units_and_are_always_the_same() -> None:
    coded = code(liking(4_000, 0, 0.8, rows_per_unit=4)[0], dependent=False)
    row = np.arange(len(coded))
    (a, b), (c, _) = (halves(replace(coded, reward=row.astype(float))) for _ in range(2))
    assert coded.unit is not None
    ours, theirs = (set(coded.unit[h.reward.astype(int)].tolist()) for h in (a, b))
    assert not ours & theirs
    assert len(ours) == len(theirs) == 500
    assert sorted([*a.reward, *b.reward]) == row.tolist()
    assert (a.reward == c.reward).all()


def test_halves_split_a_row_of_many_exposures() -> None:
    n = 60
    many = log_of({}, TAGS, np.arange(n) % 6, np.arange(n) % 2, count=np.full(n, 100.0))
    a, b = halves(code(many))
    assert a.count.sum() + b.count.sum() == 100 * n
    assert 40 * n < a.count.sum() < 60 * n
    assert a.count.tolist() != b.count.tolist()


def candidates_of(coded: Coded, *wanted: tuple[str, str, str]) -> list[Candidate]:
    segments = {(s.field, s.label): s for f in coded.fields for s in f.segments}
    tags = {value: t for t, tag in enumerate(coded.tags) for _, value in tag.parts}
    return [Candidate(segments[field, label], tags[value], 0.25) for field, label, value in wanted]


def test_what_was_discovered_elsewhere_is_confirmed_by_its_own_numbers() -> None:
    coded = halves(code(liking(60_000, 0, 0.8)[0], dependent=False))[1]
    found = confirm(coded, candidates_of(coded, ("gender", "f", "loud"), ("city", "a", "calm")), "other")
    assert pairs(found) == [({"gender": "f"}, {"tone": "loud"})]
    insight, alone = found.insights[0], attribute_coded(coded).insights[0]
    assert insight.methods == ("other",)
    assert insight.importance == {"other": 0.25} == insight.to_json()["importance"]
    assert insight.effect == pytest.approx(alone.effect, rel=0.02)
    assert insight.q_value < alone.q_value  # fewer were looked at
    assert insight.preference == alone.preference
    assert len(found.diagnostics.examined.segments) == 2
    assert (insight.n, len(found.main_effects)) == (alone.n, 5)


def test_what_is_not_there_is_not_confirmed() -> None:
    coded = code(liking(20_000, 0, 0.8)[0], dependent=False)
    found = confirm(coded, candidates_of(coded, ("city", "a", "calm"), ("city", "b", "flat")), "other")
    assert found.insights == []
    assert len(found.diagnostics.examined.segments) == 2
    nothing = confirm(coded, (), "other")
    assert nothing.insights == []
    assert nothing.main_effects


# ── many worlds ──


def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


def test_one_world_of_the_benchmark() -> None:
    found = benchmark()["measure"](0, 4, 60_000, ("statistics", "preference"))
    for figures in found.values():
        assert figures["found"] and all(entry["true"] for entry in figures["found"])
        assert len(figures["recalled"]) == len(figures["strong"]) > 0
        assert figures["covered"] / figures["coverable"] > 0.85  # cells of one world go together


def test_a_model_bucket_says_what_its_random_twin_says_with_intervals_of_its_effective_size() -> None:
    """All examined cells of a small world; of 216 variants 10 % of exposures are by chance."""
    found = benchmark()["compare_twins"](3, 2, 60_000)
    assert found["effective_share"] == pytest.approx(0.1, abs=0.03)
    assert found["width"] == pytest.approx(found["implied"], rel=0.15)
    assert found["covered"] / found["coverable"] > 0.88
    assert found["coverable"] > 100
    assert found["same_sign"] == found["signed"] > 0
    assert found["false"] == 0


@pytest.mark.slow
def test_twenty_worlds_and_a_hundred_null_worlds() -> None:
    """Of every method, and of what they agree on."""
    measure, agreed, methods = (benchmark()[name] for name in ("measure", "agreed", "VOICES"))

    def all_of(*world: int) -> dict[str, dict[str, Any]]:
        found = measure(*world, methods)
        return found | {"consensus": agreed(found)}

    worlds = [all_of(seed, 6, 200_000) for seed in range(20)]
    nulls = [all_of(1_000 + seed, 0, 50_000) for seed in range(100)]
    for method in (*methods, "consensus"):
        of = [world[method] for world in worlds]
        strong, recalled = (sum(len(f[key]) for f in of) for key in ("strong", "recalled"))
        assert recalled >= 0.9 * strong > 0
        false = [sum(not entry["true"] for entry in f["found"]) / max(len(f["found"]), 1) for f in of]
        assert np.mean(false) <= 0.05
        covered, coverable = (sum(f[key] for f in of) for key in ("covered", "coverable"))
        assert coverable == 0 if method == "consensus" else 0.93 <= covered / coverable <= 0.97
        something = np.mean([bool(world[method]["found"]) for world in nulls])
        assert something <= 0.05 + 2 * (0.05 * 0.95 / 100) ** 0.5


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
    coded = benchmark()["coupons"](data_dir)
    found = {(i.segment.get("Bar"), i.tag.get("coupon")): i for i in attribute_coded(coded).insights}
    assert found["never", "Bar"].ci_high < -0.5
    assert (found["never", "Bar"].preference or 1) < 0.7
    accepted = {cell.segment["Bar"]: cell.ctr for cell in preferences(coded).cells
                if "Bar" in cell.segment and cell.tag == {"coupon": "Bar"}}  # fmt: skip
    assert accepted["never"] == pytest.approx(0.19, abs=0.01)
    assert accepted["4~8"] == pytest.approx(0.78, abs=0.01)


def test_hillstrom_past_buyers_of_womens_goods_alone_respond_to_the_womens_mail(data_dir: Path) -> None:
    result = attribute_coded(benchmark()["mails"](data_dir))
    found = {(*i.segment.items(), *i.tag.items()): i for i in result.insights}
    womens_only = found[("mens", "[-inf, 1)"), ("segment", "Womens E-Mail")]
    assert womens_only.ci_low > 0
    assert (womens_only.preference or 0) > 1.05


def test_upworthy_questions_cost_clicks_and_digits_bring_them(data_dir: Path) -> None:
    result = attribute_coded(benchmark()["headlines"](data_dir))
    found = {tuple(m.tag.items()): m for m in result.main_effects}
    question, digits, you = (found[((tag, "yes"),)] for tag in ("question", "digits", "you"))
    assert question.effect == pytest.approx(-0.100, abs=0.002)
    assert digits.effect == pytest.approx(0.063, abs=0.002)
    assert question.ci_high < 0 < digits.ci_low
    assert -0.03 < you.ci_low < you.effect < 0  # little, if anything
