"""Whether a combination can be looked at: the text fits, the image is not distorted, the colours can be told apart.

Pure functions of what materials hold. They look at materials in pairs, never at variants one by one, so that a check
of millions of combinations costs as much as one of the few hundred materials that they are made of.
"""

from __future__ import annotations

import bisect
import importlib.util
import itertools
import math
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeGuard

import numpy as np
import numpy.typing as npt
from PIL import ImageFont

from kaleidoscope.content import (
    Box,
    Content,
    Copy,
    Image,
    ImageRegion,
    Layout,
    Placeholder,
    Style,
    TextRegion,
    segments,
)
from kaleidoscope.errors import InputError, TooComplexError

TEXT_FITS, IMAGE_RATIO, CONTRAST = "text_fits", "image_ratio", "contrast"
CHECKS = (TEXT_FITS, IMAGE_RATIO, CONTRAST)
PARTS = ("title", "subtitle", "button")  # of a copy
MOST_LOOKS = 1_000_000  # of a material at a region, that the checks of a scene may take: some ten seconds
MIN_CONTRAST, MIN_CONTRAST_LARGE, LARGE_TEXT_PX = 4.5, 3.0, 24.0  # WCAG 2.2, success criterion 1.4.3

Option = tuple[str, str]  # slot, material
Slots = Mapping[str, Sequence[tuple[str, Content]]]


@dataclass(frozen=True)
class Failure:
    """A check that one combination does not pass, and the slots whose materials do not go together."""

    check: str
    slots: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class PairFailure:
    """Two materials that do not go together, whatever the other slots hold."""

    check: str
    left: Option
    right: Option
    message: str


@dataclass(frozen=True)
class CombinationFailure:
    """Two or more materials, of different slots, that do not go together."""

    check: str
    options: tuple[Option, ...]
    message: str


def check_variant(
    materials: Mapping[str, Content], placeholders: Sequence[Placeholder] = (), ruler: Ruler | None = None
) -> list[Failure]:
    """What one combination (slot → content) fails."""
    slots: Slots = {slot: [("", content)] for slot, content in materials.items()}
    found = combination_failures(slots, placeholders, ruler)
    return [Failure(f.check, tuple(slot for slot, _ in f.options), f.message) for f in found]


def pair_failures(
    slots: Slots, placeholders: Sequence[Placeholder] = (), ruler: Ruler | None = None
) -> list[PairFailure]:
    """The pairs of materials that fail a check whatever the other slots hold.

    What is missing: where a slot varies the font size, a copy may fit a layout at one size and not at another. That
    takes three materials to fail, and only `combination_failures` has it.
    """
    found = combination_failures(slots, placeholders, ruler)
    return [PairFailure(f.check, f.options[0], f.options[1], f.message) for f in found if len(f.options) == 2]


def combination_failures(
    slots: Slots,
    placeholders: Sequence[Placeholder] = (),
    ruler: Ruler | None = None,
    *,
    checks: Collection[str] = CHECKS,
) -> list[CombinationFailure]:
    """Every smallest set of materials that fails a check: pairs, and three where a slot varies the font size.

    `slots` are all slots of a scene with the materials each may hold, by id; styles of later slots override those of
    earlier ones, and styles of one part those of all. Text is exact. Contrast errs on the safe side where it would
    take three materials: a colour and a background from two slots are judged at the smallest text that any layout
    shows on them, and styles as if the copy had a text in every part that some copy has.

    Raises TooComplexError, before it measures anything, where these materials take more than MOST_LOOKS.
    """
    ruler = ruler or default_ruler()
    found: dict[tuple[str, tuple[Option, ...]], str] = {}
    layouts: dict[str, Boxes] = {
        slot: [(id, content, content.boxes()) for id, content in options if isinstance(content, Layout)]
        for slot, options in slots.items()
    }
    _refuse_endless(slots, [boxes for boxes in layouts.values() if boxes], checks)
    for slot, boxes in layouts.items():
        for name, check in zip(CHECKS, (_text_failures, _ratio_failures, _contrast_failures), strict=True):
            if boxes and name in checks:
                for failure in check(slots, slot, boxes, placeholders, ruler):
                    found.setdefault((failure.check, failure.options), failure.message)
    return [CombinationFailure(check, options, message) for (check, options), message in found.items()]


