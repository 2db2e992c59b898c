"""User features, context and tags as arrays: the one encoder that training and serving share.

A categorical field is a bucket per value; a numeric field is quantile buckets plus the value itself. Bucket 0 is
"missing" and bucket 1 "never seen in training", in every field and in every tag dimension. What a model does with the
arrays is not known here.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import csr_array

from kaleidoscope.errors import InputError

MISSING = 0
UNSEEN = 1
RESERVED = 2  # buckets before the first real one
MAX_BINS = 16
MAX_VALUES = 5_000  # of a categorical field; rarer values are encoded as never seen
VALUE_CLIP = 4.0  # standard deviations

Column: TypeAlias = pa.Array | pa.ChunkedArray
Role = Literal["user", "context", "group"]


@dataclass(frozen=True)
class Field:
    """How one user, context or group column is encoded."""

    name: str
    role: Role
    vocabulary: tuple[str, ...] | None  # categorical: value of bucket RESERVED + i
    edges: tuple[float, ...] = ()  # numeric: interior bin edges; bin i is [edges[i-1], edges[i])
    mean: float = 0.0
    scale: float = 1.0

    @property
    def numeric(self) -> bool:
        """Whether the field has a value beside its bucket."""
        return self.vocabulary is None

    @property
    def size(self) -> int:
        """Number of buckets, with those for missing and never-seen values."""
        return RESERVED + (len(self.edges) + 1 if self.vocabulary is None else len(self.vocabulary))

    def label(self, bucket: int) -> str:
        """The bucket as a person reads it: a value, `[lo, hi)`, `missing` or `unseen`."""
        if bucket < RESERVED:
            return ("missing", "unseen")[bucket]
        if self.vocabulary is not None:
            return self.vocabulary[bucket - RESERVED]
        edges = ("-inf", *self._edge_labels, "inf")
        return f"[{edges[bucket - RESERVED]}, {edges[bucket - RESERVED + 1]})"

    @cached_property
    def _edge_labels(self) -> tuple[str, ...]:
        """The edges as text, with as few digits as tell them apart."""
        for digits in range(6, 18):
            labels = tuple(f"{e:.{digits}g}" for e in self.edges)
            if len(set(labels)) == len(labels):
                break
        return labels


@dataclass(frozen=True)
class Dimension:
    """One tag dimension: value i of the vocabulary is column RESERVED + i."""

    name: str
    vocabulary: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of columns, with those for missing and never-seen values."""
        return RESERVED + len(self.vocabulary)


@dataclass(frozen=True)
class Features:
    """Encoded users in their context: F fields, V numeric values."""

    codes: NDArray[np.uint16]  # (n, F) bucket within each field
    values: NDArray[np.float32]  # (n, V) standardised, 0 where missing

    def __len__(self) -> int:
        return len(self.codes)

    def take(self, rows: NDArray[np.int64] | slice) -> Features:
        """The features of some rows."""
        return Features(self.codes[rows], self.values[rows])


