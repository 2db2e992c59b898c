"""Scenes: a placement with a fixed product, its slots, constraints and checks; and a scene kept as code (YAML).

What a scene's materials combine to is `space_of`; which of the combinations may be shown is review.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from sqlalchemy import select

from kaleidoscope.businesses import get_business, placeholders_of, reopen_filled
from kaleidoscope.combiner import Constraint, Forbidden, MaterialTerm, Option, Slot, Space, is_legal, parse
from kaleidoscope.content import explain, parse_content
from kaleidoscope.database import (
    PAGE,
    Page,
    Session,
    check_id,
    check_version,
    find,
    paginate,
    refuse_existing,
)
from kaleidoscope.design_checks import CombinationFailure, combination_failures
from kaleidoscope.errors import ForbiddenError, InputError, JobError
from kaleidoscope.tables import Material, Scene
from kaleidoscope.taxonomy import current_taxonomy, mapping_between, translate
from kaleidoscope.vocabulary import MaterialKind, ReviewState, Role, Strictness
from kaleidoscope.yaml_text import load_yaml

Id = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Line = Annotated[str, StringConstraints(strip_whitespace=True, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
MOST = 10  # problems, and materials in one, that a message names
USABLE = (ReviewState.DRAFT, ReviewState.IN_REVIEW, ReviewState.APPROVED)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _storable(value: object) -> object:
    """The value; raises ValueError for a number that no JSON document holds."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number that can be shown; give a finite one, or text")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("is a whole number beyond 64 bits; give a smaller one, or text")
    return value


ProductValue = Annotated[Line | int | float, BeforeValidator(_storable)]


class SlotSpec(_Model):
    """What varies, and the materials it may be."""

    name: Id
    kind: MaterialKind
    materials: Annotated[tuple[Id, ...], Field(max_length=10_000)] = ()


class Checks(_Model):
    """What each design check does to a combination that fails it."""

    text_fits: Strictness = Strictness.SOFT
    image_ratio: Strictness = Strictness.SOFT
    contrast: Strictness = Strictness.SOFT


class TrafficSpec(_Model):
    """What traffic the scene has, for planning how many variants it can learn about."""

    exposures_per_day: Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
    click_rate: Annotated[float, Field(gt=0, lt=1)]
    random_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    minimum_effect: Annotated[float, Field(gt=0, le=10)] = 0.1  # relative


Hours = Annotated[float, Field(gt=0, le=400 * 24, allow_inf_nan=False)]


class AttributionSpec(_Model):
    """How long after a decision an event still counts."""

    exposure_hours: Hours = 24.0
    click_hours: Hours = 24.0  # and dwell
    conversion_hours: Hours = 168.0


class SceneSpec(_Model):
    """A scene as people write it."""

    name: Annotated[Line, Field(min_length=1)]
    description: Annotated[str, Field(max_length=2_000)] = ""
    product: dict[Id, ProductValue] = Field(default_factory=dict, max_length=100)
    slots: Annotated[tuple[SlotSpec, ...], Field(min_length=1, max_length=20)]
    constraints: Annotated[tuple[Annotated[str, Field(max_length=2_000)], ...], Field(max_length=500)] = ()
    checks: Checks = Checks()
    cap: Annotated[int, Field(ge=2, le=100_000)] | None = None
    baseline: dict[Id, Id] | None = None  # the combination that control shows
    traffic: TrafficSpec | None = None
    context: Annotated[tuple[Id, ...], Field(max_length=20)] = ()  # attributes of a request that are not the user's
    attribution: AttributionSpec = AttributionSpec()
    fatigue_hours: Hours | None = None  # back to when what a user saw is a feature of theirs; None: it is none
    approve_automatically: bool = False  # variants of approved materials that no soft check remarks on


def parse_scene(raw: object, where: str = "scene") -> SceneSpec:
    """The spec in a mapping; raises InputError that names every wrong field as `where`.field and what it takes."""
    try:
        return SceneSpec.model_validate(raw)
    except ValidationError as error:
        raise InputError(explain(where, error)) from None


# ── services ────────────────────────────────────────────────────────────────────────────────────────────────────────