def _refuse_endless(slots: Slots, layouts: Sequence[Boxes], checks: Collection[str]) -> None:
    """Raise TooComplexError where the checks would take too long, by what there is to look at."""
    copies = {slot: sum(isinstance(content, Copy) for _, content in options) for slot, options in slots.items()}
    images = {slot: sum(isinstance(content, Image) for _, content in options) for slot, options in slots.items()}
    regions = [box.region for boxes in layouts for _, _, found in boxes for box in found]
    shown = {f"{slot}.{part}" for slot, count in copies.items() if count for part in PARTS}
    shown &= {region.show for region in regions if isinstance(region, TextRegion)}
    sizing = {show: _styles(slots, "font_size", show) for show in shown}
    colors, grounds = ({show: sum(_styles(slots, n, show).values()) for show in shown} for n in ("color", "background"))
    looks = 0
    for slot in slots:
        mine = [show for show in shown if show.partition(".")[0] == slot]
        sizes = math.prod({s: n for show in mine for s, n in sizing[show].items()}.values())
        for show in mine:
            texts = copies[slot] * sizes * (TEXT_FITS in checks)
            paints = (1 + colors[show]) * (1 + grounds[show]) * (CONTRAST in checks)
            looks += (texts + paints) * sum(region.show == show for region in regions)
    if IMAGE_RATIO in checks:
        looks += sum(images.get(region.show, 0) for region in regions if isinstance(region, ImageRegion))
    if looks > MOST_LOOKS:
        counts = {
            "layouts": sum(map(len, layouts)),
            "copies": sum(copies.values()),
            "images": sum(images.values()),
            "styles": sum(isinstance(content, Style) for options in slots.values() for _, content in options),
        }
        named = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        raise TooComplexError(
            f"design checks: {named} would have to be looked at {looks:,} times, each in every region that may show it;"
            f" at most {MOST_LOOKS:,} are worked out. Use fewer layouts, copies or font sizes in this scene, or split"
            " it, or turn off checks that it does not need."
        )


def _styles(slots: Slots, name: str, show: str) -> dict[str, int]:
    """Per slot with styles that set a property of a part, how many materials it may hold."""
    return {slot: len(options) for slot, options in slots.items() if _applies(slots, slot, name, show)}


Boxes = Sequence[tuple[str, Layout, Sequence[Box]]]


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _text_failures(
    slots: Slots, layout_slot: str, layouts: Boxes, placeholders: Sequence[Placeholder], ruler: Ruler
) -> Iterator[CombinationFailure]:
    shown = {box.region.show for _, _, boxes in layouts for box in boxes if isinstance(box.region, TextRegion)}
    for slot, copies in _texts(slots, placeholders, ruler).items():
        parts = [part for part in PARTS if f"{slot}.{part}" in shown]
        sizing = [s for s in slots if any(_applies(slots, s, "font_size", f"{slot}.{part}") for part in parts)]
        choices = list(itertools.product(*(slots[s] for s in sizing)))
        failing = np.zeros((len(copies), len(layouts), len(choices)), dtype=bool)
        messages: dict[tuple[int, int, int], str] = {}
        for (x, (layout_id, _, boxes)), part in itertools.product(enumerate(layouts), parts):
            here = [box for box in boxes if box.region.show == f"{slot}.{part}"]
            for (z, choice), box in itertools.product(enumerate(choices), here):
                assert isinstance(box.region, TextRegion)
                size = _font_size(box.region, choice)
                for y, (copy_id, texts) in enumerate(copies):
                    problem = texts[part] and _overflow(texts[part], box, size, ruler)
                    if problem and not failing[y, x, z]:
                        failing[y, x, z] = True
                        messages[y, x, z] = (
                            f"{_called(slot, copy_id)} in {_called(layout_slot, layout_id)}: the {part} {problem}"
                        )
        axes = (
            [(slot, id) for id, _ in copies],
            [(layout_slot, id) for id, _, _ in layouts],
            [tuple((s, id) for s, (id, _) in zip(sizing, choice, strict=True)) for choice in choices],
        )
        yield from _smallest(failing, messages, axes, single_choice=len(sizing) == 1)


