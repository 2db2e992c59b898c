from __future__ import annotations

import gzip
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kaleidoscope.errors import LogError
from kaleidoscope.log import Log, read_log
from kaleidoscope.log_schema import LogSchema
from kaleidoscope.vocabulary import Level


def a_frame(n: int = 400, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "who": [f"user {i}" for i in rng.integers(0, n // 4, n)],
            "age": rng.integers(18, 80, n),
            "city": rng.choice(["Rome", "Köln", "a,b", 'say "hi"'], n),
            "page": rng.choice(["home", "cart"], n),
            "image": rng.choice(["cat", "dog|cat", "dog"], n),
            "colour": rng.choice(["red", "blue"], n),
            "p": np.full(n, 1 / 6),
            "y": rng.integers(0, 2, n),
        }
    )


SCHEMA = LogSchema(
    label="y", unit="who", context=("page",), user=("age", "city"), variant=("image", "colour"), propensity="p"
)


def saved(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        frame.to_csv(path, index=False)
    return path


def codes(log: Log) -> list[str]:
    return [check.code for check in log.checks]


def content(log: Log) -> dict[str, list[Any]]:
    ids = np.array(log.variants["variant_id"].to_pylist())
    table = {name: column.to_pylist() for name, column in log.columns.items()}
    table |= {"reward": log.reward.tolist(), "count": log.count.tolist(), "variant": ids[log.variant].tolist()}
    return table | {"unit": [] if log.unit is None else log.unit.tolist()}


# ---- reading


def test_reads_values_as_they_are_in_the_log(tmp_path: Path) -> None:
    frame = a_frame()
    log = read_log(saved(frame, tmp_path / "log.parquet"), SCHEMA)
    assert len(log) == log.file_rows == log.n_exposures == 400
    assert log.columns["age"].to_pylist() == frame["age"].tolist()
    assert log.columns["city"].to_pylist() == frame["city"].tolist()
    assert log.n_units == frame["who"].nunique() and log.n_variants == 6
    assert log.positive_rate == pytest.approx(frame["y"].mean())
    assert set(log.variants["variant_id"].to_pylist()) >= {"cat|dog / red", "dog / blue"}
    assert ["cat", "dog"] in log.variants["image"].to_pylist()
    first = log.variants.slice(int(log.variant[0]), 1).to_pylist()[0]
    assert first["colour"] == [frame["colour"][0]] and first["image"] == sorted(frame["image"][0].split("|"))


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "odd [1] name's; x.csv", "folder"])
def test_every_kind_of_file_gives_the_same_log(tmp_path: Path, name: str) -> None:
    frame = a_frame()
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        saved(frame[:150], path / "a.parquet")
        saved(frame[150:], path / "b.parquet")
    else:
        saved(frame, path)
    (tmp_path / "odd 1 name's; x.csv").write_text("decoy\n1\n")  # what the brackets would match as a pattern
    expected = read_log(saved(frame, tmp_path / "log.parquet"), SCHEMA)
    read = read_log(path, SCHEMA)
    assert content(read) == content(expected)
    assert read.checks == expected.checks
    assert read.folds(5, 1)[1].tolist() == expected.folds(5, 1)[1].tolist()


def test_csv_with_semicolons_bom_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = "\n".join(f'"v;{i % 2}";{i};{i % 3 == 0}' for i in range(30))
    path.write_text("\ufefftag;n;y\n" + rows + "\n", encoding="utf-8")
    log = read_log(path, LogSchema(label="y", user=("n",), variant=("tag",)))
    assert log.variants["variant_id"].to_pylist() == ["v;0", "v;1"]
    assert log.columns["n"].type == pa.int64() and log.positive_rate == pytest.approx(1 / 3)


def test_numbers_in_csv_are_numbers_unless_they_are_codes(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "whole,real,gaps,code,mixed,late,t,y\n"
        + "".join(f"{i},{i}.5,{'NA' if i % 2 else i},00{i},{i if i else 'x'},{i},{i % 2},{i % 2}\n" for i in range(60))
    )
    names = ("whole", "real", "gaps", "code", "mixed", "late")
    columns = read_log(path, LogSchema(label="y", user=names, variant=("t",))).columns
    kinds = {name: "text" if pa.types.is_dictionary(c.type) else str(c.type) for name, c in columns.items()}
    assert kinds == dict(zip(names, ["int64", "double", "int64", "text", "text", "int64"], strict=True))
    assert columns["gaps"].null_count == 30 and columns["code"].to_pylist()[:2] == ["000", "001"]


def test_lists_and_separated_text_are_the_same_tags(tmp_path: Path) -> None:
    texts = ["a|b", "b | a", " a|", "", None, "|", "c"]
    lists = [["a", "b"], ["b", "a"], ["a"], [], None, [None], ["c", "c"]]
    y = [i % 2 for i in range(7)]
    logs = []
    for tags in (texts, lists):
        path = tmp_path / "log.parquet"
        pq.write_table(pa.table({"tag": tags, "y": y}), path)
        logs.append(read_log(path, LogSchema(label="y", variant=("tag",))))
    assert logs[0].variant.tolist() == logs[1].variant.tolist()
    assert logs[0].variants.equals(logs[1].variants)
    assert logs[0].variants["tag"].to_pylist() == [[], ["a"], ["a", "b"], ["c"]]


def test_tags_that_are_numbers_are_their_text(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"size": [1, 2] * 4, "scale": [0.5, 1.5] * 4, "bold": [True, False] * 4, "y": [0, 1, 1, 0] * 2}
    )
    log = read_log(saved(frame, tmp_path / "l.parquet"), LogSchema(label="y", variant=("size", "scale", "bold")))
    assert log.variants.to_pylist()[0] == {
        "size": ["1"],
        "scale": ["0.5"],
        "bold": ["true"],
        "variant_id": "1 / 0.5 / true",
    }


