"""What `kaleidoscope demo` tells people: what it found, and where to go on."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kaleidoscope.registry import PASSED
from kaleidoscope.terminal import table
from kaleidoscope.vocabulary import Bucket

if TYPE_CHECKING:
    from rich.table import Table

STRONGEST = 5  # insights that are shown
TOKEN, ENVIRONMENT = "token", "settings.env"  # files in the demo's folder
SHOWS = {
    Bucket.CONTROL: "the baseline",
    Bucket.RANDOM: "any variant, drawn",
    Bucket.MODEL: "what the model ranks first",
}


def report_lines(summary: Mapping[str, Any], out_dir: Path) -> list[str | Table]:
    """What the demo found, in words and a table."""
    rows = [
        (
            bucket,
            SHOWS[Bucket(bucket)],
            f"{found['units']:,}",
            f"{found['exposures']:,}",
            f"{found['clicks']:,}",
            "unknown" if found["ctr"] is None else _percent(found["ctr"], 2),
            "" if found["lift"] is None else _percent(found["lift"], sign=True),
            "" if found["lift"] is None else _interval(found),
        )
        for bucket, found in summary["buckets"].items()
    ]
    columns = ("bucket", "shows", "users", "exposures", "clicks", "CTR", "lift", "95 % interval, at any time")
    lines: list[str | Table] = [
        "SIMULATED: the users, what they click and when they come. Nothing here was measured on people.",
        "",
        table(columns, rows, whole=("bucket", "exposures", "CTR", "lift", columns[-1])),
        "",
        *_verdict(summary),
        *_known_truth(summary["truth"]),
        *_preferences(summary),
        *_how_it_went(summary),
        f"Everything: {out_dir / 'summary.json'}",
    ]
    return lines


def _verdict(summary: Mapping[str, Any]) -> Iterator[str]:
    gate, model, srm = summary["model"]["gate"], summary["buckets"].get(Bucket.MODEL.value), summary["srm"]
    if gate["verdict"] != PASSED:
        failed = [check["message"] for check in gate["checks"] if not check["ok"]]
        yield f"The gate kept the model back, and nothing was personalised: {' '.join(failed)}"
    elif model is None or model["lift"] is None:
        yield "What the model is worth is not known: too few users saw it."
    elif model["ci_low"] > 0:
        more = _percent(model["lift"], sign=True)
        yield f"The model is better than the baseline: {more} clicks per exposure ({_interval(model)})."
    else:
        yield f"That the model is better than the baseline is not shown: {_interval(model)}."
    if srm is not None and srm["flagged"]:
        yield f"SAMPLE RATIO: users did not fall into the buckets as their shares say (p = {srm['p_value']:.2g})."


def _known_truth(truth: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    ranked, all_of_it = truth["ranked"], truth["with_exploration"]
    share, whole = ranked["share_of_oracle_lift"], all_of_it["share_of_oracle_lift"]
    if share is None or whole is None:
        return
    oracle, shown, control, single = (_percent(ranked[n], 2) for n in ("oracle", "shown", "control", "best_single"))
    yield (
        f"True click rates where the model ranked: {shown} for what it ranked first, {control} for the"
        f" baseline, {single} for the best single variant, {oracle} for an oracle that knows every preference. The"
        f" model has {_percent(share)} of the oracle's lift ({_percent(whole)} with what is drawn to go on learning)."
    )
    personal = ranked["share_of_oracle_personalisation"]
    if personal is not None:
        yield f"Of what knowing each user adds to the best single variant it has {_percent(personal)}."


def _preferences(summary: Mapping[str, Any]) -> Iterator[str]:
    sentences, found = summary["insights"], summary["preferences"]
    exposures = f"{found['exposures']:,} random exposures to simulated users"
    if sentences:
        few = "" if len(sentences) <= STRONGEST else f"; the {STRONGEST} strongest of {len(sentences)}"
        yield f"Who prefers what, from {exposures}{few}:"
        yield from (f"  {sentence}" for sentence in sentences[:STRONGEST])
        yield f"Of {len(sentences)} such preferences {found['planted']} are planted in the simulated world."
    else:
        yield f"{exposures} show of no group of users that it prefers a tag more than others do."
    if found["findings"]:
        missed = [name for name, there in found["findings"].items() if not there]
        recovered = [name for name, there in found["findings"].items() if there]
        named = f"; not {', '.join(missed)}" if missed else ""
        yield (
            f"Of its {len(found['findings'])} published findings {len(recovered)} were recovered with the right sign"
            f"{': ' * bool(recovered)}{', '.join(recovered)}{named}."
        )


def _how_it_went(summary: Mapping[str, Any]) -> Iterator[str]:
    model, http = summary["model"], summary["http"]
    verdict = model["gate"]["verdict"]
    yield f"Learned from {model['exposures']:,} exposures of {summary['variants']} variants; the gate says {verdict}."
    for stage in summary["canary"]:
        yield f"Canary at {_percent(stage['share'])}: {stage['step'].replace('_', ' ')}, {stage['reason']}."
    if summary["decisions_timed"]:
        yield (
            f"A decision that ranks {summary['variants']} variants takes {summary['decision_p50_ms']:.2g} ms, p99"
            f" {summary['decision_p99_ms']:.2g} ms ({summary['decisions_timed']:,} timed)."
        )
    yield (
        f"Over HTTP decisions take {http['p50_ms']:.2g} ms, p99 {http['p99_ms']:.2g} ms; of"
        f" {http['decisions']:,} the server took {http['same_as_in_process']:,} as this process does."
    )
    yield (
        f"{summary['visits']:,} visits of {summary['people']:,} users, {summary['decisions']:,} decisions,"
        f" {summary['events'].get('accepted', 0):,} events, in {summary['seconds']:.0f} s."
    )


def whereabouts(out_dir: Path, url: str, scene: str) -> list[str]:
    """Where the server answers, and how to go on."""
    ask = shlex.quote(json.dumps({"context": {"targetingKey": "you", "age": 34, "income": 48_000}}))
    token, variables = (shlex.quote(str(out_dir / name)) for name in (TOKEN, ENVIRONMENT))
    return [
        "",
        f"The server answers at {url} until Ctrl-C:",
        f"  {url}/healthz       how it is",
        f"  {url}/metrics       what it counts",
        f"  {url}/openapi.json  what it can be asked",
        "Ask it what to show somebody, from another terminal:",
        f"  curl -s {url}/ofrep/v1/evaluate/flags/{scene} -d {ask} \\",
        f'    -H "Authorization: Bearer $(cat {token})"',
        "Look around there with every other command:",
        f"  set -a; . {variables}; set +a",
        f"  kaleidoscope experiment show {scene} --simulated",
        f"  kaleidoscope attribute {scene} --simulated",
        f"  kaleidoscope portrait design {scene} --attribute age=30 --attribute investor=beginner",
        f"  kaleidoscope release ledger {scene}",
        "",
    ]


def _interval(found: Mapping[str, Any]) -> str:
    return f"{_percent(found['ci_low'], sign=True)} to {_percent(found['ci_high'], sign=True)}"


def _percent(share: float, digits: int = 0, *, sign: bool = False) -> str:
    return f"{100 * share:{'+' if sign else ''}.{digits}f} %".replace("-", "−")
