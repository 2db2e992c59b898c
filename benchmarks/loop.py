"""What the demo's loop achieves over several simulated worlds, with and without preferences to personalise for.

    python benchmarks/loop.py --seeds 0 1 2 3 4 --out loop.jsonl

Every run is `kaleidoscope demo` in a folder of its own: explore, train, gate, canary, compare. Worlds without
preferences come last. All numbers are simulated. `--out FILE` keeps a line of JSON per run, and a second run goes on
where the first stopped.

The demo has no bucket of the best single variant, so in worlds without preferences the model is held against it twice:

- by the gate's doubly robust gain of the model over the best single variant *that was learned*, on units which neither
  had seen, with its 95 % interval. An edge is significant where the interval is above 0. That is what the platform can
  know without knowing the world;
- by the world's own click probabilities for the visits where the model ranked, against the variant that is *truly* best
  for everybody. Here chance is only in who came by, and no learned policy can be above 0 but for users who tire less of
  several variants than of one.

Clicks of bucket model are not held against the true rate of the best single variant: an exposure that was seen twice
may be clicked at either time, so that click rates of every bucket in a log lie a little above true rates per visit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # a file beside this one has the name of the package attribution

from kaleidoscope.commands.demo import Plan, run_loop
from kaleidoscope.progress import Silent
from kaleidoscope.settings import Settings
from kaleidoscope.simulation import read_population

Row = dict[str, Any]


def main() -> None:
    """Run the loop in every world, and print a table with mean and worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--visits", type=int, default=Plan().visits)
    parser.add_argument("--out", type=Path, help="JSON lines; worlds that are in it are not run again")
    args = parser.parse_args()
    rows = _kept(args.out)
    for preferences in (True, False):
        print(_HEADS[preferences], flush=True)
        found = []
        for seed in args.seeds:
            same = {"seed": seed, "preferences": preferences, "visits": args.visits}
            row = next((row for row in rows if same.items() <= row.items()), None)
            if row is None:
                row = measure(seed, preferences=preferences, visits=args.visits)
                if args.out:
                    with args.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
            found.append(row)
            print(_line(row, str(seed)), flush=True)
        for what, over in (("mean", _mean), ("worst", _worst)):
            print(_line(over(found), what), flush=True)
        print(flush=True)


def measure(seed: int, *, preferences: bool, visits: int) -> Row:
    """One run of the loop: what its summary says of the questions above. Shares of 1; None: unknown."""
    world = read_population()
    with tempfile.TemporaryDirectory(prefix="kaleidoscope-loop-") as folder:
        s = run_loop(
            Path(folder) / "out",
            settings=Settings(),
            seed=seed,
            progress=Silent(),
            plan=replace(Plan(), visits=visits),
            world=world if preferences else world.without_preferences(),
        )
    gate, ranked, buckets = s["model"]["gate"], s["truth"]["ranked"], s["buckets"]
    over = gate["gains"].get("best_single") or dict.fromkeys(("value", "ci_low", "ci_high"))
    return {
        "seed": seed, "preferences": preferences, "visits": visits, "simulated": True,
        "gate": gate["verdict"], "release": s["release"],
        "control_ctr": buckets["control"]["ctr"],
        **{f"{b}_{k}": buckets.get(b, {}).get(k) for b in ("random", "model") for k in ("lift", "ci_low", "ci_high")},
        "share_of_oracle_lift": s["share_of_oracle_lift"],
        "share_with_exploration": s["truth"]["with_exploration"]["share_of_oracle_lift"],
        "share_of_oracle_personalisation": s["share_of_oracle_personalisation"],
        "gain_over_single": over["value"], "gain_ci_low": over["ci_low"], "gain_ci_high": over["ci_high"],
        "true_edge": ranked["shown"] - ranked["best_single"] if "shown" in ranked else None,
        "true_single": ranked.get("best_single"),
        "insights": len(s["insights"]), "planted": s["preferences"]["planted"],
        "recovered": sum(s["preferences"]["findings"].values()),
        "srm_flagged": None if s["srm"] is None else s["srm"]["flagged"],
        "p99_ms": s["decision_p99_ms"], "http_p99_ms": s["http"]["p99_ms"], "seconds": s["seconds"],
    }  # fmt: skip