@dataclass(frozen=True)
class Encoder:
    """Fields of the user, then of the context, and the tag dimensions."""

    fields: tuple[Field, ...]
    dimensions: tuple[Dimension, ...]

    @classmethod
    def fit(
        cls,
        columns: Mapping[str, Column],
        *,
        user: Sequence[str],
        context: Sequence[str],
        group: Sequence[str] = (),
        variants: pa.Table,
        dimensions: Sequence[str],
    ) -> Encoder:
        """Learn vocabularies, bins and scales.

        `columns` hold the user and context fields, one row per exposure: text (or dictionaries of text) is categorical,
        numbers are numeric. `variants` has one row per variant and a list-of-text column per dimension.
        """
        fields = [_fit_field(name, "user", columns[name]) for name in user]
        fields += [_fit_field(name, "context", columns[name]) for name in context]
        fields += [_fit_field(name, "group", _text(columns[name])) for name in group]
        return cls(tuple(fields), tuple(_fit_dimension(name, variants[name]) for name in dimensions))

    def only(self, *roles: Role) -> tuple[Encoder, list[int], list[int]]:
        """The encoder of the fields with these roles, their positions in `fields` and those of their numeric values."""
        kept = [i for i, f in enumerate(self.fields) if f.role in roles]
        values = [j for j, i in enumerate(self.numeric_fields) if i in kept]
        return Encoder(tuple(self.fields[i] for i in kept), self.dimensions), kept, values

    @cached_property
    def numeric_fields(self) -> tuple[int, ...]:
        """Positions in `fields` of the numeric ones: the columns of `Features.values`."""
        return tuple(i for i, f in enumerate(self.fields) if f.numeric)

    def features(self, columns: Mapping[str, Column], rows: int | None = None) -> Features:
        """Encode users and contexts. A column that is absent is missing for everyone; `rows` says how many there are
        where no column does."""
        n = max((len(c) for c in columns.values()), default=0) if rows is None else rows
        codes = np.zeros((n, len(self.fields)), dtype=np.uint16)
        values = np.zeros((n, len(self.numeric_fields)), dtype=np.float32)
        for i, spec in enumerate(self.fields):
            column = columns.get(spec.name)
            if column is None:
                continue
            if spec.vocabulary is not None:
                codes[:, i] = _buckets(column, spec.vocabulary)
                continue
            numbers = _numbers(column, spec.name)
            known = np.isfinite(numbers)
            bins = np.searchsorted(np.asarray(spec.edges), numbers, side="right") + RESERVED
            codes[:, i] = np.where(known, bins, MISSING)
            standardised = np.where(known, numbers, spec.mean) / spec.scale - spec.mean / spec.scale
            values[:, self.numeric_fields.index(i)] = np.clip(standardised, -VALUE_CLIP, VALUE_CLIP)
        return Features(codes, values)

    def encode(self, columns: Mapping[str, Sequence[object]], rows: int) -> Features:
        """`features` of plain Python values, as requests bring them: without Arrow, in microseconds.

        The same buckets as `features`, but nothing is refused: what should be a number and cannot be read as one, or is
        a list or a mapping, is a value never seen.
        """
        codes = np.zeros((rows, len(self.fields)), dtype=np.uint16)
        values = np.zeros((rows, len(self.numeric_fields)), dtype=np.float32)
        for i, (spec, known) in enumerate(zip(self.fields, self._known_values, strict=True)):
            column = columns.get(spec.name)
            if column is None:
                continue
            if spec.vocabulary is not None:
                codes[:, i] = [_bucket_of(value, known) for value in column]
                continue
            coded = [_number_of(value, spec) for value in column]
            codes[:, i] = [code for code, _ in coded]
            values[:, self.numeric_fields.index(i)] = [value for _, value in coded]
        return Features(codes, values)

    @cached_property
    def _known_values(self) -> tuple[dict[str, int], ...]:
        """Per field, the bucket of each value of its vocabulary."""
        return tuple({v: i for i, v in enumerate(f.vocabulary or (), start=RESERVED)} for f in self.fields)

    @cached_property
    def n_tags(self) -> int:
        """Columns of `tags`: the sizes of all dimensions."""
        return sum(d.size for d in self.dimensions)

    def tags(self, variants: pa.Table) -> csr_array:
        """Multi-hot tags of each variant: sparse (N, n_tags). A list may hold several values of one dimension."""
        n = len(variants)
        rows, columns, start = [], [], 0
        for dimension in self.dimensions:
            lists = _whole(variants[dimension.name])
            owner = pc.list_parent_indices(lists).to_numpy(zero_copy_only=False)
            bucket = _buckets(pc.list_flatten(lists), dimension.vocabulary)
            untagged = np.flatnonzero(np.bincount(owner, minlength=n) == 0)
            rows += [owner, untagged]
            columns += [start + bucket, np.full(len(untagged), start + MISSING)]
            start += dimension.size
        where = np.sort(np.concatenate(rows) * start + np.concatenate(columns))
        where = where[np.diff(where, prepend=-1) > 0]  # np.unique hashes, and numbers so regular collide: far slower
        indptr = np.searchsorted(where, np.arange(n + 1) * start).astype(np.int32)
        return csr_array((np.ones(len(where), np.float32), (where % start).astype(np.int32), indptr), shape=(n, start))

    def to_json(self) -> str:
        """The encoder as text; `from_json` reads it back to an equal one."""
        return json.dumps({key: [asdict(part) for part in getattr(self, key)] for key in ("fields", "dimensions")})

    @classmethod
    def from_json(cls, text: str) -> Encoder:
        """Read what `to_json` wrote."""
        raw = json.loads(text)
        return cls(
            tuple(Field(**_tuples(f)) for f in raw["fields"]), tuple(Dimension(**_tuples(d)) for d in raw["dimensions"])
        )


