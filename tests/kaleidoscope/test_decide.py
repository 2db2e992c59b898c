from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare

from kaleidoscope import decide as module
from kaleidoscope.buckets import assign
from kaleidoscope.content import DEFAULT_PLACEHOLDERS
from kaleidoscope.decide import (
    MAX_SEEN,
    MAX_SEEN_TAGS,
    Decision,
    NothingToShowError,
    Request,
    Scorer,
    Served,
    decide,
    decide_many,
    explain,
    fatigue_features,
    prepare,
    rank_top,
    replay,
    variant_table,
)
from kaleidoscope.decision_record import DecisionRecord, Keyring, Reason
from kaleidoscope.errors import InputError, NotFoundError
from kaleidoscope.interventions import DescribedVariant, Rule
from kaleidoscope.release import (
    Challenger,
    Frequency,
    MaterialSnapshot,
    PolicyKind,
    PolicySpec,
    ReleaseContent,
    SceneSnapshot,
    Shares,
    SlotSnapshot,
)
from kaleidoscope.vocabulary import Bucket, InterventionKind, MaterialKind

T0 = datetime(2026, 1, 1, tzinfo=UTC)
HASH = "a" * 64
PICTURE = "b" * 64
N = 6
HOUR = 3600
KEYS = Keyring({"k1": b"0123456789abcdef"})
ROTATED = Keyring({"k2": b"another 16 bytes", "k1": b"0123456789abcdef"})
PIN, BLOCK = InterventionKind.PIN, InterventionKind.BLOCK
GREEDY, THOMPSON, UNIFORM = PolicyKind.EPSILON_GREEDY, PolicyKind.THOMPSON, PolicyKind.UNIFORM

# What five heads say of v0 … v5 for everybody: v3 is best by the mean, three heads prefer it, two prefer v5.
HEADS = np.array([[0, 0, 0, 2, 0, 1]] * 3 + [[0, 0, 0, 1, 0, 1.5]] * 2, np.float32)


class Fixed:
    """A scorer of known logits, (M, N), to which `tilt` adds (age − 40) for v1; `breaks` runs before it scores."""

    def __init__(self, heads: NDArray[np.float32] = HEADS, version: str = "ctr-7", *, tilt: float = 0.0) -> None:
        self.version = version
        self.heads = heads
        self.tilt = tilt
        self.calls = 0
        self.breaks: Callable[[Mapping[str, Sequence[Any]], int], None] = lambda columns, rows: None

    def variant_side(self, variants: pa.Table) -> list[int]:
        return [int(id.removeprefix("v")) for id in variants["variant_id"].to_pylist()]

    def features(self, columns: Mapping[str, Sequence[Any]], rows: int) -> NDArray[np.float32]:
        self.calls += 1
        self.breaks(columns, rows)
        return np.array([40 if age is None else age for age in columns.get("age", [None] * rows)], np.float32)

    def score_heads(self, features: NDArray[np.float32], side: list[int]) -> NDArray[np.float32]:
        scores = np.repeat(self.heads[:, None, side], len(features), axis=1)
        scores[:, :, side.index(1)] += self.tilt * (features - 40)
        return scores

    def score(self, features: NDArray[np.float32], side: list[int]) -> NDArray[np.float32]:
        return self.score_heads(features, side).mean(axis=0, dtype=np.float32)


class Wobbly(Fixed):
    """A scorer that rounds by the size of the batch, as a matrix product does."""

    def score_heads(self, features: NDArray[np.float32], side: list[int]) -> NDArray[np.float32]:
        scores = super().score_heads(features, side)
        wobble = np.random.default_rng(len(features)).uniform(-1e-6, 1e-6, scores.shape)
        return (scores + wobble).astype(np.float32)


def broken(*args: Any) -> None:
    raise RuntimeError("the graph is torn")


def slow(*args: Any) -> None:
    raise TimeoutError("took more than 50 ms")


def rule(id: str, kind: InterventionKind, target: dict[str, Any], **fields: Any) -> Rule:
    return Rule(id=id, kind=kind, target=target, created_at=T0, **fields)


def only(bucket: Bucket) -> dict[str, Any]:
    """A plan whose traffic all goes to one bucket."""
    plan: dict[str, Any] = {"shares": Shares(**{bucket: 1.0}), "without_random": "a test"}
    if bucket == Bucket.CHALLENGER:
        plan["challenger"] = Challenger(model_version="ctr-8", policy=PolicySpec(kind=THOMPSON, epsilon=0.3))
    return plan


def content(**changes: Any) -> ReleaseContent:
    """Two copies and a picture, a layout and a style for v0 … v5, all traffic to bucket model."""
    copies = {
        "c0": {"kind": "copy", "title": "Hello {first_name}", "button": "Only {yield} {{now}}"},
        "c1": {"kind": "copy", "title": "Now {yield}"},
    }
    materials = {id: MaterialSnapshot(kind=MaterialKind.COPY, content=c, content_hash=id) for id, c in copies.items()}
    image = {"kind": "image", "file": PICTURE, "media_type": "image/jpeg", "width": 300, "height": 200, "alt": "gold"}
    shown = {"type": "text", "show": "copy.title", "font_size": 20}
    layout = {"kind": "layout", "width": 400, "height": 100, "root": shown}
    style = {"kind": "style", "property": "color", "value": "#ff0000", "applies_to": "copy.button"}
    materials |= {
        raw["kind"]: MaterialSnapshot(kind=MaterialKind(raw["kind"]), content=raw, content_hash=raw["kind"])
        for raw in (image, layout, style)
    }
    variants = tuple(
        DescribedVariant(
            id=f"v{i}",
            materials={"copy": f"c{i % 2}", "image": "image", "layout": "layout", "style": "style"},
            tags={"tone": (("warm", "cool")[i % 2],)} | ({"subject": ("gold", "person")} if i < 2 else {}),
        )
        for i in range(N)
    )
    kinds = {"copy": "copy", "image": "image", "layout": "layout", "style": "style"}
    fields: dict[str, Any] = {
        **only(Bucket.MODEL),
        "model_version": "ctr-7",
        "scene": SceneSnapshot(
            id="welcome",
            name="Welcome",
            product={"yield": "3.85%"},
            slots=tuple(SlotSnapshot(name=name, kind=MaterialKind(kind)) for name, kind in kinds.items()),
        ),
        "taxonomy": 1,
        "variants": variants,
        "materials": materials,
        "baseline": "v2",
        "interventions": (),
        "placeholders": DEFAULT_PLACEHOLDERS,
    }
    return ReleaseContent(**fields | changes)


