"""How true insights are, on worlds whose preferences are known: recall, false discoveries, coverage, null worlds.

Worlds have eight correlated user features (numbers and choices), materials that carry two tags each, and planted
preferences of odds ratios 1.2–2 between halves of the users; logs are 200,000 exposures of the random bucket. `--twin`
adds logs of a model bucket (share epsilon at random, propensities logged) beside the random twin of the same people.
All these numbers are simulated; `--real FOLDER` tells what real logs say. `--methods` says which methods are judged;
`--out FILE` keeps a line of JSON per world and method, and a second run goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from scipy import stats
from scipy.special import expit

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # this file has the name of the package

from attribution.coding import Coded, code
from attribution.insights import Diagnostics, Insight, attribute_coded, halves, without_noise
from attribution.screening import screen
from kaleidoscope.commands.demo_insights import preferences_of
from kaleidoscope.log import Codes, Floats, Log, read_log
from kaleidoscope.log_schema import LogSchema, read_schema
from kaleidoscope.ranker import Ranker
from kaleidoscope.simulation import (
    People,
    Population,
    PopulationSpec,
    SimulatedScene,
    example_variants,
    read_population,
)
from kaleidoscope.vocabulary import Method

DEMO = Path(__file__).parents[1] / "examples" / "demo_scene"

SLOTS = {"copy": ("tone", "urgency"), "image": ("style", "colour"), "layout": ("density", "button")}
MATERIALS = 6  # of each slot
VALUES = 3  # of each tag dimension
RATIOS = (1.2, 2.0)  # odds ratios between the halves
POWER = 0.9
EPSILON = 0.1  # of a model bucket, shown at random
ERROR = 0.15  # of its model, in the logit
SLICE = 20_000
CLEAR = 2.0  # standard errors that a twin's insight should be off 0 in the model bucket, to be asked for its sign

FEATURES: list[dict[str, Any]] = [
    {"name": "age", "quantiles": [18, 25, 32, 41, 53, 75]},
    {"name": "income", "quantiles": [1, 2.4, 3.5, 5, 9, 40], "step": 0.1, "missing": 0.1},
    {"name": "tenure", "quantiles": [0, 3, 12, 30, 90]},
    {"name": "city", "shares": {"small": 0.4, "middle": 0.35, "large": 0.25}},
    {"name": "education", "shares": {"school": 0.3, "college": 0.4, "university": 0.3}},
    {"name": "gender", "shares": {"female": 0.5, "male": 0.5}},
    {"name": "device", "shares": {"old": 0.2, "android": 0.5, "ios": 0.3}},
    {"name": "channel", "shares": {"search": 0.3, "social": 0.25, "mail": 0.25, "direct": 0.2}},
]
CORRELATIONS = [
    {"between": ["age", "income"], "rho": 0.4},
    {"between": ["income", "education"], "rho": 0.5},
    {"between": ["income", "city"], "rho": 0.3},
    {"between": ["age", "tenure"], "rho": 0.3},
    {"between": ["income", "device"], "rho": 0.3},
]


@dataclass(frozen=True)
class Variant:
    id: str
    materials: dict[str, str]
    tags: Mapping[str, tuple[str, ...]]


def variants(seed: int) -> list[Variant]:
    """Every combination of three materials; each material carries a value of both dimensions of its slot."""
    rng = np.random.default_rng([seed, 7])
    options = []
    for slot, dimensions in SLOTS.items():
        columns = [rng.permutation(np.arange(MATERIALS) % VALUES) for _ in dimensions]
        options.append([(slot, m, {d: f"{d}_{c[m]}" for d, c in zip(dimensions, columns, strict=True)})
                        for m in range(MATERIALS)])  # fmt: skip
    found = []
    for chosen in product(*options):
        tags = {d: (v,) for _, _, carried in chosen for d, v in carried.items()}
        found.append(Variant("-".join(str(m) for _, m, _ in chosen), {s: f"{s}_{m}" for s, m, _ in chosen}, tags))
    return found


def population(seed: int, interactions: int, base_ctr: float = 0.05) -> Population:
    tags = [f"{d}={d}_{v}" for dimensions in SLOTS.values() for d in dimensions for v in range(VALUES)]
    size = tuple(float(np.log(ratio) / 2) for ratio in RATIOS)
    spec = {
        "base_ctr": base_ctr,
        "features": FEATURES,
        "correlations": CORRELATIONS,
        "effects": {"tag_sd": 0.15, "material_sd": 0.05, "feature_sd": 0.2},
        "random_interactions": {
            "count": interactions, "size": size, "features": [f["name"] for f in FEATURES], "tags": tags,
        },
    }  # fmt: skip
    return Population(PopulationSpec.model_validate(spec), seed)


def planted(seed: int, interactions: int, rows: int) -> tuple[Log, Floats, set[tuple[str, str]]]:
    """A log of the random bucket, the click probabilities of its exposures, and the pairs that interact in truth."""
    world, shown, rng = population(seed, interactions), variants(seed), np.random.default_rng([seed, 11])
    scene, people = world.scene(shown), world.people(rows)
    variant = rng.integers(0, len(shown), rows)
    probability = expit(scene.click_logit_of(people, variant))
    return log_of(people, shown, variant, rng.random(rows) < probability), probability, world.planted_pairs()


def log_of(
    people: People, shown: Sequence[Variant], variant: Codes, click: NDArray[np.bool_], propensity: Floats | None = None
) -> Log:
    """One exposure of each of these people, in memory."""
    rows, columns = len(variant), dict[str, Any]()
    for feature in people.spec.features:
        values, mask = people.values[feature.name], ~people.known[feature.name]
        if feature.quantiles is not None:
            columns[feature.name] = pa.array(values, mask=mask)
        else:
            codes = pa.array(values.astype(np.int32), mask=mask)
            columns[feature.name] = pa.DictionaryArray.from_arrays(codes, pa.array(feature.choices))
    dimensions = [d for of_slot in SLOTS.values() for d in of_slot]
    table: dict[str, Any] = {"variant_id": [v.id for v in shown]}
    table |= {d: [list(v.tags[d]) for v in shown] for d in dimensions}
    schema = LogSchema(
        label="click",
        user=tuple(columns),
        variant=tuple(dimensions),
        propensity="p" if propensity is not None else None,
    )
    return Log(
        path=Path("planted"), schema=schema, columns=columns, reward=click.astype(np.float32), count=np.ones(rows),
        weight=np.ones(rows), variant=variant, variants=pa.table(table), unit=np.arange(rows), group=None, groups=None,
        product=None, products=None, bucket=None, buckets=None, propensity=propensity, time=None,
        file_row=np.arange(rows), file_rows=rows,
    )  # fmt: skip


# ── methods ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Judged:
    """What a method found on a log whose click probabilities are known."""

    insights: Sequence[Insight]
    diagnostics: Diagnostics
    used: Coded  # the exposures that its intervals are about
    alone: Floats  # (m,) what the examined estimate
    joint: Floats  # (K,) what the insights estimate


def _statistics(_: Log, coded: Coded, probability: Floats) -> Judged:
    found = attribute_coded(coded)
    return Judged(found.insights, found.diagnostics, coded, *without_noise(coded, probability, found.diagnostics))


def _preference(_: Log, coded: Coded, probability: Floats) -> Judged:
    from attribution import preference

    found = preference.preferences(coded)
    return Judged(
        found.insights, found.diagnostics, coded, *preference.without_noise(coded, probability, found)
    )  # fmt: skip


def _grid(_: Log, coded: Coded, probability: Floats) -> Judged:
    from attribution import grid

    found = grid.grid(coded)
    return Judged(found.insights, found.diagnostics, coded, *grid.without_noise(coded, probability, found))


def _ebm(_: Log, coded: Coded, probability: Floats) -> Judged:
    from attribution.ebm import ebm

    return _confirmed(ebm(coded), coded, probability)


def _contributions(_: Log, coded: Coded, probability: Floats) -> Judged:
    from attribution.contributions import lightgbm_contributions

    return _confirmed(lightgbm_contributions(coded), coded, probability)


def _network(log: Log, coded: Coded, probability: Floats) -> Judged:
    """A network of the same log, as far as it has terms of fields and tags; it seconds what the statistics find."""
    from attribution.contributions import network_contributions

    statistics = attribute_coded(coded)
    found = network_contributions(log, coded, trained_on(log), statistics=statistics)
    alone, joint = without_noise(coded, probability, statistics.diagnostics)
    of = dict(zip(map(key_of, statistics.insights), joint, strict=True))
    own = [insight for insight in found.insights if insight.importance["network"] * insight.effect > 0]
    return Judged(own, found.diagnostics, coded, alone, np.array([of[key_of(insight)] for insight in own]))


def trained_on(log: Log) -> Ranker:
    """The tables of a CTR network that learned from all of a log, exported."""
    from kaleidoscope.encoding import Encoder
    from models.batch import Examples
    from models.export import export_model
    from models.networks import DeepConfig, DeepPart
    from models.tables import fit_tables
    from models.train import CtrModel

    dimensions = log.schema.variant
    encoder = Encoder.fit(log.columns, user=log.schema.user, context=(), variants=log.variants, dimensions=dimensions)
    tables = fit_tables(Examples.of(log, encoder), encoder)
    layout = tables.layout
    shut = DeepPart(DeepConfig(layout.n_crossed, layout.crossed_tags.shape[1], 4, 8, 2))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        export_model(
            CtrModel(tables, shut, 0.0), folder, version="planted", variants=log.variants, log_hash="-", seed=0,
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
        )  # fmt: skip
        return Ranker.load(folder)


def _confirmed(found: Any, coded: Coded, probability: Floats) -> Judged:
    """Of a method that discovers on one half of the units and confirms on the other."""
    used, known = halves(coded)[1], halves(replace(coded, reward=probability))[1].reward
    return Judged(found.insights, found.diagnostics, used, *without_noise(used, known, found.diagnostics))


METHODS: dict[str, Callable[[Log, Coded, Floats], Judged]] = {
    Method.STATISTICS: _statistics, Method.PREFERENCE: _preference, Method.GRID: _grid, Method.EBM: _ebm,
    Method.CONTRIBUTIONS: _contributions, Method.NETWORK: _network,
}  # fmt: skip
VOICES = tuple(name for name in METHODS if name != Method.NETWORK)  # it adds none of its own
CONSENSUS = "consensus"


def measure(
    seed: int, interactions: int, rows: int, methods: Sequence[str] = (Method.STATISTICS,)
) -> dict[str, dict[str, Any]]:
    """What each method found in one world, and how true it is."""
    log, probability, truth = planted(seed, interactions, rows)
    coded = code(log, dependent=False)
    return {
        method: {"method": method, "seed": seed, "interactions": interactions, "rows": rows}
        | judge(METHODS[method], log, coded, probability, truth)
        for method in methods
    }


def judge(
    method: Callable[[Log, Coded, Floats], Judged],
    log: Log,
    coded: Coded,
    probability: Floats,
    truth: set[tuple[str, str]],
) -> dict[str, Any]:
    """The figures of one method in one world."""
    start = time.perf_counter()
    result = method(log, coded, probability)  # with the little that it takes to know the truth
    seconds = time.perf_counter() - start
    examined = result.diagnostics.examined
    known = np.isfinite(result.alone)
    low, high = examined.interval()
    covered = ((low <= result.alone) & (result.alone <= high))[known]
    found = [
        {
            "segment": dict(i.segment), "tag": dict(i.tag), "effect": i.effect, "ci_low": i.ci_low,
            "ci_high": i.ci_high, "q_value": i.q_value, "n": i.n, "preference": i.preference,
            "true": bool(pairs_of(i) & truth), "several": len(i.segment) > 1 or i.crossed,
            "importance": dict(i.importance),
            "covered": bool(i.ci_low - 1e-9 <= np.expm1(g) <= i.ci_high + 1e-9) if np.isfinite(g) else None,
        } for i, g in zip(result.insights, result.joint, strict=True)
    ]  # fmt: skip
    strong = sorted(strong_pairs(result, probability, coded, truth))
    recalled = [pair for pair in strong if any(pair in pairs_of(i) for i in result.insights)]
    return {
        "seconds": seconds, "examined": len(result.alone), "covered": int(covered.sum()), "coverable": len(covered),
        "strong": strong, "recalled": recalled, "found": found,
    }  # fmt: skip


def pairs_of(insight: Insight) -> set[tuple[str, str]]:
    """The (user field, tag dimension) pairs an insight speaks about."""
    return {(field, dimension) for field in insight.segment for dimension in insight.tag}


def strong_pairs(
    result: Judged, probability: Floats, coded: Coded, truth: set[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Planted pairs of which the method had power ≥ POWER for some segment × tag, under the threshold it used.

    A method that confirms what it discovered elsewhere has looked at candidates only; for what it did not propose the
    threshold is the middle one of those it did (of a single test, where it proposed nothing), so that missing an effect
    in the discovery counts as missing it.
    """
    examined, alone = result.diagnostics.examined, result.alone
    threshold = examined.search.threshold
    cells = list(zip(examined.segments, examined.tags, strict=True))
    if result.used is not coded:
        every = screen(result.used).examined
        known = halves(replace(coded, reward=probability))[1].reward
        alone = without_noise(result.used, known, replace(result.diagnostics, examined=every, selected=()))[0]
        other = float(np.median(threshold)) if len(threshold) else float(stats.norm.isf(0.025))
        own = dict(zip(cells, threshold, strict=True))
        cells = list(zip(every.segments, every.tags, strict=True))
        threshold, examined = np.array([own.get(cell, other) for cell in cells]), every
    fields = {field.name for field in coded.fields}
    strong: set[tuple[str, str]] = set()
    for (segment, tag), bar, value, se in zip(cells, threshold, alone, examined.se, strict=True):
        if segment.field not in fields or tag >= len(coded.tags) or not np.isfinite(value):
            continue  # of several fields or dimensions: no such effect is planted
        if stats.norm.sf(bar - abs(value / se)) >= POWER:
            strong |= {(segment.field, dimension) for dimension in coded.tags[tag].dimensions} & truth
    return strong


