"""Businesses: what they are called, which placeholders copy may hold, and the trail of who changed it."""

from __future__ import annotations

import pytest

from kaleidoscope.businesses import audit_trail, change_business, copies_holding, create_business, placeholders_of
from kaleidoscope.content import DEFAULT_PLACEHOLDERS, Copy
from kaleidoscope.database import Database
from kaleidoscope.errors import ConflictError, InputError
from kaleidoscope.materials import add_material, change_material
from kaleidoscope.review import move_materials
from kaleidoscope.tables import Business
from kaleidoscope.taxonomy import found_taxonomy
from tests.kaleidoscope.people import person

ADA = person("ada")
WITHOUT_YIELD = tuple(p for p in DEFAULT_PLACEHOLDERS if p.name != "yield")


def with_copies(database: Database, copies: int = 1, business: str = "acme") -> None:
    """The business has the built-in placeholders, and copies of which each holds {yield}."""
    with database.transaction(person("ada", business=business)) as session:
        found_taxonomy(session)
        change_business(session, version=None, placeholders=DEFAULT_PLACEHOLDERS)
        for n in range(copies):
            add_material(session, f"c{n}", Copy(title=f"{n} times {{yield}} and {{{{yield}}}} for {{first_name}}"))
        add_material(session, "plain", Copy(title="Save"))


def test_a_placeholder_that_copies_in_use_hold_is_not_removed(database: Database) -> None:
    with_copies(database, 7)
    with database.transaction(ADA) as session:
        assert copies_holding(session, {"yield", "city"}) == {"yield": [f"c{n}" for n in range(7)]}
    with (
        database.transaction(ADA) as session,
        pytest.raises(ConflictError, match=r"copies c0, c1, c2, c3, c4 and 2 more hold \{yield\}\. .*change or retire"),
    ):
        change_business(session, version=None, placeholders=WITHOUT_YIELD)
    with database.transaction(ADA) as session:
        assert placeholders_of(session.get_one(Business, "acme")) == DEFAULT_PLACEHOLDERS
        move_materials(session, "retire", [f"c{n}" for n in range(6)])
    with (
        database.transaction(ADA) as session,
        pytest.raises(ConflictError, match=r"copy c6 holds \{first_name\}; copy c6 holds \{yield\}\. "),
    ):
        change_business(session, version=None, placeholders=[])
    with database.transaction(ADA) as session:
        change_material(session, "c6", content=Copy(title="A lot for {first_name}"), version=None)
        changed = change_business(session, version=None, placeholders=WITHOUT_YIELD)
        assert placeholders_of(changed) == WITHOUT_YIELD


def test_copies_of_another_business_keep_nothing(database: Database) -> None:
    with_copies(database)
    with_copies(database, 0, "rival")
    with database.transaction(person("eve", business="rival")) as session:
        assert copies_holding(session, {"yield"}) == {}
        change_business(session, version=None, placeholders=[])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Ac\u200bme", "cannot be seen"),
        ("Acme\u202e", "cannot be seen"),
        ("Аcme Bank", "'Аcme' mixes Cyrillic and Latin"),
        (" ", "1 to 200 characters"),
        ("x" * 201, "1 to 200 characters"),
        ("a\nb", "on one line"),
    ],
)
def test_a_business_is_called_what_people_can_read(sqlite: Database, name: str, message: str) -> None:
    with sqlite.transaction(ADA) as session, pytest.raises(InputError, match=f"name: .*{message}"):
        change_business(session, version=None, name=name)


@pytest.mark.parametrize("name", ["招商银行", "Альфа-Банк", "Café ① & 東京", "株式会社 Acme"])
def test_a_business_is_called_as_it_wants_in_any_script(sqlite: Database, name: str) -> None:
    with sqlite.transaction(ADA) as session:
        assert change_business(session, version=None, name=name).name == name
        assert change_business(session, version=None, name="Cafe\u0301").name == "Café"


def test_the_trail_shows_who_switched_two_person_publishing_off(database: Database) -> None:
    with database.transaction(ADA) as session:
        change_business(session, version=None, two_person_publish=True)
    with database.transaction(person("eve")) as session:
        change_business(session, version=None, two_person_publish=False)
    with database.transaction(person("vic"), write=False) as session:
        last = audit_trail(session, entity="businesses").items[0]
    assert (last.actor, last.action, last.key) == ("eve", "changed", "acme")
    assert last.before is not None and last.before["two_person_publish"] is True
    assert last.after is not None and last.after["two_person_publish"] is False


def test_a_business_is_founded_under_a_readable_name(sqlite: Database) -> None:
    from kaleidoscope.access import operator

    with sqlite.transaction(operator("root", "third")) as session, pytest.raises(InputError, match="cannot be seen"):
        create_business(session, "Thi\u2060rd")
