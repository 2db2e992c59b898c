"""A network on disk: `network.safetensors`, and `network.json` with the hashes of both. Nothing is ever pickled."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save
from scipy.sparse import csr_array

from kaleidoscope.encoding import Encoder
from kaleidoscope.errors import InputError
from models.networks import DeepConfig, DeepPart
from models.tables import Layout, Tables
from models.train import CtrModel

FORMAT = 1
WEIGHTS, CONFIG = "network.safetensors", "network.json"
TABLE_ARRAYS = ("side", "variant", "cross", "side_variance", "variant_variance", "cross_variance")
SPREADS = ("variant_sd", "cross_sd")  # where there are any


def save_network(model: CtrModel, folder: Path) -> None:
    """Write the network to `folder`; the config goes last, so a half-written folder does not load."""
    folder.mkdir(parents=True, exist_ok=True)
    tables, layout = model.tables, model.tables.layout
    tags = csr_array(layout.variant_design[:, : layout.encoder.n_tags])
    there = (*TABLE_ARRAYS, *(name for name in SPREADS if getattr(tables, name) is not None))
    arrays = {name: np.ascontiguousarray(getattr(tables, name)) for name in there}
    arrays |= {"tags.indices": tags.indices, "tags.indptr": tags.indptr}
    arrays |= {f"deep.{name}": value.numpy() for name, value in model.deep.state_dict().items()}
    weights = save(arrays)
    config: dict[str, Any] = {
        "format": FORMAT,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "encoder": json.loads(layout.encoder.to_json()),
        "pairs": layout.pairs,
        "intercept": tables.intercept,
        "gate": model.gate,
        "deep": asdict(model.deep.config),
    }
    (folder / WEIGHTS).write_bytes(weights)
    (folder / CONFIG).write_text(json.dumps(config | {"config_sha256": _hash(config)}, indent=1), encoding="utf-8")


def _hash(config: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def load_network(folder: Path) -> CtrModel:
    """Read what `save_network` wrote. Raises InputError if a file is missing, foreign or not the one that was saved."""
    try:
        config = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        weights = (folder / WEIGHTS).read_bytes()
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{folder / CONFIG}: no network there ({error}); train one, or copy both files again"
        ) from error
    if config.get("format") != FORMAT:
        raise InputError(f"{folder / CONFIG}: format {config.get('format')!r}, this version reads {FORMAT}; train anew")
    if config.pop("config_sha256", None) != _hash(config):
        raise InputError(f"{folder / CONFIG}: its content is not what its hash says: damaged or edited; copy it again")
    if hashlib.sha256(weights).hexdigest() != config["sha256"]:
        raise InputError(
            f"{folder / WEIGHTS}: its hash is not the one in {CONFIG}: damaged or exchanged; copy both again"
        )
    arrays = load(weights)
    encoder = Encoder.from_json(json.dumps(config["encoder"]))
    indices, indptr = arrays["tags.indices"], arrays["tags.indptr"]
    shape = (len(indptr) - 1, encoder.n_tags)
    layout = Layout.of(encoder, csr_array((np.ones(len(indices), np.float32), indices, indptr), shape=shape))
    pairs = tuple((a, b) for a, b in config["pairs"])
    layout = replace(layout, pairs=pairs)
    deep = DeepPart(DeepConfig(**config["deep"]))
    deep.load_state_dict(
        {k.removeprefix("deep."): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("deep.")}
    )
    held = {name: arrays[name] for name in (*TABLE_ARRAYS, *SPREADS) if name in arrays}
    return CtrModel(Tables(layout, config["intercept"], **held), deep, config["gate"])
