"""Tokens and callers: who is known, in which business, and what they may do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from kaleidoscope.access import RULE, Caller, check_user, operator, person_key
from kaleidoscope.database import Database
from kaleidoscope.errors import ForbiddenError, InputError, NotFoundError, UnauthenticatedError
from kaleidoscope.tables import ApiToken, now
from kaleidoscope.tokens import authenticate, create_token, list_tokens, revoke_token
from kaleidoscope.vocabulary import Role
from tests.kaleidoscope.people import person

NOBODY = Caller("nobody", None, frozenset())
ADMIN = person("admin")
EDITOR = frozenset({Role.EDITOR})


def token_of(database: Database, caller: Caller = ADMIN, user: str = "bff", **more: float) -> tuple[str, str]:
    """Id and text of a new editor's token."""
    with database.transaction(caller) as session:
        token, secret = create_token(session, user, EDITOR, **more)
        return token.id, secret


def who(database: Database, secret: str) -> Caller:
    with database.transaction(NOBODY, write=False) as session:
        return authenticate(session, secret)


# ── callers ──


def test_a_role_allows_what_it_says_and_admin_everything() -> None:
    editor = person("ed", Role.EDITOR)
    editor.require(Role.EDITOR)
    editor.require(Role.REVIEWER, Role.EDITOR)
    with pytest.raises(ForbiddenError, match="ed may not do this: it takes the role reviewer or publisher in 'acme'"):
        editor.require(Role.REVIEWER, Role.PUBLISHER)
    for role in Role:
        assert person("boss", Role.ADMIN).may(role)
        assert not Caller("stranger", "acme", frozenset()).may(role)


def test_roles_do_not_include_one_another() -> None:
    for has in set(Role) - {Role.ADMIN}:
        assert [wanted for wanted in Role if person("x", has).may(wanted)] == [has]


def test_a_caller_stays_in_their_business() -> None:
    editor = person("ed", Role.EDITOR)
    assert editor.inside("acme") == editor
    with pytest.raises(NotFoundError, match="'rival'"):
        editor.inside("rival")
    with pytest.raises(NotFoundError):
        NOBODY.inside("acme")
    with pytest.raises(ForbiddenError):
        editor.require_installation()


def test_the_installation_goes_into_any_business_with_the_roles_it_has() -> None:
    reader = Caller("monitor", None, frozenset({Role.VIEWER}), "t1", installation=True)
    inside = reader.inside("acme")
    assert (inside.business, inside.roles, inside.token) == ("acme", reader.roles, "t1")
    assert inside.inside("rival").business == "rival"
    inside.require_installation()
    with pytest.raises(ForbiddenError):
        inside.require(Role.EDITOR)


def test_whoever_sits_beside_the_database_may_do_everything() -> None:
    root = operator("root", "acme")
    root.require_installation()
    assert all(root.may(role) for role in Role)
    assert root.token is None


# ── tokens ──


def test_a_token_says_who_calls_with_which_roles(database: Database) -> None:
    id_, secret = token_of(database)
    caller = who(database, secret)
    assert caller == Caller("bff", "acme", EDITOR, id_, installation=False)


def test_only_the_hash_of_a_token_is_stored(database: Database) -> None:
    _, secret = token_of(database)
    assert secret.startswith("kld_") and len(secret) > 40
    with database.engine.connect() as connection:
        for table in ("api_tokens", "audit"):
            stored = str(connection.execute(sa.text(f"SELECT * FROM {table}")).all())
            assert secret not in stored and secret.removeprefix("kld_") not in stored
        hashes = connection.execute(sa.text("SELECT token_hash FROM api_tokens")).scalars().all()
        assert not any(hash_ in str(connection.execute(sa.text("SELECT * FROM audit")).all()) for hash_ in hashes)


@pytest.mark.parametrize("secret", ["", "kld_", "kld_x", "é\0", "x" * 100_000])
def test_an_unknown_token_is_nobody(database: Database, secret: str) -> None:
    token_of(database)
    with pytest.raises(UnauthenticatedError, match="unknown or was revoked"):
        who(database, secret)


def test_the_hash_is_no_token(database: Database) -> None:
    _, secret = token_of(database)
    with database.transaction(ADMIN) as session:
        (token,) = list_tokens(session)
        assert token.token_hash != secret
    with pytest.raises(UnauthenticatedError):
        who(database, token.token_hash)


