"""The material library: add, change, find and retire the atomic options of slots, and import many from a CSV.

Whether a material may be shown is decided in review.py; what it may hold, in content.py.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import select

from kaleidoscope.businesses import get_business, placeholders_of, reopen_variants
from kaleidoscope.content import (
    Content,
    Copy,
    Image,
    Placeholder,
    Tag,
    check_placeholders,
    content_hash,
    parse_content,
    parse_tags,
)
from kaleidoscope.database import PAGE, Page, Session, check_id, check_version, find, paginate, refuse_existing
from kaleidoscope.errors import ConflictError, InputError, NotFoundError, TooLargeError
from kaleidoscope.images import MAX_BYTES, check_stored, store_image
from kaleidoscope.review import move_materials
from kaleidoscope.tables import Material
from kaleidoscope.taxonomy import (
    Taxonomy,
    current_taxonomy,
    mapping_between,
    tags_now,
    taxonomy_at,
    translate,
)
from kaleidoscope.vocabulary import MaterialKind, ReviewState, Role

MAX_CSV_BYTES = 50 * 2**20
MAX_TAGS = 100  # of a material


def add_material(
    session: Session,
    material_id: str,
    content: Content,
    tags: Sequence[Tag] = (),
    *,
    files_dir: Path | None = None,
    allow_duplicate: bool = False,
) -> Material:
    """A new material, as a draft. An image takes `files_dir`, the folder that pictures are kept under.

    Raises InputError for an id, a placeholder or a tag that cannot be, and for an image that is not what is kept;
    ConflictError where the id is taken, or, unless `allow_duplicate`, where another material holds exactly the same.
    """
    session.caller.require(Role.EDITOR)
    return _add(session, _rules(session, files_dir), material_id, content, tags, allow_duplicate=allow_duplicate)


def change_material(
    session: Session,
    material_id: str,
    *,
    content: Content | None = None,
    tags: Sequence[Tag] | None = None,
    version: int | None,
    files_dir: Path | None = None,
    allow_duplicate: bool = False,
) -> Material:
    """Change what is given; the caller becomes the author of what it now holds. An image takes `files_dir`.

    A material that was approved or in review falls back to draft, and so does every variant that holds it. What is
    given and is the same already changes nothing.

    Raises InputError as `add_material` does; ConflictError, with both versions, where `version` is not the current one,
    and where the material is retired or another one holds exactly the same.
    """
    session.caller.require(Role.EDITOR)
    rules = _rules(session, files_dir)
    return _change(session, rules, material_id, content, tags, version, allow_duplicate=allow_duplicate)


def get_material(session: Session, material_id: str) -> Material:
    """The material; raises NotFoundError."""
    return find(session, Material, material_id)


def list_materials(
    session: Session,
    *,
    kind: MaterialKind | None = None,
    state: ReviewState | None = None,
    tag: tuple[str, str] | None = None,
    cursor: str | None = None,
    limit: int = PAGE,
) -> Page[Material]:
    """The materials of a kind, in a state, with a (dimension, value) tag, by id.

    The tag is one of the current taxonomy: materials that were tagged before a value was renamed are found too.
    """
    query: sa.Select[Any] = select(Material)
    query = query if kind is None else query.where(Material.kind == kind)
    query = query if state is None else query.where(Material.state == state)
    query = query if tag is None else query.where(_has_tag(session, tag))
    return paginate(session, query, Material.id, cursor=cursor, limit=limit)


def retire_material(session: Session, material_id: str) -> Material:
    """Take a material out of use; variants that hold it fall back to draft. Retiring it twice changes nothing."""
    session.caller.require(Role.EDITOR)
    move_materials(session, "retire", [material_id])
    return find(session, Material, material_id)


def duplicates(session: Session) -> list[list[str]]:
    """The ids of materials in use that hold exactly the same, group by group."""
    rows = session.execute(
        select(Material.content_hash, Material.id)
        .where(Material.state != ReviewState.RETIRED)
        .order_by(Material.content_hash, Material.id)
    )
    groups: dict[str, list[str]] = {}
    for digest, material_id in rows:
        groups.setdefault(digest, []).append(material_id)
    return sorted(group for group in groups.values() if len(group) > 1)


def content_of(material: Material) -> Content:
    """What a stored material holds."""
    return parse_content(material.content)


def tags_of(material: Material) -> tuple[Tag, ...]:
    """A stored material's tags, in the words of the taxonomy version it was tagged under."""
    return parse_tags(material.tags)


