"""`kaleidoscope attribute`: who prefers which telling, and may a lift be trusted; from a log or a scene's exposures.

read → attribute by every method → agreement, effectiveness → report.html, summary.json, CSV → (scene) portrait
"""

from __future__ import annotations

import csv
import io
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attribution.analysis import Analysis, analyse
from attribution.report import render
from kaleidoscope.access import operator
from kaleidoscope.commands.exposures import Exposures, existing_database, read_exposures_of
from kaleidoscope.commands.output import Clock, make_folder, write_whole
from kaleidoscope.errors import InputError, NotFoundError
from kaleidoscope.files import json_text
from kaleidoscope.log import read_log
from kaleidoscope.log_schema import read_schema
from kaleidoscope.portraits import PortraitCell, PortraitRun, csv_cell, store_portrait
from kaleidoscope.progress import Progress
from kaleidoscope.ranker import Ranker
from kaleidoscope.settings import Settings
from kaleidoscope.vocabulary import Bucket
from kaleidoscope.wording import SURE, main_effect_sentence

if TYPE_CHECKING:
    from attribution.consensus import Agreement
    from attribution.insights import Insight
    from attribution.preference import PreferenceCell

MIN_EXPOSURES = 1_000
PACKAGES = ("kaleidoscope", "numpy", "scipy", "interpret-core", "lightgbm")


def attribute_log(
    log_path: Path,
    schema_path: Path,
    out_dir: Path,
    *,
    model: Path | None = None,
    control: str = Bucket.CONTROL.value,
    seed: int,
    progress: Progress,
    simulated: bool = False,
) -> dict[str, object]:
    """Attribute a log of the contract and write `out_dir`/report.html, summary.json and the CSV files; the summary.

    `model`: the folder of an exported model, whose reasons are shown beside. `control`: the bucket that lifts are over.
    Raises SchemaError or LogError where the input cannot be used; then nothing is written.
    """
    clock = Clock(progress)
    with clock("read"):
        log = read_log(log_path, read_schema(schema_path))
        ranker = None if model is None else Ranker.load(model)
    make_folder(out_dir)
    analysis = analyse(
        log, name=log_path.name, seed=seed, simulated=simulated, ranker=ranker, control=control, stage=clock
    )
    return _write(out_dir, analysis, clock)


def attribute_scene(
    settings: Settings,
    *,
    business: str,
    scene: str,
    out_dir: Path,
    model: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    seed: int,
    progress: Progress,
    simulated: bool = False,
    min_exposures: int = MIN_EXPOSURES,
) -> dict[str, object]:
    """Attribute a scene's exposures, write what `attribute_log` writes, and keep the portrait with the scene.

    `model`: a version, or what a release may call it; None: the scene's champion, where it has one. Raises InputError
    where there are fewer exposures than `min_exposures`; then nothing is written.
    """
    clock = Clock(progress)
    ranker = _model_of(settings, business, scene, model)
    with tempfile.TemporaryDirectory(prefix="kaleidoscope-attribute-") as scratch:
        with clock("read"):
            read = read_exposures_of(settings, business, scene, Path(scratch), control=True, since=since, until=until)
        if read.log.n_exposures < min_exposures:
            raise InputError(
                f"scene {scene!r}: {read.log.n_exposures:,} exposures to attribute, at least {min_exposures:,} are"
                " needed. Wait, ask for a longer period, or give bucket random more traffic."
            )
        make_folder(out_dir)
        analysis = analyse(
            read.log, name=scene, seed=seed, simulated=simulated, ranker=ranker, shares=read.shares, stage=clock
        )
    with clock("keep"):
        portrait = keep_portrait(settings, business, scene, analysis, read)
    return _write(out_dir, analysis, clock, left_out=read.left_out, log_hash=read.hash, portrait=portrait)


def keep_portrait(
    settings: Settings, business: str, scene: str, analysis: Analysis, read: Exposures
) -> dict[str, object]:
    """Keep what was found as the scene's newest portrait; its number, and whether there was none of this analysis."""
    facts = analysis.facts
    run = PortraitRun(
        log_hash=read.hash,
        taxonomy=read.taxonomy,
        exposures=facts.exposures,
        units=facts.units,
        methods=tuple(analysis.by_method),
        since=None if facts.since is None else datetime.fromisoformat(facts.since),
        until=None if facts.until is None else datetime.fromisoformat(facts.until),
        releases=read.releases,
        buckets=tuple(facts.buckets),
        seed=analysis.seed,
        simulated=analysis.simulated,
        shown=facts.shown,
    )
    cells = list(portrait_cells(analysis))
    caller = operator(settings.user or "kaleidoscope", business)
    with existing_database(settings.database_url) as database, database.transaction(caller) as session:
        stored = store_portrait(session, scene, run, cells)
    return {"number": stored.portrait.number, "new": stored.new, "cells": len(cells)}