def served(scorer: Scorer | None = None, *, with_model: bool = True, **changes: Any) -> Served:
    options = {name: changes.pop(name) for name in ("challenger_scorer", "last_good", "best_single") if name in changes}
    options["challenger"] = options.pop("challenger_scorer", None)
    model = Fixed() if scorer is None and with_model else scorer
    return prepare(content(**changes), 3, HASH, scorer=model, **options)


def ask(release: Served, request: Request | None = None, *, keyring: Keyring = KEYS, **changes: Any) -> Decision:
    request = replace(request or Request("unit-1", T0), **changes)
    return decide(release, request, keyring=keyring, business="acme", scene="welcome", window_s=HOUR)


def ask_many(release: Served, requests: Sequence[Request], keyring: Keyring = KEYS) -> list[Decision]:
    return decide_many(release, requests, keyring=keyring, business="acme", scene="welcome", window_s=HOUR)


def crowd(n: int, **fields: Any) -> list[Request]:
    return [Request(f"unit-{i}", T0, **fields) for i in range(n)]


def same(a: DecisionRecord, b: DecisionRecord) -> None:
    assert asdict(a) == asdict(b)


# ── exact propensities, against simulation ──────────────────────────────────────────────────────────────────────────


BEST_SHARE = {"v3": 3 / 5, "v5": 2 / 5}  # of the heads
BLOCK_3 = rule("no-3", BLOCK, {"variant": "v3"})
PIN_COOL = rule("cool", PIN, {"tag": {"tone": "cool"}})


def mixed(epsilon: float, best: Mapping[str, float], among: Sequence[str]) -> dict[str, float]:
    return {id: (1 - epsilon) * best.get(id, 0.0) + epsilon / len(among) for id in among}


ALL = [f"v{i}" for i in range(N)]
WITHOUT_3 = [id for id in ALL if id != "v3"]
CASES: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, float]]] = {
    "random": (only(Bucket.RANDOM), {}, mixed(1, {}, ALL)),
    "random, blocked": (only(Bucket.RANDOM) | {"interventions": (BLOCK_3,)}, {}, mixed(1, {}, WITHOUT_3)),
    "random knows no pins": (only(Bucket.RANDOM) | {"interventions": (PIN_COOL,)}, {}, mixed(1, {}, ALL)),
    "random never rests": (
        only(Bucket.RANDOM) | {"frequency": Frequency(max_exposures=1)}, {"v3": 9}, mixed(1, {}, ALL),
    ),
    "uniform": ({"policy": PolicySpec(kind=UNIFORM)}, {}, mixed(1, {}, ALL)),
    "greedy": ({"policy": PolicySpec(kind=GREEDY, epsilon=0.2)}, {}, mixed(0.2, {"v3": 1}, ALL)),
    "greedy, blocked": (
        {"policy": PolicySpec(kind=GREEDY, epsilon=0.2), "interventions": (BLOCK_3,)}, {},
        mixed(0.2, {"v5": 1}, WITHOUT_3),
    ),
    "greedy, pinned": (
        {"policy": PolicySpec(kind=GREEDY, epsilon=0.2), "interventions": (PIN_COOL,)}, {},
        mixed(0.2, {"v3": 1}, ["v1", "v3", "v5"]),
    ),
    "greedy, rested": (
        {"policy": PolicySpec(kind=GREEDY, epsilon=0.2), "frequency": Frequency(max_exposures=3)},
        {"v3": 3, "v5": 4, "v0": 2, "gone": 7}, mixed(0.2, {"v0": 1}, ["v0", "v1", "v2", "v4"]),
    ),
    "thompson": ({"policy": PolicySpec(kind=THOMPSON, epsilon=0.1)}, {}, mixed(0.1, BEST_SHARE, ALL)),
    "thompson, rested": (
        {"policy": PolicySpec(kind=THOMPSON, epsilon=0.1), "frequency": Frequency(max_exposures=3)},
        {"v5": 3}, mixed(0.1, {"v3": 1}, [id for id in ALL if id != "v5"]),
    ),
    "challenger": (only(Bucket.CHALLENGER), {}, mixed(0.3, BEST_SHARE, ALL)),
    "last good": ({"policy": PolicySpec(kind=THOMPSON, epsilon=0.5), "broken": True}, {}, mixed(0.5, BEST_SHARE, ALL)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_propensity_is_the_share_of_draws_that_come_out_so(name: str) -> None:
    changes, exposures, expected = CASES[name]
    scorer = Fixed()
    if changes.get("broken"):
        scorer.breaks = slow
    rest = {key: value for key, value in changes.items() if key != "broken"}
    release = served(scorer, challenger_scorer=Fixed(version="ctr-8"), last_good=Fixed(version="ctr-6"), **rest)
    n = 6_000
    records = [d.record for d in ask_many(release, crowd(n, exposures=exposures))]
    for record in records:
        assert record.propensity == pytest.approx(expected[record.variant], abs=1e-15)
        assert record.candidates == len(expected)
    counts = Counter(record.variant for record in records)
    observed = [counts[id] for id in expected]
    assert chisquare(observed, [n * p for p in expected.values()]).pvalue > 0.001
    # What every estimator rests on: the weights sum to the number of candidates, on average.
    weights = np.array([1 / record.propensity for record in records])
    assert abs(weights.mean() - len(expected)) < 4 * weights.std() / np.sqrt(n) + 1e-9


@given(
    heads=st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.00001]), min_size=N, max_size=N), min_size=1, max_size=4),
    kind=st.sampled_from(PolicyKind),
    epsilon=st.floats(0.01, 1),
    blocked=st.sets(st.sampled_from(ALL), max_size=N - 1),
    tired=st.sets(st.sampled_from(ALL)),
)
@settings(max_examples=60, deadline=None)
def test_the_propensities_of_all_candidates_sum_to_one(
    heads: list[list[float]], kind: PolicyKind, epsilon: float, blocked: set[str], tired: set[str]
) -> None:
    rules = tuple(rule(f"no-{id}", BLOCK, {"variant": id}) for id in sorted(blocked))
    policy = PolicySpec(kind=kind, epsilon=epsilon)
    scorer = Fixed(np.array(heads, np.float32))
    release = served(scorer, policy=policy, interventions=rules, frequency=Frequency(max_exposures=1))
    left = set(ALL) - blocked
    candidates = left - tired or left
    claimed: dict[str, set[float]] = {}
    for decision in ask_many(release, crowd(300, exposures=dict.fromkeys(tired, 1))):
        record = decision.record
        assert record.variant in candidates and record.learn and record.candidates == len(candidates)
        assert record.rested == (tuple(sorted(left & tired)) if candidates != left else ())
        claimed.setdefault(record.variant, set()).add(record.propensity)
    assert all(
        len(values) == 1 and min(values) >= epsilon / len(candidates) * (1 - 1e-12) for values in claimed.values()
    )
    if epsilon > 0.5:  # then everything was drawn
        assert sum(min(values) for values in claimed.values()) == pytest.approx(1, abs=1e-12)


