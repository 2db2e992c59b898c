"""The log as sums: what was shown to whom and clicked, by stratum, bucket, period, user value, tag and replicate.

Shards, days and scenes merge: `a + b` is what one pass over both would have given. The 64 replicates part the units, so
that errors by unit are there without the units (delete-a-group jackknife, Kott 2001). `Cells.of` sums up a log in
memory, `streaming.stream` one that need not fit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats
from scipy.sparse import csr_array, hstack

from attribution.coding import Coded, Segment, UserField
from attribution.logistic import LEAST_DESIGN_EFFECT
from attribution.replicates import REPLICATES, mix
from kaleidoscope.errors import InputError
from kaleidoscope.files import replacing
from kaleidoscope.log import Codes, Floats, factorise, sums

EVERYONE = ("", "")  # the user value of a cell that all users are in
ANYTHING: tuple[tuple[str, str], ...] = ()  # the tag of a cell that all variants are in
SUMS = ("n", "clicks", "weight", "weighted_clicks", "squared_weight", "squared_weight_clicks")
VERSION = 1  # of the file
_METADATA = b"kaleidoscope.cells"


@dataclass(frozen=True)
class Definitions:
    """What has to be the same for sums to add, fitted once.

    An exposure counts its row weight × `row_scale`, times `inverse_scale` / propensity (at most coding.MAX_WEIGHT);
    None: the log names no weights, or no propensities. `stabilised`: exposures count as `coding.code` weighs them.
    """

    fields: tuple[UserField, ...]
    context: tuple[UserField, ...] = ()  # numbers of the context, cut into ranges; texts are strata as they are
    row_scale: float | None = None
    inverse_scale: float | None = None
    stabilised: bool = False
    period: str | None = None
    pairs: bool = False  # whether pairs are summed up too

    @property
    def weighted(self) -> bool:
        """Whether exposures count differently."""
        return self.stabilised or self.row_scale is not None or self.inverse_scale is not None

    def difference(self, other: Definitions) -> str | None:
        """What is not the same, in words; None where sums add."""
        for what, ours, theirs in (
            ("user fields", self.fields, other.fields),
            ("numbers of the context", self.context, other.context),
        ):
            if [f.name for f in ours] != [f.name for f in theirs]:
                return f"the {what} are {[f.name for f in ours]} here and {[f.name for f in theirs]} there"
            for a, b in zip(ours, theirs, strict=True):
                if (a.edges, a.known) != (b.edges, b.known):
                    numbers = (list(f.known if f.edges is None else f.edges) for f in (a, b))
                    return f"the bins of {a.name!r} are {' here and '.join(map(str, numbers))} there"
        if self.stabilised != other.stabilised:
            return "exposures were weighted in different ways"
        if (self.row_scale, self.inverse_scale) != (other.row_scale, other.inverse_scale):
            return "exposures were weighted on different scales"
        if self.period != other.period:
            return f"the periods are {self.period!r} here and {other.period!r} there"
        if self.pairs != other.pairs:
            return "only one of them has sums of pairs"
        return None

    @classmethod
    def of_json(cls, raw: dict[str, Any]) -> Definitions:
        """What `asdict` turned into JSON."""

        def of(f: dict[str, Any]) -> UserField:
            segments = tuple(Segment(s["field"], s["label"], tuple(s["values"])) for s in f["segments"])
            edges = None if f["edges"] is None else tuple(f["edges"])
            return UserField(f["name"], tuple(f["labels"]), segments, edges, tuple(f["known"]))

        fields = {key: tuple(of(f) for f in raw[key]) for key in ("fields", "context")}
        return cls(**{**raw, **fields})


CODES = ("stratum", "bucket", "period", "replicate", "first", "second")


@dataclass(frozen=True, eq=False)
class Table:
    """K cells that are not empty."""

    codes: Codes  # (6, K) named in CODES: positions in the names of the cells, and replicates 0..63
    sums: Floats  # (K, 6) named in SUMS

    @classmethod
    def of(cls, codes: Codes, totals: Floats) -> Table:
        """Of rows with these codes: sorted, and those of the same codes added up."""
        if not len(totals):
            return cls(codes, totals)
        sizes = (codes.max(axis=1) + 1).tolist()
        if prod(sizes) < 1 << 62:  # one number of each row: sorted several times as fast as by six
            key = np.ravel_multi_index(tuple(codes), tuple(sizes))
            order = np.argsort(key, kind="stable")
            new = np.concatenate([[True], np.diff(key[order]) != 0])
        else:
            order = np.lexsort(codes[::-1])
            new = np.concatenate([[True], (np.diff(codes[:, order], axis=1) != 0).any(axis=0)])
        if new.all():
            return cls(codes[:, order], totals[order])
        return cls(codes[:, order[new]], np.add.reduceat(totals[order], np.flatnonzero(new), axis=0))

    @classmethod
    def below(cls, tables: Sequence[Table]) -> Table:
        """The tables one below the other, which are sorted and in order."""
        if len(tables) < 2:
            return tables[0] if tables else cls.none()
        return cls(np.concatenate([t.codes for t in tables], axis=1), np.concatenate([t.sums for t in tables]))

    @classmethod
    def none(cls) -> Table:
        """No cells."""
        return cls(np.zeros((len(CODES), 0), np.int64), np.zeros((0, len(SUMS))))

    def __len__(self) -> int:
        return len(self.sums)

    def __getitem__(self, name: str) -> Codes:
        """(K,) one of the CODES."""
        return np.asarray(self.codes[CODES.index(name)])

    def take(self, rows: NDArray[np.bool_]) -> Table:
        """Some of the cells."""
        return Table(self.codes[:, rows], self.sums[rows])

    def total(self, name: str, shape: tuple[int, int]) -> Floats:
        """(firsts, seconds) one of the SUMS, over strata, buckets, periods and replicates."""
        at = self["first"] * shape[1] + self["second"]
        return sums(at, self.sums[:, SUMS.index(name)], size=shape[0] * shape[1]).reshape(shape)


@dataclass(frozen=True, eq=False)
class Cells:
    """The sums of a log by user value × tag and, where they were asked for, by both kinds of pairs."""

    definitions: Definitions
    strata: tuple[str, ...]
    buckets: tuple[str, ...]  # "" where the log names none
    periods: tuple[str, ...]  # "" where it tells no time
    values: tuple[tuple[str, str], ...]  # (field, base value); EVERYONE first
    tags: tuple[tuple[tuple[str, str], ...], ...]  # (dimension, value) of each tag; ANYTHING first
    main: Table  # value × tag
    value_pairs: Table = field(default_factory=Table.none)  # of two fields, the earlier one first
    tag_pairs: Table = field(default_factory=Table.none)  # carried together, the earlier one first
    clipped: float = 0.0  # exposures whose correction by propensity was clipped
    days: tuple[str, ...] = ()  # of event logs that were summed up: `business/scene/2026-11-28`

    @classmethod
    def of(cls, coded: Coded, replicate: Codes | None = None) -> Cells:
        """The sums of coded exposures, by value × tag; `replicate` (n,) is hash(unit) % 64 where the caller has a hash
        that other shards share, otherwise units (without them exposures) are dealt by their number in this log."""
        if replicate is None:
            coded, replicate = dealt(coded)
        every = csr_array(np.ones((coded.carried.shape[0], 1)))
        carried = csr_array(hstack([every, coded.carried], format="csr"))
        place = coded.stratum * REPLICATES + replicate
        parts, start = [_sums(coded, place, np.zeros(len(coded), np.int64), 1, carried, 0)], 1
        for codes, f in zip(coded.codes, coded.fields, strict=True):
            parts.append(_sums(coded, place, codes, len(f.labels), carried, start))
            start += len(f.labels)
        place, value, tag, totals = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        one = np.zeros(len(place), np.int64)
        return cls(
            definitions=Definitions(coded.fields, stabilised=coded.weighted),
            strata=coded.strata,
            buckets=("",),
            periods=("",),
            values=values_of(coded.fields),
            tags=(ANYTHING, *(tag.parts for tag in coded.tags)),
            main=Table(np.stack([place // REPLICATES, one, one, place % REPLICATES, value, tag]), totals),
            clipped=coded.clipped * float(coded.count.sum()),
        )

    def __add__(self, other: Cells) -> Cells:
        """The cells of both logs. Strata, buckets, periods and tags of either may be missing in the other.

        Raises InputError where bins, or what an exposure counts, are not the same: such sums do not add; and where a
        day is in both, whose exposures would count twice.
        """
        twice = sorted(set(self.days) & set(other.days))
        if twice:
            raise InputError(
                f"These cells cannot be added: {', '.join(twice[:3])}{', …' if len(twice) > 3 else ''}"
                f" {'is' if len(twice) == 1 else 'are'} in both, and would count twice. Leave these days out of one."
            )
        difference = self.definitions.difference(other.definitions)
        if difference is not None:
            raise InputError(
                f"These cells cannot be added: {difference}. Sums add where they mean the same: make the later cells"
                " with the definitions of the first, `stream(log, schema, definitions=first.definitions)`."
            )
        names = {key: _union(getattr(self, key), getattr(other, key)) for key in _NAMES}

        def both(table: str) -> Table:
            codes, totals = [], []
            for cells in (self, other):
                of: Table = getattr(cells, table)
                renamed = of.codes.copy()
                for i, key in enumerate(_NAMED_BY[table]):
                    if key is not None:
                        renamed[i] = _places(getattr(cells, key), names[key])[of.codes[i]]
                if table != "main":  # the earlier one first, also among the names of both
                    renamed[4:].sort(axis=0)
                codes.append(renamed)
                totals.append(of.sums)
            return Table.of(np.concatenate(codes, axis=1), np.concatenate(totals))

        return Cells(
            definitions=self.definitions,
            strata=names["strata"],
            buckets=names["buckets"],
            periods=names["periods"],
            values=names["values"],
            tags=names["tags"],
            main=both("main"),
            value_pairs=both("value_pairs"),
            tag_pairs=both("tag_pairs"),
            clipped=self.clipped + other.clipped,
            days=tuple(sorted({*self.days, *other.days})),
        )

    def __len__(self) -> int:
        return len(self.main)

    @property
    def stratum(self) -> Codes:
        """(K,) of the cells of value × tag."""
        return self.main["stratum"]

    @property
    def replicate(self) -> Codes:
        """(K,) of the cells of value × tag."""
        return self.main["replicate"]

    @property
    def value(self) -> Codes:
        """(K,) of the cells of value × tag."""
        return self.main["first"]

    @property
    def tag(self) -> Codes:
        """(K,) of the cells of value × tag."""
        return self.main["second"]

    @property
    def sums(self) -> Floats:
        """(K, 6) of the cells of value × tag, named in SUMS."""
        return self.main.sums

    @property
    def effective_share(self) -> float | None:
        """Kish's effective number of exposures, of all; None without exposures."""
        n, weight, squared = (self.table(name)[0, 0] for name in ("n", "weight", "squared_weight"))
        return float(weight**2 / squared / n) if squared > 0 else None

    def by_bucket(self) -> dict[str, Cells]:
        """The cells of each bucket."""
        return {name: self._where("bucket", i) for i, name in enumerate(self.buckets)}

    def by_period(self) -> dict[str, Cells]:
        """The cells of each period."""
        return {name: self._where("period", i) for i, name in enumerate(self.periods)}

    def _where(self, column: str, position: int) -> Cells:
        """Some of the cells. All names stay, so that tables of the parts have the same shape; how many of the part's
        exposures were clipped is not known."""
        kept: dict[str, Any] = {t: (of := getattr(self, t)).take(of[column] == position) for t in _NAMED_BY}
        return replace(self, **kept, clipped=np.nan)

    def ctr(self, *, weighted: bool = True) -> tuple[Floats, Floats]:
        """(values, tags) the CTR over all strata, NaN where nothing was shown, and its standard error by unit.

        Weighted it is of tags shown to everybody alike; unweighted it is what was clicked of what was shown, as whoever
        compares buckets wants to know.
        """
        shown = SUMS.index("weight") if weighted else SUMS.index("n")
        return self.jackknife(lambda total: _ratio(total[..., shown + 1], total[..., shown]))

    def jackknife(self, statistic: Callable[[Floats], Floats]) -> tuple[Floats, Floats]:
        """A statistic of the sums (values, tags, 6) over all strata, and its standard error by unit: the spread of the
        64 estimates without one of the replicates (delete-a-group jackknife, Kott 2001; 63 degrees of freedom)."""
        shape = (len(self.values), len(self.tags))

        def total(cells: Table) -> Floats:
            return np.stack([cells.total(name, shape) for name in SUMS], axis=-1)

        whole = total(self.main)
        without = [statistic(whole - total(self.main.take(self.replicate == r))) for r in range(REPLICATES)]
        spread = ((np.stack(without) - np.mean(without, axis=0)) ** 2).sum(axis=0)
        return statistic(whole), np.asarray(np.sqrt((REPLICATES - 1) / REPLICATES * spread))

    def save(self, path: Path | str, *, overwrite: bool = True) -> None:
        """Write the cells to one Parquet file, with all names as text. What is there stays until it is whole; unless
        `overwrite`, raises FileExistsError where there is something."""
        path = Path(path)
        parts = []
        for name, named_by in _NAMED_BY.items():
            of: Table = getattr(self, name)
            columns = {"cells": pa.DictionaryArray.from_arrays(np.zeros(len(of), np.int32), [name])}
            for column, key, codes in zip(CODES, named_by, of.codes.astype(np.int32), strict=True):
                texts = None if key is None else pa.array([_text(n) for n in getattr(self, key)], pa.string())
                columns[column] = pa.array(codes) if texts is None else pa.DictionaryArray.from_arrays(codes, texts)
            parts.append(pa.table({**columns, **dict(zip(SUMS, map(pa.array, of.sums.T), strict=True))}))
        about = {key: getattr(self, key) for key in (*_NAMES, "clipped", "days")}
        about |= {"version": VERSION, "definitions": asdict(self.definitions)}
        whole = pa.concat_tables(parts).unify_dictionaries()
        whole = whole.replace_schema_metadata({_METADATA: json.dumps(about)})
        with replacing(path) as new:
            pq.write_table(whole, new, compression="zstd", write_page_checksum=True)
            if not overwrite:
                path.open("xb").close()  # nobody else's, from now on

    @classmethod
    def load(cls, path: Path | str) -> Cells:
        """The cells in a file that `save` wrote; raises InputError where it is damaged, or of something else."""
        try:
            whole = pq.read_table(path, page_checksum_verification=True)
            text = (whole.schema.metadata or {}).get(_METADATA)
            about = None if text is None else json.loads(text)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read: {error}. Copy the file again, or make the cells anew."
            ) from error
        if about is None:
            raise InputError(f"{path}: holds no cells. Name a file that `kaleidoscope cells build` wrote.")
        if about["version"] != VERSION:
            raise InputError(
                f"{path}: was written in version {about['version']} of the format, and this is version {VERSION}."
                " Make the cells anew from the log."
            )
        strata, buckets, periods = (tuple(about[key]) for key in _NAMES[:3])
        values = tuple((f, v) for f, v in about["values"])
        tags = tuple(tuple((d, v) for d, v in parts) for parts in about["tags"])
        of_names = (strata, buckets, periods, values, tags)
        names: dict[str | None, tuple[Any, ...]] = dict(zip(_NAMES, of_names, strict=True))
        kind = _codes_of(whole["cells"], list(_NAMED_BY))
        tables = []
        for i, named_by in enumerate(_NAMED_BY.values()):
            rows = whole.filter(pa.array(kind == i))
            codes = [
                rows[column].to_numpy() if key is None else _codes_of(rows[column], [_text(n) for n in names[key]])
                for column, key in zip(CODES, named_by, strict=True)
            ]
            tables.append(Table(np.stack(codes).astype(np.int64), np.stack([rows[n].to_numpy() for n in SUMS], axis=1)))
        definitions = Definitions.of_json(about["definitions"])
        main, value_pairs, tag_pairs = tables
        days = tuple(about.get("days", ()))
        return cls(definitions, *of_names, main, value_pairs, tag_pairs, clipped=about["clipped"], days=days)

    def table(self, name: str = "weighted_clicks") -> Floats:
        """(values, tags) one of the SUMS, over everything else."""
        return self.main.total(name, (len(self.values), len(self.tags)))

    def value_pair_table(self, name: str = "n") -> Floats:
        """(values, values) one of the SUMS of users with both values, in both orders; the diagonal is of each alone."""
        return self._pair_table(self.value_pairs, name, self.table(name)[:, 0])

    def tag_pair_table(self, name: str = "n") -> Floats:
        """(tags, tags) one of the SUMS of variants with both tags, in both orders; the diagonal is of each alone."""
        return self._pair_table(self.tag_pairs, name, self.table(name)[0])

    def _pair_table(self, pairs: Table, name: str, alone: Floats) -> Floats:
        table = pairs.total(name, (len(alone), len(alone)))
        table = table + table.T + np.diag(alone)
        table[0, :] = table[:, 0] = alone
        return table

    def by_stratum(self, name: str, value: NDArray[Any] | None = None) -> Floats:
        """(strata, tags) one of the SUMS of the users with one of these base values (positions), by default of all."""
        rows = np.flatnonzero(self.value == 0 if value is None else np.isin(self.value, value))
        shape = (len(self.strata), len(self.tags))
        key = self.stratum[rows] * shape[1] + self.tag[rows]
        totals = sums(key, self.sums[rows, SUMS.index(name)], size=shape[0] * shape[1])
        return np.asarray(totals.reshape(shape))

    def preference(self, value: NDArray[Any]) -> Floats:
        """(tags,) [CTR(tag, segment) / CTR(segment)] / [CTR(tag) / CTR] of the segment of these base values, each ratio
        observed over expected within strata (indirect standardisation); NaN where a tag has no clicks."""

        def ratio(value: NDArray[Any] | None) -> Floats:
            shown, clicks = self.by_stratum("weight", value), self.by_stratum("weighted_clicks", value)
            rate = np.divide(clicks[:, 0], shown[:, 0], out=np.zeros(len(shown)), where=shown[:, 0] > 0)
            expected = rate @ shown
            return _ratio(clicks.sum(axis=0), expected)

        return _ratio(ratio(value), ratio(None))

    def log_ratios(self) -> tuple[Floats, Floats]:
        """(tags,) the logarithm of the Mantel–Haenszel ratio of CTRs, with the tag over without it, within strata, and
        its standard error by unit; NaN where it cannot be known. The first, of ANYTHING, always is.

        The error's square is at least LEAST_DESIGN_EFFECT times that by exposure (Greenland & Robins 1985): of a few
        units, or one that has most of the exposures, replicates hardly vary."""
        every = np.flatnonzero(self.value == 0)
        place = (self.stratum * REPLICATES + self.replicate)[every]
        size = len(self.strata) * REPLICATES

        def with_tag(t: int, name: str) -> Floats:
            rows = self.tag[every] == t
            amount = self.sums[every[rows], SUMS.index(name)]
            return np.asarray(sums(place[rows], amount, size=size).reshape(-1, REPLICATES))

        all_shown, all_clicks = with_tag(0, "weight"), with_tag(0, "weighted_clicks")
        counted = float(
            with_tag(0, "squared_weight_clicks").sum() / max(all_clicks.sum(), 1e-12)
        )  # of a click's weight
        estimate, error = np.full(len(self.tags), np.nan), np.full(len(self.tags), np.nan)
        for t in range(1, len(self.tags)):
            shown, clicks = with_tag(t, "weight"), with_tag(t, "weighted_clicks")
            whole, without = _mantel_haenszel(shown, clicks, all_shown - shown, all_clicks - clicks)
            if np.isfinite(whole):
                estimate[t] = whole
                spread = without - without.mean()
                by_unit = (REPLICATES - 1) / REPLICATES * (spread**2).sum()
                by_exposure = _greenland_robins(*(x.sum(axis=1) for x in (shown, clicks, all_shown, all_clicks)))
                error[t] = np.sqrt(max(by_unit, LEAST_DESIGN_EFFECT * counted * by_exposure))
        return estimate, error


