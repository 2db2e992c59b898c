"""The tag vocabulary, and how it evolves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaleidoscope.operator_cli.frame import (
    MOST,
    File,
    Note,
    Out,
    Output,
    Work,
    command,
    headed,
    items,
    sentence,
    when,
    write_out,
)
from kaleidoscope.terminal import table

if TYPE_CHECKING:
    from kaleidoscope.database import Session

taxonomy_group = typer.Typer(name="taxonomy", help="The tag vocabulary, and how it evolves.", no_args_is_help=True)


@command(taxonomy_group, "show")
def taxonomy_show(
    work: Work,
    number: Annotated[int | None, typer.Option("--number", min=1, max=MOST, help="An older version.")] = None,
) -> Output:
    """Show the vocabulary: the current version, or an older one."""
    found, vocabulary = _taxonomy(work.session, number)
    rows = []
    for d in vocabulary.dimensions:
        values = ", ".join(v.id + (" (retired)" if v.retired else "") for v in d.values)
        kind = ", ".join(filter(None, (d.factor, "multi" if d.multi else None, "retired" if d.retired else None)))
        rows.append((d.layer, d.id, d.labels.en, kind, values))
    return Output(
        {"number": found, "taxonomy": vocabulary},
        f"Version {found}",
        table(("layer", "dimension", "label", "kind", "values"), rows, whole=("dimension",)),
    )


def _taxonomy(session: Session, number: int | None) -> tuple[int, Any]:
    from kaleidoscope.businesses import get_business
    from kaleidoscope.taxonomy import current_taxonomy, taxonomy_at

    get_business(session)
    return current_taxonomy(session) if number is None else (number, taxonomy_at(session, number))


@command(taxonomy_group, "versions")
def taxonomy_versions(work: Work) -> Output:
    """List all versions, newest first."""
    from kaleidoscope.businesses import get_business
    from kaleidoscope.taxonomy import list_versions
    from kaleidoscope.views import TaxonomyVersionView

    get_business(work.session)
    views = [TaxonomyVersionView.model_validate(v) for v in list_versions(work.session)]
    rows = [(v.number, when(v.created_at), v.author, v.note) for v in views]
    return Output(items(views), table(("version", "made", "by", "note"), rows, whole=("made",)))


@command(taxonomy_group, "export")
def taxonomy_export(
    work: Work,
    file: Out = None,
    number: Annotated[int | None, typer.Option("--number", min=1, max=MOST, help="An older version.")] = None,
) -> Output:
    """Write the vocabulary as YAML, to edit and to import."""
    from kaleidoscope.taxonomy import format_taxonomy

    found, vocabulary = _taxonomy(work.session, number)
    return Output({"number": found, "taxonomy": vocabulary}, write_out(format_taxonomy(vocabulary), file))


@command(taxonomy_group, "import", write=True)
def taxonomy_import(
    work: Work,
    file: File,
    mapping: Annotated[
        Path | None,
        typer.Option("--mapping", exists=True, dir_okay=False, help="What became of tags that are gone (YAML)."),
    ] = None,
    note: Note = "",
    expected: Annotated[
        int | None,
        typer.Option("--expected", min=1, max=MOST, help="Refuse if this is not the current version any more."),
    ] = None,
) -> Output:
    """Make a vocabulary written by hand the next version."""
    from kaleidoscope.taxonomy import import_taxonomy, read_mapping, read_taxonomy

    given = None if mapping is None else read_mapping(mapping)
    return _version_output(import_taxonomy(work.session, read_taxonomy(file), given, note=note, expected=expected))


def _version_output(row: Any) -> Output:
    from kaleidoscope.views import TaxonomyVersionView

    view = TaxonomyVersionView.model_validate(row)
    shown = [f"{old} → {', '.join(new)}" for old, new in row.mapping.items()]
    return Output(
        {**view.model_dump(mode="json"), "mapping": row.mapping},
        f"The vocabulary is now version {view.number}.",
        *shown,
    )


@command(taxonomy_group, "evolve", write=True)
def taxonomy_evolve(
    work: Work,
    file: File,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Change nothing; show the materials and rules somebody has to look at then."),
    ] = False,
    note: Note = "",
    expected: Annotated[
        int | None,
        typer.Option("--expected", min=1, max=MOST, help="Refuse if this is not the current version any more."),
    ] = None,
) -> Output:
    """Make the changes in a YAML file (rename, split, merge, …) the next version."""
    from kaleidoscope.taxonomy import affected_materials, affected_rules, apply, current_taxonomy, evolve, read_changes
    from kaleidoscope.views import AffectedMaterialView, AffectedRuleView, EvolvedView

    changes = read_changes(file)
    affected, rules = affected_materials(work.session, changes), affected_rules(work.session, changes)
    rows = [
        (
            a.material,
            "; ".join(f"{d}={v} → {to}" for (d, v), to in a.unknown.items()),
            ", ".join(f"several values of {d}" for d in a.overfull),
        )
        for a in affected
    ]
    shown = [table(("material", "unknown then", "contradictory then"), rows, whole=("material",))] if rows else []
    named = headed(
        "These name tags that are changed, and have to be written anew", [sentence(str(r)) for r in rules], len(rules)
    )
    if dry_run:
        number, before = current_taxonomy(work.session)
        _, mapping = apply(before, changes)
        entries = {old: list(new) for old, new in mapping.root.items()}
        return Output(
            {
                "number": number,
                "mapping": entries,
                "affected": [AffectedMaterialView.of(a) for a in affected],
                "rules": [AffectedRuleView.of(r) for r in rules],
            },
            *(f"{old} → {', '.join(new)}" for old, new in entries.items()),
            f"{len(rows)} materials would need new tags. Nothing was changed.",
            *shown,
            *named,
        )
    row = evolve(work.session, changes, note=note, expected=expected)
    return Output(
        EvolvedView.of(row, affected, rules),
        *_version_output(row).shown,
        *([f"{len(rows)} materials need new tags:"] if rows else []),
        *shown,
        *named,
    )


@command(taxonomy_group, "map")
def taxonomy_map(
    work: Work,
    old: Annotated[int, typer.Argument(metavar="OLD", min=1, max=MOST, help="A version.")],
    new: Annotated[int, typer.Argument(metavar="NEW", min=1, max=MOST, help="A later one.")],
) -> Output:
    """Say what became of the tags of an older version; what is not named stayed as it is."""
    from kaleidoscope.taxonomy import mapping_between

    entries = {key: list(to) for key, to in mapping_between(work.session, old, new).root.items()}
    rows = [(key, ", ".join(to)) for key, to in entries.items()]
    shown = table((f"version {old}", f"version {new}"), rows) if rows else "Every tag stayed as it is."
    return Output({"old": old, "new": new, "mapping": entries}, shown)
