"""What a material holds: copy, an image, a layout or a style, with tags; and the placeholders of copy.

Pure values that check themselves: no database, no files. Nothing here is HTML or CSS; a front end draws it.
"""

from __future__ import annotations

import difflib
import hashlib
import html
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from kaleidoscope.errors import InputError
from kaleidoscope.vocabulary import MaterialKind

MAX_SIDE_PX = 10_000
MAX_REGIONS = 50
MAX_DEPTH = 8
TEXT_PARTS = ("title", "subtitle", "button")

# Embeddings, overrides and isolates: one that is left open turns the text around it. The marks (LRM, RLM) may stay.
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_MARKUP = re.compile(r"<[A-Za-z/!?{]")  # where a browser begins a tag, or a value could complete one
_COLOR = re.compile(r"#[0-9a-f]{6}", re.ASCII)
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}", re.ASCII)
_PLACEHOLDER_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8}){0,3}", re.ASCII | re.IGNORECASE)
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)


# ── kinds of text and number ────────────────────────────────────────────────────────────────────────────────────────


def _is_control(character: str) -> bool:
    return character in _BIDI_CONTROLS or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def _plain_text(value: str) -> str:
    for character in value:
        if _is_control(character):
            raise ValueError(f"holds the control character U+{ord(character):04X}; take it out")
    if markup := _MARKUP.search(value):
        raise ValueError(f"holds {markup.group()!r}, which begins HTML; copy is plain text: leave a space after <")
    return unicodedata.normalize("NFC", value)


def _language(value: str) -> str:
    if not _LANGUAGE.fullmatch(value):
        raise ValueError(f"{value!r} is no language tag; write it like en, pt-BR or zh-Hant")
    first, *rest = value.split("-")
    cased = (part.upper() if len(part) == 2 else part.title() if len(part) == 4 else part.lower() for part in rest)
    return "-".join((first.lower(), *cased))


def _color(value: str) -> str:
    if not _COLOR.fullmatch(value.lower()):
        raise ValueError(f"{value!r} is no colour; write it as #rrggbb, such as #1a2b3c")
    return value.lower()


def _shown(value: str) -> str:
    slot, dot, part = value.partition(".")
    if not _NAME.fullmatch(slot) or (dot and part not in TEXT_PARTS):
        raise ValueError(f"{value!r} names no part of a slot; write it like copy.title, copy.button or image")
    return value


def _applies_to(value: str) -> str:
    return _shown(value) if value else value


def _name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"{value!r} is no name; use 1 to 63 lower-case letters, digits, - and _")
    return value


def _placeholder_name(value: str) -> str:
    if not _PLACEHOLDER_NAME.fullmatch(value):
        raise ValueError(f"{value!r} is no placeholder's name; use 1 to 40 lower-case letters, digits and _")
    return value


def _sha256(value: str) -> str:
    if not _HASH.fullmatch(value):
        raise ValueError("is no SHA-256 in 64 lower-case hex digits; upload the image and take the name it gets")
    return value


def _tag_value(value: str) -> str:
    if "|" in value or any(_is_control(character) for character in value):
        raise ValueError(f"{value!r} holds | or a control character, which separate tags; take it out")
    return unicodedata.normalize("NFC", value)


def _number_or_text(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("is neither a colour nor a number")
    return value


_PLAIN = AfterValidator(_plain_text)
Title = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=300), _PLAIN]
ShortText = Annotated[str, StringConstraints(strip_whitespace=True, max_length=100), _PLAIN]
Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=1000), _PLAIN]
Language = Annotated[str, AfterValidator(_language)]
Color = Annotated[str, AfterValidator(_color)]
Shown = Annotated[str, AfterValidator(_shown)]
Name = Annotated[str, AfterValidator(_name)]
Side = Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE_PX)]
Pixels = Annotated[float, Field(strict=True, ge=0, le=MAX_SIDE_PX, allow_inf_nan=False)]
FontSize = Annotated[float, Field(strict=True, ge=4, le=400, allow_inf_nan=False)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Tag(_Model):
    """What a material looks like or means, in the words of the taxonomy; who says so, and how sure a tagger is."""

    dimension: Annotated[str, StringConstraints(min_length=1, max_length=63), AfterValidator(_name)]
    value: Annotated[
        str, StringConstraints(strip_whitespace=True, min_length=1, max_length=100), AfterValidator(_tag_value)
    ]
    source: Literal["hand", "tagger"] = "hand"
    tagger: Annotated[str, StringConstraints(min_length=1, max_length=100), AfterValidator(_tag_value)] | None = None
    confidence: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] | None = None


