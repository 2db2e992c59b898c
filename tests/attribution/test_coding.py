"""A log as codes: segments, tags that vary, weights, and the logs that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from attribution.coding import MAX_UNIFORM, MAX_VALUES, MAX_WEIGHT, UserField, code
from attribution.insights import attribute
from kaleidoscope.errors import LogError
from kaleidoscope.log import Log
from tests.attribution.logs import TAGS, log_of


def labels(field: UserField) -> list[str]:
    return [segment.label for segment in field.segments]


def test_numbers_are_segments_of_halves_quarters_and_eighths() -> None:
    column = pa.array(np.arange(800.0))
    field = UserField.fit("age", column, np.ones(800))
    assert len(field.segments) == 2 + 4 + 8
    assert labels(field)[:2] == ["[-inf, 400)", "[400, inf)"]
    shown = field.codes(pa.array([0.0, 399.0, 400.0, None, np.nan]))
    member = field.membership[:2, shown]
    assert member.tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]


def test_few_different_numbers_are_bins_of_their_own_and_missing_is_a_segment() -> None:
    field = UserField.fit("newbie", pa.array([0, 1, 1, None]), np.ones(4))
    assert labels(field) == ["[-inf, 1)", "[1, inf)", "missing"]


def test_rare_texts_count_but_are_no_segments() -> None:
    column = pa.array(["a"] * 3000 + ["b"] * 2999 + ["rare"]).dictionary_encode()
    field = UserField.fit("city", column, np.ones(6000))
    assert labels(field) == ["a", "b"]
    assert field.labels[field.codes(column)[-1]] == "others"
    new = field.codes(pa.array(["b", "never seen", None]).dictionary_encode())
    assert [field.labels[i] for i in new] == ["b", "others", "missing"]


def test_a_field_of_one_value_has_no_segments() -> None:
    column = pa.array(["a"] * 10).dictionary_encode()
    assert labels(UserField.fit("x", column, np.ones(10))) == []
    assert labels(UserField.fit("x", pa.array([1.0] * 10), np.ones(10))) == []


def test_tags_that_never_vary_apart_are_one_and_constant_ones_none() -> None:
    variants = {
        "tone": [["calm"], ["loud"], ["loud"]], "style": [["flat"], ["real"], ["real"]],
        "icons": [["star", "sun"], ["star", "sun"], ["star"]], "brand": [["x"]] * 3,
    }  # fmt: skip
    coded = code(log_of({}, variants, np.arange(30) % 3, np.arange(30) % 2))
    assert [tag.names for tag in coded.tags] == [
        {"tone": "calm", "style": "flat"}, {"tone": "loud", "style": "real"}, {"icons": "sun"},
    ]  # fmt: skip
    assert coded.carried.toarray().tolist() == [[1, 0, 1], [0, 1, 1], [0, 1, 0]]


def test_tags_of_variants_that_were_not_shown_say_nothing() -> None:
    variants = {"tone": [["calm"], ["loud"], ["shy"]], "style": [["flat"], ["real"], ["flat"]]}
    coded = code(log_of({}, variants, np.arange(30) % 2, np.arange(30) % 3 > 0))
    assert [tag.names for tag in coded.tags] == [
        {"tone": "calm", "style": "flat"}, {"tone": "loud", "style": "real"},
    ]  # fmt: skip


def test_strata_are_context_group_and_product() -> None:
    row = np.arange(120)
    log = log_of(
        {}, TAGS, row % 6, row % 2, context={"hour": [("am", "pm")[r % 2] for r in row]},
        group=[f"test{r % 3}" for r in row], product=["p"] * 60 + ["q"] * 60,
    )  # fmt: skip
    coded = code(log)
    assert len(coded.strata) == 12 == len(set(coded.strata))
    first = coded.strata[coded.stratum[0]]
    assert first == "test0 / hour=am / p"


def shown_by_taste(n: int = 20_000, epsilon: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Who is a woman, the variant shown (of 6; 2 to women and 0 to men, but for epsilon), and its propensity."""
    rng = np.random.default_rng(0)
    woman = rng.random(n) < 0.5
    best = np.where(woman, 2, 0)
    variant = np.where(rng.random(n) < epsilon, rng.integers(0, 6, n), best)
    return woman, variant, epsilon / 6 + (1 - epsilon) * (variant == best)


