"""OFREP, the OpenFeature remote evaluation protocol (0.3): a scene is a flag, and its value is what to show.

`context.targetingKey` is the unit; every other attribute of the context is a feature, or what the scene says it is. An
evaluation is a decision and no exposure: that is an event, and carries the token in the metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from kaleidoscope.decide import Decision
from kaleidoscope.decision_record import Reason
from kaleidoscope.errors import (
    InputError,
    KaleidoscopeError,
    NotFoundError,
    TooManyRequestsError,
    UnauthenticatedError,
)
from kaleidoscope.serving.decider import Asked, Decider
from kaleidoscope.serving.http import MAX_JSON, api_key_scheme, bearer_scheme, secret_of

router = APIRouter(prefix="/ofrep/v1/evaluate/flags", tags=["ofrep"])
MAX_FLAGS = 1_000

REASONS = {
    Reason.CONTROL: "SPLIT",
    Reason.EXPLORED: "SPLIT",
    Reason.RANKED: "TARGETING_MATCH",
    Reason.PINNED: "TARGETING_MATCH",
    Reason.FORCED: "TARGETING_MATCH",
}  # fallbacks: DEFAULT


class EvaluationRequest(BaseModel):
    """Whom to evaluate for."""

    model_config = ConfigDict(extra="ignore")

    context: dict[str, Any] = Field(
        default_factory=dict, description="`targetingKey`, the unit, and attributes: text, numbers, true, false, null"
    )


class EvaluationSuccess(BaseModel):
    """What to show, and what events have to carry back."""

    key: str
    value: dict[str, Any]
    variant: str
    reason: str
    metadata: dict[str, str | int | float | bool]


class EvaluationFailure(BaseModel):
    """Why there is no decision; show your own default."""

    key: str
    errorCode: str
    errorDetails: str


class BulkSuccess(BaseModel):
    """All scenes of the business that show something."""

    flags: list[EvaluationSuccess | EvaluationFailure]


class BulkFailure(BaseModel):
    """Why nothing was evaluated."""

    errorCode: str
    errorDetails: str


class Refusal(BaseModel):
    """Why the caller got no answer."""

    errorDetails: str


REFUSALS: dict[int | str, dict[str, Any]] = {
    304: {"description": "Not changed since the ETag in If-None-Match"},
    401: {"model": Refusal, "description": "No token, or one that is unknown, expired or revoked"},
    403: {"model": Refusal, "description": "The token may not do this"},
    413: {"model": Refusal, "description": "The request is too large"},
    429: {"model": Refusal, "description": "Too many requests of this token; Retry-After says when to ask again"},
    500: {"model": Refusal, "description": "The server failed"},
    503: {"model": Refusal, "description": "What is live is not known yet"},
}
BODY = {"requestBody": {"content": {"application/json": {"schema": EvaluationRequest.model_json_schema()}}}}
Authorised = [Depends(bearer_scheme), Depends(api_key_scheme)]  # for the OpenAPI document; secret_of reads them


class _CannotRead(InputError):
    """The body is not what the protocol says."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.error_code = code


@router.post(
    "/{key}",
    response_model=EvaluationSuccess,
    responses={400: {"model": EvaluationFailure}, 404: {"model": EvaluationFailure}, **REFUSALS},
    dependencies=Authorised,
    openapi_extra=BODY,
)
async def evaluate(request: Request, key: str) -> Response:
    """Decide what a unit is shown in a scene."""
    body = await request.body()

    def answer(decider: Decider, secret: str, *, look_up: bool) -> Response:
        caller, business = decider.caller(secret, look_up=look_up)
        decider.pace.take(caller.token or "")
        decision = decider.decide(business, key, _asked(body))
        return _answer(request, _success(key, decision, decider))

    return await _in_our_words(request, answer, key)


@router.post(
    "",
    response_model=BulkSuccess,
    responses={400: {"model": BulkFailure}, **REFUSALS},
    dependencies=Authorised,
    openapi_extra=BODY,
)
async def evaluate_all(request: Request) -> Response:
    """Decide what a unit is shown in every scene of the business that is live."""
    body = await request.body()

    def answer(decider: Decider, secret: str, *, look_up: bool) -> Response:
        caller, business = decider.caller(secret, look_up=look_up)
        decider.pace.take(caller.token or "")
        return _answer(request, {"flags": _every(decider, business, _asked(body))})

    return await _in_our_words(request, answer, None)


