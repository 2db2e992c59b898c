"""Which few of very many variants to show, and what their traffic can teach.

`cover` picks a capped subset in which legal pairs of materials meet and tag values are even; `traffic` says how many
exposures main effects and pairs take. What is legal is `combiner.py`'s; docs/combiner.md has the methods and figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kaleidoscope.combiner import (
    CALL_WORK,
    VARIANT_ID,
    MaterialTerm,
    Space,
    TagTerm,
    as_batch,
    count,
    explode,
    is_legal,
    pair_support,
    positions_of,
    spend,
    tag_matrix,
    tag_values,
    wide_nogoods,
    work_limit,
)
from kaleidoscope.errors import InputError

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]

LIST_UP_TO = 4  # times the cap: spaces no larger are listed and thinned out by hash
ROWS_TRIED = 10_000  # variants built beyond the cap, to say which cap would cover everything
PATIENCE = 200  # dead ends after which a pair waits until more materials are in play
MOST_WEIGHT = 8.0  # how much more often than the average, at most, a material is to fill a free place


# ------------------------------------------------------------------------------------------------ covering


@dataclass(frozen=True)
class Balance:
    """How evenly the variants carry the values of a dimension.

    `variants`: value → variants that carry it. `evenness`: the entropy of those numbers over its maximum, 1 where they
    are equal; None where the dimension has fewer than two values.
    """

    dimension: str
    variants: Mapping[str, int]
    evenness: float | None


@dataclass(frozen=True, eq=False)
class Cover:
    """A subset of a space's legal variants. A pair is two materials of different slots.

    `variants`: a record batch as `explode` gives it, kept ones first. `kept`: how many of `keep` are in; `dropped`: how
    many are not (illegal, unknown, repeated, beyond the cap, or gone to make room).
    `pairs_illegal`: pairs that no legal variant holds.
    `uncovered`: the legal pairs that no chosen variant holds, a record batch slot, material, other_slot,
    other_material. `needed`: a cap that was seen to cover all legal pairs, an upper bound of the smallest; None where
    building one was given up. `needed_at_least`: no fewer variants can.
    """

    variants: Any
    kept: int
    dropped: int
    pairs_legal: int
    pairs_illegal: int
    pairs_covered: int
    uncovered: Any
    needed: int | None
    needed_at_least: int
    balance: tuple[Balance, ...]

    @cached_property
    def combinations(self) -> tuple[dict[str, str], ...]:
        """The chosen variants as slot → material id."""
        return tuple(self.variants.drop_columns([VARIANT_ID]).to_pylist())


def cover(space: Space, cap: int, keep: Iterable[Mapping[str, str]] = (), *, seed: int = 0) -> Cover:
    """Return at most `cap` legal variants that hold as many legal pairs of materials as they can, tag values even.

    All variants if there are no more than the cap; else those of `keep` that are still legal, then variants for the
    pairs, then others up to the cap that make tags even. Where the cap has no room for pairs of new materials, kept
    variants that hold fewer pairs on their own make room, later ones first; the first of `keep` always stays. Only
    small spaces are listed.

    Stable: choices depend on ids by hash (weighted rendezvous) and on the order of options, and a material appended to
    its slot leaves most of them as they were if the cap leaves room; `keep` makes that all. Two constructions are
    used. *Shells* take materials in order: the n-th of every slot meets all earlier ones before any later one is looked
    at, so later ones change nothing. Where that takes more than the cap, the greedy of Cohen, Dalal, Fredman & Patton
    (IEEE Trans. Software Eng. 23, 1997; AETG) takes the material with most open pairs, then what adds most to it.

    Raises InputError where cap < 1, no variant is legal, or a material is in a slot twice, TooComplexError where it
    takes more than MOST_WORK.
    """
    if cap < 1:
        raise InputError(f"cap is {cap}; it must be at least 1")
    with work_limit():
        return _cover(space, cap, list(keep), seed)


def _cover(space: Space, cap: int, wanted: Sequence[Mapping[str, str]], seed: int) -> Cover:
    legal = count(space)
    if legal == 0:
        raise InputError("no variant is legal: nothing to choose from; `diagnose` says which rules are in conflict")
    board = _Board(space)
    kept = _kept(space, wanted)[:cap]
    rows, needed = kept, None
    if legal <= cap:
        rows, needed = _with_others(kept, _all_rows(space)), legal
    else:
        for row in kept + board.offsets:
            board.mark(row)
        chosen, more = _rows_for_pairs(board, cap, seed, anew=len(kept) == 0)
        needed = None if more is None else len(kept) + more
        kept = _made_room(board, kept, chosen, cap)
        rows = np.concatenate([kept, chosen])[:cap]
        if len(rows) < cap:
            rows = _filled(space, board, rows, cap, legal, seed)
    uncovered = board.open_after(rows)
    if len(uncovered) == 0:
        needed = min(len(rows), needed or len(rows))
    variants = as_batch(space, rows)
    return Cover(
        variants=variants,
        kept=len(kept),
        dropped=len(wanted) - len(kept),
        pairs_legal=board.pairs_legal,
        pairs_illegal=board.pairs_possible - board.pairs_legal,
        pairs_covered=board.pairs_legal - len(uncovered),
        uncovered=_pair_batch(space, board, uncovered),
        needed=needed,
        needed_at_least=board.largest_block(board.legal),
        balance=balance(space, variants),
    )


def balance(space: Space, variants: Any) -> tuple[Balance, ...]:
    """Return how evenly a record batch of variants carries the values of every dimension."""
    found = []
    for dimension, values in tag_values(space).items():
        carrying = tag_matrix(space, variants, dimension).sum(axis=0)
        evenness = None
        if len(values) > 1 and carrying.any():
            share = carrying[carrying > 0] / carrying.sum()
            evenness = float(-(share * np.log(share)).sum() / math.log(len(values)))
        found.append(Balance(dimension, dict(zip(values, carrying.tolist(), strict=True)), evenness))
    return tuple(found)


class _Board:
    """Which pairs are legal, and which of them are still open.

    The T options of all slots are in one numbering: option o of slot s is number `offsets[s] + o`.
    """

    def __init__(self, space: Space) -> None:
        sizes = np.array(space.sizes)
        self.offsets: Ints = np.cumsum(sizes) - sizes
        self.slot: Ints = np.repeat(np.arange(len(sizes)), sizes)  # (T,)
        self.rank: Ints = np.arange(len(self.slot)) - self.offsets[self.slot]  # (T,) place in its slot
        self.elsewhere: Bools = self.slot[None, :] != np.arange(len(sizes))[:, None]  # (slots, T) not in the slot
        self.legal: Bools = np.zeros((len(self.slot), len(self.slot)), np.bool_)  # (T, T) some legal variant holds both
        for (i, j), support in pair_support(space).items():
            self.legal[self.options(i, sizes), self.options(j, sizes)] = support
            self.legal[self.options(j, sizes), self.options(i, sizes)] = support.T
        self.sizes: Ints = sizes
        alone = np.arange(sizes[0])[:, None]
        usable: Bools = np.asarray(self.legal.any(axis=1) if len(sizes) > 1 else is_legal(space, alone))
        self.fits: Bools = self.legal | np.diag(usable)  # (T, T) may be in one variant: of its own slot, only itself
        self.usable: Bools = usable
        self.wide = wide_nogoods(space)
        self.keys: Keys = np.concatenate(space.lanes)[:, 0]
        self.weights: Floats = _even_weights(space)
        self.pairs_legal = int(self.legal.sum()) // 2
        self.pairs_possible = (int(sizes.sum()) ** 2 - int((sizes**2).sum())) // 2
        self.covered: Bools = np.zeros_like(self.legal)
        self.seen: Bools = np.zeros(len(self.slot), np.bool_)
        self.a_material = len(sizes) ** 2  # adding a material that is not shown yet outweighs all pairs of a variant
        self.reopen()

    def options(self, s: int, sizes: Ints | None = None) -> slice:
        """The numbers of a slot's options."""
        size = (self.sizes if sizes is None else sizes)[s]
        return slice(int(self.offsets[s]), int(self.offsets[s] + size))

    def reopen(self) -> None:
        """Every legal pair that is not covered is open."""
        self.open: Bools = self.legal & ~self.covered
        self.to_go: Ints = self.open.sum(axis=1)

    def copy(self) -> _Board:
        """The same with marks of its own."""
        other = copy(self)
        other.covered, other.seen = self.covered.copy(), self.seen.copy()
        other.reopen()
        return other

    def mark(self, row: Ints) -> int:
        """Show a variant (option numbers); return what that added: pairs, and `a_material` for each new material."""
        where = np.ix_(row, row)
        closed = self.open[where].sum(axis=1)
        self.to_go[row] -= closed
        self.open[where] = False
        self.covered[where] = True
        added = int(closed.sum()) // 2 + self.a_material * int((~self.seen[row]).sum())
        self.seen[row] = True
        return added

    def open_after(self, rows: Ints) -> Ints:
        """Return the legal pairs (pairs, 2) that none of some variants (rows, slots of positions) holds."""
        left = np.triu(self.legal)
        numbers = rows + self.offsets
        for i, j in combinations(range(len(self.sizes)), 2):
            left[numbers[:, i], numbers[:, j]] = False
        return np.argwhere(left)

    def largest_block(self, pairs: Bools) -> int:
        """Return the most pairs between two slots: no variant holds two of them."""
        n = range(len(self.sizes))
        return max((int(pairs[self.options(i), self.options(j)].sum()) for i, j in combinations(n, 2)), default=0)

    def excluded(self, chosen: Sequence[int], number: int) -> Bools | None:
        """Return the options that rules over three slots or more forbid now that `number` joined; None: no rule."""
        out: Bools | None = None
        newest = int(self.slot[number])
        columns = [None if n < 0 else np.array([self.rank[n]]) for n in chosen]
        for nogood in self.wide:
            if newest not in nogood.scope:
                continue
            out = np.zeros(len(self.slot), np.bool_) if out is None else out
            for s in nogood.scope:
                found = None if chosen[s] >= 0 else nogood.completions(columns, s, 1, int(self.sizes[s]))
                if found is not None and len(found[0]):
                    out[self.options(s)] |= found[1][0]
        return out


