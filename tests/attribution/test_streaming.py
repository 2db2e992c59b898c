"""A log of any size as cells: the sums are those of the rows, however the rows are split."""

from __future__ import annotations

from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attribution import batches
from attribution.cells import Cells
from attribution.coding import MAX_WEIGHT, code
from attribution.replicates import replicate_of
from attribution.streaming import stream, stream_events
from kaleidoscope.errors import InputError, LogError
from kaleidoscope.log import read_log
from kaleidoscope.log_schema import LogSchema

SCHEMA = LogSchema(
    label="click", unit="unit", user=("gender", "age"), context=("hour",), variant=("tone", "style"), bucket="bucket",
    time="time", propensity="p", weight="w",
)  # fmt: skip
PLAIN = LogSchema(label="click", unit="unit", user=("gender", "age"), variant=("tone", "style"))
DAY = 86_400


def exposures(n: int = 3_000, seed: int = 0, tones: tuple[str, ...] = ("calm", "loud", "shy")) -> pd.DataFrame:
    """Three days; a tone is shown more to women, with known propensities; a user has about three exposures."""
    rng = np.random.default_rng(seed)
    unit = rng.integers(0, n // 3, n)
    woman = unit % 2 == 0
    share = np.where(woman[:, None], np.arange(1, len(tones) + 1), np.arange(len(tones), 0, -1)) * 1.0
    share /= share.sum(axis=1, keepdims=True)
    tone = (rng.random(n)[:, None] > share.cumsum(axis=1)).sum(axis=1).clip(max=len(tones) - 1)
    return pd.DataFrame({
        "unit": [f"u{u}" for u in unit], "gender": np.where(woman, "f", "m"),
        "age": np.where(unit % 11 == 0, np.nan, 18 + unit % 50), "hour": np.where(rng.random(n) < 0.4, "am", "pm"),
        "tone": np.array(tones)[tone], "style": np.array(["flat", "real"])[rng.integers(0, 2, n)],
        "bucket": np.where(unit % 10 == 0, "random", "model"), "time": rng.integers(0, 3 * DAY, n),
        "p": share[np.arange(n), tone] / 2, "w": rng.choice([0.5, 1.0, 2.0], n),
        "click": (rng.random(n) < np.where(tone == 0, 0.3, 0.15)).astype(int),
    })  # fmt: skip


def written(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_parquet(path, index=False)
    return path


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, Cells]:
    frame = exposures()
    return frame, stream(written(frame, tmp_path_factory.mktemp("log") / "log.parquet"), SCHEMA)


def as_mapping(cells: Cells) -> dict[tuple[Any, ...], Any]:
    keys = [
        (cells.strata[s], cells.buckets[b], cells.periods[p], r, cells.values[v], cells.tags[t])
        for s, b, p, r, v, t in cells.main.codes.T
    ]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, cells.sums, strict=True))


def assert_equal(a: Cells, b: Cells) -> None:
    for names in ("strata", "buckets", "periods", "values", "tags", "clipped"):
        assert getattr(a, names) == getattr(b, names)
    for of in ("main", "value_pairs", "tag_pairs"):
        left, right = getattr(a, of), getattr(b, of)
        assert np.array_equal(left.codes, right.codes)
        assert np.array_equal(left.sums[:, :2], right.sums[:, :2])  # whole numbers: exactly
        assert np.allclose(left.sums, right.sums, rtol=1e-12, atol=0)


