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

from attribution.analysis import SHAPES, Analysis, analyse
from attribution.consensus import UNTESTED
from attribution.found import TESTED_BY
from attribution.report import render
from kaleidoscope.access import operator
from kaleidoscope.commands.exposures import Exposures, designed_shares, existing_database, read_exposures_of
from kaleidoscope.commands.output import Clock, folder_for, write_whole
from kaleidoscope.errors import InputError, NotFoundError
from kaleidoscope.files import json_text
from kaleidoscope.log import Log, read_log
from kaleidoscope.log_schema import read_schema
from kaleidoscope.portraits import PortraitCell, PortraitRun, csv_cell, store_portrait
from kaleidoscope.progress import Progress
from kaleidoscope.ranker import Ranker
from kaleidoscope.settings import Settings
from kaleidoscope.vocabulary import Bucket, Level, Method
from kaleidoscope.wording import SURE, main_effect_sentence, plain

if TYPE_CHECKING:
    from attribution.consensus import Agreement
    from attribution.insights import Insight
    from attribution.preference import PreferenceCell

MIN_EXPOSURES = 1_000
MARK = "\ufeff"  # by which spreadsheets know UTF-8
WARNINGS = 5  # about the log, said at the end
PACKAGES = ("kaleidoscope", "numpy", "scipy", "interpret-core", "lightgbm")


def attribute_log(
    log_path: Path,
    schema_path: Path,
    out_dir: Path,
    *,
    model: Path | None = None,
    control: str = Bucket.CONTROL.value,
    shares: str | None = None,
    seed: int,
    progress: Progress,
    simulated: bool = False,
) -> dict[str, object]:
    """Attribute a log of the contract and write `out_dir`/report.html, summary.json and the CSV files; the summary.

    `model`: the folder of an exported model, whose reasons are shown beside. `control`: the bucket that lifts are over.
    `shares`: the designed shares of units by bucket, as `designed_shares` reads them. Raises SchemaError, LogError or
    InputError where the input cannot be used; then nothing is written.
    """
    clock = Clock(progress)
    with clock("read"):
        log = read_log(log_path, read_schema(schema_path))
        _known_bucket(log, control)
        designed = None if shares is None else designed_shares(shares, log)
        ranker = None if model is None else Ranker.load(model)
    with folder_for(out_dir):
        analysis = analyse(
            log, name=log_path.name, seed=seed, simulated=simulated, ranker=ranker, control=control, shares=designed,
            stage=clock,
        )  # fmt: skip
        return _write(out_dir, analysis, clock)


def _known_bucket(log: Log, control: str) -> None:
    """Raise InputError where a bucket other than the usual one was named and the log has none of that name."""
    names = [] if log.buckets is None else [str(name) for name in log.buckets.to_pylist() if name]
    if control == Bucket.CONTROL.value or control in names:
        return
    there = f"It has: {', '.join(map(plain, sorted(names)))}." if names else "It names no buckets at all."
    raise InputError(f"{log.path}: --control {plain(control)!r}: the log has no such bucket. {there}")


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
        with folder_for(out_dir):
            analysis = analyse(
                read.log, name=scene, seed=seed, simulated=simulated, ranker=ranker, shares=read.cohorts, stage=clock
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
        overlaps=overlaps_of(analysis),
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
            {}, main.tag, main.n, clicks=main.clicks, ctr=main.ctr, share=main.share, independent=main.independent,
            effect=main.effect, effect_low=main.ci_low, effect_high=main.ci_high, q_value=main.q_value,
        )  # fmt: skip
    agreed = {_place(one.insight): one for one in analysis.consensus}
    for cell in () if analysis.preference is None else analysis.preference.cells:
        one = agreed.pop(_place(cell), None)
        found = {} if one is None else _found(one)
        yield PortraitCell(
            cell.segment, cell.tag, cell.n, cell.clicks, cell.ctr, cell.ctr_low, cell.ctr_high,
            cell.preference, cell.ci_low, cell.ci_high, cell.shrunk, cell.shrunk_low, cell.shrunk_high,
            share=cell.share, click_share=cell.click_share, independent=cell.independent, **found,
        )  # fmt: skip
    for one in agreed.values():
        yield PortraitCell(
            one.insight.segment, one.insight.tag, one.insight.n, crossed=one.insight.crossed, **_found(one)
        )


def overlaps_of(analysis: Analysis) -> list[tuple[dict[str, str], dict[str, str], float]]:
    """How many users are in a segment that an insight is about and in one of another field, for each two of them."""
    if analysis.preference is None:
        return []
    segments, overlap = analysis.preference.segments, analysis.preference.overlap
    told = {_joined(one.insight.segment) for one in analysis.consensus}
    named = [{s.field: s.label} for s in segments]
    about = [i for i, name in enumerate(named) if _joined(name) in told]
    pairs = {(min(i, j), max(i, j)) for i in about for j, s in enumerate(segments) if s.field != segments[i].field}
    return [(named[i], named[j], float(overlap[i, j])) for i, j in sorted(pairs)]


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
    tables = {name: f"{MARK}{table}" for name, table in tables_of(analysis).items()}
    write_whole(out_dir, {"report.html": page, "summary.json": json_text(summary), **tables})
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
            name: {
                "tested_by": TESTED_BY[name],
                "own_test": name not in UNTESTED,
                "insights": [insight.to_json() for insight in insights],
            }
            for name, insights in analysis.by_method.items()
        },
        "models": _models(analysis),
        "not_done": dict(analysis.not_done),
        "examined": len(diagnostics.examined.segments),
        "too_few": diagnostics.too_few,
        "effective_share": diagnostics.effective_share,
        "clipped": diagnostics.clipped,
        "clipped_main_effects": diagnostics.clipped_uniform,
        "lost_main_effects": diagnostics.lost_uniform,
        "certain": diagnostics.certain,
        "effectiveness": None if analysis.effectiveness is None else analysis.effectiveness.to_json(),
        "versions": {name: version(name) for name in PACKAGES},
        "seed": analysis.seed,
    }