async def _in_our_words(request: Request, answer: Callable[..., Response], key: str | None) -> Response:
    """The answer, given by a thread where it may have to wait; errors in the protocol's shape."""
    decider: Decider = request.app.state.decider
    try:
        secret = secret_of(request)
        if decider.at_once(secret, key):
            return answer(decider, secret, look_up=False)
        return await run_in_threadpool(answer, decider, secret, look_up=True)
    except KaleidoscopeError as error:
        return _failed(error, key)


def _every(decider: Decider, business: str, asked: Asked) -> list[dict[str, Any]]:
    flags = []
    for key in sorted(decider.live.scenes(business))[:MAX_FLAGS]:
        try:
            flags.append(_success(key, decider.decide(business, key, asked), decider))
        except NotFoundError:
            continue  # not live for this unit: the flag is not there
        except KaleidoscopeError as error:
            flags.append({"key": key, "errorCode": "GENERAL", "errorDetails": error.message})
    return flags


def _asked(body: bytes) -> Asked:
    """The unit and the attributes in a body; raises _CannotRead with the protocol's error code."""
    if len(body) > MAX_JSON:
        raise _CannotRead("PARSE_ERROR", f"body: {len(body):,} bytes; at most {MAX_JSON:,} are taken.")

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        document = json.loads(body, parse_constant=refuse) if body.strip() else {}
        json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        raise _CannotRead("PARSE_ERROR", "body: this is not JSON in UTF-8.") from None
    context = document.get("context") if isinstance(document, dict) else None
    if context is None:
        raise _CannotRead("TARGETING_KEY_MISSING", "context: it is missing. Send the unit as context.targetingKey.")
    if not isinstance(context, dict):
        raise _CannotRead("INVALID_CONTEXT", "context: it is not an object. Send the unit as context.targetingKey.")
    unit = context.get("targetingKey")
    if unit is None or unit == "":
        raise _CannotRead("TARGETING_KEY_MISSING", "context.targetingKey: it is missing. Send the unit's id.")
    if not isinstance(unit, str):
        raise _CannotRead("INVALID_CONTEXT", "context.targetingKey: it is not text. Send the unit's id as text.")
    try:
        attributes = {name: _plain(value) for name, value in context.items() if name != "targetingKey"}
        return Asked(unit, attributes)
    except InputError as error:
        raise _CannotRead("INVALID_CONTEXT", f"context: {error.message}") from None


def _plain(value: object) -> object:
    """3.0 is 3, as JSON's numbers are."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _success(key: str, decision: Decision, decider: Decider) -> dict[str, Any]:
    record = decision.record
    metadata: dict[str, Any] = {
        "decisionId": record.id,
        "token": decision.token,
        "bucket": record.bucket.value,
        "propensity": record.propensity,
        "modelVersion": record.model_version or "",
        "release": record.release,
        "reason": record.reason.value,
    }
    if record.detail:
        metadata["detail"] = record.detail
    if decider.stale:
        metadata["staleSeconds"] = round(decider.live.age_s)
    return {
        "key": key,
        "value": decision.payload,
        "variant": record.variant,
        "reason": REASONS.get(record.reason, "DEFAULT"),
        "metadata": metadata,
    }


def _answer(request: Request, document: dict[str, Any]) -> Response:
    """200 with an ETag, or 304 where the caller has it already.

    What changes with the time alone does not count: how stale it is, and the token, which holds the moment.
    """
    flags = document.get("flags", [document])
    lasting = [{**flag, "metadata": _lasting(flag["metadata"])} if "metadata" in flag else flag for flag in flags]
    etag = f'"{hashlib.sha256(_json(lasting)).hexdigest()[:32]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache"}
    known = request.headers.get("if-none-match", "")
    if etag in [tag.strip().removeprefix("W/") for tag in known.split(",")]:
        return Response(status_code=304, headers=headers)
    return Response(_json(document), media_type="application/json", headers=headers)


def _lasting(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metadata.items() if name not in ("token", "staleSeconds")}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _failed(error: KaleidoscopeError, key: str | None) -> Response:
    headers = {}
    if isinstance(error, UnauthenticatedError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, TooManyRequestsError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.http_status in (401, 403, 413, 429) or error.http_status >= 500:
        if error.http_status == 503:
            headers["Retry-After"] = "2"
        return JSONResponse({"errorDetails": error.message}, status_code=error.http_status, headers=headers)
    if isinstance(error, _CannotRead):
        code, status = error.error_code, 400
    elif isinstance(error, NotFoundError):
        code, status = "FLAG_NOT_FOUND", 404
    else:
        code, status = ("INVALID_CONTEXT" if isinstance(error, InputError) else "GENERAL"), 400
    body = {"errorCode": code, "errorDetails": error.message} | ({} if key is None else {"key": key})
    return JSONResponse(body, status_code=status, headers=headers)
