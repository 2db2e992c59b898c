"""Trained models: where they lie, which is the champion, and their mirror in MLflow. Nobody else knows MLflow.

    models_dir/BUSINESS/VERSION/          an export with train.json and gate.json; never changes
    models_dir/BUSINESS/SCENE.aliases.json   who is champion and challenger, and who said so

These files are the truth, so that serving and promoting need no MLflow. Where it is installed every model is tracked
and registered there, too: in a database of its own, or on the server that the settings name.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from kaleidoscope.access import Caller
from kaleidoscope.database import Session
from kaleidoscope.errors import ConflictError, InputError, JobError, KaleidoscopeError, NotFoundError
from kaleidoscope.files import json_text, replacing
from kaleidoscope.ranker import SIGNATURE, Ranker
from kaleidoscope.release import ReleasePlan
from kaleidoscope.review import approval_holds
from kaleidoscope.settings import Settings
from kaleidoscope.tables import Variant
from kaleidoscope.vocabulary import Role

GENERIC = "any.scene"  # in place of a scene: models of all scenes of a business. No scene's id has a dot
TRAINED, GATE = "train.json", "gate.json"
VERSION = re.compile(r"([a-z0-9][a-z0-9_.-]{0,62})-\d{8}T\d{6}Z-[0-9a-f]{6}", re.ASCII)
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}", re.ASCII)
PASSED = "promote"  # the gate's verdict


class Alias(StrEnum):
    """What a version of a scene's model may be called."""

    CHAMPION = "champion"  # the one to release
    CHALLENGER = "challenger"  # the newest, waiting to take its place


NAMES = (*(alias.value for alias in Alias), "generic")  # by which `resolve` knows a version, beside its own


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ModelVersion:
    """A trained model. `trained` and `gate` are what train.json and gate.json say, empty where there is none."""

    version: str
    business: str
    scene: str
    folder: Path
    aliases: tuple[Alias, ...]
    trained: Mapping[str, Any]
    gate: Mapping[str, Any]

    @property
    def verdict(self) -> str | None:
        """The gate's verdict; None: it was never judged."""
        return self.gate.get("verdict")

    @property
    def best_single(self) -> Mapping[str, str]:
        """By scene, the variant that is best on average: what is shown where no model can rank."""
        found: dict[str, str] = self.trained.get("best_single", {})
        return found


@dataclass(frozen=True)
class Change:
    """An alias that came to mean another version (None: no longer any)."""

    alias: Alias
    version: str | None
    before: str | None
    at: str  # ISO 8601, UTC
    by: str
    verdict: str | None = None  # of the gate
    forced: bool = False
    reason: str = ""


def new_version(scene: str, at: datetime) -> str:
    """A version's name: unique, and in the order of time within a scene, such as home-20261127T054012Z-3f9a1c."""
    return f"{scene}-{at.astimezone(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def scene_of(version: str) -> str:
    """The scene that a version's name says (GENERIC for all of them); raises InputError for what is no version."""
    found = VERSION.fullmatch(version)
    if found is None:
        raise InputError(
            f"model {version!r}: this is no version's name, such as home-20261127T054012Z-3f9a1c. See"
            " `kaleidoscope model list`."
        )
    return found[1]


def home_of(settings: Settings, business: str) -> Path:
    """The folder of a business's models; it need not be there."""
    return settings.models_dir / _plain("business", business)


def list_models(settings: Settings, business: str, scene: str | None = None) -> list[ModelVersion]:
    """The models of a business, or of one of its scenes, the newest first."""
    home = home_of(settings, business)
    found = [path.name for path in home.iterdir() if VERSION.fullmatch(path.name)] if home.is_dir() else []
    wanted = [version for version in found if scene in (None, scene_of(version))]
    wanted.sort(key=lambda version: version.rsplit("-", 2)[1:], reverse=True)
    return [get_model(settings, business, version) for version in wanted]


def get_model(settings: Settings, business: str, version: str) -> ModelVersion:
    """What is known of a model on this machine; raises NotFoundError. Its graphs are not looked at."""
    scene, folder = scene_of(version), home_of(settings, business) / version
    if not folder.is_dir():
        raise NotFoundError(f"There is no model {version!r} in business {business!r} in {settings.models_dir}.")
    aliases = tuple(alias for alias, named in aliases_of(settings, business, scene).items() if named == version)
    read = {name: _json(folder / name) if (folder / name).exists() else {} for name in (TRAINED, GATE)}
    return ModelVersion(version, business, scene, folder, aliases, read[TRAINED], read[GATE])