def test_weights_undo_what_exposure_knew_of_the_user_within_a_stratum() -> None:
    woman, variant, p = shown_by_taste(epsilon=0.3)
    gender = np.where(woman, "f", "m").tolist()
    coded = code(log_of({"gender": gender}, TAGS, variant, np.arange(len(p)) % 2, propensity=p))
    assert coded.weighted
    assert coded.weight.mean() == pytest.approx(1)
    shares = [np.bincount(variant, coded.weight * who, 6) / (coded.weight * who).sum() for who in (woman, ~woman)]
    assert shares[0] == pytest.approx(shares[1], abs=0.03)
    assert abs(woman[variant == 2].mean() - woman[variant == 0].mean()) > 0.6  # as they were shown


def test_what_was_shown_by_chance_counts_most_where_a_model_chose_the_rest() -> None:
    """Of 6 variants 10 % by chance: as many effective exposures as those, not the few that shown shares would leave."""
    woman, _, p = shown_by_taste(epsilon=0.1)
    _, variant, _ = shown_by_taste(epsilon=0.1)
    coded = code(log_of({"gender": np.where(woman, "f", "m").tolist()}, TAGS, variant, woman, propensity=p))
    shown = np.bincount(variant, minlength=6) / len(p)
    stabilised = np.minimum(shown[variant] / p, MAX_WEIGHT)

    def effective(weight: np.ndarray) -> float:
        return float(weight.sum() ** 2 / (weight**2).sum() / len(weight))

    assert effective(coded.weight) > 0.1
    assert effective(coded.weight) > 1.2 * effective(stabilised)
    assert coded.clipped == 0


def test_weights_are_clipped_and_the_share_is_told() -> None:
    rng = np.random.default_rng(0)
    variant, p = rng.integers(0, 6, 60_000), np.full(60_000, 0.2)
    rare = [int(np.flatnonzero(variant == v)[0]) for v in range(3)]
    p[rare] = 0.0005  # each stands for very many users
    coded = code(log_of({"gender": ["f", "m"] * 30_000}, TAGS, variant, variant > 3, propensity=p), dependent=True)
    assert coded.weight.max() / coded.weight[rare].min() == pytest.approx(1)
    assert coded.clipped == pytest.approx(3 / 60_000)


def test_constant_propensities_leave_every_exposure_as_it_is() -> None:
    row = np.arange(600)
    coded = code(log_of({}, TAGS, row % 6, row % 2, propensity=np.full(600, 1 / 6)))
    assert not coded.weighted
    assert (coded.weight == 1).all()


def test_a_log_whose_exposure_knew_the_user_without_propensities_is_refused() -> None:
    woman, variant, _ = shown_by_taste(4_000)
    log = log_of({"gender": np.where(woman, "f", "m").tolist()}, TAGS, variant, woman)
    with pytest.raises(LogError, match=r"no propensities.*Log P"):
        code(log)
    with pytest.raises(LogError, match="no propensities"):
        code(log, dependent=True)


def test_a_log_without_a_floor_under_its_propensities_is_refused() -> None:
    rng = np.random.default_rng(0)
    woman = rng.random(4_000) < 0.5
    variant = np.where(rng.random(4_000) < 0.05, 4 - woman, np.where(woman, 2, 0))  # two variants each, of 4
    p = np.where(variant == np.where(woman, 2, 0), 0.95, 0.05)
    several = np.where(rng.random(4_000) < 0.02, rng.integers(0, 6, 4_000), variant)
    log = log_of({"gender": np.where(woman, "f", "m").tolist()}, TAGS, several, woman, propensity=p)
    with pytest.raises(LogError, match=r"no floor.*epsilon"):
        code(log)


@pytest.mark.parametrize("certain", [1.0, 0.99995])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.65, 0.8])
def test_a_log_where_some_users_always_see_one_variant_is_refused(share: float, certain: float) -> None:
    """The variants are alike; who always sees the first one clicks more, on anything, and no user field says so."""
    rng, n = np.random.default_rng(1), 20_000
    always = rng.random(n) < share
    variant = np.where(always, 0, rng.integers(0, 2, n))
    click = rng.random(n) < np.where(always, 0.3, 0.1)
    gender = np.array(["f", "m"])[rng.integers(0, 2, n)].tolist()
    propensity = np.where(always, certain, 0.5)
    log = log_of({"gender": gender}, {"tone": [["calm"], ["loud"]]}, variant, click, propensity=propensity)
    with pytest.raises(
        LogError, match=rf"'p' has no floor: {always.mean():.0%} of the exposures.*`context` or `group`"
    ):
        code(log)
    left = log.take(~always)  # the remedy
    (calm, _) = attribute(left, dependent=False).main_effects
    assert calm.ci_low < 0 < calm.ci_high


