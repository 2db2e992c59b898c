from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.special import expit

from attribution import ebm as module
from attribution.coding import Coded, code
from attribution.ebm import Boosted, boosted, ebm, ebm_of_network
from attribution.insights import halves
from attribution.logistic import Sums
from kaleidoscope.errors import LogError
from tests.attribution.logs import TAGS, liking, log_of

Array = np.ndarray[Any, np.dtype[Any]]


def taste(n: int, seed: int, effect: float) -> Coded:
    return code(liking(n, seed, effect, base=-1.5)[0], dependent=False)


def numbers_and_texts(n: int, seed: int) -> Coded:
    """A log with missing numbers, values of a dimension that go together, and strata."""
    rng = np.random.default_rng(seed)
    age = np.where(rng.random(n) < 0.2, np.nan, np.round(rng.normal(40, 12, n)))
    city = np.array(["a", "b", "c"])[rng.integers(0, 3, n)]
    variant, product = rng.integers(0, 6, n), np.array(["p", "q"])[rng.integers(0, 2, n)]
    logit = -1.2 + 0.5 * (city == "a") * (variant < 3) + 0.4 * (product == "q") + 0.3 * (np.nan_to_num(age) > 45)
    logit = logit + 0.8 * np.isnan(age) * np.isin(variant, (2, 3))
    tags = {**TAGS, "extras": [["badge"], ["badge", "price"], [], ["price"], [], ["badge"]]}
    user = {"age": age, "city": city.tolist()}
    return code(log_of(user, tags, variant, rng.random(n) < expit(logit), product=product.tolist()), dependent=False)


def shape_of(model: Boosted, name: str) -> dict[str, tuple[float, float, float]]:
    shape = next(s for s in model.shapes if s.name == name)
    return {
        label: (float(e), float(low), float(high))
        for label, e, low, high in zip(shape.labels, shape.effect, shape.low, shape.high, strict=True)
    }


def test_a_taste_is_discovered_in_one_half_and_measured_in_the_other() -> None:
    coded = taste(30_000, 0, 0.8)
    found = ebm(coded, outer_bags=3)
    best = found.insights[0]
    assert (dict(best.segment), dict(best.tag)) in [
        ({"gender": "f"}, {"tone": "loud"}), ({"gender": "m"}, {"tone": "loud"})
    ]  # fmt: skip
    assert best.methods == ("ebm",)
    assert best.q_value < 0.01
    assert best.importance["ebm"] * best.effect > 0
    assert best.n < 0.3 * len(coded)  # the segment in the other half
    assert found.heat_maps[0].field == "gender"
    assert found.heat_maps[0].dimension == "tone"
    assert found.auc is not None
    assert found.auc > 0.55


def test_importance_has_the_sign_of_the_contrast_in_the_heat_map() -> None:
    for taste_of_women in (0.9, -0.9):
        candidates = ebm(taste(20_000, 23, taste_of_women), outer_bags=3).candidates
        own = {c.segment.label: c.importance or 0.0 for c in candidates[:2]}  # the strongest: women, and men, and loud
        assert own["f"] * taste_of_women > 0 > own["m"] * taste_of_women


@pytest.mark.parametrize("seed", [24, 26, 32])
def test_a_taste_of_few_is_discovered_though_early_stopping_leaves_no_heat_map_of_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 30_000
    level = rng.choice(["bronze", "silver", "gold", "platinum"], n, p=[0.5, 0.3, 0.15, 0.05])
    variant = rng.integers(0, 6, n)
    reward = rng.random(n) < expit(-2 + 0.7 * (level == "platinum") * np.isin(variant, (2, 3)))
    found = ebm(code(log_of({"level": level.tolist()}, TAGS, variant, reward), dependent=False), outer_bags=3)
    assert found.heat_maps[0].importance < 0.02
    assert (dict(found.insights[0].segment), dict(found.insights[0].tag)) == ({"level": "platinum"}, {"tone": "loud"})
    assert found.insights[0].importance["ebm"] > 0


def test_a_heat_map_that_contradicts_its_own_test_does_not_say_which_way_it_is() -> None:
    model = boosted(taste(20_000, 23, 0.9), outer_bags=2)
    reversed_ = replace(model, joint=tuple(-scores for scores in model.joint))
    own, other = module._candidates(model), module._candidates(reversed_)
    assert {(c.segment, c.tag) for c in own} == {(c.segment, c.tag) for c in other}
    assert own[0].importance is not None
    assert next(c for c in other if (c.segment, c.tag) == (own[0].segment, own[0].tag)).importance is None


