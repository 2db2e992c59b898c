"""A trained network as a folder that serving runs without torch: two ONNX graphs and a signature.

The graphs are written node by node rather than traced, so that they are the formula of train.py and no more: blocks of
coefficients without evidence are left out. What each input and output is stands in docs/model-export.md; what reads
them is kaleidoscope/ranker.py.

Axis letters as in tables.py and networks.py, and G draws of the posterior, S crossed fields and numbers with evidence.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version as version_of
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kaleidoscope.encoding import Features
from kaleidoscope.errors import InputError, JobError
from kaleidoscope.ranker import SIGNATURE, USER_GRAPH, VARIANT_GRAPH, Ranker, Signature
from models.tables import MAX_PAIR_CELLS, Tables
from models.train import CtrModel

OPSET, IR_VERSION = 17, 9  # old enough for every ONNX Runtime we allow
PACKAGES = ("kaleidoscope", "numpy", "onnx", "onnxruntime", "pyarrow", "scipy", "torch")
TRIED_USERS, TRIED_VARIANTS, TOLERANCE = 32, 200, 1e-4

Float32s = NDArray[np.float32]
Ints = NDArray[np.int64]


def export_model(
    model: CtrModel,
    folder: Path,
    *,
    version: str,
    variants: pa.Table,
    log_hash: str,
    seed: int,
    created_at: datetime,
    metrics: Mapping[str, float | None] | None = None,
    generic: bool = False,
    draws: int = 8,
) -> Signature:
    """Write the model to a new `folder`, try it there, and return its signature.

    The same arguments write the same bytes. `variants` are those of training, in its order, with a "variant_id"; a
    `generic` model forgets them. About `draws` heads are drawn from the posterior. Raises InputError if the folder
    exists, JobError if what was written does not score as the model does.
    """
    if folder.exists():
        raise InputError(f"{folder}: exists already, and an export never changes. Choose another folder or remove it.")
    if len(variants) != model.tables.layout.crossed_tags.shape[0]:
        n = model.tables.layout.crossed_tags.shape[0]
        raise InputError(
            f"variants: {len(variants):,} rows, the model was trained on {n:,}. Give those of its training."
        )
    parts = _Parts.of(model, variants, generic=generic, draws=draws, seed=seed)
    graphs = {VARIANT_GRAPH: _variant_graph(parts), USER_GRAPH: _user_graph(parts)}
    signature = Signature(
        version=version,
        created_at=created_at.isoformat(),
        encoder=model.encoder,
        generic=generic,
        residual_ids=tuple(variants["variant_id"].take(pa.array(parts.known)).to_pylist()),
        heads=parts.heads,
        draws=parts.draws,
        crossed_fields=tuple(parts.crossed_fields),
        crossed_numbers=tuple(parts.crossed_numbers),
        crossed_tags=tuple(parts.crossed_tags.tolist()),
        field_pairs=model.tables.layout.pairs,
        dimension_pairs=tuple(pair for pair, _, _ in parts.pair_tables),
        hidden=0 if parts.deep is None else len(parts.deep.top),
        log_hash=log_hash,
        seed=seed,
        metrics=dict(metrics or {}),
        packages={name: version_of(name) for name in PACKAGES},
        files={name: hashlib.sha256(content).hexdigest() for name, content in graphs.items()},
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in (*graphs.items(), (SIGNATURE, signature.to_json().encode())):
            with (made / name).open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        _try(Ranker.load(made), model, variants, generic=generic, seed=seed)
        made.chmod(0o755)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return signature


def _try(ranker: Ranker, model: CtrModel, variants: pa.Table, *, generic: bool, seed: int) -> None:
    """Raise JobError unless the export scores random users as the model does."""
    rng, encoder = np.random.default_rng(seed), model.encoder
    codes = [rng.integers(0, f.size, TRIED_USERS) for f in encoder.fields]
    values = rng.normal(size=(TRIED_USERS, len(encoder.numeric_fields))).astype(np.float32)
    shape = (TRIED_USERS, len(encoder.fields))
    users = Features(np.array(codes, dtype=np.uint16).reshape(shape[::-1]).T.copy(), values)
    rows = rng.permutation(len(variants))[:TRIED_VARIANTS]
    some = variants.take(pa.array(rows))
    wanted = model.for_variants(encoder.tags(some), np.full(len(rows), -1) if generic else rows).rank(users)
    worst = float(np.abs(ranker.score(users, ranker.variant_side(some)) - wanted).max(initial=0.0))
    if not worst <= TOLERANCE:
        raise JobError(f"export: its logits differ from the model's by up to {worst:.2g}. Please report this as a bug.")


@dataclass(frozen=True)
class _Deep:
    """The deep part with its heads side by side: M·H hidden columns, M·K factors."""

    heads: int
    user_embedding: Float32s  # (C, M·H)
    user_bias: Float32s  # (M·H,)
    user_additive: Float32s  # (M·H, M·H) block diagonal
    user_factor: Float32s  # (M·H, M·K) block diagonal; with the cross weights, the gate and the mean over heads in it
    tag_embedding: Float32s  # (T, M·H)
    tag_bias: Float32s
    tag_additive: Float32s
    tag_factor: Float32s
    top: Float32s  # (M·H,) with the gate and the mean over heads in it

    @classmethod
    def of(cls, model: CtrModel) -> _Deep | None:
        if not model.gate:
            return None
        state = {name: value.numpy().astype(np.float64) for name, value in model.deep.state_dict().items()}
        m, width = model.deep.config.heads, model.deep.config.width
        share = model.gate / m
        user, tag = state["user_out"], state["tag_out"]
        arrays = {
            "user_embedding": state["user_embedding"],
            "user_bias": state["user_bias"].ravel(),
            "user_additive": _diagonal(user[..., :width]),
            "user_factor": _diagonal(user[..., width:] * state["cross"] * share),
            "tag_embedding": state["tag_embedding"],
            "tag_bias": state["tag_bias"].ravel(),
            "tag_additive": _diagonal(tag[..., :width]),
            "tag_factor": _diagonal(tag[..., width:]),
            "top": state["top"].ravel() * share,
        }
        return cls(m, **{name: array.astype(np.float32) for name, array in arrays.items()})


def _diagonal(blocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Blocks (M, R, Q) as one matrix (M·R, M·Q)."""
    m, r, q = blocks.shape
    out = np.zeros((m, r, m, q))
    out[np.arange(m), :, np.arange(m)] = blocks
    return out.reshape(m * r, m * q)