# ── buckets and their reasons ───────────────────────────────────────────────────────────────────────────────────────


def test_units_stay_in_the_bucket_that_the_scenes_seed_gives_them() -> None:
    shares = Shares(control=0.2, random=0.2, model=0.4, challenger=0.2)
    release = served(
        shares=shares, challenger=Challenger(model_version="ctr-8"), challenger_scorer=Fixed(version="ctr-8")
    )
    requests = crowd(200)
    for request, decision in zip(requests, ask_many(release, requests), strict=True):
        record = decision.record
        by_bucket = {bucket: getattr(shares, bucket) for bucket in Bucket}
        assert record.bucket == assign(by_bucket, "acme/welcome/bucket", request.unit)
        assert record.bucket == ask(release, request, at=T0 + timedelta(days=9), features={"age": 3}).record.bucket
        match record.bucket:
            case Bucket.CONTROL:
                assert (record.variant, record.propensity, record.learn) == ("v2", 1.0, False)
                assert (record.reason, record.model_version, record.candidates) == (Reason.CONTROL, None, 1)
            case Bucket.RANDOM:
                assert (record.propensity, record.learn, record.reason) == (1 / N, True, Reason.EXPLORED)
                assert record.model_version is None
            case Bucket.MODEL | Bucket.CHALLENGER:
                assert record.learn and record.reason in (Reason.RANKED, Reason.EXPLORED)
                assert record.model_version == ("ctr-7" if record.bucket == Bucket.MODEL else "ctr-8")
                assert record.reason == Reason.EXPLORED or record.variant == "v3"
    assert {d.record.bucket for d in ask_many(release, requests)} == set(Bucket)


def test_a_record_holds_all_that_a_replay_or_an_estimate_needs() -> None:
    at = datetime(2026, 1, 1, 13, 30, tzinfo=timezone(timedelta(hours=1)))
    record = ask(served(), at=at, features={"age": 41}, context={"hour": 12}).record
    assert len(record.id) == 32 and int(record.id, 16)
    same(
        record,
        DecisionRecord(
            id=record.id, business="acme", scene="welcome", unit="unit-1", at=datetime(2026, 1, 1, 12, 30, tzinfo=UTC),
            bucket=Bucket.MODEL, variant=record.variant, propensity=record.propensity, learn=True,
            reason=record.reason, release=3, release_hash=HASH, model_version="ctr-7", candidates=N,
            features={"age": 41}, context={"hour": 12}, key="k1",
        ),
    )  # fmt: skip


def test_the_model_sees_features_and_context_and_what_is_missing() -> None:
    seen: list[Mapping[str, Sequence[Any]]] = []
    scorer = Fixed()
    scorer.breaks = lambda columns, rows: seen.append(columns)
    a = Request("a", T0, features={"age": 30, "city": "Bath"}, context={"hour": 7})
    b = Request("b", T0, features={"age": None}, context={"hour": 8, "day": "mon"})
    ask_many(served(scorer), [a, b])
    assert seen == [{"age": [30, None], "city": ["Bath", None], "hour": [7, 8], "day": [None, "mon"]}]


def test_a_bucket_of_policy_uniform_asks_no_model() -> None:
    scorer = Fixed()
    record = ask(served(scorer, policy=PolicySpec(kind=UNIFORM))).record
    assert scorer.calls == 0 and record.model_version is None and record.reason == Reason.EXPLORED


def test_a_tie_goes_to_the_first_id_wherever_it_stands() -> None:
    tied = Fixed(np.array([[0, 1, 1, 0, 1, 0]], np.float32))
    variants = content().variants
    for order in (variants, tuple(reversed(variants))):
        release = served(tied, variants=order, policy=PolicySpec(epsilon=0.01))
        ranked = {d.record.variant for d in ask_many(release, crowd(50)) if d.record.reason == Reason.RANKED}
        assert ranked == {"v1"}