# ── what may be stored ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Rules:
    """What the business allows, read once for many materials."""

    business: str
    placeholders: tuple[Placeholder, ...]
    number: int
    taxonomy: Taxonomy
    files_dir: Path | None  # where pictures are kept


def _rules(session: Session, files_dir: Path | None) -> _Rules:
    business = get_business(session)
    return _Rules(business.id, placeholders_of(business), *current_taxonomy(session), files_dir)


def _add(
    session: Session,
    rules: _Rules,
    material_id: str,
    content: Content,
    tags: Sequence[Tag],
    *,
    allow_duplicate: bool,
) -> Material:
    check_id("material", material_id)
    refuse_existing(session, Material, material_id)
    _check_content(rules, content)
    digest = content_hash(content)
    if not allow_duplicate:
        _refuse_twin(session, digest, material_id)
    material = Material(
        business_id=session.business,
        id=material_id,
        kind=content.kind,
        content=content.model_dump(mode="json"),
        content_hash=digest,
        tags=_checked_tags(rules, tags),
        taxonomy=rules.number,
        state=ReviewState.DRAFT,
        author=session.caller.user,
    )
    session.add(material)
    session.flush()
    return material


def _change(
    session: Session,
    rules: _Rules,
    material_id: str,
    content: Content | None,
    tags: Sequence[Tag] | None,
    version: int | None,
    *,
    allow_duplicate: bool,
) -> Material:
    material = find(session, Material, material_id, lock=True)
    yours: dict[str, Any] = {}
    if content is not None:
        yours["content"] = content.model_dump(mode="json")
    if tags is not None:
        yours["tags"] = [tag.model_dump(mode="json") for tag in tags]
    check_version(material, version, yours, {"content": material.content, "tags": material.tags})
    if material.state == ReviewState.RETIRED:
        raise ConflictError(f"Material {material_id!r} is retired. Restore it, then change it.")
    changed = []
    if content is not None and (digest := content_hash(content)) != material.content_hash:
        if content.kind != material.kind:
            raise InputError(
                f"content: material {material_id!r} is {material.kind} and cannot become {content.kind}. Add another."
            )
        _check_content(rules, content)
        if not allow_duplicate:
            _refuse_twin(session, digest, material_id)
        material.content, material.content_hash = yours["content"], digest
        changed.append("content")
    if tags is not None:
        stored = _checked_tags(rules, tags)
        if stored != material.tags:
            material.tags, material.taxonomy = stored, rules.number
            changed.append("tags")
    if changed:
        what = f"{' and '.join(changed)} of material {material_id} changed"
        if material.state in (ReviewState.APPROVED, ReviewState.IN_REVIEW):
            material.state, material.reason = ReviewState.DRAFT, what
            material.reviewer = material.reviewed_at = None
        material.author = session.caller.user
        session.flush()
        reopen_variants(session, [material_id], what)
    return material


def _check_content(rules: _Rules, content: Content) -> None:
    if isinstance(content, Copy):
        check_placeholders(content, rules.placeholders)
    if isinstance(content, Image):
        if rules.files_dir is None:  # of the code that calls, not of whoever uses it
            raise ValueError("an image is checked against what is stored: give `files_dir`")
        check_stored(rules.files_dir, rules.business, content)


def _checked_tags(rules: _Rules, tags: Sequence[Tag]) -> list[dict[str, Any]]:
    """The tags as they are stored: sorted, each once, by hand rather than by a tagger."""
    if len(tags) > MAX_TAGS:
        raise InputError(f"tags: there are {len(tags)}; a material takes up to {MAX_TAGS}.")
    rules.taxonomy.check_tags((tag.dimension, tag.value) for tag in tags)
    by_name: dict[tuple[str, str], Tag] = {}
    for tag in tags:
        if tag.source == "hand" or (tag.dimension, tag.value) not in by_name:
            by_name[tag.dimension, tag.value] = tag
    return [by_name[name].model_dump(mode="json") for name in sorted(by_name)]