def _rows_for_pairs(board: _Board, cap: int, seed: int, *, anew: bool) -> tuple[Ints, int | None]:
    """Return variants (rows, slots of positions) for the open pairs, at most `cap`, and how many would cover all.

    By shells, if nothing is there yet (`anew`) and the cap has room for them.
    """
    shells = _shells(board.copy(), seed) if anew and board.largest_block(board.open) <= cap else None
    if shells is not None and len(shells) <= cap:
        return _positions(board, shells), len(shells)
    greedy, complete = _greedy(board.copy(), max(cap, ROWS_TRIED), seed)
    seen = [len(rows) for rows, done in ((greedy, complete), (shells, True)) if rows is not None and done]
    return _positions(board, greedy[:cap]), min(seen, default=None)


def _positions(board: _Board, rows: Sequence[Ints]) -> Ints:
    return np.array(rows, np.int64).reshape(-1, len(board.sizes)) - board.offsets


def _greedy(board: _Board, limit: int, seed: int) -> tuple[list[Ints], bool]:
    """Return variants until no pair is open or `limit` is reached, and whether no pair is open."""
    rows: list[Ints] = []
    started = np.zeros(len(board.slot), np.uint64)
    while len(rows) < limit and board.to_go.any():
        most = np.flatnonzero(board.to_go == board.to_go.max())
        first = int(most[np.argmin(board.keys[most])])
        row = _complete(board, first, board.usable, _mixed(board.keys[first] + started[first], seed))
        started[first] += np.uint64(1)
        assert row is not None  # its pairs are legal, and the search was complete
        rows.append(row)
        board.mark(row)
    return rows, not board.to_go.any()


