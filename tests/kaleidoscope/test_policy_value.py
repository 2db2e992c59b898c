"""Estimators against worlds whose truth is known: exact expectations where they can be enumerated, simulation else."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kaleidoscope.policy_value import (
    Estimate,
    LoggedRows,
    Scores,
    Support,
    Weighting,
    choose_weighting,
    dr_scores,
    estimate,
    gain,
    gains_over_simpler,
    greedy,
    ips_scores,
    permutation_p,
    policy_weights,
    snips_scores,
    tag_combination,
    tag_features,
    uniform_weights,
    verdict,
)
from kaleidoscope.vocabulary import Policy, Verdict

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class FakeSupport:
    choice_set: Array
    indptr: Array
    variant: Array
    probability: Array


def one_set(n: int, probability: Array) -> FakeSupport:
    m = len(probability)
    return FakeSupport(np.zeros(n, np.int64), np.array([0, m]), np.arange(m), probability)


def for_sets(support: Support, choice_set: Array) -> Support:
    return FakeSupport(choice_set, support.indptr, support.variant, support.probability)


def logged_rows(
    reward: Array,
    logged: Array,
    propensity: Array,
    support: Support,
    unit: Array | None = None,
    count: Array | None = None,
) -> LoggedRows:
    ones = np.ones(len(reward))
    return LoggedRows(reward * 1.0, logged, propensity, ones if count is None else count * 1.0, ones, unit, support)


# ── a small world: 3 choice sets, 5 variants of which some are ineligible, 4 kinds of user ──

SETS = [np.array([0, 1, 2, 3]), np.array([1, 2, 4]), np.array([0, 4])]
SET_P = [np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.5, 0.25, 0.2]), np.array([0.7, 0.3])]  # set 1: .05 is ineligible
MU = 0.15 + 0.5 * np.random.default_rng(5).random((3, 4, 5))  # P(reward | set, kind, variant)
PICK = np.array([[0, 1, 3, 2], [4, 4, 1, 2], [0, 0, 4, 4]])  # the policy under test
TRUTH = float(MU[np.arange(3)[:, None], np.arange(4), PICK].mean())
UNIFORM_TRUTH = float(np.mean([MU[s][:, SETS[s]].mean() for s in range(3)]))


@dataclass(frozen=True)
class World:
    rows: LoggedRows
    set_: Array
    kind: Array
    chosen: Array

    def right_q(self, variant: Array) -> Array:
        return np.asarray(MU[self.set_, self.kind, variant])

    def wrong_q(self, variant: Array) -> Array:
        return 0.9 - 0.15 * variant - 0.1 * self.kind


def small_world(rng: np.random.Generator, n: int = 2000, user_dependent: bool = False) -> World:
    """One simulated log; with `user_dependent`, kind k draws by its own (known) propensities, tilted from the set's."""
    set_, kind = rng.integers(0, 3, n), rng.integers(0, 4, n)
    table = np.zeros((3, 4, 5))
    for s in range(3):
        for k in range(4):
            tilt = np.roll(np.linspace(1.6, 0.4, len(SETS[s])), k) if user_dependent else np.ones(len(SETS[s]))
            table[s, k, SETS[s]] = SET_P[s] * tilt / (SET_P[s] * tilt).sum() * SET_P[s].sum()
    table[1, :, 3] = 1 - SET_P[1].sum()  # drawn at times, but not eligible
    cumulative = table.cumsum(axis=2)[set_, kind]
    logged = (rng.random(n)[:, None] > cumulative).sum(axis=1).clip(0, 4)
    reward = rng.random(n) < MU[set_, kind, logged]
    support = FakeSupport(set_, np.cumsum([0, *map(len, SETS)]), np.concatenate(SETS), np.concatenate(SET_P))
    rows = logged_rows(reward, logged, table[set_, kind, logged], support)
    return World(rows, set_, kind, PICK[set_, kind])


def dr(world: World, q: Callable[[Array], Array], **how: Any) -> Scores:
    return dr_scores(policy_weights(world.rows, world.chosen, **how), q(world.chosen), q(world.rows.logged))


def uniform_q(world: World, q: Callable[[Array], Array]) -> Array:
    everything = np.stack([q(np.full(len(world.kind), v)) for v in range(5)], axis=1)
    eligible = np.array([[v in s for v in range(5)] for s in SETS])[world.set_]
    return np.asarray(everything.mean(axis=1, where=eligible))


def dr_uniform(world: World, q: Callable[[Array], Array]) -> Scores:
    return dr_scores(uniform_weights(world.rows), uniform_q(world, q), q(world.rows.logged))