def _refuse_twin(session: Session, digest: str, material_id: str) -> None:
    same = select(Material).where(Material.content_hash == digest, Material.id != material_id)
    twin = session.scalars(same.order_by(Material.id).limit(1)).first()
    if twin is not None:
        retired = " It is retired: restore it." if twin.state == ReviewState.RETIRED else ""
        raise ConflictError(f"Material {twin.id!r} holds exactly the same. Use it, or allow duplicates.{retired}")


def _has_tag(session: Session, tag: tuple[str, str]) -> sa.ColumnElement[bool]:
    """Whether a material has a tag of the current taxonomy, under the name that it had when the material got it."""
    current, _ = current_taxonomy(session)
    cases: list[sa.ColumnElement[bool]] = []
    for number in session.scalars(select(Material.taxonomy).distinct()).all():
        named = {tag}
        if number != current:
            before = taxonomy_at(session, number).tags
            after = translate(before, [mapping_between(session, number, current)])
            named = {old for old, new in zip(before, after, strict=True) if new == tag}
        cases += [sa.and_(Material.taxonomy == number, _holds(session, *name)) for name in sorted(named)]
    return sa.or_(*cases) if cases else sa.false()


def _holds(session: Session, dimension: str, value: str) -> sa.ColumnElement[bool]:
    if "\0" in dimension + value:  # no such tag can be stored, nor asked for
        return sa.false()
    if session.get_bind().dialect.name == "sqlite":
        unpack, read, path = sa.func.json_each, sa.func.json_extract, "$."
    else:
        unpack, read, path = sa.func.json_array_elements, sa.func.json_extract_path_text, ""
    tag = unpack(Material.tags).table_valued("value")
    same = (read(tag.c.value, path + "dimension") == dimension, read(tag.c.value, path + "value") == value)
    return sa.exists(sa.select(sa.literal(1)).select_from(tag).where(*same).correlate(Material))


# ── import ──────────────────────────────────────────────────────────────────────────────────────────────────────────

COLUMNS = {
    MaterialKind.COPY: ("language", "title", "subtitle", "button"),
    MaterialKind.IMAGE: ("file", "alt"),
    MaterialKind.LAYOUT: ("content",),
    MaterialKind.STYLE: ("content",),
}
KNOWN_COLUMNS = tuple(dict.fromkeys(("id", "kind", *(c for columns in COLUMNS.values() for c in columns), "tags")))


class Outcome(StrEnum):
    """What came of a row."""

    CREATED = "created"
    CHANGED = "changed"
    UNCHANGED = "unchanged"
    FAILED = "failed"
    HELD_BACK = "held_back"  # it was fine, and others were not


@dataclass(frozen=True)
class RowReport:
    """What came of a row of the file; the header is row 1."""

    row: int
    id: str
    outcome: Outcome
    message: str = ""


@dataclass(frozen=True)
class ImportReport:
    """What came of a file; unless `applied`, nothing was stored."""

    rows: tuple[RowReport, ...]
    applied: bool

    @property
    def failures(self) -> tuple[RowReport, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.outcome == Outcome.FAILED)

    def count(self, outcome: Outcome) -> int:
        """How many rows came to this."""
        return sum(row.outcome == outcome for row in self.rows)


