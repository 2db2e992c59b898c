"""The tag vocabulary of a business: what it holds, how it changes from version to version, and its store.

A change makes a new version and a `Mapping` from the one before. What was tagged under an old version is never
rewritten; it is translated when it is read, and what a split made ambiguous is `Unknown`, not guessed.
"""

from __future__ import annotations

import difflib
import functools
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from collections.abc import Mapping as MappingOf
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails
from sqlalchemy import Select, func, select

from kaleidoscope.combiner import MatchTerm, TagTerm, parse
from kaleidoscope.database import SLUG, Session, find
from kaleidoscope.errors import ConflictError, InputError, NotFoundError
from kaleidoscope.tables import Intervention, Material, Scene, TaxonomyVersion, now
from kaleidoscope.vocabulary import Layer, Role
from kaleidoscope.yaml_text import load_yaml, parse_yaml

MAX_DIMENSIONS = 200
MAX_VALUES = 500  # of a dimension
DOCS = "docs/taxonomy.md"

Tag = tuple[str, str]  # dimension, value
Id = Annotated[str, Field(pattern=f"^{SLUG.pattern}$")]
Label = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]
Factor = Literal["descriptive", "driving"]
Key = TypeVar("Key", bound=Hashable)


# ── the vocabulary ──────────────────────────────────────────────────────────────────────────────────────────────────


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Labels(_Frozen):
    """What people read instead of an id."""

    en: Label
    zh: Label


class Value(_Frozen):
    """One answer that a dimension knows. A retired one can be read, and no longer given."""

    id: Id
    labels: Labels
    retired: bool = False


class Dimension(_Frozen):
    """One question about a material. Its factor says whether it describes the product or drives people to act."""

    id: Id
    layer: Layer
    labels: Labels
    multi: bool = False
    factor: Factor | None = None
    values: Annotated[tuple[Value, ...], Field(max_length=MAX_VALUES)] = ()
    retired: bool = False

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Dimension:
        _refuse_repeated("value", self.values)
        return self

    def value(self, value_id: str) -> Value | None:
        """The value of this id, or None."""
        return next((v for v in self.values if v.id == value_id), None)


class Taxonomy(_Frozen):
    """A vocabulary: dimensions in the order in which people see them."""

    dimensions: Annotated[tuple[Dimension, ...], Field(max_length=MAX_DIMENSIONS)]

    @model_validator(mode="after")
    def _ids_are_unique(self) -> Taxonomy:
        _refuse_repeated("dimension", self.dimensions)
        return self

    def dimension(self, dimension_id: str) -> Dimension | None:
        """The dimension of this id, or None."""
        return next((d for d in self.dimensions if d.id == dimension_id), None)

    @property
    def tags(self) -> list[Tag]:
        """Every dimension and value, the retired ones included."""
        return [(d.id, v.id) for d in self.dimensions for v in d.values]

    def check_tags(self, tags: Iterable[Tag]) -> None:
        """Raise InputError, naming everything that is wrong, unless these tags can be given to one material."""
        distinct = list(dict.fromkeys(tags))
        problems = [p for p in (self._problem(*tag) for tag in distinct) if p is not None]
        problems += [
            f"tags: {name!r} takes one value, not {', '.join(repr(v) for d, v in distinct if d == name)}. Keep one."
            for name in self.overfull(distinct)
        ]
        if problems:
            raise InputError("\n".join(problems))

    def overfull(self, tags: Iterable[Tag]) -> list[str]:
        """The single-valued dimensions in which these tags have several values."""
        counts = Counter(dimension for dimension, _ in set(tags))
        return [d.id for d in self.dimensions if not d.multi and counts[d.id] > 1]

    def _problem(self, dimension_id: str, value_id: str) -> str | None:
        dimension = self.dimension(dimension_id)
        if dimension is None:
            hint = _did_you_mean(dimension_id, [d.id for d in self.dimensions if not d.retired])
            return f"tags: there is no dimension {dimension_id!r}.{hint}"
        if dimension.retired:
            return f"tags: dimension {dimension_id!r} is retired. Leave it out."
        value = dimension.value(value_id)
        if value is not None and not value.retired:
            return None
        hint = _did_you_mean(value_id, [v.id for v in dimension.values if not v.retired])
        what = "does not exist" if value is None else "is retired"
        return f"tags: value {value_id!r} of dimension {dimension_id!r} {what}.{hint}"


def _refuse_repeated(what: str, items: Sequence[Value] | Sequence[Dimension]) -> None:
    repeated = [id_ for id_, count in Counter(item.id for item in items).items() if count > 1]
    if repeated:
        raise ValueError(f"{what} {repeated[0]!r} is there twice; keep one of them")


