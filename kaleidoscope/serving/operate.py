"""The operator's REST API, `/api/v1`: thin endpoints over the services, each one transaction.

`{move}` is a step of the review (review.MOVES); what a body may hold is in the models beside the endpoint.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Request, Response, UploadFile
from fastapi import Path as InPath
from fastapi.responses import FileResponse
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from kaleidoscope import (
    businesses,
    combiner,
    guard,
    interventions,
    materials,
    registry,
    release,
    review,
    scenes,
    taxonomy,
    tokens,
)
from kaleidoscope.content import Content, Image, Placeholder, Tag
from kaleidoscope.database import MAX_PAGE, PAGE, Session, check_moment
from kaleidoscope.errors import InputError, NotFoundError, UnavailableError
from kaleidoscope.images import MAX_BYTES, image_path, store_image
from kaleidoscope.release import ReleaseContent
from kaleidoscope.serving.http import ERRORS, READ, Call, Caught, Route
from kaleidoscope.views import (
    AuditView,
    BusinessView,
    ConflictView,
    EvolvedView,
    InterventionView,
    LedgerView,
    LiveView,
    MadeView,
    MaterialView,
    MovedView,
    PageView,
    PlanView,
    ReleaseView,
    SceneView,
    TaxonomyVersionView,
    TokenView,
    VariantView,
    page_view,
)
from kaleidoscope.vocabulary import MaterialKind, ReleaseState, ReviewState, Role

router = APIRouter(prefix="/api/v1", route_class=Route, responses=ERRORS)
IN = "/businesses/{business}"
SCENE = f"{IN}/scenes/{{scene}}"

MAX_INT = 2**31 - 1
MAX_REMARKS = 1_000  # that are answered
SEATS = 2  # for questions that take seconds; a third would only make both slower
WAITING = 4  # of all businesses together
WAIT_S = 1.0
Id = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
Cursor = Annotated[str | None, Query(max_length=400, description="`next_cursor` of the page before")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Items a page")]
Number = Annotated[int, InPath(ge=1, le=MAX_INT)]
Version = Annotated[int, Field(ge=1, le=MAX_INT, description="The version that the change was made to")]
Line = Annotated[str, Field(max_length=200)]
Text = Annotated[str, Field(max_length=2_000)]


class Request_(BaseModel):
    """Base of request bodies."""

    model_config = ConfigDict(extra="forbid")


# ── businesses, tokens, audit ───────────────────────────────────────────────────────────────────────────────────────


class NewBusiness(Request_):
    """A tenant to found."""

    id: Id
    name: Line
    two_person_publish: bool = False


class BusinessChange(Request_):
    """What to change of a business; what is left out stays."""

    version: Version
    name: Line | None = None
    two_person_publish: bool | None = None
    placeholders: Annotated[list[Placeholder], Field(max_length=200)] | None = None


@router.get("/businesses", tags=["businesses"], responses=READ)
def list_businesses(call: Caught, cursor: Cursor = None, limit: Limit = PAGE) -> PageView[BusinessView]:
    """The businesses that the token may use."""
    with call.read() as session:
        return page_view(businesses.list_businesses(session, cursor=cursor, limit=limit), BusinessView.model_validate)


@router.post("/businesses", tags=["businesses"], status_code=201, response_model=BusinessView)
def create_business(call: Caught, body: NewBusiness) -> Response:
    """Found a business, with the built-in taxonomy; takes a token of the installation."""
    call.caller.require_installation()  # else another business is not there, and the answer a 404
    inside = call.inside(body.id)
    return inside.create(
        lambda session: BusinessView.model_validate(
            businesses.create_business(session, body.name, two_person_publish=body.two_person_publish)
        )
    )


@router.get(IN, tags=["businesses"], responses=READ)
def get_business(call: Caught) -> BusinessView:
    """The business."""
    with call.read() as session:
        return BusinessView.model_validate(businesses.get_business(session))


@router.patch(IN, tags=["businesses"])
def change_business(call: Caught, body: BusinessChange) -> BusinessView:
    """Change the business."""
    with call.write() as session:
        changed = businesses.change_business(
            session,
            version=body.version,
            name=body.name,
            two_person_publish=body.two_person_publish,
            placeholders=body.placeholders,
        )
        return BusinessView.model_validate(changed)


@router.get(f"{IN}/audit", tags=["businesses"], responses=READ)
def audit(
    call: Caught,
    entity: Annotated[str | None, Query(max_length=32)] = None,
    key: Annotated[str | None, Query(max_length=400)] = None,
    cursor: Cursor = None,
    limit: Limit = PAGE,
) -> PageView[AuditView]:
    """Who changed what, newest first. Changes of API tokens are for admins alone."""
    with call.read() as session:
        found = businesses.audit_trail(session, entity=entity, key=key, cursor=cursor, limit=limit)
        return page_view(found, AuditView.model_validate)


class NewToken(Request_):
    """A token to make."""

    user: Line
    roles: Annotated[list[Role], Field(min_length=1, max_length=10)]
    days: Annotated[float, Field(gt=0, le=tokens.MAX_TOKEN_DAYS)] = tokens.TOKEN_DAYS


class NewTokenView(BaseModel):
    """A new token: its secret is shown this once."""

    token: TokenView
    secret: str


@router.get(f"{IN}/tokens", tags=["tokens"], responses=READ)
def list_tokens(call: Caught) -> list[TokenView]:
    """The API tokens of the business, without their secrets."""
    with call.read() as session:
        return [TokenView.of(token) for token in tokens.list_tokens(session)]


@router.post(f"{IN}/tokens", tags=["tokens"], status_code=201)
def create_token(call: Caught, body: NewToken) -> NewTokenView:
    """Make a token. It takes no Idempotency-Key: the secret is kept nowhere, so it could not be answered again."""
    with call.write() as session:
        token, secret = tokens.create_token(session, body.user, frozenset(body.roles), days=body.days)
        return NewTokenView(token=TokenView.of(token), secret=secret)


@router.delete(f"{IN}/tokens/{{token}}", tags=["tokens"])
def revoke_token(call: Caught, token: str) -> TokenView:
    """End a token now."""
    with call.write() as session:
        return TokenView.of(tokens.revoke_token(session, token))


# ── taxonomy ────────────────────────────────────────────────────────────────────────────────────────────────────────


class TaxonomyView(BaseModel):
    """A version of the vocabulary."""

    number: int
    taxonomy: taxonomy.Taxonomy


class Evolution(Request_):
    """Changes to the vocabulary, one after the other."""

    changes: Annotated[list[taxonomy.Change], Field(min_length=1, max_length=200)]
    note: Text = ""
    expected: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None


@router.get(f"{IN}/taxonomy", tags=["taxonomy"], responses=READ)
def get_taxonomy(call: Caught, number: Annotated[int | None, Query(ge=1, le=MAX_INT)] = None) -> TaxonomyView:
    """The vocabulary: the current version, or an older one."""
    with call.read() as session:
        if number is None:
            number, found = taxonomy.current_taxonomy(session)
        else:
            found = taxonomy.taxonomy_at(session, number)
        return TaxonomyView(number=number, taxonomy=found)


@router.get(f"{IN}/taxonomy/versions", tags=["taxonomy"], responses=READ)
def list_taxonomy_versions(call: Caught) -> list[TaxonomyVersionView]:
    """All versions, newest first."""
    with call.read() as session:
        return [TaxonomyVersionView.model_validate(v) for v in taxonomy.list_versions(session)]


@router.get(f"{IN}/taxonomy/mapping", tags=["taxonomy"], responses=READ)
def get_mapping(
    call: Caught, old: Annotated[int, Query(ge=1, le=MAX_INT)], new: Annotated[int, Query(ge=1, le=MAX_INT)]
) -> dict[str, list[str]]:
    """What became of the tags of an older version; what is not there stayed as it is."""
    with call.read() as session:
        return {key: list(to) for key, to in taxonomy.mapping_between(session, old, new).root.items()}


@router.post(f"{IN}/taxonomy/versions", tags=["taxonomy"], status_code=201, response_model=EvolvedView)
def evolve_taxonomy(call: Caught, body: Evolution) -> Response:
    """Make the next version; says which materials, constraints and interventions somebody has to look at then."""

    def make(session: Session) -> EvolvedView:
        affected = taxonomy.affected_materials(session, body.changes)
        rules = taxonomy.affected_rules(session, body.changes)
        made = taxonomy.evolve(session, body.changes, note=body.note, expected=body.expected)
        return EvolvedView.of(made, affected, rules)

    return call.create(make)


# ── materials ───────────────────────────────────────────────────────────────────────────────────────────────────────


class NewMaterial(Request_):
    """A material to add."""

    id: Id
    content: Content
    tags: Annotated[list[Tag], Field(max_length=200)] = []
    allow_duplicate: bool = False


class MaterialChange(Request_):
    """What to change of a material; what is left out stays."""

    version: Version
    content: Content | None = None
    tags: Annotated[list[Tag], Field(max_length=200)] | None = None


class MaterialMove(Request_):
    """Materials that take a step of the review."""

    ids: Annotated[list[Id], Field(min_length=1, max_length=1_000)]
    reason: Text | None = None


MoveName = Literal["submit", "approve", "reject", "retire", "restore"]


@router.get(f"{IN}/materials", tags=["materials"], responses=READ)
def list_materials(
    call: Caught,
    kind: MaterialKind | None = None,
    state: ReviewState | None = None,
    tag: Annotated[str | None, Query(max_length=200, pattern=r"^[^=]+=[^=]+$", description="dimension=value")] = None,
    cursor: Cursor = None,
    limit: Limit = PAGE,
) -> PageView[MaterialView]:
    """The material library."""
    dimension, _, value = (tag or "").partition("=")
    with call.read() as session:
        found = materials.list_materials(
            session, kind=kind, state=state, tag=(dimension, value) if tag else None, cursor=cursor, limit=limit
        )
        return page_view(found, MaterialView.of)


@router.post(f"{IN}/materials", tags=["materials"], status_code=201, response_model=MaterialView)
def add_material(call: Caught, request: Request, body: NewMaterial) -> Response:
    """Add a material as a draft. An image is what `/images` answered to its upload."""
    return call.create(
        lambda session: MaterialView.of(
            materials.add_material(
                session,
                body.id,
                body.content,
                body.tags,
                files_dir=request.app.state.files,
                allow_duplicate=body.allow_duplicate,
            )
        )
    )


@router.get(f"{IN}/materials/{{material}}", tags=["materials"], responses=READ)
def get_material(call: Caught, material: str) -> MaterialView:
    """A material."""
    with call.read() as session:
        return MaterialView.of(materials.get_material(session, material))


@router.patch(f"{IN}/materials/{{material}}", tags=["materials"])
def change_material(call: Caught, request: Request, material: str, body: MaterialChange) -> MaterialView:
    """Change content or tags: an approved material, and every variant that holds it, falls back to draft."""
    with call.write() as session:
        changed = materials.change_material(
            session,
            material,
            content=body.content,
            tags=body.tags,
            version=body.version,
            files_dir=request.app.state.files,
        )
        return MaterialView.of(changed)


@router.post(f"{IN}/materials/review/{{move}}", tags=["materials"])
def move_materials(call: Caught, move: MoveName, body: MaterialMove) -> MovedView:
    """Submit, approve, reject, retire or restore materials."""
    with call.write() as session:
        return MovedView.of(review.move_materials(session, move, body.ids, reason=body.reason))


@router.post(f"{IN}/images", tags=["materials"], status_code=201)
def upload_image(
    call: Caught, request: Request, file: Annotated[UploadFile, File()], alt: Annotated[str, Form(max_length=1000)] = ""
) -> Image:
    """Keep a picture (PNG, JPEG, WebP), re-encoded; what is answered is the content of a material."""
    call.caller.require(Role.EDITOR)
    data = file.file.read(MAX_BYTES + 1)
    with call.read() as session:
        business = businesses.get_business(session).id
    return store_image(request.app.state.files, business, data, alt)


@router.get(
    f"{IN}/images/{{material}}",
    tags=["materials"],
    response_class=FileResponse,
    responses={200: {"content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}}}, **READ},
)
def get_image(call: Caught, request: Request, material: str) -> Response:
    """The picture of an image material."""
    with call.read() as session:
        content = materials.content_of(materials.get_material(session, material))
        if not isinstance(content, Image):
            raise NotFoundError(f"Material {material!r} is {content.kind}, and has no picture.")
        path = image_path(request.app.state.files, session.business, content)
    etag = f'"{content.file[:32]}"'
    if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers={"ETag": etag})
    if not path.is_file():
        raise NotFoundError(f"The picture of material {material!r} is not in this installation's files.")
    headers = {"ETag": etag, "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "default-src 'none'"}
    return FileResponse(path, media_type=content.media_type, headers=headers)


class ImportedRow(BaseModel):
    """What came of a row of the file; the header is row 1."""

    model_config = ConfigDict(from_attributes=True)

    row: int
    id: str
    outcome: materials.Outcome
    message: str


class ImportView(BaseModel):
    """What came of a file; unless `applied`, nothing was stored."""

    model_config = ConfigDict(from_attributes=True)

    applied: bool
    rows: list[ImportedRow]


@router.post(f"{IN}/materials/import", tags=["materials"])
def import_materials(
    call: Caught,
    request: Request,
    table: Annotated[UploadFile, File(description="The CSV file")],
    pictures: Annotated[list[UploadFile] | None, File(description="The pictures that it names")] = None,
    partial: Annotated[bool, Form(description="Store the good rows even where others fail")] = False,
) -> ImportView:
    """Add or change the materials that a CSV file lists; docs/materials.md has the format."""
    call.caller.require(Role.EDITOR)
    with tempfile.TemporaryDirectory(prefix="kaleidoscope-") as scratch:
        folder = Path(scratch) / "pictures"
        folder.mkdir()
        (Path(scratch) / "table.csv").write_bytes(table.file.read())
        for picture in pictures or []:
            name = picture.filename or ""
            plain = not any(ord(c) < 32 or "\ud800" <= c <= "\udfff" for c in name)
            if not plain or name != Path(name).name or name in {"", ".", ".."} or len(name.encode()) > 200:
                raise InputError(f"pictures: {name!r} cannot be a file's name. Give its name without a folder.")
            (folder / name).write_bytes(picture.file.read())
        with call.write() as session:
            report = materials.import_materials(
                session, Path(scratch) / "table.csv", folder, request.app.state.files, partial=partial
            )
    none = 0 < len(report.rows) == len(report.failures)
    return ImportView.model_validate({"applied": report.applied and not none, "rows": report.rows})


# ── scenes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class NewScene(Request_):
    """A scene to make."""

    id: Id
    spec: scenes.SceneSpec


class SceneChange(Request_):
    """The whole spec, as it is to be."""

    version: Version
    spec: scenes.SceneSpec


class Desk:
    """Where the few questions that take seconds are worked on: one of each business at once, and few altogether.

    Whoever finds it taken waits for a moment only, and only a few do: they wait in the threads that answer everybody.
    """

    def __init__(self, seats: int = SEATS, waiting: int = WAITING, wait_s: float = WAIT_S) -> None:
        self.seats, self.waiting, self.wait_s = seats, waiting, wait_s
        self._working: set[str] = set()  # businesses
        self._queue: list[str] = []
        self._changed = threading.Condition()

    @contextmanager
    def take(self, business: str) -> Iterator[None]:
        """A seat for the block; raises UnavailableError where there is none soon."""
        with self._changed:
            if not self._free(business):
                if business in self._queue or len(self._queue) >= self.waiting:
                    raise self._busy(business)
                self._queue.append(business)
                try:
                    if not self._changed.wait_for(lambda: self._free(business), timeout=self.wait_s):
                        raise self._busy(business)
                finally:
                    self._queue.remove(business)
            self._working.add(business)
        try:
            yield
        finally:
            with self._changed:
                self._working.remove(business)
                self._changed.notify_all()

    def _free(self, business: str) -> bool:
        return business not in self._working and len(self._working) < self.seats

    def _busy(self, business: str) -> UnavailableError:
        whose = "another question of yours" if business in self._working else "the questions of others"
        return UnavailableError(f"The server works on {whose} about combinations just now. Try again in a moment.")


_desk = Desk()


def _at_work(call: Call) -> AbstractContextManager[None]:
    """A seat for a question that takes seconds."""
    return _desk.take(call.caller.business or "")


class FindingView(BaseModel):
    """Something wrong, or odd, with how the materials combine."""

    model_config = ConfigDict(from_attributes=True)

    code: str
    level: str
    message: str
    constraints: list[str]
    slot: str | None
    materials: list[str]


class CombinationsView(BaseModel):
    """What a scene's materials combine to."""

    legal: int
    findings: list[FindingView]
    remarks: Annotated[list[str], Field(description=f"The first {MAX_REMARKS:,}")]
    remarks_total: int


