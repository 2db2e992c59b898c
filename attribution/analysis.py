"""All of attribution over one log: every method, where they agree, why it works, and what could not be done.

A method that a log does not support is None, and `not_done` says why; the others are there all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from attribution.coding import MAX_VALUES, Coded, Tag
from attribution.consensus import CONTRIBUTIONS, EBM, GRID, NETWORK, PREFERENCE
from attribution.insights import STATISTICS, Attribution, Insight
from kaleidoscope.errors import LogError
from kaleidoscope.log import Check, Codes, Floats, Log, sums
from kaleidoscope.vocabulary import Bucket, Level

if TYPE_CHECKING:
    from attribution.consensus import Agreement
    from attribution.contributions import ContributionResult
    from attribution.ebm import EbmResult, NetworkEbm
    from attribution.effectiveness import Effectiveness
    from attribution.grid import GridResult
    from attribution.preference import PreferenceResult
    from kaleidoscope.ranker import Ranker

SHAPES = "network_ebm"
METHODS = (STATISTICS, EBM, GRID, PREFERENCE, CONTRIBUTIONS, NETWORK)
SCORED = 50_000  # exposures that a model's logits are asked of
SCORED_AT_ONCE = 2_000
MOST_VARIANTS = 20_000  # whose tags the report can name
EARLIEST_S, LATEST_S = 946_684_800.0, 4_102_444_800.0  # 2000 and 2100


@dataclass(frozen=True)
class Facts:
    """What was looked at."""

    exposures: int
    units: int | None  # None: the log names no unit
    variants: int
    positive_rate: float
    since: str | None  # ISO 8601, UTC; None where the log has no time
    until: str | None
    buckets: Mapping[str, int]  # bucket → exposures; empty where the log names none
    user: tuple[str, ...]  # fields
    dimensions: tuple[str, ...]  # of tags
    shown: Mapping[str, Mapping[str, int]]  # dimension → value → exposures


@dataclass(frozen=True)
class Analysis:
    """What `analyse` returns, and the report shows."""

    log_name: str
    scene: str | None
    simulated: bool
    seed: int
    facts: Facts
    variants: Mapping[str, Mapping[str, Sequence[str]]]  # id → dimension → values, of those that were shown
    tags: tuple[Tag, ...]  # that vary, in the order in which `Examined.tags` counts them
    attribution: Attribution  # method 1: statistics
    preference: PreferenceResult | None
    ebm: EbmResult | None
    network_ebm: NetworkEbm | None  # what the CTR network learned
    grid: GridResult | None
    contributions: ContributionResult | None  # LightGBM
    network: ContributionResult | None  # the exported network's own terms
    agreements: Sequence[Agreement]  # all that any method found; the consensus are those that hold
    effectiveness: Effectiveness | None
    not_done: Mapping[str, str]  # method → why
    checks: tuple[Check, ...]
    timings_s: Mapping[str, float]

    @property
    def consensus(self) -> list[Agreement]:
        """What the methods agree on, strongest first."""
        return [agreement for agreement in self.agreements if agreement.holds]

    @property
    def by_method(self) -> dict[str, Sequence[Insight]]:
        """The insights of each method that was done."""
        found = {STATISTICS: self.attribution, EBM: self.ebm, GRID: self.grid, PREFERENCE: self.preference,
                 CONTRIBUTIONS: self.contributions, NETWORK: self.network}  # fmt: skip
        return {name: result.insights for name, result in found.items() if result is not None}


Stage = Callable[[str], AbstractContextManager[None]]


@contextmanager
def _silent(_: str) -> Iterator[None]:
    yield


def analyse(
    log: Log,
    *,
    name: str,
    seed: int = 0,
    simulated: bool = False,
    ranker: Ranker | None = None,
    shares: Mapping[str, float] | None = None,
    control: str = Bucket.CONTROL.value,
    dependent: bool | None = None,
    stage: Stage = _silent,
) -> Analysis:
    """Every method over a log, their agreement, and the three doubts about the lift of its buckets.

    `ranker`: a model whose reasons are shown beside. `shares`: the designed shares of units by bucket. `control`: the
    bucket that shows everybody the same. `dependent`: what `exposure_independence` said; None asks it. `stage` is told
    what begins. Raises LogError for a log that supports no attribution, as `coding.code` does.
    """
    from attribution.coding import code
    from attribution.consensus import agreements
    from attribution.contributions import lightgbm_contributions, network_contributions
    from attribution.ebm import ebm, ebm_of_network
    from attribution.effectiveness import effectiveness
    from attribution.grid import grid
    from attribution.insights import attribute_coded
    from attribution.preference import preferences

    seconds: dict[str, float] = {}
    not_done: dict[str, str] = {}

    def timed(of: str, work: Callable[[], Any]) -> Any:
        with stage(of):
            start = time.perf_counter()
            found = work()
            seconds[of] = round(time.perf_counter() - start, 3)
        return found

    learned_from = without_control(log, control)
    coded = timed("code", lambda: code(learned_from, dependent=dependent))
    statistics = timed(STATISTICS, lambda: attribute_coded(coded))
    lacking = None if coded.fields else "The log names no user fields: nobody's preferences can be told apart."
    lacking = lacking or (None if coded.tags else "No tag varies among the variants that were shown.")
    found: dict[str, Any] = dict.fromkeys((PREFERENCE, EBM, GRID, CONTRIBUTIONS, NETWORK, SHAPES))
    works: dict[str, Callable[[], Any]] = {
        PREFERENCE: lambda: preferences(coded),
        EBM: lambda: ebm(coded, seed=seed),
        GRID: lambda: grid(coded, statistics),
        CONTRIBUTIONS: lambda: lightgbm_contributions(coded, seed=seed),
    }
    for method, work in works.items():
        if lacking:
            not_done[method] = lacking
        else:
            found[method] = timed(method, work)
    unfit = lacking or ("No model was given." if ranker is None else _unfit(ranker, learned_from))
    if unfit or ranker is None:
        not_done[NETWORK] = unfit or ""
    else:
        found[NETWORK] = timed(
            NETWORK, lambda: network_contributions(learned_from, coded, ranker, statistics=statistics)
        )
        rows, logits = logits_of(ranker, learned_from, seed)
        try:
            found[SHAPES] = timed(SHAPES, lambda: ebm_of_network(coded.take(rows), logits, seed=seed))
        except LogError as error:
            not_done[SHAPES] = str(error)
    by_method = {STATISTICS: statistics.insights}
    by_method |= {method: found[method].insights for method in METHODS[1:] if found[method] is not None}
    return Analysis(
        log_name=name,
        scene=log.schema.scene,
        simulated=simulated,
        seed=seed,
        facts=facts_of(log),
        variants=_variants(log),
        tags=coded.tags,
        attribution=statistics,
        agreements=agreements(by_method),
        effectiveness=timed("effectiveness", lambda: effectiveness(log, control=control, shares=shares)),
        not_done=not_done,
        checks=(*log.checks, *_left_out(coded)),
        timings_s=seconds,
        **found,
    )


def without_control(log: Log, control: str) -> Log:
    """The log without its control bucket, where it has others: one variant for everybody says nothing of tastes."""
    if log.bucket is None or log.buckets is None:
        return log
    rows = ~np.isin(log.bucket, [i for i, bucket in enumerate(log.buckets.to_pylist()) if bucket == control])
    return log if rows.all() or not rows.any() else log.take(rows)


def _left_out(coded: Coded) -> Iterator[Check]:
    if coded.left_out:
        yield Check(
            "tags_left_out", Level.INFO,
            f"{coded.left_out:,} tag values are not looked at: of each dimension the {MAX_VALUES} that were shown most."
            " Group values that mean the same, or describe materials by fewer.",
        )  # fmt: skip


def facts_of(log: Log) -> Facts:
    """What was looked at."""
    known = np.zeros(0) if log.time is None else log.time[np.isfinite(log.time)]
    names = [] if log.buckets is None else log.buckets.to_pylist()
    exposures = sums(np.zeros(0, np.int64)) if log.bucket is None else sums(log.bucket, log.count, size=len(names))
    return Facts(
        exposures=log.n_exposures,
        units=None if log.unit is None else log.n_units,
        variants=int((sums(log.variant, log.count, size=log.n_variants) > 0).sum()),
        positive_rate=log.positive_rate,
        since=_moment(known.min()) if len(known) else None,
        until=_moment(known.max()) if len(known) else None,
        buckets={str(name): round(float(n)) for name, n in zip(names, exposures, strict=True) if name and n},
        user=log.schema.user,
        dimensions=log.schema.variant,
        shown=_shown(log),
    )


def _variants(log: Log) -> dict[str, dict[str, list[str]]]:
    shown = np.flatnonzero(sums(log.variant, log.count, size=log.n_variants) > 0)
    if len(shown) > MOST_VARIANTS:
        return {}
    names = ("variant_id", *log.schema.variant)
    rows = log.variants.select(names).take(shown).to_pylist()
    return {str(row.pop("variant_id")): {name: list(values or ()) for name, values in row.items()} for row in rows}


def _shown(log: Log) -> dict[str, dict[str, int]]:
    of_variant, found = sums(log.variant, log.count, size=log.n_variants), dict[str, dict[str, int]]()
    for dimension in log.schema.variant:
        counts: dict[str, float] = {}
        for values, n in zip(log.variants[dimension].to_pylist(), of_variant.tolist(), strict=True):
            for value in dict.fromkeys(values or ()):
                counts[value] = counts.get(value, 0.0) + n
        found[dimension] = {value: round(n) for value, n in counts.items() if n}
    return found


def _moment(seconds: float) -> str | None:
    """None where a log's times are no moments, but numbers of its own."""
    return datetime.fromtimestamp(seconds, UTC).isoformat() if EARLIEST_S <= seconds <= LATEST_S else None