# ── content ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Copy(_Model):
    """A text in one language. `{name}` is a placeholder, `{{` and `}}` are braces."""

    kind: Literal["copy"] = "copy"
    language: Language = "en"
    title: Title
    subtitle: Text = ""
    button: ShortText = ""

    def texts(self) -> dict[str, str]:
        """The text of each part."""
        return {"title": self.title, "subtitle": self.subtitle, "button": self.button}


class Image(_Model):
    """A picture that `images.store_image` keeps under the SHA-256 of its bytes."""

    kind: Literal["image"] = "image"
    file: Annotated[str, AfterValidator(_sha256)]
    media_type: Literal["image/png", "image/jpeg", "image/webp"]
    width: Side
    height: Side
    alt: Text = ""


class _Region(_Model):
    """A part of a row or a column: `size` px along it, or by `weight` a share of what the sizes leave over."""

    size: Annotated[Pixels, Field(gt=0)] | None = None
    weight: Annotated[float, Field(strict=True, gt=0, le=1000, allow_inf_nan=False)] = 1.0
    padding: Pixels = 0.0
    background: Color | None = None  # None: that of what is around it


class TextRegion(_Region):
    """Where a part of a copy is shown."""

    type: Literal["text"]
    show: Shown  # slot and part, such as copy.title
    font_size: FontSize
    font: Name | None = None  # None: the checks' default font
    line_height: Annotated[float, Field(strict=True, ge=0.8, le=3, allow_inf_nan=False)] = 1.2  # of the font size
    max_lines: Annotated[int, Field(strict=True, ge=1, le=50)] = 1
    color: Color = "#000000"

    @model_validator(mode="after")
    def _names_a_part(self) -> TextRegion:
        if "." not in self.show:
            raise ValueError(f"show: a text region shows a part of {self.show!r}, such as {self.show}.title")
        return self


class ImageRegion(_Region):
    """Where an image is shown: `ratio` (width to height) within ±`tolerance` of it; None: that of the region."""

    type: Literal["image"]
    show: Shown  # the slot
    ratio: Annotated[float, Field(strict=True, ge=0.01, le=100, allow_inf_nan=False)] | None = None
    tolerance: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] = 0.1

    @model_validator(mode="after")
    def _names_a_slot(self) -> ImageRegion:
        if "." in self.show:
            raise ValueError(f"show: an image region shows a slot, such as {self.show.partition('.')[0]}")
        return self


class Stack(_Region):
    """Regions beside (row) or below (column) each other, `gap` px apart."""

    type: Literal["row", "column"]
    gap: Pixels = 0.0
    regions: Annotated[tuple[Region, ...], Field(min_length=1, max_length=MAX_REGIONS)]


Region = Annotated[TextRegion | ImageRegion | Stack, Field(discriminator="type")]


class Layout(_Model):
    """A canvas of `width` × `height` px, divided into rows and columns of regions."""

    kind: Literal["layout"] = "layout"
    width: Side
    height: Side
    background: Color = "#ffffff"
    root: Region

    @model_validator(mode="after")
    def _fits(self) -> Layout:
        boxes = self.boxes()
        if len(boxes) > MAX_REGIONS:
            raise ValueError(f"root: has {len(boxes)} texts and images; {MAX_REGIONS} are allowed")
        return self

    def boxes(self) -> list[Box]:
        """Every text and image region with the room it gets, in reading order; ValueError where there is none."""
        return list(_boxes(self.root, "root", float(self.width), float(self.height), None, 1))


class Box(_Model):
    """A region, the px inside its padding, and the background it stands on; None: the canvas."""

    region: Annotated[TextRegion | ImageRegion, Field(discriminator="type")]
    width: float
    height: float
    background: Color | None


