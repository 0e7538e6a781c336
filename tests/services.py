"""Real services for tests: a PostgreSQL of Debian's packages, and object stores by emulators: S3 by moto, Azure's by
azurite, Google's by gcp-storage-emulator. Each on 127.0.0.1, ended with the test session and by itself after some
minutes."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

LIFETIME = "900"  # seconds after which a forgotten server ends


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgres_programs() -> Path | None:
    """The folder of initdb and postgres; None if they are not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    which = shutil.which("initdb")
    return found[-1].parent if found else Path(which).parent if which else None


def _unprivileged() -> list[str]:
    """PostgreSQL does not run as root: another user's name in front of its commands, where root runs the tests."""
    if os.geteuid() != 0:
        return []
    names = {entry.pw_name for entry in pwd.getpwall()}
    user = next(name for name in ("postgres", "nobody") if name in names)
    return ["runuser", "-u", user, "--"]


@contextlib.contextmanager
def postgres(programs: Path) -> Iterator[str]:
    """A fresh cluster; yields ``postgresql+psycopg://tunegate@127.0.0.1:PORT``, without a database's name."""
    folder = Path(tempfile.mkdtemp(prefix="tunegate-pg-", dir="/tmp"))
    prefix, port = _unprivileged(), free_port()
    if prefix:
        shutil.chown(folder, prefix[2])
    try:
        subprocess.run(
            [*prefix, str(programs / "initdb"), "-D", str(folder / "data"), "-A", "trust", "-U", "tunegate", "-N",
             "-E", "UTF8", "--locale=C"],
            check=True, capture_output=True, cwd="/",
        )  # fmt: skip
        options = f"port={port} listen_addresses=127.0.0.1 unix_socket_directories= max_connections=200"
        options += " fsync=off full_page_writes=off autovacuum=off jit=off"
        command = [*prefix, "timeout", "-s", "INT", LIFETIME, str(programs / "postgres"), "-D", str(folder / "data")]
        for option in options.split():
            command += ["-c", option]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        try:
            _wait(port, server)
            ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
            while server.poll() is None and subprocess.run(ready, check=False).returncode:
                time.sleep(0.1)
            yield f"postgresql+psycopg://tunegate@127.0.0.1:{port}"
        finally:
            stop = [str(programs / "pg_ctl"), "-D", str(folder / "data"), "-m", "immediate", "stop"]
            subprocess.run([*prefix, *stop], check=False, capture_output=True, cwd="/")
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def moto_s3() -> contextlib.AbstractContextManager[str]:
    """An S3; yields its endpoint."""
    return _served([sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p"])


def azurite() -> contextlib.AbstractContextManager[str]:
    """Azure's blob storage; yields its endpoint."""
    command = ["azurite-blob", "--silent", "--disableTelemetry", "--inMemoryPersistence", "--skipApiVersionCheck"]
    return _served([*command, "--blobHost", "127.0.0.1", "--blobPort"])


def google_storage(bucket: str) -> contextlib.AbstractContextManager[str]:
    """Google's Cloud Storage with an empty ``bucket``; yields its endpoint."""
    command = [sys.executable, "-m", "gcp_storage_emulator", "start", "--quiet", "--in-memory"]
    return _served([*command, "--host", "127.0.0.1", "--default-bucket", bucket, "--port"])


@contextlib.contextmanager
def _served(command: list[str]) -> Iterator[str]:
    """The server that ``command`` starts on the port that is put behind it."""
    port = free_port()
    server = subprocess.Popen(
        ["timeout", "-s", "KILL", LIFETIME, *command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # `timeout` leads a group of its own
        server.wait(30)


def _wait(port: int, server: subprocess.Popen[bytes], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError("the server does not answer")
