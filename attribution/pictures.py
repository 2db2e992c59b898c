"""The pictures of the report, as HTML that needs nothing else: forest plots and heat maps. Nothing is estimated here.

They are tables whose cells are coloured or hold a strip of SVG: text stays text, on a phone and on paper as well.
Sign and significance never rest on colour alone. Everything typed by visitors and operators is escaped here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from markupsafe import Markup, escape

from kaleidoscope.wording import ends_of

MORE, LESS = "▲", "▼"
PERCENT = "\u00a0%"
LONGEST = 80  # characters of a name in a table; the whole name is its tooltip
IN_COLUMN = 30  # of one above a column, and after how many it may break
BREAK = 12
SPARED = 4  # characters that are not worth a line of their own
STEPS = (1.02, 1.05, 1.10, 1.20), (1.03, 1.10, 1.25, 1.50), (1.05, 1.20, 1.50, 2.00), (1.10, 1.50, 2.50, 5.00)
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 9.0, 24.0, 99.0)  # an odds ratio minus 1
BOUNDLESS = 7.0  # the logarithm of a ratio from which on it is as good as without a bound
APART = 22.0  # percent of a picture's width between two ticks
ROOM, SHORT = 27.0, 6  # the same where the picture is narrow, and the characters of a label there
TITLED = 6_000  # cells of a page up to which each has a tooltip
TYPED = re.compile(r"`([\w-][\w .,:=/-]*)`", re.ASCII)  # a setting or a command, in sentences
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def text(value: object) -> str:
    """Its text, without what no page may hold: control characters, also of direction, and halves of a character."""
    return UNPRINTABLE.sub("\ufffd", str(value))


def prose(sentence: str) -> Markup:
    """A sentence that was made elsewhere: numbers keep their minus and unit, what is to be typed is marked."""
    signed = re.sub(r"(?<![\w.])-(?=\d[\d.,]*)", "−", text(sentence))
    whole = str(escape(re.sub(r"(?<=\d) (?=%)", "\u00a0", signed)))
    return Markup(TYPED.sub(r"<code>\1</code>", whole))


def name(value: object, longest: int | None = LONGEST) -> Markup:
    """A name somebody typed: escaped, its writing direction kept to itself, cut where it is long."""
    whole = text(value)
    if not whole.strip():
        return Markup("<bdi>“{}”</bdi>").format(whole)
    if longest is None or len(whole) <= longest:
        return Markup("<bdi>{}</bdi>").format(whole)
    return Markup('<bdi title="{}">{}…</bdi>').format(whole, whole[: longest - 1])


def narrow(value: object) -> Markup:
    """A name above a column of a heat map: cut earlier, and its long words may break."""
    whole = text(value)
    whole = whole if whole.strip() else f"“{whole}”"
    shown = whole if len(whole) <= IN_COLUMN else f"{whole[: IN_COLUMN - 1]}…"
    parts = list[str]()
    for word in re.split(r"(?<=\s)", shown):
        pieces = re.split(r"(?<=[_-])", word) if len(word) > BREAK + SPARED else [word]
        for piece in pieces:
            size = BREAK if len(piece) > BREAK + SPARED else len(piece)
            parts += [piece[i : i + size] for i in range(0, len(piece), size or 1)]
    title = Markup(' title="{}"').format(whole) if shown != whole else ""
    return Markup("<bdi{}>{}</bdi>").format(title, Markup("<wbr>").join(parts))


def relative(effect: float) -> str:
    """+34 %, −5.2 %: an effect or ratio minus 1."""
    return f"{_signed(effect)}{PERCENT}"


def interval(low: float, high: float) -> str:
    """−52 to −27 %."""
    return f"{_signed(low)} to {relative(high)}"


def share(value: float, digits: int | None = None) -> str:
    """A share as a percentage: 5.03 %."""
    percent = 100 * value
    if digits is None:
        digits = 1 if percent >= 10 or percent == 0 else min(2 - math.floor(math.log10(abs(percent))), 4)
    return f"{percent:.{digits}f}{PERCENT}"


def _signed(effect: float) -> str:
    percent = 100 * effect
    digits = 0 if abs(percent) >= 9.95 else 1
    shown = f"{percent:+,.{digits}f}"
    return "0.0" if float(shown.replace(",", "")) == 0 else shown.replace("-", "−")


def value_of(label: str, longest: int | None = LONGEST) -> Markup:
    """A segment's value within its field: `below 41` for `[-inf, 41)`."""
    if ends_of(label) is None:
        return name(label, longest)
    low, high = label[1:-1].split(", ")
    if low == "-inf":
        return Markup("any number") if high == "inf" else Markup("below {}").format(high.replace("-", "−"))
    if high == "inf":
        return Markup("from {}").format(low.replace("-", "−"))
    return Markup("{} to {}").format(low.replace("-", "−"), high.replace("-", "−"))


