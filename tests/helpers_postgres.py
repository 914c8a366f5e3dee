"""A real PostgreSQL server on a socket of its own, for one run of tests."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

PLACES = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
SECONDS = 60


def missing() -> str | None:
    """Why there can be no server here, or None."""
    try:
        import psycopg  # noqa: F401
        import psycopg_pool  # noqa: F401
    except ImportError:
        return "PostgreSQL needs the extra efficientad[postgres]"
    if _program("initdb") is None or _program("postgres") is None:
        return "there is no PostgreSQL server: apt install postgresql"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([*PLACES, os.environ.get("PATH", "")]))


class PostgresServer:
    """A server that listens on a socket in a folder of its own."""

    def __init__(self) -> None:
        self.folder = Path(
            tempfile.mkdtemp(prefix="ead-pg-", dir="/tmp")
        )  # a socket's path is short
        self._schemas = 0
        # A server does not start as root; its package has made a user.
        self._as = {"user": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
        if self._as:
            os.chown(self.folder, pwd.getpwnam("postgres").pw_uid, -1)
        self._environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
        subprocess.run(
            [_program("initdb"), "-D", self.folder / "data", "-U", "line3", "-A", "trust",
             "-E", "UTF8", "--no-sync", "--no-instructions"],
            check=True, capture_output=True, cwd=self.folder, env=self._environment, **self._as,
        )  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        import psycopg

        settings = {
            "listen_addresses": "", "unix_socket_directories": self.folder, "fsync": "off",
            "shared_buffers": "16MB", "max_connections": 40,
        }  # fmt: skip
        words = [f"-c{name}={value}" for name, value in settings.items()]
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                [_program("postgres"), "-D", self.folder / "data", *words],
                stdout=log, stderr=log, cwd=self.folder, env=self._environment, **self._as,
            )  # fmt: skip
        until = time.monotonic() + SECONDS
        while True:
            try:
                psycopg.connect(self.url()).close()
                return
            except psycopg.OperationalError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < until
                time.sleep(0.02)

    def url(self, schema: str = "public") -> str:
        """Where a client finds the schema."""
        path = quote(f"-csearch_path={schema}")
        return f"postgresql://line3@/postgres?host={quote(str(self.folder))}&options={path}"

    def schema(self) -> str:
        """URL of a new schema."""
        self._schemas += 1
        name = f"line{self._schemas}"
        self.run(f"CREATE SCHEMA {name}")
        return self.url(name)

    def run(self, sql: str) -> list[tuple]:
        """What a statement gives, from a connection of its own."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as db:
            cursor = db.execute(sql)
            return cursor.fetchall() if cursor.description else []

    def disconnect(self) -> None:
        """Cut every client's connection."""
        self.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'efficientad'"
        )

    def stop(self) -> None:
        """As a power cut: it recovers when it is started again."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(SECONDS)

    def close(self) -> None:
        """Stop it and leave nothing behind."""
        if self._process.poll() is None:
            self.stop()
        shutil.rmtree(self.folder)
