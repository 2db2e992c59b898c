"""How the log chose what to show: sample ratio mismatch, the logging policy, and whether it looked at the user.

Pure functions on a `Log`; nothing here looks at rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats
from threadpoolctl import threadpool_limits

from kaleidoscope.log import (
    SAMPLED_UNITS,
    Codes,
    Floats,
    Log,
    coarse_codes,
    combine,
    densify,
    factorise,
    first_rows,
    sums,
)

ALPHA = 0.001  # a sample ratio mismatch is an alarm: rare, and worth stopping for
ROGUE_SHARE = 0.02  # of the exposures may lie in groups that fail; real archives always hold a few
STICKY_SHARE = 0.99  # of the units have one variant: the variant was given to the unit, not to the exposure

# ------------------------------------------------------------------------------------------------ SRM


@dataclass(frozen=True)
class Deviation:
    """An arm (a variant, or a value of a tag dimension) whose share is not the designed one."""

    arm: str
    count: float
    share: float
    designed: float


@dataclass(frozen=True)
class FailedGroup:
    """A group whose arms were not shown in the designed shares."""

    group: str
    p_value: float
    exposures: int


@dataclass(frozen=True)
class Srm:
    """Whether variants were shown in their designed shares; see `srm` for what `p_value` is."""

    p_value: float
    flagged: bool
    counted: str  # "units" or "exposures"
    deviations: tuple[Deviation, ...]  # the arms furthest from their share, where flagged
    groups: tuple[FailedGroup, ...]  # groups with p < ALPHA, smallest p first
    failed_share: float  # of the exposures, in those groups


@dataclass(frozen=True)
class _Arms:
    """The arms of every cell (group): sorted by key = cell · n_categories + category."""

    cell: Codes
    category: Codes
    share: Floats  # sums to 1 in each cell


def srm(log: Log) -> Srm | None:
    """The test of the designed shares (`arms` of the schema), or None where the log gives none that can be tested.

    Units are counted, once each, where a unit has one variant (99 % of them do); where units see several, exposures
    are counted and Pearson's X² is divided by its design effect (Rao & Scott 1981, doi:10.2307/2287815, first order,
    units as clusters); without units every exposure is one. Where expected counts are small, X² has its exact
    multinomial moments (Haldane 1937), and p < .05 is simulated.

    Without groups every tag dimension is tested as well as the variants; `p_value` is the smallest after Holm, and
    `flagged` is p < .001. With groups each is tested over the arms it has; `flagged` is more than 2 % of exposures in
    groups with p < .001, and `p_value` the binomial probability of that many such groups by chance.

    A mapping in `arms` is keyed by variant id, or by all the values of one tag dimension (several joined by `|`). In
    an aggregated log without unit, user, context or time a row is an arm: a variant on k rows has k shares.
    """
    partitions = _partitions(log)
    designed = log.schema.arms
    if isinstance(designed, dict):
        partitions = [p for p in partitions if set(p[1]) <= set(designed)]
    if designed is None or not partitions or not len(log):
        return None
    group = log.group if log.group is not None else np.zeros(len(log), np.int64)
    rows = _first_exposures(log, group)
    counted = "exposures" if rows is None else "units"
    count, unit = (log.count, log.unit) if rows is None else (np.ones(len(rows)), None)
    rows = np.arange(len(log)) if rows is None else rows
    category, names = partitions[0]
    code = category[log.variant]
    if isinstance(designed, dict):
        names = [*names, *sorted(set(designed) - set(names))]
        arms = _mapped_arms(group, code, np.array([designed[name] for name in names]), everywhere=log.group is None)
    else:
        if log.group is not None and _rows_are_arms(log):
            code = log.file_row  # finer than variants, where two rows of a group show the same one
        arms = _uniform_arms(log, group, code)
    p, observed = _pearson(group[rows], code[rows], count, unit, arms)
    if log.group is not None:
        return _by_group(log, p, sums(group, log.count), counted)
    tests = [(float(p[0]), names, arms, observed)]
    by_variant = names == log.variants["variant_id"].to_pylist()
    for tag, labels in _partitions(log)[1:] if by_variant else ():
        if 1 < len(labels) < len(names):
            keys, position = factorise(tag[arms.category])
            of_tag = _Arms(np.zeros(len(keys), np.int64), keys, sums(position, arms.share))
            p, observed = _pearson(group[rows], tag[log.variant[rows]], count, unit, of_tag)
            tests.append((float(p[0]), labels, of_tag, observed))
    tests = [test for test in tests if not np.isnan(test[0])]
    if not tests:
        return None
    p_value = min(1.0, len(tests) * min(test[0] for test in tests))
    flagged = p_value < ALPHA
    deviations = _deviations(min(tests, key=lambda test: test[0])) if flagged else ()
    return Srm(p_value, flagged, counted, deviations, (), 0.0)


def _partitions(log: Log) -> list[tuple[Codes, list[str]]]:
    """(variant → category, names of categories): the variants, then each tag dimension's combinations of values."""
    ids = log.variants["variant_id"].to_pylist()
    found: list[tuple[Codes, list[str]]] = [(np.arange(len(ids)), ids)]
    for name in log.schema.variant:
        labels = np.array(["|".join(values) for values in log.variants[name].to_pylist()], dtype=object)
        distinct, category = factorise(labels)
        found.append((category, distinct.tolist()))
    return found


