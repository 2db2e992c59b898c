"""A business that showed the variants of three scenes at random, in a simulated world, for tests of commands."""

from __future__ import annotations

import hashlib
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import sqlalchemy as sa
from scipy.special import expit

from kaleidoscope.access import operator
from kaleidoscope.database import Database
from kaleidoscope.decision_record import DecisionRecord, Reason
from kaleidoscope.events import record_decisions
from kaleidoscope.interventions import DescribedVariant
from kaleidoscope.release import ReleaseContent, SceneSnapshot, Shares, canonical
from kaleidoscope.settings import Settings
from kaleidoscope.simulation import Users, World, WorldSpec
from kaleidoscope.tables import Event, Release, Scene
from kaleidoscope.taxonomy import found_taxonomy
from kaleidoscope.vocabulary import Bucket
from tests.kaleidoscope.conftest import add_businesses

START = datetime(2030, 1, 10, tzinfo=UTC)
NOW = datetime(2030, 2, 1, 12, tzinfo=UTC)
SPEC = WorldSpec(
    field_values=(4, 4, 3),
    materials=(4, 4),
    dimension_values=(4, 4),
    base_ctr=0.15,
    interactions=2,
    interaction_size=(0.7, 0.9),
    tag_sd=0.3,
    exposures_per_unit=4.0,
    seed=3,
)
WORLD = World.draw(SPEC)
SCENES = {"home": (range(0, 12), 6_000), "shop": (range(3, 16), 4_000), "young": (range(4, 8), 60)}


def variant_of(scene: str, i: int) -> DescribedVariant:
    tags = {name: (f"{name}_{WORLD.variant_tags[i, d]}",) for d, name in enumerate(WORLD.dimension_names)}
    return DescribedVariant(id=f"{scene}-{i:02d}", materials={"copy": f"c{i}"}, tags=tags)


def content_of(scene: str) -> ReleaseContent:
    variants = tuple(variant_of(scene, i) for i in SCENES[scene][0])
    return ReleaseContent(
        shares=Shares(random=1.0),
        scene=SceneSnapshot(id=scene, name=scene.title(), product={"name": "card"}, slots=()),
        taxonomy=1,
        variants=variants,
        materials={},
        baseline=variants[0].id,
        interventions=(),
    )


def features_of(users: Users) -> list[dict[str, str]]:
    columns = {name: column.to_pylist() for name, column in WORLD.columns(users).items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def show(database: Database, scene: str, rows: int, seed: int, start: datetime = START) -> None:
    """Show variants at random over ten days, and write down decisions, exposures and clicks."""
    rng, shown = np.random.default_rng([seed, len(scene)]), np.array(SCENES[scene][0])
    people = WORLD.sample_users(rows // 4, rng)
    unit, pick = rng.integers(0, rows // 4, rows), rng.integers(0, len(shown), rows)
    users, texts = Users(people.values[unit], np.zeros(rows, np.int64)), features_of(people)
    click = rng.random(rows) < expit(WORLD.logits_of(users, shown[pick]))
    at = [start + timedelta(days=10) * i / rows for i in range(rows)]
    records = [
        DecisionRecord(
            id=hashlib.blake2b(f"{scene}/{seed}/{i}".encode(), digest_size=16).hexdigest(),
            business="acme",
            scene=scene,
            unit=f"{scene}-{seed}-{unit[i]}",
            at=at[i],
            bucket=Bucket.RANDOM,
            variant=f"{scene}-{shown[pick[i]]:02d}",
            propensity=1 / len(shown),
            learn=True,
            reason=Reason.EXPLORED,
            release=1,
            release_hash="r" * 64,
            model_version=None,
            candidates=len(shown),
            features=texts[unit[i]],
            key="k1",
        )
        for i in range(rows)
    ]
    assert record_decisions(database, records) == rows
    events = [
        {
            "business_id": "acme",
            "event_id": f"{record.id}-{kind}",
            "decision_id": record.id,
            "kind": kind,
            "at_us": int(record.at.timestamp() * 1e6),
            "received_us": int(record.at.timestamp() * 1e6),
            "value": None,
        }
        for i, record in enumerate(records)
        for kind in (("exposure", "click") if click[i] else ("exposure",))
    ]
    with database.bulk() as connection:
        connection.execute(sa.insert(Event.__table__), events)  # type: ignore[arg-type]


def platform(folder: Path, template: Path) -> Settings:
    """The settings of a platform in this folder with business acme, its scenes, and what they showed."""
    for name in ("platform.db", "log.db"):
        shutil.copy(template, folder / name)
    made = Settings(
        database_url=f"sqlite:///{folder / 'platform.db'}",
        log_url=f"sqlite:///{folder / 'log.db'}",
        log_dir=folder / "log",
        models_dir=folder / "models",
        user="ann",
    )
    with Database(made.database_url) as database:
        add_businesses(database)
        with database.transaction(operator("ann", "acme")) as session:
            found_taxonomy(session)
            for scene in SCENES:
                session.add(Scene(business_id="acme", id=scene, name=scene, spec={}, author="ann"))
                session.flush()
                document = content_of(scene).model_dump(mode="json")
                digest = hashlib.sha256(canonical(document)).hexdigest()
                session.add(
                    Release(
                        business_id="acme",
                        scene_id=scene,
                        number=1,
                        content=document,
                        content_hash=digest,
                        author="ann",
                    )
                )
    with Database(made.log_url) as database:
        for scene, (_, rows) in SCENES.items():
            show(database, scene, rows, seed=1)
    return made
