"""`kaleidoscope cells`: a log of any size as sums that add up over days, and what the sums say by themselves.

build: (earlier cells) → one pass over each log, or over a scene's new days → cells in one file
show: cells → rates, main effects, preferences
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, time
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from attribution.cells import Cells, Definitions, Table, t_quantile
from attribution.coding import Tag
from attribution.discoveries import LEVEL
from attribution.insights import main_effects
from attribution.preference import PreferenceCell, preference_cells
from attribution.replicates import REPLICATES
from attribution.streaming import Period, stream, stream_events
from kaleidoscope.access import operator
from kaleidoscope.commands.exposures import existing_database
from kaleidoscope.commands.output import Clock, make_folder
from kaleidoscope.errors import InputError, JobError
from kaleidoscope.events import day_files
from kaleidoscope.log_schema import read_schema
from kaleidoscope.progress import Progress
from kaleidoscope.scenes import get_scene
from kaleidoscope.settings import Settings
from kaleidoscope.terminal import fields, table

if TYPE_CHECKING:
    from rich.table import Table as Shown

By = Literal["bucket", "period"]

NOTE = (
    "All of this describes what was shown and clicked. Preferences are listed by size: their intervals do not know that"
    " these were chosen among many, nor which other field or tag explains them. Insights need `kaleidoscope attribute`."
)


# ── build ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def build_cells(
    logs: Sequence[Path],
    schema_path: Path,
    out: Path,
    *,
    add: Path | None = None,
    period: Period | Literal["none"] | None = None,
    pairs: bool = True,
    overwrite: bool = False,
    progress: Progress,
) -> dict[str, object]:
    """Sum up logs in one pass over each and write the cells to `out`; what was written, in numbers.

    `add`: cells of earlier logs, whose definitions these get and whose sums they are added to; `out` may be the same
    file. `period` (by default a day) and `pairs` are then those of the earlier cells. Raises InputError for a file that
    is there, unless `overwrite`, and where logs and earlier cells do not fit; then nothing is written.
    """
    if any(_same(out, log) for log in logs):
        raise InputError(f"{out}: is the log. Choose another name for the cells.")
    schema = read_schema(schema_path)
    build = _Build(out, add, period, pairs=pairs, overwrite=overwrite, clock=Clock(progress))
    for log in logs:

        def read(definitions: Definitions | None, log: Path = log) -> Cells:
            return stream(log, schema, definitions, period=build.cut, pairs=pairs)

        build.sum_up(log.name, read, {"log": str(log)})
    return build.written()


def build_scene_cells(
    settings: Settings,
    business: str,
    scene: str,
    out: Path,
    *,
    add: Path | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    period: Period | Literal["none"] | None = None,
    pairs: bool = True,
    overwrite: bool = False,
    progress: Progress,
) -> dict[str, object]:
    """Sum up a scene's Parquet event log as `build_cells` does logs: the days from `since` on and before `until` that
    are compacted and not in the earlier cells, in one pass.

    Where there is no such day, the earlier cells are all there is. Raises InputError without them, and for a period
    that is not one of whole days.
    """
    first, end = (None if day is None else _day(option, day) for option, day in (("--from", since), ("--until", until)))
    caller = operator(settings.user or "kaleidoscope", business)
    with existing_database(settings.database_url) as database, database.transaction(caller, write=False) as session:
        get_scene(session, scene)
    with existing_database(settings.log_url) as log_database:
        files = day_files(log_database, settings.log_dir, business=business, scene=scene)
    build = _Build(out, add, period, pairs=pairs, overwrite=overwrite, clock=Clock(progress))
    names = {
        day: f"{business}/{scene}/{day}" for day in files if (not first or day >= first) and (not end or day < end)
    }
    known = set() if build.earlier is None else set(build.earlier.days)
    new = [day for day, name in names.items() if name not in known]
    if build.earlier is None and not any(files[day] for day in new):
        raise InputError(
            f"scene {scene!r}: no day {'in this period ' if first or end else ''}is compacted that anybody saw it on."
            " `kaleidoscope events compact` does that, once no more events can come."
        )
    there = [file for day in new if (file := files[day]) is not None]
    about = {"log": f"{business}/{scene}", "days": new, "known_days": len(names) - len(new)}
    if there:

        def read(definitions: Definitions | None) -> Cells:
            folder = settings.log_dir / business / f"scene={scene}"
            cells = stream_events(folder, definitions, files=there, period=build.cut, pairs=pairs)
            return replace(cells, days=tuple(names[day] for day in new))

        build.sum_up(f"{len(new):,} day{'s' * (len(new) > 1)}", read, about)
    else:
        build.nothing(about)
    return build.written()


class _Build:
    """Cells that are being made: what there was before, and what was added so far."""

    def __init__(
        self,
        out: Path,
        add: Path | None,
        period: Period | Literal["none"] | None,
        *,
        pairs: bool,
        overwrite: bool,
        clock: Clock,
    ) -> None:
        in_place = add is not None and _same(out, add)
        if out.exists() and not overwrite and not in_place:
            raise InputError(_there(out, add))
        self.out, self.add, self.overwrite, self.clock = out, add, overwrite or in_place, clock
        self.earlier = None if add is None else _load(add)
        if self.earlier is not None:
            _require(add, self.earlier, period, pairs=pairs)
        make_folder(out.parent)
        self.cut: Period | None = None if period == "none" else period or "day"
        self._whole, self._logs, self._periods = self.earlier, list[dict[str, object]](), set[str]()
        self._definitions = None if self.earlier is None else self.earlier.definitions

    def sum_up(self, name: str, read: Callable[[Definitions | None], Cells], about: Mapping[str, object]) -> None:
        """Add what one pass finds."""
        with self.clock(f"sum up {name}"):
            cells = read(self._definitions)
        self._definitions = cells.definitions
        self._whole = cells if self._whole is None else self._whole + cells
        self._periods |= {name for name in cells.periods if name}
        self._logs.append({**about, "exposures": _exposures(cells)})

    def nothing(self, about: Mapping[str, object]) -> None:
        """Say what would have been added."""
        self._logs.append({**about, "exposures": 0})

    def written(self) -> dict[str, object]:
        """Write the file; what is in it, in numbers."""
        assert self._whole is not None  # the command takes at least one log
        with self.clock("write"):
            _write(self._whole, self.out, overwrite=self.overwrite)
        before = () if self.earlier is None else self.earlier.periods
        return {
            "file": str(self.out),
            "added_to": None if self.add is None else str(self.add),
            "logs": self._logs,
            "shared_periods": sorted(self._periods.intersection(before)),
            **facts_of(self._whole),
            "timings_s": self.clock.seconds,
        }


def _day(option: str, moment: datetime) -> str:
    whole = moment.astimezone(UTC)
    if whole.time() != time():
        raise InputError(f"{option}: {moment.isoformat()} is within a day (UTC), and cells are of whole ones.")
    return whole.date().isoformat()


def built_lines(built: Mapping[str, Any]) -> list[str | Shown]:
    """What `cells build` says at the end."""
    new = sum(log["exposures"] for log in built["logs"])
    more = "" if built["added_to"] is None else f", {new:,} of them new"
    lines: list[str | Shown] = [f"Wrote {built['file']}: {built['exposures']:,} exposures{more}.", _facts(built)]
    for log in built["logs"]:
        if "days" in log:
            lines.insert(1, _days_said(log))
    # A day's exposures may have been seen a moment into the next one: that days share periods means nothing here.
    shared = [] if any("days" in log for log in built["logs"]) else built["shared_periods"]
    if shared:
        some = ", ".join(shared[:3]) + (", …" if len(shared) > 3 else "")
        many = f"{len(shared):,} {built['definitions']['period']}{'s' * (len(shared) > 1)}"
        lines.append(
            f"Note: {built['added_to']} had exposures of {many} already ({some})."
            " A log that is added twice counts twice."
        )
    return lines + [f"Note: {note}" for note in built["notes"]]


def _days_said(log: Mapping[str, Any]) -> str:
    days, known = log["days"], log["known_days"]
    had = f" {known:,} {'was' if known == 1 else 'were'} in the cells already." if known else ""
    if not days:
        return f"No day of {log['log']} is new.{had}"
    span = days[0] if len(days) == 1 else f"{days[0]} – {days[-1]}"
    return f"{len(days):,} new day{'s' * (len(days) > 1)} of {log['log']}: {span}.{had}"


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _there(out: Path, add: Path | None) -> str:
    adding = f" To add to the cells in it, give `--add {out}`." if add is None else ""
    return f"{out}: is there already. Choose another name, or give --overwrite.{adding}"


def _load(path: Path) -> Cells:
    try:
        return Cells.load(path)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: its description of the cells is damaged. Copy the file again.") from error


def _require(add: Path | None, earlier: Cells, period: str | None, *, pairs: bool) -> None:
    """Raise InputError where something else is asked for than what the earlier cells have."""
    have = earlier.definitions
    if period not in (None, have.period or "none"):
        raise InputError(
            f"--period: the periods of {add} are {have.period or 'none'!r}, and sums of other periods do not add."
            " Leave it out, or sum up both logs anew."
        )
    if have.pairs and not pairs:
        raise InputError(f"--no-pairs: {add} has sums of pairs. Leave it out, or sum up both logs anew.")


def _write(cells: Cells, out: Path, *, overwrite: bool) -> None:
    try:
        cells.save(out, overwrite=overwrite)
    except FileExistsError:
        raise InputError(_there(out, None)) from None
    except OSError as error:
        raise JobError(f"{out}: cannot be written: {error}; name another file with --out") from error


# ── show ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def show_cells(path: Path, *, by: By | None = None, limit: int = 20) -> dict[str, object]:
    """What a file of cells holds, and what its sums say: how often every tag is clicked, also `by` bucket or period,
    its main effect, and the `limit` strongest preferences. Raises InputError where the file is no whole file of cells.
    """
    cells = _load(path)
    known = [cell for cell in preference_cells(cells) if cell.shrunk is not None and cell.preference is not None]
    known.sort(key=lambda cell: -abs(math.log(cell.shrunk or 1.0)))
    parts = {} if by is None else cells.by_bucket() if by == "bucket" else cells.by_period()
    return {
        "file": str(path),
        **facts_of(cells),
        "tags": tags_of(cells),
        "main_effects": [effect.to_json() for effect in main_effects(cells)],
        "preferences": [_preference(cell) for cell in known[:limit]],
        "preferences_known": len(known),
        "by": None if by is None else {"what": by, "parts": [_part(name, part) for name, part in parts.items()]},
        "note": NOTE,
    }


def facts_of(cells: Cells) -> dict[str, object]:
    """The cells in numbers, what they may be added to, and what to mind."""
    of = cells.definitions
    used = len(np.unique(cells.replicate))
    binned = [(f, "user") for f in of.fields] + [(f, "context") for f in of.context]
    weighted_by = [
        name
        for name, scale in (("weight", of.row_scale), ("propensity", of.inverse_scale))
        if scale is not None or of.stabilised
    ]
    return {
        "exposures": _exposures(cells),
        "clicks": round(float(cells.table("clicks")[0, 0])),
        "cells": len(cells.main) + len(cells.value_pairs) + len(cells.tag_pairs),
        "values": len(cells.values) - 1,
        "strata": len(cells.strata),
        "buckets": [name or None for name in cells.buckets],
        "periods": [name or None for name in cells.periods],
        "replicates": used,
        "effective_share": cells.effective_share,
        "clipped": round(cells.clipped),
        "definitions": {
            "fields": [
                {
                    "name": f.name, "role": role, "kind": "text" if f.edges is None else "number",
                    "values": list(f.labels),
                }
                for f, role in binned
            ],
            "weighted_by": weighted_by, "period": of.period, "pairs": of.pairs,
        },
        "notes": [
            f"Exposures are in {used} of the {REPLICATES} replicates only: intervals take it for more units than there"
            " are, and are too short."
        ] if 0 < used < REPLICATES else [],
    }  # fmt: skip


def tags_of(cells: Cells) -> list[dict[str, object]]:
    """Every tag's exposures and clicks; `clicked`, clicks of exposures; `ctr`, as if shown to everybody alike."""
    alone = replace(cells, main=cells.main.take(cells.value == 0), value_pairs=Table.none(), tag_pairs=Table.none())
    n, clicks = alone.table("n")[0], alone.table("clicks")[0]
    clicked, ctr = _rates(alone, weighted=False), _rates(alone, weighted=True)
    return [
        {
            "tag": Tag(parts).names,
            "n": round(float(n[t])),
            "clicks": round(float(clicks[t])),
            **dict(zip(("clicked", "clicked_low", "clicked_high"), clicked[t], strict=True)),
            **dict(zip(("ctr", "ctr_low", "ctr_high"), ctr[t], strict=True)),
        }
        for t, parts in enumerate(cells.tags)
        if n[t] > 0
    ]


