from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from kaleidoscope.buckets import (
    STEPS,
    assign,
    assign_many,
    draw01,
    draw64,
    gbhash,
    gbhash_many,
    in_canary,
    keyed_digest,
)
from kaleidoscope.errors import InputError
from kaleidoscope.vocabulary import Bucket

# Written by JavaScript's own strings; the suites of both languages read it.
VECTORS = json.loads((Path(__file__).parent.parent / "vectors" / "buckets.json").read_text())["cases"]
UNITS = [f"user-{i}" for i in range(100_000)]
KEY = b"0123456789abcdef"
SEED = "acme/coupon/bucket"
SHARES = {Bucket.CONTROL: 0.1, Bucket.RANDOM: 0.05, Bucket.MODEL: 0.7, Bucket.CHALLENGER: 0.15}


@st.composite
def shares(draw: st.DrawFn) -> dict[Bucket, float]:
    """Shares of whole per cents, so that the expected edges are exact."""
    cuts = sorted(draw(st.lists(st.integers(0, 100), min_size=3, max_size=3)))
    parts = [b - a for a, b in zip([0, *cuts], [*cuts, 100], strict=True)]
    return dict(zip(Bucket, (part / 100 for part in parts), strict=True))


@pytest.fixture(scope="module")
def one_unit_per_step() -> list[str]:
    """A unit for each of the hash's 10,000 steps, in their order: shares are then counted, not estimated."""
    units = [f"u{i}" for i in range(200_000)]
    _, first = np.unique(gbhash_many(SEED, units), return_index=True)
    assert len(first) == STEPS
    return [units[i] for i in first]


@pytest.mark.parametrize(
    ("seed", "value", "expected"),
    [("seed", "a", 0.0505), ("seed", "b", 0.2696), ("foo", "ab", 0.2575), ("foo", "def", 0.2019)],
)
def test_agrees_with_the_public_vectors(seed: str, value: str, expected: float) -> None:
    assert gbhash(seed, value) == expected


def test_agrees_with_javascript_on_every_script_and_on_lone_surrogates() -> None:
    assert any(ord(c) > 0xFFFF for case in VECTORS for c in case["value"])
    assert [gbhash(case["seed"], case["value"]) for case in VECTORS] == [case["hash"] for case in VECTORS]


@pytest.mark.parametrize("seed", sorted({case["seed"] for case in VECTORS}))
def test_hashes_many_as_one_by_one(seed: str) -> None:
    cases = [case for case in VECTORS if case["seed"] == seed]
    assert gbhash_many(seed, [case["value"] for case in cases]).tolist() == [case["hash"] for case in cases]


@given(st.text(max_size=5), st.lists(st.text(st.characters(), max_size=30), max_size=20))
def test_hashes_any_text_vectorised_as_one_by_one(seed: str, values: list[str]) -> None:
    assert gbhash_many(seed, values).tolist() == [gbhash(seed, value) for value in values]


def test_hashes_more_values_than_fit_a_chunk() -> None:
    hashes = gbhash_many(SEED, UNITS)
    assert [hashes[i] for i in (0, 65_535, 65_536, 99_999)] == [
        gbhash(SEED, UNITS[i]) for i in (0, 65_535, 65_536, 99_999)
    ]


def test_units_are_uniform_over_the_steps() -> None:
    counts = np.bincount((gbhash_many(SEED, UNITS) * 100).astype(int), minlength=100)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_each_bucket_gets_exactly_its_share_of_the_steps(one_unit_per_step: list[str]) -> None:
    counts = Counter(assign_many(SHARES, SEED, one_unit_per_step))
    assert counts == {bucket: round(share * STEPS) for bucket, share in SHARES.items()}


def test_assigns_many_as_one_by_one(one_unit_per_step: list[str]) -> None:
    many = assign_many(SHARES, SEED, one_unit_per_step)
    assert list(many[::7]) == [assign(SHARES, SEED, unit) for unit in one_unit_per_step[::7]]
    assert isinstance(many[0], Bucket)


def test_control_is_first_then_model_challenger_and_random(one_unit_per_step: list[str]) -> None:
    buckets = assign_many(SHARES, SEED, one_unit_per_step)
    assert list(dict.fromkeys(buckets)) == [Bucket.CONTROL, Bucket.MODEL, Bucket.CHALLENGER, Bucket.RANDOM]


@given(before=shares(), after=shares())
@settings(max_examples=50, deadline=None)
def test_no_more_units_than_the_difference_enter_or_leave_control_and_random(
    before: dict[Bucket, float], after: dict[Bucket, float], one_unit_per_step: list[str]
) -> None:
    old, new = (assign_many(shares, SEED, one_unit_per_step) for shares in (before, after))
    for bucket in (Bucket.CONTROL, Bucket.RANDOM):
        moved = np.count_nonzero((old == bucket) != (new == bucket))
        assert moved == round(abs(after[bucket] - before[bucket]) * STEPS)


