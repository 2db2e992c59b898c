"""`kaleidoscope model explain`: why a model gives a variant its score for one user, against the release's others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attribution.contributions import explain_decision
from kaleidoscope import registry
from kaleidoscope.database import Session
from kaleidoscope.decide import variant_table
from kaleidoscope.encoding import UNSEEN
from kaleidoscope.errors import InputError, NotFoundError
from kaleidoscope.ranker import Ranker
from kaleidoscope.release import get_release, shown_number, verify
from kaleidoscope.settings import Settings


def run_explain(
    settings: Settings,
    session: Session,
    model: str,
    *,
    attributes: Sequence[tuple[str, str]] = (),
    variant: str | None = None,
    scene: str | None = None,
    release: int | None = None,
) -> dict[str, Any]:
    """What `attribution.contributions.Why` holds, and what was asked: `scene`, `release`, `attributes` as the model
    read them, and `notes` about those it could not use.

    `variant` is one of the release's, by default the one that the model likes best; `release` is by default what is
    live. Rules and frequency are not looked at. Raises InputError for an attribute that the model does not know,
    NotFoundError for a model, release or variant that is not there.
    """
    if scene is None:
        if model in registry.NAMES:
            raise InputError(f"model {model!r}: of which scene? Name it with --scene, or give a version.")
        scene = registry.scene_of(model)
    if scene == registry.GENERIC:
        raise InputError(f"model {model!r} is of all scenes: name with --scene whose variants are compared.")
    version = registry.resolve(settings, session.business, scene, model)
    number = shown_number(session, scene, release)
    content = verify(get_release(session, scene, number))
    if variant is not None and variant not in {one.id for one in content.variants}:
        raise NotFoundError(f"Release {number} of scene {scene!r} has no variant {variant!r}.")
    ranker = Ranker.load(registry.fetch(settings, session.business, version))
    given, fields = dict(attributes), ranker.signature.encoder.fields
    _refuse_unknown(given, [field.name for field in fields], version)
    features = ranker.features({name: [value] for name, value in given.items()}, 1)
    read = {field.name: field.label(int(code)) for field, code in zip(fields, features.codes[0], strict=True)}
    why = explain_decision(ranker, features, variant_table(content.variants), variant)
    absent = [name for name in read if name not in given]
    notes = [f"Not given, and so missing: {', '.join(absent)}."] if absent else []
    notes += [
        f"{field.name}={given[field.name]}: the model never saw this value."
        for field, code in zip(fields, features.codes[0], strict=True)
        if code == UNSEEN and field.name in given
    ]
    return why.to_json() | {"scene": scene, "release": number, "attributes": read, "notes": notes}


def _refuse_unknown(given: Mapping[str, str], known: Sequence[str], version: str) -> None:
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise InputError(f"attribute {unknown[0]!r}: model {version} knows {', '.join(known)}.")
