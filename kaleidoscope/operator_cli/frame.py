"""What every operator's command shares: its options, its one transaction, reading what people type, and its output."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kaleidoscope.errors import InputError, NotFoundError
from kaleidoscope.terminal import print_json, print_lines

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table

    from kaleidoscope.access import Caller
    from kaleidoscope.content import Content, Tag
    from kaleidoscope.database import Session
    from kaleidoscope.review import Moved
    from kaleidoscope.settings import Settings

    Model = TypeVar("Model", bound=BaseModel)

SHOWN = 60  # characters of a text in a table
MOST = 2**31 - 1  # the largest number that databases count to

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]
BusinessOption = Annotated[
    str | None, typer.Option("--business", help="The business to work in. Default: KALEIDOSCOPE_BUSINESS.")
]
UserOption = Annotated[
    str | None, typer.Option("--as", metavar="USER", help="Who is working. Default: KALEIDOSCOPE_USER, or your login.")
]
Cursor = Annotated[str | None, typer.Option("--cursor", help="Where the page begins: what the one before ended with.")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=500, help="Items to show.")]
File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, metavar="FILE")]
Out = Annotated[Path | None, typer.Argument(dir_okay=False, metavar="[FILE]", help="Default: stdout.")]
Scene = Annotated[str, typer.Argument(metavar="SCENE", help="Id of the scene.")]
Note = Annotated[str, typer.Option("--note", help="Why, for whoever reads it later.")]
Version = Annotated[
    int | None,
    typer.Option("--version", min=1, max=MOST, help="Refuse if somebody has changed this version meanwhile."),
]
Reason = Annotated[str | None, typer.Option("--reason", help="Why, for the author and whoever reads it later.")]
Tags = Annotated[list[str] | None, typer.Option("--tag", metavar="DIMENSION=VALUE", help="A tag; repeat it.")]


@dataclass(frozen=True)
class Work:
    """What a command works with."""

    session: Session
    settings: Settings
    watched: bool = False  # somebody sits at a terminal, and can be asked


class Output:
    """What a command says: a value for machines, lines and tables for people."""

    def __init__(self, value: object, *shown: str | Table) -> None:
        self.value, self.shown = value, shown

    def print(self, *, as_json: bool) -> None:
        """To stdout."""
        if as_json:
            from pydantic_core import to_jsonable_python

            print_json(to_jsonable_python(self.value))
        else:
            print_lines(*self.shown)


def command(
    group: typer.Typer,
    name: str,
    *,
    write: bool = False,
    founds: bool = False,
    first: Callable[..., Mapping[str, object]] | None = None,
) -> Callable[[Callable[..., Output]], Any]:
    """Register `job(work, …)` as a command with --business, --as and --json, that runs in one transaction.

    Its argument `business_id`, where it has one, is the business; with `installation` there is none. What it returns
    is printed once the transaction is committed. Only one that `founds` makes a database where there is none: any other
    would find nothing in it. `first(work, …)` is called before, with a session that only reads, and gives the job more
    arguments: those that are keyword-only are no options of the command.
    """

    def register(job: Callable[..., Output]) -> Callable[..., Output]:
        signature = inspect.signature(job, eval_str=True)
        _, *parameters = (p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY)

        def run(business: str | None, user: str | None, as_json: bool, **given: Any) -> None:
            from kaleidoscope.database import open_database
            from kaleidoscope.settings import load_settings

            _refuse_unstorable(business, user, *given.values())
            settings = load_settings()
            within = given.get("business_id") or business or settings.business
            caller = _caller(user or settings.user, None if given.get("installation") else within)
            missing = _missing_database(settings)
            if not (founds or (write and given.get("installation"))):
                require_database(settings)
            watched = not as_json and _at_a_terminal()
            with open_database(settings.database_url) as database:
                if missing is not None:
                    typer.echo(f"Made the database {missing}.", err=True)
                if first is not None:
                    with database.transaction(caller, write=False) as session:
                        given |= first(Work(session, settings, watched), **given)
                with database.transaction(caller, write=write) as session:
                    output = job(Work(session, settings, watched), **given)
            output.print(as_json=as_json)

        common = [
            inspect.Parameter("business", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=BusinessOption),
            inspect.Parameter("user", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=UserOption),
            inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=JsonOption),
        ]
        run.__doc__ = job.__doc__
        run.__signature__ = inspect.Signature([*parameters, *common])  # type: ignore[attr-defined]
        group.command(name, help=inspect.getdoc(job))(run)
        return job

    return register


def require_database(settings: Settings) -> None:
    """Raise NotFoundError where the SQLite file that the settings name is not there."""
    missing = _missing_database(settings)
    if missing is not None:
        raise NotFoundError(
            f"There is no database {missing} yet, and so nothing to work with: is this the right folder?"
            " `kaleidoscope business create ID` makes it; KALEIDOSCOPE_DATABASE_URL names another."
        )


def _missing_database(settings: Settings) -> Path | None:
    """Where the SQLite file would be made that the settings name; None: it is there, or cannot be told or made."""
    from kaleidoscope.database import Database

    with Database(settings.database_url) as database:
        name = database.url.database or ""
        path = Path(name).absolute()
        told = database.sqlite and not name.startswith("file:")
        return path if told and not path.exists() and path.parent.is_dir() else None


def _at_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _refuse_unstorable(*given: object) -> None:
    """No database stores the character U+0000, nor the bytes that are no UTF-8 and reach us as halves of pairs."""
    for value in given:
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
                shown = text.encode("utf-8", "replace").decode().replace("\0", "?")
                raise InputError(f"{shown!r} holds characters that cannot be stored. Give text in UTF-8.")


def _caller(user: str | None, business: str | None) -> Caller:
    from kaleidoscope.access import operator

    if user is None:
        import getpass

        try:
            user = getpass.getuser()
        except (KeyError, OSError, ImportError):
            raise InputError("this machine does not say who you are: give `--as USER`, or KALEIDOSCOPE_USER") from None
    if not user.strip() or any(ord(c) < 32 for c in user):
        raise InputError("--as: say who is working, on one line.")
    return operator(user.strip(), business)


# ── reading what people type ──────────────────────────────────────────────────────────────────────────────────────────


def pairs_in(option: str, texts: Iterable[str]) -> list[tuple[str, str]]:
    """The names and values in texts such as image_style=flat; raises InputError naming the option."""
    pairs = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise InputError(f"{option}: {text!r} is not NAME=VALUE, such as image_style=flat.")
        pairs.append((name.strip(), value.strip()))
    return pairs


def tags_in(texts: Iterable[str]) -> tuple[Tag, ...]:
    """The tags in texts such as image_style=flat."""
    from kaleidoscope.content import parse_tags

    return parse_tags({"dimension": d, "value": v} for d, v in pairs_in("--tag", texts))


def moment_in(option: str, text: str | None) -> datetime | None:
    """The moment in a text; without a zone it is UTC. Raises InputError naming the option."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(
            f"{option}: {text!r} is no time. Write it like 2026-11-28T20:00+08:00; without a zone it is UTC."
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def write_out(text: str, path: Path | None) -> str:
    """Write to a file and say so, or return the text."""
    if path is None:
        return text.rstrip("\n")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error}.") from None
    return f"Wrote {path}"


