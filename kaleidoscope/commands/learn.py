"""`kaleidoscope learn`: from an impression log to a verdict. Reads, checks, cross-fits, values, writes the report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit

from attribution.insights import Attribution, attribute
from kaleidoscope.commands.output import Clock, make_folder, write_whole
from kaleidoscope.commands.report import Evidence, render_report
from kaleidoscope.encoding import Encoder
from kaleidoscope.errors import LogError
from kaleidoscope.exposure import Independence, Srm, Support, exposure_independence, logging_policy, srm
from kaleidoscope.files import json_text
from kaleidoscope.log import Check, Log, read_log
from kaleidoscope.log_schema import LogSchema, read_schema
from kaleidoscope.policy_value import (
    Estimate,
    LoggedRows,
    Scores,
    Weighting,
    choose_weighting,
    dr_scores,
    estimate,
    gains_over_simpler,
    greedy,
    ips_scores,
    permutation_p,
    policy_weights,
    snips_scores,
    uniform_weights,
    verdict,
)
from kaleidoscope.progress import Progress
from kaleidoscope.vocabulary import Level, Policy
from models.baselines import LightGbm
from models.batch import Examples, columns_of
from models.metrics import AucSums, LogLossSums, calibration, grouped_auc
from models.permutation import OneStep, permuted_rows
from models.tables import Layout, Tables, fit_tables
from models.train import CtrModel, fit_network, threads_for

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

FOLDS = ((60_000, 5), (300_000, 3))  # rows up to which that many folds are made; beyond, 2
ALL_FOLDS_JUDGED = 60_000  # rows up to which the baselines are fitted on every fold; beyond, on the first
MIN_UNITS = 10
MAX_TAG_COLUMNS = 2_000  # of which the pseudo-inverse of Γ is taken
MAX_REWEIGHT = 20.0
TRACE_P = 0.01  # below, a dependence that is too small to forbid every claim is worth a warning
PERMUTATIONS = 99
PERMUTED_ROWS = 200_000
PERMUTED_PAIRS = 20_000_000  # (row, variant) scores per permutation


@dataclass(frozen=True)
class Learned:
    """What was learned from a log: for machines, for the report, and for whoever can show variants to new users."""

    summary: dict[str, object]  # summary.json
    evidence: Evidence
    variants: pa.Table  # of the log, in the order in which the networks score them
    networks: list[CtrModel]  # one per fold, which it has not seen


def run_learn(
    log_path: Path,
    schema_path: Path,
    out_dir: Path,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, object]:
    """Learn from the log at `log_path` and write `out_dir`/summary.json and report.html; returns the summary.

    Raises SchemaError or LogError where the input cannot be used; then nothing is written.
    """
    return learn_file(log_path, schema_path, out_dir, seed=seed, progress=progress).summary


def learn_file(
    log_path: Path,
    schema_path: Path,
    out_dir: Path,
    *,
    seed: int,
    progress: Progress,
    simulated: bool = False,
) -> Learned:
    """As `run_learn`, and returns all that was learned. `simulated` marks the report."""
    clock = Clock(progress)
    with clock("read"):
        schema = read_schema(schema_path)
        log = read_log(log_path, schema)
    counted = log.take(log.weight > 0).n_units if (log.weight == 0).any() else log.n_units
    if counted < MIN_UNITS:
        weighed = "" if counted == log.n_units else " with a weight above 0"
        raise LogError(
            f"{log_path}: {counted} unit{'s' * (counted != 1)}{weighed} in all {log.file_rows:,} rows; {MIN_UNITS} are"
            " needed to learn on some and judge on others. If `unit` is not the user's id, name another column or leave"
            " it out."
        )
    make_folder(out_dir)
    with threads_for(len(log)):
        learned = learn(log, schema, seed=seed, clock=clock, simulated=simulated)
    write_whole(
        out_dir,
        {
            "report.html": render_report(learned.summary, learned.evidence),
            "summary.json": json_text(learned.summary),
        },
    )
    return learned


def learn(log: Log, schema: LogSchema, *, seed: int, clock: Clock, simulated: bool = False) -> Learned:
    """The summary of the log contract, what the report shows beside it, and the networks.

    Rows of weight 0 are exposures, but say nothing of what policies earn. A log whose exposure depends on the user with
    unknown propensities supports no claim: no policy gets a value.
    """
    with clock("check"):
        mismatch = srm(log)
        independence = exposure_independence(log, seed=seed)
    has_claim = log.propensity is not None or not independence.dependent
    units, positive_rate = log.n_units, log.positive_rate
    with clock("encode"):
        if (log.weight == 0).any():
            log = log.take(log.weight > 0)
        log, fold = log.folds(_n_folds(len(log)), seed)
        support = logging_policy(log)
        rows = LoggedRows(
            log.reward.astype(np.float64), log.variant, support.propensity, log.count, log.weight, log.unit, support
        )
        encoder = fit_encoder(log, schema)
        examples = Examples.of(log, encoder)
    with clock("cross-fit"):
        policies = _policies(schema) if has_claim else []
        fitted = _cross_fit(examples, encoder, fold, support, rows, schema, policies, seed=seed, advance=clock.advance)
    with clock("baselines"):
        model = _judge(examples, encoder, fold, fitted, schema, seed=seed)
    values, p = None, None
    if has_claim:
        with clock("value"):
            values = _value(log, rows, examples, fitted, n_folds=int(fold.max()) + 1)
        if schema.user:
            with clock("permute"):
                p = _permutation_p(
                    log, examples, encoder, fold, support, fitted, values, seed=seed, advance=clock.advance
                )
    with clock("attribute"):
        preferences, refused = _attributed(log, dependent=independence.dependent) if has_claim else (None, [])
    estimates = {} if values is None else values.estimates
    gains = {} if values is None else values.gains
    over, gain = gains.get(Policy.PERSONALISED, (None, None))
    summary: dict[str, object] = {
        "rows": log.file_rows,
        "units": units,
        "variants": log.n_variants,
        "positive_rate": positive_rate,
        "checks": [
            {"code": c.code, "level": str(c.level), "message": c.message}
            for c in (*log.checks, *_findings(log, mismatch, independence, has_claim=has_claim), *refused)
        ],
        "srm": None if mismatch is None else {"p_value": mismatch.p_value, "flagged": mismatch.flagged},
        "exposure_independence": {"p_value": independence.p_value, "dependent": independence.dependent},
        "model": model,
        "policy_value": {str(policy): _numbers(estimates.get(policy)) for policy in Policy},
        "personalisation_gain": None
        if over is None or gain is None
        else {
            "over": str(over),
            "value": gain.value,
            "se": gain.se,
            "ci_low": gain.ci_low,
            "ci_high": gain.ci_high,
            "permutation_p": p,
        },
        "verdict": str(verdict(estimates, {policy: found for policy, (_, found) in gains.items()}, p, has_claim)),
        "insights": None if preferences is None else [found.to_json() for found in preferences.insights],
        "main_effects": None if preferences is None else [found.to_json() for found in preferences.main_effects],
        "timings_s": clock.seconds,
        "versions": {name: version(name) for name in ("kaleidoscope", "torch", "numpy", "lightgbm")}
        | {"python": platform.python_version()},
        "seed": seed,
    }
    evidence = _evidence(log, schema, support, fitted, examples, values, mismatch, simulated=simulated)
    return Learned(summary, evidence, log.variants, fitted.networks)


# ── cross-fitting ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _CrossFit:
    """Held-out predictions and choices of every row, by models that never saw its unit."""

    network_logit: Floats  # (n,) of what was shown
    blind_logit: Floats  # (n,) of what was shown, by the best model without user features
    chosen: dict[Policy, Ints]  # (n,) each
    q_chosen: dict[Policy, Floats]
    q_uniform: Floats
    blind: list[Tables] = field(default_factory=list)  # per fold
    networks: list[CtrModel] = field(default_factory=list)


def _attributed(log: Log, *, dependent: bool) -> tuple[Attribution | None, list[Check]]:
    """Who prefers what, or None and the warning that says why nothing can be said."""
    try:
        return attribute(log, dependent=dependent), []
    except LogError as error:
        return None, [Check("attribution_refused", Level.WARNING, error.message)]


def _n_folds(rows: int) -> int:
    return next((k for limit, k in FOLDS if rows <= limit), 2)


def fit_encoder(log: Log, schema: LogSchema) -> Encoder:
    """The encoder of a log's user features, context, group and tags."""
    return Encoder.fit(
        columns_of(log),
        user=schema.user,
        context=schema.context,
        group=[] if schema.group is None else [schema.group],
        variants=log.variants,
        dimensions=schema.variant,
    )


