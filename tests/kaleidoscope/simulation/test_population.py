"""The default world says what its spec says, and its people click accordingly, on the scene that the demo shows."""

from __future__ import annotations

import re
import runpy
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy.special import expit

from kaleidoscope.access import operator
from kaleidoscope.businesses import create_business
from kaleidoscope.database import Database
from kaleidoscope.interventions import describe_variants
from kaleidoscope.log import read_log
from kaleidoscope.log_schema import LogSchema
from kaleidoscope.materials import import_materials
from kaleidoscope.review import make_variants, move_materials
from kaleidoscope.scenes import apply_scene, read_scene
from kaleidoscope.simulation import (
    ExampleVariant,
    Exposures,
    People,
    Population,
    SimulatedScene,
    example_variants,
    read_population,
)
from kaleidoscope.tables import Variant
from kaleidoscope.vocabulary import Level
from tests.kaleidoscope.people import person

DEMO = Path(__file__).parents[3] / "examples" / "demo_scene"
MONDAY = datetime(2026, 1, 5, tzinfo=UTC)
DAY_S = 86_400.0
Floats = NDArray[np.float64]


@cache
def world(seed: int = 0) -> Population:
    return Population(read_population(), seed)


@cache
def scene(seed: int = 0) -> SimulatedScene:
    return world(seed).scene(example_variants(DEMO))


@cache
def people(seed: int = 0) -> People:
    return world(seed).people(4_000)


def preferred(who: People, one: Mapping[str, str], other: Mapping[str, str], seed: int = 0) -> Floats:
    """How much more each user likes one thing than another that differs in nothing but these tags, in the logit."""
    pair = [ExampleVariant(str(n), {}, {d: (v,) for d, v in tags.items()}) for n, tags in enumerate((one, other))]
    logits = world(seed).scene(pair).click_logit(who)
    return np.asarray(logits[:, 0] - logits[:, 1])


def among(who: People, feature: str, *choices: str) -> NDArray[np.bool_]:
    known = next(f.choices for f in who.spec.features if f.name == feature)
    return np.isin(who.values[feature], [known.index(c) for c in choices])


# ── the people ──


def test_people_are_as_the_spec_says() -> None:
    who, spec = world().people(40_000), world().spec
    age, income = who.values["age"], who.values["income"]
    assert (age.min(), age.max(), np.median(age)) == (18, 84, pytest.approx(41, abs=0.6))
    assert np.median(income) == pytest.approx(75_000, rel=0.02)
    assert not (income % 1_000).any()
    for feature in spec.features:
        for n, share in enumerate((feature.shares or {}).values()):
            assert (who.values[feature.name] == n).mean() == pytest.approx(share, abs=0.012)
        assert 1 - who.known[feature.name].mean() == pytest.approx(feature.missing, abs=0.006)


def test_features_are_correlated_as_the_spec_says() -> None:
    who = world().people(40_000)
    income, age = who.values["income"], who.values["age"]
    rank = np.corrcoef(age.argsort().argsort(), income.argsort().argsort())[0, 1]
    assert rank == pytest.approx(6 / np.pi * np.arcsin(0.25 / 2), abs=0.02)  # Spearman's of a Gaussian copula
    white = among(who, "occupation", "white_collar")
    assert income[white].mean() > 1.3 * income[~white].mean()
    assert np.corrcoef(who.values["gender"], income)[0, 1] == pytest.approx(0, abs=0.02)


def test_features_are_given_as_requests_carry_them() -> None:
    who = world().people(500)
    rows, columns = who.features(), who.columns()
    assert [row["income"] for row in rows] == columns["income"].to_pylist()
    assert {type(row["age"]) for row in rows} == {int, type(None)}
    assert {row["occupation"] for row in rows} == {"blue_collar", "white_collar", None}
    assert [row["credit_card"] for row in rows] == [
        ("none", "holder")[int(code)] for code in who.values["credit_card"].tolist()
    ]
    assert [row["age"] is None for row in rows] == (~who.known["age"]).tolist()


def test_the_same_seed_is_the_same_world_and_another_seed_another_one() -> None:
    again = Population(read_population(), 0)
    assert again.people(50).features() == world().people(50).features()
    assert again.preferences == world().preferences
    assert again.scene(scene().variants[:9]).base == world().scene(scene().variants[:9]).base
    assert world(1).people(50).features() != world().people(50).features()
    assert world(1).preferences[6:] != world().preferences[6:]
    others = world().people(50, draw=1)
    assert others.features() != world().people(50).features()
    assert not set(others.ids) & set(world().people(50).ids)


# ── the truth ──


@pytest.mark.parametrize("seed", range(3))
def test_mean_click_rate_is_the_base_ctr(seed: int) -> None:
    assert scene(seed).variant_values(people(seed)).mean() == pytest.approx(0.04, rel=0.03)