def test_where_nobody_has_a_taste_nothing_is_found() -> None:
    found = ebm(taste(20_000, 1, 0.0), outer_bags=3)
    assert found.insights == []
    assert found.shapes  # and yet there are shapes
    assert all(np.nanmax(np.abs(m.effect)) < 0.3 for m in found.heat_maps)


def test_what_is_discovered_owes_nothing_to_the_half_that_confirms() -> None:
    coded = taste(12_000, 2, 1.0)
    rng = np.random.default_rng(0)
    _, confirmation = halves(replace(coded, reward=np.arange(len(coded), dtype=float)))
    shuffled = coded.reward.copy()
    rows = confirmation.reward.astype(int)
    shuffled[rows] = rng.permutation(shuffled[rows])
    one, other = ebm(coded, outer_bags=3), ebm(replace(coded, reward=shuffled), outer_bags=3)
    assert one.candidates == other.candidates
    assert one.insights
    assert other.insights == []


def test_the_same_seed_says_the_same() -> None:
    coded = taste(6_000, 3, 0.5)
    one, other = boosted(coded, outer_bags=3), boosted(coded, outer_bags=3)
    assert all(np.array_equal(a, b) for a, b in zip(one.main + one.joint, other.main + other.joint, strict=True))


def test_shapes_are_the_effects_with_bands_that_hold_them() -> None:
    shapes = shape_of(boosted(taste(60_000, 4, 0.0)), "city")
    other = (shapes["b"][0] + shapes["c"][0]) / 2
    assert shapes["a"][0] - other == pytest.approx(0.3, abs=0.08)
    for label, truth in {"a": 0.2, "b": -0.1, "c": -0.1}.items():
        effect, low, high = shapes[label]
        assert low < truth < high
        assert high - low == pytest.approx(2 * (effect - low))
        assert 0.01 < high - low < 0.3


def test_logits_are_those_of_the_fitted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    coded, seen = numbers_and_texts(8_000, 5), dict[str, Any]()
    fit = module._fit

    def spied(rows: Coded, codes: Any, axes: Any, used: Any, pairs: Any, start: Any, settings: Any, seed: int) -> Any:
        model = fit(rows, codes, axes, used, pairs, start, settings, seed)
        model.term_scores_ = [scores.mean(axis=0) for scores in model.bagged_scores_]  # bags count alike here
        model.intercept_ = np.array([model.bagged_intercept_.mean()])
        columns = np.stack([codes[i].astype(float) for i in used], axis=1)
        for column, i in enumerate(used):
            if axes[i].missing is not None:
                columns[codes[i] == axes[i].missing, column] = np.nan
        before = Sums(rows).linear(start.columns.mean(axis=1), start.strata)
        seen["logit"] = before + model.decision_function(columns)
        return model

    monkeypatch.setattr(module, "_fit", spied)
    model = boosted(coded, outer_bags=3)
    assert any(model.axes[i].name == "age" for i, _ in model.pairs)
    assert {axis.name for axis in model.axes} == {"age", "city", "tone", "style", "extras"}
    np.testing.assert_allclose(model.logit(coded), seen["logit"], atol=1e-6)


def test_heat_maps_say_nothing_that_shapes_say() -> None:
    model = boosted(numbers_and_texts(8_000, 6), outer_bags=2)
    for scores, n in zip(model.joint, model.joint_n, strict=True):
        effect = scores.mean(axis=0)
        assert np.abs((effect * n).sum(axis=0)).max() < 1e-6 * n.sum()
        assert np.abs((effect * n).sum(axis=1)).max() < 1e-6 * n.sum()


def lookalikes(n: int, seed: int, alike: float) -> list[tuple[str, str]]:
    """The pairs boosted where women like loud, and another field is like gender."""
    rng = np.random.default_rng(seed)
    female, variant = rng.random(n) < 0.5, rng.integers(0, 6, n)
    copy = np.where(rng.random(n) < alike, female, rng.random(n) < 0.5)
    reward = rng.random(n) < expit(-1.5 + 0.8 * female * np.isin(variant, (2, 3)))
    user = {"gender": np.where(female, "f", "m").tolist(), "copy": np.where(copy, "x", "y").tolist()}
    model = boosted(code(log_of(user, TAGS, variant, reward), dependent=False), outer_bags=2)
    return [(model.axes[i].name, model.axes[j].name) for i, j in model.pairs]


def test_what_another_field_seems_to_do_is_no_heat_map_where_one_field_explains_it() -> None:
    pairs = lookalikes(30_000, 21, 0.7)
    assert pairs[0] == ("gender", "tone")
    assert ("copy", "tone") not in pairs


