"""Ends what a run leaves behind when it is killed: ``python -m pipelines.guard PID``.

The kernel ends Ray's main processes with the run that started them, but their helpers look for a dead Ray for over a
minute first. The guard is a child of the run and holds the reading end of a pipe. While the pipe is open it remembers
which processes descend from the run; when it closes, because the run ended in whatever way, it ends those that are
left.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

from pipelines.processes import descendants, process_start

_SECONDS_BETWEEN_LOOKS = 2.0


def start_guard() -> subprocess.Popen[bytes]:
    """Start the guard of this process; it ends by itself after this process."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines.guard", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # a signal for the run's group is not for its guard
    )


def main(pid: int) -> None:
    """Wait for the end of a process and end what it left."""
    known: dict[int, str] = {}
    closed = False
    while not closed:
        for child in descendants(pid) - {os.getpid()}:
            if child not in known and (start := process_start(child)) is not None:
                known[child] = start
        closed = bool(select.select([sys.stdin], [], [], _SECONDS_BETWEEN_LOOKS)[0])
    for child, start in known.items():
        if process_start(child) == start:
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