def test_main_effects_spread_as_the_spec_says() -> None:
    tags = [world().tag_effect(f"x=v{n}") for n in range(2_000)]
    materials = [world().material_effect("copy", f"m{n}") for n in range(2_000)]
    assert (np.std(tags), np.std(materials)) == (pytest.approx(0.15, rel=0.05), pytest.approx(0.1, rel=0.05))
    assert (np.mean(tags), np.mean(materials)) == (pytest.approx(0, abs=0.012), pytest.approx(0, abs=0.008))


def test_low_incomes_prefer_product_names_and_others_recommendations() -> None:
    likes = preferred(people(), {"headline": "product_name"}, {"headline": "recommendation"})
    low = people().values["income"] < 60_000
    assert likes[low] == pytest.approx(0.4)
    assert likes[~low] == pytest.approx(-0.4)


def test_red_beats_blue_overall_and_the_young_prefer_blue() -> None:
    blue = preferred(people(), {"button_colour": "blue"}, {"button_colour": "red"})
    age = people().values["age"]
    assert blue.mean() < -0.1
    assert blue[age <= 20] == pytest.approx(0.25)
    assert (blue[age < 30] > 0).all()
    assert (np.diff(blue[age.argsort()]) <= 1e-9).all()


def test_work_and_experience_decide_between_finance_and_brand() -> None:
    gold = preferred(people(), {"subject": "gold"}, {"authority": "brand"})
    white, beginner = among(people(), "occupation", "white_collar"), among(people(), "investor", "beginner")
    advanced = among(people(), "investor", "advanced")
    assert gold[white & beginner] == pytest.approx(0.6)
    assert gold[~white & advanced] == pytest.approx(-0.6)
    assert gold[white & ~beginner & ~advanced] == pytest.approx(0.3)
    assert gold[~white & ~beginner & ~advanced] == pytest.approx(-0.3)


def test_trend_charts_do_nothing_for_card_holders_and_help_others() -> None:
    chart = preferred(people(), {"yield": "since_launch"}, {})
    holder = among(people(), "credit_card", "holder")
    assert chart[holder] == pytest.approx(0.0)
    assert chart[~holder] == pytest.approx(0.35)


def test_the_forties_prefer_urgency_most_of_all_trends() -> None:
    age = people().values["age"]
    forties = (age >= 40) & (age <= 50)
    for urgency, size in (("time", 0.3), ("quota", 0.3), ("industry_trend", 0.5)):
        likes = preferred(people(), {"urgency": urgency}, {})
        assert likes[forties] == pytest.approx(size)
        assert likes[~forties] == pytest.approx(0.0)


def test_grids_are_far_worse_than_lists_except_among_the_elderly() -> None:
    grid, age = preferred(people(), {"density": "dense"}, {"density": "regular"}), people().values["age"]
    assert grid[age < 60] == pytest.approx(-0.5)
    assert grid[age >= 60] == pytest.approx(0.0)


@pytest.mark.parametrize("seed", range(3))
def test_six_more_interactions_are_drawn_beside_the_findings(seed: int) -> None:
    drawn = world(seed).preferences[6:]
    pairs = {(feature, t.tag.partition("=")[0]) for f in drawn for t in f.terms for feature in t.when}
    planted = {(feature, t.tag.partition("=")[0]) for f in world().spec.findings for t in f.terms for feature in t.when}
    assert (len(drawn), len(pairs), pairs & planted) == (6, 6, set())
    assert pairs | planted | {("age", "button_colour")} == world(seed).planted_pairs()
    tags = [finding.terms[0].tag for finding in drawn]
    assert any(tags.count(tag) == 1 for tag in tags)
    for finding in drawn:
        one, other = (term.effect or 0.0 for term in finding.terms)
        assert one == -other
        assert 0.2 <= abs(one) <= 0.4
        dimension, _, value = (tag := finding.terms[0].tag).partition("=")
        if tags.count(tag) == 1:
            likes = preferred(people(seed), {dimension: value}, {}, seed) - world(seed).tag_effect(tag)
            assert sorted(set(likes.round(6).tolist())) == [-abs(one), abs(one)]


def test_without_preferences_everybody_likes_the_same() -> None:
    same = Population(read_population().without_preferences(), 0).scene(example_variants(DEMO))
    assert len(set(same.best(people()).tolist())) == 1
    assert same.value(people(), same.best(people())) == pytest.approx(same.variant_values(people()).max())


