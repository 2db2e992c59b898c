"""A learner fast enough for a hundred permutations: one empirical-Bayes step of user × tag tables on residuals.

It answers one question: does the gain from user features vanish when whole rows of them are dealt to other users?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import expit

from models.tables import EVIDENCE_NATS, Layout, block_variances

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class OneStep:
    """What does not change between permutations: n rows in K folds, T tags."""

    layout: Layout  # of user fields alone
    users: csr_array  # (n, C)
    score: NDArray[
        np.float32
    ]  # (n, T) weight × (reward − p) × contrast; p of a blind model that never saw the row's unit
    curvature: NDArray[np.float32]  # (n, T) weight × p(1 − p) × contrast²
    rows: list[Ints]  # per fold
    inflation: Floats  # (D,) variance of a unit's sums of residual × contrast, relative to independent rows

    @classmethod
    def of(
        cls,
        layout: Layout,
        users: csr_array,
        *,
        reward: NDArray[np.float32],
        weight: Floats,
        logit: Floats,
        contrast: NDArray[np.float32],
        fold: Ints,
        unit: Ints,
    ) -> OneStep:
        """Prepare the rows.

        `logit` (n,) is the blind model's held-out prediction for what was shown; `contrast` (n, T) the tags shown, less
        their mean over what could have been shown.
        """
        p = expit(logit)
        scores = (weight * (reward - p)).astype(np.float32)[:, None] * contrast
        curvature = (weight * p * (1 - p)).astype(np.float32)[:, None] * contrast**2
        groups, group = np.unique(unit, return_inverse=True)
        sums = csr_array((np.ones(len(unit)), (group, np.arange(len(unit)))), shape=(len(groups), len(unit))) @ scores
        dimensions = int(layout.tag_dimension.max(initial=-1)) + 1
        together = np.bincount(layout.tag_dimension, (sums**2).sum(axis=0), dimensions)
        alone = np.bincount(layout.tag_dimension, (scores**2).sum(axis=0), dimensions)
        inflation = np.maximum(together / np.maximum(alone, 1e-12), 1.0)
        rows = [np.flatnonzero(fold == f) for f in range(int(fold.max()) + 1)]
        return cls(layout, users, scores, curvature, rows, inflation)

    def preferences(self, source: Ints | None = None) -> NDArray[np.float32]:
        """What each row's user adds to each tag, learned on the other folds: (n, T). With `source` (n,), row i has the
        user features of row source[i]."""
        parts = [self.users[r if source is None else source[r]] for r in self.rows]
        gradients = np.stack([part.T @ self.score[r] for part, r in zip(parts, self.rows, strict=True)])
        curvatures = np.stack([part.power(2).T @ self.curvature[r] for part, r in zip(parts, self.rows, strict=True)])
        dimensions = len(self.inflation)
        block = (self.layout.side_block[: self.layout.n_crossed, None] * dimensions + self.layout.tag_dimension).ravel()
        n_blocks = len(self.layout.crossed_sizes) * dimensions
        out = np.zeros(self.score.shape, np.float32)
        for f, rows in enumerate(self.rows):
            error = 1.0 / np.maximum(curvatures.sum(axis=0) - curvatures[f], 1e-9)
            estimate = (gradients.sum(axis=0) - gradients[f]) * error
            error = error * self.inflation[self.layout.tag_dimension]
            variance, gain = block_variances(
                estimate.ravel().astype(float), error.ravel().astype(float), block, n_blocks
            )
            variance[gain <= EVIDENCE_NATS] = 0.0
            shrink = variance[block].reshape(error.shape)
            out[rows] = parts[f] @ (estimate * shrink / (shrink + error)).astype(np.float32)
        return out


def permuted_rows(unit: Ints, rng: np.random.Generator) -> Ints:
    """A row to take user features from, for every row (n,): those of one unit all go to one other unit."""
    _, first, code = np.unique(unit, return_index=True, return_inverse=True)
    return np.asarray(first[rng.permutation(len(first))][code])
