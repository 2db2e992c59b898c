"""A log as codes: user values and the segments made of them, tags that vary, strata, and what each exposure counts.

How much an exposure counts follows from its logged propensity; a log whose exposure depended on the user in an unknown
way is refused here, and one that some users could never have seen all of in `floor`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array

from attribution.floor import require_floor, require_floor_of_users, uncertain
from attribution.strata_effects import Held, patterns_of, strata_effects
from kaleidoscope.errors import LogError
from kaleidoscope.exposure import exposure_independence
from kaleidoscope.log import Codes, Floats, Log, combine, densify, factorise, sums, text_codes

BINS = 8  # base bins of a number; segments are their halves, quarters and eighths
MAX_VALUES = 64  # of a categorical field that are segments, the rest is one value without; and of a tag dimension
MIN_SHARE = 0.001  # of the exposures, of a value that is a segment
MAX_WEIGHT = 20.0  # an exposure counts at most as so many,
MAX_UNIFORM = 100.0  # and in main effects: what is drawn of many variants stands for many exposures
MIN_UNITS = 10  # of a log whose tastes are told
CONSTANT = 1.01  # propensities of a variant in a stratum that differ by less are one propensity, rounded


@dataclass(frozen=True)
class Segment:
    """Users who share a value of a field: `values` are base values, positions in the field's labels."""

    field: str
    label: str
    values: tuple[int, ...]


@dataclass(frozen=True)
class UserField:
    """A user field: its base values (a partition of the users), and the segments that are unions of them."""

    name: str
    labels: tuple[str, ...]
    segments: tuple[Segment, ...]
    edges: tuple[float, ...] | None = None  # of a number: interior edges; its last base value is "missing"
    known: tuple[str, ...] = ()  # of a text: value of base value i; then missing, then all others

    @classmethod
    def fit(cls, name: str, column: pa.Array, size: Floats) -> UserField:
        """The base values and segments of a column; `size` (n,) is the exposures of each row."""
        if pa.types.is_dictionary(column.type):
            return cls._categorical(name, column, size)
        values = column.to_numpy(zero_copy_only=False).astype(np.float64)
        edges = _edges(values[np.isfinite(values)])
        texts = ("-inf", *_texts(edges), "inf")
        labels = tuple(f"[{a}, {b})" for a, b in pairwise(texts))
        ranges = _halvings(0, len(labels)) if len(labels) > 1 else []
        segments = [Segment(name, f"[{texts[a]}, {texts[b]})", tuple(range(a, b))) for a, b in ranges]
        if not np.isfinite(values).all():
            if not segments:
                segments.append(Segment(name, labels[0], (0,)))
            segments.append(Segment(name, "missing", (len(labels),)))
        return cls(name, (*labels, "missing"), tuple(segments), edges)

    @classmethod
    def _categorical(cls, name: str, column: pa.Array, size: Floats) -> UserField:
        texts, codes = text_codes(column)
        count = sums(codes, size, size=len(texts))
        kept = np.argsort(-count, kind="stable")[:MAX_VALUES]
        kept = kept[count[kept] >= MIN_SHARE * count.sum()]
        values = sorted(str(texts[int(i)]) for i in kept if texts[int(i)].is_valid)
        segments = [Segment(name, value, (i,)) for i, value in enumerate(values)]
        if any(not texts[int(i)].is_valid for i in kept):
            segments.append(Segment(name, "missing", (len(values),)))
        alone = len(segments) < 2 and len(kept) == len(texts)
        return cls(name, (*values, "missing", "others"), () if alone else tuple(segments), None, tuple(values))

    def codes(self, column: pa.Array) -> Codes:
        """(n,) the base value of each row of a column, also of another log."""
        if self.edges is not None:
            values = column.to_numpy(zero_copy_only=False).astype(np.float64)
            found = np.searchsorted(np.asarray(self.edges), values, side="right")
            return np.where(np.isfinite(values), found, len(self.labels) - 1).astype(np.int64)
        texts, codes = text_codes(column)
        place = {value: i for i, value in enumerate(self.known)}
        missing, others = len(self.known), len(self.known) + 1
        of = [missing if t is None else place.get(t, others) for t in texts.to_pylist()]
        return np.array(of, dtype=np.int64)[codes] if of else codes

    @cached_property
    def membership(self) -> Floats:
        """(segments, base values) 1 where a base value is in a segment."""
        out = np.zeros((len(self.segments), len(self.labels)))
        for i, segment in enumerate(self.segments):
            out[i, list(segment.values)] = 1.0
        return out


