"""`kaleidoscope cells`: days added one by one are what one pass gives, and nothing is lost to bad input."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from attribution.cells import Cells
from attribution.streaming import stream, stream_events
from kaleidoscope.cli import main
from kaleidoscope.database import Database
from kaleidoscope.errors import InputError
from kaleidoscope.events import compact, day_files, shown_in
from kaleidoscope.log_schema import LogSchema
from kaleidoscope.settings import Settings
from tests.attribution.logs import TAGS
from tests.kaleidoscope.commands.acme import START, content_of, platform

DAY = 86_400
COLUMNS: dict[str, Any] = {
    "label": "click", "unit": ["unit"], "user": ["gender", "age"], "variant": ["tone", "style"], "bucket": "bucket",
    "time": "time",
}  # fmt: skip


def exposures(day: int, n: int = 4_000) -> pd.DataFrame:
    """A day of a random bucket and another; women click on loud three times as often as men."""
    rng = np.random.default_rng(day)
    unit, variant = rng.integers(0, n // 2, n), rng.integers(0, 6, n)
    frame = pd.DataFrame({
        "unit": [f"u{u}" for u in unit], "gender": np.where(unit % 2, "f", "m"), "age": 18 + unit % 50,
        "tone": [TAGS["tone"][v][0] for v in variant], "style": [TAGS["style"][v][0] for v in variant],
        "bucket": np.where(unit % 10 == 0, "random", "model"), "time": day * DAY + rng.integers(0, DAY, n),
    })  # fmt: skip
    rate = np.where((frame.tone == "loud") & (frame.gender == "f"), 0.3, 0.1)
    return frame.assign(click=(rng.random(n) < rate).astype(int))


@dataclass
class Shell:
    folder: Path
    capsys: pytest.CaptureFixture[str]

    def path(self, name: str) -> Path:
        return self.folder / name

    def log(self, name: str, frame: pd.DataFrame) -> Path:
        frame.to_parquet(self.path(name), index=False)
        return self.path(name)

    def run(self, *argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["cells", *map(str, argv)])
        said = self.capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    def build(self, *argv: object, schema: str = "schema.yaml") -> dict[str, Any]:
        code, out, err = self.run("build", *argv, "--schema", self.path(schema), "--json")
        assert code == 0, out + err
        return dict(json.loads(out))

    def refused(self, *argv: object, schema: str = "schema.yaml") -> str:
        code, out, _ = self.run("build", *argv, "--schema", self.path(schema), "--json")
        assert code == 2
        return str(json.loads(out)["error"]["message"])

    def show(self, *argv: object) -> dict[str, Any]:
        code, out, err = self.run("show", *argv, "--json")
        assert code == 0, out + err
        return dict(json.loads(out))


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Shell:
    (tmp_path / "schema.yaml").write_text(json.dumps(COLUMNS))
    return Shell(tmp_path, capsys)


@pytest.fixture
def built(shell: Shell) -> Path:
    out = shell.path("cells.parquet")
    shell.build(shell.log("monday.parquet", exposures(0)), "--out", out)
    return out


def test_days_added_one_by_one_are_what_one_pass_over_all_gives(shell: Shell, built: Path) -> None:
    days = [shell.path("monday.parquet"), shell.log("tuesday.parquet", exposures(1))]
    days[0].rename(shell.path("moved.parquet"))  # the old log is not read again
    added = shell.build(days[1], "--add", built, "--out", built)
    shell.path("moved.parquet").rename(days[0])
    shell.build(*days, "--out", shell.path("both.parquet"))
    found, whole = Cells.load(built), Cells.load(shell.path("both.parquet"))
    for table in ("main", "value_pairs", "tag_pairs"):
        assert np.array_equal(getattr(found, table).codes, getattr(whole, table).codes)
        assert np.array_equal(getattr(found, table).sums, getattr(whole, table).sums)
    assert added["exposures"] == 8_000 and added["logs"] == [{"log": str(days[1]), "exposures": 4_000}]
    assert added["periods"] == ["1970-01-01", "1970-01-02"] and added["shared_periods"] == []
    assert shell.show(built)["tags"] == shell.show(shell.path("both.parquet"))["tags"]


def test_a_log_whose_days_were_there_already_is_said(shell: Shell, built: Path) -> None:
    argv = [shell.path("monday.parquet"), "--add", built, "--out", shell.path("twice.parquet")]
    code, out, _ = shell.run("build", *argv, "--schema", shell.path("schema.yaml"))
    assert code == 0
    assert "1 day already (1970-01-01)" in out and "counts twice" in out and "8,000 exposures, 4,000 of them new" in out


def test_what_is_shown_is_what_was_clicked(shell: Shell, built: Path) -> None:
    frame, shown = exposures(0), shell.show(built, "--by", "bucket", "--limit", "5")
    tags = {tuple(row["tag"].items()): row for row in shown["tags"]}
    loud = frame[frame.tone == "loud"]
    row = tags[("tone", "loud"),]
    assert (row["n"], row["clicks"]) == (len(loud), loud.click.sum())
    assert row["clicked"] == pytest.approx(loud.click.mean()) and row["ctr"] == pytest.approx(row["clicked"])
    assert 0 < row["clicked_low"] < row["clicked"] < row["clicked_high"] < 1
    assert shown["exposures"] == tags[()]["n"] == len(frame) and shown["clicks"] == frame.click.sum()
    effects = {tuple(e["tag"].items()): e for e in shown["main_effects"]}
    assert effects[("tone", "loud"),]["ci_low"] > 0
    parts = {part["name"]: part["tags"] for part in shown["by"]["parts"]}
    for bucket, rows in frame.groupby("bucket"):
        assert parts[bucket][0]["tag"] == {} and parts[bucket][0]["clicks"] == rows.click.sum()
    strongest = shown["preferences"][0]
    assert strongest["segment"].keys() == {"gender"} and strongest["tag"] == {"tone": "loud"}
    assert not strongest["ci_low"] <= 1 <= strongest["ci_high"]
    chosen = (frame.gender == strongest["segment"]["gender"]) & (frame.tone == "loud")
    assert strongest["n"] == chosen.sum() and len(shown["preferences"]) == 5 < shown["preferences_known"]


def test_preferences_are_those_of_the_cells(shell: Shell, built: Path) -> None:
    cells = Cells.load(built)
    for found in shell.show(built, "--limit", "1000")["preferences"]:
        (field, label), (tag,) = *found["segment"].items(), found["tag"].items()
        of = next(f for f in cells.definitions.fields if f.name == field)
        segment = next(s for s in of.segments if s.label == label)
        values = np.array([cells.values.index((field, of.labels[v])) for v in segment.values])
        assert found["preference"] == pytest.approx(cells.preference(values)[cells.tags.index((tag,))])


def test_people_are_told_that_it_describes(shell: Shell, built: Path) -> None:
    code, out, _ = shell.run("show", built, "--by", "period")
    assert code == 0
    for said in ("4,000", "1970-01-01", "tone=loud", "gender=f", "64 of 64", "Insights need `kaleidoscope attribute`"):
        assert said in out


def test_a_tag_that_all_carry_is_no_preference(shell: Shell) -> None:
    out = shell.path("cells.parquet")
    shell.build(shell.log("log.parquet", exposures(0).assign(style="flat")), "--out", out)
    found = shell.show(out, "--limit", "1000")
    assert {"style": "flat"} in [row["tag"] for row in found["tags"]]
    assert all("style" not in row["tag"] for row in (*found["preferences"], *found["main_effects"]))


def test_few_units_are_said_and_what_cannot_be_known_is_null(shell: Shell) -> None:
    frame = exposures(0, 600)
    frame = frame.assign(unit="u" + (frame.index % 5).astype(str), click=(frame["style"] == "flat").astype(int))
    out = shell.path("cells.parquet")
    shell.build(shell.log("log.parquet", frame), "--out", out)
    found = shell.show(out)
    real = next(row for row in found["tags"] if row["tag"] == {"style": "real"})
    assert real["clicked"] == 0 and real["clicked_low"] is None
    assert found["replicates"] <= 5 and "too short" in found["notes"][0]


def test_without_time_buckets_and_pairs(shell: Shell) -> None:
    plain = {key: value for key, value in COLUMNS.items() if key not in ("time", "bucket")}
    shell.path("plain.yaml").write_text(json.dumps(plain))
    out = shell.path("cells.parquet")
    shell.build(shell.log("log.parquet", exposures(0)), "--out", out, "--no-pairs", schema="plain.yaml")
    found = shell.show(out, "--by", "period")
    assert found["periods"] == found["buckets"] == [None] and not found["definitions"]["pairs"]
    assert [part["name"] for part in found["by"]["parts"]] == [None]
    assert shell.run("show", out, "--by", "bucket")[0] == 0


def test_other_periods_are_asked_for_once(shell: Shell, built: Path) -> None:
    log, weeks = shell.path("monday.parquet"), shell.path("weeks.parquet")
    assert shell.build(log, "--out", weeks, "--period", "week")["periods"] == ["1969-12-29"]
    nowhen = shell.build(log, "--out", shell.path("x.parquet"), "--period", "none")
    assert nowhen["periods"] == [None] and nowhen["definitions"]["period"] is None
    again = shell.build(log, "--out", weeks, "--add", weeks)
    assert again["definitions"]["period"] == "week" and again["exposures"] == 8_000
    assert "periods of" in shell.refused(log, "--out", weeks, "--add", weeks, "--period", "day")
    assert "sums of pairs" in shell.refused(log, "--out", weeks, "--add", weeks, "--no-pairs")


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_that_is_there_is_kept(shell: Shell, built: Path) -> None:
    before, log = built.read_bytes(), shell.path("monday.parquet")
    assert f"--add {built}" in shell.refused(log, "--out", built)
    other = shell.path("other.parquet")
    other.write_bytes(before)
    assert "is there already" in shell.refused(log, "--out", other, "--add", built)
    assert "is the log" in shell.refused(log, "--out", log, "--overwrite")
    assert built.read_bytes() == other.read_bytes() == before
    assert shell.build(log, "--out", other, "--add", built, "--overwrite")["exposures"] == 8_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"age": "old"}, "'age' holds text, and the bins .* are of numbers"),
        ({"gender": 1}, "'gender' holds numbers, and the bins .* are of text"),
        ({"click": 2}, "label is not 0 or 1"),
    ],
)
def test_a_log_that_does_not_fit_leaves_the_earlier_cells(
    shell: Shell, built: Path, change: dict[str, Any], message: str
) -> None:
    before = built.read_bytes()
    log = shell.log("tuesday.parquet", exposures(1).assign(**change))
    with pytest.raises(AssertionError, match=message):
        shell.build(log, "--out", built, "--add", built)
    assert built.read_bytes() == before
    assert sorted(p.name for p in shell.folder.iterdir() if "cells" in p.name) == ["cells.parquet"]


def test_another_schema_is_refused(shell: Shell, built: Path) -> None:
    log = shell.path("monday.parquet")
    for change, message in (
        ({"user": ["gender"]}, "are not those of the definitions"),
        ({"variant": ["tone", "colour"]}, "'colour'"),
        ({"user": ["gender", "age"], "lable": "click"}, "unknown key `lable`"),
    ):
        shell.path("other.yaml").write_text(json.dumps(COLUMNS | change))
        said = shell.refused(log, "--out", shell.path("new.parquet"), "--add", built, schema="other.yaml")
        assert message in said
    assert not shell.path("new.parquet").exists()


def test_a_number_that_cells_are_parted_by_must_be_in_the_schema(shell: Shell) -> None:
    shell.path("parted.yaml").write_text(json.dumps(COLUMNS | {"user": ["gender"], "context": ["age"]}))
    log, out = shell.log("log.parquet", exposures(0)), shell.path("cells.parquet")
    shell.build(log, "--out", out, schema="parted.yaml")
    shell.path("other.yaml").write_text(json.dumps(COLUMNS | {"user": ["gender"]}))
    assert "lacks ['age'] in `context`" in shell.refused(log, "--out", out, "--add", out, schema="other.yaml")


def test_a_damaged_file_is_refused(shell: Shell, built: Path) -> None:
    whole, log, damaged = built.read_bytes(), shell.path("monday.parquet"), shell.path("damaged.parquet")
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF
    described = pq.read_table(built).replace_schema_metadata({b"kaleidoscope.cells": b'{"version": 1}'})
    pq.write_table(described, shell.path("undescribed.parquet"))
    undescribed = shell.path("undescribed.parquet").read_bytes()
    for content, message in (
        (whole[: len(whole) // 2], "cannot be read"),
        (bytes(flipped), "cannot be read"),
        (b"not Parquet at all", "cannot be read"),
        (log.read_bytes(), "holds no cells"),
        (undescribed, "is damaged"),
    ):
        damaged.write_bytes(content)
        code, out, _ = shell.run("show", damaged, "--json")
        assert code == 2 and message in json.loads(out)["error"]["message"]
        assert message in shell.refused(log, "--out", shell.path("new.parquet"), "--add", damaged)
        assert damaged.read_bytes() == content


def test_cells_that_cannot_be_written_leave_nothing(shell: Shell, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = built.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, out, _ = shell.run(
        "build", shell.path("monday.parquet"), "--add", built, "--out", built, "--schema", shell.path("schema.yaml"),
        "--json",
    )  # fmt: skip
    assert code == 1 and "No space left" in json.loads(out)["error"]["message"]
    assert built.read_bytes() == before
    assert sorted(p.name for p in shell.folder.iterdir() if "cells" in p.name) == ["cells.parquet"]


def test_what_is_built_is_what_the_library_sums_up(shell: Shell, built: Path) -> None:
    expected = stream(shell.path("monday.parquet"), LogSchema(**COLUMNS))
    assert np.array_equal(Cells.load(built).sums, expected.sums)


# ── a scene ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def platform_there(shell: Shell, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Scene `home`, of which four days of ten are compacted."""
    settings = platform(shell.folder, sqlite_template)
    for name in ("database_url", "log_url", "log_dir", "business"):
        monkeypatch.setenv(f"KALEIDOSCOPE_{name.upper()}", str(getattr(settings, name) or "acme"))
    close(settings, 4)
    return settings


