"""Worlds of anonymous fields and tags, everything in them drawn: for tests and benchmarks of models."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit

SLOTS = ("copy", "image", "layout")
DIMENSIONS = ("benefit", "urgency", "image_style", "colour_tone", "density", "button_colour")
FIELDS = ("age_band", "city", "occupation", "income", "device", "channel", "tenure", "newcomer")


@dataclass(frozen=True)
class WorldSpec:
    """What to plant. The defaults are the world that README and the benchmarks quote."""

    field_values: tuple[int, ...] = (6, 50, 20, 10, 3, 5, 8, 2)
    materials: tuple[int, ...] = (10, 10, 10)
    dimension_values: tuple[int, ...] = (4, 3, 4, 3, 3, 5)
    base_ctr: float = 0.03
    user_sd: float = 0.3
    tag_sd: float = 0.15
    material_sd: float = 0.05
    interactions: int = 6
    interaction_size: tuple[float, float] = (0.3, 0.8)
    context_values: int = 0
    context_sd: float = 0.3
    context_interactions: int = 0
    exposures_per_unit: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Users:
    """Fresh users: the index of each field's value, and of the context's value."""

    values: NDArray[np.int64]  # (n, F)
    context: NDArray[np.int64]  # (n,)

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class World:
    """A drawn world. Axis letters: F user fields, D tag dimensions, N variants."""

    spec: WorldSpec
    shares: tuple[NDArray[np.float64], ...]  # per field, the share of each value
    variant_materials: NDArray[np.int64]  # (N, slots)
    variant_tags: NDArray[np.int64]  # (N, D)
    base: float  # logit
    user_effects: tuple[NDArray[np.float64], ...]  # per field
    context_effect: NDArray[np.float64]
    variant_effect: NDArray[np.float64]  # (N,): tags and material residuals
    tables: dict[tuple[int, int], NDArray[np.float64]] = field(
        default_factory=dict
    )  # (field, dimension): (values, tags)
    context_tables: dict[int, NDArray[np.float64]] = field(default_factory=dict)

    @classmethod
    def draw(cls, spec: WorldSpec | None = None) -> World:
        """Draw a world from its spec; the same spec is the same world."""
        spec = spec or WorldSpec()
        rng = np.random.default_rng(spec.seed)
        shares = tuple(rng.dirichlet(np.full(k, 3.0)) for k in spec.field_values)
        n_slots = len(spec.materials)
        materials = np.stack(np.meshgrid(*map(np.arange, spec.materials), indexing="ij"), axis=-1).reshape(-1, n_slots)
        slot_of = np.arange(len(spec.dimension_values)) % n_slots
        tags = np.empty((len(materials), len(spec.dimension_values)), dtype=np.int64)
        for d, values in enumerate(spec.dimension_values):
            per_material = rng.permutation(np.arange(spec.materials[slot_of[d]]) % values)
            tags[:, d] = per_material[materials[:, slot_of[d]]]
        variant_effect = np.zeros(len(materials))
        for d, values in enumerate(spec.dimension_values):
            variant_effect += rng.normal(0, spec.tag_sd, values)[tags[:, d]]
        for s, count in enumerate(spec.materials):
            variant_effect += rng.normal(0, spec.material_sd, count)[materials[:, s]]
        pairs = [(f, d) for f in range(len(spec.field_values)) for d in range(len(spec.dimension_values))]
        chosen: list[int] = (
            rng.choice(len(pairs), spec.interactions, replace=False).tolist() if spec.interactions else []
        )
        tables = {pairs[i]: _table(rng, spec, pairs[i]) for i in chosen}
        context_tables = {}
        for d in rng.permutation(len(spec.dimension_values))[: spec.context_interactions]:
            size = rng.uniform(*spec.interaction_size)
            context_tables[int(d)] = size * rng.normal(size=(spec.context_values, spec.dimension_values[d]))
        world = cls(
            spec=spec,
            shares=shares,
            variant_materials=materials,
            variant_tags=tags,
            base=float(logit(spec.base_ctr)),
            user_effects=tuple(rng.normal(0, spec.user_sd, k) for k in spec.field_values),
            context_effect=rng.normal(0, spec.context_sd, max(spec.context_values, 1)),
            variant_effect=variant_effect,
            tables=tables,
            context_tables=context_tables,
        )
        return replace(world, base=world._calibrated_base(rng))

    def _calibrated_base(self, rng: np.random.Generator) -> float:
        """The intercept at which the mean click probability over users and variants is `spec.base_ctr`."""
        logits = self.logits(self.sample_users(1_000, rng)) - self.base
        return float(brentq(lambda base: float(expit(base + logits).mean()) - self.spec.base_ctr, -20.0, 20.0))

    @property
    def n_variants(self) -> int:
        """Variants of the scene: every combination of materials."""
        return len(self.variant_tags)

    def sample_users(self, n: int, rng: np.random.Generator) -> Users:
        """Draw `n` users and the context each is met in."""
        values = np.empty((n, len(self.shares)), dtype=np.int64)
        for f, p in enumerate(self.shares):
            values[:, f] = rng.choice(len(p), n, p=p)
        return Users(values, rng.integers(0, max(self.spec.context_values, 1), n))

    def _preferences(self, users: Users) -> list[tuple[int, NDArray[np.float64]]]:
        """The planted (dimension, (n, values) logit) terms that make users and contexts differ in taste."""
        terms = [(d, table[users.values[:, f]]) for (f, d), table in self.tables.items()]
        return terms + [(d, table[users.context]) for d, table in self.context_tables.items()]

    def _user_logit(self, users: Users) -> NDArray[np.float64]:
        total = self.base + self.context_effect[users.context]
        for f, effect in enumerate(self.user_effects):
            total = total + effect[users.values[:, f]]
        return np.asarray(total)

    def logits(self, users: Users) -> NDArray[np.float64]:
        """True click logits of every variant for every user: (n, N)."""
        out = self._user_logit(users)[:, None] + self.variant_effect
        for d, term in self._preferences(users):
            out += term[:, self.variant_tags[:, d]]
        return out

    def logits_of(self, users: Users, variant: NDArray[np.int64]) -> NDArray[np.float64]:
        """True click logits of one variant per user: (n,)."""
        out = self._user_logit(users) + self.variant_effect[variant]
        rows = np.arange(len(users))
        for d, term in self._preferences(users):
            out += term[rows, self.variant_tags[variant, d]]
        return out

    def best(self, users: Users) -> NDArray[np.int64]:
        """The oracle's pick for every user: (n,)."""
        return np.concatenate([self.logits(part).argmax(axis=1) for part in _chunks(users)])

    def best_single(self, users: Users) -> int:
        """The variant that is best on average over these users."""
        return int(sum(expit(self.logits(part)).sum(axis=0) for part in _chunks(users)).argmax())

    def value(self, users: Users, variant: NDArray[np.int64]) -> float:
        """Mean true click probability of showing `variant` (n,) to these users."""
        return float(expit(self.logits_of(users, variant)).mean())

    def log(self, rows: int, rng: np.random.Generator, *, hidden: NDArray[np.int64] | None = None) -> pa.Table:
        """A log of the contract: uniformly random exposures of all variants but the `hidden` ones.

        Columns: the user fields, `context` if the world has one, the tag dimensions, the material in each slot,
        `variant_id`, `user_id`, `propensity` and `click`. Read it with `schema()`.
        """
        n_units = max(1, round(rows / self.spec.exposures_per_unit))
        unit = np.arange(rows) if n_units == rows else rng.integers(0, n_units, rows)
        people = self.sample_users(n_units, rng)
        users = Users(people.values[unit], rng.integers(0, max(self.spec.context_values, 1), rows))
        shown = np.arange(self.n_variants) if hidden is None else np.setdiff1d(np.arange(self.n_variants), hidden)
        variant = shown[rng.integers(0, len(shown), rows)]
        click = rng.random(rows) < expit(self.logits_of(users, variant))
        columns = self.columns(users)
        for d, name in enumerate(self.dimension_names):
            columns[name] = _labels(name, self.variant_tags[variant, d])
        for s, name in enumerate(self.slot_names):
            columns[name] = _labels(name, self.variant_materials[variant, s])
        ids = self.variant_ids
        columns["variant_id"] = pa.DictionaryArray.from_arrays(pa.array(variant.astype(np.int32)), pa.array(ids))
        columns["user_id"] = pa.array(unit)
        columns["propensity"] = pa.array(np.full(rows, 1.0 / len(shown)))
        columns["click"] = pa.array(click.astype(np.int8))
        return pa.table(columns)

    def schema(self) -> dict[str, object]:
        """The log schema (design of the log contract) of `log()`."""
        return {
            "scene": "welcome-banner",
            "label": "click",
            "unit": "user_id",
            "context": ["context"] if self.spec.context_values else [],
            "user": list(self.field_names),
            "variant": [*self.dimension_names, *self.slot_names],
            "variant_id": "variant_id",
            "propensity": "propensity",
        }

    @property
    def field_names(self) -> tuple[str, ...]:
        """Names of the user fields, in the order of `Users.values`."""
        return _names(FIELDS, len(self.spec.field_values), "field")

    @property
    def dimension_names(self) -> tuple[str, ...]:
        """Names of the tag dimensions, in the order of `variant_tags`."""
        return _names(DIMENSIONS, len(self.spec.dimension_values), "dimension")

    @property
    def slot_names(self) -> tuple[str, ...]:
        """Names of the slots, in the order of `variant_materials`."""
        return _names(SLOTS, len(self.spec.materials), "slot")

    @property
    def variant_ids(self) -> list[str]:
        """What `variant_id` of a log calls each variant."""
        return [f"v_{i}" for i in range(self.n_variants)]

    @property
    def variants(self) -> pa.Table:
        """Tags and materials of every variant, a list of text per dimension: what an encoder reads."""
        codes = np.concatenate([self.variant_tags, self.variant_materials], axis=1)
        names = [*self.dimension_names, *self.slot_names]
        return pa.table({name: pa.array([[f"{name}_{i}"] for i in codes[:, d]]) for d, name in enumerate(names)})

    def columns(self, users: Users) -> dict[str, pa.Array]:
        """Users and contexts as the columns of a log."""
        out: dict[str, pa.Array] = {name: _labels(name, users.values[:, f]) for f, name in enumerate(self.field_names)}
        if self.spec.context_values:
            out["context"] = _labels("context", users.context)
        return out


def _table(rng: np.random.Generator, spec: WorldSpec, pair: tuple[int, int]) -> NDArray[np.float64]:
    """One planted preference: every user value likes or dislikes every tag value, by the same size in the logit."""
    shape = (spec.field_values[pair[0]], spec.dimension_values[pair[1]])
    return np.asarray(rng.uniform(*spec.interaction_size) * rng.choice([-1.0, 1.0], shape))


def _names(known: tuple[str, ...], count: int, prefix: str) -> tuple[str, ...]:
    return known[:count] if count <= len(known) else tuple(f"{prefix}{i}" for i in range(count))


def _labels(name: str, codes: NDArray[np.int64]) -> pa.DictionaryArray:
    values = [f"{name}_{i}" for i in range(int(codes.max(initial=0)) + 1)]
    return pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), pa.array(values))


def _chunks(users: Users, size: int = 10_000) -> list[Users]:
    return [Users(users.values[i : i + size], users.context[i : i + size]) for i in range(0, len(users), size)]
