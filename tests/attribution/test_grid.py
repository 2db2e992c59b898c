"""The grid against what is true: planted crossings, planted pairs, nothing planted, and cells counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit

from attribution.coding import code
from attribution.discoveries import Q
from attribution.grid import MIN_CLICKS, GridResult, grid, without_noise
from attribution.insights import attribute_coded
from kaleidoscope.log import Log
from tests.attribution.logs import TAGS, log_of

Array = np.ndarray[Any, np.dtype[Any]]
LOUD, FLAT = np.array([2, 3]), np.array([0, 2, 4])


def world(
    n: int, seed: int, *, pair: float = 0.0, users: float = 0.0, tags: float = 0.0, both: float = 0.0, **given: Any
) -> tuple[Log, Array]:
    """A random bucket, and its click probabilities: women like loud by `pair`, young women beyond that by `users`,
    women like what is loud and flat by `tags`, and young women beyond all that by `both`."""
    rng = np.random.default_rng(seed)
    unit = np.repeat(np.arange(-(-n // given.get("rows_per_unit", 1))), given.get("rows_per_unit", 1))[:n]
    units = int(unit[-1]) + 1
    woman, young = rng.random(units) < 0.5, rng.random(units) < 0.5
    city = np.array(["a", "b", "c"])[np.minimum(rng.integers(0, 3, units) + (young & (rng.random(units) < 0.3)), 2)]
    variant = rng.integers(0, 6, n)
    loud, flat = np.isin(variant, LOUD), np.isin(variant, FLAT)
    she, new = woman[unit], young[unit]
    logit = given.get("base", -1.5) + 0.2 * loud - 0.1 * flat + 0.3 * new - 0.2 * (she & new)
    logit += she * (pair * loud + users * (new & loud) + tags * (loud & flat) + both * (new & loud & flat))
    logit += rng.normal(0, given.get("unit_sd", 0.0), units)[unit]
    p = expit(logit)
    user = {
        "sex": np.where(woman, "f", "m")[unit].tolist(),
        "age": np.where(young, "young", "old")[unit].tolist(),
        "city": city[unit].tolist(),
    }
    return log_of(user, TAGS, variant, rng.random(n) < p, unit=unit, **given.get("columns", {})), p


def looked(log: Log) -> GridResult:
    return grid(code(log, dependent=False))


def found(result: GridResult) -> list[tuple[dict[str, str], dict[str, str]]]:
    return [(dict(i.segment), dict(i.tag)) for i in result.insights]


# ── what is reported ──


def test_two_features_that_matter_together_are_one_insight_and_their_parts_are_not_told() -> None:
    result = looked(world(40_000, 0, users=0.8)[0])
    assert found(result) == [({"sex": "f", "age": "young"}, {"tone": "loud"})]
    (insight,) = result.insights
    assert insight.crossed and insight.methods == ("grid",)
    assert insight.ci_low < np.expm1(0.8) < insight.ci_high
    assert insight.effect == pytest.approx(np.expm1(0.8), abs=0.5)
    assert insight.q_value < 1e-4
    assert insight.preference is not None and insight.preference > 1.1
    parts = [(dict(pair.segment), dict(pair.tag)) for pair in insight.explained_by]
    assert any(set(segment) < {"sex", "age"} for segment, _ in parts)


def test_a_second_crossing_of_a_family_that_is_clear_beside_the_first_has_the_q_value_it_was_held_to() -> None:
    """Alone it passes the first threshold only, and so much is asked of it alone; beside the first it is clear."""
    log, p = world(20_000, 10)
    age, city = (np.array(log.columns[name].to_pylist()) for name in ("age", "city"))
    loud, plain = np.isin(log.variant, LOUD), np.isin(log.variant, (4, 5))
    more = 0.8 * ((age == "young") & (city == "a") & loud) + 0.4 * ((age == "old") & (city == "b") & plain)
    click = np.random.default_rng(10).random(len(p)) < expit(np.log(p / (1 - p)) + more)
    result = looked(replace(log, reward=click.astype(np.float32)))
    assert found(result) == [
        ({"age": "young", "city": "a"}, {"tone": "loud"}),
        ({"age": "old", "city": "b"}, {"tone": "plain"}),
    ]
    assert result.insights[0].q_value < 1e-3 < result.insights[1].q_value <= Q


def test_what_a_pair_explains_is_told_as_a_pair() -> None:
    result = looked(world(40_000, 1, pair=0.7)[0])
    assert found(result) == [({"sex": "f"}, {"tone": "loud"})]
    assert not result.insights[0].crossed


def test_a_pair_and_what_a_crossing_says_beyond_it_are_both_told() -> None:
    result = looked(world(80_000, 2, pair=0.6, users=0.7)[0])
    assert found(result) == [({"sex": "f"}, {"tone": "loud"}), ({"sex": "f", "age": "young"}, {"tone": "loud"})] or (
        found(result) == [({"sex": "f", "age": "young"}, {"tone": "loud"}), ({"sex": "f"}, {"tone": "loud"})]
    )
    by = {i.crossed: i for i in result.insights}
    assert by[False].ci_low < np.expm1(0.6) < by[False].ci_high
    assert by[True].ci_low < np.expm1(0.7) < by[True].ci_high


def test_two_tags_that_matter_together_are_found() -> None:
    result = looked(world(60_000, 3, tags=0.9)[0])
    crossed = [i for i in result.insights if i.crossed]
    assert [(dict(i.segment), dict(i.tag)) for i in crossed] == [({"sex": "f"}, {"tone": "loud", "style": "flat"})]
    assert crossed[0].ci_low < np.expm1(0.9) < crossed[0].ci_high


def test_two_features_and_two_tags_that_matter_together_are_found() -> None:
    result = looked(world(120_000, 4, both=1.4, base=-1.0)[0])
    crossed = [(dict(i.segment), dict(i.tag)) for i in result.insights if i.crossed]
    assert ({"sex": "f", "age": "young"}, {"tone": "loud", "style": "flat"}) in crossed


def test_the_same_is_found_with_the_statistics_given() -> None:
    coded = code(world(20_000, 0, users=0.9)[0], dependent=False)
    again, alone = grid(coded, attribute_coded(coded)), grid(coded)
    assert again.insights == alone.insights and again.cells == alone.cells


@pytest.mark.parametrize("given", [{}, {"rows_per_unit": 8, "unit_sd": 1.5}], ids=["rows", "units"])
def test_where_nothing_interacts_hardly_anything_is_found(given: dict[str, Any]) -> None:
    results = [looked(world(8_000, 100 + seed, **given)[0]) for seed in range(25)]
    assert sum(bool(result.insights) for result in results) <= stats.binom.isf(0.005, 25, 0.05)
    z = np.concatenate([r.diagnostics.examined.z[[len(n.segment) + len(n.tag) > 2 for n in r.names]] for r in results])
    assert 0.9 < z.std() < 1.1


def test_intervals_of_everything_examined_hold_what_is_true() -> None:
    held = []
    for seed in range(8):
        log, p = world(30_000, 200 + seed, pair=0.4, users=0.5)
        coded = code(log, dependent=False)
        result = grid(coded)
        examined = result.diagnostics.examined
        truth, joint = without_noise(coded, p, result)
        assert len(joint) == len(result.insights) and len(truth) == len(result.names) == len(examined.z)
        low, high = examined.interval()
        known = np.isfinite(truth)
        assert known.mean() > 0.95
        held.append(((low <= truth) & (truth <= high))[known])
        for insight, gamma in zip(result.insights, joint, strict=True):
            assert abs(np.log1p(insight.effect) - gamma) < 0.5
    assert 0.92 < np.concatenate(held).mean() < 0.98


def test_weights_count() -> None:
    rng = np.random.default_rng(55)
    log, _ = world(60_000, 5, users=0.9)
    loud = np.isin(log.variant, LOUD)
    # Young users were shown loud ones more often; their propensities say so, and rows were drawn accordingly.
    young = np.array([value == "young" for value in log.columns["age"].to_pylist()])
    share = np.where(young == loud, 0.9, 0.45)
    kept = np.flatnonzero(rng.random(len(log.variant)) < share)
    total = np.where(young, (2 * 0.9 + 4 * 0.45), (2 * 0.45 + 4 * 0.9))
    part = replace(log.take(kept), propensity=(share / total)[kept])
    part = replace(part, schema=part.schema.model_copy(update={"propensity": "p"}))
    coded = code(part)
    assert coded.weighted
    assert found(grid(coded)) == [({"sex": "f", "age": "young"}, {"tone": "loud"})]


# ── the cells ──


def test_cells_are_what_counting_says() -> None:
    log, _ = world(30_000, 7, users=1.2)
    result = looked(log)
    assert {tuple(cell.segment) for cell in result.cells} >= {("sex", "age")}
    columns = {name: np.array(log.columns[name].to_pylist()) for name in ("sex", "age", "city")}
    for cell in result.cells:
        rows = np.ones(len(log.variant), bool)
        for name, value in cell.segment.items():
            rows &= columns[name] == value
        for dimension, value in cell.tag.items():
            rows &= np.array([value in v for v in log.variants[dimension].to_pylist()])[log.variant]
        assert cell.n == rows.sum() and cell.clicks == log.reward[rows].sum()
        assert cell.ctr == pytest.approx(log.reward[rows].mean())
        wilson = stats.binomtest(cell.clicks, cell.n).proportion_ci(method="wilson")
        assert (cell.ctr_low, cell.ctr_high) == pytest.approx((wilson.low, wilson.high), rel=1e-6)
        if cell.effect is not None:
            assert cell.ci_low is not None and cell.ci_high is not None and cell.q_value is not None
            assert cell.ci_low <= cell.effect <= cell.ci_high


def test_cells_with_too_little_are_unknown_and_not_zero() -> None:
    result = looked(world(900, 8, base=-2.5)[0])
    few = [cell for cell in result.cells if cell.clicks < MIN_CLICKS]
    assert few
    for cell in few:
        assert (cell.ctr, cell.ctr_low, cell.ctr_high, cell.effect, cell.q_value) == (None,) * 5


def test_intervals_of_cells_are_by_unit() -> None:
    log, _ = world(24_000, 9, rows_per_unit=12, unit_sd=2.0)
    by_unit, by_row = looked(log), looked(replace(log, unit=None))
    widths = [
        np.mean([cell.ctr_high - (cell.ctr_low or 0) for cell in result.cells if cell.ctr_high is not None])
        for result in (by_unit, by_row)
    ]
    assert widths[0] > 1.1 * widths[1]


@pytest.mark.parametrize("fields", [0, 1, 2])
@pytest.mark.parametrize("dimensions", [0, 1, 2])
def test_logs_with_little_to_cross_have_what_there_is(fields: int, dimensions: int) -> None:
    log, _ = world(4_000, 10)
    schema = log.schema.model_copy(
        update={"user": ("sex", "age", "city")[:fields], "variant": ("tone", "style")[:dimensions]}
    )
    columns = {name: log.columns[name] for name in schema.user}
    result = looked(
        replace(log, schema=schema, columns=columns, variants=log.variants.select(["variant_id", *schema.variant]))
    )
    shapes = {(len(cell.segment), len(cell.tag)) for cell in result.cells}
    assert shapes == ({(fields, dimensions)} if fields and dimensions and fields + dimensions > 2 else set())
    assert len(result.names) == len(result.diagnostics.examined.z)


@pytest.mark.parametrize("guests", [0.95, 1.0])
def test_a_unit_that_has_most_of_the_rows_makes_nothing_look_sure(guests: float) -> None:
    """Its score is about 0 where the model is fitted: by unit, nothing seems to vary."""
    for seed in range(3):
        log = world(3_000, seed, base=0.3)[0]
        assert log.unit is not None
        guest = np.random.default_rng(seed).random(len(log)) < guests
        guest[:12] = False
        coded = code(
            replace(log, unit=np.unique(np.where(guest, -1, log.unit), return_inverse=True)[1]), dependent=False
        )
        assert not grid(coded).insights
        assert not attribute_coded(coded).insights