class DiffView(BaseModel):
    """What a change would do, a line per change; none: nothing."""

    creates: bool
    lines: list[str]


@router.get(f"{IN}/scenes", tags=["scenes"], responses=READ)
def list_scenes(call: Caught, cursor: Cursor = None, limit: Limit = PAGE) -> PageView[SceneView]:
    """The scenes of the business."""
    with call.read() as session:
        return page_view(scenes.list_scenes(session, cursor=cursor, limit=limit), SceneView.of)


@router.post(f"{IN}/scenes", tags=["scenes"], status_code=201, response_model=SceneView)
def create_scene(call: Caught, body: NewScene) -> Response:
    """Make a scene."""
    return call.create(lambda session: SceneView.of(scenes.create_scene(session, body.id, body.spec)))


@router.get(SCENE, tags=["scenes"], responses=READ)
def get_scene(call: Caught, scene: str) -> SceneView:
    """A scene."""
    with call.read() as session:
        return SceneView.of(scenes.get_scene(session, scene))


@router.put(SCENE, tags=["scenes"])
def change_scene(call: Caught, scene: str, body: SceneChange) -> SceneView:
    """Replace a scene's spec."""
    with call.write() as session:
        return SceneView.of(scenes.change_scene(session, scene, body.spec, version=body.version))


