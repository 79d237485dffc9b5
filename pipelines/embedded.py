"""The Prefect server of a run that was given none: started by the run, ended with it.

Prefect's own temporary server outlives a run that is killed, and two runs that start together both migrate the
database that they share. This one is ended by the kernel when its run dies, however it dies, and the start is
serialised by a lock.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from pipelines.errors import InfraError
from pipelines.files import file_lock

_START_TIMEOUT_S = 120.0
_PR_SET_PDEATHSIG = 1  # prctl(2), Linux


class EmbeddedPrefect:
    """A Prefect API server on a free local port, over a sqlite database in ``home``.

    :meth:`start` returns at once, so that the server starts while the caller does other things; :meth:`wait` blocks
    until it answers. Ended by :meth:`stop`, or by the kernel when this process dies.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._log = home / "prefect-server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.api_url = ""

    def start(self) -> None:
        """Start the server. Must be called from the main thread, whose death ends it."""
        self._home.mkdir(parents=True, exist_ok=True)
        # Databases are migrated by whoever comes first; a second run must not do it at the same moment.
        with file_lock(self._home / "prefect.lock"):
            migrated = self._home / f"prefect-{importlib.metadata.version('prefect')}.migrated"
            self._launch()
            if not migrated.exists():
                self.wait()
                migrated.touch()

    def _launch(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.api_url = f"http://127.0.0.1:{port}/api"
        environment = {
            **os.environ,
            "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{self._home / 'prefect.db'}",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
        }
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def die_with_parent() -> None:
            if libc is not None:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which then stops its server

        options = ("--host", "127.0.0.1", "--port", str(port), "--log-level", "error")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", *options],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,
            )

    def wait(self) -> None:
        """Block until the server answers.

        Raises:
            InfraError: It ended or did not answer in time; the message names its log.
        """
        assert self._process is not None, "start() comes first"
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"{self.api_url}/health", timeout=5.0):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.stop()
        raise InfraError(f"the embedded Prefect server did not start: see {self._log}, or set PREFECT_API_URL")

    def stop(self) -> None:
        """End the server and wait until it is gone."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