_NAMES = ("strata", "buckets", "periods", "values", "tags")
_PLACE = ("strata", "buckets", "periods", None)  # which names a code is a position in
_NAMED_BY: dict[str, tuple[str | None, ...]] = {
    "main": (*_PLACE, "values", "tags"),
    "value_pairs": (*_PLACE, "values", "values"),
    "tag_pairs": (*_PLACE, "tags", "tags"),
}


def values_of(fields: Sequence[UserField]) -> tuple[tuple[str, str], ...]:
    """The values of cells of these fields."""
    return (EVERYONE, *((f.name, label) for f in fields for label in f.labels))


def t_quantile(level: float) -> float:
    """How many standard errors from replicates a two-sided interval of this level reaches."""
    return float(stats.t.isf((1 - level) / 2, REPLICATES - 1))


def dealt(coded: Coded) -> tuple[Coded, Codes]:
    """The exposures and their replicates: all of a unit in one; without units exposures one by one, so that a row of
    many identical ones becomes several rows."""
    if coded.unit is not None:
        return coded, _hash(coded.unit) % REPLICATES
    replicate = _hash(np.arange(len(coded))) % REPLICATES
    many = coded.count > 1
    if not many.any():
        return coded, replicate
    share = np.zeros((len(coded), REPLICATES))
    share[np.flatnonzero(~many), replicate[~many]] = coded.count[~many]
    rng = np.random.default_rng(0)
    share[many] = rng.multinomial(coded.count[many].astype(np.int64), np.full(REPLICATES, 1 / REPLICATES))
    row, replicate = np.nonzero(share)
    return replace(coded.take(row), count=share[row, replicate]), replicate