def test_a_token_ends_by_itself(database: Database) -> None:
    id_, secret = token_of(database, days=1)
    assert who(database, secret).token == id_
    with database.transaction(ADMIN) as session:
        token = session.get_one(ApiToken, id_)
        assert token.expires_at is not None
        assert timedelta(hours=23) < token.expires_at - now() < timedelta(hours=25)
        token.expires_at = now()
    with pytest.raises(UnauthenticatedError, match="has expired"):
        who(database, secret)


def test_a_revoked_token_ends_now_and_once(database: Database) -> None:
    id_, secret = token_of(database)
    with database.transaction(ADMIN) as session:
        at = revoke_token(session, id_).revoked_at
    with pytest.raises(UnauthenticatedError, match="revoked"):
        who(database, secret)
    with database.transaction(ADMIN) as session:
        assert revoke_token(session, id_).revoked_at == at
        assert [t.id for t in list_tokens(session)] == [id_]


def test_tokens_of_another_business_are_not_there(database: Database) -> None:
    id_, secret = token_of(database)
    with database.transaction(person("spy", business="rival")) as session:
        assert list_tokens(session) == []
        with pytest.raises(NotFoundError, match=id_):
            revoke_token(session, id_)
        with pytest.raises(NotFoundError):
            revoke_token(session, "none")
    assert who(database, secret).business == "acme"


def test_tokens_are_listed_newest_first(database: Database) -> None:
    made = [token_of(database, user=name)[0] for name in ("a", "b", "c")]
    token_of(database, person("x", business="rival"))
    with database.transaction(ADMIN) as session:
        assert [t.id for t in list_tokens(session)] == made[::-1]


def test_a_token_of_the_installation_is_of_no_business(database: Database) -> None:
    with database.transaction(operator("root", None)) as session:
        _, secret = create_token(session, "deploy", frozenset({Role.ADMIN}), installation=True)
        (token,) = list_tokens(session)
    caller = who(database, secret)
    assert caller.installation and caller.business is None
    assert caller.inside("rival").business == "rival"
    for outsider in (ADMIN, operator("root", "acme")):
        with database.transaction(outsider) as session:
            assert list_tokens(session) == []
            with pytest.raises(NotFoundError):
                revoke_token(session, token.id)


def test_an_admin_of_a_business_makes_no_token_of_the_installation(database: Database) -> None:
    with pytest.raises(ForbiddenError, match="token of the installation"), database.transaction(ADMIN) as session:
        create_token(session, "me", frozenset({Role.ADMIN}), installation=True)


def test_only_admins_have_to_do_with_tokens(database: Database) -> None:
    id_, _ = token_of(database)
    for role in set(Role) - {Role.ADMIN}:
        with database.transaction(person("x", role)) as session:
            with pytest.raises(ForbiddenError):
                create_token(session, "x", EDITOR)
            with pytest.raises(ForbiddenError):
                list_tokens(session)
            with pytest.raises(ForbiddenError):
                revoke_token(session, id_)


@pytest.mark.parametrize(
    ("user", "roles", "days", "message"),
    [
        (" ", EDITOR, 1, "user: say whose token"),
        ("x" * 201, EDITOR, 1, "user: .*at most 200"),
        ("x", frozenset(), 1, "roles: give at least one of viewer"),
        ("x", EDITOR, 0, "days: 0 is not between"),
        ("x", EDITOR, 59 / 86_400, "days: 0.000682\\d* is not between one minute"),
        ("x", EDITOR, -1, "days: -1 is not between"),
        ("x", EDITOR, 3651, "days: 3651 is not between"),
        ("x", EDITOR, float("nan"), "days: nan is not between"),
        ("x", EDITOR, float("inf"), "days: inf is not between"),
    ],
)
def test_a_token_needs_somebody_a_role_and_an_end(
    sqlite: Database, user: str, roles: frozenset[Role], days: float, message: str
) -> None:
    with sqlite.transaction(ADMIN) as session, pytest.raises(InputError, match=message):
        create_token(session, user, roles, days=days)
    with sqlite.transaction(ADMIN) as session:
        assert list_tokens(session) == []


def test_a_token_for_a_minute_is_the_shortest(sqlite: Database) -> None:
    with sqlite.transaction(ADMIN) as session:
        token, _ = create_token(session, "x", EDITOR, days=60 / 86_400)
        assert token.expires_at is not None and token.expires_at > datetime.now(UTC)


