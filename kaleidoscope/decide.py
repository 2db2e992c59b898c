"""A decision: recall → rank → explore → assemble. Which variant a unit is shown, and with what probability.

Pure: the same release, request and key give the same answer, whatever the clock, the machine and the size of the
batch. How a release gets here, and who logs what was decided, is known elsewhere; docs/decisions.md has it in words.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kaleidoscope.buckets import assign, assign_many, keyed_digest
from kaleidoscope.content import Copy, Image, fill, parse_content, placeholders_in, values_from
from kaleidoscope.decision_record import DecisionRecord, Keyring, Reason, Value, canonical_values
from kaleidoscope.errors import ConflictError, InputError, NotFoundError
from kaleidoscope.interventions import MAX_REMEMBERED_IDS, Compiled, DescribedVariant, Resolution
from kaleidoscope.release import PolicyKind, PolicySpec, ReleaseContent
from kaleidoscope.vocabulary import Bucket

DRAW = "draw"  # the purpose of the derived key
IMAGE_PATH = "/v1/images/{business}/{file}.{type}"  # of the picture itself: what it shows never changes

MAX_SEEN = 20  # exposures that a fatigue feature counts
MAX_SEEN_TAGS = 64  # tag values of a release that have a fatigue feature
MAX_DETAIL = 500  # characters

# Logits closer than this are a tie, which goes to the first id. A matrix product rounds a row by the batch it is in, so
# a row in which a logit is within NOISE of that border is ranked again, alone: a batch decides as its requests would.
TIE = 1e-4  # of the largest logit, or of 1
NOISE = 3e-5
MAX_SCORES = 2**19  # per head, at once
FEW = 32  # units that are faster hashed one by one

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MODELS = (Bucket.MODEL, Bucket.CHALLENGER)


class NothingToShowError(ConflictError):
    """Rules block every variant for these requests (positions in the batch); the caller shows its own default."""

    code = "nothing_to_show"

    def __init__(self, message: str, requests: tuple[int, ...]) -> None:
        super().__init__(message)
        self.requests = requests


class Scorer(Protocol):
    """What a decision needs of a model. It may raise, TimeoutError where it is too slow: then others answer."""

    @property
    def version(self) -> str:
        """The name under which decisions record it."""

    def variant_side(self, variants: pa.Table) -> Any:
        """What is computed once for N variants: "variant_id", and a list-of-text column per tag dimension."""

    def features(self, columns: Mapping[str, Sequence[object]], rows: int) -> Any:
        """B users in their context, by field; fields may be missing, or be unknown to the model."""

    def score(self, features: Any, side: Any) -> NDArray[np.float32]:
        """(B, N) logits."""

    def score_heads(self, features: Any, side: Any) -> NDArray[np.float32]:
        """(M, B, N) logits of each head of an ensemble."""


# ── a release, prepared ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model and what it makes of the release's variants; `problem` says why it cannot rank."""

    version: str
    scorer: Scorer | None
    side: Any = None
    problem: str = ""


@dataclass(frozen=True, eq=False)
class Pool:
    """Variants to choose from, as positions in `Served.ids`."""

    positions: list[int]
    mask: NDArray[np.bool_]  # (N,)

    def without(self, positions: Iterable[int]) -> Pool:
        """The pool without some variants."""
        mask = self.mask.copy()
        mask[list(positions)] = False
        return Pool(np.flatnonzero(mask).tolist(), mask)


@dataclass(frozen=True, eq=False)
class Shown:
    """A material as it is sent: what is the same for everybody, and a copy that is not."""

    kind: str
    content: Mapping[str, Any]
    copy: Copy | None  # with placeholders that the request fills
    image: Image | None