def _did_you_mean(given: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(given.lower(), known, n=1, cutoff=0.5)
    if nearest:
        return f" Did you mean {nearest[0]!r}?"
    return f" There are: {', '.join(known)}." if known else ""


# ── from one version to another ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Unknown:
    """What an old tag has become where it can be one of several: nobody has said which."""

    of: frozenset[Tag]

    def __str__(self) -> str:
        """As it stands in a log: `unknown of {a, b}`; with the dimensions where there are several."""
        several = len({dimension for dimension, _ in self.of}) > 1
        return f"unknown of {{{', '.join(sorted('='.join(tag) if several else tag[1] for tag in self.of))}}}"


class Mapping(RootModel[dict[str, tuple[str, ...]]]):
    """What became of the tags of a version in a later one.

    `"dimension=value"` → those it can be now: one where it is known, several where it was split. `"dimension"` → its
    new name, for values that have no entry of their own. What has no entry stayed as it is. Identities are dropped, so
    that equal mappings compare equal.
    """

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _one_as_list(cls, entries: object) -> object:
        if not isinstance(entries, dict):
            return entries
        return {key: (to,) if isinstance(to, str) else to for key, to in entries.items()}

    @model_validator(mode="after")
    def _canonical(self) -> Mapping:
        for key, targets in self.root.items():
            if not _is_key(key):
                raise ValueError(f"{key!r} is neither `dimension=value` nor `dimension`")
            wrong = [to for to in targets if ("=" in to) != ("=" in key) or not _is_key(to)]
            if wrong:
                raise ValueError(f"{key!r} cannot become {wrong[0]!r}: both are `dimension=value`, or both `dimension`")
            if not targets:
                raise ValueError(f"{key!r} becomes nothing. Keep it as retired instead: then old tags stay readable")
            if "=" not in key and len(targets) > 1:
                raise ValueError(f"dimension {key!r} becomes several. Say for each of its values where it goes")
        entries = {
            key: tuple(sorted(set(targets)))
            for key, targets in sorted(self.root.items())
            if set(targets) != {self._unless_named(key)}
        }
        self.root.clear()
        self.root.update(entries)
        return self

    def _unless_named(self, key: str) -> str:
        """What the key becomes if it has no entry of its own."""
        dimension, equals, value = key.partition("=")
        if not equals:
            return key
        return f"{self.root.get(dimension, (dimension,))[0]}={value}"

    def targets(self, key: str) -> tuple[str, ...]:
        """What `dimension=value`, or a dimension, has become."""
        return self.root.get(key) or (self._unless_named(key),)

    def dimensions(self, dimension: str) -> list[str]:
        """Where values of a dimension can be now: under its name, and wherever some of them were moved."""
        moved = [to for key, targets in self.root.items() if key.startswith(f"{dimension}=") for to in targets]
        return list(dict.fromkeys((*self.targets(dimension), *(to.partition("=")[0] for to in moved))))

    def within(self, taxonomy: Taxonomy) -> Mapping:
        """This mapping, of nothing but what the taxonomy has whose tags it translates."""
        known = {"=".join(tag) for tag in taxonomy.tags} | {d.id for d in taxonomy.dimensions}
        return Mapping({key: targets for key, targets in self.root.items() if key in known})

    def then(self, later: Mapping) -> Mapping:
        """This mapping and the one after it as one."""
        entries = {key: tuple(end for to in targets for end in later.targets(to)) for key, targets in self.root.items()}
        renamed = {key: targets[0] for key, targets in self.root.items() if "=" not in key}
        for key, targets in later.root.items():
            dimension, equals, value = key.partition("=")
            before = [old for old, new in renamed.items() if new == dimension]
            before += [dimension] if dimension not in renamed else []
            for old in before:
                entries.setdefault(f"{old}{equals}{value}", targets)
        return Mapping(entries)


def _is_key(text: str) -> bool:
    return all(SLUG.fullmatch(part) for part in text.split("=", 1))


def compose(mappings: Iterable[Mapping]) -> Mapping:
    """Mappings from version to version, oldest first, as one."""
    return functools.reduce(Mapping.then, mappings, Mapping({}))


def translate(tags: Iterable[Tag], mappings: Iterable[Mapping]) -> list[Tag | Unknown]:
    """What each tag of an old version is now: a tag, or unknown of several; mappings oldest first."""
    mapping = compose(mappings)
    return [_translated(tag, mapping) for tag in tags]


def _translated(tag: Tag, mapping: Mapping) -> Tag | Unknown:
    ends = [_as_tag(to) for to in mapping.targets("=".join(tag))]
    return ends[0] if len(ends) == 1 else Unknown(frozenset(ends))


def _as_tag(key: str) -> Tag:
    dimension, _, value = key.partition("=")
    return dimension, value


def translate_column(values: Any, dimension: str, mappings: Iterable[Mapping]) -> dict[str, Any]:
    """The Arrow column(s) that a log's column of an old dimension is now, by dimension.

    Takes an array or chunked array of text, or of lists of text; the result has the same length and shape, null (or no
    list item) where a row's value belongs to another dimension. There is more than one column where values were moved
    to another dimension; which ones does not depend on the rows. Unknown is text: `unknown of {a, b}`. Missing stays
    missing, and text that was never in the vocabulary stays as it is. Raises InputError for another type of column.
    """
    mapping = compose(mappings)
    column = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    lists = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    text = column.flatten() if lists else column
    if pa.types.is_dictionary(text.type):
        text = text.cast(text.type.value_type)
    if not (pa.types.is_string(text.type) or pa.types.is_large_string(text.type) or pa.types.is_null(text.type)):
        raise InputError(f"{dimension}: a column of tags holds text or lists of text, not {column.type}.")
    encoded = text.cast(pa.string()).dictionary_encode()
    now = [_translated((dimension, value), mapping) for value in encoded.dictionary.to_pylist()]
    columns = {}
    for name in mapping.dimensions(dimension):
        known = pa.array([_in_dimension(tag, name) for tag in now], pa.string())
        found = known.take(encoded.indices) if len(now) else pa.nulls(len(text), pa.string())
        columns[name] = _distinct_lists(column, found) if lists else found
    return columns


def _in_dimension(tag: Tag | Unknown, dimension: str) -> str | None:
    if isinstance(tag, Unknown):
        return str(tag) if any(name == dimension for name, _ in tag.of) else None
    return tag[1] if tag[0] == dimension else None


def _distinct_lists(before: Any, items: Any) -> Any:
    """The lists with these items instead, without nulls and repetitions (two merged values are one), in their order."""
    lengths = pc.fill_null(pc.list_value_length(before), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    row = np.repeat(np.arange(len(before)), lengths)
    codes = items.dictionary_encode().indices
    keep = np.flatnonzero(codes.is_valid().to_numpy(zero_copy_only=False))
    code = pc.fill_null(codes, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    _, first = np.unique(row[keep] * (len(items) + 1) + code[keep], return_index=True)
    keep = keep[np.sort(first)]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row[keep], minlength=len(before)))]).astype(np.int32)
    missing = pa.array(before.is_null().to_numpy(zero_copy_only=False))
    return pa.ListArray.from_arrays(pa.array(offsets), items.take(pa.array(keep)), mask=missing)


