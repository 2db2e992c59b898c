"""What models say of single exposures, added up to segment × tag; and why a model gives one variant to one user.

Two models are asked: trees grown here, by their SHAP values, and the exported CTR network, by its exact field × tag
terms. What they see is no evidence: effects, intervals and q-values are those of method 1. docs/attribution.md says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit, logit
from threadpoolctl import threadpool_limits

from attribution.coding import MAX_VALUES, Coded
from attribution.insights import Attribution, Candidate, Diagnostics, Insight, confirm, halves
from attribution.logistic import Sums, fit
from attribution.scoring import auc_of, features_of, rows_of
from kaleidoscope.encoding import Features
from kaleidoscope.errors import InputError, NotFoundError
from kaleidoscope.log import Codes, Floats, Log, sums
from kaleidoscope.ranker import Ranker
from kaleidoscope.vocabulary import Method

TREES = 30  # of a family
LEAVES = 6  # of a tree
RATE = 0.2
LEAST_INFORMATION = 10.0  # Σ p(1 − p) in a leaf: expected clicks, about
MAX_TAGS = 64  # of a family that trees are grown on, those shown most
NOTICED = 1.5  # standard errors, from which on a contribution is worth confirming
MAX_ROWS = 200_000  # exposures whose terms of the network are averaged; more would change no mean that matters
MOST_TERMS = 4  # named in a sentence about one decision
LEAST_LOGIT = 0.01  # of the network's, from which on a preference is one: odds that differ by a hundredth


@dataclass(frozen=True)
class ContributionResult:
    """What a model's contributions lead to."""

    insights: tuple[Insight, ...]  # `importance` is the model's own: logits, with their sign
    diagnostics: Diagnostics  # of what confirmed them
    candidates: tuple[Candidate, ...]  # what the model proposes
    importance: tuple[tuple[str, str, float], ...]  # field, dimension, mean |contribution| in logits; largest first
    auc: float | None  # on exposures that the model did not learn from; None where there are none

    def to_json(self) -> dict[str, object]:
        """As `models` of summary.json holds it: how well the model ranks, and which pairs it leans on."""
        names = ("field", "dimension", "mean_size")
        return {"auc": self.auc, "pairs": [dict(zip(names, row, strict=True)) for row in self.importance]}


# ── families ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Family:
    """A user field and the tags that speak about the same dimensions."""

    field: int
    dimensions: frozenset[str]
    tags: tuple[int, ...]
    patterns: NDArray[
        np.int8
    ]  # (patterns, tags) the different sets that variants carry, of all tags that share a dimension
    of_variant: Codes  # (N,) which one each variant has

    @property
    def name(self) -> str:
        return " × ".join(sorted(self.dimensions))

    def cell(self, coded: Coded) -> Codes:
        """(n,) base value × pattern of each exposure."""
        return coded.codes[self.field] * len(self.patterns) + self.of_variant[coded.variant]