def test_sums_are_those_of_the_rows(batch: tuple[pd.DataFrame, Cells]) -> None:
    frame, cells = batch
    weight = frame.w / frame.w.mean() * np.minimum(1 / frame.p / (1 / frame.p).mean(), MAX_WEIGHT)
    day = pd.to_datetime(frame.time, unit="s").dt.strftime("%Y-%m-%d")
    replicate = replicate_of(pa.array(frame.unit))
    base = np.where(frame.gender == "f", "f", "m")
    amounts = pd.DataFrame({
        "n": 1, "clicks": frame.click, "w": weight, "wc": weight * frame.click, "w2": weight**2,
        "w2c": weight**2 * frame.click,
    })  # fmt: skip
    places = ["hour=" + frame.hour, frame.bucket, day, pd.Series(replicate)]
    expected = amounts.groupby([*places, pd.Series(base), frame.tone]).sum()
    found = as_mapping(cells)
    for (hour, bucket, period, r, gender, tone), row in expected.iterrows():
        key = (hour, bucket, period, r, ("gender", gender), (("tone", tone),))
        assert found[key] == pytest.approx(row.to_numpy())
    assert cells.periods == ("1970-01-01", "1970-01-02", "1970-01-03") and cells.buckets == ("model", "random")
    total = cells.table("n")
    assert total[0, 0] == len(frame)
    assert total[cells.values.index(("age", "missing")), 0] == frame.age.isna().sum()


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
@pytest.mark.parametrize("way", ["milliseconds", "offset", "time zone"])
def test_days_are_those_of_the_times_that_a_log_in_memory_has(way: str, name: str, tmp_path: Path) -> None:
    frame = exposures()
    moment = pd.to_datetime(frame.time + 1_790_000_000, unit="s", utc=True)
    there = moment.dt.tz_convert("Asia/Tokyo")
    times = {"milliseconds": (frame.time + 1_790_000_000) * 1000, "offset": there.map(str), "time zone": there}
    path, schema = tmp_path / name, SCHEMA.model_copy(update={"context": ()})
    frame = frame.assign(time=times[way])
    frame.to_csv(path, index=False) if path.suffix == ".csv" else written(frame, path)
    read = read_log(path, schema).time
    assert read is not None and (read == moment.map(pd.Timestamp.timestamp)).all()
    cells = stream(path, schema)
    assert cells.periods == tuple(sorted(moment.dt.strftime("%Y-%m-%d").unique())) and len(cells.periods) == 4


def test_pairs_are_those_of_the_rows(batch: tuple[pd.DataFrame, Cells]) -> None:
    frame, cells = batch
    loud, flat = (cells.tags.index((t,)) for t in (("tone", "loud"), ("style", "flat")))
    both = cells.tag_pair_table("clicks")
    assert (
        both[loud, flat] == both[flat, loud] == frame.click[(frame.tone == "loud") & (frame["style"] == "flat")].sum()
    )
    assert both[loud, loud] == both[0, loud] == frame.click[frame.tone == "loud"].sum()
    woman, missing = (cells.values.index(v) for v in (("gender", "f"), ("age", "missing")))
    users = cells.value_pair_table("n")
    assert users[woman, missing] == ((frame.gender == "f") & frame.age.isna()).sum()
    assert users[0, 0] == len(frame)


def test_a_log_in_memory_gives_the_same_sums(tmp_path: Path) -> None:
    """Without propensities both ways count exposures alike."""
    frame = exposures()
    schema = LogSchema(label="click", unit="unit", user=("gender", "age"), context=("hour",), variant=("tone", "style"))
    path = written(frame, tmp_path / "log.parquet")
    streamed = stream(path, schema, dependent=False)
    replicate = replicate_of(pa.array(frame.unit)).astype(np.int64)
    in_memory = Cells.of(code(read_log(path, schema), dependent=False), replicate)
    found, expected = as_mapping(streamed), as_mapping(in_memory)
    assert found.keys() == expected.keys()
    assert all((found[key] == expected[key]).all() for key in expected)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.lists(st.integers(0, 3), min_size=60, max_size=60))
def test_any_split_of_the_rows_gives_the_same_sums(
    part: list[int], batch: tuple[pd.DataFrame, Cells], tmp_path: Path
) -> None:
    frame, cells = batch
    shard = np.array(part)[np.arange(len(frame)) % 60]
    parts = [
        stream(written(frame[shard == k], tmp_path / f"{k}.parquet"), SCHEMA, cells.definitions)
        for k in range(4) if (shard == k).any()
    ]  # fmt: skip
    assert_equal(reduce(add, parts), cells)
    assert_equal(reduce(add, parts[::-1]), cells)


