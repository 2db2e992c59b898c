"""Training: what is written, what the gate says of worlds whose truth is known, and what a killed training leaves."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray
from scipy.special import expit

from kaleidoscope import registry
from kaleidoscope.access import operator
from kaleidoscope.cli import main
from kaleidoscope.commands import train as training
from kaleidoscope.commands.gate import Limits, Report, Verdict, judge
from kaleidoscope.commands.output import Clock
from kaleidoscope.commands.train import Champion, Made, run_train, time_ranking, train
from kaleidoscope.encoding import Encoder
from kaleidoscope.errors import InputError, JobError, NotFoundError
from kaleidoscope.log import Log, read_log
from kaleidoscope.log_schema import read_schema
from kaleidoscope.operator_cli.models import trained_lines
from kaleidoscope.progress import Silent
from kaleidoscope.ranker import Ranker
from kaleidoscope.registry import GENERIC, Alias
from kaleidoscope.settings import Settings
from kaleidoscope.simulation import Users, World
from kaleidoscope.terminal import print_lines
from models.batch import Examples
from models.export import export_model
from models.train import CtrModel, fit_network
from tests.kaleidoscope.commands.acme import SCENES, SPEC, START, WORLD, platform

NOW = datetime(2030, 2, 1, 12, tzinfo=UTC)


@pytest.fixture(autouse=True)
def without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training needs none; tests/kaleidoscope/test_registry.py has the tests with it."""
    monkeypatch.setitem(sys.modules, "mlflow", None)


@dataclass(frozen=True)
class Stage:
    settings: Settings
    home: dict[str, Any]  # what training on each gave
    generic: dict[str, Any]

    def folder(self, trained: Mapping[str, Any]) -> Path:
        return self.settings.models_dir / "acme" / str(trained["version"])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Settings:
    return platform(tmp_path_factory.mktemp("acme"), sqlite_template)


@pytest.fixture(scope="module")
def stage(settings: Settings) -> Stage:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        home, generic = (
            run_train(settings, business="acme", scene=scene, seed=7, progress=Silent(), at=NOW)
            for scene in ("home", None)
        )
    return Stage(settings, home, generic)


# ── what is written ──


def test_a_training_leaves_an_export_that_says_what_it_was_made_of(stage: Stage) -> None:
    trained, folder = stage.home, stage.folder(stage.home)
    assert sorted(path.name for path in folder.iterdir()) == [
        "calibration.svg", "gate.json", "policy-values.svg",
        "signature.json", "train.json", "user.onnx", "variant.onnx",
    ]  # fmt: skip
    kept = json.loads((folder / "train.json").read_text())
    assert {key: kept[key] for key in ("version", "business", "scene", "seed", "generic")} == {
        "version": trained["version"], "business": "acme", "scene": "home", "seed": 7, "generic": False
    }  # fmt: skip
    assert kept["log"]["exposures"] == SCENES["home"][1]
    assert kept["log"]["until"] < (START + timedelta(days=10)).isoformat()
    ranker = Ranker.load(folder)
    assert ranker.version == trained["version"]
    assert ranker.signature.log_hash == kept["log"]["hash"]
    assert ranker.signature.metrics["auc"] == kept["metrics"]["auc"]["value"]
    assert json.loads((folder / "gate.json").read_text()) == json.loads(json.dumps(trained["gate"]))
    assert not list(folder.parent.glob(".training-*"))


def test_metrics_have_intervals_that_hold_the_truth(stage: Stage) -> None:
    metrics = stage.home["metrics"]
    for name in ("auc", "logloss", "ece"):
        assert 0 <= metrics[name]["ci_low"] < metrics[name]["value"] < metrics[name]["ci_high"]
    assert metrics["auc"]["ci_low"] > 0.5
    users = WORLD.sample_users(20_000, np.random.default_rng(5))
    truth = expit(WORLD.logits(users)[:, list(SCENES["home"][0])])
    mixed = 0.9 * truth.max(axis=1).mean() + 0.1 * truth.mean()  # no policy of this epsilon earns more
    value = metrics["policy_value"]
    assert value["uniform"]["ci_low"] < truth.mean() < value["uniform"]["ci_high"]
    assert value["uniform"]["ci_high"] < value["model"]["value"]
    assert value["model"]["ci_low"] < mixed


