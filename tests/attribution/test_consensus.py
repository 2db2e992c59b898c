"""Who found the same preference, in whichever words, and who says the opposite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from attribution.coding import code
from attribution.consensus import Agreement, TwoValued, agreements, consensus
from attribution.insights import Insight, Pair
from tests.attribution.logs import liking


def insight(segment: str, tag: str, effect: float = 0.4, **given: Any) -> Insight:
    """Of `field=label` and `dimension=value`, several of them joined by ` & `."""
    of, on = (dict(part.split("=") for part in text.split(" & ")) for text in (segment, tag))
    low, high = sorted((effect / 2, effect * 1.5))
    return Insight(of, on, effect, 1.2, given.pop("ci_low", low), given.pop("ci_high", high), 0.01, 1_000, **given)


WOMEN = insight("gender=f", "tone=loud")
TWO = TwoValued(frozenset({"gender"}), frozenset({"tone"}))  # f and m, loud and calm


def only(by_method: dict[str, list[Insight]], *two: TwoValued) -> Agreement:
    (agreement,) = agreements(by_method, *two)
    return agreement


def test_the_same_insight_is_one_agreement_that_names_its_finders() -> None:
    found = only({"ebm": [WOMEN], "statistics": [WOMEN], "preference": [], "contributions": [WOMEN]})
    assert dict(found.found_by) == {"statistics": 1, "ebm": 1, "contributions": 1}
    assert found.not_found_by == ("preference",)
    assert not found.disagree
    assert found.sentence == (
        "Found by 3 of 4 methods with the same sign; the standardised preferences did not find it."
    )


@pytest.mark.parametrize(
    "other",
    [
        insight("gender=f", "tone=loud", 0.1),  # the same
        insight("gender=m", "tone=loud", -0.3),  # men do not
        insight("gender=f", "tone=calm", -0.3),  # they like the alternative less
        insight("gender=m", "tone=calm", 0.3),
        insight("gender=f", "tone=loud|shrill", 0.3),  # values that were never shown apart
    ],
)
def test_other_words_for_the_same_preference_agree(other: Insight) -> None:
    found = only({"statistics": [WOMEN], "ebm": [other]}, TWO)
    assert dict(found.found_by) == {"statistics": 1, "ebm": 1}
    assert found.holds


def test_of_more_than_two_values_what_is_said_of_one_is_no_vote_for_another() -> None:
    """Who is in bars often likes it, as the statistics say; that those who never are like it less does not say so."""
    often, never = insight("bar=4~8", "coupon=Bar"), insight("bar=never", "coupon=Bar", -0.6)
    for other in (never, insight("bar=4~8", "coupon=Cafe", -0.3)):
        first, second = agreements({"statistics": [often], "ebm": [other], "contributions": [other]})
        first, second = sorted((first, second), key=lambda one: "ebm" in one.found_by)
        assert dict(first.found_by) == {"statistics": 1} and set(first.not_found_by) == {"ebm", "contributions"}
        assert first.holds and not first.disagree and not second.holds and "statistics" in second.not_found_by
        assert first.sentence.startswith("Found by 1 of 3 methods (the statistics)")


def test_of_two_values_what_is_said_of_one_is_the_opposite_for_the_other() -> None:
    men_too = insight("gender=m", "tone=loud", 0.3)
    found = only({"statistics": [WOMEN], "ebm": [men_too]}, TWO)
    assert dict(found.found_by) == {"statistics": 1, "ebm": -1} and found.disputed


def test_which_fields_and_dimensions_have_two_values_is_known_of_the_log() -> None:
    log, _ = liking(600, 1, 0.0)
    coded = code(log, dependent=False)  # of gender two values, of city three; of tone three tags, of style two
    assert TwoValued.of(coded) == TwoValued(frozenset({"gender"}), frozenset({"style"}))
    both = log.variants.set_column(2, "style", [[["flat", "real"], ["real"], ["flat"], ["real"], ["flat"], ["real"]]])
    coded = code(replace(log, variants=both), dependent=False)  # a variant may carry both
    assert TwoValued.of(coded).dimensions == frozenset()


@pytest.mark.parametrize(
    "other",
    [
        insight("gender=m", "tone=loud", 0.3),  # of three genders two may like it
        insight("gender=f", "tone=calm", 0.3),  # of three tones two may be liked
        insight("age=[30, inf)", "tone=loud"),
        insight("gender=f", "style=flat"),
        insight("gender=f & age=[30, inf)", "tone=loud & style=flat", 0.3, crossed=True),
    ],
)
def test_what_speaks_of_something_else_is_an_agreement_of_its_own(other: Insight) -> None:
    first, second = agreements({"statistics": [WOMEN], "ebm": [other]})
    assert {tuple(first.found_by), tuple(second.found_by)} == {("statistics",), ("ebm",)}
    assert not first.disagree
    assert not second.disagree


def test_a_crossing_takes_the_place_of_the_pairs_that_it_explains() -> None:
    """Young women like loud, and nobody else does: then neither women nor the young do by themselves."""
    parts = (Pair({"gender": "f"}, {"tone": "loud"}), Pair({"age": "[-inf, 30)"}, {"tone": "loud"}))
    crossing = insight("gender=f & age=[-inf, 30)", "tone=loud", 0.9, crossed=True, explained_by=parts)
    young, flat = insight("age=[-inf, 30)", "tone=loud", 0.3), insight("gender=f", "style=flat")
    by_method = {"statistics": [WOMEN, young, flat], "ebm": [WOMEN], "grid": [crossing, flat]}
    assert [one.insight for one in consensus(by_method)] == [crossing, flat]
    women = next(one for one in agreements(by_method) if one.insight == WOMEN)
    assert not women.holds and not women.disagree and women.explained == crossing
    assert "the grid explains it by gender=f and age=[-inf, 30) and tone=loud together" in women.sentence


@pytest.mark.parametrize(
    ("segment", "other", "effect", "sign"),
    [
        ("age=[30, inf)", "age=[30, inf)", -0.2, -1),
        ("age=[30, inf)", "age=[30, 45)", -0.2, -1),  # within it
        ("age=[30, inf)", "age=[30, 45)", 0.2, 1),
        ("age=[30, inf)", "age=[-inf, 30)", 0.2, -1),  # its mirror
        ("age=[30, inf)", "age=[-inf, 30)", -0.2, 1),
    ],
)
def test_numbers_are_the_same_users_where_they_overlap_and_a_mirror_where_they_complete_each_other(
    segment: str, other: str, effect: float, sign: int
) -> None:
    found = only({"statistics": [insight(segment, "tone=loud")], "grid": [insight(other, "tone=loud", effect)]})
    assert found.found_by["grid"] == sign
    assert found.disagree == (sign < 0)
    assert found.holds == (sign > 0)


def test_what_methods_disagree_about_is_said_and_is_no_consensus() -> None:
    by_method = {"statistics": [WOMEN], "ebm": [insight("gender=f", "tone=loud", -0.4)], "preference": [WOMEN]}
    assert only(by_method).sentence == "Found by 2 of 3 methods with the same sign; the EBM found the opposite."
    assert consensus(by_method) == []


def says(method: str, of: Insight, own: float) -> Insight:
    """The same finding, with the statistics' effect, of which the method says `own` by itself."""
    return replace(of, methods=(method,), importance={method: own})


