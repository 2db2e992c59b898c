"""Who acts in the tests."""

from __future__ import annotations

from kaleidoscope.access import Caller
from kaleidoscope.vocabulary import Role


def person(user: str, *roles: Role, business: str = "acme") -> Caller:
    """Somebody of a business with these roles; without any, an admin."""
    return Caller(user, business, frozenset(roles or {Role.ADMIN}))