def aliases_of(settings: Settings, business: str, scene: str) -> dict[Alias, str]:
    """The versions that a scene's aliases mean; those that mean none are not there."""
    raw = _aliases(settings, business, scene)["aliases"]
    return {alias: raw[alias] for alias in Alias if alias in raw}


def history(settings: Settings, business: str, scene: str) -> list[Change]:
    """Every change of a scene's aliases, the oldest first."""
    changes = _aliases(settings, business, scene)["history"]
    return [Change(**{**raw, "alias": Alias(raw["alias"])}) for raw in changes]


def resolve(settings: Settings, business: str, scene: str, name: str) -> str:
    """The version that a name means for a scene now: champion, challenger, generic (the champion of all scenes), or
    the version itself. Raises NotFoundError where there is none, InputError for a model of another scene.
    """
    if name in NAMES:
        alias, of = (Alias.CHAMPION, GENERIC) if name == "generic" else (Alias(name), scene)
        version = aliases_of(settings, business, of).get(alias)
        if version is None:
            raise NotFoundError(_nobody(settings, business, scene, name))
        return version
    owner = scene_of(name)
    if owner not in (scene, GENERIC):
        raise InputError(
            f"model {name!r}: it is of scene {owner!r}, not of {scene!r}. Name one of its own, or generic."
        )
    return name


def with_versions(
    settings: Settings, session: Session, scene: str, plan: ReleasePlan, *, keep_single: bool = True
) -> ReleasePlan:
    """The plan of a release with the versions that names of models mean now, and the model's best single variant.

    That variant is left out where it is not approved (any more); with `keep_single` one that the plan has stays.
    """
    changes: dict[str, Any] = {}
    if plan.model_version in NAMES:
        version = changes["model_version"] = resolve(settings, session.business, scene, plan.model_version)
        single = get_model(settings, session.business, version).best_single.get(scene)
        variant = None if single is None else session.get(Variant, (session.business, scene, single))
        if variant is not None and approval_holds(session, [variant]) and not (keep_single and plan.best_single):
            changes["best_single"] = single
    if plan.challenger is not None and plan.challenger.model_version in NAMES:
        version = resolve(settings, session.business, scene, plan.challenger.model_version)
        changes["challenger"] = plan.challenger.model_copy(update={"model_version": version})
    return plan.model_copy(update=changes)


def _nobody(settings: Settings, business: str, scene: str, name: str) -> str:
    if name == "generic":
        return f"Business {business!r} has no generic champion: `kaleidoscope train --generic`, then promote it."
    waiting = next((v.version for v in list_models(settings, business, scene) if v.verdict == PASSED), None)
    if name == Alias.CHAMPION and waiting is not None:
        return f"Scene {scene!r} has no champion. {waiting} passed the gate: `kaleidoscope model promote {waiting}`."
    return f"Scene {scene!r} has no {name}: `kaleidoscope train {scene}`."


def propose(settings: Settings, business: str, version: str, *, by: str, at: datetime) -> None:
    """Call a version the challenger of its scene."""
    model = get_model(settings, business, version)
    with _changing(settings, business, model.scene) as (aliases, changes):
        before = aliases.get(Alias.CHALLENGER)
        _change(aliases, changes, Change(Alias.CHALLENGER, version, before, at.isoformat(), by, model.verdict))


def promote(
    settings: Settings, caller: Caller, version: str, *, at: datetime, force: bool = False, reason: str = ""
) -> Change:
    """Make a version the champion of its scene, for later releases to name; what is live stays as it is.

    It has to have passed the gate, against the champion that there is; `force` goes by that, with a reason that is
    kept. Raises ConflictError where it may not be, JobError where the export is damaged.
    """
    caller.require(Role.PUBLISHER)
    business, reason = str(caller.business), reason.strip()
    if force and not reason:
        raise InputError("reason: say why the gate does not count; it is what others read in the model's history.")
    model = get_model(settings, business, version)
    Ranker.load(model.folder)
    with _changing(settings, business, model.scene) as (aliases, changes):
        before = aliases.get(Alias.CHAMPION)
        if before == version:
            raise ConflictError(f"Model {version} is the champion of {model.scene!r} already.")
        why = _against(model, before)
        if why and not force:
            raise ConflictError(f"{why} `--force --reason WHY` promotes it all the same.")
        change = Change(
            Alias.CHAMPION, version, before, at.isoformat(), caller.user, model.verdict, bool(why), reason
        )  # fmt: skip
        _change(aliases, changes, change)
        if aliases.get(Alias.CHALLENGER) == version:
            gone = Change(Alias.CHALLENGER, None, version, at.isoformat(), caller.user, reason="promoted")
            _change(aliases, changes, gone)
    return change