@dataclass(frozen=True)
class _Parts:
    """The model's coefficients where the graphs need them, without what is 0 everywhere."""

    tables: Tables
    deep: _Deep | None
    heads: int  # M
    draws: int  # G; 0: the fit does not know how sure it is
    tag_effect: Float32s  # (n_tags,) main effects
    tag_draws: Float32s  # (n_tags, G) what each draw adds to them
    pair_tables: list[tuple[tuple[int, int], Float32s, Float32s]]  # dimensions, (a, b) cells, (a, G·b) draws
    known: Ints  # variants with a residual
    residual: Float32s  # (len(known) + 1,), of any other variant last
    residual_sd: Float32s  # the same
    crossed_fields: list[int]  # positions in encoder.fields
    crossed_numbers: list[int]  # the same, for the numbers
    crossed_tags: Ints  # tag columns
    cross: Float32s  # (rows, T): the buckets of the crossed fields one after another, then the numbers
    cross_draws: Float32s  # (rows, G·T)

    @classmethod
    def of(cls, model: CtrModel, variants: pa.Table, *, generic: bool, draws: int, seed: int) -> _Parts:
        tables, layout, rng = model.tables, model.tables.layout, np.random.default_rng(seed)
        deep = _Deep.of(model)
        unsure = tables.variant_sd is not None and tables.cross_sd is not None and draws > 0
        deep_heads = 1 if deep is None else deep.heads
        g = -(-draws // (2 * deep_heads)) * deep_heads if unsure else 0
        variant_sd = tables.variant_sd if tables.variant_sd is not None else np.zeros_like(tables.variant)
        cross_sd = tables.cross_sd if tables.cross_sd is not None else np.zeros_like(tables.cross)

        def noise(sd: NDArray[Any]) -> Float32s:
            """Draws around 0: (G, *sd.shape)."""
            return np.asarray(rng.standard_normal((g, *sd.shape), dtype=np.float32) * sd, dtype=np.float32)

        dimensions, n_tags = layout.encoder.dimensions, layout.encoder.n_tags
        pair_tables, start = [], n_tags
        for a, b in combinations(range(len(dimensions)), 2):
            shape = (dimensions[a].size, dimensions[b].size)
            if shape[0] * shape[1] > MAX_PAIR_CELLS:
                continue
            cells = slice(start, start + shape[0] * shape[1])
            start = cells.stop
            if tables.variant[cells].any() or variant_sd[cells].any():
                spread = noise(variant_sd[cells].reshape(shape)).transpose(1, 0, 2).reshape(shape[0], g * shape[1])
                pair_tables.append(((a, b), tables.variant[cells].reshape(shape).astype(np.float32), spread))
        residual, residual_sd = tables.variant[start:], variant_sd[start:]
        known = np.zeros(0, np.int64) if generic else np.flatnonzero((residual != 0) | (residual_sd != 0))
        new_sd = float(np.sqrt(tables.variant_variance[-1])) if g else 0.0

        cross, spread = tables.cross.astype(np.float32), cross_sd * (g > 0)
        live = (cross != 0) | (spread > 0)
        tags, rows = np.flatnonzero(live.any(axis=0)), np.cumsum([0, *layout.crossed_sizes])
        blocks = [b for b in range(len(rows) - 1) if live[rows[b] : rows[b + 1]].any()]
        of_blocks = np.concatenate([np.zeros(0, np.int64), *(np.arange(rows[b], rows[b + 1]) for b in blocks)])
        n_fields, numbers = len(layout.crossed_fields), layout.encoder.numeric_fields
        cross_draws = noise(spread[np.ix_(of_blocks, tags)]).transpose(1, 0, 2)  # (rows, G, T)
        return cls(
            tables=tables,
            deep=deep,
            heads=2 * g or deep_heads,
            draws=g,
            tag_effect=tables.variant[:n_tags].astype(np.float32),
            tag_draws=noise(variant_sd[:n_tags]).T,
            pair_tables=pair_tables,
            known=known,
            residual=np.append(residual[known], 0.0).astype(np.float32),
            residual_sd=np.append(residual_sd[known], new_sd).astype(np.float32),
            crossed_fields=[layout.crossed_fields[b] for b in blocks if b < n_fields],
            crossed_numbers=[numbers[b - n_fields] for b in blocks if b >= n_fields],
            crossed_tags=layout.tag_columns[tags],
            cross=cross[np.ix_(of_blocks, tags)],
            cross_draws=cross_draws.reshape(len(of_blocks), g * len(tags)),
        )


class _Graph:
    """An ONNX graph that grows node by node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []

    def branch(self, name: str) -> _Graph:
        """A graph that is run on a condition, inside this one and with all its values at hand."""
        inner = _Graph(name)
        inner.constants = self.constants
        return inner

    def body(self, output: str) -> Any:
        """The branch, with its one output."""
        return helper.make_graph(
            self.nodes, self.name, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        )

    def input(self, name: str, kind: int, *shape: str | int) -> str:
        """Declare an input."""
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, array: Any, kind: Any = np.float32) -> str:
        """The name of a constant."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(array, dtype=kind, order="C"), name))
        return name

    def index(self, *positions: int) -> str:
        """The name of a constant of axes, lengths or positions."""
        return self.constant(positions, np.int64)

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        name = name or f"{self.name}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def sum(self, array: str, axis: int, *, keep: bool = False, name: str = "") -> str:
        """Sum over an axis."""
        return self.add("ReduceSum", array, self.index(axis), keepdims=int(keep), name=name)

    def concat(self, arrays: list[str], axis: int, *, name: str = "") -> str:
        """Arrays behind one another."""
        return self.add("Concat", *arrays, axis=axis, name=name)

    def columns(self, array: str, start: int, stop: int) -> str:
        """A slice of the second axis."""
        return self.add("Slice", array, self.index(start), self.index(stop), self.index(1))

    def rearranged(self, array: str, *shape: int, order: tuple[int, ...]) -> str:
        """Reshape (0 keeps an axis, -1 is what is left), then transpose."""
        return self.add("Transpose", self.add("Reshape", array, self.index(*shape)), perm=order)

    def bytes(self, outputs: Mapping[str, tuple[str | int, ...]]) -> bytes:
        """The model as ONNX: float outputs by name with their shapes."""
        declared = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n, shape in outputs.items()]
        graph = helper.make_graph(self.nodes, self.name, self.inputs, declared, self.constants)
        model = helper.make_model(
            graph, producer_name="kaleidoscope", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
        )
        onnx.checker.check_model(model, full_check=True)
        return bytes(model.SerializeToString(deterministic=True))