def _hash(codes: Codes) -> Codes:
    return (mix(codes.astype(np.uint64)) >> np.uint64(1)).astype(np.int64)


def _sums(
    coded: Coded, place: Codes, codes: Codes, width: int, carried: csr_array, start: int
) -> tuple[Codes, Codes, Codes, Floats]:
    """Place, value, tag and the six sums of the cells of one field that are not empty."""
    keys, row = factorise(place * width + codes)
    shape = (len(keys), carried.shape[0])

    def total(amount: Floats) -> Any:
        return csr_array((amount, (row, coded.variant)), shape=shape) @ carried

    n, clicks = total(coded.count), total(coded.count * coded.reward)
    columns = [n, clicks, n, clicks, n, clicks]
    if coded.weighted:
        once, twice = coded.size, coded.size * coded.weight
        columns[2:] = [total(a) for a in (once, once * coded.reward, twice, twice * coded.reward)]
    key, tag = n.nonzero()
    found = np.stack([np.asarray(column[key, tag]).ravel() for column in columns], axis=1)
    return keys[key] // width, keys[key] % width + start, tag.astype(np.int64), found


def _mantel_haenszel(shown: Floats, clicks: Floats, other: Floats, other_clicks: Floats) -> tuple[float, Floats]:
    """The log ratio from (strata, replicates) sums of those with and without a tag, and (replicates,) without each."""

    def log_ratio(without: int | None) -> float:
        n1, a, n0, b = (
            x.sum(axis=1) - (0 if without is None else x[:, without]) for x in (shown, clicks, other, other_clicks)
        )
        n = n1 + n0
        share = np.divide(1.0, n, out=np.zeros_like(n), where=n > 0)
        top, bottom = float((a * n0 * share).sum()), float((b * n1 * share).sum())
        return float(np.log(top / bottom)) if top > 0 and bottom > 0 else np.nan

    whole = log_ratio(None)
    if not np.isfinite(whole):
        return whole, np.full(REPLICATES, np.nan)
    return whole, np.array([log_ratio(r) for r in range(REPLICATES)])


