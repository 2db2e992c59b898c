"""An EBM of user fields × tags against `interpret` called plainly on the same rows: seconds, AUC, pairs, shapes.

Plain is `ExplainableBoostingClassifier(outer_bags=…)` on the raw columns with everything else at its default. Both have
the same bags, learning rate, rounds and early stopping. AUC is of units neither has seen. The world is simulated, with
planted preferences (`benchmarks/attribution.py`); "recovered" are the planted pairs among as many of the most important
user × tag pairs as were planted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import logit
from sklearn.metrics import roc_auc_score

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this folder has modules with the names of packages

from attribution.coding import code
from attribution.ebm import OUTER_BAGS, Boosted, boosted
from benchmarks.attribution import planted
from kaleidoscope.log import Log

Pair = tuple[str, str]


def frame(log: Log) -> pd.DataFrame:
    """The raw columns: numbers as they are, texts as categories, one column for each tag dimension."""
    columns: dict[str, Any] = {name: log.columns[name].to_pandas() for name in log.schema.user}
    for dimension in log.schema.variant:
        values = np.array(["|".join(v or ()) for v in log.variants[dimension].to_pylist()], dtype=object)
        columns[dimension] = values[log.variant]
    return pd.DataFrame(columns)


def timed(fit: Any) -> tuple[Any, float, float]:
    """What `fit` returns, wall seconds, and CPU seconds of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    return fit(), time.perf_counter() - wall, time.process_time() - cpu


def plainly(train: Log, outer_bags: int) -> Any:
    """`interpret` called plainly."""
    from interpret.glassbox import ExplainableBoostingClassifier

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Missing values detected")
        model = ExplainableBoostingClassifier(outer_bags=outer_bags)
        return model.fit(frame(train), train.reward.astype(np.int64))


def ours(train: Log, outer_bags: int) -> Boosted:
    """The EBM of this platform, from the same log."""
    return boosted(code(train, dependent=False), outer_bags=outer_bags)


def most_important(importance: dict[Pair, float], many: int) -> set[Pair]:
    return set(sorted(importance, key=lambda pair: -importance[pair])[:many])


def correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def measure(rows: int, seed: int, interactions: int, outer_bags: int, held_out: int) -> dict[str, Any]:
    """Both models of one world."""
    log, probability, truth = planted(seed, interactions, rows + held_out)
    train, test = log.take(np.arange(rows)), log.take(np.arange(rows, rows + held_out))
    true_logit = logit(probability[rows:])
    own, own_wall, own_cpu = timed(lambda: ours(train, outer_bags))
    plain, plain_wall, plain_cpu = timed(lambda: plainly(train, outer_bags))

    coded = code(test, dependent=False, fields=code(train, dependent=False).fields)
    own_logit = own.logit(coded)
    table = frame(test)
    terms = plain.eval_terms(table)
    plain_logit = terms.sum(axis=1) + float(plain.intercept_[0])
    users, dimensions = set(log.schema.user), set(log.schema.variant)
    names = [tuple(plain.feature_names_in_[i] for i in features) for features in plain.term_features_]
    of_plain = {
        (a, b) if a in users else (b, a): float(importance)
        for (a, b), importance in (
            (pair, value) for pair, value in zip(names, plain.term_importances(), strict=True) if len(pair) == 2
        )
        if len({a, b} & users) == 1 and len({a, b} & dimensions) == 1
    }
    of_ours = {(m.field, m.dimension): m.importance for m in own.heat_maps}
    shapes, others = (
        np.stack(columns)
        for columns in zip(
            *(
                (scores.mean(axis=0)[axis.codes(coded)], terms[:, names.index((axis.name,))])
                for axis, scores in zip(own.axes, own.main, strict=True)
            ),
            strict=True,
        )
    )
    apart = (shapes - shapes.mean(axis=1, keepdims=True)) - (others - others.mean(axis=1, keepdims=True))
    found = {"plain": most_important(of_plain, len(truth)), "ours": most_important(of_ours, len(truth))}
    return {
        "rows": rows, "held_out": held_out, "outer_bags": outer_bags, "seed": seed,
        "planted": sorted(truth),
        "plain_s": plain_wall, "ours_s": own_wall, "times_faster": plain_wall / own_wall,
        "plain_cpu_s": plain_cpu, "ours_cpu_s": own_cpu,
        "plain_auc": float(roc_auc_score(test.reward, plain_logit)),
        "ours_auc": float(roc_auc_score(test.reward, own_logit)),
        "true_auc": float(roc_auc_score(test.reward, true_logit)),
        "plain_recovered": sorted(found["plain"] & truth), "ours_recovered": sorted(found["ours"] & truth),
        "plain_pairs": len(names) - len(users) - len(dimensions), "ours_pairs": len(of_ours),
        "logits_correlation": correlation(own_logit, plain_logit),
        "plain_with_truth": correlation(plain_logit, true_logit),
        "ours_with_truth": correlation(own_logit, true_logit),
        "shapes_correlation": correlation(shapes.sum(axis=0), others.sum(axis=0)),
        "shapes_apart": float(np.sqrt((apart**2).mean(axis=1)).max()),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--held-out", type=int, default=200_000, help="units that neither model sees")
    parser.add_argument("--outer-bags", type=int, default=OUTER_BAGS)
    parser.add_argument("--interactions", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    f = measure(args.rows, args.seed, args.interactions, args.outer_bags, args.held_out)
    if args.json:
        print(json.dumps(f))
        return
    print(f"{f['rows']:,} rows (simulated), {f['outer_bags']} outer bags, {f['held_out']:,} held-out units")
    print(f"       seconds  CPU s  AUC     pairs  recovered of {len(f['planted'])}  correlation with the true logit")
    for name in ("plain", "ours"):
        print(
            f"{name:<6} {f[name + '_s']:>7.1f} {f[name + '_cpu_s']:>6.1f}  {f[name + '_auc']:.5f} "
            f"{f[name + '_pairs']:>5}  {len(f[name + '_recovered']):>14}  {f[name + '_with_truth']:.4f}"
        )
    print(f"AUC of the true probabilities {f['true_auc']:.5f}; ours − plain {f['ours_auc'] - f['plain_auc']:+.5f}")
    print(
        f"{f['times_faster']:.1f} × faster; same pairs recovered: "
        f"{'yes' if f['plain_recovered'] == f['ours_recovered'] else 'no'}; correlation of logits "
        f"{f['logits_correlation']:.4f}, of summed shapes {f['shapes_correlation']:.4f}; a shape differs by at most "
        f"{f['shapes_apart']:.3f} (root mean square, logit)"
    )


if __name__ == "__main__":
    main()