def _policies(schema: LogSchema) -> list[Policy]:
    """The policies that are learned from a log with these columns."""
    policies = [Policy.BEST_SINGLE]
    policies += [Policy.BEST_PER_CONTEXT] if schema.context else []
    return policies + ([Policy.PERSONALISED] if schema.user else [])


def _cross_fit(
    examples: Examples,
    encoder: Encoder,
    fold: Ints,
    support: Support,
    rows: LoggedRows,
    schema: LogSchema,
    policies: list[Policy],
    *,
    seed: int,
    advance: Callable[[float], None],
) -> _CrossFit:
    n, k = len(examples), int(fold.max()) + 1
    out = _CrossFit(
        np.empty(n),
        np.empty(n),
        {p: np.empty(n, np.int64) for p in policies},
        {p: np.empty(n) for p in policies},
        np.empty(n),
    )
    blind_examples, blind_encoder = examples.only(encoder, "context", "group")
    blind_examples = replace(blind_examples, weight=as_if_blind(rows, support, blind_examples.weight))
    for f in range(k):
        train, held = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        network = fit_network(examples.take(train), encoder, seed=seed + f)
        single = fit_tables(blind_examples.take(train), blind_encoder, crosses=False)
        blind = fit_tables(blind_examples.take(train), blind_encoder) if schema.context else single
        rankers: dict[Policy, tuple[CtrModel | Tables, Examples]] = {
            Policy.BEST_SINGLE: (single, blind_examples),
            Policy.BEST_PER_CONTEXT: (blind, blind_examples),
            Policy.PERSONALISED: (network, examples),
        }
        out.network_logit[held] = network.logits(examples.features.take(held), examples.variant[held])
        out.blind_logit[held] = blind.logits(blind_examples.features.take(held), examples.variant[held])
        for policy in policies:
            pick = greedy(_ranker(*rankers[policy]), support, held)
            out.chosen[policy][held] = pick.chosen
            out.q_chosen[policy][held] = expit(network.logits(examples.features.take(held), pick.chosen))
        if policies:
            out.q_uniform[held] = greedy(_ranker(network, examples, expit), support, held).q_uniform
        out.blind.append(blind)
        out.networks.append(network)
        advance((f + 1) / k)
    return out