def _shells(board: _Board, seed: int) -> list[Ints]:
    """Return variants that cover all open pairs, those of earlier materials first.

    Shell n is the n-th material of every slot; its variants show materials up to the n-th only. A pair that cannot be
    completed with those waits for the end.
    """
    rows: list[Ints] = []
    started = np.zeros(len(board.slot), np.uint64)
    for shell in range(int(board.sizes.max())):
        within = board.usable & (board.rank <= shell)
        new = np.flatnonzero(within & (board.rank == shell))
        while len(new):
            to_go = board.open[np.ix_(new, np.flatnonzero(within))].sum(axis=1)
            if not to_go.any():
                break
            first = int(new[np.argmax(to_go)])
            key = _mixed(board.keys[first] + started[first], seed)
            row = _complete(board, first, within, key, in_order=True, patience=PATIENCE)
            started[first] += np.uint64(1)
            if row is None or not board.open[np.ix_(row, row)].any():
                board.open[first, within] = False
                board.open[within, first] = False
            else:
                rows.append(row)
                board.mark(row)
    board.reopen()
    return rows + _greedy(board, 2**62, seed)[0]


def _complete(
    board: _Board, first: int, within: Bools, key: np.uint64, *, in_order: bool = False, patience: int | None = None
) -> Ints | None:
    """Return a legal variant (slots,) of option numbers with `first` and options of `within` that adds many open pairs.

    Backtracking with forward checking. None if there is none, or after `patience` dead ends. Materials not shown yet
    come first (not in shells: those come to every material), then pairs. Ties go by hash of option and key, or by
    order; a place where nothing adds anything goes by weighted hash.
    """
    dead_ends = 0

    def joined(chosen: list[int], domain: Bools, gains: Ints, number: int) -> list[int] | None:
        nonlocal dead_ends
        spend(2 * (CALL_WORK + len(board.slot)))
        chosen = list(chosen)
        chosen[board.slot[number]] = number
        free = [s for s, n in enumerate(chosen) if n < 0]
        if not free:
            return chosen
        domain = domain & board.fits[number]
        excluded = board.excluded(chosen, number) if board.wide else None
        if excluded is not None:
            domain &= ~excluded
        gains = gains + board.open[number]
        candidates = domain & board.elsewhere[[s for s, n in enumerate(chosen) if n >= 0]].all(axis=0)
        while np.logical_or.reduceat(candidates, board.offsets)[free].all():
            following = _best(board, candidates, gains, free, key, in_order=in_order)
            row = joined(chosen, domain, gains, following)
            if row is not None or (patience is not None and dead_ends > patience):
                return row
            candidates[following] = domain[following] = False
        dead_ends += 1
        return None

    if not within[first]:
        return None
    unseen = np.where(board.seen | in_order, 0, board.a_material)
    row = joined([-1] * len(board.sizes), within.copy(), unseen, first)
    return None if row is None else np.array(row)


