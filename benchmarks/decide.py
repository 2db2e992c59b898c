"""How fast a decision is, one at a time and in batches, and the share of it spent in the model.

`python benchmarks/decide.py`. The model is a stand-in that takes one matrix product; what is measured is everything
around it: rules, ranking, draws, records, and where it says so the payload and the signed token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kaleidoscope.content import DEFAULT_PLACEHOLDERS
from kaleidoscope.decide import Request, Served, decide, decide_many, prepare
from kaleidoscope.decision_record import Keyring
from kaleidoscope.interventions import DescribedVariant, Rule
from kaleidoscope.release import (
    Frequency,
    MaterialSnapshot,
    PolicyKind,
    PolicySpec,
    ReleaseContent,
    SceneSnapshot,
    Shares,
    SlotSnapshot,
)
from kaleidoscope.vocabulary import InterventionKind, MaterialKind

START = datetime(2026, 1, 1, tzinfo=UTC)
KEYS = Keyring({"k1": b"0123456789abcdef"})
HEADS = 8
FIELDS = {"age": (18, 80), "income": (0, 9), "tenure": (0, 400), "visits": (0, 50), "hour": (0, 24)}


class Product:
    """A scorer of one product of numbers of the user with a matrix of the variants; counts the time it takes."""

    version = "product"

    def __init__(self) -> None:
        self.spent_s = 0.0

    def variant_side(self, variants: pa.Table) -> NDArray[np.float32]:
        rng = np.random.default_rng(0)
        return rng.normal(0, 0.3, (HEADS, len(FIELDS), len(variants))).astype(np.float32)

    def features(self, columns: Mapping[str, Sequence[Any]], rows: int) -> NDArray[np.float32]:
        begin = time.perf_counter()
        found = np.array([columns[name] for name in FIELDS], np.float32).T / 50
        self.spent_s += time.perf_counter() - begin
        return found

    def score(self, features: NDArray[np.float32], side: NDArray[np.float32]) -> NDArray[np.float32]:
        begin = time.perf_counter()
        found = features @ side[0]
        self.spent_s += time.perf_counter() - begin
        return found

    def score_heads(self, features: NDArray[np.float32], side: NDArray[np.float32]) -> NDArray[np.float32]:
        begin = time.perf_counter()
        found = np.asarray(features @ side)
        self.spent_s += time.perf_counter() - begin
        return found


def release(n: int, policy: PolicySpec) -> ReleaseContent:
    """One copy and one image for every variant, three dimensions, a rule for a segment, a frequency rule."""
    copies = {
        f"c{i:04}": MaterialSnapshot(
            kind=MaterialKind.COPY, content={"kind": "copy", "title": f"Offer {i} for {{first_name}}"}, content_hash="0"
        )
        for i in range(n)
    }
    image = {"kind": "image", "file": "0" * 64, "media_type": "image/png", "width": 300, "height": 200}
    variants = tuple(
        DescribedVariant(
            id=f"v{i:04}",
            materials={"copy": f"c{i:04}", "image": "i"},
            tags={"tone": (f"t{i % 5}",), "colour": (f"c{i % 7}",), "subject": (f"s{i % 11}",)},
        )
        for i in range(n)
    )
    block = Rule(
        id="b", kind=InterventionKind.BLOCK, target={"tag": {"tone": "t1"}}, segment={"age": "30"}, created_at=START
    )
    return ReleaseContent(
        shares=Shares(control=0.1, random=0.1, model=0.8),
        model_version="product",
        policy=policy,
        frequency=Frequency(max_exposures=3),
        scene=SceneSnapshot(
            id="bench",
            name="Bench",
            product={},
            slots=(
                SlotSnapshot(name="copy", kind=MaterialKind.COPY),
                SlotSnapshot(name="image", kind=MaterialKind.IMAGE),
            ),
        ),
        taxonomy=1,
        variants=variants,
        materials={**copies, "i": MaterialSnapshot(kind=MaterialKind.IMAGE, content=image, content_hash="0")},
        baseline="v0000",
        interventions=(block,),
        placeholders=DEFAULT_PLACEHOLDERS,
    )


def users(n: int, variants: int) -> list[Request]:
    """Users of five numbers, a fifth of whom have seen one variant too often."""
    rng = np.random.default_rng(1)
    columns = {name: rng.integers(low, high, n).tolist() for name, (low, high) in FIELDS.items()}
    tired = rng.integers(0, variants, n).tolist()
    return [
        Request(
            f"unit-{i:08}",
            START + timedelta(seconds=i),
            features={name: columns[name][i] for name in FIELDS if name != "hour"},
            context={"hour": columns["hour"][i]},
            exposures={f"v{tired[i]:04}": 5} if i % 5 == 0 else {},
        )
        for i in range(n)
    ]


def options() -> dict[str, Any]:
    return {"keyring": KEYS, "business": "acme", "scene": "bench", "window_s": 1800}


def batch(served: Served, scorer: Product, requests: Sequence[Request], size: int) -> dict[str, float]:
    scorer.spent_s = 0.0
    begin = time.perf_counter()
    for start in range(0, len(requests), size):
        decide_many(served, requests[start : start + size], **options())
    seconds = time.perf_counter() - begin
    return {"per_s": len(requests) / seconds, "in_scorer": scorer.spent_s / seconds}


def single(served: Served, scorer: Product, requests: Sequence[Request], *, whole: bool) -> dict[str, float]:
    """One at a time; `whole` also makes payload and token."""
    scorer.spent_s = 0.0
    took = []
    for request in requests:
        begin = time.perf_counter()
        decision = decide(served, request, **options())
        if whole:
            assert decision.payload and decision.token
        took.append(time.perf_counter() - begin)
    p50, p99 = np.quantile(took, [0.5, 0.99]) * 1e3
    total = sum(took)
    return {"per_s": len(took) / total, "p50_ms": p50, "p99_ms": p99, "in_scorer": scorer.spent_s / total}


def main() -> None:
    """Measure every number of variants and policy, print a table and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", type=int, nargs="+", default=[200, 1_000])
    parser.add_argument("--decisions", type=int, default=50_000, help="in batches; a tenth of them one at a time")
    parser.add_argument("--batch", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    figures: list[dict[str, Any]] = []
    print("variants  policy          form              decisions/s  p50 ms  p99 ms  in scorer")
    for n in args.variants:
        requests = users(args.decisions, n)
        few = requests[: args.decisions // 10]
        for kind in PolicyKind:
            scorer = Product()
            served = prepare(release(n, PolicySpec(kind=kind)), 1, "0" * 64, scorer=scorer)
            single(served, scorer, few[:200], whole=True)  # warm
            measured = {
                f"batches of {args.batch:,}": batch(served, scorer, requests, args.batch),
                "one by one": single(served, scorer, few, whole=False),
                "with payload": single(served, scorer, few, whole=True),
            }
            for form, f in measured.items():
                figures.append({"variants": n, "policy": kind.value, "form": form, **f})
                times = "".join(f"{f[p]:>8.3f}" if p in f else f"{'':>8}" for p in ("p50_ms", "p99_ms"))
                print(f"{n:>8}  {kind:<14}  {form:<17} {f['per_s']:>11,.0f}{times} {f['in_scorer']:>10.1%}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
