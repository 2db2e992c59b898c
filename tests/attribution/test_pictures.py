"""The report's pictures: intervals that leave them, ticks, and how numbers and names are written."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np

from attribution.pictures import Axis, Bar, Unit, depths, forest, name, narrow, ordered, prose, relative, share, who


def test_intervals_that_leave_the_picture_are_cut_with_an_arrow() -> None:
    bars = [Bar(name("a"), 0.1, -0.1, 0.3, 5, True), Bar(name("b"), 0.1, -9.0, 9.0)]
    picture = forest(bars)
    assert "◂" in picture and "▸" in picture and "to any" in picture
    assert all(0 <= float(x) <= 100 for x in re.findall(r'x[12]?="([-\d.]+)%"', picture))
    assert "◂" not in forest(bars[:1])


def test_ticks_are_symmetrical_and_apart() -> None:
    for limit in (0.02, 0.1, 0.5, 1.0, 3.0):
        for unit in Unit:
            places = [x for x, _ in Axis(limit, unit).ticks]
            assert 50.0 in places and np.allclose(np.sort(100 - np.array(places)), places)
            assert np.diff(places).min() >= 19


def test_labels_of_ticks_do_not_touch_where_a_picture_is_narrow() -> None:
    """In two columns on paper it is 94 pixels wide, and a label of six characters 36."""
    for limit in np.geomspace(0.02, 4, 60):
        ticks = Axis(limit, narrow=True).ticks
        assert len(ticks) <= 3
        ends = [
            (0.94 * x - (0 if x < 8 else w if x > 92 else w / 2), w) for x, w in ((x, 6 * len(t)) for x, t in ticks)
        ]
        assert all(left + width <= right for (left, width), (right, _) in pairwise(ends)), (limit, ticks)


def test_what_is_unknown_has_no_axis() -> None:
    picture = forest([Bar(name("a"), None, n=3, note="too few units or clicks")])
    assert "<svg" not in picture and "unknown" in picture and "too few units or clicks" in picture
    both = forest([Bar(name("a"), None), Bar(name("b"), 0.1, 0.0, 0.2)])
    assert both.count("<svg") == 2  # the scale, and the one that is known


def test_what_is_to_be_typed_is_set_as_such() -> None:
    assert prose("Give `--shares control=.2,random=.8` or `unit`.") == (
        "Give <code>--shares control=.2,random=.8</code> or <code>unit</code>."
    )
    assert prose("`<b>`") == "`&lt;b&gt;`"


def test_numbers_read_the_same_everywhere() -> None:
    assert relative(0.342) == "+34\u00a0%" and relative(-0.0521) == "−5.2\u00a0%" and relative(-0.0001) == "0.0\u00a0%"
    assert prose("by -5.4 % to +2 % (a-1, 2026-10-01)") == "by −5.4\u00a0% to +2\u00a0% (a-1, 2026-10-01)"
    assert relative(12.5) == "+1,250\u00a0%" and share(0.0503) == "5.03\u00a0%" and share(0.00012) == "0.0120\u00a0%"
    assert (
        who({"age": "[18, 25)", "city": "a"}).replace("<bdi>", "").replace("</bdi>", "")
        == "age from 18 to 25 and city = a"
    )


def test_long_names_are_cut_and_may_break_above_a_column() -> None:
    assert len(re.sub("<.*?>", "", name("x" * 300))) == 80 and 'title="' + "x" * 300 in name("x" * 300)
    assert "<wbr>" in narrow("button_colour_of_the_page") and "<wbr>" not in narrow("calm") + narrow("Restaurant(<20)")
    assert re.sub("<.*?>", "", narrow("  ")) == "“  ”" == re.sub("<.*?>", "", name("  "))


def test_ranges_stand_in_their_order_within_those_that_hold_them() -> None:
    labels = ["missing", "[20, inf)", "[-inf, 20)", "[-inf, 10)", "[10, 20)"]
    assert [labels[i] for i in ordered(labels)] == ["[-inf, 20)", "[-inf, 10)", "[10, 20)", "[20, inf)", "missing"]
    assert depths(labels) == [0, 0, 0, 1, 1]
