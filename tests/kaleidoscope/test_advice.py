"""What a summary means in words: one sentence per verdict, and steps that fit it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from kaleidoscope import advice
from kaleidoscope.vocabulary import Policy, Verdict


def value(rate: float, half_width: float = 0.01) -> dict[str, float]:
    return {"value": rate, "se": half_width / 2, "ci_low": rate - half_width, "ci_high": rate + half_width, "ess": 9e3}


def gain(
    rate: float, low: float, high: float, p: float | None = 0.01, over: str = "best_per_context"
) -> dict[str, Any]:
    return {"over": over, "value": rate, "se": 0.01, "ci_low": low, "ci_high": high, "permutation_p": p}


def summary(verdict: str, **changed: Any) -> dict[str, Any]:
    return {
        "rows": 10_000,
        "variants": 4,
        "positive_rate": 0.1,
        "checks": [],
        "srm": None,
        "exposure_independence": {"p_value": 0.5, "dependent": False},
        "policy_value": {p: value(0.1 + 0.02 * i) for i, p in enumerate(Policy)},
        "personalisation_gain": gain(0.008, -0.008, 0.024),
        "verdict": verdict,
        **changed,
    }


DEPENDENT: dict[str, Any] = {
    "exposure_independence": {"p_value": 0.01, "dependent": True},
    "checks": [{"code": advice.NO_CLAIM, "level": "error", "message": "…"}],
}


def without(*policies: str) -> dict[str, Any]:
    return {policy: None if policy in policies else value(0.1) for policy in Policy}


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (
            summary("personalise", personalisation_gain=gain(0.024, 0.006, 0.042)),
            "Personalise: choosing per user earns +2.4 percentage points (95 % interval 0.6 to 4.2) more than the best"
            " variant per context.",
        ),
        (
            summary("best_per_context"),
            "Choose the best variant per context: it earns 14.0 % (95 % interval 13.0 to 15.0), more than the best"
            " single variant with 12.0 %; choosing per user would add +0.8 percentage points (95 % interval −0.8 to"
            " 2.4), which may be nothing.",
        ),
        (
            summary("best_single"),
            "Show the best single variant to everybody: it earns 12.0 % (95 % interval 11.0 to 13.0), more than a"
            " random variant with 10.0 %; nothing shows that choosing per context or per user adds to it.",
        ),
        (
            summary("inconclusive"),
            "Inconclusive: no way of choosing is shown to earn more than the next simpler one, and choosing per user is"
            " not shown to earn more than the best variant per context: +0.8 percentage points (95 % interval −0.8 to"
            " 2.4), so a gain above 2.4 is unlikely.",
        ),
    ],
    ids=lambda case: case["verdict"] if isinstance(case, dict) else "",
)
def test_every_verdict_has_its_sentence(found: dict[str, Any], sentence: str) -> None:
    assert advice.verdict_sentence(found) == sentence


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (DEPENDENT, "depended on the user"),
        ({"policy_value": without("personalised"), "personalisation_gain": None}, "say what choosing per user would"),
        ({"policy_value": without("best_per_context"), "personalisation_gain": None}, "the best variant per context"),
        (
            {"policy_value": without("best_single", "personalised"), "personalisation_gain": None},
            "the best single variant or choosing per user would earn",
        ),
        ({"personalisation_gain": gain(0.012, 0.004, 0.02, p=0.23)}, "when users are shuffled (p = 0.23)"),
        ({"personalisation_gain": gain(0.012, 0.004, 0.02, p=None)}, "could not be made"),
        ({"personalisation_gain": gain(-0.012, -0.02, -0.004)}, "earns no more than the best variant per context"),
        ({"personalisation_gain": None}, "no way of choosing is shown to earn more than the next simpler one."),
    ],
)  # fmt: skip
def test_inconclusive_says_why(changed: dict[str, Any], said: str) -> None:
    sentence = advice.verdict_sentence(summary("inconclusive", **changed))
    assert sentence.startswith("Inconclusive: ") and said in sentence


def test_known_propensities_make_exposure_by_user_no_reason() -> None:
    known = DEPENDENT | {"checks": [{"code": advice.NO_CLAIM, "level": "warning", "message": "…"}]}
    assert "depended on the user" not in advice.verdict_sentence(summary("inconclusive", **known))


def test_a_policy_the_log_cannot_have_is_not_called_unknown() -> None:
    for policy, code, why in [
        (Policy.PERSONALISED, "no_user_features", "no user columns"),
        (Policy.BEST_PER_CONTEXT, "no_context", "no context columns"),
    ]:
        absent = summary("best_single", policy_value=without(policy), personalisation_gain=None)
        assert advice.unknown_policies(absent) == [policy]
        assert advice.why_unknown(absent, policy) == "too little data"
        absent["checks"] = [{"code": code, "level": "info", "message": "…"}]
        assert advice.unknown_policies(absent) == []
        assert advice.why_unknown(absent, policy) == why


def test_no_policy_has_a_value_where_the_log_supports_no_claim() -> None:
    nothing = {"policy_value": dict.fromkeys(Policy), "personalisation_gain": None}
    found = summary("inconclusive", **DEPENDENT, **nothing)
    assert "does not say with which probabilities" in str(advice.no_values(found))
    assert advice.why_unknown(found, Policy.UNIFORM) == "the log supports no claim"
    assert advice.unknown_policies(found) == []
    assert advice.no_values(summary("inconclusive", **nothing)) is None


def test_a_log_without_user_columns_is_told_to_name_them() -> None:
    checks = [{"code": "no_user_features", "level": "info", "message": "…"}]
    found = summary("best_single", policy_value=without("personalised"), personalisation_gain=None, checks=checks)
    assert any("name their features under `user`" in step for step in advice.next_steps(found))


@pytest.mark.parametrize("verdict", list(Verdict))
@pytest.mark.parametrize("known", [True, False])
def test_there_is_one_sentence_and_something_to_do_whatever_is_known(verdict: Verdict, known: bool) -> None:
    nothing: dict[str, Any] = {
        "policy_value": dict.fromkeys(Policy), "personalisation_gain": None, "positive_rate": None,
        "exposure_independence": {"p_value": None, "dependent": False},
    }  # fmt: skip
    found = summary(verdict, **({} if known else nothing))
    sentence, steps = advice.verdict_sentence(found), advice.next_steps(found)
    assert sentence.endswith(".") and ". " not in sentence
    assert steps and all(step.endswith(".") for step in steps)
    assert "None" not in sentence + "".join(steps)


def test_a_proof_says_how_many_exposures_it_needs() -> None:
    found = summary("personalise", personalisation_gain=gain(0.02, 0.006, 0.034))
    # 16 · .14 · .86 / .02² = 4,816
    assert "about 4,800 exposures per arm" in advice.next_steps(found)[0]


def test_says_how_much_data_would_settle_the_gain() -> None:
    step = next(step for step in advice.next_steps(summary("best_per_context")) if step.startswith("To settle"))
    assert "about 40,000 rows (4 times this log)" in step


@pytest.mark.parametrize("found", [gain(-0.001, -0.02, 0.018), gain(0.0001, -0.02, 0.0202)])
def test_does_not_ask_for_data_that_would_not_help(found: dict[str, Any]) -> None:
    steps = " ".join(advice.next_steps(summary("best_per_context", personalisation_gain=found)))
    assert "To settle" not in steps and "variants that differ more" in steps


def test_a_log_without_a_claim_gets_a_random_bucket() -> None:
    steps = " ".join(advice.next_steps(summary("inconclusive", **DEPENDENT)))
    # 4 variants · max(200, 30 / .1)
    assert "random bucket" in steps and "about 1,200 exposures" in steps and "`propensity`" in steps


def test_srm_and_errors_come_first() -> None:
    error = {"code": "c", "level": "error", "message": "m"}
    steps = advice.next_steps(summary("personalise", srm={"p_value": 1e-9, "flagged": True}, checks=[error]))
    assert "errors" in steps[0] and "designed shares" in steps[1]
    srm = {"code": advice.SRM, "level": "error", "message": "m"}
    steps = advice.next_steps(summary("personalise", srm={"p_value": 1e-9, "flagged": True}, checks=[srm]))
    assert "designed shares" in steps[0]


@pytest.mark.parametrize(
    ("share", "half_width", "text"),
    [
        (0.5678, None, "56.8 %"), (0.015234, None, "1.52 %"), (0.000312, None, "0.0312 %"), (0.0, None, "0 %"),
        (1.0, None, "100 %"), (0.0152, 0.0007, "1.52 %"), (0.5678, 0.2, "56.8 %"), (-0.00001, 0.01, "0.0 %"),
        (-0.031, 0.01, "−3.1 %"),
    ],
)  # fmt: skip
def test_percentages_have_the_digits_that_are_known(share: float, half_width: float | None, text: str) -> None:
    assert advice.percent(share, half_width) == text


def test_a_gain_of_nothing_has_no_sign() -> None:
    assert advice.points(gain(0.0, 0.0, 0.0)) == "0"
    assert advice.points(gain(-0.0001, -0.01, 0.01)) == "0.0"


def test_needs_no_library_to_say_so() -> None:
    program = "import sys, kaleidoscope.advice; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"matplotlib", "jinja2", "numpy"}.isdisjoint(done.stdout.split())
