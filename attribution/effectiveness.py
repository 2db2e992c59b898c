"""Why it works: the three doubts about a measured lift, each with its test and its numbers.

Is it fatigue or novelty (does the lift change with time, or with how often people have seen the scene)? Is it something
other than the UI (did the buckets hold the same people, products and hours)? Is it a few eye-catching variants (would
one variant for everybody have brought it too)? Errors are by unit throughout. The page for readers is
docs/effectiveness.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from typing import Any, TypeVar

from attribution import bucket_balance, lift_trends, variant_lifts
from attribution.bucket_balance import Balance, BucketLift, Moved, Products
from attribution.bucket_comparison import Exposures, Measured, joined
from attribution.contrasts import holm
from attribution.lift_trends import Direction, Slice, Trend
from attribution.variant_lifts import Concentration, Split, VariantCtr
from kaleidoscope import experiment
from kaleidoscope.experiment import Cohort
from kaleidoscope.log import Codes, Log, sums
from kaleidoscope.vocabulary import Bucket

__all__ = [
    "Balance", "BucketLift", "Concentration", "Design", "Direction", "Effectiveness", "EyeCatching", "Fatigue",
    "Judgement", "Measured", "Moved", "OtherCauses", "Products", "Ratio", "Slice", "Split", "Trend", "VariantCtr",
    "effectiveness",
]  # fmt: skip

Design = Mapping[str, float] | Sequence[Cohort[str]]

ALPHA = 0.05
RETURNED_SHARE = 0.01  # of the units may come back to a bucket that they had left

# ── results ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Judgement(StrEnum):
    """What the log says of a doubt."""

    NO_SIGN = "no_sign"
    SIGN = "sign"
    CANNOT_SAY = "cannot_say"


@dataclass(frozen=True)
class Fatigue:
    """Doubt 1: it is novelty that will wear off, or control that people are tired of."""

    verdict: Judgement
    reason: str
    trends: tuple[Trend, ...]
    missing: Mapping[str, str]  # what could not be looked at → why, and what to do
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """Whether units fell into buckets as designed."""

    units: Mapping[str, int]
    shares: Mapping[str, float]  # of the units
    expected: Mapping[str, float]  # units, if all had fallen exactly as designed
    p_value: float
    flagged: bool
    cohorts: tuple[Cohort[str], ...]  # that were assigned by shares of their own, and are compared with these


@dataclass(frozen=True)
class OtherCauses:
    """Doubt 2: the buckets differ in something other than the UI."""

    verdict: Judgement
    reason: str
    sample_ratio: Ratio | None
    split_p: float | None  # that the buckets' shares of new units were the same all the time
    balance: tuple[Balance, ...]  # smallest p first
    products: Products | None
    moved: Moved | None
    lifts: tuple[BucketLift, ...]
    missing: Mapping[str, str]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class EyeCatching:
    """Doubt 3: a few eye-catching variants would have done it."""

    verdict: Judgement
    reason: str
    variants: tuple[VariantCtr, ...]  # most shown first
    targeting: (
        Measured | None
    )  # how much more the model's users click what it chose than people click the same at random
    split: Split | None
    concentration: Concentration | None
    missing: Mapping[str, str]
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Effectiveness:
    """The three doubts about a lift."""

    fatigue: Fatigue
    other_causes: OtherCauses
    eye_catching: EyeCatching

    def to_json(self) -> dict[str, object]:
        """As summary.json holds it: plain numbers, null where something is not known."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return value.value if isinstance(value, StrEnum) else value


# ── the three doubts ────────────────────────────────────────────────────────────────────────────────────────────────


def effectiveness(log: Log, *, control: str = Bucket.CONTROL.value, shares: Design | None = None) -> Effectiveness:
    """The three doubts about the lift in a log whose buckets are named as `vocabulary.Bucket` names them.

    `control`: the bucket that lifts are over. `shares`: the designed shares of units by bucket, for the sample ratio:
    those of the whole log; or, where they changed or exposures were left out, the units of each release with its
    shares. What the log lacks is in `missing`, never an exception.
    """
    exposures = Exposures.of(log, str(control))
    fatigue = _fatigue(exposures)
    told = any(exposures.lack_of_time in sentence for sentence in fatigue.sentences)
    return Effectiveness(
        fatigue, _other_causes(exposures, shares, "" if told else exposures.lack_of_time), _eye_catching(exposures)
    )


