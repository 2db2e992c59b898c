from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from sqlalchemy import func, select

from kaleidoscope.access import operator
from kaleidoscope.businesses import create_business
from kaleidoscope.content import DEFAULT_PLACEHOLDERS, Content, Copy, Image, Style, Tag, content_hash, parse_content
from kaleidoscope.database import Database, Session, open_database
from kaleidoscope.design_checks import check_variant
from kaleidoscope.errors import ConflictError, ForbiddenError, InputError, NotFoundError, TooLargeError
from kaleidoscope.images import image_path, store_image
from kaleidoscope.materials import (
    KNOWN_COLUMNS,
    ImportReport,
    Outcome,
    add_material,
    change_material,
    content_of,
    duplicates,
    get_material,
    import_materials,
    list_materials,
    retire_material,
    tags_of,
)
from kaleidoscope.review import move_materials
from kaleidoscope.tables import AuditEntry, Business, Material, Scene, Variant, VariantMaterial
from kaleidoscope.taxonomy import Dimension, Labels, Rename, Split, Taxonomy, Value, evolve, found_taxonomy
from kaleidoscope.vocabulary import Layer, MaterialKind, ReviewState, Role
from tests.kaleidoscope.conftest import fresh_url
from tests.kaleidoscope.people import person

ANA = person("ana", Role.EDITOR)
BEN = person("ben", Role.REVIEWER)
VIEWER = person("vic", Role.VIEWER)
WARM, COLD, FLAT = (
    Tag(dimension="tone", value="warm"),
    Tag(dimension="tone", value="cold"),
    Tag(dimension="image_style", value="flat"),
)


def labels(name: str) -> Labels:
    return Labels(en=name, zh=name)


def dimension(name: str, layer: Layer, *values: str) -> Dimension:
    made = tuple(Value(id=value, labels=labels(value)) for value in values)
    return Dimension(id=name, layer=layer, labels=labels(name), multi=True, values=made)


TAXONOMY = Taxonomy(
    dimensions=(
        dimension("tone", Layer.CONTENT, "warm", "cold", "dry"),
        dimension("image_style", Layer.PRESENTATION, "flat", "realistic"),
    )
)


@pytest.fixture(autouse=True)
def _vocabulary(request: pytest.FixtureRequest) -> None:
    """The businesses have words for tags and placeholders."""
    for name in ("database", "sqlite"):
        if name in request.fixturenames:
            for business in ("acme", "rival"):
                with request.getfixturevalue(name).transaction(operator("root", business)) as session:
                    found_taxonomy(session, TAXONOMY)
                    row = session.get(Business, business)
                    row.placeholders = [placeholder.model_dump(mode="json") for placeholder in DEFAULT_PLACEHOLDERS]


def add(database: Database, material_id: str, content: Content | None = None, *tags: Tag, **more: Any) -> Material:
    with database.transaction(ANA) as session:
        return add_material(session, material_id, content or Copy(title=f"Text of {material_id}"), tags, **more)


def approve(database: Database, *ids: str) -> None:
    with database.transaction(ANA) as session:
        move_materials(session, "submit", ids)
    with database.transaction(BEN) as session:
        assert move_materials(session, "approve", ids).moved == len(ids)


def ids(page: Any) -> list[str]:
    return [material.id for material in page.items]


# ── adding ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_material_is_stored_as_a_draft_and_read_back(database: Database) -> None:
    copy = Copy(title="Hallo {first_name} 国", language="de")
    made = add(database, "hello", copy, WARM, FLAT, COLD)
    assert (made.state, made.author, made.version, made.taxonomy) == (ReviewState.DRAFT, "ana", 1, 1)
    with database.transaction(VIEWER, write=False) as session:
        material = get_material(session, "hello")
        assert content_of(material) == copy
        assert tags_of(material) == (FLAT, COLD, WARM)
        assert material.content_hash == content_hash(copy)


def test_only_editors_add(sqlite: Database) -> None:
    with pytest.raises(ForbiddenError), sqlite.transaction(VIEWER) as session:
        add_material(session, "m", Copy(title="a"))