@dataclass(frozen=True)
class Tag:
    """A tag value, or several that no shown variant carries apart: (dimension, value) each."""

    parts: tuple[tuple[str, str], ...]

    @property
    def names(self) -> dict[str, str]:
        """{dimension: value}; values of one dimension that never vary apart are joined by `|`."""
        out: dict[str, str] = {}
        for dimension, value in self.parts:
            out[dimension] = f"{out[dimension]}|{value}" if dimension in out else value
        return out

    @property
    def dimensions(self) -> frozenset[str]:
        """The dimensions it speaks about."""
        return frozenset(dimension for dimension, _ in self.parts)


@dataclass(frozen=True)
class Coded:
    """n coded exposures. F user fields, N variants, T tags, S strata."""

    fields: tuple[UserField, ...]
    codes: tuple[Codes, ...]  # F × (n,)
    tags: tuple[Tag, ...]
    carried: csr_array  # (N, T) 1 where a variant carries a tag
    variant: Codes  # (n,)
    stratum: Codes  # (n,) context × group × product × bucket
    strata: tuple[str, ...]  # (S,) names
    reward: Floats  # (n,)
    count: Floats  # (n,) identical, independent exposures
    weight: Floats  # (n,) what one of them counts: the log's weight × its correction by propensity; mean about 1
    unit: Codes | None  # (n,)
    weighted: bool  # whether weights differ
    clipped: float  # share of the exposures whose correction was clipped at MAX_WEIGHT
    uniform: Floats | None = None  # (n,) what one counts as if all variants were shown equally; None: as `weight`
    left_out: int = 0  # tag values that are not looked at, beyond MAX_VALUES of a dimension
    clipped_uniform: float = 0.0  # share of the exposures whose `uniform` was clipped,
    lost_uniform: float = 0.0  # and the share of all they would stand for that is lost by it: main effects lack it
    certain: float = 0.0  # exposures left out because nothing else could have been shown
    rows: Codes | None = None  # (n,) which of the log's rows these are; None: all of them
    held: tuple[Held, ...] = ()  # what strata and times do to tags and users, where there are signs of it

    def __len__(self) -> int:
        return len(self.variant)

    @property
    def size(self) -> Floats:
        """(n,) what a row counts: its exposures times their weight."""
        return self.count * self.weight

    @property
    def evenly(self) -> Coded:
        """The exposures as if all variants had been shown equally often, without users: for what everybody takes.

        Where one variant was shown more than others, its tags go together more than by design, and each would have
        the credit of the others.
        """
        weight = self.weight if self.uniform is None else self.uniform
        return replace(self, fields=(), codes=(), weight=weight, weighted=bool(np.ptp(weight) > 1e-9))

    @property
    def one_row_per_unit(self) -> bool:
        """Whether every exposure is a unit of its own."""
        return self.unit is None or (int(self.unit.max(initial=-1)) + 1 == len(self) and bool((self.count == 1).all()))

    def take(self, rows: NDArray[np.int64]) -> Coded:
        """Some of the rows; everything else as it was."""
        return replace(
            self,
            codes=tuple(c[rows] for c in self.codes),
            **{name: getattr(self, name)[rows] for name in ("variant", "stratum", "reward", "count", "weight")},
            unit=None if self.unit is None else densify(self.unit[rows]),
            uniform=None if self.uniform is None else self.uniform[rows],
            rows=None if self.rows is None else self.rows[rows],
            held=tuple(replace(held, codes=held.codes[rows]) for held in self.held),
        )


def code(log: Log, *, dependent: bool | None = None, fields: Sequence[UserField] | None = None) -> Coded:
    """The log as codes.

    `dependent`: whether exposure depended on the user, where `exposure_independence` was asked before; None asks it.
    `fields`: bins and vocabularies fitted before, so that the sums of several logs add up; None fits them.

    Rows that count nothing are left out, and a trace that was certain (`Coded.certain`): `Coded.rows` has the others.
    Raises LogError where exposure depended on the user with unknown propensities, or without a propensity floor.
    """
    rows = np.flatnonzero(log.weight > 0) if (log.weight == 0).any() else None
    log, certain = log if rows is None else log.take(rows), 0.0
    stratum, strata = _strata(log)
    drawn = uncertain(log, stratum)
    if drawn is not None:
        certain, rows = float(log.count[~drawn].sum()), np.flatnonzero(drawn) if rows is None else rows[drawn]
        log = log.take(drawn)
        stratum, strata = _strata(log)
    if fields is None:
        fields = [UserField.fit(name, log.columns[name], log.count) for name in log.schema.user]
    codes = tuple(field.codes(log.columns[field.name]) for field in fields)
    pairs = factorise(stratum * log.n_variants + log.variant)
    correction, clipped = _correction(log, stratum, pairs, dependent)
    if correction is not None:
        require_floor_of_users(log, stratum, strata, pairs, [(f.name, f.labels) for f in fields], codes)
    weight = _scaled(log, np.ones(len(log)) if correction is None else correction)
    uniform, clipped_uniform, lost_uniform = _inverse(log, stratum)
    tags, carried, left_out = _tags(log)
    coded = Coded(
        fields=tuple(fields),
        codes=codes,
        tags=tags,
        carried=carried,
        variant=log.variant,
        stratum=stratum,
        strata=strata,
        reward=log.reward.astype(np.float64),
        count=log.count,
        weight=weight,
        unit=log.unit,
        weighted=bool(np.ptp(weight) > 1e-9),
        clipped=clipped,
        uniform=None if uniform is None else _scaled(log, uniform),
        left_out=left_out,
        clipped_uniform=clipped_uniform,
        lost_uniform=lost_uniform,
        certain=certain,
        rows=rows,
    )
    return replace(coded, held=_held(log, coded))