def _first_exposures(log: Log, group: Codes) -> Codes | None:
    """The first exposure of every unit in every group where units keep their variant, otherwise None."""
    if log.unit is None:
        return None
    looked = np.flatnonzero(log.unit < SAMPLED_UNITS)
    some = combine([group[looked], log.unit[looked]], len(looked))
    variants = np.bincount(some[first_rows(combine([some, log.variant[looked]], len(looked)))])
    if (variants == 1).mean() < STICKY_SHARE:
        return None
    pair = combine([group, log.unit], len(log))
    order = np.arange(len(log)) if log.time is None else np.argsort(log.time, kind="stable")
    return order[first_rows(pair[order])]


def _rows_are_arms(log: Log) -> bool:
    schema = log.schema
    return log.aggregated and not (schema.unit or schema.user or schema.context or schema.time)


def _uniform_arms(log: Log, group: Codes, code: Codes) -> _Arms:
    """Equal shares of the arms shown in each group; where a row is an arm, a variant has as many as it has rows."""
    width = int(code.max()) + 1
    rows = first_rows(densify(log.file_row)) if _rows_are_arms(log) else np.arange(len(log))
    keys, arm = factorise((group * width + code)[rows])
    size = sums(arm) if _rows_are_arms(log) else np.ones(len(keys))
    cell = keys // width
    return _Arms(cell, keys % width, size / sums(cell, size)[cell])


def _mapped_arms(group: Codes, code: Codes, share: Floats, *, everywhere: bool) -> _Arms:
    """Shares of a mapping: of all its arms in a log without groups, otherwise of those shown in each group."""
    width = len(share)
    keys = np.arange(width) if everywhere else factorise(group * width + code)[0]
    cell, category = keys // width, keys % width
    total = sums(cell, share[category])[cell]
    return _Arms(cell, category, np.divide(share[category], total, out=np.zeros(len(keys)), where=total > 0))