def as_if_blind(rows: LoggedRows, support: Support, weight: Floats) -> Floats:
    """(n,) weights under which what was shown does not depend on the user: × P(shown | context) / P(shown | all known).

    Known propensities may depend on the user; a model without user features would then take the taste of a variant's
    audience for its own. Stabilised weights (Robins, Hernán & Brumback 2000), at most MAX_REWEIGHT, of unchanged sum.
    """
    if support.estimated:
        return weight
    entry = rows.logged_entry
    marginal = np.where(entry >= 0, support.probability[entry], rows.propensity)
    out = weight * np.minimum(marginal / rows.propensity, MAX_REWEIGHT)
    return np.asarray(out * (weight.sum() / out.sum()))


def _ranker(
    model: CtrModel | Tables, examples: Examples, link: Callable[[Any], Any] = lambda logits: logits
) -> Callable[[Ints, Ints], NDArray[np.float32]]:
    """Scores (r, m) of `variants` (m,) for the users of `rows` (r,), as `greedy` asks for them."""

    def rank(rows: Ints, variants: Ints) -> NDArray[np.float32]:
        return np.asarray(link(model.rank(examples.features.take(rows), variants)))

    return rank


def _judge(
    examples: Examples, encoder: Encoder, fold: Ints, fitted: _CrossFit, schema: LogSchema, *, seed: int
) -> dict[str, object]:
    """Held-out AUC, log loss and calibration error of the network, and the AUC of simpler models on the same units."""
    k = int(fold.max()) + 1
    judged = range(k if len(examples) <= ALL_FOLDS_JUDGED else 1)
    p = expit(fitted.network_logit)
    aucs: dict[str, list[float | None]] = {
        name: [] for name in ("network", "user_only", "variant_only", "main_effects", "lightgbm")
    }
    for f in judged:
        train, held = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        reward, weight = examples.reward[held], examples.weight[held]

        def auc(score: Floats, reward: NDArray[np.float32] = reward, weight: Floats = weight) -> float | None:
            return AucSums.of(score, reward, weight).value

        def tables(*roles: Any, train: Ints = train, held: Ints = held, variants: bool = True) -> Floats:
            narrow, narrow_encoder = examples.only(encoder, *roles)
            model = fit_tables(narrow.take(train), narrow_encoder, crosses=False, variants=variants)
            return model.logits(narrow.features.take(held), examples.variant[held])

        aucs["network"].append(auc(fitted.network_logit[held]))
        aucs["user_only"].append(auc(tables("user", variants=False)) if schema.user else None)
        aucs["variant_only"].append(auc(tables()))
        aucs["main_effects"].append(auc(tables("user", "context", "group")))
        trees = LightGbm.fit(examples.take(train), encoder, seed=seed)
        aucs["lightgbm"].append(auc(trees.predict(examples.features.take(held), examples.variant[held])))
    means = {name: None if None in found else float(np.mean(found)) for name, found in aucs.items()}  # type: ignore[arg-type]
    return {
        "auc": means.pop("network"),
        "logloss": LogLossSums.of(p, examples.reward, examples.weight).value,
        "ece": calibration(p, examples.reward, examples.weight).error,
        "baseline_auc": means,
    }


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Values:
    rows: LoggedRows
    weighting: Weighting
    scores: dict[Policy, Scores]
    estimates: dict[Policy, Estimate | None]
    gains: dict[Policy, tuple[Policy, Estimate | None]]
    others: dict[Policy, dict[str, Estimate | None]]  # IPS and SNIPS beside