def _fatigue(e: Exposures) -> Fatigue:
    missing: dict[str, str] = {}
    lack = e.lack(e.control)
    if lack:
        return Fatigue(Judgement.CANNOT_SAY, lack, (), {"trends": lack}, (lack,))
    found: list[Trend] = []
    for bucket in (name for name in e.buckets if name != e.control):
        for over in ("time", "exposures"):
            trend = lift_trends.trend(e, bucket, over)
            if isinstance(trend, str):
                missing[f"{bucket} over {over}"] = trend
            else:
                found.append(trend)
    adjusted = holm([1.0 if t.change.p_value is None else t.change.p_value for t in found])
    trends = tuple(
        replace(t, p_adjusted=p, direction=_direction(t.change.value, p)) for t, p in zip(found, adjusted, strict=True)
    )
    seen = [t for t in trends if t.direction is not Direction.NO_TREND]
    if not trends:
        verdict, reason = Judgement.CANNOT_SAY, " ".join(dict.fromkeys(missing.values()))
    elif seen:
        verdict = Judgement.SIGN
        reason = "; ".join(f"the lift of {t.bucket} {t.direction} with {_OVER[t.over]}" for t in seen)
        reason = f"{reason[0].upper()}{reason[1:]}."
    elif not any(t.clear for t in trends):
        verdict = Judgement.CANNOT_SAY
        reason = (
            "No trend is seen, but the ratio of the rates might have halved or doubled without being noticed: the log"
            " is too small or too short. Log on, with more units in control and random."
        )
    else:
        verdict = Judgement.NO_SIGN
        reason = "No trend is seen; what might have been missed is in the intervals."
    return Fatigue(verdict, reason, trends, missing, (*map(_trend_sentence, trends), *dict.fromkeys(missing.values())))


_OVER = {"time": "time", "exposures": "the number of exposures of a unit"}


def _direction(change: float, p: float) -> Direction:
    return Direction.NO_TREND if p > ALPHA else Direction.SHRINKS if change < 0 else Direction.GROWS


def _trend_sentence(trend: Trend) -> str:
    known = [(s.label, s.lift) for s in trend.slices if s.lift is not None]
    where = "" if trend.over == "time" else "exposure "
    ends = "".join(
        f"{mark}{where}{label}: {_interval(one)}"
        for mark, (label, one) in zip((" (", "; "), known[:: max(1, len(known) - 1)], strict=False)
    )
    ends = f"{ends})" if ends else ""
    change, p = trend.change, _p(trend.p_adjusted)
    span = f"{_signed(change.ci_low)} to {_signed(change.ci_high)}"
    if trend.direction is Direction.NO_TREND:
        return (
            f"{trend.bucket} over control: no trend of the lift with {_OVER[trend.over]} is seen{ends}; what may have"
            f" been missed is a change of the ratio by {span} per {trend.step} ({p})."
        )
    return (
        f"{trend.bucket} over control: the lift {trend.direction} with {_OVER[trend.over]}{ends}; the ratio of the"
        f" rates changes by {_signed(change.value)} per {trend.step} (95 % interval {span}; {p})."
    )


