"""What the faces show of stored rows: one pydantic model per kind, for REST, for `--json` and for the console.

A view is plain data: it outlives the session it was read in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Generic, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from kaleidoscope import database, tables
from kaleidoscope.content import Content, Placeholder, Tag, parse_content
from kaleidoscope.scenes import SceneSpec
from kaleidoscope.vocabulary import InterventionKind, MaterialKind, ReleaseState, ReviewState, Role

if TYPE_CHECKING:
    from kaleidoscope.coverage import Traffic
    from kaleidoscope.release import Live
    from kaleidoscope.review import Moved
    from kaleidoscope.taxonomy import AffectedMaterial, AffectedRule

Row = TypeVar("Row")
Shown = TypeVar("Shown", bound=BaseModel)


class View(BaseModel):
    """Base of all views."""

    model_config = ConfigDict(frozen=True, from_attributes=True)


class PageView(View, Generic[Shown]):
    """Some items, and the cursor of the next page; null: there is none."""

    items: list[Shown]
    next_cursor: str | None


def page_view(page: database.Page[Row], view: Callable[[Row], Shown]) -> PageView[Shown]:
    """A page of rows as a page of views."""
    return PageView(items=[view(row) for row in page.items], next_cursor=page.next_cursor)


class BusinessView(View):
    """A tenant."""

    id: str
    name: str
    two_person_publish: bool
    placeholders: list[Placeholder]
    version: int


class TokenView(View):
    """An API token, without its secret."""

    id: str
    business: str | None
    user: str
    roles: list[Role]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    @classmethod
    def of(cls, row: tables.ApiToken) -> TokenView:
        """The view of a row."""
        return cls.model_validate({**_columns(row), "business": row.business_id})


class AuditView(View):
    """One change of one row."""

    seq: int
    at: datetime
    actor: str
    action: str
    entity: str
    key: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class TaxonomyVersionView(View):
    """A version of the tag vocabulary, without the vocabulary."""

    number: int
    author: str
    note: str
    created_at: datetime


class AffectedMaterialView(View):
    """A material whose tags need somebody's eye after changes of the vocabulary."""

    material: str
    unknown: Annotated[dict[str, list[str]], Field(description="A tag it had: what it may be now, nobody knows which")]
    overfull: Annotated[list[str], Field(description="Dimensions of one value that it now has several of")]

    @classmethod
    def of(cls, affected: AffectedMaterial) -> AffectedMaterialView:
        """The view of what would become of a material."""
        unknown = {f"{d}={v}": sorted("=".join(tag) for tag in to.of) for (d, v), to in affected.unknown.items()}
        return cls(material=affected.material, unknown=unknown, overfull=list(affected.overfull))


class AffectedRuleView(View):
    """A constraint or an intervention that names a tag which is changed: it names the old one still."""

    scene: str
    constraint: str | None
    intervention: str | None
    becomes: dict[str, str]
    message: str

    @classmethod
    def of(cls, affected: AffectedRule) -> AffectedRuleView:
        """The view of a rule."""
        names = ("scene", "constraint", "intervention", "becomes")
        return cls.model_validate({name: getattr(affected, name) for name in names} | {"message": str(affected)})


class EvolvedView(TaxonomyVersionView):
    """A new version of the vocabulary, what became of tags, and what somebody has to look at because of it."""

    mapping: dict[str, list[str]]
    affected: list[AffectedMaterialView]
    rules: list[AffectedRuleView]

    @classmethod
    def of(
        cls, row: tables.TaxonomyVersion, materials: Iterable[AffectedMaterial], rules: Iterable[AffectedRule]
    ) -> EvolvedView:
        """The view of a version and of what its changes affected, as that was before them."""
        affected = [AffectedMaterialView.of(a) for a in materials]
        return cls.model_validate(
            {**_columns(row), "affected": affected, "rules": [AffectedRuleView.of(r) for r in rules]}
        )


class MaterialView(View):
    """A material and where it stands."""

    id: str
    kind: MaterialKind
    content: Content
    content_hash: str
    tags: list[Tag]
    taxonomy: int
    state: ReviewState
    reason: str | None
    author: str
    reviewer: str | None
    reviewed_at: datetime | None
    version: int

    @classmethod
    def of(cls, row: tables.Material) -> MaterialView:
        """The view of a row."""
        return cls.model_validate({**_columns(row), "content": parse_content(row.content)})