def z_of_bias(values: Array, truth: float) -> float:
    return float((values.mean() - truth) / (values.std(ddof=1) / np.sqrt(len(values))))


def value(scores: Scores) -> float:
    found = estimate(scores)
    assert found is not None
    return found.value


ESTIMATORS: dict[str, tuple[Callable[[World], Scores], float]] = {
    "dr, wrong q": (lambda w: dr(w, w.wrong_q), TRUTH),
    "dr, right q": (lambda w: dr(w, w.right_q), TRUTH),
    "ips": (lambda w: ips_scores(policy_weights(w.rows, w.chosen)), TRUTH),
    "snips": (lambda w: snips_scores(policy_weights(w.rows, w.chosen)), TRUTH),
    "uniform dr, wrong q": (lambda w: dr_uniform(w, w.wrong_q), UNIFORM_TRUTH),
    "uniform ips": (lambda w: ips_scores(uniform_weights(w.rows)), UNIFORM_TRUTH),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("user_dependent", [False, True])
def test_bias_is_within_its_error(name: str, user_dependent: bool) -> None:
    scores, truth = ESTIMATORS[name]
    rng = np.random.default_rng(11)
    values = np.array([value(scores(small_world(rng, 4000, user_dependent))) for _ in range(60)])
    assert abs(z_of_bias(values, truth)) < 3.5
    assert values.std() < 0.05


def test_dr_survives_one_wrong_model_but_not_two() -> None:
    rng = np.random.default_rng(12)
    right_q, wrong_q, ips = [], [], []
    for _ in range(60):
        world = small_world(rng, 4000, user_dependent=True)
        wrong = replace(world, rows=replace(world.rows, propensity=np.full(4000, 0.25)))
        right_q.append(value(dr(wrong, wrong.right_q)))
        wrong_q.append(value(dr(wrong, wrong.wrong_q)))
        ips.append(value(ips_scores(policy_weights(wrong.rows, wrong.chosen))))
    assert abs(z_of_bias(np.array(right_q), TRUTH)) < 3.5
    assert abs(z_of_bias(np.array(wrong_q), TRUTH)) > 8
    assert abs(z_of_bias(np.array(ips), TRUTH)) > 8


# ── coverage ──


def covers(found: Estimate | None, truth: float) -> bool:
    assert found is not None
    return found.ci_low <= truth <= found.ci_high


COVERED: dict[str, Callable[[World], tuple[Estimate | None, float]]] = {
    "dr, wrong q": lambda w: (estimate(dr(w, w.wrong_q)), TRUTH),
    "dr, right q": lambda w: (estimate(dr(w, w.right_q)), TRUTH),
    "ips": lambda w: (estimate(ips_scores(policy_weights(w.rows, w.chosen))), TRUTH),
    "snips": lambda w: (estimate(snips_scores(policy_weights(w.rows, w.chosen))), TRUTH),
    "uniform": lambda w: (estimate(dr_uniform(w, w.wrong_q)), UNIFORM_TRUTH),
    "gain": lambda w: (gain(dr(w, w.wrong_q), dr_uniform(w, w.wrong_q)), TRUTH - UNIFORM_TRUTH),
}


def coverage(simulations: int, n: int, seed: int) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    hits = dict.fromkeys(COVERED, 0)
    for _ in range(simulations):
        world = small_world(rng, n)
        for name, look in COVERED.items():
            hits[name] += covers(*look(world))
    return {name: hit / simulations for name, hit in hits.items()}


def test_intervals_cover_the_truth() -> None:
    shares = coverage(250, 1200, seed=1)
    assert all(0.91 <= share <= 0.985 for share in shares.values()), shares


@pytest.mark.slow
def test_intervals_cover_the_truth_at_the_nominal_rate() -> None:
    shares = coverage(3000, 1200, seed=2)
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


def clustered_world(rng: np.random.Generator, units: int, per_unit: int) -> World:
    """Units with their own taste level and their own choice, each with many rows."""
    world = small_world(rng, units * per_unit)
    unit = np.repeat(np.arange(units), per_unit)
    set_, kind = np.repeat(rng.integers(0, 3, units), per_unit), np.repeat(rng.integers(0, 4, units), per_unit)
    logged = np.empty(len(unit), np.int64)
    p = np.empty(len(unit))
    for s in range(3):
        inside = np.flatnonzero(set_ == s)
        place = rng.choice(len(SETS[s]), len(inside), p=SET_P[s] / SET_P[s].sum())
        logged[inside], p[inside] = SETS[s][place], (SET_P[s] / SET_P[s].sum())[place]
    level = np.repeat(rng.uniform(-0.15, 0.15, units), per_unit)
    reward = rng.random(len(unit)) < MU[set_, kind, logged] + level
    order = rng.permutation(len(unit))
    rows = logged_rows(reward[order], logged[order], p[order], for_sets(world.rows.support, set_[order]), unit[order])
    return World(rows, set_[order], kind[order], PICK[set_, kind][order])


def clustered_coverage(simulations: int, seed: int) -> tuple[float, float]:
    """Coverage with errors by unit and with (wrong) errors by row."""
    rng = np.random.default_rng(seed)
    by_unit = by_row = 0
    for _ in range(simulations):
        world = clustered_world(rng, 60, 40)
        naive = replace(world, rows=replace(world.rows, unit=None))
        by_unit += covers(estimate(dr(world, world.right_q)), TRUTH)
        by_row += covers(estimate(dr(naive, naive.right_q)), TRUTH)
    return by_unit / simulations, by_row / simulations


def test_errors_by_unit_cover_where_errors_by_row_do_not() -> None:
    by_unit, by_row = clustered_coverage(250, seed=3)
    assert 0.91 <= by_unit <= 0.985
    assert by_row < 0.85


@pytest.mark.slow
def test_errors_by_unit_cover_at_the_nominal_rate() -> None:
    by_unit, by_row = clustered_coverage(2000, seed=4)
    assert 0.93 <= by_unit <= 0.97
    assert by_row < 0.85


@pytest.mark.slow
def test_few_units_of_very_different_size_still_cover() -> None:
    rng = np.random.default_rng(6)
    sizes = np.array([400, 300, *[60] * 18])
    unit = np.repeat(np.arange(len(sizes)), sizes)
    hits = 0
    for _ in range(2000):
        level = rng.uniform(-0.2, 0.2, len(sizes))
        reward = rng.random(len(unit)) < 0.4 + level[unit]
        logged = rng.integers(0, 2, len(unit))
        rows = logged_rows(reward, logged, np.full(len(unit), 0.5), one_set(len(unit), np.full(2, 0.5)), unit)
        hits += covers(estimate(snips_scores(policy_weights(rows, np.zeros(len(unit), np.int64)))), 0.4)
    assert 0.93 <= hits / 2000 <= 0.975


def null_world_claims(simulations: int, folds: int, arms: int, seed: int) -> tuple[float, float]:
    """How often a cross-fitted best_single of equal arms claims a gain: with the fold correction, and without."""
    rng = np.random.default_rng(seed)
    n, corrected, naive = 3000, 0, 0
    for _ in range(simulations):
        logged, fold, reward = rng.integers(0, arms, n), rng.integers(0, folds, n), rng.random(n) < 0.2
        shape = (folds, arms)
        seen, won = (np.bincount(fold * arms + logged, w, folds * arms).reshape(shape) for w in (np.ones(n), reward))
        q = (won.sum(axis=0) - won) / (seen.sum(axis=0) - seen)
        rows = logged_rows(reward, logged, np.full(n, 1 / arms), one_set(n, np.full(arms, 1 / arms)))
        q_logged = q[fold, logged]
        best = dr_scores(policy_weights(rows, q.argmax(axis=1)[fold]), q.max(axis=1)[fold], q_logged)
        uniform = dr_scores(uniform_weights(rows), q.mean(axis=1)[fold], q_logged)
        found, unaware = gain(best, uniform, folds), gain(best, uniform)
        assert found is not None
        assert unaware is not None
        corrected, naive = corrected + (found.ci_low > 0), naive + (unaware.ci_low > 0)
    return corrected / simulations, naive / simulations


def test_a_cross_fitted_best_single_claims_little_in_a_null_world() -> None:
    corrected, naive = null_world_claims(500, 3, 4, seed=8)
    assert corrected <= 0.045
    assert naive > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("folds", "arms"), [(2, 4), (3, 2), (3, 4), (3, 10), (5, 4), (5, 10)])
