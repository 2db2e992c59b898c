"""How long it takes to rank a release's variants for one user: the exported model, the network it came from, the floor.

One thread, one user a call, all in one run. The floor is the faster of numpy and torch doing the bare products of one
user with arrays of the same sizes, and nothing else: what no way of running this network here can beat by much. MFLOP
and MB are the work and the reading of the part that grows with the variants. All data are simulated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import torch
from scipy.special import expit
from threadpoolctl import threadpool_limits

from kaleidoscope.encoding import Encoder
from kaleidoscope.ranker import Ranker, VariantSide
from kaleidoscope.simulation import World, WorldSpec
from models.batch import Examples
from models.export import export_model
from models.networks import DeepConfig, DeepPart
from models.tables import fit_tables
from models.train import CtrModel

ROWS = 60_000
SECONDS = 0.5  # of calls per figure
LEAST = 200  # calls


def main() -> None:
    """Measure, print a table, and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", type=int, nargs="+", default=[200, 1_000, 10_000])
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1), tempfile.TemporaryDirectory() as folder:
        world = World.draw(WorldSpec())
        tables = network(world)
        both = (replace(tables, gate=gate) for gate in (0.0, 0.5))
        figures = [f for model in both for f in measure(world, model, args.variants, Path(folder))]
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measure(world: World, model: CtrModel, sizes: list[int], folder: Path) -> list[dict[str, Any]]:
    """Milliseconds (median, 99th percentile) of each way, per number of variants."""
    rng, gate = np.random.default_rng(0), model.gate
    variants = world.variants.append_column("variant_id", pa.array(world.variant_ids))
    path = folder / f"gate{gate}"
    start = time.perf_counter()
    at = datetime(2026, 1, 1, tzinfo=UTC)
    export_model(model, path, version="1", variants=variants, log_hash="", seed=0, created_at=at)
    written = time.perf_counter()
    ranker = Ranker.load(path)
    print(
        f"\n{'tables and deep part' if gate else 'tables alone'}: exported in {written - start:.2f} s, loaded in "
        f"{time.perf_counter() - written:.2f} s, {sum(f.stat().st_size for f in path.iterdir()) / 2**20:.2f} MiB"
    )
    print("milliseconds, p50 / p99      encode         score         heads         torch         floor   MFLOP    MB")
    user = {name: [column[0].as_py()] for name, column in world.columns(world.sample_users(1, rng)).items()}
    out = []
    for n in sizes:
        rows = rng.integers(0, len(variants), n)
        ids = pa.array([f"n{i}" for i in range(n)])
        table = variants.take(pa.array(rows)).set_column(variants.column_names.index("variant_id"), "variant_id", ids)
        side = ranker.variant_side(table)
        own = model.for_variants(model.encoder.tags(table), np.full(n, -1))
        features = ranker.features(user, 1)
        worst = float(np.abs(ranker.score(features, side) - own.rank(features)).max())
        floors = [timed(f) for f in bare(side, len(user))]
        ways = {
            "encode": timed(lambda: ranker.features(user, 1)),
            "score": timed(lambda f=features, s=side: ranker.score(f, s)),  # type: ignore[misc]
            "heads": timed(lambda f=features, s=side: ranker.score_heads(f, s)),  # type: ignore[misc]
            "torch": timed(lambda f=features, o=own: o.rank(f)),  # type: ignore[misc]
            "floor": min(floors),
        }
        numbers = sum(a.size for name, a in side.arrays.items() if name != "draws")
        figure = {"variants": n, "gate": gate, "worst_difference": worst, "mflop": 2e-6 * numbers, "mb": 4e-6 * numbers}
        out.append(figure | {name: {"p50_ms": a, "p99_ms": b} for name, (a, b) in ways.items()})
        shown = "".join(f"{a:>7.3f} /{b:>6.3f}" for a, b in ways.values())
        ratio = ways["score"][0] / ways["floor"][0]
        print(
            f"{n:>7,} variants     {shown} {figure['mflop']:>7.2f} {figure['mb']:>5.2f}"
            f"   score = {ratio:.2f} × floor, off by {worst:.0e}"
        )
    return out


def network(world: World) -> CtrModel:
    """The tables of a planted log, beside a deep part of the usual size: its speed does not depend on its weights."""
    rng, variants = np.random.default_rng(1), world.variants
    users, variant = world.sample_users(ROWS, rng), rng.integers(0, world.n_variants, ROWS)
    reward = (rng.random(ROWS) < expit(world.logits_of(users, variant))).astype(np.float32)
    columns, names = world.columns(users), list(world.field_names)
    encoder = Encoder.fit(columns, user=names, context=[], variants=variants, dimensions=variants.column_names)
    log = Examples(encoder.features(columns), variant, encoder.tags(variants), reward, np.ones(ROWS), np.arange(ROWS))
    tables = fit_tables(log, encoder)
    deep = DeepPart(DeepConfig(tables.layout.n_crossed, tables.layout.crossed_tags.shape[1]))
    generator = torch.Generator().manual_seed(0)
    deep.initialise(generator)
    with torch.no_grad():
        deep.top.normal_(0, 0.1, generator=generator)
        deep.cross.normal_(0, 0.1, generator=generator)
    return CtrModel(tables, deep, 0.0)


def bare(side: VariantSide, fields: int) -> list[Callable[[], Any]]:
    """The products of one user with arrays like those of the model and of the variant side, in numpy and in torch."""
    rng = np.random.default_rng(0)

    def drawn(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    additive, crossed = side.arrays["additive"], side.arrays["crossed"]
    rows, table = rng.integers(0, 100, fields), drawn(100, len(crossed))
    t_rows, t_table, t_crossed, t_additive = (torch.from_numpy(a) for a in (rows, table, crossed, additive))
    if "hidden" not in side.arrays:
        return [
            lambda: table[rows].sum(axis=0) @ crossed + additive,
            lambda: t_table[t_rows].sum(dim=0) @ t_crossed + t_additive,
        ]
    hidden, factors = side.arrays["hidden"], side.arrays["factors"]
    width = len(hidden)
    embedding, to_hidden, to_factor, top = (
        drawn(100, width),
        drawn(width, width),
        drawn(width, len(factors)),
        drawn(width),
    )
    room = np.empty_like(hidden)

    def with_numpy() -> Any:
        user = np.maximum(embedding[rows].sum(axis=0), 0)
        np.add(hidden, (user @ to_hidden)[:, None], out=room)
        np.maximum(room, 0, out=room)
        return table[rows].sum(axis=0) @ crossed + (user @ to_factor) @ factors + top @ room + additive

    t_embedding, t_hidden, t_to_hidden = (torch.from_numpy(a) for a in (embedding, hidden, to_hidden))
    t_to_factor, t_factors, t_top = (torch.from_numpy(a) for a in (to_factor, factors, top))
    t_room = torch.empty_like(t_hidden)

    def with_torch() -> Any:
        user = t_embedding[t_rows].sum(dim=0).relu()
        torch.add(t_hidden, (user @ t_to_hidden)[:, None], out=t_room)
        t_room.relu_()
        return t_table[t_rows].sum(dim=0) @ t_crossed + (user @ t_to_factor) @ t_factors + t_top @ t_room + t_additive

    return [with_numpy, with_torch]


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of a call: median and 99th percentile."""
    for _ in range(20):
        call()
    seconds: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(seconds) < LEAST:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds) * 1e3), float(np.quantile(seconds, 0.99) * 1e3)


if __name__ == "__main__":
    print(f"ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__}, one thread each")
    main()