def create_scene(session: Session, scene_id: str, spec: SceneSpec) -> Scene:
    """A new scene of the session's business.

    Raises InputError where the spec contradicts itself or the library, ForbiddenError as `change_scene` does.
    """
    session.caller.require(Role.EDITOR)
    _may_rule(session, None, spec)
    get_business(session)
    check_id("scene", scene_id)
    refuse_existing(session, Scene, scene_id)
    _check(session, spec)
    scene = Scene(
        business_id=session.business, id=scene_id, name=spec.name, spec=_document(spec), author=session.caller.user
    )
    session.add(scene)
    session.flush()
    return scene


def change_scene(session: Session, scene_id: str, spec: SceneSpec, *, version: int | None) -> Scene:
    """Replace a scene's spec; variants whose copies show a product value that is changed fall back to draft.

    Raises ConflictError with both versions where `version` is not the current one, ForbiddenError where an editor who
    is no reviewer would let the rule approve what it does not approve now.
    """
    session.caller.require(Role.EDITOR)
    scene = find(session, Scene, scene_id, lock=True)
    _may_rule(session, scene.spec, spec)
    check_version(scene, version, {"spec": _document(spec)}, {"spec": scene.spec})
    _check(session, spec)
    document = _document(spec)
    if scene.spec != document:
        before, after = scene.spec["product"], document["product"]
        scene.name, scene.spec, scene.author = spec.name, document, session.caller.user
        session.flush()
        changed = [p.name for p in placeholders_of(get_business(session)) if p.fills(before) != p.fills(after)]
        reopen_filled(session, {name: f"product value {name} changed" for name in changed}, scene_id=scene_id)
    return scene


def _may_rule(session: Session, before: Mapping[str, Any] | None, spec: SceneSpec) -> None:
    """Raise ForbiddenError where the spec makes the rule approve, and it takes a reviewer to say so."""
    if not spec.approve_automatically or session.caller.may(Role.REVIEWER):
        return
    user = session.caller.user
    if before is None or not before.get("approve_automatically"):
        raise ForbiddenError(
            f"approve_automatically: {user} may not switch this on, as it approves: it takes the role reviewer as well"
            " as editor. Leave it out, or have a reviewer do it."
        )
    if before.get("checks") != spec.checks.model_dump(mode="json"):
        raise ForbiddenError(
            f"checks: {user} may not change them while approve_automatically is on, as the rule goes by what they"
            " remark: it takes the role reviewer as well as editor. Switch the rule off, or have a reviewer do it."
        )


def get_scene(session: Session, scene_id: str) -> Scene:
    """The scene; raises NotFoundError."""
    return find(session, Scene, scene_id)


def list_scenes(session: Session, *, cursor: str | None = None, limit: int = PAGE) -> Page[Scene]:
    """The scenes of the business, by id."""
    return paginate(session, select(Scene), Scene.id, cursor=cursor, limit=limit)


def attributions(session: Session) -> dict[str, AttributionSpec]:
    """How long events count, by scene of the business."""
    return {scene.id: spec_of(scene).attribution for scene in session.scalars(select(Scene))}


def spec_of(scene: Scene) -> SceneSpec:
    """A stored scene's spec; raises JobError where it is none, as an earlier version may have left it."""
    try:
        return SceneSpec.model_validate(scene.spec)
    except ValidationError as error:
        raise JobError(
            f"{explain(f'Scene {scene.id!r}', error)} It was stored like that. Replace its spec, such as with"
            " `kaleidoscope scene apply`."
        ) from None


def _document(spec: SceneSpec) -> dict[str, Any]:
    return spec.model_dump(mode="json")


def _check(session: Session, spec: SceneSpec) -> None:
    """Raise InputError with everything in the spec that contradicts itself or the material library."""
    problems = []
    names = [slot.name for slot in spec.slots]
    problems += [f"slots: {n!r} is there twice. Name every slot differently." for n in _twice(names)]
    materials = materials_by_id(session, {m for slot in spec.slots for m in slot.materials})
    for slot in spec.slots:
        where, distinct = f"slot {slot.name!r}", list(dict.fromkeys(slot.materials))
        if twice := _twice(slot.materials):
            problems.append(f"{where}: {_materials(twice)} is there twice. Name it once.")
        if missing := [m for m in distinct if m not in materials]:
            problems.append(f"{where}: there is no {_materials(missing)}. Add {_it(missing)} first.")
        for kind in MaterialKind:
            alien = [m for m in distinct if kind != slot.kind and m in materials and materials[m].kind == kind]
            if alien:
                verb = "is" if len(alien) == 1 else "are"
                problems.append(f"{where}: {_materials(alien)} {verb} {kind}, the slot takes {slot.kind}.")
    if spec.baseline is not None:
        if set(spec.baseline) != set(names):
            problems.append(f"baseline: give one material for each slot: {', '.join(names)}.")
        for slot in spec.slots:
            chosen = spec.baseline.get(slot.name)
            if chosen is not None and chosen not in slot.materials:
                problems.append(f"baseline: {chosen!r} is not a material of slot {slot.name!r}.")
    if not problems:
        problems += _constraint_problems(session, spec, materials)
    if problems:
        raise InputError(_joined(problems))