def who(segment: Mapping[str, str], longest: int | None = LONGEST) -> Markup:
    """A segment in words: `age from 25 to 41 and gender = f`."""
    parts = []
    for field, label in segment.items():
        ends = ends_of(label)
        between = " = " if ends is None else " from " if math.isfinite(ends[0]) and math.isfinite(ends[1]) else " "
        parts.append(Markup("{}{}{}").format(name(field, longest), between, value_of(label, longest)))
    return Markup(" and ").join(parts)


def what(tag: Mapping[str, str], longest: int | None = LONGEST) -> Markup:
    """A tag in words: `tone = loud and style = flat`."""
    parts = [Markup("{} = {}").format(name(d, longest), name(v, longest)) for d, v in tag.items()]
    return Markup(" and ").join(parts)


def names(values: Iterable[object]) -> Markup:
    """Several of them above a column."""
    return Markup(" and ").join(map(narrow, values))


# ── forest plots ────────────────────────────────────────────────────────────────────────────────────────────────────


class Unit(Enum):
    """What an axis counts, and how it is written."""

    RATIO = "logarithms of ratios"  # written as what they are more or less than 1, in per cent
    SHARE = "shares"  # written in per cent
    SD = "standard deviations"

    def words(self, x: float) -> str:
        """A value, with its sign."""
        if self is Unit.SD:
            return "0" if x == 0 else f"{x:+.2g}".replace("-", "−")
        return relative(math.expm1(x) if self is Unit.RATIO else x)

    @property
    def steps(self) -> list[tuple[float, float]]:
        """Where ticks may be, below and above 0."""
        if self is Unit.RATIO:
            return [(-math.log1p(t), math.log1p(t)) for t in TICKS]
        return [(-t, t) for t in (0.01, 0.02, *TICKS[2:])]


@dataclass(frozen=True)
class Bar:
    """A row of a forest plot; value and interval count in the axis's unit, None where unknown."""

    label: Markup
    value: float | None
    low: float | None = None
    high: float | None = None
    n: float | None = None
    marked: bool = False  # an insight: filled, with a sign; others are hollow and muted
    unsure: bool = False  # an insight that only one method found, or that is disputed: hollow, its sign in brackets
    note: Markup | str = ""


