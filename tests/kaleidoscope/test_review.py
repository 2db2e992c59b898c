"""Review: variants come and go with the scene, people approve what others wrote, and changes take approvals back."""

from __future__ import annotations

import itertools

import pytest
from sqlalchemy import select

from kaleidoscope.access import RULE
from kaleidoscope.businesses import audit_trail, change_business
from kaleidoscope.combiner import variant_id
from kaleidoscope.content import DEFAULT_PLACEHOLDERS, Copy, Placeholder
from kaleidoscope.database import Database
from kaleidoscope.errors import ConflictError, ForbiddenError, InputError, NotFoundError
from kaleidoscope.materials import change_material
from kaleidoscope.release import ReleasePlan, draft_release, rollback, start
from kaleidoscope.review import (
    MOVES,
    VariantFilter,
    approval_holds,
    count_variants,
    find_variants,
    get_variant,
    make_variants,
    move_materials,
    move_variants,
    plan_variants,
)
from kaleidoscope.scenes import change_scene
from kaleidoscope.tables import Business, Scene, Variant
from kaleidoscope.vocabulary import ReviewState, Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.stock import approve_library, spec, stocked

ANN, REX = person("ann"), person("rex")


def test_variants_are_the_legal_combinations_and_making_them_again_changes_nothing(database: Database) -> None:
    stocked(database)
    with database.transaction(ANN) as session:
        made = make_variants(session, "welcome")
        assert (made.legal, made.created, made.coverage) == (16, 16, None)
        again = make_variants(session, "welcome")
        assert (again.created, again.kept, again.retired) == (0, 16, 0)
        for variant in session.scalars(select(Variant)):
            assert variant.id == variant_id(variant.materials)
            assert variant.state == ReviewState.DRAFT


def test_what_is_no_longer_possible_is_retired_and_comes_back_as_a_draft(database: Database) -> None:
    stocked(database)
    with database.transaction(ANN) as session:
        make_variants(session, "welcome")
        change_scene(session, "welcome", spec(constraints=["forbid copy:c1"]), version=None)
        made = make_variants(session, "welcome")
        assert (made.kept, made.retired) == (12, 4)
        gone = find_variants(session, "welcome", VariantFilter(states=(ReviewState.RETIRED,))).items
        assert {v.materials["copy"] for v in gone} == {"c1"}
        assert {v.reason for v in gone} == {"forbidden by a constraint or a hard check"}
        change_scene(session, "welcome", spec(), version=None)
        assert make_variants(session, "welcome").restored == 4


def test_a_cap_keeps_the_baseline_and_what_was_there(database: Database) -> None:
    stocked(database, cap=10)
    with database.transaction(ANN) as session:
        made = make_variants(session, "welcome")
        assert made.created <= 10
        assert made.coverage is not None
        assert get_variant(session, "welcome", variant_id({"copy": "c2", "image": "i1", "layout": "l1"}))
        before = {v.id for v in find_variants(session, "welcome").items}
        change_scene(session, "welcome", spec(cap=12), version=None)
        assert make_variants(session, "welcome").retired == 0
        assert before <= {v.id for v in find_variants(session, "welcome").items}


def test_a_forbidden_baseline_and_contradicting_constraints_are_named(sqlite: Database) -> None:
    stocked(sqlite, constraints=["forbid copy:c2 with image:i1"])
    with sqlite.transaction(ANN) as session:
        with pytest.raises(InputError, match="baseline: forbid copy:c2 with image:i1"):
            make_variants(session, "welcome")
        change_scene(
            session, "welcome", spec(constraints=["require copy:c1", "forbid copy:c1"], baseline=None), version=None
        )
        with pytest.raises(InputError, match="forbid copy:c1"):
            make_variants(session, "welcome")


