"""The portrait as heat maps, and the click rates of crossings: what the report shows of segments × tags.

Fields, dimensions and segments with insights come first. What finds no place in a page is counted.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from markupsafe import Markup

from attribution.found import Found, key_of, log_ratio, sign_of
from attribution.pictures import (
    TITLED,
    Colours,
    Heat,
    HeatRow,
    depths,
    heat_map,
    interval,
    name,
    names,
    narrow,
    ordered,
    relative,
    share,
    value_of,
)

if TYPE_CHECKING:
    from attribution.analysis import Analysis
    from attribution.grid import GridCell
    from attribution.preference import PreferenceCell

COLUMNS = 10  # of a heat map: fits a printed page
IN_ROW = 40  # characters of a name beside a row of a heat map
ROWS = 24  # of a heat map, before the rest is folded away
MAX_CELLS = 20_000  # of the portrait that go into the page
OPEN_FIELDS = 2  # shown unfolded where nothing was found
LEAST = 10  # clicks, and exposures without one, that a cell has or should have if its number is to mean anything

TagParts = tuple[tuple[str, str], ...]  # (dimension, value) of a tag
Group = tuple[tuple[str, ...], Sequence[TagParts]]  # dimensions, and their tags


@dataclass(frozen=True)
class Block:
    """What one user field's segments prefer."""

    field: str
    anchor: str
    insights: int
    maps: list[Markup]
    more: list[Markup]  # folded away


@dataclass(frozen=True)
class Portrait:
    """The portrait of a page."""

    legend: Markup
    overview: Markup | None
    first: list[Block]
    rest: list[Block]
    cells: int
    left_out: int  # cells that are not in the page


def portrait_map(analysis: Analysis, found: Found) -> Portrait | None:
    """Heat maps of the shrunken preferences; None where there are none."""
    if analysis.preference is None or not analysis.preference.cells:
        return None
    by_field: dict[str, dict[str, dict[TagParts, PreferenceCell]]] = {}
    cells = [_known(cell, found, analysis.facts.positive_rate) for cell in analysis.preference.cells]
    for cell in cells:
        for field, label in cell.segment.items():
            by_field.setdefault(field, {}).setdefault(label, {})[tuple(cell.tag.items())] = cell
    strength = found.strength()
    known = [_shrunk(cell) for cell in cells]
    if all(value is None for value in known):
        return Portrait(Markup(), None, [], [], len(known), 0)
    colours = Colours.of(v for v in known if v is not None)

    def interest(field: str) -> tuple[float, float]:
        sizes = [abs(v) for row in by_field[field].values() for v in map(_shrunk, row.values()) if v is not None]
        return -max((s for (f, _), s in strength.items() if f == field), default=0.0), -max(sizes, default=0.0)

    titled, budget, left_out = len(known) <= TITLED, MAX_CELLS, 0
    first, rest = list[Block](), list[Block]()
    for field in sorted(by_field, key=interest):
        insights = any(field in insight.segment for insight in found.insights.values())
        block, used, missing = _block(
            field, f"field-{len(first) + len(rest)}", by_field[field], found, colours, titled, budget
        )
        budget, left_out = budget - used, left_out + missing
        if block is not None:
            (first if insights or (not found.insights and len(first) < OPEN_FIELDS) else rest).append(block)
    return Portrait(
        colours.legend, _overview(found, {b.field: b.anchor for b in first}), first, rest, len(known), left_out
    )


def _known(cell: PreferenceCell, found: Found, rate: float) -> PreferenceCell:
    """The cell; one with too little, and of which too little is to be expected at this click rate, is unknown."""
    if key_of(cell.segment, cell.tag) in found.insights:
        return cell
    clicks = max(cell.clicks, rate * cell.n)
    others = max(cell.n - cell.clicks, (1 - rate) * cell.n)
    return cell if min(clicks, others) >= LEAST else replace(cell, shrunk=None, shrunk_low=None, shrunk_high=None)


def _shrunk(cell: PreferenceCell) -> float | None:
    return math.log(cell.shrunk) if cell.shrunk is not None and cell.shrunk > 0 and math.isfinite(cell.shrunk) else None


