"""Materials to variants: the space of combinations, its constraints, and every question about it without a database.

Reading constraints, exploding into Arrow, counting and sampling without enumerating, and finding what is wrong with a
space. Which few of very many variants to show is `coverage.py`; docs/combiner.md has the grammar and the semantics.
Everything compiles to **nogoods**: a set of options per slot that must not come together.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, combinations, product
from types import MappingProxyType
from typing import Any, Literal, NoReturn

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kaleidoscope.errors import InputError, TooComplexError
from kaleidoscope.vocabulary import Level

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Lanes = NDArray[np.uint64]

VARIANT_ID = "variant_id"
ID_DIGITS = 24  # 96 bits
BATCH_ROWS = 65_536
LARGEST_TABLE = 2**22  # entries of an intermediate table (32 MiB); beyond, sums go another way
LARGEST_LOOKAHEAD = 2**18  # entries of a table that cuts dead prefixes in explode; beyond, it is left out
MOST_STATES = 2**20  # that are summed up together
MOST_PROPOSALS = 10_000_000  # of a sample that is thinned out to the legal ones
MOST_WORK = 4e9  # entries of tables looked at, about, that one question about a space may take: some ten seconds
CALL_WORK = 2_000  # what a call of numpy costs, in entries
MOST_SLOTS_LISTED = 4  # a rule on "any slot" that comes to pairs of so many slots is taken as pairs
KEYWORDS = ("forbid", "require", "with", "when", "matches")


# ------------------------------------------------------------------------------------------------ how much work


@dataclass
class _Work:
    left: float


_work: ContextVar[_Work | None] = ContextVar("work", default=None)


@contextmanager
def work_limit(entries: float = MOST_WORK) -> Iterator[None]:
    """Let everything in the block together look at so many entries of tables; beyond, it raises TooComplexError.

    Within another limit that one holds. Counted and not timed, so that the answer is the same on every machine.
    """
    if _work.get() is not None:
        yield
        return
    token = _work.set(_Work(entries))
    try:
        yield
    finally:
        _work.reset(token)


def spend(entries: float) -> None:
    """Count work against the limit, if there is one."""
    work = _work.get()
    if work is None:
        return
    work.left -= entries
    if work.left < 0:
        raise TooComplexError(
            "the materials are too many, or the rules tie too many slots together, to work this out in reasonable time."
            " Use fewer rules (by tag rather than by material), fewer slots or materials, or a lower cap."
        )


# ------------------------------------------------------------------------------------------------ the space


@dataclass(frozen=True)
class Option:
    """A material as the combiner sees it: its id, and its tags by dimension (several values are allowed)."""

    id: str
    tags: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Slot:
    """What a scene varies, and the options for it in the order in which the variants are to be listed."""

    name: str
    options: tuple[Option, ...]


@dataclass(frozen=True, eq=False)
class Forbidden:
    """Pairs of options that a check outside (contrast, overflow) ruled out; `name` stands for it in findings.

    `table` is (options of `first`, options of `second`), True where the two must not come together.
    """

    first: str
    second: str
    table: Bools
    name: str = "forbidden pairs"


@dataclass(frozen=True, eq=False)
class Space:
    """All combinations of one option per slot that no constraint and no forbidden pair rules out.

    A constraint may name materials and tags that no option has (they may have been retired); `diagnose` reports them.
    Raises InputError for slots without a name of their own, constraints on unknown slots, and tables that do not fit.
    """

    slots: tuple[Slot, ...]
    constraints: tuple[Constraint, ...] = ()
    forbidden: tuple[Forbidden, ...] = ()

    def __post_init__(self) -> None:
        names = [slot.name for slot in self.slots]
        if not names:
            raise InputError("a space needs at least one slot")
        for name in names:
            if not name or name == VARIANT_ID or names.count(name) > 1:
                raise InputError(
                    f"slot {name!r}: a slot needs a name that is its own, not empty and not {VARIANT_ID!r}"
                )
        for constraint in self.constraints:
            _check_names(str(constraint), _Parser(str(constraint)).read()[1], self.slots, {}, kinds=("slot",))
        for pairs in self.forbidden:
            for name in (pairs.first, pairs.second):
                if name not in names:
                    raise InputError(f"{pairs.name}: no slot is called {name!r}; slots are {', '.join(names)}")
            shape = tuple(len(self.slots[names.index(name)].options) for name in (pairs.first, pairs.second))
            if pairs.first == pairs.second or pairs.table.shape != shape or pairs.table.dtype != np.bool_:
                raise InputError(
                    f"{pairs.name}: the table of {pairs.first} and {pairs.second} is {pairs.table.dtype} of shape "
                    f"{pairs.table.shape}; it must be bool of shape {shape}, for two different slots"
                )

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of options of every slot."""
        return tuple(len(slot.options) for slot in self.slots)

    @cached_property
    def positions(self) -> tuple[Mapping[str, int], ...]:
        """Per slot, where each material id stands among the options."""
        return tuple({option.id: i for i, option in enumerate(slot.options)} for slot in self.slots)

    @cached_property
    def rules(self) -> tuple[tuple[str, tuple[Nogood, ...]], ...]:
        """Every constraint and every forbidden table: its text, and the nogoods it comes to (none: forbids nothing)."""
        compiled = [(str(c), _nogoods(self.slots, c)) for c in self.constraints]
        names = [slot.name for slot in self.slots]
        for pairs in self.forbidden:
            i, j = names.index(pairs.first), names.index(pairs.second)
            key, table = ((i, j), pairs.table) if i < j else ((j, i), pairs.table.T)
            compiled.append((pairs.name, (Nogood({}, {key: table}),) if table.any() else ()))
        return tuple(compiled)

    @cached_property
    def lanes(self) -> tuple[Lanes, ...]:
        """Per slot, the (options, 2) hash lanes that add up to a variant's id."""
        return tuple(
            np.array([_lanes(slot.name, option.id) for option in slot.options], np.uint64).reshape(-1, 2)
            for slot in self.slots
        )


# ------------------------------------------------------------------------------------------------ constraints


@dataclass(frozen=True)
class MaterialTerm:
    """`slot:a|b`: the slot shows one of these materials."""

    slot: str
    ids: tuple[str, ...]

    def __str__(self) -> str:
        return f"{_quoted(self.slot)}:{'|'.join(map(_quoted, self.ids))}"


@dataclass(frozen=True)
class TagTerm:
    """`slot.dimension=a|b`: the slot's material carries one of these values; without slot, any slot's material does.

    No values stand for `*`: any value of the dimension.
    """

    slot: str | None
    dimension: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        where = "" if self.slot is None else f"{_quoted(self.slot)}."
        return f"{where}{_quoted(self.dimension)}={'|'.join(map(_quoted, self.values)) or '*'}"


@dataclass(frozen=True)
class MatchTerm:
    """`slot.dimension matches slot.dimension`: the two materials share at least one value."""

    first: tuple[str, str]
    second: tuple[str, str]

    def __str__(self) -> str:
        (a, b), (c, d) = self.first, self.second
        return f"{_quoted(a)}.{_quoted(b)} matches {_quoted(c)}.{_quoted(d)}"


Term = MaterialTerm | TagTerm | MatchTerm


@dataclass(frozen=True)
class Constraint:
    """A rule of a space. `forbid`: the terms never hold together. `require`: each holds wherever all of `when` do.

    `str` renders the canonical expression, and `parse(str(c)) == c`.
    """

    kind: Literal["forbid", "require"]
    terms: tuple[Term, ...]
    when: tuple[Term, ...] = ()

    def __str__(self) -> str:
        text = f"{self.kind} {' with '.join(map(str, self.terms))}"
        return f"{text} when {' with '.join(map(str, self.when))}" if self.when else text


def parse(
    text: str, slots: Sequence[Slot] | None = None, known_tags: Mapping[str, Collection[str]] = MappingProxyType({})
) -> Constraint:
    """Return the constraint that an expression such as "forbid copy.benefit=cash with image:i7" says.

    With `slots`, every name must be known there; `known_tags` (dimension → values) adds what no option carries yet.
    Raises InputError that names the expression, the position (from 1), what was expected there, and the nearest name.

    >>> print(parse("forbid copy.benefit=red_packet,cash with 'hero image':i7"))
    forbid copy.benefit=red_packet|cash with "hero image":i7
    """
    constraint, names = _Parser(text).read()
    if slots is not None:
        _check_names(text, names, slots, known_tags)
    return constraint


@dataclass(frozen=True)
class _Token:
    kind: str  # word, quoted, mark, end
    text: str
    at: int


@dataclass(frozen=True)
class _Name:
    """A name in an expression: `within` is (slot or "",) of a dimension, (slot or "", dimension) of a value."""

    kind: str  # slot, material, dimension, value
    text: str
    at: int
    within: tuple[str, ...] = ()


_TOKEN = re.compile(
    r"""(?P<space>\s+)|(?P<word>[\w-]+)|(?P<quoted>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|(?P<mark>[.:=|,*])""", re.S
)


