"""The one contract of CTR models, and the models the network is measured against."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol, Self

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, hstack
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from kaleidoscope.encoding import Encoder, Features
from models.batch import Examples, chunks, threads
from models.tables import Layout, block_variances

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RANK_PAIRS = 500_000  # (user, variant) pairs predicted at once
MAX_TAG_COLUMNS = 100  # most common values of a dimension of which a variant may have several
MAX_EBM_PAIRS = 200


class Model(Protocol):
    """What a CTR model can do. `variant` indexes the variants of the examples it was fitted to, N of them."""

    @classmethod
    def fit(cls, examples: Examples, encoder: Encoder, *, seed: int = 0) -> Self:
        """Learn from encoded exposures; the same examples and seed give the same model."""
        ...

    def predict(self, features: Features, variant: Ints) -> Floats:
        """Click probability of one variant per row: (n,)."""
        ...

    def rank(self, features: Features) -> NDArray[np.float32]:
        """A score of every variant for every user, higher is better: (n, N)."""
        ...


@dataclass(frozen=True)
class MostPopular:
    """Every user gets the variant with the highest click rate, shrunk towards the mean by empirical Bayes."""

    score: Floats  # (N,) logit

    @classmethod
    def fit(cls, examples: Examples, encoder: Encoder, *, seed: int = 0) -> Self:
        """Shrink each variant's rate."""
        n = examples.tags.shape[0]
        rate = float(np.clip(np.average(examples.reward, weights=examples.weight), 1e-6, 1 - 1e-6))
        shown = np.bincount(examples.variant, examples.weight, n)
        residual = np.bincount(examples.variant, examples.weight * (examples.reward - rate), n)
        error = 1.0 / np.maximum(shown * rate * (1 - rate), 1e-9)  # of a logit
        variance = block_variances(residual * error, error, np.zeros(n, np.int64), 1)[0][0]
        shrunk = rate + residual / np.maximum(shown, 1e-9) * variance / (variance + error)
        return cls(logit(np.clip(shrunk, 1e-6, 1 - 1e-6)))

    def predict(self, features: Features, variant: Ints) -> Floats:
        """See `Model`."""
        return np.asarray(expit(self.score[variant]))

    def rank(self, features: Features) -> NDArray[np.float32]:
        """See `Model`."""
        return np.broadcast_to(self.score.astype(np.float32), (len(features), len(self.score)))


@dataclass(frozen=True)
class LightGbm:
    """Gradient-boosted trees on the encoded fields and tags, stopped early on held-out units."""

    booster: lgb.Booster
    tags: NDArray[np.float32]  # (N, ·) tag columns as the trees see them

    @classmethod
    def fit(cls, examples: Examples, encoder: Encoder, *, seed: int = 0) -> Self:
        """Train up to 500 trees of 31 leaves at rate 0.05; a sixth of the units decides when to stop.

        A single unit can decide nothing: then there are 50 trees.
        """
        tags, categorical_tags = _tag_columns(examples.tags, encoder)
        fields = [i for i, f in enumerate(encoder.fields) if not f.numeric]
        categorical = [*fields, *(len(encoder.fields) + len(encoder.numeric_fields) + c for c in categorical_tags)]
        sets = []
        for part in filter(len, examples.split(1 / 6, seed)):
            data = lgb.Dataset(
                _columns(part.features, tags[part.variant]),
                part.reward,
                weight=part.weight,
                categorical_feature=categorical,
                free_raw_data=True,
            )
            sets.append(data)
        parameters: dict[str, Any] = {
            "objective": "binary",
            "num_leaves": 31,
            "learning_rate": 0.05,
            "min_data_in_leaf": 20,
            "verbose": -1,
            "seed": seed,
            "deterministic": True,
            "num_threads": threads(len(examples)),
            "force_row_wise": True,
        }
        if len(sets) == 1:
            return cls(lgb.train(parameters, sets[0], 50), tags)
        stop: list[Any] = [lgb.early_stopping(30, verbose=False)]
        return cls(lgb.train(parameters, sets[0], 500, valid_sets=sets[1:], callbacks=stop), tags)

    def predict(self, features: Features, variant: Ints) -> Floats:
        """See `Model`."""
        return np.asarray(self.booster.predict(_columns(features, self.tags[variant])), dtype=np.float64)

    def rank(self, features: Features) -> NDArray[np.float32]:
        """See `Model`."""
        return _rank_by_prediction(self, features, len(self.tags))


@dataclass(frozen=True)
class CrossedLogistic:
    """Logistic regression on all fields, tags and field × tag crosses, with one L2 penalty for all of them."""

    layout: Layout
    side: Floats  # (P,)
    variant: Floats  # (N,) logit of its tags
    cross: NDArray[np.float32]  # (C, T)
    intercept: float

    @classmethod
    def fit(cls, examples: Examples, encoder: Encoder, *, seed: int = 0) -> Self:
        """Fit by L-BFGS (scikit-learn)."""
        layout, examples = Layout.of(encoder, examples.tags), _with_both_outcomes(examples)
        side, tags = layout.crossed(examples.features), csr_array(layout.crossed_tags)[examples.variant]
        main = [side, layout.other(examples.features), examples.tags[examples.variant]]
        design = hstack([*main, _products(side, csr_array(tags))], format="csr")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fit that stops at max_iter is still a baseline
            model = LogisticRegression(C=1.0, max_iter=100).fit(design, examples.reward, sample_weight=examples.weight)
        p = len(layout.side_block)
        weights, m = model.coef_[0], p + examples.tags.shape[1]
        cross = weights[m:].reshape(side.shape[1], tags.shape[1]).astype(np.float32)
        return cls(layout, weights[:p], examples.tags @ weights[p:m], cross, float(model.intercept_[0]))

    def _side(self, features: Features) -> tuple[Floats, NDArray[np.float32]]:
        side, c = self.layout.crossed(features), self.layout.n_crossed
        base = side @ self.side[:c] + self.layout.other(features) @ self.side[c:]
        return base + self.intercept, side @ self.cross

    def predict(self, features: Features, variant: Ints) -> Floats:
        """See `Model`."""
        base, taste = self._side(features)
        score = base + self.variant[variant] + np.einsum("nt,nt->n", taste, self.layout.crossed_tags[variant])
        return np.asarray(expit(score))

    def rank(self, features: Features) -> NDArray[np.float32]:
        """See `Model`."""
        base, taste = self._side(features)
        return np.asarray(base[:, None] + self.variant + taste @ self.layout.crossed_tags.T, dtype=np.float32)


