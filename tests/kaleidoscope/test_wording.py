"""Sentences say what is known and no more, in both languages, and no value breaks out of them."""

from __future__ import annotations

import re
import unicodedata

import pytest

from kaleidoscope.wording import (
    NO_DIFFERENCE,
    Language,
    design_headline,
    ends_of,
    expected_sentence,
    insight_sentence,
    main_effect_sentence,
    mixed_sentence,
    needed_rule,
    no_segment_note,
    not_compared_sentence,
    not_enough_sentence,
    not_said_note,
    plain,
    preference_sentence,
    status_sentence,
    who,
)

SEGMENT, TAG = {"age": "[30, 40)"}, {"image_style": "flat"}
ZH_TAG = {"图片风格": "扁平"}
NASTY = "=1+1\n\x1b[31m<script>\u202e\x00\u2028" + "x" * 500
BOTH: tuple[Language, ...] = ("en", "zh")


def test_an_insight_in_english() -> None:
    assert insight_sentence(SEGMENT, TAG, 0.25, 0.1, 0.42, 0.012) == (
        "Users with age from 30 to below 40: the odds of a click on image_style=flat are 25 % higher than expected"
        " from their odds without it and what it does for other users (a difference from other users, not a lift;"
        " beside the other insights; 95 % interval 10 % to 42 %, q = 0.012)."
    )


def test_an_insight_in_chinese() -> None:
    assert insight_sentence({**SEGMENT, "level": "new"}, ZH_TAG, -0.25, -0.42, -0.1, 0.0001, language="zh") == (
        "age 为 30 至不满 40、level 为“new”的用户，对图片风格“扁平”的点击几率（odds）"
        "比按这类用户未看到它时的水平以及它对其他用户的作用推算的相对低 25%"
        "（这是与其他用户的差别，并非提升幅度；已计入其他洞察；95% 置信区间：低 10% 至 42%，q < 0.001）。"
    )


def test_main_effects_in_english_and_chinese() -> None:
    assert main_effect_sentence(TAG, 0.47, 0.3, 0.6, 0.001, 1) == (
        "image_style=flat: the click rate is 47 % higher than that of what was shown in its place"
        " (95 % interval 30 % to 60 % higher, q = 0.001; 1 exposure; not adjusted for tags shown together with it)."
    )
    assert main_effect_sentence(ZH_TAG, 0.47, 0.3, 0.6, 0.001, 900, language="zh") == (
        "图片风格“扁平”：点击率比同位置的其他内容相对高出 47%（95% 置信区间：高 30% 至 60%，q = 0.001；900 次曝光；"
        "未剔除同时展示的其他标签的影响）。"
    )


@pytest.mark.parametrize(
    ("language", "caveat"), [("en", "not adjusted for tags shown together"), ("zh", "未剔除同时展示")]
)
def test_main_effects_are_not_adjusted_and_say_so_unless_who_lists_them_does(language: Language, caveat: str) -> None:
    for ends in ((0.1, 0.3), (-0.1, 0.3)):
        assert caveat in main_effect_sentence(TAG, 0.2, *ends, 0.01, 900, language=language)
        assert caveat not in main_effect_sentence(TAG, 0.2, *ends, 0.01, 900, caveat=False, language=language)
    assert caveat in design_headline({"age": "30"}, "home", 3, language=language)


def test_a_preference_is_over_that_of_users_overall() -> None:
    assert "take to image_style=flat 20 % more than users do overall" in preference_sentence(
        SEGMENT, TAG, 1.2, 1.1, 1.3, 900
    )
    assert "的偏好可能比总体水平相对高出 20%" in preference_sentence(SEGMENT, ZH_TAG, 1.2, 1.1, 1.3, 900, language="zh")
    assert "against how users take it overall" in preference_sentence(SEGMENT, TAG, 1.2, 0.9, 1.3, 900)
    assert "与总体水平相比" in preference_sentence(SEGMENT, TAG, 1.2, 0.9, 1.3, 900, language="zh")


def test_notes_list_as_their_language_does() -> None:
    assert "age, level" in not_said_note(["age", "level"]) and "20, 30" in no_segment_note("age", "9", ["20", "30"])
    assert "未给出：age、level；" in not_said_note(["age", "level"], language="zh")
    assert "（已有：20、30）" in no_segment_note("age", "9", ["20", "30"], language="zh")


def test_the_engines_insights_read_alike() -> None:
    from attribution.insights import Insight

    for segment in (SEGMENT, {"age": "[-inf, 1e3)", "level": "new"}, {"level": "missing"}, {"age": "[40, inf)"}):
        for tag in (TAG, {"a": "x|y", "b": "z"}):
            for effect in ((0.25, 0.1, 0.42, 0.012), (-0.25, -0.42, -0.1, 0.0001), (0.1, -0.02, 12.0, 0.04)):
                insight = Insight(segment, tag, *effect[:1], None, *effect[1:], 5)  # type: ignore[arg-type, misc]
                assert insight.sentence == insight_sentence(segment, tag, *effect)