def _other_causes(e: Exposures, shares: Design | None, lack_of_time: str) -> OtherCauses:
    """`lack_of_time`: what the doubt before has not said of it."""
    names = e.buckets
    if len(names) < 2:
        lack = e.lack_of_buckets
        return OtherCauses(
            Judgement.CANNOT_SAY, lack, None, None, (), None, None, (), {"comparison": lack}, (lack,)
        )  # fmt: skip
    missing: dict[str, str] = {}
    if e.log.unit is None:
        missing["units"] = (
            "The log names no unit: errors are too small where people come back, whether the buckets held the same"
            " people is not tested, and who was in several is not known. Name the user's column in `unit`."
        )
    first = bucket_balance.first_exposures(e)
    split_p = bucket_balance.split_p(e, first)
    found = _sample_ratio(e, first, shares)
    ratio = None if isinstance(found, str) else found
    if isinstance(found, str):
        missing["sample_ratio"] = found
    changed = split_p is not None and split_p < experiment.SRM_ALPHA
    compared = bucket_balance.balance(e, first, hours=True)
    if not e.log.schema.user and not e.log.schema.context:
        missing["balance"] = (
            "The log has no user or context features: whether the buckets held the same people is not known. Name"
            " their columns in `user` and `context`."
        )
    products = bucket_balance.products(e)
    if products is None:
        missing["products"] = (
            "The log has no product: whether all buckets offered the same is not known. Name the column in `product`."
        )
    if e.log.time is None:
        compared_over = "Without times the buckets are compared over all of the log, and hours are not looked at."
        missing["time"] = f"{compared_over} {lack_of_time}".rstrip()
    untested = e.log.unit is None  # people who come back would look like many who are alike
    tests = [None if untested or (b.role == "time" and changed) else b.p_value for b in compared]
    p_products = None if products is None else products.p_value
    adjusted = holm([p for p in (*tests, p_products) if p is not None])
    left = iter(adjusted)
    compared = [replace(b, p_adjusted=None if p is None else next(left)) for b, p in zip(compared, tests, strict=True)]
    if products is not None and p_products is not None:
        p = next(left)
        products = replace(products, p_adjusted=p, held_fixed=p > ALPHA)
    balance = tuple(sorted(compared, key=lambda b: (b.p_adjusted is None, b.p_value)))
    moved = bucket_balance.moved(e)
    uneven = [b for b in balance if b.p_adjusted is not None and b.p_adjusted <= ALPHA]
    worst = next((b.feature for b in uneven if b.role != "time"), None)
    lifts, unknown = bucket_balance.lifts(e, worst)
    missing |= unknown
    wrong = []
    if ratio is not None and ratio.flagged:
        wrong.append("units did not fall into the buckets as designed")
    if uneven:
        wrong.append(f"the buckets differ in {joined([b.feature for b in uneven])}")
    if products is not None and not products.held_fixed:
        wrong.append("the buckets did not show the products in the same shares")
    if moved is not None and (moved.returned_share or 0.0) > RETURNED_SHARE:
        wrong.append("units did not stay in their bucket")
    if wrong:
        verdict, reason = Judgement.SIGN, f"{_upper(joined(wrong))}."
    elif (
        ratio is None
        and not any(b.p_adjusted is not None for b in balance)
        and (products is None or products.p_value is None)
    ):
        verdict = Judgement.CANNOT_SAY
        reason = " ".join(missing[n] for n in ("sample_ratio", "balance", "units", "products") if n in missing)
    else:
        verdict = Judgement.NO_SIGN
        reason = "Nothing that was looked at differs between the buckets beyond chance."
    sentences = (*_ratio_sentences(ratio, split_p), *_balance_sentences(balance, changed=changed))
    sentences += (*_product_sentences(products), *_moved_sentences(moved), *map(_lift_sentence, lifts))
    return OtherCauses(
        verdict, reason, ratio, split_p, balance, products, moved, lifts, missing, (*sentences, *missing.values())
    )  # fmt: skip


def _sample_ratio(e: Exposures, first: Codes, shares: Design | None) -> Ratio | str:
    """The sample ratio, or why it is not known."""
    if shares is None:
        return (
            "The log does not say which share of the units each bucket was to get. Give the designed shares:"
            " `--shares control=.1,random=.2,model=.7`."
        )
    if isinstance(shares, Mapping):
        if e.log.unit is None:
            return "Without units it is not known how they fell into the buckets. Name the user's column in `unit`."
        counts = dict(zip(e.names, sums(e.bucket[first], size=len(e.names)).astype(int).tolist(), strict=True))
        shares = [Cohort("all", counts, {str(name): float(share) for name, share in shares.items()})]
    cohorts = tuple(one for one in shares if sum(one.units.values()))
    if not cohorts:
        return "No release is known to have been seen by anybody: how units fell is not known. Choose a longer period."
    found = experiment.srm_of(cohorts, sequential=False)
    if found is None:
        return "By design one bucket was to get all units: there is no ratio. Give others a share."
    units, expected = _over_all([one.units for one in cohorts]), _over_all([one.expected for one in cohorts])
    observed = {name: n / found.units for name, n in units.items()}
    p = found.always_valid_p if found.p_value is None else found.p_value
    return Ratio(units, observed, expected, p, found.flagged, cohorts)


Number = TypeVar("Number", int, float)


