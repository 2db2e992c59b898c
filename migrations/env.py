"""Runs migrations on the connection that kaleidoscope.database gives, in its transaction."""

from alembic import context

from kaleidoscope.tables import Base


def run() -> None:
    """Run them; raises where somebody calls Alembic by hand, which has no connection to give."""
    connection = context.config.attributes.get("connection")
    if connection is None:
        raise SystemExit("Run `kaleidoscope database upgrade`: it knows the database.")
    context.configure(
        connection=connection, target_metadata=Base.metadata, render_as_batch=connection.dialect.name == "sqlite"
    )
    with context.begin_transaction():
        context.run_migrations()


run()
