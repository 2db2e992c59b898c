"""What a `learn` summary means, in words: the verdict as a sentence, what to do next, and numbers as people read them.

Pure functions of the dict that is summary.json; the command line and the report say the same thing through them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kaleidoscope.vocabulary import Level, Policy, Verdict

Summary = Mapping[str, Any]

# As an error: what the log showed depended on the user, with probabilities nobody knows. It supports no claim.
NO_CLAIM = "exposure_depends_on_user"
NO_CONTEXT, NO_USER_FEATURES = "no_context", "no_user_features"
TOO_LITTLE_DATA = "too little data"
SRM = "sample_ratio_mismatch"

POLICY_WORDS = {
    Policy.UNIFORM: "a random variant",
    Policy.BEST_SINGLE: "the best single variant",
    Policy.BEST_PER_CONTEXT: "the best variant per context",
    Policy.PERSONALISED: "choosing per user",
}
MAX_MATCHED_VARIANTS = 100  # beyond, values come from tags rather than from rows that showed the very variant
SMALLEST_ARM = 1_000  # exposures: a test of fewer runs for less than a day, and tomorrow may differ
HOPELESS = 100.0  # times the data: nobody waits for that


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def percent(share: float, half_width: float | None = None) -> str:
    """A rate as a percentage, with the digits that its interval's half-width supports, or with three.

    >>> percent(0.5678), percent(0.01523), percent(0.5678, half_width=0.02)
    ('56.8 %', '1.52 %', '56.8 %')
    """
    return f"{_number(100 * share, _digits(share, half_width))} %"


def interval(low: float, high: float) -> str:
    """An interval in hundredths without its unit: percentages of rates, percentage points of gains.

    >>> interval(-0.009, 0.0151)
    '−0.9 to 1.5'
    """
    digits = _digits(high, (high - low) / 2)
    return f"{_number(100 * low, digits)} to {_number(100 * high, digits)}"


def points(gain: Mapping[str, Any]) -> str:
    """A gain in percentage points with its sign.

    >>> points({"value": 0.024, "ci_low": 0.006, "ci_high": 0.042})
    '+2.4'
    """
    text = _number(100 * gain["value"], _digits(gain["value"], (gain["ci_high"] - gain["ci_low"]) / 2))
    return text if text.startswith("−") or not text.strip("0.") else f"+{text}"


def p_text(p: float) -> str:
    """A p-value: two digits, or below .001."""
    return "below 0.001" if p < 0.001 else f"{p:.2f}" if p >= 0.1 else f"{p:.2g}"


def round_count(n: float) -> str:
    """A number of rows to two significant digits: estimates of effort deserve no more.

    >>> round_count(23_456), round_count(7.4e6)
    ('23,000', '7.4 million')
    """
    if n >= 1e9:
        return "more than a billion"
    rounded = float(f"{n:.2g}")
    return f"{rounded / 1e6:g} million" if rounded >= 1e6 else f"{rounded:,.0f}"


def _digits(value: float, half_width: float | None) -> int:
    """Decimals of a percentage: the half-width keeps one digit, or two where it starts with 1 or 2."""
    if half_width is not None and half_width > 0:
        return min(6, max(1, math.ceil(-math.log10(100 * half_width / 3))))
    return min(6, max(0, 2 - math.floor(math.log10(100 * abs(value))))) if value else 0


def _number(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text.replace("-", "−") if text.strip("-0.,") else text.removeprefix("-")


# ── the verdict ─────────────────────────────────────────────────────────────────────────────────────────────────────


def verdict_sentence(summary: Summary) -> str:
    """The verdict as one plain sentence, with the number and the interval it rests on."""
    match Verdict(summary["verdict"]):
        case Verdict.PERSONALISE:
            gain = summary["personalisation_gain"]
            if gain is None:
                return "Personalise: choosing the variant for each user is worth it."
            return f"Personalise: choosing per user earns {_gain_words(gain)} more than {_over(gain)}."
        case Verdict.BEST_PER_CONTEXT:
            beats = _against(summary, Policy.BEST_PER_CONTEXT, Policy.BEST_SINGLE)
            return f"Choose the best variant per context: {beats}; {_no_more(summary, Policy.BEST_PER_CONTEXT)}."
        case Verdict.BEST_SINGLE:
            beats = _against(summary, Policy.BEST_SINGLE, Policy.UNIFORM)
            return f"Show the best single variant to everybody: {beats}; {_no_more(summary, Policy.BEST_SINGLE)}."
        case Verdict.INCONCLUSIVE:
            return f"Inconclusive: {_why_inconclusive(summary)}."


def supports_no_claim(summary: Summary) -> bool:
    """Whether the log chose by the user with unknown probabilities, so that nothing can be concluded from it."""
    return any(check["code"] == NO_CLAIM and check["level"] == Level.ERROR for check in summary["checks"])


def other_errors(summary: Summary) -> int:
    """How many errors the checks found that are not spoken of elsewhere, as SRM and exposure by user are."""
    return sum(check["level"] == Level.ERROR and check["code"] not in (NO_CLAIM, SRM) for check in summary["checks"])


def no_values(summary: Summary) -> str | None:
    """Why no policy has a value, as a sentence, where the log supports no claim about any; otherwise None."""
    if not supports_no_claim(summary):
        return None
    return (
        "No value is given for any way of choosing: which variant was shown depended on the user, and the log does not"
        " say with which probabilities, so a difference between variants may be one between the people who saw them."
    )


def why_unknown(summary: Summary, policy: Policy) -> str:
    """Why a policy has no value, in a few words."""
    codes = {check["code"] for check in summary["checks"]}
    if policy is Policy.BEST_PER_CONTEXT and NO_CONTEXT in codes:
        return "no context columns"
    if policy is Policy.PERSONALISED and NO_USER_FEATURES in codes:
        return "no user columns"
    return "the log supports no claim" if supports_no_claim(summary) else TOO_LITTLE_DATA


def unknown_policies(summary: Summary) -> list[Policy]:
    """The policies that should have a value and have none, because there is too little data.

    A policy the log cannot have (choosing per user without user columns) is not among them.
    """
    return [
        policy
        for policy in Policy
        if summary["policy_value"][policy] is None and why_unknown(summary, policy) == TOO_LITTLE_DATA
    ]


def _why_inconclusive(summary: Summary) -> str:
    if supports_no_claim(summary):
        return (
            "which variant was shown depended on the user, and the log does not say with which probabilities, so it"
            " supports no claim about what another way of choosing would earn"
        )
    unknown = unknown_policies(summary)
    if unknown:
        names = _listed([POLICY_WORDS[policy] for policy in unknown])
        return f"this log holds too little data to say what {names} would earn"
    gain = summary["personalisation_gain"]
    nothing = "no way of choosing is shown to earn more than the next simpler one"
    if gain is None:
        return nothing
    if gain["ci_low"] > 0:
        seen = f"choosing per user seems to earn {_gain_words(gain)} more than {_over(gain)}, but"
        if gain["permutation_p"] is None:
            return f"{seen} the check against shuffled users could not be made"
        if gain["permutation_p"] > 0.05:
            return f"{seen} as much turns up when users are shuffled (p = {p_text(gain['permutation_p'])})"
        return f"{seen} the exposure was not independent of the user"
    return f"{nothing}, and {_gain_unproven(gain)}"


def _no_more(summary: Summary, advised: Policy) -> str:
    """That the more complex policies are not shown to earn more than the advised one."""
    gain = summary["personalisation_gain"]
    if gain is None or gain["over"] != advised:
        what = "choosing per user" if advised is Policy.BEST_PER_CONTEXT else "choosing per context or per user"
        return f"nothing shows that {what} adds to it"
    if gain["ci_high"] <= 0:
        return _gain_unproven(gain)
    if gain["ci_low"] <= 0:
        return f"choosing per user would add {_gain_words(gain)}, which may be nothing"
    p = "" if gain["permutation_p"] is None else f" (p = {p_text(gain['permutation_p'])})"
    return f"choosing per user seems to add {_gain_words(gain)}, but shuffled users gain as much{p}"


def _gain_unproven(gain: Mapping[str, Any]) -> str:
    """What a gain whose interval does not lie above 0 says: how large it can still be."""
    if gain["se"] == 0:
        return f"the model found no preference it trusts, so choosing per user is the same as {_over(gain)}"
    limits = interval(gain["ci_low"], gain["ci_high"])
    if gain["ci_high"] <= 0:
        return f"choosing per user earns no more than {_over(gain)} (95 % interval {limits} percentage points)"
    largest = limits.rpartition(" ")[2]
    return (
        f"choosing per user is not shown to earn more than {_over(gain)}: {points(gain)} percentage points (95 %"
        f" interval {limits}), so a gain above {largest} is unlikely"
    )


def _against(summary: Summary, policy: Policy, simpler: Policy) -> str:
    ours, theirs = summary["policy_value"][policy], summary["policy_value"][simpler]
    if ours is None or theirs is None:
        return f"it earns more than {POLICY_WORDS[simpler]}"
    half, half_simpler = ((value["ci_high"] - value["ci_low"]) / 2 for value in (ours, theirs))
    return (
        f"it earns {percent(ours['value'], half)} (95 % interval {interval(ours['ci_low'], ours['ci_high'])}), more"
        f" than {POLICY_WORDS[simpler]} with {percent(theirs['value'], half_simpler)}"
    )


def _gain_words(gain: Mapping[str, Any]) -> str:
    return f"{points(gain)} percentage points (95 % interval {interval(gain['ci_low'], gain['ci_high'])})"


def _over(gain: Mapping[str, Any]) -> str:
    return POLICY_WORDS[Policy(gain["over"])]


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# ── what to do next ─────────────────────────────────────────────────────────────────────────────────────────────────


def next_steps(summary: Summary) -> list[str]:
    """What to do now, most urgent first: one or two sentences each."""
    steps = []
    if other_errors(summary):
        steps.append("Resolve the errors under “Data checks” and run `kaleidoscope learn` again before acting on this.")
    if summary["srm"] is not None and summary["srm"]["flagged"]:
        steps.append(
            "Find out why variants were not shown in their designed shares (caching, bots, redirects, filters after the"
            " assignment) and leave the affected time or groups out. Until then take every number here with caution."
        )
    match Verdict(summary["verdict"]):
        case Verdict.PERSONALISE:
            steps += _prove(summary, Policy.PERSONALISED)
            steps.append(
                "Keep showing random variants to a small share of users (5 to 10 %), and log every exposure with its"
                " propensity, so that the model can be re-trained and this gain measured again."
            )
        case Verdict.BEST_PER_CONTEXT:
            steps += _prove(summary, Policy.BEST_PER_CONTEXT)
            steps += _settle(summary)
        case Verdict.BEST_SINGLE:
            steps += _prove(summary, Policy.BEST_SINGLE)
            steps += _settle(summary)
        case Verdict.INCONCLUSIVE:
            steps += _unblock(summary)
    return steps


def _prove(summary: Summary, policy: Policy) -> list[str]:
    """An A/B test of the advised policy against the simpler one, with its size."""
    gain, values = summary["personalisation_gain"], summary["policy_value"]
    simpler = {Policy.BEST_PER_CONTEXT: Policy.BEST_SINGLE, Policy.BEST_SINGLE: Policy.UNIFORM}.get(policy)
    lift = None
    if policy is Policy.PERSONALISED and gain is not None:
        simpler, lift = Policy(gain["over"]), gain["value"]
    base = values[simpler] if simpler is not None else None
    if lift is None and base is not None and values[policy] is not None:
        lift = values[policy]["value"] - base["value"]
    other = "what you show today" if simpler is None else POLICY_WORDS[simpler]
    ours = "the personalised choice" if policy is Policy.PERSONALISED else POLICY_WORDS[policy]
    step = f"Prove it live: an A/B test of {ours} against {other}, split by user."
    if base is None or lift is None or lift <= 0:
        return [step]
    # 16·p(1 − p)/d² per arm: 80 % power at the 5 % level (Lehr 1992).
    arm = max(SMALLEST_ARM, 16 * base["value"] * (1 - base["value"]) / lift**2)
    return [
        f"{step} If the gain is what this log suggests, about {round_count(arm)} exposures per arm show it four times"
        " out of five (more, if users come back often)."
    ]


def _settle(summary: Summary) -> list[str]:
    """Whether more data of the same kind would settle what personalising is worth."""
    gain, rows = summary["personalisation_gain"], summary["rows"]
    if any(check["code"] == NO_USER_FEATURES for check in summary["checks"]):
        return ["To learn whether users differ, name their features under `user` in the schema."]
    if gain is None:
        return []
    half = (gain["ci_high"] - gain["ci_low"]) / 2
    bolder = (
        "What pays more: variants that differ more from each other, and user features that say more about what people"
        " want"
    )
    if gain["ci_low"] > 0:
        return [
            f"Collect more data before personalising: with twice the rows ({round_count(2 * rows)}) the check against"
            " shuffled users can tell more."
        ]
    if gain["ci_high"] <= 0 or gain["value"] <= 0:
        return [f"Do not expect more data of this kind to make a case for choosing per user. {bolder}."]
    times = (half / gain["value"]) ** 2
    if times > HOPELESS:
        return [
            "The gain of choosing per user, if there is any, is too small to be shown with any realistic amount of such"
            f" data. {bolder}."
        ]
    return [
        f"To settle whether choosing per user pays: if the gain really is {points(gain)} percentage points, its"
        f" interval would clear 0 with about {round_count(rows * max(times, 1.0))} rows ({max(times, 1.0):.2g} times"
        " this log); plan for twice that. Four times this log halves the interval."
    ]


def _unblock(summary: Summary) -> list[str]:
    """What keeps a log from a verdict, and how to get one that supports it."""
    if supports_no_claim(summary):
        return [
            "Show random variants to a share of users (a random bucket, 5 to 10 % of the traffic), log them, and run"
            f" this on that bucket alone{_bucket_size(summary)}.",
            "Or log the propensity: the probability, at the moment of choosing, of the variant that was shown, and name"
            " its column under `propensity` in the schema.",
            "If the column that decided is not about the user (a device, a campaign, a weekday), put it under"
            " `context`.",
        ]
    unknown = unknown_policies(summary)
    if unknown:
        steps = [
            "Collect more exposures, with variants shown at random to a share of users"
            f"{_bucket_size(summary)}. Each unknown value needs 200 exposures, 30 of them clicked, that showed what the"
            " policy would have shown."
        ]
        if unknown == [Policy.BEST_PER_CONTEXT]:
            steps.append("Or name fewer context columns, so that each context holds more of the data.")
        elif summary["variants"] > 2:
            steps.append(
                f"Or test fewer variants at a time than {summary['variants']:,}, or give them tags that they share, so"
                " that the data say more about each."
            )
        return steps
    steps = _settle(summary)
    if summary["personalisation_gain"] is None or summary["personalisation_gain"]["ci_low"] <= 0:
        steps.append(
            "Until then this log gives no reason to prefer one way of choosing: take the simplest, and let cost, brand"
            " or accessibility decide between variants."
        )
    return steps


def _bucket_size(summary: Summary) -> str:
    """How many exposures at least a log needs where every variant is equally likely, if that can be said."""
    variants, rate = summary["variants"], summary["positive_rate"]
    if not rate or variants > MAX_MATCHED_VARIANTS:
        return ""
    return f" (with {variants:,} variants at least about {round_count(variants * max(200, 30 / rate))} exposures)"