def _variant_graph(parts: _Parts) -> bytes:
    """Tags → everything that depends on the variant alone, N last."""
    graph, encoder, g = _Graph("variant"), parts.tables.layout.encoder, parts.draws
    tags = graph.input("tags", TensorProto.FLOAT, "N", encoder.n_tags)  # multi-hot
    residual = graph.input("residual", TensorProto.INT64, "N")  # which one; the last for a variant that has none
    noise = graph.input("noise", TensorProto.FLOAT, "N", g)  # standard normal
    start = np.cumsum([0, *(d.size for d in encoder.dimensions)])
    of_dimension = np.zeros((encoder.n_tags, len(encoder.dimensions)), np.float32)
    for d in range(len(encoder.dimensions)):
        of_dimension[start[d] : start[d + 1], d] = parts.tag_effect[start[d] : start[d + 1]]
    effects = [graph.add("MatMul", tags, graph.constant(of_dimension))]  # (N, D)
    draws = [graph.add("MatMul", tags, graph.constant(parts.tag_draws))] if g else []  # (N, G)
    for (a, b), cells, spread in parts.pair_tables:
        left, right = (graph.columns(tags, int(start[d]), int(start[d + 1])) for d in (a, b))
        taste = graph.add("MatMul", left, graph.constant(cells))  # (N, b)
        effects.append(graph.sum(graph.add("Mul", taste, right), 1, keep=True))
        if g:
            shape = graph.index(0, g, cells.shape[1])
            drawn = graph.add("Reshape", graph.add("MatMul", left, graph.constant(spread)), shape)  # (N, G, b)
            drawn = graph.add("Mul", drawn, graph.add("Unsqueeze", right, graph.index(1)))
            draws.append(graph.sum(drawn, 2))
    effects.append(graph.add("Gather", graph.constant(parts.residual[:, None]), residual))
    every = graph.concat(effects, 1)  # (N, E)
    graph.add("Transpose", every, perm=(1, 0), name="effects")
    graph.sum(every, 1, name="additive")
    outputs: dict[str, tuple[str | int, ...]] = {"effects": ("E", "N"), "additive": ("N",)}
    if g:
        own = graph.add("Mul", noise, graph.add("Gather", graph.constant(parts.residual_sd[:, None]), residual))
        graph.add("Transpose", graph.add("Sum", *draws, own), perm=(1, 0), name="draws")
        outputs["draws"] = (g, "N")
    crossed = graph.add("Gather", tags, graph.constant(parts.crossed_tags, np.int64), axis=1)
    graph.add("Transpose", crossed, perm=(1, 0), name="crossed")
    outputs["crossed"] = (len(parts.crossed_tags), "N")
    if deep := parts.deep:
        read = graph.add("Gather", tags, graph.constant(parts.tables.layout.tag_columns, np.int64), axis=1)
        hidden = graph.add("MatMul", read, graph.constant(deep.tag_embedding))
        hidden = graph.add("Relu", graph.add("Add", hidden, graph.constant(deep.tag_bias)))  # (N, M·H)
        for name, weight in (("hidden", deep.tag_additive), ("factors", deep.tag_factor)):
            graph.add("Transpose", graph.add("MatMul", hidden, graph.constant(weight)), perm=(1, 0), name=name)
            outputs[name] = (weight.shape[1], "N")
    return graph.bytes(outputs)


