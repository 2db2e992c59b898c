"""What products and times do to tags does not pass for a taste of the people who happen to be there."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit

from attribution.coding import Coded, code
from attribution.insights import attribute_coded
from attribution.strata_effects import MOST_CELLS
from kaleidoscope.log import Log
from tests.attribution.logs import TAGS, Array, log_of

N = 40_000


def people(where: Array, rng: np.random.Generator, shares: tuple[float, ...]) -> Array:
    """Women or not, by where they are."""
    return rng.random(len(where)) < np.array(shares)[where]


def shown(woman: Array, variant: Array, logit: Array, rng: np.random.Generator, **given: object) -> Log:
    user = {"sex": np.where(woman, "f", "m").tolist(), "age": rng.integers(18, 70, len(woman)).astype(float)}
    clicks = rng.random(len(woman)) < expit(logit)
    return log_of(user, TAGS, variant, clicks, unit=np.arange(len(woman)), **given)


def names(coded: Coded) -> set[str]:
    return {held.name for held in coded.held}


def found(coded: Coded) -> list[tuple[dict[str, str], dict[str, str]]]:
    return [(dict(i.segment), dict(i.tag)) for i in attribute_coded(coded).insights]


@pytest.mark.parametrize("seed", range(3))
def test_a_products_customers_have_no_taste_for_what_the_product_is_liked_in(seed: int) -> None:
    rng = np.random.default_rng(seed)
    product, variant = rng.integers(0, 3, N), rng.integers(0, 6, N)
    woman = people(product, rng, (0.2, 0.5, 0.8))
    logit = -1.5 + 0.3 * product + 0.5 * (product - 1) * np.isin(variant, (2, 3))
    coded = code(shown(woman, variant, logit, rng, product=[f"p{p}" for p in product]), dependent=False)
    assert "product × tone" in names(coded)
    assert not any("sex" in segment for segment, _ in found(coded))
    told = found(replace(coded, held=()))  # without
    assert any("sex" in segment and "tone" in tag for segment, tag in told)


def test_tags_that_are_liked_less_and_less_are_no_taste_of_those_who_come_late() -> None:
    rng = np.random.default_rng(5)
    at, variant = np.sort(rng.random(N)), rng.integers(0, 6, N)
    woman = rng.random(N) < 0.2 + 0.6 * at
    log = shown(woman, variant, -1.5 + 2.4 * (at - 0.5) * np.isin(variant, (2, 3)), rng)
    coded = code(replace(log, time=1.7e9 + 1e6 * at), dependent=False)
    assert "time × tone" in names(coded)
    assert found(coded) == []
    assert found(replace(coded, held=()))


def test_what_users_do_in_products_that_show_other_tags_is_no_taste_for_these() -> None:
    """Women click more on the first product, which shows loud more often: neither has to do with the other."""
    rng = np.random.default_rng(6)
    product = rng.integers(0, 2, N)
    variant = np.where(rng.random(N) < np.where(product == 0, 0.8, 0.2), rng.integers(2, 4, N), rng.integers(0, 2, N))
    woman = people(product, rng, (0.5, 0.5))
    logit = -1.5 + 0.8 * (woman & (product == 0))
    coded = code(shown(woman, variant, logit, rng, product=[f"p{p}" for p in product]), dependent=False)
    assert "product × sex" in names(coded)
    assert found(coded) == []
    assert found(replace(coded, held=()))


def test_a_taste_is_found_beside_what_products_do() -> None:
    rng = np.random.default_rng(8)
    product, variant = rng.integers(0, 3, N), rng.integers(0, 6, N)
    woman = people(product, rng, (0.2, 0.5, 0.8))
    loud = np.isin(variant, (2, 3))
    logit = -1.5 + 0.5 * (product - 1) * loud + 0.6 * (woman & loud)
    coded = code(shown(woman, variant, logit, rng, product=[f"p{p}" for p in product]), dependent=False)
    (insight,) = attribute_coded(coded).insights
    assert (dict(insight.segment), dict(insight.tag)) == ({"sex": "f"}, {"tone": "loud"})
    assert insight.ci_low < np.expm1(0.6) < insight.ci_high


def test_without_signs_of_it_little_is_held_and_never_more_than_there_is_room_for() -> None:
    held = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        product, variant = rng.integers(0, 3, 6_000), rng.integers(0, 6, 6_000)
        woman = people(product, rng, (0.2, 0.5, 0.8))
        logit = np.full(6_000, -1.5) + 0.3 * product
        held.append(code(shown(woman, variant, logit, rng, product=[f"p{p}" for p in product]), dependent=False).held)
    assert np.mean([len(one) for one in held]) < 1.2  # of two dimensions and a product, a quarter each
    assert all(sum(one.width for one in some) <= MOST_CELLS for some in held)
    rng = np.random.default_rng(1)
    context = {f"c{i}": rng.choice([f"v{j}" for j in range(30)], N).tolist() for i in range(20)}
    variant = rng.integers(0, 6, N)
    woman = people(np.zeros(N, int), rng, (0.5,))
    coded = code(shown(woman, variant, np.zeros(N), rng, context=context), dependent=False)
    assert sum(one.width for one in coded.held) <= MOST_CELLS


def test_some_of_the_rows_keep_their_cells() -> None:
    rng = np.random.default_rng(0)
    product, variant = rng.integers(0, 3, N), rng.integers(0, 6, N)
    woman = people(product, rng, (0.2, 0.5, 0.8))
    logit = -1.5 + 0.5 * (product - 1) * np.isin(variant, (2, 3))
    coded = code(shown(woman, variant, logit, rng, product=[f"p{p}" for p in product]), dependent=False)
    rows = np.arange(0, N, 7)
    for held, some in zip(coded.held, coded.take(rows).held, strict=True):
        assert (held.codes[rows] == some.codes).all() and held.width == some.width
