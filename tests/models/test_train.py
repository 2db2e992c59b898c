"""Training of the whole network: what the deep part is for, when it stays out, and that training is repeatable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from kaleidoscope.simulation import Users, World
from models import train as module
from models.batch import Examples
from models.tables import Tables, fit_tables
from models.train import CtrModel, fit_network
from tests.models.worlds import SPEC, encoder_of, examples_of, log_of

Array = np.ndarray[Any, np.dtype[Any]]
NULL = replace(SPEC, interactions=0)


def xor(users: Users, variant: Array) -> Array:
    """Users of an odd and an even value like what others dislike: no field × tag table holds any of it."""
    tag = World.draw(NULL).variant_tags[variant, 0]
    return np.asarray(1.2 * ((users.values[:, 0] + users.values[:, 3] + tag) % 2) - 0.6)


def log_loss(model: CtrModel | Tables, log: Examples) -> float:
    logits = model.logits(log.features, log.variant)
    return float((np.logaddexp(0, logits) - log.reward * logits).mean())


def test_deep_part_finds_an_interaction_of_three_that_tables_cannot_hold() -> None:
    world = World.draw(NULL)
    log, fresh = log_of(world, 30_000, extra=xor), log_of(world, 30_000, seed=1, extra=xor)
    network = fit_network(log, encoder_of(world))
    assert network.gate > 0
    assert log_loss(network, fresh) < log_loss(fit_tables(log, encoder_of(world)), fresh) - 0.005


@pytest.mark.parametrize("seed", range(4))
def test_gate_stays_shut_where_there_is_nothing_for_the_deep_part(seed: int) -> None:
    world = World.draw(replace(NULL, seed=seed))
    log, fresh = log_of(world, 6_000, seed), log_of(world, 20_000, seed=seed + 50)
    network = fit_network(log, encoder_of(world), seed=seed)
    assert network.gate == 0.0
    assert log_loss(network, fresh) < log_loss(fit_tables(log, encoder_of(world)), fresh) + 0.001


def test_tables_carry_a_planted_log() -> None:
    world = World.draw(SPEC)
    network = fit_network(log_of(world, 30_000), encoder_of(world))
    users = world.sample_users(4_000, np.random.default_rng(5))
    pick = network.rank(network.encoder.features(world.columns(users))).argmax(axis=1)
    assert world.value(users, pick) > 0.92 * world.value(users, world.best(users))


def test_same_seed_is_the_same_network_and_another_seed_another_one() -> None:
    world = World.draw(NULL)
    log, encoder = log_of(world, 8_000, extra=xor), encoder_of(world)
    config = module.TrainConfig(epochs=2)
    first, again, other = (fit_network(log, encoder, config=config, seed=s) for s in (1, 1, 2))
    assert (first.rank(log.features) == again.rank(log.features)).all()
    assert all((a == b).all() for a, b in zip(first.deep.parameters(), again.deep.parameters(), strict=True))
    assert any((a != b).any() for a, b in zip(first.deep.parameters(), other.deep.parameters(), strict=True))


def opened(network: CtrModel) -> CtrModel:
    """The network with a deep part that has something to say, whatever it learned."""
    with module.torch.no_grad():
        network.deep.top.normal_(generator=module.torch.Generator().manual_seed(1))
    return replace(network, gate=0.5)


def test_rank_agrees_with_logits_however_it_is_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World.draw(SPEC)
    log = log_of(world, 400)
    network = opened(fit_network(log, encoder_of(world), config=module.TrainConfig(epochs=1)))
    scores = network.rank(log.features)
    expected = network.logits(log.features, log.variant)
    assert scores[np.arange(len(log)), log.variant] == pytest.approx(expected, abs=1e-4)
    assert network.rank(log.features, np.array([7, 2])) == pytest.approx(scores[:, [7, 2]], abs=1e-5)
    monkeypatch.setattr(module, "SCORE_CELLS", 5_000)
    assert network.rank(log.features) == pytest.approx(scores, abs=1e-5)
    assert network.rank(log.features.take(slice(0, 0))).shape == (0, world.n_variants)


def test_mean_prediction_is_the_click_rate_though_held_out_units_were_lucky() -> None:
    world = World.draw(NULL)
    log = log_of(world, 300)
    for seed in range(5):
        network = fit_network(log, encoder_of(world), seed=seed)
        assert network.predict(log.features, log.variant).mean() == pytest.approx(log.reward.mean(), abs=1e-6)


def test_gate_stays_shut_when_the_deep_part_only_knows_the_held_out_mean() -> None:
    log = log_of(World.draw(NULL), 500)
    none = replace(log, reward=np.zeros(500, np.float32))
    gain, _, _ = module._best_gate(none, np.full(500, -2.0), np.full(500, -1.0))
    assert gain == pytest.approx(0.0, abs=1e-6)


def test_early_stopping_looks_at_held_out_units_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {"fit": set(), "judged": set()}
    fit, judge = module.fit_deep, module._best_gate

    def spy_fit(train: Examples, held: Examples, *args: Any, **kwargs: Any) -> Any:
        seen["fit"] |= set(train.unit.tolist())
        return fit(train, held, *args, **kwargs)

    def spy_judge(held: Examples, *args: Any) -> Any:
        seen["judged"] |= set(held.unit.tolist())
        return judge(held, *args)

    monkeypatch.setattr(module, "fit_deep", spy_fit)
    monkeypatch.setattr(module, "_best_gate", spy_judge)
    log = log_of(World.draw(NULL), 2_000, rows_per_unit=10)
    fit_network(log, encoder_of(World.draw(NULL)))
    assert seen["fit"].isdisjoint(seen["judged"])
    assert seen["fit"] | seen["judged"] == set(range(200))
    assert len(seen["judged"]) == 30


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=50), st.floats(0.01, 0.99), st.integers(0, 9))
def test_split_has_no_unit_on_both_sides_and_leaves_none_empty(units: list[int], share: float, seed: int) -> None:
    n = len(units)
    log, _ = examples_of({}, {"d": [["a"], ["b"]]}, np.arange(n) % 2, np.zeros(n), unit=np.array(units))
    train, held = log.split(share, seed)
    assert set(train.unit.tolist()).isdisjoint(held.unit.tolist())
    assert sorted([*train.unit.tolist(), *held.unit.tolist()]) == sorted(units)
    assert len(train) > 0
    assert (len(held) > 0) == (len(set(units)) > 1)


def test_probabilities_are_those_of_the_logits() -> None:
    world = World.draw(SPEC)
    log = log_of(world, 300)
    network = fit_network(log, encoder_of(world))
    p = network.predict(log.features, log.variant)
    assert p == pytest.approx(expit(network.logits(log.features, log.variant)))
