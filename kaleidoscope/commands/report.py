"""`report.html`: what `learn` found, in one self-contained file that a product manager understands.

Words come from `kaleidoscope.advice`, the page from report.html.j2, pictures are inline SVG. Nothing is estimated here.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from kaleidoscope import advice
from kaleidoscope.vocabulary import Level, Policy, Verdict

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 20  # rows of a list that may be long
SHOWN_CHECKS = 8  # warnings, before the rest is folded away

LABELS = {
    Policy.UNIFORM: "Random variant",
    Policy.BEST_SINGLE: "Best single variant for everybody",
    Policy.BEST_PER_CONTEXT: "Best variant per context",
    Policy.PERSONALISED: "Personalised (best per user)",
}
MODELS = {
    "network": "Kaleidoscope network",
    "lightgbm": "LightGBM",
    "main_effects": "Main effects, no user × variant",
    "variant_only": "Variant only",
    "user_only": "User only",
}
HEADLINES = {
    Verdict.PERSONALISE: "Personalise",
    Verdict.BEST_PER_CONTEXT: "Best variant per context",
    Verdict.BEST_SINGLE: "Best single variant",
    Verdict.INCONCLUSIVE: "Inconclusive",
}
MATCHED = "matched_rows_"  # and the policy: keys of `Evidence.support` that go into the table of values
SUPPORT_WORDS = {
    "mean_eligible": "Variants a policy may choose from, on average",
    "variants": "Variants in the log",
}

# Okabe & Ito's palette, which people with any colour vision tell apart.
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#6B7280", "#1F2933"
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # grid lines do not run through words
WIDTH_IN = 4.5  # narrow enough that text stays readable on a phone


@dataclass(frozen=True)
class Evidence:
    """What the report shows beyond summary.json."""

    log_name: str
    scene: str
    simulated: bool
    calibration: list[tuple[float, float, float]]  # (mean predicted, observed rate, exposures) per bin
    grouped_auc: float | None  # within users; None where they do not repeat
    other_estimators: dict[str, dict[str, dict[str, float] | None]]  # policy → "ips" | "snips" → value, se, interval
    assumption: str  # what the values assume, a sentence fragment
    method: str
    support: dict[str, float]  # "mean_eligible", "variants", "matched_rows_<policy>" (where rows can be counted)
    propensities: str  # "known" | "estimated from context"
    srm_groups: list[tuple[str, float, int]]  # failed groups: name, p, exposures
    srm_arms: list[tuple[str, float, float]]  # deviating arms: name, share, designed share
    user_columns: list[str]
    context_columns: list[str]
    variant_columns: list[str]


def render_report(summary: Mapping[str, Any], evidence: Evidence) -> str:
    """The report as one HTML page without anything from outside it; the same input gives the same page."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "percent": advice.percent, "prose": _prose, "pairs": _pairs, "relative": _relative, "p_text": advice.p_text,
    }  # fmt: skip
    template = environment.from_string(resources.files(__package__).joinpath("report.html.j2").read_text("utf-8"))
    verdict = Verdict(summary["verdict"])
    checks = {level: [check for check in summary["checks"] if check["level"] == level] for level in Level}
    return template.render(
        s=summary,
        e=evidence,
        verdict=verdict,
        headline=HEADLINES[verdict],
        sentence=advice.verdict_sentence(summary),
        no_values=advice.no_values(summary),
        lift=_lift(summary),
        cautions=_cautions(summary),
        steps=advice.next_steps(summary),
        policies=[_policy_row(policy, summary, evidence) for policy in Policy],
        policy_plot=_policy_plot(summary, evidence),
        calibration_plot=_calibration_plot(evidence),
        auc_plot=_auc_plot(summary["model"], evidence),
        auc_pairs=_auc_pairs(None if summary["model"] is None else summary["model"]["auc"]),
        grouped_pairs=_auc_pairs(evidence.grouped_auc),
        pseudo_inverse="pseudo_inverse" in evidence.method,
        marginalised="marginalised" in evidence.method,
        checks=checks,
        shown=SHOWN,
        shown_checks=SHOWN_CHECKS,
        support=[(SUPPORT_WORDS.get(key, _words(key)), f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
                 for key, value in evidence.support.items() if not key.startswith(MATCHED)],
        timings=_timings(summary["timings_s"]),
        exposure=_exposure(summary, evidence),
    )  # fmt: skip


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _prose(text: str) -> Markup:
    """Our own sentence as HTML: escaped, `code` set as code, and no line break between a number and its unit."""
    from markupsafe import Markup, escape

    joined = re.sub(r"(?<=\d) (?=%|million\b)", "\u00a0", text)
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(joined))))


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in values.items())


def _relative(share: float) -> str:
    return f"{100 * share:+.1f} %".replace("-", "−")


def _words(key: str) -> str:
    return key.replace("_", " ").capitalize()