def test_logits_within_rounding_of_each_other_are_a_tie() -> None:
    near = Fixed(np.array([[0, 2, 2 + 1e-5, 0, 2 + 2e-4, 0]], np.float32), tilt=0.0)
    assert {d.record.variant for d in ask_many(served(near), crowd(50)) if d.record.reason == Reason.RANKED} == {"v1"}
    apart = Fixed(np.array([[0, 2, 2 + 1e-5, 0, 2 + 3e-4, 0]], np.float32))
    assert {d.record.variant for d in ask_many(served(apart), crowd(50)) if d.record.reason == Reason.RANKED} == {"v4"}


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_a_pin_decides_teaches_nothing() -> None:
    release = served(interventions=(PIN_COOL,))
    records = [d.record for d in ask_many(release, crowd(100))]
    assert {record.variant for record in records} == {"v1", "v3", "v5"}
    assert {(record.reason, record.learn, record.model_version) for record in records} == {
        (Reason.PINNED, False, "ctr-7")
    }
    uniform = served(interventions=(PIN_COOL,), policy=PolicySpec(kind=UNIFORM))
    assert {(d.record.reason, d.record.learn) for d in ask_many(uniform, crowd(20))} == {(Reason.PINNED, False)}


def test_a_single_pinned_variant_is_shown_even_without_a_model() -> None:
    scorer = Fixed()
    scorer.breaks = broken
    record = ask(served(scorer, interventions=(rule("one", PIN, {"variant": "v4"}),))).record
    assert (record.variant, record.propensity, record.reason, record.detail) == ("v4", 1.0, Reason.PINNED, "")
    assert scorer.calls == 0 and not record.learn


def test_pins_do_not_reach_control_and_random() -> None:
    one = (rule("one", PIN, {"variant": "v4"}),)
    assert ask(served(interventions=one, **only(Bucket.CONTROL))).record.variant == "v2"
    drawn = ask_many(served(interventions=one, **only(Bucket.RANDOM)), crowd(100))
    assert {d.record.variant for d in drawn} == set(ALL) and all(d.record.learn for d in drawn)


@pytest.mark.parametrize(
    ("best_single", "shown", "reason"),
    [
        ("v5", "v5", Reason.FALLBACK_BEST_SINGLE),
        ("v2", "v0", Reason.FALLBACK_ELIGIBLE),
        (None, "v0", Reason.FALLBACK_ELIGIBLE),
        ("gone", "v0", Reason.FALLBACK_ELIGIBLE),
    ],
)
def test_control_falls_back_where_the_baseline_is_blocked(best_single: str | None, shown: str, reason: Reason) -> None:
    rules = (rule("no-2", BLOCK, {"variant": "v2"}),)
    release = served(interventions=rules, best_single=best_single, **only(Bucket.CONTROL))
    records = [d.record for d in ask_many(release, crowd(20))]
    assert {(r.variant, r.reason, r.propensity, r.learn, r.detail) for r in records} == {
        (shown, reason, 1.0, False, "the baseline is blocked")
    }


def test_a_rule_for_a_segment_knows_numbers_and_truth_by_their_text() -> None:
    rules = (rule("no-30", BLOCK, {"tag": {"tone": "warm"}}, segment={"age": "30", "member": "true"}),)
    release = served(interventions=rules, **only(Bucket.RANDOM))

    def candidates(**features: Any) -> int:
        return ask(release, features=features).record.candidates

    for age in (30, 30.0, "30"):
        assert candidates(age=age, member=True) == candidates(age=age, member="true") == 3
    for other in ({"age": 30, "member": False}, {"age": 30.5, "member": True}, {"age": None, "member": True}, {}):
        assert candidates(**other) == N


def test_a_rule_holds_in_its_window() -> None:
    rules = (rule("ban", BLOCK, {"variant": "v3"}, ends_at=T0 + timedelta(hours=1)),)
    release = served(interventions=rules)
    assert ask(release).record.candidates == N - 1
    assert ask(release, at=T0 + timedelta(hours=1)).record.candidates == N


@pytest.mark.parametrize("bucket", Bucket)
def test_where_everything_is_blocked_the_caller_is_told_to_show_its_own(bucket: Bucket) -> None:
    rules = (
        rule("ban-warm", BLOCK, {"tag": {"tone": "warm"}}, segment={"age": "30"}),
        rule("ban-cool", BLOCK, {"tag": {"tone": "cool"}}),
    )
    release = served(interventions=rules, challenger_scorer=Fixed(), **only(bucket))
    requests = [Request("a", T0), Request("b", T0, features={"age": 30}), Request("c", T0, features={"age": "30"})]
    with pytest.raises(NothingToShowError, match=r"unit 'b': every variant is blocked, by .*'ban-cool'") as caught:
        ask_many(release, requests)
    assert caught.value.requests == (1, 2) and caught.value.code == "nothing_to_show"
    assert ask(release, requests[0]).record.variant in ("v0", "v2", "v4")


@pytest.mark.parametrize("bucket", Bucket)
def test_what_only_a_pin_saves_from_the_blocks_is_shown_in_every_bucket(bucket: Bucket) -> None:
    rules = tuple(rule(f"ban-{tone}", BLOCK, {"tag": {"tone": tone}}) for tone in ("warm", "cool"))
    rules += (rule("but", PIN, {"variant": "v4"}, priority=1),)
    release = served(interventions=rules, challenger_scorer=Fixed(), **only(bucket))
    record = ask(release).record
    assert (record.variant, record.propensity, record.learn) == ("v4", 1.0, False)
    assert record.reason == (Reason.FALLBACK_ELIGIBLE if bucket == Bucket.CONTROL else Reason.PINNED)