@router.post(f"{SCENE}/diff", tags=["scenes"])
def diff_scene(call: Caught, scene: str, body: scenes.SceneSpec) -> DiffView:
    """What it would change to make this the scene's spec; nothing is changed."""
    with call.read() as session:
        found = scenes.diff_scene(session, scene, body)
        return DiffView(creates=found.creates, lines=list(found.lines))


@router.get(f"{SCENE}/combinations", tags=["scenes"], responses=READ)
def combinations(call: Caught, scene: str) -> CombinationsView:
    """How many combinations are legal, what is wrong with the constraints, and what the soft checks remark."""
    with _at_work(call):
        with call.read() as session:
            found = scenes.space_of(session, scenes.get_scene(session, scene))
        legal, findings = combiner.count(found.space), combiner.diagnose(found.space)
    return CombinationsView(
        legal=legal,
        findings=[FindingView.model_validate(f) for f in findings],
        remarks=[r.message for r in found.remarks[:MAX_REMARKS]],
        remarks_total=len(found.remarks),
    )


@router.get(f"{SCENE}/plan", tags=["scenes"], responses=READ)
def plan(call: Caught, scene: str, cap: Annotated[int | None, Query(ge=2, le=review.MAX_VARIANTS)] = None) -> PlanView:
    """How many exposures, and days, it takes to learn what each tag and material does, alone and in pairs."""
    with _at_work(call), call.read() as session:
        return PlanView.of(review.plan_learning(session, scene, cap=cap))