def _best(board: _Board, candidates: Bools, gains: Ints, free: Sequence[int], key: np.uint64, *, in_order: bool) -> int:
    """Return the option that adds most open pairs; where none adds any, one for the first free slot."""
    gain = np.where(candidates, gains, 0)
    most = gain.max()
    if most > 0:
        ties = np.flatnonzero(gain == most)
        best = np.argmin(board.rank[ties]) if in_order else np.argmin(_uniform(board.keys[ties], key))
    else:
        ties = np.flatnonzero(candidates & (board.slot == free[0]))
        best = np.argmin(-np.log(_uniform(board.keys[ties], key)) / board.weights[ties])
    return int(ties[best])


def _mixed(key: np.uint64 | Keys, seed: int) -> Any:
    """Return 64 well-mixed bits of a key (Steele, Lea & Flood, OOPSLA 2014: SplitMix64's finaliser)."""
    with np.errstate(over="ignore"):
        mixed = key + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mixed ^ (mixed >> np.uint64(31))


def _uniform(keys: Keys, key: np.uint64 | Keys) -> Floats:
    """Return, per option key, a number in (0, 1] that depends on it and on another key and nothing else."""
    return ((_mixed(keys ^ key, 1) >> np.uint64(11)) + np.uint64(1)) * 2.0**-53  # type: ignore[no-any-return]


def _kept(space: Space, wanted: Sequence[Mapping[str, str]]) -> Ints:
    """Return the positions (rows, slots) of what is known and legal, each once."""
    names = [slot.name for slot in space.slots]
    known: dict[tuple[int, ...], None] = {}
    for materials in wanted:
        found = [positions.get(materials.get(name, "")) for name, positions in zip(names, space.positions, strict=True)]
        if len(materials) == len(names) and all(p is not None for p in found):
            known[tuple(p for p in found if p is not None)] = None
    rows = np.array(list(known), np.int64).reshape(-1, len(names))
    return rows[is_legal(space, rows)]


def _made_room(board: _Board, kept: Ints, chosen: Ints, cap: int) -> Ints:
    """Return what stays of the kept variants once those that are least needed have made room for chosen ones.

    A variant goes if the chosen one in its place adds more than it alone holds: materials first, then pairs. Later ones
    go first, and the first of all stays.
    """
    excess = len(kept) + len(chosen) - cap
    if excess <= 0 or len(kept) == 0:
        return kept
    numbers = kept + board.offsets
    i, j = np.triu_indices(kept.shape[1], 1)
    held = np.zeros(board.legal.shape, np.int64)
    np.add.at(held, (numbers[:, i], numbers[:, j]), 1)
    shown = np.bincount(numbers.ravel(), minlength=len(board.slot))
    after = board.copy()
    gains = [after.mark(row) for row in chosen + board.offsets][len(chosen) - excess :]

    def alone(rows: Ints) -> Ints:
        pairs = (held[rows[..., i], rows[..., j]] == 1).sum(axis=-1)
        return np.asarray(pairs + board.a_material * (shown[rows] == 1).sum(axis=-1))

    stays, gone = np.ones(len(kept), np.bool_), 0
    for row in np.lexsort((-np.arange(len(kept)), alone(numbers))):
        if gone == len(gains):
            break
        if row > 0 and alone(numbers[row]) < gains[gone]:
            stays[row] = False
            held[numbers[row][i], numbers[row][j]] -= 1
            shown[numbers[row]] -= 1
            gone += 1
    return kept[stays]