class _Parser:
    """Recursive descent over one expression; keeps where every name stood."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = self._tokens()
        self.at = 0
        self.names: list[_Name] = []

    def read(self) -> tuple[Constraint, list[_Name]]:
        kinds: tuple[Literal["forbid", "require"], ...] = ("forbid", "require")
        kind = next((kind for kind in kinds if self.take_word(kind)), None)
        if kind is None:
            near = difflib.get_close_matches(self.next.text, kinds, n=1)
            self.fail("`forbid` or `require`", f"; did you mean `{near[0]}`?" if near else "")
        terms = self.terms()
        when = self.terms() if kind == "require" and self.take_word("when") else ()
        if self.next.kind != "end":
            self.fail("`with` or the end" if kind == "forbid" or when else "`with`, `when` or the end")
        return Constraint(kind, terms, when), self.names

    def terms(self) -> tuple[Term, ...]:
        terms = [self.term()]
        while self.take_word("with"):
            terms.append(self.term())
        return tuple(terms)

    def term(self) -> Term:
        first = self.name("a slot or a dimension")
        if self.take(":"):
            self.names.append(_Name("slot", first.text, first.at))
            ids = self.alternatives("a material id")
            self.names += [_Name("material", t.text, t.at, (first.text,)) for t in ids]
            return MaterialTerm(first.text, _texts(ids))
        if self.take("="):
            return self.tag(None, first)
        if not self.take("."):
            self.fail("`:` and a material, `.` and a dimension, or `=` and a value")
        self.names.append(_Name("slot", first.text, first.at))
        dimension = self.name("a dimension")
        if self.take("="):
            return self.tag(first.text, dimension)
        if not self.take_word("matches"):
            self.fail("`=` and a value, or `matches`")
        self.names.append(_Name("dimension", dimension.text, dimension.at, (first.text,)))
        other = self.name("a slot")
        self.names.append(_Name("slot", other.text, other.at))
        if not self.take("."):
            self.fail("`.` and a dimension")
        of_other = self.name("a dimension")
        self.names.append(_Name("dimension", of_other.text, of_other.at, (other.text,)))
        return MatchTerm((first.text, dimension.text), (other.text, of_other.text))

    def tag(self, slot: str | None, dimension: _Token) -> TagTerm:
        self.names.append(_Name("dimension", dimension.text, dimension.at, (slot or "",)))
        if self.take("*"):
            return TagTerm(slot, dimension.text, ())
        values = self.alternatives("a value or `*`")
        self.names += [_Name("value", t.text, t.at, (slot or "", dimension.text)) for t in values]
        return TagTerm(slot, dimension.text, _texts(values))

    def alternatives(self, expected: str) -> list[_Token]:
        tokens = [self.name(expected)]
        while self.take("|") or self.take(","):
            tokens.append(self.name(expected))
        return tokens

    @property
    def next(self) -> _Token:
        return self.tokens[self.at]

    def name(self, expected: str) -> _Token:
        token = self.next
        if token.kind == "quoted" or (token.kind == "word" and token.text not in KEYWORDS):
            self.at += 1
            return token
        hint = f'; write "{token.text}" in quotes if it is a name' if token.text in KEYWORDS else ""
        self.fail(expected, hint)

    def take(self, mark: str) -> bool:
        taken = self.next.kind == "mark" and self.next.text == mark
        self.at += taken
        return taken

    def take_word(self, keyword: str) -> bool:
        taken = self.next.kind == "word" and self.next.text == keyword
        self.at += taken
        return taken

    def fail(self, expected: str, hint: str = "") -> NoReturn:
        token = self.next
        found = "the end" if token.kind == "end" else f"`{token.text}`"
        raise _syntax_error(self.text, token.at, f"expected {expected}, found {found}{hint}")

    def _tokens(self) -> list[_Token]:
        tokens, at = [], 0
        while at < len(self.text):
            found = _TOKEN.match(self.text, at)
            if found is None:
                character = self.text[at]
                why = (
                    "this quote is never closed"
                    if character in "\"'"
                    else f"{character!r} needs quotes: put names that hold spaces or punctuation in double quotes"
                )
                raise _syntax_error(self.text, at, why)
            kind, raw = str(found.lastgroup), found.group()
            if kind == "quoted":
                raw = re.sub(r"\\(.)", r"\1", raw[1:-1], flags=re.S)
            if kind != "space":
                tokens.append(_Token(kind, raw, at))
            at = found.end()
        return [*tokens, _Token("end", "", len(self.text))]


def _texts(tokens: Sequence[_Token]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(token.text for token in tokens))


def _quoted(name: str) -> str:
    if re.fullmatch(r"[\w-]+", name) and name not in KEYWORDS:
        return name
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _syntax_error(text: str, at: int, why: str) -> InputError:
    return InputError(f"constraint {text!r}, position {at + 1}: {why}")


def _nearest(word: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, sorted(set(names)), n=1, cutoff=0.5)
    return f"; did you mean {_quoted(near[0])}?" if near else ""


def _unknown_names(
    names: Iterable[_Name], slots: Sequence[Slot], known_tags: Mapping[str, Collection[str]], kinds: Sequence[str]
) -> Iterator[tuple[_Name, str]]:
    """Yield each name that is not there, with a sentence that says so and names the nearest one."""
    by_name = {slot.name: slot for slot in slots}
    for name in names:
        slot = name.within[0] if name.within else ""
        inside = [by_name[slot]] if slot in by_name else list(slots)
        tags = [option.tags for s in inside for option in s.options]
        if name.kind == "slot":
            known, what = set(by_name), "no slot is called"
        elif name.kind == "material":
            known, what = {option.id for s in inside for option in s.options}, f"slot {slot} has no material"
        elif name.kind == "dimension":
            known = {d for t in tags for d in t} | set(known_tags)
            what = f"no material of slot {slot} has a dimension" if slot else "no material has a dimension"
        else:
            dimension = name.within[1]
            known = {v for t in tags for v in t.get(dimension, ())} | set(known_tags.get(dimension, ()))
            if not known:  # the dimension is what is wrong
                continue
            what = f"{f'{slot}.' if slot else ''}{dimension} has no value"
        if name.kind in kinds and name.text not in known:
            hint = _nearest(name.text, known) or (
                f"; {name.text} is a slot: write {_quoted(name.text)}:material or {_quoted(name.text)}.dimension=value"
                if name.kind == "dimension" and not slot and name.text in by_name
                else ""
            )
            yield name, f"{what} {_quoted(name.text)}{hint}"


def _check_names(
    text: str,
    names: Iterable[_Name],
    slots: Sequence[Slot],
    known_tags: Mapping[str, Collection[str]],
    kinds: Sequence[str] = ("slot", "material", "dimension", "value"),
) -> None:
    for name, why in _unknown_names(names, slots, known_tags, kinds):
        raise _syntax_error(text, name.at, why)


# ------------------------------------------------------------------------------------------------ nogoods


@dataclass(frozen=True, eq=False)
class Nogood:
    """Options that must not come together: forbidden where every mask, every table and every `anywhere` is met.

    `masks`: slot position → (options,). `tables`: slot positions (i, j), i < j → (options of i, options of j).
    `anywhere`: met where at least one of its masks is.
    """

    masks: Mapping[int, Bools]
    tables: Mapping[tuple[int, int], Bools]
    anywhere: tuple[Mapping[int, Bools], ...] = ()

    @cached_property
    def bound(self) -> tuple[int, ...]:
        """The slots of masks and tables, in order."""
        return tuple(sorted({*self.masks, *(s for pair in self.tables for s in pair)}))

    @cached_property
    def scope(self) -> tuple[int, ...]:
        """All slots it looks at, in order."""
        return tuple(sorted({*self.bound, *(s for masks in self.anywhere for s in masks)}))

    @cached_property
    def decided_from(self) -> int:
        """The first slot with which a prefix of slots can be known to meet it."""
        return max([*self.bound, *(min(masks) for masks in self.anywhere)])

    def meets(self, columns: Sequence[NDArray[Any]]) -> Bools:
        """Return which rows meet it; `columns` are the (rows,) option positions of all slots."""
        met = np.ones(len(columns[0]), np.bool_)
        for s, mask in self.masks.items():
            met &= mask[columns[s]]
        for (i, j), table in self.tables.items():
            met &= table[columns[i], columns[j]]
        for masks in self.anywhere:
            met &= np.logical_or.reduce([mask[columns[s]] for s, mask in masks.items()])
        return met

    def completions(
        self, columns: Sequence[NDArray[Any] | None], slot: int, rows: int, size: int
    ) -> tuple[Ints, Bools] | None:
        """Return some of the rows, and (those rows, options of `slot`): which options certainly make them meet it.

        `columns` are the (rows,) option positions of the slots chosen so far, None for the others; `slot` is one of the
        others. None where it cannot be met before more slots are chosen.
        """
        met, alone = np.ones(rows, np.bool_), np.ones(size, np.bool_)
        beside: list[tuple[Bools, Ints]] = []  # a table (of other's options, options), and the column of other
        already: list[tuple[Bools, Bools]] = []  # (rows,) and (options,)
        for s, mask in self.masks.items():
            column = columns[s]
            if s == slot:
                alone = alone & mask
            elif column is None:
                return None
            else:
                met &= mask[column]
        for (i, j), table in self.tables.items():
            first, second = columns[i], columns[j]
            if first is not None and second is not None:
                met &= table[first, second]
            elif first is not None and j == slot:
                beside.append((table, first))
            elif second is not None and i == slot:
                beside.append((table.T, second))
            else:
                return None
        for masks in self.anywhere:
            chosen = [mask[column] for s, mask in masks.items() if (column := columns[s]) is not None]
            somewhere = np.logical_or.reduce([np.zeros(rows, np.bool_), *chosen])
            if slot in masks:
                already.append((somewhere, masks[slot]))
            else:
                met &= somewhere
        where = np.flatnonzero(met)
        complete: Bools = np.broadcast_to(alone, (len(where), size))
        for table, column in beside:
            complete = complete & table[column[where]]
        for somewhere, mask in already:
            complete = complete & (somewhere[where][:, None] | mask)
        return where, complete


def _nogoods(slots: Sequence[Slot], constraint: Constraint) -> tuple[Nogood, ...]:
    """Return what a constraint comes to; nothing if it can forbid nothing."""
    if constraint.kind == "forbid":
        found = [_nogood(slots, constraint.terms)]
    else:
        found = [_nogood(slots, constraint.when, fails=term) for term in constraint.terms]
    return tuple(nogood for nogood in found if nogood is not None)


def _nogood(slots: Sequence[Slot], hold: Sequence[Term], fails: Term | None = None) -> Nogood | None:
    """Return "all of `hold` hold and `fails` does not", looking at few slots; None if that cannot be."""
    masks: dict[int, Bools] = {}
    tables: dict[tuple[int, int], Bools] = {}
    anywhere: list[dict[int, Bools]] = []
    for term in hold:
        if isinstance(term, MatchTerm):
            _narrow(masks, tables, *_match(slots, term, negated=False))
        elif term.slot is None:
            anywhere.append(_masks(slots, term))
        else:
            _narrow(masks, tables, _masks(slots, term), {})
    if isinstance(fails, MatchTerm):
        _narrow(masks, tables, *_match(slots, fails, negated=True))
    elif fails is not None:
        _narrow(masks, tables, {s: ~mask for s, mask in _masks(slots, fails).items()}, {})
    left = []
    for found in anywhere:
        possible = {s: both for s, mask in found.items() if (both := mask & masks.get(s, np.True_)).any()}
        if not any(mask.all() for mask in possible.values()):
            if len(possible) == 1:
                _narrow(masks, tables, possible, {})
            else:
                left.append(possible)
    for i, j in tables:
        tables[i, j] = tables[i, j] & masks.pop(i, np.ones(len(slots[i].options), np.bool_))[:, None]
        tables[i, j] = tables[i, j] & masks.pop(j, np.ones(len(slots[j].options), np.bool_))[None, :]
    if not all(part.any() for part in (*masks.values(), *tables.values())) or not all(left):
        return None
    masks = {s: mask for s, mask in masks.items() if not mask.all()}
    if not masks and not tables and not left:
        masks = {0: np.ones(len(slots[0].options), np.bool_)}
    return Nogood(masks, tables, tuple(left))


def _narrow(
    masks: dict[int, Bools],
    tables: dict[tuple[int, int], Bools],
    more_masks: Mapping[int, Bools],
    more_tables: Mapping[tuple[int, int], Bools],
) -> None:
    for s, mask in more_masks.items():
        masks[s] = masks[s] & mask if s in masks else mask
    for pair, table in more_tables.items():
        tables[pair] = tables[pair] & table if pair in tables else table


def _listed(nogood: Nogood) -> list[Nogood]:
    """Return the same as nogoods on single slots and pairs, which are quicker, where it comes to few of them."""
    terms = len(nogood.bound) + len(nogood.anywhere)
    few = terms <= 1 or (terms == 2 and len(nogood.scope) <= MOST_SLOTS_LISTED)
    if not nogood.anywhere or not few:
        return [nogood]
    listed = []
    for case in product(*(masks.items() for masks in nogood.anywhere)):
        masks = dict(nogood.masks)
        for s, mask in case:
            _narrow(masks, {}, {s: mask}, {})
        listed.append(Nogood(masks, {}))
    return listed


def _masks(slots: Sequence[Slot], term: MaterialTerm | TagTerm) -> dict[int, Bools]:
    """Return, per slot the term looks at, which options it holds for."""
    masks = {}
    for s, slot in enumerate(slots):
        if term.slot is None or term.slot == slot.name:
            if isinstance(term, MaterialTerm):
                said = [option.id in term.ids for option in slot.options]
            else:
                carried = [option.tags.get(term.dimension, ()) for option in slot.options]
                said = [any(v in term.values for v in values) if term.values else bool(values) for values in carried]
            masks[s] = np.array(said, np.bool_)
    return masks


def _match(
    slots: Sequence[Slot], term: MatchTerm, *, negated: bool
) -> tuple[dict[int, Bools], dict[tuple[int, int], Bools]]:
    """Return where two materials share a value (or do not), as masks if they are one material, else as a table."""
    names = [slot.name for slot in slots]
    sides = sorted((names.index(slot), dimension) for slot, dimension in (term.first, term.second))
    carried = [[set(option.tags.get(d, ())) for option in slots[s].options] for s, d in sides]
    vocabulary = {v: n for n, v in enumerate(sorted(set().union(*carried[0], *carried[1])))}
    first, second = (np.zeros((len(values), len(vocabulary)), np.float32) for values in carried)
    for matrix, values in ((first, carried[0]), (second, carried[1])):
        for row, held in enumerate(values):
            matrix[row, [vocabulary[v] for v in held]] = 1
    table = (first @ second.T > 0) != negated
    (i, _), (j, _) = sides
    return ({i: np.diag(table).copy()}, {}) if i == j else ({}, {(i, j): table})


# ------------------------------------------------------------------------------------------------ the legal part


@dataclass(frozen=True, eq=False)
class _Net:
    """Nogoods by the number of slots they look at: options that are out, pairs that are allowed, and wider ones."""

    live: tuple[Bools, ...]
    allowed: Mapping[tuple[int, int], Bools]
    wide: tuple[Nogood, ...]

    def within(self, nogood: Nogood) -> _Net:
        """Return the part of the space that meets the nogood."""
        live, allowed = list(self.live), dict(self.allowed)
        for s, mask in nogood.masks.items():
            live[s] = live[s] & mask
        for pair, table in nogood.tables.items():
            allowed[pair] = allowed[pair] & table if pair in allowed else table
        nowhere = (Nogood({s: ~mask for s, mask in masks.items()}, {}) for masks in nogood.anywhere)
        return _Net(tuple(live), allowed, (*self.wide, *nowhere))


def _net(space: Space, rules: Iterable[int] | None = None) -> _Net:
    """Return the net of all rules of a space, or of some of them by position."""
    live = [np.ones(size, np.bool_) for size in space.sizes]
    allowed: dict[tuple[int, int], Bools] = {}
    wide: list[Nogood] = []
    for r in range(len(space.rules)) if rules is None else rules:
        for nogood in (part for rule in space.rules[r][1] for part in _listed(rule)):
            scope = nogood.scope
            if len(scope) == 1 and not nogood.anywhere:
                live[scope[0]] &= ~nogood.masks[scope[0]]
            elif len(scope) == 2 and not nogood.anywhere:
                i, j = scope
                table = nogood.tables.get((i, j))
                table = nogood.masks[i][:, None] & nogood.masks[j][None, :] if table is None else table
                if (i, j) not in allowed:
                    allowed[i, j] = np.ones((space.sizes[i], space.sizes[j]), np.bool_)
                allowed[i, j] &= ~table
            else:
                wide.append(nogood)
    return _Net(tuple(live), allowed, tuple(wide))


def _checked(space: Space) -> Space:
    for slot, positions in zip(space.slots, space.positions, strict=True):
        if len(positions) < len(slot.options):
            ids = [option.id for option in slot.options]
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise InputError(f"slot {slot.name}: material {', '.join(twice)} is there twice; list every material once")
    return space


@dataclass(frozen=True, eq=False)
class _Factor:
    """A table over variables: `table.shape` are the sizes of the variables in `scope`."""

    scope: tuple[int, ...]
    table: Floats


@dataclass(frozen=True, eq=False)
class _Classes:
    """The net over classes of options that no rule tells apart, as factors whose product is 1 where it is legal.

    Variables 0..slots−1 are the slots; those after them are the truth of a wide nogood's first parts, so that a nogood
    over all slots needs no table over all slots.
    """

    of_option: tuple[Ints, ...]  # per slot (options,): the class, −1 where the option is out
    sizes: tuple[int, ...]
    weights: tuple[Floats, ...]  # per slot: options in every class
    factors: tuple[_Factor, ...]
    wide: tuple[Nogood, ...]  # over classes; the factors hold them too


def _classes(net: _Net) -> _Classes:
    n_slots = len(net.live)
    looks: list[list[Bools]] = [[] for _ in range(n_slots)]
    for part in (Nogood({}, net.allowed), *net.wide):
        for s, mask in (item for masks in (part.masks, *part.anywhere) for item in masks.items()):
            looks[s].append(mask[:, None])
        for (i, j), table in part.tables.items():
            looks[i].append(table[:, net.live[j]])
            looks[j].append(table[net.live[i], :].T)
    of_option, picks, weights = [], [], []
    for s, live in enumerate(net.live):
        where = np.flatnonzero(live)
        first, inverse, counts = _unique_rows(np.hstack([np.zeros((len(live), 0), np.bool_), *looks[s]])[where])
        codes = np.full(len(live), -1, np.int64)
        codes[where] = inverse
        of_option.append(codes)
        picks.append(where[first])
        weights.append(counts.astype(np.float64))
    sizes = [len(pick) for pick in picks]
    factors = [
        _Factor((i, j), table[np.ix_(picks[i], picks[j])].astype(np.float64)) for (i, j), table in net.allowed.items()
    ]
    wide = tuple(
        Nogood(
            {s: mask[picks[s]] for s, mask in nogood.masks.items()},
            {(i, j): table[np.ix_(picks[i], picks[j])] for (i, j), table in nogood.tables.items()},
            tuple({s: mask[picks[s]] for s, mask in masks.items()} for masks in nogood.anywhere),
        )
        for nogood in net.wide
    )
    for nogood in wide:
        parts: list[tuple[tuple[int, ...], Bools]] = [((s,), mask) for s, mask in nogood.masks.items()]
        parts += nogood.tables.items()
        parts.sort(key=lambda part: part[0][-1])
        for masks in nogood.anywhere:
            somewhere = _chain([((s,), masks[s]) for s in sorted(masks)], np.logical_or, sizes, factors)
            parts.append(((somewhere,), np.array([False, True])))
        met = _chain(parts, np.logical_and, sizes, factors)
        factors.append(_Factor((met,), np.array([1.0, 0.0])))
    return _Classes(tuple(of_option), tuple(sizes), tuple(weights), tuple(factors), wide)


def _chain(
    parts: Sequence[tuple[tuple[int, ...], Bools]],
    join: Callable[[Bools, Bools], Bools],
    sizes: list[int],
    factors: list[_Factor],
) -> int:
    """Add variables of two values that say whether all (or any) of the first n parts are true; return the last one."""
    before: tuple[int, ...] = ()
    for scope, part in parts:
        truth = join(part[..., None], np.array([False, True])) if before else part
        after = len(sizes)
        sizes.append(2)
        factors.append(_Factor((*scope, *before, after), np.stack([~truth, truth], -1).astype(np.float64)))
        before = (after,)
    return before[0]


def _unique_rows(rows: Bools) -> tuple[Ints, Ints, Ints]:
    """Return where each different row is first seen (in that order), which of them each row is, and their counts."""
    if len(rows) == 0:
        empty = np.zeros(0, np.int64)
        return empty, empty, empty
    packed = np.packbits(np.hstack([rows, np.ones((len(rows), 1), np.bool_)]), axis=1)
    keys = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).ravel()
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse.ravel()], counts[order]


# ------------------------------------------------------------------------------------------------ summing

Reduce = Callable[[Floats], Floats]


def _exactly(table: Floats) -> Floats:
    return table


def _whether(table: Floats) -> Floats:
    return (table > 0).astype(np.float64)


def _total(classes: _Classes, keep: Sequence[int], shrink: Reduce) -> Floats:
    """Return the product of all factors summed over all variables but `keep`: a table over `keep`, in that order.

    Variable elimination (Dechter, Artificial Intelligence 113, 1999): exact, and as cheap as the largest table on the
    way. `shrink` is applied to every intermediate table: nothing, "is it above 0?", or the remainder by a prime. Where
    a table would pass LARGEST_TABLE, one slot is fixed to each of its classes in turn, or, with wide nogoods, whose
    variables would make that endless, the slots are walked through.
    """
    sizes = classes.sizes
    order, largest = _order(sizes, [f.scope for f in classes.factors], keep)
    split = _widest(classes, keep) if largest > LARGEST_TABLE else None
    if split is None:
        left, _ = _eliminate(classes.factors, order, shrink)
        return shrink(_product(left, tuple(keep), [sizes[x] for x in keep]))
    if classes.wide:
        return _Walk(classes, keep, shrink).total()
    total = np.zeros([sizes[x] for x in keep])
    for value in range(sizes[split]):
        fixed = _fix(classes, split, value)
        if fixed is not None:
            total = shrink(total + _total(fixed, keep, shrink))
    return total


class _Walk:
    """The same sum as `_total`, slot by slot over the states that can be reached.

    A state is what later slots need to know of a prefix: the classes of slots that they share a table with, and how far
    every nogood has come. Prefixes with the same state are one, with the sum of their weights. More states than
    MOST_STATES at once are walked on with in parts, which bounds memory and not time.
    """

    def __init__(self, classes: _Classes, keep: Sequence[int], shrink: Reduce) -> None:
        self.keep, self.shrink, self.sizes = tuple(keep), shrink, classes.sizes
        n_slots = len(classes.weights)
        inside = {x for f in classes.factors for x in f.scope if x < n_slots}
        self.weights = {s: np.ones(classes.sizes[s]) for s in inside}
        self.tables: dict[tuple[int, int], Floats] = {}
        for f in classes.factors:
            if len(f.scope) == 1 and f.scope[0] in inside:
                self.weights[f.scope[0]] = self.weights[f.scope[0]] * f.table
            elif len(f.scope) == 2 and max(f.scope) < n_slots:
                self.tables[f.scope[0], f.scope[1]] = f.table
        self.wide = [nogood for nogood in classes.wide if nogood.scope[0] in inside]
        self.order = self._order(inside)

    def _order(self, inside: set[int]) -> list[int]:
        """The slots, those with most tables to earlier ones first, so that classes are soon forgotten."""
        order: list[int] = []
        pairs = [*self.tables, *(pair for nogood in self.wide for pair in nogood.tables)]
        while len(order) < len(inside):
            ties = {s: sum((a in order) != (b in order) for a, b in pairs if s in (a, b)) for s in inside - {*order}}
            order.append(min(ties, key=lambda s: (-ties[s], s)))
        return order

    def total(self) -> Floats:
        """Return the table over `keep`."""
        result = np.zeros([self.sizes[x] for x in self.keep])
        waiting: list[tuple[int, dict[Any, Ints], Floats]] = [(0, {}, np.ones(1))]
        while waiting:
            depth, state, value = waiting.pop()
            if depth == len(self.order):
                at_end = np.ravel_multi_index([state[x] for x in self.keep], result.shape) if self.keep else 0 * value
                sums = np.bincount(at_end.astype(np.int64), weights=value, minlength=result.size)
                result = self.shrink(result + sums.reshape(result.shape))
                continue
            rows = max(1, MOST_STATES // self.sizes[self.order[depth]])
            parts = []
            for at in range(0, len(value), rows):
                part = {key: column[at : at + rows] for key, column in state.items()}
                parts.append(self._merged(*self._advanced(depth, part, value[at : at + rows])))
            if sum(len(v) for _, v in parts) <= MOST_STATES:
                joined = {key: np.concatenate([p[key] for p, _ in parts]) for key in parts[0][0]}
                parts = [self._merged(joined, np.concatenate([v for _, v in parts]))]
            waiting += [(depth + 1, part, v) for part, v in parts if len(v)]
        return result

    def _advanced(self, depth: int, state: dict[Any, Ints], value: Floats) -> tuple[dict[Any, Ints], Floats]:
        """Return every state with every class of the next slot, less what is forbidden and what nobody asks for again.

        Keys of a state: a slot; (n, None) whether all that is bound so far of nogood n is met; (n, i) whether its i-th
        `anywhere` is.
        """
        slot, done = self.order[depth], self.order[:depth]
        size = self.sizes[slot]
        spend((len(value) * size + CALL_WORK) * (2 + len(state) + len(self.tables) + len(self.wide)))
        grown = {key: np.repeat(column, size) for key, column in state.items()}
        grown[slot] = np.tile(np.arange(size), len(value))
        weight = np.repeat(value, size) * np.tile(self.weights[slot], len(value))
        for (i, j), table in self.tables.items():
            if slot in (i, j) and (i in done or j in done):
                weight = weight * table[grown[i], grown[j]]
        for n, nogood in enumerate(self.wide):
            if slot not in nogood.scope:
                continue
            met = grown.get((n, None), np.ones(len(weight), np.int64)) > 0
            if slot in nogood.masks:
                met = met & nogood.masks[slot][grown[slot]]
            for (i, j), forbidden in nogood.tables.items():
                if slot in (i, j) and (i in done or j in done):
                    met = met & forbidden[grown[i], grown[j]]
            all_met = met
            grown[n, None] = met.astype(np.int64)
            for i, masks in enumerate(nogood.anywhere):
                here = masks[slot][grown[slot]] if slot in masks else np.False_
                somewhere = met & (here | (grown.get((n, i), np.zeros(len(weight), np.int64)) > 0))
                grown[n, i] = somewhere.astype(np.int64)
                all_met = all_met & somewhere
            if {*nogood.scope} <= {*done, slot}:
                weight = np.where(all_met, 0, weight)
                grown = {key: c for key, c in grown.items() if not (isinstance(key, tuple) and key[0] == n)}
        wanted = {*self.keep}
        for a, b in (*self.tables, *(pair for nogood in self.wide for pair in nogood.tables)):
            wanted |= {x for x, other in ((a, b), (b, a)) if other not in done and other != slot}
        alive = weight > 0
        return {k: c[alive] for k, c in grown.items() if isinstance(k, tuple) or k in wanted}, weight[alive]

    def _merged(self, state: dict[Any, Ints], value: Floats) -> tuple[dict[Any, Ints], Floats]:
        """Return every state once, with the sum of its values."""
        if len(value) == 0:
            return state, value
        columns = np.stack([*state.values(), np.zeros(len(value), np.int64)], axis=1)
        radix = [int(c.max()) + 1 for c in columns.T]
        if math.prod(radix) < 2**62:
            places = np.cumprod([1, *radix[:-1]])
            _, first, inverse = np.unique(columns @ places, return_index=True, return_inverse=True)
        else:
            _, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
        sums = np.bincount(inverse.ravel(), weights=value, minlength=len(first)).astype(np.float64)
        return {key: column[first] for key, column in state.items()}, self.shrink(sums)


def _order(sizes: Sequence[int], scopes: Sequence[tuple[int, ...]], keep: Sequence[int]) -> tuple[list[int], int]:
    """Return the order in which to sum variables out, cheapest next table first, and the largest table's entries."""
    current = [frozenset(scope) for scope in scopes]
    todo = {x for scope in current for x in scope} - set(keep)
    order, largest = [], 1

    def size(scope: Iterable[int]) -> int:
        return math.prod(sizes[x] for x in scope)

    while todo:
        spend(100 * len(todo) * len(current))
        best: tuple[int, int, frozenset[int]] | None = None
        for x in sorted(todo):
            bucket = sorted((scope for scope in current if x in scope), key=size)
            union = frozenset().union(*bucket)
            cost = max(size(union - {x}), size(frozenset().union(*bucket[:-1])))
            if best is None or cost < best[0]:
                best = cost, x, union - {x}
        assert best is not None
        largest = max(largest, best[0])
        current = [scope for scope in current if best[1] not in scope] + [best[2]]
        order.append(best[1])
        todo.discard(best[1])
    return order, largest