def test_filters_combine_terms_states_and_ids(database: Database) -> None:
    stocked(database)
    with database.transaction(ANN) as session:
        make_variants(session, "welcome")

        def ids(*where: str, **more: object) -> list[str]:
            return [v.id for v in find_variants(session, "welcome", VariantFilter(where, **more)).items]  # type: ignore[arg-type]

        assert len(ids("copy:c1")) == 4
        assert len(ids("copy:c2|c3", "image.image_style=flat")) == 8
        assert len(ids("copy:c2 with image:i2")) == 2
        assert len(ids("benefit=cash_back|red_packet")) == 10
        assert len(ids("image_style=*")) == 16
        some = ids("copy:c1")[:2]
        assert ids(ids=tuple(some)) == some
        assert ids(remarked=True) == []
        assert ids(states=(ReviewState.APPROVED,)) == []
        for text in ("copy:nope", "benefit=gold", "nonsense", "copy.benefit matches image.subject"):
            with pytest.raises(InputError):
                ids(text)
        assert get_variant(session, "welcome", some[0][:8]).id == some[0]
        for wrong in ("ffff", "%", "_" * 24, some[0][:3]):
            with pytest.raises(NotFoundError):
                get_variant(session, "welcome", wrong)


def test_pages_of_variants_hold_each_once(database: Database) -> None:
    stocked(database)
    with database.transaction(ANN) as session:
        make_variants(session, "welcome")
        seen, cursor = [], None
        while True:
            page = find_variants(session, "welcome", VariantFilter(("image.image_style=flat",)), cursor=cursor, limit=3)
            seen += [v.id for v in page.items]
            cursor = page.next_cursor
            if cursor is None:
                break
        assert seen == sorted(set(seen))
        assert len(seen) == 10


def test_a_variant_is_approved_by_somebody_else_after_its_materials(database: Database) -> None:
    stocked(database)
    with database.transaction(ANN) as session:
        make_variants(session, "welcome")
        assert move_variants(session, "welcome", "submit").moved == 16
        assert move_variants(session, "welcome", "approve").skipped == {"your own: somebody else has to review it": 16}
    with database.transaction(REX) as session:
        moved = move_variants(session, "welcome", "approve")
        assert moved.moved == 0
        assert all(why.endswith("is not approved") for why in moved.skipped)
        approve_library(session)
        assert move_variants(session, "welcome", "approve", VariantFilter(("copy:c1",))).moved == 4
        assert count_variants(session, "welcome") == {"in_review": 12, "approved": 4}
        approved = find_variants(session, "welcome", VariantFilter(states=(ReviewState.APPROVED,))).items
        assert {v.reviewer for v in approved} == {"rex"}
        assert approval_holds(session, approved) == {v.id for v in approved}


def test_steps_out_of_order_are_counted_and_not_taken(database: Database) -> None:
    stocked(database)
    with database.transaction(REX) as session:
        assert move_materials(session, "approve", ["c1"]).skipped == {"draft, not in review": 1}
        assert move_materials(session, "restore", ["c1"]).skipped == {"draft, not retired": 1}
        with pytest.raises(NotFoundError):
            move_materials(session, "submit", ["c1", "nope"])
        with pytest.raises(InputError, match="no step"):
            move_materials(session, "publish", ["c1"])


def test_nobody_approves_their_own_by_way_of_somebody_elses_hand(database: Database) -> None:
    stocked(database)
    own = {"your own: somebody else has to review it": 1}
    with database.transaction(REX) as session:
        change_material(session, "c1", content=Copy(title="Written by rex"), version=None)
        move_materials(session, "retire", ["c1"])
    with database.transaction(person("bob")) as session:
        move_materials(session, "restore", ["c1"])
        change_material(session, "c1", tags=[], version=None)
        move_materials(session, "submit", ["c1"])
    with database.transaction(REX) as session:
        assert move_materials(session, "approve", ["c1"]).skipped == own
    with database.transaction(person("bob")) as session:
        assert move_materials(session, "approve", ["c1"]).skipped == own
    with database.transaction(person("kim")) as session:
        assert move_materials(session, "approve", ["c1"]).moved == 1
    with database.transaction(person("bob")) as session:
        change_material(session, "c1", content=Copy(title="Written by bob"), version=None)
        move_materials(session, "submit", ["c1"])
    with database.transaction(REX) as session:
        assert move_materials(session, "approve", ["c1"]).moved == 1  # what rex wrote was approved by kim


