"""One encoder for training and serving: buckets, bins, tags, and that it does not matter how a column is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaleidoscope.encoding import MAX_BINS, MAX_VALUES, MISSING, RESERVED, UNSEEN, Encoder, Field
from kaleidoscope.errors import InputError

NO_VARIANTS = pa.table({"style": pa.array([["flat"], ["real"]])})
words = st.lists(st.none() | st.text("abc", min_size=1, max_size=2), min_size=1, max_size=30)
numbers = st.lists(st.none() | st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=60)


def fit(columns: dict[str, Any], variants: pa.Table = NO_VARIANTS, **roles: list[str]) -> Encoder:
    arrays = {name: c if isinstance(c, pa.Array | pa.ChunkedArray) else pa.array(c) for name, c in columns.items()}
    user = [name for name in arrays if not any(name in names for names in roles.values())]
    given: dict[str, Any] = {"context": [], **roles}
    return Encoder.fit(arrays, user=user, variants=variants, dimensions=variants.column_names, **given)


def codes(encoder: Encoder, name: str, values: Any) -> list[int]:
    column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    position = [f.name for f in encoder.fields].index(name)
    return [int(code) for code in encoder.features({name: column}).codes[:, position]]


def test_missing_and_never_seen_values_have_buckets_of_their_own() -> None:
    encoder = fit({"city": ["Oslo", "Rome", None]})
    assert codes(encoder, "city", ["Rome", "Oslo", None, "Lima"]) == [RESERVED + 1, RESERVED, MISSING, UNSEEN]
    assert [encoder.fields[0].label(b) for b in range(4)] == ["missing", "unseen", "Oslo", "Rome"]


def test_fields_keep_the_order_user_context_group() -> None:
    encoder = fit({"week": ["a"], "hour": [1.0], "age": [3]}, context=["hour"], group=["week"])
    assert [(f.name, f.role) for f in encoder.fields] == [("age", "user"), ("hour", "context"), ("week", "group")]


def test_group_is_categorical_even_when_its_ids_are_numbers() -> None:
    encoder = fit({"test": [7, 8, 7]}, group=["test"])
    assert encoder.fields[0].vocabulary == ("7", "8")
    assert codes(encoder, "test", [8, 9]) == [RESERVED + 1, UNSEEN]


def test_numbers_are_a_bin_and_a_value() -> None:
    encoder = fit({"age": [10, 20, 30]})
    features = encoder.features({"age": pa.array([5.0, 10.0, 19.9, 20.0, 99.0, None, float("nan")])})
    assert features.codes[:, 0].tolist() == [2, 2, 2, 3, 4, MISSING, MISSING]
    known = features.values[:5, 0]
    assert (np.diff(known) >= 0).all()
    assert known[3] == pytest.approx(0.0, abs=1e-6)
    assert features.values[5:, 0].tolist() == [0.0, 0.0]
    assert np.abs(features.values).max() <= 4.0


def test_bins_of_numbers_read_lo_hi() -> None:
    field = fit({"age": [10, 20, 30]}).fields[0]
    assert [field.label(b) for b in range(RESERVED, field.size)] == ["[-inf, 20)", "[20, 30)", "[30, inf)"]


def test_labels_of_bins_stay_different_for_large_numbers() -> None:
    field = fit({"day": [20230101, 20230102, 20230103]}).fields[0]
    assert field.label(RESERVED + 1) == "[20230102, 20230103)"


def test_many_numbers_share_bins_of_about_equal_size() -> None:
    column = pa.array(np.random.default_rng(0).lognormal(size=10_000))
    counts = np.bincount(codes(fit({"income": column}), "income", column))[RESERVED:]
    assert len(counts) == MAX_BINS
    assert counts.min() > 600


@pytest.mark.parametrize("column", [[1.0, 1.0], [None, None], [float("nan")], [1e308, -1e308], [2**62, 2**62 + 1]])
def test_degenerate_numbers_are_encoded(column: list[Any]) -> None:
    features = fit({"x": pa.array(column)}).features({"x": pa.array([*column, 0])})
    assert np.isfinite(features.values).all()


def test_values_beyond_the_vocabulary_are_the_rarest() -> None:
    column = [f"v{i}" for i in range(MAX_VALUES + 500)] + [f"v{i}" for i in range(MAX_VALUES)]
    encoder = fit({"id": column})
    assert encoder.fields[0].size == MAX_VALUES + RESERVED
    assert (np.array(codes(encoder, "id", column)) == UNSEEN).sum() == 500


def test_numeric_field_reads_numbers_written_as_text_and_refuses_other_text() -> None:
    encoder = fit({"age": [10, 20, 30]})
    assert codes(encoder, "age", ["10", "25.5", None]) == codes(encoder, "age", [10, 25.5, None])
    with pytest.raises(InputError, match=r"column 'age' was numeric .* 'old'"):
        encoder.features({"age": pa.array(["old"])})


def test_categorical_field_reads_numbers_as_their_text() -> None:
    assert codes(fit({"zip": ["1", "2"]}), "zip", [2, 3]) == [RESERVED + 1, UNSEEN]


def test_absent_column_is_missing_for_everyone() -> None:
    features = fit({"city": ["Oslo"], "age": [1, 2]} | {"age": [1]}).features({"city": pa.array(["Oslo", "Oslo"])})
    assert features.codes.tolist() == [[RESERVED, MISSING], [RESERVED, MISSING]]


def test_rows_without_any_field_are_counted() -> None:
    assert len(fit({}).features({}, 5)) == 5


def test_tags_hold_several_values_of_a_dimension_each_once() -> None:
    variants = pa.table({"style": pa.array([["b", "a", "a"], [], None, ["a", None]]), "tone": pa.array([["x"]] * 4)})
    tags = fit({}, variants).tags(variants).toarray()
    assert tags[:, :4].tolist() == [[0, 0, 1, 1], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]]
    assert tags[:, 4:].tolist() == [[0, 0, 1]] * 4


def test_never_seen_tag_has_its_own_column() -> None:
    tags = fit({}).tags(pa.table({"style": pa.array([["new"], ["flat", "new"]])})).toarray()
    assert tags.tolist() == [[0, 1, 0, 0], [0, 1, 1, 0]]


def test_tags_of_no_variants_are_empty() -> None:
    assert fit({}).tags(NO_VARIANTS.slice(0, 0)).shape == (0, 4)
    assert fit({}).tags(NO_VARIANTS.schema.empty_table()).shape == (0, 4)


def test_tags_of_a_slice_are_a_slice_of_the_tags() -> None:
    encoder = fit({})
    assert (encoder.tags(NO_VARIANTS.slice(1)).toarray() == encoder.tags(NO_VARIANTS).toarray()[1:]).all()


def test_only_keeps_the_fields_of_a_role_and_their_values() -> None:
    encoder = fit({"age": [1, 2], "city": ["a", "b"], "hour": [3, 4]}, context=["hour"])
    narrow, fields, values = encoder.only("context")
    columns = {"age": pa.array([2]), "city": pa.array(["a"]), "hour": pa.array([4])}
    whole = encoder.features(columns)
    assert [f.name for f in narrow.fields] == ["hour"]
    assert narrow.features(columns).codes.tolist() == whole.codes[:, fields].tolist()
    assert narrow.features(columns).values.tolist() == whole.values[:, values].tolist()


def test_dictionary_with_as_many_values_as_its_index_type_holds() -> None:
    column = pa.DictionaryArray.from_arrays(
        pa.array([0, 127, None], pa.int8()), pa.array([f"{i:03}" for i in range(128)])
    )
    assert codes(fit({"x": column}), "x", column) == [RESERVED, RESERVED + 1, MISSING]


def test_chunks_with_dictionaries_of_their_own() -> None:
    column = pa.chunked_array([pa.array(["a", "b"]).dictionary_encode(), pa.array(["b", None]).dictionary_encode()])
    assert codes(fit({"x": column}), "x", column) == [RESERVED, RESERVED + 1, RESERVED + 1, MISSING]
    assert codes(fit({"x": column}), "x", pa.chunked_array([], pa.string())) == []


@given(words, words)
def test_storage_of_a_column_does_not_matter(seen: list[str | None], asked: list[str | None]) -> None:
    text = pa.array(seen, pa.string())
    half = len(seen) // 2
    forms = [
        text,
        pa.chunked_array([text[:half], text[half:]], pa.string()),
        text.dictionary_encode(),
        text.cast("large_string"),
    ]
    encoders = [fit({"x": form}) for form in forms]
    assert all(encoder == encoders[0] for encoder in encoders)
    wanted = pa.array(asked, pa.string())
    for form in (wanted, pa.chunked_array([wanted]), wanted.dictionary_encode(), wanted.cast(pa.large_string())):
        assert codes(encoders[0], "x", form) == codes(encoders[0], "x", wanted)


@given(words, numbers)
def test_every_code_is_a_bucket_and_json_keeps_the_encoder(text: list[str | None], values: list[float | None]) -> None:
    encoder = fit({"t": pa.array(text, pa.string()), "x": pa.array(values, pa.float64())})
    assert Encoder.from_json(encoder.to_json()) == encoder
    for name, column in (("t", pa.array(text, pa.string())), ("x", pa.array(values, pa.float64()))):
        field = next(f for f in encoder.fields if f.name == name)
        found = codes(encoder, name, column)
        assert all(0 <= code < field.size and code != UNSEEN for code in found)
        assert len({field.label(code) for code in found}) == len(set(found))


@given(numbers, st.data())
def test_one_row_is_encoded_as_among_many(values: list[float | None], data: st.DataObject) -> None:
    column = pa.array(values, pa.float64())
    encoder = fit({"x": column})
    i = data.draw(st.integers(0, len(values) - 1))
    whole, one = encoder.features({"x": column}), encoder.features({"x": column[i : i + 1]})
    assert (whole.codes[i], whole.values[i]) == (one.codes[0], one.values[0])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(-1e6, 1e6))
def test_a_number_lies_in_the_bin_it_is_given(values: list[float], asked: float) -> None:
    field: Field = fit({"x": pa.array(values)}).fields[0]
    bucket = codes(fit({"x": pa.array(values)}), "x", [asked])[0] - RESERVED
    bounds = [-np.inf, *field.edges, np.inf]
    assert bounds[bucket] <= asked < bounds[bucket + 1]


@given(words, numbers, st.data())
def test_plain_values_are_encoded_as_arrow_columns_are(
    text: list[str | None], values: list[float | None], data: st.DataObject
) -> None:
    encoder = fit({"t": pa.array(text, pa.string()), "x": pa.array(values, pa.float64())})
    asked = data.draw(st.lists(st.tuples(st.none() | st.text("abcd", max_size=2), st.none() | st.floats()), max_size=9))
    columns = {"t": [t for t, _ in asked], "x": [x for _, x in asked]}
    wanted = encoder.features({"t": pa.array(columns["t"], pa.string()), "x": pa.array(columns["x"], pa.float64())})
    found = encoder.encode(columns, len(asked))
    assert found.codes.tolist() == wanted.codes.tolist()
    assert found.values.tolist() == wanted.values.tolist()
    as_text = {"x": [None if x is None else repr(x) for x in columns["x"]]}
    assert encoder.encode(as_text, len(asked)).values.tolist() == found.values.tolist()


@pytest.mark.parametrize("value", [True, False, 7, 7.0, 2.5, 0.1, 1e20, -3, "true", "7", "2.5"])
def test_plain_value_of_another_type_is_the_text_that_arrow_makes_of_it(value: object) -> None:
    encoder = fit({"x": ["true", "false", "7", "2.5", "0.1", "-3", "1e+20"]})
    wanted = encoder.features({"x": pa.array([value])})
    assert encoder.encode({"x": [value]}, 1).codes.tolist() == wanted.codes.tolist() != [[UNSEEN]]


def test_plain_value_that_cannot_be_read_is_one_never_seen() -> None:
    encoder = fit({"city": ["Oslo"], "age": [1.0]})
    odd: list[object] = ["old", "", [1], {"a": 1}, b"1", object()]
    found = encoder.encode({"city": odd, "age": odd}, len(odd))
    assert (found.codes == UNSEEN).all()
    assert (found.values == 0).all()
    huge = encoder.encode({"age": [10**400, 10**300, float("inf"), float("nan")]}, 4)
    assert huge.codes[:, 1].tolist() == [MISSING, RESERVED, MISSING, MISSING]
    assert np.isfinite(huge.values).all()