def _pearson(cell: Codes, category: Codes, count: Floats, unit: Codes | None, arms: _Arms) -> tuple[Floats, Floats]:
    """p of Pearson's X² in each cell (NaN where there is one arm), and the observed count of each arm."""
    n_cells = int(arms.cell.max()) + 1
    width = int(max(arms.category.max(), category.max())) + 1
    arm = np.searchsorted(arms.cell * width + arms.category, cell * width + category)
    observed = sums(arm, count, size=len(arms.cell))
    n = sums(cell, count, size=n_cells)
    expected = n[arms.cell] * arms.share
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(expected > 0, (observed - expected) ** 2 / expected, np.where(observed > 0, np.inf, 0.0))
    x2 = sums(arms.cell, terms, size=n_cells)
    possible = arms.share > 0
    size = sums(arms.cell, possible.astype(np.float64), size=n_cells)
    df = size - 1
    variance = 2.0 * df
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = sums(arms.cell[possible], 1 / arms.share[possible], size=n_cells)
        exact = 2 * df + (inverse - size**2 - 2 * size + 2) / n
        smallest = np.full(n_cells, np.inf)
        np.minimum.at(smallest, arms.cell[possible], expected[possible])
        sparse_cells = smallest < 5
        variance = np.where(sparse_cells, np.maximum(exact, 1e-9), variance)
        if unit is not None:
            few = unit < (SAMPLED_UNITS if n_cells == 1 else np.inf)
            x2 = x2 / _design_effect(cell[few], arm[few], count[few], unit[few], arms, n_cells) * df
        p = stats.gamma.sf(x2, df**2 / variance, scale=variance / df)
    p[(df < 1) | (n == 0)] = np.nan
    rng = np.random.default_rng(0)
    for c in np.flatnonzero(sparse_cells & (p < 0.05)) if unit is None else ():
        inside = np.flatnonzero((arms.cell == c) & possible)
        if len(inside) <= 200 and np.isfinite(x2[c]):
            drawn = rng.multinomial(round(n[c]), arms.share[inside] / arms.share[inside].sum(), size=9_999)
            simulated = ((drawn - expected[inside]) ** 2 / expected[inside]).sum(axis=1)
            p[c] = (1 + int((simulated >= x2[c] * (1 - 1e-9)).sum())) / 10_000
    return p, observed


def _design_effect(cell: Codes, arm: Codes, count: Floats, unit: Codes, arms: _Arms, n_cells: int) -> Floats:
    """What X² is on average in each cell for exposures that come in units: the sum over arms of the variance of the
    arm's count by unit totals over its expected count (Rao & Scott 1981; df if exposures were independent)."""
    in_cell, pair_unit = factorise(combine([cell, unit], len(cell)))
    total = sums(pair_unit, count)
    unit_cell = np.zeros(len(in_cell), np.int64)
    unit_cell[pair_unit] = cell
    keys, pair = factorise(pair_unit * len(arms.cell) + arm)
    of_unit, of_arm = keys // len(arms.cell), keys % len(arms.cell)
    seen = sums(pair, count)
    size = len(arms.cell)
    variance = (
        sums(of_arm, seen**2, size=size)
        - 2 * arms.share * sums(of_arm, seen * total[of_unit], size=size)
        + arms.share**2 * sums(unit_cell, total**2, size=n_cells)[arms.cell]
    )
    expected = sums(cell, count, size=n_cells)[arms.cell] * arms.share
    ratio = np.divide(variance, expected, out=np.zeros_like(variance), where=expected > 0)
    return sums(arms.cell, ratio, size=n_cells)


def _deviations(test: tuple[float, list[str], _Arms, Floats]) -> tuple[Deviation, ...]:
    _, names, arms, observed = test
    n = observed.sum()
    z = (observed - n * arms.share) / np.sqrt(np.maximum(n * arms.share * (1 - arms.share), 1e-12))
    worst = np.argsort(-np.abs(z), kind="stable")[:10]
    return tuple(
        Deviation(str(names[arms.category[a]]), float(observed[a]), float(observed[a] / n), float(arms.share[a]))
        for a in worst
    )


def _by_group(log: Log, p: Floats, exposures: Floats, counted: str) -> Srm | None:
    tested = ~np.isnan(p)
    if not tested.any() or log.groups is None:
        return None
    failed = np.flatnonzero(tested & (p < ALPHA))
    failed = failed[np.argsort(p[failed], kind="stable")]
    share = float(exposures[failed].sum() / exposures.sum())
    groups = tuple(FailedGroup(str(log.groups[int(g)]), float(p[g]), round(exposures[g])) for g in failed)
    p_value = float(stats.binom.sf(len(failed) - 1, int(tested.sum()), ALPHA))
    return Srm(p_value, share > ROGUE_SHARE, counted, (), groups, share)