def _value(log: Log, rows: LoggedRows, examples: Examples, fitted: _CrossFit, n_folds: int) -> _Values:
    columns = len(np.unique(examples.tags.indices))  # as many tags as variants say no more than the variants
    weighting = choose_weighting(rows, examples.tags if columns < min(log.n_variants, MAX_TAG_COLUMNS) else None)
    q_logged = np.asarray(expit(fitted.network_logit))
    weights = {Policy.UNIFORM: uniform_weights(rows)}
    weights |= {p: policy_weights(rows, chosen, weighting, examples.tags) for p, chosen in fitted.chosen.items()}
    q = {Policy.UNIFORM: fitted.q_uniform, **fitted.q_chosen}
    scores = {policy: dr_scores(w, q[policy], q_logged) for policy, w in weights.items()}
    return _Values(
        rows,
        weighting,
        scores,
        {policy: estimate(s, n_folds) for policy, s in scores.items()},
        gains_over_simpler(scores, n_folds),
        {
            p: {"ips": estimate(ips_scores(w), n_folds), "snips": estimate(snips_scores(w), n_folds)}
            for p, w in weights.items()
        },
    )


def _permutation_p(
    log: Log,
    examples: Examples,
    encoder: Encoder,
    fold: Ints,
    support: Support,
    fitted: _CrossFit,
    values: _Values,
    *,
    seed: int,
    advance: Callable[[float], None],
) -> float | None:
    """Chance of the fast learner's gain if user features meant nothing: 99 permutations of whole rows of them."""
    rng = np.random.default_rng(seed)
    learned = _sample(examples.unit, PERMUTED_ROWS, rng)
    users, user_encoder = examples.only(encoder, "user")
    layout = Layout.of(user_encoder, examples.tags)
    if not layout.n_crossed or not layout.crossed_tags.shape[1]:
        return None
    part = users.take(learned)
    mean = _mean_tags(support, layout.crossed_tags)
    learner = OneStep.of(
        layout,
        layout.crossed(part.features),
        reward=part.reward,
        weight=part.weight,
        logit=fitted.blind_logit[learned],
        contrast=layout.crossed_tags[part.variant] - mean[support.choice_set[learned]],
        fold=fold[learned],
        unit=part.unit,
    )
    wide = float(np.mean(support.n_eligible[learned]))
    judged = np.sort(rng.permutation(len(learned))[: max(1_000, int(PERMUTED_PAIRS / wide))])
    at = learned[judged]
    blind = Policy.BEST_PER_CONTEXT if Policy.BEST_PER_CONTEXT in fitted.chosen else Policy.BEST_SINGLE
    part_support = replace(
        support, choice_set=support.choice_set[at], propensity=support.propensity[at], eligible=support.eligible[at]
    )
    full = values.rows
    unit = None if full.unit is None else np.unique(full.unit[at], return_inverse=True)[1].astype(np.int64)
    rows = LoggedRows(
        full.reward[at], full.logged[at], full.propensity[at], full.count[at], full.weight[at], unit, part_support
    )
    context = examples.only(encoder, "context", "group")[0].features.take(at)
    folds = fold[at]
    size = rows.count * rows.weight
    q_logged = expit(fitted.blind_logit[at])

    def blind_rank(r: Ints, v: Ints) -> NDArray[np.float32]:
        out = np.empty((len(r), len(v)), np.float32)
        for f in np.unique(folds[r]):
            mine = folds[r] == f
            out[mine] = fitted.blind[f].rank(context.take(r[mine]), v)
        return out

    def value(chosen: Ints) -> float:
        logits = np.empty(len(at))
        for f, model in enumerate(fitted.blind):
            mine = np.flatnonzero(folds == f)
            logits[mine] = model.logits(context.take(mine), chosen[mine])
        weights = policy_weights(rows, chosen, values.weighting, examples.tags)
        return float((size * dr_scores(weights, expit(logits), q_logged).value).sum() / size.sum())

    base = value(fitted.chosen[blind][at])

    def gain(source: Ints | None) -> float:
        taste = learner.preferences(source)[judged]
        if not taste.any():
            return 0.0
        pick = greedy(lambda r, v: blind_rank(r, v) + taste[r] @ layout.crossed_tags[v].T, part_support)
        return value(pick.chosen) - base

    observed, permuted = gain(None), []
    for i in range(PERMUTATIONS):
        permuted.append(gain(permuted_rows(part.unit, rng)))
        advance((i + 1) / PERMUTATIONS)
    return permutation_p(observed, permuted)