def _block(
    field: str, anchor: str, segments: Mapping[str, Mapping[TagParts, PreferenceCell]],
    found: Found, colours: Colours, titled: bool, budget: int,
) -> tuple[Block | None, int, int]:  # fmt: skip
    """The heat maps of a field, how many cells they have, and how many found no place."""
    labels = list(segments)
    labels = [labels[i] for i in ordered(labels)]
    tags = list(dict.fromkeys(tag for label in labels for tag in segments[label]))
    groups: dict[tuple[str, ...], list[TagParts]] = defaultdict(list)
    for tag in tags:
        groups[tuple(dimension for dimension, _ in tag)].append(tag)
    hits = {key for key, insight in found.insights.items() if field in insight.segment}
    strength = {g: s for (f, g), s in found.strength().items() if f == field}
    order = sorted(groups, key=lambda g: -strength.get(g, 0.0))
    total = len(labels) * len(tags)
    kept = labels
    if len(labels) > ROWS:
        hit_labels = {label for segment, _ in hits for f, label in segment if f == field}
        size = {label: max((cell.n for cell in segments[label].values()), default=0) for label in labels}
        chosen = set(sorted(labels, key=lambda label: (label not in hit_labels, -size[label]))[:ROWS])
        kept = [label for label in labels if label in chosen]
    others = [label for label in labels if label not in set(kept)]

    def maps(labels: Sequence[str], groups_: Sequence[tuple[str, ...]]) -> list[Markup]:
        depth = depths(labels)
        drawn = []
        for part in _packed([(g, groups[g]) for g in groups_]):
            rows = [
                HeatRow(
                    value_of(label, IN_ROW),
                    [_heat(segments[label].get(tag), found, titled) for _, tags_ in part for tag in tags_],
                    depth[i],
                )
                for i, label in enumerate(labels)
            ]
            heads = [(names(g), [names([v for _, v in tag]) for tag in tags_])
                     for g, tags_ in part]  # fmt: skip
            drawn.append(heat_map(narrow(field), heads, rows, colours))
        return drawn

    now = [g for g in order if g in strength] or order
    if sum(len(groups[g]) for g in order) <= COLUMNS:
        now = order
    if not strength and sum(len(groups[g]) for g in now) > 3 * COLUMNS:
        now = order[:1]
    later = [g for g in order if g not in set(now)]
    wanted = [(kept, now), (kept, later), (others, order)]
    drawn, used = list[list[Markup]](), 0
    for rows, columns in wanted:
        size_ = len(rows) * sum(len(groups[g]) for g in columns)
        fits = size_ <= budget - used
        drawn.append(maps(rows, columns) if fits and rows and columns else [])
        used += size_ if fits else 0
    if not used:
        return None, 0, total
    return Block(field, anchor, len(hits & found.held), drawn[0], drawn[1] + drawn[2]), used, total - used


def _packed(
    groups: Sequence[Group],
) -> list[list[Group]]:
    """The groups, in their order, parted into tables of at most COLUMNS columns; long groups are cut."""
    tables: list[list[Group]] = []
    room = 0
    for group, tags in groups:
        for start in range(0, len(tags), COLUMNS):
            part = tags[start : start + COLUMNS]
            if len(part) > room:
                tables.append([])
                room = COLUMNS
            tables[-1].append((group, part))
            room -= len(part)
    return tables


def _heat(cell: PreferenceCell | None, found: Found, titled: bool) -> Heat:
    """A cell of the portrait; its mark is of the insight, which may differ from the raw preference."""
    value = None if cell is None else _shrunk(cell)
    if cell is None or value is None or cell.shrunk_low is None or cell.shrunk_high is None:
        return Heat(None)
    low, high, key = cell.shrunk_low, cell.shrunk_high, key_of(cell.segment, cell.tag)
    title = f"{interval(low - 1, high - 1)}, {cell.n:,} exposures" if titled else ""
    insight = found.insights.get(key)
    sign = 0 if insight is None else sign_of(insight)
    return Heat(value, sign, key in found.unsure, low > 1 or high < 1, title)


