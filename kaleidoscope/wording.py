"""What attribution found, as sentences in English and Chinese: templates, and never stronger than the evidence.

Takes plain values, so that every face says the same. Names and values may be what visitors typed: they are put on one
line, without characters that steer a terminal or turn text around, and cut where they are long. Nothing is escaped for
HTML or CSV here; who writes those does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

from kaleidoscope.terminal import printable

Language = Literal["en", "zh"]
Names = Mapping[str, str]  # {field: value} of a segment, {dimension: value} of a tag; values that go together: a|b

LONG = 80  # characters of a name or a value
SURE = 0.05  # q from which on something may as well be chance
NO_DIFFERENCE: dict[Language, str] = {
    "en": "no difference was seen, which is not that there is none",
    "zh": "未观察到差异，但这并不表示没有差异",
}


# ── insights ────────────────────────────────────────────────────────────────────────────────────────────────────────


def insight_sentence(
    segment: Names,
    tag: Names,
    effect: float,
    ci_low: float,
    ci_high: float,
    q_value: float,
    *,
    crossed: bool = False,
    language: Language = "en",
) -> str:
    """A segment's preference for a tag: that odds differ, and no more; where the interval holds 0, that it does.

    `effect` and its interval are exp(γ) − 1, a ratio of odds ratios: what the tag does to these users' odds over what
    it does to those of other users. `crossed`: the tags work together, rather than were never shown apart.

    >>> insight_sentence({"age": "[30, 40)"}, {"image_style": "flat"}, 0.25, 0.1, 0.42, 0.012)[:68]
    'Users with age from 30 to below 40: the odds of a click on image_sty'
    >>> insight_sentence({"level": "new"}, {"图片风格": "扁平"}, 0.25, 0.1, 0.42, 0.012, language="zh")[:36]
    'level 为“new”的用户，对图片风格“扁平”的点击几率（odds）'
    """
    unsure = ci_low < 0 < ci_high
    near, far = sorted((ci_low, ci_high), key=abs)
    if language == "zh":
        apart = "" if len(tag) < 2 else "（同时出现时）" if crossed else "（从未分开展示）"
        interval = f"从低 {_size(ci_low, 'zh')} 到高 {_size(ci_high, 'zh')}，{_q(q_value)}：差异究竟多大，几乎无从判断"
        if not unsure:
            way = "高" if effect > 0 else "低"
            interval = f"{way} {_size(near, 'zh')} 至 {_size(far, 'zh')}，{_q(q_value)}"
        than, kind = "按这类用户未看到它时的水平以及它对其他用户的作用推算的", "这是与其他用户的差别，并非提升幅度；"
        if crossed:
            than, kind = "由其中各个取值单独及部分组合的作用推算的", ""
        return (
            f"{who(segment, 'zh')}，对{_after_han(tag_words(tag, 'zh'))}{apart}的点击几率（odds）"
            f"比{than}{_way_zh(effect)} {_size(effect, 'zh')}"
            f"（{kind}已计入其他洞察；95% 置信区间：{interval}）。"
        )
    apart = " (never shown apart)" if len(tag) > 1 and not crossed else ""
    interval = f"{_size(near)} to {_size(far)}, {_q(q_value)}"
    if unsure:
        interval = f"{_size(ci_low)} lower to {_size(ci_high)} higher, {_q(q_value)}: how much is hardly known"
    than = (
        "expected from their odds without it and what it does for other users"
        " (a difference from other users, not a lift; beside the other insights;"
    )
    if crossed:
        than = "what these values do apart would make them (on top of the other insights;"
    return (
        f"{who(segment)}: the odds of a click on {tag_words(tag)}{apart} are {_size(effect)}"
        f" {'higher' if effect > 0 else 'lower'} than {than} 95 % interval {interval})."
    )


# ── main effects, preferences, what is not known ────────────────────────────────────────────────────────────────────


def main_effect_sentence(
    tag: Names,
    effect: float,
    ci_low: float,
    ci_high: float,
    q_value: float | None,
    n: int,
    *,
    caveat: bool = True,
    language: Language = "en",
) -> str:
    """How everybody takes a tag: clicks with it over clicks with what was shown in its place, minus 1.

    `caveat`: that nothing adjusts it for other tags; without it, who lists such sentences says so once.
    """
    null = ci_low <= 0 <= ci_high
    chance = not null and q_value is not None and q_value > SURE
    q = "" if q_value is None else _q(q_value)
    if language == "zh":
        tail = f"95% 置信区间：{_range(ci_low, ci_high, 'zh')}{'，' * bool(q)}{q}；{n:,} 次曝光"
        tail += "；未剔除同时展示的其他标签的影响" * caveat
        if null:
            return f"{tag_words(tag, 'zh')}：{NO_DIFFERENCE['zh']}（点击率与同位置的其他内容相比，{tail}）。"
        said = f"点击率比同位置的其他内容{_way_zh(effect)} {_size(effect, 'zh')}（{tail}）"
        doubt = "；考虑到同时检验的标签数量，这也可能只是偶然" if chance else ""
        return f"{tag_words(tag, 'zh')}：{said}{doubt}。"
    tail = f"95 % interval {_range(ci_low, ci_high)}{', ' * bool(q)}{q}; {n:,} exposure{'s' * (n != 1)}"
    tail += "; not adjusted for tags shown together with it" * caveat
    if null:
        return (
            f"{tag_words(tag)}: {NO_DIFFERENCE['en']} (click rate against that of what was shown in its place: {tail})."
        )
    more = "higher" if effect > 0 else "lower"
    doubt = "; given how many tags were looked at, this may as well be chance" if chance else ""
    return (
        f"{tag_words(tag)}: the click rate is {_size(effect)} {more} than that of what was shown in its place"
        f" ({tail}){doubt}."
    )


def preference_sentence(
    segment: Names, tag: Names, shrunk: float, low: float, high: float, n: int, *, language: Language = "en"
) -> str:
    """A segment's standardised preference for a tag, pulled towards none where little is known: a ratio, 1 is none.

    It is weaker evidence than an insight: nothing corrects it for how many were looked at, and the sentence says so.
    """
    effect, ci_low, ci_high = shrunk - 1, low - 1, high - 1
    null = ci_low <= 0 <= ci_high
    if language == "zh":
        tail = f"95% 区间：{_range(ci_low, ci_high, 'zh')}；{n:,} 次曝光"
        subject = f"{who(segment, 'zh')}，对{_after_han(tag_words(tag, 'zh'))}的偏好"
        if null:
            return f"{subject}与总体水平相比，{NO_DIFFERENCE['zh']}（{tail}）。"
        return (
            f"{subject}可能比总体水平{_way_zh(effect)} {_size(effect, 'zh')}"
            f"（收缩估计；{tail}；未对检验数量做校正，证据弱于洞察）。"
        )
    tail = f"95 % interval {_range(ci_low, ci_high)}; {n:,} exposure{'s' * (n != 1)}"
    if null:
        return (
            f"{who(segment)} and {tag_words(tag)}, against how users take it overall: {NO_DIFFERENCE['en']} ({tail})."
        )
    return (
        f"{who(segment)} may take to {tag_words(tag)} {_size(effect)} {'more' if effect > 0 else 'less'} than users do"
        f" overall (shrunken; {tail}; not corrected for how many were looked at: weaker evidence than an insight)."
    )


def not_enough_sentence(
    segment: Names, tag: Names, n: int | None, needed: int | None, *, language: Language = "en"
) -> str:
    """That a tag was shown to these users too rarely to say anything, or (n 0) never; None: not known.

    `n`: as how many independent exposures, equally weighted, theirs count.
    """
    seen = None if n is None else f"{n:,}"
    if language == "zh":
        users, what = who(segment, "zh") if segment else "任何用户", tag_words(tag, "zh")
        if n == 0:
            return f"{what}从未展示给{_after_han(users)}，因此无法得知其效果。"
        times = "展示次数未知" if seen is None else f"至多只相当于展示了 {seen} 次"
        takes = "" if needed is None else f"，而要看出 20% 的差异约需 {needed:,} 次"
        return f"{what}对{_after_han(users if segment else '所有用户')}{times}{takes}：数据不足，无从判断他们的反应。"
    users, what = _lower(who(segment)) if segment else "anybody", tag_words(tag)
    if n == 0:
        return f"{what} was never shown to {users}: nothing is known of it."
    times = "how often is not known" if seen is None else f"worth {seen} exposures at most"
    takes = "" if needed is None else f"; to see a difference of 20 % takes about {needed:,}"
    return (
        f"{what} was shown to {users if segment else 'all users'}: {times}{takes}. Too little to say how they take it."
    )


def not_compared_sentence(tag: Names, n: int | None, *, language: Language = "en") -> str:
    """That a tag was shown (`n` exposures) and never apart from the rest, or (n None) is not in the analysis at all."""
    if language == "zh":
        if n is None:
            return f"{tag_words(tag, 'zh')}不在这次分析中：要么从未展示，要么每次都展示，无从比较。"
        return f"{tag_words(tag, 'zh')}展示了 {n:,} 次，但没有可与之比较的展示，因此无法得知其效果。"
    if n is None:
        return f"{tag_words(tag)} is not in this analysis: it was never shown, or always, and cannot be compared."
    return f"{tag_words(tag)} was shown {n:,} times, with nothing to compare it with: nothing is known of it."


def mixed_sentence(tag: Names, *, language: Language = "en") -> str:
    """That a tag came out of a split, and what was shown before is not known to be it."""
    if language == "zh":
        return f"{tag_words(tag, 'zh')}由此前的标签拆分而来，此前展示的是不是它，无从得知。"
    return f"{tag_words(tag)} came out of a split: whether it was shown before nobody knows."


def status_sentence(status: str, was: Names | None, *, language: Language = "en") -> str:
    """What became of a tag since it was analysed (portraits.TagStatus); empty where it is as it was."""
    before = "" if was is None else tag_words(was, language)
    zh = {
        "renamed": f"当时称为{_after_han(before)}。",
        "merged": f"当时为{_after_han(before)}，此后已与其他标签合并。",
        "split": f"当时为{_after_han(before)}，此后已被拆分，无从得知属于其中哪一个。",
        "retired": "该标签已停用。",
        "unknown": "该标签不在标签库中。",
    }
    en = {
        "renamed": f"It was {before} then.",
        "merged": f"It was {before} then, and was merged with others since.",
        "split": f"It was {before} then, and was split since: nobody knows which of them it is.",
        "retired": "The tag is retired.",
        "unknown": "The tag is not in the vocabulary.",
    }
    return (zh if language == "zh" else en).get(status, "")


# ── what to design ──────────────────────────────────────────────────────────────────────────────────────────────────


def expected_sentence(
    tag: Names,
    expected: float | None,
    low: float | None,
    high: float | None,
    insights: int,
    *,
    q_value: float | None = None,
    too_few: int | None = None,
    language: Language = "en",
) -> str:
    """What is expected of a tag with some users: odds of a click against what was shown in its place, minus 1.

    `insights`: about them, that it rests on; without one on the main effect, whose `q_value` it is. `too_few`: how
    many independent exposures of such users to it there are at most, where that tells nothing of them; else None.
    """
    if expected is None or low is None or high is None:
        unknown = "：其效果未知。" if language == "zh" else ": what it does is not known."
        return f"{tag_words(tag, language)}{unknown}"
    null = low <= 0 <= high
    chance = not insights and q_value is not None and q_value > SURE
    if language == "zh":
        basis = f"依据总体效应和 {insights} 条洞察" if insights else "仅依据总体效应：没有关于这类用户的洞察"
        if too_few is not None:
            basis += f"；这类用户看到它至多只相当于 {too_few:,} 次，不足以判断他们是否不同"
        tail = f"保守的 95% 区间：{_range(low, high, 'zh')}；{basis}"
        if null:
            return f"{tag_words(tag, 'zh')}：{NO_DIFFERENCE['zh']}（点击几率与同位置的其他内容相比，{tail}）。"
        way = _way_zh(expected)
        doubt = "考虑到同时检验的标签数量，这也可能只是偶然。" if chance else ""
        return (
            f"{tag_words(tag, 'zh')}：预计点击几率（odds）比同位置的其他内容{way} {_size(expected, 'zh')}"
            f"（{tail}）。{doubt}"
        )
    some = f"the main effect and {insights} insight{'s' * (insights != 1)}"
    basis = f"from {some}" if insights else "from the main effect alone: there is no insight about these users"
    if too_few is not None:
        basis += (
            f"; what such users saw of it is worth {too_few:,} exposures at most, too few to tell whether they differ"
        )
    tail = f"conservative 95 % interval {_range(low, high)}; {basis}"
    if null:
        return f"{tag_words(tag)}: {NO_DIFFERENCE['en']} (odds of a click against what was shown in its place: {tail})."
    way = "higher" if expected > 0 else "lower"
    doubt = " Given how many tags were looked at, this may as well be chance." if chance else ""
    return (
        f"{tag_words(tag)}: the odds of a click are expected to be {_size(expected)} {way} than with what was shown in"
        f" its place ({tail}).{doubt}"
    )


def design_headline(
    attributes: Mapping[str, str | None], scene: str, number: int, *, simulated: bool = False, language: Language = "en"
) -> str:
    """Whom a design is for, by which portrait, and what no tag of it is adjusted for; None: known to be missing."""
    if language == "zh":
        users = "、".join(f"{plain(k)} {'未知' if v is None else f'为{_value_zh(v)}'}" for k, v in attributes.items())
        source = f"依据场景 {plain(scene)} 的第 {number} 号画像{'（模拟用户，并非真人）' if simulated else ''}"
        whom = f" {_before_han(users)}的用户" if users else "所有用户"
        return f"{source}，面向{whom}（总体效应未剔除同时展示的其他标签的影响）："
    users = " and ".join(f"{plain(k)}={'missing' if v is None else plain(v)}" for k, v in attributes.items())
    source = f"by portrait {number} of scene {plain(scene)}{' (of simulated users)' if simulated else ''}"
    whom = f"users with {users}" if users else "all users"
    return f"For {whom}, {source}, main effects not adjusted for tags shown together:"


def no_segment_note(field: str, value: str | None, known: Sequence[str], *, language: Language = "en") -> str:
    """That no segment is of users with this value; `known`: those there are."""
    there = ("、" if language == "zh" else ", ").join(map(plain, known))
    if language == "zh":
        what = "未知" if value is None else f"为“{plain(value)}”"
        return f"没有 {plain(field)} {what}的用户分群，因此该属性不起作用（已有：{there}）。"
    what = "is missing" if value is None else f"is {plain(value)!r}"
    return f"No segment is of users whose {plain(field)} {what}: nothing follows from it. There are: {there}."


def not_said_note(fields: Sequence[str], *, language: Language = "en") -> str:
    """That these attributes were left open."""
    there = ("、" if language == "zh" else ", ").join(map(plain, fields))
    if language == "zh":
        return f"未给出：{there}；按日志中用户的实际构成取平均。"
    return f"Not said: {there}. Averaged over, as users are in the log."


def needed_rule(rate: float | None, needed: int | None, *, language: Language = "en") -> str:
    """The rule by which a tag was shown often enough."""
    if rate is None or needed is None:
        if language == "zh":
            return "这类用户的点击率未知，因此无法得知一个标签需要展示多少次才足够。"
        return "The click rate of these users is not known, and so neither is how often a tag has to be shown."
    if language == "zh":
        return (
            f"“足够”是指：点击率为 {100 * rate:.3g}% 时，若真有 20% 的差异，则有 80% 的把握看出来（双侧检验，α = 0.05，"
            f"且不带该标签的曝光同样多）：每个标签约需 {needed:,} 次曝光。"
        )
    return (
        f"Often enough means: at a click rate of {100 * rate:.3g} %, 20 % more clicks would be seen with a power of"
        f" 80 % (two-sided, α = 0.05, as many exposures without the tag): about {needed:,} exposures of each."
    )


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def ends_of(label: str) -> tuple[float, float] | None:
    """From and below which numbers a segment is, `[lo, hi)`; None where it is of a text or missing.

    >>> ends_of("[30, inf)"), ends_of("beginner")
    ((30.0, inf), None)
    """
    found = re.fullmatch(r"\[(-inf|-?[\d.]+(?:e[-+]?\d+)?), (inf|-?[\d.]+(?:e[-+]?\d+)?)\)", label, re.ASCII)
    try:
        return None if found is None else (float(found[1]), float(found[2]))
    except ValueError:  # such as [1.2.3, 4): a text that looks like it
        return None


def who(segment: Names, language: Language = "en") -> str:
    """The users of a segment; without a field, all of them."""
    if language == "zh":
        return f"{_before_han('、'.join(_field_zh(n, v) for n, v in segment.items()))}的用户" if segment else "所有用户"
    return f"Users with {' and '.join(_field(n, label) for n, label in segment.items())}" if segment else "All users"


def tag_words(tag: Names, language: Language = "en") -> str:
    """A tag, or several: `image_style=flat and subject=gold`."""
    if language == "zh":
        return "与".join(f"{plain(d)}“{plain(value).replace('|', '、')}”" for d, value in tag.items())
    return " and ".join(f"{plain(dimension)}={plain(value)}" for dimension, value in tag.items())


def plain(text: str) -> str:
    """The text on one line, without what could steer a terminal or turn text around, cut where it is long.

    >>> plain("a\\n\\x1b[31mb\\u202e")
    'a [31mb'
    """
    text = " ".join(printable(" ".join(text.split())).split())
    return text if len(text) <= LONG else f"{text[: LONG - 1]}…"


def _field(name: str, label: str) -> str:
    ends = ends_of(label)
    if ends is None:
        return f"{plain(name)}={plain(label)}"
    start, below = _digits(label)
    words = ([f"from {start}"] if math.isfinite(ends[0]) else []) + (
        [f"below {below}"] if math.isfinite(ends[1]) else []
    )
    return f"{plain(name)} {' to '.join(words)}"


def _field_zh(name: str, label: str) -> str:
    ends = ends_of(label)
    if label == "missing":
        return f"{plain(name)} 未知"
    if ends is None:
        return f"{plain(name)} 为{_value_zh(label)}"
    start, below = _digits(label)
    if math.isfinite(ends[0]):
        words = f"为 {start} 至不满 {below}" if math.isfinite(ends[1]) else f"为 {start} 及以上"
    else:
        words = f"不满 {below}"
    return f"{plain(name)} {words}"


def _digits(label: str) -> tuple[str, str]:
    """The label's own digits, which tell the edges apart."""
    start, _, below = label[1:-1].partition(", ")
    return start, below