def _sample(unit: Ints, rows: int, rng: np.random.Generator) -> Ints:
    """Rows of randomly drawn whole units, about `rows` of them at most."""
    if len(unit) <= rows:
        return np.arange(len(unit))
    units, code = np.unique(unit, return_inverse=True)
    drawn = rng.permutation(len(units))[: max(1, int(rows * len(units) / len(unit)))]
    return np.flatnonzero(np.isin(code, drawn))


def _mean_tags(support: Support, tags: NDArray[np.float32]) -> NDArray[np.float32]:
    """Per choice set, the mean tags of what the log shows there: (S, T)."""
    out = np.zeros((len(support.indptr) - 1, tags.shape[1]), np.float32)
    for s in range(len(out)):
        inside = slice(support.indptr[s], support.indptr[s + 1])
        out[s] = support.probability[inside] @ tags[support.variant[inside]] / support.probability[inside].sum()
    return out


# ── what is written ─────────────────────────────────────────────────────────────────────────────────────────────────


def _findings(log: Log, mismatch: Srm | None, independence: Independence, *, has_claim: bool) -> Iterator[Check]:
    """What the tests of the exposure say, as checks."""
    if mismatch is not None and mismatch.flagged:
        yield Check(
            "sample_ratio_mismatch",
            Level.ERROR,
            f"Variants were not shown in their designed shares (p = {mismatch.p_value:.2g}): the randomisation or the "
            "logging is broken, and every number may be biased. Find the cause, or drop the affected rows, first.",
        )
    if independence.dependent:
        yield Check(
            "exposure_depends_on_user",
            Level.WARNING if has_claim else Level.ERROR,
            f"What was shown depended on the user (p = {independence.p_value:.2g}). "
            + (
                "The log's propensities account for it."
                if has_claim
                else "Without logged propensities no policy's value can be claimed: log P(variant) with each exposure, "
                "or show variants at random to a share of the traffic."
            ),
        )
    elif independence.p_value is not None and independence.p_value <= TRACE_P and log.propensity is None:
        yield Check(
            "exposure_trace_of_user",
            Level.WARNING,
            f"What was shown depended a little on the user (p = {independence.p_value:.2g}): estimated propensities may"
            " be off by up to a seventh, and values by more than their intervals say. To be sure, log P(variant) with"
            " each exposure.",
        )