# ── frequency ───────────────────────────────────────────────────────────────────────────────────────────────────────

TWICE = Frequency(max_exposures=2)


def test_a_variant_rests_once_it_was_seen_often_enough() -> None:
    release = served(frequency=TWICE, policy=PolicySpec(epsilon=0.01))
    ranked = [d.record for d in ask_many(release, crowd(30, exposures={"v3": 1}))]
    assert {r.variant for r in ranked if r.reason == Reason.RANKED} == {"v3"} and ranked[0].rested == ()
    ranked = [d.record for d in ask_many(release, crowd(30, exposures={"v3": 2, "v0": 7, "gone": 9}))]
    assert {r.variant for r in ranked if r.reason == Reason.RANKED} == {"v5"}
    assert {(r.rested, r.learn) for r in ranked} == {(("v0", "v3"), True)}
    assert ask(served(), exposures={"v3": 100}).record.rested == ()


def test_the_last_variant_never_rests() -> None:
    seen = dict.fromkeys(ALL, 2)
    record = ask(served(frequency=TWICE), exposures=seen).record
    assert record.rested == () and record.candidates == N and record.learn
    assert record.detail == "every candidate was seen 2 times or more, so none rests"
    blocked = served(frequency=TWICE, interventions=(PIN_COOL,))
    assert ask(blocked, exposures={"v1": 2, "v3": 2, "v5": 2}).record.candidates == 3
    assert ask(blocked, exposures={"v1": 2, "v3": 2}).record.variant == "v5"


def test_control_and_random_never_rest() -> None:
    for bucket, n in ((Bucket.CONTROL, 1), (Bucket.RANDOM, N)):
        record = ask(served(frequency=TWICE, **only(bucket)), exposures={"v2": 5}).record
        assert (record.rested, record.candidates) == ((), n)


# ── fallbacks ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Corrupt(Fixed):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def variant_side(self, variants: pa.Table) -> list[int]:
        if self.how == "side":
            raise RuntimeError("no such graph")
        return super().variant_side(variants)

    def score(self, features: NDArray[np.float32], side: list[int]) -> NDArray[np.float32]:
        scores = super().score(features, side)
        match self.how:
            case "nan":
                scores[:, 4] = np.nan
            case "inf":
                scores[:, 4] = np.inf
            case "shape":
                return scores[:, :-1]
            case "flat":
                return scores[0]
            case "raise":
                broken()
            case "slow":
                slow()
        return scores


BROKEN = [
    (None, "model ctr-7 is not loaded"),
    ("side", "model ctr-7 failed: RuntimeError: no such graph"),
    ("raise", "model ctr-7 failed: RuntimeError: the graph is torn"),
    ("slow", "model ctr-7 failed: TimeoutError: took more than 50 ms"),
    ("nan", "model ctr-7 failed: scores that are no numbers"),
    ("inf", "model ctr-7 failed: scores that are no numbers"),
    ("shape", "model ctr-7 failed: ValueError: scores of shape (1, 1, 5) for 1 requests and 6 variants"),
    ("flat", "model ctr-7 failed: ValueError: scores of shape (1, 6) for 1 requests and 6 variants"),
]


@pytest.mark.parametrize(("how", "detail"), BROKEN)
def test_where_the_model_fails_there_is_an_answer_that_says_so(how: str | None, detail: str) -> None:
    scorer = None if how is None else Corrupt(how)

    def fallen(**options: Any) -> DecisionRecord:
        record = ask(served(scorer, with_model=False, **options)).record
        assert not record.learn and record.detail.startswith(detail) and record.reason.is_fallback
        return record

    good = fallen(last_good=Fixed(version="ctr-6"), best_single="v5")
    assert (good.reason, good.model_version) == (Reason.FALLBACK_LAST_GOOD, "ctr-6")
    both = fallen(last_good=Corrupt("nan"), best_single="v5")
    assert (both.reason, both.variant, both.model_version) == (Reason.FALLBACK_BEST_SINGLE, "v5", None)
    assert both.propensity == 1 and both.candidates == 1
    assert both.detail == f"{detail}; model ctr-7 failed: scores that are no numbers"
    base = fallen()
    assert (base.reason, base.variant) == (Reason.FALLBACK_BASELINE, "v2")
    blocked = fallen(interventions=(rule("no-2", BLOCK, {"variant": "v2"}),))
    assert (blocked.reason, blocked.variant) == (Reason.FALLBACK_ELIGIBLE, "v0")
    pinned = fallen(interventions=(PIN_COOL,), best_single="v2")
    assert (pinned.reason, pinned.variant) == (Reason.FALLBACK_ELIGIBLE, "v1")


def test_a_fallback_rests_what_the_rule_says() -> None:
    record = ask(served(with_model=False, best_single="v5", frequency=TWICE), exposures={"v5": 2}).record
    assert (record.reason, record.variant, record.rested) == (Reason.FALLBACK_BASELINE, "v2", ("v5",))


def test_the_last_good_model_also_stands_in_for_the_challenger() -> None:
    record = ask(served(last_good=Fixed(version="ctr-6"), **only(Bucket.CHALLENGER))).record
    assert (record.reason, record.bucket, record.model_version) == (
        Reason.FALLBACK_LAST_GOOD,
        Bucket.CHALLENGER,
        "ctr-6",
    )
    assert record.detail == "model ctr-8 is not loaded"


