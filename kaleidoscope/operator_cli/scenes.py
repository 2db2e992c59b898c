"""Scenes, and the variants that their materials combine to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaleidoscope.errors import InputError
from kaleidoscope.operator_cli.frame import (
    MOVES_HELP,
    Cursor,
    File,
    Limit,
    Out,
    Output,
    Reason,
    Scene,
    Version,
    Work,
    command,
    gist,
    headed,
    listing,
    more,
    moved_output,
    none_of,
    when,
    words,
    write_out,
)
from kaleidoscope.terminal import fields, table
from kaleidoscope.vocabulary import ReviewState

if TYPE_CHECKING:
    from kaleidoscope.review import VariantFilter

scene_group = typer.Typer(
    name="scene", help="Scenes: placements, their slots, constraints and checks; scenes as code.", no_args_is_help=True
)
variant_group = typer.Typer(
    name="variant", help="Variants: what a scene's materials combine to, and its review.", no_args_is_help=True
)


@command(scene_group, "list")
def scene_list(work: Work, cursor: Cursor = None, limit: Limit = 50) -> Output:
    """List the scenes of the business."""
    from kaleidoscope.businesses import get_business
    from kaleidoscope.scenes import list_scenes
    from kaleidoscope.views import SceneView, page_view

    get_business(work.session)
    page = page_view(list_scenes(work.session, cursor=cursor, limit=limit), SceneView.of)
    rows = [
        (s.id, s.spec.name, " × ".join(f"{len(t.materials)} {t.name}" for t in s.spec.slots), s.author, s.version)
        for s in page.items
    ]
    shown = table(("id", "name", "slots", "author", "version"), rows, whole=("id",))
    return Output(page, shown, *none_of(rows, "scenes"), *more(page.next_cursor))


@command(scene_group, "show")
def scene_show(work: Work, scene: Scene) -> Output:
    """Show a scene: its slots, constraints, checks, and how many variants it has in which state."""
    from kaleidoscope.review import count_variants
    from kaleidoscope.scenes import get_scene
    from kaleidoscope.views import SceneView

    view = SceneView.of(get_scene(work.session, scene))
    counts = count_variants(work.session, scene)
    spec = view.spec
    about = {
        "id": view.id,
        "name": spec.name,
        "description": spec.description,
        "product": listing(spec.product),
        **{f"slot {s.name}": f"{s.kind}: {', '.join(s.materials) or 'no materials'}" for s in spec.slots},
        "constraints": "\n".join(spec.constraints),
        "checks": listing(spec.checks.model_dump(mode="json")),
        "cap": spec.cap,
        "baseline": None if spec.baseline is None else listing(spec.baseline),
        "traffic": None if spec.traffic is None else listing(spec.traffic.model_dump()),
        "approve automatically": "yes" if spec.approve_automatically else None,
        "variants": ", ".join(f"{n:,} {words(state)}" for state, n in counts.items()) or "none made",
        "author": view.author,
        "version": view.version,
    }
    return Output({**view.model_dump(mode="json"), "variants": counts}, fields(about))


@command(scene_group, "export")
def scene_export(work: Work, scene: Scene, file: Out = None) -> Output:
    """Write a scene as YAML, to keep beside your code, to edit and to apply."""
    from kaleidoscope.scenes import export_scene, get_scene
    from kaleidoscope.views import SceneView

    row = get_scene(work.session, scene)
    text = export_scene(row)
    return Output({"scene": SceneView.of(row), "yaml": text}, write_out(text, file))


@command(scene_group, "diff")
def scene_diff(work: Work, file: File) -> Output:
    """Show what applying a file would change, a line per change."""
    from kaleidoscope.businesses import get_business
    from kaleidoscope.scenes import diff_scene, read_scene

    get_business(work.session)
    return _diff_output(diff_scene(work.session, *read_scene(file)))


@command(scene_group, "apply", write=True)
def scene_apply(
    work: Work,
    file: File,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check it, show what it would change, change nothing.")
    ] = False,
    version: Version = None,
) -> Output:
    """Make a scene what a file says, and show what changed; a second time changes nothing."""
    from kaleidoscope.scenes import apply_scene, read_scene

    scene_id, spec = read_scene(file)
    diff = apply_scene(work.session, scene_id, spec, version=version)
    if dry_run:
        work.session.rollback()
    return _diff_output(diff, dry_run=dry_run)


def _diff_output(diff: Any, *, dry_run: bool | None = None) -> Output:
    value = {"scene": diff.scene_id, "creates": diff.creates, "changes": list(diff.lines)}
    if dry_run is not None:
        value["applied"] = not dry_run
    if not diff.lines:
        return Output(value, f"Scene {diff.scene_id} is already so: nothing to change.")
    verb = "would be" if dry_run in (None, True) else "is"
    return Output(value, f"Scene {diff.scene_id} {verb} {'made' if diff.creates else 'changed'}:", *diff.lines)


@command(scene_group, "count")
def scene_count(work: Work, scene: Scene) -> Output:
    """Count the legal combinations, and say what is wrong with constraints and what the design checks found."""
    import math

    from kaleidoscope.combiner import count, diagnose
    from kaleidoscope.scenes import get_scene, space_of

    found = space_of(work.session, get_scene(work.session, scene))
    space = found.space
    legal, combinations = count(space), math.prod(space.sizes)
    findings = diagnose(space)
    hard, soft = ([f.message for f in failures] for failures in (found.ruled_out, found.remarks))
    value = {
        "combinations": combinations,
        "legal": legal,
        "findings": findings,
        "checks": found.spec.checks,
        "ruled_out": hard,
        "remarks": soft,
    }
    sizes = " × ".join(f"{size} {slot.name}" for slot, size in zip(space.slots, space.sizes, strict=True))
    return Output(
        value,
        f"{legal:,} of {combinations:,} combinations ({sizes}) are legal.",
        *(f"{f.level} ({f.code}): {f.message}" for f in findings),
        *headed(f"Hard checks rule out {len(hard):,} sets of materials", hard),
        *headed(f"Soft checks make {len(soft):,} remarks", soft),
    )


@command(scene_group, "plan")
def scene_plan(
    work: Work,
    scene: Scene,
    cap: Annotated[
        int | None, typer.Option("--cap", min=2, max=100_000, help="Of so many variants, instead of those made.")
    ] = None,
) -> Output:
    """Estimate how long the scene's traffic takes to tell tags and materials apart, to choose a cap by."""
    from kaleidoscope.review import plan_learning
    from kaleidoscope.scenes import get_scene, spec_of
    from kaleidoscope.views import PlanView

    traffic = spec_of(get_scene(work.session, scene)).traffic
    plan = plan_learning(work.session, scene, cap=cap)
    rows = [
        (
            words(kind.kind),
            kind.effects,
            kind.learnable,
            None if kind.median is None else _days(kind.median.days),
            None if kind.worst is None else _days(kind.worst.days),
            None if kind.worst is None else kind.worst.name,
        )
        for kind in plan.kinds
    ]
    effect = "" if traffic is None else f" of {traffic.minimum_effect:.0%}"
    return Output(
        PlanView.of(plan),
        f"{plan.variants:,} variants share {plan.random_exposures_per_day:,.0f} random exposures a day."
        f" To find effects{effect} on clicks (power 80 %):",
        table(("effect of a", "effects", "learnable", "half of them", "all of them", "the last"), rows),
        *headed("Never apart, so nobody can say which of them it was", [" and ".join(group) for group in plan.aliased]),
    )


