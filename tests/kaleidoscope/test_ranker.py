"""A ranker loads what was exported and nothing else, needs no torch, and many threads may share it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch

from kaleidoscope.encoding import UNSEEN
from kaleidoscope.errors import JobError
from kaleidoscope.ranker import SIGNATURE, USER_GRAPH, VARIANT_GRAPH, Ranker, Signature
from kaleidoscope.simulation import World
from models.export import export_model
from models.networks import DeepConfig, DeepPart
from models.tables import fit_tables
from models.train import CtrModel
from tests.models.worlds import SPEC, encoder_of, log_of

Array = np.ndarray[Any, np.dtype[Any]]
WORLD = World.draw(SPEC)
VARIANTS = WORLD.variants.append_column("variant_id", pa.array(WORLD.variant_ids))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tables = fit_tables(log_of(WORLD, 3_000), encoder_of(WORLD))
    deep = DeepPart(DeepConfig(tables.layout.n_crossed, tables.layout.crossed_tags.shape[1], 4, 8, 4))
    deep.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        deep.top.normal_(generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("export") / "model"
    at = datetime(2026, 1, 1, tzinfo=UTC)
    model = CtrModel(tables, deep, 0.5)
    export_model(model, folder, version="1", variants=VARIANTS, log_hash="x", seed=1, created_at=at)
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def sealed(folder: Path, **changes: Any) -> None:
    """Change the signature, and its own hash with it."""
    signature = Signature.from_json((folder / SIGNATURE).read_text())
    (folder / SIGNATURE).write_text(replace(signature, **changes).to_json())


def test_a_missing_folder_or_file_is_named_with_the_remedy(folder: Path) -> None:
    with pytest.raises(
        JobError, match=r"nowhere.signature\.json: no exported model there .*Copy the whole folder again"
    ):
        Ranker.load(folder / "nowhere")
    for name in (VARIANT_GRAPH, USER_GRAPH):
        (folder / name).rename(folder / "aside")
        with pytest.raises(JobError, match=rf"{name}: cannot be read .*Copy the whole folder again"):
            Ranker.load(folder)
        (folder / "aside").rename(folder / name)
    assert Ranker.load(folder).version == "1"


@pytest.mark.parametrize("name", [SIGNATURE, VARIANT_GRAPH, USER_GRAPH])
def test_damage_anywhere_in_a_file_is_refused(folder: Path, name: str) -> None:
    whole, rng = (folder / name).read_bytes(), np.random.default_rng(0)
    spoilt = [b"", b"{}", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000, whole[: len(whole) // 2], whole + b" x"]
    for _ in range(40):
        at, flip = int(rng.integers(len(whole))), int(rng.integers(1, 256))
        spoilt.append(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
    for content in spoilt:
        (folder / name).write_bytes(content)
        with pytest.raises(JobError, match=name):
            Ranker.load(folder)


def test_a_directory_in_place_of_a_file_is_refused(folder: Path) -> None:
    for name in (USER_GRAPH, SIGNATURE):
        (folder / name).unlink()
        (folder / name).mkdir()
        with pytest.raises(JobError, match=name):
            Ranker.load(folder)


def test_graphs_of_another_export_are_refused(folder: Path) -> None:
    shutil.copy(folder / VARIANT_GRAPH, folder / USER_GRAPH)
    with pytest.raises(JobError, match=rf"{USER_GRAPH}: its hash"):
        Ranker.load(folder)


def test_a_changed_number_in_the_signature_is_refused(folder: Path) -> None:
    document = json.loads((folder / SIGNATURE).read_text())
    document["seed"] += 1
    (folder / SIGNATURE).write_text(json.dumps(document))
    with pytest.raises(JobError, match="not what its hash says"):
        Ranker.load(folder)
    (folder / SIGNATURE).write_text(json.dumps(document | {"format": 99}))
    with pytest.raises(JobError, match="its format is 99"):
        Ranker.load(folder)


def test_files_that_agree_with_one_another_and_are_no_model_are_refused(folder: Path) -> None:
    """Whoever can write the folder can write the hashes too: a wrong model is an error all the same, not a crash."""
    ranker = Ranker.load(folder)
    files, encoder = dict(ranker.signature.files), ranker.signature.encoder
    sealed(folder, encoder=replace(encoder, fields=encoder.fields[:1]))
    with pytest.raises(JobError, match=r"graphs do not fit its signature\.json"):
        Ranker.load(folder)
    sealed(folder, encoder=encoder, draws=ranker.signature.draws + 1)
    with pytest.raises(JobError, match=r"graphs do not fit its signature\.json"):
        Ranker.load(folder)
    model = onnx.load(folder / USER_GRAPH)
    model.graph.node[0].op_type = "NoSuchOperator"
    for content in (b"no model", b"", model.SerializeToString()):
        (folder / USER_GRAPH).write_bytes(content)
        sealed(folder, draws=ranker.signature.draws, files=files | {USER_GRAPH: hashlib.sha256(content).hexdigest()})
        with pytest.raises(JobError, match=rf"{USER_GRAPH}: ONNX Runtime .* cannot run it"):
            Ranker.load(folder)


def test_a_signature_of_any_other_shape_is_an_error_and_no_crash(folder: Path) -> None:
    document = json.loads((folder / SIGNATURE).read_text())
    del document["sha256"]
    refused = 0
    for key in document:
        for value in (None, "x", -1, [], {}, [[]], {"fields": [{}], "dimensions": 1}):
            changed = document | {key: value}
            seal = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
            (folder / SIGNATURE).write_text(json.dumps(changed | {"sha256": seal}))
            with suppress(JobError):
                Ranker.load(folder)  # a name, a metric or a seed may be anything
                refused -= 1
            refused += 1
    assert refused > 40


def test_pair_terms_are_the_interactions_of_many_users_at_once(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranker, rng = Ranker.load(exported), np.random.default_rng(0)
    encoder, side = ranker.signature.encoder, ranker.variant_side(VARIANTS)
    users = log_of(WORLD, 60).features
    shown = rng.integers(0, len(side), len(users))
    terms = ranker.pair_terms(users, side, shown)
    assert terms.shape == (len(users), len(encoder.fields), len(encoder.dimensions))
    for row, variant in enumerate(shown.tolist()):
        parts = ranker.explain(users, side, row, variant)
        pairs = {(p.field, p.dimension): p.logit for p in parts if p.part == "interaction"}
        found = {
            (field.name, dimension.name): terms[row, f, d]
            for f, field in enumerate(encoder.fields)
            for d, dimension in enumerate(encoder.dimensions)
            if terms[row, f, d]
        }
        assert found == pytest.approx(pairs, abs=1e-5)
        rest = sum(p.logit for p in parts if p.part != "interaction")
        assert terms[row].sum() + rest == pytest.approx(float(ranker.score(users, side)[row, variant]), abs=1e-4)
    one = ranker.pair_terms(users.take(slice(7, 8)), side, np.arange(len(side)))
    assert np.allclose(one[shown[7]], terms[7], atol=1e-6)
    monkeypatch.setattr("kaleidoscope.ranker.CELLS", 100)  # in pieces
    assert np.allclose(ranker.pair_terms(users, side, shown), terms, atol=1e-6)
    assert ranker.pair_terms(users.take(slice(0, 0)), side, shown[:0]).shape == (0, *terms.shape[1:])


def test_serves_where_there_is_no_torch(exported: Path, tmp_path: Path) -> None:
    program = f"""