def test_ids_of_different_variants_differ(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": ["x / y", "x"], "b": ["z", "y / z"], "y": [0, 1]})
    log = read_log(saved(frame, tmp_path / "l.parquet"), LogSchema(label="y", variant=("a", "b")))
    assert len(set(log.variants["variant_id"].to_pylist())) == log.n_variants == 2


def test_aggregated_rows_become_clicks_and_the_rest(tmp_path: Path) -> None:
    frame = pd.DataFrame({"arm": ["a", "b", "c", "d"], "i": [10, 5, 3, 0], "c": [4, 0, 3, 0], "w": [1, 2, 3, 4]})
    schema = LogSchema(clicks="c", impressions="i", variant=("arm",), weight="w")
    log = read_log(saved(frame, tmp_path / "l.csv"), schema)
    assert log.reward.tolist() == [1, 0, 0, 1] and log.count.tolist() == [4, 6, 5, 3]
    assert log.file_row.tolist() == [0, 0, 1, 2]
    assert (log.weight / log.weight[0]).tolist() == pytest.approx([1, 1, 2, 3])
    assert np.average(log.weight, weights=log.count) == pytest.approx(1)
    assert (log.file_rows, log.n_exposures, log.n_units, log.aggregated) == (4, 18, 18, True)
    assert log.positive_rate == pytest.approx(7 / 18)


def test_units_may_be_several_columns_with_gaps(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"a": ["1", "1", None, None, "12"] * 2, "b": ["2", None, "2", "2", None] * 2, "t": [*"xyxyxyxyxy"]}
    )
    frame["y"] = [0, 1] * 5
    log = read_log(saved(frame, tmp_path / "l.csv"), LogSchema(label="y", unit=("a", "b"), variant=("t",)))
    assert log.unit is not None and log.n_units == 4
    assert log.unit[2] == log.unit[3] == log.unit[7] and log.unit[0] != log.unit[4]


def test_a_row_without_unit_is_a_unit_of_its_own(tmp_path: Path) -> None:
    frame = a_frame()
    frame.loc[:9, "who"] = None
    log = read_log(saved(frame, tmp_path / "l.parquet"), SCHEMA)
    assert "unit_missing" in codes(log) and log.n_units == frame["who"].nunique() + 10


def test_time_is_seconds_or_its_own_numbers(tmp_path: Path) -> None:
    frame = a_frame(20)
    frame["at"] = pd.date_range("2026-01-01", periods=20, freq="min")
    schema = SCHEMA.model_copy(update={"time": "at"})
    for name in ("l.parquet", "l.csv"):
        log = read_log(saved(frame, tmp_path / name), schema)
        assert log.time is not None and np.diff(log.time).tolist() == [60.0] * 19
    frame["at"] = ["yesterday", *frame["at"].astype(str)[1:]]
    log = read_log(saved(frame, tmp_path / "l.csv"), schema)
    assert log.time is not None and np.isnan(log.time).sum() == 1 and "time_unreadable" in codes(log)


