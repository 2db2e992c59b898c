"""How fast a log becomes sums: `python benchmarks/cells.py [--rows 100000000] [--days 14 --buckets 3 [--shuffled]]`.

A log of eight user fields, six tag dimensions (4,320 variants), units and propensities is written to a scratch Parquet
file, and summed up by `attribution.streaming.stream` in a process of its own: every user value × tag, every pair of
user values and of tags, by 64 replicates, with weights and their squares. pandas does the same (groupby per pair of
columns) on the largest log that it survives with the same memory. The log is simulated, and says nothing of users.

With `--days` and `--buckets` rows have times, in order unless `--shuffled`, and units are dealt to buckets: sums are
then by day and bucket too, for pandas as well.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this file has the name of a module of the package

from attribution.coding import MAX_WEIGHT, UserField
from attribution.streaming import stream
from kaleidoscope.log_schema import LogSchema

GIB = 1 << 30
MEMORY_GIB = 4.0
BYTES = 30  # of a row in the file
TEXTS = {"gender": 3, "city": 8, "education": 8, "device": 8, "channel": 8}
NUMBERS = ("age", "income", "tenure")
DIMENSIONS = {"tone": 6, "style": 5, "colour": 4, "density": 3, "urgency": 4, "button": 3}
SCHEMA = LogSchema(
    label="click", unit="unit", user=(*TEXTS, *NUMBERS), variant=tuple(DIMENSIONS), propensity="propensity"
)
PLACED = SCHEMA.model_copy(update={"bucket": "bucket", "time": "time"})
DAY_S = 86_400
START_S = 1_893_456_000  # 2030-01-01
PANDAS_ROWS = (1_000_000, 2_000_000, 4_000_000, 8_000_000, 16_000_000)


def write_log(path: Path, rows: int, days: int, buckets: int, *, shuffled: bool) -> None:
    """Every unit has ten exposures; half of them explored, half chosen with propensity .5; one in twenty is clicked."""
    size, parts = 1, []
    for name, number in DIMENSIONS.items():
        parts.append(f"'{name}-' || (v // {size} % {number}) AS {name}")
        size *= number
    step = 1
    for name, number in TEXTS.items():
        parts.append(f"'{name}-' || (a // {step} % {number}) AS {name}")
        step *= number
    if days:
        number = f"hash(i + 2 * {rows}) % {rows}" if shuffled else "i"
        parts.append(f"CAST({START_S} + {number} * {days * DAY_S / rows!r} AS BIGINT) AS time")
        parts.append(f"'bucket-' || (a // 3 % {buckets}) AS bucket")
    in_order = bool(days) and not shuffled
    with duckdb.connect(
        config={"threads": 2, "memory_limit": "2GiB", "preserve_insertion_order": in_order}
    ) as database:
        database.execute(
            f"COPY (SELECT 'user-' || unit AS unit, {', '.join(parts)}, CAST(18 + b % 60 AS INTEGER) AS age,"
            " round(pow(b // 60 % 100000 / 100.0, 1.2), 1) AS income, CAST(b // 6000000 % 365 AS INTEGER) AS tenure,"
            f" CASE WHEN c % 2 = 0 THEN 0.1 / {size} ELSE 0.5 END AS propensity,"
            " CAST(c // 2 % 20 = 0 AS TINYINT) AS click"
            f" FROM (SELECT i, unit, hash(unit) AS a, hash(unit + {rows}) AS b, hash(i + {rows}) AS c,"
            f" hash(i) % {size} AS v FROM (SELECT i, hash(i + 1) % {max(rows // 10, 1)} AS unit"
            f" FROM range({rows}) t(i)))) TO '{path}' (FORMAT parquet)"
        )


def ours(path: Path) -> dict[str, Any]:
    placed = "bucket" in pq.read_schema(path).names
    start = time.perf_counter()
    cells = stream(path, PLACED if placed else SCHEMA)
    seconds = time.perf_counter() - start
    assert cells.table("n")[0, 0] == duckdb.sql(f"SELECT count(*) FROM '{path}'").fetchall()[0][0]
    return {
        "seconds": seconds,
        "cells": len(cells) + len(cells.value_pairs) + len(cells.tag_pairs),
        "places": len(cells.buckets) * len(cells.periods),
    }


def with_pandas(path: Path) -> dict[str, Any]:
    """The same sums, as one writes them down in pandas: categories, the number of the replicate, a groupby per pair."""
    start = time.perf_counter()
    frame = pd.read_parquet(path, read_dictionary=[*TEXTS, *DIMENSIONS])
    places = ["bucket", "day"] if "bucket" in frame else []
    if places:
        frame["bucket"] = frame.bucket.astype("category")
        frame["day"] = (frame.pop("time") // DAY_S).astype("category")
    frame["replicate"] = (pd.util.hash_array(frame.pop("unit").to_numpy()) % 64).astype(np.int8)
    for name in NUMBERS:
        first = frame[name].head(200_000)
        edges = UserField.fit(name, pa.array(first), np.ones(len(first))).edges or ()
        frame[name] = pd.cut(frame[name], [-np.inf, *edges, np.inf], right=False)
    weight = 1 / frame.pop("propensity")
    frame["weight"] = np.minimum(weight / weight.mean(), MAX_WEIGHT)
    frame["squared_weight"] = frame.weight**2
    for name in ("weight", "squared_weight"):
        frame[f"{name}_clicks"] = frame[name] * frame.click
    summed = ["click", "weight", "weight_clicks", "squared_weight", "squared_weight_clicks"]
    columns, cells = [*TEXTS, *NUMBERS, *DIMENSIONS], 0
    for pair in [*combinations(columns, 2), *((c,) for c in columns)]:
        grouped = frame.groupby([*places, *pair, "replicate"], observed=True)
        cells += len(grouped[summed].sum().assign(n=grouped.size()))
    return {"seconds": time.perf_counter() - start, "cells": cells}


def measured(what: str, path: Path, memory_gib: float) -> dict[str, Any] | None:
    """What a process of its own with so much memory says, with its peak; None where it does not survive."""
    command = [sys.executable, __file__, "--measure", what, "--log", str(path), "--memory", str(memory_gib)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(f"  {what}: did not survive: {done.stderr.strip().splitlines()[-1:] or done.returncode}", flush=True)
        return None
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--days", type=int, default=0, help="that the rows are of, each a period; 0: no times")
    parser.add_argument("--buckets", type=int, default=1, help="that units are in, with --days")
    parser.add_argument("--shuffled", action="store_true", help="rows of all days in no order, with --days")
    parser.add_argument("--memory", type=float, default=MEMORY_GIB, help="GiB that either may use")
    parser.add_argument("--pandas-rows", type=int, nargs="*", default=PANDAS_ROWS, help="sizes to try, until one fails")
    parser.add_argument("--scratch", type=Path, help="folder for the log; by default the system's")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--measure", choices=("stream", "pandas"), help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        limit = int(args.memory * GIB)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        figures = (ours if args.measure == "stream" else with_pandas)(args.log)
        figures["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        print(json.dumps(figures))
        return
    figures: dict[str, Any] = {name: getattr(args, name) for name in ("rows", "days", "buckets", "shuffled")}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        free = shutil.disk_usage(folder).free
        if free < 2 * BYTES * args.rows:
            sys.exit(f"{folder}: {free / GIB:.1f} GiB are free, and the log needs {2 * BYTES * args.rows / GIB:.1f}.")
        log = Path(folder) / "log.parquet"
        start = time.perf_counter()
        write_log(log, args.rows, args.days, args.buckets, shuffled=args.shuffled)
        print(f"{args.rows:,} rows, {log.stat().st_size / GIB:.2f} GiB, written in {time.perf_counter() - start:.0f} s")
        figures["stream"] = told("stream", measured("stream", log, args.memory), args.rows)
        for rows in args.pandas_rows:
            if rows > args.rows:
                break
            small = Path(folder) / "small.parquet"
            duckdb.sql(f"COPY (SELECT * FROM '{log}' LIMIT {rows}) TO '{small}' (FORMAT parquet)")
            found = told("pandas", measured("pandas", small, args.memory), rows)
            if found is None:
                break
            figures["pandas"] = {"rows": rows, **found}
    if figures.get("pandas") and figures["stream"]:
        per_row = (figures[what]["ns_per_row"] for what in ("pandas", "stream"))
        figures["ratio"] = next(per_row) / next(per_row)
        print(f"pandas takes {figures['ratio']:.1f} times as long per row, on {figures['pandas']['rows']:,} rows")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def told(what: str, found: dict[str, Any] | None, rows: int) -> dict[str, Any] | None:
    if found is not None:
        found["ns_per_row"] = found["seconds"] / rows * 1e9
        print(
            f"{what:>7}: {rows:>11,} rows in {found['seconds']:6.1f} s, {found['ns_per_row']:7.0f} ns a row, peak"
            f" {found['peak_gib']:.2f} GiB, {found['cells']:,} cells",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