def _families(coded: Coded) -> list[_Family]:
    shown = np.asarray(sums(coded.variant, coded.size, size=coded.carried.shape[0]) @ coded.carried)
    fields = [f for f, field in enumerate(coded.fields) if field.segments]
    found = []
    for dimensions in dict.fromkeys(tag.dimensions for tag in coded.tags):
        own = tuple(t for t, tag in enumerate(coded.tags) if tag.dimensions == dimensions)
        beside = [t for t, tag in enumerate(coded.tags) if tag.dimensions & dimensions]
        beside = sorted(sorted(beside, key=lambda t: -shown[t])[:MAX_TAGS])
        carried = coded.carried[:, beside].astype(np.int8).toarray()
        patterns, of_variant = np.unique(carried, axis=0, return_inverse=True)
        found += [_Family(f, dimensions, own, patterns, of_variant.ravel()) for f in fields]
    return sorted(found, key=lambda family: family.field)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a model makes of a family: contributions to the logit, without what field and tag do by themselves."""

    family: _Family
    pairs: Floats  # (segments, tags of the family)
    importance: float  # mean |contribution| over exposures, by base value


def _seen(data: Sums, family: _Family, amount: Floats) -> _Seen:
    """Contributions (n,), averaged over segment × tag and centred in both: what is left of a cell's mean without its
    segment's and its tag's."""
    coded, tags = data.coded, list(family.tags)
    user, codes = coded.fields[family.field], coded.codes[family.field]
    n, total = (data.by_tag(codes, len(user.labels), a)[:, tags] for a in (coded.size, coded.size * amount))
    n_all, total_all = (sums(codes, a, size=len(user.labels)) for a in (coded.size, coded.size * amount))

    def centred(member: Floats) -> Floats:
        left = _mean(member @ total, member @ n) - _mean(total.sum(axis=0), n.sum(axis=0))
        left = left - (_mean(member @ total_all, member @ n_all) - total_all.sum() / n_all.sum())[:, None]
        return np.where(member @ n > 0, left, 0.0)

    by_value = np.abs(centred(np.eye(len(user.labels))))
    return _Seen(family, centred(user.membership), float((n * by_value).sum() / max(n.sum(), 1e-12)))


def _mean(total: Floats, n: Floats) -> Floats:
    return np.asarray(np.divide(total, n, out=np.zeros_like(total), where=n > 0))


def _candidates(
    coded: Coded, seen: Sequence[_Seen], firm: Sequence[NDArray[np.bool_]], proposed: Sequence[bool]
) -> tuple[Candidate, ...]:
    """Every pair of the families that are proposed, and of those of the same field that share a dimension with them:
    what is to be told apart from a preference has to be looked at beside it. Contributions that are not `firm`
    (segments, tags) are too near to 0 to have a sign, and are not told."""
    kept = [one.family for one, found in zip(seen, proposed, strict=True) if found]
    return tuple(
        Candidate(segment, tag, float(one.pairs[i, j]) if sure[i, j] else None)
        for one, sure in zip(seen, firm, strict=True)
        if any(one.family.field == other.field and one.family.dimensions & other.dimensions for other in kept)
        for i, segment in enumerate(coded.fields[one.family.field].segments)
        for j, tag in enumerate(one.family.tags)
    )


def _importance(coded: Coded, seen: Sequence[_Seen]) -> tuple[tuple[str, str, float], ...]:
    rows = [(coded.fields[one.family.field].name, one.family.name, one.importance) for one in seen]
    return tuple(sorted(rows, key=lambda row: (-row[2], row[:2])))


def _some(n: int) -> Codes:
    """Rows to average over, of n."""
    rows = np.arange(n)
    return rows if n <= MAX_ROWS else np.sort(np.random.default_rng(0).choice(rows, MAX_ROWS, replace=False))


# ── trees ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def lightgbm_contributions(coded: Coded, *, seed: int = 0) -> ContributionResult:
    """What SHAP values of trees lead to (`pred_contrib`; Lundberg et al. 2020, doi:10.1038/s42256-019-0138-9).

    The trees are grown on half of the units, upon the logits of main effects and strata. Every family (user field, tag
    dimension) has a few of its own, because trees are greedy, and where field and tag matter only together neither
    invites the first cut; the strongest family goes first, and the next ones see what it leaves. A family is proposed
    where a contribution of it is larger than noise often is. Method 1 judges what is proposed on the other half.
    """
    first, second = halves(coded)
    families = _families(coded)
    if not families or not len(first) or not len(second):
        return ContributionResult((), confirm(second, (), Method.CONTRIBUTIONS).diagnostics, (), (), None)
    with threadpool_limits(1, "blas"):
        data = Sums(first)
        null = fit(data, first.reward)
        grown = _grown(first, families, logit(null.probability), seed)
        seen = [_seen(data, family, said[family.cell(first)]) for family, said in zip(families, grown, strict=True)]
        whole = [_beside(data, one, families, grown) for one in seen]
        curvature = first.size * null.probability * (1 - null.probability)
        proposed = [bool(_noticed(data, one, curvature).any()) for one in seen]
        candidates = _candidates(coded, whole, [_noticed(data, one, curvature) for one in whole], proposed)
        found = confirm(second, candidates, Method.CONTRIBUTIONS)
        score = Sums(second).linear(null.columns, null.strata)
        for family, cells in zip(families, grown, strict=True):
            score += cells[family.cell(second)]
    auc = auc_of(second, score)
    return ContributionResult(tuple(found.insights), found.diagnostics, candidates, _importance(coded, seen), auc)


def _grown(coded: Coded, families: Sequence[_Family], offset: Floats, seed: int) -> list[Floats]:
    """Per family, what its trees say of each cell."""
    score, excess = offset.copy(), []
    for family in families:
        gradient, curvature = _sums_of(coded, family, score)
        seen = curvature > 0
        excess.append(float((gradient[seen] ** 2 / curvature[seen]).sum() - seen.sum()))
    said: list[Floats] = [np.zeros(0)] * len(families)
    for i in sorted(range(len(families)), key=lambda i: -excess[i]):
        gradient, curvature = _sums_of(coded, families[i], score)
        said[i] = _contributions(coded, families[i], gradient, curvature, seed)
        score += said[i][families[i].cell(coded)]
    return said


def _beside(data: Sums, seen: _Seen, families: Sequence[_Family], grown: Sequence[Floats]) -> _Seen:
    """What all trees say of a family's pairs: also those of its field with tags that share a dimension. Of two families
    that can say the same, one says it first, and leaves nothing to the other."""
    own = seen.family
    near = [i for i, f in enumerate(families) if f.field == own.field and f.dimensions & own.dimensions]
    if len(near) == 1:
        return seen
    return _seen(data, own, np.sum([grown[i][families[i].cell(data.coded)] for i in near], axis=0))


def _contributions(coded: Coded, family: _Family, gradient: Floats, curvature: Floats, seed: int) -> Floats:
    """(cells,) the SHAP values of field and tags, added. Each has its half of what the two do together: averaged over
    segment × tag, the tags' columns less their average over everybody are half of the centred sum (.46 to .61 of it in
    simulated worlds, correlated .998), so that nothing but the scale would differ. The sum is in whole logits, as γ and
    the network's terms are.

    Trees are grown on sums by cell, which are all that a tree can ask of the exposures: near the logits so far the log
    loss is quadratic, and its minimum in a leaf is Σ gradient / Σ curvature, a weighted mean of the cells.
    """
    import lightgbm

    out, cells = np.zeros(len(curvature)), np.flatnonzero(curvature > 0)
    if curvature.sum() < 2 * LEAST_INFORMATION:
        return out
    parameters = {
        "objective": "regression", "boost_from_average": False, "num_leaves": LEAVES, "learning_rate": RATE,
        "min_data_in_leaf": 1, "min_data_in_bin": 1, "min_sum_hessian_in_leaf": LEAST_INFORMATION,
        "max_cat_to_onehot": MAX_VALUES + 2, "feature_pre_filter": False, "num_threads": 1, "seed": seed,
        "deterministic": True, "force_row_wise": True, "verbosity": -1,
    }  # fmt: skip
    x, weight = _design(coded, family, cells), curvature[cells]
    text = [0] if coded.fields[family.field].edges is None else []
    data = lightgbm.Dataset(x, gradient[cells] / weight, weight=weight, categorical_feature=text, params=parameters)
    trees = lightgbm.train(parameters, data, num_boost_round=TREES)
    values = np.asarray(
        trees.predict(x, pred_contrib=True, num_threads=1), dtype=np.float64
    )  # (cells, columns, then the base value)
    out[cells] = values[:, :-1].sum(axis=1)
    return out


def _design(coded: Coded, family: _Family, cells: Codes) -> NDArray[np.float32]:
    """(cells, 1 + tags): the base value, of numbers in order and NaN where missing; then which tags are carried."""
    user, (value, pattern) = coded.fields[family.field], divmod(cells, len(family.patterns))
    missing = np.full(len(cells), user.edges is not None) & (value == len(user.labels) - 1)
    return np.column_stack([np.where(missing, np.nan, value), family.patterns[pattern]]).astype(np.float32)


def _sums_of(coded: Coded, family: _Family, score: Floats) -> tuple[Floats, Floats]:
    """(cells,) and (cells,): gradient and curvature of the log likelihood at these logits (n,)."""
    p, cell = expit(score), family.cell(coded)
    cells = len(coded.fields[family.field].labels) * len(family.patterns)
    gradient, curvature = coded.size * (coded.reward - p), coded.size * p * (1 - p)
    return sums(cell, gradient, size=cells), sums(cell, curvature, size=cells)


def _noticed(data: Sums, seen: _Seen, curvature: Floats) -> NDArray[np.bool_]:
    """(segments, tags) whether a contribution is NOTICED standard errors from 0, of a cell that is centred in both."""
    coded, f, tags = data.coded, seen.family.field, list(seen.family.tags)
    codes, member = coded.codes[f], coded.fields[f].membership
    cell = member @ data.by_tag(codes, data.widths[f], curvature)[:, tags]
    segment = (member @ sums(codes, curvature, size=data.widths[f]))[:, None] / curvature.sum()
    tag = data.by_tag(np.zeros(len(coded), np.int64), 1, curvature)[0, tags] / curvature.sum()
    left = np.maximum((1 - segment) * (1 - tag), 1e-12)
    return np.asarray(np.abs(seen.pairs) * np.sqrt(cell / left) >= NOTICED)


# ── the network ─────────────────────────────────────────────────────────────────────────────────────────────────────


def network_contributions(log: Log, coded: Coded, ranker: Ranker, statistics: Attribution) -> ContributionResult:
    """What the exact field × tag terms of an exported network say of what method 1 found; its deep part has no such
    terms and is left out.

    `coded` is `code(log)`, `statistics` what method 1 found there. The network learned from these very exposures, or
    may have: it has no test of its own, and adds no finding. An insight of it is one of method 1, with method 1's
    effect, interval and q-value, of which it has an opinion: `importance`, above 0 where it says that the segment takes
    to the tag, below where it says the opposite. Of what is not among its insights it says hardly anything.

    Raises InputError where the network knows none of the log's user fields or tags.
    """
    log = rows_of(log, coded)
    rows = _some(len(coded))
    some, families = coded.take(rows), _families(coded)
    data, amounts = Sums(some), _of_network(log.take(rows), some, families, ranker)
    found = [_seen(data, family, amount) for family, amount in zip(families, amounts, strict=True)]
    firm = [np.abs(one.pairs) >= LEAST_LOGIT for one in found]
    candidates = _candidates(coded, found, firm, [bool(sure.any()) for sure in firm])
    own = {(c.segment, c.tag): c.importance for c in candidates if c.importance is not None}
    told = tuple(
        replace(insight, methods=(Method.NETWORK,), importance={Method.NETWORK: own[pair]})
        for insight, pair in zip(statistics.insights, statistics.diagnostics.selected, strict=True)
        if pair in own
    )
    return ContributionResult(told, statistics.diagnostics, candidates, _importance(coded, found), None)


def _of_network(log: Log, coded: Coded, families: Sequence[_Family], ranker: Ranker) -> Iterator[Floats]:
    """(n,) per family, the terms of its field and its dimensions' tags."""
    encoder = ranker.signature.encoder
    field = {f.name: i for i, f in enumerate(encoder.fields)}
    dimension = {d.name: i for i, d in enumerate(encoder.dimensions)}
    users, tags = {f.name for f in coded.fields}, {d for tag in coded.tags for d in tag.dimensions}
    if not (users & field.keys() and tags & dimension.keys()):
        raise InputError(
            f"model {ranker.version}: it knows the fields {sorted(field)} and the tags {sorted(dimension)}, the log has"
            f" {sorted(users)} and {sorted(tags)}. Give a model of this scene."
        )
    terms = ranker.pair_terms(features_of(log, ranker), ranker.variant_side(log.variants), log.variant)
    for family in families:
        f = field.get(coded.fields[family.field].name)
        columns = [dimension[d] for d in family.dimensions if d in dimension]
        yield np.zeros(len(log)) if f is None else terms[:, f, columns].sum(axis=1, dtype=np.float64)


