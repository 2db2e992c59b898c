"""The vocabulary, its changes and the laws of reading old tags under a new version; its files; its store."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from kaleidoscope.database import Database, Session
from kaleidoscope.errors import ConflictError, ForbiddenError, InputError, NotFoundError
from kaleidoscope.tables import AuditEntry, Intervention, Material, Scene, TaxonomyVersion, now
from kaleidoscope.taxonomy import (
    BUILT_IN,
    Change,
    Dimension,
    Labels,
    Mapping,
    Taxonomy,
    Unknown,
    Value,
    affected_materials,
    affected_rules,
    apply,
    check_changes,
    compose,
    current_taxonomy,
    evolve,
    format_taxonomy,
    found_taxonomy,
    import_taxonomy,
    infer_mapping,
    list_versions,
    mapping_between,
    parse_taxonomy,
    read_changes,
    read_mapping,
    read_taxonomy,
    tags_now,
    taxonomy_at,
    translate,
    translate_column,
    write_taxonomy,
)
from kaleidoscope.vocabulary import Layer, Role
from tests.kaleidoscope.people import person

EMPTY = Mapping({})


def value(id_: str, **more: Any) -> Value:
    return Value(id=id_, labels=Labels(en=id_.title(), zh=id_), **more)


def dimension(id_: str, *values: str, **more: Any) -> Dimension:
    labels = Labels(en=id_.title(), zh=id_)
    return Dimension(id=id_, layer=Layer.CONTENT, labels=labels, values=tuple(map(value, values)), **more)


SMALL = Taxonomy(
    dimensions=(dimension("tone", "warm", "cold"), dimension("offer", "coupon", "gift", "draw", multi=True))
)


def changed(*changes: dict[str, Any], of: Taxonomy = SMALL) -> tuple[Taxonomy, Mapping]:
    return apply(of, check_changes(list(changes)))


def plain(id_: str) -> dict[str, Any]:
    return value(id_).model_dump(mode="json")


# ── the built-in vocabulary ──


def test_built_in_covers_what_finance_pages_vary() -> None:
    dimensions = {d.id: d for d in BUILT_IN.dimensions}
    presentation = {"image_style", "colour_tone", "main_colour", "button_colour", "font_size", "density", "motion"}
    driving = {"benefit", "herd", "urgency", "authority", "social_proof"}
    descriptive = {"headline", "plain_language", "yield", "safety"}
    assert {d.id for d in BUILT_IN.dimensions if d.layer is Layer.PRESENTATION} == presentation | {"subject"}
    assert {d.id for d in BUILT_IN.dimensions if d.factor == "driving"} == driving
    assert {d.id for d in BUILT_IN.dimensions if d.factor == "descriptive"} == descriptive
    assert [v.id for v in dimensions["image_style"].values] == ["realistic", "flat", "3d", "line"]
    assert {v.id for v in dimensions["benefit"].values} == {"red_packet", "cash_back", "lottery", "coupon"}


def test_built_in_labels_are_in_both_languages_and_tell_values_apart() -> None:
    for d in BUILT_IN.dimensions:
        assert len(d.values) > 1
        for language in ("en", "zh"):
            labels = [getattr(v.labels, language) for v in d.values]
            assert len(set(labels)) == len(labels), d.id
        assert all(not v.labels.zh.isascii() for v in d.values)


@pytest.mark.parametrize("wrong", ["", "Flat", "a b", "-a", "a" * 64, "a\n", "é"])
def test_ids_are_slugs(wrong: str) -> None:
    with pytest.raises(ValidationError, match="id"):
        value(wrong)


def test_ids_are_unique() -> None:
    with pytest.raises(ValidationError, match="value 'a' is there twice"):
        dimension("tone", "a", "a")
    with pytest.raises(ValidationError, match="dimension 'tone' is there twice"):
        Taxonomy(dimensions=(dimension("tone", "a"), dimension("tone", "a")))


# ── tags of a material ──


def test_tags_of_the_vocabulary_are_fine() -> None:
    SMALL.check_tags([])
    SMALL.check_tags([("tone", "warm"), ("offer", "gift"), ("offer", "coupon"), ("tone", "warm")])


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ([("tome", "warm")], "no dimension 'tome'. Did you mean 'tone'?"),
        ([("zzz", "warm")], "no dimension 'zzz'. There are: tone, offer."),
        ([("tone", "Wram")], "value 'Wram' of dimension 'tone' does not exist. Did you mean 'warm'?"),
        ([("tone", "warm"), ("tone", "cold")], "'tone' takes one value, not 'warm', 'cold'"),
    ],
)
def test_wrong_tags_are_refused_with_the_nearest(tags: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(InputError) as error:
        SMALL.check_tags(tags)
    assert message in str(error.value)


def test_every_wrong_tag_is_named_at_once() -> None:
    with pytest.raises(InputError) as error:
        SMALL.check_tags([("tome", "warm"), ("offer", "gfit"), ("tone", "warm"), ("tone", "cold")])
    assert len(str(error.value).splitlines()) == 3


def test_retired_tags_are_read_and_not_given() -> None:
    taxonomy, mapping = changed(
        {"op": "retire", "dimension": "tone", "value": "cold"}, {"op": "retire", "dimension": "offer"}
    )
    assert translate([("tone", "cold"), ("offer", "gift")], [mapping]) == [("tone", "cold"), ("offer", "gift")]
    with pytest.raises(InputError, match=r"'cold' of dimension 'tone' is retired. There are: warm"):
        taxonomy.check_tags([("tone", "cold")])
    with pytest.raises(InputError, match="dimension 'offer' is retired"):
        taxonomy.check_tags([("offer", "gift")])
    restored, _ = changed(
        {"op": "restore", "dimension": "tone", "value": "cold"}, {"op": "restore", "dimension": "offer"}, of=taxonomy
    )
    assert restored == SMALL


# ── changes ──


def test_rename_of_a_value_keeps_its_place_and_meaning() -> None:
    taxonomy, mapping = changed({"op": "rename", "dimension": "tone", "value": "warm", "id": "cosy"})
    assert taxonomy.tags[:2] == [("tone", "cosy"), ("tone", "cold")]
    assert translate([("tone", "warm"), ("tone", "cold")], [mapping]) == [("tone", "cosy"), ("tone", "cold")]


def test_new_labels_change_no_tag() -> None:
    labels = {"en": "Mood", "zh": "氛围"}
    taxonomy, mapping = changed({"op": "rename", "dimension": "tone", "labels": labels})
    assert taxonomy.dimensions[0].labels == Labels(**labels)
    assert mapping == EMPTY


def test_rename_of_a_dimension_takes_its_values_along() -> None:
    taxonomy, mapping = changed({"op": "rename", "dimension": "tone", "id": "mood"})
    assert taxonomy.tags[:2] == [("mood", "warm"), ("mood", "cold")]
    assert translate([("tone", "warm")], [mapping]) == [("mood", "warm")]


def test_two_values_can_swap_names() -> None:
    _, mapping = changed(
        {"op": "rename", "dimension": "tone", "value": "warm", "id": "spare"},
        {"op": "rename", "dimension": "tone", "value": "cold", "id": "warm"},
        {"op": "rename", "dimension": "tone", "value": "spare", "id": "cold"},
    )
    assert translate([("tone", "warm"), ("tone", "cold")], [mapping]) == [("tone", "cold"), ("tone", "warm")]


def test_split_is_unknown_never_a_guess() -> None:
    taxonomy, mapping = changed({"op": "split", "dimension": "tone", "value": "warm", "into": [plain("a"), plain("b")]})
    assert [v for d, v in taxonomy.tags if d == "tone"] == ["a", "b", "cold"]
    (now,) = translate([("tone", "warm")], [mapping])
    assert now == Unknown(frozenset({("tone", "a"), ("tone", "b")}))
    assert str(now) == "unknown of {a, b}"


def test_split_may_keep_the_value_or_end_in_another_that_exists() -> None:
    taxonomy, mapping = changed({"op": "split", "dimension": "tone", "value": "warm", "into": ["warm", "cold"]})
    assert taxonomy == SMALL
    assert translate([("tone", "warm")], [mapping]) == [Unknown(frozenset({("tone", "warm"), ("tone", "cold")}))]


@pytest.mark.parametrize("into", ["gift", "coupon", plain("present")])
def test_merged_values_are_one(into: Any) -> None:
    taxonomy, mapping = changed({"op": "merge", "dimension": "offer", "values": ["coupon", "gift"], "into": into})
    end = into if isinstance(into, str) else into["id"]
    assert [v for d, v in taxonomy.tags if d == "offer"] == [end, "draw"]
    assert translate([("offer", "coupon"), ("offer", "gift")], [mapping]) == [("offer", end)] * 2


def test_a_split_is_known_again_when_both_parts_are_merged() -> None:
    split = {"op": "split", "dimension": "tone", "value": "warm", "into": [plain("a"), plain("b")]}
    taxonomy, first = changed(split)
    _, second = changed({"op": "merge", "dimension": "tone", "values": ["a", "b"], "into": plain("c")}, of=taxonomy)
    assert translate([("tone", "warm")], [first, second]) == [("tone", "c")]
    _, partly = changed({"op": "merge", "dimension": "tone", "values": ["a"], "into": "cold"}, of=taxonomy)
    assert translate([("tone", "warm")], [first, partly]) == [Unknown(frozenset({("tone", "cold"), ("tone", "b")}))]


def test_a_value_moves_to_another_dimension() -> None:
    taxonomy, mapping = changed({"op": "move", "dimension": "tone", "value": "cold", "to": "offer"})
    assert ("offer", "cold") in taxonomy.tags and ("tone", "cold") not in taxonomy.tags
    assert translate([("tone", "cold")], [mapping]) == [("offer", "cold")]


def test_a_name_that_became_free_can_mean_something_new() -> None:
    taxonomy, first = changed({"op": "rename", "dimension": "tone", "value": "warm", "id": "cosy"})
    taxonomy, second = changed({"op": "add_value", "dimension": "tone", "value": plain("warm")}, of=taxonomy)
    _, third = changed({"op": "rename", "dimension": "tone", "value": "warm", "id": "hot"}, of=taxonomy)
    assert translate([("tone", "warm")], [first, second, third]) == [("tone", "cosy")]
    assert translate([("tone", "warm")], [third]) == [("tone", "hot")]


def test_regroup_and_additions_change_no_tag() -> None:
    taxonomy, mapping = changed(
        {"op": "regroup", "dimension": "tone", "layer": "presentation", "factor": None, "multi": True},
        {"op": "add_dimension", "dimension": dimension("size", "big").model_dump(mode="json")},
        {"op": "add_value", "dimension": "size", "value": plain("small")},
    )
    assert mapping == EMPTY
    assert taxonomy.dimensions[0].layer is Layer.PRESENTATION and taxonomy.dimensions[0].multi
    assert taxonomy.tags[-2:] == [("size", "big"), ("size", "small")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"op": "retire", "dimension": "tome"}, "no dimension 'tome'. Did you mean 'tone'?"),
        ({"op": "retire", "dimension": "tone", "value": "warn"}, "no value 'warn' of dimension 'tone'. Did you mean"),
        ({"op": "rename", "dimension": "tone", "id": "offer"}, "a dimension 'offer' already"),
        ({"op": "rename", "dimension": "tone", "value": "warm", "id": "cold"}, "a value 'cold' of dimension 'tone' al"),
        (
            {"op": "add_value", "dimension": "tone", "value": plain("cold")},
            "a value 'cold' of dimension 'tone' already",
        ),
        ({"op": "add_dimension", "dimension": dimension("tone").model_dump(mode="json")}, "a dimension 'tone' already"),
        ({"op": "move", "dimension": "tone", "value": "warm", "to": "tone"}, "is in dimension 'tone' already"),
        ({"op": "merge", "dimension": "tone", "values": ["warm"], "into": "warm"}, "merged with itself"),
        ({"op": "merge", "dimension": "tone", "values": ["warm"], "into": "wram"}, "no value 'wram'"),
        ({"op": "split", "dimension": "tone", "value": "warm", "into": ["warm", "warm"]}, "same one twice"),
        ({"op": "split", "dimension": "tone", "value": "warm", "into": ["warm", plain("cold")]}, "'cold' of dimension"),
    ],
)
def test_a_change_that_cannot_be_made_is_named(change: dict[str, Any], message: str) -> None:
    fine = {"op": "retire", "dimension": "offer"}
    with pytest.raises(InputError) as error:
        changed(fine, change)
    assert str(error.value).startswith(f"change 2 ({change['op']}): ") and message in str(error.value)


def test_growing_without_end_is_refused() -> None:
    full = Taxonomy(dimensions=(dimension("tone", *(f"v{i}" for i in range(500))),))
    with pytest.raises(InputError, match=r"change 1 \(add_value\): .*at most 500"):
        changed({"op": "add_value", "dimension": "tone", "value": plain("one_more")}, of=full)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([{"op": "spilt"}], "entry 1: Input tag 'spilt'"),
        ([{"dimension": "tone"}], "entry 1: Unable to extract tag"),
        ([{"op": "rename", "dimension": "tone"}], "entry 1: give a new `id`, new `labels`, or both"),
        ([{"op": "rename", "dimension": "tone", "id": "A B"}], "entry 1, id: 'A B' cannot be an id"),
        (
            [{"op": "split", "dimension": "t", "value": "v", "into": ["a"]}],
            "entry 1, into: Tuple should have at least 2",
        ),
        (
            [{"op": "split", "dimension": "t", "value": "v", "into": ["a", {"id": "b", "labels": {"en": "B"}}]}],
            "entry 1, into 'b', labels.zh: Field required",
        ),
        ({"op": "retire"}, "changes: Input should be a valid tuple"),
    ],
)
def test_changes_from_outside_are_checked(raw: object, message: str) -> None:
    with pytest.raises(InputError) as error:
        check_changes(raw)
    assert f"changes: {message.removeprefix('changes: ')}" in str(error.value)


# ── mappings ──


def test_a_mapping_drops_what_stays_the_same() -> None:
    assert Mapping.model_validate({"tone=warm": "tone=warm", "tone": ["tone"]}) == EMPTY
    assert Mapping.model_validate({"tone": "mood", "tone=warm": "mood=warm"}) == Mapping({"tone": ("mood",)})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"tone=": "tone=a"}, "neither `dimension=value` nor `dimension`"),
        ({"tone=warm": "mood"}, "cannot become 'mood'"),
        ({"tone": "mood=warm"}, "cannot become 'mood=warm'"),
        ({"tone=warm": []}, "becomes nothing. Keep it as retired"),
        ({"tone": ["a", "b"]}, "becomes several"),
    ],
)
def test_a_mapping_that_means_nothing_is_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as error:
        Mapping.model_validate(entries)
    assert message in str(error.value)


LAWS = settings(deadline=None)  # a first call imports, and a busy machine is no error

# Few names, so that they collide; taxonomies and whatever changes can be made to them.
NAMES = st.sampled_from(["a", "b", "c", "d"])


@st.composite
def taxonomies(draw: st.DrawFn) -> Taxonomy:
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    return Taxonomy(
        dimensions=tuple(
            dimension(name, *draw(st.lists(NAMES, max_size=4, unique=True)), multi=draw(st.booleans()))
            for name in names
        )
    )


INTO = st.one_of(NAMES, NAMES.map(plain))
CHANGES = st.one_of(
    st.builds(lambda d, i: {"op": "rename", "dimension": d, "id": i}, NAMES, NAMES),
    st.builds(lambda d, v, i: {"op": "rename", "dimension": d, "value": v, "id": i}, NAMES, NAMES, NAMES),
    st.builds(
        lambda d, v, i: {"op": "split", "dimension": d, "value": v, "into": i},
        NAMES,
        NAMES,
        st.lists(INTO, min_size=2, max_size=3),
    ),
    st.builds(
        lambda d, v, i: {"op": "merge", "dimension": d, "values": v, "into": i},
        NAMES,
        st.lists(NAMES, min_size=1, max_size=3),
        INTO,
    ),
    st.builds(lambda d, v, t: {"op": "move", "dimension": d, "value": v, "to": t}, NAMES, NAMES, NAMES),
    st.builds(lambda d, v: {"op": "retire", "dimension": d, "value": v}, NAMES, NAMES),
    st.builds(lambda d, v: {"op": "restore", "dimension": d, "value": v}, NAMES, NAMES),
    st.builds(lambda d, v: {"op": "add_value", "dimension": d, "value": plain(v)}, NAMES, NAMES),
    st.builds(lambda d: {"op": "add_dimension", "dimension": dimension(d, "a").model_dump(mode="json")}, NAMES),
)


History = tuple[list[Taxonomy], list[Mapping], list[dict[str, Any]]]


@st.composite
def histories(draw: st.DrawFn) -> History:
    """Versions, the mappings between them, and the changes; of the drawn changes those that could be made."""
    versions, mappings, made = [draw(taxonomies())], [], []
    for change in draw(st.lists(CHANGES, max_size=12)):
        try:
            after, mapping = changed(change, of=versions[-1])
        except InputError:
            continue
        versions.append(after)
        mappings.append(mapping)
        made.append(change)
    return versions, mappings, made


ANY_TAG = st.tuples(NAMES, NAMES)


def ends(tag: tuple[str, str], mappings: list[Mapping]) -> frozenset[tuple[str, str]]:
    """What a tag can be now, followed step by step: the definition that composition has to meet."""
    now = {tag}
    for mapping in mappings:
        now = {tuple(to.split("=")) for one in now for to in mapping.targets("=".join(one))}  # type: ignore[misc]
    return frozenset(now)


def known(now: tuple[str, str] | Unknown) -> frozenset[tuple[str, str]]:
    return now.of if isinstance(now, Unknown) else frozenset({now})


@LAWS
@given(histories(), st.lists(ANY_TAG))
def test_translation_is_the_steps_one_after_the_other(history: History, tags: list[tuple[str, str]]) -> None:
    _, mappings, _ = history
    assert [known(now) for now in translate(tags, mappings)] == [ends(tag, mappings) for tag in tags]


@LAWS
@given(histories(), st.data())
def test_composition_does_not_depend_on_where_it_is_cut(history: History, data: st.DataObject) -> None:
    _, mappings, _ = history
    cut = data.draw(st.integers(0, len(mappings)))
    assert compose([compose(mappings[:cut]), compose(mappings[cut:])]) == compose(mappings)
    assert compose([EMPTY, *mappings, EMPTY]) == compose(mappings)


@LAWS
@given(histories())
def test_every_old_tag_is_something_in_every_later_version(history: History) -> None:
    versions, mappings, _ = history
    for number, old in enumerate(versions):
        for tag in translate(old.tags, mappings[number:]):
            assert known(tag) <= set(versions[-1].tags)
            assert not isinstance(tag, Unknown) or len(tag.of) > 1


@LAWS
@given(histories())
def test_changes_at_once_are_the_changes_one_by_one(history: History) -> None:
    versions, mappings, made = history
    assert changed(*made, of=versions[0]) == (versions[-1], compose(mappings).within(versions[0]))


@LAWS
@given(histories())
def test_a_mapping_that_was_made_by_changes_could_have_been_written_by_hand(history: History) -> None:
    versions, mappings, _ = history
    given_mapping = compose(mappings).within(versions[0])
    assert infer_mapping(versions[0], versions[-1], given_mapping) == given_mapping
    assert translate(versions[0].tags, [given_mapping]) == translate(versions[0].tags, mappings)


@LAWS
@given(histories())
def test_what_is_stored_is_read_back(history: History) -> None:
    versions, mappings, _ = history
    for taxonomy in versions:
        assert Taxonomy.model_validate(json.loads(json.dumps(taxonomy.model_dump(mode="json")))) == taxonomy
        assert parse_taxonomy(format_taxonomy(taxonomy), "there and back") == taxonomy
    for mapping in mappings:
        assert Mapping.model_validate(json.loads(json.dumps(mapping.model_dump(mode="json")))) == mapping


@LAWS
@given(histories(), NAMES, st.lists(st.one_of(st.none(), st.lists(st.one_of(st.none(), NAMES), max_size=4))))
def test_a_column_of_lists_is_translated_as_its_tags(
    history: History, name: str, rows: list[list[str | None] | None]
) -> None:
    _, mappings, _ = history
    columns = translate_column(pa.array(rows, pa.list_(pa.string())), name, mappings)
    for number, row in enumerate(rows):
        now = translate([(name, v) for v in row or () if v is not None], mappings)
        for column, array in columns.items():
            there = [str(n) if isinstance(n, Unknown) else n[1] for n in now if column in {d for d, _ in known(n)}]
            assert array[number].as_py() == (None if row is None else list(dict.fromkeys(there)))
        assert {d for n in now for d, _ in known(n)} <= columns.keys()


# ── columns of a log ──


def test_a_column_is_read_under_the_new_version() -> None:
    _, mapping = changed(
        {"op": "split", "dimension": "tone", "value": "warm", "into": [plain("b"), plain("a")]},
        {"op": "rename", "dimension": "tone", "id": "mood"},
    )
    column = pa.array(["warm", None, "cold", "never seen", ""])
    expected = ["unknown of {a, b}", None, "cold", "never seen", ""]
    for given_as in (column, pa.chunked_array([column]), column.dictionary_encode(), column.cast(pa.large_string())):
        columns = translate_column(given_as, "tone", [mapping])
        assert {name: array.to_pylist() for name, array in columns.items()} == {"mood": expected}


def test_a_slice_of_a_column_is_read_as_a_slice() -> None:
    rows = pa.array([["warm"], ["cold", "warm"], None, ["warm"]])
    _, mapping = changed({"op": "merge", "dimension": "tone", "values": ["warm"], "into": "cold"})
    assert translate_column(rows[1:3], "tone", [mapping])["tone"].to_pylist() == [["cold"], None]
    assert translate_column(rows.cast(pa.large_list(pa.string()))[3:], "tone", [mapping])["tone"].to_pylist() == [
        ["cold"]
    ]


def test_moved_values_get_a_column_of_their_own_whatever_the_rows() -> None:
    _, mapping = changed({"op": "move", "dimension": "tone", "value": "cold", "to": "offer"})
    columns = translate_column(pa.array(["warm", "cold", None]), "tone", [mapping])
    assert {name: array.to_pylist() for name, array in columns.items()} == {
        "tone": ["warm", None, None],
        "offer": [None, "cold", None],
    }
    assert list(translate_column(pa.nulls(1), "tone", [mapping])) == ["tone", "offer"]


def test_unknown_between_dimensions_names_them() -> None:
    _, mapping = changed(
        {"op": "split", "dimension": "tone", "value": "cold", "into": [plain("x"), plain("y")]},
        {"op": "move", "dimension": "tone", "value": "x", "to": "offer"},
    )
    columns = translate_column(pa.array(["cold"]), "tone", [mapping])
    assert list(columns) == ["tone", "offer"]
    assert all(array.to_pylist() == ["unknown of {offer=x, tone=y}"] for array in columns.values())


def test_a_column_of_numbers_is_refused() -> None:
    with pytest.raises(InputError, match="tone: a column of tags holds text or lists of text, not int64"):
        translate_column(pa.array([1]), "tone", [])


# ── files ──


def test_a_taxonomy_is_written_for_people_and_read_back(tmp_path: Path) -> None:
    odd = Taxonomy(
        dimensions=(
            Dimension(
                id="no",
                layer=Layer.CONTENT,
                labels=Labels(en="a: b # c 'd' \"e\" é\nf", zh="是 {x}"),
                multi=True,
                factor="driving",
                retired=True,
                values=(value("2024", retired=True), value("null"), value("yes"), value("1e3")),
            ),
            dimension("empty"),
        )
    )
    for taxonomy in (BUILT_IN, SMALL, odd, Taxonomy(dimensions=())):
        path = tmp_path / "taxonomy.yaml"
        write_taxonomy(taxonomy, path)
        assert read_taxonomy(path) == taxonomy
    assert "{id: realistic, labels: {en: Realistic, zh: 写实}}" in format_taxonomy(BUILT_IN)


WRONG_FILES = {
    "twice": (
        "dimensions: []\ndimensions: []",
        ", line 2, column 1: is not valid YAML here: `dimensions` is given twice",
    ),
    "alias": ("a: &x []\nb: *x", ", line 2, column 4: is not valid YAML here: aliases"),
    "object": ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
    "bracket": ("dimensions: [", "line 1"),
    "deep": ("[" * 5000, "is not valid YAML"),
    "empty": ("", ": a vocabulary is a mapping that begins with `dimensions:`"),
    "missing": ("{}", "dimensions: Field required"),
    "layer": ("dimensions: [{id: tone, layer: x, labels: {en: T, zh: t}}]", "dimension 'tone', layer: Input should be"),
    "label": (
        "dimensions: [{id: t, layer: content, labels: {en: T, zh: t}, values: [{id: v, labels: {en: V}}]}]",
        "dimension 't', value 'v', labels.zh: Field required",
    ),
    "blank": ("dimensions: [{id: t, layer: content, labels: {en: ' ', zh: t}}]", "dimension 't', labels.en:"),
    "unknown key": ("dimensions: [{id: t, layer: content, labels: {en: T, zh: t}, multy: true}]", "'t', multy: Extra"),
    "bad id": (
        "dimensions: [{id: t, layer: content, labels: {en: T, zh: t}, values: [{id: A B, labels: {en: V, zh: v}}]}]",
        "dimension 't', value 'A B', id: 'A B' cannot be an id: use",
    ),
    "no id": ("dimensions: [{layer: content, labels: {en: T, zh: t}}]", "dimension 1, id: Field required"),
    "same id": (
        "dimensions: [{id: t, layer: content, labels: {en: T, zh: t}}"
        + ", {id: t, layer: content, labels: {en: U, zh: u}}]",
        "dimension 't' is there twice; keep one of them",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_refused_saying_where(case: str, tmp_path: Path) -> None:
    text, message = WRONG_FILES[case]
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_taxonomy(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)
    assert "docs/taxonomy.md" in str(error.value)


def test_a_file_that_is_not_there_or_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    with pytest.raises(InputError, match="there is no such file"):
        read_taxonomy(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_taxonomy(path)


def test_changes_and_mappings_are_read_from_files(tmp_path: Path) -> None:
    path = tmp_path / "changes.yaml"
    path.write_text("- {op: retire, dimension: tone}\n- {op: move, dimension: tone, value: cold, to: offer}\n")
    assert [change.op for change in read_changes(path)] == ["retire", "move"]
    path.write_text("tone=warm: offer=gift\noffer=draw: [offer=gift, offer=coupon]\ntone: mood\n")
    assert read_mapping(path).targets("offer=draw") == ("offer=coupon", "offer=gift")
    path.write_text("tone=warm: gift\n")
    with pytest.raises(InputError, match="'tone=warm' cannot become 'gift'"):
        read_mapping(path)


def test_the_documentation_is_right(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "taxonomy.md").read_text()
    file, changes, mapping = (block.split("```")[0] for block in text.split("```yaml\n")[1:])
    assert parse_taxonomy(file, "docs").tags[0] == ("image_style", "realistic")
    path = tmp_path / "docs.yaml"
    path.write_text(changes)
    _, became = apply(BUILT_IN, read_changes(path))
    assert became.targets("benefit=coupon") == ("benefit=coupon", "benefit=voucher")
    path.write_text(mapping)
    assert read_mapping(path).targets("herd=best_seller") == ("social_proof=best_seller",)
    for operation in get_args(get_args(Change)[0]):
        assert f"| `{operation.model_fields['op'].default}` |" in text
    for d in BUILT_IN.dimensions:
        assert f"`{d.id}`" in text


# ── a new version written by hand ──


def test_what_has_the_same_id_is_the_same() -> None:
    new = Taxonomy(
        dimensions=(
            dimension("tone", "cold", "warm", "hot"),
            dimension("offer", "coupon", "gift", "draw"),
            dimension("n"),
        )
    )
    assert infer_mapping(SMALL, new) == EMPTY


def test_what_vanished_has_to_be_accounted_for() -> None:
    new = Taxonomy(dimensions=(dimension("mood", "warm"), dimension("offer", "coupon", "gift", "draw")))
    with pytest.raises(InputError, match=r"vanished: tone=cold, tone=warm\. Say in the mapping"):
        infer_mapping(SMALL, new)
    with pytest.raises(InputError, match="'tone=cold' becomes 'mood=cold', which is not in the new version"):
        infer_mapping(SMALL, new, Mapping({"tone": ("mood",)}))
    with pytest.raises(InputError, match="'tone' becomes 'mod', which is not in the new version"):
        infer_mapping(SMALL, new, Mapping({"tone": ("mod",)}))
    with pytest.raises(InputError, match="the version before has no 'tone=worm'"):
        infer_mapping(
            SMALL, new, Mapping({"tone": ("mood",), "tone=cold": ("mood=warm",), "tone=worm": ("mood=warm",)})
        )
    given = Mapping({"tone": ("mood",), "tone=cold": ("mood=warm",)})
    assert infer_mapping(SMALL, new, given) == given


# ── the store ──

EDITOR = person("ed", Role.EDITOR)
SPLIT = check_changes([{"op": "split", "dimension": "tone", "value": "warm", "into": [plain("a"), plain("b")]}])
MERGE = check_changes([{"op": "merge", "dimension": "tone", "values": ["a", "b"], "into": plain("warm")}])
RENAME = check_changes([{"op": "rename", "dimension": "tone", "id": "mood"}])


def found(database: Database) -> None:
    with database.transaction(EDITOR) as session:
        found_taxonomy(session, SMALL)


def add_material(session: Session, id_: str, *tags: tuple[str, str], taxonomy: int = 1) -> None:
    session.add(
        Material(
            business_id=session.business,
            id=id_,
            kind="copy",
            content={},
            content_hash="-",
            tags=[{"dimension": d, "value": v, "source": "person", "confidence": None} for d, v in tags],
            taxonomy=taxonomy,
            state="draft",
            author="ed",
        )
    )
    session.flush()


def test_a_business_is_founded_once_with_the_built_in_vocabulary(database: Database) -> None:
    with database.transaction(EDITOR) as session:
        with pytest.raises(NotFoundError, match="has no taxonomy"):
            current_taxonomy(session)
        with pytest.raises(NotFoundError):
            tags_now(session, [], 1)
        assert found_taxonomy(session).number == 1
    with database.transaction(EDITOR) as session:
        assert current_taxonomy(session) == (1, BUILT_IN)
        with pytest.raises(ConflictError, match="has a taxonomy already"):
            found_taxonomy(session)


def test_versions_are_kept_and_tags_of_each_are_read(database: Database) -> None:
    found(database)
    for changes in (SPLIT, RENAME):
        with database.transaction(EDITOR) as session:
            evolve(session, changes, note="why")
    with database.transaction(person("v", Role.VIEWER), write=False) as session:
        number, taxonomy = current_taxonomy(session)
        assert (number, taxonomy.tags[0]) == (3, ("mood", "a"))
        assert taxonomy_at(session, 1) == SMALL
        assert [(v.number, v.note, v.author) for v in list_versions(session)] == [
            (3, "why", "ed"),
            (2, "why", "ed"),
            (1, "", "ed"),
        ]
        now = tags_now(session, [("tone", "warm"), ("tone", "cold")], 1)
        assert now.known == (("mood", "cold"),)
        assert now.unknown == {("tone", "warm"): Unknown(frozenset({("mood", "a"), ("mood", "b")}))}
        assert tags_now(session, [("tone", "a")], 2).known == (("mood", "a"),)
        assert tags_now(session, [("mood", "a"), ("mood", "a")], 3).known == (("mood", "a"),)
        assert mapping_between(session, 1, 3) == compose(
            [mapping_between(session, 1, 2), mapping_between(session, 2, 3)]
        )
        assert mapping_between(session, 2, 2) == EMPTY
        with pytest.raises(InputError, match="cannot be read under version 1, which is older"):
            mapping_between(session, 2, 1)
        with pytest.raises(NotFoundError):
            mapping_between(session, 1, 4)
        with pytest.raises(NotFoundError):
            taxonomy_at(session, 0)


def test_a_split_and_a_merge_in_two_versions_are_known_again(database: Database) -> None:
    found(database)
    with database.transaction(EDITOR) as session:
        evolve(session, SPLIT)
        evolve(session, MERGE)
        assert tags_now(session, [("tone", "warm")], 1).known == (("tone", "warm"),)


def test_each_business_has_its_own(database: Database) -> None:
    found(database)
    with database.transaction(person("ed", business="rival")) as session:
        assert list_versions(session) == []
        with pytest.raises(NotFoundError):
            evolve(session, RENAME)
        found_taxonomy(session)
        assert current_taxonomy(session) == (1, BUILT_IN)


def test_only_editors_change_it(database: Database) -> None:
    found(database)
    services: list[Callable[[Session], object]] = [
        found_taxonomy,
        lambda session: evolve(session, RENAME),
        lambda session: import_taxonomy(session, BUILT_IN),
    ]
    for role in (Role.VIEWER, Role.REVIEWER, Role.PUBLISHER):
        for service in services:
            with pytest.raises(ForbiddenError), database.transaction(person("x", role)) as session:
                service(session)


def test_a_change_leaves_one_audit_entry_and_no_second_way(database: Database) -> None:
    found(database)
    with database.transaction(EDITOR) as session:
        evolve(session, RENAME)
        with pytest.raises(InputError, match="This is version 2 as it is"):
            evolve(session, [])
        with pytest.raises(InputError, match="This is version 2 as it is"):
            import_taxonomy(session, current_taxonomy(session)[1])
    with database.transaction(EDITOR) as session:
        entries = [e for e in session.query(AuditEntry).order_by(AuditEntry.seq) if e.entity == "taxonomies"]
        assert [(e.action, e.key, e.actor) for e in entries] == [("created", "1", "ed"), ("created", "2", "ed")]


def test_who_read_an_older_version_is_shown_both(database: Database) -> None:
    found(database)
    with database.transaction(person("first", Role.EDITOR)) as session:
        evolve(session, RENAME, note="clearer", expected=1)
    with pytest.raises(ConflictError) as error, database.transaction(EDITOR) as session:
        evolve(session, SPLIT, expected=1)
    assert "first made version 2" in str(error.value)
    details = error.value.details
    assert details is not None
    assert details["yours"]["version"] == 1 and details["yours"]["changes"][0]["op"] == "split"
    assert (details["current"]["version"], details["current"]["note"]) == (2, "clearer")
    assert details["current"]["mapping"] == {"tone": ["mood"]}
    json.dumps(error.value.as_dict())
    with pytest.raises(ConflictError), database.transaction(EDITOR) as session:
        import_taxonomy(session, SMALL, expected=1)
    with pytest.raises(InputError, match="there is no version 9 yet"), database.transaction(EDITOR) as session:
        evolve(session, SPLIT, expected=9)


def test_of_two_who_change_it_at_once_one_wins_and_the_other_sees_both(database: Database) -> None:
    found(database)
    both_read, outcomes = threading.Barrier(2), {}

    def change(name: str) -> None:
        with database.transaction(person(name, Role.EDITOR), write=False) as session:
            number, _ = current_taxonomy(session)
        both_read.wait()
        try:
            with database.transaction(person(name, Role.EDITOR)) as session:
                outcomes[name] = evolve(
                    session, check_changes([{"op": "rename", "dimension": "tone", "id": name}]), expected=number
                ).number
        except ConflictError as error:
            outcomes[name] = error.details

    threads = [threading.Thread(target=change, args=(name,)) for name in ("ann", "bob")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    (winner,) = [name for name, outcome in outcomes.items() if outcome == 2]
    (lost,) = [outcome for name, outcome in outcomes.items() if name != winner]
    assert lost["yours"]["version"] == 1 and lost["current"]["author"] == winner
    with database.transaction(EDITOR) as session:
        assert [v.number for v in list_versions(session)] == [2, 1]
        assert current_taxonomy(session)[1].dimensions[0].id == winner


def test_changes_without_an_expected_version_queue_up(database: Database) -> None:
    found(database)
    names = [f"new{i}" for i in range(4)]

    def change(name: str) -> None:
        with database.transaction(EDITOR) as session:
            evolve(session, check_changes([{"op": "add_value", "dimension": "tone", "value": plain(name)}]))

    threads = [threading.Thread(target=change, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    with database.transaction(EDITOR) as session:
        number, taxonomy = current_taxonomy(session)
        assert number == 5
        assert {("tone", name) for name in names} <= set(taxonomy.tags)


def test_a_version_written_by_hand_is_imported(database: Database) -> None:
    found(database)
    new = Taxonomy(dimensions=(dimension("mood", "warm", "cold"), dimension("offer", "coupon", "gift", "draw")))
    with database.transaction(EDITOR) as session:
        with pytest.raises(InputError, match="vanished: tone=cold, tone=warm"):
            import_taxonomy(session, new)
        assert import_taxonomy(session, new, Mapping({"tone": ("mood",)}), note="file").number == 2
        assert tags_now(session, [("tone", "warm")], 1).known == (("mood", "warm"),)


def test_affected_materials_are_shown_before_saving(database: Database) -> None:
    found(database)
    with database.transaction(EDITOR) as session:
        add_material(session, "both", ("tone", "warm"), ("offer", "gift"))
        add_material(session, "cool", ("tone", "cold"))
        add_material(session, "gifts", ("offer", "gift"), ("offer", "draw"))
        (affected,) = affected_materials(session, SPLIT)
        assert affected.material == "both"
        assert affected.unknown == {("tone", "warm"): Unknown(frozenset({("tone", "a"), ("tone", "b")}))}
        assert affected_materials(session, RENAME) == []
        assert current_taxonomy(session) == (1, SMALL)
        single = check_changes(
            [{"op": "regroup", "dimension": "offer", "layer": "content", "factor": None, "multi": False}]
        )
        assert [(a.material, a.overfull) for a in affected_materials(session, single)] == [("gifts", ("offer",))]
        moved = check_changes([{"op": "move", "dimension": "offer", "value": "gift", "to": "tone"}])
        assert [(a.material, a.overfull) for a in affected_materials(session, moved)] == [("both", ("tone",))]


def test_rules_that_name_what_changes_are_shown_before_saving(database: Database) -> None:
    found(database)
    constraints = [
        "forbid copy.tone=warm|cold with offer=gift",
        "require image.offer=* when copy.tone=cold",
        "forbid copy.offer matches image.offer",
        "forbid copy:warm",
    ]
    rules: dict[str, dict[str, Any]] = {
        "of-a-tag": {"target": {"tag": {"tone": "warm"}}},
        "ended": {"target": {"tag": {"tone": "warm"}}, "ended": True},
        "over": {"target": {"tag": {"tone": "warm"}}, "ends_at": now() - timedelta(days=1)},
        "to-end": {"target": {"tag": {"tone": "cold"}}, "ends_at": now() + timedelta(days=1)},
        "of-a-material": {"target": {"material": "warm"}},
    }

    def told(session: Session, *changes: dict[str, Any]) -> list[str]:
        return [str(rule) for rule in affected_rules(session, check_changes(changes))]

    with database.transaction(EDITOR) as session:
        for scene in ("home", "away"):
            spec = {"constraints": constraints if scene == "home" else []}
            session.add(Scene(business_id="acme", id=scene, name=scene, spec=spec, author="ed"))
        session.flush()
        for id, more in rules.items():
            row = {"business_id": "acme", "scene_id": "home", "id": id, "kind": "block", "segment": {}, "author": "ed"}
            session.add(Intervention(**row, **more))
        session.flush()
        first, second, third, _ = (f"scene home: constraint {text!r}:" for text in constraints)
        split = {"op": "split", "dimension": "tone", "value": "warm", "into": [plain("a"), plain("b")]}
        into = "tone=warm is split into tone=a, tone=b"
        assert told(session, split) == [f"{first} {into}", f"scene home: intervention of-a-tag: {into}"]
        rename = {"op": "rename", "dimension": "tone", "value": "cold", "id": "cool"}
        assert told(session, rename) == [
            f"{first} tone=cold becomes tone=cool",
            f"{second} tone=cold becomes tone=cool",
            "scene home: intervention to-end: tone=cold becomes tone=cool",
        ]
        assert told(session, {"op": "retire", "dimension": "offer"}) == [
            f"{first} offer=gift is retired",
            f"{second} offer is retired",
            f"{third} offer is retired",
        ]
        assert told(session, {"op": "rename", "dimension": "offer", "id": "deal"}) == [
            f"{first} offer=gift becomes deal=gift",
            f"{second} offer becomes deal",
            f"{third} offer becomes deal",
        ]
        assert told(session, {"op": "move", "dimension": "offer", "value": "gift", "to": "tone"}) == [
            f"{first} offer=gift becomes tone=gift",
            f"{second} offer has values that are in offer, tone",
            f"{third} offer has values that are in offer, tone",
        ]
        assert told(session, {"op": "add_value", "dimension": "tone", "value": plain("new")}) == []
        labels = {"en": "Warm", "zh": "暖"}
        assert told(session, {"op": "rename", "dimension": "tone", "value": "warm", "labels": labels}) == []
        evolve(session, check_changes([{"op": "retire", "dimension": "tone", "value": "warm"}]))
        assert told(session, {"op": "retire", "dimension": "tone"}) != []
        assert told(session, {"op": "add_value", "dimension": "tone", "value": plain("new")}) == []
    with database.transaction(person("eve", business="rival")) as session:
        found_taxonomy(session, SMALL)
        assert told(session, rename) == []


def test_what_was_affected_before_is_not_shown_again(database: Database) -> None:
    found(database)
    with database.transaction(EDITOR) as session:
        add_material(session, "old", ("tone", "warm"))
        evolve(session, SPLIT)
        add_material(session, "new", ("tone", "a"), taxonomy=2)
        assert affected_materials(session, RENAME) == []
        again = check_changes([{"op": "split", "dimension": "tone", "value": "a", "into": [plain("c"), plain("d")]}])
        assert [a.material for a in affected_materials(session, again)] == ["new"]


def test_a_stored_version_cannot_be_changed(database: Database) -> None:
    found(database)
    with pytest.raises(ConflictError, match="append-only"), database.transaction(EDITOR) as session:
        session.get_one(TaxonomyVersion, ("acme", 1)).note = "rewritten"
