"""Worlds with planted preferences: the one generator of users, traffic and clicks for demo, tests and benchmarks.

A world knows its truth: the click probability of every variant for every user, and so the oracle. Numbers that come
from here are simulated, and say so wherever they are shown. `World` has anonymous fields and tags, everything drawn,
for tests of models. A `Population` has people with names for what they are and like, from a readable spec (world.yaml),
who click the described variants of any scene. docs/simulation.md explains both.
"""

from kaleidoscope.simulation.anonymous import Users, World, WorldSpec
from kaleidoscope.simulation.population import (
    Described,
    ExampleVariant,
    Exposures,
    Outcomes,
    People,
    Population,
    SimulatedScene,
    Visits,
    example_variants,
)
from kaleidoscope.simulation.spec import WORLD, Condition, Finding, PopulationSpec, Term, read_population

__all__ = [
    "WORLD",
    "Condition",
    "Described",
    "ExampleVariant",
    "Exposures",
    "Finding",
    "Outcomes",
    "People",
    "Population",
    "PopulationSpec",
    "SimulatedScene",
    "Term",
    "Users",
    "Visits",
    "World",
    "WorldSpec",
    "example_variants",
    "read_population",
]