def _smallest(
    failing: npt.NDArray[np.bool_],
    messages: Mapping[tuple[int, int, int], str],
    axes: tuple[Sequence[Option], Sequence[Option], Sequence[tuple[Option, ...]]],
    *,
    single_choice: bool,
) -> Iterator[CombinationFailure]:
    """Of copy × layout × font size, the pairs that fail with everything of the third, then what is left over."""
    copies, layouts, choices = axes
    left = failing.copy()
    for y, x in np.argwhere(failing.all(axis=2)).tolist():
        left[y, x] = False
        yield CombinationFailure(TEXT_FITS, (copies[y], layouts[x]), messages[y, x, 0])
    if single_choice and len(choices) > 1:
        for x, z in np.argwhere(failing.all(axis=0) & left.any(axis=0)).tolist():
            left[:, x, z] = False
            yield CombinationFailure(TEXT_FITS, (layouts[x], *choices[z]), messages[0, x, z])
        for y, z in np.argwhere(failing.all(axis=1) & left.any(axis=1)).tolist():
            left[y, :, z] = False
            yield CombinationFailure(TEXT_FITS, (copies[y], *choices[z]), messages[y, 0, z])
    for y, x, z in np.argwhere(left).tolist():
        yield CombinationFailure(TEXT_FITS, (copies[y], layouts[x], *choices[z]), messages[y, x, z])


def _texts(
    slots: Slots, placeholders: Sequence[Placeholder], ruler: Ruler
) -> dict[str, list[tuple[str, dict[str, str]]]]:
    """Per slot with copy: every copy's parts, placeholders replaced by the widest that may stand there."""
    widest = cache(lambda language: _widest_values(language, placeholders, ruler))
    return {
        slot: [(id, _widest(content, widest(content.language))) for id, content in options if isinstance(content, Copy)]
        for slot, options in slots.items()
        if any(isinstance(content, Copy) for _, content in options)
    }


def _widest_values(language: str, placeholders: Sequence[Placeholder], ruler: Ruler) -> dict[str, str]:
    """Per placeholder, the widest that may stand there in a copy of this language."""
    widest = {}
    for placeholder in placeholders:
        # A value as long as it may be: in words, of characters that are full width where the language's are.
        character = "国" if language.partition("-")[0] in ("zh", "ja", "ko") else "0"
        value = " ".join(
            character * min(10, placeholder.max_length - start) for start in range(0, placeholder.max_length, 10)
        )[: placeholder.max_length]
        widest[placeholder.name] = max(value, placeholder.fallback_in(language), key=ruler.width)
    return widest


def _widest(copy: Copy, widest: Mapping[str, str]) -> dict[str, str]:
    """The copy's parts, with these values for its placeholders."""
    texts = {}
    for part, text in copy.texts().items():
        try:
            found = segments(part, text)
        except InputError:  # materials.py refuses such copy; here it is measured as it stands
            found = [(text, None)]
        texts[part] = "".join(
            literal + (widest.get(name, f"{{{name}}}") if name else "") for literal, name in found
        ).strip()
    return texts


def _font_size(region: TextRegion, choice: Sequence[tuple[str, Content]]) -> float:
    styles = [style for _, style in choice if _overrides(style, "font_size", region.show)]
    styles.sort(key=lambda style: bool(style.applies_to))  # stable: the last of the most specific wins
    return float(styles[-1].value) if styles else region.font_size


def _overflow(text: str, box: Box, size: float, ruler: Ruler) -> str | None:
    """What does not fit, as the end of a sentence; None: all does."""
    region = box.region
    assert isinstance(region, TextRegion)
    room = min(region.max_lines, int(box.height / (region.line_height * size) + 1e-6))
    if room == 0:
        return f"needs {region.line_height * size:g} px for a line, and {region.show} is {box.height:g} px high."
    lines = ruler.lines(text, box.width / size, region.font)
    if lines is None:
        word = ruler.widest_word(text, region.font)
        return (
            f"holds {word[:40]!r}, {math.ceil(ruler.width(word, region.font) * size)} px wide at {size:g} px;"
            f" {region.show} is {box.width:g} px wide."
        )
    if lines > room:
        return f"takes {lines} lines at {size:g} px; {region.show} has room for {room}."
    return None