def logits_of(ranker: Ranker, log: Log, seed: int) -> tuple[Codes, Floats]:
    """Rows of the log, at most SCORED of them, and the model's logit of what was shown there."""
    rows = np.arange(len(log))
    if len(log) > SCORED:
        rows = np.sort(np.random.default_rng([seed, 3]).choice(len(log), SCORED, replace=False))
    some, side = log.take(rows), ranker.variant_side(log.variants)
    columns = {name: column.to_pylist() for name, column in some.columns.items()}
    features, out = ranker.features(columns, len(some)), np.empty(len(some))
    for start in range(0, len(some), SCORED_AT_ONCE):
        at = slice(start, start + SCORED_AT_ONCE)
        scores = ranker.score(features.take(at), side)
        out[at] = scores[np.arange(len(scores)), some.variant[at]]
    return rows, out


def _unfit(ranker: Ranker, log: Log) -> str | None:
    """Why a model's reasons do not fit a log; None where they do."""
    known = {field.name for field in ranker.signature.encoder.fields}
    dimensions = {dimension.name for dimension in ranker.signature.encoder.dimensions}
    if not known & set(log.schema.user) or not dimensions & set(log.schema.variant):
        return f"Model {ranker.version} knows none of the log's user fields, or none of its tag dimensions."
    return None
