"""Standardised preferences against what is true: ratios, intervals, values drawn to 1, insights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from attribution.cells import Cells
from attribution.coding import Coded, code
from attribution.consensus import agreements
from attribution.insights import attribute_coded, main_effects
from attribution.preference import (
    PreferenceCell,
    PreferenceResult,
    _quantile,
    log_preferences,
    preference_cells,
    preferences,
    without_noise,
)
from tests.attribution.logs import TAGS, liking, log_of


def cell(found: PreferenceResult, field: str, label: str, **tag: str) -> PreferenceCell:
    return next(c for c in found.cells if c.segment == {field: label} and c.tag == tag)


def test_the_ratio_is_that_of_the_contract() -> None:
    """Two strata of different CTR, and a tag that one of them shows more often."""
    rng = np.random.default_rng(0)
    n = 20_000
    hour = rng.random(n) < 0.5
    variant = np.where(rng.random(n) < np.where(hour, 0.7, 0.1), 2, rng.integers(0, 6, n))
    woman = rng.random(n) < np.where(hour, 0.6, 0.3)
    click = rng.random(n) < np.where(hour, 0.4, 0.1) * (1 + 0.3 * woman * np.isin(variant, (2, 3)))
    gender, context = np.where(woman, "f", "m").tolist(), {"hour": np.where(hour, "am", "pm").tolist()}
    coded = code(log_of({"gender": gender}, TAGS, variant, click, context=context), dependent=False)
    found = preferences(coded)

    def over_expected(rows: np.ndarray, loud: np.ndarray) -> float:
        expected = sum(click[rows & (hour == h)].mean() * (rows & loud & (hour == h)).sum() for h in (True, False))
        return float(click[rows & loud].sum() / expected)

    loud, every = np.isin(variant, (2, 3)), np.ones(n, bool)
    loved = cell(found, "gender", "f", tone="loud")
    assert loved.preference == pytest.approx(over_expected(woman, loud) / over_expected(every, loud))
    assert (loved.n, loved.clicks) == ((woman & loud).sum(), click[woman & loud].sum())
    assert loved.ctr == pytest.approx(click[woman & loud].mean())
    assert loved.preference is not None and loved.ci_low is not None and loved.ci_high is not None
    assert loved.ci_low < loved.preference < loved.ci_high
    cells = Cells.of(coded)
    at = cells.values.index(("gender", "f"))
    assert loved.preference == pytest.approx(cells.preference(np.array([at]))[cells.tags.index((("tone", "loud"),))])
    assert preferences(coded, cells).cells == found.cells


def test_sums_alone_give_the_rows_of_the_portrait() -> None:
    coded = code(liking(6_000, 3, 0.5, rows_per_unit=3)[0], dependent=False)
    assert preference_cells(Cells.of(coded)) == preferences(coded).cells


@pytest.mark.parametrize(("rows_per_unit", "unit_sd"), [(1, 0.0), (10, 2.0)])
def test_intervals_hold_also_where_rows_of_a_unit_go_together(rows_per_unit: int, unit_sd: float) -> None:
    """Of many small logs, beside what a very large one of the same world says its click probabilities are."""
    log, p = liking(400_000, 999, 0.5, rows_per_unit=rows_per_unit, unit_sd=unit_sd)
    whole = code(log, dependent=False)
    truth = np.exp(log_preferences(replace(whole, reward=p)))
    raw, shrunk = list[bool](), list[bool]()
    for seed in range(30):
        log, _ = liking(6_000, seed, 0.5, rows_per_unit=rows_per_unit, unit_sd=unit_sd)
        for c, true in zip(preferences(code(log, dependent=False, fields=whole.fields)).cells, truth, strict=True):
            if c.clicks >= 10 and c.ci_low is not None and c.ci_high is not None:
                assert c.shrunk_low is not None and c.shrunk_high is not None
                raw.append(c.ci_low <= true <= c.ci_high)
                shrunk.append(c.shrunk_low <= true <= c.shrunk_high)
    assert len(raw) > 2_000
    assert 0.935 <= np.mean(raw) <= 0.97
    assert 0.935 <= np.mean(shrunk) <= 0.985


def test_few_clicks_are_drawn_to_1_and_many_are_not() -> None:
    log, p = liking(40_000, 0, 0.8, noise=3)
    coded = code(log, dependent=False)
    found = preferences(coded)
    loved = cell(found, "gender", "f", tone="loud")
    assert loved.shrunk == pytest.approx(loved.preference, rel=0.02)
    truth = log_preferences(replace(coded, reward=p))
    small = [i for i, c in enumerate(found.cells) if c.clicks and "gender" not in c.segment]
    raw, shrunk = (
        np.mean([(np.log(getattr(found.cells[i], name)) - truth[i]) ** 2 for i in small])
        for name in ("preference", "shrunk")
    )
    assert shrunk < 0.5 * raw
    assert found.prior_sd["gender", "tone"] > 3 * found.prior_sd["x0", "tone"]


def test_what_nobody_saw_or_clicked_is_not_known() -> None:
    rng = np.random.default_rng(0)
    variant = rng.integers(0, 6, 3_000)
    woman = rng.random(3_000) < 0.5
    variant = np.where(woman & (variant == 2), 3, variant)
    variants = {**TAGS, "shape": [["a"], ["a"], ["b"], ["c"], ["c"], ["c"]]}
    click = (rng.random(3_000) < 0.3) & ~((variant < 2) & woman)
    log = log_of({"gender": np.where(woman, "f", "m").tolist()}, variants, variant, click)
    found = preferences(code(log, dependent=False))
    unseen, unclicked = cell(found, "gender", "f", shape="b"), cell(found, "gender", "f", tone="calm", shape="a")
    assert unseen.n == 0 and unclicked.n > 100 and unclicked.clicks == 0
    assert unseen.ctr is unseen.ctr_high is unseen.preference is unseen.shrunk is None
    assert unclicked.ctr == 0 and unclicked.ctr_low == pytest.approx(0, abs=1e-9)
    assert unclicked.preference is unclicked.ci_low is None
    assert unclicked.ctr_high is not None and unclicked.ctr_high > 0
    assert unclicked.shrunk is not None and unclicked.shrunk < 1


def test_a_ratio_is_told_where_a_few_clicks_are_expected_and_otherwise_only_what_is_to_be_believed() -> None:
    """Of cells that expect one click, those that got none have no ratio: the mean of the others is far above 1."""
    rng, n = np.random.default_rng(1), 6_000
    city = rng.choice([f"c{i}" for i in range(40)], n)
    log = log_of({"city": city.tolist()}, TAGS, rng.integers(0, 6, n), rng.random(n) < 0.02)
    found = preferences(code(log, dependent=False))
    got = [c for c in found.cells if c.clicks]
    told = [c for c in got if c.preference is not None]
    assert 0 < len(told) < len(got)
    assert all(c.clicks / c.preference > 2 for c in told if c.preference)  # which is what was expected
    assert all(c.ci_low is c.ci_high is None for c in got if c.preference is None)
    assert all(c.shrunk is not None and c.shrunk_low is not None for c in got)


def test_importance_is_what_the_ratio_says_also_where_the_joint_model_says_the_opposite() -> None:
    """The rich like loud and the old do not, but most of the old are rich: by the rates alone the old like it too."""
    rng, n = np.random.default_rng(2), 120_000
    old, variant = rng.random(n) < 0.5, rng.integers(0, 6, n)
    rich = np.where(rng.random(n) < 0.85, old, ~old)
    click = rng.random(n) < expit(-2 + np.isin(variant, (2, 3)) * (1.4 * rich - 0.5 * old))
    user = {"age": np.where(old, "old", "young").tolist(), "income": np.where(rich, "rich", "poor").tolist()}
    coded = code(log_of(user, TAGS, variant, click, unit=np.arange(n)), dependent=False)
    by_method = {"statistics": attribute_coded(coded).insights, "preference": preferences(coded).insights}
    found = {one.insight.segment.get("age"): one for one in agreements(by_method)}
    old_or_young = found.get("old") or found["young"]
    sign = 1 if old_or_young.insight.effect > 0 else -1
    assert dict(old_or_young.found_by) == {"statistics": sign, "preference": -sign}
    assert old_or_young.disputed and not old_or_young.holds
    assert old_or_young.sentence.endswith("the standardised preferences found the opposite.")
    assert found[None].holds and set(found[None].found_by.values()) in ({1}, {-1})  # income


def test_insights_are_those_of_the_joint_model_with_its_own_test() -> None:
    log, p = liking(30_000, 0, 0.8)
    coded = code(log, dependent=False)
    found, statistics = preferences(coded), attribute_coded(coded)
    assert [(i.segment, i.tag) for i in found.insights] == [({"gender": "f"}, {"tone": "loud"})]
    insight, other = found.insights[0], statistics.insights[0]
    assert (insight.effect, insight.ci_low, insight.ci_high) == (other.effect, other.ci_low, other.ci_high)
    loved = cell(found, "gender", "f", tone="loud")
    assert insight.preference == pytest.approx(loved.preference)
    assert insight.importance == {"preference": pytest.approx(np.log(loved.shrunk or 1))}
    assert insight.methods == ("preference",)
    assert other.q_value <= insight.q_value < 1e-4
    alone, joint = without_noise(coded, p, found)
    assert joint == pytest.approx([0.8], abs=0.02)
    assert len(alone) == len(found.diagnostics.examined.gamma)
    place = found.diagnostics.examined.segments.index(found.diagnostics.selected[0][0])
    assert np.isfinite(alone[place])


def test_a_correlated_field_is_no_insight_though_its_ratio_differs() -> None:
    rng = np.random.default_rng(5)
    log, _ = liking(40_000, 3, 0.9)
    gender = np.array(log.columns["gender"].to_pylist())
    shoes = np.where(rng.random(len(log)) < 0.85, gender, np.where(gender == "f", "m", "f"))
    more = {"gender": gender.tolist(), "shoes": shoes.tolist()}
    found = preferences(code(log_of(more, TAGS, log.variant, log.reward, unit=log.unit), dependent=False))
    ratio = cell(found, "shoes", "f", tone="loud")
    assert ratio.ci_low is not None and ratio.ci_low > 1.05
    assert {field for i in found.insights for field in i.segment} == {"gender"}


def test_null_worlds_are_mostly_left_alone() -> None:
    found = sum(
        bool(preferences(code(liking(3_000, 100 + s, 0.0, noise=2)[0], dependent=False)).insights) for s in range(30)
    )
    assert found <= 5  # 5 % of 30, + 3 standard errors


def nothing_of(user: dict[str, list[str]], rows: int = 600) -> Coded:
    row = np.arange(rows)
    return code(log_of(user, TAGS, row % 6, row % 2), dependent=False)


def test_without_users_there_is_no_preference() -> None:
    found = preferences(nothing_of({}))
    assert found.cells == ()
    assert found.insights == ()
    assert found.prior_sd == {}


def test_quantiles_of_a_mixture() -> None:
    weights, mean, sd = np.array([[0.5, 0.5]]), np.array([[-3.0, 3.0]]), np.array([[1.0, 1.0]])
    assert _quantile(0.5, weights, mean, sd) == pytest.approx(0, abs=1e-6)
    draws = np.random.default_rng(0).normal(np.where(np.arange(200_000) % 2, 3, -3), 1)
    assert _quantile(0.1, weights, mean, sd) == pytest.approx(np.quantile(draws, 0.1), abs=0.03)


def test_cells_know_what_they_are_worth_and_not_only_what_a_model_showed() -> None:
    """Women are shown loud and men plain, nearly all of them: users are half and half all the same."""
    rng = np.random.default_rng(5)
    n = 40_000
    women, level = rng.random(n) < 0.5, rng.random(n)
    variant = np.where(rng.random(n) < 0.1, rng.integers(0, 6, n), np.where(women, 2, 4))
    propensity = 0.1 / 6 + 0.9 * (variant == np.where(women, 2, 4))
    click = rng.random(n) < np.where(women & np.isin(variant, (2, 3)), 0.3, 0.1)
    user = {"gender": np.where(women, "f", "m").tolist(), "level": np.where(level < 0.4, "new", "old").tolist()}
    coded = code(log_of(user, TAGS, variant, click, propensity=propensity, unit=np.arange(n)))
    found = preferences(coded)
    loud, plain = (cell(found, "gender", "f", tone=tone) for tone in ("loud", "plain"))
    assert loud.n > 10 * plain.n
    assert loud.share == pytest.approx(0.5, abs=0.05) and plain.share == pytest.approx(0.5, abs=0.05)
    assert loud.click_share == pytest.approx(0.75, abs=0.05)  # three times as likely to click as men
    assert loud.independent is not None and plain.independent is not None
    assert loud.independent < 0.5 * loud.n and plain.independent > 0.5 * plain.n
    at = {(s.field, s.label): i for i, s in enumerate(found.segments)}
    both = found.overlap[at["gender", "f"], at["level", "new"]]
    assert both == pytest.approx(0.2, abs=0.02)
    assert found.overlap[at["gender", "f"], at["gender", "m"]] == 0
    mains = {tuple(m.tag.items()): m for m in main_effects(Cells.of(coded.evenly))}
    assert mains[("tone", "loud"),].share == pytest.approx(1 / 3, abs=0.05)
    independent = mains[("tone", "loud"),].independent
    assert independent is not None and independent < 0.3 * mains[("tone", "loud"),].n


def test_exposures_that_count_alike_are_worth_themselves() -> None:
    log, _ = liking(3_000, 1, 0.0)
    coded = code(log, dependent=False)
    assert all(
        (one.independent or 0) <= one.n * 1.05 and one.independent is not None for one in preferences(coded).cells
    )