@dataclass(frozen=True)
class _Tokens:
    """What a line of text can break between, where each begins and ends on one line, in em."""

    starts: list[float]
    ends: list[float]
    widest: float
    widest_word: str


class Ruler:
    """Measures text in a font, in em. Without a path the font is DejaVu Sans, which comes with matplotlib.

    `fonts` are the fonts that regions may name. Characters that a font lacks count as 1 em (as CJK is), marks as 0.
    Letters are measured unshaped, which is a little wide for Arabic. Raises InputError for a file that is no font.
    """

    _MEASURED_PX = 1000
    _MAX_CACHED = 200_000

    def __init__(self, font: Path | None = None, fonts: Mapping[str, Path] | None = None) -> None:
        paths: dict[str | None, Path] = {None: font or _default_font()}
        paths.update((fonts or {}).items())
        self._fonts = {name: self._open(path, self._MEASURED_PX) for name, path in paths.items()}
        self._small = {name: self._open(path, 32) for name, path in paths.items()}
        self._missing_glyph = {name: self._drawn(name, "\U0010ffff") for name in paths}
        self._glyphs: dict[tuple[str | None, str], bool] = {}
        self._widths: dict[tuple[str | None, str], float] = {}
        self._lines: dict[tuple[str | None, str, float], int | None] = {}
        self._tokens: dict[tuple[str | None, str], _Tokens] = {}

    def width(self, text: str, font: str | None = None) -> float:
        """Width of a text on one line, in em."""
        font = font if font in self._fonts else None
        key = (font, text)
        if key not in self._widths:
            if len(self._widths) > self._MAX_CACHED:
                self._widths.clear()
            known = "".join(c for c in text if self._has(font, c))
            missing = sum(1 for c in text if not self._has(font, c) and unicodedata.category(c) not in _NO_WIDTH)
            self._widths[key] = self._fonts[font].getlength(known) / self._MEASURED_PX + missing
        return self._widths[key]

    def lines(self, text: str, width_em: float, font: str | None = None) -> int | None:
        """How many lines of a width the text takes; None: one of its words is wider than a line."""
        font = font if font in self._fonts else None
        key = (font, text, round(width_em, 4))
        if key not in self._lines:
            if len(self._lines) > self._MAX_CACHED:
                self._lines.clear()
            self._lines[key] = self._wrap(text, width_em + 1e-6, font)
        return self._lines[key]

    def words(self, text: str) -> list[str]:
        """What a line can break between: words, and each character of scripts that put no space between words."""
        return [token for word in text.split() for token in _break(word)]

    def widest_word(self, text: str, font: str | None = None) -> str:
        """The word that needs the widest line."""
        return self._measured(text, font if font in self._fonts else None).widest_word

    def _wrap(self, text: str, width_em: float, font: str | None) -> int | None:
        tokens = self._measured(text, font)
        if tokens.widest > width_em:
            return None
        lines, at = 0, 0
        while at < len(tokens.ends):
            at = bisect.bisect_right(tokens.ends, tokens.starts[at] + width_em, lo=at + 1)
            lines += 1
        return max(1, lines)

    def _measured(self, text: str, font: str | None) -> _Tokens:
        key = (font, text)
        if key not in self._tokens:
            if len(self._tokens) > self._MAX_CACHED:
                self._tokens.clear()
            self._tokens[key] = self._measure(text, font)
        return self._tokens[key]

    def _measure(self, text: str, font: str | None) -> _Tokens:
        space, at = self.width(" ", font), 0.0
        starts, ends, widest, widest_word = [], [], 0.0, ""
        for n, word in enumerate(text.split()):
            at += space if n else 0.0
            for token in _break(word):
                wide = self.width(token, font)
                starts.append(at)
                at += wide
                ends.append(at)
                if wide > widest:
                    widest, widest_word = wide, token
        return _Tokens(starts, ends, widest, widest_word)

    def _has(self, font: str | None, character: str) -> bool:
        key = (font, character)
        if key not in self._glyphs:
            if len(self._glyphs) > self._MAX_CACHED:
                self._glyphs.clear()
            blank = character.isspace()
            self._glyphs[key] = blank or self._drawn(font, character) != self._missing_glyph[font]
        return self._glyphs[key]

    def _drawn(self, font: str | None, character: str) -> tuple[object, bytes]:
        mask = self._small[font].getmask(character, mode="L")
        return mask.size, bytes(mask)

    @staticmethod
    def _open(path: Path, size: int) -> ImageFont.FreeTypeFont:
        try:
            # Raqm is not everywhere, and the same text must measure the same on every machine.
            return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read as a font ({error}). Give a TrueType or OpenType file.") from None


