"""`kaleidoscope attribute`: what is written of a log and of a scene, and what is refused with nothing written."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.special import expit

from kaleidoscope.access import operator
from kaleidoscope.cli import main
from kaleidoscope.commands.attribute import attribute_log, attribute_scene, csv_text, said
from kaleidoscope.database import Database
from kaleidoscope.encoding import Encoder
from kaleidoscope.errors import InputError, JobError, LogError, NotFoundError
from kaleidoscope.log import Log, read_log
from kaleidoscope.log_schema import read_schema
from kaleidoscope.portraits import latest_portrait, portrait_of
from kaleidoscope.progress import Silent
from kaleidoscope.settings import Settings
from tests.kaleidoscope.commands.acme import SCENES, platform

FILES = [
    "agreement.csv", "grid.csv", "insights.csv", "main_effects.csv", "portrait.csv", "report.html", "summary.json",
    "variants.csv",
]  # fmt: skip
SCRIPT = "<script>alert(1)</script>"


def write_log(folder: Path, n: int = 6_000, **schema: Any) -> tuple[Path, Path]:
    """A log in which women like loud, buckets and all, and of whose cities one is a formula and one a script."""
    rng = np.random.default_rng(3)
    gender, tone = rng.integers(0, 2, n), rng.integers(0, 3, n)
    click = rng.random(n) < expit(-2 + 0.9 * (gender == 0) * (tone == 1))
    table = pa.table(
        {
            "click": click.astype(np.int8),
            "user": np.arange(n),
            "gender": np.array(["f", "m"])[gender],
            "city": np.array(["=1+1", SCRIPT, "Ulm"])[rng.integers(0, 3, n)],
            "tone": np.array(["calm", "loud", "plain"])[tone],
            "style": np.array(["flat", "real"])[rng.integers(0, 2, n)],
            "bucket": np.array(["random", "control"])[(rng.random(n) < 0.2).astype(int)],
        }
    )
    pq.write_table(table, folder / "log.parquet")
    document = {"label": "click", "unit": "user", "user": ["gender", "city"], "variant": ["tone", "style"]}
    document |= {"bucket": "bucket"} | schema
    (folder / "schema.yaml").write_text(yaml.safe_dump(document))
    return folder / "log.parquet", folder / "schema.yaml"


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))


def test_a_log_gives_a_report_a_summary_and_tables(tmp_path: Path) -> None:
    log, schema = write_log(tmp_path)
    out = tmp_path / "report"
    summary = attribute_log(log, schema, out, seed=0, progress=Silent(), simulated=True)
    assert sorted(path.name for path in out.iterdir()) == FILES
    kept = json.loads((out / "summary.json").read_text())
    assert kept == json.loads(json.dumps(summary))
    assert (
        kept["simulated"] is True and kept["exposures"] == 6_000 and kept["shown"]["style"].keys() == {"flat", "real"}
    )
    (insight,) = kept["insights"]
    assert insight["segment"] in ({"gender": "f"}, {"gender": "m"}) and insight["tag"] == {"tone": "loud"}
    assert (insight["effect"] > 0) == (insight["segment"] == {"gender": "f"}) and insight["q_value"] <= 0.05
    assert kept["agreement"][0]["consensus"] and "statistics" in kept["agreement"][0]["found_by"]
    assert set(kept["methods"]) | set(kept["not_done"]) == {
        "statistics", "ebm", "grid", "preference", "contributions", "network",
    }  # fmt: skip
    assert kept["not_done"]["network"] == "No model was given."
    page = (out / "report.html").read_text()
    assert SCRIPT not in page and "gender" in page
    rows = rows_of(out / "insights.csv")
    assert {row["method"] for row in rows} >= {"statistics", "preference"}
    first = rows[0]
    assert first["crossed"] == "False" and first["tested_by"] == "statistics" and " × tone=" in first["explained_by"]
    assert float(first["ctr"]) == pytest.approx(int(first["clicks"]) / int(first["n"]), rel=1e-4)
    preference = next(row for row in rows if row["method"] == "preference")
    assert (float(preference["importance"]) > 0) == (float(preference["effect"]) > 0)
    portrait = rows_of(out / "portrait.csv")
    assert {"city==1+1", f"city={SCRIPT}", "gender=f"} <= {row["segment"] for row in portrait}


def test_where_methods_agree_is_a_table_and_what_models_say_is_in_numbers(tmp_path: Path) -> None:
    log, schema = write_log(tmp_path)
    kept = json.loads(json.dumps(attribute_log(log, schema, tmp_path / "out", seed=0, progress=Silent())))
    agreed, rows = kept["agreement"], rows_of(tmp_path / "out" / "agreement.csv")
    assert len(rows) == len(agreed) > 0
    for one, row in zip(agreed, rows, strict=True):
        assert row["sentence"] == one["sentence"] and row["consensus"] == str(one["consensus"])
        assert row["found_by"].split(", ") == [f"{m}={'+' if s > 0 else '-'}" for m, s in one["found_by"].items()]
        assert row["not_found_by"].split(", ") == (one["not_found_by"] or [""])
        assert float(row["effect"]) == pytest.approx(one["insight"]["effect"], rel=1e-4)
    models = kept["models"]
    assert models["network"] is models["network_ebm"] is None  # no model was given
    assert 0.5 < models["ebm"]["auc"] < 1 and 0.5 < models["contributions"]["auc"] < 1
    assert models["contributions"]["pairs"][0].keys() == {"field", "dimension", "mean_size"}
    shape = next(shape for shape in models["ebm"]["shapes"] if shape["name"] == "tone")
    assert {value["value"] for value in shape["values"]} == {"calm", "loud", "plain"}
    assert all(value["low"] <= value["logit"] <= value["high"] for value in shape["values"])
    heat = models["ebm"]["heat_maps"][0]
    assert (heat["field"], heat["dimension"]) == ("gender", "tone")
    at = heat["rows"].index("f"), heat["columns"].index("loud")
    assert heat["logit"][at[0]][at[1]] > 0
    assert [kept["methods"][m]["own_test"] for m in ("statistics", "ebm")] == [True, True]
    assert kept["methods"]["ebm"]["tested_by"] == "statistics, on the other half of the units"


def test_a_model_that_learned_the_opposite_is_told_in_every_file(tmp_path: Path) -> None:
    """The log of a world where women dislike loud, learned from, beside one in which they like it."""
    log, schema = write_log(tmp_path, n=12_000)
    other = tmp_path / "other"
    other.mkdir()
    turned = pq.read_table(log).to_pandas()
    turned["gender"] = turned["gender"].map({"f": "m", "m": "f"})
    turned.to_parquet(other / "log.parquet")
    ranker = trained_on(read_log(other / "log.parquet", read_schema(schema)), tmp_path / "model")
    out = tmp_path / "out"
    kept = json.loads(json.dumps(attribute_log(log, schema, out, model=ranker, seed=0, progress=Silent())))
    (first,) = (one for one in kept["agreement"] if one["insight"]["segment"].keys() == {"gender"})
    sign = first["found_by"]["statistics"]
    assert first["found_by"]["network"] == -sign and first["disagree"] and first["consensus"]
    assert "the network's terms say the opposite" in first["sentence"]
    assert kept["methods"]["network"]["own_test"] is False
    assert kept["methods"]["network"]["tested_by"] == "statistics, not by the network"
    row = next(row for row in rows_of(out / "insights.csv") if row["method"] == "network")
    assert row["tested_by"] == "statistics, not by the network" and float(row["importance"]) * float(row["effect"]) < 0
    assert f"network={'-' if sign > 0 else '+'}" in rows_of(out / "agreement.csv")[0]["found_by"]
    assert "⚠ the network says the opposite" in (out / "report.html").read_text()
    fidelity = kept["models"]["network_ebm"]["fidelity"]
    assert 0 < fidelity["r2_main"] < fidelity["r2"] <= 1 and kept["models"]["network"]["auc"] is None


def trained_on(log: Log, folder: Path) -> Path:
    """The folder of a network that learned from this log: its tables, without a deep part."""
    from models.batch import Examples
    from models.export import export_model
    from models.networks import DeepConfig, DeepPart
    from models.tables import fit_tables
    from models.train import CtrModel

    dimensions = log.schema.variant
    encoder = Encoder.fit(log.columns, user=log.schema.user, context=(), variants=log.variants, dimensions=dimensions)
    tables = fit_tables(Examples.of(log, encoder), encoder)
    deep = DeepPart(DeepConfig(tables.layout.n_crossed, tables.layout.crossed_tags.shape[1], 4, 8, 2))
    model, at = CtrModel(tables, deep, 0.0), datetime(2026, 1, 1, tzinfo=UTC)
    export_model(model, folder, version="1", variants=log.variants, log_hash="x", seed=1, created_at=at)
    return folder


def test_the_control_bucket_says_nothing_of_preferences(tmp_path: Path) -> None:
    log, schema = write_log(tmp_path)
    kept = attribute_log(log, schema, tmp_path / "report", seed=0, progress=Silent())
    rows = rows_of(tmp_path / "report" / "portrait.csv")
    shown = sum(int(row["n"]) for row in rows if row["segment"] in ("gender=f", "gender=m") and "style" in row["tag"])
    assert shown == kept["buckets"]["random"]  # type: ignore[index]


@pytest.mark.parametrize("typed", ["＝1+1", " =1+1", "\n=1+1", "\x1b[2J=1+1"])
def test_formulas_in_disguise_are_text_on_one_line(typed: str) -> None:
    _, line = csv_text(("a",), [{"a": typed}]).splitlines()
    assert not line.startswith(("=", "＝", " ", "\x1b"))


def test_what_a_spreadsheet_would_run_is_text() -> None:
    text = csv_text(("a", "b"), [{"a": "=1+1", "b": 0.1234567}, {"a": "-x", "b": None}, {"a": "1,5", "b": 3}])
    assert text == "a,b\n'=1+1,0.123457\n'-x,\n\"1,5\",3\n"


def test_what_cannot_be_attributed_is_refused_and_nothing_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 4_000
    gender = rng.integers(0, 2, n)
    tone = (rng.random(n) < np.where(gender == 0, 0.9, 0.1)).astype(int)
    table = {"click": rng.integers(0, 2, n), "gender": np.array(["f", "m"])[gender], "tone": np.array(["a", "b"])[tone]}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump({"label": "click", "user": ["gender"], "variant": ["tone"]}))
    with pytest.raises(LogError, match="no propensities"):
        attribute_log(
            tmp_path / "log.parquet", tmp_path / "schema.yaml", tmp_path / "new" / "out", seed=0, progress=Silent()
        )
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()  # what was there stays
    with pytest.raises(LogError, match="no propensities"):
        attribute_log(tmp_path / "log.parquet", tmp_path / "schema.yaml", tmp_path / "there", seed=0, progress=Silent())
    assert list((tmp_path / "there").iterdir()) == []


def test_tables_are_utf_8_to_spreadsheets_too(tmp_path: Path) -> None:
    log, schema = write_log(tmp_path, n=1_500)
    attribute_log(log, schema, tmp_path / "out", seed=0, progress=Silent())
    tables = list((tmp_path / "out").glob("*.csv"))
    assert len(tables) == 6 and all(table.read_bytes().startswith(b"\xef\xbb\xbf") for table in tables)
    assert not (tmp_path / "out" / "summary.json").read_bytes().startswith(b"\xef")


def test_a_log_without_user_fields_says_what_was_not_done(tmp_path: Path) -> None:
    log, schema = write_log(tmp_path, n=2_000, user=[])
    kept = attribute_log(log, schema, tmp_path / "report", seed=0, progress=Silent())
    assert kept["insights"] == [] and len(kept["main_effects"]) > 0  # type: ignore[arg-type]
    assert "no user fields" in kept["not_done"]["ebm"]  # type: ignore[index]
    lines = said(kept)
    assert lines[0] == "Without user fields nobody's preferences can be told apart, only what everybody takes."
    assert sum("not done" in line for line in lines) == 1
    assert lines[-1].startswith("preference, ebm, grid, contributions, network: not done. The log names no user fields")


def summary(**changed: Any) -> dict[str, Any]:
    """A summary as `said` reads it, in which nothing was found."""
    nothing: dict[str, Any] = {
        "user": ["gender"], "examined": 40, "too_few": 2, "insights": [], "agreement": [], "main_effects": [],
        "not_done": {}, "checks": [],
    }  # fmt: skip
    return nothing | changed


def test_what_is_wrong_with_the_log_is_said_errors_first() -> None:
    checks = [{"level": "warning", "code": "w", "message": f"Odd {i}."} for i in range(7)]
    checks += [{"level": "error", "code": "e", "message": "Wrong."}, {"level": "info", "code": "i", "message": "Note."}]
    lines = said(summary(checks=checks, not_done={"network": "No model."}))
    assert lines[0] == "ERROR in the log: Wrong." and lines[1].startswith("No preference was found")
    assert lines[-7:-1] == [
        *(f"Warning: Odd {i}." for i in range(5)),
        "2 more warnings about the log are in the report.",
    ]
    assert "Note." not in " ".join(lines)
    assert "1 more warning about the log is in the report." in said(summary(checks=checks[:6]))


def effect(tag: dict[str, str], effect: float, q_value: float) -> dict[str, Any]:
    low, high = sorted((effect * 0.8, effect * 1.2))
    return {"tag": tag, "effect": effect, "ci_low": low, "ci_high": high, "q_value": q_value, "n": 900}


def test_where_no_preference_was_found_the_surest_tag_of_each_dimension_is_said() -> None:
    effects = [
        effect({"tone": "calm"}, -0.1, 0.01), effect({"tone": "loud"}, 0.3, 0.001),
        effect({"style": "flat"}, 0.2, 0.04), effect({"size": "big"}, 0.9, 0.06),
    ]  # fmt: skip
    lines = said(summary(main_effects=effects))
    assert lines[0].startswith("No preference was found, which is not that there is none")
    assert lines[1] == "What everybody takes, each tag by itself, not adjusted for those shown together with it:"
    assert [line.split(":")[0] for line in lines[2:]] == [
        "tone=loud",
        "style=flat",
        "1 more such tag is in the report.",
    ]
    assert "30 % higher than that of what was shown in its place" in lines[2]
    assert not any("not adjusted" in line for line in lines[2:])  # the line above them says so
    assert said(summary())[1:] == [
        "Over all users, no tag by itself makes a difference that is surely more than chance."
    ]


def test_where_no_pair_could_be_looked_at_nothing_is_said_to_be_absent() -> None:
    few, none = said(summary(examined=0, too_few=80))[0], said(summary(examined=0, too_few=0))[0]
    assert few.startswith("Too few exposures to find anything: none of the 80 segment × tag pairs")
    assert none == "No preference was found: there was no segment × tag pair to look at."


def test_crossings_are_said_and_counted_among_those_that_are_not_listed() -> None:
    agreed = [
        {"consensus": True, "insight": {"crossed": False}, "sentence": "Found by the statistics alone."},
        {"consensus": True, "insight": {"crossed": True}, "sentence": "Found by the grid alone."},
        {"consensus": False, "insight": {"crossed": False}, "sentence": "Found by the EBM alone."},
    ]
    found = summary(agreement=agreed, insights=[{"sentence": "One."}, {"sentence": "Both."}])
    assert said(found) == ["One. Found by the statistics alone.", "Both. Found by the grid alone."]
    assert said(found, most=1)[1] == "1 more is in the report, 1 of them of two user fields or two tags at once."
    crossed = summary(agreement=agreed[1:2], insights=[{"sentence": "Both."}])
    assert said(crossed) == ["Both. Found by the grid alone."]


def test_methods_that_lack_the_same_are_said_in_one_line() -> None:
    lines = said(summary(not_done={"ebm": "Too few.", "network": "No model.", "grid": "Too few."}))
    assert lines[-2:] == ["ebm, grid: not done. Too few.", "network: not done. No model."]


def test_another_bucket_can_be_control(tmp_path: Path) -> None:
    log, schema = write_log(tmp_path)
    table = pq.read_table(log)
    names = pa.array([{"control": "A"}.get(name, "B") for name in table["bucket"].to_pylist()])
    pq.write_table(table.set_column(table.column_names.index("bucket"), "bucket", names), log)
    words = ["attribute", str(log), "--schema", str(schema), "--out", str(tmp_path / "out"), "--json"]
    with pytest.raises(SystemExit) as done:
        main([*words, "--control", "A"])
    assert done.value.code == 0
    kept = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [lift["bucket"] for lift in kept["effectiveness"]["other_causes"]["lifts"]] == ["B"]
    shown = [int(row["n"]) for row in rows_of(tmp_path / "out" / "portrait.csv") if "style" in row["tag"]
             and row["segment"].startswith("gender")]  # fmt: skip
    assert sum(shown) == kept["buckets"]["B"]


@pytest.mark.parametrize(("shares", "flagged"), [("control=.2,random=.8", False), ("control=.3,random=.7", True)])
def test_a_log_is_held_against_the_designed_shares(tmp_path: Path, shares: str, flagged: bool) -> None:
    log, schema = write_log(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as done:
        main(["attribute", str(log), "--schema", str(schema), "--out", str(out), "--shares", shares, "--json"])
    assert done.value.code == 0
    other = json.loads((out / "summary.json").read_text())["effectiveness"]["other_causes"]
    assert other["sample_ratio"]["flagged"] is flagged and "sample_ratio" not in other["missing"]
    assert ("as designed" in other["reason"]) is flagged


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("LOG --out OUT", "--schema SCHEMA.yaml"),
        ("LOG --schema SCHEMA", "--out, the folder for the report, is needed"),
        ("LOG --schema SCHEMA --out OUT --from 2026-01-01", "--from and --until are for scenes"),
        ("home", "name the business"),
        ("home --control A", "--control is for logs"),
        ("home --shares random=1", "--shares is for logs. Those of a scene are in its releases."),
        ("LOG --schema SCHEMA --out OUT --shares random=.7,control=.2", "they sum to 0.9, not to 1"),
        ("LOG --schema SCHEMA --out OUT --model nowhere", "no exported model there"),
        ("nowhere.parquet --schema SCHEMA --out OUT", "nowhere.parquet"),
        (
            "LOG --schema SCHEMA --out OUT --control Z",
            "--control 'Z': the log has no such bucket. It has: control, random",
        ),
    ],
)
def test_the_command_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    log, schema = write_log(tmp_path, n=100)
    monkeypatch.chdir(tmp_path)
    words = line.replace("LOG", str(log)).replace("SCHEMA", str(schema)).replace("OUT", "out").split()
    with pytest.raises(SystemExit) as stop:
        main(["attribute", *words])
    assert stop.value.code and says in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


# ── a scene ──


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Iterator[Settings]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        yield platform(tmp_path_factory.mktemp("acme"), sqlite_template)


def test_a_scene_keeps_its_portrait(settings: Settings, tmp_path: Path) -> None:
    def attribute() -> dict[str, Any]:
        return attribute_scene(
            settings, business="acme", scene="home", out_dir=tmp_path, seed=1, progress=Silent(), simulated=True
        )

    summary = attribute()
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert summary["portrait"] == {"number": 1, "new": True, "cells": summary["portrait"]["cells"]}
    assert summary["exposures"] == SCENES["home"][1] and summary["insights"]
    assert summary["effectiveness"]["other_causes"]["sample_ratio"] is None  # there is one bucket
    assert attribute()["portrait"]["new"] is False  # the same log, analysed in the same way
    caller = operator("ann", "acme")
    with Database(settings.database_url) as database, database.transaction(caller, write=False) as session:
        stored = latest_portrait(session, "home")
        assert (stored.exposures, stored.taxonomy, stored.releases, stored.simulated) == (6_000, 1, [1], True)
        cells = portrait_of(session, "home", limit=500).items
    found = [cell for cell in cells if cell.segment and cell.effect is not None]
    assert [(c.segment, c.tag, c.effect) for c in found] == [
        (i["segment"], i["tag"], pytest.approx(i["effect"])) for i in summary["insights"]
    ] or {(*c.segment.items(), *c.tag.items()) for c in found} == {
        (*i["segment"].items(), *i["tag"].items()) for i in summary["insights"]
    }
    assert all(cell.clicks is not None and cell.ctr is not None for cell in cells if not cell.segment)


def test_a_scene_with_too_little_or_that_is_not_there_is_refused(settings: Settings, tmp_path: Path) -> None:
    def attribute(scene: str, **more: Any) -> None:
        attribute_scene(settings, business="acme", scene=scene, out_dir=tmp_path, seed=1, progress=Silent(), **more)

    with pytest.raises(InputError, match="60 exposures to attribute, at least 1,000 are needed"):
        attribute("young")
    with pytest.raises(NotFoundError):
        attribute("../elsewhere")
    with pytest.raises(NotFoundError):
        attribute("home", model="challenger")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    log, schema = write_log(tmp_path, n=100)
    (tmp_path / "taken").write_text("")
    with pytest.raises(JobError, match="cannot be written to"):
        attribute_log(log, schema, tmp_path / "taken", seed=0, progress=Silent())