def _days(days: float) -> str:
    return "under a day" if days < 1 else f"{days:,.0f} days"


# ── variants ──────────────────────────────────────────────────────────────────────────────────────────────────────────

Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="TERM", help="copy:c7, image.image_style=flat or benefit=coupon; repeat to narrow."
    ),
]
States = Annotated[list[ReviewState] | None, typer.Option("--state", help="Only in this state; repeat it.")]
Remarked = Annotated[
    bool | None, typer.Option("--remarked/--clean", help="Only those a soft check remarks on, or only the others.")
]
Ids = Annotated[list[str] | None, typer.Option("--id", help="Only this one; repeat it.")]


def _planned(work: Work, scene: str) -> Mapping[str, object]:
    from kaleidoscope.review import plan_variants

    return {"planned": plan_variants(work.session, scene)}


@command(variant_group, "make", write=True, first=_planned)
def variant_make(work: Work, scene: Scene, *, planned: Any) -> Output:
    """Bring the scene's variants in line with its materials, constraints and cap; a second time changes nothing."""
    from kaleidoscope.review import make_variants

    made = make_variants(work.session, scene, planned)
    names = ("legal", "created", "kept", "restored", "retired", "approved", "remarked")
    numbers = {name: getattr(made, name) for name in names}
    cover = made.coverage
    coverage = None if cover is None else {"pairs_covered": cover.pairs_covered, "pairs_legal": cover.pairs_legal}
    return Output(
        {**numbers, "coverage": coverage},
        f"{made.legal:,} combinations are legal.",
        f"{made.created:,} variants created, {made.kept:,} kept, {made.restored:,} restored, {made.retired:,} retired.",
        *([f"{made.approved:,} approved by the scene's rule."] if made.approved else []),
        *([f"{made.remarked:,} have remarks of design checks."] if made.remarked else []),
        *(
            [f"The cap keeps {cover.pairs_covered:,} of {cover.pairs_legal:,} pairs of materials."]
            if cover is not None
            else []
        ),
    )