def _held(log: Log, coded: Coded) -> tuple[Held, ...]:
    users = [(field.name, codes, len(field.labels)) for field, codes in zip(coded.fields, coded.codes, strict=True)]
    of: dict[frozenset[str], list[int]] = {}
    for i, tag in enumerate(coded.tags):
        of.setdefault(tag.dimensions, []).append(i)
    dimensions = [(" + ".join(sorted(d)), *patterns_of(coded.carried, t, coded.variant)) for d, t in of.items()]
    return strata_effects(log, users, dimensions, coded.size, coded.count * coded.weight**2) if users else ()


def require_units(log: Log) -> None:
    """Raise LogError for a log of fewer than MIN_UNITS units: what so few did says nothing of others."""
    counted = log.take(log.weight > 0) if (log.weight == 0).any() else log
    if log.unit is not None and counted.n_units < MIN_UNITS:
        raise LogError(
            f"{log.path}: {counted.n_units} unit{'s' * (counted.n_units != 1)} in all {len(log):,} exposures;"
            f" {MIN_UNITS} are needed to tell tastes from what a few people happened to do. If `unit` is not the user's"
            " id, name another column or leave it out."
        )


# ── strata and weights ──────────────────────────────────────────────────────────────────────────────────────────────


def _strata(log: Log) -> tuple[Codes, tuple[str, ...]]:
    """Context × group × product × bucket of each row, and a name of each that occurs (numbers of the context are cut).

    Buckets are drawn, so that within one of them nothing is lost; and each has a policy, hence weights, of its own.
    """
    parts: list[Codes] = [log.cells(log.schema.context)]
    parts += [codes for codes in (log.product, log.bucket) if codes is not None]
    stratum = combine(parts, len(log))
    first = np.zeros(int(stratum.max(initial=0)) + 1, np.int64)
    first[stratum[::-1]] = np.arange(len(log))[::-1]
    names: list[list[str]] = [[] for _ in first]
    if log.group is not None and log.groups is not None:
        names = [[str(log.groups[int(g)])] for g in log.group[first]]
    for column in log.schema.context:
        values = log.columns[column].take(pa.array(first)).to_pylist()
        names = [[*name, f"{column}={value}"] for name, value in zip(names, values, strict=True)]
    if log.product is not None and log.products is not None:
        names = [[*name, str(log.products[int(p)])] for name, p in zip(names, log.product[first], strict=True)]
    if log.bucket is not None and log.buckets is not None:
        names = [[*name, str(log.buckets[int(b)])] for name, b in zip(names, log.bucket[first], strict=True)]
    return stratum, tuple(" / ".join(name) for name in names)