def times_of(tmp_path: Path, times: Any, name: str = "l.csv") -> tuple[list[float], list[str]]:
    """The seconds that a column of times is read as, and what is said of it."""
    frame = a_frame(len(times)).assign(at=times, y=[0, 1] * (len(times) // 2))
    log = read_log(saved(frame, tmp_path / name), SCHEMA.model_copy(update={"time": "at"}))
    assert log.time is not None
    return log.time.tolist(), [c.message for c in log.checks if c.code.startswith("time_")]


MOMENTS = [datetime(2026, 1, 31, 23, 30, tzinfo=UTC) + timedelta(hours=h) for h in range(10)]
EPOCHS = [moment.timestamp() for moment in MOMENTS]


@pytest.mark.parametrize(
    "text",
    ["%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%d %H:%M:%S+08:00", "%Y-%m-%d %H:%M:%S Asia/Shanghai", "%Y-%m-%d %H:%M:%S+08"],
)
def test_times_keep_their_offset(tmp_path: Path, text: str) -> None:
    there = [moment.astimezone(timezone(timedelta(hours=8))) for moment in MOMENTS]
    assert times_of(tmp_path, [moment.strftime(text) for moment in there]) == (EPOCHS, [])


@pytest.mark.parametrize("text", ["%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%SZ", "%Y/%m/%d %H:%M:%S"])
def test_times_without_an_offset_are_utc(tmp_path: Path, text: str) -> None:
    assert times_of(tmp_path, [moment.strftime(text) for moment in MOMENTS]) == (EPOCHS, [])


def test_times_mean_the_same_on_every_machine(tmp_path: Path) -> None:
    at = pd.Series(MOMENTS).dt.tz_convert("Asia/Tokyo")
    frame = a_frame(10).assign(at=at, place=at, y=[0, 1] * 5)
    saved(frame, tmp_path / "l.parquet"), saved(frame.assign(at=at.dt.tz_localize(None)), tmp_path / "l.csv")
    said = [
        subprocess.run(
            [sys.executable, "-c", SAYS_TIMES, str(tmp_path)],
            env={**os.environ, "TZ": zone}, check=True, capture_output=True, text=True,
        ).stdout
        for zone in ("Asia/Shanghai", "America/New_York")
    ]  # fmt: skip
    assert said[0] == said[1] and f"{EPOCHS[0]} " in said[0] and "2026-01-31 23:30:00+00" in said[0]


SAYS_TIMES = """
import sys
from pathlib import Path
from kaleidoscope.log import read_log
from kaleidoscope.log_schema import LogSchema
schema = LogSchema(label="y", time="at", context=("place",), variant=("image",))
for name in ("l.parquet", "l.csv"):
    log = read_log(Path(sys.argv[1]) / name, schema)
    print(*log.time.tolist(), *log.columns["place"].to_pylist())
"""


@pytest.mark.parametrize("name", ["l.csv", "l.parquet"])
@pytest.mark.parametrize(("per_second", "unit"), [(10**3, "milli"), (10**6, "micro"), (10**9, "nano")])
def test_finer_units_are_told_by_their_digits_and_said(tmp_path: Path, per_second: int, unit: str, name: str) -> None:
    found, said = times_of(tmp_path, [int(at) * per_second for at in EPOCHS], name)
    assert found == EPOCHS
    assert said == [
        f"column 'at' (`time`): its numbers are read as {unit}seconds since 1970, from 2026-01-31T23:30:00+00:00 to"
        " 2026-02-01T08:30:00+00:00. If not so, write times like 2026-10-01T05:00:00Z, or as seconds since 1970."
    ]


@pytest.mark.parametrize("numbers", [EPOCHS, [9.7e8, 1.1e9] * 2, [1e8, 1e10 - 1] * 2])
def test_seconds_are_read_as_they_are_without_a_word(tmp_path: Path, numbers: list[float]) -> None:
    assert times_of(tmp_path, numbers) == (numbers, [])


@pytest.mark.parametrize("number", [7, 20261001, 202610011200, 20261001120000, 5e10, 5 * 10**16])
def test_other_numbers_are_an_order_and_said_to_be_no_dates(tmp_path: Path, number: float) -> None:
    found, (said,) = times_of(tmp_path, [number, number + number / 2**40] * 2)
    assert found[0] == number
    assert f"numbers such as {number:.15g} are no seconds" in said and "no date" in said


def test_times_written_in_several_ways_are_warned_of(tmp_path: Path) -> None:
    times = [*map(str, MOMENTS[:4]), *(str(int(at) * 1000) for at in EPOCHS[4:7]), str(EPOCHS[7]), "0", ""]
    found, said = times_of(tmp_path, times)
    assert found[:9] == [*EPOCHS[:8], 0.0] and np.isnan(found[9])
    assert "seconds since 1970 (1), milliseconds since 1970 (3), other numbers (1), dates (4). Each is read" in said[0]
    assert "no time can be read in 1 row, first data row 10 (missing)" in said[1]


@pytest.mark.parametrize(
    ("text", "ambiguous"), [("02.03.2026 17:31", True), ("03/02/2026 05:31 PM", True), ("yesterday", False)]
)
def test_an_unreadable_time_is_shown_with_its_row_and_what_to_write(tmp_path: Path, text: str, ambiguous: bool) -> None:
    _, (said,) = times_of(tmp_path, ["", str(MOMENTS[0]), text, text])
    assert "column 'at' (`time`): no time can be read in 3 rows (1 of them empty), first data row 3" in said
    assert repr(text) in said and "2026-10-01T05:00:00Z (UTC where no offset is given)" in said
    assert ("month" in said) == ambiguous


ODD = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ODD, min_size=4, max_size=4, unique_by=lambda s: s.lower()))
def test_column_names_are_only_names(tmp_path: Path, names: list[str]) -> None:
    frame = pd.DataFrame({names[0]: [*"aabb"], names[1]: [1, 2, 3, 4], names[2]: [*"uvuv"], names[3]: [0, 1, 1, 0]})
    schema = LogSchema(label=names[3], user=(names[1],), unit=(names[2],), variant=(names[0],))
    log = read_log(saved(frame, tmp_path / "log.parquet"), schema)
    assert log.columns[names[1]].to_pylist() == [1, 2, 3, 4] and log.n_variants == log.n_units == 2


def test_sql_in_names_and_values_does_not_run(tmp_path: Path) -> None:
    evil = "x\"; COPY (SELECT 1) TO '/tmp/evil.csv'; --"
    frame = pd.DataFrame({evil: ["'); DROP TABLE log; --", "b"] * 4, "y": [0, 1, 1, 0] * 2})
    for name in ("evil'; DROP VIEW log; --.csv", 'a".parquet'):
        log = read_log(saved(frame, tmp_path / name), LogSchema(label="y", variant=(evil,)))
        assert log.n_variants == 2
    assert not Path("/tmp/evil.csv").exists()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_rows_means_nothing(tmp_path: Path, seed: int) -> None:
    frame = a_frame(80)
    order = np.random.default_rng(seed).permutation(80)
    log = read_log(saved(frame, tmp_path / "a.parquet"), SCHEMA)
    shuffled = read_log(saved(frame.iloc[order], tmp_path / "b.parquet"), SCHEMA)
    assert log.unit is not None and shuffled.unit is not None
    assert log.unit[order].tolist() == shuffled.unit.tolist()
    assert log.variant[order].tolist() == shuffled.variant.tolist() and log.variants.equals(shuffled.variants)
    assert log.folds(3, 7)[1][order].tolist() == shuffled.folds(3, 7)[1].tolist()
    assert log.cells(("page", "age"))[order].tolist() == shuffled.cells(("page", "age")).tolist()
    assert log.checks == shuffled.checks
    assert content(log.take(order)) == content(shuffled)


# ---- folds, take, cells