# ── variants ────────────────────────────────────────────────────────────────────────────────────────────────────────


class VariantMove(Request_):
    """The variants that take a step: those that all of this holds for."""

    where: Annotated[list[Text], Field(max_length=20, description="Terms, such as image.image_style=flat")] = []
    states: Annotated[list[ReviewState], Field(max_length=20)] = []
    ids: Annotated[list[Annotated[str, Field(max_length=32)]], Field(max_length=1_000)] = []
    remarked: bool | None = None
    reason: Text | None = None


@router.post(f"{SCENE}/variants", tags=["variants"])
def make_variants(call: Caught, scene: str) -> MadeView:
    """Bring the variants in line with the scene's materials, constraints and cap; doing it again changes nothing."""
    with _at_work(call), call.read() as session:
        planned = review.plan_variants(session, scene)
    with call.write() as session:
        return MadeView.model_validate(review.make_variants(session, scene, planned))


@router.get(f"{SCENE}/variants", tags=["variants"], responses=READ)
def list_variants(
    call: Caught,
    scene: str,
    where: Annotated[list[Text] | None, Query(max_length=20, description="Terms, such as copy:c7")] = None,
    state: Annotated[list[ReviewState] | None, Query(max_length=20)] = None,
    remarked: bool | None = None,
    cursor: Cursor = None,
    limit: Limit = PAGE,
) -> PageView[VariantView]:
    """The scene's variants."""
    wanted = review.VariantFilter(tuple(where or ()), tuple(state or ()), remarked=remarked)
    with call.read() as session:
        found = review.find_variants(session, scene, wanted, cursor=cursor, limit=limit)
        return page_view(found, VariantView.model_validate)