class SceneView(View):
    """A scene and its version."""

    id: str
    spec: SceneSpec
    author: str
    version: int

    @classmethod
    def of(cls, row: tables.Scene) -> SceneView:
        """The view of a row."""
        return cls.model_validate(_columns(row))


class VariantView(View):
    """A combination of materials and where it stands."""

    id: str
    materials: dict[str, str]
    remarks: list[str]
    state: ReviewState
    reason: str | None
    author: str
    reviewer: str | None
    reviewed_at: datetime | None
    version: int


class MovedView(View):
    """How many took a step of the review, why the others did not, and what to know about those that did."""

    moved: int
    skipped: dict[str, int]
    notes: list[str]

    @classmethod
    def of(cls, moved: Moved) -> MovedView:
        """The view of what a step did."""
        return cls(moved=moved.moved, skipped=dict(moved.skipped), notes=list(moved.notes))


class CoverageView(View):
    """How well a capped scene's variants cover the pairs of materials."""

    pairs_covered: int
    pairs_legal: int


class MadeView(View):
    """What making the variants did."""

    legal: int
    created: int
    kept: int
    restored: int
    retired: int
    approved: int
    remarked: int
    coverage: CoverageView | None


class NeededView(View):
    """What it takes to learn one effect."""

    name: str
    exposures: float
    days: float


class KindView(View):
    """What a kind of effect takes; median and worst are of the learnable ones, null where there is none."""

    kind: str
    effects: int
    learnable: int
    never: int
    alpha: float
    median: NeededView | None
    worst: NeededView | None


class EffectView(View):
    """What it takes to learn one effect; null: it can never be learned, for the reason given."""

    kind: str
    first: str
    second: str | None
    share: float
    exposures: float | None
    days: float | None
    reason: str | None


class PlanView(View):
    """What a scene's traffic can learn about its variants: by kind of effect, and effect by effect."""

    variants: int
    random_exposures_per_day: float
    kinds: list[KindView]
    effects: list[EffectView]
    aliased: list[list[str]]

    @classmethod
    def of(cls, plan: Traffic) -> PlanView:
        """The view of an estimate."""
        return cls(
            variants=plan.variants,
            random_exposures_per_day=plan.random_exposures_per_day,
            kinds=[KindView.model_validate(kind) for kind in plan.kinds],
            effects=[EffectView.model_validate(row) for row in plan.effects.to_pylist()],
            aliased=[list(group) for group in plan.aliased],
        )


class InterventionView(View):
    """A business rule."""

    id: str
    kind: InterventionKind
    target: dict[str, Any]
    segment: dict[str, str]
    starts_at: datetime | None
    ends_at: datetime | None
    priority: int
    note: str
    ended: bool
    author: str
    version: int


class ConflictView(View):
    """Something to know before a rule is saved."""

    code: str
    message: str
    rules: list[str]
    winner: str | None
    variants: int
    segment: dict[str, str]


class ReleaseView(View):
    """A release and where it stands, without its content."""

    number: int
    state: ReleaseState
    content_hash: str
    author: str
    note: str
    created_at: datetime

    @classmethod
    def of(cls, row: tables.Release, state: ReleaseState) -> ReleaseView:
        """The view of a row and its state."""
        names = [name for name in cls.model_fields if name != "state"]  # not the content, which may not be loaded
        return cls.model_validate({name: getattr(row, name) for name in names} | {"state": state})


class LiveView(View):
    """What is live: `candidate` serves `share` of the traffic and `stable` serves `stable_share`, which is the rest."""

    seq: int
    at: datetime
    actor: str
    action: str
    release: int
    stable: int | None
    candidate: int | None
    share: Annotated[float, Field(description="Of the traffic that `candidate` serves; 0 where there is none")]
    stable_share: Annotated[float, Field(description="Of the traffic that `stable` serves; 1 once it is fully live")]
    paused: bool
    stage: int | None

    @classmethod
    def of(cls, row: Live | tables.LedgerEntry) -> Self:
        """The view of a ledger entry, or of what it left live."""
        names = cls.model_fields.keys() - {"stable_share"}
        rest = 0.0 if row.stable is None else round(1 - row.share, 12)  # without noise such as 0.09999999999999998
        return cls.model_validate({name: getattr(row, name) for name in names} | {"stable_share": rest})


class LedgerView(LiveView):
    """One transition, and what was live after it."""

    health: dict[str, Any] | None
    reason: str


def _columns(row: tables.Base) -> dict[str, Any]:
    return {column.key: getattr(row, column.key) for column in type(row).__mapper__.column_attrs}
