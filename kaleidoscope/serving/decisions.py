"""What OFREP does not have: several scenes at once, candidates with scores, events; and how the server is.

Callers are pages, apps and services with a token of the business; role `client` is enough.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi import Path as InPath
from fastapi.responses import FileResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from kaleidoscope.content import Image
from kaleidoscope.decide import Decision
from kaleidoscope.errors import ForbiddenError, KaleidoscopeError, NotFoundError, UnavailableError
from kaleidoscope.events import ItemResult, Rules, ingest
from kaleidoscope.images import image_path
from kaleidoscope.serving.decider import QUEUED, WRITERS, Asked, Decider
from kaleidoscope.serving.http import ERRORS, ErrorBody, api_key_scheme, bearer_scheme, secret_of
from kaleidoscope.serving.live import windows_of
from kaleidoscope.vocabulary import Role

MAX_SCENES = 50
MAX_EVENTS = 1_000

BUSY: dict[int | str, dict[str, Any]] = {
    429: {"model": ErrorBody, "description": "Too many requests of this token; Retry-After says when to ask again"}
}
router = APIRouter(prefix="/v1", responses={**ERRORS, **BUSY})
health = APIRouter(tags=["health"])

Attributes = dict[str, str | int | float | bool | None]


class Client(BaseModel):
    """Who asks."""

    model_config = ConfigDict(arbitrary_types_allowed=True, frozen=True)

    decider: Decider
    business: str
    roles: frozenset[Role]
    user_agent: str | None
    ip: str | None


async def _identify(
    request: Request,
    bearer: Annotated[Any, Depends(bearer_scheme)],  # for the OpenAPI document
    api_key: Annotated[Any, Depends(api_key_scheme)],
) -> Client:
    decider: Decider = request.app.state.decider
    secret = secret_of(request)
    known = decider.live.knows(secret)
    whose = decider.caller(secret, look_up=False) if known else await run_in_threadpool(decider.caller, secret)
    caller, business = whose
    decider.pace.take(caller.token or "")
    address = None if request.client is None else request.client.host
    return Client(
        decider=decider, business=business, roles=caller.roles, user_agent=request.headers.get("user-agent"), ip=address
    )


Identified = Annotated[Client, Depends(_identify)]


# ── decisions ───────────────────────────────────────────────────────────────────────────────────────────────────────


class DecisionRequest(BaseModel):
    """Whom to decide for, and in which scenes."""

    model_config = ConfigDict(extra="forbid")

    unit: Annotated[str, Field(min_length=1, max_length=200, description="Who is asked for: the user's id")]
    attributes: Attributes = {}
    scenes: Annotated[list[Annotated[str, Field(max_length=63)]], Field(min_length=1, max_length=MAX_SCENES)]
    top: Annotated[
        int | None, Field(ge=1, le=100, description="Answer the best candidates instead, for a client to choose from")
    ] = None
    explain: Annotated[bool, Field(description="Say what of the user and of the variant made its score")] = False
    forced: Annotated[
        str | None, Field(max_length=32, description="A variant to show in the one scene, to look at it; no learning")
    ] = None


class ContributionView(BaseModel):
    """A part of a variant's score, in the logit; all of them add up to it."""

    model_config = ConfigDict(from_attributes=True)

    part: str
    field: str | None
    value: str | None
    dimension: str | None
    tag: str | None
    logit: float


class DecisionView(BaseModel):
    """What to show in a scene."""

    scene: str
    id: str
    variant: str
    payload: dict[str, Any]
    bucket: str
    propensity: float
    reason: str
    detail: str
    model_version: str | None
    release: int
    token: str
    explanation: list[ContributionView] | None = Field(
        None, description="The largest parts of the score first, where it was asked for and a model ranked"
    )

    @classmethod
    def of(cls, decision: Decision, *, explained: bool = False) -> DecisionView:
        """The view of a decision."""
        record = decision.record
        parts = decision.explanation if explained else None
        return cls(
            scene=record.scene,
            id=record.id,
            variant=record.variant,
            payload=decision.payload,
            bucket=record.bucket,
            propensity=record.propensity,
            reason=record.reason,
            detail=record.detail,
            model_version=record.model_version,
            release=record.release,
            token=decision.token,
            explanation=None
            if parts is None
            else [ContributionView.model_validate(part) for part in sorted(parts, key=lambda part: -abs(part.logit))],
        )


class CandidateView(BaseModel):
    """A variant that may be shown; the score is its logit, null where no model ranked."""

    variant: str
    score: float | None
    materials: dict[str, str]
    tags: dict[str, list[str]]


class CandidatesView(BaseModel):
    """The best candidates in a scene, the best first; nothing was decided."""

    scene: str
    release: int
    model_version: str | None
    detail: str
    candidates: list[CandidateView]


class FailureView(BaseModel):
    """Why there is nothing for a scene; show your own default."""

    scene: str
    code: str
    message: str


class DecisionsView(BaseModel):
    """What became of each scene that was asked for."""

    decisions: list[DecisionView] = []
    rankings: list[CandidatesView] = []
    failures: list[FailureView] = []
    stale_s: float | None = Field(None, description="How old what is live is, where the database has been away")