def _all_rows(space: Space) -> Ints:
    """Return all legal variants (rows, slots of positions)."""
    parts = [np.stack([batch.column(s.name).indices.to_numpy() for s in space.slots], 1) for batch in explode(space)]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros((0, len(space.slots)), np.int64)


def _with_others(rows: Ints, others: Ints) -> Ints:
    """Return rows, then those of `others` that are not among them or earlier in `others`."""
    both = np.concatenate([rows, others])
    _, first = np.unique(both, axis=0, return_index=True)
    return both[np.sort(first)]


# ------------------------------------------------------------------------------------------------ evening out


def _even_weights(space: Space) -> Floats:
    """Return (T,) weights of the options with which each slot, drawn by weight, shows the values of a dimension evenly.

    Iterative proportional fitting (Deming & Stephan, Ann. Math. Statist. 11, 1940) over the slot's dimensions, no
    weight further than MOST_WEIGHT from the average; an option with several values of one takes their geometric mean.
    """
    weights = []
    for slot in space.slots:
        weight = np.ones(len(slot.options))
        dimensions = sorted({d for option in slot.options for d, values in option.tags.items() if values})
        for _ in range(20):
            for dimension in dimensions:
                values = sorted({v for option in slot.options for v in option.tags.get(dimension, ())})
                carries = np.array([[v in o.tags.get(dimension, ()) for v in values] for o in slot.options])
                shown = weight @ carries
                step = carries @ np.log(shown.mean() / shown) / np.maximum(carries.sum(axis=1), 1)
                weight = weight * np.exp(step)
                weight = np.clip(weight / weight.mean(), 1 / MOST_WEIGHT, MOST_WEIGHT)
        weights.append(weight)
    return np.concatenate(weights)


def _filled(space: Space, board: _Board, rows: Ints, cap: int, legal: int, seed: int) -> Ints:
    """Return the rows and others up to the cap, drawn by weighted rendezvous hashing for even tags."""
    weights = _missing(board, rows, cap)
    if legal <= LIST_UP_TO * cap:
        everything = _all_rows(space)
        numbers = everything + board.offsets
        key = _mixed(np.bitwise_xor.reduce(_mixed(board.keys[numbers], 2), axis=1), seed)
        score = -np.log(_uniform(key, np.uint64(0))) / weights[numbers].prod(axis=1)
        return _with_others(rows, everything[np.argsort(score, kind="stable")])[:cap]
    tried, block = 0, 4096
    while len(rows) < cap and tried < 20 * cap + 100 * block:
        keys = _mixed(np.arange(tried, tried + block, dtype=np.uint64), seed + 1)
        rows = _with_others(rows, _drawn(space, board, keys, weights))
        tried += block
    for batch in explode(space) if len(rows) < cap else ():
        listed = np.stack([batch.column(s.name).indices.to_numpy() for s in space.slots], 1)
        rows = _with_others(rows, listed.astype(np.int64))
        if len(rows) >= cap:
            break
    return rows[:cap]


def _missing(board: _Board, rows: Ints, cap: int) -> Floats:
    """Return (T,) weights that make up for what the rows showed too much or too little of."""
    shown = np.bincount((rows + board.offsets).ravel(), minlength=len(board.slot))
    usable = np.where(board.usable, board.weights, 0)
    wanted = cap * usable / np.add.reduceat(usable, board.offsets)[board.slot]
    return np.maximum(np.maximum(wanted - shown, 0.02 * wanted), 1e-9)


def _drawn(space: Space, board: _Board, keys: Keys, weights: Floats) -> Ints:
    """Return legal variants (rows, slots of positions), at most one per key, slot by slot by weighted hash."""
    fits = np.broadcast_to(board.usable, (len(keys), len(board.slot)))
    picks = np.zeros((len(keys), len(board.sizes)), np.int64)
    alive = np.ones(len(keys), np.bool_)
    for s in range(len(board.sizes)):
        inside = board.options(s)
        draw = -np.log(_uniform(board.keys[None, inside], keys[:, None])) / weights[inside]
        draw = np.where(fits[:, inside], draw, np.inf)
        picks[:, s] = draw.argmin(axis=1)
        alive &= np.isfinite(draw.min(axis=1))
        fits = fits & board.fits[picks[:, s] + board.offsets[s]]
    picks = picks[alive]
    return picks[is_legal(space, picks)]