# ── one decision ────────────────────────────────────────────────────────────────────────────────────────────────────

MODEL_ONLY = (
    "These are the model's reasons for its score. They are not proven preferences: what exposures support, with"
    " intervals, are the insights."
)


@dataclass(frozen=True)
class Term:
    """A part of what a variant's logit has over the average variant's. Of the variant alone it has no field."""

    part: str  # interaction, variant, residual (what is this variant's own) or deep (several fields and tags together)
    field: str | None
    value: str | None  # of the field, as a person reads it
    dimension: str | None
    tag: str | None  # that the variant carries
    logit: float

    @property
    def name(self) -> str:
        """What it is about, in words."""
        if self.part == "interaction":
            return f"{self.field}={self.value} with {self.dimension}={self.tag}"
        if self.part == "variant":
            return f"{self.dimension}={self.tag} for everybody"
        own = "the variant itself, beyond its tags"
        return own if self.part == "residual" else "several features and tags together"


@dataclass(frozen=True)
class Why:
    """Why a model gives a variant its score for a user, against the average of the variants it was compared with."""

    model: str
    variant_id: str
    compared: int  # variants, this one among them
    rank: int  # of this one, from 1
    best: str  # the variant with the highest score
    score: float  # logit
    average: float  # of the logits of all
    user: float  # in every variant's logit, so that it decides nothing: the user, their context, and the intercept
    terms: tuple[Term, ...]  # that add up to score − average, largest first

    @property
    def sentences(self) -> tuple[str, ...]:
        """It in words, which speak of the model's score and of nothing else."""
        mine, mean = (f"{100 * float(expit(logit)):.3g} %" for logit in (self.score, self.average))
        among = f"number {self.rank} of {self.compared} variants" if self.compared > 1 else "the only variant"
        said = [f"The model expects a click on {self.variant_id} with {mine}: {among}; the average one has {mean}."]
        for sign, words in ((1, "Raised"), (-1, "Lowered")):
            some = [term for term in self.terms if term.logit * sign >= LEAST_LOGIT][:MOST_TERMS]
            if some:
                listed = "; ".join(f"{term.name} ({_odds(term.logit)})" for term in some)
                said.append(f"{words} against the average by {listed}.")
        if len(said) == 1:
            said.append("For this user the model tells it hardly apart from the average variant.")
        return (*said, MODEL_ONLY)

    def to_json(self) -> dict[str, object]:
        """Plain values: logits, and their sentences."""
        return asdict(self) | {"terms": [asdict(term) for term in self.terms], "sentences": list(self.sentences)}


