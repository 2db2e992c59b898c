"""A logistic model on codes: strata, user values, tags, and some segment × tag pairs, without a row-level matrix.

Everything the fit needs of n rows are sums by pairs of codes; strata are eliminated (a Schur complement), so that there
may be thousands of them. P is the number of columns for user values, what strata do to tags (`Coded.held`) and tags, S
strata, K pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse import csc_array, csr_array
from scipy.special import expit, logit

from attribution.coding import Coded
from kaleidoscope.log import Codes, Floats, sums

RIDGE = 1e-3  # as if each column had been seen so little more; keeps values without clicks finite
STRATA_RIDGE = 1.0  # prior precision of a stratum's logit: thousands of free ones would overstate the odds ratios
MAX_STEPS = 40
CONVERGED = 1e-3  # Newton decrement, in units of χ², after which one more step leaves nothing that matters
FASTER = 0.05  # a step with the old curvature has to bring the decrement down to this share; otherwise a new one
MOST_LOGIT = 15.0
MANY_PAIRS = 48
LEAST_DESIGN_EFFECT = 0.8  # of units: a smaller one is chance, or the work of a unit that has most of the rows
SLICE_ROWS = 20_000
DENSE = 4_000_000  # (code, variant) sums that are held densely


class Sums:
    """Sums over the rows of a coded log by codes and tags."""

    def __init__(self, coded: Coded) -> None:
        self.coded = coded
        self.codes = (*coded.codes, *(held.codes for held in coded.held))
        self.widths = [*(len(field.labels) for field in coded.fields), *(held.width for held in coded.held)]
        self.starts = np.concatenate([[0], np.cumsum(self.widths)]).astype(int)
        self.n_user = int(self.starts[-1])
        self.n_tags = len(coded.tags)
        self.n_columns = self.n_user + self.n_tags
        self.n_strata = len(coded.strata)
        self.n_variants = coded.carried.shape[0]
        self._carried = coded.carried.toarray() if coded.carried.shape[0] * self.n_tags <= DENSE else coded.carried

    def by_variant(self, code: Codes, size: int, amount: Floats, variant: Codes | None = None) -> Any:
        """(size, N) the sum of `amount` by a code and the variant; dense where that is small."""
        variant = self.coded.variant if variant is None else variant
        if size * self.n_variants <= DENSE:
            key = code * self.n_variants + variant
            return sums(key, amount, size=size * self.n_variants).reshape(size, self.n_variants)
        return csr_array((amount, (code, variant)), shape=(size, self.n_variants))

    def by_tag(self, code: Codes, size: int, amount: Floats, variant: Codes | None = None) -> Floats:
        """(size, T) the sum of `amount` by a code and the tags carried."""
        return _dense(self.by_variant(code, size, amount, variant) @ self._carried)

    def tags_by_tag(self, of_variant: Any) -> Floats:
        """(T, T) from a sum by variant (N,)."""
        if isinstance(self._carried, np.ndarray):
            return np.asarray(self._carried.T @ (of_variant[:, None] * self._carried))
        return _dense(self._carried.T @ (self._carried * of_variant[:, None]))

    def gradient(self, amount: Floats, rows: Any = slice(None)) -> tuple[Floats, Floats]:
        """(P,) and (S,) sums by column and stratum, of the `amount` of these rows."""
        coded = self.coded
        parts = [sums(c[rows], amount, size=w) for c, w in zip(self.codes, self.widths, strict=True)]
        parts.append(np.asarray(sums(coded.variant[rows], amount, size=self.n_variants) @ self._carried))
        return np.concatenate(parts), sums(coded.stratum[rows], amount, size=self.n_strata)

    def gram(self, amount: Floats) -> tuple[Floats, Floats, Floats]:
        """(P, P) columns by columns, (P, S) columns by strata, and (S,) strata."""
        coded, p = self.coded, self.n_columns
        out, cross = np.zeros((p, p)), np.zeros((p, self.n_strata))
        for i, codes in enumerate(self.codes):
            a = slice(self.starts[i], self.starts[i + 1])
            out[a, a] = np.diag(sums(codes, amount, size=self.widths[i]))
            for j in range(i):
                b, size = slice(self.starts[j], self.starts[j + 1]), self.widths[i] * self.widths[j]
                table = sums(codes * self.widths[j] + self.codes[j], amount, size=size)
                out[a, b] = table.reshape(self.widths[i], self.widths[j])
                out[b, a] = out[a, b].T
            out[a, self.n_user :] = self.by_tag(codes, self.widths[i], amount)
            out[self.n_user :, a] = out[a, self.n_user :].T
            key = codes * self.n_strata + coded.stratum
            cross[a] = sums(key, amount, size=self.widths[i] * self.n_strata).reshape(self.widths[i], -1)
        out[self.n_user :, self.n_user :] = self.tags_by_tag(sums(coded.variant, amount, size=self.n_variants))
        cross[self.n_user :] = self.by_tag(coded.stratum, self.n_strata, amount).T
        return out, cross, sums(coded.stratum, amount, size=self.n_strata)

    def linear(self, columns: Floats, strata: Floats) -> Floats:
        """(n,) the linear predictor of these coefficients; of (P, K) and (S, K) coefficients (n, K)."""
        out = strata[self.coded.stratum] + (self._carried @ columns[self.n_user :])[self.coded.variant]
        for i, codes in enumerate(self.codes):
            out += columns[self.starts[i] : self.starts[i + 1]][codes]
        return np.asarray(out)


def _dense(matrix: Any) -> Floats:
    return np.asarray(matrix.toarray() if hasattr(matrix, "toarray") else matrix)


@dataclass(frozen=True)
class Fit:
    """A fitted model: coefficients, fitted probabilities and the information of its columns."""

    columns: Floats  # (P,)
    strata: Floats  # (S,)
    pairs: Floats  # (K,)
    probability: Floats  # (n,)
    covariance: Floats  # (K, K) of `pairs`, by unit where units have several rows or rows have weights


def fit(
    data: Sums,
    outcome: Floats,
    indicators: csc_array | None = None,
    start: Fit | None = None,
    offset: Floats | None = None,
) -> Fit:
    """The model of `outcome` (n,) in 0..1 with main effects, strata and the K pairs whose `indicators` (n, K) are 1
    where a row is of the segment and carries the tag; by Newton's method, from `start` if given. `offset` (n,) is what
    the logit is before any of it."""
    coded, size = data.coded, data.coded.size
    z = csc_array((len(coded), 0)) if indicators is None else indicators
    p, k = data.n_columns, z.shape[1]
    beta = np.zeros(p + k)
    mean = float((size * outcome).sum() / size.sum())
    centre = float(logit(min(max(mean, 1e-6), 1 - 1e-6))) if offset is None else 0.0
    strata = np.full(data.n_strata, centre)
    if start is not None:
        beta[:p], strata = start.columns, start.strata
        beta[p : p + min(k, len(start.pairs))] = start.pairs[:k]

    def probability(beta: Floats, strata: Floats) -> Floats:
        eta = data.linear(beta[:p], strata)
        if offset is not None:
            eta = eta + offset
        if k:
            eta = eta + z @ beta[p:]
        return np.asarray(expit(np.clip(eta, -MOST_LOGIT, MOST_LOGIT)))

    def deviance(q: Floats, beta: Floats, strata: Floats) -> float:
        log_p = outcome * np.log(q) + (1 - outcome) * np.log1p(-q)
        return float(-2 * (size @ log_p) + RIDGE * (beta @ beta) + STRATA_RIDGE * ((strata - centre) ** 2).sum())

    q = probability(beta, strata)
    before = deviance(q, beta, strata)
    curvature, last = None, np.inf
    for _ in range(MAX_STEPS):
        if curvature is None:
            curvature = _curvature(data, size * q * (1 - q), z)
        step, strata_step, decrement = _step(data, size * (outcome - q), z, beta, strata - centre, curvature)
        if decrement > FASTER * last:
            curvature, last = None, np.inf
            continue
        scale = 1.0
        while True:
            q_new = probability(beta + scale * step, strata + scale * strata_step)
            after = deviance(q_new, beta + scale * step, strata + scale * strata_step)
            if after <= before + 1e-9 * abs(before) or scale < 1e-3:
                break
            scale /= 2
        beta, strata, q, before = beta + scale * step, strata + scale * strata_step, q_new, after
        if decrement < CONVERGED:
            break
        last = decrement
    covariance = _covariance(data, outcome, q, z) if k else np.zeros((0, 0))
    return Fit(beta[:p], strata, beta[p:], q, covariance)


@dataclass(frozen=True)
class Projection:
    """What main effects and strata explain of other columns: (P + S) columns eliminated from any cross-products."""

    factor: Any
    cross: Floats  # (P, S) divided by the strata's weight
    strata: Floats  # (S,) weight, with its prior's

    @classmethod
    def of(cls, gram: tuple[Floats, Floats, Floats]) -> Projection:
        """The projection on the columns of a Gram matrix."""
        inner, cross, strata = gram
        strata = strata + STRATA_RIDGE
        scaled = cross / strata
        reduced = inner - scaled @ cross.T
        reduced[np.diag_indices_from(reduced)] += RIDGE + 1e-10 * np.trace(inner) / max(len(inner), 1)
        return cls(cho_factor(reduced) if len(reduced) else None, scaled, strata)

    def coefficients(self, columns: Floats, strata: Floats) -> tuple[Floats, Floats]:
        """(P, K) and (S, K): the regression of K columns, given products with columns (P, K) and strata (S, K)."""
        reduced = columns - self.cross @ strata
        found = cho_solve(self.factor, reduced) if self.factor is not None else reduced
        return found, strata / self.strata[:, None] - self.cross.T @ found


def _curvature(data: Sums, weight: Floats, z: csc_array) -> Projection:
    """The Hessian of main effects and pairs, with strata eliminated."""
    inner, cross, diagonal = data.gram(weight)
    if z.shape[1]:
        extra, extra_strata = products(data, z, weight)
        inner = np.block([[inner, extra], [extra.T, among(z, weight)]])
        cross = np.concatenate([cross, extra_strata.T])
    return Projection.of((inner, cross, diagonal))


def _step(
    data: Sums, residual: Floats, z: csc_array, beta: Floats, deviation: Floats, curvature: Projection
) -> tuple[Floats, Floats, float]:
    """A Newton step for columns and pairs, for strata, and the decrement."""
    columns, strata = data.gradient(residual)
    columns, strata = np.concatenate([columns, z.T @ residual]) - RIDGE * beta, strata - STRATA_RIDGE * deviation
    step, strata_step = curvature.coefficients(columns[:, None], strata[:, None])
    decrement = float(columns @ step[:, 0] + strata @ strata_step[:, 0])
    return step[:, 0], np.clip(strata_step[:, 0], -5, 5), decrement


def products(data: Sums, z: csc_array, weight: Floats) -> tuple[Floats, Floats]:
    """(P, K) and (S, K): weighted products of main-effect columns and strata with the pairs' indicators."""
    columns, strata = np.empty((data.n_columns, z.shape[1])), np.empty((data.n_strata, z.shape[1]))
    for j in range(z.shape[1]):
        rows = z.indices[z.indptr[j] : z.indptr[j + 1]]
        columns[:, j], strata[:, j] = data.gradient(weight[rows], rows)
    return columns, strata


