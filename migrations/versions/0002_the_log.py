"""The log: decisions, the events that name them, how many met which fate, and what of them is in Parquet."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "decisions",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("scene", sa.String(length=63), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("bucket", sa.String(length=16), nullable=False),
        sa.Column("variant", sa.String(length=64), nullable=False),
        sa.Column("propensity", sa.Double(), nullable=False),
        sa.Column("learn", sa.Boolean(), nullable=False),
        sa.Column("release", sa.Integer(), nullable=False),
        sa.Column("model_version", sa.Text(), nullable=True),
        sa.Column("recorded", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.String(length=32), nullable=True),
        sa.Column("release_hash", sa.String(length=64), nullable=True),
        sa.Column("candidates", sa.Integer(), nullable=True),
        sa.Column("features", sa.JSON(), nullable=True),
        sa.Column("context", sa.JSON(), nullable=True),
        sa.Column("rested", sa.JSON(), nullable=True),
        sa.Column("key", sa.String(length=16), nullable=True),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("business_id", "id", name=op.f("pk_decisions")),
    )
    op.create_index(op.f("ix_decisions_business_id_scene_at_us"), "decisions", ["business_id", "scene", "at_us"])
    op.create_index(op.f("ix_decisions_business_id_unit_scene"), "decisions", ["business_id", "unit", "scene"])

    op.create_table(
        "events",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("decision_id", sa.String(length=64), nullable=False),
        sa.Column("event_id", sa.String(length=128), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("at_us", sa.BigInteger(), nullable=False),
        sa.Column("received_us", sa.BigInteger(), nullable=False),
        sa.Column("value", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("business_id", "decision_id", "event_id", name=op.f("pk_events")),
        sa.UniqueConstraint("business_id", "event_id", name=op.f("uq_events_business_id_event_id")),
        sqlite_with_rowid=False,
    )

    op.create_table(
        "event_counts",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("scene", sa.String(length=63), nullable=False),
        sa.Column("day", sa.String(length=10), nullable=False),
        sa.Column("what", sa.String(length=16), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("business_id", "scene", "day", "what", name=op.f("pk_event_counts")),
    )
    op.create_table(
        "closed_days",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("scene", sa.String(length=63), nullable=False),
        sa.Column("before", sa.String(length=10), nullable=False),
        sa.PrimaryKeyConstraint("business_id", "scene", name=op.f("pk_closed_days")),
    )
    op.create_table(
        "log_parts",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("scene", sa.String(length=63), nullable=False),
        sa.Column("day", sa.String(length=10), nullable=False),
        sa.Column("file", sa.Text(), nullable=True),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("business_id", "scene", "day", name=op.f("pk_log_parts")),
    )


def downgrade() -> None:
    """Take them away, with what they hold."""
    op.drop_table("log_parts")
    op.drop_table("closed_days")
    op.drop_table("event_counts")
    op.drop_table("events")
    op.drop_index(op.f("ix_decisions_business_id_unit_scene"), "decisions")
    op.drop_index(op.f("ix_decisions_business_id_scene_at_us"), "decisions")
    op.drop_table("decisions")
