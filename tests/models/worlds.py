"""Encoded logs of simulated worlds, as the tests of models use them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import expit

from kaleidoscope.encoding import Encoder
from kaleidoscope.simulation import Users, World, WorldSpec
from models.batch import Examples

Array = np.ndarray[Any, np.dtype[Any]]

SPEC = WorldSpec(
    field_values=(4, 5, 3, 2), materials=(4, 3, 3), dimension_values=(4, 3, 3), base_ctr=0.1, interactions=2, seed=3
)


def encoder_of(world: World) -> Encoder:
    """Vocabularies of a world, from ten thousand of its users."""
    columns = world.columns(world.sample_users(10_000, np.random.default_rng(0)))
    context = ["context"] if world.spec.context_values else []
    variants = world.variants
    return Encoder.fit(
        columns, user=world.field_names, context=context, variants=variants, dimensions=variants.column_names
    )


def log_of(
    world: World,
    rows: int,
    seed: int = 0,
    *,
    hidden: Sequence[int] = (),
    extra: Callable[[Users, Array], Array] | None = None,
    rows_per_unit: int = 1,
    unit_sd: float = 0.0,
) -> Examples:
    """Uniformly random exposures of all variants but the `hidden` ones; `extra` adds to the true logits."""
    rng, encoder = np.random.default_rng(seed), encoder_of(world)
    unit = np.repeat(np.arange(-(-rows // rows_per_unit)), rows_per_unit)[:rows]
    people = world.sample_users(int(unit[-1]) + 1, rng)
    users = Users(people.values[unit], rng.integers(0, max(world.spec.context_values, 1), rows))
    variant = rng.choice(np.setdiff1d(np.arange(world.n_variants), hidden), rows)
    logits = world.logits_of(users, variant) + rng.normal(0, unit_sd, len(people))[unit]
    if extra is not None:
        logits = logits + extra(users, variant)
    reward = (rng.random(rows) < expit(logits)).astype(np.float32)
    features, tags = encoder.features(world.columns(users), rows), encoder.tags(world.variants)
    return Examples(features, variant, tags, reward, np.ones(rows), unit)


def examples_of(
    columns: Mapping[str, Any], variants: Mapping[str, list[list[str]]], variant: Array, reward: Array, **given: Any
) -> tuple[Examples, Encoder]:
    """Examples of given columns; `group` names the groups among them; `weight` and `unit` default to 1 and the row."""
    n, table = len(variant), pa.table({k: pa.array(v, pa.list_(pa.string())) for k, v in variants.items()})
    arrays = {name: pa.array(values) for name, values in columns.items()}
    group = given.get("group", [])
    user = [name for name in arrays if name not in group]
    encoder = Encoder.fit(arrays, user=user, context=[], group=group, variants=table, dimensions=table.column_names)
    weight, unit = given.get("weight", np.ones(n)), given.get("unit", np.arange(n))
    features = encoder.features(arrays, n)
    return Examples(features, variant, encoder.tags(table), reward.astype(np.float32), weight, unit), encoder
