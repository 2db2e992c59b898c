"""A scene's exposures over releases of different vocabularies: their tags are in the words of the newest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from kaleidoscope.access import operator
from kaleidoscope.commands.exposures import Exposures, read_exposures_of
from kaleidoscope.database import Database
from kaleidoscope.decision_record import DecisionRecord, Reason
from kaleidoscope.events import Shown, compact, record_decisions, shown_in
from kaleidoscope.interventions import DescribedVariant
from kaleidoscope.release import SceneSnapshot, canonical
from kaleidoscope.settings import Settings
from kaleidoscope.tables import Event, Release, Scene
from kaleidoscope.taxonomy import check_changes, evolve
from kaleidoscope.vocabulary import Bucket
from tests.kaleidoscope.commands.acme import START, content_of, platform

SCENE = "words"
# Variants of each release by the words of its own vocabulary; only the first shows `old`, only the second `new`.
FIRST = {"both": {"image_style": "flat", "benefit": "cash_back"}, "old": {"image_style": "flat"}}
FIRST |= {"odd": {"image_style": "realistic", "subject": "gold"}}
SECOND = {
    "both": {"image_style": "plain", "offer": "cash_back"},
    "new": {"image_style": "plain", "offer": "red_packet"},
}
CHANGES: list[dict[str, Any]] = [
    {"op": "rename", "dimension": "image_style", "value": "flat", "id": "plain"},
    {"op": "rename", "dimension": "benefit", "id": "offer"},
    {"op": "split", "dimension": "subject", "value": "gold", "into": [
        {"id": "coins", "labels": {"en": "Coins", "zh": "金币"}},
        {"id": "bars", "labels": {"en": "Bars", "zh": "金条"}},
    ]},
]  # fmt: skip


@pytest.fixture
def settings(tmp_path: Path, sqlite_template: Path) -> Settings:
    made = platform(tmp_path, sqlite_template)
    with Database(made.database_url) as database, database.transaction(operator("ann", "acme")) as session:
        assert evolve(session, check_changes(CHANGES)).number == 2
        session.add(Scene(business_id="acme", id=SCENE, name=SCENE, spec={}, author="ann"))
        session.flush()
        for number, variants in enumerate((FIRST, SECOND), 1):
            of = [
                DescribedVariant(id=id, materials={"copy": id}, tags={d: (v,) for d, v in tags.items()})
                for id, tags in sorted(variants.items())
            ]
            of_scene = SceneSnapshot(id=SCENE, name=SCENE, product={"name": "card"}, slots=())
            changes = {"scene": of_scene, "variants": tuple(of), "taxonomy": number, "baseline": of[0].id}
            document = content_of("home").model_copy(update=changes).model_dump(mode="json")
            digest = hashlib.sha256(canonical(document)).hexdigest()
            session.add(
                Release(business_id="acme", scene_id=SCENE, number=number, content=document, content_hash=digest,
                        author="ann")
            )  # fmt: skip
    return made


def show(settings: Settings, variants: Mapping[str, Any], release: int, at: datetime) -> None:
    """Every variant once to each of three units."""
    records = [
        DecisionRecord(
            id=hashlib.blake2b(f"{release}/{id}/{unit}".encode(), digest_size=16).hexdigest(), business="acme",
            scene=SCENE, unit=f"u{unit}", at=at + timedelta(seconds=unit), bucket=Bucket.RANDOM, variant=id,
            propensity=1 / len(variants), learn=True, reason=Reason.EXPLORED, release=release, release_hash="r" * 64,
            model_version=None, candidates=len(variants), features={"city": "Ulm"}, key="k1",
        )
        for id in variants for unit in range(3)
    ]  # fmt: skip
    with Database(settings.log_url) as database:
        record_decisions(database, records)
        rows = [
            {"business_id": "acme", "event_id": f"{r.id}-{kind}", "decision_id": r.id, "kind": kind,
             "at_us": int(r.at.timestamp() * 1e6), "received_us": int(r.at.timestamp() * 1e6), "value": None}
            for r in records for kind in (("exposure", "click") if r.unit == "u0" else ("exposure",))
        ]  # fmt: skip
        with database.bulk() as connection:
            connection.execute(sa.insert(Event.__table__), rows)  # type: ignore[arg-type]


def read(settings: Settings, tmp_path: Path, name: str) -> tuple[Exposures, dict[str, dict[str, list[str]]]]:
    """The exposures, and the tags of their variants."""
    found = read_exposures_of(settings, "acme", SCENE, tmp_path / name)
    rows = found.log.variants.to_pylist()
    return found, {row.pop("variant_id"): {d: values for d, values in row.items() if values} for row in rows}


@pytest.mark.parametrize("closed", [False, True])
def test_a_tag_that_was_renamed_between_releases_is_one(settings: Settings, tmp_path: Path, closed: bool) -> None:
    show(settings, FIRST, 1, START)
    found, tags = read(settings, tmp_path, "first")
    assert found.taxonomy == 1 and tags["old"] == {"image_style": ["flat"]}
    show(settings, SECOND, 2, START + timedelta(days=3))
    if closed:  # the first days are in files then, in the words of their time
        with Database(settings.log_url) as log, Database(settings.database_url) as database:

            def describe(scene: str, number: int) -> Mapping[str, Shown]:
                with database.transaction(operator("ann", "acme"), write=False) as session:
                    from kaleidoscope.release import get_release, verify

                    return shown_in(verify(get_release(session, scene, number)))

            compact(log, settings.log_dir, business="acme", now=START + timedelta(days=9), describe=describe)
    found, tags = read(settings, tmp_path, "both")
    assert found.taxonomy == 2 and len(found.log) == 15
    assert tags == {
        "both": {"image_style": ["plain"], "offer": ["cash_back"]},
        "old": {"image_style": ["plain"]},  # that only the first release had
        "new": {"image_style": ["plain"], "offer": ["red_packet"]},
        "odd": {"image_style": ["realistic"], "subject": ["unknown of {bars, coins}"]},
    }
    assert set(found.log.schema.variant) == {"image_style", "offer", "subject"}