def test_a_rejection_needs_a_reason_and_can_be_submitted_again(database: Database) -> None:
    stocked(database)
    with database.transaction(REX) as session:
        move_materials(session, "submit", ["c1"])
        with pytest.raises(InputError, match="say why"):
            move_materials(session, "reject", ["c1"], reason="  ")
        assert move_materials(session, "reject", ["c1"], reason="misleading").moved == 1
        assert move_materials(session, "submit", ["c1"]).moved == 1


@pytest.mark.parametrize("move", sorted(MOVES))
def test_each_step_takes_its_role(sqlite: Database, move: str) -> None:
    stocked(sqlite)
    others = set(Role) - {MOVES[move].role, Role.ADMIN}
    with sqlite.transaction(person("kim", *others)) as session:
        with pytest.raises(ForbiddenError):
            move_materials(session, move, ["c1"], reason="x")
        with pytest.raises(ForbiddenError):
            move_variants(session, "welcome", move, reason="x")


def test_changing_a_material_takes_back_the_approval_of_every_variant_that_holds_it(database: Database) -> None:
    stocked(database, approved=True)
    with database.transaction(ANN) as session:
        make_variants(session, "welcome")
        move_variants(session, "welcome", "submit")
    with database.transaction(REX) as session:
        assert move_variants(session, "welcome", "approve").moved == 16
    with database.transaction(person("bob")) as session:
        change_material(session, "c2", content=Copy(title="Cash back, always"), version=None)
        assert count_variants(session, "welcome") == {"draft": 6, "approved": 10}
        back = find_variants(session, "welcome", VariantFilter(states=(ReviewState.DRAFT,))).items
        assert {v.materials["copy"] for v in back} == {"c2"}
        assert all(v.reason and "c2" in v.reason and v.author == "bob" for v in back)
        assert approval_holds(session, find_variants(session, "welcome").items).isdisjoint(v.id for v in back)


def filled(database: Database, **changes: object) -> None:
    """The scene with 16 approved variants, of which the 6 with c2 show {yield} and {first_name}."""
    stocked(database, product={"yield": 3.85, "price": "9.99"}, **changes)
    with database.transaction(ANN) as session:
        change_business(session, version=None, placeholders=DEFAULT_PLACEHOLDERS)
        text = Copy(title="{first_name}, earn {yield}")
        change_material(session, "c2", content=text, version=None)
        make_variants(session, "welcome")
        move_variants(session, "welcome", "submit")
    with database.transaction(REX) as session:
        approve_library(session)
        assert move_variants(session, "welcome", "approve").moved == 16


def drafts(database: Database) -> set[tuple[str, str | None, str]]:
    """Copy, reason and author of the drafts; every other variant is approved, and may be released."""
    with database.transaction(ANN, write=False) as session:
        variants = find_variants(session, "welcome").items
        holding = approval_holds(session, variants)
    assert {v.id for v in variants if v.state == ReviewState.APPROVED} == holding
    assert {v.state for v in variants if v.id not in holding} <= {ReviewState.DRAFT}
    return {(v.materials["copy"], v.reason, v.author) for v in variants if v.id not in holding}


@pytest.mark.parametrize(
    ("product", "reasons"),
    [
        ({"yield": "30 %", "price": "9.99"}, {"product value yield changed"}),
        ({"price": "9.99"}, {"product value yield changed"}),
        ({"yield": 3.85, "price": "1.00", "name": "Card"}, set()),  # no copy shows any of these
        ({"yield": "3.85", "price": "9.99"}, set()),  # shown alike
        ({"yield": 3.85, "price": "9.99", "first_name": "Bob"}, set()),  # the request says that one
    ],
)
def test_a_product_value_that_copies_show_is_part_of_what_was_approved(
    database: Database, product: dict[str, object], reasons: set[str]
) -> None:
    filled(database)
    with database.transaction(person("bob")) as session:
        change_scene(session, "welcome", spec(product=product), version=None)
    assert drafts(database) == {("c2", reason, "bob") for reason in reasons}


