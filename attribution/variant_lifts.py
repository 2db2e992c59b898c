"""Variants where the model chose them and where they were shown at random; and the best single one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import stats
from scipy.sparse import csr_array

from attribution.bucket_comparison import LEVEL, MIN_CLICKS, Exposures, Measured
from attribution.contrasts import Rating, jackknife_error, without_each
from kaleidoscope import experiment
from kaleidoscope.experiment import MIN_UNITS
from kaleidoscope.exposure import logging_policy
from kaleidoscope.log import Codes, Floats, Log, factorise, sums
from kaleidoscope.policy_value import LoggedRows, Weighting, choose_weighting, dr_scores, estimate, policy_weights
from kaleidoscope.vocabulary import Bucket

FOLDS = 5
LISTED = 200  # variants, at most


@dataclass(frozen=True)
class VariantCtr:
    """A variant where the model chose it, and where it was shown at random."""

    variant_id: str
    exposures: int
    share: float  # of what the model chose
    random_exposures: int
    ctr: Measured | None
    random_ctr: Measured | None
    lift: Measured | None  # chosen over random, at the model's time
    q_value: float | None


@dataclass(frozen=True)
class Split:
    """The lift of the model, as the part that one variant for everybody brings, and the rest: they add up."""

    over: str  # control; or random, where the log has no control
    lift: Measured
    best_single: Measured
    personalisation: Measured
    regret: float  # what of `best_single` the best variant may have over the one that the log makes one pick
    best_variant: str  # that the random bucket would have one choose
    weighting: str  # how exposures were matched to it
    own_time: (
        bool  # whether the random bucket was there in the model's time; else its earlier ratio to control is taken
    )


@dataclass(frozen=True)
class Concentration:
    """How many variants carry half of what the model's bucket shows, and half of its lift."""

    variants: int
    half_of_exposures: int
    half_of_lift: int | None


def chosen_rows(e: Exposures) -> Codes:
    """The rows of the model's bucket whose variant the model chose, as far as propensities tell: what was drawn at
    random has the least propensity, and less than uniform."""
    rows = e.rows(Bucket.MODEL.value)
    if e.log.propensity is None or not len(rows):
        return rows
    p = e.log.propensity[rows]
    at_random = len(np.unique(e.log.variant[e.rows(Bucket.RANDOM.value)]))
    return rows[p > min(2 * float(p.min()), 1 / max(1, at_random))]


def variants(e: Exposures) -> tuple[tuple[VariantCtr, ...], Measured | None, bool]:
    """The variants that the model chose most, their rates when chosen over when shown at random, all together and
    each; and whether the two are compared at the same time."""
    chosen, at_random = chosen_rows(e), e.rows(Bucket.RANDOM.value)
    shift = _shift(e, chosen, at_random)
    timed = shift is not None
    shift = np.zeros(e.replicates + 1) if shift is None else shift
    n_variants, variant = e.log.n_variants, e.log.variant
    shown = sums(variant[chosen], e.log.count[chosen], size=n_variants)
    arms = [_by_variant(e, rows) for rows in (chosen, at_random)]
    shift_variance = jackknife_error(shift) ** 2
    ids = e.log.variants["variant_id"].to_pylist()
    listed = []
    for v in [int(v) for v in np.argsort(-shown, kind="stable")[:LISTED] if shown[v] > 0]:
        here, there = (experiment.ratio(of(v)) for of in arms)
        lift = None
        if here.se is not None and there.se is not None and here.rate and there.rate:
            log_ratio = math.log(here.rate / there.rate) - float(shift[0])
            se = math.sqrt((here.se / here.rate) ** 2 + (there.se / there.rate) ** 2 + shift_variance)
            half = float(stats.norm.isf((1 - LEVEL) / 2)) * se
            middle, low, high = (math.expm1(log_ratio + x) for x in (0.0, -half, half))
            lift = Measured(middle, low, high, 2 * float(stats.norm.sf(abs(log_ratio) / se)) if se > 0 else 1.0)
        listed.append(
            VariantCtr(
                str(ids[v]), round(shown[v]), float(shown[v] / shown.sum()), round(arms[1](v).x), _rate_of(here),
                _rate_of(there), lift, None,
            )
        )  # fmt: skip
    tested = [i for i, one in enumerate(listed) if one.lift is not None]
    if tested:
        q = stats.false_discovery_control([_known(one.lift.p_value) for one in listed if one.lift is not None])
        for i, q_value in zip(tested, q.tolist(), strict=True):
            listed[i] = replace(listed[i], q_value=q_value)
    return tuple(listed), _targeting(e, chosen, at_random, shown, shift), timed