@router.post("/decisions", tags=["decisions"])
def decide(client: Identified, body: DecisionRequest) -> DecisionsView:
    """Decide what a unit is shown in some scenes, or list the best candidates; a scene that fails fails alone."""
    decider, business = client.decider, client.business
    if (body.forced is not None or body.explain) and client.roles <= {Role.CLIENT}:
        raise ForbiddenError("forced, explain: not with a token for decisions and events alone. Take one of a person.")
    asked = Asked(body.unit, body.attributes)
    decisions, rankings, failures = [], [], []
    for scene in dict.fromkeys(body.scenes):
        try:
            if body.top is None:
                decision = decider.decide(business, scene, asked, forced=body.forced)
                decisions.append(DecisionView.of(decision, explained=body.explain))
                continue
            found = decider.top(business, scene, asked, body.top)
        except UnavailableError:
            raise
        except KaleidoscopeError as error:
            failures.append(FailureView(scene=scene, code=error.code, message=error.message))
            continue
        if isinstance(found, Decision):
            decisions.append(DecisionView.of(found))
            continue
        served, ranking = found
        candidates = [
            CandidateView(
                variant=c.variant,
                score=c.score,
                materials=dict(c.materials),
                tags={dimension: list(values) for dimension, values in c.tags.items()},
            )
            for c in ranking.candidates
        ]
        rankings.append(
            CandidatesView(
                scene=scene,
                release=served.number,
                model_version=ranking.model_version,
                detail=ranking.detail,
                candidates=candidates,
            )
        )
    stale = round(decider.live.age_s, 1) if decider.stale else None
    return DecisionsView(decisions=decisions, rankings=rankings, failures=failures, stale_s=stale)


# ── events ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class EventsRequest(BaseModel):
    """A batch of events."""

    model_config = ConfigDict(extra="forbid")

    events: Annotated[
        list[Any],
        Field(
            max_length=MAX_EVENTS,
            description="Each: event_id, type (exposure, click, conversion, dwell), token, and optionally at, value, "
            "user_agent, ip",
        ),
    ]


class EventResult(BaseModel):
    """What became of an item; what was refused will be refused again, the rest needs no repeating."""

    event_id: str | None
    status: str
    code: str | None
    message: str | None


class EventsView(BaseModel):
    """What became of each item, in order."""

    results: list[EventResult]


@router.post("/events", tags=["events"])
async def take_events(client: Identified, body: EventsRequest) -> EventsView:
    """Keep events. What is answered `accepted` is on disk; a batch that fails as a whole can be sent again."""
    decider = client.decider
    if decider.writing >= WRITERS + QUEUED:
        raise UnavailableError("The log takes events more slowly than they come. Send the batch again later.")
    decider.writing += 1
    try:
        # By threads of their own: while the log is locked, decisions and health go on.
        results = await asyncio.get_running_loop().run_in_executor(decider.writers, _ingested, client, body.events)
    finally:
        decider.writing -= 1
    for result in results:
        decider.metrics.events.labels(result.status.value, "" if result.code is None else result.code.value).inc()
    return EventsView(
        results=[EventResult(event_id=r.event_id, status=r.status, code=r.code, message=r.message) for r in results]
    )


def _ingested(client: Client, items: list[Any]) -> list[ItemResult]:
    decider = client.decider
    return ingest(
        decider.log,
        client.business,
        items,
        decider.keyring,
        now=datetime.now(UTC),
        rules=Rules(windows=windows_of(decider.live.scenes(client.business)), max_items=MAX_EVENTS),
        user_agent=client.user_agent,
        ip=client.ip,
    )


@router.get(
    "/images/{business}/{file}.{suffix}",
    tags=["decisions"],
    response_class=FileResponse,
    responses={200: {"content": {"image/png": {}, "image/jpeg": {}, "image/webp": {}}}},
)
def get_image(
    request: Request,
    business: Annotated[str, InPath(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")],
    file: Annotated[str, InPath(pattern=r"^[0-9a-f]{64}$")],
    suffix: Annotated[str, InPath(pattern=r"^(png|jpeg|webp)$")],
) -> Response:
    """A picture that a decision shows. It takes no token: pages load it, and its name is a hash of it."""
    named = Image.model_validate({"file": file, "media_type": f"image/{suffix}", "width": 1, "height": 1})
    path = image_path(request.app.state.files, business, named)
    if not path.is_file():
        raise NotFoundError("There is no such picture.")
    headers = {
        "Cache-Control": "public, max-age=31536000, immutable",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }
    return FileResponse(path, media_type=f"image/{suffix}", headers=headers)


# ── health ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class HealthView(BaseModel):
    """How the server is; problems are releases and models that could not be loaded."""

    status: str
    live_age_s: float | None
    records_waiting: int
    problems: int


def _health(request: Request) -> HealthView:
    decider: Decider = request.app.state.decider
    age = round(decider.live.age_s, 1) if decider.live.loaded else None
    status = "ok" if decider.live.loaded and not decider.stale else "stale" if decider.live.loaded else "starting"
    return HealthView(
        status=status,
        live_age_s=age,
        records_waiting=decider.recorder.waiting,
        problems=len(decider.live.problems),
    )


@health.get("/healthz")
async def alive(request: Request) -> HealthView:
    """That the process answers."""
    return _health(request)


@health.get("/readyz", responses={503: {"model": ErrorBody, "description": "What is live is not known yet"}})
async def ready(request: Request) -> HealthView:
    """Whether it can decide: it was told once what is live. A database that went away since does not matter."""
    found = _health(request)
    if found.live_age_s is None:
        raise UnavailableError("What is live is not known yet: the database is away.")
    return found


@health.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """What Prometheus collects, of this process."""
    decider: Decider = request.app.state.decider
    decider.settle()
    return Response(generate_latest(decider.metrics.registry), media_type=CONTENT_TYPE_LATEST)