# ── changes ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Change(_Frozen):
    def apply_to(self, taxonomy: Taxonomy) -> tuple[Taxonomy, Mapping]:
        """The taxonomy after this change, and what became of its tags; raises InputError."""
        raise NotImplementedError


class AddDimension(_Change):
    """A new dimension, at the end."""

    op: Literal["add_dimension"] = "add_dimension"
    dimension: Dimension

    def apply_to(self, taxonomy: Taxonomy) -> tuple[Taxonomy, Mapping]:
        """The taxonomy with it."""
        _refuse_taken(taxonomy, self.dimension.id)
        return _with_dimensions((*taxonomy.dimensions, self.dimension)), Mapping({})


class AddValue(_Change):
    """A new value of a dimension, at the end."""

    op: Literal["add_value"] = "add_value"
    dimension: str
    value: Value

    def apply_to(self, taxonomy: Taxonomy) -> tuple[Taxonomy, Mapping]:
        """The taxonomy with it."""
        dimension = _dimension(taxonomy, self.dimension)
        _refuse_taken(dimension, self.value.id)
        return _with_values(taxonomy, dimension, (*dimension.values, self.value)), Mapping({})


class Rename(_Change):
    """Another id, other labels, or both, of a value; without `value` of the dimension. The meaning stays."""

    op: Literal["rename"] = "rename"
    dimension: str
    value: str | None = None
    id: Id | None = None
    labels: Labels | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Rename:
        if self.id is None and self.labels is None:
            raise ValueError("give a new `id`, new `labels`, or both")
        return self

    def apply_to(self, taxonomy: Taxonomy) -> tuple[Taxonomy, Mapping]:
        """The taxonomy with the new name."""
        dimension = _dimension(taxonomy, self.dimension)
        update = {k: v for k, v in (("id", self.id), ("labels", self.labels)) if v is not None}
        if self.value is None:
            if self.id not in (None, dimension.id):
                _refuse_taken(taxonomy, str(self.id))
            renamed = dimension.model_copy(update=update)
            return _replace(taxonomy, dimension, renamed), Mapping({dimension.id: renamed.id})
        value = _value(dimension, self.value)
        if self.id not in (None, value.id):
            _refuse_taken(dimension, str(self.id))
        new = value.model_copy(update=update)
        values = tuple(new if v is value else v for v in dimension.values)
        return _with_values(taxonomy, dimension, values), _became(dimension, [value.id], [new.id])


class Split(_Change):
    """A value that turned out to be several: new ones, or (by id) existing ones, itself included.

    What was tagged with it is unknown of them until somebody says which.
    """

    op: Literal["split"] = "split"
    dimension: str
    value: str
    into: Annotated[tuple[Value | str, ...], Field(min_length=2)]

    def apply_to(self, taxonomy: Taxonomy) -> tuple[Taxonomy, Mapping]:
        """The taxonomy with the several in the place of the one."""
        dimension = _dimension(taxonomy, self.dimension)
        old = _value(dimension, self.value)
        targets = [_target(dimension, into, {old.id}) for into in self.into]
        if len({t.id for t in targets}) < len(targets):
            raise InputError("a value is split into the same one twice. Name each once")
        return _with_values(taxonomy, dimension, _put(dimension, {old.id}, targets)), _became(
            dimension, [old.id], [t.id for t in targets]
        )