def _joined(problems: Sequence[str]) -> str:
    """A problem a line, and how many more there are."""
    more = [f"… and {len(problems) - MOST:,} more problems"] if len(problems) > MOST else []
    return "\n".join([*problems[:MOST], *more])


def _materials(ids: Sequence[str]) -> str:
    """`material 'a'`, or `material 'a', 'b' … and 12 more` where there are too many to name."""
    more = f" and {len(ids) - MOST:,} more" if len(ids) > MOST else ""
    return f"material {', '.join(map(repr, ids[:MOST]))}{more}"


def _it(ids: Sequence[str]) -> str:
    return "it" if len(ids) == 1 else "them"


def _constraint_problems(session: Session, spec: SceneSpec, materials: Mapping[str, Material]) -> list[str]:
    slots, problems = _slots(session, spec, materials), []
    try:
        Space(slots)
    except InputError as error:
        problems.append(f"slots: {error}.")
    vocabulary = {d.id: [v.id for v in d.values] for d in current_taxonomy(session)[1].dimensions}
    for text in spec.constraints:
        try:
            parse(text, slots, vocabulary)
        except InputError as error:
            problems.append(f"constraints: {error}")
    problems += [f"constraints: {text!r} is there twice. Give it once." for text in _twice(spec.constraints)]
    return problems


def _twice(values: Iterable[str]) -> list[str]:
    values = list(values)
    return sorted({v for v in values if values.count(v) > 1}) if len(set(values)) < len(values) else []


# ── what the materials combine to ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SceneSpace:
    """A scene's materials under its constraints and hard checks, and what its soft checks remark."""

    spec: SceneSpec
    space: Space
    ruled_out: tuple[CombinationFailure, ...]  # by hard checks
    remarks: tuple[CombinationFailure, ...]  # of soft checks

    def remarks_on(self, materials: Mapping[str, str]) -> list[str]:
        """What the soft checks remark on a combination, as sentences."""
        found: list[int] = []
        for slots, remarks in self._by_slots.items():
            found += remarks.get(tuple(materials.get(slot) for slot in slots), ())
        order = {slot: at for at, slot in enumerate(materials)}
        return [self.remarks[n].message for n in sorted(found, key=lambda n: (order[self.remarks[n].options[0][0]], n))]

    @cached_property
    def _by_slots(self) -> dict[tuple[str, ...], dict[tuple[str | None, ...], list[int]]]:
        """Slots → a material of each → the remarks on these together."""
        found: dict[tuple[str, ...], dict[tuple[str | None, ...], list[int]]] = {}
        for n, failure in enumerate(self.remarks):
            slots, ids = zip(*failure.options, strict=True)
            found.setdefault(slots, {}).setdefault(ids, []).append(n)
        return found


def space_basis(session: Session, scene: Scene) -> list[Any]:
    """Everything that `space_of` depends on, as JSON: versions, by which one sees that it is still the same."""
    materials = materials_by_id(session, {m for slot in spec_of(scene).slots for m in slot.materials})
    versions = sorted((m.id, m.version) for m in materials.values())
    return [scene.version, get_business(session).version, current_taxonomy(session)[0], versions]


