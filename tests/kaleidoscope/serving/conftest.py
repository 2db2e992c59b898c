"""The application over a fresh database, and tokens for the people of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kaleidoscope.access import operator
from kaleidoscope.database import Database
from kaleidoscope.serving.app import create_app
from kaleidoscope.settings import Settings
from kaleidoscope.tokens import create_token
from kaleidoscope.vocabulary import Role

Client = Callable[..., TestClient]


@pytest.fixture
def app(sqlite: Database, tmp_path: Path) -> FastAPI:
    """The application on the `sqlite` fixture's database."""
    url = sqlite.url.render_as_string(hide_password=False)
    return create_app(Settings(database_url=url, files_dir=tmp_path / "files"))


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