def _models(analysis: Analysis) -> dict[str, object]:
    """What models say in numbers: how well they rank, their shapes and heat maps, the pairs they lean on."""
    found = {
        Method.EBM: analysis.ebm, SHAPES: analysis.network_ebm, Method.CONTRIBUTIONS: analysis.contributions,
        Method.NETWORK: analysis.network,
    }  # fmt: skip
    return {str(name): None if model is None else model.to_json() for name, model in found.items()}


def said(summary: Mapping[str, Any], most: int = 10) -> list[str]:
    """What the command says at the end: errors of the log, the insights of the consensus, strongest first, warnings of
    the log, and what was not done.

    Where there are no insights it says why, and what everybody takes.
    """
    found = [agreement for agreement in summary["agreement"] if agreement["consensus"]]
    lines = [f"ERROR in the log: {error}" for error in _messages(summary, Level.ERROR)]
    lines += [
        f"{insight['sentence']} {agreement['sentence']}"
        for insight, agreement in list(zip(summary["insights"], found, strict=True))[:most]
    ]
    if len(found) > most:
        crossings = sum(agreement["insight"]["crossed"] for agreement in found[most:])
        of_two = f", {crossings} of them of two user fields or two tags at once" if crossings else ""
        lines.append(f"{len(found) - most} more {'is' if len(found) - most == 1 else 'are'} in the report{of_two}.")
    if not found:
        lines += [_nothing(summary), *_taken_by_everybody(summary)]
    warnings = _messages(summary, Level.WARNING)
    lines += [f"Warning: {warning}" for warning in warnings[:WARNINGS]]
    if len(warnings) > WARNINGS:
        more = len(warnings) - WARNINGS
        lines.append(
            f"{more} more warning{'s' * (more > 1)} about the log {'are' if more > 1 else 'is'} in the report."
        )
    by_reason: dict[str, list[str]] = {}
    for method, why in summary["not_done"].items():
        by_reason.setdefault(why, []).append(method)
    lines += [f"{', '.join(methods)}: not done. {why}" for why, methods in by_reason.items()]
    if "portrait" in summary:
        kept = summary["portrait"]
        again = "" if kept["new"] else ", which was there: of the same log, analysed in the same way"
        lines.append(f"Kept as portrait {kept['number']} of {summary['log']}{again}.")
    return lines


def _messages(summary: Mapping[str, Any], level: Level) -> list[str]:
    """What the checks of this level say of the log."""
    return [str(check["message"]) for check in summary["checks"] if check["level"] == level]


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
        main_effect_sentence(
            one["tag"], one["effect"], one["ci_low"], one["ci_high"], one["q_value"], one["n"], caveat=False
        )
        for one in shown
    ]
    more = len(effects) - len(shown)
    rest = [f"{more} more such {'tag is' if more == 1 else 'tags are'} in the report."] if more else []
    return [
        "What everybody takes, each tag by itself, not adjusted for those shown together with it:",
        *sentences,
        *rest,
    ]


# ── tables ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def tables_of(analysis: Analysis) -> dict[str, str]:
    """CSV files by name: each method's insights, where they agree, the portrait of every segment, the grid, and main
    effects."""
    insights = [
        {
            "method": method, **_named(insight.segment, insight.tag), **_numbers(insight, INSIGHT),
            "importance": insight.importance.get(method), "tested_by": TESTED_BY[method],
            "explained_by": "; ".join(f"{_joined(p.segment)} × {_joined(p.tag)}" for p in insight.explained_by),
        } for method, found in analysis.by_method.items() for insight in found
    ]  # fmt: skip
    agreement = [
        {
            **_named(one.insight.segment, one.insight.tag), **_numbers(one.insight, AGREED),
            "found_by": ", ".join(f"{method}={'+' if sign > 0 else '-'}" for method, sign in one.found_by.items()),
            "not_found_by": ", ".join(one.not_found_by), "disagree": one.disagree, "consensus": one.holds,
            "sentence": one.sentence,
        } for one in analysis.agreements
    ]  # fmt: skip
    portrait = [] if analysis.preference is None else analysis.preference.cells
    grid = [] if analysis.grid is None else analysis.grid.cells
    main = [{"tag": _joined(m.tag), **_numbers(m, MAIN)} for m in analysis.attribution.main_effects]
    return {
        "insights.csv": csv_text(
            ("method", "segment", "tag", *INSIGHT, "importance", "tested_by", "explained_by"), insights
        ),
        "agreement.csv": csv_text(
            ("segment", "tag", *AGREED, "found_by", "not_found_by", "disagree", "consensus", "sentence"), agreement
        ),
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
AGREED = (*MAIN, "clicks", "ctr", "crossed")
INSIGHT = (*AGREED, "preference")
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
