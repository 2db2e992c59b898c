"""Trained models: what there is, what the gate says of each, and which one is the champion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaleidoscope.operator_cli.frame import MOST, Limit, Output, Work, command, items, none_of, pairs_in, when, words
from kaleidoscope.terminal import fields, table

if TYPE_CHECKING:
    from rich.table import Table

    from kaleidoscope.registry import Change, ModelVersion

model_group = typer.Typer(
    name="model", help="Trained models: the gate's verdict, champion and challenger.", no_args_is_help=True
)

MOST_PARTS = 12  # of an explanation that are shown

ModelName = Annotated[str, typer.Argument(metavar="VERSION", help="Version of the model, as `model list` shows it.")]


def _view(model: ModelVersion) -> dict[str, Any]:
    return {
        "version": model.version,
        "scene": model.scene,
        "aliases": list(model.aliases),
        "verdict": model.verdict,
        "created_at": model.trained.get("created_at"),
        "exposures": model.trained.get("log", {}).get("exposures"),
        "metrics": model.trained.get("metrics"),
        "best_single": dict(model.best_single),
        "folder": str(model.folder),
    }


def _moment(text: str | None) -> str | None:
    return None if text is None else when(datetime.fromisoformat(text).astimezone(UTC))


@command(model_group, "list")
def model_list(
    work: Work,
    scene: Annotated[
        str | None, typer.Argument(metavar="[SCENE]", help="Only its models; any.scene for generic ones.")
    ] = None,
    limit: Limit = 50,
) -> Output:
    """List the models on this machine, newest first."""
    from kaleidoscope.businesses import get_business
    from kaleidoscope.registry import list_models

    get_business(work.session)
    views = [_view(model) for model in list_models(work.settings, work.session.business, scene)[:limit]]
    rows = [
        (v["version"], ", ".join(v["aliases"]), v["verdict"], v["exposures"], _auc(v), _moment(v["created_at"]))
        for v in views
    ]
    shown = table(("version", "alias", "gate", "exposures", "AUC", "trained"), rows, whole=("version", "trained"))
    return Output(items(views), shown, *none_of(rows, "models"))


def _auc(view: Mapping[str, Any]) -> str | None:
    auc = (view["metrics"] or {}).get("auc")
    return None if auc is None else f"{auc['value']:.3f}"


@command(model_group, "show")
def model_show(work: Work, model: ModelName) -> Output:
    """Show a model: what it was made of, its measures, the gate's report, and what it was called when."""
    from kaleidoscope.registry import get_model, history

    found = get_model(work.settings, work.session.business, model)
    changes = [
        change
        for change in history(work.settings, found.business, found.scene)
        if model in (change.version, change.before)
    ]
    about = _about({**found.trained, "gate": found.gate}, found)
    said = [f"{_moment(change.at)}: {_told(change, model)}" for change in changes]
    value = _view(found) | {"trained": found.trained, "gate": found.gate, "history": [asdict(c) for c in changes]}
    return Output(value, about, *_checks(found.gate), *said)


def _told(change: Change, model: str) -> str:
    """What a change of an alias meant for a model."""
    if change.version != model:
        return f"no longer the {change.alias}" + (f": {change.version} is" if change.version else "")
    return f"{change.by} made it the {change.alias}" + (f", against the gate: {change.reason}" if change.forced else "")


@command(model_group, "promote")
def model_promote(
    work: Work,
    model: ModelName,
    force: Annotated[bool, typer.Option("--force", help="Although it did not pass the gate.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the model's history.")] = "",
) -> Output:
    """Make a model that passed the gate the champion of its scene. Releases name it from the next draft on."""
    from kaleidoscope.registry import mirror, promote, scene_of

    at = datetime.now(UTC)
    change = promote(work.settings, work.session.caller, model, at=at, force=force, reason=reason)
    mirrored = mirror(work.settings, work.session.business, model)
    scene = scene_of(model)
    lines = [f"{model} is the champion of {scene}" + (f", in place of {change.before}." if change.before else ".")]
    lines += [f"It did not pass the gate; {change.by} promoted it: {change.reason}"] if change.forced else []
    lines += (
        [f"MLflow has not been told: {mirrored.problem}"] if _worth_saying(work.settings.mlflow_url, mirrored) else []
    )
    lines += [f"Release it: `kaleidoscope release draft {scene} --model-version champion`"]
    return Output(asdict(change) | {"scene": scene, "mlflow": asdict(mirrored)}, *lines)


