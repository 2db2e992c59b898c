"""One suite of properties over the network and everything it is measured against."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kaleidoscope.simulation import World
from models.baselines import CrossedLogistic, Ebm, LightGbm, Model, MostPopular
from models.metrics import AucSums
from models.train import CtrModel
from tests.models.worlds import SPEC, encoder_of, examples_of, log_of

Array = np.ndarray[Any, np.dtype[Any]]
MODELS: list[type[Model]] = [CtrModel, MostPopular, LightGbm, CrossedLogistic, Ebm]
N_LOG, HIDDEN = 3_000, 5
every_model = pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
_fitted: dict[type[Model], Model] = {}


def strong() -> World:
    return World.draw(replace(SPEC, base_ctr=0.3, tag_sd=0.6, interactions=2, interaction_size=(0.8, 0.8)))


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Model:
    """The model of each kind, fitted once to a planted log in which variant HIDDEN was never shown."""
    kind = request.param
    if kind not in _fitted:
        _fitted[kind] = kind.fit(log_of(strong(), N_LOG, hidden=[HIDDEN]), encoder_of(strong()), seed=1)
    return _fitted[kind]


fitted = pytest.mark.parametrize("model", MODELS, indirect=True, ids=lambda kind: kind.__name__)


@fitted
def test_predicts_probabilities_that_are_right_on_average(model: Model) -> None:
    log = log_of(strong(), N_LOG, hidden=[HIDDEN])
    p = model.predict(log.features, log.variant)
    assert p.shape == (N_LOG,)
    assert np.isfinite(p).all()
    assert ((p > 0) & (p < 1)).all()
    assert p.mean() == pytest.approx(log.reward.mean(), rel=0.03)


@fitted
def test_is_better_than_chance_on_fresh_users(model: Model) -> None:
    fresh = log_of(strong(), 4_000, seed=8)
    value = AucSums.of(model.predict(fresh.features, fresh.variant), fresh.reward).value
    assert value is not None
    assert value > 0.55


@fitted
def test_rank_orders_variants_as_predict_does(model: Model) -> None:
    n = strong().n_variants
    users = log_of(strong(), 20, seed=8).features
    scores = np.asarray(model.rank(users))
    p = model.predict(users.take(np.repeat(np.arange(20), n)), np.tile(np.arange(n), 20)).reshape(20, n)
    assert scores.shape == (20, n)
    for score, expected in zip(scores, p, strict=True):
        assert (np.diff(expected[np.argsort(score, kind="stable")]) > -1e-6).all()


@fitted
def test_users_are_predicted_one_by_one(model: Model) -> None:
    log = log_of(strong(), 200, seed=8)
    order = np.random.default_rng(0).permutation(200)
    p = model.predict(log.features, log.variant)
    assert model.predict(log.features.take(order), log.variant[order]) == pytest.approx(p[order], rel=1e-5)
    assert model.predict(log.features.take(slice(3, 4)), log.variant[3:4]) == pytest.approx(p[3:4], rel=1e-5)
    assert model.predict(log.features.take(slice(0, 0)), log.variant[:0]).shape == (0,)
    assert np.asarray(model.rank(log.features.take(slice(0, 0)))).shape == (0, strong().n_variants)


@fitted
def test_never_seen_and_missing_values_do_not_break_it(model: Model) -> None:
    strangers = encoder_of(strong()).features({"age_band": pa.array(["new", None]), "city": pa.array([None, "new"])}, 2)
    assert np.isfinite(model.predict(strangers, np.array([0, 1]))).all()
    assert np.isfinite(model.rank(strangers)).all()


@fitted
def test_variant_never_shown_has_a_finite_score(model: Model) -> None:
    log = log_of(strong(), 20, seed=8)
    p = model.predict(log.features, np.full(20, HIDDEN))
    assert ((p > 0) & (p < 1)).all()
    assert np.isfinite(np.asarray(model.rank(log.features))[:, HIDDEN]).all()


@every_model
def test_same_seed_is_the_same_model(kind: type[Model]) -> None:
    log, encoder = log_of(strong(), 600), encoder_of(strong())
    first, again = (kind.fit(log, encoder, seed=3).rank(log.features) for _ in range(2))
    assert (first == again).all()


def unusual(name: str, n: int = 200) -> dict[str, Any]:
    """Logs on which models have broken."""
    rng = np.random.default_rng(0)
    two = {"d": [["a"], ["b"]]}
    base = {"columns": {"x": rng.normal(size=n)}, "variants": two, "reward": rng.random(n) < 0.3}
    return base | {
        "several tags of a dimension": {"variants": {"d": [["a", "b"], ["b"], [], ["c"]], "e": [["x"], ["y"]] * 2}},
        "no user features": {"columns": {}},
        "constant columns": {"columns": {"c": ["k"] * n, "one": np.ones(n), "nothing": pa.nulls(n, pa.string())}},
        "no number is known": {"columns": {"x": np.full(n, np.nan), "y": np.where(rng.random(n) < 0.5, np.nan, 1e300)}},
        "no clicks": {"reward": np.zeros(n)},
        "nothing but clicks": {"reward": np.ones(n)},
        "one click": {"reward": np.arange(n) == 7},
        "some weights are zero": {"weight": (np.arange(n) % 2).astype(float)},
        "one unit": {"unit": np.zeros(n, np.int64)},
        "units are hashes": {"unit": rng.integers(-(2**62), 2**62, n)},
        "one variant": {"variants": {"d": [["a"]]}},
        "groups": {"columns": {"x": rng.normal(size=n), "g": rng.integers(0, 9, n)}, "group": ["g"]},
        "more tags than can be crossed": {"variants": {"d": [[f"v{i}"] for i in range(1_500)]}, "columns": {}},
        "many tags of a dimension": {
            "variants": {"d": [[f"v{j}" for j in rng.integers(0, 900, 4)] for i in range(1_000)], "e": [["x"]] * 1_000}
        },
    }[name]  # fmt: skip


UNUSUAL = [
    "several tags of a dimension", "no user features", "constant columns", "no number is known", "no clicks",
    "nothing but clicks", "one click", "some weights are zero", "one unit", "units are hashes", "one variant", "groups",
    "more tags than can be crossed", "many tags of a dimension",
]  # fmt: skip


@every_model
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_log_gives_a_finite_and_calibrated_model(kind: type[Model], name: str) -> None:
    given = unusual(name)
    columns, variants, reward = given.pop("columns"), given.pop("variants"), given.pop("reward")
    count = len(next(iter(variants.values())))
    variant = np.random.default_rng(1).integers(0, count, len(reward))
    log, encoder = examples_of(columns, variants, variant, reward, **given)
    model = kind.fit(log, encoder)
    p = model.predict(log.features, log.variant)
    assert ((p > 0) & (p < 1)).all()
    assert np.average(p, weights=log.weight) == pytest.approx(np.average(log.reward, weights=log.weight), abs=0.06)
    assert np.isfinite(model.rank(log.features.take(slice(0, 2)))).all()


def test_most_popular_shrinks_rates_towards_the_mean() -> None:
    rng = np.random.default_rng(0)
    variant = np.repeat(np.arange(20), 500)
    rate = rng.uniform(0.02, 0.2, 20)
    reward = rng.random(10_000) < rate[variant]
    few = np.append(np.flatnonzero(variant < 19), np.flatnonzero(variant == 19)[:2])
    log, encoder = examples_of({}, {"d": [[f"v{i}"] for i in range(20)]}, variant[few], reward[few])
    p = MostPopular.fit(log, encoder).predict(log.features.take(np.zeros(20, np.int64)), np.arange(20))
    seen = np.bincount(variant[few], reward[few]) / np.bincount(variant[few])
    assert p[:19] == pytest.approx(seen[:19], abs=0.02)
    assert p[19] == pytest.approx(log.reward.mean(), abs=0.03)
    assert (np.abs(p - log.reward.mean()) <= np.abs(seen - log.reward.mean()) + 1e-9).all()
