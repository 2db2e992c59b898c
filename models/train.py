"""Fitting the CTR network: the tables first, then the deep part on top, as far as held-out units ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.sparse import csr_array
from scipy.special import expit, logit
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from kaleidoscope.encoding import Encoder, Features
from kaleidoscope.progress import Progress, Silent
from models.batch import Examples, chunks, threads
from models.networks import DeepConfig, DeepPart
from models.tables import Layout, Tables, fit_tables

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SCORE_CELLS = 8_000_000  # users × variants × hidden width scored at once


@dataclass(frozen=True)
class TrainConfig:
    """How the network is trained. The defaults hold from ten thousand rows to many millions."""

    held_out: float = 0.15  # share of the units that decide when to stop and how much of the deep part to keep
    heads: int = 4
    width: int = 32
    rank: int = 16
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    batch_rows: int = 8_192  # at most; small logs take smaller ones
    batches: int = 40  # about so many in an epoch of a small log
    epochs: int = 15  # at most
    patience: int = 2  # epochs without a better held-out loss; twice as many before the first good one


@dataclass(frozen=True)
class CtrModel:
    """A fitted network: logit = tables + gate × deep part."""

    tables: Tables
    deep: DeepPart
    gate: float  # 0: the deep part did not help on held-out units and is left out

    @classmethod
    def fit(cls, examples: Examples, encoder: Encoder, *, seed: int = 0) -> CtrModel:
        """`fit_network` as the contract of models has it (baselines.Model)."""
        return fit_network(examples, encoder, seed=seed)

    @property
    def encoder(self) -> Encoder:
        """The encoder the network was trained with."""
        return self.tables.layout.encoder

    def predict(self, features: Features, variant: Ints) -> Floats:
        """Click probability of one variant per row: (n,)."""
        return np.asarray(expit(self.logits(features, variant)))

    def logits(self, features: Features, variant: Ints) -> Floats:
        """Click logit of one variant per row: (n,)."""
        out = self.tables.logits(features, variant)
        if self.gate:
            out += self.gate * deep_logits(self.deep, self.tables.layout, features, variant)
        return out

    def rank(self, features: Features, variants: Ints | None = None) -> NDArray[np.float32]:
        """Click logits of every variant (or of these) for every user: (n, N)."""
        scores, layout = self.tables.rank(features, variants), self.tables.layout
        if self.gate:
            tags = layout.crossed_tags if variants is None else layout.crossed_tags[variants]
            with torch.no_grad():
                shown = self.deep.variant_side(torch.from_numpy(tags))
                for rows in chunks(len(features), max(1, SCORE_CELLS // (len(tags) * self.deep.config.width))):
                    users = self.deep.user_side(*_columns(layout, features.take(rows)))
                    scores[rows] += self.gate * self.deep.score(users, shown).numpy()
        return scores

    def for_variants(self, tags: csr_array, known: Ints) -> CtrModel:
        """The same network for another set of variants; see `Tables.for_variants`."""
        return CtrModel(self.tables.for_variants(tags, known), self.deep, self.gate)


def fit_network(
    examples: Examples,
    encoder: Encoder,
    *,
    config: TrainConfig | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> CtrModel:
    """Fit the whole network; the same examples and seed give the same network."""
    config, progress = config or TrainConfig(), progress or Silent()
    train, held = examples.split(config.held_out, seed)
    tables = fit_tables(train, encoder)
    with threads_for(len(train)):
        deep, gate = fit_deep(train, held, tables, config=config, seed=seed, progress=progress)
    offset = gate * deep_logits(deep, tables.layout, examples.features, examples.variant) if gate else None
    model = CtrModel(fit_tables(examples, encoder, start=tables, offset=offset), deep, gate)
    rate = float(np.average(examples.reward, weights=examples.weight))
    shift = _shift(model.logits(examples.features, examples.variant), examples.weight, rate)
    return replace(model, tables=replace(model.tables, intercept=model.tables.intercept + shift))


@contextmanager
def threads_for(rows: int) -> Iterator[None]:
    """Run torch and BLAS with as many threads as work over so many rows is worth."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads(rows))
    try:
        with threadpool_limits(threads(rows), "blas"):
            yield
    finally:
        torch.set_num_threads(before)


