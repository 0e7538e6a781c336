"""What Alembic runs: the migrations, inside the transaction that the caller holds."""

from alembic import context

from tunegate.registry.tables import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
)
context.run_migrations()
