"""How fast materials become variants, beside a plain Python loop: `python benchmarks/combine.py`.

Every line runs in a process of its own, so that its peak memory is its own, on one thread. Rates are legal variants per
second into Arrow, ids included. The floor is the time that copying as many bytes as one variant takes would need.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from kaleidoscope.combiner import Option, Slot, Space, count, diagnose, explode, parse, sample, variant_id
from kaleidoscope.coverage import balance, cover, traffic

COLOURS = ("red", "blue", "green", "gold")
RULES = (
    "forbid s0.colour=red with s1.colour=blue",
    "require s1.colour matches s2.colour when s2.colour=green",
    "forbid s0.kind=k0 with s1.kind=k1 with s2.kind=k2",
    "forbid s0:m3 with s2:m4|m5|m6",
    "forbid colour=gold with kind=k3",
)
EXPLODED = ((3, 250), (4, 62), (5, 27))  # slots, materials in each: 14 to 16 million combinations
LOOPED = ((3, 60), (4, 22), (5, 12))  # what the Python loop survives: about 200,000 combinations
COUNTED = ((5, 100), (6, 100), (10, 100), (20, 100))
COVERED = ((3, 100, 12_000), (6, 30, 400), (6, 30, 1_300), (6, 30, 5_000), (6, 100, 2_000), (20, 20, 5_000))
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ARROW_NUM_THREADS")


def main() -> None:
    """Run all parts, print their tables and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=("explode", "count", "cover"), default=("explode", "count", "cover")
    )
    parser.add_argument("--repeat", type=int, default=3, help="runs of each explosion; the fastest counts")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        part, *numbers = args.one
        print(json.dumps(MEASURES[part](*map(int, numbers))))
        return
    figures: list[dict[str, Any]] = []
    if "explode" in args.parts:
        print("slots  combinations       legal  variants/s  of floor  B/variant   MiB    loop/s   ratio")
        for (slots, n), (_, few) in zip(EXPLODED, LOOPED, strict=True):
            f = one("explode", slots, n, args.repeat) | {"loop": one("loop", slots, few)}
            f["ratio"] = f["rate"] / f["loop"]["rate"]
            figures.append(f)
            print(
                f"{slots:>5} {f['combinations']:>13,} {f['legal']:>11,} {f['rate']:>11,.0f} {f['of_floor']:>9.1%} "
                f"{f['bytes']:>10.1f} {f['peak_mib']:>5.0f} {f['loop']['rate']:>9,.0f} {f['ratio']:>7.0f}",
                flush=True,
            )
    if "count" in args.parts:
        print("\nslots  combinations       legal  count ms  diagnose ms  sample 10,000 ms   MiB")
        for slots, n in COUNTED:
            f = one("count", slots, n)
            figures.append(f)
            print(
                f"{slots:>5} {f['combinations']:>13.1e} {f['legal']:>11.3e} {f['count_ms']:>9.1f} "
                f"{f['diagnose_ms']:>12.1f} {f['sample_ms']:>17.1f} {f['peak_mib']:>5.0f}",
                flush=True,
            )
    if "cover" in args.parts:
        print(
            "\nslots  each     cap  variants  seconds    pairs  covered  needed  at least  evenness (random)  "
            "stable  with keep  days   MiB"
        )
        for slots, n, cap in COVERED:
            f = one("cover", slots, n, cap)
            figures.append(f)
            needed = "unknown" if f["needed"] is None else f"{f['needed']:,}"
            print(
                f"{slots:>5} {n:>5} {cap:>7,} {f['variants']:>9,} {f['cover_s']:>8.2f} {f['pairs']:>8,} "
                f"{f['covered']:>8.1%} {needed:>7} {f['at_least']:>9,} {f['evenness']:>8.3f} {f['random']:>9.3f} "
                f"{f['stable']:>7.1%} {f['kept']:>10.1%} {f['days']:>5.0f} {f['peak_mib']:>5.0f}",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def one(*what: object) -> Any:
    """Measure one thing in a process of its own, on one thread."""
    command = [sys.executable, __file__, "--one", *map(str, what)]
    environment = os.environ | dict.fromkeys(THREADS, "1")
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def world(slots: int, n: int) -> Space:
    rng = np.random.default_rng([slots, n])
    made = tuple(
        Slot(
            f"s{s}",
            tuple(
                Option(
                    f"m{i}",
                    {"colour": (str(rng.choice(COLOURS, p=[0.4, 0.3, 0.2, 0.1])),), "kind": (f"k{rng.integers(4)}",)}
                    if s < 3
                    else {f"d{s}": (f"v{rng.integers(3)}",)},
                )
                for i in range(n)
            ),
        )
        for s in range(slots)
    )
    return Space(made, tuple(parse(rule, made) for rule in RULES))


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure_explode(slots: int, n: int, repeat: int) -> dict[str, Any]:
    space, seconds = world(slots, n), []
    for _ in range(repeat):
        start, legal, size = time.perf_counter(), 0, 0
        for batch in explode(space):
            legal += batch.num_rows
            size += sum(b.size for column in batch.columns for b in column.buffers() if b is not None)
        seconds.append(time.perf_counter() - start)
    assert legal == count(space)
    peak = peak_mib()
    source = np.zeros(2**27, np.uint8)
    target = source.copy()
    start = time.perf_counter()
    for _ in range(5):
        np.copyto(target, source)
    bytes_per_s = 5 * source.size / (time.perf_counter() - start)
    rate, size_each = legal / min(seconds), size / legal
    return {
        "slots": slots,
        "combinations": n**slots,
        "legal": legal,
        "rate": rate,
        "bytes": size_each,
        "of_floor": rate * size_each / bytes_per_s,
        "copied_gb_per_s": bytes_per_s / 1e9,
        "peak_mib": peak,
    }


def measure_loop(slots: int, n: int) -> dict[str, Any]:
    """The plain way: every combination, the rules as Python on its tags, a dict with an id for each that is left."""
    space = world(slots, n)
    names = [slot.name for slot in space.slots]
    start, rows = time.perf_counter(), []
    for options in itertools.product(*(slot.options for slot in space.slots)):
        a, b, c = options[0], options[1], options[2]
        if "red" in a.tags["colour"] and "blue" in b.tags["colour"]:
            continue
        if "green" in c.tags["colour"] and not set(b.tags["colour"]) & set(c.tags["colour"]):
            continue
        if "k0" in a.tags["kind"] and "k1" in b.tags["kind"] and "k2" in c.tags["kind"]:
            continue
        if a.id == "m3" and c.id in ("m4", "m5", "m6"):
            continue
        if any("gold" in o.tags.get("colour", ()) for o in options) and any(
            "k3" in o.tags.get("kind", ()) for o in options
        ):
            continue
        materials = {name: option.id for name, option in zip(names, options, strict=True)}
        rows.append({"variant_id": variant_id(materials)} | materials)
    seconds = time.perf_counter() - start
    assert len(rows) == count(space)
    return {"rate": len(rows) / seconds, "legal": len(rows), "peak_mib": peak_mib()}


def measure_count(slots: int, n: int) -> dict[str, Any]:
    sample(world(3, 10), 1, np.random.default_rng(0))  # the first Arrow array imports pandas
    start = time.perf_counter()
    space = world(slots, n)
    built = time.perf_counter()
    legal = count(space)
    counted = time.perf_counter()
    diagnose(space)
    diagnosed = time.perf_counter()
    sample(space, 10_000, np.random.default_rng(0))
    sampled = time.perf_counter()
    return {
        "slots": slots,
        "combinations": float(n) ** slots,
        "legal": float(legal),
        "build_ms": 1e3 * (built - start),
        "count_ms": 1e3 * (counted - built),
        "diagnose_ms": 1e3 * (diagnosed - counted),
        "sample_ms": 1e3 * (sampled - diagnosed),
        "peak_mib": peak_mib(),
    }


def measure_cover(slots: int, n: int, cap: int) -> dict[str, Any]:
    """Cover, then add a material to the first slot and cover again, without and with `keep`."""
    space = world(slots, n)
    sample(space, 1, np.random.default_rng(0))  # the first Arrow array imports pandas
    start = time.perf_counter()
    found = cover(space, cap)
    seconds = time.perf_counter() - start
    peak = peak_mib()
    first = space.slots[0]
    more = Space(
        (Slot(first.name, (*first.options, Option("new", first.options[0].tags))), *space.slots[1:]), space.constraints
    )
    ids = set(found.variants.column("variant_id").to_pylist())
    again = cover(more, cap).variants.column("variant_id").to_pylist()
    kept = cover(more, cap, keep=found.combinations).kept
    drawn = balance(space, sample(space, found.variants.num_rows, np.random.default_rng(0)))
    days = traffic(space, found.variants, exposures_per_day=1e6, click_rate=0.05).of("tag").worst
    return {
        "slots": slots,
        "cover_s": seconds,
        "variants": found.variants.num_rows,
        "pairs": found.pairs_legal,
        "covered": found.pairs_covered / found.pairs_legal,
        "needed": found.needed,
        "at_least": found.needed_at_least,
        "evenness": float(np.mean([b.evenness for b in found.balance])),
        "random": float(np.mean([b.evenness for b in drawn])),
        "stable": len(ids.intersection(again)) / len(ids),
        "kept": kept / len(ids),
        "days": days.days if days is not None else None,
        "peak_mib": peak,
    }


MEASURES: dict[str, Any] = {
    "explode": measure_explode,
    "loop": measure_loop,
    "count": measure_count,
    "cover": measure_cover,
}

if __name__ == "__main__":
    main()