def fit_deep(
    train: Examples, held: Examples, tables: Tables, *, config: TrainConfig, seed: int, progress: Progress
) -> tuple[DeepPart, float]:
    """Train the deep part on what the tables leave over.

    Adam with decoupled weight decay on minibatches; after each epoch the gate is set to what held-out units like best.
    Returns the best epoch's weights and gate; the gate is 0 unless the held-out gain is clearly above its errors.
    """
    layout, generator = tables.layout, torch.Generator().manual_seed(seed)
    deep = DeepPart(DeepConfig(layout.n_crossed, layout.crossed_tags.shape[1], config.heads, config.width, config.rank))
    deep.initialise(generator)
    if not layout.n_crossed or not len(held) or layout.crossed_tags.shape[1] == 0:
        return deep, 0.0
    tags = torch.from_numpy(layout.crossed_tags)
    offset = torch.from_numpy(tables.logits(train.features, train.variant).astype(np.float32))
    reward, weight = torch.from_numpy(train.reward), torch.from_numpy(train.weight.astype(np.float32))
    variant = torch.from_numpy(train.variant)
    columns, data = _columns(layout, train.features)
    mean_weight = float(weight.mean())
    batch_rows = int(np.clip(len(train) // config.batches, 128, config.batch_rows))
    optimiser = torch.optim.AdamW(deep.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    base = tables.logits(held.features, held.variant)
    best_gain, best_gate, best_state, waited = 0.0, 0.0, _copy(deep), 0
    for epoch in range(config.epochs):
        order = torch.randperm(len(train), generator=generator)
        for start in range(0, len(train), batch_rows):
            rows = order[start : start + batch_rows]
            users = deep.user_side(columns[rows], data[rows])
            shown = deep.variant_side(tags[variant[rows]])
            logits = offset[rows] + deep.pairs(users, shown)  # (M, B)
            loss = functional.binary_cross_entropy_with_logits(
                logits, reward[rows].expand_as(logits), weight=(weight[rows] / mean_weight).expand_as(logits)
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            progress.advance((epoch + min(start + batch_rows, len(train)) / len(train)) / config.epochs)
        gain, gate, sure = _best_gate(held, base, deep_logits(deep, layout, held.features, held.variant))
        if gain > best_gain:
            best_gain, best_gate, waited = gain, gate if sure else 0.0, 0
            best_state = _copy(deep)
        elif (waited := waited + 1) >= config.patience * (1 if best_gain > 0 else 2):
            break
    deep.load_state_dict(best_state)
    return deep, best_gate


GATES = (0.25, 0.5, 0.75, 1.0)
GATE_ERRORS = 2.0  # standard errors: the best of several epochs and gates is looked for, and often lucky by one


def _best_gate(held: Examples, base: Floats, deep: Floats) -> tuple[float, float, bool]:
    """The held-out log-loss gain (nats) of the best gate, that gate, and whether the gain is beyond chance, by unit."""
    best, unit = (0.0, 0.0, False), np.unique(held.unit, return_inverse=True)[1]
    rate = float(np.average(expit(base), weights=held.weight))
    for gate in GATES:
        logits = base + gate * deep
        logits += _shift(logits, held.weight, rate)  # the held-out units' mean is luck, and no reason for a deep part
        gain = held.weight * (_log_loss(base, held.reward) - _log_loss(logits, held.reward))
        per_unit = np.bincount(unit, gain)
        total, error = float(per_unit.sum()), float(np.sqrt((per_unit**2).sum()))
        best = max(best, (total, gate, total > GATE_ERRORS * error))
    return best


def _shift(logits: Floats, weight: Floats, rate: float) -> float:
    """What to add to the logits to make their mean probability `rate`."""
    rate = float(np.clip(rate, 1e-6, 1 - 1e-6))
    low, high = float(logit(rate) - logits.max()), float(logit(rate) - logits.min())
    return float(brentq(lambda s: np.average(expit(logits + s), weights=weight) - rate, low - 1e-6, high + 1e-6))


def _copy(deep: DeepPart) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in deep.state_dict().items()}


def _log_loss(logits: Floats, reward: NDArray[np.float32]) -> Floats:
    return np.asarray(np.logaddexp(0.0, logits) - reward * logits)


def deep_logits(deep: DeepPart, layout: Layout, features: Features, variant: Ints) -> Floats:
    """The deep part's logit of one variant per row, averaged over heads: (n,)."""
    out = np.empty(len(features))
    with torch.no_grad():
        every = deep.variant_side(torch.from_numpy(layout.crossed_tags))
        for rows in chunks(len(features)):
            users = deep.user_side(*_columns(layout, features.take(rows)))
            chosen = type(every)(every.additive[:, variant[rows]], every.factor[:, variant[rows]])
            out[rows] = deep.pairs(users, chosen).mean(dim=0).numpy()
    return out


def _columns(layout: Layout, features: Features) -> tuple[Tensor, Tensor]:
    """Crossed side columns that are set for each user, and their values: (n, F + V) each."""
    design = layout.crossed(features)
    shape = (len(features), len(layout.crossed_sizes))
    return torch.from_numpy(design.indices.reshape(shape)), torch.from_numpy(design.data.reshape(shape))
