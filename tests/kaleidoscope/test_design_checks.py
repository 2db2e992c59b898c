from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kaleidoscope.content import Content, Copy, Image, Layout, Placeholder, Style, parse_content
from kaleidoscope.design_checks import (
    CONTRAST,
    IMAGE_RATIO,
    TEXT_FITS,
    Ruler,
    check_variant,
    combination_failures,
    contrast,
    default_ruler,
    luminance,
    pair_failures,
)
from kaleidoscope.errors import InputError, TooComplexError

NAME = Placeholder(name="first_name", source="request", max_length=20, fallback={"en": "there"})


def text(show: str = "copy.title", size: float = 20, **more: Any) -> dict[str, Any]:
    return {"type": "text", "show": show, "font_size": size, **more}


def layout(*regions: dict[str, Any], width: int = 300, height: int = 100, background: str = "#ffffff") -> Layout:
    root = {"type": "column", "regions": regions}
    made = parse_content({"kind": "layout", "width": width, "height": height, "background": background, "root": root})
    assert isinstance(made, Layout)
    return made


def picture(width: int, height: int) -> Image:
    return Image(file="0" * 64, media_type="image/png", width=width, height=height)


def style(name: Any, value: str | float, applies_to: str = "") -> Style:
    return Style(property=name, value=value, applies_to=applies_to)


def failed(**materials: Content) -> list[str]:
    return [failure.check for failure in check_variant(materials, [NAME])]


def pairs(slots: dict[str, dict[str, Content]]) -> set[tuple[str, str, str]]:
    found = pair_failures({slot: list(options.items()) for slot, options in slots.items()}, [NAME])
    return {(f.check, *sorted(("/".join(f.left), "/".join(f.right)))) for f in found}


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_measures_with_the_real_font() -> None:
    # Advance widths of DejaVu Sans, in 2048ths of an em: i 569, W 2025.
    assert default_ruler().width("i") == pytest.approx(569 / 2048, abs=0.002)
    assert default_ruler().width("W") == pytest.approx(2025 / 2048, abs=0.002)


@pytest.mark.parametrize(
    ("letters", "width"), [("国", 1), ("国国国", 3), ("👍", 1), ("e\u0301", default_ruler().width("é")), ("\u200d", 0)]
)
def test_characters_that_the_font_lacks_are_one_em_and_marks_nothing(letters: str, width: float) -> None:
    assert default_ruler().width(letters) == pytest.approx(width, abs=0.01)


def test_lines_break_between_words_and_within_cjk() -> None:
    ruler = default_ruler()
    assert ruler.lines("one two", 10) == 1
    assert ruler.lines("one two", 2.5) == 2
    assert ruler.lines("one two", 0.5) is None
    assert ruler.lines("这是一个很长的标题", 3) == 3
    assert ruler.words("买ok了，hi you") == ["买", "ok", "了，", "hi", "you"]
    assert ruler.words("สวัสดี") != ["สวัสดี"]
    assert ruler.lines("", 5) == 1


def test_right_to_left_text_is_measured() -> None:
    assert 2 < default_ruler().width("שלום") < 3
    assert 1 < default_ruler().width("مرحبا") < 4


def test_text_that_takes_more_lines_than_there_is_room_for_fails() -> None:
    two_lines = layout(text(max_lines=2))
    assert failed(copy=Copy(title="Save with every order you place"), layout=two_lines) == []
    long = Copy(title="Save with every single order you place today and get something back")
    (failure,) = check_variant({"copy": long, "layout": two_lines})
    assert (failure.check, failure.slots) == ("text_fits", ("copy", "layout"))
    assert failure.message == "copy in layout: the title takes 3 lines at 20 px; copy.title has room for 2."


def test_lines_that_the_height_has_no_room_for_do_not_count() -> None:
    copy = Copy(title="Save with every order you place")
    assert failed(copy=copy, layout=layout(text(max_lines=2, size=30, background="#ffffff"), height=40)) == [
        "text_fits"
    ]
    (failure,) = check_variant({"copy": Copy(title="a"), "layout": layout(text(size=100), height=50)})
    assert "needs 120 px for a line, and copy.title is 50 px high" in failure.message


def test_a_word_wider_than_its_region_fails_and_is_named() -> None:
    (failure,) = check_variant({"copy": Copy(title="a " + "Donaudampfschiff" * 3), "layout": layout(text())})
    assert "holds 'Donaudampf" in failure.message and "copy.title is 300 px wide" in failure.message


