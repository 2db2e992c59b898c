"""Standardised preference: how much more a segment clicks on a tag than it clicks at all, over how much all do.

Every segment × tag gets a ratio of CTRs within strata (context, group, product), an interval by unit, and a value drawn
to 1 as far as it has few clicks: the rows of a portrait. Insights are the ratios that are found at false discovery rate
Q among all of them, less those that a correlated user field or tag explains, which a ratio by itself cannot tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.linalg import block_diag
from scipy.sparse import csr_array
from threadpoolctl import threadpool_limits

from attribution.cells import SUMS, Cells, t_quantile
from attribution.coding import Coded, Segment, Tag, UserField
from attribution.discoveries import LEVEL, Examined, Search, benjamini_hochberg
from attribution.insights import Diagnostics, Insight, joint_insights
from attribution.insights import without_noise as pairs_without_noise
from attribution.logistic import LEAST_DESIGN_EFFECT
from attribution.replicates import REPLICATES
from attribution.screening import MIN_EXPECTED, POOLED_CLICKS, screen
from kaleidoscope.log import Codes, Floats, factorise, sums
from kaleidoscope.vocabulary import Method

LEAST_EXPECTED = 3.0  # clicks that have to be expected of a cell whose own ratio is told
LEAST_CLICKS = 0.5  # a cell without clicks counts as if it had so many where its value is drawn to 1
PRIOR_SDS = 0.02 * 2 ** np.arange(0, 7, 0.5)  # of log ratios: nobody's taste is exactly everybody's
ROUNDS = 200


@dataclass(frozen=True)
class PreferenceCell:
    """A segment's taste for a tag; None is unknown: never shown (n = 0), without a click, or with too few expected."""

    segment: Mapping[str, str]
    tag: Mapping[str, str]
    n: int  # exposures of the segment to the tag
    clicks: int
    ctr: float | None
    ctr_low: float | None
    ctr_high: float | None
    preference: float | None  # [CTR(tag, segment)/CTR(segment)] / [CTR(tag)/CTR] within strata; 1: as everybody
    ci_low: float | None
    ci_high: float | None
    shrunk: float | None  # drawn to 1 by what tastes are like in its (field, dimension)
    shrunk_low: float | None
    shrunk_high: float | None
    # As the exposures count, weighted by their propensity: as if the tag had been shown to everybody alike.
    share: float | None = None  # of the tag's exposures, how many are the segment's
    click_share: float | None = None  # of the clicks on it
    independent: float | None = None  # as how many independent exposures `n` count (Kish 1965; by unit)


@dataclass(frozen=True, eq=False)
class PreferenceResult:
    """What `preferences` returns; `diagnostics.examined` has log preferences as its gamma."""

    insights: tuple[Insight, ...]
    diagnostics: Diagnostics
    cells: tuple[PreferenceCell, ...]  # by field, segment, tag: all of them
    prior_sd: Mapping[tuple[str, str], float]  # of log preferences by (field, dimension; several joined by "+")
    segments: tuple[Segment, ...] = ()  # S: all of all fields
    overlap: Floats = field(
        default_factory=lambda: np.zeros((0, 0))
    )  # (S, S) the share of users in both, as they count


def preferences(coded: Coded, cells: Cells | None = None) -> PreferenceResult:
    """Every segment's standardised preference for every tag, and those that differ from everybody's.

    An insight's `effect` is what the contract says of all insights, exp(γ) − 1 of the joint logistic model, so that
    methods can be compared; it is reported where its preference is significant among all preferences looked at *and*
    it stays in the joint model. `q_value` is the larger one of the two, and `importance` the logarithm of the
    preference once it is drawn to 1: what this method itself says, which may have another sign than `effect`.
    """
    with threadpool_limits(1, "blas"):
        cells = Cells.of(coded) if cells is None else cells
        ratios = _ratios(cells, coded)
        shrunk = _Shrunk.of(ratios, coded.fields, coded.tags)
        insights, diagnostics = _insights(coded, cells, ratios, shrunk)
    return PreferenceResult(
        insights, diagnostics, _cells(ratios, coded.tags, shrunk), shrunk.prior_sd, *_overlaps(coded)
    )


