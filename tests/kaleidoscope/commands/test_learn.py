"""The offline main job, end to end: verdicts on worlds whose truth is known, and on real logs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.special import expit

from kaleidoscope.commands.learn import learn_file, run_learn
from kaleidoscope.commands.simulate import personalised_truth, run_simulate
from kaleidoscope.encoding import Encoder
from kaleidoscope.errors import LogError
from kaleidoscope.log import read_log
from kaleidoscope.log_schema import LogSchema
from kaleidoscope.progress import Silent
from kaleidoscope.simulation import World, WorldSpec
from models.baselines import LightGbm
from models.batch import Examples
from models.metrics import AucSums
from models.train import fit_network

KEYS = {
    "rows", "units", "variants", "positive_rate", "checks", "srm", "exposure_independence", "model", "policy_value",
    "personalisation_gain", "verdict", "insights", "main_effects", "timings_s", "versions", "seed",
}  # fmt: skip

SMALL = WorldSpec(
    field_values=(4, 6, 3, 2), materials=(3, 3), dimension_values=(3, 3), base_ctr=0.2, interactions=3, seed=5
)


def learn(folder: Path, log: pa.Table | pd.DataFrame, schema: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(log, pd.DataFrame):
        log.to_csv(folder / "log.csv", index=False)
    else:
        pq.write_table(log, folder / "log.parquet")
    (folder / "schema.yaml").write_text(yaml.safe_dump(schema), encoding="utf-8")
    file = folder / ("log.csv" if isinstance(log, pd.DataFrame) else "log.parquet")
    return dict(run_learn(file, folder / "schema.yaml", folder / "out", seed=seed, progress=Silent()))


def spec(**changes: Any) -> WorldSpec:
    return WorldSpec(**{**vars(SMALL), **changes})


def codes(summary: dict[str, Any]) -> list[str]:
    return [check["code"] for check in summary["checks"]]


def preferences_of(world: World) -> dict[tuple[str, str, str, str], float]:
    """(field, value, dimension, tag) → how much more these like it than all users, in logits; of planted pairs."""
    return {
        (field, f"{field}_{v}", dimension, f"{dimension}_{t}"): float(table[v, t] - world.shares[f] @ table[:, t])
        for (f, d), table in world.tables.items()
        for field, dimension in [(world.field_names[f], world.dimension_names[d])]
        for v, t in np.ndindex(*table.shape)
    }


def preferences_in(summary: dict[str, Any], dimensions: tuple[str, ...]) -> dict[tuple[str, str, str, str], float]:
    return {
        (field, value, dimension, tag): insight["effect"]
        for insight in summary["insights"]
        for field, value in insight["segment"].items()
        for dimension, tag in insight["tag"].items()
        if dimension in dimensions
    }


def test_planted_preferences_are_worth_personalising(tmp_path: Path) -> None:
    world = World.draw(SMALL)
    summary = learn(tmp_path, world.log(20_000, np.random.default_rng(1)), world.schema())
    assert set(summary) == KEYS
    assert summary["verdict"] == "personalise"
    gain = summary["personalisation_gain"]
    assert gain["over"] == "best_single" and gain["ci_low"] > 0 and gain["permutation_p"] <= 0.05
    users = world.sample_users(20_000, np.random.default_rng(2))
    truth = world.value(users, world.best(users)), world.value(users, np.full(20_000, world.best_single(users)))
    personalised, single = summary["policy_value"]["personalised"], summary["policy_value"]["best_single"]
    assert abs(personalised["value"] - truth[0]) < 4 * personalised["se"]
    assert abs(single["value"] - truth[1]) < 4 * single["se"]
    assert summary["policy_value"]["best_per_context"] is None
    planted = preferences_of(world)
    found = preferences_in(summary, world.dimension_names)
    assert {(field, dimension) for field, _, dimension, _ in found} == {(f, d) for f, _, d, _ in planted}
    assert all(effect * planted[pair] > 0 for pair, effect in found.items() if abs(planted[pair]) > 0.1)
    assert {d for effect in summary["main_effects"] for d in effect["tag"]} > set(world.dimension_names)
    written = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(summary))
    assert "Personalise" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("seed", [0, 1])
def test_without_preferences_nothing_personal_is_claimed(tmp_path: Path, seed: int) -> None:
    world = World.draw(spec(interactions=0, seed=seed))
    summary = learn(tmp_path, world.log(10_000, np.random.default_rng(seed)), world.schema())
    assert summary["verdict"] != "personalise"


def test_a_preference_of_contexts_alone_is_called_that(tmp_path: Path) -> None:
    world = World.draw(spec(interactions=0, context_values=4, context_interactions=2, interaction_size=(0.6, 0.9)))
    summary = learn(tmp_path, world.log(20_000, np.random.default_rng(1)), world.schema())
    assert summary["verdict"] == "best_per_context"


def test_exposure_that_depends_on_the_user_supports_no_claim_unless_its_propensities_are_logged(
    tmp_path: Path,
) -> None:
    world, rng = World.draw(SMALL), np.random.default_rng(3)
    users = world.sample_users(20_000, rng)
    liked = world.logits(users)
    probability = 0.3 / world.n_variants + 0.7 * (liked == liked.max(axis=1, keepdims=True))
    shown = (rng.random((20_000, 1)) > np.cumsum(probability, axis=1)).sum(axis=1).clip(max=world.n_variants - 1)
    log = world.columns(users)
    for d, name in enumerate(world.dimension_names):
        log[name] = pa.array([f"{name}_{i}" for i in world.variant_tags[shown, d]])
    for s, name in enumerate(world.slot_names):
        log[name] = pa.array([f"{name}_{i}" for i in world.variant_materials[shown, s]])
    log["variant_id"] = pa.array([f"v_{i}" for i in shown])
    log["user_id"] = pa.array(np.arange(20_000))
    log["propensity"] = pa.array(probability[np.arange(20_000), shown])
    log["click"] = pa.array((rng.random(20_000) < expit(liked[np.arange(20_000), shown])).astype(int))
    table = pa.table(log)
    blind = learn(tmp_path / "blind", table, {**world.schema(), "propensity": None})
    assert blind["verdict"] == "inconclusive"
    assert blind["exposure_independence"]["dependent"]
    assert "exposure_depends_on_user" in codes(blind)
    assert set(blind["policy_value"].values()) == {None} and blind["personalisation_gain"] is None
    assert blind["model"]["auc"] is not None
    page = (tmp_path / "blind" / "out" / "report.html").read_text(encoding="utf-8")
    assert "No value is given for any way of choosing" in page and "Effective exposures" not in page
    known = learn(tmp_path / "known", table, world.schema())
    assert known["verdict"] != "inconclusive"
    users = world.sample_users(20_000, rng)
    truth = world.value(users, np.full(20_000, world.best_single(users)))
    single = known["policy_value"]["best_single"]
    assert abs(single["value"] - truth) < 4 * single["se"] + 0.02


def test_a_trace_of_dependence_on_the_user_is_a_warning(tmp_path: Path) -> None:
    rng, n = np.random.default_rng(4), 30_000
    keen = rng.random(n) < 0.5
    shown_a = rng.random(n) < np.where(keen, 0.54, 0.46)
    log = pd.DataFrame(
        {
            "y": (rng.random(n) < 0.2).astype(int),
            "mood": np.where(keen, "keen", "cool"),
            "copy": np.where(shown_a, "A", "B"),
            "p": np.where(shown_a == keen, 0.54, 0.46),
        }
    )
    schema = {"label": "y", "user": ["mood"], "variant": ["copy"]}
    unknown, known = learn(tmp_path / "a", log, schema), learn(tmp_path / "b", log, {**schema, "propensity": "p"})
    assert "exposure_trace_of_user" in codes(unknown)
    assert not unknown["exposure_independence"]["dependent"]
    assert not {"exposure_trace_of_user", "exposure_depends_on_user"} & set(codes(known))


def test_the_best_single_variant_is_not_the_one_that_was_shown_to_those_who_click_anyway(tmp_path: Path) -> None:
    rng, n = np.random.default_rng(3), 40_000
    keen, b = rng.random(n) < 0.5, rng.random(n)
    of_a = np.where(keen, 0.9, 0.1)  # keen users were shown A, whose clicks look better than they are
    shown_a = b < of_a
    rate = np.where(keen, np.where(shown_a, 0.45, 0.5), np.where(shown_a, 0.08, 0.1))
    log = pd.DataFrame(
        {
            "y": (rng.random(n) < rate).astype(int),
            "mood": np.where(keen, "keen", "cool"),
            "copy": np.where(shown_a, "A", "B"),
            "p": np.where(shown_a, of_a, 1 - of_a),
        }
    )
    summary = learn(tmp_path, log, {"label": "y", "user": ["mood"], "variant": ["copy"], "propensity": "p"})
    single = summary["policy_value"]["best_single"]
    assert single["ci_low"] > (0.45 + 0.08) / 2 + 0.005
    assert single["ci_low"] <= (0.5 + 0.1) / 2 <= single["ci_high"]


def test_a_log_without_user_features_is_judged_without_them(tmp_path: Path) -> None:
    world = World.draw(SMALL)
    summary = learn(tmp_path, world.log(10_000, np.random.default_rng(1)), {**world.schema(), "user": []})
    assert summary["policy_value"]["personalised"] is None and summary["personalisation_gain"] is None
    assert summary["model"]["baseline_auc"]["user_only"] is None
    assert summary["exposure_independence"]["p_value"] is None
    assert {"no_context", "no_user_features"} <= set(codes(summary))
    assert summary["verdict"] in ("best_single", "inconclusive")


def test_the_report_shows_the_auc_within_users_where_users_repeat(tmp_path: Path) -> None:
    for exposures, shown in [(4.0, True), (1.0, False)]:
        world = World.draw(spec(exposures_per_unit=exposures))
        folder = tmp_path / str(exposures)
        learn(folder, world.log(3_000, np.random.default_rng(1)), world.schema())
        page = (folder / "out" / "report.html").read_text(encoding="utf-8")
        assert ("AUC within users" in page) == shown


def test_pseudo_inverse_values_count_no_matched_exposures(tmp_path: Path) -> None:
    world = World.draw(spec(materials=(12, 12), dimension_values=(4, 4)))
    summary = learn(tmp_path, world.log(6_000, np.random.default_rng(1)), {**world.schema(), "variant_id": None})
    assert summary["policy_value"]["best_single"] is not None
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "dr, pseudo_inverse" in page
    cells = re.findall(r'data-label="Matched exposures" class="number">([^<]*)<', page)
    assert cells == ["6,000", "", "", ""]


def test_aggregated_tests_find_the_winners_within_each_group(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(4), []
    for test in range(60):
        for arm, rate in enumerate(rng.normal(0.1, 0.03, 4).clip(0.01)):
            n = int(rng.integers(900, 1_100))
            rows.append({"test": f"t{test}", "headline": f"h{test}-{arm}", "clicks": rng.binomial(n, rate), "shown": n})
    schema = {"scene": "tests", "clicks": "clicks", "impressions": "shown", "group": "test", "variant": ["headline"]}
    summary = learn(tmp_path, pd.DataFrame(rows), {**schema, "arms": "uniform"})
    assert summary["verdict"] == "best_single"
    assert summary["rows"] == 240 and summary["units"] == sum(r["shown"] for r in rows)
    value = summary["policy_value"]
    assert value["best_single"]["ci_low"] > value["uniform"]["ci_high"]


def test_the_same_seed_gives_the_same_summary(tmp_path: Path) -> None:
    world = World.draw(SMALL)
    log = world.log(3_000, np.random.default_rng(1))
    first, second = (learn(tmp_path / name, log, world.schema(), seed=3) for name in ("a", "b"))
    del first["timings_s"], second["timings_s"]
    assert first == second


def test_bad_input_leaves_nothing_behind(tmp_path: Path) -> None:
    world = World.draw(SMALL)
    log = world.log(2_000, np.random.default_rng(1))
    with pytest.raises(LogError, match="clicked"):
        learn(tmp_path, log, {**world.schema(), "label": "clicked"})
    assert not (tmp_path / "out").exists()


def test_too_few_units_are_refused_before_any_work(tmp_path: Path) -> None:
    world = World.draw(SMALL)
    log = world.log(2_000, np.random.default_rng(1))
    log = log.set_column(log.schema.get_field_index("user_id"), "user_id", pa.array(np.zeros(2_000, int)))
    with pytest.raises(LogError, match="1 unit in all 2,000 rows"):
        learn(tmp_path, log, world.schema())
    assert not (tmp_path / "out").exists()


def test_units_without_weight_do_not_count(tmp_path: Path) -> None:
    world = World.draw(SMALL)
    log = world.log(2_000, np.random.default_rng(1))
    log = log.append_column("w", pa.array((np.arange(2_000) < 9).astype(float)))
    click = log.schema.get_field_index("click")
    log = log.set_column(click, "click", pa.array(np.arange(2_000) % 2))
    with pytest.raises(LogError, match="9 units with a weight above 0 in all 2,000 rows"):
        learn(tmp_path, log, {**world.schema(), "weight": "w"})


def test_rows_of_weight_0_change_no_value(tmp_path: Path) -> None:
    world = World.draw(SMALL)
    log = world.log(3_000, np.random.default_rng(1))
    log = log.append_column("w", pa.array((np.arange(3_000) < 2_000) * 5.0))
    whole = learn(tmp_path / "whole", log, {**world.schema(), "weight": "w"})
    part = learn(tmp_path / "part", log.slice(0, 2_000), world.schema())
    assert whole["rows"] == 3_000 and whole["units"] == 3_000
    assert whole["policy_value"]["uniform"] == pytest.approx(part["policy_value"]["uniform"], rel=0.02)
    assert whole["model"]["auc"] is not None


def test_as_many_tags_as_variants_with_too_little_data_are_inconclusive(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    log = pd.DataFrame({"y": rng.integers(0, 2, 4_000), "u": rng.integers(0, 5, 4_000)})
    log["v"] = [f"v{i}" for i in rng.integers(0, 3_000, 4_000)]
    summary = learn(tmp_path, log, {"scene": "s", "label": "y", "user": ["u"], "variant": ["v"]})
    assert summary["verdict"] == "inconclusive"
    assert summary["policy_value"]["best_single"] is None


def test_a_failed_write_keeps_the_report_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World.draw(SMALL)
    log = world.log(2_000, np.random.default_rng(1))
    learn(tmp_path, log, world.schema())
    before = (tmp_path / "out" / "report.html").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(Exception, match="no space left"):
        learn(tmp_path, log, world.schema())
    assert (tmp_path / "out" / "report.html").read_bytes() == before


def test_the_demo_says_simulated_and_knows_the_truth(tmp_path: Path) -> None:
    summary = run_simulate(tmp_path, rows=3_000, seed=0, progress=Silent())
    truth = summary["simulated_truth"]
    assert isinstance(truth, dict)
    assert truth["uniform"] < truth["best_single"] < truth["oracle"]
    assert truth["uniform"] < truth["personalised"] < truth["oracle"]
    assert "imulated" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_truth_of_the_personalised_policy_is_what_its_estimate_estimates(tmp_path: Path) -> None:
    world, rng = World.draw(SMALL), np.random.default_rng(1)
    pq.write_table(world.log(20_000, rng), tmp_path / "log.parquet")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(world.schema()), encoding="utf-8")
    learned = learn_file(tmp_path / "log.parquet", tmp_path / "schema.yaml", tmp_path, seed=0, progress=Silent())
    truth = personalised_truth(world, world.sample_users(20_000, rng), learned)
    estimated: Any = learned.summary["policy_value"]
    assert abs(estimated["personalised"]["value"] - truth) < 3 * estimated["personalised"]["se"]
    assert truth > estimated["best_single"]["value"]


# ── real logs ───────────────────────────────────────────────────────────────────────────────────────────────────────

PROFILE = [
    "gender", "age", "maritalStatus", "has_children", "education", "occupation", "income", "car", "Bar", "CoffeeHouse",
    "CarryAway", "RestaurantLessThan20", "Restaurant20To50",
]  # fmt: skip
COUPON = {"scene": "coupon", "label": "Y", "unit": PROFILE, "context": ["destination", "time"], "user": PROFILE}


@pytest.mark.real_data
def test_coupon_three_arms_are_worth_personalising(data_dir: Path, tmp_path: Path) -> None:
    log = pd.read_csv(data_dir / "coupon" / "coupons_uci.csv")
    log = log[log["coupon"].isin(["Bar", "Coffee House", "Restaurant(20-50)"])]
    summary = learn(tmp_path, log, {**COUPON, "variant": ["coupon"]})
    assert summary["verdict"] in ("personalise", "inconclusive")
    assert summary["personalisation_gain"]["value"] > 0
    assert summary["personalisation_gain"]["over"] == "best_per_context"


@pytest.mark.real_data
def test_coupon_five_types_show_no_gain(data_dir: Path, tmp_path: Path) -> None:
    log = pd.read_csv(data_dir / "coupon" / "coupons_uci.csv")
    summary = learn(tmp_path, log, {**COUPON, "variant": ["coupon", "expiration"]})
    assert summary["verdict"] != "personalise"
    assert summary["personalisation_gain"]["ci_low"] < 0
    assert summary["model"]["auc"] >= summary["model"]["baseline_auc"]["lightgbm"] - 0.005


@pytest.mark.real_data
def test_hillstrom_emails_are_not_worth_personalising(data_dir: Path, tmp_path: Path) -> None:
    log = pd.read_csv(data_dir / "hillstrom" / "hillstrom.csv")
    schema = {
        "scene": "email", "label": "visit", "variant": ["segment"], "arms": "uniform",
        "user": ["recency", "history", "mens", "womens", "zip_code", "newbie", "channel"],
    }  # fmt: skip
    summary = learn(tmp_path, log, schema)
    assert summary["verdict"] == "best_single"
    assert abs(summary["personalisation_gain"]["value"]) < 0.003
    assert summary["model"]["auc"] == pytest.approx(0.65, abs=0.01)
    assert summary["srm"]["flagged"] is False


@pytest.mark.real_data
def test_upworthy_winners_gain_what_is_known_of_them(data_dir: Path, tmp_path: Path) -> None:
    log = pq.read_table(data_dir / "upworthy" / "upworthy.parquet").to_pandas()
    log = log[~log["bad_randomisation_window"] & (log["clickability_test_id"].str[-1].isin(list("0123")))]
    schema = {
        "scene": "headlines", "clicks": "clicks", "impressions": "impressions", "group": "clickability_test_id",
        "variant": ["headline", "eyecatcher_id"], "arms": "uniform",
    }  # fmt: skip
    summary = learn(tmp_path, log, schema)
    assert summary["verdict"] == "best_single" and summary["srm"]["flagged"] is False
    value = summary["policy_value"]
    assert 1.10 < value["best_single"]["value"] / value["uniform"]["value"] < 1.25


@pytest.mark.slow
@pytest.mark.real_data
def test_coupon_auc_holds_against_lightgbm_on_held_out_profiles(data_dir: Path, tmp_path: Path) -> None:
    log = pd.read_csv(data_dir / "coupon" / "coupons_uci.csv")
    context = [c for c in log.columns if c not in [*PROFILE, "coupon", "expiration", "Y"]]
    log.to_csv(tmp_path / "log.csv", index=False)
    schema = LogSchema(**{**COUPON, "context": context, "variant": ["coupon", "expiration"]})
    read = read_log(tmp_path / "log.csv", schema)
    encoder = Encoder.fit(
        read.columns, user=schema.user, context=schema.context, variants=read.variants, dimensions=schema.variant
    )
    examples, differences, network = Examples.of(read, encoder), [], []
    for seed in range(3):
        _, fold = read.folds(5, seed)
        for f in range(5):
            train, held = examples.take(np.flatnonzero(fold != f)), examples.take(np.flatnonzero(fold == f))
            ours = fit_network(train, encoder, seed=seed).logits(held.features, held.variant)
            trees = LightGbm.fit(train, encoder, seed=seed).predict(held.features, held.variant)
            auc, other = (AucSums.of(score, held.reward).value for score in (ours, trees))
            assert auc is not None and other is not None
            differences.append(auc - other)
            network.append(auc)
    found = f"network AUC {np.mean(network):.4f}, difference to LightGBM {np.mean(differences):+.4f}"
    assert np.mean(differences) >= -0.005, found
    assert np.mean(network) > 0.746, found  # an EBM's mean on such folds


@pytest.mark.slow
def test_null_worlds_are_seldom_called_personal(tmp_path: Path) -> None:
    verdicts = []
    for seed in range(40):
        world = World.draw(WorldSpec(interactions=0, materials=(3, 4), dimension_values=(3, 4), seed=seed))
        summary = learn(tmp_path / str(seed), world.log(50_000, np.random.default_rng(seed)), world.schema(), seed)
        verdicts.append(summary["verdict"])
    assert verdicts.count("personalise") <= 3, verdicts


@pytest.mark.slow
def test_planted_log_is_ranked_almost_as_the_oracle_does() -> None:
    world, rng = World.draw(WorldSpec(seed=11)), np.random.default_rng(12)
    hidden = rng.permutation(world.n_variants)[:200]
    users = world.sample_users(1_000_000, rng)
    shown = np.setdiff1d(np.arange(world.n_variants), hidden)
    columns, variants = world.columns(users), world.variants
    encoder = Encoder.fit(
        columns, user=world.field_names, context=[], variants=variants, dimensions=variants.column_names
    )
    variant = shown[rng.integers(0, len(shown), len(users))]
    reward = (rng.random(len(users)) < expit(world.logits_of(users, variant))).astype(np.float32)
    tags = encoder.tags(variants)
    ones, units = np.ones(len(users)), np.arange(len(users))
    model = fit_network(Examples(encoder.features(columns), variant, tags, reward, ones, units), encoder)
    fresh = world.sample_users(20_000, rng)
    picks = model.rank(encoder.features(world.columns(fresh))).argmax(axis=1)
    assert world.value(fresh, picks) >= 0.98 * world.value(fresh, world.best(fresh))
    held = world.sample_users(400_000, rng)
    at = rng.integers(0, world.n_variants, len(held))
    clicked = (rng.random(len(held)) < expit(world.logits_of(held, at))).astype(np.float32)
    score, unseen = model.logits(encoder.features(world.columns(held)), at), np.isin(at, hidden)
    on_hidden, on_seen = (AucSums.of(score[rows], clicked[rows]).value for rows in (unseen, ~unseen))
    assert on_hidden is not None and on_seen is not None
    assert abs(on_hidden - on_seen) < 0.01
