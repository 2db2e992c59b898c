"""All pairs of small codes as sums, by place and replicate: the arithmetic under the log as sums, and nothing else.

Instead of counting each pair of columns for itself, blocks of three or four columns are counted at once so that every
pair is in some block (a covering design), and the pairs are read off the blocks' margins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attribution.replicates import REPLICATES
from kaleidoscope.errors import LogError
from kaleidoscope.log import Codes, Floats, factorise

ITEMS = 1 << 17  # values, and combinations of tags, that a key has room for
PLACES = 1 << 22
MOST_CELLS = 20_000_000  # that are not empty: more are no use, and would not fit into memory
BLOCK = 1 << 19  # sums of a block, and rows whose keys are made at once: what stays in the cache of a core
CHUNK = 1 << 21  # cells, about, of the places that are counted at once
DENSE = 1 << 22  # sums of a pair that are counted in an array; beyond, by hashing

Small = NDArray[np.uint16]
Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Column:
    """A column of n codes; code k is item items[k]."""

    codes: Small
    items: Codes

    def dense(self) -> Column:
        """Without the codes that do not occur."""
        present = np.zeros(len(self.items), np.bool_)
        present[self.codes] = True
        if present.all():
            return self
        return Column((np.cumsum(present) - 1).astype(np.uint16)[self.codes], self.items[present])


@dataclass(frozen=True, eq=False)
class Batch:
    """n rows: columns of codes, where and by whom they were seen, whether clicked, and what each counts."""

    columns: Sequence[Column]
    place: Codes  # (n,) position in `places`
    places: Codes  # (P,)
    replicate: Small  # (n,)
    click: Small  # (n,) 0 or 1
    amounts: Sequence[Floats | None]  # (n,) each; None: one

    def sorted(self) -> Batch:
        """By place, so that a core works on the sums of one place at a time."""
        if (np.diff(self.place) >= 0).all():
            return self
        short = self.place.astype(np.uint16) if len(self.places) <= 1 << 16 else self.place
        order = np.argsort(short, kind="stable")  # of 16 bits by counting
        return self.take(order)

    def take(self, rows: Codes) -> Batch:
        """The batch of these rows (positions), in this order."""
        return Batch(
            [Column(c.codes[rows], c.items) for c in self.columns],
            self.place[rows],
            self.places,
            self.replicate[rows],
            self.click[rows],
            [None if a is None else a[rows] for a in self.amounts],
        )


@dataclass(eq=False)
class Totals:
    """Sums by key, in parts of a few places each: (K,) sorted keys, (K, 2 · amounts) sums and of them clicks.

    Batches in the order of time come to few places, and new ones: what is known of others is not touched for them.
    """

    amounts: int
    parts: dict[int, tuple[Codes, Floats]] = field(default_factory=dict)
    cells: int = 0

    def add(self, keys: Codes, sums: Floats) -> None:
        """Add sums of keys, that are sorted and differ."""
        part = keys // _PART
        starts = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist()] if len(keys) else []
        for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
            self._add(int(part[start]), keys[start:end], sums[start:end])

    def _add(self, part: int, keys: Codes, sums: Floats) -> None:
        known_keys, known_sums = self.parts.get(part, (keys[:0], sums[:0]))
        if np.array_equal(known_keys, keys):
            known_sums += sums
            return
        at = np.searchsorted(known_keys, keys)
        known = at < len(known_keys)
        known[known] = known_keys[at[known]] == keys[known]
        known_sums[at[known]] += sums[known]
        if known.all():
            return
        self.cells += int((~known).sum())
        require_room(self.cells)
        both = np.concatenate([known_keys, keys[~known]])
        order = np.argsort(both, kind="stable")
        self.parts[part] = both[order], np.concatenate([known_sums, sums[~known]])[order]

    def of_places(self) -> Iterator[tuple[int, Codes, Floats]]:
        """Every place, with its keys and sums."""
        for keys, sums in self.parts.values():
            place = keys // _PLACE
            starts = [0, *(np.flatnonzero(np.diff(place)) + 1).tolist()]
            for start, end in zip(starts, [*starts[1:], len(keys)], strict=True):
                yield int(place[start]), keys[start:end], sums[start:end]


def require_room(cells: int) -> None:
    """Raise LogError where there are more cells than are any use."""
    if cells > MOST_CELLS:
        raise LogError(
            f"The log has more than {MOST_CELLS:,} cells (replicates × strata × buckets × periods × pairs of values)."
            " Sum up without pairs, by week or month or none, or with fewer columns in the context."
        )


def pack(place: Codes, replicate: Codes, left: Codes, right: Codes) -> Codes:
    """One number of each cell."""
    return ((place * REPLICATES + replicate) * ITEMS + left) * ITEMS + right


def unpack(keys: Codes) -> tuple[Codes, Codes, Codes, Codes]:
    """Place, replicate, left and right item of keys."""
    rest, right = keys // ITEMS, keys % ITEMS
    rest, left = rest // ITEMS, rest % ITEMS
    return rest // REPLICATES, rest % REPLICATES, left, right


_PLACE = REPLICATES * ITEMS * ITEMS  # keys of a place
_PART = 4 * _PLACE


def tally(batch: Batch, pairs: Sequence[Pair]) -> list[tuple[Codes, Floats]]:
    """(K,) sorted keys and (K, 2 · amounts) sums of all cells of these pairs of columns that are not empty: of some
    places at a time, so that what is counted at once stays small."""
    batch = replace(batch, columns=[column.dense() for column in batch.columns]).sorted()
    sizes = [len(column.items) for column in batch.columns]
    rows = np.bincount(batch.place, minlength=len(batch.places))
    most = np.minimum(rows * len(pairs), REPLICATES * sum(sizes[a] * sizes[b] for a, b in pairs))  # cells of each place
    turn = (np.cumsum(most) - 1) // CHUNK
    first = np.flatnonzero(np.diff(turn, prepend=-1))
    ends = np.concatenate([[0], np.cumsum(rows)])
    out, size = [], 0
    for a, b in zip(first.tolist(), [*first[1:].tolist(), len(rows)], strict=True):
        if ends[a] == ends[b]:
            continue
        part = batch if (a, b) == (0, len(rows)) else batch.take(np.arange(ends[a], ends[b]))
        found = _tally(replace(part, place=part.place - a, places=batch.places[a:b]), pairs)
        size += len(found[0])
        require_room(size)
        out.append(found)
    return out


def _tally(batch: Batch, pairs: Sequence[Pair]) -> tuple[Codes, Floats]:
    """The same of all places at once, that the rows are sorted by."""
    sizes = tuple(len(column.items) for column in batch.columns)
    inner = len(batch.places) * 2 * REPLICATES
    found, size = [], 0
    for columns, wanted in cover(sizes, tuple(pairs), BLOCK // inner):
        for cells in _block(batch, sizes, columns, wanted, inner):
            found.append(cells)
            size += len(cells[0])
            require_room(size)
    keys, sums = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(keys)
    keys, sums = keys[order], sums[order]
    new = np.concatenate([[True], np.diff(keys) != 0]) if len(keys) else np.zeros(0, np.bool_)
    if new.all():
        return keys, sums
    return keys[new], np.add.reduceat(sums, np.flatnonzero(new), axis=0)  # items of a column may have the same name


@lru_cache(maxsize=64)
def cover(
    sizes: tuple[int, ...], pairs: tuple[Pair, ...], limit: int
) -> tuple[tuple[tuple[int, ...], tuple[Pair, ...]], ...]:
    """Blocks of columns with at most `limit` cells (a pair may have more), and of each the pairs that are read off it:
    every pair off one. Greedy: a block takes the column that covers most."""

    def cells(pair: Pair) -> int:
        return sizes[pair[0]] * sizes[pair[1]]

    left = dict.fromkeys(pairs)
    blocks: list[tuple[tuple[int, ...], tuple[Pair, ...]]] = []
    while left:
        largest = max(left, key=cells)
        block = list(largest)
        while True:
            gains = [
                (sum((min(c, b), max(c, b)) in left for b in block), sizes[c], c)
                for c in range(len(sizes))
                if c not in block and prod(sizes[b] for b in block) * sizes[c] <= limit
            ]
            best = max(gains, default=(0, 0, 0))
            if best[0] == 0:
                break
            block.append(best[2])
        block.sort()
        wanted = tuple((a, b) for i, a in enumerate(block) for b in block[i + 1 :] if (a, b) in left)
        left = {pair: None for pair in left if pair not in wanted}
        blocks.append((tuple(block), wanted))
    return tuple(blocks)


def _block(
    batch: Batch, sizes: tuple[int, ...], columns: tuple[int, ...], wanted: tuple[Pair, ...], inner: int
) -> Iterator[tuple[Codes, Floats]]:
    """Keys and sums of the cells of a block's pairs. A code is (cell, place, replicate, click), click innermost."""
    shape = [sizes[c] for c in columns]
    size = prod(shape) * inner
    rows = len(batch.click)
    step = BLOCK if size <= BLOCK else rows
    kind = np.uint16 if size <= 1 << 16 else np.uint32 if size <= 1 << 32 else np.uint64

    def codes(part: slice) -> Codes:
        key: NDArray[Any] = np.zeros(len(batch.click[part]), kind)
        for c in columns:
            key *= kind(sizes[c])
            key += batch.columns[c].codes[part].astype(kind, copy=False)
        key *= kind(inner)
        key += (batch.replicate[part] * np.uint16(2) + batch.click[part]).astype(kind, copy=False)
        if len(batch.places) > 1:
            key += (batch.place[part] * (2 * REPLICATES)).astype(kind)
        return key.astype(np.int64)

    if size > DENSE:
        yield _hashed(batch, codes(slice(None)), columns, sizes, inner)
        return
    tables = [np.zeros(size) for _ in batch.amounts]
    for start in range(0, rows, step):
        part = slice(start, start + step)
        key = codes(part)
        for table, amount in zip(tables, batch.amounts, strict=True):
            table += np.bincount(key, None if amount is None else amount[part], size)
    whole = np.stack(tables).reshape(-1, *shape, inner)
    margins: dict[tuple[int, ...], Floats] = {columns: whole}
    for a, b in wanted:
        kept = columns
        for c in reversed(columns):
            if c not in (a, b):
                fewer = tuple(k for k in kept if k != c)
                if fewer not in margins:
                    margins[fewer] = margins[kept].sum(axis=1 + kept.index(c))
                kept = fewer
        of_pair = margins[a, b].reshape(len(tables), -1, 2)
        counted = of_pair[0, :, 0] + of_pair[0, :, 1]
        cell = np.flatnonzero(counted)
        sums = np.stack([of_pair[:, cell, 0] + of_pair[:, cell, 1], of_pair[:, cell, 1]], axis=1)
        yield _keys(batch, a, b, cell, sizes[b], inner), sums.reshape(-1, len(cell)).T


def _hashed(
    batch: Batch, codes: Codes, columns: tuple[int, ...], sizes: tuple[int, ...], inner: int
) -> tuple[Codes, Floats]:
    """The same of a pair with too many cells for an array."""
    a, b = columns
    found, code = factorise(codes)
    cell, at = np.unique(found // 2, return_inverse=True)
    sums = []
    for amount in batch.amounts:
        total = np.bincount(code, amount, len(found))
        sums += [np.bincount(at, total), np.bincount(at, total * (found % 2))]
    return _keys(batch, a, b, cell, sizes[b], inner), np.stack(sums, axis=1)


def _keys(batch: Batch, a: int, b: int, cell: Codes, width: int, inner: int) -> Codes:
    pair, rest = cell // (inner // 2), cell % (inner // 2)
    left, right = batch.columns[a].items[pair // width], batch.columns[b].items[pair % width]
    return pack(batch.places[rest // REPLICATES], rest % REPLICATES, left, right)