@router.get(f"{SCENE}/variants/{{variant}}", tags=["variants"], responses=READ)
def get_variant(call: Caught, scene: str, variant: str) -> VariantView:
    """A variant, by its id or by the beginning of it."""
    with call.read() as session:
        return VariantView.model_validate(review.get_variant(session, scene, variant))


@router.post(f"{SCENE}/variants/review/{{move}}", tags=["variants"])
def move_variants(call: Caught, scene: str, move: MoveName, body: VariantMove) -> MovedView:
    """Submit, approve, reject, retire or restore the variants that the body selects; an empty one selects all."""
    wanted = review.VariantFilter(tuple(body.where), tuple(body.states), tuple(body.ids), body.remarked)
    with call.write() as session:
        return MovedView.of(review.move_variants(session, scene, move, wanted, reason=body.reason))


# ── interventions ───────────────────────────────────────────────────────────────────────────────────────────────────


class NewIntervention(Request_):
    """A rule to add."""

    id: Id
    spec: interventions.InterventionSpec


class InterventionChange(Request_):
    """The whole rule, as it is to be."""

    version: Version
    spec: interventions.InterventionSpec


@router.get(f"{SCENE}/interventions", tags=["interventions"], responses=READ)
def list_interventions(
    call: Caught,
    scene: str,
    active_at: Annotated[AwareDatetime | None, Query(description="Only those in force at this moment")] = None,
    cursor: Cursor = None,
    limit: Limit = PAGE,
) -> PageView[InterventionView]:
    """The scene's rules, those that have ended too."""
    with call.read() as session:
        found = interventions.list_interventions(session, scene, active_at=active_at, cursor=cursor, limit=limit)
        return page_view(found, InterventionView.model_validate)