def _boxes(region: Region, path: str, width: float, height: float, background: str | None, depth: int) -> Iterator[Box]:
    if depth > MAX_DEPTH:
        raise ValueError(f"root: nests deeper than {MAX_DEPTH} rows and columns")
    background = region.background or background
    width, height = width - 2 * region.padding, height - 2 * region.padding
    if width <= 0 or height <= 0:
        raise ValueError(f"{path}: no room is left inside it; make it larger or its padding smaller")
    if not isinstance(region, Stack):
        yield Box.model_construct(region=region, width=width, height=height, background=background)
        return
    length = width if region.type == "row" else height
    left = length - region.gap * (len(region.regions) - 1) - sum(inner.size or 0.0 for inner in region.regions)
    weights = sum(inner.weight for inner in region.regions if inner.size is None)
    if left < 0:
        raise ValueError(f"{path}: its regions and gaps need {length - left:g} px, and it has {length:g}")
    for number, inner in enumerate(region.regions):
        share = inner.size if inner.size is not None else left * inner.weight / weights
        inside = (share, height) if region.type == "row" else (width, share)
        yield from _boxes(inner, f"{path}.regions[{number}]", *inside, background, depth + 1)


class Style(_Model):
    """One property that overrides the layout: of a part (`copy.button`), or of every text.

    A background that applies to no part is the canvas; regions with a background of their own keep it.
    """

    kind: Literal["style"] = "style"
    property: Literal["color", "background", "border_color", "font_size", "corner_radius"]
    value: Annotated[str | float, BeforeValidator(_number_or_text)]
    applies_to: Annotated[str, AfterValidator(_applies_to)] = ""

    @model_validator(mode="before")
    @classmethod
    def _value_suits_property(cls, raw: Any) -> Any:
        adapter = _STYLE_VALUES.get(str(raw.get("property"))) if isinstance(raw, Mapping) else None
        if adapter is None or "value" not in raw:
            return raw
        try:
            return {**raw, "value": adapter.validate_python(raw["value"])}
        except ValidationError as error:
            raise ValueError(f"value {_words(error.errors()[0])}") from None


_STYLE_VALUES: dict[str, TypeAdapter[Any]] = {
    "color": TypeAdapter(Color),
    "background": TypeAdapter(Color),
    "border_color": TypeAdapter(Color),
    "font_size": TypeAdapter(FontSize),
    "corner_radius": TypeAdapter(Pixels),
}

Content = Annotated[Copy | Image | Layout | Style, Field(discriminator="kind")]
_CONTENT: TypeAdapter[Content] = TypeAdapter(Content)


def parse_content(raw: Mapping[str, Any]) -> Content:
    """The content that a mapping from JSON or a form describes; raises InputError naming the fields."""
    if not isinstance(raw, Mapping):
        raise InputError("content: give an object with `kind` and the fields of that kind.")
    try:
        return _CONTENT.validate_python(dict(raw))
    except ValidationError as error:
        raise InputError(explain("content", error)) from None


def content_hash(content: Content) -> str:
    """SHA-256, in hex, of the content: the same for the same content on any machine and in any later version."""
    # Fields that stand at their default are left out, so that a field added later leaves old hashes as they are.
    document = {"kind": content.kind, **content.model_dump(mode="json", exclude_defaults=True)}
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def parse_tags(raw: Iterable[Mapping[str, Any]]) -> tuple[Tag, ...]:
    """The tags that mappings describe; raises InputError naming the fields."""
    try:
        return _TAGS.validate_python(tuple(raw))
    except ValidationError as error:
        raise InputError(explain("tags", error)) from None


_TAGS: TypeAdapter[tuple[Tag, ...]] = TypeAdapter(tuple[Tag, ...])


# ── placeholders ────────────────────────────────────────────────────────────────────────────────────────────────────


class Placeholder(_Model):
    """A name that copy may hold in braces, where its value comes from, and what stands there without one."""

    name: Annotated[str, AfterValidator(_placeholder_name)]
    source: Literal["request", "product"]
    max_length: Annotated[int, Field(strict=True, ge=1, le=300)]  # characters of a value
    fallback: Annotated[dict[Language, ShortText], Field(min_length=1)]
    feature: bool = False  # whether what a request sends for it is also a feature of the user; a name should not be
    description: Text = ""

    def fallback_in(self, language: str) -> str:
        """The fallback for a language: its own, that of the language without region, or the first by name."""
        for wanted in (language, language.partition("-")[0], "en"):
            if wanted in self.fallback:
                return self.fallback[wanted]
        return self.fallback[min(self.fallback)]

    def fills(self, product: Mapping[str, object]) -> list[Any]:
        """What a reviewer can know of what will stand there, as JSON: the definition, and the product's value.

        Two lists are equal where copy with this placeholder shows the same to every request.
        """
        value = _value_text(product.get(self.name)) if self.source == "product" else ""
        return [self.name, self.source, self.max_length, dict(sorted(self.fallback.items())), value]


