"""What an exported network says of a log's exposures, and how well a score tells clicks from the rest."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from attribution.coding import Coded
from kaleidoscope.encoding import Features
from kaleidoscope.errors import InputError
from kaleidoscope.log import Codes, Floats, Log
from kaleidoscope.ranker import Ranker

SCORED = 50_000  # exposures that a network's logits are asked of
SCORED_AT_ONCE = 2_000


def rows_of(log: Log, coded: Coded) -> Log:
    """The exposures of `log` that are in `coded`, which is `code(log)`. Raises InputError for another log."""
    if coded.rows is not None and coded.rows.max(initial=-1) < len(log):
        log = log.take(coded.rows)
    if len(log) != len(coded) or (log.variant != coded.variant).any():
        raise InputError("the log and the coded exposures differ; give code(log) of the same log.")
    return log


def features_of(log: Log, ranker: Ranker) -> Features:
    """What the network knows of the users and contexts of a log; a group that it learned from is a context."""
    columns = dict(log.columns)
    if log.group is not None and log.groups is not None and log.schema.group is not None:
        columns[log.schema.group] = log.groups.take(pa.array(log.group))
    return ranker.signature.encoder.features(columns, len(log))


def logits_of(ranker: Ranker, log: Log, seed: int) -> tuple[Codes, Floats]:
    """Rows of the log, at most SCORED of them, and the network's logit of what was shown there."""
    rows = np.arange(len(log))
    if len(log) > SCORED:
        rows = np.sort(np.random.default_rng([seed, 3]).choice(len(log), SCORED, replace=False))
    some, side = log.take(rows), ranker.variant_side(log.variants)
    features, out = features_of(some, ranker), np.empty(len(some))
    for start in range(0, len(some), SCORED_AT_ONCE):
        at = slice(start, start + SCORED_AT_ONCE)
        scores = ranker.score(features.take(at), side)
        out[at] = scores[np.arange(len(scores)), some.variant[at]]
    return rows, out


def auc_of(coded: Coded, score: Floats) -> float | None:
    """The chance that a click has a higher score than an exposure without one; None where there is no such pair."""
    from sklearn.metrics import roc_auc_score

    clicked = coded.reward > 0
    if clicked.all() or not clicked.any():
        return None
    return float(roc_auc_score(clicked, score, sample_weight=coded.size))