@dataclass(frozen=True)
class Axis:
    """From −limit to limit, as percent of a picture's width."""

    limit: float
    unit: Unit = Unit.RATIO
    narrow: bool = False  # with room for few ticks

    @classmethod
    def of(cls, bars: Iterable[Bar], unit: Unit = Unit.RATIO, *, narrow: bool = False) -> Axis:
        """Wide enough for every value, and for most of every interval."""
        known = [(bar.value, bar.low, bar.high) for bar in bars if bar.value is not None]
        widest = max((abs(value) for value, _, _ in known), default=0.0)
        ends = [abs(end) for _, *reach in known for end in reach if end is not None and math.isfinite(end)]
        return cls(max(min(max(ends, default=0.0), max(2 * widest, 0.1)), widest * 1.05, 0.02), unit, narrow)

    def at(self, x: float) -> float:
        """Percent of the width."""
        return 50 + 47 * max(-1.0, min(1.0, x / self.limit))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Where, and what is written there; far enough apart to be read, on paper too."""
        chosen, apart = list[tuple[float, float]](), ROOM if self.narrow else APART
        for low, high in reversed(self.unit.steps):
            x = 47 * high / self.limit
            if self.narrow and len(self.unit.words(high)) > SHORT:
                continue
            if apart <= x <= 47 and all(abs(x - 47 * c / self.limit) >= apart for _, c in chosen):
                chosen.append((low, high))
        found = [(50.0, "0")]
        for low, high in chosen[: 1 if self.narrow else 2]:
            found += [(self.at(low), self.unit.words(low)), (self.at(high), self.unit.words(high))]
        return sorted(found)


def forest(
    bars: Sequence[Bar],
    axis: Axis | None = None,
    *,
    head: str = "Tag",
    value: str = "Odds of a click",
    even: bool = False,
) -> Markup:
    """A table with a row per bar: label, picture of the interval, both in numbers, exposures where known. `even`: no
    row is more than another, so none is muted."""
    axis = Axis.of(bars) if axis is None else axis
    counted = any(bar.n is not None for bar in bars)
    last = Markup('<th scope="col" class="number">Exposures</th>') if counted else ""
    rows = [
        Markup(
            '<table class="forest{}"><thead><tr><th scope="col">{}</th><th scope="col" class="plot">{}</th>'
            '<th scope="col">{}</th>{}</tr></thead><tbody>'
        ).format(" even" if even else "", head, _scale(axis, bars), value, last)
    ]
    row = Markup('<tr{}><th scope="row"><span>{}</span>{}</th><td class="plot">{}</td><td>{}</td>{}</tr>')
    count = Markup('<td class="number" data-label="Exposures">{}</td>')
    for bar in bars:
        hit = Markup(' class="hit"') if bar.marked else ""
        n = count.format("" if bar.n is None else f"{bar.n:,.0f}") if counted else ""
        note = Markup(' <span class="soft">{}</span>').format(bar.note) if bar.note else ""
        rows.append(row.format(hit, bar.label, note, strip(bar, axis), numbers(bar, axis.unit), n))
    return Markup("").join([*rows, Markup("</tbody></table>")])


def numbers(bar: Bar, unit: Unit = Unit.RATIO) -> Markup:
    """A bar in numbers: value and interval."""
    if bar.value is None:
        return Markup("unknown")
    sign = f"{_mark(bar.value, bar.unsure)} " if bar.marked else ""
    words = Markup('<b class="whole">{}{}</b>').format(sign, unit.words(bar.value))
    if bar.low is None or bar.high is None:
        return words
    high = unit.words(bar.high) if unit is not Unit.RATIO or bar.high < BOUNDLESS else "any"
    low = unit.words(bar.low).removesuffix(PERCENT if high.endswith(PERCENT) else "")
    return words + Markup(' <span class="range">({} to {})</span>').format(low, high)


def _scale(axis: Axis, bars: Sequence[Bar]) -> Markup:
    """The ticks' labels; nothing where nothing is drawn."""
    if all(bar.value is None for bar in bars):
        return Markup()
    words = "".join(
        f'<text x="{x:.1f}%" y="13" text-anchor="{"start" if x < 8 else "end" if x > 92 else "middle"}">'
        f"{escape(label)}</text>"
        for x, label in axis.ticks
    )
    return Markup(f'<svg class="strip" height="18" aria-hidden="true">{words}</svg>')


def strip(bar: Bar, axis: Axis) -> Markup:
    """One interval; nothing where it is unknown. The numbers beside it say the same: who listens to the page skips."""
    if bar.value is None:
        return Markup()
    parts = [f'<line class="{"zero" if x == 50 else "grid"}" x1="{x:.1f}%" x2="{x:.1f}%" y1="0" y2="100%"/>'
             for x, _ in axis.ticks]  # fmt: skip
    side = "more" if bar.value > 0 else "less"
    kind = f"{'maybe' if bar.unsure else 'hit'} {side}" if bar.marked else "rest"
    if bar.low is not None and bar.high is not None:
        a, b = axis.at(bar.low), axis.at(bar.high)
        parts.append(f'<line class="{kind}" x1="{a:.1f}%" x2="{b:.1f}%" y1="11" y2="11"/>')
        parts += [
            f'<text class="{kind}" x="{x}%" y="15.5" text-anchor="{anchor}">{arrow}</text>'
            for cut, x, anchor, arrow in (
                (bar.low < -axis.limit, 0, "start", "◂"),
                (bar.high > axis.limit, 100, "end", "▸"),
            )
            if cut
        ]
    parts.append(f'<circle class="{kind}" cx="{axis.at(bar.value):.1f}%" cy="11" r="{5 if bar.marked else 3.5}"/>')
    return Markup(f'<svg class="strip" height="22" aria-hidden="true">{"".join(parts)}</svg>')


# ── heat maps ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Heat:
    """A cell of a heat map: the logarithm of a ratio, None where unknown."""

    value: float | None
    sign: int = 0  # of an insight there: +1 or −1
    unsure: bool = False  # whether only one method found that, or it is disputed
    firm: bool = False  # its own interval is on one side
    title: str = ""  # the tooltip
    words: str | None = None  # what is written there; by default the ratio minus 1, in per cent


@dataclass(frozen=True)
class HeatRow:
    """A row: its label, how far it is indented, its cells."""

    label: Markup
    cells: Sequence[Heat]
    indent: int = 0