def _against(model: ModelVersion, champion: str | None) -> str:
    """Why a model may not be promoted; empty where it may."""
    if model.verdict is None:
        return f"Model {model.version} was never judged by the gate. Train one."
    if model.verdict != PASSED:
        failed = [check["message"] for check in model.gate.get("checks", ()) if not check["ok"]]
        return f"Model {model.version} did not pass the gate. {' '.join(failed)}"
    if model.gate.get("champion") != champion:
        judged = model.gate.get("champion") or "no champion"
        now = champion or "there is none"
        return f"Model {model.version} was judged against {judged}, and now the champion is {now}. Train again."
    return ""


def _change(aliases: dict[str, str], changes: list[dict[str, Any]], change: Change) -> None:
    if change.version is None:
        aliases.pop(change.alias, None)
    else:
        aliases[change.alias] = change.version
    changes.append(asdict(change))


@contextmanager
def _changing(settings: Settings, business: str, scene: str) -> Iterator[tuple[dict[str, str], list[dict[str, Any]]]]:
    """A scene's aliases and their history, to be changed by one process at a time and written all at once."""
    home = home_of(settings, business)
    with locked(home / ".lock"):
        raw = _aliases(settings, business, scene)
        yield raw["aliases"], raw["history"]
        write_file(_aliases_file(settings, business, scene), json_text(raw))


def _aliases(settings: Settings, business: str, scene: str) -> dict[str, Any]:
    path = _aliases_file(settings, business, scene)
    if not path.exists():
        return {"aliases": {}, "history": []}
    raw = _json(path)
    if not isinstance(raw.get("aliases"), dict) or not isinstance(raw.get("history"), list):
        raise JobError(f"{path}: holds no aliases. Restore it from a backup, or remove it and promote a model again.")
    return raw


def _aliases_file(settings: Settings, business: str, scene: str) -> Path:
    return home_of(settings, business) / f"{_plain('scene', scene)}.aliases.json"


def _plain(what: str, name: str) -> str:
    """The name, if it may be one of a file."""
    if not NAME.fullmatch(name) or ".." in name:
        raise InputError(f"{what}: {name!r} is no id. Give lower-case letters, digits, - and _.")
    return name


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise JobError(f"{path}: cannot be read ({error}). Restore it from a backup.") from error
    if not isinstance(raw, dict):
        raise JobError(f"{path}: holds no JSON object. Restore it from a backup.")
    return raw


def write_file(path: Path, text: str) -> None:
    """Write a file: all of it is there afterwards, even if the machine loses power, or what was there before."""
    try:
        with replacing(path) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        raise JobError(
            f"{path}: cannot be written ({error}). Free some space, or check who may write there."
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until nobody else holds the lock of this file; a process that dies gives it back."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a")
    except OSError as error:
        raise JobError(f"{path.parent}: cannot be written to ({error}); see KALEIDOSCOPE_MODELS_DIR.") from error
    with stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


# ── MLflow ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ARTIFACTS, MODEL, PLOTS = "mlflow.artifacts", "model", "plots"  # no business's id has a dot
TAG = "kaleidoscope.version"


@dataclass(frozen=True)
class Mirrored:
    """What MLflow has of a model: its run and the number of its registered version; or why it has nothing."""

    run: str | None
    number: str | None
    problem: str | None


def fetch(settings: Settings, business: str, version: str) -> Path:
    """The export's folder on this machine: where it lies, or downloaded from MLflow, and tried.

    Raises NotFoundError where neither has it.
    """
    folder = home_of(settings, business) / version
    scene_of(version)
    if (folder / SIGNATURE).exists():
        return folder
    if settings.mlflow_url is None and not _store(settings).exists():
        raise NotFoundError(f"There is no model {version!r} in business {business!r} in {settings.models_dir}.")
    with _client(settings) as client, locked(folder.parent / ".lock"):
        found = _registered(client, business, version)
        if found is None:
            raise NotFoundError(f"There is no model {version!r}, neither in {settings.models_dir} nor in MLflow.")
        if (folder / SIGNATURE).exists():  # somebody else fetched it meanwhile
            return folder
        made = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder.parent))
        try:
            got = Path(client.download_artifacts(found.run_id, MODEL, str(made)))
            Ranker.load(got)
            got.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder


def mirror(settings: Settings, business: str, version: str) -> Mirrored:
    """Track and register a model in MLflow, unless it is there already, and give it the aliases of our files.

    A mirror that cannot be kept is no reason to lose a model: what went wrong is in the answer.
    """
    try:
        model = get_model(settings, business, version)
        with _client(settings) as client, locked(settings.models_dir / ".mlflow.lock"):
            found = _registered(client, business, version) or _register(client, settings, model)
            for alias in Alias:
                _mirror_alias(client, settings, model, alias)
            return Mirrored(found.run_id, str(found.version), None)
    except KaleidoscopeError as error:
        return Mirrored(None, None, error.message)
    except Exception as error:  # MLflow raises what its stores, its server and their libraries raise
        return Mirrored(None, None, f"MLflow: {type(error).__name__}: {error}"[:1000])


def _register(client: Any, settings: Settings, model: ModelVersion) -> Any:
    name, trained = _registered_name(model.business, model.scene), model.trained
    experiment = client.get_experiment_by_name(name)
    place = None if settings.mlflow_url else (settings.models_dir.absolute() / ARTIFACTS).as_uri()
    identity = experiment.experiment_id if experiment else client.create_experiment(name, artifact_location=place)
    tags: dict[str, str | None] = {TAG: model.version, "kaleidoscope.scene": model.scene}
    tags |= {"kaleidoscope.log_hash": trained.get("log", {}).get("hash"), "kaleidoscope.verdict": model.verdict}
    tags["mlflow.source.git.commit"] = (trained.get("commit") or {}).get("hash")
    kept = {key: str(value) for key, value in tags.items() if value is not None}
    run = client.create_run(identity, run_name=model.version, tags=kept).info
    for key, value in {**trained.get("config", {}), "seed": trained.get("seed")}.items():
        client.log_param(run.run_id, key, value)
    for key, value in _numbers(trained.get("metrics", {})):
        client.log_metric(run.run_id, key, value)
    client.log_artifacts(run.run_id, str(model.folder), MODEL)
    for picture in sorted(model.folder.glob("*.svg")):
        client.log_artifact(run.run_id, str(picture), PLOTS)
    client.set_terminated(run.run_id)
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    return client.create_model_version(name, f"{run.artifact_uri}/{MODEL}", run.run_id, tags=kept)


def _mirror_alias(client: Any, settings: Settings, model: ModelVersion, alias: Alias) -> None:
    name = _registered_name(model.business, model.scene)
    version = aliases_of(settings, model.business, model.scene).get(alias)
    found = None if version is None else _registered(client, model.business, version)
    if found is not None:
        client.set_registered_model_alias(name, alias.value, found.version)
    else:
        client.delete_registered_model_alias(name, alias.value)


def _registered(client: Any, business: str, version: str) -> Any:
    """The registered model version, None where there is none."""
    name = _registered_name(business, scene_of(version))
    return next(iter(client.search_model_versions(f"name = '{name}' and tags.`{TAG}` = '{version}'")), None)


def _registered_name(business: str, scene: str) -> str:
    return f"{business}.{scene}"


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in nested mappings, their names joined by dots; what is unknown is left out."""
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def _store(settings: Settings) -> Path:
    """The file of MLflow's own database, which is not ours: both keep an alembic_version."""
    return settings.models_dir.absolute() / "mlflow.db"


@contextmanager
def _client(settings: Settings) -> Iterator[Any]:
    """A client of MLflow that is quiet and calls nobody but its server; raises JobError where it is not installed."""
    os.environ.update(
        MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true", MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"
    )
    with warnings.catch_warnings():  # its own, and those of what it imports
        warnings.simplefilter("ignore")
        try:
            import mlflow
        except ImportError as error:
            raise JobError(
                "MLflow is not installed, so runs are not tracked: pip install 'kaleidoscope[registry]'"
            ) from error
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.ERROR)
        url = settings.mlflow_url or f"sqlite:///{_store(settings)}"
        settings.models_dir.mkdir(parents=True, exist_ok=True)
        yield mlflow.MlflowClient(tracking_uri=url, registry_uri=url)