def test_of_two_fields_that_cannot_be_told_apart_both_have_heat_maps() -> None:
    pairs = lookalikes(8_000, 22, 0.995)
    assert {("gender", "tone"), ("copy", "tone")} <= set(pairs)


def test_strata_do_not_pass_for_the_tags_they_were_shown_with() -> None:
    rng = np.random.default_rng(7)
    n = 20_000
    rich = rng.random(n) < 0.5
    loud = rng.random(n) < np.where(rich, 0.8, 0.2)  # shown where people click more, and liked less
    variant = np.where(loud, 2, 0) + rng.integers(0, 2, n)
    reward = rng.random(n) < expit(-2 + 1.5 * rich - 0.4 * loud)
    product = np.where(rich, "rich", "poor").tolist()
    user = {"gender": np.array(["f", "m"])[rng.integers(0, 2, n)].tolist()}
    tone = shape_of(boosted(code(log_of(user, TAGS, variant, reward, product=product), dependent=False)), "tone")
    assert reward[loud].mean() > reward[~loud].mean()
    assert tone["loud"][0] - tone["calm"][0] == pytest.approx(-0.4, abs=0.15)


def test_rows_count_with_their_weights() -> None:
    coded = taste(20_000, 8, 0.0)
    loud = np.isin(coded.variant, (2, 3))
    weight = np.where(loud & (coded.reward == 1), 2.0, 1.0)  # twice the odds of a click on loud
    plain, weighted = boosted(coded, outer_bags=2), boosted(replace(coded, weight=weight, weighted=True), outer_bags=2)

    def lift(model: Boosted) -> float:
        tone = shape_of(model, "tone")
        return tone["loud"][0] - tone["calm"][0]

    assert lift(weighted) - lift(plain) == pytest.approx(np.log(2), abs=0.1)


def test_identical_rows_may_be_one_that_counts_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(9)
    n = 20_000
    variant, female = rng.integers(0, 6, n), rng.random(n) < 0.5
    reward = rng.random(n) < expit(-1 + 0.8 * female * np.isin(variant, (2, 3)))
    user = {"gender": np.where(female, "f", "m").tolist()}
    coded = code(log_of(user, TAGS, variant, reward), dependent=False)
    few = boosted(coded, outer_bags=3)
    rows = list[int]()
    fit = module._distinct
    monkeypatch.setattr(module, "_distinct", lambda *a: (rows.append(len(fit(*a)[0])), fit(*a))[1])
    boosted(coded, outer_bags=3)
    monkeypatch.setattr(module, "_distinct", lambda coded, codes, start: (np.arange(len(coded)), coded.size))
    every = boosted(coded, outer_bags=3)
    assert rows[0] <= 2 * 2 * 6 * 3
    np.testing.assert_allclose(few.logit(coded), every.logit(coded), atol=0.05)


def test_all_rows_of_a_unit_are_held_out_by_the_same_bag() -> None:
    coded = code(liking(4_000, 10, 0.5, rows_per_unit=5)[0], dependent=False)
    rows, fold = module._dealt(coded, 8)
    assert rows.unit is not None
    assert {len(np.unique(fold[rows.unit == u])) for u in range(200)} == {1}
    assert len(np.unique(fold)) == 8


def test_several_values_of_a_dimension_are_one_axis_until_there_are_too_many() -> None:
    coded = numbers_and_texts(500, 11)
    extras = next(axis for axis in module._axes(coded) if axis.name == "extras")
    assert set(extras.labels) == {"none", "badge", "price", "badge|price"}
    rng = np.random.default_rng(0)
    many = {"words": [[f"w{i}" for i in np.flatnonzero(row)] for row in rng.random((200, 8)) < 0.5]}
    variant = rng.integers(0, 200, 4_000)
    log = log_of({"x": rng.normal(size=4_000)}, many, variant, rng.random(4_000) < 0.3)
    names = [axis.name for axis in module._axes(code(log, dependent=False))]
    assert names == ["x", *(f"words=w{i}" for i in range(8))]


def test_dimensions_that_are_never_apart_are_one_axis() -> None:
    tags = {"tone": [["calm"], ["loud"]] * 3, "colour": [["blue"], ["red"]] * 3}
    rng = np.random.default_rng(1)
    variant = rng.integers(0, 6, 1_000)
    log = log_of({"x": rng.normal(size=1_000)}, tags, variant, rng.random(1_000) < 0.4)
    assert [axis.name for axis in module._axes(code(log, dependent=False))] == ["x", "tone & colour"]