class Merge(_Change):
    """Values that turned out to be one: a new one, or (by id) one that exists."""

    op: Literal["merge"] = "merge"
    dimension: str
    values: Annotated[tuple[str, ...], Field(min_length=1)]
    into: Value | str

    def apply_to(self, taxonomy: Taxonomy) -> tuple[Taxonomy, Mapping]:
        """The taxonomy with the one in the place of the first."""
        dimension = _dimension(taxonomy, self.dimension)
        old = {_value(dimension, value).id for value in self.values}
        target = _target(dimension, self.into, old)
        if len(old | {target.id}) < 2:
            raise InputError("one value cannot be merged with itself. Name at least two")
        return _with_values(taxonomy, dimension, _put(dimension, old, [target])), _became(
            dimension, sorted(old), [target.id]
        )


class Move(_Change):
    """A value that belongs to another dimension."""

    op: Literal["move"] = "move"
    dimension: str
    value: str
    to: str

    def apply_to(self, taxonomy: Taxonomy) -> tuple[Taxonomy, Mapping]:
        """The taxonomy with the value at the end of the other dimension."""
        source, goal = _dimension(taxonomy, self.dimension), _dimension(taxonomy, self.to)
        value = _value(source, self.value)
        if source is goal:
            raise InputError(f"value {value.id!r} is in dimension {goal.id!r} already")
        _refuse_taken(goal, value.id)
        without = _with_values(taxonomy, source, tuple(v for v in source.values if v is not value))
        moved = _with_values(without, goal, (*goal.values, value))
        return moved, Mapping({f"{source.id}={value.id}": f"{goal.id}={value.id}"})


class Retire(_Change):
    """A value (without `value`: a dimension) that is no longer given. What has it keeps it."""

    op: Literal["retire"] = "retire"
    dimension: str
    value: str | None = None

    def apply_to(self, taxonomy: Taxonomy) -> tuple[Taxonomy, Mapping]:
        """The taxonomy with it retired."""
        return _with_retired(taxonomy, self.dimension, self.value, True), Mapping({})


class Restore(_Change):
    """A retired value (without `value`: dimension) that is given again."""

    op: Literal["restore"] = "restore"
    dimension: str
    value: str | None = None

    def apply_to(self, taxonomy: Taxonomy) -> tuple[Taxonomy, Mapping]:
        """The taxonomy with it in use."""
        return _with_retired(taxonomy, self.dimension, self.value, False), Mapping({})


class Regroup(_Change):
    """Where a dimension belongs, and whether it takes several values."""

    op: Literal["regroup"] = "regroup"
    dimension: str
    layer: Layer
    factor: Factor | None
    multi: bool

    def apply_to(self, taxonomy: Taxonomy) -> tuple[Taxonomy, Mapping]:
        """The taxonomy with the dimension there."""
        dimension = _dimension(taxonomy, self.dimension)
        new = dimension.model_copy(update={"layer": self.layer, "factor": self.factor, "multi": self.multi})
        return _replace(taxonomy, dimension, new), Mapping({})


Change = Annotated[
    AddDimension | AddValue | Rename | Split | Merge | Move | Retire | Restore | Regroup, Field(discriminator="op")
]
_CHANGES: TypeAdapter[tuple[Change, ...]] = TypeAdapter(tuple[Change, ...])


def apply(taxonomy: Taxonomy, changes: Iterable[Change]) -> tuple[Taxonomy, Mapping]:
    """The taxonomy after the changes, one after the other, and what became of its tags.

    Raises InputError naming the change that cannot be made.
    """
    before, mapping = taxonomy, Mapping({})
    for number, change in enumerate(changes, 1):
        try:
            taxonomy, step = change.apply_to(taxonomy)
        except InputError as error:
            raise InputError(f"change {number} ({change.op}): {error}.") from None
        except ValidationError as error:
            raise InputError(f"change {number} ({change.op}): {_plainly(error.errors()[0])}.") from None
        mapping = mapping.then(step)
    return taxonomy, mapping.within(before)  # of what was added and then renamed, only the end is of interest


def infer_mapping(old: Taxonomy, new: Taxonomy, given: Mapping | None = None) -> Mapping:
    """What became of the tags of `old` in `new`, which was written by hand: what has the same id is the same.

    Raises InputError where a tag has vanished and `given` does not say what became of it, or says what cannot be.
    """
    given = given or Mapping({})
    known = {"=".join(tag) for tag in new.tags} | {d.id for d in new.dimensions}
    before = {"=".join(tag) for tag in old.tags} | {d.id for d in old.dimensions}
    problems = [
        f"mapping: the version before has no {key!r}.{_did_you_mean(key, sorted(before))}"
        for key in given.root
        if key not in before
    ]
    vanished = []
    for key in sorted(before):
        missing = [to for to in given.targets(key) if to not in known]
        if not missing or ("=" not in key and key not in given.root):
            continue  # a dimension may vanish where its values are accounted for
        if key in given.root or key.partition("=")[0] in given.root:
            problems += [f"mapping: {key!r} becomes {to!r}, which is not in the new version." for to in missing]
        else:
            vanished.append(key)
    if vanished:
        problems.append(
            f"vanished: {', '.join(vanished)}. Say in the mapping what each became (`dimension=value: dimension=value`,"
            " or a list of those it can be), or keep it with `retired: true`."
        )
    if problems:
        raise InputError("\n".join(problems))
    return given