DEFAULT_PLACEHOLDERS = (
    Placeholder(
        name="yield",
        source="product",
        max_length=8,
        fallback={"en": "attractive", "zh": "可观"},
        description="Yield of the product, such as 3.85%",
    ),
    Placeholder(
        name="buyers",
        source="product",
        max_length=12,
        fallback={"en": "many", "zh": "众多"},
        description="How many people bought it",
    ),
    Placeholder(
        name="price",
        source="product",
        max_length=12,
        fallback={"en": "a good price", "zh": "优惠价"},
        description="Price with its currency",
    ),
    Placeholder(
        name="product_name",
        source="product",
        max_length=40,
        fallback={"en": "this product", "zh": "本产品"},
        description="Name of the product",
    ),
    Placeholder(
        name="first_name",
        source="request",
        max_length=20,
        fallback={"en": "there", "zh": "您"},
        description="First name of the user, where the page may use it",
    ),
    Placeholder(
        name="city",
        source="request",
        max_length=30,
        fallback={"en": "your city", "zh": "您的城市"},
        feature=True,
        description="Where the user is",
    ),
)

_PLACEHOLDERS: TypeAdapter[tuple[Placeholder, ...]] = TypeAdapter(tuple[Placeholder, ...])


def parse_placeholders(raw: Iterable[Mapping[str, Any]]) -> tuple[Placeholder, ...]:
    """The placeholders that mappings describe; raises InputError naming the fields, or a name given twice."""
    try:
        placeholders = _PLACEHOLDERS.validate_python(tuple(raw))
    except ValidationError as error:
        raise InputError(explain("placeholders", error)) from None
    names = [placeholder.name for placeholder in placeholders]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"placeholders: {', '.join(twice)} is there more than once; keep one.")
    return placeholders


def placeholders_in(copy: Copy) -> set[str]:
    """The names in braces in a copy; raises InputError where braces do not pair."""
    return {name for part, text in copy.texts().items() for _, name in segments(part, text) if name is not None}


def check_placeholders(copy: Copy, known: Iterable[Placeholder]) -> None:
    """Raise InputError where a copy holds a placeholder that is not known, or braces that do not pair."""
    names = sorted(placeholder.name for placeholder in known)
    unknown = sorted(placeholders_in(copy) - set(names))
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, 1, 0.5)
        meant = f" Did you mean {{{near[0]}}}?" if near else ""
        listed = ", ".join(f"{{{name}}}" for name in names) or "none"
        raise InputError(
            f"copy: there is no placeholder {', '.join(f'{{{name}}}' for name in unknown)}.{meant}"
            f" This business has: {listed}. For a brace as such write {{{{ or }}}}."
        )


def segments(part: str, text: str) -> list[tuple[str, str | None]]:
    """A text as literals (braces undoubled), each with the name of the placeholder after it.

    >>> segments("title", "{{new}} for {first_name}!")
    [('{new} for ', 'first_name'), ('!', None)]
    """
    found: list[tuple[str, str | None]] = []
    literal, at = "", 0
    for match in re.finditer(r"\{\{|\}\}|\{([^{}]*)\}|[{}]", text):
        literal += text[at : match.start()]
        at = match.end()
        token = match.group()
        if token in ("{{", "}}"):
            literal += token[0]
        elif len(token) == 1:
            raise InputError(
                f"copy.{part}: the {token} at character {match.start() + 1} has no partner. Placeholders look like"
                " {name}; for a brace as such write {{ or }}."
            )
        elif not _PLACEHOLDER_NAME.fullmatch(match.group(1)):
            raise InputError(
                f"copy.{part}: {token} at character {match.start() + 1} is no placeholder. Its name is made of"
                " lower-case letters, digits and _; for a brace as such write {{ or }}."
            )
        else:
            found.append((literal, match.group(1)))
            literal = ""
    literal += text[at:]
    return [*found, (literal, None)] if literal or not found else found