# ------------------------------------------------------------------------------------------------ logging policy

ELIGIBLE = 0.1  # of uniform: what a variant's logging probability must reach for a policy to choose it
MAX_PAIRS = 4_000_000  # (context, variant) pairs held; beyond, the rarest contexts are taken together
CONCENTRATIONS = np.logspace(-1, 7, 49)
EVIDENCE = 1.35  # log-likelihood that context matters must add: half of χ²₁'s 10 % point (α is on its boundary)


@dataclass(frozen=True)
class Support:
    """What the log could have shown at each row, and with which probability it showed what it did.

    Set s has the eligible variants `variant[indptr[s]:indptr[s + 1]]`, ascending, with P(variant | context, group)
    beside them (they sum to less than 1 where ineligible variants were shown too).
    """

    choice_set: Codes  # (n,) row → set
    indptr: Codes  # (S + 1,)
    variant: Codes  # (nnz,)
    probability: Floats  # (nnz,)
    propensity: Floats  # (n,) P(logged variant | what was known): the log's column, or else estimated
    eligible: NDArray[np.bool_]  # (n,) whether the logged variant is in its row's set
    estimated: bool  # whether `propensity` is
    concentration: float  # of the Dirichlet that context shares are shrunk with; inf: context does not matter

    @property
    def n_eligible(self) -> Codes:
        """(n,) the number of variants a policy may choose from at each row."""
        return np.diff(self.indptr)[self.choice_set]


def logging_policy(log: Log, context: tuple[str, ...] | None = None) -> Support:
    """The logging policy given context and group, never the user.

    P(variant | context) is the posterior mean of a Dirichlet-multinomial around the shares of the whole group (or
    scene), its concentration by maximum marginal likelihood (Minka 2000, "Estimating a Dirichlet distribution");
    contexts that add no evidence share one set. Known propensities are taken as they are; eligibility is estimated
    all the same, because it is about what the log shows.
    """
    n, n_variants = len(log), log.n_variants
    parent = log.group if log.group is not None else np.zeros(n, np.int64)
    _, parent = factorise(parent)
    parent_keys, parent_pair = factorise(parent * n_variants + log.variant)  # (group, variant) pairs that occur
    parent_of, variant_of = parent_keys // n_variants, parent_keys % n_variants
    total = sums(parent, log.count)
    shares = sums(parent_pair, log.count) / total[parent_of]
    width = np.bincount(parent_of)  # variants of each group
    start = np.concatenate([[0], np.cumsum(width)])
    names = log.schema.context if context is None else context
    cell = _pooled(combine([parent, log.cells(names)], n) if names else parent, parent, width, log.count)
    pairs, pair = factorise(cell * len(parent_keys) + parent_pair)
    pair_cell, pair_parent = pairs // len(parent_keys), pairs % len(parent_keys)
    seen, size = sums(pair, log.count), sums(cell, log.count)
    alpha = _concentration(seen, shares[pair_parent], size) if len(size) > len(width) else np.inf
    if np.isinf(alpha):
        cell, pair_cell, size = parent, parent_of, total
        pair, pair_parent, seen = parent_pair, np.arange(len(parent_keys)), shares * total[parent_of]
    cell_parent = np.zeros(len(size), np.int64)
    cell_parent[cell] = parent
    held = 0.0 if np.isinf(alpha) else alpha
    wide = width[cell_parent]
    offset = np.concatenate([[0], np.cumsum(wide)])
    set_of = np.repeat(np.arange(len(size)), wide)
    column = np.arange(offset[-1]) - offset[set_of] + start[cell_parent[set_of]]
    probability = held * shares[column]
    probability[offset[pair_cell] + pair_parent - start[cell_parent[pair_cell]]] += seen
    probability /= (size + held)[set_of]
    kept = probability >= ELIGIBLE / wide[set_of] * (1 - 1e-9)
    own = (offset[pair_cell] + pair_parent - start[cell_parent[pair_cell]])[pair]
    return Support(
        choice_set=cell,
        indptr=np.concatenate([[0], np.cumsum(np.bincount(set_of[kept], minlength=len(size)))]),
        variant=variant_of[column[kept]],
        probability=probability[kept],
        propensity=probability[own] if log.propensity is None else log.propensity,
        eligible=kept[own],
        estimated=log.propensity is None,
        concentration=float(alpha),
    )


