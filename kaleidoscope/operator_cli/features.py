"""What is known of users: the features that models learn from and decisions are given."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kaleidoscope.operator_cli.frame import Output, Work, command, items, listing
from kaleidoscope.terminal import table

if TYPE_CHECKING:
    from kaleidoscope.feature_store import View

feature_group = typer.Typer(
    name="features", help="What is known of users: profiles, and what the log tells.", no_args_is_help=True
)


@command(feature_group, "apply")
def feature_apply(work: Work) -> Output:
    """Tell the feature store what is declared; the first time, this gives the business features at all."""
    from kaleidoscope import feature_store
    from kaleidoscope.businesses import get_business

    views = feature_store.apply(work.settings, get_business(work.session).id)
    return _views_output(views)


def _views_output(views: list[View]) -> Output:
    rows = [
        (view.name, " × ".join(view.of), feature, kind) for view in views for feature, kind in view.features.items()
    ]
    return Output(items([asdict(view) for view in views]), table(("view", "of", "feature", "type"), rows))


@command(feature_group, "load")
def feature_load(
    work: Work,
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="Parquet or CSV.")],
    unit: Annotated[str, typer.Option("--unit", metavar="COLUMN", help="The column with the users' ids.")] = "unit",
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="COLUMN", help="The column that says from when on it is known. Default: now."),
    ] = None,
) -> Output:
    """Load profiles, a row per user; every other column is a feature of theirs."""
    from kaleidoscope.businesses import get_business
    from kaleidoscope.feature_store import load_profiles

    business = get_business(work.session).id
    loaded = load_profiles(work.settings, business, file, now=datetime.now(UTC), unit=unit, since=since)
    return Output(
        asdict(loaded),
        f"Read {loaded.rows:,} profiles; {loaded.new:,} say something new.",
        f"Features: {', '.join(loaded.features)}",
    )


@command(feature_group, "materialise")
def feature_materialise(work: Work) -> Output:
    """Bring the features up to date with the log and with the clock; a worker does it every few minutes."""
    from kaleidoscope import feature_store
    from kaleidoscope.businesses import get_business
    from kaleidoscope.database import open_database

    business = get_business(work.session).id
    if not feature_store.is_applied(work.settings, business):
        said = "This business has no features: `kaleidoscope features apply` gives it some."
        return Output({"applied": False, "known": {}, "online": {}}, said)
    with open_database(work.settings.log_url) as log:
        done = feature_store.materialise(work.settings, log, business, datetime.now(UTC))
    known, online = ({}, {}) if done is None else (done.known, done.online)
    value = {"applied": True, "known": dict(known), "online": dict(online)}
    return Output(value, f"New in history: {listing(known)}", f"Newer online: {listing(online)}")


@command(feature_group, "show")
def feature_show(
    work: Work,
    unit: Annotated[str | None, typer.Option("--unit", help="What is known of this user now.")] = None,
    scene: Annotated[str, typer.Option("--scene", help="With --unit: the scene that is to decide.")] = "",
) -> Output:
    """Show the features there are, or what is known of a user."""
    from kaleidoscope import feature_store
    from kaleidoscope.businesses import get_business

    business = get_business(work.session).id
    if unit is None:
        return _views_output(feature_store.views(work.settings, business))
    known = feature_store.online(work.settings, business, unit, scene, datetime.now(UTC))
    said = [] if known else [f"Nothing is known of user {unit!r}."]
    rows = [(name, value) for name, value in sorted(known.items())]
    return Output({"unit": unit, "features": known}, *([table(("feature", "value"), rows)] if rows else []), *said)
