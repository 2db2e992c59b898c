"""How true insights are, on worlds whose preferences are known: recall, false discoveries, coverage, null worlds.

Worlds have eight correlated user features (numbers and choices), materials that carry two tags each, and planted
preferences of odds ratios 1.2–2 between halves of the users; logs are 200,000 exposures of the random bucket. All
numbers are simulated. `--out FILE` keeps a line of JSON per world, and a second run goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this file has the name of the package

from attribution.coding import code
from attribution.insights import attribute_coded, without_noise
from kaleidoscope.log import Log
from kaleidoscope.log_schema import LogSchema
from kaleidoscope.simulation import Population, PopulationSpec

SLOTS = {"copy": ("tone", "urgency"), "image": ("style", "colour"), "layout": ("density", "button")}
MATERIALS = 6  # of each slot
VALUES = 3  # of each tag dimension
RATIOS = (1.2, 2.0)  # odds ratios between the halves
POWER = 0.9

FEATURES: list[dict[str, Any]] = [
    {"name": "age", "quantiles": [18, 25, 32, 41, 53, 75]},
    {"name": "income", "quantiles": [1, 2.4, 3.5, 5, 9, 40], "step": 0.1, "missing": 0.1},
    {"name": "tenure", "quantiles": [0, 3, 12, 30, 90]},
    {"name": "city", "shares": {"small": 0.4, "middle": 0.35, "large": 0.25}},
    {"name": "education", "shares": {"school": 0.3, "college": 0.4, "university": 0.3}},
    {"name": "gender", "shares": {"female": 0.5, "male": 0.5}},
    {"name": "device", "shares": {"old": 0.2, "android": 0.5, "ios": 0.3}},
    {"name": "channel", "shares": {"search": 0.3, "social": 0.25, "mail": 0.25, "direct": 0.2}},
]
CORRELATIONS = [
    {"between": ["age", "income"], "rho": 0.4},
    {"between": ["income", "education"], "rho": 0.5},
    {"between": ["income", "city"], "rho": 0.3},
    {"between": ["age", "tenure"], "rho": 0.3},
    {"between": ["income", "device"], "rho": 0.3},
]


@dataclass(frozen=True)
class Variant:
    id: str
    materials: dict[str, str]
    tags: dict[str, tuple[str, ...]]


def variants(seed: int) -> list[Variant]:
    """Every combination of three materials; each material carries a value of both dimensions of its slot."""
    rng = np.random.default_rng([seed, 7])
    options = []
    for slot, dimensions in SLOTS.items():
        columns = [rng.permutation(np.arange(MATERIALS) % VALUES) for _ in dimensions]
        options.append([(slot, m, {d: f"{d}_{c[m]}" for d, c in zip(dimensions, columns, strict=True)})
                        for m in range(MATERIALS)])  # fmt: skip
    found = []
    for chosen in product(*options):
        tags = {d: (v,) for _, _, carried in chosen for d, v in carried.items()}
        found.append(Variant("-".join(str(m) for _, m, _ in chosen), {s: f"{s}_{m}" for s, m, _ in chosen}, tags))
    return found


def population(seed: int, interactions: int, base_ctr: float = 0.05) -> Population:
    tags = [f"{d}={d}_{v}" for dimensions in SLOTS.values() for d in dimensions for v in range(VALUES)]
    size = tuple(float(np.log(ratio) / 2) for ratio in RATIOS)
    spec = {
        "base_ctr": base_ctr,
        "features": FEATURES,
        "correlations": CORRELATIONS,
        "effects": {"tag_sd": 0.15, "material_sd": 0.05, "feature_sd": 0.2},
        "random_interactions": {
            "count": interactions, "size": size, "features": [f["name"] for f in FEATURES], "tags": tags,
        },
    }  # fmt: skip
    return Population(PopulationSpec.model_validate(spec), seed)


def planted(seed: int, interactions: int, rows: int) -> tuple[Log, NDArray[np.float64], set[tuple[str, str]]]:
    """A log of the random bucket, the click probabilities of its exposures, and the pairs that interact in truth."""
    world, shown, rng = population(seed, interactions), variants(seed), np.random.default_rng([seed, 11])
    scene, people = world.scene(shown), world.people(rows)
    variant = rng.integers(0, len(shown), rows)
    probability = expit(scene.click_logit_of(people, variant))
    columns: dict[str, Any] = {}
    for feature in world.spec.features:
        values, mask = people.values[feature.name], ~people.known[feature.name]
        if feature.quantiles is not None:
            columns[feature.name] = pa.array(values, mask=mask)
        else:
            codes = pa.array(values.astype(np.int32), mask=mask)
            columns[feature.name] = pa.DictionaryArray.from_arrays(codes, pa.array(feature.choices))
    dimensions = [d for of_slot in SLOTS.values() for d in of_slot]
    table: dict[str, Any] = {"variant_id": [v.id for v in shown]}
    table |= {d: [list(v.tags[d]) for v in shown] for d in dimensions}
    log = Log(
        path=Path("planted"), schema=LogSchema(label="click", user=tuple(columns), variant=tuple(dimensions)),
        columns=columns, reward=(rng.random(rows) < probability).astype(np.float32), count=np.ones(rows),
        weight=np.ones(rows), variant=variant, variants=pa.table(table), unit=np.arange(rows), group=None, groups=None,
        product=None, products=None, propensity=None, time=None, file_row=np.arange(rows), file_rows=rows,
    )  # fmt: skip
    return log, probability, world.planted_pairs()


def measure(seed: int, interactions: int, rows: int) -> dict[str, Any]:
    """What was found in one world, and how true it is."""
    log, probability, truth = planted(seed, interactions, rows)
    start = time.perf_counter()
    coded = code(log, dependent=False)
    result = attribute_coded(coded)
    seconds = time.perf_counter() - start
    d, examined = result.diagnostics, result.diagnostics.examined
    alone, joint = without_noise(coded, probability, d)
    found = [{(f, dimension) for f in i.segment for dimension in i.tag} for i in result.insights]
    true = [bool(pairs & truth) for pairs in found]
    known = np.isfinite(alone)
    low, high = examined.interval()
    covered = ((low <= alone) & (alone <= high))[known]
    reported = [
        bool(np.expm1(g) >= i.ci_low - 1e-9 and np.expm1(g) <= i.ci_high + 1e-9)
        for g, i in zip(joint, result.insights, strict=True)
        if np.isfinite(g)
    ]
    power = np.zeros(len(alone))
    power[known] = stats.norm.sf(examined.search.threshold - np.abs(alone / examined.se))[known]
    able: dict[tuple[str, str], float] = {}
    for segment, tag, p in zip(examined.segments, examined.tags, power, strict=True):
        for dimension in coded.tags[tag].dimensions & {d for f, d in truth if f == segment.field}:
            able[segment.field, dimension] = max(able.get((segment.field, dimension), 0.0), float(p))
    strong = [pair for pair, p in able.items() if p >= POWER]
    return {
        "seed": seed, "interactions": interactions, "rows": rows, "seconds": seconds, "examined": len(alone),
        "insights": len(found), "false": len(true) - sum(true),
        "families": len({min(pairs) for pairs in found}),
        "false_families": len({min(pairs) for pairs, ok in zip(found, true, strict=True) if not ok}),
        "strong": len(strong), "recalled": sum(any(pair in pairs for pairs in found) for pair in strong),
        "covered": int(covered.sum()), "coverable": len(covered),
        "reported_covered": sum(reported), "reported": len(reported),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every world, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--null-worlds", type=int, default=100)
    parser.add_argument("--interactions", type=int, default=6)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--null-rows", type=int, default=50_000)
    parser.add_argument("--out", type=Path, help="keep the figures there, a line of JSON per world; go on from them")
    args = parser.parse_args(arguments)
    known: dict[tuple[int, ...], dict[str, Any]] = {}
    if args.out and args.out.exists():
        for line in args.out.read_text(encoding="utf-8").splitlines():
            figures = json.loads(line)
            known[figures["interactions"], figures["rows"], figures["seed"]] = figures
    wanted = [(args.interactions, args.rows, s) for s in range(args.worlds)]
    wanted += [(0, args.null_rows, 1_000 + s) for s in range(args.null_worlds)]
    for interactions, rows, seed in wanted:
        if (interactions, rows, seed) not in known:
            figures = measure(seed, interactions, rows)
            known[interactions, rows, seed] = figures
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(figures) + "\n")
    worlds = [known[key] for key in wanted if key[0]]
    nulls = [known[key] for key in wanted if not key[0]]
    if worlds:
        summarise(worlds)
    if nulls:
        found = sum(f["insights"] > 0 for f in nulls)
        share, limit = found / len(nulls), 0.05 + 2 * (0.05 * 0.95 / len(nulls)) ** 0.5
        covered = sum(f["covered"] for f in nulls) / max(sum(f["coverable"] for f in nulls), 1)
        print(f"null worlds {len(nulls)}: something found in {share:.3f} (at most {limit:.3f}); coverage {covered:.4f}")


def summarise(worlds: Sequence[dict[str, Any]]) -> None:
    print(" seed seconds examined insights false families false strong recalled coverage of reported")
    for f in worlds:
        print(
            f"{f['seed']:>5} {f['seconds']:>7.1f} {f['examined']:>8} {f['insights']:>8} {f['false']:>5} "
            f"{f['families']:>8} {f['false_families']:>5} {f['strong']:>6} {f['recalled']:>8} "
            f"{f['covered'] / f['coverable']:>8.4f} {f['reported_covered']:>4} of {f['reported']}"
        )
    total = {key: sum(f[key] for f in worlds) for key in worlds[0]}
    share = np.mean([f["false"] / max(f["insights"], 1) for f in worlds])
    families = np.mean([f["false_families"] / max(f["families"], 1) for f in worlds])
    print(
        f"recall {total['recalled'] / max(total['strong'], 1):.3f} of {total['strong']} with power ≥ {POWER}; "
        f"false discoveries {share:.3f} of insights, {families:.3f} of (field, dimension); coverage "
        f"{total['covered'] / total['coverable']:.4f} over all examined, "
        f"{total['reported_covered'] / max(total['reported'], 1):.4f} of {total['reported']} reported"
    )


if __name__ == "__main__":
    main()
