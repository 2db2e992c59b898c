"""A world is read strictly: what is wrong with it is named by its field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kaleidoscope.errors import InputError
from kaleidoscope.simulation import WORLD, read_population

FEATURES: list[dict[str, Any]] = [
    {"name": "age", "quantiles": [20, 40, 60]},
    {"name": "work", "shares": {"blue": 0.5, "white": 0.5}},
]


def problem(tmp_path: Path, **spec: Any) -> str:
    path = tmp_path / "world.yaml"
    path.write_text(yaml.safe_dump({"features": FEATURES, **spec}))
    with pytest.raises(InputError) as caught:
        read_population(path)
    assert str(path) in caught.value.message
    return caught.value.message


def term(**fields: Any) -> list[dict[str, Any]]:
    return [{"id": "f", "says": "x", "terms": [{"tag": "headline=plain", **fields}]}]


def test_default_world_is_what_it_promises() -> None:
    spec = read_population()
    assert (spec.base_ctr, spec.effects.tag_sd, spec.effects.material_sd) == (0.04, 0.15, 0.1)
    assert (spec.random_interactions.count, spec.random_interactions.size) == (6, (0.2, 0.4))
    assert len(spec.findings) == 6
    sizes = [abs(t.effect) for f in spec.findings for t in f.terms if t.effect is not None]
    sizes += [abs(size) for f in spec.findings for t in f.terms for line in t.along.values() for size in line.values()]
    assert max(sizes) == 0.5


def test_tags_are_those_of_the_built_in_taxonomy() -> None:
    spec = read_population()
    dimensions = yaml.safe_load(WORLD.parent.with_name("taxonomy.yaml").read_text())["dimensions"]
    known = {f"{d['id']}={v['id']}" for d in dimensions for v in d["values"]}
    named = {*spec.tags, *spec.random_interactions.tags, *(t.tag for f in spec.findings for t in f.terms)}
    assert named - {"urgency=*"} <= known
    assert {*spec.fatigue.dimensions, "urgency"} <= {d["id"] for d in dimensions}


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"base_ctr": 1.5}, "base_ctr: "),
        ({"bas_ctr": 0.1}, "bas_ctr: there is no such field"),
        ({"features": [{"name": "age"}]}, "features[0]: give either quantiles (a number) or shares"),
        ({"features": [{"name": "age", "quantiles": [3, 2]}]}, "features[0]: quantiles: have to rise"),
        ({"features": [{"name": "a", "shares": {"x": 0.5, "y": 0.4}}]}, "features[0]: shares: sum to 0.9"),
        ({"features": [*FEATURES, {"name": "age", "quantiles": [1, 2]}]}, "features: two have the same name"),
        ({"correlations": [{"between": ["age", "wrk"], "rho": 0.1}]}, "correlations[0].between: there is no feature"),
        ({"correlations": [{"between": ["age", "age"], "rho": 0.1}]}, "correlations[0].between: names 'age' twice"),
        ({"correlations": [{"between": ["age", "work"], "rho": 2}]}, "correlations[0].rho: "),
        ({"findings": term()}, "findings[0].terms[0]: give either effect"),
        ({"findings": term(effect=1, when={"wrk": "blue"})}, "findings[0].terms[0].when: there is no feature 'wrk'"),
        ({"findings": term(effect=1, when={"work": "green"})}, "when.work: 'green' is not one of blue, white"),
        ({"findings": term(effect=1, when={"work": {"from": 1}})}, "when.work: is a choice"),
        ({"findings": term(effect=1, when={"age": ["old", "young"]})}, "when.age: is a number"),
        ({"findings": term(effect=1, when={"age": {"upto": 5}})}, "findings[0].terms[0].when.age.upto: "),
        ({"findings": term(along={"work": {0: 1, 1: 2}})}, "findings[0].terms[0].along.work: is a choice"),
        ({"findings": term(along={"wrk": {0: 1, 1: 2}})}, "findings[0].terms[0].along: there is no feature 'wrk'"),
        ({"tags": {"headline": 0.1}}, "tags.headline"),
        ({"random_interactions": {"count": 1}}, "random_interactions.count: 1 pairs are asked for"),
        ({"random_interactions": {"size": [0.4, 0.2]}}, "random_interactions.size: the first has to be the smaller"),
        ({"random_interactions": {"features": ["wrk"]}}, "random_interactions.features[0]: there is no feature"),
        ({"traffic": {"hours": {0: 0}}}, "traffic.hours[0]: "),
        ({"weekdays": [0]}, "weekdays: "),
    ],
)
def test_names_the_field_that_is_wrong(tmp_path: Path, spec: dict[str, Any], said: str) -> None:
    assert said in problem(tmp_path, **spec)


def test_refuses_correlations_that_cannot_hold_together(tmp_path: Path) -> None:
    features = [{"name": name, "quantiles": [0, 1]} for name in "abc"]
    pairs = [("a", "b", 0.9), ("b", "c", 0.9), ("a", "c", -0.9)]
    correlations = [{"between": [a, b], "rho": rho} for a, b, rho in pairs]
    assert "correlations: cannot all hold together" in problem(tmp_path, features=features, correlations=correlations)


def test_refuses_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "world.yaml").write_text("- age\n")
    with pytest.raises(InputError, match="a world is a mapping"):
        read_population(tmp_path / "world.yaml")
