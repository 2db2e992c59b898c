from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kaleidoscope.exposure import exposure_independence, logging_policy, srm
from kaleidoscope.log import Log, read_log
from kaleidoscope.log_schema import LogSchema


def a_log(tmp_path: Path, columns: dict[str, Any], **schema: Any) -> Log:
    frame = pd.DataFrame(columns)
    if "y" not in frame and "label" not in schema and "clicks" not in schema:
        frame["y"] = np.arange(len(frame)) % 2
    path = tmp_path / "log.parquet"
    frame.to_parquet(path, index=False)
    outcome = {} if "clicks" in schema else {"label": "y"}
    return read_log(path, LogSchema.model_validate(outcome | {"variant": ("arm",)} | schema))


# ---- SRM


def test_nothing_is_judged_without_designed_shares(tmp_path: Path) -> None:
    assert srm(a_log(tmp_path, {"arm": [*"abab"]})) is None
    assert srm(a_log(tmp_path, {"arm": [*"abab"]}, arms={"a": 1, "c": 1})) is None


@pytest.mark.parametrize(
    ("designed", "shown", "flagged"),
    [
        ("uniform", [0.5, 0.5], False),
        ("uniform", [0.53, 0.47], True),
        ({"a": 53, "b": 47}, [0.53, 0.47], False),
        ({"a": 53, "b": 47}, [0.5, 0.5], True),
        ({"a": 1, "b": 1, "never shown": 1}, [0.5, 0.5], True),
        ({"a": 1, "b": 1, "switched off": 0}, [0.5, 0.5], False),
        ({"a": 1, "b": 0, "c": 1}, [0.5, 0.5], True),
    ],
)
def test_shares_are_compared_with_the_design(tmp_path: Path, designed: Any, shown: list[float], flagged: bool) -> None:
    arm = np.random.default_rng(0).choice(["a", "b"], 20_000, p=shown)
    found = srm(a_log(tmp_path, {"arm": arm}, arms=designed))
    assert found is not None and found.flagged == flagged and found.counted == "exposures"
    assert bool(found.deviations) == flagged


