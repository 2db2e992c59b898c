"""What strata and times do to tags, and to users: held in every model, where exposures show any of it.

A tag that one product's customers take to, and another's do not, would pass for a taste of the first ones: who they are
differs. Strata as such (coding.py) shift everything alike, and cannot tell that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.sparse import csr_array
from scipy.special import expit

from kaleidoscope.log import Codes, Floats, Log, coarse_codes, factorise, sums

SUSPECTED = 0.25  # p-value up to which an effect of strata is held: what is missed is less than noise
LEVELS = 32  # of a source; rarer ones count as one
SLICES = 16  # of time, with as many exposures each
LEAST_ROWS = 200  # exposures of a cell, on average
MIXED = 0.02  # of the exposures, by which what levels show has to differ for their users to matter
MOST_CELLS = 400  # held at once; the surest first
STEPS = 12


@dataclass(frozen=True, eq=False)
class Held:
    """A free parameter for each of `width` cells: source × tag dimension, or source × user field."""

    name: str
    codes: Codes  # (n,)
    width: int


def strata_effects(
    log: Log, users: Sequence[tuple[str, Codes, int]], dimensions: Sequence[tuple[str, Codes, int]], size: Floats,
    square: Floats,
) -> tuple[Held, ...]:  # fmt: skip
    """What is to be held, of context columns, groups, products and slices of time.

    `users` and `dimensions`: name, codes (n,) and how many; `size` and `square` (n,): weight and squared weight of each
    row. A source × field is held only where what is shown differs between the levels of the source: otherwise what
    users do there has no part in tags.
    """
    found, reward = list[tuple[float, Held]](), log.reward.astype(np.float64)
    for source, level, levels in _sources(log):
        mixed = any(_mixed(level, levels, codes, width, size) > MIXED for _, codes, width in dimensions)
        for name, codes, width in (*dimensions, *(users if mixed else ())):
            cells = levels * width
            if cells * LEAST_ROWS > len(log):
                continue
            key = level * width + codes
            p = _interaction(key, levels, width, size, square, reward)
            if p <= SUSPECTED:
                found.append((p, Held(f"{source} × {name}", key, cells)))
    kept, room = list[Held](), MOST_CELLS
    for _, held in sorted(found, key=lambda one: one[0]):
        if held.width <= room:
            kept.append(held)
            room -= held.width
    return tuple(kept)


def patterns_of(carried: csr_array, tags: Sequence[int], variant: Codes) -> tuple[Codes, int]:
    """(n,) which set of these tags each exposure's variant carries, and how many sets there are."""
    rows, of_variant = np.unique(carried[:, list(tags)].toarray(), axis=0, return_inverse=True)
    return np.asarray(of_variant.ravel()[variant], np.int64), len(rows)


def _sources(log: Log) -> Iterator[tuple[str, Codes, int]]:
    for column in log.schema.context:
        yield column, *_levels(coarse_codes(log.columns[column], SLICES))
    for name, codes in (("group", log.group), ("product", log.product)):
        if codes is not None:
            yield name, *_levels(codes)
    if log.time is not None and np.isfinite(log.time).all():
        edges = np.unique(np.quantile(log.time, np.arange(1, SLICES) / SLICES))
        yield "time", np.searchsorted(edges, log.time, side="right").astype(np.int64), len(edges) + 1


def _levels(codes: Codes) -> tuple[Codes, int]:
    """Codes of the most frequent values, all others as one more."""
    values, dense = factorise(codes)
    if len(values) <= LEVELS:
        return dense, len(values)
    order = np.argsort(-np.bincount(dense), kind="stable")[: LEVELS - 1]
    place = np.full(len(values), LEVELS - 1)
    place[order] = np.arange(LEVELS - 1)
    return place[dense], LEVELS


def _mixed(level: Codes, levels: int, codes: Codes, width: int, size: Floats) -> float:
    """How far the shares of the codes in a level are from those of all, on average (total variation)."""
    table = sums(level * width + codes, size, size=levels * width).reshape(levels, width)
    of_level = table.sum(axis=1, keepdims=True)
    far = np.abs(table / np.maximum(of_level, 1e-12) - table.sum(axis=0) / table.sum()).sum(axis=1) / 2
    return float((far * of_level[:, 0]).sum() / table.sum())


def _interaction(key: Codes, levels: int, width: int, size: Floats, square: Floats, reward: Floats) -> float:
    """The p-value of clicks of levels × codes being those of an additive logit; 1 where there is nothing to compare."""
    n, clicks, spread = (
        sums(key, amount, size=levels * width).reshape(levels, width) for amount in (size, size * reward, square)
    )
    seen = n > 0
    free = int(seen.sum() - seen.any(axis=1).sum() - seen.any(axis=0).sum() + 1)
    if free < 1 or not 0 < clicks.sum() < n.sum():
        return 1.0
    row, column = np.full(levels, np.log(clicks.sum() / (n.sum() - clicks.sum()))), np.zeros(width)
    for _ in range(STEPS):  # Newton's steps for rows and columns in turn, with half a click drawn to no effect
        for axis, effect in ((1, row), (0, column)):
            p = expit(row[:, None] + column)
            effect += np.clip(
                (clicks - n * p).sum(axis=axis) / ((n * p * (1 - p)).sum(axis=axis) + 1e-9), -1.0, 1.0
            )  # fmt: skip
    p = expit(row[:, None] + column)
    variance = np.where(seen, spread * p * (1 - p), 1.0)
    statistic = float(np.where(seen, (clicks - n * p) ** 2 / np.maximum(variance, 1e-12), 0.0).sum())
    return float(stats.chi2.sf(statistic, free))
