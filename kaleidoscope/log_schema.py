"""The schema of an impression log: which column plays which role, read from YAML, with everything wrong with it named.

The log itself is `log.py`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kaleidoscope.errors import SchemaError

SHOWN_CHARACTERS = 80  # of what a schema holds in place of what it should


def _as_tuple(value: object) -> object:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


Column = Annotated[str, Field(min_length=1)]
Columns = Annotated[tuple[Column, ...], BeforeValidator(_as_tuple)]


class LogSchema(BaseModel):
    """Which column of the log plays which role; docs/log-contract.md explains every key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scene: Annotated[str, Field(min_length=1)] = "scene"
    label: Column | None = None
    clicks: Column | None = None
    impressions: Column | None = None
    unit: Columns = ()
    group: Column | None = None
    context: Columns = ()
    user: Columns = ()
    variant: Annotated[Columns, Field(min_length=1)]
    variant_id: Column | None = None
    propensity: Column | None = None
    arms: Literal["uniform"] | dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None = None
    time: Column | None = None
    bucket: Column | None = None
    product: Column | None = None
    weight: Column | None = None

    @model_validator(mode="after")
    def _roles_fit(self) -> LogSchema:
        problems = []
        if self.label is not None and (self.clicks is not None or self.impressions is not None):
            problems.append("give either `label`, or `clicks` and `impressions`, not both")
        elif self.label is None and (self.clicks is None or self.impressions is None):
            problems.append("give `label` (a 0/1 column), or both `clicks` and `impressions` (aggregated rows)")
        if isinstance(self.arms, dict) and not 0 < sum(self.arms.values()) < float("inf"):
            problems.append("`arms` must give at least one share above 0, or be `uniform` or null")
        outcome = ("label", "clicks", "impressions", "propensity", "weight")
        features = ("user", "context", "variant")
        exclusive = [(a, b) for i, a in enumerate(features) for b in features[i + 1 :]]
        exclusive += [(a, b) for a in (*outcome, "bucket") for b in features]
        exclusive += [(a, b) for a in ("variant_id", "group") for b in ("user", "context")]
        exclusive += [(a, b) for a in outcome for b in ("unit", "group", "variant_id", "product", "time", "bucket")]
        exclusive += [(a, b) for i, a in enumerate(outcome) for b in outcome[i + 1 :]]
        for a, b in exclusive:
            problems += [f"column {c!r} cannot be both `{a}` and `{b}`" for c in self.role(a) if c in self.role(b)]
        for key in (*features, "unit"):
            repeated = sorted({c for c in self.role(key) if self.role(key).count(c) > 1})
            problems += [f"`{key}` names column {c!r} twice" for c in repeated]
        if problems:
            raise ValueError("\n".join(dict.fromkeys(problems)))
        return self

    def role(self, key: str) -> tuple[str, ...]:
        """The columns under a key of the schema, as a tuple whatever the key's own shape."""
        value = getattr(self, key)
        return value if isinstance(value, tuple) else () if value is None else (value,)

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column the schema names, each once."""
        keys = [k for k in type(self).model_fields if k not in ("scene", "arms")]
        return tuple(dict.fromkeys(c for k in keys for c in self.role(k)))


KEYS = tuple(LogSchema.model_fields)
_TAKES = {
    **dict.fromkeys(KEYS, "the name of one column"),
    **dict.fromkeys(("unit", "context", "user"), "the name of a column, or a list of them"),
    "variant": "the name of a column, or a list of at least one",
    "scene": "a name",
    "arms": "`uniform`, or a mapping from each arm to its share",
}
_UNKNOWN = "?"  # stands in for what is wrong with a key, so that the other keys can be judged


def read_schema(path: Path | str) -> LogSchema:
    """The log schema in a YAML file; raises SchemaError naming everything that is wrong with it."""
    raw, problems = _read_yaml(Path(path))
    for key in [k for k in raw if k not in KEYS]:
        nearest = difflib.get_close_matches(key.lower(), KEYS, n=1, cutoff=0.4) if isinstance(key, str) else []
        hint = f" Did you mean `{nearest[0]}`?" if nearest else ""
        problems.append(f"unknown key `{'null' if key is None else key}`.{hint} Valid keys: {', '.join(KEYS)}.")
        raw.pop(key)
        if nearest:
            raw.setdefault(nearest[0], _UNKNOWN)  # a misspelt key is one problem, not also a missing one
    found = _validated(raw, problems)
    if found is None or problems:
        raise SchemaError("\n".join(f"{path}: {p}" for p in problems))
    return found


class _Loader(yaml.SafeLoader):
    """YAML whose scalars are text (a column may be called `no` or `2024`), except null; remembers repeated keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [resolver for resolver in resolvers if resolver[0] == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; repeated keys are noted, where YAML itself would keep the last one and say nothing."""
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in first:
                lines = f"on lines {first[name]} and {line}" if first[name] != line else f"on line {line}"
                self.repeated.append(f"key `{key.value}` is given twice, {lines}. Keep one of them.")
            first.setdefault(name, line)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """The mapping in the file, and its repeated keys as problems."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        raw = loader.get_single_data()
    except FileNotFoundError:
        raise SchemaError(f"{path}: there is no such file. Write the schema there (docs/log-contract.md).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SchemaError(
            f"{path}: cannot be read as UTF-8 text ({error}). Save it as text in UTF-8 (docs/log-contract.md)."
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        what = ": ".join(part for part in (error.context, error.problem) if part)
        raise SchemaError(
            f"{path}{where}: is not valid YAML: {what}. Correct it there; names with `:`, `#` or brackets need quotes."
        ) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        what = " ".join(str(error).split())
        raise SchemaError(f"{path}: is not valid YAML: {what}. Write it anew (docs/log-contract.md).") from error
    if not isinstance(raw, dict):
        raise SchemaError(f"{path}: a schema is a mapping of keys like `label:` and `variant:` (docs/log-contract.md).")
    return raw, loader.repeated


def _validated(raw: dict[str, Any], problems: list[str]) -> LogSchema | None:
    """The schema, or None; what is wrong goes into `problems`: each key by itself, then how they fit."""
    for _ in range(2):
        try:
            return LogSchema.model_validate(raw)
        except ValidationError as error:
            wrong = {str(item["loc"][0]): item for item in error.errors() if item["loc"]}
            if not wrong:
                fits = str(error.errors()[0]["msg"]).removeprefix("Value error, ").splitlines()
                problems += [f"{problem}." for problem in fits if repr(_UNKNOWN) not in problem]
                return None
            for key in wrong:
                problems.append(_wrong_value(key, raw))
                raw[key] = None if key == "arms" else _UNKNOWN
    return None


def _wrong_value(key: str, raw: dict[str, Any]) -> str:
    """What a key takes, and what it was given instead."""
    if key not in raw:
        return f"`{key}` is missing: it takes {_TAKES[key]}."
    value = raw[key]
    if key == "arms" and isinstance(value, dict) and value:
        wrong = {arm: share for arm, share in value.items() if not _is_share(arm, share)}
        return f"`arms`: a share is a number from 0 up for a named arm, not {_as_yaml(wrong)}."
    return f"`{key}` takes {_TAKES[key]}, not {_as_yaml(value)}."


def _is_share(arm: object, share: object) -> bool:
    try:
        return isinstance(arm, str) and isinstance(share, str | int | float) and 0 <= float(share) < float("inf")
    except ValueError:
        return False


def _as_yaml(value: object) -> str:
    """The value as the schema has it, on one line, shortened."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000)
    text = " ".join(text.removesuffix("...\n").split())
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
