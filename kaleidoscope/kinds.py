"""What users of each kind do with the values of a tag dimension, put together from what is known of groups of them.

Plain numbers in and out: portrait_design.py reads them off a portrait. Axis letters: G groupings of the users, each of
A parts; K kinds, the combinations of their parts; T values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_KINDS = 1_024  # beyond, as many are drawn from the combinations
LEAST = 1e-9  # of a share or a rate: a logit has to be a number
ROUNDS, CLOSE = 200, 1e-9
MOST_STEP = 2.0  # of a logit, in a round


@dataclass(frozen=True, eq=False)
class Grouping:
    """A partition of the users into A parts, and what insights say of them."""

    share: Floats  # (A,) of all users
    lift: Floats  # (A,) click rate over everybody's
    liking: Floats  # (A, T) what insights add to the logit of a click


@dataclass(frozen=True, eq=False)
class Kinds:
    """Click rates of K kinds of users with each of T values, as if every variant had been shown to everybody alike."""

    share: Floats  # (K,) of the users
    part: NDArray[np.int64]  # (G, K) of each grouping
    value_share: Floats  # (T,) of what is shown
    value_rate: Floats  # (T,) click rates of everybody
    groupings: tuple[Grouping, ...]
    of_parts: tuple[Floats, ...]  # G × (A,) logits
    of_values: Floats  # (T,)

    @classmethod
    def of(
        cls,
        value_share: Floats,
        value_rate: Floats,
        groupings: Sequence[Grouping],
        stated: Mapping[int, int] | None = None,
        joint: Mapping[tuple[int, int], Floats] | None = None,
    ) -> Kinds:
        """The kinds that have everybody's click rate with each value and each part's click rate over all values, and
        whose odds differ by what the insights say: logit = part of each grouping + value + insights.

        `joint`: (A, A) shares of the users by the parts of two groupings, of some pairs; others are as independent as
        these allow. Where there are too many combinations, some are drawn; those of the `stated` parts (grouping →
        part) are half of them.
        """
        rate = np.clip(value_rate, LEAST, 1 - LEAST)
        share, part = _combinations(groupings, stated or {})
        share = _raked(share, part, joint or {})
        zero = tuple(np.zeros(len(g.share)) for g in groupings)
        start = cls(share, part, value_share / value_share.sum(), rate, tuple(groupings), zero, _logit(rate))
        return start._fitted()

    @cached_property
    def rate(self) -> Floats:
        """(K, T) the click rate of each kind with each value."""
        logit = np.tile(self.of_values, (len(self.share), 1))
        for grouping, own, part in zip(self.groupings, self.of_parts, self.part, strict=True):
            logit = logit + own[part, None] + grouping.liking[part]
        return np.asarray(1 / (1 + np.exp(-np.clip(logit, -50, 50))))

    def beside_average(self, value: int, stated: Mapping[int, int]) -> float:
        """How much higher the log-odds ratio of a click with a value over the others is for users of the stated parts
        than for everybody; what is not stated is averaged over."""
        rows = np.ones(len(self.share), bool)
        for grouping, part in stated.items():
            rows &= self.part[grouping] == part
        of_users = self._log_odds_ratio(value, np.where(rows, self.share, 0.0))
        return of_users - self._log_odds_ratio(value, self.share)

    def _log_odds_ratio(self, value: int, share: Floats) -> float:
        rates = np.clip(share @ self.rate / share.sum(), LEAST, 1 - LEAST)
        others = np.where(np.arange(len(rates)) == value, 0.0, self.value_share)
        if not others.any():
            return 0.0
        return float(_logit(rates[value]) - _logit(others @ rates / others.sum()))

    def where(self, grouping: int, liking: Floats) -> Kinds:
        """Were these the insights (A, T) of a grouping."""
        groupings = list(self.groupings)
        groupings[grouping] = replace(groupings[grouping], liking=liking)
        return replace(self, groupings=tuple(groupings))._fitted()

    def _fitted(self) -> Kinds:
        """Both sets of margins met, one after the other (iterative proportional fitting, in logits)."""
        now, everybody = self, float(self.value_share @ self.value_rate)
        for _ in range(ROUNDS):
            step = _step(now.value_rate, now.share @ now.rate)
            largest = float(np.abs(step).max())
            now = replace(now, of_values=now.of_values + step)
            for g, grouping in enumerate(now.groupings):
                size = np.bincount(now.part[g], now.share, minlength=len(grouping.share))
                clicks = np.bincount(now.part[g], now.share * (now.rate @ now.value_share), minlength=len(size))
                there = size > 0
                step = np.zeros(len(size))
                step[there] = _step(everybody * grouping.lift[there], clicks[there] / size[there])
                largest = max(largest, float(np.abs(step).max()))
                of_parts = (*now.of_parts[:g], now.of_parts[g] + step, *now.of_parts[g + 1 :])
                now = replace(now, of_parts=of_parts)
            if largest < CLOSE:
                break
        return now


def _step(wanted: Floats, found: Floats) -> Floats:
    step = _logit(np.clip(wanted, LEAST, 1 - LEAST)) - _logit(np.clip(found, LEAST, 1 - LEAST))
    return np.clip(step, -MOST_STEP, MOST_STEP)


def _logit(rate: Floats) -> Floats:
    return np.asarray(np.log(rate) - np.log1p(-rate))


def _raked(share: Floats, part: NDArray[np.int64], joint: Mapping[tuple[int, int], Floats]) -> Floats:
    """(K,) shares nearest to the given ones that have these tables (Deming & Stephan 1940)."""
    places = {pair: np.ravel_multi_index((part[pair[0]], part[pair[1]]), table.shape) for pair, table in joint.items()}
    for _ in range(ROUNDS):
        furthest = 0.0
        for pair, table in joint.items():
            wanted, at = np.maximum(table, LEAST).ravel(), places[pair]
            found = np.bincount(at, share, minlength=wanted.size)
            furthest = max(furthest, float(np.abs(wanted - found).max()))
            share = share * np.divide(wanted, found, out=np.zeros(wanted.size), where=found > 0)[at]
        if furthest < LEAST:
            break
    return np.asarray(share / share.sum())


def _combinations(groupings: Sequence[Grouping], stated: Mapping[int, int]) -> tuple[Floats, NDArray[np.int64]]:
    """(K,) shares of the kinds and (G, K) their parts."""
    sizes = [len(g.share) for g in groupings]
    if math.prod(sizes) <= MOST_KINDS:
        part = np.indices(sizes).reshape(len(sizes), -1) if sizes else np.zeros((0, 1), np.int64)
        shares = [g.share[of] for g, of in zip(groupings, part, strict=True)]
        return np.asarray(np.prod(shares, axis=0) if shares else np.ones(1)), part
    rng = np.random.default_rng(0)
    chosen = [rng.choice(size, MOST_KINDS, p=g.share / g.share.sum()) for size, g in zip(sizes, groupings, strict=True)]
    part = np.stack(chosen)
    told, untold = float(np.prod([groupings[g].share[a] for g, a in stated.items()])), MOST_KINDS // 2
    for g, a in stated.items():
        part[g, untold:] = a
    inside = np.logical_and.reduce([part[g] == a for g, a in stated.items()]) if stated else np.zeros(MOST_KINDS, bool)
    share = np.full(MOST_KINDS, 1 / MOST_KINDS)
    if stated:
        share = np.where(inside, told / inside.sum(), (1 - told) / max(int((~inside).sum()), 1))
    return share, part
