"""What counts as recovered: insights written by hand against the default world, whose findings are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from attribution.insights import Insight
from kaleidoscope.commands.demo_insights import recovered
from kaleidoscope.simulation import Population, SimulatedScene, example_variants, read_population

DEMO = Path(__file__).parents[3] / "examples" / "demo_scene"


@pytest.fixture(scope="module")
def scene() -> SimulatedScene:
    return Population(read_population(), 0).scene(example_variants(DEMO))


def insight(segment: str, tag: str, effect: float) -> Insight:
    field, _, label = segment.partition("=")
    dimension, _, value = tag.partition("=")
    return Insight({field: label}, {dimension: value}, effect, None, effect - 0.1, effect + 0.1, 0.01, 900)


TRUE = [
    insight("income=[-inf, 52000)", "headline=product_name", 0.5),
    insight("age=[-inf, 33)", "button_colour=blue", 0.3),
    insight("age=[57, inf)", "button_colour=blue", -0.3),
    insight("occupation=white_collar", "subject=gold", 0.3),
    insight("investor=advanced", "authority=brand", 0.3),
    insight("credit_card=none", "yield=since_launch", 0.4),
    insight("age=[41, 50)", "urgency=industry_trend", 0.5),
    insight("age=[57, inf)", "density=dense", 0.6),
]


def test_every_finding_that_is_said_with_its_sign_is_recovered(scene: SimulatedScene) -> None:
    assert list(recovered(TRUE, scene)) == [finding.id for finding in scene.population.spec.findings]
    assert all(recovered(TRUE, scene).values())
    assert not any(recovered([], scene).values())


def test_what_is_said_with_the_other_sign_or_for_one_feature_of_two_is_not(scene: SimulatedScene) -> None:
    found = recovered([*TRUE[1:], insight("income=[75000, inf)", "headline=product_name", 0.5)], scene)
    assert [name for name, there in found.items() if not there] == ["headline-by-income"]
    found = recovered([*TRUE, insight("age=[65, inf)", "button_colour=blue", 0.2)], scene)
    assert [name for name, there in found.items() if not there] == ["button-by-age"]
    found = recovered([one for one in TRUE if "investor" not in one.segment], scene)
    assert [name for name, there in found.items() if not there] == ["elements-by-work-and-experience"]


def test_what_says_nothing_of_a_finding_neither_recovers_nor_refutes_it(scene: SimulatedScene) -> None:
    besides = [
        insight("age=missing", "density=dense", 0.4),  # in truth nobody knows who they are
        insight("gender=female", "button_colour=blue", -0.4),
        insight("age=[-inf, 33)", "button_colour=unheard", -0.4),
    ]
    assert not any(recovered(besides, scene).values())
    assert recovered([*TRUE, *besides], scene) == recovered(TRUE, scene)
