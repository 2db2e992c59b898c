"""The application over a fresh database, and tokens for the people of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from kaleidoscope.access import operator
from kaleidoscope.database import Database
from kaleidoscope.release import ReleasePlan, Shares, draft_release, start
from kaleidoscope.review import make_variants, move_variants
from kaleidoscope.serving.app import create_app
from kaleidoscope.settings import Settings
from kaleidoscope.tokens import create_token
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person
from tests.kaleidoscope.stock import stocked

Client = Callable[..., TestClient]
SHARES = Shares(control=0.2, random=0.5, model=0.3)


class Constant:
    """A model that likes one variant more than all others, everywhere."""

    def __init__(self, version: str = "m1", favourite: int = 3) -> None:
        self.version, self.favourite = version, favourite

    def variant_side(self, variants: pa.Table) -> int:
        return len(variants)

    def features(self, columns: Mapping[str, Sequence[object]], rows: int) -> int:
        return rows

    def score(self, features: int, side: int) -> NDArray[np.float32]:
        scores = np.zeros((features, side), np.float32)
        scores[:, self.favourite] = 1
        return scores

    def score_heads(self, features: int, side: int) -> NDArray[np.float32]:
        return self.score(features, side)[None]


@pytest.fixture
def app(sqlite: Database, tmp_path: Path) -> FastAPI:
    """The application on the `sqlite` fixture's database."""
    url = sqlite.url.render_as_string(hide_password=False)
    return create_app(settings_for(url, tmp_path))


def settings_for(url: str, folder: Path, **more: object) -> Settings:
    """Settings that keep everything in one database and one folder."""
    keep = {
        "database_url": url,
        "log_url": url,
        "files_dir": folder / "files",
        "models_dir": folder / "models",
        "log_dir": folder / "log",
    }
    return Settings.model_validate({**keep, "keys": "k1:0123456789abcdef0123", **more})


@pytest.fixture
def released(sqlite: Database, app: FastAPI) -> FastAPI:
    """The application with release 1 of scene `welcome` live for everybody, and a model for bucket model."""
    stocked(sqlite, approved=True)
    with sqlite.transaction(person("ann")) as session:
        make_variants(session, "welcome")
        move_variants(session, "welcome", "submit")
    with sqlite.transaction(person("rex")) as session:
        move_variants(session, "welcome", "approve")
    release_next(sqlite, ReleasePlan(shares=SHARES, model_version="m1", stages=(1.0,)))
    live = app.state.decider.live
    live.models = lambda business, version: Constant(version)
    live.refresh()
    return app


def release_next(database: Database, plan: ReleasePlan) -> int:
    """Draft a release and start it."""
    with database.transaction(person("pat", Role.ADMIN)) as session:
        number = draft_release(session, "welcome", plan).number
        start(session, "welcome", number)
        return number


@pytest.fixture
def client_of(app: FastAPI, sqlite: Database) -> Iterator[Client]:
    """`client_of("ann", Role.EDITOR, business="acme")`: a client with a token of hers; without a name, an anonymous."""
    opened: list[TestClient] = []

    def make(user: str | None = None, *roles: Role, business: str | None = "acme") -> TestClient:
        headers = {}
        if user is not None:
            with sqlite.transaction(operator("root", business)) as session:
                wanted = frozenset(roles or {Role.ADMIN})
                _, secret = create_token(session, user, wanted, installation=business is None)
            headers["Authorization"] = f"Bearer {secret}"
        client = TestClient(app, headers=headers, raise_server_exceptions=False)
        opened.append(client)
        return client

    yield make
    for client in opened:
        client.close()
    app.state.database.close()