def _pair_batch(space: Space, board: _Board, pairs: Ints) -> Any:
    """Return pairs (pairs, 2) of option numbers as a record batch of names."""
    slots = pa.array([slot.name for slot in space.slots], pa.string())
    materials = pa.array([option.id for slot in space.slots for option in slot.options], pa.string())
    first, second = pairs[:, 0], pairs[:, 1]
    return pa.RecordBatch.from_pydict(
        {
            "slot": slots.take(pa.array(board.slot[first])),
            "material": materials.take(pa.array(first)),
            "other_slot": slots.take(pa.array(board.slot[second])),
            "other_material": materials.take(pa.array(second)),
        }
    )


# ------------------------------------------------------------------------------------------------ traffic

Kind = Literal["tag", "material", "tag_pair", "material_pair"]
KINDS: tuple[Kind, ...] = ("tag", "material", "tag_pair", "material_pair")


@dataclass(frozen=True)
class Needed:
    """How many exposures of random traffic an effect takes, and in how many days they come."""

    name: str
    exposures: float
    days: float


@dataclass(frozen=True)
class Learnable:
    """What a kind of effect takes. `median` and `worst` are of the learnable ones, None where there is none.

    `alpha` is the level each effect is tested at. `never`: effects that this set of variants cannot teach.
    """

    kind: Kind
    effects: int
    learnable: int
    alpha: float
    median: Needed | None
    worst: Needed | None

    @property
    def never(self) -> int:
        """How many effects this set of variants cannot teach, however long it runs."""
        return self.effects - self.learnable


@dataclass(frozen=True, eq=False)
class Traffic:
    """What a set of variants can teach with given traffic.

    `effects`: a record batch kind, first, second (null for main effects), share (of exposures that show it), exposures
    and days (null where it can never be learned), reason (why not, else null). `aliased`: tags, or materials, that
    never vary apart: the data cannot say which of them it was.
    """

    variants: int
    random_exposures_per_day: float
    kinds: tuple[Learnable, ...]
    aliased: tuple[tuple[str, ...], ...]
    effects: Any

    def of(self, kind: Kind) -> Learnable:
        """Return what one kind of effect takes."""
        return self.kinds[KINDS.index(kind)]


def traffic(
    space: Space,
    variants: Any,
    *,
    exposures_per_day: float,
    click_rate: float,
    random_share: float = 0.1,
    minimum_effect: float = 0.1,
    power: float = 0.8,
    alpha: float = 0.05,
    bonferroni: bool = True,
    design_effect: float = 1.0,
) -> Traffic:
    """Return how many exposures and days it takes to learn what a set of variants can teach.

    `variants`: a record batch (`Cover.variants`, `explode`) or a sequence of slot → material id. Assumed: the random
    bucket (`random_share` of all exposures) shows each variant equally often; exposures are independent (else give the
    `design_effect`, 1 + (exposures per user − 1) × intra-user correlation); everything else clicks at `click_rate`; an
    effect multiplies that by 1 + `minimum_effect`; two-sided tests at `alpha`, divided by the learnable effects of the
    kind if `bonferroni`; effects are compared marginally, averaged over what else this set shows with them, so tags
    that nearly always go together take more than is said here.

    A main effect compares a share f of the exposures with the rest: the two-proportion sample size with pooled variance
    under the null and unequal groups (Fleiss, Levin & Paik, Statistical Methods for Rates and Proportions, 3rd ed.,
    2003, chapter 4, without continuity correction). A pair is an interaction: the contrast p₁₁ − p₁₀ − p₀₁ + p₀₀ of
    the four cells, by the same formula (`exposures_needed`); it needs all four.

    Raises InputError for shares and rates out of range, an unknown material, or no variant.
    """
    limits = {
        "exposures_per_day": (exposures_per_day, math.inf),
        "random_share": (random_share, math.nextafter(1, 2)),
        "click_rate": (click_rate, 1 / (1 + max(minimum_effect, 0.0))),
        "minimum_effect": (minimum_effect, math.inf),
        "power": (power, 1.0),
        "alpha": (alpha, 1.0),
        "design_effect": (design_effect, math.inf),
    }
    for name, (value, most) in limits.items():
        if not 0 < value < most:
            raise InputError(
                f"{name} is {value:g}; it must be above 0 and {f'below {most:.4g}' if most < math.inf else 'finite'}"
            )
    batch = variants if isinstance(variants, pa.RecordBatch) else _as_batch(space, variants)
    if batch.num_rows == 0:
        raise InputError("no variant: there is nothing to learn from")
    found: dict[Kind, tuple[Learnable, Any]] = {}
    aliased: list[tuple[str, ...]] = []
    per_day = exposures_per_day * random_share
    members: tuple[tuple[Kind, Kind, _Members], ...] = (
        ("tag", "tag_pair", _tags(space, batch)),
        ("material", "material_pair", _materials(space, batch)),
    )
    for main, pair, shown in members:
        groups = _aliased(shown)
        aliased += [tuple(shown.names[m] for m in group) for group in groups]
        for kind, effects in ((main, _main_effects(shown, groups)), (pair, _interactions(shown, groups))):
            learnable = int((effects.reason == 0).sum())
            level = alpha / max(learnable, 1) if bonferroni else alpha
            needed = np.full(len(effects.reason), np.nan)
            can = effects.reason == 0
            needed[can] = design_effect * exposures_needed(
                effects.shares[can], click_rate, minimum_effect, power=power, alpha=level
            )
            found[kind] = _summed_up(kind, shown.names, effects, needed, per_day, level)
    table = pa.Table.from_batches([found[kind][1] for kind in KINDS]).combine_chunks().to_batches()
    return Traffic(batch.num_rows, per_day, tuple(found[kind][0] for kind in KINDS), tuple(aliased), table[0])


