"""The log as sums: they add, and what is read off them is what others compute."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import StratifiedTable

from attribution.cells import ANYTHING, EVERYONE, REPLICATES, Cells, Table
from attribution.coding import Coded, code
from attribution.insights import main_effects
from kaleidoscope.errors import InputError
from tests.attribution.logs import TAGS, Array, liking, log_of


def example(n: int = 400, seed: int = 0) -> Coded:
    rng = np.random.default_rng(seed)
    user = {"gender": rng.choice(["f", "m"], n).tolist(), "age": rng.integers(0, 40, n)}
    log = log_of(
        user, TAGS, rng.integers(0, 6, n), rng.random(n) < 0.3, weight=rng.uniform(0.5, 2, n),
        context={"hour": rng.choice(["am", "pm"], n).tolist()}, unit=rng.integers(0, n, n),
    )  # fmt: skip
    return code(log, dependent=False)


def as_mapping(cells: Cells) -> dict[tuple[object, ...], Array]:
    names = zip(cells.stratum, cells.replicate, cells.value, cells.tag, strict=True)
    keys = [(cells.strata[s], r, cells.values[v], cells.tags[t]) for s, r, v, t in names]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, cells.sums, strict=True))


@settings(max_examples=15, deadline=None)
@given(part=st.lists(st.integers(0, 3), min_size=400, max_size=400), seed=st.integers(0, 3))
def test_any_split_of_the_rows_gives_the_same_sums(part: list[int], seed: int) -> None:
    coded = example(seed=seed)
    replicate = np.arange(400) * 7 % REPLICATES
    whole = as_mapping(Cells.of(coded, replicate))
    rows = [np.flatnonzero(np.array(part) == k) for k in range(4)]
    shards = [Cells.of(replace(coded.take(r), unit=None), replicate[r]) for r in rows if len(r)]
    merged = as_mapping(reduce(add, shards))
    assert merged.keys() == whole.keys()
    assert all(merged[key][:2].tolist() == whole[key][:2].tolist() for key in whole)  # whole numbers: exactly
    assert all(merged[key] == pytest.approx(whole[key], rel=1e-12) for key in whole)


def test_days_with_other_tags_and_strata_add_by_their_names() -> None:
    row = np.arange(120)
    day = code(log_of({}, {"tone": [["calm"], ["loud"]]}, row % 2, row % 3 == 0, group=["a"] * 120))
    next_day = code(log_of({}, {"tone": [["shy"], ["loud"]]}, row % 2, row % 3 == 0, group=["b"] * 120))
    both = Cells.of(day) + Cells.of(next_day)
    assert both.strata == ("a", "b")
    assert both.tags == (ANYTHING, (("tone", "calm"),), (("tone", "loud"),), (("tone", "shy"),))
    assert both.table("n")[0].tolist() == [240, 60, 120, 60]


def test_cells_with_other_bins_or_weights_are_not_added() -> None:
    cells = Cells.of(example())
    later = Cells.of(example(seed=1))
    with pytest.raises(InputError, match=r"bins of 'age' are .* here and .* there.*definitions"):
        cells + later
    for change, message in (
        ({"inverse_scale": 2.0}, "different scales"), ({"period": "day"}, "periods are None here and 'day'"),
        ({"pairs": True}, "only one of them has sums of pairs"), ({"stabilised": False}, "weighted in different ways"),
        ({"fields": ()}, r"user fields are \['gender', 'age'\] here and \[\]"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            cells + replace(cells, definitions=replace(cells.definitions, **change))


def several() -> Cells:
    """Cells of two buckets and two periods, with pairs; names hold what files must not mistake."""
    rng = np.random.default_rng(0)
    values = (EVERYONE, ("a=b", "c"), ("a", "b=c"), ("a", "b & c"))
    tags = (ANYTHING, (("tone", "loud"), ("style", "real")), (("tone", "loud & style=real"),), (("x", "y"),))
    sizes, n = (2, 2, 2, 64, 4, 4), 3_000
    codes = np.stack([rng.integers(0, size, n) for size in sizes])
    pairs = np.concatenate([codes[:4], np.sort(rng.permuted(np.tile([1, 2, 3], (n, 1)), axis=1)[:, :2].T, axis=0)])
    return Cells(
        Cells.of(example()).definitions, ("hour=am", ""), ("model", "random"), ("2030-01-01", ""), values, tags,
        Table.of(codes, rng.random((n, 6))), Table.of(pairs, rng.random((n, 6))), Table.of(pairs, rng.random((n, 6))),
        clipped=3.0,
    )  # fmt: skip


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    for cells in (several(), Cells.of(example())):
        cells.save(tmp_path / "cells.parquet")
        found = Cells.load(tmp_path / "cells.parquet")
        for name in ("definitions", "strata", "buckets", "periods", "values", "tags", "clipped"):
            assert getattr(found, name) == getattr(cells, name)
        for name in ("main", "value_pairs", "tag_pairs"):
            assert np.array_equal(getattr(found, name).codes, getattr(cells, name).codes)
            assert np.array_equal(getattr(found, name).sums, getattr(cells, name).sums)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.parquet"]


def test_files_hold_names_that_anybody_can_read(tmp_path: Path) -> None:
    cells = Cells.of(example())
    cells.save(tmp_path / "cells.parquet")
    rows = pq.read_table(tmp_path / "cells.parquet").to_pandas()
    women = rows[(rows["cells"] == "main") & (rows["first"] == "gender=f") & (rows["second"] == "tone=loud")]
    at = cells.values.index(("gender", "f")), cells.tags.index((("tone", "loud"),))
    assert women.n.sum() == cells.table("n")[at]
    assert set(rows.stratum) == {"hour=am", "hour=pm"}


def test_damaged_files_and_those_of_something_else_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cells.parquet"
    Cells.of(example()).save(path)
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", whole[:100] + bytes(len(whole) - 200) + whole[-100:]):
        path.write_bytes(broken)
        with pytest.raises(InputError, match=r"cells.parquet: cannot be read"):
            Cells.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        Cells.load(tmp_path / "nowhere.parquet")
    path.write_bytes(whole)
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"kaleidoscope.cells"])
    pq.write_table(table.replace_schema_metadata({"kaleidoscope.cells": json.dumps({**about, "version": 9})}), path)
    with pytest.raises(InputError, match="version 9 of the format"):
        Cells.load(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(InputError, match="holds no cells"):
        Cells.load(path)


def test_parts_by_bucket_and_by_period_add_up_to_the_whole() -> None:
    cells = several()
    for parts in (cells.by_bucket(), cells.by_period()):
        assert sum(part.table("clicks") for part in parts.values()) == pytest.approx(cells.table("clicks"))
        pairs = sum(part.tag_pair_table("weight") for part in parts.values())
        assert pairs == pytest.approx(cells.tag_pair_table("weight"))
    assert list(cells.by_bucket()) == ["model", "random"]


def test_errors_of_a_ctr_are_by_unit() -> None:
    """Every unit clicks always or never: 2,000 exposures say as much as their 500 units."""
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(500), 4)
    log = log_of({}, TAGS, rng.integers(0, 6, 2_000), (rng.random(500) < 0.3)[unit], unit=unit)
    rate, error = Cells.of(code(log)).ctr()
    assert rate[0, 0] == pytest.approx(log.reward.mean())
    expected = np.sqrt(rate[0, 0] * (1 - rate[0, 0]) / 500)
    assert 0.75 * expected < error[0, 0] < 1.3 * expected


def test_sums_are_those_of_the_rows() -> None:
    coded = example()
    cells, carried = Cells.of(coded), coded.carried.toarray()[coded.variant]
    value = coded.codes[0] == 0
    at = cells.values.index(("gender", "f")), 1
    inside = value & (carried[:, 0] > 0)
    assert cells.table("n")[at] == inside.sum()
    assert cells.table("clicks")[at] == coded.reward[inside].sum()
    assert cells.table("weighted_clicks")[at] == pytest.approx((coded.weight * coded.reward)[inside].sum())
    assert cells.table("squared_weight")[at] == pytest.approx((coded.weight**2)[inside].sum())
    assert cells.values[0] == EVERYONE and cells.table("n")[0, 0] == 400


def test_all_of_a_unit_is_in_one_replicate() -> None:
    row = np.arange(640)
    one = code(log_of({}, TAGS, row % 6, row % 2, unit=np.zeros(640, np.int64)))
    assert len(np.unique(Cells.of(one).replicate)) == 1
    many = code(log_of({}, TAGS, row % 6, row % 2, unit=row))
    assert len(np.unique(Cells.of(many).replicate)) == REPLICATES


def test_exposures_without_units_are_dealt_out_one_by_one() -> None:
    log = log_of({}, TAGS, np.arange(12) % 6, np.arange(12) >= 6, count=np.full(12, 6_400.0))
    cells = Cells.of(code(log))
    every = (cells.value == 0) & (cells.tag == 0)
    n = cells.sums[every, 0]
    assert len(n) == REPLICATES and n.sum() == 76_800
    assert 0.5 < n.std() / np.sqrt(n.mean()) < 1.6  # as chance deals


def test_preference_is_the_ratio_of_ratios() -> None:
    log, _ = liking(4_000, 0, 1.0)
    coded = code(log, dependent=False)
    cells, clicks = Cells.of(coded), coded.reward
    woman, loud = coded.codes[0] == 0, np.isin(coded.variant, (2, 3))
    expected = clicks[woman & loud].mean() / clicks[woman].mean() / (clicks[loud].mean() / clicks.mean())
    tag = cells.tags.index((("tone", "loud"),))
    found = cells.preference(np.array([cells.values.index(("gender", "f"))]))
    assert found[tag] == pytest.approx(expected)
    assert found[0] == pytest.approx(1)


def stratified(n: int = 6_000) -> tuple[Coded, StratifiedTable]:
    rng = np.random.default_rng(4)
    group = rng.integers(0, 5, n)
    loud = rng.random(n) < np.linspace(0.2, 0.7, 5)[group]
    clicks = rng.random(n) < np.linspace(0.05, 0.4, 5)[group] * np.where(loud, 1.3, 1.0)
    log = log_of(
        {}, {"tone": [["calm"], ["loud"]]}, loud.astype(int), clicks, group=[f"g{g}" for g in group], unit=np.arange(n)
    )
    tables = [
        np.array([[(clicks & of & g).sum(), (~clicks & of & g).sum()] for of in (loud, ~loud)])
        for g in (group == k for k in range(5))
    ]
    return code(log), StratifiedTable(tables)


def test_main_effects_are_mantel_haenszel_ratios_within_strata() -> None:
    coded, reference = stratified()
    found = {m.tag["tone"]: m for m in main_effects(Cells.of(coded))}
    assert found["loud"].effect + 1 == pytest.approx(reference.riskratio_pooled, rel=1e-9)
    assert found["loud"].ci_low < 0.3 < found["loud"].ci_high
    assert found["loud"].q_value < 0.01
    assert found["loud"].n == (coded.variant == 1).sum()
    assert found["calm"].effect < 0 < found["loud"].effect


def test_intervals_of_main_effects_hold_where_rows_of_a_unit_go_together() -> None:
    """Every unit sees one variant four times: errors by exposure would be half of what they are."""
    held, naive = 0, 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        unit = np.repeat(np.arange(500), 4)
        variant, taste = rng.integers(0, 2, 500)[unit], rng.beta(0.3, 0.7, 500)[unit]
        log = log_of({}, {"tone": [["calm"], ["loud"]]}, variant, rng.random(2_000) < taste, unit=unit)
        coded = code(log)
        found = main_effects(Cells.of(coded))[1]
        alone = main_effects(Cells.of(replace(coded, unit=None)))[1]
        held += found.ci_low <= 0 <= found.ci_high
        naive += alone.ci_low <= 0 <= alone.ci_high
    assert 108 <= held <= 119  # 95 % of 120, ± 3 standard errors
    assert naive < 100


@pytest.mark.parametrize("guests", [0.95, 1.0])
def test_main_effects_are_not_surer_for_an_id_that_most_exposures_share(guests: float) -> None:
    log = liking(6_000, 3, 0.0)[0]
    rng = np.random.default_rng(0)
    unit = np.where(rng.random(len(log)) < guests, 0, np.arange(len(log)))
    unit[:12] = np.arange(12)
    apart, shared = (main_effects(Cells.of(code(one, dependent=False))) for one in (log, replace(log, unit=unit)))
    for a, b in zip(apart, shared, strict=True):
        assert a.tag == b.tag and b.ci_high - b.ci_low > 0.75 * (a.ci_high - a.ci_low)


def test_what_the_naive_mix_reverses_propensities_set_right() -> None:
    """Simpson: loud is the worse telling for all, and mostly shown to those who click on anything."""
    rng = np.random.default_rng(1)
    n = 40_000
    keen = rng.random(n) < 0.5
    p_loud = np.where(keen, 0.9, 0.1)
    loud = rng.random(n) < p_loud
    clicks = rng.random(n) < np.where(keen, 0.3, 0.05) * np.where(loud, 0.8, 1.0)
    log = log_of(
        {"keen": np.where(keen, "yes", "no").tolist()}, {"tone": [["calm"], ["loud"]]}, loud.astype(int), clicks,
        propensity=np.where(loud, p_loud, 1 - p_loud), unit=np.arange(n),
    )  # fmt: skip
    assert clicks[loud].mean() > 2 * clicks[~loud].mean()
    loud_effect = next(m for m in main_effects(Cells.of(code(log))) if m.tag["tone"] == "loud")
    assert loud_effect.ci_low < -0.2 < loud_effect.ci_high < 0


@pytest.mark.parametrize("far", [1, 1 << 40])
def test_rows_of_a_table_are_sorted_and_those_of_the_same_codes_added(far: int) -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (6, 500)) * np.array([[far], [far], [1], [1], [1], [1]])  # too many for one number
    totals = rng.random((500, 6))
    table = Table.of(codes, totals)
    found = dict(zip(map(tuple, table.codes.T.tolist()), table.sums, strict=True))
    assert list(found) == sorted({tuple(row) for row in codes.T.tolist()})
    for row, sums in found.items():
        assert sums == pytest.approx(totals[(row == codes.T).all(axis=1)].sum(axis=0))