def test_logits_of_one_variant_are_those_of_all() -> None:
    rng, who = np.random.default_rng(0), people().take(np.arange(200))
    shown, time_s = rng.integers(0, len(scene().variants), 200), rng.uniform(0, 30 * DAY_S, 200)
    recent = rng.uniform(0, 8, (200, len(scene().tags)))
    fresh = replace(scene(), released_s=rng.uniform(0, 10 * DAY_S, len(scene().variants)))
    every = fresh.click_logit(who, time_s, recent)
    assert fresh.click_logit_of(who, shown, time_s, recent) == pytest.approx(every[np.arange(200), shown])
    assert fresh.value(who, shown, time_s, recent) == pytest.approx(expit(every[np.arange(200), shown]).mean())
    assert fresh.best(who, time_s, recent).tolist() == every.argmax(axis=1).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_personalising_is_worth_it(seed: int) -> None:
    truth, who = scene(seed), people(seed)
    values = truth.variant_values(who)
    uniform, single, oracle = values.mean(), values.max(), truth.value(who, truth.best(who))
    by_tags = truth.value(who, truth.best(who, by_tags=True))
    assert single == values[truth.best_single(who)]
    assert 1.25 * single < by_tags < oracle
    assert 1.5 * uniform < single
    evenly = np.full((len(who), len(values)), 1 / len(values))
    assert truth.value_of_policy(who, evenly) == pytest.approx(uniform)


# ── time ──


def test_recent_exposures_to_a_tag_lower_the_logit_of_what_carries_it() -> None:
    who, start = people().take(np.arange(3)), MONDAY.timestamp()
    memory, unit = Exposures(scene(), 3), np.arange(3)
    shown, at = np.array([5, 5, 5]), np.full(3, start)
    rested = scene().click_logit(who, at, memory.seen(scene(), unit, at))
    for times in range(1, 9):
        memory.add(scene(), np.array([1]), np.array([5]), np.array([start]))
        tired = scene().click_logit(who, at, memory.seen(scene(), unit, at))
        alike = [n for n in range(len(scene().variants)) if scene().variants[n].tags == scene().variants[5].tags]
        assert (rested - tired)[1, alike] == pytest.approx(3 * 0.02 * min(times, 5))  # three dimensions tire
        assert (rested - tired)[[0, 2]] == pytest.approx(0.0)
    assert scene().click_logit_of(who, shown, at, memory.seen(scene(), unit, at))[1] == pytest.approx(tired[1, 5])
    later = at + 3 * DAY_S
    assert memory.seen(scene(), unit, later)[1].max() == pytest.approx(4)
    much_later = at + 9_000 * DAY_S  # so many half-lives are beyond what a float can hold
    memory.add(scene(), np.array([1]), np.array([5]), much_later[:1])
    assert memory.seen(scene(), unit, much_later).max(axis=1) == pytest.approx([0, 1, 0])


def test_new_variants_gain_for_some_days_and_leave_the_others_as_they_were() -> None:
    who, old = people().take(np.arange(20)), world().scene(scene().variants[:500])
    new = old.with_variants(scene().variants[500:], released=MONDAY)
    seconds = MONDAY.timestamp() + np.array([0.0, 2.0, 40.0]) * DAY_S
    for time_s, gain in zip(seconds.tolist(), (0.15, 0.075, 0.0), strict=True):
        at = np.full(20, time_s)
        logits, settled = new.click_logit(who, at), replace(new, released_s=np.full(576, -np.inf)).click_logit(who, at)
        assert logits[:, :500] == pytest.approx(old.click_logit(who, at))
        assert (logits - settled)[:, 500:] == pytest.approx(gain, abs=1e-4)


def test_hours_and_weekdays_move_everything_alike() -> None:
    who = people().take(np.zeros(4, np.int64))
    at = MONDAY.timestamp() + np.array([0, 20 * 3_600, 5 * DAY_S, 7 * DAY_S])  # midnight, evening, Saturday, Monday
    logits = scene().click_logit(who, at) - scene().click_logit(who)
    assert logits.std(axis=1) == pytest.approx(0.0)
    assert logits[:, 0] == pytest.approx([-0.15, 0.1, 0.0, -0.15])


def test_traffic_is_in_the_order_of_time_and_units_come_back() -> None:
    who = world().people(2_000)
    parts = list(world().traffic(who, start=MONDAY, days=3.5, batch=500))
    time_s, unit = (np.concatenate([getattr(part, name) for part in parts]) for name in ("time_s", "unit"))
    assert max(map(len, parts)) == 500
    assert (np.diff(time_s) >= 0).all()
    assert MONDAY.timestamp() <= time_s[0] <= time_s[-1] < MONDAY.timestamp() + 3.5 * DAY_S
    assert len(unit) == pytest.approx(2_000 * 0.7 * 3.5, rel=0.15)
    visits = np.bincount(unit, minlength=2_000)
    assert visits.var() > 2 * visits.mean()  # some come far more often than others
    hour = time_s / 3_600 % 24
    assert ((hour > 19) & (hour < 21)).sum() > 5 * ((hour > 3) & (hour < 5)).sum()
    assert parts[0].times()[0].timestamp() == pytest.approx(parts[0].time_s[0], abs=1e-5)


