"""Portraits: who prefers which tag in a scene, and what to design for some users."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kaleidoscope.operator_cli.frame import (
    MOST,
    Cursor,
    Limit,
    Output,
    Scene,
    Work,
    command,
    headed,
    moment_in,
    more,
    none_of,
    pairs_in,
    short,
    when,
)
from kaleidoscope.terminal import fields, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from kaleidoscope.portrait_design import Design, DesignDimension
    from kaleidoscope.portraits import CellView, PortraitView

portrait_group = typer.Typer(
    name="portrait", help="Portraits: who prefers which tag, and what to design for whom.", no_args_is_help=True
)


class Tongue(StrEnum):
    """What sentences are written in."""

    EN = "en"
    ZH = "zh"


class FileFormat(StrEnum):
    """What a portrait is written as."""

    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"


Number = Annotated[
    int | None, typer.Option("--number", min=1, max=MOST, help="Which portrait of the scene. Default: the newest.")
]
At = Annotated[
    str | None,
    typer.Option(
        "--at", metavar="DATE", help="The newest portrait of then: a day, or a moment such as 2026-11-28T20:00."
    ),
]
Speaking = Annotated[Tongue, typer.Option("--language", help="Of the sentences.")]


@command(portrait_group, "list")
def portrait_list(work: Work, scene: Scene, cursor: Cursor = None, limit: Limit = 50) -> Output:
    """List the portraits of a scene, newest first: of which exposures, by which methods, and what they found."""
    from kaleidoscope.portraits import list_portraits
    from kaleidoscope.views import page_view

    page = page_view(list_portraits(work.session, scene, cursor=cursor, limit=limit), lambda view: view)
    rows = [
        (p.number, when(p.created_at), p.author, _period(p), f"{p.exposures:,}", f"{p.insights:,}", f"{p.cells:,}",
         p.taxonomy, "yes" if p.simulated else None)
        for p in page.items
    ]  # fmt: skip
    columns = ("number", "made", "by", "exposures of", "exposures", "insights", "cells", "taxonomy", "simulated")
    return Output(page, table(columns, rows, whole=("number", "made")), *none_of(rows, "portraits"),
                  *more(page.next_cursor))  # fmt: skip


@command(portrait_group, "show")
def portrait_show(
    work: Work,
    scene: Scene,
    segment: Annotated[
        list[str] | None,
        typer.Option("--segment", metavar="FIELD=VALUE", help="Of these users alone, such as age=[30, 40); repeat it."),
    ] = None,
    everyone: Annotated[
        bool, typer.Option("--everyone", help="Of everybody: main effects alone, without a segment.")
    ] = False,
    number: Number = None,
    at: At = None,
    language: Speaking = Tongue.EN,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Output:
    """Show a portrait: what it is of, and what it says, insights first, then main effects, then mere preferences."""
    from kaleidoscope.portraits import portrait_of

    wanted = dict(pairs_in("--segment", segment or [])) or ({} if everyone else None)
    page = portrait_of(
        work.session, scene, wanted, number=number, at=_at(at), language=language.value, cursor=cursor, limit=limit
    )
    return Output(
        page, fields(_facts(page.portrait)), "", _cells(page.items), *none_of(page.items, "cells"),
        *(f"- {cell.sentence}" for cell in page.items), *more(page.next_cursor),
    )  # fmt: skip


@command(portrait_group, "export")
def portrait_export(
    work: Work,
    scene: Scene,
    file: Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="Its ending says the format.")],
    number: Number = None,
    at: At = None,
    format: Annotated[FileFormat | None, typer.Option("--format", help="Default: what the file's ending says.")] = None,
    language: Speaking = Tongue.EN,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Although the file is there already.")] = False,
) -> Output:
    """Write every cell of a portrait to a CSV, JSON or Parquet file."""
    from kaleidoscope.portraits import export_portrait

    portrait, cells = export_portrait(
        work.session, scene, file, number=number, at=_at(at), format=None if format is None else format.value,
        language=language.value, overwrite=overwrite,
    )  # fmt: skip
    value = {"file": str(file), "cells": cells, "portrait": portrait}
    return Output(value, f"Wrote {file}: {cells:,} cells of portrait {portrait.number}.")


@command(portrait_group, "design")
def portrait_design(
    work: Work,
    scene: Scene,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", metavar="NAME=VALUE", help="Of the user, such as age=30 (age=: missing); repeat."),
    ] = None,
    number: Number = None,
    at: At = None,
    language: Speaking = Tongue.EN,
) -> Output:
    """Say what to design for some users, how sure that is, and which tags were never tried enough with them."""
    from kaleidoscope.portrait_design import design_for

    given = dict(pairs_in("--attribute", attribute or []))
    design = design_for(work.session, scene, given, number=number, at=_at(at), language=language.value)
    return Output(design, design.says[0], *(f"Note: {note}" for note in design.notes), *_design(design))


def _at(text: str | None) -> datetime | date | None:
    """A day, or a moment; without a zone it is UTC."""
    moment = moment_in("--at", text)
    return moment if moment is None or len((text or "").strip()) > len("2026-11-28") else moment.date()


def _period(portrait: PortraitView) -> str | None:
    if portrait.since is None and portrait.until is None:
        return None
    return " – ".join("?" if at is None else at.strftime("%Y-%m-%d") for at in (portrait.since, portrait.until))


def _facts(portrait: PortraitView) -> dict[str, object]:
    return {
        "portrait": f"{portrait.number} of scene {portrait.scene_id}",
        "users": "SIMULATED" if portrait.simulated else None,
        "made": f"{when(portrait.created_at)} by {portrait.author}",
        "exposures": f"{portrait.exposures:,}",
        "units": None if portrait.units is None else f"{portrait.units:,}",
        "from": when(portrait.since),
        "until": when(portrait.until),
        "releases": ", ".join(map(str, portrait.releases)),
        "buckets": ", ".join(portrait.buckets),
        "methods": ", ".join(portrait.methods),
        "taxonomy": portrait.taxonomy,
        "seed": portrait.seed,
        "log": portrait.log_hash,
    }


def _cells(cells: Sequence[CellView]) -> Table:
    rows = [
        (
            _names(cell.segment) or "everybody",
            _names(cell.tag) + ("" if cell.status in ("current", "unversioned") else f" ({cell.status})"),
            f"{cell.n:,}",
            None if cell.ctr is None else f"{cell.ctr:.2%}".replace("%", " %"),
            _effect(cell.effect, cell.effect_low, cell.effect_high),
            None if cell.q_value is None else "< 0.001" if cell.q_value < 0.001 else f"{cell.q_value:.3f}",
            None if cell.shrunk is None else _ratio(cell.shrunk, cell.shrunk_low, cell.shrunk_high),
            ", ".join(f"{method} {'+' if sign > 0 else '−'}" for method, sign in cell.found_by.items()),
        )
        for cell in cells
    ]
    columns = ("segment", "tag", "n", "CTR", "effect (95 %)", "q", "preference (95 %)", "found by")
    return table(columns, rows, whole=("n", "CTR", "q"))


def _names(names: dict[str, str]) -> str:
    return short(", ".join(f"{name}={value}" for name, value in names.items()))


def _effect(effect: float | None, low: float | None, high: float | None) -> str | None:
    if effect is None or low is None or high is None:
        return None
    return f"{_percent(effect)} ({_percent(low)} to {_percent(high)})"


def _percent(effect: float) -> str:
    return f"{effect:+,.0%}".replace("%", " %").replace("-", "−")


def _ratio(value: float, low: float | None, high: float | None) -> str:
    ends = "" if low is None or high is None else f" ({low:.2f}–{high:.2f})"
    return f"{value:.2f}{ends}"


def _design(design: Design) -> Iterator[str | Table]:
    for dimension in design.dimensions:
        yield ""
        yield f"{dimension.dimension} ({dimension.label}):"
        yield _expected(dimension)
        yield from (f"- {tag.sentence}" for tag in dimension.tags)
    if design.together:
        yield ""
        yield from headed("Together", [cell.sentence for cell in design.together])
    yield ""
    yield design.rule
    for where, head in (
        ("scene", "Never tried enough, in materials of the scene"),
        ("library", "Never tried enough, in other materials of the library"),
        ("nobody", "Never tried enough, in no material yet"),
    ):
        yield from headed(head, [one.sentence for one in design.untried if one.where == where])


def _expected(dimension: DesignDimension) -> Table:
    rows = [
        (
            _names(tag.tag),
            _effect(tag.expected, tag.low, tag.high),
            "; ".join(
                f"{_names(part.segment)} {_percent(part.effect)}"
                + ("" if part.tag == tag.tag else f" of {_names(part.tag)}")
                for part in tag.insights
            ),
            "; ".join(f"{_names(one.segment)} {_ratio(one.shrunk, one.low, one.high)}" for one in tag.weaker),
            None if tag.n is None else f"{tag.n:,}",
            None if tag.enough is None else "yes" if tag.enough else "NO",
        )
        for tag in dimension.tags
    ]
    columns = ("tag", "expected odds (95 %)", "insights", "weaker: preference", "n, at most", "enough")
    return table(columns, rows, whole=("n, at most", "enough"))