def import_materials(
    session: Session,
    csv_path: Path,
    folder: Path,
    files_dir: Path,
    *,
    partial: bool = False,
    allow_duplicates: bool = False,
) -> ImportReport:
    """Add or change the materials that a CSV file lists, with pictures from a folder; docs/materials.md has the format.

    Every row is tried and reported. One that fails keeps all others out of the database too, unless `partial`.
    Importing the same file again changes nothing. Pictures are kept under `files_dir`.

    Raises InputError where the file cannot be read or its columns are not ours, TooLargeError beyond 50 MiB.
    """
    session.caller.require(Role.EDITOR)
    importer = _Importer(session, folder, files_dir, _rules(session, files_dir), allow_duplicates)
    everything = session.begin_nested()
    reports = [importer.take(record) for record in _records(csv_path)]
    applied = partial or all(report.outcome != Outcome.FAILED for report in reports)
    if applied:
        everything.commit()
    else:
        everything.rollback()
        note = "It is fine, but nothing was stored, because other rows failed."
        reports = [
            report if report.outcome == Outcome.FAILED else replace(report, outcome=Outcome.HELD_BACK, message=note)
            for report in reports
        ]
    return ImportReport(tuple(reports), applied)


@dataclass(frozen=True)
class _Record:
    """A row of the file: its cells by column, or what is wrong with it."""

    row: int
    cells: Mapping[str, str]
    problem: str | None = None


@dataclass(frozen=True)
class _Importer:
    session: Session
    folder: Path
    files_dir: Path
    rules: _Rules
    allow_duplicates: bool

    def take(self, record: _Record) -> RowReport:
        """Store a row, if it can be."""
        material_id = record.cells.get("id", "")
        try:
            if record.problem:
                raise InputError(record.problem)
            with self.session.begin_nested():
                return RowReport(record.row, material_id, self._store(record))
        except (InputError, ConflictError, NotFoundError) as error:
            return RowReport(record.row, material_id[:63], Outcome.FAILED, error.message)

    def _store(self, record: _Record) -> Outcome:
        cells = record.cells
        material_id = check_id("id", cells["id"])
        content = self._content(cells)
        tags = None if "tags" not in cells else _read_tags(cells["tags"])
        existing = self.session.get(Material, (self.session.business, material_id))
        if existing is None:
            _add(self.session, self.rules, material_id, content, tags or (), allow_duplicate=self.allow_duplicates)
            return Outcome.CREATED
        if tags is not None and self._tagged_alike(existing, tags):
            tags = None
        if tags is None and content_hash(content) == existing.content_hash:
            return Outcome.UNCHANGED
        _change(self.session, self.rules, material_id, content, tags, None, allow_duplicate=self.allow_duplicates)
        return Outcome.CHANGED

    def _tagged_alike(self, existing: Material, tags: Iterable[Tag]) -> bool:
        stored = [(tag["dimension"], tag["value"]) for tag in existing.tags]
        if existing.taxonomy != self.rules.number:
            now = tags_now(self.session, stored, existing.taxonomy)
            if now.unknown:  # the file says which of the values it is
                return False
            stored = list(now.known)
        return set(stored) == {(tag.dimension, tag.value) for tag in tags}

    def _content(self, cells: Mapping[str, str]) -> Content:
        kind = cells["kind"].strip().lower()
        if kind not in COLUMNS:
            raise InputError(f"kind: {cells['kind'][:40]!r} is not one of {', '.join(MaterialKind)}.")
        columns = COLUMNS[MaterialKind(kind)]
        stray = [c for c in cells if c not in ("id", "kind", "tags", *columns) and cells[c].strip()]
        if stray:
            raise InputError(f"{', '.join(stray)}: does not belong to {kind}. Leave it empty.")
        given = {column: cells[column] for column in columns if cells.get(column, "").strip()}
        if kind == MaterialKind.IMAGE:
            return self._image(given.get("file", ""), given.get("alt", ""))
        if kind == MaterialKind.COPY:
            return parse_content({"kind": kind, **given})
        return parse_content({"kind": kind, **_read_json(given.get("content", ""), kind)})

    def _image(self, name: str, alt: str) -> Content:
        path = _inside(self.folder, name.strip())
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        try:
            return store_image(self.files_dir, self.session.business, data, alt)
        except InputError as error:
            raise type(error)(f"file: {name}: {error}") from error


