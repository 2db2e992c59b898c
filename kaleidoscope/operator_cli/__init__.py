"""The operator's commands: everything that decides what a scene shows, from the tag vocabulary to a release.

Thin on purpose: a command opens the database, calls one service in one transaction, and prints the view of what it
returns. Services and everything heavy are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import typer

from kaleidoscope.operator_cli import (
    businesses,
    events,
    experiments,
    features,
    jobs,
    materials,
    models,
    portraits,
    releases,
    scenes,
    taxonomy,
)
from kaleidoscope.operator_cli.frame import command

GROUPS = (
    businesses.database_group,
    businesses.business_group,
    businesses.token_group,
    taxonomy.taxonomy_group,
    materials.material_group,
    scenes.scene_group,
    scenes.variant_group,
    releases.intervention_group,
    releases.release_group,
    experiments.experiment_group,
    portraits.portrait_group,
    events.events_group,
    models.model_group,
    features.feature_group,
    jobs.job_group,
)


def mount(app: typer.Typer) -> None:
    """Add the operator's commands to the `kaleidoscope` command."""
    for group in GROUPS:
        app.add_typer(group)
    command(app, "audit")(businesses.audit)
    app.command("worker")(jobs.worker)
