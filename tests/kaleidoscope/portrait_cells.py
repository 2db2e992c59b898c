"""An analysis of scene `welcome` (stock.py) for tests: ages, levels, and what they take to."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from kaleidoscope.database import Database
from kaleidoscope.portraits import PortraitCell, PortraitRun, store_portrait
from kaleidoscope.taxonomy import check_changes, evolve
from tests.kaleidoscope.people import person

AGES = ("[-inf, 30)", "[30, 40)", "[40, inf)", "missing")
LEVELS = ("beginner", "expert")
TAGS = (("image_style", "flat"), ("image_style", "realistic"), ("benefit", "red_packet"), ("benefit", "cash_back"))
SHOWN = {
    "image_style": {"flat": 60_000, "realistic": 30_000},
    "benefit": {"red_packet": 30_000, "cash_back": 30_000},
    "authority": {"brand": 90_000},
}
RATE = 0.05
EXPOSURES = 90_000


def run(**changes: Any) -> PortraitRun:
    """Facts of a log of 90,000 exposures."""
    facts: dict[str, Any] = {
        "log_hash": "a" * 64,
        "taxonomy": 1,
        "exposures": EXPOSURES,
        "units": 40_000,
        "methods": ("statistics", "ebm"),
        "since": datetime(2026, 11, 1, tzinfo=UTC),
        "until": datetime(2026, 11, 15, tzinfo=UTC),
        "releases": (1, 2),
        "buckets": ("random",),
        "seed": 7,
        "shown": SHOWN,
    }
    return PortraitRun(**{**facts, **changes})


def cell(segment: dict[str, str], tag: dict[str, str], n: int = 6_000, **more: Any) -> PortraitCell:
    """A cell with its click rate, and a preference as everybody's, of a log in which every exposure counts alike."""
    clicks, known = round(RATE * n), dict[str, Any](independent=n)
    shown = sum(SHOWN.get(d, {}).get(v, 0) for d, v in tag.items()) or EXPOSURES
    known |= {"share": min(n / (shown if segment else EXPOSURES), 1.0)}
    known |= {"click_share": known["share"]} if segment else {}
    if n:
        known |= {"clicks": clicks, "ctr": clicks / n, "ctr_low": 0.04, "ctr_high": 0.06}
        known |= {"shrunk": 1.0, "shrunk_low": 0.9, "shrunk_high": 1.1} if segment else {}
    return PortraitCell(segment, tag, n, **{**known, **more})


def found(effect: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    """What an insight has besides."""
    sign = 1 if effect > 0 else -1
    base = {
        "effect": effect,
        "effect_low": low,
        "effect_high": high,
        "q_value": 0.001,
        "found_by": {"statistics": sign},
    }
    return {**base, **more}


def cells(extra: Iterable[PortraitCell] = ()) -> list[PortraitCell]:
    """Main effects of every tag, every age and level × tag, and two insights about image_style=flat."""
    made = [cell({}, {d: v}, SHOWN[d][v], effect=0.1, effect_low=0.05, effect_high=0.15, q_value=0.01) for d, v in TAGS]
    for field, labels in (("age", AGES), ("level", LEVELS)):
        for label in labels:
            for d, v in TAGS:
                insight: dict[str, Any] = {}
                n = SHOWN[d][v] // len(labels)
                if (d, v) == ("image_style", "flat") and label == "[30, 40)":
                    insight = found(0.5, 0.2, 0.8, found_by={"statistics": 1, "ebm": 1})
                if (d, v) == ("image_style", "flat") and label == "beginner":
                    insight = found(-0.2, -0.3, -0.1, explained_by=(({"age": "missing"}, {"image_style": "flat"}),))
                if (d, v, label) == ("benefit", "red_packet", "[30, 40)"):
                    n = 0
                if (d, v, label) == ("benefit", "cash_back", "[30, 40)"):
                    n = 120
                made.append(cell({field: label}, {d: v}, n, **insight))
    return [*made, *extra]


def store(database: Database, extra: list[PortraitCell] | None = None, **facts: Any) -> tuple[int, bool]:
    """Store them as scene `welcome`'s newest portrait: its number, and whether it is new."""
    with database.transaction(person("ann")) as session:
        made = store_portrait(session, "welcome", run(**facts), cells(extra or []))
        return made.portrait.number, made.new


def change(database: Database, *changes: dict[str, Any]) -> None:
    """A new version of the taxonomy."""
    with database.transaction(person("ann")) as session:
        evolve(session, check_changes(list(changes)))