def _tuples(raw: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}


def _fit_field(name: str, role: Role, column: Column) -> Field:
    if not _is_number(column.type):
        return Field(name, role, _vocabulary(column))
    numbers = _numbers(column, name)
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return Field(name, role, None)
    peak = float(np.abs(numbers).max()) or 1.0  # the square of a number may be more than a float can hold
    scale = float((numbers / peak).std()) * peak
    return Field(name, role, None, _edges(numbers), float((numbers / peak).mean()) * peak, scale if scale > 0 else 1.0)


def _edges(numbers: NDArray[np.float64]) -> tuple[float, ...]:
    distinct = np.unique(numbers)
    if len(distinct) <= MAX_BINS:
        return tuple(distinct[1:].tolist())
    quantiles = np.quantile(numbers, np.arange(1, MAX_BINS) / MAX_BINS, method="higher")
    return tuple(float(e) for e in np.unique(quantiles) if e > distinct[0])


def _fit_dimension(name: str, column: Column) -> Dimension:
    values = pc.list_flatten(column)
    return Dimension(name, tuple(sorted(v for v in pc.unique(values).to_pylist() if v is not None)))


def _vocabulary(column: Column) -> tuple[str, ...]:
    counts = pc.value_counts(_text(column)).to_pylist()
    known = sorted(((c["counts"], c["values"]) for c in counts if c["values"] is not None), key=lambda c: (-c[0], c[1]))
    return tuple(sorted(value for _, value in known[:MAX_VALUES]))


def _buckets(column: Column, vocabulary: Sequence[str]) -> NDArray[np.int64]:
    """Bucket of each entry of a text column: (n,)."""
    array = _whole(column)
    if pa.types.is_dictionary(array.type):
        of_value = np.append(_buckets(array.dictionary, vocabulary), MISSING)
        codes = _array(pc.fill_null(array.indices.cast(pa.int64()), len(array.dictionary))).astype(np.int64, copy=False)
        return of_value[codes]
    text = _text(array)
    found = pc.index_in(text, value_set=pa.array(vocabulary, pa.string()))
    bucket = _array(pc.fill_null(found.cast(pa.int64()), UNSEEN - RESERVED)) + RESERVED
    return np.where(_array(pc.is_null(text)), MISSING, bucket)


def _bucket_of(value: object, known: Mapping[str, int]) -> int:
    """`_buckets` of one Python value."""
    if value is None:
        return MISSING
    if isinstance(value, float | np.floating):
        value = pa.scalar(float(value)).cast(pa.string()).as_py()  # as Arrow writes numbers
    elif isinstance(value, bool | np.bool_):
        value = "true" if value else "false"
    elif isinstance(value, int | np.integer):
        value = str(value)
    return known.get(value, UNSEEN) if isinstance(value, str) else UNSEEN


def _number_of(value: object, spec: Field) -> tuple[int, float]:
    """Bucket and standardised value of one Python value of a numeric field."""
    if value is None:
        return MISSING, 0.0
    try:
        number = float(value) if isinstance(value, str | int | float | np.number | np.bool_) else None
    except ValueError:
        number = None
    except OverflowError:  # an integer beyond all floats: as infinity
        return MISSING, 0.0
    if number is None:
        return UNSEEN, 0.0
    if not math.isfinite(number):
        return MISSING, 0.0
    standardised = number / spec.scale - spec.mean / spec.scale
    return bisect_right(spec.edges, number) + RESERVED, min(max(standardised, -VALUE_CLIP), VALUE_CLIP)


def _whole(column: Column) -> pa.Array:
    """The column as one array: its chunks may have different dictionaries, or be none."""
    if isinstance(column, pa.Array):
        return column
    return column.unify_dictionaries().combine_chunks() if column.num_chunks else pa.array([], column.type)


def _array(values: pa.Array) -> NDArray[Any]:
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _text(column: Column) -> Column:
    if pa.types.is_dictionary(column.type):
        column = pc.cast(column, column.type.value_type)
    return column if pa.types.is_string(column.type) else pc.cast(column, pa.string())


def _numbers(column: Column, name: str) -> NDArray[np.float64]:
    array = _whole(column)
    try:
        return _array(pc.cast(array if _is_number(array.type) else _text(array), pa.float64(), safe=False))
    except pa.ArrowInvalid as error:
        raise InputError(f"column {name!r} was numeric in training and now holds text: {error}") from error


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))
