"""Portraits: who prefers which tag."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

NUMBERS = (
    "share", "click_share", "independent", "ctr", "ctr_low", "ctr_high",
    "preference", "preference_low", "preference_high", "shrunk", "shrunk_low", "shrunk_high",
    "effect", "effect_low", "effect_high", "q_value",
)  # fmt: skip


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "portraits",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("scene_id", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("log_hash", sa.String(length=128), nullable=False),
        sa.Column("run_hash", sa.String(length=64), nullable=False),
        sa.Column("taxonomy", sa.Integer(), nullable=True),
        sa.Column("releases", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=True),
        sa.Column("until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("exposures", sa.BigInteger(), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=True),
        sa.Column("buckets", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("methods", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column("simulated", sa.Boolean(), nullable=False),
        sa.Column("shown", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("segments", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("tags", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("overlaps", sa.JSON(none_as_null=True), nullable=False),
        sa.Column("cells", sa.Integer(), nullable=False),
        sa.Column("insights", sa.Integer(), nullable=False),
        sa.Column("author", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["business_id"], ["businesses.id"], name=op.f("fk_portraits_business_id_businesses")),
        sa.ForeignKeyConstraint(
            ["business_id", "scene_id"],
            ["scenes.business_id", "scenes.id"],
            name=op.f("fk_portraits_business_id_scene_id_scenes"),
        ),
        sa.ForeignKeyConstraint(
            ["business_id", "taxonomy"],
            ["taxonomies.business_id", "taxonomies.number"],
            name=op.f("fk_portraits_business_id_taxonomy_taxonomies"),
        ),
        sa.PrimaryKeyConstraint("business_id", "scene_id", "number", name=op.f("pk_portraits")),
        sa.UniqueConstraint(
            "business_id", "scene_id", "run_hash", name=op.f("uq_portraits_business_id_scene_id_run_hash")
        ),
    )
    op.create_table(
        "portrait_cells",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("scene_id", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("segment", sa.Integer(), nullable=False),
        sa.Column("tag", sa.Integer(), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("clicks", sa.BigInteger(), nullable=True),
        *(sa.Column(name, sa.Double(), nullable=True) for name in NUMBERS),
        sa.Column("crossed", sa.Boolean(), nullable=False),
        sa.Column("found_by", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("explained_by", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["business_id"], ["businesses.id"], name=op.f("fk_portrait_cells_business_id_businesses")
        ),
        sa.ForeignKeyConstraint(
            ["business_id", "scene_id", "number"],
            ["portraits.business_id", "portraits.scene_id", "portraits.number"],
            name=op.f("fk_portrait_cells_business_id_scene_id_number_portraits"),
        ),
        sa.PrimaryKeyConstraint("business_id", "scene_id", "number", "position", name=op.f("pk_portrait_cells")),
    )
    op.create_index(
        op.f("ix_portrait_cells_business_id_scene_id_number_segment"),
        "portrait_cells",
        ["business_id", "scene_id", "number", "segment"],
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_index(op.f("ix_portrait_cells_business_id_scene_id_number_segment"), "portrait_cells")
    op.drop_table("portrait_cells")
    op.drop_table("portraits")