def test_every_part_is_measured_in_its_own_region() -> None:
    copy = Copy(title="a", subtitle="b", button="Order this wonderful product right now")
    narrow = layout(text(), text("copy.subtitle"), text("copy.button"))
    (failure,) = check_variant({"copy": copy, "layout": narrow})
    assert "the button takes 2 lines" in failure.message


def test_a_part_that_is_empty_or_not_shown_cannot_fail() -> None:
    assert failed(copy=Copy(title="a" * 300), layout=layout(text("copy.button"))) == []


def test_placeholders_are_measured_as_long_as_they_may_get() -> None:
    narrow = layout(text(), width=200)
    assert failed(copy=Copy(title="Hi there"), layout=narrow) == []
    assert failed(copy=Copy(title="Hi {first_name}"), layout=narrow) == ["text_fits"]
    short = Placeholder(name="first_name", source="request", max_length=1, fallback={"en": "whoever you may be"})
    assert len(check_variant({"copy": Copy(title="Hi {first_name}"), "layout": narrow}, [short])) == 1


def test_doubled_braces_are_measured_as_one() -> None:
    one_em = default_ruler().width("{}") * 20
    fits = layout(text(), width=int(one_em) + 1)
    assert failed(copy=Copy(title="{{}}"), layout=fits) == []


def test_copy_with_broken_braces_is_measured_as_it_stands() -> None:
    assert failed(copy=Copy(title="a { b"), layout=layout(text())) == []


def test_a_style_changes_the_size_that_is_measured() -> None:
    copy = Copy(title="Save with every order")
    assert failed(copy=copy, layout=layout(text()), size=style("font_size", 40)) == ["text_fits"]
    assert failed(copy=copy, layout=layout(text(size=40)), size=style("font_size", 12, "copy.title")) == []
    assert failed(copy=copy, layout=layout(text()), size=style("font_size", 40, "copy.button")) == []


def test_another_font_can_be_given(tmp_path: Path) -> None:
    wide = next(Path(str(default_ruler()._fonts[None].path)).parent.glob("DejaVuSans-Bold.ttf"))
    assert Ruler(wide).width("Save") > default_ruler().width("Save")
    named = Ruler(fonts={"bold": wide})
    assert named.width("Save", "bold") > named.width("Save", "unheard-of") == named.width("Save")
    broken = tmp_path / "font.ttf"
    broken.write_bytes(b"no font")
    with pytest.raises(InputError, match=r"font\.ttf: cannot be read as a font"):
        Ruler(broken)


# ── images ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size", "checks"),
    [((300, 100), []), ((310, 100), []), ((400, 100), ["image_ratio"]), ((100, 100), ["image_ratio"])],
)
def test_an_image_has_to_be_shaped_like_its_region(size: tuple[int, int], checks: list[str]) -> None:
    assert failed(image=picture(*size), layout=layout({"type": "image", "show": "image"})) == checks


def test_a_region_may_say_what_shape_it_takes() -> None:
    square = layout({"type": "image", "show": "image", "ratio": 1, "tolerance": 0.5})
    assert failed(image=picture(140, 100), layout=square) == []
    assert failed(image=picture(100, 160), layout=square) == ["image_ratio"]


def test_an_image_region_of_another_slot_is_none_of_its_business() -> None:
    assert failed(image=picture(1, 100), layout=layout({"type": "image", "show": "badge"})) == []


# ── contrast ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_contrast_is_that_of_wcag() -> None:
    assert luminance("#000000") == 0
    assert luminance("#ffffff") == pytest.approx(1)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=0.001)  # the grey that just fails
    assert contrast("#767676", "#ffffff") == pytest.approx(4.542, abs=0.001)  # and the one that just passes
    assert contrast("#ff0000", "#ffffff") == contrast("#ffffff", "#ff0000") == pytest.approx(3.998, abs=0.001)


@pytest.mark.parametrize(
    ("color", "size", "checks"),
    [("#767676", 14, []), ("#777777", 14, ["contrast"]), ("#777777", 24, []), ("#aaaaaa", 24, ["contrast"])],
)
def test_text_has_to_stand_out_large_text_less(color: str, size: float, checks: list[str]) -> None:
    assert failed(copy=Copy(title="a"), layout=layout(text(size=size, color=color))) == checks


def test_text_stands_on_the_nearest_background() -> None:
    blue = {"type": "row", "background": "#0044cc", "regions": [text("copy.button", color="#0044cc")]}
    copy = Copy(title="a", button="b")
    (failure,) = check_variant({"copy": copy, "layout": layout(text(), blue)})
    assert "the text of copy.button is #0044cc on #0044cc, a contrast of 1.00; 4.5 is the least" in failure.message
    assert failed(copy=copy, layout=layout(text(color="#ffffff"), background="#000000")) == []