def test_folds_keep_units_whole_and_equal_in_number(tmp_path: Path) -> None:
    log = read_log(saved(a_frame(), tmp_path / "l.parquet"), SCHEMA)
    same, fold = log.folds(5, 3)
    assert same is log and log.unit is not None
    units = pd.DataFrame({"unit": log.unit, "fold": fold}).drop_duplicates()
    assert len(units) == log.n_units and np.ptp(np.bincount(units["fold"])) <= 1
    assert log.folds(5, 3)[1].tolist() == fold.tolist() != log.folds(5, 4)[1].tolist()


def test_folds_without_units_split_counts(tmp_path: Path) -> None:
    frame = pd.DataFrame({"arm": [*"abab"], "i": [1000, 900, 800, 1], "c": [10, 500, 1, 1]})
    log = read_log(saved(frame, tmp_path / "l.csv"), LogSchema(clicks="c", impressions="i", variant=("arm",)))
    split, fold = log.folds(4, 0)
    assert len(split) == len(fold) > len(log)
    assert np.bincount(split.file_row, split.count).tolist() == [1000, 900, 800, 1]
    assert np.bincount(fold, split.count) == pytest.approx(675.25, rel=0.2)
    assert float((split.reward * split.count).sum()) == 512


def test_take_numbers_units_anew_and_keeps_variants(tmp_path: Path) -> None:
    log = read_log(saved(a_frame(), tmp_path / "l.parquet"), SCHEMA)
    part = log.take(log.variant == 2)
    assert part.n_variants == log.n_variants and set(part.variant.tolist()) == {2}
    assert part.unit is not None and part.n_units == len(np.unique(part.unit)) < log.n_units


def test_cells_are_combinations_within_the_group(tmp_path: Path) -> None:
    frame = a_frame()
    frame["test"] = np.arange(400) % 2
    frame["hour"] = np.linspace(0, 24, 400)
    schema = SCHEMA.model_copy(update={"group": "test", "context": ("page", "hour")})
    log = read_log(saved(frame, tmp_path / "l.parquet"), schema)
    assert log.cells(()).max() + 1 == 2 and log.cells(("page",)).max() + 1 == 4
    assert log.cells(("page", "hour")).max() + 1 == 32


# ---- errors


def breaks(frame: pd.DataFrame, tmp_path: Path, schema: LogSchema = SCHEMA, name: str = "log.parquet") -> str:
    path = saved(frame, tmp_path / name)
    with pytest.raises(LogError) as error:
        read_log(path, schema)
    assert all(str(path) in line for line in error.value.message.splitlines())
    return error.value.message


def test_missing_columns_are_all_named_with_the_nearest(tmp_path: Path) -> None:
    message = breaks(a_frame().rename(columns={"age": "Age_", "page": "pages"}), tmp_path)
    assert "column 'age' (schema key `user`) is missing" in message and "'Age_'" in message
    assert "column 'page'" in message and "'pages'" in message


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_labels_that_are_not_0_or_1(tmp_path: Path, name: str) -> None:
    frame = a_frame()
    frame["y"] = frame["y"].astype(float)
    frame.loc[[3, 9], "y"] = [2, np.nan]
    message = breaks(frame, tmp_path, name=name)
    assert "column 'y': label is not 0 or 1 in 2 rows, first data row 4" in message


def test_labels_may_be_true_and_false(tmp_path: Path) -> None:
    frame = a_frame()
    expected = frame["y"].mean()
    frame["y"] = frame["y"] == 1
    for name in ("l.parquet", "l.csv"):
        assert read_log(saved(frame, tmp_path / name), SCHEMA).positive_rate == pytest.approx(expected)


def test_text_labels_show_the_text(tmp_path: Path) -> None:
    frame = a_frame()
    frame["y"] = frame["y"].map({0: "no", 1: "1"})
    assert "('no')" in breaks(frame, tmp_path)


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    frame = a_frame().assign(y=1, image="cat", colour="red", w=-1.0)
    frame.loc[:4, "p"] = [0, -1, 1.5, np.nan, 0.5]
    message = breaks(frame, tmp_path, SCHEMA.model_copy(update={"weight": "w"}))
    lines = message.splitlines()
    assert len(lines) == 4
    assert "the label is 1 in all 400 rows" in message
    assert "propensity outside (0, 1] in 4 rows, first data row 1 (0.0)" in message
    assert "a single variant in all 400 rows" in message and "weight is negative" in message


@pytest.mark.parametrize(
    ("clicks", "impressions", "says"),
    [
        ([5, 1], [4, 10], "more clicks than 'i' in 1 row, first data row 1"),
        ([-1, 1], [4, 10], "clicks is not a whole number"),
        ([0.5, 1], [4, 10], "clicks is not a whole number"),
        ([1, 1], [4, None], "impressions is not a whole number ≥ 0 and ≤ 1e+15 in 1 row, first data row 2 (missing)"),
        ([0, 0], [0, 0], "no impressions"),
        ([0, 0], [4, 5], "the label is 0"),
    ],
)
def test_impossible_counts(tmp_path: Path, clicks: list[Any], impressions: list[Any], says: str) -> None:
    frame = pd.DataFrame({"arm": ["a", "b"], "c": clicks, "i": impressions})
    message = breaks(frame, tmp_path, LogSchema(clicks="c", impressions="i", variant=("arm",)))
    assert says in message


def test_variant_ids_must_keep_their_tags(tmp_path: Path) -> None:
    frame = a_frame()
    frame["id"] = frame["image"]
    message = breaks(frame, tmp_path, SCHEMA.model_copy(update={"variant_id": "id"}))
    assert "3 variants carry more than one combination of tags" in message and "'dog|cat'" in message
    frame["id"] = frame["image"] + frame["colour"]
    frame.loc[0, "id"] = None
    assert "no variant in 1 row" in breaks(frame, tmp_path, SCHEMA.model_copy(update={"variant_id": "id"}))


