"""The linear part of the network: main effects and cross tables, each shrunk by its own evidence.

logit = intercept + side(user, context) + variant(tags) + crossed(user, context)ᵀ W tags. Every block of coefficients (a
field, a dimension, a field × dimension table, a pair of fields or of dimensions, the variants' residuals) has a prior
variance of its own, estimated from the log (empirical Bayes: type-II maximum likelihood, MacKay 1992; Tipping 2001), so
that a block without evidence is exactly 0. numpy and scipy only; the deep part on top lives in networks.py.

Axis letters: n rows, N variants, C crossed side columns (buckets and numeric values), P side columns (the crossed ones,
then fields too large to cross, then cells of pairs of fields), M variant columns (tags, cells of pairs of dimensions, a
residual per variant), T crossed tags, D crossed dimensions.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_array, eye_array, hstack
from scipy.special import expit, logit
from threadpoolctl import threadpool_limits

from kaleidoscope.encoding import Encoder, Features
from models.batch import CHUNK_ROWS, Examples, chunks

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MAX_CROSSED = 1_000  # buckets of a field, or values of a dimension, that may take part in crosses
MAX_CROSS_CELLS = 4_000_000  # C × T; above it fewer buckets may take part
MAX_PAIR_CELLS = 20_000  # cells of a pair of fields or of dimensions
EVIDENCE_NATS = 2.0  # marginal log likelihood that a table of pairs has to gain to be kept
MAIN_FLOOR = 1e-3  # variance of main effects: two that share one must not talk each other down to nothing
START_VARIANCE = 0.1  # of main effects, before there is evidence
VARIANCES = np.concatenate([[0.0], np.logspace(-5, 1, 61)])
MIN_ROUNDS, MAX_ROUNDS = 3, 6
ITERATIONS = 12  # of L-BFGS in a round
NESTED_ROWS = 100_000  # looked at to see which fields determine one another
CACHED_ROWS = 3_000_000  # up to here the encoded log is kept as sparse matrices
REPEATING = 0.8  # units per row below which exposures of a unit are treated as dependent
CLUSTER_ROWS = 200_000  # looked at to see how dependent
CHUNK_CELLS = 8_000_000  # rows × tags looked at at once
WORKERS = 2


@dataclass(frozen=True)
class Layout:
    """Which columns exist for an encoder and a set of variants, and to which block each belongs."""

    encoder: Encoder
    variant_design: csr_array  # (N, M)
    variant_block: Ints  # (M,)
    crossed_tags: NDArray[np.float32]  # (N, T)
    tag_dimension: Ints  # (T,) 0..D-1
    pairs: tuple[tuple[int, int], ...] = ()  # positions in encoder.fields

    @classmethod
    def of(cls, encoder: Encoder, tags: csr_array) -> Layout:
        """The columns for variants with these multi-hot `tags` (N, columns of all dimensions)."""
        sizes = [d.size for d in encoder.dimensions]
        start = np.cumsum([0, *sizes])
        of_dimension = [tags[:, start[d] : start[d + 1]] for d in range(len(sizes))]
        designs, blocks = list(of_dimension), [np.full(size, d) for d, size in enumerate(sizes)]
        for a, b in combinations(range(len(sizes)), 2):
            if sizes[a] * sizes[b] <= MAX_PAIR_CELLS:
                left = of_dimension[a][:, np.repeat(np.arange(sizes[a]), sizes[b])]
                designs.append(left.multiply(of_dimension[b][:, np.tile(np.arange(sizes[b]), sizes[a])]))
                blocks.append(np.full(sizes[a] * sizes[b], len(blocks)))
        designs.append(eye_array(tags.shape[0], format="csr", dtype=np.float32))
        blocks.append(np.full(tags.shape[0], len(blocks)))
        crossed = _crossed_dimensions(encoder)
        dense = [of_dimension[d].toarray() for d in crossed]
        return cls(
            encoder,
            csr_array(hstack(designs, format="csr", dtype=np.float32)),
            np.concatenate(blocks),
            np.concatenate([np.zeros((tags.shape[0], 0)), *dense], axis=1).astype(np.float32),
            np.repeat(np.arange(len(crossed)), [sizes[d] for d in crossed]),
        )

    @cached_property
    def crossed_fields(self) -> list[int]:
        """Fields that take part in crosses with tags."""
        largest = _largest_crossed(self.encoder)
        return [i for i, f in enumerate(self.encoder.fields) if f.role != "group" and f.size <= largest]

    @cached_property
    def other_fields(self) -> list[int]:
        """Fields with a main effect only."""
        return [i for i in range(len(self.encoder.fields)) if i not in self.crossed_fields]

    @cached_property
    def tag_columns(self) -> Ints:
        """Columns of `Encoder.tags` that take part in crosses: (T,)."""
        start = np.cumsum([0, *(d.size for d in self.encoder.dimensions)])
        columns = [np.arange(start[d], start[d + 1]) for d in _crossed_dimensions(self.encoder)]
        return np.concatenate([np.zeros(0, np.int64), *columns])

    @cached_property
    def crossed_sizes(self) -> Ints:
        """Columns of each crossed field and numeric value."""
        sizes = [self.encoder.fields[i].size for i in self.crossed_fields]
        return np.array(sizes + [1] * len(self.encoder.numeric_fields), dtype=np.int64)

    @cached_property
    def other_sizes(self) -> Ints:
        """Columns of each field that is not crossed, and of each pair of fields."""
        fields = self.encoder.fields
        pairs = [fields[a].size * fields[b].size for a, b in self.pairs]
        return np.array([fields[i].size for i in self.other_fields] + pairs, dtype=np.int64)

    @cached_property
    def side_block(self) -> Ints:
        """Block of each side column: (P,)."""
        sizes = np.concatenate([self.crossed_sizes, self.other_sizes])
        return np.repeat(np.arange(len(sizes)), sizes)

    @property
    def n_crossed(self) -> int:
        """C, the crossed side columns: the first ones."""
        return int(self.crossed_sizes.sum())

    def crossed(self, features: Features) -> csr_array:
        """Crossed side design (n, C)."""
        start = np.cumsum([0, *self.crossed_sizes])
        n_fields = len(self.crossed_fields)
        codes = features.codes[:, self.crossed_fields] + start[:n_fields]
        columns = np.concatenate([codes, np.broadcast_to(start[n_fields:-1], features.values.shape)], axis=1)
        data = np.concatenate([np.ones(codes.shape, np.float32), features.values], axis=1)
        return _sparse(columns, data, int(start[-1]))

    def other(self, features: Features) -> csr_array:
        """The rest of the side design (n, P - C)."""
        start = np.cumsum([0, *self.other_sizes])
        columns = [features.codes[:, i].astype(np.int64) for i in self.other_fields]
        columns += [self.pair_codes(features, pair) for pair in self.pairs]
        where = np.empty((len(features), len(columns)), dtype=np.int32)
        for i, column in enumerate(columns):
            where[:, i] = column + start[i]
        return _sparse(where, np.ones(where.shape, np.float32), int(start[-1]))

    def pair_codes(self, features: Features, pair: tuple[int, int]) -> Ints:
        """Cell of a pair of fields each row is in: (n,)."""
        a, b = pair
        return features.codes[:, a].astype(np.int64) * self.encoder.fields[b].size + features.codes[:, b]

    def competes(self, features: Features) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which crossed side blocks, and which dimensions, determine one another: symmetric matrices.

        A city determines its region, a material its tags, a number its bin: their tables want the same effect.
        """
        n_fields = len(self.crossed_fields)
        side = np.eye(len(self.crossed_sizes), dtype=bool)
        looked_at = features.codes[:: max(1, len(features) // NESTED_ROWS)].astype(np.int64)
        side[:n_fields, :n_fields] = _determine([looked_at[:, i] for i in self.crossed_fields])
        for value, field in enumerate(self.encoder.numeric_fields, start=n_fields):
            if field in self.crossed_fields:
                bucket = self.crossed_fields.index(field)
                side[value, bucket] = side[bucket, value] = True
        dimensions = range(int(self.tag_dimension.max(initial=-1)) + 1)
        tags = [np.packbits(self.crossed_tags[:, self.tag_dimension == d] > 0, axis=1) for d in dimensions]
        codes = [np.unique(t, axis=0, return_inverse=True)[1].ravel().astype(np.int64) for t in tags]
        return side, _determine(codes)

    @property
    def chunk_rows(self) -> int:
        """Rows whose tags are laid out at once."""
        return int(np.clip(CHUNK_CELLS // max(1, self.crossed_tags.shape[1]), 1, CHUNK_ROWS))


def _sparse(columns: NDArray[np.generic], data: NDArray[np.float32], width: int) -> csr_array:
    n, per_row = columns.shape
    indptr = np.arange(n + 1, dtype=np.int32) * per_row
    return csr_array((data.astype(np.float32).ravel(), columns.astype(np.int32).ravel(), indptr), shape=(n, width))


def _largest_crossed(encoder: Encoder) -> int:
    """The size up to which fields and dimensions are crossed: such that all crosses together stay affordable."""
    sides = np.array([f.size for f in encoder.fields if f.role != "group"], dtype=np.int64)
    tags = np.array([d.size for d in encoder.dimensions], dtype=np.int64)
    largest = MAX_CROSSED
    while sides[sides <= largest].sum() * tags[tags <= largest].sum() > MAX_CROSS_CELLS:
        largest = largest * 4 // 5
    return largest


def _crossed_dimensions(encoder: Encoder) -> list[int]:
    """Dimensions that take part in crosses with fields."""
    largest = _largest_crossed(encoder)
    return [d for d, dimension in enumerate(encoder.dimensions) if dimension.size <= largest]


def _determine(codes: list[Ints]) -> NDArray[np.bool_]:
    """Which pairs of codings are such that one of them fixes the other."""
    out = np.eye(len(codes), dtype=bool)
    distinct = [len(np.unique(c)) for c in codes]
    for a, b in combinations(range(len(codes)), 2):
        joint = len(np.unique(codes[a] * (codes[b].max(initial=0) + 1) + codes[b]))
        out[a, b] = out[b, a] = joint == max(distinct[a], distinct[b])
    return out


@dataclass(frozen=True)
class Tables:
    """Fitted coefficients, and the prior variance that each block earned (0: no evidence for it)."""

    layout: Layout
    intercept: float
    side: Floats  # (P,)
    variant: Floats  # (M,)
    cross: NDArray[np.float32]  # (C, T)
    side_variance: Floats  # per side block
    variant_variance: Floats  # per variant block
    cross_variance: Floats  # (crossed side blocks, D)
    # How unsure the fit is of each coefficient: standard deviation of the posterior, the others held (the diagonal of a
    # Laplace approximation), widened by the design effect. None: not known, as in tables read from disk.
    variant_sd: Floats | None = None  # (M,)
    cross_sd: NDArray[np.float32] | None = None  # (C, T)

    def side_logit(self, features: Features) -> Floats:
        """The part of the logit that is the same for every variant: (n,)."""
        c = self.layout.n_crossed
        side = self.layout.crossed(features) @ self.side[:c] + self.layout.other(features) @ self.side[c:]
        return np.asarray(self.intercept + side)

    @cached_property
    def variant_logit(self) -> Floats:
        """The part of the logit that is the same for every user: (N,)."""
        return np.asarray(self.layout.variant_design @ self.variant)

    def preferences(self, features: Features) -> NDArray[np.float32]:
        """What each user adds to the logit of each crossed tag: (n, T)."""
        return np.asarray(self.layout.crossed(features) @ self.cross)

    def rank(self, features: Features, variants: Ints | None = None) -> NDArray[np.float32]:
        """Click logits of every variant (or of these) for every user: (n, N)."""
        tags, of_variant = self.layout.crossed_tags, self.variant_logit
        if variants is not None:
            tags, of_variant = tags[variants], of_variant[variants]
        scores = (self.side_logit(features)[:, None] + of_variant).astype(np.float32)
        if self.cross.any():
            scores += self.preferences(features) @ tags.T
        return scores

    def for_variants(self, tags: csr_array, known: Ints) -> Tables:
        """The same coefficients for another set of variants: `known[i]` is the variant that row i of `tags` was in
        training, or -1 for one never shown, which has no residual."""
        layout = replace(Layout.of(self.layout.encoder, tags), pairs=self.layout.pairs)
        shared = len(self.variant) - self.layout.crossed_tags.shape[0]

        def moved(values: Floats, unknown: float) -> Floats:
            return np.concatenate([values[:shared], np.where(known >= 0, values[shared:][known], unknown)])

        sd = None if self.variant_sd is None else moved(self.variant_sd, float(np.sqrt(self.variant_variance[-1])))
        return replace(self, layout=layout, variant=moved(self.variant, 0.0), variant_sd=sd)

    def logits(self, features: Features, variant: Ints) -> Floats:
        """Click logits of one variant per row: (n,)."""
        of_variant, out = self.variant_logit, np.empty(len(features))
        for rows in chunks(len(features), self.layout.chunk_rows):
            part = features.take(rows)
            taste = np.einsum("nt,nt->n", self.preferences(part), self.layout.crossed_tags[variant[rows]])
            out[rows] = self.side_logit(part) + of_variant[variant[rows]] + taste
        return out


def fit_tables(
    examples: Examples,
    encoder: Encoder,
    *,
    variants: bool = True,
    crosses: bool = True,
    start: Tables | None = None,
    offset: Floats | None = None,
) -> Tables:
    """Fit the linear part: L-BFGS for the coefficients, in turn with empirical Bayes for the variances of their blocks.

    Main effects come first. Then, in each round, one pass over the log gives every coefficient its one-step estimate
    and its error, from which the variance of its block follows; of the tables that want the same effect the one with
    the most evidence enters first. `variants` and `crosses` switch off everything about tags, and everything but main
    effects. With `start`, tables fitted to a part of these examples, one round brings them up to all, beside an
    `offset` (n,) of the logits that something else contributes.
    """
    with threadpool_limits(1, "blas"):  # L-BFGS works on vectors of thousands: more threads wait for each other
        if start is None:
            return _fit_from_scratch(examples, encoder, variants=variants, crosses=crosses)
        fit = _Fit(start.layout, examples, variants=variants, crosses=crosses, offset=offset)
        state = fit.open(fit.state(start))
        state, curvature, _ = fit.weigh(fit.solve(state, fit.curvature(state)[1]))
        return fit.tables(fit.solve(state, curvature), curvature)


def _fit_from_scratch(examples: Examples, encoder: Encoder, *, variants: bool, crosses: bool) -> Tables:
    layout = Layout.of(encoder, examples.tags)
    rate = float(np.clip(np.average(examples.reward, weights=examples.weight), 1e-6, 1 - 1e-6))
    fit = _Fit(layout, examples, variants=variants, crosses=crosses)
    state = fit.open(_State(float(logit(rate)), np.zeros(len(fit.block)), np.zeros(fit.n_blocks)))
    state = fit.solve(state, fit.curvature(state)[1])
    if crosses and (pairs := _screened_pairs(layout, examples, fit, state)):
        wider = _Fit(replace(layout, pairs=pairs), examples, variants=variants, crosses=crosses)
        state, fit = wider.adopt(fit, state), wider
    for round_ in range(1, MAX_ROUNDS + 1):
        state, curvature, grew = fit.weigh(state)
        state = fit.solve(state, curvature)
        if round_ >= MIN_ROUNDS and not grew:
            break
    return fit.tables(state, curvature)


@dataclass(frozen=True)
class _State:
    intercept: float
    theta: Floats  # all coefficients: side, variant, cross
    variance: Floats  # per block
    design_effect: Floats | None = None  # per block; None: 1 everywhere


class _Fit:
    """The log as the optimiser sees it: sums over chunks of rows, blocks numbered side, variant, cross."""

    def __init__(
        self, layout: Layout, examples: Examples, *, variants: bool, crosses: bool, offset: Floats | None = None
    ) -> None:
        self.layout, self.examples = layout, examples
        self.offset = np.zeros(len(examples)) if offset is None else offset
        n_side = len(layout.crossed_sizes) + len(layout.other_sizes)
        n_variant = int(layout.variant_block.max()) + 1
        dimensions = int(layout.tag_dimension.max(initial=-1)) + 1
        crossed_block = layout.side_block[: layout.n_crossed]
        table = crossed_block[:, None] * dimensions + layout.tag_dimension
        self.first_variant, self.first_cross = n_side, n_side + n_variant
        self.n_blocks = self.first_cross + len(layout.crossed_sizes) * dimensions
        self.dimensions = dimensions
        blocks = [layout.side_block, n_side + layout.variant_block, self.first_cross + table.ravel()]
        self.block = np.concatenate(blocks)
        self.shape = (layout.n_crossed, len(layout.tag_dimension))
        index = np.arange(self.n_blocks)
        n_dimension_blocks = len(layout.encoder.dimensions)
        self.main = (index < n_side - len(layout.pairs)) | (
            (index >= n_side) & (index < n_side + n_dimension_blocks) | (index == self.first_cross - 1)
        )
        self.allowed = np.ones(self.n_blocks, dtype=bool)
        if not variants:
            self.allowed[self.first_variant :] = False
        if not crosses:
            self.allowed &= self.main
        self._tags = csr_array(layout.crossed_tags)
        self._squared = layout.variant_design.copy()
        self._squared.data **= 2
        self._chunks = list(chunks(len(examples), layout.chunk_rows))
        self._kept = [self._design(rows) for rows in self._chunks] if len(examples) <= CACHED_ROWS else None

    def _design(self, rows: slice) -> tuple[csr_array, csr_array]:
        part = self.examples.features.take(rows)
        return self.layout.crossed(part), self.layout.other(part)

    def _split(self, theta: Floats) -> tuple[Floats, Floats, NDArray[np.float32]]:
        p, m = len(self.layout.side_block), len(self.layout.variant_block)
        return theta[:p], theta[p : p + m], theta[p + m :].reshape(self.shape).astype(np.float32)

    def _pass(self, state: _State, *, curvature: bool) -> tuple[float, float, Floats, Floats]:
        """Loss, its gradient by the intercept, and minus gradient and curvature by theta, over the whole log."""
        data, layout, c = self.examples, self.layout, self.layout.n_crossed
        n_variants = layout.crossed_tags.shape[0]
        side, variant, cross = self._split(state.theta)
        of_variant = layout.variant_design @ variant
        live = self._live_tags(state, every=curvature)
        tag_columns, cross = np.ascontiguousarray(layout.crossed_tags[:, live]), np.ascontiguousarray(cross[:, live])

        def chunk(i: int) -> tuple[float, list[Floats], list[Floats]]:
            rows = self._chunks[i]
            near, far = self._kept[i] if self._kept is not None else self._design(rows)
            v, y, w = data.variant[rows], data.reward[rows], data.weight[rows]
            eta = state.intercept + self.offset[rows] + near @ side[:c] + far @ side[c:] + of_variant[v]
            eta = eta.astype(np.float32)
            tags = tag_columns[v] if cross.size else None
            if tags is not None:
                eta += np.einsum("nt,nt->n", near @ cross, tags)
            p = expit(eta)
            loss = float(w @ (np.logaddexp(np.float32(0), eta) - y * eta))
            residual = (w * (y - p)).astype(np.float32)
            first: list[Floats] = [near.T @ residual, far.T @ residual, _sums(v, residual, n_variants)]
            first += [near.T @ (residual[:, None] * tags)] if tags is not None else []
            second: list[Floats] = []
            if curvature:
                h = (w * p * (1 - p)).astype(np.float32)
                near2 = near.power(2)
                second = [near2.T @ h, far.T @ h, _sums(v, h, n_variants)]
                second += [near2.T @ (h[:, None] * tags**2)] if tags is not None else []
            return loss, first, second

        loss = 0.0
        first: list[Floats] = []
        second: list[Floats] = []
        with ThreadPoolExecutor(WORKERS) as pool:
            every = range(len(self._chunks))
            for part_loss, part_first, part_second in (pool.map if len(every) > 1 else map)(chunk, every):
                loss += part_loss
                first = [a + b for a, b in zip(first, part_first, strict=True)] if first else part_first
                second = [a + b for a, b in zip(second, part_second, strict=True)] if second else part_second
        gradient = self._gather(first, layout.variant_design, live)
        return loss, float(first[2].sum()), gradient, self._gather(second, self._squared, live)

    def _live_tags(self, state: _State, *, every: bool) -> Ints:
        """Tag columns that some table uses, or `every` one that may be used."""
        used: NDArray[np.bool_] = self.allowed if every else np.asarray(state.variance > 0)
        tables = used[self.first_cross :].reshape(len(self.layout.crossed_sizes), self.dimensions)
        live: NDArray[np.bool_] = np.asarray(tables.any(axis=0))
        return np.flatnonzero(live[self.layout.tag_dimension])

    def _gather(self, sums: list[Floats], design: csr_array, live: Ints) -> Floats:
        if not sums:
            return np.zeros(0)
        cross = np.zeros(self.shape)
        if len(sums) == 4:
            cross[:, live] = sums[3]
        return np.concatenate([sums[0], sums[1], design.T @ sums[2], cross.ravel()]).astype(np.float64)

    def open(self, state: _State) -> _State:
        """The state with every main effect free to be fitted: what they would hold is evidence for no table."""
        shut = self.main & self.allowed & (state.variance == 0)
        return replace(state, variance=np.where(shut, START_VARIANCE, state.variance))

    def curvature(self, state: _State) -> tuple[Floats, Floats]:
        """Minus gradient and curvature (diagonal of the Hessian) of the log loss by theta."""
        return self._pass(state, curvature=True)[2:]

    def solve(self, state: _State, curvature: Floats, iterations: int = ITERATIONS) -> _State:
        """Coefficients of highest posterior density under these variances, by L-BFGS scaled with the curvature."""
        on = np.flatnonzero(state.variance[self.block] > 0)
        precision = 1.0 / state.variance[self.block[on]]
        scale = 1.0 / np.sqrt(curvature[on] + precision)
        residuals = self.layout.crossed_tags.shape[0]  # their curvatures add up to the intercept's
        last = len(self.layout.side_block) + len(self.layout.variant_block)
        scale0 = 1.0 / np.sqrt(max(float(curvature[last - residuals : last].sum()), 1.0))

        def at(x: Floats) -> _State:
            theta = np.zeros(len(self.block))
            theta[on] = x[1:] * scale
            return replace(state, intercept=state.intercept + x[0] * scale0, theta=theta)

        def objective(x: Floats) -> tuple[float, Floats]:
            trial = at(x)
            loss, total, gradient, _ = self._pass(trial, curvature=False)
            theta = trial.theta[on]
            slope = np.concatenate([[-total * scale0], (precision * theta - gradient[on]) * scale])
            return loss + 0.5 * float(precision @ theta**2), slope

        start = np.concatenate([[0.0], state.theta[on] / scale])
        found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": iterations, "maxcor": 20})
        return at(found.x)

    def weigh(self, state: _State) -> tuple[_State, Floats, bool]:
        """Give every block the variance its one-step estimates speak for, and let tables with evidence in.

        Returns the state, the curvature and whether a table entered.
        """
        gradient, curvature = self.curvature(state)
        design_effect = self._design_effect(state)
        error = 1.0 / np.maximum(curvature, 1e-9)
        one_step = state.theta + gradient * error
        error *= design_effect[self.block]
        variance, gain = block_variances(one_step, error, self.block, self.n_blocks)
        variance[self.main] = np.maximum(variance[self.main], MAIN_FLOOR)
        variance[~self.allowed | ~(self.main | (gain > EVIDENCE_NATS))] = 0.0
        fresh = np.flatnonzero((variance > 0) & (state.variance == 0) & (np.arange(self.n_blocks) >= self.first_cross))
        entered: list[tuple[int, int]] = []
        pairs = slice(self.first_variant + len(self.layout.encoder.dimensions), self.first_cross - 1)
        shut = (variance[pairs] > 0) & (state.variance[pairs] == 0)
        variance[pairs][shut & (gain[pairs] < gain[pairs].max(where=shut, initial=0.0))] = (
            0.0  # they share main effects
        )
        for block in fresh[np.argsort(-gain[fresh].round(3), kind="stable")]:  # twins tie: the first one enters
            row, column = divmod(int(block) - self.first_cross, self.dimensions)
            if any(self._rivals[0][row, r] and self._rivals[1][column, c] for r, c in entered):
                variance[block] = 0.0
            else:
                entered.append((row, column))
        of_coefficient = variance[self.block]
        shrunk = one_step * of_coefficient / (of_coefficient + error)
        theta = np.where(state.variance[self.block] > 0, state.theta, shrunk)
        theta[of_coefficient == 0] = 0.0
        weighed = _State(state.intercept, theta, variance / design_effect, design_effect)
        return weighed, curvature, bool(entered) or bool(shut.any())

    def _design_effect(self, state: _State) -> Floats:
        """Per block, the variance of its gradients relative to what it were if a unit's exposures were independent.

        A user seen twenty times is not twenty users: without this, every field that tells users apart looks like
        evidence.
        """
        effect, data = np.ones(self.n_blocks), self.examples
        units, unit = np.unique(data.unit, return_inverse=True)
        if len(units) > REPEATING * len(unit):
            return effect
        rows = np.flatnonzero(unit < max(1, int(len(units) * CLUSTER_ROWS / len(unit))))
        data, unit = data.take(rows), unit[rows].astype(np.int64)
        p = expit(self.tables(state).logits(data.features, data.variant) + self.offset[rows])
        residual = data.weight * (data.reward - p)
        fields, n_fields = self.layout.encoder.fields, len(self.layout.crossed_fields)
        for i, field in enumerate(self.layout.crossed_fields):
            cell = unit * fields[field].size + data.features.codes[:, field]
            self._cluster(effect, i, cell, residual, data.variant)
        for j in range(len(self.layout.encoder.numeric_fields)):
            self._cluster(effect, n_fields + j, unit, residual * data.features.values[:, j], data.variant)
        first = len(self.layout.crossed_sizes)
        for k, field in enumerate(self.layout.other_fields):
            effect[first + k] = _inflation(unit * fields[field].size + data.features.codes[:, field], residual)
        first += len(self.layout.other_fields)
        for k, pair in enumerate(self.layout.pairs):
            cells = fields[pair[0]].size * fields[pair[1]].size
            effect[first + k] = _inflation(unit * cells + self.layout.pair_codes(data.features, pair), residual)
        return effect

    def _cluster(self, effect: Floats, block: int, cell: Ints, residual: Floats, variant: Ints) -> None:
        """Set the design effects of a side block and of its tables."""
        effect[block] = _inflation(cell, residual)
        groups, group = np.unique(cell, return_inverse=True)
        shape = (len(groups), self._tags.shape[0])
        together = csr_array((residual, (group, variant)), shape=shape) @ self._tags
        alone = np.bincount(variant, residual**2, shape[1]) @ self.layout.crossed_tags**2
        of_dimension = np.bincount(self.layout.tag_dimension[together.indices], together.data**2, self.dimensions)
        alone = np.maximum(np.bincount(self.layout.tag_dimension, alone, self.dimensions), 1e-12)
        start = self.first_cross + block * self.dimensions
        effect[start : start + self.dimensions] = np.maximum(of_dimension / alone, 1.0)

    @cached_property
    def _rivals(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        return self.layout.competes(self.examples.features)

    def adopt(self, narrower: _Fit, state: _State) -> _State:
        """The state of a fit without this one's pairs of fields."""
        theta, variance = np.zeros(len(self.block)), np.zeros(self.n_blocks)
        columns, blocks = len(narrower.layout.side_block), narrower.first_variant
        theta[:columns], variance[:blocks] = state.theta[:columns], state.variance[:blocks]
        theta[len(self.layout.side_block) :] = state.theta[columns:]
        variance[self.first_variant :] = state.variance[blocks:]
        return _State(state.intercept, theta, variance)

    def state(self, tables: Tables) -> _State:
        """The inverse of `tables`."""
        theta = np.concatenate([tables.side, tables.variant, tables.cross.ravel().astype(np.float64)])
        variance = [tables.side_variance, tables.variant_variance, tables.cross_variance.ravel()]
        return _State(tables.intercept, theta, np.concatenate(variance))

    def tables(self, state: _State, curvature: Floats | None = None) -> Tables:
        """The fitted state as coefficients; with the curvature, also how sure they are."""
        side, variant, cross = self._split(state.theta)
        _, variant_sd, cross_sd = (None,) * 3 if curvature is None else self._split(self._sd(state, curvature))
        return Tables(
            self.layout,
            state.intercept,
            side,
            variant,
            cross,
            state.variance[: self.first_variant],
            state.variance[self.first_variant : self.first_cross],
            state.variance[self.first_cross :].reshape(len(self.layout.crossed_sizes), self.dimensions),
            variant_sd,
            cross_sd,
        )

    def _sd(self, state: _State, curvature: Floats) -> Floats:
        """Posterior standard deviation of each coefficient, given the others; 0 where the block has no evidence."""
        widened = np.ones(self.n_blocks) if state.design_effect is None else state.design_effect
        prior = state.variance[self.block]
        return np.asarray(np.sqrt(widened[self.block] * prior / (curvature * prior + 1.0)))


def _sums(code: Ints, weight: NDArray[np.floating], size: int) -> Floats:
    return np.bincount(code, weight, size).astype(np.float64, copy=False)


def _inflation(cell: Ints, residual: Floats) -> float:
    """Variance of the sums of residuals over cells, relative to independent residuals; at least 1."""
    together = np.bincount(np.unique(cell, return_inverse=True)[1], residual)
    return max(1.0, float((together**2).sum() / max((residual**2).sum(), 1e-12)))


def block_variances(estimate: Floats, error: Floats, block: Ints, n_blocks: int) -> tuple[Floats, Floats]:
    """Per block, the variance t on a grid that maximises the likelihood of estimate ~ N(0, t + error), and the log
    likelihood gained over t = 0. `estimate`, `error` (a variance) and `block` are per coefficient."""
    gain = np.empty((n_blocks, len(VARIANCES)))
    square = estimate**2
    for i, variance in enumerate(VARIANCES):
        total = variance + error
        gain[:, i] = np.bincount(block, -0.5 * (np.log(total / error) + square / total - square / error), n_blocks)
    best = gain.argmax(axis=1)
    return VARIANCES[best], gain[np.arange(n_blocks), best]


def _screened_pairs(layout: Layout, examples: Examples, fit: _Fit, state: _State) -> tuple[tuple[int, int], ...]:
    """Pairs of fields whose table has evidence beyond the main effects."""
    fields = layout.encoder.fields
    pairs = [
        (a, b)
        for a, b in combinations(range(len(fields)), 2)
        if "group" not in (fields[a].role, fields[b].role) and fields[a].size * fields[b].size <= MAX_PAIR_CELLS
    ]
    eta = fit.tables(state).logits(examples.features, examples.variant)
    p = expit(eta)
    residual, h = examples.weight * (examples.reward - p), examples.weight * p * (1 - p)
    kept = []
    for pair in pairs:
        cell = layout.pair_codes(examples.features, pair)
        size = fields[pair[0]].size * fields[pair[1]].size
        error = 1.0 / np.maximum(np.bincount(cell, h, size), 1e-9)
        estimate = np.bincount(cell, residual, size) * error
        error *= _inflation(examples.unit * size + cell, residual)
        if block_variances(estimate, error, np.zeros(size, np.int64), 1)[1][0] > EVIDENCE_NATS:
            kept.append(pair)
    return tuple(kept)
