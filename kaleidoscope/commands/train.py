"""`kaleidoscope train`: from a scene's exposures to an exported model, the gate's report and a challenger.

    read → cross-fit → fit → judge → export → register

The gate judges models of the same recipe that have not seen the unit they are judged on (cross-fitting); what is
exported is then fitted to all exposures. docs/training.md says why, and what the files hold.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit, stdtrit

from kaleidoscope import registry
from kaleidoscope.commands.exposures import read_exposures_of
from kaleidoscope.commands.gate import Contest, Latency, Limits, Picks, Report, judge
from kaleidoscope.commands.learn import as_if_blind, fit_encoder
from kaleidoscope.commands.output import Clock
from kaleidoscope.encoding import Encoder
from kaleidoscope.errors import InputError, JobError
from kaleidoscope.exposure import Support, logging_policy
from kaleidoscope.files import json_text
from kaleidoscope.log import Log
from kaleidoscope.policy_value import LoggedRows, Weighting, choose_weighting, greedy, policy_weights
from kaleidoscope.progress import Progress
from kaleidoscope.ranker import Ranker, Signature, VariantSide
from kaleidoscope.registry import GATE, GENERIC, TRAINED, Alias
from kaleidoscope.settings import Settings
from kaleidoscope.vocabulary import Level
from models.batch import Examples, columns_of
from models.export import PACKAGES, export_model
from models.metrics import AucSums, Calibration, LogLossSums, calibration
from models.tables import Tables, fit_tables
from models.train import CtrModel, TrainConfig, fit_network, threads_for

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Fit = Callable[..., CtrModel]  # fit_network

MIN_EXPOSURES = 1_000
MIN_UNITS = 30
FOLDS, FEW_FOLDS, MANY_ROWS = 3, 2, 300_000  # of cross-fitting; fewer beyond so many rows
MAX_TAG_COLUMNS = 2_000  # of which the pseudo-inverse of Γ is taken
JACKKNIFE = 20  # groups of units that are left out in turn for the metrics' intervals
TIMED, WARM = 200, 10  # rankings
STAGING = ".training-"
STALE = timedelta(days=1)  # what a killed training left behind is removed after that


@dataclass(frozen=True)
class HeldOut:
    """Per row of the log (n,), what models that never saw its unit predict and pick."""

    logit: Floats  # of what was shown
    network: tuple[Ints, Floats]  # the network's picks, and their predicted click probability
    single: tuple[Ints, Floats]  # the same for the variant that is best on average
    q_uniform: Floats
    networks: tuple[CtrModel, ...]  # by fold


def run_train(
    settings: Settings,
    *,
    business: str,
    scene: str | None,
    seed: int,
    min_exposures: int = MIN_EXPOSURES,
    progress: Progress,
    at: datetime | None = None,
    limits: Limits | None = None,
    fit: Fit = fit_network,
) -> dict[str, object]:
    """Train on the exposures of a scene, or of all scenes of the business (None), and return what was made.

    The model lies in `settings.models_dir`/BUSINESS/VERSION and is its scene's challenger. `fit` trains a network as
    `fit_network` does. Raises InputError where there is too little to learn from; then nothing is written.
    """
    at, limits, clock = at or datetime.now(UTC), limits or Limits(), Clock(progress)
    name = GENERIC if scene is None else scene
    home = registry.home_of(settings, business)
    with tempfile.TemporaryDirectory(prefix="kaleidoscope-train-") as scratch:
        with clock("read"):
            read = read_exposures_of(settings, business, scene, Path(scratch))
            log = read.log
        _refuse_few(log, name, min_exposures)
        with threads_for(len(log)):
            made = train(
                log,
                name,
                champion=_champion(settings, business, name),
                seed=seed,
                clock=clock,
                limits=limits,
                fit=fit,
            )
    version = registry.new_version(name, at)
    document: dict[str, object] = {
        "version": version,
        "business": business,
        "scene": scene,
        "generic": scene is None,
        "created_at": at.isoformat(),
        "log": _about(log) | {"hash": read.hash, "left_out": read.left_out},
        "best_single": made.best_single,
        "metrics": made.metrics,
        "config": asdict(TrainConfig()) | {"folds": made.folds, "min_exposures": min_exposures},
        "seed": seed,
        "checks": [asdict(check) for check in log.checks],
        "commit": commit(),
        "packages": {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()},
    }
    with clock("export"):
        report = _export(made, document, home, log_hash=read.hash, at=at, seed=seed, limits=limits, clock=clock)
    with clock("register"):
        registry.propose(settings, business, version, by=settings.user or "train", at=at)
        mirrored = registry.mirror(settings, business, version)
    return document | {
        "folder": str(home / version),
        "gate": report.as_dict(),
        "mlflow": asdict(mirrored),
        "timings_s": clock.seconds,
    }


# ── the log ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _refuse_few(log: Log, name: str, min_exposures: int) -> None:
    if len(log) < min_exposures or log.n_units < MIN_UNITS:
        generic = "" if name == GENERIC else " Meanwhile `kaleidoscope train --generic` learns from all scenes."
        raise InputError(
            f"scene {name!r}: {len(log):,} exposures of {log.n_units:,} units to learn from, at least"
            f" {min_exposures:,} of {MIN_UNITS} are needed. Wait, or give bucket random more traffic.{generic}"
        )


def _about(log: Log) -> dict[str, object]:
    def moment(seconds: float) -> str | None:
        return datetime.fromtimestamp(float(seconds), UTC).isoformat() if np.isfinite(seconds) else None

    time_s = np.full(1, np.nan) if log.time is None else log.time
    return {
        "exposures": log.n_exposures,
        "units": log.n_units,
        "variants": log.n_variants,
        "positive_rate": log.positive_rate,
        "since": moment(np.min(time_s)),
        "until": moment(np.max(time_s)),
        "user": list(log.schema.user),
        "context": list(log.schema.context),
        "tags": list(log.schema.variant),
    }


# ── learning ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Made:
    """What training makes, before it is written anywhere."""

    model: CtrModel  # fitted to all exposures
    networks: tuple[CtrModel, ...]  # by fold, which they have not seen: those that the gate judges
    variants: pa.Table
    generic: bool
    best_single: dict[str, str]  # by scene
    metrics: dict[str, object]
    folds: int
    curve: Calibration
    contest: Contest
    fresh: Contest | None
    champion: str | None
    problems: tuple[str, ...]
    one_user: dict[str, list[object]]  # the last that was shown something: whom to time the ranking with
    menu: pa.Table  # what could have been shown then


def train(
    log: Log,
    scene: str,
    *,
    champion: Champion | None,
    seed: int,
    clock: Clock,
    limits: Limits,
    fit: Fit = fit_network,
) -> Made:
    """Learn from a log of one scene, or of all (GENERIC), and hold policies against one another on held-out units."""
    generic, schema = scene == GENERIC, log.schema
    log, fold = log.folds(FOLDS if len(log) <= MANY_ROWS else FEW_FOLDS, seed)
    folds = int(fold.max()) + 1
    support = logging_policy(log)
    rows = LoggedRows(
        log.reward.astype(np.float64), log.variant, support.propensity, log.count, log.weight, log.unit, support
    )
    encoder = fit_encoder(log, schema)
    examples = Examples.of(log, encoder)
    blind, blind_encoder = examples.only(encoder, "context", "group")
    blind = replace(blind, weight=as_if_blind(rows, support, blind.weight))
    with clock("cross-fit"):
        held = _cross_fit(examples, encoder, blind, blind_encoder, fold, support, fit, generic, seed, clock.advance)
    with clock("fit"):
        model = fit(examples, encoder, seed=seed)
        single = fit_tables(blind, blind_encoder, crosses=False)
        best_single = _best_single(single, blind, support, log, scene)
    with clock("judge"):
        contest = Contest(rows, expit(held.logit), held.q_uniform, epsilon=limits.epsilon, folds=folds)
        weighting = _weighting(rows, examples)
        for name, (chosen, q) in (("best_single", held.single), ("model", held.network)):
            contest.enter(name, Picks(policy_weights(rows, chosen, weighting, examples.tags), q))
        fresh = None if champion is None else _fresh(champion, log, examples, fold, rows, support, held, contest)
        metrics, curve = _metrics(held.logit, examples, contest, limits)
    last = int(support.choice_set[-1])
    menu = support.variant[support.indptr[last] : support.indptr[last + 1]]
    return Made(
        model=model,
        networks=held.networks,
        variants=log.variants,
        generic=generic,
        best_single=best_single,
        metrics=metrics,
        folds=folds,
        curve=curve,
        contest=contest,
        fresh=fresh,
        champion=None if champion is None else champion.version,
        problems=tuple(check.message for check in log.checks if check.level is Level.ERROR),
        one_user={name: column.slice(len(log) - 1).to_pylist() for name, column in log.columns.items()},
        menu=log.variants.take(pa.array(menu)),
    )


def _cross_fit(
    examples: Examples,
    encoder: Encoder,
    blind: Examples,
    blind_encoder: Encoder,
    fold: Ints,
    support: Support,
    fit: Fit,
    generic: bool,
    seed: int,
    advance: Callable[[float], None],
) -> HeldOut:
    n, folds, networks = len(examples), int(fold.max()) + 1, []
    logit, q_network, q_single, q_uniform = (np.empty(n) for _ in range(4))
    network_pick, single_pick = np.empty(n, np.int64), np.empty(n, np.int64)
    for f in range(folds):
        seen, held = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        network = fit(examples.take(seen), encoder, seed=seed + 1 + f)
        if generic:  # a generic model knows no variant by its id, and is judged as it will be served
            network = network.for_variants(examples.tags, np.full(examples.tags.shape[0], -1))
        single = fit_tables(blind.take(seen), blind_encoder, crosses=False)
        logit[held] = network.logits(examples.features.take(held), examples.variant[held])
        picks = greedy(lambda r, v, m=network: expit(m.rank(examples.features.take(r), v)), support, held)  # type: ignore[misc]
        network_pick[held], q_network[held], q_uniform[held] = picks.chosen, picks.q_chosen, picks.q_uniform
        single_pick[held] = greedy(
            lambda r, v, m=single: m.rank(blind.features.take(r), v),  # type: ignore[misc]
            support,
            held,
        ).chosen
        q_single[held] = expit(network.logits(examples.features.take(held), single_pick[held]))
        networks.append(network)
        advance((f + 1) / folds)
    return HeldOut(logit, (network_pick, q_network), (single_pick, q_single), q_uniform, tuple(networks))


def _best_single(single: Tables, blind: Examples, support: Support, log: Log, scene: str) -> dict[str, str]:
    """By scene, the variant that is best on average: what the model without users picks most often there."""
    chosen = greedy(lambda r, v: single.rank(blind.features.take(r), v), support).chosen
    ids, found = log.variants["variant_id"].to_pylist(), {}
    if log.group is None or log.groups is None:
        return {scene: ids[int(np.bincount(chosen, log.count).argmax())]}
    for group, name in enumerate(log.groups.to_pylist()):
        rows = log.group == group
        if rows.any():
            found[name] = ids[int(np.bincount(chosen[rows], log.count[rows]).argmax())]
    return found


def _weighting(rows: LoggedRows, examples: Examples) -> Weighting:
    """The weighting that the rows allow; tags help only where there are fewer of them than variants."""
    columns = len(np.unique(examples.tags.indices))
    return choose_weighting(rows, examples.tags if columns < min(examples.tags.shape[0], MAX_TAG_COLUMNS) else None)


# ── the champion, on what it has not seen ───────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Champion:
    """The champion that a new model is held against."""

    version: str
    ranker: Ranker
    learned_until: float  # seconds since 1970: what came later it cannot have learned from


def _champion(settings: Settings, business: str, scene: str) -> Champion | None:
    version = registry.aliases_of(settings, business, scene).get(Alias.CHAMPION)
    if version is None:
        return None
    ranker = Ranker.load(registry.fetch(settings, business, version))
    until = registry.get_model(settings, business, version).trained.get("log", {}).get("until")
    moment = datetime.fromisoformat(until or ranker.signature.created_at)
    return Champion(version, ranker, moment.timestamp())


def _fresh(
    champion: Champion,
    log: Log,
    examples: Examples,
    fold: Ints,
    rows: LoggedRows,
    support: Support,
    held: HeldOut,
    contest: Contest,
) -> Contest | None:
    """Champion and model on the exposures since the champion had learned; None where there are none of two units."""
    time_s = np.full(len(log), np.nan) if log.time is None else log.time
    at = np.flatnonzero(np.round(time_s - champion.learned_until, 3) > 0)
    if not len(at) or len(np.unique(examples.unit[at])) < 2:
        return None
    columns = {name: column.take(pa.array(at)).to_pylist() for name, column in columns_of(log).items()}
    features = champion.ranker.features(columns, len(at))
    sides: dict[bytes, VariantSide] = {}

    def score(part: Ints, variants: Ints) -> NDArray[np.float32]:
        side = sides.get(variants.tobytes())
        if side is None:
            side = sides[variants.tobytes()] = champion.ranker.variant_side(log.variants.take(pa.array(variants)))
        return champion.ranker.score(features.take(part), side)

    some = replace(
        support, choice_set=support.choice_set[at], propensity=support.propensity[at], eligible=support.eligible[at]
    )
    chosen = greedy(score, some).chosen
    q = np.empty(len(at))
    for f, network in enumerate(held.networks):  # predictions by the models that judge the new one, too
        mine = np.flatnonzero(fold[at] == f)
        q[mine] = expit(network.logits(examples.features.take(at[mine]), chosen[mine]))
    unit = None if rows.unit is None else np.unique(rows.unit[at], return_inverse=True)[1].astype(np.int64)
    few = LoggedRows(rows.reward[at], rows.logged[at], rows.propensity[at], rows.count[at], rows.weight[at], unit, some)
    weighting, tags = _weighting(few, examples), examples.tags
    q_logged, q_uniform = expit(held.logit[at]), held.q_uniform[at]
    found = Contest(few, q_logged, q_uniform, epsilon=contest.epsilon, folds=contest.folds)
    picks, predicted = held.network
    found.enter("model", Picks(policy_weights(few, picks[at], weighting, tags), predicted[at]))
    found.enter("champion", Picks(policy_weights(few, chosen, weighting, tags), q))
    return found


# ── measures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _metrics(
    logit: Floats, examples: Examples, contest: Contest, limits: Limits
) -> tuple[dict[str, object], Calibration]:
    """Held-out metrics with their intervals, and the reliability curve."""
    p, reward, weight = np.asarray(expit(logit)), examples.reward, examples.weight

    def interval(measure: Callable[[Ints], float | None]) -> dict[str, float] | None:
        return _jackknife(measure, examples.unit)

    values = {name: contest.value(name) for name in contest.scores}
    found: dict[str, object] = {
        "auc": interval(lambda at: AucSums.of(logit[at], reward[at], weight[at]).value),
        "logloss": interval(lambda at: LogLossSums.of(p[at], reward[at], weight[at]).value),
        "ece": interval(lambda at: calibration(p[at], reward[at], weight[at]).error),
        "policy_value": {
            name: None
            if value is None
            else {"value": value.value, "ci_low": value.ci_low, "ci_high": value.ci_high, "ess": value.ess}
            for name, value in values.items()
        },
    }
    return found, calibration(p, reward, weight)


def _jackknife(measure: Callable[[Ints], float | None], unit: Ints) -> dict[str, float] | None:
    """A measure ≥ 0 of all rows with its 95 % interval: delete-a-group jackknife, groups of units (Kott 2001)."""
    whole = measure(np.arange(len(unit)))
    group = np.unique(unit, return_inverse=True)[1] % JACKKNIFE
    without = [measure(np.flatnonzero(group != g)) for g in range(JACKKNIFE)]
    known = np.array([value for value in without if value is not None])
    if whole is None or len(known) < JACKKNIFE:
        return None
    se = float(np.sqrt((JACKKNIFE - 1) / JACKKNIFE * ((known - known.mean()) ** 2).sum()))
    half = se * float(stdtrit(JACKKNIFE - 1, 0.975))
    return {"value": whole, "ci_low": max(0.0, whole - half), "ci_high": whole + half}


def time_ranking(ranker: Ranker, variants: pa.Table, user: Mapping[str, Sequence[object]]) -> Latency:
    """How long the model takes for one user, encoding included, as it is asked in a decision."""
    side, times = ranker.variant_side(variants), np.empty(TIMED)
    for i in range(-WARM, TIMED):
        start = time.perf_counter()
        ranker.score(ranker.features(user, 1), side)
        times[max(i, 0)] = time.perf_counter() - start
    p50, p99 = (1000 * np.quantile(times, (0.5, 0.99))).tolist()
    return Latency(p50, p99, len(side))


# ── what is written ─────────────────────────────────────────────────────────────────────────────────────────────────


def _export(
    made: Made,
    document: dict[str, Any],
    home: Path,
    *,
    log_hash: str,
    at: datetime,
    seed: int,
    limits: Limits,
    clock: Clock,
) -> Report:
    """Write the export with its documents and pictures, all at once, and return the gate's report."""
    version = document["version"]
    try:
        home.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=home))
    except OSError as error:
        raise JobError(f"{home}: cannot be written to ({error}); see KALEIDOSCOPE_MODELS_DIR.") from error
    try:
        folder = staging / version
        signature = export_model(
            made.model,
            folder,
            version=version,
            variants=made.variants,
            log_hash=log_hash,
            seed=seed,
            created_at=at,
            metrics=_few(made.metrics),
            generic=made.generic,
        )
        latency = time_ranking(Ranker.load(folder), made.menu, made.one_user)
        report = judge(
            made.contest, made.fresh, made.champion, made.curve, latency, problems=made.problems, limits=limits
        )  # fmt: skip
        document |= {"features": _features(signature), "timings_s": dict(clock.seconds)}
        registry.write_file(folder / TRAINED, json_text(document))
        registry.write_file(folder / GATE, json_text(report.as_dict()))
        for name, text in pictures(report, made.curve).items():
            registry.write_file(folder / name, text)
        folder.rename(home / version)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _sweep(home: Path) -> None:
    """Remove what trainings that were killed have left."""
    for left in home.glob(f"{STAGING}*"):
        if time.time() - left.stat().st_mtime > STALE.total_seconds():
            shutil.rmtree(left, ignore_errors=True)