def _part(name: str, cells: Cells) -> dict[str, object]:
    """A bucket or a period: `tags` begins with all variants, whose tag is empty."""
    rows = [{key: row[key] for key in row if not key.startswith("ctr")} for row in tags_of(cells)]
    return {"name": name or None, "tags": rows}


def _rates(cells: Cells, *, weighted: bool) -> list[tuple[float | None, float | None, float | None]]:
    """Of every tag the rate of everybody, and Wilson's interval (1927, doi:10.2307/2276774) of as many independent
    exposures as the jackknife's error says there are; None where nothing was shown, or the error cannot be known."""
    rate, error = (of[0] for of in cells.ctr(weighted=weighted))
    reach = t_quantile(LEVEL)
    out: list[tuple[float | None, float | None, float | None]] = []
    for p, se in zip(rate.tolist(), error.tolist(), strict=True):
        if not (math.isfinite(se) and se > 0 and 0 < p < 1):
            out.append((p if math.isfinite(p) else None, None, None))
            continue
        size = p * (1 - p) / se**2
        centre = (p + reach**2 / (2 * size)) / (1 + reach**2 / size)
        half = reach / (1 + reach**2 / size) * math.sqrt(p * (1 - p) / size + reach**2 / (4 * size**2))
        out.append((p, max(centre - half, 0.0), min(centre + half, 1.0)))
    return out