def test_traffic_does_not_depend_on_the_batches() -> None:
    who = world().people(300)
    small, large = (list(world().traffic(who, start=MONDAY, days=2, batch=n)) for n in (7, 10_000))
    assert np.concatenate([p.time_s for p in small]).tolist() == np.concatenate([p.time_s for p in large]).tolist()
    assert np.concatenate([p.unit for p in small]).tolist() == np.concatenate([p.unit for p in large]).tolist()
    busy = world().traffic(who, start=MONDAY, days=2, visits_per_day=7.0)
    assert sum(map(len, busy)) == pytest.approx(10 * sum(map(len, small)), rel=0.3)


# ── what comes of it ──


def test_clicks_conversions_and_dwell_follow_the_truth() -> None:
    rng, who = np.random.default_rng(0), world().people(60_000)
    shown = rng.integers(0, len(scene().variants), len(who))
    out = scene().respond(who, shown, rng)
    assert out.click.mean() == pytest.approx(scene().value(who, shown), rel=0.06)
    assert not (out.converted & ~out.click).any()
    assert out.converted.sum() / out.click.sum() == pytest.approx(0.08, abs=0.03)
    assert np.median(out.dwell_s[out.click]) == pytest.approx(14, rel=0.1)
    assert np.median(out.dwell_s[~out.click]) == pytest.approx(1.6, rel=0.05)


def test_log_reads_back_under_the_contract(tmp_path: Path) -> None:
    who, hidden = world().people(1_500), {scene().variants[3].id}
    visits = world().traffic(who, start=MONDAY, days=4)
    table = scene().log(who, visits, np.random.default_rng(0), hidden=hidden)
    pq.write_table(table, tmp_path / "log.parquet")
    log = read_log(tmp_path / "log.parquet", LogSchema.model_validate(scene().schema()))
    assert not [check for check in log.checks if check.level is Level.ERROR]
    assert log.propensity == pytest.approx(1 / 575)
    ids = log.variants["variant_id"].to_pylist()
    assert hidden.isdisjoint(ids)
    of_id = {variant.id: variant.tags for variant in scene().variants}
    assert [tuple(v) for v in log.variants["subject"].to_pylist()] == [of_id[id].get("subject", ()) for id in ids]


def test_the_page_shows_how_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DEMO.parents[1])
    (block,) = re.findall(r"^```python\n(.*?)^```", Path("docs/simulation.md").read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["outcomes"].click.mean() > 0.08  # the oracle's


# ── the scene of the demo ──


def test_the_platform_makes_of_the_demo_scene_the_variants_that_the_world_knows(
    sqlite: Database, tmp_path: Path
) -> None:
    drawn = runpy.run_path(str(DEMO / "make_images.py"))["draw_all"](tmp_path / "images")
    scene_id, spec = read_scene(DEMO / "scene.yaml")
    with sqlite.transaction(operator("root", "demo")) as session:
        create_business(session, "Demo")
    with sqlite.transaction(person("ann", business="demo")) as session:
        report = import_materials(session, DEMO / "materials.csv", tmp_path / "images", tmp_path / "files")
        assert [row.message for row in report.failures] == []
        ids = [row.id for row in report.rows]
        move_materials(session, "submit", ids)
    with sqlite.transaction(person("rex", business="demo")) as session:
        move_materials(session, "approve", ids)
        apply_scene(session, scene_id, spec)
        assert make_variants(session, scene_id).remarked == 0
        made = {variant.id: variant for variant in describe_variants(session, session.query(Variant))}
    assert len(drawn) == 10
    assert {v.id: (dict(v.materials), dict(v.tags)) for v in example_variants(DEMO)} == {
        id: (variant.materials, variant.tags) for id, variant in made.items()
    }
    assert len(made) == 576
    assert set(scene().tags) == {f"{d}={v}" for variant in made.values() for d in variant.tags for v in variant.tags[d]}


def test_the_demo_scene_carries_everything_that_the_world_plants() -> None:
    planted = {t.tag for finding in world().preferences for t in finding.terms} - {"urgency=*"}
    possible = {*planted, *world().spec.random_interactions.tags}
    assert possible <= set(scene().tags)
    baseline = read_scene(DEMO / "scene.yaml")[1].baseline
    control = next(n for n, v in enumerate(scene().variants) if v.materials == baseline)
    values = scene().variant_values(people())
    assert values.mean() < values[control] < values.max()