def test_the_best_single_variant_is_nearly_the_best_there_is(stage: Stage) -> None:
    users = WORLD.sample_users(20_000, np.random.default_rng(5))
    truth = expit(WORLD.logits(users)[:, list(SCENES["home"][0])]).mean(axis=0)
    (scene, variant), *others = stage.home["best_single"].items()
    assert (scene, others) == ("home", [])
    assert truth[list(SCENES["home"][0]).index(int(variant[-2:]))] > np.sort(truth)[-3]
    assert set(stage.generic["best_single"]) == set(SCENES)


def test_the_model_knows_who_prefers_what(stage: Stage) -> None:
    ranker, shown = Ranker.load(stage.folder(stage.home)), list(SCENES["home"][0])
    users = WORLD.sample_users(4_000, np.random.default_rng(11))
    truth = expit(WORLD.logits(users)[:, shown])
    picked = scores(ranker, "home", users).argmax(axis=1)
    earned = truth[np.arange(len(users)), picked].mean()
    assert earned > truth.mean(axis=0).max() + 0.5 * (truth.max(axis=1).mean() - truth.mean(axis=0).max())


def scores(ranker: Ranker, scene: str, users: Users) -> NDArray[np.float32]:
    columns = {name: column.to_pylist() for name, column in WORLD.columns(users).items()}
    dimensions = {
        name: pa.array([[f"{name}_{WORLD.variant_tags[i, d]}"] for i in SCENES[scene][0]])
        for d, name in enumerate(WORLD.dimension_names)
    }
    ids = [f"{scene}-{i:02d}" for i in SCENES[scene][0]]
    side = ranker.variant_side(pa.table({"variant_id": ids, **dimensions}))
    return ranker.score(ranker.features(columns, len(users)), side)


def test_a_generic_model_ranks_the_variants_of_a_young_scene(stage: Stage) -> None:
    ranker = Ranker.load(stage.folder(stage.generic))
    assert ranker.signature.generic and ranker.signature.residual_ids == ()
    assert stage.generic["scene"] is None and stage.generic["version"].startswith(f"{GENERIC}-")
    users = WORLD.sample_users(4_000, np.random.default_rng(11))
    truth = WORLD.logits(users)[:, list(SCENES["young"][0])]
    found = scores(ranker, "young", users)
    agreement = [np.corrcoef(a, b)[0, 1] for a, b in zip(truth, found, strict=True)]
    assert np.mean(agreement) > 0.7


def test_the_same_exposures_and_seed_give_the_same_model(stage: Stage) -> None:
    again = run_train(stage.settings, business="acme", scene="home", seed=7, progress=Silent(), at=NOW)
    assert again["version"] != stage.home["version"]
    assert again["log"] == stage.home["log"]
    one, other = (Ranker.load(stage.folder(trained)).signature for trained in (stage.home, again))
    assert one.files == other.files
    assert again["metrics"] == stage.home["metrics"]
    waiting = registry.aliases_of(stage.settings, "acme", "home")
    assert waiting[Alias.CHALLENGER] == again["version"]


def test_too_little_to_learn_from_is_refused_and_leaves_nothing(stage: Stage) -> None:
    before = sorted(registry.home_of(stage.settings, "acme").iterdir())
    with pytest.raises(InputError, match=r"scene 'young': 60 exposures .* at least 1,000 .*train --generic"):
        run_train(stage.settings, business="acme", scene="young", seed=0, progress=Silent())
    with pytest.raises(NotFoundError, match="nowhere"):
        run_train(stage.settings, business="acme", scene="nowhere", seed=0, progress=Silent())
    assert sorted(registry.home_of(stage.settings, "acme").iterdir()) == before


def test_nothing_is_made_where_there_is_no_database(stage: Stage, tmp_path: Path) -> None:
    elsewhere = stage.settings.model_copy(update={"log_url": f"sqlite:///{tmp_path}/log.db"})
    with pytest.raises(NotFoundError, match=r"no database .*log\.db"):
        run_train(elsewhere, business="acme", scene="home", seed=0, progress=Silent())
    assert list(tmp_path.iterdir()) == []


# ── a training that dies ──


class Killed(BaseException):
    pass