def values_from(
    placeholders: Iterable[Placeholder], *, request: Mapping[str, object], product: Mapping[str, object]
) -> dict[str, object]:
    """The value of each placeholder from its own source alone: a request cannot set what the product says."""
    sources = {"request": request, "product": product}
    return {p.name: sources[p.source][p.name] for p in placeholders if p.name in sources[p.source]}


def fill(copy: Copy, values: Mapping[str, object], placeholders: Sequence[Placeholder]) -> Copy:
    """The copy as it is shown: values in the place of placeholders, doubled braces single.

    A value is text or a number. It loses control characters and is escaped for HTML, braces too, so that it brings
    neither markup nor a placeholder with it; one that is missing, empty or longer than `max_length` gives way to the
    fallback in the copy's language. Raises InputError for a placeholder that is not in `placeholders`.
    """
    by_name = {placeholder.name: placeholder for placeholder in placeholders}
    check_placeholders(copy, placeholders)

    def shown(name: str) -> str:
        placeholder = by_name[name]
        text = _value_text(values.get(name))
        if not text or len(text) > placeholder.max_length:
            text = placeholder.fallback_in(copy.language)
        return html.escape(text).replace("{", "&#123;").replace("}", "&#125;")

    filled = {
        part: "".join(literal + (shown(name) if name else "") for literal, name in segments(part, text))
        for part, text in copy.texts().items()
    }
    return copy.model_copy(update=filled)


def _value_text(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if not isinstance(value, str) and not abs(value) < 1e15:  # also NaN and infinity
        return ""
    # No placeholder takes more than 300 characters: the rest of a huge value is not worth looking at.
    return "".join(character for character in str(value)[:1000] if not _is_control(character)).strip()


# ── errors in our words ─────────────────────────────────────────────────────────────────────────────────────────────


def explain(what: str, error: ValidationError) -> str:
    """A sentence for every field that a model refused, in the words of this house. Also for other documents."""
    problems = error.errors()
    # A list whose entries are all refused is also said to be empty.
    refused = {problem["loc"][:n] for problem in problems[:100] for n in range(len(problem["loc"]))}
    told = [p for p in problems if p["type"] != "too_short" or p["loc"] not in refused]
    return " ".join(f"{_short(_where(what, p['loc']))}: {_short(_words(p))}." for p in told[:10])


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:150]} … {text[-40:]}"


def _where(what: str, location: tuple[int | str, ...]) -> str:
    path = what
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif step not in _UNION_STEPS:
            path += f".{step}"
    return path


# What pydantic puts into a location that is no field: tags of unions, and names of their members.
_UNION_STEPS = frozenset({*MaterialKind, "text", "row", "column", "str", "float", "[key]"})


def _words(problem: Any) -> str:
    context = problem.get("ctx", {})
    match problem["type"]:
        case "missing":
            return "is missing; give it"
        case "extra_forbidden":
            return "there is no such field; take it out"
        case "value_error":
            return str(context["error"])
        case "string_too_long" | "too_long":
            noun = "characters" if problem["type"].startswith("string") else "entries"
            return f"is longer than {context['max_length']} {noun}; shorten it"
        case "string_too_short" | "too_short":
            return "is empty; fill it in"
        case "string_type" | "string_sub_type" | "string_unicode":
            return "is not text; give text"
        case "literal_error":
            return f"is not one of {context['expected'].replace(chr(39), '')}"
        case "union_tag_invalid":
            field = context["discriminator"].replace("'", "")
            return f"{field} {context['tag']!r} is not one of {context['expected_tags'].replace(chr(39), '')}"
        case "union_tag_not_found":
            return f"has no {context['discriminator'].replace(chr(39), '')}; give it"
        case "greater_than_equal":
            return f"is less than {context['ge']:g}"
        case "greater_than":
            return f"is not greater than {context['gt']:g}"
        case "less_than_equal":
            return f"is more than {context['le']:g}"
        case "finite_number" | "float_type" | "int_type" | "int_from_float" | "float_parsing" | "int_parsing":
            return "is not a number that can stand here; give one without quotes"
        case "recursion_loop":
            return "nests too deeply"
        case "model_type" | "model_attributes_type" | "dict_type" | "mapping_type":
            return "is not an object with fields"
        case "tuple_type" | "list_type":
            return "is not a list"
        case _:
            return "cannot be this; see docs/materials.md"
