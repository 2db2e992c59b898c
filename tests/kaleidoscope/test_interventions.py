from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqlalchemy import select

from kaleidoscope.database import Database
from kaleidoscope.errors import ConflictError, ForbiddenError, InputError, NotFoundError
from kaleidoscope.interventions import (
    NEW,
    Compiled,
    DescribedVariant,
    InterventionSpec,
    Resolution,
    Rule,
    Target,
    add_intervention,
    change_intervention,
    conflicts,
    end_intervention,
    find_conflicts,
    get_intervention,
    list_interventions,
    resolve,
    rule_of,
    upcoming_rules,
)
from kaleidoscope.review import VariantFilter, make_variants, move_variants
from kaleidoscope.tables import Variant, now
from kaleidoscope.vocabulary import InterventionKind, Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.stock import stocked

T0 = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
PIN, BLOCK = InterventionKind.PIN, InterventionKind.BLOCK

# v0 … v5: two copies × three images
VARIANTS = [
    DescribedVariant(
        id=f"v{3 * c + i}",
        materials={"copy": f"c{c}", "image": f"i{i}"},
        tags={"tone": (("warm", "cool")[c],), "subject": ("product",) if i == 0 else ("person", "gold")},
    )
    for c in range(2)
    for i in range(3)
]
ALL = tuple(variant.id for variant in VARIANTS)
TONES = {"warm": ("v0", "v1", "v2"), "cool": ("v3", "v4", "v5")}


def rule(id: str, kind: InterventionKind, target: Mapping[str, Any], *, made: int = 0, **fields: Any) -> Rule:
    return Rule(id=id, kind=kind, target=Target.model_validate(target), created_at=T0 + made * HOUR, **fields)


def tone(value: str) -> dict[str, Any]:
    return {"tag": {"tone": value}}


def left(*rules: Rule, user: Mapping[str, str] | None = None, at: datetime = T0) -> tuple[str, ...]:
    return resolve(rules, VARIANTS, user or {}, at).eligible


