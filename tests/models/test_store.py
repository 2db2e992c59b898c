"""A network on disk is the network, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kaleidoscope.errors import InputError
from kaleidoscope.simulation import World
from models.networks import DeepConfig, DeepPart
from models.store import CONFIG, WEIGHTS, load_network, save_network
from models.tables import fit_tables
from models.train import CtrModel
from tests.models.worlds import SPEC, encoder_of, log_of


@pytest.fixture(scope="module")
def network() -> CtrModel:
    """With tables, pairs of fields and a deep part that counts."""
    world = World.draw(SPEC)
    odd = lambda users, _: 1.5 * ((users.values[:, 0] % 2) ^ (users.values[:, 3] % 2))  # noqa: E731
    tables = fit_tables(log_of(world, 6_000, extra=odd), encoder_of(world))
    assert tables.layout.pairs == ((0, 3),)
    deep = DeepPart(DeepConfig(tables.layout.n_crossed, tables.layout.crossed_tags.shape[1]))
    deep.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        deep.top.normal_(generator=torch.Generator().manual_seed(1))
    return CtrModel(tables, deep, 0.5)


def test_loaded_network_equals_the_saved_one(network: CtrModel, tmp_path: Path) -> None:
    save_network(network, tmp_path / "new" / "folder")
    loaded = load_network(tmp_path / "new" / "folder")
    log = log_of(World.draw(SPEC), 500, seed=9)
    assert loaded.encoder == network.encoder
    assert (loaded.predict(log.features, log.variant) == network.predict(log.features, log.variant)).all()
    assert (loaded.rank(log.features) == network.rank(log.features)).all()
    unknown = np.full(36, -1)
    again = loaded.for_variants(log.tags, unknown).rank(log.features)
    assert (again == network.for_variants(log.tags, unknown).rank(log.features)).all()
    for name in ("variant_sd", "cross_sd"):
        kept, saved = getattr(loaded.tables, name), getattr(network.tables, name)
        assert saved is not None and (kept == saved).all()


def test_saving_twice_writes_the_same_bytes(network: CtrModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_network(network, tmp_path / name)
    for file in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no network there"):
        load_network(tmp_path / "nowhere")


@pytest.mark.parametrize("file", [WEIGHTS, CONFIG])
def test_damaged_file_is_refused(network: CtrModel, tmp_path: Path, file: str) -> None:
    save_network(network, tmp_path)
    whole = (tmp_path / file).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole[:-20] + b"x" + whole[-19:], b"[1]"):
        (tmp_path / file).write_bytes(damaged)
        with pytest.raises(InputError, match=file):
            load_network(tmp_path)


def test_changed_number_in_the_config_is_refused(network: CtrModel, tmp_path: Path) -> None:
    save_network(network, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"intercept": 1.0}))
    with pytest.raises(InputError, match="hash"):
        load_network(tmp_path)


def test_format_of_another_version_is_refused(network: CtrModel, tmp_path: Path) -> None:
    save_network(network, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(InputError, match="format 99"):
        load_network(tmp_path)
