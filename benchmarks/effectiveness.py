"""How often the three doubts about a lift are right: `python benchmarks/effectiveness.py [--logs 100] [--large 18]`.

Four simulated worlds whose truth is known (those of tests/attribution/test_effectiveness.py): no differences; one
variant best for all; opposite tastes; several good variants and some taste. Nothing in them changes with time, and
buckets differ by chance alone: a trend or a difference that is seen is a false one. `--large` is of the example scene's
576 variants.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this file has the name of a module of the package

from attribution.effectiveness import Judgement, Measured, effectiveness
from kaleidoscope.log import Log, densify
from kaleidoscope.simulation import Population, example_variants, read_population
from tests.attribution.logs import log_of
from tests.attribution.test_effectiveness import DAY_S, DEMO, SHARES, START_S, covers, drawn, parts_in_truth

WORLDS: Mapping[str, tuple[tuple[float, ...], float]] = {
    "no differences": ((0.0,) * 6, 0.0),
    "one best for all": ((0.0, 0.0, 0.5, 0.0, 0.0, 0.0), 0.0),
    "opposite tastes": ((0.0,) * 6, 0.5),
    "several good ones and some taste": ((0.0, 0.2, 0.3, 0.1, 0.25, 0.0), 0.3),
}
PARTS = ("lift", "best_single", "personalisation")
EPSILON = 0.1


def small(world: str, logs: int, units: int) -> dict[str, Any]:
    """Of so many logs of a world: the share in which a trend and a difference is seen, and in which intervals cover."""
    main, taste = WORLDS[world]
    truth = dict(zip(PARTS, parts_in_truth(main, taste, 0), strict=True))
    counts: dict[str, float] = dict.fromkeys(
        ("trend_seen", "difference_seen", "ratio_flagged", "split_known", *PARTS), 0
    )
    begun = time.perf_counter()
    for seed in range(logs):
        found = effectiveness(drawn(2_000 + seed, units=units, main=main, taste=taste, shown=0), shares=SHARES)
        ratio, split = found.other_causes.sample_ratio, found.eye_catching.split
        counts["trend_seen"] += found.fatigue.verdict is Judgement.SIGN
        counts["difference_seen"] += found.other_causes.verdict is Judgement.SIGN
        counts["ratio_flagged"] += ratio is not None and ratio.flagged
        counts["split_known"] += split is not None
        for part in PARTS if split is not None else ():
            counts[part] += covers(getattr(split, part), truth[part])
    known = counts.pop("split_known")
    shares = {name: n / (known if name in PARTS else logs) for name, n in counts.items()}
    return {"logs": logs, "split_known": known / logs, **shares, "seconds_a_log": (time.perf_counter() - begun) / logs}


def large_log(seed: int, at_random: int) -> tuple[Log, float, float]:
    """The example scene in a world of its own: as many exposures of the model's bucket as at random, and half as many
    of control; and the true click rates of the best single variant and of control's."""
    world = Population(read_population(), seed)
    scene, people = world.scene(example_variants(DEMO)), world.people(4_000)
    rate = np.concatenate(
        [expit(scene.click_logit(people.take(rows))) for rows in np.array_split(np.arange(4_000), 40)]
    )
    values, rng = rate.mean(axis=0), np.random.default_rng([seed, 9])
    control = int(np.argsort(values)[len(values) // 2])
    best = rate.argmax(axis=1)
    place = rng.random(4_000)
    bucket_of = np.select([place < 0.2, place < 0.6], [0, 1], 2)  # control, model, random
    unit = rng.integers(0, 4_000, round(2.5 * at_random))
    bucket, n = bucket_of[unit], len(unit)
    drawn_at_random = (bucket == 2) | ((bucket == 1) & (rng.random(n) < EPSILON))
    uniform = rng.integers(0, rate.shape[1], n)
    variant = np.where(drawn_at_random, uniform, np.where(bucket == 0, control, best[unit]))
    share = EPSILON / rate.shape[1]
    chosen = np.where(variant == best[unit], 1 - EPSILON, 0.0) + share
    table = scene.tag_table()
    tags = {name: table[name].to_pylist() for name in table.column_names if name != "variant_id"}
    log = log_of(
        {"age": people.values["age"][unit]}, tags, variant, rng.random(n) < rate[unit, variant], unit=densify(unit),
        propensity=np.select([bucket == 0, bucket == 2], [1.0, 1 / rate.shape[1]], chosen),
        bucket=np.array(["control", "model", "random"])[bucket],
    )  # fmt: skip
    return replace(log, time=START_S + rng.random(n) * 14 * DAY_S), float(values.max()), float(values[control])


def large(seed: int, at_random: int) -> dict[str, Any]:
    """Of one world of 576 variants: what the best single variant brings over control, what it is said to, and how much
    too high the rate is that this says it has."""
    log, best, control = large_log(seed, at_random)
    truth = best / control - 1
    assert log.bucket is not None and log.buckets is not None
    of_control = log.reward[log.bucket == log.buckets.to_pylist().index("control")].mean()
    begun = time.perf_counter()
    split = effectiveness(log).eye_catching.split
    seconds = time.perf_counter() - begun
    if split is None:
        return {"seed": seed, "exposures": len(log), "seconds": seconds, "truth": truth, "found": None}
    single: Measured = split.best_single
    error = (single.ci_high - single.ci_low) / 2 / 1.984  # t of 99 degrees of freedom
    return {
        "seed": seed, "exposures": len(log), "seconds": seconds, "truth": truth, "found": single.value,
        "too_high": float((1 + single.value) * of_control / best - 1), "errors_off": (single.value - truth) / error,
        "covers": covers(single, truth),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, default=100, help="of each of the four worlds")
    parser.add_argument("--worlds", nargs="*", choices=tuple(WORLDS), default=tuple(WORLDS), help="which of them")
    parser.add_argument("--units", type=int, default=4_000, help="of a log of them; each comes five times on average")
    parser.add_argument("--large", type=int, default=0, help="worlds of 576 variants")
    parser.add_argument("--at-random", type=int, default=100_000, help="exposures of their random bucket")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    figures: dict[str, Any] = {"worlds": {}, "large": []}
    for world in args.worlds if args.logs else ():
        found = figures["worlds"][world] = small(world, args.logs, args.units)
        print(f"{world}: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()), flush=True)
    if args.logs:
        error = (0.05 * 0.95 / args.logs) ** 0.5
        print(f"a share of .05 or .95 of {args.logs} logs has a standard error of {error:.3f}")
    for seed in range(args.large):
        found = large(seed, args.at_random)
        figures["large"].append(found)
        print(", ".join(f"{name} {value:.3g}" for name, value in found.items() if value is not None), flush=True)
    off = [one["too_high"] for one in figures["large"] if one["found"] is not None]
    if off:
        worst = max(abs(one["errors_off"]) for one in figures["large"] if one["found"] is not None)
        mean, error = np.mean(off), np.std(off) / len(off) ** 0.5
        print(f"{len(off)} worlds: rates {mean:+.1%} ± {error:.1%} too high, lifts up to {worst:.1f} errors off")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