# ── what may be said ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "target",
    [{}, {"variant": "v1", "material": "c1"}, {"tag": {}}, {"tag": {"a": "b", "c": "d"}}, {"variant": ""}, {"x": "y"}],
)
def test_a_target_is_exactly_one_thing(target: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Target.model_validate(target)


@pytest.mark.parametrize(
    "wrong",
    [
        {"starts_at": "2026-01-01T00:00:00"},
        {"starts_at": "2026-01-02T00:00:00Z", "ends_at": "2026-01-01T00:00:00Z"},
        {"starts_at": "2026-01-01T00:00:00Z", "ends_at": "2026-01-01T01:00:00+01:00"},
        {"segment": {"age": 7}},
        {"segment": {"age": "a\nb"}},
        {"segment": {"": "x"}},
        {"priority": 10**9},
        {"kind": "force"},
        {"unknown": 1},
        {"note": "\0"},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        InterventionSpec.model_validate({"kind": "pin", "target": {"variant": "v1"}, **wrong})


def test_equal_moments_are_stored_alike() -> None:
    cet = datetime(2026, 1, 1, 1, tzinfo=timezone(HOUR))
    assert (
        rule("a", PIN, {"variant": "v1"}, starts_at=cet).model_dump(mode="json")["starts_at"] == "2026-01-01T00:00:00Z"
    )


# ── resolving ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_rules_everything_is_eligible() -> None:
    assert resolve([], VARIANTS, {}, T0) == Resolution(None, frozenset(), ALL, ALL, (), None)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ({"variant": "v4"}, ("v4",)),
        ({"material": "c1"}, ("v3", "v4", "v5")),
        ({"tag": {"subject": "gold"}}, ("v1", "v2", "v4", "v5")),
        ({"tag": {"subject": "none"}}, ()),
    ],
)
def test_a_rule_names_a_variant_a_material_or_a_tag(target: dict[str, Any], named: tuple[str, ...]) -> None:
    assert left(rule("b", BLOCK, target)) == tuple(id for id in ALL if id not in named)
    assert left(rule("p", PIN, target)) == (named or ALL)


def test_blocks_beat_pins_of_equal_priority_even_narrower_ones() -> None:
    block, pin = rule("b", BLOCK, tone("warm")), rule("p", PIN, {"material": "i0"}, segment={"age": "young"})
    assert left(block, pin, user={"age": "young"}) == ("v3",)


def test_a_pin_of_higher_priority_keeps_what_a_block_names() -> None:
    block, pin = rule("b", BLOCK, tone("warm")), rule("p", PIN, {"material": "i0"}, priority=1)
    result = resolve([block, pin], VARIANTS, {}, T0)
    assert result.eligible == ("v0", "v3")
    assert result.blocked == {"v1", "v2"}
    assert result.unpinned == TONES["cool"], "bucket random knows no pins, so the block holds there"
    assert [(a.rule, a.outcome, a.reason) for a in result.applied] == [
        ("p", "applied", ""),
        ("b", "overruled", "pin 'p' outranks it for 1 of its variants"),
    ]


def test_pins_that_agree_hold_together() -> None:
    assert left(rule("a", PIN, tone("warm")), rule("b", PIN, {"material": "i0"})) == ("v0",)


WARM, COOL = rule("a", PIN, tone("warm"), made=0), rule("b", PIN, tone("cool"), made=0)


@pytest.mark.parametrize(
    ("warm", "cool", "winner"),
    [
        ({"priority": 1}, {"segment": {"age": "young"}, "made": 9}, "warm"),
        ({"made": 9}, {"segment": {"age": "young"}}, "cool"),
        ({"segment": {"age": "young"}}, {"segment": {"age": "young", "city": "x"}}, "cool"),
        ({"made": 1}, {"made": 2}, "cool"),
        ({}, {}, "warm"),
    ],
    ids=["priority", "segment-before-age", "narrower", "later", "id"],
)
def test_of_two_pins_that_contradict_each_other_one_wins(
    warm: dict[str, Any], cool: dict[str, Any], winner: str
) -> None:
    rules = [rule("a", PIN, tone("warm"), **warm), rule("b", PIN, tone("cool"), **cool)]
    result = resolve(rules, VARIANTS, {"age": "young", "city": "x"}, T0)
    assert result.eligible == TONES[winner]
    assert result.pinned == set(TONES[winner])
    assert result.applied[1].outcome == "ignored"
    assert "outranks it, and no variant is in both" in result.applied[1].reason


def test_a_pin_whose_variants_are_all_blocked_is_ignored_with_a_reason() -> None:
    result = resolve([rule("p", PIN, {"variant": "v0"}), rule("b", BLOCK, tone("warm"))], VARIANTS, {}, T0)
    assert (result.pinned, result.eligible) == (None, TONES["cool"])
    assert result.applied[1].outcome == "ignored"
    assert result.applied[1].reason == "every variant it pins is blocked"


def test_a_pin_that_names_nothing_is_ignored_with_a_reason() -> None:
    result = resolve([rule("p", PIN, {"variant": "gone"})], VARIANTS, {}, T0)
    assert result.eligible == ALL
    assert result.applied[0].reason == "none of the variants is what it names"


def test_everything_blocked_says_so() -> None:
    result = resolve([rule("x", BLOCK, tone("warm")), rule("y", BLOCK, tone("cool"))], VARIANTS, {}, T0)
    assert (result.eligible, result.unpinned) == ((), ())
    assert result.reason == "every variant is blocked, by 'x', 'y'"
    assert resolve([], [], {}, T0).reason == "there are no variants"


def test_a_segment_is_all_of_its_features() -> None:
    block = rule("b", BLOCK, tone("warm"), segment={"age": "young", "city": "x"})
    assert left(block, user={"age": "young", "city": "x", "more": "z"}) == TONES["cool"]
    assert left(block, user={"age": "young"}) == left(block, user={"age": "young", "city": "y"}) == ALL


def test_a_window_holds_its_start_and_not_its_end() -> None:
    block = rule("b", BLOCK, tone("warm"), starts_at=T0, ends_at=T0 + HOUR)
    tick = timedelta(microseconds=1)
    seen = [left(block, at=T0 + d) == TONES["cool"] for d in (-tick, 0 * tick, HOUR - tick, HOUR)]
    assert seen == [False, True, True, False]


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(InputError, match="no time zone"):
        left(at=datetime(2026, 1, 1))


MOMENTS = st.none() | st.integers(0, 4).map(lambda h: T0 + h * HOUR)
SEGMENTS = st.dictionaries(st.sampled_from(["age", "city"]), st.sampled_from(["x", "y"]), max_size=2)
TARGETS = st.sampled_from(
    [{"variant": f"v{n}"} for n in range(7)]
    + [{"material": m} for m in ("c0", "c1", "i0", "i1", "none")]
    + [{"tag": {"tone": "warm"}}, {"tag": {"subject": "gold"}}, {"tag": {"subject": "none"}}]
)


@st.composite
def rule_lists(draw: Callable[[Any], Any]) -> list[Rule]:
    rules = []
    for n in range(draw(st.integers(0, 7))):
        start, end = draw(MOMENTS), draw(MOMENTS)
        if start is not None and end is not None and end <= start:
            end = None
        fields = {"segment": draw(SEGMENTS), "starts_at": start, "ends_at": end, "priority": draw(st.integers(-1, 1))}
        rules.append(
            rule(f"r{n}", draw(st.sampled_from([PIN, BLOCK])), draw(TARGETS), made=draw(st.integers(0, 2)), **fields)
        )
    return rules


def by_the_book(
    rules: Sequence[Rule], user: Mapping[str, str], at: datetime
) -> tuple[set[str] | None, set[str], list[str], list[str]]:
    """docs/releases.md, sentence by sentence: pinned, blocked, eligible, unpinned."""

    def names(rule: Rule) -> set[str]:
        target = rule.target
        return {
            v.id
            for v in VARIANTS
            if target.variant == v.id
            or target.material in v.materials.values()
            or any(value in v.tags.get(dimension, ()) for dimension, value in (target.tag or {}).items())
        }

    active = [
        r
        for r in rules
        if (r.starts_at is None or r.starts_at <= at)
        and (r.ends_at is None or at < r.ends_at)
        and r.segment.items() <= user.items()
    ]
    active.sort(key=lambda r: r.id)
    active.sort(key=lambda r: r.created_at, reverse=True)
    active.sort(key=lambda r: len(r.segment), reverse=True)
    active.sort(key=lambda r: ["block", "pin"].index(r.kind))
    active.sort(key=lambda r: r.priority, reverse=True)
    shown, pinned, blocked = set(ALL), None, set()
    for r in active:
        if r.kind == "block":
            blocked |= names(r)
            if pinned is None:
                shown -= names(r)
        elif shown & names(r):
            shown &= names(r)
            pinned = shown
    return pinned, blocked - shown, [v for v in ALL if v in shown], [v for v in ALL if v not in blocked]


@settings(max_examples=400, deadline=None)
@given(rule_lists(), st.lists(st.tuples(SEGMENTS, st.integers(-1, 5)), min_size=1, max_size=6), st.randoms())
def test_compiled_rules_do_what_the_book_says_in_whatever_order_they_come(
    rules: list[Rule], requests: list[tuple[dict[str, str], int]], random: Any
) -> None:
    shuffled = random.sample(rules, len(rules))
    compiled = Compiled(rules, VARIANTS)
    for user, hours in requests:
        at = T0 + hours * HOUR
        result = compiled.resolve(user, at)
        seen = result.pinned, result.blocked, list(result.eligible), list(result.unpinned)
        assert seen == by_the_book(rules, user, at)
        assert result == resolve(shuffled, VARIANTS, user, at)
        assert (result.reason is None) == bool(result.eligible)
        assert not result.blocked & set(result.eligible)
        if not result.eligible:
            assert not result.unpinned, "only blocks can leave nothing"


def test_a_compiled_set_forgets_answers_rather_than_growing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kaleidoscope.interventions.MAX_REMEMBERED_IDS", 0)
    rules = [rule(f"r{n}", BLOCK, {"variant": f"v{n % 6}"}, segment={f"f{n}": "x"}) for n in range(6)]
    compiled = Compiled(rules, VARIANTS)
    for mask in range(64):
        user = {f"f{n}": "x" for n in range(6) if mask >> n & 1}
        assert compiled.resolve(user, T0).blocked == {f"v{n}" for n in range(6) if mask >> n & 1}
    assert len(compiled._answers) <= 16


# ── conflicts ───────────────────────────────────────────────────────────────────────────────────────────────────────


def codes(new: Rule, *others: Rule) -> list[str]:
    return [c.code for c in find_conflicts(new, others, VARIANTS, T0)]


def test_a_pin_and_a_block_of_the_same_variants_conflict_and_the_winner_is_named() -> None:
    new, old = rule("new", PIN, {"material": "i0"}, priority=2), rule("old", BLOCK, tone("warm"))
    (conflict,) = find_conflicts(new, [old], VARIANTS, T0)
    assert (conflict.code, conflict.rules, conflict.winner, conflict.variants) == (
        "pin_against_block", ("new", "old"), "new", 1,
    )  # fmt: skip
    assert "'new'" in conflict.message and "'old'" in conflict.message and "1 variant" in conflict.message


def test_two_pins_of_different_variants_conflict() -> None:
    (conflict,) = find_conflicts(rule("new", PIN, tone("warm"), made=1), [COOL], VARIANTS, T0)
    assert (conflict.code, conflict.winner, conflict.variants) == ("disjoint_pins", "new", 3)


@pytest.mark.parametrize(
    ("new", "old"),
    [
        ({}, {"segment": {"age": "old"}}),
        ({"segment": {"age": "young"}}, {"segment": {"age": "old"}}),
        ({"starts_at": T0 + HOUR}, {"ends_at": T0 + HOUR}),
        ({}, {"ends_at": T0}),
    ],
    ids=["somebody-in-both", "nobody-in-both", "one-after-the-other", "over"],
)
def test_only_rules_that_can_meet_conflict(new: dict[str, Any], old: dict[str, Any]) -> None:
    found = codes(rule("new", PIN, tone("warm"), **new), rule("old", BLOCK, {"variant": "v0"}, **old))
    assert found == (["pin_against_block"] if old == {"segment": {"age": "old"}} and not new else [])


def test_rules_that_agree_do_not_conflict() -> None:
    assert codes(rule("new", PIN, tone("warm")), rule("old", PIN, {"material": "i0"})) == []
    assert codes(rule("new", BLOCK, tone("warm")), rule("old", BLOCK, {"material": "i0"})) == []


def test_a_rule_that_touches_nothing_is_told() -> None:
    (conflict,) = find_conflicts(rule("new", PIN, {"variant": "gone"}), [WARM], VARIANTS, T0)
    assert conflict.code == "touches_nothing"
    assert conflict.message == "This rule touches no variant: variant gone names none of the 6 approved ones."


def test_the_broadest_segments_that_would_see_nothing_are_told() -> None:
    cool = rule("cool", BLOCK, tone("cool"), segment={"age": "young"}, starts_at=T0 + HOUR, ends_at=T0 + 2 * HOUR)
    new = rule("new", BLOCK, tone("warm"), ends_at=T0 + 9 * HOUR)
    other = rule("other", BLOCK, {"variant": "v3"}, segment={"city": "x"})
    found = find_conflicts(new, [cool, other], VARIANTS, T0)
    assert [(c.code, c.segment, c.rules) for c in found] == [("nothing_left", {"age": "young"}, ("new", "cool"))]
    assert found[0].message == "With this rule nothing is left to show for age=young."
    assert codes(new.model_copy(update={"ends_at": T0 + HOUR}), cool, other) == []


def test_a_pin_that_outranks_the_blocks_leaves_nothing_only_to_bucket_random() -> None:
    found = find_conflicts(
        rule("new", BLOCK, tone("warm")),
        [rule("cool", BLOCK, tone("cool")), rule("pin", PIN, tone("cool"), priority=1)],
        VARIANTS,
        T0,
    )
    assert [c.code for c in found] == ["nothing_left"]
    assert "bucket random" in found[0].message


def test_what_was_left_unchecked_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kaleidoscope.interventions.MAX_SEGMENTS", 3)
    others = [rule(f"o{n}", BLOCK, {"variant": f"v{n}"}, segment={f"f{n}": "x"}) for n in range(4)]
    assert codes(rule("new", BLOCK, {"variant": "v5"}), *others) == ["not_all_checked"]


# ── services ────────────────────────────────────────────────────────────────────────────────────────────────────────

BAN = InterventionSpec(kind=BLOCK, target=Target(material="c1"), segment={"age": "young"}, note="Law, 第 3 条")


def with_variants(database: Database) -> None:
    """Scene `welcome` with its 16 variants approved."""
    stocked(database, approved=True)
    with database.transaction(person("ann")) as session:
        make_variants(session, "welcome")
        move_variants(session, "welcome", "submit", VariantFilter())
    with database.transaction(person("rex")) as session:
        move_variants(session, "welcome", "approve", VariantFilter())


def test_a_rule_is_stored_changed_and_ended(database: Database) -> None:
    stocked(database)
    with database.transaction(person("eve", Role.EDITOR)) as session:
        added = add_intervention(session, "welcome", "ban", BAN)
        assert (added.version, added.author, added.target) == (1, "eve", {"material": "c1"})
    with database.transaction(person("eve", Role.EDITOR)) as session:
        later = BAN.model_copy(update={"priority": 5, "starts_at": T0, "target": Target(tag={"benefit": "cash_back"})})
        changed = change_intervention(session, "welcome", "ban", later, version=1)
        assert (changed.version, changed.priority) == (2, 5)
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:
        stored = get_intervention(session, "welcome", "ban")
        assert rule_of(stored) == Rule(id="ban", created_at=added.created_at, **later.model_dump())
        assert [r.id for r in upcoming_rules(session, "welcome")] == ["ban"]
    with database.transaction(person("eve", Role.EDITOR)) as session:
        assert end_intervention(session, "welcome", "ban").version == 3
        assert end_intervention(session, "welcome", "ban").version == 3
        with pytest.raises(ConflictError, match="has ended"):
            change_intervention(session, "welcome", "ban", BAN, version=3)
        assert upcoming_rules(session, "welcome") == []


def test_a_change_to_an_old_version_is_refused_with_both(sqlite: Database) -> None:
    stocked(sqlite)
    with sqlite.transaction(person("ann")) as session:
        add_intervention(session, "welcome", "ban", BAN)
    with sqlite.transaction(person("ann")) as session:
        change_intervention(session, "welcome", "ban", BAN.model_copy(update={"priority": 1}), version=1)
    with (
        sqlite.transaction(person("bob")) as session,
        pytest.raises(ConflictError) as caught,
    ):
        change_intervention(session, "welcome", "ban", BAN.model_copy(update={"priority": 2}), version=1)
    assert caught.value.details is not None
    assert (caught.value.details["yours"]["priority"], caught.value.details["current"]["priority"]) == (2, 1)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (BAN.model_copy(update={"target": Target(variant="nope")}), "no variant 'nope' in scene 'welcome'"),
        (BAN.model_copy(update={"target": Target(material="nope")}), "no material 'nope'"),
        (BAN.model_copy(update={"target": Target(tag={"benefit": "nope"})}), "'nope'"),
        (BAN.model_copy(update={"target": Target(tag={"nope": "x"})}), "'nope'"),
        (BAN.model_copy(update={"ends_at": T0 - 9999 * HOUR}), "is over"),
    ],
)
def test_a_rule_about_nothing_is_refused(sqlite: Database, spec: InterventionSpec, says: str) -> None:
    stocked(sqlite)
    with sqlite.transaction(person("ann")) as session:
        with pytest.raises(InputError, match=says):
            add_intervention(session, "welcome", "ban", spec)
        with pytest.raises(NotFoundError, match="scene 'nope'"):
            add_intervention(session, "nope", "ban", BAN)
        with pytest.raises(InputError, match="cannot be an id"):
            add_intervention(session, "welcome", "No", BAN)