@router.post(f"{SCENE}/interventions", tags=["interventions"], status_code=201, response_model=InterventionView)
def add_intervention(call: Caught, scene: str, body: NewIntervention) -> Response:
    """Add a rule; it takes effect with the scene's next release."""
    return call.create(
        lambda session: InterventionView.model_validate(
            interventions.add_intervention(session, scene, body.id, body.spec)
        )
    )


@router.post(f"{SCENE}/interventions/conflicts", tags=["interventions"])
def preview_intervention(
    call: Caught,
    scene: str,
    body: interventions.InterventionSpec,
    ignoring: Annotated[str | None, Query(max_length=63, description="The rule that this one would replace")] = None,
) -> list[ConflictView]:
    """What a rule would contradict if it were saved; nothing is changed."""
    with call.read() as session:
        return [
            ConflictView.model_validate(c) for c in interventions.conflicts(session, scene, body, ignoring=ignoring)
        ]


@router.get(f"{SCENE}/interventions/{{intervention}}", tags=["interventions"], responses=READ)
def get_intervention(call: Caught, scene: str, intervention: str) -> InterventionView:
    """A rule."""
    with call.read() as session:
        return InterventionView.model_validate(interventions.get_intervention(session, scene, intervention))


@router.put(f"{SCENE}/interventions/{{intervention}}", tags=["interventions"])
def change_intervention(call: Caught, scene: str, intervention: str, body: InterventionChange) -> InterventionView:
    """Replace what a rule does."""
    with call.write() as session:
        changed = interventions.change_intervention(session, scene, intervention, body.spec, version=body.version)
        return InterventionView.model_validate(changed)


