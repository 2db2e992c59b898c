"""People who come back, tire, and click the described variants of any scene; and the truth about them.

What they are and like is read from a spec (`spec.py`). Ground floor: variants are given by id, materials and tags, and
nothing here knows a database.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtr

from kaleidoscope.combiner import Option, Slot, Space, explode, parse, tags_of
from kaleidoscope.simulation.spec import Condition, Finding, PopulationSpec, Term, dimension_of, pairs_of
from kaleidoscope.yaml_text import load_yaml

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DAY_S = 86_400.0
CALIBRATION_USERS = 2_000
MOST_HALF_LIVES = 500.0  # after which what units remember is scaled anew; 2**1000 would be too large for a float

_TEXTS = pa.list_(pa.string())


@dataclass(frozen=True)
class People:
    """Simulated users: what they are in truth, and whether requests know it. `n` users."""

    ids: NDArray[np.str_]  # (n,)
    values: Mapping[str, Floats]  # per feature (n,): the number, or the position among the choices
    known: Mapping[str, NDArray[np.bool_]]  # per feature (n,)
    visits_per_day: Floats  # (n,)
    spec: PopulationSpec

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Ints) -> People:
        """Some of them, in this order; a row may come again."""
        values = {name: column[rows] for name, column in self.values.items()}
        known = {name: column[rows] for name, column in self.known.items()}
        return People(self.ids[rows], values, known, self.visits_per_day[rows], self.spec)

    def columns(self) -> dict[str, pa.Array]:
        """Their features as the columns of a log: numbers, or dictionary-encoded text; null where nobody knows."""
        out = {}
        for feature in self.spec.features:
            values, hidden = self.values[feature.name], ~self.known[feature.name]
            if feature.quantiles is not None:
                whole = feature.step % 1 == 0
                out[feature.name] = pa.array(values.astype(np.int64) if whole else values, mask=hidden)
            else:
                codes = pa.array(values.astype(np.int32), mask=hidden)
                out[feature.name] = pa.DictionaryArray.from_arrays(codes, pa.array(feature.choices))
        return out

    def features(self) -> list[dict[str, str | int | float | None]]:
        """Their features as requests carry them, one mapping per user: text, numbers, None where nobody knows."""
        columns = {name: column.to_pylist() for name, column in self.columns().items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@dataclass(frozen=True)
class Visits:
    """Visits in the order of time: which unit came by, and when."""

    unit: Ints  # (n,) row of the people
    time_s: Floats  # (n,) seconds since 1970, UTC

    def __len__(self) -> int:
        return len(self.unit)

    def times(self) -> list[datetime]:
        """The moments as a decision takes them."""
        return [datetime.fromtimestamp(s, UTC) for s in self.time_s.tolist()]


class Described(Protocol):
    """A variant by its id, its materials by slot and its tags by dimension; `interventions.DescribedVariant` is one."""

    @property
    def id(self) -> str:
        """Its id."""

    @property
    def materials(self) -> Mapping[str, str]:
        """Slot → material id."""

    @property
    def tags(self) -> Mapping[str, tuple[str, ...]]:
        """Dimension → values."""


@dataclass(frozen=True)
class ExampleVariant:
    """A variant that no database holds."""

    id: str
    materials: Mapping[str, str]
    tags: Mapping[str, tuple[str, ...]]


def example_variants(folder: Path) -> list[ExampleVariant]:
    """The variants of a scene as `scene.yaml` and `materials.csv` in a folder describe it, without a database.

    Constraints hold; design checks are not looked at.
    """
    scene = load_yaml(folder / "scene.yaml", docs="docs/guide-first-scene.md")
    with (folder / "materials.csv").open(encoding="utf-8", newline="") as file:
        texts = {row["id"]: row["tags"] for row in csv.DictReader(file)}
    slots = []
    for slot in scene["slots"]:
        options = []
        for material in slot["materials"]:
            tags: dict[str, tuple[str, ...]] = {}
            for dimension, _, value in (text.partition("=") for text in texts[material].split("|")):
                tags[dimension] = (*tags.get(dimension, ()), value)
            options.append(Option(material, tags))
        slots.append(Slot(slot["name"], tuple(options)))
    space = Space(tuple(slots), tuple(parse(text) for text in scene.get("constraints", ())))
    found = []
    for batch in explode(space):
        for row in batch.to_pylist():
            variant = row.pop("variant_id")
            found.append(ExampleVariant(variant, row, tags_of(space, row)))
    return found


@dataclass(frozen=True)
class Population:
    """A world drawn from its spec: the same spec and seed are the same world, whatever scene is looked at."""

    spec: PopulationSpec
    seed: int = 0

    def people(self, n: int, *, draw: int = 0) -> People:
        """`n` users; another `draw` gives other users of the same world, with other ids."""
        rng = self._rng("people", str(draw))
        spec, columns = self.spec, {}
        normal = np.empty((n, 0))
        if spec.features:
            root = np.linalg.cholesky(spec.correlation_matrix())
            normal = rng.normal(size=(n, len(spec.features))) @ root.T
        for feature, share in zip(spec.features, ndtr(normal).T, strict=True):
            if feature.quantiles is not None:
                number = np.interp(share, np.linspace(0, 1, len(feature.quantiles)), feature.quantiles)
                columns[feature.name] = np.round(number / feature.step) * feature.step
            else:
                steps = np.cumsum(list((feature.shares or {}).values()))[:-1]
                columns[feature.name] = np.searchsorted(steps, share, side="right").astype(np.float64)
        known = {f.name: rng.random(n) >= f.missing for f in spec.features}
        shape = spec.traffic.shape
        rate = rng.gamma(shape, spec.traffic.visits_per_day / shape, n)
        ids = np.array([f"u{draw}-{i:07d}" for i in range(n)], dtype=np.str_)
        return People(ids, columns, known, rate, spec)

    def scene(self, variants: Sequence[Described], released: datetime | None = None) -> SimulatedScene:
        """The truth about a scene of these variants, calibrated to the base CTR; `released`: when (None: long ago)."""
        scene = SimulatedScene(self, tuple(variants), np.full(len(variants), _seconds(released)), 0.0)
        people = self.people(CALIBRATION_USERS, draw=-1)
        logits = scene.click_logit(people)
        target = self.spec.base_ctr
        base = brentq(lambda b: float(expit(b + logits).mean()) - target, -20.0, 20.0)
        return replace(scene, base=float(base))

    def traffic(
        self, people: People, *, start: datetime, days: float, batch: int = 5_000, visits_per_day: float | None = None
    ) -> Iterator[Visits]:
        """Visits in the order of time, at most `batch` at once, and at most a day.

        Units come back (gamma-distributed rates, Poisson visits). With `visits_per_day` units come so often on average
        instead of as the spec says. The visits do not depend on `batch`.
        """
        spec = self.spec.traffic
        rate = people.visits_per_day * (1.0 if visits_per_day is None else visits_per_day / spec.visits_per_day)
        minutes = np.arange(24 * 60)
        density = np.maximum(_around_the_clock(spec.hours, minutes / 60), 0)
        cumulative = np.concatenate([[0.0], np.cumsum(density)]) / density.sum()
        first = _seconds(start)
        for day in range(int(np.ceil(days))):
            rng = self._rng("traffic", f"{first}/{day}")
            unit = np.repeat(np.arange(len(people)), rng.poisson(rate))
            # A day from `start` on, with the hours of the clock.
            minute = np.interp(rng.random(len(unit)), cumulative, np.arange(24 * 60 + 1))
            after = (minute * 60 - first % DAY_S) % DAY_S
            time_s = first + day * DAY_S + after
            order = np.argsort(time_s, kind="stable")
            order = order[time_s[order] < first + days * DAY_S]
            for i in range(0, len(order), batch):
                rows = order[i : i + batch]
                yield Visits(unit[rows], time_s[rows])

    @cached_property
    def preferences(self) -> tuple[Finding, ...]:
        """Everything that makes users differ in taste: the findings, then the random interactions."""
        return (*self.spec.findings, *self._random())

    def _random(self) -> list[Finding]:
        drawn, rng = self.spec.random_interactions, self._rng("interactions", "")
        pairs = self.spec.free_pairs()
        by_name = {feature.name: feature for feature in self.spec.features}
        found: list[Finding] = []
        for i in rng.permutation(len(pairs))[: drawn.count].tolist():
            name, dimension = pairs[i]
            tag = str(rng.choice([tag for tag in drawn.tags if dimension_of(tag) == dimension]))
            size = round(float(rng.uniform(*drawn.size)), 3) * (1 if rng.random() < 0.5 else -1)
            feature = by_name[name]
            if feature.quantiles is not None:
                middle = float(np.interp(0.5, np.linspace(0, 1, len(feature.quantiles)), feature.quantiles))
                these, others = Condition(from_=middle), Condition(below=middle)
                who = f"{name} from {middle:g} on"
            else:
                choices = rng.permutation(feature.choices).tolist()
                half = len(choices) // 2
                these, others = Condition(choices=tuple(choices[:half])), Condition(choices=tuple(choices[half:]))
                who = f"{name} {' or '.join(these.choices)}"
            found.append(
                Finding(
                    id=f"random-{len(found) + 1}",
                    says=f"Users with {who} {'like' if size > 0 else 'dislike'} {tag}; others the other way round.",
                    terms=(
                        Term(tag=tag, when={name: these}, effect=size),
                        Term(tag=tag, when={name: others}, effect=-size),
                    ),
                )
            )
        return found

    def planted_pairs(self) -> set[tuple[str, str]]:
        """The (feature, tag dimension) pairs that interact in truth."""
        return {pair for finding in self.preferences for pair in pairs_of(finding.terms)}

    def tag_effect(self, tag: str) -> float:
        """The main effect of `dimension=value`: given in the spec, else drawn."""
        given = self.spec.tags.get(tag)
        return self._rng("tag", tag).normal(0, self.spec.effects.tag_sd) if given is None else given

    def material_effect(self, slot: str, material: str) -> float:
        """What a material has beyond its tags."""
        return self._rng("material", f"{slot}:{material}").normal(0, self.spec.effects.material_sd)

    def feature_effect(self, people: People, kind: str, sd: float) -> Floats:
        """How much more these users do something, whatever they are shown: (n,), drawn per choice or along numbers."""
        out = np.zeros(len(people))
        for feature in self.spec.features:
            rng, values = self._rng(kind, feature.name), people.values[feature.name]
            if feature.quantiles is not None:
                # Along the ranks, between ±√3: a standard deviation of 1, as that of a choice.
                rank = np.interp(values, feature.quantiles, np.linspace(-(3**0.5), 3**0.5, len(feature.quantiles)))
                out += rng.normal(0, sd) * rank
            else:
                out += rng.normal(0, sd, len(feature.choices))[values.astype(np.int64)]
        return out

    def _rng(self, kind: str, name: str) -> np.random.Generator:
        """A stream for one purpose alone, so that a world with one thing more is otherwise the same."""
        digest = hashlib.blake2b(f"{kind}\0{name}".encode(), digest_size=16).digest()
        return np.random.default_rng([self.seed, int.from_bytes(digest, "little")])


@dataclass(frozen=True)
class Outcomes:
    """What simulated users did with what they were shown: (n,) each."""

    click: NDArray[np.bool_]
    converted: NDArray[np.bool_]
    dwell_s: Floats


@dataclass(frozen=True)
class SimulatedScene:
    """The truth about a scene: what users click of its N variants. T tags, n users or visits."""

    population: Population
    variants: tuple[Described, ...]
    released_s: Floats  # (N,) -inf: long ago
    base: float  # logit

    def with_variants(self, more: Sequence[Described], released: datetime | None = None) -> SimulatedScene:
        """The scene with variants more, and everything else as it was: nothing is calibrated anew."""
        times = np.concatenate([self.released_s, np.full(len(more), _seconds(released))])
        return replace(self, variants=(*self.variants, *more), released_s=times)

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Variant id → its position, as arrays of variants hold it."""
        return {variant.id: n for n, variant in enumerate(self.variants)}

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """Every `dimension=value` that a variant carries, in the order in which they come."""
        return tuple(dict.fromkeys(f"{d}={v}" for one in self.variants for d in one.tags for v in one.tags[d]))

    @cached_property
    def _carries(self) -> Floats:
        """(N, T) 1 where a variant carries a tag."""
        out, at = np.zeros((len(self.variants), len(self.tags))), {tag: n for n, tag in enumerate(self.tags)}
        for n, one in enumerate(self.variants):
            out[n, [at[f"{d}={v}"] for d in one.tags for v in one.tags[d]]] = 1.0
        return out

    @cached_property
    def _tag_main(self) -> Floats:
        """(N,) main effects of tags."""
        return np.asarray(self._carries @ np.array([self.population.tag_effect(tag) for tag in self.tags]))

    @cached_property
    def _material_main(self) -> Floats:
        """(N,) what materials have beyond their tags."""
        pairs = dict.fromkeys(pair for one in self.variants for pair in one.materials.items())
        effect = {pair: self.population.material_effect(*pair) for pair in pairs}
        return np.array([sum(effect[pair] for pair in one.materials.items()) for one in self.variants])

    @cached_property
    def _main(self) -> Floats:
        return self._tag_main + self._material_main

    @cached_property
    def _terms(self) -> tuple[tuple[Term, Floats], ...]:
        """The terms that bear on this scene, and which variants they are about: (N,)."""
        found = []
        for term in (term for finding in self.population.preferences for term in finding.terms):
            dimension, _, value = term.tag.partition("=")
            about = [
                n
                for n, tag in enumerate(self.tags)
                if tag == term.tag or (value == "*" and dimension_of(tag) == dimension)
            ]
            if about:
                found.append((term, self._carries[:, about].max(axis=1)))
        return tuple(found)

    @cached_property
    def _about(self) -> Floats:
        """(K, N) the variants that each of the K terms is about."""
        return np.array([about for _, about in self._terms]).reshape(-1, len(self.variants))

    @cached_property
    def _tiring(self) -> Floats:
        """(T,) 1 for the tags of which users tire."""
        return np.array([dimension_of(tag) in self.population.spec.fatigue.dimensions for tag in self.tags], np.float64)

    # ── clicks ──

    def click_logit(self, people: People, time_s: Floats | None = None, recent: Floats | None = None) -> Floats:
        """True click logits of every variant for every user: (n, N).

        `time_s` (n,) brings in hour, weekday and novelty; `recent` (n, T), of `Exposures.seen`, fatigue.
        """
        out = self._user_logit(people, time_s)[:, None] + self._main + self._taste(people) @ self._about
        if time_s is not None:
            out += self._novelty(time_s[:, None], self.released_s[None, :])
        if recent is not None:
            out -= self._tiredness(recent) @ self._carries.T
        return np.asarray(out)

    def click_logit_of(
        self, people: People, variant: Ints, time_s: Floats | None = None, recent: Floats | None = None
    ) -> Floats:
        """True click logits of one variant per user (its position): (n,). Otherwise as `click_logit`."""
        out = self._user_logit(people, time_s) + self._main[variant]
        out += (self._taste(people) * self._about[:, variant].T).sum(axis=1)
        if time_s is not None:
            out += self._novelty(time_s, self.released_s[variant])
        if recent is not None:
            out -= (self._tiredness(recent) * self._carries[variant]).sum(axis=1)
        return np.asarray(out)

    def _user_logit(self, people: People, time_s: Floats | None) -> Floats:
        """(n,) what does not depend on the variant."""
        spec = self.population.spec
        out = self.base + self.population.feature_effect(people, "feature", spec.effects.feature_sd)
        if time_s is not None:
            out += _around_the_clock(spec.hours, time_s / 3600 % 24)
            out += np.array(spec.weekdays)[(time_s // DAY_S + 3).astype(np.int64) % 7]  # 1970 began on a Thursday
        return np.asarray(out)

    def _taste(self, people: People) -> Floats:
        """(n, K) how large each term is for each user."""
        out = np.empty((len(people), len(self._terms)))
        for k, (term, _) in enumerate(self._terms):
            out[:, k] = _size(term, people)
        return out

    def _novelty(self, time_s: Floats, released_s: Floats) -> Floats:
        spec = self.population.spec.novelty
        age = np.maximum(time_s - released_s, 0.0) / (spec.half_life_days * DAY_S)
        return np.asarray(spec.gain * np.exp2(-age))

    def _tiredness(self, recent: Floats) -> Floats:
        spec = self.population.spec.fatigue
        return np.asarray(spec.per_exposure * np.minimum(recent, spec.most_exposures) * self._tiring)

    def respond(
        self, people: People, variant: Ints, rng: np.random.Generator, *,
        time_s: Floats | None = None, recent: Floats | None = None,
    ) -> Outcomes:  # fmt: skip
        """What these users do with the variants they are shown; arguments as `click_logit_of`."""
        spec = self.population.spec
        draws = rng.random((2, len(people)))
        click = draws[0] < expit(self.click_logit_of(people, variant, time_s, recent))
        effect = self.population.feature_effect(people, "conversion", spec.conversion.feature_sd)
        converted = click & (draws[1] < expit(logit(spec.conversion.rate) + effect))
        median = np.where(click, spec.dwell.clicked_s, spec.dwell.passed_s)
        return Outcomes(click, converted, median * np.exp(rng.normal(0, spec.dwell.sd, len(people))))

    def carried(self, variant: Ints) -> Floats:
        """(n, T) 1 where these variants carry a tag."""
        return np.asarray(self._carries[variant])

    # ── what policies are worth ──

    def best(
        self, people: People, time_s: Floats | None = None, recent: Floats | None = None, *, by_tags: bool = False
    ) -> Ints:
        """The oracle's pick for every user: (n,). `by_tags`: of one that knows what tags do, but no single material."""
        unknown = self._material_main if by_tags else np.zeros(len(self.variants))
        found = [(self.click_logit(*part) - unknown).argmax(axis=1) for part in _parts(people, time_s, recent)]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def best_single(self, people: People) -> int:
        """The variant that is best on average over these users."""
        return int(self.variant_values(people).argmax())

    def variant_values(self, people: People) -> Floats:
        """The mean true click probability of every variant over these users: (N,)."""
        total = np.zeros(len(self.variants))
        for part in _parts(people, None, None):
            total += expit(self.click_logit(*part)).sum(axis=0)
        return total / len(people)

    def value(self, people: People, variant: Ints, time_s: Floats | None = None, recent: Floats | None = None) -> float:
        """The mean true click probability of showing these users these variants (n,)."""
        return float(expit(self.click_logit_of(people, variant, time_s, recent)).mean())

    def value_of_policy(
        self, people: People, probability: Floats, time_s: Floats | None = None, recent: Floats | None = None
    ) -> float:
        """The mean true click probability of a policy that shows each variant to each user so often: (n, N)."""
        return float((probability * expit(self.click_logit(people, time_s, recent))).sum(axis=1).mean())

    # ── a log ──

    def tag_table(self) -> pa.Table:
        """`variant_id`, and per dimension the values (lists of text) of every variant: what an encoder reads."""
        dimensions = list(dict.fromkeys(map(dimension_of, self.tags)))
        columns = {d: pa.array([list(v.tags.get(d, ())) for v in self.variants], _TEXTS) for d in dimensions}
        return pa.table({"variant_id": pa.array([v.id for v in self.variants], pa.string()), **columns})

    def log(
        self,
        people: People,
        visits: Iterable[Visits],
        rng: np.random.Generator,
        *,
        hidden: Collection[str] = (),
    ) -> pa.Table:
        """A log of the contract: at every visit a variant at random, but none of the `hidden` ids.

        Columns: the features, the tag dimensions (lists), a column per slot, `variant_id`, `user_id`, `time`,
        `propensity`, `click`, `converted` and `dwell_s`. Read it with `schema()`.
        """
        shown = np.array([n for n, one in enumerate(self.variants) if one.id not in hidden])
        memory, tables = Exposures(self, len(people)), []
        table = self.tag_table()
        slots = list(dict.fromkeys(slot for one in self.variants for slot in one.materials))
        for slot in slots:
            table = table.append_column(slot, pa.array([v.materials.get(slot) for v in self.variants], pa.string()))
        for part in visits:
            users = people.take(part.unit)
            variant = shown[rng.integers(0, len(shown), len(part))]
            recent = memory.seen(self, part.unit, part.time_s)
            outcomes = self.respond(users, variant, rng, time_s=part.time_s, recent=recent)
            memory.add(self, part.unit, variant, part.time_s)
            taken = table.take(pa.array(variant))
            columns = {
                **users.columns(),
                **{name: taken[name] for name in taken.column_names},
                "user_id": pa.array(users.ids),
                "time": pa.array((part.time_s * 1e6).astype(np.int64), pa.timestamp("us", "UTC")),
                "propensity": pa.array(np.full(len(part), 1.0 / len(shown))),
                "click": pa.array(outcomes.click.astype(np.int8)),
                "converted": pa.array(outcomes.converted.astype(np.int8)),
                "dwell_s": pa.array(outcomes.dwell_s),
            }
            tables.append(pa.table(columns))
        return pa.concat_tables(tables)

    def schema(self, label: str = "click") -> dict[str, object]:
        """The log schema of `log()`; materials are left out of `variant`: tags alone are what is learned about."""
        return {
            "scene": f"simulated-{self.population.spec.name}",
            "label": label,
            "unit": "user_id",
            "user": [feature.name for feature in self.population.spec.features],
            "variant": list(dict.fromkeys(map(dimension_of, self.tags))),
            "variant_id": "variant_id",
            "propensity": "propensity",
            "time": "time",
        }


class Exposures:
    """How often units have recently seen each tag of a scene: counts with a half-life, by which users tire.

    Forward decay (Cormode et al. 2009): what is kept grows with the time of the exposure and is scaled down when it is
    read, so that nothing has to be decayed in between.
    """

    def __init__(self, scene: SimulatedScene, units: int) -> None:
        self._half_life_s = scene.population.spec.fatigue.half_life_days * DAY_S
        self._strength = np.zeros((units, len(scene.tags)))
        self._origin_s: float | None = None  # None: nothing was seen yet

    def seen(self, scene: SimulatedScene, unit: Ints, time_s: Floats) -> Floats:
        """(n, T) recent exposures of these units to each tag of the scene, which may have got variants since."""
        self._widen(len(scene.tags))
        if self._origin_s is None:
            return np.zeros((len(unit), len(scene.tags)))
        decay = np.exp2((self._origin_s - time_s) / self._half_life_s)
        return np.asarray(self._strength[unit] * decay[:, None])

    def add(self, scene: SimulatedScene, unit: Ints, variant: Ints, time_s: Floats) -> None:
        """Units saw these variants (positions) at these times, (n,) each."""
        if not len(unit):
            return
        self._widen(len(scene.tags))
        latest = float(time_s.max())
        if self._origin_s is None:
            self._origin_s = latest
        elif latest > self._origin_s + MOST_HALF_LIVES * self._half_life_s:
            self._strength *= np.exp2((self._origin_s - latest) / self._half_life_s)
            self._origin_s = latest
        weight = np.exp2((time_s - self._origin_s) / self._half_life_s)
        np.add.at(self._strength, unit, scene.carried(variant) * weight[:, None])

    def _widen(self, tags: int) -> None:
        missing = tags - self._strength.shape[1]
        if missing > 0:
            self._strength = np.pad(self._strength, ((0, 0), (0, missing)))


def _size(term: Term, people: People) -> Floats:
    """(n,) the effect of a term on each user, 0 for those it is not about."""
    if term.along:
        ((name, line),) = term.along.items()
        points = sorted(line.items())
        out = np.interp(people.values[name], [x for x, _ in points], [y for _, y in points])
    else:
        out = np.full(len(people), term.effect)
    for name, wanted in term.when.items():
        values = people.values[name]
        if wanted.choices:
            choices = next(f.choices for f in people.spec.features if f.name == name)
            out = out * np.isin(values, [choices.index(text) for text in wanted.choices])
        else:
            out = out * ((values >= wanted.from_) & (values < wanted.below))
    return np.asarray(out)


def _around_the_clock(hours: Mapping[int, float], hour: Floats) -> Floats:
    """A broken line through the values at these hours, that begins anew at midnight."""
    at = sorted(hours)
    return np.interp(hour, at, [hours[h] for h in at], period=24)


def _seconds(moment: datetime | None) -> float:
    return -np.inf if moment is None else moment.timestamp()


def _parts(
    people: People, time_s: Floats | None, recent: Floats | None, size: int = 4_000
) -> Iterator[tuple[People, Floats | None, Floats | None]]:
    for i in range(0, len(people), size):
        rows = np.arange(i, min(i + size, len(people)))
        yield people.take(rows), None if time_s is None else time_s[rows], None if recent is None else recent[rows]
