"""The gate: may a new model take the place of what is there? Judged on exposures that it has not learned from.

Four questions, each with its numbers; one that cannot be answered is answered no. docs/training.md explains the rule.
Arrays in, a report out: nothing here reads a log or a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from kaleidoscope.policy_value import Estimate, LoggedRows, Scores, Weights, dr_scores, estimate, gain, uniform_weights
from kaleidoscope.release import PolicySpec
from models.metrics import Calibration

Floats = NDArray[np.float64]


class Verdict(StrEnum):
    """What the gate says of a new model."""

    PROMOTE = "promote"
    KEEP = "keep"  # what there is


@dataclass(frozen=True)
class Limits:
    """What a model may not exceed."""

    margin: float = 0.05  # of the reference's value, that the gain's lower bound may lie below 0
    ece: float = 0.25  # of the click rate, that predictions may be off by, beyond chance
    latency_ms: float = 500.0  # p99 of ranking for one user; generous, because machines are busy
    epsilon: float = PolicySpec().epsilon  # of every policy's picks are uniform, as a bucket that learns shows them


@dataclass(frozen=True)
class Check:
    """One question to a model, and the answer in words."""

    name: str
    ok: bool
    message: str


@dataclass(frozen=True)
class Latency:
    """Milliseconds to encode one user and rank the variants for them."""

    p50_ms: float
    p99_ms: float
    variants: int


@dataclass(frozen=True)
class Picks:
    """What a policy shows to each of n rows, as the estimators need it."""

    weights: Weights
    q: Floats  # (n,) predicted click probability of its pick


@dataclass(frozen=True)
class Report:
    """`gate.json`: the verdict and all that it rests on. None: unknown."""

    verdict: Verdict
    checks: tuple[Check, ...]
    champion: str | None  # the version of the one that it was held against; None: there was none
    limits: Limits
    values: Mapping[str, Estimate | None]  # per policy, ε uniform included
    gains: Mapping[str, Estimate | None]  # of the model over each other policy
    exposures: int
    fresh_exposures: int | None  # those that came after the champion had learned; None without one
    ece: float
    ece_chance: float  # of a model that is right, by chance alone
    latency: Latency

    def as_dict(self) -> dict[str, object]:
        """The report as plain data."""
        return asdict(self) | {"verdict": self.verdict.value}


class Contest:
    """Policies compared on the same n rows, each with ε uniform mixed in; values are doubly robust, errors by unit."""

    def __init__(self, rows: LoggedRows, q_logged: Floats, q_uniform: Floats, *, epsilon: float, folds: int) -> None:
        self.rows, self.q_logged, self.epsilon, self.folds = rows, q_logged, epsilon, folds
        self.scores: dict[str, Scores] = {}
        self._uniform = Picks(uniform_weights(rows), q_uniform)
        self.enter("uniform", self._uniform)

    def enter(self, name: str, picks: Picks) -> None:
        """Score a policy."""
        share, uniform = self.epsilon, self._uniform
        value = (1 - share) * picks.weights.value + share * uniform.weights.value
        q = (1 - share) * picks.q + share * uniform.q
        self.scores[name] = dr_scores(Weights(self.rows, value, picks.weights.weighting), q, self.q_logged)

    def value(self, name: str) -> Estimate | None:
        """What the policy would have earned."""
        return estimate(self.scores[name], self.folds)

    def gain(self, over: str, of: str = "model") -> Estimate | None:
        """What a policy earns more than another."""
        return gain(self.scores[of], self.scores[over], self.folds)


def judge(
    contest: Contest,
    fresh: Contest | None,
    champion: str | None,
    curve: Calibration,
    latency: Latency,
    *,
    problems: Sequence[str] = (),
    limits: Limits,
) -> Report:
    """The gate's report. `contest` has uniform, best_single and model; `fresh` champion and model.

    `fresh` holds the exposures that came after the champion had learned, None where there are none. `problems` are
    errors of the log.
    """
    values = {name: contest.value(name) for name in contest.scores}
    gains = {name: contest.gain(name) for name in contest.scores if name != "model"}
    fresh_exposures = None
    if champion is not None:
        fresh_exposures = 0 if fresh is None else round(float(fresh.rows.count.sum()))
        values["champion"] = None if fresh is None else fresh.value("champion")
        gains["champion"] = None if fresh is None else fresh.gain("champion")
    ece, chance, rate = curve.error, _chance(curve), float(np.average(curve.observed, weights=curve.weight))
    checks = [
        _sound(problems),
        _has_learned(gains["uniform"]),
        *(
            _loses_nothing(name, gains[name], values[name], limits, fresh_exposures if name == "champion" else None)
            for name in ("best_single", "champion")
            if name in gains
        ),
        Check(
            "calibrated",
            ece - chance <= limits.ece * rate,
            f"Predictions are off by {_points(ece)} on average, chance alone gives {_points(chance)}; beyond it"
            f" {_points(limits.ece * rate)} is allowed.",
        ),
        Check(
            "fast",
            latency.p99_ms <= limits.latency_ms,
            f"Ranking {latency.variants:,} variants takes {latency.p99_ms:.3g} ms (p99), {limits.latency_ms:g} ms are"
            " allowed.",
        ),
    ]
    return Report(
        verdict=Verdict.PROMOTE if all(check.ok for check in checks) else Verdict.KEEP,
        checks=tuple(checks),
        champion=champion,
        limits=limits,
        values=values,
        gains=gains,
        exposures=round(float(contest.rows.count.sum())),
        fresh_exposures=fresh_exposures,
        ece=ece,
        ece_chance=chance,
        latency=latency,
    )


def _sound(problems: Sequence[str]) -> Check:
    return Check("log", not problems, " ".join(problems) or "The log's checks found no error.")


def _has_learned(found: Estimate | None) -> Check:
    name = "better_than_uniform"
    if found is None:
        return Check(name, False, "Whether it beats showing variants at random is unknown: too few exposures match.")
    return Check(name, found.ci_low > 0, f"Over showing variants at random it gains {_interval(found)}; has to be > 0.")


def _loses_nothing(
    reference: str, found: Estimate | None, at_stake: Estimate | None, limits: Limits, fresh: int | None
) -> Check:
    name, other = f"no_worse_than_{reference}", reference.replace("_", " ")
    on = "" if fresh is None else f" on the {fresh:,} exposures since the champion had learned"
    if found is None or at_stake is None:
        message = f"Whether it is worse than the {other} is unknown{on}: too few exposures tell the two apart."
        return Check(name, False, message)
    allowed = limits.margin * at_stake.value
    message = f"Over the {other} it gains {_interval(found)}{on}; the lower end has to be above {_points(-allowed)}."
    return Check(name, found.ci_low > -allowed, message)


def _chance(curve: Calibration) -> float:
    """The calibration error that a model which is right shows: E|N(0, σ)| = σ √(2/π) in every bin."""
    p = np.clip(curve.predicted, 0.0, 1.0)
    spread = np.sqrt(2 / math.pi * p * (1 - p) / np.maximum(curve.weight, 1.0))
    return float(np.average(spread, weights=curve.weight))


def _interval(found: Estimate) -> str:
    return f"{_points(found.value)} ({_points(found.ci_low)} to {_points(found.ci_high)})"


def _points(share: float) -> str:
    return f"{100 * share:.3g} points"
