"""The tables: their gradient, what enters on the evidence of a log and what must not, and finding the planted."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.special import expit

from kaleidoscope.simulation import World, WorldSpec
from models import tables as module
from models.batch import Examples
from models.metrics import AucSums
from models.tables import Layout, Tables, _Fit, _State, fit_tables
from tests.models.worlds import SPEC, encoder_of, examples_of, log_of

Array = np.ndarray[Any, np.dtype[Any]]
NULL = replace(SPEC, interactions=0)


def auc(tables: Tables, log: Examples) -> float:
    value = AucSums.of(tables.logits(log.features, log.variant), log.reward).value
    assert value is not None
    return value


def share_of_oracle(world: World, tables: Tables, n: int = 4_000) -> float:
    users = world.sample_users(n, np.random.default_rng(99))
    pick = tables.rank(tables.layout.encoder.features(world.columns(users))).argmax(axis=1)
    return world.value(users, pick) / world.value(users, world.best(users))


def mixed(n: int, seed: int = 0, slope: float = 0.0) -> tuple[Examples, Any]:
    """Numbers, a group, several tags of a dimension; style `a` is liked by the old if there is a `slope`."""
    rng = np.random.default_rng(seed)
    age, test, variant = rng.normal(40, 10, n), rng.integers(0, 30, n), rng.integers(0, 6, n)
    variants = {"style": [["a"], ["b"], ["a", "b"], ["c"], ["a", "c"], []], "tone": [["x"], ["y"], ["z"]] * 2}
    has_a = np.isin(variant, [0, 2, 4])
    logits = -1.5 + 0.8 * np.sin(test) + slope * has_a * (age - 40) / 10
    columns = {"age": age, "city": rng.choice(["p", "q", "r"], n), "test": [f"t{t}" for t in test]}
    return examples_of(columns, variants, variant, rng.random(n) < expit(logits), group=["test"])


def test_gradient_and_curvature_are_those_of_finite_differences() -> None:
    log, encoder = mixed(400)
    log = replace(log, weight=np.random.default_rng(1).uniform(0, 2, 400))
    layout = replace(Layout.of(encoder, log.tags), pairs=((0, 1),))
    fit, rng = _Fit(layout, log, variants=True, crosses=True, offset=np.linspace(-1, 1, 400)), np.random.default_rng(2)
    theta = rng.normal(0, 0.1, len(fit.block))
    state = _State(-1.0, theta, np.ones(fit.n_blocks))

    def gradient(at: _State) -> tuple[float, Array]:
        _, total, slope, _ = fit._pass(at, curvature=False)
        return total, slope

    def loss(at: _State) -> float:
        return fit._pass(at, curvature=False)[0]

    step = 0.02
    total, slope = gradient(state)
    _, curvature = fit.curvature(state)
    up, down = (loss(replace(state, intercept=-1.0 + s)) for s in (step, -step))
    assert -total == pytest.approx((up - down) / (2 * step), abs=0.02)
    for i in rng.choice(len(theta), 80, replace=False):
        moved = [replace(state, theta=theta + s * (np.arange(len(theta)) == i)) for s in (step, -step)]
        assert -slope[i] == pytest.approx((loss(moved[0]) - loss(moved[1])) / (2 * step), abs=0.02)
        bend = (gradient(moved[1])[1][i] - gradient(moved[0])[1][i]) / (2 * step)
        assert curvature[i] == pytest.approx(bend, rel=0.01, abs=0.02)


@pytest.mark.parametrize("seed", range(6))
def test_null_log_keeps_no_table(seed: int) -> None:
    world = World.draw(replace(NULL, seed=seed))
    log = log_of(world, 12_000, seed)
    tables = fit_tables(log, encoder_of(world))
    assert not tables.cross.any()
    assert not tables.cross_variance.any()


@pytest.mark.parametrize("seed", range(8))
def test_more_rows_of_a_null_log_bring_no_table_in(seed: int) -> None:
    world = World.draw(replace(NULL, seed=seed))
    log, encoder = log_of(world, 3_000, seed), encoder_of(world)
    part = fit_tables(log.split(0.15, seed)[0], encoder)
    more = fit_tables(log, encoder, start=part)
    assert not more.cross.any()
    truth = log_of(world, 8_000, seed + 100)
    whole = fit_tables(log, encoder)
    loss = [
        np.logaddexp(0, x) - truth.reward * x for x in (t.logits(truth.features, truth.variant) for t in (more, whole))
    ]
    assert loss[0].mean() < loss[1].mean() + 0.002


def test_users_who_repeat_are_no_evidence_for_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    naive = []
    for seed in range(4):
        world = World.draw(replace(NULL, base_ctr=0.3, seed=seed))
        # who a user is tells variants apart in no way, but 20 exposures of one user share what that user is like
        taste = np.random.default_rng(seed).normal(0, 2.0, (1_000, 4))
        log = log_of(world, 20_000, seed, rows_per_unit=20, unit_sd=1.0)
        logits = -1.0 + taste[log.unit, world.variant_tags[log.variant, 0]]
        log = replace(log, reward=(np.random.default_rng(seed).random(20_000) < expit(logits)).astype(np.float32))
        encoder = encoder_of(world)
        assert not fit_tables(log, encoder).cross.any()
        with monkeypatch.context() as without:
            without.setattr(_Fit, "_design_effect", lambda fit, _: np.ones(fit.n_blocks))
            naive.append(bool(fit_tables(log, encoder).cross.any()))
    assert sum(naive) >= 2


def test_planted_tables_are_found_and_pick_nearly_as_the_oracle() -> None:
    world = World.draw(WorldSpec(interactions=6, interaction_size=(0.6, 0.8), base_ctr=0.1, seed=1))
    tables = fit_tables(log_of(world, 100_000), encoder_of(world))
    assert share_of_oracle(world, tables) > 0.95
    earned = np.argwhere(tables.cross_variance > 0)
    slot_of = {d: d % 3 for d in range(6)} | {6 + s: s for s in range(3)}
    planted = {(f, d % 3) for f, d in world.tables}
    found = {(int(f), slot_of[int(d)]) for f, d in earned}
    assert len(found & planted) >= 5
    assert len(found - planted) <= 1


def test_hidden_variants_are_scored_from_their_tags() -> None:
    world = World.draw(WorldSpec(materials=(6, 6, 6), interaction_size=(0.6, 0.8), base_ctr=0.1, seed=2))
    hidden = np.random.default_rng(0).choice(world.n_variants, 40, replace=False)
    log = log_of(world, 60_000, hidden=hidden.tolist())
    shown = np.setdiff1d(np.arange(world.n_variants), hidden)
    position = np.full(world.n_variants, -1)
    position[shown] = np.arange(len(shown))
    narrow = replace(log, variant=position[log.variant], tags=log.tags[shown])
    tables = fit_tables(narrow, encoder_of(world)).for_variants(log.tags, position)
    fresh = log_of(world, 60_000, seed=7)
    unseen = np.isin(fresh.variant, hidden)
    seen_auc, hidden_auc = (auc(tables, fresh.take(np.flatnonzero(rows))) for rows in (~unseen, unseen))
    assert hidden_auc > seen_auc - 0.02
    assert seen_auc > 0.6


def test_variants_known_or_not_differ_by_their_residual_alone() -> None:
    log, encoder = mixed(3_000)
    tables = fit_tables(log, encoder)
    same = tables.for_variants(log.tags, np.arange(6))
    assert (same.rank(log.features) == tables.rank(log.features)).all()
    assert np.isfinite(tables.for_variants(log.tags, np.full(6, -1)).rank(log.features)).all()


def test_slope_of_a_number_on_a_tag_is_used() -> None:
    log, encoder = mixed(20_000, slope=0.6)
    tables = fit_tables(log, encoder)
    old, young = (encoder.features({"age": pa.array([age])}, 1) for age in (58.0, 22.0))
    gain = tables.rank(old)[0] - tables.rank(young)[0]
    assert gain[0] - gain[1] > 1.0  # style a against b, tone x against y
    assert gain[2] > 0.8  # a and b
    assert not fit_tables(*mixed(20_000)).cross.any()


def test_group_has_a_main_effect_and_no_table() -> None:
    log, encoder = mixed(20_000)
    tables = fit_tables(log, encoder)
    of_group = encoder.features({"test": pa.array([f"t{t}" for t in range(30)])}, 30)
    assert np.corrcoef(tables.side_logit(of_group), np.sin(np.arange(30)))[0, 1] > 0.95
    assert 2 not in tables.layout.crossed_fields


def test_rank_agrees_with_logits() -> None:
    log, encoder = mixed(2_000, slope=0.8)
    tables = fit_tables(log, encoder)
    scores = tables.rank(log.features)
    expected = tables.logits(log.features, log.variant)
    assert scores[np.arange(len(log)), log.variant] == pytest.approx(expected, abs=1e-5)
    assert tables.rank(log.features, np.array([4, 1])) == pytest.approx(scores[:, [4, 1]])
    assert tables.rank(log.features.take(slice(0, 0))).shape == (0, 6)


def test_order_of_rows_does_not_matter() -> None:
    world = World.draw(SPEC)
    log, encoder = log_of(world, 8_000, rows_per_unit=4), encoder_of(world)
    shuffled = log.take(np.random.default_rng(0).permutation(len(log)))
    first, second = fit_tables(log, encoder), fit_tables(shuffled, encoder)
    assert (first.cross_variance > 0).tolist() == (second.cross_variance > 0).tolist()
    assert second.rank(log.features) == pytest.approx(first.rank(log.features), abs=0.02)


def test_weights_equal_repeated_rows() -> None:
    world = World.draw(SPEC)
    log, encoder = log_of(world, 5_000), encoder_of(world)
    times = np.random.default_rng(0).integers(0, 3, len(log))
    repeated = log.take(np.repeat(np.arange(len(log)), times))
    repeated = replace(repeated, unit=np.arange(len(repeated)))
    weighted = fit_tables(replace(log, weight=times.astype(float)), encoder)
    assert fit_tables(repeated, encoder).rank(log.features) == pytest.approx(weighted.rank(log.features), abs=0.02)


def test_chunks_and_the_cache_do_not_change_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    log, encoder = mixed(3_000, slope=0.8)
    whole = fit_tables(log, encoder)
    monkeypatch.setattr(module, "CACHED_ROWS", 0)
    monkeypatch.setattr(module, "CHUNK_CELLS", 5_000)
    assert fit_tables(log, encoder).rank(log.features) == pytest.approx(whole.rank(log.features), abs=0.02)


def test_switches_leave_out_tags_or_crosses() -> None:
    world = World.draw(SPEC)
    log, encoder = log_of(world, 20_000), encoder_of(world)
    blind = fit_tables(log, encoder, variants=False).rank(log.features)
    assert (blind == blind[:, :1]).all()
    main = fit_tables(log, encoder, crosses=False)
    assert not main.cross.any()
    assert fit_tables(log, encoder).cross.any()


def test_pairs_of_fields_enter_when_they_matter() -> None:
    world = World.draw(NULL)
    odd = lambda users, _: 1.5 * ((users.values[:, 0] % 2) ^ (users.values[:, 3] % 2))  # noqa: E731
    assert fit_tables(log_of(world, 8_000, extra=odd), encoder_of(world)).layout.pairs == ((0, 3),)
    assert fit_tables(log_of(world, 8_000), encoder_of(world)).layout.pairs == ()


def test_thousands_of_headlines_and_variants_need_little_memory() -> None:
    rng, n, count = np.random.default_rng(0), 5_000, 15_000
    variants = {
        "headline": [[f"h{i % 10_000}"] for i in range(count)],
        "words": [[f"w{j}" for j in rng.integers(0, 8_000, 5)] for _ in range(count)],
        "style": [[f"s{i % 7}"] for i in range(count)],
    }
    columns = {"id": [f"u{i}" for i in rng.integers(0, 50_000, n)], "city": rng.choice(["a", "b"], n)}
    log, encoder = examples_of(columns, variants, rng.integers(0, count, n), rng.random(n) < 0.1)
    tracemalloc.start()
    tables = fit_tables(log, encoder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6
    assert np.isfinite(tables.rank(log.features.take(slice(0, 3)))).all()


def test_crosses_of_many_large_fields_and_dimensions_stay_affordable() -> None:
    rng, n = np.random.default_rng(0), 3_000
    columns = {f"f{j}": [f"v{i}" for i in rng.integers(0, 300 * (j % 3 + 1), n)] for j in range(9)}
    variants = {f"d{j}": [[f"t{i}"] for i in rng.integers(0, 900, 2_000)] for j in range(4)}
    log, encoder = examples_of(columns, variants, rng.integers(0, 2_000, n), rng.random(n) < 0.1)
    layout = Layout.of(encoder, log.tags)
    assert layout.n_crossed * layout.crossed_tags.shape[1] <= module.MAX_CROSS_CELLS


def test_spread_of_the_posterior_covers_the_truth() -> None:
    """Differences between tags, estimate minus truth, in units of their standard deviation: about standard normal."""
    truth, errors, variants = np.array([-0.5, -0.1, 0.1, 0.5]), [], {"style": [["a"], ["b"], ["c"], ["d"]] * 4}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        variant = rng.integers(0, 16, 4_000)
        reward = rng.random(4_000) < expit(truth[variant % 4] - 1.0)
        log, encoder = examples_of({"city": rng.choice(["p", "q"], 4_000)}, variants, variant, reward)
        tables = fit_tables(log, encoder)
        assert tables.variant_sd is not None
        found, sd = tables.variant[2:6] - truth, tables.variant_sd[2:6]
        errors += [(found[i] - found[j]) / np.hypot(sd[i], sd[j]) for i, j in ((0, 1), (2, 3))]
        assert tables.cross_sd is not None
        assert (tables.cross_sd > 0).any() == tables.cross.any()
    assert 0.75 < np.std(errors) < 1.3


def test_spread_is_that_of_the_prior_where_there_is_no_data_and_shrinks_with_data() -> None:
    few, many = (fit_tables(*mixed(n)) for n in (1_000, 20_000))
    assert few.variant_sd is not None
    assert many.variant_sd is not None
    tags = slice(2, 5)  # styles a, b, c
    assert (many.variant_sd[tags] < few.variant_sd[tags]).all()
    prior = np.sqrt(many.variant_variance)
    assert many.variant_sd[1] == pytest.approx(prior[0])  # a style never seen
    log, _ = mixed(10)
    moved = many.for_variants(log.tags, np.array([3, -1, -1, -1, -1, -1]))
    assert moved.variant_sd is not None
    assert moved.variant_sd[-6:] == pytest.approx([many.variant_sd[-3], *[prior[-1]] * 5])


def test_a_design_effect_counts_as_that_much_less_data() -> None:
    log, encoder = mixed(300)
    fit, curvature = _Fit(Layout.of(encoder, log.tags), log, variants=True, crosses=True), np.linspace(0, 50, 10_000)
    size, blocks = len(fit.block), np.full(fit.n_blocks, 0.2)
    dependent = _State(0.0, np.zeros(size), blocks / 4, np.full(fit.n_blocks, 4.0))
    alone = _State(0.0, np.zeros(size), blocks)
    assert fit._sd(dependent, curvature[:size]) == pytest.approx(fit._sd(alone, curvature[:size] / 4))