@command(model_group, "explain")
def model_explain(
    work: Work,
    model: ModelName,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", metavar="NAME=VALUE", help="What is known of the user or the context; repeat it."),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option("--variant", metavar="ID", help="Which variant. Default: the one the model likes best."),
    ] = None,
    scene: Annotated[
        str | None, typer.Option("--scene", help="Whose variants to compare, for an alias or a generic model.")
    ] = None,
    release: Annotated[
        int | None, typer.Option("--release", min=1, max=MOST, help="Its variants. Default: the live release's.")
    ] = None,
) -> Output:
    """Say why a model gives a variant its score for one user, against the average of the release's variants."""
    from kaleidoscope.commands.explain import run_explain

    why = run_explain(
        work.settings, work.session, model, attributes=pairs_in("--attribute", attribute or ()), variant=variant,
        scene=scene, release=release,
    )  # fmt: skip
    rows = [
        (words(t["part"]), _is(t["field"], t["value"]), _is(t["dimension"], t["tag"]), f"{t['logit']:+.3f}")
        for t in why["terms"][:MOST_PARTS]
    ]
    left = sum(t["logit"] for t in why["terms"][MOST_PARTS:])
    rows += [(f"{len(why['terms']) - MOST_PARTS:,} smaller ones", None, None, f"{left:+.3f}")] if left else []
    rows.append(("all, over the average variant", None, None, f"{why['score'] - why['average']:+.3f}"))
    parts = table(("part", "user", "variant", "logit"), rows, whole=("logit",))
    return Output(why, *why["sentences"][:-1], parts, *why["notes"], why["sentences"][-1])


def _is(name: str | None, value: str | None) -> str | None:
    return None if name is None else f"{name}={value}"


def _worth_saying(url: str | None, mirrored: Any) -> bool:
    """Whether a model that is not in MLflow is news: not where nobody has installed it."""
    return mirrored.problem is not None and (url is not None or "not installed" not in mirrored.problem)


# ── what people read of a training ────────────────────────────────────────────────────────────────────────────────────


def trained_lines(trained: Mapping[str, Any]) -> list[str | Table]:
    """What `kaleidoscope train` says."""
    version, verdict = trained["version"], trained["gate"]["verdict"]
    problem = trained["mlflow"]["problem"]
    lines: list[str | Table] = [_about(trained), *_checks(trained["gate"])]
    lines += [f"Not in MLflow: {problem}"] if problem and "not installed" not in problem else []
    if verdict == "promote":
        lines.append(f"The gate lets it pass: `kaleidoscope model promote {version}`")
    else:
        lines.append("The gate keeps what there is.")
    return lines


def _about(trained: Mapping[str, Any], model: ModelVersion | None = None) -> Table:
    log, metrics, gate = (trained.get(name) or {} for name in ("log", "metrics", "gate"))
    about: dict[str, object] = {
        "model": trained.get("version", None if model is None else model.version),
        "alias": None if model is None else ", ".join(model.aliases),
        "trained": _moment(trained.get("created_at")),
        "from": _exposures(log),
        "log": log.get("hash", "")[:12],
    }
    about |= {name: _interval(metrics.get(name), 4) for name in ("auc", "logloss", "ece")}
    about |= {
        f"click rate, {words(name)}": _interval(value, 2, percent=True)
        for name, value in gate.get("values", {}).items()
    }
    about["best single"] = ", ".join(f"{s}: {v}" for s, v in trained.get("best_single", {}).items())
    about["gate"] = gate.get("verdict")
    return fields(about)


def _exposures(log: Mapping[str, Any]) -> str | None:
    if "exposures" not in log:
        return None
    return f"{log['exposures']:,} exposures of {log['units']:,} units to {log['variants']:,} variants"


def _interval(found: Mapping[str, float] | None, digits: int, *, percent: bool = False) -> str | None:
    if found is None:
        return None
    scale, sign = (100, " %") if percent else (1, "")
    value, low, high = (f"{scale * found[name]:.{digits}f}" for name in ("value", "ci_low", "ci_high"))
    return f"{value}{sign} ({low} to {high})"


def _checks(gate: Mapping[str, Any]) -> list[str]:
    return [f"{'passed' if check['ok'] else 'FAILED'}  {check['message']}" for check in gate.get("checks", ())]