def _overview(found: Found, anchors: Mapping[str, str]) -> Markup | None:
    """User fields × tag dimensions: how many insights, and how strong the strongest is."""
    strength = found.strength()
    fields = [f for f in anchors if any(f == field for field, _ in strength)]
    held = [found.insights[key] for key in found.held]
    counts = Counter((field, tuple(insight.tag)) for insight in held for field in insight.segment)
    groups = sorted({g for _, g in strength}, key=lambda g: (-max(s for (_, h), s in strength.items() if h == g), g))
    if len(fields) * len(groups) < 2:
        return None
    top = max(strength.values())
    parts = []
    for start in range(0, len(groups), COLUMNS):
        shown = groups[start : start + COLUMNS]
        head = Markup("").join(Markup('<th scope="col"><span>{}</span></th>').format(names(g)) for g in shown)
        parts.append(
            Markup(
                '<div class="scroll"><table class="heat overview"><thead><tr><th scope="col">User field</th>{}</tr>'
                "</thead><tbody>"
            ).format(head)
        )
        for field in fields:
            cells = Markup("").join(
                Markup('<td class="s{}">{}</td>').format(math.ceil(4 * strength[field, g] / top), counts[field, g])
                if (field, g) in strength else Markup("<td>·</td>") for g in shown
            )  # fmt: skip
            parts.append(
                Markup('<tr><th scope="row"><a href="#{}">{}</a></th>{}</tr>').format(
                    anchors[field], name(field), cells
                )
            )
        parts.append(Markup("</tbody></table></div>"))
    return Markup("").join(parts)


def rate_maps(cells: Sequence[GridCell], found: Found, colours: Colours) -> list[tuple[Markup, list[Markup]]]:
    """Title and tables of each crossing: in a cell the click rate, coloured by its effect beyond the cell's parts."""
    blocks: dict[tuple[tuple[str, ...], tuple[str, ...]], list[GridCell]] = defaultdict(list)
    for cell in cells:
        blocks[tuple(cell.segment), tuple(cell.tag)].append(cell)
    return [
        (Markup("{} by {}").format(names(fields), names(dimensions)), _tables(inside, fields, found, colours))
        for (fields, dimensions), inside in blocks.items()
    ]


def _tables(cells: Sequence[GridCell], fields: Sequence[str], found: Found, colours: Colours) -> list[Markup]:
    """Tables of at most COLUMNS combinations of tags; a cell's number is the click rate, its colour the effect."""
    at = {(tuple(c.segment.values()), tuple(c.tag.values())): c for c in cells}
    rows = list(dict.fromkeys(segment for segment, _ in at))
    tags = list(dict.fromkeys(tag for _, tag in at))
    firsts = list(dict.fromkeys(tag[0] for tag in tags))
    tags.sort(key=lambda tag: firsts.index(tag[0]))

    def heat(segment: tuple[str, ...], tag: tuple[str, ...]) -> Heat:
        cell = at.get((segment, tag))
        if cell is None or cell.ctr is None:
            return Heat(None, title="" if cell is None else f"{cell.n:,} exposures, {cell.clicks:,} clicks")
        title = f"{cell.n:,} exposures"
        if cell.ctr_low is not None and cell.ctr_high is not None:
            title += f", click rate {share(cell.ctr_low)} to {share(cell.ctr_high)}"
        if cell.effect is not None and cell.ci_low is not None and cell.ci_high is not None:
            title += f", beyond its parts {relative(cell.effect)} ({interval(cell.ci_low, cell.ci_high)})"
        value = 0.0 if cell.effect is None else log_ratio(cell.effect)
        insight = found.crossed.get(key_of(cell.segment, cell.tag))
        return Heat(value, 0 if insight is None else sign_of(insight), title=title, words=share(cell.ctr))

    tables = []
    for start in range(0, len(tags), COLUMNS):
        part = tags[start : start + COLUMNS]
        groups = [(narrow(first), [names(tag[1:]) for tag in part if tag[0] == first])
                  for first in firsts if any(tag[0] == first for tag in part)]  # fmt: skip
        body = [
            HeatRow(Markup(", ").join(value_of(v, IN_ROW) for v in segment), [heat(segment, tag) for tag in part])
            for segment in rows
        ]
        tables.append(heat_map(Markup(", ").join(map(narrow, fields)), groups, body, colours))
    return tables