def explain_decision(ranker: Ranker, features: Features, variants: pa.Table, variant_id: str | None = None) -> Why:
    """Why the model gives this variant its score for one user; None: for the variant that it likes best.

    `features` is one encoded user, `variants` what they might have been shown, as `Ranker.variant_side` takes them.
    Raises NotFoundError for a variant that is not among them, InputError for other than one user.
    """
    if len(features) != 1 or not len(variants):
        raise InputError(f"explain_decision: {len(features)} users and {len(variants)} variants; give one and some.")
    side, encoder = ranker.variant_side(variants), ranker.signature.encoder
    scores = ranker.score(features, side)[0].astype(np.float64)
    best = int(np.argmax(scores))
    if variant_id is not None and variant_id not in side.ids:
        raise NotFoundError(f"variant {variant_id!r}: not among the {len(side):,} variants that were compared.")
    chosen = best if variant_id is None else side.ids.index(variant_id)
    parts = ranker.explain(features, side, 0, chosen)
    pairs = ranker.pair_terms(features, side, np.arange(len(side))).astype(np.float64)  # (N, F, D)
    effects = side.effects.astype(np.float64)  # (E, N): per dimension, per pair of them, the residual
    values = [field.label(int(code)) for field, code in zip(encoder.fields, features.codes[0], strict=True)]
    shown = _shown(ranker, side.tags.indices[side.tags.indptr[chosen] : side.tags.indptr[chosen + 1]])
    names = [(d.name, tag) for d, tag in zip(encoder.dimensions, shown, strict=True)]
    crossed = [
        (f"{names[a][0]} × {names[b][0]}", f"{names[a][1]} × {names[b][1]}")
        for a, b in ranker.signature.dimension_pairs
    ]
    own, over = effects[:, chosen] - effects.mean(axis=1), pairs[chosen] - pairs.mean(axis=0)
    terms = [Term("variant", None, None, *name, float(x)) for name, x in zip([*names, *crossed], own[:-1], strict=True)]
    terms.append(Term("residual", None, None, None, None, float(own[-1])))
    terms += [
        Term("interaction", field.name, value, *name, float(x))
        for field, value, row in zip(encoder.fields, values, over, strict=True)
        for name, x in zip(names, row, strict=True)
    ]
    user = sum(part.logit for part in parts if part.part in ("intercept", "user"))
    deep = scores - user - effects.sum(axis=0) - pairs.sum(axis=(1, 2))
    if ranker.signature.hidden:
        terms.append(Term("deep", None, None, None, None, float(deep[chosen] - deep.mean())))
    return Why(
        model=ranker.version,
        variant_id=side.ids[chosen],
        compared=len(side),
        rank=1 + int((scores > scores[chosen]).sum()),
        best=side.ids[best],
        score=float(scores[chosen]),
        average=float(scores.mean()),
        user=user,
        terms=tuple(sorted((term for term in terms if term.logit), key=lambda term: -abs(term.logit))),
    )


def _shown(ranker: Ranker, tags: NDArray[np.int32]) -> list[str]:
    """Per dimension, the tags that a variant carries."""
    carried = [ranker.signature.tag_names[t] for t in tags.tolist()]
    return [", ".join(tag for name, tag in carried if name == d.name) for d in ranker.signature.encoder.dimensions]


def _odds(logit: float) -> str:
    percent = 100 * float(np.expm1(logit))
    return f"odds {percent:+.0f} %" if abs(percent) >= 9.5 else f"odds {percent:+.1f} %"