@router.delete(f"{SCENE}/interventions/{{intervention}}", tags=["interventions"])
def end_intervention(call: Caught, scene: str, intervention: str) -> InterventionView:
    """Take a rule out of all later releases, for good."""
    with call.write() as session:
        return InterventionView.model_validate(interventions.end_intervention(session, scene, intervention))


# ── releases ────────────────────────────────────────────────────────────────────────────────────────────────────────


class NewRelease(Request_):
    """A release to draft from what is approved now."""

    plan: release.ReleasePlan
    note: Text = ""


class ReleaseDocument(BaseModel):
    """A release with all that it decides."""

    release: ReleaseView
    content: ReleaseContent


class Transition(Request_):
    """A step of the rollout; with `expected_seq` only if the ledger still ends there."""

    expected_seq: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    reason: Text = ""


class Advance(Request_):
    """A step to the next stage, and how the candidate is doing."""

    health: release.Health
    rollback_if_unhealthy: bool = False
    expected_seq: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None


class Rollback(Transition):
    """A step back from the ledger as it was seen: of two at once, one is made, and a retry is not a second one.

    `to` names a release that was stable before, otherwise it is the one before.
    """

    expected_seq: Annotated[int, Field(ge=0, le=MAX_INT)]
    to: Annotated[int, Field(ge=1, le=MAX_INT)] | None = None


@router.get(f"{SCENE}/releases", tags=["releases"], responses=READ)
def list_releases(call: Caught, scene: str, cursor: Cursor = None, limit: Limit = PAGE) -> PageView[ReleaseView]:
    """The scene's releases, newest first."""
    with call.read() as session:
        found = release.list_releases(session, scene, cursor=cursor, limit=limit)
        states = release.release_states(session, scene, [row.number for row in found.items])
        return page_view(found, lambda row: ReleaseView.of(row, states[row.number]))


@router.post(f"{SCENE}/releases", tags=["releases"], status_code=201, response_model=ReleaseView)
def draft_release(call: Caught, request: Request, scene: str, body: NewRelease) -> Response:
    """Draft a release: a snapshot of what is approved, that never changes.

    Its model may be named `champion`, `challenger` or `generic`: what that is now is what the release holds.
    """

    checked = None
    if not call.answered():
        with _at_work(call), call.read() as session:
            checked = release.check_variants(session, scene)

    def make(session: Session) -> ReleaseView:
        plan = registry.with_versions(request.app.state.settings, session, scene, body.plan)
        return ReleaseView.of(release.draft_release(session, scene, plan, body.note, checked), ReleaseState.DRAFT)

    return call.create(make)


@router.get(f"{SCENE}/releases/{{number}}", tags=["releases"], responses=READ)
def get_release(call: Caught, scene: str, number: Number) -> ReleaseDocument:
    """A release with all that it decides, checked against its hash."""
    with call.read() as session:
        row = release.get_release(session, scene, number)
        state = release.release_state(session, scene, number)
        return ReleaseDocument(release=ReleaseView.of(row, state), content=release.verify(row))


@router.get(f"{SCENE}/releases/{{number}}/diff/{{other}}", tags=["releases"], responses=READ)
def diff_releases(call: Caught, scene: str, number: Number, other: Number) -> list[str]:
    """What another release decides differently, a line per difference."""
    with call.read() as session:
        before, after = (release.verify(release.get_release(session, scene, n)) for n in (number, other))
        return release.diff(before, after).lines()