def test_only_editors_make_rules_and_only_in_their_business(sqlite: Database) -> None:
    stocked(sqlite)
    with sqlite.transaction(person("ann")) as session:
        add_intervention(session, "welcome", "ban", BAN)
        with pytest.raises(ConflictError, match="already"):
            add_intervention(session, "welcome", "ban", BAN)
    for role in (Role.VIEWER, Role.REVIEWER, Role.PUBLISHER):
        with sqlite.transaction(person("pat", role)) as session:
            with pytest.raises(ForbiddenError):
                add_intervention(session, "welcome", "other", BAN)
            with pytest.raises(ForbiddenError):
                change_intervention(session, "welcome", "ban", BAN, version=1)
            with pytest.raises(ForbiddenError):
                end_intervention(session, "welcome", "ban")
    with sqlite.transaction(person("mal", business="rival")) as session:
        for call in (get_intervention, end_intervention):
            with pytest.raises(NotFoundError):
                call(session, "welcome", "ban")
        with pytest.raises(NotFoundError):
            list_interventions(session, "welcome")


def test_rules_are_listed_by_id_and_by_what_is_in_force(database: Database) -> None:
    stocked(database)
    soon = now() + HOUR
    with database.transaction(person("ann")) as session:
        for id, window in (
            ("always", {}),
            ("later", {"starts_at": soon}),
            ("until", {"ends_at": soon}),
            ("window", {"starts_at": T0, "ends_at": soon}),
            ("ended", {}),
        ):
            add_intervention(session, "welcome", id, BAN.model_copy(update=window))
        end_intervention(session, "welcome", "ended")
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:

        def listed(**which: Any) -> list[str]:
            return [r.id for r in list_interventions(session, "welcome", **which).items]

        assert listed() == ["always", "ended", "later", "until", "window"]
        assert listed(active_at=now()) == ["always", "until", "window"]
        assert listed(active_at=soon) == ["always", "later"]
        assert listed(active_at=T0 - HOUR) == ["always", "until"]
        page = list_interventions(session, "welcome", limit=2)
        assert [r.id for r in page.items] == ["always", "ended"]
        assert listed(cursor=page.next_cursor) == ["later", "until", "window"]
        with pytest.raises(InputError, match="no time zone"):
            listed(active_at=datetime(2026, 1, 1))


