"""Background jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

ACTIVE = sa.text("state IN ('queued', 'running')")


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "jobs",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("arguments", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("author", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(length=200), nullable=True),
        sa.Column("host", sa.String(length=200), nullable=True),
        sa.Column("pid", sa.Integer(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancelled_by", sa.String(length=200), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("result", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(["business_id"], ["businesses.id"], name=op.f("fk_jobs_business_id_businesses")),
        sa.PrimaryKeyConstraint("business_id", "id", name=op.f("pk_jobs")),
    )
    op.create_index(
        "uq_jobs_active",
        "jobs",
        ["business_id", "kind", "subject"],
        unique=True,
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )
    op.create_index(op.f("ix_jobs_business_id_state_due_at"), "jobs", ["business_id", "state", "due_at"])
    op.create_index(op.f("ix_jobs_business_id_kind_subject_id"), "jobs", ["business_id", "kind", "subject", "id"])


def downgrade() -> None:
    """Drop it."""
    op.drop_index(op.f("ix_jobs_business_id_kind_subject_id"), "jobs")
    op.drop_index(op.f("ix_jobs_business_id_state_due_at"), "jobs")
    op.drop_index("uq_jobs_active", "jobs")
    op.drop_table("jobs")
