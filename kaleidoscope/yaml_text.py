"""YAML that people write: read strictly, with errors that name file, line and remedy.

Keys given twice are refused, where YAML itself would keep the last, and so are aliases, with which a small file can be
a huge one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kaleidoscope.errors import InputError, TooLargeError

MAX_BYTES = 4 * 1024 * 1024


class _Strict(yaml.SafeLoader):
    """Safe YAML without aliases and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The node, which is no alias."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (`*name`) are not for this file", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping, each of whose keys is given once."""
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"`{key.value}` is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


class _Texts(_Strict):
    """The same, with scalars as text (a value may be called `no` or `2024`), except null."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [resolver for resolver in resolvers if resolver[0] == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def load_yaml(path: Path, *, docs: str, as_text: bool = False) -> Any:
    """What the YAML file holds; with `as_text` every scalar but null is text.

    Raises InputError naming the file, the line and the page that says what goes there (`docs`), TooLargeError.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TooLargeError(f"{path}: is larger than {MAX_BYTES:,} bytes, which no such file is.")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}). Give a YAML file in UTF-8.") from error
    return parse_yaml(text, str(path), docs=docs, as_text=as_text)


def parse_yaml(text: str, source: str, *, docs: str, as_text: bool = False) -> Any:
    """What the YAML text holds; errors begin with `source`. Otherwise as `load_yaml`."""
    if len(text) > MAX_BYTES:
        raise TooLargeError(f"{source}: is longer than {MAX_BYTES:,} characters, which no such file is.")
    loader: type[yaml.SafeLoader] = _Texts if as_text else _Strict
    try:
        return loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        what = ": ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{source}{where}: is not valid YAML here: {what}. Correct it ({docs}).") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{source}: is not valid YAML: {error}. Write it anew ({docs}).") from None