def _exposures(cells: Cells) -> int:
    return round(float(cells.main.take(cells.value == 0).total("n", (1, len(cells.tags)))[0, 0]))


def _preference(cell: PreferenceCell) -> dict[str, object]:
    return asdict(cell) | {"segment": dict(cell.segment), "tag": dict(cell.tag)}


# ── in words ────────────────────────────────────────────────────────────────────────────────────────────────────────


def shown_lines(shown: Mapping[str, Any]) -> list[str | Shown]:
    """What `cells show` prints."""
    found: list[str | Shown] = [_facts(shown), "", "Tags, of everybody:", _tags(shown)]
    if shown["by"] is not None:
        found += ["", f"Clicks of exposures by {shown['by']['what']}:", _parts(shown["by"])]
    known, listed = shown["preferences_known"], len(shown["preferences"])
    head = f"The {listed} strongest of {known:,} preferences, by what is left once they are drawn to 1:"
    found += ["", head, _preferences(shown["preferences"])] if listed else ["", "No preference is known."]
    return [*found, "", NOTE, *(f"Note: {note}" for note in shown["notes"])]


def _facts(of: Mapping[str, Any]) -> Shown:
    about, share = of["definitions"], of["effective_share"]
    weighted = bool(about["weighted_by"])
    periods = [name for name in of["periods"] if name]
    return fields({
        "exposures": f"{of['exposures']:,}",
        "clicks": f"{of['clicks']:,}",
        "cells": f"{of['cells']:,}" + (", with pairs" if about["pairs"] else ""),
        "strata": f"{of['strata']:,}",
        "buckets": ", ".join(name for name in of["buckets"] if name),
        "periods": f"{len(periods):,} {about['period']}{'s' * (len(periods) > 1)}, {min(periods)} – {max(periods)}"
        if periods else None,
        "replicates": f"{of['replicates']} of {REPLICATES}",
        "bins": "; ".join(f"{f['name']} ({f['kind']}, {len(f['values'])} values)" for f in about["fields"]),
        "weighted by": ", ".join(about["weighted_by"]),
        "worth": f"{share:.0%} of the exposures".replace("%", " %") if weighted and share is not None else None,
        "clipped": f"{of['clipped']:,}" if weighted else None,
    })  # fmt: skip