@command(variant_group, "list")
def variant_list(
    work: Work,
    scene: Scene,
    where: Where = None,
    states: States = None,
    remarked: Remarked = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Output:
    """List variants of a scene."""
    from kaleidoscope.review import find_variants
    from kaleidoscope.views import VariantView, page_view

    wanted = _filter(where, states, None, remarked)
    page = page_view(find_variants(work.session, scene, wanted, cursor=cursor, limit=limit), VariantView.model_validate)
    rows = [(v.id, words(v.state), listing(v.materials), len(v.remarks) or "") for v in page.items]
    shown = table(("id", "state", "materials", "remarks"), rows, whole=("id", "state"))
    return Output(page, shown, *none_of(rows, "variants"), *more(page.next_cursor))


def _filter(
    where: Sequence[str] | None, states: Sequence[ReviewState] | None, ids: Sequence[str] | None, remarked: bool | None
) -> VariantFilter:
    from kaleidoscope.review import VariantFilter

    return VariantFilter(tuple(where or ()), tuple(states or ()), tuple(ids or ()), remarked)


@command(variant_group, "show")
def variant_show(
    work: Work, scene: Scene, variant: Annotated[str, typer.Argument(metavar="ID", help="Or how it begins.")]
) -> Output:
    """Show a variant: what it holds, how it is tagged, what the design checks remark."""
    from kaleidoscope.content import parse_content
    from kaleidoscope.interventions import describe_variants
    from kaleidoscope.review import get_variant
    from kaleidoscope.scenes import materials_by_id
    from kaleidoscope.views import VariantView

    row = get_variant(work.session, scene, variant)
    view = VariantView.model_validate(row)
    [described] = describe_variants(work.session, [row])
    tags = [f"{dimension}={value}" for dimension, values in described.tags.items() for value in values]
    materials = materials_by_id(work.session, set(view.materials.values()))
    held = {slot: f"{id}: {gist(parse_content(materials[id].content))}" for slot, id in view.materials.items()}
    reviewed = f"{view.reviewer}, {when(view.reviewed_at)}" if view.reviewer else None
    about: dict[str, object] = {"id": view.id, "state": words(view.state), "reason": view.reason, **held}
    about["tags"] = ", ".join(tags)
    about |= {"remarks": "\n".join(view.remarks), "author": view.author, "reviewer": reviewed, "version": view.version}
    return Output({**view.model_dump(mode="json"), "tags": tags}, fields(about))


def _variant_move(move: str) -> None:
    done, explained = MOVES_HELP[move]

    def job(
        work: Work,
        scene: Scene,
        where: Where = None,
        states: States = None,
        remarked: Remarked = None,
        ids: Ids = None,
        every: Annotated[bool, typer.Option("--all", help="Every variant of the scene.")] = False,
        reason: Reason = None,
    ) -> Output:
        from kaleidoscope.review import move_variants

        wanted = _filter(where, states, ids, remarked)
        filtered = bool(where or states or ids) or remarked is not None
        if filtered == every:
            raise InputError(f"say which variants to {move}: --where, --state, --remarked, --clean, --id; or --all.")
        return moved_output(done, move_variants(work.session, scene, move, wanted, reason=reason))

    job.__doc__ = explained
    command(variant_group, move, write=True)(job)


for _move in MOVES_HELP:
    _variant_move(_move)