@pytest.mark.parametrize(
    ("material_id", "content", "tags", "words"),
    [
        ("Not An Id", Copy(title="a"), (), "material: 'Not An Id' cannot be an id"),
        ("m", Copy(title="Hi {name}"), (), "no placeholder {name}"),
        ("m", Copy(title="Hi {"), (), "has no partner"),
        ("m", Copy(title="a"), (Tag(dimension="tone", value="wram"),), "warm"),
        ("m", Copy(title="a"), (Tag(dimension="tune", value="warm"),), "tone"),
        ("m", Copy(title="a"), (WARM,) * 101, "there are 101"),
    ],
)
def test_refuses_what_cannot_be_stored(
    sqlite: Database, material_id: str, content: Content, tags: Sequence[Tag], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        add(sqlite, material_id, content, *tags)
    assert words in caught.value.message


def png(color: str) -> bytes:
    out = BytesIO()
    PIL.Image.new("RGB", (40, 30), color).save(out, "PNG")
    return out.getvalue()


def test_an_image_is_what_the_business_has_uploaded(database: Database, tmp_path: Path) -> None:
    red, green = (store_image(tmp_path, "acme", png(color)) for color in ("red", "green"))
    theirs = store_image(tmp_path, "rival", png("blue"))
    larger = red.model_copy(update={"width": 400})
    with database.transaction(ANA) as session:
        for wrong, message in ((larger, "has 40 × 30 px"), (theirs, "Upload the picture")):
            with pytest.raises(InputError, match=message):
                add_material(session, "i1", wrong, files_dir=tmp_path)
        add_material(session, "i1", red, files_dir=tmp_path)
        for wrong, message in ((larger, "has 40 × 30 px"), (theirs, "Upload the picture")):
            with pytest.raises(InputError, match=message):
                change_material(session, "i1", content=wrong, version=None, files_dir=tmp_path)
        change_material(session, "i1", content=green, version=None, files_dir=tmp_path)
        assert content_of(get_material(session, "i1")) == green
        with pytest.raises(ValueError, match="files_dir"):
            add_material(session, "i2", red)


def test_an_id_is_taken_once(database: Database) -> None:
    add(database, "m")
    with pytest.raises(ConflictError, match="There is a material 'm' already"):
        add(database, "m")
    with database.transaction(person("rita", Role.EDITOR, business="rival")) as session:
        assert add_material(session, "m", Copy(title="theirs")).business_id == "rival"


def test_an_exact_duplicate_is_refused_by_the_name_of_its_twin(database: Database) -> None:
    add(database, "first", Copy(title="Save"))
    with pytest.raises(ConflictError, match="Material 'first' holds exactly the same"):
        add(database, "second", Copy(title=" Save "))
    add(database, "third", Copy(title="Save"), allow_duplicate=True)
    with database.transaction(person("rita", Role.EDITOR, business="rival")) as session:
        add_material(session, "theirs", Copy(title="Save"))
    with database.transaction(VIEWER, write=False) as session:
        assert duplicates(session) == [["first", "third"]]


def test_a_retired_twin_is_to_be_restored(sqlite: Database) -> None:
    add(sqlite, "first", Copy(title="Save"))
    with sqlite.transaction(ANA) as session:
        retire_material(session, "first")
    with pytest.raises(ConflictError, match="retired: restore it"):
        add(sqlite, "second", Copy(title="Save"))


def test_a_tag_given_twice_is_stored_once_by_hand_first(sqlite: Database) -> None:
    guess = Tag(dimension="tone", value="warm", source="tagger", tagger="clip", confidence=0.6)
    assert tags_of(add(sqlite, "m", None, guess, WARM, guess)) == (WARM,)


# ── changing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_change_of_an_approved_material_needs_another_look(database: Database) -> None:
    add(database, "m")
    approve(database, "m")
    with database.transaction(person("cleo", Role.EDITOR)) as session:
        changed = change_material(session, "m", content=Copy(title="New"), tags=[WARM], version=None)
    assert (changed.state, changed.reason) == (ReviewState.DRAFT, "content and tags of material m changed")
    assert (changed.reviewer, changed.reviewed_at, changed.author) == (None, None, "cleo")
    assert changed.content_hash == content_hash(Copy(title="New"))


def test_a_change_takes_back_the_approval_of_the_variants_that_hold_it(database: Database) -> None:
    add(database, "m")
    add(database, "other")
    with database.transaction(ANA) as session:
        session.add(Scene(business_id="acme", id="s", name="S", spec={}, author="ana"))
        session.flush()
        for variant_id, material_id in (("v1", "m"), ("v2", "other")):
            session.add(variant(variant_id, material_id))
    with database.transaction(ANA) as session:
        change_material(session, "m", content=Copy(title="New"), version=1)
    with database.transaction(VIEWER, write=False) as session:
        states = {v.id: (v.state, v.reason) for v in session.scalars(select(Variant))}
    assert states == {"v1": (ReviewState.DRAFT, "content of material m changed"), "v2": (ReviewState.APPROVED, None)}


def variant(variant_id: str, material_id: str) -> Variant:
    held = VariantMaterial(
        business_id="acme", scene_id="s", variant_id=variant_id, slot="copy", material_id=material_id
    )
    return Variant(
        business_id="acme",
        scene_id="s",
        id=variant_id,
        materials={"copy": material_id},
        remarks=[],
        state=ReviewState.APPROVED,
        author="ana",
        held=[held],
    )


def test_a_change_that_changes_nothing_leaves_the_approval(database: Database) -> None:
    made = add(database, "m", None, WARM, COLD)
    approve(database, "m")
    with database.transaction(ANA) as session:
        same = change_material(session, "m", content=content_of(made), tags=[COLD, WARM], version=None)
        assert (same.state, same.version) == (ReviewState.APPROVED, 3)


def test_a_change_of_an_older_version_is_refused_with_both(database: Database) -> None:
    add(database, "m", Copy(title="one"))
    with database.transaction(ANA) as session:
        change_material(session, "m", content=Copy(title="two"), version=1)
    with pytest.raises(ConflictError) as caught, database.transaction(ANA) as session:
        change_material(session, "m", content=Copy(title="three"), version=1)
    details = caught.value.details
    assert details is not None
    assert (details["yours"]["version"], details["yours"]["content"]["title"]) == (1, "three")
    assert (details["current"]["version"], details["current"]["content"]["title"]) == (2, "two")


def test_content_keeps_its_kind_and_its_rules(sqlite: Database) -> None:
    add(sqlite, "m")
    add(sqlite, "other", Copy(title="Save"))
    with pytest.raises(InputError, match="'m' is copy and cannot become style"), sqlite.transaction(ANA) as session:
        change_material(session, "m", content=Style(property="font_size", value=12), version=None)
    with pytest.raises(InputError, match="no placeholder"), sqlite.transaction(ANA) as session:
        change_material(session, "m", content=Copy(title="{nope}"), version=None)
    with pytest.raises(ConflictError, match="'other' holds exactly the same"), sqlite.transaction(ANA) as session:
        change_material(session, "m", content=Copy(title="Save"), version=None)
    with sqlite.transaction(ANA) as session:
        change_material(session, "m", content=Copy(title="Save"), version=None, allow_duplicate=True)


def test_only_editors_change_and_retire(sqlite: Database) -> None:
    add(sqlite, "m")
    with pytest.raises(ForbiddenError), sqlite.transaction(BEN) as session:
        change_material(session, "m", tags=[], version=None)
    with pytest.raises(ForbiddenError), sqlite.transaction(VIEWER) as session:
        retire_material(session, "m")


def test_a_retired_material_is_restored_before_it_is_changed(database: Database) -> None:
    add(database, "m")
    with database.transaction(ANA) as session:
        assert retire_material(session, "m").state == ReviewState.RETIRED
        assert retire_material(session, "m").state == ReviewState.RETIRED
    with pytest.raises(ConflictError, match="retired"), database.transaction(ANA) as session:
        change_material(session, "m", content=Copy(title="b"), version=None)


def test_what_another_business_has_is_not_there(database: Database) -> None:
    add(database, "m")
    stranger = person("rita", business="rival")
    with database.transaction(stranger) as session:
        assert list_materials(session).items == []
        for attempt in (
            lambda: get_material(session, "m"),
            lambda: change_material(session, "m", tags=[], version=None),
            lambda: retire_material(session, "m"),
        ):
            with pytest.raises(NotFoundError):
                attempt()


# ── finding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lists_by_kind_state_and_tag_page_by_page(database: Database) -> None:
    with database.transaction(ANA) as session:
        for number in range(12):
            tags = [WARM, FLAT] if number % 2 else [COLD]
            add_material(session, f"c{number:02}", Copy(title=f"Text {number}"), tags)
        add_material(session, "big", Style(property="font_size", value=30), [WARM])
    approve(database, "c01", "c02")
    with database.transaction(VIEWER, write=False) as session:
        assert ids(list_materials(session, kind=MaterialKind.STYLE)) == ["big"]
        assert ids(list_materials(session, state=ReviewState.APPROVED)) == ["c01", "c02"]
        assert ids(list_materials(session, state=ReviewState.APPROVED, tag=("tone", "cold"))) == ["c02"]
        found, cursor = [], None
        for _ in range(10):
            page = list_materials(session, kind=MaterialKind.COPY, tag=("tone", "warm"), cursor=cursor, limit=4)
            found += ids(page)
            cursor = page.next_cursor
            if cursor is None:
                break
        assert found == ["c01", "c03", "c05", "c07", "c09", "c11"]


@pytest.mark.parametrize(
    "tag", [("tone", "flat"), ("image_style", "warm"), ("tone", "war"), ("", ""), ("x' OR 1=1 --", "\0"), ("tone", "%")]
)
def test_a_tag_is_found_whole_or_not_at_all(database: Database, tag: tuple[str, str]) -> None:
    add(database, "m", None, WARM, FLAT)
    with database.transaction(VIEWER, write=False) as session:
        assert list_materials(session, tag=tag).items == []


def test_a_tag_that_was_renamed_since_is_found_under_its_new_name(database: Database) -> None:
    add(database, "old", None, WARM)
    with database.transaction(ANA) as session:
        evolve(session, [Rename(dimension="tone", value="warm", id="hearty")])
        add_material(session, "new", Copy(title="new"), [Tag(dimension="tone", value="hearty")])
    with database.transaction(VIEWER, write=False) as session:
        assert ids(list_materials(session, tag=("tone", "hearty"))) == ["new", "old"]
        assert ids(list_materials(session, tag=("tone", "warm"))) == []


# ── import ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Folder:
    """A CSV, the folder beside it, and where pictures are kept."""

    def __init__(self, root: Path) -> None:
        self.csv, self.pictures, self.kept = root / "materials.csv", root / "pictures", root / "kept"
        self.pictures.mkdir()

    def picture(self, name: str, color: str = "red") -> None:
        out = BytesIO()
        PIL.Image.new("RGB", (30, 20), color).save(out, "PNG")
        (self.pictures / name).write_bytes(out.getvalue())

    def write(self, *rows: dict[str, str], columns: Sequence[str] = KNOWN_COLUMNS, encoding: str = "utf-8") -> None:
        with self.csv.open("w", newline="", encoding=encoding) as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    def run(self, session: Session, **more: Any) -> ImportReport:
        return import_materials(session, self.csv, self.pictures, self.kept, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


GOOD = {"id": "good", "kind": "copy", "title": "Good"}
ROWS = (
    {
        "id": "hello",
        "kind": "copy",
        "language": "de",
        "title": "Hallo, {first_name}",
        "tags": "tone=warm|image_style=flat",
    },
    {"id": "photo", "kind": "image", "file": "a.png", "alt": "A red field", "tags": "image_style=realistic"},
    {"id": "big", "kind": "style", "content": '{"property": "font_size", "value": 30}'},
    {
        "id": "plain",
        "kind": "layout",
        "content": '{"width": 300, "height": 200, "root": {"type": "image", "show": "image"}}',
    },
)


def outcomes(report: ImportReport) -> list[tuple[int, str, str]]:
    return [(row.row, row.id, row.outcome.value) for row in report.rows]


def count(session: Session) -> int:
    return session.scalar(select(func.count()).select_from(Material)) or 0


def test_imports_every_kind_and_again_changes_nothing(database: Database, folder: Folder) -> None:
    folder.picture("a.png")
    folder.write(*ROWS)
    with database.transaction(ANA) as session:
        report = folder.run(session)
        assert report.applied and report.failures == ()
        assert outcomes(report) == [
            (2, "hello", "created"),
            (3, "photo", "created"),
            (4, "big", "created"),
            (5, "plain", "created"),
        ]
    with database.transaction(ANA) as session:
        changes = session.scalar(select(func.count()).select_from(AuditEntry))
        assert folder.run(session).count(Outcome.UNCHANGED) == 4
        assert session.scalar(select(func.count()).select_from(AuditEntry)) == changes
        hello, photo = content_of(get_material(session, "hello")), content_of(get_material(session, "photo"))
        assert hello == Copy(title="Hallo, {first_name}", language="de")
        assert isinstance(photo, Image) and photo.alt == "A red field"
        assert image_path(folder.kept, "acme", photo).is_file()
        assert tags_of(get_material(session, "hello")) == (FLAT, WARM)


def test_the_example_in_the_documentation_can_be_imported(
    request: pytest.FixtureRequest, tmp_path: Path, folder: Folder
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "materials.md").read_text()
    folder.csv.write_text(page.split("```csv\n")[1].split("```")[0])
    folder.picture("family.png")
    with open_database(fresh_url("sqlite", request, tmp_path)) as database:
        with database.transaction(operator("root", "acme")) as session:
            create_business(session, "Acme")
            report = folder.run(session)
            assert report.applied, report.failures
        layout = parse_content(json.loads(page.split("```json\n")[1].split("```")[0]))
        add(database, "layout", layout)
        with database.transaction(VIEWER, write=False) as session:
            contents = {m.kind: content_of(m) for m in list_materials(session).items}
        assert set(contents) == set(MaterialKind)
        copy, image, style = (contents[kind] for kind in (MaterialKind.COPY, MaterialKind.IMAGE, MaterialKind.STYLE))
        checked = check_variant({"copy": copy, "layout": layout, "image": image, "size": style}, DEFAULT_PLACEHOLDERS)
        assert {failure.check for failure in checked} == {"image_ratio"}  # the picture above is 3 to 2


def test_a_changed_row_changes_its_material(database: Database, folder: Folder) -> None:
    folder.write(GOOD)
    with database.transaction(ANA) as session:
        folder.run(session)
    approve(database, "good")
    folder.write({**GOOD, "title": "Better", "tags": "tone=dry"})
    with database.transaction(ANA) as session:
        assert outcomes(folder.run(session)) == [(2, "good", "changed")]
        material = get_material(session, "good")
        assert (material.state, content_of(material)) == (ReviewState.DRAFT, Copy(title="Better"))


def test_without_a_column_of_tags_they_stay(sqlite: Database, folder: Folder) -> None:
    add(sqlite, "good", Copy(title="Good"), WARM)
    folder.write(GOOD, columns=("id", "kind", "title"))
    with sqlite.transaction(ANA) as session:
        assert outcomes(folder.run(session)) == [(2, "good", "unchanged")]
    folder.write(GOOD)
    with sqlite.transaction(ANA) as session:
        assert outcomes(folder.run(session)) == [(2, "good", "changed")]
        assert tags_of(get_material(session, "good")) == ()


def test_tags_that_were_renamed_since_are_not_a_change(sqlite: Database, folder: Folder) -> None:
    add(sqlite, "good", Copy(title="Good"), WARM)
    with sqlite.transaction(ANA) as session:
        evolve(session, [Rename(dimension="tone", value="warm", id="hearty")])
    folder.write({**GOOD, "tags": "tone=hearty"})
    with sqlite.transaction(ANA) as session:
        assert outcomes(folder.run(session)) == [(2, "good", "unchanged")]


def test_a_tag_that_became_unknown_is_a_change(sqlite: Database, folder: Folder) -> None:
    add(sqlite, "good", Copy(title="Good"), WARM)
    with sqlite.transaction(ANA) as session:
        evolve(session, [Split(dimension="tone", value="warm", into=("cold", "dry"))])
    folder.write({**GOOD, "tags": ""})
    with sqlite.transaction(ANA) as session:
        assert outcomes(folder.run(session)) == [(2, "good", "changed")]
        assert (get_material(session, "good").tags, get_material(session, "good").taxonomy) == ([], 2)


def test_one_bad_row_keeps_everything_out_and_all_are_named(database: Database, folder: Folder) -> None:
    add(database, "good", Copy(title="Before"))
    folder.write(
        GOOD,
        {"id": "no", "kind": "copy"},
        {"id": "new", "kind": "copy", "title": "New"},
        {"id": "no2", "kind": "image", "file": "missing.png"},
    )
    with database.transaction(ANA) as session:
        report = folder.run(session)
        assert not report.applied
        assert outcomes(report) == [
            (2, "good", "held_back"),
            (3, "no", "failed"),
            (4, "new", "held_back"),
            (5, "no2", "failed"),
        ]
        assert [row.message for row in report.failures] == [
            "content.title: is missing; give it.",
            f"file: there is no file 'missing.png' in {folder.pictures}.",
        ]
        add_material(session, "after", Copy(title="The transaction goes on"))
    with database.transaction(ANA, write=False) as session:
        assert ids(list_materials(session)) == ["after", "good"]
        assert content_of(get_material(session, "good")) == Copy(title="Before")


def test_partial_takes_what_is_good(database: Database, folder: Folder) -> None:
    folder.write(GOOD, {"id": "no", "kind": "copy"}, {"id": "new", "kind": "copy", "title": "New"})
    with database.transaction(ANA) as session:
        report = folder.run(session, partial=True)
        assert report.applied and report.count(Outcome.CREATED) == 2 and len(report.failures) == 1
    with database.transaction(ANA, write=False) as session:
        assert ids(list_materials(session)) == ["good", "new"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": "No Id"}, "id: 'No Id' cannot be an id"),
        ({"id": ""}, "id: '' cannot be an id"),
        ({"kind": "video"}, "kind: 'video' is not one of copy, image, layout, style"),
        ({"file": "a.png"}, "file: does not belong to copy"),
        ({"title": "{nope}"}, "no placeholder {nope}"),
        ({"title": "<script>alert(1)</script>"}, "begins HTML"),
        ({"title": "x" * 2000}, "longer than 300 characters"),
        ({"tags": "tone"}, "tags: 'tone' is no tag. Write dimension=value"),
        ({"tags": "tone=wram"}, "warm"),
        ({"tags": "Tone=warm"}, "tags[0].dimension: 'Tone' is no name"),
        ({"kind": "style", "title": "", "content": ""}, "content: is no JSON"),
        ({"kind": "style", "title": "", "content": "[1]"}, "as a JSON object"),
        ({"kind": "style", "title": "", "content": '{"kind": "copy", "title": "a"}'}, "not that of the row, style"),
        ({"kind": "layout", "title": "", "content": '{"width": 1}'}, "content.height: is missing"),
        pytest.param({"kind": "layout", "title": "", "content": "[" * 100_000}, "nests too deeply", id="deep JSON"),
    ],
)
def test_says_what_is_wrong_with_a_row(sqlite: Database, folder: Folder, row: dict[str, str], words: str) -> None:
    folder.write({**GOOD, **row})
    with sqlite.transaction(ANA) as session:
        (failure,) = folder.run(session).rows
    assert failure.outcome == Outcome.FAILED and failure.row == 2
    assert words in failure.message


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "sub/../../secret.png", "link.png", "sub/../a.png"])
def test_a_file_outside_the_folder_is_not_read(sqlite: Database, folder: Folder, name: str) -> None:
    folder.picture("a.png")
    folder.picture("../secret.png")
    (folder.pictures / "sub").mkdir()
    (folder.pictures / "link.png").symlink_to(folder.pictures.parent / "secret.png")
    folder.write({"id": "m", "kind": "image", "file": name})
    with sqlite.transaction(ANA) as session:
        (failure,) = folder.run(session).failures
    assert "is not in the folder" in failure.message
    assert not folder.kept.exists()


