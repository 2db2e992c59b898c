"""Runs an exported model: the click logits of every variant of a release for a user, in well under a millisecond.

An export folder (docs/model-export.md) is two ONNX graphs and a signature. `variant.onnx` turns the tags of a release's
variants into everything that no user changes, once per release; `user.onnx` joins it with users. Neither torch nor the
package that trained the model is needed here.

Axis letters: B users, N variants, M heads, S crossed fields and numbers, T crossed tags, E effects of a variant alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.special import ndtri

from kaleidoscope.encoding import Encoder, Features
from kaleidoscope.errors import JobError

FORMAT = 1
SIGNATURE, VARIANT_GRAPH, USER_GRAPH = "signature.json", "variant.onnx", "user.onnx"
REMEDY = "Copy the whole folder again, or export the model again."
CELLS = 8_000_000  # numbers in the largest intermediate array of one run
VARIANT_ROWS = 8_192  # variants whose tags are laid out at once

Float32s = NDArray[np.float32]


@dataclass(frozen=True)
class Signature:
    """What an exported model is, and what it was made of: `signature.json`."""

    version: str
    created_at: str  # ISO 8601, UTC
    encoder: Encoder  # features, vocabularies, bins, tag dimensions
    generic: bool  # of a whole business rather than of one scene: knows no variant by its id
    residual_ids: tuple[str, ...]  # variants with a residual of their own, in the order of the graph
    heads: int  # M
    draws: int  # of the posterior, each with its mirror image: how many normal numbers a variant needs
    # What the axes of the terms stand for. Fields by their position in the encoder, tags by their column.
    crossed_fields: tuple[int, ...]
    crossed_numbers: tuple[int, ...]
    crossed_tags: tuple[int, ...]
    field_pairs: tuple[tuple[int, int], ...]
    dimension_pairs: tuple[tuple[int, int], ...]
    hidden: int  # hidden columns of the deep part, all heads together; 0 without one
    log_hash: str  # of the log it was trained on
    seed: int
    metrics: Mapping[str, float | None]
    packages: Mapping[str, str]
    files: Mapping[str, str]  # SHA-256 of each

    def to_json(self) -> str:
        """The signature as text, sealed with its own hash; the same signature is the same text."""
        shown = {"format": FORMAT} | asdict(replace(self, encoder=Encoder((), ())))
        shown["encoder"] = json.loads(self.encoder.to_json())
        return json.dumps(shown | {"sha256": _seal(shown)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Signature:
        """Read what `to_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = raw.get("format") if isinstance(raw, dict) else None
            raise ValueError(f"its format is {found!r}, this version reads {FORMAT}")
        if raw.pop("sha256", None) != _seal(raw):
            raise ValueError("its content is not what its hash says")
        del raw["format"]
        raw["encoder"] = Encoder.from_json(json.dumps(raw["encoder"]))
        for name in ("residual_ids", "crossed_fields", "crossed_numbers", "crossed_tags"):
            raw[name] = tuple(raw[name])
        for name in ("field_pairs", "dimension_pairs"):
            raw[name] = tuple((a, b) for a, b in raw[name])
        return cls(**raw)

    @cached_property
    def tag_names(self) -> tuple[tuple[str, str], ...]:
        """Dimension and value of every tag column; `missing` and `unseen` are values too."""
        return tuple((d.name, value) for d in self.encoder.dimensions for value in ("missing", "unseen", *d.vocabulary))


def _seal(shown: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class VariantSide:
    """The half of the scores that no user changes, for N variants of a release. Arrays have N last."""

    ids: tuple[str, ...]
    tags: csr_array  # (N, tag columns) multi-hot
    effects: Float32s  # (E, N): per dimension, per pair of dimensions, the residual
    arrays: Mapping[str, Float32s]  # what user.onnx reads

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Contribution:
    """One part of a logit. Of the user alone it has no tag, of the variant alone no field, the intercept neither."""

    part: str  # intercept, user, variant, interaction, residual (what is this variant's own) or deep
    field: str | None
    value: str | None  # of the field, as a person reads it
    dimension: str | None
    tag: str | None
    logit: float


@dataclass(frozen=True, eq=False)
class Ranker:
    """A loaded model. Safe to share between threads; `score` of one user takes one core."""

    signature: Signature
    variant_graph: Any
    user_graph: Any

    @classmethod
    def load(cls, folder: Path, *, threads: int = 1) -> Ranker:
        """Load and try an export folder. Raises JobError naming the file unless all are those that were written."""
        path = folder / SIGNATURE
        try:
            signature = Signature.from_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise JobError(f"{path}: no exported model there ({error.strerror or error}). {REMEDY}") from error
        except Exception as error:  # whatever a damaged document can lead to
            raise JobError(f"{path}: damaged, edited or of another version ({error}). {REMEDY}") from error
        try:
            ranker = cls(signature, *(_open(folder, signature, name, threads) for name in (VARIANT_GRAPH, USER_GRAPH)))
            ranker.score_heads(ranker.features({}, 1), ranker.variant_side(pa.table({"variant_id": ["none"]})))
        except JobError:
            raise
        except Exception as error:  # ONNX Runtime raises types of its own, by the kind of mistake
            raise JobError(f"{folder}: its graphs do not fit its {SIGNATURE} ({error}). {REMEDY}") from error
        return ranker

    @property
    def version(self) -> str:
        """The version of the model."""
        return self.signature.version

    def variant_side(self, variants: pa.Table) -> VariantSide:
        """Everything about these variants that no user changes: once per release.

        `variants` has a "variant_id" and per tag dimension a list of text, as `Log.variants`; a dimension it lacks is
        missing for all. A variant the model was not trained on has no residual, and its heads differ by the more.
        """
        lists = pa.list_(pa.string())
        names = [d.name for d in self.signature.encoder.dimensions]
        absent = pa.nulls(len(variants), lists)
        given = [variants[name].cast(lists) if name in variants.column_names else absent for name in names]
        tags = self.signature.encoder.tags(pa.table(given, names))
        ids = tuple(variants["variant_id"].cast(pa.string()).to_pylist())
        known = np.array([self._residual_of.get(i, len(self._residual_of)) for i in ids], dtype=np.int64)
        noise = _normals(ids, self.signature.seed, self.signature.draws)
        outputs = [output.name for output in self.variant_graph.get_outputs()]
        parts: list[list[Float32s]] = []
        for start in range(0, max(len(ids), 1), VARIANT_ROWS):
            rows = slice(start, start + VARIANT_ROWS)
            inputs = {"tags": tags[rows].toarray(), "residual": known[rows], "noise": noise[rows]}
            parts.append(self.variant_graph.run(outputs, inputs))
        whole = {
            name: np.concatenate(arrays, axis=-1)
            for name, arrays in zip(outputs, zip(*parts, strict=True), strict=True)
        }
        return VariantSide(ids, tags, whole.pop("effects"), whole)

    def features(self, columns: Mapping[str, Sequence[object]], rows: int) -> Features:
        """Encode the plain values of users and contexts; see `Encoder.encode`."""
        return self.signature.encoder.encode(columns, rows)

    def score(self, features: Features, side: VariantSide) -> Float32s:
        """Click logits of every variant for every user: (B, N), the mean over heads."""
        return self._run("logits", features, side, explore=False)

    def score_heads(self, features: Features, side: VariantSide) -> Float32s:
        """Click logits by every head: (M, B, N). What the heads disagree about is what the model is unsure of."""
        return self._run("heads", features, side, explore=True)

    def _run(self, output: str, features: Features, side: VariantSide, *, explore: bool) -> Float32s:
        step = max(1, CELLS // self._cells(len(side), explore=explore))
        parts = [
            self.user_graph.run([output], self._inputs(features.take(slice(i, i + step)), side, explore=explore))[0]
            for i in range(0, max(1, len(features)), step)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-2)

    def _cells(self, variants: int, *, explore: bool) -> int:
        """Numbers in the largest intermediate array, per user."""
        s = self.signature
        terms = (len(s.crossed_fields) + len(s.crossed_numbers)) * len(s.crossed_tags)
        if explore:
            return max(variants * max(s.hidden, s.heads), terms * s.draws, 1)
        return max(variants * max(s.hidden, 1), terms, 1)

    @staticmethod
    def _inputs(features: Features, side: VariantSide, *, explore: bool) -> dict[str, NDArray[Any]]:
        codes, values = features.codes.astype(np.int64), features.values
        return {"codes": codes, "values": values, "explore": np.array(explore), **side.arrays}

    def explain(self, features: Features, side: VariantSide, row: int, variant: int) -> list[Contribution]:
        """What makes up the logit of one variant for one user: the parts add up to `score`, largest first.

        Field × tag terms are the model's own and exact; what several fields and tags do together is one part, `deep`.
        """
        one = features.take(slice(row, row + 1))
        names = [output.name for output in self.user_graph.get_outputs()]
        found = dict(zip(names, self.user_graph.run(names, self._inputs(one, side, explore=False)), strict=True))
        tags = side.tags.indices[side.tags.indptr[variant] : side.tags.indptr[variant + 1]].tolist()
        parts = [Contribution("intercept", None, None, None, None, float(found["intercept"]))]
        parts += self._of_user(one, found["side_terms"][0])
        parts += self._of_variant(tags, side.effects[:, variant])
        parts += self._of_both(one, tags, found["terms"][0])
        if "deep" in found:
            parts.append(Contribution("deep", None, None, None, None, float(found["deep"][0, variant])))
        return sorted((p for p in parts if p.logit or p.part == "intercept"), key=lambda p: -abs(p.logit))

    def pair_terms(self, features: Features, side: VariantSide, variant: NDArray[np.int64]) -> Float32s:
        """The exact field × dimension terms of `variant` (n,) for n users, or for one user: (n, F, D).

        Fields and dimensions are those of the encoder. Over all of them the terms add up to what `explain` calls
        interactions, and what fields and dimensions have no terms for is 0.
        """
        encoder, rows = self.signature.encoder, (*self.signature.crossed_fields, *self.signature.crossed_numbers)
        columns = np.array(self.signature.crossed_tags, dtype=np.int64)
        out = np.zeros((len(variant), len(encoder.fields), len(encoder.dimensions)), np.float32)
        if not rows or not len(columns) or not len(variant):
            return out
        of_dimension = np.zeros((len(columns), len(encoder.dimensions)), np.float32)
        owner = np.repeat(np.arange(len(encoder.dimensions)), [d.size for d in encoder.dimensions])
        of_dimension[np.arange(len(columns)), owner[columns]] = 1.0
        carried = side.tags[:, columns]
        few = VariantSide((), side.tags[:0], side.effects[:, :0], {k: a[..., :0] for k, a in side.arrays.items()})
        step = max(1, CELLS // (len(rows) * len(columns)))
        for at in (slice(i, i + step) for i in range(0, len(variant), step)):
            some = features if len(features) == 1 else features.take(at)
            terms = self.user_graph.run(["terms"], self._inputs(some, few, explore=False))[0]  # (1 or b, S, T)
            found = (terms * carried[variant[at]].toarray()[:, None, :]) @ of_dimension  # (b, S, D)
            for s, position in enumerate(rows):  # a field's bucket and its number count as one
                out[at, position] += found[:, s]
        return out

    def _of_user(self, one: Features, terms: Float32s) -> Iterator[Contribution]:
        """`terms`: per field, per number, per pair of fields."""
        encoder = self.signature.encoder
        of_field = terms[: len(encoder.fields)].astype(np.float64)
        for number, position in enumerate(encoder.numeric_fields):
            of_field[position] += terms[len(encoder.fields) + number]
        values = self._labels(one)
        for field, value, logit in zip(encoder.fields, values, of_field, strict=True):
            yield Contribution("user", field.name, value, None, None, float(logit))
        of_pair = terms[len(encoder.fields) + len(encoder.numeric_fields) :]
        for (a, b), logit in zip(self.signature.field_pairs, of_pair, strict=True):
            name = f"{encoder.fields[a].name} × {encoder.fields[b].name}"
            yield Contribution("user", name, f"{values[a]} × {values[b]}", None, None, float(logit))

    def _of_variant(self, tags: Sequence[int], effects: Float32s) -> Iterator[Contribution]:
        dimensions = self.signature.encoder.dimensions
        names = [self.signature.tag_names[t] for t in tags]
        shown = [", ".join(tag for name, tag in names if name == d.name) for d in dimensions]
        for dimension, tag, logit in zip(dimensions, shown, effects, strict=False):
            yield Contribution("variant", None, None, dimension.name, tag, float(logit))
        for (a, b), logit in zip(self.signature.dimension_pairs, effects[len(dimensions) : -1], strict=True):
            name = f"{dimensions[a].name} × {dimensions[b].name}"
            yield Contribution("variant", None, None, name, f"{shown[a]} × {shown[b]}", float(logit))
        yield Contribution("residual", None, None, None, None, float(effects[-1]))

    def _of_both(self, one: Features, tags: Sequence[int], terms: Float32s) -> Iterator[Contribution]:
        """`terms` (S, T): a field's bucket and its number count as one."""
        signature, carried = self.signature, set(tags)
        fields, values = signature.encoder.fields, self._labels(one)
        total: dict[tuple[int, int], float] = {}
        for position, row in zip((*signature.crossed_fields, *signature.crossed_numbers), terms, strict=True):
            for tag, logit in zip(signature.crossed_tags, row.tolist(), strict=True):
                if tag in carried:
                    total[position, tag] = total.get((position, tag), 0.0) + logit
        for (position, tag), logit in total.items():
            yield Contribution("interaction", fields[position].name, values[position], *signature.tag_names[tag], logit)

    def _labels(self, one: Features) -> list[str]:
        return [f.label(int(code)) for f, code in zip(self.signature.encoder.fields, one.codes[0], strict=True)]

    @cached_property
    def _residual_of(self) -> dict[str, int]:
        return {variant: i for i, variant in enumerate(self.signature.residual_ids)}


def _open(folder: Path, signature: Signature, name: str, threads: int) -> Any:
    """A session of one graph, made of the very bytes whose hash was checked."""
    path = folder / name
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror or error}). {REMEDY}") from error
    if hashlib.sha256(content).hexdigest() != signature.files.get(name):
        raise JobError(f"{path}: its hash is not the one in {SIGNATURE}: damaged or exchanged. {REMEDY}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of ONNX Runtime's own types
        raise JobError(f"{path}: ONNX Runtime {onnxruntime.__version__} cannot run it ({error}). {REMEDY}") from error


def _normals(ids: Sequence[str], seed: int, draws: int) -> Float32s:
    """Standard normal numbers (N, draws) that belong to a variant, whatever release it is in and whichever others."""
    size = 4 * draws
    digests = b"".join(hashlib.shake_128(f"{seed}:{i}".encode()).digest(size) for i in ids)
    uniform = (np.frombuffer(digests, np.uint32).reshape(len(ids), draws) + 0.5) / 2.0**32
    return np.asarray(ndtri(uniform), dtype=np.float32)
