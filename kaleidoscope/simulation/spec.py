"""What a simulated population is, as people write it: read strictly, with errors that name the field."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from kaleidoscope.content import explain
from kaleidoscope.errors import InputError
from kaleidoscope.yaml_text import load_yaml

WORLD = Path(__file__).with_name("world.yaml")
DOCS = "docs/simulation.md"


Floats = NDArray[np.float64]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Spread = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
TagText = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]+=[a-z0-9_-]+$")]
Hour = Annotated[int, Field(ge=0, lt=24)]
Hours = Annotated[dict[Hour, Number], Field(min_length=1)]


class Feature(_Model):
    """A user feature: a number by its quantiles, or a choice by its shares; and how often requests do not know it."""

    name: Name
    quantiles: Annotated[tuple[Number, ...], Field(min_length=2)] | None = None
    step: Positive = 1.0  # numbers are multiples of it
    shares: Annotated[dict[Name, Share], Field(min_length=2)] | None = None  # from low to high, for correlations
    missing: Share = 0.0

    @model_validator(mode="after")
    def _is_one_kind(self) -> Feature:
        if (self.quantiles is None) == (self.shares is None):
            raise ValueError("give either quantiles (a number) or shares (a choice)")
        if self.quantiles is not None and any(b < a for a, b in pairwise(self.quantiles)):
            raise ValueError("quantiles: have to rise from the least to the largest")
        if self.shares is not None and abs(sum(self.shares.values()) - 1) > 1e-9:
            raise ValueError(f"shares: sum to {sum(self.shares.values()):g}; they have to sum to 1")
        return self

    @property
    def choices(self) -> tuple[str, ...]:
        """What a choice may be; a number has none."""
        return tuple(self.shares or ())


class Correlation(_Model):
    """Of the normal variables behind two features."""

    between: tuple[Name, Name]
    rho: Annotated[float, Field(gt=-1, lt=1)]


class Condition(_Model):
    """Which users: some of the choices of a feature, or its numbers in [from, below); without an end, all beyond."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, validate_by_alias=True)

    from_: Number = Field(default=-np.inf, alias="from")
    below: Number = np.inf
    choices: tuple[Name, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _choices_stand_alone(cls, raw: object) -> object:
        return {"choices": (raw,) if isinstance(raw, str) else raw} if isinstance(raw, str | list) else raw


class Term(_Model):
    """An effect of a tag on some users: constant where all of `when` holds, or a broken line along a number."""

    tag: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_-]+=([a-z0-9_-]+|\*)$")]
    when: dict[Name, Condition] = {}
    effect: Number | None = None
    along: Annotated[
        dict[Name, Annotated[dict[Number, Number], Field(min_length=2)]], Field(min_length=1, max_length=1)
    ] = {}

    @model_validator(mode="after")
    def _has_one_size(self) -> Term:
        if (self.effect is None) == (not self.along):
            raise ValueError("give either effect (a number) or along ({feature: {number: effect}})")
        return self


class Finding(_Model):
    """A preference that is planted, and the sentence that says it."""

    id: Name
    says: str
    terms: Annotated[tuple[Term, ...], Field(min_length=1)]


class Effects(_Model):
    """Standard deviations of drawn main effects, in the logit."""

    tag_sd: Spread = 0.15
    material_sd: Spread = 0.1
    feature_sd: Spread = 0.0


class RandomInteractions(_Model):
    """How many pairs of a feature and a tag dimension are drawn, from which, and of what size."""

    count: Annotated[int, Field(ge=0)] = 0
    size: tuple[Spread, Spread] = (0.2, 0.4)
    features: tuple[Name, ...] = ()
    tags: tuple[TagText, ...] = ()


class Fatigue(_Model):
    """How the logit falls with recent exposures to the same value of these dimensions."""

    dimensions: tuple[Name, ...] = ()
    per_exposure: Spread = 0.0
    most_exposures: Positive = 5.0
    half_life_days: Positive = 3.0


class Novelty(_Model):
    """What a variant gains at the moment of its release, and how fast that goes."""

    gain: Number = 0.0
    half_life_days: Positive = 2.0


class Conversion(_Model):
    """The rate among those who clicked, and how much it differs by feature (sd in the logit)."""

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.08
    feature_sd: Spread = 0.0


class Dwell(_Model):
    """Median seconds with and without a click; `sd` of the logarithm."""

    clicked_s: Positive = 14.0
    passed_s: Positive = 1.6
    sd: Spread = 0.7


class TrafficSpec(_Model):
    """How often units come by, how unequal they are in that, and at which hours (UTC)."""

    visits_per_day: Positive = 0.7
    shape: Positive = 1.5
    hours: Annotated[dict[Hour, Positive], Field(min_length=1)] = {0: 1.0}