def portrait_cells(analysis: Analysis) -> Iterator[PortraitCell]:
    """A cell for everybody's taste for every tag, for every segment × tag, and for every crossing that was found."""
    for main in analysis.attribution.main_effects:
        yield PortraitCell(
            {}, main.tag, main.n, clicks=main.clicks, ctr=main.ctr,
            effect=main.effect, effect_low=main.ci_low, effect_high=main.ci_high, q_value=main.q_value,
        )  # fmt: skip
    agreed = {_place(one.insight): one for one in analysis.consensus}
    for cell in () if analysis.preference is None else analysis.preference.cells:
        one = agreed.pop(_place(cell), None)
        found = {} if one is None else _found(one)
        yield PortraitCell(
            cell.segment, cell.tag, cell.n, cell.clicks, cell.ctr, cell.ctr_low, cell.ctr_high,
            cell.preference, cell.ci_low, cell.ci_high, cell.shrunk, cell.shrunk_low, cell.shrunk_high, **found,
        )  # fmt: skip
    for one in agreed.values():
        yield PortraitCell(
            one.insight.segment, one.insight.tag, one.insight.n, crossed=one.insight.crossed, **_found(one)
        )


def _place(of: Insight | PreferenceCell) -> tuple[frozenset[tuple[str, str]], frozenset[tuple[str, str]], bool]:
    return frozenset(of.segment.items()), frozenset(of.tag.items()), getattr(of, "crossed", False)


def _found(one: Agreement) -> dict[str, Any]:
    insight = one.insight
    return {
        "effect": insight.effect,
        "effect_low": insight.ci_low,
        "effect_high": insight.ci_high,
        "q_value": insight.q_value,
        "found_by": dict(one.found_by),
        "explained_by": tuple((pair.segment, pair.tag) for pair in insight.explained_by),
    }


def _model_of(settings: Settings, business: str, scene: str, model: str | None) -> Ranker | None:
    """The model whose reasons are shown beside; None where the scene has none and none was asked for."""
    from kaleidoscope.registry import Alias, get_model, resolve

    try:
        version = resolve(settings, business, scene, Alias.CHAMPION if model is None else model)
    except (NotFoundError, InputError):
        if model is not None:
            raise
        return None
    return Ranker.load(get_model(settings, business, version).folder)


def _write(out_dir: Path, analysis: Analysis, clock: Clock, **more: object) -> dict[str, object]:
    with clock("report"):
        page = render(analysis)
    summary = summary_of(analysis) | {"timings_s": clock.seconds} | more
    write_whole(out_dir, {"report.html": page, "summary.json": json_text(summary), **tables_of(analysis)})
    return summary


def summary_of(analysis: Analysis) -> dict[str, object]:
    """What summary.json holds. `insights` are those of the consensus; each method's own are under `methods`."""
    diagnostics = analysis.attribution.diagnostics
    return {
        "log": analysis.log_name,
        "scene": analysis.scene,
        "simulated": analysis.simulated,
        **asdict(analysis.facts),
        "checks": [asdict(check) for check in analysis.checks],
        "insights": [
            agreement.insight.to_json() | {"sentence": agreement.insight.sentence}
            for agreement in analysis.agreements
            if agreement.holds
        ],
        "main_effects": [effect.to_json() for effect in analysis.attribution.main_effects],
        "agreement": [agreement.to_json() for agreement in analysis.agreements],
        "methods": {
            name: {"insights": [insight.to_json() for insight in insights]}
            for name, insights in analysis.by_method.items()
        },
        "not_done": dict(analysis.not_done),
        "examined": len(diagnostics.examined.segments),
        "too_few": diagnostics.too_few,
        "effective_share": diagnostics.effective_share,
        "clipped": diagnostics.clipped,
        "effectiveness": None if analysis.effectiveness is None else analysis.effectiveness.to_json(),
        "versions": {name: version(name) for name in PACKAGES},
        "seed": analysis.seed,
    }


def said(summary: Mapping[str, Any], most: int = 10) -> list[str]:
    """What the command says at the end: the insights of the consensus, strongest first, and what was not done.

    Where there are none it says why, and what everybody takes.
    """
    found = [agreement for agreement in summary["agreement"] if agreement["consensus"]]
    lines = [
        f"{insight['sentence']} {agreement['sentence']}"
        for insight, agreement in zip(summary["insights"], found, strict=True)
    ][:most]
    if len(found) > most:
        crossings = sum(agreement["insight"]["crossed"] for agreement in found[most:])
        of_two = f", {crossings} of them of two user fields or two tags at once" if crossings else ""
        lines.append(f"{len(found) - most} more are in the report{of_two}.")
    if not found:
        lines += [_nothing(summary), *_taken_by_everybody(summary)]
    by_reason: dict[str, list[str]] = {}
    for method, why in summary["not_done"].items():
        by_reason.setdefault(why, []).append(method)
    lines += [f"{', '.join(methods)}: not done. {why}" for why, methods in by_reason.items()]
    if "portrait" in summary:
        kept = summary["portrait"]
        again = "" if kept["new"] else ", which was there: of the same log, analysed in the same way"
        lines.append(f"Kept as portrait {kept['number']} of {summary['log']}{again}.")
    return lines