def test_a_training_that_dies_while_it_exports_leaves_no_model(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, contests: Contests
) -> None:
    home = registry.home_of(stage.settings, "acme") / "killed"

    def die(*_: object) -> None:
        raise Killed

    def export() -> None:
        training._export(  # type: ignore[call-arg]
            contests.good, {"version": "home-20300201T120000Z-aaaaaa"}, home,
            log_hash="h", at=NOW, seed=0, limits=Limits(), clock=Clock(Silent()),
        )  # fmt: skip

    with monkeypatch.context() as patch:
        patch.setattr(training, "time_ranking", die)
        with pytest.raises(Killed):
            export()
        assert list(home.iterdir()) == []
        patch.setattr(training.shutil, "rmtree", lambda *_, **__: None)  # killed, it does not tidy up either
        with pytest.raises(Killed):
            export()
    (left,) = home.iterdir()
    assert left.name.startswith(".training-") and (left / "home-20300201T120000Z-aaaaaa").is_dir()
    os.utime(left, (0, 0))
    export()
    assert [path.name for path in home.iterdir()] == ["home-20300201T120000Z-aaaaaa"]


def test_an_export_that_was_changed_is_refused(stage: Stage, tmp_path: Path) -> None:
    settings = stage.settings.model_copy(update={"models_dir": tmp_path})
    version = str(stage.home["version"])
    shutil.copytree(stage.folder(stage.home), tmp_path / "acme" / version)
    graph = tmp_path / "acme" / version / "user.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    with pytest.raises(JobError, match=r"user\.onnx"):
        registry.promote(settings, operator("pia", "acme"), version, at=NOW)
    assert registry.aliases_of(settings, "acme", "home") == {}


# ── the gate ──


def log_of(world: World, rows: int, folder: Path, seed: int = 0) -> Log:
    """A log of random exposures over ten days."""
    table = world.log(rows, np.random.default_rng(seed))
    moments = [START + timedelta(days=10) * i / rows for i in range(rows)]
    table = table.append_column("time", pa.array(moments, pa.timestamp("us", "UTC")))
    pq.write_table(table, folder / "log.parquet")
    schema = {**world.schema(), "time": "time", "variant": list(world.dimension_names)}
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema))
    return read_log(folder / "log.parquet", read_schema(folder / "schema.yaml"))


def learned_nothing(examples: Examples, encoder: Encoder, *, seed: int) -> CtrModel:
    """A network of clicks that were dealt out at random."""
    shuffled = np.random.default_rng(seed).permutation(examples.reward)
    return fit_network(replace(examples, reward=shuffled), encoder, seed=seed)


def made_of(log: Log, champion: Champion | None = None, **given: Any) -> Made:
    return train(log, "home", champion=champion, seed=1, clock=Clock(Silent()), limits=Limits(), **given)


def verdict_on(made: Made, folder: Path, limits: Limits | None = None, problems: tuple[str, ...] = ()) -> Report:
    ranker = exported(made, folder)
    latency = time_ranking(ranker, made.menu, made.one_user)
    return judge(
        made.contest, made.fresh, made.champion, made.curve, latency,
        problems=(*made.problems, *problems), limits=limits or Limits(),
    )  # fmt: skip


def exported(made: Made, folder: Path) -> Ranker:
    path = folder / f"model-{len(list(folder.iterdir()))}"
    export_model(
        made.model, path, version=path.name, variants=made.variants, log_hash="h", seed=0, created_at=NOW, draws=0
    )
    return Ranker.load(path)


@dataclass(frozen=True)
class Contests:
    log: Log
    good: Made
    noise: Made


@pytest.fixture(scope="module")
def contests(tmp_path_factory: pytest.TempPathFactory) -> Contests:
    log = log_of(WORLD, 9_000, tmp_path_factory.mktemp("contests"))
    return Contests(log, made_of(log), made_of(log, fit=learned_nothing))


def failed(report: Report) -> list[str]:
    return [check.name for check in report.checks if not check.ok]


def test_a_first_model_that_has_learned_is_promoted(stage: Stage) -> None:
    gate = stage.home["gate"]
    assert gate["verdict"] == "promote"
    assert (gate["champion"], gate["fresh_exposures"]) == (None, None)
    assert gate["gains"]["best_single"]["ci_low"] > 0
    assert gate["exposures"] == SCENES["home"][1]
    assert gate["latency"]["variants"] == len(SCENES["home"][0])


def test_a_model_that_learned_nothing_is_kept_out(contests: Contests, tmp_path: Path) -> None:
    report = verdict_on(contests.noise, tmp_path)
    assert report.verdict is Verdict.KEEP
    assert "no_worse_than_best_single" in failed(report)