def _pooled(cell: Codes, parent: Codes, width: Codes, count: Floats) -> Codes:
    """The cells, the rarest of them taken together within their group if there are too many to hold."""
    size = sums(cell, count)
    cell_parent = np.zeros(len(size), np.int64)
    cell_parent[cell] = parent
    order = np.argsort(-size, kind="stable")
    held = np.cumsum(width[cell_parent[order]]) <= MAX_PAIRS
    if held.all():
        return cell
    name = np.where(held[np.argsort(order)], np.arange(len(size)) + len(width), cell_parent)
    return factorise(name[cell])[1]


def _concentration(seen: Floats, share: Floats, size: Floats) -> float:
    """The concentration with the largest Dirichlet-multinomial likelihood; inf where context adds no evidence."""
    best, best_alpha = float((seen * np.log(share)).sum()) + EVIDENCE, np.inf
    for alpha in CONCENTRATIONS:
        prior = alpha * share
        likelihood = (special.gammaln(seen + prior) - special.gammaln(prior)).sum()
        likelihood += (special.gammaln(alpha) - special.gammaln(size + alpha)).sum()
        if likelihood > best:
            best, best_alpha = float(likelihood), float(alpha)
    return best_alpha


# ------------------------------------------------------------------------------------------------ independence

INDEPENDENCE_ROWS = 20_000
FOLDS = 5
BUCKETS = 128  # per block of hashed crosses
MAX_CROSSES = 64  # per block, drawn at random beyond
RIDGES = (0.3, 3.0, 30.0)  # times the mean eigenvalue
MIN_GAIN = 0.01  # nats per exposure: propensities off by √(2·gain) = a seventh; doubly robust values bear less


@dataclass(frozen=True)
class Independence:
    """Whether what was shown depended on the user, given context and group."""

    p_value: float | None  # None: the schema names no user columns
    dependent: bool  # p ≤ .01, and a gain that matters
    gain: dict[str, float]  # per tag dimension: held-out log-loss gain of user features, nats per exposure