def test_a_variant_id_names_the_variant(tmp_path: Path) -> None:
    frame = a_frame()
    frame["id"] = frame["image"] + frame["colour"] + (frame["age"] % 2).astype(str)
    log = read_log(
        saved(frame, tmp_path / "l.parquet"), SCHEMA.model_copy(update={"variant_id": "id", "propensity": None})
    )
    ids = log.variants["variant_id"].to_pylist()
    assert log.n_variants == 12 and [ids[v] for v in log.variant] == frame["id"].tolist()


def test_groups_must_be_named_and_compare_something(tmp_path: Path) -> None:
    frame = a_frame().assign(test=lambda f: f["image"] + f["colour"])
    schema = SCHEMA.model_copy(update={"group": "test"})
    assert "a single variant in each of the 6 groups" in breaks(frame, tmp_path, schema)
    frame["test"] = np.where(frame["image"] == "cat", frame["test"], "both")
    assert "single_variant_groups" in codes(read_log(saved(frame, tmp_path / "l.parquet"), schema))
    frame.loc[5, "test"] = None
    assert "no group in 1 row, first data row 6 (missing)" in breaks(frame, tmp_path, schema)


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    for name, data, says in [
        ("empty.csv", b"", "empty"),
        ("empty.parquet", b"", "empty"),
        ("header.csv", b"who,age,city,page,image,colour,p,y\n", "no rows"),
        ("log.xlsx", b"PK", "unknown kind of file"),
        ("broken.parquet", b"PAR1 no", "cannot be read"),
        ("empty.csv.gz", gzip.compress(b""), "empty"),
        ("torn.csv.gz", gzip.compress(b"a,b" * 999)[:30], "cannot be read"),
    ]:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(LogError, match=says):
            read_log(path, SCHEMA)
    saved(a_frame().head(0), tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    for name, says in [("none.csv", "no such file"), ("rows.parquet", "no rows"), ("folder", r"no \.parquet")]:
        with pytest.raises(LogError, match=says):
            read_log(tmp_path / name, SCHEMA)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_other_encodings_are_named_with_the_remedy(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "log.csv"
    a_frame().to_csv(path, index=False, encoding=encoding)
    with pytest.raises(LogError, match=r"not UTF-8.*iconv"):
        read_log(path, SCHEMA)


def test_columns_named_twice(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("t,y,T,\na,1,b,c\n")
    with pytest.raises(LogError, match=r"line 1: .*'', 'T', 't'"):
        read_log(path, LogSchema(label="y", variant=("t",)))


def test_lines_may_end_as_windows_ends_them_and_hold_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b't\ty\r\n"a\r\nb"\t1\r\nc\t0\r\n')
    assert read_log(path, LogSchema(label="y", variant=("t",))).variants["t"].to_pylist() == [["a\r\nb"], ["c"]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("t,y\n" + "a,1\nb,0\n" * 50 + "a,1,1,1\n", "line 102: 4 fields, where the header names 2 ('t', 'y')."),
        ("t,y\n" + "a,1\nb,0\n" * 50 + "a\nb\n", "line 102: 1 field, where the header names 2 ("),
        ('t;y\n"a\nb";1\n\n"c\nd";0\na;1;2\n', "line 7: 3 fields, where the header names 2 ('t', 'y'). Correct"),
        ('t,y\na,1\n"b,0\na,1\n', "line 3: a quote (\") opens a value and does not close it"),
    ],
)  # fmt: skip
def test_ragged_lines_are_told_in_our_own_words(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(LogError) as error:
        read_log(path, LogSchema(label="y", variant=("t",)))
    assert f"{path}, {says}" in error.value.message and "null_padding" not in error.value.message


PARQUET = b"PAR1\x15\x04\x00\x00\xff\xfe\x00" * 9 + b"PAR1"


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("log.csv", PARQUET, "is named as CSV but holds Parquet. Rename it to log.parquet."),
        ("log.parquet", b"t,y\na,1\n", "is named as Parquet but holds text. If it is CSV, rename it to log.csv;"),
        ("log.csv", gzip.compress(b"t,y\na,1\n"), "holds gzip. If it is a packed CSV, rename it to log.csv.gz;"),
        ("log.csv.gz", b"t,y\na,1\n", "is named as a packed CSV but holds text. If it is CSV, rename it to log.csv;"),
        ("log.csv.gz", gzip.compress(PARQUET), "Unpack it (`gunzip`) and rename it to log.parquet."),
        ("log.csv", "t,y\na,1\n".encode("utf-16"), "UTF-16, not UTF-8. Convert the file, for example with `iconv -f"),
        ("log.csv", "t,y\na,1\n".encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8 log.csv > log-utf8.csv`"),
        ("log.csv.gz", gzip.compress("t,y\na,1\n".encode("utf-16")), "`gunzip -c log.csv.gz | iconv -f UTF-16 -t"),
        ("log.csv", b"PK\x03\x04\x14\x00", "holds a zip archive or an Excel workbook. Export the log as CSV"),
        ("log.csv", b"\x00\x07\xff\xfe\x9c" * 99, "is named as CSV but holds binary data. Export the log as"),
        ("log.csv", b"t,y\n" + b"a,1\n" * 9 + b"\xff,0\n", ", line 11: the text is not UTF-8. Convert the file"),
        ("log.csv", b"t,y\r\n" + b"a,1\r\n" * 9 + b"b,0\n" * 9, "the lines do not all end in the same way"),
        ("log.csv", b"t,y\n" + b"a" * 3_000_000 + b",1\n", ", line 2: the line is longer than 2 MB."),
        ("log.parquet", PARQUET[:-1], "begins as Parquet but does not end so"),
    ],
)  # fmt: skip
def test_a_file_is_known_by_its_bytes_whatever_its_name(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(LogError) as error:
        read_log(path, LogSchema(label="y", variant=("t",)))
    assert error.value.message.startswith(str(path)) and says in error.value.message


def test_every_mistaken_file_of_a_folder_is_named(tmp_path: Path) -> None:
    saved(a_frame(), tmp_path / "a.parquet")
    for name in ("b.parquet", "c.parquet"):
        (tmp_path / name).write_text("t,y\n")
    with pytest.raises(LogError) as error:
        read_log(tmp_path, SCHEMA)
    assert [line.partition(":")[0] for line in error.value.message.splitlines()] == [
        str(tmp_path / name) for name in ("b.parquet", "c.parquet")
    ]


def test_propensities_too_small_to_divide_by_are_refused(tmp_path: Path) -> None:
    frame = a_frame()
    frame.loc[[3, 5], "p"] = [1e-300, 1e-13]
    frame.loc[7, "p"] = 1e-12
    message = breaks(frame, tmp_path)
    assert "column 'p': propensity below 1e-12 in 2 rows, first data row 4 (1e-300). No choice is that rare" in message


def test_counts_too_large_to_be_exact_are_refused(tmp_path: Path) -> None:
    arms = pd.DataFrame({"arm": ["a", "b"], "i": [1e300, 5], "c": [1, 1]})
    message = breaks(arms, tmp_path, LogSchema(clicks="c", impressions="i", variant=("arm",)))
    assert "impressions is not a whole number ≥ 0 and ≤ 1e+15 in 1 row" in message


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_weights_are_relative_to_each_other(tmp_path: Path, scale: float) -> None:
    frame = a_frame().assign(w=lambda f: scale * (1 + f["y"]))
    log = read_log(saved(frame, tmp_path / "l.parquet"), SCHEMA.model_copy(update={"weight": "w"}))
    assert log.weight.mean() == pytest.approx(1) and log.weight.max() == pytest.approx(2 * log.weight.min())


def test_weights_that_leave_nothing_to_learn_are_refused(tmp_path: Path) -> None:
    schema = SCHEMA.model_copy(update={"weight": "w"})
    assert "the weight is 0 in all 400 rows" in breaks(a_frame().assign(w=0.0), tmp_path, schema)
    message = breaks(a_frame().assign(w=lambda f: f["y"] * 1.0), tmp_path, schema)
    assert "column 'w': the label is 1 in all rows with a weight above 0" in message
    assert "weight is negative or not a number" in breaks(a_frame().assign(w=np.inf), tmp_path, schema)


def test_names_that_differ_in_capitals_alone_are_refused(tmp_path: Path) -> None:
    frame = a_frame().assign(AGE=1)
    message = breaks(frame, tmp_path, SCHEMA.model_copy(update={"user": ("AGE", "city")}))
    assert "column 'AGE': names that differ in capitals alone cannot be told apart: 'age', 'AGE'." in message


def test_dates_and_nested_values_are_warned_of(tmp_path: Path) -> None:
    frame = a_frame().assign(age=pd.date_range("2026-01-01", periods=400))
    for name in ("l.parquet", "l.csv"):
        log = read_log(saved(frame, tmp_path / name), SCHEMA)
        assert [c.message.split(":")[0] for c in log.checks if c.code == "date_column"] == [
            "user column 'age' holds dates"
        ]
    table = pa.table(a_frame()).append_column("likes", pa.array([[1, i % 3] for i in range(400)]))
    table = table.append_column("look", pa.array([{"a": i % 3} for i in range(400)]))
    pq.write_table(table, tmp_path / "n.parquet")
    log = read_log(tmp_path / "n.parquet", SCHEMA.model_copy(update={"user": ("likes",), "variant": ("look",)}))
    found = [c.message for c in log.checks if c.code == "nested_column"]
    assert len(found) == 2 and "user column 'likes' holds BIGINT[]" in found[0] and "tag column 'look'" in found[1]


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_whole_numbers_beyond_64_bits_are_text(tmp_path: Path, name: str) -> None:
    big = [2**63 + i % 3 for i in range(60)]
    small = [i % 50 for i in range(60)]
    table = pa.table(
        {
            "big": pa.array(big, pa.uint64()),
            "huge": pa.array([10**30 + i for i in range(60)], pa.decimal128(38, 0)),
            "small": pa.array(small, pa.uint64()),
            "most": pa.array([2**63 - 1 - i for i in range(60)], pa.uint64()),
            "t": ["a", "b"] * 30,
            "y": [0, 1, 1] * 20,
        }
    )
    path = tmp_path / name
    if name == "log.csv":
        path.write_text(table.to_pandas().astype(str).to_csv(index=False))
    else:
        pq.write_table(table, path)
    columns = read_log(path, LogSchema(label="y", user=("big", "huge", "small", "most"), variant=("t",))).columns
    assert columns["big"].to_pylist() == [str(v) for v in big] and len(set(columns["huge"].to_pylist())) == 60
    assert columns["small"].type == columns["most"].type == pa.int64()
    assert columns["small"].to_pylist() == small and columns["most"].to_pylist()[0] == 2**63 - 1


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_infinite_numbers_are_missing_with_a_warning(tmp_path: Path, name: str) -> None:
    frame = a_frame()
    frame["age"] = frame["age"] + 0.5
    frame.loc[[4, 9], "age"] = [np.inf, -np.inf]
    log = read_log(saved(frame, tmp_path / name), SCHEMA)
    assert log.columns["age"].type == pa.float64() and log.columns["age"].null_count == 2
    found = [check for check in log.checks if check.code == "not_finite"]
    assert [check.level for check in found] == [Level.WARNING]
    assert "column 'age': infinite in 2 rows, first data row 5" in found[0].message
    assert log.cells(("age",)).max() < 10


def test_a_time_without_end_is_unknown(tmp_path: Path) -> None:
    frame = a_frame(20).assign(at=np.arange(20.0))
    frame.loc[2, "at"] = np.inf
    log = read_log(saved(frame, tmp_path / "l.parquet"), SCHEMA.model_copy(update={"time": "at"}))
    assert log.time is not None and np.isnan(log.time).sum() == 1 and "time_unreadable" in codes(log)


@pytest.mark.parametrize(("role", "says"), [("propensity", "propensity is no number"), ("weight", "not a number")])
def test_a_decimal_comma_is_no_number(tmp_path: Path, role: str, says: str) -> None:
    frame = a_frame().assign(p="0,25", colour=a_frame()["colour"] + ";")
    message = breaks(frame, tmp_path, SCHEMA.model_copy(update={"propensity": None, role: "p"}), "l.csv")
    assert says in message and "first data row 1 ('0,25'). Write decimals with a point, 0.25." in message
    assert "outside" not in message


def test_features_with_a_decimal_comma_are_warned_of(tmp_path: Path) -> None:
    frame = a_frame().assign(age=["30,5", "31"] * 200, city=["a, b", "1,2"] * 200)
    log = read_log(saved(frame, tmp_path / "l.csv"), SCHEMA)
    (said,) = [c.message for c in log.checks if c.code == "decimal_comma"]
    assert "column 'age'" in said and "'30,5'" in said and "30.5" in said


def test_what_holds_no_rows_or_no_parquet_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "csvs").mkdir()
    for name in ("a.csv", "b.csv.gz"):
        saved(a_frame(), tmp_path / "csvs" / name)
    for frame, name, says in [
        (a_frame().head(0), "rows.parquet", "has columns but no rows"),
        (a_frame().head(0), "rows.csv", "has a header but no rows"),
        (None, "csvs", "holds 2 CSV files and no .parquet file. Only Parquet is read from a folder"),
    ]:
        path = tmp_path / name if frame is None else saved(frame, tmp_path / name)
        with pytest.raises(LogError, match=says):
            read_log(path, SCHEMA)


# ---- warnings


def test_a_clean_log_has_no_findings(tmp_path: Path) -> None:
    frame = a_frame()
    frame["age"] = frame["who"].str.len()
    frame["city"] = frame["who"].str[-1]
    frame["at"] = np.arange(400)
    assert codes(read_log(saved(frame, tmp_path / "l.parquet"), SCHEMA)) == []


def test_findings_name_the_column(tmp_path: Path) -> None:
    frame = a_frame(800)
    frame["age"] = np.arange(800)
    frame["city"] = None
    frame["who"] = np.arange(800)
    frame["colour"] = "red"
    frame.loc[700:, "page"] = None
    frame = pd.concat([frame, frame.head(3)])
    log = read_log(saved(frame, tmp_path / "l.csv"), SCHEMA)
    found = {(c.code, c.level) for c in log.checks}
    assert {code for code, level in found if level is Level.WARNING} == {
        "duplicated_rows",
        "units_seen_once",
        "id_like_column",
        "constant_column",
        "mostly_missing",
        "propensity_mean",
    }
    messages = " ".join(c.message for c in log.checks)
    assert "3 of 803 rows" in messages and "'age'" in messages and "'city'" in messages and "'colour'" in messages


def test_a_schema_without_context_or_users_is_noted(tmp_path: Path) -> None:
    path = saved(a_frame(), tmp_path / "l.parquet")
    for changed, noted in [({}, []), ({"context": ()}, ["no_context"]), ({"user": ()}, ["no_user_features"])]:
        log = read_log(path, SCHEMA.model_copy(update=changed))
        found = [c for c in log.checks if c.code in ("no_context", "no_user_features")]
        assert [c.code for c in found] == noted and all(c.level is Level.INFO for c in found)


def test_user_columns_that_change_within_a_unit(tmp_path: Path) -> None:
    log = read_log(saved(a_frame(), tmp_path / "l.parquet"), SCHEMA)
    assert [c.level for c in log.checks if c.code == "varies_within_unit"] == [Level.INFO] * 2


def test_few_units(tmp_path: Path) -> None:
    frame = a_frame()
    for units, says in ((7, "only 7 units:"), (1, "only 1 unit:")):
        frame["who"] = np.arange(400) % units
        log = read_log(saved(frame, tmp_path / "l.parquet"), SCHEMA)
        assert any(c.code == "few_units" and c.message.startswith(says) for c in log.checks)


def test_arms_that_match_no_variants(tmp_path: Path) -> None:
    path = saved(a_frame(), tmp_path / "l.parquet")
    for arms, warned in [({"cat": 0.5, "dogs": 0.5}, True), ({"red": 0.5, "blue": 0.5}, False), ("uniform", False)]:
        log = read_log(path, SCHEMA.model_copy(update={"arms": arms}))
        assert ("arms_unmatched" in codes(log)) == warned


@pytest.mark.parametrize(("scale", "warned"), [(1.0, False), (1.3, True), (0.8, True)])
def test_propensities_that_do_not_add_up(tmp_path: Path, scale: float, warned: bool) -> None:
    rng = np.random.default_rng(0)
    shares = np.array([[0.7, 0.2, 0.1], [0.1, 0.9, 0.0]])  # the third is not eligible on the second page
    page = rng.integers(0, 2, 6000)
    shown = np.array([rng.choice(3, p=shares[c]) for c in page])
    frame = pd.DataFrame({"page": page, "arm": shown, "p": shares[page, shown] / scale, "y": rng.integers(0, 2, 6000)})
    frame["p"] = frame["p"].clip(upper=1)
    schema = LogSchema(label="y", context=("page",), variant=("arm",), propensity="p")
    assert ("propensity_mean" in codes(read_log(saved(frame, tmp_path / "l.parquet"), schema))) == warned


def test_propensities_that_cannot_be_any_are_an_error(tmp_path: Path) -> None:
    for p, level in [(1 / 30, Level.ERROR), (1 / 7, Level.WARNING)]:
        log = read_log(saved(a_frame().assign(p=p), tmp_path / "l.parquet"), SCHEMA)
        assert [c.level for c in log.checks if c.code == "propensity_mean"] == [level]


def three_buckets(seed: int, n: int = 12_000, variants: int = 20) -> pd.DataFrame:
    """A control bucket (one variant), a random one, and a model that shows what users like, with a floor; all of
    whose propensities are right."""
    rng = np.random.default_rng(seed)
    who = rng.integers(0, n // 4, n)
    bucket = np.array(["control", "random", "model"])[np.searchsorted([0.15, 0.4], (who * 7919 % 1000) / 1000, "right")]
    likes = np.random.default_rng(0).normal(size=n)[who]
    share = np.exp(likes[:, None] * np.linspace(-2, 2, variants))
    share = 0.9 * share / share.sum(axis=1, keepdims=True) + 0.1 / variants
    share[bucket == "random"] = 1 / variants
    share[bucket == "control"] = np.arange(variants) == 3
    arm = (share.cumsum(axis=1) > rng.random(n)[:, None]).argmax(axis=1)
    return pd.DataFrame({
        "who": who, "bucket": bucket, "arm": arm, "p": share[np.arange(n), arm], "y": rng.integers(0, 2, n),
        "page": rng.integers(0, 2, n),
    })  # fmt: skip


BUCKETS = LogSchema(label="y", unit="who", variant=("arm",), propensity="p", bucket="bucket")  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"bucket": None}, {"context": ("page",)}, {"product": "page"}])
def test_right_propensities_of_three_buckets_do_not_alarm(tmp_path: Path, changes: dict[str, Any]) -> None:
    schema = BUCKETS.model_copy(update=changes)
    for seed in range(5):
        assert "propensity_mean" not in codes(read_log(saved(three_buckets(seed), tmp_path / "l.parquet"), schema))