def _by_variant(e: Exposures, rows: Codes) -> Callable[[int], experiment.ArmSums]:
    """The sums by unit of a variant among the rows."""
    n, variant = e.log.n_variants, e.log.variant[rows]
    count, y, x = e.log.count[rows], e.clicks[rows], e.size[rows]
    if e.log.unit is None:  # every exposure is one: count identical ones of the row's weight
        w = e.log.weight[rows]
        columns = [count, y, y * w, x, x * w, y * w]
    else:
        pairs, pair = factorise(e.unit[rows] * n + variant)
        variant, y, x = pairs % n, sums(pair, y), sums(pair, x)
        columns = [np.ones(len(pairs)), y, y * y, x, x * x, x * y]
    table = np.stack([sums(variant, column, size=n) for column in columns], axis=1)
    return lambda v: experiment.ArmSums(int(table[v, 0]), *table[v, 1:].tolist())


def _targeting(e: Exposures, chosen: Codes, at_random: Codes, shown: Floats, shift: Floats) -> Measured | None:
    """Clicks of what was chosen over those that the same variants would have got at random, at the same time."""
    seen = sums(e.log.variant[at_random], e.size[at_random], size=e.log.n_variants) > 0
    both = np.flatnonzero((shown > 0) & seen)
    place = np.full(e.log.n_variants, -1)
    place[both] = np.arange(len(both))

    def total(rows: Codes, amount: Floats) -> Floats:
        rows = rows[place[e.log.variant[rows]] >= 0]
        key = place[e.log.variant[rows]] * e.replicates + e.replicate[rows]
        size = len(both) * e.replicates
        return without_each(sums(key, amount[rows], size=size).reshape(len(both), e.replicates))

    n, c = total(chosen, e.size), total(chosen, e.clicks)
    n0, c0 = total(at_random, e.size), total(at_random, e.clicks)
    if min(c[:, 0].sum(), c0[:, 0].sum()) < MIN_CLICKS:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.log(np.where(n0 > 0, c, 0).sum(axis=0) / np.nan_to_num(n * c0 / n0).sum(axis=0)) - shift
    return e.measured(log_ratio)


def _shift(e: Exposures, chosen: Codes, at_random: Codes) -> Floats | None:
    """(1 + R,) by how much (as a logarithm) the random bucket's rate, at the times of what was chosen, differs from
    its rate over all; None where too little is known."""
    window = e.window(Bucket.MODEL.value, Bucket.RANDOM.value)
    if window is None or e.log.time is None:
        return None
    here, there = e.within(chosen, window), e.within(at_random, window)
    if e.units(there) < MIN_UNITS or float(e.clicks[there].sum()) < MIN_CLICKS or not len(here):
        return None
    most = 24

    def total(rows: Codes, amount: Floats) -> Floats:
        place = window.blocks(e.log.time[rows], most) * e.replicates + e.replicate[rows]  # type: ignore[index]
        return without_each(sums(place, amount[rows], size=most * e.replicates).reshape(most, e.replicates))

    shown, n, c = total(here, e.size), total(there, e.size), total(there, e.clicks)
    whole = [without_each(sums(e.replicate[at_random], x[at_random], size=e.replicates)) for x in (e.clicks, e.size)]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.nan_to_num(shown * c / n).sum(axis=0) / np.where(n > 0, shown, 0.0).sum(axis=0)
        out = np.log(rate) - np.log(whole[0] / whole[1])
    return np.asarray(out) if np.isfinite(out).all() else None