def test_the_next_day_is_added_without_the_days_before(tmp_path: Path) -> None:
    """The second day has a tag value, variants, strata, a bucket and user values that the first had not."""
    first = exposures(tones=("calm", "loud"))
    second = exposures(seed=1, tones=("bold", "calm", "loud", "shy"))
    second = second.assign(
        time=second.time + 3 * DAY, hour=second.hour.replace("am", "night"),
        bucket=second.bucket.replace("model", "new"), gender=second.gender.where(second.index % 7 > 0, "x"),
        age=second.age + 20,
    )  # fmt: skip
    days = [written(first, tmp_path / "1.parquet"), written(second, tmp_path / "2.parquet")]
    day = stream(days[0], SCHEMA)
    day.save(tmp_path / "cells.parquet")
    before = Cells.load(tmp_path / "cells.parquet")
    both = before + stream(days[1], SCHEMA, before.definitions)
    whole = stream(written(pd.concat([first, second]), tmp_path / "whole.parquet"), SCHEMA, day.definitions)
    assert_equal(both, whole)
    assert both.tags == whole.tags and both.strata == whole.strata and both.buckets == whole.buckets
    assert (("tone", "bold"),) in both.tags and "hour=night" in both.strata and "new" in both.buckets
    assert both.table("n")[both.values.index(("gender", "others")), 0] == (second.gender == "x").sum()
    assert_equal(stream(days, SCHEMA, day.definitions), whole)
    assert len(both.periods) == 6