def close(settings: Settings, days: int) -> None:
    """Compact these days of the scene's."""
    with Database(settings.log_url) as database:
        compact(
            database, settings.log_dir, business="acme", now=START + timedelta(days=days + 8),
            describe=lambda scene, number: shown_in(content_of(scene)),
        )  # fmt: skip
        assert len(day_files(database, settings.log_dir, business="acme", scene="home")) == days


def scene(shell: Shell, *argv: object) -> dict[str, Any]:
    code, out, err = shell.run("build", "home", *argv, "--json")
    assert code == 0, out + err
    return dict(json.loads(out))


def assert_same(a: Cells, b: Cells) -> None:
    assert a.days == b.days and (a.strata, a.periods, a.tags) == (b.strata, b.periods, b.tags)
    for table in ("main", "value_pairs", "tag_pairs"):
        assert np.array_equal(getattr(a, table).codes, getattr(b, table).codes)
        assert getattr(a, table).sums == pytest.approx(getattr(b, table).sums)


def test_a_scenes_new_days_are_added_without_reading_the_old_ones(shell: Shell, platform_there: Settings) -> None:
    out, folder = shell.path("cells.parquet"), platform_there.log_dir / "acme" / "scene=home"
    first = scene(shell, "--out", out)
    assert first["logs"][0]["days"] == [f"2030-01-1{i}" for i in range(4)] and first["exposures"] == 2_400
    close(platform_there, 7)
    kept = {path: path.read_bytes() for path in folder.rglob("*.parquet")}
    for path in kept:
        if path.parent.name <= "day=2030-01-13":
            path.write_bytes(b"PAR1 nothing of a file PAR1")
    added = scene(shell, "--add", out, "--out", out)
    for path, content in kept.items():
        path.write_bytes(content)
    (log,) = added["logs"]
    assert log == {"log": "acme/home", "days": ["2030-01-14", "2030-01-15", "2030-01-16"], "known_days": 4,
                   "exposures": 1_800}  # fmt: skip
    assert added["exposures"] == 4_200
    whole = replace(
        stream_events(folder, Cells.load(out).definitions), days=tuple(f"acme/home/2030-01-1{i}" for i in range(7))
    )
    assert_same(Cells.load(out), whole)