@pytest.mark.parametrize(
    ("name", "change", "reopens"),
    [
        ("yield", {"fallback": {"en": "guaranteed"}}, True),
        ("yield", {"max_length": 3}, True),
        ("yield", {"source": "request"}, True),
        ("first_name", {"fallback": {"en": "winner"}}, True),
        ("yield", {"description": "Another word for it"}, False),
        ("city", {"fallback": {"en": "nowhere"}}, False),
    ],
)
def test_a_placeholder_that_copies_hold_is_part_of_what_was_approved(
    database: Database, name: str, change: dict[str, object], reopens: bool
) -> None:
    filled(database)
    changed = [
        Placeholder.model_validate({**p.model_dump(), **change}) if p.name == name else p for p in DEFAULT_PLACEHOLDERS
    ]
    with database.transaction(person("bob")) as session:
        change_business(session, version=None, placeholders=changed)
    assert drafts(database) == ({("c2", f"placeholder {name} changed", "bob")} if reopens else set())


OWN = "your own: somebody else has to review it"
PRODUCT = {"yield": 3.85, "price": "9.99"}


def valued(database: Database, **changes: object) -> None:
    """The scene with approved materials and 16 drafts, of which 6 show {yield} and 4 {price}."""
    stocked(database, product=PRODUCT, **changes)
    with database.transaction(ANN) as session:
        change_business(session, version=None, placeholders=DEFAULT_PLACEHOLDERS)
        change_material(session, "c2", content=Copy(title="{first_name}, earn {yield}"), version=None)
        change_material(session, "c1", content=Copy(title="Now {price}"), version=None)
    with database.transaction(REX) as session:
        approve_library(session)
    with database.transaction(ANN) as session:
        make_variants(session, "welcome")


def price(database: Database, user: str, **product: object) -> None:
    with database.transaction(person(user)) as session:
        change_scene(session, "welcome", spec(product={**PRODUCT, **product}), version=None)


def reviewed(database: Database, user: str) -> tuple[int, dict[str, int]]:
    """Submit everything, and have somebody approve what they can: how many that were, and why not the others."""
    with database.transaction(person("sue")) as session:
        move_variants(session, "welcome", "submit")
    with database.transaction(person(user)) as session:
        moved = move_variants(session, "welcome", "approve", VariantFilter(states=(ReviewState.IN_REVIEW,)))
    return moved.moved, dict(moved.skipped)


def test_nobody_approves_a_product_value_they_changed_while_it_was_a_draft(database: Database) -> None:
    valued(database)
    price(database, "bob", **{"yield": "99 %"})
    assert reviewed(database, "Bob") == (10, {OWN: 6})
    assert reviewed(database, "rex") == (6, {})


def test_a_later_change_by_somebody_else_leaves_ones_own_ones_own(database: Database) -> None:
    valued(database)
    price(database, "bob", **{"yield": "99 %"})
    assert reviewed(database, "bob") == (10, {OWN: 6})
    price(database, "kim", **{"yield": "99.0 %"})  # the author of the variants is kim now
    assert reviewed(database, "bob") == (0, {OWN: 6})
    assert reviewed(database, "kim") == (0, {OWN: 6})
    assert reviewed(database, "rex") == (6, {})
    price(database, "kim", **{"yield": "3 %"})
    assert reviewed(database, "bob") == (6, {})  # what bob set was approved by rex


def test_whoever_made_the_variants_does_not_approve_them_when_their_author_is_somebody_else(database: Database) -> None:
    valued(database)
    with database.transaction(ANN) as session:
        move_variants(session, "welcome", "submit")
    price(database, "kim", **{"yield": "3 %", "price": "5"})
    with database.transaction(ANN, write=False) as session:
        assert {(v.materials["copy"], v.author) for v in find_variants(session, "welcome").items} == {
            ("c1", "kim"),
            ("c2", "kim"),
            ("c3", "ann"),
        }
    assert reviewed(database, "ann") == (0, {OWN: 16})