@dataclass(frozen=True, eq=False)
class Served:
    """A release with everything that is the same for all of its decisions; N variants. Safe to share by threads."""

    content: ReleaseContent
    number: int
    content_hash: str
    ids: tuple[str, ...]  # sorted
    variants: Mapping[str, DescribedVariant]
    position: Mapping[str, int]
    shares: Mapping[Bucket, float]
    rules: Compiled
    segment_features: frozenset[str]  # that a rule asks for
    models: Mapping[Bucket, Loaded]  # of the buckets that a model serves
    last_good: Loaded | None
    best_single: str | None
    materials: Mapping[str, Shown]
    seen: Mapping[str, tuple[str, ...]]  # variant → its fatigue features
    _pools: dict[int, tuple[Resolution, Pool, Pool]] = field(default_factory=dict, repr=False)

    def pools(self, features: Mapping[str, Value], at: datetime) -> tuple[Resolution, Pool, Pool]:
        """What the rules leave for a user: in words, for the buckets of models, and for control and random."""
        user = {name: _segment_value(value) for name, value in features.items() if name in self.segment_features}
        resolution = self.rules.resolve(user, at)
        kept = self._pools.get(id(resolution))
        if kept is None:
            if len(self._pools) >= max(16, MAX_REMEMBERED_IDS // len(self.ids)):
                self._pools.clear()
            kept = (resolution, self._pool(resolution.eligible), self._pool(resolution.unpinned))
            self._pools[id(resolution)] = kept  # which holds the resolution, so nothing else gets its id
        return kept

    def chain(self, bucket: Bucket) -> tuple[Loaded, ...]:
        """The models that rank for a bucket, the next one where the one before it fails."""
        return tuple(model for model in (self.models.get(bucket), self.last_good) if model is not None)

    def policy(self, bucket: Bucket) -> PolicySpec:
        """How a bucket explores."""
        if bucket == Bucket.CHALLENGER and self.content.challenger is not None:
            return self.content.challenger.policy
        return self.content.policy

    def _pool(self, ids: Iterable[str]) -> Pool:
        mask = np.zeros(len(self.ids), bool)
        mask[[self.position[id] for id in ids]] = True
        return Pool(np.flatnonzero(mask).tolist(), mask)


def prepare(
    content: ReleaseContent,
    number: int,
    content_hash: str,
    *,
    scorer: Scorer | None = None,
    challenger: Scorer | None = None,
    last_good: Scorer | None = None,
    best_single: str | None = None,
) -> Served:
    """The release, ready to decide. Computes the variant side of every model, so it takes its time.

    A scorer that is None, or fails, is a model that is missing: decisions fall back, and say so. `best_single` is the
    variant that did best on average; one that is not in the release counts as unknown. Raises InputError where a copy
    holds a placeholder that the release does not.
    """
    variants = {variant.id: variant for variant in sorted(content.variants, key=lambda variant: variant.id)}
    table = variant_table(list(variants.values()))
    models = {}
    if content.model_version is not None:
        models[Bucket.MODEL] = _load(scorer, content.model_version, table)
    if content.challenger is not None:
        models[Bucket.CHALLENGER] = _load(challenger, content.challenger.model_version, table)
    return Served(
        content=content,
        number=number,
        content_hash=content_hash,
        ids=tuple(variants),
        variants=variants,
        position={id: position for position, id in enumerate(variants)},
        shares={bucket: getattr(content.shares, bucket) for bucket in Bucket},
        rules=Compiled(content.interventions, list(variants.values())),
        segment_features=frozenset(feature for rule in content.interventions for feature in rule.segment),
        models=models,
        last_good=None if last_good is None else _load(last_good, last_good.version, table),
        best_single=best_single if best_single in variants else None,
        materials={id: _shown(content, material.content) for id, material in content.materials.items()},
        seen=_seen_features(variants.values()),
    )


def variant_table(variants: Sequence[DescribedVariant]) -> pa.Table:
    """The variants as a model reads them: "variant_id", and a list-of-text column per tag dimension."""
    dimensions = sorted({dimension for variant in variants for dimension in variant.tags})
    columns = {"variant_id": pa.array([variant.id for variant in variants], pa.string())}
    for dimension in dimensions:
        lists = [list(variant.tags.get(dimension, ())) for variant in variants]
        columns[dimension] = pa.array(lists, pa.list_(pa.string()))
    return pa.table(columns)


def _load(scorer: Scorer | None, version: str, table: pa.Table) -> Loaded:
    if scorer is None:
        return Loaded(version, None, problem=f"model {version} is not loaded")
    try:
        return Loaded(scorer.version, scorer, scorer.variant_side(table))
    except Exception as error:  # whatever a broken model does, the release has to be served
        return Loaded(version, None, problem=_failed(version, error))


def _shown(content: ReleaseContent, raw: Mapping[str, Any]) -> Shown:
    parsed = parse_content(raw)
    copy = None
    if isinstance(parsed, Copy):
        from_request = {placeholder.name for placeholder in content.placeholders if placeholder.source == "request"}
        copy = parsed if placeholders_in(parsed) & from_request else None
        parsed = _filled(content, parsed, {})  # also finds placeholders that there are not
    image = parsed if isinstance(parsed, Image) else None
    return Shown(parsed.kind, parsed.model_dump(mode="json", exclude={"kind"}), copy, image)


def _filled(content: ReleaseContent, copy: Copy, values: Mapping[str, object]) -> Copy:
    known = values_from(content.placeholders, request=values, product=content.scene.product)
    return fill(copy, known, content.placeholders)


def _segment_value(value: Value) -> str:
    """A feature as a rule's segment writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return "" if value is None else str(value)  # no segment asks for the empty text


# ── requests and answers ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Request:
    """Whom to decide for, and what is known before the choice."""

    unit: str
    at: datetime  # with its time zone
    features: Mapping[str, Value] = field(default_factory=dict)  # of the user
    context: Mapping[str, Value] = field(default_factory=dict)
    exposures: Mapping[str, int] = field(default_factory=dict)  # variant → exposures in the frequency rule's window
    values: Mapping[str, object] = field(default_factory=dict)  # of placeholders that the request fills
    forced: str | None = None  # a variant that a tester asks for
    note: str = ""  # why too little is known of the user


@dataclass(frozen=True, eq=False)
class Decision:
    """What was decided; payload and token are made when somebody asks for them."""

    record: DecisionRecord
    request: Request
    served: Served = field(repr=False)
    keyring: Keyring = field(repr=False)

    @cached_property
    def token(self) -> str:
        """What events carry back."""
        return self.keyring.sign(self.record)

    @cached_property
    def payload(self) -> dict[str, Any]:
        """By slot: material `id`, `kind` and `content`, copies filled; an image has the `url` path of its picture.

        Only to be read: decisions share what they have in common.
        """
        materials = self.served.variants[self.record.variant].materials
        return {slot.name: self._sent(materials[slot.name]) for slot in self.served.content.scene.slots}

    @property
    def explanation(self) -> Any | None:
        """What the model that ranked says of the score of this variant; None: none ranked, or it explains nothing."""
        if self.record.model_version is None:
            return None
        return explain(self.served, self.request, self.record.variant, bucket=self.record.bucket)

    def _sent(self, material: str) -> dict[str, Any]:
        shown = self.served.materials[material]
        content = shown.content
        if shown.copy is not None:
            filled = _filled(self.served.content, shown.copy, self.request.values)
            content = filled.model_dump(mode="json", exclude={"kind"})
        elif shown.image is not None:
            file, media_type = shown.image.file, shown.image.media_type.removeprefix("image/")
            content = {**content, "url": IMAGE_PATH.format(business=self.record.business, file=file, type=media_type)}
        return {"id": material, "kind": shown.kind, "content": content}


@dataclass(slots=True)
class _Case:
    """A request on its way to a decision."""

    request: Request
    bucket: Bucket
    pool: Pool
    pinned: bool
    rested: tuple[str, ...]
    notes: list[str]
    skipped: int = 0  # models of the chain that had failed, in a replay
    ranked_by: Loaded | None = None
    best: list[int] | None = None  # the best position of each head


# ── deciding ────────────────────────────────────────────────────────────────────────────────────────────────────────


def bucket_seed(business: str, scene: str) -> str:
    """The seed that a scene's units are assigned to buckets with, in every release."""
    return f"{business}/{scene}/bucket"


def decide(served: Served, request: Request, *, keyring: Keyring, business: str, scene: str, window_s: int) -> Decision:
    """`decide_many` of one request."""
    return decide_many(served, [request], keyring=keyring, business=business, scene=scene, window_s=window_s)[0]


def decide_many(
    served: Served, requests: Sequence[Request], *, keyring: Keyring, business: str, scene: str, window_s: int
) -> list[Decision]:
    """The decisions, in the order of the requests, each as if it had been asked for alone.

    Equal requests within `window_s` seconds (windows begin at the epoch) get equal answers. Raises NothingToShowError
    where rules block everything for a request; InputError for a time without a zone, a feature that is no finite
    number, or a forced variant that the release does not have.
    """
    buckets = _buckets(served, bucket_seed(business, scene), [request.unit for request in requests])
    cases = [_recall(served, request, bucket) for request, bucket in zip(requests, buckets, strict=True)]
    _refuse_empty(served, cases)
    _rank(served, cases)
    return [_explore(served, case, keyring, None, business, scene, window_s) for case in cases]


def replay(record: DecisionRecord, served: Served, *, keyring: Keyring, window_s: int) -> Decision:
    """The decision that a logged one was, made again: same id, variant and propensity, bit by bit.

    `served` has to hold the same release and, where a model ranked, the same model; `window_s` has to be what it was.
    Raises InputError where it is not the release or the model, or the key that drew it is not in the ring any more.
    """
    if record.release_hash != served.content_hash:
        raise InputError(
            f"decision {record.id}: it was made from release {record.release} ({record.release_hash[:8]}), not from"
            f" {served.number} ({served.content_hash[:8]}). Prepare that one."
        )
    forced = record.variant if record.reason == Reason.FORCED else None
    request = Request(record.unit, record.at, record.features, record.context, forced=forced)
    bucket = _buckets(served, bucket_seed(record.business, record.scene), [record.unit])[0]
    case = _recall(served, request, bucket, rested=record.rested)
    _refuse_empty(served, [case])
    if record.reason.is_fallback:
        case.skipped = 1 if record.reason == Reason.FALLBACK_LAST_GOOD else len(served.chain(bucket))
    case.notes = [record.detail] if record.detail else []
    _rank(served, [case])
    version = None if case.ranked_by is None else case.ranked_by.version
    if version != record.model_version:
        raise InputError(
            f"decision {record.id}: it was ranked by {record.model_version or 'no model'}, and here by"
            f" {version or 'no model'}. Prepare the release with the models that it had."
        )
    return _explore(served, case, keyring, record.key, record.business, record.scene, window_s)


def _buckets(served: Served, seed: str, units: Sequence[str]) -> Sequence[Bucket]:
    if len(units) > FEW:
        return assign_many(served.shares, seed, units).tolist()  # type: ignore[no-any-return]
    return [assign(served.shares, seed, unit) for unit in units]


# ── recall ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _recall(served: Served, request: Request, bucket: Bucket, rested: Sequence[str] | None = None) -> _Case:
    """What may be chosen from; `rested` as it was logged, for a replay."""
    if request.forced is not None and request.forced not in served.position:
        raise NotFoundError(f"forced: release {served.number} has no variant {request.forced!r}. Name one that it has.")
    resolution, eligible, unpinned = served.pools(request.features, request.at)
    notes = [request.note] if request.note else []
    if bucket not in _MODELS and unpinned.positions:
        blocked = bucket == Bucket.CONTROL and not unpinned.mask[served.position[served.content.baseline]]
        return _Case(request, bucket, unpinned, False, (), [*notes, *["the baseline is blocked"] * blocked])
    # Blocks may leave nothing but what a pin saves from them; then that is shown in every bucket.
    case = _Case(request, bucket, eligible, resolution.pinned is not None, (), notes)
    if bucket not in _MODELS or request.forced is not None:
        return case
    if rested is None:
        rested, note = _rested(served, request, eligible)
        case.notes += note
    if rested:
        case.rested = tuple(rested)
        case.pool = eligible.without(served.position[id] for id in rested)
    return case


def _rested(served: Served, request: Request, pool: Pool) -> tuple[list[str], list[str]]:
    """The ids of a pool that the frequency rule leaves out, sorted, and what there is to say of it."""
    rule = served.content.frequency
    if rule is None or not request.exposures:
        return [], []
    tired = sorted(
        id
        for id, count in request.exposures.items()
        if count >= rule.max_exposures and (position := served.position.get(id)) is not None and pool.mask[position]
    )
    if tired and len(tired) == len(pool.positions):
        return [], [f"every candidate was seen {rule.max_exposures} times or more, so none rests"]
    return tired, []


def _refuse_empty(served: Served, cases: Sequence[_Case]) -> None:
    empty = tuple(n for n, case in enumerate(cases) if not case.pool.positions and case.request.forced is None)
    if empty:
        request = cases[empty[0]].request
        why = served.pools(request.features, request.at)[0].reason
        raise NothingToShowError(
            f"Nothing of release {served.number} may be shown to unit {request.unit!r}: {why}. Show your own default.",
            empty,
        )


# ── rank ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _rank(served: Served, cases: Sequence[_Case]) -> None:
    """Set the best candidates of every case that a model has to rank, and by which model."""
    for bucket in _MODELS:
        policy = served.policy(bucket).kind
        if policy == PolicyKind.UNIFORM:
            continue
        waiting = [case for case in cases if case.bucket == bucket and _needs_ranking(case)]
        for level, model in enumerate(served.chain(bucket)):
            asked = [case for case in waiting if case.skipped <= level]
            for case, best in zip(asked, _best(model, policy == PolicyKind.THOMPSON, asked), strict=True):
                if isinstance(best, str):
                    case.notes.append(best)
                else:
                    case.best, case.ranked_by = best, model
            waiting = [case for case in waiting if case.best is None]
            if not waiting:
                break


def _needs_ranking(case: _Case) -> bool:
    return case.request.forced is None and not (case.pinned and len(case.pool.positions) == 1)


def _best(model: Loaded, thompson: bool, cases: Sequence[_Case]) -> list[list[int] | str]:
    """Per case the best position under each head (one, but for Thompson), or why nobody knows."""
    if model.scorer is None:
        return [model.problem] * len(cases)
    found: list[list[int] | str] = []
    step = max(1, MAX_SCORES // len(cases[0].pool.mask)) if cases else 1
    for start in range(0, len(cases), step):
        found += _best_of_few(model, model.scorer, thompson, cases[start : start + step])
    return found


def _best_of_few(model: Loaded, scorer: Scorer, thompson: bool, cases: Sequence[_Case]) -> Sequence[list[int] | str]:
    requests = [case.request for case in cases]
    try:
        scores = _scores(scorer, model.side, requests, len(cases[0].pool.mask), heads=thompson)
    except TimeoutError as error:  # asking for each alone would take longer still
        return [_failed(model.version, error)] * len(cases)
    except Exception as error:  # whatever a broken model does, there has to be an answer
        if len(cases) == 1:
            return [_failed(model.version, error)]
        return [_best_of_few(model, scorer, thompson, [case])[0] for case in cases]
    first = cases[0].pool
    shared = all(case.pool is first for case in cases)
    mask = first.mask if shared else np.stack([case.pool.mask for case in cases])
    known = np.logical_and.reduce(np.isfinite(scores), axis=(0, 2))
    candidates = np.where(mask, scores, -np.inf)  # (M, B, N)
    top = np.where(known[:, None], candidates.max(axis=2, keepdims=True), 0)
    scale = np.maximum(1, np.abs(top))
    found: list[list[int] | str] = (candidates >= top - TIE * scale).argmax(axis=2).T.tolist()  # (B, M)
    for row in np.flatnonzero(~known).tolist():
        found[row] = f"model {model.version} failed: scores that are no numbers"
    if len(cases) > 1:
        surely = (candidates >= top - (TIE - NOISE) * scale).sum(axis=2)
        perhaps = (candidates >= top - (TIE + NOISE) * scale).sum(axis=2)
        for row in np.flatnonzero((surely != perhaps).any(axis=0)).tolist():
            found[row] = _best_of_few(model, scorer, thompson, [cases[row]])[0]
    return found


def _scores(
    scorer: Scorer, side: Any, requests: Sequence[Request], n_variants: int, *, heads: bool
) -> NDArray[np.float32]:
    """(M, B, N) logits; one head, their mean, unless `heads`."""
    columns = _columns(requests)
    features = scorer.features(columns, len(requests))
    scores = np.asarray(scorer.score_heads(features, side) if heads else scorer.score(features, side)[None])
    if scores.ndim != 3 or not len(scores) or scores.shape[1:] != (len(requests), n_variants):
        raise ValueError(f"scores of shape {scores.shape} for {len(requests)} requests and {n_variants} variants")
    return scores


def _columns(requests: Sequence[Request]) -> dict[str, list[object]]:
    """What is known of the requests, by field."""
    rows = [{**request.features, **request.context} for request in requests]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _failed(version: str, error: Exception) -> str:
    return f"model {version} failed: {type(error).__name__}: {error}"[:MAX_DETAIL]


# ── explore and assemble ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Choice:
    position: int
    propensity: float
    reason: Reason
    candidates: int = 1
    learn: bool = False


def _explore(
    served: Served, case: _Case, keyring: Keyring, key: str | None, business: str, scene: str, window_s: int
) -> Decision:
    """The decision of a case, drawn with a key of the ring (None: the current one)."""
    request = case.request
    key = keyring.current if key is None else key
    secret = keyring.derived(DRAW, key)
    inputs = keyed_digest(
        secret, business, scene, served.content_hash, request.unit, canonical_values(request.features),
        canonical_values(request.context), str((request.at - _EPOCH) // timedelta(seconds=window_s)),
        request.forced or "", *case.rested, size=48,
    )  # fmt: skip
    choice = _choose(served, case, inputs)
    variant = served.ids[choice.position]
    version = None if case.ranked_by is None else case.ranked_by.version
    # What came of it is part of the name: the same inputs fare otherwise where a model fails or has been replaced.
    outcome = (variant, choice.reason.value, version or "")
    record = DecisionRecord(
        id=keyed_digest(secret, inputs.hex(), *outcome, size=16).hex(),
        business=business,
        scene=scene,
        unit=request.unit,
        at=request.at.astimezone(UTC),
        bucket=case.bucket,
        variant=variant,
        propensity=choice.propensity,
        learn=choice.learn,
        reason=choice.reason,
        release=served.number,
        release_hash=served.content_hash,
        model_version=version,
        candidates=choice.candidates,
        features=dict(request.features),
        context=dict(request.context),
        rested=case.rested,
        key=key,
        detail="; ".join(case.notes)[:MAX_DETAIL],
    )
    return Decision(record, request, served, keyring)


def _choose(served: Served, case: _Case, inputs: bytes) -> _Choice:
    """The variant of a case, and the exact probability with which it is chosen over draws of the inputs' hash."""
    positions = case.pool.positions
    n = len(positions)
    if case.request.forced is not None:
        return _Choice(served.position[case.request.forced], 1.0, Reason.FORCED)
    if case.bucket == Bucket.CONTROL:
        baseline = served.position[served.content.baseline]
        if case.pool.mask[baseline]:
            return _Choice(baseline, 1.0, Reason.CONTROL)
        return _fallback(served, case.pool)
    explore, pick, head = (word >> 11 for word in struct.unpack(">3Q", inputs[:24]))  # 53 bits each
    uniform = case.bucket == Bucket.RANDOM or served.policy(case.bucket).kind == PolicyKind.UNIFORM
    if uniform:
        reason = Reason.PINNED if case.pinned else Reason.EXPLORED
        return _Choice(positions[int(pick * _UNIT * n)], 1 / n, reason, n, not case.pinned)
    if case.pinned and n == 1:
        return _Choice(positions[0], 1.0, Reason.PINNED)
    best = case.best
    if best is None:
        return _fallback(served, case.pool)
    epsilon = served.policy(case.bucket).epsilon
    if explore * _UNIT < epsilon:
        position, reason = positions[int(pick * _UNIT * n)], Reason.EXPLORED
    else:
        position, reason = best[int(head * _UNIT * len(best))], Reason.RANKED
    propensity = (1 - epsilon) * (best.count(position) / len(best)) + epsilon / n
    if case.ranked_by is not served.models[case.bucket]:
        return _Choice(position, propensity, Reason.FALLBACK_LAST_GOOD, n)
    if case.pinned:
        return _Choice(position, propensity, Reason.PINNED, n)
    return _Choice(position, propensity, reason, n, learn=True)


_UNIT = 2.0**-53


def _fallback(served: Served, pool: Pool) -> _Choice:
    """What is shown where neither model nor baseline can be: always the same one."""
    for id, reason in (
        (served.best_single, Reason.FALLBACK_BEST_SINGLE),
        (served.content.baseline, Reason.FALLBACK_BASELINE),
    ):
        if id is not None and pool.mask[served.position[id]]:
            return _Choice(served.position[id], 1.0, reason)
    return _Choice(pool.positions[0], 1.0, Reason.FALLBACK_ELIGIBLE)


# ── candidates, explanations, fatigue ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Candidate:
    """A variant that may be shown to a user; `score` is its logit, None: no model ranked."""

    variant: str
    score: float | None
    materials: Mapping[str, str]
    tags: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Ranking:
    """The first candidates for a user. No decision: nothing was drawn, so nothing can be learned from showing one."""

    candidates: tuple[Candidate, ...]  # the best first
    model_version: str | None
    detail: str  # what went wrong


def rank_top(served: Served, request: Request, k: int, *, bucket: Bucket = Bucket.MODEL) -> Ranking:
    """The k best variants that rules and frequency leave a user, as a bucket's model ranks them.

    For callers that choose among them themselves. Units of buckets control and random are to be shown what was decided
    for them, or the comparison of the buckets is lost. Where no model ranks, they stand in the order of the fallbacks.
    """
    if k < 1:
        raise InputError(f"k: {k} candidates are none. Ask for at least 1.")
    case = _recall(served, replace(request, forced=None), bucket if bucket in _MODELS else Bucket.MODEL)
    _refuse_empty(served, [case])
    positions = np.array(case.pool.positions)
    for model in served.chain(case.bucket):
        try:
            scores = _pool_scores(model, case.request, positions, len(served.ids))
        except Exception as error:  # as in _best_of_few
            case.notes.append(model.problem or _failed(model.version, error))
            continue
        order = np.argsort(-scores, kind="stable")[:k]
        chosen = zip(positions[order].tolist(), scores[order].tolist(), strict=True)
        return Ranking(
            tuple(_candidate(served, position, score) for position, score in chosen),
            model.version,
            "; ".join(case.notes),
        )
    first = _fallback(served, case.pool).position
    rest = [position for position in case.pool.positions if position != first]
    candidates = tuple(_candidate(served, position, None) for position in [first, *rest][:k])
    return Ranking(candidates, None, "; ".join(case.notes))


def _pool_scores(model: Loaded, request: Request, positions: NDArray[np.int64], n_variants: int) -> NDArray[np.float32]:
    if model.scorer is None:
        raise ValueError(model.problem)
    scores: NDArray[np.float32] = _scores(model.scorer, model.side, [request], n_variants, heads=False)[0, 0, positions]
    if not np.isfinite(scores).all():
        raise ValueError("scores that are no numbers")
    return scores


def _candidate(served: Served, position: int, score: float | None) -> Candidate:
    variant = served.variants[served.ids[position]]
    return Candidate(variant.id, score, variant.materials, variant.tags)


def explain(served: Served, request: Request, variant: str, *, bucket: Bucket = Bucket.MODEL) -> Any | None:
    """What the bucket's model says of its score of a variant for a user; None where it explains nothing.

    Raises NotFoundError for a variant that the release does not have.
    """
    if variant not in served.position:
        raise NotFoundError(f"Release {served.number} has no variant {variant!r}.")
    model = served.models.get(bucket)
    explainer = getattr(model.scorer, "explain", None) if model is not None and model.scorer is not None else None
    if model is None or model.scorer is None or explainer is None:
        return None
    features = model.scorer.features(_columns([request]), 1)
    return explainer(features, model.side, 0, served.position[variant])


def fatigue_features(recent: Mapping[str, int], served: Served) -> dict[str, int]:
    """How often a unit lately saw each tag value, from its exposures per variant: user features for `Request.features`.

    They are called `seen.DIMENSION=VALUE`, count up to 20, and are there only from 1 on. A release has at most 64 of
    them, those that most of its variants have; variants that it does not have count for nothing.
    """
    counts: Counter[str] = Counter()
    for variant, count in recent.items():
        if count > 0:
            for name in served.seen.get(variant, ()):
                counts[name] += count
    return {name: min(counts[name], MAX_SEEN) for name in sorted(counts)}


def _seen_features(variants: Iterable[DescribedVariant]) -> dict[str, tuple[str, ...]]:
    names = {
        variant.id: [f"seen.{dimension}={value}" for dimension, values in variant.tags.items() for value in values]
        for variant in variants
    }
    counts = Counter(name for of_variant in names.values() for name in of_variant)
    kept = set(sorted(counts, key=lambda name: (-counts[name], name))[:MAX_SEEN_TAGS])
    return {id: tuple(name for name in of_variant if name in kept) for id, of_variant in names.items()}
