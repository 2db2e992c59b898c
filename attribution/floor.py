"""Who could never have seen what: exposures that were certain, and users whom some variants never reached.

No weight mends either. What is certain says nothing of tastes, and whoever could not have seen a variant is missing
from what is said of it. Sums of 1/propensity tell: over any users, those of each variant that all of them could have
seen add up to the number of their exposures (Horvitz & Thompson 1952).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import rel_entr

from kaleidoscope.errors import LogError
from kaleidoscope.log import Codes, Floats, Log, factorise, sums

CERTAIN = 1 - 1e-4  # a propensity above says that the action was certain: what else was shown would count as 10,000
TRACE = 0.01  # of the exposures, that may have been certain and are left out
FLOOR = 0.5  # of the variants shown in a stratum that mean(1/propensity) has to reach; and of a variant's own share
ALPHA = 1e-3  # of the correct logs that are refused at most, however many users and variants are looked at

_Number = NDArray[np.floating[Any]] | float
_REMEDY = (
    " what they would have thought of them is not in the log. Mix in a uniform share (epsilon) when you log, or"
    " attribute the random bucket alone."
)


# ── what was certain ────────────────────────────────────────────────────────────────────────────────────────────────


def uncertain(log: Log, stratum: Codes) -> NDArray[np.bool_] | None:
    """(n,) whether anything else could have been shown, where another variant was shown in the stratum; None: always.

    That much is known before anybody clicks: what is left speaks of the users whose exposure was drawn. What was
    certain for everybody at its time (before a second variant came) is left out too; but of the others at most a TRACE,
    or the log would speak of some of its users only: LogError. A log where every propensity is 1 does not say what was
    drawn, and is judged by what it shows.
    """
    if log.propensity is None:
        return None
    certain = log.propensity >= CERTAIN
    if not certain.any() or certain.all():
        return None
    pairs, pair = factorise(stratum * log.n_variants + log.variant)
    most = np.zeros(len(pairs))
    np.maximum.at(most, pair, log.propensity)
    # The most that anybody had of each variant: together 1 where everybody had the same.
    certain &= (sums(pairs // log.n_variants, most) > 1 + 2 * (1 - CERTAIN))[stratum]
    if not certain.any():
        return None
    rows = np.flatnonzero(certain)
    share = float(log.count[rows[_live(log, stratum, rows) > 1]].sum() / log.count.sum())
    if share > TRACE or certain.all():
        raise LogError(
            f"{log.path}: column {log.schema.propensity!r} has no floor: {share:.0%} of the exposures were"
            " certain (1), where others were shown other variants. Those users could never have seen these, and"
            f"{_REMEDY} Where it was not the user who decided but the place or a rule, name that column in `context` or"
            " `group`; or leave these rows out, and what is said is of the other users alone."
        )
    return ~certain


def _live(log: Log, stratum: Codes, rows: Codes) -> Floats:
    """(rows,) how many variants the stratum of each had at its time, from the first exposure of each to its last; all
    that it ever showed, where times are not known."""
    pairs, pair = factorise(stratum * log.n_variants + log.variant)
    of = pairs // log.n_variants
    shown = np.bincount(of)
    if log.time is None:
        return shown[stratum[rows]].astype(np.float64)
    times, moment = factorise(log.time)
    known = np.isfinite(log.time)
    first, last = np.full(len(pairs), len(times)), np.full(len(pairs), -1)
    np.minimum.at(first, pair[known], moment[known])
    np.maximum.at(last, pair[known], moment[known])
    step = len(times) + 2
    here = stratum[rows] * step + moment[rows]
    begun = np.searchsorted(np.sort(of * step + first), here, side="right")
    gone = np.searchsorted(np.sort(of * step + last + 1), here, side="right")
    return np.where(known[rows], begun - gone, shown[stratum[rows]]).astype(np.float64)


# ── whom variants never reached ─────────────────────────────────────────────────────────────────────────────────────


def require_floor(log: Log, stratum: Codes, shown: Codes) -> None:
    """Raise LogError where over all of the log 1/propensity stays below half of the variants `shown` by strata (S,)."""
    assert log.propensity is not None
    size = log.count * log.weight
    inverse, total = 1 / log.propensity, size.sum()
    mean = float(size @ inverse / total)
    if log.unit is None:
        variance = float(log.count @ (log.weight * (inverse - mean)) ** 2)
    else:  # a unit that is seen often may be one draw
        variance = float((sums(log.unit, size * (inverse - mean)) ** 2).sum())
    se = float(np.sqrt(variance) / total)
    wanted = float(shown[stratum] @ size / total)
    if mean + 3 * se < FLOOR * wanted:
        raise LogError(
            f"{log.path}: column {log.schema.propensity!r} has no floor: 1/propensity is {mean:.3g} on average (se"
            f" {se:.2g}), where {wanted:.3g} variants were shown. Some users could never have seen some variants, and"
            f"{_REMEDY}"
        )


@dataclass(frozen=True)
class _Doubt:
    """That a variant (None: variants at large) reached too few users of a value."""

    log_p: float
    stratum: int
    field: int
    value: int
    variant: int | None


def require_floor_of_users(
    log: Log,
    stratum: Codes,
    strata: Sequence[str],
    pairs: tuple[Codes, Codes],
    fields: Sequence[tuple[str, Sequence[str]]],
    codes: Sequence[Codes],
) -> None:
    """Raise LogError where users who share a value of a field (n,) could not have seen what their stratum showed.

    `fields`: the name and the values of each; `codes`: fields × (n,) which value a row has.

    `pairs`: the stratum × variants that occur, as numbers, and which of them each row is (n,).

    Two sums are looked at: mean(1/propensity) over a value's users in a stratum, which is to reach FLOOR of the
    variants shown there; and of each variant alone the sum of 1/propensity over its exposures, which is to reach FLOOR
    of its share of the whole stratum. A sum may be small by chance, as long as draws at the floor would not have been
    seen: how likely that is is bounded (Hoeffding 1963, theorem 1) by the least propensity of the stratum, over all
    that was looked at. A unit that is seen often is one draw, and of a log that names `time` variants are asked for
    only from their first exposure to their last.
    """
    assert log.propensity is not None
    inverse, size = 1 / log.propensity, log.count * log.weight
    known, pair = pairs
    of = known // log.n_variants
    shown = np.bincount(of)
    n, least, top = sums(stratum, log.count), np.ones(len(shown)), np.zeros(len(shown))
    np.minimum.at(least, stratum, log.propensity)
    np.maximum.at(top, stratum, log.propensity)
    # Where one variant had nearly all, the others share what is left, also if they were never drawn.
    most = 1 / np.minimum(least, np.maximum(1 - top, 1e-12) / np.maximum(shown - 1, 1))
    shortest = np.minimum(_log_p(n, 1, FLOOR * shown, most, least=1), _log_p(n, 0, FLOOR, most))
    wide = (shown > 1) & (shortest < np.log(ALPHA))  # where draws at the floor would be seen
    if not wide.any():
        return
    rows: slice | Codes = slice(None) if wide.all() else np.flatnonzero(wide[stratum])
    at, of_pair = np.cumsum(wide) - 1, np.cumsum(wide[of]) - 1
    where = np.flatnonzero(wide)
    variants, home = known[wide[of]] % log.n_variants, at[of[wide[of]]]
    s, v = at[stratum[rows]], of_pair[pair[rows]]
    count, weight = log.count[rows], size[rows]
    mass = weight * inverse[rows]
    share = np.minimum(1, sums(v, mass, size=len(home)) / sums(s, weight, size=len(where))[home])
    weighted = bool((log.weight != 1).any())
    doubts, tests = list[_Doubt](), 0
    for f, ((_, labels), code) in enumerate(zip(fields, codes, strict=True)):
        k = len(labels)
        cell, cell_pair = s * k + code[rows], v * k + code[rows]
        exposures = total = sums(cell, count, size=len(where) * k).reshape(-1, k)
        if weighted:
            total = sums(cell, weight, size=len(where) * k).reshape(-1, k)
        seen = sums(cell_pair, mass, size=len(home) * k).reshape(-1, k)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = np.add.reduceat(seen, np.searchsorted(home, np.arange(len(where)))) / total
            part = seen / total[home]
        found = (
            _log_p(exposures, mean, FLOOR * shown[where][:, None], most[where][:, None], least=1),
            _log_p(exposures[home], part, FLOOR * share[:, None], most[where][home][:, None]),
        )
        tests += int((exposures > 0).sum() + (exposures[home] > 0).sum())
        for i, value in np.argwhere(found[0] < np.log(ALPHA)).tolist():
            doubts.append(_Doubt(found[0][i, value], int(where[i]), f, value, None))
        for i, value in np.argwhere(found[1] < np.log(ALPHA)).tolist():
            doubts.append(_Doubt(found[1][i, value], int(where[home[i]]), f, value, int(variants[i])))
    level = np.log(ALPHA / max(tests, 1))
    for doubt in sorted((d for d in doubts if d.log_p < level), key=lambda d: d.log_p):
        (name, labels), users = fields[doubt.field], codes[doubt.field] == doubt.value
        said = _said(log, stratum, doubt, users, float(most[doubt.stratum]), level)
        if said:
            inside = f" in stratum {strata[doubt.stratum]!r}" if strata[doubt.stratum] else ""
            raise LogError(
                f"{log.path}: column {log.schema.propensity!r} has no floor for users of {name} ="
                f" {labels[doubt.value]}{inside}: {said}. They could hardly have seen them, and{_REMEDY} Where it"
                f" was not the user who decided but a rule or the time, name that column in `context` or `group`."
            )


def _said(log: Log, stratum: Codes, doubt: _Doubt, users: NDArray[np.bool_], most: float, level: float) -> str | None:
    """The doubt in figures, where it is left with a unit as one draw, and with variants asked for only while there."""
    assert log.propensity is not None
    there = stratum == doubt.stratum
    if doubt.variant is not None and log.time is not None:
        times = log.time[there & (log.variant == doubt.variant)]
        if np.isfinite(times).any():
            there &= ~((log.time < np.nanmin(times)) | (log.time > np.nanmax(times)))
    rows, whole = np.flatnonzero(there & users), np.flatnonzero(there)
    size = log.count * log.weight
    total, mass = size[rows].sum(), size / log.propensity
    if not total > 0:
        return None
    square = log.count[rows] * log.weight[rows] ** 2
    if log.unit is not None:
        square = sums(factorise(log.unit[rows])[1], size[rows]) ** 2
    n = total**2 / square.sum()
    if doubt.variant is None:
        shown = float(size[rows] @ _live(log, stratum, rows) / total)
        mean = float(mass[rows].sum() / total)
        kept = _log_p(n, mean, FLOOR * shown, most, least=1) < level
        return f"1/propensity is {mean:.3g} on average, where {shown:.3g} variants were shown" if kept else None

    def share(of: Codes) -> float:
        mine = of[log.variant[of] == doubt.variant]
        return float(mass[mine].sum() / size[of].sum())

    part, all_of_it = share(rows), share(whole)
    if not _log_p(n, part, FLOOR * min(1.0, all_of_it), most) < level:
        return None
    name = log.variants["variant_id"][doubt.variant].as_py()
    return (
        f"exposures of variant {name}, each counted 1/propensity, stand for {part:.0%} of theirs, and for"
        f" {all_of_it:.0%} of everybody's"
    )


def _log_p(n: _Number, mean: _Number, expected: _Number, most: _Number, *, least: float = 0) -> Floats:
    """A bound of log P(a mean of n is as small as `mean`), of independent numbers from `least` to `most` of which at
    least so much is expected; 0 where it is not small."""
    a, b = (np.clip((np.asarray(x) - least) / np.maximum(most - least, 1e-12), 0, 1) for x in (mean, expected))
    a = np.where(np.isfinite(a), np.minimum(a, b), b)
    return np.asarray(-n * (rel_entr(a, b) + rel_entr(1 - a, 1 - b)))
