"""The log contract: reading an impression log, and the checks that need nothing but the log.

Its schema is `log_schema.py`; how the log chose what to show (SRM, propensities, independence of the user) is
`exposure.py`; turning columns into model inputs is `encoding.py`. Files are read through DuckDB in one streaming pass;
nothing here loops over rows.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import glob
import gzip
import io
import json
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kaleidoscope.errors import LogError
from kaleidoscope.log_schema import LogSchema
from kaleidoscope.vocabulary import Level

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]

SAMPLED_UNITS = 100_000  # enough to say how rows of a unit differ
FEW_UNITS = 30  # below this, folds and errors by unit mean little
MISSING_TEXTS = frozenset({"NA", "N/A", "NaN", "nan", "NULL", "null", "None"})  # only in CSV columns of numbers
NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
CODE_NUMBER = r"[+-]?0[0-9]+.*"  # 01234 is a code that happens to be written in digits
INFINITE = r"[+-]?inf(inity)?"
IMPOSSIBLE = 2.0  # times as many variants as there are: what mean(1/propensity) cannot be
LEAST_PROPENSITY = 1e-12  # nothing is drawn that seldom, and 1/p has to stay a number that can be squared
MOST_IMPRESSIONS = 1e15  # whole numbers beyond are no longer exact
DATE = r"([0-9]{4}-[0-9]{1,2}-[0-9]{1,2}|[0-9]{1,2}[./][0-9]{1,2}[./][0-9]{2,4})([T ].*)?"
DAY_OR_MONTH = r"\s*[0-9]{1,2}[./-][0-9]{1,2}[./-][0-9]{2,4}\b.*"  # 02/03/2026
DECIMAL_COMMA = r"[+-]?[0-9]+,[0-9]+"
SECONDS = 1e8, 1e10  # since 1970, of a number that is a moment: 1973 to 2286
FINER_UNITS = {"milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}  # of a second; told by digits: 13, 16, 19
TEN_DIGITS = 1e9, 1e10  # a moment in seconds; 12 or 14 digits may be dates (202610011200) and are nobody's milliseconds
ONLY = 1 - 1e-6  # the propensity of what alone could be shown
PEEKED_BYTES = 1 << 16  # of a file, to see what it is


# ------------------------------------------------------------------------------------------------ the log


@dataclass(frozen=True)
class Check:
    """One finding about a log: a stable code, how bad, and a sentence that names what to do."""

    code: str
    level: Level
    message: str


@dataclass(frozen=True)
class Log:
    """An impression log in memory: n rows of one exposure each, or of `count` identical ones.

    Codes are dense, and given by value, not by the order of rows: a shuffled file gives the same codes.
    """

    path: Path
    schema: LogSchema
    columns: dict[str, pa.Array]  # user and context columns: dictionary-encoded text, int64 or float64; null = missing
    reward: NDArray[np.float32]  # (n,) 0 or 1
    count: Floats  # (n,) identical, independent exposures the row stands for; 1 in a plain log
    weight: Floats  # (n,) the schema's row weight, scaled to a mean of 1 per exposure; 1 without one
    variant: Codes  # (n,) row of `variants`
    variants: pa.Table  # N rows: "variant_id" (string), and per tag dimension the sorted values (list<string>)
    unit: Codes | None  # (n,) 0..U-1; None: every exposure is its own unit
    group: Codes | None  # (n,) index into `groups`
    groups: pa.Array | None
    product: Codes | None  # (n,) index into `products`
    products: pa.Array | None
    bucket: Codes | None  # (n,) index into `buckets`; estimators use the propensity, reports the name
    buckets: pa.Array | None
    propensity: Floats | None  # (n,) P(variant | everything known at the choice)
    time: Floats | None  # (n,) seconds since 1970, or the column's own numbers; NaN = unknown
    file_row: Codes  # (n,) the row of the file, from 0; an aggregated row gives up to two rows here
    file_rows: int
    checks: tuple[Check, ...] = ()

    def __len__(self) -> int:
        return len(self.reward)

    @property
    def n_exposures(self) -> int:
        """Exposures, whatever the number of rows they are written on."""
        return round(float(self.count.sum()))

    @property
    def n_units(self) -> int:
        """Different units; without units every exposure is one."""
        return self.n_exposures if self.unit is None else int(self.unit.max(initial=-1)) + 1

    @property
    def n_variants(self) -> int:
        """Rows of `variants`, also those that `take` left without a row."""
        return int(self.variants.num_rows)

    @property
    def positive_rate(self) -> float:
        """Share of exposures with reward 1."""
        return float((self.reward * self.count).sum() / self.count.sum())

    @property
    def aggregated(self) -> bool:
        """Whether a row of the file stands for many exposures (`clicks` and `impressions`)."""
        return self.schema.clicks is not None

    def take(self, rows: NDArray[Any]) -> Log:
        """The log of these rows (positions or a mask), in this order; units are numbered anew, variants are kept."""
        rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows.astype(np.int64, copy=False)
        index = pa.array(rows)

        def pick(values: NDArray[Any] | None) -> NDArray[Any] | None:
            return None if values is None else values[rows]

        return replace(
            self,
            columns={name: column.take(index) for name, column in self.columns.items()},
            reward=self.reward[rows],
            count=self.count[rows],
            weight=self.weight[rows],
            variant=self.variant[rows],
            unit=None if self.unit is None else densify(self.unit[rows]),
            group=pick(self.group),
            product=pick(self.product),
            bucket=pick(self.bucket),
            propensity=pick(self.propensity),
            time=pick(self.time),
            file_row=self.file_row[rows],
        )

    def folds(self, k: int, seed: int) -> tuple[Log, Codes]:
        """A log and the fold 0..k-1 of each of its rows: all of a unit in one fold, folds of equal numbers of units.

        Without units exposures are dealt out one by one: a row that stands for many is split among the folds, so the
        returned log may have more rows than this one.
        """
        rng = np.random.default_rng([seed, k])
        if self.unit is not None:
            return self, (rng.permutation(self.n_units) % k)[self.unit]
        single = self.count == 1
        share = np.zeros((len(self), k), dtype=np.int64)
        share[np.flatnonzero(single), rng.permutation(int(single.sum())) % k] = 1
        share[~single] = rng.multinomial(self.count[~single].astype(np.int64), np.full(k, 1 / k))
        row, fold = np.nonzero(share)
        log = self if np.array_equal(row, np.arange(len(self))) else self.take(row)
        return replace(log, count=share[row, fold].astype(np.float64)), fold

    def cells(self, columns: Sequence[str], bins: int = 8) -> Codes:
        """The combination of these columns each row is in, within its group, as codes 0..C-1. Numbers of more than
        2·`bins` different values are cut at their quantiles into at most `bins` ranges; missing is a value."""
        parts = [coarse_codes(self.columns[name], bins) for name in columns]
        if self.group is not None:
            parts.insert(0, self.group)
        return combine(parts, len(self))


def sums(codes: Codes, weights: Floats | None = None, size: int = 0) -> Floats:
    """The sum of the weights (without them: the number) of each code, of at least `size` codes."""
    return np.bincount(codes, weights, size).astype(np.float64, copy=False)


def densify(codes: Codes) -> Codes:
    """Codes renumbered 0..k-1 in the same order, without those that do not occur."""
    present = np.bincount(codes) > 0
    return (np.cumsum(present) - 1)[codes]


def combine(parts: Sequence[Codes], n: int) -> Codes:
    """Codes of the combinations of several codes that occur, ordered as the tuples of codes are."""
    combined = np.zeros(n, dtype=np.int64)
    for codes in parts:
        _, combined = factorise(combined * (int(codes.max(initial=0)) + 1) + codes)
    return combined


def factorise(values: NDArray[Any]) -> tuple[NDArray[Any], Codes]:
    """Sorted distinct values and each value's index among them (np.unique, by hashing: the rows are never sorted)."""
    encoded = pa.array(values).dictionary_encode()
    distinct = encoded.dictionary.to_numpy(zero_copy_only=False)
    order = np.argsort(distinct, kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return distinct[order], rank[encoded.indices.to_numpy()]


def text_codes(column: pa.DictionaryArray) -> tuple[pa.Array, Codes]:
    """Sorted distinct texts (null last, where there is one) and each row's index among them."""
    indices = column.indices.fill_null(len(column.dictionary)).to_numpy()
    used = np.flatnonzero(np.bincount(indices, minlength=len(column.dictionary) + 1))
    texts = pa.concat_arrays([column.dictionary, pa.nulls(1, column.dictionary.type)]).take(pa.array(used))
    order = pc.array_sort_indices(texts).to_numpy()
    rank = np.zeros(len(column.dictionary) + 1, dtype=np.int64)
    rank[used[order]] = np.arange(len(used))
    return texts.take(pa.array(order)), rank[indices]


def coarse_codes(column: pa.Array, bins: int) -> Codes:
    """Codes of a column's values, missing being one; numbers of more than 2·`bins` values are cut at quantiles."""
    if pa.types.is_dictionary(column.type):
        return text_codes(column)[1]
    values: Floats = column.to_numpy(zero_copy_only=False).astype(np.float64)
    known = values[~np.isnan(values)]
    edges = np.unique(known)
    if len(edges) > 2 * bins:
        edges = np.unique(np.quantile(known, np.arange(1, bins) / bins))
    codes: Codes = np.searchsorted(edges, values, side="right").astype(np.int64)
    codes[np.isnan(values)] = len(edges) + 1
    return codes


# ------------------------------------------------------------------------------------------------ reading


def read_log(path: Path | str, schema: LogSchema) -> Log:
    """The log in a Parquet file, a folder of Parquet files or a CSV (.csv, .csv.gz), checked against its schema.

    Raises LogError with every problem found, one per line: file, column, number of rows, an example and the remedy.
    """
    path = Path(path)
    with open_log(path, schema) as database:
        types = {str(name): str(kind) for name, kind, *_ in database.execute("DESCRIBE log").fetchall()}
        missing = [name for name in schema.columns if name not in types]
        if missing:
            alike = _alike(path, missing)
            problems_of = [alike.get(name) or missing_column(path, name, schema, list(types)) for name in missing]
            raise LogError("\n".join(problems_of))
        columns, row_hash = _load(database, schema, types)
        problems = _Problems(path, database)
        problems.notes += _nested(schema, types)
        n = len(row_hash)
        if n == 0:
            has = "a header" if is_csv(path) else "columns"
            raise LogError(f"{path}: has {has} but no rows. Export the log again, with its exposures.")
        if schema.time is not None:
            problems.notes += _time_units(schema.time, types[schema.time], columns["time", schema.time], database)
        untyped = set(schema.columns) if is_csv(path) else {name for name in schema.columns if _is_wide(types[name])}
        log = _assemble(path, schema, columns, problems, n, untyped)
        problems.raise_if_any()
    return replace(log, checks=(*problems.notes, *_warnings(log, n - len(pc.unique(row_hash)))))


def is_csv(path: Path) -> bool:
    """Whether it is read as a CSV: a file, by its ending."""
    return path.is_file() and path.name.lower().endswith((".csv", ".csv.gz"))


def sql_name(column: str) -> str:
    """A column's name as SQL has it."""
    return '"' + column.replace('"', '""') + '"'


def sql_text(value: object) -> str:
    """A text as SQL has it."""
    return "'" + str(value).replace("'", "''") + "'"


@contextmanager
def open_log(
    path: Path, schema: LogSchema, *, only: Sequence[Path] | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB connection with the file as view `log` that can reach nothing but the file (`only`: these of a folder).

    A CSV is first turned into Parquet text columns (types are then read off all values, not off a sample). The time
    zone is UTC, whatever the machine's is.
    """
    if not path.exists():
        raise LogError(f"{path}: there is no such file or folder.")
    files = sorted(p for p in path.rglob("*.parquet") if p.is_file()) if path.is_dir() else [path]
    files = files if only is None else list(only)
    if not files:
        texts = sum(is_csv(p) for p in path.rglob("*"))
        if texts:
            raise LogError(
                f"{path}: the folder holds {texts:,} CSV file{'s' * (texts > 1)} and no .parquet file. Only Parquet is"
                " read from a folder: give one CSV file, with all the rows under one header line."
            )
        raise LogError(f"{path}: the folder holds no .parquet file. Give a folder of Parquet files, or one file.")
    if not is_csv(path) and files[0].suffix.lower() not in (".parquet", ".pq"):
        raise LogError(f"{path}: unknown kind of file. Give .parquet, .csv, .csv.gz or a folder of .parquet files.")
    mistaken = [problem for file in files if (problem := _mistaken(file))]
    if mistaken:
        raise LogError("\n".join(mistaken))
    with tempfile.TemporaryDirectory(prefix="kaleidoscope-") as scratch:
        database = duckdb.connect(
            ":memory:",
            config={
                "memory_limit": "1GiB",
                "temp_directory": f"{scratch}/spill",
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "python_enable_replacements": False,
            },
        )
        try:
            database.execute("SET TimeZone = 'UTC'")
            paths = ", ".join(sql_text(glob.escape(str(f.absolute()))) for f in files)
            allowed = ", ".join(sql_text(f) for f in {str(f.absolute().parent) for f in files} | {scratch})
            database.execute(f"SET allowed_directories = [{allowed}]")
            database.execute("SET enable_external_access = false")
            database.execute("SET lock_configuration = true")
            source = f"read_parquet([{paths}], union_by_name = true, hive_partitioning = {path.is_dir()})"
            if is_csv(path):
                source = f"read_parquet({sql_text(scratch + '/log.parquet')})"
                database.execute(
                    f"COPY (SELECT * FROM read_csv({paths}, {_dialect(path, schema)}))"
                    f" TO {sql_text(scratch + '/log.parquet')} (FORMAT parquet)"
                )
            database.execute(f"CREATE VIEW log AS SELECT * FROM {source}")
            yield database
        except duckdb.Error as error:
            raise LogError(_unreadable(path, str(error), schema)) from error
        finally:
            database.close()


def _mistaken(path: Path) -> str | None:
    """What is wrong with a file whose bytes are not what its name says, and the remedy; None where they agree."""
    is_text, packed = is_csv(path), path.suffix.lower() == ".gz"
    stem = path.name[: -len(".csv.gz" if packed else path.suffix)]
    try:
        with path.open("rb") as file:
            start = file.read(PEEKED_BYTES)
            file.seek(max(0, path.stat().st_size - 4))
            end = file.read(4)
    except OSError as error:
        return f"{path}: cannot be read: {error}. See that it is a file you may read."
    if not start:
        return f"{path}: the file is empty (0 bytes). Export the log again."
    kind, remedy = _kind(start), "Export the log as CSV or Parquet."
    if packed and kind == "gzip":
        try:
            with gzip.open(path) as unpacked:
                kind = _kind(unpacked.read(PEEKED_BYTES))
        except (OSError, EOFError, zlib.error) as error:
            return f"{path}: cannot be read: {error}. The copy is torn or damaged: copy or export the file again."
        if kind in (None, "text"):
            return None
        if kind == "Parquet":
            remedy = f"Unpack it (`gunzip`) and rename it to {stem}.parquet."
    elif is_text and not packed and kind in (None, "text"):
        return None
    elif kind == "Parquet" and not is_text:
        torn = f"{path}: cannot be read: it begins as Parquet but does not end so (`PAR1`). Copy or export it again."
        return None if end == b"PAR1" else torn
    elif kind == "Parquet":
        remedy = f"Rename it to {stem}.parquet."
    elif kind == "gzip":
        remedy = f"If it is a packed CSV, rename it to {stem}.csv.gz; otherwise unpack it (`gunzip`) first."
    elif kind == "text":
        remedy = f"If it is CSV, rename it to {stem}.csv; otherwise export it as CSV or Parquet."
    if kind is not None and kind.startswith("UTF-"):
        return f"{path}: {_converted(path, kind)}"
    wanted = "a packed CSV" if packed else "CSV" if is_text else "Parquet"
    return f"{path}: is named as {wanted} but holds {kind or 'something else'}. {remedy}"


_SIGNATURES = {
    b"PAR1": "Parquet",
    b"PARE": "encrypted Parquet",
    b"\x1f\x8b": "gzip",
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"PK\x03\x04": "a zip archive or an Excel workbook",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"BZh": "bzip2",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\x00": "xz",
    b"ARROW1": "Arrow (Feather)",
    b"ORC": "ORC",
    b"Obj\x01": "Avro",
    b"SQLite format 3": "an SQLite database",
}


def _kind(start: bytes) -> str | None:
    """What a file is by its first bytes: of a known kind, "text" in UTF-8, or None where they do not tell."""
    for signature, kind in _SIGNATURES.items():
        if start.startswith(signature) and not (signature.isalnum() and len(start) > 100 and _is_text(start)):
            return kind
    if b"\0" in start and len(start) > 4:  # UTF-16 without its mark: every second byte of plain letters is 0
        zero = (np.frombuffer(start[: len(start) // 2 * 2], np.uint8).reshape(-1, 2) == 0).mean(axis=0)
        if zero.max() > 0.5 > zero.min():
            return "UTF-16LE" if zero[1] > zero[0] else "UTF-16BE"
    if _is_text(start):
        return "text"
    return "binary data" if b"\0" in start and not _is_text(start.replace(b"\0", b"")) else None


def _is_text(start: bytes) -> bool:
    """Whether the bytes are UTF-8 without zeros; the last character may be cut off."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return b"\0" not in start


@contextmanager
def _text_of(path: Path) -> Iterator[IO[str]]:
    """The text of a CSV, unpacked where it is packed."""
    packed = path.suffix.lower() == ".gz"
    with (
        gzip.open(path, "rt", encoding="utf-8-sig", newline="")
        if packed
        else path.open(encoding="utf-8-sig", newline="") as file
    ):
        yield file


def _header(path: Path, schema: LogSchema) -> tuple[str, list[str]]:
    """The delimiter, the one that yields the schema's columns, and the names in the header line."""
    try:
        with _text_of(path) as file:
            start = file.read(1 << 20)
        headers = {d: next(csv.reader(io.StringIO(start, newline=""), delimiter=d), []) for d in ",;\t|"}
    except UnicodeDecodeError as error:
        raise LogError(_unreadable(path, str(error), schema)) from error
    except csv.Error as error:
        raise LogError(
            f"{path}, line 1: no header can be read ({error}). The first line must hold the names of the columns."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise LogError(f"{path}: cannot be read: {error}. Repair the file or export it again.") from error
    delimiter = max(headers, key=lambda d: (len(set(schema.columns) & set(headers[d])), len(headers[d])))
    return delimiter, headers[delimiter]


def _dialect(path: Path, schema: LogSchema) -> str:
    """Options for read_csv from the header alone. DuckDB's own guess skips leading rows when one further down is odd,
    so nothing is left to guess but the delimiter."""
    delimiter, header = _header(path, schema)
    if not any(header):
        raise LogError(f"{path}: the file is empty: it has no header line. Export the log again, with column names.")
    folded = [name.lower() for name in header]
    twice = sorted({name for name in header if not name or folded.count(name.lower()) > 1})
    if twice:
        names = ", ".join(repr(name) for name in twice)
        raise LogError(
            f"{path}: line 1: column names are empty or given twice: {names}. Name every column differently."
        )
    columns = ", ".join(f"{sql_text(name)}: 'VARCHAR'" for name in header)
    return (
        f"auto_detect = false, header = true, delim = {sql_text(delimiter)}, quote = '\"', escape = '\"',"
        f" columns = {{{columns}}}"
    )


def _converted(path: Path, encoding: str | None = None) -> str:
    """That a text is in another encoding than UTF-8 (None: which one nobody knows), and how to convert it."""
    packed = path.suffix.lower() == ".gz"
    stem, convert = path.name.partition(".csv")[0], f"iconv -f {encoding or 'WINDOWS-1252'} -t UTF-8"
    command = f"gunzip -c {path.name} | {convert}" if packed else f"{convert} {path.name}"
    return (
        f"the text is {f'{encoding}, ' if encoding else ''}not UTF-8. Convert the file, for example with"
        f" `{command} > {stem}-utf8.csv`, and give the new file."
    )


def _unreadable(path: Path, reason: str, schema: LogSchema) -> str:
    """Why DuckDB could not read a file, in our words where we know them."""
    line = re.search(r"Line: (\d+)", reason)
    where = f"{path}, line {line[1]}" if line else str(path)
    if re.search(r"utf-?8|unicode", reason, re.IGNORECASE):
        bad = _line_not_utf8(path)
        return f"{path}{'' if bad is None else f', line {bad}'}: {_converted(path)}"
    if "unterminated quote" in reason:
        return (
            f'{where}: a quote (") opens a value and does not close it, or other text follows it. Write quotes within'
            ' values twice (""), or export the file again.'
        )
    if "invalid state" in reason:
        return (
            f"{path}: the lines do not all end in the same way, or quotes do not match. Give all lines one kind of end,"
            f" for example with `dos2unix {path.name}`, or export the file again."
        )
    if "Maximum line size" in reason:
        return f"{where}: the line is longer than 2 MB. See whether a quote is left open there, or shorten its values."
    fields = re.search(r"Expected Number of Columns: (\d+) Found: (\d+)", reason)
    if fields:
        delimiter, header = _header(path, schema)
        number, found = _ragged_line(path, delimiter, len(header)) or (int(line[1]) if line else 1, int(fields[2]))
        names = ", ".join(repr(name) for name in header[:3]) + (", …" if len(header) > 3 else "")
        shown = "tab" if delimiter == "\t" else f"`{delimiter}`"
        return (
            f"{path}, line {number}: {found} field{'s' * (found != 1)}, where the header names {len(header)} ({names})."
            f" Correct the line: a value that holds the delimiter ({shown}) or a line break goes in quotes, an empty"
            " value keeps its delimiter."
        )
    what = reason.strip().splitlines()[0].rstrip(".")
    return f"{where}: cannot be read: {what}. Repair the file or export it again."


def _line_not_utf8(path: Path) -> int | None:
    """The first line that is not UTF-8."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    line.decode()
                except UnicodeDecodeError:
                    return number
    except (OSError, EOFError, zlib.error):
        pass
    return None


def _ragged_line(path: Path, delimiter: str, expected: int) -> tuple[int, int] | None:
    """Number and fields of the first line that has not as many as expected: DuckDB counts records, not lines, and stops
    at the first field too many."""
    try:
        with _text_of(path) as file:
            reader, start = csv.reader(file, delimiter=delimiter), 1
            for record in reader:
                if record and len(record) != expected:
                    return start, len(record)
                start = reader.line_num + 1
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error):
        pass
    return None


def _alike(path: Path, missing: Sequence[str]) -> dict[str, str]:
    """The missing columns that a Parquet file has, but beside others of the same name but for capitals: SQL does not
    tell them apart."""
    if is_csv(path):
        return {}
    file = path if path.is_file() else min(path.rglob("*.parquet"))
    try:
        names = pq.read_schema(file).names
    except (OSError, pa.ArrowException):
        return {}
    found = {}
    for name in set(missing) & set(names):
        alike = ", ".join(repr(n) for n in names if n.lower() == name.lower())
        found[name] = (
            f"{path}: column {name!r}: names that differ in capitals alone cannot be told apart: {alike}. Name every"
            " column differently."
        )
    return found


def _nested(schema: LogSchema, types: Mapping[str, str]) -> Iterator[Check]:
    """User, context and tag columns whose cells hold more than one value, in a way that is not understood."""
    for role in ("user", "context", "variant"):
        for name in schema.role(role):
            kind = types[name].removesuffix("[]") if role == "variant" else types[name]
            if kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION")):
                message = (
                    f"{'tag' if role == 'variant' else role} column {name!r} holds {types[name]}: every cell is taken"
                    " as one text. Give each part a column of its own."
                )
                yield Check("nested_column", Level.WARNING, message)


def missing_column(path: Path, name: str, schema: LogSchema, present: list[str]) -> str:
    """What to say of a column that the schema names and the log lacks, with the nearest of those `present`."""
    keys = [key for key in LogSchema.model_fields if key not in ("scene", "arms") and name in schema.role(key)]
    lower = {p.lower(): p for p in present}
    nearest = [lower[p] for p in difflib.get_close_matches(name.lower(), list(lower), n=3, cutoff=0.5)]
    shown = ", ".join(repr(p) for p in nearest or present[:20])
    return (
        f"{path}: column {name!r} (schema key `{'`, `'.join(keys)}`) is missing from all rows."
        f" {'The nearest are' if nearest else 'The columns are'}: {shown}. Correct the schema or add the column."
    )


_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER")
_WIDE_INTEGERS = ("UBIGINT", "HUGEINT", "UHUGEINT")
_NUMBERS = (*_INTEGERS, *_WIDE_INTEGERS, "FLOAT", "DOUBLE", "DECIMAL", "BOOLEAN")


def _is_wide(kind: str) -> bool:
    """Whether a type holds whole numbers that 64 bits may not hold: they are read as text, as those of a CSV are."""
    return kind in _WIDE_INTEGERS or re.fullmatch(r"DECIMAL\(\d+,0\)", kind) is not None


def _load(
    database: duckdb.DuckDBPyConnection, schema: LogSchema, types: Mapping[str, str]
) -> tuple[dict[tuple[str, str], pa.Array], pa.Array]:
    """Each (role, column) as one compact array, and a 64-bit hash of each row of the file: one pass over the file."""
    select: dict[tuple[str, str], str] = {}
    for role in ("label", "clicks", "impressions", "propensity", "weight", "time"):
        for name in schema.role(role):
            select[role, name] = number_sql(name, types[name], time=role == "time")
    for role in ("user", "context"):
        for name in schema.role(role):
            select[role, name] = _feature_sql(name, types[name])
    for name in schema.variant:
        if types[name].endswith("]"):
            select["variant", name] = f"CAST(to_json(CAST({sql_name(name)} AS VARCHAR[])) AS VARCHAR)"
        else:
            select["variant", name] = f"nullif(CAST({sql_name(name)} AS VARCHAR), '')"
    for role in ("variant_id", "group", "product", "bucket"):
        for name in schema.role(role):
            select[role, name] = f"nullif(CAST({sql_name(name)} AS VARCHAR), '')"
    if schema.unit:  # as text, so that Parquet and CSV agree; 64 bits do not collide before billions of units
        texts = ", ".join(f"nullif(CAST({sql_name(name)} AS VARCHAR), '')" for name in schema.unit)
        known = f"{texts} IS NOT NULL" if len(schema.unit) == 1 else "true"
        select["unit", schema.unit[0]] = f"CASE WHEN {known} THEN hash({texts}) END"
    select["", "row"] = f"hash({', '.join(sql_name(name) for name in types)})"
    query = "SELECT " + ", ".join(f"{sql} AS c{i}" for i, sql in enumerate(select.values())) + " FROM log"
    reader = database.sql(query).to_arrow_reader(1 << 20)
    chunks: list[list[pa.Array]] = [[] for _ in select]
    for batch in reader:
        for into, column in zip(chunks, batch.columns, strict=True):
            into.append(column.dictionary_encode() if pa.types.is_string(column.type) else column)
    arrays = {}
    for key, kind, parts in zip(select, reader.schema.types, chunks, strict=True):
        column = pa.chunked_array(parts or [pa.array([], kind)])
        if pa.types.is_dictionary(column.type):
            column = column.unify_dictionaries()
        arrays[key] = column.combine_chunks()
        parts.clear()
    return arrays, arrays.pop(("", "row"))


def number_sql(name: str, kind: str, *, time: bool) -> str:
    """SQL of a column of type `kind` as DOUBLE: NULL where a value is missing, NaN where it is not a number.

    A `time` is in seconds since 1970: of dates (without an offset they are of the session's time zone, UTC) and of
    numbers in FINER_UNITS; other numbers are as they are.
    """
    column = sql_name(name)
    if kind.split("(")[0] in _NUMBERS:
        return _seconds(f"CAST({column} AS DOUBLE)") if time else f"CAST({column} AS DOUBLE)"
    if time and kind.startswith(("TIMESTAMP", "DATE")):
        return f"epoch(CAST({column} AS TIMESTAMP))"
    text = f"nullif(trim(CAST({column} AS VARCHAR)), '')"
    number = f"CASE lower({text}) WHEN 'true' THEN 1 WHEN 'false' THEN 0 ELSE TRY_CAST({text} AS DOUBLE) END"
    if time:
        number = f"coalesce({_seconds(f'TRY_CAST({text} AS DOUBLE)')}, epoch(TRY_CAST({text} AS TIMESTAMPTZ)))"
    return f"CASE WHEN {text} IS NOT NULL THEN coalesce({number}, 'nan'::DOUBLE) END"


def _seconds(number: str) -> str:
    """SQL of a number, in seconds where it is in one of FINER_UNITS."""
    low, high = TEN_DIGITS
    finer = (
        f"WHEN {number} >= {low * per} AND {number} < {high * per} THEN {number} / {per}"
        for per in FINER_UNITS.values()
    )
    return f"CASE {' '.join(finer)} ELSE {number} END"


def _time_units(name: str, kind: str, seconds: pa.Array, database: duckdb.DuckDBPyConnection) -> Iterator[Check]:
    """What a column's numbers were taken for, where they are not all seconds; `seconds` are its times as read."""
    if kind.startswith(("TIMESTAMP", "DATE")):
        return
    text = sql_name(name) if kind.split("(")[0] in _NUMBERS else f"trim(CAST({sql_name(name)} AS VARCHAR))"
    number = f"TRY_CAST({text} AS DOUBLE)"
    ranges = {unit: (TEN_DIGITS[0] * per, TEN_DIGITS[1] * per) for unit, per in FINER_UNITS.items()}
    ways = {
        f"{unit} since 1970": f"x >= {low} AND x < {high}"
        for unit, (low, high) in ({"seconds": SECONDS} | ranges).items()
    }
    counts = ", ".join(f"count(*) FILTER ({is_so})" for is_so in ways.values())
    other = f"isfinite(x) AND NOT ({' OR '.join(ways.values())})"
    query = f"SELECT {counts}, count(*) FILTER ({other}), min(x) FILTER ({other}) FROM (SELECT {number} AS x FROM log)"
    *found, example = database.execute(query).fetchall()[0]
    known = pc.drop_null(pc.if_else(pc.is_finite(seconds), seconds, None))
    rows = dict(zip((*ways, "other numbers"), found, strict=True)) | {"dates": len(known) - sum(found)}
    rows = {way: n for way, n in rows.items() if n > 0}
    column, remedy = f"column {name!r} (`time`)", "write times like 2026-10-01T05:00:00Z, or as seconds since 1970."
    if len(rows) > 1:
        listed = ", ".join(f"{way} ({n:,})" for way, n in rows.items())
        message = (
            f"{column}: times are written in several ways, by rows: {listed}. Each is read as what it looks like, and"
            f" other numbers as seconds since 1970: {remedy}"
        )
        yield Check("time_unit", Level.WARNING, message)
    elif "other numbers" in rows:
        message = (
            f"{column}: numbers such as {example:.15g} are no seconds, milliseconds, microseconds or nanoseconds since"
            f" 1970: they say which exposure came first, and no date. If they are dates, {remedy}"
        )
        yield Check("time_unit", Level.INFO, message)
    elif rows.keys() & {f"{unit} since 1970" for unit in FINER_UNITS}:
        ends = pc.min_max(known).as_py()
        first, last = (datetime.fromtimestamp(ends[end], UTC).isoformat(timespec="seconds") for end in ("min", "max"))
        message = f"{column}: its numbers are read as {next(iter(rows))}, from {first} to {last}. If not so, {remedy}"
        yield Check("time_unit", Level.INFO, message)


def _feature_sql(name: str, kind: str) -> str:
    base = kind.split("(")[0]
    if _is_wide(kind):
        return f"CAST({sql_name(name)} AS VARCHAR)"
    if base in _INTEGERS:
        return f"CAST({sql_name(name)} AS BIGINT)"
    if base in _NUMBERS and base != "BOOLEAN":
        return f"CASE WHEN NOT isnan(CAST({sql_name(name)} AS DOUBLE)) THEN CAST({sql_name(name)} AS DOUBLE) END"
    return f"nullif(CAST({sql_name(name)} AS VARCHAR), '')"


class _Problems:
    """Collects what is wrong with a log so that one error tells all of it; and notes of what was put right."""

    def __init__(self, path: Path, database: duckdb.DuckDBPyConnection) -> None:
        self.path = path
        self.database = database
        self.found: list[str] = []
        self.notes: list[Check] = []

    def rows(self, bad: NDArray[np.bool_], column: str, what: str, remedy: str) -> bool:
        """Reports the rows that are bad, with the first as the example; returns whether there were any."""
        total = int(bad.sum())
        if total:
            row = int(np.argmax(bad))
            value = self.value(column, row)
            comma = isinstance(value, str) and re.fullmatch(DECIMAL_COMMA, value.strip())
            remedy = f"Write decimals with a point, {value.strip().replace(',', '.')}. {remedy}" if comma else remedy
            rows = f"{total:,} row{'s' if total > 1 else ''}, first data row {row + 1:,} ({_shown(value)})"
            self.found.append(f"{self.path}: column {column!r}: {what} in {rows}. {remedy}")
        return total > 0

    def value(self, column: str, row: int) -> Any:
        """What the file holds there."""
        fetched = self.database.execute(f"SELECT {sql_name(column)} FROM log LIMIT 1 OFFSET {row}").fetchone()
        return None if fetched is None else fetched[0]

    def whole(self, column: str, what: str, remedy: str) -> None:
        """Reports a problem of the column as a whole."""
        self.found.append(f"{self.path}: column {column!r}: {what}. {remedy}")

    def raise_if_any(self) -> None:
        """Raises one LogError with all problems, one per line."""
        if self.found:
            raise LogError("\n".join(self.found))


def _shown(value: Any) -> str:
    return "missing" if value is None else repr(value)


def _assemble(
    path: Path,
    schema: LogSchema,
    columns: Mapping[tuple[str, str], pa.Array],
    problems: _Problems,
    n: int,
    untyped: set[str],
) -> Log:
    numbers = {
        role: column.to_numpy(zero_copy_only=False) for (role, _), column in columns.items() if role in _NUMBER_ROLES
    }
    row, reward, count = _outcome(schema, numbers, problems, n)
    weight = numbers.get("weight", np.ones(n))
    if schema.weight is not None:
        bad = ~((weight >= 0) & np.isfinite(weight))
        problems.rows(bad, schema.weight, "weight is negative or not a number", "Give weights ≥ 0, or drop these rows.")
        if not bad.any():
            weight = _scaled(weight, row, reward, count, schema, problems)
    propensity = numbers.get("propensity")
    if schema.propensity is not None and propensity is not None:
        remedy = "Log P(variant | what was known) with every exposure, or set `propensity: null` to have it estimated."
        empty = columns["propensity", schema.propensity].is_null().to_numpy(zero_copy_only=False)
        no_number = np.isnan(propensity) & ~empty
        problems.rows(no_number, schema.propensity, "propensity is no number", remedy)
        outside = ~no_number & ~((propensity > 0) & (propensity <= 1))
        problems.rows(outside, schema.propensity, "propensity outside (0, 1]", remedy)
        remedy = "No choice is that rare: see whether the column holds something else, or drop these rows."
        tiny = (propensity > 0) & (propensity < LEAST_PROPENSITY)
        problems.rows(tiny, schema.propensity, f"propensity below {LEAST_PROPENSITY:g}", remedy)
    time = numbers.get("time")
    if schema.time is not None and time is not None and not np.isfinite(time).all():
        time = np.where(np.isfinite(time), time, np.nan)
        problems.notes.append(_unreadable_times(schema.time, time, columns["time", schema.time], problems))
    variant, variants = _variants(schema, columns, problems)
    unit = _units(schema, columns, problems)
    named: dict[str, tuple[pa.Array | None, Codes | None]] = {}
    for role in ("group", "product", "bucket"):
        named[role] = None, None
        for name in schema.role(role):
            names, codes = text_codes(columns[role, name])
            named[role] = names, codes
            if role == "group" and names.null_count:
                remedy = "Rows compete within a group: name one, or drop these rows."
                problems.rows(codes == len(names) - 1, name, "no group", remedy)
    features = {name: columns[role, name] for role in ("user", "context") for name in schema.role(role)}
    features = {name: _typed(column) if name in untyped else column for name, column in features.items()}
    features = {name: _finite(column, name, problems) for name, column in features.items()}
    problems.notes += _decimal_commas(features)
    group = named["group"][1]
    _comparable(schema, variant, variants, group, problems)
    log = Log(
        path=path,
        schema=schema,
        columns=features,
        reward=np.zeros(n, np.float32),
        count=np.ones(n),
        weight=weight,
        variant=variant,
        variants=variants,
        unit=unit,
        group=group,
        groups=named["group"][0],
        product=named["product"][1],
        products=named["product"][0],
        bucket=named["bucket"][1],
        buckets=named["bucket"][0],
        propensity=propensity,
        time=time,
        file_row=np.arange(n),
        file_rows=n,
    )
    return replace(log if schema.label is not None else log.take(row), reward=reward, count=count)


def _unreadable_times(name: str, time: Floats, column: pa.Array, problems: _Problems) -> Check:
    """That rows have no time (NaN), how many of them are empty, and the first that is not."""
    bad, empty = np.isnan(time), column.is_null().to_numpy(zero_copy_only=False)
    row = int(np.argmax(bad & ~empty)) if (bad & ~empty).any() else int(np.argmax(bad))
    total, gaps, value = int(bad.sum()), int(empty.sum()), problems.value(name, row)
    rows = f"{total:,} row{'s' * (total > 1)}{f' ({gaps:,} of them empty)' if 0 < gaps < total else ''}"
    message = (
        f"column {name!r} (`time`): no time can be read in {rows}, first data row {row + 1:,} ({_shown(value)}); these"
        " exposures have none. Write times like 2026-10-01T05:00:00Z (UTC where no offset is given), or as seconds"
        f" since 1970.{' Which number is the month nobody can tell.' * bool(re.fullmatch(DAY_OR_MONTH, str(value)))}"
    )
    return Check("time_unreadable", Level.WARNING, message)


def _decimal_commas(features: Mapping[str, pa.Array]) -> Iterator[Check]:
    """Features that would be numbers, were decimals written with a point."""
    for name, column in features.items():
        if not pa.types.is_dictionary(column.type) or not len(column.dictionary):
            continue
        texts = pc.utf8_trim_whitespace(column.dictionary)
        comma = pc.match_substring_regex(texts, f"^{DECIMAL_COMMA}$")
        if pc.any(comma).as_py() and pc.all(pc.or_(comma, pc.match_substring_regex(texts, f"^{NUMBER}$"))).as_py():
            example = texts[pc.index(comma, True).as_py()].as_py()
            message = (
                f"column {name!r}: numbers with a comma, such as {example!r}, are taken as text, each as a value of its"
                f" own. Write decimals with a point, {example.replace(',', '.')}."
            )
            yield Check("decimal_comma", Level.WARNING, message)


_NUMBER_ROLES = ("label", "clicks", "impressions", "propensity", "weight", "time")


def _outcome(
    schema: LogSchema, numbers: Mapping[str, Floats], problems: _Problems, n: int
) -> tuple[Codes, NDArray[np.float32], Floats]:
    """Rows of the file, rewards and counts; an aggregated row becomes one row of clicks and one of non-clicks."""
    row = np.arange(n)
    if schema.label is not None:
        label = numbers["label"]
        bad = ~((label == 0) | (label == 1))
        reward, count = label.astype(np.float32), np.ones(n)
        column, any_bad = (
            schema.label,
            problems.rows(bad, schema.label, "label is not 0 or 1", "Write 0 or 1, or drop these rows."),
        )
    else:
        clicks, impressions = numbers["clicks"], numbers["impressions"]
        column = str(schema.clicks)
        any_bad = False
        for role, values in (("clicks", clicks), ("impressions", impressions)):
            bad = ~((values >= 0) & (values == np.floor(values)) & (values <= MOST_IMPRESSIONS))
            remedy = "Give such numbers, or drop these rows."
            any_bad |= problems.rows(
                bad, schema.role(role)[0], f"{role} is not a whole number ≥ 0 and ≤ {MOST_IMPRESSIONS:g}", remedy
            )
        remedy = "Clicks are counted among the impressions: correct or drop these rows, or swap the two keys."
        any_bad |= problems.rows(clicks > impressions, column, f"more clicks than {schema.impressions!r}", remedy)
        if not any_bad:
            both = np.stack([clicks, impressions - clicks], axis=1)
            row, kind = np.nonzero(both)
            reward, count = (kind == 0).astype(np.float32), both[row, kind]
            if not len(row):
                problems.whole(str(schema.impressions), f"no impressions in all {n:,} rows", "Export the log again.")
                any_bad = True
        else:
            reward, count = np.zeros(n, np.float32), np.ones(n)
    if not any_bad and (reward == reward[0]).all():
        what = f"the label is {int(reward[0])} in all {n:,} rows"
        problems.whole(column, what, "Nothing can be learned from it: check the export, or name another label.")
    return row, reward, count


def _scaled(
    weight: Floats, row: Codes, reward: NDArray[np.float32], count: Floats, schema: LogSchema, problems: _Problems
) -> Floats:
    """Weights with a mean of 1 per exposure: what they are relative to each other is all they say."""
    column, heaviest = str(schema.weight), float(weight.max(initial=0))
    if heaviest == 0:
        problems.whole(column, f"the weight is 0 in all {len(weight):,} rows", "Give the rows that count a weight.")
        return weight
    weight = weight / heaviest
    counted = reward[(weight[row] > 0) & (count > 0)]
    if (reward != reward[0]).any() and (counted == counted[:1]).all():
        what = f"the label is {int(counted[0])} in all rows with a weight above 0" if len(counted) else "no exposure"
        problems.whole(column, what, "Nothing can be learned from it: check the weights, or set `weight: null`.")
        return weight
    return np.asarray(weight / np.average(weight[row], weights=count))


def tag_values(text: str | None, *, is_list: bool) -> tuple[str, ...]:
    """The values in a tag cell, each once, sorted: the order in which tags are listed means nothing."""
    if text is None:
        return ()
    parts = [v for v in json.loads(text) if v is not None] if is_list else text.split("|")
    return tuple(sorted({stripped for v in parts if (stripped := v.strip())}))


def _variants(
    schema: LogSchema, columns: Mapping[tuple[str, str], pa.Array], problems: _Problems
) -> tuple[Codes, pa.Table]:
    """Each row's variant and the table of variants, in the order of their ids."""
    values: dict[str, list[tuple[str, ...]]] = {}
    tags: dict[str, Codes] = {}
    for name in schema.variant:
        column = columns["variant", name]
        is_list = problems.database.sql(f"SELECT {sql_name(name)} FROM log LIMIT 0").types[0].id == "list"
        texts, codes = text_codes(column)
        cells = [tag_values(t, is_list=is_list) for t in texts.to_pylist()]
        values[name] = sorted(set(cells))
        index = {cell: i for i, cell in enumerate(values[name])}
        tags[name] = np.array([index[cell] for cell in cells], dtype=np.int64)[codes]
    n = len(next(iter(tags.values())))
    variant = combination = combine(list(tags.values()), n)
    first = first_rows(variant)
    ids = [
        " / ".join("|".join(values[name][codes[row]]) for name, codes in tags.items()) for row in first.tolist()
    ]  # readable, and the key of a mapping in `arms`
    if len(set(ids)) < len(ids):
        ids = [json.dumps([values[name][codes[row]] for name, codes in tags.items()]) for row in first.tolist()]
    if schema.variant_id is not None:
        names, variant = text_codes(columns["variant_id", schema.variant_id])
        if names.null_count:
            remedy = "Name the variant in every row, drop these rows, or leave `variant_id` out."
            problems.rows(variant == len(names) - 1, schema.variant_id, "no variant", remedy)
        first, ids = first_rows(variant), names.to_pylist()
        changed = variant[combination[first][variant] != combination]
        if len(changed):
            several = sorted({str(ids[v]) for v in np.unique(changed)})
            what = f"{len(several):,} variants carry more than one combination of tags, in {len(changed):,} rows"
            remedy = "A variant's tags must not change: correct them, or leave `variant_id` out."
            shown = ", ".join(repr(v) for v in several[:5])
            problems.whole(schema.variant_id, f"{what} (first: {shown})", remedy)
    order = np.array(sorted(range(len(ids)), key=lambda i: str(ids[i])), dtype=np.int64)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    kept = first[order].tolist()
    data = {
        name: pa.array([values[name][codes[r]] for r in kept], pa.list_(pa.string())) for name, codes in tags.items()
    }
    table = pa.table({**data, "variant_id": pa.array([ids[i] for i in order.tolist()], pa.string())})
    return rank[variant], table


def first_rows(codes: Codes) -> Codes:
    """The first row of each code."""
    first = np.empty(int(codes.max(initial=-1)) + 1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    return first


def _comparable(
    schema: LogSchema, variant: Codes, variants: pa.Table, group: Codes | None, problems: _Problems
) -> None:
    column = schema.variant_id or schema.variant[0]
    remedy = "At least two must have been shown to compare: check the export and the key `variant`."
    if variants.num_rows < 2:
        problems.whole(column, f"a single variant in all {len(variant):,} rows", remedy)
    elif group is not None:
        pairs = np.unique(group * variants.num_rows + variant)
        alone = np.bincount(pairs // variants.num_rows) < 2
        rows = int(alone[group].sum())
        if alone.all():
            problems.whole(column, f"a single variant in each of the {len(alone):,} groups, all {rows:,} rows", remedy)
        elif rows:
            message = f"{int(alone.sum()):,} groups ({rows:,} rows) show a single variant: they compare nothing."
            problems.notes.append(Check("single_variant_groups", Level.WARNING, message))


def _units(schema: LogSchema, columns: Mapping[tuple[str, str], pa.Array], problems: _Problems) -> Codes | None:
    """Codes by the hash of the unit. A row whose only unit column is empty becomes a unit of its own: pooling all
    strangers into one unit would be one huge cluster, and they are not one person."""
    if not schema.unit:
        return None
    hashes = columns["unit", schema.unit[0]]
    unknown = hashes.is_null().to_numpy(zero_copy_only=False)
    distinct, codes = factorise(hashes.fill_null(0).to_numpy())
    if unknown.any():
        codes = codes.copy()
        codes[unknown] = len(distinct) + np.arange(int(unknown.sum()))
        codes = densify(codes)
        message = (
            f"column {schema.unit[0]!r}: {int(unknown.sum()):,} rows name no unit; each is taken as a unit of its own."
            " If they are the same people again, errors are too small: drop these rows or log an id."
        )
        problems.notes.append(Check("unit_missing", Level.WARNING, message))
    return codes


def _typed(column: pa.Array) -> pa.Array:
    """A column of text as numbers, if all of its values are numbers and none is written as a code (007). Whole numbers
    that 64 bits do not hold stay text: as floats, different ones would become the same."""
    if not pa.types.is_dictionary(column.type) or not len(column.dictionary):
        return column
    texts = pc.utf8_trim_whitespace(column.dictionary)
    texts = pc.if_else(pc.is_in(texts, pa.array(sorted(MISSING_TEXTS))), None, texts)
    infinite = pc.match_substring_regex(texts, f"^{INFINITE}$", ignore_case=True)
    number = pc.or_(pc.match_substring_regex(texts, f"^{NUMBER}$"), infinite)
    code = pc.match_substring_regex(texts, f"^{CODE_NUMBER}$")
    if pc.all(pc.fill_null(infinite, True)).as_py() or not pc.all(number).as_py() or pc.any(code).as_py():
        return column
    plain = pc.replace_substring_regex(texts, r"^\+", "")
    if not pc.all(pc.or_(pc.match_substring_regex(texts, "^[+-]?[0-9]+$"), infinite)).as_py():
        return pc.cast(plain, pa.float64()).take(column.indices)
    try:
        whole = pc.cast(pc.if_else(infinite, None, plain), pa.int64())
    except pa.ArrowInvalid:
        return column
    infinities = pc.any(infinite).as_py()
    return (pc.cast(plain, pa.float64()) if infinities else whole).take(column.indices)


def _finite(column: pa.Array, name: str, problems: _Problems) -> pa.Array:
    """A column without infinite numbers: they are taken as missing, and a warning says so."""
    if not pa.types.is_floating(column.type):
        return column
    infinite = pc.fill_null(pc.is_inf(column), False)
    rows = int(pc.sum(infinite).as_py() or 0)
    if not rows:
        return column
    message = (
        f"column {name!r}: infinite in {rows:,} row{'s' * (rows > 1)}, first data row"
        f" {pc.index(infinite, True).as_py() + 1:,}; taken as missing. If they mean something (never, without limit),"
        " write a number or put the column as text."
    )
    problems.notes.append(Check("not_finite", Level.WARNING, message))
    return pc.if_else(infinite, None, column)


# ------------------------------------------------------------------------------------------------ warnings


def _warnings(log: Log, duplicates: int) -> list[Check]:
    checks = []

    def warn(code: str, message: str, level: Level = Level.WARNING) -> None:
        checks.append(Check(code, level, message))

    if duplicates:
        warn(
            "duplicated_rows",
            f"{duplicates:,} of {log.file_rows:,} rows repeat an earlier row in every column of the file. If exposures"
            " were logged twice, drop the repeats; if different users look alike, all is well.",
        )
    schema = log.schema
    if not schema.context:
        warn("no_context", "the schema names no `context` columns: there is no best variant per context.", Level.INFO)
    if not schema.user:
        warn("no_user_features", "the schema names no `user` columns: nothing can be personal.", Level.INFO)
    if log.unit is not None:
        exposures = np.bincount(log.unit, log.count)
        once = float((exposures <= 1).mean())
        if once > 0.95:
            warn(
                "units_seen_once",
                f"{once:.1%} of {log.n_units:,} units have one exposure: per-user measures are not available. If users"
                " come back, `unit` should be the user's id, not the exposure's.",
            )
        if log.n_units < FEW_UNITS:
            only = f"{log.n_units} unit{'s' * (log.n_units != 1)}"
            warn("few_units", f"only {only}: folds and intervals by unit are unreliable below {FEW_UNITS}.")
    for name, column in log.columns.items():
        role = "user" if name in schema.user else "context"
        distinct = int(pc.count_distinct(column.indices if pa.types.is_dictionary(column.type) else column).as_py())
        empty = column.null_count / len(log)
        if distinct < 2 and empty in (0, 1):
            warn("constant_column", f"{role} column {name!r} never varies: it can be left out.")
        if empty > 0.5:
            warn("mostly_missing", f"{role} column {name!r} is empty in {empty:.1%} of the rows.")
        text = pa.types.is_dictionary(column.type)
        if role == "user" and text and distinct > 1 and _all_dates(column):
            warn(
                "date_column",
                f"user column {name!r} holds dates: each is a value of its own, and later ones say nothing. Give what"
                " matters of them (days since, month, weekday, hour) in columns instead.",
            )
        elif (
            role == "user"
            and not pa.types.is_floating(column.type)
            and distinct > (0.5 if text else 0.95) * min(log.n_units, len(log))
            and distinct > 100
        ):
            warn(
                "id_like_column",
                f"user column {name!r} has {distinct:,} values for {log.n_units:,} units: it looks like an id, which"
                " says nothing about a new user. Leave it out of `user`.",
            )
    for name in schema.variant:
        if len(set(map(tuple, log.variants[name].to_pylist()))) < 2:
            warn("constant_column", f"tag column {name!r} never varies: nothing can be learned about it.")
    checks += _varying(log)
    checks += _propensity_mean(log)
    if isinstance(schema.arms, dict):
        ids = set(log.variants["variant_id"].to_pylist())
        values = [{"|".join(v) for v in log.variants[name].to_pylist()} for name in schema.variant]
        shown = next((s for s in (ids, *values) if s <= set(schema.arms)), None)
        if shown is None:
            example = ", ".join(repr(v) for v in sorted(ids - set(schema.arms))[:3])
            warn(
                "arms_unmatched",
                "`arms` gives no share for every variant that was shown, so the SRM check is left out. Key it by"
                f" variant ({example}, …) or by all the values of one tag dimension.",
            )
    return checks


def _all_dates(column: pa.DictionaryArray) -> bool:
    texts = column.dictionary
    return bool(len(texts) and pc.all(pc.match_substring_regex(texts, f"^{DATE}$")).as_py())


def _varying(log: Log) -> list[Check]:
    """Which user columns change within a unit."""
    if log.unit is None or not log.schema.user:
        return []
    among = min(log.n_units, SAMPLED_UNITS)  # codes are hashes: the first ones are a random sample
    rows = np.flatnonzero(log.unit < among)
    rows = rows[np.argsort(log.unit[rows], kind="stable")]
    unit = log.unit[rows]
    same = unit[1:] == unit[:-1]
    checks = []
    for name in log.schema.user:
        column = log.columns[name]
        column = column.indices if pa.types.is_dictionary(column.type) else column
        values = column.take(pa.array(rows)).fill_null(-1).to_numpy()
        units = len(np.unique(unit[1:][same & (values[1:] != values[:-1])]))
        if units:
            sample = " looked at" if among < log.n_units else ""
            message = f"user column {name!r} changes within {units:,} of {among:,} units{sample}."
            checks.append(Check("varies_within_unit", Level.INFO, message))
    return checks


@dataclass(frozen=True)
class _Inverse:
    """mean(1/propensity) of a log, and what it may be: the variants seen, by finer and by coarser cells, and unseen."""

    mean: float
    se: float  # by unit
    low: float
    high: float
    most: float

    @property
    def margin(self) -> float:
        """3 standard errors, and 1 %: logged propensities are rounded."""
        return 3 * self.se + 0.01 * self.high

    @property
    def fits(self) -> bool:
        """Whether it is what variants could be shown."""
        return self.low - self.margin <= self.mean <= self.most + self.margin

    def __str__(self) -> str:
        wanted = f"{self.high:.4g}" if self.high - self.low < 0.01 * self.high else f"{self.low:.4g} to {self.high:.4g}"
        return f"{self.mean:.4g} (se {self.se:.2g}), but {wanted} variant{'s' * (wanted != '1')} could be shown"


def _propensity_mean(log: Log) -> list[Check]:
    """mean(1/propensity) against the number of eligible variants, 3 standard errors by unit.

    E[1/propensity] is the number of variants that could be shown, averaged over rows: of those that the row's policy
    (its bucket) was seen to show in the row's group and context, plus those that chance kept from being seen there
    (Chao 1984, doi:10.2307/4615964, at most doubled). A control bucket shows one: counted with the others it would seem
    to lack them.
    """
    if log.propensity is None:
        return []
    found = _inverse(log, _policies(log))
    if found.fits:
        return []
    message = (
        f"column {log.schema.propensity!r} (the propensities): mean(1/propensity) is {found}. A propensity is the"
        " probability of the variant that was shown, given all the choice knew, the bucket included."
    )
    if log.bucket is not None and log.buckets is not None and len(log.buckets) > 1:
        parts = {str(name): _inverse(part, _policies(part)) for name, part in _by_bucket(log)}
        apart = [f"in bucket {name!r} it is {part}" for name, part in parts.items() if not part.fits][:3]
        message += f" By buckets, {'; '.join(apart)}." if apart else ""
    elif log.bucket is None and found.mean < found.low:
        message += " If a bucket showed everybody one variant, name the column of the bucket in `bucket`."
    if found.mean - found.margin > IMPOSSIBLE * found.most:
        message += (
            " These are none, and values that rest on them mean nothing: correct them, or set `propensity: null`."
        )
        return [Check("propensity_mean", Level.ERROR, message)]
    message += (
        " Log the probability with which the choice was drawn, neither capped nor guessed, or set `propensity: null`."
    )
    return [Check("propensity_mean", Level.WARNING, message)]


def _by_bucket(log: Log) -> Iterator[tuple[Any, Log]]:
    assert log.bucket is not None and log.buckets is not None
    for code, name in enumerate(log.buckets.to_pylist()):
        rows = np.flatnonzero(log.bucket == code)
        if len(rows):
            yield name, log.take(rows)


def _policies(log: Log) -> Codes:
    """(n,) the policy that a row was shown by: its bucket; and where a variant alone could be shown, that others drew
    it in the same place shows another policy, whether or not the log names buckets."""
    assert log.propensity is not None
    bucket = np.zeros(len(log), np.int64) if log.bucket is None else log.bucket
    alone = log.propensity >= ONLY
    if not alone.any() or alone.all():
        return bucket
    _, pair = factorise(_places(log, bucket) * log.n_variants + log.variant)
    drawn = np.bincount(pair, ~alone) > 0
    return combine([bucket, (alone & drawn[pair]).astype(np.int64)], len(log))


def _places(log: Log, policy: Codes) -> Codes:
    """(n,) context × group × product × policy."""
    parts = [log.cells(log.schema.context), policy]
    return combine([*parts, log.product] if log.product is not None else parts, len(log))


def _inverse(log: Log, policy: Codes) -> _Inverse:
    """Of a log whose rows were shown by these policies (n,)."""
    assert log.propensity is not None
    inverse, total = log.count / log.propensity, log.count.sum()
    mean = float(inverse.sum() / total)
    if log.unit is not None:
        se = float(np.sqrt((np.bincount(log.unit, (inverse - mean * log.count) / total) ** 2).sum()))
    else:
        se = float(np.sqrt((log.count * (1 / log.propensity - mean) ** 2).sum()) / total)
    scene = combine([policy] if log.group is None else [log.group, policy], len(log))
    (fine, unseen_fine), (coarse, unseen_coarse) = (_variants_seen(c, log) for c in (_places(log, policy), scene))
    most = max(fine + unseen_fine, coarse + unseen_coarse)
    return _Inverse(mean, se, min(fine, coarse), max(fine, coarse), most)


def _variants_seen(cells: Codes, log: Log) -> tuple[float, float]:
    """Different variants seen in a row's cell, and an upper guess of those unseen, averaged over exposures."""
    pairs, codes = factorise(cells * log.n_variants + log.variant)
    shown = np.bincount(codes, log.count)
    cell = pairs // log.n_variants
    once, twice = np.bincount(cell, shown == 1), np.bincount(cell, shown == 2)
    unseen = 2 * once * np.maximum(once - 1, 0) / (2 * (twice + 1))
    share = np.bincount(cells, log.count) / log.count.sum()
    return float(share @ np.bincount(cell)), float(share @ unseen)