def _eliminate(
    factors: Sequence[_Factor], order: Sequence[int], shrink: Reduce
) -> tuple[list[_Factor], list[list[_Factor]]]:
    """Return the factors left once the variables in `order` are summed out, and the factors each was summed out of."""
    left, buckets = [_Factor(f.scope, shrink(f.table)) for f in factors], []
    for x in order:
        bucket = sorted((f for f in left if x in f.scope), key=lambda f: f.table.size)
        left = [f for f in left if x not in f.scope]
        merged = bucket[0]
        for other in bucket[1:-1]:
            union = tuple(dict.fromkeys(merged.scope + other.scope))
            merged = _Factor(union, shrink(_einsum([merged, other], union)))
        last = bucket[1:][-1:]
        scope = tuple(v for v in dict.fromkeys(merged.scope + (last[0].scope if last else ())) if v != x)
        left.append(_Factor(scope, shrink(_einsum([merged, *last], scope))))
        buckets.append(bucket)
    return left, buckets


def _einsum(factors: Sequence[_Factor], scope: Sequence[int]) -> Floats:
    spend(CALL_WORK + math.prod({v: n for f in factors for v, n in zip(f.scope, f.table.shape, strict=True)}.values()))
    label = {x: n for n, x in enumerate(dict.fromkeys(v for f in factors for v in f.scope))}
    operands: list[Any] = [part for f in factors for part in (f.table, [label[v] for v in f.scope])]
    return np.asarray(np.einsum(*operands, [label[v] for v in scope], optimize=len(factors) > 1))