_NO_WIDTH = ("Mn", "Me", "Cf")
_WIDE = ("W", "F")
_UNSPACED = range(0x0E00, 0x0F00), range(0x1000, 0x10A0), range(0x1780, 0x1800)  # Thai, Lao, Burmese, Khmer


def _break(word: str) -> list[str]:
    if word.isascii():
        return [word]
    tokens: list[str] = []
    joins = False  # whether the next character belongs to the token before
    for character in word:
        wide = unicodedata.east_asian_width(character) in _WIDE or any(ord(character) in block for block in _UNSPACED)
        mark = unicodedata.category(character) in (*_NO_WIDTH, "Po", "Pe", "Pf")  # no line begins with these
        if tokens and (mark or (joins and not wide)):
            tokens[-1] += character
        else:
            tokens.append(character)
        joins = not wide
    return tokens


@cache
def default_ruler() -> Ruler:
    """The ruler in DejaVu Sans."""
    return Ruler()


def _default_font() -> Path:
    spec = importlib.util.find_spec("matplotlib")  # found, not imported: that takes long
    if spec is None or spec.origin is None:
        raise InputError("matplotlib, whose font the design checks measure with, is not installed. Name a font file.")
    return Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"


# ── images ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _ratio_failures(
    slots: Slots, layout_slot: str, layouts: Boxes, placeholders: Sequence[Placeholder], ruler: Ruler
) -> Iterator[CombinationFailure]:
    for layout_id, _, boxes in layouts:
        for box in boxes:
            region = box.region
            if not isinstance(region, ImageRegion):
                continue
            wanted = region.ratio or box.width / box.height
            for image_id, image in slots.get(region.show, ()):
                if not isinstance(image, Image):
                    continue
                ratio = image.width / image.height
                if max(ratio / wanted, wanted / ratio) > 1 + region.tolerance + 1e-9:
                    yield CombinationFailure(
                        IMAGE_RATIO,
                        ((region.show, image_id), (layout_slot, layout_id)),
                        f"{_called(region.show, image_id)} in {_called(layout_slot, layout_id)}: the image is"
                        f" {image.width} × {image.height} ({ratio:.2f} to 1); the region takes {wanted:.2f} to 1,"
                        f" ± {region.tolerance:.0%}.",
                    )


# ── contrast ────────────────────────────────────────────────────────────────────────────────────────────────────────


@cache
def luminance(color: str) -> float:
    """Relative luminance of a colour #rrggbb, 0 (black) to 1 (white): WCAG 2.2, "relative luminance"."""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    """Contrast of two colours, 1 to 21: WCAG 2.2, "contrast ratio".

    >>> contrast("#000000", "#ffffff")
    21.0
    """
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@dataclass(frozen=True)
class _Source:
    """A value that a part of a layout may get, and the style it is from; None: the layout's own."""

    value: str | float
    style: Option | None


