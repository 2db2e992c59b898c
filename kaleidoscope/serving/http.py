"""What every endpoint shares: who calls, one transaction, one error shape, ETags, idempotency keys, size limits."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, NoReturn

from fastapi import Depends, FastAPI, Header, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kaleidoscope.access import Caller
from kaleidoscope.database import Database, Session
from kaleidoscope.errors import (
    ConflictError,
    ForbiddenError,
    InputError,
    KaleidoscopeError,
    NotFoundError,
    TooLargeError,
    TooManyRequestsError,
    UnauthenticatedError,
    UnavailableError,
)
from kaleidoscope.tables import Business, IdempotencyKey
from kaleidoscope.tokens import authenticate
from kaleidoscope.vocabulary import Role

LOG = logging.getLogger("kaleidoscope.serving")
MAX_BODY = 64 * 1024 * 1024  # bytes; a bulk import with its images
MAX_JSON = 4 * 1024 * 1024
OFREP = "/ofrep/"
RETRY_AFTER_S = 2
NOBODY = Caller("", None, frozenset())  # who asks whose token this is


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str
    message: str
    details: dict[str, Any] | list[Any] | None = None


class ErrorBody(BaseModel):
    """The one shape of an error."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request cannot be used; the message says what to change"},
    401: {"model": ErrorBody, "description": "No token, or one that is unknown, expired or revoked"},
    403: {"model": ErrorBody, "description": "The token's roles do not allow this"},
    404: {"model": ErrorBody, "description": "There is no such thing in a business of this token"},
    409: {"model": ErrorBody, "description": "Changed meanwhile, existing already, or in another state"},
    413: {"model": ErrorBody, "description": "The request is too large"},
    503: {"model": ErrorBody, "description": "The database is away or too busy; try again"},
}
READ: dict[int | str, dict[str, Any]] = {304: {"description": "Not changed since the ETag in If-None-Match"}}


# ── who calls ───────────────────────────────────────────────────────────────────────────────────────────────────────

bearer_scheme = HTTPBearer(auto_error=False, description="An API token")
api_key_scheme = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API token")


@dataclass(frozen=True)
class Call:
    """One request of somebody who is known."""

    database: Database
    caller: Caller
    request_hash: str
    idempotency_key: str | None

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that changes nothing."""
        with self.database.transaction(self.caller, write=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction, committed at the end of the block."""
        with self.database.transaction(self.caller) as session:
            yield session

    def inside(self, business: str) -> Call:
        """The same call in a business."""
        return replace(self, caller=self.caller.inside(business))

    def answered(self) -> bool:
        """Whether the request's Idempotency-Key has been used, so that `create` makes nothing."""
        if self.idempotency_key is None:
            return False
        with self.read() as session:
            return session.get(IdempotencyKey, (self.caller.token or "", self.idempotency_key)) is not None

    def create(self, make: Callable[[Session], BaseModel]) -> Response:
        """Answer 201 with what `make` makes; with an Idempotency-Key, make it once and answer the same again.

        Raises ConflictError where the key was used for another request.
        """
        with self.write() as session:
            if self.idempotency_key is None:
                return _created(make(session).model_dump(mode="json"))
            owner = self.caller.token or ""
            known = session.get(IdempotencyKey, (owner, self.idempotency_key))
            if known is not None:
                if known.request_hash != self.request_hash:
                    raise ConflictError("Idempotency-Key: it was used for another request. Take a new key.")
                return _created(known.body, replayed=True)
            body = make(session).model_dump(mode="json")
            session.add(
                IdempotencyKey(
                    owner=owner, key=self.idempotency_key, request_hash=self.request_hash, status=201, body=body
                )
            )
            return _created(body)


def _created(body: dict[str, Any], *, replayed: bool = False) -> Response:
    headers = {"Idempotent-Replayed": "true"} if replayed else None
    return JSONResponse(body, status_code=201, headers=headers)


def secret_of(request: Request) -> str:
    """The token of a request; raises UnauthenticatedError where there is none."""
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    secret = secret.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "").strip()
    if not secret:
        raise UnauthenticatedError("Send an API token: `Authorization: Bearer …` or `X-API-Key: …`.")
    return secret


async def identify(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer_scheme)],  # for the OpenAPI document
    api_key: Annotated[str | None, Depends(api_key_scheme)],
    idempotency_key: Annotated[str | None, Header(max_length=255, pattern=r"^[\x21-\x7e]+$")] = None,
) -> Call:
    """The call behind a request, in the business its path names.

    Raises UnauthenticatedError, InputError, and NotFoundError where there is no such business for this token.
    """
    secret = secret_of(request)
    database: Database = request.app.state.database
    # A form has been read by now, and is gone; what it makes is stored under its own hash or id, once.
    form = request.headers.get("content-type", "").lower().startswith("multipart/")
    body = b"" if form else await request.body()
    _refuse_unstorable(request, body)
    caller = await run_in_threadpool(_whose, database, secret, request.path_params.get("business"))
    hashed = hashlib.sha256(f"{request.method} {request.url.path}?{request.url.query}\n".encode() + body).hexdigest()
    return Call(database, caller, hashed, idempotency_key)


def _whose(database: Database, secret: str, business: str | None) -> Caller:
    """Who calls, and, where the path names a business, in it."""
    with database.transaction(NOBODY, write=False) as session:
        caller = authenticate(session, secret)
        if caller.roles <= {Role.CLIENT}:
            raise ForbiddenError("This token is for decisions and events alone.")
        if business is None:
            return caller
        inside = caller.inside(business)
        # A token of a business says that there is one; one of the installation may name anything.
        if caller.installation and session.get(Business, business) is None:
            raise NotFoundError(f"There is no business {business!r}.")
        return inside