def exposures_needed(
    shares: Floats, click_rate: float, minimum_effect: float, *, power: float = 0.8, alpha: float = 0.05
) -> Floats:
    """Return (effects,) exposures in all cells together that find an effect with the given power.

    `shares`: (effects, cells) of the exposures; two cells (with, without), or four (both, first only, second only,
    neither). The first cell clicks at `click_rate` × (1 + `minimum_effect`), the others at `click_rate`; the contrast
    is with − without, or both − first − second + neither, d = `click_rate` × `minimum_effect` in either case. With cell
    shares f, rates p, and p̄ = Σfp the common rate under the null,

        N = (z(1 − α/2) √(p̄(1 − p̄) Σ1/f) + z(power) √(Σp(1 − p)/f))² / d²

    which for two cells is Fleiss, Levin & Paik (2003), chapter 4; for f = ½ and α = .05, power .8 it is close to
    Lehr's 16 p(1 − p)/d² a side (Statist. Med. 11, 1992).

    >>> float(exposures_needed(np.array([[0.5, 0.5]]), 0.05, 0.1)[0].round())
    62467.0
    """
    rates = np.full(shares.shape[1], click_rate)
    rates[0] *= 1 + minimum_effect
    pooled = shares @ rates
    null = NormalDist().inv_cdf(1 - alpha / 2) * np.sqrt(pooled * (1 - pooled) * (1 / shares).sum(axis=1))
    alternative = NormalDist().inv_cdf(power) * np.sqrt((rates * (1 - rates) / shares).sum(axis=1))
    return np.asarray(((null + alternative) / (click_rate * minimum_effect)) ** 2)


@dataclass(frozen=True, eq=False)
class _Members:
    """Tags or materials. `group`: (M,) their dimension or slot; `together`: (M, M) variants that show two of them."""

    names: tuple[str, ...]
    group: Ints
    together: Ints
    variants: int


@dataclass(frozen=True, eq=False)
class _Effects:
    """Effects over members: their cells' shares (effects, cells), and a code into `reasons`, 0 for learnable ones."""

    first: Ints
    second: Ints | None
    shares: Floats
    reason: Ints
    reasons: tuple[str, ...]


def _as_batch(space: Space, variants: Iterable[Mapping[str, str]]) -> Any:
    rows = [positions_of(space, materials) for materials in variants]
    return as_batch(space, np.array(rows, np.int64).reshape(-1, len(space.slots)))


def _tags(space: Space, batch: Any) -> _Members:
    values = tag_values(space)
    names = tuple(str(TagTerm(None, d, (v,))) for d in values for v in values[d])
    group = np.repeat(np.arange(len(values)), [len(v) for v in values.values()]).astype(np.int64)
    together = np.zeros((len(names), len(names)))
    for start in range(0, batch.num_rows, 2**16):
        part = batch.slice(start, 2**16)
        carries = np.hstack([np.zeros((part.num_rows, 0)), *(tag_matrix(space, part, d) for d in values)])
        together += carries.T.astype(np.float32) @ carries.astype(np.float32)
    return _Members(names, group, together.astype(np.int64), batch.num_rows)


