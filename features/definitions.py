"""What is known of users, for Feast: entities, views, and the files with their history. Declarations only.

`kaleidoscope features apply` runs `feast apply` in this folder, for one business at a time: FEATURES_HOME is the folder
of its data. Feast imports this file as a top-level module. It imports nothing of ours, and nobody imports it.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
from feast import Entity, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Bool, Float64, Int64, String

HOME = Path(os.environ["FEATURES_HOME"])
FOREVER = timedelta(0)  # what is known stays known until something newer is
TYPES = {"string": String, "int64": Int64, "double": Float64, "bool": Bool}  # as Arrow calls them


def history(name: str) -> FileSource:
    """Everything that was ever known, and from when on."""
    return FileSource(name=name, path=str(HOME / f"{name}.parquet"), timestamp_field="known_from")


user = Entity(
    name="user", join_keys=["unit"], value_type=ValueType.STRING, description="A unit: who is shown something"
)
scene = Entity(name="scene", join_keys=["scene"], value_type=ValueType.STRING, description="A placement")

# The operator's own columns, such as age or city: whatever the profiles hold that were loaded.
_schema = pq.read_schema(HOME / "profiles.parquet")
_columns = [
    Field(name=column.name, dtype=TYPES[str(column.type)])
    for column in _schema
    if column.name not in ("unit", "known_from")
]
if _columns:
    user_profile = FeatureView(
        name="user_profile",
        entities=[user],
        ttl=FOREVER,
        schema=[Field(name="unit", dtype=String), *_columns],
        source=history("profiles"),
        description="What the business knows of its users",
    )

# From the log, once a day: everything up to the last midnight (UTC).
user_behaviour = FeatureView(
    name="user_behaviour",
    entities=[user],
    ttl=FOREVER,
    schema=[
        Field(name="unit", dtype=String),
        Field(name="past_exposures", dtype=Int64),
        Field(name="past_clicks", dtype=Int64),
        Field(name="past_conversions", dtype=Int64),
        Field(name="past_ctr", dtype=Float64, description="Clicks per exposure, drawn to the average of all users"),
        # Whoever reads a field with this tag gets whole days since that moment instead, under the tag's name.
        Field(name="last_seen_us", dtype=Int64, tags={"days_since": "days_since_seen"}),
    ],
    source=history("behaviour"),
    description="What a user did in all scenes",
)

# From the log, every few minutes: the worker pushes what changed.
recent_counters = PushSource(name="recent_counters", batch_source=history("recent"))
user_scene_recent = FeatureView(
    name="user_scene_recent",
    entities=[user, scene],
    ttl=FOREVER,
    schema=[
        Field(name="unit", dtype=String),
        Field(name="scene", dtype=String),
        Field(name="recent_exposures", dtype=Int64),
        Field(name="recent_clicks", dtype=Int64),
    ],
    source=recent_counters,
    description="What a user did in one scene in the last 24 hours",
)
