"""The registry: names of versions, who may become champion, and the mirror in MLflow."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sqlalchemy as sa

from kaleidoscope import registry
from kaleidoscope.database import Database
from kaleidoscope.encoding import Encoder
from kaleidoscope.errors import ConflictError, ForbiddenError, InputError, JobError, NotFoundError
from kaleidoscope.ranker import Ranker
from kaleidoscope.registry import GENERIC, Alias
from kaleidoscope.release import Challenger, ReleasePlan, Shares, draft_release, verify
from kaleidoscope.review import VariantFilter, make_variants, move_variants
from kaleidoscope.settings import Settings
from kaleidoscope.tables import Variant
from kaleidoscope.vocabulary import Role
from models.batch import Examples
from models.export import export_model
from models.networks import DeepConfig, DeepPart
from models.tables import fit_tables
from models.train import CtrModel
from tests.kaleidoscope.people import person
from tests.kaleidoscope.stock import stocked

NOW = datetime(2030, 1, 10, 12, tzinfo=UTC)
PIA = person("pia", Role.PUBLISHER)
GATE = {"verdict": "promote", "champion": None, "checks": [{"name": "fast", "ok": True, "message": "It is fast."}]}
TRAINED = {
    "created_at": NOW.isoformat(),
    "log": {"hash": "abc123", "exposures": 300},
    "config": {"heads": 4, "folds": 3},
    "seed": 7,
    "commit": {"hash": "d00d", "changed": False},
    "metrics": {"auc": {"value": 0.6, "ci_low": 0.5, "ci_high": 0.7}, "ece": None},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> CtrModel:
    rng = np.random.default_rng(0)
    variants = pa.table({"variant_id": ["v1", "v2"], "tone": [["warm"], ["cool"]]})
    columns = {"age": pa.array(rng.integers(20, 60, 300))}
    encoder = Encoder.fit(columns, user=["age"], context=[], variants=variants, dimensions=["tone"])
    shown, click = rng.integers(0, 2, 300), (rng.random(300) < 0.3).astype(np.float32)
    tags = encoder.tags(variants)
    examples = Examples(encoder.features(columns, 300), shown, tags, click, np.ones(300), np.arange(300))
    return CtrModel(fit_tables(examples, encoder), DeepPart(DeepConfig(1, 1, 1, 1, 1)), 0.0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(models_dir=tmp_path / "models")


def add(
    settings: Settings,
    model: CtrModel,
    scene: str = "home",
    at: datetime = NOW,
    gate: dict[str, Any] | None = None,
    best_single: dict[str, str] | None = None,
) -> str:
    """A model in the registry, as training leaves one."""
    version = registry.new_version(scene, at)
    folder = registry.home_of(settings, "acme") / version
    variants = pa.table({"variant_id": ["v1", "v2"], "tone": [["warm"], ["cool"]]})
    export_model(model, folder, version=version, variants=variants, log_hash="abc123", seed=7, created_at=at, draws=0)
    trained = {**TRAINED, "version": version, "best_single": best_single or {"home": "v1"}}
    (folder / "train.json").write_text(json.dumps(trained))
    (folder / "gate.json").write_text(json.dumps({**GATE, **(gate or {})}))
    (folder / "calibration.svg").write_text("<svg/>")
    return version


def refused(version: str) -> dict[str, Any]:
    check = {"name": "fast", "ok": False, "message": f"{version} is slow."}
    return {"verdict": "keep", "checks": [check]}


# ── versions ──


def test_versions_are_plain_unique_and_in_the_order_of_time() -> None:
    made = [registry.new_version("home", NOW + timedelta(seconds=n)) for n in range(20)]
    assert made == sorted(made) and len(set(made)) == 20
    assert made[0].startswith("home-20300110T120000Z-")
    assert registry.scene_of(made[0]) == "home"
    assert registry.scene_of(registry.new_version("a-b_c", NOW)) == "a-b_c"
    assert registry.scene_of(registry.new_version(GENERIC, NOW)) == GENERIC
    assert registry.new_version("home", NOW) != registry.new_version("home", NOW)


@pytest.mark.parametrize(
    "name", ["", "home", "../etc-20300110T120000Z-aaaaaa", "home-20300110T120000Z-aaaaaa/..", "champion"]
)
def test_what_is_no_version_is_refused(settings: Settings, name: str) -> None:
    for ask in (registry.get_model, registry.fetch):
        with pytest.raises(InputError, match="no version's name"):
            ask(settings, "acme", name)


def test_models_are_listed_newest_first_and_by_scene(settings: Settings, small: CtrModel) -> None:
    assert registry.list_models(settings, "acme") == []
    old, other = add(settings, small), add(settings, small, "shop", NOW + timedelta(hours=1))
    new = add(settings, small, at=NOW + timedelta(hours=2))
    (registry.home_of(settings, "acme") / ".training-x").mkdir()
    assert [m.version for m in registry.list_models(settings, "acme")] == [new, other, old]
    assert [m.version for m in registry.list_models(settings, "acme", "home")] == [new, old]
    model = registry.get_model(settings, "acme", new)
    assert (model.scene, model.verdict, model.best_single, model.aliases) == ("home", "promote", {"home": "v1"}, ())
    assert registry.list_models(settings, "rival") == []
    with pytest.raises(NotFoundError, match="rival"):
        registry.get_model(settings, "rival", new)


# ── aliases ──


def test_a_champion_is_what_passed_the_gate(settings: Settings, small: CtrModel) -> None:
    version = add(settings, small)
    registry.propose(settings, "acme", version, by="train", at=NOW)
    assert registry.resolve(settings, "acme", "home", "challenger") == version
    with pytest.raises(NotFoundError, match=f"{version} passed the gate: `kaleidoscope model promote {version}`"):
        registry.resolve(settings, "acme", "home", "champion")
    change = registry.promote(settings, PIA, version, at=NOW)
    assert (change.by, change.before, change.forced, change.verdict) == ("pia", None, False, "promote")
    assert registry.aliases_of(settings, "acme", "home") == {Alias.CHAMPION: version}
    assert registry.resolve(settings, "acme", "home", "champion") == version
    assert registry.resolve(settings, "acme", "home", version) == version
    assert registry.get_model(settings, "acme", version).aliases == (Alias.CHAMPION,)
    assert [(c.alias, c.version, c.by) for c in registry.history(settings, "acme", "home")] == [
        ("challenger", version, "train"), ("champion", version, "pia"), ("challenger", None, "pia")
    ]  # fmt: skip
    with pytest.raises(ConflictError, match="already"):
        registry.promote(settings, PIA, version, at=NOW)


def test_what_did_not_pass_is_promoted_only_by_force_and_with_a_reason(settings: Settings, small: CtrModel) -> None:
    version = add(settings, small, gate=refused("It"))
    with pytest.raises(ConflictError, match=r"did not pass the gate\. It is slow\. `--force --reason WHY`"):
        registry.promote(settings, PIA, version, at=NOW)
    with pytest.raises(InputError, match="reason"):
        registry.promote(settings, PIA, version, at=NOW, force=True, reason="  ")
    assert registry.aliases_of(settings, "acme", "home") == {}
    change = registry.promote(settings, PIA, version, at=NOW, force=True, reason="The gate's machine was busy.")
    assert (change.forced, change.verdict, change.reason) == (True, "keep", "The gate's machine was busy.")
    assert registry.history(settings, "acme", "home") == [change]


def test_force_is_not_recorded_where_none_was_needed(settings: Settings, small: CtrModel) -> None:
    change = registry.promote(settings, PIA, add(settings, small), at=NOW, force=True, reason="To be sure.")
    assert not change.forced


def test_a_verdict_against_another_champion_does_not_count(settings: Settings, small: CtrModel) -> None:
    first, second = add(settings, small), add(settings, small, at=NOW + timedelta(hours=1))
    registry.promote(settings, PIA, first, at=NOW)
    with pytest.raises(ConflictError, match=f"judged against no champion, and now the champion is {first}"):
        registry.promote(settings, PIA, second, at=NOW)
    third = add(settings, small, at=NOW + timedelta(hours=2), gate={"champion": first})
    assert registry.promote(settings, PIA, third, at=NOW).before == first


def test_what_was_never_judged_is_not_promoted(settings: Settings, small: CtrModel) -> None:
    version = add(settings, small)
    (registry.home_of(settings, "acme") / version / "gate.json").unlink()
    with pytest.raises(ConflictError, match="never judged"):
        registry.promote(settings, PIA, version, at=NOW)


@pytest.mark.parametrize("role", [Role.VIEWER, Role.EDITOR, Role.REVIEWER])
def test_only_publishers_promote(settings: Settings, small: CtrModel, role: Role) -> None:
    version = add(settings, small)
    for force in (False, True):
        with pytest.raises(ForbiddenError):
            registry.promote(settings, person("eve", role), version, at=NOW, force=force, reason="Let me.")
    with pytest.raises(NotFoundError):
        registry.promote(settings, person("rob", business="rival"), version, at=NOW)
    assert registry.aliases_of(settings, "acme", "home") == {}


def test_a_damaged_export_is_not_promoted(settings: Settings, small: CtrModel) -> None:
    version = add(settings, small)
    graph = registry.home_of(settings, "acme") / version / "variant.onnx"
    graph.write_bytes(graph.read_bytes() + b" ")
    with pytest.raises(JobError, match=r"variant\.onnx"):
        registry.promote(settings, PIA, version, at=NOW, force=True, reason="I want it.")
    assert registry.aliases_of(settings, "acme", "home") == {}


def test_names_mean_models_of_the_scene_or_generic_ones(settings: Settings, small: CtrModel) -> None:
    of_home, generic = add(settings, small), add(settings, small, GENERIC)
    with pytest.raises(NotFoundError, match="train --generic"):
        registry.resolve(settings, "acme", "young", "generic")
    registry.promote(settings, PIA, generic, at=NOW)
    assert registry.resolve(settings, "acme", "young", "generic") == generic
    assert registry.resolve(settings, "acme", "young", generic) == generic
    with pytest.raises(NotFoundError, match="kaleidoscope train young"):
        registry.resolve(settings, "acme", "young", "champion")
    with pytest.raises(InputError, match="of scene 'home', not of 'young'"):
        registry.resolve(settings, "acme", "young", of_home)
    with pytest.raises(InputError, match="no version's name"):
        registry.resolve(settings, "acme", "young", "latest")


def test_changes_at_the_same_time_are_all_kept(settings: Settings, small: CtrModel) -> None:
    versions = [add(settings, small, at=NOW + timedelta(hours=n)) for n in range(8)]
    threads = [
        threading.Thread(target=registry.propose, args=(settings, "acme", v), kwargs={"by": "x", "at": NOW})
        for v in versions
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = registry.history(settings, "acme", "home")
    assert sorted(str(change.version) for change in changes) == sorted(versions)
    assert [change.before for change in changes] == [None, *(change.version for change in changes[:-1])]


@pytest.mark.parametrize("text", ["{", "[]", '{"aliases": 3}'])
def test_a_damaged_file_of_aliases_is_named(settings: Settings, small: CtrModel, text: str) -> None:
    version = add(settings, small)
    (registry.home_of(settings, "acme") / "home.aliases.json").write_text(text)
    with pytest.raises(JobError, match=r"home\.aliases\.json: .*backup"):
        registry.resolve(settings, "acme", "home", "champion")
    with pytest.raises(JobError):
        registry.promote(settings, PIA, version, at=NOW)


# ── releases ──


def test_a_draft_names_the_version_that_is_champion_now(settings: Settings, small: CtrModel, sqlite: Database) -> None:
    stocked(sqlite, approved=True)
    with sqlite.transaction(person("ann")) as session:
        make_variants(session, "welcome")
        move_variants(session, "welcome", "submit", VariantFilter())
    with sqlite.transaction(person("rex")) as session:
        move_variants(session, "welcome", "approve", VariantFilter())
        best, other = session.scalars(sa.select(Variant.id).where(Variant.scene_id == "welcome").limit(2))
        gone = session.get(Variant, ("acme", "welcome", other))
        assert gone is not None
        move_variants(session, "welcome", "retire", VariantFilter(ids=(other,)))
    version = add(settings, small, "welcome", best_single={"welcome": best})
    newer = add(settings, small, "welcome", NOW + timedelta(hours=1), {"champion": version}, {"welcome": other})
    shares, challenger = Shares(random=0.2, model=0.7, challenger=0.1), Challenger(model_version="challenger")
    plan = ReleasePlan(shares=shares, model_version="champion", challenger=challenger)

    def drafted(plan: ReleasePlan, **given: Any) -> ReleasePlan:
        with sqlite.transaction(PIA) as session:
            resolved = registry.with_versions(settings, session, "welcome", plan, **given)
            return verify(draft_release(session, "welcome", resolved))

    with pytest.raises(NotFoundError, match="has no champion"):
        drafted(plan)
    registry.promote(settings, PIA, version, at=NOW)
    registry.propose(settings, "acme", newer, by="train", at=NOW)
    release = drafted(plan)
    assert (release.model_version, release.best_single) == (version, best)
    assert release.challenger is not None and release.challenger.model_version == newer
    registry.promote(settings, PIA, newer, at=NOW)
    plain = plan.model_copy(update={"challenger": None, "shares": Shares(random=0.2, model=0.8)})
    release = drafted(plain)
    assert (release.model_version, release.best_single) == (newer, None)  # whose best variant is retired
    named = plain.model_copy(update={"model_version": "somebody-elses-model", "best_single": best})
    assert drafted(named).model_dump(include=set(ReleasePlan.model_fields)) == named.model_dump()


# ── MLflow ──


def test_without_mlflow_everything_else_works(
    settings: Settings, small: CtrModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    version = add(settings, small)
    mirrored = registry.mirror(settings, "acme", version)
    assert mirrored.run is None and "not installed" in str(mirrored.problem)
    registry.promote(settings, PIA, version, at=NOW)
    assert registry.fetch(settings, "acme", version) == registry.home_of(settings, "acme") / version
    shutil.rmtree(registry.home_of(settings, "acme") / version)
    with pytest.raises(NotFoundError):
        registry.fetch(settings, "acme", version)
    with pytest.raises(JobError, match="not installed"):
        registry.fetch(settings.model_copy(update={"mlflow_url": "http://127.0.0.1:9"}), "acme", version)


def test_serving_a_model_does_not_import_mlflow() -> None:
    code = "import sys, kaleidoscope.registry; sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300, check=False).returncode == 0


def test_mlflow_mirrors_runs_models_and_aliases(
    settings: Settings, small: CtrModel, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow")
    version = add(settings, small)
    registry.propose(settings, "acme", version, by="train", at=NOW)
    mirrored = registry.mirror(settings, "acme", version)
    assert mirrored == registry.Mirrored(mirrored.run, "1", None)
    registry.promote(settings, PIA, version, at=NOW)
    assert registry.mirror(settings, "acme", version) == mirrored  # once is enough
    second = add(settings, small, at=NOW + timedelta(hours=1), gate={"champion": version})
    registry.propose(settings, "acme", second, by="train", at=NOW)
    assert registry.mirror(settings, "acme", second).number == "2"

    with sqlite3.connect(settings.models_dir / "mlflow.db") as kept:
        tags = dict(kept.execute("SELECT key, value FROM tags WHERE run_uuid = ?", [mirrored.run]))
        params = dict(kept.execute("SELECT key, value FROM params WHERE run_uuid = ?", [mirrored.run]))
        metrics = dict(kept.execute("SELECT key, value FROM latest_metrics WHERE run_uuid = ?", [mirrored.run]))
        names = kept.execute("SELECT name, alias, version FROM registered_model_aliases ORDER BY alias").fetchall()
    kept.close()
    assert tags["kaleidoscope.version"] == version and tags["kaleidoscope.log_hash"] == "abc123"
    assert tags["mlflow.source.git.commit"] == "d00d" and tags["kaleidoscope.verdict"] == "promote"
    assert params == {"heads": "4", "folds": "3", "seed": "7"}
    assert metrics == {"auc.value": 0.6, "auc.ci_low": 0.5, "auc.ci_high": 0.7}
    assert names == [("acme.home", "challenger", 2), ("acme.home", "champion", 1)]
    artifacts = settings.models_dir / "mlflow.artifacts" / str(mirrored.run) / "artifacts"
    assert (artifacts / "plots" / "calibration.svg").exists()
    folder = registry.home_of(settings, "acme") / version
    for path in folder.iterdir():
        assert (artifacts / "model" / path.name).read_bytes() == path.read_bytes()

    shutil.rmtree(folder)
    assert registry.fetch(settings, "acme", version) == folder
    assert Ranker.load(folder).version == version
    shutil.rmtree(folder)
    (artifacts / "model" / "user.onnx").write_bytes(b"no graph")
    with pytest.raises(JobError, match=r"user\.onnx"):
        registry.fetch(settings, "acme", version)
    assert not folder.exists()
    with pytest.raises(NotFoundError, match="nor in MLflow"):
        registry.fetch(settings, "acme", registry.new_version("home", NOW))
    assert capfd.readouterr() == ("", "")
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_a_mirror_that_breaks_says_so_and_nothing_is_lost(settings: Settings, small: CtrModel, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    version = add(settings, small)
    (tmp_path / "file").touch()
    broken = settings.model_copy(update={"mlflow_url": f"sqlite:///{tmp_path}/file/mlflow.db"})
    mirrored = registry.mirror(broken, "acme", version)
    assert mirrored.run is None and str(mirrored.problem).startswith("MLflow: ")
    assert registry.get_model(settings, "acme", version).version == version
