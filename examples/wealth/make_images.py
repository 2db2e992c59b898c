"""Draws the ten images of the wealth example: `python examples/wealth/make_images.py` writes them beside this file.

They are committed; run it again after changing a drawing. Shapes are drawn four times as large and scaled down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SCALE = 4  # supersampling
FOLDER = Path(__file__).parent / "images"

Point = tuple[float, float]
Box = tuple[float, float, float, float]


# ── a pen ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Canvas:
    """A picture that is drawn in pixels of its final size."""

    def __init__(self, width: int, height: int, top: str, bottom: str | None = None) -> None:
        self.width, self.height = width, height
        self.image = self.gradient((0, height), (top, bottom or top))

    def gradient(self, span: tuple[float, float], colors: tuple[str, str], *, across: bool = False) -> Image.Image:
        """A picture that goes from one colour to another along y (or x), between two positions."""
        length = (self.width if across else self.height) * SCALE
        at = (np.arange(length) / SCALE - span[0]) / max(span[1] - span[0], 1e-9)
        share = np.clip(at, 0, 1)[:, None]
        line = (_rgb(colors[0]) * (1 - share) + _rgb(colors[1]) * share).astype(np.uint8)
        line = line[None, :, :] if across else line[:, None, :]
        return Image.fromarray(
            np.ascontiguousarray(np.broadcast_to(line, (self.height * SCALE, self.width * SCALE, 3)))
        )

    def mask(self, draw: Callable[[ImageDraw.ImageDraw], None], blur: float = 0) -> Image.Image:
        """What `draw` covers."""
        mask = Image.new("L", self.image.size, 0)
        draw(ImageDraw.Draw(mask))
        return mask.filter(ImageFilter.GaussianBlur(blur * SCALE)) if blur else mask

    def paint(self, mask: Image.Image, paint: str | Image.Image, opacity: float = 1) -> None:
        """Put a colour or a picture where the mask is."""
        paint = Image.new("RGB", self.image.size, paint) if isinstance(paint, str) else paint
        self.image.paste(paint, (0, 0), mask.point(lambda v: int(v * opacity)))

    def ellipse(self, box: Box, paint: str | Image.Image, *, opacity: float = 1, blur: float = 0) -> None:
        """An ellipse in a box of left, top, right, bottom."""
        self.paint(self.mask(lambda d: d.ellipse(_scaled(box), fill=255), blur), paint, opacity)

    def circle(
        self, at: Point, radius: float, paint: str | Image.Image, *, opacity: float = 1, blur: float = 0
    ) -> None:
        """A circle around a point."""
        x, y = at
        self.ellipse((x - radius, y - radius, x + radius, y + radius), paint, opacity=opacity, blur=blur)

    def rounded(
        self, box: Box, radius: float, paint: str | Image.Image, *, opacity: float = 1, blur: float = 0
    ) -> None:
        """A rectangle with round corners."""
        draw = lambda d: d.rounded_rectangle(_scaled(box), radius * SCALE, fill=255)  # noqa: E731
        self.paint(self.mask(draw, blur), paint, opacity)

    def polygon(
        self, points: Sequence[Point], paint: str | Image.Image, *, opacity: float = 1, blur: float = 0
    ) -> None:
        """A filled outline."""
        flat = [(x * SCALE, y * SCALE) for x, y in points]
        self.paint(self.mask(lambda d: d.polygon(flat, fill=255), blur), paint, opacity)

    def line(self, points: Sequence[Point], width: float, paint: str, *, opacity: float = 1) -> None:
        """A line with round ends and joints."""
        flat = [(x * SCALE, y * SCALE) for x, y in points]

        def draw(d: ImageDraw.ImageDraw) -> None:
            d.line(flat, fill=255, width=int(width * SCALE), joint="curve")
            for x, y in (flat[0], flat[-1]):
                r = width * SCALE / 2
                d.ellipse((x - r, y - r, x + r, y + r), fill=255)

        self.paint(self.mask(draw), paint, opacity)

    def sphere(self, at: Point, radius: float, light: str, dark: str) -> None:
        """A ball lit from the upper left."""
        height, width = self.image.size[1], self.image.size[0]
        y, x = np.mgrid[0:height, 0:width] / SCALE
        away = np.hypot(x - (at[0] - radius * 0.4), y - (at[1] - radius * 0.45)) / (radius * 1.75)
        share = np.clip(away, 0, 1)[..., None] ** 1.25
        shaded = Image.fromarray((_rgb(light) * (1 - share) + _rgb(dark) * share).astype(np.uint8))
        self.circle(at, radius, shaded)

    def grain(self, amount: float) -> None:
        """Noise as of a camera, the same every time."""
        noise = np.random.default_rng(7).normal(0, amount, (self.height, self.width, 1))
        noise = np.repeat(np.repeat(noise, SCALE, 0), SCALE, 1)
        self.image = Image.fromarray(np.clip(np.asarray(self.image) + noise, 0, 255).astype(np.uint8))

    def save(self, name: str) -> None:
        """Write it, small."""
        small = self.image.resize((self.width, self.height), Image.Resampling.LANCZOS)
        small.save(FOLDER / f"{name}.webp", quality=82, method=6)


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], float)


def _scaled(box: Box) -> Box:
    left, top, right, bottom = (side * SCALE for side in box)
    return left, top, right, bottom


# ── flat ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def growth_flat() -> None:
    """A plant that grows out of stacks of coins."""
    c = Canvas(640, 480, "#e6f4ea")
    c.circle((320, 250), 190, "#cfead6")
    for x, coins in ((170, 3), (280, 5), (390, 7)):
        for n in range(coins):
            y = 392 - n * 24
            c.rounded((x, y, x + 90, y + 20), 10, "#f2b632")
            c.rounded((x, y, x + 90, y + 9), 6, "#ffd166")
    c.line([(435, 246), (435, 150)], 8, "#2f855a")
    for side in (-1, 1):
        for y, size in ((165, 46), (205, 38)):
            leaf = [
                (435 + side * size * t, y + 22 - 62 * t * size / 46 + 26 * math.sin(math.pi * t) * s)
                for s, steps in ((1, range(21)), (-1, range(20, -1, -1)))
                for t in [step / 20 for step in steps]
            ]
            c.polygon(leaf, "#48bb78" if side < 0 else "#38a169")
    c.rounded((120, 414, 520, 424), 5, "#2f855a")
    c.save("growth-flat")


def chart_flat() -> None:
    """Rising bars and an arrow."""
    c = Canvas(640, 480, "#e8f0fe")
    c.rounded((90, 70, 550, 410), 24, "#ffffff")
    for y in (150, 220, 290):
        c.line([(130, y), (510, y)], 2, "#e2e8f0")
    for x, height, color in ((150, 70, "#90b4f8"), (230, 115, "#6b9bf4"), (310, 160, "#4a80ee"), (390, 215, "#2b63d9")):
        c.rounded((x, 370 - height, x + 52, 370), 8, color)
    c.line([(140, 265), (230, 215), (310, 185), (455, 105)], 10, "#ff8a3d")
    c.polygon([(482, 88), (434, 92), (458, 134)], "#ff8a3d")
    for x in (120, 144, 168):
        c.circle((x, 96), 7, {120: "#ff8a3d", 144: "#ffd166", 168: "#48bb78"}[x])
    c.save("chart-flat")


def piggy_flat() -> None:
    """A piggy bank and a coin."""
    c = Canvas(640, 480, "#fff1e6")
    c.circle((320, 240), 195, "#ffe0cc")
    for x in (225, 270, 365, 410):
        c.rounded((x, 330, x + 38, 402), 12, "#e8738d")
    c.polygon([(398, 165), (458, 128), (452, 205)], "#e8738d")
    c.ellipse((170, 158, 480, 368), "#f78fa7")
    c.rounded((445, 232, 510, 306), 24, "#e8738d")
    c.circle((470, 268), 7, "#9c3f55")
    c.circle((494, 268), 7, "#9c3f55")
    c.circle((418, 232), 10, "#4a1f2b")
    c.rounded((275, 166, 365, 180), 7, "#9c3f55")
    c.line([(176, 255), (150, 240), (152, 268), (132, 256)], 8, "#e8738d")
    c.circle((320, 100), 44, "#f2b632")
    c.circle((320, 100), 33, "#ffd166")
    c.line([(320, 82), (320, 118)], 8, "#f2b632")
    c.rounded((130, 402, 510, 412), 5, "#9c3f55", opacity=0.35)
    c.save("piggy-flat")


def family_flat() -> None:
    """Two parents and a child before a house."""
    c = Canvas(640, 480, "#e0f2fe")
    c.circle((520, 95), 46, "#ffd166")
    c.polygon([(320, 70), (150, 200), (490, 200)], "#ef6f6c")
    c.rounded((180, 195, 460, 410), 6, "#ffffff")
    for x in (205, 385):
        c.rounded((x, 225, x + 52, 275), 6, "#bae0fd")
    c.rounded((0, 400, 640, 480), 0, "#86cf9a")
    for x, head, skin, hair, shirt, height in (
        (245, 30, "#f3c6a5", "#3b2a20", "#2b63d9", 120),
        (395, 28, "#e8b58f", "#5a2d1a", "#a855f7", 112),
        (320, 24, "#f3c6a5", "#3b2a20", "#ff8a3d", 70),
    ):
        top = 430 - height
        c.rounded((x - head * 1.35, top, x + head * 1.35, 445), head, shirt)
        c.circle((x, top - head * 0.75), head * 1.06, hair)
        c.ellipse((x - head * 0.88, top - head * 1.45, x + head * 0.88, top + head * 0.28), skin)
        for eye in (-1, 1):
            c.circle((x + eye * head * 0.34, top - head * 0.62), head * 0.1, "#2a2a2a")
        c.line([(x - 6, top - head * 0.2), (x, top - head * 0.12), (x + 6, top - head * 0.2)], 2.5, "#b4574f")
    c.save("family-flat")


def advisor_flat() -> None:
    """A smiling adviser with a tablet; square."""
    c = Canvas(480, 480, "#ede9fe")
    c.circle((240, 250), 195, "#ddd6fe")
    c.rounded((130, 285, 350, 520), 80, "#312e81")
    c.polygon([(205, 286), (275, 286), (240, 378)], "#ffffff")
    c.polygon([(232, 306), (248, 306), (254, 362), (240, 376), (226, 362)], "#ef6f6c")
    c.rounded((216, 235, 264, 304), 22, "#e3a985")
    c.ellipse((166, 88, 314, 268), "#4b2e20")
    c.ellipse((184, 120, 296, 270), "#f3c6a5")
    c.polygon([(180, 172), (196, 118), (262, 108), (300, 172), (262, 142), (214, 146)], "#4b2e20")
    for x in (216, 264):
        c.circle((x, 195), 6.5, "#2a2a2a")
        c.line([(x - 11, 178), (x + 11, 176)], 3.5, "#4b2e20")
    c.line([(220, 236), (232, 245), (248, 245), (260, 236)], 4.5, "#b4574f")
    c.rounded((280, 340, 410, 440), 12, "#1f2937")
    c.rounded((289, 349, 401, 431), 6, "#f8fafc")
    c.line([(302, 416), (328, 394), (350, 402), (386, 364)], 5, "#22c55e")
    c.circle((288, 402), 20, "#f3c6a5")
    c.save("advisor-flat")


# ── as a camera sees it ─────────────────────────────────────────────────────────────────────────────────────────────


def _bar(c: Canvas, x: float, y: float) -> None:
    front = [(x, y + 78), (x + 22, y + 12), (x + 150, y + 12), (x + 172, y + 78)]
    top = [(x + 22, y + 12), (x + 48, y - 14), (x + 164, y - 14), (x + 150, y + 12)]
    side = [(x + 172, y + 78), (x + 150, y + 12), (x + 164, y - 14), (x + 190, y + 44)]
    c.polygon([(px + 6, py + 8) for px, py in front], "#000000", opacity=0.4, blur=8)
    c.polygon(front, c.gradient((y + 5, y + 90), ("#ffe08a", "#a8690c")))
    c.polygon(top, c.gradient((x + 20, x + 170), ("#fff6cf", "#e9b73c"), across=True))
    c.polygon(side, c.gradient((y - 10, y + 80), ("#c98a1c", "#6e4204")))
    inset = [(x + 36, y + 62), (x + 48, y + 28), (x + 124, y + 28), (x + 136, y + 62)]
    c.polygon(inset, c.gradient((y + 20, y + 75), ("#c8902a", "#f3cf6d")), opacity=0.75)
    c.polygon([(x + 30, y + 66), (x + 46, y + 16), (x + 62, y + 16), (x + 46, y + 66)], "#ffffff", opacity=0.3, blur=3)


def gold_bars_realistic() -> None:
    """A pyramid of gold bars in a spotlight."""
    c = Canvas(640, 480, "#171a24", "#3a3020")
    c.ellipse((60, -60, 580, 420), "#c9952f", opacity=0.28, blur=70)
    c.rounded((0, 405, 640, 480), 0, c.gradient((405, 480), ("#4a3a1c", "#1c160b")))
    for row, (count, y) in enumerate(((3, 328), (2, 248), (1, 168))):
        for n in range(count):
            _bar(c, 40 + row * 90 + n * 180, y)
    for x, y, r in ((205, 260, 3), (300, 158, 4), (470, 335, 3), (395, 245, 2.5)):
        c.circle((x, y), r * 4, "#fff8dc", opacity=0.55, blur=r * 1.6)
        c.circle((x, y), r, "#ffffff", blur=0.6)
    c.grain(3)
    c.save("gold-bars-realistic")


def coins_realistic() -> None:
    """Stacks of gold coins on a dark table, one in front."""
    c = Canvas(640, 480, "#26323a", "#0e1317")
    c.ellipse((-80, 40, 520, 460), "#5f8d92", opacity=0.28, blur=80)
    c.rounded((0, 380, 640, 480), 0, c.gradient((380, 480), ("#1d262b", "#07090b")))
    for x, coins in ((90, 5), (230, 9), (370, 13)):
        c.ellipse((x - 12, 385, x + 160, 430), "#000000", opacity=0.6, blur=9)
        for n in range(coins):
            y = 388 - n * 20
            shift = 4 * math.sin(n * 2.1 + x)
            box = (x + shift, y - 17, x + 130 + shift, y + 17)
            edge = c.gradient((box[0], box[2]), ("#ffdf7e", "#7d4d08"), across=True)
            c.ellipse((box[0], box[1] + 16, box[2], box[3] + 16), edge)
            c.rounded((box[0], y, box[2], y + 16), 0, edge)
            c.ellipse(box, c.gradient((box[0], box[2]), ("#fff1b8", "#c98a1c"), across=True))
            c.ellipse((box[0] + 12, box[1] + 4, box[2] - 12, box[3] - 4), "#b67c18", opacity=0.45)
            c.ellipse(
                (box[0] + 14, box[1] + 6, box[2] - 14, box[3] - 4),
                c.gradient((box[0], box[2]), ("#ffe59a", "#d79b2a"), across=True),
            )
    c.ellipse((470, 412, 600, 440), "#000000", opacity=0.6, blur=6)
    c.sphere((540, 362), 62, "#fff3c4", "#9a6410")
    c.sphere((538, 361), 50, "#ffe08a", "#a8690c")
    c.sphere((539, 362), 46, "#fff0b5", "#b97c16")
    c.line([(539, 336), (539, 388)], 9, "#8a5a0d", opacity=0.8)
    c.line([(522, 350), (556, 350)], 7, "#8a5a0d", opacity=0.8)
    c.line([(522, 374), (556, 374)], 7, "#8a5a0d", opacity=0.8)
    c.circle((512, 334), 12, "#ffffff", opacity=0.7, blur=5)
    c.grain(3)
    c.save("coins-realistic")


def city_realistic() -> None:
    """A financial district at dusk, over water."""
    c = Canvas(640, 480, "#1b2350", "#f0a36b")
    c.image = Image.blend(c.image, c.gradient((120, 330), ("#3b3f7a", "#ffb27a")), 0.55)
    c.circle((455, 300), 120, "#ffd9a0", opacity=0.5, blur=50)
    c.circle((455, 306), 30, "#fff3d6", blur=3)
    rng = np.random.default_rng(11)
    for layer, (color, low, high, width) in enumerate(
        (("#6a5f8c", 70, 150, 46), ("#433f6e", 90, 200, 54), ("#1f2147", 70, 245, 62))
    ):
        x = -20.0
        while x < 650:
            w = width * rng.uniform(0.7, 1.2)
            h = rng.uniform(low, high)
            top = 350 - h
            shade = c.gradient((top, 350), (color, "#c98a6c" if layer == 0 else color))
            c.rounded((x, top, x + w, 352), 2, shade)
            if layer and h > high * 0.75:
                c.line([(x + w / 2, top), (x + w / 2, top - 26)], 2, color)
            if layer:
                windows = c.mask(
                    lambda d, x=x, w=w, top=top: [
                        d.rectangle(_scaled((wx, wy, wx + 4, wy + 6)), fill=int(rng.uniform(60, 255)))
                        for wy in np.arange(top + 8, 340, 13)
                        for wx in np.arange(x + 6, x + w - 8, 10)
                        if rng.random() < 0.5
                    ]
                )
                c.paint(windows, "#ffdf9e", 0.85 if layer == 2 else 0.5)
            x += w + rng.uniform(2, 10)
    water = c.image.crop((0, 220 * SCALE, 640 * SCALE, 350 * SCALE)).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    water = water.filter(ImageFilter.GaussianBlur(3 * SCALE))
    c.image.paste(Image.blend(water, Image.new("RGB", water.size, "#1b2350"), 0.45), (0, 350 * SCALE))
    for y in range(358, 480, 9):
        for _ in range(5):
            x = float(rng.uniform(0, 600))
            c.line([(x, y), (x + rng.uniform(20, 70), y)], 1.2, "#ffd9a0", opacity=0.25)
    c.grain(4)
    c.save("city-realistic")


def mountain_realistic() -> None:
    """Sunrise over ranges of mountains."""
    c = Canvas(640, 480, "#7fb2dd", "#fde2c0")
    c.circle((210, 190), 130, "#fff3d6", opacity=0.8, blur=45)
    c.circle((210, 190), 26, "#fffaf0", blur=2)
    rng = np.random.default_rng(5)
    for base, height, far, near in (
        (260, 120, "#b9c7dd", "#e6dcd8"),
        (310, 130, "#8aa3c4", "#c3c6d2"),
        (360, 125, "#56769b", "#94a7bd"),
        (420, 110, "#2b4a63", "#4f6d80"),
        (475, 80, "#12293a", "#1d3d4c"),
    ):
        x = np.linspace(0, 640, 400)
        ridge = sum(
            rng.uniform(0.3, 1) / k * np.sin(x / 640 * math.pi * k * rng.uniform(1.2, 2.4) + rng.uniform(0, 6.3))
            for k in range(1, 40)
        )
        ridge = base - height * (ridge - ridge.min()) / (ridge.max() - ridge.min())
        shade = c.gradient((base - height, base + 30), (far, near))
        c.polygon([(0, 480), *zip(x.tolist(), ridge.tolist(), strict=True), (640, 480)], shade)
    c.ellipse((-100, 325, 740, 400), "#fff6ea", opacity=0.25, blur=24)
    c.grain(3)
    c.save("mountain-realistic")


def saver_realistic() -> None:
    """A young saver, modelled in soft light; square."""
    c = Canvas(480, 480, "#f5d7bf", "#d9a07d")
    c.circle((150, 130), 170, "#fff3e2", opacity=0.65, blur=60)
    c.rounded((96, 330, 384, 560), 110, "#000000", opacity=0.25, blur=18)
    body = c.mask(lambda d: d.rounded_rectangle(_scaled((92, 322, 388, 560)), 105 * SCALE, fill=255))
    c.paint(body, c.gradient((92, 400), ("#3f9c98", "#14504f"), across=True))
    fold = c.mask(lambda d: d.ellipse(_scaled((150, 300, 330, 400)), fill=255), 6)
    c.paint(ImageChops.multiply(body, fold), "#0f4342", 0.5)
    c.rounded((204, 262, 276, 362), 34, c.gradient((204, 280), ("#e5ab86", "#9a5f41"), across=True))
    c.ellipse((196, 268, 284, 318), "#7a452c", opacity=0.4, blur=8)
    c.circle((240, 176), 104, c.gradient((140, 340), ("#54382a", "#1c100a"), across=True))
    c.sphere((240, 200), 87, "#ffdcc0", "#b06f4d")
    hair = c.mask(lambda d: d.pieslice(_scaled((136, 72, 344, 262)), 182, 358, fill=255))
    c.paint(hair, c.gradient((140, 340), ("#6b4936", "#21130c"), across=True))
    c.ellipse((158, 132, 322, 196), c.gradient((158, 322), ("#ffdcc0", "#c98a66"), across=True), blur=2)
    c.line([(178, 108), (230, 92)], 10, "#8d6750", opacity=0.45)
    for x in (210, 270):
        c.ellipse((x - 12, 192, x + 12, 210), "#fffaf5")
        c.circle((x, 201), 8, "#3a2418")
        c.circle((x - 2.5, 198), 2.5, "#ffffff")
        c.line([(x - 14, 180), (x, 175), (x + 14, 179)], 4.5, "#3a2418")
        c.circle((x + (-14 if x < 240 else 14), 232), 15, "#f2907a", opacity=0.35, blur=6)
    c.line([(238, 204), (234, 226), (243, 228)], 3.5, "#a2613f", opacity=0.7)
    c.line([(214, 246), (228, 257), (252, 257), (266, 246)], 5, "#a9483f")
    c.sphere((352, 368), 44, "#fff3c4", "#9a6410")
    c.sphere((352, 368), 34, "#ffe08a", "#b97c16")
    c.line([(352, 350), (352, 386)], 6, "#8a5a0d", opacity=0.8)
    c.sphere((322, 400), 24, "#ffdcc0", "#a5684a")
    c.grain(3)
    c.save("saver-realistic")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in (
        growth_flat,
        chart_flat,
        piggy_flat,
        family_flat,
        advisor_flat,
        gold_bars_realistic,
        coins_realistic,
        city_realistic,
        mountain_realistic,
        saver_realistic,
    ):
        draw()