def test_conflicts_are_about_approved_variants_and_coming_rules(database: Database) -> None:
    with_variants(database)
    pin = InterventionSpec(kind=PIN, target=Target(tag={"image_style": "flat"}))
    with database.transaction(person("ann")) as session:
        add_intervention(session, "welcome", "ban", BAN)
        add_intervention(session, "welcome", "ended", BAN)
        end_intervention(session, "welcome", "ended")
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:
        (conflict,) = conflicts(session, "welcome", pin)
        # c1 goes with i3 alone among the flat images, in two layouts
        assert (conflict.code, conflict.rules, conflict.winner, conflict.variants) == (
            "pin_against_block", (NEW, "ban"), "ban", 2,
        )  # fmt: skip
        assert conflict.segment == {"age": "young"}
        assert conflicts(session, "welcome", pin, ignoring="ban") == []
        with pytest.raises(NotFoundError):
            conflicts(session, "welcome", pin, ignoring="nope")
    with database.transaction(person("rex")) as session:
        holding = [v.id for v in session.scalars(select(Variant)) if v.materials["copy"] == "c1"]
        move_variants(session, "welcome", "reject", VariantFilter(ids=tuple(holding)), reason="no")
        assert [c.code for c in conflicts(session, "welcome", BAN, ignoring="ban")] == ["touches_nothing"]
