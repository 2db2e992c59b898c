"""The `kaleidoscope` command: parses, runs one job of `kaleidoscope.commands`, prints what it returns.

Thin on purpose. Heavy libraries are imported inside the command functions, so that `--help` answers at once.
Exit codes: 0 ok, 1 the job failed, 2 bad usage or input.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from kaleidoscope.advice import no_values, verdict_sentence, why_unknown
from kaleidoscope.errors import InputError, KaleidoscopeError
from kaleidoscope.operator_cli import mount
from kaleidoscope.progress import Progress, Silent
from kaleidoscope.terminal import console as _console
from kaleidoscope.terminal import print_json as _print_json
from kaleidoscope.terminal import print_lines, printable
from kaleidoscope.vocabulary import Level, Policy

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

MIN_DEMO_VISITS = 20_000  # with fewer hardly anything can be learned of 576 variants

ABOUT = "Personalised UI: combine tellings of a product, learn who prefers which, serve and prove it."

app = typer.Typer(
    name="kaleidoscope",
    help=ABOUT,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

cells_group = typer.Typer(
    name="cells", help="A log of any size as sums that add up over days, and what they say.", no_args_is_help=True
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, help="Seed of every random choice. Default: KALEIDOSCOPE_SEED, or 0.")
]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line `argv` (default: this process's) and exit with its code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    try:
        # Typer's own rendering of a usage error is for people; with --json it has to reach the handler below.
        code = app(arguments, prog_name="kaleidoscope", standalone_mode=not as_json)
    except Exception as error:
        code = _render_error(error, as_json=as_json)
    sys.exit(code if isinstance(code, int) else 0)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kaleidoscope {version('kaleidoscope')}")
        raise typer.Exit


@app.callback(help=ABOUT)
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """What `kaleidoscope` itself takes; its help is ABOUT."""


@app.command()
def learn(
    log: Annotated[Path, typer.Argument(metavar="LOG", exists=True, help="The impression log, Parquet or CSV.")],
    schema: Annotated[
        Path, typer.Option("--schema", exists=True, dir_okay=False, help="What its columns mean (YAML).")
    ],
    out: Annotated[
        Path, typer.Option("--out", file_okay=False, help="Folder for report.html and summary.json; made if missing.")
    ],
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Learn from an impression log: is personalising worth it, by how much, and for whom?"""
    from kaleidoscope.settings import load_settings

    settings = load_settings()
    _limit_threads(settings.threads)
    with _job_output(as_json) as progress:
        from kaleidoscope.commands.learn import run_learn

        summary = run_learn(log, schema, out, seed=settings.seed if seed is None else seed, progress=progress)
    _print_summary(summary, out, as_json=as_json)


