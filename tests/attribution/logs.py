"""Small logs in memory, as the tests of attribution use them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import expit

from kaleidoscope.log import Log, factorise
from kaleidoscope.log_schema import LogSchema

Array = np.ndarray[Any, np.dtype[Any]]


def log_of(
    user: Mapping[str, Any],
    variants: Mapping[str, Sequence[Sequence[str]]],
    variant: Array,
    reward: Array,
    **given: Any,
) -> Log:
    """A log of these user columns, variants (a list of values per dimension), and of what `given` names besides:
    context, group, product, bucket (text of each row), unit, propensity, count, weight."""
    n, context = len(variant), dict(given.get("context", {}))
    columns = {name: _column(values) for name, values in {**user, **context}.items()}
    names: dict[str, Any] = {}
    for role in ("group", "product", "bucket"):
        texts, codes = factorise(np.array(given[role], dtype=object)) if role in given else (None, None)
        names |= {role: codes, f"{role}s": None if texts is None else pa.array(texts.tolist())}
    schema = LogSchema(
        label="click", user=tuple(user), context=tuple(context), variant=tuple(variants),
        propensity="p" if "propensity" in given else None, group="group" if "group" in given else None,
    )  # fmt: skip
    size = len(next(iter(variants.values())))
    table = {"variant_id": [f"v{i}" for i in range(size)], **{k: [list(v) for v in vs] for k, vs in variants.items()}}
    weight = np.asarray(given.get("weight", np.ones(n)), float)
    return Log(
        path=Path("log.parquet"), schema=schema, columns=columns, reward=reward.astype(np.float32),
        count=np.asarray(given.get("count", np.ones(n)), float), weight=weight, variant=variant,
        variants=pa.table(table), unit=given.get("unit"), propensity=given.get("propensity"), time=None,
        file_row=np.arange(n), file_rows=n, **names,
    )  # fmt: skip


def _column(values: Any) -> Any:
    array = pa.array(values)
    return array.dictionary_encode() if pa.types.is_string(array.type) else array


TAGS = {
    "tone": [[t] for t in ("calm", "calm", "loud", "loud", "plain", "plain")],
    "style": [[s] for s in ("flat", "real", "flat", "real", "flat", "real")],
}


def liking(
    n: int,
    seed: int,
    effect: float,
    *,
    rows_per_unit: int = 1,
    base: float = -2.0,
    unit_sd: float = 0.0,
    noise: int = 0,
) -> tuple[Log, Array]:
    """A random bucket in which women like loud by `effect` (in the logit), and the click probabilities."""
    rng = np.random.default_rng(seed)
    unit = np.repeat(np.arange(-(-n // rows_per_unit)), rows_per_unit)[:n]
    units = int(unit[-1]) + 1
    gender = np.array(["f", "m"])[(rng.random(units) < 0.5).astype(int)]
    age = np.round(rng.gamma(6, 7, units))
    city = np.array(["a", "b", "c"])[rng.integers(0, 3, units)]
    more = {f"x{i}": rng.normal(size=units) for i in range(noise)}
    variant = rng.integers(0, 6, n)
    loud = np.isin(variant, (2, 3))
    logit = (
        base + 0.2 * loud + 0.01 * (age[unit] - 40) + 0.3 * (city[unit] == "a") + effect * (gender[unit] == "f") * loud
    )
    logit = logit + rng.normal(0, unit_sd, units)[unit]
    p = expit(logit)
    user = {"gender": gender[unit], "age": age[unit], "city": city[unit], **{k: v[unit] for k, v in more.items()}}
    user = {k: v.tolist() if v.dtype.kind == "U" else v for k, v in user.items()}
    return log_of(user, TAGS, variant, rng.random(n) < p, unit=unit), p