Caught = Annotated[Call, Depends(identify)]


def _refuse_unstorable(request: Request, body: bytes) -> None:
    """No database stores the character U+0000 or half a surrogate pair, and JSON knows no NaN."""
    if "\0" in request.url.path + "".join(request.path_params.values()) or "%00" in request.url.query:
        raise InputError("path or query: the character U+0000 cannot be used.")
    if not body:  # or a form; any other body is read as JSON, whatever its type says
        return
    if len(body) > MAX_JSON:
        raise TooLargeError(f"body: {len(body):,} bytes; at most {MAX_JSON:,} are taken.")

    def refuse(constant: str) -> NoReturn:
        raise InputError(f"body: {constant} is not JSON. Give a number, or null.")

    def finite(number: str) -> float:
        value = float(number)
        if math.isinf(value):
            raise InputError(f"body: {number[:40]} is larger than any number that can be stored.")
        return value

    try:
        document = json.loads(body, parse_constant=refuse, parse_float=finite)
        text = json.dumps(document, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        raise InputError("body: it holds half of a surrogate pair, which is no character.") from None
    except (ValueError, RecursionError):
        raise InputError("body: this is not JSON in UTF-8.") from None
    if re.search(r"\\u0000", text):
        raise InputError("body: the character U+0000 cannot be stored.")


# ── routes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Route(APIRoute):
    """A route that refuses unknown query parameters; its reads carry an ETag, and answer 304 to who has it already."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, and the ETag of what it answers."""
        handle, known_names = super().get_route_handler(), _query_names(self.dependant)

        async def with_etag(request: Request) -> Response:
            _refuse_unknown(request, known_names)
            response = await handle(request)
            if request.method != "GET" or response.status_code != 200 or not hasattr(response, "body"):
                return response
            etag = f'"{hashlib.sha256(response.body).hexdigest()[:32]}"'
            known = request.headers.get("if-none-match", "")
            if known.strip() == "*" or etag in [tag.strip().removeprefix("W/") for tag in known.split(",")]:
                return Response(status_code=304, headers={"ETag": etag})
            response.headers["ETag"] = etag
            response.headers.setdefault("Cache-Control", "private, no-cache")
            return response

        return with_etag


def _query_names(dependant: Dependant) -> list[str]:
    """The query parameters that an endpoint and what it depends on take."""
    names = [field.alias for field in dependant.query_params]
    return [*names, *(name for inner in dependant.dependencies for name in _query_names(inner))]


def _refuse_unknown(request: Request, known: Sequence[str]) -> None:
    """Raise InputError for a query parameter that nothing reads: a mistyped filter would answer with everything."""
    unknown = [name for name in dict.fromkeys(request.query_params) if name not in known]
    if unknown:
        named = ", ".join(repr(name[:60]) for name in unknown[:5])
        there = f"There are: {', '.join(known)}." if known else "This endpoint takes none."
        raise InputError(f"query: there is no parameter {named} here. {there}")


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def add_error_handlers(app: FastAPI) -> None:
    """Render every error, ours and the framework's, in the one shape."""

    @app.exception_handler(KaleidoscopeError)
    def ours(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, KaleidoscopeError)
        headers = {}
        if isinstance(error, UnauthenticatedError):
            headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, UnavailableError):
            headers["Retry-After"] = str(RETRY_AFTER_S)
        if isinstance(error, TooManyRequestsError):
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        if isinstance(error.__cause__, SQLAlchemyError) and isinstance(error, UnavailableError):
            LOG.warning("%s", error.message)  # names the database, which is nothing for a tenant to know
            error = UnavailableError("The database is away or too busy just now. Try again in a moment.")
        return JSONResponse(error.as_dict(), status_code=error.http_status, headers=headers)

    @app.exception_handler(RequestValidationError)
    def malformed(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        lines = [
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}" for item in error.errors()
        ]
        return _shape(request, 400, "bad_input", "; ".join(lines[:20]))

    @app.exception_handler(HTTPException)
    def framework(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        codes = {
            404: "not_found", 405: "method_not_allowed", 401: "unauthenticated", 403: "forbidden", 413: "too_large",
        }  # fmt: skip
        code = codes.get(error.status_code, "bad_input" if error.status_code < 500 else "internal")
        return _shape(request, error.status_code, code, str(error.detail), dict(error.headers or {}))

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> JSONResponse:
        return _shape(request, 500, "internal", f"{type(error).__name__}. The server's log has the traceback.")


def _shape(
    request: Request, status: int, code: str, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in the one shape; where the OpenFeature protocol is spoken, in its shape."""
    body: dict[str, Any] = {"error": {"code": code, "message": message}}
    if request.url.path.startswith(OFREP):
        body = {"errorDetails": message}
    return JSONResponse(body, status_code=status, headers=headers)


class LimitBody:
    """ASGI middleware that refuses a body of more than MAX_BODY bytes, declared or not; MAX_JSON where pages ask."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is small enough."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = MAX_JSON if scope["path"].startswith(("/v1/", OFREP)) else MAX_BODY
        said = f"body: at most {most:,} bytes are taken."
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > most:
            await _shape(Request(scope), 413, TooLargeError.code, said)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise HTTPException(413, said)
            return message

        await self.app(scope, counted, send)