def _tags(shown: Mapping[str, Any]) -> Shown:
    weighted = bool(shown["definitions"]["weighted_by"])
    effects = {_joined(effect["tag"]): effect for effect in shown["main_effects"]}
    rows = []
    for row in shown["tags"]:
        effect = effects.get(_joined(row["tag"]))
        rows.append([
            _joined(row["tag"]) or "all", f"{row['n']:,}", f"{row['clicks']:,}", _rate(row, "clicked"),
            *([_rate(row, "ctr")] if weighted else []),
            None if effect is None else f"{_signed(effect['effect'])} ({_signed(effect['ci_low'])} to"
            f" {_signed(effect['ci_high'])})",
            None if effect is None else "< 0.001" if effect["q_value"] < 0.001 else f"{effect['q_value']:.3f}",
        ])  # fmt: skip
    alike = ["CTR if shown to all alike (95 %)"] if weighted else []
    columns = ("tag", "exposures", "clicks", "clicked (95 %)", *alike, "CTR with it over without (95 %)", "q")
    return table(columns, rows, whole=("exposures", "clicks", "q"))


def _parts(by: Mapping[str, Any]) -> Shown:
    rows = chain.from_iterable(_part_rows(part) for part in by["parts"])
    return table((by["what"], "tag", "exposures", "clicks", "clicked (95 %)"), rows, whole=("exposures", "clicks"))