def exposure_independence(log: Log, permutations: int = 99, seed: int = 0) -> Independence:
    """The test that the variant shown was independent of the user, given context, group and product.

    For each tag dimension (and the variant itself where tags do not tell all): the residual of "value shown" on its
    shares in the row's context and group is predicted by one ridge Newton step from user features, from hashed crosses
    of two user features, and of a user feature and a context column; cross-fitted in 5 folds of units, the gain is the
    second-order held-out log-loss gain. One p over all dimensions and blocks: the maximum of the gains, standardised
    over permutations of whole user-feature rows between units (Westfall & Young 1993, max-T). At most 20,000 rows.
    """
    if not log.schema.user:
        return Independence(None, False, {})
    rng = np.random.default_rng(seed)
    log = _subsample(log, rng)
    unit = log.unit if log.unit is not None else densify(log.file_row)
    fold_of_unit = rng.permutation(int(unit.max()) + 1) % FOLDS
    order = np.lexsort((unit, fold_of_unit[unit]))  # a fold is a slice, and a unit's rows lie together
    log, unit = log.take(order), unit[order]
    edges = np.searchsorted(fold_of_unit[unit], np.arange(FOLDS + 1))
    position = np.cumsum(np.diff(unit, prepend=unit[0]) != 0)  # units numbered as they lie
    size = np.bincount(position)
    start = np.cumsum(size) - size
    nth = np.arange(len(log)) - start[position]

    names = list(log.schema.variant)
    targets = [_top(combine([_tag_codes(log, name)], len(log)), 12) for name in names]
    if len(names) > 1:
        names.append("variant_id")
        targets.append(_top(log.variant, 24))
    cell = log.cells(log.schema.context)
    if log.product is not None:
        cell = combine([cell, log.product], len(log))
    residual = np.concatenate([_residual(target, cell, log.count) for target in targets], axis=1)  # (n, K)
    dimension = np.repeat(np.arange(len(targets)), [int(target.max()) + 1 for target in targets])
    share = np.concatenate([sums(target, log.count) for target in targets]) / log.count.sum()  # (K,)
    weighted = (residual * log.count[:, None]).astype(np.float32)

    user = np.stack([_top(coarse_codes(log.columns[name], 8), 15) for name in log.schema.user], axis=1)
    situation = [_top(coarse_codes(log.columns[name], 8), 15) for name in log.schema.context]
    context = np.stack(situation, axis=1) if situation else np.zeros((len(log), 0), np.int64)
    single = np.concatenate([np.eye(16, dtype=np.float32)[codes][:, : codes.max() + 1] for codes in user.T], axis=1)
    crossed = _Crosses(rng, [(i, j) for i in range(user.shape[1]) for j in range(i)])
    mixed = _Crosses(rng, [(i, j) for i in range(user.shape[1]) for j in range(context.shape[1])])
    of_user = np.concatenate([single, crossed.encode(user, user)], axis=1)
    features = np.concatenate([of_user, mixed.encode(user, context)], axis=1)  # (n, d) in three blocks
    ends = np.cumsum([0, single.shape[1], crossed.width, mixed.width])
    blocks = [slice(a, b) for a, b in pairwise(ends.tolist()) if a < b]
    curvatures = [_curvature(of_user[:, block], log.count) for block in blocks if block.stop <= ends[2]]

    def gains(source: Codes) -> Floats:
        """(blocks · ridges, dimensions) gains when row i has the user features of row source[i]."""
        features[:, : ends[2]] = of_user[source]
        features[:, ends[2] :] = mixed.encode(user[source], context)
        used = [*curvatures, *([_curvature(features[:, ends[2] :], log.count)] if mixed.width else [])]
        totals = np.stack([features[a:b].T @ weighted[a:b] for a, b in pairwise(edges)])
        found = [_newton_gain(totals[:, b], share, c) for b, c in zip(blocks, used, strict=True)]
        by_target = np.concatenate(found) / log.count.sum()  # (blocks · ridges, K)
        return np.stack([by_target[:, dimension == d].sum(axis=1) for d in range(len(targets))], axis=1)

    with threadpool_limits(1, "blas"):  # the products are small: on a busy machine more threads wait for each other
        results = [gains(np.arange(len(log)))]
        for _ in range(permutations):
            other = rng.permutation(len(size))[position]
            results.append(gains(start[other] + nth % size[other]))
    stacked = np.stack(results)  # (1 + permutations, blocks · ridges, dimensions)
    spread = stacked.std(axis=0)
    score = np.divide(stacked - stacked.mean(axis=0), spread, out=np.zeros_like(stacked), where=spread > 1e-15)
    largest = score.max(axis=(1, 2))
    p_value = float((largest >= largest[0]).mean())
    gain = stacked[0].max(axis=0)
    return Independence(
        p_value, bool(p_value <= 0.01 and gain.max() >= MIN_GAIN), dict(zip(names, gain.tolist(), strict=True))
    )


