"""Businesses, tokens and the audit trail; the schema of the database."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kaleidoscope.operator_cli.frame import (
    Cursor,
    JsonOption,
    Limit,
    Output,
    Version,
    Work,
    command,
    items,
    list_in,
    more,
    none_of,
    short,
    when,
    words,
)
from kaleidoscope.terminal import fields, table
from kaleidoscope.vocabulary import Role

if TYPE_CHECKING:
    from kaleidoscope.views import AuditView

database_group = typer.Typer(name="database", help="The schema of the platform's database.", no_args_is_help=True)
business_group = typer.Typer(
    name="business", help="Businesses: the tenants that own materials and scenes.", no_args_is_help=True
)
token_group = typer.Typer(name="token", help="API tokens, for programs and the console.", no_args_is_help=True)


@database_group.command("upgrade")
def database_upgrade(as_json: JsonOption = False) -> None:
    """Make the schema, or bring it to what this version needs, that of the log's database too. Back up first."""
    from kaleidoscope.database import Database, revisions, upgrade

    def one(url: str) -> dict[str, object]:
        with Database(url) as database:
            before, needed = revisions(database)
            if before != needed:
                upgrade(database)
            return {"database": database.name, "before": before, "revision": needed}

    def said(done: Mapping[str, object]) -> str:
        before, needed = done["before"], done["revision"]
        what = "is up to date" if before == needed else f"is upgraded from {before or 'nothing'}"
        return f"{done['database']} {what}: revision {needed}"

    value = _of_both(one)
    Output(value, *map(said, _each(value))).print(as_json=as_json)


@database_group.command("status")
def database_status(as_json: JsonOption = False) -> None:
    """Say which schema the database has, that of the log too, and which one this version needs."""
    from kaleidoscope.database import Database, revisions

    def one(url: str) -> dict[str, object]:
        with Database(url) as database:
            revision, needed = revisions(database)
            return {"database": database.name, "revision": revision, "needed": needed, "up_to_date": revision == needed}

    value = _of_both(one)
    shown = [
        fields({"database": v["database"], "revision": v["revision"] or "none: it is empty", "needed": v["needed"]})
        for v in _each(value)
    ]
    hint = [] if all(v["up_to_date"] for v in _each(value)) else ["Run `kaleidoscope database upgrade`."]
    Output(value, *shown, *hint).print(as_json=as_json)


def _of_both(one: Callable[[str], dict[str, object]]) -> dict[str, Any]:
    """What `one` says of the platform's database, and as its `log` of the log's, where that is another that is there:
    an empty one gets its schema when the first server opens it."""
    from kaleidoscope.database import Database
    from kaleidoscope.settings import load_settings

    settings = load_settings()
    value = one(settings.database_url)
    with Database(settings.log_url) as named:
        absent = named.sqlite and not Path(str(named.url.database)).exists()
    return value | {"log": None if absent or settings.log_url == settings.database_url else one(settings.log_url)}


def _each(value: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value, value["log"]] if value["log"] else [value]


# ── businesses, tokens, audit ─────────────────────────────────────────────────────────────────────────────────────────

BusinessId = Annotated[str | None, typer.Argument(metavar="[ID]", help="Default: --business.")]
TwoPersons = Annotated[
    bool | None,
    typer.Option(
        "--two-person-publish/--one-person-publish", help="Whoever drafted a release may not be the one to start it."
    ),
]


def _business_output(row: object) -> Output:
    from kaleidoscope.views import BusinessView

    view = BusinessView.model_validate(row)
    names = ", ".join(f"{{{p.name}}}" for p in view.placeholders)
    return Output(
        view,
        fields(
            {
                "id": view.id,
                "name": view.name,
                "two-person publish": "yes" if view.two_person_publish else "no",
                "placeholders": names,
                "version": view.version,
            }
        ),
    )


@command(business_group, "create", write=True, founds=True)
def business_create(
    work: Work,
    business_id: Annotated[str, typer.Argument(metavar="ID", help="Lower-case letters, digits, - and _.")],
    name: Annotated[str | None, typer.Option("--name", help="What people call it. Default: the ID.")] = None,
    two_person_publish: TwoPersons = False,
) -> Output:
    """Found a business, with the built-in tag vocabulary and placeholders."""
    from kaleidoscope.businesses import create_business

    called = business_id if name is None else name
    return _business_output(create_business(work.session, called, two_person_publish=bool(two_person_publish)))


@command(business_group, "list")
def business_list(work: Work, cursor: Cursor = None, limit: Limit = 50) -> Output:
    """List the businesses."""
    from kaleidoscope.businesses import list_businesses
    from kaleidoscope.views import BusinessView, page_view

    page = page_view(list_businesses(work.session, cursor=cursor, limit=limit), BusinessView.model_validate)
    rows = [(b.id, b.name, "yes" if b.two_person_publish else "no") for b in page.items]
    shown = table(("id", "name", "two-person publish"), rows, whole=("id",))
    return Output(page, shown, *none_of(rows, "businesses"), *more(page.next_cursor))