def _dimension(taxonomy: Taxonomy, dimension_id: str) -> Dimension:
    found = taxonomy.dimension(dimension_id)
    if found is None:
        hint = _did_you_mean(dimension_id, [d.id for d in taxonomy.dimensions])
        raise InputError(f"there is no dimension {dimension_id!r}.{hint}".rstrip("."))
    return found


def _value(dimension: Dimension, value_id: str) -> Value:
    found = dimension.value(value_id)
    if found is None:
        hint = _did_you_mean(value_id, [v.id for v in dimension.values])
        raise InputError(f"there is no value {value_id!r} of dimension {dimension.id!r}.{hint}".rstrip("."))
    return found


def _refuse_taken(where: Taxonomy | Dimension, new_id: str) -> None:
    if isinstance(where, Taxonomy):
        if where.dimension(new_id) is not None:
            raise InputError(f"there is a dimension {new_id!r} already. Choose another id")
    elif where.value(new_id) is not None:
        raise InputError(f"there is a value {new_id!r} of dimension {where.id!r} already. Choose another id, or merge")


def _target(dimension: Dimension, into: Value | str, replaced: set[str]) -> Value:
    """The value that a split or a merge ends in: an existing one by id, or a new one."""
    if isinstance(into, str):
        return _value(dimension, into)
    if into.id not in replaced:
        _refuse_taken(dimension, into.id)
    return into


def _put(dimension: Dimension, replaced: set[str], targets: list[Value]) -> tuple[Value, ...]:
    """The dimension's values without the replaced ones; targets that are new stand where the first of those stood."""
    ends = {t.id: t for t in targets}
    stay = {v.id for v in dimension.values} - replaced
    new = [t for t in targets if t.id not in stay]
    values: list[Value] = []
    for value in dimension.values:
        if value.id in replaced:
            values += new
            new = []
        else:
            values.append(ends.get(value.id, value))
    return tuple(values)


def _became(dimension: Dimension, before: Iterable[str], after: Sequence[str]) -> Mapping:
    return Mapping({f"{dimension.id}={old}": tuple(f"{dimension.id}={new}" for new in after) for old in before})


def _with_dimensions(dimensions: Iterable[Dimension]) -> Taxonomy:
    return Taxonomy(dimensions=tuple(dimensions))


def _replace(taxonomy: Taxonomy, old: Dimension, new: Dimension) -> Taxonomy:
    return _with_dimensions(new if d.id == old.id else d for d in taxonomy.dimensions)


def _with_values(taxonomy: Taxonomy, dimension: Dimension, values: tuple[Value, ...]) -> Taxonomy:
    return _replace(taxonomy, dimension, Dimension.model_validate({**dict(dimension), "values": values}))


def _with_retired(taxonomy: Taxonomy, dimension_id: str, value_id: str | None, retired: bool) -> Taxonomy:
    dimension = _dimension(taxonomy, dimension_id)
    if value_id is None:
        return _replace(taxonomy, dimension, dimension.model_copy(update={"retired": retired}))
    value = _value(dimension, value_id)
    new = value.model_copy(update={"retired": retired})
    return _with_values(taxonomy, dimension, tuple(new if v is value else v for v in dimension.values))


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_taxonomy(path: Path | str) -> Taxonomy:
    """The taxonomy in a YAML file; raises InputError naming everything that is wrong, and where."""
    return _checked_taxonomy(load_yaml(Path(path), docs=DOCS, as_text=True), str(path))


def write_taxonomy(taxonomy: Taxonomy, path: Path | str) -> None:
    """Write it so that `read_taxonomy` gives the same back."""
    Path(path).write_text(format_taxonomy(taxonomy), encoding="utf-8")


def read_mapping(path: Path | str) -> Mapping:
    """The mapping in a YAML file: `dimension=value: dimension=value`, or a list of them; raises InputError."""
    raw = load_yaml(Path(path), docs=DOCS, as_text=True)
    try:
        return Mapping.model_validate(raw)
    except ValidationError as error:
        raise _unfit(error, raw, str(path)) from None


def read_changes(path: Path | str) -> tuple[Change, ...]:
    """The list of changes in a YAML file (docs/taxonomy.md); raises InputError."""
    return check_changes(load_yaml(Path(path), docs=DOCS, as_text=True), str(path))


