"""Scenes: what a spec may say, who wins when two edit, and a scene kept as code."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaleidoscope.combiner import count
from kaleidoscope.database import Database
from kaleidoscope.errors import ConflictError, ForbiddenError, InputError, JobError, NotFoundError
from kaleidoscope.scenes import (
    apply_scene,
    change_scene,
    create_scene,
    diff_scene,
    export_scene,
    get_scene,
    list_scenes,
    parse_scene,
    read_scene,
    space_of,
    spec_of,
)
from kaleidoscope.taxonomy import check_changes, evolve
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.stock import add_library, spec, stocked


def test_a_scene_comes_back_as_it_was_written(database: Database) -> None:
    stocked(database)
    with database.transaction(person("vic", Role.VIEWER), write=False) as session:
        assert spec_of(get_scene(session, "welcome")) == spec()
        assert [s.id for s in list_scenes(session).items] == ["welcome"]


def test_another_business_sees_and_uses_none_of_it(database: Database) -> None:
    stocked(database)
    with database.transaction(person("eve", business="rival")) as session:
        assert list_scenes(session).items == []
        with pytest.raises(NotFoundError):
            get_scene(session, "welcome")
        add_library(session, prefix="r-")
        with pytest.raises(InputError, match="there is no material 'c1'"):
            create_scene(session, "stolen", spec())


def test_only_editors_write_scenes(database: Database) -> None:
    stocked(database)
    with database.transaction(person("vic", Role.VIEWER, Role.REVIEWER, Role.PUBLISHER)) as session:
        with pytest.raises(ForbiddenError, match="editor"):
            create_scene(session, "other", spec())
        with pytest.raises(ForbiddenError, match="editor"):
            change_scene(session, "welcome", spec(name="Mine"), version=1)


def test_of_two_editors_the_second_gets_both_versions(database: Database) -> None:
    stocked(database)
    with database.transaction(person("ann")) as session:
        change_scene(session, "welcome", spec(name="First"), version=1)
    with database.transaction(person("bob")) as session, pytest.raises(ConflictError) as caught:
        change_scene(session, "welcome", spec(name="Second"), version=1)
    assert caught.value.details is not None
    assert caught.value.details["yours"]["spec"]["name"] == "Second"
    assert caught.value.details["current"]["spec"]["name"] == "First"
    assert caught.value.details["current"]["version"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": [{"name": "copy", "kind": "copy", "materials": ["nope"]}]}, "there is no material 'nope'"),
        ({"slots": [{"name": "copy", "kind": "image", "materials": ["c1"]}]}, "is copy, the slot takes image"),
        ({"slots": [{"name": "copy", "kind": "copy", "materials": ["c1", "c1"]}]}, "'c1' is there twice"),
        ({"baseline": {"copy": "c1"}}, "one material for each slot"),
        ({"baseline": {"copy": "c9", "image": "i1", "layout": "l1"}}, "'c9' is not a material"),
        ({"constraints": ["forbid copy.benefit=gold_bar"]}, "gold_bar"),
        ({"constraints": ["forbid coppy:c1"]}, "coppy"),
        ({"constraints": ["forbid copy:c1", "forbid copy:c1"]}, "there twice"),
        ({"slots": [{"name": "variant_id", "kind": "copy", "materials": ["c1"]}], "baseline": None}, "variant_id"),
    ],
)
def test_a_spec_that_contradicts_the_library_is_refused_with_the_reason(
    sqlite: Database, changes: dict[str, object], message: str
) -> None:
    with sqlite.transaction(person("ann")) as session:
        add_library(session)
        with pytest.raises(InputError, match=message):
            create_scene(session, "welcome", spec(**changes))


def test_of_many_problems_some_are_named_and_the_others_counted(sqlite: Database) -> None:
    slots = [
        {"name": "copy", "kind": "copy", "materials": ["c1", *(f"m{n:02}" for n in range(22))]},
        {"name": "image", "kind": "image", "materials": ["c1", "c2", "l1", "i1", "i1"]},
    ]
    with sqlite.transaction(person("ann")) as session:
        add_library(session)
        with pytest.raises(InputError) as caught:
            create_scene(session, "welcome", spec(slots=slots, constraints=[], baseline=None))
        first, *others = caught.value.message.splitlines()
        assert first.startswith("slot 'copy': there is no material 'm00', 'm01', ") and "'m10'" not in first
        assert first.endswith("'m09' and 12 more. Add them first.")
        assert others == [
            "slot 'image': material 'i1' is there twice. Name it once.",
            "slot 'image': material 'c1', 'c2' are copy, the slot takes image.",
            "slot 'image': material 'l1' is layout, the slot takes image.",
        ]
        with pytest.raises(InputError) as caught:
            create_scene(session, "welcome", spec(constraints=[f"forbid copy:x{n}" for n in range(30)]))
        assert len(caught.value.message.splitlines()) == 11
        assert caught.value.message.endswith("… and 20 more problems")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "scene"),
        ({"slots": []}, "name"),
        ({"name": "x", "slots": [], "colour": 1}, "colour"),
        ({"name": "x\ny", "slots": [{"name": "copy", "kind": "copy"}]}, "name"),
        ({"name": "x", "slots": [{"name": "Copy!", "kind": "copy"}]}, "slots"),
        ({"name": "x", "slots": [{"name": "copy", "kind": "copy"}], "cap": 1}, "cap"),
    ],
)
def test_a_malformed_spec_names_the_field(raw: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_scene(raw)


def test_the_space_obeys_constraints_and_leaves_out_retired_materials(database: Database) -> None:
    from kaleidoscope.review import move_materials

    stocked(database)
    with database.transaction(person("ann")) as session:
        assert count(space_of(session, get_scene(session, "welcome")).space) == 3 * 3 * 2 - 2
        move_materials(session, "retire", ["i1"])
        assert count(space_of(session, get_scene(session, "welcome")).space) == 3 * 2 * 2


def test_constraints_read_tags_under_the_current_taxonomy(database: Database) -> None:
    stocked(database)
    with database.transaction(person("ann")) as session:
        changes = check_changes([{"op": "rename", "dimension": "benefit", "value": "red_packet", "id": "hongbao"}])
        evolve(session, changes)
        renamed = spec(constraints=["forbid copy.benefit=hongbao with image.subject=product"])
        scene = change_scene(session, "welcome", renamed, version=None)
        assert count(space_of(session, scene).space) == 16


def test_a_constraint_on_a_tag_that_is_gone_is_named_and_never_ignored(database: Database) -> None:
    stocked(database)
    with database.transaction(person("ann")) as session:
        evolve(
            session, check_changes([{"op": "rename", "dimension": "benefit", "value": "red_packet", "id": "hongbao"}])
        )
        with pytest.raises(InputError, match=r"scene 'welcome': constraints: .*red_packet"):
            space_of(session, get_scene(session, "welcome"))


def test_a_constraint_may_be_on_a_tag_that_no_material_has_yet(sqlite: Database) -> None:
    stocked(sqlite, constraints=["forbid copy.benefit=lottery"])
    with sqlite.transaction(person("ann")) as session:
        assert count(space_of(session, get_scene(session, "welcome")).space) == 18


def test_a_hard_check_forbids_and_a_soft_one_remarks(sqlite: Database) -> None:
    from kaleidoscope.content import Copy
    from kaleidoscope.materials import add_material

    long = [*({"name": n, "kind": n, "materials": m} for n, m in (("image", ["i1"]), ("layout", ["l1", "l2"])))]
    slots = [{"name": "copy", "kind": "copy", "materials": ["c1", "long"]}, *long]
    with sqlite.transaction(person("ann")) as session:
        add_library(session)
        add_material(session, "long", Copy(title="word " * 60), [])
        base = {"slots": slots, "constraints": [], "baseline": None}
        soft = create_scene(session, "soft", spec(**base, checks={"text_fits": "soft"}))
        hard = create_scene(session, "hard", spec(**base, checks={"text_fits": "hard"}))
        off = create_scene(session, "off", spec(**base, checks={"text_fits": "off"}))
        found = space_of(session, soft)
        assert count(found.space) == 4
        assert len(found.remarks_on({"copy": "long", "image": "i1", "layout": "l1"})) == 1
        assert found.remarks_on({"copy": "c1", "image": "i1", "layout": "l1"}) == []
        assert count(space_of(session, hard).space) == 2
        assert space_of(session, off).remarks == ()


def test_export_and_apply_round_trip(database: Database, tmp_path: Path) -> None:
    scene = stocked(database, cap=10, traffic={"exposures_per_day": 5000, "click_rate": 0.03}, product={"yield": 3.2})
    file = tmp_path / "scene.yaml"
    file.write_text(export_scene(scene), encoding="utf-8")
    id, read = read_scene(file)
    assert (id, read) == ("welcome", spec_of(scene))
    with database.transaction(person("ann")) as session:
        assert apply_scene(session, id, read).lines == ()
        assert get_scene(session, "welcome").version == 1
        assert export_scene(get_scene(session, "welcome")) == file.read_text(encoding="utf-8")


def test_a_diff_says_what_applying_changes(database: Database) -> None:
    stocked(database)
    slots = spec().model_dump(mode="json")["slots"]
    slots[0]["materials"] = ["c1", "c2"]
    changed = spec(name="Hello", slots=slots, constraints=["forbid copy:c1 with layout:l2"], cap=5)
    with database.transaction(person("ann")) as session:
        diff = diff_scene(session, "welcome", changed)
        assert not diff.creates
        assert set(diff.lines) == {
            "~ name: 'Welcome' → 'Hello'",
            "- slot copy: c3",
            "- constraints: forbid copy.benefit=red_packet with image.subject=product",
            "+ constraints: forbid copy:c1 with layout:l2",
            "+ cap: 5",
        }
        assert apply_scene(session, "welcome", changed).lines == diff.lines
        assert diff_scene(session, "welcome", changed).lines == ()
        assert diff_scene(session, "new", changed).creates


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "begins with"),
        ("scene: a\nscene: b\nname: x\nslots: []", "twice"),
        ("scene: a\nname: [", "YAML"),
        ("scene: A b\nname: x\nslots: []", "cannot be an id"),
        ("scene: !!python/object/apply:os.system [ls]", "YAML"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_scene(file)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (float("inf"), "inf is no number"),
        (float("-inf"), "-inf is no number"),
        (float("nan"), "nan is no number"),
        (2**63, "beyond 64 bits"),
        (-(2**63) - 1, "beyond 64 bits"),
        (10**4000, "beyond 64 bits"),
    ],
)
def test_a_product_value_is_a_number_that_can_be_kept(value: float, says: str) -> None:
    with pytest.raises(InputError, match=rf"scene\.product\.yield: .*{says}.*give a .*or text"):
        spec(product={"yield": value})


def test_product_values_up_to_64_bits_stay_as_they_are(sqlite: Database) -> None:
    product = {"most": 2**63 - 1, "least": -(2**63), "rate": 1e308, "text": "3.85 %"}
    assert stocked(sqlite, product=product).spec["product"] == product


def test_a_new_scene_differs_by_what_its_file_says(sqlite: Database) -> None:
    stocked(sqlite)
    slot = {"name": "copy", "kind": "copy", "materials": ["c1"]}
    bare = parse_scene({"name": "Bare", "slots": [slot]})
    full = {"product": {"yield": 1}, "attribution": {"click_hours": 2}, "cap": 4, "constraints": ["forbid copy:c1"]}
    with sqlite.transaction(person("ann")) as session:
        assert diff_scene(session, "new", bare).lines == ("+ name: Bare", "+ slot copy (copy): c1")
        assert diff_scene(session, "new", parse_scene({"name": "Full", "slots": [slot], **full})).lines == (
            "+ name: Full",
            "+ product.yield: 1",
            "+ slot copy (copy): c1",
            "+ constraints: forbid copy:c1",
            "+ cap: 4",
            "+ attribution.click_hours: 2.0",
        )


def test_a_field_that_is_newer_than_a_scene_is_no_difference(sqlite: Database) -> None:
    scene = stocked(sqlite)
    newer = ("context", "attribution", "fatigue_hours", "approve_automatically")
    with sqlite.transaction(person("ann")) as session:
        stored = session.get_one(type(scene), ("acme", "welcome"))
        stored.spec = {key: value for key, value in stored.spec.items() if key not in newer}
        session.flush()
        assert diff_scene(session, "welcome", spec()).lines == ()
        assert diff_scene(session, "welcome", spec(context=["page"])).lines == ("+ context: page",)


def test_only_a_reviewer_lets_the_rule_approve(sqlite: Database) -> None:
    stocked(sqlite)
    editor, both = person("ed", Role.EDITOR), person("bea", Role.EDITOR, Role.REVIEWER)
    with sqlite.transaction(editor) as session:
        for write in (
            lambda: create_scene(session, "other", spec(approve_automatically=True)),
            lambda: change_scene(session, "welcome", spec(approve_automatically=True), version=None),
            lambda: apply_scene(session, "welcome", spec(approve_automatically=True)),
        ):
            with pytest.raises(ForbiddenError, match=r"approve_automatically: ed may not switch this on.* reviewer"):
                write()
    with sqlite.transaction(both) as session:
        change_scene(session, "welcome", spec(approve_automatically=True), version=None)
    with sqlite.transaction(editor) as session:
        loose = spec(approve_automatically=True, checks={"text_fits": "off"})
        with pytest.raises(ForbiddenError, match="checks: ed may not change them while approve_automatically is on"):
            change_scene(session, "welcome", loose, version=None)
        change_scene(session, "welcome", spec(approve_automatically=True, name="Hello"), version=None)
        change_scene(session, "welcome", spec(checks={"text_fits": "off"}), version=None)


def test_a_scene_that_was_stored_with_what_no_spec_holds_is_named_and_can_be_replaced(sqlite: Database) -> None:
    scene = stocked(sqlite)
    with sqlite.transaction(person("ann")) as session:
        stored = session.get_one(type(scene), ("acme", "welcome"))
        stored.spec = {**stored.spec, "product": {"yield": 2**70}}
        session.flush()
        with pytest.raises(JobError, match=r"Scene 'welcome'\.product\.yield: .*beyond 64 bits.*Replace its spec"):
            spec_of(stored)
        assert len(apply_scene(session, "welcome", spec(product={"yield": 3})).lines) == 1
        assert spec_of(stored).product == {"yield": 3}
