"""Covering subsets against brute force, and the traffic they take against simulated experiments."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from kaleidoscope.combiner import (
    Forbidden,
    Option,
    Slot,
    Space,
    as_batch,
    count,
    explode,
    is_legal,
    parse,
    sample,
    variant_id,
)
from kaleidoscope.coverage import Cover, balance, cover, exposures_needed, traffic
from kaleidoscope.errors import InputError

COLOURS = ("red", "blue", "green", "gold")


def world(sizes: list[int], *texts: str, seed: int = 0) -> Space:
    """A space whose colours are very uneven over the materials, and whose other tags are not."""
    rng = np.random.default_rng(seed)
    slots = tuple(
        Slot(
            f"s{s}",
            tuple(
                Option(
                    f"m{s}.{i}",
                    {"colour": (str(rng.choice(COLOURS, p=[0.6, 0.2, 0.1, 0.1])),), f"d{s}": (f"v{i % 3}",)},
                )
                for i in range(n)
            ),
        )
        for s, n in enumerate(sizes)
    )
    return Space(slots, tuple(parse(text) for text in texts))


RULES = (
    "forbid s0.colour=red with s1.colour=blue",
    "forbid s0.d0=v0 with s1.d1=v1 with s2.d2=v2",
    "require s1.colour matches s2.colour when s1.colour=green",
)


def with_new(space: Space, s: int) -> Space:
    """The same space with one more material at the end of a slot."""
    slots = list(space.slots)
    options = slots[s].options
    slots[s] = Slot(slots[s].name, (*options, Option("new", options[0].tags)))
    return Space(tuple(slots), space.constraints)


def ids(found: Cover) -> list[str]:
    return list(found.variants.column("variant_id").to_pylist())


def legal_pairs(space: Space) -> set[tuple[str, str, str, str]]:
    """All pairs that some legal variant holds, by listing all variants."""
    found = set()
    for batch in explode(space):
        for row in batch.drop_columns(["variant_id"]).to_pylist():
            found |= {(a, row[a], b, row[b]) for a, b in itertools.combinations(row, 2)}
    return found


def pairs_in(found: Cover) -> set[tuple[str, str, str, str]]:
    return {(a, m[a], b, m[b]) for m in found.combinations for a, b in itertools.combinations(m, 2)}


def random_space(rng: np.random.Generator) -> Space:
    n = int(rng.integers(1, 6))
    space = world([int(rng.integers(1, 6)) for _ in range(n)], seed=int(rng.integers(2**32)))
    names = [slot.name for slot in space.slots]
    texts = []
    for _ in range(rng.integers(0, 4)):
        terms = [
            f"{name}.{'colour' if rng.random() < 0.5 else f'd{name[1:]}'}={rng.choice([*COLOURS, 'v0', 'v1'])}"
            for name in rng.choice(names, rng.integers(1, min(4, n) + 1), replace=False)
        ]
        texts.append(f"forbid {' with '.join(terms)}" if rng.random() < 0.7 else f"require colour=blue when {terms[0]}")
    tables = ()
    if n > 1:
        table = rng.random((len(space.slots[0].options), len(space.slots[1].options))) < 0.3
        tables = (Forbidden("s0", "s1", table),)
    return Space(space.slots, tuple(parse(text) for text in texts), tables)


# ── covering ──


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 2**32), cap=st.integers(1, 60))
def test_covers_every_legal_pair_or_says_which_it_does_not(seed: int, cap: int) -> None:
    space = random_space(np.random.default_rng(seed))
    if count(space) == 0:
        with pytest.raises(InputError, match="no variant is legal"):
            cover(space, cap)
        return
    found = cover(space, cap)
    truth, held = legal_pairs(space), pairs_in(found)
    assert found.variants.num_rows == min(cap, count(space))
    assert len(set(ids(found))) == found.variants.num_rows
    assert ids(found) == [variant_id(materials) for materials in found.combinations]
    rows = np.array([[b[slot.name] for slot in space.slots] for b in found.combinations])
    positions = [[space.positions[s][m] for s, m in enumerate(row)] for row in rows.tolist()]
    assert is_legal(space, np.array(positions)).all()
    assert held <= truth
    assert found.pairs_legal == len(truth) and found.pairs_covered == len(held)
    assert {tuple(row.values()) for row in found.uncovered.to_pylist()} == truth - held
    possible = sum(a * b for a, b in itertools.combinations(space.sizes, 2))
    assert found.pairs_illegal == possible - len(truth)
    assert found.needed is not None and found.needed >= found.needed_at_least
    if cap >= found.needed:
        assert held == truth


def test_six_slots_of_a_billion_variants_are_covered_without_listing_them() -> None:
    space = world([32] * 6, *RULES)
    assert count(space) > 5e8
    found = cover(space, 2_500)
    assert found.variants.num_rows == 2_500
    assert found.pairs_covered == found.pairs_legal > 14_000
    assert found.needed is not None and found.needed_at_least <= found.needed <= 2_500
    tight = cover(space, 400)
    assert tight.variants.num_rows == 400
    assert tight.pairs_covered > 0.9 * 400 * 15  # hardly any pair twice
    assert tight.needed is not None and tight.needed < 1.5 * tight.needed_at_least
    assert {m for row in tight.combinations for m in row.values()} == {o.id for s in space.slots for o in s.options}


def test_tags_are_more_even_than_in_a_random_subset() -> None:
    space = world([20] * 4, *RULES)
    found = cover(space, 1_500)
    drawn = [balance(space, sample(space, 1_500, np.random.default_rng(seed))) for seed in range(5)]
    colour = found.balance[0]
    assert colour.dimension == "colour" and set(colour.variants) == set(COLOURS)
    # More than half the materials are red; the other dimensions are even to begin with.
    assert colour.evenness is not None and colour.evenness > 0.98
    assert max(other[0].evenness or 1 for other in drawn) < 0.96
    assert all(even.evenness is not None and even.evenness > 0.98 for even in found.balance)


def test_evenness_is_the_normalised_entropy() -> None:
    slots = (Slot("a", (Option("x", {"t": ("1",)}), Option("y", {"t": ("2",), "only": ("one",)}))),)
    space = Space(slots)
    even, only = balance(space, as_batch(space, np.array([[0], [1]])))[::-1]
    assert (even.dimension, even.variants, even.evenness) == ("t", {"1": 1, "2": 1}, 1.0)
    assert (only.dimension, only.variants, only.evenness) == ("only", {"one": 1}, None)
    (_, uneven) = balance(space, as_batch(space, np.array([[0], [0]])))
    assert uneven.evenness == 0


@pytest.mark.parametrize("rules", [(), RULES])
@pytest.mark.parametrize("s", [0, 3])
def test_a_new_material_leaves_most_choices_as_they_were(rules: tuple[str, ...], s: int) -> None:
    space = world([20] * 4, *rules)
    before, after = cover(space, 1_500), cover(with_new(space, s), 1_500)
    assert len(set(ids(before)) & set(ids(after))) >= 0.9 * 1_500
    assert after.pairs_covered == after.pairs_legal > before.pairs_legal


def test_all_kept_variants_stay_where_the_cap_has_room() -> None:
    space = world([12] * 5, *RULES)
    before = cover(space, 300)
    after = cover(with_new(space, 2), 400, keep=before.combinations)
    assert ids(after)[:300] == ids(before)
    assert (after.kept, after.dropped) == (300, 0)
    assert after.pairs_covered == after.pairs_legal


@pytest.mark.parametrize("cap", [30, 300])
def test_kept_variants_make_room_for_a_new_material_and_no_more(cap: int) -> None:
    space = world([12] * 5, *RULES)
    before = cover(space, cap)
    after = cover(with_new(space, 2), cap, keep=before.combinations)
    assert 0.9 * cap <= after.kept < cap
    assert after.dropped == cap - after.kept
    assert ids(after)[0] == ids(before)[0]
    assert any(m["s2"] == "new" for m in after.combinations)
    assert cap == 30 or after.pairs_covered == after.pairs_legal


def test_illegal_unknown_and_repeated_variants_are_not_kept() -> None:
    space = Space(
        (Slot("a", (Option("x"), Option("y"))), Slot("b", (Option("x"), Option("y"), Option("z")))),
        (parse("forbid a:x with b:x"),),
    )
    keep = [{"a": "x", "b": "x"}, {"a": "y", "b": "gone"}, {"a": "y", "b": "z"}, {"a": "y", "b": "z"}, {"a": "y"}]
    found = cover(space, 3, keep)
    assert (found.kept, found.dropped) == (1, 4)
    assert found.combinations[0] == {"a": "y", "b": "z"}


def test_the_same_question_has_the_same_answer_and_the_seed_changes_it() -> None:
    space = world([9] * 4, *RULES)
    assert ids(cover(space, 60)) == ids(cover(space, 60))
    assert ids(cover(space, 60)) != ids(cover(space, 60, seed=1))


def test_covers_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="cap is 0"):
        cover(world([2, 2]), 0)
    twice = Space((Slot("a", (Option("x"), Option("x"))),))
    with pytest.raises(InputError, match="there twice"):
        cover(twice, 1)


# ── traffic ──


def test_sample_sizes_are_those_of_other_programs() -> None:
    # R's manual page of power.prop.test: p1 = .50, p2 = .75, power = .90 takes 76.7 a group.
    (total,) = exposures_needed(np.array([[0.5, 0.5]]), 0.50, 0.5, power=0.90)
    assert total / 2 == pytest.approx(76.7, abs=0.05)
    p, d = 0.1, 0.01
    (lehr,) = exposures_needed(np.array([[0.5, 0.5]]), p, d / p)
    assert lehr / 2 == pytest.approx(16 * (p + d / 2) * (1 - p - d / 2) / d**2, rel=0.03)


@pytest.mark.parametrize(("share", "effect"), [(0.5, 0.2), (0.2, 0.3), (0.75, 0.25)])
def test_a_main_effect_is_found_with_the_stated_power(share: float, effect: float) -> None:
    rng, trials, p = np.random.default_rng(5), 4_000, 0.06
    (total,) = exposures_needed(np.array([[share, 1 - share]]), p, effect)
    n = np.array([total * share, total * (1 - share)]).round().astype(int)
    clicks = np.stack([rng.binomial(n[0], p * (1 + effect), trials), rng.binomial(n[1], p, trials)])
    rate, pooled = clicks / n[:, None], clicks.sum(axis=0) / n.sum()
    z = (rate[0] - rate[1]) / np.sqrt(pooled * (1 - pooled) * (1 / n).sum())
    assert (np.abs(z) > norm.ppf(0.975)).mean() == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / trials))


def test_an_interaction_is_found_with_the_stated_power() -> None:
    rng, trials, p, effect = np.random.default_rng(6), 4_000, 0.1, 0.4
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    (total,) = exposures_needed(shares[None, :], p, effect)
    n = (total * shares).round().astype(int)
    clicks = np.stack([rng.binomial(m, p * (1 + effect * (c == 0)), trials) for c, m in enumerate(n)])
    rate, pooled = clicks / n[:, None], clicks.sum(axis=0) / n.sum()
    z = (rate[0] - rate[1] - rate[2] + rate[3]) / np.sqrt(pooled * (1 - pooled) * (1 / n).sum())
    assert (np.abs(z) > norm.ppf(0.975)).mean() == pytest.approx(0.8, abs=4 * np.sqrt(0.16 / trials))


def two_by_two() -> Space:
    return Space(
        (
            Slot("copy", (Option("c1", {"tone": ("warm",), "benefit": ("cash",)}), Option("c2", {"tone": ("cool",)}))),
            Slot("image", (Option("i1", {"subject": ("person",)}), Option("i2", {"subject": ("product",)}))),
        )
    )


def test_days_are_exposures_over_the_random_traffic() -> None:
    space = two_by_two()
    (everything,) = explode(space)
    plan = traffic(space, everything, exposures_per_day=10_000, click_rate=0.05, random_share=0.2, bonferroni=False)
    (half,) = exposures_needed(np.array([[0.5, 0.5]]), 0.05, 0.1)
    material = plan.of("material")
    assert (material.effects, material.learnable, material.never, material.alpha) == (4, 4, 0, 0.05)
    assert material.worst is not None and material.median is not None
    assert material.worst.exposures == material.median.exposures == pytest.approx(half)
    assert material.worst.days == pytest.approx(half / 2_000)
    pair = plan.of("material_pair")
    assert (pair.effects, pair.learnable) == (4, 4)
    assert pair.worst is not None and pair.worst.exposures == pytest.approx(4 * half, rel=0.03)
    stricter = traffic(space, everything, exposures_per_day=10_000, click_rate=0.05, design_effect=2).of("material")
    assert stricter.alpha == 0.05 / 4
    (split,) = exposures_needed(np.array([[0.5, 0.5]]), 0.05, 0.1, alpha=0.05 / 4)
    assert stricter.worst is not None and stricter.worst.exposures == pytest.approx(2 * split)


def test_what_never_varies_apart_is_named_and_never_learned() -> None:
    space = two_by_two()
    diagonal = [{"copy": "c1", "image": "i1"}, {"copy": "c2", "image": "i2"}]
    plan = traffic(space, diagonal, exposures_per_day=1e6, click_rate=0.05)
    assert plan.aliased == (
        ("benefit=cash", "subject=person", "subject=product", "tone=cool", "tone=warm"),
        ("copy:c1", "copy:c2", "image:i1", "image:i2"),
    )
    assert [(k.kind, k.learnable, k.median, k.worst) for k in plan.kinds] == [
        (kind, 0, None, None) for kind in ("tag", "material", "tag_pair", "material_pair")
    ]
    assert plan.effects.column("exposures").null_count == plan.effects.num_rows
    # cash goes with warm and with nothing else; warm and cool share out the tone, which is no alias
    (everything,) = explode(space)
    plan = traffic(space, everything, exposures_per_day=1e6, click_rate=0.05)
    assert plan.aliased == (("benefit=cash", "tone=cool", "tone=warm"),)
    reasons = {(r["first"], r["second"]): r["reason"] for r in plan.effects.to_pylist() if r["kind"].startswith("tag")}
    assert reasons["benefit=cash", None] == "never varies apart from tone=cool, tone=warm"
    assert reasons["subject=person", None] is None
    assert reasons["benefit=cash", "tone=warm"] == "no variant shows the first without the second"
    assert reasons["benefit=cash", "tone=cool"] == "no variant shows both"
    assert reasons["benefit=cash", "subject=person"] == "one of them never varies apart from something else"


def test_values_in_all_or_no_variants_cannot_be_learned() -> None:
    space = two_by_two()
    half = [{"copy": "c1", "image": "i1"}, {"copy": "c1", "image": "i2"}]
    plan = traffic(space, half, exposures_per_day=1e6, click_rate=0.05)
    reasons = {r["first"]: r["reason"] for r in plan.effects.to_pylist() if r["kind"] == "material"}
    assert reasons == {"copy:c1": "in every variant", "copy:c2": "in no variant", "image:i1": None, "image:i2": None}
    assert plan.of("material").never == 2


def test_batches_and_sequences_of_materials_are_the_same_question() -> None:
    space = world([5, 4, 3], *RULES)
    found = cover(space, 25)
    by_batch, by_rows = (
        traffic(space, variants, exposures_per_day=1e5, click_rate=0.02)
        for variants in (found.variants, found.combinations)
    )
    assert by_batch.kinds == by_rows.kinds and by_batch.effects.equals(by_rows.effects)
    assert isinstance(by_batch.effects, pa.RecordBatch)
    shares = {r["first"]: r["share"] for r in by_batch.effects.to_pylist() if r["kind"] == "material"}
    for s, slot in enumerate(space.slots):
        for option in slot.options:
            shown = sum(m[slot.name] == option.id for m in found.combinations) / 25
            assert shares[f's{s}:"{option.id}"'] == pytest.approx(shown)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"click_rate": 0.0}, "click_rate is 0"),
        ({"click_rate": 0.6, "minimum_effect": 1.0}, "click_rate is 0.6; it must be above 0 and below 0.5"),
        ({"random_share": 1.5}, "random_share is 1.5"),
        ({"exposures_per_day": 0.0}, "exposures_per_day is 0"),
        ({"minimum_effect": -0.1}, "minimum_effect is -0.1"),
        ({"alpha": 1.0}, "alpha is 1"),
        ({"power": float("nan")}, "power is nan"),
    ],
)
def test_shares_and_rates_out_of_range_are_refused(wrong: dict[str, float], why: str) -> None:
    space = two_by_two()
    with pytest.raises(InputError, match=why):
        traffic(space, [{"copy": "c1", "image": "i1"}], **{"exposures_per_day": 1.0, "click_rate": 0.1} | wrong)
    with pytest.raises(InputError, match="no variant"):
        traffic(space, [], exposures_per_day=1, click_rate=0.1)
