"""How good predictions are. AUC and log loss are sums that add, so that shards and days merge exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
EPSILON = 1e-12


@dataclass(frozen=True)
class AucSums:
    """Weight of positives and negatives at each distinct score: enough for the exact AUC of any union of shards."""

    scores: Floats  # (k,) ascending, distinct
    positives: Floats  # (k,)
    negatives: Floats  # (k,)

    @classmethod
    def of(cls, score: Floats, reward: NDArray[np.floating], weight: NDArray[np.floating] | None = None) -> AucSums:
        """The sums of n scored exposures, with `reward` 0 or 1."""
        weight = np.ones(len(score)) if weight is None else weight
        scores, code = np.unique(np.asarray(score, dtype=np.float64), return_inverse=True)
        return cls(scores, _sums(code, weight * reward, len(scores)), _sums(code, weight * (1 - reward), len(scores)))

    def __add__(self, other: AucSums) -> AucSums:
        scores, code = np.unique(np.concatenate([self.scores, other.scores]), return_inverse=True)
        positives = _sums(code, np.concatenate([self.positives, other.positives]), len(scores))
        return AucSums(scores, positives, _sums(code, np.concatenate([self.negatives, other.negatives]), len(scores)))

    @property
    def value(self) -> float | None:
        """Chance that a random positive outscores a random negative, ties counting half; None without one of either."""
        total = self.positives.sum() * self.negatives.sum()
        if total <= 0:
            return None
        below = np.cumsum(self.negatives) - self.negatives
        return float((self.positives * (below + 0.5 * self.negatives)).sum() / total)


@dataclass(frozen=True)
class LogLossSums:
    """Log loss as a sum and the weight it is over."""

    total: float
    weight: float

    @classmethod
    def of(cls, p: Floats, reward: NDArray[np.floating], weight: NDArray[np.floating] | None = None) -> LogLossSums:
        """The sums of n predicted probabilities, with `reward` 0 or 1."""
        weight = np.ones(len(p)) if weight is None else weight
        p = np.clip(p, EPSILON, 1 - EPSILON)
        return cls(float(-(weight * np.where(reward > 0, np.log(p), np.log1p(-p))).sum()), float(weight.sum()))

    def __add__(self, other: LogLossSums) -> LogLossSums:
        return LogLossSums(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        """Nats per exposure."""
        return self.total / self.weight


@dataclass(frozen=True)
class Calibration:
    """Reliability curve: per bin of predictions, their mean, the observed rate and the weight."""

    predicted: Floats
    observed: Floats
    weight: Floats

    @property
    def error(self) -> float:
        """Expected calibration error: mean |observed − predicted| over exposures (Naeini et al. 2015)."""
        return float((self.weight * np.abs(self.observed - self.predicted)).sum() / self.weight.sum())


def calibration(
    p: Floats, reward: NDArray[np.floating], weight: NDArray[np.floating] | None = None, bins: int = 10
) -> Calibration:
    """The reliability curve over bins of about equal weight; equal predictions share a bin."""
    weight = np.ones(len(p)) if weight is None else np.asarray(weight, dtype=np.float64)
    distinct, tie = np.unique(p, return_inverse=True)
    tied = _sums(tie, weight, len(distinct))
    middle = (np.cumsum(tied) - 0.5 * tied) / tied.sum()
    code = np.minimum((middle * bins).astype(np.int64), bins - 1)[tie]
    mass = _sums(code, weight, bins)
    used = mass > 0
    predicted, observed = (_sums(code, weight * x, bins)[used] / mass[used] for x in (p, reward))
    return Calibration(predicted, observed, mass[used])


def grouped_auc(
    score: Floats, reward: NDArray[np.floating], unit: NDArray[np.int64], weight: NDArray[np.floating] | None = None
) -> float | None:
    """AUC within each user, weighted by the user's exposures (GAUC, Zhou et al. 2018).

    `unit` codes users from 0. None if no user has both outcomes.
    """
    weight = np.ones(len(score)) if weight is None else np.asarray(weight, dtype=np.float64)
    n_units = int(unit.max(initial=-1)) + 1
    positive, negative = np.bincount(unit, weight * reward, n_units), np.bincount(unit, weight * (1 - reward), n_units)
    rows = np.flatnonzero((positive > 0)[unit] & (negative > 0)[unit])
    if not len(rows):
        return None
    order = rows[np.lexsort((score[rows], unit[rows]))]
    u, s, w, y = unit[order], score[order], weight[order], np.asarray(reward)[order]
    tie = np.concatenate([[True], (u[1:] != u[:-1]) | (s[1:] != s[:-1])]).cumsum() - 1
    tied_negative, tied_positive = np.bincount(tie, w * (1 - y)), np.bincount(tie, w * y)
    owner = u[np.concatenate([[True], tie[1:] != tie[:-1]])]
    running = np.cumsum(tied_negative) - tied_negative
    first = np.concatenate([[True], owner[1:] != owner[:-1]])
    below = running - running[first][np.cumsum(first) - 1]
    wins = np.bincount(owner, tied_positive * (below + 0.5 * tied_negative), n_units)
    both = (positive > 0) & (negative > 0)
    exposures = (positive + negative)[both]
    return float((wins[both] / (positive * negative)[both] * exposures).sum() / exposures.sum())


def _sums(code: NDArray[np.int64], weight: NDArray[np.floating], size: int) -> Floats:
    return np.bincount(code, weight, size).astype(np.float64, copy=False)
