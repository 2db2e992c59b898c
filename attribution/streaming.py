"""A log of any size as cells, in one pass: DuckDB reads it in batches of codes, `tally` adds them up.

What a batch needs of the log (bins, vocabularies, scales of the weights) is fitted once, on a sample, and travels with
the cells, so that the next day's log gives sums that add.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa

from attribution.batches import Plan, Source, batches, number
from attribution.cells import ANYTHING, Cells, Definitions, Table, values_of
from attribution.coding import Coded, UserField, code
from attribution.tally import CHUNK, Pair, Totals, tally, unpack
from kaleidoscope import log as contract
from kaleidoscope.errors import InputError, LogError
from kaleidoscope.log import Codes, Floats
from kaleidoscope.log_schema import LogSchema

WORKERS = 2

Period = Literal["day", "week", "month"]


def stream(
    path: Path | str | Sequence[Path | str],
    schema: LogSchema,
    definitions: Definitions | None = None,
    *,
    period: Period | None = "day",
    pairs: bool = True,
    dependent: bool | None = None,
) -> Cells:
    """The cells of a log: a Parquet file, a folder of them, a CSV, or several of these.

    `definitions`: those of the cells that these will be added to (`period` and `pairs` are then theirs); None fits them
    anew, on the first. `pairs`: also user value × user value, and tag × tag. `dependent`: whether exposure depended on
    the user, where that is known; None asks a sample of the log. Tags are all that variants carry, also where they
    never vary apart.

    Without propensities an exposure counts its row weight. With them it counts (times a constant) 1/propensity, at most
    MAX_WEIGHT: as if all variants had been shown equally often to everybody (Horvitz & Thompson 1952). That needs no
    shares of variants, which change with every day that is added, and means the same whatever the days' policies were.

    All of a unit are in one replicate, in every log, process and machine: `replicate_of` its text. Without units
    exposures are dealt by their place in the file. Raises LogError where the log is not what the schema says, or where
    exposure depended on the user with unknown propensities or without a propensity floor.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(p) for p in path]
    if not paths:
        raise InputError("There is no log to sum up: name at least one file.")
    whole: Cells | None = None
    for each in paths:
        with contract.open_log(each, schema) as database:
            cells = _summed(Source(each, schema, database), definitions, period, dependent, pairs=pairs)
        definitions, whole = cells.definitions, cells if whole is None else whole + cells
    assert whole is not None
    return whole


def stream_events(
    folder: Path | str,
    definitions: Definitions | None = None,
    *,
    files: Sequence[Path] | None = None,
    outcome: Literal["click", "conversion"] = "click",
    period: Period | None = "day",
    pairs: bool = True,
) -> Cells:
    """The cells of Parquet files of the event log (kaleidoscope/events.py): of a business, a scene, a day, or one file;
    `files`: of these in the folder alone.

    Only exposures that may be learned from count. Every scene is a stratum of its own. A feature that none of the files
    has, and the definitions do, is unknown throughout; one that is new is refused (LogError). Else as `stream`.
    """
    path = Path(folder)
    with contract.open_log(path, LogSchema(label=outcome, variant=("-",)), only=files) as database:
        found = [str(name) for name, *_ in database.execute("DESCRIBE log").fetchall()]
        ours = ("unit", "scene", "bucket", "product", "propensity", "exposed_at")
        missing = [name for name in (outcome, *ours, "learn", "recorded", "described") if name not in found]
        if missing:
            raise LogError(f"{path}: is no event log: it lacks {', '.join(missing)}. For other logs there is `stream`.")
        roles = {role: [name for name in found if name.startswith(role)] for role in ("u_", "c_", "t_")}
        select = [f"CAST({outcome} AS TINYINT) AS _outcome", *(f"{name} AS _{name}" for name in ours)]
        select += [f"{contract.sql_name(n)} AS {contract.sql_name(n[2:])}" for names in roles.values() for n in names]
        user, context, variant = (tuple(name[2:] for name in names) for names in roles.values())
        if definitions is not None:
            new = sorted(set(user) - {f.name for f in definitions.fields})
            if new:
                raise LogError(
                    f"{path}: user feature {', '.join(map(repr, new))} is new since the cells that these are to be"
                    " added to. Make the cells anew from all days: leave the earlier ones out."
                )
            absent = [(f, "u_") for f in definitions.fields if f.name not in user]
            absent += [(f, "c_") for f in definitions.context if f.name not in context]
            kinds = [(f.name, "VARCHAR" if f.edges is None else "DOUBLE") for f, _ in absent]
            select += [f"CAST(NULL AS {kind}) AS {contract.sql_name(name)}" for name, kind in kinds]
            user += tuple(f.name for f, role in absent if role == "u_")
            context += tuple(f.name for f, role in absent if role == "c_")
        schema = LogSchema(
            label="_outcome", unit="_unit", group="_scene", bucket="_bucket", product="_product",
            propensity="_propensity", time="_exposed_at", user=user, context=context, variant=variant,
        )  # fmt: skip
        log = Source(path, schema, database, ", ".join(select), "learn AND recorded AND described")
        return _summed(log, definitions, period, None, pairs=pairs)