def _product(factors: Sequence[_Factor], scope: tuple[int, ...], sizes: Sequence[int]) -> Floats:
    """Return the product of factors over (at most) `scope` as one table."""
    table = np.ones(sizes)
    for f in factors:
        axes = [f.scope.index(x) for x in scope if x in f.scope]
        shape = [size if x in f.scope else 1 for x, size in zip(scope, sizes, strict=True)]
        table = table * f.table.transpose(axes).reshape(shape)
    return table


def _widest(classes: _Classes, keep: Sequence[int]) -> int | None:
    """Return the slot to fix: the one in most factors, of those the one with the fewest classes; None: none is left."""
    candidates = [x for x in range(len(classes.weights)) if x not in keep and classes.sizes[x] > 1]
    return min(candidates, key=lambda x: (-sum(x in f.scope for f in classes.factors), classes.sizes[x]), default=None)


def _fix(classes: _Classes, x: int, value: int) -> _Classes | None:
    """Return the classes with a slot fixed: it is in no scope any more. None if nothing is left."""
    factors = [
        _Factor(tuple(v for v in f.scope if v != x), np.asarray(f.table.take(value, axis=f.scope.index(x))))
        if x in f.scope
        else f
        for f in classes.factors
    ]
    sizes = tuple(1 if v == x else size for v, size in enumerate(classes.sizes))
    return replace(classes, sizes=sizes, factors=tuple(factors)) if all(f.table.any() for f in factors) else None


