"""How fast events come in, and go to Parquet: `python benchmarks/events.py`.

Ingest is measured beside its floor: the same rows, ready made, into the same two tables of a fresh SQLite file, by bare
`sqlite3` with as many rows per transaction and the same promise (WAL, synchronous=FULL). Compaction is measured on one
day of one scene beside what DuckDB takes to write the finished table to Parquet.
"""

from __future__ import annotations

import argparse
import json
import resource
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from kaleidoscope.database import Database, open_database
from kaleidoscope.decision_record import DecisionRecord, Keyring, Reason
from kaleidoscope.events import Shown, compact, ingest, read_exposures, record_decisions
from kaleidoscope.vocabulary import Bucket

T0 = datetime(2030, 1, 1, tzinfo=UTC)
RING = Keyring({"k1": b"0123456789abcdef"})
SHOWN = {
    f"v{i}": Shown(
        {"copy": f"c{i % 10}", "image": f"i{i % 7}"}, {"tone": [f"t{i % 5}"], "style": [f"s{i % 3}"]}, "card"
    )
    for i in range(100)
}


def main() -> None:
    """Measure both, print them and write the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[10, 100, 1_000], help="events per batch")
    parser.add_argument("--events", type=int, default=50_000, help="events of each ingest")
    parser.add_argument("--rows", type=int, default=1_000_000, help="exposures of the compaction; 0: none")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    figures: dict[str, Any] = {"ingest": []}
    print("batch   events/s  floor/s  of floor")
    for size in args.batches:
        n = min(args.events, size * 500)
        f = {"batch": size, "rate": measure_ingest(n, size), "floor": measure_floor(n, size)}
        figures["ingest"].append(f)
        print(f"{size:>5} {f['rate']:>10,.0f} {f['floor']:>8,.0f} {f['rate'] / f['floor']:>9.1%}", flush=True)
    if args.rows:
        f = figures["compaction"] = measure_compaction(args.rows)
        print(
            f"\n{args.rows:,} exposures of a day: recorded and ingested in {f['filled_s']:.0f} s, read in"
            f" {f['read_s']:.1f} s ({args.rows / f['read_s']:,.0f}/s), compacted in {f['compact_s']:.1f} s"
            f" ({args.rows / f['compact_s']:,.0f}/s; writing the finished table alone takes {f['floor_s']:.1f} s),"
            f" read again in {f['again_s']:.1f} s; {f['bytes']:.0f} bytes each; peak {f['peak_mib']:,.0f} MiB"
        )
    if args.out:
        args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def decisions(n: int) -> Iterator[DecisionRecord]:
    rng = np.random.default_rng(1)
    units, ages = rng.integers(0, max(n // 10, 1), n), rng.integers(18, 80, n)
    for i in range(n):
        yield DecisionRecord(
            id=f"{rng.integers(2**63):032x}",
            business="acme",
            scene="home",
            unit=f"user-{units[i]}",
            at=T0 + timedelta(seconds=i * 80_000 / n),
            bucket=Bucket.RANDOM,
            variant=f"v{i % 100}",
            propensity=0.01,
            learn=True,
            reason=Reason.EXPLORED,
            release=1,
            release_hash="0" * 64,
            model_version="m1",
            candidates=100,
            features={"age": int(ages[i]), "city": f"city {ages[i] % 20}", "income": float(ages[i]), "new": i % 3 == 0},
            context={"page": "start", "device": "phone"},
            key="k1",
        )


def items(of: list[DecisionRecord]) -> list[dict[str, Any]]:
    """An exposure of each decision, and a click of every tenth."""
    made = []
    for number, record in enumerate(of):
        token = RING.sign(record)
        for kind in ("exposure", "click") if number % 10 == 0 else ("exposure",):
            at = (record.at + timedelta(seconds=2)).isoformat()
            made.append({"event_id": f"{kind}-{record.id}", "type": kind, "token": token, "at": at})
    return made


def fresh(folder: str) -> Database:
    return open_database(f"sqlite:///{folder}/events.db")


def measure_ingest(n: int, size: int) -> float:
    made = list(decisions(n))
    sent = items(made)[:n]
    with tempfile.TemporaryDirectory() as folder, fresh(folder) as database:
        record_decisions(database, made)
        start = time.perf_counter()
        for i in range(0, n, size):
            ingest(database, "acme", sent[i : i + size], RING, now=T0 + timedelta(days=1))
        return n / (time.perf_counter() - start)


def measure_floor(n: int, size: int) -> float:
    rows = [("acme", f"exposure-{r.id}", r.id, "exposure", 1, 2, None) for r in decisions(n)]
    with tempfile.TemporaryDirectory() as folder:
        fresh(folder).close()
        bare = sqlite3.connect(f"{folder}/events.db", isolation_level=None)
        bare.execute("PRAGMA synchronous = FULL")
        start = time.perf_counter()
        for i in range(0, n, size):
            bare.execute("BEGIN IMMEDIATE")
            bare.executemany("INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", rows[i : i + size])
            bare.execute("COMMIT")
        took = time.perf_counter() - start
        bare.close()
        return n / took


def describe(scene: str, release: int) -> Mapping[str, Shown]:
    return SHOWN


def measure_compaction(n: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, fresh(folder) as database:
        log = Path(folder) / "log"
        start, pile = time.perf_counter(), []
        for record in decisions(n):
            pile.append(record)
            if len(pile) == 10_000:
                fill(database, pile)
                pile = []
        fill(database, pile)
        figures = {"filled_s": time.perf_counter() - start}

        def timed(name: str) -> Any:
            start = time.perf_counter()
            table = read_exposures(database, log, business="acme", describe=describe)
            figures[name] = time.perf_counter() - start
            assert table.num_rows == n
            return table

        finished = timed("read_s")
        start = time.perf_counter()
        duckdb.sql(f"COPY (FROM finished) TO '{folder}/floor.parquet' (FORMAT parquet, COMPRESSION zstd)")
        figures["floor_s"] = time.perf_counter() - start
        del finished
        start = time.perf_counter()
        done = compact(database, log, business="acme", now=T0 + timedelta(days=30), describe=describe)
        figures["compact_s"] = time.perf_counter() - start
        assert done.exposures == n
        timed("again_s")
        figures["bytes"] = sum(file.stat().st_size for file in log.rglob("*.parquet")) / n
        figures["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return figures


def fill(database: Database, pile: list[DecisionRecord]) -> None:
    record_decisions(database, pile)
    sent = items(pile)
    for i in range(0, len(sent), 1_000):
        ingest(database, "acme", sent[i : i + 1_000], RING, now=T0 + timedelta(days=1))


if __name__ == "__main__":
    main()
