"""The application: `create_app(settings)` is what a server runs and what tests talk to."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi

from kaleidoscope.database import Database, open_database
from kaleidoscope.errors import UnavailableError
from kaleidoscope.registry import fetch
from kaleidoscope.serving import decisions, ofrep, operate, portraits
from kaleidoscope.serving.decider import Decider, Metrics, load_keys
from kaleidoscope.serving.http import LimitBody, add_error_handlers
from kaleidoscope.serving.live import Live, models_in
from kaleidoscope.settings import Settings

DESCRIPTION = """`/api/v1`: everything that decides what may be shown: taxonomy, materials, scenes, variants,
interventions, releases. `/ofrep/v1` and `/v1`: decisions, and the events that say what became of them.

Send an API token as `Authorization: Bearer …` or `X-API-Key: …`. Reads carry an `ETag`; creates take an
`Idempotency-Key`; changes name the `version` they were made to."""


def create_app(settings: Settings) -> FastAPI:
    """The HTTP face on the databases of the settings, whose schema is made where they are empty.

    Where one is away it is waited for: requests that need it are answered 503 until then. Raises InputError where it
    can be none of ours, or is of another version.
    """
    database = _open(settings.database_url)
    log = _open(settings.log_url) if settings.log_url != settings.database_url else database
    live = Live(
        database,
        models_in(lambda business, version: fetch(settings, business, version)),
        refresh_s=settings.refresh_s,
        model_timeout_s=settings.model_timeout_ms / 1000,
    )
    decider = Decider(live, log, load_keys(settings), settings, Metrics())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        decider.start()
        yield
        decider.close()
        log.close()
        database.close()

    app = FastAPI(
        title="Kaleidoscope", version=version("kaleidoscope"), description=DESCRIPTION, lifespan=lifespan,
        separate_input_output_schemas=False,
        docs_url=None, redoc_url=None,  # their pages load scripts from elsewhere
    )  # fmt: skip
    app.state.database, app.state.files, app.state.decider = database, settings.files_dir, decider
    app.state.log_dir, app.state.settings = settings.log_dir, settings
    app.add_middleware(LimitBody)
    origins = [origin.strip() for origin in (settings.cors_origins or "").split(",") if origin.strip()]
    if origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "if-none-match", "x-api-key"], expose_headers=["etag"],
        )  # fmt: skip
    add_error_handlers(app)
    for router in (operate.router, portraits.router, ofrep.router, decisions.router, decisions.health):
        app.include_router(router)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _open(url: str) -> Database:
    try:
        return open_database(url)
    except UnavailableError as error:
        logging.getLogger("kaleidoscope.serving").warning("%s Waiting for it.", error.message)
        return Database(url)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, without the 422 that our error handler turns into a 400."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
        app.openapi_schema = schema
    return app.openapi_schema
