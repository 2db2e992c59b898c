"""The fast learner of the permutation test, and the permutation itself."""

from __future__ import annotations

import numpy as np

from kaleidoscope.simulation import World, WorldSpec
from models.batch import Examples
from models.permutation import OneStep, permuted_rows
from models.tables import Layout, fit_tables
from tests.models.worlds import encoder_of, log_of

WORLD = World.draw(
    WorldSpec(field_values=(4, 6, 3), materials=(3, 3), dimension_values=(3, 3), base_ctr=0.2, interactions=3, seed=5)
)


def one_step(examples: Examples, fold: np.ndarray) -> OneStep:
    encoder = encoder_of(WORLD)
    layout = Layout.of(encoder, examples.tags)
    blind_examples, blind_encoder = log_of(WORLD, 20_000, seed=9).only(encoder, "context")
    blind = fit_tables(blind_examples, blind_encoder)
    return OneStep.of(
        layout,
        layout.crossed(examples.features),
        reward=examples.reward,
        weight=examples.weight,
        logit=blind.logits(examples.only(encoder, "context")[0].features, examples.variant),
        contrast=layout.crossed_tags[examples.variant] - layout.crossed_tags.mean(axis=0),
        fold=fold,
        unit=examples.unit,
    )


def test_a_permutation_gives_all_rows_of_a_unit_the_features_of_one_other() -> None:
    unit = np.array([0, 0, 1, 2, 2, 2, 3])
    seen = set()
    for seed in range(30):
        source = permuted_rows(unit, np.random.default_rng(seed))
        given = [set(unit[source[unit == u]]) for u in range(4)]
        assert all(len(g) == 1 for g in given)
        assert sorted(g.pop() for g in given) == [0, 1, 2, 3]
        seen.add(tuple(unit[source]))
    assert len(seen) > 10


def test_planted_preferences_are_found_and_vanish_with_the_features_permuted() -> None:
    examples = log_of(WORLD, 20_000)
    learner = one_step(examples, np.arange(20_000) % 3)
    found = learner.preferences()
    assert np.abs(found).max() > 0.2
    for seed in range(3):
        dealt = learner.preferences(permuted_rows(examples.unit, np.random.default_rng(seed)))
        assert np.abs(dealt).mean() < 0.3 * np.abs(found).mean()


def test_a_rows_preferences_never_depend_on_its_own_fold() -> None:
    examples, fold = log_of(WORLD, 6_000), np.arange(6_000) % 3
    learner = one_step(examples, fold)
    before = learner.preferences()
    learner.score[fold == 0] *= -1
    after = learner.preferences()
    np.testing.assert_allclose(before[fold == 0], after[fold == 0], atol=1e-3)
    assert np.abs(before - after)[fold == 1].max() > 0.1
