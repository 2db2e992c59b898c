"""Hide and show: variants that come after training are ranked by their tags, before anybody has seen them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import spearmanr

from kaleidoscope.encoding import Encoder
from kaleidoscope.ranker import Ranker
from kaleidoscope.simulation import Population, example_variants, read_population
from models.batch import Examples
from models.export import export_model
from models.train import fit_network

Array = np.ndarray[Any, np.dtype[Any]]

DEMO = Path(__file__).parents[2] / "examples" / "demo_scene"
NEW_MATERIALS = {"hills-chart-flat", "emblem-flat", "calm", "time"}  # all of whose tags others carry, too
ROWS = 60_000


@dataclass(frozen=True)
class Shown:
    truth: Array  # (users, variants) click logits
    scores: Array  # of the exported model
    seen: Array  # (variants,) whether it was in training
    new_material: Array  # or else whether one of its materials was in none


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """A model of the demo's scene without four materials and without a quarter of what the others combine to."""
    world = Population(read_population().model_copy(update={"base_ctr": 0.15}), 0)
    rng, variants = np.random.default_rng(0), example_variants(DEMO)
    fresh = np.array([not NEW_MATERIALS.isdisjoint(one.materials.values()) for one in variants])
    seen = ~fresh & (rng.random(len(variants)) < 0.75)
    scene = world.scene([one for one, there in zip(variants, seen, strict=True) if there])
    people = world.people(ROWS)
    table, columns, variant = scene.tag_table(), people.columns(), rng.integers(0, len(scene.variants), ROWS)
    reward = rng.random(ROWS) < expit(scene.click_logit_of(people, variant))
    encoder = Encoder.fit(columns, user=list(columns), context=[], variants=table, dimensions=table.column_names[1:])
    log = Examples(
        encoder.features(columns, ROWS), variant, encoder.tags(table), reward.astype(np.float32), np.ones(ROWS),
        np.arange(ROWS),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("hidden") / "v"
    export_model(
        fit_network(log, encoder, seed=0), folder, version="v", variants=table, log_hash="h", seed=0,
        created_at=datetime(2030, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    later = scene.with_variants([one for one, there in zip(variants, seen, strict=True) if not there])
    ranker, users = Ranker.load(folder), world.people(1_000, draw=1)
    asked = {name: column.to_pylist() for name, column in users.columns().items()}
    scores = ranker.score(ranker.features(asked, len(users)), ranker.variant_side(later.tag_table()))
    new = np.array([not NEW_MATERIALS.isdisjoint(one.materials.values()) for one in later.variants])
    return Shown(later.click_logit(users), scores, np.arange(len(new)) < len(scene.variants), new)


def agreement(shown: Shown, variants: Array) -> tuple[float, float]:
    """Spearman's correlation of scores and truth over these variants: of the means of all users, and each user's."""
    truth, scores = shown.truth[:, variants], shown.scores[:, variants]
    each = [spearmanr(a, b).statistic for a, b in zip(truth[:200], scores[:200], strict=True)]
    return float(spearmanr(truth.mean(axis=0), scores.mean(axis=0)).statistic), float(np.mean(each))


def test_variants_are_ranked_before_their_first_exposure_nearly_as_those_of_training(shown: Shown) -> None:
    combined = ~shown.seen & ~shown.new_material
    assert min(shown.seen.sum(), combined.sum(), shown.new_material.sum()) > 60
    (known, of_each), (again, again_each), (new, new_each) = (
        agreement(shown, which) for which in (shown.seen, combined, shown.new_material)
    )
    assert known > 0.95 and of_each > 0.9
    assert again > known - 0.03 and again_each > of_each - 0.03
    # What a new material has beyond its tags nobody can know yet.
    assert new > 0.6 and new_each > 0.7


def test_what_is_picked_of_unseen_variants_alone_is_worth_most_of_what_can_be_had(shown: Shown) -> None:
    p, scores = expit(shown.truth[:, ~shown.seen]), shown.scores[:, ~shown.seen]
    earned = p[np.arange(len(p)), scores.argmax(axis=1)].mean()
    single, oracle = p.mean(axis=0).max(), p.max(axis=1).mean()  # of the unseen, and knowing the truth
    assert earned > 2 * p.mean()
    assert earned > single + 0.6 * (oracle - single)