def _numbers(found: Estimate | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {name: float(getattr(found, name)) for name in ("value", "se", "ci_low", "ci_high", "ess")}


def _evidence(
    log: Log,
    schema: LogSchema,
    support: Support,
    fitted: _CrossFit,
    examples: Examples,
    values: _Values | None,
    mismatch: Srm | None,
    *,
    simulated: bool,
) -> Evidence:
    curve = calibration(np.asarray(expit(fitted.network_logit)), examples.reward, examples.weight)
    estimates = {} if values is None else {policy: e for policy, e in values.estimates.items() if e is not None}
    last = list(estimates.values())[-1] if estimates else None
    matched = {
        f"matched_rows_{policy}": found.matched_rows
        for policy, found in estimates.items()
        if values is not None and values.scores[policy].weights.weighting is not Weighting.PSEUDO_INVERSE
    }
    others = {} if values is None else values.others
    return Evidence(
        log_name=log.path.name,
        scene=schema.scene,
        simulated=simulated,
        calibration=list(zip(curve.predicted.tolist(), curve.observed.tolist(), curve.weight.tolist(), strict=True)),
        grouped_auc=_grouped_auc(log, examples, fitted),
        other_estimators={
            str(policy): {name: _numbers(found) for name, found in both.items()} for policy, both in others.items()
        },
        assumption=last.assumption if last else "the propensities are right",
        method=last.method if last else "" if values is None else f"dr, {values.weighting}",
        support={
            "mean_eligible": float(np.average(support.n_eligible, weights=log.count)),
            "variants": float(log.n_variants),
        }
        | matched,
        propensities="estimated from context" if support.estimated else "known",
        srm_groups=[(g.group, g.p_value, g.exposures) for g in mismatch.groups] if mismatch else [],
        srm_arms=[(d.arm, d.share, d.designed) for d in mismatch.deviations] if mismatch else [],
        user_columns=list(schema.user),
        context_columns=list(schema.context),
        variant_columns=list(schema.variant),
    )


def _grouped_auc(log: Log, examples: Examples, fitted: _CrossFit) -> float | None:
    """Held-out AUC within users; None where hardly any has several exposures (as the check of the log judges it)."""
    if log.unit is None or any(check.code == "units_seen_once" for check in log.checks):
        return None
    return grouped_auc(fitted.network_logit, examples.reward, examples.unit, examples.weight)