def check_changes(raw: object, source: str = "changes") -> tuple[Change, ...]:
    """The changes in data from outside; raises InputError naming everything that is wrong, and where."""
    try:
        return _CHANGES.validate_python(raw)
    except ValidationError as error:
        raise _unfit(error, raw, source) from None


def parse_taxonomy(text: str, source: str) -> Taxonomy:
    """The taxonomy in YAML text; raises InputError beginning with `source`."""
    return _checked_taxonomy(parse_yaml(text, source, docs=DOCS, as_text=True), source)


def _checked_taxonomy(raw: object, source: str) -> Taxonomy:
    if not isinstance(raw, dict):
        raise InputError(f"{source}: a vocabulary is a mapping that begins with `dimensions:` ({DOCS}).")
    try:
        return Taxonomy.model_validate(raw)
    except ValidationError as error:
        raise _unfit(error, raw, source) from None


def format_taxonomy(taxonomy: Taxonomy) -> str:
    """The taxonomy as YAML text, for people to edit."""
    dimensions = []
    for dimension in taxonomy.dimensions:
        plain = dimension.model_dump(mode="json", exclude_defaults=True)
        plain["labels"] = _OneLine(plain["labels"])
        values = [_OneLine(v) for v in plain.pop("values", [])]
        dimensions.append({**plain, "values": values})
    return yaml.dump(
        {"dimensions": dimensions}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000, encoding=None
    )