SEEN = "which cannot be seen"
UNLIKE_WHAT_IT_LOOKS = [
    ("an\u200bna", SEEN),  # zero-width space
    ("an\u200dna", SEEN),
    ("\ufeffanna", SEEN),
    ("an\u00adna", SEEN),  # soft hyphen
    ("anna\u202e", SEEN),
    ("\u2066anna\u2069", SEEN),
    ("anna\u200f", SEEN),
    ("anna\u3164", SEEN),  # Hangul filler, a letter to Unicode
    ("anna\ufe0f", SEEN),
    ("anna\U000e0061", SEEN),  # a tag character
    ("anna\U0001d159", SEEN),  # a musical note without its head
    ("anna\U00016fe4", SEEN),  # a filler
    ("anna\ufffc", SEEN),  # stands for an object
    ("an\u180bna", SEEN),
    ("an\U000e0100na", SEEN),
    ("an\U00013441na", SEEN),  # a blank among hieroglyphs
    ("an\x1bna", SEEN),
    ("an\nna", SEEN),
    ("an\u2028na", SEEN),
    ("аnna", "mixes Cyrillic and Latin"),
    ("anna Рetrova", "mixes Cyrillic and Latin"),
    ("annα", "mixes Greek and Latin"),
    ("ааа\u03b1", "mixes Cyrillic and Greek"),
    ("an\u0578a", "mixes Armenian and Latin"),
    ("\u13aanna", "mixes Cherokee and Latin"),
    ("ann\ua4ee", "mixes Latin and Lisu"),
    ("bi\u3163l", "mixes East Asian and Latin"),  # a vowel of hangul
    ("anna\u05b4", "mixes Hebrew and Latin"),  # a point below the last letter
]
PLAIN = [
    "anna",
    "王小明",
    "Анна Петрова",
    "Νίκος",
    "José Ñandú",
    "O'Brien-Smith",
    "anna@bank.example",
    "نور",
    "王 Anna",
    "Արմեն",
    "佐々木 サーバー",
    "東京タワーの中",
    "김 철수",
    "नमस्ते",
    "สมชาย",
    "Nguyễn",
    "Oʻahu",
]


@pytest.mark.parametrize(("name", "message"), UNLIKE_WHAT_IT_LOOKS)
def test_a_name_that_is_not_what_it_looks_like_is_nobodys(sqlite: Database, name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"user: .*{message}"):
        operator(name, "acme")
    with sqlite.transaction(ADMIN) as session, pytest.raises(InputError, match=f"user: .*{message}"):
        create_token(session, name, EDITOR)


@pytest.mark.parametrize("name", PLAIN)
def test_names_in_any_one_alphabet_stay_as_they_are(sqlite: Database, name: str) -> None:
    assert operator(name, "acme").user == name
    with sqlite.transaction(ADMIN) as session:
        assert create_token(session, f" {name} ", EDITOR)[0].user == name


@pytest.mark.parametrize("name", ["ａｎｎａ lee", "anna\u00a0 lee", "  anna\u3000lee ", "anna  lee"])
def test_ways_to_write_a_name_that_look_alike_are_one_name(name: str) -> None:
    assert check_user(name) == "anna lee"
    assert check_user("Jose\u0301") == "José"


@pytest.mark.parametrize("names", [("Zoe", "zoe"), ("ZOË", "zoë"), ("Straße", "STRASSE"), ("АННА", "Анна")])
def test_a_person_is_the_same_however_the_name_is_cased(names: tuple[str, str]) -> None:
    assert person_key(names[0]) == person_key(names[1])
    assert person_key("Zoe") != person_key("Zoë")


@pytest.mark.parametrize(
    "name", [RULE, f" {RULE.upper()}", RULE.replace(":", "："), RULE.replace(" ", "  "), RULE + "."]
)
def test_nobody_is_called_as_the_rule_that_approves(sqlite: Database, name: str) -> None:
    with sqlite.transaction(ADMIN) as session, pytest.raises(InputError, match="approvals by the rule"):
        create_token(session, name, EDITOR)
    with pytest.raises(InputError, match="approvals by the rule"):
        operator(name, None)


def test_the_trail_says_who_made_and_who_ended_a_token(database: Database) -> None:
    id_, _ = token_of(database)
    with database.transaction(person("other")) as session:
        revoke_token(session, id_)
    with database.engine.connect() as connection:
        rows = connection.execute(
            sa.text("SELECT actor, action, key, business_id FROM audit WHERE entity = 'api_tokens' ORDER BY seq")
        ).all()
    assert [tuple(row) for row in rows] == [("admin", "created", id_, "acme"), ("other", "changed", id_, "acme")]
