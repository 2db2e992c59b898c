"""Whether `portrait design` is right: what it expects of tags, held against simulated worlds whose truth is known.

    python benchmarks/portraits.py --worlds 8

In every world users have two fields (independent of each other, or correlated), variants carry a tag of each of three
dimensions, and three preferences are planted (odds ratios of 1.6 to 2.6, either way) beside main effects of fields and
tags. The same users are logged twice: by a random bucket, and by a model bucket that knows the world, shows everybody
the variant they like best, and explores with ε = .1. Either log is analysed, its portrait stored, and what to design
asked for every kind of user. The truth, of every variant shown to everybody alike, is the same for both. All is
simulated.

`held` is the share of answers whose 95 % interval has the truth in it; `found` the same of the answers of worlds whose
planted preferences were all found: what is too weak to be found is in no expectation. `sure` is how many intervals do
not hold 0, and `wrong` how many of those have the other sign than the truth. `error` is the mean distance from the
truth and `reach` the mean half width of the interval, both in logits.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.special import expit, logit
from tqdm import tqdm

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # a file beside this one has the name of the package attribution

from attribution.coding import code
from attribution.consensus import agreements
from attribution.insights import attribute_coded
from attribution.preference import preferences
from kaleidoscope.access import operator
from kaleidoscope.commands.attribute import overlaps_of, portrait_cells
from kaleidoscope.content import Copy
from kaleidoscope.database import Database, open_database
from kaleidoscope.log import Log
from kaleidoscope.log_schema import LogSchema
from kaleidoscope.materials import add_material
from kaleidoscope.portrait_design import Design, design_for
from kaleidoscope.portraits import PortraitRun, store_portrait
from kaleidoscope.scenes import create_scene, parse_scene
from kaleidoscope.tables import Business
from kaleidoscope.taxonomy import found_taxonomy
from kaleidoscope.vocabulary import Method

Floats = NDArray[np.float64]

SCENE = "simulated"
FIELDS = {"gender": ("f", "m"), "level": ("new", "old", "expert")}
DIMENSIONS = {"tone": ("calm", "loud", "plain"), "style": ("flat", "real"), "benefit": ("cash", "gift", "none")}
VARIANTS = list(itertools.product(*DIMENSIONS.values()))
KINDS = list(itertools.product(*FIELDS.values()))
RATES = (0.02, 0.08, 0.2)
EPSILON = 0.1


@dataclass(frozen=True)
class World:
    """Kinds of users, their shares, and their click probabilities (kinds, variants)."""

    share: Floats
    click: Floats
    planted: frozenset[tuple[str, str]]  # (field, dimension)

    @classmethod
    def drawn(cls, seed: int, rate: float, *, correlated: bool) -> World:
        """A world with this click rate, were all variants shown alike."""
        rng = np.random.default_rng([seed, round(1000 * rate), correlated])
        of_field = [rng.dirichlet([6.0] * len(values)) for values in FIELDS.values()]
        share = np.multiply.outer(*of_field)
        if correlated:  # most experts are men, most new users women
            share = share * np.array([[2.0, 1.0, 0.4], [0.5, 1.0, 2.0]])
        share = (share / share.sum()).ravel()
        z = np.zeros((len(KINDS), len(VARIANTS)))
        for f, values in enumerate(FIELDS.values()):
            of_value = dict(zip(values, rng.normal(0, 0.4, len(values)), strict=True))
            z += np.array([of_value[kind[f]] for kind in KINDS])[:, None]
        for d, values in enumerate(DIMENSIONS.values()):
            of_value = dict(zip(values, rng.normal(0, 0.25, len(values)), strict=True))
            z += np.array([of_value[variant[d]] for variant in VARIANTS])
        planted = set()
        pairs = list(itertools.product(range(len(FIELDS)), range(len(DIMENSIONS))))
        for at in rng.choice(len(pairs), 3, replace=False):
            f, d = pairs[int(at)]
            who, what = (rng.choice(list(values)[i]) for values, i in ((FIELDS.values(), f), (DIMENSIONS.values(), d)))
            likes = rng.uniform(np.log(1.6), np.log(2.6)) * rng.choice([-1, 1])
            z += likes * np.outer([kind[f] == who for kind in KINDS], [v[d] == what for v in VARIANTS])
            planted.add((list(FIELDS)[f], list(DIMENSIONS)[d]))
        low, high = -12.0, 6.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if share @ expit(z + middle).mean(axis=1) < rate else (low, middle)
        return cls(share, expit(z + low), frozenset(planted))

    def log(self, seed: int, n: int, epsilon: float) -> Log:
        """n exposures of a bucket that shows everybody what they like best, but for a share ε that is random."""
        kind = np.random.default_rng([seed, 1]).choice(len(KINDS), n, p=self.share)  # the same users in both buckets
        rng = np.random.default_rng([seed, 2, round(1000 * epsilon)])
        best = self.click.argmax(axis=1)[kind]
        variant = np.where(rng.random(n) < epsilon, rng.integers(0, len(VARIANTS), n), best)
        propensity = epsilon / len(VARIANTS) + (1 - epsilon) * (variant == best)
        schema = LogSchema(label="click", user=tuple(FIELDS), variant=tuple(DIMENSIONS), propensity="propensity")
        columns = {
            name: pa.array([KINDS[k][f] for k in kind.tolist()]).dictionary_encode() for f, name in enumerate(FIELDS)
        }
        tags = {name: [[variant[d]] for variant in VARIANTS] for d, name in enumerate(DIMENSIONS)}
        return Log(
            path=Path("simulated"), schema=schema, columns=columns, group=None, groups=None, product=None,
            products=None, bucket=None, buckets=None, time=None, unit=np.arange(n), variant=variant,
            reward=(rng.random(n) < self.click[kind, variant]).astype(np.float32), propensity=propensity,
            variants=pa.table({"variant_id": [f"v{i}" for i in range(len(VARIANTS))], **tags}),
            count=np.ones(n), weight=np.ones(n), file_row=np.arange(n), file_rows=n,
        )  # fmt: skip

    def truth(self, users: Mapping[str, str], dimension: str, value: str) -> float:
        """The log-odds ratio of a click of such users with the tag over what is shown in its place."""
        there = [all(kind[f] == users.get(name, kind[f]) for f, name in enumerate(FIELDS)) for kind in KINDS]
        size = np.where(there, self.share, 0.0)
        carried = np.array([variant[list(DIMENSIONS).index(dimension)] == value for variant in VARIANTS])
        rates = size @ self.click / size.sum()
        return float(logit(rates[carried].mean()) - logit(rates[~carried].mean()))


def scene_in(database: Database) -> None:
    """A business with a scene that portraits can be kept with."""
    with database.transaction(operator("benchmark", SCENE)) as session:
        session.add(Business(id=SCENE, name="Simulated", two_person_publish=False, placeholders=[]))
    with database.transaction(operator("benchmark", SCENE)) as session:
        found_taxonomy(session)
        for name in ("a", "b"):
            add_material(session, name, Copy(title=name), [])
        slot = {"name": "copy", "kind": "copy", "materials": ["a", "b"]}
        create_scene(session, SCENE, parse_scene({"name": "Simulated", "slots": [slot], "baseline": {"copy": "a"}}))


def designs(database: Database, log: Log) -> tuple[set[tuple[str, str]], Iterator[tuple[dict[str, str], Design]]]:
    """The (field, dimension) that were found in a log, and what to design for every kind of user by its portrait."""
    coded = code(log)
    statistics, preference = attribute_coded(coded), preferences(coded)
    agreed = agreements({Method.STATISTICS: statistics.insights, Method.PREFERENCE: preference.insights})
    analysis = SimpleNamespace(
        attribution=statistics, preference=preference, consensus=[one for one in agreed if one.holds]
    )
    found = {(*one.insight.segment, *one.insight.tag) for one in analysis.consensus}
    run = PortraitRun(
        "simulated", None, len(log), len(log), (Method.STATISTICS, Method.PREFERENCE), simulated=True,
        overlaps=overlaps_of(cast("Any", analysis)),
    )  # fmt: skip
    caller = operator("benchmark", SCENE)
    with database.transaction(caller) as session:
        store_portrait(session, SCENE, run, portrait_cells(cast("Any", analysis)))

    def ask() -> Iterator[tuple[dict[str, str], Design]]:
        for kind in itertools.product(*((None, *values) for values in FIELDS.values())):
            users = {name: value for name, value in zip(FIELDS, kind, strict=True) if value is not None}
            with database.transaction(caller, write=False) as session:
                yield users, design_for(session, SCENE, users)

    return cast("set[tuple[str, str]]", found), ask()


@dataclass
class Tally:
    """What came of the answers of several worlds."""

    answers: int = 0
    held: int = 0
    in_found: int = 0  # answers of worlds whose planted preferences were all found
    held_in_found: int = 0
    sure: int = 0
    wrong: int = 0
    error: float = 0.0
    reach: float = 0.0

    def add(self, truth: float, value: float, low: float, high: float, *, found: bool) -> None:
        """Another answer, in logits."""
        held = low <= truth <= high
        self.answers, self.held = self.answers + 1, self.held + held
        self.in_found, self.held_in_found = self.in_found + found, self.held_in_found + (found and held)
        sure = low > 0 or high < 0
        self.sure, self.wrong = self.sure + sure, self.wrong + (sure and (value > 0) != (truth > 0))
        self.error, self.reach = self.error + abs(value - truth), self.reach + (high - low) / 2

    def row(self) -> str:
        """It as columns of a table."""
        in_found = f"{self.held_in_found / self.in_found:7.1%}" if self.in_found else "       "
        return (
            f"{self.answers:7,} {self.held / self.answers:7.1%} {in_found} {self.sure:6,} {self.wrong:6,}"
            f" {self.error / self.answers:6.3f} {self.reach / self.answers:6.3f}"
        )


def measure(worlds: int, n: int) -> dict[tuple[float, bool, float], Tally]:
    """Tallies by click rate, whether fields are correlated, and ε."""
    tallies: dict[tuple[float, bool, float], Tally] = defaultdict(Tally)
    cases = list(itertools.product(RATES, (False, True), range(worlds)))
    for rate, correlated, seed in tqdm(cases, disable=not sys.stderr.isatty()):
        world = World.drawn(seed, rate, correlated=correlated)
        for epsilon in (1.0, EPSILON):
            with tempfile.TemporaryDirectory() as folder:
                database = open_database(f"sqlite:///{folder}/portraits.db")
                scene_in(database)
                found, asked = designs(database, world.log(seed, n, epsilon))
                for users, design in asked:
                    for tag in (tag for dimension in design.dimensions for tag in dimension.tags):
                        ((dimension, value),) = tag.tag.items()
                        told = [np.log1p(end) for end in (tag.expected, tag.low, tag.high) if end is not None]
                        tallies[rate, correlated, epsilon].add(
                            world.truth(users, dimension, value), *told, found=world.planted <= found
                        )
                database.close()
    return tallies


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=8, help="of each click rate, with and without correlated fields")
    parser.add_argument("--exposures", type=int, default=60_000)
    args = parser.parse_args()
    print(f"Simulated: {args.worlds} worlds of {args.exposures:,} exposures in each row; ε = {EPSILON} in bucket model")
    print("clicks fields      bucket answers    held   found   sure  wrong  error  reach")
    for (rate, correlated, epsilon), tally in measure(args.worlds, args.exposures).items():
        fields, bucket = "correlated" if correlated else "independent", "random" if epsilon == 1 else "model"
        print(f"{rate:5.0%}  {fields:11} {bucket:6} {tally.row()}")


if __name__ == "__main__":
    main()
