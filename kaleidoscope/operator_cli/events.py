"""Commands of the log: closing its days, counting what came in, exporting it as a log to learn from, forgetting."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kaleidoscope.errors import InputError
from kaleidoscope.operator_cli.frame import Output, Work, command, none_of
from kaleidoscope.terminal import table

if TYPE_CHECKING:
    from kaleidoscope.events import Describe, Dropped, Rules, Shown, Words
    from kaleidoscope.taxonomy import Mapping as TagMapping

events_group = typer.Typer(name="events", help="The log: decisions and what became of them.", no_args_is_help=True)
InScene = Annotated[str | None, typer.Option("--scene", help="Only of this scene.")]


def describe_with(work: Work) -> Describe:
    """What the variants of a business's releases show, each release read once."""
    from kaleidoscope.events import shown_in
    from kaleidoscope.release import get_release, verify

    known: dict[tuple[str, int], Mapping[str, Shown]] = {}

    def describe(scene: str, number: int) -> Mapping[str, Shown]:
        if (scene, number) not in known:
            known[scene, number] = shown_in(verify(get_release(work.session, scene, number)))
        return known[scene, number]

    return describe


def words_with(work: Work) -> Words:
    """What became of the tags of a business's releases in the newest vocabulary among theirs."""
    from kaleidoscope.release import get_release, verify
    from kaleidoscope.taxonomy import into_newest

    def words(releases: Collection[tuple[str, int]]) -> Mapping[tuple[str, int], TagMapping]:
        versions = {(scene, n): verify(get_release(work.session, scene, n)).taxonomy for scene, n in releases}
        return into_newest(work.session, versions)[1]

    return words


def rules_of(work: Work) -> Rules:
    """Which events count: by the attribution of each scene, and of the releases that it shows, if that is longer, since
    servers go by those."""
    from kaleidoscope.events import Rules, Windows
    from kaleidoscope.release import all_live, get_release, verify
    from kaleidoscope.scenes import attributions

    windows = {scene: Windows.attributing(spec) for scene, spec in attributions(work.session).items()}
    for scene, live in all_live(work.session).items():
        for number in filter(None, (live.stable, live.candidate)):
            content = verify(get_release(work.session, scene, number))
            windows[scene] = windows[scene].or_longer(Windows.attributing(content.scene.attribution))
    return Rules(windows=windows)


@command(events_group, "compact")
def events_compact(
    work: Work,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Close today, too: events of its decisions that are still to come are refused."),
    ] = False,
) -> Output:
    """Bring the days of the log to Parquet whose attribution windows are over."""
    from kaleidoscope.database import open_database
    from kaleidoscope.events import compact

    with open_database(work.settings.log_url) as database:
        done = compact(
            database,
            work.settings.log_dir,
            business=work.session.business,
            now=datetime.now(UTC),
            describe=describe_with(work),
            rules=rules_of(work),
            everything=everything,
        )
    days = [{"scene": scene, "day": day} for scene, day in done.days]
    lines = [f"{scene} {day}" for scene, day in done.days]
    closed = (
        f"Closed {len(days)} days with {done.exposures:,} exposures." if days else "No day is over that was not closed."
    )
    return Output({"days": days, "exposures": done.exposures}, closed, *lines)


@command(events_group, "counts")
def events_counts(
    work: Work,
    scene: InScene = None,
    since: Annotated[str | None, typer.Option("--since", metavar="DAY", help="From this day on: 2026-11-27.")] = None,
) -> Output:
    """Count what came of the events that were sent: accepted, duplicate, forged, late, of bots."""
    from kaleidoscope.database import open_database
    from kaleidoscope.events import event_counts
    from kaleidoscope.scenes import get_scene

    if scene is not None:
        get_scene(work.session, scene)
    with open_database(work.settings.log_url) as database:
        found = event_counts(database, work.session.business, scene=scene, since=_day("--since", since))
    counts = {what.value: n for what, n in sorted(found.items())}
    rows = [(what.replace("_", " "), f"{n:,}") for what, n in counts.items()]
    return Output({"counts": counts}, *([table(("events", "number"), rows)] if rows else none_of(rows, "events yet")))


@command(events_group, "export")
def events_export(
    work: Work,
    out: Annotated[
        Path, typer.Option("--out", file_okay=False, help="Folder to write exposures.parquet and schema.yaml to.")
    ],
    scene: InScene = None,
    label: Annotated[Literal["click", "conversion"], typer.Option("--label", help="What is to be learned.")] = "click",
) -> Output:
    """Write the exposures that can be learned from as a log for `kaleidoscope learn`."""
    from kaleidoscope.database import open_database
    from kaleidoscope.events import contract_log

    with open_database(work.settings.log_url) as database:
        written = contract_log(
            database,
            work.settings.log_dir,
            out,
            business=work.session.business,
            describe=describe_with(work),
            scene=scene,
            label=label,
            words=words_with(work),
        )
    left = [f"Left out {n:,}: {why.replace('_', ' ')}" for why, n in written.left_out.items() if n]
    return Output(
        {
            "log": str(written.path),
            "schema": str(written.schema),
            "exposures": written.exposures,
            "left_out": written.left_out,
        },
        f"Wrote {written.exposures:,} exposures to {written.path}.",
        *left,
        f"kaleidoscope learn {written.path} --schema {written.schema} --out DIR",
    )


@command(events_group, "drop")
def events_drop(
    work: Work,
    before: Annotated[str, typer.Option("--before", metavar="DAY", help="The first day to keep: 2026-01-01.")],
) -> Output:
    """Delete the log of all days before one; counts stay."""
    from kaleidoscope.database import open_database
    from kaleidoscope.events import drop_before

    day = _day("--before", before)
    assert day is not None
    with open_database(work.settings.log_url) as database:
        dropped = drop_before(database, work.settings.log_dir, business=work.session.business, before=day)
    return _dropped(f"Deleted everything before {day}", dropped)


def _erased(work: Work, unit: str) -> Mapping[str, object]:
    """Before the audit's transaction: the log may be in the same database, which has one writer at a time."""
    from kaleidoscope import feature_store
    from kaleidoscope.database import open_database
    from kaleidoscope.events import erase_unit
    from kaleidoscope.vocabulary import Role

    work.session.caller.require(Role.ADMIN)
    if not unit.strip():
        raise InputError("--unit: say whom to forget.")
    with open_database(work.settings.log_url) as database:
        dropped = erase_unit(database, work.settings.log_dir, business=work.session.business, unit=unit)
    feature_store.erase(work.settings, work.session.business, unit)  # after the log, of which they are made
    return {"dropped": dropped}


@command(events_group, "erase", write=True, first=_erased)
def events_erase(
    work: Work,
    unit: Annotated[str, typer.Option("--unit", help="Whose events, decisions and features to forget.")],
    *,
    dropped: Any,
) -> Output:
    """Forget a unit: its decisions, events and features. The audit keeps that somebody was forgotten, and not who."""
    from kaleidoscope.businesses import audit_erasure

    audit_erasure(work.session, unit)
    return _dropped("Forgot the unit", dropped)


def _dropped(what: str, dropped: Dropped) -> Output:
    return Output(
        vars(dropped),
        f"{what}: {dropped.decisions:,} decisions and {dropped.events:,} events of open days, {dropped.exposures:,}"
        f" exposures in {dropped.files:,} files.",
    )


def _day(option: str, text: str | None) -> date | None:
    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise InputError(f"{option}: {text!r} is no day. Write it like 2026-11-27.") from None
