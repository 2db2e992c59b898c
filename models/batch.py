"""Encoded exposures as a model reads them: whole, in chunks, or as minibatches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array

from kaleidoscope.encoding import Encoder, Features, Role
from kaleidoscope.log import Log

CHUNK_ROWS = 32_768
THREADED_ROWS = 500_000


@dataclass(frozen=True)
class Examples:
    """n encoded exposures of N variants."""

    features: Features
    variant: NDArray[np.int64]  # (n,) row of `tags`
    tags: csr_array  # (N, tag columns) multi-hot
    reward: NDArray[np.float32]  # (n,) 0 or 1
    weight: NDArray[np.float64]  # (n,) exposures the row stands for × importance
    unit: NDArray[np.int64]  # (n,) who saw it

    @classmethod
    def of(cls, log: Log, encoder: Encoder) -> Examples:
        """Encode a log. A log without units makes every row its own unit."""
        columns = columns_of(log)
        unit = np.arange(len(log.reward)) if log.unit is None else log.unit
        return cls(
            encoder.features(columns, len(log)),
            log.variant,
            encoder.tags(log.variants),
            log.reward,
            log.count * log.weight,
            unit,
        )

    def __len__(self) -> int:
        return len(self.variant)

    def take(self, rows: NDArray[np.int64]) -> Examples:
        """Some of the rows."""
        return Examples(
            self.features.take(rows),
            self.variant[rows],
            self.tags,
            self.reward[rows],
            self.weight[rows],
            self.unit[rows],
        )

    def only(self, encoder: Encoder, *roles: Role) -> tuple[Examples, Encoder]:
        """The examples, and their encoder, with the fields of these roles alone."""
        narrow, fields, values = encoder.only(*roles)
        features = Features(self.features.codes[:, fields], self.features.values[:, values])
        return replace(self, features=features), narrow

    def split(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """Two sets with no unit in common; the second holds `share` of the units, at least one and not the last one."""
        units, code = np.unique(self.unit, return_inverse=True)
        order = np.random.default_rng(seed).permutation(len(units))
        out = (order < min(max(1, round(share * len(units))), len(units) - 1))[code]
        return self.take(np.flatnonzero(~out)), self.take(np.flatnonzero(out))


def columns_of(log: Log) -> dict[str, pa.Array]:
    """The columns an encoder reads: user, context and group."""
    columns = dict(log.columns)
    if log.group is not None and log.groups is not None and log.schema.group is not None:
        columns[log.schema.group] = log.groups.take(pa.array(log.group))
    return columns


def chunks(n: int, size: int = CHUNK_ROWS) -> Iterator[slice]:
    """Slices that cover range(n)."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def threads(rows: int) -> int:
    """Threads worth starting for work over so many rows: in small steps they wait for each other longer than they work,
    the more so beside other processes."""
    return 1 if rows < THREADED_ROWS else os.cpu_count() or 1