def split(e: Exposures) -> Split | str:
    """The model's lift as what the best single variant brings and the rest; why not, where it cannot be known."""
    model, at_random = Bucket.MODEL.value, Bucket.RANDOM.value
    over = e.control if e.control in e.buckets else at_random
    lift = e.ratio(model, over)
    few = "{0} and {1} have too few units or clicks in common time (at least {2} and {3}). Log on."
    if lift is None:
        return few.format(model, over, MIN_UNITS, MIN_CLICKS)
    variety, own_time = np.zeros(e.replicates + 1), True
    if over != at_random:
        window = e.window(model, over)
        of_its_time = e.ratio(at_random, over, None if window is None else window.start)
        found = e.ratio(at_random, over) if of_its_time is None else of_its_time
        if found is None:
            return few.format(at_random, over, MIN_UNITS, MIN_CLICKS)
        variety, own_time = found, of_its_time is not None
    best = _best_single(e)
    if best is None:
        return (
            "The random bucket has too few exposures or clicks of what the best single variant shows (200 and 30)."
            " Log on at random, or show fewer variants."
        )
    single = variety + best.gain
    return Split(
        over,
        _sure(e.measured(lift)),
        _sure(e.measured(single)),
        e.difference(np.exp(lift) - np.exp(single)),
        float(math.exp(float(variety[0])) * best.regret),
        best.variant_id,
        best.weighting.value,
        own_time,
    )


def _best_single(e: Exposures) -> _Best | None:
    """The best single variant over random, cross-fitted: picked on four fifths of the units, valued on the last.

    That is what the picked variants bring, without the winner's curse. What the best one, whichever it is, has over
    them is added: the posterior mean of it, given all of the bucket. Where the pick is open, the folds' values hang
    together, which widens the error (the factor is that of `policy_value.gain`).
    """
    rows = e.rows(Bucket.RANDOM.value)
    log = e.log.take(rows)
    support = logging_policy(log, context=())
    logged = LoggedRows(
        log.reward.astype(np.float64), log.variant, support.propensity, log.count, log.weight, log.unit, support
    )
    tags = _tags(log)
    weighting = choose_weighting(logged, tags)
    fold, size = e.replicate[rows] % FOLDS, log.count * log.weight
    menus = [support.variant[a:b] for a, b in pairwise(support.indptr)]
    share = sums(support.choice_set, size, size=len(menus)) / size.sum()
    chosen, q_chosen, q_logged = np.empty(len(log), np.int64), np.empty(len(log)), np.empty(len(log))
    picks = []
    for f in range(FOLDS):
        mine = fold == f
        rate = Rating.fit(log.variant[~mine], size[~mine], log.reward[~mine], tags).rate
        picks.append(np.array([menu[rate[menu].argmax()] for menu in menus], np.int64))
        chosen[mine] = picks[f][support.choice_set[mine]]
        q_chosen[mine], q_logged[mine] = rate[chosen[mine]], rate[log.variant[mine]]
    scores = dr_scores(policy_weights(logged, chosen, weighting, tags), q_chosen, q_logged)
    if estimate(scores) is None:
        return None
    value, base = (
        without_each(sums(e.replicate[rows], size * x, size=e.replicates)) for x in (scores.value, log.reward)
    )
    if not ((value > 0).all() and (base > 0).all()):
        return None
    total = without_each(sums(e.replicate[rows], size, size=e.replicates))
    by_tags = weighting is not Weighting.MATCHED
    rating = Rating.fit(log.variant, size, log.reward, tags, cautious=by_tags)
    draws, picked = rating.draws(), np.array(picks)  # (D, N), (FOLDS, sets)
    regret = is_open = 0.0
    for s, menu in enumerate(menus):
        most = draws[:, menu].max(axis=1, keepdims=True)
        regret += float(share[s]) * float((most - draws[:, picked[:, s]]).mean())
        is_open += float(share[s]) * float((most > draws[:, picked[:, s]]).mean())
    gain = np.log((value / total + regret) / (base / total))
    widened = math.sqrt(1 + is_open * (FOLDS - 1) * 2 / (math.pi * math.sqrt(2 * FOLDS - 3)))
    if by_tags:  # what the picked variant has beside its tags is not in the value
        widened = math.hypot(widened, math.sqrt(rating.spread) / max(jackknife_error(gain), 1e-9))
    gain = gain[0] + widened * (gain - gain[0])
    best = [int(menu[rating.rate[menu].argmax()]) for menu in menus]
    variant = best[int(share.argmax())]
    more = regret * float(total[0] / base[0])
    return _Best(gain, more, str(log.variants["variant_id"][variant].as_py()), weighting)