def _components(n_variables: int, scopes: Iterable[Sequence[int]]) -> list[set[int]]:
    """Return the sets of variables that no factor connects."""
    component = {x: {x} for x in range(n_variables)}
    for scope in scopes:
        joined = set().union(*(component[x] for x in scope)) if scope else set()
        for x in joined:
            component[x] = joined
    return [found for x, found in component.items() if x == min(found)]


def _weighted(classes: _Classes) -> _Classes:
    """Return the classes with a factor for the options in each, so that sums are numbers of variants."""
    weights = tuple(_Factor((s,), weights) for s, weights in enumerate(classes.weights))
    return replace(classes, factors=weights + classes.factors)


def count(space: Space) -> int:
    """Return the number of legal variants, exactly and without listing them.

    Options that no rule tells apart count as one class; slots that no rule connects multiply. Where rules connect many
    slots with hundreds of classes each, time grows with the product of the classes of all but the last few of them.
    Raises InputError where a material is in a slot twice, TooComplexError where it takes more than MOST_WORK.
    """
    classes = _weighted(_classes(_net(_checked(space))))
    total = 1
    with work_limit():
        for component in _components(len(classes.sizes), [f.scope for f in classes.factors]):
            bound = math.prod(int(classes.weights[s].sum()) for s in component if s < len(space.slots))
            inside = tuple(f for f in classes.factors if f.scope[0] in component)
            wide = tuple(nogood for nogood in classes.wide if nogood.scope[0] in component)
            total *= _exact_total(replace(classes, factors=inside, wide=wide), bound) if bound else 0
    return total


