"""The report: complete, self-contained, the same every time, and nothing in a log can break out of the page."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from kaleidoscope import advice
from kaleidoscope.commands.report import Evidence, render_report
from kaleidoscope.vocabulary import Policy, Verdict
from tests.html_page import Page


def value(rate: float, half_width: float) -> dict[str, float]:
    limits = {"ci_low": rate - half_width, "ci_high": rate + half_width}
    return {"value": rate, "se": half_width / 1.96, **limits, "ess": 2_345.0}


SUMMARY: dict[str, Any] = {
    "rows": 12_684,
    "units": 569,
    "variants": 10,
    "positive_rate": 0.5684,
    "checks": [
        {"code": "duplicated_rows", "level": "warning", "message": "74 rows repeat an earlier row"},
        {"code": "varies_within_unit", "level": "info", "message": "user column 'age' changes within 4 units"},
    ],
    "srm": {"p_value": 0.41, "flagged": False},
    "exposure_independence": {"p_value": 0.63, "dependent": False},
    "model": {
        "auc": 0.7612,
        "logloss": 0.5801,
        "ece": 0.0123,
        "baseline_auc": {"user_only": 0.581, "variant_only": 0.734, "main_effects": 0.752, "lightgbm": None},
    },
    "policy_value": {
        "uniform": value(0.568, 0.011),
        "best_single": value(0.701, 0.019),
        "best_per_context": value(0.712, 0.018),
        "personalised": value(0.736, 0.019),
    },
    "personalisation_gain": {
        "over": "best_per_context", "value": 0.024, "se": 0.0092, "ci_low": 0.006, "ci_high": 0.042,
        "permutation_p": 0.01,
    },
    "verdict": "personalise",
    "insights": None,
    "main_effects": None,
    "timings_s": {"read": 0.3, "cross-fit": 20.1},
    "versions": {"kaleidoscope": "0.1.0"},
    "seed": 7,
}  # fmt: skip
EVIDENCE = Evidence(
    log_name="coupons.csv",
    scene="Coupon",
    simulated=False,
    calibration=[(0.2, 0.22, 900.0), (0.5, 0.48, 2_000.0), (0.8, 0.81, 700.0)],
    grouped_auc=None,
    other_estimators={policy: {"ips": value(0.75, 0.04), "snips": None} for policy in Policy},
    assumption="the propensities are right",
    method="dr, matched",
    support={"mean_eligible": 3.4, "variants": 10.0, "matched_rows_personalised": 4_021.0},
    propensities="estimated from context",
    srm_groups=[],
    srm_arms=[],
    user_columns=["age", "income"],
    context_columns=["destination"],
    variant_columns=["coupon"],
)
NOTHING = SUMMARY | {
    "positive_rate": None, "units": None, "srm": None, "personalisation_gain": None, "model": None,
    "exposure_independence": {"p_value": None, "dependent": False}, "verdict": "inconclusive",
    "policy_value": dict.fromkeys(Policy), "timings_s": {}, "versions": {},
    "checks": [{"code": code, "level": "info", "message": "…"} for code in ("no_context", "no_user_features")],
}  # fmt: skip
NO_EVIDENCE = replace(
    EVIDENCE, calibration=[], other_estimators={}, support={}, user_columns=[], context_columns=[], variant_columns=[]
)


@cache
def html() -> str:
    return render_report(SUMMARY, EVIDENCE)


def page(evidence: Evidence = EVIDENCE, **changed: Any) -> Page:
    return Page(render_report(SUMMARY | changed, evidence) if changed or evidence is not EVIDENCE else html())


def words(evidence: Evidence = EVIDENCE, **changed: Any) -> str:
    """The text of a page without pictures, which are what takes time."""
    bare = {"policy_value": dict.fromkeys(Policy), "model": None}
    return page(replace(evidence, calibration=[]), **bare, **changed).text


def test_says_the_verdict_the_values_and_what_to_do() -> None:
    text = page().text
    assert advice.verdict_sentence(SUMMARY) in text
    assert "73.6 % (71.7 to 75.5)" in text  # personalised, doubly robust
    assert "4,021" in text and "2,345" in text and "75.0 % (71.0 to 79.0)" in text  # matched, effective, IPS
    for step in advice.next_steps(SUMMARY):
        assert step in text
    assert "12,684" in text and "569" in text and "56.8 %" in text
    assert "Relative to the best variant per context (71.2 %)" in text and "+3.4 % (about 0.8 to 5.9 %)" in text


def test_shows_the_auc_in_words_and_that_it_does_not_decide() -> None:
    text = page().text
    assert "0.761" in text and "0.734" in text
    assert "in 76 of 100 such pairs" in text
    assert "AUC does not decide the verdict." in text


def test_shows_the_auc_within_users_only_where_users_repeat() -> None:
    assert "AUC within users" not in page().text
    text = words(replace(EVIDENCE, grouped_auc=0.6841))
    assert "68 of 100 pairs (AUC within users 0.684, weighted by their exposures)" in text


def test_says_how_it_was_made() -> None:
    text = page().text
    assert "dr, matched" in text and "the propensities are right" in text and "estimated from context" in text
    assert "destination" in text and "20.1 s" in text and "0.1.0" in text


def test_every_picture_is_described() -> None:
    pictures = [attributes for tag, attributes in page().elements if tag == "svg"]
    assert len(pictures) == 3
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)
    assert "Personalised (best per user): 73.6 % (71.7 to 75.5)" in str(pictures[0]["aria-label"])


def test_nothing_comes_from_outside() -> None:
    assert not re.search(r"https?:|//\w|@import|@font-face", html())
    assert "default-src 'none'" in html()
    found = page()
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in found.elements
    }
    references = [v for _, a in found.elements for k, v in a.items() if k in ("src", "href", "xlink:href")]
    assert references and all(str(reference).startswith("#") for reference in references)


def test_ids_are_unique_and_references_find_theirs() -> None:
    ids = [a["id"] for _, a in page().elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html())) <= set(ids)


def test_the_same_input_gives_the_same_page() -> None:
    assert render_report(deepcopy(SUMMARY), replace(EVIDENCE)) == html()


def test_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    render_report(SUMMARY, EVIDENCE)
    assert dict(matplotlib.rcParams) == before


def test_text_from_a_log_cannot_become_markup() -> None:
    evil = "<script>alert('x')</script>\"'`<b>`$\\frac$"
    insight = {
        "segment": {evil: evil}, "tag": {evil: evil}, "effect": 0.1, "preference": None, "ci_low": 0.0, "ci_high": 0.2,
        "q_value": 0.01, "n": 10, "methods": [], "explained_by": [],
    }  # fmt: skip
    evidence = replace(
        EVIDENCE, log_name=evil, scene=evil, assumption=evil, method=evil, propensities=evil, support={evil: 1.0},
        srm_groups=[(evil, 1e-9, 10)], srm_arms=[(evil, 0.3, 0.25)],
        user_columns=[evil], context_columns=[evil], variant_columns=[evil],
    )  # fmt: skip
    evil_html = render_report(
        SUMMARY
        | {
            "checks": [{"code": evil, "level": level, "message": evil} for level in ("error", "warning", "info")],
            "insights": [insight],
            "main_effects": [insight],
            "versions": {evil: evil},
            "timings_s": {evil: 1.0},
        },
        evidence,
    )
    found = Page(evil_html)
    assert "<script" not in evil_html and "<b>" not in evil_html
    assert found.count("script") == found.count("b") == 0
    assert found.text.count(evil) > 20
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]


def test_simulated_data_say_so_first() -> None:
    text = words(replace(EVIDENCE, simulated=True))
    assert text.index("Simulated data") < text.index("12,684")
    assert "simulated" not in page().text.lower()


@pytest.mark.parametrize("verdict", list(Verdict))
def test_renders_where_nothing_is_known(verdict: Verdict) -> None:
    found = page(NO_EVIDENCE, **NOTHING | {"verdict": str(verdict)})
    assert found.count("svg") == 0
    assert "no user columns" in found.text and "no context columns" in found.text
    assert "None" not in found.text and "nan" not in found.text


@pytest.mark.parametrize("missing", [Policy.UNIFORM, Policy.PERSONALISED])
def test_renders_without_one_policy(missing: Policy) -> None:
    found = page(policy_value=SUMMARY["policy_value"] | {missing: None}, verdict="inconclusive")
    assert "unknown: too little data" in found.text
    assert found.count("svg") == 3


def test_renders_without_measures_of_the_model() -> None:
    found = page(model=SUMMARY["model"] | dict.fromkeys(["auc", "logloss", "ece"]))
    assert found.count("svg") == 3
    assert "AUC is unknown" in found.text and "None" not in found.text


def test_renders_extreme_rates() -> None:
    certain = {"value": 0.0, "se": 0.0, "ci_low": 0.0, "ci_high": 0.0, "ess": 250.0}
    evidence = replace(EVIDENCE, calibration=[(0.0, 0.0, 3.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.0)])
    assert page(policy_value=dict.fromkeys(Policy, certain), positive_rate=1e-5, evidence=evidence).count("svg") == 3


def test_tells_the_levels_of_findings_apart_by_words() -> None:
    checks = [{"code": f"c{level}", "level": level, "message": f"m{level}"} for level in ("info", "error", "warning")]
    text = words(checks=checks)
    assert text.index("✖ Error") < text.index("▲ Warning") < text.index("ℹ Note")
    assert "The data checks found 1 error" in text


def test_folds_many_warnings_away_but_loses_none() -> None:
    checks = [{"code": "c", "level": "warning", "message": f"finding number {i}."} for i in range(40)]
    text = words(checks=checks)
    assert "32 more" in text
    assert all(f"finding number {i}." in text for i in range(40))


def test_a_flagged_srm_is_a_caution_with_its_groups() -> None:
    groups = [(f"test-{i}", 1e-9, 100) for i in range(163)]
    evidence = replace(EVIDENCE, srm_groups=groups, srm_arms=[("blue", 0.31, 0.25)])
    text = words(evidence, srm={"p_value": 1e-12, "flagged": True})
    assert "Caution: Variants were not shown in their designed shares" in text
    assert "163 groups" in text and "test-19" in text and "test-20" not in text and "143 more groups" in text
    assert "blue" in text and "31.0 %" in text and "25.0 %" in text


@pytest.mark.parametrize(
    ("p", "dependent", "propensities", "said"),
    [
        (None, False, "known", "names no user columns"),
        (0.6, False, "known", "Nothing suggests that users were shown variants by who they are (p = 0.60)"),
        (0.01, False, "known", "A trace of dependence on the user (p = 0.01)"),
        (0.01, True, "known", "The log records the propensities"),
        (0.01, True, "estimated from context", "differences between their audiences"),
    ],
)
def test_says_whether_exposure_depended_on_the_user(
    p: float | None, dependent: bool, propensities: str, said: str
) -> None:
    evidence = replace(EVIDENCE, propensities=propensities)
    assert said in words(evidence, exposure_independence={"p_value": p, "dependent": dependent})


def test_a_log_that_supports_no_claim_gets_the_reason_instead_of_values() -> None:
    check = {"code": advice.NO_CLAIM, "level": "error", "message": "What was shown depended on the user."}
    nothing = {"policy_value": dict.fromkeys(Policy), "personalisation_gain": None, "verdict": "inconclusive"}
    evidence = replace(EVIDENCE, other_estimators={}, method="", support={"mean_eligible": 3.4, "variants": 10.0})
    found = page(evidence, checks=[check], **nothing)
    assert "No value is given for any way of choosing" in found.text and "No values are estimated." in found.text
    assert found.count("table") == 0 and found.count("svg") == 2  # calibration and AUC stay
    assert "Effective exposures" not in found.text and "Relative to" not in found.text


def test_effective_exposures_are_not_called_matched_under_pseudo_inverse_weights() -> None:
    matched = words()
    assert "Matched exposures: how many happened to show what the policy would have shown." in matched
    assert "Rates of tags rather multiply" not in matched and "with the same tags" not in matched
    assert "or a variant with the same tags." in words(replace(EVIDENCE, method="dr, marginalised"))
    support = {"mean_eligible": 900.0, "variants": 1_000.0, "matched_rows_uniform": 60_000.0}
    evidence = replace(EVIDENCE, method="dr, pseudo_inverse", support=support)
    found = page(evidence)
    assert "effective exposures are all that can be counted" in found.text
    assert "IPS and self-normalised IPS may lie far below the click rate" in found.text
    cells = re.findall(r'data-label="Matched exposures" class="number">([^<]*)<', render_report(SUMMARY, evidence))
    assert cells == ["60,000", "", "", ""]


def test_lift_is_left_out_where_its_base_is_hardly_known() -> None:
    shaky = SUMMARY["policy_value"] | {"best_per_context": value(0.02, 0.015)}
    assert "Relative to" not in page(policy_value=shaky).text


def test_attribution_is_shown_when_it_is_there() -> None:
    assert "Who prefers what" not in page().text and "What works for everybody" not in page().text
    effect = {"tag": {"copy": "question"}, "effect": -0.1, "ci_low": -0.13, "ci_high": -0.07, "q_value": 1e-5, "n": 4e4}
    insight = effect | {"segment": {"age": "[20, 30)"}, "preference": 0.91, "methods": [], "explained_by": []}
    text = words(insights=[insight], main_effects=[effect] * 25)
    assert "age = [20, 30)" in text and "× 0.91" in text
    assert "copy = question" in text and "−10.0 %" in text and "40,000" in text and "And 5 more" in text


def test_reads_a_summary_as_json_gives_it_back(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    read = json.loads((tmp_path / "summary.json").read_text())
    assert render_report(read, EVIDENCE) == html()