def test_whoever_sets_a_fallback_does_not_approve_what_may_show_it(database: Database) -> None:
    valued(database)
    changed = [
        p.model_copy(update={"fallback": {"en": "sure"}}) if p.name == "yield" else p for p in DEFAULT_PLACEHOLDERS
    ]
    with database.transaction(person("ada")) as session:
        change_business(session, version=None, placeholders=changed)
    assert reviewed(database, "ada") == (10, {OWN: 6})


def test_a_value_is_its_authors_when_somebody_else_brings_it_to_light(sqlite: Database) -> None:
    valued(sqlite)
    price(sqlite, "bob", first_name="You won")  # which the request says, so nobody sees it
    assert reviewed(sqlite, "rex") == (16, {})
    changed = [
        p.model_copy(update={"source": "product"}) if p.name == "first_name" else p for p in DEFAULT_PLACEHOLDERS
    ]
    with sqlite.transaction(person("ada")) as session:
        change_business(session, version=None, placeholders=changed)
    assert reviewed(sqlite, "bob") == (0, {OWN: 6})
    assert reviewed(sqlite, "ada") == (0, {OWN: 6})
    assert reviewed(sqlite, "rex") == (6, {})


def test_a_name_in_another_case_is_the_same_person(sqlite: Database) -> None:
    stocked(sqlite)
    with sqlite.transaction(person("Zoe")) as session:
        change_material(session, "c1", content=Copy(title="Written by Zoe"), version=None)
    with sqlite.transaction(person("bob")) as session:
        change_material(session, "c1", tags=[], version=None)
        move_materials(session, "submit", ["c1", "c2"])
    with sqlite.transaction(person("zoe")) as session:
        assert move_materials(session, "approve", ["c1", "c2"]).skipped == {OWN: 1}
    with sqlite.transaction(person("Ann")) as session:
        make_variants(session, "welcome")
    with sqlite.transaction(person("ann")) as session:
        move_variants(session, "welcome", "submit")
        assert move_variants(session, "welcome", "approve").skipped == {OWN: 18}


def by_rule(database: Database, user: str = "ann") -> int:
    with database.transaction(person(user)) as session:
        return make_variants(session, "welcome").approved


def switch(database: Database, user: str, on: bool, **product: object) -> None:
    with database.transaction(person(user)) as session:
        changed = spec(product={**PRODUCT, **product}, approve_automatically=on)
        change_scene(session, "welcome", changed, version=None)


def test_the_rule_never_approves_what_a_person_rejected(database: Database) -> None:
    valued(database)
    rejected = VariantFilter(("copy:c3 with layout:l1",))
    with database.transaction(REX) as session:
        move_variants(session, "welcome", "submit")
        assert move_variants(session, "welcome", "reject", rejected, reason="no").moved == 3
    switch(database, "kim", on=True)
    with database.transaction(ANN) as session:
        assert move_variants(session, "welcome", "submit", rejected).moved == 3
    assert by_rule(database) == 13
    with database.transaction(REX) as session:
        assert move_variants(session, "welcome", "approve", rejected).moved == 3
    with database.transaction(ANN) as session:  # and c3 falls back to draft
        change_material(session, "c3", content=Copy(title="Another"), version=None)
        move_materials(session, "submit", ["c3"])
    with database.transaction(REX) as session:
        move_materials(session, "approve", ["c3"])
        assert count_variants(session, "welcome") == {"approved": 16}


def test_the_rule_never_approves_a_value_that_was_changed_after_it_was_switched_on(database: Database) -> None:
    valued(database)
    switch(database, "kim", on=True)
    assert by_rule(database) == 16
    switch(database, "bob", on=True, **{"yield": "99 %"})
    assert by_rule(database, "bob") == 0
    assert reviewed(database, "rex") == (6, {})
    with database.transaction(ANN) as session:  # the values are those that rex approved
        change_material(session, "c2", content=Copy(title="Earn {yield}"), version=None)
        move_materials(session, "submit", ["c2"])
    with database.transaction(REX) as session:
        move_materials(session, "approve", ["c2"])
        assert count_variants(session, "welcome") == {"approved": 16}


