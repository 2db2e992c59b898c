"""What to design for some users, put together from a portrait; and what was never tried enough."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from attribution.coding import code
from attribution.consensus import agreements
from attribution.insights import attribute_coded
from attribution.preference import preferences
from kaleidoscope.commands.attribute import overlaps_of, portrait_cells
from kaleidoscope.database import Database
from kaleidoscope.errors import InputError
from kaleidoscope.log import Log
from kaleidoscope.portrait_design import Design, DesignTag, design_for
from kaleidoscope.portraits import PortraitCell, PortraitRun, store_portrait
from kaleidoscope.vocabulary import Method, Role
from tests.attribution.logs import TAGS, log_of
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


def expected_of(database: Database, users: dict[str, Any], tag: dict[str, str] = FLAT) -> float:
    """The log-odds ratio that is expected of a tag."""
    found = tag_of(design(database, users), tag).expected
    assert found is not None
    return math.log1p(found)


def without_preferences(database: Database, **changes: Any) -> None:
    """The portrait without shrunken preferences, and with other ends or values of what is known of FLAT."""
    made = [replace(one, shrunk=None, shrunk_low=None, shrunk_high=None) for one in cells()]
    ends = [
        replace(one, **{name: getattr(one, of) for name, of in changes.items()})
        if changes and one.tag == FLAT and one.effect is not None
        else one
        for one in made
    ]
    with database.transaction(person("ann")) as session:
        store_portrait(session, "welcome", run(seed=len(changes) + 20, log_hash=str(changes)), ends)


MAIN = math.log(0.05 / 0.95) - math.log(0.05 / 1.1 / (1 - 0.05 / 1.1))  # at the click rate that was seen with the tag


def test_insights_add_on_the_logit_scale(stored: Database) -> None:
    both, neither = {"age": 30, "level": "beginner"}, {"age": 50, "level": "expert"}
    apart = expected_of(stored, both) - expected_of(stored, neither)
    assert apart == pytest.approx(math.log(1.5) + math.log(0.8), abs=1e-6)
    flat = tag_of(design(stored, both), FLAT)
    assert [(part.tag, part.effect) for part in flat.insights] == [(FLAT, 0.5), (FLAT, -0.2)]


def alike_but_for_insights(database: Database) -> None:
    """The portrait of users who click as often as each other on what is not flat."""
    made = []
    for one in cells():
        likes = {"age": 0.75 + 0.25 * 1.5, "level": 0.5 + 0.5 * 0.8}
        if one.segment and one.tag == FLAT:
            (field,) = one.segment
            one = replace(one, click_share=(one.share or 0.0) * (1 + (one.effect or 0.0)) / likes[field])
        made.append(one)
    with database.transaction(person("ann")) as session:
        store_portrait(session, "welcome", run(seed=9), made)


def test_who_is_in_no_segment_with_an_insight_gets_what_the_average_leaves(stored: Database) -> None:
    """A quarter of the users are in their thirties, half are beginners: so much is in the average already."""
    alike_but_for_insights(stored)
    left = -math.log(0.75 + 0.25 * 1.5) - math.log(0.5 + 0.5 * 0.8)
    assert expected_of(stored, {"age": 50, "level": "expert"}) == pytest.approx(MAIN + left, abs=0.01)
    assert tag_of(design(stored, {"age": 50, "level": "expert"}), FLAT).insights == []


def test_the_average_over_all_users_is_the_main_effect(stored: Database) -> None:
    """Averaged over ages and levels, as they are in the log, what is expected is everybody's."""
    alike_but_for_insights(stored)
    odds = [
        math.exp(expected_of(stored, {"age": age, "level": level}))
        for age in (20, 30, 50, "")
        for level in ("beginner", "expert")
    ]
    assert math.log(np.mean(odds)) == pytest.approx(MAIN, abs=0.005)


def test_what_is_not_said_of_users_is_averaged_over(stored: Database) -> None:
    assert expected_of(stored, {}) == pytest.approx(MAIN, abs=1e-9)
    by_level = [math.exp(expected_of(stored, {"age": 30, "level": level})) for level in ("beginner", "expert")]
    assert math.exp(expected_of(stored, {"age": 30})) == pytest.approx(np.mean(by_level), rel=0.01)