def test_a_day_is_never_added_twice(shell: Shell, platform_there: Settings) -> None:
    out = shell.path("cells.parquet")
    scene(shell, "--out", out)
    before = Cells.load(out)
    code, said, _ = shell.run("build", "home", "--add", out, "--out", out)
    assert code == 0 and "No day of acme/home is new. 4 were in the cells already." in said
    assert_same(Cells.load(out), before)
    with pytest.raises(InputError, match=r"acme/home/2030-01-10, acme/home/2030-01-11, acme/home/2030-01-12, … are in"):
        _ = before + before


def test_days_are_chosen_and_those_in_between_added_later(shell: Shell, platform_there: Settings) -> None:
    out, all_of_it = shell.path("cells.parquet"), shell.path("all.parquet")
    chosen = scene(shell, "--out", out, "--from", "2030-01-11", "--until", "2030-01-13")
    assert chosen["logs"][0]["days"] == ["2030-01-11", "2030-01-12"] and chosen["periods"] == [
        "2030-01-11",
        "2030-01-12",
    ]
    code, said, _ = shell.run("build", "home", "--add", out, "--out", all_of_it)
    assert code == 0 and "2 new days of acme/home: 2030-01-10 – 2030-01-13. 2 were in the cells already." in said
    assert "counts twice" not in said
    assert Cells.load(all_of_it).table("n")[0, 0] == 2_400 and len(Cells.load(all_of_it).days) == 4


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["home", "--from", "2030-02-01"], "scene 'home': no day in this period is compacted"),
        (["home", "--from", "2030-01-11T12:00"], "--from: 2030-01-11T12:00:00+00:00 is within a day (UTC)"),
        (["home", "shop"], "say what the columns of home mean"),
        (["elsewhere"], "elsewhere"),
        (["home", "--schema", "schema.yaml"], "home: there is no such file or folder. Without --schema it would be a"),
        (["schema.yaml", "--schema", "schema.yaml", "--from", "2030-01-11"], "--from and --until are for scenes"),
        (["schema.yaml"], "--schema SCHEMA.yaml"),
    ],
)
def test_what_cannot_be_summed_up_of_a_scene_is_said(
    shell: Shell, platform_there: Settings, monkeypatch: pytest.MonkeyPatch, argv: list[str], says: str
) -> None:
    monkeypatch.chdir(shell.folder)
    code, out, _ = shell.run("build", *argv, "--out", "cells.parquet", "--json")
    assert code in (1, 2) and says in json.loads(out)["error"]["message"]
    assert not shell.path("cells.parquet").exists()


def test_a_scene_without_compacted_days_says_what_compacts_them(
    shell: Shell, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = platform(shell.folder, sqlite_template)
    for name in ("database_url", "log_url", "log_dir"):
        monkeypatch.setenv(f"KALEIDOSCOPE_{name.upper()}", str(getattr(settings, name)))
    code, out, _ = shell.run("build", "home", "--business", "acme", "--out", shell.path("cells.parquet"), "--json")
    assert code == 2 and "`kaleidoscope events compact` does that" in json.loads(out)["error"]["message"]