def preference_cells(cells: Cells) -> tuple[PreferenceCell, ...]:
    """The rows of a portrait from the sums alone: every segment of the definitions × every tag that some lack.

    Errors are by unit; insights need the rows of the log, and are for `preferences`.
    """
    with threadpool_limits(1, "blas"):
        shown = cells.by_stratum("n").sum(axis=0)
        tags = [Tag(parts) for parts, n in zip(cells.tags[1:], shown[1:], strict=True) if 0 < n < shown[0]]
        ratios = _Ratios.of(cells, cells.definitions.fields, tags)
        return _cells(ratios, tags, _Shrunk.of(ratios, cells.definitions.fields, tags))


def log_preferences(coded: Coded) -> Floats:
    """(cells,) logarithms of the preferences, in the order of `PreferenceResult.cells`; NaN where there are no clicks.

    Where `coded.reward` holds click probabilities, they are what the preferences estimate.
    """
    return _ratios(Cells.of(coded), coded).value


def without_noise(coded: Coded, probability: Floats, found: PreferenceResult) -> tuple[Floats, Floats]:
    """What is estimated, where the click probabilities (n,) of the exposures are known: (m,) log preferences of the
    examined cells, and (K,) coefficients of the insights in their joint model."""
    truth = _ratios(Cells.of(replace(coded, reward=probability)), coded)
    at = {pair: i for i, pair in enumerate(zip(truth.segments, truth.tags.tolist(), strict=True))}
    examined = found.diagnostics.examined
    places = [at[pair] for pair in zip(examined.segments, examined.tags, strict=True)]
    return truth.value[places], pairs_without_noise(coded, probability, found.diagnostics)[1]


def _insights(coded: Coded, cells: Cells, ratios: _Ratios, shrunk: _Shrunk) -> tuple[tuple[Insight, ...], Diagnostics]:
    """Ratios that are significant among all, and stay in the joint model of method 1; and what stands behind them.

    Families that the joint model leaves with none do not count (as in `Search`), so the threshold is asked again.
    """
    looked = np.flatnonzero(ratios.enough)
    z = ratios.z[looked]
    examined = Examined(
        tuple(ratios.segments[i] for i in looked), tuple(int(t) for t in ratios.tags[looked]), ratios.value[looked],
        ratios.se[looked], z, benjamini_hochberg(2 * stats.norm.sf(np.abs(z))),
        factorise(np.array(["\0".join(shrunk.families[i]) for i in looked], dtype=object))[1],
    )  # fmt: skip
    place = {pair: i for i, pair in enumerate(zip(examined.segments, examined.tags, strict=True))}
    screened = screen(coded) if coded.fields and coded.tags else None
    search = examined.search
    while True:
        significant = {pair for pair, i in place.items() if abs(z[i]) >= search.threshold[i]}
        found, diagnostics = joint_insights(coded, cells, screened, significant)
        chosen = [place[pair] for pair in diagnostics.selected]
        left = len(np.unique(examined.family[chosen]))
        if not chosen or left >= search.families:
            break
        search = Search.of(examined, left)
    cell_of = {pair: i for i, pair in enumerate(zip(ratios.segments, ratios.tags.tolist(), strict=True))}
    insights = []
    for insight, pair, i in zip(found, diagnostics.selected, chosen, strict=True):
        q = min(2 * float(stats.norm.sf(abs(z[i])) * search.factor[i]), 1.0)
        value = float(shrunk.value[cell_of[pair]])
        insights.append(
            replace(
                insight, q_value=max(q, insight.q_value), methods=(Method.PREFERENCE,),
                importance={Method.PREFERENCE: value},
            )
        )  # fmt: skip
    return tuple(insights), replace(diagnostics, examined=examined)