def _lift(summary: Mapping[str, Any]) -> str | None:
    """The gain relative to what it is over, where that is well enough known to divide by."""
    gain = summary["personalisation_gain"]
    base = None if gain is None else summary["policy_value"][gain["over"]]
    if gain is None or base is None or base["value"] <= 0 or base["se"] > 0.1 * base["value"]:
        return None
    value, low, high = (gain[key] / base["value"] for key in ("value", "ci_low", "ci_high"))
    over = advice.POLICY_WORDS[Policy(gain["over"])]
    relative = advice.points({"value": value, "ci_low": low, "ci_high": high})
    half = (base["ci_high"] - base["ci_low"]) / 2
    return (
        f"Relative to {over} ({advice.percent(base['value'], half)}), choosing per user changes the click rate by"
        f" {relative} % (about {advice.interval(low, high)} %)."
    )


def _cautions(summary: Mapping[str, Any]) -> list[str]:
    """What stands between the verdict and acting on it."""
    cautions = []
    errors = advice.other_errors(summary)
    if errors:
        cautions.append(f"The data checks found {errors} error{'s' * (errors > 1)}: see “Data checks”.")
    if summary["srm"] is not None and summary["srm"]["flagged"]:
        cautions.append("Variants were not shown in their designed shares: see “Designed shares”.")
    return cautions


def _exposure(summary: Mapping[str, Any], evidence: Evidence) -> str:
    """Whether what was shown depended on the user, and what follows."""
    found, known = summary["exposure_independence"], evidence.propensities == "known"
    if found["p_value"] is None:
        return "Not tested: the schema names no user columns."
    p = f"(p = {advice.p_text(found['p_value'])})".replace("= below", "below")
    if not found["dependent"] and found["p_value"] <= 0.05:
        return (
            f"A trace of dependence on the user {p}: small, though values may be off by more than their intervals say."
        )
    if not found["dependent"]:
        return f"Nothing suggests that users were shown variants by who they are {p}."
    if known:
        return f"Which variant was shown depended on the user {p}. The log records the propensities, which corrects it."
    return (
        f"Which variant was shown depended on the user {p}, and the log does not record with which probabilities:"
        " differences between variants may be differences between their audiences."
    )


def _timings(timings: Any) -> list[tuple[str, str]]:
    stages = timings if isinstance(timings, Mapping) else {"total": timings}
    return [(_words(name), "unknown" if value is None else f"{value:.1f} s") for name, value in stages.items()]


def _policy_row(policy: Policy, summary: Mapping[str, Any], evidence: Evidence) -> dict[str, str]:
    """The cells of the table of policy values."""
    value = summary["policy_value"][policy]
    others = evidence.other_estimators.get(policy) or {}
    row = {"name": LABELS[policy], "value": _why_unknown(policy, summary), "ess": "", "matched": ""}
    matched = evidence.support.get(f"{MATCHED}{policy}")
    if matched is not None:
        row["matched"] = f"{matched:,.0f}"
    if value is not None:
        row |= {"value": _rate(value), "ess": f"{value['ess']:,.0f}"}
    known = {name: others.get(name) for name in ("ips", "snips")}
    return row | {name: "" if found is None else _rate(found) for name, found in known.items()}


def _rate(value: Mapping[str, float]) -> str:
    """A value with its interval: 56.8 % (55.7 to 57.9)."""
    return f"{advice.percent(value['value'], _half(value))} ({advice.interval(value['ci_low'], value['ci_high'])})"


def _half(value: Mapping[str, float]) -> float:
    return (value["ci_high"] - value["ci_low"]) / 2


def _why_unknown(policy: Policy, summary: Mapping[str, Any]) -> str:
    why = advice.why_unknown(summary, policy)
    return f"unknown: {why}" if why == advice.TOO_LITTLE_DATA else why


def _auc_pairs(auc: float | None) -> str | None:
    """AUC as the number of pairs out of 100 that the model puts in the right order."""
    return None if auc is None else f"{100 * auc:.0f}"


