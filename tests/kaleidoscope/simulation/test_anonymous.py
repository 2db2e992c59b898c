"""A simulated world knows its truth, and its log is a log of the contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.special import expit

from kaleidoscope.log import read_log
from kaleidoscope.log_schema import read_schema
from kaleidoscope.simulation import World, WorldSpec
from kaleidoscope.vocabulary import Level

SMALL = WorldSpec(
    field_values=(4, 3), materials=(3, 2, 2), dimension_values=(3, 2, 2), context_values=3, context_interactions=1,
    interactions=2, exposures_per_unit=2.0, seed=5,
)  # fmt: skip


def test_same_spec_is_the_same_world_and_another_seed_another_one() -> None:
    assert World.draw(SMALL).variant_effect.tolist() == World.draw(SMALL).variant_effect.tolist()
    other = World.draw(WorldSpec(**{**SMALL.__dict__, "seed": 6}))
    assert other.variant_effect.tolist() != World.draw(SMALL).variant_effect.tolist()


def test_mean_click_rate_is_as_asked() -> None:
    world, rng = World.draw(), np.random.default_rng(0)
    users = world.sample_users(2_000, rng)
    assert world.n_variants == 1_000
    assert expit(world.logits(users)).mean() == pytest.approx(0.03, rel=0.06)


def test_logits_of_one_variant_are_those_of_all() -> None:
    world, rng = World.draw(SMALL), np.random.default_rng(0)
    users = world.sample_users(50, rng)
    shown, every = rng.integers(0, world.n_variants, 50), world.logits(users)
    assert world.logits_of(users, shown) == pytest.approx(every[np.arange(50), shown])
    assert world.value(users, shown) == pytest.approx(expit(every[np.arange(50), shown]).mean())
    assert world.best(users).tolist() == every.argmax(axis=1).tolist()
    assert world.best_single(users) == int(expit(every).mean(axis=0).argmax())


def test_oracle_is_worth_more_than_the_best_single_variant() -> None:
    world = World.draw(SMALL)
    users = world.sample_users(500, np.random.default_rng(0))
    single = np.full(len(users), world.best_single(users))
    assert world.value(users, world.best(users)) > world.value(users, single)


def test_world_without_users_or_context_can_be_drawn() -> None:
    world = World.draw(WorldSpec(field_values=(), interactions=0))
    users = world.sample_users(4, np.random.default_rng(0))
    assert world.logits(users).shape == (4, 1_000)
    assert len(set(world.best(users).tolist())) == 1


def test_log_reads_back_under_the_contract(tmp_path: Path) -> None:
    world = World.draw(SMALL)
    hidden = np.array([0, 5])
    pq.write_table(world.log(4_000, np.random.default_rng(1), hidden=hidden), tmp_path / "log.parquet")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(world.schema()))
    log = read_log(tmp_path / "log.parquet", read_schema(tmp_path / "schema.yaml"))
    assert not [check for check in log.checks if check.level is Level.ERROR]
    assert (len(log), log.n_variants) == (4_000, world.n_variants - 2)
    assert 1_500 < log.n_units < 2_000
    assert log.propensity == pytest.approx(1 / (world.n_variants - 2))
    assert {"v_0", "v_5"}.isdisjoint(log.variants["variant_id"].to_pylist())
    assert log.variants.column_names[:-1] == world.variants.column_names
    position = [int(v.removeprefix("v_")) for v in log.variants["variant_id"].to_pylist()]
    assert log.variants.drop_columns("variant_id").to_pylist() == world.variants.take(position).to_pylist()


def test_clicks_in_the_log_follow_the_truth() -> None:
    world = World.draw(WorldSpec(field_values=(3,), materials=(2, 2, 2), interactions=1, base_ctr=0.3, seed=1))
    log = world.log(40_000, np.random.default_rng(2)).to_pandas()
    best = log.groupby("variant_id", observed=True)["click"].mean()
    users = world.sample_users(40_000, np.random.default_rng(3))
    truth = expit(world.logits(users)).mean(axis=0)
    assert [best[f"v_{v}"] for v in range(world.n_variants)] == pytest.approx(truth, abs=0.035)