def test_what_a_method_says_itself_is_its_sign_and_not_that_of_the_effect_it_was_given() -> None:
    by_method = {
        "statistics": [WOMEN],
        "preference": [says("preference", WOMEN, -0.22)],  # log .8
        "ebm": [says("ebm", WOMEN, 0.5)],
        "contributions": [says("contributions", WOMEN, -0.4)],
    }
    found = only(by_method)
    assert dict(found.found_by) == {"statistics": 1, "preference": -1, "ebm": 1, "contributions": -1}
    assert found.disagree and found.disputed and not found.holds
    assert found.sentence == (
        "Found by 2 of 4 methods with the same sign; the standardised preferences and the trees' contributions found"
        " the opposite."
    )


@pytest.mark.parametrize(("own", "sign"), [(-0.3, -1), (0.3, 1)])
def test_a_mirror_says_the_same_or_the_opposite_by_its_own_sign(own: float, sign: int) -> None:
    """That men do not like loud is what women's liking it is; a method that says of men that they do disputes it."""
    men = insight("gender=m", "tone=loud", -0.3)
    numbers = {"statistics": [insight("age=[30, inf)", "tone=loud")]}
    young = says("ebm", insight("age=[-inf, 30)", "tone=loud", -0.3), own)
    assert only({"statistics": [WOMEN], "ebm": [says("ebm", men, -0.3)]}, TWO).found_by["ebm"] == 1
    assert only(numbers | {"ebm": [young]}).found_by["ebm"] == -sign
    # Of three genders two may like it, and by the words of the EBM they do: that is another statement.
    if sign > 0:
        assert len(agreements({"statistics": [WOMEN], "ebm": [says("ebm", men, own)]})) == 2