def _contrast_failures(
    slots: Slots, layout_slot: str, layouts: Boxes, placeholders: Sequence[Placeholder], ruler: Ruler
) -> Iterator[CombinationFailure]:
    wearers = {
        f"{slot}.{part}": [(slot, id) for id, content in options if isinstance(content, Copy) and content.texts()[part]]
        for slot, options in slots.items()
        for part in PARTS
    }
    offered = cache(lambda name, show, canvas: _offers(slots, name, show, canvas=canvas))
    smallest: dict[tuple[str, Option, Option], tuple[float, str, str]] = {}  # of two styles, over the layouts

    def sources(name: str, show: str, own: str | float, *, canvas: bool = True) -> list[_Source]:
        always, styles = offered(name, show, canvas)
        return styles if always else [_Source(own, None), *styles]

    for layout_id, layout, boxes in layouts:
        for box in boxes:
            region = box.region
            if not isinstance(region, TextRegion) or not wearers.get(region.show):
                continue
            size = min(float(s.value) for s in sources("font_size", region.show, region.font_size))
            colors = sources("color", region.show, region.color)
            own = box.background or layout.background
            grounds = sources("background", region.show, own, canvas=box.background is None)
            for color, ground in itertools.product(colors, grounds):
                if color.style and ground.style:
                    key = (region.show, color.style, ground.style)
                    before = smallest.get(key, (math.inf, "", ""))
                    smallest[key] = min(before, (size, str(color.value), str(ground.value)))
                    continue
                problem = _unreadable(str(color.value), str(ground.value), size)
                if problem is None:
                    continue
                style, here = color.style or ground.style, (layout_slot, layout_id)
                message = f"in {_called(*here)} the text of {region.show} {problem}"
                if style:
                    yield CombinationFailure(CONTRAST, (style, here), f"{_called(*style)} {message}")
                else:
                    for copy in wearers[region.show]:
                        yield CombinationFailure(CONTRAST, (copy, here), f"{_called(*copy)} {message}")
    for (show, a, b), (size, color_value, ground_value) in smallest.items():
        problem = _unreadable(color_value, ground_value, size) if a[0] != b[0] else None
        if problem:
            yield CombinationFailure(CONTRAST, (a, b), f"{_called(*a)} on {_called(*b)}: the text of {show} {problem}")


def _unreadable(color: str, background: str, size: float) -> str | None:
    needed = MIN_CONTRAST_LARGE if size >= LARGE_TEXT_PX else MIN_CONTRAST
    ratio = contrast(color, background)
    if ratio >= needed:
        return None
    shown = math.floor(ratio * 100) / 100  # never rounded up to what is needed
    return f"is {color} on {background}, a contrast of {shown:.2f}; {needed:g} is the least at {size:g} px."


def _offers(slots: Slots, name: str, show: str, *, canvas: bool) -> tuple[bool, list[_Source]]:
    """Every style that can have the last word on a property of a part, and whether one of them always has it."""
    offers: dict[str, list[tuple[tuple[bool, int], _Source]]] = {}  # per slot, with the rank of each style
    spared = {}  # whether a slot has an option that leaves the property alone
    for order, (slot, options) in enumerate(slots.items()):
        for id, content in options:
            if _overrides(content, name, show, canvas=canvas):
                rank = (bool(content.applies_to), order)
                offers.setdefault(slot, []).append((rank, _Source(content.value, (slot, id))))
            else:
                spared[slot] = True
    found: list[_Source] = []
    lowest = {slot: min(rank for rank, _ in ranked) for slot, ranked in offers.items() if slot not in spared}
    for slot, ranked in offers.items():
        # The last word is a style's that outranks at least one of every slot that never leaves the property alone.
        bar = max((rank for other, rank in lowest.items() if other != slot), default=(False, -1))
        found += [source for rank, source in ranked if rank > bar]
    return bool(lowest), found


def _applies(slots: Slots, slot: str, name: str, show: str) -> bool:
    return any(_overrides(content, name, show) for _, content in slots[slot])


def _overrides(content: Content, name: str, show: str, *, canvas: bool = True) -> TypeGuard[Style]:
    """Whether a material is a style that sets this property of a part; `canvas`: whether the part stands on it."""
    if not isinstance(content, Style) or content.property != name:
        return False
    if content.applies_to:
        return content.applies_to == show
    return canvas or name != "background"


def _called(slot: str, id: str) -> str:
    return f"{slot} {id!r}" if id else slot