def _inside(folder: Path, name: str) -> Path:
    """The file of this name in the folder; raises InputError for one that is elsewhere, through links too."""
    if not name:
        raise InputError("file: is empty; name a file in the folder.")
    try:
        path = (folder / name).resolve()
        inside = path.is_relative_to(folder.resolve()) and not Path(name).is_absolute() and ".." not in Path(name).parts
        there = inside and path.is_file()
    except (OSError, ValueError, RuntimeError):  # names that no file can have, links in a circle
        inside, there = True, False
    if not inside:
        raise InputError(f"file: {name!r} is not in the folder. Name a file in it, without .. and links out of it.")
    if not there:
        raise InputError(f"file: there is no file {name[:200]!r} in {folder}.")
    return path


def _read_json(text: str, kind: str) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = "nests too deeply" if isinstance(error, RecursionError) else f"is no JSON ({error})"
        raise InputError(f"content: {why}. Give the fields of a {kind} as a JSON object.") from None
    if not isinstance(raw, dict):
        raise InputError(f"content: give the fields of a {kind} as a JSON object.")
    if raw.pop("kind", kind) != kind:
        raise InputError(f"content: its kind is not that of the row, {kind}.")
    return raw


def _read_tags(text: str) -> tuple[Tag, ...]:
    """Tags written `dimension=value|dimension=value`."""
    pairs = [part.partition("=") for part in text.split("|") if part.strip()]
    wrong = ["".join(pair) for pair in pairs if not pair[1]]
    if wrong:
        raise InputError(f"tags: {wrong[0][:60]!r} is no tag. Write dimension=value, with | between tags.")
    return parse_tags({"dimension": dimension.strip(), "value": value.strip()} for dimension, _, value in pairs)


def _records(path: Path) -> Iterator[_Record]:
    """The rows of the file, those included that cannot be used."""
    text = _read_text(path)
    header_line = text.partition("\n")[0]
    delimiter = max(",;\t", key=header_line.count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = _columns(path, next(lines, []))
    except csv.Error as error:
        raise InputError(f"{path}: row 1 cannot be read ({error}).") from None
    seen: dict[str, int] = {}
    for row in range(2, 2**31):
        try:
            cells = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Record(
                row, {}, f"it and what follows cannot be read ({error}). Close its quotes, double those inside."
            )
            return
        if not any(cell.strip() for cell in cells):
            continue
        yield _record(row, columns, cells, seen)


def _record(row: int, columns: Sequence[str], cells: Sequence[str], seen: dict[str, int]) -> _Record:
    named = dict(zip(columns, cells, strict=False))
    named["id"] = named["id"].strip()
    problem = None
    if len(cells) != len(columns):
        problem = f"it has {len(cells)} cells, the header has {len(columns)}. Quote cells that hold the separator."
    elif any("\ud800" <= character <= "\udfff" for cell in cells for character in cell):
        named = {column: cell.encode("utf-8", "replace").decode() for column, cell in named.items()}
        problem = "it is not UTF-8. Save the file as “CSV UTF-8”."
    elif named["id"] in seen:
        problem = f"id {named['id']!r} is in row {seen[named['id']]} already. Give every material one row."
    seen.setdefault(named["id"], row)
    return _Record(row, named, problem)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CSV_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    if len(data) > MAX_CSV_BYTES:
        raise TooLargeError(f"{path}: has more than {MAX_CSV_BYTES:,} bytes. Import it in parts.")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: is UTF-16. Save it as “CSV UTF-8”.")
    # Bytes that are not UTF-8 become lone surrogates, so that the rows that hold them can be named.
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="surrogateescape")


def _columns(path: Path, header: Sequence[str]) -> list[str]:
    columns = [name.strip().lower() for name in header]
    unknown = [name for name in columns if name not in KNOWN_COLUMNS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], KNOWN_COLUMNS, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        listed = ", ".join(repr(name[:40]) for name in unknown[:10])
        raise InputError(f"{path}: there is no column {listed}.{meant} There are: {', '.join(KNOWN_COLUMNS)}.")
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise InputError(f"{path}: column {', '.join(twice)} is there twice. Keep one.")
    if missing := [name for name in ("id", "kind") if name not in columns]:
        plural = "s" if len(missing) > 1 else ""
        raise InputError(f"{path}: lacks the column{plural} {' and '.join(missing)}. Row 1 names the columns.")
    return columns