def _size(effect: float, language: Language = "en") -> str:
    """Of an effect without its sign, in whole percent from ten on."""
    percent = 100 * abs(effect)
    number = f"{percent:,.0f}" if percent >= 9.95 else f"{percent:.1f}"
    return f"{number}%" if language == "zh" else f"{number} %"


def _way_zh(effect: float) -> str:
    """Of an effect that is a share, not percentage points."""
    return "相对高出" if effect > 0 else "相对低"


def _range(low: float, high: float, language: Language = "en") -> str:
    """An interval of effects, with the way of each end where they differ."""
    if low < 0 < high:
        if language == "zh":
            return f"从低 {_size(low, 'zh')} 到高 {_size(high, 'zh')}"
        return f"{_size(low)} lower to {_size(high)} higher"
    near, far = sorted((low, high), key=abs)
    way = high > 0 or (high == 0 == low)
    if language == "zh":
        return f"{'高' if way else '低'} {_size(near, 'zh')} 至 {_size(far, 'zh')}"
    return f"{_size(near)} to {_size(far)} {'higher' if way else 'lower'}"


def _q(q_value: float) -> str:
    return "q < 0.001" if q_value < 0.001 else f"q = {q_value:.2g}"


def _after_han(text: str) -> str:
    """With a space between a Chinese character before it and a Latin one of its own."""
    return f" {text}" if text[:1].isascii() else text


def _before_han(text: str) -> str:
    return f"{text} " if text[-1:].isascii() else text


def _value_zh(value: str) -> str:
    """A number as it is, a text in quotes."""
    return f" {value}" if re.fullmatch(r"-?\d+(\.\d+)?", value, re.ASCII) else f"“{plain(value)}”"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
