"""What the log says of a release: its buckets compared, and its canary guarded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from kaleidoscope.errors import InputError
from kaleidoscope.operator_cli.frame import MOST, Output, Scene, Work, command, moment_in, percent
from kaleidoscope.operator_cli.releases import release_group
from kaleidoscope.terminal import printable, table

if TYPE_CHECKING:
    from rich.table import Table

    from kaleidoscope.database import Database
    from kaleidoscope.experiment import Interval, Ratio, Traffic
    from kaleidoscope.guard import Canary, ExperimentReport, GuardAction
    from kaleidoscope.settings import Settings

experiment_group = typer.Typer(
    name="experiment", help="Experiments: the buckets of a release, compared.", no_args_is_help=True
)


@contextmanager
def _log(settings: Settings) -> Iterator[Database]:
    from kaleidoscope.database import open_database

    with open_database(settings.log_url) as log:
        yield log


@command(experiment_group, "show")
def experiment_show(
    work: Work,
    scene: Scene,
    release: Annotated[
        int | None,
        typer.Option("--release", min=1, max=MOST, help="Of this release. Default: the stable one, else the canary."),
    ] = None,
    since: Annotated[str | None, typer.Option("--from", metavar="TIME", help="Exposures from then on.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Exposures before then.")] = None,
    wanted: Annotated[
        float, typer.Option("--lift", help="The lift to plan for: 0.1 is 10 % more clicks than control.")
    ] = 0.1,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Say that the numbers are simulated, as in a demo.")
    ] = False,
) -> Output:
    """Compare the buckets of a release: rates, lifts with intervals, sample ratio, and how long more would take."""
    from kaleidoscope.guard import compare
    from kaleidoscope.release import get_release, shown_number, verify

    number = shown_number(work.session, scene, release)
    shares = verify(get_release(work.session, scene, number)).shares
    with _log(work.settings) as log:
        report = compare(
            log,
            work.settings.log_dir,
            business=work.session.business,
            scene=scene,
            release=number,
            shares=shares,
            since=moment_in("--from", since),
            until=moment_in("--until", until),
            simulated=simulated,
            wanted_lift=wanted,
        )
    return Output(report.as_dict(), *report.lines(), "", _buckets(report), "", *_comparisons(report))


def _buckets(report: ExperimentReport) -> Table:
    rows = [
        (b.bucket.value, percent(b.share), f"{b.units:,}", f"{b.exposures:,}", f"{b.clicks:,}", *_rate(b.ctr),
         f"{b.conversions:,}", *_rate(b.cvr))
        for b in report.buckets
    ]  # fmt: skip
    level = f"{(1 - report.alpha) * 100:.3g} %"
    columns = ("bucket", "share", "units", "exposures", "clicks", "CTR", level, "conversions", "CVR", level)
    return table(columns, rows, whole=("bucket", "share", "units", "exposures", "CTR", "CVR", level))


def _rate(of: Ratio) -> tuple[str | None, str | None]:
    rate = None if of.rate is None else f"{of.rate:.2%}".replace("%", " %")
    if of.ci_low is None or of.ci_high is None:
        return rate, None
    return rate, f"{of.ci_low * 100:.2f}–{of.ci_high * 100:.2f} %"


def _comparisons(report: ExperimentReport) -> Iterator[str | Table]:
    if not report.comparisons:
        return
    rows = [
        (
            f"{c.treatment.value} / {c.control.value}",
            c.outcome.upper(),
            None if c.lift is None else _percent(c.lift.lift),
            None if c.lift is None else _interval(c.lift.always_valid),
            None if c.lift is None else _p(c.lift.always_valid.p_value),
            None if c.lift is None else _interval(c.lift.fixed),
            None if c.lift is None else _p(c.lift.fixed.p_value),
            None if c.detectable_lift is None else f"{c.detectable_lift:.1%}".replace("%", " %"),
            None if c.days_needed is None else f"{c.days_needed:,.1f}",
        )
        for c in report.comparisons
    ]
    columns = ("lift of", "in", "lift", "always valid", "p", "fixed", "p (fixed)", "detectable", "days needed")
    yield table(columns, rows, whole=("lift of", "in", "lift", "always valid", "p", "fixed"))
    days = "" if report.days is None else f", of which {report.days:,.1f} have passed"
    yield (
        f"Detectable: the lift that so many units show with 80 % power at one look. Days needed: in all, for a lift of"
        f" {percent(report.wanted_lift)} at present traffic{days}."
    )


def _percent(share: float) -> str:
    return f"{share:+.1%}".replace("%", " %").replace("-", "−")


def _interval(of: Interval) -> str:
    return f"{_percent(of.low)} to {_percent(of.high)}"


def _p(p_value: float) -> str:
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


# ── the guard ───────────────────────────────────────────────────────────────────────────────────────────────────────


@command(release_group, "guard")
def release_guard(
    work: Work,
    scene: Scene,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option("--metrics-url", metavar="URL", help="A server's /metrics, for error_rate and p99_ms; repeat it."),
    ] = None,
    min_minutes: Annotated[float, typer.Option("--min-minutes", min=0, help="How long a stage lasts at least.")] = 60,
    min_units: Annotated[
        int, typer.Option("--min-units", min=0, max=MOST, help="Units that saw the canary in a stage, at least.")
    ] = 200,
) -> Output:
    """Look at the canary once: wait, advance it one stage, pause it, or roll it back. The ledger names user `guard`."""
    from kaleidoscope.database import open_database
    from kaleidoscope.guard import guard, stage_traffic

    settings, business = work.settings, work.session.business
    kept = settings.log_dir / business / f"guard-{scene}.json"

    def traffic(canary: Canary) -> Traffic | None:
        try:
            return stage_traffic(kept, canary, metrics_url or _urls(settings.metrics_url))
        except InputError as error:  # the log is judged all the same
            typer.echo(printable(error.message), err=True)
            return None

    with open_database(settings.database_url) as database, _log(settings) as log:
        action = guard(
            database,
            log,
            settings.log_dir,
            business=business,
            scene=scene,
            window_s=settings.decision_window_s,
            min_stage=timedelta(minutes=min_minutes),
            min_units=min_units,
            traffic=traffic,
        )
    return Output(action.as_dict(), str(action), *_measured(action))


def _urls(setting: str | None) -> list[str]:
    return [url.strip() for url in (setting or "").split(",") if url.strip()]


def _measured(action: GuardAction) -> Iterator[Table]:
    if action.health is None:
        return
    bounded = {check.metric: check for check in action.health.checks}
    rows = [
        (
            name,
            "unknown" if value is None else f"{value:.4g}",
            None if name not in bounded or bounded[name].bound is None else f"{bounded[name].bound:g}",
            None if name not in bounded else "not yet" if value is None else "ok" if bounded[name].ok else "BROKEN",
        )
        for name, value in {**dict.fromkeys(bounded), **action.measured}.items()
    ]
    yield table(("metric", "value", "bound", "guardrail"), rows, whole=("metric",))