@pytest.mark.parametrize(
    ("label", "english", "chinese"),
    [
        ("[30, 40)", "Users with age from 30 to below 40", "age 为 30 至不满 40 的用户"),
        ("[-inf, 18)", "Users with age below 18", "age 不满 18 的用户"),
        ("[1e3, inf)", "Users with age from 1e3", "age 为 1e3 及以上的用户"),
        ("missing", "Users with age=missing", "age 未知的用户"),
        ("7", "Users with age=7", "age 为 7 的用户"),
        ("[1.2.3, 4)", "Users with age=[1.2.3, 4)", "age 为“[1.2.3, 4)”的用户"),
    ],
)
def test_users_by_their_segment(label: str, english: str, chinese: str) -> None:
    assert (who({"age": label}), who({"age": label}, "zh")) == (english, chinese)


def test_what_only_looks_like_numbers_is_text() -> None:
    assert [ends_of(label) for label in ("[1.2.3, 4)", "[a, b)", "30", "[١, ٢)", "[1, 2]")] == [None] * 5
    assert ends_of("[-1.5, 2e3)") == (-1.5, 2000.0)


@pytest.mark.parametrize("language", BOTH)
@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.3), (-0.3, 0.1), (0.0, 0.2), (-0.2, 0.0)])
def test_an_interval_with_zero_in_it_shows_no_difference_and_not_that_there_is_none(
    language: Language, low: float, high: float
) -> None:
    middle = (low + high) / 2
    for said in (
        main_effect_sentence(TAG, middle, low, high, 0.3, 1_000, language=language),
        preference_sentence(SEGMENT, TAG, 1 + middle, 1 + low, 1 + high, 1_000, language=language),
        expected_sentence(TAG, middle, low, high, 2, language=language),
    ):
        assert NO_DIFFERENCE[language] in said
        assert "1,000" in said or "insight" in said or "洞察" in said


@pytest.mark.parametrize(("language", "doubt"), [("en", "may as well be chance"), ("zh", "可能只是偶然")])
def test_what_may_be_chance_is_said_to(language: Language, doubt: str) -> None:
    unsure = [
        main_effect_sentence(TAG, 0.1, 0.01, 0.2, 0.2, 1_000, language=language),
        expected_sentence(TAG, 0.1, 0.01, 0.2, 0, q_value=0.2, language=language),
    ]
    sure = [
        main_effect_sentence(TAG, 0.1, 0.01, 0.2, 0.02, 1_000, language=language),
        expected_sentence(TAG, 0.1, 0.01, 0.2, 0, q_value=0.02, language=language),
        expected_sentence(TAG, 0.1, 0.01, 0.2, 1, q_value=0.2, language=language),  # not the main effect alone
    ]
    assert all(doubt in said for said in unsure) and not any(doubt in said for said in sure)


def test_an_insight_of_which_the_size_is_not_known_says_so() -> None:
    assert "2.0 % lower to 30 % higher, q = 0.04: how much is hardly known" in insight_sentence(
        SEGMENT, TAG, 0.1, -0.02, 0.3, 0.04
    )
    assert "从低 2.0% 到高 30%，q = 0.04：差异究竟多大，几乎无从判断" in insight_sentence(
        SEGMENT, TAG, 0.1, -0.02, 0.3, 0.04, language="zh"
    )


def test_tags_that_work_together_are_not_tags_never_shown_apart() -> None:
    two = {"a": "x", "b": "y"}
    assert "(never shown apart)" in insight_sentence(SEGMENT, two, 0.2, 0.1, 0.3, 0.01)
    crossed = insight_sentence(SEGMENT, two, 0.2, 0.1, 0.3, 0.01, crossed=True)
    assert "never shown apart" not in crossed
    assert "20 % higher than what these values do apart would make them (on top of the other insights" in crossed
    assert "单独及部分组合" in insight_sentence(SEGMENT, two, 0.2, 0.1, 0.3, 0.01, crossed=True, language="zh")
    assert "（从未分开展示）" in insight_sentence(SEGMENT, two, 0.2, 0.1, 0.3, 0.01, language="zh")
    assert "（同时出现时）" in insight_sentence(SEGMENT, two, 0.2, 0.1, 0.3, 0.01, crossed=True, language="zh")


def test_a_preference_is_weaker_than_an_insight_and_says_so() -> None:
    assert "weaker evidence than an insight" in preference_sentence(SEGMENT, TAG, 1.2, 1.1, 1.3, 12_345)
    said = preference_sentence(SEGMENT, TAG, 1.2, 1.1, 1.3, 12_345, language="zh")
    assert "证据弱于洞察" in said and "12,345 次曝光" in said


