"""The operator half: businesses, taxonomy, materials, scenes, variants, interventions, releases and their ledger."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

APPEND_ONLY = ("audit", "taxonomies", "releases", "ledger")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "businesses",
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("two_person_publish", sa.Boolean(), nullable=False),
        sa.Column("placeholders", sa.JSON(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_businesses")),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(length=80), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("request_hash", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("body", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_table(
        "api_tokens",
        sa.Column("id", sa.String(length=16), nullable=False),
        sa.Column("business_id", sa.String(length=63), nullable=True),
        sa.Column("user", sa.String(length=200), nullable=False),
        sa.Column("token_hash", sa.String(length=64), nullable=False),
        sa.Column("roles", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["business_id"], ["businesses.id"], name=op.f("fk_api_tokens_business_id_businesses")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_tokens")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_api_tokens_token_hash")),
    )
    op.create_index(op.f("ix_api_tokens_business_id"), "api_tokens", ["business_id"])

    op.create_table(
        "audit",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("business_id", sa.String(length=63), nullable=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=200), nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("entity", sa.String(length=32), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("before", sa.JSON(), nullable=True),
        sa.Column("after", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["business_id"], ["businesses.id"], name=op.f("fk_audit_business_id_businesses")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_audit")),
    )
    op.create_index(op.f("ix_audit_business_id_entity_key"), "audit", ["business_id", "entity", "key"])

    op.create_table(
        "materials",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.Column("content_hash", sa.String(length=64), nullable=False),
        sa.Column("tags", sa.JSON(), nullable=False),
        sa.Column("taxonomy", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("author", sa.String(length=200), nullable=False),
        sa.Column("reviewer", sa.String(length=200), nullable=True),
        sa.Column("reviewed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["business_id"], ["businesses.id"], name=op.f("fk_materials_business_id_businesses")),
        sa.PrimaryKeyConstraint("business_id", "id", name=op.f("pk_materials")),
    )
    op.create_index(op.f("ix_materials_business_id_content_hash"), "materials", ["business_id", "content_hash"])

    op.create_table(
        "scenes",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("author", sa.String(length=200), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["business_id"], ["businesses.id"], name=op.f("fk_scenes_business_id_businesses")),
        sa.PrimaryKeyConstraint("business_id", "id", name=op.f("pk_scenes")),
    )
    op.create_table(
        "taxonomies",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.Column("mapping", sa.JSON(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("author", sa.String(length=200), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["business_id"], ["businesses.id"], name=op.f("fk_taxonomies_business_id_businesses")),
        sa.PrimaryKeyConstraint("business_id", "number", name=op.f("pk_taxonomies")),
    )
    op.create_table(
        "interventions",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("scene_id", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=63), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("target", sa.JSON(), nullable=False),
        sa.Column("segment", sa.JSON(), nullable=False),
        sa.Column("starts_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ends_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("ended", sa.Boolean(), nullable=False),
        sa.Column("author", sa.String(length=200), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["business_id", "scene_id"],
            ["scenes.business_id", "scenes.id"],
            name=op.f("fk_interventions_business_id_scene_id_scenes"),
        ),
        sa.ForeignKeyConstraint(
            ["business_id"], ["businesses.id"], name=op.f("fk_interventions_business_id_businesses")
        ),
        sa.PrimaryKeyConstraint("business_id", "scene_id", "id", name=op.f("pk_interventions")),
    )
    op.create_table(
        "releases",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("scene_id", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("content", sa.JSON(), nullable=False),
        sa.Column("content_hash", sa.String(length=64), nullable=False),
        sa.Column("author", sa.String(length=200), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["business_id", "scene_id"],
            ["scenes.business_id", "scenes.id"],
            name=op.f("fk_releases_business_id_scene_id_scenes"),
        ),
        sa.ForeignKeyConstraint(["business_id"], ["businesses.id"], name=op.f("fk_releases_business_id_businesses")),
        sa.PrimaryKeyConstraint("business_id", "scene_id", "number", name=op.f("pk_releases")),
    )
    op.create_table(
        "variants",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("scene_id", sa.String(length=63), nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("materials", sa.JSON(), nullable=False),
        sa.Column("remarks", sa.JSON(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("author", sa.String(length=200), nullable=False),
        sa.Column("reviewer", sa.String(length=200), nullable=True),
        sa.Column("reviewed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["business_id", "scene_id"],
            ["scenes.business_id", "scenes.id"],
            name=op.f("fk_variants_business_id_scene_id_scenes"),
        ),
        sa.ForeignKeyConstraint(["business_id"], ["businesses.id"], name=op.f("fk_variants_business_id_businesses")),
        sa.PrimaryKeyConstraint("business_id", "scene_id", "id", name=op.f("pk_variants")),
    )
    op.create_index(op.f("ix_variants_business_id_scene_id_state"), "variants", ["business_id", "scene_id", "state"])

    op.create_table(
        "ledger",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("scene_id", sa.String(length=63), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(length=200), nullable=False),
        sa.Column("action", sa.String(length=16), nullable=False),
        sa.Column("release", sa.Integer(), nullable=False),
        sa.Column("stable", sa.Integer(), nullable=True),
        sa.Column("candidate", sa.Integer(), nullable=True),
        sa.Column("share", sa.Double(), nullable=False),
        sa.Column("paused", sa.Boolean(), nullable=False),
        sa.Column("stage", sa.Integer(), nullable=True),
        sa.Column("health", sa.JSON(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["business_id", "scene_id", "release"],
            ["releases.business_id", "releases.scene_id", "releases.number"],
            name=op.f("fk_ledger_business_id_scene_id_release_releases"),
        ),
        sa.ForeignKeyConstraint(
            ["business_id", "scene_id"],
            ["scenes.business_id", "scenes.id"],
            name=op.f("fk_ledger_business_id_scene_id_scenes"),
        ),
        sa.ForeignKeyConstraint(["business_id"], ["businesses.id"], name=op.f("fk_ledger_business_id_businesses")),
        sa.PrimaryKeyConstraint("business_id", "scene_id", "seq", name=op.f("pk_ledger")),
    )
    op.create_index(op.f("ix_ledger_business_id_scene_id_at"), "ledger", ["business_id", "scene_id", "at"])

    op.create_table(
        "variant_materials",
        sa.Column("business_id", sa.String(length=63), nullable=False),
        sa.Column("scene_id", sa.String(length=63), nullable=False),
        sa.Column("variant_id", sa.String(length=32), nullable=False),
        sa.Column("slot", sa.String(length=63), nullable=False),
        sa.Column("material_id", sa.String(length=63), nullable=False),
        sa.ForeignKeyConstraint(
            ["business_id", "material_id"],
            ["materials.business_id", "materials.id"],
            name=op.f("fk_variant_materials_business_id_material_id_materials"),
        ),
        sa.ForeignKeyConstraint(
            ["business_id", "scene_id", "variant_id"],
            ["variants.business_id", "variants.scene_id", "variants.id"],
            name=op.f("fk_variant_materials_business_id_scene_id_variant_id_variants"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["business_id"], ["businesses.id"], name=op.f("fk_variant_materials_business_id_businesses")
        ),
        sa.PrimaryKeyConstraint("business_id", "scene_id", "variant_id", "slot", name=op.f("pk_variant_materials")),
    )
    op.create_index(
        op.f("ix_variant_materials_business_id_material_id"), "variant_materials", ["business_id", "material_id"]
    )

    _refuse_changes()


def _refuse_changes() -> None:
    """History is written once: the database itself refuses to change or delete it."""
    if op.get_bind().dialect.name == "postgresql":
        op.execute(
            "CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION '% is append-only', TG_TABLE_NAME USING ERRCODE = 'restrict_violation'; END $$"
        )
        for table in APPEND_ONLY:
            op.execute(
                f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table} "
                "FOR EACH ROW EXECUTE FUNCTION refuse_change()"
            )
            op.execute(
                f"CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table} EXECUTE FUNCTION refuse_change()"
            )
        return
    for table in APPEND_ONLY:
        for what in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{what.lower()} BEFORE {what} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            )


def downgrade() -> None:
    """Drop them."""
    op.drop_index(op.f("ix_variant_materials_business_id_material_id"), "variant_materials")
    op.drop_table("variant_materials")
    op.drop_index(op.f("ix_ledger_business_id_scene_id_at"), "ledger")
    op.drop_table("ledger")
    op.drop_index(op.f("ix_variants_business_id_scene_id_state"), "variants")
    op.drop_table("variants")
    op.drop_table("releases")
    op.drop_table("interventions")
    op.drop_table("taxonomies")
    op.drop_table("scenes")
    op.drop_index(op.f("ix_materials_business_id_content_hash"), "materials")
    op.drop_table("materials")
    op.drop_index(op.f("ix_audit_business_id_entity_key"), "audit")
    op.drop_table("audit")
    op.drop_index(op.f("ix_api_tokens_business_id"), "api_tokens")
    op.drop_table("api_tokens")
    op.drop_table("idempotency_keys")
    op.drop_table("businesses")
    if op.get_bind().dialect.name == "postgresql":
        op.execute("DROP FUNCTION refuse_change()")