def test_its_interval_holds_the_widest_that_the_parts_allow(stored: Database) -> None:
    users = {"age": 30, "level": "beginner"}
    without_preferences(stored)
    flat, outside, ends = tag_of(design(stored, users), FLAT), tag_of(design(stored, {"age": 50}), FLAT), []
    for name in ("effect_low", "effect_high"):
        without_preferences(stored, effect=name, effect_low=name, effect_high=name)
        end = tag_of(design(stored, users), FLAT)
        assert end.low == pytest.approx(end.expected) == pytest.approx(end.high)
        ends.append(math.log1p(end.expected or 0.0))
    assert [math.log1p(x) for x in (flat.low or 0.0, flat.high or 0.0)] == pytest.approx(ends, abs=0.02)
    assert outside.low is not None and outside.expected is not None and outside.high is not None
    assert outside.low < outside.expected < outside.high  # where more of it means less


def test_its_interval_reaches_to_what_is_too_weak_to_be_found(stored: Database) -> None:
    """No insight is about experts and benefits: what they prefer is anywhere in the shrunken preference's interval."""
    users, tag = {"level": "expert"}, {"benefit": "cash_back"}
    before = tag_of(design(stored, users), tag)
    wide = [
        replace(one, shrunk_low=0.5, shrunk_high=1.8) if one.segment == users and one.tag == tag else one
        for one in cells()
    ]
    with stored.transaction(person("ann")) as session:
        store_portrait(session, "welcome", run(seed=9), wide)
    after = tag_of(design(stored, users), tag)
    assert after.expected == before.expected and None not in (before.low, before.high, after.low, after.high)
    assert (after.low or 0) < (before.low or 0) * 2 and (after.high or 0) > (before.high or 0) * 2
    everybody = tag_of(design(stored, {}), tag)
    assert everybody.low == pytest.approx(math.expm1(logit(0.05) - logit(0.05 / 1.05)))


def test_what_is_shown_in_a_tags_place_counts_too(stored: Database) -> None:
    """Who likes flat more than others does likes what is not flat less: of two values one is the other's place."""
    users, real = {"age": 30, "level": "beginner"}, {"image_style": "realistic"}
    likes = expected_of(stored, users) - MAIN
    assert expected_of(stored, users, real) == pytest.approx(MAIN - likes, abs=1e-6)
    assert [(p.tag, p.effect) for p in tag_of(design(stored, users), real).insights] == [(FLAT, 0.5), (FLAT, -0.2)]
    # Where values are shown several at once, the others are as frequent with a tag as without it.
    several = [replace(one, share=0.6) if not one.segment and "image_style" in one.tag else one for one in cells()]
    with stored.transaction(person("ann")) as session:
        store_portrait(session, "welcome", run(seed=9), several)
    assert expected_of(stored, {"age": 30}, real) == pytest.approx(MAIN, abs=1e-9)
    assert tag_of(design(stored, {"age": 30}), real).insights == []


def test_an_insight_that_does_not_say_of_how_many_users_it_is_leaves_the_dimension_unknown(stored: Database) -> None:
    """Raw exposures are no substitute: a model's favourite would count for more than it does."""
    made = [replace(one, share=None) if one.segment and one.tag == FLAT else one for one in cells()]
    with stored.transaction(person("ann")) as session:
        store_portrait(session, "welcome", run(seed=9), made)
    answer = design(stored, {"age": 30})
    assert tag_of(answer, FLAT).expected is not None  # by what the segments saw of the other style
    with stored.transaction(person("ann")) as session:
        store_portrait(session, "welcome", run(seed=10), [replace(one, share=None) for one in cells()])
    assert tag_of(design(stored, {"age": 30}), FLAT).expected is None