def _cells(ratios: _Ratios, tags: Sequence[Tag], shrunk: _Shrunk) -> tuple[PreferenceCell, ...]:
    """The portrait's rows."""

    def known(values: Floats) -> list[float | None]:
        return [float(v) if np.isfinite(v) else None for v in values]

    # Wilson's interval of as many independent exposures, which stays within 0..1 (1927, doi:10.2307/2276774).
    size, rate, reach = ratios.independent, ratios.rate, ratios.reach
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = (rate + reach**2 / (2 * size)) / (1 + reach**2 / size)
        half = reach / (1 + reach**2 / size) * np.sqrt(rate * (1 - rate) / size + reach**2 / (4 * size**2))
        # Of hardly any expected clicks, only those cells have a ratio that got one: too high, whatever its error.
        value = np.where(size * rate / np.exp(ratios.value) < LEAST_EXPECTED, np.nan, ratios.value)
        columns = [
            known(values)
            for values in (
                rate, centre - half, centre + half, np.exp(value), np.exp(value - reach * ratios.se),
                np.exp(value + reach * ratios.se), np.exp(shrunk.value), np.exp(shrunk.low), np.exp(shrunk.high),
                ratios.share, ratios.click_share, ratios.independent,
            )
        ]  # fmt: skip
    return tuple(
        PreferenceCell({segment.field: segment.label}, tags[tag].names, round(float(n)), round(float(k)), *row)
        for segment, tag, n, k, *row in zip(
            ratios.segments, ratios.tags.tolist(), ratios.n, ratios.clicks, *columns, strict=True
        )
    )


def _overlaps(coded: Coded) -> tuple[tuple[Segment, ...], Floats]:
    """All segments, and the share of users in each two of them."""
    if not coded.fields:
        return (), np.zeros((0, 0))
    starts = np.cumsum([0, *(len(f.labels) for f in coded.fields)])
    width = len(coded.fields)
    values = np.stack(coded.codes, axis=1) + starts[:-1]  # (n, F)
    shape = len(coded), int(starts[-1])
    ones = csr_array((np.ones(values.size), values.ravel(), np.arange(0, values.size + 1, width)), shape=shape)
    weighted = csr_array((np.repeat(coded.size, width), ones.indices, ones.indptr), shape=shape)
    both = (ones.T @ weighted).toarray() / coded.size.sum()
    membership = block_diag(*(f.membership for f in coded.fields))  # (S, values)
    return tuple(s for f in coded.fields for s in f.segments), membership @ both @ membership.T


def _ratios(cells: Cells, coded: Coded) -> _Ratios:
    return _Ratios.of(cells, coded.fields, coded.tags, one_row_per_unit=coded.one_row_per_unit)