def test_batches_and_texts_that_no_sample_had_change_nothing(
    batch: tuple[pd.DataFrame, Cells], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame, cells = batch
    path = written(frame.sort_values("tone"), tmp_path / "log.parquet")
    for name, value in (("ROWS", 500), ("SAMPLE", 40), ("SPOTS", 1)):
        monkeypatch.setattr(batches, name, value)
    assert_equal(stream(path, SCHEMA, cells.definitions), cells)


def test_all_of_a_unit_are_in_one_replicate_everywhere(batch: tuple[pd.DataFrame, Cells]) -> None:
    """What other programs have to reproduce: these figures must never change."""
    texts = ["u1", "u2", "user-12345678", "", "0123456789abcdef", "日本", "x" * 1_000]
    found = replicate_of(pa.array([*texts, None]))
    assert found.tolist() == [hash_of(text.encode()) % 64 for text in texts] + [mix(7) % 64]
    assert found.tolist() == PINNED
    assert replicate_of(pa.nulls(2, pa.string()), 7).tolist() == [mix(7) % 64, mix(8) % 64]
    sliced = replicate_of(pa.array([*texts, None]).slice(2, 3))
    assert sliced.tolist() == found[2:5].tolist()
    many = replicate_of(pa.array([f"user-{i}" for i in range(64_000)]))
    assert 0.7 < np.bincount(many, minlength=64).var() / 1_000 < 1.4  # as chance deals


def mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


def hash_of(text: bytes) -> int:
    h = 0
    for i in range(0, len(text), 8):
        h = mix(h ^ int.from_bytes(text[i : i + 8], "little"))
    return mix(h ^ len(text))


PINNED = [0, 41, 41, 47, 21, 1, 0, 23]


def test_csv_and_lists_of_tags_and_numbers_as_units_are_read_alike(tmp_path: Path) -> None:
    frame = exposures(600).assign(unit=np.arange(600) // 3, tone=lambda f: f.tone.replace("shy", "calm|shy"))
    frame.to_csv(tmp_path / "log.csv", index=False)
    lists = frame.assign(tone=frame.tone.str.split("|"))
    paths = [tmp_path / "log.csv", written(frame, tmp_path / "a.parquet"), written(lists, tmp_path / "b.parquet")]
    from_csv, from_text, from_lists = (stream(path, SCHEMA) for path in paths)
    assert_equal(from_csv, from_text)
    assert_equal(from_lists, from_text)
    calm, shy = (from_text.tags.index((("tone", t),)) for t in ("calm", "shy"))
    assert from_text.table("n")[0, calm] == frame.tone.str.contains("calm").sum()
    assert from_text.tag_pair_table("n")[calm, shy] == (frame.tone == "calm|shy").sum() == from_text.table("n")[0, shy]


def test_rows_of_clicks_and_impressions_are_as_good_as_exposures(tmp_path: Path) -> None:
    frame = exposures()
    keys = ["unit", "gender", "age", "hour", "tone", "style", "bucket", "time", "p", "w"]
    counted = frame.groupby(keys, dropna=False, as_index=False).agg(clicks=("click", "sum"), shown=("click", "size"))
    schema = SCHEMA.model_copy(update={"label": None, "clicks": "clicks", "impressions": "shown"})
    rows = stream(written(frame, tmp_path / "rows.parquet"), SCHEMA)
    assert_equal(stream(written(counted, tmp_path / "counts.parquet"), schema, rows.definitions), rows)


def test_exposures_without_units_are_dealt_out_one_by_one(tmp_path: Path) -> None:
    frame = pd.DataFrame({"tone": ["calm", "loud"] * 6, "clicks": 640, "shown": 6_400})
    schema = LogSchema(clicks="clicks", impressions="shown", variant=("tone",))
    cells = stream(written(frame, tmp_path / "log.parquet"), schema)
    n = cells.sums[(cells.value == 0) & (cells.tag == 0), 0]
    assert len(n) == 64 and n.sum() == 76_800
    assert 0.5 < n.std() / np.sqrt(n.mean()) < 1.6  # as chance deals


def test_propensities_undo_what_exposure_knew_of_the_user(tmp_path: Path) -> None:
    """Simpson: loud is the worse telling for all, and mostly shown to those who click on anything."""
    rng, n = np.random.default_rng(1), 40_000
    keen = rng.random(n) < 0.5
    p_loud = np.where(keen, 0.9, 0.1)
    loud = rng.random(n) < p_loud
    clicks = rng.random(n) < np.where(keen, 0.3, 0.05) * np.where(loud, 0.8, 1.0)
    frame = pd.DataFrame({
        "keen": np.where(keen, "yes", "no"), "tone": np.where(loud, "loud", "calm"), "click": clicks.astype(int),
        "p": np.where(loud, p_loud, 1 - p_loud), "unit": np.arange(n),
    })  # fmt: skip
    schema = LogSchema(label="click", unit="unit", user=("keen",), variant=("tone",), propensity="p")
    cells = stream(written(frame, tmp_path / "log.parquet"), schema)
    loud_at, calm_at = (cells.tags.index((("tone", t),)) for t in ("loud", "calm"))
    naive, _ = cells.ctr(weighted=False)
    assert naive[0, loud_at] > 2 * naive[0, calm_at]
    rate, error = cells.ctr()
    truth = np.array([0.175 * 0.8, 0.175])
    assert np.all(np.abs(rate[0, [loud_at, calm_at]] - truth) < 3 * error[0, [loud_at, calm_at]])
    estimate, se = cells.log_ratios()
    assert abs(estimate[loud_at] - np.log(0.8)) < 3 * se[loud_at]
    assert 0.3 < cells.effective_share < 0.5
    assert cells.clipped == 0


def test_weights_are_clipped_and_it_is_said_how_many(tmp_path: Path) -> None:
    frame = exposures().assign(w=1.0, p=0.5)
    frame.loc[:9, "p"] = 1e-3
    cells = stream(written(frame, tmp_path / "log.parquet"), SCHEMA)
    assert cells.clipped == 10
    weight = np.where(np.arange(len(frame)) < 10, MAX_WEIGHT, 2 * cells.definitions.inverse_scale)
    assert cells.table("weight")[0, 0] == pytest.approx(weight.sum())


def test_a_log_that_supports_no_claim_is_refused(tmp_path: Path) -> None:
    frame = exposures(6_000, tones=("calm", "loud"))
    path = written(frame, tmp_path / "log.parquet")
    with pytest.raises(LogError, match=r"log.parquet: what was shown depended on the user.*Log P"):
        stream(path, PLAIN)
    half = exposures(6_000).assign(p=lambda f: np.where(f.index % 2, 0.95, 0.6))
    with pytest.raises(LogError, match=r"no floor.*epsilon"):
        stream(written(half, tmp_path / "floor.parquet"), SCHEMA)
    # The next day is judged as the first was.
    fair = frame.assign(tone=np.random.default_rng(0).permutation(frame.tone))
    day = stream(written(fair, tmp_path / "fair.parquet"), PLAIN)
    with pytest.raises(LogError, match="depended on the user"):
        stream(path, PLAIN, day.definitions)
    assert (day + stream(path, PLAIN, day.definitions, dependent=False)).table("n")[0, 0] == 12_000


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.65, 0.8])
def test_a_log_where_some_users_always_see_one_variant_is_refused_on_every_day(share: float, tmp_path: Path) -> None:
    rng, n = np.random.default_rng(1), 8_000
    always = rng.random(n) < share
    fair = pd.DataFrame({"unit": np.arange(n), "gender": "f", "age": np.arange(n) % 9, "p": 0.5, "style": "flat",
                         "tone": rng.choice(["calm", "loud"], n), "click": rng.random(n) < 0.2})  # fmt: skip
    log = fair.assign(
        tone=np.where(always, "calm", fair.tone), p=np.where(always, 1, 0.5),
        click=(rng.random(n) < np.where(always, 0.3, 0.1)).astype(int),
    )  # fmt: skip
    schema = PLAIN.model_copy(update={"propensity": "p"})
    path = written(log, tmp_path / "log.parquet")
    with pytest.raises(LogError, match=rf"log.parquet: column 'p' has no floor: {always.mean():.0%} of the exposures"):
        stream(path, schema)
    fair.click = fair.click.astype(int)
    day = stream(written(fair, tmp_path / "fair.parquet"), schema)
    with pytest.raises(LogError, match="no floor"):
        stream(path, schema, day.definitions)