def _part_rows(part: Mapping[str, Any]) -> Iterator[Sequence[object]]:
    for row in part["tags"]:
        tag = _joined(row["tag"]) or "all"
        yield part["name"] or "unknown", tag, f"{row['n']:,}", f"{row['clicks']:,}", _rate(row, "clicked")


def _preferences(cells: Sequence[Mapping[str, Any]]) -> Shown:
    rows = [
        (
            _joined(cell["segment"]), _joined(cell["tag"]), f"{cell['n']:,}", f"{cell['clicks']:,}",
            f"{cell['preference']:.2f}" + _ends(cell["ci_low"], cell["ci_high"]),
            f"{cell['shrunk']:.2f}" + _ends(cell["shrunk_low"], cell["shrunk_high"]),
        )
        for cell in cells
    ]  # fmt: skip
    columns = ("segment", "tag", "exposures", "clicks", "preference (95 %)", "drawn to 1 (95 %)")
    return table(columns, rows, whole=("exposures", "clicks"))


def _joined(names: Mapping[str, str]) -> str:
    return " & ".join(f"{name}={value}" for name, value in names.items())


def _rate(row: Mapping[str, Any], name: str) -> str | None:
    value, low, high = (row[name + end] for end in ("", "_low", "_high"))
    if value is None:
        return None
    ends = " (unknown)" if low is None else f" ({low:.2%}–{high:.2%})"
    return f"{value:.2%}{ends}".replace("%", " %")


def _ends(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" ({low:.2f}–{high:.2f})"


def _signed(effect: float) -> str:
    return f"{effect:+,.1%}".replace("%", " %").replace("-", "−")
