"""All of attribution over one log: every method, where they agree, why it works, and what could not be done.

A method that a log does not support is None, and `not_done` says why; the others are there all the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from attribution.coding import MAX_UNIFORM, MAX_VALUES, MAX_WEIGHT, Coded, Tag
from attribution.insights import Attribution, Insight
from kaleidoscope.errors import LogError
from kaleidoscope.log import Check, Log, sums
from kaleidoscope.vocabulary import Bucket, Level, Method

if TYPE_CHECKING:
    from attribution.consensus import Agreement
    from attribution.contributions import ContributionResult
    from attribution.ebm import EbmResult, NetworkEbm
    from attribution.effectiveness import Design, Effectiveness
    from attribution.grid import GridResult
    from attribution.preference import PreferenceResult
    from kaleidoscope.ranker import Ranker

SHAPES = "network_ebm"  # what the network learned, as an EBM says it: a picture, not a method
LARGE = 0.05  # of the exposures, of one unit: from there on it is told
MUCH = 0.01  # of the exposures clipped, or of what they stand for lost: from there on it is a warning
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
        return insights_by_method(
            self.attribution, self.ebm, self.grid, self.preference, self.contributions, self.network
        )


def insights_by_method(
    statistics: Attribution, ebm: EbmResult | None, grid: GridResult | None, preference: PreferenceResult | None,
    contributions: ContributionResult | None, network: ContributionResult | None,
) -> dict[str, Sequence[Insight]]:  # fmt: skip
    """Method → insights, of those that were done."""
    found = {
        Method.STATISTICS: statistics, Method.EBM: ebm, Method.GRID: grid, Method.PREFERENCE: preference,
        Method.CONTRIBUTIONS: contributions, Method.NETWORK: network,
    }  # fmt: skip
    return {str(method): result.insights for method, result in found.items() if result is not None}


Stage = Callable[[str], AbstractContextManager[None]]
Result = TypeVar("Result")


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
    shares: Design | None = None,
    control: str = Bucket.CONTROL.value,
    dependent: bool | None = None,
    stage: Stage = _silent,
) -> Analysis:
    """Every method over a log, their agreement, and the three doubts about the lift of its buckets.

    `ranker`: a model whose reasons are shown beside. `shares`: as `effectiveness` takes them. `control`: the bucket
    that shows everybody the same. `dependent`: what `exposure_independence` said; None asks it. `stage` is told what
    begins. Raises LogError for a log that supports no attribution, as `coding.code` does.
    """
    from attribution.coding import code, require_units
    from attribution.consensus import TwoValued, agreements
    from attribution.contributions import lightgbm_contributions, network_contributions
    from attribution.ebm import ebm, ebm_of_network
    from attribution.effectiveness import effectiveness
    from attribution.grid import grid
    from attribution.insights import attribute_coded
    from attribution.preference import preferences
    from attribution.scoring import logits_of, rows_of

    seconds, not_done = dict[str, float](), dict[str, str]()

    def timed(of: str, work: Callable[[], Result]) -> Result:
        with stage(of):
            start = time.perf_counter()
            found = work()
            seconds[of] = round(time.perf_counter() - start, 3)
        return found

    def done(method: Method, lacks: str | None, work: Callable[[], Result]) -> Result | None:
        if lacks is None:
            return timed(method, work)
        not_done[method] = lacks
        return None

    learned_from = without_control(log, control)
    require_units(learned_from)
    coded = timed("code", lambda: code(learned_from, dependent=dependent))
    statistics = timed(Method.STATISTICS, lambda: attribute_coded(coded))
    lacking = _lacking(coded)
    preference = done(Method.PREFERENCE, lacking, lambda: preferences(coded))
    boosted = done(Method.EBM, lacking, lambda: ebm(coded, seed=seed))
    crossings = done(Method.GRID, lacking, lambda: grid(coded, statistics))
    trees = done(Method.CONTRIBUTIONS, lacking, lambda: lightgbm_contributions(coded, seed=seed))
    network, pictures, unfit = None, None, lacking or _unfit(ranker, learned_from)
    if ranker is None or unfit:
        not_done[Method.NETWORK] = str(unfit)
    else:
        model = ranker
        network = timed(Method.NETWORK, lambda: network_contributions(learned_from, coded, model, statistics))
        rows, logits = logits_of(model, rows_of(learned_from, coded), seed)
        try:
            pictures = timed(SHAPES, lambda: ebm_of_network(coded.take(rows), logits, seed=seed))
        except LogError as error:
            not_done[SHAPES] = str(error)
    return Analysis(
        log_name=name,
        scene=log.schema.scene,
        simulated=simulated,
        seed=seed,
        facts=facts_of(log),
        variants=_variants(log),
        tags=coded.tags,
        attribution=statistics,
        preference=preference,
        ebm=boosted,
        network_ebm=pictures,
        grid=crossings,
        contributions=trees,
        network=network,
        agreements=agreements(
            insights_by_method(statistics, boosted, crossings, preference, trees, network), TwoValued.of(coded)
        ),
        effectiveness=timed("effectiveness", lambda: effectiveness(log, control=control, shares=shares)),
        not_done=not_done,
        checks=(*log.checks, *_left_out(coded)),
        timings_s=seconds,
    )


def _lacking(coded: Coded) -> str | None:
    """Why nobody's preferences can be told apart in any log like this one; None where they can."""
    if not coded.fields:
        return "The log names no user fields: nobody's preferences can be told apart."
    if not coded.tags:
        return "No tag varies among the variants that were shown."
    if all(len(np.unique(codes)) < 2 for codes in coded.codes):
        return "No user field tells users apart: each is the same, or empty, in every row that counts."
    return None