@pytest.mark.parametrize("name", ["", "sub", "gone.png", "a\0b", "x" * 5000, "loop.png"])
def test_a_file_that_is_not_there_is_named(sqlite: Database, folder: Folder, name: str) -> None:
    (folder.pictures / "sub").mkdir()
    (folder.pictures / "loop.png").symlink_to(folder.pictures / "loop.png")
    folder.write({"id": "m", "kind": "image", "file": name, "alt": "a"})
    with sqlite.transaction(ANA) as session:
        (failure,) = folder.run(session).failures
    assert failure.message.startswith("file: ")


def test_a_file_that_is_no_picture_is_named(sqlite: Database, folder: Folder) -> None:
    (folder.pictures / "a.png").write_text("<svg/>")
    (folder.pictures / "sub").mkdir()
    folder.picture("sub/b.png")
    folder.write(
        {"id": "a", "kind": "image", "file": "a.png"},
        {"id": "b", "kind": "image", "file": "sub/b.png"},
    )
    with sqlite.transaction(ANA) as session:
        report = folder.run(session, partial=True)
    assert report.rows[0].message.startswith("file: a.png: The file is SVG")
    assert report.rows[1].outcome == Outcome.CREATED


def test_an_id_that_is_in_the_file_twice_is_reported_with_both_rows(sqlite: Database, folder: Folder) -> None:
    folder.write(GOOD, {**GOOD, "title": "Again"})
    with sqlite.transaction(ANA) as session:
        report = folder.run(session, partial=True)
    assert outcomes(report) == [(2, "good", "created"), (3, "good", "failed")]
    assert "is in row 2 already" in report.rows[1].message


