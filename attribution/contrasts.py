"""Statistics of buckets compared: ratios of rates within strata, their slopes, balance, the rating of variants.

Errors come from replicates: groups of units that are left out one at a time. Nothing here knows a log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.sparse import csr_array, hstack
from scipy.special import expit, logit

from kaleidoscope.log import Codes, Floats, factorise, sums

TAG_SDS = (0.01, 0.03, 0.1, 0.2, 0.4, 0.8)  # of tags' effects on the logit, that the rating of variants chooses from
LEAST_SPREAD, MOST_SPREAD = 1e-6, 0.25  # variance of the variants' ratios to what their tags promise


class Arms(NamedTuple):
    """Exposures and clicks of a bucket and of control, by stratum and replicate: (S, R) each."""

    n1: Floats
    c1: Floats
    n0: Floats
    c0: Floats

    def of(self, strata: NDArray[np.bool_]) -> Arms:
        """Some of the strata."""
        return Arms(*(x[strata] for x in self))

    def without_each(self) -> Arms:
        """(S, R + 1) all of it, and all but each replicate."""
        return Arms(*map(without_each, self))


def without_each(x: Floats) -> Floats:
    """(…, R + 1) the sum over replicates, and the sum without each."""
    total = x.sum(axis=-1, keepdims=True)
    return np.concatenate([total, total - x], axis=-1)


def jackknife_error(value: Floats) -> float:
    """The standard error of an estimate, given it with all units and without each of R groups of them: (1 + R,).

    Delete-a-group jackknife (Kott 2001, "The delete-a-group jackknife"), with R − 1 degrees of freedom.
    """
    parts, r = value[1:], len(value) - 1
    return float(np.sqrt((r - 1) / r * ((parts - parts.mean()) ** 2).sum()))


def mantel_haenszel(arms: Arms) -> Floats:
    """(1 + R,) the log ratio of rates within strata, with all units and without each replicate (Greenland & Robins
    1985, doi:10.2307/2530643); not finite where a bucket has no clicks."""
    n1, c1, n0, c0 = arms.without_each()
    with np.errstate(divide="ignore", invalid="ignore"):
        n = n1 + n0
        top, bottom = np.nan_to_num(c1 * n0 / n).sum(axis=0), np.nan_to_num(c0 * n1 / n).sum(axis=0)
        return np.asarray(np.log(top) - np.log(bottom))


def slopes(arms: Arms, at: Floats) -> Floats:
    """(1 + R,) the slope of the log ratio of rates along `at` (S,), with all units and without each replicate.

    Poisson regression with an intercept per stratum, conditional on the stratum's clicks: then a click is the bucket's
    with probability n₁e^{β+γt} / (n₁e^{β+γt} + n₀) (McCullagh & Nelder 1989, section 6.4). It uses strata with single
    clicks, and no weights that depend on how many there were.
    """
    n1, c1, n0, c0 = (np.maximum(x, 0.0) for x in arms.without_each())
    clicks = c1 + c0
    t = (at - np.average(at, weights=clicks[:, 0]))[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = np.clip(np.log(n1 / n0), -30, 30)  # of a stratum that has one bucket only without a replicate: certain
    offset = np.nan_to_num(offset)  # and of one that has none
    beta = np.nan_to_num(mantel_haenszel(arms), posinf=0.0, neginf=0.0)
    gamma = np.zeros_like(beta)
    for _ in range(25):
        share = expit(offset + beta + gamma * t)
        residual, weight = c1 - clicks * share, clicks * share * (1 - share)
        g0, g1 = residual.sum(axis=0), (residual * t).sum(axis=0)
        h00, h01, h11 = weight.sum(axis=0), (weight * t).sum(axis=0), (weight * t * t).sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            determinant = h00 * h11 - h01 * h01
            step0, step1 = (h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant
        if not (np.isfinite(step0).all() and np.isfinite(step1).all()):
            return np.full(len(beta), np.nan)
        shrink = 1 / np.maximum(1, np.maximum(np.abs(step0), np.abs(step1) * np.abs(t).max()) / 2)
        beta, gamma = beta + shrink * step0, gamma + shrink * step1
        if max(np.abs(step0).max(), np.abs(step1).max() * np.abs(t).max()) < 1e-8:
            break
    return gamma


def association(stratum: Codes, bucket: Codes, category: Codes, count: Floats) -> float | None:
    """The p-value of bucket and category being independent within strata; None where there is nothing to compare.

    The generalised Cochran–Mantel–Haenszel test of (n,) codes, each of `count` (Landis, Heyman & Koch 1978,
    doi:10.2307/1402373): exact variances of the tables given their margins, summed over strata.
    """
    (_, s), (_, b), (_, c) = factorise(stratum), factorise(bucket), factorise(category)
    if not len(s):
        return None
    shape = int(s.max()) + 1, int(b.max()) + 1, int(c.max()) + 1
    if min(shape[1:]) < 2:
        return None
    table = sums((s * shape[1] + b) * shape[2] + c, count, size=math.prod(shape)).reshape(shape)
    n = table.sum(axis=(1, 2))
    table, n = table[n > 1], n[n > 1]
    of_bucket, of_category = table.sum(axis=2), table.sum(axis=1)
    apart = (table - of_bucket[:, :, None] * of_category[:, None, :] / n[:, None, None]).sum(axis=0)[:-1, :-1].ravel()

    def spread(x: Floats) -> Floats:
        x = x[:, :-1]
        return np.asarray(x[:, :, None] * np.eye(x.shape[1]) - x[:, :, None] * x[:, None, :] / n[:, None, None])

    a, d = spread(of_bucket), spread(of_category) / (n - 1)[:, None, None]
    variance = np.einsum("sab,scd->acbd", a, d, optimize=True).reshape(len(apart), len(apart))
    rank = int(np.linalg.matrix_rank(variance, hermitian=True))
    if rank == 0:
        return None
    return float(stats.chi2.sf(apart @ np.linalg.pinv(variance, hermitian=True) @ apart, rank))


def standardised_difference(
    stratum: Codes, of_one: NDArray[np.bool_], of_other: NDArray[np.bool_], values: Floats, count: Floats
) -> tuple[float, float]:
    """How many standard deviations two buckets' means differ by within strata, and the standard error of that (if
    there is no difference); NaN where there is nothing to compare. NaN values are left out."""
    known = np.isfinite(values) & (of_one | of_other)
    n_strata = int(stratum.max(initial=-1)) + 1

    def total(part: NDArray[np.bool_], amount: Floats) -> Floats:
        return sums(stratum[part & known], amount[part & known], size=n_strata)

    n1, n0 = total(of_one, count), total(of_other, count)
    with np.errstate(divide="ignore", invalid="ignore"):
        weight = np.nan_to_num(n1 * n0 / (n1 + n0))
        apart = np.nan_to_num(total(of_one, count * values) / n1 - total(of_other, count * values) / n0)
    if weight.sum() <= 0:
        return math.nan, math.nan
    mean = np.average(values[known], weights=count[known])
    sd = math.sqrt(float(np.average((values[known] - mean) ** 2, weights=count[known])))
    if sd <= 0:
        return math.nan, math.nan
    return float((weight * apart).sum() / weight.sum() / sd), 1 / math.sqrt(float(weight.sum()))


@dataclass(frozen=True)
class Rating:
    """What every variant is expected to earn: what its tags promise, drawn to what it did itself. N variants, T tags.

    A logistic model of tags with a normal prior, whose spread has the largest likelihood (Laplace's approximation);
    then the gamma-Poisson posterior of each variant's ratio to it, whose spread is estimated by moments (Clayton &
    Kaldor 1987, doi:10.2307/2532003).
    """

    tags: csr_array  # (N, T)
    coefficients: Floats  # (1 + T,)
    covariance: Floats  # (1 + T, 1 + T) posterior
    clicks: Floats  # (N,)
    exposures: Floats  # (N,)
    spread: float  # variance of the variants' ratios to what their tags promise

    @classmethod
    def fit(
        cls, variant: Codes, size: Floats, reward: NDArray[Any], tags: csr_array, *, cautious: bool = False
    ) -> Rating:
        """The rating by (n,) exposures. `cautious`: the spread is not what it is estimated to be, which for few clicks
        is often 0, but the mean of what it may be (of a normal likelihood and a flat prior)."""
        n_variants = tags.shape[0]
        n, c = (sums(variant, x, size=n_variants) for x in (size, size * reward))
        design = hstack([np.ones((n_variants, 1)), tags], format="csr")
        _, beta, covariance, left = max(
            (_posterior_mode(design, n, c, 1 / sd**2) for sd in TAG_SDS), key=lambda one: one[0]
        )
        p = expit(design @ beta)
        expected = n * p
        squares = float((expected**2).sum())
        scale = n_variants / left  # what the fit took of the residuals
        spread = float((scale * (c - expected) ** 2 - expected * (1 - p)).sum()) / squares
        if cautious:
            se = scale * math.sqrt(float((2 * expected**2 + expected).sum())) / squares
            spread += se * float(np.exp(stats.norm.logpdf(spread / se) - stats.norm.logcdf(spread / se)))
        return cls(tags, beta, covariance, c, n, min(max(spread, LEAST_SPREAD), MOST_SPREAD))

    @cached_property
    def rate(self) -> Floats:
        """(N,) the expected click rate."""
        p = expit(self.coefficients[0] + self.tags @ self.coefficients[1:])
        k = 1 / self.spread
        return np.asarray(np.minimum(p * (self.clicks + k) / (self.exposures * p + k), 1.0))

    def draws(self, n: int = 200) -> Floats:
        """(n, N) rates that may be true as well, given the exposures."""
        rng = np.random.default_rng(0)
        values, vectors = np.linalg.eigh(self.covariance)
        noise = rng.normal(size=(n, len(values))) * np.sqrt(np.maximum(values, 0))
        beta = self.coefficients + noise @ vectors.T
        p = expit(beta[:, :1] + (self.tags @ beta[:, 1:].T).T)
        k = 1 / self.spread
        return np.asarray(np.minimum(p * rng.gamma(self.clicks + k, size=p.shape) / (self.exposures * p + k), 1.0))


def _posterior_mode(design: csr_array, n: Floats, c: Floats, precision: float) -> tuple[float, Floats, Floats, float]:
    """The log evidence (but for a constant), mode and covariance of a logistic model's coefficients under normal priors
    of this precision, and the degrees of freedom that are left; the first coefficient, the intercept, is free."""
    rate = min(max(float(c.sum() / n.sum()), 1e-6), 1 - 1e-6)
    beta = np.zeros(design.shape[1])
    beta[0] = logit(rate)
    prior = np.full(len(beta), precision)
    prior[0] = 1e-9
    for _ in range(25):
        p = expit(design @ beta)
        hessian = (design.T @ (design * (n * p * (1 - p))[:, None]).tocsr()).toarray() + np.diag(prior)
        step = np.linalg.solve(hessian, design.T @ (c - n * p) - prior * beta)
        beta = beta + step
        if np.abs(step).max() < 1e-6:
            break
    p = expit(design @ beta)
    likelihood = float(c @ np.log(p) + (n - c) @ np.log1p(-p)) - 0.5 * float(prior[1:] @ beta[1:] ** 2)
    evidence = likelihood + 0.5 * float(np.log(prior[1:]).sum()) - 0.5 * float(np.linalg.slogdet(hessian)[1])
    covariance = np.linalg.inv(hessian)
    left = len(c) - len(beta) + float(prior @ np.diag(covariance))
    return evidence, beta, covariance, max(left, 0.5)


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for each other (Holm 1979), in their order."""
    order = np.argsort(p, kind="stable")
    out, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        out[i] = largest
    return out