@pytest.mark.parametrize(("base", "near"), [(-4.0, 0.005), (-1.5, 0.025), (0.0, 0.04)])  # odds do not average
@pytest.mark.parametrize("together", [0.15, 0.05, 0.25])
def test_what_is_expected_is_what_these_users_do_in_a_world_that_is_known(
    stored: Database, base: float, near: float, together: float
) -> None:
    """Without noise: main effects, segments and insights of a population, put together again for each kind of its
    users, and for those of whom one attribute is known; at any click rate, and where attributes go together."""
    styles, tones, n = ("flat", "realistic"), ("calm", "loud", "plain"), 100_000

    def click(gender: str, level: str, style: str, tone: str) -> float:
        likes = 0.9 * (gender == "f" and tone == "loud") - 0.6 * (level == "new" and style == "flat")
        likes += 0.5 * (level == "new" and tone == "calm")
        tastes = {"calm": 0.0, "loud": 0.2, "plain": -0.1}[tone] + 0.3 * (level == "new") - 0.4 * (gender == "f")
        return 1 / (1 + math.exp(-(base + tastes + likes)))

    users = {("f", "new"): together, ("f", "old"): 0.5 - together, ("m", "new"): 0.3 - together}
    users[("m", "old")] = 1 - sum(users.values())
    packages = [(style, tone) for style in styles for tone in tones]

    def rate(wanted: Any, among: Any) -> float:
        shown = [(share, click(*who, *p)) for who, share in users.items() if among(who) for p in packages if wanted(p)]
        return sum(share * p for share, p in shown) / sum(share for share, _ in shown)

    made = []
    tags = [("style", s, 0) for s in styles] + [("tone", t, 1) for t in tones]
    segments = [("gender", "f", 0), ("gender", "m", 0), ("level", "new", 1), ("level", "old", 1)]
    gammas = {("f", "loud"): 0.9, ("new", "flat"): -0.6, ("new", "calm"): 0.5}
    for dimension, value, at in tags:
        with_it = rate(lambda p, at=at, v=value: p[at] == v, lambda _: True)
        ratio = with_it / rate(lambda p, at=at, v=value: p[at] != v, lambda _: True) - 1
        share = 1 / len({p[at] for p in packages})
        main = {"effect": ratio, "effect_low": ratio, "effect_high": ratio, "q_value": 0.001, "share": share}
        made.append(PortraitCell({}, {dimension: value}, 1, 1, with_it, **main))  # raw counts say nothing
        for field, label, f in segments:
            here = rate(lambda p, at=at, v=value: p[at] == v, lambda w, f=f, label=label: w[f] == label)
            size = sum(share for who, share in users.items() if who[f] == label)
            gamma = gammas.get((label, value))
            known = {} if gamma is None else found(*[math.expm1(gamma)] * 3)
            known |= {"share": size, "click_share": size * here / with_it}
            made.append(PortraitCell({field: label}, {dimension: value}, 1, 1, here, **known))
    overlaps = [({"gender": g}, {"level": level}, share) for (g, level), share in users.items()]
    with stored.transaction(person("ann")) as session:
        store_portrait(session, "welcome", run(taxonomy=None, exposures=n, overlaps=overlaps), made)
    for told in [dict(zip(("gender", "level"), kind, strict=True)) for kind in users] + [
        {"gender": "f"},
        {"level": "new"},
    ]:
        answer = design(stored, told)
        for dimension, value, at in tags:
            expected = tag_of(answer, {dimension: value}).expected

            def among(who: tuple[str, str], told: dict[str, str] = told) -> bool:
                return all(told.get(name, at) == at for name, at in zip(("gender", "level"), who, strict=True))

            truth = logit(rate(lambda p, at=at, v=value: p[at] == v, among)) - logit(
                rate(lambda p, at=at, v=value: p[at] != v, among)
            )
            assert expected is not None and math.log1p(expected) == pytest.approx(truth, abs=near), (told, value)


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
    assert (few.reason, few.n) == ("too_few", 120) and "worth 120 exposures at most" in few.sentence
    assert by_tag["authority", "brand"].reason == "not_compared"  # every exposure showed it
    assert by_tag["image_style", "3d"].where == "nobody" and by_tag["image_style", "3d"].reason == "never"
    assert ("image_style", "flat") not in by_tag
    order = [u.where for u in answer.untried]
    assert order == sorted(order, key=["scene", "library", "nobody"].index)
    assert "saw of it is worth 120 exposures at most" in tag_of(answer, {"benefit": "cash_back"}).sentence
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
    assert answer.says[0] == (
        "依据场景 welcome 的第 1 号画像，面向 age 为 30、level 为“beginner”的用户"
        "（总体效应未剔除同时展示的其他标签的影响）："
    )
    assert SHOWN["benefit"]["cash_back"] == 30_000