def test_nobody_has_the_rule_approve_values_of_their_own(database: Database) -> None:
    valued(database)
    switch(database, "bob", on=True, **{"yield": "99 %"})
    assert by_rule(database, "bob") == 10
    switch(database, "bob", on=False, **{"yield": "99 %"})
    switch(database, "bob", on=True, **{"yield": "99 %"})
    assert by_rule(database, "bob") == 0
    switch(database, "bob", on=False, **{"yield": "99 %"})
    switch(database, "kim", on=True, **{"yield": "99 %"})
    assert by_rule(database, "bob") == 6


def test_what_was_changed_past_the_services_is_not_what_was_approved(sqlite: Database) -> None:
    filled(sqlite)
    with sqlite.transaction(ANN) as session:
        scene = session.get(Scene, ("acme", "welcome"))
        assert scene is not None
        scene.spec = {**scene.spec, "product": {"yield": "30 %"}}
        held = approval_holds(session, find_variants(session, "welcome").items)
        assert len(held) == 10
        scene.spec = {**scene.spec, "product": {"yield": 3.85}}
        assert len(approval_holds(session, find_variants(session, "welcome").items)) == 16
        business = session.get(Business, "acme")
        assert business is not None
        business.placeholders = [{**p, "max_length": 1} for p in business.placeholders]
        assert len(approval_holds(session, find_variants(session, "welcome").items)) == 10


def test_a_copy_whose_placeholder_is_gone_is_not_approved(sqlite: Database) -> None:
    filled(sqlite)
    with sqlite.transaction(ANN) as session:
        move_materials(session, "retire", ["c2"])
        change_business(session, version=None, placeholders=DEFAULT_PLACEHOLDERS[1:])  # without yield
        assert move_materials(session, "restore", ["c2"]).moved == 1
        why = "holds {yield}, which is no placeholder any more: change the copy"
        assert move_materials(session, "submit", ["c2", "c1"]).skipped == {why: 1, "approved, not draft or rejected": 1}
        change_material(session, "c2", content=Copy(title="{first_name}, earn"), version=None)
        assert move_materials(session, "submit", ["c2"]).moved == 1


def test_a_note_names_the_live_releases_that_still_show_what_is_taken_out_of_use(database: Database) -> None:
    filled(database)
    plan = ReleasePlan.model_validate({"shares": {"control": 0.5, "random": 0.5}, "stages": [1.0]})
    tested = plan.model_copy(update={"stages": (0.1, 1.0)})
    with database.transaction(REX) as session:
        for stages in (plan, tested, plan):
            draft_release(session, "welcome", stages)
        start(session, "welcome", 1)
        start(session, "welcome", 2)
    with database.transaction(ANN) as session:
        moved = move_materials(session, "retire", ["i3", "i2"])
        live = "of scene welcome, which is live until another release takes over"
        assert moved.notes == tuple(f"materials i3, i2 are in release {n} {live}" for n in (1, 2))
        assert move_materials(session, "restore", ["i3"]).notes == ()
        assert move_materials(session, "retire", ["i2"]).notes == ()  # it is retired already
        rollback(session, "welcome", reason="two stages are too few")
        id = variant_id({"copy": "c2", "image": "i1", "layout": "l1"})
        rejected = move_variants(session, "welcome", "retire", VariantFilter(ids=(id,)))
        assert rejected.notes == (f"variant {id} is in release 1 {live}",)
        others = move_variants(session, "welcome", "retire", VariantFilter(("copy:c1|c3",)))
        assert len(others.notes) == 1 and f"and {others.moved - 5} more are in release 1" in others.notes[0]
        rollback(session, "welcome", reason="nothing is live")
        assert move_materials(session, "retire", ["c1"]).notes == ()


def test_retiring_a_material_takes_its_variants_out_of_what_can_be_released(database: Database) -> None:
    stocked(database, approved=True)
    with database.transaction(ANN) as session:
        make_variants(session, "welcome")
        move_variants(session, "welcome", "submit")
    with database.transaction(REX) as session:
        move_variants(session, "welcome", "approve")
        move_materials(session, "retire", ["i1"])
        held = approval_holds(session, find_variants(session, "welcome").items)
        assert len(held) == 12
    with database.transaction(ANN) as session:
        change_scene(session, "welcome", spec(baseline=None, constraints=[]), version=None)
        assert make_variants(session, "welcome").retired == 4