def test_a_trace_that_was_certain_is_left_out_and_told() -> None:
    rng, n = np.random.default_rng(1), 20_000
    always = np.arange(n) < 0.008 * n
    variant = np.where(always, 0, rng.integers(0, 2, n))
    log = log_of(
        {"gender": ["f", "m"] * (n // 2)}, {"tone": [["calm"], ["loud"]]}, variant, variant,
        propensity=np.where(always, 1, 0.5), weight=np.where(np.arange(n) >= n - 10, 0.0, 1.0), unit=np.arange(n),
    )  # fmt: skip
    coded = code(log, dependent=False)
    assert coded.certain == always.sum()
    assert coded.rows is not None and coded.rows.tolist() == list(range(160, n - 10))
    assert (log.variant[coded.rows] == coded.variant).all() and len(coded) == n - 170
    some = coded.take(np.array([5, 3]))
    assert some.rows is not None and some.rows.tolist() == [165, 163]
    assert code(log.take(~always & (log.weight > 0)), dependent=False).rows is None


def test_what_was_certain_for_everybody_at_its_time_is_left_out_whatever_its_share() -> None:
    """One variant until a second one came, and a place that shows one variant all along."""
    rng, n = np.random.default_rng(1), 9_000
    day = np.arange(n) // 1_000
    alone, place = day < 6, np.where(np.arange(n) % 3 == 0, "alone", "both")
    variant = np.where(alone | (place == "alone"), 0, rng.integers(0, 2, n))
    log = log_of(
        {"gender": ["f", "m"] * (n // 2)}, {"tone": [["calm"], ["loud"]]}, variant, rng.random(n) < 0.3,
        propensity=np.where(alone | (place == "alone"), 1, 0.5), context={"place": place.tolist()},
    )  # fmt: skip
    with pytest.raises(LogError, match="44% of the exposures were certain"):
        code(log, dependent=False)
    coded = code(replace(log, time=day * 86_400.0), dependent=False)
    assert coded.certain == (alone & (place == "both")).sum() == 4_000
    assert {coded.strata[s]: int(n) for s, n in enumerate(np.bincount(coded.stratum))} == {
        "place=alone": 3_000, "place=both": 2_000,
    }  # fmt: skip


def test_one_distribution_for_everybody_is_drawn_however_rare_its_second_variant() -> None:
    variant = (np.arange(60_000) % 20_000 == 7).astype(np.int64)
    gender = ["f", "m"] * 30_000
    propensity = np.where(variant, 0.00005, 0.99995)
    log = log_of({"gender": gender}, {"tone": [["calm"], ["loud"]]}, variant, variant, propensity=propensity)
    assert code(log, dependent=False).certain == 0


def shown_to_some(reach: dict[str, list[int]], n: int, seed: int = 0, **given: Any) -> Log:
    """Six variants; users of a gender see those it reaches, equally often."""
    rng = np.random.default_rng(seed)
    gender = rng.choice(list(reach), n)
    variant, p = np.zeros(n, np.int64), np.zeros(n)
    for who, seen in reach.items():
        variant[gender == who] = rng.choice(seen, (gender == who).sum())
        p[gender == who] = 1 / len(seen)
    return log_of({"gender": gender.tolist()}, TAGS, variant, rng.random(n) < 0.1, propensity=p, **given)


def test_users_whom_a_variant_never_reached_are_named() -> None:
    with pytest.raises(LogError, match=r"'p' has no floor for users of gender = f.* variant v[45], .* stand for 0% of"):
        code(shown_to_some({"f": [0, 1, 2, 3], "m": [0, 1, 2, 3, 4, 5]}, 4_000), dependent=True)
    few = shown_to_some({"f": [0, 1], "m": list(range(6)), "x": list(range(6))}, 4_000)
    with pytest.raises(LogError, match=r"no floor for users of gender = f: .*`context` or `group`"):
        code(few, dependent=True)
    by_rule = replace(few, group=(np.array(few.columns["gender"].to_pylist()) == "f").astype(np.int64), groups=GROUPS)
    assert len(code(by_rule).strata) == 2
    # So few users may have missed them by chance.
    assert code(shown_to_some({"f": [0, 1, 2, 3], "m": [0, 1, 2, 3, 4, 5]}, 60), dependent=True)


def test_many_variants_that_reach_few_each_are_missed_together() -> None:
    """A half of the users cannot see 150 of 200 variants, each of which hardly anybody was shown."""
    rng, n = np.random.default_rng(0), 6_000
    woman = rng.random(n) < 0.3
    variant = np.where(woman, rng.integers(0, 50, n), rng.integers(0, 200, n))
    user = {"gender": np.where(woman, "f", "m").tolist()}
    variants = {"tone": [[f"t{i}"] for i in range(200)]}
    log = log_of(user, variants, variant, woman, propensity=np.where(woman, 1 / 50, 1 / 200))
    with pytest.raises(LogError, match=r"gender = f: 1/propensity is 50 on average, where 200 variants were shown"):
        code(log, dependent=True)


GROUPS = pa.array(["all", "two"])
N_LOGS = 20


def floored(kind: str, n: int, n_variants: int, epsilon: float, rng: np.random.Generator) -> Log:
    """A log with a floor: a model shows most users the best variant for them, and the rest is drawn."""
    users = n // 20 if kind == "users seen often" else n
    gender, city, cohort = rng.integers(0, 2, users), rng.integers(0, 6, users), np.arange(users) * 2 // users
    best, there = (gender * 7 + city * 3) % n_variants, np.ones((users, n_variants))
    given: dict[str, Any] = {}
    if kind == "a variant added later":
        best, there[cohort == 0, -1] = best % (n_variants - 1), 0
    elif kind == "variants by group":
        there[city % 2 == 0, n_variants // 2 + 1 :], best = 0, gender
        given["group"] = np.where(city % 2 == 0, "few", "all")
    epsilons = np.where(city == 0, epsilon / 5, epsilon) if kind == "surer of some users" else np.full(users, epsilon)
    if kind == "surer by and by":
        epsilons = np.linspace(1, epsilon, users)
    p = epsilons[:, None] * there / there.sum(axis=1, keepdims=True)
    p[np.arange(users), best] += 1 - epsilons
    if kind == "buckets":
        bucket = rng.choice(3, users, p=[0.1, 0.2, 0.7])
        p[bucket == 0], p[bucket == 1] = np.eye(n_variants)[0], 1 / n_variants
        given["bucket"] = np.array(["control", "random", "model"])[bucket]
    variant = (rng.random(users)[:, None] > p.cumsum(axis=1)).sum(axis=1).clip(max=n_variants - 1)
    propensity, at = p[np.arange(users), variant], np.arange(users)
    if kind == "users seen often":
        at = np.sort(rng.integers(0, users, n))
    if kind == "counts":
        given["count"] = rng.choice([0.5, 1.0, 3.0], n)
    if kind == "weights":  # of what was not clicked, a tenth is kept
        kept = (clicked := rng.random(n) < np.where(variant == best, 0.3, 0.05)) | (rng.random(n) < 0.1)
        at, given["weight"] = np.flatnonzero(kept), np.where(clicked, 1.0, 10.0)[kept]
    user = {"gender": np.array(["f", "m"])[gender[at]].tolist(), "city": np.array(list("abcdef"))[city[at]].tolist()}
    if kind == "a variant added later":
        user["cohort"] = np.array(["old", "new"])[cohort[at]].tolist()
        given["time"] = at * 60.0
    time, unit = given.pop("time", None), np.unique(at, return_inverse=True)[1]
    variants = {"tone": [[f"t{i}"] for i in range(n_variants)]}
    click = rng.random(len(at)) < 0.1
    return replace(log_of(user, variants, variant[at], click, propensity=propensity[at], unit=unit, **given), time=time)


def why_refused(log: Log) -> str | None:
    try:
        assert code(log, dependent=True).certain == 0
    except LogError as error:
        return str(error)
    return None


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.5])
@pytest.mark.parametrize(("n", "n_variants"), [(500, 3), (8_000, 2), (8_000, 6), (8_000, 216)])
@pytest.mark.parametrize(
    "kind",
    ["epsilon", "surer of some users", "surer by and by", "a variant added later", "variants by group", "buckets",
     "users seen often", "counts", "weights"],
)  # fmt: skip
def test_logs_with_a_floor_are_never_refused(kind: str, n: int, n_variants: int, epsilon: float) -> None:
    if kind in ("a variant added later", "variants by group"):
        n_variants = max(n_variants, 4)  # with two, one alone would have been certain
    for seed in range(N_LOGS):
        log = floored(kind, n, n_variants, epsilon, np.random.default_rng([seed, n]))
        refused = why_refused(log)
        assert refused is None or "as likely for everybody" in refused  # too few draws to see that users differed


def test_how_much_of_the_main_effects_is_clipped_is_told() -> None:
    """Of 216 variants 1 in 200 by chance: preferences keep all of it, main effects lose a half of what was drawn."""
    rng, n = np.random.default_rng(0), 40_000
    best, epsilon = rng.integers(0, 216, n), 0.005
    variant = np.where(rng.random(n) < epsilon, rng.integers(0, 216, n), best)
    p = epsilon / 216 + (1 - epsilon) * (variant == best)
    user = {"taste": best % 8.0}
    coded = code(log_of(user, {"tone": [[f"t{i}"] for i in range(216)]}, variant, variant > 9, propensity=p))
    drawn = (variant != best).mean()
    assert coded.clipped == 0
    assert coded.clipped_uniform == pytest.approx(drawn)
    whole = (1 / p).mean()
    lost = (1 / p / whole - MAX_UNIFORM)[variant != best].sum() / n
    assert coded.lost_uniform == pytest.approx(lost) and lost > 0.4
    even = code(log_of(user, {"tone": [[f"t{i}"] for i in range(216)]}, variant, variant > 9), dependent=False)
    assert (even.clipped_uniform, even.lost_uniform) == (0, 0)


def always_the_best(n: int, epsilon: float, seed: int = 0) -> Log:
    """Nobody's taste differs; one variant, blue and loud, is shown to everybody but for a share that is drawn."""
    rng = np.random.default_rng(seed)
    variants = {"colour": [["blue"], ["blue"], ["red"], ["red"]], "tone": [["loud"], ["calm"], ["loud"], ["calm"]]}
    variant = np.where(rng.random(n) < epsilon, rng.integers(0, 4, n), 0)
    propensity = np.where(variant == 0, 1 - epsilon + epsilon / 4, epsilon / 4)
    click = rng.random(n) < 0.05 + 0.1 * np.isin(variant, (0, 2))  # loud alone is liked
    gender = np.array(["f", "m"])[rng.integers(0, 2, n)]
    return log_of({"gender": gender}, variants, variant, click, propensity=propensity, unit=np.arange(n))


def test_what_everybody_takes_does_not_get_the_credit_of_what_it_was_shown_with() -> None:
    effects = {next(iter(m.tag.items())): m for m in attribute(always_the_best(80_000, 0.2)).main_effects}
    blue, loud = effects["colour", "blue"], effects["tone", "loud"]
    assert blue.ci_low < 0 < blue.ci_high  # of those shown blue nine in ten saw loud
    assert loud.ci_low < 2.0 < loud.ci_high
    assert blue.ctr == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("propensity", [1.0, 0.5])
def test_the_same_propensity_for_everybody_does_not_hide_that_users_were_chosen(propensity: float) -> None:
    rng = np.random.default_rng(1)
    n = 6_000
    gender = rng.integers(0, 2, n)
    variant = (rng.random(n) < np.where(gender == 0, 0.9, 0.1)).astype(np.int64)
    log = log_of(
        {"gender": np.array(["f", "m"])[gender]}, {"tone": [["a"], ["b"]]}, variant, rng.random(n) < 0.3,
        propensity=np.full(n, propensity), unit=np.arange(n),
    )  # fmt: skip
    with pytest.raises(LogError, match="as likely for everybody"):
        code(log)


def test_of_a_dimension_with_many_values_the_most_shown_are_looked_at() -> None:
    rng = np.random.default_rng(0)
    n, values = 4_000, MAX_VALUES + 36
    variant = np.concatenate([np.arange(values), rng.integers(0, MAX_VALUES, n)])
    user = {"gender": np.array(["f", "m"])[rng.integers(0, 2, len(variant))]}
    log = log_of(user, {"tone": [[f"t{i:03}"] for i in range(values)]}, variant, rng.random(len(variant)) < 0.3)
    coded = code(log, dependent=False)
    assert (len(coded.tags), coded.left_out) == (MAX_VALUES, 36)
    assert {value for tag in coded.tags for _, value in tag.parts} == {f"t{i:03}" for i in range(MAX_VALUES)}


def test_products_that_differ_in_users_and_tags_are_no_dependence() -> None:
    rng = np.random.default_rng(2)
    n = 8_000
    product = rng.integers(0, 2, n)
    gender = (rng.random(n) < np.where(product == 0, 0.8, 0.2)).astype(int)
    variant = (rng.random(n) < np.where(product == 0, 0.8, 0.2)).astype(np.int64)
    log = log_of(
        {"gender": np.array(["f", "m"])[gender]}, {"tone": [["a"], ["b"]]}, variant, rng.random(n) < 0.3,
        product=np.array(["card", "loan"])[product], unit=np.arange(n),
    )  # fmt: skip
    assert len(code(log).strata) == 2