# ── pictures ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _figure(height_in: float, left_in: float = 0.1) -> tuple[Figure, Axes]:
    """A figure with one axes, margins fixed in inches: fitting them to the text would take longer than the drawing."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in))
    figure.subplots_adjust(
        left=left_in / WIDTH_IN, right=1 - 0.12 / WIDTH_IN, bottom=0.5 / height_in, top=1 - 0.06 / height_in
    )
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=9, color=GREY, labelcolor=INK)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, name: str, label: str) -> Markup:
    """The figure as an <svg> element for HTML: text stays text, ids are its own, same figure, same bytes."""
    import matplotlib
    from markupsafe import Markup, escape

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    _, _, body = stream.getvalue().partition("<svg")
    attributes, _, body = body.partition(">")
    view = re.search(r'viewBox="[^"]+"', attributes)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    head = f'<svg role="img" aria-label="{escape(label)}" {view.group() if view else ""}>'
    return Markup(head + body)  # Matplotlib escapes its texts


def _percent_axis(axes: Axes, which: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _policy_plot(summary: Mapping[str, Any], evidence: Evidence) -> Markup | None:
    """A dot and an interval per policy, the words above each; None where no value is known."""
    if all(value is None for value in summary["policy_value"].values()):
        return None
    figure, axes = _figure(2.9)
    told = []
    for y, policy in zip(range(len(Policy) - 1, -1, -1), Policy, strict=True):
        value = summary["policy_value"][policy]
        why = _why_unknown(policy, summary)
        colour = BLUE if policy is Policy.PERSONALISED else INK
        words = why if value is None else _rate(value)
        if value is not None:
            axes.plot([value["ci_low"], value["ci_high"]], [y, y], color=colour, linewidth=2.5, solid_capstyle="butt")
            axes.plot([value["value"]], [y], "o", color=colour, markersize=8)
        told.append(f"{LABELS[policy]}: {words}")
        for x, text, side in ((0.0, LABELS[policy], "left"), (1.0, words, "right")):
            weight = "bold" if policy is Policy.PERSONALISED and value is not None else "normal"
            axes.text(
                x, y + 0.22, text, ha=side, va="bottom", fontsize=9.5, fontweight=weight,
                color=GREY if value is None else colour, transform=axes.get_yaxis_transform(), bbox=BEHIND_TEXT,
            )  # fmt: skip
    rate = summary["positive_rate"]
    if rate is not None:
        axes.axvline(rate, color=ORANGE, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set_ylim(-0.45, len(Policy) - 0.25)
    axes.set_yticks([])
    axes.margins(x=0.06)
    axes.grid(axis="x", color="#E5E7EB", linewidth=0.8)
    _percent_axis(axes, "x")
    axes.set_xlabel("click rate the policy would have earned, 95 % interval", fontsize=9, color=INK)
    return _svg(figure, "policies", "Policy values with 95 % intervals. " + "; ".join(told))


def _calibration_plot(evidence: Evidence) -> Markup | None:
    """Predicted against observed rate, with the error that chance gives each bin."""
    bins = [(p, o, n) for p, o, n in evidence.calibration if n > 0]
    if not bins:
        return None
    figure, axes = _figure(3.6, left_in=0.85)
    axes.spines["left"].set_visible(True)
    low, high = 1.0, 0.0
    largest = max(n for _, _, n in bins)
    for predicted, observed, n in bins:
        error = 1.96 * math.sqrt(max(observed * (1 - observed), 1 / (n + 4)) / n)
        bottom, top = max(0.0, observed - error), min(1.0, observed + error)
        axes.plot([predicted, predicted], [bottom, top], color=BLUE, linewidth=1.5, alpha=0.6)
        axes.plot([predicted], [observed], "o", color=BLUE, markersize=4 + 5 * math.sqrt(n / largest))
        low, high = min(low, predicted, bottom), max(high, predicted, top)
    pad = 0.05 * (high - low) or 0.01
    limits = max(0.0, low - pad), min(1.0, high + pad)
    axes.plot(limits, limits, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.set(xlim=limits, ylim=limits)
    axes.grid(color="#E5E7EB", linewidth=0.8)
    for which in "xy":
        _percent_axis(axes, which)
    axes.set_xlabel("click rate the model predicts", fontsize=9, color=INK)
    axes.set_ylabel("click rate observed", fontsize=9, color=INK)
    told = "; ".join(f"{advice.percent(p)} predicted, {advice.percent(o)} observed" for p, o, _ in bins)
    return _svg(figure, "calibration", f"Calibration: {told}")


def _auc_plot(model: Mapping[str, Any] | None, evidence: Evidence) -> Markup | None:
    """Bars from 0.5, which is guessing."""
    if model is None:
        return None
    found = {"network": model["auc"], **{name: model["baseline_auc"].get(name) for name in list(MODELS)[1:]}}
    if all(value is None for value in found.values()):
        return None
    known = [value for value in found.values() if value is not None]
    figure, axes = _figure(3.6)
    told = []
    for y, (name, value) in zip(range(len(found) - 1, -1, -1), found.items(), strict=True):
        colour = BLUE if name == "network" else GREY
        unknown = "no user columns" if name == "user_only" and not evidence.user_columns else "unknown"
        words = unknown if value is None else f"{value:.3f}"
        if value is not None:
            axes.barh([y], [value - 0.5], left=0.5, height=0.34, color=colour)
        told.append(f"{MODELS[name]}: {words}")
        for x, text, side in ((0.0, MODELS[name], "left"), (1.0, words, "right")):
            axes.text(
                x, y + 0.22, text, ha=side, va="bottom", fontsize=9.5, fontweight="bold" if y == 4 else "normal",
                color=INK, transform=axes.get_yaxis_transform(), bbox=BEHIND_TEXT,
            )  # fmt: skip
    axes.axvline(0.5, color=INK, linewidth=1)
    axes.set(xlim=(min(0.5, min(known) - 0.02), max(0.6, max(known) + 0.02)), ylim=(-0.4, len(found) - 0.3))
    axes.set_yticks([])
    axes.grid(axis="x", color="#E5E7EB", linewidth=0.8)
    axes.set_xlabel("AUC on users the model has not seen (0.5 = guessing)", fontsize=9, color=INK)
    return _svg(figure, "auc", "AUC. " + "; ".join(told))