def test_the_rule_approves_what_has_approved_materials_and_no_remarks(database: Database) -> None:
    stocked(database, approve_automatically=True)
    with database.transaction(ANN) as session:
        assert make_variants(session, "welcome").approved == 0
    with database.transaction(REX) as session:
        approve_library(session)
        assert count_variants(session, "welcome") == {"approved": 16}
        assert {v.reviewer for v in find_variants(session, "welcome").items} == {RULE}


def test_another_business_moves_nothing(database: Database) -> None:
    stocked(database)
    with database.transaction(ANN) as session:
        make_variants(session, "welcome")
    with database.transaction(person("eve", business="rival")) as session:
        for act in (
            lambda: move_variants(session, "welcome", "submit"),
            lambda: find_variants(session, "welcome"),
            lambda: move_materials(session, "submit", ["c1"]),
            lambda: make_variants(session, "welcome"),
        ):
            with pytest.raises(NotFoundError):
                act()
        assert count_variants(session, "welcome") == {}


def test_variants_are_worked_out_without_a_lock_and_refused_where_something_changed_meanwhile(
    database: Database,
) -> None:
    stocked(database)
    with database.transaction(ANN, write=False) as session:
        planned = plan_variants(session, "welcome")
    with database.transaction(ANN) as session:
        made = make_variants(session, "welcome", planned)
        assert (made.created, made.warnings) == (16, ())
        variant = find_variants(session, "welcome").items[0]
        assert (variant.version, variant.state) == (1, ReviewState.DRAFT)
        key = f"welcome/{variant.id}"
        [entry] = audit_trail(session, entity="variants", key=key).items
        assert entry.action == "created" and entry.after is not None and entry.after["materials"] == variant.materials
    with database.transaction(ANN) as session, pytest.raises(ConflictError, match="changed meanwhile"):
        make_variants(session, "welcome", planned)
    with database.transaction(ANN, write=False) as session:
        planned = plan_variants(session, "welcome")
    with database.transaction(ANN) as session:
        change_material(session, "c1", content=Copy(title="Another"), version=None)
    with database.transaction(ANN) as session, pytest.raises(ConflictError, match="changed meanwhile"):
        make_variants(session, "welcome", planned)


def test_making_variants_says_what_is_odd_about_the_constraints(database: Database) -> None:
    stocked(database, constraints=["forbid copy.benefit=lottery"])
    with database.transaction(ANN) as session:
        assert any("rules out no combination" in warning for warning in make_variants(session, "welcome").warnings)


def test_a_filter_that_no_statement_can_hold_is_refused_with_what_to_do(
    sqlite: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    valued(sqlite)
    with sqlite.transaction(ANN, write=False) as session:
        same = VariantFilter((" with ".join(["copy:c3"] * 100),) * 20)
        assert {v.materials["copy"] for v in find_variants(session, "welcome", same).items} == {"c3"}
        images, layouts = ("i1", "i2", "i3"), ("l1", "l2")
        terms = [f"image:{'|'.join(i)}" for n in (1, 2, 3) for i in itertools.permutations(images, n)]
        many = VariantFilter(tuple(f"{a} with layout:{b}" for a in terms for b in layouts))
        monkeypatch.setattr("kaleidoscope.review.MAX_TERMS", 8)
        with pytest.raises(InputError, match=r"where: 9 terms, which 14 materials in slots carry.*Leave terms out"):
            find_variants(session, "welcome", many)
        monkeypatch.setattr("kaleidoscope.review.MAX_NAMED", 2)
        with pytest.raises(InputError, match="1 terms, which 3 materials"):
            find_variants(session, "welcome", VariantFilter(("image_style=*",)))
        with pytest.raises(InputError, match="3 variants are named"):
            find_variants(session, "welcome", VariantFilter(ids=("a", "b", "c")))
