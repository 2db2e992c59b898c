"""Who prefers what, learned from the demo's random exposures, and held against what its world knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attribution.insights import Insight, attribute
from kaleidoscope.log import Log
from kaleidoscope.simulation import People, Population, SimulatedScene
from kaleidoscope.simulation.spec import RandomInteractions, pairs_of
from kaleidoscope.wording import ends_of

ASKED = 5_000  # simulated users who are asked what they like in truth
LEAST = 0.05  # in the logit, from which on a planted difference has a sign that an insight may have, or not


def preferences_of(log: Log, scene: SimulatedScene) -> dict[str, Any]:
    """What attribution finds in a log of the scene, strongest first, and which of the world's findings that recovers.

    `sentences` and `insights` say the same. `planted`: how many are of a (feature, tag dimension) that interacts in
    truth. `findings`: per published finding, whether it was recovered with the right sign.
    """
    found = attribute(log).insights
    truth = scene.population.planted_pairs()
    return {
        "exposures": log.n_exposures,
        "sentences": [insight.sentence for insight in found],
        "insights": [insight.to_json() for insight in found],
        "planted": sum(bool(_pairs(insight) & truth) for insight in found),
        "findings": recovered(found, scene),
    }


def recovered(insights: Sequence[Insight], scene: SimulatedScene) -> dict[str, bool]:
    """By finding of the world, whether the insights say it: something about each of its features, and with the sign
    that it has in truth, for that segment and tag, and nothing with the other sign."""
    world = scene.population
    people = world.people(ASKED, draw=1)
    out = {}
    for finding in world.spec.findings:
        alone = world.spec.model_copy(update={"findings": (finding,), "random_interactions": RandomInteractions()})
        only = replace(scene, population=Population(alone, world.seed))
        logits, pairs = only.click_logit(people), pairs_of(finding.terms)
        right, wrong = set[str](), False
        for insight in insights:
            said = {feature for feature, _ in _pairs(insight) & pairs}
            effect = _difference(insight, logits, people, scene) if said else 0.0
            if abs(effect) >= LEAST and effect * insight.effect > 0:
                right |= said
            elif abs(effect) >= LEAST:
                wrong = True
        out[finding.id] = right == {feature for feature, _ in pairs} and not wrong
    return out


def _pairs(insight: Insight) -> set[tuple[str, str]]:
    return {(name, dimension) for name in insight.segment for dimension in insight.tag}


def _difference(insight: Insight, logits: NDArray[np.float64], people: People, scene: SimulatedScene) -> float:
    """How much more the segment likes variants with the tag over others than all other users do; 0 where there are
    none to compare. Main effects cancel: every user is asked about every variant."""
    inside = _members(people, insight.segment)
    tags = [(dimension, value) for dimension, text in insight.tag.items() for value in text.split("|")]
    carried = np.array([all(value in one.tags.get(d, ()) for d, value in tags) for one in scene.variants])
    if inside.all() or not inside.any() or carried.all() or not carried.any():
        return 0.0
    likes = logits[:, carried].mean(axis=1) - logits[:, ~carried].mean(axis=1)
    return float(likes[inside].mean() - likes[~inside].mean())


def _members(people: People, segment: Mapping[str, str]) -> NDArray[np.bool_]:
    """(n,) who is of the segment, as far as requests know."""
    inside = np.ones(len(people), bool)
    for name, label in segment.items():
        feature = next(f for f in people.spec.features if f.name == name)
        values, known, ends = people.values[name], people.known[name], ends_of(label)
        if label == "missing":
            inside &= ~known
        elif feature.choices:
            inside &= known & (values == feature.choices.index(label))
        elif ends is not None:
            inside &= known & (values >= ends[0]) & (values < ends[1])
    return inside
