"""Rows of a log as batches of codes, as `tally` adds them up: what DuckDB is asked for, and what becomes of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from attribution.cells import Definitions
from attribution.coding import MAX_WEIGHT, UserField
from attribution.replicates import REPLICATES, replicate_of
from attribution.tally import ITEMS, PLACES, Batch, Column
from kaleidoscope import log as contract
from kaleidoscope.errors import LogError
from kaleidoscope.log import LEAST_PROPENSITY, MOST_IMPRESSIONS, Codes, Floats, Log, combine, factorise, first_rows
from kaleidoscope.log_schema import LogSchema

ROWS = 1 << 20  # of a batch
SAMPLE = 200_000  # rows that definitions are fitted on
SPOTS = 20  # of the log that they are taken from
LARGEST = 60_000  # values of a column that have short codes
DAY_S = 86_400
NO_DAY = np.iinfo(np.int32).min


@dataclass(frozen=True)
class Source:
    """A log that DuckDB has open as view `log`."""

    path: Path
    schema: LogSchema
    database: duckdb.DuckDBPyConnection
    columns: str = "*"  # what of `log` are its columns,
    where: str = "true"  # and which rows are exposures

    def rows(self, source: str) -> str:
        """The query for the exposures of `log`, or of some of its rows."""
        return f"SELECT {self.columns} FROM {source} WHERE {self.where}"

    @cached_property
    def types(self) -> Mapping[str, str]:
        """The type of each column."""
        return {
            str(name): str(kind) for name, kind, *_ in self.database.execute(f"DESCRIBE {self.rows('log')}").fetchall()
        }

    def sample(self) -> pa.Table:
        """Rows from all over the log, as they are; raises LogError where a column is missing."""
        missing = [name for name in self.schema.columns if name not in self.types]
        if missing:
            problems = [contract.missing_column(self.path, name, self.schema, list(self.types)) for name in missing]
            raise LogError("\n".join(problems))
        n = int(self.database.execute("SELECT count(*) FROM log").fetchall()[0][0])
        if n <= SAMPLE:
            return self.database.sql(self.rows("log")).to_arrow_table()
        size = SAMPLE // SPOTS
        starts = np.linspace(0, n - size, SPOTS).astype(int).tolist()
        spots = [self.rows(f"(SELECT * FROM log LIMIT {size} OFFSET {at})") for at in starts]
        return pa.concat_tables([self.database.sql(spot).to_arrow_table() for spot in spots])

    def read(self, sample: pa.Table) -> Log:
        """The sample as a log of the contract, with all its checks."""
        with tempfile.TemporaryDirectory(prefix="kaleidoscope-") as folder:
            if contract.is_csv(self.path):
                file = Path(folder) / "sample.csv"
                pa_csv.write_csv(sample, file)
            else:
                file = Path(folder) / "sample.parquet"
                pq.write_table(sample, file)
            try:
                return replace(contract.read_log(file, self.schema), path=self.path)
            except LogError as error:
                of = "" if len(sample) < SAMPLE else f" (a sample of {len(sample):,} rows)"
                raise LogError(str(error).replace(str(file), f"{self.path}{of}")) from error


def number(name: str, types: Mapping[str, str], *, time: bool = False) -> str:
    """SQL of a column as numbers: NULL where there is none, NaN where it cannot be read."""
    return contract.number_sql(name, types[name], time=time)


# ── columns ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Texts:
    """A column of texts as codes: first those of a sample, that DuckDB finds; what else comes is added."""

    sql: str
    first: list[str]  # with "" for no text
    names: list[str | None] = field(default_factory=list)
    at: dict[str | None, int] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.names = [text or None for text in self.first]
        self.at = {name: i for i, name in enumerate(self.names)}

    @classmethod
    def of(cls, database: duckdb.DuckDBPyConnection, sql: str) -> Texts:
        """Of a column of view `sample`."""
        query = f"SELECT {sql} FROM sample GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT {LARGEST}"
        found = [row[0] for row in database.execute(query).fetchall()]
        return cls(sql, ["", *(text for text in found if text)])

    def select(self, database: duckdb.DuckDBPyConnection, name: str) -> list[str]:
        """What to read: the code of a known text, and the text of an unknown one."""
        texts = ", ".join(contract.sql_text(text) for text in self.first)
        database.execute(f"CREATE TYPE {name} AS ENUM ({texts})")
        known = f"TRY_CAST(coalesce({self.sql}, '') AS {name})"
        return [f"CAST(enum_code({known}) AS USMALLINT)", f"CASE WHEN {known} IS NULL THEN {self.sql} END"]

    def codes(self, known: pa.Array, other: pa.Array) -> NDArray[np.uint16]:
        """(n,) positions in the names, of the columns selected."""
        if not known.null_count:
            return np.asarray(known.to_numpy())
        texts = other.dictionary_encode()
        with self.lock:
            for text in texts.dictionary.to_pylist():
                if text not in self.at:
                    self.at[text] = len(self.names)
                    self.names.append(text)
            if len(self.names) > np.iinfo(np.uint16).max:
                raise LogError(
                    f"{self.sql}: more than {np.iinfo(np.uint16).max:,} different values. Cells are of values that many"
                    " exposures share: leave the column out, or make its values fewer."
                )
            place = np.array([self.at[text] for text in texts.dictionary.to_pylist()], np.uint16)
        out = known.fill_null(0).to_numpy().copy()
        rows = np.flatnonzero(known.is_null().to_numpy(zero_copy_only=False))
        out[rows] = place[texts.indices.to_numpy(zero_copy_only=False)[rows].astype(np.int64)]
        return np.asarray(out)


@dataclass(frozen=True, eq=False)
class Values:
    """A field with fixed base values as codes."""

    field: UserField
    sql: str

    def select(self, database: duckdb.DuckDBPyConnection, name: str) -> list[str]:
        """What to read: a number, or the code of a text."""
        if self.field.edges is not None:
            return [self.sql]
        texts = ", ".join(contract.sql_text(text) for text in (*self.field.known, ""))
        database.execute(f"CREATE TYPE {name} AS ENUM ({texts})")
        known = f"enum_code(TRY_CAST(coalesce({self.sql}, '') AS {name}))"
        return [f"CAST(coalesce({known}, {len(self.field.known) + 1}) AS USMALLINT)"]

    def codes(self, column: pa.Array) -> NDArray[np.uint16]:
        """(n,) base values."""
        if self.field.edges is None:
            return np.asarray(column.to_numpy())
        numbers = column.to_numpy(zero_copy_only=False)
        out = np.zeros(len(numbers), np.uint16)
        for edge in self.field.edges:  # few: faster than searching
            out += numbers >= edge
        out[~np.isfinite(numbers)] = len(self.field.labels) - 1
        return out


@dataclass(eq=False)
class Register:
    """Positions of things in the order in which they first came."""

    limit: int
    what: str
    at: dict[Any, int] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    def positions(self, things: Sequence[Any]) -> Codes:
        """Of each."""
        with self.lock:
            found = np.array([self.at.setdefault(thing, len(self.at)) for thing in things], np.int64)
            if len(self.at) > self.limit:
                raise LogError(
                    f"The log has more than {self.limit:,} {self.what}. Cells are of what many exposures share: leave"
                    " columns out, or make their values fewer."
                )
        return found


# ── batches  ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class Plan:
    """How the rows of one log become batches."""

    log: Source
    definitions: Definitions
    fields: list[Values]
    dimensions: list[tuple[str, bool, Texts]]  # name, whether a cell is a list
    strata: list[tuple[str, Values | Texts]]  # group, then context, then product
    bucket: Texts | None
    select: dict[str, list[str]] = field(default_factory=dict)  # key → expressions
    items: Register = field(default_factory=lambda: Register(ITEMS, "user values and combinations of tags"))
    places: Register = field(default_factory=lambda: Register(PLACES, "strata × buckets × periods"))
    clipped: float = 0.0
    lock: Lock = field(default_factory=Lock)

    @classmethod
    def of(cls, log: Source, sample: pa.Table, definitions: Definitions) -> Plan:
        """Of a log and a sample of it."""
        schema, types = log.schema, log.types

        def text(name: str) -> str:
            return f"CAST({contract.sql_name(name)} AS VARCHAR)"

        with duckdb.connect() as database:
            database.execute("SET TimeZone = 'UTC'")  # as the log's own has: texts of times are the same in both
            database.register("sample", sample)
            dimensions = []
            for name in schema.variant:
                is_list = types[name].endswith("]")
                sql = (
                    f"CAST(to_json(CAST({contract.sql_name(name)} AS VARCHAR[])) AS VARCHAR)" if is_list else text(name)
                )
                dimensions.append((name, is_list, Texts.of(database, sql)))
            numbers = {f.name: f for f in definitions.context}
            strata: list[tuple[str, Values | Texts]] = []
            for role in ("group", "context", "product"):
                for name in schema.role(role):
                    if role == "context" and name in numbers:
                        strata.append((f"{name}=", Values(numbers[name], number(name, types))))
                    else:
                        prefix = f"{name}=" if role == "context" else ""
                        strata.append((prefix, Texts.of(database, text(name))))
            bucket = Texts.of(database, text(schema.bucket)) if schema.bucket is not None else None
        fields = [Values(f, text(f.name) if f.edges is None else number(f.name, types)) for f in definitions.fields]
        plan = cls(log, definitions, fields, dimensions, strata, bucket)
        database = log.database
        for i, column in enumerate(fields):
            plan.select[f"f{i}"] = column.select(database, f"f{i}")
        for i, (_, _, texts) in enumerate(dimensions):
            plan.select[f"d{i}"] = texts.select(database, f"d{i}")
        for i, (_, part) in enumerate(strata):
            plan.select[f"s{i}"] = part.select(database, f"s{i}")
        if bucket is not None:
            plan.select["bucket"] = bucket.select(database, "b")
        if schema.time is not None and definitions.period is not None:
            time = number(schema.time, types, time=True)
            plan.select["day"] = [f"TRY_CAST(floor({time} / {DAY_S}) AS INTEGER)"]
        if schema.unit:
            units = [f"nullif({text(name)}, '')" for name in schema.unit]
            several = " || chr(31) || ".join(f"coalesce({unit}, chr(0))" for unit in units)
            plan.select["unit"] = [units[0] if len(units) == 1 else several]
        for role in ("label", "clicks", "impressions", "propensity", "weight"):
            for name in schema.role(role):
                plan.select[role] = [number(name, types)]
        return plan

    @property
    def query(self) -> str:
        """The one pass."""
        columns = [f"{sql} AS {key}_{i}" for key, parts in self.select.items() for i, sql in enumerate(parts)]
        return f"SELECT {', '.join(columns)} FROM ({self.log.rows('log')})"

    def batch(self, rows: pa.Table, start: int) -> Batch:
        """Some rows, from number `start` on, as codes."""
        whole = {name: rows[name].combine_chunks() for name in rows.column_names}
        given = {key: [whole[f"{key}_{i}"] for i in range(len(parts))] for key, parts in self.select.items()}
        n, schema = len(rows), self.log.schema
        everyone = self.items.positions([("",)])
        columns = [Column(np.zeros(n, np.uint16), everyone)]
        for i, of in enumerate(self.fields):
            items = [("value", of.field.name, label) for label in of.field.labels]
            columns.append(Column(of.codes(*given[f"f{i}"]), self.items.positions(items)))
        for i, (name, is_list, texts) in enumerate(self.dimensions):
            codes = texts.codes(*given[f"d{i}"])
            cells = [contract.tag_values(t, is_list=is_list) for t in texts.names]
            found = sorted(set(cells))
            to = {cell: k for k, cell in enumerate(found)}
            codes = np.array([to[cell] for cell in cells], np.uint16)[codes]
            columns.append(Column(codes, self.items.positions([("tags", name, cell) for cell in found])))
        place, places = self._places(given, n)
        replicate = replicate_of(given["unit"][0] if schema.unit else pa.nulls(n, pa.string()), start)
        numbers = {key: given[key][0].to_numpy(zero_copy_only=False) for key in _NUMBERS if key in given}
        batch = Batch(columns, place, places, replicate, np.zeros(n, np.uint16), [None])
        if schema.label is None:
            return self._aggregated(batch, numbers, start)
        label = numbers["label"]
        self._check((label == 0) | (label == 1), str(schema.label), "label is not 0 or 1", start)
        return _weighted(replace(batch, click=label.astype(np.uint16)), self._weight(numbers, np.ones(n), start))

    def _places(self, given: Mapping[str, Sequence[pa.Array]], n: int) -> tuple[Codes, Codes]:
        """(n,) the place of each row among those of the batch, and (P,) their positions among all."""
        strata = [part.codes(*given[f"s{i}"]).astype(np.int64) for i, (_, part) in enumerate(self.strata)]
        bucket = np.zeros(n, np.int64) if self.bucket is None else self.bucket.codes(*given["bucket"]).astype(np.int64)
        days, day = np.zeros(1, np.int64), np.zeros(n, np.int64)
        if "day" in given:
            days, day = factorise(given["day"][0].fill_null(NO_DAY).to_numpy().astype(np.int64))
        parts = [codes for codes in (*strata, bucket, day) if codes.any()]
        place = combine(parts, n)
        first = first_rows(place)
        names: list[list[str]] = [[] for _ in first]
        for (prefix, part), codes in zip(self.strata, strata, strict=True):
            texts = part.names if isinstance(part, Texts) else part.field.labels
            names = [[*name, f"{prefix}{texts[c]}"] for name, c in zip(names, codes[first].tolist(), strict=True)]
        buckets = [""] if self.bucket is None else [text or "" for text in self.bucket.names]
        periods = [self._period(day) for day in days.tolist()] if "day" in given else [""]
        things = [
            (" / ".join(name), buckets[b], periods[d])
            for name, b, d in zip(names, bucket[first].tolist(), day[first].tolist(), strict=True)
        ]
        positions = self.places.positions(things)
        different, at = np.unique(positions, return_inverse=True)
        if len(different) == len(positions):
            return place, positions
        return at[place], different  # days of a period, and strata whose names are the same, are one place

    def _period(self, day: int) -> str:
        if day == NO_DAY:
            return ""
        date = np.datetime64(day, "D")
        if self.definitions.period == "month":
            return str(date.astype("datetime64[M]"))
        if self.definitions.period == "week":  # its Monday; 1970 began on a Thursday
            date -= np.timedelta64((day + 3) % 7, "D")
        return str(date)

    def _weight(self, numbers: Mapping[str, Floats], count: Floats, start: int) -> Floats | None:
        """(n,) what an exposure of each row counts, of which there are `count`; None where all count the same."""
        schema, out = self.log.schema, np.ones(len(count))
        if "weight" in numbers:
            weight = numbers["weight"]
            self._check((weight >= 0) & np.isfinite(weight), str(schema.weight), "weight is negative or unknown", start)
            out = weight * (self.definitions.row_scale or 1.0)
        if "propensity" in numbers:
            p = numbers["propensity"]
            what = f"propensity outside [{LEAST_PROPENSITY:g}, 1]"
            self._check((p >= LEAST_PROPENSITY) & (p <= 1), str(schema.propensity), what, start)
            correction = (self.definitions.inverse_scale or 1.0) / p
            with self.lock:
                self.clipped += float(count[(correction > MAX_WEIGHT) & (out > 0)].sum())
            out = out * np.minimum(correction, MAX_WEIGHT)
        return out if self.definitions.weighted else None

    def _aggregated(self, batch: Batch, numbers: Mapping[str, Floats], start: int) -> Batch:
        """Rows of clicks and impressions: a row of those with a click and one of those without. Without units their
        exposures are dealt to replicates one by one."""
        clicks, shown = numbers["clicks"], numbers["impressions"]
        for name, of in ((self.log.schema.clicks, clicks), (self.log.schema.impressions, shown)):
            whole = (of >= 0) & (of <= MOST_IMPRESSIONS) & (of == np.floor(of))
            self._check(whole, str(name), "not a whole number ≥ 0", start)
        self._check(clicks <= shown, str(self.log.schema.clicks), "more clicks than impressions", start)
        weight = self._weight(numbers, shown, start)
        count: NDArray[Any] = np.stack([clicks, shown - clicks], axis=1)
        replicate = batch.replicate
        if self.log.schema.unit:
            row, kind = np.nonzero(count)
            replicate, count = replicate[row], count[row, kind]
        else:
            share = np.full(REPLICATES, 1 / REPLICATES)
            count = np.random.default_rng([start, len(count)]).multinomial(count.astype(np.int64), share)  # (n, 2, 64)
            row, kind, number = np.nonzero(count)
            replicate, count = number.astype(np.uint16), count[row, kind, number].astype(np.float64)
        batch = replace(batch.take(row), click=(kind == 0).astype(np.uint16), replicate=replicate, amounts=[count])
        return _weighted(batch, None if weight is None else weight[row])

    def _check(self, good: NDArray[np.bool_], column: str, what: str, start: int) -> None:
        if not good.all():
            row, total = int(np.argmin(good)), int((~good).sum())
            raise LogError(
                f"{self.log.path}: column {column!r}: {what} in {total:,} of the rows {start + 1:,} to"
                f" {start + len(good):,}, first data row {start + row + 1:,}. Correct the export, or drop these rows."
            )


_NUMBERS = ("label", "clicks", "impressions", "propensity", "weight")


def _weighted(batch: Batch, weight: Floats | None) -> Batch:
    """With sums of weights and of their squares; rows that count nothing are left out."""
    if weight is None:
        return batch
    (count,) = batch.amounts
    once = weight if count is None else count * weight
    batch = replace(batch, amounts=[count, once, once * weight])
    return batch if (weight > 0).all() else batch.take(np.flatnonzero(weight > 0))


def batches(plan: Plan) -> Iterator[tuple[pa.Table, int]]:
    """The rows as they come, about ROWS at a time, and the number of the first."""
    pile: list[pa.RecordBatch] = []
    start = end = 0
    for rows in plan.log.database.sql(plan.query).to_arrow_reader(ROWS):
        pile.append(rows)
        end += len(rows)
        if end - start >= ROWS:
            yield pa.Table.from_batches(pile), start
            pile, start = [], end
    if end > start:
        yield pa.Table.from_batches(pile), start
