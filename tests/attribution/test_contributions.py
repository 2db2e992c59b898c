"""What models say of single exposures: proposed on one half of the units, believed on the other; and one decision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import lightgbm
import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.special import expit

from attribution.coding import code
from attribution.consensus import Agreement, agreements
from attribution.contributions import (
    ContributionResult,
    Why,
    explain_decision,
    lightgbm_contributions,
    network_contributions,
)
from attribution.ebm import ebm
from attribution.insights import attribute_coded, halves
from kaleidoscope.encoding import Encoder
from kaleidoscope.errors import InputError, NotFoundError
from kaleidoscope.log import Log
from kaleidoscope.ranker import Ranker
from kaleidoscope.vocabulary import Method
from models.batch import Examples
from models.export import export_model
from models.networks import DeepConfig, DeepPart
from models.tables import fit_tables
from models.train import CtrModel
from tests.attribution.logs import TAGS, liking, log_of

Array = np.ndarray[Any, np.dtype[Any]]


def proposals(found: ContributionResult) -> dict[tuple[str, str, int], Any]:
    return {(c.segment.field, c.segment.label, c.tag): c.importance for c in found.candidates}


# ── trees ──


def test_a_planted_preference_is_proposed_and_confirmed() -> None:
    coded = code(liking(60_000, 2, 0.6)[0], dependent=False)
    found = lightgbm_contributions(coded)
    (insight,) = found.insights
    assert insight.tag == {"tone": "loud"}
    sign = 1 if insight.segment == {"gender": "f"} else -1
    assert insight.ci_low < np.expm1(sign * 0.6) < insight.ci_high
    assert insight.methods == (Method.CONTRIBUTIONS,)
    assert insight.importance[Method.CONTRIBUTIONS] * insight.effect > 0
    assert found.importance[0][:2] == ("gender", "tone")
    assert [row[2] for row in found.importance] == sorted((row[2] for row in found.importance), reverse=True)
    assert found.auc is not None
    assert 0.55 < found.auc < 0.65


def test_contributions_are_in_logits() -> None:
    coded = code(liking(200_000, 2, 0.8, base=-1.0)[0], dependent=False)
    at = proposals(lightgbm_contributions(coded))
    tag = next(t for t, one in enumerate(coded.tags) if one.names == {"tone": "loud"})
    # Half of the users, a third of the variants: centred in both, 0.8 · (1 − 1/2) · (1 − 1/3) is left for those two.
    assert at["gender", "f", tag] == pytest.approx(0.8 / 3, rel=0.15)
    assert at["gender", "m", tag] == pytest.approx(-0.8 / 3, rel=0.15)


def test_what_matters_only_together_is_seen() -> None:
    """Neither the field nor the tag moves the click rate alone: a greedy tree has nothing to begin with."""
    rng, n = np.random.default_rng(3), 60_000
    user, variant = rng.integers(0, 2, n), rng.integers(0, 6, n)
    loud = np.isin(variant, (2, 3))
    clicks = rng.random(n) < expit(-2 + np.where(user == 1, 0.4, -0.4) * (loud - 1 / 3))
    more = {f"x{i}": rng.normal(size=n) for i in range(4)}
    log = log_of({"kind": np.array(["a", "b"])[user].tolist(), **more}, TAGS, variant, clicks, unit=np.arange(n))
    (insight,) = lightgbm_contributions(code(log, dependent=False)).insights
    assert (set(insight.segment), insight.tag) == ({"kind"}, {"tone": "loud"})


def test_where_nobody_prefers_anything_hardly_ever_something_is_found() -> None:
    found = [lightgbm_contributions(code(liking(6_000, s, 0.0, noise=2)[0], dependent=False)) for s in range(30)]
    assert sum(bool(one.insights) for one in found) <= 4  # 5 % allow no more with a probability of .98
    assert sum(bool(one.candidates) for one in found) > 20  # which is not for want of proposals


def test_proposals_know_nothing_of_the_half_that_confirms_them() -> None:
    coded = code(liking(20_000, 4, 0.6, rows_per_unit=2)[0], dependent=False)
    number = replace(coded, weight=np.arange(len(coded), dtype=float))
    inside = np.isin(number.weight, halves(number)[1].weight)
    assert 0.4 < inside.mean() < 0.6
    other = replace(coded, reward=np.where(inside, 1 - coded.reward, coded.reward))
    first, changed = lightgbm_contributions(coded), lightgbm_contributions(other)
    assert proposals(first) == proposals(changed)
    assert [i.effect for i in first.insights] != [i.effect for i in changed.insights]


def test_the_same_log_gives_the_same_result() -> None:
    coded = code(liking(20_000, 5, 0.6)[0], dependent=False)
    first, again = (lightgbm_contributions(coded, seed=1) for _ in range(2))
    assert (first.insights, first.candidates, first.auc) == (again.insights, again.candidates, again.auc)


def test_missing_numbers_lists_of_tags_and_weights_are_read() -> None:
    rng, n = np.random.default_rng(6), 60_000
    age = np.where(rng.random(n) < 0.3, np.nan, rng.normal(40, 10, n))
    variants = {"mood": [["calm"], ["calm", "warm"], ["warm"], []], "size": [["s"], ["l"], ["s"], ["l"]]}
    variant = rng.integers(0, 4, n)
    clicks = rng.random(n) < expit(-2 + 0.9 * np.isnan(age) * np.isin(variant, (1, 2)))
    log = log_of({"age": age}, variants, variant, clicks, unit=np.arange(n), weight=rng.uniform(0.5, 1.5, n))
    (insight,) = lightgbm_contributions(code(log, dependent=False)).insights
    assert (insight.segment, insight.tag) == ({"age": "missing"}, {"mood": "warm"})


def test_aggregated_rows_say_what_single_ones_say() -> None:
    rng, n = np.random.default_rng(7), 40_000
    user, variant = rng.integers(0, 2, n), rng.integers(0, 6, n)
    clicks = rng.random(n) < expit(-1.5 + 0.7 * (user == 1) * np.isin(variant, (2, 3)))
    key = (user * 6 + variant) * 2 + clicks
    cells, count = np.unique(key, return_counts=True)
    kind = np.array(["a", "b"])[cells // 12].tolist()
    log = log_of({"kind": kind}, TAGS, cells // 2 % 6, cells % 2, count=count)
    (insight,) = lightgbm_contributions(code(log, dependent=False)).insights
    assert (set(insight.segment), insight.tag) == ({"kind"}, {"tone": "loud"})


@pytest.mark.parametrize("what", ["no clicks", "no user fields", "a constant field"])
def test_where_there_is_nothing_to_learn_nothing_is_found(what: str) -> None:
    rng, n = np.random.default_rng(8), 2_000
    user = {} if what == "no user fields" else {"kind": ["a"] * n if "constant" in what else rng.normal(size=n)}
    clicks = rng.random(n) < (0 if what == "no clicks" else 0.2)
    log = log_of(user, TAGS, rng.integers(0, 6, n), clicks, unit=np.arange(n))
    found = lightgbm_contributions(code(log, dependent=False))
    assert (found.insights, found.auc) == ((), None)


def test_a_taste_that_two_families_can_say_is_not_lost_between_them() -> None:
    """Calm is only shown with a blue button: tone, button and both together speak of it, and the first leaves nothing
    to the others, whose trees would give it any sign."""
    rng, n = np.random.default_rng(9), 80_000
    user, variant = rng.integers(0, 3, n), rng.integers(0, 6, n)
    variants = TAGS | {"button": [["blue"], ["blue"], ["red"], ["green"], ["red"], ["green"]]}
    clicks = rng.random(n) < expit(-2 + 0.8 * (user == 1) * (variant < 2))
    log = log_of({"kind": np.array(["a", "b", "c"])[user].tolist()}, variants, variant, clicks, unit=np.arange(n))
    coded = code(log, dependent=False)
    both = next(t for t, tag in enumerate(coded.tags) if len(tag.names) == 2)
    found = lightgbm_contributions(coded)
    (insight,) = found.insights
    assert (insight.segment, insight.tag) == ({"kind": "b"}, coded.tags[both].names)
    # A third of the users, a third of the variants: 0.8 · (1 − 1/3)² is left of it.
    assert insight.importance[Method.CONTRIBUTIONS] == pytest.approx(0.8 * 4 / 9, rel=0.2)


def test_contributions_within_noise_have_no_sign() -> None:
    coded = code(liking(20_000, 4, 0.6)[0], dependent=False)
    at = proposals(lightgbm_contributions(coded))
    told = {key[:2] for key, importance in at.items() if importance is not None}
    assert {("gender", "f"), ("gender", "m")} <= told
    assert any(importance is None for importance in at.values())


def test_shap_values_of_the_tags_alone_are_half_of_the_centred_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why they are added: what field and tag do together is parted evenly between them."""
    coded, predict = code(liking(200_000, 2, 0.8, base=-1.0)[0], dependent=False), lightgbm.Booster.predict
    whole = proposals(lightgbm_contributions(coded))

    def of_tags(self: Any, x: Any, **given: Any) -> Array:
        values = np.array(predict(self, x, **given))
        values[:, 0] = 0  # the field's column
        return values

    monkeypatch.setattr(lightgbm.Booster, "predict", of_tags)
    halved = proposals(lightgbm_contributions(coded))
    tag = next(t for t, one in enumerate(coded.tags) if one.names == {"tone": "loud"})
    for gender in ("f", "m"):
        assert halved["gender", gender, tag] == pytest.approx(whole["gender", gender, tag] / 2, rel=0.1)