@dataclass(frozen=True)
class Colours:
    """From which ratio on each of the four tints is used, on either side."""

    steps: tuple[float, float, float, float]

    @classmethod
    def of(cls, values: Iterable[float]) -> Colours:
        """Those that use the tints up: the 98th percentile of |value| is about the darkest."""
        sizes = sorted(abs(v) for v in values)
        top = math.exp(sizes[int(0.98 * (len(sizes) - 1))]) if sizes else 1.0
        return cls(next((steps for steps in STEPS if top <= steps[-1] * 1.1), STEPS[-1]))

    def tint(self, value: float) -> str:
        """The class of a cell: u1..u4 above, d1..d4 below, none near 0."""
        level = sum(abs(value) >= math.log(step) for step in self.steps)
        return f"{'u' if value > 0 else 'd'}{level}" if level else ""

    @property
    def legend(self) -> Markup:
        """The tints with what they stand for, as a strip of cells."""
        edges = [math.log(s) for s in self.steps]
        cells = []
        for level in (4, 3, 2, 1):
            low, high = math.expm1(-edges[level - 1]), math.expm1(-edges[level]) if level < 4 else None
            cells.append((f"d{level}", f"to {relative(low)}" if high is None else relative(low)))
        cells.append(("", "about 0"))
        for level in (1, 2, 3, 4):
            low = math.expm1(edges[level - 1])
            cells.append((f"u{level}", f"from {relative(low)}" if level == 4 else relative(low)))
        inner = Markup("").join(Markup('<li class="{}">{}</li>').format(tint, words) for tint, words in cells)
        return Markup('<ul class="legend" aria-label="Colours">{}</ul>').format(inner)


def heat_map(
    corner: Markup | str,
    groups: Sequence[tuple[Markup, Sequence[Markup]]],
    rows: Sequence[HeatRow],
    colours: Colours,
) -> Markup:
    """A table: `groups` are the dimensions with the labels of their columns; numbers in the cells are per cent."""
    parts = [
        Markup('<div class="scroll"><table class="heat"><thead><tr><th scope="col" rowspan="2">{}</th>').format(corner)
    ]
    parts += [Markup('<th class="g" scope="colgroup" colspan="{}">{}</th>').format(len(c), g) for g, c in groups]
    parts.append(Markup("</tr><tr>"))
    starts = {sum(len(c) for _, c in groups[:i]) for i in range(len(groups))}
    labels = [label for _, columns in groups for label in columns]
    parts += [
        Markup('<th scope="col"{}><span>{}</span></th>').format(Markup(' class="g"') if i in starts else "", label)
        for i, label in enumerate(labels)
    ]
    parts.append(Markup("</tr></thead><tbody>"))
    for row in rows:
        pad = Markup(' class="i{}"').format(min(row.indent, 3)) if row.indent else ""
        parts.append(Markup('<tr><th scope="row"{}>{}</th>').format(pad, row.label))
        parts += [_heat_cell(cell, colours, i in starts) for i, cell in enumerate(row.cells)]
        parts.append(Markup("</tr>"))
    return Markup("").join([*parts, Markup("</tbody></table></div>")])


def _heat_cell(cell: Heat, colours: Colours, first: bool) -> Markup:
    tint = "none" if cell.value is None else colours.tint(cell.value)
    frame = "" if not cell.sign else "maybe" if cell.unsure else "hit"
    classes = " ".join(c for c in (tint, frame, "g" if first else "") if c)
    title = f' title="{escape(cell.title)}"' if cell.title else ""
    words = "·" if cell.value is None else _signed(math.expm1(cell.value)) if cell.words is None else cell.words
    if cell.sign:
        words = f"{_mark(cell.sign, cell.unsure)}\u00a0{words}"
    if cell.sign or cell.firm:
        words = f"<b>{words}</b>"
    head = f"<td class={_quoted(classes)}" if classes else "<td"
    return Markup(f"{head}{title}>{words}</td>")


def _mark(sign: float, unsure: bool) -> str:
    mark = MORE if sign > 0 else LESS
    return f"({mark})" if unsure else mark


def _quoted(classes: str) -> str:
    return f'"{classes}"' if " " in classes else classes


# ── ranges ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def depths(labels: Sequence[str]) -> list[int]:
    """How deep each range `[lo, hi)` lies within the others; 0 for what is no range."""
    ends = [ends_of(label) for label in labels]
    return [
        0 if e is None else sum(o is not None and o != e and o[0] <= e[0] and e[1] <= o[1] for o in ends) for e in ends
    ]


def ordered(labels: Sequence[str]) -> list[int]:
    """Positions: ranges by where they start, the widest first, what is no range in the order given and last."""
    ends = [ends_of(label) for label in labels]
    key = [(1, 0.0, 0.0, i) if e is None else (0, e[0], -e[1], i) for i, e in enumerate(ends)]
    return [k[3] for k in sorted(key)]