class PopulationSpec(_Model):
    """A world as people write it; docs/simulation.md explains every key, and world.yaml is the default one."""

    name: Name = "world"
    base_ctr: Annotated[float, Field(gt=0, lt=1)] = 0.04
    features: tuple[Feature, ...] = ()
    correlations: tuple[Correlation, ...] = ()
    effects: Effects = Effects()
    tags: dict[TagText, Number] = {}
    findings: tuple[Finding, ...] = ()
    random_interactions: RandomInteractions = RandomInteractions()
    fatigue: Fatigue = Fatigue()
    novelty: Novelty = Novelty()
    hours: Hours = {0: 0.0}
    weekdays: Annotated[tuple[Number, ...], Field(min_length=7, max_length=7)] = (0.0,) * 7
    conversion: Conversion = Conversion()
    dwell: Dwell = Dwell()
    traffic: TrafficSpec = TrafficSpec()

    @model_validator(mode="after")
    def _fits(self) -> PopulationSpec:
        problems = list(self._problems())
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        known = {feature.name: feature for feature in self.features}
        if len(known) < len(self.features):
            yield "features: two have the same name"
        for n, correlation in enumerate(self.correlations):
            if unknown := [name for name in correlation.between if name not in known]:
                yield f"correlations[{n}].between: {_no_feature(unknown[0], known)}"
                return
            if correlation.between[0] == correlation.between[1]:
                yield f"correlations[{n}].between: names {correlation.between[0]!r} twice; name two features"
                return
        if self.correlations and np.linalg.eigvalsh(self.correlation_matrix())[0] <= 0:
            yield "correlations: cannot all hold together (no such normal distribution exists); weaken some"
        for i, finding in enumerate(self.findings):
            for j, term in enumerate(finding.terms):
                yield from _term_problems(f"findings[{i}].terms[{j}]", term, known)
        drawn = self.random_interactions
        for n, name in enumerate(drawn.features):
            if name not in known:
                yield f"random_interactions.features[{n}]: {_no_feature(name, known)}"
        if drawn.count > len(self.free_pairs()):
            yield (
                f"random_interactions.count: {drawn.count} pairs are asked for, and features × dimensions of tags leave"
                f" {len(self.free_pairs())} that no finding has. Name more of them."
            )
        if drawn.size[0] > drawn.size[1]:
            yield "random_interactions.size: the first has to be the smaller one"

    def correlation_matrix(self) -> Floats:
        """(F, F) of the normal variables behind the features."""
        at = {feature.name: n for n, feature in enumerate(self.features)}
        out = np.eye(len(at))
        for correlation in self.correlations:
            a, b = (at[name] for name in correlation.between)
            out[a, b] = out[b, a] = correlation.rho
        return out

    def free_pairs(self) -> list[tuple[str, str]]:
        """Pairs of a feature and a tag's dimension that random interactions may be drawn from."""
        planted = {(name, dimension) for f in self.findings for name, dimension in pairs_of(f.terms)}
        dimensions = dict.fromkeys(dimension_of(tag) for tag in self.random_interactions.tags)
        return [(f, d) for f in self.random_interactions.features for d in dimensions if (f, d) not in planted]

    def without_preferences(self) -> PopulationSpec:
        """The same world, in which everybody likes the same: no findings, no random interactions."""
        return self.model_copy(update={"findings": (), "random_interactions": RandomInteractions()})


def dimension_of(tag: str) -> str:
    """The dimension of `dimension=value`."""
    return tag.partition("=")[0]


def pairs_of(terms: Iterable[Term]) -> set[tuple[str, str]]:
    """The (feature, tag dimension) pairs that these terms make interact."""
    return {(name, dimension_of(term.tag)) for term in terms for name in (*term.when, *term.along)}


def _no_feature(name: str, known: Mapping[str, Feature]) -> str:
    return f"there is no feature {name!r}; features are {', '.join(known)}"


def _term_problems(where: str, term: Term, known: Mapping[str, Feature]) -> Iterator[str]:
    for name, wanted in term.when.items():
        if name not in known:
            yield f"{where}.when: {_no_feature(name, known)}"
        elif bool(wanted.choices) != bool(known[name].choices):
            what = "a choice; name one or a list" if known[name].choices else "a number; give {from, below}"
            yield f"{where}.when.{name}: is {what}"
        elif unknown := [text for text in wanted.choices if text not in known[name].choices]:
            yield f"{where}.when.{name}: {unknown[0]!r} is not one of {', '.join(known[name].choices)}"
    for name in term.along:
        if name not in known:
            yield f"{where}.along: {_no_feature(name, known)}"
        elif known[name].quantiles is None:
            yield f"{where}.along.{name}: is a choice; only a number has a line along it"


def read_population(path: Path = WORLD) -> PopulationSpec:
    """The spec in a YAML file; raises InputError naming the file and every wrong field."""
    raw = load_yaml(path, docs=DOCS)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a world is a mapping of keys like `features:` ({DOCS}).")
    try:
        return PopulationSpec.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{explain(str(path), error)} {DOCS} has the keys.") from None
