"""The report: complete, self-contained, readable without colour, and nothing in a log can break out of the page."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attribution.analysis import Analysis, Facts
from attribution.coding import Segment, Tag, code
from attribution.consensus import Agreement
from attribution.contributions import ContributionResult
from attribution.discoveries import Examined
from attribution.ebm import EbmResult, Fidelity, HeatMap, NetworkEbm, Shape
from attribution.effectiveness import (
    Balance,
    BucketLift,
    Concentration,
    Direction,
    Effectiveness,
    EyeCatching,
    Fatigue,
    Judgement,
    Measured,
    Moved,
    OtherCauses,
    Products,
    Ratio,
    Slice,
    Split,
    Trend,
    VariantCtr,
)  # fmt: skip
from attribution.grid import GridCell
from attribution.insights import Attribution, Diagnostics, Insight, MainEffect, Pair, attribute_coded
from attribution.pictures import Colours, interval, relative
from attribution.portrait_map import COLUMNS
from attribution.preference import PreferenceCell, PreferenceResult, preferences
from attribution.report import render
from kaleidoscope.experiment import Cohort
from kaleidoscope.log import Check
from kaleidoscope.vocabulary import Level
from tests.attribution.logs import liking
from tests.html_page import Page

EVIL = "<script>alert('x')</script>\"'`<b>`&amp;{{ 7 * 7 }}"
LONG = "very-long-name-" * 20
BACKWARDS = "\u202egnp.exe"


@dataclass(frozen=True)
class Grid:
    """What the report reads of a `GridResult`."""

    insights: Sequence[Insight]
    cells: Sequence[GridCell]


def agreement(insight: Insight, methods: dict[str, int], missing: Sequence[str] = ()) -> Any:
    return Agreement(insight=insight, found_by=methods, not_found_by=tuple(missing))


@cache
def analysis() -> Analysis:
    """A log in which women like loud, by the statistics; every other part is made by hand."""
    log, _ = liking(20_000, 1, 0.8)
    coded = code(log, dependent=False)
    statistics = attribute_coded(coded)
    assert len(statistics.insights) == 1
    found = statistics.insights[0]
    shapes = (shape("gender", ("f", "m"), (0.2, -0.2)), shape("tone", ("calm", "loud", "plain"), (0.0, 0.1, -0.1)))
    effect = np.array([[-0.2, 0.3, np.nan], [0.1, -0.2, 0.05]])
    heat = HeatMap("gender", "tone", ("f", "m"), ("calm", "loud", "plain"), effect, effect - 0.1, effect + 0.1,
                   np.array([[10.0, 10, 0], [10, 10, 10]]), 0.12)  # fmt: skip
    both = replace(found, segment={"gender": "f", "city": "a"}, tag={"tone": "loud", "style": "flat"}, crossed=True,
                   effect=0.8, ci_low=0.3, ci_high=1.4)  # fmt: skip
    cells = tuple(
        GridCell(
            {"gender": g, "city": "a"}, {"tone": t, "style": "flat"}, 400, 40, 0.1, 0.07, 0.13, 0.8, 0.3, 1.4, 0.01
        )
        for g in ("f", "m")
        for t in ("calm", "loud")
    )
    return Analysis(
        log_name="exposures.parquet",
        scene="fund-card",
        simulated=True,
        seed=7,
        facts=Facts(20_000, 18_500, 6, 0.1234, "2026-10-01T05:00:00+00:00", "2026-10-14T22:00:00+00:00",
                    {"random": 15_000, "control": 5_000}, ("gender", "age", "city"), ("tone", "style"), {}),
        variants={"v0": {"tone": ["calm"]}},
        tags=coded.tags,
        attribution=statistics,
        preference=preferences(coded),
        ebm=EbmResult([found], statistics.diagnostics, shapes, (heat,), 0.61, 3.0),
        network_ebm=NetworkEbm(shapes, (heat,), Fidelity(0.71, 0.64, 0.2, 9_000)),
        grid=Grid([both], cells),  # type: ignore[arg-type]
        contributions=ContributionResult((), statistics.diagnostics, (), (("gender", "tone", 0.21),), 0.62),
        network=None,
        agreements=[agreement(found, {"statistics": 1, "ebm": 1}, ["contributions"]), agreement(both, {"grid": 1})],
        effectiveness=effects(),
        not_done={"network": "No model was given."},
        checks=(Check("duplicated_rows", Level.WARNING, "74 rows repeat an earlier row"),),
        timings_s={"statistics": 1.2},
    )  # fmt: skip


def shape(of: str, labels: tuple[str, ...], effect: tuple[float, ...]) -> Shape:
    middle = np.array(effect)
    return Shape(of, labels, middle, middle - 0.05, middle + 0.05, np.full(len(labels), 100.0))


def effects(told: str = "told") -> Effectiveness:
    lift = Measured(0.12, 0.05, 0.2, 0.001)
    trend = Trend("model", "time", "day", 14.0, Measured(-0.01, -0.02, 0.0), 0.04, Direction.SHRINKS, True, (
        Slice("day 1-7", 900, 400, lift, lift, lift), Slice("day 8-14", 30, 10, None, None, None)))  # fmt: skip
    fatigue = Fatigue(Judgement.SIGN, "The lift of model shrinks with time.", (trend,), {}, (told,))
    cohort = Cohort("release 1", {"control": 5_649, "model": 14_502}, {"control": 0.3, "model": 0.7})
    ratio = Ratio(cohort.units, {"control": 0.28, "model": 0.72}, cohort.expected, 0.0001, True, (cohort,))
    balance = (Balance("age", "user", 0.001, 0.002, "model", None, Measured(0.31, 0.2, 0.42)),
               Balance("hour", "time", 0.5, None, "model", "04-08", Measured(0.01, -0.1, 0.1)))  # fmt: skip
    products = Products({"control": {"fund": 1.0}, "model": {"fund": 0.6, "bond": 0.4}}, 0.01, 0.02, held_fixed=False)
    lifts = (BucketLift("model", lift, {"time": Measured(0.11, 0.04, 0.18)}),)
    moved = Moved(0, 0, 0, None)
    other = OtherCauses(
        Judgement.NO_SIGN, "Nothing differs.", ratio, 0.4, balance, products, moved, lifts, {}, ()
    )  # fmt: skip
    split = Split("control", lift, Measured(0.07, 0.01, 0.13), Measured(0.05, 0.0, 0.1), 0.09, "v3", "matched", True)
    variants = (VariantCtr("v3", 7_000, 0.51, 1_000, lift, lift, Measured(0.16, 0.04, 0.29), 0.01),
                VariantCtr("v4", 70, 0.01, 9, None, None, None, None))  # fmt: skip
    few = EyeCatching(
        Judgement.CANNOT_SAY, "There is no sure lift.", variants, lift, split, Concentration(6, 2, None), {}, ()
    )
    return Effectiveness(fatigue, other, few)


@cache
def html() -> str:
    return render(analysis())


def words(**changed: Any) -> str:
    return Page(render(replace(analysis(), **changed)) if changed else html()).text


# ── what it says ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_says_what_was_looked_at() -> None:
    text = words()
    assert text.index("Simulated data") < text.index("fund-card (simulated)") < text.index("20,000")
    for said in ("exposures.parquet", "18,500", "12.3 %", "2026-10-01 to 2026-10-14", "random 15,000 (75 %)"):
        assert said in text
    real = words(simulated=False, facts=replace(analysis().facts, units=None, since=None, buckets={}))
    assert "imulated" not in real and real.count("unknown") >= 2 and "not named in the log" in real


def test_the_summary_has_the_strongest_insights_with_their_intervals_and_who_found_them() -> None:
    insight = analysis().attribution.insights[0]
    text = words()
    assert "1 preference stands out after correction for everything that was looked at; 1 found by" in text
    shown = f"odds of a click on tone = loud are ▲ {relative(insight.effect).replace(chr(160), ' ').lstrip('+')} higher"
    assert f"Users with gender = f: {shown}" in text
    assert f"95 % interval {interval(insight.ci_low, insight.ci_high)}".replace("\u00a0", " ") in text
    assert "found by 2 of 3 methods" in text
    crossing = text.split("1 crossing holds: what two user fields or two tags do only together")[1].split("Portrait")[0]
    assert "city = a" in crossing and "tone = loud and style = flat together are ▲ 80 % higher" in crossing
    assert "beyond all that its parts do" in crossing


def test_an_effect_of_hardly_known_size_is_said_to_be_one() -> None:
    unsure = replace(analysis().attribution.insights[0], ci_low=-0.01, ci_high=2.4)
    assert "though how much is hardly known (−1.0 to +240 %)" in words(
        agreements=[agreement(unsure, {"statistics": 1})]
    )


def test_where_nothing_was_found_it_says_what_would_have_been() -> None:
    nothing = analysis().attribution._replace(insights=[])
    ebm = replace(analysis().ebm, insights=[])
    preference = replace(analysis().preference, insights=())
    text = words(attribution=nothing, ebm=ebm, preference=preference, grid=None, agreements=[])
    assert "Nothing was found: of " in text and "would have been found in the typical pair in 8 of 10" in text
    assert "stand out" not in text and "No segment has an insight." in text
    assert "No method found anything, and in that they agree." in text
    assert "▲ +" not in text.split("What everybody takes The click rate")[0].split("Segment by segment")[1]


def test_where_nothing_could_be_looked_at_it_says_so() -> None:
    none = np.zeros(0)
    examined = Examined((), (), none, none, none, none, np.zeros(0, np.int64))
    statistics = Attribution([], [], Diagnostics(examined, 90, 1, 1.0, 0.0, (), none, none))
    reason = "Too few clicks for it."
    parts = dict.fromkeys(("preference", "ebm", "network_ebm", "grid", "contributions", "network", "effectiveness"))
    text = words(attribution=statistics, agreements=[], not_done=dict.fromkeys(parts, reason), **parts)
    assert "Too few exposures to find anything: none of the 90 segment × tag pairs" in text
    assert text.count(f"Not done: {reason}") >= 5 and text.count(f"not done: {reason}") == 3  # once in the limits
    assert "90 of 90" in text and "No tag varies" not in text and "there is nothing to agree on" in text
    assert "None" not in text and "nan" not in text and "found nothing" not in text


def test_what_is_wrong_with_the_log_stands_in_the_summary() -> None:
    head = words().split("Portrait")[0]
    assert "▲ 1 warning about the log: read it before the rest." in head and "Error in the log" not in head
    wrong = Check("propensity_mean", Level.ERROR, "mean(1/propensity) is 9; set `propensity: null`.")
    page = render(replace(analysis(), checks=(*analysis().checks, *analysis().checks, wrong)))
    head = Page(page).text.split("Portrait")[0]
    assert "✖ Error in the log: mean(1/propensity) is 9; set propensity: null." in head
    assert "2 warnings about the log, besides: read them before the rest." in head
    assert "<code>propensity: null</code>" in page and "`" not in Page(page).text
    assert "about the log" not in words(checks=()).split("Portrait")[0]


def test_user_fields_that_tell_nobody_apart_are_the_reason_and_no_tag_is_blamed() -> None:
    nobody = replace(without_users(), facts=analysis().facts, not_done={"ebm": "Each is the same."})
    text = Page(render(nobody)).text
    assert "No user field tells users apart: nothing can be compared." in text
    assert "no reason was recorded" not in text and "too little to be judged" not in text
    effects = analysis().attribution._replace(main_effects=[])
    assert "No tag varies" not in words(attribution=effects)
    assert "Too few clicks, or too few units, to compare the click rate" in words(attribution=effects)
    diagnostics = nobody.attribution.diagnostics
    same = replace(nobody, tags=(), attribution=effects._replace(diagnostics=diagnostics, insights=[]))
    assert "No tag varies among the variants that were shown." in Page(render(same)).text


def test_a_log_without_user_fields_is_about_what_everybody_takes_and_nothing_else() -> None:
    page = render(without_users())
    text = Page(page).text
    head = text.split("Why it works")[0]
    assert "fund-card (simulated): what everybody takes" in head
    assert "The log names no user fields: nobody's preferences can be told apart. How all users together" in head
    ids = re.findall(r'<h2 id="([^"]+)"', page)
    assert ids == ["main-effects", "effectiveness", "limits", "method"]
    links = re.findall(r'<a href="#([^"]+)"', page)
    assert set(links) <= set(ids) and text.count("the methods' agreement are left out") == 1
    for nonsense in (
        "0 of 0",
        "Shown or clicked too little",
        "in that they agree",
        "Nothing could be looked at",
        "EBM Proposes",
    ):
        assert nonsense not in text
    limits = text.split("What we cannot say, and why")[1]
    assert "EBM, Grid (2 × 2), Network contributions, not done: No user fields." in limits
    assert limits.count("No user fields.") == 1


def without_users() -> Analysis:
    """The same log, had it named no user fields."""
    none = np.zeros(0)
    examined = Examined((), (), none, none, none, none, np.zeros(0, np.int64))
    old = analysis()
    diagnostics = Diagnostics(examined, 0, 1, 1.0, 0.0, (), none, none)
    parts = dict.fromkeys(("preference", "ebm", "network_ebm", "grid", "contributions", "network"))
    return replace(
        old, facts=replace(old.facts, user=()), agreements=[],
        attribution=old.attribution._replace(insights=[], diagnostics=diagnostics),
        not_done=dict.fromkeys(("ebm", "grid", "network"), "No user fields."), **parts,
    )  # fmt: skip


def test_what_everybody_takes_says_that_it_is_not_adjusted_for_the_tags_beside() -> None:
    section = words().split("What everybody takes The click rate")[1].split("What EBM learned")[0]
    assert "nothing is adjusted for the tags that were shown together with it" in section


def test_agreement_is_said_to_be_weaker_than_its_count() -> None:
    section = words().split("Do the methods agree? Which methods")[1]
    assert "weaker evidence than its count looks: all methods read the same log; preferences and grid" in section
    assert "EBM and trees are confirmed by the same test on the same half of the users" in section


def test_a_crossing_that_holds_by_itself_is_the_headline() -> None:
    single, both = (a.insight for a in analysis().agreements)
    page = render(replace(analysis(), agreements=[agreement(both, {"grid": 1})]))
    text = Page(page).text
    head = text.split("Contents" if "Contents" in text else "Portrait")[0]
    assert "Nothing is sure" not in text and "Nothing was found" not in head and "1 crossing holds" in head
    assert 'class="verdict"' in page
    explained = Agreement(single, {"statistics": 1}, (), both)
    text = words(agreements=[agreement(both, {"grid": 1}), explained])
    assert "1 more is part of a crossing, and nothing beside it" in text and "gender = f part of a crossing" in text


def test_a_crossing_is_said_to_be_beyond_its_parts_and_not_the_plain_odds() -> None:
    section = words().split("Two user fields and two tags at once What two")[1].split("Why it works")[0]
    assert "not plain odds" in section and "its single pairs of user value and tag" in section
    assert "Odds beyond the parts" in section and "not whether the rate is high" in section


def test_methods_that_disagree_are_pointed_out_and_left_out_of_the_summary() -> None:
    insight = analysis().attribution.insights[0]
    text = words(agreements=[agreement(insight, {"statistics": 1, "ebm": -1})])
    assert "Nothing is sure" in text and "⚠ Methods disagree about the sign of 1 more" in text
    assert "Users with gender = f" not in text.split("Portrait")[0]
    assert "gender = f ⚠ disagree" in text and "▲ more" in text and "▼ less" in text


def test_that_the_network_says_the_opposite_is_said_loudly_and_takes_nothing_away() -> None:
    insight = analysis().attribution.insights[0]
    own = replace(insight, methods=("network",), importance={"network": -0.2})
    network = ContributionResult((own,), analysis().attribution.diagnostics, (), (), None)
    found = [agreement(insight, {"statistics": 1, "ebm": 1, "network": -1})]
    page = render(replace(analysis(), network=network, agreements=found, not_done={}))
    text = Page(page).text
    head = text.split("Portrait")[0]
    assert "1 preference stands out" in head and "found by 2 of 2 methods; ⚠ the network says the opposite" in head
    assert "⚠ The CTR network says the opposite of 1 of them. It has no test of its own" in head
    assert "Methods disagree" not in head and "hit" in page.split('id="portrait"')[1].split('id="segments"')[0]
    assert "Standardised preference; the opposite: Network contributions" in text
    table = text.split("Do the methods agree? Which methods")[1].split("What everybody takes")[0]
    assert "there is none here" in table and "Of 1 it says the opposite" in table
    assert "Network contributions (no test of its own)" in table
    assert "gender = f ⚠ the network says the opposite" in table and "▼ less" in table
    methods = text.split("The field × tag terms")[1]
    assert "has no test of its own: effect, interval and q beside its name are the statistics'." in methods


def test_nothing_of_the_network_is_said_to_be_of_users_it_has_not_seen() -> None:
    part = words().split("What the network learned The same kind")[1].split("What the models lean on")[0]
    assert "on users that the picture below was not fitted to (the network may have learned from them)" in part


def test_a_frame_is_filled_for_what_the_consensus_holds_and_so_are_headings_counted() -> None:
    """A neighbour or mirror of an insight, that another method named, says nothing of its own."""
    insight = analysis().attribution.insights[0]
    men = replace(insight, segment={"gender": "m"}, effect=-0.4, ci_low=-0.6, ci_high=-0.2, explained_by=())
    page = render(replace(analysis(), ebm=replace(analysis().ebm, insights=[men])))
    portrait = page.split('id="portrait"')[1].split('id="segments"')[0]
    assert len(re.findall(r'<td class="[^"]*maybe[^"]*"', portrait)) == 1 and portrait.count("<b>(▼)\u00a0") == 1
    filled = len(re.findall(r'<td class="[^"]*hit[^"]*"', portrait))
    assert filled == 1 and '<bdi>gender</bdi> <span class="soft">1 insight</span>' in portrait
    assert page.split('id="segments"')[1].split('id="grid"')[0].count('<circle class="maybe less"') == 1


def test_grey_rows_have_plain_intervals() -> None:
    """Given that a pair was not selected, an interval leans away from 0: as if what was not found were large."""
    examined = analysis().attribution.diagnostics.examined
    plots = Page(html()).text.split("Segment by segment How")[1].split("Two user fields")[0]
    (k,) = (
        k for k, segment in enumerate(examined.segments)
        if segment.label == "f" and analysis().tags[examined.tags[k]].names == {"tone": "plain"}
    )  # fmt: skip
    low, high = (np.expm1(examined.gamma[k] + side * 1.959964 * examined.se[k]) for side in (-1, 1))
    shown = interval(low, high).replace("\u00a0", " ")
    assert f"({shown})" in plots and "plain 95 % intervals" in plots


def test_tables_without_a_finding_are_folded() -> None:
    grid = page_part("grid", "effectiveness")
    assert "<details" not in grid and 'class="heat"' in grid
    empty = page_part("grid", "effectiveness", grid=Grid([], analysis().grid.cells))
    unknown = [replace(cell, ctr=None) for cell in analysis().grid.cells]
    assert "<table" not in page_part("grid", "effectiveness", grid=Grid([], unknown))
    assert "Nothing was found" in empty and empty.index("<details") < empty.index('class="heat"') < empty.index(
        "</details>"
    )


def page_part(first: str, then: str, **changed: Any) -> str:
    return render(replace(analysis(), **changed)).split(f'id="{first}"')[1].split(f'id="{then}"')[0]


def test_a_model_that_could_learn_nothing_says_so_and_has_no_auc() -> None:
    nothing = replace(analysis().ebm, shapes=(), heat_maps=())
    part = page_part("ebm", "limits", ebm=nothing, contributions=replace(analysis().contributions, importance=()))
    assert "It learned nothing: too few clicks" in part and "How much each value moves" not in part.split("network")[0]
    assert "It leans on no pair." in part and "0.62" not in part


def test_the_summary_says_that_it_lists_the_surest_only() -> None:
    insight = analysis().attribution.insights[0]
    assert "listed here" not in words()
    twice = [
        agreement(insight, {"statistics": 1}),
        agreement(replace(insight, tag={"tone": "calm"}), {"statistics": 1}),
    ]
    text = words(agreements=twice)
    assert "2 preferences stand out" in text and "The surest is listed here; the other under" in text
    more = [*twice, agreement(replace(insight, tag={"style": "flat"}), {"statistics": 1}),
            agreement(replace(insight, tag={"tone": "plain"}), {"statistics": 1})]  # fmt: skip
    assert "The 2 surest are listed here, of each user field and tag dimension one; the others under" in words(
        agreements=more
    )


def test_how_far_odds_had_to_be_has_a_direction() -> None:
    text = words(attribution=analysis().attribution._replace(insights=[]), agreements=[], ebm=None, grid=None)
    found = re.search(r"the odds had to be about ([\d.]+) % higher or ([\d.]+) % lower in the typical pair", text)
    assert found and float(found[1]) > float(found[2])


def test_words_are_explained_where_they_come_first_and_noise_is_left_out() -> None:
    text = words()
    for word, explained in (
        ("strata", "strata (exposures of the same context"),
        ("q ≤", "q ≤ 0.05 (of all that look as sure, at most one in twenty"),
        ("AUC", "AUC of 0.610 (how often it puts"), ("logits", "logits (logarithms of the odds"),
        ("consensus", "consensus, which the summary and the framed cells are of"),
    ):  # fmt: skip
        first = text.index(word, text.index("What everybody takes The")) if word == "strata" else text.index(word)
        assert text[first:].startswith(explained), word
    assert "Time: " not in text and not re.search(r"[\d,]+ cells\.", text)


def test_on_a_phone_a_cell_and_its_label_are_side_by_side() -> None:
    """A grid has a column for the label and one for all of the cell, and labels break where words do."""
    table = page_part("agreement", "main-effects")
    cells = re.findall(r"<td data-label=[^>]*>(.*?)</td>", table)
    assert cells and all(re.fullmatch(r"<span>.*</span>", cell) for cell in cells)
    css = html().split("<style>")[1].split("</style>")[0]
    assert not re.search(r"\.(more|less) {[^}]*nowrap", css) and '<div class="scroll"><table class="stack' in table


def test_what_one_method_alone_found_is_marked_so_everywhere_and_left_out_of_the_summary() -> None:
    insight = analysis().attribution.insights[0]
    statistics = analysis().attribution._replace(insights=[])
    alone = [agreement(insight, {"ebm": 1}, ["statistics"])]
    page = render(replace(analysis(), attribution=statistics, agreements=alone))
    text = Page(page).text
    assert "Nothing is sure" in text and "1 more was found, but not by the statistics" in text
    assert "gender = f alone" in text and "Users with gender = f" not in text
    portrait = page.split('id="portrait"')[1].split('id="segments"')[0]
    assert len(re.findall(r'<td class="[^"]*maybe[^"]*"[^>]*><b>\(▲\)', portrait)) == 1 and "hit" not in portrait
    assert page.split('id="segments"')[1].split('id="grid"')[0].count('<circle class="maybe more"') == 1


def test_the_sign_in_a_frame_is_the_insights_also_where_the_raw_preference_differs() -> None:
    less = replace(analysis().attribution.insights[0], effect=-0.3, ci_low=-0.5, ci_high=-0.1)
    done = dict.fromkeys(("ebm", "grid", "contributions"))
    page = render(
        replace(
            analysis(),
            attribution=analysis().attribution._replace(insights=[less]),
            agreements=[agreement(less, {"statistics": -1})],
            **done,
        )
    )
    portrait = page.split('id="portrait"')[1].split('id="segments"')[0]
    assert re.findall(r'<td class="[^"]*hit[^"]*"[^>]*><b>(.)\u00a0(.)', portrait) == [("▼", "+")]


def test_a_method_that_does_not_look_is_told_from_one_that_found_nothing() -> None:
    table = words().split("Do the methods agree? Which methods")[1].split("What everybody takes")[0]
    assert "not found" in table and "does not look" in table
    assert "⚠" not in table


def test_a_method_that_was_not_done_says_why() -> None:
    assert "Network contributions, not done: No model was given." in words()
    text = words(ebm=None, grid=None, not_done={"ebm": "Too few clicks for it.", "grid": "Only one user field."})
    assert "Not done: Too few clicks for it." in text and "Not done: Only one user field." in text
    assert "EBM, not done: Too few clicks for it." in text  # in what we cannot say


def test_says_what_it_cannot_say() -> None:
    statistics = analysis().attribution
    diagnostics = replace(
        statistics.diagnostics, effective_share=0.5, clipped=0.02, strata=12, too_few=1_234, clipped_uniform=0.019,
        lost_uniform=0.3, certain=17.0,
    )  # fmt: skip
    new = Tag((("tone", "shy"),))
    text = words(attribution=statistics._replace(diagnostics=diagnostics), tags=(*analysis().tags, new))
    limits = text.split("What we cannot say, and why")[-1]
    for said in (
        "1,234 of", "12 strata", "Shown or clicked too little to be judged for any segment: tone = shy",
        "10,000 evenly", "2.00 % of the exposures would have counted more",
        "in what everybody takes, 1.90 % of the exposures, by which 30.0 % of all that they stand for is lost",
        "17 exposures whose users could have seen nothing else",
        "74 rows repeat an earlier row",
    ):  # fmt: skip
        assert said in limits
    plain = words().split("What we cannot say, and why")[-1]
    assert "Clipped" not in plain and "Unequal weights" not in plain and "strata (" not in plain


# ── its pictures ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_portrait_marks_insights_by_a_sign_and_a_frame() -> None:
    portrait = html().split('id="portrait"')[1].split('id="segments"')[0]
    marked = re.findall(r'<td class="[^"]*hit[^"]*"[^>]*><b>([▲▼])\u00a0([+−][\d.]+)</b>', portrait)
    assert marked and all((sign == "▲") == number.startswith("+") for sign, number in marked)
    assert len(marked) == len(re.findall(r'class="[^"]*hit', portrait))


def test_the_portrait_shows_the_fields_with_insights_first_and_folds_the_others() -> None:
    portrait = html().split('id="portrait"')[1].split('id="segments"')[0]
    assert portrait.index("<bdi>gender</bdi> <span") < portrait.index("2 user fields without insights")
    assert portrait.index("2 user fields without insights") < portrait.index("<h3><bdi>age</bdi>")
    assert "below" in portrait and "[-inf" not in portrait


def test_unknown_cells_are_no_zeros() -> None:
    unknown = PreferenceCell({"gender": "f"}, {"tone": "loud"}, 0, 0, *[None] * 9)
    known = PreferenceCell({"gender": "m"}, {"tone": "loud"}, 900, 45, *[0.05] * 3, *[1.1] * 6)
    portrait = portrait_of(unknown, known)
    assert re.findall(r"<td class=\"?none[^>]*>(.*?)</td>", portrait) == ["·"]


def portrait_of(*cells: PreferenceCell) -> str:
    """That part of a page with these cells, of fields without insights too."""
    page = render(replace(analysis(), preference=PreferenceResult((), analysis().attribution.diagnostics, cells, {})))
    return page.split('id="portrait"')[1].split('id="segments"')[0]


def test_cells_with_too_few_clicks_are_unknown_unless_clicks_were_to_be_expected() -> None:
    """Of three clicks nothing follows, though the model of tastes has a number; of none in 900 exposures much does."""
    few = PreferenceCell({"city": "a"}, {"tone": "loud"}, 60, 3, *[0.05] * 3, *[1.41] * 6)
    none = PreferenceCell({"city": "b"}, {"tone": "loud"}, 900, 0, *[0.0] * 3, *[0.7] * 6)
    portrait = portrait_of(few, none)
    assert "+41" not in portrait and "−30" in portrait and portrait.count(">·</td>") == 1
    assert "Too few clicks: in no cell are there ten clicks" in portrait_of(few) and "<table" not in portrait_of(few)


def test_a_forest_plot_has_the_insights_first_and_says_what_explains_the_others() -> None:
    insight = analysis().attribution.insights[0]
    assert insight.explained_by
    plots = html().split('id="segments"')[1].split('id="grid"')[0]
    rows = re.findall(r"<tr( class=\"hit\")?><th scope=\"row\">", plots)
    assert rows[0] and not any(rows[1:])
    assert plots.count("<circle") == len(rows) and plots.count('class="hit more"') == 2  # line and dot
    segment = next((pair for pair in insight.explained_by if pair.segment == insight.segment), None)
    assert (segment is None) == ("explained by" not in plots)


def test_ebm_and_network_have_shapes_heat_maps_and_fidelity() -> None:
    text = words()
    assert (
        "with an AUC of 0.610" in text and "Fidelity 0.71" in text and "The rest is something the network knows" in text
    )
    part = html().split('id="ebm"')[1].split('id="network"')[0]
    assert part.count("<table") == 3 and re.search(r">\+35</td>|<b>\+35</b></td>", part)
    assert re.findall(r"<td class=\"?none[^>]*>(.*?)</td>", part) == ["·"]  # never shown
    assert "Mean size" in text and "0.21" in text and "AUC 0.620" in text


def test_the_grid_shows_click_rates_and_marks_what_only_the_crossing_says() -> None:
    part = html().split('id="grid"')[1].split('id="effectiveness"')[0]
    assert part.count("10.0\u00a0%") == 4
    assert len(re.findall(r'<td class="[^"]*hit[^"]*"[^>]*><b>▲', part)) == 1
    assert part.count('<circle class="hit more"') == 1 and 'class="soft">Grid (2 × 2)<' in part
    segments = html().split('id="segments"')[1].split('id="grid"')[0]
    assert "<bdi>city</bdi>" not in segments  # crossings are the grid's


def test_what_lacks_for_every_doubt_is_said_once() -> None:
    lack = "The log does not say which bucket an exposure is of."
    parts = {
        name: replace(getattr(effects(), name), reason=lack, verdict=Judgement.CANNOT_SAY, sentences=(lack,))
        for name in ("fatigue", "other_causes", "eye_catching")
    }
    assert words(effectiveness=Effectiveness(**parts)).count(lack) == 1


def test_a_doubt_says_nothing_twice() -> None:
    fatigue = replace(effects().fatigue, reason="No times. Log them.", sentences=("No times.", "Else.", "Else."))
    text = words(effectiveness=replace(effects(), fatigue=fatigue))
    assert text.count("No times.") == 1 and text.count("Else.") == 1


def test_each_doubt_has_its_verdict_its_reason_and_its_pictures() -> None:
    part = html().split('id="effectiveness"')[1].split('id="agreement"')[0]
    assert "⚠ Signs of it. The lift of model shrinks with time." in part
    assert "✓ No sign of it. Nothing differs." in part and "? Cannot say. There is no sure lift." in part
    assert part.count('class="question"') == 3 and part.count("<table") == 7
    for said in ("told", "not as designed", "p = below 0.001", "+0.31", "not compared", "they differ", "v3", "unknown"):
        assert said in part


# ── for everybody, everywhere ───────────────────────────────────────────────────────────────────────────────────────


def test_nothing_comes_from_outside() -> None:
    assert not re.search(r"https?:|//\w|@import|@font-face|url\(", html())
    assert "default-src 'none'" in html()
    found = Page(html())
    tags = {tag for tag, _ in found.elements}
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & tags
    references = [v for _, a in found.elements for k, v in a.items() if k in ("src", "href", "xlink:href")]
    ids = [a["id"] for _, a in found.elements if "id" in a]
    assert len(ids) == len(set(ids)) and {str(r).removeprefix("#") for r in references} <= set(ids)


def test_the_same_input_gives_the_same_page() -> None:
    assert render(replace(analysis())) == html()


def test_text_is_large_enough() -> None:
    css = html().split("<style>")[1].split("</style>")[0].split("@media print")[0]
    sizes = [float(n) * (16 if unit == "rem" else 1) for n, unit in re.findall(r"font-size: ([\d.]+)(rem|px)", css)]
    assert len(sizes) > 10 and min(sizes) >= 12


def test_tints_leave_text_readable_and_can_be_told_apart_without_colour() -> None:
    css = html().split("<style>")[1].split("</style>")[0]
    tints = dict(re.findall(r"\.([uds]\d) { background: (#[0-9a-f]{6})", css))
    assert len(tints) == 12
    ink = luminance(re.findall(r"--ink: (#[0-9a-f]{6})", css)[0])
    light = {tint: luminance(colour) for tint, colour in tints.items()}
    assert all((at + 0.05) / (ink + 0.05) >= 4.5 for at in light.values())
    for side in "uds":
        steps = [light[f"{side}{i}"] for i in range(1, 5)]
        assert all(a > b + 0.05 for a, b in pairwise(steps))
    assert Colours.of([0.01, 0.05, -0.2]).tint(-0.2) == "d4"


# Machado, Oliveira & Fernandes 2009 (doi:10.1109/TVCG.2009.113), severity 1, of linear RGB.
BLIND = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
LEAST_APART = 4.0  # ΔE*ab between neighbours of a scale: about twice what is just seen side by side
LEAST_OPPOSED = 10.0  # of the same step on either side, and of signs


@pytest.mark.parametrize("vision", BLIND)
def test_colours_can_be_told_apart_by_colour_blind_people(vision: str) -> None:
    css = html().split("<style>")[1].split("</style>")[0]
    tints = dict(re.findall(r"\.([uds]\d) { background: (#[0-9a-f]{6})", css))
    signs = dict(re.findall(r"--(orange|blue): (#[0-9a-f]{6})", css))

    def apart(a: str, b: str) -> float:
        return float(np.linalg.norm(seen_by(vision, a) - seen_by(vision, b)))

    for side in "uds":
        scale = ["#fafbfc", *(tints[f"{side}{i}"] for i in range(1, 5))]  # from a cell without a tint
        assert min(apart(a, b) for a, b in pairwise(scale)) >= LEAST_APART, side
    assert min(apart(tints[f"u{i}"], tints[f"d{j}"]) for i in range(1, 5) for j in range(1, 5)) >= LEAST_OPPOSED
    assert apart(signs["orange"], signs["blue"]) >= 2 * LEAST_OPPOSED
    if vision == "deuteranopia":  # a red and a green of the same lightness would not pass
        assert apart("#f8c0c0", "#b8dcb8") < LEAST_APART


def seen_by(vision: str, colour: str) -> Any:
    """L*a*b* (D65) of #rrggbb as people with this colour vision see it."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(BLIND[vision]) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x = to_xyz @ linear / [0.9505, 1, 1.089]
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rrggbb."""
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_what_is_folded_away_is_printed(tmp_path: Path) -> None:
    """A page without scripts cannot unfold itself before it is printed."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None or shutil.which("pdftotext") is None:
        pytest.skip("needs Chromium and pdftotext (apt-get install chromium poppler-utils)")
    quiet = PreferenceCell({"quietfield": "quietvalue"}, {"tone": "loud"}, 900, 45, *[0.05] * 3, *[1.0] * 6)
    preference = replace(analysis().preference, cells=(*analysis().preference.cells, quiet))
    shapes = tuple(shape(f"shape{i}", ("f", "m"), (0.1, 0.1)) for i in range(9))
    insights = [
        replace(analysis().attribution.insights[0], segment={"town": f"town{i}"}, explained_by=()) for i in range(30)
    ]
    checks = (*analysis().checks, Check("folded_check", Level.INFO, "remarkable"))
    page = render(
        replace(
            analysis(), preference=preference, checks=checks, ebm=replace(analysis().ebm, shapes=shapes),
            attribution=analysis().attribution._replace(insights=insights),
            agreements=[agreement(insight, {"statistics": 1}) for insight in insights],
        )
    )  # fmt: skip
    folded = " ".join(re.findall(r"<details.*?</details>", page, re.DOTALL))
    assert all(word in folded for word in ("quietvalue", "shape8", "town29", "remarkable"))
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}", "--no-pdf-header-footer"]
    command += [f"--print-to-pdf={tmp_path / 'report.pdf'}", (tmp_path / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    read = subprocess.run(["pdftotext", tmp_path / "report.pdf", "-"], check=True, capture_output=True, text=True)
    printed = read.stdout
    missing = [word for word in ("quietvalue", "shape8", "town29", "remarkable") if word not in printed]
    assert not missing
    assert "prints only what is unfolded" not in printed  # for browsers that cannot


@pytest.mark.parametrize("typed", [EVIL, LONG, BACKWARDS, "שלום", "👩‍👩‍👧 🎉", "", " ", "a\nb\x00c\ud800", "[1, 2)"])
def test_what_visitors_type_cannot_break_the_page(typed: str) -> None:
    page = render(typed_in(typed))
    found = Page(page)
    page.encode("utf-8")
    assert not re.search("[\x00-\x08\u202a-\u202e]", page)
    assert found.count("script") == found.count("img") == 0 and "49" not in re.findall(r"<bdi>(.*?)</bdi>", page)
    assert not [key for _, attributes in found.elements for key in attributes if key.startswith("on")]
    assert found.count("b") == Page(render(typed_in("plain"))).count("b")
    if typed == EVIL:
        assert found.text.count(EVIL) > 20
    if typed == LONG:
        assert LONG in found.text  # whole in the summary, cut in tables
        assert max(len(part) for part in re.findall(r"<bdi[^>]*>([^<]*)</bdi>", page.split('id="portrait"')[1])) <= 80


def typed_in(typed: str) -> Analysis:
    """The same, where every name and value is this text."""
    old = analysis()
    insight = replace(
        old.attribution.insights[0], segment={typed: typed}, tag={typed: typed},
        explained_by=(Pair({typed: typed}, {typed: typed}),),
    )  # fmt: skip
    both = replace(
        insight, segment={typed: typed, f"{typed}2": typed}, tag={typed: typed, f"{typed}2": typed}, crossed=True
    )
    examined = old.attribution.diagnostics.examined
    examined = replace(examined, segments=tuple(Segment(typed, typed, (0,)) for _ in examined.segments))
    diagnostics = replace(old.attribution.diagnostics, examined=examined)
    cells = tuple(replace(c, segment={typed: typed}, tag={typed: typed}) for c in old.preference.cells[:3])
    heat = replace(old.ebm.heat_maps[0], field=typed, dimension=typed, rows=(typed, f"{typed}m"), columns=(typed,) * 3)
    shapes = (replace(old.ebm.shapes[0], name=typed, labels=(typed, typed)),)
    grid_cell = replace(old.grid.cells[0], segment=both.segment, tag=both.tag)
    fatigue = replace(effects().fatigue, reason=typed, sentences=(typed,))
    few = replace(effects().eye_catching, variants=(replace(effects().eye_catching.variants[0], variant_id=typed),))
    return replace(
        old, log_name=typed, scene=typed, facts=replace(old.facts, buckets={typed: 3}),
        tags=tuple(Tag(((typed, typed),)) for _ in old.tags),
        attribution=Attribution([insight], [MainEffect({typed: typed}, 0.1, 0.0, 0.2, 0.01, 9, 1, 0.1)], diagnostics),
        preference=replace(old.preference, cells=cells, insights=()),
        ebm=replace(old.ebm, insights=[insight], shapes=shapes, heat_maps=(heat,)), network_ebm=None,
        grid=Grid([both], [grid_cell]), contributions=replace(old.contributions, importance=((typed, typed, 0.1),)),
        agreements=[agreement(insight, {"ebm": 1}), agreement(both, {"grid": 1})],
        effectiveness=replace(effects(), fatigue=fatigue, eye_catching=few),
        not_done={"network": typed}, checks=(Check(typed, Level.WARNING, typed),), timings_s={typed: 1.0},
    )  # fmt: skip


def test_a_page_of_thirty_fields_and_sixty_tags_stays_small_and_counts_what_it_leaves_out() -> None:
    fields = {f"field {f}": [f"value {v}" for v in range(24)] for f in range(30)}
    tags = tuple(Tag(((f"dimension {t // 6}", f"value {t}"),)) for t in range(60))
    rng = np.random.default_rng(0)
    segments = [Segment(field, value, (i,)) for field, values in fields.items() for i, value in enumerate(values)]
    cells = []
    for segment in segments:
        for tag, x in zip(tags, np.exp(rng.normal(0, 0.1, len(tags))), strict=True):
            numbers = (x, x * 0.9, x * 1.1)
            cells.append(
                PreferenceCell({segment.field: segment.label}, tag.names, 900, 45, 0.05, 0.04, 0.06, *numbers, *numbers)
            )
    pairs = [(segment, t) for segment in segments for t in range(len(tags))]
    gamma, se = rng.normal(0, 0.1, len(pairs)), np.full(len(pairs), 0.1)
    examined = Examined(tuple(s for s, _ in pairs), tuple(t for _, t in pairs), gamma, se, gamma / se,
                        np.ones(len(pairs)), np.zeros(len(pairs), np.int64))  # fmt: skip
    diagnostics = replace(analysis().attribution.diagnostics, examined=examined)
    insights = [
        replace(analysis().attribution.insights[0], segment={s.field: s.label}, tag=tags[t].names, explained_by=())
        for s, t in pairs[::97]
    ]
    shapes = tuple(shape(field, tuple(values), (0.1,) * 24) for field, values in fields.items())
    page = render(
        replace(
            analysis(), tags=tags, attribution=Attribution(insights, [], diagnostics),
            preference=PreferenceResult((), diagnostics, tuple(cells), {}),
            ebm=replace(analysis().ebm, insights=[], shapes=shapes), network_ebm=None,
            agreements=[agreement(i, {"statistics": 1}) for i in insights],
        )
    )  # fmt: skip
    assert len(page.encode()) < 3_000_000
    Page(page)
    portrait = page.split('id="portrait"')[1].split('id="segments"')[0]
    left_out = int(
        re.findall(r"([\d,]+) of [\d,]+ cells, of fields and values without insights first", portrait)[0].replace(
            ",", ""
        )
    )
    overview = portrait.split('class="heat overview"')[1].split("</table>")[0].count("<td")
    assert portrait.count("<td") - overview + left_out == len(cells) == 43_200
    widest = max(row.count("<td") for row in re.findall(r"<tr>.*?</tr>", portrait))
    assert widest <= COLUMNS