# ── ratios ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Ratios:
    """Of C cells: all segments of all fields × all tags."""

    segments: tuple[Segment, ...]  # C
    tags: Codes  # (C,) positions in the tags
    n: Floats  # (C,) exposures
    clicks: Floats
    shown: Floats  # the same, weighted
    rate: Floats  # weighted clicks over `shown`; NaN where nothing was shown
    share: Floats  # of what everybody was `shown` of the tag; NaN where it was not
    click_share: Floats  # of everybody's weighted clicks on it
    independent: Floats  # as how many independent exposures those count
    value: Floats  # log preference; NaN where there are no clicks
    se: Floats  # of `drawn`
    drawn: Floats  # log preference as if there were LEAST_CLICKS at least; NaN where not even then
    z: Floats  # value / se, with the tails of a likelihood ratio; 0 where it is not looked at
    enough: NDArray[np.bool_]  # (C,) whether there is enough to look at it
    reach: float  # standard errors of an interval

    @classmethod
    def of(
        cls, cells: Cells, fields: Sequence[UserField], tags: Sequence[Tag], *, one_row_per_unit: bool = False
    ) -> _Ratios:
        """The ratios, and their errors by unit.

        Errors are those of the linearised ratio (delta method) over exposures, times a design effect by unit: the same
        by replicates (a linearised jackknife) over that by exposure, drawn to the one of all cells.
        """
        at = {parts: i for i, parts in enumerate(cells.tags)}
        chosen = np.array([0, *(at[tag.parts] for tag in tags)])
        everyone = _Table.of(cells, np.array([0]), chosen)
        n_tags, columns = len(tags), list[dict[str, Floats]]()
        segments: list[Segment] = []
        of_all = everyone.influence()
        whole = everyone.spread(of_all, of_all)
        all_by_replicate = None if one_row_per_unit else everyone.by_replicate(cells)
        place = {name: i for i, name in enumerate(cells.values)}
        for user in fields:
            for segment in user.segments:
                values = np.array([place.get((user.name, user.labels[v]), -1) for v in segment.values])
                table = _Table.of(cells, values, chosen)
                column = table.column(everyone)
                column["share"] = column["shown"] / everyone.shown[:, 1:].sum(axis=0)
                column["click_share"] = _over(column["weighted"], everyone.weighted[:, 1:].sum(axis=0))
                own = table.influence()
                column["variance"] = table.spread(own, own) - 2 * table.spread(own, of_all) + whole
                if all_by_replicate is not None:
                    by_replicate = ((table.by_replicate(cells) - all_by_replicate) ** 2).sum(axis=0)
                    column["by_replicate"] = by_replicate * REPLICATES / (REPLICATES - 1)
                columns.append(column)
                segments += [segment] * n_tags
        names = columns[0] if columns else {}
        c = {name: np.concatenate([column[name] for column in columns]) for name in names}
        return cls._tested(tuple(segments), np.tile(np.arange(n_tags), len(columns)), c)

    @classmethod
    def _tested(cls, segments: tuple[Segment, ...], tags: Codes, c: Mapping[str, Floats]) -> _Ratios:
        if not segments or not len(tags):
            none = np.zeros(0)
            return cls((), np.zeros(0, np.int64), *(none,) * 11, np.zeros(0, bool), 0.0)
        design_effect, reach = np.ones(len(tags)), float(stats.norm.isf((1 - LEVEL) / 2))
        with np.errstate(divide="ignore", invalid="ignore"):
            quarters = np.stack([
                c["expected"], c["alone"] - c["expected"], c["shown"] - c["expected"],
                c["others"] - c["alone"] + c["expected"],
            ])  # fmt: skip
            enough = (quarters.min(axis=0) * c["shown"] / c["square"] >= MIN_EXPECTED) & (c["variance"] > 1e-12)
            if "by_replicate" in c:
                reach = t_quantile(LEVEL)
                own = c["by_replicate"] / c["variance"]
                pooled = float(np.average(own[enough], weights=c["clicks"][enough])) if enough.any() else 1.0
                drawn_to = (c["clicks"] * own + POOLED_CLICKS * pooled) / (c["clicks"] + POOLED_CLICKS)
                design_effect = np.maximum(np.where(np.isfinite(own), drawn_to, pooled), LEAST_DESIGN_EFFECT)
            se = np.sqrt(c["variance"] * design_effect)
            # Of few clicks, the ratio's logarithm is skewed: tails are those of the likelihood ratio of the segment's
            # clicks with and without the tag.
            observed, expected, alone = c["weighted"], c["expected_here"], c["alone"]
            deviance = 2 * sum(
                o * np.log(np.maximum(o, 1e-12) / e)
                for o, e in ((observed, expected), (alone - observed, alone - expected))
            )
            wald = np.abs(np.log(observed / expected)) / np.sqrt(1 / observed - 1 / alone)
            tails = np.sqrt(np.maximum(deviance, 0)) / wald
            tails = np.where(np.isfinite(tails) & (wald > 1e-3), tails, 1.0)
            z = c["value"] / se * tails
            if "by_replicate" in c:  # the error itself is estimated, from as many replicates
                z = np.sign(z) * stats.norm.isf(stats.t.sf(np.abs(z), REPLICATES - 1))
            enough &= np.isfinite(z)
            rate = c["weighted"] / c["shown"]
            independent = np.where(c["n"] > 0, c["shown"] ** 2 / c["square"] / design_effect, 0.0)
        return cls(
            segments, tags, c["n"], c["clicks"], c["shown"], rate, c["share"], c["click_share"], independent,
            c["value"], se, c["drawn"],
            np.where(enough, z, 0.0), enough, reach,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Table:
    """Sums of the users with some base values by stratum and tag (S, 1 + T), column 0 over all tags."""

    values: Codes  # positions in the cells' values
    tags: Codes  # (1 + T,) positions in the cells' tags
    n: Floats
    clicks: Floats
    shown: Floats
    weighted: Floats
    square: Floats
    square_clicks: Floats

    @classmethod
    def of(cls, cells: Cells, values: Codes, tags: Codes) -> _Table:
        """Read off the cells."""
        return cls(values, tags, *(cells.by_stratum(name, values)[:, tags] for name in SUMS))

    @property
    def rate(self) -> Floats:
        """(S,) CTR over all tags; 0 where nobody saw anything."""
        return _over(self.weighted[:, 0], self.shown[:, 0])

    @property
    def expected(self) -> Floats:
        """(T,) clicks if every tag had the CTR of its stratum."""
        return np.asarray(self.rate @ self.shown[:, 1:])

    def influence(self) -> dict[tuple[int, int], Floats]:
        """(S, T) what an exposure does to the log of observed over expected clicks, by whether it carries the tag and
        whether it was clicked."""
        observed = np.maximum(self.weighted[:, 1:].sum(axis=0), LEAST_CLICKS)
        expected = np.where(self.expected > 0, self.expected, np.inf)
        rate = self.rate[:, None]
        share = _over(self.shown[:, 1:], np.broadcast_to(self.shown[:, :1], self.shown[:, 1:].shape))
        return {(x, y): x * y / observed - (rate * x + share * (y - rate)) / expected for x in (0, 1) for y in (0, 1)}

    def spread(self, a: Mapping[tuple[int, int], Floats], b: Mapping[tuple[int, int], Floats]) -> Floats:
        """(T,) Σ weight²·a·b over the exposures of this table, of two influences."""
        square, clicks = self.square, self.square_clicks
        amounts = {
            (1, 1): clicks[:, 1:], (1, 0): square[:, 1:] - clicks[:, 1:], (0, 1): clicks[:, :1] - clicks[:, 1:],
            (0, 0): square[:, :1] - square[:, 1:] - clicks[:, :1] + clicks[:, 1:],
        }  # fmt: skip
        return np.asarray(sum((amount * a[key] * b[key]).sum(axis=0) for key, amount in amounts.items()))

    def by_replicate(self, cells: Cells) -> Floats:
        """(64, T) what each replicate does to the log of observed over expected clicks."""
        place = np.full(len(cells.tags), -1)
        place[self.tags] = np.arange(len(self.tags))
        rows = np.flatnonzero(np.isin(cells.value, self.values) & (place[cells.tag] >= 0))
        stratum, replicate, tag = cells.stratum[rows], cells.replicate[rows], place[cells.tag[rows]]
        shown, clicks = (cells.sums[rows, SUMS.index(name)] for name in ("weight", "weighted_clicks"))
        width, rate = self.shown.shape[1], self.rate

        def total(amount: Floats) -> Floats:
            by = sums(replicate * width + tag, amount, size=REPLICATES * width)
            return np.asarray(by.reshape(REPLICATES, width)[:, 1:])

        every = np.flatnonzero(tag == 0)
        beyond = clicks[every] - rate[stratum[every]] * shown[every]
        size = len(cells.strata)
        by_stratum = sums(replicate[every] * size + stratum[every], beyond, size=REPLICATES * size)
        share = _over(self.shown[:, 1:], np.broadcast_to(self.shown[:, :1], self.shown[:, 1:].shape))
        expected = np.where(self.expected > 0, self.expected, np.inf)
        observed = np.maximum(self.weighted[:, 1:].sum(axis=0), LEAST_CLICKS)
        of_expected = total(shown * rate[stratum]) + by_stratum.reshape(REPLICATES, size) @ share
        return np.asarray(total(clicks) / observed - of_expected / expected)

    def column(self, everyone: _Table) -> dict[str, Floats]:
        """(T,) each: the cells' figures."""
        n, clicks, shown, weighted, square = (
            table.sum(axis=0) for table in (self.n, self.clicks, self.shown, self.weighted, self.square)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            of_all = everyone.weighted[:, 1:].sum(axis=0) / everyone.expected
            here = self.expected * of_all
            value = np.log(weighted[1:] / here)
            drawn = np.log(np.maximum(weighted[1:], LEAST_CLICKS) / here)
        return {
            "n": n[1:], "clicks": clicks[1:], "shown": shown[1:], "weighted": weighted[1:], "square": square[1:],
            "alone": np.full(len(here), weighted[0]), "others": np.full(len(here), shown[0]) - shown[1:],
            "expected": self.expected, "expected_here": here,
            "value": np.where(np.isfinite(value), value, np.nan), "drawn": np.where(np.isfinite(drawn), drawn, np.nan),
        }  # fmt: skip


def _over(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.divide(a, b, out=np.zeros(a.shape), where=b > 0))


# ── drawing to 1 ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Shrunk:
    """Log preferences of C cells given what those of their family are like."""

    families: tuple[tuple[str, str], ...]  # C × (field, dimension)
    value: Floats  # (C,) posterior mean; NaN where nothing is known of the cell
    low: Floats
    high: Floats
    prior_sd: Mapping[tuple[str, str], float]

    @classmethod
    def of(cls, ratios: _Ratios, fields: Sequence[UserField], tags: Sequence[Tag]) -> _Shrunk:
        """Parametric empirical Bayes (Morris 1983, doi:10.1080/01621459.1983.10477920): log preferences of a family,
        (user field, tag dimension), are N(0, τ²). How large τ may be is learnt from all families by marginal likelihood
        over a grid of τ, and of a family by its own; what stays unknown of it is averaged over, so that intervals are
        not too short for the families of few cells."""
        dimensions = ["+".join(sorted(tag.dimensions)) for tag in tags]
        families = tuple((s.field, dimensions[t]) for s, t in zip(ratios.segments, ratios.tags, strict=True))
        if not families:
            return cls((), *(np.zeros(0),) * 3, {})
        names = list(dict.fromkeys(families))
        at = {name: i for i, name in enumerate(names)}
        family = np.array([at[name] for name in families])
        seen = np.isfinite(ratios.drawn) & np.isfinite(ratios.se) & (ratios.se > 0)
        se = np.where(seen, ratios.se, np.nan)
        sd = np.hypot(se[:, None], PRIOR_SDS)  # (C, τ)
        likelihood = stats.norm.logpdf(ratios.drawn[:, None], 0, sd)
        # Cells of a family are not independent: values and tags sum to the whole, and halves are made of quarters.
        told = np.flatnonzero(seen & ratios.enough)
        count = np.bincount(family[told], minlength=len(names))
        free = np.array([_free(fields, tags, *name) for name in names])
        of_family = np.stack([sums(family[told], column, size=len(names)) for column in likelihood[told].T], axis=1)
        of_family *= np.minimum(free / np.maximum(count, 1), 1.0)[:, None]
        posterior = _mixture(of_family)[family]  # (C, τ)
        left = 1 / (1 / PRIOR_SDS**2 + 1 / (se**2)[:, None])
        mean, spread = left * (ratios.drawn / se**2)[:, None], np.sqrt(left)
        tail = (1 - LEVEL) / 2
        low, high = (_quantile(level, posterior, mean, spread) for level in (tail, 1 - tail))
        value = np.where(seen, (posterior * mean).sum(axis=1), np.nan)
        first = {name: int(np.flatnonzero(family == i)[0]) for i, name in enumerate(names)}
        prior_sd = {name: float(np.sqrt(posterior[i] @ PRIOR_SDS**2)) for name, i in first.items()}
        return cls(families, value, np.where(seen, low, np.nan), np.where(seen, high, np.nan), prior_sd)


def _free(fields: Sequence[UserField], tags: Sequence[Tag], field: str, dimension: str) -> int:
    """How many free parameters a family has: (values − 1) × (tags − 1), at least one."""
    values = next(len({v for s in f.segments for v in s.values}) for f in fields if f.name == field)
    alike = sum("+".join(sorted(tag.dimensions)) == dimension for tag in tags)
    return max(values - 1, 1) * max(alike - 1, 1)


def _mixture(log_likelihood: Floats) -> Floats:
    """(families, τ) what is known of each family's τ, from its log likelihood (families, τ) and the shares of τ among
    families that make all of them likeliest (expectation maximisation), with one family's worth of a flat prior."""
    likelihood = np.exp(log_likelihood - log_likelihood.max(axis=1, keepdims=True))
    share = np.full(likelihood.shape[1], 1 / likelihood.shape[1])
    posterior = likelihood * share
    for _ in range(ROUNDS):
        posterior = likelihood * share
        posterior /= posterior.sum(axis=1, keepdims=True)
        share = (posterior.sum(axis=0) + 1 / len(share)) / (len(posterior) + 1)
    return np.asarray(posterior)


def _quantile(level: float, weights: Floats, mean: Floats, sd: Floats) -> Floats:
    """(C,) a quantile of mixtures of normals (C, τ), by bisection."""
    low, high = (mean - 8 * sd).min(axis=1), (mean + 8 * sd).max(axis=1)
    for _ in range(40):
        middle = (low + high) / 2
        below = (weights * stats.norm.cdf(middle[:, None], mean, sd)).sum(axis=1) < level
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray((low + high) / 2)
