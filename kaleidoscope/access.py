"""Who is calling, in which business, and what they may do; what a person may be called. Tokens are in tokens.py.

Services ask `session.caller.require(…)`, so that the command line, the REST API and the console obey one rule.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from kaleidoscope.errors import ForbiddenError, InputError, NotFoundError
from kaleidoscope.vocabulary import Role

RULE = "rule: approved materials, no remarks"  # the reviewer of what is approved automatically; nobody has this name
MAX_USER = 200  # characters

# Seen as nothing, or as a space, though Unicode calls them letters, marks or symbols (Default_Ignorable_Code_Point).
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0")
_SELECTORS = (range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))
_ALIKE = frozenset({"LATIN", "CYRILLIC", "GREEK"})  # scripts that share the looks of many letters


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
    return Caller(check_user(user), business, frozenset({Role.ADMIN}), None, installation=True)


def check_user(text: str) -> str:
    """A person's name as it is kept: NFKC, single spaces, so that what looks alike is one person.

    Raises InputError for one that is empty or too long, holds what cannot be seen, mixes look-alike letters, or is that
    of the rule that approves automatically.
    """
    check_readable("user", text.strip())
    name = " ".join(unicodedata.normalize("NFKC", text).split())
    if not name:
        raise InputError("user: say who it is.")
    if len(name) > MAX_USER:
        raise InputError(f"user: {len(name)} characters are too many for a name; at most {MAX_USER} are kept.")
    check_readable("user", name)
    if _letters(name) == _letters(RULE):
        raise InputError(f"user: {name!r} is how approvals by the rule are signed. Choose another name.")
    return name


def check_readable(field: str, text: str) -> str:
    """The text, if people see all of it and what they see is what it is; raises InputError naming the field.

    Refused are control characters, those that cannot be seen or that turn the direction of text, and words that mix
    Latin, Cyrillic and Greek letters, of which many look alike.
    """
    for character in text:
        if _unseen(character):
            raise InputError(
                f"{field}: holds the character U+{ord(character):04X}, which cannot be seen. Take it out, or type the"
                " name anew."
            )
    for word in text.split():
        scripts = sorted({unicodedata.name(c, "").partition(" ")[0] for c in word if c.isalpha()} & _ALIKE)
        if len(scripts) > 1:
            mixed = " and ".join(script.title() for script in scripts)
            raise InputError(
                f"{field}: {word!r} mixes {mixed} letters, many of which look alike. Write the word in one alphabet."
            )
    return text


def _unseen(character: str) -> bool:
    if character in _INVISIBLE or any(ord(character) in selectors for selectors in _SELECTORS):
        return True
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _letters(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())
