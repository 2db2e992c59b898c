"""What to design for some users, put together from a portrait; and what was never tried enough."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from kaleidoscope.database import Database
from kaleidoscope.errors import InputError
from kaleidoscope.portrait_design import Design, DesignTag, design_for
from kaleidoscope.portraits import PortraitCell, store_portrait
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.portrait_cells import SHOWN, cell, cells, change, found, run, store
from tests.kaleidoscope.stock import stocked

FLAT = {"image_style": "flat"}
THIRTIES = {"age": "[30, 40)"}


@pytest.fixture
def scene(database: Database) -> Database:
    """Scene `welcome` of acme, without a portrait."""
    stocked(database)
    return database


@pytest.fixture
def stored(sqlite: Database) -> Database:
    """Scene `welcome` of acme with a portrait, on SQLite alone."""
    stocked(sqlite)
    store(sqlite)
    return sqlite


def design(database: Database, attributes: dict[str, Any], **more: Any) -> Design:
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:
        return design_for(session, "welcome", attributes, **more)


def tag_of(answer: Design, tag: dict[str, str]) -> DesignTag:
    return next(t for d in answer.dimensions for t in d.tags if t.tag == tag)


def logit(share: float) -> float:
    return math.log(share / (1 - share))


def test_a_main_effect_and_insights_add_on_the_logit_scale(stored: Database) -> None:
    flat = tag_of(design(stored, {"age": 30, "level": "beginner"}), FLAT)
    main = logit(0.05) - logit(0.05 / 1.1)  # at the click rate that was seen with the tag
    # A quarter of the tag's exposures are of the thirties, half of beginners: so much is in the average already.
    expected = main + math.log(1.5 / (0.75 + 0.25 * 1.5)) + math.log(0.8 / (0.5 + 0.5 * 0.8))
    assert flat.expected == pytest.approx(math.expm1(expected))
    assert [(part.tag, part.effect) for part in flat.insights] == [(FLAT, 0.5), (FLAT, -0.2)]


def test_who_is_in_no_segment_with_an_insight_gets_what_the_average_leaves(stored: Database) -> None:
    flat = tag_of(design(stored, {"age": 50, "level": "expert"}), FLAT)
    main = logit(0.05) - logit(0.05 / 1.1)
    expected = main - math.log(0.75 + 0.25 * 1.5) - math.log(0.5 + 0.5 * 0.8)
    assert flat.expected == pytest.approx(math.expm1(expected)) and flat.insights == []


def test_the_average_over_all_users_is_the_main_effect(stored: Database) -> None:
    """Averaged over ages and levels, as they are in the log, the odds that are expected are everybody's."""
    odds = []
    for age in (20, 30, 50, ""):
        for level in ("beginner", "expert"):
            flat = tag_of(design(stored, {"age": age, "level": level}), FLAT)
            assert flat.expected is not None
            odds.append(1 + flat.expected)
    assert math.log(np.mean(odds)) == pytest.approx(logit(0.05) - logit(0.05 / 1.1))


def test_what_is_not_said_of_users_is_averaged_over(stored: Database) -> None:
    main = logit(0.05) - logit(0.05 / 1.1)
    by_age = main + math.log(1.5 / (0.75 + 0.25 * 1.5))  # and nothing of beginners and experts
    assert tag_of(design(stored, {"age": 30}), FLAT).expected == pytest.approx(math.expm1(by_age))
    assert tag_of(design(stored, {}), FLAT).expected == pytest.approx(math.expm1(main))


def test_its_interval_holds_the_widest_that_the_parts_allow(stored: Database) -> None:
    flat = tag_of(design(stored, {"age": 30, "level": "beginner"}), FLAT)
    assert flat.low is not None and flat.high is not None

    def ratio(effect: float) -> float:
        return logit(0.05) - logit(0.05 / (1 + effect))

    low = ratio(0.05) + math.log(1.2 / (0.75 + 0.25 * 1.2)) + math.log(0.7 / (0.5 + 0.5 * 0.7))
    high = ratio(0.15) + math.log(1.8 / (0.75 + 0.25 * 1.8)) + math.log(0.9 / (0.5 + 0.5 * 0.9))
    assert (flat.low, flat.high) == pytest.approx((math.expm1(low), math.expm1(high)))
    outside = tag_of(design(stored, {"age": 50}), FLAT)  # where more of it means less
    assert outside.low is not None and outside.expected is not None and outside.high is not None
    assert outside.low < outside.expected < outside.high