def _kept(out: Path | None) -> list[Row]:
    if out is None or not out.exists():
        return []
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines() if line.strip()]


# ── the table ──

# Which end of a column is the worst.
_WORST: dict[str, Callable[[Sequence[float]], float]] = {
    "random_lift": max, "random_ci_low": max, "random_ci_high": max,
    "model_lift": min, "model_ci_low": min, "model_ci_high": min,
    "share_of_oracle_lift": min, "share_with_exploration": min, "share_of_oracle_personalisation": min,
    "gain_over_single": max, "gain_ci_low": max, "gain_ci_high": max, "true_edge": max, "true_single": min,
    "recovered": min, "insights": max, "planted": min, "p99_ms": max, "http_p99_ms": max, "seconds": max,
}  # fmt: skip
_HEADS = {
    True: "Worlds with preferences (simulated). Lifts over control, with intervals that hold at any time.\n"
    "seed  gate     random, lift           model, lift            of oracle's  drawn   of personal-  findings  planted"
    "    p99   HTTP     run\n"
    "                                                             lift         incl.   isation",
    False: "Worlds without preferences (simulated). The model's edge over the best single variant, in points of CTR:\n"
    "what the gate measures on held-out units, and what is true where the model ranked (and the best single's CTR).\n"
    "seed  gate     gate: edge               above 0?  true edge  (best single)  insights     run",
}


def _mean(rows: Sequence[Row]) -> Row:
    return _over(rows, dict.fromkeys(_WORST, lambda values: float(np.mean(values))))


def _worst(rows: Sequence[Row]) -> Row:
    return _over(rows, _WORST)


def _over(rows: Sequence[Row], how: dict[str, Callable[[Sequence[float]], float]]) -> Row:
    """A row of all rows; what is unknown in one does not count. `significant`: in how many an edge is."""
    out: Row = {"preferences": rows[0]["preferences"], "gate": ""}
    for name, of in how.items():
        known = [row[name] for row in rows if row[name] is not None]
        out[name] = of(known) if known else None
    out["significant"] = f"{sum(_significant(row) for row in rows)} of {len(rows)}"
    return out


def _significant(row: Row) -> bool:
    return row["gain_ci_low"] is not None and row["gain_ci_low"] > 0


def _line(row: Row, name: str) -> str:
    def number(key: str, scale: float = 1.0, form: str = ".0f") -> str:
        return "?" if row[key] is None else format(scale * row[key], form)

    def lift(bucket: str) -> str:
        value, low, high = (number(f"{bucket}_{end}", 100, "+.0f") for end in ("lift", "ci_low", "ci_high"))
        return f"{value} % ({low} to {high})"

    start = f"{name:<6}{row['gate']:<9}"
    if row["preferences"]:
        lift_share, drawn, personal = (
            number(key, 100, ".1f") + " %"
            for key in ("share_of_oracle_lift", "share_with_exploration", "share_of_oracle_personalisation")
        )
        return (
            f"{start}{lift('random'):<23}{lift('model'):<23}{lift_share:<13}{drawn:<8}{personal:<14}"
            f"{number('recovered', 1, '.3g') + ' of 6':<10}"
            f"{number('planted', 1, '.3g') + '/' + number('insights', 1, '.3g'):<9}"
            f"{number('p99_ms', 1, '.1f'):>4} ms{number('http_p99_ms', 1, '.0f'):>4} ms{number('seconds'):>6} s"
        )
    gain, low, high = (number(key, 100, "+.2f") for key in ("gain_over_single", "gain_ci_low", "gain_ci_high"))
    above = row.get("significant") or ("yes" if _significant(row) else "no")
    return (
        f"{start}{f'{gain} ({low} to {high})':<25}{above:<10}{number('true_edge', 100, '+.3f'):<11}"
        f"{number('true_single', 100, '.2f') + ' %':<15}{number('insights', 1, '.3g'):<10}{number('seconds'):>6} s"
    )


if __name__ == "__main__":
    main()