def among(z: csc_array, weight: Floats) -> Floats:
    """(K, K) weighted products of the pairs' indicators with each other."""
    if z.shape[1] > MANY_PAIRS:  # most rows are of several pairs: dense, a slice at a time
        rows, out = z.tocsr(), np.zeros((z.shape[1], z.shape[1]), np.float64)
        for start in range(0, z.shape[0], SLICE_ROWS):
            part = rows[start : start + SLICE_ROWS].toarray().astype(np.float32)
            out += part.T @ (weight[start : start + SLICE_ROWS, None].astype(np.float32) * part)
        return out
    weighted = csc_array((weight[z.indices], z.indices, z.indptr), shape=z.shape)
    return np.asarray((z.T @ weighted).toarray())


def _covariance(data: Sums, outcome: Floats, q: Floats, z: csc_array) -> Floats:
    """The covariance of the pairs' coefficients: the inverse information, or the sandwich by unit."""
    coded = data.coded
    weight = coded.size * q * (1 - q)
    columns, strata = products(data, z, weight)
    a, b = Projection.of(data.gram(weight)).coefficients(columns, strata)
    information = among(z, weight) - columns.T @ a - strata.T @ b
    inverse = np.linalg.pinv(information, hermitian=True, rcond=1e-10)
    if coded.one_row_per_unit and not coded.weighted:
        return np.asarray(inverse)
    centred = z.toarray() - data.linear(a, b)  # (n, K) what main effects do not explain of the pairs
    return np.asarray(inverse @ meat(coded, centred, outcome - q) @ inverse)


def meat(coded: Coded, centred: Floats, residual: Floats) -> Floats:
    """(K, K) the variance of the scores Σ size·centred·residual, summed by unit (Liang & Zeger 1986).

    Not below LEAST_DESIGN_EFFECT times the variance by exposure: the score of a unit that has most of the rows is about
    0 where the model is fitted, which looks as if nothing varied.
    """
    by_row = coded.count * coded.weight**2
    if coded.unit is None:
        score = centred * residual[:, None]
        return np.asarray(score.T @ (by_row[:, None] * score))
    score = centred * (residual * coded.size)[:, None]
    n_units = int(coded.unit.max(initial=-1)) + 1
    by_unit = np.stack([sums(coded.unit, column, size=n_units) for column in score.T], axis=1)
    found = by_unit.T @ by_unit * (n_units / max(n_units - 1, 1))
    least = LEAST_DESIGN_EFFECT * ((by_row * residual**2) @ centred**2)
    wider = np.sqrt(np.maximum(least / np.maximum(np.diag(found), 1e-300), 1.0))
    return np.asarray(found * np.outer(wider, wider))