# ── the network ──

Exported = Callable[..., Ranker]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    def export(log: Log, *, deep: bool = False) -> Ranker:
        names = log.schema.user
        encoder = Encoder.fit(log.columns, user=names, context=(), variants=log.variants, dimensions=log.schema.variant)
        tables = fit_tables(Examples.of(log, encoder), encoder)
        part = DeepPart(DeepConfig(tables.layout.n_crossed, tables.layout.crossed_tags.shape[1], 4, 8, 2))
        part.initialise(torch.Generator().manual_seed(0))
        with torch.no_grad():
            part.top.normal_(generator=torch.Generator().manual_seed(1))
        folder = tmp_path_factory.mktemp("export") / "model"
        model = CtrModel(tables, part, 0.5 if deep else 0.0)
        at = datetime(2026, 1, 1, tzinfo=UTC)
        export_model(model, folder, version="1", variants=log.variants, log_hash="x", seed=1, created_at=at)
        return Ranker.load(folder)

    return export


@pytest.fixture(scope="module")
def ranker(exported: Exported) -> Ranker:
    return exported(liking(40_000, 10, 0.7)[0], deep=True)


def test_the_network_seconds_what_the_statistics_found_and_adds_nothing(ranker: Ranker) -> None:
    log = liking(40_000, 10, 0.7)[0]
    coded = code(log, dependent=False)
    statistics = attribute_coded(coded)
    found = network_contributions(log, coded, ranker, statistics)
    assert found.diagnostics is statistics.diagnostics
    assert found.auc is None
    assert found.importance[0][:2] == ("gender", "tone")
    (insight,), (whole,) = found.insights, statistics.insights
    assert replace(insight, methods=whole.methods, importance=whole.importance) == whole
    assert (insight.methods, list(insight.importance)) == ((Method.NETWORK,), [Method.NETWORK])
    assert insight.importance[Method.NETWORK] * insight.effect > 0
    assert len(found.candidates) > 1
    nothing = replace(statistics.diagnostics, selected=())
    unfound = network_contributions(log, coded, ranker, statistics._replace(insights=[], diagnostics=nothing))
    assert unfound.insights == ()