def concentration(e: Exposures, lift: Measured | None) -> Concentration:
    """How many variants carry half of the model's exposures, and half of its lift."""
    rows = e.rows(Bucket.MODEL.value)
    n_variants = e.log.n_variants
    half = e.replicate[rows] % 2
    n, c = (
        sums(e.log.variant[rows] * 2 + half, x[rows], size=2 * n_variants).reshape(-1, 2) for x in (e.size, e.clicks)
    )
    shown = np.sort(n.sum(axis=1))[::-1]
    many = int(np.searchsorted(np.cumsum(shown), shown.sum() / 2 * (1 - 1e-12))) + 1
    carry = None
    if lift is not None and lift.ci_low > 0:
        more = c - n * (c.sum() / n.sum() / (1 + lift.value))  # (N, 2) clicks beyond those at the other rate
        # Variants are put in order by one half of the units and counted on the other: luck would look like a star.
        needed = [_until_half(more[np.argsort(-more[:, a], kind="stable"), 1 - a]) for a in (0, 1)]
        if all(k is not None for k in needed):
            carry = math.ceil(sum(k for k in needed if k is not None) / 2)
    return Concentration(int((shown > 0).sum()), many, carry)


class _Best(NamedTuple):
    """The best single variant: the logarithm of its rate over random's, (1 + R,); and what of random's rate
    it may have over those that were picked."""

    gain: Floats
    regret: float
    variant_id: str
    weighting: Weighting


def _tags(log: Log) -> csr_array:
    """(N, T) 1 where a variant carries a tag that varies."""
    row, column, columns = list[Codes](), list[Codes](), 0
    for dimension in log.schema.variant:
        owners: dict[str, list[int]] = {}
        for i, values in enumerate(log.variants[dimension].to_pylist()):
            for value in dict.fromkeys(values or ()):
                owners.setdefault(value, []).append(i)
        for value in sorted(owners):
            if len(owners[value]) < log.n_variants:
                row.append(np.array(owners[value], np.int64))
                column.append(np.full(len(owners[value]), columns))
                columns += 1
    of = [np.concatenate(x) if x else np.zeros(0, np.int64) for x in (row, column)]
    return csr_array((np.ones(len(of[0])), (of[0], of[1])), shape=(log.n_variants, columns))


def _until_half(amount: Floats) -> int | None:
    """How many of the first it takes to half of the sum; None where the sum is not positive."""
    total = float(amount.sum())
    if total <= 0:
        return None
    return int(np.argmax(np.cumsum(amount) >= total / 2)) + 1


def _known(p: float | None) -> float:
    return 1.0 if p is None else p


def _sure(found: Measured | None) -> Measured:
    assert found is not None  # the logarithms it is made of are finite
    return found


def _rate_of(found: experiment.Ratio) -> Measured | None:
    if found.rate is None or found.ci_low is None or found.ci_high is None:
        return None
    return Measured(found.rate, found.ci_low, found.ci_high)