def _correction(
    log: Log, stratum: Codes, pairs: tuple[Codes, Codes], dependent: bool | None
) -> tuple[Floats | None, float]:
    """(n,) q(variant | stratum) / propensity, so that within a stratum exposures count as if they had not looked at the
    user; at most MAX_WEIGHT; None where they had not. And the share that was clipped.

    q(v) ∝ 1 / E[1/P(v | user)] makes the variance of such weights the least possible: Σ q(v)² E[1/P(v | user)] is, for
    a given Σ q(v). It is what overlap weights (Li & Li 2019, doi:10.1214/19-AOAS1282) are to groups, and far from the
    shares that were shown (stabilised weights) where a model shows some variants to most and the rest by chance.
    """
    if log.propensity is None:
        if dependent is None:
            dependent = exposure_independence(log).dependent
        if dependent:
            raise LogError(
                f"{log.path}: what was shown depended on the user, and the log has no propensities. Whoever likes a"
                " variant and whoever was shown it cannot be told apart. Log P(variant | what was known) and name the"
                " column in `propensity`, or attribute a bucket that shows variants at random."
            )
        return None, 0.0
    known, pair = pairs
    low, high = np.full(len(known), np.inf), np.zeros(len(known))
    np.minimum.at(low, pair, log.propensity)
    np.maximum.at(high, pair, log.propensity)
    require_floor(log, stratum, np.bincount(known // log.n_variants))
    if (high <= low * CONSTANT).all() and len(known) < len(log):
        if exposure_independence(log).dependent if dependent is None else dependent:
            raise LogError(
                f"{log.path}: column {log.schema.propensity!r} says that a variant was as likely for everybody, and yet"
                " what was shown depended on the user. Log P(variant | what was known) of each choice, or attribute a"
                " bucket that shows variants at random."
            )
        return None, 0.0
    inverse = log.count / log.propensity
    share = sums(pair, inverse) / sums(pair, inverse / log.propensity)
    raw = share[pair] / log.propensity
    return np.minimum(raw, MAX_WEIGHT), float(log.count[raw > MAX_WEIGHT].sum() / log.count.sum())


def _inverse(log: Log, stratum: Codes) -> tuple[Floats | None, float, float]:
    """(n,) 1 / propensity, with a mean of 1 in each stratum, at most MAX_UNIFORM (Horvitz & Thompson 1952), None
    where it is not known; the share of the exposures that was clipped, and the share of the sum that is lost by it."""
    if log.propensity is None:
        return None, 0.0, 0.0
    inverse, total = 1 / log.propensity, log.count.sum()
    mean = sums(stratum, log.count * inverse) / sums(stratum, log.count)
    raw = inverse / mean[stratum]
    cut = np.minimum(raw, MAX_UNIFORM)
    return cut, float(log.count[raw > MAX_UNIFORM].sum() / total), float(log.count @ (raw - cut) / (log.count @ raw))


def _scaled(log: Log, correction: Floats) -> Floats:
    """(n,) weights of mean 1 per exposure; those of a bucket times Kish's ratio Σw / Σw²: buckets count by as many
    exposures as theirs are worth, or one with few and large weights would drown one that was drawn uniformly."""
    weight = log.weight * correction
    if log.bucket is not None:
        once, twice = sums(log.bucket, log.count * weight), sums(log.bucket, log.count * weight**2)
        weight = weight * np.divide(once, twice, out=np.ones_like(once), where=twice > 0)[log.bucket]
    return np.asarray(weight * (log.count.sum() / (log.count * weight).sum()))


# ── tags and values ─────────────────────────────────────────────────────────────────────────────────────────────────


def _tags(log: Log) -> tuple[tuple[Tag, ...], csr_array, int]:
    """The tags that vary among the variants shown, those that never vary apart as one, who carries them, and how many
    are left out: beyond the MAX_VALUES most shown of a dimension."""
    exposures, left_out = sums(log.variant, log.count, size=log.n_variants), 0
    shown = np.flatnonzero(exposures > 0)
    carriers: dict[bytes, list[tuple[str, str]]] = {}
    columns: dict[bytes, NDArray[np.int64]] = {}
    for dimension in log.schema.variant:
        owners: dict[str, list[int]] = {}
        for i, values in enumerate(log.variants[dimension].to_pylist()):
            for value in dict.fromkeys(values or ()):
                owners.setdefault(value, []).append(i)
        kept = sorted(owners, key=lambda value: (-exposures[owners[value]].sum(), value))[:MAX_VALUES]
        left_out += len(owners) - len(kept)
        for value in sorted(kept):
            column = np.array(owners[value], dtype=np.int64)
            seen = np.intersect1d(column, shown)
            if 0 < len(seen) < len(shown):
                carriers.setdefault(seen.tobytes(), []).append((dimension, value))
                columns.setdefault(seen.tobytes(), seen)
    tags = tuple(Tag(tuple(parts)) for parts in carriers.values())
    row = np.concatenate([columns[key] for key in carriers]) if carriers else np.zeros(0, np.int64)
    of = np.repeat(np.arange(len(carriers)), [len(columns[key]) for key in carriers])
    return tags, csr_array((np.ones(len(row)), (row, of)), shape=(log.n_variants, len(carriers))), left_out


def _edges(numbers: Floats) -> tuple[float, ...]:
    """Interior edges of at most BINS bins: every value of few is a bin, of many the quantiles part them."""
    distinct = np.unique(numbers)
    if len(distinct) <= BINS:
        return tuple(distinct[1:].tolist())
    quantiles = np.quantile(numbers, np.arange(1, BINS) / BINS, method="higher")
    return tuple(float(e) for e in np.unique(quantiles) if e > distinct[0])


def _texts(edges: Sequence[float]) -> tuple[str, ...]:
    """The edges with as few digits as tell them apart, at least six."""
    texts: tuple[str, ...] = ()
    for digits in range(6, 18):
        texts = tuple(f"{e:.{digits}g}" for e in edges)
        if len(set(texts)) == len(texts):
            break
    return texts


def _halvings(a: int, b: int) -> list[tuple[int, int]]:
    """Both halves of a range, then theirs, down to single bins."""
    if b - a < 2:
        return []
    middle = (a + b + 1) // 2
    return [(a, middle), (middle, b), *_halvings(a, middle), *_halvings(middle, b)]