def list_in(path: Path) -> list[Any]:
    """The list in a YAML file."""
    from kaleidoscope.yaml_text import load_yaml

    document = load_yaml(path, docs="docs/cli.md")
    if not isinstance(document, list):
        raise InputError(f"{path}: give a list.")
    return document


def validated(where: str, model: type[Model], raw: object) -> Model:
    """What a document from outside says; raises InputError that names every wrong field as `where`.field."""
    from pydantic import ValidationError

    from kaleidoscope.content import explain

    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise InputError(explain(where, error)) from None


# ── showing what services return ──────────────────────────────────────────────────────────────────────────────────────


def short(text: str, most: int = SHOWN) -> str:
    """The text on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def when(moment: datetime | None) -> str | None:
    """A moment, to the second."""
    return None if moment is None else moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def words(name: str) -> str:
    """A name of a state or a field as words."""
    return name.replace("_", " ")


def listing(values: Mapping[str, object]) -> str:
    """`name=value, name=value`."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def percent(share: float) -> str:
    """A share of the traffic."""
    return f"{share * 100:.6g} %"


def items(found: Sequence[object]) -> dict[str, object]:
    """A list as one JSON object, in the shape of a page."""
    return {"items": list(found)}


def more(cursor: str | None) -> list[str]:
    """How to get the next page, where there is one."""
    return [] if cursor is None else [f"There are more: --cursor {cursor}"]


def none_of(rows: Sequence[object], what: str) -> list[str]:
    """A line that says so where there is nothing."""
    return [] if rows else [f"No {what}."]


def moved_output(done: str, moved: Moved) -> Output:
    """What a step of the review did."""
    from kaleidoscope.views import MovedView

    skipped = [f"Skipped {n:,}: {why}" for why, n in moved.skipped.items()]
    notes = [f"Note: {sentence(note)}" for note in moved.notes]
    return Output(MovedView.of(moved), f"{done} {moved.moved:,}.", *skipped, *notes)


def cut(lines: Sequence[str], most: int = 20) -> list[str]:
    """The first lines, and how many more there are."""
    return [*lines[:most], *([f"… and {len(lines) - most:,} more (--json has them all)"] if len(lines) > most else [])]


def headed(headline: str, lines: Sequence[str], most: int = 10) -> list[str]:
    """Lines under a headline; nothing where there are none."""
    return [f"{headline}:", *(f"  {line}" for line in cut(lines, most))] if lines else []


def sentence(text: str) -> str:
    """The text, with a full stop."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


def gist(content: Content) -> str:
    """What a material is, in a few words."""
    match content.kind:
        case "copy":
            return short(content.title)
        case "image":
            return short(f"{content.width} × {content.height} px {content.alt}")
        case "layout":
            return f"{content.width} × {content.height} px"
        case "style":
            return short(f"{content.applies_to or 'everything'}: {content.property} {content.value}")


# ── review ────────────────────────────────────────────────────────────────────────────────────────────────────────────

MOVES_HELP = {
    "submit": ("Submitted", "Hand in drafts for review."),
    "approve": ("Approved", "Approve what is in review. Nobody approves their own."),
    "reject": ("Rejected", "Reject, with a reason."),
    "retire": ("Retired", "Take out of use."),
    "restore": ("Restored", "Make drafts of what was retired."),
}