def _user_graph(parts: _Parts) -> bytes:
    """Users, and what the variant graph gave, → logits. The heads are worked out only where they are asked for."""
    graph, encoder, deep = _Graph("user"), parts.tables.layout.encoder, parts.deep
    codes = graph.input("codes", TensorProto.INT64, "B", len(encoder.fields))
    values = graph.input("values", TensorProto.FLOAT, "B", len(encoder.numeric_fields))
    explore = graph.input("explore", TensorProto.BOOL)
    additive = graph.input("additive", TensorProto.FLOAT, "N")
    crossed = graph.input("crossed", TensorProto.FLOAT, len(parts.crossed_tags), "N")

    intercept = graph.add("Identity", graph.constant(parts.tables.intercept), name="intercept")
    of_user = graph.sum(_side_terms(graph, parts, codes, values), 1, keep=True)  # (B, 1)
    side = graph.add("Add", graph.add("Add", of_user, intercept), additive)  # (B, N)
    buckets, numbers = _crossed_rows(graph, parts, codes, values)
    taste = graph.sum(_terms(graph, parts, buckets, numbers), 1)  # (B, T)
    shallow = graph.add("Add", side, graph.add("MatMul", taste, crossed))  # (B, N)
    outputs: dict[str, tuple[str | int, ...]] = {"logits": ("B", "N"), "heads": ("M", "B", "N"), "intercept": ()}
    outputs |= {"side_terms": ("B", "P"), "terms": ("B", "S", len(parts.crossed_tags))}
    factor = hidden = factors = ""
    if deep:
        factors = graph.input("factors", TensorProto.FLOAT, deep.tag_factor.shape[1], "N")
        shown = graph.input("hidden", TensorProto.FLOAT, len(deep.top), "N")
        mine, factor = _deep_user(graph, parts, deep, codes, values)
        hidden = graph.add("Relu", graph.add("Add", graph.add("Unsqueeze", mine, graph.index(2)), shown))  # (B, M·H, N)
        joint = graph.add("Squeeze", graph.add("MatMul", graph.constant(deep.top[None]), hidden), graph.index(1))
        graph.add("Add", graph.add("MatMul", factor, factors), joint, name="deep")
        graph.add("Add", shallow, "deep", name="logits")
        outputs["deep"] = ("B", "N")
    else:
        graph.add("Identity", shallow, name="logits")

    heads, alone = graph.branch("heads"), graph.branch("alone")
    terms = [heads.add("Unsqueeze", shallow, heads.index(0))]  # (1, B, N)
    if parts.draws:
        drawn = graph.input("draws", TensorProto.FLOAT, parts.draws, "N")
        drawn = _drawn(heads, parts, buckets, numbers, crossed, drawn)  # (G, B, N)
        terms.append(heads.concat([drawn, heads.add("Neg", drawn)], 0))  # mirrored: their mean is the model
    if deep:
        of_head = _deep_heads(heads, deep, factor, factors, hidden)
        terms.append(heads.concat([of_head] * (parts.heads // deep.heads), 0))
    heads.add("Sum", *terms, name="explored")
    alone.add("Unsqueeze", "logits", alone.index(0), name="greedy")
    branches = {"then_branch": heads.body("explored"), "else_branch": alone.body("greedy")}
    graph.add("If", explore, name="heads", **branches)
    return graph.bytes(outputs)


def _side_terms(graph: _Graph, parts: _Parts, codes: str, values: str) -> str:
    """What the user alone adds: (B, fields, then numbers, then pairs of fields)."""
    layout, fields = parts.tables.layout, parts.tables.layout.encoder.fields
    order = [*layout.crossed_fields, *layout.other_fields]
    first = np.cumsum([0, *layout.crossed_sizes, *layout.other_sizes])
    n_crossed, n_numbers = len(layout.crossed_fields), len(layout.encoder.numeric_fields)
    of_field = np.empty(len(fields), np.int64)
    of_field[order] = np.delete(first[: len(fields) + n_numbers], np.arange(n_crossed, n_crossed + n_numbers))
    rows = graph.add("Add", codes, graph.constant(of_field, np.int64))
    side = graph.constant(parts.tables.side)
    slope = parts.tables.side[first[n_crossed] : first[n_crossed] + n_numbers]
    terms = [graph.add("Gather", side, rows), graph.add("Mul", values, graph.constant(slope))]
    if layout.pairs:
        a, b = (graph.add("Gather", codes, graph.index(*(p[i] for p in layout.pairs)), axis=1) for i in (0, 1))
        cells = graph.add("Add", graph.add("Mul", a, graph.index(*(fields[p[1]].size for p in layout.pairs))), b)
        start = graph.constant(first[len(fields) + n_numbers : -1], np.int64)
        terms.append(graph.add("Gather", side, graph.add("Add", cells, start)))
    return graph.concat(terms, 1, name="side_terms")


def _crossed_rows(graph: _Graph, parts: _Parts, codes: str, values: str) -> tuple[str, str]:
    """Rows of the cross tables that are set for each user, and their numbers."""
    encoder = parts.tables.layout.encoder
    start = np.cumsum([0, *(encoder.fields[i].size for i in parts.crossed_fields)])[:-1]
    mine = graph.add("Gather", codes, graph.constant(parts.crossed_fields, np.int64), axis=1)
    which = [encoder.numeric_fields.index(i) for i in parts.crossed_numbers]
    numbers = graph.add("Gather", values, graph.constant(which, np.int64), axis=1)
    return graph.add("Add", mine, graph.constant(start, np.int64)), numbers


def _terms(graph: _Graph, parts: _Parts, buckets: str, numbers: str) -> str:
    """What each crossed field and number of a user adds to the logit of each crossed tag: (B, S, T)."""
    first = len(parts.cross) - len(parts.crossed_numbers)
    of_buckets = graph.add("Gather", graph.constant(parts.cross[:first]), buckets)
    column = graph.add("Unsqueeze", numbers, graph.index(2))
    of_numbers = graph.add("Mul", column, graph.constant(parts.cross[first:]))
    return graph.concat([of_buckets, of_numbers], 1, name="terms")


def _drawn(graph: _Graph, parts: _Parts, buckets: str, numbers: str, crossed: str, draws: str) -> str:
    """What each draw adds to the logits: (G, B, N)."""
    of_variant = graph.add("Unsqueeze", draws, graph.index(1))  # (G, 1, N)
    if not len(parts.crossed_tags):
        return of_variant
    first = len(parts.cross) - len(parts.crossed_numbers)
    taste = graph.sum(graph.add("Gather", graph.constant(parts.cross_draws[:first]), buckets), 1)  # (B, G·T)
    taste = graph.add("Add", taste, graph.add("MatMul", numbers, graph.constant(parts.cross_draws[first:])))
    taste = graph.rearranged(taste, 0, parts.draws, len(parts.crossed_tags), order=(1, 0, 2))  # (G, B, T)
    return graph.add("Add", graph.add("MatMul", taste, crossed), of_variant)


def _deep_user(graph: _Graph, parts: _Parts, deep: _Deep, codes: str, values: str) -> tuple[str, str]:
    """The user's half of the deep part: (B, M·H) for the hidden layer, (B, M·K) for the products."""
    layout = parts.tables.layout
    start = np.cumsum([0, *layout.crossed_sizes])
    fields, first = layout.crossed_fields, int(start[len(layout.crossed_fields)])
    mine = graph.add("Gather", codes, graph.constant(fields, np.int64), axis=1)
    rows = graph.add("Add", mine, graph.constant(start[: len(fields)], np.int64))
    flat = graph.sum(graph.add("Gather", graph.constant(deep.user_embedding[:first]), rows), 1)
    flat = graph.add("Add", flat, graph.add("MatMul", values, graph.constant(deep.user_embedding[first:])))
    hidden = graph.add("Relu", graph.add("Add", flat, graph.constant(deep.user_bias)))
    additive, factor = (graph.add("MatMul", hidden, graph.constant(w)) for w in (deep.user_additive, deep.user_factor))
    return additive, factor


def _deep_heads(graph: _Graph, deep: _Deep, factor: str, factors: str, hidden: str) -> str:
    """The deep logit of each head rather than their mean: (heads of the deep part, B, N)."""
    own = np.eye(deep.heads, dtype=np.float32) * deep.heads
    mask = np.repeat(own, deep.tag_factor.shape[1] // deep.heads, axis=1)[:, None]  # (heads, 1, M·K)
    product = graph.add("MatMul", graph.add("Mul", factor, graph.constant(mask)), factors)
    top = np.repeat(own, len(deep.top) // deep.heads, axis=1) * deep.top  # (heads, M·H)
    joint = graph.add("MatMul", graph.constant(top), hidden)  # (B, heads, N)
    return graph.add("Add", product, graph.add("Transpose", joint, perm=(1, 0, 2)))