class _OneLine(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """Writes as the built-in vocabulary is written, and never an alias, which the reader refuses."""

    def ignore_aliases(self, data: Any) -> bool:
        """None, ever."""
        return True


_Dumper.add_representer(
    _OneLine, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)


def _unfit(error: ValidationError, raw: object, source: str) -> InputError:
    # Of `Value | str`, a mapping is meant to be a value: that it is no text is not what is wrong with it.
    meant = [p for p in error.errors() if not (p["loc"][-1:] == ("str",) and isinstance(p["input"], dict))]
    problems = dict.fromkeys(f"{_place(p, raw)}{_plainly(p)}" for p in meant)
    return InputError("\n".join(f"{source}: {problem}. {DOCS} says what goes there." for problem in problems))


def _place(problem: ErrorDetails, raw: object) -> str:
    """Where it is, by the ids people know: `dimension 'image_style', value 'flat', labels.zh: `."""
    parts: list[str] = []
    keys: list[str] = []
    here: Any = raw
    for number, step in enumerate(problem["loc"], 1):
        if isinstance(step, int):
            here = here[step] if isinstance(here, list | tuple) and step < len(here) else None
            kind = keys.pop().removesuffix("s") if keys else "entry"
            name = here.get("id") if isinstance(here, dict) and "op" not in here else None
            parts += [*keys, f"{kind} {step + 1 if name is None else repr(name)}"]
            keys = []
        elif isinstance(here, dict) and step in here:
            here = here[step]
            keys.append(step)
        elif number == len(problem["loc"]) and problem["type"] == "missing":
            keys.append(step)  # anything else that is not there is pydantic's name for what it took the thing for
    parts += [".".join(keys)] if keys else []
    return f"{', '.join(parts)}: " if parts else ""


def _plainly(problem: ErrorDetails) -> str:
    if problem["type"] == "string_pattern_mismatch" and SLUG.pattern in str(problem.get("ctx")):
        return (
            f"{problem['input']!r} cannot be an id: use 1 to 63 lower-case letters, digits, - and _, beginning with a"
            " letter or a digit"
        )
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem["input"]
    return f"{message}, not {given!r}" if isinstance(given, str) and problem["type"] != "value_error" else message


BUILT_IN = read_taxonomy(Path(__file__).with_suffix(".yaml"))


# ── the store ───────────────────────────────────────────────────────────────────────────────────────────────────────


def found_taxonomy(session: Session, taxonomy: Taxonomy = BUILT_IN) -> TaxonomyVersion:
    """Version 1 of a new business; raises ConflictError where it has one."""
    session.caller.require(Role.EDITOR)
    if _current_number(session) is not None:
        raise ConflictError(f"Business {session.business!r} has a taxonomy already. Evolve it.")
    return _append(session, 1, taxonomy, Mapping({}), "")


def current_taxonomy(session: Session) -> tuple[int, Taxonomy]:
    """The newest version's number, and the vocabulary; raises NotFoundError where the business has none."""
    number = _current_number(session)
    if number is None:
        raise NotFoundError(f"Business {session.business!r} has no taxonomy. Found one first.")
    return number, taxonomy_at(session, number)


def taxonomy_at(session: Session, number: int) -> Taxonomy:
    """The vocabulary of a version; raises NotFoundError."""
    return Taxonomy.model_validate(_version(session, number).document)


def list_versions(session: Session) -> list[TaxonomyVersion]:
    """All versions of the business's taxonomy, newest first."""
    return list(session.scalars(_mine(session, select(TaxonomyVersion)).order_by(TaxonomyVersion.number.desc())))


def evolve(
    session: Session, changes: Sequence[Change], *, note: str = "", expected: int | None = None
) -> TaxonomyVersion:
    """A new version with the changes made to the current one, or to `expected`, the version that the caller had read.

    Raises ConflictError, with both sides, where somebody made a newer version than that, InputError for changes that
    cannot be made or that change nothing.
    """
    session.caller.require(Role.EDITOR)
    number, taxonomy = _current_for_change(session)
    _refuse_stale(session, expected, number, {"changes": [change.model_dump(mode="json") for change in changes]})
    after, mapping = apply(taxonomy, changes)
    return _append_change(session, number, taxonomy, after, mapping, note)


def import_taxonomy(
    session: Session,
    taxonomy: Taxonomy,
    mapping: Mapping | None = None,
    *,
    note: str = "",
    expected: int | None = None,
) -> TaxonomyVersion:
    """A new version that was written by hand; `infer_mapping` says what `mapping` has to name, and what it raises.

    Raises ConflictError as `evolve` does.
    """
    session.caller.require(Role.EDITOR)
    number, before = _current_for_change(session)
    _refuse_stale(session, expected, number, {"taxonomy": taxonomy.model_dump(mode="json")})
    return _append_change(session, number, before, taxonomy, infer_mapping(before, taxonomy, mapping), note)


def mapping_between(session: Session, old: int, new: int) -> Mapping:
    """What became of the tags of version `old` in version `new`; raises InputError where `new` is the older one."""
    if old > new:
        raise InputError(f"Tags of version {old} cannot be read under version {new}, which is older.")
    before, _ = taxonomy_at(session, old), _version(session, new)
    between = TaxonomyVersion.number > old, TaxonomyVersion.number <= new
    query = _mine(session, select(TaxonomyVersion.mapping)).where(*between).order_by(TaxonomyVersion.number)
    return compose(Mapping.model_validate(entries) for entries in session.scalars(query)).within(before)


def into_newest(session: Session, versions: MappingOf[Key, int]) -> tuple[int, dict[Key, Mapping]]:
    """The newest of some versions' numbers, and what became of the tags of each of them in it."""
    newest = max(versions.values())
    between = {version: mapping_between(session, version, newest) for version in set(versions.values())}
    return newest, {key: between[version] for key, version in versions.items()}


@dataclass(frozen=True)
class TagsNow:
    """Tags of an old version under the current one: those that are known, and what the others can be."""

    known: tuple[Tag, ...]
    unknown: dict[Tag, Unknown]  # by the old tag


def tags_now(session: Session, tags: Iterable[Tag], taxonomy_number: int) -> TagsNow:
    """Tags that were given under a version, as they are now. For many materials take `mapping_between` once."""
    number = _current_number(session)
    if number is None:
        raise NotFoundError(f"Business {session.business!r} has no taxonomy. Found one first.")
    return _now(tags, mapping_between(session, taxonomy_number, number))


@dataclass(frozen=True)
class AffectedMaterial:
    """What changes of the taxonomy would do to a material that somebody has to look at then."""

    material: str
    unknown: dict[Tag, Unknown]  # by the tag that it has now
    overfull: tuple[str, ...]  # single-valued dimensions in which it would have several values


def affected_materials(session: Session, changes: Sequence[Change]) -> list[AffectedMaterial]:
    """The materials whose tags the changes would make unknown or contradictory, by id; nothing is changed."""
    number, taxonomy = current_taxonomy(session)
    after, step = apply(taxonomy, changes)
    rows = session.execute(
        select(Material.id, Material.tags, Material.taxonomy)
        .where(Material.business_id == session.business)
        .order_by(Material.id)
    ).all()
    mappings = {version: mapping_between(session, version, number) for version in {row.taxonomy for row in rows}}
    affected = []
    for row in rows:
        before = _now([(tag["dimension"], tag["value"]) for tag in row.tags], mappings[row.taxonomy])
        then = _now(before.known, step)
        already = {step.targets(name)[0] for name in taxonomy.overfull(before.known)}
        overfull = tuple(name for name in after.overfull(then.known) if name not in already)
        if then.unknown or overfull:
            affected.append(AffectedMaterial(row.id, then.unknown, overfull))
    return affected


@dataclass(frozen=True)
class AffectedRule:
    """A constraint of a scene, or an intervention, that names what changes of the taxonomy do something to."""

    scene: str
    constraint: str | None  # the expression; None: it is an intervention
    intervention: str | None  # its id; None: it is a constraint
    becomes: dict[str, str]  # "dimension=value", or "dimension" → what becomes of it, in words

    def __str__(self) -> str:
        """In words."""
        rule = f"constraint {self.constraint!r}" if self.constraint is not None else f"intervention {self.intervention}"
        return f"scene {self.scene}: {rule}: " + "; ".join(f"{named} {then}" for named, then in self.becomes.items())


def affected_rules(session: Session, changes: Sequence[Change]) -> list[AffectedRule]:
    """The constraints, and the interventions not over, that name a tag which the changes rename, split, merge, move or
    retire, by scene; nothing is changed. Somebody has to write them anew: they name the old tag still."""
    _, before = current_taxonomy(session)
    after, mapping = apply(before, changes)

    def becomes(names: Iterable[str]) -> dict[str, str]:
        found = {name: _becomes(name, before, after, mapping) for name in dict.fromkeys(names)}
        return {name: words for name, words in found.items() if words is not None}

    affected = []
    specs = select(Scene.id, Scene.spec).where(Scene.business_id == session.business)
    rules = select(Intervention.scene_id, Intervention.id, Intervention.target).where(
        Intervention.business_id == session.business,
        Intervention.ended.is_(False),
        Intervention.ends_at.is_(None) | (Intervention.ends_at > now()),
    )
    for scene_id, spec in session.execute(specs.order_by(Scene.id)):
        for text in spec["constraints"]:
            if found := becomes(_names_in(text)):
                affected.append(AffectedRule(scene_id, text, None, found))
    for scene_id, id, target in session.execute(rules.order_by(Intervention.scene_id, Intervention.id)):
        if found := becomes(f"{dimension}={value}" for dimension, value in (target.get("tag") or {}).items()):
            affected.append(AffectedRule(scene_id, None, id, found))
    return sorted(affected, key=lambda rule: (rule.scene, rule.constraint is None))


def _names_in(constraint: str) -> list[str]:
    """The tags, and the dimensions without a value, that an expression names."""
    parsed, names = parse(constraint), []
    for term in (*parsed.terms, *parsed.when):
        if isinstance(term, TagTerm):
            names += [f"{term.dimension}={value}" for value in term.values] or [term.dimension]
        elif isinstance(term, MatchTerm):
            names += [term.first[1], term.second[1]]
    return names


def _becomes(name: str, before: Taxonomy, after: Taxonomy, mapping: Mapping) -> str | None:
    """What becomes of a tag or a dimension, in words; None: nothing."""
    dimension, equals, value = name.partition("=")
    targets = mapping.targets(name) if equals else tuple(mapping.dimensions(dimension))
    if len(targets) > 1:
        return f"{'is split into' if equals else 'has values that are in'} {', '.join(targets)}"
    if targets != (name,):
        return f"becomes {targets[0]}"
    return "is retired" if _retired(after, dimension, value) and not _retired(before, dimension, value) else None


def _retired(taxonomy: Taxonomy, dimension_id: str, value_id: str) -> bool:
    dimension = taxonomy.dimension(dimension_id)
    value = dimension.value(value_id) if dimension is not None and value_id else None
    return (dimension is not None and dimension.retired) or (value is not None and value.retired)


def _now(tags: Iterable[Tag], mapping: Mapping) -> TagsNow:
    known: dict[Tag, None] = {}
    unknown = {}
    for tag in tags:
        now = _translated(tag, mapping)
        if isinstance(now, Unknown):
            unknown[tag] = now
        else:
            known[now] = None
    return TagsNow(tuple(known), unknown)


def _version(session: Session, number: int) -> TaxonomyVersion:
    return find(session, TaxonomyVersion, number)


def _mine(session: Session, query: Select[Any]) -> Select[Any]:
    return query.where(TaxonomyVersion.business_id == session.business)


def _current_number(session: Session) -> int | None:
    found: int | None = session.scalar(_mine(session, select(func.max(TaxonomyVersion.number))))
    return found


def _current_for_change(session: Session) -> tuple[int, Taxonomy]:
    """The newest version, while nobody else can make the next."""
    # Whoever makes one locks version 1, which is always there: whoever waited for it then sees the next.
    find(session, TaxonomyVersion, 1, lock=True)
    return current_taxonomy(session)


def _refuse_stale(session: Session, expected: int | None, number: int, yours: dict[str, Any]) -> None:
    if expected is None or expected == number:
        return
    if expected > number:
        raise InputError(f"expected: there is no version {expected} yet; the current one is {number}.")
    current = _version(session, number)
    raise ConflictError(
        f"You changed version {expected} of the taxonomy, and meanwhile {current.author} made version {number}. Compare"
        " the two and repeat your change on the current one.",
        details={
            "yours": {"version": expected, **yours},
            "current": {
                "version": number,
                "author": current.author,
                "note": current.note,
                "mapping": mapping_between(session, expected, number).model_dump(mode="json"),
                "taxonomy": current.document,
            },
        },
    )


def _append_change(
    session: Session, number: int, before: Taxonomy, after: Taxonomy, mapping: Mapping, note: str
) -> TaxonomyVersion:
    if after == before and not mapping.root:
        raise InputError(f"This is version {number} as it is: nothing would change.")
    return _append(session, number + 1, after, mapping, note)


def _append(session: Session, number: int, taxonomy: Taxonomy, mapping: Mapping, note: str) -> TaxonomyVersion:
    row = TaxonomyVersion(
        business_id=session.business,
        number=number,
        document=taxonomy.model_dump(mode="json"),
        mapping=mapping.model_dump(mode="json"),
        note=note,
        author=session.caller.user,
    )
    session.add(row)
    session.flush()
    return row
