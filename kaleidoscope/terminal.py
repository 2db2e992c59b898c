"""What a command prints: one JSON object for machines, tables and lines for people.

Text from the database is shown as it is written: never taken for markup, and without the control characters that
steer a terminal. Imports nothing heavy.
"""

from __future__ import annotations

import io
import json
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDE = 500  # columns of what is no terminal: a row stays on a line

# Embeddings, overrides and isolates: one that is left open turns the text around it.
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str) -> str:
    """The text without what could steer a terminal; lines stay lines.

    >>> printable("a\\x1b[31mb\\nc")
    'a[31mb\\nc'
    """
    return "".join(
        c for c in text if c == "\n" or not (c in _BIDI_CONTROLS or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"))
    )


def print_json(value: Any) -> None:
    """Print one JSON object; ValueError for NaN, which is not JSON: unknown is null."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def console(*, stderr: bool = False) -> Console:
    """Where people read."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def print_lines(*shown: str | Table) -> None:
    """Print lines and tables on stdout. Lines are not wrapped: people and scripts copy them."""
    from rich.text import Text

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows ? instead
    out = console()
    for item in shown:
        if isinstance(item, str):
            out.print(Text(printable(item)), soft_wrap=True)
        elif out.is_terminal:
            out.print(item)
        else:
            out.width = WIDE
            with out.capture() as captured:
                out.print(item)
            sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, whole: Sequence[str] = ()) -> Table:
    """A table of plain text; None is an empty cell. The columns in `whole` are never broken."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(
            column.replace("_", " "), no_wrap=column in whole, overflow="ignore" if column in whole else "fold"
        )
    for row in rows:
        made.add_row(*(Text("" if cell is None else printable(str(cell))) for cell in row))
    return made


def fields(values: Mapping[str, object]) -> Table:
    """Names and values, one pair a line; what is None or empty is left out."""
    from rich.table import Table
    from rich.text import Text

    made = Table.grid(padding=(0, 2))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in values.items():
        if value is not None and value != "":
            made.add_row(Text(name.replace("_", " "), style="dim"), Text(printable(str(value))))
    return made