def _greenland_robins(shown: Floats, clicks: Floats, all_shown: Floats, all_clicks: Floats) -> float:
    """The variance of the log Mantel–Haenszel ratio, from sums by stratum of those with a tag and of all; every
    exposure by itself (doi:10.2307/2530643)."""
    n1, a, n0, b, n = shown, clicks, all_shown - shown, all_clicks - clicks, np.where(all_shown > 0, all_shown, 1.0)
    left = ((n1 * n0 * (a + b) - a * b * n) / n**2).sum()
    return float(left / ((a * n0 / n).sum() * (b * n1 / n).sum()))


def _ratio(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.divide(a, b, out=np.full(b.shape, np.nan), where=b > 0))


def _union(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...]:
    """The names of both; sorted, so that it does not matter what was added first."""
    return a if a == b else tuple(sorted({*a, *b}))


def _places(names: tuple[Any, ...], among: tuple[Any, ...]) -> Codes:
    at = {name: i for i, name in enumerate(among)}
    return np.array([at[name] for name in names], dtype=np.int64)


def _text(name: str | Sequence[Any]) -> str:
    """A name as files have it: `age=[18, 25)`, `tone=loud & style=real`. Different names have different texts."""
    if isinstance(name, str):
        return name
    if len(name) == 2 and isinstance(name[0], str):
        return "" if name == EVERYONE else "=".join(part.replace("\\", "\\\\").replace("=", "\\=") for part in name)
    return " & ".join(_text(part).replace("&", "\\&") for part in name)


def _codes_of(column: pa.ChunkedArray, texts: Sequence[str]) -> Codes:
    """(n,) the position among the texts of each entry of a text column."""
    column = column.unify_dictionaries().combine_chunks()
    if not len(column):
        return np.zeros(0, np.int64)
    at = {text: i for i, text in enumerate(texts)}
    place = np.array([at.get(text, -1) for text in column.dictionary.to_pylist()], dtype=np.int64)
    return np.asarray(place[column.indices.to_numpy()])