def _nothing(summary: Mapping[str, Any]) -> str:
    """Why no preference was found."""
    if not summary["user"]:
        return "Without user fields nobody's preferences can be told apart, only what everybody takes."
    if summary["examined"]:
        return "No preference was found, which is not that there is none: the report says what would have been."
    pairs = summary["too_few"]
    if pairs:
        return (
            f"Too few exposures to find anything: none of the {pairs:,} segment × tag pairs has enough clicks, and"
            " enough exposures without one, to be looked at."
        )
    return "No preference was found: there was no segment × tag pair to look at."


def _taken_by_everybody(summary: Mapping[str, Any], most: int = 5) -> list[str]:
    """The surest significant main effect of each dimension."""
    effects = [effect for effect in summary["main_effects"] if effect["q_value"] <= SURE]
    near = {id(one): min(abs(math.log1p(max(one[end], -0.9999))) for end in ("ci_low", "ci_high")) for one in effects}
    surest: dict[tuple[str, ...], Mapping[str, Any]] = {}
    for effect in sorted(effects, key=lambda one: -near[id(one)]):
        surest.setdefault(tuple(effect["tag"]), effect)
    shown = list(surest.values())[:most]
    if not shown:
        return ["Over all users, no tag by itself makes a difference that is surely more than chance."]
    sentences = [
        main_effect_sentence(one["tag"], one["effect"], one["ci_low"], one["ci_high"], one["q_value"], one["n"])
        for one in shown
    ]
    more = len(effects) - len(shown)
    rest = [f"{more} more such tags are in the report."] if more else []
    return [
        "What everybody takes, each tag by itself, not adjusted for those shown together with it:",
        *sentences,
        *rest,
    ]


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def tables_of(analysis: Analysis) -> dict[str, str]:
    """CSV files by name: each method's insights, the portrait of every segment, the grid, and main effects."""
    insights = [
        {"method": method, **_named(insight.segment, insight.tag), **_numbers(insight, INSIGHT)}
        for method, found in analysis.by_method.items()
        for insight in found
    ]
    portrait = [] if analysis.preference is None else analysis.preference.cells
    grid = [] if analysis.grid is None else analysis.grid.cells
    main = [{"tag": _joined(m.tag), **_numbers(m, MAIN)} for m in analysis.attribution.main_effects]
    return {
        "insights.csv": csv_text(("method", "segment", "tag", *INSIGHT), insights),
        "portrait.csv": csv_text(
            ("segment", "tag", *PORTRAIT),
            [{**_named(cell.segment, cell.tag), **_numbers(cell, PORTRAIT)} for cell in portrait],
        ),
        "grid.csv": csv_text(
            ("segment", "tag", *GRID), [{**_named(cell.segment, cell.tag), **_numbers(cell, GRID)} for cell in grid]
        ),
        "main_effects.csv": csv_text(("tag", *MAIN), main),
        "variants.csv": csv_text(VARIANT, _variants(analysis)),
    }


def _variants(analysis: Analysis) -> Iterator[dict[str, object]]:
    """Each variant where the model chose it and where it was shown at random."""
    found = () if analysis.effectiveness is None else analysis.effectiveness.eye_catching.variants
    for one in found:
        row = _numbers(one, ("variant_id", "exposures", "share", "random_exposures", "q_value"))
        for name in ("ctr", "random_ctr", "lift"):
            measured = getattr(one, name)
            ends = (None,) * 3 if measured is None else (measured.value, measured.ci_low, measured.ci_high)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        yield row


VARIANT = (
    "variant_id", "exposures", "share", "ctr", "ctr_low", "ctr_high",
    "random_exposures", "random_ctr", "random_ctr_low", "random_ctr_high", "lift", "lift_low", "lift_high", "q_value",
)  # fmt: skip
MAIN = ("effect", "ci_low", "ci_high", "q_value", "n")
INSIGHT = (*MAIN, "preference")
RATE = ("n", "clicks", "ctr", "ctr_low", "ctr_high")
PORTRAIT = (*RATE, "preference", "ci_low", "ci_high", "shrunk", "shrunk_low", "shrunk_high")
GRID = (*RATE, "effect", "ci_low", "ci_high", "q_value")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as CSV. Text is on one line, and none is a formula to a spreadsheet; unknown is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return out.getvalue()


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else csv_cell(value)


def _named(segment: Mapping[str, str], tag: Mapping[str, str]) -> dict[str, str]:
    return {"segment": _joined(segment), "tag": _joined(tag)}


def _joined(names: Mapping[str, str]) -> str:
    return " & ".join(f"{name}={value}" for name, value in names.items())


def _numbers(of: object, names: Sequence[str]) -> dict[str, object]:
    return {name: getattr(of, name) for name in names}