def test_one_request_that_a_model_cannot_take_does_not_take_the_batch_with_it() -> None:
    def picky(columns: Mapping[str, Sequence[Any]], rows: int) -> None:
        if "old" in columns["age"]:
            raise InputError("column 'age' was numeric in training")

    scorer = Fixed()
    scorer.breaks = picky
    requests = crowd(9, features={"age": 41})
    requests[4] = replace(requests[4], features={"age": "old"})
    release = served(scorer)
    records = [d.record for d in ask_many(release, requests)]
    assert [r.reason.is_fallback for r in records] == [n == 4 for n in range(9)]
    for request, record in zip(requests, records, strict=True):
        same(record, ask(release, request).record)

    class Spotty(Fixed):
        def score(self, features: NDArray[np.float32], side: list[int]) -> NDArray[np.float32]:
            return np.where(features[:, None] == 99, np.float32(np.nan), super().score(features, side))

    requests[4] = replace(requests[4], features={"age": 99})
    reasons = [d.record.reason.is_fallback for d in ask_many(served(Spotty()), requests)]
    assert reasons == [n == 4 for n in range(9)]


def test_a_model_that_is_too_slow_is_asked_once_a_batch() -> None:
    scorer = Fixed()
    scorer.breaks = slow
    ask_many(served(scorer), crowd(50))
    assert scorer.calls == 1


# ── forced ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bucket", Bucket)
def test_a_tester_gets_what_he_asks_for_and_it_teaches_nothing(bucket: Bucket) -> None:
    rules = tuple(rule(f"ban-{tone}", BLOCK, {"tag": {"tone": tone}}) for tone in ("warm", "cool"))
    release = served(interventions=rules, with_model=False, frequency=TWICE, **only(bucket))
    record = ask(release, forced="v4", exposures={"v4": 9}).record
    assert (record.variant, record.propensity, record.learn, record.reason) == ("v4", 1.0, False, Reason.FORCED)
    assert (record.bucket, record.candidates, record.detail, record.rested) == (bucket, 1, "", ())
    free = ask(served(frequency=TWICE, **only(bucket)), forced="v4", exposures={"v4": 9, "v1": 9}).record
    assert (free.variant, free.rested, free.reason) == ("v4", (), Reason.FORCED)
    with pytest.raises(NotFoundError, match="release 3 has no variant 'v9'"):
        ask(release, forced="v9")


# ── the same input, the same answer ─────────────────────────────────────────────────────────────────────────────────

FIELDS = st.dictionaries(
    st.sampled_from(["age", "city", "member"]),
    st.none() | st.integers(0, 99) | st.floats(0, 99) | st.booleans(),
    max_size=3,
)
REQUESTS = st.builds(
    Request,
    unit=st.text(max_size=6),
    at=st.datetimes(datetime(2026, 1, 1), datetime(2026, 1, 3), timezones=st.just(UTC)),
    features=FIELDS,
    context=st.dictionaries(st.sampled_from(["hour"]), st.integers(0, 23)),
    exposures=st.dictionaries(st.sampled_from(ALL), st.integers(0, 3)),
    forced=st.none() | st.none() | st.none() | st.sampled_from(ALL),
)
RULES = (
    rule("no-2", BLOCK, {"variant": "v2"}, segment={"age": "30"}),
    rule("cool", PIN, {"tag": {"tone": "cool"}}, segment={"member": "true"}),
    rule("late", BLOCK, {"variant": "v3"}, starts_at=T0 + timedelta(days=1)),
)
MIXED: dict[str, Any] = {
    "shares": Shares(control=0.2, random=0.2, model=0.4, challenger=0.2),
    "challenger": Challenger(model_version="ctr-8", policy=PolicySpec(kind=THOMPSON, epsilon=0.3)),
    "interventions": RULES,
    "frequency": Frequency(max_exposures=2),
}
CLOSE = np.array([[0, 1, 1.0001, 1.0001, 0.9999, 1], [1.0001, 1, 0, 1, 1.0002, 1]], np.float32)  # on the border of TIE
BREAKS: dict[str, Callable[[Mapping[str, Sequence[Any]], int], None]] = {
    "whole": lambda columns, rows: None,
    "broken": broken,
}


def mixed_release(health: str, last: str) -> Served:
    def scorer(version: str, how: str) -> Fixed:
        found = Wobbly(CLOSE, version, tilt=1e-5)
        found.breaks = BREAKS[how]
        return found

    return served(
        scorer("ctr-7", health), challenger_scorer=scorer("ctr-8", health), last_good=scorer("ctr-6", last), **MIXED
    )


RELEASES = {(a, b): mixed_release(a, b) for a in BREAKS for b in BREAKS}


@given(requests=st.lists(REQUESTS, min_size=1, max_size=50), health=st.sampled_from(sorted(RELEASES)))
@settings(max_examples=80, deadline=None)
def test_a_batch_decides_as_its_requests_would_alone(requests: list[Request], health: tuple[str, str]) -> None:
    release = RELEASES[health]
    together = ask_many(release, requests)
    for request, decision in zip(requests, together, strict=True):
        same(ask(release, request).record, decision.record)
    for again, decision in zip(ask_many(release, requests[::-1])[::-1], together, strict=True):
        same(again.record, decision.record)


@given(requests=st.lists(REQUESTS, min_size=1, max_size=8), health=st.sampled_from(sorted(RELEASES)))
@settings(max_examples=80, deadline=None)
def test_a_logged_decision_replays_bit_by_bit_also_after_its_key_was_replaced(
    requests: list[Request], health: tuple[str, str]
) -> None:
    release = RELEASES[health]
    for decision in ask_many(release, requests):
        logged = replace(
            decision.record,
            features=json.loads(json.dumps(decision.record.features)),
            context=json.loads(json.dumps(decision.record.context)),
        )
        for keyring in (KEYS, ROTATED):
            again = replay(logged, RELEASES["whole", "whole"], keyring=keyring, window_s=HOUR)
            same(again.record, decision.record)
        assert KEYS.read(decision.token).decision == logged.id


