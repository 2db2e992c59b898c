"""YAML that people write is read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from kaleidoscope import yaml_text
from kaleidoscope.errors import InputError, TooLargeError
from kaleidoscope.yaml_text import load_yaml, parse_yaml


def test_scalars_keep_their_types_unless_text_is_asked_for() -> None:
    text = "a: 1\nb: no\nc: null\nd: 2024-01-01"
    assert parse_yaml(text, "x", docs="d")["a"] == 1
    assert parse_yaml(text, "x", docs="d", as_text=True) == {"a": "1", "b": "no", "c": None, "d": "2024-01-01"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", r"x, line 4, column 3: .*`c` is given twice.*\(docs/page.md\)"),
        ("a: &big [1]\nb: *big", r"x, line 2.*aliases"),
        ("a: [1", r"x, line \d+"),
        ("!!python/object/apply:os.system ['true']", "x, line 1"),
        ("[" * 5_000, "x"),
    ],
)
@pytest.mark.parametrize("as_text", [False, True])
def test_what_is_wrong_is_named_with_its_place_and_the_remedy(text: str, message: str, as_text: bool) -> None:
    with pytest.raises(InputError, match=message):
        parse_yaml(text, "x", docs="docs/page.md", as_text=as_text)


def test_a_file_that_is_not_there_not_text_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.yaml"
    with pytest.raises(InputError, match="there is no such file"):
        load_yaml(file, docs="d")
    file.write_bytes(b"\xff\xfea")
    with pytest.raises(InputError, match="UTF-8"):
        load_yaml(file, docs="d")
    file.write_bytes(b"\xef\xbb\xbfa: 1")
    assert load_yaml(file, docs="d") == {"a": 1}
    monkeypatch.setattr(yaml_text, "MAX_BYTES", 3)
    with pytest.raises(TooLargeError, match=r"a\.yaml"):
        load_yaml(file, docs="d")
