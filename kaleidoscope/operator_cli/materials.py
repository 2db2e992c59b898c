"""The material library and its review."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaleidoscope.errors import InputError
from kaleidoscope.operator_cli.frame import (
    MOVES_HELP,
    Cursor,
    File,
    Limit,
    Output,
    Reason,
    Tags,
    Version,
    Work,
    command,
    cut,
    gist,
    headed,
    more,
    moved_output,
    none_of,
    pairs_in,
    tags_in,
    when,
    words,
)
from kaleidoscope.terminal import fields, table
from kaleidoscope.vocabulary import MaterialKind, ReviewState

if TYPE_CHECKING:
    from kaleidoscope.content import Content, Tag
    from kaleidoscope.database import Session
    from kaleidoscope.views import MaterialView

material_group = typer.Typer(
    name="material", help="The library of copies, images, layouts and styles, and its review.", no_args_is_help=True
)
material_add_group = typer.Typer(name="add", help="Add one material, as a draft.", no_args_is_help=True)
material_group.add_typer(material_add_group)


MaterialId = Annotated[str, typer.Argument(metavar="ID", help="Lower-case letters, digits, - and _.")]
MaterialIds = Annotated[list[str] | None, typer.Argument(metavar="[IDS]...", help="Materials; or --all.")]
Duplicate = Annotated[bool, typer.Option("--allow-duplicate", help="Even if another material holds the same.")]
Kind = Annotated[MaterialKind | None, typer.Option("--kind", help="Only of this kind.")]


@command(material_add_group, "copy", write=True)
def material_add_copy(
    work: Work,
    material: MaterialId,
    title: Annotated[str, typer.Option("--title", help="The first line; {name} is a placeholder.")],
    subtitle: Annotated[str, typer.Option("--subtitle", help="The second line.")] = "",
    button: Annotated[str, typer.Option("--button", help="What the button says.")] = "",
    language: Annotated[str, typer.Option("--language", help="Such as en, zh or pt-BR.")] = "en",
    tags: Tags = None,
    allow_duplicate: Duplicate = False,
) -> Output:
    """Add a text."""
    raw = {"kind": "copy", "title": title, "subtitle": subtitle, "button": button, "language": language}
    return _add(work, material, raw, tags, allow_duplicate)


@command(material_add_group, "image", write=True)
def material_add_image(
    work: Work,
    material: MaterialId,
    file: File,
    alt: Annotated[str, typer.Option("--alt", help="What it shows, for those who cannot see it.")] = "",
    tags: Tags = None,
    allow_duplicate: Duplicate = False,
) -> Output:
    """Add a picture: PNG, JPEG or WebP."""
    return _add(work, material, _picture(work, file, alt), tags, allow_duplicate)


def _picture(work: Work, file: Path, alt: str) -> Content:
    from kaleidoscope.businesses import get_business
    from kaleidoscope.images import MAX_BYTES, store_image

    business = get_business(work.session).id
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error}.") from None
    return store_image(work.settings.files_dir, business, data, alt)


@command(material_add_group, "layout", write=True)
def material_add_layout(
    work: Work, material: MaterialId, file: File, tags: Tags = None, allow_duplicate: Duplicate = False
) -> Output:
    """Add a layout: canvas and regions, in a YAML or JSON file."""
    from kaleidoscope.yaml_text import load_yaml

    document = load_yaml(file, docs="docs/materials.md")
    if not isinstance(document, dict):
        raise InputError(f"{file}: a layout is an object with `width`, `height` and `root`.")
    return _add(work, material, {**document, "kind": "layout"}, tags, allow_duplicate)


@command(material_add_group, "style", write=True)
def material_add_style(
    work: Work,
    material: MaterialId,
    name: Annotated[str, typer.Option("--property", help="color, background, border_color, font_size, corner_radius.")],
    value: Annotated[str, typer.Option("--value", help="A colour as #rrggbb, or a number of px.")],
    applies_to: Annotated[
        str, typer.Option("--applies-to", help="Such as copy.button. Default: every text and the canvas.")
    ] = "",
    tags: Tags = None,
    allow_duplicate: Duplicate = False,
) -> Output:
    """Add a colour, a font size or another property that overrides the layout."""
    number = name in ("font_size", "corner_radius")
    try:
        read: str | float = float(value) if number else value
    except ValueError:
        raise InputError(f"--value: {value!r} is no number, and {name} takes one.") from None
    raw = {"kind": "style", "property": name, "value": read, "applies_to": applies_to}
    return _add(work, material, raw, tags, allow_duplicate)


def _add(
    work: Work, material: str, content: Content | Mapping[str, Any], tags: Sequence[str] | None, allow_duplicate: bool
) -> Output:
    from kaleidoscope.content import parse_content
    from kaleidoscope.materials import add_material
    from kaleidoscope.views import MaterialView

    parsed = parse_content(content) if isinstance(content, Mapping) else content
    row = add_material(
        work.session,
        material,
        parsed,
        tags_in(tags or ()),
        files_dir=work.settings.files_dir,
        allow_duplicate=allow_duplicate,
    )
    return _material_output(MaterialView.of(row))


def _material_output(view: MaterialView) -> Output:
    about: dict[str, object] = {"id": view.id, "kind": view.kind, "state": words(view.state), "reason": view.reason}
    about |= {k: v for k, v in view.content.model_dump(mode="json").items() if k not in ("kind", "root")}
    about["tags"] = ", ".join(_tag_text(t) for t in view.tags)
    reviewed = f"{view.reviewer}, {when(view.reviewed_at)}" if view.reviewer else None
    about |= {"author": view.author, "reviewer": reviewed, "taxonomy": view.taxonomy, "version": view.version}
    return Output(view, fields(about))


def _tag_text(tag: Tag) -> str:
    sure = "" if tag.confidence is None else f" ({tag.tagger or 'tagger'}, {tag.confidence:.2f})"
    return f"{tag.dimension}={tag.value}{sure}"


@command(material_group, "import", write=True)
def material_import(
    work: Work,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, metavar="CSV", help="A material a row.")],
    files: Annotated[
        Path | None,
        typer.Option("--files", exists=True, file_okay=False, help="Where the images are. Default: beside the CSV."),
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Import the rows that are right, and say what is wrong with the others.")
    ] = False,
    allow_duplicate: Duplicate = False,
) -> Output:
    """Add or change many materials from a CSV: all of them, or, where a row is wrong, none."""
    from kaleidoscope.materials import Outcome, import_materials

    report = import_materials(
        work.session,
        file,
        files or file.parent,
        work.settings.files_dir,
        partial=partial,
        allow_duplicates=allow_duplicate,
    )
    failed = [f"row {r.row} ({r.id or 'no id'}): {r.message}" for r in report.failures]
    counts = {outcome.value: report.count(outcome) for outcome in Outcome}
    details = {"rows": [{"row": r.row, "id": r.id, "message": r.message} for r in report.failures]}
    if not report.applied:
        raise InputError(
            f"{file}: nothing was imported, because {len(failed):,} of {len(report.rows):,} rows are wrong. Correct"
            " them, or import the others with --partial.\n" + "\n".join(cut(failed)),
            details=details,
        )
    if failed and len(failed) == len(report.rows):
        raise InputError(
            f"{file}: nothing was imported, because every row is wrong.\n" + "\n".join(cut(failed)), details=details
        )
    said = ", ".join(f"{counts[o]:,} {o}" for o in (Outcome.CREATED, Outcome.CHANGED, Outcome.UNCHANGED))
    return Output(
        {
            **counts,
            "rows": [{"row": r.row, "id": r.id, "outcome": r.outcome, "message": r.message} for r in report.rows],
        },
        f"{file}: {said}.",
        *headed(f"{len(failed):,} rows are wrong and were left out", failed, len(failed)),
    )


@command(material_group, "list")
def material_list(
    work: Work,
    kind: Kind = None,
    state: Annotated[ReviewState | None, typer.Option("--state", help="Only in this state.")] = None,
    tag: Annotated[str | None, typer.Option("--tag", metavar="DIMENSION=VALUE", help="Only with this tag.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Output:
    """List the materials of the business."""
    from kaleidoscope.businesses import get_business
    from kaleidoscope.materials import list_materials
    from kaleidoscope.views import MaterialView, page_view

    get_business(work.session)
    wanted = None if tag is None else pairs_in("--tag", [tag])[0]
    found = list_materials(work.session, kind=kind, state=state, tag=wanted, cursor=cursor, limit=limit)
    page = page_view(found, MaterialView.of)
    rows = [
        (m.id, m.kind, words(m.state), gist(m.content), ", ".join(_tag_text(t) for t in m.tags)) for m in page.items
    ]
    shown = table(("id", "kind", "state", "holds", "tags"), rows, whole=("id", "kind", "state"))
    return Output(page, shown, *none_of(rows, "materials"), *more(page.next_cursor))


@command(material_group, "show")
def material_show(work: Work, material: MaterialId) -> Output:
    """Show a material and where it stands."""
    from kaleidoscope.materials import get_material
    from kaleidoscope.views import MaterialView

    return _material_output(MaterialView.of(get_material(work.session, material)))


@command(material_group, "tag", write=True)
def material_tag(
    work: Work,
    material: MaterialId,
    tags: Annotated[
        list[str], typer.Argument(metavar="DIMENSION=VALUE...", help="`dimension=` alone takes its tags away.")
    ],
    version: Version = None,
) -> Output:
    """Tag a material. The dimensions that are named get these values; the others stay as they are."""
    from kaleidoscope.content import parse_tags
    from kaleidoscope.materials import change_material, get_material
    from kaleidoscope.views import MaterialView

    pairs = pairs_in("tags", tags)
    named = {dimension for dimension, _ in pairs}
    row = get_material(work.session, material)
    kept = [t for t in MaterialView.of(row).tags if t.dimension not in named]
    given = parse_tags({"dimension": d, "value": v} for d, v in pairs if v)
    changed = change_material(work.session, material, tags=[*kept, *given], version=version)
    return _material_output(MaterialView.of(changed))


@command(material_group, "change", write=True)
def material_change(
    work: Work,
    material: MaterialId,
    content: Annotated[
        Path | None,
        typer.Option(
            "--content",
            exists=True,
            dir_okay=False,
            help="All that it is to hold (YAML or JSON), as `show --json` has it.",
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", exists=True, dir_okay=False, help="Another picture, of an image.")
    ] = None,
    alt: Annotated[str | None, typer.Option("--alt", help="What the picture shows.")] = None,
    tags: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="DIMENSION=VALUE", help="A tag, instead of all it has; repeat it."),
    ] = None,
    allow_duplicate: Duplicate = False,
    version: Version = None,
) -> Output:
    """Change what a material holds, or its tags. It needs review again, and so does every variant that holds it."""
    from kaleidoscope.content import Image
    from kaleidoscope.materials import change_material, content_of, get_material
    from kaleidoscope.views import MaterialView

    if content is None and picture is None and alt is None and tags is None:
        raise InputError("say what to change: --content FILE, --picture FILE, --alt TEXT, --tag DIMENSION=VALUE.")
    if content is not None and (picture is not None or alt is not None):
        raise InputError("--content says everything; leave --picture and --alt out, or leave --content out.")
    held = content_of(get_material(work.session, material))
    wanted: Content | None = None
    if content is not None:
        wanted = _content_in(content, held.kind)
    elif picture is not None or alt is not None:
        if not isinstance(held, Image):
            raise InputError(f"--picture and --alt are of images; material {material!r} is {held.kind}. Use --content.")
        described = held.alt if alt is None else alt
        wanted = held.model_copy(update={"alt": described}) if picture is None else _picture(work, picture, described)
    changed = change_material(
        work.session,
        material,
        content=wanted,
        tags=None if tags is None else tags_in(tags),
        version=version,
        files_dir=work.settings.files_dir,
        allow_duplicate=allow_duplicate,
    )
    return _material_output(MaterialView.of(changed))


def _content_in(file: Path, kind: str) -> Content:
    """The content in a YAML or JSON file; its kind may be left out."""
    from kaleidoscope.content import parse_content
    from kaleidoscope.yaml_text import load_yaml

    document = load_yaml(file, docs="docs/materials.md")
    if not isinstance(document, dict):
        raise InputError(f"{file}: the content of a {kind} is an object. `material show ID --json` shows it.")
    return parse_content({"kind": kind, **document})


def _material_move(move: str) -> None:
    done, explained = MOVES_HELP[move]

    def job(
        work: Work,
        ids: MaterialIds = None,
        every: Annotated[bool, typer.Option("--all", help="Every material for which it is possible.")] = False,
        kind: Annotated[MaterialKind | None, typer.Option("--kind", help="With --all: only of this kind.")] = None,
        reason: Reason = None,
    ) -> Output:
        from kaleidoscope.review import move_materials

        if bool(ids) == every:
            raise InputError(f"say which materials to {move}: their ids, or --all (with --kind or without).")
        if kind is not None and not every:
            raise InputError("--kind chooses among --all; it does not go with ids.")
        chosen = _movable(work.session, move, kind) if every else ids or []
        return moved_output(done, move_materials(work.session, move, chosen, reason=reason))

    job.__doc__ = explained
    command(material_group, move, write=True)(job)


def _movable(session: Session, move: str, kind: MaterialKind | None) -> list[str]:
    from kaleidoscope.businesses import get_business
    from kaleidoscope.materials import list_materials
    from kaleidoscope.review import MOVES

    get_business(session)
    ids: list[str] = []
    for state in sorted(MOVES[move].come_from):
        cursor = None
        while True:
            page = list_materials(session, kind=kind, state=state, cursor=cursor, limit=500)
            ids += [m.id for m in page.items]
            cursor = page.next_cursor
            if cursor is None:
                break
    return sorted(ids)


for _move in MOVES_HELP:
    _material_move(_move)