def test_a_cross_fitted_best_single_claims_at_most_the_nominal_rate_in_a_null_world(folds: int, arms: int) -> None:
    corrected, naive = null_world_claims(2000, folds, arms, seed=9)
    assert corrected <= 0.045  # nominal .025, and two and a half errors of the worst true rate, .036
    assert naive > corrected


# ── many variants ──


@dataclass(frozen=True)
class Expectation:
    """Every (kind of user, set, variant) once, its probability of being logged as count: sums are expectations.

    `share` (kinds, nnz) says how the exposures of each entry split over the kinds: where that differs from entry to
    entry, the (known) propensities depend on the user.
    """

    sets: list[Array]
    probabilities: list[Array]
    share: Array

    @property
    def group(self) -> Array:
        """(n,) the (kind, set) of each row."""
        sizes, kinds = [len(v) for v in self.sets], len(self.share)
        return np.repeat(np.arange(kinds * len(self.sets)), np.tile(sizes, kinds))

    @property
    def rows(self) -> LoggedRows:
        variant, p = np.concatenate(self.sets), np.concatenate(self.probabilities)
        count, kinds = (self.share * p).ravel(), len(self.share)
        support = FakeSupport(self.group % len(self.sets), np.cumsum([0, *map(len, self.sets)]), variant, p)
        propensity = count / np.bincount(self.group, count)[self.group]
        return logged_rows(np.zeros(len(count)), np.tile(variant, kinds), propensity, support, count=count)

    def expected(self, effect: Array, weights: Array) -> Array:
        """(kinds * sets,) the mean of weight × effect over the logging policy."""
        rows = self.rows
        sums = np.bincount(self.group, rows.count * weights * effect[rows.logged])
        return np.asarray(sums / np.bincount(self.group, rows.count))


