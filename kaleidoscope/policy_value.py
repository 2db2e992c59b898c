"""What a policy would have earned: off-policy values, gains and the verdict, from a log of another policy.

Three steps: correction weights (how much a row says about the policy), scores per row (DR, IPS or SNIPS), and their
mean with errors by unit. No models here: predictions and choices come in as arrays, and the caller guarantees that
those of a row come from a model that never saw the row's unit. The page for readers is docs/policy-value.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.special import stdtrit

from kaleidoscope.vocabulary import Policy, Verdict

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MIN_MATCHED_ROWS = 200
MIN_MATCHED_POSITIVES = 30
# What a policy drawn at random must expect for a weighting to be used: an error of about a tenth of its value.
MIN_EXPECTED_ROWS = 400
MIN_EXPECTED_POSITIVES = 100

_CHUNK_ROWS = 65_536
_RANK_TOLERANCE = 1e-10


class Weighting(StrEnum):
    """How rows are matched to a policy, from the least to the most assumed."""

    MATCHED = "matched"
    MARGINALISED = "marginalised"
    PSEUDO_INVERSE = "pseudo_inverse"


class Estimator(StrEnum):
    """What is averaged over the rows."""

    DR = "dr"
    IPS = "ips"
    SNIPS = "snips"


_ASSUMPTION = {
    Weighting.MATCHED: "the propensities are right",
    Weighting.MARGINALISED: "the propensities are right, and {} depends on a variant only through its tags",
    Weighting.PSEUDO_INVERSE: "the propensities are right, and {} is, given the context, a sum over a variant's tags",
}


class Support(Protocol):
    """Which variants each of S choice sets offers, and how the log drew them, in CSR form."""

    @property
    def choice_set(self) -> IntArray:
        """(n,) the set of each row."""

    @property
    def indptr(self) -> IntArray:
        """(S + 1,) where each set begins in the two arrays below."""

    @property
    def variant(self) -> IntArray:
        """(nnz,) the eligible variants of each set, without repeats."""

    @property
    def probability(self) -> FloatArray:
        """(nnz,) P(variant | set) > 0 under the logging policy; at most 1 in sum over a set."""


@dataclass(frozen=True, eq=False)
class LoggedRows:
    """n rows of a log, as every estimator reads them. Raises ValueError where shapes or ranges are wrong.

    `reward` (n,) in 0..1; `logged` (n,) the variant's index; `propensity` (n,) in (0, 1], P(logged | all that was known
    at the choice); `count` (n,) the identical exposures a row stands for; `weight` (n,) its weight; `unit` (n,) codes
    from 0, None where every exposure is its own unit; `support` the eligible variants.
    """

    reward: FloatArray
    logged: IntArray
    propensity: FloatArray
    count: FloatArray
    weight: FloatArray
    unit: IntArray | None
    support: Support

    def __post_init__(self) -> None:
        for name in ("reward", "logged", "propensity", "count", "weight", "unit"):
            values = getattr(self, name)
            if values is not None and values.shape != self.support.choice_set.shape:
                raise ValueError(f"{name} has shape {values.shape}, the choice sets {self.support.choice_set.shape}")
        if not ((self.propensity > 0) & (self.propensity <= 1)).all():
            raise ValueError("propensities must lie in (0, 1]")
        if (self.count < 0).any() or (self.weight < 0).any():
            raise ValueError("counts and weights must not be negative")
        if not np.diff(self.support.indptr)[self.support.choice_set].all():
            raise ValueError("a row's choice set offers no eligible variant")

    @cached_property
    def _offered(self) -> tuple[IntArray, IntArray, int]:
        """Sorted keys set·factor + variant, their places in the CSR arrays, and the factor."""
        factor = int(self.support.variant.max(initial=0)) + 1
        keys = _set_of_entry(self.support) * factor + self.support.variant
        order = np.argsort(keys, kind="stable")
        return keys[order], order, factor

    def entry(self, variant: IntArray) -> IntArray:
        """(n,) where (row's set, variant) stands in the support's CSR arrays; -1 where it is not eligible."""
        keys, order, factor = self._offered
        wanted = self.support.choice_set * np.int64(factor) + variant
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where((keys[place] == wanted) & (variant >= 0) & (variant < factor), order[place], -1)

    @cached_property
    def logged_entry(self) -> IntArray:
        """(n,) the entry of the logged variant; -1 where it is not eligible."""
        return self.entry(self.logged)

    def per_unit(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Sums of count·weight·values by unit, and how many units (that weigh anything) stand behind each sum."""
        if self.unit is None:
            return self.weight * values, np.where(self.weight > 0, self.count, 0.0)
        size = self.count * self.weight
        sums, sizes = np.bincount(self.unit, size * values), np.bincount(self.unit, size)
        return np.asarray(sums, dtype=np.float64), (sizes > 0).astype(np.float64)


def _set_of_entry(support: Support) -> IntArray:
    """(nnz,) the choice set of each entry of the support's CSR arrays."""
    return np.repeat(np.arange(len(support.indptr) - 1, dtype=np.int64), np.diff(support.indptr))


@dataclass(frozen=True, eq=False)
class Greedy:
    """(b,) each: the best eligible variant, its prediction, and the mean prediction over the eligible variants."""

    chosen: IntArray
    q_chosen: FloatArray
    q_uniform: FloatArray


def greedy(
    predict: Callable[[IntArray, IntArray], npt.NDArray[np.floating[Any]]],
    support: Support,
    rows: IntArray | None = None,
    max_pairs: int = 4_000_000,
) -> Greedy:
    """The best eligible variant of each of the b `rows` (default: all), with at most `max_pairs` predictions at once.

    `predict(rows (r,), variants (m,))` returns (r, m) scores; rows that choose among the same variants come together.
    Ties go to the variant listed first.
    """
    rows = np.arange(len(support.choice_set)) if rows is None else rows
    sets = support.choice_set[rows]
    code_of_menu: dict[bytes, int] = {}
    menu = np.zeros(len(support.indptr) - 1, np.int64)
    for s in np.unique(sets):
        listed = support.variant[support.indptr[s] : support.indptr[s + 1]].tobytes()
        menu[s] = code_of_menu.setdefault(listed, len(code_of_menu))
    chosen, q_chosen, q_uniform = np.empty(len(rows), np.int64), np.empty(len(rows)), np.empty(len(rows))
    for listed, members in zip(code_of_menu, _members(menu[sets], len(code_of_menu)), strict=True):
        variants = np.frombuffer(listed, support.variant.dtype)
        step = max(1, max_pairs // len(variants))
        for part in (members[i : i + step] for i in range(0, len(members), step)):
            q = predict(rows[part], variants)
            best = q.argmax(axis=1)
            chosen[part] = variants[best]
            q_chosen[part] = q[np.arange(len(part)), best]
            q_uniform[part] = q.mean(axis=1, dtype=np.float64)
    return Greedy(chosen, q_chosen, q_uniform)


def _members(codes: IntArray, n_codes: int) -> list[IntArray]:
    """The places of each code 0..n_codes-1."""
    order = np.argsort(codes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(codes, minlength=n_codes))[:-1])


@dataclass(frozen=True, eq=False)
class Weights:
    """Correction weights `value` (n,) of one policy: their mean is 1 in expectation, 0 for rows that say nothing."""

    rows: LoggedRows
    value: FloatArray
    weighting: Weighting


def tag_features(tags: IntArray) -> Any:
    """The (N, d) multi-hot CSR matrix of (N, K) tag codes, a column for every (dimension, value) that occurs.

    Code -1 means no tag. Where a dimension has several values per variant, build the 0/1 matrix directly.
    """
    n, k = tags.shape
    base = int(tags.max(initial=0)) + 1
    keys, column = np.unique(tags + base * np.arange(k), return_inverse=True)
    ones = (tags >= 0).astype(np.float64).ravel()
    matrix = sparse.csr_matrix((ones, column.ravel(), np.arange(n + 1) * k), shape=(n, len(keys)))
    matrix.eliminate_zeros()
    return matrix


def tag_combination(features: Any) -> IntArray:
    """(N,) a code of each variant's tags: equal where the rows of the (N, d) 0/1 CSR matrix are equal."""
    codes: dict[bytes, int] = {}
    features = features.sorted_indices()
    rows = np.split(features.indices, features.indptr[1:-1])
    return np.array([codes.setdefault(row.tobytes(), len(codes)) for row in rows], dtype=np.int64)


def choose_weighting(rows: LoggedRows, features: Any | None = None) -> Weighting:
    """The weighting that assumes least among those with enough data for a policy drawn at random.

    Looks at the support, the tags and the log's total of rows and positives; never at what any policy earns. `features`
    (N, d) is the 0/1 tag matrix, None where tags must not be used.
    """
    options: dict[Weighting, IntArray] = {Weighting.MATCHED: np.diff(rows.support.indptr)}
    if features is not None:
        _, first = np.unique(_combination_of_entry(rows.support, features), return_index=True)
        n_sets = len(rows.support.indptr) - 1
        options[Weighting.MARGINALISED] = np.bincount(_set_of_entry(rows.support)[first], minlength=n_sets)
    for weighting, alternatives in options.items():
        share = rows.count / np.maximum(alternatives, 1)[rows.support.choice_set]
        positives = (rows.count * rows.reward).sum() * share.sum() / max(rows.count.sum(), 1)
        if share.sum() >= MIN_EXPECTED_ROWS and positives >= MIN_EXPECTED_POSITIVES:
            return weighting
    return Weighting.MATCHED if features is None else Weighting.PSEUDO_INVERSE


def uniform_weights(rows: LoggedRows) -> Weights:
    """Weights of the policy that draws evenly from the eligible variants: 1{logged is eligible} / (eligible·p)."""
    sizes = np.diff(rows.support.indptr)[rows.support.choice_set]
    inside = rows.logged_entry >= 0
    return Weights(rows, inside / (sizes * rows.propensity), Weighting.MATCHED)


def policy_weights(
    rows: LoggedRows, chosen: IntArray, weighting: Weighting = Weighting.MATCHED, features: Any | None = None
) -> Weights:
    """Weights of the policy that shows `chosen` (n,) to each row.

    matched: 1{logged = chosen} / p(logged). marginalised: 1{same tags} / P(those tags | set), MIPS of Saito &
    Joachims 2022. pseudo_inverse: φ(chosen)ᵀ Γ⁺ φ(logged), φ the variant's tags and an intercept, Γ = E[φφᵀ | set], PI
    of Swaminathan et al. 2017 (the same as matched in sets with few variants for their tags).

    The latter two are for draws from P(variant | set). Where known propensities p differ between rows that logged the
    same variant in the same set (they depended on the user), a row is weighted by P(logged | set) / p besides, the
    numerator by the harmonic mean of p over those rows: unbiased again, and noisier, as the ess shows.

    Raises ValueError where a chosen variant is not eligible, or `features` (N, d) is missing.
    """
    entry, logged = rows.entry(chosen), rows.logged_entry
    if (entry < 0).any():
        raise ValueError(f"{int((entry < 0).sum())} rows choose a variant that is not eligible in their choice set")
    if weighting is Weighting.MATCHED:
        return Weights(rows, (entry == logged) / rows.propensity, weighting)
    if features is None:
        raise ValueError(f"{weighting} weights need the tag matrix")
    value, inside = np.zeros(len(chosen)), np.flatnonzero(logged >= 0)
    weigh = _marginalised if weighting is Weighting.MARGINALISED else _pseudo_inverse
    value[inside] = weigh(rows.support, features, entry[inside], logged[inside])
    exposures = np.bincount(logged[inside], rows.count[inside])
    inverse = np.bincount(logged[inside], (rows.count / rows.propensity)[inside])
    harmonic = np.divide(exposures, inverse, out=np.zeros(len(inverse)), where=inverse > 0)
    value[inside] *= harmonic[logged[inside]] / rows.propensity[inside]
    return Weights(rows, value, weighting)


def _combination_of_entry(support: Support, features: Any) -> IntArray:
    """(nnz,) a code of each entry's (set, combination of tags)."""
    combination = tag_combination(features)
    factor = int(combination.max(initial=0)) + 1
    return np.asarray(_set_of_entry(support) * factor + combination[support.variant])


def _marginalised(support: Support, features: Any, chosen: IntArray, logged: IntArray) -> FloatArray:
    _, code = np.unique(_combination_of_entry(support, features), return_inverse=True)
    mass = np.bincount(code, weights=support.probability)[code]
    return np.asarray((code[chosen] == code[logged]) / mass[chosen])


def _pseudo_inverse(support: Support, features: Any, chosen: IntArray, logged: IntArray) -> FloatArray:
    features = sparse.hstack([np.ones((features.shape[0], 1)), features], format="csr")
    sets, value = _set_of_entry(support)[logged], np.empty(len(logged))
    for s, members in enumerate(_members(sets, len(support.indptr) - 1)):
        if len(members):
            start, end = support.indptr[s], support.indptr[s + 1]
            whitened = _whitened(features[support.variant[start:end]], support.probability[start:end])
            for part in (members[i : i + _CHUNK_ROWS] for i in range(0, len(members), _CHUNK_ROWS)):
                value[part] = np.einsum("rk,rk->r", whitened[chosen[part] - start], whitened[logged[part] - start])
    return value


def _whitened(phi: Any, probability: FloatArray) -> FloatArray:
    """(m, rank) z with z(a)·z(b) = φ(a)ᵀ Γ⁺ φ(b), by the smaller of the two Gram matrices of √p·φ (m, d)."""
    phi = phi[:, np.unique(phi.indices)]
    root = np.sqrt(probability)
    scaled = sparse.diags(root) @ phi
    by_variant = phi.shape[0] <= phi.shape[1]
    gram = (scaled @ scaled.T if by_variant else scaled.T @ scaled).toarray()
    eigenvalues, vectors = np.linalg.eigh(gram)
    kept = eigenvalues > _RANK_TOLERANCE * eigenvalues[-1]
    if by_variant:
        return np.asarray(vectors[:, kept] / root[:, None])
    return np.asarray(phi @ (vectors[:, kept] / np.sqrt(eigenvalues[kept])))


@dataclass(frozen=True, eq=False)
class Scores:
    """`value` (n,): what each row says the policy earns; its count·weight mean is the estimate."""

    weights: Weights
    value: FloatArray
    estimator: Estimator


def dr_scores(weights: Weights, q_policy: FloatArray, q_logged: FloatArray) -> Scores:
    """Doubly robust: q_policy + w·(reward − q_logged), Dudík, Langford & Li 2011, V_DR. Both q are (n,)."""
    return Scores(weights, q_policy + weights.value * (weights.rows.reward - q_logged), Estimator.DR)


def ips_scores(weights: Weights) -> Scores:
    """Inverse propensity: w·reward (Horvitz–Thompson)."""
    return Scores(weights, weights.value * weights.rows.reward, Estimator.IPS)


def snips_scores(weights: Weights) -> Scores:
    """Self-normalised: V = Σw·reward / Σw, Swaminathan & Joachims 2015; linearised, V + w·(reward − V) / w̄."""
    rows, size = weights.rows, weights.rows.count * weights.rows.weight
    total = (size * weights.value).sum()
    if total <= 0:
        return Scores(weights, np.full(len(size), np.nan), Estimator.SNIPS)
    mean = (size * weights.value * rows.reward).sum() / total
    return Scores(weights, mean + weights.value * (rows.reward - mean) * (size.sum() / total), Estimator.SNIPS)


@dataclass(frozen=True)
class Estimate:
    """A value or a gain with its 95 % interval. `ess` is the effective number of exposures behind it."""

    value: float
    se: float
    ci_low: float
    ci_high: float
    ess: float
    matched_rows: float
    matched_positives: float
    method: str
    assumption: str


def estimate(scores: Scores, folds: int = 1) -> Estimate | None:
    """The policy's value; None with fewer than 200 matched rows, 30 matched positives or two units.

    `folds` as in `gain`.
    """
    return _estimate(scores, scores.value, scores.weights.value, scores.weights.value, folds)


def gain(scores: Scores, over: Scores, folds: int = 1) -> Estimate | None:
    """What a policy earns more than another on the same rows, paired; exactly 0 where they agree everywhere.

    With `folds` K > 1 the interval stays honest for policies learned by K-fold cross-fitting even where none is better
    than another: there the folds' gains correlate by 2/(π√(2K−3)), and errors that ignore it claim a gain 5–15 % of the
    time (docs/policy-value.md). Leave it at 1 for a policy fixed beforehand or guarded by a permutation test.

    None if either value is, or if the rows that tell the two policies apart are too few by the same rule: the models
    alone would then be speaking. Raises ValueError if the two were not scored on the same `LoggedRows`.
    """
    if scores.weights.rows is not over.weights.rows:
        raise ValueError("a gain compares scores of the same rows")
    if estimate(scores) is None or estimate(over) is None:
        return None
    difference = scores.weights.value - over.weights.value
    agree = not difference.any() and np.allclose(scores.value, over.value)
    assumes_more = max(over, scores, key=lambda s: list(Weighting).index(s.weights.weighting))
    told_apart = scores.weights.value if agree else np.abs(difference)
    return _estimate(assumes_more, scores.value - over.value, difference, told_apart, folds)


def _estimate(kind: Scores, score: FloatArray, w: FloatArray, evidence: FloatArray, folds: int) -> Estimate | None:
    """The ratio estimate Σ count·weight·score / Σ count·weight; its error is the delete-one-unit jackknife's."""
    rows, weighting = kind.weights.rows, kind.weights.weighting
    positive, seen = rows.count * rows.reward, evidence != 0
    ess, positives = (_kish(evidence * rows.weight, count) for count in (rows.count, positive))
    matched = (ess, positives)
    if weighting is not Weighting.PSEUDO_INVERSE:
        matched = (float(rows.count[seen].sum()), float(positive[seen].sum()))
    if not (matched[0] >= MIN_MATCHED_ROWS and matched[1] >= MIN_MATCHED_POSITIVES):
        return None
    size = rows.count * rows.weight
    value = float((size * score).sum() / size.sum())
    residual, units = rows.per_unit(score - value)
    n_units = units.sum()
    if n_units < 2:
        return None
    share = rows.per_unit(np.ones(len(score)))[0] / size.sum()
    variance = (units * (residual / size.sum() / (1 - share)) ** 2).sum() * (1 - 1 / n_units)
    se = math.sqrt(variance * (1 + (folds - 1) * 2 / (math.pi * math.sqrt(max(1, 2 * folds - 3)))))
    # A few units may carry most of the weight: the quantile goes by how many carry it, not by how many there are.
    carried, _ = rows.per_unit(np.abs(w))
    half = se * float(stdtrit(max(1.0, _kish(carried, units) - 1), 0.975)) if se > 0 else 0.0
    what = "what the model leaves over" if kind.estimator is Estimator.DR else "the reward"
    method, assumption = f"{kind.estimator}, {weighting}", _ASSUMPTION[weighting].format(what)
    return Estimate(value, se, value - half, value + half, ess, *matched, method, assumption)


def _kish(size: FloatArray, count: FloatArray) -> float:
    """Kish's effective number, (Σx)² / Σx², of values that stand for `count` each."""
    squares = float((count * size**2).sum())
    return float((count * size).sum()) ** 2 / squares if squares > 0 else 0.0


def permutation_p(observed: float, permuted: Sequence[float] | FloatArray) -> float:
    """(1 + #{permuted ≥ observed}) / (1 + R): never 0, valid for any R (Phipson & Smyth 2010)."""
    return (1 + int((np.asarray(permuted) >= observed).sum())) / (1 + len(permuted))


def gains_over_simpler(scores: Mapping[Policy, Scores], folds: int = 1) -> dict[Policy, tuple[Policy, Estimate | None]]:
    """For every policy scored but the simplest: the next simpler one scored, and the gain over it.

    `folds` as in `gain`, for all but the personalised policy: its verdict also asks for a permutation test.
    """
    ladder = [policy for policy in Policy if policy in scores]
    guarded = {Policy.PERSONALISED: 1}
    return {b: (a, gain(scores[b], scores[a], guarded.get(b, folds))) for a, b in pairwise(ladder)}


def verdict(
    values: Mapping[Policy, Estimate | None],
    gains: Mapping[Policy, Estimate | None],
    p: float | None,
    has_claim: bool,
) -> Verdict:
    """What the log supports. `gains` are over the next simpler policy, `p` is that of personalisation's gain.

    A policy that does not exist for the log (best_per_context without context) is absent from both mappings; a None in
    `values` is an unknown value, and leaves the verdict inconclusive. `has_claim` is False where the exposure depends
    on the user and its propensities are unknown.
    """
    if not has_claim or any(value is None for value in values.values()):
        return Verdict.INCONCLUSIVE

    def beats(policy: Policy) -> bool:
        found = gains.get(policy)
        return found is not None and found.ci_low > 0

    if beats(Policy.PERSONALISED) and p is not None and p <= 0.05:
        return Verdict.PERSONALISE
    if beats(Policy.BEST_PER_CONTEXT):
        return Verdict.BEST_PER_CONTEXT
    return Verdict.BEST_SINGLE if beats(Policy.BEST_SINGLE) else Verdict.INCONCLUSIVE
