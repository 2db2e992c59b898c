"""An exported network scores as the network does, whoever the user and whichever the variants."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.special import expit

from kaleidoscope import ranker as ranker_module
from kaleidoscope.encoding import Encoder, Features
from kaleidoscope.errors import InputError, JobError
from kaleidoscope.ranker import SIGNATURE, USER_GRAPH, VARIANT_GRAPH, Ranker, Signature
from models.batch import Examples
from models.export import export_model
from models.networks import DeepConfig, DeepPart
from models.tables import Tables, fit_tables
from models.train import CtrModel, _columns

Array = np.ndarray[Any, np.dtype[Any]]
Export = Callable[..., Ranker]

STYLES = [["a"], ["b"], ["a", "b"], ["c"], ["a", "c"], [], ["b", "c"], ["a", "b", "c"]] * 3
VARIANTS = pa.table(
    {
        "variant_id": [f"v{i}" for i in range(24)],
        "style": pa.array(STYLES, pa.list_(pa.string())),
        "tone": pa.array([["x"], ["y"], ["z"]] * 8, pa.list_(pa.string())),
    }
)
NEW = pa.table(
    {
        "variant_id": ["new", "v3", "newer", "v0", "none"],
        "style": pa.array([["c", "b", "a"], ["c"], ["unheard", "a"], ["a"], None], pa.list_(pa.string())),
        "tone": pa.array([["x", "z"], ["x"], ["unheard"], ["x"], []], pa.list_(pa.string())),
    }
)
RESIDUALS = np.array([-1, 3, -1, 0, -1])


def columns_of(n: int, rng: np.random.Generator) -> dict[str, list[Any]]:
    return {
        "age": [None if rng.random() < 0.1 else float(a) for a in rng.normal(40, 10, n)],
        "city": [None if rng.random() < 0.1 else str(c) for c in rng.choice(["p", "q", "r"], n)],
        "plan": [str(p) for p in rng.choice(["s", "t"], n)],
        "hour": rng.integers(0, 24, n).tolist(),
        "test": [f"t{t}" for t in rng.integers(0, 30, n)],
    }


@pytest.fixture(scope="module")
def tables() -> Tables:
    """With every kind of block: numbers, a group, a pair of fields, a pair of dimensions, crosses, residuals."""
    n, rng = 12_000, np.random.default_rng(0)
    columns, variant = columns_of(n, rng), rng.integers(0, 24, n)
    age = np.array([40.0 if a is None else a for a in columns["age"]])
    has = {tag: np.array([tag in style for style in STYLES])[variant] for tag in "abc"}
    q, s = (np.array([v == w for v in columns[name]]) for name, w in (("city", "q"), ("plan", "s")))
    logits = -1.5 + 0.9 * has["a"] * (age - 40) / 10 + 1.2 * q * (variant % 3 == 0)
    logits = logits + 1.5 * (q ^ s) + 0.6 * (variant == 7)
    arrays = {name: pa.array(values) for name, values in columns.items()}
    encoder = Encoder.fit(
        arrays,
        user=["age", "city", "plan"],
        context=["hour"],
        group=["test"],
        variants=VARIANTS,
        dimensions=["style", "tone"],
    )
    reward = (rng.random(n) < expit(logits)).astype(np.float32)
    log = Examples(encoder.features(arrays), variant, encoder.tags(VARIANTS), reward, np.ones(n), np.arange(n))
    found = fit_tables(log, encoder)
    assert found.variant_sd is not None
    cells = np.where(found.layout.variant_block == 2, rng.normal(0, 0.5, len(found.variant)), 0)  # style × tone
    variance = np.where(np.arange(4) == 2, 0.25, found.variant_variance)
    sd = found.variant_sd + 0.3 * (cells != 0)
    return replace(found, variant=found.variant + cells, variant_sd=sd, variant_variance=variance)


@pytest.fixture(scope="module")
def deep(tables: Tables) -> CtrModel:
    return opened(tables)


def opened(tables: Tables, gate: float = 0.75, heads: int = 4) -> CtrModel:
    """With a deep part that has something to say."""
    part = DeepPart(DeepConfig(tables.layout.n_crossed, tables.layout.crossed_tags.shape[1], heads, 8, 4))
    generator = torch.Generator().manual_seed(1)
    part.initialise(generator)
    with torch.no_grad():
        for weight in (part.top, part.cross, part.user_bias, part.tag_bias):
            weight.normal_(generator=generator)
    return CtrModel(tables, part, gate)


def shut(tables: Tables) -> CtrModel:
    return replace(opened(tables), gate=0.0)


@pytest.fixture
def export(tmp_path: Path) -> Export:
    def run(model: CtrModel, variants: pa.Table = VARIANTS, name: str = "out", **given: Any) -> Ranker:
        arguments: dict[str, Any] = {"version": "7", "log_hash": "abc", "seed": 5} | given
        export_model(
            model, tmp_path / name, variants=variants, created_at=datetime(2026, 1, 2, tzinfo=UTC), **arguments
        )
        return Ranker.load(tmp_path / name)

    return run


def asked(n: int = 60) -> dict[str, list[Any]]:
    """Users as requests bring them: numbers as text, unknown and missing values, fields left out."""
    columns = columns_of(n, np.random.default_rng(9))
    columns["age"] = [str(a) if i % 3 == 0 and a is not None else a for i, a in enumerate(columns["age"])]
    columns["city"] = ["Atlantis" if i % 5 == 0 else c for i, c in enumerate(columns["city"])]
    columns["hour"] = [float("nan") if i % 7 == 0 else 1e6 if i % 11 == 0 else h for i, h in enumerate(columns["hour"])]
    del columns["plan"], columns["test"]
    return columns


def as_arrow(columns: dict[str, list[Any]]) -> dict[str, pa.Array]:
    text = [None if a is None else str(a) for a in columns["age"]]
    return {name: pa.array(text if name == "age" else values) for name, values in columns.items()}


def everybody(encoder: Encoder, n: int = 200) -> Features:
    """Any bucket and any number."""
    rng = np.random.default_rng(3)
    codes = np.stack([rng.integers(0, f.size, n) for f in encoder.fields], axis=1).astype(np.uint16)
    return Features(codes, rng.uniform(-4, 4, (n, len(encoder.numeric_fields))).astype(np.float32))


def test_fixture_has_every_kind_of_block(tables: Tables) -> None:
    layout = tables.layout
    assert layout.pairs
    assert layout.other_fields
    assert tables.variant_variance[2] > 0  # style × tone
    assert tables.variant_variance[-1] > 0
    assert (tables.cross_variance > 0).any(axis=1).sum() >= 2
    assert tables.cross_variance[len(layout.crossed_fields) :].any()  # a number × a dimension


@pytest.mark.parametrize("make", [opened, shut])
def test_export_scores_as_the_network_does(tables: Tables, export: Export, make: Callable[[Tables], CtrModel]) -> None:
    model = make(tables)
    ranker = export(model)
    columns = asked()
    features = ranker.features(columns, 60)
    wanted = model.encoder.features(as_arrow(columns), 60)
    side = ranker.variant_side(VARIANTS)
    assert ranker.score(features, side) == pytest.approx(model.rank(wanted), abs=1e-5)
    users = everybody(model.encoder)
    assert ranker.score(users, side) == pytest.approx(model.rank(users), abs=1e-5)
    assert np.ptp(model.rank(users)) > 2
    assert (ranker.score_heads(users, side).mean(axis=0)) == pytest.approx(model.rank(users), abs=1e-5)


@pytest.mark.parametrize("make", [opened, shut])
def test_variants_never_shown_score_as_the_network_scores_them(
    tables: Tables, export: Export, make: Callable[[Tables], CtrModel]
) -> None:
    model = make(tables)
    ranker, users = export(model), everybody(model.encoder)
    wanted = model.for_variants(model.encoder.tags(NEW), RESIDUALS).rank(users)
    assert ranker.score(users, ranker.variant_side(NEW)) == pytest.approx(wanted, abs=1e-5)
    generic = export(model, name="generic", generic=True)
    assert generic.signature.residual_ids == ()
    wanted = model.for_variants(model.encoder.tags(NEW), np.full(5, -1)).rank(users)
    assert generic.score(users, generic.variant_side(NEW)) == pytest.approx(wanted, abs=1e-5)


def test_a_table_without_a_dimension_is_missing_it(deep: CtrModel, export: Export) -> None:
    ranker, users = export(deep), everybody(deep.encoder, 5)
    narrow = ranker.score(users, ranker.variant_side(NEW.drop_columns(["tone"])))
    empty = NEW.set_column(2, "tone", pa.array([[]] * 5, pa.list_(pa.string())))
    assert (narrow == ranker.score(users, ranker.variant_side(empty))).all()


def test_no_users_and_no_variants_have_no_scores(deep: CtrModel, export: Export) -> None:
    ranker = export(deep)
    side, none = ranker.variant_side(VARIANTS), ranker.variant_side(VARIANTS.slice(0, 0))
    nobody, users = ranker.features({}, 0), ranker.features({}, 2)
    assert ranker.score(nobody, side).shape == (0, 24)
    assert ranker.score(users, none).shape == (2, 0)
    assert ranker.score_heads(nobody, side).shape == (8, 0, 24)


def test_scores_do_not_depend_on_how_the_work_is_cut(
    deep: CtrModel, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranker, users = export(deep), everybody(deep.encoder, 50)
    side = ranker.variant_side(VARIANTS)
    scores, heads = ranker.score(users, side), ranker.score_heads(users, side)
    monkeypatch.setattr(ranker_module, "CELLS", 2_000)
    monkeypatch.setattr(ranker_module, "VARIANT_ROWS", 4)
    side = ranker.variant_side(VARIANTS)
    assert ranker.score(users, side) == pytest.approx(scores, abs=1e-5)
    assert ranker.score_heads(users, side) == pytest.approx(heads, abs=1e-5)


@pytest.mark.parametrize(
    ("gate", "heads", "draws", "wanted"), [(0.0, 4, 8, 8), (0.5, 3, 8, 12), (0.5, 3, 0, 3), (0.0, 4, 0, 1)]
)
def test_heads_are_mirrored_draws_beside_the_deep_heads(
    tables: Tables, export: Export, gate: float, heads: int, draws: int, wanted: int
) -> None:
    model = opened(tables, gate, heads)
    ranker, users = export(model, draws=draws), everybody(tables.layout.encoder, 20)
    found = ranker.score_heads(users, ranker.variant_side(VARIANTS))
    assert found.shape == (wanted, 20, 24)
    assert ranker.signature.heads == wanted
    assert found.mean(axis=0) == pytest.approx(model.rank(users), abs=1e-5)
    if gate and not draws:
        with torch.no_grad():
            part, layout = model.deep, tables.layout
            shown = part.variant_side(torch.from_numpy(layout.crossed_tags))
            people = part.user_side(*_columns(layout, users))
            for m in range(heads):
                hidden = torch.relu(people.additive[m, :, None] + shown.additive[m])
                deep = (hidden @ part.top[m]).squeeze(-1) + (people.factor[m] * part.cross[m]) @ shown.factor[m].T
                assert found[m] == pytest.approx(tables.rank(users) + gate * deep.numpy(), abs=1e-5)


def test_heads_spread_as_the_posterior_does(tables: Tables, export: Export) -> None:
    ranker = export(shut(tables), draws=4_000)
    users = ranker.features({"age": [30.0], "city": ["q"]}, 1)
    heads = ranker.score_heads(users, ranker.variant_side(NEW))[:, 0]
    layout = tables.for_variants(tables.layout.encoder.tags(NEW), RESIDUALS)
    assert layout.variant_sd is not None
    assert layout.cross_sd is not None
    rows = layout.layout.crossed(users).power(2)
    variance = layout.layout.variant_design.power(2) @ layout.variant_sd**2
    variance = variance + (rows @ layout.cross_sd**2 @ layout.layout.crossed_tags.T)[0]
    spread = (heads[:2_000] - heads.mean(axis=0)).std(axis=0)  # the other half mirrors it
    assert spread**2 == pytest.approx(variance, rel=0.15)
    assert (spread[[0, 2, 4]] ** 2 > tables.variant_variance[-1]).all()  # nothing is known of their residuals


def test_a_variant_keeps_its_heads_in_every_release(tables: Tables, export: Export) -> None:
    ranker = export(shut(tables))
    users = ranker.features({"age": [30.0]}, 1)
    whole, turned = (ranker.score_heads(users, ranker.variant_side(t)) for t in (NEW, NEW.take(pa.array([4, 1]))))
    assert turned == pytest.approx(whole[:, :, [4, 1]], abs=1e-6)
    twins = NEW.take(pa.array([0, 0])).set_column(0, "variant_id", pa.array(["new", "other"]))
    two = ranker.score_heads(users, ranker.variant_side(twins))[:, 0]
    assert (two[:, 0] != two[:, 1]).all()
    assert two.mean(axis=0)[0] == pytest.approx(two.mean(axis=0)[1], abs=1e-5)


@pytest.mark.parametrize("make", [opened, shut])
def test_parts_of_an_explanation_add_up_to_the_logit(
    tables: Tables, export: Export, make: Callable[[Tables], CtrModel]
) -> None:
    model = make(tables)
    ranker, users = export(model), everybody(model.encoder, 20)
    side = ranker.variant_side(NEW)
    scores = ranker.score(users, side)
    for row in range(20):
        for variant in range(len(NEW)):
            parts = ranker.explain(users, side, row, variant)
            assert sum(p.logit for p in parts) == pytest.approx(scores[row, variant], abs=1e-5)
            assert any(p.part == "deep" for p in parts) == (model.gate > 0)


def test_interactions_in_an_explanation_are_the_tables_own(tables: Tables, export: Export) -> None:
    ranker, layout, encoder = export(shut(tables)), tables.layout, tables.layout.encoder
    users = ranker.features({"age": [55.0], "city": ["q"], "plan": ["s"]}, 1)
    parts = ranker.explain(users, ranker.variant_side(VARIANTS), 0, 2)  # styles a and b, tone z
    found = {(p.field, p.dimension, p.tag): p.logit for p in parts if p.part == "interaction"}
    start = np.cumsum([0, *layout.crossed_sizes])
    tag = layout.tag_columns.tolist().index(ranker.signature.tag_names.index(("style", "a")))
    age, number = layout.crossed_fields.index(0), len(layout.crossed_fields)
    wanted = tables.cross[start[age] + users.codes[0, 0], tag] + users.values[0, 0] * tables.cross[start[number], tag]
    assert found["age", "style", "a"] == pytest.approx(wanted, abs=1e-6)
    assert wanted > 0.5
    assert {(d, t) for _, d, t in found} <= {("style", "a"), ("style", "b"), ("tone", "z")}
    shown = {p.field: p.value for p in parts if p.part == "user"}
    assert shown["city"] == "q"
    assert shown["age"] == encoder.fields[0].label(int(users.codes[0, 0]))
    assert any(p.part == "variant" and (p.dimension, p.tag) == ("style", "a, b") for p in parts)


@pytest.mark.parametrize("user", [[], ["age"], ["city"]])
def test_networks_of_few_fields_are_exported(export: Export, user: list[str]) -> None:
    """No field, none that is crossed, no interaction, no number: empty arrays at every place."""
    rng = np.random.default_rng(0)
    arrays = {name: pa.array(values) for name, values in columns_of(300, rng).items() if name in user}
    encoder = Encoder.fit(arrays, user=user, context=[], variants=VARIANTS, dimensions=["tone"])
    reward = (rng.random(300) < 0.2).astype(np.float32)
    features, variant = encoder.features(arrays, 300), rng.integers(0, 24, 300)
    log = Examples(features, variant, encoder.tags(VARIANTS), reward, np.ones(300), np.arange(300))
    model = shut(fit_tables(log, encoder))
    assert not model.tables.cross.any()
    ranker = export(model)
    side = ranker.variant_side(VARIANTS)
    assert ranker.score(features, side) == pytest.approx(model.rank(features), abs=1e-5)
    assert ranker.score_heads(features, side).shape == (8, 300, 24)
    parts = ranker.explain(features, side, 0, 0)
    assert sum(p.logit for p in parts) == pytest.approx(float(ranker.score(features, side)[0, 0]), abs=1e-5)


def test_exporting_twice_writes_the_same_bytes(deep: CtrModel, export: Export, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(deep, name=name)
    for file in (SIGNATURE, VARIANT_GRAPH, USER_GRAPH):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    other = export(deep, name="c", seed=6)
    assert other.signature.files[USER_GRAPH] != Ranker.load(tmp_path / "a").signature.files[USER_GRAPH]


def test_signature_says_what_the_model_is(deep: CtrModel, export: Export, tmp_path: Path) -> None:
    metrics = {"auc": 0.7, "ece": None}
    signature = export(deep, metrics=metrics).signature
    assert signature.encoder == deep.encoder
    assert (signature.version, signature.log_hash, signature.seed) == ("7", "abc", 5)
    assert signature.metrics == metrics
    assert signature.created_at == "2026-01-02T00:00:00+00:00"
    assert signature.residual_ids == tuple(f"v{i}" for i in range(24))
    assert {"kaleidoscope", "torch", "onnx"} <= set(signature.packages)
    assert set(signature.files) == {VARIANT_GRAPH, USER_GRAPH}
    assert Signature.from_json(signature.to_json()) == signature
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    document = json.loads((tmp_path / "out" / SIGNATURE).read_text())
    assert {"encoder", "log_hash", "seed", "metrics", "packages", "files"} <= set(document)


def test_an_export_is_never_written_over(deep: CtrModel, export: Export) -> None:
    export(deep)
    with pytest.raises(InputError, match="exists already"):
        export(deep)


def test_variants_of_another_training_are_refused(deep: CtrModel, export: Export, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 rows, the model was trained on 24"):
        export(deep, NEW)
    assert not list(tmp_path.iterdir())


def test_an_export_that_scores_differently_is_not_kept(
    deep: CtrModel, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Ranker.score
    monkeypatch.setattr(Ranker, "score", lambda *args: score(*args) + 0.001)
    with pytest.raises(JobError, match=r"differ from the model's by up to 0\.001"):
        export(deep)
    assert not list(tmp_path.iterdir())


def test_many_variants_with_residuals_stay_fast_and_small(tables: Tables, export: Export, tmp_path: Path) -> None:
    n, rng = 50_000, np.random.default_rng(0)
    picks = pa.array(rng.integers(0, 24, n))
    many = VARIANTS.take(picks).set_column(0, "variant_id", pa.array([f"many_{i}" for i in range(n)]))
    wide = tables.for_variants(tables.layout.encoder.tags(many), np.full(n, -1))
    wide = replace(wide, variant=np.append(wide.variant[:-n], rng.normal(size=n)))
    model, users = shut(wide), everybody(tables.layout.encoder, 3)
    ranker = export(model, many)
    assert ranker.score(users, ranker.variant_side(many)) == pytest.approx(model.rank(users), abs=1e-5)
    assert (tmp_path / "out" / VARIANT_GRAPH).stat().st_size < 1_000_000