@pytest.mark.parametrize(
    ("bucket", "wrong", "says"),
    [
        ("control", lambda p: 1 / 20, "in bucket 'control' it is 20 (se 0), but 1 variant could be shown"),
        ("model", lambda p: np.minimum(1.5 * p, 1), "in bucket 'model' it is 13"),
        ("model", lambda p: p / 1.5, "in bucket 'model' it is 29."),
        ("random", lambda p: 1.0, "in bucket 'random' it is 1 (se 0), but 20 variants could be shown"),
    ],
)
def test_wrong_propensities_of_one_bucket_are_warned_of_by_its_name(
    tmp_path: Path, bucket: str, wrong: Any, says: str
) -> None:
    frame = three_buckets(0)
    of = frame["bucket"] == bucket
    frame.loc[of, "p"] = wrong(frame.loc[of, "p"])
    log = read_log(saved(frame, tmp_path / "l.parquet"), BUCKETS)
    (said,) = [c.message for c in log.checks if c.code == "propensity_mean"]
    assert "column 'p' (the propensities)" in said and says in said and said.count("in bucket") == 1
    assert "Log the probability with which the choice was drawn" in said


def test_many_variants_hardly_seen_do_not_alarm(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"arm": rng.integers(0, 5000, 10_000), "y": rng.integers(0, 2, 10_000), "p": 1 / 5000})
    schema = LogSchema(label="y", variant=("arm",), propensity="p")
    assert "propensity_mean" not in codes(read_log(saved(frame, tmp_path / "l.parquet"), schema))