def _exact_total(classes: _Classes, bound: int) -> int:
    """Return the sum over everything as an exact integer that is at most `bound`.

    Doubles hold integers below 2**53. Beyond, the sum is found modulo enough primes and put together by the Chinese
    remainder theorem; the primes are so small that no dot product of a table passes 2**53 either.
    """
    if bound < 2**53:
        return round(float(_total(classes, (), _exactly)))
    result, modulus = 0, 1
    for prime in _primes_below(math.isqrt(2**53 // max(classes.sizes))):
        remainder = int(_total(classes, (), _modulo(prime)))
        result += modulus * ((remainder - result) * pow(modulus, -1, prime) % prime)
        modulus *= prime
        if modulus > bound:
            break
    return result


def _modulo(prime: int) -> Reduce:
    return lambda table: np.asarray(np.fmod(table, prime))


def _primes_below(n: int) -> Iterator[int]:
    return (p for p in range(n - 1, 1, -1) if all(p % d for d in range(2, math.isqrt(p) + 1)))


def _any_legal(net: _Net) -> bool:
    if not all(live.any() for live in net.live):
        return False
    classes = _classes(net)
    return bool(_total(classes, (), _whether) > 0)


def _with_unity(classes: _Classes, slots: Sequence[int]) -> _Classes:
    """Return the classes with a factor of ones for some slots, so that each is in some scope."""
    return replace(classes, factors=classes.factors + tuple(_Factor((s,), np.ones(classes.sizes[s])) for s in slots))


def _usable(classes: _Classes, slots: Sequence[int]) -> Bools:
    """Return, over the options of `slots` (one axis each), whether some legal variant holds them."""
    codes = [classes.of_option[s] for s in slots]
    if not all(classes.sizes[s] for s in range(len(classes.weights))):
        return np.zeros([len(code) for code in codes], np.bool_)
    by_class = _total(_with_unity(classes, slots), slots, _whether) > 0
    usable = by_class[np.ix_(*codes)]
    for axis, code in enumerate(codes):
        usable &= (code >= 0).reshape([-1 if a == axis else 1 for a in range(len(codes))])
    return usable


def pair_support(space: Space) -> dict[tuple[int, int], Bools]:
    """Return, per pair of slot positions i < j, (options of i, options of j): whether some legal variant holds both.

    Raises TooComplexError where it takes more than MOST_WORK.
    """
    classes = _classes(_net(_checked(space)))
    with work_limit():
        return {pair: _usable(classes, pair) for pair in combinations(range(len(space.slots)), 2)}


def wide_nogoods(space: Space) -> tuple[Nogood, ...]:
    """Return the nogoods that `pair_support` does not settle: those that look at three slots or more."""
    return _net(_checked(space)).wide


def is_legal(space: Space, indices: NDArray[Any]) -> Bools:
    """Return which rows of (rows, slots) option positions are legal variants."""
    columns = [indices[:, s] for s in range(len(space.slots))]
    legal = np.ones(len(indices), np.bool_)
    for _, nogoods in space.rules:
        for nogood in nogoods:
            legal &= ~nogood.meets(columns)
    return legal


def broken_rules(space: Space, materials: Mapping[str, str]) -> tuple[str, ...]:
    """Return the text of every rule that a variant breaks; none if it is legal. Raises InputError for unknown ids."""
    columns = [np.array([i]) for i in positions_of(space, materials)]
    return tuple(text for text, nogoods in space.rules if any(n.meets(columns)[0] for n in nogoods))


def positions_of(space: Space, materials: Mapping[str, str]) -> tuple[int, ...]:
    """Return the option positions of a variant's materials, in slot order. Raises InputError for unknown ids."""
    if set(materials) != {slot.name for slot in space.slots}:
        raise InputError(
            f"a variant has one material for each of {', '.join(s.name for s in space.slots)}; "
            f"this one has {', '.join(sorted(materials)) or 'none'}"
        )
    found = []
    for slot, positions in zip(space.slots, space.positions, strict=True):
        material = materials[slot.name]
        if material not in positions:
            raise InputError(f"slot {slot.name} has no material {_quoted(material)}{_nearest(material, positions)}")
        found.append(positions[material])
    return tuple(found)


# ------------------------------------------------------------------------------------------------ ids and tags


def variant_id(materials: Mapping[str, str]) -> str:
    """Return the id of a variant: 24 hexadecimal digits that depend on its (slot, material id) pairs and nothing else.

    Each pair is hashed to two 64-bit lanes (BLAKE2b); lanes are summed modulo 2**64, which makes the order of slots
    irrelevant and the vectorised form a sum of columns. The id is lane 0 and the upper half of lane 1. Among N variants
    the chance of any two sharing an id is below N²/2⁹⁷: 10⁻¹⁵ for ten million.

    >>> variant_id({"copy": "c1", "image": "i1"}) == variant_id({"image": "i1", "copy": "c1"})
    True
    """
    pairs = [_lanes(slot, material) for slot, material in materials.items()]
    first, second = (sum(lane) % 2**64 for lane in zip(*pairs, strict=True)) if pairs else (0, 0)
    return f"{first:016x}{second >> 32:08x}"


def _lanes(slot: str, material: str) -> tuple[int, int]:
    name = slot.encode()
    digest = hashlib.blake2b(
        len(name).to_bytes(4, "little") + name + material.encode(), digest_size=16, person=b"kaleidoscope v1"
    ).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


_HEX = np.frombuffer("".join(f"{n:02x}" for n in range(256)).encode(), np.uint16)  # byte → two digits
_HEX4 = np.ascontiguousarray(  # two bytes as they lie in memory → four digits
    _HEX[np.arange(65536, dtype=np.uint16).view(np.uint8)].view(np.uint32)
)


def _id_array(first: Lanes, second: Lanes) -> Any:
    """Return the ids of (rows,) lane sums as an Arrow string array."""
    rows = len(first)
    lanes = np.empty((rows, 12), np.uint8)
    lanes[:, :8] = first.astype(">u8").view(np.uint8).reshape(rows, 8)
    lanes[:, 8:] = second.astype(">u8").view(np.uint8).reshape(rows, 8)[:, :4]
    digits = _HEX4[lanes.view(np.uint16)]  # (rows, 6) words of four digits
    offsets = np.arange(0, (rows + 1) * ID_DIGITS, ID_DIGITS, dtype=np.int32)
    return pa.StringArray.from_buffers(rows, pa.py_buffer(offsets), pa.py_buffer(digits))


def _index_type(size: int) -> np.dtype[Any]:
    return np.dtype(np.int8 if size <= 2**7 else np.int16 if size <= 2**15 else np.int32)


def schema(space: Space) -> Any:
    """Return the Arrow schema of a batch of variants: variant_id, then per slot the material id, dictionary-encoded."""
    columns = [
        pa.field(slot.name, pa.dictionary(pa.from_numpy_dtype(_index_type(size)), pa.string()), nullable=False)
        for slot, size in zip(space.slots, space.sizes, strict=True)
    ]
    return pa.schema([pa.field(VARIANT_ID, pa.string(), nullable=False), *columns])


def as_batch(space: Space, indices: NDArray[Any]) -> Any:
    """Return (rows, slots) option positions as a record batch of variants, as `explode` gives them."""
    columns = [np.ascontiguousarray(indices[:, s]) for s in range(len(space.slots))]
    first, second = (np.zeros(len(indices), np.uint64) for _ in range(2))
    for lanes, column in zip(space.lanes, columns, strict=True):
        first += lanes[column, 0]
        second += lanes[column, 1]
    return _Batches(space)([*columns, first, second])


class _Batches:
    """Option positions and lane sums to record batches; holds what all batches of a space share."""

    def __init__(self, space: Space) -> None:
        self.schema = schema(space)
        self.dictionaries = [pa.array([option.id for option in slot.options], pa.string()) for slot in space.slots]
        self.types = [_index_type(size) for size in space.sizes]

    def __call__(self, columns: Sequence[NDArray[Any]]) -> Any:
        arrays = [_id_array(columns[-2], columns[-1])]
        for column, dtype, dictionary in zip(columns[:-2], self.types, self.dictionaries, strict=True):
            arrays.append(
                pa.DictionaryArray.from_arrays(pa.array(column.astype(dtype, copy=False)), dictionary, safe=False)
            )
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


def tags_of(space: Space, materials: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Return the tags of a variant: per dimension, the values of all its materials, sorted, each once."""
    union: dict[str, set[str]] = {}
    for slot, position in zip(space.slots, positions_of(space, materials), strict=True):
        for dimension, values in slot.options[position].tags.items():
            union.setdefault(dimension, set()).update(values)
    return {dimension: tuple(sorted(union[dimension])) for dimension in sorted(union)}


def tag_values(space: Space) -> dict[str, tuple[str, ...]]:
    """Return every dimension of a space with every value an option carries, sorted."""
    found: dict[str, set[str]] = {}
    for slot in space.slots:
        for option in slot.options:
            for dimension, values in option.tags.items():
                found.setdefault(dimension, set()).update(values)
    return {dimension: tuple(sorted(found[dimension])) for dimension in sorted(found)}


def tag_matrix(space: Space, batch: Any, dimension: str) -> Bools:
    """Return (variants, values): whether a variant of the batch carries a value of `tag_values(space)[dimension]`."""
    values = tag_values(space)[dimension]
    carries = np.zeros((batch.num_rows, len(values)), np.bool_)
    for slot in space.slots:
        held = np.array([[v in option.tags.get(dimension, ()) for v in values] for option in slot.options], np.bool_)
        if held.any():
            carries |= held[batch.column(slot.name).indices.to_numpy()]
    return carries


def tag_columns(space: Space, batch: Any) -> Any:
    """Return the tags of a batch of variants: a record batch with one list<string> column per dimension.

    Rows as in `batch`; every list is sorted and holds a value once; it is empty where no material has the dimension.
    """
    columns = {}
    for dimension, values in tag_values(space).items():
        carries = tag_matrix(space, batch, dimension)
        offsets = np.zeros(len(carries) + 1, np.int32)
        np.cumsum(carries.sum(axis=1), out=offsets[1:])
        taken = np.broadcast_to(np.arange(len(values)), carries.shape)[carries]
        columns[dimension] = pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(values, pa.string()).take(pa.array(taken))
        )
    return pa.RecordBatch.from_pydict(columns) if columns else pa.RecordBatch.from_arrays([], names=[])


# ------------------------------------------------------------------------------------------------ exploding


@dataclass(frozen=True, eq=False)
class _Step:
    """How a slot joins a prefix of earlier slots.

    `filters`: earlier slots, and a table (classes of each of them…, choices) of what may follow. `wide`: nogoods that
    this slot completes.
    """

    choices: Ints  # (choices,) option positions that are not out
    column: NDArray[Any]  # the same in the type of the Arrow column
    lanes: Lanes  # (2, choices)
    filters: tuple[tuple[tuple[int, ...], Bools], ...]
    wide: tuple[Nogood, ...]
    size: int  # options, out or not


def explode(space: Space, batch_rows: int = BATCH_ROWS) -> Iterator[Any]:
    """Yield all legal variants as record batches (see `schema`) of `batch_rows` rows, the last one shorter.

    Lazy, in the order of slots and options, and the same on every machine. Memory is bounded by the batch: prefixes of
    slots are grown block by block, depth first, and a prefix is cut as soon as a rule is broken, or as soon as the
    rules on pairs of slots leave it no completion. Raises InputError where a material is in a slot twice.
    """
    if batch_rows < 1:
        raise InputError(f"batch_rows is {batch_rows}; it must be at least 1")
    steps, codes = _steps(_checked(space))
    return _batches(space, steps, codes, batch_rows)


def _batches(space: Space, steps: list[_Step], codes: Sequence[Ints], batch_rows: int) -> Iterator[Any]:
    as_record_batch = _Batches(space)
    root = [np.zeros(1, np.uint64), np.zeros(1, np.uint64)]
    waiting: list[list[NDArray[Any]]] = []
    rows = 0
    for block in _grow(steps, codes, 0, root, batch_rows):
        waiting.append(block)
        rows += len(block[-1])
        while rows >= batch_rows:
            columns = (
                waiting[0] if len(waiting) == 1 else [np.concatenate(parts) for parts in zip(*waiting, strict=True)]
            )
            yield as_record_batch([column[:batch_rows] for column in columns])
            rows -= batch_rows
            waiting = [[column[batch_rows:] for column in columns]] if rows else []
    if rows:
        yield as_record_batch([np.concatenate(parts) for parts in zip(*waiting, strict=True)])


def _steps(space: Space) -> tuple[list[_Step], Sequence[Ints]]:
    net = _net(space)
    classes = _classes(net)
    usable, tables = _supported(classes)
    tables = _with_lookahead(classes.sizes, tables)
    steps = []
    for s, codes in enumerate(classes.of_option):
        choices = np.flatnonzero(codes >= 0)
        choices = choices[usable[s][codes[choices]]]
        own = codes[choices]
        filters = tuple(
            (scope[:-1], np.ascontiguousarray(t[..., own])) for scope, t in tables.items() if scope[-1] == s
        )
        steps.append(
            _Step(
                choices,
                choices.astype(_index_type(space.sizes[s])),
                np.ascontiguousarray(space.lanes[s][choices].T),
                filters,
                tuple(nogood for nogood in net.wide if s in nogood.scope and s >= nogood.decided_from),
                space.sizes[s],
            )
        )
    return steps, classes.of_option


def _supported(classes: _Classes) -> tuple[list[Bools], dict[tuple[int, ...], Bools]]:
    """Return which classes of each slot, and which of two slots together, some legal variant shows.

    Pairs only where that says more than the slots on their own. What would take too large a table to know is as the
    rules on it alone say, and where rules over three slots and more would make this slow they are left out.
    """
    slots = range(len(classes.weights))
    if len(slots) ** 2 * _order(classes.sizes, [f.scope for f in classes.factors], ())[1] > LARGEST_LOOKAHEAD:
        on_slots = tuple(f for f in classes.factors if all(x in slots for x in f.scope))
        classes = replace(classes, factors=on_slots, wide=())
    given = {f.scope: f.table > 0 for f in classes.factors if all(x in slots for x in f.scope)}

    def support(keep: tuple[int, ...], otherwise: Bools) -> Bools:
        asked = _with_unity(classes, keep)
        _, largest = _order(classes.sizes, [f.scope for f in asked.factors], keep)
        return _total(asked, keep, _whether) > 0 if largest <= LARGEST_LOOKAHEAD else otherwise

    usable = [support((s,), np.ones(classes.sizes[s], np.bool_)) for s in slots]
    tables: dict[tuple[int, ...], Bools] = {}
    for component in _components(len(classes.sizes), [f.scope for f in classes.factors]):
        inside = sorted(s for s in component if s in slots)
        for i, j in combinations(inside, 2):
            apart = np.logical_and.outer(usable[i], usable[j])
            table = support((i, j), given.get((i, j), apart)) & apart
            if (table != apart).any():
                tables[i, j] = table
    return usable, tables


def _with_lookahead(sizes: Sequence[int], tables: Mapping[tuple[int, ...], Bools]) -> dict[tuple[int, ...], Bools]:
    """Return the tables and what they imply for prefixes: "some option of the later slots can still follow".

    Slots are summed out from the last one on (adaptive consistency, Dechter 1999), so that no prefix that passes is
    dead. A table too large is left out, which lets some dead prefixes pass and no illegal variant.
    """
    known = dict(tables)
    waiting = {scope: table.astype(np.float64) for scope, table in tables.items()}
    for s in range(max((scope[-1] for scope in waiting), default=0), 0, -1):
        bucket = [_Factor(scope, waiting.pop(scope)) for scope in list(waiting) if scope[-1] == s]
        scope = tuple(sorted({x for f in bucket for x in f.scope} - {s}))
        if not scope or math.prod(sizes[x] for x in scope) * (sizes[s] if len(bucket) > 2 else 1) > LARGEST_LOOKAHEAD:
            continue
        left, _ = _eliminate(bucket, [s], _whether)
        implied = _product(left, scope, [sizes[x] for x in scope])
        if not implied.all():
            waiting[scope] = waiting[scope] * implied if scope in waiting else implied
            known[scope] = waiting[scope] > 0
    return known


def _grow(
    steps: Sequence[_Step], codes: Sequence[Ints], s: int, block: list[NDArray[Any]], budget: int
) -> Iterator[list[NDArray[Any]]]:
    """Yield blocks of legal variants that begin with the prefixes in `block`: a column per slot and the two lanes."""
    step = steps[s]
    n_choices = len(step.choices)
    rows_at_once = max(1, budget // max(n_choices, 1))
    for start in range(0, len(block[-1]) if n_choices else 0, rows_at_once):
        piece = [column[start : start + rows_at_once] for column in block]
        grown = _extended(step, codes, piece)
        if len(grown[-1]) == 0:
            continue
        if s + 1 == len(steps):
            yield grown
        else:
            yield from _grow(steps, codes, s + 1, grown, budget)


def _extended(step: _Step, codes: Sequence[Ints], piece: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """Return every prefix of the piece with every choice that may follow it."""
    rows, n_choices = len(piece[-1]), len(step.choices)
    spend((rows * n_choices + CALL_WORK) * (3 + len(step.filters) + len(step.wide)))
    *prefix, first, second = piece
    mask = _followers(step, codes, prefix, rows)
    if mask is None:
        columns = [np.repeat(column, n_choices) for column in prefix]
        chosen = np.tile(step.column, rows)
        sums = [
            (lane[:, None] + own[None, :]).ravel() for lane, own in ((first, step.lanes[0]), (second, step.lanes[1]))
        ]
        return [*columns, chosen, *sums]
    shape = (rows, n_choices)
    columns = [np.broadcast_to(column[:, None], shape)[mask] for column in prefix]
    chosen = np.broadcast_to(step.column, shape)[mask]
    sums = [(lane[:, None] + own[None, :])[mask] for lane, own in ((first, step.lanes[0]), (second, step.lanes[1]))]
    return [*columns, chosen, *sums]


def _followers(step: _Step, codes: Sequence[Ints], prefix: Sequence[NDArray[Any]], rows: int) -> Bools | None:
    """Return (rows, choices): which choices may follow which prefix; None where all may."""
    mask: Bools | None = None
    for before, table in step.filters:
        follow = (
            table[tuple(codes[b][prefix[b]] for b in before)] if before else np.broadcast_to(table, (rows, len(table)))
        )
        mask = follow if mask is None else mask & follow
    columns = [*prefix, *([None] * (len(codes) - len(prefix)))]
    for nogood in step.wide:
        completions = nogood.completions(columns, len(prefix), rows, step.size)
        if completions is not None and len(completions[0]):
            where, complete = completions
            mask = np.ones((rows, len(step.choices)), np.bool_) if mask is None else np.array(mask)
            mask[where] &= ~complete[:, step.choices]
    return mask


# ------------------------------------------------------------------------------------------------ sampling


def sample(space: Space, n: int, rng: np.random.Generator) -> Any:
    """Return n legal variants drawn uniformly, with replacement, as a record batch.

    Exact up to rounding: slots are drawn one after the other from the numbers of legal completions; where rules over
    three slots and more are too many for that, the others' completions are drawn and illegal ones rejected. Raises
    InputError where no variant is legal, or too few are for that.
    """
    net = _net(_checked(space))
    if not _any_legal(net):
        raise InputError("no variant is legal: nothing to sample; `diagnose` says which rules are in conflict")
    classes = _weighted(_classes(net))
    exact = not net.wide or _order(classes.sizes, [f.scope for f in classes.factors], ())[1] <= LARGEST_TABLE
    if not exact:
        classes = _weighted(_classes(replace(net, wide=())))
    found, proposed = np.zeros((0, len(space.slots)), np.int64), 0
    while len(found) < n:
        if proposed > MOST_PROPOSALS:
            raise InputError(f"{len(found)} of {proposed:,} draws were legal: too few to sample; `explode` lists them")
        drawn = _draw(classes, max(n, 10_000) if proposed else n, rng)
        rows = np.empty((len(drawn), len(space.slots)), np.int64)
        for s, codes in enumerate(classes.of_option):
            members = np.argsort(codes, kind="stable")[np.count_nonzero(codes < 0) :]
            counts = classes.weights[s].astype(np.int64)
            starts = np.cumsum(counts) - counts
            rows[:, s] = members[starts[drawn[:, s]] + rng.integers(0, counts[drawn[:, s]])]
        found = np.concatenate([found, rows if exact else rows[is_legal(space, rows)]])
        proposed += len(rows)
    return as_batch(space, found[:n])


def _draw(classes: _Classes, n: int, rng: np.random.Generator) -> Ints:
    """Return (n, variables) draws from the distribution proportional to the product of the factors."""
    sizes = classes.sizes
    order, largest = _order(sizes, [f.scope for f in classes.factors], ())
    drawn = np.zeros((n, len(sizes)), np.int64)
    split = _widest(classes, ()) if largest > LARGEST_TABLE else None
    if split is not None:
        parts = [_fix(classes, split, value) for value in range(sizes[split])]
        weights = np.array([0.0 if part is None else float(_total(part, (), _exactly)) for part in parts])
        chosen = rng.choice(sizes[split], n, p=weights / weights.sum())
        for value, part in enumerate(parts):
            rows = np.flatnonzero(chosen == value)
            if part is not None and len(rows):
                drawn[rows] = _draw(part, len(rows), rng)
        drawn[:, split] = chosen
        return drawn
    _, buckets = _eliminate(classes.factors, order, _exactly)
    for x, bucket in zip(reversed(order), reversed(buckets), strict=True):
        weight = np.ones((n, sizes[x]))
        for f in bucket:
            others = [v for v in f.scope if v != x]
            table = f.table.transpose([*(f.scope.index(v) for v in others), f.scope.index(x)])
            weight = weight * table[tuple(drawn[:, v] for v in others)]
        cumulative = np.cumsum(weight, axis=1)
        drawn[:, x] = (cumulative <= (rng.random(n) * cumulative[:, -1])[:, None]).sum(axis=1)
    return drawn


# ------------------------------------------------------------------------------------------------ diagnosing


@dataclass(frozen=True)
class Finding:
    """Something wrong (or odd) with a space; `constraints` are the texts of the rules it is about.

    Codes: empty_slot, duplicate_material, no_legal_variant (errors); unusable_material, forbids_nothing, unknown_name
    (warnings); redundant, not_all_checked (info).
    """

    code: str
    level: Level
    message: str
    constraints: tuple[str, ...] = ()
    slot: str | None = None
    materials: tuple[str, ...] = ()


def diagnose(space: Space) -> tuple[Finding, ...]:
    """Return what is wrong with a space, errors first; nothing if all is well.

    - forbids_nothing: alone, on these slots, the rule rules no combination out.
    - redundant: the other rules together already rule out all that this one does. Of two rules that say the same, both.
    - no_legal_variant: with a smallest set of rules in conflict: without any one of them, some variant is legal.
    - unusable_material: no legal variant shows it, with a smallest set of rules that see to that.
    - not_all_checked: the last two would have taken more than MOST_WORK together, and what was found is reported.

    Smallest sets come from a deletion filter (Chinneck & Dravnieks, ORSA J. Computing 3, 1991): minimal, and where
    several are, one of them. Raises TooComplexError where even whether a variant is legal takes more than MOST_WORK.
    """
    findings = [*_slot_findings(space), *_name_findings(space)]
    if not any(finding.level is Level.ERROR for finding in findings):
        with work_limit():
            findings += _rule_findings(space)
    return tuple(sorted(findings, key=lambda finding: list(Level).index(finding.level)))


def _rule_findings(space: Space) -> list[Finding]:
    idle = [r for r, (_, nogoods) in enumerate(space.rules) if not _forbids_something(space, nogoods)]
    texts = [space.rules[r][0] for r in idle]
    findings = [Finding("forbids_nothing", Level.WARNING, f"{t}: rules out no combination", (t,)) for t in texts]
    active = [r for r in range(len(space.rules)) if r not in idle]
    if not _any_legal(_net(space, active)):
        return [*findings, _conflict_finding(space, active)]
    try:
        for finding in chain(_unusable_findings(space, active), _redundant_findings(space, active)):
            findings.append(finding)
    except TooComplexError:
        message = (
            "the rules tie so many slots together that not everything was looked for: there may be materials that no"
            " variant can show, and rules that the others already imply"
        )
        findings.append(Finding("not_all_checked", Level.INFO, message))
    return findings


def _slot_findings(space: Space) -> Iterator[Finding]:
    for slot in space.slots:
        if not slot.options:
            yield Finding("empty_slot", Level.ERROR, f"slot {slot.name} has no material", slot=slot.name)
        ids = [option.id for option in slot.options]
        twice = tuple(sorted({i for i in ids if ids.count(i) > 1}))
        if twice:
            message = f"slot {slot.name}: {', '.join(twice)} is there more than once; list every material once"
            yield Finding("duplicate_material", Level.ERROR, message, slot=slot.name, materials=twice)


def _name_findings(space: Space) -> Iterator[Finding]:
    for constraint in space.constraints:
        text = str(constraint)
        for name, why in _unknown_names(_Parser(text).read()[1], space.slots, {}, ("material", "dimension", "value")):
            yield Finding("unknown_name", Level.WARNING, f"{text}, position {name.at + 1}: {why}", (text,))


def _forbids_something(space: Space, nogoods: Sequence[Nogood]) -> bool:
    return any(_any_legal(_net(space, ()).within(nogood)) for nogood in nogoods)


def _smallest(rules: Sequence[int], still: Callable[[Sequence[int]], bool]) -> tuple[int, ...]:
    """Return a subset of the rules for which `still` is true and false without any one of them."""
    needed = list(rules)
    # Halves first: a conflict of few among many rules is then found in few steps.
    step = len(needed) // 2
    while step:
        at = 0
        while at < len(needed):
            without = needed[:at] + needed[at + step :]
            if still(without):
                needed = without
            else:
                at += step
        step //= 2
    return tuple(needed)


def _conflict_finding(space: Space, active: Sequence[int]) -> Finding:
    conflict = _smallest(active, _excludes(space, Nogood({}, {})))
    texts = tuple(space.rules[r][0] for r in conflict)
    emptied = [s for s, live in enumerate(_net(space, conflict).live) if not live.any()]
    slot = space.slots[emptied[0]].name if emptied else None
    what = f"no material is left for slot {slot}" if slot else "no variant is left"
    verb = "leaves none" if len(texts) == 1 else "leave none together"
    return Finding("no_legal_variant", Level.ERROR, f"{what}: {'; '.join(texts)} {verb}", texts, slot)


def _unusable_findings(space: Space, active: Sequence[int]) -> Iterator[Finding]:
    classes = _classes(_net(space, active))
    for s, slot in enumerate(space.slots):
        unusable = np.flatnonzero(~_usable(classes, (s,)))
        blamed: dict[tuple[str, ...], list[str]] = {}
        alike: dict[bytes, tuple[str, ...]] = {}
        for option in unusable:
            looks = _looks(space, active, s, int(option))
            if looks not in alike:
                only = Nogood({s: np.arange(space.sizes[s]) == option}, {})
                alike[looks] = tuple(space.rules[r][0] for r in _smallest(active, _excludes(space, only)))
            blamed.setdefault(alike[looks], []).append(slot.options[option].id)
        for texts, materials in blamed.items():
            message = f"slot {slot.name}: no legal variant shows {', '.join(materials)}, because of {'; '.join(texts)}"
            yield Finding("unusable_material", Level.WARNING, message, texts, slot.name, tuple(materials))


def _excludes(space: Space, nogood: Nogood) -> Callable[[Sequence[int]], bool]:
    """Return the question whether rules leave no legal variant that meets the nogood."""
    return lambda rules: not _any_legal(_net(space, rules).within(nogood))


def _looks(space: Space, active: Sequence[int], s: int, option: int) -> bytes:
    """Return everything that the rules say about an option: options with the same bytes are treated alike."""
    said = [
        part
        for r in active
        for nogood in space.rules[r][1]
        for part in (
            *(m[option : option + 1] for ms in (nogood.masks, *nogood.anywhere) for t, m in ms.items() if t == s),
            *(table[option] if i == s else table[:, option] for (i, j), table in nogood.tables.items() if s in (i, j)),
        )
    ]
    return np.packbits(np.concatenate([np.zeros(0, np.bool_), *said])).tobytes()


def _redundant_findings(space: Space, active: Sequence[int]) -> Iterator[Finding]:
    for r in active:
        others = _net(space, [other for other in active if other != r])
        text, nogoods = space.rules[r]
        if not any(_any_legal(others.within(nogood)) for nogood in nogoods):
            message = f"{text}: the other rules already rule out all that this one does"
            yield Finding("redundant", Level.INFO, message, (text,))
