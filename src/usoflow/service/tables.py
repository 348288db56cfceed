"""The tables of the database of jobs (`store`), and how those of older versions become them."""

from __future__ import annotations

from collections.abc import Sequence

# Each is run once, in order, on every database; a database knows how many it has seen (user_version).
MIGRATIONS: Sequence[str] = (
    """
    CREATE TABLE jobs (
        row INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL CHECK (state IN ('pending', 'in_progress', 'completed', 'failed', 'cancelled')),
        number REAL NOT NULL,
        client TEXT,
        workflow TEXT,
        prompt TEXT NOT NULL,
        targets TEXT NOT NULL,
        extra TEXT NOT NULL,
        created INTEGER NOT NULL,
        started INTEGER,
        ended INTEGER,
        cached TEXT NOT NULL DEFAULT '[]',
        outputs TEXT NOT NULL DEFAULT '{}',
        error TEXT
    );
    CREATE INDEX jobs_by_state ON jobs (state, number, row);
    CREATE TABLE files (
        path TEXT PRIMARY KEY,
        job TEXT NOT NULL REFERENCES jobs (id) ON DELETE CASCADE
    );
    CREATE INDEX files_by_job ON files (job);
    CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
    "ALTER TABLE jobs ADD COLUMN stop INTEGER NOT NULL DEFAULT 0",  # somebody has asked that it be stopped
    "ALTER TABLE jobs ADD COLUMN attempts INTEGER NOT NULL DEFAULT 0",  # how often a worker has begun with it
    "UPDATE files SET path = CAST(path AS BLOB)",  # not every path is text that SQLite takes
    "CREATE INDEX jobs_by_end ON jobs (ended, row)",
)