def _few(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics as the signature keeps them: without intervals."""
    few = {name: None if metrics[name] is None else metrics[name]["value"] for name in ("auc", "logloss", "ece")}
    values = metrics["policy_value"].items()
    return few | {f"value_{name}": None if value is None else value["value"] for name, value in values}


def _features(signature: Signature) -> dict[str, object]:
    """What the model reads."""
    return {
        "fields": [field.name for field in signature.encoder.fields if field.role != "group"],
        "dimensions": [dimension.name for dimension in signature.encoder.dimensions],
    }


def commit() -> dict[str, object] | None:
    """The commit that this code is of, and whether it was changed since; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def pictures(report: Report, curve: Calibration) -> dict[str, str]:
    """calibration.svg and policy-values.svg."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    def svg(figure: Any) -> str:
        stream = io.StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "kaleidoscope"}):
            figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
        return stream.getvalue()

    reliability = Figure(figsize=(4.5, 4.5))
    axes = reliability.add_subplot()
    top = float(max(curve.predicted.max(), curve.observed.max())) * 1.05
    axes.plot([0, top], [0, top], "--", color="grey", linewidth=1)
    axes.plot(curve.predicted, curve.observed, "o-", color="#1D4ED8")
    axes.set(xlabel="predicted click rate", ylabel="observed click rate", title="Calibration on held-out units")
    values = Figure(figsize=(6, 2.5))
    axes = values.add_subplot()
    known = [(name, value) for name, value in report.values.items() if value is not None]
    for y, (_, value) in enumerate(known):
        axes.plot([value.ci_low, value.ci_high], [y, y], color="#1D4ED8", linewidth=2)
        axes.plot([value.value], [y], "o", color="#1D4ED8")
    axes.set_yticks(range(len(known)), [name.replace("_", " ") for name, _ in known])
    axes.set(xlabel="click rate, 95 % interval", title="Policy values on held-out units", ylim=(-0.6, len(known) - 0.4))
    return {"calibration.svg": svg(reliability), "policy-values.svg": svg(values)}