def test_rows_that_hold_the_same_are_refused_unless_allowed(sqlite: Database, folder: Folder) -> None:
    folder.write(GOOD, {**GOOD, "id": "twin"})
    with sqlite.transaction(ANA) as session:
        assert "'good' holds exactly the same" in folder.run(session).failures[0].message
        assert folder.run(session, allow_duplicates=True).applied


def test_a_ragged_row_is_reported_and_blank_ones_are_skipped(sqlite: Database, folder: Folder) -> None:
    folder.csv.write_text(
        'id,kind,title\na,copy,one\n\n,,\nb,copy,two,three\nc,copy\nd,copy,"four\nlines"\ne,copy,five\n'
    )
    with sqlite.transaction(ANA) as session:
        report = folder.run(session, partial=True)
    assert outcomes(report) == [
        (2, "a", "created"),
        (5, "b", "failed"),
        (6, "c", "failed"),
        (7, "d", "failed"),
        (8, "e", "created"),
    ]
    assert "it has 4 cells, the header has 3" in report.rows[1].message
    assert "control character U+000A" in report.rows[3].message


def test_a_quote_that_is_never_closed_is_reported_where_it_begins(sqlite: Database, folder: Folder) -> None:
    folder.csv.write_text('id,kind,title\na,copy,one\nb,copy,"two\nc,copy,three\n')
    with sqlite.transaction(ANA) as session:
        report = folder.run(session, partial=True)
    assert outcomes(report) == [(2, "a", "created"), (3, "", "failed")]
    assert "Close its quotes" in report.rows[1].message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_reads_utf8_with_or_without_a_mark(sqlite: Database, folder: Folder, encoding: str) -> None:
    folder.write({**GOOD, "title": "Für 您"}, encoding=encoding)
    with sqlite.transaction(ANA) as session:
        assert folder.run(session).applied
        assert content_of(get_material(session, "good")) == Copy(title="Für 您")


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_reads_what_spreadsheets_write(sqlite: Database, folder: Folder, delimiter: str) -> None:
    folder.csv.write_bytes(
        delimiter.join(("ID", " Kind", "title")).encode() + b"\r\n" + delimiter.join(GOOD.values()).encode()
    )
    with sqlite.transaction(ANA) as session:
        assert folder.run(session).applied