def _over_all(parts: Iterable[Mapping[str, Number]]) -> dict[str, Number]:
    """The sums by bucket, in the order in which buckets are named everywhere."""
    found: dict[str, Number] = {}
    for part in parts:
        for name, n in part.items():
            found[name] = found[name] + n if name in found else n
    order = [*(one.value for one in Bucket), *found]
    return {name: found[name] for name in dict.fromkeys(order) if name in found}


def _ratio_sentences(ratio: Ratio | None, split_p: float | None) -> Iterable[str]:
    redesigned = False
    if ratio is not None:
        parts = [(name, n, ratio.expected.get(name, 0.0)) for name, n in ratio.units.items()]
        found = ", ".join(f"{name} {n:,} of {expected:,.0f} expected" for name, n, expected in parts)
        yes = "Units did not fall into the buckets as designed" if ratio.flagged else "Units fell as designed"
        redesigned = len({tuple(sorted(one.shares.items())) for one in ratio.cohorts}) > 1
        within = f", each of {len(ratio.cohorts)} releases by its own design" if len(ratio.cohorts) > 1 else ""
        yield f"{yes}{within}: {found} ({_p(ratio.p_value)})."
        if ratio.flagged and len(ratio.cohorts) > 1:
            new = experiment.srm_of(
                [replace(c, units=c.new, new=None) for c in ratio.cohorts if c.new], sequential=False
            )
            if new is not None and not new.flagged:
                yield (
                    "Of units new to the scene that is not seen: either known ones were lost, or those of one bucket"
                    " came back more often than others, and buckets no longer hold the same people."
                )
            worst = min(ratio.cohorts, key=_p_of)
            of = ", ".join(
                f"{name} {worst.units.get(name, 0):,} of {expected:,.0f}" for name, expected in worst.expected.items()
            )
            yield f"Furthest from it is {worst.name}: {of} ({_p(_p_of(worst))})."
    if redesigned and ratio is not None and not ratio.flagged:
        yield "The designed shares of the buckets changed during the log, so lifts are taken within equal times."
    elif split_p is not None and split_p < experiment.SRM_ALPHA:
        yield (
            f"The buckets' shares of new units changed during the log ({_p(split_p)}): a release may have done that, so"
            " lifts are taken within equal times. If none did, find out what took the units."
        )


def _p_of(cohort: Cohort[str]) -> float:
    """The p-value of one cohort's having fallen as designed."""
    found = experiment.srm_of([cohort], sequential=False)
    return 1.0 if found is None else found.always_valid_p if found.p_value is None else found.p_value


def _balance_sentences(balance: Sequence[Balance], *, changed: bool) -> Iterable[str]:
    tested = [b for b in balance if b.p_adjusted is not None]
    uneven = [b for b in tested if b.p_adjusted is not None and b.p_adjusted <= ALPHA]
    for b in uneven:
        value = "" if b.value is None else f"={b.value}"
        yield (
            f"{b.bucket} differs in {b.feature}{value}: by {b.smd.value:+.2f} standard deviations ({b.smd.ci_low:+.2f}"
            f" to {b.smd.ci_high:+.2f}; {_p(b.p_adjusted or 0.0)} after Holm over {len(tested)} comparisons)."
        )
    if tested and not uneven:
        largest = max(abs(b.smd.value) for b in tested)
        yield (
            f"Of {joined([b.feature for b in tested])} nothing differs between the buckets beyond chance"
            f" (smallest {_p(min(b.p_adjusted or 0.0 for b in tested))} after Holm; largest difference {largest:.2f}"
            " standard deviations)."
        )
    if changed and any(b.role == "time" for b in balance):
        yield "Hours of the day are not tested: the shares of the buckets changed during the log."


def _product_sentences(products: Products | None) -> Iterable[str]:
    if products is None:
        return
    if products.p_value is None:
        yield "All buckets showed the same single product."
    elif products.held_fixed:
        yield f"The buckets showed the products in the same shares ({_p(products.p_adjusted or products.p_value)})."
    else:
        yield (
            f"The buckets did not show the products in the same shares ({_p(products.p_adjusted or products.p_value)}):"
            " only lifts within equal products count."
        )


def _moved_sentences(moved: Moved | None) -> Iterable[str]:
    if moved is None or not moved.units:
        return
    back = (
        "" if moved.returned_share is None else f"; {_share(moved.returned_share)} came back to a bucket they had left"
    )
    yield (
        f"{moved.units:,} units ({_share(moved.share)}, with {_share(moved.exposures_share)} of the exposures) were in"
        f" several buckets{back}. They count where they are at each exposure, and may still be under the influence of"
        " what they saw before, which draws lifts towards 0."
    )


