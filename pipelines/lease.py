"""One owner at a time for a step's output folder.

The lease is the file ``_lease.json`` in the folder: who owns it, and a heartbeat that the owner renews. An owner on
this machine is dead when its process is gone, at once; one on another machine when its heartbeat has stood still for
:data:`TIMEOUT_S` by *our* clock, so that clocks which disagree cannot steal work. Changing hands is serialised by a
lock file on a local disk; an object store has no lock, so there a new owner writes, waits and looks whether its own
record is the one that stayed.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import InfraError
from pipelines.files import file_lock
from pipelines.processes import process_start
from pipelines.progress import get_logger

if TYPE_CHECKING:
    from pipelines.store import OutputFolder

HEARTBEAT_S = 10.0
"""Seconds between two heartbeats of an owner."""
TIMEOUT_S = 60.0
"""Seconds without a heartbeat after which an owner on another machine counts as dead."""
_LONG_DEAD_S = 900.0  # older than any sane difference of clocks: no need to watch it first
_SETTLE_S = 2.0  # on an object store: longer than one write takes

LEASE_FILE = "_lease.json"
_log = get_logger(__name__)


def _machine() -> str:
    """Name this boot of this machine, and the container in which its process numbers hold."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def describe_owner(record: dict[str, Any]) -> str:
    """Return ``process 123 of user on host`` for messages."""
    return f"process {record.get('pid')} of {record.get('user')} on {record.get('host')}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


class Lease:
    """The right to write into one output folder; use it as a context manager once acquired."""

    def __init__(self, folder: OutputFolder) -> None:
        self._folder = folder
        self.token = uuid.uuid4().hex
        self._watched: tuple[str, float, float] | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def _record(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "process_start": process_start(os.getpid()),
            "user": _user(),
            "command": sys.argv,
            "heartbeat": time.time(),
        }

    def owner_is_alive(self, record: dict[str, Any]) -> bool:
        """Tell whether the owner named by a record may still be writing."""
        if record.get("machine") == _machine():
            pid = record.get("pid")
            start = process_start(pid) if isinstance(pid, int) else None
            return start is not None and start == record.get("process_start")
        heartbeat = float(record.get("heartbeat", 0.0))
        if time.time() - heartbeat > _LONG_DEAD_S:
            return False
        now = time.monotonic()
        if self._watched is None or self._watched[:2] != (record.get("token"), heartbeat):
            self._watched = (str(record.get("token")), heartbeat, now)
        return now - self._watched[2] < TIMEOUT_S

    def try_acquire(self) -> dict[str, Any] | None:
        """Take the lease if it is free or its owner is dead.

        Returns:
            ``None`` when the lease is ours now, else the record of the living owner.
        """
        with self._changing_hands():
            current = read_lease(self._folder)
            if current is not None:
                if self.owner_is_alive(current):
                    return current
                _log.info("[%s] taking over from %s, which is gone", self._folder.step, describe_owner(current))
            self._write()
        if self._folder.local_root is None:
            time.sleep(_SETTLE_S)
            current = read_lease(self._folder)
            if current is None or current.get("token") != self.token:
                return current or {}
        self._thread = threading.Thread(target=self._beat, name="lease-heartbeat", daemon=True)
        self._thread.start()
        return None

    def _changing_hands(self) -> AbstractContextManager[None]:
        local = self._folder.local_root
        return file_lock(local / "_lease.lock") if local else nullcontext()

    def _write(self) -> None:
        self._folder.write_bytes(LEASE_FILE, json.dumps(self._record(), indent=1).encode())

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                with self._changing_hands():
                    current = read_lease(self._folder)
                    if current is None or current.get("token") != self.token:
                        return  # lost: the next write into the folder says so
                    self._write()
            except OSError as error:
                _log.warning("[%s] heartbeat failed: %s", self._folder.step, error)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with self._changing_hands():
            current = read_lease(self._folder)
            if current is not None and current.get("token") == self.token:
                self._folder.remove(LEASE_FILE)


def read_lease(folder: OutputFolder) -> dict[str, Any] | None:
    """Return the lease's record, or ``None`` when nobody holds the folder."""
    try:
        record = json.loads(folder.read_bytes(LEASE_FILE))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}  # not ours and not readable: treated as an owner that died long ago
    return record if isinstance(record, dict) else {}


def check_lease(folder: OutputFolder, token: str) -> None:
    """Refuse to go on when the folder has another owner by now.

    Raises:
        InfraError: The lease is not held with ``token`` any more.
    """
    current = read_lease(folder)
    if current is None or current.get("token") != token:
        owner = describe_owner(current) if current else "nobody"
        raise InfraError(f"{folder.uri} is owned by {owner} now: this run was taken for dead and stops writing")
