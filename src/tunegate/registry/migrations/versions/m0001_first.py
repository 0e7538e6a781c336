"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def _entity(name: str, table: str, *, null: bool = False) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column(name, sa.String(80), nullable=null),
        sa.ForeignKeyConstraint([name], ["tg_entities.id"], name=f"fk_{table}_{name}"),
    ]


def upgrade() -> None:
    op.create_table(
        "tg_entities",
        sa.Column("id", sa.String(80), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_tg_entities"),
    )
    op.create_index("ix_tg_entities_kind", "tg_entities", ["kind"])
    op.create_table(
        "tg_edges",
        *_entity("child", "tg_edges"),
        *_entity("parent", "tg_edges"),
        sa.Column("role", sa.String(24), nullable=False),
        sa.PrimaryKeyConstraint("child", "parent", "role", name="pk_tg_edges"),
    )
    op.create_index("ix_tg_edges_parent", "tg_edges", ["parent"])
    op.create_table(
        "tg_versions",
        *_entity("adapter", "tg_versions"),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("verdict", sa.String(16)),
        sa.Column("override", sa.Text()),
        sa.PrimaryKeyConstraint("adapter", name="pk_tg_versions"),
        sa.UniqueConstraint("name", "number", name="uq_tg_versions_number"),
    )
    one = sa.text("state = 'production'")
    op.create_index(
        "uq_tg_versions_production", "tg_versions", ["name"], unique=True, sqlite_where=one, postgresql_where=one
    )
    op.create_table(
        "tg_files",
        *_entity("adapter", "tg_files"),
        sa.Column("path", sa.String(400), nullable=False),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("hash", sa.String(80), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("adapter", "path", "part", name="pk_tg_files"),
    )
    op.create_index("ix_tg_files_hash", "tg_files", ["hash"])
    op.create_table(
        "tg_aliases",
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("alias", sa.String(100), nullable=False),
        *_entity("adapter", "tg_aliases"),
        sa.PrimaryKeyConstraint("name", "alias", name="pk_tg_aliases"),
    )
    op.create_table(
        "tg_base_names",
        sa.Column("name", sa.String(400), nullable=False),
        *_entity("base", "tg_base_names"),
        sa.PrimaryKeyConstraint("name", name="pk_tg_base_names"),
    )
    op.create_table(
        "tg_superseded",
        *_entity("old", "tg_superseded"),
        *_entity("new", "tg_superseded"),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("old", name="pk_tg_superseded"),
    )
    op.create_table(
        "tg_events",
        sa.Column("seq", sa.Integer(), autoincrement=True, nullable=False),
        *_entity("subject", "tg_events"),
        sa.Column("what", sa.Text(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("seq", name="pk_tg_events"),
    )
    op.create_index("ix_tg_events_subject", "tg_events", ["subject"])
    op.create_table(
        "tg_pins",
        sa.Column("hash", sa.String(80), nullable=False),
        sa.Column("upload", sa.String(40), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("hash", "upload", name="pk_tg_pins"),
    )
    op.create_table(
        "tg_settings",
        sa.Column("key", sa.String(40), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_tg_settings"),
    )


def downgrade() -> None:
    raise NotImplementedError("a registry is not taken back to before its first schema")