def test_a_row_that_is_not_utf8_is_reported(sqlite: Database, folder: Folder) -> None:
    folder.csv.write_bytes("id,kind,title\na,copy,Für\nb,copy,Fur\n".encode("latin-1"))
    with sqlite.transaction(ANA) as session:
        report = folder.run(session, partial=True)
    assert outcomes(report) == [(2, "a", "failed"), (3, "b", "created")]
    assert "not UTF-8" in report.rows[0].message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "lacks the columns id and kind"),
        (b"id,title\na,b\n", "lacks the column kind"),
        (b"id,kind,titel\n", "no column 'titel'. Did you mean title?"),
        (b"id,kind,id\n", "column id is there twice"),
        ("id,kind\n".encode("utf-16"), "is UTF-16"),
        (b'id,"kind\n', "row 1 cannot be read"),
    ],
)
def test_a_file_with_other_columns_is_refused(sqlite: Database, folder: Folder, data: bytes, words: str) -> None:
    folder.csv.write_bytes(data)
    with pytest.raises(InputError) as caught, sqlite.transaction(ANA) as session:
        folder.run(session)
    assert words in caught.value.message and str(folder.csv) in caught.value.message


def test_a_file_that_is_not_there_or_too_large_is_refused(
    sqlite: Database, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="cannot be read"), sqlite.transaction(ANA) as session:
        folder.run(session)
    folder.write(GOOD)
    monkeypatch.setattr("kaleidoscope.materials.MAX_CSV_BYTES", 20)
    with pytest.raises(TooLargeError), sqlite.transaction(ANA) as session:
        folder.run(session)


def test_only_editors_import(sqlite: Database, folder: Folder) -> None:
    folder.write(GOOD)
    with pytest.raises(ForbiddenError), sqlite.transaction(VIEWER) as session:
        folder.run(session)