@dataclass(frozen=True)
class Ebm:
    """An explainable boosting machine (Nori et al. 2019, arXiv 1909.09223) with field × tag interactions alone."""

    model: Any
    tags: NDArray[np.float32]

    @classmethod
    def fit(cls, examples: Examples, encoder: Encoder, *, seed: int = 0) -> Self:
        """One bag, on the first MAX_EBM_PAIRS field × tag pairs."""
        from interpret.glassbox import ExplainableBoostingClassifier

        tags, _ = _tag_columns(examples.tags, encoder)
        examples = _with_both_outcomes(examples)
        n_fields, n_side = len(encoder.fields), len(encoder.fields) + len(encoder.numeric_fields)
        pairs = [(f, n_side + t) for t in range(tags.shape[1]) for f in range(n_fields)][:MAX_EBM_PAIRS]
        kinds = ["nominal" if not f.numeric else "continuous" for f in encoder.fields]
        kinds += ["continuous"] * len(encoder.numeric_fields) + ["nominal"] * tags.shape[1]
        model = ExplainableBoostingClassifier(
            feature_types=kinds, interactions=pairs, outer_bags=1, random_state=seed, n_jobs=1
        )
        table = _columns(examples.features, tags[examples.variant])
        model.fit(table, examples.reward.astype(int), sample_weight=examples.weight)
        return cls(model, tags)

    def predict(self, features: Features, variant: Ints) -> Floats:
        """See `Model`."""
        return np.asarray(self.model.predict_proba(_columns(features, self.tags[variant]))[:, 1])

    def rank(self, features: Features) -> NDArray[np.float32]:
        """See `Model`."""
        return _rank_by_prediction(self, features, len(self.tags))


def _with_both_outcomes(examples: Examples) -> Examples:
    """The examples that have a weight; if they all have one outcome, also the first with the other one, at 0.1 %."""
    used = examples.take(np.flatnonzero(examples.weight > 0))
    if 0 < used.reward.mean() < 1:
        return used
    twice = used.take(np.append(np.arange(len(used)), 0))
    twice.reward[-1] = 1 - twice.reward[-1]
    twice.weight[-1] *= 1e-3
    return twice


def _columns(features: Features, tags: NDArray[np.float32]) -> NDArray[np.float32]:
    """Buckets, numeric values and tags side by side: (n, F + V + ·)."""
    return np.concatenate([features.codes.astype(np.float32), features.values, tags], axis=1)


def _tag_columns(tags: csr_array, encoder: Encoder) -> tuple[NDArray[np.float32], list[int]]:
    """A column of codes per dimension with one value per variant, else a 0/1 column per value; and which are codes."""
    out: list[NDArray[np.float32]] = []
    categorical: list[int] = []
    start = 0
    for dimension in encoder.dimensions:
        block = tags[:, start : start + dimension.size]
        start += dimension.size
        if (np.diff(block.indptr) == 1).all():
            categorical.append(sum(b.shape[1] for b in out))
            out.append(block.indices.astype(np.float32)[:, None])
        else:
            common = np.argsort(-block.sum(axis=0), kind="stable")[:MAX_TAG_COLUMNS]
            out.append(block[:, np.sort(common)].toarray())
    return np.concatenate(out, axis=1), categorical


def _products(left: csr_array, right: csr_array) -> csr_array:
    """Row by row, every entry of `left`, equally many in each row, times every entry of `right`: (n, C·T)."""
    n, t = right.shape
    per_left = left.indptr[1] if n else 0
    counts = np.diff(right.indptr)
    repeat = np.repeat(np.arange(n), counts)
    columns = left.indices.reshape(n, per_left)[repeat].astype(np.int64) * t + right.indices[:, None]
    data = left.data.reshape(n, per_left)[repeat] * right.data[:, None]
    indptr = np.concatenate([[0], np.cumsum(counts * per_left)])
    return csr_array((data.ravel(), columns.ravel(), indptr), shape=(n, left.shape[1] * t))


def _rank_by_prediction(model: Model, features: Features, n_variants: int) -> NDArray[np.float32]:
    out = np.empty((len(features), n_variants), np.float32)
    every = np.arange(n_variants)
    for rows in chunks(len(features), max(1, RANK_PAIRS // n_variants)):
        users = np.repeat(np.arange(len(features))[rows], n_variants)
        p = model.predict(features.take(users), np.tile(every, len(users) // n_variants))
        out[rows] = p.reshape(-1, n_variants)
    return out