@app.command()
def train(
    scene: Annotated[str | None, typer.Argument(metavar="[SCENE]", help="Id of the scene to learn from.")] = None,
    generic: Annotated[
        bool, typer.Option("--generic", help="Learn from all scenes, for those too young for a model of their own.")
    ] = False,
    business: Annotated[
        str | None, typer.Option("--business", help="The business to work in. Default: KALEIDOSCOPE_BUSINESS.")
    ] = None,
    min_exposures: Annotated[
        int, typer.Option("--min-exposures", min=100, help="Refuse to learn from fewer exposures.")
    ] = 1_000,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a model on what a scene has logged, and judge whether it may be promoted."""
    from kaleidoscope.settings import load_settings

    settings = load_settings()
    within = business or settings.business
    if within is None:
        raise InputError("name the business to work in: `--business NAME`, or KALEIDOSCOPE_BUSINESS")
    if (scene is None) != generic:
        raise InputError("train: give a SCENE, or --generic for all of them.")
    _limit_threads(settings.threads)
    with _job_output(as_json) as progress:
        from kaleidoscope.commands.train import run_train

        trained = run_train(
            settings,
            business=within,
            scene=scene,
            seed=settings.seed if seed is None else seed,
            min_exposures=min_exposures,
            progress=progress,
        )
    if as_json:
        _print_json(trained)
    else:
        from kaleidoscope.operator_cli.models import trained_lines

        print_lines(*trained_lines(trained))


@app.command()
def attribute(
    source: Annotated[str, typer.Argument(metavar="SCENE|LOG", help="Id of a scene; with --schema, a log.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", file_okay=False, help="Folder for the report. Default: KALEIDOSCOPE_REPORTS_DIR/…"),
    ] = None,
    schema: Annotated[
        Path | None, typer.Option("--schema", exists=True, dir_okay=False, help="What a log's columns mean (YAML).")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="Whose reasons to show beside: a version, a folder. Default: the champion."),
    ] = None,
    control: Annotated[
        str, typer.Option("--control", metavar="NAME", help="A log's bucket that lifts are over.")
    ] = "control",
    shares: Annotated[
        str | None,
        typer.Option(
            "--shares", metavar="BUCKET=SHARE,…", help="A log's designed shares of users, to be held against."
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option("--from", metavar="TIME", help="A scene's exposures from then on.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", metavar="TIME", help="A scene's exposures before then.")
    ] = None,
    business: Annotated[
        str | None, typer.Option("--business", help="The business to work in. Default: KALEIDOSCOPE_BUSINESS.")
    ] = None,
    simulated: Annotated[
        bool, typer.Option("--simulated", help="Say that the numbers are simulated, as in a demo.")
    ] = False,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find out who prefers which telling, by every method, and whether a lift may be trusted; write the report."""
    from kaleidoscope.operator_cli.frame import moment_in
    from kaleidoscope.settings import load_settings

    settings = load_settings()
    seed = settings.seed if seed is None else seed
    start, end = moment_in("--from", since), moment_in("--until", until)
    within = business or settings.business
    if schema is None:
        if Path(source).is_file():
            raise InputError(f"attribute: {source} is a file. Say what its columns mean: `--schema SCHEMA.yaml`.")
        if control != "control":
            raise InputError("attribute: --control is for logs. A scene's control bucket is called control.")
        if shares is not None:
            raise InputError("attribute: --shares is for logs. Those of a scene are in its releases.")
        if within is None:
            raise InputError("name the business to work in: `--business NAME`, or KALEIDOSCOPE_BUSINESS")
    elif start or end or out is None:
        what = "--out, the folder for the report, is needed" if out is None else "--from and --until are for scenes"
        raise InputError(f"attribute: with a log, {what}.")
    _limit_threads(settings.threads)
    with _job_output(as_json) as progress:
        from kaleidoscope.commands.attribute import attribute_log, attribute_scene

        if schema is not None and out is not None:
            summary = attribute_log(
                Path(source),
                schema,
                out,
                model=None if model is None else Path(model),
                control=control,
                shares=shares,
                seed=seed,
                progress=progress,
                simulated=simulated,
            )
        else:
            assert within is not None
            out = out or settings.reports_dir / within / source
            summary = attribute_scene(
                settings,
                business=within,
                scene=source,
                out_dir=out,
                model=model,
                since=start,
                until=end,
                seed=seed,
                progress=progress,
                simulated=simulated,
            )
    if as_json:
        _print_json(summary)
    else:
        from kaleidoscope.commands.attribute import said

        print_lines(*said(summary), f"Report: {out / 'report.html'}")


@cells_group.command("build")
def cells_build(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SCENE|LOG…", help="Id of a scene; with --schema, impression logs, Parquet or CSV."),
    ],
    out: Annotated[Path, typer.Option("--out", dir_okay=False, help="Parquet file for the cells.")],
    schema: Annotated[
        Path | None, typer.Option("--schema", exists=True, dir_okay=False, help="What logs' columns mean (YAML).")
    ] = None,
    add: Annotated[
        Path | None,
        typer.Option("--add", exists=True, dir_okay=False, help="Earlier cells to add these to; may be --out itself."),
    ] = None,
    period: Annotated[
        Literal["day", "week", "month", "none"] | None,
        typer.Option("--period", help="What time is cut into. Default: day; with --add as there."),
    ] = None,
    no_pairs: Annotated[
        bool, typer.Option("--no-pairs", help="Do not sum up pairs of user values and pairs of tags.")
    ] = False,
    since: Annotated[
        str | None, typer.Option("--from", metavar="DAY", help="A scene's days from then on. Default: all new ones.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="DAY", help="A scene's days before then.")] = None,
    business: Annotated[
        str | None, typer.Option("--business", help="The business to work in. Default: KALEIDOSCOPE_BUSINESS.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Although the file is there already.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sum up logs of any size, or a scene's days, in one pass; add to earlier sums without reading the old ones."""
    from kaleidoscope.operator_cli.frame import moment_in
    from kaleidoscope.settings import load_settings

    settings = load_settings()
    start, end = moment_in("--from", since), moment_in("--until", until)
    within = business or settings.business
    if schema is None:
        if len(sources) > 1 or Path(sources[0]).is_file():
            raise InputError(f"cells build: say what the columns of {sources[0]} mean: `--schema SCHEMA.yaml`.")
        if within is None:
            raise InputError("name the business to work in: `--business NAME`, or KALEIDOSCOPE_BUSINESS")
    elif start or end:
        raise InputError("cells build: --from and --until are for scenes. Cut the log.")
    elif missing := [source for source in sources if not Path(source).exists()]:
        raise InputError(f"{missing[0]}: there is no such file or folder. Without --schema it would be a scene.")
    _limit_threads(settings.threads)
    with _job_output(as_json) as progress:
        from kaleidoscope.commands.cells import build_cells, build_scene_cells

        how: dict[str, Any] = {"add": add, "period": period, "pairs": not no_pairs, "overwrite": overwrite}
        if schema is not None:
            built = build_cells([Path(source) for source in sources], schema, out, **how, progress=progress)
        else:
            assert within is not None
            built = build_scene_cells(
                settings, within, sources[0], out, since=start, until=end, **how, progress=progress
            )
    if as_json:
        _print_json(built)
    else:
        from kaleidoscope.commands.cells import built_lines

        print_lines(*built_lines(built))


@cells_group.command("show")
def cells_show(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="What `build` wrote.")],
    by: Annotated[
        Literal["bucket", "period"] | None, typer.Option("--by", help="Clicks of exposures of each of these, too.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, max=1_000_000, help="Preferences to list.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show what cells hold: how often each tag is clicked, main effects, and the strongest preferences."""
    from kaleidoscope.settings import load_settings

    _limit_threads(load_settings().threads)
    with _job_output(as_json) as progress:
        from kaleidoscope.commands.cells import show_cells, shown_lines

        progress.stage(f"read {file.name}")
        shown = show_cells(file, by=by, limit=limit)
    if as_json:
        _print_json(shown)
    else:
        print_lines(*shown_lines(shown))


app.add_typer(cells_group)


@app.command()
def simulate(
    out: Annotated[Path, typer.Option("--out", file_okay=False, help="Folder for the log, its schema and the report.")],
    rows: Annotated[int, typer.Option("--rows", min=1_000, help="Exposures to simulate.")] = 200_000,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate a log with planted preferences, learn from it, and write the report."""
    from kaleidoscope.settings import load_settings

    settings = load_settings()
    _limit_threads(settings.threads)
    with _job_output(as_json) as progress:
        from kaleidoscope.commands.simulate import run_simulate

        summary = run_simulate(out, rows=rows, seed=settings.seed if seed is None else seed, progress=progress)
    _print_summary(summary, out, as_json=as_json)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", file_okay=False, help="Folder for everything; an earlier demo there is deleted.")
    ] = Path("kaleidoscope-demo"),
    visits: Annotated[int, typer.Option("--visits", min=MIN_DEMO_VISITS, help="Visits to simulate.")] = 340_000,
    seed: SeedOption = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65_535, help="Port to answer at in the end.")] = 8000,
    no_serve: Annotated[
        bool, typer.Option("--no-serve", help="End without a server, as it does where the output is no terminal.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the whole loop on simulated users: explore, train, release, personalise, prove; then serve it."""
    from kaleidoscope.settings import load_settings

    settings = load_settings()
    _limit_threads(settings.threads)
    serving = not no_serve and not as_json and sys.stdout.isatty() and not os.environ.get("CI")
    if serving:
        from kaleidoscope.commands.demo_server import check_port

        check_port(port)
    with _job_output(as_json) as progress:
        from kaleidoscope.commands.demo import Plan, run_loop

        seed = settings.seed if seed is None else seed
        summary = run_loop(out, settings=settings, seed=seed, plan=Plan(visits=visits), progress=progress)
    if as_json:
        _print_json(summary)
        return
    from kaleidoscope.commands.demo_report import report_lines

    print_lines(*report_lines(summary, out))
    if serving:
        from kaleidoscope.commands.demo import demo_settings
        from kaleidoscope.commands.demo_report import whereabouts
        from kaleidoscope.serving.app import create_app
        from kaleidoscope.serving.server import serve as answer

        application = create_app(demo_settings(out, settings))
        print_lines(*whereabouts(out, f"http://127.0.0.1:{port}", summary["scene"]))
        answer(application, "127.0.0.1", port)


@app.command()
def serve(
    host: Annotated[str, typer.Option("--host", help="Address to answer at; 0.0.0.0 for every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65_535, help="Port to answer at.")] = 8000,
    workers: Annotated[int, typer.Option("--workers", min=1, max=64, help="Processes that answer.")] = 1,
    access_log: Annotated[bool, typer.Option("--access-log", help="Write a line for every request to stderr.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Answer decisions, events (/ofrep/v1, /v1) and the operators' API (/api/v1), until it is stopped with Ctrl-C."""
    from kaleidoscope.serving.app import create_app
    from kaleidoscope.serving.server import WORKER
    from kaleidoscope.serving.server import serve as answer
    from kaleidoscope.settings import load_settings

    application, url = create_app(load_settings()), f"http://{host}:{port}"  # also where workers make their own:
    # what is wrong with the settings is said before any of them starts, and the schema and the keys are made once
    if as_json:
        _print_json({"url": url})
        sys.stdout.flush()
    answer(application if workers == 1 else WORKER, host, port, workers=workers, access_log=access_log)


mount(app)


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _render_error(error: Exception, *, as_json: bool) -> int:
    """Show `error` as JSON on stdout or in words on stderr; return the exit code. The one place that does."""
    code = 1
    if isinstance(error, KaleidoscopeError):
        shape, code = error.as_dict(), error.exit_code
    elif isinstance(error, typer.TyperException):
        shape, code = {"error": {"code": "bad_usage", "message": error.format_message()}}, error.exit_code
    else:
        message = f"{type(error).__name__}: {error}. Run it again with KALEIDOSCOPE_DEBUG=1 for the traceback."
        shape = {"error": {"code": "internal", "message": message}}
    if _debug() and not isinstance(error, typer.TyperException):
        import traceback

        traceback.print_exception(error)
    if as_json:
        _print_json(shape)
    else:
        from rich.text import Text

        detail: Any = shape["error"]
        message = printable(f"Error ({detail['code']}): {detail['message']}")
        _console(stderr=True).print(Text(message, style="bold red"), soft_wrap=True)
    return code


def _debug() -> bool:
    """Return whether tracebacks are wanted; not when the settings cannot even be read."""
    from kaleidoscope.settings import load_settings

    try:
        return load_settings().debug
    except KaleidoscopeError:
        return False


def _limit_threads(threads: int | None) -> None:
    """Tell the numerical libraries, before their import, how many threads to use, and not to spin while they wait."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threads is not None:
        for library in ("OMP", "OPENBLAS", "MKL"):
            os.environ[f"{library}_NUM_THREADS"] = str(threads)


# ── output ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _job_output(as_json: bool) -> Iterator[Progress]:
    """Show progress on stderr, as bars on a terminal and else a line per stage.

    With --json there is none, and stdout is kept clear of what libraries print.
    """
    if as_json:
        with contextlib.redirect_stdout(sys.stderr):
            yield Silent()
    elif sys.stderr.isatty():
        with _RichProgress(_console(stderr=True)) as progress:
            yield progress
    else:
        with _PlainProgress(sys.stderr) as progress:
            yield progress


class _PlainProgress:
    """A line per stage: its name as it begins, its seconds as it ends."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._start: float | None = None

    def __enter__(self) -> _PlainProgress:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self._finish("" if error_type is None else "stopped after ")

    def stage(self, name: str) -> None:
        """End the line there is and begin one."""
        self._finish()
        self._start = time.perf_counter()
        self._write(f"{name} ... ")

    def advance(self, done: float) -> None:
        """Write nothing: a file or a pipe keeps every line."""

    def _finish(self, how: str = "") -> None:
        if self._start is not None:
            self._write(f"{how}{time.perf_counter() - self._start:.1f} s\n")
            self._start = None

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class _RichProgress:
    """Stages as progress bars, one below the other."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._current: TaskID | None = None

    def __enter__(self) -> _RichProgress:
        self._bars.start()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self._finish()
        self._bars.stop()

    def stage(self, name: str) -> None:
        """Finish the bar there is and begin one called `name`."""
        self._finish()
        self._current = self._bars.add_task(name, total=1.0)

    def advance(self, done: float) -> None:
        """Draw the current bar up to the share `done`."""
        if self._current is not None:
            self._bars.update(self._current, completed=done)

    def _finish(self) -> None:
        if self._current is not None:
            self._bars.update(self._current, completed=1.0)
            self._current = None


def _print_summary(summary: Mapping[str, Any], out: Path, *, as_json: bool) -> None:
    if as_json:
        _print_json(summary)
        return
    from rich.table import Table
    from rich.text import Text

    console = _console()
    truth = summary.get("simulated_truth")
    title = "What each policy would have earned" + ("" if truth is None else " (simulated data)")
    table = Table("policy", "value", "95 % interval", "effective rows", title=title)
    if truth is not None:
        table.add_column("true value")
    for policy in Policy:
        true = [] if truth is None else [f"{truth[policy]:.4f}" if policy in truth else ""]
        table.add_row(policy.value.replace("_", " "), *_value_cells(summary, policy), *true)
    why = no_values(summary)
    console.print(table if why is None else Text(why))
    if truth is not None:
        said = (
            "Simulated data: nothing here is about real users. True values are those of fresh users of the simulated"
            " world: best single is the truly best variant there, personalised what the model picks for them. An oracle"
            f" that knows every preference would earn {truth['oracle']:.4f}."
        )
        console.print(Text(said))
    gain = summary["personalisation_gain"]
    if gain is not None:
        over = gain["over"].replace("_", " ")
        interval = f"[{gain['ci_low']:+.4f}, {gain['ci_high']:+.4f}]"
        p = "" if gain["permutation_p"] is None else f", permutation p = {gain['permutation_p']:.2f}"
        console.print(Text(f"Gain of personalising over {over}: {gain['value']:+.4f} {interval}{p}"))
    console.print(Text(verdict_sentence(summary), style="bold"))
    console.print(Text(_auc_line(summary["model"])))
    for check in summary["checks"]:
        if check["level"] != Level.INFO:
            style = "red" if check["level"] == Level.ERROR else "yellow"
            console.print(Text(f"{check['level']} ({check['code']}): {check['message']}", style=style))
    # Not wrapped: people and scripts copy it.
    console.print(Text(f"Report: {out / 'report.html'}"), soft_wrap=True)


def _value_cells(summary: Mapping[str, Any], policy: Policy) -> tuple[str, str, str]:
    value = summary["policy_value"][policy]
    if value is None:
        return "unknown", why_unknown(summary, policy), ""
    return f"{value['value']:.4f}", f"[{value['ci_low']:.4f}, {value['ci_high']:.4f}]", f"{value['ess']:,.0f}"


def _auc_line(model: Mapping[str, Any] | None) -> str:
    """Return the held-out AUC of the network beside its baselines', leaving out the unknown ones."""
    if model is None or model["auc"] is None:
        return "AUC on held-out units: unknown"
    known = {name: auc for name, auc in model["baseline_auc"].items() if auc is not None}
    beside = ", ".join(f"{name.replace('_', ' ')} {auc:.3f}" for name, auc in known.items())
    return f"AUC on held-out units: {model['auc']:.3f}" + (f" ({beside})" if beside else "")