def test_a_method_that_contradicts_what_confirmed_it_is_no_finder() -> None:
    found = only({"statistics": [], "ebm": [says("ebm", WOMEN, -0.2)]})
    assert (found.finders, found.opposed, found.holds) == ((), ("ebm",), False)
    assert found.sentence == (
        "Found by no method with this sign; the EBM found the opposite; the statistics did not find it."
    )


@pytest.mark.parametrize(
    ("network", "says_so"),
    [
        ([says("network", WOMEN, 0.2)], "the network's terms say the same"),
        ([says("network", WOMEN, -0.2)], "the network's terms say the opposite"),
        ([], "the network's terms do not say it"),
    ],
)
def test_the_networks_word_is_told_and_decides_nothing(network: list[Insight], says_so: str) -> None:
    found = only({"statistics": [WOMEN], "ebm": [WOMEN], "network": network})
    assert found.sentence == f"Found by all 2 methods with the same sign; {says_so}."
    assert found.disagree == (says_so.endswith("opposite")) and not found.disputed and found.holds
    assert (found.finders, found.looked) == (("statistics", "ebm"), 2)
    assert not only({"preference": [WOMEN], "network": network or [says("network", WOMEN, 1.0)]}).holds


def test_the_nearest_insight_speaks_for_a_method() -> None:
    young, old = insight("age=[30, 45)", "tone=loud", -0.2), insight("age=[30, inf)", "tone=loud", 0.3)
    found = agreements({"statistics": [insight("age=[30, inf)", "tone=loud")], "ebm": [young, old]})
    assert [dict(one.found_by) for one in found] == [{"statistics": 1, "ebm": 1}]


def test_without_the_statistics_it_takes_two_methods_that_judge_on_different_exposures() -> None:
    nothing: list[Insight] = []
    assert consensus({"statistics": nothing, "preference": [WOMEN]}) == []
    assert consensus({"statistics": nothing, "ebm": [WOMEN], "contributions": [WOMEN]}) == []  # the same half
    (found,) = consensus({"statistics": nothing, "ebm": [WOMEN], "preference": [WOMEN]})
    assert found.not_found_by == ("statistics",)
    (alone,) = consensus({"statistics": [WOMEN], "ebm": nothing})
    assert alone.sentence == "Found by 1 of 2 methods (the statistics); the EBM did not find it."


def test_only_the_grid_looks_at_what_works_together_and_at_nothing_else() -> None:
    crossed = insight("gender=f & age=[30, inf)", "tone=loud & style=flat", crossed=True)
    found = only({"statistics": [], "ebm": [], "grid": [crossed]})
    assert found.not_found_by == ()
    assert found.sentence == "Found by the grid alone."
    assert only({"statistics": [WOMEN], "grid": []}).not_found_by == ()


def test_the_strongest_is_first_by_what_the_interval_leaves() -> None:
    large_and_vague = insight("city=a", "tone=loud", 2.0, ci_low=0.05, ci_high=8.0)
    vague = insight("city=b", "style=flat", 2.0, ci_low=-0.1, ci_high=8.0)
    negative = insight("city=c", "tone=calm", -0.5)
    found = consensus({"statistics": [vague, large_and_vague, WOMEN, negative]})
    assert [one.insight for one in found] == [negative, WOMEN, large_and_vague, vague]
    assert found[-1].strength == 0


def test_it_is_plain_values_for_a_summary() -> None:
    json = only({"statistics": [WOMEN], "ebm": []}).to_json()
    assert json["found_by"] == {"statistics": 1}
    assert json["not_found_by"] == ["ebm"]
    assert (json["disagree"], json["consensus"]) == (False, True)
    assert json["insight"] == WOMEN.to_json()


def test_nothing_found_is_no_agreement() -> None:
    assert agreements({}) == agreements({"statistics": [], "ebm": []}) == []