def test_too_little_is_said_to_be_too_little_and_never_never() -> None:
    assert "never shown to users with age from 30 to below 40" in not_enough_sentence(SEGMENT, TAG, 0, 7_000)
    few = not_enough_sentence(SEGMENT, TAG, 120, 7_000)
    assert "worth 120 exposures at most" in few and "about 7,000" in few and "Too little" in few
    assert "not known" in not_enough_sentence(SEGMENT, TAG, None, None)
    assert "从未展示给任何用户" in not_enough_sentence({}, ZH_TAG, 0, None, language="zh")
    assert "约需 7,000 次" in not_enough_sentence(SEGMENT, ZH_TAG, 120, 7_000, language="zh")


def test_what_is_expected_says_what_it_rests_on() -> None:
    assert "from the main effect and 1 insight)" in expected_sentence(TAG, 0.2, 0.1, 0.3, 1)
    assert "no insight about these users" in expected_sentence(TAG, 0.2, 0.1, 0.3, 0)
    assert "saw of it is worth 12 exposures at most" in expected_sentence(TAG, 0.2, 0.1, 0.3, 0, too_few=12)
    assert "is not known" in expected_sentence(TAG, None, None, None, 0)
    assert "看到它至多只相当于 12 次" in expected_sentence(TAG, 0.2, 0.1, 0.3, 0, too_few=12, language="zh")


def test_simulated_users_are_called_simulated() -> None:
    assert "of simulated users" in design_headline({"age": "30"}, "home", 3, simulated=True)
    assert "并非真人" in design_headline({"age": None}, "home", 3, simulated=True, language="zh")
    assert "simulated" not in design_headline({}, "home", 3)


@pytest.mark.parametrize("language", BOTH)
def test_no_value_breaks_out_of_its_sentence(language: Language) -> None:
    names = {NASTY: NASTY}
    said = [
        insight_sentence(names, names, 0.2, 0.1, 0.3, 0.01, language=language),
        main_effect_sentence(names, 0.2, 0.1, 0.3, 0.01, 9, language=language),
        preference_sentence(names, names, 1.2, 1.1, 1.3, 9, language=language),
        not_enough_sentence(names, names, 0, 9, language=language),
        not_enough_sentence(names, names, 3, 9, language=language),
        not_compared_sentence(names, 5, language=language),
        mixed_sentence(names, language=language),
        status_sentence("renamed", names, language=language),
        expected_sentence(names, 0.2, 0.1, 0.3, 1, language=language),
        design_headline({NASTY: NASTY}, NASTY, 1, language=language),
        no_segment_note(NASTY, NASTY, [NASTY], language=language),
        not_said_note([NASTY], language=language),
    ]
    for sentence in said:
        assert not [c for c in sentence if unicodedata.category(c) in ("Cc", "Zl", "Zp") or c == "\u202e"], sentence
        assert len(sentence) < 800


def test_long_values_are_cut_and_others_are_not_touched() -> None:
    assert plain("x" * 500) == "x" * 79 + "…"
    assert plain("中文 value-1") == "中文 value-1"


def test_chinese_uses_its_own_punctuation() -> None:
    said = [
        insight_sentence({"level": "new"}, ZH_TAG, 0.2, 0.1, 12.5, 0.01, language="zh"),
        main_effect_sentence(ZH_TAG, 0.2, 0.1, 0.3, 0.01, 12_345, language="zh"),
        preference_sentence(SEGMENT, ZH_TAG, 1.2, 1.1, 1.3, 9, language="zh"),
        not_enough_sentence(SEGMENT, ZH_TAG, 3, 12_345, language="zh"),
        expected_sentence(ZH_TAG, 0.2, 0.1, 0.3, 1, language="zh"),
        needed_rule(0.05, 8_158, language="zh"),
    ]
    for sentence in said:
        assert sentence.endswith("。")
        assert not re.search(r"[;:!?()]|, (?!\d)|(?<!\d),|\. ", sentence), sentence
    assert "12,345" in said[1] and "1,250%" in said[0]


def test_the_rule_names_its_rate_and_its_power() -> None:
    assert "click rate of 5 %" in needed_rule(0.05, 8_158) and "8,158" in needed_rule(0.05, 8_158)
    assert "power of 80 %" in needed_rule(0.05, 8_158)
    assert "not known" in needed_rule(None, None) and "未知" in needed_rule(None, None, language="zh")


@pytest.mark.parametrize("language", BOTH)
def test_what_became_of_a_tag_is_said(language: Language) -> None:
    for status in ("renamed", "merged", "split"):
        assert "flat" in status_sentence(status, TAG, language=language)
    assert status_sentence("retired", None, language=language)
    assert status_sentence("current", None, language=language) == ""