import sys
for name in ("torch", "onnx", "models", "lightgbm", "sqlalchemy", "fastapi"):
    sys.modules[name] = None
from pathlib import Path
import numpy as np, pyarrow as pa
from kaleidoscope.ranker import Ranker
ranker = Ranker.load(Path({str(exported)!r}))
side = ranker.variant_side(pa.ipc.open_file({str(tmp_path / "variants.arrow")!r}).read_all())
features = ranker.features({{"age_band": ["age_band_1"], "city": ["city_2"]}}, 1)
np.save({str(tmp_path / "scores.npy")!r}, ranker.score(features, side))
assert ranker.explain(features, side, 0, 0)
"""
    with pa.ipc.new_file(tmp_path / "variants.arrow", VARIANTS.schema) as writer:
        writer.write_table(VARIANTS)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
    ranker = Ranker.load(exported)
    features = ranker.features({"age_band": ["age_band_1"], "city": ["city_2"]}, 1)
    wanted = ranker.score(features, ranker.variant_side(VARIANTS))
    assert np.load(tmp_path / "scores.npy") == pytest.approx(wanted, abs=1e-6)


def test_many_threads_share_a_ranker(exported: Path) -> None:
    ranker = Ranker.load(exported)
    users = WORLD.columns(WORLD.sample_users(200, np.random.default_rng(4)))
    rows = [{name: [column[i].as_py()] for name, column in users.items()} for i in range(200)]
    side = ranker.variant_side(VARIANTS)

    def one(row: dict[str, list[object]]) -> tuple[Array, Array]:
        features = ranker.features(row, 1)
        return ranker.score(features, side)[0], ranker.score_heads(features, side)[:, 0]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, rows * 3))
    whole = ranker.signature.encoder.features(users)
    scores, heads = ranker.score(whole, side), ranker.score_heads(whole, side)
    for i, (score, head) in enumerate(found):
        assert score == pytest.approx(scores[i % 200], abs=1e-5)
        assert head == pytest.approx(heads[:, i % 200], abs=1e-5)


def test_one_user_is_encoded_as_among_many_whatever_is_sent(exported: Path) -> None:
    ranker = Ranker.load(exported)
    sent: list[object] = ["city_1", None, "Atlantis", 7, 2.5, True, ["city_1"], {"a": 1}]
    many = ranker.features({"city": sent, "no such field": sent}, len(sent))
    for i, value in enumerate(sent):
        one = ranker.features({"city": [value]}, 1)
        assert one.codes.tolist() == many.codes[i : i + 1].tolist()
    position = [f.name for f in ranker.signature.encoder.fields].index("city")
    assert (many.codes[2:, position] == UNSEEN).all()
    assert np.isfinite(ranker.score(many, ranker.variant_side(VARIANTS))).all()


def test_an_explanation_is_ordered_and_names_what_it_is_about(exported: Path) -> None:
    ranker = Ranker.load(exported)
    features, side = ranker.features({"city": ["city_1"]}, 1), ranker.variant_side(VARIANTS)
    parts = ranker.explain(features, side, 0, 5)
    sizes = [abs(p.logit) for p in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert {p.part for p in parts} >= {"intercept", "user", "variant"}
    assert all((p.field is not None and p.tag is not None) for p in parts if p.part == "interaction")
    assert next(p.value for p in parts if p.field == "city" and p.part == "user") == "city_1"