def test_a_network_that_learned_the_opposite_says_the_opposite_and_one_that_learned_nothing_says_nothing(
    exported: Exported,
) -> None:
    log = liking(40_000, 12, 0.7)[0]
    coded = code(log, dependent=False)
    statistics = attribute_coded(coded)
    (whole,) = statistics.insights

    def said_by(effect: float) -> Agreement:
        network = network_contributions(log, coded, exported(liking(40_000, 13, effect)[0]), statistics)
        (found,) = agreements({"statistics": statistics.insights, "network": network.insights})
        return found

    opposite = said_by(-0.7)
    sign = 1 if whole.effect > 0 else -1
    assert dict(opposite.found_by) == {"statistics": sign, "network": -sign}
    assert opposite.sentence == "Found by the statistics alone; the network's terms say the opposite."
    assert opposite.disagree and opposite.holds
    nothing = said_by(0.0)
    assert dict(nothing.found_by) == {"statistics": sign}
    assert nothing.sentence == "Found by the statistics alone; the network's terms do not say it."


def test_methods_that_see_different_halves_can_disagree() -> None:
    """Women like loud in the half that is discovered on, and dislike it more in the other: the EBM and the trees say
    what they saw, and not what confirmed it."""
    log, p = liking(60_000, 20, 0.0)
    coded = code(log, dependent=False)
    confirms = np.isin(np.arange(len(coded)), halves(replace(coded, reward=np.arange(len(coded))))[1].reward)
    female, loud = np.asarray(log.columns["gender"].to_pylist()) == "f", np.isin(log.variant, (2, 3))
    logit = np.log(p / (1 - p)) + np.where(confirms, -2.0, 0.4) * female * loud
    coded = replace(coded, reward=(np.random.default_rng(0).random(len(p)) < expit(logit)).astype(float))
    by_method = {
        "statistics": attribute_coded(coded).insights,
        "ebm": ebm(coded, outer_bags=3).insights,
        "contributions": lightgbm_contributions(coded).insights,
    }
    assert all(insights for insights in by_method.values())
    of_tone = [a for a in agreements(by_method) if a.insight.tag == {"tone": "loud"} and "gender" in a.insight.segment]
    assert of_tone
    for found in of_tone:
        assert {found.found_by["ebm"], found.found_by["contributions"]} == {-found.found_by["statistics"]}
        assert found.disputed and not found.holds
        assert "the EBM and the trees' contributions found the opposite" in found.sentence


