"""The three doubts about a lift, as the report shows them; attribution.effectiveness is where they are tested."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from markupsafe import Markup

from attribution.found import log_ratio
from attribution.pictures import Axis, Bar, Unit, forest, name, share, text

if TYPE_CHECKING:
    from attribution.effectiveness import Effectiveness, EyeCatching, Fatigue, Measured, OtherCauses

LISTED = 25  # rows of a table
VARIANTS = 10  # of those, each with its tags
TAGS_SHOWN = 160  # characters of a variant's tags
UNEVEN = 0.05  # q, or p adjusted, up to which a difference is drawn as one


@dataclass(frozen=True)
class Doubt:
    """A question, what the log says of it, and what that rests on."""

    question: str
    verdict: str
    reason: str
    pictures: list[tuple[str, Markup]]  # caption, picture
    sentences: tuple[str, ...]


JUDGED = {"no_sign": "✓ No sign of it", "sign": "⚠ Signs of it", "cannot_say": "? Cannot say"}


def doubts(found: Effectiveness, carried: Mapping[str, Mapping[str, Sequence[str]]]) -> list[Doubt]:
    """The doubts in their order; `carried` says what tags variants carry: id → dimension → values."""
    fatigue, other, few = found.fatigue, found.other_causes, found.eye_catching
    return [
        Doubt("1. Will it wear off? Fatigue and novelty", JUDGED[fatigue.verdict], fatigue.reason, _trends(fatigue),
               _besides(fatigue)),
        Doubt("2. Is it something other than the UI?", JUDGED[other.verdict], other.reason, _comparisons(other),
               _besides(other)),
        Doubt("3. Is it only a few eye-catching variants?", JUDGED[few.verdict], few.reason,
               _eye_catching(few, carried), _besides(few)),
    ]  # fmt: skip


def _besides(doubt: Fatigue | OtherCauses | EyeCatching) -> tuple[str, ...]:
    """The sentences that the reason does not hold already, each once."""
    return tuple(s for s in dict.fromkeys(doubt.sentences) if s not in doubt.reason)


def _measured(
    label: Markup | str, found: Measured | None, unit: Unit, n: int | None = None, *, sure: bool = False
) -> Bar:
    """A row of an estimate; ratios are given as what they are more or less than 1."""
    if found is None:
        return Bar(Markup("{}").format(label), None, n=n, note="too few units or clicks")
    scale = log_ratio if unit is Unit.RATIO else float
    return Bar(
        Markup("{}").format(label), scale(found.value), scale(found.ci_low), scale(found.ci_high), n,
        sure and (found.ci_low > 0 or found.ci_high < 0),
    )  # fmt: skip


def _trends(fatigue: Fatigue) -> list[tuple[str, Markup]]:
    pictures = []
    for trend in fatigue.trends:
        over = "time" if trend.over == "time" else "how often a user has seen the scene"
        bars = [_measured(text(s.label), s.lift, Unit.RATIO, s.exposures) for s in trend.slices]
        if all(bar.value is None for bar in bars):
            continue
        head = "Time" if trend.over == "time" else "Exposure"
        pictures.append(
            (
                f"Lift of {text(trend.bucket)} over control, by {over}",
                forest(bars, head=head, value="Lift (95 % interval)", even=True),
            )
        )
    return pictures


def _comparisons(other: OtherCauses) -> list[tuple[str, Markup]]:
    pictures = []
    if other.sample_ratio is not None:
        ratio = other.sample_ratio
        words = "as designed" if not ratio.flagged else "not as designed"
        units = [
            (b, f"{n:,}", f"{ratio.expected.get(b, 0.0):,.0f}", share(ratio.shares.get(b, 0.0)))
            for b, n in ratio.units.items()
        ]
        pictures.append(
            (
                f"Units by bucket: {words} (p = {_p(ratio.p_value)})",
                _table(("Bucket", "Units", "As designed", "Share"), units),
            )
        )
    if other.balance:
        bars = []
        for b in other.balance[:LISTED]:
            label = name(b.feature) if b.value is None else Markup("{} = {}").format(name(b.feature), name(b.value))
            p = "not compared" if b.p_adjusted is None else f"p = {_p(b.p_adjusted)}"
            bar = _measured(label, b.smd, Unit.SD)
            uneven = b.p_adjusted is not None and b.p_adjusted <= UNEVEN
            bars.append(replace(bar, marked=uneven, note=f"{text(b.bucket)}, {p}"))
        axis = Axis(max(Axis.of(bars, Unit.SD).limit, 0.25), Unit.SD)
        left = len(other.balance) - len(bars)
        more = f"; {left} more, which differ less, are not drawn" if left else ""
        pictures.append((
            "Who and what the buckets held: the largest difference from the other buckets, in standard deviations (p"
            f" adjusted for all of them){more}", forest(bars, axis, head="Feature", value="Difference", even=True),
        ))  # fmt: skip
    if other.products is not None:
        shares = other.products.shares
        products = list(dict.fromkeys(p for of in shares.values() for p in of))
        rows = [(p, *(share(of.get(p, 0.0)) for of in shares.values())) for p in products[:LISTED]]
        caption = "Shares of the products by bucket" + ("" if other.products.held_fixed else ": they differ")
        pictures.append((caption, _table(("Product", *shares), rows)))
    if other.lifts:
        bars = []
        for lift in other.lifts:
            bars.append(_measured(Markup("{}, as it is").format(name(lift.bucket)), lift.crude, Unit.RATIO))
            bars += [
                _measured(Markup("{}, within equal {}").format(name(lift.bucket), text(held)), found, Unit.RATIO)
                for held, found in lift.held_fixed.items()
            ]
        pictures.append(("Lift over control, as it is and with other things held fixed",
                         forest(bars, head="Bucket", value="Lift (95 % interval)", even=True)))  # fmt: skip
    return pictures


def _eye_catching(few: EyeCatching, carried: Mapping[str, Mapping[str, Sequence[str]]]) -> list[tuple[str, Markup]]:
    pictures = []
    if few.split is not None:
        split = few.split
        bars = [
            _measured("The model’s lift", split.lift, Unit.SHARE),
            _measured("of it, the best single variant", split.best_single, Unit.SHARE),
            _measured("of it, choosing per user", split.personalisation, Unit.SHARE),
        ]
        caption = f"The lift over {text(split.over)}, parted in two that add up; shares of its click rate"
        pictures.append(
            (caption, forest(bars, Axis.of(bars, Unit.SHARE), head="Part", value="Part (95 % interval)", even=True))
        )
    if few.variants:
        bars = []
        for v in few.variants[:VARIANTS]:
            sure = v.q_value is not None and v.q_value <= UNEVEN
            bar = replace(_measured(name(v.variant_id, 40), v.lift, Unit.RATIO, v.exposures), marked=sure)
            rates = f"chosen {_rate(v.ctr)}; at random {_rate(v.random_ctr)}; {share(v.share, 0)} of what was chosen"
            tags = ", ".join("|".join(values) for values in carried.get(v.variant_id, {}).values() if values)
            bars.append(replace(bar, note=f"{rates}; {text(tags)[:TAGS_SHOWN]}" if tags else rates))
        left = len(few.variants) - len(bars)
        more = f" ({left:,} more variants, shown less, are in variants.csv)" if left else ""
        pictures.append((
            f"Each variant where the model chose it, over the same variant shown at random{more}. Filled: q ≤ {UNEVEN}"
            " (of all that look as sure, at most one in twenty is expected to be chance)",
            forest(bars, head="Variant", value="More clicks than at random", even=True),
        ))  # fmt: skip
    return pictures


def _rate(found: Measured | None) -> str:
    return "unknown" if found is None else f"{share(found.value)} ({share(found.ci_low)} to {share(found.ci_high)})"


def _p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.2g}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A small table; the first column names the row."""
    head = Markup("").join(
        Markup('<th scope="col"{}>{}</th>').format(_NUMBER if i else "", name(h)) for i, h in enumerate(heads)
    )
    body = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            name(first), Markup("").join(Markup("<td{}>{}</td>").format(_NUMBER, cell) for cell in cells)
        ) for first, *cells in rows
    )  # fmt: skip
    return Markup(
        '<div class="scroll"><table class="plain"><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(head, body)


_NUMBER = Markup(' class="number"')