def test_a_log_with_hardly_a_click_has_no_shapes_and_no_insights() -> None:
    found = ebm(taste(300, 12, 0.5))
    assert (found.insights, found.shapes, found.heat_maps, found.auc) == ([], (), (), None)


def test_a_log_of_few_units_has_no_shapes_and_no_insights() -> None:
    coded = code(liking(2_000, 12, 0.5, rows_per_unit=100)[0], dependent=False)
    found = ebm(coded)
    assert (found.insights, found.shapes) == ([], ())


def test_units_that_cannot_be_parted_cannot_be_boosted() -> None:
    coded = code(liking(300, 12, 0.5, rows_per_unit=300)[0], dependent=False)
    with pytest.raises(LogError, match="too few"):
        boosted(coded)


def test_a_number_of_one_value_that_is_often_missing_is_a_shape() -> None:
    rng = np.random.default_rng(19)
    known, variant = rng.random(4_000) < 0.5, rng.integers(0, 6, 4_000)
    reward = rng.random(4_000) < expit(-1 + 1.0 * known)
    log = log_of({"visited": np.where(known, 1.0, np.nan)}, TAGS, variant, reward)
    shape = shape_of(boosted(code(log, dependent=False), outer_bags=3), "visited")
    assert len(shape) == 2
    assert shape["[-inf, inf)"][0] - shape["missing"][0] == pytest.approx(1.0, abs=0.25)


def test_a_log_whose_users_do_not_vary_has_shapes_of_its_dimensions() -> None:
    rng = np.random.default_rng(20)
    variant = rng.integers(0, 6, 2_000)
    coded = code(log_of({"x": np.ones(2_000)}, TAGS, variant, rng.random(2_000) < 0.3), dependent=False)
    found = ebm(coded, outer_bags=2)
    assert [shape.name for shape in found.shapes] == ["tone", "style"]
    assert found.heat_maps == ()


def test_a_log_without_clicks_cannot_be_boosted() -> None:
    coded = taste(300, 13, 0.5)
    with pytest.raises(ValueError, match="with and without a click"):
        boosted(replace(coded, reward=np.zeros(len(coded))))


def test_one_bag_has_no_bands() -> None:
    with pytest.raises(ValueError, match="outer_bags is 1"):
        boosted(taste(300, 14, 0.5), outer_bags=1)


class TestOfNetwork:
    def logits(self, coded: Coded, taste: float) -> Array:
        """Of a network that knows city, tone, product, and how much women like loud."""
        female, city = coded.codes[0] == 0, coded.codes[2] == 0
        loud = np.isin(coded.variant, (2, 3))
        return np.asarray(-2 + 0.5 * city + 0.3 * loud + taste * female * loud, np.float64)

    def test_a_network_of_main_effects_has_no_heat_maps_worth_the_name(self) -> None:
        coded = taste(6_000, 15, 0.0)
        found = ebm_of_network(coded, self.logits(coded, 0.0))
        assert found.fidelity.r2 == pytest.approx(1, abs=0.01)
        assert found.fidelity.r2_main == pytest.approx(1, abs=0.01)
        assert found.fidelity.interaction_share < 0.01

    def test_what_it_learned_of_pairs_is_in_the_heat_map(self) -> None:
        coded = taste(6_000, 16, 0.0)
        found = ebm_of_network(coded, self.logits(coded, 1.0))
        first = found.heat_maps[0]
        assert (first.field, first.dimension) == ("gender", "tone")
        women, loud = first.rows.index("f"), first.columns.index("loud")
        assert first.effect[women, loud] == pytest.approx(0.5 * 2 / 3, abs=0.05)
        fidelity = found.fidelity
        assert fidelity.r2 is not None
        assert fidelity.r2_main is not None
        assert fidelity.r2 > 0.98
        assert fidelity.r2_main < 0.9
        assert fidelity.interaction_share == pytest.approx(1 - fidelity.r2_main, abs=0.03)
        assert fidelity.of_the_rest is not None
        assert fidelity.of_the_rest > 0.9

    def test_what_fields_and_dimensions_cannot_say_is_missing_from_the_fidelity(self) -> None:
        coded = taste(6_000, 17, 0.0)
        noise = np.random.default_rng(0).normal(size=len(coded))
        fidelity = ebm_of_network(coded, noise).fidelity
        assert fidelity.r2 is not None
        assert fidelity.r2 < 0.02

    def test_a_network_that_says_the_same_of_all_has_no_fidelity(self) -> None:
        coded = taste(2_000, 18, 0.0)
        fidelity = ebm_of_network(coded, np.full(len(coded), -1.0)).fidelity
        assert fidelity.r2 is None
        assert fidelity.interaction_share == 0