def test_a_batch_that_is_longer_than_one_product_is_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    release = RELEASES["whole", "whole"]
    requests = [Request(f"u{i}", T0, features={"age": i}) for i in range(100)]
    whole = [d.record for d in ask_many(release, requests)]
    monkeypatch.setattr(module, "MAX_SCORES", 7 * N)
    for a, b in zip(ask_many(release, requests), whole, strict=True):
        same(a.record, b)


def test_rules_for_many_segments_are_not_remembered_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = tuple(rule(f"r{i}", BLOCK, {"variant": "v0"}, segment={"age": str(i)}) for i in range(40))
    release = served(interventions=rules, **only(Bucket.RANDOM))
    monkeypatch.setattr(module, "MAX_REMEMBERED_IDS", 0)
    for i in (*range(40), *range(40)):
        assert ask(release, features={"age": i}).record.candidates == N - 1
        assert len(release._pools) <= 16
    assert ask(release).record.candidates == N


def test_a_decisions_id_names_its_inputs() -> None:
    release = served(frequency=TWICE)
    request = Request("unit-1", T0, features={"age": 41, "income": 3}, context={"hour": 12})
    first = ask(release, request)
    alike = [
        ask(release, request, at=T0 + timedelta(minutes=59)),
        ask(release, request, features={"income": 3.0, "age": 41}),
        ask(release, request, exposures={"v1": 1}),
        ask(release, request, values={"first_name": "Ann"}),
    ]
    assert {d.record.id for d in alike} == {first.record.id}
    other = [
        ask(release, request, unit="unit-2"),
        ask(release, request, at=T0 + timedelta(hours=1)),
        ask(release, request, features={"age": 42, "income": 3}),
        ask(release, request, features={"age": "41", "income": 3}),
        ask(release, request, features={"age": 41}, context={"income": 3, "hour": 12}),
        ask(release, request, context={}),
        ask(release, request, exposures={"v1": 2}),
        ask(release, request, forced="v1"),
        ask(release, request, keyring=ROTATED),
        ask(served(frequency=TWICE, scorer=Fixed(version="ctr-9")), request),
        ask(served(frequency=TWICE, with_model=False), request),
        ask(served(frequency=TWICE, with_model=False, last_good=Fixed()), request),
        decide(release, request, keyring=KEYS, business="other", scene="welcome", window_s=HOUR),
        decide(release, request, keyring=KEYS, business="acme", scene="other", window_s=HOUR),
        decide(replace(release, content_hash="c" * 64), request, keyring=KEYS, business="acme", scene="welcome",
               window_s=HOUR),
    ]  # fmt: skip
    ids = [first.record.id, *(d.record.id for d in other)]
    assert len(set(ids)) == len(ids)