def test_where_nothing_can_be_learned_nothing_is_promoted(tmp_path: Path) -> None:
    flat = World.draw(replace(SPEC, interactions=0, tag_sd=0.0, material_sd=0.0))
    report = verdict_on(made_of(log_of(flat, 4_000, tmp_path)), tmp_path)
    assert report.verdict is Verdict.KEEP
    assert "better_than_uniform" in failed(report)


def champion_of(made: Made, folder: Path, days: float) -> Champion:
    return Champion("home-old", exported(made, folder), (START + timedelta(days=days)).timestamp())


def test_a_clearly_better_challenger_takes_the_place_of_a_champion(contests: Contests, tmp_path: Path) -> None:
    champion = champion_of(contests.noise, tmp_path, days=3)
    report = verdict_on(made_of(contests.log, champion), tmp_path)
    assert report.verdict is Verdict.PROMOTE, report.checks
    assert report.champion == "home-old"
    assert report.fresh_exposures == pytest.approx(0.7 * len(contests.log), rel=0.01)
    gained = report.gains["champion"]
    assert gained is not None and gained.ci_low > 0


def test_a_challenger_that_learned_nothing_does_not_replace_a_champion(contests: Contests, tmp_path: Path) -> None:
    champion = champion_of(contests.good, tmp_path, days=3)
    report = verdict_on(made_of(contests.log, champion, fit=learned_nothing), tmp_path)
    assert report.verdict is Verdict.KEEP
    assert {"no_worse_than_best_single", "no_worse_than_champion"} <= set(failed(report))
    lost = report.gains["champion"]
    assert lost is not None and lost.ci_high < 0


@pytest.mark.parametrize(("days", "fresh"), [(9.9, 30), (11, 0)])
def test_without_exposures_that_the_champion_has_not_seen_it_stays(
    contests: Contests, tmp_path: Path, days: float, fresh: int
) -> None:
    champion = champion_of(contests.noise, tmp_path, days)
    few = contests.log.take(np.flatnonzero(contests.log.file_row % 3 == 0))
    report = verdict_on(made_of(few, champion), tmp_path)
    assert report.verdict is Verdict.KEEP
    assert "no_worse_than_champion" in failed(report)
    assert report.gains["champion"] is None
    assert report.fresh_exposures == pytest.approx(fresh, abs=2)


def test_no_model_is_judged_on_a_unit_that_it_has_seen(contests: Contests) -> None:
    log, seen = contests.log.take(contests.log.unit < 500), []  # type: ignore[operator]

    def spy(examples: Examples, encoder: Encoder, *, seed: int) -> CtrModel:
        model = fit_network(examples, encoder, seed=seed)
        seen.append((set(examples.unit.tolist()), model.tables.intercept))
        return model

    made = made_of(log, fit=spy)
    assert log.unit is not None
    *folds, (everybody, intercept) = seen
    assert len(folds) == made.folds and everybody == set(log.unit.tolist())
    assert made.model.tables.intercept == intercept
    for unit in range(0, 500, 50):
        at = np.flatnonzero(log.unit == unit)
        (mine,) = (n for n, (units, _) in enumerate(folds) if unit not in units)
        network = made.networks[mine]
        logits = network.logits(Examples.of(log, network.encoder).features.take(at), log.variant[at])
        np.testing.assert_allclose(made.contest.q_logged[at], expit(logits), rtol=1e-6)


def test_every_limit_can_keep_a_model_out(contests: Contests, tmp_path: Path) -> None:
    assert failed(verdict_on(contests.good, tmp_path)) == []
    assert failed(verdict_on(contests.good, tmp_path, Limits(latency_ms=0.0))) == ["fast"]
    assert failed(verdict_on(contests.good, tmp_path, Limits(ece=-1.0))) == ["calibrated"]
    assert failed(verdict_on(contests.good, tmp_path, Limits(margin=-1.0))) == ["no_worse_than_best_single"]
    assert failed(verdict_on(contests.good, tmp_path, problems=("Propensities are none.",))) == ["log"]


def test_predictions_twice_too_high_are_kept_out(contests: Contests, tmp_path: Path) -> None:
    def boast(examples: Examples, encoder: Encoder, *, seed: int) -> CtrModel:
        model = fit_network(examples, encoder, seed=seed)
        return replace(model, tables=replace(model.tables, intercept=model.tables.intercept + 0.7))

    assert failed(verdict_on(made_of(contests.log, fit=boast), tmp_path)) == ["calibrated"]