def test_users_whom_a_variant_never_reached_are_named(tmp_path: Path) -> None:
    frame = exposures(20_000)
    unseen = (frame.tone == "shy") & (frame.gender == "m")
    with pytest.raises(LogError, match=r"no floor for users of gender = m in stratum .*: .* stand for 0% of theirs"):
        stream(written(frame[~unseen], tmp_path / "log.parquet"), SCHEMA)


def test_a_column_may_have_any_name(tmp_path: Path) -> None:
    """Also those that the queries would have given to columns of theirs."""
    frame = exposures(600)
    names = ["t", "sample", "log", "unit_0", "f0_0", "d0_0", "s0_0", "b"]
    other = frame.assign(**{name: np.arange(600) / 7 for name in names})
    plain, named = (
        stream(written(f, tmp_path / f"{i}.parquet"), SCHEMA) for i, f in enumerate((frame, other))
    )  # fmt: skip
    assert_equal(named, plain)
    renamed = frame.rename(columns={"tone": "t", "style": "sample", "gender": "log", "hour": "d0_0", "bucket": "b"})
    schema = SCHEMA.model_copy(
        update={"variant": ("t", "sample"), "user": ("log", "age"), "context": ("d0_0",), "bucket": "b"}
    )
    assert len(stream(written(renamed, tmp_path / "renamed.parquet"), schema)) == len(plain)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("click", 2, r"'click': label is not 0 or 1 in 1 .* first data row 2,001"),
        ("p", 0.0, r"'p': propensity outside"),
        ("w", -1.0, r"'w': weight is negative"),
    ],
)
def test_bad_rows_are_named_wherever_they_are(
    column: str, value: float, message: str, tmp_path: Path, batch: tuple[pd.DataFrame, Cells]
) -> None:
    frame, cells = batch
    frame = frame.copy()
    frame.loc[2_000, column] = value
    with pytest.raises(LogError, match=message):
        stream(written(frame, tmp_path / "log.parquet"), SCHEMA, cells.definitions)


