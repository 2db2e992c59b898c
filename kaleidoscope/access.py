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

# Seen as nothing, or as a space, though Unicode calls them letters, marks or symbols: what is left of
# Default_Ignorable_Code_Point beside the categories of `_unseen`, and characters that are blank by their meaning.
_INVISIBLE = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0")
_SELECTORS = (range(0xFE00, 0xFE10), range(0xE0100, 0xE01F0))
_BLANK = frozenset("\u2800\ufffc\U00013441\U00013442\U00016fe4\U0001d159")
_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# How the names of letters begin, where one script, or scripts that are written together, have several beginnings.
_FAMILIES = dict.fromkeys(
    ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "HANGUL", "BOPOMOFO"), "East Asian"
)
_OF_ANY_SCRIPT = frozenset({"COMBINING", "MODIFIER"})  # accents, and such as the apostrophe in Oʻahu


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

    Raises InputError for one that is empty or too long, holds what cannot be seen, mixes scripts within a word, or is
    that of the rule that approves automatically.
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


def person_key(name: str) -> str:
    """What two names have in common that are one person's where it matters who did something: Zoe is zoe."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def check_readable(field: str, text: str) -> str:
    """The text, if people see all of it and what they see is what it is; raises InputError naming the field.

    Refused are control characters, those that cannot be seen or that turn the direction of text, and words that mix
    scripts, of which many have letters that look alike. Han, kana, bopomofo and hangul are written together.
    """
    for character in text:
        if _unseen(character):
            raise InputError(
                f"{field}: holds the character U+{ord(character):04X}, which cannot be seen. Take it out, or type the"
                " name anew."
            )
    for word in text.split():
        scripts = sorted(_scripts(word))
        if len(scripts) > 1:
            raise InputError(
                f"{field}: {word!r} mixes {' and '.join(scripts)} letters, of which some look alike. Write the word in"
                " one script, or put a space between two."
            )
    return text


def _scripts(word: str) -> set[str]:
    """The scripts of the letters and the marks in a word, by the names that Unicode gives them."""
    characters = (c for c in unicodedata.normalize("NFKC", word) if unicodedata.category(c)[0] in "LM")
    begins = {unicodedata.name(c, "").partition(" ")[0] for c in characters} - _OF_ANY_SCRIPT
    return {_FAMILIES.get(name, name.capitalize()) for name in begins}


def _unseen(character: str) -> bool:
    if character in _INVISIBLE or character in _BLANK or any(ord(character) in range_ for range_ in _SELECTORS):
        return True
    return unicodedata.category(character) in _HIDDEN_CATEGORIES


def _letters(name: str) -> str:
    return "".join(c for c in unicodedata.normalize("NFKC", name).casefold() if c.isalnum())