def test_what_is_shown_in_a_tags_place_counts_too(stored: Database) -> None:
    """Who likes flat more than others does likes what is not flat less: of two values one is the other's place."""
    answer = design(stored, {"age": 30, "level": "beginner"})
    real = tag_of(answer, {"image_style": "realistic"})
    main = logit(0.05) - logit(0.05 / 1.1)
    likes = math.log(1.5 / (0.75 + 0.25 * 1.5)) + math.log(0.8 / (0.5 + 0.5 * 0.8))
    assert real.expected == pytest.approx(math.expm1(main - likes))
    assert [(part.tag, part.effect) for part in real.insights] == [(FLAT, 0.5), (FLAT, -0.2)]
    # Where values are shown several at once, the others are as frequent with a tag as without it.
    store(stored, exposures=50_000, log_hash="c")
    real = tag_of(design(stored, {"age": 30}), {"image_style": "realistic"})
    assert real.expected == pytest.approx(math.expm1(main)) and real.insights == []


def test_what_is_expected_is_what_these_users_do_in_a_world_that_is_known(stored: Database) -> None:
    """Without noise: main effects and insights of a population, put together again for each kind of its users."""
    styles, tones, n = ("flat", "realistic"), ("calm", "loud", "plain"), 100_000

    def click(gender: str, level: str, style: str, tone: str) -> float:
        likes = 0.5 * (gender == "f" and tone == "loud") - 0.4 * (level == "new" and style == "flat")
        base = -3 + {"calm": 0.0, "loud": 0.2, "plain": -0.1}[tone] + 0.3 * (level == "new")
        return 1 / (1 + math.exp(-(base + likes)))

    users = {("f", "new"): 0.15, ("f", "old"): 0.35, ("m", "new"): 0.15, ("m", "old"): 0.35}
    packages = [(style, tone) for style in styles for tone in tones]

    def rate(wanted: Any, among: Any) -> float:
        shown = [(share, click(*who, *p)) for who, share in users.items() if among(who) for p in packages if wanted(p)]
        return sum(share * p for share, p in shown) / sum(share for share, _ in shown)

    made = []
    tags = [("style", s, 0) for s in styles] + [("tone", t, 1) for t in tones]
    for dimension, value, at in tags:
        with_it = rate(lambda p, at=at, v=value: p[at] == v, lambda _: True)
        ratio = with_it / rate(lambda p, at=at, v=value: p[at] != v, lambda _: True) - 1
        size = n // len({p[at] for p in packages})
        main = {"effect": ratio, "effect_low": ratio, "effect_high": ratio, "q_value": 0.001}
        made.append(PortraitCell({}, {dimension: value}, size, round(size * with_it), with_it, **main))
    for segment, tag, gamma, size in (
        ({"gender": "f"}, {"tone": "loud"}, 0.5, n // 3 // 2),
        ({"level": "new"}, {"style": "flat"}, -0.4, round(n / 2 * 0.3)),
        ({"gender": "m"}, {"tone": "calm"}, None, n // 3 // 2),
        ({"level": "old"}, {"tone": "calm"}, None, n // 3),
    ):
        known = {} if gamma is None else found(*[math.expm1(gamma)] * 3)
        made.append(PortraitCell(segment, tag, size, **known))
    with stored.transaction(person("ann")) as session:
        store_portrait(session, "welcome", run(taxonomy=None, exposures=n), made)
    for gender, level in users:
        answer = design(stored, {"gender": gender, "level": level})
        for dimension, value, at in tags:
            expected = tag_of(answer, {dimension: value}).expected
            kind = (gender, level)
            truth = logit(rate(lambda p, at=at, v=value: p[at] == v, lambda w, k=kind: w == k)) - logit(
                rate(lambda p, at=at, v=value: p[at] != v, lambda w, k=kind: w == k)
            )
            assert expected is not None and math.log1p(expected) == pytest.approx(truth, abs=0.03)


def test_tags_are_ranked_in_their_dimension_and_a_crossing_adds_to_none(stored: Database) -> None:
    crossed = cell(
        {**THIRTIES, "level": "beginner"}, {**FLAT, "benefit": "cash_back"}, 400, crossed=True, **found(3.0, 1.0, 9.0)
    )
    before = design(stored, {"age": 30, "level": "beginner"})
    store(stored, [crossed], seed=9)
    answer = design(stored, {"age": 30, "level": "beginner"})
    styles = next(d for d in answer.dimensions if d.dimension == "image_style")
    assert [t.tag["image_style"] for t in styles.tags] == ["flat", "realistic"] and styles.label == "Image style"
    assert [c.tag for c in answer.together] == [{**FLAT, "benefit": "cash_back"}]
    assert tag_of(answer, FLAT) == tag_of(before, FLAT)
    assert design(stored, {"age": 30, "level": "expert"}).together == []


def test_insights_of_other_methods_about_the_same_field_do_not_count_twice(stored: Database) -> None:
    both = [
        cell({"age": "[25, 35)"}, FLAT, **found(0.6, 0.2, 0.9, found_by={"ebm": 1})),
        cell({"age": "[-inf, 40)"}, FLAT, **found(0.2, 0.1, 0.3)),
    ]
    store(stored, both, seed=9)
    parts = tag_of(design(stored, {"age": 32}), FLAT).insights
    assert {p.segment["age"] for p in parts} == {"[30, 40)", "[-inf, 40)"}


def test_weaker_evidence_is_of_the_rarest_segment_of_each_field(stored: Database) -> None:
    wide = cell({"age": "[-inf, 40)"}, FLAT, 50_000, shrunk=1.3, shrunk_low=1.2, shrunk_high=1.4)
    store(stored, [wide], seed=9)
    weaker = tag_of(design(stored, {"age": 30, "level": "expert"}), FLAT).weaker
    assert [w.segment for w in weaker] == [THIRTIES, {"level": "expert"}]


@pytest.mark.parametrize(
    ("given", "segments"),
    [
        ({"age": 30}, [THIRTIES]),
        ({"age": "39.9"}, [THIRTIES]),
        ({"age": 40}, [{"age": "[40, inf)"}]),
        ({"age": -5}, [{"age": "[-inf, 30)"}]),
        ({"age": None}, [{"age": "missing"}]),
        ({"age": ""}, [{"age": "missing"}]),
        ({"level": "expert"}, [{"level": "expert"}]),
        ({"level": "guru"}, []),
        ({}, []),
    ],
)
def test_users_fall_into_their_segments(stored: Database, given: dict[str, Any], segments: list[Any]) -> None:
    answer = design(stored, given)
    assert answer.segments == segments
    assert any("Not said" in note for note in answer.notes)
    assert any("'guru'" in note for note in answer.notes) == (given == {"level": "guru"})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"aeg": 3}, r"knows no attribute 'aeg'. Did you mean 'age'\? There are: age, level"),
        ({"age": "old"}, "age is a number, and 'old' is none"),
        ({"age": math.nan}, "age is a number"),
        ({"age": "inf"}, "age is a number"),
    ],
)
def test_attributes_that_cannot_be_are_named(stored: Database, given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        design(stored, given)


def test_it_says_what_was_never_tried_enough(stored: Database) -> None:
    answer = design(stored, {"age": 30})
    by_tag = {next(iter(u.tag.items())): u for u in answer.untried}
    assert answer.click_rate == pytest.approx(0.05) and answer.needed is not None and 7_000 < answer.needed < 9_000
    assert "5 %" in answer.rule and f"{answer.needed:,}" in answer.rule
    never = by_tag["benefit", "red_packet"]
    assert (never.reason, never.n, never.where) == ("never", 0, "scene") and "never shown to users" in never.sentence
    few = by_tag["benefit", "cash_back"]
    assert (few.reason, few.n) == ("too_few", 120) and "120 times at most" in few.sentence
    assert by_tag["authority", "brand"].reason == "not_compared"  # every exposure showed it
    assert by_tag["image_style", "3d"].where == "nobody" and by_tag["image_style", "3d"].reason == "never"
    assert ("image_style", "flat") not in by_tag
    order = [u.where for u in answer.untried]
    assert order == sorted(order, key=["scene", "library", "nobody"].index)
    assert "such users saw it 120 times at most" in tag_of(answer, {"benefit": "cash_back"}).sentence
    assert all(sentence in answer.says for sentence in (never.sentence, few.sentence, answer.rule))


def test_a_tag_with_a_material_outside_of_the_scene_is_told_apart(stored: Database) -> None:
    from kaleidoscope.content import Copy, Tag
    from kaleidoscope.materials import add_material, retire_material

    with stored.transaction(person("ann")) as session:
        add_material(session, "extra", Copy(title="Soft"), [Tag(dimension="colour_tone", value="soft")])
        add_material(session, "gone", Copy(title="Vivid"), [Tag(dimension="colour_tone", value="vivid")])
        retire_material(session, "gone")
    where = {next(iter(u.tag.values())): u.where for u in design(stored, {}).untried if "colour_tone" in u.tag}
    assert (where["soft"], where["vivid"]) == ("library", "nobody")


def test_without_counts_of_what_was_shown_nothing_is_called_never_shown(stored: Database) -> None:
    store(stored, shown=None, seed=9)
    answer = design(stored, {})
    brand = next(u for u in answer.untried if u.tag == {"authority": "brand"})
    assert brand.reason == "not_compared" and brand.n is None and "never shown, or always" in brand.sentence


def test_what_came_out_of_a_split_is_not_called_never_shown(stored: Database) -> None:
    change(stored, {"op": "split", "dimension": "authority", "value": "brand", "into": [
        {"id": "own_brand", "labels": {"en": "Own", "zh": "自有"}},
        {"id": "partner", "labels": {"en": "Partner", "zh": "合作"}},
    ]})  # fmt: skip
    found_ = {u.tag["authority"]: u for u in design(stored, {}).untried if "authority" in u.tag}
    assert found_["partner"].reason == "not_compared" and "nobody knows" in found_["partner"].sentence


def test_retired_values_are_neither_ranked_nor_missed(stored: Database) -> None:
    change(stored, {"op": "retire", "dimension": "benefit", "value": "red_packet"})
    answer = design(stored, {"age": 30})
    assert {"benefit": "red_packet"} not in [u.tag for u in answer.untried]
    assert {"benefit": "red_packet"} not in [t.tag for d in answer.dimensions for t in d.tags]


def test_merged_values_count_together_as_tried(stored: Database) -> None:
    change(stored, {"op": "merge", "dimension": "image_style", "values": ["realistic", "flat"], "into": "flat"})
    answer = design(stored, {"age": 30})
    assert FLAT not in [u.tag for u in answer.untried]  # 15,000 + 7,500
    merged = [t for d in answer.dimensions for t in d.tags if t.tag == FLAT]
    assert len(merged) == 2 and {json.dumps(t.was) for t in merged} == {
        "null",
        json.dumps({"image_style": "realistic"}),
    }


def test_a_portrait_about_everybody_alone_still_answers(stored: Database) -> None:
    with stored.transaction(person("ann")) as session:
        only = [c for c in cells() if not c.segment]
        store_portrait(session, "welcome", run(seed=9), only)
    assert tag_of(design(stored, {}), FLAT).expected is not None
    with pytest.raises(InputError, match="about everybody alone"):
        design(stored, {"age": 3})


def test_a_tag_without_a_main_effect_is_not_known(stored: Database) -> None:
    store(stored, [cell(THIRTIES, {"subject": "gold"}, **found(0.3, 0.1, 0.5))], seed=9)
    gold = tag_of(design(stored, {"age": 30}), {"subject": "gold"})
    assert gold.expected is None and "not known" in gold.sentence


def test_intervals_without_end_stay_numbers(stored: Database) -> None:
    wild = [cell({f"f{i}": "x"}, {"subject": "gold"}, 9, **found(1e300, -1.0, 1e308)) for i in range(40)]
    main = cell({}, {"subject": "gold"}, 9_000, effect=0.1, effect_low=-1.0, effect_high=1e308, q_value=0.01)
    store(stored, [*wild, main], seed=9)
    json.loads(design(stored, {f"f{i}": "x" for i in range(40)}, language="zh").model_dump_json())


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_click_rates_at_their_ends_break_nothing(stored: Database, share: float) -> None:
    clicks = {"clicks": round(share * 1_000), "ctr": share, "ctr_low": None, "ctr_high": None}
    made = [
        cell({}, FLAT, 1_000, **clicks, effect=-1.0, effect_low=-1.0, effect_high=0.5, q_value=1.0),
        cell(THIRTIES, FLAT, 1_000, **clicks),
    ]
    with stored.transaction(person("ann")) as session:
        store_portrait(session, "welcome", run(seed=9), made)
    answer = design(stored, {"age": 30})
    assert answer.needed is None and "not known" in answer.rule
    json.loads(answer.model_dump_json())


def test_both_systems_answer_alike(scene: Database) -> None:
    store(scene)
    answer = design(scene, {"age": 30, "level": "beginner"}, language="zh")
    assert tag_of(answer, FLAT).n == 15_000 and len(answer.segments) == 2
    assert answer.says[0] == "依据场景 welcome 的第 1 号画像，面向 age 为 30、level 为“beginner”的用户："
    assert SHOWN["benefit"]["cash_back"] == 30_000