# ---- real logs


@pytest.mark.real_data
def test_counts_the_repeats_of_real_logs(data_dir: Path) -> None:
    for name, schema in [
        ("hillstrom/hillstrom.csv", LogSchema(label="visit", user=("recency", "channel"), variant=("segment",))),
        ("coupon/coupons_uci.csv", LogSchema(label="Y", user=("age", "Bar"), variant=("coupon", "expiration"))),
    ]:
        log = read_log(data_dir / name, schema)
        repeats = pd.read_csv(data_dir / name).duplicated().sum()
        assert any(c.code == "duplicated_rows" and c.message.startswith(f"{repeats:,} of ") for c in log.checks)


@pytest.mark.real_data
def test_reads_an_aggregated_archive(data_dir: Path) -> None:
    path = data_dir / "upworthy/upworthy.parquet"
    schema = LogSchema(
        clicks="clicks", impressions="impressions", group="clickability_test_id", variant=("headline", "eyecatcher_id")
    )
    log, frame = read_log(path, schema), pd.read_parquet(path)
    assert log.file_rows == len(frame) and log.n_exposures == frame["impressions"].sum()
    assert float((log.reward * log.count).sum()) == frame["clicks"].sum()
    assert log.groups is not None and len(log.groups) == frame["clickability_test_id"].nunique()