def log_of_bucket(epsilon: float, n: int = 60_000) -> Log:
    """Women like loud, men do not mind it, and a bucket shows women loud and men plain, all but a share ε."""
    rng = np.random.default_rng(3)
    women = rng.random(n) < 0.5
    best = np.where(women, 2, 4)
    rng = np.random.default_rng([3, round(100 * epsilon)])
    variant = np.where(rng.random(n) < epsilon, rng.integers(0, 6, n), best)
    loud = np.isin(variant, (2, 3))
    click = rng.random(n) < 1 / (1 + np.exp(2 - 0.2 * loud - 0.9 * women * loud))
    gender = np.where(women, "f", "m").tolist()
    propensity = epsilon / 6 + (1 - epsilon) * (variant == best)
    return log_of({"gender": gender}, TAGS, variant, click, propensity=propensity, unit=np.arange(n))


@pytest.fixture(scope="module")
def twins() -> dict[str, tuple[PortraitRun, list[PortraitCell]]]:
    """The analyses of a random bucket and of a model bucket of the same users."""
    found = {}
    for bucket, epsilon in (("random", 1.0), ("model", 0.1)):
        coded = code(log_of_bucket(epsilon))
        statistics, preference = attribute_coded(coded), preferences(coded)
        agreed = agreements({Method.STATISTICS: statistics.insights, Method.PREFERENCE: preference.insights})
        analysis: Any = SimpleNamespace(
            attribution=statistics, preference=preference, consensus=[one for one in agreed if one.holds]
        )
        facts = run(taxonomy=None, exposures=60_000, log_hash=bucket, shown=None, overlaps=overlaps_of(analysis))
        found[bucket] = facts, list(portrait_cells(analysis))
    return found


@pytest.mark.parametrize("gender", ["f", "m"])
def test_a_model_bucket_promises_what_its_random_twin_does(
    stored: Database, twins: dict[str, tuple[PortraitRun, list[PortraitCell]]], gender: str
) -> None:
    """The mix that the model chose has women's clicks on loud and men's on plain; weighed by propensity it is gone."""
    answers = {}
    for bucket, (facts, made) in twins.items():
        with stored.transaction(person("ann")) as session:
            store_portrait(session, "welcome", facts, made)
        answers[bucket] = design(stored, {"gender": gender})
    truth = {"loud": 0.2 + 0.9 * (gender == "f")}
    odds = [1.0, math.exp(truth["loud"])]
    for tone, among in (("calm", [odds[1], 1.0]), ("plain", [odds[1], 1.0])):
        rates = [o * math.exp(-2) / (1 + o * math.exp(-2)) for o in among]
        truth[tone] = -2 - logit(sum(rates) / 2)
    for tone, expected in truth.items():
        random, model = (tag_of(answers[bucket], {"tone": tone}) for bucket in ("random", "model"))
        for tag in (random, model):
            assert tag.low is not None and tag.high is not None and tag.expected is not None
            assert math.log1p(tag.low) <= expected <= math.log1p(tag.high), (tone, tag)
            if tag.low > 0 or tag.high < 0:
                assert (tag.expected > 0) == (expected > 0)
        assert model.expected == pytest.approx(random.expected, abs=0.35)
        assert (model.high or 0) - (model.low or 0) > (random.high or 0) - (random.low or 0)
        assert (model.n or 0) < (random.n or 0) / 2  # though it showed one tone to nearly everybody
    loud = tag_of(answers["model"], {"tone": "loud"})
    assert (loud.low or 0) > 1 if gender == "f" else -0.2 < (loud.expected or 0) < 0.7
    rates = [answers[bucket].click_rate or 0.0 for bucket in ("random", "model")]
    assert rates[1] == pytest.approx(rates[0], rel=0.1)  # not of what the model showed, which is clicked more