def test_missing_columns_and_no_logs_are_named(tmp_path: Path) -> None:
    path = written(exposures(60).drop(columns="tone"), tmp_path / "log.parquet")
    with pytest.raises(LogError, match=r"column 'tone'.*missing"):
        stream(path, SCHEMA)
    with pytest.raises(InputError, match="no log"):
        stream([], SCHEMA)


def test_a_day_without_exposures_adds_nothing(batch: tuple[pd.DataFrame, Cells], tmp_path: Path) -> None:
    frame, cells = batch
    empty = stream(written(frame[:0].astype(frame.dtypes), tmp_path / "log.parquet"), SCHEMA, cells.definitions)
    assert len(empty) == 0
    assert_equal(cells + empty, cells)


def test_a_log_that_does_not_fit_the_definitions_is_refused(batch: tuple[pd.DataFrame, Cells], tmp_path: Path) -> None:
    frame, cells = batch
    path = written(frame, tmp_path / "log.parquet")
    for change, message in (
        ({"propensity": None}, "names no `propensity`"), ({"user": ("gender",)}, r"user fields \['gender'\]"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            stream(path, SCHEMA.model_copy(update=change), cells.definitions)


@pytest.mark.parametrize(("period", "names"), [
    ("week", ("1969-12-29",)), ("month", ("1970-01",)), (None, ("",)),
])  # fmt: skip
def test_periods_may_be_longer_than_days(period: Any, names: tuple[str, ...], tmp_path: Path) -> None:
    assert stream(written(exposures(600), tmp_path / "log.parquet"), SCHEMA, period=period).periods == names


@pytest.mark.parametrize("period", ["day", "week", "month", None])
def test_nothing_is_lost_where_days_or_names_fall_together_in_a_batch(
    period: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Days of a month; a stratum called as one that is not known; a user value called as those that are missing."""
    frame = exposures()
    frame = frame.assign(
        hour=frame.hour.where(frame.index % 3 > 0, None).replace("pm", "None"),
        gender=frame.gender.where(frame.index % 4 > 0, None).replace("m", "missing"),
    )  # fmt: skip
    monkeypatch.setattr(batches, "ROWS", 500)
    cells = stream(written(frame, tmp_path / "log.parquet"), SCHEMA, period=period)
    assert cells.table("n")[0, 0] == len(frame) and cells.table("clicks")[0, 0] == frame.click.sum()
    assert cells.strata == ("hour=None", "hour=am")
    known = frame.tone == "loud"
    loud = cells.tags.index((("tone", "loud"),))
    assert cells.by_stratum("n")[:, loud].tolist() == [
        (known & (frame.hour != "am")).sum(), (known & (frame.hour == "am")).sum(),
    ]  # fmt: skip
    users = [i for i, value in enumerate(cells.values) if value == ("gender", "missing")]
    assert cells.table("n")[users].sum(axis=0)[loud] == (known & (frame.gender != "f")).sum()


def test_pairs_need_not_be_summed(batch: tuple[pd.DataFrame, Cells], tmp_path: Path) -> None:
    frame, cells = batch
    plain = stream(written(frame, tmp_path / "log.parquet"), SCHEMA, pairs=False)
    assert len(plain.value_pairs) == len(plain.tag_pairs) == 0
    assert np.array_equal(plain.main.codes, cells.main.codes) and np.allclose(plain.sums, cells.sums)


def test_the_event_log_is_read_without_what_cannot_be_learned_from(tmp_path: Path) -> None:
    frame = exposures()
    events = pd.DataFrame({
        "unit": frame.unit, "bucket": frame.bucket, "product": "card", "propensity": frame.p, "click": frame.click,
        "conversion": 0, "exposed_at": pd.to_datetime(frame.time, unit="s", utc=True), "u_gender": frame.gender,
        "u_age": frame.age, "c_hour": frame.hour, "t_tone": frame.tone.map(lambda t: [t]),
        "t_style": frame["style"].map(lambda t: [t]), "learn": frame.index % 5 > 0, "recorded": True, "described": True,
    })  # fmt: skip
    for scene in ("home", "shop"):
        folder = tmp_path / "acme" / f"scene={scene}" / "day=1970-01-01"
        folder.mkdir(parents=True)
        events[frame.index % 2 == (scene == "shop")].assign(scene=scene).to_parquet(folder / "part-0000.parquet")
    found = stream_events(tmp_path / "acme")
    learned = frame[frame.index % 5 > 0]
    group = np.where(learned.index % 2, "shop", "home")
    schema = SCHEMA.model_copy(update={"group": "group", "product": "product", "weight": None})
    path = written(learned.assign(group=group, product="card"), tmp_path / "log.parquet")
    assert_equal(found, stream(path, schema, found.definitions))
    assert "shop / hour=pm / card" in found.strata
    scenes = [stream_events(tmp_path / "acme" / f"scene={s}", found.definitions) for s in ("home", "shop")]
    assert_equal(scenes[0] + scenes[1], found)
    with pytest.raises(LogError, match="no event log"):
        stream_events(path)


def event_log(frame: pd.DataFrame, path: Path, **changed: Any) -> Path:
    """A day of the event log with these exposures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({
        "unit": frame.unit, "scene": "home", "bucket": frame.bucket, "product": "card", "propensity": frame.p,
        "click": frame.click, "conversion": 0, "exposed_at": pd.to_datetime(frame.time, unit="s", utc=True),
        "u_gender": frame.gender, "u_age": frame.age, "c_hour": frame.hour, "t_tone": frame.tone.map(lambda t: [t]),
        "t_style": frame["style"].map(lambda t: [t]), "learn": True, "recorded": True, "described": True,
    }).assign(**changed).to_parquet(path)  # fmt: skip
    return path


def test_days_of_the_event_log_may_lack_a_feature_but_not_have_a_new_one(tmp_path: Path) -> None:
    first = event_log(exposures(), tmp_path / "monday.parquet")
    cells = stream_events(first)
    second = event_log(exposures(seed=1), tmp_path / "tuesday.parquet")
    lacking = pd.read_parquet(second).drop(columns=["u_age", "u_gender"])
    lacking.to_parquet(tmp_path / "lacking.parquet")
    found = stream_events(tmp_path / "lacking.parquet", cells.definitions)
    missing = cells.values.index(("age", "missing"))
    assert found.table("n")[missing, 0] == len(lacking) == found.table("n")[0, 0]
    assert (cells + found).table("n")[0, 0] == 6_000
    new = event_log(exposures(seed=1), tmp_path / "new.parquet", u_plan="gold")
    with pytest.raises(LogError, match="user feature 'plan' is new since the cells"):
        stream_events(new, cells.definitions)


def test_some_files_of_the_event_log_are_read_alone(tmp_path: Path) -> None:
    days = [event_log(exposures(seed=i), tmp_path / f"day=1970-01-0{i + 1}" / "part-0000.parquet") for i in range(3)]
    found = stream_events(tmp_path, files=days[1:])
    assert found.table("n")[0, 0] == 6_000
    apart = [stream_events(day, found.definitions) for day in days[1:]]
    assert_equal(apart[0] + apart[1], found)