def without_control(log: Log, control: str) -> Log:
    """The log without its control bucket, where it has others: one variant for everybody says nothing of tastes."""
    if log.bucket is None or log.buckets is None:
        return log
    rows = ~np.isin(log.bucket, [i for i, bucket in enumerate(log.buckets.to_pylist()) if bucket == control])
    return log if rows.all() or not rows.any() else log.take(rows)


def _left_out(coded: Coded) -> Iterator[Check]:
    """What of the log does not count, or not in full."""
    if coded.unit is not None and not coded.one_row_per_unit:
        largest = float(sums(coded.unit, coded.count).max() / coded.count.sum())
        if largest >= LARGE:
            yield Check(
                "unit_dominates", Level.WARNING,
                f"One unit has {_percent(largest)} of the exposures: an id that many share, of guests perhaps, is not a"
                " person. What it did counts as one person's; give everybody an id, or leave those without one out.",
            )  # fmt: skip
    if coded.certain:
        yield Check(
            "certain_exposures", Level.INFO,
            f"{coded.certain:,.0f} exposures are left out: their users could have seen nothing else (propensity 1), so"
            " that they say nothing of what these users prefer.",
        )  # fmt: skip
    for whose, most, clipped, lost in (
        ("preferences", MAX_WEIGHT, coded.clipped, 0.0),
        ("main effects", MAX_UNIFORM, coded.clipped_uniform, coded.lost_uniform),
    ):  # fmt: skip
        if clipped:
            gone = f" {_percent(lost)} of all that exposures stand for is lost by it." if lost else ""
            yield Check(
                "weights_clipped", Level.WARNING if max(lost, clipped) >= MUCH else Level.INFO,
                f"Of {whose}, {_percent(clipped)} of the exposures would count more than {most:g} times the mean,"
                f" and count as {most:g}.{gone} What is said of the variants they showed is drawn towards the mix"
                " that the log happened to show. Explore with a larger share, or attribute the random bucket alone.",
            )  # fmt: skip
    if coded.left_out:
        yield Check(
            "tags_left_out", Level.INFO,
            f"{coded.left_out:,} tag values are not looked at: of each dimension the {MAX_VALUES} that were shown most."
            " Group values that mean the same, or describe materials by fewer.",
        )  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


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


def _unfit(ranker: Ranker | None, log: Log) -> str | None:
    """Why there are no reasons of a model for a log; None where there are."""
    if ranker is None:
        return "No model was given."
    known = {field.name for field in ranker.signature.encoder.fields}
    dimensions = {dimension.name for dimension in ranker.signature.encoder.dimensions}
    if not known & set(log.schema.user) or not dimensions & set(log.schema.variant):
        return f"Model {ranker.version} knows none of the log's user fields, or none of its tag dimensions."
    return None