def space_of(session: Session, scene: Scene, *, remarks: bool = True) -> SceneSpace:
    """What the scene's materials combine to, without those that were rejected or retired; `remarks` takes longer.

    Tags are read under the business's current taxonomy. Raises InputError where a constraint names a tag that it has no
    longer, TooComplexError where the design checks cannot be worked out in reasonable time.
    """
    spec = spec_of(scene)
    every = materials_by_id(session, {m for slot in spec.slots for m in slot.materials})
    stale = _constraint_problems(session, spec, every)
    if stale:
        # Never ignored: a rule that names a tag of an older vocabulary would forbid nothing.
        raise InputError(_joined([f"scene {scene.id!r}: {problem}" for problem in stale]))
    materials = {id: m for id, m in every.items() if m.state in USABLE}
    contents = {id: parse_content(m.content) for id, m in materials.items()}
    slots = _slots(session, spec, materials)
    by_slot = {slot.name: [(o.id, contents[o.id]) for o in slot.options] for slot in slots}
    strictness = spec.checks.model_dump()
    wanted = (Strictness.HARD, Strictness.SOFT) if remarks else (Strictness.HARD,)
    checks = [check for check, how in strictness.items() if how in wanted]
    failures = combination_failures(by_slot, placeholders_of(get_business(session)), checks=checks) if checks else []
    hard = [f for f in failures if strictness[f.check] == Strictness.HARD]
    soft = tuple(f for f in failures if strictness[f.check] == Strictness.SOFT)
    constraints = tuple(parse(text) for text in spec.constraints)
    constraints += tuple(
        Constraint("forbid", tuple(MaterialTerm(slot, (id,)) for slot, id in f.options))
        for f in hard
        if len(f.options) != 2
    )
    return SceneSpace(spec, Space(slots, constraints, _forbidden(slots, hard)), tuple(hard), soft)


def _forbidden(slots: Sequence[Slot], failures: Sequence[CombinationFailure]) -> tuple[Forbidden, ...]:
    """The pairs that hard checks rule out, a table per check and pair of slots."""
    at = {slot.name: {option.id: i for i, option in enumerate(slot.options)} for slot in slots}
    tables: dict[tuple[str, str, str], NDArray[np.bool_]] = {}
    for failure in failures:
        if len(failure.options) == 2:
            (first, a), (second, b) = failure.options
            shape = len(at[first]), len(at[second])
            table = tables.setdefault((failure.check, first, second), np.zeros(shape, np.bool_))
            table[at[first][a], at[second][b]] = True
    return tuple(Forbidden(a, b, table, f"hard check {check}") for (check, a, b), table in tables.items())


def materials_by_id(session: Session, ids: set[str]) -> dict[str, Material]:
    """Those of these materials that there are."""
    found: dict[str, Material] = {}
    wanted = sorted(ids)
    for start in range(0, len(wanted), 500):
        part = select(Material).where(Material.id.in_(wanted[start : start + 500]))
        found |= {m.id: m for m in session.scalars(part)}
    return found


def _slots(session: Session, spec: SceneSpec, materials: Mapping[str, Material]) -> tuple[Slot, ...]:
    options = options_of(session, materials.values())
    return tuple(Slot(slot.name, tuple(options[id] for id in slot.materials if id in options)) for slot in spec.slots)


def options_of(session: Session, materials: Iterable[Material]) -> dict[str, Option]:
    """Materials as the combiner sees them, by id: with their tags under the current taxonomy.

    A tag that was split since is unknown, and left out.
    """
    materials = list(materials)
    if not materials:
        return {}
    number, _ = current_taxonomy(session)
    mappings = {old: mapping_between(session, old, number) for old in {m.taxonomy for m in materials}}
    options = {}
    for material in materials:
        tags: dict[str, set[str]] = {}
        old = [(t["dimension"], t["value"]) for t in material.tags]
        for tag in translate(old, [mappings[material.taxonomy]]):
            if isinstance(tag, tuple):
                tags.setdefault(tag[0], set()).add(tag[1])
        options[material.id] = Option(material.id, {d: tuple(sorted(values)) for d, values in tags.items()})
    return options


def possible(space: Space, combinations: Sequence[Mapping[str, str]]) -> list[bool]:
    """Which combinations (slot → material) the space allows; not those with other slots or materials."""
    at = {slot.name: positions for slot, positions in zip(space.slots, space.positions, strict=True)}
    found = [set(c) == set(at) and all(m in at[slot] for slot, m in c.items()) for c in combinations]
    rows = [[at[slot][c[slot]] for slot in at] for c, fits in zip(combinations, found, strict=True) if fits]
    legal = iter(is_legal(space, np.array(rows, np.int64).reshape(-1, len(at))).tolist())
    return [fits and next(legal) for fits in found]


