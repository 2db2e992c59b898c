"""Quality and speed of the CTR models on the planted log, side by side in one run: `make bench`.

Every model runs in a process of its own, so that its peak memory is its own. The policy value is the mean true click
rate of the model's picks for fresh users, as a share of the oracle's. All numbers are simulated.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from kaleidoscope.encoding import Encoder
from kaleidoscope.simulation import World, WorldSpec
from models.baselines import CrossedLogistic, Ebm, LightGbm, Model, MostPopular
from models.batch import Examples
from models.metrics import AucSums, LogLossSums
from models.train import CtrModel

MODELS: dict[str, type[Model]] = {
    "network": CtrModel,
    "lightgbm": LightGbm,
    "crossed_logistic": CrossedLogistic,
    "ebm": Ebm,
    "most_popular": MostPopular,
}
HELD_ROWS = 200_000
FRESH_USERS = 2_000
EBM_ROWS = 300_000  # at 1M rows it had not finished after 16 CPU minutes: --slow
HIDDEN = 200


def main() -> None:
    """Run every model at every size, print a table and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--slow", action="store_true", help=f"run the EBM on more than {EBM_ROWS:,} rows too")
    parser.add_argument("--hide", action="store_true", help="hide 200 of the 1,000 variants in training; AUC on them")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "ROWS", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), int(args.one[2]), hide=args.hide)))
        return
    figures: list[dict[str, Any]] = []
    print("     rows seed model              seconds    rows/s   GiB     AUC log loss of oracle")
    for rows in args.rows:
        for seed in args.seeds:
            for name in args.models:
                if name == "ebm" and rows > EBM_ROWS and not args.slow:
                    continue
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    name,
                    str(rows),
                    str(seed),
                    *(["--hide"] if args.hide else []),
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                f = json.loads(done.stdout.splitlines()[-1])
                figures.append(f)
                print(
                    f"{rows:>9,} {seed:>4} {name:<17} {f['fit_s']:>8.1f} {f['rows_per_s']:>9,.0f} "
                    f"{f['peak_gib']:>5.2f} "
                    f"{f['auc']:>7.4f} {f['logloss']:>8.5f} {f['share_of_oracle']:>9.3f}"
                    + (f"   AUC seen {f['auc_seen']:.4f}, hidden {f['auc_hidden']:.4f}" if args.hide else ""),
                    flush=True,
                )
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measure(name: str, rows: int, seed: int, *, hide: bool) -> dict[str, Any]:
    """Fit one model to one planted log and judge it on fresh users."""
    world, rng = World.draw(WorldSpec(seed=seed)), np.random.default_rng([seed, 2])
    hidden = rng.permutation(world.n_variants)[:HIDDEN] if hide else None
    train, encoder = _examples(world, rows, rng, hidden=hidden)
    start = time.perf_counter()
    model = MODELS[name].fit(train, encoder, seed=seed)
    seconds = time.perf_counter() - start
    held, _ = _examples(world, HELD_ROWS, rng, encoder=encoder)
    p = model.predict(held.features, held.variant)
    users = world.sample_users(FRESH_USERS, rng)
    picks = model.rank(encoder.features(world.columns(users))).argmax(axis=1)
    out = {
        "model": name,
        "rows": rows,
        "seed": seed,
        "fit_s": seconds,
        "rows_per_s": rows / seconds,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "auc": AucSums.of(p, held.reward).value,
        "logloss": LogLossSums.of(p, held.reward).value,
        "share_of_oracle": world.value(users, picks) / world.value(users, world.best(users)),
        "best_single_share": world.value(users, np.full(len(users), world.best_single(users)))
        / world.value(users, world.best(users)),
    }
    if hidden is not None:
        unseen = np.isin(held.variant, hidden)
        out["auc_hidden"] = AucSums.of(p[unseen], held.reward[unseen]).value
        out["auc_seen"] = AucSums.of(p[~unseen], held.reward[~unseen]).value
    return out


def _examples(
    world: World, rows: int, rng: np.random.Generator, *, encoder: Encoder | None = None, hidden: Any = None
) -> tuple[Examples, Encoder]:
    """A log of the world as a model reads it; all variants are known, the hidden ones never shown."""
    shown = np.arange(world.n_variants) if hidden is None else np.setdiff1d(np.arange(world.n_variants), hidden)
    users, variant = world.sample_users(rows, rng), shown[rng.integers(0, len(shown), rows)]
    reward = (rng.random(rows) < expit(world.logits_of(users, variant))).astype(np.float32)
    columns, variants = world.columns(users), world.variants
    names = list(world.field_names)
    encoder = encoder or Encoder.fit(
        columns, user=names, context=[], variants=variants, dimensions=variants.column_names
    )
    tags = encoder.tags(variants)
    return Examples(encoder.features(columns), variant, tags, reward, np.ones(rows), np.arange(rows)), encoder


if __name__ == "__main__":
    main()
