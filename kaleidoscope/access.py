"""Who is calling, in which business, and what they may do. How a token says who it is, is tokens.py.

Services ask `session.caller.require(…)`, so that the command line, the REST API and the console obey one rule.
"""

from __future__ import annotations

from dataclasses import dataclass

from kaleidoscope.errors import ForbiddenError, NotFoundError
from kaleidoscope.vocabulary import Role


@dataclass(frozen=True)
class Caller:
    """Somebody who acts in a business, or (business None) on the installation as a whole."""

    user: str
    business: str | None
    roles: frozenset[Role]
    token: str | None = None  # id of the API token, where one was used
    installation: bool = False  # may act in every business, and make them

    def may(self, *roles: Role) -> bool:
        """Whether the caller has one of the roles; an admin has all of them."""
        return Role.ADMIN in self.roles or not self.roles.isdisjoint(roles)

    def require(self, *roles: Role) -> None:
        """Raise ForbiddenError unless the caller has one of the roles."""
        if not self.may(*roles):
            names = " or ".join(roles)
            raise ForbiddenError(f"{self.user} may not do this: it takes the role {names} in {self.business!r}.")

    def require_installation(self) -> None:
        """Raise ForbiddenError unless the caller works on the installation as a whole."""
        if not self.installation:
            raise ForbiddenError(f"{self.user} may not do this: it takes a token of the installation.")

    def inside(self, business: str) -> Caller:
        """The caller in a business: their own, or any for one of the installation. Raises NotFoundError."""
        if not self.installation and self.business != business:
            raise NotFoundError(f"There is no business {business!r} that this token may use.")
        return Caller(self.user, business, self.roles, self.token, self.installation)


def operator(user: str, business: str | None) -> Caller:
    """Whoever runs commands beside the database: they could change it by hand, and so may do everything."""
    return Caller(user, business, frozenset({Role.ADMIN}), None, installation=True)