def agreed(of_world: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The consensus of the figures of methods; strong is what the statistics, or two of them, had power for."""
    from attribution.consensus import consensus

    by_method = {method: [insight_of(entry, method) for entry in f["found"]] for method, f in of_world.items()}
    entries = {(m, *key_of(entry)): entry for m, f in of_world.items() for entry in f["found"]}
    found = [entries[one.insight.methods[0], *key_of(one.insight)] for one in consensus(by_method)]
    voices = [(m, tuple(pair)) for m, f in of_world.items() for pair in f["strong"]]
    count = Counter(pair for m, pair in voices for _ in range(2 if m == Method.STATISTICS else 1))
    strong = sorted(pair for pair, methods in count.items() if methods >= 2)
    spoken = {(field, d) for entry in found for field in entry["segment"] for d in entry["tag"]}
    first = next(iter(of_world.values()))
    return {
        "method": CONSENSUS, **{key: first[key] for key in ("seed", "interactions", "rows")},
        "seconds": 0.0, "examined": 0, "covered": 0, "coverable": 0,
        "strong": strong, "recalled": [pair for pair in strong if pair in spoken], "found": found,
    }  # fmt: skip


def insight_of(entry: Mapping[str, Any], method: str) -> Insight:
    """The insight that an entry of the figures tells of."""
    names = ("segment", "tag", "effect", "preference", "ci_low", "ci_high", "q_value", "n")
    return Insight(
        **{name: entry[name] for name in names}, methods=(method,), crossed=entry["several"],
        importance=entry.get("importance", {}),
    )  # fmt: skip


def key_of(found: Any) -> tuple[Any, ...]:
    """Segment and tag of an insight or an entry."""
    segment, tag = (found["segment"], found["tag"]) if isinstance(found, dict) else (found.segment, found.tag)
    return tuple(sorted(segment.items())), tuple(sorted(tag.items()))


# ── a model bucket and its random twin ──────────────────────────────────────────────────────────────────────────────


def twins(seed: int, interactions: int, rows: int, epsilon: float) -> tuple[Log, Log, Floats, set[tuple[str, str]]]:
    """A log of variants that a model chose, but for a share epsilon at random; the log of its twin, in which the same
    people saw variants at random; the twin's click probabilities; and the pairs that interact in truth.

    The model knows the true logits but for an error of sd ERROR in what a variant is to each value of one user feature,
    as if it had learnt from a finite log.
    """
    world, shown, rng = population(seed, interactions), variants(seed), np.random.default_rng([seed, 13])
    scene, people = world.scene(shown), world.people(rows)
    at_random, best = rng.integers(0, len(shown), rows), np.empty(rows, np.int64)
    error = rng.normal(0, ERROR, (8, len(shown)))
    channel = people.values["channel"].astype(np.int64)
    for start in range(0, rows, SLICE):
        some = np.arange(start, min(start + SLICE, rows))
        best[some] = (scene.click_logit(people.take(some)) + error[channel[some]]).argmax(axis=1)
    chosen = np.where(rng.random(rows) < epsilon, rng.integers(0, len(shown), rows), best)
    propensity = epsilon / len(shown) + (1 - epsilon) * (chosen == best)
    p_chosen, p_random = (expit(scene.click_logit_of(people, v)) for v in (chosen, at_random))
    model = log_of(people, shown, chosen, rng.random(rows) < p_chosen, propensity)
    uniform = log_of(people, shown, at_random, rng.random(rows) < p_random)
    return model, uniform, p_random, world.planted_pairs()


def compare_twins(seed: int, interactions: int, rows: int, epsilon: float = EPSILON) -> dict[str, Any]:
    """What a model bucket says beside its random twin: whether it gives the twin's insights the same signs, whether its
    intervals hold what the twin estimates, and how wide they are, beside what its effective sample size implies."""
    model, uniform, probability, truth = twins(seed, interactions, rows, epsilon)
    coded, twin = code(model, dependent=True), code(uniform, dependent=False)
    found, other = attribute_coded(coded), attribute_coded(twin)
    ours, theirs = found.diagnostics, other.diagnostics
    at = {pair: i for i, pair in enumerate(zip(theirs.examined.segments, theirs.examined.tags, strict=True))}
    expected = screen(replace(twin, reward=probability)).examined
    of = dict(zip(zip(expected.segments, expected.tags, strict=True), expected.gamma, strict=True))
    low, high = ours.examined.interval()
    cells = [
        (i, at[pair], of[pair])
        for i, pair in enumerate(zip(ours.examined.segments, ours.examined.tags, strict=True))
        if pair in at and pair in of
    ]
    mine, its, true = (np.array(column) for column in zip(*cells, strict=True))
    mine, its = mine.astype(np.int64), its.astype(np.int64)
    wider = ours.examined.se[mine] / theirs.examined.se[its]
    reported = np.isin(its, [at[pair] for pair in theirs.selected])
    reported &= np.abs(theirs.examined.z[its]) >= CLEAR * wider  # otherwise the model bucket can hardly tell the sign
    signs = np.sign(ours.examined.gamma[mine]) == np.sign(theirs.examined.gamma[its])
    return {
        "method": "twin", "seed": seed, "interactions": interactions, "rows": rows,
        "effective_share": ours.effective_share, "clipped": ours.clipped,
        "width": float(np.median(wider)), "implied": float(ours.effective_share**-0.5),
        "signed": int(reported.sum()), "same_sign": int(signs[reported].sum()),
        "covered": int(((low[mine] <= true) & (true <= high[mine])).sum()), "coverable": len(true),
        "insights": len(found.insights), "of_twin": len(other.insights),
        "false": sum(not pairs_of(i) & truth for i in found.insights),
    }  # fmt: skip


# ── real logs ───────────────────────────────────────────────────────────────────────────────────────────────────────

PROFILE = (
    "gender", "age", "maritalStatus", "has_children", "education", "occupation", "income", "Bar", "CoffeeHouse",
    "CarryAway", "RestaurantLessThan20", "Restaurant20To50",
)  # fmt: skip
BAR_VISITS = ("never", "less1", "1~3", "4~8", "gt8")  # a month
HISTORY = ("recency", "history", "mens", "womens", "zip_code", "newbie", "channel")


def coupons(data: Path) -> Coded:
    """UCI 603: coupons for drivers, accepted or not; people are told apart by what is known of them."""
    schema = LogSchema(
        label="Y", unit=(*PROFILE, "car"), context=("destination", "time"), user=PROFILE,
        variant=("coupon", "expiration"),
    )  # fmt: skip
    return code(read_log(data / "coupon" / "coupons_uci.csv", schema))


def mails(data: Path) -> Coded:
    """Hillstrom: men's, women's, or no e-mail to 64,000 customers, drawn uniformly; whether they visited."""
    schema = LogSchema(label="visit", user=HISTORY, variant=("segment",), arms="uniform")
    return code(read_log(data / "hillstrom" / "hillstrom.csv", schema))


def headlines(data: Path) -> Coded:
    """Upworthy's clean weeks: packages within tests, by what is in their headline."""
    import pandas as pd

    tests = pd.read_parquet(data / "upworthy" / "upworthy.parquet")
    tests = tests[~tests.bad_randomisation_window.astype(bool)]
    headline = tests.headline.fillna("")
    found = {"question": r"\?", "digits": r"\d", "you": r"\byou"}
    tags = {name: np.where(headline.str.contains(p, case=False), "yes", "no") for name, p in found.items()}
    schema = LogSchema(
        clicks="clicks", impressions="impressions", group="clickability_test_id", variant=tuple(found)
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tests.parquet"
        tests.assign(**tags).to_parquet(path)
        return code(read_log(path, schema))


def summarise_real(data: Path) -> None:
    """What real logs say, beside what is known of them."""
    from attribution.preference import preferences

    print("── real logs")
    coded = coupons(data)
    rates = {c.segment["Bar"]: c for c in preferences(coded).cells if "Bar" in c.segment and c.tag == {"coupon": "Bar"}}
    told = ", ".join(f"{visits} {100 * (rates[visits].ctr or 0):.0f} %" for visits in BAR_VISITS)
    print(f"Coupon: the Bar coupon is accepted, by visits to bars a month, by {told}")
    _tell(attribute_coded(coded).insights, {"Bar"}, {"coupon": "Bar"})
    print("Hillstrom: of a visit after an e-mail")
    _tell(attribute_coded(mails(data)).insights, set(HISTORY), {"segment": "Womens E-Mail"})
    print("Upworthy, clean weeks, within tests: clicks of headlines with it over those without, Mantel–Haenszel")
    for main_effect in attribute_coded(headlines(data)).main_effects:
        if "yes" in main_effect.tag.values():
            low, high = (f"{100 * end:+.1f}" for end in (main_effect.ci_low, main_effect.ci_high))
            print(f"  {main_effect.tag}: {100 * main_effect.effect:+.1f} % ({low} to {high})")


def _tell(insights: Sequence[Insight], fields: set[str], tag: Mapping[str, str]) -> None:
    for one in insights:
        if one.tag == tag and fields & one.segment.keys():
            print(f"  {dict(one.segment)}: {one.effect:+.2f} ({one.ci_low:+.2f} to {one.ci_high:+.2f})")


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def demo_log(seed: int, visits: int) -> Iterator[tuple[Path, Path, SimulatedScene]]:
    """A log of the demo's scene, whose ten pictures carry up to five tags each, and its world, in which people come
    back and tire: the log, its schema, and what is true."""
    world = Population(read_population(), seed)
    scene, people = world.scene(example_variants(DEMO)), world.people(visits // 10)
    traffic = world.traffic(people, start=datetime(2026, 1, 5, tzinfo=UTC), days=14)
    rows = scene.log(people, traffic, np.random.default_rng([seed, 5]))
    with tempfile.TemporaryDirectory() as folder:
        path, schema = Path(folder) / "log.parquet", Path(folder) / "schema.yaml"
        pq.write_table(rows, path)
        schema.write_text(yaml.safe_dump(scene.schema()), encoding="utf-8")
        yield path, schema, scene


def compare_findings(seed: int, visits: int) -> dict[str, Any]:
    """What the statistics find in the demo's world."""
    with demo_log(seed, visits) as (path, schema, scene):
        found = preferences_of(read_log(path, read_schema(schema)), scene)
    return {
        "seed": seed, "exposures": found["exposures"], "insights": len(found["insights"]), "planted": found["planted"],
        "findings": sum(found["findings"].values()), "of": len(found["findings"]),
    }  # fmt: skip


def time_report(visits: int) -> None:
    """How long `kaleidoscope attribute LOG` takes, and how much memory, of a log of the demo's scene."""
    from kaleidoscope.commands.attribute import attribute_log
    from kaleidoscope.progress import Silent

    with demo_log(0, visits) as (path, schema, _), tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        found = attribute_log(path, schema, Path(out), seed=0, progress=Silent(), simulated=True)
        seconds = time.perf_counter() - start
    stages = ", ".join(f"{name} {took:.1f}" for name, took in dict(found["timings_s"]).items())  # type: ignore[call-overload]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"── kaleidoscope attribute LOG: {found['exposures']:,} exposures in {seconds:.1f} s, {peak:.2f} GiB ({stages})"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every world, print tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, CONSENSUS], default=[*VOICES, CONSENSUS])
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--null-worlds", type=int, default=100)
    parser.add_argument(
        "--twin", type=int, default=0, metavar="WORLDS", help="worlds in which a model bucket is judged"
    )
    parser.add_argument(
        "--demo-worlds",
        type=int,
        default=0,
        metavar="WORLDS",
        help="worlds of the demo: its scene, people who come back",
    )
    parser.add_argument(
        "--real", type=Path, metavar="FOLDER", help="the folder of the real logs: they are told of, too"
    )
    parser.add_argument("--report", action="store_true", help="time a whole report of a log of --rows exposures")
    parser.add_argument("--interactions", type=int, default=6)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--null-rows", type=int, default=50_000)
    parser.add_argument("--out", type=Path, help="keep the figures there, a line of JSON each; go on from them")
    args = parser.parse_args(arguments)
    kept = _Kept(args.out)
    methods = [m for m in args.methods if m != CONSENSUS]
    wanted = [(args.interactions, args.rows, s) for s in range(args.worlds)]
    wanted += [(0, args.null_rows, 1_000 + s) for s in range(args.null_worlds)]
    for interactions, rows, seed in wanted:
        missing = [m for m in methods if (m, interactions, rows, seed) not in kept.figures]
        for figures in measure(seed, interactions, rows, missing).values() if missing else ():
            kept.add(figures)
    for seed in range(args.twin):
        if ("twin", args.interactions, args.rows, seed) not in kept.figures:
            kept.add(compare_twins(seed, args.interactions, args.rows))
    for method in args.methods:
        of_worlds = [
            agreed({m: kept.figures[m, *key] for m in methods if m in VOICES})
            if method == CONSENSUS
            else kept.figures[method, *key]
            for key in wanted
        ]
        print(f"── {method}")
        summarise([f for f in of_worlds if f["interactions"]])
        summarise_nulls([f for f in of_worlds if not f["interactions"]])
    summarise_twins([kept.figures["twin", args.interactions, args.rows, s] for s in range(args.twin)])
    summarise_demos([compare_findings(seed, args.rows) for seed in range(args.demo_worlds)])
    if args.real:
        summarise_real(args.real)
    if args.report:
        time_report(args.rows)


class _Kept:
    """Figures by (method, interactions, rows, seed), in a file too."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.figures = out, dict[tuple[Any, ...], dict[str, Any]]()
        for line in out.read_text(encoding="utf-8").splitlines() if out and out.exists() else ():
            self._keep(json.loads(line))

    def _keep(self, figures: dict[str, Any]) -> None:
        self.figures[tuple(figures[key] for key in ("method", "interactions", "rows", "seed"))] = figures

    def add(self, figures: dict[str, Any]) -> None:
        """A line more."""
        line = json.dumps(figures)
        self._keep(json.loads(line))  # tuples are lists there
        if self.out:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def summarise(worlds: Sequence[dict[str, Any]]) -> None:
    """A line per world, and what the issue asks for."""
    if not worlds:
        return
    print(" seed seconds examined insights false families false strong recalled coverage of reported")
    total: Counter[str] = Counter()
    shares = []
    for f in worlds:
        false = [entry for entry in f["found"] if not entry["true"]]
        families, wrong = ({family_of(entry) for entry in entries} for entries in (f["found"], false))
        told = [entry["covered"] for entry in f["found"] if entry["covered"] is not None]
        figures = {
            "insights": len(f["found"]), "false": len(false), "families": len(families), "wrong": len(wrong),
            "strong": len(f["strong"]), "recalled": len(f["recalled"]), "told": len(told), "held": sum(told),
            "covered": f["covered"], "coverable": f["coverable"],
            "several": sum(entry["several"] for entry in f["found"]),
        }  # fmt: skip
        total.update(figures)
        shares.append((len(false) / max(len(f["found"]), 1), len(wrong) / max(len(families), 1)))
        coverage = f"{f['covered'] / f['coverable']:>8.4f}" if f["coverable"] else f"{'':>8}"
        print(
            f"{f['seed']:>5} {f['seconds']:>7.1f} {f['examined']:>8} {figures['insights']:>8} {len(false):>5} "
            f"{len(families):>8} {len(wrong):>5} {figures['strong']:>6} {figures['recalled']:>8} {coverage} "
            f"{sum(told):>4} of {len(told)}"
        )
    of_insights, of_families = np.mean(shares, axis=0)
    coverage = f"{total['covered'] / total['coverable']:.4f} over all examined, " if total["coverable"] else ""
    print(
        f"recall {total['recalled'] / max(total['strong'], 1):.3f} of {total['strong']} with power ≥ {POWER}; "
        f"false discoveries {of_insights:.3f} of insights, {of_families:.3f} of (field, dimension), mean of "
        f"{len(worlds)} worlds; {total['several']} of {total['insights']} of several fields or dimensions at once, "
        f"where none is planted; coverage {coverage}{total['held'] / max(total['told'], 1):.4f} of {total['told']} "
        f"reported; {np.mean([f['seconds'] for f in worlds]):.1f} s a world"
    )


def family_of(entry: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The fields and dimensions of an entry."""
    return tuple(sorted(entry["segment"])), tuple(sorted(entry["tag"]))


def summarise_nulls(worlds: Sequence[dict[str, Any]]) -> None:
    """In how many worlds without preferences something is found."""
    if not worlds:
        return
    share = sum(bool(f["found"]) for f in worlds) / len(worlds)
    limit = 0.05 + 2 * (0.05 * 0.95 / len(worlds)) ** 0.5
    examined = sum(f["coverable"] for f in worlds)
    coverage = f"; coverage {sum(f['covered'] for f in worlds) / examined:.4f}" if examined else ""
    print(f"null worlds {len(worlds)}: something found in {share:.3f} (at most {limit:.3f}){coverage}")


def summarise_twins(worlds: Sequence[dict[str, Any]]) -> None:
    """What model buckets say beside their twins."""
    if not worlds:
        return
    print("── model bucket beside its random twin")
    print(" seed effective clipped width implied same sign coverage insights false of twin")
    for f in worlds:
        print(
            f"{f['seed']:>5} {f['effective_share']:>9.3f} {f['clipped']:>7.4f} {f['width']:>5.2f} {f['implied']:>7.2f} "
            f"{f['same_sign']:>4} of {f['signed']:>3} {f['covered'] / f['coverable']:>7.4f} {f['insights']:>8} "
            f"{f['false']:>5} {f['of_twin']:>7}"
        )
    total = Counter[str]()
    for f in worlds:
        total.update({key: f[key] for key in ("same_sign", "signed", "covered", "coverable")})
    width = np.mean([f["width"] / f["implied"] for f in worlds])
    signs = f"{total['same_sign']} of {total['signed']}"
    coverage = total["covered"] / total["coverable"]
    print(f"sign of the twin's insights {signs}; coverage {coverage:.4f}; width over implied {width:.3f}")


def summarise_demos(worlds: Sequence[dict[str, Any]]) -> None:
    """What is found in the demo's worlds."""
    if not worlds:
        return
    print("── the demo's worlds\n seed exposures insights planted findings")
    for f in worlds:
        print(
            f"{f['seed']:>5} {f['exposures']:>9,} {f['insights']:>8} {f['planted']:>7} {f['findings']:>3} of {f['of']}"
        )
    planted, insights = (sum(f[key] for f in worlds) for key in ("planted", "insights"))
    print(
        f"{planted} of {insights} insights are of a pair that interacts: {1 - planted / max(insights, 1):.3f} are not"
    )


if __name__ == "__main__":
    main()