def test_styles_override_colours() -> None:
    copy, plain = (
        Copy(title="a", button="b"),
        layout(text(), text("copy.button", background="#0044cc", color="#ffffff")),
    )
    assert failed(copy=copy, layout=plain) == []
    assert failed(copy=copy, layout=plain, look=style("color", "#ffffff", "copy.title")) == ["contrast"]
    assert failed(copy=copy, layout=plain, look=style("background", "#ffffff", "copy.button")) == ["contrast"]
    dark = {"look": style("color", "#ffffff"), "ground": style("background", "#000000")}
    assert failed(copy=copy, layout=plain, **dark) == []  # the canvas; the button keeps its own background


def test_the_style_of_a_part_wins_over_that_of_all_and_the_later_slot_over_the_earlier() -> None:
    copy, plain = Copy(title="a"), layout(text())
    bad, good = style("color", "#ffffff"), style("color", "#000000")
    of_title = style("color", "#000000", "copy.title")
    assert failed(copy=copy, layout=plain, a=bad, b=good) == []
    assert failed(copy=copy, layout=plain, a=good, b=bad) == ["contrast"]
    assert failed(copy=copy, layout=plain, a=of_title, b=bad) == []


# ── pairs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_the_pairs_that_do_not_go_together() -> None:
    slots: dict[str, dict[str, Content]] = {
        "copy": {"short": Copy(title="Save"), "long": Copy(title="Save with every single order you place")},
        "image": {"wide": picture(300, 50), "square": picture(50, 50)},
        "layout": {
            "one": layout(text(), {"type": "image", "show": "image"}),
            "two": layout(text(max_lines=2), {"type": "image", "show": "image", "ratio": 1}, height=200),
        },
    }
    assert pairs(slots) == {
        ("text_fits", "copy/long", "layout/one"),
        ("image_ratio", "image/square", "layout/one"),
        ("image_ratio", "image/wide", "layout/two"),
    }


def test_a_pair_fails_for_every_variant_that_holds_it_and_nothing_else_does() -> None:
    slots: dict[str, dict[str, Content]] = {
        "copy": {"c1": Copy(title="Save now", button="Go"), "c2": Copy(title="Save with every single order you place")},
        "layout": {
            "l1": layout(text(), text("copy.button", background="#0044cc", color="#ffffff")),
            "l2": layout(text(max_lines=3, size=14, color="#777777"), background="#eeeeee"),
        },
        "image": {"i1": picture(1, 1)},
        "color": {"k1": style("color", "#000000", "copy.title"), "k2": style("color", "#ffffff", "copy.title")},
    }
    found = pairs(slots)
    assert found
    for c in slots["copy"]:
        for x in slots["layout"]:
            for k in slots["color"]:
                held = {f"copy/{c}", f"layout/{x}", f"color/{k}", "image/i1"}
                forbidden = any({left, right} <= held for _, left, right in found)
                alone = {"copy": slots["copy"][c], "layout": slots["layout"][x], "color": slots["color"][k]}
                assert forbidden == bool(check_variant(alone))


def test_a_font_size_that_only_some_copy_fits_at_takes_three_to_fail() -> None:
    slots: dict[str, list[tuple[str, Content]]] = {
        "copy": [("short", Copy(title="Save")), ("long", Copy(title="Save with every order"))],
        "layout": [("narrow", layout(text())), ("wide", layout(text(), width=600))],
        "size": [
            ("small", style("font_size", 12)),
            ("large", style("font_size", 35)),
            ("huge", style("font_size", 200)),
        ],
    }
    found = {f.options for f in combination_failures(slots)}
    assert found == {
        (("layout", "narrow"), ("size", "huge")),
        (("layout", "wide"), ("size", "huge")),
        (("copy", "long"), ("layout", "narrow"), ("size", "large")),
    }
    assert {(f.left, f.right) for f in pair_failures(slots)} == {o for o in found if len(o) == 2}


def test_a_copy_that_fits_at_no_size_is_a_pair_with_the_layout() -> None:
    slots: dict[str, dict[str, Content]] = {
        "copy": {"long": Copy(title="Save with every order " * 4)},
        "layout": {"l": layout(text())},
        "size": {"s": style("font_size", 14), "m": style("font_size", 16)},
    }
    assert pairs(slots) == {("text_fits", "copy/long", "layout/l")}