# ── as code ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def export_scene(scene: Scene) -> str:
    """The scene as YAML that `read_scene` and `apply_scene` take: only what is not a default, in the spec's order."""
    document = spec_of(scene).model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump({"scene": scene.id, **document}, sort_keys=False, allow_unicode=True, width=100)


def read_scene(path: Path) -> tuple[str, SceneSpec]:
    """The id and the spec in a YAML file; raises InputError naming the file and every wrong field."""
    raw = load_yaml(path, docs="docs/guide-first-scene.md")
    if not isinstance(raw, dict) or not isinstance(raw.get("scene"), str):
        raise InputError(f"{path}: a scene begins with `scene: ID`. `kaleidoscope scene export` shows how one looks.")
    scene_id = check_id("scene", raw.pop("scene"))
    return scene_id, parse_scene(raw, str(path))


@dataclass(frozen=True)
class SceneDiff:
    """What applying a file changes: one line per change, `+`, `-` or `~` first; none: nothing."""

    scene_id: str
    creates: bool
    lines: tuple[str, ...]


def diff_scene(session: Session, scene_id: str, spec: SceneSpec) -> SceneDiff:
    """What `apply_scene` would change."""
    scene = session.get(Scene, (session.business, scene_id))
    if scene is None:
        return SceneDiff(scene_id, True, tuple(_changes({}, _beyond_defaults(spec))))
    # A field that is newer than the stored scene stands at its default.
    before = {**_document(SceneSpec(name=scene.name, slots=spec.slots[:1])), **scene.spec}
    return SceneDiff(scene_id, False, tuple(_changes(before, _document(spec))))


def apply_scene(session: Session, scene_id: str, spec: SceneSpec, *, version: int | None = None) -> SceneDiff:
    """Make the scene what the spec says, and say what changed; applying it again changes nothing."""
    diff = diff_scene(session, scene_id, spec)
    if diff.creates:
        create_scene(session, scene_id, spec)
    elif diff.lines or version is not None:
        change_scene(session, scene_id, spec, version=version)
    return diff


def _beyond_defaults(spec: SceneSpec) -> dict[str, Any]:
    """The spec's document without what stands at its default; slots are whole."""
    document, told = _document(spec), spec.model_dump(mode="json", exclude_defaults=True)
    return {key: document[key] if key == "slots" else told[key] for key in document if key in told}


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, new in after.items():
        old = before.get(key)
        if old == new:
            continue
        if key == "slots":
            lines += _slot_changes({s["name"]: s for s in old or ()}, {s["name"]: s for s in new})
        elif isinstance(new, list):
            lines += [f"- {key}: {item}" for item in old or () if item not in new]
            lines += [f"+ {key}: {item}" for item in new if item not in (old or ())]
            if old and sorted(map(str, old)) == sorted(map(str, new)):
                lines.append(f"~ {key}: another order")
        elif isinstance(new, dict):
            was = old or {}
            lines += [f"- {key}.{k}: {was[k]}" for k in was if k not in new]
            lines += [f"+ {key}.{k}: {new[k]}" for k in new if k not in was]
            lines += [f"~ {key}.{k}: {was[k]!r} → {new[k]!r}" for k in new if k in was and was[k] != new[k]]
        elif old is None:
            lines.append(f"+ {key}: {new}")
        else:
            lines.append(f"~ {key}: {old!r} → {new!r}")
    return lines


def _slot_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    lines = [f"- slot {name}" for name in before if name not in after]
    for name, slot in after.items():
        old = before.get(name)
        if old is None:
            lines.append(f"+ slot {name} ({slot['kind']}): {', '.join(slot['materials']) or 'no materials'}")
            continue
        if old["kind"] != slot["kind"]:
            lines.append(f"~ slot {name}: {old['kind']} → {slot['kind']}")
        lines += [f"- slot {name}: {m}" for m in old["materials"] if m not in slot["materials"]]
        lines += [f"+ slot {name}: {m}" for m in slot["materials"] if m not in old["materials"]]
        if old["materials"] != slot["materials"] and sorted(old["materials"]) == sorted(slot["materials"]):
            lines.append(f"~ slot {name}: another order")
    if list(before) != list(after) and sorted(before) == sorted(after):
        lines.append("~ slots: another order")
    return lines