@command(business_group, "show")
def business_show(work: Work, business_id: BusinessId = None) -> Output:
    """Show a business."""
    from kaleidoscope.businesses import get_business

    return _business_output(get_business(work.session))


@command(business_group, "set", write=True)
def business_set(
    work: Work,
    business_id: BusinessId = None,
    name: Annotated[str | None, typer.Option("--name", help="What people call it.")] = None,
    two_person_publish: TwoPersons = None,
    placeholders: Annotated[
        Path | None,
        typer.Option("--placeholders", exists=True, dir_okay=False, help="All placeholders of copy (a list, YAML)."),
    ] = None,
    version: Version = None,
) -> Output:
    """Change what is given of a business."""
    from kaleidoscope.businesses import change_business
    from kaleidoscope.content import parse_placeholders

    given = None if placeholders is None else list_in(placeholders)
    changed = change_business(
        work.session,
        version=version,
        name=name,
        two_person_publish=two_person_publish,
        placeholders=None if given is None else parse_placeholders(given),
    )
    return _business_output(changed)


Installation = Annotated[
    bool, typer.Option("--installation", help="Of the installation as a whole, for every business, not of one.")
]


@command(token_group, "create", write=True)
def token_create(
    work: Work,
    for_user: Annotated[str, typer.Option("--user", help="Whose token it is.")],
    roles: Annotated[list[Role], typer.Option("--role", help="What it may do; repeat it.")],
    days: Annotated[float, typer.Option("--days", help="How long it is good for.")] = 90,
    installation: Installation = False,
) -> Output:
    """Make an API token. Its secret is shown this once."""
    from kaleidoscope.businesses import get_business
    from kaleidoscope.tokens import create_token
    from kaleidoscope.views import TokenView

    if not installation:
        get_business(work.session)
    row, secret = create_token(work.session, for_user, frozenset(roles), days=days, installation=installation)
    view = TokenView.of(row)
    return Output(
        {"token": view, "secret": secret},
        f"Token {view.id} for {view.user}, good until {when(view.expires_at)}. Copy it now, it is never shown again:",
        secret,
    )


@command(token_group, "list")
def token_list(work: Work, installation: Installation = False) -> Output:
    """List the tokens of the business, newest first, without their secrets."""
    from kaleidoscope.tokens import list_tokens
    from kaleidoscope.views import TokenView

    views = [TokenView.of(row) for row in list_tokens(work.session)]
    now = datetime.now(UTC)
    rows = []
    for view in views:
        expired = view.expires_at is not None and view.expires_at <= now
        state = "revoked" if view.revoked_at is not None else "expired" if expired else "good"
        rows.append((view.id, view.user, ", ".join(view.roles), state, when(view.expires_at)))
    return Output(
        items(views),
        table(("id", "user", "roles", "state", "expires"), rows, whole=("id", "expires")),
        *none_of(rows, "tokens"),
    )


@command(token_group, "revoke", write=True)
def token_revoke(
    work: Work, token: Annotated[str, typer.Argument(metavar="ID")], installation: Installation = False
) -> Output:
    """End a token now."""
    from kaleidoscope.tokens import revoke_token
    from kaleidoscope.views import TokenView

    view = TokenView.of(revoke_token(work.session, token))
    return Output(view, f"Revoked token {view.id} of {view.user}.")


def audit(
    work: Work,
    entity: Annotated[
        str | None, typer.Option("--entity", help="Only changes of this table, such as materials, scenes, ledger.")
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Only changes of the row with this key.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Output:
    """Show who changed what in the business, newest first."""
    from kaleidoscope.businesses import audit_trail, get_business
    from kaleidoscope.views import AuditView, page_view

    get_business(work.session)
    found = audit_trail(work.session, entity=entity, key=key, cursor=cursor, limit=limit)
    page = page_view(found, AuditView.model_validate)
    rows = [(e.seq, when(e.at), short(e.actor, 20), _done(e)) for e in page.items]
    shown = table(("seq", "at", "who", "what"), rows, whole=("seq", "at"))
    return Output(page, shown, *none_of(rows, "changes"), *more(page.next_cursor))


# Of a row's change, what says nothing to people: what is counted or hashed, and the time once more.
_UNTOLD = {"version", "content_hash", "fingerprint", "reviewed_at"}


def _done(entry: AuditView) -> str:
    """What was done, to which row; of a change also the plain values before and after."""
    before, after = entry.before or {}, entry.after or {}
    told = {
        name: [short("none" if v is None else str(v), 40) for v in (before.get(name), value)]
        for name, value in after.items()
        if entry.action == "changed" and name not in _UNTOLD and not isinstance(value, dict | list)
    }
    changes = ", ".join(f"{words(name)}: {old} → {new}" for name, (old, new) in told.items())
    return f"{entry.action} {entry.entity} {entry.key}" + (f", {changes}" if changes else "")