def _summed(
    log: Source, definitions: Definitions | None, period: Period | None, dependent: bool | None, *, pairs: bool
) -> Cells:
    sample = log.sample()
    if definitions is None:
        definitions = replace(_define(log, sample, dependent), period=period, pairs=pairs)
    else:
        _refuse(log, sample, definitions, dependent)
    return _cells(log, sample, definitions)


# ── what is fitted once ─────────────────────────────────────────────────────────────────────────────────────────────


def _define(log: Source, sample: pa.Table, dependent: bool | None) -> Definitions:
    """Fitted to a sample of the log; raises LogError where the log supports no claim."""
    read = log.read(sample)
    coded = code(read, dependent=dependent)
    numbers = {c: read.columns[c] for c in log.schema.context if not pa.types.is_dictionary(read.columns[c].type)}
    scales: dict[str, float | None] = {"weight": None, "propensity": None}
    with duckdb.connect() as database:
        database.register("sample", sample)
        count = "1" if log.schema.impressions is None else number(log.schema.impressions, log.types)
        for role, value in (("weight", "{}"), ("propensity", "1 / {}")):
            for name in log.schema.role(role):
                total = f"sum({count} * {value.format(number(name, log.types))})"
                query = f"SELECT sum({count}) / {total} FROM sample"
                scales[role] = float(database.execute(query).fetchall()[0][0])
    return Definitions(
        fields=coded.fields,
        context=tuple(UserField.fit(name, column, read.count) for name, column in numbers.items()),
        row_scale=scales["weight"],
        inverse_scale=scales["propensity"],
    )


def _refuse(log: Source, sample: pa.Table, definitions: Definitions, dependent: bool | None) -> None:
    """Raise InputError where a log does not fit the definitions, and LogError where it supports no claim (a few rows,
    or rows without a click, do not tell)."""
    schema = log.schema
    if sorted(schema.user) != sorted(f.name for f in definitions.fields):
        raise InputError(f"{log.path}: user fields {list(schema.user)} are not those of the definitions.")
    for role, scale in (("weight", definitions.row_scale), ("propensity", definitions.inverse_scale)):
        if (getattr(schema, role) is None) != (scale is None):
            has = "names no" if scale is not None else "names a"
            raise InputError(
                f"{log.path}: its schema {has} `{role}`, other than that of the cells it is to be added to."
            )
    missing = [f.name for f in definitions.context if f.name not in schema.context]
    if missing:
        raise InputError(
            f"{log.path}: its schema lacks {missing} in `context`, which the cells it is to be added to are parted by."
        )
    try:
        read = log.read(sample)
    except LogError:
        return
    for field in (*definitions.fields, *definitions.context):
        is_text = pa.types.is_dictionary(read.columns[field.name].type)
        # A CSV does not say that what it has only digits of is text.
        if is_text != (field.edges is None) and (is_text or not contract.is_csv(log.path)):
            here, there = ("text", "numbers") if is_text else ("numbers", "text")
            raise InputError(
                f"{log.path}: column {field.name!r} holds {here}, and the bins of the cells it is to be added to are of"
                f" {there}. Correct the export, or make the cells of both logs anew."
            )
    _: Coded = code(read, dependent=dependent)