def _subsample(log: Log, rng: np.random.Generator) -> Log:
    """All rows of as many random units as fit into INDEPENDENCE_ROWS."""
    if len(log) <= INDEPENDENCE_ROWS:
        return log
    unit = log.unit if log.unit is not None else densify(log.file_row)
    rank = rng.permutation(int(unit.max()) + 1)
    rows = np.bincount(rank[unit])
    kept = max(int(np.searchsorted(np.cumsum(rows), INDEPENDENCE_ROWS, side="right")), 1)
    return log.take(rank[unit] < kept)


def _top(codes: Codes, k: int) -> Codes:
    """Codes of the k most frequent values; one more for the rest."""
    _, codes = factorise(codes)
    order = np.argsort(-np.bincount(codes), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.minimum(np.arange(len(order)), k)
    return rank[codes]


def _tag_codes(log: Log, name: str) -> Codes:
    """Each row's combination of values of a tag dimension, as a code."""
    labels = ["|".join(values) for values in log.variants[name].to_pylist()]
    return factorise(np.array(labels, dtype=object))[1][log.variant]


def _residual(target: Codes, cell: Codes, count: Floats) -> Floats:
    """(n, values) whether the value was shown, less its share in the cell; sums to 0 in every cell."""
    width = int(target.max()) + 1
    n_cells = int(cell.max()) + 1
    shares = sums(cell * width + target, count, size=n_cells * width).reshape(n_cells, width)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-12)
    residual = -shares[cell]
    residual[np.arange(len(target)), target] += 1
    return np.asarray(residual, np.float64)


class _Crosses:
    """Pairs of columns of codes below 16, hashed with a sign into at most BUCKETS features."""

    def __init__(self, rng: np.random.Generator, pairs: list[tuple[int, int]]) -> None:
        self.pairs = [pairs[i] for i in sorted(rng.permutation(len(pairs))[:MAX_CROSSES])]
        self.width = BUCKETS if pairs else 0
        self.bucket = rng.integers(BUCKETS, size=len(self.pairs) * 256)
        self.sign = rng.choice([-1.0, 1.0], size=len(self.pairs) * 256)

    def encode(self, left: Codes, right: Codes) -> NDArray[np.float32]:
        """(n, width) features of the pairs of left and right columns."""
        if not self.pairs:
            return np.zeros((len(left), 0), np.float32)
        i, j = np.array(self.pairs).T
        entry = left[:, i] * 16 + right[:, j] + np.arange(len(self.pairs)) * 256
        flat = self.bucket[entry] + np.arange(len(left))[:, None] * BUCKETS
        summed = np.bincount(flat.ravel(), self.sign[entry].ravel(), minlength=len(left) * BUCKETS)
        return summed.reshape(len(left), BUCKETS).astype(np.float32)


def _curvature(features: NDArray[np.float32], count: Floats) -> tuple[Floats, list[Floats]]:
    """Second moments of the features over all exposures, and their inverses on the training folds, one per ridge."""
    gram = np.asarray(features.T @ (features * count[:, None].astype(np.float32)), np.float64)
    identity = np.eye(len(gram)) * np.trace(gram) / len(gram)
    return gram, [np.linalg.inv(gram * (1 - 1 / FOLDS) + ridge * identity) for ridge in RIDGES]


def _newton_gain(totals: NDArray[np.float32], share: Floats, curvature: tuple[Floats, list[Floats]]) -> Floats:
    """(ridges, K) held-out gain of one ridge Newton step per value from its sums (F, d, K) over folds. The step is
    taken on the other folds; the curvature is the features' second moments times the value's share (of a multinomial's
    diag(p) − pp' the second part does nothing here: residuals sum to 0)."""
    gram, inverses = curvature
    held_out = np.concatenate(list(totals), axis=1).astype(np.float64)  # (d, F·K)
    train = np.tile(totals.sum(axis=0), FOLDS) - held_out
    gains = []
    for inverse in inverses:
        step = inverse @ train
        gain = (step * (held_out - 0.5 / FOLDS * (gram @ step))).sum(axis=0)
        gains.append(gain.reshape(FOLDS, -1).sum(axis=0) / share)
    return np.stack(gains)
