"""The schema of a log: what it takes, and that everything wrong with it is named in our own words."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaleidoscope.errors import SchemaError
from kaleidoscope.log_schema import read_schema


def test_reads_the_schema_of_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text(
        "scene: coupon\nlabel: Y\nunit: [a, no]\ngroup: null\ncontext: [destination]\nuser: []\nvariant: [coupon]\n"
        "propensity: ~\narms: {on: 0.5, 1: .5}\n"
    )
    schema = read_schema(path)
    assert schema.label == "Y" and schema.unit == ("a", "no") and schema.group is None and schema.user == ()
    assert schema.arms == {"on": 0.5, "1": 0.5}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("label: y\nvariant: [a]\nlabl: y\n", "unknown key `labl`. Did you mean `label`?"),
        ("label: y\nvarient: [a]\n", "Did you mean `variant`?"),
        ("label: y\nclicks: c\nimpressions: i\nvariant: [a]\n", "not both"),
        ("clicks: c\nvariant: [a]\n", "both `clicks` and `impressions`"),
        ("label: y\n", "`variant`"),
        ("label: y\nvariant: []\n", "`variant`"),
        ("label: y\nvariant: {a: b}\n", "`variant`"),
        ("label: [y, z]\nvariant: [a]\n", "`label`"),
        ("label: y\nvariant: [a]\nuser: [a]\n", "column 'a' cannot be both `user` and `variant`"),
        ("label: y\nvariant: [a]\nuser: [y]\n", "column 'y' cannot be both `label` and `user`"),
        ("label: y\nvariant: [a, a]\n", "names column 'a' twice"),
        ("label: y\nvariant: [a]\narms: equal\n", "`arms`"),
        ("label: y\nvariant: [a]\narms: {x: -1}\n", "`arms"),
        ("label: y\nvariant: [a\n", "not valid YAML"),
        ("- label\n", "a schema is a mapping"),
        ("", "a schema is a mapping"),
    ],
)
def test_a_wrong_schema_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text(text)
    with pytest.raises(SchemaError) as error:
        read_schema(path)
    assert says in error.value.message and str(path) in error.value.message


def test_a_misspelt_key_is_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "schema.yaml"
    path.write_text("label: y\nvarient: [a]\n")
    with pytest.raises(SchemaError) as error:
        read_schema(path)
    assert len(error.value.message.splitlines()) == 1


def test_schema_file_that_is_missing_or_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="no such file"):
        read_schema(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("scene: caf\xe9\n".encode("latin-1"))
    with pytest.raises(SchemaError, match="UTF-8"):
        read_schema(tmp_path / "latin.yaml")


def problems(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "schema.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SchemaError) as error:
        read_schema(path)
    lines = error.value.message.splitlines()
    assert all(line.startswith(str(path)) for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("label: y\nvariant: [a]\nlabel: z\n", "key `label` is given twice, on lines 1 and 3. Keep one of them."),
        ("label: y\nvariant: [a]\n'label': z\n", "key `label` is given twice, on lines 1 and 3. Keep one of them."),
        ("label: y\nvariant: [a]\narms: {x: 1, x: 2}\n", "key `x` is given twice, on line 3. Keep one of them."),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str, says: str) -> None:
    assert problems(tmp_path, text) == [says]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("label: [a]\nvariant: [t]\n", "`label` takes the name of one column, not [a]."),
        ("label: ''\nvariant: [t]\n", "`label` takes the name of one column, not ''."),
        ("label: y\nvariant: [t]\nuser: {a: b}\n", "`user` takes the name of a column, or a list of them, not {a: b}."),
        ("label: y\nvariant: [t]\nuser: [~]\n", "`user` takes the name of a column, or a list of them, not [null]."),
        ("label: y\nvariant: [t]\nuser: [[a]]\n", "`user` takes the name of a column, or a list of them, not [[a]]."),
        ("label: y\nvariant: []\n", "`variant` takes the name of a column, or a list of at least one, not []."),
        ("label: y\nvariant:\n", "`variant` takes the name of a column, or a list of at least one, not null."),
        ("label: y\n", "`variant` is missing: it takes the name of a column, or a list of at least one."),
        ("label: !!int 3\nvariant: [t]\n", "`label` takes the name of one column, not 3."),
        ("scene: [s]\nlabel: y\nvariant: [t]\n", "`scene` takes a name, not [s]."),
        (
            "label: y\nvariant: [t]\narms: [1, 2]\n",
            "`arms` takes `uniform`, or a mapping from each arm to its share, not ['1', '2'].",
        ),
        (
            "label: y\nvariant: [t]\narms: {a: .5, b: half, c: -1, d: .nan}\n",
            "`arms`: a share is a number from 0 up for a named arm, not {b: half, c: '-1', d: '.nan'}.",
        ),
        ("label: y\nvariant: [t]\narms: {}\n", "`arms` must give at least one share above 0, or be `uniform` or null."),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_named_in_our_own_words(tmp_path: Path, text: str, says: str) -> None:
    assert problems(tmp_path, text) == [says]


def test_everything_wrong_with_a_schema_is_one_error(tmp_path: Path) -> None:
    found = problems(tmp_path, "label: [y]\nlabel: [y]\nvarient: t\nuser: {a: b}\narms: 3\nunit: [u, u]\nclicks: c\n")
    assert len(found) == 7
    for key in (
        "`label` is given twice",
        "`varient`",
        "`label` takes",
        "`user` takes",
        "`arms` takes",
        "twice",
        "both",
    ):
        assert any(key in line for line in found), key


def test_a_number_is_the_name_of_a_column(tmp_path: Path) -> None:
    (tmp_path / "schema.yaml").write_text("\ufefflabel: 1\nvariant: 3\n", encoding="utf-8")
    assert read_schema(tmp_path / "schema.yaml").variant == ("3",)


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "schema.yaml"
    for text, where in [("label: y\nvariant: [a\nuser: b\n", "line 3"), ("label: y\n\tvariant: t\n", "line 2")]:
        path.write_text(text)
        with pytest.raises(SchemaError, match=rf"{where}, column \d+: is not valid YAML: "):
            read_schema(path)


@pytest.mark.parametrize("role", ["time", "product", "bucket", "unit"])
def test_the_outcome_plays_no_other_role(tmp_path: Path, role: str) -> None:
    found = problems(tmp_path, f"label: y\nvariant: [t]\n{role}: y\n")
    assert found == [f"column 'y' cannot be both `label` and `{role}`."]