def _cells(log: Source, sample: pa.Table, definitions: Definitions) -> Cells:
    """The one pass: batches are read here, made into codes and added up by workers, and put together in order."""
    plan = Plan.of(log, sample, definitions)
    columns = range(1 + len(plan.fields) + len(plan.dimensions))
    first_tag = 1 + len(plan.fields)
    wanted: list[Pair] = [
        (a, b) for a, b in combinations(columns, 2) if definitions.pairs or a == 0 or (a < first_tag <= b)
    ]
    totals = Totals(3 if definitions.weighted else 1)

    def work(rows: pa.Table, start: int) -> list[tuple[Codes, Floats]]:
        return tally(plan.batch(rows, start), wanted)

    def add(done: Future[list[tuple[Codes, Floats]]]) -> None:
        for keys, sums in done.result():
            totals.add(keys, sums)

    waiting: deque[Future[list[tuple[Codes, Floats]]]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        try:
            for rows, start in batches(plan):
                waiting.append(pool.submit(work, rows, start))
                del rows
                if len(waiting) > WORKERS:
                    add(waiting.popleft())
            while waiting:
                add(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()
    return _named(plan, totals)


# ── sums under their names ──────────────────────────────────────────────────────────────────────────────────────────


def _named(plan: Plan, totals: Totals) -> Cells:
    """The totals of items as cells of values and tags: a combination of tags counts for each of them.

    Of some places at a time, in the order of their names: the tables of these, one below the other, are sorted.
    """
    values = values_of(plan.definitions.fields)
    items = list(plan.items.at)
    tags = [ANYTHING, *sorted({((i[1], tag),) for i in items if i[0] == "tags" for tag in i[2]})]
    value_at, tag_at = ({name: k for k, name in enumerate(of)} for of in (values, tags))
    value_of = np.array([value_at[i[1:]] if i[0] == "value" else 0 for i in items], np.int64)
    carried = [[tag_at[(i[1], tag),] for tag in i[2]] if i[0] == "tags" else [] for i in items]
    is_tags = np.array([i[0] == "tags" for i in items], np.bool_)
    of_first = np.array([i[:2] == ("tags", plan.dimensions[0][0]) for i in items], np.bool_)
    names = [tuple(sorted({place[k] for place in plan.places.at})) for k in range(3)]
    name_at = [{name: k for k, name in enumerate(of)} for of in names]
    named = np.array([[at[n] for n, at in zip(p, name_at, strict=True)] for p in plan.places.at], np.int64)
    given = sorted(totals.of_places(), key=lambda of: tuple(named[of[0]].tolist()))
    totals.parts.clear()
    turn = (np.cumsum([len(keys) for _, keys, _ in given], dtype=np.int64) - 1) // CHUNK
    found: dict[str, list[Table]] = {"main": [], "value_pairs": [], "tag_pairs": []}
    for now in np.unique(turn).tolist():
        some = [given[at] for at in np.flatnonzero(turn == now).tolist()]
        place, replicate, left, right = unpack(np.concatenate([keys for _, keys, _ in some]))
        sums = np.concatenate([of for *_, of in some])
        sums = sums if plan.definitions.weighted else np.tile(sums, 3)

        def table(
            parts: Sequence[tuple[Codes, Codes, Codes]],
            place: Codes = place,
            replicate: Codes = replicate,
            sums: Floats = sums,
        ) -> Table:
            rows, first, second = (np.concatenate(of) for of in zip(*parts, strict=True))
            return Table.of(
                np.stack([*named.reshape(-1, 3)[place[rows]].T, replicate[rows], first, second]), sums[rows]
            )

        value_rows = np.flatnonzero(~is_tags[left] & ~is_tags[right])
        crossed, tag_rows = (np.flatnonzero(of & is_tags[right]) for of in (~is_tags[left], is_tags[left]))
        total = np.flatnonzero((left == 0) & of_first[right])  # of one dimension: every variant has one combination
        everyone = np.zeros(len(total), np.int64)
        alone, both = value_rows[left[value_rows] == 0], value_rows[left[value_rows] > 0]
        at, tag = _each(right[crossed], carried)
        rows = crossed[at]
        main = [
            (total, everyone, everyone),
            (alone, value_of[right[alone]], np.zeros(len(alone), np.int64)),
            (rows, value_of[left[rows]], tag),
        ]
        found["main"].append(table(main))
        found["value_pairs"].append(table([(both, value_of[left[both]], value_of[right[both]])]))
        if plan.definitions.pairs:
            within = [list(combinations(sorted(of), 2)) for of in carried]  # tags of one dimension
            rows = crossed[left[crossed] == 0]
            at, pair = _each(right[rows], within)
            together = [(rows[at], *pair.reshape(-1, 2).T)]
            at, one = _each(left[tag_rows], carried)
            rows = tag_rows[at]
            at, other = _each(right[rows], carried)
            together.append((rows[at], np.minimum(one[at], other), np.maximum(one[at], other)))
            found["tag_pairs"].append(table(together))
    return Cells(
        definitions=plan.definitions,
        strata=names[0],
        buckets=names[1],
        periods=names[2],
        values=values,
        tags=tuple(tags),
        main=Table.below(found.pop("main")),
        value_pairs=Table.below(found.pop("value_pairs")),
        tag_pairs=Table.below(found.pop("tag_pairs")),
        clipped=plan.clipped,
    )


def _each(item: Codes, choices: Sequence[Sequence[Any]]) -> tuple[Codes, Codes]:
    """Every entry of `item` as often as the item has choices: (m,) its position, and (m, …) the choice."""
    number = np.array([len(of) for of in choices], np.int64)
    start = np.cumsum(number) - number
    times = number[item]
    position = np.repeat(np.arange(len(item)), times)
    nth = np.arange(len(position)) - np.repeat(np.cumsum(times) - times, times)
    return position, np.array([choice for of in choices for choice in of], np.int64)[start[item[position]] + nth]