def test_a_replay_wants_the_release_the_model_and_the_key_of_the_decision() -> None:
    release = served()
    record = ask(release).record
    with pytest.raises(InputError, match=r"made from release 3 \(aaaaaaaa\), not from 3 \(cccccccc\)"):
        replay(record, replace(release, content_hash="c" * 64), keyring=KEYS, window_s=HOUR)
    with pytest.raises(InputError, match=r"ranked by ctr-7, and here by ctr-9"):
        replay(record, served(Fixed(version="ctr-9")), keyring=KEYS, window_s=HOUR)
    with pytest.raises(InputError, match=r"ranked by ctr-7, and here by no model"):
        replay(record, served(with_model=False), keyring=KEYS, window_s=HOUR)
    with pytest.raises(InputError, match="no key 'k1'"):
        replay(record, release, keyring=Keyring({"k2": b"another 16 bytes"}), window_s=HOUR)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"at": datetime(2026, 1, 1)}, "no time zone"),
        ({"features": {"age": float("nan")}}, "age: nan is no number"),
        ({"context": {"hour": float("inf")}}, "hour: inf is no number"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        ask(served(), **changes)


def test_nobody_to_decide_for_is_no_decision() -> None:
    assert ask_many(served(), []) == []


# ── what is sent ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_payload_holds_the_materials_of_the_variant_filled() -> None:
    decision = ask(served(), forced="v0", values={"first_name": "<Ann>", "yield": "99%"})
    assert decision.payload == {
        "copy": {
            "id": "c0",
            "kind": "copy",
            "content": {
                "language": "en",
                "title": "Hello &lt;Ann&gt;",  # what the request says brings no markup
                "subtitle": "",
                "button": "Only 3.85% {now}",  # what the product says is not the request's to change
            },
        },
        "image": {
            "id": "image",
            "kind": "image",
            "content": {
                "file": PICTURE,
                "url": f"/v1/images/acme/{PICTURE}.jpeg",
                "media_type": "image/jpeg",
                "width": 300,
                "height": 200,
                "alt": "gold",
            },
        },
        "layout": {"id": "layout", "kind": "layout", "content": decision.payload["layout"]["content"]},
        "style": {
            "id": "style",
            "kind": "style",
            "content": {"property": "color", "value": "#ff0000", "applies_to": "copy.button"},
        },
    }
    layout = decision.payload["layout"]["content"]
    assert (layout["width"], layout["root"]["show"]) == (400, "copy.title") and "kind" not in layout
    json.dumps(decision.payload)


def test_a_copy_is_filled_for_each_request_with_its_fallback_where_it_says_nothing() -> None:
    release = served()
    titles = [
        ask(release, forced="v0", values=v).payload["copy"]["content"]["title"] for v in ({"first_name": "Bo"}, {})
    ]
    assert titles == ["Hello Bo", "Hello there"]
    assert ask(release, forced="v1").payload["copy"]["content"]["title"] == "Now 3.85%"


def test_a_token_says_what_was_decided() -> None:
    decision = ask(served())
    claims = KEYS.read(decision.token)
    assert (claims.decision, claims.variant, claims.propensity, claims.unit, claims.at) == (
        decision.record.id,
        decision.record.variant,
        decision.record.propensity,
        "unit-1",
        T0,
    )


def test_a_copy_with_a_placeholder_that_the_release_lacks_is_found_before_anybody_sees_it() -> None:
    with pytest.raises(InputError, match="no placeholder"):
        prepare(content(placeholders=()), 3, HASH)


def test_a_model_reads_the_variants_with_their_tags() -> None:
    table = variant_table(content().variants)
    assert table.schema.field("tone").type == pa.list_(pa.string())
    assert table.slice(1, 2).to_pylist() == [
        {"variant_id": "v1", "subject": ["gold", "person"], "tone": ["cool"]},
        {"variant_id": "v2", "subject": [], "tone": ["warm"]},
    ]


# ── candidates, explanations, fatigue ───────────────────────────────────────────────────────────────────────────────


def test_the_first_candidates_come_with_scores_and_tags() -> None:
    ranking = rank_top(served(), Request("u", T0), 2)
    assert [c.variant for c in ranking.candidates] == ["v3", "v5"] and ranking.model_version == "ctr-7"
    assert [c.score for c in ranking.candidates] == pytest.approx([1.6, 1.2])
    assert ranking.candidates[0].tags == {"tone": ("cool",)} and ranking.candidates[0].materials["copy"] == "c1"
    assert len(rank_top(served(), Request("u", T0), 100).candidates) == N
    with pytest.raises(InputError, match="k: 0"):
        rank_top(served(), Request("u", T0), 0)


def test_candidates_are_what_rules_and_frequency_leave() -> None:
    release = served(frequency=TWICE, interventions=(PIN_COOL,))
    ranking = rank_top(release, Request("u", T0, exposures={"v3": 2}, forced="v0"), 5)
    assert [c.variant for c in ranking.candidates] == ["v5", "v1"]
    nothing = served(interventions=tuple(rule(f"no-{id}", BLOCK, {"variant": id}) for id in ALL))
    with pytest.raises(NothingToShowError):
        rank_top(nothing, Request("u", T0), 5)


def test_candidates_without_a_model_stand_in_the_order_of_the_fallbacks() -> None:
    def order(scorer: Scorer | None, **options: Any) -> tuple[list[str], str | None, str]:
        ranking = rank_top(served(scorer, with_model=False, **options), Request("u", T0), 4)
        return [c.variant for c in ranking.candidates], ranking.model_version, ranking.detail

    assert order(None) == (["v2", "v0", "v1", "v3"], None, "model ctr-7 is not loaded")
    nan = "model ctr-7 failed: ValueError: scores that are no numbers"
    assert order(Corrupt("nan"), best_single="v5") == (["v5", "v0", "v1", "v2"], None, nan)
    assert order(None, last_good=Fixed(version="ctr-6"))[0][:2] == ["v3", "v5"]
    assert order(None, last_good=Fixed(version="ctr-6"))[1:] == ("ctr-6", "model ctr-7 is not loaded")


def test_candidates_of_the_challenger_are_ranked_by_the_challenger() -> None:
    other = Fixed(HEADS[:, ::-1].copy(), "ctr-8")
    release = served(challenger_scorer=other, **only(Bucket.CHALLENGER))
    ranking = rank_top(release, Request("u", T0), 1, bucket=Bucket.CHALLENGER)
    assert (ranking.candidates[0].variant, ranking.model_version) == ("v2", "ctr-8")
    assert rank_top(release, Request("u", T0), 1).candidates[0].variant == "v3"


def test_an_explanation_is_the_models_own() -> None:
    class Explaining(Fixed):
        def explain(self, features: NDArray[np.float32], side: list[int], row: int, variant: int) -> Any:
            return (features.tolist(), side[variant], row)

    request = Request("u", T0, features={"age": 33})
    assert explain(served(Explaining()), request, "v4") == ([33.0], 4, 0)
    assert explain(served(), request, "v4") is None
    assert explain(served(with_model=False), request, "v4") is None
    assert explain(served(Explaining()), request, "v4", bucket=Bucket.CHALLENGER) is None
    with pytest.raises(NotFoundError, match="'v9'"):
        explain(served(), request, "v9")


def test_fatigue_counts_what_a_unit_lately_saw_of_each_tag() -> None:
    release = served()
    assert fatigue_features({}, release) == {}
    assert fatigue_features({"v1": 2, "v3": 1, "v2": 0, "gone": 9}, release) == {
        "seen.subject=gold": 2,
        "seen.subject=person": 2,
        "seen.tone=cool": 3,
    }
    assert fatigue_features({"v2": 1_000}, release) == {"seen.tone=warm": MAX_SEEN}
    assert list(fatigue_features({"v3": 1, "v0": 1}, release)) == sorted(fatigue_features({"v0": 1, "v3": 1}, release))


def test_a_release_has_few_fatigue_features_those_of_the_commonest_tags() -> None:
    described = [
        DescribedVariant(id=f"w{i:03}", materials={}, tags={"own": (f"o{i:03}",), "half": (f"h{i % 2}",)})
        for i in range(100)
    ]
    release = served(variants=(*content().variants, *described), with_model=False)
    names = {name for features in release.seen.values() for name in features}
    assert len(names) == MAX_SEEN_TAGS and {"seen.half=h0", "seen.half=h1", "seen.tone=warm", "seen.own=o000"} <= names
    assert fatigue_features({"w099": 1}, release) == {"seen.half=h1": 1}


def test_fatigue_is_of_the_draw_as_any_feature() -> None:
    release = served()
    fresh, tired = (ask(release, features=fatigue_features(seen, release)) for seen in ({}, {"v3": 1}))
    assert tired.record.features == {"seen.tone=cool": 1} and fresh.record.id != tired.record.id
