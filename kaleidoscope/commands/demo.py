"""`kaleidoscope demo`: a simulated log with planted preferences, and what `learn` makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

from kaleidoscope.commands.learn import run_learn
from kaleidoscope.errors import JobError
from kaleidoscope.progress import Progress
from kaleidoscope.simulation import World, WorldSpec

FRESH_USERS = 20_000
INTERACTION_SIZE = (0.15, 0.4)  # in the logit: a scene worth personalising, not a miracle


def run_demo(out_dir: Path, *, rows: int, seed: int, progress: Progress) -> dict[str, object]:
    """Draw a world, simulate `rows` random exposures in it, learn from them; returns the summary of `learn`.

    The log and its schema stay in `out_dir`, so that `kaleidoscope learn` can be run on them by hand. The summary gains
    `simulated_truth`: what showing everyone a random variant, the best single one, or their own best one really earns.
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
    summary = run_learn(log_path, schema_path, out_dir, seed=seed, progress=progress, simulated=True)
    users = world.sample_users(FRESH_USERS, rng)
    single = np.full(len(users), world.best_single(users))
    truth = {
        "uniform": world.value(users, rng.integers(0, world.n_variants, len(users))),
        "best_single": world.value(users, single),
        "oracle": world.value(users, world.best(users)),
    }
    return {**summary, "simulated_truth": truth}