def test_a_variant_shown_to_eager_users_is_not_taken_for_the_best(tmp_path: Path) -> None:
    """Known propensities that depend on the user: the worst variant goes to those who click anyway."""
    world, rng, rows = (
        World.draw(replace(SPEC, user_sd=1.6, tag_sd=0.15, interactions=0)),
        np.random.default_rng(2),
        8_000,
    )
    users = world.sample_users(rows, rng)
    truth = expit(world.logits(users))
    eager = truth.mean(axis=1) > np.median(truth.mean(axis=1))
    worst = int(truth.mean(axis=0).argmin())
    p = np.full((rows, world.n_variants), 1.0)
    p[:, worst] = np.where(eager, 6.0, 0.3)
    p /= p.sum(axis=1, keepdims=True)
    shown = (p.cumsum(axis=1) > rng.random((rows, 1))).argmax(axis=1)
    log = log_of(world, rows, tmp_path)
    order = log.variants["variant_id"].to_pylist()
    at = np.arange(rows)
    log = replace(
        log,
        columns=world.columns(users),
        variant=np.array([order.index(f"v_{v}") for v in shown]),
        reward=(rng.random(rows) < truth[at, shown]).astype(np.float32),
        propensity=p[at, shown],
        unit=at,
    )
    clicks = np.bincount(log.variant, log.reward) / np.bincount(log.variant)
    assert clicks.argmax() == order.index(f"v_{worst}")  # what counting clicks would have picked
    made = made_of(log)
    assert truth.mean(axis=0)[int(made.best_single["home"][2:])] > np.sort(truth.mean(axis=0))[-4]
    value = made.contest.value("uniform")
    assert value is not None and value.ci_low < truth.mean() < value.ci_high


# ── the command ──


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--json"])
    assert isinstance(stop.value.code, int)
    return stop.value.code, json.loads(capsys.readouterr().out)


def test_the_command_trains_and_refuses(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("database_url", "log_url", "log_dir", "models_dir"):
        monkeypatch.setenv(f"KALEIDOSCOPE_{name.upper()}", str(getattr(settings, name)))
    monkeypatch.setenv("KALEIDOSCOPE_BUSINESS", "acme")
    code, printed = run(capsys, "train", "shop", "--seed", "2")
    assert (code, printed["scene"], printed["seed"]) == (0, "shop", 2)
    assert printed["mlflow"]["run"] is None and "not installed" in printed["mlflow"]["problem"]
    assert registry.resolve(settings, "acme", "shop", "challenger") == printed["version"]
    for argv, message in (
        (("young",), "60 exposures"),
        ((), "SCENE, or --generic"),
        (("shop", "--generic"), "SCENE, or --generic"),
        (("shop", "--min-exposures", "5000"), "at least 5,000"),
    ):
        code, printed = run(capsys, "train", *argv)
        assert code == 2 and message in printed["error"]["message"]


def test_models_are_listed_shown_and_promoted_on_the_command_line(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = str(stage.home["version"])
    shutil.copytree(stage.folder(stage.home), tmp_path / "acme" / version)
    monkeypatch.setenv("KALEIDOSCOPE_DATABASE_URL", stage.settings.database_url)
    monkeypatch.setenv("KALEIDOSCOPE_MODELS_DIR", str(tmp_path))
    monkeypatch.setenv("KALEIDOSCOPE_BUSINESS", "acme")
    monkeypatch.setenv("KALEIDOSCOPE_USER", "pia")
    code, printed = run(capsys, "model", "list", "home")
    (item,) = printed["items"]
    assert code == 0 and (item["version"], item["verdict"], item["aliases"]) == (version, "promote", [])
    assert run(capsys, "model", "list", "shop")[1] == {"items": []}
    code, printed = run(capsys, "model", "promote", version)
    assert code == 0 and (printed["by"], printed["forced"], printed["scene"]) == ("pia", False, "home")
    code, printed = run(capsys, "model", "promote", version)
    assert code == 2 and printed["error"]["code"] == "conflict"
    code, printed = run(capsys, "model", "show", version)
    assert code == 0 and printed["aliases"] == ["champion"] and printed["gate"]["verdict"] == "promote"
    assert [change["by"] for change in printed["history"]] == ["pia"]
    with pytest.raises(SystemExit) as stop:
        main(["model", "show", version])
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert "pia made it the champion" in said and "passed  Over the best single it gains" in said
    print_lines(*trained_lines(stage.home))
    assert f"The gate lets it pass: `kaleidoscope model promote {version}`" in capsys.readouterr().out