def _lift_sentence(one: BucketLift) -> str:
    fixed = "".join(f"; within equal {name} {_interval(found)}" for name, found in one.held_fixed.items())
    return f"{one.bucket} over control: {_interval(one.crude)} as it is{fixed}."


def _eye_catching(e: Exposures) -> EyeCatching:
    lack = e.lack(Bucket.MODEL.value, Bucket.RANDOM.value)
    if lack:
        return EyeCatching(
            Judgement.CANNOT_SAY, lack, (), None, None, None, {"variants": lack, "split": lack}, (lack,)
        )  # fmt: skip
    missing: dict[str, str] = {}
    if e.log.propensity is None:
        missing["propensity"] = (
            "The log has no propensities: what the model's bucket drew at random counts as chosen. Name the column in"
            " `propensity`."
        )
    variants, targeting, timed = variant_lifts.variants(e)
    if not timed:
        missing["time"] = (
            "The random bucket has too few clicks in the model's time, or times are not known: variants at random are"
            " taken as they did whenever it ran."
        )
    split = variant_lifts.split(e)
    concentration = variant_lifts.concentration(e, None if isinstance(split, str) else split.lift)
    if isinstance(split, str):
        missing["split"] = split
        sentences = _variant_sentences(variants, targeting, concentration, timed=timed)
        return EyeCatching(
            Judgement.CANNOT_SAY, split, variants, targeting, None, concentration, missing,
            (*sentences, *missing.values()),
        )  # fmt: skip
    if split.lift.ci_low <= 0:
        verdict, reason = Judgement.CANNOT_SAY, "There is no sure lift of the model that could be explained."
    elif split.personalisation.ci_low > 0:
        verdict, reason = Judgement.NO_SIGN, "The model brings more than the best single variant would have brought."
    elif split.best_single.ci_low > 0:
        verdict = Judgement.SIGN
        reason = "One variant for everybody brings a sure lift, and that choosing adds to it is not shown."
    else:
        verdict = Judgement.CANNOT_SAY
        reason = (
            "Neither what the best single variant brings nor what choosing adds is sure. Log on, with more units in"
            f" {split.over} and random."
        )
    sentences = (_split_sentence(split), *_variant_sentences(variants, targeting, concentration, timed=timed))
    return EyeCatching(
        verdict, reason, variants, targeting, split, concentration, missing, (*sentences, *missing.values())
    )


def _split_sentence(split: Split) -> str:
    return (
        f"Of the model's lift over {split.over}, {_interval(split.lift)}, the best single variant would have brought"
        f" {_interval(split.best_single)} and choosing per user brings the other {_interval(split.personalisation)},"
        f" as shares of {split.over}'s rate."
    )


def _variant_sentences(
    variants: Sequence[VariantCtr],
    targeting: Measured | None,
    concentration: Concentration | None,
    *,
    timed: bool,
) -> Iterable[str]:
    if targeting is not None:
        yield (
            f"Where the model chose a variant, the click rate was {_interval(targeting)} against the same variants"
            f" shown at random{' at the same time' if timed else ''}."
        )
    tested = [v for v in variants if v.q_value is not None and v.lift is not None]
    if tested:
        sure = [v.lift.value for v in tested if v.lift is not None and (v.q_value or 0.0) <= ALPHA]
        yield (
            f"Of {len(tested)} variants with enough of both, {sum(x > 0 for x in sure)} do surely better where the"
            f" model chose them and {sum(x < 0 for x in sure)} surely worse (q ≤ {ALPHA})."
        )
    if concentration is not None:
        lift = concentration.half_of_lift
        carried = "" if lift is None else f", {lift} half of its lift"
        yield (
            f"{concentration.half_of_exposures} of {concentration.variants} variants carry half of what the model's"
            f" bucket shows{carried}."
        )


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _signed(share: float) -> str:
    percent = 100 * share
    return f"{percent:+.0f} %" if abs(percent) >= 99.5 else f"{percent:+.1f} %"


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"


def _interval(found: Measured) -> str:
    return f"{_signed(found.value)} ({_signed(found.ci_low)} to {_signed(found.ci_high)})"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