Case = tuple[Array, Expectation, Expectation, np.random.Generator]


@st.composite
def tagged_sets(draw: st.DrawFn) -> Case:
    """Random tags; 1–3 choice sets of random variants with random probabilities, for one and for two kinds of user."""
    n = draw(st.integers(2, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tags = rng.integers(-1, draw(st.integers(1, 4)), (n, draw(st.integers(1, 4))))  # -1: no tag
    sets = [rng.permutation(n)[: rng.integers(1, n + 1)] for _ in range(draw(st.integers(1, 3)))]
    p = [rng.dirichlet(np.full(len(v), 2.0)) * 0.9 + 0.1 / len(v) for v in sets]
    share = rng.uniform(0.1, 0.9, sum(map(len, sets)))
    one = Expectation(sets, p, np.ones((1, len(share))))
    return tags, one, Expectation(sets, p, np.stack([share, 1 - share])), rng


@given(tagged_sets())
@settings(deadline=None, max_examples=80)
def test_weights_are_exactly_unbiased_where_their_assumption_holds(case: Case) -> None:
    tags, *worlds, rng = case
    features = tag_features(tags)
    left_over = {
        Weighting.MATCHED: rng.normal(size=len(tags)),
        Weighting.MARGINALISED: rng.normal(size=len(tags))[tag_combination(features)],
        Weighting.PSEUDO_INVERSE: 0.3 + features @ rng.normal(size=features.shape[1]),
    }
    for world in worlds:
        pick = np.array([rng.choice(v) for v in world.sets * len(world.share)])
        for weighting, effect in left_over.items():
            weights = policy_weights(world.rows, pick[world.group], weighting, features).value
            np.testing.assert_allclose(world.expected(effect, weights), effect[pick], atol=1e-7)
        anything = left_over[Weighting.MATCHED]
        uniform = world.expected(anything, uniform_weights(world.rows).value)
        np.testing.assert_allclose(uniform, [anything[v].mean() for v in world.sets * len(world.share)], atol=1e-9)


@given(tagged_sets())
@settings(deadline=None, max_examples=40)
def test_weightings_agree_where_they_must(case: Case) -> None:
    tags, world, *_ = case
    rows = world.rows
    chosen = np.array([v[0] for v in world.sets])[rows.support.choice_set]
    own_tag = tag_features(np.arange(len(tags))[:, None])
    combined = tag_features(tag_combination(tag_features(tags))[:, None])
    matched = policy_weights(rows, chosen).value
    np.testing.assert_allclose(
        policy_weights(rows, chosen, Weighting.PSEUDO_INVERSE, own_tag).value, matched, atol=1e-7
    )
    np.testing.assert_allclose(policy_weights(rows, chosen, Weighting.MARGINALISED, own_tag).value, matched)
    np.testing.assert_allclose(
        policy_weights(rows, chosen, Weighting.PSEUDO_INVERSE, combined).value,
        policy_weights(rows, chosen, Weighting.MARGINALISED, combined).value,
        atol=1e-7,
    )


SLOT_TAGS = np.stack(np.meshgrid(*[np.arange(10)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
SLOT_EFFECT = np.random.default_rng(9).uniform(-0.04, 0.04, (4, 3, 10))  # (kind, slot, material)
SLOT_MU = 0.2 + SLOT_EFFECT[:, np.arange(3), SLOT_TAGS].sum(axis=2)  # (kind, variant)


def slot_world(rng: np.random.Generator, n: int) -> tuple[LoggedRows, Array]:
    kind, logged = rng.integers(0, 4, n), rng.integers(0, 1000, n)
    reward = rng.random(n) < SLOT_MU[kind, logged]
    rows = logged_rows(reward, logged, np.full(n, 1e-3), one_set(n, np.full(1000, 1e-3)))
    return rows, SLOT_MU.argmax(axis=1)[kind]


def slot_scores(rng: np.random.Generator, n: int) -> tuple[Scores, Scores, Scores]:
    rows, chosen = slot_world(rng, n)
    matched, pseudo = (
        policy_weights(rows, chosen, weighting, tag_features(SLOT_TAGS))
        for weighting in (Weighting.MATCHED, Weighting.PSEUDO_INVERSE)
    )
    q = 0.1 + 0.1 * (SLOT_TAGS[:, 0] == 3)  # wrong, but what it leaves over is additive
    return ips_scores(matched), ips_scores(pseudo), dr_scores(pseudo, q[chosen], q[rows.logged])


def test_pseudo_inverse_is_unbiased_and_far_less_noisy_than_ips_in_a_slot_world() -> None:
    rng = np.random.default_rng(10)
    truth = float(SLOT_MU.max(axis=1).mean())
    means = np.array([[scores.value.mean() for scores in slot_scores(rng, 20_000)] for _ in range(60)])
    for column in means.T:
        assert abs(z_of_bias(column, truth)) < 3.5
    ips, pseudo, doubly_robust = means.var(axis=0)
    assert ips / pseudo > 15  # 1000 variants against a rank of 28
    assert ips / doubly_robust > 15


def test_pseudo_inverse_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(13)
    truth = float(SLOT_MU.max(axis=1).mean())
    hits = sum(covers(estimate(slot_scores(rng, 20_000)[2]), truth) for _ in range(150))
    assert 0.90 <= hits / 150 <= 0.99


@pytest.mark.slow
def test_pseudo_inverse_intervals_cover_the_truth_at_the_nominal_rate() -> None:
    rng = np.random.default_rng(14)
    truth = float(SLOT_MU.max(axis=1).mean())
    hits = sum(covers(estimate(slot_scores(rng, 20_000)[2]), truth) for _ in range(1500))
    assert 0.93 <= hits / 1500 <= 0.97


def test_each_weighting_fails_where_its_assumption_does() -> None:
    tags = np.array([[0, 0], [0, 1], [1, 0], [1, 1], [1, 1]])
    rows = Expectation([np.arange(5)], [np.array([0.3, 0.2, 0.2, 0.2, 0.1])], np.ones((1, 5))).rows
    features = tag_features(tags)
    interaction, material = np.array([1.0, 0, 0, 1, 1]), np.array([0.0, 0, 0, 1, 0])

    def bias(effect: Array, weighting: Weighting) -> float:
        weights = policy_weights(rows, np.full(5, 3), weighting, features)
        return float(abs(rows.count @ (weights.value * effect[rows.logged]) - effect[3]))

    assert bias(interaction, Weighting.PSEUDO_INVERSE) > 0.1
    assert bias(interaction, Weighting.MARGINALISED) < 1e-9
    assert bias(material, Weighting.MARGINALISED) > 0.1
    assert bias(material, Weighting.MATCHED) < 1e-9


def test_weighting_is_chosen_by_support_not_by_outcome() -> None:
    n = 50_000
    rng = np.random.default_rng(15)
    reward = rng.random(n) < 0.3

    def chosen_with(variants: int, tags: Array | None) -> Weighting:
        support = one_set(n, np.full(variants, 1 / variants))
        rows = logged_rows(reward, rng.integers(0, variants, n), np.full(n, 1 / variants), support)
        return choose_weighting(rows, None if tags is None else tag_features(tags))

    assert chosen_with(10, SLOT_TAGS[:10]) is Weighting.MATCHED
    assert chosen_with(1000, SLOT_TAGS) is Weighting.PSEUDO_INVERSE
    assert chosen_with(1000, SLOT_TAGS[:, :1]) is Weighting.MARGINALISED
    assert chosen_with(1000, None) is Weighting.MATCHED


def test_the_probabilities_of_a_set_may_be_estimated() -> None:
    """Known propensities, set probabilities from the log's own shares: the mean weight is 1, in every sample."""
    rng = np.random.default_rng(30)
    n = 3000
    logged, chosen = rng.integers(0, 1000, n), np.zeros(n, np.int64)
    seen = np.bincount(logged, minlength=1000)
    chosen[:] = np.flatnonzero(seen)[0]
    support = FakeSupport(
        np.zeros(n, np.int64), np.array([0, (seen > 0).sum()]), np.flatnonzero(seen), seen[seen > 0] / n
    )
    rows = logged_rows(np.zeros(n), logged, np.full(n, 1e-3), support)
    for weighting in (Weighting.MARGINALISED, Weighting.PSEUDO_INVERSE):
        assert policy_weights(rows, chosen, weighting, tag_features(SLOT_TAGS)).value.mean() == pytest.approx(1)


def test_tag_features_and_combinations() -> None:
    tags = np.array([[0, 1], [0, 2], [0, 1], [1, -1], [-1, -1]])
    features = tag_features(tags).toarray()
    shared = [[2, 1, 2, 0, 0], [1, 2, 1, 0, 0], [2, 1, 2, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(features @ features.T, shared)
    np.testing.assert_array_equal(tag_combination(tag_features(tags)), [0, 1, 0, 2, 3])


# ── exactness ──


def scores_of(world: World) -> list[Scores]:
    weights = policy_weights(world.rows, world.chosen)
    return [dr(world, world.wrong_q), ips_scores(weights), snips_scores(weights), dr_uniform(world, world.wrong_q)]


def take(world: World, index: Array, count: Array) -> World:
    rows = world.rows
    support = for_sets(rows.support, rows.support.choice_set[index])
    unit = None if rows.unit is None else rows.unit[index]
    part = logged_rows(rows.reward[index], rows.logged[index], rows.propensity[index], support, unit, count)
    return World(part, world.set_[index], world.kind[index], world.chosen[index])


def assert_same(a: Estimate | None, b: Estimate | None) -> None:
    assert a is not None
    assert b is not None
    np.testing.assert_allclose(astuple(a)[:7], astuple(b)[:7], rtol=1e-10)


@pytest.mark.parametrize("by_unit", [True, False])
def test_aggregated_counts_equal_the_expanded_log(by_unit: bool) -> None:
    rng = np.random.default_rng(16)
    n = 800
    world = small_world(rng, n)
    world = replace(world, rows=replace(world.rows, unit=rng.integers(0, 90, n) if by_unit else None))
    count = rng.integers(0, 6, n)
    aggregated = take(world, np.arange(n), count)
    expanded = take(world, np.repeat(np.arange(n), count), np.ones(count.sum()))
    for a, b in zip(scores_of(aggregated), scores_of(expanded), strict=True):
        assert_same(estimate(a), estimate(b))
    (a, *_, b), (c, *_, d) = scores_of(aggregated), scores_of(expanded)
    assert_same(gain(a, b), gain(c, d))


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=10)
def test_row_order_does_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    world = clustered_world(rng, 60, 40)
    shuffled = take(world, rng.permutation(2400), np.ones(2400))
    for a, b in zip(scores_of(world), scores_of(shuffled), strict=True):
        assert_same(estimate(a), estimate(b))


def test_unit_weights_and_codes_are_only_relative() -> None:
    world = clustered_world(np.random.default_rng(17), 60, 40)
    rows = world.rows
    assert rows.unit is not None
    scaled = replace(world, rows=replace(rows, weight=rows.weight * 3, unit=rows.unit * 5 + 2))
    assert_same(estimate(dr(world, world.wrong_q)), estimate(dr(scaled, scaled.wrong_q)))


def test_snips_knows_propensities_only_up_to_a_factor() -> None:
    world = small_world(np.random.default_rng(31))
    halved = replace(world.rows, propensity=world.rows.propensity / 2)
    a, b = (snips_scores(policy_weights(rows, world.chosen)) for rows in (world.rows, halved))
    assert_same(estimate(a), estimate(b))


# ── gain ──


def test_gain_of_policies_that_mostly_agree_is_surer_than_their_values() -> None:
    world = small_world(np.random.default_rng(18), 8000)
    other = world.chosen.copy()
    other[world.kind == 3] = np.array([1, 1, 4])[world.set_[world.kind == 3]]
    a, b = dr(world, world.wrong_q), dr(replace(world, chosen=other), world.wrong_q)
    paired, value_a, value_b = gain(a, b), estimate(a), estimate(b)
    assert paired is not None
    assert value_a is not None
    assert value_b is not None
    assert paired.value == pytest.approx(value_a.value - value_b.value)
    assert paired.se < 0.7 * np.hypot(value_a.se, value_b.se)


def test_gain_of_a_policy_over_itself_is_exactly_zero() -> None:
    world = small_world(np.random.default_rng(19))
    found = gain(dr(world, world.wrong_q), dr(world, world.wrong_q))
    assert found is not None
    assert (found.value, found.se, found.ci_low, found.ci_high) == (0, 0, 0, 0)


def test_gain_is_unknown_where_too_few_rows_tell_the_policies_apart() -> None:
    world = small_world(np.random.default_rng(20), 4000)
    other = world.chosen.copy()
    few = np.flatnonzero(world.set_ == 2)[:100]
    other[few] = np.where(other[few] == 0, 4, 0)
    assert estimate(dr(world, world.wrong_q)) is not None
    assert gain(dr(world, world.wrong_q), dr(replace(world, chosen=other), world.wrong_q)) is None


def test_gain_needs_the_same_rows() -> None:
    rng = np.random.default_rng(21)
    a, b = small_world(rng), small_world(rng)
    with pytest.raises(ValueError, match="same rows"):
        gain(dr(a, a.wrong_q), dr(b, b.wrong_q))


# ── null rules ──


def two_arms(matched: int, positives: int, unit: Array | None = None) -> Scores:
    """1,000 rows, of which `matched` logged the policy's arm, `positives` of them with a reward."""
    logged = (np.arange(1000) >= matched).astype(np.int64)
    reward = np.arange(1000) < positives
    rows = logged_rows(reward, logged, np.full(1000, 0.5), one_set(1000, np.full(2, 0.5)), unit)
    return ips_scores(policy_weights(rows, np.zeros(1000, np.int64)))


@pytest.mark.parametrize(
    ("matched", "positives", "known"), [(200, 30, True), (199, 30, False), (200, 29, False), (0, 0, False)]
)
def test_value_is_null_below_200_matched_rows_or_30_positives(matched: int, positives: int, known: bool) -> None:
    found = estimate(two_arms(matched, positives))
    assert (found is not None) == known
    if found is not None:
        assert (found.matched_rows, found.matched_positives) == (200, 30)
        assert found.ess == pytest.approx(200)
    assert (estimate(snips_scores(two_arms(matched, positives).weights)) is not None) == known


def test_value_is_null_with_a_single_unit_and_wide_with_two() -> None:
    assert estimate(two_arms(500, 100, np.zeros(1000, np.int64))) is None
    two, many = estimate(two_arms(500, 100, np.arange(1000) % 2)), estimate(two_arms(500, 100, np.arange(1000)))
    assert two is not None
    assert many is not None
    assert (two.ci_high - two.value) / two.se == pytest.approx(12.706, abs=0.01)
    assert (many.ci_high - many.value) / many.se == pytest.approx(1.965, abs=0.002)


def test_pseudo_inverse_evidence_is_the_effective_number_of_rows() -> None:
    rows, chosen = slot_world(np.random.default_rng(22), 50_000)
    found = estimate(ips_scores(policy_weights(rows, chosen, Weighting.PSEUDO_INVERSE, tag_features(SLOT_TAGS))))
    assert found is not None
    assert found.matched_rows == found.ess == pytest.approx(50_000 / 28, rel=0.1)
    assert found.matched_positives < 0.5 * found.matched_rows
    few = slot_world(np.random.default_rng(22), 3_000)
    assert estimate(ips_scores(policy_weights(*few, Weighting.PSEUDO_INVERSE, tag_features(SLOT_TAGS)))) is None


# ── input ──


@pytest.mark.parametrize(
    ("field", "wrong", "message"),
    [
        ("propensity", np.zeros(1000), "propensities"),
        ("propensity", np.full(1000, np.nan), "propensities"),
        ("count", np.full(1000, -1.0), "negative"),
        ("logged", np.zeros(3, np.int64), "shape"),
        ("unit", np.zeros(3, np.int64), "shape"),
    ],
)
def test_rows_refuse_wrong_arrays(field: str, wrong: Array, message: str) -> None:
    rows = two_arms(200, 30).weights.rows
    with pytest.raises(ValueError, match=message):
        replace(rows, **{field: wrong})  # type: ignore[arg-type]


def test_a_policy_may_not_choose_an_ineligible_variant() -> None:
    world = small_world(np.random.default_rng(23))
    with pytest.raises(ValueError, match="not eligible"):
        policy_weights(world.rows, np.full(2000, 3))
    with pytest.raises(ValueError, match="tag matrix"):
        policy_weights(world.rows, world.chosen, Weighting.MARGINALISED)


# ── greedy ──


def test_greedy_picks_the_best_eligible_variant_for_any_chunk() -> None:
    world = small_world(np.random.default_rng(24), 500)
    q = np.random.default_rng(25).random((500, 5))
    some = np.arange(0, 500, 3)
    for max_pairs in (1, 7, 10_000):
        found = greedy(lambda r, v: q[np.ix_(r, v)], world.rows.support, some, max_pairs)
        for i, row in enumerate(some):
            eligible = SETS[world.set_[row]]
            assert found.chosen[i] == eligible[q[row, eligible].argmax()]
            assert found.q_chosen[i] == q[row, eligible].max()
            assert found.q_uniform[i] == pytest.approx(q[row, eligible].mean())


def test_greedy_and_weights_never_hold_rows_times_variants() -> None:
    n, variants = 40_000, 1000
    support = one_set(n, np.full(variants, 1e-3))
    rng = np.random.default_rng(26)
    user, side = rng.normal(size=(n, 4)), rng.normal(size=(variants, 4))
    rows = logged_rows(rng.random(n) < 0.1, rng.integers(0, variants, n), np.full(n, 1e-3), support)
    tracemalloc.start()
    found = greedy(lambda r, v: user[r] @ side[v].T, support, max_pairs=500_000)
    for weighting in Weighting:
        policy_weights(rows, found.chosen, weighting, tag_features(SLOT_TAGS))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # all pairs would be 320 MB


# ── verdict ──


@pytest.mark.parametrize(
    ("permuted", "p"), [([0.1] * 99, 0.01), ([0.5] + [0.1] * 98, 0.02), ([0.9] * 99, 1.0), ([], 1.0)]
)
def test_permutation_p_counts_ties_against_the_claim(permuted: list[float], p: float) -> None:
    assert permutation_p(0.5, permuted) == pytest.approx(p)


def claim(low: float) -> Estimate:
    return Estimate(low + 0.1, 0.05, low, low + 0.2, 500, 500, 100, "dr, matched", "")


UP, NO = claim(0.01), claim(-0.01)
SINGLE, CONTEXT, PERSONAL = Policy.BEST_SINGLE, Policy.BEST_PER_CONTEXT, Policy.PERSONALISED


@pytest.mark.parametrize(
    ("single", "context", "personal", "p", "expected"),
    [
        (NO, NO, UP, 0.05, Verdict.PERSONALISE),
        (UP, UP, UP, 0.01, Verdict.PERSONALISE),
        (UP, UP, UP, 0.06, Verdict.BEST_PER_CONTEXT),
        (UP, UP, UP, None, Verdict.BEST_PER_CONTEXT),
        (NO, UP, NO, 0.01, Verdict.BEST_PER_CONTEXT),
        (UP, NO, NO, 0.01, Verdict.BEST_SINGLE),
        (UP, NO, UP, 0.5, Verdict.BEST_SINGLE),
        (NO, NO, NO, 0.01, Verdict.INCONCLUSIVE),
        (UP, None, None, None, Verdict.BEST_SINGLE),
        (claim(0.0), NO, claim(0.0), 0.01, Verdict.INCONCLUSIVE),
    ],
)
def test_verdict_table(
    single: Estimate, context: Estimate | None, personal: Estimate | None, p: float | None, expected: Verdict
) -> None:
    values: dict[Policy, Estimate | None] = dict.fromkeys(Policy, UP)
    gains = {SINGLE: single, CONTEXT: context, PERSONAL: personal}
    assert verdict(values, gains, p, has_claim=True) is expected
    assert verdict(values, gains, p, has_claim=False) is Verdict.INCONCLUSIVE
    for unknown in Policy:
        assert verdict({**values, unknown: None}, gains, p, has_claim=True) is Verdict.INCONCLUSIVE


def test_without_context_the_ladder_skips_best_per_context() -> None:
    world = small_world(np.random.default_rng(27), 8000)
    best = replace(world, chosen=np.array([0, 2, 0])[world.set_])
    scores = {
        PERSONAL: dr(world, world.right_q),
        SINGLE: dr(best, world.right_q),
        Policy.UNIFORM: dr_uniform(world, world.right_q),
    }
    found = gains_over_simpler(scores)
    assert {policy: over for policy, (over, _) in found.items()} == {SINGLE: Policy.UNIFORM, PERSONAL: SINGLE}
    assert found[PERSONAL][1] == gain(scores[PERSONAL], scores[SINGLE])
    values = {policy: estimate(s) for policy, s in scores.items()}
    assert verdict(values, {SINGLE: None, PERSONAL: UP}, 0.01, has_claim=True) is Verdict.PERSONALISE


def test_estimates_state_their_method_and_assumption() -> None:
    rows, chosen = slot_world(np.random.default_rng(28), 50_000)
    weights = policy_weights(rows, chosen, Weighting.PSEUDO_INVERSE, tag_features(SLOT_TAGS))
    q = np.full(50_000, 0.2)
    found, plain = estimate(dr_scores(weights, q, q)), estimate(ips_scores(uniform_weights(rows)))
    assert found is not None
    assert plain is not None
    assert found.method == "dr, pseudo_inverse"
    assert "sum over a variant's tags" in found.assumption
    assert plain.method == "ips, matched"
    assert plain.assumption == "the propensities are right"
    both = gain(dr_scores(weights, q, q), dr_scores(uniform_weights(rows), q, q))
    assert both is not None
    assert both.method == "dr, pseudo_inverse"
