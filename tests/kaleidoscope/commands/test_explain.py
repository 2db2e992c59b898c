"""`kaleidoscope model explain`: whose variants, which user, and that it claims no more than the model's score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from kaleidoscope import registry
from kaleidoscope.access import operator
from kaleidoscope.cli import main
from kaleidoscope.commands.explain import run_explain
from kaleidoscope.database import Database
from kaleidoscope.decide import variant_table
from kaleidoscope.errors import InputError, NotFoundError
from kaleidoscope.interventions import DescribedVariant
from kaleidoscope.release import ReleaseContent, SceneSnapshot, Shares, canonical, start
from kaleidoscope.settings import Settings
from kaleidoscope.simulation import World
from kaleidoscope.tables import Release, Scene
from models.export import export_model
from models.networks import DeepConfig, DeepPart
from models.tables import fit_tables
from models.train import CtrModel
from tests.kaleidoscope.conftest import add_businesses
from tests.models.worlds import SPEC, encoder_of, log_of

WORLD = World.draw(SPEC)
NOW = datetime(2030, 2, 1, 12, tzinfo=UTC)
VARIANTS = tuple(
    DescribedVariant(
        id=f"home-{i:02d}",
        materials={"copy": f"c{i}"},
        tags={name: (f"{name}_{WORLD.variant_tags[i, d]}",) for d, name in enumerate(WORLD.dimension_names)},
    )
    for i in range(10)
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path) -> Settings:
    folder = tmp_path_factory.mktemp("acme")
    (folder / "platform.db").write_bytes(sqlite_template.read_bytes())
    made = Settings(database_url=f"sqlite:///{folder / 'platform.db'}", models_dir=folder / "models", user="ann")
    with Database(made.database_url) as database:
        add_businesses(database)
        with database.transaction(operator("ann", "acme")) as session:
            for scene in ("home", "young"):
                session.add(Scene(business_id="acme", id=scene, name=scene, spec={}, author="ann"))
            session.flush()
            for number, shown in ((1, VARIANTS[:4]), (2, VARIANTS)):
                content = ReleaseContent(
                    shares=Shares(random=1.0), scene=SceneSnapshot(id="home", name="Home", product={}, slots=()),
                    taxonomy=1, variants=shown, materials={}, baseline=shown[0].id, interventions=(),
                )  # fmt: skip
                document = content.model_dump(mode="json")
                digest = hashlib.sha256(canonical(document)).hexdigest()
                release = Release(business_id="acme", scene_id="home", number=number, content=document, author="ann")
                release.content_hash = digest
                session.add(release)
    return made


@pytest.fixture(scope="module")
def model(settings: Settings) -> str:
    tables = fit_tables(log_of(WORLD, 20_000), encoder_of(WORLD))
    part = DeepPart(DeepConfig(tables.layout.n_crossed, tables.layout.crossed_tags.shape[1], 4, 8, 2))
    part.initialise(torch.Generator().manual_seed(0))
    version, known = registry.new_version("home", NOW), WORLD.variants
    known = known.append_column("variant_id", pa.array(WORLD.variant_ids))
    for name, generic in ((version, False), (registry.new_version(registry.GENERIC, NOW), True)):
        export_model(
            CtrModel(tables, part, 0.0), registry.home_of(settings, "acme") / name, version=name,
            variants=known, log_hash="x", seed=1, created_at=NOW,
            generic=generic,
        )  # fmt: skip
    registry.propose(settings, "acme", version, by="ann", at=NOW)
    return version


def asked(settings: Settings, name: str, **given: Any) -> dict[str, Any]:
    with Database(settings.database_url) as database, database.transaction(operator("ann", "acme")) as session:
        return run_explain(settings, session, name, **({"release": 2} | given))


def value_of(field: int) -> tuple[str, str]:
    """A name and a value that the model knows."""
    spec = encoder_of(WORLD).fields[field]
    return spec.name, spec.vocabulary[0] if spec.vocabulary is not None else str(spec.mean)


def test_its_parts_add_up_against_the_variants_of_the_release(settings: Settings, model: str) -> None:
    found = asked(settings, model, attributes=[value_of(0), value_of(1)], variant="home-03")
    assert (found["model"], found["scene"], found["release"], found["compared"]) == (model, "home", 2, 10)
    assert found["variant_id"] == "home-03"
    assert sum(term["logit"] for term in found["terms"]) == pytest.approx(found["score"] - found["average"], abs=1e-5)
    assert dict([value_of(0)]).items() <= found["attributes"].items()
    assert any(term["part"] == "interaction" and term["field"] == value_of(0)[0] for term in found["terms"])
    assert asked(settings, model, release=1)["compared"] == 4
    assert asked(settings, model)["rank"] == 1  # the model's own choice
    assert "not proven preferences" in found["sentences"][-1]
    json.dumps(found)


def test_it_says_what_it_did_not_know(settings: Settings, model: str) -> None:
    name, _ = value_of(0)
    found = asked(settings, model, attributes=[(name, "nobody ever")])
    missing, unseen = found["notes"]
    assert missing.startswith("Not given, and so missing: ")
    assert name not in missing
    assert unseen == f"{name}=nobody ever: the model never saw this value."
    with pytest.raises(InputError, match=rf"attribute 'aeg': model {model} knows {name}, "):
        asked(settings, model, attributes=[("aeg", "3")])


def test_an_alias_and_a_generic_model_need_a_scene(settings: Settings, model: str) -> None:
    with pytest.raises(InputError, match="of which scene"):
        asked(settings, "challenger")
    assert asked(settings, "challenger", scene="home")["model"] == model
    (generic,) = (one.version for one in registry.list_models(settings, "acme", registry.GENERIC))
    with pytest.raises(InputError, match="is of all scenes: name with --scene"):
        asked(settings, generic)
    assert asked(settings, generic, scene="home")["compared"] == 10
    with pytest.raises(InputError, match="it is of scene 'home', not of 'young'"):
        asked(settings, model, scene="young")


def test_what_is_not_there_is_named(settings: Settings, model: str) -> None:
    with pytest.raises(NotFoundError, match="Release 2 of scene 'home' has no variant 'x'"):
        asked(settings, model, variant="x")
    with pytest.raises(NotFoundError, match="No release of scene 'home' is live"):
        asked(settings, model, release=None)
    with pytest.raises(NotFoundError, match="There is no release 9"):
        asked(settings, model, release=9)
    with pytest.raises(NotFoundError, match="There is no model 'home-20300201T120000Z-000000'"):
        asked(settings, "home-20300201T120000Z-000000")


def run(capsys: pytest.CaptureFixture[str], settings: Settings, line: Sequence[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KALEIDOSCOPE_DATABASE_URL", settings.database_url)
        patch.setenv("KALEIDOSCOPE_MODELS_DIR", str(settings.models_dir))
        with pytest.raises(SystemExit) as stop:
            main([*line, "--business", "acme", "--as", "ann"])
    captured = capsys.readouterr()
    assert stop.value.code == 0, captured.err
    return captured.out


def test_people_read_sentences_and_parts_and_machines_all_of_it(
    settings: Settings, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["model", "explain", model, "--release", "2", "--attribute", "=".join(value_of(0))]
    text = " ".join(run(capsys, settings, line).split())
    assert "The model expects a click on home-" in text
    assert "all, over the average variant" in text
    assert "not proven preferences" in text
    found = json.loads(run(capsys, settings, [*line, "--json"]))
    assert found["compared"] == 10
    assert found["terms"]


def test_the_live_release_is_meant_where_none_is_named(settings: Settings, model: str) -> None:
    """Last, because it starts one."""
    with Database(settings.database_url) as database, database.transaction(operator("ann", "acme")) as session:
        start(session, "home", 1)
    found = asked(settings, model, release=None)
    assert (found["release"], found["compared"]) == (1, len(variant_table(VARIANTS[:4])))
