"""Draws the ten pictures of the demo's scene: `python examples/demo_scene/make_images.py FOLDER` writes PNGs there.

A picture is a palette, something to show, and perhaps the curve of the yield in front; its tags in materials.csv say
which. `line` draws outlines, `flat` fills them. Drawn twice as large and scaled down; nothing here is random.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, SCALE = 450, 300, 2

Point = tuple[float, float]


@dataclass(frozen=True)
class Palette:
    """The colours of a picture: behind, and what stands before it."""

    sky: str
    ground: str
    ink: str
    main: str
    accent: str


# colour_tone=vivid and colour_tone=soft
VIVID = Palette("#ffe45e", "#ff9f1c", "#3d1e00", "#e8590c", "#d6336c")
SOFT = Palette("#eef2f7", "#dbe4ee", "#51606f", "#a9bfd6", "#d8b4a6")
GOLD_VIVID, GOLD_SOFT = "#ffc300", "#e8d5a0"
SKIN = "#ffd9b8"


class Pen:
    """Shapes in pixels of the final picture: filled when `filled`, outlined otherwise."""

    def __init__(self, palette: Palette, *, filled: bool) -> None:
        self.palette, self.filled = palette, filled
        self.image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), palette.sky)
        self.draw = ImageDraw.Draw(self.image)
        if filled:
            self.draw.rectangle((0, 235 * SCALE, WIDTH * SCALE, HEIGHT * SCALE), fill=palette.ground)
        else:
            self.line([(0, 235), (WIDTH, 235)])

    def _paint(self, color: str) -> dict[str, object]:
        return {"fill": color} if self.filled else {"outline": self.palette.ink, "width": 3 * SCALE}

    def ellipse(self, left: float, top: float, right: float, bottom: float, color: str) -> None:
        """An ellipse in a box."""
        self.draw.ellipse([n * SCALE for n in (left, top, right, bottom)], **self._paint(color))

    def box(self, left: float, top: float, right: float, bottom: float, color: str, *, radius: float = 0) -> None:
        """A rectangle, perhaps with round corners."""
        corners = [n * SCALE for n in (left, top, right, bottom)]
        self.draw.rounded_rectangle(corners, radius * SCALE, **self._paint(color))

    def polygon(self, points: Sequence[Point], color: str) -> None:
        """A closed outline."""
        self.draw.polygon([(x * SCALE, y * SCALE) for x, y in points], **self._paint(color))

    def line(self, points: Sequence[Point], color: str | None = None, width: float = 3) -> None:
        """A line, in ink or in a colour."""
        flat = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(flat, fill=color or self.palette.ink, width=round(width * SCALE), joint="curve")


# ── what a picture shows ────────────────────────────────────────────────────────────────────────────────────────────


def coins(pen: Pen) -> None:
    """Three stacks of gold coins."""
    gold = GOLD_VIVID if pen.palette is VIVID else GOLD_SOFT
    for x, count in ((70, 3), (180, 6), (290, 9)):
        for n in range(count):
            y = 228 - n * 18
            pen.ellipse(x, y - 12, x + 92, y + 14, pen.palette.ink)
            pen.ellipse(x, y - 15, x + 92, y + 10, gold)


def bars(pen: Pen) -> None:
    """A pyramid of gold bars."""
    gold = GOLD_VIVID if pen.palette is VIVID else GOLD_SOFT
    for row, count in enumerate((3, 2, 1)):
        for n in range(count):
            x, y = 60 + row * 57 + n * 114, 235 - row * 56
            pen.polygon([(x, y), (x + 16, y - 50), (x + 90, y - 50), (x + 106, y)], gold)


def emblem(pen: Pen) -> None:
    """The emblem of the house: a shield with a star."""
    shield = [(225, 40), (315, 70), (305, 165), (225, 230), (145, 165), (135, 70)]
    pen.polygon(shield, pen.palette.main)
    turns = [math.pi * n / 5 - math.pi / 2 for n in range(10)]
    radii = [52 if n % 2 == 0 else 21 for n in range(10)]
    star = [(225 + r * math.cos(a), 130 + r * math.sin(a)) for a, r in zip(turns, radii, strict=True)]
    pen.polygon(star, pen.palette.sky)


def tower(pen: Pen) -> None:
    """The tower of the house, with its emblem on the roof."""
    pen.box(165, 70, 285, 235, pen.palette.main)
    for y in range(88, 220, 28):
        for x in range(179, 270, 26):
            pen.box(x, y, x + 15, y + 16, pen.palette.sky)
    pen.polygon([(225, 18), (255, 40), (245, 70), (205, 70), (195, 40)], pen.palette.accent)


def person(pen: Pen) -> None:
    """A person who waves."""
    pen.box(170, 150, 280, 290, pen.palette.main, radius=40)
    pen.polygon([(262, 175), (330, 85), (350, 98), (280, 215)], pen.palette.main)
    pen.ellipse(328, 66, 364, 102, SKIN)
    pen.ellipse(183, 50, 267, 142, SKIN)
    for x in (208, 236):
        pen.ellipse(x, 86, x + 8, 94, pen.palette.ink)
    pen.line([(208, 112), (218, 119), (232, 119), (242, 112)])


def hills(pen: Pen) -> None:
    """Hills and a sun."""
    pen.ellipse(320, 40, 390, 110, pen.palette.accent)
    pen.polygon([(-20, 236), (110, 95), (240, 236)], pen.palette.main)
    pen.polygon([(150, 236), (290, 130), (430, 236)], pen.palette.ground if not pen.filled else pen.palette.ink)


def chart(pen: Pen) -> None:
    """The curve of the yield since launch, on axes, before everything else."""
    pen.line([(40, 30), (40, 262), (420, 262)], width=4)
    steps = [i / 40 for i in range(41)]
    curve = [(48 + 360 * t, 245 - 190 * t**1.4 - 14 * math.sin(t * 15)) for t in steps]
    pen.line(curve, pen.palette.sky, 13)
    pen.line(curve, "#0b7a3e", 7)
    x, y = curve[-1]
    pen.draw.polygon(
        [((x + dx) * SCALE, (y + dy) * SCALE) for dx, dy in ((-15, -4), (12, -14), (2, 14))], fill="#0b7a3e"
    )


PICTURES: dict[str, tuple[Callable[[Pen], None], Palette, bool, bool]] = {  # shows, tone, flat, chart
    "coins-flat": (coins, VIVID, True, False),
    "coins-chart-line": (coins, VIVID, False, True),
    "bars-line": (bars, SOFT, False, False),
    "emblem-flat": (emblem, SOFT, True, False),
    "emblem-chart-line": (emblem, VIVID, False, True),
    "tower-chart-flat": (tower, SOFT, True, True),
    "person-flat": (person, VIVID, True, False),
    "person-chart-line": (person, SOFT, False, True),
    "hills-line": (hills, SOFT, False, False),
    "hills-chart-flat": (hills, VIVID, True, True),
}


def draw_all(folder: Path) -> list[Path]:
    """Draw every picture into a folder, which is made; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (show, palette, flat, with_chart) in PICTURES.items():
        pen = Pen(palette, filled=flat)
        show(pen)
        if with_chart:
            chart(pen)
        files.append(folder / f"{name}.png")
        pen.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(files[-1])
    return files


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Say where: python make_images.py FOLDER")
    draw_all(Path(sys.argv[1]))