def test_units_are_counted_not_exposures(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    p_values = []
    for _ in range(40):  # by exposures, one in two would be flagged
        exposures = rng.geometric(0.05, 400)
        arm = np.repeat(rng.choice(["a", "b", "c"], 400), exposures)
        found = srm(
            a_log(tmp_path, {"arm": arm, "who": np.repeat(np.arange(400), exposures)}, unit="who", arms="uniform")
        )
        assert found is not None and found.counted == "units"
        p_values.append(found.p_value)
    assert np.mean(np.array(p_values) < 0.05) <= 0.15 and np.mean(p_values) == pytest.approx(0.5, abs=0.15)


def test_units_that_see_several_variants_are_clusters(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    p_values = []
    for _ in range(40):  # every unit draws among two arms of its own: the design effect is large
        own = rng.integers(0, 4, (300, 2))
        who = np.repeat(np.arange(300), 20)
        arm = own[who, rng.integers(0, 2, len(who))]
        found = srm(a_log(tmp_path, {"arm": arm, "who": who}, unit="who", arms="uniform"))
        assert found is not None and found.counted == "exposures"
        p_values.append(found.p_value)
    assert np.mean(np.array(p_values) < 0.05) <= 0.15 and np.mean(p_values) == pytest.approx(0.5, abs=0.15)


def test_one_rare_tag_value_is_seen_among_many_variants(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    copy, image, colour = rng.integers(0, 10, (3, 40_000))
    columns = {"copy": copy, "image": image, "colour": colour}
    names = {"variant": ("copy", "image", "colour"), "arms": "uniform"}
    clean = srm(a_log(tmp_path, columns, **names))
    assert clean is not None and not clean.flagged
    kept = (image != 7) | (rng.random(40_000) < 0.85)
    found = srm(a_log(tmp_path, {k: v[kept] for k, v in columns.items()}, **names))
    assert found is not None and found.flagged and found.deviations[0].arm == "7"


def test_more_variants_than_exposures_do_not_alarm(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    p_values = []
    for _ in range(40):
        found = srm(a_log(tmp_path, {"arm": rng.integers(0, 3000, 2000)}, arms={str(i): 1 for i in range(3000)}))
        assert found is not None
        p_values.append(found.p_value)
    assert min(p_values) > 0.001 and np.mean(p_values) == pytest.approx(0.5, abs=0.2)


def test_small_counts_are_simulated(tmp_path: Path) -> None:
    found = srm(a_log(tmp_path, {"arm": ["a"] * 8 + ["b"] * 0 + ["c"]}, arms={"a": 1, "b": 1, "c": 1}))
    assert found is not None and found.p_value == pytest.approx(0.0038, abs=0.002)  # exact multinomial


def test_groups_are_judged_each_over_its_own_arms(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    test = rng.integers(0, 100, 50_000)
    arm = test * 10 + rng.integers(0, 2 + test % 3)
    names = {"group": "test", "arms": "uniform"}
    clean = srm(a_log(tmp_path, {"arm": arm, "test": test}, **names))
    assert clean is not None and not clean.flagged and len(clean.groups) <= 1
    bad = np.isin(test, [3, 40, 77]) & (arm % 10 == 0) & (rng.random(50_000) < 0.6)
    found = srm(a_log(tmp_path, {"arm": arm[~bad], "test": test[~bad]}, **names))
    assert found is not None and found.flagged and {g.group for g in found.groups} >= {"3", "40", "77"}
    assert found.failed_share > 0.02 and found.p_value < 1e-3


def test_a_row_of_an_aggregated_log_is_an_arm(tmp_path: Path) -> None:
    columns = {"arm": [*"aab", *"ab"], "test": [1, 1, 1, 2, 2], "i": [1000, 1010, 990, 500, 590], "c": [5, 6, 7, 3, 4]}
    names = {"clicks": "c", "impressions": "i", "arms": "uniform"}
    grouped = srm(a_log(tmp_path, columns, group="test", **names))
    assert grouped is not None and not grouped.flagged and grouped.p_value == 1
    alone = srm(a_log(tmp_path, columns, **names))
    assert alone is not None and not alone.flagged  # "b" is two rows of five, with 39 % of the impressions


@pytest.mark.real_data
def test_flags_the_bad_window_and_passes_the_clean_weeks(data_dir: Path) -> None:
    path = data_dir / "upworthy/upworthy.parquet"
    frame = pd.read_parquet(path, columns=["bad_randomisation_window"])
    schema = LogSchema(
        clicks="clicks", impressions="impressions", group="clickability_test_id", variant=("headline",), arms="uniform"
    )
    log = read_log(path, schema)
    bad = frame["bad_randomisation_window"].to_numpy()[log.file_row]
    clean, window = srm(log.take(~bad)), srm(log.take(bad))
    assert clean is not None and not clean.flagged and len(clean.groups) == 10
    assert window is not None and window.flagged and len(window.groups) == pytest.approx(0.66 * 743, rel=0.01)


@pytest.mark.real_data
def test_passes_a_randomised_campaign(data_dir: Path) -> None:
    schema = LogSchema(label="visit", variant=("segment",), arms="uniform")
    log = read_log(data_dir / "hillstrom/hillstrom.csv", schema)
    for part in (log, log.take(log.variant != 1)):
        found = srm(part)
        assert found is not None and not found.flagged and found.p_value > 0.05


# ---- logging policy


def test_a_context_that_changes_nothing_gives_one_choice_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arm = rng.choice(4, 8000, p=[0.4, 0.3, 0.295, 0.005])
    support = logging_policy(a_log(tmp_path, {"arm": arm, "page": rng.integers(0, 20, 8000)}, context="page"))
    assert np.isinf(support.concentration) and support.indptr.tolist() == [0, 3]
    assert support.variant.tolist() == [0, 1, 2]  # the fourth is shown less than a tenth of uniform
    assert support.propensity == pytest.approx(np.bincount(arm)[arm] / 8000)
    assert support.eligible.tolist() == (arm != 3).tolist() and set(support.n_eligible.tolist()) == {3}


def test_propensities_follow_the_context_never_the_user(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    shares = np.array([[0.6, 0.4, 0.0], [0.1, 0.2, 0.7]])
    page = rng.integers(0, 2, 6000)
    arm = np.array([rng.choice(3, p=shares[c]) for c in page])
    columns = {"arm": arm, "page": page, "age": arm}
    support = logging_policy(a_log(tmp_path, columns, context="page", user="age"))
    assert support.estimated and support.propensity == pytest.approx(shares[page, arm], abs=0.03)
    assert support.n_eligible.tolist() == np.where(page == 0, 2, 3).tolist()
    total = np.add.reduceat(support.probability, support.indptr[:-1])
    assert total == pytest.approx(1, abs=0.01)


def test_known_propensities_are_kept(tmp_path: Path) -> None:
    known = np.full(200, 0.25)
    support = logging_policy(a_log(tmp_path, {"arm": np.arange(200) % 3, "p": known}, propensity="p"))
    assert not support.estimated and support.propensity.tolist() == known.tolist()
    assert support.probability == pytest.approx(1 / 3, abs=0.01)


def test_rare_contexts_lean_on_the_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    page = np.minimum(rng.geometric(0.01, 20_000), 400)
    chance = np.random.default_rng(9).dirichlet([20, 20, 20], 401)
    arm = (rng.random(20_000)[:, None] > np.cumsum(chance[page], axis=1)).sum(axis=1)
    log = a_log(tmp_path, {"arm": arm, "page": page.astype(str)}, context="page")
    support = logging_policy(log)
    assert 30 < support.concentration < 120  # the planted one is 60
    cell = log.cells(("page",))
    raw = np.bincount(cell * 3 + arm, minlength=3 * (cell.max() + 1)).reshape(-1, 3)
    raw = (raw / raw.sum(axis=1, keepdims=True))[cell, arm]
    truth = chance[page, arm]
    assert np.square(support.propensity - truth).mean() < 0.7 * np.square(raw - truth).mean()


def test_groups_have_their_own_variants(tmp_path: Path) -> None:
    test = np.repeat([0, 1], 300)
    arm = np.where(test == 0, np.arange(600) % 2, 2 + np.arange(600) % 3)
    support = logging_policy(a_log(tmp_path, {"arm": arm, "test": test}, group="test"))
    sets = [support.variant[a:b].tolist() for a, b in zip(support.indptr[:-1], support.indptr[1:], strict=True)]
    assert sets == [[0, 1], [2, 3, 4]] and support.choice_set.tolist() == test.tolist()


@pytest.mark.real_data
def test_support_of_a_log_whose_context_decides(data_dir: Path) -> None:
    schema = LogSchema(label="Y", context=("destination", "time"), variant=("coupon", "expiration"))
    path = data_dir / "coupon/coupons_uci.csv"
    two = logging_policy(read_log(path, schema))
    assert (two.n_eligible == 10).mean() == pytest.approx(0.43, abs=0.01)
    five = ("destination", "passanger", "weather", "temperature", "time")
    assert (logging_policy(read_log(path, schema.model_copy(update={"context": five}))).n_eligible < 10).all()


# ---- independence


def a_world(tmp_path: Path, seed: int, n: int, policy: str, repeat: int = 1) -> Log:
    """Five user fields, one of them behind the context; what the policy looks at is its name."""
    rng = np.random.default_rng(seed)
    unit = np.repeat(np.arange(n // repeat), repeat)
    user = {f"u{i}": rng.integers(0, k, n // repeat)[unit] for i, k in enumerate([2, 4, 6, 10, 3])}
    page = np.where(rng.random(n) < 0.7, user["u0"], rng.integers(0, 4, n))
    copy, layout = rng.integers(0, 5, n), rng.integers(0, 3, n)
    looked = {
        "nothing": copy,
        "sticky": rng.integers(0, 5, n // repeat)[unit],
        "context": page,
        "user": user["u1"],
        "crossed": (user["u0"] + user["u1"]) % 2,
        "user and context": (user["u1"] + page) % 2,
    }[policy]
    copy = looked if policy == "sticky" else np.where(rng.random(n) < 0.25, looked, copy)
    columns = {**user, "page": page, "copy": copy, "layout": layout, "who": unit}
    return a_log(tmp_path, columns, unit="who", context="page", user=tuple(user), variant=("copy", "layout"))


@pytest.mark.parametrize("policy", ["user", "crossed", "user and context"])
def test_a_policy_that_looks_at_the_user_is_seen(tmp_path: Path, policy: str) -> None:
    found = exposure_independence(a_world(tmp_path, 0, 4000, policy, repeat=2))
    assert found.dependent and found.p_value == pytest.approx(0.01)
    assert max(found.gain, key=found.gain.__getitem__) in ("copy", "variant_id") and found.gain["layout"] < 0.002


@pytest.mark.parametrize(("policy", "repeat"), [("context", 1), ("sticky", 4)])
def test_a_policy_that_does_not_is_not(tmp_path: Path, policy: str, repeat: int) -> None:
    p_values = []
    for seed in range(20):
        found = exposure_independence(a_world(tmp_path, seed, 1200, policy, repeat), permutations=19, seed=seed)
        assert not found.dependent
        p_values.append(found.p_value)
    assert np.mean([p is not None and p <= 0.05 for p in p_values]) <= 0.2


def test_without_user_columns_there_is_nothing_to_test(tmp_path: Path) -> None:
    found = exposure_independence(a_log(tmp_path, {"arm": [*"abab"]}))
    assert found.p_value is None and not found.dependent and found.gain == {}


@pytest.mark.real_data
def test_a_randomised_campaign_is_independent(data_dir: Path) -> None:
    user = ("recency", "history", "mens", "womens", "zip_code", "newbie", "channel")
    log = read_log(data_dir / "hillstrom/hillstrom.csv", LogSchema(label="visit", user=user, variant=("segment",)))
    found = exposure_independence(log)
    assert not found.dependent and found.p_value is not None and found.p_value > 0.05