@router.post(f"{SCENE}/releases/{{number}}/start", tags=["releases"])
def start_release(call: Caught, scene: str, number: Number, body: Transition) -> LedgerView:
    """Put a draft live at its first stage."""
    with call.write() as session:
        return LedgerView.of(release.start(session, scene, number, expected_seq=body.expected_seq))


@router.post(f"{SCENE}/rollout/advance", tags=["releases"])
def advance_release(call: Caught, scene: str, body: Advance) -> LedgerView:
    """Move the candidate to its next stage; after the last one it is the stable release."""
    with call.write() as session:
        entry = release.advance(
            session,
            scene,
            health=body.health,
            expected_seq=body.expected_seq,
            rollback_if_unhealthy=body.rollback_if_unhealthy,
        )
        return LedgerView.of(entry)


@router.post(f"{SCENE}/rollout/pause", tags=["releases"])
def pause_release(call: Caught, scene: str, body: Transition) -> LedgerView:
    """Hold the candidate at its stage."""
    with call.write() as session:
        return LedgerView.of(release.pause(session, scene, reason=body.reason, expected_seq=body.expected_seq))


@router.post(f"{SCENE}/rollout/resume", tags=["releases"])
def resume_release(call: Caught, scene: str, body: Transition) -> LedgerView:
    """Let a paused candidate go on."""
    with call.write() as session:
        return LedgerView.of(release.resume(session, scene, reason=body.reason, expected_seq=body.expected_seq))


@router.post(f"{SCENE}/rollout/rollback", tags=["releases"])
def rollback_release(call: Caught, scene: str, body: Rollback) -> LedgerView:
    """Take back what is live, at once: `stable` of the answer is the release that serves again."""
    with call.write() as session:
        return LedgerView.of(
            release.rollback(session, scene, reason=body.reason, to=body.to, expected_seq=body.expected_seq)
        )


@router.get(f"{SCENE}/ledger", tags=["releases"], responses=READ)
def get_ledger(call: Caught, scene: str, cursor: Cursor = None, limit: Limit = PAGE) -> PageView[LedgerView]:
    """Every transition of the scene's releases, newest first."""
    with call.read() as session:
        return page_view(release.ledger(session, scene, cursor=cursor, limit=limit), LedgerView.of)


@router.get(f"{SCENE}/live", tags=["releases"], responses=READ)
def get_live(
    call: Caught,
    scene: str,
    at: Annotated[AwareDatetime | None, Query(description="A moment with its zone; left out: now")] = None,
) -> LiveView | None:
    """What is live, or was at a moment; null: nothing was."""
    with call.read() as session:
        scenes.get_scene(session, scene)
        found = release.live_at(session, scene, at)
        return None if found is None else LiveView.of(found)


# ── what the log says ───────────────────────────────────────────────────────────────────────────────────────────────


@router.get(f"{SCENE}/experiment", tags=["experiments"], responses=READ)
def get_experiment(
    call: Caught,
    request: Request,
    scene: str,
    release_number: Annotated[int | None, Query(ge=1, le=MAX_INT, alias="release")] = None,
    since: Annotated[AwareDatetime | None, Query(description="Exposures from then on")] = None,
    until: Annotated[AwareDatetime | None, Query(description="Exposures before then")] = None,
) -> dict[str, Any]:
    """The buckets of a release compared: rates, lifts with intervals, sample ratio (docs/experiments.md)."""
    with call.read() as session:
        number = release.shown_number(session, scene, release_number)
        shares = release.verify(release.get_release(session, scene, number)).shares
        business = session.business
    with _at_work(call):
        report = guard.compare(
            request.app.state.decider.log,
            request.app.state.log_dir,
            business=business,
            scene=scene,
            release=number,
            shares=shares,
            since=None if since is None else check_moment("since", since),
            until=None if until is None else check_moment("until", until),
        )
    return {**report.as_dict(), "says": report.lines()}