def test_a_network_of_another_scene_is_refused(ranker: Ranker) -> None:
    rng = np.random.default_rng(14)
    log = log_of(
        {"mood": rng.normal(size=500)}, {"shape": [["a"], ["b"]]}, rng.integers(0, 2, 500), rng.random(500) < 0.3
    )
    coded = code(log, dependent=False)
    statistics = attribute_coded(coded)
    with pytest.raises(InputError, match=r"model 1: it knows the fields \['age', 'city', 'gender'\].*of this scene"):
        network_contributions(log, coded, ranker, statistics)
    with pytest.raises(InputError, match="of the same log"):
        network_contributions(liking(400, 1, 0.0)[0], coded, ranker, statistics)


# ── one decision ──


def variants() -> pa.Table:
    return liking(100, 0, 0.0)[0].variants


def why(ranker: Ranker, variant: str | None = None, **user: object) -> Why:
    given = {"gender": "f", "age": 33, "city": "a"} | user
    return explain_decision(ranker, ranker.features({k: [v] for k, v in given.items()}, 1), variants(), variant)


def test_the_parts_add_up_to_what_the_variant_has_over_the_average(ranker: Ranker) -> None:
    for user in ({}, {"gender": "m", "age": 70}, {"age": None}, {"city": "elsewhere"}):
        users = set()
        for variant in (f"v{i}" for i in range(6)):
            found = why(ranker, variant, **user)
            assert sum(term.logit for term in found.terms) == pytest.approx(found.score - found.average, abs=1e-5)
            assert found.variant_id == variant
            users.add(round(found.user, 9))
        assert len(users) == 1  # what the user adds is in every variant's score
        assert {"variant", "interaction", "deep"} <= {term.part for term in found.terms}


def test_by_default_it_is_the_variant_that_the_model_likes_best(ranker: Ranker) -> None:
    found = why(ranker)
    features = ranker.features({"gender": ["f"], "age": [33], "city": ["a"]}, 1)
    scores = ranker.score(features, ranker.variant_side(variants()))[0]
    assert (found.variant_id, found.rank, found.compared) == (found.best, 1, 6)
    assert found.score == pytest.approx(scores.max())
    assert found.average == pytest.approx(scores.mean(), abs=1e-6)
    assert sorted(why(ranker, f"v{i}").rank for i in range(6)) == [1, 2, 3, 4, 5, 6]


def test_the_reason_is_the_users_preference_and_speaks_of_the_model_only(exported: Exported) -> None:
    ranker = exported(liking(40_000, 10, 0.9)[0])
    found = why(ranker, "v2")
    strongest = next(term for term in found.terms if term.part == "interaction")
    assert (strongest.field, strongest.value, strongest.dimension, strongest.tag) == ("gender", "f", "tone", "loud")
    assert strongest.logit > 0
    first, raised, *_, last = found.sentences
    assert first.startswith("The model expects a click on v2 with ")
    assert "gender=f with tone=loud (odds +" in raised
    assert "not proven preferences" in last
    assert not any("prefers" in sentence or "likes" in sentence for sentence in found.sentences)
    assert found.to_json()["sentences"] == list(found.sentences)


def test_variants_that_the_model_cannot_tell_apart_are_said_to_be_alike(exported: Exported) -> None:
    ranker = exported(liking(2_000, 15, 0.0)[0])
    same = pa.table({"variant_id": ["x", "y"], "tone": [["calm"]] * 2, "style": [["flat"]] * 2})
    found = explain_decision(ranker, ranker.features({}, 1), same, "y")
    assert found.score == found.average
    assert "hardly apart" in found.sentences[1]


def test_one_user_and_a_known_variant_are_asked_for(ranker: Ranker) -> None:
    with pytest.raises(NotFoundError, match="variant 'v9': not among the 6 variants"):
        why(ranker, "v9")
    with pytest.raises(InputError, match="2 users and 6 variants"):
        explain_decision(ranker, ranker.features({}, 2), variants())