def test_two_styles_are_judged_at_the_smallest_text_they_meet_in() -> None:
    grey, white = style("color", "#777777"), style("background", "#ffffff")
    slots: dict[str, dict[str, Content]] = {
        "copy": {"c": Copy(title="a")},
        "layout": {"large": layout(text(size=30), height=200)},
        "color": {"grey": grey, "black": style("color", "#000000")},
        "ground": {"white": white, "pale": style("background", "#eeeeee")},
    }
    assert pairs(slots) == set()
    slots["layout"]["small"] = layout(text(size=14))
    assert pairs(slots) == {("contrast", "color/grey", "ground/pale"), ("contrast", "color/grey", "ground/white")}


def test_a_layout_whose_own_colours_fail_is_left_alone_where_every_style_overrides_them() -> None:
    slots: dict[str, dict[str, Content]] = {
        "copy": {"c": Copy(title="a")},
        "layout": {"l": layout(text(color="#ffffff"))},
        "color": {"black": style("color", "#000000")},
    }
    assert pairs(slots) == set()
    slots["color"]["round"] = style("corner_radius", 8)
    assert pairs(slots) == {("contrast", "copy/c", "layout/l")}


def test_slots_without_layouts_or_with_nothing_in_them_fail_nothing() -> None:
    assert pairs({}) == set()
    assert pairs({"copy": {}, "layout": {"l": layout(text())}}) == set()
    assert pairs({"copy": {"c": Copy(title="a")}, "layout": {}}) == set()


# ── how much there is to look at ────────────────────────────────────────────────────────────────────────────────────


def crowd(copies: int, layouts: int, **more: Any) -> dict[str, list[tuple[str, Content]]]:
    return {
        "copy": [(f"c{i}", Copy(title=f"Number {i}")) for i in range(copies)],
        "layout": [(f"l{i}", layout(text(), width=100 + i)) for i in range(layouts)],
        **more,
    }


def test_more_than_can_be_looked_at_is_refused_with_the_numbers_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kaleidoscope.design_checks.MOST_LOOKS", 60)
    assert combination_failures(crowd(5, 10), [NAME]) == []

    def measure(*_: object) -> None:
        raise AssertionError("it was measured")

    monkeypatch.setattr(Ruler, "lines", measure)
    with pytest.raises(TooComplexError, match=r"10 layouts, 6 copies would have to be looked at 70 times.*Use fewer"):
        combination_failures(crowd(6, 10), [NAME])


def test_font_sizes_of_several_slots_multiply_what_there_is_to_look_at() -> None:
    sizes = {f"size{n}": [(f"s{i}", style("font_size", 10 + i)) for i in range(100)] for n in range(4)}
    with pytest.raises(TooComplexError, match="400 styles"):
        combination_failures(crowd(1, 1, **sizes), [NAME])


def test_colours_and_backgrounds_of_several_slots_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    paints = {
        name: [(f"{name}{i}", style(name, f"#0000{i:02x}")) for i in range(50)] for name in ("color", "background")
    }
    monkeypatch.setattr("kaleidoscope.design_checks.MOST_LOOKS", 2_000)
    with pytest.raises(TooComplexError, match="100 styles"):
        combination_failures(crowd(1, 1, **paints), [NAME])
    assert combination_failures(crowd(1, 1, **paints), [NAME], checks=[TEXT_FITS]) == []


def test_only_the_checks_that_are_asked_for_are_made() -> None:
    slots: dict[str, list[tuple[str, Content]]] = {
        "copy": [("c", Copy(title="Extraordinarily"))],
        "image": [("i", picture(10, 100))],
        "layout": [("l", layout(text(color="#eeeeee"), {"type": "image", "show": "image"}, width=60))],
    }
    assert {f.check for f in combination_failures(slots)} == {TEXT_FITS, IMAGE_RATIO, CONTRAST}
    for check in (TEXT_FITS, IMAGE_RATIO, CONTRAST):
        assert {f.check for f in combination_failures(slots, checks=[check])} == {check}


def test_lines_are_those_of_filling_one_after_the_other() -> None:
    ruler, words = default_ruler(), ["The", "quick", "brown", "fox", "跳过懒狗", "jumps", "extraordinarily", "high"]
    for width in (4.0, 7.5, 8.0, 12.25, 100.0):
        lines, used = 1, 0.0
        for word in words:
            gap = ruler.width(" ") if used else 0.0
            for token in ruler.words(word):
                if used + gap + ruler.width(token) > width:
                    lines, used, gap = lines + 1, 0.0, 0.0
                used, gap = used + gap + ruler.width(token), 0.0
        wide = any(ruler.width(token) > width for token in ruler.words(" ".join(words)))
        assert ruler.lines(" ".join(words), width) == (None if wide else lines)
