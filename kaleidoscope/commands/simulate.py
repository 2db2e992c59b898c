"""`kaleidoscope simulate`: a simulated log with planted preferences, and what `learn` makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

from kaleidoscope.commands.learn import Learned, learn_file
from kaleidoscope.errors import JobError
from kaleidoscope.progress import Progress
from kaleidoscope.simulation import Users, World, WorldSpec

FRESH_USERS = 20_000
RANKED_USERS = 2_000  # at a time
INTERACTION_SIZE = (0.15, 0.4)  # in the logit: a scene worth personalising, not a miracle


def run_simulate(out_dir: Path, *, rows: int, seed: int, progress: Progress) -> dict[str, object]:
    """Draw a world, simulate `rows` random exposures in it, learn from them; returns the summary of `learn`.

    The log and its schema stay in `out_dir`, so that `kaleidoscope learn` can be run on them by hand. The summary gains
    `simulated_truth`: what showing fresh users a random variant, the best single one, the one that the learned networks
    rank first for them (`personalised`), or the one that is really their best (`oracle`) earns in the simulated world.
    """
    progress.stage("simulate")
    world, rng = World.draw(WorldSpec(seed=seed, interaction_size=INTERACTION_SIZE)), np.random.default_rng([seed, 1])
    log_path, schema_path = out_dir / "log.parquet", out_dir / "schema.yaml"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        pq.write_table(world.log(rows, rng), log_path)
        schema_path.write_text(yaml.safe_dump(world.schema(), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise JobError(f"{out_dir}: the simulated log cannot be written there: {error}") from error
    learned = learn_file(log_path, schema_path, out_dir, seed=seed, progress=progress, simulated=True)
    progress.stage("truth")
    users = world.sample_users(FRESH_USERS, rng)
    single = np.full(len(users), world.best_single(users))
    truth = {
        "uniform": world.value(users, rng.integers(0, world.n_variants, len(users))),
        "best_single": world.value(users, single),
        "personalised": personalised_truth(world, users, learned),
        "oracle": world.value(users, world.best(users)),
    }
    return {**learned.summary, "simulated_truth": truth}


def personalised_truth(world: World, users: Users, learned: Learned) -> float:
    """What the variants that the networks rank first for these users really earn, averaged over the folds' networks:
    the policy whose value was estimated."""
    of_id = {name: i for i, name in enumerate(world.variant_ids)}
    known = np.array([of_id[name] for name in learned.variants["variant_id"].to_pylist()])
    earned = []
    for network in learned.networks:
        features = network.encoder.features(world.columns(users), len(users))
        parts = [np.arange(i, min(i + RANKED_USERS, len(users))) for i in range(0, len(users), RANKED_USERS)]
        first = np.concatenate([network.rank(features.take(part)).argmax(axis=1) for part in parts])
        earned.append(world.value(users, known[first]))
    return float(np.mean(earned))
