"""All pairs of codes as sums: the same whichever way they are counted."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attribution import tally as module
from attribution.replicates import REPLICATES
from attribution.tally import Batch, Column, Totals, cover, pack, tally, unpack
from kaleidoscope.errors import LogError


def example(n: int = 5_000, places: int = 3) -> Batch:
    """Four columns, whose last codes do not occur."""
    rng = np.random.default_rng(0)
    columns = [
        Column(rng.integers(0, size, n).astype(np.uint16), np.arange(100 * i, 100 * i + size + 1))
        for i, size in enumerate((3, 7, 5, 2))
    ]
    weight = rng.random(n)
    return Batch(
        columns, rng.integers(0, places, n), np.arange(places)[::-1] + 10, rng.integers(0, 64, n).astype(np.uint16),
        rng.integers(0, 2, n).astype(np.uint16), [None, weight],
    )  # fmt: skip


PAIRS = list(combinations(range(4), 2))


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=9).map(tuple), st.integers(1, 2_000), st.data()
)  # fmt: skip
def test_every_pair_is_read_off_one_block(sizes: tuple[int, ...], limit: int, data: st.DataObject) -> None:
    pairs = list(combinations(range(len(sizes)), 2))
    wanted = data.draw(st.lists(st.sampled_from(pairs), min_size=1, unique=True))
    blocks = cover(sizes, tuple(wanted), limit)
    assert sorted(pair for _, of in blocks for pair in of) == sorted(wanted)
    for columns, of in blocks:
        assert all(set(pair) <= set(columns) for pair in of) and list(columns) == sorted(set(columns))
        assert len(columns) == 2 or np.prod([sizes[c] for c in columns]) <= limit


def test_blocks_are_far_fewer_than_pairs() -> None:
    pairs = tuple(combinations(range(14), 2))
    assert len(cover((8,) * 14, pairs, 512)) <= 40 < len(pairs) == 91


@pytest.mark.parametrize(
    "settings",
    [{}, {"BLOCK": 1, "DENSE": 1}, {"BLOCK": 1}, {"BLOCK": 4_000}, {"BLOCK": 16, "DENSE": 9_000}, {"CHUNK": 1}],
)
def test_sums_do_not_depend_on_how_they_are_counted(settings: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = example()
    for name, value in settings.items():
        monkeypatch.setattr(module, name, value)
    parts = tally(batch, PAIRS)
    assert len(parts) == (3 if "CHUNK" in settings else 1)
    totals = Totals(2)
    for part in parts:
        totals.add(*part)
    keys, sums = (np.concatenate(of) for of in list(zip(*totals.of_places(), strict=True))[1:])
    assert len(keys) == sum(len(part[0]) for part in parts) == totals.cells
    order = np.argsort(keys)
    keys, sums = keys[order], sums[order]
    assert (np.diff(keys) > 0).all()
    found = {tuple(key): row for key, row in zip(np.stack(unpack(keys), axis=1).tolist(), sums, strict=True)}
    (_, weight), click = batch.amounts, batch.click == 1
    assert weight is not None
    for a, b in PAIRS:
        left, right = (batch.columns[c].items[batch.columns[c].codes] for c in (a, b))
        for place, replicate, x, y in ((10, 5, left[0], right[0]), (12, 63, left[1], right[1])):
            rows = (batch.places[batch.place] == place) & (batch.replicate == replicate) & (left == x) & (right == y)
            expected = [rows.sum(), (rows & click).sum(), weight[rows].sum(), weight[rows & click].sum()]
            assert found.get((place, replicate, x, y), np.zeros(4)) == pytest.approx(expected)
    assert sum(row[0] for row in found.values()) == len(PAIRS) * len(batch.click)


def test_keys_are_taken_apart_again() -> None:
    parts = [np.array([0, module.PLACES - 1]), np.array([0, REPLICATES - 1]), *2 * [np.array([0, module.ITEMS - 1])]]
    keys = pack(*parts)
    assert keys[0] == 0 and keys[1] > 0
    assert all((a == b).all() for a, b in zip(unpack(keys), parts, strict=True))


def test_totals_are_those_of_all_batches() -> None:
    totals = Totals(1)
    for keys in ([2, 5], [1, 2, 9], [5]):
        totals.add(np.array(keys), np.ones((len(keys), 2)))
    ((place, keys, sums),) = totals.of_places()
    assert place == 0 and keys.tolist() == [1, 2, 5, 9] and sums[:, 0].tolist() == [1, 2, 2, 1]
    far = pack(np.array([0, 3, 9]), *3 * [np.zeros(3, np.int64)]) + 2
    totals.add(far, np.ones((3, 2)))
    assert [(place, len(keys)) for place, keys, _ in totals.of_places()] == [(0, 4), (3, 1), (9, 1)]
    assert totals.cells == 6 and next(totals.of_places())[2][:, 0].tolist() == [1, 3, 2, 1]


def test_more_cells_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CELLS", 3)
    with pytest.raises(LogError, match=r"more than 3 cells.*without pairs"):
        tally(example(), PAIRS)
    totals = Totals(1)
    totals.add(np.arange(3), np.ones((3, 2)))
    with pytest.raises(LogError, match="more than 3 cells"):
        totals.add(np.arange(2, 4), np.ones((2, 2)))