def _materials(space: Space, batch: Any) -> _Members:
    names = tuple(str(MaterialTerm(slot.name, (option.id,))) for slot in space.slots for option in slot.options)
    sizes = np.array(space.sizes)
    offsets = np.cumsum(sizes) - sizes
    together = np.zeros((len(names), len(names)), np.int64)
    shown = [batch.column(slot.name).indices.to_numpy().astype(np.int64) for slot in space.slots]
    for i, a in enumerate(shown):
        for j, b in enumerate(shown):
            cells = np.bincount(a * sizes[j] + b, minlength=sizes[i] * sizes[j]).reshape(sizes[i], sizes[j])
            together[offsets[i] : offsets[i] + sizes[i], offsets[j] : offsets[j] + sizes[j]] = cells
    return _Members(names, np.repeat(np.arange(len(sizes)), sizes).astype(np.int64), together, batch.num_rows)


def _aliased(members: _Members) -> list[Ints]:
    """Return the sets of members that never vary apart: always together, or each exactly where the other is not.

    Two values that share out one dimension (or slot) between them are no such set: they are the same question.
    """
    each = members.together.diagonal()
    varies = (each > 0) & (each < members.variants)
    same = (members.together == each[:, None]) & (members.together == each[None, :])
    opposite = (members.together == 0) & (each[:, None] + each[None, :] == members.variants)
    opposite &= members.group[:, None] != members.group[None, :]
    linked = (same | opposite) & varies[:, None] & varies[None, :]
    from scipy.sparse.csgraph import connected_components  # a third of a second, needed here alone

    n_sets, label = connected_components(linked, directed=False)
    sets = [np.flatnonzero(label == n) for n in np.flatnonzero(np.bincount(label, minlength=n_sets) > 1)]
    return sets


def _main_effects(members: _Members, groups: Sequence[Ints]) -> _Effects:
    share = members.together.diagonal() / members.variants
    reasons = ["", "in no variant", "in every variant"]
    reason = np.where(share == 0, 1, np.where(share == 1, 2, 0))
    for group in groups:
        for m in group:
            reason[m] = len(reasons)
            others = ", ".join(members.names[other] for other in group if other != m)
            reasons.append(f"never varies apart from {others}")
    return _Effects(np.arange(len(share)), None, np.stack([share, 1 - share], 1), reason, tuple(reasons))


def _interactions(members: _Members, groups: Sequence[Ints]) -> _Effects:
    first, second = np.nonzero(np.triu(members.group[:, None] != members.group[None, :]))
    each, both = members.together.diagonal(), members.together[first, second]
    only_first, only_second = each[first] - both, each[second] - both
    cells = np.stack([both, only_first, only_second, members.variants - both - only_first - only_second], 1)
    reasons = (
        "",
        "no variant shows both",
        "no variant shows the first without the second",
        "no variant shows the second without the first",
        "no variant shows neither",
        "one of them never varies apart from something else",
    )
    confounded = np.isin(np.arange(len(each)), np.concatenate([np.zeros(0, np.int64), *groups]))
    empty = cells == 0
    reason = np.where(empty.any(axis=1), empty.argmax(axis=1) + 1, 0)
    reason[(reason == 0) & (confounded[first] | confounded[second])] = 5
    return _Effects(first, second, cells / members.variants, reason, reasons)


def _summed_up(
    kind: Kind, names: Sequence[str], effects: _Effects, needed: Floats, per_day: float, level: float
) -> tuple[Learnable, Any]:
    """Return the summary of a kind of effect, and all of them as a record batch."""
    n = len(needed)
    null = effects.reason > 0
    labels = pa.array(names, pa.string())
    batch = pa.RecordBatch.from_pydict(
        {
            "kind": pa.array([kind] * n, pa.string()),
            "first": labels.take(pa.array(effects.first)),
            "second": pa.nulls(n, pa.string()) if effects.second is None else labels.take(pa.array(effects.second)),
            "share": pa.array(effects.shares[:, 0]),
            "exposures": pa.array(needed, mask=null),
            "days": pa.array(needed / per_day, mask=null),
            "reason": pa.array(effects.reasons, pa.string()).take(pa.array(effects.reason, mask=~null)),
        }
    )

    def at(rank: int) -> Needed | None:
        if null.all():
            return None
        row = np.argsort(np.where(null, np.inf, needed), kind="stable")[rank]
        both = "" if effects.second is None else f" with {names[effects.second[row]]}"
        return Needed(f"{names[effects.first[row]]}{both}", float(needed[row]), float(needed[row] / per_day))

    can = n - int(null.sum())
    return Learnable(kind, n, can, level, at((can - 1) // 2), at(can - 1)), batch