@given(parts=st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda parts: sum(parts) > 0.01))
@settings(max_examples=50, deadline=None)
def test_any_shares_are_kept_to_within_two_steps(parts: list[float], one_unit_per_step: list[str]) -> None:
    shares = {bucket: part / sum(parts) for bucket, part in zip(Bucket, parts, strict=True)}
    counts = Counter(assign_many(shares, SEED, one_unit_per_step))
    for bucket, share in shares.items():
        assert abs(counts[bucket] - share * STEPS) <= 2
        assert counts[bucket] == 0 or share > 0


@pytest.mark.parametrize("error", [-9e-10, 9e-10])
@pytest.mark.parametrize("absent", Bucket)
def test_a_bucket_without_a_share_is_empty_whatever_rounding_left_over(
    absent: Bucket, error: float, one_unit_per_step: list[str]
) -> None:
    there = [bucket for bucket in Bucket if bucket != absent]
    shares = dict(zip(there, (0.3 + error, 0.3, 0.4), strict=True))
    assert set(assign_many(shares, SEED, one_unit_per_step)) == set(there)


def test_all_traffic_may_go_to_one_bucket(one_unit_per_step: list[str]) -> None:
    for bucket in Bucket:
        assert set(assign_many({bucket: 1.0}, SEED, one_unit_per_step)) == {bucket}


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({}, "sum to 0, not to 1"),
        ({Bucket.CONTROL: 0.5, Bucket.MODEL: 0.4}, "sum to 0.9, not to 1"),
        ({Bucket.CONTROL: -0.5, Bucket.MODEL: 1.5}, "control is -0.5"),
        ({Bucket.CONTROL: float("nan"), Bucket.MODEL: 1.0}, "control is nan"),
    ],
)
def test_refuses_shares_that_are_none(shares: dict[Bucket, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assign(shares, SEED, "u")
    with pytest.raises(InputError, match=message):
        assign_many(shares, SEED, ["u"])


def test_who_is_in_the_canary_stays_in_as_it_grows(one_unit_per_step: list[str]) -> None:
    inside: set[str] = set()
    for share in (0.0, 0.01, 0.05, 0.2, 0.5, 1.0):
        now = {unit for unit in one_unit_per_step if in_canary(SEED, unit, share)}
        assert inside <= now
        assert len(now) == round(share * STEPS)
        inside = now


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_refuses_a_canary_that_is_no_share(share: float) -> None:
    with pytest.raises(InputError, match="Give a share between 0 and 1"):
        in_canary(SEED, "u", share)


def independence_p(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    table, _, _ = np.histogram2d(left, right, bins=20, range=((0, 1), (0, 1)))
    return float(stats.chi2_contingency(table).pvalue)


def test_canary_and_buckets_are_independent() -> None:
    buckets, canary = (gbhash_many(f"acme/coupon/{what}", UNITS) for what in ("bucket", "canary"))
    assert independence_p(buckets, canary) > 1e-3
    assert independence_p(buckets, buckets) < 1e-9  # the test sees dependence


def test_scenes_are_split_independently() -> None:
    assert independence_p(gbhash_many("acme/a/bucket", UNITS), gbhash_many("acme/b/bucket", UNITS)) > 1e-3


def test_draws_are_uniform() -> None:
    draws = np.array([draw01(KEY, "release", unit) for unit in UNITS[:20_000]])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-3


def test_every_bit_of_a_draw_is_a_coin() -> None:
    draws = np.array([draw64(KEY, unit) for unit in UNITS[:20_000]], np.uint64)
    heads = np.array([((draws >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)])
    assert np.abs(heads - 0.5).max() < 4.5 * 0.5 / np.sqrt(len(draws))


def test_a_draw_is_the_upper_53_bits() -> None:
    assert draw01(KEY, "a", "b") == (draw64(KEY, "a", "b") >> 11) / 2**53


@pytest.mark.parametrize(
    ("one", "other"),
    [(("ab", "c"), ("a", "bc")), (("a",), ("a", "")), ((), ("",)), (("a", "b"), ("b", "a")), (("é",), ("e\u0301",))],
)
def test_different_parts_draw_differently(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    assert draw64(KEY, *one) != draw64(KEY, *other)


def test_another_key_draws_differently() -> None:
    assert draw64(KEY, "a") != draw64(KEY + b"0", "a")


@pytest.mark.parametrize("key", [b"", bytes(65)])
def test_refuses_a_key_that_is_none(key: bytes) -> None:
    with pytest.raises(InputError, match="Give a secret of 1 to 64"):
        draw64(key, "a")


def test_a_digest_has_the_size_asked_for() -> None:
    assert len(keyed_digest(KEY, "a", size=16)) == 16
    assert int.from_bytes(keyed_digest(KEY, "a")) == draw64(KEY, "a")


def test_another_process_assigns_and_draws_the_same() -> None:
    code = (
        "from kaleidoscope.buckets import *\n"
        f"print(draw64({KEY!r}, 'release', '用户'), gbhash({SEED!r}, '用户'))\n"
        "print(assign({'model': 0.5, 'control': 0.5}, 's', '用户'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [
        str(draw64(KEY, "release", "用户")),
        str(gbhash(SEED, "用户")),
        str(assign({Bucket.MODEL: 0.5, Bucket.CONTROL: 0.5}, "s", "用户")),
    ]
