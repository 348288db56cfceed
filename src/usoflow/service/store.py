"""The queue is a table: every accepted job is a row in SQLite (WAL) until it is deleted.

The server writes it; the worker only reserves the names of its pictures. A job is pending, then in progress,
then in exactly one final state with one set of outputs. What a crash leaves in progress is pending again
after `recover`, and the files it had reserved are gone; unless it was to be stopped: then it is cancelled, or
has seen several crashes: then it has failed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from usoflow.errors import UsoflowError
from usoflow.nodes.context import PARTIAL_SUFFIX
from usoflow.service.jobs import FINAL, WAITING, Job, Request, State, now, nowhere, reported
from usoflow.service.tables import MIGRATIONS

logger = logging.getLogger(__name__)

MAX_HISTORY = 10_000  # final jobs that are kept
MAX_UNBEGUN = 500  # of these, such as were cancelled before they began
PATIENCE = 30.0  # seconds to wait for another process's transaction
MAX_ATTEMPTS = 3  # of a job; whatever ends the server each time may well be the job itself

_COLUMNS = "id, state, number, client, workflow, created, started, ended, cached, outputs, error"
_JOBS = f"SELECT {_COLUMNS} FROM jobs"
_NEXT = "SELECT id FROM jobs WHERE state = 'pending' ORDER BY number, row LIMIT 1"
# `+state` keeps SQLite from its index, by which it would sort all final jobs: by row it stops at the limit.
_OLDEST = "SELECT row FROM jobs WHERE +state IN ('completed', 'failed', 'cancelled') ORDER BY row LIMIT ?"
_UNBEGUN = "state = 'cancelled' AND started IS NULL"
_LISTED = f"NOT ({_UNBEGUN})"


class JobStore:
    """The database. Safe to use from several threads and processes.

    Raises:
        UsoflowError: `state_unusable` if the file is damaged, not writable, or of a newer version; so does
            every method where the disk is full or the file locked for too long.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path, timeout=PATIENCE, check_same_thread=False, isolation_level=None
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise
        except (OSError, sqlite3.Error) as error:
            raise _unusable(path, error) from None

    def _prepare(self) -> None:
        self._connection.row_factory = sqlite3.Row
        self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("PRAGMA synchronous = FULL")  # accepted means on the disk
        self._connection.execute("PRAGMA foreign_keys = ON")
        self._migrate()

    def close(self) -> None:
        """Nothing may be called after this."""
        with self._lock:
            self._connection.close()

    # --- what clients do ------------------------------------------------------------------------------

    def add(self, request: Request, *, limit: int) -> Job:
        """Accept a job: it is on the disk when this returns.

        Raises:
            UsoflowError: `queue_full` if `limit` jobs wait, `job_exists`.
        """
        with self._transaction() as run:
            if self.count(WAITING) >= limit:
                raise UsoflowError("queue_full", f"{limit} jobs are waiting already.")
            next_row = run("SELECT coalesce(max(seq), 0) FROM sqlite_sequence").fetchone()[0]
            number = request.number
            if number is None:
                number = -next_row if request.front else next_row
            values = (
                request.id,
                State.PENDING,
                number,
                request.client,
                _text_or_none((request.workflow or {}).get("id")),
                *map(json.dumps, (request.prompt, request.targets, request.extra)),
                now(),
            )
            try:
                run(
                    "INSERT INTO jobs (id, state, number, client, workflow, prompt, targets, extra, created)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    values,
                )
            except sqlite3.IntegrityError:
                raise UsoflowError("job_exists", f"There is a job {request.id} already.") from None
            return self._get(request.id)

    def get(self, job_id: str) -> Job | None:
        """The job of this id."""
        found = self._select(f"{_JOBS} WHERE id = ?", (job_id,))
        return found[0] if found else None

    def request(self, job_id: str) -> Request | None:
        """What the client of a job asked for; None if the job is gone."""
        with self._held() as connection:
            row = connection.execute(
                "SELECT id, prompt, targets, extra, client, number FROM jobs WHERE id = ?", (job_id,)
            ).fetchone()
        if row is None:
            return None
        return Request(
            id=row["id"],
            prompt=json.loads(row["prompt"]),
            targets=tuple(json.loads(row["targets"])),
            extra=json.loads(row["extra"]),
            client=row["client"],
            number=row["number"],
        )

    def waiting(self) -> list[Job]:
        """Jobs in progress and pending, in the order in which they run."""
        return self._select(f"{_JOBS} WHERE state IN ('in_progress', 'pending') ORDER BY state, number, row")

    def jobs(
        self,
        states: Collection[State],
        *,
        limit: int = -1,
        offset: int = 0,
        descending: bool = True,
        by_duration: bool = False,
        unbegun: bool = True,
    ) -> list[Job]:
        """Jobs in some states by time of acceptance, or by how long they ran; `limit` -1 is all.

        Jobs that have not ended, or never began, are the shortest; without `unbegun` those are left out that
        were cancelled before they began.
        """
        order = "DESC" if descending else "ASC"
        by = f"ended - started {order}, row {order}" if by_duration else f"row {order}"
        state = "state" if set(states) <= set(WAITING) else "+state"  # as for _OLDEST
        listed = "" if unbegun else f" AND {_LISTED}"
        return self._select(
            f"{_JOBS} WHERE {state} IN {_marks(states)}{listed} ORDER BY {by} LIMIT ? OFFSET ?",
            (*states, limit, offset),
        )

    def run_jobs(self, *, limit: int, offset: int = 0, descending: bool = True) -> list[Job]:
        """Final jobs that had begun, by when they ended."""
        order = "DESC" if descending else "ASC"
        return self._select(
            f"{_JOBS} WHERE +state IN {_marks(FINAL)} AND started IS NOT NULL"
            f" ORDER BY ended {order}, row {order} LIMIT ? OFFSET ?",
            (*FINAL, limit, offset),
        )

    def count(self, states: Collection[State], *, unbegun: bool = True) -> int:
        """How many jobs are in these states (`unbegun` as for `jobs`)."""
        with self._held() as connection:
            listed = "" if unbegun else f" AND {_LISTED}"
            query = f"SELECT count(*) FROM jobs WHERE state IN {_marks(states)}{listed}"
            return int(connection.execute(query, tuple(states)).fetchone()[0])

    def cancel_pending(self, job_ids: Collection[str] | None = None) -> int:
        """Cancel those of the jobs (None: of all) that have not begun; returns how many.

        Of such jobs the last `MAX_UNBEGUN` are kept: they displace none that ran.
        """
        chosen, values = _chosen(job_ids)
        with self._transaction() as run:
            query = f"UPDATE jobs SET state = 'cancelled', ended = ? WHERE state = 'pending' {chosen}"
            cancelled = run(query, (now(), *values)).rowcount
            older = f"SELECT row FROM jobs WHERE {_UNBEGUN} ORDER BY ended DESC, row DESC LIMIT -1 OFFSET ?"
            run(f"DELETE FROM jobs WHERE row IN ({older})", (MAX_UNBEGUN,))
            return cancelled

    def forget(self, job_ids: Collection[str] | None = None) -> None:
        """Delete those of the jobs (None: of all) that are final. Their pictures stay."""
        chosen, values = _chosen(job_ids)
        with self._transaction() as run:
            run(f"DELETE FROM jobs WHERE state IN {_marks(FINAL)} {chosen}", (*FINAL, *values))

    # --- what the supervisor does ---------------------------------------------------------------------

    def start_next(self) -> Job | None:
        """Move the next pending job into progress."""
        with self._transaction() as run:
            row = run(_NEXT).fetchone()
            if row is None:
                return None
            run("UPDATE jobs SET state = 'in_progress', started = ? WHERE id = ?", (now(), row["id"]))
            return self._get(row["id"])

    def note_begun(self, job_id: str) -> None:
        """Remember that a worker has begun with a job."""
        with self._transaction() as run:
            run("UPDATE jobs SET attempts = attempts + 1 WHERE id = ?", (job_id,))

    def note_cached(self, job_id: str, nodes: Sequence[str]) -> None:
        """Remember which nodes need not run."""
        with self._transaction() as run:
            run("UPDATE jobs SET cached = ? WHERE id = ?", (json.dumps(nodes), job_id))

    def note_output(self, job_id: str, node: str, shown: Mapping[str, Any]) -> None:
        """Remember what an output node has shown."""
        with self._transaction() as run:
            outputs = {**self._get(job_id).outputs, node: shown}
            run("UPDATE jobs SET outputs = ? WHERE id = ?", (json.dumps(outputs), job_id))

    def note_stop(self, job_id: str) -> None:
        """Remember that a job in progress is to be stopped: whatever happens, it does not run again."""
        with self._transaction() as run:
            run("UPDATE jobs SET stop = 1 WHERE id = ? AND state = 'in_progress'", (job_id,))

    def finish(self, job_id: str, state: State, error: Mapping[str, Any] | None = None) -> bool:
        """Move a job from progress into a final state; False if it is not in progress.

        Files that it began and did not report are deleted.
        """
        with self._transaction() as run:
            query = "UPDATE jobs SET state = ?, ended = ?, error = ? WHERE id = ? AND state = 'in_progress'"
            text = None if error is None else json.dumps(error)
            if run(query, (state, now(), text, job_id)).rowcount == 0:
                return False
            files = self._files(job_id)
            shown = reported(files, self._get(job_id).outputs)
            self._drop(path for path in files if path not in shown)
            if (too_many := self.count(FINAL) - MAX_HISTORY) > 0:
                run(f"DELETE FROM jobs WHERE row IN ({_OLDEST})", (too_many,))
            return True

    def requeue(self, job_id: str, *, crashed: bool = False) -> bool:
        """Make a job in progress pending again, as if it had never begun: without files and outputs.

        One that was to be stopped is cancelled instead, and the answer False. That it had begun is remembered
        only if it `crashed`.
        """
        with self._held() as connection:  # so that nobody notes a stop between the two
            if connection.execute("SELECT 1 FROM jobs WHERE id = ? AND stop", (job_id,)).fetchone():
                self.finish(job_id, State.CANCELLED, nowhere(job_id))
                return False
            with self._transaction() as run:
                self._drop(self._files(job_id))
                run(
                    "UPDATE jobs SET state = 'pending', started = NULL, cached = '[]', outputs = '{}',"
                    " attempts = attempts * ? WHERE id = ? AND state = 'in_progress'",
                    (crashed, job_id),
                )
            return True

    def recover(self, failure: Callable[[Job], Mapping[str, Any]]) -> list[Job]:
        """After a crash: requeue what was in progress; what has become of it.

        Only while no worker of this database lives. A job that has been attempted `MAX_ATTEMPTS` times has
        failed, as `failure` tells.
        """
        found = self.jobs([State.IN_PROGRESS])
        for job in found:
            if self._has_had_its_chances(job.id):
                self.finish(job.id, State.FAILED, failure(job))
            else:
                self.requeue(job.id, crashed=True)
        now_there = (self.get(job.id) for job in found)  # but for what has been deleted meanwhile
        return [job for job in now_there if job is not None]

    def _has_had_its_chances(self, job_id: str) -> bool:
        query = "SELECT 1 FROM jobs WHERE id = ? AND attempts >= ? AND NOT stop"
        with self._held() as connection:
            return connection.execute(query, (job_id, MAX_ATTEMPTS)).fetchone() is not None

    # --- what the worker does -------------------------------------------------------------------------

    def reserve(self, job_id: str, path: Path) -> None:
        """Note that a job is about to write this file."""
        with self._transaction() as run:
            values = (os.fsencode(path.absolute()), job_id)
            run("INSERT OR REPLACE INTO files (path, job) VALUES (?, ?)", values)

    # --- settings of the editor -----------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """All settings."""
        with self._held() as connection:
            rows = connection.execute("SELECT key, value FROM settings").fetchall()
        return {row["key"]: json.loads(row["value"]) for row in rows}

    def set_settings(self, values: Mapping[str, Any]) -> None:
        """Set some settings."""
        with self._transaction() as run:
            for key, value in values.items():
                run("INSERT OR REPLACE INTO settings VALUES (?, ?)", (key, json.dumps(value)))

    # --- inside ---------------------------------------------------------------------------------------

    def _migrate(self) -> None:
        version = self._connection.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise sqlite3.DatabaseError("it was written by a newer version of usoflow")
        for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
            self._connection.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")

    @contextmanager
    def _held(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time."""
        with self._lock:
            try:
                yield self._connection
            except (OSError, sqlite3.Error) as error:
                raise _unusable(self._path, error) from error

    @contextmanager
    def _transaction(self) -> Iterator[Callable[..., sqlite3.Cursor]]:
        with self._held() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection.execute
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # SQLite ends it itself where the disk is full
                    connection.execute("ROLLBACK")
                raise

    def _select(self, query: str, values: Sequence[object] = ()) -> list[Job]:
        with self._held() as connection:
            return [_job(row) for row in connection.execute(query, tuple(values)).fetchall()]

    def _get(self, job_id: str) -> Job:
        return self._select(f"{_JOBS} WHERE id = ?", (job_id,))[0]

    def _drop(self, paths: Iterable[Path]) -> None:
        """Delete files, also where they are half written, and free their names."""
        for path in paths:
            try:
                path.with_suffix(PARTIAL_SUFFIX).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            except OSError as error:  # no reason to hold up the queue
                logger.warning("%s cannot be removed: %s.", path, error.strerror)
            self._connection.execute("DELETE FROM files WHERE path = ?", (os.fsencode(path),))

    def _files(self, job_id: str) -> Sequence[Path]:
        rows = self._connection.execute("SELECT path FROM files WHERE job = ?", (job_id,)).fetchall()
        return [Path(os.fsdecode(row["path"])) for row in rows]


def _unusable(path: Path, error: Exception) -> UsoflowError:
    """With the remedy for a full disk, where it seems to be one: what is on it is whole."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    advice = None
    if code == sqlite3.SQLITE_FULL or getattr(error, "errno", None) == errno.ENOSPC:
        advice = f"Make room on the disk of {path.parent}; no job that was accepted is lost."
    elif code == sqlite3.SQLITE_IOERR:
        advice = f"Look at the disk of {path.parent}: it may be full, or gone."
    return UsoflowError("state_unusable", f"{path} cannot be used: {error}.", remedy=advice)


def _job(row: sqlite3.Row) -> Job:
    decoded = {name: json.loads(row[name]) for name in ("cached", "outputs")}
    error = None if row["error"] is None else json.loads(row["error"])
    return Job(**{**dict(row), **decoded, "state": State(row["state"]), "error": error})


def _marks(values: Collection[object]) -> str:
    return f"({', '.join('?' * len(values))})"


def _chosen(job_ids: Collection[str] | None) -> tuple[str, tuple[str, ...]]:
    """A condition for these jobs, any number of them; None is all."""
    if job_ids is None:
        return "", ()
    return "AND id IN (SELECT value FROM json_each(?))", (json.dumps(list(job_ids)),)


def _text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None
